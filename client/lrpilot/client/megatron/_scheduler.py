"""A scheduler with the interface of Megatron-LM's own, and how it takes the place of that."""

import functools
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from lrpilot.client import _timing
from lrpilot.client._address import read_target
from lrpilot.client._arguments import integer, text
from lrpilot.client._errors import (
    AttemptNotOpen,
    InvalidState,
    JoinRefused,
    LrpilotError,
    invalid_argument,
)
from lrpilot.client._groups import _put
from lrpilot.client._launch import _process_group
from lrpilot.client._loss import Loss
from lrpilot.client._pilot import Pilot
from lrpilot.client._scheduler import Scheduler
from lrpilot.client._session import agree
from lrpilot.client._state import decode
from lrpilot.client.megatron._arguments import both_flags, ramp_by_iterations
from lrpilot.client.megatron._connection import Connection, usual_delay
from lrpilot.client.megatron._groups import (
    GroupKeys,
    GroupTable,
    NamedOptimizer,
    of_all_ranks,
    read_groups,
)
from lrpilot.client.megatron._schedule import Schedule, read_extras
from lrpilot.client.megatron._state import MegatronState, write_state

logger = logging.getLogger("lrpilot.client")

OWN = "lrpilot"
"""Key of our own part in the scheduler's state."""


class ExportRefused(LrpilotError):
    """A state for Megatron-LM's own scheduler would leave out changes in force; they are named."""


def connected(
    address: str,
    *,
    run: str,
    policies: Sequence[Mapping[str, Any]] = (),
    feedback: Mapping[str, Any] | None = None,
    bounds: Mapping[str, Any] | None = None,
    reporter: int | Sequence[int] | None = None,
    resume_at: int | None = None,
    on_change: Literal["refuse", "revise"] = "refuse",
    key: str | None = None,
    mode: Literal["independent", "leader"] = "independent",
    outage_timeout_s: float = _timing.OUTAGE_TIMEOUT_S,
) -> "Callable[..., OptimizerParamScheduler]":
    """Return what takes the place of Megatron-LM's class: its arguments, and this run.

        from megatron.training import training
        training.OptimizerParamScheduler = connected("10.0.0.1:50051", run="gpt3-175b")
        training.train_step = reporting(training.train_step)

    Args:
        address: HOST:PORT of the server.
        run: name of the run.
        policies: those of the spec; none: the schedule alone.
        feedback: `delay`, in samples, and the rest of the spec's field. The delay is 32 steps of
            the full batch where Megatron-LM knows its batch size.
        bounds: of the spec.
        reporter: global rank whose loss counts. None: the first rank of the last pipeline stage.
        resume_at: progress in samples to begin at where no state is loaded, such as 0 to start a
            run with losses over; or that of a state which another run saved, to begin this run
            from it.
        on_change: as in `lrpilot.connect`; a loaded state whose flag lets the arguments or the
            checkpoint win revises the run.
        key, mode, outage_timeout_s: as in `lrpilot.connect`.

    Nothing is asked of the server before the state is loaded or the first step begins. Raises
    InvalidArgument.
    """
    read_target(address)
    if resume_at is not None:
        resume_at = integer("resume_at", resume_at, 0, _timing.MAX_PROGRESS)
    connection = Connection(
        address=address,
        run=text("run", run),
        extras=read_extras(policies, feedback, bounds),
        resume_at=resume_at,
        on_change=on_change,
        options={
            "reporter": reporter,
            "key": key,
            "mode": mode,
            "outage_timeout_s": outage_timeout_s,
        },
    )
    return functools.partial(OptimizerParamScheduler, connection=connection)


