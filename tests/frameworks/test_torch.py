"""torch's own loop, with a scheduler that is one of torch's."""

from pathlib import Path

from tests.frameworks.harness import check, make_spec, train_interrupted


def test_it_uses_the_curve_through_skips_and_restarts(tmp_path: Path) -> None:
    spec = make_spec(
        "torch",
        groups=[
            {"name": "no_decay", "weight_decay_multiplier": 0.0},
            {"name": "matrices", "peak": 5e-3, "min": 1e-3},
        ],
    )
    check(train_interrupted(tmp_path, "torch_program", spec), tmp_path, spec)
