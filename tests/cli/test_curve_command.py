"""`lrpilot curve`: values, formats, and what it refuses."""

import json
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from lrpilot.core._schedules import base_values
from lrpilot.server._documents import dump_document, read_spec
from lrpilot.server.cli import _output
from tests.core.conftest import GOLDEN, Megatron

Cli = Callable[..., Result]
SpecFile = Callable[..., str]


def lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]


def spec_of(row: dict[str, Any]) -> dict[str, Any]:
    """Return the spec that says what the arguments of a Megatron scheduler say."""
    config, groups = row["config"], row["groups"]
    last = max(checkpoint["num_steps"] for checkpoint in row["checkpoints"])
    # Past the total the value of the end is served; Megatron knows no such end.
    total = max(last, config["lr_decay_steps"], config["wd_incr_steps"]) + 1
    return Megatron(real=None).spec(config, groups, total=total)


GOLDEN_ROWS = [
    json.loads(line) for line in (GOLDEN / "megatron_schedules.jsonl").read_text().splitlines()
]


@pytest.mark.parametrize("row", GOLDEN_ROWS, ids=[row["id"] for row in GOLDEN_ROWS])
def test_values_are_megatrons_to_the_bit(cli: Cli, spec_file: SpecFile, row: Any) -> None:
    path = spec_file(dump_document(spec_of(row)))
    checkpoints = row["checkpoints"]
    at = ",".join(str(checkpoint["num_steps"]) for checkpoint in checkpoints)
    for index in range(len(row["groups"])):
        result = cli("curve", path, "--at", at, "--group", f"group {index}", "--format", "jsonl")
        assert result.exit_code == 0, result.output
        got = [
            (line["progress"], line["lr"].hex(), line["weight_decay"].hex())
            for line in lines(result.stdout)
        ]
        assert got == [
            (item["num_steps"], item["lr_hex"][index], item["wd_hex"][index])
            for item in checkpoints
        ]


def test_jsonl_is_exactly_what_is_promised(cli: Cli, spec_file: SpecFile, specs: Any) -> None:
    result = cli("curve", spec_file(), "--at", "0,7,1000,7", "--format", "jsonl")
    expected = [base_values(read_spec(specs.plain), n)[0] for n in (0, 7, 1000, 7)]
    assert result.stdout == "".join(
        f'{{"progress": {n}, "lr": {lr!r}, "weight_decay": {decay!r}}}\n'
        for n, (lr, decay) in zip((0, 7, 1000, 7), expected, strict=True)
    )
    assert result.stderr == ""


def test_weight_decay_is_null_where_the_run_sets_none(
    cli: Cli, spec_file: SpecFile, specs: Any
) -> None:
    result = cli("curve", spec_file(specs.staged), "--at", "10", "--format", "jsonl")
    assert result.stdout == '{"progress": 10, "lr": 0.0002, "weight_decay": null}\n'


def test_stages_that_start_from_the_rate_in_force(
    cli: Cli, spec_file: SpecFile, specs: Any
) -> None:
    result = cli(
        "curve", spec_file(specs.staged), "--at", "599,600,625,650,1000", "--format", "jsonl"
    )
    rates = [line["lr"] for line in lines(result.stdout)]
    assert rates == [
        base_values(read_spec(specs.staged), n)[0][0] for n in (599, 600, 625, 650, 1000)
    ]
    assert rates[:4] == [2e-4, 2e-4, pytest.approx(1.5e-4), pytest.approx(1e-4)]


@pytest.mark.parametrize(
    ("arguments", "positions"),
    [
        ((), [*range(0, 1000, 20), 1000]),
        (("--every", "300"), [0, 300, 600, 900, 1000]),
        (("--every", "500"), [0, 500, 1000]),
        (("--every", "5000"), [0, 1000]),
        (("--at", "3, 1,2"), [3, 1, 2]),
        (("--at", "9223372036854775807"), [2**63 - 1]),
    ],
)
def test_positions(
    cli: Cli, spec_file: SpecFile, arguments: tuple[str, ...], positions: list[int]
) -> None:
    result = cli("curve", spec_file(), *arguments, "--format", "jsonl")
    assert [line["progress"] for line in lines(result.stdout)] == positions
    table = cli("curve", spec_file(), *arguments)
    assert [int(line.split()[0]) for line in table.stdout.splitlines()[1:]] == positions


def test_a_short_run_has_a_row_for_each_progress(cli: Cli, spec_file: SpecFile) -> None:
    path = spec_file("{name: a, total: 3, learning_rate: {peak: 1}}")
    result = cli("curve", path, "--format", "jsonl")
    assert [line["progress"] for line in lines(result.stdout)] == [0, 1, 2, 3]


