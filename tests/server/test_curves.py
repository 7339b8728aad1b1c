"""What is drawn of a run, against a picture made of everything that was ever reported."""

from __future__ import annotations

import asyncio
import itertools
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from lrpilot import core
from lrpilot.core import Report, _losses
from lrpilot.server import _curves, _history, _loss_history, _packing, _recent
from lrpilot.server._curves import Rates, draw_losses, read_wanted, thinned
from lrpilot.server._loss_history import LossHistory
from lrpilot.server._recent import Asked, RecentRanks
from lrpilot.server._schema import segments
from lrpilot.server._sql_store import SqlStore, open_store
from lrpilot.server._store import MAX_SEQ, Append, LogRow, Store, StoreUnavailable
from lrpilot.v1 import runs_pb2 as pb
from lrpilot.v1 import trainer_pb2
from tests.core.test_whole_runs import SPECS, Life, reports
from tests.packing import compact_all

if TYPE_CHECKING:
    from tests.server.conftest import Replica, Until

Point = tuple[int, float]

_NUMBERS = itertools.count(1)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A store that packs rows."""
    opened = open_store(tmp_path_factory.mktemp("curves"))
    yield opened
    opened.close()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let segments, buckets and reads be small, so that a short run is a long one."""
    make_small(monkeypatch)


def make_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_packing, "SEGMENT_ROWS", 6)
    monkeypatch.setattr(_losses, "BUCKET_LOSSES", 4)
    monkeypatch.setattr(core, "BUCKET_LOSSES", 4)
    monkeypatch.setattr(_loss_history, "PART_LOSSES", 7)
    monkeypatch.setattr(_loss_history, "ROWS_PER_READ", 5)


