"""A log that was put back from an older copy: what shows it, and the way back from a checkpoint."""

import hashlib
import json
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrpilot import core
from tests.core.test_requests import PLATEAU, Log

DELAY = 4
AHEAD = 40
"""Progresses past the resume point whose values are compared."""


def copy_of(rows: Sequence[bytes], **fields: Any) -> Log:
    """Return a run as a copy of its log has it."""
    log = Log(**fields)
    log.rows, log.state = list(rows), core.fold("run", rows)
    return log


def make_log(**fields: Any) -> Log:
    log = Log(policies=[PLATEAU], weight_decay=0.1, **fields)
    log.open()
    return log


def saved(log: Log, progress: int) -> core.SavedState:
    return core.read_state(core.save_state(log.state, progress), "run")


def digest_at(log: Log, seq: int) -> str | None:
    """Return the digest of a log at a seq, as a server looks it up."""
    return core.fold("run", log.rows[:seq]).digest if seq <= len(log.rows) else None


def resume(log: Log, state: core.SavedState, name: str = "resumed") -> core.Opened:
    """Open from a state; return the event."""
    (opened,) = log.open(
        request_id=name,
        token=hashlib.sha256(name.encode()).hexdigest()[:32],
        saved=state,
        digest_at_saved=digest_at(log, state.seq),
    )
    assert isinstance(opened, core.Opened)
    return opened


def held(log: Log, /, **fields: Any) -> core.Held:
    """Return what a client says that has the first four values, and what it was told."""
    block = log.state.records.block(0, 1)
    assert block is not None
    digest = core.values_digest(block.learning_rates, block.weight_decays or ())
    told = {"frontier": log.state.frontier, "log": log.state.log[:32]}
    return core.Held(**{"steps": block.steps, "digest": digest, "rank": 7, **told, **fields})


def missing(log: Log, what: core.Held, attempt: int = 1) -> core.Forgot | None:
    return core.missing(log.state, attempt, f"{attempt:032x}", what)


# What shows it.


def test_the_digest_is_that_of_the_numbers_as_they_travel() -> None:
    packed = struct.pack("<4d", 0.1, 0.2, 0.01, -0.0)
    assert core.values_digest([0.1, 0.2], [0.01, -0.0]) == hashlib.sha256(packed).digest()[:16]


def test_nothing_is_missing_of_what_the_log_gave() -> None:
    log = make_log()
    log.take(0)
    log.report(0, [1.0, 1.0])
    assert missing(log, held(log)) is None
    # Any part of it, on any stride, and nothing at all.
    values = log.state.values
    part = core.values_digest([values(1)[0][0], values(3)[0][0]], [0.1, 0.1])
    assert missing(log, held(log, begin=1, stride=2, steps=2, digest=part)) is None
    assert missing(log, core.Held()) is None


@pytest.mark.parametrize(
    ("change", "what", "progress"),
    [
        ({"frontier": 3}, "losses", 3),
        ({"digest": bytes(16)}, "values", 3),
        ({"steps": 5}, "values", 4),
        ({"begin": 4}, "values", 7),
        ({"offer": 2}, "offer", 3),
    ],
)
def test_what_the_log_has_not(change: dict[str, Any], what: str, progress: int) -> None:
    log = make_log()
    log.take(0)
    log.report(0, [1.0, 1.0])
    found = missing(log, held(log, **change))
    assert found == core.Forgot(1, 7, what, progress)
    assert core.decode(core.encode(found)) == found


def test_an_attempt_is_missing_where_this_very_log_opened_it() -> None:
    log = make_log()
    log.take(0)
    assert missing(log, held(log), attempt=3) == core.Forgot(3, 7, "attempt", 3)
    assert missing(log, held(log, log="00" * 16), attempt=3) is None
    assert missing(log, held(log, log=""), attempt=3) is None


