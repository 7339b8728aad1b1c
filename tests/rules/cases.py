"""One directed case for each rule of the design: the shortest run that shows it.

A case raises BrokenPromise where the rule does not hold. `test_rules.py` runs each on the code as
it is, and again with the rule broken on purpose.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from lrpilot import core
from lrpilot.core._plan import Plan, Values
from lrpilot.v1 import runs_pb2, trainer_pb2
from tests.rules.reference import Version
from tests.rules.world import FAR, REPORTER, RUN, World, make_spec, promise

Case = Callable[[], None]
CASES: dict[str, Case] = {}


def case(
    delay: int = 4, *, leads: bool = False, hands_back: bool = False, **spec: Any
) -> Callable[[Callable[[World], None]], Case]:
    """Register a case; it gets a world of its own, and the world is checked at the end.

    `leads`: attempts are opened in leader mode; `hands_back`: ranks hand back what they have.
    """

    def register(play: Callable[[World], None]) -> Case:
        def run() -> None:
            # A blocked rank of a case waits for a moment: where a rule is broken, nothing comes.
            world = World(make_spec(delay, **spec), wait_ms=500, leads=leads, hands_back=hands_back)
            try:
                play(world)
                world.check()
            finally:
                world.close()

        CASES[play.__name__] = run
        return run

    return register


def stall(world: World, begin: int, count: int) -> None:
    """Report losses of which only the first is any good."""
    world.report(*((at, 1.0, at + 1) for at in range(begin, begin + count)))


@contextmanager
def another_machine() -> Iterator[None]:
    """Let the plan come out a little different, as with another release or `cos`."""
    computed = Plan.values

    def values(plan: Plan, progress: int) -> Values:
        rates, decays = computed(plan, progress)
        return tuple(rate * (1.0 + 2.0**-50) for rate in rates), decays

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Plan, "values", values)
        yield


# One value.


@case()
def recorded_values_are_not_computed_again(world: World) -> None:
    """Neither a new release nor another machine changes what was handed out, on any stride."""
    world.open(0)
    world.ask_through(0, 4)
    with another_machine():
        for replica in (0, 1):
            world.ask(0, count=4, replica=replica)
            world.ask(0, stride=3, count=2, replica=replica)
            world.ask(2, stride=1, count=2, replica=replica)


@case()
def a_value_is_recorded_before_it_leaves(world: World) -> None:
    """What was handed out is in the log, also when the server dies right behind the answer."""
    world.open(0)
    handed = world.ask(0, count=4)
    state = core.fold(RUN, (row.payload for row in world.store.read(RUN)))
    for progress in handed or ():
        promise(state.records.at(progress) is not None, f"{progress} left without a record")


@case()
def a_lost_answer_is_given_again(world: World) -> None:
    world.open(0, fault="lost answer")
    world.ask(0, count=4, fault="lost answer")
    promise(
        world.report((0, 1.0, 1), (1, 2.0, 2), fault="lost answer") == ["REPEATED", "REPEATED"],
        "the repeat was not recognised",
    )
    world.revise(make_spec(4, peak=0.2), fault="lost answer")
    world.ask_through(5, 6)


@case()
def a_replica_that_lags_hands_out_less_and_nothing_else(world: World) -> None:
    world.open(0)
    world.ask(0, replica=1)
    stall(world, 0, 8)
    promise(world.ask(11, replica=0) is not None, "the replica that knows gave nothing")
    promise(world.ask(11, replica=1) is None, "the replica that lags gave what it cannot know")


@case()
def the_loser_of_a_race_evaluates_the_whole_request_again(world: World) -> None:
    """A loss that another replica took meanwhile is a repeat, and no loss that comes late."""
    world.open(0)
    world.ask(0, replica=1)
    stall(world, 0, 4)
    world.report((3, 1.0, 4), (4, 1.0, 5), replica=1)
    promise(world.check_log().late == {}, "a repeat came late")


@case()
def a_refusal_counts_once_the_log_was_read(world: World) -> None:
    """A replica that does not know the newest attempt yet must not send its ranks away."""
    world.open(0)
    world.ask(0, replica=1)
    world.open(0, replica=0)
    world.ask(0, replica=1)


@case()
def nothing_to_do_counts_once_the_log_was_read(world: World) -> None:
    """A replica that lags must not take a change for the state that it knows."""
    world.open(0)
    world.ask(0, replica=1)
    world.revise(make_spec(4, peak=0.2), replica=0)
    world.revise(make_spec(4), replica=1)
    stall(world, 0, 4)
    world.ask_through(0, 8)


# Exactly n + D.


@case()
def a_loss_acts_at_exactly_n_plus_d(world: World) -> None:
    world.open(0)
    stall(world, 0, 3)
    world.ask_through(0, 7)
    promise(bool(world.reference.decided().cuts), "the policy did not fire")


@case(delay=1)
def with_a_delay_of_one_every_step_is_decided_anew(world: World) -> None:
    world.open(0)
    for at in range(12):
        world.ask(at)
        world.report((at, 1.0, at + 1))
    promise(len(world.reference.decided().cuts) > 1, "the policy fired once at most")


@case()
def nothing_is_handed_out_beyond_the_horizon(world: World) -> None:
    world.open(0)
    promise(world.ask(0, count=50) is not None, "nothing came")
    promise(world.ask(4) is None, "the horizon itself is not fixed")


@case(patience=0)
def a_policy_is_mute_until_its_decision_shows(world: World) -> None:
    world.open(0)
    stall(world, 0, 9)
    world.ask_through(0, 13)


@case()
def non_finite_losses_stay_out_of_policies_and_averages(world: World) -> None:
    world.open(0)
    world.report((0, float("nan"), 1), (1, float("inf"), 2), (2, 1.0, 3), (3, float("-inf"), 4))
    state = world.check_log()
    promise(state.observers.nonfinite == 3, "they are not counted")
    promise(state.observers.smoothed_loss == 1.0, "they are in the average")
    world.ask_through(0, 8)


# Reports.


@case()
def what_is_passed_without_a_loss_is_absent(world: World) -> None:
    """Sparse reports, and increments larger than D, never stall."""
    world.open(0)
    world.report((0, 1.0, 10))
    world.report((20, 1.0, 30), (30, None, 40))
    promise(world.ask(43) is not None, "the ranks stall")


@case()
def a_late_loss_is_recorded_and_observed_by_nobody(world: World) -> None:
    world.open(0)
    world.report((0, 1.0, 1), (5, 1.0, 6))
    promise(world.report((3, 0.1, 4)) == ["LATE"], "it is not late")
    promise(world.report((3, 0.1, 4), replica=1) == ["LATE"], "it is not late again")
    stall(world, 6, 3)
    world.ask_through(6, 13)


@case()
def a_repeated_loss_is_recognised_by_its_bits(world: World) -> None:
    world.open(0)
    world.report((0, -0.0, 1), (1, float("nan"), 2))
    promise(
        world.report((0, -0.0, 1), (1, float("nan"), 2), replica=1) == ["REPEATED"] * 2,
        "the repeat was not recognised",
    )


@case()
def another_loss_for_a_reported_step_is_refused(world: World) -> None:
    world.open(0)
    world.report((0, 0.0, 1), (1, 2.0, 2))
    for other in (-0.0, 1.0, float("nan")):
        got = world.refusal(lambda other=other: world.report((0, other, 1)))  # type: ignore[misc]
        promise(got == "LossConflict", f"{other} for 0.0: {got}")
    # A batch with one refused report leaves nothing.
    got = world.refusal(lambda: world.report((2, 1.0, 3), (1, 2.5, 2)))
    promise(got == "LossConflict", got)


@case()
def one_process_reports(world: World) -> None:
    attempt = world.open(0)
    request = trainer_pb2.ReportLossesRequest(
        run=RUN,
        attempt=attempt.message,
        rank=REPORTER,
        incarnation="another process",
        reports=[trainer_pb2.LossReport(progress=0, loss=1.0, weight=1.0, moves_to=1)],
    )
    got = world.refusal(lambda: world.call(lambda one: one.trainers.report_losses(request)))
    promise(got == "NotReporter", f"a second process reports: {got}")


@case()
def a_skipped_update_gets_the_same_values_again(world: World) -> None:
    """It moves no horizon, and no policy takes its loss for one of the run."""
    world.open(0)
    handed = world.ask(0, count=4)
    for loss in (0.01, float("nan")):
        promise(world.skip(0, loss) == "RECORDED", "the skip was not recorded")
        for replica in (0, 1):
            promise(world.ask(0, count=4, replica=replica) == handed, "the values are others")
            promise(world.ask(4, replica=replica) is None, "the horizon moved")
    # Had the policy seen the small loss, it would cut a step earlier.
    stall(world, 0, 4)
    world.ask_through(0, 8)
    promise(world.check_log().observers.skipped == 2, "they are not counted")


@case()
def a_retried_skip_is_recognised(world: World) -> None:
    """By the progress and the number of skips before it there."""
    world.open(0)
    promise(world.skip(0, 1.0, fault="lost answer") == "REPEATED", "the repeat was recorded")
    promise(world.skip(0, 1.0, 0, replica=1) == "REPEATED", "another repeat was recorded")
    promise(world.skip(0, 1.0, 1) == "RECORDED", "the second skip was taken for the first")
    got = world.refusal(lambda: world.skip(0, 2.0, 0))
    promise(got == "LossConflict", f"another loss for a skip: {got}")
    stall(world, 0, 2)
    promise(world.skip(0, 1.0, 1, replica=1) == "REPEATED", "a repeat came late")
    world.open(0)
    promise(world.skip(0, 3.0) == "RECORDED", "the skip of another attempt was remembered")


@case()
def every_try_is_seen_by_the_same_policies(world: World) -> None:
    """A revision between two tries holds for the losses behind them, also in a later attempt."""
    world.open(0)
    stall(world, 0, 2)
    world.skip(2, 1.0)
    world.revise(make_spec(4, patience=5))
    stall(world, 2, 2)
    promise(len(world.reference.decided().cuts) == 1, "the case shows nothing")
    world.ask_through(0, 8)
    world.open(3)
    stall(world, 3, 8)
    world.ask_through(3, 15)


def report_as(world: World, rank: int, *losses: tuple[int, float], replica: int = 0) -> list[int]:
    """Report (progress, loss) as one of several reporters; the reference learns the mean alone."""
    request = trainer_pb2.ReportLossesRequest(
        run=RUN,
        attempt=world.current.message,
        rank=rank,
        incarnation=world.current.incarnation if rank == REPORTER else f"process {rank}",
        reports=[
            trainer_pb2.LossReport(progress=at, loss=loss, weight=1.0, moves_to=at + 1)
            for at, loss in losses
        ],
        held=world.held(world.current, rank),
    )
    answer = world.call(lambda one: one.trainers.report_losses(request), replica)
    world.reported(world.current, losses[-1][0] + 1, answer.frontier, rank)
    return list(answer.outcomes)


@case(patience=0)
def the_losses_of_several_reporters_are_summed_in_their_order(world: World) -> None:
    """Whichever comes first: 0.1 + 0.2 + 0.3 and 0.3 + 0.2 + 0.1 differ in the last bit."""
    world.open(0, reporters=(0, 1, 2))
    mean = (0.1 + 0.2 + 0.3) / 3.0
    promise(mean != (0.3 + 0.2 + 0.1) / 3.0, "the case shows nothing")
    for at, ranks in enumerate(itertools.permutations((0, 1, 2))):
        for index, rank in enumerate(ranks):
            promise(world.check_log().frontier == at, "a step is final without all")
            report_as(world, rank, (at, 0.1 * (1 + rank) if rank < 2 else 0.3), replica=index % 2)
        world.reference.report(at, mean, at + 1)
        world.check_log()
    world.ask_through(0, 10)


@case()
def a_quorum_lists_those_that_counted(world: World) -> None:
    """Blocked ranks get on with the reporters that were there; who comes later is late."""
    world.open(0, reporters=(0, 1, 2))
    report_as(world, 2, (0, 0.5), (1, 0.5))
    report_as(world, 0, (0, 0.25), replica=1)
    world.reference.losses[0] = (0.25 + 0.5) / 2.0
    # Of the next step one reporter of three was there: not enough.
    world.reference.late[1] = 0.5
    world.ask(4, blocked=True)
    events = [core.decode(row.payload) for row in world.store.read(RUN)]
    counted = [event.counted for event in events if isinstance(event, core.Waived)]
    promise(counted == [((0, (0, 2)),)], f"counted: {counted}")
    late = trainer_pb2.REPORT_OUTCOME_LATE
    promise(report_as(world, 1, (0, 9.0)) == [late], "it counts after all")
    world.reference.late[0] = 9.0


# Waiting.


@case()
def blocked_ranks_get_on_though_nobody_reports(world: World) -> None:
    world.open(0)
    world.ask(4, blocked=True)
    world.ask(5, blocked=True, replica=1)
    world.ask(100, stride=40, blocked=True)


@case()
def only_blocked_time_counts(world: World) -> None:
    """Evaluation, checkpoint and compile pauses cause no waiver."""
    attempt = world.open(0)
    request = trainer_pb2.GetValuesRequest(
        run=RUN, attempt=attempt.message, begin=4, stride=1, count=1, wait_ms=50
    )
    data = world.call(lambda one: one.trainers.get_values(request))
    promise(not trainer_pb2.GetValuesResponse.FromString(data).HasField("block"), "fixed already")
    promise(world.check_log().waivers == 0, "a pause was waived")


@case()
def a_replica_that_lags_reads_before_it_waives(world: World) -> None:
    world.open(0)
    world.ask(0, replica=1)
    stall(world, 0, 8)
    world.ask(11, replica=1, blocked=True)
    promise(world.check_log().waivers == 0, "it waived losses that were there")


@case()
def a_waiver_keeps_what_was_received(world: World) -> None:
    world.open(0)
    world.report((0, 1.0, 1), (1, 1.0, 2))
    world.ask(6, blocked=True)
    promise(world.report((2, 0.5, 3)) == ["LATE"], "a waived loss was let in")
    world.ask_through(0, 10)


@case()
def a_request_far_beyond_the_horizon_is_refused(world: World) -> None:
    world.open(0)
    promise(world.ask(4 + FAR - 1) is None, "the last of a block beyond is not waited for")
    got = world.refusal(lambda: world.ask(4 + FAR))
    promise(got == "BeyondHorizon", f"far beyond the horizon: {got}")


# Attempts.


@case()
def a_superseded_attempt_is_refused(world: World) -> None:
    old = world.open(0)
    world.ask_through(0, 2)
    world.open(0)
    got = world.refusal(lambda: world.ask(0, attempt=old))
    promise(got == "AttemptSuperseded", f"a zombie asks: {got}")
    got = world.refusal(lambda: world.report((0, 9.0, 1), attempt=old))
    promise(got == "AttemptSuperseded", f"a zombie reports: {got}")


@case()
def a_resume_forgets_later_losses_and_what_they_decided(world: World) -> None:
    world.open(0)
    stall(world, 0, 10)
    world.ask_through(0, 14)
    world.open(1)
    promise(world.ask(1, count=4) is not None, "values below the horizon did not come")
    world.report(*((at, 1.0 / (at + 1), at + 1) for at in range(1, 12)))
    world.ask_through(1, 16)


@case()
def a_resume_inherits_the_records_below_its_horizon_alone(world: World) -> None:
    """What the old attempt recorded behind n0 + D came of losses that are forgotten."""
    world.open(0)
    stall(world, 0, 10)
    world.ask_through(0, 14)
    world.open(2)
    world.report(*((at, 1.0 / (at + 1), at + 1) for at in range(2, 12)))
    world.ask_through(5, 14)


@case()
def a_resume_repeats_the_bits_of_another_machine(world: World) -> None:
    world.open(0)
    stall(world, 0, 6)
    world.ask_through(0, 10)
    world.open(3)
    with another_machine():
        world.ask(3, count=4)


@case()
def a_resume_makes_missing_losses_absent(world: World) -> None:
    world.open(0)
    stall(world, 0, 3)
    world.open(6)
    promise(world.ask(9) is not None, "the ranks wait for losses that never come")
    got = world.refusal(lambda: world.report((5, 1.0, 6)))
    promise(got == "BelowResumePoint", f"a loss below the resume point: {got}")


@case()
def a_resume_forgets_waivers(world: World) -> None:
    world.open(0)
    world.ask(4, blocked=True)
    world.open(0)
    promise(world.report((0, 1.0, 1)) == ["RECORDED"], "the loss came late")
    stall(world, 1, 4)
    world.ask_through(0, 9)


@case()
def a_resume_keeps_what_operators_changed(world: World) -> None:
    world.open(0)
    stall(world, 0, 4)
    world.revise(make_spec(4, peak=0.2))
    world.open(2)
    stall(world, 2, 6)
    world.ask_through(2, 12)


@case()
def a_run_with_losses_needs_a_resume_point(world: World) -> None:
    world.open(0)
    stall(world, 0, 1)
    got = world.refusal(lambda: world.open(None))
    promise(got == "ResumePointRequired", f"neither state nor progress: {got}")


@case()
def ranks_join_by_their_key_alone(world: World) -> None:
    def ask_to_open(key: str, at: int, rank: int, incarnation: str) -> Any:
        request = trainer_pb2.OpenAttemptRequest(
            run=RUN,
            request_id=world.next_id(),
            key=key,
            progress=at,
            rank=rank,
            reporter=REPORTER,
            incarnation=incarnation,
        )
        return world.call(lambda one: one.trainers.open_attempt(request))

    first = world.open(0, key="start 1")
    joined = ask_to_open("start 1", 0, 1, "process 1")
    promise(joined.joined and joined.attempt.token == first.token, "rank 1 did not join")
    got = world.refusal(lambda: ask_to_open("start 1", 3, 2, "process 2"))
    promise(got == "JoinRefused", f"a join at another progress: {got}")
    got = world.refusal(lambda: ask_to_open("start 1", 0, REPORTER, "a second reporter"))
    promise(got == "JoinRefused", f"a second incarnation of the reporter: {got}")
    world.open(0, key="start 2")
    got = world.refusal(lambda: ask_to_open("start 1", 0, 1, "process 1"))
    promise(got == "AttemptSuperseded", f"a join of the old attempt: {got}")


# Operators.


@case()
def a_change_lands_at_the_horizon(world: World) -> None:
    world.open(0)
    stall(world, 0, 2)
    world.ask_through(0, 3)
    world.revise(make_spec(4, peak=0.2))
    world.ask_through(0, 6, replica=1)
    stall(world, 2, 3)
    world.ask_through(4, 9)


@case()
def an_operators_change_survives_a_resume_below_it(world: World) -> None:
    world.open(0)
    stall(world, 0, 2)
    for action, amount in (("multiply", 0.7), ("scale weight decay", 0.5), ("hold", 0.0)):
        world.adjust(action, amount)
    world.open(1)
    stall(world, 1, 9)
    world.ask_through(1, 14)


@case()
def a_repeated_change_gets_its_first_answer(world: World) -> None:
    """It is made once, however often an answer is lost, also where it was taken back since."""
    world.open(0)
    stall(world, 0, 2)
    world.adjust("multiply", 0.7, fault="lost answer")
    world.adjust("set", 0.05, replica=1, fault="lost answer")
    stall(world, 2, 2)
    world.adjust("undo", target=world.reference.made[0].name)
    world.open(1)
    for done in world.done:
        for replica in (0, 1):
            world.repeat(done, replica=replica)
    stall(world, 1, 9)
    world.ask_through(1, 14)


@case()
def policies_apply_before_operators(world: World) -> None:
    """Where both take effect at the same progress, and the operator came first."""
    world.open(0)
    stall(world, 0, 2)
    world.adjust("set", 0.03)
    stall(world, 2, 2)
    (cut,) = world.reference.decided().cuts
    promise(cut.effective == world.reference.made[0].effective, "the case shows nothing")
    rate = (world.ask(6, replica=1) or {})[6][0]
    promise(rate == (0.03).hex(), f"the LR was set to 0.03 and is {float.fromhex(rate)}")
    world.ask_through(0, 8)


@case()
def the_same_losses_give_the_same_values_after_a_resume(world: World) -> None:
    """Also where an operator changed the plan meanwhile."""
    world.open(0)
    stall(world, 0, 4)
    world.adjust("multiply", 0.7)
    world.adjust("set", 0.03)
    world.report(*((at, 1.0, at + 1) for at in range(4, 12)))
    world.ask_through(0, 16)
    world.open(2)
    world.report(*((at, 1.0, at + 1) for at in range(2, 12)))
    world.ask_through(2, 16, replica=1)
    for at in range(2, 16):
        promise(world.handed[1, at] == world.handed[2, at], f"another value at {at}")


@case()
def an_undo_lands_at_the_horizon_and_leaves_the_past(world: World) -> None:
    world.open(0)
    world.adjust("multiply", 0.7)
    stall(world, 0, 6)
    (cut,) = world.reference.decided().cuts
    targets = (cut.name, world.reference.made[0].name)
    for target in targets:
        promise(world.adjust("undo", target=target), "nothing was taken back")
    stall(world, 6, 4)
    world.ask_through(0, 14)
    for target in targets:
        promise(not world.adjust("undo", target=target, replica=1), "it was taken back twice")
    # The same decision on the same loss is taken back in every attempt.
    world.open(1)
    stall(world, 1, 9)
    world.ask_through(1, 14)


@case()
def a_hold_freezes_what_was_there_until_its_release(world: World) -> None:
    """LR and WD of every group; policies observe nothing meanwhile."""
    world.open(0)
    stall(world, 0, 2)
    world.adjust("hold", fault="lost answer")
    promise(not world.adjust("hold", replica=1), "it is held twice")
    stall(world, 2, 12)
    world.adjust("release")
    promise(not world.adjust("release", replica=1), "it was released twice")
    stall(world, 14, 8)
    world.ask_through(0, 26)
    promise(world.handed[1, 6] == world.handed[1, 17], "the values moved")
    promise(world.handed[1, 6] != world.handed[1, 18], "the values are held still")


@case()
def what_is_shown_is_what_is_done(world: World) -> None:
    """A dry run changes nothing, and tells what the change does then."""
    world.open(0)
    stall(world, 0, 3)
    world.adjust("multiply", 0.7)
    world.adjust("undo", target=world.reference.made[0].name, dry=True)
    world.adjust("hold", dry=True)
    stall(world, 3, 3)
    world.ask_through(0, 10)


def change_seen(world: World, etag: str, replica: int) -> None:
    """Scale the LR of the plan that somebody saw."""
    request = runs_pb2.AdjustRunRequest(
        run=RUN,
        scale_lr=0.7,
        reason="why",
        author="somebody",
        etag=etag,
        request_id=world.next_id(),
    )
    world.call(lambda one: one.people.adjust_run(request), replica)
    world.reference.adjust("multiply", 0.7)


@case()
def a_change_of_a_plan_that_has_changed_is_refused(world: World) -> None:
    world.open(0)
    world.ask(0, replica=1)
    request = runs_pb2.GetRunRequest(run=RUN)
    seen = world.call(lambda one: one.people.get_run(request)).run.etag
    stall(world, 0, 3)
    now = world.call(lambda one: one.people.get_run(request)).run.etag
    got = world.refusal(lambda: change_seen(world, seen, 0))
    promise(got == "PlanChanged", f"a policy has cut since: {got}")
    # The replica that lags knows the older plan, and reads on before it refuses.
    change_seen(world, now, 1)
    got = world.refusal(lambda: change_seen(world, now, 1))
    promise(got == "PlanChanged", f"somebody else was faster: {got}")
    stall(world, 3, 2)
    world.ask_through(0, 9)


ADVISED: dict[str, Any] = {
    "policies": [
        {"kind": "plateau", "patience": 500},
        {"kind": "plateau", "patience": 1, "factor": 0.7, "mode": "advise"},
    ],
    "feedback": {"delay": 4, "timeout": "1ms", "advice_expires": 6},
}


@case(**ADVISED)
def an_approved_advice_outlives_the_losses_that_led_to_it(world: World) -> None:
    world.open(0)
    stall(world, 0, 4)
    (advice,) = world.check_log().advice
    world.approve(advice, fault="lost answer")
    world.open(1)
    world.report(*((at, 1.0 / (at + 1), at + 1) for at in range(1, 10)))
    promise(world.check_log().advice == [], "the advice is not forgotten")
    for replica in (0, 1):
        world.repeat(world.done[0], replica=replica)
    world.ask_through(1, 14)


@case(**ADVISED)
def advice_expires_in_progress(world: World) -> None:
    """Once the horizon is `advice_expires` behind where it would have shown; never by clock."""
    world.open(0)
    stall(world, 0, 3)
    (first,) = world.check_log().advice
    promise(first.expires == 12, f"expires at {first.expires}")
    world.report((7, 1.0, 8))
    got = world.refusal(lambda: world.approve(first))
    promise(got == "AdviceExpired", f"expired advice: {got}")
    world.open(3)
    world.report((6, 1.0, 7))
    world.approve(first, replica=1)
    got = world.refusal(lambda: world.approve(first))
    promise(got == "AdviceExpired", f"approved advice: {got}")
    world.ask_through(3, 11)


# Directives.


@case()
def a_directive_is_met_at_one_progress(world: World) -> None:
    """By every rank, on whatever stride, whichever replica answers it."""
    world.open(0)
    world.ask_through(0, 4, replica=1)
    world.ask_ranks("evaluate", replica=0)
    for replica in (1, 0):
        world.ask(0, count=4, replica=replica)
    stall(world, 0, 3)
    world.ask_ranks("stop", fault="lost answer")
    # The rank that strides over it meets it where it is next.
    world.ask(3, stride=3, count=2, replica=1)
    world.ask(6, stride=3, replica=1)
    stall(world, 3, 6)
    world.ask(6, stride=3, count=3, replica=1)
    world.ask_through(0, 13)
    world.open(6)
    world.ask(6, count=4, replica=1)
    promise({at for _, at in world.met.values()} == {4, 7}, f"met: {world.met}")


@case()
def a_rollback_opens_with_its_cut_and_inherits_no_values(world: World) -> None:
    """The cut survives the rewind, and every later resume."""
    world.open(0)
    stall(world, 0, 6)
    world.ask_through(0, 10)
    asked = world.ask_ranks("rollback", before=5, factor=0.5)
    world.open(2, directive=asked, fault="lost answer")
    promise(world.ask(2, count=4) is not None, "values below the horizon did not come")
    promise(world.handed[1, 3] != world.handed[2, 3], "the values are those from before")
    world.report(*((at, 1.0 / (at + 1), at + 1) for at in range(2, 8)))
    for begin in (4, 1):
        world.open(begin)
        world.report(*((at, 1.0 / (at + 1), at + 1) for at in range(begin, 8)))
        world.ask_through(begin, 12)


@case()
def a_second_rollback_cuts_deeper(world: World) -> None:
    world.open(0)
    for begin, factor in ((3, 0.5), (3, 0.9), (2, 0.9)):
        stall(world, world.reference.frontier, 4)
        asked = world.ask_ranks("rollback", before=3, factor=factor)
        world.open(begin, directive=asked)
        world.ask_through(begin, begin + 4)
    (cut,) = world.reference.made
    promise(cut.amount == 0.9 * (0.9 * 0.5), "the case shows nothing")


@case()
def a_rollback_is_carried_out_once(world: World) -> None:
    """A job that passes by once more, restarted, does not meet it again."""
    world.open(0)
    stall(world, 0, 6)
    asked = world.ask_ranks("rollback", before=5, factor=0.5)
    world.open(2, directive=asked)
    stall(world, 2, 9)
    world.ask_through(2, 15)
    promise(world.met == {}, f"met again: {world.met}")


@case()
def a_superseded_job_takes_no_run_back(world: World) -> None:
    """The rollback that it met is refused once another start of the job has opened an attempt."""
    world.open(0)
    stall(world, 0, 6)
    asked = world.ask_ranks("rollback", before=5, factor=0.5)
    old = world.current
    world.open(6)
    request = trainer_pb2.OpenAttemptRequest(
        run=RUN,
        request_id=world.next_id(),
        progress=2,
        incarnation="process of attempt 1",
        directive=world.id_of(asked.name),
        met_in=old.message,
    )
    got = world.refusal(lambda: world.call(lambda one: one.trainers.open_attempt(request), 1))
    promise(got == "AttemptSuperseded", f"a zombie takes the run back: {got}")


# Leader mode.


@case(leads=True)
def only_the_holder_gets_values(world: World) -> None:
    attempt = world.open(0)
    world.ask(0, count=4)
    world.offer()
    other = replace(attempt, holder=b"another")
    for name, call in (
        ("asks", lambda: world.ask(0, attempt=replace(attempt, holder=b""))),
        ("asks in another's name", lambda: world.ask(0, attempt=other)),
    ):
        got = world.refusal(call)
        promise(got == "NotHolder", f"a rank {name}: {got}")
    world.attempts[-1] = other
    got = world.refusal(world.offer)
    promise(got == "NotHolder", f"another rank is offered values: {got}")
    got = world.refusal(lambda: world.go_alone(1))
    promise(got == "NotHolder", f"another rank declares: {got}")
    world.attempts[-1] = attempt


@case(leads=True)
def a_declaration_is_a_fact(world: World) -> None:
    """What was used alone is what the run has there, on every server, for good."""
    world.open(0)
    world.ask_through(0, 4)
    with another_machine():
        world.reference_is_off = True
        offer = world.offer()
        world.reference_is_off = False
    world.go_alone(9, offer=offer)
    world.restart(0)
    for replica in (0, 1):
        world.ask(4, count=9, replica=replica)
        world.ask(5, stride=3, count=2, replica=replica)
    stall(world, 9, 9)
    world.ask_through(13, 22)
    # A later attempt begins with it.
    world.open(10)
    world.ask_through(10, 14)


@case(leads=True)
def losses_that_would_have_acted_on_declared_steps_are_waived(world: World) -> None:
    """Whether they came before the declaration or after it."""
    world.open(0)
    world.ask_through(0, 4)
    world.offer()
    world.go_alone(8, reported=lambda: stall(world, 0, 5))
    promise(world.check_log().late.keys() == {(at, 0) for at in range(5)}, "they were not waived")
    promise(world.report((6, 1.0, 7), (7, 1.0, 8)) == ["LATE", "LATE"], "one acts after all")
    stall(world, 8, 6)
    world.ask_through(12, 18)
    promise(bool(world.reference.decided().cuts), "the case shows nothing")


@case(leads=True)
def losses_that_act_on_other_steps_are_not_waived(world: World) -> None:
    world.open(0)
    world.ask_through(0, 4)
    stall(world, 0, 3)
    # The decision on the loss at 2 shows at 6: in the offer, and before the job is alone.
    world.ask_through(4, 7)
    promise(len(world.reference.decided().cuts) == 1, "the case shows nothing")
    world.offer()
    world.go_alone(3, reported=lambda: stall(world, 3, 9))
    world.ask_through(10, 16)
    promise(len(world.reference.decided().cuts) > 1, "what acts behind it does nothing")


@case(leads=True)
def what_operators_changed_meanwhile_takes_effect_after_it(world: World) -> None:
    world.open(0)
    world.ask_through(0, 4)
    world.offer()

    def meanwhile() -> None:
        world.adjust("multiply", 0.5)
        world.report((0, 1.0, 1), (1, 0.9, 2))
        world.revise(make_spec(4, peak=0.2), replica=1)
        world.adjust("hold")
        world.ask_ranks("evaluate", replica=1)

    world.go_alone(7, reported=meanwhile)
    promise(world.check_log().plan.revisions[-1].effective == 11, "the new spec came before")
    world.report(*((at, 1.0 / at, at + 1) for at in range(7, 12)))
    world.ask_through(11, 16)
    world.repeat(world.done[0])


@case(leads=True)
def what_was_offered_is_not_taken_back(world: World) -> None:
    """Neither what an operator nor what a policy changed before the offer, though no answer had
    brought it: the values that were used have it."""
    world.open(0)
    world.ask_through(0, 3)
    world.adjust("multiply", 0.5)
    stall(world, 0, 3)
    world.adjust("set", 0.01)
    world.offer()
    world.go_alone(20)
    promise(len(world.reference.decided().cuts) == 1, "the policy's is forgotten")
    stall(world, 19, 3)
    world.ask_through(23, 26)


@case(leads=True)
def a_job_goes_on_alone_only_as_far_as_the_log_permits(world: World) -> None:
    world.open(0)
    offer = world.offer(count=6)
    further = dict(world.offer(count=9).values)
    world.lose_the_store(world.save(0))
    world.offer(count=6)
    got = world.refusal(lambda: world.declare(further, offer))
    promise(got == "BeyondPermit", f"values beyond the permit: {got}")


@case(leads=True)
def a_repeated_declaration_is_recognised(world: World) -> None:
    """By its bits; other values for the same steps are refused."""
    world.open(0)
    world.ask_through(0, 4)
    offer = world.offer()
    world.adjust("multiply", 0.5)
    world.go_alone(5, fault="lost answer")
    stall(world, 5, 2)
    head = world.store.head(RUN)
    used = {at: offer.values[at] for at in range(4, 9)}
    world.declare(used, offer, replica=1)
    promise(world.store.head(RUN) == head, "a repeat was recorded")
    other = {**used, 6: used[5]}
    got = world.refusal(lambda: world.declare(other, offer))
    promise(got == "ValuesConflict", f"other values for what was declared: {got}")


@case(leads=True)
def a_holder_is_answered_from_the_whole_log(world: World) -> None:
    """A server that lags has recorded what a declaration dropped."""
    attempt = world.open(0)
    world.ask_through(0, 4)
    world.offer()
    stall(world, 0, 6)
    request = trainer_pb2.GetValuesRequest(
        run=RUN, attempt=attempt.message, holder=attempt.holder, begin=4, stride=1, count=8
    )
    # Its answer does not arrive.
    world.call(lambda one: one.trainers.get_values(request), replica=1)
    world.adjust("multiply", 0.5)
    stall(world, 6, 3)
    world.go_alone(3)
    world.ask_through(7, 13, replica=1)
    promise(bool(world.reference.decided().cuts), "the case shows nothing")


@case(leads=True)
def nothing_is_waived_in_leader_mode(world: World) -> None:
    """The job goes on alone, and a declaration says what was not waited for."""
    world.open(0)
    world.ask_through(0, 4)
    request = trainer_pb2.GetValuesRequest(
        run=RUN,
        attempt=world.current.message,
        holder=world.current.holder,
        begin=4,
        stride=1,
        count=1,
        blocked=True,
        wait_ms=50,
    )
    data = world.call(lambda one: one.trainers.get_values(request))
    promise(not trainer_pb2.GetValuesResponse.FromString(data).HasField("block"), "it came")
    promise(world.check_log().waivers == 0, "a loss was waived")


@case(leads=True)
def a_checkpoint_from_before_a_declaration_brings_its_own_past(world: World) -> None:
    """The losses that it has seen count in it, though the log has waived them since."""
    world.open(0)
    world.ask_through(0, 4)
    offer = world.offer()
    stall(world, 0, 3)
    state = world.save(3)
    world.go_alone(9, offer=offer)
    after = world.save(8)
    world.open(state=state)
    promise(bool(world.reference.decided().cuts), "the case shows nothing")
    stall(world, 3, 6)
    world.ask_through(3, 13)
    world.open(state=after)
    world.ask_through(8, 12)


# Stages.


def staged(ends: dict[str, Any]) -> dict[str, Any]:
    """Fields of a spec of two stages, the first of which ends as told."""
    first = {"peak": 0.1, "warmup": 7, "decay": {"style": "cosine", "end": 100}}
    return {
        "learning_rate": None,
        "weight_decay": 0.01,
        "groups": [{"name": "all"}, {"name": "small", "weight_decay_multiplier": 0.5}],
        "policies": [],
        "stages": [
            {"name": "one", **ends, "learning_rate": first},
            {"name": "two", "learning_rate": {**first, "peak": 0.05}},
        ],
    }


WHEN: dict[str, Any] = staged({"when": {"below": {"value": 0.5}}, "latest": 30})


def ends_at(world: World, until: int) -> None:
    """Tell the reference where the first stage ends."""
    spec = make_spec(world.delay, **staged({"until": until}))
    world.reference.versions = [Version(0, 0, spec)]


@case(**WHEN)
def a_stage_ends_on_the_loss_at_exactly_n_plus_d(world: World) -> None:
    """On both replicas; an LR that an operator scaled in the first stage is not in the second."""
    world.open(0)
    ends_at(world, 30)
    world.adjust("multiply", 0.7)
    world.report(*((at, 1.0, at + 1) for at in range(8)))
    world.ask_through(0, 12, replica=1)
    world.report((8, 0.5, 9), replica=1)
    ends_at(world, 12)
    world.ask_through(0, 13, replica=1)
    world.report(*((at, 0.1, at + 1) for at in range(9, 14)))
    world.ask_through(0, 18)


@case(**WHEN)
def a_resume_forgets_that_a_stage_ended(world: World) -> None:
    world.open(0)
    ends_at(world, 12)
    world.report(*((at, 1.0, at + 1) for at in range(8)), (8, 0.5, 9), (9, 0.5, 10))
    world.ask_through(0, 14)
    world.open(6)
    ends_at(world, 30)
    world.report(*((at, 1.0, at + 1) for at in range(6, 20)))
    world.ask_through(6, 24, replica=1)
    # And where the resume lies behind the loss, it remembers.
    world.report((20, 0.5, 21), (21, 1.0, 22))
    ends_at(world, 24)
    world.open(21)
    world.report(*((at, 1.0, at + 1) for at in range(21, 26)))
    world.ask_through(21, 30)


@case()
def what_only_a_new_attempt_may_change_is_refused(world: World) -> None:
    world.open(0)
    changes: list[dict[str, Any]] = [
        {"unit": "samples"},
        {"groups": [{"name": "all"}]},
        {"feedback": {"delay": 5}},
        {"policies": []},
        {"weight_decay": None},
    ]
    for change in changes:
        spec = {**make_spec(4), **change}
        got = world.refusal(lambda spec=spec: world.revise(spec))  # type: ignore[misc]
        promise(got == "RevisionRefused", f"{change}: {got}")
    world.ask_through(0, 4)


# Saved states.


@case()
def a_lost_run_is_restored_from_a_checkpoint(world: World) -> None:
    world.open(0)
    stall(world, 0, 9)
    world.ask_through(0, 13)
    state = world.save(7)
    old = world.current
    world.lose_the_store(state)
    world.ask_through(7, 11)
    got = world.refusal(lambda: world.ask(7, attempt=old))
    promise(got == "AttemptSuperseded", f"a rank of the lost attempt: {got}")
    stall(world, 7, 8)
    world.ask_through(7, 19)
    got = world.refusal(lambda: world.open(3))
    promise(got == "StateMismatch", f"a resume behind what is known: {got}")


@case()
def a_checkpoint_holds_all_that_was_acknowledged(world: World) -> None:
    """Also what another replica acknowledged."""
    world.open(0)
    world.ask(0, replica=1)
    stall(world, 0, 2)
    world.revise(make_spec(4, peak=0.2))
    world.lose_the_store(world.save(2, replica=1))
    stall(world, 2, 3)
    world.ask_through(2, 9)


@case()
def a_lost_run_keeps_the_order_of_what_operators_did(world: World) -> None:
    """What is held is that which was there before a revision that lands at the same progress."""
    world.open(0)
    stall(world, 0, 2)
    world.adjust("hold")
    world.revise(make_spec(4, peak=0.2))
    world.adjust("set", 0.03)
    stall(world, 2, 2)
    world.lose_the_store(world.save(3))
    stall(world, 3, 3)
    world.adjust("undo", target=world.reference.made[1].name)
    state = world.save(4)
    world.ask_through(3, 10)
    world.lose_the_store(state)
    stall(world, 4, 8)
    world.ask_through(4, 16)


@case()
def what_was_taken_back_in_a_lost_run_lends_nobody_its_name(world: World) -> None:
    """A rollback's cut that is taken back and replaced, and a change with the number it had."""
    world.open(0)
    stall(world, 0, 3)
    world.open(2, directive=world.ask_ranks("rollback", before=2, factor=0.5))
    (cut,) = world.reference.made
    name = world.id_of(cut.name)
    world.adjust("undo", target=cut.name)
    stall(world, 2, 2)
    world.open(1, directive=world.ask_ranks("rollback", before=2, factor=0.5))
    world.lose_the_store(world.save(1))
    stall(world, 1, 1)
    names = []
    for _ in range(4):
        world.adjust("multiply", 0.7)
        names.append(world.id_of(world.reference.made[-1].name))
    promise(name in names, f"the case shows nothing: {name} is none of {names}")
    stall(world, 2, 5)
    world.ask_through(1, 11)


