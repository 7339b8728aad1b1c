"""Lets torchtitan run without an accelerator, which it takes for granted: for trying things out.

Import it before torchtitan. What torchtitan asks its device for is answered for the CPU. Two
modules that it imports, and that a small training has no use for, may be missing: Triton, of which
its expert parallelism has kernels, and Hugging Face's `datasets`. And torchtitan 0.3 calls
`torch.distributed.set_timeout`, which torch has only after 2.13.
"""

import sys
from collections import defaultdict
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch._utils
import torch.distributed


class _Missing(ModuleType):
    """A module of which nothing is called."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


class _Device:
    """The module of a device, as torchtitan calls it."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None:
        """There is but one."""

    def get_device_name(self, device: Any) -> str:
        return str(device)

    def get_device_properties(self, _: Any) -> SimpleNamespace:
        return SimpleNamespace(total_memory=1 << 30)

    def memory_stats(self, _: Any) -> dict[str, int]:
        return defaultdict(int)

    def reset_peak_memory_stats(self) -> None:
        """Nothing is counted."""

    def empty_cache(self) -> None:
        """Nothing is kept."""


if not torch.cuda.is_available():
    torch._utils._get_available_device_type = lambda: "cpu"
    torch._utils._get_device_module = lambda _: _Device()
if find_spec("triton") is None:
    name = "torchtitan.distributed.minimal_async_ep.kernels"
    sys.modules[name] = _Missing(name)
if find_spec("datasets") is None:
    for name in ("datasets", "datasets.distributed"):
        sys.modules[name] = _Missing(name)
if not hasattr(torch.distributed, "set_timeout"):
    torch.distributed.set_timeout = torch.distributed.distributed_c10d._set_pg_timeout