def test_who_is_superseded_accuses_nobody() -> None:
    log = make_log()
    log.take(0)
    what = held(log, frontier=99)
    log.open(0)
    assert missing(log, what) is None
    # Nor does a run that is over, of which nothing more comes.
    log.write(core.finish_run(log.state, "end"))
    assert missing(log, what, attempt=2) is None


def test_whatever_belongs_to_the_attempt_is_refused_until_the_next_one() -> None:
    log = make_log(feedback={"delay": DELAY})
    log.take(0)
    log.write([core.Forgot(1, 7, "values", 9)])
    with pytest.raises(core.LogForgotten, match="rank 7 holds values up to progress 9") as error:
        core.check_attempt(log.state, 1, f"{1:032x}")
    assert error.value.facts == {
        "run": "run",
        "attempt": 1,
        "log_attempt": 1,
        "seq": 3,
        "frontier": 0,
        "recorded": 3,
        "rank": 7,
        "holds": "values",
        "progress": 9,
    }
    # Also where a rank comes meanwhile whose attempt the log does not know.
    log.write([core.Forgot(2, 5, "attempt", 0)])
    with pytest.raises(core.LogForgotten, match="rank 7 holds values up to progress 9"):
        core.check_attempt(log.state, 1, f"{1:032x}")
    assert log.state.alarm == log.state.forgot
    assert core.restore_snapshot(log.state.snapshot()).snapshot() == log.state.snapshot()
    log.open(0)
    assert (log.state.attempt, log.state.forgot, log.state.alarm) == (3, None, None)
    core.check_attempt(log.state, 3, log.state.token)


def test_an_attempt_that_the_log_forgot_leaves_its_own_alone() -> None:
    """A job that started after the log was put back goes on, whatever ranks of old jobs come."""
    log = make_log(feedback={"delay": DELAY})
    log.take(0)
    log.report(0, [1.0])
    copy = list(log.rows)
    for _ in range(2):
        log.open(0)
    lost = log.state.attempt, log.state.token
    older = copy_of(copy)
    older.open(0, request_id="job", token="c" * 32)
    older.take(0)
    holds = held(older, rank=5)
    forgot = core.missing(older.state, *lost, holds)
    assert forgot == core.Forgot(3, 5, "attempt", 3)
    older.write([forgot])
    # Once, and to whom it concerns.
    assert core.missing(older.state, *lost, holds) is None
    with pytest.raises(core.LogForgotten, match="rank 5 holds attempt 3"):
        core.check_attempt(older.state, *lost)
    own = older.state.attempt, older.state.token
    core.check_attempt(older.state, *own)
    # People hear of it, until it shows that the attempt lives.
    assert older.state.alarm == older.state.lost_attempt
    assert older.state.alarm is not None
    again = core.restore_snapshot(older.state.snapshot())
    assert (again.alarm, again.snapshot()) == (older.state.alarm, older.state.snapshot())
    older.report(0, [1.0])
    assert older.state.alarm is None
    assert core.restore_snapshot(older.state.snapshot()).alarm is None
    # What is missing of it is noticed as ever, and its successor has a number of its own.
    gone = held(older, rank=6, frontier=9)
    assert core.missing(older.state, *own, gone) == core.Forgot(2, 6, "losses", 9)
    older.open(0, request_id="next")
    assert older.state.attempt == 4
    with pytest.raises(core.AttemptSuperseded, match="superseded by attempt 4"):
        core.check_attempt(older.state, *lost)


def test_until_a_new_attempt_opens_people_hear_of_the_one_that_was_forgotten() -> None:
    log = make_log()
    log.take(0)
    log.write([core.Forgot(2, 7, "attempt", 9)])
    assert log.state.forgot is None
    assert log.state.alarm == log.state.lost_attempt
    # What operators do shows nothing of the ranks.
    adjust(core.ScaleLearningRate(0.5))(log)
    assert log.state.alarm is not None
    log.open(0)
    assert log.state.attempt == 3
    assert log.state.alarm is None


