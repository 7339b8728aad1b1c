"""`lrpilot simulate`: what a run would have done on recorded losses."""

import io
import json
import math
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import Result

from lrpilot.core import Report, simulate
from lrpilot.server._documents import dump_document, read_spec
from lrpilot.server.cli import _output, _trace
from tests.core.conftest import GOLDEN
from tests.core.test_plateau import NOT_FLOAT64, REFUSED, run_spec

Cli = Callable[..., Result]
Files = Callable[..., tuple[str, str]]

CUTTING = """
name: cutting
total: 100
learning_rate: {peak: 1e-3}
weight_decay: 0.1
policies: [{kind: plateau, factor: 0.5, patience: 1, cooldown: 100}]
feedback: {delay: 4}
"""
FLAT = "progress,loss\n" + "".join(f"{n},2.0\n" for n in range(20))
"""The first loss is the best one; the second bad one, at 2, cuts."""

REASON = "loss 2: none below 2 * (1 - 0.0001) for 2 reports (patience 1)"


def lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """Write a spec and losses to files and return their paths."""

    def write(spec: str = CUTTING, losses: str = FLAT) -> tuple[str, str]:
        paths = tmp_path / "spec.yaml", tmp_path / "losses"
        for path, text in zip(paths, (spec, losses), strict=True):
            path.write_text(text, encoding="utf-8")
        return str(paths[0]), str(paths[1])

    return write


GOLDEN_ROWS = [
    row
    for row in map(json.loads, (GOLDEN / "torch_plateau.jsonl").read_text().splitlines())
    if row["id"] not in {*REFUSED, *NOT_FLOAT64}
]


@pytest.mark.parametrize("row", GOLDEN_ROWS, ids=[row["id"] for row in GOLDEN_ROWS])
def test_the_rates_of_a_plateau_are_torchs_to_the_bit(cli: Cli, files: Files, row: Any) -> None:
    spec, losses = files(
        dump_document(run_spec(row["config"], row["init_lrs"]).to_mapping()),
        "progress,loss\n" + "".join(f"{n},{float(x)!r}\n" for n, x in enumerate(row["losses"])),
    )
    for index in range(len(row["init_lrs"])):
        group = ("--group", f"group {index}")
        got = lines(cli("simulate", spec, "--losses", losses, "--format", "jsonl", *group).stdout)
        # What torch leaves after the loss at n is used at n + 1.
        assert [line["lr"].hex() for line in got[1:]] == [rates[index] for rates in row["lr_hex"]]


def test_jsonl_is_exactly_what_is_promised(cli: Cli, files: Files) -> None:
    spec, losses = files(losses="progress,loss\n0,2.0\n1,nan\n2,inf\n3,2.5\n4,-inf\n5,\n6,1e-3\n")
    result = cli("simulate", spec, "--losses", losses, "--format", "jsonl")
    assert (result.exit_code, result.stderr) == (0, "")
    rest = '"lr": 0.001, "weight_decay": 0.1, "adjustments": []}\n'
    words = ["2.0", '"nan"', '"inf"', "2.5", '"-inf"', "null", "0.001", "null"]
    assert result.stdout == "".join(
        f'{{"progress": {n}, "loss": {word}, {rest}' for n, word in enumerate(words)
    )


def test_what_is_decided_on_a_loss_stands_there_and_shows_at_its_effective_progress(
    cli: Cli, files: Files
) -> None:
    spec, losses = files()
    got = lines(cli("simulate", spec, "--losses", losses, "--format", "jsonl").stdout)
    assert [line["progress"] for line in got] == list(range(21))
    assert [line["lr"] for line in got] == [1e-3] * 6 + [5e-4] * 15
    decided = {line["progress"]: line["adjustments"] for line in got if line["adjustments"]}
    assert list(decided) == [2]
    (adjustment,) = decided[2]
    assert adjustment["policy"] == "plateau"
    assert adjustment["effective"] == 6
    assert adjustment["reason"] == REASON
    assert (adjustment["action"], adjustment["source"]) == ("multiply", "policies.0 (plateau)")
    assert got[-1] == {
        "progress": 20, "loss": None, "lr": 5e-4, "weight_decay": 0.1, "adjustments": [],
    }  # fmt: skip


