"""The run spec: what a user writes, read whole or refused with everything that is wrong.

`parse_spec` is the way in. It reads the fields one by one, then checks them against each
other as far as they were readable, fills in the defaults that depend on other fields, and
returns a frozen `RunSpec`. Building the classes directly skips those checks.

What is not written down elsewhere about the fields:

- A field set to null counts as absent.
- A stage states its own `learning_rate`. In it `peak` and `min` default to the run's
  `learning_rate` where there is one, `decay.end` to the stage's end, everything else to the same
  defaults as in a run without stages.
- A share ("2%") is of the `decay.end` written beside it, in a stage too.
- `weight_decay` of a stage counts `over` from the stage's start, and that defaults to the
  stage's length. A stage without one uses the run's, whose ramp counts from 0 through all
  stages and defaults to `total`.
- A group's `peak`, `min` and `weight_decay` hold in every stage that does not name the group in
  `groups` of its own.
- A stage that ends `when` something holds is checked, and its lengths are filled in, as if it
  ended at its `latest`.
- `policies` of a stage take the place of the run's.
"""

import difflib
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_serializer,
    model_serializer,
)

from lrpilot.core._errors import InvalidSpec, Violation
from lrpilot.core._fields import (
    DURATION,
    LARGEST_RATE,
    LENGTH,
    METRIC,
    Rule,
    SpecModel,
    Words,
    count,
    duration_text,
    length_of,
    number,
    one_of,
    text,
)
from lrpilot.core.policies._interface import PolicySpec
from lrpilot.core.policies._registry import POLICIES

Path = tuple[str | int, ...]

Unit = Literal["iterations", "samples", "tokens"]
DecayStyle = Literal["constant", "linear", "cosine", "inverse-square-root", "wsd"]
AnnealStyle = Literal["exponential", "linear", "cosine", "minus_sqrt"]
WeightDecayStyle = Literal["constant", "linear", "cosine"]

_RATE = number()
_RUN_NAME = text(
    r"[a-z0-9][a-z0-9._-]{0,62}",
    "1 to 63 of a-z 0-9 . _ - that begin with a letter or a digit",
    "run",
)
# Control characters, the other line breaks, and surrogates, which no UTF-8 can carry.
_NO_LABEL = r"\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff"
_LABEL = text(
    rf"[^\s{_NO_LABEL}](?:[^{_NO_LABEL}]{{0,126}}[^\s{_NO_LABEL}])?",
    "1 to 128 characters without line breaks or surrounding blanks",
    "-",
)


def _read_init(value: Any) -> float | str:
    if value == "current":
        return "current"
    rate: float = _RATE.read(value)
    return rate


class Decay(SpecModel):
    """How the LR goes down after warmup."""

    style: Annotated[DecayStyle, one_of(*get_args(DecayStyle))] = "constant"
    end: Annotated[int | None, count(1)] = None
    """Absolute progress at which the decay ends; default the run's total or the stage's end."""
    anneal: Annotated[int | float | str | None, LENGTH] = None
    """Length of the last phase of `wsd`, in the unit, or as a share of `end`."""
    anneal_style: Annotated[AnnealStyle | None, one_of(*get_args(AnnealStyle))] = None
    """Shape of the last phase of `wsd`."""


class LearningRate(SpecModel):
    """The LR of a run or a stage."""

    init: Annotated[
        float | Literal["current"],
        Rule(f"{_RATE.allowed}, or current in a stage after the first", _read_init, 0.0),
    ] = 0.0
    """LR at the start of warmup; `current` is the adjusted LR in force when the stage begins."""
    peak: Annotated[float | None, _RATE] = None
    """LR at the end of warmup."""
    min: Annotated[float | None, _RATE] = None
    """LR past the end of the decay; default 0."""
    warmup: Annotated[int | float | str, LENGTH] = 0
    """Length of warmup, in the unit, or as a share of `decay.end`."""
    decay: Annotated[Decay, Words("a mapping with style, end, anneal and anneal_style")] = Decay()


class WeightDecay(SpecModel):
    """The WD of a run or a stage; a bare number is the same all along."""

    start: Annotated[float, _RATE]
    """WD at the start."""
    end: Annotated[float, _RATE]
    """WD past the ramp."""
    style: Annotated[WeightDecayStyle, one_of(*get_args(WeightDecayStyle))] = "constant"
    over: Annotated[int | None, count()] = None
    """Length of the ramp in the unit; default the whole run or stage."""

    @model_serializer(mode="wrap")
    def _short(self, handler: SerializerFunctionWrapHandler) -> Any:
        if self.style == "constant" and self.over is None and self.start == self.end:
            return self.end
        return handler(self)


