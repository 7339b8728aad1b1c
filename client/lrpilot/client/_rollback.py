"""Going back: snapshots of a training in memory or in files, and the handler that restores one."""

import copy
import importlib
import logging
import os
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lrpilot.client import _timing
from lrpilot.client._arguments import integer
from lrpilot.client._directives import Directive
from lrpilot.client._errors import (
    AttemptNotOpen,
    DirectiveDeclined,
    JoinRefused,
    LrpilotError,
    invalid_argument,
)
from lrpilot.client._pilot import Pilot
from lrpilot.client._scheduler import Scheduler
from lrpilot.client._session import agree

logger = logging.getLogger("lrpilot.client")

MEMORY = "memory"
"""Value of `where` for snapshots in the memory of the host."""


@dataclass(frozen=True)
class SnapshotCost:
    """What the snapshots of one rank cost."""

    taken: int
    """Number taken so far."""
    newest_bytes: int
    """Size of the newest one."""
    newest_s: float
    """Time for which it stopped the training."""
    total_s: float
    """The same of all together."""
    held_bytes: int
    """Size of those that are kept now."""


class RollbackHandler:
    """Goes back to before the damage on a rollback directive; for plain torch and for DDP.

    Making it registers it with the pilot: that is the consent to rollbacks. From then on each
    `every` steps `Scheduler.step` takes a snapshot of the model, the optimizer, what `also` names,
    and, where the data is to be repeated, the random states and the data position. The first one
    is taken at once, so make it when everything is loaded.

    On a directive it takes the newest snapshot from before the damage that every rank has, opens
    the attempt there (`Pilot.roll_back`), and restores it on all ranks. Where none is old enough
    it declines: the server is told which there are, and training goes on. So `every * keep` steps
    should reach further back than the policies take to be sure.

    Args:
        pilot: the pilot of this process. Every rank makes the handler alike.
        model: the model, wrapped by DDP or not.
        optimizer: its optimizer.
        scheduler: its scheduler, of this pilot.
        data: what knows the data position, with `state_dict()` and `load_state_dict()`, such as
            torchdata's StatefulDataLoader or a sampler; read where `skip` is false alone.
        also: more objects with `state_dict()` and `load_state_dict()`, such as a gradient scaler.
        every: steps between two snapshots.
        keep: how many are kept, the newest ones, beside the very first one.
        where: "memory" keeps them on the CPU; a path keeps them in files of that directory, one
            directory in it per rank. Files left there by an earlier start are removed.
        skip: true: the data goes on where the directive was met, so that the batches since the
            snapshot are passed over; the random states go on too, since batches are often drawn
            from them. False: both are restored, and the same batches come again.

    Raises InvalidArgument.
    """

    def __init__(
        self,
        pilot: Pilot,
        *,
        model: Any,
        optimizer: Any,
        scheduler: Scheduler,
        data: Any = None,
        also: Sequence[Any] = (),
        every: int = 100,
        keep: int = 8,
        where: "str | os.PathLike[str]" = MEMORY,
        skip: bool = True,
    ) -> None:
        if not isinstance(pilot, Pilot):
            raise invalid_argument("pilot", pilot, "what connect() returned")
        if not isinstance(scheduler, Scheduler) or scheduler._session is not pilot._session:
            raise invalid_argument("scheduler", scheduler, "what pilot.scheduler() returned")
        place = pilot._session.place
        if place.world_size > 1 and place.group is None:
            raise invalid_argument(
                "pilot",
                f"one of {place.world_size} ranks without a process group",
                "one rank, or ranks with a process group: they agree on the snapshot, and none may "
                "go back before the others have met the directive",
            )
        named = {"model": model, "optimizer": optimizer}
        named |= {f"also[{at}]": item for at, item in enumerate(also)}
        for name, item in named.items() if data is None else [*named.items(), ("data", data)]:
            if not hasattr(item, "state_dict") or not hasattr(item, "load_state_dict"):
                raise invalid_argument(
                    name, item, "an object with state_dict() and load_state_dict()"
                )
        self._pilot = pilot
        self._scheduler = scheduler
        self._restored = list(named.values())
        self._repeated = [] if skip or data is None else [data]
        self._skip = skip
        self._every = integer("every", every, 1, _timing.MAX_PROGRESS)
        self._keep = integer("keep", keep, 1, _timing.MAX_PROGRESS)
        self._store: _Store = _Memory()
        if where != MEMORY:
            if not isinstance(where, (str, os.PathLike)) or not os.fspath(where):
                raise invalid_argument("where", where, f"{MEMORY!r}, or the path of a directory")
            self._store = _Files(Path(where) / f"rank-{pilot.rank}")
        self._sizes: dict[int, int] = {}
        """Bytes of each snapshot kept, by its progress, in order."""
        self._cost = SnapshotCost(0, 0, 0.0, 0.0, 0)
        self._steps = 0
        pilot.on_directive("rollback", self)
        pilot._session.after_step.append(self._after_step)
        try:
            self._take(scheduler.progress)
        except AttemptNotOpen:
            # The scheduler is deferred; the first step makes the first snapshot.
            self._steps = self._every - 1

    @property
    def snapshots(self) -> tuple[int, ...]:
        """Progress of each snapshot that is kept, in order."""
        return tuple(self._sizes)

    @property
    def cost(self) -> SnapshotCost:
        """What the snapshots cost this rank."""
        return self._cost

    def __call__(self, directive: Directive) -> None:
        """Go back, on every rank together. Raises DirectiveDeclined, and as roll_back does."""
        to = self._common(directive.before)
        state = self._read(to)
        came_from = self._scheduler.progress
        self._pilot.roll_back(directive, to)
        for item, saved in zip(self._restored, state["restored"], strict=True):
            item.load_state_dict(saved)
        for item, saved in zip(self._repeated, state["repeated"], strict=True):
            item.load_state_dict(saved)
        if not self._skip:
            _set_random(state["random"])
        # The optimizer's state brought the values of then.
        for scheduler in list(self._pilot._session.schedulers):
            scheduler.go_to(to)
        self._forget([at for at in self._sizes if at > to])
        self._steps = 0
        logger.warning(
            "run %s: rank %d went back from progress %d to %d (%s); %s",
            self._pilot.run,
            self._pilot.rank,
            came_from,
            to,
            directive.reason,
            "the data goes on" if self._skip else "the same data comes again",
        )

    def _common(self, before: int) -> int:
        """Return the newest snapshot from before a progress that all ranks have."""
        kept = list(self._sizes)
        group = self._pilot._session.place.group
        everywhere = [kept] if group is None else group.gather(kept)
        common: set[int] = set.intersection(*map(set, everywhere))
        old_enough = [at for at in common if at < before]
        if not old_enough:
            oldest = f"the oldest is at {min(common)}" if common else "there is none on all ranks"
            raise DirectiveDeclined(
                f"no snapshot lies before progress {before}: {oldest} (one each {self._every} "
                f"steps, the first and the last {self._keep} are kept)",
                facts={"before": before, "snapshots": sorted(common)},
            )
        return max(old_enough)

    def _read(self, progress: int) -> Mapping[str, Any]:
        """Return a snapshot; where one rank cannot read its own, none goes back."""
        state: Mapping[str, Any] = {}
        problem: LrpilotError | None = None
        try:
            state = self._store.get(progress)
        except Exception as error:
            problem = DirectiveDeclined(
                f"the snapshot at progress {progress} cannot be read: {error!r}",
                facts={"snapshot": progress},
            )
        agree(self._pilot._session.place.group, problem, {}, JoinRefused, "")
        return state

    def _after_step(self) -> None:
        self._steps += 1
        if self._steps >= self._every:
            self._steps = 0
            self._take(self._scheduler.progress)

    def _take(self, progress: int) -> None:
        start_s = time.perf_counter()
        size = self._store.put(
            progress,
            {
                "restored": [item.state_dict() for item in self._restored],
                "repeated": [item.state_dict() for item in self._repeated],
                "random": None if self._skip else _get_random(),
            },
        )
        self._sizes[progress] = size
        # The first one beside the newest: a training that never took off goes back to its start.
        self._forget(list(self._sizes)[1 : -self._keep])
        spent_s = time.perf_counter() - start_s
        if not self._cost.taken:
            logger.info(
                "run %s: a snapshot of rank %d takes %d bytes and %.3f s; one each %d steps, the "
                "first and the last %d are kept in %s",
                self._pilot.run,
                self._pilot.rank,
                size,
                spent_s,
                self._every,
                self._keep,
                self._store,
            )
        self._cost = SnapshotCost(
            taken=self._cost.taken + 1,
            newest_bytes=size,
            newest_s=spent_s,
            total_s=self._cost.total_s + spent_s,
            held_bytes=sum(self._sizes.values()),
        )

    def _forget(self, progresses: Sequence[int]) -> None:
        for progress in progresses:
            del self._sizes[progress]
            self._store.drop(progress)


