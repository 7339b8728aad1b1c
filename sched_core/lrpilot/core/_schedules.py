"""Base schedules: pure functions from progress to LR and WD.

Every expression is Megatron-LM's, with the same float64 operations in the same order, so
that the values are the same to the bit. That order is part of the contract: do not
simplify `min + 1.0 * (peak - min)` to `peak`, nor `x**0.5` to `sqrt(x)`.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lrpilot.core._fields import length_of
from lrpilot.core._spec import GroupSpec, LearningRate, RunSpec, StageSpec, WeightDecay

Schedule = Callable[[int], float]
"""A value at a progress."""

DECAY_STYLES = ("constant", "linear", "cosine", "inverse-square-root", "wsd")
ANNEAL_STYLES = ("exponential", "linear", "cosine", "minus_sqrt")
WEIGHT_DECAY_STYLES = ("constant", "linear", "cosine")


def learning_rate_schedule(
    *,
    init: float,
    peak: float,
    min: float,  # noqa: A002 - the name that the spec gives it.
    warmup: float,
    style: str,
    end: int,
    anneal: float | None = None,
    anneal_style: str | None = None,
) -> Schedule:
    """Return an LR that warms up linearly from `init` to `peak` and decays to `min` at `end`.

    More precisely, with n the progress, the first line that matches gives the value:

    - n <= warmup (and warmup > 0): `init + (peak - init) * n / warmup`
    - style `constant`: `peak`, for ever
    - n > end: `min`
    - style `inverse-square-root`: `peak * max(warmup, 1)**0.5 / max(n, 1)**0.5`, but at least `min`
    - else `min + k * (peak - min)`, where with `r = (n - warmup) / (end - warmup)`
      `linear` has `k = 1 - r` and `cosine` has `k = 0.5 * (cos(pi * r) + 1)`; `wsd` has `k = 1`
      up to `a = end - anneal` and from there, with `q = min((n - a) / anneal, 1)`, by
      `anneal_style`: `linear` `1 - q`, `cosine` `0.5 * (cos(pi * q) + 1)`, `exponential`
      `2 * 0.5**q - 1`, `minus_sqrt` `1 - sqrt(q)`.

    Args:
        init: LR at progress 0 when there is a warmup; unused without one.
        peak: LR at the end of warmup. At exactly n = warmup rounding may leave the value one
            bit off.
        min: LR past `end`; unused by `constant`. It may lie above `peak`, as the floor of a
            group with a small peak does; `inverse-square-root` then gives `min` all along.
        warmup: length of warmup in the run's unit, below `end`. It need not be whole: a share
            of `end` seldom is.
        style: one of `DECAY_STYLES`.
        end: absolute progress at which the decay ends, at least 1; no length.
        anneal: length of the last phase of `wsd`. The phase starts at `end - anneal` whatever
            the warmup is: where that lies inside warmup the LR jumps when warmup ends. 0 never
            anneals; more than `end` starts part-way down.
        anneal_style: one of `ANNEAL_STYLES`; `wsd` needs it.

    Returns:
        The LR at a progress from 0 on.

    Raises:
        ValueError: an argument is out of range; the text names it and the value got.

    Example:
        >>> lr = learning_rate_schedule(
        ...     init=0.0, peak=6e-5, min=6e-6, warmup=100, style="wsd", end=1000, anneal=200,
        ...     anneal_style="linear",
        ... )
        >>> lr(0), lr(50), lr(500), lr(900), lr(1001)
        (0.0, 3e-05, 5.9999999999999995e-05, 3.3e-05, 6e-06)

    Source: `OptimizerParamScheduler.get_lr` in Megatron-LM,
    `megatron/core/optimizer_param_scheduler.py`.
    """
    floor = min
    for name, value in (("init", init), ("peak", peak), ("min", floor)):
        if not (math.isfinite(value) and value >= 0.0):
            raise ValueError(f"{name} must be a finite number from 0 on, got {value!r}")
    if not end >= 1:
        raise ValueError(f"end must be at least 1, got {end!r}")
    if not 0 <= warmup < end:
        raise ValueError(f"warmup must be from 0 to below end ({end!r}), got {warmup!r}")
    if style not in DECAY_STYLES:
        raise ValueError(f"style must be one of {', '.join(DECAY_STYLES)}, got {style!r}")

    if style == "constant":
        decayed = _constant(peak)
    elif style == "inverse-square-root":
        decayed = _inverse_square_root(peak, floor, warmup, end)
    elif style == "wsd":
        decayed = _wsd(peak, floor, end, anneal, anneal_style)
    else:
        decayed = _ramp_down(peak, floor, warmup, end, style)
    if not warmup > 0:
        return decayed

    def learning_rate(progress: int) -> float:
        if progress <= warmup:
            return _warming(init, peak, warmup, progress)
        return decayed(progress)

    return learning_rate


def weight_decay_schedule(*, start: float, end: float, style: str, over: int) -> Schedule:
    """Return a WD that goes from `start` to `end` over the first `over` of progress.

    More precisely, at progress n: past `over` it is `end`; up to there `start + k * (end - start)`
    with `k = n / over` (`linear`) or `k = 0.5 * (cos(pi * (1 - n / over)) + 1)` (`cosine`).

    Args:
        start: WD at progress 0.
        end: WD past `over`; it may lie below `start`, as a group may ramp down.
        style: `constant`, which needs `start == end`, `linear` or `cosine`.
        over: length of the ramp in the run's unit, at least 1 for one that ramps; `constant`
            does not use it.

    Returns:
        The WD at a progress from 0 on.

    Raises:
        ValueError: an argument is out of range; the text names it and the value got.

    Example:
        >>> wd = weight_decay_schedule(start=0.01, end=0.1, style="cosine", over=100)
        >>> wd(0), wd(50), wd(101)
        (0.01, 0.05500000000000001, 0.1)

    Source: `OptimizerParamScheduler.get_wd` in Megatron-LM,
    `megatron/core/optimizer_param_scheduler.py`.
    """
    for name, value in (("start", start), ("end", end)):
        if not (math.isfinite(value) and value >= 0.0):
            raise ValueError(f"{name} must be a finite number from 0 on, got {value!r}")
    if style not in WEIGHT_DECAY_STYLES:
        raise ValueError(f"style must be one of {', '.join(WEIGHT_DECAY_STYLES)}, got {style!r}")
    if style == "constant":
        if start != end:
            raise ValueError(f"end must equal start ({start!r}) for style constant, got {end!r}")
        return _constant(end)
    if not over >= 1:
        raise ValueError(f"over must be at least 1 for style {style}, got {over!r}")
    span = end - start

    def weight_decay(progress: int) -> float:
        if progress > over:
            return end
        ratio = float(progress) / float(over)
        k = ratio if style == "linear" else 0.5 * (math.cos(math.pi * (1 - ratio)) + 1.0)
        return start + k * span

    return weight_decay


def _constant(value: float) -> Schedule:
    return lambda _progress: value


def _warming(init: float, peak: float, warmup: float, progress: float) -> float:
    return init + ((peak - init) * float(progress) / float(warmup))


def _ramp_down(peak: float, floor: float, warmup: float, end: int, style: str) -> Schedule:
    span = peak - floor

    def learning_rate(progress: int) -> float:
        if progress > end:
            return floor
        ratio = float(progress - warmup) / float(end - warmup)
        k = 1.0 - ratio if style == "linear" else 0.5 * (math.cos(math.pi * ratio) + 1.0)
        return floor + k * span

    return learning_rate


def _inverse_square_root(peak: float, floor: float, warmup: float, end: int) -> Schedule:
    def learning_rate(progress: int) -> float:
        if progress > end:
            return floor
        rate: float = peak * max(warmup, 1) ** 0.5 / (max(progress, 1) ** 0.5)
        return max(floor, rate)

    return learning_rate


def _wsd(
    peak: float, floor: float, end: int, anneal: float | None, anneal_style: str | None
) -> Schedule:
    if anneal is None or not 0 <= anneal < math.inf:
        raise ValueError(f"anneal must be a length from 0 on for style wsd, got {anneal!r}")
    if anneal_style not in ANNEAL_STYLES:
        options = ", ".join(ANNEAL_STYLES)
        raise ValueError(f"anneal_style must be one of {options}, got {anneal_style!r}")
    length, span, begin = anneal, peak - floor, end - anneal

    def learning_rate(progress: int) -> float:
        if progress > end:
            return floor
        if progress <= begin:
            k = 1.0
        else:
            # Whole lengths never give more than 1. A share does when `begin` was rounded down,
            # and the LR at `end` would then lie below `floor`, even below 0.
            k = anneal_factor(anneal_style, min(float(progress - begin) / float(length), 1.0))
        return floor + k * span

    return learning_rate


def anneal_factor(style: str, ratio: float) -> float:
    """Return k of an anneal at `ratio`, its share that is done, from 0 to 1; see
    `learning_rate_schedule`."""
    if style == "linear":
        return 1.0 - ratio
    if style == "cosine":
        return 0.5 * (math.cos(math.pi * ratio) + 1.0)
    if style == "exponential":
        return (2.0 * math.pow(0.5, ratio)) - 1.0
    return 1.0 - math.sqrt(ratio)


Stretches = tuple[tuple[int, float], ...]
"""(progress, factor): from there on what is left of a warmup takes so many times longer."""


@dataclass(frozen=True, slots=True)
class _Warmup:
    """How a warmup goes on over the progress since the stage began, stretched or not.

    A stretch at e with factor s lets progress count for 1 / s from e on.
    """

    length: float
    """As the spec has it."""
    pieces: tuple[tuple[float, float, float], ...] = ((0.0, 0.0, 1.0),)
    """(progress, what it counts as, factor from there on), in rising order."""
    end: float = 0.0
    """Progress at which it is over."""

    def counts_as(self, local: int) -> float:
        """Return the progress of the warmup of the spec that `local` counts as."""
        for begin, counted, factor in reversed(self.pieces):
            if begin <= local:
                return float(local) if factor == 1.0 else counted + (local - begin) / factor
        return float(local)


def _warmup(length: float, begin: int, stretches: Stretches, latest: float) -> _Warmup:
    """Return the warmup of a stage that begins at `begin`; it ends by `latest`, or is as before."""
    warmup = _Warmup(length, end=length)
    for progress, factor in stretches:
        local = float(progress - begin)
        if not 0.0 <= local < warmup.end:
            continue
        counted, before = warmup.counts_as(progress - begin), warmup.pieces[-1][2]
        slope = before * factor
        end = local + (length - counted) * slope
        if end < latest:
            pieces = (*warmup.pieces, (local, counted, slope))
            warmup = _Warmup(length, pieces, end)
    return warmup


@dataclass(frozen=True, slots=True)
class _GroupRates:
    """One group's LR in a stage, over the progress since the stage began."""

    curve: Schedule
    init: float
    peak: float
    floor: float
    warmup: _Warmup


