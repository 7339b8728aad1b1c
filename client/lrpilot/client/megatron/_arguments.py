"""Megatron-LM's parsed arguments, read as its training does to make a scheduler."""

from collections.abc import Mapping, Sequence
from typing import Any

from lrpilot.client._errors import InvalidArgument, invalid_argument
from lrpilot.client.megatron._connection import DELAY_STEPS
from lrpilot.client.megatron._groups import GroupKeys, GroupTable, of_all_ranks, read_groups
from lrpilot.client.megatron._schedule import Schedule, read_extras

_OF_ITERATIONS = ("lr_decay_iters", "lr_warmup_iters", "lr_wsd_decay_iters")

_OF_SAMPLES = ("lr_decay_samples", "lr_warmup_samples", "lr_wsd_decay_samples")

_RAMPS = ("rampup_batch_size", "step_batch_size_schedule")


def spec_from_args(
    args: Any,
    *,
    name: str,
    optimizer: Any = None,
    policies: Sequence[Mapping[str, Any]] = (),
    feedback: Mapping[str, Any] | None = None,
    bounds: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the run spec with the meaning of Megatron-LM's parsed arguments, to the bit.

    Args:
        args: what its argument parser returned; it is left as it is.
        name: of the run.
        optimizer: whose param groups the groups of the spec are, those of every rank: with
            torch.distributed every rank calls it then. None: the groups that Megatron-LM makes of
            a model by default.
        policies, feedback, bounds: fields of the spec that Megatron-LM has no arguments for.

    Raises InvalidArgument naming the argument that cannot be mapped, its value and what is
    allowed.
    """
    schedule = read_schedule(args)
    keys = standard_groups(args) if optimizer is None else of_all_ranks(read_groups(optimizer))
    schedule.check_groups(keys)
    batch = getattr(args, "global_batch_size", None)
    return schedule.spec(
        GroupTable(schedule.own, keys),
        name=name,
        extras=read_extras(policies, feedback, bounds),
        delay=DELAY_STEPS * batch if batch else None,
    )


def read_schedule(args: Any) -> Schedule:
    """Return what Megatron-LM would give its scheduler for parsed arguments, to the bit.

    Unlike there, `args` is left as it is. Raises InvalidArgument for what has no meaning here.
    """
    if getattr(args, "warmup", None) is not None:
        allowed = "None: Megatron-LM takes lr_warmup_fraction in its place"
        raise invalid_argument("warmup", args.warmup, allowed)
    if getattr(args, "head_lr_mult", 1.0) != 1.0:
        allowed = "1.0: it has had no effect since Megatron-LM 0.16; give the group a max_lr"
        raise invalid_argument("head_lr_mult", args.head_lr_mult, allowed)
    if _flag(args, "override") and _flag(args, "use_checkpoint"):
        raise both_flags()
    start, end = _weight_decay(args)
    # Where samples are given, Megatron-LM itself derives train_iters from them.
    by_samples = getattr(args, "train_samples", None)
    decay, ramp, anneal, warmup = _in_samples(args) if by_samples else _in_iterations(args)
    fraction = getattr(args, "lr_warmup_fraction", None)
    if fraction is not None:
        if warmup:
            name = "lr_warmup_samples" if by_samples else "lr_warmup_iters"
            raise invalid_argument(name, getattr(args, name), "0 beside lr_warmup_fraction")
        warmup = _number(args, "lr_warmup_fraction") * decay
    style = _needed(args, "lr_decay_style")
    if style == "WSD" and anneal is None:
        raise invalid_argument(
            "lr_wsd_decay_samples" if by_samples else "lr_wsd_decay_iters", None, "a number for WSD"
        )
    return Schedule(
        init_lr=getattr(args, "lr_warmup_init", 0.0),
        max_lr=float(_number(args, "lr")),
        min_lr=_number(args, "min_lr"),
        lr_warmup_steps=warmup,
        lr_decay_steps=decay,
        lr_decay_style=style,
        start_wd=start,
        end_wd=end,
        wd_incr_steps=ramp,
        wd_incr_style=getattr(args, "weight_decay_incr_style", "constant"),
        wsd_decay_steps=anneal,
        lr_wsd_decay_style=getattr(args, "lr_wsd_decay_style", "exponential"),
    )


def standard_groups(args: Any) -> list[GroupKeys]:
    """Return the keys of the param groups that Megatron-LM makes of a model.

    Matrices, then biases and vectors, which have no weight decay, and the embedding and output
    layers where they have a learning rate of their own. Raises InvalidArgument.
    """
    if getattr(args, "use_mup", False):
        allowed = "False, or the optimizer as well: the LR of its groups goes by the model's width"
        raise invalid_argument("use_mup", args.use_mup, allowed)
    groups = [GroupKeys(), GroupKeys(wd_mult=0.0)]
    if getattr(args, "decoupled_lr", None) is not None:
        groups.append(GroupKeys(args.decoupled_lr, getattr(args, "decoupled_min_lr", None)))
    elif getattr(args, "decoupled_min_lr", None) is not None:
        raise invalid_argument(
            "decoupled_min_lr", args.decoupled_min_lr, "None without decoupled_lr"
        )
    return groups


def ramp_by_iterations(args: Any) -> str | None:
    """Return the argument by which batches grow while the lengths are given in iterations.

    Megatron-LM turns iterations into samples by the last batch size: while batches are smaller the
    warmup takes more iterations than said, and the decay is not over when the training is.
    """
    if getattr(args, "train_samples", None):
        return None
    return next((name for name in _RAMPS if getattr(args, name, None)), None)


def both_flags() -> InvalidArgument:
    """Return the error for flags that contradict each other."""
    return invalid_argument(
        "override_opt_param_scheduler", True, "False beside use_checkpoint_opt_param_scheduler"
    )


_Lengths = tuple[int, int, int | None, float]
"""End of the decay, length of the WD ramp, of the anneal, of the warmup; in samples."""


def _in_samples(args: Any) -> _Lengths:
    _refuse(args, _OF_ITERATIONS, "train_samples")
    total = _number(args, "train_samples")
    decay = getattr(args, "lr_decay_samples", None)
    return (
        total if decay is None else decay,
        total,
        getattr(args, "lr_wsd_decay_samples", None),
        getattr(args, "lr_warmup_samples", 0),
    )


def _in_iterations(args: Any) -> _Lengths:
    if not getattr(args, "train_iters", None):
        raise invalid_argument("train_iters", getattr(args, "train_iters", None), _EITHER)
    _refuse(args, _OF_SAMPLES, "train_iters")
    ramp = ramp_by_iterations(args)
    if ramp is not None:
        allowed = (
            "None with train_iters: smaller batches leave the warmup too long and the decay "
            "unfinished. Give train_samples, lr_decay_samples and lr_warmup_samples instead"
        )
        raise invalid_argument(ramp, getattr(args, ramp), allowed)
    batch, iterations = _number(args, "global_batch_size"), _number(args, "train_iters")
    decay, anneal = (getattr(args, name, None) for name in ("lr_decay_iters", "lr_wsd_decay_iters"))
    return (
        (iterations if decay is None else decay) * batch,
        iterations * batch,
        None if anneal is None else anneal * batch,
        getattr(args, "lr_warmup_iters", 0) * batch,
    )


_EITHER = "a number above 0 here or for train_samples"


def _weight_decay(args: Any) -> tuple[Any, Any]:
    names = ("start_weight_decay", "end_weight_decay")
    start, end = (getattr(args, name, None) for name in names)
    if getattr(args, "weight_decay_incr_style", "constant") == "constant":
        # Megatron-LM fills them in where it checks its arguments.
        decay = _number(args, "weight_decay")
        for name, got in zip(names, (start, end), strict=True):
            if got not in (None, decay):
                allowed = f"None or {decay!r} (weight_decay) with weight_decay_incr_style constant"
                raise invalid_argument(name, got, allowed)
        return decay, decay
    return _number(args, names[0]), _number(args, names[1])


def _refuse(args: Any, names: tuple[str, ...], beside: str) -> None:
    for name in names:
        if getattr(args, name, None):
            raise invalid_argument(name, getattr(args, name), f"None or 0 beside {beside}")


def _needed(args: Any, name: str) -> Any:
    got = getattr(args, name, None)
    if got is None:
        raise invalid_argument(name, got, "a value")
    return got


def _number(args: Any, name: str) -> Any:
    got = _needed(args, name)
    if not isinstance(got, (int, float)) or isinstance(got, bool):
        raise invalid_argument(name, got, "a number")
    return got


def _flag(args: Any, which: str) -> bool:
    return bool(getattr(args, f"{which}_opt_param_scheduler", False))
