"""The same losses give the same values, bit for bit, however and whenever they come."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
import pytest

import lrpilot.client as lrpilot
from lrpilot.v1 import trainer_pb2 as pb
from lrpilot.v1.trainer_pb2_grpc import TrainerServiceStub
from tests.e2e.harness import DEADLINE_S, Expected, Spec, make_spec
from tests.e2e.training import Optimizer
from tests.rules.reference import Hex
from tests.server.conftest import Program

STEPS = 100

Trace = dict[int, Hex]
Losses = Mapping[int, float | None]
"""Each used progress, and its loss if there is one."""


def patterns() -> dict[str, Losses]:
    """Return what jobs report: at each step, every 10 steps, at increments beyond any delay."""
    noise = random.Random("losses")
    losses = [1.0 + 0.1 * noise.random() for _ in range(STEPS)]
    losses[7], losses[40] = float("nan"), float("inf")
    ramp = itertools.accumulate(noise.choice([5, 13, 40]) for _ in losses)
    return {
        "dense": dict(enumerate(losses)),
        "sparse": {n: loss if n % 10 == 9 else None for n, loss in enumerate(losses)},
        "strides": {13 * n: loss for n, loss in enumerate(losses)},
        "ramp": dict(zip((0, *ramp), losses, strict=False)),
    }


def spec_of(name: str, pattern: str, delay: int) -> Spec:
    unit = "iterations" if pattern in {"dense", "sparse"} else "samples"
    policy = {"kind": "plateau", "patience": 1, "factor": 0.9}
    return make_spec(name, delay=delay, unit=unit, policies=[policy])


@dataclass
class Raw:
    """A run behind the bare contract: one caller that reports and asks as it likes."""

    stub: Any
    spec: Spec
    losses: Losses

    def __post_init__(self) -> None:
        self.run: str = self.spec["name"]
        self.incarnation = uuid.uuid4().hex
        self.stub.AttachRun(
            pb.AttachRunRequest(
                run=self.run, spec_document=json.dumps(self.spec), request_id="attach"
            ),
            timeout=DEADLINE_S,
        )
        opened = self.stub.OpenAttempt(
            pb.OpenAttemptRequest(run=self.run, request_id="open", incarnation=self.incarnation),
            timeout=DEADLINE_S,
        )
        self.attempt, self.horizon = opened.attempt, opened.horizon
        self.steps = sorted(self.losses)
        self.trace: Trace = {}

    def reports(self, first: int, last: int, merged: bool) -> list[pb.LossReport]:
        """Return the reports of steps; `merged`: those without a loss go into the one before."""
        reports: list[pb.LossReport] = []
        for index in range(first, last):
            here = self.steps[index]
            there = self.steps[index + 1] if index + 1 < len(self.steps) else here + 1
            loss = self.losses[here]
            if loss is None and merged and reports:
                reports[-1].moves_to = there
            else:
                reports.append(pb.LossReport(progress=here, loss=loss, moves_to=there))
        return reports

    def report(self, reports: list[pb.LossReport], timeout_s: float = DEADLINE_S) -> list[int]:
        request = pb.ReportLossesRequest(
            run=self.run, attempt=self.attempt, incarnation=self.incarnation, reports=reports
        )
        answer = self.stub.ReportLosses(request, timeout=timeout_s)
        self.horizon = answer.horizon
        return list(answer.outcomes)

    def ask(self, begin: int, stride: int, count: int) -> None:
        """Ask for values below the horizon, and keep those of steps."""
        request = pb.GetValuesRequest(
            run=self.run, attempt=self.attempt, begin=begin, stride=stride, count=count
        )
        block = self.stub.GetValues(request, timeout=DEADLINE_S).block
        assert block.begin == begin
        for index, values in enumerate(zip(block.learning_rates, block.weight_decays, strict=True)):
            progress = begin + index * block.stride
            if progress in self.losses:
                got = tuple(value.hex() for value in values)
                assert self.trace.setdefault(progress, got) == got


def one_by_one(stub: Any, spec: Spec, losses: Losses) -> Trace:
    """Ask for the values of a step, report its loss, go on to the next."""
    run = Raw(stub, spec, losses)
    for index, here in enumerate(run.steps):
        run.ask(here, 1, 1)
        run.report(run.reports(index, index + 1, merged=False))
    return run.trace


def at_random(stub: Any, spec: Spec, losses: Losses, moments: random.Random) -> Trace:
    """Report in batches, twice, with lost answers; ask for blocks on any stride, in any order."""
    run = Raw(stub, spec, losses)
    reported = 0
    while len(run.trace) < len(run.steps):
        if moments.random() < 0.4 and reported < len(run.steps):
            upto = min(reported + moments.randint(1, 12), len(run.steps))
            reports = run.reports(reported, upto, merged=moments.random() < 0.5)
            if moments.random() < 0.3:
                # Its answer comes too late, or it does not even arrive.
                with contextlib.suppress(grpc.RpcError):
                    run.report(reports, timeout_s=moments.uniform(0.0005, 0.004))
            run.report(reports)
            if moments.random() < 0.3:
                assert set(run.report(reports)) == {pb.REPORT_OUTCOME_REPEATED}
            reported = upto
        else:
            fixed = [n for n in run.steps if n < run.horizon]
            missing = [n for n in fixed if n not in run.trace]
            begin = moments.choice(missing if missing and moments.random() < 0.7 else fixed)
            run.ask(begin, moments.choice([1, 1, 2, 3, 13]), moments.randint(1, 20))
    return run.trace


def with_clients(address: str, spec: Spec, losses: Losses, moments: random.Random) -> Trace:
    """Let two ranks train, each at its own pace."""
    traces: list[Trace] = [{}, {}]
    failed: list[BaseException] = []
    steps = sorted(losses)
    key = uuid.uuid4().hex

    def train(rank: int, pauses: random.Random) -> None:
        options: dict[str, Any] = {"spec": spec, "key": key, "rank": rank, "world_size": 2}
        try:
            with lrpilot.connect(address, run=spec["name"], **options) as pilot:
                optimizer = Optimizer()
                scheduler = pilot.scheduler(optimizer)
                for here, there in itertools.pairwise(steps):
                    traces[rank][here] = optimizer.values
                    time.sleep(pauses.choice([0.0, 0.0, 0.001, 0.01]))
                    scheduler.step(there - here, loss=losses[here])
                traces[rank][steps[-1]] = optimizer.values
        except BaseException as error:
            failed.append(error)
            raise

    threads = [
        threading.Thread(target=train, args=(rank, random.Random(moments.random())), daemon=True)
        for rank in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
    assert not failed
    assert traces[0] == traces[1]
    return traces[0]


@pytest.mark.parametrize("delay", [1, 3, 8])
@pytest.mark.parametrize("pattern", list(patterns()))
def test_timing_changes_no_bit(shared: Program, pattern: str, delay: int) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")  # noqa: T201 (shown when the test fails)
    moments = random.Random(seed)
    losses = patterns()[pattern]
    with grpc.insecure_channel(
        shared.grpc, options=[("grpc.use_local_subchannel_pool", 1)]
    ) as channel:
        stub: Any = TrainerServiceStub(channel)
        ways: dict[str, Callable[[Spec], Trace]] = {
            "one-by-one": lambda spec: one_by_one(stub, spec, losses),
            "random-1": lambda spec: at_random(stub, spec, losses, moments),
            "random-2": lambda spec: at_random(stub, spec, losses, moments),
            "clients": lambda spec: with_clients(shared.grpc, spec, losses, moments),
        }
        traces = {}
        for way, play in ways.items():
            spec = spec_of(f"{pattern}-{delay}-{way}", pattern, delay)
            traces[way] = play(spec)
    reference = Expected.of(spec)
    reference.open(0)
    reference.feed(losses)
    assert len(reference.decided().cuts) >= 2
    expected = {n: reference.expected(n) for n in losses}
    for way, trace in traces.items():
        assert trace == expected, way
