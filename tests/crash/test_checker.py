"""The checker itself: clean rounds pass, and each property is broken in the smallest way."""

import base64
from collections.abc import Callable
from dataclasses import replace
from math import nextafter
from typing import Any

import pytest

from lrpilot import core
from lrpilot.v1 import trainer_pb2
from tests.crash.checker import KINDS, check
from tests.crash.evidence import Story
from tests.crash.history import Record, response_of
from tests.crash.second_opinion import Evaluation
from tests.crash.stage import RUN, SERVER, Stage, rechained, spec


def trained(steps: int = 12) -> Stage:
    """Return a clean round of one attempt and two ranks."""
    stage = Stage()
    stage.attach()
    stage.open()
    stage.train(0, steps)
    return stage


def find(stage: Stage, method: str, index: int = -1, who: str = "r0.0") -> tuple[Record, Record]:
    """Return a call and its answer."""
    history = stage.histories[who]
    calls = [item for item in history if item["what"] == "call" and item["method"] == method]
    call = calls[index]
    ends = (item for item in history if item["what"] in {"answer", "error"})
    return call, next(item for item in ends if item["call"] == call["call"])


def alter(call: Record, answer: Record, change: Callable[[Any], object]) -> None:
    """Change an answer in a history."""
    response = response_of(call, answer)
    change(response)
    answer["response"] = base64.b64encode(response.SerializeToString()).decode("ascii")


def last_event(stage: Stage, kind: type[Any]) -> int:
    """Return the index of the last event of a kind."""
    return max(at for at, event in enumerate(stage.events) if isinstance(event, kind))


def spoil_report(stage: Stage, **fields: Any) -> None:
    """Let the log say something else in its last event, which is of one report."""
    event = stage.events[-1]
    assert isinstance(event, core.Reported)
    (report,) = event.reports
    stage.events[-1] = replace(event, reports=(replace(report, **fields),))


def next_bit(value: float) -> float:
    """Return the float after one."""
    return nextafter(value, 2.0 * value)


class TestCleanRounds:
    def test_training(self) -> None:
        stage = trained(40)
        decided = [item for item in stage.state.plan.adjustments if item.mode == "act"]
        assert len(decided) > 2
        assert stage.check() == []

    def test_without_feedback(self) -> None:
        stage = Stage()
        stage.attach(spec(policies=[]))
        stage.open()
        for at in range(12):
            stage.values(at, in_use=at)
            stage.use(at)
        assert stage.check() == []

    def test_lost_answers_waivers_late_losses_operators_and_resumes(self) -> None:
        stage = trained(8)
        stage.report((8, 1.5), lost=True)
        stage.report((8, 1.5))
        stage.waive()
        stage.report((9, 1.0), (10, 0.5))
        stage.report((9, 1.0))
        stage.adjust(0.5)
        stage.adjust(0.5)
        stage.values(8, count=9)
        for at in range(8, 17):
            stage.use(at)
        stage.save(12)
        stage.open(11, who="r0.1")
        for at in range(11, 20):
            stage.values(at, who="r0.1")
            stage.use(at, who="r0.1")
            stage.report((at, 0.25), who="r0.1")
        outcomes = trainer_pb2.ReportOutcome
        late = response_of(*find(stage, "ReportLosses", -2)).outcomes
        assert [outcomes.Name(item)[15:] for item in late] == ["LATE", "LATE"]
        assert stage.check() == []

    def test_losses_that_are_no_numbers(self) -> None:
        stage = trained(4)
        stage.report((4, float("nan")), (5, float("inf")), (6, None))
        stage.report((4, float("nan")))
        assert stage.check() == []

    def test_what_is_said_of_steps_without_a_loss(self) -> None:
        stage = trained(4)
        stage.report((4, None), val=0.5, lost=True)
        stage.report((4, None), val=0.5)
        stage.report((5, None), skipped=True)
        stage.report((5, None), skipped=True)
        stage.report((6, 1.0), val=0.25)
        # Their steps are final: of these only a late loss is kept.
        stage.report((5, None), val=0.5)
        stage.report((5, None), skipped=True)
        stage.waive()
        stage.report((7, 1.0))
        stage.report((7, 1.0), skipped=True)
        assert stage.check() == []

    def test_what_no_answer_came_to_may_be_in_the_log_or_not(self) -> None:
        stage = trained(4)
        request = trainer_pb2.ReportLossesRequest(
            run=RUN, attempt=stage.attempt, incarnation="r0.0"
        )
        request.reports.add(progress=4, loss=1.0, moves_to=5)
        stage.call("r0.0", "ReportLosses", request, lambda: "UNAVAILABLE")
        assert stage.check() == []
        stage.report((4, 1.0), lost=True)
        assert stage.check() == []

    def test_leader_mode(self) -> None:
        stage = led()
        assert stage.check() == []


