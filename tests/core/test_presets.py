"""The known configurations, number by number."""

import pytest

from lrpilot.core._presets import PRESETS
from lrpilot.core._schedules import base_values
from lrpilot.core._spec import parse_spec

NAMES = (
    "gpt3-175b",
    "gpt3-175b-script",
    "llama3-8b-fp8",
    "llama3-8b-fp8-script",
    "deepseek-v3",
)


def test_there_are_these() -> None:
    assert tuple(PRESETS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_each_is_a_spec_of_its_name_with_a_source(name: str) -> None:
    preset = PRESETS[name]
    assert preset.spec.name == name
    assert parse_spec(preset.spec.to_mapping()) == preset.spec
    assert preset.summary
    assert "\n" not in preset.summary
    assert preset.source.endswith(".")
    # Nothing waits for losses, and nothing is limited, unless a user says so.
    assert not preset.spec.has_feedback
    assert preset.spec.bounds is None


@pytest.mark.parametrize(
    ("name", "length", "curve", "weight_decay"),
    [
        ("gpt3-175b", ("iterations", 100_000), (1.5e-4, 1e-5, 3000, "cosine", 100_000), 0.1),
        ("gpt3-175b-script", ("iterations", 500_000), (6e-5, 6e-6, "0.1%", "cosine", 430_000), 0.1),
        ("llama3-8b-fp8", ("iterations", 50_000), (2e-4, 1e-5, 1000, "linear", 50_000), None),
        ("llama3-8b-fp8-script", ("samples", 1_953_125_000),
         (1.5e-4, 1e-5, 3_906_252, "cosine", 1_949_218_748), 0.1),
    ],
)  # fmt: skip
def test_the_numbers_of_one_curve(
    name: str,
    length: tuple[str, int],
    curve: tuple[float, float, int | str, str, int],
    weight_decay: float | None,
) -> None:
    spec = PRESETS[name].spec.to_mapping()
    peak, floor, warmup, style, end = curve
    assert (spec["unit"], spec["total"]) == length
    assert spec["learning_rate"] == {
        "init": 0.0,
        "peak": peak,
        "min": floor,
        "warmup": warmup,
        "decay": {"style": style, "end": end},
    }
    assert spec.get("weight_decay") == weight_decay
    assert spec["stages"] == []


def test_the_script_for_llama_has_a_decoupled_lr() -> None:
    spec = PRESETS["llama3-8b-fp8-script"].spec
    assert spec.group_names == ("matrices", "no_decay", "embedding_and_output")
    assert base_values(spec, 3_906_252) == ((1.5e-4, 0.1), (1.5e-4, 0.0), (5e-4, 0.1))
    assert base_values(spec, spec.total) == ((1e-5, 0.1), (1e-5, 0.0), (4.5e-5, 0.1))


def test_deepseek_goes_through_four_stages() -> None:
    spec = PRESETS["deepseek-v3"].spec
    assert (spec.unit, spec.total) == ("tokens", 14_800_000_000_000)
    trillion = 10**12
    warmup = 2000 * 3072 * 4096
    flat, cosine = 10 * trillion, 10 * trillion + 4_300_000_000_000
    low = cosine + 333_000_000_000
    assert low + 167_000_000_000 == spec.total
    wanted = {
        0: 0.0,
        warmup // 2: 1.1e-4,
        warmup: 2.2e-4,
        flat - 1: 2.2e-4,
        flat: 2.2e-4,
        (flat + cosine) // 2: 1.21e-4,
        cosine: 2.2e-5,
        low - 1: 2.2e-5,
        low: 7.3e-6,
        spec.total: 7.3e-6,
    }
    for progress, lr in wanted.items():
        ((got, weight_decay),) = base_values(spec, progress)
        assert got == pytest.approx(lr, rel=1e-14)
        assert weight_decay == 0.1
