"""Golden vectors, and the real classes that the core reproduces."""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

GOLDEN = Path(__file__).parent.parent / "golden"

Rows = list[dict[str, Any]]


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Rows]:
    """Read one file of golden vectors, outputs of the real third-party classes."""

    def read(name: str) -> Rows:
        lines = (GOLDEN / f"{name}.jsonl").read_text(encoding="ascii").splitlines()
        return [json.loads(line) for line in lines]

    return read


@dataclass(frozen=True)
class Megatron:
    """The real `OptimizerParamScheduler`, and its arguments as a run spec."""

    real: Any

    def spec(
        self, config: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], *, total: int
    ) -> dict[str, Any]:
        """Return the run spec with the meaning of Megatron-LM's arguments."""
        style = config["lr_decay_style"]
        decay = {
            "style": "wsd" if style == "WSD" else style,
            "end": config["lr_decay_steps"],
            "anneal": config["wsd_decay_steps"],
            "anneal_style": config["lr_wsd_decay_style"],
        }
        return {
            "name": "megatron",
            "unit": "samples",
            "total": total,
            "learning_rate": {
                "init": config["init_lr"],
                "peak": config["max_lr"],
                "min": config["min_lr"],
                "warmup": config["lr_warmup_steps"],
                "decay": decay,
            },
            "weight_decay": {
                "start": config["start_wd"],
                "end": config["end_wd"],
                "style": config["wd_incr_style"],
                "over": config["wd_incr_steps"],
            },
            "groups": [
                {
                    "name": f"group {index}",
                    "peak": group.get("max_lr"),
                    "min": group.get("min_lr"),
                    "weight_decay": {"start": group.get("start_wd"), "end": group.get("end_wd")},
                    "weight_decay_multiplier": group.get("wd_mult"),
                }
                for index, group in enumerate(groups)
            ],
        }

    def values(
        self,
        config: Mapping[str, Any],
        groups: Sequence[Mapping[str, Any]],
        points: Sequence[int],
    ) -> dict[int, list[tuple[str, str]]]:
        """Return the real class's LR and WD per group at each of these ascending points."""
        optimizer = SimpleNamespace(param_groups=[dict(group) for group in groups])
        scheduler = self.real(optimizer, **config)
        values = {}
        for point in points:
            scheduler.step(point - scheduler.num_steps)
            values[point] = [
                (float(group["lr"]).hex(), float(group["weight_decay"]).hex())
                for group in optimizer.param_groups
            ]
        return values


@pytest.fixture(scope="session")
def megatron() -> Megatron:
    """Load Megatron-LM, whose import warns of what is not installed beside it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    return Megatron(OptimizerParamScheduler)