class GroupWeightDecay(SpecModel):
    """Where a group's WD starts and ends; default the run's."""

    start: Annotated[float | None, _RATE] = None
    end: Annotated[float | None, _RATE] = None


def _spread(value: Any) -> Any:
    """Read a bare number as a WD that starts and ends there."""
    if isinstance(value, (Mapping, BaseModel)):
        return value
    rate = _RATE.read(value)
    return {"start": rate, "end": rate}


class GroupSpec(SpecModel):
    """What one optimizer param group does differently."""

    name: Annotated[str, _LABEL]
    peak: Annotated[float | None, _RATE] = None
    """Takes the place of `learning_rate.peak`; it may lie below `min`."""
    min: Annotated[float | None, _RATE] = None
    """Takes the place of `learning_rate.min`."""
    weight_decay: Annotated[
        GroupWeightDecay | None,
        BeforeValidator(_spread),
        Words(f"{_RATE.allowed}, or a mapping with start and end"),
    ] = None
    """Takes the place of `weight_decay.start` and `weight_decay.end`."""
    weight_decay_multiplier: Annotated[float, _RATE] = 1.0


_WEIGHT_DECAY_WORDS = Words(f"{_RATE.allowed}, or a mapping with start, end, style and over")
_LEARNING_RATE_WORDS = Words(
    "a mapping with init, peak, min, warmup and decay", example={"peak": 1.0}
)


class PlateauCondition(SpecModel):
    """Holds once the loss has stopped improving, counted as the plateau policy counts."""

    window: Annotated[int, count(1)] = 1
    """Losses in a report: the mean of so many."""
    patience: Annotated[int, count()] = 10
    """Reports without improvement that are borne."""
    threshold: Annotated[float, number()] = 1e-4
    """Share of the best by which a report must lie below it to be an improvement."""


_VALUE = number(low=-LARGEST_RATE)


class BelowCondition(SpecModel):
    """Holds once the mean of the last `window` losses is at most `value`."""

    value: Annotated[float, _VALUE]
    window: Annotated[int, count(1)] = 1


def _below(value: Any) -> Any:
    """Read a bare number as the value itself."""
    if isinstance(value, (Mapping, BaseModel)):
        return value
    return {"value": _VALUE.read(value)}


class Condition(SpecModel):
    """What ends a stage: exactly one of `plateau` and `below`."""

    plateau: Annotated[
        PlateauCondition | None, Words("a mapping with window, patience and threshold")
    ] = None
    below: Annotated[
        BelowCondition | None,
        BeforeValidator(_below),
        Words("a number, or a mapping with value and window"),
    ] = None
    metric: Annotated[str, METRIC] = "loss"
    """What is read: `loss`, or the name of a validation loss."""


class _AnyPolicy(PolicySpec, extra="ignore"):
    """A policy whose kind is not known yet."""

    kind: Annotated[str, one_of(*POLICIES)]


def _policy_type(value: Any) -> type[PolicySpec]:
    kind = value.get("kind") if isinstance(value, Mapping) else None
    registered = POLICIES.get(kind) if isinstance(kind, str) else None
    return registered.spec if registered is not None else _AnyPolicy


def _read_policy(value: Any) -> PolicySpec:
    if isinstance(value, PolicySpec):
        return value
    return _policy_type(value).model_validate(value)


AnyPolicySpec = Annotated[SerializeAsAny[PolicySpec], BeforeValidator(_read_policy)]

_POLICIES_WORDS = Words(
    "a list of at most 256 mappings, each with a kind", example={"kind": "plateau"}
)


class StageSpec(SpecModel):
    """One stage of a run: it ends at `until`, or `when` something holds."""

    name: Annotated[str, _LABEL]
    until: Annotated[int | None, count(1)] = None
    """First progress of the next stage; the last stage runs to the total."""
    when: Annotated[Condition | None, Words("a mapping with plateau or below")] = None
    """What ends the stage before `latest`."""
    earliest: Annotated[int | None, count(1)] = None
    """First progress at which `when` can end the stage."""
    latest: Annotated[int | None, count(1)] = None
    """Progress at which a stage with `when` ends at last."""
    learning_rate: Annotated[LearningRate, _LEARNING_RATE_WORDS]
    weight_decay: Annotated[WeightDecay | None, BeforeValidator(_spread), _WEIGHT_DECAY_WORDS] = (
        None
    )
    groups: Annotated[
        tuple[GroupSpec, ...],
        Field(max_length=4096),
        Words("a list of at most 4096 mappings, each with a name", example={"name": "-"}),
    ] = ()
    """What groups of the run do differently here."""
    policies: Annotated[
        tuple[AnyPolicySpec, ...] | None,
        Field(max_length=256),
        _POLICIES_WORDS,
    ] = None
    """Those of this stage, in place of the run's; None: the run's."""

    @property
    def end(self) -> int | None:
        """First progress of the next stage at the latest; None: the run's end."""
        return self.latest if self.until is None else self.until


