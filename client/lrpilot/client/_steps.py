"""Steps in a trainer that makes one, logs, evaluates, saves, and only then begins the next.

Trainer of Hugging Face and Lightning do. What the optimizer used must stay readable until the next
step begins, a validation loss belongs to the step just made, and a checkpoint may come in between.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lrpilot.client._capture import before_each_step
from lrpilot.client._loss import Loss
from lrpilot.client._metrics import Said
from lrpilot.client._pilot import Pilot
from lrpilot.client._state import SavedState, encode
from lrpilot.client.torch import LRScheduler


class Steps:
    """The schedulers of a run's optimizers, which move on when the next step begins.

    A step is `made`, then `noted` and `validated`, then reported, at the latest when `move` moves
    on from it. Every rank calls every method at the same point, save `state_dict` and `report`,
    which need no other rank.

    Args:
        pilot: the pilot of this process.
        optimizers: at least one; all make the same steps.
        state: what `state_dict` returned, or None.
        increment: what a step consumes, in the run's unit.

    Opens the attempt and writes the first LR and WD. Raises as `Pilot.scheduler` does.
    """

    def __init__(
        self,
        pilot: Pilot,
        optimizers: Sequence[Any],
        state: Mapping[str, Any] | None,
        increment: int,
    ) -> None:
        # Those for torch: what is added or written between two steps is put right before the next.
        self.schedulers = tuple(
            LRScheduler(pilot, optimizer, state=state) for optimizer in optimizers
        )
        self._session = pilot._session
        self._increment = increment
        self._made: Said | None = None
        """The step that was made and is not left yet."""
        self._norm: Loss = None
        self._validation: dict[str, Loss] = {}
        self._is_reported = False

    @property
    def progress(self) -> int:
        """Progress whose LR and WD the optimizers hold."""
        return self.schedulers[0].progress

    def made(self, loss: Loss, *, skipped: bool) -> None:
        """Note that a step was made, or refused by the optimizer. None: it has no loss."""
        self._made, self._is_reported = Said(loss, skipped=skipped), False

    def noted(self, grad_norm: Loss) -> None:
        """Note the norm of the gradient of the step that was made."""
        if self._made is not None and not self._is_reported:
            self._norm = grad_norm

    def validated(self, name: str, loss: Loss) -> None:
        """Note a validation loss: it goes with the step that was made.

        With the next one where that step was reported already, or skipped. Characters that no name
        of the server may have become "_".
        """
        name = re.sub(r"[^A-Za-z0-9._/-]", "_", name)[:64]
        if self._made is None or self._is_reported:
            self._session.report_validation(name, loss)
        else:
            self._validation[name] = loss

    def report(self) -> None:
        """Report the step that was made, once; LR and WD stay. Raises as `Pilot.report` does."""
        if self._made is None or self._is_reported:
            return
        self._is_reported = True
        said = Said(
            self._made.loss,
            val_losses=self._validation,
            grad_norm=self._norm,
            skipped=self._made.skipped,
        )
        self._norm, self._validation = None, {}
        first = self.schedulers[0]
        self._session.report(first.progress, said, self._next, first._tries)

    def move(self) -> None:
        """Begin the next step: report the one made, write LR and WD, follow directives.

        Does nothing where none was made. Raises as `Scheduler.step` does.
        """
        if self._made is None:
            return
        self.report()
        skipped, self._made = self._made.skipped, None
        for scheduler in self.schedulers:
            scheduler.step(increment=self._increment, skipped=skipped)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the progress at which the next step begins, as a Scheduler's."""
        self.report()
        progress = self._next
        return encode(self._session.link.run, SavedState(progress, self._session.save(progress)))

    def bare_state_dict(self) -> dict[str, Any]:
        """Return the same without the server's part: nothing is waited for, or raised."""
        return encode(self._session.link.run, SavedState(self._next, b""))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a state of the progress at which the next step begins; refuse any other.

        Raises InvalidState, AttemptOpen, and as `move` does.
        """
        self.move()
        for scheduler in self.schedulers:
            scheduler.load_state_dict(state)
            # The optimizer's own state may have come before this one.
            scheduler.apply()

    @property
    def _next(self) -> int:
        """Progress at which the next step begins."""
        stays = self._made is None or self._made.skipped
        return self.progress + (0 if stays else self._increment)


class FusedStep:
    """Whether a fused optimizer refused its update in mixed precision.

    Others are not called then. A fused one is, finds what the gradient scaler found in
    `found_inf`, and refuses on the device, which neither accelerate nor Lightning notices.
    """

    def __init__(self, optimizer: Any) -> None:
        self._found: Any = None
        before_each_step(optimizer, self._before_step)

    def refused(self) -> bool:
        """Return whether the last update was refused, once; waits for the device in fp16 alone."""
        found, self._found = self._found, None
        return found is not None and float(found) > 0

    def _before_step(self, optimizer: Any, *_: Any) -> None:
        self._found = getattr(optimizer, "found_inf", None)
