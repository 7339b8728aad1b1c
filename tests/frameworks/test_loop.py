"""The loop of plain torch: two lines more than without lrpilot."""

from pathlib import Path

from tests.frameworks.harness import check, make_spec, train_interrupted


def test_it_uses_the_curve_through_restarts(tmp_path: Path) -> None:
    spec = make_spec("loop")
    check(train_interrupted(tmp_path, "loop_program", spec), tmp_path, spec)
