"""The dashboards: what is committed is what the code builds, and keeps the rules of the field.

The rules are those of Grafana's dashboard linter, by the linter's names, as far as they apply.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from tests.served_metrics import series_names

NAMES = ("fleet", "run", "service")
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
SHOWN_AT_ANNOTATIONS = ("titleFormat", "textFormat", "step")
"""What Grafana reads of an annotation and the SDK has no field for."""


@pytest.fixture(params=NAMES)
def board(root: Path, request: pytest.FixtureRequest) -> dict[str, Any]:
    """One committed dashboard."""
    return committed(root, request.param)


def committed(root: Path, name: str) -> dict[str, Any]:
    board: dict[str, Any] = json.loads(
        (root / f"deploy/grafana/dashboards/{name}.json").read_text()
    )
    return board


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the panels that are not the headings of rows."""
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def annotations(board: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = board["annotations"].get("list", [])
    return found


def expressions(board: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (where, query) of every panel and annotation."""
    for panel in panels(board):
        for target in panel["targets"]:
            yield f"{panel['title']} {target['refId']}", target["expr"]
    for item in annotations(board):
        yield f"annotation {item['name']}", item["expr"]


def test_what_is_committed_is_what_the_code_builds(root: Path, tmp_path: Path) -> None:
    script = root / "deploy/grafana/build_dashboards.py"
    subprocess.run([sys.executable, script, tmp_path], check=True)
    folder = root / "deploy/grafana/dashboards"
    assert sorted(path.name for path in folder.iterdir()) == [f"{name}.json" for name in NAMES]
    for path in folder.iterdir():
        assert path.read_text() == (tmp_path / path.name).read_text(), path.name


def test_the_schema_loses_nothing_on_the_way_through(board: dict[str, Any]) -> None:
    register_default_plugins()
    for item in annotations(board):
        for key in SHOWN_AT_ANNOTATIONS:
            assert item.pop(key)
    read = Dashboard.from_json(json.loads(json.dumps(board)))
    assert json.loads(json.dumps(read, cls=JSONEncoder)) == board


def test_template_datasource_rule(board: dict[str, Any]) -> None:
    sources = [item for item in board["templating"]["list"] if item["type"] == "datasource"]
    assert [(item["name"], item["query"]) for item in sources] == [("datasource", "prometheus")]
    assert sources[0]["label"] == "Data source"


def test_template_job_and_instance_rules(root: Path) -> None:
    # Service alone: a run is shown by whichever servers its ranks ask, so that the others aggregate
    # over job and instance.
    board = committed(root, "service")
    found = {item["name"]: item for item in board["templating"]["list"]}
    for name in ("job", "instance"):
        variable = found[name]
        assert variable["type"] == "query"
        assert variable["datasource"] == SOURCE
        assert variable["multi"]
        assert variable["allValue"] == ".+"
        assert variable["refresh"] == 2
    selectors = [
        selector
        for _, expression in expressions(board)
        for selector in re.findall(r"(?:lrpilot|process)_\w+(?::\w+)*(?:\{([^}]*)\})?", expression)
    ]
    assert selectors
    assert all('job=~"$job", instance=~"$instance"' in selector for selector in selectors)


def test_template_on_time_change_reload_rule(board: dict[str, Any]) -> None:
    queries = [item for item in board["templating"]["list"] if item["type"] == "query"]
    assert all(item["refresh"] == 2 for item in queries)


def test_the_choice_of_a_run_is_asked_for_first(root: Path) -> None:
    board = committed(root, "run")
    assert [item["name"] for item in board["templating"]["list"]] == ["datasource", "run"]
    unbound = [
        where
        for where, expression in expressions(board)
        for selector in re.findall(r"lrpilot_\w+(?::\w+)*(\{[^}]*\})?", expression)
        if 'run="$run"' not in selector
    ]
    assert unbound == []


def test_panel_datasource_rule(board: dict[str, Any]) -> None:
    for panel in panels(board):
        assert panel["datasource"] == SOURCE, panel["title"]
        assert all(target["datasource"] == SOURCE for target in panel["targets"])


def test_panel_title_description_rule(board: dict[str, Any]) -> None:
    shown = panels(board)
    assert all(panel["title"] and panel["description"].endswith(".") for panel in shown)
    titles = [panel["title"] for panel in shown]
    assert len(set(titles)) == len(titles)


def test_panel_units_rule(board: dict[str, Any]) -> None:
    for panel in panels(board):
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]


def test_panel_no_targets_rule(board: dict[str, Any]) -> None:
    for panel in panels(board):
        assert panel["targets"], panel["title"]
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references)


def test_each_curve_has_a_legend(board: dict[str, Any]) -> None:
    curves = [panel for panel in panels(board) if panel["type"] == "timeseries"]
    for panel in curves:
        assert panel["options"]["legend"]["showLegend"]
        assert all(target["legendFormat"] != "__auto" for target in panel["targets"])


def test_target_rate_interval_rule(board: dict[str, Any]) -> None:
    for where, expression in expressions(board):
        for window in re.findall(r"\b(?:rate|irate)\([^\[]*\[([^\]]+)\]", expression):
            assert window == "$__rate_interval", where


def test_no_graph_misses_what_happened_between_two_points(board: dict[str, Any]) -> None:
    # The window grows with the step, as no fixed one does.
    for panel in panels(board):
        for target in panel["targets"]:
            if target.get("range"):
                windows = set(re.findall(r"\[([^\]]+)\]", target["expr"]))
                assert windows <= {"$__rate_interval"}, panel["title"]


def test_target_counter_agg_rule(board: dict[str, Any]) -> None:
    for where, expression in expressions(board):
        for match in re.finditer(r"lrpilot_\w+_(?:total|bucket|count|sum)\b", expression):
            before = expression[: match.start()]
            assert re.search(r"(?:rate|increase)\($", before), where


def test_queries_name_only_what_is_served_or_recorded(root: Path, board: dict[str, Any]) -> None:
    rules = yaml.safe_load((root / "deploy/prometheus/recording.yml").read_text())
    known = series_names() | {
        rule["record"] for group in rules["groups"] for rule in group["rules"]
    }
    named = {
        name
        for _, expression in expressions(board)
        for name in re.findall(r"[a-z0-9_:]*lrpilot_[a-z0-9_:]+", expression)
    }
    assert named
    assert named - known == set()


def test_uneditable_dashboard_rule(board: dict[str, Any]) -> None:
    assert board["editable"] is False


def test_no_panel_is_an_orphan_or_lies_over_another(board: dict[str, Any]) -> None:
    taken: set[tuple[int, int]] = set()
    numbers = [panel["id"] for panel in board["panels"]]
    assert sorted(numbers) == list(range(1, len(numbers) + 1))
    assert board["panels"][0]["type"] == "row"
    assert board["panels"][0]["gridPos"]["y"] == 0
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        cells = {
            (place["x"] + column, place["y"] + line)
            for column in range(place["w"])
            for line in range(place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


def test_the_first_row_answers_in_colours_and_words(board: dict[str, Any]) -> None:
    shown = board["panels"]
    end = next(at for at, panel in enumerate(shown[1:], 1) if panel["type"] == "row")
    first = shown[1:end]
    assert len(first) >= 6
    assert {panel["type"] for panel in first} == {"stat"}
    assert all(panel["fieldConfig"]["defaults"]["thresholds"]["steps"] for panel in first)
    # At most two lines: they fit above the fold.
    assert {panel["gridPos"]["y"] for panel in first} <= {1, 5}


@pytest.mark.needs_program("promtool")
def test_the_state_of_a_run_is_the_right_word(root: Path, tmp_path: Path) -> None:
    [panel] = [item for item in panels(committed(root, "run")) if item["title"] == "The run"]
    [target] = panel["targets"]
    ranges = [item["options"] for item in panel["fieldConfig"]["defaults"]["mappings"]]
    # Of each word: forgotten, ranks waiting, seconds blocked, seconds since the last event, held,
    # progress of 400.
    situations = {
        "at its end": (0, 0, 0, 901, 1, 400),
        "trains": (0, 8, 14, 899, 0, 400),
        "is held": (0, 0, 90, 0, 1, 10),
        "is silent": (0, 0, 0, 901, 1, 399),
        "ranks wait": (0, 1, 16, 1000, 1, 399),
        "log forgot": (1, 0, 0, 0, 0, 0),
    }
    assert [item["result"]["text"] for item in ranges] == list(situations)
    names = "forgotten ranks_waiting blocked_seconds updated_timestamp_seconds held progress length"
    tests = []
    for word, (forgotten, waiting, blocked, age, held, progress) in situations.items():
        values = (forgotten, waiting, blocked, 1200 - age, held, progress, 400)
        [low, high] = next(
            (item["from"], item["to"]) for item in ranges if item["result"]["text"] == word
        )
        state = target["expr"].replace("$run", word)
        tests.append(
            {
                "interval": "1m",
                "input_series": [
                    {"series": f'lrpilot_run_{name}{{run="{word}"}}', "values": f"{value}x30"}
                    for name, value in zip(names.split(), values, strict=True)
                ],
                "promql_expr_test": [
                    {
                        "expr": f"({state}) >= bool {low} and ({state}) <= {high}",
                        "eval_time": "20m",
                        "exp_samples": [{"labels": f'{{run="{word}"}}', "value": 1}],
                    }
                ],
            }
        )
    path = tmp_path / "states.yml"
    path.write_text(yaml.safe_dump({"tests": tests}))
    done = subprocess.run(
        ["promtool", "test", "rules", path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_axis_of_learning_rates_is_logarithmic(root: Path) -> None:
    for name, title in (("run", "Learning rate"), ("fleet", "LR")):
        [panel] = [item for item in panels(committed(root, name)) if item["title"] == title]
        scale = panel["fieldConfig"]["defaults"]["custom"]["scaleDistribution"]
        assert scale == {"type": "log", "log": 10}


def test_adjustments_are_marked_in_the_graphs_of_a_run(root: Path) -> None:
    marks = {item["name"]: item for item in annotations(committed(root, "run"))}
    assert "lrpilot_run_adjustments_total" in marks["Adjustments"]["expr"]
    assert marks["Adjustments"]["enable"]
    assert set(marks) == {"Adjustments", "Advice", "Attempts"}
