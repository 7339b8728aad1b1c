"""What the panels of all dashboards have in common, over the Grafana Foundation SDK."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from grafana_foundation_sdk.builders import (
    common,
    dashboard,
    prometheus,
    stat,
    statetimeline,
    table,
    timeseries,
)
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")

RATE = "[$__rate_interval]"
"""A window that grows with the step, so that a graph misses nothing between two points."""
"""Whatever Prometheus is chosen on top of the dashboard."""

Queries = Mapping[str, str]
"""Legend to query; the legend may hold `{{label}}`."""

Steps = Sequence[tuple[float | None, str]]
"""(least value, colour), the first with None."""

CALM: Steps = [(None, "green")]
WATCH_ANY: Steps = [(None, "green"), (1, "orange")]
ALARM_ANY: Steps = [(None, "green"), (1, "red")]


def words(**texts: str) -> list[models.ValueMapping]:
    """Return mappings of the values 0, 1, … to words: `words(v0="no", v1="yes")`."""
    options = {
        key.removeprefix("v"): models.ValueMappingResult(text=text) for key, text in texts.items()
    }
    return [models.ValueMap(options)]


def ranges(*items: tuple[float, float, str, str]) -> list[models.ValueMapping]:
    """Return mappings of ranges to words; each is (from, to, word, colour)."""
    return [
        models.RangeMap(
            models.DashboardRangeMapOptions(
                low, high, models.ValueMappingResult(text=text, color=color, index=index)
            )
        )
        for index, (low, high, text, color) in enumerate(items)
    ]


def number(
    title: str,
    description: str,
    queries: Queries,
    *,
    unit: str = "short",
    steps: Steps = CALM,
    mappings: Sequence[models.ValueMapping] = (),
    decimals: int | None = None,
    width: int = 3,
    text: common_models.BigValueTextMode = common_models.BigValueTextMode.VALUE,
    missing: str = "unknown",
) -> stat.Panel:
    """Return one number with a colour, or a word in its place."""
    panel = (
        stat.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .unit(unit)
        .span(width)
        .height(4)
        .no_value(missing)
        .mappings(list(mappings))
        .thresholds(_thresholds(steps))
        .color_mode(common_models.BigValueColorMode.BACKGROUND)
        .graph_mode(common_models.BigValueGraphMode.NONE)
        .text_mode(text)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).values(False))
    )
    if decimals is not None:
        panel.decimals(decimals)
    for query in _targets(queries, instant=True):
        panel.with_target(query)
    return panel


def graph(
    title: str,
    description: str,
    queries: Queries,
    *,
    unit: str = "short",
    log: bool = False,
    bars: bool = False,
    width: int = 12,
    least: float | None = 0,
) -> timeseries.Panel:
    """Return curves over time; with `log` on a logarithmic axis, which has no `least`."""
    scale = common.ScaleDistributionConfig()
    if log:
        scale.type(common_models.ScaleDistribution.LOG).log(10)
    else:
        scale.type(common_models.ScaleDistribution.LINEAR)
    panel = (
        timeseries.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .unit(unit)
        .span(width)
        .height(8)
        .scale_distribution(scale)
        .line_width(1)
        .fill_opacity(60 if bars else 0)
        .draw_style(
            common_models.GraphDrawStyle.BARS if bars else common_models.GraphDrawStyle.LINE
        )
        .show_points(common_models.VisibilityMode.NEVER)
        .legend(
            common.VizLegendOptions()
            .show_legend(True)
            .display_mode(common_models.LegendDisplayMode.TABLE)
            .placement(common_models.LegendPlacement.BOTTOM)
            .calcs(["lastNotNull", "min", "max"])
        )
        .tooltip(common.VizTooltipOptions().mode(common_models.TooltipDisplayMode.MULTI))
    )
    if least is not None and not log:
        panel.min(least)
    for query in _targets(queries):
        panel.with_target(query)
    return panel


def timeline(title: str, description: str, queries: Queries, *, width: int = 24) -> Any:
    """Return bands over time, one for each series that is there."""
    panel = (
        statetimeline.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .unit("short")
        .span(width)
        .height(4)
        .mappings(words(v1="now"))
        .thresholds(_thresholds(CALM))
        .show_value(common_models.VisibilityMode.NEVER)
        .line_width(0)
        .fill_opacity(70)
        .legend(common.VizLegendOptions().show_legend(False))
    )
    for query in _targets(queries):
        panel.with_target(query)
    return panel


def rows(
    title: str,
    description: str,
    key: str,
    columns: Mapping[str, tuple[str, str]],
    *,
    mappings: Mapping[str, Sequence[models.ValueMapping]],
    link: tuple[str, str],
) -> table.Panel:
    """Return a table: one row for each value of the label `key`, one column for each query.

    `columns`: heading to (query, unit). `mappings`: heading to words. `link`: (title, address) of
    what stands under `key`.
    """
    panel = (
        table.Panel().title(title).description(description).datasource(SOURCE).span(24).height(12)
    )
    panel.unit("short").filterable(True)
    names = {}
    for letter, (heading, (expression, unit)) in zip(_letters(), columns.items(), strict=False):
        panel.with_target(
            _query(expression, letter, "", instant=True).format(PromQueryFormat.TABLE)
        )
        name = f"Value #{letter}"
        names[name] = heading
        properties = [models.DynamicConfigValue(id_val="unit", value=unit)]
        if heading in mappings:
            properties += [
                models.DynamicConfigValue(id_val="mappings", value=list(mappings[heading])),
                models.DynamicConfigValue(
                    id_val="custom.cellOptions", value={"type": "color-text"}
                ),
            ]
        panel.override_by_name(heading, properties)
    address = [{"title": link[0], "url": link[1]}]
    panel.override_by_name(key, [models.DynamicConfigValue(id_val="links", value=address)])
    panel.with_transformation(models.DataTransformerConfig(id_val="merge", options={}))
    panel.with_transformation(
        models.DataTransformerConfig(
            id_val="organize",
            options={"excludeByName": {"Time": True}, "renameByName": names},
        )
    )
    return panel


class Mark(Builder[models.AnnotationQuery]):
    """A line through all graphs where a query is above 0."""

    def __init__(self, name: str, query: str, color: str, title: str, text: str) -> None:
        self._mark = _Mark(name=name, datasource=SOURCE, expr=query, icon_color=color)
        self._mark.shown = {"titleFormat": title, "textFormat": text, "step": "60s"}

    def build(self) -> models.AnnotationQuery:
        """Return what the dashboard holds."""
        return self._mark


class _Mark(models.AnnotationQuery):
    shown: Mapping[str, str] = {}
    """What Grafana reads of an annotation and the SDK has no field for."""

    def to_json(self) -> dict[str, object]:
        return super().to_json() | dict(self.shown)


def base(uid: str, title: str, description: str, since: str) -> dashboard.Dashboard:
    """Return an empty dashboard with what all of them have."""
    link = (
        dashboard.DashboardLink("lrpilot")
        .type(models.DashboardLinkType.DASHBOARDS)
        .tags(["lrpilot"])
        .keep_time(True)
        .include_vars(False)
    )
    source = (
        dashboard.DatasourceVariable("datasource")
        .label("Data source")
        .type("prometheus")
        .current(models.VariableOption(text="Prometheus", value="prometheus", selected=True))
    )
    return (
        dashboard.Dashboard(title)
        .uid(uid)
        .description(description)
        .tags(["lrpilot"])
        .readonly()
        .timezone("browser")
        .time(f"now-{since}", "now")
        .refresh("30s")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .link(link)
        .with_variable(source)
    )


def choice(name: str, label: str, query: str, *, several: bool = False) -> dashboard.QueryVariable:
    """Return a variable with the values that a query finds; `several`: all of them at first."""
    variable = (
        dashboard.QueryVariable(name)
        .label(label)
        .query({"query": query, "refId": name})
        .datasource(SOURCE)
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
    )
    if several:
        variable.multi(True).include_all(True).all_value(".+")
        variable.current(models.VariableOption(text="All", value="$__all", selected=True))
    return variable


def _thresholds(steps: Steps) -> dashboard.ThresholdsConfig:
    found = [models.Threshold(value=value, color=color) for value, color in steps]
    return dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(found)


def _letters() -> str:
    return "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def _targets(queries: Queries, *, instant: bool = False) -> list[prometheus.Dataquery]:
    return [
        _query(expression, letter, legend, instant=instant)
        for letter, (legend, expression) in zip(_letters(), queries.items(), strict=False)
    ]


def _query(expression: str, letter: str, legend: str, *, instant: bool) -> prometheus.Dataquery:
    query = prometheus.Dataquery().expr(expression).ref_id(letter).datasource(SOURCE)
    query = query.legend_format(legend or "__auto")
    return query.instant() if instant else query.range()
