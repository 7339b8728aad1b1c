"""Recorded losses: what is read from CSV, JSONL and TensorBoard runs, and what is refused."""

import json
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from lrpilot.server.cli._failures import INVALID, CommandError
from lrpilot.server.cli._losses import LossRow, make_reports, read_losses

Write = Callable[[str | bytes], str]
Log = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write losses to a file and return its path."""

    def write(content: str | bytes) -> str:
        path = tmp_path / "losses"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write


def refusal(source: str, **options: Any) -> CommandError:
    with pytest.raises(CommandError) as caught:
        read_losses(source, **options)
    assert caught.value.code == INVALID
    return caught.value


def same(a: Iterable[float | None], b: Iterable[float | None]) -> bool:
    """Compare numbers by their bits, NaN included."""
    return [x if x is None else x.hex() for x in a] == [x if x is None else x.hex() for x in b]


def test_csv_gives_a_row_a_line(write: Write) -> None:
    text = (
        "progress,loss,val_loss,grad_norm,batch,tokens,skipped,val/long context\n".replace(" ", "_")
        + "0,2.5,,1.5,512,4096,,\n\n10,-0.1,2.75,inf,1024,,TRUE,3\n10,1e-3,,,,0.5,0,\n20,,,,,,,\n"
    )
    assert read_losses(write(text)) == [
        LossRow(0, 2.5, gradient_norm=1.5, batch=512, weight=4096.0),
        LossRow(
            10, -0.1, {"val_loss": 2.75, "val/long_context": 3.0}, math.inf, 1024, skipped=True
        ),
        LossRow(10, 1e-3, weight=0.5),
        LossRow(20, None),
    ]


def test_jsonl_of_the_same_is_read_alike(write: Write) -> None:
    lines = [
        {"progress": 0, "loss": 2.5, "grad_norm": 1.5, "batch": 512, "tokens": 4096},
        {"progress": 10, "loss": -0.1, "val_loss": 2.75, "grad_norm": "inf", "skipped": True},
        {"loss": 0.001, "progress": 10.0, "weight": 0.5, "val_loss": None},
        {"progress": 20},
    ]
    assert read_losses(write("\n".join(json.dumps(line) for line in lines) + "\n\n")) == [
        LossRow(0, 2.5, gradient_norm=1.5, batch=512, weight=4096.0),
        LossRow(10, -0.1, {"val_loss": 2.75}, math.inf, skipped=True),
        LossRow(10, 1e-3, weight=0.5),
        LossRow(20, None),
    ]


def test_nan_and_infinities_are_data_in_any_case(write: Write) -> None:
    wanted = [math.nan, math.inf, -math.inf, math.nan, math.inf, 0.1, 5e-324]
    words = ["NaN", "inf", "-Inf", "nan", "+Infinity", "0.1", "5e-324"]
    text = "progress,loss\n" + "".join(f"{n},{word}\n" for n, word in enumerate(words))
    assert same((row.loss for row in read_losses(write(text))), wanted)
    quoted = ['"NaN"', '"inf"', '"-Inf"', "NaN", "Infinity", "0.1", "5e-324"]
    text = "".join(f'{{"progress": {n}, "loss": {word}}}\n' for n, word in enumerate(quoted))
    assert same((row.loss for row in read_losses(write(text))), wanted)


def test_files_of_other_systems_are_read(write: Write) -> None:
    assert read_losses(write("\ufeffprogress , loss\r\n 0 , 1.5 \r\n1.0,2\r\n")) == [
        LossRow(0, 1.5),
        LossRow(1, 2.0),
    ]


@pytest.mark.parametrize(
    ("content", "violation"),
    [
        ("", "got no losses; allowed: a row a loss, with the names progress, loss, "),
        ("progress,loss\n", "got no losses; allowed: a row a loss"),
        ("0,2.5\n1,2.4\n", "line 1: got '0,2.5'; allowed: a header with progress and loss; the na"),
        ("progress\n1\n", "line 1: got 0 columns called loss; allowed: a header with progress"),
        ("\nloss\n1\n", "line 2: got 0 columns called progress; allowed: a header with progress"),
        ("progress,loss,loss\n", "line 1: got 2 columns called loss; allowed: a header with"),
        ("progress,loss,batch,batch\n", "line 1, batch: got 2 columns; allowed: one column of "),
        ("progress,loss,lr\n0,1,2\n", "line 1: got the name 'lr'; allowed: progress, loss, grad_"),
        ("progress,loss,validation\n", "line 1: got the name 'validation'; allowed: progress"),
        ("progress,loss,val_\n", "line 1: got the name 'val_'; allowed: progress"),
        ("progress,loss\n0,1\n1,2,3\n", "line 3: got 3 cells; allowed: 2, as in the header"),
        ("progress,loss\n0\n", "line 2: got 1 cells; allowed: 2, as in the header"),
        ('progress,loss\n0,"1\n', "line 2: got unexpected end of data; allowed: valid CSV"),
        ("progress,loss\n-1,1\n", "line 2, progress: got -1; allowed: a whole number from 0 to 2"),
        ("progress,loss\n1.5,1\n", "line 2, progress: got 1.5; allowed: a whole number from 0 to "),
        ("progress,loss\nnan,1\n", "line 2, progress: got nan; allowed: a whole number from 0 to "),
        ("progress,loss\n1e999,1\n", "line 2, progress: got '1e999'; allowed: a whole number"),
        (f"progress,loss\n{2**53 + 1},1\n", f"line 2, progress: got {2**53 + 1}; allowed: a whole"),
        (
            "progress,loss\n,1\n",
            "line 2, progress: got nothing; allowed: a whole number from 0 to ",
        ),
        (
            "progress,loss\n0,x\n",
            "line 2, loss: got 'x'; allowed: a number, nan, inf or -inf, or n",
        ),
        ("progress,loss\n0,1_0\n", "line 2, loss: got '1_0'; allowed: a number"),
        ("progress,loss\n0,٣\n", "line 2, loss: got '٣'; allowed: a number"),
        ("progress,loss\n0,1e999\n", "line 2, loss: got '1e999'; allowed: a number"),
        ("progress,loss\n3,1\n2,1\n", "line 3, progress: got 2; allowed: more than 3 (line 2): ro"),
        ("progress,loss\n3,1\n\n3,1\n", "line 4, progress: got 3 again; allowed: more than 3 (lin"),
        (
            "progress,loss,skipped\n3,1,1\n4,1,\n",
            "line 3, progress: got 4; allowed: 3 again: its update was skipped (line 2)",
        ),
        ("progress,loss,skipped\n3,1,2\n", "line 2, skipped: got 2; allowed: true, false, 1, 0 or"),
        ("progress,loss,skipped\n3,1,no\n", "line 2, skipped: got 'no'; allowed: true, false, 1,"),
        ("progress,loss,grad_norm\n3,1,-1\n", "line 2, grad_norm: got -1.0; allowed: a number fr"),
        ("progress,loss,batch\n3,1,0\n", "line 2, batch: got 0; allowed: a whole number from 1 to"),
        ("progress,loss,batch\n3,1,1.5\n", "line 2, batch: got 1.5; allowed: a whole number from"),
        ("progress,loss,weight\n3,1,0\n", "line 2, weight: got 0.0; allowed: a finite number abo"),
        ("progress,loss,tokens\n3,1,inf\n", "line 2, tokens: got inf; allowed: a finite number a"),
        ("progress,loss,tokens,weight\n3,1,1,1\n", "line 2, tokens: got a value beside weight; a"),
        ("progress,loss,val_a\n3,1,x\n", "line 2, val_a: got 'x'; allowed: a number, nan, inf or"),
        (b"progress,loss\n0,1\n\xff", "line 3: got bytes that are no UTF-8 (invalid start byte); "),
        ('{"progress": 0\n', "line 1: got Expecting ',' delimiter; allowed: one JSON object a li"),
        ('[{"progress": 0}]\n', "line 1: got '[{\"progress\": 0}]'; allowed: one JSON object a li"),
        ('{"progress": 0}\n[]\n', "line 2: got '[]'; allowed: one JSON object a line"),
        ('{"progress": 0}\n7\n', "line 2: got '7'; allowed: one JSON object a line"),
        ('{"progress": 0, "progress": 1}', "line 1, progress: got 2 values; allowed: one value"),
        ('{"progress": 0, "x": 1}', "line 1: got the name 'x'; allowed: progress, loss, grad_"),
        ('{"loss": 0}', "line 1, progress: got nothing; allowed: a whole number from 0 to 2**53"),
        ('{"progress": true}', "line 1, progress: got True; allowed: a whole number from 0 to"),
        ('{"progress": 0, "loss": "1.5"}', "line 1, loss: got '1.5'; allowed: a number, nan, inf"),
        ('{"progress": 0, "loss": false}', "line 1, loss: got False; allowed: a number, nan, inf"),
        ('{"progress": 0, "loss": {"a": 1}}', "line 1, loss: got [('a', 1)]; allowed: a number"),
        ('{"progress": 0, "loss": 1e999}', "line 1, loss: got '1e999'; allowed: a number, nan"),
        (f'{{"progress": 0, "loss": {10**400}}}', "line 1, loss: got 1000"),
        (f'{{"progress": 0, "loss": {"1" * 5000}}}', "line 1: got Exceeds the limit"),
    ],
)
def test_what_is_refused_is_named_with_its_line(
    write: Write, content: str | bytes, violation: str
) -> None:
    path = write(content)
    error = refusal(path)
    assert error.message == f"{path}: the losses cannot be read"
    (line,) = error.lines
    assert line.startswith(violation)


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    path = tmp_path / "absent.csv"
    assert refusal(str(path)).message == f"{path}: No such file or directory"
    assert refusal("a\0b").message == "a\0b: embedded null byte"


def test_tags_are_for_tensorboard_alone(write: Write) -> None:
    path = write("progress,loss\n0,1\n")
    for options in ({"tag": "loss"}, {"validation_tag": "loss"}):
        assert "--tag and --val-tag are for those alone" in refusal(path, **options).message


def test_reports_move_as_the_trainer_did() -> None:
    rows = [
        LossRow(0, 3.0, weight=2.0),
        LossRow(10, 2.0, skipped=True),
        LossRow(10, 2.1, skipped=True),
        LossRow(10, 2.2, {"val_loss": 1.0}, 0.5, 8),
        LossRow(30, None),
    ]
    reports = list(make_reports(rows))
    moves = [(item.progress, item.moves_to, item.skipped, item.tries) for item in reports]
    # The last one goes as far again as it came.
    assert moves == [
        (0, 10, False, 0), (10, 10, True, 0), (10, 10, True, 1), (10, 30, False, 2),
        (30, 50, False, 0),
    ]  # fmt: skip
    assert [item.loss for item in reports] == [3.0, 2.0, 2.1, 2.2, None]
    assert [item.weight for item in reports] == [2.0, 1.0, 1.0, 1.0, 1.0]
    seen = (reports[3].validation, reports[3].gradient_norm, reports[3].batch)
    assert seen == ({"val_loss": 1.0}, 0.5, 8)


def test_one_row_moves_by_one_and_a_skipped_last_one_stays() -> None:
    assert [item.moves_to for item in make_reports([LossRow(7, 1.0)])] == [8]
    assert [item.moves_to for item in make_reports([LossRow(7, 1.0, skipped=True)])] == [7]
    assert list(make_reports([])) == []


# ---------------------------------------------------------------------------------------------
# TensorBoard.


@pytest.fixture
def log(tmp_path: Path) -> Log:
    """Write scalars into a new event file of a run, as a training script does."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    def log(
        scalars: dict[str, list[tuple[int, float]]], run: str = "run", suffix: str = ""
    ) -> Path:
        writer = EventFileWriter(str(tmp_path / run), filename_suffix=suffix)
        for tag, series in scalars.items():
            for step, value in series:
                summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
                writer.add_event(Event(step=step, summary=summary))
        writer.close()
        return tmp_path / run

    return log


