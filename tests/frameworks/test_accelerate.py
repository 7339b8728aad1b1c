"""Accelerate: accumulation, skips, several processes, its own checkpoints."""

import sys
from pathlib import Path

import pytest

from tests.frameworks.harness import check, make_spec, train_interrupted

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")
TWO = (*TORCHRUN, "--local-addr", "127.0.0.1", "--nproc-per-node", "2", "-m")


@pytest.mark.parametrize("prepares", [True, False], ids=["prepared", "unprepared"])
def test_it_uses_the_curve_through_skips_and_restarts(tmp_path: Path, prepares: bool) -> None:
    spec = make_spec("accelerate")
    training = train_interrupted(
        tmp_path, "accelerate_program", spec, prepares=prepares, processes=1
    )
    check(training, tmp_path, spec)


def test_two_processes_make_one_move_an_update_and_report_their_mean(tmp_path: Path) -> None:
    spec = make_spec("accelerate-two")
    training = train_interrupted(
        tmp_path, "accelerate_program", spec, *TWO, prepares=True, processes=2
    )
    check(training, tmp_path, spec)
