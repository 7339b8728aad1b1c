"""Connecting a training process to its run, and what it then holds."""

import atexit
import logging
import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Literal

import grpc

from lrpilot.client import _timing
from lrpilot.client._arguments import Spec, integer, positive, spec_reader, text
from lrpilot.client._call import Link
from lrpilot.client._errors import ConnectRefused, LrpilotError, invalid_argument
from lrpilot.client._launch import find_place
from lrpilot.client._lease import Values
from lrpilot.client._loss import Loss
from lrpilot.client._scheduler import Scheduler
from lrpilot.client._session import Session, agree
from lrpilot.v1 import trainer_pb2 as pb

logger = logging.getLogger("lrpilot.client")

_ON_CHANGE = {"refuse": pb.ON_CHANGE_REFUSE, "revise": pb.ON_CHANGE_REVISE}

_OPTIONS = (
    ("grpc.max_send_message_length", _timing.MESSAGE_BYTES),
    ("grpc.max_receive_message_length", _timing.MESSAGE_BYTES),
    # Servers stand beside the trainers, never behind the proxy that leads out of the cluster.
    ("grpc.enable_http_proxy", 0),
    # Calls are repeated by Link, which knows what may be repeated and for how long.
    ("grpc.enable_retries", 0),
    # gRPC's own pauses between connection attempts grow to two minutes by default.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", int(_timing.RECONNECT_CAP_S * 1000)),
    # Finds a host that vanished; the server permits a ping each 20 s. None without calls.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 0),
    # The connection is the pilot's own and ends with it.
    ("grpc.use_local_subchannel_pool", 1),
)


def connect(
    address: str,
    *,
    run: str,
    spec: Spec = None,
    on_change: Literal["refuse", "revise"] = "refuse",
    reporter: int = 0,
    resume_at: int | None = None,
    key: str | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    outage_timeout_s: float = _timing.OUTAGE_TIMEOUT_S,
) -> "Pilot":
    """Attach this process to a run and return its pilot.

    Every rank of a job calls it, after `torch.distributed.init_process_group` where there is
    one: rank 0 then speaks for all, and every rank gets the same pilot or the same error.

    Args:
        address: HOST:PORT of the server.
        run: name of the run.
        spec: the run spec: path of a YAML file, its text (YAML of several lines, or JSON), or a
            mapping with the same fields. It creates the run; on a known run it is compared with
            the last one that a trainer gave. None: the run must exist.
        on_change: what to do where the spec differs: "refuse" it with the difference, or
            "revise" the run, which holds from where the attempt opens.
        reporter: global rank whose loss counts.
        resume_at: progress to open the attempt at where no state is given, in the run's unit.
            None: 0, for a run without losses.
        key: shared by all ranks of one start of the job, and new at every start: for several
            ranks without a process group.
        rank: global rank of this process. None: that of the process group, else RANK, else 0.
        world_size: number of ranks. None: that of the process group, else WORLD_SIZE, else 1.
        outage_timeout_s: longest time in seconds for which the training waits for a server that
            does not answer, before it raises ServerUnavailable.

    Raises InvalidArgument, ConnectRefused, InvalidSpec, RunNotFound, SpecChanged,
    ServerUnavailable (after two minutes), ….
    """
    if key is not None:
        text("key", key)
    place = find_place(rank, world_size, key)
    problem = None
    try:
        text("address", address)
        text("run", run)
        read_spec = spec_reader(spec)
        if on_change not in _ON_CHANGE:
            raise invalid_argument("on_change", on_change, "'refuse' or 'revise'")
        reporter = integer("reporter", reporter, 0, place.world_size - 1)
        if resume_at is not None:
            resume_at = integer("resume_at", resume_at, 0, _timing.MAX_PROGRESS)
        outage_timeout_s = positive("outage_timeout_s", outage_timeout_s)
    except LrpilotError as error:
        problem = error
    agree(
        place.group,
        problem,
        {"run": repr(run), "reporter": repr(reporter), "resume_at": repr(resume_at)},
        ConnectRefused,
        "connect every rank alike",
    )
    link = Link(
        grpc.insecure_channel(address, options=_OPTIONS),
        address=address,
        run=run,
        rank=place.rank,
        outage_timeout_s=outage_timeout_s,
    )
    session = Session(link, place, reporter=reporter, resume_at=resume_at, key=key)
    try:
        session.attach(read_spec, _ON_CHANGE[on_change])
    except BaseException:
        link.close()
        raise
    return Pilot(session)


