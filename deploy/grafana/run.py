"""The dashboard of one run: whether it is well, what lrpilot did and why, and what comes next."""

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.models.common import BigValueTextMode
from panels import ALARM_ANY, RATE, WATCH_ANY, Mark, base, choice, graph, number, ranges, timeline
from states import STATES, state

RUN = 'run="$run"'


def run() -> dashboard.Dashboard:
    """Return the dashboard."""
    board = base(
        "lrpilot-run",
        "lrpilot: Run",
        "One training run: whether it is well, what lrpilot did and why, what comes next.",
        "6h",
    ).with_variable(choice("run", "Run", "label_values(lrpilot_run_progress, run)"))
    _marks(board)
    _now(board)
    _more(board)
    _curves(board)
    _decisions(board)
    _pace(board)
    return board


def _marks(board: dashboard.Dashboard) -> None:
    # A fixed range: what it holds must not depend on the width of the window.
    changed = f"sum by (source, kind) (increase(lrpilot_run_adjustments_total{{{RUN}}}[2m])) > 0"
    advised = f"sum by (source, kind) (increase(lrpilot_run_advice_total{{{RUN}}}[2m])) > 0"
    opened = f"sum by (run) (changes(lrpilot_run_attempt{{{RUN}}}[2m])) > 0"
    board.annotation(Mark("Adjustments", changed, "orange", "{{kind}} adjusted", "{{source}}"))
    board.annotation(Mark("Advice", advised, "blue", "{{kind}} advises", "{{source}}"))
    board.annotation(Mark("Attempts", opened, "purple", "attempt opened", "{{run}}"))


def _now(board: dashboard.Dashboard) -> None:
    board.with_row(dashboard.Row("Is it well?"))
    board.with_panel(
        number(
            "The run",
            "In one word. Ranks wait: blocked for longer than 15 s. Silent: nothing was recorded "
            "for 15 minutes. At its end: the same, with the whole plan done. Held: an operator or "
            "a policy holds LR and WD. See docs/alerts.md.",
            {"state": state(RUN)},
            mappings=STATES,
            missing="not live",
        )
    )
    board.with_panel(
        number(
            "Progress",
            "Share of the planned length; above 100 % the job goes on past the end of its plan.",
            {"progress": f"max by (run) (run:lrpilot_run_progress:ratio{{{RUN}}})"},
            unit="percentunit",
            decimals=1,
        )
    )
    board.with_panel(
        number(
            "Time left",
            "To the planned end, at the pace of the last 5 minutes.",
            {"left": f"max by (run) (run:lrpilot_run_remaining_seconds:deriv5m{{{RUN}}})"},
            unit="dtdurations",
            missing="stands still",
        )
    )
    board.with_panel(
        number(
            "Loss, smoothed",
            "Exponential average of the finite losses, newest weight 0.02.",
            {"loss": f"max by (run) (lrpilot_run_smoothed_loss{{{RUN}}})"},
            decimals=4,
        )
    )
    board.with_panel(
        number(
            "LR against the plan",
            "Least multiplier of the groups: what policies and operators made of the base "
            "schedule.",
            {"multiplier": f"min by (run) (lrpilot_run_learning_rate_multiplier{{{RUN}}})"},
            unit="percentunit",
            mappings=ranges((1, 1, "as planned", "green")),
            steps=[(None, "orange"), (1, "orange")],
        )
    )
    board.with_panel(
        number(
            "What comes next",
            "LR planned at the horizon over the LR now: what is decided already, or the schedule. "
            "A loss that comes until then may change what lies beyond it.",
            {
                "next": f"min by (run) (lrpilot_run_horizon_learning_rate{{{RUN}}} / "
                f"(lrpilot_run_learning_rate{{{RUN}}} > 0))"
            },
            unit="percentunit",
            decimals=1,
            mappings=ranges((1, 1, "no change", "green")),
            steps=[(None, "blue")],
        )
    )
    board.with_panel(
        number(
            "NaN in the last hour",
            "Losses that were NaN or infinite, less those that an attempt went back over.",
            {
                "nonfinite": f"clamp_min(max by (run) (delta("
                f"lrpilot_run_nonfinite_losses{{{RUN}}}[1h])), 0)"
            },
            mappings=ranges((0, 0, "none", "green")),
            steps=ALARM_ANY,
            decimals=0,
        )
    )
    board.with_panel(
        number(
            "Advice to answer",
            "What policies in mode advise wait for someone to approve: lrpilot run show.",
            {"advice": f"max by (run) (lrpilot_run_pending_advice{{{RUN}}})"},
            mappings=ranges((0, 0, "none", "green")),
            steps=WATCH_ANY,
        )
    )