@case()
def a_checkpoint_brings_its_own_past(world: World) -> None:
    """Two branches from one checkpoint; the second start from the first branch's end."""
    world.open(0)
    stall(world, 0, 8)
    end = world.save(8)
    world.open(2)
    world.report(*((at, 1.0 / (at + 1), at + 1) for at in range(2, 6)))
    world.open(state=end)
    world.ask_through(8, 12)
    stall(world, 8, 6)
    world.ask_through(8, 18)


@case()
def a_state_of_another_log_is_refused(world: World) -> None:
    world.open(0)
    stall(world, 0, 3)
    first = world.save(3)
    stall(world, 3, 3)
    second = world.save(6)
    world.lose_the_store(first)
    stall(world, 3, 6)
    got = world.refusal(lambda: world.open(state=second))
    promise(got == "StateMismatch", f"a state of a lost branch: {got}")


@case()
def an_import_ends_the_attempts_of_the_log(world: World) -> None:
    """They may go on where the log came from; a new one goes on here as it would have there."""
    world.open(0, key="job")
    stall(world, 0, 6)
    world.ask_through(0, 10)
    state = world.save(3)
    old = world.current
    world.move()
    for replica in (0, 1):
        for call in (
            lambda: world.ask(3, attempt=old, replica=replica),  # noqa: B023
            lambda: world.report((6, 1.0, 7), attempt=old, replica=replica),  # noqa: B023
            lambda: world.open(0, key="job", replica=replica),  # noqa: B023
        ):
            got = world.refusal(call)
            promise(got == "AttemptSuperseded", f"a rank of an attempt from elsewhere: {got}")
    world.open(state=state)
    world.ask_through(3, 7)
    stall(world, 3, 12)
    world.ask_through(3, 19)


