"""Writing the LR and WD in use, and the reasons of their changes, where a training logs already.

Nothing is imported: the training hands in what it logs with.
"""

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from lrpilot.client import _timing
from lrpilot.client._arguments import integer
from lrpilot.client._changes import Change
from lrpilot.client._errors import invalid_argument
from lrpilot.client._pilot import Pilot, pilot_argument
from lrpilot.client._scheduler import Scheduler

__all__ = ["MlflowLogger", "TensorBoardLogger", "WandbLogger"]

logger = logging.getLogger("lrpilot.client")


class _Logger(ABC):
    """What the loggers share: when something is written, and under which names.

    Args:
        pilot: what `connect` returned. Rank 0 writes; elsewhere a logger does nothing.
        target: what is written to.
        every: write LR and WD of each so many updates, the first one included.
    """

    _argument = "target"
    _methods: tuple[str, ...] = ()
    """What the target must have."""

    def __init__(self, pilot: Pilot, target: Any, every: int = 1) -> None:
        pilot_argument(pilot)
        if not all(hasattr(target, name) for name in self._methods):
            allowed = f"an object that has {' and '.join(self._methods)}"
            raise invalid_argument(self._argument, target, allowed)
        self._target = target
        self._session = pilot._session
        self._every = integer("every", every, 1, _timing.MAX_PROGRESS)
        self._last: tuple[int | None, int] | None = None
        """Attempt and progress of the update that was seen last."""
        self._seen = 0
        """Updates seen so far."""
        self._has_warned = False
        if pilot.rank == 0:
            self._session.after_update.append(self._after_update)
            pilot.on_change(self._on_change)

    @abstractmethod
    def _write_values(self, progress: int, values: Mapping[str, float]) -> None:
        """Write numbers by name."""

    @abstractmethod
    def _write_change(self, change: Change, text: str) -> None:
        """Write that something changed, and why."""

    def _after_update(self, progress: int) -> None:
        opened = self._session.opened
        update = (opened.attempt.number if opened else None, progress)
        if update == self._last:
            # Another optimizer's scheduler, or the same update once more.
            return
        self._last = update
        self._seen += 1
        if (self._seen - 1) % self._every == 0:
            self._guard(lambda: self._write_values(progress, self._values(progress)))

    def _values(self, progress: int) -> dict[str, float]:
        """Return what the optimizers used at a progress; no tensor on a device is read."""
        values: dict[str, float] = {}
        for scheduler in list(self._session.schedulers):
            if not isinstance(scheduler, Scheduler) or scheduler.progress != progress:
                continue
            for group, (rate, decay) in scheduler._groups.applied_by_name().items():
                values.setdefault(_name("lr", group), rate)
                if decay is not None:
                    values.setdefault(_name("weight_decay", group), decay)
        return values

    def _on_change(self, change: Change) -> None:
        opened = self._session.opened
        groups = list(opened.groups) if opened else []
        self._guard(lambda: self._write_change(change, _text(change, groups)))

    def _guard(self, write: Callable[[], None]) -> None:
        """Let no failure of a logger end the training; the first one is logged."""
        try:
            write()
        except Exception as error:
            if not self._has_warned:
                self._has_warned = True
                logger.warning(
                    "run %s: %s could not write: %s: %s. Training goes on, and so do the tries; "
                    "this is said once",
                    self._session.link.run,
                    type(self).__name__,
                    type(error).__name__,
                    error,
                )