@dataclass(frozen=True, slots=True)
class _GroupDecay:
    """One group's WD in a stage, over the progress since `origin`."""

    curve: Schedule
    multiplier: float


@dataclass(frozen=True, slots=True)
class StageSchedule:
    """The base schedule of one stage, for every group.

    Warmup counts from `begin`, and the decay's end is absolute: the LR at n is Megatron-LM's at
    `n - begin` with the decay's end at `end - begin`. A WD that the stage states ramps from
    `begin`; one that it takes from the run ramps from 0, through all stages.

    Past the run's `total` a decay or ramp that has ended by then goes on as Megatron-LM's does;
    one that has not stays at its value at `total`.
    """

    name: str
    """Empty for a run without stages."""
    begin: int
    """First progress of the stage."""
    until: int | None
    """First progress of the next stage; None for the last one."""
    init_current: bool
    """Whether warmup starts from the LR in force at `begin`, adjustments included."""
    style: str
    """Style of the decay."""
    warmup_end: float
    """Progress at which warmup ends; `begin` where there is none."""
    decay_begin: float
    """Progress at which the LR starts down."""
    decay_end: int
    """Progress at which the decay ends."""
    stays_from: int | None
    """Of the last stage, the progress from which on LR and WD stay as they are; None: they do not
    before the total."""
    _rates: tuple[_GroupRates, ...]
    _rates_freeze: int | None
    _decays: tuple[_GroupDecay, ...] | None
    _decays_origin: int
    _decays_end: int
    _decays_freeze: int | None

    def learning_rate(self, group: int, progress: int, init: float | None = None) -> float:
        """Return the LR of the group with this index at an absolute progress.

        `init` takes the place of the spec's `learning_rate.init`. A stage with `init_current`
        needs it up to the end of warmup; ValueError otherwise, and below `begin`.
        """
        at = progress if self._rates_freeze is None else min(progress, self._rates_freeze)
        local = at - self.begin
        if local < 0:
            raise ValueError(f"progress must be from {self.begin} on, got {progress}")
        rates = self._rates[group]
        warmup = rates.warmup
        if warmup.length > 0 and local <= warmup.end:
            if init is None:
                if self.init_current:
                    raise ValueError(f"init must be the LR in force at {self.begin}, got None")
                init = rates.init
            return _warming(init, rates.peak, warmup.length, warmup.counts_as(local))
        return rates.curve(local)

    def corners(self) -> set[int]:
        """Return where LR and WD of the stage may jump or bend: each time the last progress before
        and the first one behind."""
        bends = {self.warmup_end, self.decay_begin, float(self.decay_end), float(self._decays_end)}
        bends |= {float(at) for at in (self._rates_freeze, self._decays_freeze) if at is not None}
        for rates in self._rates:
            bends |= {self.begin + local for local, _, _ in rates.warmup.pieces}
        found = {self.begin - 1, self.begin}
        for at in bends:
            if math.isfinite(at):
                found |= {math.floor(at), math.floor(at) + 1}
        return {
            at for at in found if at >= self.begin - 1 and (self.until is None or at <= self.until)
        }

    @property
    def peaks(self) -> tuple[float, ...]:
        """LR at the end of warmup, one per group."""
        return tuple(rates.peak for rates in self._rates)

    @property
    def floors(self) -> tuple[float, ...]:
        """`min` of the LR, one per group."""
        return tuple(rates.floor for rates in self._rates)

    def weight_decay(self, group: int, progress: int) -> float | None:
        """Return the WD of the group at an absolute progress; None where the run sets none."""
        if self._decays is None:
            return None
        at = progress if self._decays_freeze is None else min(progress, self._decays_freeze)
        decay = self._decays[group]
        return decay.curve(at - self._decays_origin) * decay.multiplier


