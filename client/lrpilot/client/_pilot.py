"""Connecting a training process to its run, and what it then holds."""

import atexit
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar, overload

from lrpilot.client import _timing
from lrpilot.client._address import read_target
from lrpilot.client._arguments import Spec, integer, positive, spec_reader, text
from lrpilot.client._call import Link
from lrpilot.client._capture import InGraph
from lrpilot.client._changes import ChangeHandler
from lrpilot.client._channel import open_channel
from lrpilot.client._directives import Directive, Handler, Kind
from lrpilot.client._errors import ConnectRefused, LrpilotError, invalid_argument
from lrpilot.client._launch import find_place
from lrpilot.client._loss import Loss
from lrpilot.client._metrics import Said, metric_name
from lrpilot.client._plot import plot
from lrpilot.client._scheduler import Scheduler
from lrpilot.client._session import Session, agree
from lrpilot.client._sigterm import unwatch, watch
from lrpilot.client._values import Values
from lrpilot.v1 import trainer_pb2 as pb

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger("lrpilot.client")

HandlerType = TypeVar("HandlerType", bound=Handler)
ChangeHandlerType = TypeVar("ChangeHandlerType", bound=ChangeHandler)

_ON_CHANGE = {"refuse": pb.ON_CHANGE_REFUSE, "revise": pb.ON_CHANGE_REVISE}

_MODES = ("independent", "leader")

_LOOK_S = 0.02
"""Time between two looks at what is left to deliver, after SIGTERM."""