def test_the_trace_is_that_of_the_core_to_the_bit(cli: Cli, files: Files) -> None:
    text = CUTTING.replace("cooldown: 100", "factor: 0.7").replace("factor: 0.5, ", "")
    series = [3.0, 2.9, math.nan, 3.1, 2.95, 2.9, 3.0, 2.8, 2.81, 2.82, 2.83, math.inf] * 5
    spec, losses = files(
        text, "progress,loss\n" + "".join(f"{n},{x!r}\n" for n, x in enumerate(series))
    )
    got = lines(cli("simulate", spec, "--losses", losses, "--format", "jsonl").stdout)
    reports = [Report(n, loss, 1.0, n + 1) for n, loss in enumerate(series)]
    wanted = list(simulate(read_spec(text), reports))
    assert [line["lr"].hex() for line in got] == [step.learning_rates[0].hex() for step in wanted]
    assert [[item["id"] for item in line["adjustments"]] for line in got] == [
        [item.id for item in step.decided if item.mode == "act"] for step in wanted
    ]
    assert got[-1]["lr"] < 5e-4


def test_advice_changes_nothing_and_stands_beside_the_adjustments(cli: Cli, files: Files) -> None:
    spec, losses = files(CUTTING.replace("cooldown: 100", "cooldown: 100, mode: advise"))
    got = lines(cli("simulate", spec, "--losses", losses, "--format", "jsonl").stdout)
    assert {line["lr"] for line in got} == {1e-3}
    assert not any(line["adjustments"] for line in got)
    advice = {line["progress"]: line["advice"] for line in got if "advice" in line}
    assert list(advice) == [2]
    assert [(item["effective"], item["mode"]) for item in advice[2]] == [(6, "advise")]


def test_losses_come_from_jsonl_and_standard_input_too(cli: Cli, files: Files) -> None:
    spec, losses = files()
    wanted = cli("simulate", spec, "--losses", losses, "--format", "jsonl").stdout
    assert cli("simulate", spec, "--losses", "-", "--format", "jsonl", input=FLAT).stdout == wanted
    as_json = "".join(f'{{"progress": {n}, "loss": 2}}\n' for n in range(20))
    result = cli("simulate", spec, "--losses", "-", "--format", "jsonl", input=as_json)
    assert result.stdout == wanted
    # What simulate writes of the losses' own fields is what it reads.
    result = cli("simulate", "-", "--losses", losses, "--format", "jsonl", input=CUTTING)
    assert result.stdout == wanted
    result = cli("simulate", "-", "--losses", "-", input=CUTTING)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "SPEC and --losses cannot both be standard input" in result.stderr


def test_sparse_losses_keep_their_distance(cli: Cli, files: Files) -> None:
    spec, losses = files(losses="progress,loss\n0,2\n10,2\n20,2\n30,2\n")
    got = lines(cli("simulate", spec, "--losses", losses, "--format", "jsonl").stdout)
    # Decided on the loss at 20, effective at 24, used first at 30.
    assert [(line["progress"], line["lr"]) for line in got] == [
        (0, 1e-3), (10, 1e-3), (20, 1e-3), (30, 5e-4), (40, 5e-4),
    ]  # fmt: skip
    assert got[2]["adjustments"][0]["effective"] == 24


def test_a_skipped_update_is_seen_and_does_not_advance(cli: Cli, files: Files) -> None:
    spec, losses = files(losses="progress,loss,skipped\n0,2,\n1,9,1\n1,2,\n2,2,\n3,2,\n")
    got = lines(cli("simulate", spec, "--losses", losses, "--format", "jsonl").stdout)
    assert [(line["progress"], line["loss"]) for line in got] == [
        (0, 2.0), (1, 9.0), (1, 2.0), (2, 2.0), (3, 2.0), (4, None),
    ]  # fmt: skip
    assert [line["progress"] for line in got if line["adjustments"]] == [2]


def test_a_validation_loss_reaches_the_policy_that_reads_it(cli: Cli, files: Files) -> None:
    text = CUTTING.replace("patience: 1", "patience: 1, metric: val_loss")
    rows = "".join(f"{n},{3 - n / 10},{2 if n % 5 == 0 else ''}\n" for n in range(20))
    spec, losses = files(text, f"progress,loss,val_loss\n{rows}")
    got = lines(cli("simulate", spec, "--losses", losses, "--format", "jsonl").stdout)
    assert [line["progress"] for line in got if line["adjustments"]] == [10]