# A database that was put back from an older copy.


@case(hands_back=True)
def values_that_the_log_forgot_end_the_attempt(world: World) -> None:
    """On every server, for every request, until the next attempt; also where nobody asks again."""
    world.open(0)
    stall(world, 0, 3)
    copy = world.back_up()
    world.ask_through(0, 7)
    world.put_back(copy)
    forgotten(world, lambda: world.ask(7))
    # From here on the log knows: no rank needs to show what it holds.
    world.holds.clear()
    for replica in (0, 1):
        forgotten(world, lambda at=replica: world.ask(0, replica=at))  # type: ignore[misc]
        forgotten(world, lambda at=replica: world.report((3, 1.0, 4), replica=at))  # type: ignore[misc]
        forgotten(world, lambda at=replica: world.save(1, replica=at))  # type: ignore[misc]
    world.open(2)
    stall(world, 2, 3)
    world.ask_through(2, 9)


@case(hands_back=True)
def other_values_than_the_log_has_end_the_attempt(world: World) -> None:
    """What ranks without anything to show were given meanwhile, on another machine."""
    world.open(0)
    copy = world.back_up()
    world.ask_through(0, 4)
    held, world.holds = world.holds, {}
    world.put_back(copy)
    world.reference_is_off = True
    with another_machine():
        world.ask_anew(0, 4)
    world.holds = held
    forgotten(world, lambda: world.ask(3))
    world.reference_is_off = False


