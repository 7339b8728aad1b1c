"""The run spec: every field, every rule between fields, defaults, and documents."""

import copy
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from lrpilot.core._errors import InvalidSpec, Violation
from lrpilot.core._fields import duration_text, length_of, share
from lrpilot.core._schedules import base_schedule
from lrpilot.core._spec import RunSpec, parse_policy, parse_spec, spec_difference
from lrpilot.core.policies import POLICIES, PlateauSpec

PLAIN: dict[str, Any] = {
    "name": "llama3-8b-fp8",
    "unit": "iterations",
    "total": 50_000,
    "learning_rate": {
        "init": 0.0,
        "peak": 2.0e-4,
        "min": 1.0e-5,
        "warmup": 1000,
        "decay": {"style": "wsd", "end": 50_000, "anneal": 5000, "anneal_style": "minus_sqrt"},
    },
    "weight_decay": {"start": 0.01, "end": 0.1, "style": "cosine", "over": 50_000},
    "groups": [
        {"name": "matrices", "weight_decay": {"start": 0.2, "end": 0.1}},
        {"name": "no_decay", "weight_decay_multiplier": 0.0},
        {"name": "embedding", "peak": 1.0e-4, "min": 1.0e-5},
    ],
    "policies": [
        {
            "kind": "plateau",
            "mode": "act",
            "objective": "min",
            "factor": 0.5,
            "patience": 10,
            "threshold": 1.0e-4,
            "threshold_mode": "rel",
            "cooldown": 3,
            "min_lr": 1.0e-6,
            "eps": 1.0e-8,
            "window": 50,
            "metric": "loss",
            "nonfinite": "skip",
            "in_stable_phase": True,
        }
    ],
    "feedback": {
        "delay": 32,
        "interval": 100,
        "quorum": 2,
        "advice_expires": 500,
        "timeout": "30s",
    },
    "bounds": {"min_lr": 1.0e-6, "max_lr": 4.0e-4},
}
"""A spec with every field but the stages."""

STAGED: dict[str, Any] = {
    "name": "staged",
    "total": 1000,
    "learning_rate": {"peak": 1.0, "min": 0.1},
    "weight_decay": 0.1,
    "groups": [{"name": "matrices"}, {"name": "no_decay"}, {"name": "embedding"}],
    "stages": [
        {
            "name": "pretrain",
            "until": 600,
            "learning_rate": {"warmup": 100, "decay": {"style": "cosine"}},
            "weight_decay": {"start": 0.01, "end": 0.1, "style": "linear"},
            "groups": [
                {"name": "matrices", "peak": 0.5, "weight_decay": {"start": 0.2, "end": 0.1}},
                {"name": "no_decay", "weight_decay_multiplier": 0.0},
            ],
            "policies": [PLAIN["policies"][0]],
        },
        {"name": "long-context", "learning_rate": {"init": "current", "warmup": 50}},
    ],
}
"""A spec with stages."""

WHEN: dict[str, Any] = {
    "name": "conditional",
    "total": 1000,
    "learning_rate": {"peak": 1.0, "min": 0.1},
    "stages": [
        {
            "name": "stable",
            "when": {"plateau": {"window": 20, "patience": 5, "threshold": 1e-3}},
            "earliest": 100,
            "latest": 600,
            "learning_rate": {},
        },
        {
            "name": "annealed",
            "when": {"metric": "val_loss", "below": {"value": 1.5, "window": 3}},
            "latest": 900,
            "learning_rate": {"init": "current", "decay": {"style": "linear"}},
        },
    ],
}
"""A spec whose stages end when something holds."""

ABSENT = object()


