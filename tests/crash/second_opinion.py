"""What the values of a logged run must be, without the core's plan, policies and fold."""

from collections.abc import Iterator
from typing import Any

from lrpilot import core
from tests.crash.evidence import Attempt, Hex, Story, hex_of
from tests.rules.reference import Reference, Version

_PLAIN_PLATEAU = {
    "kind": "plateau",
    "mode": "act",
    "objective": "min",
    "threshold": 1e-4,
    "threshold_mode": "rel",
    "cooldown": 0,
    "min_lr": 0.0,
    "eps": 1e-8,
    "window": 1,
    "metric": "loss",
    "nonfinite": "skip",
    "in_stable_phase": False,
}
"""The policy that the reference knows, but for its factor and patience."""


class _Unsupported(Exception):
    """The evaluation without the core does not know what happened here."""


class Evaluation:
    """The values of a run by `tests.rules.reference`, which shares only base curves with the core.

    It knows one plateau policy and the usual changes of operators; where more than that happens,
    it says nothing from there on.
    """

    def __init__(self, story: Story) -> None:
        self._story = story
        self._names: dict[str, tuple[str, int]] = {}
        self._reference: Reference | None = None

    def attempts(self) -> Iterator[tuple[int, dict[int, Hex]]]:
        """Yield attempts and progress to values, where they can be said."""
        current: Attempt | None = None
        for seq, event in enumerate(self._story.events, 1):
            if isinstance(event, core.Opened) and current is not None:
                yield current.number, self._expected(current)
            try:
                self._apply(seq, event)
            except _Unsupported:
                if isinstance(event, core.Opened):
                    return
                current = None
                break
            if isinstance(event, core.Opened):
                current = self._story.attempts.get(event.attempt)
        if current is not None:
            yield current.number, self._expected(current)

    def _expected(self, attempt: Attempt) -> dict[int, Hex]:
        reference = self._reference
        assert reference is not None
        cuts = reference.decided().cuts
        found = {}
        for at, (_, fixed_decays) in attempt.values.items():
            rates, decays = reference._values(at, cuts)
            found[at] = hex_of((rates, None if fixed_decays is None else decays))
        return found

    def _apply(self, seq: int, event: core.Event) -> None:
        reference = self._reference
        if isinstance(event, core.Created):
            self._reference = Reference(event.spec["feedback"]["delay"], [self._version(event)])
            return
        assert reference is not None
        match event:
            case core.Opened():
                if event.fold is not None or event.directive or event.holder or event.reporters:
                    raise _Unsupported
                reference.open(event.begin)
            case core.Reported():
                for report in event.reports:
                    if report.skipped:
                        reference.skip(report.progress, report.loss, report.tries)
                    else:
                        reference.report(report.progress, report.loss, report.moves_to)
            case core.Waived():
                reference.frontier = max(reference.frontier, event.until)
            case core.Revised():
                if event.effective is None or event.observes_from is None:
                    raise _Unsupported
                reference.count += 1
                version = self._version(event, event.effective, event.observes_from)
                reference.versions.append(version)
            case core.Adjusted():
                self._adjust(seq, event)
            case core.Permitted() | core.Declared():
                raise _Unsupported

    def _version(self, event: Any, effective: int = 0, observes_from: int = 0) -> Version:
        policies = event.spec["policies"]
        is_known = all(
            {name: policy.get(name) for name in _PLAIN_PLATEAU} == _PLAIN_PLATEAU
            for policy in policies
        )
        if not is_known or len(policies) > 1 or event.spec.get("stages"):
            raise _Unsupported
        count = self._reference.count if self._reference else 0
        return Version(effective, observes_from, event.spec, count)

    def _adjust(self, seq: int, event: core.Adjusted) -> None:
        reference = self._reference
        assert reference is not None
        change, at = event.change, event.effective
        self._names[f"{seq}-{reference.frontier}-3000"] = ("made", reference.count + 1)
        match change["action"]:
            case "multiply" if not any(change["min_lr"]) and change["max_lr"] is None:
                factor, eps = float(change["factor"]), float(change["eps"])
                reference._make("multiply", factor, at=at, eps=eps)
            case "set":
                reference._make("set", float(change["lr"]), at=at)
            case "scale weight decay" if change["max_weight_decay"] is None:
                reference._make("scale weight decay", float(change["factor"]), at=at)
            case "hold" if change["length"] is None:
                reference._make("hold", 0.0, at=at)
            case "undo":
                targets = tuple(self._named(target) for target in change["targets"])
                reference._make("undo", 0.0, at=at, targets=targets)
            case "directive":
                reference._make("directive", 0.0, at=at, asked=change["directive"])
            case _:
                raise _Unsupported

    def _named(self, mark: str) -> tuple[str, int]:
        if mark.startswith("n"):
            return "loss", int(mark[1:].partition("-")[0])
        if mark not in self._names:
            raise _Unsupported
        return self._names[mark]