@case(hands_back=True)
def losses_that_the_log_forgot_end_the_attempt(world: World) -> None:
    world.open(0)
    stall(world, 0, 3)
    copy = world.back_up()
    stall(world, 3, 1)
    world.put_back(copy)
    forgotten(world, lambda: world.report((4, 1.0, 5)))
    promise(world.check_log().frontier == 3, "a loss behind the gap was taken")


@case(hands_back=True)
def an_attempt_that_the_log_forgot_is_told_so(world: World) -> None:
    """And the next one has a number of its own. A run made anew has forgotten nothing."""
    world.open(0)
    stall(world, 0, 3)
    copy = world.back_up()
    lost = world.open(2)
    world.put_back(copy)
    forgotten(world, lambda: world.ask(2, attempt=lost))
    world.reference.attempt = lost.number
    world.open(2)
    world.ask_through(2, 6)
    state, last = world.save(2), world.open(2)
    world.lose_the_store(state)
    got = world.refusal(lambda: world.ask(2, attempt=replace(last, number=99)))
    promise(got == "AttemptSuperseded", f"a rank of a run that was deleted: {got}")


@case(hands_back=True)
def a_rank_of_another_attempt_ends_none(world: World) -> None:
    """The job that started after the log was put back, or imported, goes on on every server."""
    world.open(0)
    stall(world, 0, 3)
    copy = world.back_up()
    world.open(2)
    lost = world.open(2)
    world.put_back(copy)
    world.open(1)
    forgotten(world, lambda: world.ask(2, attempt=lost))
    stall(world, 1, 3)
    for replica in (0, 1):
        world.ask(1, replica=replica)
        forgotten(world, lambda at=replica: world.ask(2, attempt=lost, replica=at))  # type: ignore[misc]
    world.reference.attempt = lost.number
    world.move()
    world.open(2)
    elsewhere = replace(lost, number=lost.number + 2)
    got = world.refusal(lambda: world.ask(2, attempt=elsewhere))
    promise(got == "AttemptSuperseded", f"a rank from where the log came from: {got}")
    stall(world, 2, 3)
    world.ask_through(2, 8)