class Feedback(SpecModel):
    """How the losses act on the plan."""

    delay: Annotated[int, count(1)] = 32
    """D, in the unit: a loss at n acts at exactly n + D."""
    interval: Annotated[int | None, count()] = None
    """Least progress between two changes of LR or WD by policies; None: any."""
    quorum: Annotated[int | None, count(1)] = None
    """Of several reporters, how many make a loss once a waiver is due; None: more than half."""
    advice_expires: Annotated[int | None, count(1)] = None
    """Progress for which an advice can be approved; None: a twentieth of the total."""
    timeout_s: Annotated[float, DURATION] = Field(default=30.0, alias="timeout")
    """Seconds for which ranks may be blocked on a missing loss before a waiver is recorded."""

    @field_serializer("timeout_s")
    def _text(self, value: float) -> str:
        return duration_text(value)


class Bounds(SpecModel):
    """Limits that no policy or operator leaves; the base schedule may."""

    min_lr: Annotated[float, _RATE] = 0.0
    max_lr: Annotated[float | None, _RATE] = None
    """None: no limit."""


class RunSpec(SpecModel):
    """A run: its curves, groups, stages and policies. Made by `parse_spec`."""

    name: Annotated[str, _RUN_NAME]
    unit: Annotated[Unit, one_of(*get_args(Unit))] = "iterations"
    """What progress counts."""
    total: Annotated[int, count(1)]
    """Planned length in the unit; past it the values of the end are served."""
    learning_rate: Annotated[LearningRate | None, _LEARNING_RATE_WORDS] = None
    """Needed unless there are stages; beside them it holds the defaults of `peak` and `min`."""
    weight_decay: Annotated[WeightDecay | None, BeforeValidator(_spread), _WEIGHT_DECAY_WORDS] = (
        None
    )
    """None: the optimizer's own WD is left alone."""
    groups: Annotated[
        tuple[GroupSpec, ...],
        Field(max_length=4096),
        Words("a list of at most 4096 mappings, each with a name", example={"name": "-"}),
    ] = ()
    stages: Annotated[
        tuple[StageSpec, ...],
        Field(max_length=4096),
        Words(
            "a list of at most 4096 mappings, each with a name and a learning_rate",
            example={"name": "-", "learning_rate": {"peak": 1.0}},
        ),
    ] = ()
    policies: Annotated[
        tuple[AnyPolicySpec, ...],
        Field(max_length=256),
        _POLICIES_WORDS,
    ] = ()
    feedback: Annotated[Feedback, Words("a mapping with delay and timeout")] = Feedback()
    bounds: Annotated[Bounds | None, Words("a mapping with min_lr and max_lr")] = None

    @property
    def group_names(self) -> tuple[str, ...]:
        """Names of the groups in order; one nameless group where none are declared."""
        return tuple(group.name for group in self.groups) or ("",)

    @property
    def has_weight_decay(self) -> bool:
        """Whether the run sets WD; if it does, it does so in every stage."""
        return self.weight_decay is not None or any(stage.weight_decay for stage in self.stages)

    @property
    def has_feedback(self) -> bool:
        """Whether the plan waits for losses: a policy that acts, or a stage's end, reads them."""
        return any(
            policy.needs_feedback
            for index in range(max(1, len(self.stages)))
            for policy in self.policies_in(index)
        ) or any(stage.when is not None for stage in self.stages)

    def policies_in(self, stage: int) -> tuple[PolicySpec, ...]:
        """Return the policies of the stage with this index."""
        own = self.stages[stage].policies if self.stages else None
        return self.policies if own is None else own

    @property
    def delay(self) -> int:
        """D of the design: a loss at n acts at exactly n + D."""
        return self.feedback.delay

    def to_mapping(self) -> dict[str, Any]:
        """Return plain data as JSON holds it, with every default filled in.

        >>> spec = parse_spec({"name": "a", "total": 10, "learning_rate": {"peak": 0.1}})
        >>> spec.to_mapping()["learning_rate"]["decay"]
        {'style': 'constant', 'end': 10}
        >>> parse_spec(spec.to_mapping()) == spec
        True
        """
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