def _more(board: dashboard.Dashboard) -> None:
    """Add the second line of numbers."""
    board.with_panel(
        number(
            "Adjustments in the last hour",
            "Changes of LR and WD by policies and operators. lrpilot run history has the reasons.",
            {
                "adjustments": "sum(max by (source, kind) "
                f"(increase(lrpilot_run_adjustments_total{{{RUN}}}[1h])))"
            },
            mappings=ranges((0, 0, "none", "green")),
            steps=[(None, "blue")],
            decimals=0,
        )
    )
    board.with_panel(
        number(
            "Values ahead",
            "Share of the delay that is fixed ahead of the ranks: what an outage may use up. With "
            "a delay of 1 there is none.",
            {"left": f"max by (run) (run:lrpilot_run_horizon_left:ratio{{{RUN}}})"},
            unit="percentunit",
            steps=[(None, "orange"), (0.25, "green")],
            decimals=0,
        )
    )
    board.with_panel(
        number(
            "Calls that wait",
            "Of blocked training threads, now.",
            {"waiting": f"sum by (run) (lrpilot_run_ranks_waiting{{{RUN}}})"},
            mappings=ranges((0, 0, "none", "green")),
            steps=WATCH_ANY,
        )
    )
    board.with_panel(
        number(
            "Last report",
            "How long ago a loss came.",
            {"ago": f"time() - max by (run) (lrpilot_run_last_report_timestamp_seconds{{{RUN}}})"},
            unit="dtdurations",
            steps=[(None, "green"), (300, "orange"), (900, "red")],
            decimals=0,
            missing="none yet",
        )
    )
    board.with_panel(
        number(
            "Pace now",
            "Progress per second, in the unit of the run, over 5 minutes.",
            {"pace": f"max by (run) (run:lrpilot_run_progress:deriv5m{{{RUN}}})"},
            decimals=2,
        )
    )
    board.with_panel(
        number(
            "Phase",
            "Phase of the base schedule, after the stage where the spec has some.",
            {"{{stage}} {{phase}}": f"max by (stage, phase) (lrpilot_run_stage_info{{{RUN}}})"},
            text=BigValueTextMode.NAME,
        )
    )
    board.with_panel(
        number(
            "It counts in",
            "Unit of progress, delay and lag; and who asks the server: each rank, or a leader.",
            {"{{unit}} ({{mode}})": f"max by (unit, mode) (lrpilot_run_info{{{RUN}}})"},
            text=BigValueTextMode.NAME,
        )
    )
    board.with_panel(
        number(
            "Attempt",
            "Number of the current one: each restart of the trainers is one.",
            {"attempt": f"max by (run) (lrpilot_run_attempt{{{RUN}}})"},
            steps=[(None, "blue")],
        )
    )


def _curves(board: dashboard.Dashboard) -> None:
    board.with_row(dashboard.Row("What happens"))
    board.with_panel(
        graph(
            "Loss",
            "As reported, and smoothed. Lines: adjustments, advice, attempts.",
            {
                "loss": f"max by (run) (lrpilot_run_loss{{{RUN}}})",
                "smoothed": f"max by (run) (lrpilot_run_smoothed_loss{{{RUN}}})",
            },
            least=None,
        )
    )
    board.with_panel(
        graph(
            "Learning rate",
            "LR in use, and LR planned at the horizon, on a logarithmic axis.",
            {
                "{{group}}": f"max by (group) (lrpilot_run_learning_rate{{{RUN}}})",
                "{{group}} at the horizon": f"max by (group) "
                f"(lrpilot_run_horizon_learning_rate{{{RUN}}})",
            },
            unit="sci",
            log=True,
        )
    )
    board.with_panel(
        timeline(
            "Stage and phase",
            "Stage of the spec, where it has some, and phase of the base schedule.",
            {"{{stage}} {{phase}}": f"max by (stage, phase) (lrpilot_run_stage_info{{{RUN}}})"},
        )
    )
    board.with_panel(
        graph(
            "LR over the base schedule",
            "1: as planned. Below: cut; above: raised.",
            {"{{group}}": f"max by (group) (lrpilot_run_learning_rate_multiplier{{{RUN}}})"},
            width=8,
        )
    )
    board.with_panel(
        graph(
            "Weight decay",
            "WD in use; nothing where the run sets none.",
            {"{{group}}": f"max by (group) (lrpilot_run_weight_decay{{{RUN}}})"},
            width=8,
        )
    )
    board.with_panel(
        graph(
            "Gradient norm",
            "The last one that was reported; nothing where the trainer reports none.",
            {"norm": f"max by (run) (lrpilot_run_gradient_norm{{{RUN}}})"},
            width=8,
        )
    )