def connect(
    address: str,
    *,
    run: str,
    spec: Spec = None,
    on_change: Literal["refuse", "revise"] = "refuse",
    reporter: int | Sequence[int] = 0,
    resume_at: int | None = None,
    key: str | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    mode: Literal["independent", "leader"] = "independent",
    outage_timeout_s: float = _timing.OUTAGE_TIMEOUT_S,
) -> "Pilot":
    """Attach this process to a run and return its pilot.

    Every rank of a job calls it, after `torch.distributed.init_process_group` where there is
    one: rank 0 then speaks for all, and every rank gets the same pilot or the same error.

    Args:
        address: HOST:PORT of the server. Several of them with commas between are asked in turn,
            each while it serves; so are the hosts that a DNS name stands for. gRPC's own targets
            (dns:///HOST:PORT, ipv4:…, ipv6:…, unix:PATH) are taken as they are.
        run: name of the run.
        spec: the run spec: path of a YAML file, its text (YAML of several lines, or JSON), or a
            mapping with the same fields. It creates the run; on a known run it is compared with
            the last one that a trainer gave. None: the run must exist.
        on_change: what to do where the spec differs: "refuse" it with the difference, or
            "revise" the run, which holds from where the attempt opens.
        reporter: global rank whose loss counts. A sequence of ranks: a step's loss is the mean of
            theirs by weight, summed in this order; it is final when all have reported, or by quorum
            after `feedback.timeout`.
        resume_at: progress to open the attempt at where no state is given, in the run's unit.
            None: 0, for a run without losses.
        key: shared by all ranks of one start of the job, and new at every start: for several
            ranks without a process group.
        rank: global rank of this process. None: that of the process group, else RANK, else 0.
        world_size: number of ranks. None: that of the process group, else WORLD_SIZE, else 1.
        mode: "independent": each rank asks for itself, and waits for a server that is away.
            "leader": rank 0 asks and passes the values on over a CPU process group; with the
            server away it goes on with values that it was offered ahead, all ranks the same, and
            declares them afterwards. It needs a process group, or one rank.
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
        target = read_target(address)
        text("run", run)
        read_spec = spec_reader(spec)
        if mode not in _MODES:
            raise invalid_argument("mode", mode, " or ".join(map(repr, _MODES)))
        if mode == "leader" and key is not None:
            raise invalid_argument(
                "key", key, "none in leader mode: its ranks need a process group, or be one"
            )
        if on_change not in _ON_CHANGE:
            raise invalid_argument("on_change", on_change, "'refuse' or 'revise'")
        reporters = _reporters(reporter, place.world_size)
        if resume_at is not None:
            resume_at = integer("resume_at", resume_at, 0, _timing.MAX_PROGRESS)
        outage_timeout_s = positive("outage_timeout_s", outage_timeout_s)
    except LrpilotError as error:
        problem = error
    agree(
        place.group,
        problem,
        {
            "run": repr(run),
            "reporter": repr(reporter),
            "resume_at": repr(resume_at),
            "mode": mode,
        },
        ConnectRefused,
        "connect every rank alike",
    )
    link = Link(
        lambda: open_channel(target),
        address=address,
        run=run,
        rank=place.rank,
        outage_timeout_s=outage_timeout_s,
    )
    session = Session(
        link, place, reporters=reporters, resume_at=resume_at, key=key, leads=mode == "leader"
    )
    try:
        session.attach(read_spec, _ON_CHANGE[on_change])
    except BaseException:
        link.close()
        raise
    return Pilot(session)


def _reporters(given: int | Sequence[int], world_size: int) -> tuple[int, ...]:
    if not isinstance(given, Sequence):
        return (integer("reporter", given, 0, world_size - 1, ", or a sequence of them"),)
    allowed = f"different ranks from 0 to {world_size - 1}, at least one"
    ranks: list[int] = []
    for item in given:
        rank = integer("reporter", item, 0, world_size - 1)
        if rank in ranks:
            raise invalid_argument("reporter", given, allowed)
        ranks.append(rank)
    if not ranks:
        raise invalid_argument("reporter", given, allowed)
    return tuple(ranks)


class Pilot:
    """One process of a training job, attached to its run; made by `connect`.

    A context manager: leaving the block closes it. Not for several threads.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._process = os.getpid()
        _open.append(self)
        watch(_deliver_all)

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
        self,
        optimizer: Any,
        state: Mapping[str, Any] | None = None,
        defer: bool = False,
        wd_in_graph: InGraph = "refuse",
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
            wd_in_graph: what to do where the weight decay changes and the optimizer's step was
                captured into a CUDA graph with a weight decay that is no tensor on the device:
                "refuse" it with CaptureRefused, or "warn", once a capture, and train on with the
                one captured. A weight decay that stays the same is never refused.

        Raises InvalidArgument, InvalidState, ResumePointRequired, JoinRefused, StateMismatch,
        RunFinished, AttemptOpen, GroupMismatch, ServerUnavailable, ….
        """
        return Scheduler(
            self._session, optimizer, state=state, defer=defer, wd_in_graph=wd_in_graph
        )

    def values(self, n: int) -> Values:
        """Return `(learning_rate, weight_decay)` at progress `n` of each group of the spec.

        Weight decay is None where the run sets none. Opens the attempt where it is not open;
        with a process group every rank then calls it. Where the values wait for losses that this
        rank is to report, asking says that it has none below `n`: report first, then ask. Handlers
        of directives that are due at `n` are called before it returns; after a rollback the values
        are those of the old attempt, so ask again where the new one begins.

        Raises InvalidArgument, BeforeAttempt, BeyondHorizon, ServerUnavailable,
        AttemptSuperseded, ….
        """
        n = integer("n", n, 0, _timing.MAX_PROGRESS)
        if self._session.opened is None:
            self._session.open(None)
        values = self._session.values(n)
        self._session.meet(n)
        return values

    def report(
        self,
        n: int,
        loss: Loss,
        weight: float = 1.0,
        *,
        val_losses: Mapping[str, Loss] | None = None,
        grad_norm: Loss = None,
        batch: int | None = None,
        skipped: bool = False,
    ) -> None:
        """Report the loss at progress `n`; delivered in the background, ignored off the reporters.

        Says that the reporter moves on to n + 1, or with `skipped` that it stays. The same loss
        again is harmless and adds nothing; each call with `skipped` is another try. The other
        arguments are those of `Scheduler.step`.

        Raises InvalidArgument, AttemptNotOpen, BelowResumePoint, LossConflict, and what a
        background thread met.
        """
        n = integer("n", n, 0, _timing.MAX_PROGRESS - 1)
        said = Said(loss, weight, val_losses, grad_norm, batch, skipped)
        if loss is None:
            raise invalid_argument("loss", loss, "a number, or a tensor with one element")
        self._session.report(n, said, n + 1)

    def report_validation(self, name: str, loss: Loss) -> None:
        """Let a validation loss ride in the next report, as `Scheduler.report_validation` does."""
        self._session.report_validation(metric_name("name", name), loss)

    @overload
    def on_directive(self, kind: Kind, handler: HandlerType) -> HandlerType: ...

    @overload
    def on_directive(
        self, kind: Kind, handler: None = None
    ) -> Callable[[HandlerType], HandlerType]: ...

    def on_directive(self, kind: Kind, handler: Handler | None = None) -> object:
        """Register what is done on a directive: one handler for each kind, alike on every rank.

        `kind` is "rollback", "skip", "evaluate" or "stop". Without a handler a directive is
        logged and stays an alert on the server. Without `handler` it returns a decorator:

            @pilot.on_directive("stop")
            def stop(directive):
                stopping.set()

        The handler is called with the Directive on the training thread, inside
        `Scheduler.step` or `Pilot.values`, at the same step on every rank, after LR and WD of the
        step were written. When it returns, the directive is acknowledged as done; when it raises,
        as failed, and the training loop gets the exception. DirectiveDeclined alone is kept from
        it: the handler could not do it, and training goes on.

        Raises InvalidArgument.
        """

        def register(handler: Handler) -> Handler:
            self._session.handlers.add(kind, handler)
            return handler

        return register if handler is None else register(handler)

    def on_change(self, handler: ChangeHandlerType) -> ChangeHandlerType:
        """Call `handler` with each Change of LR or WD: what it did, and why. Usable as a decorator.

        For whoever writes a log of the training, on any rank. It is called on the training thread,
        inside `Scheduler.step` or `Pilot.values`, at the first step at which the change shows,
        after LR and WD were written. Changes come with the values, so a handler hears of those
        whose values are fetched after it was registered: register it before the scheduler is made.
        In leader mode rank 0 fetches them for all ranks; a handler that comes later than the
        scheduler needs one on rank 0.

        Raises InvalidArgument.
        """
        self._session.on_change(handler)
        return handler

    def roll_back(self, directive: Directive, progress: int) -> None:
        """Go back to `progress` in this process: a new attempt, which a directive asked for.

        Every rank calls it at the same point, inside its handler or later between two steps. It
        delivers the queued reports for at most half a minute, opens the attempt with the cut that
        the directive asks for, moves every scheduler of this pilot to `progress` and writes its
        LR and WD. Model, optimizer and data are the caller's; loading the optimizer's state
        afterwards needs `Scheduler.apply()`. RollbackHandler does all of it.

        The first rank to call it ends the old attempt for all of them. A process group makes the
        ranks wait for each other; ranks that share a key instead must do so before they call it,
        or one that comes later may be refused as superseded before it meets the directive.

        Raises InvalidArgument, AttemptNotOpen, JoinRefused, AdjustmentNotFound,
        AttemptSuperseded, ServerUnavailable, …; with a process group on every rank.
        """
        self._session.roll_back(directive, progress)

    def plot(
        self,
        *,
        begin: int | None = None,
        end: int | None = None,
        groups: Iterable[str] | None = None,
        log: bool = False,
        timeout_s: float = _timing.CALL_S,
    ) -> "Figure":
        """Return a picture of the run as a matplotlib figure; see `lrpilot.client.plot`.

        It asks over a connection of its own, and touches nothing that training uses: any rank may
        call it, on any thread, while it trains and after the pilot was closed. Not in a forked
        child, where gRPC promises nothing.

        Raises ImportError without matplotlib, InvalidArgument, InvalidRequest, RunNotFound,
        ServerUnavailable, …; in a forked child PilotClosed.
        """
        link = self._session.link
        if self._process != os.getpid():
            raise link.closed()
        return plot(
            link.address,
            link.run,
            begin=begin,
            end=end,
            groups=groups,
            log=log,
            timeout_s=timeout_s,
        )

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

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a Pilot cannot be pickled or copied: it is a connection of this process. Keep it out "
            "of data sets, collate functions and what else goes to other processes; there, pass "
            "the numbers that are needed, such as pilot.run"
        )

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
        link = self._session.link
        try:
            left = self._session.close(flush_s)
        finally:
            # Not earlier: SIGTERM may come while it delivers.
            if self in _open:
                _open.remove(self)
                if not _open:
                    unwatch()
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


def pilot_argument(got: Any) -> Pilot:
    """Return the pilot that an adapter was given. Raises InvalidArgument."""
    if not isinstance(got, Pilot):
        raise invalid_argument("pilot", got, "what lrpilot.client.connect() returned")
    return got


_open: list[Pilot] = []
"""Pilots that nobody has closed; in a forked child, those of its parent."""


def _close_all() -> None:
    for pilot in list(_open):
        pilot._abandon()


def _deliver_all() -> None:
    """Deliver what was reported, for a bounded time, while the training thread may still run."""
    end_s = time.monotonic() + _timing.ABANDON_FLUSH_S
    for pilot in list(_open):
        link = pilot._session.link
        pilot._session.settle(end_s - time.monotonic())
        while link.undelivered() and link.failure is None and time.monotonic() < end_s:
            time.sleep(_LOOK_S)
        if left := link.undelivered():
            logger.error(
                "run %s: SIGTERM: %d reports were NOT delivered to %s",
                link.run,
                left,
                link.address,
            )


def _forked() -> None:
    # Workers of a data loader are forked; the pilots stay referenced, since taking a channel
    # down would wait for locks whose threads exist in the parent alone.
    for pilot in _open:
        pilot._session.forked()


atexit.register(_close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
