"""The metrics that a server serves, for tests that hold pages, rules and dashboards to them."""

from typing import Any, cast

from lrpilot.server._metrics import Metrics
from lrpilot.server._run_metrics import RunCollector

SUFFIXES = {"counter": "_total", "info": "_info"}
"""What the name of a metric ends in, as queries have it, by its type."""


def served_metrics() -> dict[str, str]:
    """Return the name of each metric of ours, as queries have it, to its type."""
    of_runs = RunCollector(cast("Any", None), cast("Any", None))
    return {
        family.name + SUFFIXES.get(family.type, ""): family.type
        for family in (*Metrics().registry.collect(), *of_runs.describe())
        if family.name.startswith("lrpilot_")
    }


def series_names() -> set[str]:
    """Return the name of each series; a histogram has three."""
    names = set()
    for name, kind in served_metrics().items():
        parts = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
        names |= {name + part for part in parts}
    return names
