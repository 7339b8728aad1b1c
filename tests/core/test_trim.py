"""A trimmed state: what it keeps, when it asks for history, and that nothing else differs."""

import json
import math
from typing import Any

import pytest

from lrpilot import core
from lrpilot.core import _state
from lrpilot.core._records import Block, Records
from tests.core.test_leader import Job
from tests.core.test_reporters import Team, skip
from tests.core.test_requests import PLATEAU, Log
from tests.trimmed import check_answers, check_trimmed, marks_every, trimmed

LINEAR: dict[str, Any] = {"peak": 1.0, "decay": {"style": "linear"}}


def a_run(steps: int = 40, **fields: Any) -> Log:
    """Return a run that took its values and reported its losses step by step."""
    log = Log(**{"policies": [PLATEAU], "learning_rate": LINEAR, **fields})
    log.open()
    for at in range(steps):
        log.take(at, 1, in_use=at)
        log.report(at, [1.0 + math.sin(at)])
    return log


@pytest.fixture
def marks() -> Any:
    """Keep a mark at every fourth loss."""
    with marks_every(4):
        yield


@pytest.mark.usefixtures("marks")
def test_what_is_kept_begins_at_the_last_mark_below_the_floor() -> None:
    state = a_run().state
    state.trim(30)
    assert (state.floor, state.dropped, state.loss_progress) == (30, 28, list(range(28, 40)))
    assert state.marks[0][0] == 28
    assert [block.begin for block in state.records] == list(range(30, 40))
    state.trim(20)
    assert state.floor == 30
    state.trim(1000)
    assert (state.floor, state.dropped, state.loss_progress) == (40, 40, [])