def test_an_imported_log_has_forgotten_no_attempt() -> None:
    """Where it came from attempts may open still, with the same name of the log."""
    log = make_log()
    log.take(0)
    moved = copy_of(log.rows)
    request = core.ImportRequest(
        origin="there", exported_at_ns=1, request_id="import", author="me", reason="a move"
    )
    moved.write(core.import_run(core.RunState("run"), log.state, request))
    assert missing(moved, held(moved), attempt=2) is None
    moved.open(0, request_id="here", token="b" * 32)
    moved.take(0)
    assert missing(moved, held(moved), attempt=3) is None
    assert core.restore_snapshot(moved.state.snapshot()).is_imported
    with pytest.raises(core.AttemptSuperseded, match=r"attempt 3 is not known .* imported or"):
        core.check_attempt(moved.state, 3, f"{3:032x}")
    # Of its own attempt it may have forgotten something, as any log may.
    found = core.missing(moved.state, 2, "b" * 32, held(moved, frontier=9))
    assert found == core.Forgot(2, 7, "losses", 9)


def report_as(log: Log, rank: int, *reports: core.Report) -> list[core.Outcome]:
    events, outcomes = core.report_losses(
        log.state, reports, rank=rank, incarnation=f"process {rank}"
    )
    log.write(events)
    return outcomes


def test_what_one_of_several_reporters_said_is_missing() -> None:
    """Its losses are not final yet, since another one is behind."""
    log = Log(policies=[PLATEAU])
    log.open(reporters=(0, 1), rank=0, incarnation="process 0")
    for at in range(4):
        report_as(log, 0, core.Report(at, 1.0, 1.0, at + 1))
    report_as(log, 1, core.Report(0, 1.0, 1.0, 2))
    copy = list(log.rows)
    report_as(log, 0, core.Report(4, 0.5, 1.0, 5))
    older = copy_of(copy)
    assert older.state.frontier == log.state.frontier == 2
    for run, found in ((log, None), (older, core.Forgot(1, 0, "losses", 5))):
        assert missing(run, core.Held(rank=0, reported=5, frontier=2)) == found
        assert missing(run, core.Held(rank=0, reported=4, frontier=2)) is None
        assert missing(run, core.Held(rank=1, reported=2, frontier=2)) is None


def test_a_request_from_before_a_declaration_has_values_that_it_undid() -> None:
    """The holder went on by another stride from between two progresses of its block."""
    log = Log(policies=[PLATEAU], feedback={"delay": 40})
    log.open(holder="h" * 32)
    block = log.take(0, stride=10)
    digest = core.values_digest(block.learning_rates, ())
    before = core.Held(stride=10, steps=block.steps, digest=digest)
    wanted = core.OfferRequest(begin=15, stride=15, count=2)
    log.write(core.offer_values(log.state, wanted, holder="h" * 32))
    used = core.offered(log.state, wanted).block()
    assert before.last > used.begin
    assert missing(log, before) is None
    log.write(core.declare_values(log.state, [used], holder="h" * 32))
    assert missing(log, before) is None
    # Once its declaration was answered the holder has the values that the log has, or more.
    digest = core.values_digest(used.learning_rates, ())
    after = core.Held(begin=15, stride=15, steps=used.steps, declared=used.last + 1, digest=digest)
    assert missing(log, after) is None
    found = missing(log, replace(after, digest=bytes(16)))
    assert found == core.Forgot(1, 0, "values", used.last)


REPORTS = st.lists(
    st.tuples(
        st.sampled_from([0, 1, 2]),
        st.integers(0, 9),
        st.integers(1, 3),
        st.sampled_from([None, 1.0, 2.0]),
        st.booleans(),
    ),
    max_size=25,
)


