"""Attaching, and opening or joining an attempt."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest

import lrpilot.client as lrpilot
from lrpilot.client import _timing
from lrpilot.v1 import trainer_pb2 as pb

if TYPE_CHECKING:
    from tests.client.conftest import FakeOptimizer, FakeTrainer, Fault

    Connect = Callable[..., lrpilot.Pilot]
    Refuse = Callable[..., Fault]

SPEC = "name: small\ntotal: 10\n"


@pytest.mark.parametrize("form", ["path", "str", "text", "mapping", "none"])
def test_forms_of_a_spec(trainer: FakeTrainer, connect: Connect, tmp_path: Path, form: str) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(SPEC, encoding="utf-8")
    mapping = MappingProxyType({"name": "small", "groups": [MappingProxyType({"name": "naïve"})]})
    specs = {"path": path, "str": str(path), "text": SPEC, "mapping": mapping, "none": None}
    connect(spec=specs[form])
    (request,) = trainer.calls["AttachRun"]
    if form == "mapping":
        assert json.loads(request.spec_document) == {"name": "small", "groups": [{"name": "naïve"}]}
        # YAML joins no surrogates, hence the text itself.
        assert "naïve" in request.spec_document
    else:
        assert request.spec_document == ("" if form == "none" else SPEC)
    assert (request.run, request.on_change) == ("small", pb.ON_CHANGE_REFUSE)


def test_a_spec_as_json_in_one_line(trainer: FakeTrainer, connect: Connect) -> None:
    connect(spec='{"name": "small", "total": 10}')
    assert trainer.calls["AttachRun"][0].spec_document == '{"name": "small", "total": 10}'


def test_a_spec_with_numbers_of_numpy(trainer: FakeTrainer, connect: Connect) -> None:
    connect(spec={"total": np.int64(10), "learning_rate": {"peak": np.float32(0.5)}})
    document = json.loads(trainer.calls["AttachRun"][0].spec_document)
    assert document == {"total": 10, "learning_rate": {"peak": 0.5}}


def test_on_change_is_sent(trainer: FakeTrainer, connect: Connect) -> None:
    connect(on_change="revise")
    assert trainer.calls["AttachRun"][0].on_change == pb.ON_CHANGE_REVISE


@pytest.mark.parametrize(
    ("argument", "got"),
    [
        ("address", ""),
        ("address", 5),
        ("run", ""),
        ("run", None),
        ("spec", 5),
        ("spec", ""),
        ("spec", "no/such/file.yaml"),
        ("spec", {"name": object()}),
        ("on_change", "replace"),
        ("reporter", -1),
        ("reporter", 1),
        ("reporter", 0.0),
        ("resume_at", -1),
        ("resume_at", True),
        ("resume_at", 2**53 + 1),
        ("key", ""),
        ("rank", 1),
        ("rank", -1),
        ("outage_timeout_s", 0),
        ("outage_timeout_s", float("nan")),
        ("outage_timeout_s", float("inf")),
        ("outage_timeout_s", "1"),
    ],
)
def test_each_argument_is_checked(trainer: FakeTrainer, argument: str, got: Any) -> None:
    options = {"address": trainer.address, "run": "small", argument: got}
    with pytest.raises(lrpilot.InvalidArgument) as caught:
        lrpilot.connect(**options)
    assert str(caught.value).startswith(f"{argument}: got {got!r}; allowed: ")
    assert caught.value.facts["argument"] == argument
    assert trainer.calls["AttachRun"] == []


def test_a_damaged_spec_file_is_refused(connect: Connect, tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_bytes(b"name: \xff\n")
    with pytest.raises(lrpilot.InvalidArgument, match=r"spec: got .*can be read"):
        connect(spec=path)


def test_several_ranks_with_nothing_to_agree_over_are_refused(
    trainer: FakeTrainer, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(lrpilot.ConnectRefused, match="set RANK"):
        connect()
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(lrpilot.ConnectRefused, match=r"init_process_group\(\).*key="):
        connect()
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(lrpilot.InvalidArgument, match="environment variable WORLD_SIZE"):
        connect()
    assert trainer.calls["AttachRun"] == []
    assert connect(world_size=1, rank=0).rank == 0


def test_ranks_with_a_key_join(
    trainer: FakeTrainer, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        connect(key="start-7", reporter=1, resume_at=3).values(3)
    first, second = trainer.calls["OpenAttempt"]
    assert [first.key, second.key] == ["start-7", "start-7"]
    assert [first.rank, second.rank] == [0, 1]
    assert [first.reporter, second.reporter] == [1, 1]
    assert [first.progress, second.progress] == [3, 3]
    assert first.incarnation != second.incarnation
    assert first.request_id != second.request_id
    assert len(trainer.calls["AttachRun"]) == 2


@pytest.mark.parametrize("resume_at", [None, 0, 7])
def test_where_an_attempt_opens(
    trainer: FakeTrainer, connect: Connect, optimizer: FakeOptimizer, resume_at: int | None
) -> None:
    pilot = connect(resume_at=resume_at)
    assert (pilot.run, pilot.rank, pilot.attempt) == ("small", 0, None)
    scheduler = pilot.scheduler(optimizer)
    (request,) = trainer.calls["OpenAttempt"]
    assert request.HasField("progress") is (resume_at is not None)
    assert scheduler.progress == (resume_at or 0)
    assert pilot.attempt == 1


def test_a_state_goes_before_resume_at(
    trainer: FakeTrainer, connect: Connect, optimizer: FakeOptimizer
) -> None:
    state = {"version": 1, "run": "small", "progress": 9, "state": "Zm9sZA=="}
    connect(resume_at=7).scheduler(optimizer, state)
    (request,) = trainer.calls["OpenAttempt"]
    assert (request.progress, request.state) == (9, b"fold")


def test_a_call_is_repeated_with_the_same_request_id(
    trainer: FakeTrainer, connect: Connect, fault: type[Fault]
) -> None:
    lost = fault(after=True)
    for code in ("UNAVAILABLE", "CANCELLED", "RESOURCE_EXHAUSTED", "INTERNAL", "UNKNOWN"):
        trainer.fail("AttachRun", fault(grpc.StatusCode[code]))
    trainer.fail("AttachRun", lost)
    trainer.fail("OpenAttempt", lost, times=3)
    assert connect().values(0) == ((trainer.rate(0), trainer.decay(0)),)
    for method, count in (("AttachRun", 7), ("OpenAttempt", 4)):
        assert len(trainer.calls[method]) == count
        assert len({request.request_id for request in trainer.calls[method]}) == 1


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("AttachRun", "RunNotFound"),
        ("AttachRun", "SpecChanged"),
        ("OpenAttempt", "ResumePointRequired"),
        ("OpenAttempt", "JoinRefused"),
        ("OpenAttempt", "StateMismatch"),
        ("OpenAttempt", "RunFinished"),
    ],
)
def test_a_refusal_is_raised_at_once(
    trainer: FakeTrainer, connect: Connect, refuse: Refuse, method: str, reason: str
) -> None:
    trainer.fail(method, refuse(reason, "what to do"))
    with pytest.raises(getattr(lrpilot, reason), match="what to do"):
        connect().values(0)
    assert len(trainer.calls[method]) == 1


def test_an_attempt_that_was_refused_may_be_opened_again(
    trainer: FakeTrainer, connect: Connect, optimizer: FakeOptimizer, refuse: Refuse
) -> None:
    trainer.fail("OpenAttempt", refuse("ResumePointRequired"))
    pilot = connect()
    with pytest.raises(lrpilot.ResumePointRequired):
        pilot.scheduler(optimizer)
    state = {"version": 1, "run": "small", "progress": 9, "state": ""}
    assert pilot.scheduler(optimizer, state).progress == 9


def test_a_spec_at_fault_brings_every_violation(
    trainer: FakeTrainer, connect: Connect, refuse: Refuse
) -> None:
    fields = [("total", "got -1; allowed: at least 1"), ("name", "got 'A'; allowed: a name")]
    trainer.fail(
        "AttachRun",
        refuse("InvalidSpec", "2 mistakes", grpc.StatusCode.INVALID_ARGUMENT, violations=fields),
    )
    with pytest.raises(lrpilot.InvalidSpec) as caught:
        connect(spec=SPEC)
    assert [(item.field, item.description) for item in caught.value.violations] == fields
    for name, text in fields:
        assert f"{name}: {text}" in str(caught.value)


def test_a_server_that_is_away_ends_the_patience_of_connect(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_timing, "CONNECT_PATIENCE_S", 0.3)
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        with pytest.raises(lrpilot.ServerUnavailable) as caught:
            lrpilot.connect(address, run="small")
    assert address in str(caught.value)
    assert re.search(r"rank 0 attaches to the run: no answer from 127.* gives up", caplog.text)


def test_the_outage_timeout_bounds_opening_too(
    trainer: FakeTrainer, connect: Connect, fault: type[Fault]
) -> None:
    trainer.always["OpenAttempt"] = fault()
    pilot = connect(outage_timeout_s=60)
    assert pilot._session.link.outage_timeout_s == 60.0
    pilot._session.link.outage_timeout_s = 0.2
    with pytest.raises(lrpilot.ServerUnavailable, match="opens the attempt"):
        pilot.values(0)


def test_a_second_scheduler_shares_the_attempt(
    trainer: FakeTrainer, connect: Connect, make_optimizer: Callable[..., FakeOptimizer]
) -> None:
    pilot = connect(resume_at=4)
    state: Mapping[str, Any] = {"version": 1, "run": "small", "progress": 4, "state": ""}
    one, two = make_optimizer(), make_optimizer()
    pilot.scheduler(one)
    pilot.scheduler(two, state)
    assert one.rates == two.rates == [trainer.rate(4)]
    assert len(trainer.calls["OpenAttempt"]) == 1
    with pytest.raises(lrpilot.AttemptOpen, match="progress 4; a state of progress 5"):
        pilot.scheduler(make_optimizer(), {**state, "progress": 5})