def test_a_run_of_torch_is_read(tmp_path: Path) -> None:
    import torch
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        for step, loss in enumerate((2.5, math.nan, 0.25, math.inf)):
            writer.add_scalar("Loss/train", loss, step * 5)
            writer.add_scalar("lr", 1e-3, step * 5)
        writer.add_histogram("weights", torch.ones(3), 0)
        writer.add_scalar("Loss/new", 7.0, 3, new_style=True)
    rows = read_losses(str(tmp_path))
    assert [row.progress for row in rows] == [0, 5, 10, 15]
    assert same((row.loss for row in rows), (2.5, math.nan, 0.25, math.inf))
    # Newer writers keep scalars as tensors.
    assert read_losses(str(tmp_path), tag="Loss/new") == [LossRow(3, 7.0)]


def test_one_event_file_is_a_run_too(log: Log) -> None:
    (file,) = log({"train/loss": [(0, 2.0), (1, 1.0)]}).iterdir()
    assert read_losses(str(file)) == [LossRow(0, 2.0), LossRow(1, 1.0)]


def test_a_file_that_breaks_off_ends_there(log: Log) -> None:
    (file,) = log({"loss": [(n, 1.0) for n in range(10)]}).iterdir()
    file.write_bytes(file.read_bytes()[:-5])
    assert [row.progress for row in read_losses(str(file))] == list(range(9))


