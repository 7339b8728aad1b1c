"""A process group of torch's kind without torch, as far as the client needs one.

Ranks talk to rank 0 over pipes. When a rank dies, the others are told at their next collective, as
NCCL and gloo tell them.
"""

import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any

Links = Sequence["Connection[Any, Any]"]
"""Of rank 0: to each other rank, in order. Of another rank: the one to rank 0."""


class PeerGone(Exception):
    """Another rank of the job has ended."""


def join(rank: int, world_size: int, links: Links) -> None:
    """Let the client of this process find the group that the links make."""
    sys.modules["torch.distributed"] = _Distributed(rank, world_size, links)


class _Distributed(ModuleType):
    """What the client calls of `torch.distributed`."""

    def __init__(self, rank: int, world_size: int, links: Links) -> None:
        super().__init__("torch.distributed")
        self._rank, self._world_size, self._links = rank, world_size, links

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def get_rank(self) -> int:
        return self._rank

    def get_world_size(self) -> int:
        return self._world_size

    def get_backend(self) -> str:
        return "gloo"

    def all_gather_object(self, items: list[Any], item: Any, group: object) -> None:
        """Fill in what every rank gave."""
        try:
            if self._rank == 0:
                items[:] = [item, *(link.recv() for link in self._links)]
            else:
                self._links[0].send(item)
            self.broadcast_object_list(items, 0, group)
        except (EOFError, OSError) as error:
            raise PeerGone("a rank has ended") from error

    def broadcast_object_list(self, items: list[Any], src: int, group: object) -> None:
        """Fill in what rank 0 has."""
        assert src == 0
        try:
            if self._rank == 0:
                for link in self._links:
                    link.send(items)
            else:
                items[:] = self._links[0].recv()
        except (EOFError, OSError) as error:
            raise PeerGone("a rank has ended") from error