class Drawn(Life):
    """A run whose log is in a store, and all that was ever reported of it."""

    def __init__(self, store: Store, **fields: Any) -> None:
        self.store = store
        self.attempts: list[tuple[int, int, list[Point]]] = []
        self.name = ""
        self.history = LossHistory(store)
        self.saved: list[core.SavedState] = []
        super().__init__(**fields)

    def write(self, events: Sequence[core.Event]) -> list[core.Event]:
        """Append events, and take down what they bring."""
        for event_ in events:
            if self.state.seq == 0:
                # It is another log: that of a server that had lost the run.
                self.name, self.attempts, self.saved = f"run {next(_NUMBERS)}", [], []
            before = self.state.digest if self.state.seq else None
            ((seq, payload, digest),) = core.rows(self.state, [event_])
            row = LogRow(seq, payload, digest, seq)
            append = Append(self.name, (row,), create=before is None, after=before)
            assert self.store.append([append]) == [None]
            self._apply(event_, payload)
        return list(events)

    def _apply(self, event_: core.Event, payload: bytes) -> None:
        self.rows.append(payload)
        count, late = self.state.observed, dict(self.state.late)
        self.state.apply(event_)
        if isinstance(event_, core.Opened):
            self.attempts.append((event_.attempt, event_.begin, []))
        elif isinstance(event_, core.Reported | core.Waived):
            known = self.attempts[-1][2]
            if len(self.state.reporters.ranks) == 1 and isinstance(event_, core.Reported):
                known += [
                    (at, loss) for (at, rank), loss in self.state.late.items()
                    if (at, rank) not in late
                ]  # fmt: skip
            for number in range(count, self.state.observed):
                found = self.state._observation(number)
                if found.loss is not None:
                    known.append((found.progress, found.loss))

    def decided(self) -> set[int]:
        every = (*self.state.plan.adjustments, *self.state.advice, *self.state.forgotten)
        return {item.seq for item in every}

    def draw(self, begin: int = 0, end: int = 1000, points: int = 4000) -> pb.GetCurvesResponse:
        """Return the curves as GetCurves does."""
        wanted = read_wanted(pb.GetCurvesRequest(begin=begin, end=end, points=points), self.state)
        answer = pb.GetCurvesResponse()
        attempts = self.history.between(
            self.name, self.state.seq, self.decided(), begin=begin, end=end, points=points
        )
        draw_losses(attempts, wanted, answer)
        return answer

    def live(self, data: st.DataObject, step: int) -> None:
        """Let one thing happen, of which some are of the store."""
        what = data.draw(
            st.sampled_from(
                ["live"] * 4 + ["several", "late", "save", "resume", "pack", "look", "new"]
            )
        )
        state = self.state
        if what == "live" and len(state.reporters.ranks) == 1:
            super().live(data, step)
        elif what in {"several", "live"}:
            self.tell_several(data)
        elif what == "late":
            self.tell_late(data)
        elif what == "save":
            self.save(data.draw(st.integers(max(state.begin, state.origin), state.frontier)))
        elif what == "resume" and self.saved:
            self.resume(data.draw(st.sampled_from(self.saved)))
        elif what == "pack":
            compact_all(self.store, self.name, state.seq)
        elif what == "look":
            self.draw(points=data.draw(st.sampled_from([10, 4000])))
        elif what == "new":
            self.history = LossHistory(self.store)

    def save(self, at: int) -> None:
        self.saved.append(core.read_state(core.save_state(self.state, at), "run"))

    def resume(self, saved: core.SavedState) -> None:
        """Open an attempt where a state was saved, also where the run went another way since."""
        self.open(saved=saved, digest_at_saved=saved.digest)

    def tell_late(self, data: st.DataObject) -> None:
        """Let losses come of steps that are final without them, packed apart or not."""
        begin = self.state.frontier
        self.write([core.Waived(self.state.attempt, begin + 3)])
        if data.draw(st.booleans()):
            compact_all(self.store, self.name, self.state.seq)
        for at in range(begin, begin + data.draw(st.integers(0, 4))):
            for rank in self.state.reporters.ranks:
                self.tell(rank, [Report(at, data.draw(st.floats(0.1, 9.0)), 1.0, at + 1)])

    def tell_several(self, data: st.DataObject) -> None:
        """Let each of several reporters say something, and not all of them the same."""
        if len(self.state.reporters.ranks) == 1:
            self.open(data.draw(st.integers(self.state.origin, self.state.frontier)),
                      reporters=(3, 0, 1))  # fmt: skip
        for rank in data.draw(st.permutations(self.state.reporters.ranks)):
            begin = self.state.reporters.positions.get(rank, self.state.begin)
            for at in range(begin, begin + data.draw(st.integers(0, 4))):
                self.tell(rank, data.draw(reports(at)))
        if data.draw(st.booleans()):
            self.write([core.Waived(self.state.attempt, self.state.frontier + 2)])

    def tell(self, rank: int, said: list[Report]) -> None:
        try:
            events, _ = core.report_losses(
                self.state, said, rank=rank, incarnation="one" if rank == 3 else f"process {rank}"
            )
        except (core.LossConflict, core.NotReporter) as error:
            event(f"refused: {type(error).__name__}")
        else:
            self.write(events)


def points_of(curve: pb.Curve) -> list[Point]:
    assert list(curve.progress) == sorted(curve.progress)
    return list(zip(curve.progress, curve.value, strict=True))


def same(found: Sequence[Point], expected: Sequence[Point]) -> None:
    """Assert that two curves are one to the bit; NaN is NaN."""
    assert list(map(repr, found)) == list(map(repr, expected))


def counting(state: core.RunState) -> list[Any]:
    return [state._observation(number) for number in range(state.observed)]


def smoothed(state: core.RunState) -> list[Point]:
    """Return the smoothed loss at each loss that counts."""
    average, weight = state.origin_observers.average, state.origin_observers.average_weight
    found = []
    for item in counting(state):
        if item.loss is not None and math.isfinite(item.loss) and not item.is_skipped:
            average = 0.98 * average + 0.02 * item.loss
            weight = 0.98 * weight + 0.02
            found.append((item.progress, average / weight))
    return found