def parse_spec(mapping: Mapping[str, Any]) -> RunSpec:
    """Return the spec that a mapping of plain data describes.

    Raises InvalidSpec with every violation: of single fields, and between those fields that
    could be read.

    >>> parse_spec({"name": "A", "total": 10, "learning_rate": {"peak": 0.1, "min": 0.2}})
    Traceback (most recent call last):
    lrpilot.core._errors.InvalidSpec: the run spec is invalid
      name: got 'A'; allowed: 1 to 63 of a-z 0-9 . _ - that begin with a letter or a digit
      learning_rate.min: got 0.2; allowed: at most learning_rate.peak (0.1)
    """
    if not isinstance(mapping, Mapping):
        raise InvalidSpec(
            "the run spec is invalid", [Violation("", _shown(mapping), "a mapping of fields")]
        )
    raw = _plain(mapping)
    violations: list[Violation] = []
    broken: set[Path] = set()
    while True:
        try:
            spec = RunSpec.model_validate(raw)
        except ValidationError as error:
            for path, violation in _read_errors(error, raw):
                violations.append(violation)
                broken.add(path)
            for path in sorted(broken, key=len, reverse=True):
                _mend(raw, path)
        else:
            break
    violations += _Checks(spec, broken).run()
    if violations:
        raise InvalidSpec("the run spec is invalid", violations)
    return _filled(spec)


def parse_policy(mapping: Mapping[str, Any]) -> PolicySpec:
    """Return one policy's fields as a spec's `policies` list holds them.

    Raises InvalidSpec with every violation; what only the whole spec shows is not checked.

    >>> parse_policy({"kind": "plateau", "patience": 3}).model_dump()["patience"]
    3
    """
    raw = {"policies": [_plain(mapping)]}
    try:
        return _read_policy(raw["policies"][0])
    except ValidationError as error:
        found = _read_errors(error, raw, ("policies", 0))
        raise InvalidSpec("the policy is invalid", [item for _, item in found]) from error


def spec_difference(a: RunSpec, b: RunSpec) -> list[tuple[str, str, str]]:
    """Return `(field path, value in a, value in b)` for each field that differs.

    >>> one = parse_spec({"name": "a", "total": 10, "learning_rate": {"peak": 0.1}})
    >>> two = parse_spec({"name": "a", "total": 10, "learning_rate": {"peak": 0.2}})
    >>> spec_difference(one, two)
    [('learning_rate.peak', '0.1', '0.2')]
    """
    left, right = dict(_leaves((), a.to_mapping())), dict(_leaves((), b.to_mapping()))
    paths = [*left, *(path for path in right if path not in left)]
    return [
        (_dotted(path), left.get(path, "absent"), right.get(path, "absent"))
        for path in paths
        if left.get(path) != right.get(path)
    ]


# ---------------------------------------------------------------------------------------------
# Reading the fields.

_DEEPEST = 16
"""Nothing in a spec lies deeper; what does is refused by the field above it."""


def _plain(value: Any, depth: int = 0) -> Any:
    """Return a copy made of dicts and lists, without the nulls that stand for absent fields."""
    if depth < _DEEPEST:
        if isinstance(value, Mapping):
            return {
                str(key): _plain(item, depth + 1) for key, item in value.items() if item is not None
            }
        if isinstance(value, (list, tuple)):
            return [_plain(item, depth + 1) for item in value]
    return value


def _read_errors(
    error: ValidationError, raw: Any, above: Path = ()
) -> Iterator[tuple[Path, Violation]]:
    for detail in error.errors(include_url=False, include_context=False):
        path: Path = (*above, *detail["loc"])
        missing = detail["type"] == "missing"
        model, words = _describe(path, raw)
        if detail["type"] == "extra_forbidden":
            got, allowed = _shown(detail["input"]), _known_fields(model, str(path[-1]))
        elif missing:
            got, allowed = "nothing", f"{words.allowed} (required)"
        else:
            value = _value_at(raw, path)
            got, allowed = _shown(value), words.allowed
            if isinstance(path[-1], int):
                allowed = f"an item of {allowed}"
            if isinstance(words, Rule) and isinstance(value, str):
                allowed += _near(value, words.options)
        yield path, Violation(_dotted(path), got, allowed)


