"""`lrpilot advise`: how long to warm up, and what is wrong with a loss curve."""

import json
import math
import random
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import Result

from lrpilot.server._documents import load_document
from lrpilot.server.cli._warmup import advise_warmup

Cli = Callable[..., Result]
Losses = Callable[..., str]
SpecFile = Callable[..., str]

STEPS = 4000


def healthy(n: int, noise: random.Random) -> float:
    """A run as it should be: a power law and noise."""
    return float(2.0 + 8.5 * (1 + n / 20) ** -0.35 + noise.gauss(0, 0.05))


def spiky(n: int, noise: random.Random) -> float:
    return healthy(n, noise) + (3.0 if 3000 <= n < 3010 else 0.0)


def diverging(n: int, noise: random.Random) -> float:
    return healthy(min(n, 2500), noise) + max(0.0, min((n - 2500) / 100, 4.0))


def broken(n: int, noise: random.Random) -> float:
    return math.nan if 2000 <= n < 2005 else healthy(n, noise)


def swinging(n: int, noise: random.Random) -> float:
    # Up and down with every mean of 12 losses.
    return healthy(n, noise) + (2.0 if 24 <= n < 160 and n // 12 % 2 else 0.0)


def flat(n: int, noise: random.Random) -> float:
    return healthy(min(n, 1200), noise)


def slow(n: int, noise: random.Random) -> float:
    return 9.0 - 0.02 * math.log10(1 + n) + (1.0 if n < 40 else 0.0) + noise.gauss(0, 0.002)


SPEC = """
name: recorded
total: 5000
learning_rate: {peak: 3e-4, warmup: "4%"}  # a comment
weight_decay: 0.1
"""


@pytest.fixture
def losses(tmp_path: Path) -> Losses:
    """Write the losses of a function of progress to a file and return its path."""

    def write(curve: Callable[[int, random.Random], float], steps: int = STEPS) -> str:
        noise = random.Random(3)
        path = tmp_path / "losses.csv"
        rows = "".join(f"{n},{curve(n, noise)!r}\n" for n in range(steps))
        path.write_text(f"progress,loss\n{rows}")
        return str(path)

    return write


def found(cli: Cli, *arguments: str) -> dict[str, Any]:
    """Return the findings by trouble."""
    result = cli("advise", "losses", *arguments, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    return {item["trouble"]: item for item in json.loads(result.stdout)["findings"]}


@pytest.mark.parametrize(
    ("curve", "trouble", "kind", "first"),
    [
        # The fifth outlier in a row persists.
        (spiky, "spikes", "spike", 3004),
        # The third mean of 16 above the bar, after a rise that begins at 2500.
        (diverging, "divergence", "divergence", 2671),
        # The third NaN in a row.
        (broken, "not finite", "nonfinite", 2002),
        (swinging, "early oscillation", "warmup-guard", None),
        (flat, "plateau", "plateau", None),
        (slow, "slow convergence", "slow-convergence", None),
    ],
)
def test_each_trouble_is_found_where_it_is(
    cli: Cli, losses: Losses, curve: Any, trouble: str, kind: str, first: int | None
) -> None:
    finding = found(cli, losses(curve))[trouble]
    assert finding["policy"] == kind
    assert finding["spec"]["policies"][0]["kind"] == kind
    assert finding["spec"]["policies"][0]["mode"] == "act"
    sign = finding["seen"][0]
    assert sign["reason"]
    assert sign["would"]
    if first is not None:
        assert sign["progress"] == first


def test_a_healthy_run_has_no_trouble(cli: Cli, losses: Losses) -> None:
    path = losses(healthy)
    assert found(cli, path) == {}
    assert cli("advise", "losses", path).stdout == (
        "4,000 losses from 0 to 3,999\n"
        "no spec given: a constant LR after a warmup of 200 is assumed\n"
        "overfitting: not looked for, as no validation loss is recorded\n"
        "no trouble found\n"
    )


def test_one_nan_and_one_corrupted_batch_ask_for_no_change(cli: Cli, losses: Losses) -> None:
    def curve(n: int, noise: random.Random) -> float:
        return {1500: math.nan, 2500: 30.0}.get(n, healthy(n, noise))

    (spike,) = found(cli, losses(curve)).values()
    assert [(item["progress"], item["would"]) for item in spike["seen"]] == [(2500, "note")]


@pytest.mark.parametrize("column", ["val_loss", "val/books"])
def test_overfitting_is_found_by_a_validation_loss(cli: Cli, tmp_path: Path, column: str) -> None:
    path = tmp_path / "losses.csv"
    rows = "".join(
        f"{n},{4 - n / 2000},{3 + abs(n - 1500) / 1500 if n % 100 == 0 else ''}\n"
        for n in range(STEPS)
    )
    path.write_text(f"progress,loss,{column}\n{rows}")
    finding = found(cli, str(path))["overfitting"]
    # Three evaluations in a row above the best, of 1500.
    assert finding["seen"][0]["progress"] == 1800
    assert finding["seen"][0]["would"].startswith("WD x 1.5")
    assert finding["spec"]["policies"][0]["metric"] == column


def test_the_remedy_can_be_simulated_at_once(
    cli: Cli, losses: Losses, spec_file: SpecFile, tmp_path: Path
) -> None:
    path, better = losses(diverging), str(tmp_path / "better.yaml")
    result = cli("advise", "losses", path, spec_file(SPEC), "-o", better)
    assert (result.exit_code, result.stderr) == (0, "")
    command = shlex.split(result.stdout.splitlines()[-1])
    assert command == ["lrpilot", "simulate", better, "--losses", path]
    assert f"wrote {better}; see what it would have done:" in result.stdout
    replay = cli(*command[1:], "--format", "jsonl").stdout.splitlines()
    acted = [item["policy"] for line in replay for item in json.loads(line)["adjustments"]]
    assert acted == ["divergence", "divergence"]
    # The rest of the spec is as its author wrote it.
    document = load_document(Path(better).read_text())
    assert document.pop("policies") == [{"kind": "divergence", "mode": "act"}]
    assert document == load_document(SPEC)


def test_the_changed_spec_goes_through_a_pipe(
    cli: Cli, losses: Losses, spec_file: SpecFile
) -> None:
    path, spec = losses(diverging), spec_file(SPEC)
    result = cli("advise", "losses", path, spec, "-o", "-")
    assert "1. divergence: 2 signs" in result.stderr
    replay = cli("simulate", "-", "--losses", path, input=result.stdout)
    assert "2 adjustments" in replay.stdout
    both = cli("advise", "losses", path, spec, "-o", "-", "--json")
    assert (both.exit_code, both.stdout) == (2, "")


def test_what_a_divergence_brings_with_it_is_told_and_not_remedied(
    cli: Cli, losses: Losses
) -> None:
    findings = found(cli, losses(diverging))
    assert next(iter(findings)) == "divergence"
    assert findings["plateau"]["after_divergence"]
    assert findings["plateau"]["spec"] is None
    text = cli("advise", "losses", losses(diverging)).stdout
    assert "remedy: mend the divergence first, of which it may be a consequence" in text


def test_the_fields_and_places_of_policies_are_kept(
    cli: Cli, losses: Losses, spec_file: SpecFile, tmp_path: Path
) -> None:
    policies = """policies:
  - {kind: spike, mode: advise, window: 100, recovery: 150}
  - {kind: greedy, mode: "off"}
"""
    better = str(tmp_path / "better.yaml")
    cli("advise", "losses", losses(spiky), spec_file(SPEC + policies), "-o", better)
    assert load_document(Path(better).read_text())["policies"] == [
        {"kind": "spike", "mode": "act", "window": 100, "recovery": 150},
        {"kind": "greedy", "mode": "off"},
    ]


def test_a_policy_that_acts_already_is_left_as_it_is(
    cli: Cli, losses: Losses, spec_file: SpecFile, tmp_path: Path
) -> None:
    spec = spec_file(SPEC + "policies: [{kind: spike, mode: act}]\n")
    better = tmp_path / "better.yaml"
    result = cli("advise", "losses", losses(spiky), spec, "-o", str(better))
    assert "remedy: the spec lets the policy act already; else start over with" in result.stdout
    assert f"{better} is not written: there is nothing to change" in result.stdout
    assert not better.exists()


def test_the_policies_of_stages_get_the_remedy_too(
    cli: Cli, losses: Losses, spec_file: SpecFile, tmp_path: Path
) -> None:
    spec = """
name: staged
total: 5000
stages:
  - {name: first, until: 2000, learning_rate: {peak: 2e-4}}
  - {name: second, learning_rate: {peak: 1e-4}, policies: [{kind: greedy, mode: advise}]}
"""
    better = str(tmp_path / "better.yaml")
    path = losses(spiky)
    assert cli("advise", "losses", path, spec_file(spec), "-o", better).exit_code == 0
    document = load_document(Path(better).read_text())
    assert document["policies"] == [{"kind": "spike", "mode": "act"}]
    assert "policies" not in document["stages"][0]
    assert document["stages"][1]["policies"] == [
        {"kind": "greedy", "mode": "advise"},
        {"kind": "spike", "mode": "act"},
    ]
    replay = cli("simulate", better, "--losses", path, "--format", "jsonl").stdout.splitlines()
    acted = [item["policy"] for line in replay for item in json.loads(line)["adjustments"]]
    assert acted == ["spike"]


def test_a_plateau_in_a_stable_phase_is_answered_by_its_anneal(
    cli: Cli, losses: Losses, spec_file: SpecFile
) -> None:
    spec = SPEC.replace('"4%"', "200, decay: {style: wsd, anneal: 500, anneal_style: linear}")
    (finding,) = found(cli, losses(flat), spec_file(spec)).values()
    assert (finding["trouble"], finding["policy"]) == ("plateau", "decay-on-plateau")


def test_what_could_not_be_looked_for_is_told(
    cli: Cli, losses: Losses, spec_file: SpecFile
) -> None:
    spec = spec_file(SPEC.replace('"4%"', "0"))
    result = cli("advise", "losses", losses(healthy), spec, "--json")
    assert json.loads(result.stdout)["not_looked_for"] == [
        {"trouble": "overfitting", "why": "no validation loss is recorded"},
        {"trouble": "early oscillation", "why": "too few losses of the warmup are recorded"},
    ]


def test_text_shows_a_few_signs_and_how_to_go_on(cli: Cli, losses: Losses) -> None:
    def curve(n: int, noise: random.Random) -> float:
        return healthy(n, noise) + (6.0 if n % 500 == 400 else 0.0)

    path = losses(curve)
    text = cli("advise", "losses", path).stdout
    assert "1. spikes: 8 signs, from 400 to 3,900\n     at 400: loss " in text
    assert "     and 5 more\n" in text
    assert "     policies:\n     - kind: spike\n       mode: act\n" in text
    again = f"  lrpilot advise losses {shlex.quote(path)} SPEC -o better.yaml\n"
    assert text.endswith(f"to get the changed spec:\n{again}")


def test_losses_and_spec_come_from_standard_input(
    cli: Cli, losses: Losses, spec_file: SpecFile
) -> None:
    path = losses(broken)
    wanted = cli("advise", "losses", path, "--json").stdout
    assert cli("advise", "losses", "-", "--json", input=Path(path).read_text()).stdout == wanted
    spec = spec_file(SPEC)
    wanted = cli("advise", "losses", path, spec, "--json").stdout
    assert cli("advise", "losses", path, "-", "--json", input=SPEC).stdout == wanted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-o", "x.yaml"), "-o writes a changed spec: give SPEC too"),
        (("absent.yaml",), "error: absent.yaml: No such file or directory"),
        (("preset:none",), "error: no preset 'none'"),
        (("--tag", "x"), "no TensorBoard run"),
    ],
)
def test_wrong_usage_is_told(
    cli: Cli, losses: Losses, arguments: tuple[str, ...], message: str
) -> None:
    result = cli("advise", "losses", losses(healthy, 10), *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


def test_an_invalid_spec_or_two_standard_inputs_are_refused(
    cli: Cli, losses: Losses, spec_file: SpecFile
) -> None:
    spec = spec_file(SPEC.replace("5000", "0"))
    result = cli("advise", "losses", losses(healthy, 10), spec)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {spec}: the run spec is invalid\n  total: got 0; ")
    result = cli("advise", "losses", "-", "-")
    assert result.exit_code == 2
    assert "cannot both be standard input" in result.stderr


# ---------------------------------------------------------------------------------------------
# Warmup.


def advised(cli: Cli, parameters: str, batch: str, total: str, *more: str) -> dict[str, Any]:
    options = ("--parameters", parameters, "--batch-tokens", batch, "--total", total)
    result = cli("advise", "warmup", *options, *more, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    advice: dict[str, Any] = json.loads(result.stdout)
    return advice


@pytest.mark.parametrize(
    ("parameters", "batch", "total", "warmup", "low", "high"),
    [
        ("8B", "4M", "50000", 2000, 500, 2000),
        ("100M", "4M", "50000", 500, 500, 2000),
        ("1b", "4m", "50k", 1050, 500, 2000),
        # 375M tokens are more steps than the size asks for.
        ("100M", "0.25M", "50000", 1500, 500, 2000),
        ("100M", "1", "50000", 2000, 500, 2000),
        # A short run.
        ("8B", "4M", "6000", 600, 300, 600),
        ("8B", "4M", "10", 1, 1, 1),
        ("8B", "4M", "1", 1, 1, 1),
        # 5 to 10% from 100B parameters on.
        ("99.9B", "4M", "100000", 2000, 500, 2000),
        ("100B", "4M", "100000", 5000, 5000, 10000),
        ("1T", "16M", "100000", 10000, 5000, 10000),
        ("2T", "16M", "100000", 10000, 5000, 10000),
    ],
)
def test_the_advised_warmup(
    cli: Cli, parameters: str, batch: str, total: str, warmup: int, low: int, high: int
) -> None:
    advice = advised(cli, parameters, batch, total)
    assert (advice["warmup"], advice["low"], advice["high"]) == (warmup, low, high)
    assert advice["spec"] == {"learning_rate": {"warmup": warmup}}
    assert advice["reasons"]
    assert advice["sources"]


@given(
    parameters=st.integers(1, 10**13),
    batch=st.integers(1, 10**9),
    total=st.integers(1, 10**9),
)
def test_the_advice_lies_in_its_range_and_in_the_run(
    parameters: int, batch: int, total: int
) -> None:
    advice = advise_warmup(parameters, batch, total)
    assert 1 <= advice.low <= advice.steps <= advice.high <= total
    assert 0 < advice.share <= 1


def test_the_advice_is_in_the_unit_of_the_run(cli: Cli) -> None:
    tokens = advised(cli, "8B", "4M", "200B", "--unit", "tokens")
    assert (tokens["warmup"], tokens["steps"], tokens["share"]) == (8 * 10**9, 2000, 0.04)
    more = ("--unit", "samples", "--sequence-length", "8000")
    samples = advised(cli, "8B", "4M", "25M", *more)
    assert (samples["warmup"], samples["steps"], samples["share"]) == (10**6, 2000, 0.04)


def test_the_advice_as_text_ends_in_a_spec_change(cli: Cli) -> None:
    result = cli(
        "advise", "warmup", "--parameters", "8B", "--batch-tokens", "4M", "--total", "50000"
    )
    assert result.stdout.startswith(
        "warmup: 2,000 iterations (4% of the run, 8B tokens)\nusual:  500 to 2,000 iterations\n"
    )
    assert load_document(result.stdout.split("\n\n")[1]) == {"learning_rate": {"warmup": 2000}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"--parameters": "8X"}, "'8X' is no whole number above 0"),
        ({"--parameters": "0"}, "'0' is no whole number above 0"),
        ({"--batch-tokens": "1.5"}, "'1.5' is no whole number above 0"),
        ({"--batch-tokens": "-1"}, "'-1' is no whole number above 0"),
        ({"--total": "1_000"}, "'1_000' is no whole number above 0"),
        ({"--total": "10000T"}, "is above the longest run"),
        ({"--total": "5", "--unit": "tokens"}, "5 tokens are less than one step"),
        ({"--unit": "epochs"}, "'epochs' is none of iterations, samples, tokens"),
        ({"--unit": "samples"}, "--unit samples and --sequence-length go together"),
        ({"--sequence-length": "8"}, "--unit samples and --sequence-length go together"),
    ],
)
def test_wrong_numbers_are_told(cli: Cli, options: dict[str, str], message: str) -> None:
    given_ = {"--parameters": "8B", "--batch-tokens": "4M", "--total": "50000", **options}
    result = cli("advise", "warmup", *(word for pair in given_.items() for word in pair))
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in " ".join(result.stderr.replace("│", "").split())