# Where snapshots are kept.


class _Store(Protocol):
    """Keeps states by progress."""

    def put(self, progress: int, state: Mapping[str, Any]) -> int:
        """Keep a copy of a state and return its size in bytes."""

    def get(self, progress: int) -> Mapping[str, Any]:
        """Return a copy of a state, its tensors on the CPU."""

    def drop(self, progress: int) -> None:
        """Keep a state no longer."""


class _Memory:
    def __init__(self) -> None:
        self._states: dict[int, Mapping[str, Any]] = {}

    def __str__(self) -> str:
        return "memory"

    def put(self, progress: int, state: Mapping[str, Any]) -> int:
        self._states[progress] = _copied(state)
        return _size(self._states[progress])

    def get(self, progress: int) -> Mapping[str, Any]:
        # Optimizers go on with the tensors that they are given.
        state: Mapping[str, Any] = _copied(self._states[progress])
        return state

    def drop(self, progress: int) -> None:
        del self._states[progress]


class _Files:
    def __init__(self, directory: Path) -> None:
        self._torch = importlib.import_module("torch")
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        for left in directory.glob("progress-*.pt*"):
            left.unlink()

    def __str__(self) -> str:
        return str(self._directory)

    def put(self, progress: int, state: Mapping[str, Any]) -> int:
        path = self._path(progress)
        partial = path.with_name(f"{path.name}.partial")
        self._torch.save(state, partial)
        partial.replace(path)
        return path.stat().st_size

    def get(self, progress: int) -> Mapping[str, Any]:
        # Random states are no tensors; the file is this process's own.
        state: Mapping[str, Any] = self._torch.load(
            self._path(progress), map_location="cpu", weights_only=False
        )
        return state

    def drop(self, progress: int) -> None:
        self._path(progress).unlink(missing_ok=True)

    def _path(self, progress: int) -> Path:
        return self._directory / f"progress-{progress}.pt"


def _copied(item: Any) -> Any:
    """Return a deep copy with every tensor on the CPU."""
    if hasattr(item, "detach") and hasattr(item, "device"):
        return item.detach().to("cpu", copy=True)
    if isinstance(item, Mapping):
        return {key: _copied(held) for key, held in item.items()}
    if type(item) in (list, tuple):
        return type(item)(_copied(held) for held in item)
    return copy.deepcopy(item)


def _size(item: Any) -> int:
    """Return the bytes of every tensor in a copy."""
    if hasattr(item, "detach") and hasattr(item, "device"):
        return int(item.numel() * item.element_size())
    if isinstance(item, Mapping):
        return sum(_size(held) for held in item.values())
    if isinstance(item, (list, tuple)):
        return sum(_size(held) for held in item)
    return 0


# Random states.


def _get_random() -> dict[str, Any]:
    """Return the states of Python's, NumPy's and torch's generators, on the CPU and on CUDA."""
    torch = importlib.import_module("torch")
    state = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        state["numpy"] = numpy.random.get_state()
    return state


def _set_random(state: Mapping[str, Any]) -> None:
    torch = importlib.import_module("torch")
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])
    if "numpy" in state:
        sys.modules["numpy"].random.set_state(state["numpy"])
