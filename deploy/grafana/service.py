"""The dashboard of the servers: whether calls and commits go through, and how fast."""

from grafana_foundation_sdk.builders import dashboard
from panels import ALARM_ANY, CALM, RATE, base, choice, graph, number, ranges

HERE = 'job=~"$job", instance=~"$instance"'
OURS = f"lrpilot_build_info{{{HERE}}}"
"""One series for each server of lrpilot. What else a Prometheus scrapes has `up` and `process_*`
too, and would be found where all jobs are chosen."""


def service() -> dashboard.Dashboard:
    """Return the dashboard."""
    board = (
        base(
            "lrpilot-service",
            "lrpilot: Service",
            "The servers of lrpilot: calls, commits, store, process.",
            "3h",
        )
        .with_variable(choice("job", "Job", "label_values(lrpilot_build_info, job)", several=True))
        .with_variable(
            choice(
                "instance",
                "Instance",
                'label_values(lrpilot_build_info{job=~"$job"}, instance)',
                several=True,
            )
        )
    )
    _now(board)
    _calls(board)
    _store(board)
    _process(board)
    return board


def _now(board: dashboard.Dashboard) -> None:
    board.with_row(dashboard.Row("Is it well?"))
    board.with_panel(
        number(
            "Servers that answer",
            "Of those that Prometheus scrapes.",
            # One that is down was seen within a day.
            {"up": f"sum(up{{{HERE}}} and on (job) last_over_time({OURS}[1d]))"},
            steps=[(None, "red"), (1, "green")],
            missing="none",
        )
    )
    board.with_panel(
        number(
            "Faults",
            "Share of calls that ended with INTERNAL, UNAVAILABLE or UNKNOWN within 5 minutes.",
            {"faults": f"max(instance:lrpilot_rpc_faults:ratio5m{{{HERE}}}) or 0 * sum({OURS})"},
            unit="percentunit",
            steps=[(None, "green"), (0.001, "orange"), (0.05, "red")],
            decimals=2,
        )
    )
    board.with_panel(
        number(
            "Calls",
            "All methods, per second.",
            {"calls": f"sum(rate(lrpilot_rpc_calls_total{{{HERE}}}{RATE}))"},
            unit="reqps",
            steps=CALM,
        )
    )
    board.with_panel(
        number(
            "Commits, 99 %",
            "Time that 99 of 100 commits stay below, over 5 minutes.",
            {"p99": f"max(instance:lrpilot_commit_duration_seconds:p99_5m{{{HERE}}})"},
            unit="s",
            steps=[(None, "green"), (0.05, "orange"), (0.25, "red")],
        )
    )
    board.with_panel(
        number(
            "Commits that failed",
            "Within the last hour. Any is worth a look: docs/alerts.md#lrpilotcommitsfail.",
            {"failed": f"sum(increase(lrpilot_failed_commits_total{{{HERE}}}[1h]))"},
            steps=ALARM_ANY,
            decimals=0,
        )
    )
    board.with_panel(
        number(
            "Size",
            "What the event log takes on disk.",
            {"size": f"max(lrpilot_store_size_bytes{{{HERE}}})"},
            unit="bytes",
        )
    )
    board.with_panel(
        number(
            "The store",
            "Whether the last write to the event log succeeded, on every server.",
            {"writable": f"min(lrpilot_store_writable{{{HERE}}})"},
            mappings=ranges((0, 0, "cannot be written", "red"), (1, 1, "writes", "green")),
        )
    )
    board.with_panel(
        number(
            "Versions",
            "Number of different releases that run; more than one is for the time of an upgrade.",
            {"versions": f"count(count by (version) (lrpilot_build_info{{{HERE}}}))"},
            steps=[(None, "green"), (2, "orange")],
        )
    )