@settings(max_examples=200, deadline=None)
@given(reports=REPORTS, ranks=st.sampled_from([(0,), (0, 1), (2, 0, 1)]), waits=st.booleans())
def test_who_reported_accuses_no_log_that_has_it(
    reports: list[tuple[int, int, int, float | None, bool]], ranks: tuple[int, ...], waits: bool
) -> None:
    """Losses that come late, twice or not at all, skipped updates, waivers, a trimmed state."""
    log = Log(policies=[PLATEAU])
    log.open(reporters=ranks, rank=ranks[0], incarnation=f"process {ranks[0]}")
    reached = dict.fromkeys(ranks, 0)
    for rank, at, steps, loss, skipped in reports:
        report = core.Report(at, loss, 1.0, at if skipped else at + steps, skipped=skipped)
        with suppress(core.LrpilotError):
            report_as(log, rank, report)
            reached[rank] = max(reached[rank], report.moves_to)
        if waits:
            log.write(core.waive(log.state, at + DELAY))
        trimmed = core.restore_snapshot(log.state.snapshot())
        trimmed.trim(log.state.frontier)
        for state in (log.state, trimmed):
            for reporter, reported in reached.items():
                what = core.Held(rank=reporter, reported=reported, frontier=state.frontier)
                assert core.missing(state, 1, f"{1:032x}", what) is None


def test_a_rank_cannot_join_what_the_log_has_forgotten() -> None:
    log = Log(policies=[PLATEAU])
    log.open(key="job")
    log.write([core.Forgot(1, 0, "losses", 9)])
    with pytest.raises(core.LogForgotten):
        log.open(key="job", request_id="another", rank=1)


# The way back.


class TestStatesOfRelease:
    """A log and a state in it as release 0.2.0 wrote them, and what it resumed with."""

    @pytest.fixture
    def written(self) -> dict[str, Any]:
        path = Path(__file__).parents[1] / "golden" / "saved_state_0.2.0.json"
        content: dict[str, Any] = json.loads(path.read_text())
        return content

    def log(self, written: dict[str, Any], count: int | None = None) -> Log:
        return copy_of([row.encode() for row in written["rows"][:count]])

    def state(self, written: dict[str, Any]) -> core.SavedState:
        return core.read_state(written["state"].encode(), "run")

    def resumed(self, log: Log) -> list[list[str]]:
        values = [log.state.values(at) for at in range(6, 30)]
        return [[x.hex() for x in (*rates, *(decays or ()))] for rates, decays in values]

    def test_in_its_own_log_it_resumes_as_it_did(self, written: dict[str, Any]) -> None:
        log = self.log(written)
        assert log.state.digest == written["digest"]
        resume(log, self.state(written))
        assert self.resumed(log) == written["resumed"]

    def test_a_lost_log_is_restored_from_it(self, written: dict[str, Any]) -> None:
        lost = Log()
        lost.rows, lost.state = [], core.RunState("run")
        state = self.state(written)
        request = core.OpenRequest(request_id="open", token="1" * 32, saved=state)
        lost.write(core.open_attempt(lost.state, request))
        assert self.resumed(lost) == written["resumed"]
        # And what this release saves of it names the log, and all that was done in the old one.
        lost.report(6, [1.0] * 3)
        copy, later = len(lost.rows), saved(lost, 9)
        lost.report(9, [2.0])
        end = saved(lost, 10)
        for begun in (later, end):
            older = copy_of(lost.rows[: copy - 1])
            assert resume(older, begun).adopted
            assert done(older) == done(lost)
            assert len(older.state.plan.revisions) == len(lost.state.plan.revisions)

    def test_in_an_older_copy_it_is_refused_with_the_way_out(self, written: dict[str, Any]) -> None:
        log = self.log(written, written["copy"])
        with pytest.raises(core.StateMismatch, match="give resume_at=6 without the state") as error:
            resume(log, self.state(written))
        assert "older checkpoint, or the run another name" in str(error.value)
        log.open(6)
        assert log.state.begin == 6