def test_the_group_is_chosen_by_name(cli: Cli, files: Files, specs: Any) -> None:
    spec, losses = files(specs.grouped, "progress,loss\n500,2\n")

    def first(*arguments: str) -> tuple[float, float]:
        result = cli("simulate", spec, "--losses", losses, "--format", "jsonl", *arguments)
        line = lines(result.stdout)[0]
        return line["lr"], line["weight_decay"]

    assert first() == first("--group", "no_decay") == (2e-4, 0.0)
    assert first("--group", "embedding") == (1e-4, 0.1)
    result = cli("simulate", spec, "--losses", losses, "--group", "x")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "error: no group 'x'; the groups are no_decay, embedding\n"


def test_weight_decay_is_null_where_the_run_sets_none(cli: Cli, files: Files) -> None:
    spec, losses = files(CUTTING.replace("weight_decay: 0.1\n", ""))
    got = lines(cli("simulate", spec, "--losses", losses, "--format", "jsonl").stdout)
    assert {line["weight_decay"] for line in got} == {None}


def test_a_table_tells_who_did_what_and_why(cli: Cli, files: Files) -> None:
    spec, losses = files(losses=FLAT + "20,nan\n")
    result = cli("simulate", spec, "--losses", losses)
    assert result.stdout.splitlines() == [
        "loss at  effective  policy   mode  what      lr or wd there   why",
        f"2        6          plateau  act   LR x 0.5  0.001 -> 0.0005  {REASON}",
        "",
        "21 losses (1 not finite), 1 adjustment; lr 0.001 at 0, 0.0005 at 21",
    ]
    assert result.stderr == ""


def test_a_table_of_a_run_without_decisions_is_its_summary(cli: Cli, files: Files) -> None:
    spec, losses = files(losses="progress,loss\n0,2\n1,1\n")
    result = cli("simulate", spec, "--losses", losses)
    assert result.stdout == "2 losses, 0 adjustments; lr 0.001 at 0, 0.001 at 2\n"


def test_a_table_shows_a_change_of_weight_decay(cli: Cli, files: Files) -> None:
    policy = "{kind: overfit, patience: 1, window: 1, threshold: 0, mode: act}"
    text = CUTTING.replace("{kind: plateau, factor: 0.5, patience: 1, cooldown: 100}", policy)
    rows = "".join(f"{n},{3 - n / 10},{1 + n if n % 5 == 0 else ''}\n" for n in range(10))
    spec, losses = files(text, f"progress,loss,val_loss\n{rows}")
    (_, row, *_) = cli("simulate", spec, "--losses", losses).stdout.splitlines()
    assert "wd 0.1 -> 0.15" in row


def test_output_goes_to_a_file(cli: Cli, files: Files, tmp_path: Path) -> None:
    spec, losses = files()
    for name, form in (("a.jsonl", "jsonl"), ("a.txt", "table")):
        target = tmp_path / name
        result = cli("simulate", spec, "--losses", losses, "-o", str(target))
        assert (result.exit_code, result.output) == (0, "")
        assert (
            target.read_text() == cli("simulate", spec, "--losses", losses, "--format", form).stdout
        )


@pytest.mark.parametrize("form", ["png", "svg"])
@pytest.mark.parametrize("name", ["plain", "grouped", "staged", "cutting"])
def test_pictures(cli: Cli, files: Files, specs: Any, tmp_path: Path, name: str, form: str) -> None:
    text = CUTTING if name == "cutting" else getattr(specs, name)
    # Losses of every kind: an outlier, NaN, none.
    rows = "".join(f"{n},{2 + 1 / (1 + n)}\n" for n in range(0, 900, 10))
    spec, losses = files(text, f"progress,loss\n{rows}900,1e30\n901,nan\n902,\n903,-inf\n904,2\n")
    target = tmp_path / f"a.{form}"
    result = cli("simulate", spec, "--losses", losses, "-o", str(target))
    assert (result.exit_code, result.output) == (0, "")
    picture = target.read_bytes()
    if form == "png":
        assert picture.startswith(b"\x89PNG\r\n\x1a\n")
        assert int.from_bytes(picture[16:20], "big") == 1500
    else:
        assert ET.fromstring(picture).tag == "{http://www.w3.org/2000/svg}svg"
    again = tmp_path / "again"
    cli("simulate", spec, "--losses", losses, "--format", form, "-o", str(again))
    assert again.read_bytes() == picture


