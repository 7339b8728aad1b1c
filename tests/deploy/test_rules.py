"""The rules for Prometheus: valid, tested, and each alert with a page that says what to do."""

import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.served_metrics import series_names


@cache
def cases_as_texts(root: Path) -> dict[str, Any]:
    """Return the cases of the rules. As texts: 0x40 is no number here, but 41 zeros."""
    found: dict[str, Any] = yaml.load(
        (root / "tests/deploy/rules.test.yml").read_text(), yaml.BaseLoader
    )
    return found


@cache
def rules(root: Path, name: str) -> list[dict[str, Any]]:
    groups = yaml.safe_load((root / "deploy/prometheus" / name).read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


@pytest.mark.needs_program("promtool")
@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "config", "deploy/prometheus/prometheus.yml"),
        ("check", "rules", "deploy/prometheus/recording.yml", "deploy/prometheus/alerts.yml"),
        ("test", "rules", "tests/deploy/rules.test.yml"),
    ],
    ids=" ".join,
)
def test_promtool_finds_nothing(root: Path, arguments: tuple[str, ...]) -> None:
    done = subprocess.run(
        ["promtool", *arguments], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_is_tested_where_it_fires_and_where_it_must_not(root: Path) -> None:
    cases = cases_as_texts(root)["tests"]
    seen: dict[str, set[bool]] = {}
    for case in cases:
        for test in case.get("alert_rule_test", ()):
            seen.setdefault(test["alertname"], set()).add(bool(test["exp_alerts"]))
    alerts = {rule["alert"] for rule in rules(root, "alerts.yml")}
    assert seen == {alert: {True, False} for alert in alerts}


def changed(alert: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (what is changed, the alert) for each way in which it could be a little wrong."""
    if "for" in alert:
        number, unit = re.fullmatch(r"(\d+)([smh])", alert["for"]).groups()  # type: ignore[union-attr]
        yield "at once", {key: value for key, value in alert.items() if key != "for"}
        yield "twice as late", alert | {"for": f"{2 * int(number)}{unit}"}
    text = alert["expr"]
    for bound in re.finditer(r"(==|[<>]=?) ([\d.e]+)", text):
        value = float(bound[2])
        # 2: what counts happened once in most cases, and increase() makes a little more of it.
        for other in (value / 2, value * 1.5) if value else (2,):
            if (bound[1], value) == ("<", 0):
                continue
            expr = f"{text[: bound.start(2)]}{other:g}{text[bound.end(2) :]}"
            yield f"{bound[0]} is {other:g}", alert | {"expr": expr}
    lines = text.strip().splitlines()
    for at in range(1, len(lines)):
        expr = "\n".join(lines[:at] + lines[at + 1 :])
        yield f"without {lines[at].strip()}", alert | {"expr": expr}
    yield "of another severity", alert | {"labels": {"severity": "none"}}


def passes(root: Path, folder: Path, rule: dict[str, Any]) -> bool:
    """Return whether the cases of one rule pass, with `rule` in its place."""
    whole = cases_as_texts(root)
    name = rule.get("alert") or rule["record"]
    cases = []
    for case in whole["tests"]:
        alerts = [test for test in case.get("alert_rule_test", ()) if test["alertname"] == name]
        asked = [test for test in case.get("promql_expr_test", ()) if name in test["expr"]]
        if alerts or asked:
            cases.append(case | {"alert_rule_test": alerts, "promql_expr_test": asked})
    recorded = rules(root, "recording.yml")
    if "alert" in rule:
        recorded = [*recorded, rule]
    else:
        recorded = [rule if item["record"] == name else item for item in recorded]
    files = {
        "rules.yml": {"groups": [{"name": "rules", "rules": recorded}]},
        "test.yml": whole | {"rule_files": ["rules.yml"], "tests": cases},
    }
    for file, content in files.items():
        (folder / file).write_text(yaml.safe_dump(content))
    done = subprocess.run(
        ["promtool", "test", "rules", folder / "test.yml"],
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stdout + done.stderr
    assert ("SUCCESS" if done.returncode == 0 else "FAILED") in said, said
    return done.returncode == 0


@pytest.mark.needs_program("promtool")
def test_an_alert_that_is_a_little_wrong_fails_its_cases(root: Path, tmp_path: Path) -> None:
    unnoticed = []
    for alert in rules(root, "alerts.yml"):
        assert passes(root, tmp_path, alert), alert["alert"]
        unnoticed += [
            f"{alert['alert']}: {how}"
            for how, wrong in changed(alert)
            if passes(root, tmp_path, wrong)
        ]
    assert unnoticed == []


@pytest.mark.needs_program("promtool")
def test_to_add_up_what_several_servers_show_of_a_run_fails_a_case(
    root: Path, tmp_path: Path
) -> None:
    # Of what is only compared with 0 the sum says the same.
    greatest = re.compile(r"max by(?! \(run\) \((?:increase|delta|lrpilot_run_forgotten)\b)")
    unnoticed = []
    for rule in (*rules(root, "recording.yml"), *rules(root, "alerts.yml")):
        text = rule["expr"]
        for found in greatest.finditer(text):
            expr = f"{text[: found.start()]}sum by{text[found.end() :]}"
            if passes(root, tmp_path, rule | {"expr": expr}):
                unnoticed.append(expr)
    assert unnoticed == []


def test_each_recorded_series_is_tested(root: Path) -> None:
    cases = cases_as_texts(root)["tests"]
    asked = " ".join(test["expr"] for case in cases for test in case.get("promql_expr_test", ()))
    recorded = [rule["record"] for rule in rules(root, "recording.yml")]
    assert recorded
    assert [name for name in recorded if name not in asked] == []


def test_each_alert_says_what_to_do(root: Path) -> None:
    page = (root / "docs/alerts.md").read_text()
    headings = re.findall(r"^### (\w+)$", page, re.MULTILINE)
    alerts = rules(root, "alerts.yml")
    assert headings == [rule["alert"] for rule in alerts]
    for rule in alerts:
        assert rule["labels"].keys() == {"severity"}
        severity = rule["labels"]["severity"]
        annotations = rule["annotations"]
        assert annotations.keys() == {"summary", "description", "runbook"}
        assert annotations["runbook"] == f"docs/alerts.md#{rule['alert'].lower()}"
        _, _, text = page.partition(f"### {rule['alert']}\n")
        assert text.strip().startswith(f"{severity.capitalize()}: "), rule["alert"]
        assert "**Do:**" in text.partition("###")[0], rule["alert"]


def test_rules_name_only_what_is_served_or_recorded(root: Path) -> None:
    known = series_names() | {rule["record"] for rule in rules(root, "recording.yml")}
    named = {
        name
        for rule in (*rules(root, "recording.yml"), *rules(root, "alerts.yml"))
        for name in re.findall(r"[a-z0-9_:]*lrpilot_[a-z0-9_:]+", rule["expr"])
    }
    assert named
    assert named - known == set()
