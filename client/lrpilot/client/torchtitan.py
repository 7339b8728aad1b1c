"""torchtitan: a container of LR schedulers, and a trainer that gives it the losses.

Imports torchtitan, 0.3.
"""

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torchtitan.components.optimizer import LRSchedulersContainer
from torchtitan.distributed.utils import dist_sum_tensor
from torchtitan.trainer import Trainer

from lrpilot.client._arguments import increment_argument
from lrpilot.client._errors import invalid_argument
from lrpilot.client._loss import Loss
from lrpilot.client._pilot import connect

__all__ = ["PilotSchedulers", "PilotTrainer"]

logger = logging.getLogger("lrpilot.client")


class PilotSchedulers(LRSchedulersContainer):
    """The container of LR schedulers of a run: one scheduler for each of torchtitan's optimizers.

    What it does at each call of torchtitan:

    - when the trainer builds it, it connects; the process group exists by then;
    - `get_metrics`, at the beginning of a step, and the optimizers' container right before its
      own step: where the attempt has not opened it opens, and after a checkpoint was loaded LR
      and WD are written again. What is logged as LR is what the step uses;
    - `step`, after the optimizers' step, reports the loss, where `PilotTrainer` gave it, and
      writes LR and WD of the next step;
    - `state_dict` and `load_state_dict` are those of `Scheduler`.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(LRSchedulersContainer.Config):
        """How to connect; the fields of torchtitan's own schedules are not read."""

        address: str = ""
        """HOST:PORT of the server."""

        run: str = ""
        """Name of the run."""

        spec: str | None = None
        """Path of the run spec, or its text; None: the run must exist."""

        on_change: Literal["refuse", "revise"] = "refuse"
        """What to do where the spec differs from the last one that a trainer gave."""

        reporter: int = 0
        """Global rank whose loss counts; with pipelines one that has the last stage."""

        resume_at: int | None = None
        """Progress to begin at where no state is loaded, in the run's unit."""

        increment: int = 1
        """What a step consumes, in the run's unit, at least 1."""

        def build(self, *, optimizers: Any, training_steps: int) -> "PilotSchedulers":  # noqa: ARG002
            """Return the container; torchtitan calls it."""
            return PilotSchedulers(self, optimizers)

    def __init__(self, config: Config, optimizers: Any) -> None:
        self._increment = increment_argument(config.increment)
        self._pilot = connect(
            config.address,
            run=config.run,
            spec=config.spec,
            on_change=config.on_change,
            reporter=config.reporter,
            resume_at=config.resume_at,
        )
        self._optimizers = list(optimizers)
        self.schedulers = [
            self._pilot.scheduler(_Groups(optimizer), defer=True) for optimizer in optimizers
        ]
        # The container's own: loading a checkpoint lets each optimizer in it make an empty step.
        optimizers.register_step_pre_hook(lambda *_: self._write())
        self._is_written = False
        """Whether the optimizers hold what they should; not after a load of their state."""
        self._sum: Any = None
        """Sum of the losses that this rank saw in the present step, on their device."""
        self._mesh: Any = None
        self._has_warned = False

    @property
    def progress(self) -> int:
        """Progress whose LR and WD the optimizers hold, in the run's unit.

        Raises AttemptNotOpen before the first step.
        """
        progress: int = self.schedulers[0].progress
        return progress

    @property
    def rank(self) -> int:
        """Global rank of this process."""
        return self._pilot.rank

    def reduce_over(self, mesh: Any) -> None:
        """Sum losses over the ranks of a mesh from now on; None: over none."""
        self._mesh = mesh

    def count(self, loss: Any) -> None:
        """Add what this rank contributes to the loss of the present step."""
        loss = loss.detach()
        # A graph writes its loss again in the next micro-batch.
        self._sum = loss.clone() if self._sum is None else self._sum + loss

    def get_metrics(self) -> dict[str, float]:
        """Return the LR of each optimizer's param groups, under torchtitan's names."""
        self._write()
        metrics = {}
        for optimizer in self._optimizers:
            groups = optimizer.param_groups
            name = f"lr/{type(optimizer).__name__}"
            for at, group in enumerate(groups):
                metrics[name if len(groups) == 1 else f"{name}/{at}"] = float(group["lr"])
        return metrics

    def step(self) -> None:
        """Report the step that was made, and write LR and WD of the next one."""
        loss, self._sum = self._reduced(), None
        for scheduler in self.schedulers:
            scheduler.step(self._increment, loss)
            # Their loss is one: the first says it.
            loss = None

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs, as `Scheduler.state_dict` does."""
        state: dict[str, Any] = self.schedulers[0].state_dict()
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Open the attempt at a state. Raises as `Scheduler.load_state_dict`."""
        for scheduler in self.schedulers:
            scheduler.load_state_dict(state_dict)
        # The checkpoint's optimizers are loaded after this, with the LR that they had.
        self._is_written = False

    def close(self) -> None:
        """Deliver what is queued, and end the connection.

        Where an error ends the training, it is not put in the place of that one.
        """
        self._pilot.__exit__(*sys.exc_info())

    def _write(self) -> None:
        if not self._is_written:
            for scheduler in self.schedulers:
                scheduler.apply()
            self._is_written = True

    def _reduced(self) -> Loss:
        if self._sum is None:
            if not self._has_warned:
                self._has_warned = True
                logger.warning(
                    "run %s: no loss of a step is known: build the trainer from "
                    "PilotTrainer.Config",
                    self._pilot.run,
                )
            return None
        return dist_sum_tensor(self._sum, self._mesh)


