"""The program as a whole: help, version, completion, presets, and how it ends."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from lrpilot.server import cli as package
from lrpilot.server._documents import read_spec
from lrpilot.server.cli._options import address
from lrpilot.server.cli._presets import preset_names

Cli = Callable[..., Result]
SpecFile = Callable[..., str]
PROGRAM = (sys.executable, "-m", "lrpilot.server.cli")

COMMANDS = [
    ("serve",),
    ("curve",),
    ("run", "create"),
    ("run", "list"),
    ("run", "show"),
    ("run", "watch"),
    ("run", "history"),
    ("run", "revise"),
    ("run", "finish"),
    ("run", "delete"),
    ("preset", "list"),
    ("preset", "show"),
]


def test_the_package_exports_its_entry_alone() -> None:
    assert package.__all__ == ["main"]


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help_with_examples(
    cli: Cli, command: tuple[str, ...], flag: str
) -> None:
    result = cli(*command, flag)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "Usage: lrpilot" in result.stdout
    examples = result.stdout.partition("Examples:")[2]
    assert f"lrpilot {' '.join(command)}" in examples


@pytest.mark.parametrize("group", [(), ("run",), ("preset",)], ids=["lrpilot", "run", "preset"])
def test_a_group_alone_shows_its_commands(cli: Cli, group: tuple[str, ...]) -> None:
    shown = cli(*group, "--help").stdout
    for command in COMMANDS:
        if command[:-1] == group:
            assert command[-1] in shown
    bare = cli(*group)
    assert "Usage: lrpilot" in bare.output


def test_the_help_lists_exit_codes(cli: Cli) -> None:
    text = " ".join(cli("--help").stdout.split())
    for part in ("0 done", "1 refused", "2 wrong usage", "3 no answer"):
        assert part in text


def test_version(cli: Cli) -> None:
    try:
        version = metadata.version("lrpilot")
    except metadata.PackageNotFoundError:
        version = "unknown"
    result = cli("--version")
    assert (result.exit_code, result.stdout) == (0, f"lrpilot {version}\n")


@pytest.mark.parametrize(
    "arguments",
    [("unknown",), ("--unknown",), ("curve",), ("run", "show"), ("curve", "-", "--format", "pdf"),
     ("curve", "-", "--every", "0"), ("run", "shwo", "x"), ("preset", "show", "a", "b")],
    ids=" ".join,
)  # fmt: skip
def test_wrong_usage_is_exit_code_2(cli: Cli, arguments: tuple[str, ...]) -> None:
    result = cli(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Usage: lrpilot" in result.stderr


def completions(words: str) -> list[str]:
    environment = {
        **os.environ,
        "_LRPILOT_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    done = subprocess.run(
        PROGRAM, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_the_shell_completes_commands_and_presets() -> None:
    assert completions("lrpilot run fi") == ["finish"]
    assert completions("lrpilot preset show llama3-8b-fp8") == [
        name for name in preset_names() if name.startswith("llama3-8b-fp8")
    ]


def test_the_shell_gets_its_completion_script() -> None:
    done = subprocess.run(
        PROGRAM,
        env={**os.environ, "_LRPILOT_COMPLETE": "source_bash"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stderr == ""
    assert "_LRPILOT_COMPLETE=complete_bash" in done.stdout


def test_presets_are_listed(cli: Cli) -> None:
    result = cli("preset", "list")
    assert (result.exit_code, result.stderr) == (0, "")
    header, *rows = result.stdout.splitlines()
    assert header.split() == ["preset", "what"]
    assert tuple(row.split()[0] for row in rows) == preset_names()
    assert all(len(row.split()) > 2 for row in rows)
    parsed = [json.loads(line) for line in cli("preset", "list", "--json").stdout.splitlines()]
    assert tuple(fields["name"] for fields in parsed) == preset_names()
    assert all(fields["summary"] for fields in parsed)


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_is_a_spec(cli: Cli, name: str) -> None:
    as_yaml = cli("preset", "show", name)
    assert (as_yaml.exit_code, as_yaml.stderr) == (0, "")
    as_json = cli("preset", "show", name, "--json")
    spec = read_spec(as_yaml.stdout)
    assert read_spec(as_json.stdout) == spec
    assert json.loads(as_json.stdout) == spec.to_mapping()
    curve = cli("curve", f"preset:{name}", "--format", "jsonl")
    assert curve.stdout == cli("curve", "-", "--format", "jsonl", input=as_yaml.stdout).stdout
    assert json.loads(curve.stdout.splitlines()[-1])["progress"] == spec.total


@pytest.mark.parametrize("arguments", [("preset", "show", "gpt5"), ("curve", "preset:gpt5")])
def test_an_unknown_preset_names_the_presets(cli: Cli, arguments: tuple[str, ...]) -> None:
    result = cli(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        f"error: no preset 'gpt5'; the presets are {', '.join(preset_names())}\n"
    )


@pytest.mark.parametrize(
    "text", ["127.0.0.1:0", "host.name-1:65535", "[::1]:50051", "[fe80::1%eth0]:1"]
)
def test_addresses(text: str) -> None:
    assert address(text) == text


# ---------------------------------------------------------------------------------------------
# As a process of its own.


def start(*arguments: str, **options: Any) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [*PROGRAM, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )


def test_output_to_a_pipe_is_plain_text(spec_file: SpecFile) -> None:
    with start("curve", spec_file(), "--every", "500") as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")
    assert out.startswith(b"progress ")
    assert b"\x1b" not in out


def test_an_error_is_no_traceback(tmp_path: Path) -> None:
    path = tmp_path / "absent.yaml"
    with start("curve", str(path)) as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, b"")
    assert err.decode() == f"error: {path}: No such file or directory\n"


def test_a_reader_who_leaves_is_no_error(spec_file: SpecFile) -> None:
    path = spec_file("{name: a, total: 100000000, learning_rate: {peak: 1}}")
    with start("curve", path, "--every", "1", "--format", "jsonl") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert json.loads(process.stdout.readline())["progress"] == 0
        process.stdout.close()
        err = process.stderr.read()
        assert (process.wait(timeout=60), err) == (141, b"")


def test_ctrl_c_is_quiet(tmp_path: Path) -> None:
    path = tmp_path / "spec"
    os.mkfifo(path)
    # What a shell starts in the background ignores Ctrl-C, and so does what that starts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = start("curve", str(path))
    finally:
        signal.signal(signal.SIGINT, before)
    # The second opens once the program has opened it, which then waits for what never comes.
    with process, path.open("wb"):
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, b"", b"")


def test_a_terminal_without_unicode_shows_what_it_can(spec_file: SpecFile) -> None:
    text = "{name: a, total: 9, learning_rate: {peak: 1}, groups: [{name: 層}]}"
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    with start("curve", spec_file(text), "--group", "é", env=environment) as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, b"")
    assert err.decode("latin-1") == "error: no group 'é'; the groups are ?\n"