def check_whole(log: Drawn) -> None:
    """Assert that a picture with room for everything has everything."""
    answer, state = log.draw(), log.state
    shown = [item for item in log.attempts if item[2] or item is log.attempts[-1]]
    assert [(item.attempt, item.begin) for item in answer.losses] == [x[:2] for x in shown]
    restored = [fold is not None for fold in folds(log)]
    for curve in answer.losses:
        number = [item[0] for item in log.attempts].index(curve.attempt)
        _, _, said = log.attempts[number]
        said = sorted(said, key=lambda point: point[0])
        same(points_of(curve.loss), said)
        later = zip(log.attempts[number + 1 :], restored[number + 1 :], strict=True)
        least = min((0 if fold else begin for (_, begin, _), fold in later), default=None)
        if least is not None and any(at >= least for at, _ in said):
            assert curve.forgotten_from == least
        else:
            assert not curve.HasField("forgotten_from")
    found, expected = points_of(answer.smoothed_loss), smoothed(state)
    assert [at for at, _ in found] == [at for at, _ in expected]
    assert [value for _, value in found] == pytest.approx([x for _, x in expected], rel=1e-12)
    if expected:
        assert found[-1][1] == pytest.approx(state.observers.smoothed_loss, rel=1e-12)
    norms = [(x.progress, x.gradient_norm) for x in counting(state) if x.gradient_norm is not None]
    same(points_of(answer.gradient_norm), norms)
    names = {name for item in counting(state) for name in item.validation}
    assert set(answer.validation_losses) == names
    for name in names:
        values = [
            (item.progress, item.validation[name])
            for item in counting(state) if name in item.validation
        ]  # fmt: skip
        same(points_of(answer.validation_losses[name]), values)


def folds(log: Drawn) -> list[Any]:
    events = map(core.decode, log.rows)
    return [item.fold for item in events if isinstance(item, core.Opened)]


def check_part(log: Drawn, begin: int, end: int) -> None:
    """Assert that a picture with little room shows what stands out of a range."""
    answer = log.draw(begin, end, points=10)
    drawn = {item.attempt: points_of(item.loss) for item in answer.losses}
    for number, _, said in log.attempts:
        inside = sorted((p for p in said if begin <= p[0] <= end), key=lambda p: p[0])
        if not inside:
            assert not drawn.get(number)
            continue
        texts, found = list(map(repr, inside)), list(map(repr, drawn[number]))
        assert set(found) <= set(texts)
        assert len(found) <= max(10, 4 * 10 + 2)
        assert (found[0], found[-1]) == (texts[0], texts[-1])
        finite = [value for _, value in inside if math.isfinite(value)]
        values = [value for _, value in drawn[number] if math.isfinite(value)]
        if finite:
            assert (min(values), max(values)) == (min(finite), max(finite))
        broken = [point for point in inside if not math.isfinite(point[1])]
        if broken:
            assert repr(broken[0]) in found


PICTURES = settings(
    max_examples=100, deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large,
                           HealthCheck.function_scoped_fixture],
)  # fmt: skip


