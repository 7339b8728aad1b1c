"""CUDA graphs: a captured step replays what it was captured with, save what lies on the device.

The optimizer's Python does not run in a replay. A number that it read while it was captured, such
as a learning rate as a Python float, is part of the graph and stays what it was.
"""

import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any, Literal

from lrpilot.client._errors import CaptureRefused, invalid_argument

logger = logging.getLogger("lrpilot.client")

InGraph = Literal["refuse", "warn"]
"""What to do where a captured step would have to use another weight decay than it keeps."""


def is_capturing() -> bool:
    """Return whether the current stream of this thread is being captured into a CUDA graph."""
    cuda: Any = getattr(sys.modules.get("torch"), "cuda", None)
    return bool(cuda is not None and cuda.is_initialized() and cuda.is_current_stream_capturing())


def _is_compiling() -> bool:
    compiler: Any = getattr(sys.modules.get("torch"), "compiler", None)
    return bool(compiler is not None and compiler.is_compiling())


def refuse_in_capture(call: str) -> None:
    """Raise CaptureRefused where a call would become part of a CUDA graph."""
    if is_capturing():
        raise CaptureRefused(
            f"{call} was called while a CUDA graph was captured: every replay would repeat its "
            "copies, and none would talk to the server. Call it after graph.replay(), outside of "
            "the capture, with the loss tensor that the graph writes to",
            facts={"call": call},
        )


def before_each_step(optimizer: Any, call: Callable[..., None]) -> Any:
    """Have `call` called before each step, and return the handle that ends it; None: cannot.

    Wrappers, such as Accelerate's, may have the method and no place for hooks; the optimizer that
    they hold has both.
    """
    while optimizer is not None:
        try:
            return optimizer.register_step_pre_hook(call)
        except AttributeError:
            optimizer = getattr(optimizer, "optimizer", None)
    return None


class CapturedStep:
    """What the captured step of one optimizer keeps, found out while it is captured.

    Where the optimizer has no hooks, param groups that say `capturable` count as captured with
    the weight decay that they are given first.
    """

    def __init__(self, optimizer: Any, wd_in_graph: InGraph) -> None:
        if wd_in_graph not in ("refuse", "warn"):
            raise invalid_argument("wd_in_graph", wd_in_graph, "'refuse' or 'warn'")
        self.kept: dict[int, float | None] = {}
        """Weight decay that the graph keeps, by the number of the param group."""
        self._optimizer = optimizer
        self._refuses = wd_in_graph == "refuse"
        self._is_seen = before_each_step(optimizer, self._before_step) is not None
        self._warned: set[int] = set()

    @property
    def may_keep(self) -> bool:
        """Whether a graph keeps weight decay, or could and is not seen."""
        return bool(self.kept) or not self._is_seen

    def check(self, run: str, wanted: Mapping[int, float | None]) -> None:
        """Compare the weight decay that param groups are to have with what the graph keeps.

        Raises CaptureRefused where they differ and that is refused.
        """
        if not self._is_seen:
            for at, decay in wanted.items():
                group = self._optimizer.param_groups[at]
                if group.get("capturable") and not _follows(group.get("weight_decay")):
                    self.kept.setdefault(at, decay)
        if not self.kept:
            return
        differing = {
            at: (self.kept[at], decay)
            for at, decay in wanted.items()
            if at in self.kept and self.kept[at] != decay
        }
        if not differing:
            return
        shown = ", ".join(
            f"#{at} keeps {kept!r} in place of {decay!r}" for at, (kept, decay) in differing.items()
        )
        text = (
            f"run {run!r}: the weight decay of param groups changes, and their captured step "
            f"cannot follow: {shown}"
        )
        if self._refuses:
            raise CaptureRefused(f"{text}. {_REMEDIES}", facts={"run": run, "groups": shown})
        if not self._warned.issuperset(differing):
            self._warned.update(differing)
            logger.warning("%s, until it is captured again", text)

    def _before_step(self, *_: Any) -> None:
        # A compiled step is traced, and this with it: numbers of it are watched by torch.
        if not _is_compiling() and is_capturing():
            self._note()

    def _note(self) -> None:
        groups = list(enumerate(self._optimizer.param_groups))
        fixed = {at: group["lr"] for at, group in groups if not _follows(group["lr"])}
        if fixed:
            raise CaptureRefused(
                f"the optimizer's step is captured, and the lr of param groups {list(fixed)} is "
                f"{next(iter(fixed.values()))!r}: the graph would keep it for ever. Make the "
                "optimizer with lr=torch.tensor(lr, device=device) on the device of the "
                "parameters, and with capturable=True where it has that",
                facts={"groups": list(fixed)},
            )
        self.kept = {
            at: float(group["weight_decay"])
            for at, group in groups
            if group.get("weight_decay") is not None and not _follows(group["weight_decay"])
        }
        self._warned.clear()


def _follows(held: Any) -> bool:
    """Return whether a captured step reads the number anew in each replay."""
    # A tensor on the CPU is read while the step is captured, as a Python number is.
    return hasattr(held, "fill_") and held.device.type != "cpu"


_REMEDIES = (
    "Either keep the weight decay of the run constant; or use an optimizer that reads a tensor "
    "weight_decay on the device, as examples/train_fp8.py does (torch's own do not); or leave "
    "the optimizer's step out of the graph; or pass wd_in_graph='warn' to pilot.scheduler() and "
    "capture the step again when scheduler.applied() differs from the param groups"
)