@case(hands_back=True)
def losses_of_one_reporter_that_the_log_forgot_end_the_attempt(world: World) -> None:
    """Though they were not final, since another reporter was behind."""
    world.open(0, reporters=(0, 1))
    report_as(world, 0, (0, 1.0), (1, 1.0))
    report_as(world, 1, (0, 1.0))
    world.reference.report(0, 1.0, 1)
    copy = world.back_up()
    report_as(world, 0, (2, 1.0))
    world.put_back(copy)
    forgotten(world, lambda: report_as(world, 0, (3, 1.0)))


@case(hands_back=True)
def a_replica_that_lags_accuses_nobody(world: World) -> None:
    world.open(0)
    world.ask(0, replica=1)
    stall(world, 0, 3)
    world.ask_through(0, 7)
    world.ask(6, replica=1)
    world.report((3, 1.0, 4), replica=1)


@case(hands_back=True)
def a_copy_that_holds_all_goes_on(world: World) -> None:
    world.open(0)
    stall(world, 0, 3)
    world.ask_through(0, 7)
    world.put_back(world.back_up())
    stall(world, 3, 3)
    world.ask_through(0, 10)


@case(leads=True, hands_back=True)
def a_permit_that_the_log_forgot_ends_the_attempt(world: World) -> None:
    world.open(0)
    world.ask_through(0, 4)
    copy = world.back_up()
    offer = world.offer()
    world.put_back(copy)
    forgotten(world, lambda: world.go_alone(3, offer=offer))


