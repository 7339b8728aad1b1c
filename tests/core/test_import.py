"""A log that another server wrote: its attempts have ended here, all else goes on."""

from collections.abc import Sequence
from typing import Any

import pytest

from lrpilot import core

PLATEAU = {"kind": "plateau", "patience": 0, "factor": 0.5}
ORIGIN = "lrpilot 9.9 on there"


class Log:
    """A run on one server, driven by requests one after the other."""

    def __init__(self, rows: Sequence[bytes] = ()) -> None:
        self.state = core.fold("run", rows)
        self.rows = list(rows)

    def write(self, events: Sequence[core.Event]) -> list[core.Event]:
        for event in events:
            self.rows.append(core.encode(event))
            self.state.apply(event)
        return list(events)

    def create(self, **fields: Any) -> None:
        spec = core.parse_spec(
            {
                "name": "run",
                "total": 1000,
                "learning_rate": {"peak": 1.0},
                "feedback": {"delay": 4},
                "policies": [PLATEAU],
                **fields,
            }
        )
        self.write(core.create_run(self.state, spec, "create"))

    def open(self, **fields: Any) -> list[core.Event]:
        number = self.state.attempt + 1
        given = {"request_id": f"open {number}", "token": f"{number:032x}", "incarnation": "one"}
        return self.write(core.open_attempt(self.state, core.OpenRequest(**{**given, **fields})))

    def train(self, begin: int, losses: Sequence[float]) -> list[list[str]]:
        """Take the values of each step, report its loss; return the learning rates as hex."""
        taken = []
        for at, loss in enumerate(losses, begin):
            request = core.ValuesRequest(begin=at, count=1)
            found = core.get_values(self.state, request)
            if isinstance(found, core.Recorded):
                self.write([found])
                found = core.get_values(self.state, request)
            assert isinstance(found, core.Block)
            taken.append([value.hex() for value in found.learning_rates])
            report = core.Report(at, loss, 1.0, at + 1)
            events, _ = core.report_losses(self.state, [report], rank=0, incarnation="one")
            self.write(events)
        return taken

    def imported(self, request_id: str = "import", **fields: Any) -> "Log":
        """Return the log as another server takes it over."""
        there = Log()
        request = core.ImportRequest(
            **{
                "origin": ORIGIN,
                "exported_at_ns": 17,
                "request_id": request_id,
                "author": "me",
                "reason": "a move",
                **fields,
            }
        )
        events = core.import_run(there.state, self.state, request)
        moved = Log(self.rows)
        moved.write(events)
        return moved


def trained(**fields: Any) -> Log:
    log = Log()
    log.create(**fields)
    log.open(key="job")
    log.train(0, [3.0, 3.0, 2.0, 2.0, 1.0, 1.0])
    return log


def saved(log: Log, progress: int) -> dict[str, Any]:
    """Return the fields of a request that resumes from a state saved now."""
    state = core.read_state(core.save_state(log.state, progress), "run")
    return {"saved": state, "digest_at_saved": state.digest}


def test_the_event_as_bytes() -> None:
    event = core.Imported(ORIGIN, 17, "import", "me", "a move")
    assert core.decode(core.encode(event)) == event
    bare = core.Imported(ORIGIN, 17, "import")
    assert core.encode(bare) == (
        b'{"exported_at_ns":17,"kind":"imported","origin":"lrpilot 9.9 on there",'
        b'"request_id":"import"}'
    )
    assert core.decode(core.encode(bare)) == bare


def test_only_the_attempt_ends() -> None:
    log = trained()
    moved = log.imported()
    before, after = log.state, moved.state
    assert (after.seq, after.attempt, after.token, after.key) == (before.seq + 1, 1, "", "")
    assert after.imported_from == ORIGIN
    for name in ("frontier", "horizon", "in_use", "loss_values", "keys", "etag", "reporters"):
        kept = getattr(after, name), getattr(before, name)
        assert kept[0] == kept[1] or kept[0].to_mapping() == kept[1].to_mapping(), name
    assert after.plan.adjustments == before.plan.adjustments != ()
    assert list(after.records) == list(before.records)
    assert core.fold("run", moved.rows).snapshot() == after.snapshot()
    assert core.restore_snapshot(after.snapshot()).snapshot() == after.snapshot()


