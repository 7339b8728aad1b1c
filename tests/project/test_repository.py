"""What the repository says of itself holds: versions, commands of the README, links, no leaks."""

import importlib.metadata
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from lrpilot.server._run_metrics import FAMILIES, full_name
from tests.rules.cases import CASES
from tests.served_metrics import SUFFIXES, served_metrics

VERSION = importlib.metadata.version("lrpilot")


def test_the_changelog_has_the_version(root: Path) -> None:
    changelog = (root / "CHANGELOG.md").read_text()
    assert re.search(rf"^## \[{re.escape(VERSION)}\] - \d{{4}}-\d\d-\d\d$", changelog, re.MULTILINE)


def test_no_file_names_a_machine_or_a_registry(root: Path, tracked_files: tuple[str, ...]) -> None:
    # What stood on the machine that something was made on does not belong in a project.
    forbidden = re.compile(r"/(root|home|Users)/\w|--(extra-)?index-url|--find-links")
    this = str(Path(__file__).relative_to(root))
    found = []
    for name in tracked_files:
        if name == this:
            continue
        text = (root / name).read_bytes().decode("utf-8", errors="ignore")
        found += [f"{name}: {match.group()}" for match in forbidden.finditer(text)]
    assert found == []


def _pages(root: Path) -> list[Path]:
    return [root / "README.md", root / "CHANGELOG.md", *sorted((root / "docs").rglob("*.md"))]


def _anchor(heading: str) -> str:
    kept = re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower())
    return kept.strip().replace(" ", "-")


def test_every_relative_link_leads_somewhere(root: Path) -> None:
    broken = []
    for page in _pages(root):
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if target.startswith(("http://", "https://", "mailto:")):
                continue
            path, _, anchor = target.partition("#")
            linked = (page.parent / path).resolve() if path else page
            if not linked.exists():
                broken.append(f"{page.name}: {target}")
            elif anchor and linked.suffix == ".md":
                headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
                if anchor not in {_anchor(heading) for heading in headings}:
                    broken.append(f"{page.name}: {target}")
    assert broken == []


def test_every_test_that_a_page_names_exists(root: Path) -> None:
    missing = []
    for page in _pages(root):
        for path, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page.read_text()):
            file = root / path
            if not file.is_file() or (name and f" {name}" not in file.read_text()):
                missing.append(f"{page.name}: {path}::{name}")
    assert missing == []


def _commands(root: Path) -> list[str]:
    """Return the `lrpilot …` lines of the shell blocks of the pages."""
    lines = []
    for page in _pages(root):
        for block in re.findall(r"```(?:sh|console)\n(.*?)```", page.read_text(), re.DOTALL):
            lines += [line.strip().removeprefix("$ ") for line in block.splitlines()]
    return sorted({line for line in lines if line.startswith("lrpilot ")})


@cache
def _help(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", "from lrpilot.server.cli import main; main()", *command, "--help"],
        capture_output=True,
        text=True,
        check=False,
        env={"COLUMNS": "200", "PATH": "/usr/bin:/bin", "NO_COLOR": "1", "TERM": "dumb"},
    )
    assert done.returncode == 0, f"lrpilot {' '.join(command)} --help: {done.stderr}"
    return done.stdout


def test_every_command_and_flag_of_the_pages_exists(root: Path) -> None:
    commands = _commands(root)
    assert commands
    unknown = []
    for line in commands:
        words = shlex.split(line.split(" | ")[0].rstrip("&"), comments=True)[1:]
        depth = 2 if words[0] in ("run", "preset", "advise") else 1
        text = _help(*words[:depth])
        flags = [word.split("=")[0] for word in words[depth:] if word.startswith("--")]
        unknown += [f"{line}: {flag}" for flag in flags if flag not in text]
    assert unknown == []


@pytest.mark.parametrize("target", ["demo", "test", "lint", "format", "proto", "clean"])
def test_every_make_target_of_the_pages_exists(root: Path, target: str) -> None:
    assert re.search(rf"^{target}:", (root / "Makefile").read_text(), re.MULTILINE)


def test_the_imports_point_one_way(root: Path) -> None:
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run(
        [sys.executable, "-c", code, "--no-cache"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_every_rule_that_the_guarantees_name_has_its_case(root: Path) -> None:
    page = (root / "docs/guarantees.md").read_text()
    named = set(re.findall(r"`([a-z]+(?:_[a-z]+)+)`", page))
    machine = (root / "tests/rules/test_machine.py").read_text()
    assert named
    assert [name for name in named if name not in CASES and f"def {name}(" not in machine] == []


def test_the_page_lists_every_metric_with_a_query(root: Path) -> None:
    page = (root / "docs/metrics.md").read_text()
    row = r"^\| `(lrpilot_\w+)` \| (\w+) \|([^|]*)\| [^|]+ \| `([^`]+)`"
    listed = {name: rest for name, *rest in re.findall(row, page, re.MULTILINE)}
    assert {name: kind for name, (kind, _, _) in listed.items()} == served_metrics()
    assert [name for name, (_, _, query) in listed.items() if name not in query] == []
    for name, family in FAMILIES.items():
        _, labels, _ = listed[full_name(name) + SUFFIXES.get(family.kind, "")]
        assert labels.strip() == ", ".join(family.labels), name