def stage_schedules(
    spec: RunSpec, left: Mapping[str, Sequence[int]] | None = None, stretches: Stretches = ()
) -> tuple[StageSchedule, ...]:
    """Return the base schedule of every stage in order; a run without stages is one.

    The spec is one that `parse_spec` returned: its defaults are filled in. `left` says of stages
    where they were left before their planned end: at the first of these progresses that lies inside
    the stage. Of the last stage it says where its LR and WD stay as they are, as they do at its
    `latest`.

    >>> from lrpilot.core._spec import parse_spec
    >>> (stage,) = stage_schedules(parse_spec(
    ...     {"name": "a", "total": 100, "learning_rate": {"peak": 0.1, "warmup": 10}}
    ... ))
    >>> stage.learning_rate(0, 5), stage.learning_rate(0, 60), stage.weight_decay(0, 60)
    (0.05, 0.1, None)
    """
    if not spec.stages:
        if spec.learning_rate is None:
            raise ValueError("learning_rate must be given, got None")
        only = StageSpec(name="-", learning_rate=spec.learning_rate)
        return (_stage(spec, only, "", begin=0, until=None, frozen=None, stretches=stretches),)
    stages: list[StageSchedule] = []
    begin = 0
    for index, stage in enumerate(spec.stages):
        end = stage.end
        early = next(
            (
                at
                for at in (left or {}).get(stage.name, ())
                if begin < at and (end is None or at < end)
            ),
            None,
        )
        if early is not None:
            end = early
        last = index + 1 == len(spec.stages)
        stages.append(
            _stage(
                spec,
                stage,
                stage.name,
                begin=begin,
                until=None if last else end,
                frozen=end if last and (stage.when is not None or early is not None) else None,
                stretches=stretches,
            )
        )
        begin = end or 0
    return tuple(stages)