class TensorBoardLogger(_Logger):
    """Writes to TensorBoard: scalars `lrpilot/lr`, `lrpilot/weight_decay`, text `lrpilot/change`.

        TensorBoardLogger(pilot, SummaryWriter(folder))

    Where the spec has groups, their names follow: `lrpilot/lr/embedding`. The step is the progress.
    Make it before the scheduler, so that it hears of every change.

    Args:
        pilot: what `connect` returned. Rank 0 writes; elsewhere a logger does nothing.
        writer: torch's `SummaryWriter`, or what has `add_scalar` and `add_text` as it does.
        every: write LR and WD of each so many updates, the first one included.

    Raises InvalidArgument.
    """

    _argument = "writer"
    _methods = ("add_scalar", "add_text")

    def __init__(self, pilot: Pilot, writer: Any, every: int = 1) -> None:
        super().__init__(pilot, writer, every)

    def _write_values(self, progress: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._target.add_scalar(name, value, progress)

    def _write_change(self, change: Change, text: str) -> None:
        self._target.add_text("lrpilot/change", text, change.progress)


class WandbLogger(_Logger):
    """Writes to Weights & Biases: `lrpilot/lr`, `lrpilot/weight_decay`, `lrpilot/change`.

        WandbLogger(pilot, wandb.init(…))

    Where the spec has groups, their names follow: `lrpilot/lr/embedding`. The axis of these charts
    is `lrpilot/progress`. The step of W&B stays the training's own: what is written joins the row
    that is open, and so comes with what the training logs. Where that is seldom, the newest counts;
    where the training gives `run.log` its steps, W&B keeps each row open until the next step, so
    that the newest is that of the next update. Changes stand in the summary of the run too, as
    `lrpilot/changes/<id>`, so that none is lost by it. Make it before the scheduler, so that it
    hears of every change.

    Args:
        pilot: what `connect` returned. Rank 0 writes; elsewhere a logger does nothing.
        run: what `wandb.init` returned.
        every: write LR and WD of each so many updates, the first one included.

    Raises InvalidArgument.
    """

    _argument = "run"
    _methods = ("log", "define_metric", "summary")

    def __init__(self, pilot: Pilot, run: Any, every: int = 1) -> None:
        super().__init__(pilot, run, every)
        if pilot.rank == 0:
            self._guard(self._define)

    def _define(self) -> None:
        self._target.define_metric("lrpilot/progress")
        self._target.define_metric("lrpilot/*", step_metric="lrpilot/progress")

    def _write_values(self, progress: int, values: Mapping[str, float]) -> None:
        self._target.log({"lrpilot/progress": progress, **values}, commit=False)

    def _write_change(self, change: Change, text: str) -> None:
        row = {"lrpilot/progress": change.progress, "lrpilot/change": text}
        self._target.log(row, commit=False)
        self._target.summary[f"lrpilot/changes/{change.id}"] = text


class MlflowLogger(_Logger):
    """Writes to MLflow: metrics `lrpilot/lr`, `lrpilot/weight_decay`, tags `lrpilot.change.<id>`.

        with mlflow.start_run():
            MlflowLogger(pilot, mlflow)

    Where the spec has groups, their names follow, with "_" for what MLflow takes in no name:
    `lrpilot/lr/embedding`. The step is the progress. MLflow waits for its server at each call,
    unless it was told to log asynchronously (`mlflow.config.enable_async_logging()`); a larger
    `every` asks less of it. Make it before the scheduler, so that it hears of every change.

    Args:
        pilot: what `connect` returned. Rank 0 writes; elsewhere a logger does nothing.
        mlflow: the module, or what has its `log_metrics` and `set_tag`, for the run that is active
            on the training thread.
        every: write LR and WD of each so many updates, the first one included.

    Raises InvalidArgument.
    """

    _argument = "mlflow"
    _methods = ("log_metrics", "set_tag")

    def __init__(self, pilot: Pilot, mlflow: Any, every: int = 1) -> None:
        super().__init__(pilot, mlflow, every)

    def _write_values(self, progress: int, values: Mapping[str, float]) -> None:
        metrics = {_mlflow_name(name): value for name, value in values.items()}
        self._target.log_metrics(metrics, step=progress)

    def _write_change(self, change: Change, text: str) -> None:
        self._target.set_tag(_mlflow_name(f"lrpilot.change.{change.id}"), text)


def _name(what: str, group: str) -> str:
    return f"lrpilot/{what}/{group}" if group else f"lrpilot/{what}"


def _mlflow_name(name: str) -> str:
    return re.sub(r"[^\w./ -]", "_", name, flags=re.ASCII)


def _text(change: Change, groups: list[str]) -> str:
    """Return a change as one line: where, what, who, why, and each LR before and after."""
    head = f"progress {change.progress}: {change.summary} ({change.source})"
    moved = _moves("lr", change.before, change.after, groups)
    moved += _moves("weight decay", change.weight_decay_before, change.weight_decay_after, groups)
    return "; ".join([f"{head}: {change.reason}" if change.reason else head, *moved])


def _moves(
    what: str, before: tuple[float, ...], after: tuple[float, ...], groups: list[str]
) -> list[str]:
    return [
        f"{what} {group + ' ' if group else ''}{old!r} -> {new!r}"
        for group, old, new in zip(groups, before, after, strict=False)
        if old != new
    ]
