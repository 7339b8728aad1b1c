"""What a change of the plan can be, as frozen data: proposed by a policy, made by an operator.

A change says what is to happen; an adjustment (`_plan`) says from which progress on, and why.
LR changes form a chain that is evaluated at each progress, in order, on the base LR there.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, TypeAlias

AnnealStyle = Literal["exponential", "linear", "cosine", "minus_sqrt"]
DirectiveKind = Literal["rollback", "skip", "evaluate", "stop"]


@dataclass(frozen=True, slots=True)
class Multiply:
    """Multiply every group's LR, as torch's ReduceLROnPlateau does.

    Down (factor < 1): `x' = max(x * factor, min_lr)` if `x - x' > eps`, else `x`; up is
    mirrored with `max_lr`.
    """

    action: ClassVar[str] = "multiply"
    factor: float
    reason: str
    """Why, as one phrase with the numbers."""
    min_lr: tuple[float, ...] = (0.0,)
    """Floor of each group; the last one holds for all further groups."""
    max_lr: tuple[float, ...] | None = None
    """Ceiling of each group; None where there is none."""
    eps: float = 0.0
    """A change of at most this is not made."""


@dataclass(frozen=True, slots=True)
class Divide:
    """Raise every group's LR by dividing it, as GreedyLR does.

    `x' = min(x / divisor, max_lr)` if `x' - x > eps`, else `x`. Dividing by 0.9 and multiplying by
    1 / 0.9 differ in the last bit.
    """

    action: ClassVar[str] = "divide"
    divisor: float
    """Above 0 and below 1."""
    reason: str
    max_lr: tuple[float, ...]
    """Ceiling of each group; the last one holds for all further groups."""
    eps: float = 0.0


@dataclass(frozen=True, slots=True)
class SetRate:
    """Set the first group's LR and scale the others alike; the schedule goes on from there.

    `x' = lr * (x / r)`, where r is the first group's LR where the change takes effect: exactly
    `lr` there, and as long as the base does not move.
    """

    action: ClassVar[str] = "set"
    lr: float
    reason: str


@dataclass(frozen=True, slots=True)
class Curve:
    """Multiply every group's LR by a factor that moves with progress.

    The factor is linear between the points, the first one's up to it, and the last one's past it.
    A curve that ends at 1 has no effect any more once it got there.
    """

    action: ClassVar[str] = "curve"
    points: tuple[tuple[int, float], ...]
    """(progress since the change took effect, factor), in rising order, at least one."""
    reason: str


@dataclass(frozen=True, slots=True)
class Hold:
    """Freeze LR and WD of every group at their values where the change takes effect.

    It holds through stage changes; later changes apply on top of it.
    """

    action: ClassVar[str] = "hold"
    length: int | None
    """Progress after which it ends by itself; None: only a release ends it."""
    reason: str


@dataclass(frozen=True, slots=True)
class BeginDecay:
    """Anneal every group's LR from its value where the change takes effect down to `min`.

    `x' = min + k(q) * (x0 - min)` with `q = min(progress since then / length, 1)`; the shapes are
    those of `wsd`. A group that is at or below its `min` already stays where it is. Once per stage.
    """

    action: ClassVar[str] = "decay"
    length: int
    """Length of the anneal in the unit, at least 1."""
    style: AnnealStyle
    reason: str


@dataclass(frozen=True, slots=True)
class StretchWarmup:
    """Lengthen what is left of the warmup of the stage in force, so that its slope is lower."""

    action: ClassVar[str] = "stretch warmup"
    factor: float
    """How many times longer the rest becomes, above 1."""
    reason: str


@dataclass(frozen=True, slots=True)
class NextStage:
    """Leave a stage before its planned end."""

    action: ClassVar[str] = "next stage"
    leaves: str
    """Name of the stage that ends."""
    reason: str


@dataclass(frozen=True, slots=True)
class ScaleWeightDecay:
    """Multiply every group's WD: `x' = min(x * factor, max(x, max_weight_decay))`."""

    action: ClassVar[str] = "scale weight decay"
    factor: float
    """From 0 on."""
    reason: str
    max_weight_decay: float | None = None
    """None: no bound."""


@dataclass(frozen=True, slots=True)
class EndOwn:
    """End every LR and WD change that the same policy made before; only policies propose it."""

    action: ClassVar[str] = "end own"
    reason: str


@dataclass(frozen=True, slots=True)
class Undo:
    """Take adjustments back: from here on the plan is what it is without them."""

    action: ClassVar[str] = "undo"
    targets: tuple[str, ...]
    """Marks of the adjustments: what a policy decided on the same loss is the same decision in
    every attempt."""
    reason: str
    ids: tuple[str, ...] = ()
    """Their ids at the time, for people."""


@dataclass(frozen=True, slots=True)
class Direct:
    """Ask the trainers for something at one step: the same one on every rank.

    No value comes of it; without a handler in the trainers it stays an alert.
    """

    action: ClassVar[str] = "directive"
    directive: DirectiveKind
    reason: str
    before: int | None = None
    """rollback: progress at which the damage began; go back to a state from before it."""
    factor: float | None = None
    """rollback: what the LR is multiplied by from where the new attempt opens, below 1."""
    limit: int | None = None
    """rollback: most rollbacks into the same region; one more becomes `stop`."""
    until: int | None = None
    """rollback, skip: progress up to which the data is suspect and may be passed over."""


@dataclass(frozen=True, slots=True)
class Note:
    """Say something: recorded, shown and counted, and nothing more."""

    action: ClassVar[str] = "note"
    reason: str


Change: TypeAlias = (
    Multiply
    | Divide
    | SetRate
    | Curve
    | Hold
    | BeginDecay
    | StretchWarmup
    | NextStage
    | ScaleWeightDecay
    | EndOwn
    | Undo
    | Direct
    | Note
)

_ACTIONS: dict[str, type[Any]] = {
    cls.action: cls
    for cls in (
        Multiply,
        Divide,
        SetRate,
        Curve,
        Hold,
        BeginDecay,
        StretchWarmup,
        NextStage,
        ScaleWeightDecay,
        EndOwn,
        Undo,
        Direct,
        Note,
    )
}

_RATES = ("min_lr", "max_lr")
_FLOATS = ("factor", "divisor", "lr", "eps", "max_weight_decay")


def change_to_mapping(change: Change) -> dict[str, Any]:
    """Return a change as plain data."""
    return {
        "action": change.action,
        **{field.name: getattr(change, field.name) for field in fields(change)},
    }


def change_from_mapping(data: Mapping[str, Any]) -> Change:
    """Return the change that `change_to_mapping` wrote. Raises ValueError for an unknown action."""
    content = dict(data)
    action = content.pop("action")
    if action not in _ACTIONS:
        raise ValueError(f"action: got {action!r}; this release knows {', '.join(_ACTIONS)}")
    for name in _RATES:
        if content.get(name) is not None:
            content[name] = tuple(float(item) for item in content[name])
    for name in _FLOATS:
        if content.get(name) is not None:
            content[name] = float(content[name])
    if "points" in content:
        content["points"] = tuple((at, float(factor)) for at, factor in content["points"])
    for name in ("targets", "ids"):
        if name in content:
            content[name] = tuple(content[name])
    change: Change = _ACTIONS[action](**content)
    return change


def summary_of(change: Change) -> str:
    """Return what a change does, as one phrase.

    >>> summary_of(Multiply(0.5, "why")), summary_of(Hold(None, "why"))
    ('LR x 0.5', 'hold LR and WD')
    """
    match change:
        case Multiply():
            return f"LR x {change.factor:g}"
        case Divide():
            return f"LR / {change.divisor:g}"
        case SetRate():
            return f"LR to {change.lr:g}"
        case Curve():
            shown = ", ".join(f"x {factor:g} at +{at}" for at, factor in change.points)
            return f"LR along a curve: {shown}"
        case Hold():
            held = "hold LR and WD"
            return held if change.length is None else f"{held} for {change.length}"
        case BeginDecay():
            return f"anneal LR over {change.length} ({change.style})"
        case StretchWarmup():
            return f"rest of the warmup x {change.factor:g} as long"
        case NextStage():
            return f"leave stage {change.leaves}"
        case ScaleWeightDecay():
            return f"WD x {change.factor:g}"
        case EndOwn():
            return "end its own changes"
        case Undo():
            return f"take back {', '.join(change.ids or change.targets)}"
        case Direct():
            return _directive_summary(change)
        case Note():
            return "note"


def _directive_summary(change: Direct) -> str:
    words = [f"ask for {change.directive}"]
    if change.before is not None:
        words.append(f"to before {change.before}")
    if change.factor is not None:
        words.append(f"with LR x {change.factor:g}")
    if change.until is not None:
        words.append(f"past data up to {change.until}")
    return " ".join(words)
