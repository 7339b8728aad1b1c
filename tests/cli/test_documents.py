"""Run specs as text: YAML 1.2's core rules, and no more of YAML than a spec needs."""

import json
import math
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lrpilot.core._errors import InvalidSpec, Violation
from lrpilot.server import _documents
from lrpilot.server._documents import MAX_BYTES, MAX_DEPTH, dump_document, load_document


@pytest.fixture(params=["SafeLoader", "CSafeLoader"])
def parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_documents, "_PARSER", getattr(yaml, request.param))


def refused(text: str) -> tuple[Violation, ...]:
    with pytest.raises(InvalidSpec) as caught:
        load_document(text)
    return caught.value.violations


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.0e-4", 1e-4),
        ("2.5E+3", 2500.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("-0.0", -0.0),
        ("6e-5", 6e-5),
        ("10", 10),
        ("-3", -3),
        ("+7", 7),
        ("010", 10),
        ("08", 8),
        ("0o17", 15),
        ("0x1F", 31),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("9007199254740993", 9007199254740993),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("NO", "NO"),
        ("y", "y"),
        ("1:30", "1:30"),
        ("190:20:30.15", "190:20:30.15"),
        ("2001-12-14", "2001-12-14"),
        ("2001-12-14t21:59:43.10-05:00", "2001-12-14t21:59:43.10-05:00"),
        ("50_000", "50_000"),
        ("0b101", "0b101"),
        ("1e", "1e"),
        ("inf", "inf"),
        ("nan", "nan"),
        ("30s", "30s"),
        ("2%", "2%"),
        ("'1e-4'", "1e-4"),
        ('"010"', "010"),
        ("<<", "<<"),
        ("=", "="),
        ("٣", "٣"),
    ],
)
@pytest.mark.usefixtures("parser")
def test_a_plain_scalar_is_what_yaml_1_2_says(text: str, value: object) -> None:
    read = load_document(f"key: {text}")["key"]
    assert (read, type(read), repr(read)) == (value, type(value), repr(value))


@pytest.mark.usefixtures("parser")
def test_nan_is_a_number() -> None:
    assert math.isnan(load_document("key: .nan")["key"])


@pytest.mark.usefixtures("parser")
def test_a_number_too_long_to_be_one_stays_text() -> None:
    assert load_document(f"key: {'9' * 5000}")["key"] == "9" * 5000


@pytest.mark.usefixtures("parser")
def test_a_whole_spec() -> None:
    text = """
    # A comment.
    name: llama3-8b-fp8
    total: 50000
    learning_rate:
      peak: 2.0e-4
      warmup: "2%"
      decay: {style: wsd, anneal: 5000}
    groups:
      - {name: no_decay, weight_decay_multiplier: 0.0}
      - name: embedding
        peak: 1e-4
    """
    assert load_document(text) == {
        "name": "llama3-8b-fp8",
        "total": 50000,
        "learning_rate": {
            "peak": 2e-4,
            "warmup": "2%",
            "decay": {"style": "wsd", "anneal": 5000},
        },
        "groups": [
            {"name": "no_decay", "weight_decay_multiplier": 0.0},
            {"name": "embedding", "peak": 1e-4},
        ],
    }


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("a: [1\nb: 2", "line 2, column 2"),
        ("name: x\na: b: c", "line 2, column 5"),
        ("a: 'x", "line 1, column 6"),
        ("a: 1\nbb: @x", "line 2, column 5"),
        ("a: 1}\nb: }", "line 2, column 4"),
        ("a: 1\nb: x\x07y", "line 2, column 5"),
        ("a: 1\n---\nb: 2", "line 2, column 1"),
        ("a: &x 1\nb: *x", "line 2, column 4"),
        ("a: *nobody", "line 1, column 4"),
        ("a: !!python/object:os.system x", "line 1, column 4"),
        ("a: !!float 1", "line 1, column 4"),
        ("a: 1\nb: !mine {c: 1}", "line 2, column 4"),
        ("? [a, b]\n: 1", "line 1, column 3"),
        ("a: ! 12", "line 1, column 4"),
        ("a: " + "[" * 100, f"line 1, column {4 + MAX_DEPTH - 1}"),
    ],
)
@pytest.mark.usefixtures("parser")
def test_what_cannot_be_read_is_named_by_line_and_column(text: str, place: str) -> None:
    (violation,) = refused(text)
    assert violation.field == place
    assert violation.got
    assert violation.allowed


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("", "an empty document"),
        ("# only a comment\n", "an empty document"),
        ("- a\n- b", "a list"),
        ("just words", "'just words'"),
        ("12", "12"),
        ("---\n", "None"),
        ("[1, 2]", "a list"),
    ],
)
@pytest.mark.usefixtures("parser")
def test_the_top_level_is_a_mapping(text: str, got: str) -> None:
    assert refused(text) == (Violation("", got, "a mapping of fields"),)