def _calls(board: dashboard.Dashboard) -> None:
    board.with_row(dashboard.Row("Calls"))
    rate = f"rate(lrpilot_rpc_calls_total{{{HERE}}}{RATE})"
    board.with_panel(
        graph(
            "Calls by method",
            "Finished calls per second.",
            {"{{method}}": f"sum by (method) ({rate})"},
            unit="reqps",
        )
    )
    board.with_panel(
        graph(
            "Calls by status",
            "Refusals such as FAILED_PRECONDITION are answers; INTERNAL and UNAVAILABLE are "
            "faults.",
            {"{{code}}": f"sum by (code) ({rate})"},
            unit="reqps",
        )
    )
    # Those that may wait would say how long the training takes.
    quick = f'{HERE}, method!~"GetValues|SaveState"'
    buckets = f"sum by (le, method) (rate(lrpilot_rpc_duration_seconds_bucket{{{quick}}}{RATE}))"
    board.with_panel(
        graph(
            "Latency, 99 %",
            "By method, without GetValues and SaveState, which may wait by design.",
            {"{{method}}": f"histogram_quantile(0.99, {buckets}) >= 0"},
            unit="s",
        )
    )
    seconds = f"sum(rate(lrpilot_rpc_duration_seconds_sum{{{HERE}, method='GetValues'}}{RATE}))"
    count = f"sum(rate(lrpilot_rpc_duration_seconds_count{{{HERE}, method='GetValues'}}{RATE}))"
    board.with_panel(
        graph(
            "GetValues, mean",
            "Waiting for losses included: near 0 while values are there ahead of the ranks.",
            {"mean": f"{seconds} / ({count} > 0)"},
            unit="s",
        )
    )


def _store(board: dashboard.Dashboard) -> None:
    board.with_row(dashboard.Row("Store"))
    buckets = f"sum by (le) (rate(lrpilot_commit_duration_seconds_bucket{{{HERE}}}{RATE}))"
    board.with_panel(
        graph(
            "Commit latency",
            "Time of one commit to stable storage.",
            {
                "50 %": f"histogram_quantile(0.5, {buckets}) >= 0",
                "99 %": f"histogram_quantile(0.99, {buckets}) >= 0",
            },
            unit="s",
            width=8,
        )
    )
    board.with_panel(
        graph(
            "Events",
            "Events that became durable, per second.",
            {"events": f"sum(rate(lrpilot_committed_events_total{{{HERE}}}{RATE}))"},
            unit="ops",
            width=8,
        )
    )
    board.with_panel(
        graph(
            "Waiting for the next commit",
            "Appends and deletes in the queue.",
            {"{{instance}}": f"max by (instance) (lrpilot_commit_queue_depth{{{HERE}}})"},
            width=8,
        )
    )
    board.with_panel(
        graph(
            "Failed commits by server",
            "Per second.",
            {
                "{{instance}}": f"sum by (instance) "
                f"(rate(lrpilot_failed_commits_total{{{HERE}}}{RATE}))"
            },
            unit="ops",
            width=8,
        )
    )
    board.with_panel(
        graph(
            "Size of the store",
            "What the event log takes on disk, and what is free there; of a database on another "
            "machine the latter is not known.",
            {
                "{{instance}}": f"max by (instance) (lrpilot_store_size_bytes{{{HERE}}})",
                "free on {{instance}}": f"min by (instance) (lrpilot_store_free_bytes{{{HERE}}})",
            },
            unit="bytes",
            width=8,
        )
    )
    board.with_panel(
        graph(
            "Snapshots that failed",
            "By server. Any is worth a look: docs/alerts.md#lrpilotsnapshotsfail.",
            {
                "{{instance}}": f"sum by (instance) "
                f"(increase(lrpilot_snapshot_failures_total{{{HERE}}}{RATE}))"
            },
            bars=True,
            width=8,
        )
    )
    board.with_panel(
        graph(
            "Runs, live and left out",
            "A scrape shows at most 1,000.",
            {
                "live": f"sum(lrpilot_live_runs{{{HERE}}})",
                "left out, per second": f"sum(rate(lrpilot_left_out_runs_total{{{HERE}}}{RATE}))",
            },
            width=24,
        )
    )


def _of_process(what: str) -> str:
    return f"{what} and on (job, instance) {OURS}"


def _process(board: dashboard.Dashboard) -> None:
    board.with_row(dashboard.Row("Process"))
    board.with_panel(
        graph(
            "CPU",
            "Cores in use; one server uses about one.",
            {
                "{{instance}}": "sum by (instance) "
                f"({_of_process(f'rate(process_cpu_seconds_total{{{HERE}}}{RATE})')})"
            },
            width=8,
        )
    )
    board.with_panel(
        graph(
            "Memory",
            "Resident set.",
            {
                "{{instance}}": "max by (instance) "
                f"({_of_process(f'process_resident_memory_bytes{{{HERE}}}')})"
            },
            unit="bytes",
            width=8,
        )
    )
    board.with_panel(
        graph(
            "Open files",
            "A connection is one; the limit is raised to the hard one at the start.",
            {
                "{{instance}}": f"max by (instance) ({_of_process(f'process_open_fds{{{HERE}}}')})",
                "limit of {{instance}}": "max by (instance) "
                f"({_of_process(f'process_max_fds{{{HERE}}}')})",
            },
            width=8,
        )
    )
