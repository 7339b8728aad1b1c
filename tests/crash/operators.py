"""What people do to a run while it trains: adjust, hold, release, undo, revise, approve, look."""

import json
import queue
import random
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc

from lrpilot.client._address import read_target
from lrpilot.v1 import runs_pb2 as pb
from lrpilot.v1.runs_pb2_grpc import RunServiceStub
from tests.crash.history import HistoryWriter, RecordedChannel

PATIENCE_S = 20.0
"""How long an operator repeats a request that finds no answer."""

CALL_S = 2.0

PAUSE_S = 0.05

UNANSWERED = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
}
"""Statuses after which an operator sends the same request again, as the programs do."""

ACTIONS = (
    *("scale_lr", "scale_lr", "set_lr", "scale_weight_decay", "hold", "release", "undo", "total"),
    *("begin_decay", "evaluate", "rollback", "revise", "approve", "dry_run"),
)
"""What may be asked for; what stands twice comes twice as often."""


class Operator:
    """One person, on a thread of its own: does one thing after the other, each until answered."""

    def __init__(
        self, folder: Path, who: str, address: str, spec: Mapping[str, Any], seed: object
    ) -> None:
        self._history = HistoryWriter(folder / f"{who}.jsonl", who)
        target = read_target(address)
        channel = grpc.insecure_channel(
            target.name, options=[("grpc.use_local_subchannel_pool", 1), *target.options]
        )
        self._channel = RecordedChannel(channel, address, self._history)
        self._stub: Any = RunServiceStub(self._channel)
        self._who, self._spec = who, spec
        self._random = random.Random(f"{seed}/{who}")
        self._made: list[str] = []
        """Ids of the adjustments that were made."""
        self._todo: queue.SimpleQueue[tuple[str, int] | None] = queue.SimpleQueue()
        self.unanswered: list[str] = []
        """Actions that found no answer in time."""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def ask(self, action: str, progress: int) -> None:
        """Do something soon; `progress` is where the training is."""
        self._todo.put((action, progress))

    def close(self) -> None:
        """Return once everything is done."""
        self._todo.put(None)
        self._thread.join()
        self._channel.close()
        self._history.close()

    def _run(self) -> None:
        while (todo := self._todo.get()) is not None:
            action, progress = todo
            try:
                self._do(action, progress)
            except grpc.RpcError as error:
                if error.code() in UNANSWERED:
                    self.unanswered.append(f"{self._who}: {action}: {error.details()}")

    def _do(self, action: str, progress: int) -> None:
        dice = self._random
        fields: dict[str, Any] = {
            "run": self._spec["name"],
            "author": self._who,
            "request_id": f"{self._who}-{dice.getrandbits(64):x}",
        }
        match action:
            case "revise":
                self._revise(fields)
                return
            case "approve":
                self._approve(fields)
                return
            case "undo":
                if not self._made:
                    return
                fields["undo"] = dice.choice(self._made)
            case "hold" | "release":
                fields[action] = True
            case "scale_lr" | "scale_weight_decay":
                fields[action] = dice.choice([0.5, 0.9, 1.1])
            case "set_lr":
                fields[action] = dice.uniform(1e-4, 1e-2)
            case "total":
                fields[action] = self._spec["total"] + dice.randint(1, 1000)
            case "begin_decay":
                fields[action] = pb.BeginDecay(length=str(dice.randint(50, 500)))
            case "dry_run":
                fields |= {"scale_lr": 0.5, "dry_run": True, "request_id": ""}
            case "rollback":
                fields["directive"] = pb.DirectiveRequest(
                    kind="rollback", before=max(progress - dice.randint(0, 30), 0), factor=0.5
                )
            case _:
                fields["directive"] = pb.DirectiveRequest(kind=action)
        answer = self._until("AdjustRun", pb.AdjustRunRequest(reason=f"to {action}", **fields))
        if answer.HasField("adjustment"):
            self._made.append(answer.adjustment.id)

    def _revise(self, fields: Mapping[str, Any]) -> None:
        spec = dict(self._spec)
        rates = dict(spec["learning_rate"])
        rates["peak"] *= self._random.choice([0.5, 1.5])
        spec["learning_rate"] = rates
        document = json.dumps(spec)
        self._until("ReviseRun", pb.ReviseRunRequest(spec_document=document, **fields))

    def _approve(self, fields: Mapping[str, Any]) -> None:
        run = self._until("GetRun", pb.GetRunRequest(run=fields["run"])).run
        advice = [item.id for item in run.adjustments if item.status == "advice"]
        if advice:
            chosen = self._random.choice(advice)
            self._until("ApproveAdvice", pb.ApproveAdviceRequest(advice=chosen, **fields))

    def _until(self, method: str, request: Any) -> Any:
        """Return the answer to a request. Raises grpc.RpcError: refused, or out of patience."""
        end_s = time.monotonic() + PATIENCE_S
        while True:
            try:
                return getattr(self._stub, method)(request, timeout=CALL_S)
            except grpc.RpcError as error:
                if error.code() not in UNANSWERED or time.monotonic() > end_s:
                    raise
            time.sleep(PAUSE_S)