def _decisions(board: dashboard.Dashboard) -> None:
    board.with_row(dashboard.Row("What lrpilot did, and how near the next decision is"))
    board.with_panel(
        graph(
            "Adjustments",
            "Changes of the plan, by kind of policy. lrpilot run history has the reasons.",
            {
                "{{kind}} ({{source}})": f"max by (kind, source) "
                f"(increase(lrpilot_run_adjustments_total{{{RUN}}}{RATE}))"
            },
            bars=True,
            width=8,
        )
    )
    board.with_panel(
        graph(
            "What speaks for a decision",
            "In a row, by policy: reports without improvement, means that are too high, outliers, "
            "NaN. The policy acts when its own patience is passed.",
            {"{{source}}": f"max by (source) (lrpilot_run_policy_bad_reports{{{RUN}}})"},
            width=8,
        )
    )
    board.with_panel(
        graph(
            "Cooldown, and what is decided",
            "Reports that a policy will still pass over; adjustments decided and not in effect "
            "yet.",
            {
                "cooldown of {{source}}": f"max by (source) "
                f"(lrpilot_run_policy_cooldown_reports{{{RUN}}})",
                "adjustments to come": f"max by (run) (lrpilot_run_planned_adjustments{{{RUN}}})",
            },
            width=8,
        )
    )


def _pace(board: dashboard.Dashboard) -> None:
    board.with_row(dashboard.Row("Pace, ranks and losses that went missing"))
    board.with_panel(
        graph(
            "Pace",
            "Progress per second, in the unit of the run.",
            {"pace": f"max by (run) (run:lrpilot_run_progress:deriv5m{{{RUN}}})"},
            width=8,
            least=None,
        )
    )
    board.with_panel(
        graph(
            "Values left",
            "Share of the delay that is fixed ahead of the ranks. At 0 the next step waits for a "
            "loss; with a delay of 1 that is how it works.",
            {"left": f"max by (run) (run:lrpilot_run_horizon_left:ratio{{{RUN}}})"},
            unit="percentunit",
            width=8,
        )
    )
    board.with_panel(
        graph(
            "Slowest rank",
            "How far the slowest rank that asked lately was behind, in the unit of the run.",
            {"behind": f"max by (run) (lrpilot_run_slowest_rank_lag{{{RUN}}})"},
            width=8,
        )
    )
    board.with_panel(
        graph(
            "Ranks that wait",
            "Calls of blocked training threads.",
            {"waiting": f"sum by (run) (lrpilot_run_ranks_waiting{{{RUN}}})"},
            width=6,
        )
    )
    board.with_panel(
        graph(
            "Blocked",
            "For how long, since the horizon last moved. A waiver comes at feedback.timeout.",
            {"blocked": f"max by (run) (lrpilot_run_blocked_seconds{{{RUN}}})"},
            unit="s",
            width=6,
        )
    )
    board.with_panel(
        graph(
            "Losses that went missing",
            "Waivers and late losses, of the attempt.",
            {
                "waivers": f"max by (run) (increase(lrpilot_run_waivers_total{{{RUN}}}{RATE}))",
                "late": f"max by (run) (lrpilot_run_late_losses{{{RUN}}})",
                "NaN": f"max by (run) (lrpilot_run_nonfinite_losses{{{RUN}}})",
                "skipped updates": f"max by (run) (lrpilot_run_skipped_updates{{{RUN}}})",
            },
            width=6,
        )
    )
    board.with_panel(
        graph(
            "Attempts and old processes",
            "Attempt, rollbacks, and calls of older attempts that were refused.",
            {
                "attempt": f"max by (run) (lrpilot_run_attempt{{{RUN}}})",
                "rollbacks": f"max by (run) (lrpilot_run_rollbacks{{{RUN}}})",
                "refused calls": f"sum by (run) "
                f"(increase(lrpilot_run_superseded_calls_total{{{RUN}}}{RATE}))",
            },
            width=6,
        )
    )
