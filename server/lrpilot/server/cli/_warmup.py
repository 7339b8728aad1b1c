"""How long a run should warm up: from its parameters, its batch and its length."""

import math
from dataclasses import dataclass
from fractions import Fraction

SHORTEST, LONGEST = 500, 2000
"""Steps of warmup of a model below `HUGE` parameters."""

SMALL, LARGE = 1e8, 7e9
"""Parameters at which the shortest and from which on the longest warmup is advised."""

HUGE, ENORMOUS = 1e11, 1e12
"""Parameters from which on warmup is a share of the run: 5% there, 10% at the second."""

LOWEST_SHARE, HIGHEST_SHARE = Fraction(5, 100), Fraction(10, 100)

WARMUP_TOKENS = 375_000_000
"""Tokens that GPT-3 warmed up over."""

_STEP_SOURCES = (
    "LLaMA (arXiv 2302.13971), OPT-175B (2205.01068) and DeepSeek-V3 (2412.19437): 2,000 steps",
    "GPT-3 (2005.14165) and BLOOM (2211.05100): 375M tokens, at any size of model",
    "Ma and Yarats (1910.04209): 2 / (1 - beta2) steps are enough for Adam, 2,000 at 0.999",
)
_SHARE_SOURCES = (
    "5 to 10% is lrpilot's own cautious rule: a run of this size is not started twice",
    "published runs used less: OPT-175B (2205.01068) 2,000 steps, Llama 3 405B (2407.21783) 8,000 "
    "of 1,200,000",
)


@dataclass(frozen=True, slots=True)
class WarmupAdvice:
    """A length of warmup and why."""

    steps: int
    """Optimizer steps."""
    low: int
    high: int
    """Steps between which any length is usual."""
    total_steps: int
    """Length of the run."""
    reasons: tuple[str, ...]
    sources: tuple[str, ...]

    @property
    def share(self) -> float:
        """Share of the run."""
        return self.steps / self.total_steps


def advise_warmup(parameters: int, batch_tokens: int, total_steps: int) -> WarmupAdvice:
    """Return the warmup that is advised, in optimizer steps.

    More precisely, with P parameters and B tokens a step:

    - `P < 1e11`: the greater of `500 * 4**x`, where x goes from 0 at P = 1e8 to 1 at P = 7e9 on a
      logarithmic scale, and `375e6 / B`; from 500 to 2000, in fifties; at most 10% of the run.
    - `P >= 1e11`: a share of the run, from 5% there to 10% at P = 1e12 on a logarithmic scale.

    >>> advise_warmup(8_000_000_000, 4_000_000, 50_000).steps
    2000
    >>> advise_warmup(175_000_000_000, 3_200_000, 100_000).steps
    6215
    """
    if parameters >= HUGE:
        return _by_share(parameters, total_steps)
    by_size = SHORTEST * (LONGEST / SHORTEST) ** _between(parameters, SMALL, LARGE)
    by_tokens = WARMUP_TOKENS / batch_tokens
    wanted = min(max(by_size, by_tokens, SHORTEST), LONGEST)
    longest = max(1, math.floor(total_steps * HIGHEST_SHARE))
    shortest = max(1, math.floor(total_steps * LOWEST_SHARE))
    steps = min(50 * round(wanted / 50), longest)
    reasons = [
        f"{short_count(parameters)} parameters: {_near(by_size)} steps, from 500 at 100M to 2,000 "
        "from 7B on",
        f"{short_count(batch_tokens)} tokens a step: 375M tokens are {_near(by_tokens)} steps",
    ]
    if by_tokens > by_size and by_tokens > SHORTEST:
        reasons.append("the batch is small: the tokens decide")
    if steps == longest:
        reasons.append(f"the run is short: at most 10% of its {total_steps:,} steps")
    return WarmupAdvice(
        steps=steps,
        low=min(SHORTEST, shortest),
        high=min(LONGEST, longest),
        total_steps=total_steps,
        reasons=tuple(reasons),
        sources=_STEP_SOURCES,
    )


def _by_share(parameters: int, total_steps: int) -> WarmupAdvice:
    low, high = (max(1, round(total_steps * edge)) for edge in (LOWEST_SHARE, HIGHEST_SHARE))
    steps = round(low + (high - low) * _between(parameters, HUGE, ENORMOUS))
    return WarmupAdvice(
        steps=steps,
        low=low,
        high=high,
        total_steps=total_steps,
        reasons=(
            f"{short_count(parameters)} parameters: a share of the run, from 5% at 100B to 10% "
            "from 1T on",
        ),
        sources=_SHARE_SOURCES,
    )


def _between(value: float, low: float, high: float) -> float:
    """Return where a value lies between two on a logarithmic scale: 0 to 1."""
    return min(max(math.log(value / low) / math.log(high / low), 0.0), 1.0)


def _near(steps: float) -> str:
    return f"{round(steps):,}"


def short_count(value: float) -> str:
    """Return a number as people write it, such as 8B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
