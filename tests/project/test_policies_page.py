"""docs/policies.md says of every policy what the code says: fields, defaults, modes, pictures."""

import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from lrpilot import core
from lrpilot.core._spec import parse_policy
from lrpilot.core.policies import DETECTORS, POLICIES
from scripts.draw_policies import FOLDER, SCENES, description, draw, run

LARGEST_PICTURE = 60_000
"""Bytes."""

MODES = {"kind", "mode"}
"""What the table of each policy leaves out, as all have it."""


@pytest.fixture(scope="module")
def page(root: Path) -> str:
    """The page."""
    return (root / "docs/policies.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def sections(page: str) -> dict[str, str]:
    """The text below each heading of a policy, in order."""
    text = page.split("\n## The policies\n")[1].split("\n## ", maxsplit=1)[0]
    parts = re.split(r"^### (.+)\n", text, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def rows(text: str) -> Iterator[list[str]]:
    """Yield the cells of each row of the tables whose first cell is code."""
    for line in text.splitlines():
        if re.match(r"\| \[?`", line):
            yield [cell.strip() for cell in line.strip("|").split("|")]


def as_written(cell: str) -> Any:
    """Return what a spec would hold for a default in code; None for one in words."""
    match = re.fullmatch(r"`([^`]+)`", cell)
    if match is None:
        assert cell.startswith("none: "), f"a default is code, or says what none means: {cell}"
        return None
    word = match[1]
    if word in ("true", "false"):
        return word == "true"
    try:
        return float(Fraction(word))
    except ValueError:
        return word


def test_every_policy_has_its_section_and_its_row(page: str, sections: dict[str, str]) -> None:
    assert list(sections) == list(POLICIES)
    overview = page.split("\n## ", maxsplit=1)[0]
    modes = {cells[0]: cells[3] for cells in rows(overview)}
    assert modes == {
        f"[`{kind}`](#{kind})": f"`{parse_policy({'kind': kind}).mode}`" for kind in POLICIES
    }


@pytest.mark.parametrize("kind", POLICIES)
def test_every_field_and_default_is_the_one_of_the_code(
    sections: dict[str, str], kind: str
) -> None:
    default = parse_policy({"kind": kind})
    documented = {cells[0].strip("`"): cells[1:] for cells in rows(sections[kind])}
    assert list(documented) == [name for name in type(default).model_fields if name not in MODES]
    for name, (value, _, meaning) in documented.items():
        written = as_written(value)
        if written is None:
            assert getattr(default, name) is None, name
        else:
            assert parse_policy({"kind": kind, name: written}) == default, name
        assert meaning, name


def test_the_detectors_are_named(page: str) -> None:
    text = page.split("\n## Detectors\n")[1].split("\n## ", maxsplit=1)[0]
    assert text.strip().startswith(" and ".join(f"`{spec.kind}`" for spec in DETECTORS))


def test_the_specs_of_the_page_are_valid(page: str) -> None:
    blocks = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)]
    assert blocks
    whole = {"name": "a", "total": 10, "learning_rate": {"peak": 1.0}}
    for block in blocks:
        core.parse_spec({**whole, **block})


def test_every_policy_has_a_scene_and_a_picture_and_there_are_no_others() -> None:
    assert list(SCENES) == list(POLICIES)
    assert {path.name for path in FOLDER.iterdir()} == {f"{kind}.png" for kind in POLICIES}


@pytest.mark.parametrize("kind", POLICIES)
def test_the_picture_and_its_title_are_what_the_policy_does_now(
    sections: dict[str, str], kind: str
) -> None:
    picture, path = run(kind), FOLDER / f"{kind}.png"
    assert picture.decided
    with Image.open(path) as image:
        image.load()
        drawn = image.text  # type: ignore[attr-defined]
    assert drawn["Description"] == description(picture), "run scripts/draw_policies.py"
    assert f"![{picture.title}](images/policies/{kind}.png)" in sections[kind]
    assert path.stat().st_size < LARGEST_PICTURE


def test_a_picture_is_drawn_the_same_each_time() -> None:
    assert draw(run("plateau")) == draw(run("plateau"))
