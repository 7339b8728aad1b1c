"""torchtitan's own trainer with lrpilot's schedulers, on the CPU."""

from pathlib import Path

from tests.frameworks.harness import check, make_spec, train_interrupted

GROUPS = [{"name": "weights"}, {"name": "biases", "weight_decay_multiplier": 0.0}]


def test_it_uses_the_curve_through_restarts(tmp_path: Path) -> None:
    spec = make_spec("torchtitan", groups=GROUPS)
    check(train_interrupted(tmp_path, "torchtitan_program", spec), tmp_path, spec)