def test_the_spec_that_trainers_gave_in_the_lost_part_counts() -> None:
    old, new = Log().spec, Log(total=900).spec
    log = Log()
    log.write(core.attach_run(log.state, old, revise=False, request_id="attach"))
    log.open()
    copy = len(log.rows)
    log.write(core.attach_run(log.state, new, revise=True, request_id="revise"))
    log.open(0)
    state = saved(log, 0)
    with pytest.raises(core.SpecChanged, match="900 -> 1000"):
        resume(copy_of(log.rows[:copy]), state)
    # The job gives its spec again on its way to the checkpoint; it is known once.
    older = copy_of(log.rows[:copy])
    older.write(core.attach_run(older.state, new, revise=True, request_id="again"))
    resume(older, state)
    assert [item.spec.total for item in older.state.plan.revisions] == [1000, 900]
    assert (older.state.pending_spec, older.state.given_spec) == (None, new)


def test_the_answer_of_an_operator_is_given_again() -> None:
    log = make_log()
    log.report(0, [1.0])
    scale = core.ScaleLearningRate(0.5)

    def act(log: Log) -> list[core.Event]:
        signed = {"reason": "why", "author": "me", "request_id": "scale"}
        return log.write(core.adjust_run(log.state, scale, **signed))

    act(log)
    copy = len(log.rows)
    log.report(1, [1.0] * 4)
    state = saved(log, 5)
    older = copy_of(log.rows[:copy])
    before = older.state.made["scale"]
    assert resume(older, state).adopted
    assert act(older) == []
    assert older.state.find(before) in older.state.plan.adjustments
    assert len([item for item in older.state.plan.adjustments if item.kind == "operator"]) == 1


# As the log that was not lost would have resumed.

Step = Callable[[Log], object]


def report(losses: list[float]) -> Step:
    return lambda log: log.report(log.state.frontier, losses)


def adjust(action: core.Action) -> Step:
    def step(log: Log) -> None:
        signed = {"reason": "why", "author": "me", "request_id": f"adjust {log.state.seq}"}
        log.write(core.adjust_run(log.state, action, **signed))

    return step


def take_back(number: int) -> Step:
    def step(log: Log) -> None:
        items = [x for x in log.state.plan.adjustments if isinstance(x.change, core.ENDABLE)]
        if items:
            adjust(core.TakeBack(items[number % len(items)].id))(log)

    return step


def revise(peak: float) -> Step:
    def step(log: Log) -> None:
        spec = core.parse_spec({**log.state.spec.to_mapping(), "learning_rate": {"peak": peak}})
        log.write(core.revise_run(log.state, spec, f"revise {log.state.seq}"))

    return step


def revise_as_a_trainer(peak: float) -> Step:
    def step(log: Log) -> None:
        spec = core.parse_spec({**log.state.spec.to_mapping(), "learning_rate": {"peak": peak}})
        name = f"attach {log.state.seq}"
        log.write(core.attach_run(log.state, spec, revise=True, request_id=name))
        log.open(log.state.frontier, request_id=f"{name} open")

    return step


def take(log: Log) -> None:
    log.take(log.state.begin)


def reopen(back: int) -> Step:
    def step(log: Log) -> None:
        begin = max(log.state.frontier - back, log.state.origin)
        log.open(begin, request_id=f"open {log.state.seq}")

    return step


def roll_back(factor: float) -> Step:
    def step(log: Log) -> None:
        at = log.state.frontier
        adjust(core.Ask("rollback", before=at, factor=factor))(log)
        (asked,) = [x for x in log.state.plan.adjustments if x.change.action == "directive"][-1:]
        log.open(
            max(at - 2, log.state.origin),
            request_id=f"roll back {log.state.seq}",
            directive=asked.id,
            met_in=(log.state.attempt, log.state.token),
        )

    return step


