"""What is wrong with a recorded loss curve, found by the policies in mode advise."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lrpilot.core import Adjustment, RunSpec, parse_spec
from lrpilot.core._fields import length_of
from lrpilot.core._spec import LearningRate, parse_policy
from lrpilot.server.cli._losses import LossRow
from lrpilot.server.cli._trace import simulated

KINDS: Mapping[str, tuple[str, str]] = {
    "nonfinite": ("not finite", "start over with a lower learning_rate.peak"),
    "spike": ("spikes", "start over with a lower learning_rate.peak, or pass over the bad data"),
    "divergence": ("divergence", "start over with a lower learning_rate.peak"),
    "warmup-guard": ("early oscillation", "start over with a longer learning_rate.warmup"),
    "slow-convergence": ("slow convergence", "start over with a higher learning_rate.peak"),
    "overfit": ("overfitting", "start over with a higher weight_decay or a shorter total"),
    "plateau": ("plateau", "end the run, or begin its decay earlier"),
    "decay-on-plateau": ("plateau", "end the run, or begin its decay earlier"),
}
"""By kind of policy: what the trouble is called, and what else helps than letting it act."""

CONSEQUENCES = ("slow-convergence", "overfit", "plateau", "decay-on-plateau")
"""What a divergence may bring with it."""

ASSUMED_WARMUP = 0.05
"""Share of the losses that is taken for warmup where no spec says."""
LONGEST_WARMUP = 2000
REPORTS = 50
"""Reports into which a plateau policy divides the losses unless the spec says otherwise."""
SHORTEST_REPORT = 20
"""Losses in such a report at least: the mean of fewer is noise."""
LONGEST_MEAN = 100
"""Losses in a mean of the overfit policy at most."""
WINDOW = 16
"""Losses in a mean of the warmup-guard policy, and such means that a warmup should hold; fewer
losses in a mean where the recorded ones are too sparse for that."""
VALIDATION = "val_loss"
"""The validation loss that is looked at if there are several."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One trouble, where it shows, and what to do about it."""

    kind: str
    """The policy that sees it."""
    seen: tuple[Adjustment, ...]
    """What the policy would have done, in order, at least one."""
    policies: tuple[Mapping[str, Any], ...]
    """The remedy: what the spec's policies of this kind become; empty if they act already, or if
    something else must be mended first."""
    is_late: bool
    """Whether it shows only after a divergence, of which it may be a consequence."""

    @property
    def trouble(self) -> str:
        """What people call it."""
        return KINDS[self.kind][0]

    @property
    def signs(self) -> tuple[Adjustment, ...]:
        """One decision of each progress at which it shows."""
        first: dict[int, Adjustment] = {}
        for item in self.seen:
            first.setdefault(item.decided_at, item)
        return tuple(first.values())

    @property
    def otherwise(self) -> str:
        """What else helps."""
        return KINDS[self.kind][1]


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Everything that is wrong, in the order in which it began."""

    findings: tuple[Finding, ...]
    document: Mapping[str, Any]
    """The spec with the remedies of all findings, those of its stages included."""
    not_looked_for: tuple[tuple[str, str], ...]
    """(trouble, why) for what could not be seen."""


def assumed_document(rows: Sequence[LossRow]) -> dict[str, Any]:
    """Return the spec that losses are read by where none is given: a constant LR after a warmup."""
    total = rows[-1].progress + 1
    warmup = min(LONGEST_WARMUP, math.floor(ASSUMED_WARMUP * total))
    return {
        "name": "recorded",
        "total": total,
        "learning_rate": {"peak": 1e-3, "warmup": warmup},
        "weight_decay": 0.1,
    }


def diagnose(document: Mapping[str, Any], rows: Sequence[LossRow]) -> Diagnosis:
    """Return what the policies see in the losses of the run that `document` describes.

    Every policy of `KINDS` looks, in mode advise: with the fields that the document gives it, else
    with its defaults. Nothing is changed by one while another looks.

    Args:
        document: a valid run spec, as its author wrote it.
        rows: the losses, at least one.
    """
    own = _policies(document)
    fields = _defaults(parse_spec(document), rows)
    looking = [{**item, "mode": "advise"} for item in _looking(own, fields)]
    spec = parse_spec({**_without_stage_policies(document), "policies": looking})
    decided = [item for step in simulated(spec, rows, show_progress=True) for item in step.decided]
    seen = {kind: tuple(item for item in decided if item.kind == kind) for kind in KINDS}
    diverged = seen["divergence"][0].decided_at if seen["divergence"] else math.inf
    findings = []
    for kind, items in seen.items():
        is_late = kind in CONSEQUENCES and bool(items) and items[0].decided_at > diverged
        remedy = () if is_late else tuple(_acting(own, kind, fields.get(kind, {})))
        if items:
            findings.append(Finding(kind, items, remedy, is_late))
    findings.sort(key=lambda finding: finding.seen[0].decided_at)
    remedied = _remedied(document, findings)
    return Diagnosis(tuple(findings), remedied, tuple(_unseen(fields)))


def _policies(part: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return list(part.get("policies") or ())


def _without_stage_policies(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the document with the run's policies in every stage: those that look, look there."""
    stages = [
        {name: value for name, value in stage.items() if name != "policies"}
        for stage in document.get("stages") or ()
    ]
    return {**document, "stages": stages}