def led() -> Stage:
    """Return a clean round in leader mode with a declaration."""
    stage = Stage()
    stage.attach()
    attempt = stage.open(leader=True)
    holder = "ab" * 16
    stage.train(0, 4)
    state = stage.state
    wanted = core.OfferRequest(begin=8, count=8)
    stage.apply(core.offer_values(state, wanted, holder=holder))
    offer = core.offered(state, wanted)
    block = offer.block().cut(8, 12)
    assert block is not None
    request = trainer_pb2.DeclareValuesRequest(run=RUN, attempt=attempt, offer=offer.permit.seq)
    told = request.blocks.add(begin=8, stride=1)
    told.learning_rates.extend(block.learning_rates)
    told.weight_decays.extend(block.weight_decays or ())
    for at in range(4, 8):
        stage.values(at)
        stage.use(at)

    def declare() -> Any:
        for at in range(8, 12):
            values = block.at(at)
            assert values is not None
            stage.write(
                "r0.0",
                "used",
                run=RUN,
                attempt=1,
                progress=at,
                learning_rates=[x.hex() for x in values[0]],
                weight_decays=[x.hex() for x in values[1] or ()],
            )
        stage.apply(core.declare_values(state, [block], holder=holder, offer=offer.permit.seq))
        return trainer_pb2.DeclareValuesResponse(horizon=state.horizon, frontier=state.frontier)

    stage.call("r0.0", "DeclareValues", request, declare)
    stage.values(12)
    stage.use(12)
    return stage


# Each takes a clean round and breaks one thing; the name of the kind stands before it.

Break = Callable[[Stage], None]

BREAKS: list[tuple[str, Break]] = []


def breaks(kind: str) -> Callable[[Break], Break]:
    def add(broken: Break) -> Break:
        BREAKS.append((kind, broken))
        return broken

    return add


@breaks("one value")
def an_answer_differs_in_the_last_bit(stage: Stage) -> None:
    def change(response: Any) -> None:
        rates = response.block.learning_rates
        rates[0] = next_bit(rates[0])

    alter(*find(stage, "GetValues", who="r1.0"), change)


@breaks("one value")
def a_weight_decay_that_was_used_differs(stage: Stage) -> None:
    record = stage.histories["r1.0"][-1]
    record["weight_decays"] = [next_bit(float.fromhex(record["weight_decays"][0])).hex()]


@breaks("one value")
def the_log_fixes_a_second_value(stage: Stage) -> None:
    event = stage.events[last_event(stage, core.Recorded)]
    assert isinstance(event, core.Recorded)
    rates = tuple(map(next_bit, event.learning_rates))
    stage.events.append(replace(event, learning_rates=rates))


@breaks("not recorded")
def a_value_is_handed_out_and_its_record_is_lost(stage: Stage) -> None:
    del stage.events[last_event(stage, core.Recorded)]


@breaks("not recorded")
def a_step_uses_what_nobody_fixed(stage: Stage) -> None:
    record = dict(stage.histories["r0.0"][-1])
    stage.use(14)
    stage.histories["r0.0"][-1]["progress"] = 900
    assert record["what"] == "answer"


@breaks("horizon")
def an_answer_shows_an_older_horizon(stage: Stage) -> None:
    stage.values(11)
    alter(*find(stage, "GetValues"), lambda response: setattr(response, "horizon", 15))


