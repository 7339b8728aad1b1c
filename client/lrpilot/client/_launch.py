"""Where this process stands in its job, and how the ranks of a job agree.

torch is looked up among the modules that the training has imported; it is never imported here.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from lrpilot.client import _timing
from lrpilot.client._errors import ConnectRefused, invalid_argument


class Group:
    """The default process group of torch.distributed, or another one of the same ranks."""

    def __init__(self, distributed: Any, handle: Any = None) -> None:
        self._distributed = distributed
        self._handle = handle
        self.rank: int = distributed.get_rank()
        self.size: int = distributed.get_world_size()

    def gather(self, item: Any) -> list[Any]:
        """Return what every rank gave, in order of rank, on every rank."""
        items: list[Any] = [None] * self.size
        self._distributed.all_gather_object(items, item, group=self._handle)
        return items

    def from_first(self, produce: Callable[[], Any]) -> Any:
        """Return on every rank what `produce` returned on the first, which alone calls it."""
        items = [produce() if self.rank == 0 else None]
        self._distributed.broadcast_object_list(items, src=0, group=self._handle)
        return items[0]

    def on_cpu(self) -> "Group":
        """Return a group of the same ranks that needs no accelerator; every rank calls it.

        What rank 0 does alone, such as an evaluation, may take longer than torch's half an hour:
        the others would not notice without this group.
        """
        if self._distributed.get_backend() == "gloo":
            return self
        patience = timedelta(seconds=_timing.LONGEST_WAIT_S)
        handle = self._distributed.new_group(backend="gloo", timeout=patience)
        return Group(self._distributed, handle)


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

    Arguments win over an initialised process group, and that over what a launcher has set (see
    `_LAUNCHERS`). Raises ConnectRefused where several ranks have nothing to agree over.
    """
    group = _process_group()
    found_rank, found_size = rank, world_size
    if group is not None:
        found_rank, found_size = group.rank, group.size
    elif rank is None or world_size is None:
        found_rank, found_size = _of_launcher()
    size = found_size if world_size is None else world_size
    if size is None:
        size = 1
    place = found_rank if rank is None else rank
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


_LAUNCHERS = (
    ("RANK", "WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
)
"""Names of the environment variables for rank and number of ranks: of torchrun and the operators of
Kubernetes, of srun (SLURM_NTASKS would also be set where no srun has started several), of Open MPI,
of MPICH and Intel MPI."""


def _of_launcher() -> tuple[int | None, int | None]:
    """Return rank and number of ranks as the first launcher that set either says."""
    for names in _LAUNCHERS:
        rank, size = (_from_environment(name) for name in names)
        if rank is not None or size is not None:
            return rank, size
    return None, None


def _from_environment(name: str) -> int | None:
    text = os.environ.get(name)
    if text is None or not text.strip():
        return None
    try:
        return int(text)
    except ValueError:
        raise invalid_argument(f"environment variable {name}", text, "an integer") from None