class Pilot:
    """One process of a training job, attached to its run; made by `connect`.

    A context manager: leaving the block closes it. Not for several threads.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        _open.append(self)

    @property
    def run(self) -> str:
        """Name of the run."""
        return self._session.link.run

    @property
    def rank(self) -> int:
        """Global rank of this process."""
        return self._session.place.rank

    @property
    def attempt(self) -> int | None:
        """Number of the attempt, 1 for the first of a run; None: it has not opened yet."""
        opened = self._session.opened
        return None if opened is None else opened.attempt.number

    def scheduler(
        self, optimizer: Any, state: Mapping[str, Any] | None = None, defer: bool = False
    ) -> Scheduler:
        """Open the attempt, or join it, and return a scheduler that has written LR and WD.

        Args:
            optimizer: anything with `param_groups`, which are matched with the groups of the spec
                by their "name", and by position where none has one. A run may have several
                optimizers, each with a scheduler of its own that begins where the others stand.
            state: what `Scheduler.state_dict` returned, to resume from. None: at `resume_at`.
            defer: open it later, at `load_state_dict`, `apply` or right before the optimizer's
                first step, whichever comes first: for frameworks that load their state after
                building the scheduler.

        Raises InvalidArgument, InvalidState, ResumePointRequired, JoinRefused, StateMismatch,
        RunFinished, AttemptOpen, GroupMismatch, ServerUnavailable, ….
        """
        return Scheduler(self._session, optimizer, state=state, defer=defer)

    def values(self, n: int) -> Values:
        """Return `(learning_rate, weight_decay)` at progress `n` of each group of the spec.

        Weight decay is None where the run sets none. Opens the attempt where it is not open;
        with a process group every rank then calls it. Where the values wait for losses that this
        rank is to report, asking says that it has none below `n`: report first, then ask.

        Raises InvalidArgument, BeforeAttempt, BeyondHorizon, ServerUnavailable,
        AttemptSuperseded, ….
        """
        n = integer("n", n, 0, _timing.MAX_PROGRESS)
        if self._session.opened is None:
            self._session.open(None)
        return self._session.values(n)

    def report(self, n: int, loss: Loss, weight: float = 1.0) -> None:
        """Report the loss at progress `n`; delivered in the background, ignored off the reporter.

        Says that the reporter moves on to n + 1. The same loss again is harmless. `weight`, above
        0, is recorded with the loss; no average uses it yet.

        Raises InvalidArgument, AttemptNotOpen, BelowResumePoint, LossConflict, and what a
        background thread met.
        """
        n = integer("n", n, 0, _timing.MAX_PROGRESS - 1)
        weight = positive("weight", weight)
        if loss is None:
            raise invalid_argument("loss", loss, "a number, or a tensor with one element")
        self._session.report(n, loss, weight, n + 1)

    def close(self) -> None:
        """Deliver the queued reports, for at most half a minute, and end the connection.

        Reports that could not be delivered are logged as an error: the training that ends here
        is not at fault. Raises what a background thread met and no call has raised yet. A second
        call does nothing.
        """
        self._end(_timing.CLOSE_FLUSH_S)
        link = self._session.link
        if link.failure is not None and not link.failure_raised:
            link.failure_raised = True
            raise link.failure

    def __enter__(self) -> "Pilot":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:
            self._abandon()

    def _end(self, flush_s: float) -> None:
        if self in _open:
            _open.remove(self)
        link = self._session.link
        left = self._session.close(flush_s)
        if left:
            logger.error(
                "run %s: %d reports were NOT delivered to %s before the end",
                link.run,
                left,
                link.address,
            )

    def _abandon(self) -> None:
        """Close without raising: another error is under way, or the interpreter ends."""
        link = self._session.link
        try:
            self._end(_timing.ABANDON_FLUSH_S)
        except Exception:
            logger.exception("run %s: closing failed", link.run)
        if link.failure is not None and not link.failure_raised:
            link.failure_raised = True
            logger.error("run %s: %s: %s", link.run, type(link.failure).__name__, link.failure)


_open: list[Pilot] = []
"""Pilots that nobody has closed; in a forked child, those of its parent."""


def _close_all() -> None:
    for pilot in list(_open):
        pilot._abandon()


def _forked() -> None:
    # Workers of a data loader are forked; the pilots stay referenced, since taking a channel
    # down would wait for locks whose threads exist in the parent alone.
    for pilot in _open:
        pilot._session.forked()


atexit.register(_close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