@breaks("horizon")
def a_waiver_moves_nothing(stage: Stage) -> None:
    stage.events.append(core.Waived(1, stage.state.frontier))


@breaks("horizon")
def the_progress_in_use_goes_back(stage: Stage) -> None:
    index = last_event(stage, core.Recorded)
    event = stage.events[index]
    assert isinstance(event, core.Recorded)
    stage.events[index] = replace(event, in_use=3)
    stage.events.append(replace(event, in_use=2))


@breaks("beyond the horizon")
def the_log_fixes_a_value_at_the_horizon(stage: Stage) -> None:
    at = stage.state.horizon
    rates, decays = stage.state.values(at)
    stage.events.append(core.Recorded(1, at, 1, rates, decays, 0))


@breaks("beyond the horizon")
def an_answer_claims_a_horizon_that_the_log_never_had(stage: Stage) -> None:
    horizon = stage.state.horizon + 1
    alter(*find(stage, "ReportLosses"), lambda response: setattr(response, "horizon", horizon))


@breaks("beyond the horizon")
def a_block_reaches_the_horizon_that_comes_with_it(stage: Stage) -> None:
    alter(*find(stage, "GetValues"), lambda response: setattr(response, "horizon", 11))


@breaks("beyond the horizon")
def a_value_comes_before_the_loss_is_sent(stage: Stage) -> None:
    call, _ = find(stage, "ReportLosses")
    stage.values(15)
    answered = stage.histories["r0.0"][-1]
    call["t"], answered["t"] = answered["t"], call["t"]


@breaks("beyond the horizon")
def a_change_lands_below_the_horizon(stage: Stage) -> None:
    stage.adjust(0.5)
    event = stage.events[-1]
    assert isinstance(event, core.Adjusted)
    stage.events[-1] = replace(event, effective=event.effective - 1)


@breaks("steps")
def a_step_is_left_out(stage: Stage) -> None:
    stage.use(13)


@breaks("steps")
def a_rank_begins_elsewhere(stage: Stage) -> None:
    stage.use(1, who="r2.0")


@breaks("loss lost")
def an_acknowledged_loss_is_not_in_the_log(stage: Stage) -> None:
    stage.report((12, 1.0))
    stage.events.pop()


@breaks("loss lost")
def an_acknowledged_loss_is_in_the_log_with_other_bits(stage: Stage) -> None:
    stage.report((12, 1.0))
    spoil_report(stage, loss=next_bit(1.0))


@breaks("loss lost")
def a_repeat_is_acknowledged_though_there_was_no_first(stage: Stage) -> None:
    stage.report((12, 1.0))
    stage.report((12, 1.0))
    stage.events.pop()


@breaks("loss lost")
def a_step_without_a_loss_is_acknowledged_and_forgotten(stage: Stage) -> None:
    stage.report((12, None))
    stage.events.pop()


@breaks("loss lost")
def an_acknowledged_validation_loss_is_not_in_the_log(stage: Stage) -> None:
    stage.report((12, None), val=0.5)
    stage.events.pop()
    stage.report((13, 1.0))


@breaks("loss lost")
def of_a_step_with_a_validation_loss_only_its_end_is_in_the_log(stage: Stage) -> None:
    stage.report((12, None), val=0.5)
    spoil_report(stage, validation={})


@breaks("loss lost")
def an_acknowledged_validation_loss_is_in_the_log_with_other_bits(stage: Stage) -> None:
    stage.report((12, 1.0), val=0.5)
    spoil_report(stage, validation={"val": next_bit(0.5)})


@breaks("loss lost")
def an_acknowledged_validation_loss_is_in_the_log_by_another_name(stage: Stage) -> None:
    stage.report((12, 1.0), val=0.5)
    spoil_report(stage, validation={"test": 0.5})


@breaks("loss lost")
def an_acknowledged_skip_is_not_in_the_log(stage: Stage) -> None:
    stage.report((12, None), skipped=True)
    stage.events.pop()
    stage.report((13, 1.0))


