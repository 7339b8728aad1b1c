"""A served page with runs to look at: what trainers and operators do to them besides the page."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import grpc

import lrpilot.client as lrpilot
from lrpilot.v1 import runs_pb2 as pb
from lrpilot.v1.runs_pb2_grpc import RunServiceStub
from tests.e2e.harness import DEADLINE_S, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import TracebackType

DELAY = 4

SIGNED = {"reason": "to see it", "author": "oncall@node-7"}

_NUMBERS = itertools.count(1)


def spec_of(name: str, **fields: Any) -> dict[str, Any]:
    """Return a spec on a constant LR of 1e-3 with a policy that never acts, plus `fields`."""
    return {
        "name": name,
        "total": 1000,
        "learning_rate": {"peak": 1e-3},
        "weight_decay": 0.1,
        "policies": [{"kind": "plateau", "patience": 1000}],
        "feedback": {"delay": DELAY, "timeout": "60s", "advice_expires": 500},
    } | fields


ADVISING: dict[str, Any] = {"policies": [{"kind": "plateau", "patience": 0, "mode": "advise"}]}
"""Fields of a spec whose policy advises to cut the LR at each loss that is no improvement."""

ACTING: dict[str, Any] = {"policies": [{"kind": "plateau", "patience": 0, "cooldown": 1000}]}
"""Fields of a spec whose policy cuts the LR at the first loss that is no improvement."""


class Site:
    """A server as its operators have it; `grpc`, `http`: its addresses, HOST:PORT."""

    def __init__(self, grpc_address: str, http_address: str) -> None:
        self.grpc, self.http = grpc_address, http_address
        self._channel = grpc.insecure_channel(grpc_address)
        self._runs: Any = RunServiceStub(self._channel)
        self._pilots: list[lrpilot.Pilot] = []

    def __enter__(self) -> Site:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for pilot in self._pilots:
            pilot._end(0.0)
        self._channel.close()

    def url(self, path: str = "/") -> str:
        """Return the address of a page."""
        return f"http://{self.http}{path}"

    def call(self, method: str, **fields: Any) -> Any:
        """Call a method of RunService by the fields of its request."""
        request = getattr(pb, f"{method}Request")(**fields)
        return getattr(self._runs, method)(request, timeout=DEADLINE_S)

    def run(self, name: str) -> pb.Run:
        """Return a run."""
        run: pb.Run = self.call("GetRun", run=name).run
        return run

    def adjustments(self, name: str) -> list[pb.Adjustment]:
        """Return the adjustments of a run."""
        return list(self.run(name).adjustments)

    def create(self, name: str, **fields: Any) -> None:
        """Create a run that no trainer has opened."""
        document = json.dumps(spec_of(name, **fields))
        self.call("CreateRun", spec_document=document, request_id=_fresh())

    def adjust(self, name: str, **fields: Any) -> Any:
        """Change the plan of a run, as an operator at another place."""
        return self.call("AdjustRun", run=name, **(SIGNED | fields), request_id=_fresh())

    def revise(self, name: str, **fields: Any) -> Any:
        """Give a run another spec."""
        document = json.dumps(spec_of(name, **fields))
        return self.call(
            "ReviseRun", run=name, spec_document=document, **SIGNED, request_id=_fresh()
        )

    def delete(self, name: str) -> None:
        """Delete a run."""
        self.call("DeleteRun", run=name, force=True)

    def finish(self, name: str) -> None:
        """Finish a run."""
        self.call("FinishRun", run=name, force=True, request_id=_fresh())

    def attach(self, name: str, **fields: Any) -> None:
        """Give a run another spec as its trainer does before it opens an attempt."""
        pilot = lrpilot.connect(
            self.grpc, run=name, spec=spec_of(name, **fields), on_change="revise"
        )
        self._pilots.append(pilot)

    def train(
        self,
        name: str,
        losses: Iterable[float] = (),
        *,
        resume_at: int | None = None,
        mode: Literal["independent", "leader"] = "independent",
        **fields: Any,
    ) -> Trainer:
        """Start the trainer of a run, and let it report losses."""
        spec = spec_of(name, **fields)
        pilot = lrpilot.connect(self.grpc, run=name, spec=spec, resume_at=resume_at, mode=mode)
        self._pilots.append(pilot)
        groups = spec.get("groups") or [{}]
        trainer = Trainer(self, name, pilot, [item.get("name") for item in groups], resume_at or 0)
        trainer.report(losses)
        return trainer


class Trainer:
    """The one rank of a job."""

    def __init__(
        self,
        site: Site,
        name: str,
        pilot: lrpilot.Pilot,
        groups: Iterable[str | None],
        begin: int,
    ) -> None:
        self._site, self.name = site, name
        self._groups = [
            {"lr": 1.0, "weight_decay": 1.0} | ({} if group is None else {"name": group})
            for group in groups
        ]
        self._scheduler = pilot.scheduler(SimpleNamespace(param_groups=self._groups))
        self._progress = begin

    def report(self, losses: Iterable[float]) -> None:
        """Report losses, one a step, and wait until the server has them."""
        for loss in losses:
            self._scheduler.step(loss=loss)
            self._progress += 1
        wait_until(
            lambda: self._site.run(self.name).frontier >= self._progress,
            f"{self.name} has the loss at {self._progress - 1}",
        )

    @property
    def rates(self) -> list[float]:
        """The LR that each group uses now."""
        return [float(group["lr"]) for group in self._groups]


def falling(count: int, first: float = 3.0) -> Iterator[float]:
    """Yield losses that fall all along, so that no policy finds anything."""
    for index in range(count):
        yield first - index / 1000


def _fresh() -> str:
    return f"web-{next(_NUMBERS)}"
