"""What counts as an improvement of a metric, as torch and Hugging Face have it."""

import math
from dataclasses import dataclass
from typing import Literal

Objective = Literal["min", "max"]
ThresholdMode = Literal["rel", "abs"]


@dataclass(frozen=True, slots=True)
class Improvement:
    """How far a report must be from the best so far to be better."""

    objective: Objective
    """Whether less or more is better."""
    threshold: float
    """A share of the best (rel) or a difference (abs)."""
    mode: ThresholdMode

    @property
    def worst(self) -> float:
        """The best before the first report: anything is better."""
        return math.inf if self.objective == "min" else -math.inf

    def is_better(self, report: float, best: float) -> bool:
        """Return whether a report is better than the best; NaN never is.

        The expressions and their order are torch's; Hugging Face's give the same bits.
        """
        if self.objective == "min":
            if self.mode == "rel":
                return report < best * (1.0 - self.threshold)
            return report < best - self.threshold
        if self.mode == "rel":
            return report > best * (self.threshold + 1.0)
        return report > best + self.threshold

    def bar(self, best: float) -> str:
        """Return in words where a better report would lie: `below 2 * (1 - 0.0001)`."""
        sign, side = ("-", "below") if self.objective == "min" else ("+", "above")
        if self.mode == "rel":
            return f"{side} {best:.6g} * (1 {sign} {self.threshold:g})"
        return f"{side} {best:.6g} {sign} {self.threshold:g}"


def report_text(metric: str, window: int) -> str:
    """Return what a report is: `loss`, `mean of 20 losses` or `mean of 20 val_loss`."""
    if window == 1:
        return metric
    return f"mean of {window} {'losses' if metric == 'loss' else metric}"


def counted(number: int, noun: str) -> str:
    """Return `1 report` or `2 reports`."""
    return f"1 {noun}" if number == 1 else f"{number} {noun}s"