STEPS = st.lists(
    st.one_of(
        st.lists(st.sampled_from([1.0, 2.0, 0.5]), min_size=1, max_size=4).map(report),
        st.sampled_from([0.5, 0.9, 2.0]).map(core.ScaleLearningRate).map(adjust),
        st.sampled_from([0.3, 0.7]).map(core.SetLearningRate).map(adjust),
        st.just(adjust(core.HoldValues())),
        st.just(adjust(core.ReleaseValues())),
        st.integers(0, 5).map(take_back),
        st.sampled_from([0.8, 0.6]).map(revise),
        st.sampled_from([0.75, 0.55]).map(revise_as_a_trainer),
        st.just(take),
        st.integers(0, 3).map(reopen),
        st.sampled_from([0.5, 0.8]).map(roll_back),
    ),
    max_size=6,
)


def play(log: Log, steps: Sequence[Step]) -> None:
    for step in steps:
        # What is refused does nothing.
        with suppress(core.LrpilotError):
            step(log)


def follow(log: Log, begin: int) -> list[Any]:
    """Return all that comes of a resume: values now, and with losses that policies act on."""
    plan = [log.state.values(at) for at in range(begin, begin + AHEAD)]
    log.take(begin)
    log.report(begin, [1.0, 2.0, 2.0, 0.1, 1.0, 1.0])
    adjust(core.ScaleLearningRate(0.9))(log)
    log.report(begin + 6, [3.0] * 4)
    return [plan, [log.state.values(at) for at in range(begin, begin + AHEAD)], log.state.horizon]


def done(log: Log) -> list[Any]:
    """Return what operators and rollbacks did, in the order in which it applies."""
    return [
        (item.effective, item.change.action, item.author)
        for item in log.state.plan.adjustments
        if item.order >= 3000
    ]


@settings(max_examples=100, deadline=None)
@given(before=STEPS, after=STEPS, meanwhile=st.lists(st.just(0.7), max_size=1))
def test_a_checkpoint_brings_back_what_the_log_has_forgotten(
    before: list[Step], after: list[Step], meanwhile: list[float]
) -> None:
    """To the bit, whatever happened before the copy and after it; also from two checkpoints."""
    log = make_log(feedback={"delay": DELAY})
    play(log, before)
    copy = len(log.rows)
    play(log, after)
    log.report(log.state.frontier, [1.0])
    middle = saved(log, log.state.frontier)
    log.take(log.state.begin)
    log.report(log.state.frontier, [2.0, 2.0])
    end = saved(log, log.state.frontier)

    def restart(run: Log, state: core.SavedState, name: str = "resumed") -> core.Opened:
        """Resume as a job does, which gives its spec first."""
        given = log.state.given_spec
        run.write(core.attach_run(run.state, given, revise=True, request_id=f"{name} attach"))
        return resume(run, state, name)

    twin = copy_of(log.rows)
    restart(twin, end)
    expected = done(twin), follow(twin, end.progress)

    older = copy_of(log.rows[:copy])
    older.write([core.Forgot(older.state.attempt, 0, "losses", end.progress)])
    opened = restart(older, end)
    assert (opened.adopted, opened.attempt) == (True, twin.state.attempt)
    assert (done(older), follow(older, end.progress)) == expected
    assert core.fold("run", older.rows).snapshot() == older.state.snapshot()

    # By way of an older checkpoint of the lost part, and once more from the same one.
    longer = copy_of(log.rows[:copy])
    restart(longer, middle, "middle")
    for name in ("end", "once more"):
        restart(longer, end, name)
        again = copy_of(longer.rows)
        assert (done(again), follow(again, end.progress)) == expected

    # What an operator does after the copy was put back is there as well, once.
    for factor in meanwhile:
        other = copy_of(log.rows[:copy])
        adjust(core.ScaleLearningRate(factor))(other)
        restart(other, end)
        names = [item.id for item in other.state.plan.adjustments]
        assert len(names) == len(set(names))
        assert len(done(other)) == len(expected[0]) + 1