def stage_at(stages: tuple[StageSchedule, ...], progress: int) -> int:
    """Return the index of the stage that holds `progress`."""
    for index, stage in enumerate(stages):
        if stage.until is None or progress < stage.until:
            return index
    raise ValueError("the last stage must have no end")


def base_schedule(spec: RunSpec) -> Callable[[int], tuple[tuple[float, float | None], ...]]:
    """Return a function from progress to `(LR, WD)` per group, without adjustments.

    Where a stage starts from the LR in force, that is the base LR of the stage before.

    >>> from lrpilot.core._spec import parse_spec
    >>> values = base_schedule(parse_spec({
    ...     "name": "a", "total": 100, "learning_rate": {"peak": 0.1, "decay": {"style": "linear"}},
    ...     "weight_decay": 0.5, "groups": [{"name": "all"}, {"name": "head", "peak": 0.2}],
    ... }))
    >>> values(50)
    ((0.05, 0.5), (0.1, 0.5))
    """
    stages = stage_schedules(spec)
    groups = range(len(spec.group_names))
    inits: list[tuple[float | None, ...]] = [(None,) * len(groups)]
    for before, stage in itertools.pairwise(stages):
        inits.append(
            tuple(before.learning_rate(g, stage.begin, inits[-1][g]) for g in groups)
            if stage.init_current
            else (None,) * len(groups)
        )

    def values(progress: int) -> tuple[tuple[float, float | None], ...]:
        index = stage_at(stages, progress)
        stage, init = stages[index], inits[index]
        return tuple(
            (stage.learning_rate(g, progress, init[g]), stage.weight_decay(g, progress))
            for g in groups
        )

    return values


