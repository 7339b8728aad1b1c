"""As much of a training as a scheduler needs: losses that nobody computed, and param groups."""

import random
from typing import Any


class Optimizer:
    """One param group, without parameters."""

    def __init__(self) -> None:
        self.param_groups: list[dict[str, Any]] = [{"lr": 1.0, "weight_decay": 1.0}]

    @property
    def values(self) -> tuple[str, ...]:
        """LR and WD, as `float.hex`."""
        (group,) = self.param_groups
        return float(group["lr"]).hex(), float(group["weight_decay"]).hex()


def loss_at(progress: int, salt: str = "") -> float:
    """Return a loss that falls, with noise, and is no number now and then."""
    noise = random.Random(f"{salt}/{progress}")
    if noise.random() < 0.01:
        return float("nan")
    return 4.0 / (1.0 + progress / 300.0) + 0.05 * noise.random()