@breaks("loss lost")
def a_repeated_skip_is_acknowledged_though_there_was_no_first(stage: Stage) -> None:
    stage.report((12, None), skipped=True, lost=True)
    stage.report((12, None), skipped=True)
    stage.events.pop()


@breaks("loss outcome")
def a_recorded_loss_is_called_late(stage: Stage) -> None:
    late = trainer_pb2.REPORT_OUTCOME_LATE
    alter(*find(stage, "ReportLosses"), lambda response: response.outcomes.__setitem__(0, late))


@breaks("loss outcome")
def a_late_loss_is_called_recorded(stage: Stage) -> None:
    recorded = trainer_pb2.REPORT_OUTCOME_RECORDED
    stage.waive()
    stage.report((12, 1.0))
    alter(*find(stage, "ReportLosses"), lambda response: response.outcomes.__setitem__(0, recorded))


@breaks("loss repeated")
def a_loss_is_appended_twice(stage: Stage) -> None:
    stage.events.append(stage.events[last_event(stage, core.Reported)])


@breaks("loss from nowhere")
def a_refused_loss_is_in_the_log(stage: Stage) -> None:
    stage.report((12, 1.0))
    answer = stage.histories["r0.0"][-1]
    answer |= {"what": "error", "code": "FAILED_PRECONDITION"}


@breaks("loss from nowhere")
def a_loss_that_nobody_sent_is_in_the_log(stage: Stage) -> None:
    report = core.Report(12, 1.0, 1.0, 13)
    stage.apply([core.Reported(1, "r0.0", (report,))])


@breaks("loss from nowhere")
def a_validation_loss_that_nobody_sent_is_in_the_log(stage: Stage) -> None:
    stage.report((12, 1.0))
    spoil_report(stage, validation={"val": 0.5})


@breaks("loss from nowhere")
def a_validation_loss_without_an_answer_is_left_out_of_its_step(stage: Stage) -> None:
    stage.report((12, None), val=0.5, lost=True)
    spoil_report(stage, validation={})


@breaks("loss from nowhere")
def a_gradient_norm_that_nobody_sent_is_in_the_log(stage: Stage) -> None:
    stage.report((12, 1.0), lost=True)
    spoil_report(stage, gradient_norm=1.0)


@breaks("request lost")
def an_acknowledged_change_is_not_in_the_log(stage: Stage) -> None:
    stage.adjust(0.5)
    stage.events.pop()


@breaks("request lost")
def a_change_takes_effect_elsewhere_than_was_said(stage: Stage) -> None:
    stage.adjust(0.5)
    call, answer = find(stage, "AdjustRun", who="o.0")
    alter(call, answer, lambda response: setattr(response, "effective", 17))


@breaks("request lost")
def an_attempt_was_opened_and_is_not_in_the_log(stage: Stage) -> None:
    stage.open(10)
    stage.events.pop()


@breaks("request lost")
def an_attempt_has_another_token_than_was_answered(stage: Stage) -> None:
    stage.open(10)
    event = stage.events[-1]
    assert isinstance(event, core.Opened)
    stage.events[-1] = replace(event, token="ff" * 16)


@breaks("request lost")
def a_run_was_made_by_another_call_than_was_said(stage: Stage) -> None:
    event = stage.events[0]
    assert isinstance(event, core.Created)
    stage.events[0] = replace(event, request_id="another")


@breaks("request lost")
def an_answer_says_that_a_directive_was_met_and_the_log_does_not(stage: Stage) -> None:
    request = trainer_pb2.AcknowledgeDirectiveRequest(
        run=RUN, attempt=stage.attempt, directive="9-5-3000"
    )
    answer = trainer_pb2.AcknowledgeDirectiveResponse()
    stage.call("r0.0", "AcknowledgeDirective", request, lambda: answer)


@breaks("request repeated")
def a_change_is_made_twice(stage: Stage) -> None:
    stage.adjust(0.5, lost=True)
    event = stage.events[-1]
    assert isinstance(event, core.Adjusted)
    stage.events.append(event)