def _describe(path: Path, raw: Any) -> tuple[type[BaseModel], Rule | Words]:
    """Return the model that the last name of a path belongs to, and what is allowed there."""
    model: type[BaseModel] = RunSpec
    child: type[BaseModel] | None = RunSpec
    words: Rule | Words = Words("a value")
    value = raw
    for part in path:
        value = _value_at(value, (part,))
        if isinstance(part, int):
            # An element of a list: the words of the list speak of its elements.
            if child is not None and issubclass(child, PolicySpec):
                child = _policy_type(value)
            continue
        if child is None:
            break
        model = child
        for name, info in model.model_fields.items():
            if part == (info.alias or name):
                words = next(
                    (item for item in info.metadata if isinstance(item, (Rule, Words))), words
                )
                child = _model_in(info.annotation)
    return model, words


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in {Annotated, Union, types.UnionType, tuple}:
        for item in get_args(annotation):
            if (found := _model_in(item)) is not None:
                return found
    return None


def _known_fields(model: type[BaseModel], name: str) -> str:
    names = [info.alias or field for field, info in model.model_fields.items()]
    return f"no such field here; there are {', '.join(names)}{_near(name, names)}"


def _near(value: str, options: Sequence[str]) -> str:
    close = difflib.get_close_matches(value.lower(), options, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _value_at(raw: Any, path: Path) -> Any:
    for part in path:
        try:
            raw = raw[part]
        except (KeyError, IndexError, TypeError):
            return None
    return raw


def _mend(raw: Any, path: Path) -> None:
    """Put something legal where a value is broken, so that the others can be checked."""
    if path[-1] == "kind" and path[-3:-2] == ("policies",):
        path = path[:-1]
    holder, last = _value_at(raw, path[:-1]), path[-1]
    if isinstance(last, int):
        if isinstance(holder, list) and last < len(holder):
            _, words = _describe(path[:-1], raw)
            holder[last] = _plain(words.example)
        return
    if not isinstance(holder, dict):
        return
    holder.pop(str(last), None)
    model, words = _describe(path, raw)
    for name, info in model.model_fields.items():
        if last == (info.alias or name) and info.is_required():
            holder[str(last)] = _plain(words.example)


# ---------------------------------------------------------------------------------------------
# Checking the fields against each other.


class _Checks:
    """What must hold between the fields; a check that would read a broken field is left out."""

    def __init__(self, spec: RunSpec, broken: set[Path]) -> None:
        self._spec = spec
        self._broken = set(broken)
        self._violations: list[Violation] = []

    def run(self) -> list[Violation]:
        spec = self._spec
        curveless = spec.learning_rate is None and not spec.stages
        if curveless and self._known(("stages",), ("learning_rate",)):
            wanted = f"{_LEARNING_RATE_WORDS.allowed} (required where there are no stages)"
            self._refuse(("learning_rate",), None, wanted)
        if spec.learning_rate is not None:
            self._check_rates(("learning_rate",), spec.learning_rate, stage=None)
        if spec.weight_decay is not None:
            self._check_decay(("weight_decay",), spec.weight_decay, spec.total)
        self._check_groups()
        self._check_stages()
        self._check_policies(("policies",), spec.policies)
        for index, stage in enumerate(spec.stages):
            self._check_policies(("stages", index, "policies"), stage.policies or ())
        low, high = ("bounds", "min_lr"), ("bounds", "max_lr")
        if (
            spec.bounds is not None
            and spec.bounds.max_lr is not None
            and spec.bounds.min_lr > spec.bounds.max_lr
            and self._known(low, high)
        ):
            wanted = f"at most bounds.max_lr ({spec.bounds.max_lr!r})"
            self._refuse(low, spec.bounds.min_lr, wanted)
        return self._violations

    def _check_policies(self, path: Path, policies: Sequence[PolicySpec]) -> None:
        for index, policy in enumerate(policies):
            for misfit in policy.misfits(self._spec.group_names):
                field: Path = (*path, index, misfit.field)
                if self._known(field, ("groups",)):
                    self._refuse(field, misfit.got, misfit.allowed)

    def _known(self, *paths: Path) -> bool:
        return not any(path[:n] in self._broken for path in paths for n in range(1, len(path) + 1))

    def _refuse(self, path: Path, got: object, allowed: str) -> None:
        self._violations.append(
            Violation(_dotted(path), "nothing" if got is None else _shown(got), allowed)
        )
        self._broken.add(path)

    def _check_rates(self, path: Path, rates: LearningRate, stage: int | None) -> None:
        run = self._spec.learning_rate
        begin, begin_at = self._begin(stage)
        peak_at, min_at, init_at = (*path, "peak"), (*path, "min"), (*path, "init")
        peak, floor = rates.peak, rates.min
        peak_from, min_from = peak_at, min_at
        if stage is not None and run is not None:
            if peak is None:
                peak, peak_from = run.peak, ("learning_rate", "peak")
            if floor is None:
                floor, min_from = run.min, ("learning_rate", "min")
        floor = floor or 0.0
        only_defaults = stage is None and bool(self._spec.stages)
        if peak is None:
            if self._known(peak_at, peak_from, ("learning_rate",)) and not only_defaults:
                self._refuse(peak_at, None, f"{_RATE.allowed} (required)")
        elif self._known(peak_at, peak_from):
            of = f"{_dotted(peak_from)} ({peak!r})"
            if self._known(min_at, min_from) and floor > peak:
                self._refuse(min_at, floor, f"at most {of}")
            if self._known(init_at) and rates.init != "current" and rates.init > peak:
                self._refuse(init_at, rates.init, f"at most {of}")
        if self._known(init_at) and rates.init == "current" and not stage:
            self._refuse(
                init_at, "current", f"{_RATE.allowed}: no LR is in force before the first stage"
            )

        decay, end_at = rates.decay, (*path, "decay", "end")
        end, end_from = self._end(decay, end_at, stage)
        if self._known(end_at, end_from, begin_at):
            if end <= begin:
                wanted = f"a position above {begin}, where the stage begins"
                self._refuse(end_at, end, wanted)
            elif self._known((*path, "warmup")) and not length_of(rates.warmup, end) < end - begin:
                span = f"{end - begin}, from the start to decay.end"
                self._refuse((*path, "warmup"), rates.warmup, f"less than {span}")
        if self._known((*path, "decay", "style")):
            wsd = decay.style == "wsd"
            rules: Sequence[tuple[str, object, str]] = (
                ("anneal", decay.anneal, LENGTH.allowed),
                ("anneal_style", decay.anneal_style, f"one of {', '.join(get_args(AnnealStyle))}"),
            )
            for name, value, allowed in rules:
                if not self._known((*path, "decay", name)):
                    continue
                if wsd and value is None:
                    self._refuse((*path, "decay", name), None, f"{allowed} (required by wsd)")
                if not wsd and value is not None:
                    wanted = f"nothing: style {decay.style} has no last phase, wsd has"
                    self._refuse((*path, "decay", name), value, wanted)

    def _begin(self, stage: int | None) -> tuple[int, Path]:
        """Return where a stage begins, and the field that says so."""
        if not stage:
            return 0, ("stages", 0, "begin")
        before = self._spec.stages[stage - 1]
        return before.end or 0, ("stages", stage - 1, _end_field(before))

    def _end(self, decay: Decay, end_at: Path, stage: int | None) -> tuple[int, Path]:
        """Return where a decay ends, and the field that says so."""
        if decay.end is not None:
            return decay.end, end_at
        if stage is not None:
            spec = self._spec.stages[stage]
            ends_at: Path = ("stages", stage, _end_field(spec))
            if spec.end is not None or not self._known(ends_at):
                return spec.end or 0, ends_at
        return self._spec.total, ("total",)

    def _check_decay(self, path: Path, decay: WeightDecay, default_over: int) -> None:
        start_at, end_at, style_at = (*path, "start"), (*path, "end"), (*path, "style")
        if self._known(start_at, end_at):
            if decay.end < decay.start:
                wanted = f"at least {_dotted(start_at)} ({decay.start!r})"
                self._refuse(end_at, decay.end, wanted)
            elif decay.style == "constant" and decay.start != decay.end and self._known(style_at):
                self._refuse(style_at, decay.style, "linear or cosine, as start and end differ")
        over = default_over if decay.over is None else decay.over
        ramps = decay.style != "constant" and self._known(style_at)
        if ramps and over < 1 and self._known((*path, "over")):
            self._refuse((*path, "over"), over, f"at least 1 for style {decay.style}")

    def _check_groups(self) -> None:
        spec, seen = self._spec, dict[str, int]()
        run: list[tuple[Path, WeightDecay]] = []
        if spec.weight_decay is not None:
            run.append((("weight_decay",), spec.weight_decay))
        stages: list[tuple[Path, WeightDecay, set[str]]] = [
            (
                ("stages", index, "weight_decay"),
                stage.weight_decay,
                {group.name for group in stage.groups},
            )
            for index, stage in enumerate(spec.stages)
            if stage.weight_decay is not None
        ]
        for index, group in enumerate(spec.groups):
            path: Path = ("groups", index)
            if self._known((*path, "name")):
                self._once(seen, group.name, index, "groups")
            # A stage that names the group has other fields for it.
            others = [(at, decay) for at, decay, named in stages if group.name not in named]
            self._check_group(path, group, [*run, *others])

    def _check_group(
        self, path: Path, group: GroupSpec, decays: Sequence[tuple[Path, WeightDecay]]
    ) -> None:
        """Check what a group says of WD against those that it is to take the place of."""
        spec, own = self._spec, group.weight_decay
        own_at, multiplier_at = (*path, "weight_decay"), (*path, "weight_decay_multiplier")
        if not spec.has_weight_decay and self._known(
            ("weight_decay",),
            ("stages",),
            *(("stages", index, "weight_decay") for index in range(len(spec.stages))),
        ):
            wanted = "nothing, as the run sets no weight_decay"
            if own is not None and self._known(own_at):
                self._refuse(own_at, own.model_dump(exclude_none=True), wanted)
            if group.weight_decay_multiplier != 1.0 and self._known(multiplier_at):
                self._refuse(multiplier_at, group.weight_decay_multiplier, wanted)
        if own is None or not self._known(own_at, (*own_at, "start"), (*own_at, "end")):
            return
        for decay_at, decay in decays:
            if decay.style != "constant" or not self._known(
                (*decay_at, "style"), (*decay_at, "start"), (*decay_at, "end")
            ):
                continue
            start = decay.start if own.start is None else own.start
            end = decay.end if own.end is None else own.end
            if start != end:
                wanted = f"start equal to end, as {_dotted(decay_at)} is constant"
                self._refuse(own_at, own.model_dump(exclude_none=True), wanted)
                return

    def _once(self, seen: dict[str, int], name: str, index: int, what: str) -> None:
        if name in seen:
            wanted = f"another name than {what}.{seen[name]}.name"
            self._refuse((what, index, "name"), name, wanted)
        else:
            seen[name] = index

    def _check_stages(self) -> None:
        spec, seen = self._spec, dict[str, int]()
        some = any(stage.weight_decay is not None for stage in spec.stages)
        for index, stage in enumerate(spec.stages):
            path: Path = ("stages", index)
            if not self._known(path):
                # Nothing is known of where the next stage begins.
                self._broken.add((*path, "until"))
                continue
            self._check_stage_groups(path, stage)
            if self._known((*path, "name")):
                self._once(seen, stage.name, index, "stages")
            self._check_until(path, stage, index)
            if self._known((*path, "learning_rate")):
                self._check_rates((*path, "learning_rate"), stage.learning_rate, index)
            begin, begin_at = self._begin(index)
            until, until_at = (
                (stage.end, (*path, _end_field(stage)))
                if stage.end is not None
                else (spec.total, ("total",))
            )
            decay_at = (*path, "weight_decay")
            if stage.weight_decay is not None:
                known = self._known(begin_at, until_at)
                self._check_decay(decay_at, stage.weight_decay, until - begin if known else 1)
            elif some and spec.weight_decay is None and self._known(decay_at, ("weight_decay",)):
                wanted = f"{_WEIGHT_DECAY_WORDS.allowed} (required, as another stage has one)"
                self._refuse(decay_at, None, wanted)

    def _check_stage_groups(self, path: Path, stage: StageSpec) -> None:
        seen = dict[str, int]()
        decays: list[tuple[Path, WeightDecay]] = []
        if stage.weight_decay is not None:
            decays = [((*path, "weight_decay"), stage.weight_decay)]
        elif self._spec.weight_decay is not None:
            decays = [(("weight_decay",), self._spec.weight_decay)]
        for index, group in enumerate(stage.groups):
            self._check_group((*path, "groups", index), group, decays)
            name_at: Path = (*path, "groups", index, "name")
            if not self._known(name_at, ("groups",)):
                continue
            names = [item.name for item in self._spec.groups]
            if group.name not in names:
                wanted = f"a group of the run: {', '.join(names) or 'it has none'}"
                self._refuse(name_at, group.name, wanted)
            elif group.name in seen:
                wanted = f"another name than {_dotted(path)}.groups.{seen[group.name]}.name"
                self._refuse(name_at, group.name, wanted)
            seen.setdefault(group.name, index)

    def _check_until(self, path: Path, stage: StageSpec, index: int) -> None:
        spec = self._spec
        last = index + 1 == len(spec.stages)
        until_at, when_at = (*path, "until"), (*path, "when")
        end_at = (*path, _end_field(stage))
        begin, begin_at = self._begin(index)
        if not self._known(when_at):
            # Which of the others are needed is not known.
            self._broken.update({until_at, (*path, "earliest"), (*path, "latest")})
            return
        if stage.when is None:
            for name, value in (("earliest", stage.earliest), ("latest", stage.latest)):
                if value is not None and self._known((*path, name)):
                    self._refuse((*path, name), value, "nothing, as the stage has no when")
        else:
            self._check_when(path, stage, begin, begin_at)
        if not self._known(end_at):
            return
        end = stage.until if stage.when is None else stage.latest
        if end is None:
            if not last:
                wanted = "a position (required in every stage but the last), or when and latest"
                self._refuse(until_at, None, wanted)
        elif self._known(begin_at) and end <= begin:
            wanted = f"a position above {begin}, where the stage before it ends"
            self._refuse(end_at, end, wanted)
        elif self._known(("total",)):
            if last and stage.when is None and end != spec.total:
                wanted = f"the total ({spec.total}) or nothing: the last stage runs to the total"
                self._refuse(end_at, end, wanted)
            elif last and end > spec.total:
                self._refuse(end_at, end, f"a position up to the total ({spec.total})")
            elif not last and end >= spec.total:
                wanted = f"a position below the total ({spec.total})"
                self._refuse(end_at, end, wanted)

    def _check_when(self, path: Path, stage: StageSpec, begin: int, begin_at: Path) -> None:
        when_at, latest_at = (*path, "when"), (*path, "latest")
        when = stage.when
        if when is not None and self._known((*when_at, "plateau"), (*when_at, "below")):
            given = [name for name in ("plateau", "below") if getattr(when, name) is not None]
            if len(given) != 1:
                wanted = "exactly one of plateau and below"
                self._refuse(when_at, ", ".join(given) or None, wanted)
        if stage.until is not None and self._known((*path, "until")):
            self._refuse((*path, "until"), stage.until, "nothing beside when: latest ends it")
        if stage.latest is None:
            if self._known(latest_at):
                self._refuse(latest_at, None, "a position (required beside when)")
        elif (
            stage.earliest is not None
            and self._known((*path, "earliest"), latest_at, begin_at)
            and not begin < stage.earliest <= stage.latest
        ):
            wanted = f"a position above {begin} and up to latest ({stage.latest})"
            self._refuse((*path, "earliest"), stage.earliest, wanted)


# ---------------------------------------------------------------------------------------------
# Filling in what depends on other fields.


def _filled(spec: RunSpec) -> RunSpec:
    run = spec.learning_rate
    update: dict[str, Any] = {}
    if run is not None:
        update["learning_rate"] = _filled_rates(run, None, spec.total)
    if spec.weight_decay is not None:
        update["weight_decay"] = _filled_decay(spec.weight_decay, spec.total)
    stages: list[StageSpec] = []
    begin = 0
    for stage in spec.stages:
        until = spec.total if stage.end is None else stage.end
        filled: dict[str, Any] = {"learning_rate": _filled_rates(stage.learning_rate, run, until)}
        if stage.weight_decay is not None:
            filled["weight_decay"] = _filled_decay(stage.weight_decay, until - begin)
        stages.append(stage.model_copy(update=filled))
        begin = until
    update["stages"] = tuple(stages)
    return spec.model_copy(update=update)


def _filled_rates(rates: LearningRate, run: LearningRate | None, until: int) -> LearningRate:
    peak = rates.peak if rates.peak is not None or run is None else run.peak
    floor = rates.min if rates.min is not None or run is None else run.min
    end = until if rates.decay.end is None else rates.decay.end
    decay = rates.decay.model_copy(update={"end": end})
    return rates.model_copy(update={"peak": peak, "min": floor or 0.0, "decay": decay})


def _filled_decay(decay: WeightDecay, length: int) -> WeightDecay:
    # A constant WD has no ramp; saying how long it lasts would only make equal specs differ.
    over = None if decay.style == "constant" else (length if decay.over is None else decay.over)
    return decay.model_copy(update={"over": over})


# ---------------------------------------------------------------------------------------------
# Texts.


def _end_field(stage: StageSpec) -> str:
    """Return the name of the field that says where a stage ends."""
    return "until" if stage.when is None else "latest"


def _dotted(path: Path) -> str:
    return ".".join(str(part) for part in path)


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 100 else f"{shown[:97]}..."


def _leaves(path: Path, value: Any) -> Iterator[tuple[Path, str]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves((*path, key), item)
    elif isinstance(value, list) and value:
        for index, item in enumerate(value):
            yield from _leaves((*path, index), item)
    else:
        yield path, _shown(value)