class PilotTrainer(Trainer):
    """torchtitan's trainer, whose `lr_scheduler` is a `PilotSchedulers.Config`.

        return PilotTrainer.Config(
            lr_scheduler=PilotSchedulers.Config(address="…", run="…", spec="spec.yaml"),
            …,
        )

    The loss of a step is what torchtitan calls `global_avg_loss`, of every step, whatever
    `metrics.log_freq` is: one sum over the ranks a step, left on its device.

    Raises InvalidArgument for a reporter that sees no loss of a pipeline.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        """That of torchtitan's trainer."""

    def __init__(self, config: Config) -> None:
        if not isinstance(config.lr_scheduler, PilotSchedulers.Config):
            raise invalid_argument("lr_scheduler", config.lr_scheduler, "a PilotSchedulers.Config")
        super().__init__(config)
        dims = self.parallel_dims
        if dims.dp_cp_enabled:
            self.lr_schedulers.reduce_over(dims.get_optional_mesh("loss"))
        self._check_reporter()

    def forward_backward_step(self, **inputs: Any) -> Any:
        """Give the loss of a micro-batch to the schedulers."""
        loss = super().forward_backward_step(**inputs)
        self.lr_schedulers.count(loss)
        return loss

    def close(self) -> None:
        """Deliver what is queued when torchtitan closes the trainer."""
        try:
            super().close()
        finally:
            self.lr_schedulers.close()

    def _check_reporter(self) -> None:
        """Refuse a reporter whose losses are torchtitan's -1 for stages before the last."""
        dims, reporter = self.parallel_dims, self.config.lr_scheduler.reporter
        if dims.pp_enabled and self.lr_schedulers.rank == reporter and not self.pp_has_last_stage:
            last = dims.world_size // dims.pp * (dims.pp - 1)
            raise invalid_argument(
                "lr_scheduler.reporter",
                reporter,
                f"a rank that has the last stage of the pipeline, such as {last}",
            )


class _Groups:
    """An optimizer's param groups, and nothing that calls the scheduler by itself.

    Before a checkpoint is loaded, torchtitan lets every optimizer step with a gradient of zero,
    so that there is a state to load into. A deferred scheduler would open the attempt then.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    @property
    def param_groups(self) -> Any:
        return self._optimizer.param_groups