@pytest.mark.parametrize("at", ["", "1,,2", "-1", "1.5", "x", "9223372036854775808", "1" * 30, "٣"])
def test_positions_that_are_none(cli: Cli, spec_file: SpecFile, at: str) -> None:
    result = cli("curve", spec_file(), "--at", at)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "progress" in result.stderr


def test_at_and_every_exclude_each_other(cli: Cli, spec_file: SpecFile) -> None:
    result = cli("curve", spec_file(), "--at", "1", "--every", "2")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--at and --every" in result.stderr


def test_a_table(cli: Cli, spec_file: SpecFile) -> None:
    result = cli("curve", spec_file(), "--every", "500")
    assert result.stdout.splitlines() == [
        "progress           lr  weight_decay",
        "       0            0          0.01",
        "     500  0.000121497         0.055",
        "    1000        1e-05           0.1",
    ]


def test_a_table_of_groups_and_of_stages(cli: Cli, spec_file: SpecFile, specs: Any) -> None:
    grouped = cli("curve", spec_file(specs.grouped), "--at", "500")
    assert grouped.stdout.splitlines() == [
        "progress  lr[no_decay]  lr[embedding]  weight_decay[no_decay]  weight_decay[embedding]",
        "     500        0.0002         0.0001                       0                      0.1",
    ]
    one = cli("curve", spec_file(specs.grouped), "--at", "500", "--group", "embedding")
    assert one.stdout.splitlines() == [
        "progress  lr[embedding]  weight_decay[embedding]",
        "     500         0.0001                      0.1",
    ]
    staged = cli("curve", spec_file(specs.staged), "--at", "599,600")
    assert staged.stdout.splitlines() == [
        "progress   stage      lr",
        "     599   first  0.0002",
        "     600  second  0.0002",
    ]


def test_jsonl_without_a_group_has_the_first(cli: Cli, spec_file: SpecFile, specs: Any) -> None:
    first = cli("curve", spec_file(specs.grouped), "--format", "jsonl")
    assert (
        first.stdout
        == cli("curve", spec_file(specs.grouped), "--format", "jsonl", "--group", "no_decay").stdout
    )
    assert lines(first.stdout)[-1]["weight_decay"] == 0.0


def test_an_unknown_group_names_the_groups(cli: Cli, spec_file: SpecFile, specs: Any) -> None:
    result = cli("curve", spec_file(specs.grouped), "--group", "embeding")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "error: no group 'embeding'; the groups are no_decay, embedding\n"
    none = cli("curve", spec_file(), "--group", "x")
    assert none.exit_code == 2
    assert none.stderr == "error: no group 'x': the spec declares none\n"


def test_the_spec_comes_from_a_file_standard_input_or_a_preset(
    cli: Cli, spec_file: SpecFile, specs: Any
) -> None:
    file = cli("curve", spec_file(), "--format", "jsonl").stdout
    assert cli("curve", "-", "--format", "jsonl", input=specs.plain).stdout == file
    as_json = json.dumps(read_spec(specs.plain).to_mapping())
    assert cli("curve", "-", "--format", "jsonl", input=as_json).stdout == file
    preset = cli("curve", "preset:llama3-8b-fp8", "--at", "1000", "--format", "jsonl")
    assert lines(preset.stdout)[0]["lr"] == 2e-4


def test_every_violation_of_a_spec_is_listed(cli: Cli, spec_file: SpecFile) -> None:
    path = spec_file(
        "name: A\ntotal: 10\nlearning_rate: {peak: 0.1, min: 0.2, decay: {style: cosin}}\nx: 1"
    )
    result = cli("curve", path)
    assert (result.exit_code, result.stdout) == (2, "")
    message, *rest = result.stderr.splitlines()
    assert message == f"error: {path}: the run spec is invalid"
    fields = [line.split(":")[0] for line in rest]
    assert sorted(fields) == [
        "  learning_rate.decay.style",
        "  learning_rate.min",
        "  name",
        "  x",
    ]
    assert all("got " in line and "; allowed: " in line for line in rest)