class OptimizerParamScheduler:
    """Megatron-LM's `OptimizerParamScheduler`, with LR and WD from a server.

    Its arguments, methods, attributes and states are those of the class of that name in
    megatron-core, with the same values to the bit as long as nothing changes them. Beside them
    stands `connection`; see `connected`. Every rank makes every call alike. Differences:

    - The attempt opens at `load_state_dict`, `begin` or the first step, whichever comes first.
      Until then param groups hold the values of progress 0.
    - `load_state_dict` sets num_steps, and writes LR and WD at once. Loading again is harmless.
    - Bounds of param groups are those of the arguments, unless the checkpoint wins.
    - The attributes cannot be set, save `num_steps`: that moves the scheduler.

    Raises InvalidArgument where Megatron-LM refuses the arguments, at once for unknown styles.
    """

    def __init__(  # noqa: PLR0917 (the arguments of Megatron-LM's class, in its order)
        self,
        optimizer: Any,
        init_lr: float,
        max_lr: float,
        min_lr: float,
        lr_warmup_steps: float,
        lr_decay_steps: int,
        lr_decay_style: str,
        start_wd: float,
        end_wd: float,
        wd_incr_steps: int,
        wd_incr_style: str,
        use_checkpoint_opt_param_scheduler: bool | None = True,
        override_opt_param_scheduler: bool | None = False,
        wsd_decay_steps: int | None = None,
        lr_wsd_decay_style: str | None = None,
        *,
        connection: Connection,
    ) -> None:
        self.optimizer = optimizer
        self.use_checkpoint_opt_param_scheduler = use_checkpoint_opt_param_scheduler
        self.override_opt_param_scheduler = override_opt_param_scheduler
        if override_opt_param_scheduler and use_checkpoint_opt_param_scheduler:
            raise both_flags()
        self._schedule = Schedule(
            init_lr=init_lr,
            max_lr=max_lr,
            min_lr=min_lr,
            lr_warmup_steps=lr_warmup_steps,
            lr_decay_steps=lr_decay_steps,
            lr_decay_style=lr_decay_style,
            start_wd=start_wd,
            end_wd=end_wd,
            wd_incr_steps=wd_incr_steps,
            wd_incr_style=wd_incr_style,
            wsd_decay_steps=wsd_decay_steps,
            lr_wsd_decay_style=lr_wsd_decay_style,
        )
        self._connection = connection
        self._keys = read_groups(optimizer)
        """Keys of each param group that count. Until a state is loaded they are those that the
        arguments gave; an optimizer's state that is loaded first brings the checkpoint's."""
        self._schedule.check_groups(self._keys)
        self._begin = connection.resume_at
        """Progress to open at; None: at 0, where the run has no losses."""
        self._pilot: Pilot | None = None
        self._scheduler: Scheduler | None = None
        self._table: GroupTable | None = None
        self._delay: int | None = None
        """Delay of the feedback in samples where the spec names none; None: not known."""
        self._starts = 0
        self._is_stepped = False
        """Whether a step was made since the attempt opened."""
        self._held: int | None = None
        """Increment of a step that waits for its loss; None: a step does not wait."""
        self._warn_of_ramp()
        for group, keys in zip(optimizer.param_groups, self._keys, strict=True):
            _put(group, "lr", self._schedule.rate_at_start(keys))
            _put(group, "weight_decay", self._schedule.decay_at_start(keys) * keys.wd_mult)

    # What Megatron-LM's class has.

    @property
    def num_steps(self) -> int:
        """Progress in samples, as the number of those that completed updates have consumed."""
        if self._scheduler is None:
            return self._begin or 0
        return self._scheduler.progress + (self._held or 0)

    @num_steps.setter
    def num_steps(self, number: int) -> None:
        number = integer("num_steps", number, 0, _timing.MAX_PROGRESS)
        if self._scheduler is None:
            self._begin = number
        elif number != self.num_steps:
            self._open(self._schedule, self._keys, begin=number)

    def step(self, increment: int, loss: Loss = None, **said: Any) -> None:
        """Move on by `increment` samples, and write LR and WD there; 0 writes them once more.

        `loss` is that of the step just made, the reduced one; `said` are the other arguments of
        `Scheduler.step`, such as `grad_norm` and `skipped`. Inside a `train_step` that is
        `reporting`, the move is made when it returns.

        Raises InvalidArgument, AttemptNotOpen, and as `Scheduler.step` does.
        """
        increment = integer("increment", increment, 0, _timing.MAX_PROGRESS - self.num_steps)
        if increment == 0 and loss is None and not said:
            self._settle()
        elif self._held is not None and loss is None and not said:
            self._held += increment
        else:
            self._ready().step(increment, loss, **said)
            self._is_stepped = True

    def get_lr(self, param_group: Mapping[str, Any]) -> float:
        """Return the LR in force of a param group of the optimizer, or of one with such keys.

        Raises GroupMismatch.
        """
        keys = self._keys_of(param_group)
        if self._scheduler is None or self._table is None:
            return self._schedule.rate_at_start(keys)
        return float(self._values()[self._table.index(keys)][0])

    def get_wd(self, param_group: Mapping[str, Any] | None = None) -> float:
        """Return the WD in force before `wd_mult`, of a param group or of one without keys.

        Raises GroupMismatch.
        """
        keys = GroupKeys() if param_group is None else self._keys_of(param_group)
        if self._scheduler is None or self._table is None:
            return self._schedule.decay_at_start(keys)
        return float(self._values()[self._table.without_multiplier(keys)][1])

    def state_dict(self) -> dict[str, Any]:
        """Return Megatron-LM's state, and our own beside it under the key "lrpilot".

        Megatron-LM's class loads it, passes over our key, and goes on with the schedule alone;
        `megatron_state_dict` is for leaving, and refuses where that would be another LR. Waits for
        losses as `Scheduler.state_dict` does; before the attempt has opened there is nothing to
        wait for, and no key of our own. Not every rank needs to call it.
        """
        state = write_state(self._schedule, self.num_steps)
        if self._scheduler is not None:
            state[OWN] = {**self._scheduler.state_dict(), "delay": self._delay}
        return state

    def megatron_state_dict(self, *, force: bool = False) -> dict[str, Any]:
        """Return Megatron-LM's state alone, to go on without lrpilot.

        With `force`, also where changes by policies or operators are in force, which are lost.
        Raises ExportRefused, and as `Scheduler.changes_in_force` does.
        """
        if self._scheduler is not None and not force:
            changes = self._scheduler.changes_in_force()
            if changes:
                shown = "".join(
                    f"\n  {change.id} from progress {change.progress} on, by {change.source}: "
                    f"{change.summary} ({change.reason})"
                    for change in changes
                )
                raise ExportRefused(
                    f"run {self._connection.run!r}: Megatron-LM's scheduler would go on without "
                    f"{len(changes)} changes that are in force at progress {self.num_steps}:"
                    f"{shown}\nGive force=True to leave them out",
                    facts={"changes": ", ".join(change.id for change in changes)},
                )
        return write_state(self._schedule, self.num_steps)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Open the attempt at a state, ours or Megatron-LM's of any age, and write LR and WD.

        Load the optimizer's state first, as Megatron-LM does. Nothing changes where it is
        refused, and then every rank raises. A state that another run saved is taken for what
        Megatron-LM knows of it where the connection says `resume_at` its num_steps.

        Raises InvalidState, InvalidArgument where a value is not the checkpoint's and no flag
        says which wins, and as `lrpilot.connect` and `Pilot.scheduler` do.
        """
        problem: LrpilotError | None = None
        try:
            read = self._read(state_dict)
        except LrpilotError as error:
            problem = error
        # Pipeline stages have param groups of their own, so one may be refused alone.
        agree(_process_group(), problem, {}, JoinRefused, "load the same state on every rank")
        saved, own, schedule, keys = read
        stands = (self._schedule, self._keys, self.num_steps)
        if self._scheduler is not None and stands == (schedule, keys, saved.num_steps):
            # A framework may load a state twice.
            self._settle()
            return
        self._open(schedule, keys, begin=saved.num_steps, own=own, is_loaded=True)

    # What it has beside that.

    @property
    def pilot(self) -> Pilot:
        """This process's part of the run, such as for `Pilot.on_directive`.

        A state that is loaded into an open scheduler, and so moves it, takes a new one. Raises
        AttemptNotOpen.
        """
        if self._pilot is None:
            raise AttemptNotOpen(
                f"run {self._connection.run!r}: the attempt has not opened yet: it opens at "
                "load_state_dict(), begin(), or at the first step",
                facts={"run": self._connection.run},
            )
        return self._pilot

    def begin(self) -> None:
        """Open the attempt where no state was loaded, before the first step.

        Raises as `lrpilot.connect` and `Pilot.scheduler` do.
        """
        if self._scheduler is None:
            self._open(self._schedule, self._keys, begin=self._begin)
        elif not self._is_stepped:
            # What was loaded after the scheduler's state has LR and WD of its own.
            self._settle()

    def close(self) -> None:
        """Deliver what is queued and end the connection, as `Pilot.close` does."""
        if self._pilot is not None:
            self._pilot.close()

    # Inside.

    def __getattr__(self, name: str) -> Any:
        if name in _ARGUMENTS:
            return getattr(self._schedule, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _ARGUMENTS:
            raise AttributeError(
                f"{name} cannot be set: the run has it. `lrpilot run adjust` and `lrpilot run "
                "revise` change LR and WD while the training runs; at a restart, give another "
                "argument and override_opt_param_scheduler"
            )
        super().__setattr__(name, value)

    def _read(
        self, state_dict: Mapping[str, Any]
    ) -> tuple[MegatronState, Mapping[str, Any] | None, Schedule, list[GroupKeys]]:
        """Return a state, our part of it, and the schedule and keys that it leads to.

        Raises InvalidState, InvalidArgument.
        """
        saved = MegatronState.read(state_dict)
        own = self._own_part(state_dict.get(OWN), saved.num_steps)
        loaded = read_groups(self.optimizer)
        if self.override_opt_param_scheduler:
            schedule, keys = self._schedule, self._keys
        elif self.use_checkpoint_opt_param_scheduler:
            schedule, keys = saved.applied(self._schedule), loaded
        else:
            schedule, keys = saved.checked(self._schedule), self._keys
            _check_keys(keys, loaded, schedule.own)
        schedule.check_groups(keys)
        return saved, own, schedule, keys

    def _own_part(self, own: Any, num_steps: int) -> Mapping[str, Any] | None:
        """Return our part of a state; None: there is none that counts. Raises InvalidState."""
        if own is None:
            return None
        run = self._connection.run
        owner = own.get("run", run) if isinstance(own, Mapping) else run
        if owner != run:
            if self._connection.resume_at == num_steps:
                return None
            raise InvalidState(
                f"state: it belongs to run {owner!r}, not to run {run!r}. resume_at={num_steps} "
                f"begins run {run!r} there with the schedule alone, without what changed LR and WD "
                f"in run {owner!r}",
                facts={"run": run, "state_run": owner, "num_steps": num_steps},
            )
        progress = decode(run, own).progress
        if progress not in (None, num_steps):
            raise InvalidState(
                f"state: num_steps is {num_steps}, and {OWN!r} was saved at progress {progress}; "
                f"take {OWN!r} out to begin at num_steps without it",
                facts={"num_steps": num_steps, "progress": progress},
            )
        return None if progress is None else own

    def _open(
        self,
        schedule: Schedule,
        keys: list[GroupKeys],
        *,
        begin: int | None,
        own: Mapping[str, Any] | None = None,
        is_loaded: bool = False,
    ) -> Scheduler:
        """Open an attempt, in place of the one that this scheduler has, and write LR and WD."""
        table = GroupTable(schedule.own, of_all_ranks(keys))
        connection, left = self._connection, self._pilot
        # The usual one is of the batch size that the run began with.
        delay = (own or {}).get("delay") or self._delay or usual_delay()
        spec = schedule.spec(table, name=connection.run, extras=connection.extras, delay=delay)
        wins = self.override_opt_param_scheduler or (
            is_loaded and self.use_checkpoint_opt_param_scheduler
        )
        names = [table.name(each) for each in keys]
        self._starts += 1
        pilot = connection.open(spec, begin=begin, revise=bool(wins), start=self._starts)
        try:
            if left is not None:
                # Once the new attempt is open, the server takes no more of the one that is left.
                left._session._deliver(_timing.CLOSE_FLUSH_S)
            scheduler = Scheduler(
                pilot._session, NamedOptimizer(self.optimizer, names), state=own, defer=False
            )
        except BaseException:
            pilot._abandon()
            raise
        if left is not None:
            left._end(0.0)
        self._schedule, self._keys, self._table = schedule, keys, table
        self._pilot, self._scheduler, self._delay = pilot, scheduler, delay
        self._is_stepped = False
        self._settle()
        return scheduler

    def _settle(self) -> None:
        """Write LR and WD once more, and the bounds that count, where something else wrote."""
        self._ready().apply()
        for group, keys in zip(self.optimizer.param_groups, self._keys, strict=False):
            keys.write(group)

    def _ready(self) -> Scheduler:
        """Return the scheduler of the attempt, which opens where a step comes first."""
        scheduler = self._scheduler
        if scheduler is None:
            used = self._written()
            scheduler = self._open(self._schedule, self._keys, begin=self._begin)
            if self._written() != used:
                raise AttemptNotOpen(
                    f"run {self._connection.run!r}: a step was made before the attempt had opened, "
                    f"with LR and WD {used}; the run has {self._written()} at progress "
                    f"{self.num_steps}. Call begin() before the first step, or wrap train_step in "
                    "lrpilot.client.megatron.reporting",
                    facts={"run": self._connection.run, "used": used},
                )
        return scheduler

    def _written(self) -> list[tuple[float, float]]:
        return [
            (float(group["lr"]), float(group["weight_decay"]))
            for group in self.optimizer.param_groups
        ]

    def _values(self) -> Any:
        return self.pilot._session.values(self._ready().progress)

    def _keys_of(self, param_group: Mapping[str, Any]) -> GroupKeys:
        for group, keys in zip(self.optimizer.param_groups, self._keys, strict=False):
            if group is param_group:
                return keys
        return GroupKeys.of(param_group)

    def _hold(self) -> None:
        """Let steps wait for what `_release` is given."""
        self._held = 0

    def _drop(self) -> None:
        """Forget the step that waits."""
        self._held = None

    def _release(self, loss: Loss, grad_norm: Loss, *, ends: bool) -> None:
        """Make the step that waits; none: the update was skipped, unless the training ends."""
        increment, self._held = self._held, None
        if increment:
            self.step(increment, loss, grad_norm=grad_norm, batch=increment)
        elif not ends:
            self.step(1, loss, grad_norm=grad_norm, skipped=True)

    def _warn_of_ramp(self) -> None:
        args = getattr(sys.modules.get("megatron.training.global_vars"), "_GLOBAL_ARGS", None)
        ramp = None if args is None else ramp_by_iterations(args)
        if ramp is not None:
            logger.warning(
                "run %s: batches grow (%s) while warmup and decay are given in iterations, which "
                "Megatron-LM counts as iterations of the full batch: the warmup takes longer than "
                "that, and the decay is not over when the training is. Give them in samples",
                self._connection.run,
                ramp,
            )


_ARGUMENTS = frozenset(Schedule.__dataclass_fields__)
"""Attributes of Megatron-LM's class, as they are in force."""


def _check_keys(built: list[GroupKeys], loaded: list[GroupKeys], own: GroupKeys) -> None:
    """Refuse bounds of param groups that the checkpoint has otherwise. Raises InvalidArgument."""
    for at, (ours, theirs) in enumerate(zip(built, loaded, strict=False)):
        wanted, saved = vars(ours.within(own)), vars(theirs.within(own))
        for name, got in wanted.items():
            if got != saved[name]:
                raise invalid_argument(
                    f"{name} of param group {at}",
                    got,
                    f"{saved[name]!r}, which the checkpoint has, unless a flag says which wins",
                )