@pytest.mark.usefixtures("marks")
def test_all_that_is_asked_of_it_is_what_the_whole_state_says() -> None:
    log = a_run()
    log.write(core.waive(log.state, 60))
    log.report(44, [5.0])
    for floor in (1, 4, 5, 30, 45, 99):
        check_answers(trimmed(log.state, floor), log.state)
        check_trimmed("run", log.rows, len(log.rows) // 2, floor)


@pytest.mark.usefixtures("marks")
def test_a_rewind_below_the_floor_asks_for_history_and_one_above_does_not() -> None:
    log = a_run()
    for begin, asks in ((29, True), (30, False), (35, False)):
        state = trimmed(log.state, 30)
        events = core.open_attempt(
            log.state, core.OpenRequest(request_id="again", progress=begin, token="0" * 32)
        )
        before = state.snapshot()
        if asks:
            with pytest.raises(core.HistoryNeeded) as caught:
                state.apply(events[0])
            assert caught.value.progress == begin
            assert state.snapshot() == before
        else:
            whole = core.restore_snapshot(log.state.snapshot())
            for one in (state, whole):
                one.apply(events[0])
            assert state.snapshot() == trimmed(whole, 30).snapshot()
            assert state.values(begin + 4) == whole.values(begin + 4)


@pytest.mark.usefixtures("marks")
def test_a_saved_state_that_replaces_the_history_makes_it_whole() -> None:
    log = a_run()
    saved = core.read_state(core.save_state(log.state, 20), "run")
    log.open(10)
    log.report(10, [7.0] * 20)
    log.state.trim(25)
    assert log.state.floor == 25
    log.open(saved=saved, digest_at_saved=saved.digest)
    assert (log.state.floor, log.state.dropped, log.state.origin) == (0, 0, 20)
    assert log.state.snapshot() == core.fold("run", log.rows).snapshot()


@pytest.mark.usefixtures("marks")
def test_counts_and_the_newest_loss_outlive_what_they_are_of() -> None:
    log = a_run(8)
    log.write(core.waive(log.state, 19))
    log.report(9, [2.5])
    assert log.state.late_losses == 1
    frontier = log.state.frontier
    log.write(core.report_losses(log.state, [skip(frontier, 9.0)], rank=0, incarnation="one")[0])
    said = core.Report(frontier, None, 1.0, frontier + 8, tries=1)
    log.write(core.report_losses(log.state, [said], rank=0, incarnation="one")[0])
    state = trimmed(log.state, 999)
    assert state.late == {}
    assert state.dropped_loss is not None
    assert (state.late_losses, state.losses, state.loss) == (1, 8, log.state.loss)
    assert state.has_losses


def test_a_run_without_feedback_and_reports_is_trimmed_at_what_is_in_use() -> None:
    log = Log(learning_rate=LINEAR)
    log.open()
    for at in range(0, 100, 4):
        log.take(at, 4, in_use=at)
    state = trimmed(log.state, 90)
    assert (state.floor, state.frontier) == (90, 0)
    assert [block.begin for block in state.records] == [90, 92, 96]
    # Should its reporter speak after all, of what is below, that takes the whole.
    check_trimmed("run", [*log.rows, *_said(log, 0)], len(log.rows), 90)
    for loss in (None, 1.0):
        with pytest.raises(core.HistoryNeeded, match="at progress 3 was dropped"):
            state.apply(core.Reported(1, "one", (core.Report(3, loss, 1.0, 5),)))


def _said(log: Log, at: int) -> list[bytes]:
    rows = len(log.rows)
    log.report(at, [1.0] * 9)
    return log.rows[rows:]


def test_a_first_report_below_the_floor_asks_for_history_although_it_holds_no_loss() -> None:
    log = Log(policies=[PLATEAU], learning_rate=LINEAR, feedback={"delay": 8})
    log.open()
    log.write(core.waive(log.state, 8))
    at = log.state.horizon - 1
    log.take(at, 1, in_use=at)
    before = len(log.rows)
    first = log.state.frontier
    assert trimmed(log.state, 1000).floor == at > first
    log.report(first, [None])
    assert check_trimmed("run", log.rows, before, 1000) == 1


def test_what_is_not_final_yet_is_never_dropped() -> None:
    team = Team(0, 1)
    for at in range(9):
        team.loss(0, at, 1.0)
    team.loss(1, 0, 3.0)
    state = trimmed(team.state, 8)
    assert (state.floor, state.frontier) == (1, 1)
    assert sorted(state.reporters.parts) == list(range(1, 9))


def test_who_said_what_is_dropped_below_the_floor() -> None:
    team = Team(0, 1)
    for at in range(9):
        for rank in (0, 1):
            team.loss(rank, at, 1.0)
    state = trimmed(team.state, 8)
    assert sorted(state.reporters.members) == [8]


@pytest.mark.usefixtures("marks")
def test_permits_that_ended_are_dropped_and_one_that_is_named_is_looked_up() -> None:
    job = Job()
    offers = []
    for at in range(0, 40, 8):
        offers.append(job.offer(at, 12))
        job.report(at, [1.0] * 8)
    job.offer(40, 20)
    whole, state = job.state, trimmed(job.state, 30)
    assert [item.end for item in whole.permits] == [12, 20, 28, 36, 44, 60]
    assert [item.end for item in state.permits] == [36, 44, 60]
    assert state.permitted == 60
    block = offers[-1].block().cut(40, 44)
    assert block is not None
    holder = whole.holder
    for offer in (offers[0], offers[2]):
        with pytest.raises(core.HistoryNeeded) as caught:
            core.declare_values(state, [block], holder=holder, offer=offer.permit.seq)
        assert caught.value.progress == 0
    for seq in (0, offers[3].permit.seq):
        events = core.declare_values(state, [block], holder=holder, offer=seq)
        assert events == core.declare_values(whole, [block], holder=holder, offer=seq)
    # One from before the attempt was never a permit of it.
    with pytest.raises(core.BeyondPermit):
        core.declare_values(whole, [block], holder=holder, offer=999)
    # Once they are declared, and all but the last permit ended.
    job.declare(block, offer=offers[-1].permit.seq)
    job.report(whole.frontier, [1.0] * 4)
    state = trimmed(whole, 44)
    assert [item.end for item in state.permits] == [60]
    check_answers(state, whole)


def test_an_unknown_format_is_refused_by_its_number() -> None:
    content = json.loads(a_run(3).state.snapshot())
    content["format"] = 99
    with pytest.raises(ValueError, match="snapshot format: got 99; this release knows 1"):
        core.restore_snapshot(json.dumps(content).encode())


def test_what_a_snapshot_holds_is_pinned_to_its_format() -> None:
    """Whoever changes the names gives the form another number: old snapshots are then ignored."""
    content = json.loads(a_run(3).state.snapshot())
    assert (_state.SNAPSHOT_FORMAT, " ".join(content)) == (
        1,
        "adjustments advice answers approved attempt begin declared digest done dropped "
        "dropped_late dropped_loss dropped_permit extras finished floor forgot forgotten "
        "format frontier greatest_attempt holder imported_from in_use is_imported key keys "
        "last_record_below_floor late log loss_progress loss_values lost_attempt lost_digest "
        "lost_seq made marks may_revise moved name observers origin origin_observers origins "
        "outcomes pending_spec permits records reporters revised_by revisions rewinds "
        "rollbacks seq token trainer_spec waivers went_on",
    )


def test_records_are_in_one_order_whenever_they_were_cut() -> None:
    blocks = [
        Block(begin, stride, 1, tuple(float(begin + step * stride) for step in range(9)), None)
        for begin, stride in ((0, 7), (1, 5), (2, 3), (21, 1), (6, 1))
    ]
    early, late = Records(), Records()
    for block in blocks[:3]:
        early.add(block)
    early = early.trim(11)
    for block in blocks[3:]:
        early.add(block)
    early = early.trim(21)
    for block in reversed(blocks):
        late.add(block)
    late = late.trim(21)
    assert list(early) == list(late)
    assert early.last_below(21) == late.last_below(21) == 20
    for at in range(21, 60):
        assert early.at(at) == late.at(at)
    for ask in (early.at, early.last_below, early.forget, lambda at: early.between(at, 30)):
        with pytest.raises(core.HistoryNeeded):
            ask(20)