def at(document: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Return the document with this value at the path; ABSENT takes the field out."""
    document = copy.deepcopy(document)
    *above, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    holder: Any = document
    for part in above:
        holder = holder[part] if isinstance(part, int) else holder.setdefault(part, {})
    if value is ABSENT:
        holder.pop(last, None)
    else:
        holder[last] = value
    return document


def violations(document: Any) -> list[Violation]:
    with pytest.raises(InvalidSpec) as refused:
        parse_spec(document)
    lines = [f"  {violation}" for violation in refused.value.violations]
    assert str(refused.value) == "\n".join(["the run spec is invalid", *lines])
    return list(refused.value.violations)


def read(document: Any) -> tuple[RunSpec | None, list[Violation]]:
    """Return the spec, or what is wrong with it."""
    try:
        return parse_spec(document), []
    except InvalidSpec:
        return None, violations(document)


def faults(document: Any) -> dict[str, str]:
    """Return what is allowed by the field at fault; each field is named once."""
    found = violations(document)
    assert len({violation.field for violation in found}) == len(found)
    return {violation.field: violation.allowed for violation in found}


# ---------------------------------------------------------------------------------------------
# Each field.

NOT_NUMBERS = [True, False, "1e-4", "", math.nan, math.inf, -math.inf, [], [1.0], {}, 10**400]

RATE = "a finite number from 0 to 1e+100"
NOT_RATES = [*NOT_NUMBERS, -1e-9, 2e100]

COUNT = "a whole number from 0 to 2**53"
POSITIVE = "a whole number from 1 to 2**53"
NOT_COUNTS = [*NOT_NUMBERS, -1, 1.5, 2**53 + 1, 1e17]

LENGTH = 'a length in the unit from 0 to 2**53, or a share of decay.end from "0%" to "100%"'
NOT_LENGTHS = [
    *NOT_NUMBERS, -1, 2**53 + 1, "2", "%", "-1%", "101%", "1e1%", "2 percent", "nan%", "٢%",
]  # fmt: skip

DURATION = 'a time above 0, such as "500ms", "30s", "2m" or "1h"; a bare number counts seconds'
NOT_DURATIONS = [
    True, False, "", "30", "s", "-1s", "0s", "1d", "1 s s", "1h30m", "nans", "1e99s", "1e999s",
    math.nan, math.inf, 0, -1, 1e10, [], {}, "٣s",
]  # fmt: skip

LABEL = "1 to 128 characters without line breaks or surrounding blanks"
NOT_LABELS = [
    True, 1, "", " ", " a", "a ", "a\n", "a\nb", "a\x00b", "a\x85b", "a\u2028b", "\ud800",
    "a" * 129, [], {},
]  # fmt: skip

NAME = "1 to 63 of a-z 0-9 . _ - that begin with a letter or a digit"
NOT_NAMES = [True, 1, "", "A", "-a", ".a", "_a", "a b", "a/b", "a\n", "é", "a" * 64, [], {}]


def words(*options: str) -> tuple[str, list[Any], list[Any]]:
    allowed = f"one of {', '.join(options)}"
    wrong = [True, 1, "", options[0].upper(), f"{options[0]} ", [], {}, [options[0]]]
    return allowed, list(options), wrong


RATE_FIELD = (RATE, [0, 1, 0.5, 1e-300], NOT_RATES)
LABEL_FIELD = (LABEL, ["a", "a" * 128, "mit Leerzeichen", "日本", "a.b/c:d"], NOT_LABELS)
METRIC_FIELD = (
    "loss, or the name of a validation loss: 1 to 64 of a-z A-Z 0-9 . _ / -",
    ["loss", "val_loss", "val/C4-en.0", "x" * 64],
    [True, 1, "", "val loss", "x" * 65, "val\n", "vål", [], {}],
)

FIELDS: dict[str, tuple[str, list[Any], list[Any]]] = {
    "name": (NAME, ["a", "0", "a" * 63, "a.b_c-d"], NOT_NAMES),
    "unit": words("iterations", "samples", "tokens"),
    "total": (POSITIVE, [1, 1e6, 2**53], [*NOT_COUNTS, 0]),
    "learning_rate.init": (
        f"{RATE}, or current in a stage after the first",
        [0, 1e-5],
        [*NOT_RATES, "Current"],
    ),
    "learning_rate.peak": RATE_FIELD,
    "learning_rate.min": RATE_FIELD,
    "learning_rate.warmup": (LENGTH, [0, 10, 10.5, "2%", "2.5 %", ".5%", "99.9%"], NOT_LENGTHS),
    "learning_rate.decay.style": words(
        "constant", "linear", "cosine", "inverse-square-root", "wsd"
    ),
    "learning_rate.decay.end": (POSITIVE, [2000, 2**53], [*NOT_COUNTS, 0]),
    "learning_rate.decay.anneal": (LENGTH, [0, 10, 10.5, "10%", "100%"], NOT_LENGTHS),
    "learning_rate.decay.anneal_style": words("exponential", "linear", "cosine", "minus_sqrt"),
    "weight_decay.start": RATE_FIELD,
    "weight_decay.end": RATE_FIELD,
    "weight_decay.style": words("constant", "linear", "cosine"),
    "weight_decay.over": (COUNT, [1, 2**53], NOT_COUNTS),
    "groups.0.name": LABEL_FIELD,
    "groups.0.peak": RATE_FIELD,
    "groups.0.min": RATE_FIELD,
    "groups.0.weight_decay.start": RATE_FIELD,
    "groups.0.weight_decay.end": RATE_FIELD,
    "groups.0.weight_decay_multiplier": RATE_FIELD,
    "stages.0.name": LABEL_FIELD,
    "stages.0.until": (POSITIVE, [200, 999], [*NOT_COUNTS, 0]),
    "stages.0.when.plateau.window": (POSITIVE, [1, 200], [*NOT_COUNTS, 0]),
    "stages.0.when.plateau.patience": (COUNT, [0, 5], NOT_COUNTS),
    "stages.0.when.plateau.threshold": RATE_FIELD,
    "stages.1.when.below.value": (
        "a finite number from -1e+100 to 1e+100",
        [0, 2.5, -3.0, -1e100],
        [*NOT_NUMBERS, 2e100, -2e100],
    ),
    "stages.1.when.below.window": (POSITIVE, [1, 200], [*NOT_COUNTS, 0]),
    "stages.0.when.metric": METRIC_FIELD,
    "stages.0.earliest": (POSITIVE, [1, 100, 600], [*NOT_COUNTS, 0]),
    "stages.0.latest": (POSITIVE, [100, 999], [*NOT_COUNTS, 0]),
    "stages.0.learning_rate.init": (
        f"{RATE}, or current in a stage after the first",
        [0, 1e-5],
        [*NOT_RATES, "Current"],
    ),
    "stages.0.learning_rate.peak": RATE_FIELD,
    "stages.0.learning_rate.min": RATE_FIELD,
    "stages.0.learning_rate.warmup": (LENGTH, [0, 10, 10.5, "2%"], NOT_LENGTHS),
    "stages.0.learning_rate.decay.style": words(
        "constant", "linear", "cosine", "inverse-square-root", "wsd"
    ),
    "stages.0.learning_rate.decay.end": (POSITIVE, [200, 600, 5000], [*NOT_COUNTS, 0]),
    "stages.0.learning_rate.decay.anneal": (LENGTH, [0, "10%"], NOT_LENGTHS),
    "stages.0.learning_rate.decay.anneal_style": words(
        "exponential", "linear", "cosine", "minus_sqrt"
    ),
    "stages.0.weight_decay.start": RATE_FIELD,
    "stages.0.weight_decay.end": RATE_FIELD,
    "stages.0.weight_decay.style": words("constant", "linear", "cosine"),
    "stages.0.weight_decay.over": (COUNT, [1, 2**53], NOT_COUNTS),
    "policies.0.kind": (
        f"one of {', '.join(POLICIES)}",
        ["plateau"],
        [True, 1, "", "psychic", "Plateaus", [], {}, ["plateau"]],
    ),
    "policies.0.mode": words("act", "advise", "off"),
    "policies.0.objective": words("min", "max"),
    "policies.0.factor": (
        "a finite number above 0 below 1",
        [0.1, 1e-300, 0.999],
        [*NOT_NUMBERS, 0, 1, 1.0, -0.5, 2],
    ),
    "policies.0.patience": (COUNT, [0, 1], NOT_COUNTS),
    "policies.0.threshold": RATE_FIELD,
    "policies.0.threshold_mode": words("rel", "abs"),
    "policies.0.cooldown": (COUNT, [0, 1], NOT_COUNTS),
    "policies.0.min_lr": (
        f"{RATE}, or a list with one for each group",
        [0, 1e-6, [0.0, 1e-6, 1]],
        [
            *(value for value in NOT_RATES if not isinstance(value, list)),
            [0.0, True, 0.0],
            [0.0, math.nan, 0.0],
            [0.0, "1", 0.0],
            [0.0, -1.0, 0.0],
        ],
    ),
    "policies.0.eps": RATE_FIELD,
    "policies.0.window": (POSITIVE, [1, 2, 1e3], [*NOT_COUNTS, 0]),
    "policies.0.metric": METRIC_FIELD,
    "policies.0.nonfinite": words("skip", "count"),
    "policies.0.in_stable_phase": (
        "true or false",
        [True, False],
        [0, 1, "true", "no", "", math.nan, [], {}],
    ),
    "feedback.delay": (POSITIVE, [1, 2**53], [*NOT_COUNTS, 0]),
    "feedback.interval": (COUNT, [0, 1, 2**53], NOT_COUNTS),
    "feedback.quorum": (POSITIVE, [1, 8], [*NOT_COUNTS, 0]),
    "feedback.advice_expires": (POSITIVE, [1, 2**53], [*NOT_COUNTS, 0]),
    "feedback.timeout": (
        DURATION,
        ["500ms", "30s", "2m", "1h", "1.5h", "30 s", 30, 0.5, 1e9],
        NOT_DURATIONS,
    ),
    "bounds.min_lr": RATE_FIELD,
    "bounds.max_lr": RATE_FIELD,
}
"""By path: what is allowed in words, legal values, and values that are none."""

FIELDS |= {
    f"stages.0.{path}": entry
    for path, entry in FIELDS.items()
    if path.startswith(("groups", "policies"))
}

REQUIRED = {"name", "total", "learning_rate.peak", "weight_decay.start", "weight_decay.end",
            "groups.0.name", "stages.0.name", "policies.0.kind", "stages.0.groups.0.name",
            "stages.0.policies.0.kind", "stages.1.when.below.value"}  # fmt: skip


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) is not None:
        for item in get_args(annotation):
            yield from models_in(item)


def field_paths(model: type[BaseModel], above: str = "") -> Iterator[str]:
    """Return the path of every field that holds no further ones."""
    for name, info in model.model_fields.items():
        path = f"{above}{info.alias or name}"
        listed = get_origin(info.annotation) is tuple
        inner = list(models_in(info.annotation))
        if name == "policies":
            # The fields of the other kinds are refused in the tests of their policies.
            yield from field_paths(PlateauSpec, f"{path}.0.")
        elif inner:
            for item in inner:
                yield from field_paths(item, f"{path}.0." if listed else f"{path}.")
        else:
            yield path


def base_of(path: str) -> dict[str, Any]:
    if path.split(".")[2:3] and path.split(".")[2] in {"when", "earliest", "latest"}:
        return WHEN
    return STAGED if path.startswith("stages") else PLAIN


def test_the_table_has_every_field() -> None:
    # The second stage of an example has what cannot stand in its first.
    assert set(field_paths(RunSpec)) == {path.replace("stages.1.", "stages.0.") for path in FIELDS}


def test_the_examples_are_legal() -> None:
    parse_spec(PLAIN)
    parse_spec(STAGED)
    parse_spec(WHEN)


@pytest.mark.parametrize("path", FIELDS)
def test_a_broken_field_is_named_with_what_it_got_and_what_is_allowed(path: str) -> None:
    allowed, _, wrong = FIELDS[path]
    assert wrong
    for value in wrong:
        (violation,) = violations(at(base_of(path), path, value))
        assert violation.field == path
        shown = repr(value)
        assert violation.got == (shown if len(shown) <= 100 else f"{shown[:97]}...")
        assert violation.allowed.split("; did you mean")[0] == allowed


@pytest.mark.parametrize("path", FIELDS)
def test_a_legal_value_is_never_refused_for_itself(path: str) -> None:
    allowed, legal, _ = FIELDS[path]
    assert legal
    for value in legal:
        document = at(base_of(path), path, value)
        spec, refused = read(document)
        # It may not fit the other fields of the example, which the words then say.
        assert all(violation.allowed != allowed for violation in refused)
        if spec is not None:
            assert parse_spec(json.loads(json.dumps(spec.to_mapping()))) == spec


@pytest.mark.parametrize("path", sorted(FIELDS))
@pytest.mark.parametrize("value", [ABSENT, None], ids=["absent", "null"])
def test_null_counts_as_absent(path: str, value: Any) -> None:
    document = at(base_of(path), path, value)
    if path in {*REQUIRED, "stages.0.weight_decay.start", "stages.0.weight_decay.end"}:
        (violation,) = violations(document)
        allowed = f"{FIELDS[path][0]} (required)"
        assert violation == Violation(path, "nothing", allowed)
    elif path in {"learning_rate.decay.anneal", "learning_rate.decay.anneal_style"}:
        allowed = f"{FIELDS[path][0]} (required by wsd)"
        assert violations(document) == [Violation(path, "nothing", allowed)]
    elif path == "stages.0.until":
        wanted = "a position (required in every stage but the last), or when and latest"
        assert violations(document) == [Violation(path, "nothing", wanted)]
    elif path == "stages.0.latest":
        wanted = "a position (required beside when)"
        assert violations(document) == [Violation(path, "nothing", wanted)]
    elif path == "learning_rate.decay.style":
        # The other fields of the last phase are refused by the default style.
        assert set(faults(document)) == {
            "learning_rate.decay.anneal",
            "learning_rate.decay.anneal_style",
        }
    elif path in {"weight_decay.style", "stages.0.weight_decay.style"}:
        assert faults(document)[path] == "linear or cosine, as start and end differ"
    else:
        assert parse_spec(document) == parse_spec(at(base_of(path), path, ABSENT))


@pytest.mark.parametrize(
    ("path", "allowed", "values"),
    [
        (
            "learning_rate",
            "a mapping with init, peak, min, warmup and decay",
            [1.0, "a", [], True],
        ),
        (
            "learning_rate.decay",
            "a mapping with style, end, anneal and anneal_style",
            ["linear", 1, [], True],
        ),
        (
            "weight_decay",
            f"{RATE}, or a mapping with start, end, style and over",
            ["0.1", -1, math.nan, [0.1], True],
        ),
        (
            "groups.0.weight_decay",
            f"{RATE}, or a mapping with start and end",
            ["0.1", -1, math.nan, [0.1], True],
        ),
        ("groups", "a list of at most 4096 mappings, each with a name", [{}, "abc", 3, True]),
        (
            "stages",
            "a list of at most 4096 mappings, each with a name and a learning_rate",
            [{}, "abc", 3, True],
        ),
        ("policies", "a list of at most 256 mappings, each with a kind", [{}, "abc", 3, True]),
        ("feedback", "a mapping with delay and timeout", [32, "32", [], True]),
        ("stages.0.when", "a mapping with plateau or below", [1, "plateau", [], True]),
        (
            "stages.0.when.plateau",
            "a mapping with window, patience and threshold",
            [1, "loss", [], True],
        ),
        (
            "stages.1.when.below",
            "a number, or a mapping with value and window",
            ["1", [1.0], True, math.nan],
        ),
        (
            "stages.0.groups",
            "a list of at most 4096 mappings, each with a name",
            [{}, "abc", 3, True],
        ),
        (
            "stages.0.policies",
            "a list of at most 256 mappings, each with a kind",
            [{}, "abc", 3, True],
        ),
        ("bounds", "a mapping with min_lr and max_lr", [1.0, "a", [], True]),
    ],
)
def test_what_is_no_mapping_or_list(path: str, allowed: str, values: list[Any]) -> None:
    for value in values:
        assert violations(at(base_of(path), path, value)) == [Violation(path, repr(value), allowed)]


@pytest.mark.parametrize(
    ("path", "value", "allowed"),
    [
        ("groups.1", 3, "an item of a list of at most 4096 mappings, each with a name"),
        ("policies.0", "plateau", "an item of a list of at most 256 mappings, each with a kind"),
    ],
)
def test_an_item_that_is_no_mapping(path: str, value: Any, allowed: str) -> None:
    assert violations(at(PLAIN, path, value)) == [Violation(path, repr(value), allowed)]


@pytest.mark.parametrize(
    ("path", "count"),
    [
        ("groups", 4097),
        ("stages", 4097),
        ("policies", 257),
        ("stages.0.groups", 4097),
        ("stages.0.policies", 257),
    ],
)
def test_lists_have_a_greatest_length(path: str, count: int) -> None:
    assert path in faults(at(base_of(path), path, [{}] * count))


@pytest.mark.parametrize("document", [None, [], "name: a", 3, [("name", "a")]])
def test_a_document_that_is_no_mapping(document: Any) -> None:
    assert violations(document) == [Violation("", repr(document), "a mapping of fields")]


# ---------------------------------------------------------------------------------------------
# Unknown fields and words.


@pytest.mark.parametrize(
    ("path", "names", "near"),
    [
        ("totl", "name, unit, total, learning_rate, weight_decay, groups, stages, policies,"
         " feedback, bounds", "total"),
        ("Total_", "name, unit, total, learning_rate, weight_decay, groups, stages, policies,"
         " feedback, bounds", "total"),
        ("learning_rate.warm_up", "init, peak, min, warmup, decay", "warmup"),
        ("learning_rate.decay.annealing", "style, end, anneal, anneal_style", "anneal"),
        ("weight_decay.stile", "start, end, style, over", "style"),
        ("groups.1.wd_mult", "name, peak, min, weight_decay, weight_decay_multiplier", None),
        ("groups.0.weight_decay.over", "start, end", None),
        ("groups.1.init", "name, peak, min, weight_decay, weight_decay_multiplier", None),
        ("policies.0.patient", "kind, mode, objective, factor, patience, threshold,"
         " threshold_mode, cooldown, min_lr, eps, window, metric, nonfinite,"
         " in_stable_phase", "patience"),
        ("feedback.timeout_s", "delay, interval, quorum, advice_expires, timeout", "timeout"),
        ("bounds.min", "min_lr, max_lr", "min_lr"),
    ],
)  # fmt: skip
def test_an_unknown_field_gets_the_known_ones(path: str, names: str, near: str | None) -> None:
    hint = f"; did you mean {near}?" if near else ""
    wanted = Violation(path, "1", f"no such field here; there are {names}{hint}")
    assert violations(at(PLAIN, path, 1)) == [wanted]


@pytest.mark.parametrize(
    ("path", "value", "near"),
    [
        ("unit", "iteration", "iterations"),
        ("unit", "TOKENS", "tokens"),
        ("learning_rate.decay.style", "cosin", "cosine"),
        ("learning_rate.decay.style", "WSD", "wsd"),
        ("learning_rate.decay.style", "inverse_square_root", "inverse-square-root"),
        ("learning_rate.decay.anneal_style", "minus-sqrt", "minus_sqrt"),
        ("weight_decay.style", "lineal", "linear"),
        ("policies.0.kind", "platau", "plateau"),
        ("policies.0.mode", "advice", "advise"),
        ("policies.0.nonfinite", "skipp", "skip"),
    ],
)
def test_a_wrong_word_gets_the_near_one(path: str, value: str, near: str) -> None:
    (violation,) = violations(at(PLAIN, path, value))
    assert violation.allowed == f"{FIELDS[path][0]}; did you mean {near}?"


@pytest.mark.parametrize(
    ("path", "names", "near"),
    [
        ("stages.0.wen", "name, until, when, earliest, latest, learning_rate, weight_decay,"
         " groups, policies", "when"),
        ("stages.0.when.window", "plateau, below, metric", None),
        ("stages.0.when.plateau.factor", "window, patience, threshold", None),
        ("stages.1.when.below.values", "value, window", "value"),
    ],
)  # fmt: skip
def test_an_unknown_field_of_a_stage_gets_the_known_ones(
    path: str, names: str, near: str | None
) -> None:
    hint = f"; did you mean {near}?" if near else ""
    wanted = Violation(path, "1", f"no such field here; there are {names}{hint}")
    assert violations(at(WHEN, path, 1)) == [wanted]


@pytest.mark.parametrize("at_path", ["policies", "stages.0.policies"])
def test_an_unknown_policy_is_refused_whatever_its_fields(at_path: str) -> None:
    document = at(base_of(at_path), at_path, [{"kind": "psychic", "smooth": True, "patience": -1}])
    assert faults(document) == {f"{at_path}.0.kind": f"one of {', '.join(POLICIES)}"}


def test_a_policy_of_unknown_kind_still_has_a_mode() -> None:
    document = at(PLAIN, "policies", [{"kind": "psychic", "mode": "maybe"}])
    assert set(faults(document)) == {"policies.0.kind", "policies.0.mode"}


# ---------------------------------------------------------------------------------------------
# All at once.


def test_every_mistake_is_reported_at_once() -> None:
    broken: dict[str, Any] = {}
    document = PLAIN
    for path, (_, _, wrong) in FIELDS.items():
        if not path.startswith("stages") and path != "policies.0.kind":
            broken[path] = wrong[0]
            document = at(document, path, wrong[0])
    document = at(document, "first", 1)
    document = at(document, "groups.2", 2)
    document = at(document, "policies.0.third", 3)
    got = {violation.field: violation.got for violation in violations(document)}
    assert got == {
        **{path: repr(value) for path, value in broken.items()},
        "first": "1",
        "groups.2": "2",
        "policies.0.third": "3",
    }


def test_mistakes_of_fields_and_between_fields_come_together() -> None:
    document = at(at(PLAIN, "name", "A"), "learning_rate.min", 1.0)
    document = at(document, "learning_rate.warmup", 50_000)
    document = at(document, "bounds.max_lr", 0.0)
    document = at(document, "groups.1.name", "matrices")
    assert set(faults(document)) == {
        "name",
        "learning_rate.min",
        "learning_rate.warmup",
        "bounds.min_lr",
        "groups.1.name",
    }


# ---------------------------------------------------------------------------------------------
# Between the fields.


def changed(document: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    for path, value in changes.items():
        document = at(document, path, value)
    return document


TOO_LONG = "less than 50000, from the start to decay.end"


@pytest.mark.parametrize(
    ("base", "changes", "wanted"),
    [
        # The bounds of the LR.
        (PLAIN, {"learning_rate.min": 3e-4},
         {"learning_rate.min": "at most learning_rate.peak (0.0002)"}),
        (PLAIN, {"learning_rate.min": 2e-4}, {}),
        (PLAIN, {"learning_rate.init": 3e-4},
         {"learning_rate.init": "at most learning_rate.peak (0.0002)"}),
        (PLAIN, {"learning_rate.init": 2e-4}, {}),
        (PLAIN, {"learning_rate.init": "current"},
         {"learning_rate.init": f"{RATE}: no LR is in force before the first stage"}),
        # As in Megatron-LM, a group may have its floor above its peak.
        (PLAIN, {"groups.0.peak": 1e-6, "groups.0.min": 1e-3}, {}),
        # Warmup and the end of the decay.
        (PLAIN, {"learning_rate.warmup": 50_000}, {"learning_rate.warmup": TOO_LONG}),
        (PLAIN, {"learning_rate.warmup": 49_999}, {}),
        (PLAIN, {"learning_rate.warmup": 49_999.5}, {}),
        (PLAIN, {"learning_rate.warmup": "100%"}, {"learning_rate.warmup": TOO_LONG}),
        (PLAIN, {"learning_rate.warmup": "99.99%"}, {}),
        (PLAIN, {"learning_rate.decay.end": 1000},
         {"learning_rate.warmup": "less than 1000, from the start to decay.end"}),
        (PLAIN, {"learning_rate.decay.end": ABSENT, "total": 1000},
         {"learning_rate.warmup": "less than 1000, from the start to decay.end"}),
        (PLAIN, {"total": 10}, {}),  # a decay may end past the planned length
        # The last phase of wsd.
        (PLAIN, {"learning_rate.decay.anneal": 60_000}, {}),
        (PLAIN, {"learning_rate.decay.style": "linear"},
         {"learning_rate.decay.anneal": "nothing: style linear has no last phase, wsd has",
          "learning_rate.decay.anneal_style": "nothing: style linear has no last phase, wsd has"}),
        (PLAIN, {"learning_rate.decay": {"style": "wsd"}},
         {"learning_rate.decay.anneal": f"{LENGTH} (required by wsd)",
          "learning_rate.decay.anneal_style":
              "one of exponential, linear, cosine, minus_sqrt (required by wsd)"}),
        # Weight decay.
        (PLAIN, {"weight_decay.end": 0.001},
         {"weight_decay.end": "at least weight_decay.start (0.01)"}),
        (PLAIN, {"weight_decay.style": "constant", "groups.0.weight_decay": ABSENT},
         {"weight_decay.style": "linear or cosine, as start and end differ"}),
        (PLAIN, {"weight_decay.over": 0},
         {"weight_decay.over": "at least 1 for style cosine"}),
        (PLAIN, {"weight_decay": {"start": 0.1, "end": 0.1, "over": 0},
                 "groups.0.weight_decay": ABSENT}, {}),
        (PLAIN, {"weight_decay": 0.1},
         {"groups.0.weight_decay": "start equal to end, as weight_decay is constant"}),
        (PLAIN, {"weight_decay": 0.1, "groups.0.weight_decay": {"end": 0.3}},
         {"groups.0.weight_decay": "start equal to end, as weight_decay is constant"}),
        (PLAIN, {"weight_decay": 0.1, "groups.0.weight_decay": 0.3}, {}),
        (PLAIN, {"weight_decay": ABSENT},
         {"groups.0.weight_decay": "nothing, as the run sets no weight_decay",
          "groups.1.weight_decay_multiplier": "nothing, as the run sets no weight_decay"}),
        # Groups, policies and bounds.
        (PLAIN, {"groups.2.name": "matrices"},
         {"groups.2.name": "another name than groups.0.name"}),
        (PLAIN, {"policies.0.min_lr": [0.0, 0.0]},
         {"policies.0.min_lr": "one number, or a list of 3: one for each group"}),
        (PLAIN, {"policies.0.min_lr": [0.0] * 4},
         {"policies.0.min_lr": "one number, or a list of 3: one for each group"}),
        (PLAIN, {"policies.0.min_lr": [], "groups": ABSENT},
         {"policies.0.min_lr": "one number, or a list of 1: one for each group"}),
        (PLAIN, {"policies.0.min_lr": [0.0], "groups": ABSENT}, {}),
        (PLAIN, {"bounds.min_lr": 1.0}, {"bounds.min_lr": "at most bounds.max_lr (0.0004)"}),
        (PLAIN, {"bounds.min_lr": 4e-4}, {}),
        (PLAIN, {"learning_rate": ABSENT},
         {"learning_rate": "a mapping with init, peak, min, warmup and decay"
          " (required where there are no stages)"}),
        # Stages: their order, and where they end.
        (STAGED, {"learning_rate": ABSENT},
         {"stages.0.learning_rate.peak": f"{RATE} (required)",
          "stages.1.learning_rate.peak": f"{RATE} (required)"}),
        (STAGED, {"learning_rate.peak": ABSENT, "learning_rate.min": ABSENT},
         {"stages.0.learning_rate.peak": f"{RATE} (required)",
          "stages.1.learning_rate.peak": f"{RATE} (required)"}),
        (STAGED, {"stages.0.until": 1000}, {
            "stages.0.until": "a position below the total (1000)"}),
        (STAGED, {"stages.1.until": 1000}, {}),
        (STAGED, {"stages.1.until": 900}, {
            "stages.1.until": "the total (1000) or nothing: the last stage runs to the total"}),
        (STAGED, {"stages.1.until": 600}, {
            "stages.1.until": "a position above 600, where the stage before it ends"}),
        (STAGED, {"stages.1.name": "pretrain"},
         {"stages.1.name": "another name than stages.0.name"}),
        (STAGED, {"stages.0.learning_rate.init": "current"},
         {"stages.0.learning_rate.init": f"{RATE}: no LR is in force before the first stage"}),
        (STAGED, {"stages.0.learning_rate.warmup": 600},
         {"stages.0.learning_rate.warmup": "less than 600, from the start to decay.end"}),
        (STAGED, {"stages.1.learning_rate.warmup": 400},
         {"stages.1.learning_rate.warmup": "less than 400, from the start to decay.end"}),
        (STAGED, {"stages.1.learning_rate.decay": {"end": 600}},
         {"stages.1.learning_rate.decay.end": "a position above 600, where the stage begins"}),
        # A share is of the absolute end: 40% of 1000 is the whole stage.
        (STAGED, {"stages.1.learning_rate.warmup": "40%"},
         {"stages.1.learning_rate.warmup": "less than 400, from the start to decay.end"}),
        (STAGED, {"stages.1.learning_rate.warmup": "39.9%"}, {}),
        (STAGED, {"stages.1.learning_rate.min": 2.0},
         {"stages.1.learning_rate.min": "at most learning_rate.peak (1.0)"}),
        (STAGED, {"stages.1.learning_rate.peak": 0.05},
         {"stages.1.learning_rate.min": "at most stages.1.learning_rate.peak (0.05)"}),
        # A WD of one stage needs one in every stage.
        (STAGED, {"weight_decay": ABSENT},
         {"stages.1.weight_decay": f"{RATE}, or a mapping with start, end, style and over"
          " (required, as another stage has one)"}),
        (STAGED, {"weight_decay": ABSENT, "stages.1.weight_decay": 0.1}, {}),
        (STAGED, {"stages.0.weight_decay.end": 0.001},
         {"stages.0.weight_decay.end": "at least stages.0.weight_decay.start (0.01)"}),
        (STAGED, {"stages.0.weight_decay.over": 0},
         {"stages.0.weight_decay.over": "at least 1 for style linear"}),
        (STAGED, {"weight_decay": {"start": 0.1, "end": 0.2, "style": "linear"},
                  "stages.0.weight_decay": 0.1, "stages.0.groups": ABSENT,
                  "groups.0.weight_decay": {"end": 0.3}},
         {"groups.0.weight_decay": "start equal to end, as stages.0.weight_decay is constant"}),
        # Groups and policies of a stage.
        (STAGED, {"stages.0.groups.0.name": "matrix"},
         {"stages.0.groups.0.name": "a group of the run: matrices, no_decay, embedding"}),
        (STAGED, {"groups": ABSENT, "stages.0.groups": [{"name": "a"}],
                  "stages.0.policies.0.min_lr": 0.0},
         {"stages.0.groups.0.name": "a group of the run: it has none"}),
        (STAGED, {"stages.0.groups.1.name": "matrices"},
         {"stages.0.groups.1.name": "another name than stages.0.groups.0.name"}),
        (STAGED, {"stages.0.weight_decay": 0.1},
         {"stages.0.groups.0.weight_decay":
          "start equal to end, as stages.0.weight_decay is constant"}),
        (STAGED, {"stages.0.weight_decay": ABSENT},
         {"stages.0.groups.0.weight_decay": "start equal to end, as weight_decay is constant"}),
        (STAGED, {"stages.0.weight_decay": ABSENT, "weight_decay": ABSENT},
         {"stages.0.groups.0.weight_decay": "nothing, as the run sets no weight_decay",
          "stages.0.groups.1.weight_decay_multiplier":
          "nothing, as the run sets no weight_decay"}),
        # What a stage says of a group takes the place of what the run says of it.
        (STAGED, {"weight_decay": {"start": 0.1, "end": 0.2, "style": "linear"},
                  "stages.0.weight_decay": 0.1, "groups.0.weight_decay": {"end": 0.3},
                  "stages.0.groups.0.weight_decay": 0.1}, {}),
        (STAGED, {"stages.0.policies.0.min_lr": [0.0, 0.0]},
         {"stages.0.policies.0.min_lr": "one number, or a list of 3: one for each group"}),
        (STAGED, {"stages.0.policies": [{"kind": "overfit"}, {"kind": "spike", "least": 200}]},
         {"stages.0.policies.1.least": "at most the window, 128"}),
        (STAGED, {"stages.0.policies": []}, {}),
        # What ends a stage.
        (WHEN, {"stages.0.when.below": 1.0},
         {"stages.0.when": "exactly one of plateau and below"}),
        (WHEN, {"stages.0.when": {}}, {"stages.0.when": "exactly one of plateau and below"}),
        (WHEN, {"stages.0.when": {"below": 1.0}}, {}),
        (WHEN, {"stages.0.until": 600},
         {"stages.0.until": "nothing beside when: latest ends it"}),
        (WHEN, {"stages.0.when": ABSENT, "stages.0.until": 600},
         {"stages.0.earliest": "nothing, as the stage has no when",
          "stages.0.latest": "nothing, as the stage has no when"}),
        (WHEN, {"stages.0.when": ABSENT},
         {"stages.0.earliest": "nothing, as the stage has no when",
          "stages.0.latest": "nothing, as the stage has no when",
          "stages.0.until":
          "a position (required in every stage but the last), or when and latest"}),
        (WHEN, {"stages.0.latest": ABSENT},
         {"stages.0.latest": "a position (required beside when)"}),
        (WHEN, {"stages.1.latest": ABSENT},
         {"stages.1.latest": "a position (required beside when)"}),
        (WHEN, {"stages.0.latest": 1000},
         {"stages.0.latest": "a position below the total (1000)"}),
        (WHEN, {"stages.1.latest": 1000}, {}),
        (WHEN, {"stages.1.latest": 1001},
         {"stages.1.latest": "a position up to the total (1000)"}),
        (WHEN, {"stages.1.latest": 600},
         {"stages.1.latest": "a position above 600, where the stage before it ends"}),
        (WHEN, {"stages.0.earliest": 601},
         {"stages.0.earliest": "a position above 0 and up to latest (600)"}),
        (WHEN, {"stages.0.earliest": 600}, {}),
        (WHEN, {"stages.1.earliest": 600},
         {"stages.1.earliest": "a position above 600 and up to latest (900)"}),
        (WHEN, {"stages.1.earliest": 601}, {}),
        # A stage is checked as if it ended at its latest.
        (WHEN, {"stages.0.learning_rate.warmup": 600},
         {"stages.0.learning_rate.warmup": "less than 600, from the start to decay.end"}),
    ],
)  # fmt: skip
def test_rules_between_fields(
    base: dict[str, Any], changes: dict[str, Any], wanted: dict[str, str]
) -> None:
    document = changed(base, changes)
    if wanted:
        assert faults(document) == wanted
    else:
        parse_spec(document)


def test_a_stage_that_ends_when_something_holds_is_filled_in_as_if_at_its_latest() -> None:
    spec = parse_spec(at(WHEN, "stages.0.weight_decay", 0.1) | {"weight_decay": 0.2})
    ramp = {"start": 0.1, "end": 0.2, "style": "linear"}
    ramped = parse_spec(at(WHEN, "stages.1.weight_decay", ramp) | {"weight_decay": 0.2})
    assert [stage.learning_rate.decay.end for stage in spec.stages] == [600, 900]
    assert ramped.stages[1].weight_decay is not None
    assert ramped.stages[1].weight_decay.over == 300
    assert [stage.end for stage in spec.stages] == [600, 900]


def test_a_bare_number_is_the_value_to_fall_below() -> None:
    short = parse_spec(at(WHEN, "stages.0.when", {"below": 2}))
    assert short == parse_spec(at(WHEN, "stages.0.when", {"below": {"value": 2.0, "window": 1}}))
    assert short.to_mapping()["stages"][0]["when"] == {
        "below": {"value": 2.0, "window": 1},
        "metric": "loss",
    }


def test_a_condition_and_a_policy_of_one_stage_make_feedback() -> None:
    assert parse_spec(WHEN).has_feedback
    assert parse_spec(STAGED).has_feedback
    assert not parse_spec(at(STAGED, "stages.0.policies", [])).has_feedback
    assert not parse_spec(at(STAGED, "stages.0.policies", ABSENT)).has_feedback
    with_own = at({**STAGED, "policies": PLAIN["policies"]}, "stages.1.policies", [])
    assert [len(parse_spec(with_own).policies_in(index)) for index in (0, 1)] == [1, 0]
    assert parse_spec(with_own).has_feedback


def test_the_order_of_three_stages() -> None:
    stages: list[dict[str, Any]] = [
        {"name": "a", "until": 500, "learning_rate": {"peak": 1.0}},
        {"name": "b", "until": 400, "learning_rate": {"peak": 1.0}},
        {"name": "c", "learning_rate": {"peak": 1.0}},
    ]
    found = faults({"name": "a", "total": 1000, "stages": stages})
    assert found["stages.1.until"] == "a position above 500, where the stage before it ends"
    stages[1]["until"] = 500
    assert "stages.1.until" in faults({"name": "a", "total": 1000, "stages": stages})
    stages[1]["until"] = 501
    parse_spec({"name": "a", "total": 1000, "stages": stages})


def test_a_broken_field_hides_only_the_rules_that_read_it() -> None:
    document = changed(PLAIN, {"learning_rate.peak": "high", "learning_rate.warmup": 60_000})
    assert set(faults(document)) == {"learning_rate.peak", "learning_rate.warmup"}
    document = changed(PLAIN, {"total": "long", "learning_rate.min": 1.0})
    assert set(faults(document)) == {"total", "learning_rate.min"}
    document = changed(STAGED, {"stages.0.until": "later", "stages.1.learning_rate.min": 2.0})
    assert set(faults(document)) == {"stages.0.until", "stages.1.learning_rate.min"}


# ---------------------------------------------------------------------------------------------
# Defaults.


def test_the_defaults_of_a_run() -> None:
    spec = parse_spec({"name": "a", "total": 1000, "learning_rate": {"peak": 0.1}})
    assert spec.to_mapping() == {
        "name": "a",
        "unit": "iterations",
        "total": 1000,
        "learning_rate": {
            "init": 0.0,
            "peak": 0.1,
            "min": 0.0,
            "warmup": 0,
            "decay": {"style": "constant", "end": 1000},
        },
        "groups": [],
        "stages": [],
        "policies": [],
        "feedback": {"delay": 32, "timeout": "30s"},
    }
    assert (spec.delay, spec.feedback.timeout_s) == (32, 30.0)
    assert spec.group_names == ("",)
    assert not spec.has_weight_decay
    assert not spec.has_feedback


def test_the_defaults_of_the_plateau_policy() -> None:
    spec = parse_policy({"kind": "plateau"})
    assert isinstance(spec, PlateauSpec)
    assert spec.model_dump() == {
        "kind": "plateau",
        "mode": "act",
        "objective": "min",
        "factor": 0.5,
        "patience": 10,
        "threshold": 1e-4,
        "threshold_mode": "rel",
        "cooldown": 0,
        "min_lr": 0.0,
        "eps": 1e-8,
        "window": 1,
        "metric": "loss",
        "nonfinite": "skip",
        "in_stable_phase": False,
    }


def test_the_defaults_of_groups_and_bounds() -> None:
    document = {
        "name": "a",
        "total": 10,
        "learning_rate": {"peak": 0.1},
        "groups": [{"name": "g"}],
        "bounds": {},
    }
    spec = parse_spec(document).to_mapping()
    assert spec["groups"] == [{"name": "g", "weight_decay_multiplier": 1.0}]
    assert spec["bounds"] == {"min_lr": 0.0}


def test_a_number_as_weight_decay_holds_all_along() -> None:
    short = parse_spec(at(STAGED, "weight_decay", 0.3))
    long = {"start": 0.3, "end": 0.3, "style": "constant", "over": 1000}
    assert short == parse_spec(at(STAGED, "weight_decay", long))
    assert short.to_mapping()["weight_decay"] == 0.3


def test_a_ramp_goes_over_the_whole_run_or_stage() -> None:
    plain = parse_spec(at(PLAIN, "weight_decay.over", ABSENT)).to_mapping()
    assert plain["weight_decay"]["over"] == 50_000
    spec = parse_spec(
        changed(STAGED, {"stages.1.weight_decay": {"start": 0.1, "end": 0.2, "style": "cosine"}})
    )
    assert [stage.weight_decay.over for stage in spec.stages if stage.weight_decay] == [600, 400]


def test_a_stage_takes_peak_and_min_from_the_run_and_its_end_from_until() -> None:
    spec = parse_spec(STAGED).to_mapping()
    assert [stage["learning_rate"] for stage in spec["stages"]] == [
        {"init": 0.0, "peak": 1.0, "min": 0.1, "warmup": 100,
         "decay": {"style": "cosine", "end": 600}},
        {"init": "current", "peak": 1.0, "min": 0.1, "warmup": 50,
         "decay": {"style": "constant", "end": 1000}},
    ]  # fmt: skip


def test_what_the_spec_says_of_itself() -> None:
    spec = parse_spec(PLAIN)
    assert spec.group_names == ("matrices", "no_decay", "embedding")
    assert spec.has_weight_decay
    assert spec.has_feedback
    assert not parse_spec(at(PLAIN, "policies.0.mode", "advise")).has_feedback
    assert not parse_spec(at(PLAIN, "policies.0.mode", "off")).has_feedback
    only_stages = changed(STAGED, {"weight_decay": ABSENT, "stages.1.weight_decay": 0.1})
    assert parse_spec(only_stages).has_weight_decay


# ---------------------------------------------------------------------------------------------
# Shares and times.


@pytest.mark.parametrize(
    ("text", "value"),
    [("2%", 0.02), ("0%", 0.0), ("100%", 1.0), (".5%", 0.005), ("2.5 %", 0.025), ("0.1%", 0.001),
     ("1.%", 0.01), ("33.3%", 0.333)],
)  # fmt: skip
def test_a_share_is_the_nearest_float(text: str, value: float) -> None:
    assert share(text) == value


def test_a_share_is_multiplied_as_in_megatron() -> None:
    # Not 0.1 * 3 rounded, nor 30 * 1 / 100: fraction times length, both as floats.
    assert length_of("1.37%", 1000) == 0.0137 * 1000
    assert length_of(13, 1000) == 13


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("500ms", 0.5), ("30s", 30.0), ("2m", 120.0), ("1h", 3600.0), ("1.5h", 5400.0),
     ("0.1ms", 0.0001), (7, 7.0), (0.25, 0.25), ("1e-3s", 0.001), ("30 s", 30.0)],
)  # fmt: skip
def test_times(text: Any, seconds: float) -> None:
    assert parse_spec(at(PLAIN, "feedback.timeout", text)).feedback.timeout_s == seconds


@given(st.floats(0.0, 1e9, exclude_min=True))
def test_any_time_is_written_so_that_it_reads_back(seconds: float) -> None:
    spec = parse_spec(at(PLAIN, "feedback.timeout", seconds))
    text = spec.to_mapping()["feedback"]["timeout"]
    assert text == duration_text(seconds)
    assert parse_spec(at(PLAIN, "feedback.timeout", text)).feedback.timeout_s == seconds


# ---------------------------------------------------------------------------------------------
# Documents.


@pytest.mark.parametrize("document", [PLAIN, STAGED, WHEN], ids=["plain", "staged", "when"])
def test_a_spec_survives_its_document(document: dict[str, Any]) -> None:
    before = copy.deepcopy(document)
    spec = parse_spec(document)
    mapping = spec.to_mapping()
    assert document == before
    assert parse_spec(mapping) == spec
    assert parse_spec(json.loads(json.dumps(mapping))).to_mapping() == mapping


def test_a_spec_cannot_be_changed() -> None:
    spec = parse_spec(PLAIN)
    with pytest.raises(ValueError, match="frozen"):
        spec.total = 1
    with pytest.raises(ValueError, match="frozen"):
        spec.feedback.delay = 1


def nodes(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if above:
        yield above
    if isinstance(value, dict):
        for key, item in value.items():
            yield from nodes(item, (*above, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from nodes(item, (*above, index))


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 2000),
    st.integers(),
    st.floats(),
    st.floats(0.0, 1.0),
    st.sampled_from(["current", "linear", "constant", "wsd", "10%", "plateau", "off", "1s", "a"]),
    st.text(max_size=5),
)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=500, deadline=None)
@given(st.sampled_from([PLAIN, STAGED, WHEN]), st.data())
def test_any_document_is_read_or_refused_in_words(
    document: dict[str, Any], data: st.DataObject
) -> None:
    document = copy.deepcopy(document)
    for _ in range(data.draw(st.integers(1, 4), "changes")):
        *above, last = data.draw(st.sampled_from(list(nodes(document))), "where")
        holder: Any = document
        for part in above:
            holder = holder[part]
        if data.draw(st.booleans(), "replace"):
            holder[last] = data.draw(ANYTHING, "value")
        elif isinstance(holder, dict):
            del holder[last]
        else:
            holder.append(copy.deepcopy(holder[last]))
    spec, refused = read(document)
    if spec is None:
        assert refused
        assert all(violation.got and violation.allowed for violation in refused)
        return
    assert parse_spec(json.loads(json.dumps(spec.to_mapping()))) == spec
    values = base_schedule(spec)
    for n in (0, 1, spec.total // 2, spec.total - 1, spec.total, spec.total + 1):
        for lr, wd in values(n):
            assert math.isfinite(lr)
            assert (wd is not None and math.isfinite(wd)) is spec.has_weight_decay


# ---------------------------------------------------------------------------------------------
# One policy, and the difference of two specs.


def test_one_policy_is_read_as_in_a_spec() -> None:
    mapping = PLAIN["policies"][0]
    assert parse_policy(mapping) == parse_spec(PLAIN).policies[0]
    spec = parse_policy({**mapping, "min_lr": [0.0, 1.0]})
    assert parse_policy(spec.model_dump(mode="json")) == spec


@pytest.mark.parametrize(
    ("mapping", "fields"),
    [
        ({"kind": "plateau", "factor": 2, "patience": -1, "x": 1},
         ["policies.0.factor", "policies.0.patience", "policies.0.x"]),
        ({"kind": "psychic"}, ["policies.0.kind"]),
        ({"patience": 3}, ["policies.0.kind"]),
        ("plateau", ["policies.0"]),
    ],
)  # fmt: skip
def test_one_broken_policy(mapping: Any, fields: list[str]) -> None:
    with pytest.raises(InvalidSpec) as refused:
        parse_policy(mapping)
    assert str(refused.value).startswith("the policy is invalid\n")
    assert sorted(violation.field for violation in refused.value.violations) == fields


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({}, []),
        ({"total": 50_000.0, "unit": None}, []),  # the same, written differently
        ({"feedback.timeout": "500ms"}, [("feedback.timeout", "'30s'", "'0.5s'")]),
        ({"policies.0.window": 1}, [("policies.0.window", "50", "1")]),
        ({"bounds": ABSENT},
         [("bounds.min_lr", "1e-06", "absent"), ("bounds.max_lr", "0.0004", "absent")]),
        ({"groups.2.name": "head", "total": 60_000},
         [("total", "50000", "60000"), ("groups.2.name", "'embedding'", "'head'")]),
        ({"policies": []},
         [(f"policies.0.{name}", repr(value), "absent")
          for name, value in PLAIN["policies"][0].items()] + [("policies", "absent", "[]")]),
    ],
)  # fmt: skip
def test_the_difference_of_two_specs(
    changes: dict[str, Any], difference: list[tuple[str, str, str]]
) -> None:
    one, two = parse_spec(PLAIN), parse_spec(changed(PLAIN, changes))
    assert sorted(spec_difference(one, two)) == sorted(difference)
    back = [(field, right, left) for field, left, right in difference]
    assert sorted(spec_difference(two, one)) == sorted(back)
    assert (one == two) is (not difference)


# ---------------------------------------------------------------------------------------------
# The page that users read.


@pytest.fixture(scope="module")
def documented() -> dict[str, dict[str, str]]:
    """Return, by heading of docs/spec.md, the default of each field in the tables below it."""
    text = (Path(__file__).parents[2] / "docs" / "spec.md").read_text(encoding="utf-8")
    tables: dict[str, dict[str, str]] = {}
    fields: dict[str, str] = {}
    for line in text.splitlines():
        if line.startswith("## "):
            fields = tables.setdefault(line.removeprefix("## "), {})
        elif line.startswith("| `"):
            names, default = line.split(" | ")[:2]
            for name in re.findall(r"`([^`]+)`", names):
                fields[name] = default.strip("` ")
    return {heading: fields for heading, fields in tables.items() if fields}


def test_every_field_is_documented(documented: dict[str, dict[str, str]]) -> None:
    # Those of the policies stand in docs/policies.md: tests/project/test_policies_page.py.
    inner = {"learning_rate", "weight_decay", "groups", "stages", "policies", "feedback", "bounds"}
    tables = {heading: set(fields) for heading, fields in documented.items()}
    top = {path.split(".")[0] for path in FIELDS}
    assert tables.pop("The run") == top
    for heading, fields in tables.items():
        below = {
            path.removeprefix(f"{heading}.").removeprefix("0.")
            for path in FIELDS
            if path.startswith(f"{heading}.")
        }
        if heading == "stages":
            below = {path.split(".")[0] for path in below if not path.startswith("1.")}
        if heading == "groups":
            below = {path.split(".")[0] for path in below}
        assert fields == below, heading
    assert set(tables) == inner - {"policies", "bounds"}


def test_the_documented_defaults(documented: dict[str, dict[str, str]]) -> None:
    spec = parse_spec(
        {
            "name": "a",
            "total": 10,
            "learning_rate": {"peak": 1.0},
            "weight_decay": {"start": 1.0, "end": 1.0},
            "groups": [{"name": "a"}],
        }
    )
    mapping = {**spec.to_mapping(), "weight_decay": {"style": "constant"}}
    plain = {
        ("The run", "unit"): mapping["unit"],
        ("learning_rate", "init"): mapping["learning_rate"]["init"],
        ("learning_rate", "min"): mapping["learning_rate"]["min"],
        ("learning_rate", "warmup"): mapping["learning_rate"]["warmup"],
        ("learning_rate", "decay.style"): mapping["learning_rate"]["decay"]["style"],
        ("weight_decay", "style"): "constant",
        ("groups", "weight_decay_multiplier"): mapping["groups"][0]["weight_decay_multiplier"],
        ("feedback", "delay"): mapping["feedback"]["delay"],
        ("feedback", "timeout"): mapping["feedback"]["timeout"],
    }
    assert {place: documented[place[0]][place[1]] for place in plain} == {
        place: str(default) for place, default in plain.items()
    }