@case(hands_back=True)
def a_newer_checkpoint_brings_back_what_the_log_forgot(world: World) -> None:
    """As the lost log would have resumed there: what both know is there once, with its answer."""
    world.open(0)
    stall(world, 0, 2)
    world.adjust("multiply", 0.7)
    world.revise(make_spec(4, peak=0.2))
    first = world.done[0]
    copy = world.back_up()
    stall(world, 2, 2)
    world.adjust("multiply", 0.9)
    world.revise(make_spec(4, peak=0.15))
    stall(world, 4, 5)
    world.ask_through(0, 13)
    state, lost = world.save(7), world.back_up()
    world.put_back(copy)
    forgotten(world, lambda: world.ask(12))
    world.adopt(state, lost)
    world.repeat(first)
    world.ask_through(7, 11)
    stall(world, 7, 6)
    world.ask_through(7, 17)
    # And from another one, which is newer still.
    world.adopt(state, lost)
    world.ask_through(7, 11)
    world.adjust("undo", target=lost.reference.made[0].name)
    stall(world, 7, 6)
    world.ask_through(7, 17)


@case(hands_back=True)
def what_operators_did_since_a_copy_was_put_back_stays(world: World) -> None:
    world.open(0)
    stall(world, 0, 2)
    copy = world.back_up()
    stall(world, 2, 4)
    state, lost = world.save(5), world.back_up()
    world.put_back(copy)
    world.adjust("multiply", 0.7)
    made = world.reference.made
    forgotten(world, lambda: world.ask(5))
    world.adopt(state, lost, made)
    world.repeat(world.done[0])
    stall(world, 5, 4)
    world.ask_through(5, 13)


def forgotten(world: World, call: Callable[[], object]) -> None:
    """Hold that a call is refused, since the log has forgotten what ranks hold."""
    got = world.refusal(call)
    promise(got == "LogForgotten", f"a log that has forgotten says {got}")


# The log.


@case()
def a_seq_is_given_out_once(world: World) -> None:
    world.open(0)
    world.ask(0, replica=1)
    world.report((0, 1.0, 1), replica=0)
    world.report((0, 1.0, 1), (1, 1.0, 2), replica=1)
    world.report((2, 1.0, 3), replica=0)
    rows = world.store.read(RUN)
    promise([row.seq for row in rows] == list(range(1, len(rows) + 1)), "the log has gaps")


@case()
def what_is_acknowledged_outlives_the_servers(world: World) -> None:
    world.open(0)
    stall(world, 0, 3)
    world.ask_through(0, 5)
    for replica in (0, 1):
        world.restart(replica)
    world.ask_through(0, 5)
    promise(world.report((0, 1.0, 1), (2, 1.0, 3)) == ["REPEATED"] * 2, "a loss is gone")
