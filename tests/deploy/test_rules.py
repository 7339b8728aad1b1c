"""The rules for Prometheus: valid, tested, and each alert with a page that says what to do."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.served_metrics import series_names


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
    cases = yaml.safe_load((root / "tests/deploy/rules.test.yml").read_text())["tests"]
    seen: dict[str, set[bool]] = {}
    for case in cases:
        for test in case.get("alert_rule_test", ()):
            seen.setdefault(test["alertname"], set()).add(bool(test["exp_alerts"]))
    alerts = {rule["alert"] for rule in rules(root, "alerts.yml")}
    assert seen == {alert: {True, False} for alert in alerts}


def test_each_recorded_series_is_tested(root: Path) -> None:
    text = (root / "tests/deploy/rules.test.yml").read_text()
    recorded = [rule["record"] for rule in rules(root, "recording.yml")]
    assert recorded
    assert [name for name in recorded if f"- expr: {name}" not in text] == []


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