@PICTURES
@given(st.sampled_from(sorted(SPECS)), st.data())
def test_whatever_happens_the_picture_has_it(store: Store, name: str, data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        log = Drawn(store, **SPECS[name])
        log.open()
        for step in range(data.draw(st.integers(4, 25), "steps")):
            log.live(data, step)
        for _ in range(2):
            check_whole(log)
            begin = data.draw(st.integers(0, 60), "begin")
            check_part(log, begin, begin + data.draw(st.integers(1, 60), "length"))
            check_notable(log)
            log.history = LossHistory(store)
            compact_all(store, log.name, log.state.seq)


def check_notable(log: Drawn) -> None:
    """Assert that the notable rows are found, with what was decided on them."""
    rows = store_rows(log)
    decided = log.decided()
    expected = [
        row for row in rows
        if row.seq in decided
        or core.decode(row.payload).kind not in {"reported", "recorded", "permitted"}
    ]  # fmt: skip
    found = log.history.notable(log.name, log.state.seq, decided)
    assert found == [row.seq for row in expected]
    assert log.history.rows(log.name, found) == expected


def store_rows(log: Drawn) -> list[LogRow]:
    return log.store.read(log.name)


# LR and WD.

STRAIGHT: dict[str, Any] = {
    "total": 400,
    "learning_rate": {"peak": 0.1, "min": 0.01, "warmup": 37,
                      "decay": {"style": "wsd", "anneal": 90, "anneal_style": "linear"}},
    "weight_decay": {"start": 0.01, "end": 0.1, "style": "linear", "over": 333},
    "groups": [{"name": "a"}, {"name": "b", "peak": 0.4, "weight_decay_multiplier": 0.0}],
    "policies": [],
}  # fmt: skip
STRAIGHT_STAGES: dict[str, Any] = {
    **STRAIGHT,
    "learning_rate": None,
    "stages": [
        {"name": "one", "until": 100, "learning_rate": {"peak": 0.2, "warmup": 11}},
        {"name": "two", "until": 250, "learning_rate": {"peak": 0.1, "init": "current",
                                                         "warmup": "10%"}},
        {"name": "three", "weight_decay": 0.2,
         "learning_rate": {"peak": 0.3, "decay": {"style": "linear"}}},
    ],
}  # fmt: skip


def drawn_rates(state: core.RunState, **fields: Any) -> pb.GetCurvesResponse:
    answer = pb.GetCurvesResponse()
    Rates(state).draw(read_wanted(pb.GetCurvesRequest(**fields), state), answer)
    return answer


def check_values(state: core.RunState, answer: pb.GetCurvesResponse) -> None:
    """Assert that a curve has the values of the run wherever it has a point."""
    names = state.spec.group_names
    for curve in answer.groups:
        place = names.index(curve.name)
        assert list(curve.progress) == sorted(set(curve.progress))
        for index, at in enumerate(curve.progress):
            rates, decays = state.values(at)
            assert curve.learning_rate[index] == rates[place]
            assert curve.base_learning_rate[index] == state.plan.base(at)[place]
            assert decays is None or curve.weight_decay[index] == decays[place]


def between(curve: pb.GroupCurve, values: Sequence[float], at: int) -> float:
    """Return what a straight line between the points says."""
    right = min(bisect_right(curve.progress, at), len(curve.progress) - 1)
    begin, end = curve.progress[right - 1], curve.progress[right]
    return values[right - 1] + (values[right] - values[right - 1]) * (at - begin) / (end - begin)


OPERATIONS = st.sampled_from(
    [core.ScaleLearningRate(0.5), core.ScaleLearningRate(3.0), core.ScaleDecay(0.5),
     core.HoldValues(), core.ReleaseValues(), core.DecayNow(30, "linear"),
     core.EnterNextStage(), core.SetTotal(450)]
)  # fmt: skip


@settings(PICTURES, max_examples=40)
@given(
    st.sampled_from([STRAIGHT, STRAIGHT_STAGES]),
    st.lists(st.tuples(st.integers(1, 60), OPERATIONS), max_size=6),
    st.integers(10, 30),
)
def test_straight_lines_between_the_points_are_right(
    fields: dict[str, Any], operations: list[tuple[int, core.Action]], points: int
) -> None:
    log = Life(**fields)
    log.open()
    for step, (steps, action) in enumerate(operations):
        log.report(log.state.frontier, [1.0] * steps)
        log.take(max(0, log.state.horizon - 4), count=4)
        log.operator(action, f"act {step}")
    answer = drawn_rates(log.state, points=points, end=440)
    check_values(log.state, answer)
    for place, curve in enumerate(answer.groups):
        assert {0, 440, log.state.progress, log.state.horizon} <= set(curve.progress)
        for at in range(441):
            rates, decays = log.state.values(at)
            assert decays is not None
            assert between(curve, curve.learning_rate, at) == pytest.approx(rates[place])
            base = log.state.plan.base(at)[place]
            assert between(curve, curve.base_learning_rate, at) == pytest.approx(base)
            assert between(curve, curve.weight_decay, at) == pytest.approx(decays[place])


@settings(PICTURES, max_examples=40)
@given(st.sampled_from(sorted(SPECS)), st.data())
def test_the_values_are_those_of_the_run(name: str, data: st.DataObject) -> None:
    log = Life(**SPECS[name])
    log.open()
    for step in range(data.draw(st.integers(1, 12), "steps")):
        log.live(data, step)
    answer = drawn_rates(log.state, points=50, end=140)
    check_values(log.state, answer)
    shown = set(answer.groups[0].progress)
    for item in log.state.plan.adjustments:
        jump = {item.effective - 1, item.effective} & set(range(141))
        assert jump <= shown
    stages = log.state.plan.stages()
    if len(stages) == 1:
        assert not answer.stages
    else:
        assert [(item.name, item.begin) for item in answer.stages] == [
            (stage.name, stage.begin) for stage in stages
        ]
        for one, after in itertools.pairwise(answer.stages):
            assert one.end == after.begin


def test_a_run_with_thousands_of_adjustments_is_drawn_with_less(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_curves, "MOST_LINKS", 4_000)
    log = Life(**STRAIGHT)
    log.open()
    for step in range(40):
        log.report(log.state.frontier, [1.0])
        log.operator(core.ScaleLearningRate(0.9 if step % 2 else 1.2), f"act {step}")
    answer = drawn_rates(log.state, points=1000)
    check_values(log.state, answer)
    assert 10 <= len(answer.groups[0].progress) < 100


# What stands out.


@given(st.lists(st.floats(), min_size=1, max_size=80), st.integers(1, 30), st.integers(1, 5))
def test_a_thinned_curve_has_what_stands_out_of_each_stretch(
    values: list[float], width: int, stride: int
) -> None:
    curve = core.Series()
    for at, value in enumerate(values):
        curve.add(at * stride, value)
    for shown in (thinned(curve, width), thinned(curve.reduced(), width)):
        found = list(zip(shown.progress, map(repr, shown.values), strict=True))
        assert found == sorted(set(found))
        assert set(found) <= {(at * stride, repr(value)) for at, value in enumerate(values)}
        assert (found[0][0], found[-1][0]) == (0, (len(values) - 1) * stride)
        for begin in range(0, len(values) * stride, width):
            part = {
                repr(value) for at, value in enumerate(values)
                if begin <= at * stride < begin + width
            }  # fmt: skip
            kept = {text for at, text in found if begin <= at < begin + width}
            finite = [x for x in map(float, part) if math.isfinite(x)]
            if finite:
                assert {min(finite), max(finite)} <= set(map(float, kept))
            assert len(finite) == len(part) or any(not math.isfinite(float(x)) for x in kept)


def test_an_average_over_buckets_is_that_over_losses() -> None:
    averages, exact = core.Averages(), core.Smoothed()
    expected = {}
    for at in range(1000):
        loss = 2.0 + math.sin(at) + 5.0 * (at == 700)
        averages.add(at, loss)
        exact.take(1, 0.02 * loss)
        expected[at] = exact.value
    rough, reduced = core.Smoothed(), averages.reduced()
    assert len(reduced.progress) < 20
    for at, count, part in zip(reduced.progress, reduced.counts, reduced.parts, strict=True):
        rough.take(count, part)
        assert rough.value == pytest.approx(expected[at], rel=1e-12)


@pytest.mark.usefixtures("small")
def test_a_bucket_that_was_forgotten_in_part_counts_in_part(store: Store) -> None:
    log = Drawn(store)
    log.open()
    for at in range(62):
        log.report(at, [3.0])
    log.open(30)
    for at in range(30, 90):
        log.report(at, [1.0])
    compact_all(store, log.name, log.state.seq)
    rough = points_of(log.draw(points=10).smoothed_loss)
    assert rough
    exact = dict(smoothed(log.state))
    for at, value in rough:
        assert value == pytest.approx(exact[at], rel=1e-9)


@pytest.mark.usefixtures("small")
def test_a_damaged_segment_is_left_out(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    log = Drawn(store)
    log.open()
    for at in range(30):
        log.report(at, [float(at)])
    compact_all(store, log.name, log.state.seq)
    (name, damaged) = log.name, store.segments(log.name)[2]
    assert isinstance(store, SqlStore)
    with store._engine.begin() as connection:
        connection.execute(
            sa.update(segments)
            .where(segments.c.checksum == damaged.checksum)
            .values(data=b"damaged")
        )
    missing = set(range(damaged.first_seq - 3, damaged.last_seq - 2))
    for _ in range(2):
        (curve,) = log.draw().losses
        assert set(curve.loss.progress) == set(range(30)) - missing
    told = [one.getMessage() for one in caplog.records if "left out" in one.getMessage()]
    assert len(told) == 1
    assert f"run {name!r}: packed rows 13 to 18 cannot be read" in told[0]
    assert store.segments(name)[2].overview is None


def test_a_server_that_ends_makes_no_overview_any_more(store: Store) -> None:
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        log = Drawn(store)
        log.open()
        log.report(0, [1.0])
        for at in range(1, 9):
            log.report(at, [1.0])
        compact_all(store, log.name, log.state.seq)
        log.history.stop()
        with pytest.raises(StoreUnavailable, match="shutting down"):
            log.draw()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("first", range(6))
def test_losses_that_come_late_count_for_nothing_wherever_a_segment_ends(
    store: Store, first: int
) -> None:
    log = Drawn(store)
    log.open()
    for at in range(first):
        log.report(at, [1.0])
    log.write([core.Waived(1, first + 12)])
    for at in range(first, first + 15):
        log.report(at, [50.0 if at < first + 12 else 1.0])
    for _ in range(2):
        assert len(log.draw().losses[0].loss.progress) == first + 15
        values = list(log.draw().smoothed_loss.value)
        assert values == pytest.approx([1.0] * len(values))
        check_whole(log)
        compact_all(store, log.name, log.state.seq)
        log.history = LossHistory(store)


@pytest.mark.usefixtures("small")
def test_a_state_from_before_the_run_went_another_way(store: Store) -> None:
    log = Drawn(store)
    log.open()
    log.report(0, [3.0] * 40)
    log.save(30)
    log.open(10)
    log.report(10, [9.0] * 40)
    log.resume(log.saved[0])
    log.report(30, [1.0] * 5)
    for _ in range(2):
        answer = log.draw()
        assert [item.forgotten_from for item in answer.losses[:2]] == [0, 0]
        assert not answer.losses[2].HasField("forgotten_from")
        # What came before is known through the saved state alone.
        assert list(answer.smoothed_loss.progress) == list(range(30, 35))
        assert max(answer.smoothed_loss.value) < 3.0
        check_whole(log)
        compact_all(store, log.name, log.state.seq)
        log.history = LossHistory(store)
    log.open(0)
    log.report(0, [2.0])
    check_whole(log)


# Over the wire.


async def curves(server: Replica, **fields: Any) -> Any:
    return await server.call("GetCurves", **{"run": "small"} | fields)


async def test_a_run_without_a_loss(server: Replica) -> None:
    await server.attach()
    answer = await curves(server)
    assert (answer.seq, answer.begin, answer.end) == (1, 0, 1000)
    assert (answer.progress, answer.horizon) == (0, 0)
    assert not answer.losses
    assert not answer.smoothed_loss.progress
    (group,) = answer.groups
    assert (group.name, set(group.learning_rate), set(group.weight_decay)) == ("", {1e-3}, {0.1})
    job = await server.open()
    answer = await curves(server)
    assert [(item.attempt, list(item.loss.progress)) for item in answer.losses] == [(1, [])]
    assert answer.horizon == job.opened.horizon


async def test_a_spike_that_was_rolled_back_stays_to_be_seen(server: Replica) -> None:
    job = await server.start_job()
    await job.report(*((n, 100.0 if n == 70 else math.nan if n == 72 else 1.0) for n in range(80)))
    job = await server.open(progress=50)
    await job.report(*((n, 0.5) for n in range(50, 60)))
    answer = await curves(server, points=20)
    first, second = answer.losses
    assert (first.attempt, first.begin, first.forgotten_from) == (1, 0, 50)
    assert (70, 100.0) in points_of(first.loss)
    assert "(72, nan)" in map(repr, points_of(first.loss))
    assert first.loss.progress[-1] == 79
    assert (second.attempt, second.begin) == (2, 50)
    assert not second.HasField("forgotten_from")
    shown = await job.shown()
    assert answer.smoothed_loss.value[-1] == pytest.approx(shown.smoothed_loss)
    assert max(answer.smoothed_loss.value) < 1.1
    finished = await server.call(
        "FinishRun", run="small", force=True, request_id=server.fresh("finish")
    )
    after = await curves(server, points=20)
    assert after.seq == finished.run.seq == answer.seq + 1
    assert after.losses == answer.losses


@pytest.mark.usefixtures("small")
async def test_after_a_restart_and_an_import(
    server: Replica, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_history, "SNAPSHOT_EVERY", 30)
    store: Any = open_store(tmp_path / "data")
    here = type(server)(store)
    await here.start()
    job = await here.start_job(**here.feedback(delay=2))
    for n in range(40):
        await job.values(n, count=1, in_use=n)
        await job.report((n, 1.0 + n % 7))
    before = await curves(here, points=4000)
    close = await curves(here, begin=13, end=14)
    assert points_of(close.losses[0].loss) == [(13, 7.0), (14, 1.0)]
    parts = [part.data async for part in here.stream("ExportRun", run="small", force=True)]
    await here.restart()
    compact_all(store, "small", MAX_SEQ)
    assert await curves(here, points=4000) == before
    again = await curves(here, begin=13, end=14)
    assert again.losses == close.losses
    # Of what came before there are averages alone now.
    assert again.smoothed_loss.value == pytest.approx(list(close.smoothed_loss.value), rel=1e-12)
    await here.restart()
    assert await curves(here, points=4000) == before
    await here.stop()
    store.close()
    # What another server wrote, and no overview of it.
    elsewhere: Any = open_store(tmp_path / "other")
    other = type(server)(elsewhere)
    await other.start()
    request = other.request("ImportRun")
    await other.send("ImportRun", [
        request(data=data, request_id="import", author="me", reason="moved") for data in parts
    ])  # fmt: skip
    imported = await curves(other, points=4000)
    assert imported.losses == before.losses
    assert imported.smoothed_loss == before.smoothed_loss
    found = (await other.call("ListEvents", run="small", notable=True, newest_first=True)).events
    assert found[0].kind == "imported"
    assert {item.kind for item in found} > {"created", "opened", "imported"}
    await other.stop()
    elsewhere.close()


async def test_a_run_that_was_made_again_shows_nothing_of_the_old_one(server: Replica) -> None:
    job = await server.start_job()
    await job.report(*((n, 5.0) for n in range(50)))
    assert len((await curves(server)).losses[0].loss.value) == 50
    await server.call("DeleteRun", run="small", force=True)
    job = await server.start_job()
    await job.report((0, 1.0), (1, 1.0))
    assert points_of((await curves(server)).losses[0].loss) == [(0, 1.0), (1, 1.0)]


@pytest.mark.parametrize(
    ("fields", "field", "text"),
    [
        ({"begin": -1}, "begin", "got -1; allowed: 0 to 9007199254740992"),
        ({"begin": 1001}, "begin", "got 1001; allowed: 0 to 1000, the end of the run"),
        ({"begin": 5, "end": 4}, "end", "got 4; allowed: `begin`, 5, to 9007199254740992"),
        ({"end": -1}, "end", "got -1; allowed: "),
        ({"end": 2**53 + 1}, "end", "got 9007199254740993; allowed: "),
        ({"points": 9}, "points", "got 9; allowed: 10 to 4000, or 0 for 1000"),
        ({"points": 4001}, "points", "got 4001; allowed: 10 to 4000"),
        ({"groups": ["", "other"]}, "groups", "got 'other'; allowed: one of ''"),
        ({"groups": [""] * 65}, "groups", "got 65 names; allowed: at most 64"),
    ],
)
async def test_a_bad_request_is_told_what_is_allowed(
    server: Replica, fields: dict[str, Any], field: str, text: str
) -> None:
    await server.attach()
    refusal = await server.refused("GetCurves", run="small", **fields)
    assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "InvalidRequest")
    assert set(refusal.fields) == {field}
    assert refusal.fields[field].startswith(text)


async def test_an_unknown_run(server: Replica) -> None:
    assert (await server.refused("GetCurves", run="smal")).reason == "RunNotFound"


async def test_many_groups_and_attempts_fit_into_a_message(server: Replica) -> None:
    names = [f"group {number}" for number in range(500)]
    total = 4_000_000 * 10_000
    await server.attach(total=total, unit="tokens", groups=[{"name": name} for name in names])
    job = await server.open()
    for number in range(60):
        begin = number * 4_000_000
        await job.report((begin, float(number), begin + 4_000_000))
        job = await server.open(progress=begin)
    answer = await curves(server, points=4000)
    assert answer.group_count == 500
    assert [item.name for item in answer.groups] == names[:8]
    assert len(answer.losses) == 61
    assert answer.ByteSize() < 1 << 20
    wanted = [*names[-32:], *names[:32]]
    answer = await curves(server, points=4000, groups=wanted)
    assert [item.name for item in answer.groups] == wanted
    assert answer.ByteSize() < 1 << 20


@pytest.mark.usefixtures("small")
def test_of_very_many_attempts_the_newest_are_drawn(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_curves, "MOST_ATTEMPTS", 20)
    log = Drawn(store)
    for _ in range(60):
        log.open(0)
        log.report(0, [1.0, 2.0])
    answer = log.draw()
    assert [item.attempt for item in answer.losses] == list(range(41, 61))
    assert answer.losses[0].forgotten_from == 0


# Ranks.


async def ask(job: Any, rank: int, at: int) -> None:
    await job.values(at, count=1, in_use=at, held=trainer_pb2.Held(rank=rank))


class TestRanks:
    async def test_those_that_lag_are_named(self, server: Replica) -> None:
        job = await server.start_job(**server.feedback(delay=30))
        assert not (await job.shown()).HasField("ranks")
        await job.report(*((n, 1.0) for n in range(20)))
        for rank in range(40):
            await ask(job, rank, 5 if rank == 7 else 12 if rank == 9 else 20)
        ranks = (await job.shown()).ranks
        assert (ranks.active, ranks.waiting) == (40, 0)
        assert [(item.rank, item.progress, item.lag) for item in ranks.slowest[:3]] == [
            (7, 5, 15),
            (9, 12, 8),
            (0, 20, 0),
        ]
        assert len(ranks.slowest) == 16
        assert all(0.0 <= item.asked_s_ago < 60.0 for item in ranks.slowest)
        await ask(job, 7, 20)
        assert (await job.shown()).ranks.slowest[0].rank == 9

    async def test_one_that_does_not_say_which_it_is_counts_for_none(self, server: Replica) -> None:
        job = await server.start_job()
        await job.values(0)
        assert not (await job.shown()).HasField("ranks")

    async def test_a_new_attempt_knows_none(self, server: Replica) -> None:
        job = await server.start_job()
        await ask(job, 3, 0)
        assert (await job.shown()).ranks.active == 1
        job = await server.open()
        assert not (await job.shown()).HasField("ranks")

    async def test_those_that_wait(self, server: Replica, until: Until) -> None:
        job = await server.start_job(**server.feedback(delay=2))
        waiting = asyncio.ensure_future(job.values(2, blocked=True, wait_ms=30_000))

        async def waits() -> bool:
            ranks = (await job.shown()).ranks
            return bool(ranks.waiting == 1 and ranks.blocked_s > 0.0)

        await until(waits)
        await job.report((0, 1.0))
        assert (await waiting).block.begin == 2

    def test_they_are_forgotten(self) -> None:
        ranks = RecentRanks(120.0)
        for rank in range(5):
            ranks.add(Asked(rank, 10, rank, float(rank)))
        ranks.add(Asked(1, 11, 7, 100.0))
        assert ranks.count(120.0) == 5
        assert [item.rank for item in ranks.slowest(2)] == [1, 4]
        assert ranks.count(122.5) == 3
        assert ranks.count(125.0) == 1
        assert [item.rank for item in ranks.slowest(16)] == [1]
        assert ranks.count(221.0) == 0

    def test_their_number_is_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_recent, "MOST_RANKS", 10)
        ranks = RecentRanks(120.0)
        for rank in range(1000):
            ranks.add(Asked(rank, 0, 0, 0.0))
        assert ranks.count(0.0) == 10