def test_a_spec_that_is_no_yaml(cli: Cli) -> None:
    result = cli("curve", "-", input="name: a\ntotal: [1\n")
    assert (result.exit_code, result.stdout) == (2, "")
    message, violation = result.stderr.splitlines()
    assert message == "error: standard input: the document cannot be read"
    assert violation.startswith("  line 3, column 1: got ")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("absent.yaml", None, "No such file or directory"),
        (".", None, "Is a directory"),
        ("binary", b"\xff\xfe", "no UTF-8 text (at byte 0)"),
        ("large", b"#" * (256 * 1024 + 1), "more than 262,144 bytes"),
        ("a\0b", None, "embedded null byte"),
    ],
)
def test_a_spec_that_cannot_be_read(
    cli: Cli, tmp_path: Path, name: str, content: bytes | None, reason: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    result = cli("curve", str(path))
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"error: {path}: {reason}\n"


def test_a_preset_without_its_prefix_gets_a_hint(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    result = cli("curve", "llama3-8b-fp8")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[1] == "hint: the preset is named preset:llama3-8b-fp8"


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("plain", "png"),
        ("grouped", "png"),
        ("staged", "png"),
        ("grouped", "svg"),
        ("staged", "svg"),
    ],
)
def test_pictures(cli: Cli, spec_file: SpecFile, specs: Any, name: str, form: str) -> None:
    path = spec_file(getattr(specs, name))
    tmp_path = Path(path).parent
    target = tmp_path / f"curve.{form}"
    result = cli("curve", path, "-o", str(target))
    assert (result.exit_code, result.output) == (0, "")
    picture = target.read_bytes()
    if form == "png":
        assert picture.startswith(b"\x89PNG\r\n\x1a\n")
        assert int.from_bytes(picture[16:20], "big") == 1500
    else:
        root = ET.fromstring(picture)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
    again = tmp_path / "again"
    cli("curve", path, "--format", form, "-o", str(again))
    assert again.read_bytes() == picture


def test_pictures_of_chosen_positions(
    cli: Cli, spec_file: SpecFile, tmp_path: Path, specs: Any
) -> None:
    for number, arguments in enumerate((("--at", "900,5"), ("--every", "100"), ("--at", "3"))):
        target = tmp_path / f"{number}.png"
        result = cli("curve", spec_file(specs.staged), *arguments, "-o", str(target))
        assert (result.exit_code, result.output) == (0, "")
        assert target.read_bytes().startswith(b"\x89PNG")


def test_names_are_no_formulas(cli: Cli, spec_file: SpecFile, tmp_path: Path) -> None:
    groups = "[{name: '$x^{$'}, {name: 層}, {name: _x}]"
    text = f"{{name: a, total: 9, learning_rate: {{peak: 1}}, groups: {groups}}}"
    target = tmp_path / "curve.svg"
    result = cli("curve", spec_file(text), "-o", str(target))
    assert (result.exit_code, result.output) == (0, "")


@pytest.mark.parametrize("form", ["png", "svg"])
def test_a_picture_is_nothing_for_a_terminal(
    cli: Cli, spec_file: SpecFile, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_output, "is_terminal", lambda: True)
    result = cli("curve", spec_file(), "--format", form)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        f"error: a picture is nothing for a terminal: give a file, such as -o curve.{form}\n"
    )


@pytest.mark.parametrize("arguments", [(), ("-o", "-")])
def test_a_picture_goes_to_standard_output(
    cli: Cli, spec_file: SpecFile, arguments: tuple[str, ...]
) -> None:
    result = cli("curve", spec_file(), "--format", "png", *arguments)
    assert result.stdout_bytes.startswith(b"\x89PNG")


def test_output_goes_to_a_file(cli: Cli, spec_file: SpecFile, tmp_path: Path) -> None:
    for name, arguments in {"a.jsonl": (), "b": ("--format", "jsonl")}.items():
        target = tmp_path / name
        result = cli("curve", spec_file(), *arguments, "-o", str(target))
        assert (result.exit_code, result.output) == (0, "")
        assert target.read_text() == cli("curve", spec_file(), "--format", "jsonl").stdout
    table = tmp_path / "c.txt"
    cli("curve", spec_file(), "-o", str(table))
    assert table.read_text() == cli("curve", spec_file()).stdout


def test_output_that_cannot_be_written(cli: Cli, spec_file: SpecFile, tmp_path: Path) -> None:
    target = tmp_path / "nowhere" / "curve.png"
    result = cli("curve", spec_file(), "-o", str(target))
    assert result.exit_code == 2
    assert result.stderr == f"error: {target}: No such file or directory\n"


def test_a_table_is_bounded(cli: Cli, spec_file: SpecFile) -> None:
    path = spec_file("{name: a, total: 20000000000, learning_rate: {peak: 1}}")
    result = cli("curve", path, "--every", "1")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "at most 1,000,000" in result.stderr
    assert "hint: use a larger K" in result.stderr


@pytest.mark.parametrize("jump", [1, 123_456_789, 10**12 - 1])
def test_a_picture_finds_a_jump(jump: int) -> None:
    from lrpilot.server.cli._chart import bends

    points = bends(lambda progress: (1.0, float(progress >= jump)), 10**12)
    assert {0, jump - 1, jump, 10**12} <= set(points)
    assert len(points) < 1000