def test_what_a_restart_wrote_again_holds(log: Log) -> None:
    log({"loss": [(n, 1.0) for n in range(6)]}, suffix=".a")
    folder = log({"loss": [(n, 2.0) for n in range(4, 8)]}, suffix=".b")
    assert read_losses(str(folder)) == [LossRow(n, 1.0 if n < 4 else 2.0) for n in range(8)]


def test_a_validation_loss_rides_with_the_next_loss(log: Log) -> None:
    folder = log({"lm loss": [(0, 3.0), (10, 2.0)], "eval": [(0, 4.0), (3, 5.0), (11, 6.0)]})
    assert read_losses(str(folder), validation_tag="eval") == [
        LossRow(0, 3.0, {"val_loss": 4.0}),
        LossRow(10, 2.0, {"val_loss": 5.0}),
        LossRow(11, None, {"val_loss": 6.0}),
    ]
    assert read_losses(str(folder)) == [LossRow(0, 3.0), LossRow(10, 2.0)]


@pytest.mark.parametrize(
    ("tags", "message", "line"),
    [
        (("a", "b"), "no scalar is called like a loss", "scalars: 'a', 'b'"),
        (
            ("loss", "a", "Loss/train"),
            "several scalars are called like a loss",
            "scalars: 'Loss/train', 'loss'",
        ),
    ],
)
def test_a_loss_that_cannot_be_told_must_be_chosen(
    log: Log, tags: tuple[str, ...], message: str, line: str
) -> None:
    folder = log({tag: [(0, 1.0)] for tag in tags})
    error = refusal(str(folder))
    assert (error.message, error.lines) == (f"{folder}: {message}", (line,))
    assert error.hint == "choose one with --tag"
    assert read_losses(str(folder), tag="a") == [LossRow(0, 1.0)]