def svg_texts(path: Path) -> list[str]:
    """Return the texts of a picture; matplotlib notes each in a comment beside its glyphs."""
    return [part.split("-->")[0].strip() for part in path.read_text().split("<!--")[1:]]


def test_a_picture_tells_the_reasons_and_counts_what_it_cannot_show(
    cli: Cli, files: Files, tmp_path: Path
) -> None:
    spec, losses = files(losses=FLAT + "20,nan\n21,1e9\n")
    target = tmp_path / "a.svg"
    cli("simulate", spec, "--losses", losses, "-o", str(target))
    texts = svg_texts(target)
    assert "cutting: simulation of 22 losses" in texts
    assert f"at 6 (plateau): LR x 0.5; on the loss at 2: {REASON}" in texts
    assert "not finite: 1 loss" in texts


@pytest.mark.parametrize(
    "losses",
    [
        "progress,loss\n7,2\n",
        "progress,loss\n7,nan\n",
        "progress,loss\n7,\n",
        "progress,loss\n0,0\n",
    ],
)
def test_a_picture_of_almost_nothing(cli: Cli, files: Files, tmp_path: Path, losses: str) -> None:
    spec, path = files("{name: a, total: 9, learning_rate: {peak: 0}}", losses)
    result = cli("simulate", spec, "--losses", path, "-o", str(tmp_path / "a.png"))
    assert (result.exit_code, result.output) == (0, "")


def test_a_picture_lists_changes_before_advice(cli: Cli, files: Files, tmp_path: Path) -> None:
    policies = (
        "policies: [{kind: plateau, patience: 0, mode: advise}, "
        "{kind: plateau, factor: 0.9, patience: 30, min_lr: 5e-4}]"
    )
    text = CUTTING.replace(CUTTING.splitlines()[5], policies)
    rows = "".join(f"{n},2\n" for n in range(100))
    spec, losses = files(text, f"progress,loss\n{rows}")
    target = tmp_path / "a.svg"
    cli("simulate", spec, "--losses", losses, "-o", str(target))
    texts = " ".join(svg_texts(target))
    assert "at 35 (plateau): LR x 0.9" in texts
    # XML writes no two hyphens in a comment.
    assert "and 16 more: - -format table lists them all" in texts


def test_a_logarithmic_axis_needs_losses_above_zero(cli: Cli, files: Files, tmp_path: Path) -> None:
    target = str(tmp_path / "a.png")
    spec, losses = files(losses="progress,loss\n0,1000\n1,1e-3\n2,nan\n")
    assert cli("simulate", spec, "--losses", losses, "--log", "-o", target).exit_code == 0
    spec, losses = files(losses="progress,loss\n0,1000\n1,0\n")
    result = cli("simulate", spec, "--losses", losses, "--log", "-o", target)
    assert result.exit_code == 2
    assert "a loss is 0 or negative" in result.stderr
    result = cli("simulate", spec, "--losses", losses, "--log")
    assert result.exit_code == 2
    assert "--log is for pictures alone" in result.stderr


def test_a_picture_is_nothing_for_a_terminal(
    cli: Cli, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_output, "is_terminal", lambda: True)
    spec, losses = files()
    result = cli("simulate", spec, "--losses", losses, "--format", "png")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.endswith("give a file, such as -o simulation.png\n")


def test_errors_of_the_losses_and_of_the_spec_are_told(cli: Cli, files: Files) -> None:
    spec, losses = files(losses="progress,loss\n0,x\n")
    result = cli("simulate", spec, "--losses", losses)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        f"error: {losses}: the losses cannot be read\n"
        "  line 2, loss: got 'x'; allowed: a number, nan, inf or -inf, or nothing\n"
    )
    result = cli("simulate", "absent.yaml", "--losses", losses)
    assert result.stderr == "error: absent.yaml: No such file or directory\n"
    assert "Missing option '--losses'" in cli("simulate", spec).stderr


def test_long_files_show_progress_on_a_terminal_alone(
    cli: Cli, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_trace, "LONG", 10)
    spec, losses = files()
    assert cli("simulate", spec, "--losses", losses).stderr == ""
    terminal = io.StringIO()
    monkeypatch.setattr(
        _trace, "Console", lambda stderr: Console(file=terminal, force_terminal=stderr)
    )
    shown = cli("simulate", spec, "--losses", losses)
    assert "replaying" in terminal.getvalue()
    assert "1 adjustment" in shown.stdout