@pytest.mark.usefixtures("parser")
def test_every_key_given_twice_is_named() -> None:
    text = "total: 1\nlearning_rate:\n  peak: 1\n  'peak': 2\ntotal: 2\ngroups: [{a: 1, a: 1}]"
    assert [(item.field, item.got, item.allowed) for item in refused(text)] == [
        ("learning_rate.peak", "a second value at line 4", "one value (the first is at line 3)"),
        ("total", "a second value at line 5", "one value (the first is at line 1)"),
        ("groups.0.a", "a second value at line 6", "one value (the first is at line 6)"),
    ]


def test_a_key_given_twice_in_json_is_named() -> None:
    assert refused('{"a": 1,\t"b": {"c": 1, "c": 1}}') == (Violation("c", "2 values", "one value"),)


def test_json_is_read_as_json() -> None:
    tree = {"name": "a/b 😀", "peak": 1e-5, "list": [1, True, None, "NaN"], "deep": {"x": -0.0}}
    text = json.dumps(tree, indent="\t").replace("/", "\\/")
    assert load_document(f"\ufeff\n{text}") == tree
    assert load_document('{"a": NaN, "b": -Infinity}') == {"a": "NaN", "b": "-Infinity"}


@pytest.mark.usefixtures("parser")
def test_a_flow_mapping_is_no_json_and_read_all_the_same() -> None:
    assert load_document("{name: a, peak: 1e-4,}") == {"name": "a", "peak": 1e-4}


@pytest.mark.usefixtures("parser")
def test_lists_nested_without_end_are_refused() -> None:
    assert refused("a: " + "[" * 100_000)


def test_json_nested_without_end_is_refused() -> None:
    assert refused('{"a": ' * 30_000)[0].got == f"more than {MAX_DEPTH} levels"


@pytest.mark.usefixtures("parser")
def test_a_byte_order_mark_is_no_part_of_the_text() -> None:
    assert load_document("\ufeffname: a") == {"name": "a"}


def test_the_size_is_bounded_in_bytes() -> None:
    fits = "a: " + "é" * ((MAX_BYTES - 3) // 2)
    assert len(load_document(fits)["a"]) == (MAX_BYTES - 3) // 2
    assert refused(fits + "éé")[0].allowed == f"at most {MAX_BYTES:,} bytes"


def test_text_that_is_no_unicode_is_refused() -> None:
    assert refused("a: \ud800")[0].field == "line 1, column 4"


def test_a_billion_laughs_are_refused_at_once() -> None:
    levels = [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]" for i in range(1, 20)]
    (violation,) = refused("\n".join(["l0: &l0 lol", *levels]))
    assert violation.field == "line 2, column 10"
    assert violation.got == "the alias *l0"


TREES: Any = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.sampled_from(
        ["1e-4", "010", "0o7", "on", "1:30", "2001-01-01", "~", "", " x", ".5", "=", "<<", "1_0"]
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


def exactly(value: Any) -> Any:
    """Return a tree that tells 1 from 1.0 from True, and 0.0 from -0.0."""
    if isinstance(value, dict):
        return {key: exactly(item) for key, item in value.items()}
    if isinstance(value, list):
        return [exactly(item) for item in value]
    return (type(value), repr(value))


@given(st.dictionaries(st.text(), TREES, max_size=5))
def test_what_is_written_reads_back_the_same(tree: dict[str, Any]) -> None:
    assert exactly(load_document(dump_document(tree))) == exactly(tree)


def test_what_is_written_means_the_same_in_yaml_1_1() -> None:
    tree = {"a": 1e-4, "b": "1e-4", "c": "on", "d": 1e22, "e": [1, -0.0, "0o7"], "f": True}
    assert exactly(yaml.safe_load(dump_document(tree))) == exactly(tree)


def test_documents_are_written_for_people() -> None:
    part = {"x": 1}
    assert dump_document({"name": "é", "peak": 1e-5, "rows": (part, part), "none": {}}) == (
        "name: é\npeak: 1.0e-05\nrows:\n- x: 1\n- x: 1\nnone: {}\n"
    )