@breaks("request from nowhere")
def a_refused_change_is_in_the_log(stage: Stage) -> None:
    stage.adjust(0.5)
    stage.histories["o.0"][-1] |= {"what": "error", "code": "ABORTED"}


@breaks("request from nowhere")
def a_change_that_nobody_asked_for_is_in_the_log(stage: Stage) -> None:
    stage.adjust(0.5)
    del stage.histories["o.0"]


@breaks("superseded")
def a_loss_of_an_old_attempt_is_in_the_log_behind_the_new_one(stage: Stage) -> None:
    event = stage.events[last_event(stage, core.Reported)]
    stage.open(10)
    stage.events.append(event)


@breaks("superseded")
def a_record_of_an_old_attempt_is_in_the_log_behind_the_new_one(stage: Stage) -> None:
    event = stage.events[last_event(stage, core.Recorded)]
    stage.open(10)
    stage.events.append(event)


@breaks("superseded")
def an_old_attempt_is_answered_after_the_new_one_opened(stage: Stage) -> None:
    stage.open(10, who="r0.1")
    record = stage.histories["r0.1"][-1]
    call, _ = find(stage, "ReportLosses")
    record["t"] = call["t"] - 1


@breaks("superseded")
def an_attempt_has_the_number_of_another(stage: Stage) -> None:
    stage.open(10)
    event = stage.events[-1]
    assert isinstance(event, core.Opened)
    stage.events[-1] = replace(event, attempt=3)


@breaks("accused")
def the_log_is_said_to_have_forgotten_losses(stage: Stage) -> None:
    stage.apply([core.Forgot(1, 0, "losses", 13)])


@breaks("accused")
def the_log_is_said_to_have_forgotten_an_attempt(stage: Stage) -> None:
    stage.apply([core.Forgot(2, 0, "attempt", 13)])


@breaks("state")
def a_saved_state_is_of_another_log(stage: Stage) -> None:
    stage.save(12)
    event = stage.events[-1]
    assert isinstance(event, core.Reported)
    stage.events[-1] = replace(event, incarnation="r9.0")


@breaks("replay")
def a_record_differs_from_the_plan(stage: Stage) -> None:
    # Everybody got the same wrong values.
    index = last_event(stage, core.Recorded)
    event = stage.events[index]
    assert isinstance(event, core.Recorded)
    wrong = dict(enumerate(map(next_bit, event.learning_rates), event.begin))
    stage.events[index] = replace(event, learning_rates=tuple(wrong.values()))

    def spoil(response: Any) -> None:
        rates = response.block.learning_rates
        rates[:] = [wrong.get(at, rate) for at, rate in enumerate(rates, response.block.begin)]

    for who, history in stage.histories.items():
        for record in history:
            if record["what"] == "used" and record["progress"] in wrong:
                record["learning_rates"] = [wrong[record["progress"]].hex()]
        calls = [item for item in history if item.get("method") == "GetValues"]
        for number in range(len(calls)):
            alter(*find(stage, "GetValues", number, who), spoil)


@breaks("replay")
def an_event_cannot_be_applied(stage: Stage) -> None:
    stage.adjust(0.5)
    event = stage.events[-1]
    assert isinstance(event, core.Adjusted)
    stage.events[-1] = replace(event, change={**event.change, "action": "fly"})


@pytest.mark.parametrize(
    ("kind", "spoil"), BREAKS, ids=[f"{kind}: {item.__name__}" for kind, item in BREAKS]
)
def test_each_violation_is_found(kind: str, spoil: Break) -> None:
    stage = trained()
    assert stage.check() == []
    spoil(stage)
    found = stage.check()
    assert kind in {item.kind for item in found}
    for item in found:
        assert item.kind in KINDS
        assert RUN in item.text
        assert str(item).startswith(f"{item.kind}: run 'run': ")


