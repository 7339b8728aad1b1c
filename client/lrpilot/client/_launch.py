"""Where this process stands in its job, and how the ranks of a job agree.

torch is looked up among the modules that the training has imported; it is never imported here.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lrpilot.client._errors import ConnectRefused, invalid_argument


class Group:
    """The default process group of torch.distributed."""

    def __init__(self, distributed: Any) -> None:
        self._distributed = distributed
        self.rank: int = distributed.get_rank()
        self.size: int = distributed.get_world_size()

    def gather(self, item: Any) -> list[Any]:
        """Return what every rank gave, in order of rank, on every rank."""
        items: list[Any] = [None] * self.size
        self._distributed.all_gather_object(items, item)
        return items

    def from_first(self, produce: Callable[[], Any]) -> Any:
        """Return on every rank what `produce` returned on the first, which alone calls it."""
        items = [produce() if self.rank == 0 else None]
        self._distributed.broadcast_object_list(items, src=0)
        return items[0]


@dataclass(frozen=True)
class Place:
    """Where this process stands in its job."""

    rank: int
    """Global rank."""
    world_size: int
    """Number of ranks."""
    group: Group | None
    """The process group over which the ranks agree; None: they do not need one."""


def find_place(rank: int | None, world_size: int | None, key: str | None) -> Place:
    """Return the place of this process.

    Arguments win over an initialised process group, and that over the environment variables
    RANK and WORLD_SIZE. Raises ConnectRefused where several ranks have nothing to agree over.
    """
    group = _process_group()
    size = world_size
    if size is None:
        size = group.size if group else _from_environment("WORLD_SIZE")
    if size is None:
        size = 1
    place = rank
    if place is None:
        place = group.rank if group else _from_environment("RANK")
    if place is None:
        if size > 1:
            raise ConnectRefused(
                f"the job has {size} ranks, and nothing says which one this is: set RANK, give "
                "rank=, or initialise torch.distributed before connecting",
                facts={"world_size": size},
            )
        place = 0
    if not 0 <= place < size:
        raise invalid_argument("rank", place, f"0 to {size - 1} (world size {size})")
    if size == 1 or key is not None:
        return Place(place, size, None)
    if group is None or group.size != size:
        found = (
            "no process group is initialised"
            if group is None
            else f"the initialised process group has {group.size}"
        )
        raise ConnectRefused(
            f"the job has {size} ranks, {found}, and no key was given, so that every rank would "
            "open an attempt of its own against the others. Either call "
            "torch.distributed.init_process_group() before lrpilot.connect(), or give all ranks "
            "of this start of the job the same key=, a new one at every start (for example a "
            "random string that the launcher exports)",
            facts={"world_size": size},
        )
    return Place(place, size, group)


def _process_group() -> Group | None:
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    return Group(distributed)


def _from_environment(name: str) -> int | None:
    text = os.environ.get(name)
    if text is None or not text.strip():
        return None
    try:
        return int(text)
    except ValueError:
        raise invalid_argument(f"environment variable {name}", text, "an integer") from None