def test_a_tag_that_the_run_lacks_is_refused_with_those_that_it_has(log: Log) -> None:
    folder = log({"loss": [(0, 1.0)], "b": [(0, 1.0)]})
    for options in ({"tag": "los"}, {"validation_tag": "los"}):
        error = refusal(str(folder), **options)
        assert error.message == f"{folder}: no scalar 'los'"
        assert error.lines == ("scalars: 'b', 'loss'",)


def test_a_folder_of_runs_names_them(log: Log, tmp_path: Path) -> None:
    log({"loss": [(0, 1.0)]}, run="one")
    log({"loss": [(0, 1.0)]}, run="two")
    error = refusal(str(tmp_path))
    assert error.message == f"{tmp_path}: no event files in this folder"
    assert error.lines == (str(tmp_path / "one"), str(tmp_path / "two"))


def test_runs_without_scalars_or_with_negative_steps_are_refused(log: Log, tmp_path: Path) -> None:
    folder = log({})
    assert refusal(str(folder)).lines == ("got no scalars; allowed: event files with scalars",)
    folder = log({"loss": [(-1, 1.0)]}, run="negative")
    assert refusal(str(folder)).lines == ("step: got -1; allowed: steps from 0",)
    file = tmp_path / "events.out.tfevents.1"
    file.write_bytes(b"no events at all")
    assert refusal(str(file)).lines == ("got no scalars; allowed: event files with scalars",)
    absent = tmp_path / "tfevents"
    assert refusal(str(absent)).message == f"{absent}: No such file or directory"


def test_without_its_package_the_extra_is_named(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = log({"loss": [(0, 1.0)]})
    monkeypatch.setitem(sys.modules, "tensorboard.backend.event_processing", None)
    error = refusal(str(folder))
    assert error.message.startswith("TensorBoard runs need the package tensorboard: ")
    assert error.hint == "pip install 'lrpilot[tensorboard]'"