class TestLog:
    def test_a_gap(self) -> None:
        stage = trained()
        rows = rechained(stage.events)
        del rows[5]
        violations = check(list(stage.histories.values()), {RUN: rows})
        assert [item.kind for item in violations] == ["log"]

    def test_a_wrong_digest(self) -> None:
        stage = trained()
        rows = rechained(stage.events)
        rows[5] = replace(rows[5], digest="0" * 64)
        violations = check(list(stage.histories.values()), {RUN: rows})
        assert [item.kind for item in violations] == ["log"]

    def test_a_log_that_is_gone(self) -> None:
        stage = trained()
        kinds = {item.kind for item in check(list(stage.histories.values()), {})}
        assert kinds == {"request lost", "loss lost", "not recorded"}


class TestLeaderMode:
    def test_what_was_declared_is_lost(self) -> None:
        stage = led()
        del stage.events[last_event(stage, core.Declared) :]
        assert "request lost" in stage.kinds()

    def test_more_was_used_than_was_permitted(self) -> None:
        stage = led()
        record = dict(stage.histories["r0.0"][-1])
        for at in range(13, 17):
            stage.histories["r0.0"].append({**record, "t": record["t"] + at, "progress": at})
        assert "not recorded" in stage.kinds()

    def test_a_step_used_something_else_than_was_declared(self) -> None:
        stage = led()
        record = next(item for item in stage.histories["r0.0"] if item.get("progress") == 10)
        record["learning_rates"] = [next_bit(float.fromhex(record["learning_rates"][0])).hex()]
        assert "one value" in stage.kinds()

    def test_a_declaration_comes_twice(self) -> None:
        stage = led()
        stage.events.append(stage.events[last_event(stage, core.Declared)])
        assert "request repeated" in stage.kinds()

    def test_a_declaration_beyond_its_permit(self) -> None:
        stage = led()
        index = last_event(stage, core.Permitted)
        event = stage.events[index]
        assert isinstance(event, core.Permitted)
        stage.events[index] = replace(event, end=11)
        assert "beyond the horizon" in stage.kinds()


class TestSecondOpinions:
    """What the core decides is worked out without it, too: here the core itself is wrong."""

    def test_it_speaks_of_every_value(self) -> None:
        stage = trained()
        stage.adjust(0.5)
        stage.waive()
        stage.values(12)
        stage.open(10, who="r0.1")
        stage.values(10, who="r0.1")
        story = Story(RUN, rechained(stage.events))
        said = dict(Evaluation(story).attempts())
        assert {number: set(values) for number, values in said.items()} == {
            number: set(attempt.values) for number, attempt in story.attempts.items()
        }
        assert len(said[1]) == 20
        assert len(said[2]) == 4

    def test_a_decision_that_comes_a_step_early(self, monkeypatch: pytest.MonkeyPatch) -> None:
        values = core.Plan.values
        monkeypatch.setattr(core.Plan, "values", lambda self, at: values(self, at + 1))
        stage = trained()
        # The core agrees with itself.
        assert stage.kinds() == {"n + D"}

    def test_values_that_are_not_those_of_the_simulator(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stage = trained()
        simulate = core.simulate

        def other(given: core.RunSpec, reports: Any) -> Any:
            for step in simulate(given, reports):
                rates = tuple(map(next_bit, step.learning_rates))
                yield replace(step, learning_rates=rates)

        monkeypatch.setattr(core, "simulate", other)
        assert stage.kinds() == {"simulation"}

    def test_a_loss_that_does_not_move_the_horizon(self, monkeypatch: pytest.MonkeyPatch) -> None:
        stage = trained()
        horizon: Any = core.RunState.horizon
        monkeypatch.setattr(
            core.RunState, "horizon", property(lambda self: horizon.__get__(self) + 1)
        )
        assert "replay" in stage.kinds()


def test_every_kind_is_broken_somewhere() -> None:
    elsewhere = {"log", "n + D", "simulation"}
    assert {kind for kind, _ in BREAKS} | elsewhere == set(KINDS)


def test_a_server_with_several_replicas_behind_one_address_may_lag() -> None:
    stage = trained()
    both = f"{SERVER},127.0.0.1:2"
    stage.values(11, server=both)
    stage.values(11, server=both)
    alter(*find(stage, "GetValues"), lambda response: setattr(response, "horizon", 15))
    assert stage.kinds() == set()