def base_values(spec: RunSpec, progress: int) -> tuple[tuple[float, float | None], ...]:
    """Return `(LR, WD)` per group at one progress, without adjustments; see `base_schedule`."""
    return base_schedule(spec)(progress)


def _stage(
    spec: RunSpec,
    stage: StageSpec,
    name: str,
    *,
    begin: int,
    until: int | None,
    frozen: int | None,
    stretches: Stretches,
) -> StageSchedule:
    rates, total = stage.learning_rate, spec.total
    own = {group.name: group for group in stage.groups}
    groups = [own.get(group.name, group) for group in spec.groups] or [GroupSpec(name="-")]
    end = rates.decay.end if rates.decay.end is not None else total
    ended = rates.decay.style != "constant" and end <= total
    decay = stage.weight_decay or spec.weight_decay
    origin = begin if stage.weight_decay is not None else 0
    over = (decay.over if decay is not None else None) or 0
    curves = tuple(_group_rates(rates, group, begin, end, stretches) for group in groups)
    warmup_end = begin + curves[0].warmup.end
    anneal = None if rates.decay.anneal is None else length_of(rates.decay.anneal, end)
    if rates.decay.style == "constant":
        decay_begin: float = end
    else:
        decay_begin = warmup_end if anneal is None else max(warmup_end, end - anneal)
    return StageSchedule(
        name=name,
        begin=begin,
        until=until,
        init_current=rates.init == "current",
        style=rates.decay.style,
        warmup_end=warmup_end,
        decay_begin=decay_begin,
        decay_end=end,
        stays_from=frozen,
        _rates=curves,
        _rates_freeze=_least(None if ended else total, frozen),
        _decays=None if decay is None else tuple(_group_decay(decay, g) for g in groups),
        _decays_origin=origin,
        _decays_end=origin + over,
        _decays_freeze=_least(None if origin + over <= total else total, frozen),
    )


def _least(a: int | None, b: int | None) -> int | None:
    known = [item for item in (a, b) if item is not None]
    return min(known) if known else None


def _group_rates(
    rates: LearningRate, group: GroupSpec, begin: int, end: int, stretches: Stretches
) -> _GroupRates:
    peak = group.peak if group.peak is not None else rates.peak
    if peak is None:
        raise ValueError("peak must be given, got None")
    floor = group.min if group.min is not None else (rates.min or 0.0)
    decay = rates.decay
    anneal = None if decay.anneal is None else length_of(decay.anneal, end)
    latest = end - begin if anneal is None else max(end - begin - anneal, 0)
    warmup = _warmup(length_of(rates.warmup, end), begin, stretches, latest)
    init = 0.0 if rates.init == "current" else rates.init
    curve = learning_rate_schedule(
        init=init,
        peak=peak,
        min=floor,
        warmup=warmup.end,
        style=decay.style,
        end=end - begin,
        anneal=anneal,
        anneal_style=decay.anneal_style,
    )
    return _GroupRates(curve, init, peak, floor, warmup)


def _group_decay(decay: WeightDecay, group: GroupSpec) -> _GroupDecay:
    own = group.weight_decay
    start = own.start if own is not None and own.start is not None else decay.start
    end = own.end if own is not None and own.end is not None else decay.end
    curve = weight_decay_schedule(start=start, end=end, style=decay.style, over=decay.over or 0)
    return _GroupDecay(curve, group.weight_decay_multiplier)
