"""Who reports, how far each has come, and what is there of steps that not all have reported."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lrpilot.core._events import Report, report_from_list, report_to_list
from lrpilot.core.policies import Observation


@dataclass
class Reporters:
    """The declared reporters of an attempt; one, as a rule."""

    ranks: tuple[int, ...] = (0,)
    """In the order in which their losses are summed."""
    incarnations: dict[int, str] = field(default_factory=dict)
    """Incarnation of each reporter that is known."""
    positions: dict[int, int] = field(default_factory=dict)
    """Progress that each has moved to."""
    parts: dict[int, dict[int, Report]] = field(default_factory=dict)
    """Progress to rank to report, of steps that are not final."""
    skips: dict[tuple[int, int], Report] = field(default_factory=dict)
    """(progress, tries) to skipped updates that cannot be shown yet: steps before are not final."""
    members: dict[int, dict[int, float | None]] = field(default_factory=dict)
    """Progress to rank to loss, of final steps, where there are several reporters."""

    def incarnation(self, rank: int) -> str:
        """Return the incarnation of a reporter; empty until it is known."""
        return self.incarnations.get(rank, "")

    def take(self, rank: int, report: Report, begin: int) -> int:
        """Keep a report of a step that is not final; return how far all have come."""
        if report.skipped:
            # The update is one for all: the first reporter speaks for the others.
            if rank == self.ranks[0]:
                self.skips[report.progress, report.tries] = report
        elif report.has_metrics:
            self.parts.setdefault(report.progress, {})[rank] = report
        return self.move(rank, report.moves_to, begin)

    def move(self, rank: int, to: int, begin: int) -> int:
        """Let a reporter move on; return how far all have come."""
        self.positions[rank] = max(self.positions.get(rank, begin), to)
        return min(self.positions.get(item, begin) for item in self.ranks)

    def final(self, until: int) -> list[Observation]:
        """Return what is known of the steps below `until`, in order, and drop it here.

        Skipped updates at `until` itself are among it.
        """
        skipped = [key for key in self.skips if key[0] <= until]
        ready = [(at, math.inf) for at in self.parts if at < until]
        return [
            self._combined(at, self.parts.pop(at))
            if tries == math.inf
            else _skipped(self.skips.pop((at, int(tries))))
            for at, tries in sorted([*skipped, *ready])
        ]

    def only(self, at: int, counted: Iterable[int]) -> dict[int, Report]:
        """Leave only some ranks' reports of a step; return those of the others."""
        parts, kept = self.parts.pop(at), set(counted)
        if kept:
            self.parts[at] = {rank: part for rank, part in parts.items() if rank in kept}
        return {rank: part for rank, part in parts.items() if rank not in kept}

    def forget(self, observation: Observation) -> dict[int, float | None]:
        """Return the losses of a final step by rank, and let no reporter have said them."""
        at = observation.progress
        if len(self.ranks) == 1:
            return {self.ranks[0]: observation.loss}
        return self.members.pop(at, {})

    def forget_below(self, until: int) -> Iterator[tuple[int, dict[int, float | None]]]:
        """Yield the losses of the steps below `until` that are not final, and drop them here."""
        self.skips = {key: report for key, report in self.skips.items() if key[0] >= until}
        for at in sorted(at for at in self.parts if at < until):
            yield at, {rank: report.loss for rank, report in self.parts.pop(at).items()}

    def trim(self, progress: int) -> None:
        """Drop who said what of the final steps below `progress`."""
        self.members = {at: losses for at, losses in self.members.items() if at >= progress}

    def _combined(self, at: int, parts: Mapping[int, Report]) -> Observation:
        reports = [parts[rank] for rank in self.ranks if rank in parts]
        if len(self.ranks) > 1:
            self.members[at] = {rank: parts[rank].loss for rank in self.ranks if rank in parts}
        loss, left_out = weighted_mean([(item.weight, item.loss) for item in reports])
        names = sorted({name for item in reports for name in item.validation})
        validation = {}
        for name in names:
            value, _ = weighted_mean([(item.weight, item.validation.get(name)) for item in reports])
            if value is not None:
                validation[name] = value
        return Observation(
            progress=at,
            loss=loss,
            validation=validation,
            gradient_norm=_first(item.gradient_norm for item in reports),
            batch=_first(item.batch for item in reports),
            tries=max(item.tries for item in reports),
            left_out=left_out,
        )

    def to_mapping(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "ranks": self.ranks,
            "incarnations": sorted(self.incarnations.items()),
            "positions": sorted(self.positions.items()),
            "parts": [
                [at, [[rank, report_to_list(part)] for rank, part in sorted(parts.items())]]
                for at, parts in sorted(self.parts.items())
            ],
            "skips": [report_to_list(report) for _, report in sorted(self.skips.items())],
            "members": [
                [at, sorted(members.items())] for at, members in sorted(self.members.items())
            ],
        }

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any]) -> "Reporters":
        """Return what `to_mapping` wrote."""
        return cls(
            ranks=tuple(data["ranks"]),
            incarnations=dict(data["incarnations"]),
            positions=dict(data["positions"]),
            parts={
                at: {rank: report_from_list(part) for rank, part in parts}
                for at, parts in data["parts"]
            },
            skips={
                (report.progress, report.tries): report
                for report in map(report_from_list, data["skips"])
            },
            members={
                at: {rank: None if loss is None else float(loss) for rank, loss in members}
                for at, members in data["members"]
            },
        )


def weighted_mean(values: Sequence[tuple[float, float | None]]) -> tuple[float | None, int]:
    """Return the mean of the finite values by their weights, and how many were not finite.

    Summed in order. One value alone is taken as it is. Without a finite one the first of the
    others is returned, and None where there is none at all.
    """
    finite = [(w, x) for w, x in values if x is not None and math.isfinite(x)]
    others = [x for _, x in values if x is not None and not math.isfinite(x)]
    if not finite:
        return (others[0], len(others) - 1) if others else (None, 0)
    if len(finite) == 1:
        return finite[0][1], len(others)
    total = weights = 0.0
    for weight, value in finite:
        total += weight * value
        weights += weight
    return total / weights, len(others)


def _skipped(report: Report) -> Observation:
    return Observation(
        progress=report.progress,
        loss=report.loss,
        gradient_norm=report.gradient_norm,
        batch=report.batch,
        is_skipped=True,
        tries=report.tries,
    )


def observation_to_mapping(observation: Observation) -> dict[str, Any]:
    """Return an observation as plain data."""
    return {name: getattr(observation, name) for name in Observation.__dataclass_fields__}


def observation_from_mapping(data: Mapping[str, Any]) -> Observation:
    """Return the observation that `observation_to_mapping` wrote."""
    values = dict(data)
    for name in ("loss", "gradient_norm"):
        values[name] = None if values[name] is None else float(values[name])
    values["validation"] = {name: float(x) for name, x in data["validation"].items()}
    return Observation(**values)


def _first(values: Iterable[Any]) -> Any:
    return next((value for value in values if value is not None), None)
