"""The scheduler of one optimizer: its LR and WD come from the server, its losses go there."""

import logging
from collections.abc import Mapping
from typing import Any, NoReturn

from lrpilot.client import _timing
from lrpilot.client._arguments import integer
from lrpilot.client._capture import InGraph, before_each_step, refuse_in_capture
from lrpilot.client._changes import Change
from lrpilot.client._errors import AttemptNotOpen, invalid_argument
from lrpilot.client._groups import Groups
from lrpilot.client._loss import Loss
from lrpilot.client._metrics import Said, metric_name
from lrpilot.client._session import Session
from lrpilot.client._state import SavedState, decode, encode
from lrpilot.client._values import Values

logger = logging.getLogger("lrpilot.client")


class Scheduler:
    """Writes LR and WD into an optimizer's `param_groups`, step by step.

    Made by `Pilot.scheduler`. Every rank calls every method at the same point, save that
    `state_dict` may be called on any of them. Not for several threads.
    """

    def __init__(
        self,
        session: Session,
        optimizer: Any,
        *,
        state: Mapping[str, Any] | None,
        defer: bool,
        wd_in_graph: InGraph = "refuse",
    ) -> None:
        if defer and state is not None:
            raise invalid_argument("defer", defer, "False where a state is given")
        self._session = session
        self._groups = Groups(optimizer, wd_in_graph)
        self._progress: int | None = None
        self._increment = 0
        self._tries = 0
        """Updates that were skipped at the current progress."""
        self._is_late = session.opened is not None
        """Whether the attempt was open already: others may have made steps."""
        self._hook: Any = None
        self._doubted = ""
        """Unit in which an increment of 1 is hardly meant; empty: none, or it was said."""
        if not defer:
            self._open(state)
        else:
            self._hook = before_each_step(optimizer, self._before_first_step)

    @property
    def progress(self) -> int:
        """Progress whose LR and WD the optimizer holds, in the run's unit.

        Raises AttemptNotOpen.
        """
        if self._progress is None:
            raise AttemptNotOpen(
                f"run {self._session.link.run!r}: the attempt has not opened yet: it opens at "
                "load_state_dict(), apply(), or before the optimizer's first step where the "
                "optimizer has register_step_pre_hook()",
                facts={"run": self._session.link.run},
            )
        return self._progress

    def step(
        self,
        increment: int = 1,
        loss: Loss = None,
        *,
        weight: float = 1.0,
        val_losses: Mapping[str, Loss] | None = None,
        grad_norm: Loss = None,
        batch: int | None = None,
        skipped: bool = False,
    ) -> None:
        """Report the loss at the current progress, move on, write LR and WD of the new one.

        Then it calls the handlers of directives that are due there (`Pilot.on_directive`); after
        a rollback the progress is the one gone back to.

        Args:
            increment: what the step consumed, in the run's unit, at least 1. Where that is not
                iterations, an increment of 1 is warned of once.
            loss: the reduced loss, a number or a tensor with one element on any device, read on
                the reporters alone; NaN and infinities are data. None: this step has none.
            weight: of the loss in the mean over several reporters, above 0; say its tokens.
            val_losses: validation losses by name (1 to 64 of a-z A-Z 0-9 . _ / -).
            grad_norm: norm of the gradient, at least 0; NaN and infinity are data.
            batch: global batch size in samples.
            skipped: the optimizer refused the update, such as after an fp16 overflow: the
                progress stays, whatever the increment, and the same values are written again. It
                opens a deferred attempt.

        Raises InvalidArgument, AttemptNotOpen, CaptureRefused, LossConflict, ServerUnavailable,
        AttemptSuperseded, …, what a background thread met since the last call, and what a
        handler raises. After ServerUnavailable the step is made and reported, and `apply()` tries
        again for its values.
        """
        if skipped is True and self._progress is None:
            # The very first update was skipped, and the optimizer has made no step.
            self._open(None)
        here = self.progress
        refuse_in_capture("scheduler.step()")
        increment = integer("increment", increment, 1, _timing.MAX_PROGRESS - here, _BY_NAME)
        said = Said(loss, weight, val_losses, grad_norm, batch, skipped)
        if self._hook is not None:
            # Not while it is called: the optimizer goes through its hooks then.
            self._hook.remove()
            self._hook = None
        there = here if skipped else here + increment
        if increment == 1 and self._doubted and not skipped:
            self._doubt()
        self._session.report(here, said, there, self._tries)
        if skipped:
            self._tries += 1
        else:
            self._progress, self._increment, self._tries = there, increment, 0
            self._session.progress = max(self._session.progress, there)
        self._write()
        self._session.arrive()

    def report_validation(self, name: str, loss: Loss) -> None:
        """Let a validation loss ride in the next report, and act as that report does.

        For an evaluation between two steps: its loss then counts as one of the step to come. A
        skipped step does not carry it. Ignored off the reporters. Raises as `step` does.
        """
        self._session.report_validation(metric_name("name", name), loss)

    def apply(self) -> None:
        """Write LR and WD of the current progress once more; open the attempt where deferred.

        For after something else wrote to the optimizer, such as its own `load_state_dict`.
        """
        if self._progress is None:
            self._open(None)
        else:
            refuse_in_capture("scheduler.apply()")
            self._write()
            self._session.arrive()

    def applied(self) -> Values:
        """Return LR and WD of each param group as the optimizer's step uses them, for logs.

        A tensor holds them in its own precision, a captured step keeps a weight decay that is no
        tensor, and a param group may keep its own. Nothing is read from a device. Weight decay is
        None where a param group has none.

        Raises AttemptNotOpen.
        """
        _ = self.progress
        return self._groups.applied()

    def go_to(self, progress: int) -> None:
        """Stand at another progress and write its values; a rollback of the pilot calls it."""
        self._progress, self._tries = progress, 0
        self._write()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs to resume at the current progress: plain types alone.

        Waits until the losses below the progress are final, at most a minute. Where the server
        does not answer that long, the state holds the progress alone, and a warning says so.
        No rank waits for another: all may call it, or one. Before a deferred attempt has opened
        it returns a state that `load_state_dict` takes as none.

        Raises AttemptSuperseded, …, and what a background thread met since the last call.
        """
        run = self._session.link.run
        if self._progress is None:
            return encode(run, SavedState(None, b""))
        return encode(run, SavedState(self._progress, self._session.save(self._progress)))

    def changes_in_force(self) -> list[Change]:
        """Return the changes of LR or WD that count at the current progress, in order.

        None: the values here are those of the base schedule. Waits for the server as `state_dict`
        does. Raises AttemptNotOpen, ServerUnavailable and LossesPending (it cannot say yet),
        AttemptSuperseded, …, and what a background thread met since the last call.
        """
        return self._session.changes_in_force(self.progress)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Open the deferred attempt at a state, and write its LR and WD.

        Where the attempt is open, a state of the current progress changes nothing, so that a
        framework may restore what was given as `state=` already; any other is refused.

        Raises InvalidState, AttemptOpen, and as `Pilot.scheduler` does.
        """
        if self._progress is None:
            self._open(state)
        else:
            self._session.refuse_other(decode(self._session.link.run, state), self._progress)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a Scheduler cannot be pickled or copied: it belongs to a connection of this process. "
            "Save scheduler.state_dict() instead, and keep the scheduler out of data sets, "
            "collate functions and models that are copied or sent to other processes"
        )

    def _open(self, state: Mapping[str, Any] | None) -> None:
        refuse_in_capture("opening the attempt")
        opened = self._session.open(state)
        self._groups.bind(self._session.link.run, opened)
        self._doubted = "" if opened.unit == "iterations" else opened.unit
        self._progress = self._session.progress if self._is_late else opened.begin
        self._session.follow(self)
        self._write()

    def _doubt(self) -> None:
        logger.warning(
            "run %s counts %s, and a step was made with increment=1: the schedule moves on by one "
            "of them with each update. Where an update consumes more, say how many as increment. "
            "This is said once",
            self._session.link.run,
            self._doubted,
        )
        self._doubted = ""

    def _before_first_step(self, *_: Any) -> None:
        if self._progress is None:
            self._open(None)

    def _write(self) -> None:
        self._groups.write(self._session.values(self.progress, self._increment))


_BY_NAME = "; the loss goes by name: step(loss=loss)"