# Events.


async def listed(server: Replica, size: int, **fields: Any) -> list[int]:
    """Return the seqs of the log, page by page."""
    found: list[int] = []
    token = ""
    while True:
        page = await server.call(
            "ListEvents", run="small", page_size=size, page_token=token, **fields
        )
        assert len(page.events) <= size
        found += [item.seq for item in page.events]
        token = page.next_page_token
        if not token:
            return found


@pytest.mark.parametrize("size", [1, 3, 1000])
async def test_events_in_either_order_and_the_notable_ones_alone(
    server: Replica, size: int
) -> None:
    job = await server.start_job(**server.feedback(delay=2))
    for n in range(12):
        await job.values(n, count=1)
        await job.report((n, 1.0 if n in (4, 5) else 2.0 - n / 100))
    job = await server.open(progress=3)
    every = (await server.call("ListEvents", run="small", page_size=1000)).events
    seqs = [item.seq for item in every]
    assert await listed(server, size) == seqs
    assert await listed(server, size, newest_first=True) == seqs[::-1]
    notable = [
        item.seq for item in every
        if item.adjustments or item.kind not in {"reported", "recorded", "permitted"}
    ]  # fmt: skip
    assert 4 < len(notable) < len(seqs)
    assert await listed(server, size, notable=True) == notable
    assert await listed(server, size, notable=True, newest_first=True) == notable[::-1]
