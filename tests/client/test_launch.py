"""Where a process stands in its job: what the launchers set, and what arguments say."""

from __future__ import annotations

import pytest

import lrpilot.client as lrpilot
from lrpilot.client._launch import find_place

PAIRS = [
    ("RANK", "WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
]


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher has set anything."""
    for name in (name for pair in PAIRS for name in pair):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("names", PAIRS)
def test_a_launcher_says_it(names: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(names, ("3", "8"), strict=True):
        monkeypatch.setenv(name, value)
    place = find_place(None, None, "start")
    assert (place.rank, place.world_size, place.group) == (3, 8, None)
    with pytest.raises(lrpilot.ConnectRefused, match="8 ranks"):
        find_place(None, None, None)


def test_the_innermost_launcher_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under torchrun on each node of a Slurm job."""
    for name, value in zip((*PAIRS[0], *PAIRS[1]), ("5", "16", "1", "2"), strict=True):
        monkeypatch.setenv(name, value)
    place = find_place(None, None, "start")
    assert (place.rank, place.world_size) == (5, 16)


def test_arguments_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    assert find_place(0, 1, None).world_size == 1
    assert find_place(7, None, "start").rank == 7


def test_a_batch_script_that_started_nothing_is_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm sets the tasks of the job there too."""
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    assert find_place(None, None, None).world_size == 1


@pytest.mark.parametrize("text", ["one", "1.5"])
def test_what_is_no_integer_is_named(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", text)
    with pytest.raises(lrpilot.InvalidArgument, match=r"SLURM_PROCID.*integer"):
        find_place(None, None, None)


def test_a_size_without_a_rank_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(lrpilot.ConnectRefused, match="which one this is"):
        find_place(None, None, "start")
