"""Each rule, broken on purpose, and the case that must notice.

A mutant is a change that somebody could make by mistake: it takes the one place in which a rule
lives out of force. Nothing else in the system may make up for it unnoticed.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from lrpilot import core
from lrpilot.core import _canonical, _forgotten, _operators, _requests, _state
from lrpilot.core._changes import Direct, NextStage, Undo
from lrpilot.core._observers import Observers
from lrpilot.core._plan import Adjustment, Plan, Revision
from lrpilot.core._records import Records
from lrpilot.core._reporters import Reporters
from lrpilot.core._state import RunState
from lrpilot.core.policies import Observation
from lrpilot.core.policies._plateau import Plateau
from lrpilot.server import _trainer_service
from lrpilot.server._commit import GroupCommitter
from lrpilot.server._ledger import Ledger
from lrpilot.server._live_run import LiveRun
from lrpilot.server._memory_store import MemoryStore
from lrpilot.server._store import LogRow, SeqTaken
from lrpilot.server._trainer_service import TrainerService
from tests.rules.world import REPORTER

Break = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Mutant:
    """A rule out of force."""

    apply: Break
    noticed_by: str
    """Name of the case."""


MUTANTS: dict[str, Mutant] = {}


def mutant(noticed_by: str) -> Callable[[Break], Break]:
    """Register a mutant and the case that must notice it."""

    def register(apply: Break) -> Break:
        MUTANTS[apply.__name__] = Mutant(apply, noticed_by)
        return apply

    return register


# One value.


@mutant("recorded_values_are_not_computed_again")
def values_are_computed_at_each_request(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Records, "block", lambda *_: None)
    patch.setattr(Records, "at", lambda *_: None)


@mutant("recorded_values_are_not_computed_again")
def another_stride_is_computed_anew(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RunState, "values", lambda state, progress: state.plan.values(progress))


@mutant("a_value_is_recorded_before_it_leaves")
def values_leave_without_a_record(patch: pytest.MonkeyPatch) -> None:
    get_values = core.get_values

    def unrecorded(state: RunState, request: Any) -> Any:
        found = get_values(state, request)
        if isinstance(found, core.Recorded):
            groups = len(state.spec.group_names)
            return core.Block(
                found.begin, found.stride, groups, found.learning_rates, found.weight_decays
            )
        return found

    patch.setattr(core, "get_values", unrecorded)


@mutant("a_lost_answer_is_given_again")
def a_repeated_request_is_carried_out_again(patch: pytest.MonkeyPatch) -> None:
    open_attempt = core.open_attempt

    def again(state: RunState, request: Any) -> Any:
        return open_attempt(state, replace(request, request_id=f"{request.request_id} {state.seq}"))

    patch.setattr(core, "open_attempt", again)


@mutant("the_loser_of_a_race_evaluates_the_whole_request_again")
def the_loser_appends_what_it_had_evaluated(patch: pytest.MonkeyPatch) -> None:
    async def stubborn(self: Ledger, run: LiveRun, evaluate: Any, answer: Any) -> Any:
        async with run.lock:
            events, outcome = evaluate(run.state)
            while events:
                rows = [
                    LogRow(seq, data, digest, 0)
                    for seq, data, digest in core.rows(run.state, events)
                ]
                after = run.state.digest if run.state.exists else None
                try:
                    await self._committer.append(
                        run.state.name, rows, create=after is None, after=after
                    )
                except SeqTaken:
                    await self._read(run)
                    continue
                run.advance(rows)
                break
            return answer(run.state, outcome)

    patch.setattr(Ledger, "_transact", stubborn)


@mutant("a_refusal_counts_once_the_log_was_read")
def a_refusal_counts_at_once(patch: pytest.MonkeyPatch) -> None:
    async def look(_self: Ledger, run: LiveRun, evaluate: Any) -> Any:
        return evaluate(run.state)

    patch.setattr(Ledger, "look", look)


@mutant("nothing_to_do_counts_once_the_log_was_read")
def nothing_to_do_counts_at_once(patch: pytest.MonkeyPatch) -> None:
    transact = Ledger._transact

    async def hasty(self: Ledger, run: LiveRun, evaluate: Any, answer: Any) -> Any:
        events, outcome = evaluate(run.state)
        if events:
            return await transact(self, run, evaluate, answer)
        return answer(run.state, outcome)

    patch.setattr(Ledger, "_transact", hasty)


# Exactly n + D.


@mutant("a_loss_acts_at_exactly_n_plus_d")
def a_decision_shows_a_step_early(patch: pytest.MonkeyPatch) -> None:
    _shift_decisions(patch, -1)


@mutant("with_a_delay_of_one_every_step_is_decided_anew")
def a_decision_shows_a_step_late(patch: pytest.MonkeyPatch) -> None:
    _shift_decisions(patch, 1)


def _shift_decisions(patch: pytest.MonkeyPatch, steps: int) -> None:
    stated = Plan.stated

    def shifted(plan: Plan, adjustment: core.Adjustment) -> core.Adjustment:
        decided = stated(plan, adjustment)
        return replace(decided, effective=decided.effective + steps)

    patch.setattr(Plan, "stated", shifted)


@mutant("nothing_is_handed_out_beyond_the_horizon")
def the_horizon_lies_a_step_further(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        RunState, "horizon", property(lambda state: state.frontier + state.spec.delay + 1)
    )


@mutant("a_replica_that_lags_hands_out_less_and_nothing_else")
def whoever_asks_gets_values(patch: pytest.MonkeyPatch) -> None:
    get_values = core.get_values

    def generous(state: RunState, request: Any) -> Any:
        found = get_values(state, request)
        if found is None:
            rates, decays = state.values(request.begin)
            return core.Recorded(state.attempt, request.begin, 1, rates, decays, 0)
        return found

    patch.setattr(core, "get_values", generous)


@mutant("a_policy_is_mute_until_its_decision_shows")
def a_policy_decides_the_same_thing_twice(patch: pytest.MonkeyPatch) -> None:
    observe = Observers.observe

    def unmuted(self: Observers, *args: Any) -> Any:
        watches = tuple(replace(watch, muted_until=0) for watch in self.watches)
        return observe(replace(self, watches=watches), *args)

    patch.setattr(Observers, "observe", unmuted)


@mutant("non_finite_losses_stay_out_of_policies_and_averages")
def a_nan_enters_the_average(patch: pytest.MonkeyPatch) -> None:
    def averaged(self: Observers, observation: Observation, watches: Any) -> Observers:
        loss, broken = observation.loss or 0.0, self.nonfinite + 1
        return replace(self, watches=watches, nonfinite=broken, average=loss, average_weight=1.0)

    patch.setattr(Observers, "_after", averaged)


# Reports.


@mutant("what_is_passed_without_a_loss_is_absent")
def what_is_passed_is_waited_for(patch: pytest.MonkeyPatch) -> None:
    report = RunState._report

    def step_by_step(state: RunState, event: Any) -> None:
        reports = tuple(replace(item, moves_to=item.progress + 1) for item in event.reports)
        before = state.frontier
        report(state, replace(event, reports=reports))
        state.frontier = min(state.frontier, before + len(reports))
        state.reporters.positions[0] = state.frontier

    patch.setattr(RunState, "_report", step_by_step)


@mutant("a_late_loss_is_recorded_and_observed_by_nobody")
def a_late_loss_is_observed(patch: pytest.MonkeyPatch) -> None:
    report = RunState._report

    def let_in(state: RunState, event: Any) -> None:
        for item in event.reports:
            if item.progress < state.frontier and item.loss is not None:
                seen = Observation(item.progress, item.loss)
                state.observers, _ = state.observers.observe(state.plan, seen, state.seq)
        report(state, event)

    patch.setattr(RunState, "_report", let_in)


@mutant("a_repeated_loss_is_recognised_by_its_bits")
def a_repeat_is_compared_as_numbers(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_canonical, "same_bits", lambda a, b: a == b)


@mutant("another_loss_for_a_reported_step_is_refused")
def another_loss_is_taken_for_a_repeat(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_canonical, "same_bits", lambda *_: True)


@mutant("another_loss_for_a_reported_step_is_refused")
def the_sign_of_zero_is_lost(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_canonical, "same_bits", lambda a, b: repr(abs(a)) == repr(abs(b)))


@mutant("one_process_reports")
def every_process_may_report(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_requests, "_check_reporter", lambda *_: None)


@mutant("a_skipped_update_gets_the_same_values_again")
def a_policy_sees_skipped_updates(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Plateau, "reads_skipped", True)


@mutant("a_skipped_update_gets_the_same_values_again")
def a_skipped_update_advances(patch: pytest.MonkeyPatch) -> None:
    take = Reporters.take

    def advances(self: Reporters, rank: int, report: Any, begin: int) -> int:
        until = take(self, rank, report, begin)
        return until + 1 if report.skipped else until

    patch.setattr(Reporters, "take", advances)


@mutant("a_retried_skip_is_recognised")
def a_skip_is_known_by_its_progress_alone(patch: pytest.MonkeyPatch) -> None:
    known = _requests._known
    patch.setattr(
        _requests, "_known", lambda state, rank, item: known(state, rank, replace(item, tries=0))
    )


@mutant("a_retried_skip_is_recognised")
def a_skip_is_recorded_each_time(patch: pytest.MonkeyPatch) -> None:
    known = _requests._known
    patch.setattr(
        _requests,
        "_known",
        lambda state, rank, item: None if item.skipped else known(state, rank, item),
    )


@mutant("every_try_is_seen_by_the_same_policies")
def a_revision_comes_between_two_tries(patch: pytest.MonkeyPatch) -> None:
    revise = core.revise_run

    def between(state: RunState, *args: Any, **options: Any) -> list[core.Event]:
        (event,) = revise(state, *args, **options)
        assert isinstance(event, core.Revised)
        return [replace(event, observes_from=state.frontier)]

    patch.setattr(core, "revise_run", between)


@mutant("the_losses_of_several_reporters_are_summed_in_their_order")
def reporters_are_summed_as_they_come(patch: pytest.MonkeyPatch) -> None:
    combined = Reporters._combined
    patch.setattr(
        Reporters,
        "_combined",
        lambda self, at, parts: combined(replace(self, ranks=tuple(parts)), at, parts),
    )


@mutant("the_losses_of_several_reporters_are_summed_in_their_order")
def the_first_reporter_makes_a_step_final(patch: pytest.MonkeyPatch) -> None:
    move = Reporters.move
    patch.setattr(
        Reporters,
        "move",
        lambda self, rank, to, begin: max(move(self, rank, to, begin), to),
    )


@mutant("a_quorum_lists_those_that_counted")
def a_waiver_counts_nobody(patch: pytest.MonkeyPatch) -> None:
    waive = core.waive

    def nobody(state: RunState, wanted: int) -> list[core.Event]:
        return [
            replace(event, counted=()) if isinstance(event, core.Waived) else event
            for event in waive(state, wanted)
        ]

    patch.setattr(core, "waive", nobody)


@mutant("a_quorum_lists_those_that_counted")
def a_waiver_counts_whoever_was_there(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Reporters, "only", lambda *_: {})


# Waiting.


@mutant("blocked_ranks_get_on_though_nobody_reports")
def nothing_is_ever_waived(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(core, "waive", lambda *_: [])


@mutant("only_blocked_time_counts")
def every_wait_counts(patch: pytest.MonkeyPatch) -> None:
    wait = TrainerService._wait

    async def impatient(
        self: TrainerService, run: LiveRun, *args: Any, blocked: bool
    ) -> core.Block | None:
        del blocked
        async with run.blocked():
            return await wait(self, run, *args, blocked=True)

    patch.setattr(TrainerService, "_wait", impatient)


@mutant("a_replica_that_lags_reads_before_it_waives")
def a_waiver_is_appended_unread(patch: pytest.MonkeyPatch) -> None:
    async def waive(self: TrainerService, run: LiveRun, attempt: Any, wanted: Any) -> None:
        events = core.waive(run.state, wanted.begin)
        await self._ledger.refresh(run)
        await self._ledger.transact(run, lambda _: (events, None))

    patch.setattr(TrainerService, "_waive", waive)


@mutant("a_waiver_keeps_what_was_received")
def a_waived_loss_is_let_in(patch: pytest.MonkeyPatch) -> None:
    apply = RunState.apply

    def forgetful(state: RunState, event: Any, data: bytes | None = None) -> None:
        before = state.frontier
        apply(state, event, data)
        if isinstance(event, core.Waived):
            state.frontier = before

    patch.setattr(RunState, "apply", forgetful)


@mutant("a_request_far_beyond_the_horizon_is_refused")
def every_request_waits(patch: pytest.MonkeyPatch) -> None:
    get_values = core.get_values

    def patient(state: RunState, request: Any) -> Any:
        try:
            return get_values(state, request)
        except core.BeyondHorizon:
            return None

    patch.setattr(core, "get_values", patient)


# Attempts.


@mutant("a_superseded_attempt_is_refused")
def every_token_does(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(core, "check_attempt", lambda *_: None)


@mutant("a_resume_forgets_later_losses_and_what_they_decided")
def a_resume_forgets_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RunState, "_rewind", lambda *_: None)


@mutant("a_resume_forgets_later_losses_and_what_they_decided")
def a_resume_keeps_what_was_decided(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RunState, "_as_of", lambda state, _: (state.plan, state.observers))


@mutant("a_resume_inherits_the_records_below_its_horizon_alone")
def a_resume_inherits_every_record(patch: pytest.MonkeyPatch) -> None:
    between = Records.between
    patch.setattr(Records, "between", lambda self, begin, _: between(self, begin, 10**6))


@mutant("a_resume_repeats_the_bits_of_another_machine")
def a_resume_inherits_no_record(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Records, "between", lambda *_: [])


@mutant("a_resume_makes_missing_losses_absent")
def a_resume_waits_for_missing_losses(patch: pytest.MonkeyPatch) -> None:
    opened = RunState._open

    def waits(state: RunState, event: Any) -> None:
        before = state.frontier
        opened(state, event)
        state.frontier = min(before, event.begin)

    patch.setattr(RunState, "_open", waits)


@mutant("a_resume_forgets_waivers")
def a_resume_keeps_the_frontier(patch: pytest.MonkeyPatch) -> None:
    opened = RunState._open

    def keeps(state: RunState, event: Any) -> None:
        before = state.frontier
        opened(state, event)
        state.frontier = max(before, event.begin)

    patch.setattr(RunState, "_open", keeps)


@mutant("a_resume_keeps_what_operators_changed")
def a_resume_forgets_operators(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Plan, "reopen", lambda plan, _: plan._revisions.__delitem__(slice(1, None)))


@mutant("a_run_with_losses_needs_a_resume_point")
def a_run_may_start_over_unasked(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RunState, "has_losses", property(lambda _: False))


@mutant("ranks_join_by_their_key_alone")
def every_join_is_welcome(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_requests, "_join", lambda *_: [])


# Operators.


@mutant("a_change_lands_at_the_horizon")
def a_change_lands_at_the_frontier(patch: pytest.MonkeyPatch) -> None:
    revise = core.revise_run

    def early(state: RunState, *args: Any, **options: Any) -> Any:
        (event,) = revise(state, *args, **options)
        assert isinstance(event, core.Revised)
        return [replace(event, effective=state.frontier)]

    patch.setattr(core, "revise_run", early)


@mutant("an_operators_change_survives_a_resume_below_it")
def a_resume_forgets_every_adjustment(patch: pytest.MonkeyPatch) -> None:
    _forget(patch, lambda _: True)


def _forget(patch: pytest.MonkeyPatch, which: Callable[[Adjustment], bool]) -> None:
    """Let a resume forget more than what was decided on the losses behind it."""
    forget = Plan.forget

    def more(plan: Plan, progress: int) -> Plan:
        kept = [
            item
            for item in forget(plan, progress).adjustments
            if item.decided_at < progress or not which(item)
        ]
        return Plan(plan.revisions, kept, plan.rollbacks)

    patch.setattr(Plan, "forget", more)


@mutant("a_repeated_change_gets_its_first_answer")
def a_repeated_change_is_made_again(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_operators, "_is_done", lambda *_: False)


@mutant("policies_apply_before_operators")
def what_comes_first_applies_first(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        Adjustment,
        "key",
        property(lambda item: (item.effective, item.seq, item.order, item.part)),
    )


@mutant("the_same_losses_give_the_same_values_after_a_resume")
def a_resume_brings_operators_changes_forward(patch: pytest.MonkeyPatch) -> None:
    forget = Plan.forget

    def moved(plan: Plan, progress: int) -> Plan:
        kept = [
            replace(item, effective=min(item.effective, progress))
            for item in forget(plan, progress).adjustments
        ]
        return Plan(plan.revisions, kept, plan.rollbacks)

    patch.setattr(Plan, "forget", moved)


@mutant("an_undo_lands_at_the_horizon_and_leaves_the_past")
def an_undo_removes_what_it_takes_back(patch: pytest.MonkeyPatch) -> None:
    adjust = Plan.adjust

    def removing(plan: Plan, adjustment: Adjustment) -> None:
        adjust(plan, adjustment)
        if isinstance(adjustment.change, Undo):
            targets = adjustment.change.targets
            plan._adjustments = [item for item in plan._adjustments if item.mark not in targets]
            plan._changed()

    patch.setattr(Plan, "adjust", removing)


@mutant("an_undo_lands_at_the_horizon_and_leaves_the_past")
def an_undo_names_the_event_of_a_decision(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Adjustment, "mark", property(lambda item: item.id))


@mutant("a_hold_freezes_what_was_there_until_its_release")
def policies_observe_while_values_are_held(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Plan, "quiet", lambda *_: set())


@mutant("a_hold_freezes_what_was_there_until_its_release")
def a_hold_freezes_the_lr_alone(patch: pytest.MonkeyPatch) -> None:
    chain = Plan._chain
    patch.setattr(
        Plan,
        "_chain",
        lambda plan, first, last, *, decays: (
            () if decays else chain(plan, first, last, decays=False)
        ),
    )


@mutant("what_is_shown_is_what_is_done")
def a_change_is_shown_as_an_earlier_event(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(core, "made_next", lambda state, event, *_: state.made_by(event, state.seq))


@mutant("a_change_of_a_plan_that_has_changed_is_refused")
def nobody_looks_at_the_etag(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_operators, "refuse_changed_plan", lambda *_: None)


@mutant("a_change_of_a_plan_that_has_changed_is_refused")
def decisions_of_policies_leave_the_etag(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RunState, "etag", property(lambda state: f"etag {state.attempt}"))


@mutant("an_approved_advice_outlives_the_losses_that_led_to_it")
def an_approval_goes_with_its_advice(patch: pytest.MonkeyPatch) -> None:
    rewind = RunState._rewind

    def forgets(state: RunState, progress: int) -> None:
        rewind(state, progress)
        known = {item.id for item in state.advice}
        gone = {made for advice, made in state.approved.items() if advice not in known}
        kept = [item for item in state.plan.adjustments if item.id not in gone]
        state.plan = Plan(state.plan.revisions, kept)

    patch.setattr(RunState, "_rewind", forgets)


@mutant("advice_expires_in_progress")
def advice_never_expires(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_operators, "_approved", lambda _, advice: advice.change)


# Directives.


@mutant("a_directive_is_met_at_one_progress")
def a_directive_takes_effect_at_the_frontier(patch: pytest.MonkeyPatch) -> None:
    adjust = core.adjust_run

    def early(state: RunState, action: Any, **options: Any) -> list[core.Event]:
        return [
            replace(event, effective=state.frontier) if isinstance(event, core.Adjusted) else event
            for event in adjust(state, action, **options)
        ]

    patch.setattr(core, "adjust_run", early)


@mutant("a_directive_is_met_at_one_progress")
def a_directive_comes_with_its_own_values_alone(patch: pytest.MonkeyPatch) -> None:
    directives = _trainer_service._directives

    def within(state: RunState, block: core.Block) -> Any:
        return [item for item in directives(state, block) if item.progress >= block.begin]

    patch.setattr(_trainer_service, "_directives", within)


@mutant("a_rollback_opens_with_its_cut_and_inherits_no_values")
def a_rollback_inherits_values(patch: pytest.MonkeyPatch) -> None:
    opened = RunState._open

    def inherits(state: RunState, event: Any) -> None:
        records = state.records
        opened(state, event)
        state.records = Records()
        for block in records.between(event.begin, event.begin + state.delay):
            state.records.add(block)

    patch.setattr(RunState, "_open", inherits)


@mutant("a_rollback_opens_with_its_cut_and_inherits_no_values")
def a_resume_forgets_the_cut(patch: pytest.MonkeyPatch) -> None:
    _forget(patch, lambda item: item.kind == "rollback")


@mutant("a_second_rollback_cuts_deeper")
def a_second_rollback_cuts_as_the_first(patch: pytest.MonkeyPatch) -> None:
    open_attempt = core.open_attempt

    def alike(state: RunState, request: Any) -> Any:
        (event,) = open_attempt(state, request)
        asked = state.find(request.directive)
        if asked is not None and isinstance(asked.change, Direct):
            assert isinstance(event, core.Opened)
            return [replace(event, factor=asked.change.factor or 1.0)]
        return [event]

    patch.setattr(core, "open_attempt", alike)


@mutant("a_rollback_is_carried_out_once")
def a_rollback_stays_in_the_plan(patch: pytest.MonkeyPatch) -> None:
    rolled_back = Plan.rolled_back
    patch.setattr(Plan, "rolled_back", lambda plan, rollback, _: rolled_back(plan, rollback, ""))


@mutant("a_superseded_job_takes_no_run_back")
def whoever_met_a_rollback_carries_it_out(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_requests, "check_attempt", lambda *_: None)


# Leader mode.


@mutant("only_the_holder_gets_values")
def every_rank_gets_values(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(core, "check_holder", lambda *_: None)


@mutant("only_the_holder_gets_values")
def every_rank_may_declare(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_requests, "_refuse_others", lambda *_: None)


@mutant("a_declaration_is_a_fact")
def what_was_declared_is_computed(patch: pytest.MonkeyPatch) -> None:
    declare = RunState._declare

    def forgets(state: RunState, event: Any) -> None:
        declare(state, event)
        state.records.forget(event.blocks[0].begin)

    patch.setattr(RunState, "_declare", forgets)


@mutant("losses_that_would_have_acted_on_declared_steps_are_waived")
def a_loss_that_came_acts_after_a_declaration(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RunState, "_unseen", lambda *_: [])


@mutant("losses_that_would_have_acted_on_declared_steps_are_waived")
def a_loss_that_comes_acts_after_a_declaration(patch: pytest.MonkeyPatch) -> None:
    advance = RunState._advance

    def waits(state: RunState, until: int) -> None:
        frontier = state.frontier
        advance(state, until)
        if state.declared and not state.reporters.positions.get(REPORTER, 0) >= until:
            state.frontier = frontier

    patch.setattr(RunState, "_advance", waits)


@mutant("losses_that_act_on_other_steps_are_not_waived")
def a_declaration_waives_all_that_came(patch: pytest.MonkeyPatch) -> None:
    pass_over = RunState._pass_over

    def all_of_it(state: RunState, until: int, seen: Any, known: Any) -> None:
        pass_over(state, until, [], known)

    patch.setattr(RunState, "_pass_over", all_of_it)


@mutant("what_operators_changed_meanwhile_takes_effect_after_it")
def what_operators_changed_stays_where_it_was(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Plan, "postpone", lambda *_: None)


@mutant("what_operators_changed_meanwhile_takes_effect_after_it")
def a_revision_stays_where_it_was(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Revision, "postponed", lambda revision, *_: revision)


@mutant("what_was_offered_is_not_taken_back")
def what_operators_changed_before_waits_too(patch: pytest.MonkeyPatch) -> None:
    postpone = Plan.postpone
    patch.setattr(
        Plan,
        "postpone",
        lambda plan, begin, end, _, observes_from: postpone(plan, begin, end, 0, observes_from),
    )


@mutant("what_was_offered_is_not_taken_back")
def the_horizon_of_an_offer_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    offer_values = core.offer_values

    def forgets(*args: Any, **options: Any) -> Any:
        return [
            replace(event, begin=0) if isinstance(event, core.Permitted) else event
            for event in offer_values(*args, **options)
        ]

    patch.setattr(core, "offer_values", forgets)


@mutant("a_job_goes_on_alone_only_as_far_as_the_log_permits")
def everything_is_permitted(patch: pytest.MonkeyPatch) -> None:
    declare = core.declare_values

    def trusting(state: RunState, *args: Any, **options: Any) -> Any:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(RunState, "permitted", 10**9)
            inner.setitem(options, "offer", 0)
            return declare(state, *args, **options)

    patch.setattr(core, "declare_values", trusting)


@mutant("a_repeated_declaration_is_recognised")
def other_values_pass_for_a_repeat(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_requests, "_same_values", lambda *_: True)


@mutant("a_repeated_declaration_is_recognised")
def a_repeat_is_declared_again(patch: pytest.MonkeyPatch) -> None:
    declare = core.declare_values

    def forgetful(state: RunState, *args: Any, **options: Any) -> Any:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(state, "declared", [])
            return declare(state, *args, **options)

    patch.setattr(core, "declare_values", forgetful)


@mutant("a_holder_is_answered_from_the_whole_log")
def a_server_that_lags_answers_the_holder(patch: pytest.MonkeyPatch) -> None:
    async def refresh(*_: Any) -> None:
        return

    patch.setattr(Ledger, "refresh", refresh)


@mutant("a_holder_is_answered_from_the_whole_log")
def what_was_recorded_behind_a_declaration_stays(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Records, "forget", lambda *_: None)


@mutant("nothing_is_waived_in_leader_mode")
def a_blocked_holder_waives(patch: pytest.MonkeyPatch) -> None:
    wait = TrainerService._wait

    async def waits(self: TrainerService, run: LiveRun, *args: Any, **options: Any) -> Any:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(run.state, "holder", "")
            inner.setattr(core, "check_holder", lambda *_: None)
            return await wait(self, run, *args, **options)

    patch.setattr(TrainerService, "_wait", waits)


@mutant("a_checkpoint_from_before_a_declaration_brings_its_own_past")
def a_declaration_changes_checkpoints(patch: pytest.MonkeyPatch) -> None:
    unseen = RunState._unseen

    def unmarked(state: RunState, progress: int) -> Any:
        seen = unseen(state, progress)
        del state.rewinds[-1]
        return seen

    patch.setattr(RunState, "_unseen", unmarked)


# Stages.


@mutant("a_stage_ends_on_the_loss_at_exactly_n_plus_d")
def a_stage_ends_a_step_early(patch: pytest.MonkeyPatch) -> None:
    _shift_decisions(patch, -1)


@mutant("a_stage_ends_on_the_loss_at_exactly_n_plus_d")
def a_stage_keeps_the_changes_of_the_one_before(patch: pytest.MonkeyPatch) -> None:
    span = Plan._span
    patch.setattr(Plan, "_span", lambda *args: (0, span(*args)[1]))


@mutant("a_resume_forgets_that_a_stage_ended")
def a_resume_keeps_that_a_stage_ended(patch: pytest.MonkeyPatch) -> None:
    forget = Plan.forget

    def keeps(plan: Plan, progress: int) -> Plan:
        left = [item for item in plan.adjustments if isinstance(item.change, NextStage)]
        kept = [item for item in forget(plan, progress).adjustments if item not in left]
        return Plan(plan.revisions, [*kept, *left], plan.rollbacks)

    patch.setattr(Plan, "forget", keeps)


@mutant("a_resume_forgets_that_a_stage_ended")
def every_resume_forgets_that_a_stage_ended(patch: pytest.MonkeyPatch) -> None:
    as_of = RunState._as_of

    def forgets(state: RunState, progress: int) -> Any:
        plan, observers = as_of(state, progress)
        kept = [item for item in plan.adjustments if not isinstance(item.change, NextStage)]
        return Plan(plan.revisions, kept, plan.rollbacks), observers

    patch.setattr(RunState, "_as_of", forgets)


@mutant("what_only_a_new_attempt_may_change_is_refused")
def everything_may_be_revised(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_requests, "_locked", lambda *_: [])


# Saved states.


@mutant("a_lost_run_is_restored_from_a_checkpoint")
def a_state_forgets_the_policies(patch: pytest.MonkeyPatch) -> None:
    saved_fold = RunState.saved_fold
    patch.setattr(
        RunState,
        "saved_fold",
        lambda state, progress: {
            **saved_fold(state, progress),
            "observers": Observers().to_mapping(),
        },
    )


@mutant("a_lost_run_is_restored_from_a_checkpoint")
def a_state_forgets_the_adjustments(patch: pytest.MonkeyPatch) -> None:
    saved_fold = RunState.saved_fold
    patch.setattr(
        RunState,
        "saved_fold",
        lambda state, progress: {**saved_fold(state, progress), "adjustments": []},
    )


@mutant("a_lost_run_keeps_the_order_of_what_operators_did")
def revisions_come_first(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Revision, "came_after", lambda *_: False)


@mutant("what_was_taken_back_in_a_lost_run_lends_nobody_its_name")
def a_state_keeps_names_of_what_is_gone(patch: pytest.MonkeyPatch) -> None:
    renumbered = _state._renumbered

    def keeps(fold: Any, *args: Any) -> Any:
        undone = {
            target
            for item in fold["adjustments"]
            if item["change"]["action"] == Undo.action
            for target in item["change"]["targets"]
        }
        past = renumbered(fold, *args)
        acting = [
            replace(item, change=replace(item.change, targets=(*item.change.targets, *undone)))
            if isinstance(item.change, Undo)
            else item
            for item in past.adjustments
        ]
        return replace(past, adjustments=acting)

    patch.setattr(_state, "_renumbered", keeps)


@mutant("a_checkpoint_holds_all_that_was_acknowledged")
def a_checkpoint_is_taken_unread(patch: pytest.MonkeyPatch) -> None:
    async def refresh(*_: Any) -> None:
        return

    patch.setattr(Ledger, "refresh", refresh)


@mutant("a_checkpoint_brings_its_own_past")
def a_checkpoint_takes_the_past_of_the_log(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RunState, "history_differs", lambda *_: False)


@mutant("a_state_of_another_log_is_refused")
def every_state_is_welcome(patch: pytest.MonkeyPatch) -> None:
    adopt = _requests._adopt

    def welcome(state: RunState, request: Any, saved: core.SavedState) -> Any:
        return adopt(state, request, replace(saved, fold={**saved.fold, "log": state.log}))

    patch.setattr(_requests, "_adopt", welcome)


# A database that was put back.


@mutant("values_that_the_log_forgot_end_the_attempt")
def what_a_rank_holds_is_not_looked_at(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(core, "missing", lambda *_: None)


@mutant("values_that_the_log_forgot_end_the_attempt")
def the_next_request_is_served_again(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RunState, "_forget", lambda *_: None)


@mutant("other_values_than_the_log_has_end_the_attempt")
def values_are_known_by_their_progress(patch: pytest.MonkeyPatch) -> None:
    missing = core.missing

    def trusting(state: RunState, number: int, token: str, held: core.Held, *_: Any) -> Any:
        return missing(state, number, token, held, lambda *_: held.digest)

    patch.setattr(core, "missing", trusting)


@mutant("losses_that_the_log_forgot_end_the_attempt")
def what_was_acknowledged_is_not_looked_at(patch: pytest.MonkeyPatch) -> None:
    missing = core.missing

    def deaf(state: RunState, number: int, token: str, held: core.Held, *more: Any) -> Any:
        return missing(state, number, token, replace(held, frontier=0, reported=0), *more)

    patch.setattr(core, "missing", deaf)


@mutant("an_attempt_that_the_log_forgot_is_told_so")
def the_number_of_a_lost_attempt_comes_again(patch: pytest.MonkeyPatch) -> None:
    forget = RunState._forget

    def forgetful(state: RunState, event: core.Forgot) -> None:
        greatest = state.greatest_attempt
        forget(state, event)
        state.greatest_attempt = greatest

    patch.setattr(RunState, "_forget", forgetful)


@mutant("an_attempt_that_the_log_forgot_is_told_so")
def attempts_of_other_logs_count(patch: pytest.MonkeyPatch) -> None:
    missing = core.missing

    def blind(state: RunState, number: int, token: str, held: core.Held, *more: Any) -> Any:
        return missing(state, number, token, replace(held, log=state.log), *more)

    patch.setattr(core, "missing", blind)


@mutant("a_rank_of_another_attempt_ends_none")
def a_forgotten_attempt_ends_the_one_in_use(patch: pytest.MonkeyPatch) -> None:
    forget = RunState._forget

    def wholesale(state: RunState, event: core.Forgot) -> None:
        forget(state, event)
        state.forgot = state.alarm

    patch.setattr(RunState, "_forget", wholesale)


@mutant("a_rank_of_another_attempt_ends_none")
def an_imported_log_knows_every_attempt(patch: pytest.MonkeyPatch) -> None:
    imports = RunState._import

    def forgetful(state: RunState, event: core.Imported) -> None:
        imports(state, event)
        state.is_imported = False

    patch.setattr(RunState, "_import", forgetful)


@mutant("losses_of_one_reporter_that_the_log_forgot_end_the_attempt")
def only_final_losses_count(patch: pytest.MonkeyPatch) -> None:
    missing = core.missing

    def deaf(state: RunState, number: int, token: str, held: core.Held, *more: Any) -> Any:
        return missing(state, number, token, replace(held, reported=0), *more)

    patch.setattr(core, "missing", deaf)


@mutant("a_replica_that_lags_accuses_nobody")
def a_replica_accuses_by_what_it_knows(patch: pytest.MonkeyPatch) -> None:
    async def hasty(_: TrainerService, run: LiveRun, attempt: Any, held: core.Held) -> None:
        found = core.missing(run.state, attempt.number, attempt.token.hex(), held)
        if found is not None:
            raise core.LogForgotten(found.what)

    patch.setattr(TrainerService, "_compare", hasty)


@mutant("a_copy_that_holds_all_goes_on")
def no_block_is_found(patch: pytest.MonkeyPatch) -> None:
    for module in (core, _forgotten):
        patch.setattr(module, "recorded_digest", lambda *_: None)


@mutant("a_permit_that_the_log_forgot_ends_the_attempt")
def every_permit_is_known(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_forgotten, "_knows_permit", lambda *_: True)


@mutant("a_newer_checkpoint_brings_back_what_the_log_forgot")
def what_both_know_is_there_twice(patch: pytest.MonkeyPatch) -> None:
    saved_fold = RunState.saved_fold
    patch.setattr(
        RunState, "saved_fold", lambda state, progress: {**saved_fold(state, progress), "done": []}
    )


@mutant("a_newer_checkpoint_brings_back_what_the_log_forgot")
def a_newer_checkpoint_is_of_another_log(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(core.SavedState, "log", "")


@mutant("what_operators_did_since_a_copy_was_put_back_stays")
def a_checkpoint_takes_the_whole_plan(patch: pytest.MonkeyPatch) -> None:
    foreign = RunState._foreign
    patch.setattr(
        RunState, "_foreign", lambda state, fold, adopted: foreign(state, fold, adopted=False)
    )


@mutant("an_import_ends_the_attempts_of_the_log")
def an_import_leaves_the_attempt_open(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RunState, "_import", lambda *_: None)


# The log.


@mutant("a_seq_is_given_out_once")
def a_taken_seq_is_written_over(patch: pytest.MonkeyPatch) -> None:
    append = MemoryStore.append

    def overwrite(store: MemoryStore, batch: Any) -> Any:
        for item in batch:
            rows = store.read(item.run)
            kept = [row for row in rows if row.seq < item.rows[0].seq]
            if len(kept) < len(rows):
                store.delete(item.run)
                append(store, [replace(item, rows=tuple(kept), create=True)])
        return append(store, batch)

    patch.setattr(MemoryStore, "append", overwrite)


@mutant("what_is_acknowledged_outlives_the_servers")
def an_answer_leaves_before_its_commit(patch: pytest.MonkeyPatch) -> None:
    append = GroupCommitter.append

    async def later(self: GroupCommitter, run: str, rows: Any, **options: Any) -> None:
        if any(core.decode(row.payload).kind == "reported" for row in rows):
            await asyncio.sleep(0)
            return
        await append(self, run, rows, **options)

    patch.setattr(GroupCommitter, "append", later)


@mutant("a_late_loss_is_recorded_and_observed_by_nobody")
def a_trimmed_state_answers_what_it_dropped(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RunState, "refuse_dropped", lambda *_: None)


@mutant("the_same_losses_give_the_same_values_after_a_resume")
def a_trimmed_state_replays_from_further_on(patch: pytest.MonkeyPatch) -> None:
    trim = RunState.trim

    def without_a_mark(self: RunState, progress: int) -> None:
        trim(self, progress)
        if self.dropped:
            del self.marks[0]

    patch.setattr(RunState, "trim", without_a_mark)


@mutant("what_is_acknowledged_outlives_the_servers")
def a_snapshot_leaves_something_out(patch: pytest.MonkeyPatch) -> None:
    restore = core.restore_snapshot

    def partial(data: bytes) -> RunState:
        state = restore(data)
        state.records = Records()
        return state

    patch.setattr(core, "restore_snapshot", partial)
