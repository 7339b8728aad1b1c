"""The dashboard of all runs: which of them needs someone."""

from grafana_foundation_sdk.builders import dashboard
from panels import ALARM_ANY, WATCH_ANY, base, graph, number, rows
from states import STATES, state

RUN_DASHBOARD = "/d/lrpilot-run?var-run=${__data.fields.run}&${datasource:queryparam}"


def fleet() -> dashboard.Dashboard:
    """Return the dashboard."""
    board = base(
        "lrpilot-fleet", "lrpilot: Fleet", "All live runs: which of them needs someone.", "24h"
    )
    _now(board)
    _runs(board)
    _curves(board)
    return board


def _increase(what: str) -> str:
    series = f'lrpilot_run_{what}_total{{kind="divergence"}}'
    return f"max by (run) (increase({series}[1h]))"


def _now(board: dashboard.Dashboard) -> None:
    board.with_row(dashboard.Row("Does one need someone?"))
    # `or vector(0)`: to count nothing is to say 0.
    for title, description, query, steps in (
        (
            "Live runs",
            "Runs whose ranks asked for something within 6 hours, and that are not finished.",
            "count(max by (run) (lrpilot_run_progress)) or vector(0)",
            [(None, "blue")],
        ),
        (
            "Ranks wait",
            "Runs in which training threads are blocked for longer than 15 s, or whose log forgot.",
            f"count(({state()}) >= 4) or vector(0)",
            ALARM_ANY,
        ),
        (
            "Silent",
            "Runs short of their end of which nothing was recorded for 15 minutes.",
            "count(time() - max by (run) (lrpilot_run_updated_timestamp_seconds) > 900 "
            "and on (run) run:lrpilot_run_progress:ratio < 1) or vector(0)",
            WATCH_ANY,
        ),
        (
            "NaN",
            "Runs with a loss that was NaN or infinite within the last hour.",
            "count(max by (run) (delta(lrpilot_run_nonfinite_losses[1h])) > 0) or vector(0)",
            ALARM_ANY,
        ),
        (
            "Diverge",
            "Runs in which the policy divergence acted or advised within the last hour.",
            f"count({_increase('adjustments')} > 0 or {_increase('advice')} > 0) or vector(0)",
            ALARM_ANY,
        ),
        (
            "Advice to answer",
            "Pieces of advice that could be approved now.",
            "sum(max by (run) (lrpilot_run_pending_advice)) or vector(0)",
            WATCH_ANY,
        ),
    ):
        board.with_panel(
            number(title, description, {title.lower(): query}, steps=steps, width=4, decimals=0)
        )


def _runs(board: dashboard.Dashboard) -> None:
    board.with_row(dashboard.Row("The runs"))
    board.with_panel(
        rows(
            "Runs",
            "One row for each live run; its name leads to its dashboard.",
            "run",
            {
                "State": (state(), "short"),
                "Progress": ("run:lrpilot_run_progress:ratio", "percentunit"),
                "Time left": ("run:lrpilot_run_remaining_seconds:deriv5m", "dtdurations"),
                "Loss": ("max by (run) (lrpilot_run_smoothed_loss)", "short"),
                "LR": ("max by (run) (lrpilot_run_learning_rate)", "sci"),
                "Against the plan": (
                    "min by (run) (lrpilot_run_learning_rate_multiplier)",
                    "percentunit",
                ),
                "Values left": ("run:lrpilot_run_horizon_left:ratio", "percentunit"),
                "Adjustments, 1 h": (
                    "sum by (run) (run_kind:lrpilot_run_adjustments:increase1h)",
                    "short",
                ),
                "Advice": ("max by (run) (lrpilot_run_pending_advice)", "short"),
                "Attempt": ("max by (run) (lrpilot_run_attempt)", "short"),
            },
            mappings={"State": STATES},
            link=("Open the run", RUN_DASHBOARD),
        )
    )


def _curves(board: dashboard.Dashboard) -> None:
    board.with_row(dashboard.Row("Side by side"))
    board.with_panel(
        graph(
            "Loss, smoothed",
            "Of each run.",
            {"{{run}}": "max by (run) (lrpilot_run_smoothed_loss)"},
            least=None,
        )
    )
    board.with_panel(
        graph(
            "LR",
            "The greatest of the groups of each run, on a logarithmic axis.",
            {"{{run}}": "max by (run) (lrpilot_run_learning_rate)"},
            unit="sci",
            log=True,
        )
    )
    board.with_panel(
        graph(
            "Progress",
            "Share of the planned length.",
            {"{{run}}": "run:lrpilot_run_progress:ratio"},
            unit="percentunit",
        )
    )
    board.with_panel(
        graph(
            "Adjustments in an hour",
            "By policies, without people.",
            {"{{run}}": "sum by (run) (run_kind:lrpilot_run_adjustments:increase1h)"},
        )
    )