def _remedied(document: Mapping[str, Any], findings: Sequence[Finding]) -> Mapping[str, Any]:
    """Return the document with the remedies among its policies, and those of its stages."""
    changed = {**document, "policies": list(_merged(_policies(document), findings))}
    if document.get("stages"):
        changed["stages"] = [
            {**stage, "policies": list(_merged(_policies(stage), findings))}
            if stage.get("policies") is not None
            else stage
            for stage in document["stages"]
        ]
    return changed


def _defaults(spec: RunSpec, rows: Sequence[LossRow]) -> dict[str, dict[str, Any]]:
    """Return the fields of each policy that looks although the spec does not name it.

    A policy that could see nothing in these losses is left out.
    """
    fields: dict[str, dict[str, Any]] = {kind: {"kind": kind} for kind in KINDS}
    losses = sum(row.loss is not None for row in rows)
    for kind in ("plateau", "decay-on-plateau"):
        fields[kind]["window"] = max(SHORTEST_REPORT, losses // REPORTS)
    warming = _warming(spec, rows)
    fields["warmup-guard"]["window"] = min(WINDOW, max(2, warming // WINDOW))
    if warming < WINDOW:
        del fields["warmup-guard"]
    if not any(rate.decay.style == "wsd" for rate in _rates(spec)):
        del fields["decay-on-plateau"]
    names = sorted({name for row in rows for name in row.validation})
    if names:
        fields["overfit"]["metric"] = VALIDATION if VALIDATION in names else names[0]
        fields["overfit"]["window"] = min(LONGEST_MEAN, max(1, losses // REPORTS))
    else:
        del fields["overfit"]
    return fields


def _rates(spec: RunSpec) -> list[LearningRate]:
    """Return the LR of each stage, or of the run."""
    if spec.stages:
        return [stage.learning_rate for stage in spec.stages]
    return [] if spec.learning_rate is None else [spec.learning_rate]


def _warming(spec: RunSpec, rows: Sequence[LossRow]) -> int:
    """Return how many losses of the first warmup there are."""
    first = _rates(spec)[0]
    end = length_of(first.warmup, first.decay.end or spec.total)
    return sum(row.loss is not None and row.progress < end for row in rows)


def _looking(
    own: Sequence[Mapping[str, Any]], fields: Mapping[str, Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    kept = [item for item in own if item["kind"] in KINDS]
    known = {item["kind"] for item in kept}
    return [*kept, *(item for kind, item in fields.items() if kind not in known)]


def _acting(
    own: Sequence[Mapping[str, Any]], kind: str, fields: Mapping[str, Any]
) -> list[Mapping[str, Any]]:
    """Return the policies of a kind in mode act; none if that is what they are in already."""
    same = [item for item in own if item["kind"] == kind]
    if same and all(parse_policy(item).mode == "act" for item in same):
        return []
    return [{**item, "mode": "act"} for item in same or [fields]]


def _merged(
    own: Sequence[Mapping[str, Any]], findings: Iterable[Finding]
) -> Iterator[Mapping[str, Any]]:
    """Return the spec's policies with the remedies in their places, new ones last."""
    remedies = {finding.kind: list(finding.policies) for finding in findings}
    for item in own:
        same = remedies.get(item["kind"])
        yield same.pop(0) if same else item
    for rest in remedies.values():
        yield from rest


def _unseen(fields: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if "overfit" not in fields:
        yield "overfitting", "no validation loss is recorded"
    if "warmup-guard" not in fields:
        yield "early oscillation", "too few losses of the warmup are recorded"