def test_every_request_of_an_attempt_is_told_where_the_run_is() -> None:
    state = trained().imported().state
    for refused in (
        lambda: core.check_attempt(state, 1, f"{1:032x}"),
        lambda: core.check_attempt(state, 1, ""),
        # The answer of the opening was lost, or another rank joins.
        lambda: core.open_attempt(state, core.OpenRequest(request_id="open 1", incarnation="one")),
        lambda: core.open_attempt(state, core.OpenRequest(request_id="new", key="job")),
    ):
        with pytest.raises(core.AttemptSuperseded, match=f"imported here from {ORIGIN}") as caught:
            refused()
        assert caught.value.facts["imported_from"] == ORIGIN


def test_a_checkpoint_goes_on_as_where_it_came_from() -> None:
    here = trained()
    resume = saved(here, 3)
    here.train(6, [1.0, 1.0])
    there = here.imported()
    losses = [2.0, 2.0, 1.0, 1.0, *[0.5] * 12]
    taken = []
    for log in (here, there):
        assert [event.kind for event in log.open(**resume)] == ["opened"]
        assert log.state.imported_from == ""
        taken.append(log.train(3, losses))
    assert taken[0] == taken[1]
    assert len({rate for (rate,) in taken[0]}) > 2
    with pytest.raises(core.AttemptSuperseded, match="superseded by attempt 2"):
        core.check_attempt(there.state, 1, f"{1:032x}")


def test_in_leader_mode_nobody_may_go_on_alone() -> None:
    log = Log()
    log.create()
    log.open(holder="a" * 32)
    log.train(0, [1.0])
    log.write(
        core.offer_values(log.state, core.OfferRequest(begin=1, stride=1, count=9), holder="a" * 32)
    )
    assert log.state.permitted > 1
    state = log.imported().state
    assert (state.holder, state.permitted) == ("", 0)


def test_a_run_without_an_attempt_or_finished() -> None:
    log = Log()
    log.create()
    moved = log.imported()
    assert [event.kind for event in moved.open()] == ["opened"]
    log.write(core.finish_run(log.state, "finish"))
    assert log.imported().state.finished


def test_a_run_that_is_here() -> None:
    log = trained()
    moved = log.imported()
    end = log.state
    again: dict[str, Any] = {"origin": ORIGIN, "exported_at_ns": 18, "author": "me", "reason": ""}
    # The repeat of a call, and another call for the same log.
    for fields in ({"request_id": "import"}, {"request_id": "x", "digest_there": end.digest}):
        request = core.ImportRequest(**{**again, **fields})
        assert core.import_run(moved.state, end, request) == []
    for digest, said in (("ab", "has digest ab there"), (None, f"ends at seq {moved.state.seq}")):
        request = core.ImportRequest(**again, request_id="x", digest_there=digest)
        with pytest.raises(
            core.RunExists, match=f"{end.digest} at seq {end.seq}, the one here"
        ) as caught:
            core.import_run(moved.state, end, request)
        assert said in str(caught.value)


def test_who_and_why_must_be_readable() -> None:
    with pytest.raises(core.InvalidRequest) as caught:
        trained().imported(author="a" * 1001, reason="b" * 1001)
    assert [item.field for item in caught.value.violations] == ["reason", "author"]
    assert trained().imported(author="", reason="").state.imported_from == ORIGIN


def test_operators_go_on_where_the_log_ends() -> None:
    log = trained()
    for run in (log, moved := log.imported()):
        action = core.ScaleLearningRate(0.5)
        run.write(core.adjust_run(run.state, action, reason="r", author="a", request_id="scale"))
    values = [[run.state.values(at) for at in range(6, 20)] for run in (log, moved)]
    assert values[0] == values[1]
