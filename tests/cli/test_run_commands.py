"""`lrpilot run …` against a server that answers what the test says."""

import json
import math
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from typer.testing import Result

from lrpilot.server._documents import dump_document, read_spec
from lrpilot.v1 import runs_pb2

Cli = Callable[..., Result]
SpecFile = Callable[..., str]

CREATED = Timestamp(seconds=1_764_016_846, nanos=123_456_789)


def adjustment(**changes: Any) -> runs_pb2.Adjustment:
    fields: dict[str, Any] = {
        "effective": 164,
        "decided_at": 132,
        "source": "policies.0 (plateau)",
        "action": "multiply",
        "factor": 0.5,
        "reason": "no loss below 2.5 [for 11 losses]",
        "before": [2e-4, 1e-4],
        "after": [1e-4, 5e-5],
        "mode": "act",
        "seq": 7,
        "id": "7-132-0",
        "summary": "LR x 0.5",
        "status": "in force",
    }
    return runs_pb2.Adjustment(**(fields | changes))


def run_message(document: str, **changes: Any) -> runs_pb2.Run:
    spec = read_spec(document)
    fields: dict[str, Any] = {
        "name": spec.name,
        "state": runs_pb2.RUN_STATE_RUNNING,
        "spec_document": dump_document(spec.to_mapping()),
        "unit": spec.unit,
        "total": spec.total,
        "attempt": 2,
        "begin": 100,
        "progress": 140,
        "frontier": 141,
        "horizon": 173,
        "delay": 32,
        "values": [
            runs_pb2.GroupValues(name=name, learning_rate=2e-4, weight_decay=0.1)
            for name in spec.group_names
        ],
        "loss": 2.5,
        "smoothed_loss": 2.625,
        "losses": 41,
        "nonfinite_losses": 1,
        "waivers": 0,
        "late_losses": 2,
        "adjustments": [adjustment()],
        "seq": 2**53 + 1,
        "digest": "ab" * 32,
        "created_at": CREATED,
        "updated_at": CREATED,
        "stage": "",
        "held": False,
        "validation_losses": {"wiki": 2.75, "code": 1.5},
        "skipped": 1,
        "rollbacks": 0,
        "etag": "00ff",
    }
    return runs_pb2.Run(**(fields | changes))


@pytest.fixture
def run(server: Any, cli: Cli) -> Cli:
    """Run `lrpilot run …` against the scripted server."""

    def invoke(command: str, *args: str, **kwargs: Any) -> Result:
        return cli("run", command, *args, "--server", server.address, **kwargs)

    return invoke


def test_create_sends_the_text_and_says_what_was_created(
    run: Cli, server: Any, specs: Any, spec_file: SpecFile
) -> None:
    server.answers["CreateRun"] = lambda request: runs_pb2.CreateRunResponse(
        run=run_message(request.spec_document)
    )
    result = run("create", spec_file())
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "created small: 1,000 iterations, delay 32\n"
    run("create", "-", input=specs.plain)
    run("create", "preset:llama3-8b-fp8")
    first, second, third = server.requests
    assert first.spec_document == second.spec_document == specs.plain
    assert read_spec(third.spec_document).total == 50000
    assert len({request.request_id for request in server.requests}) == 3
    assert all(len(request.request_id) == 32 for request in server.requests)


def test_a_log_that_has_forgotten_is_shown_first(run: Cli, server: Any, specs: Any) -> None:
    text = "the log of run 'small' has forgotten what it gave: rank 7 holds values up to 9"
    message = run_message(specs.plain, forgotten=text, state=runs_pb2.RUN_STATE_RUNNING)
    server.answers["GetRun"] = lambda _: runs_pb2.GetRunResponse(run=message)
    server.answers["ListRuns"] = lambda _: runs_pb2.ListRunsResponse(runs=[message])
    shown = run("show", "small").stdout
    first = text.partition(":")[0]
    assert first in shown
    assert shown.index(first) < shown.index("progress")
    assert "running" not in shown
    assert " forgotten " in run("list").stdout


def test_an_imported_run_is_shown_as_such_until_an_attempt_opens(
    run: Cli, server: Any, specs: Any
) -> None:
    message = run_message(specs.plain, imported_from="lrpilot 0.3.0 on there")
    server.answers["GetRun"] = lambda _: runs_pb2.GetRunResponse(run=message)
    server.answers["ListRuns"] = lambda _: runs_pb2.ListRunsResponse(runs=[message])
    for command in (("show", "small"), ("list",)):
        assert " imported " in run(*command).stdout
    message.state = runs_pb2.RUN_STATE_FINISHED
    assert " finished " in run("list").stdout


def test_a_state_that_only_a_newer_server_knows_is_shown_by_its_number(
    run: Cli, server: Any, specs: Any
) -> None:
    message: Any = run_message(specs.plain)
    message.state = 77
    server.answers["ListRuns"] = lambda _: runs_pb2.ListRunsResponse(runs=[message])
    assert " 77 " in run("list").stdout


def test_json_of_a_run(run: Cli, server: Any, specs: Any) -> None:
    message = run_message(specs.grouped, loss=math.nan, smoothed_loss=math.inf)
    message.values[0].learning_rate = 5.9999999999999995e-05
    message.values[1].ClearField("weight_decay")
    server.answers["GetRun"] = lambda _: runs_pb2.GetRunResponse(run=message)
    result = run("show", "grouped", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.count("\n") == 1
    assert json.loads(result.stdout) == {
        "name": "grouped",
        "state": "running",
        "spec": read_spec(specs.grouped).to_mapping(),
        "unit": "iterations",
        "total": 1000,
        "attempt": 2,
        "begin": 100,
        "progress": 140,
        "frontier": 141,
        "horizon": 173,
        "delay": 32,
        "values": [
            {"name": "no_decay", "learning_rate": 5.9999999999999995e-05, "weight_decay": 0.1},
            {"name": "embedding", "learning_rate": 2e-4, "weight_decay": None},
        ],
        "loss": "nan",
        "smoothed_loss": "inf",
        "losses": 41,
        "nonfinite_losses": 1,
        "waivers": 0,
        "late_losses": 2,
        "adjustments": [
            {
                "effective": 164,
                "decided_at": 132,
                "source": "policies.0 (plateau)",
                "action": "multiply",
                "factor": 0.5,
                "reason": "no loss below 2.5 [for 11 losses]",
                "before": [2e-4, 1e-4],
                "after": [1e-4, 5e-5],
                "mode": "act",
                "seq": 7,
                "forgotten": False,
                "id": "7-132-0",
                "summary": "LR x 0.5",
                "weight_decay_before": [],
                "weight_decay_after": [],
                "author": "",
                "expires": 0,
                "status": "in force",
            }
        ],
        "seq": 9007199254740993,
        "digest": "ab" * 32,
        "created_at": "2025-11-24T20:40:46.123456789Z",
        "updated_at": "2025-11-24T20:40:46.123456789Z",
        "stage": "",
        "held": False,
        "validation_losses": {"code": 1.5, "wiki": 2.75},
        "skipped": 1,
        "rollbacks": 0,
        "etag": "00ff",
        "leader": False,
        "permitted": 0,
        "declaration": None,
        "declared_steps": 0,
        "imported_from": "",
        "forgotten": "",
        "ranks": None,
        "older_adjustments": 0,
    }
    # JSON readers that know only doubles are not our concern: the digits are all there.
    assert '"seq": 9007199254740993' in result.stdout


def test_json_of_a_new_run_has_nulls(run: Cli, server: Any, specs: Any) -> None:
    message = run_message(specs.plain, state=runs_pb2.RUN_STATE_CREATED, adjustments=[])
    for name in ("loss", "smoothed_loss", "updated_at"):
        message.ClearField(name)
    server.answers["GetRun"] = lambda _: runs_pb2.GetRunResponse(run=message)
    fields = json.loads(run("show", "small", "--json").stdout)
    assert fields["state"] == "created"
    assert fields["adjustments"] == []
    assert fields["loss"] is fields["smoothed_loss"] is fields["updated_at"] is None


def test_show_for_people(run: Cli, server: Any, specs: Any) -> None:
    advice: dict[str, Any] = {"mode": "advise", "status": "advice", "expires": 464}
    directive: dict[str, Any] = {
        "source": "operator",
        "action": "directive",
        "summary": "ask for stop",
        "author": "oncall@node",
        "reason": "budget",
        "after": [2e-4, 1e-4],
    }
    adjustments = [
        adjustment(),
        adjustment(id="8-268-0", effective=300, **advice),
        adjustment(id="9-268-0", action="note", summary="note", reason="look", **advice),
        adjustment(status="forgotten", effective=500, before=[2e-4], after=[1e-4]),
        adjustment(
            source="operator",
            author="lead@node",
            action="scale weight decay",
            summary="WD x 2",
            after=[2e-4, 1e-4],
            weight_decay_before=[0.0, 0.1],
            weight_decay_after=[0.0, 0.2],
            status="planned",
        ),
        adjustment(id="12-300-3000", status="asked", **directive),
        adjustment(id="13-300-3000", status="failed", **directive),
    ]
    message = run_message(specs.grouped, adjustments=adjustments, stage="second", held=True)
    message.values[0].ClearField("weight_decay")
    server.answers["GetRun"] = lambda _: runs_pb2.GetRunResponse(run=message)
    result = run("show", "grouped")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "\x1b" not in result.stdout
    text = " ".join(result.stdout.replace("│", " ").split())
    for part in (
        "grouped",
        "running",
        "progress 140 of 1,000 iterations (14.0%)",
        "stage second",
        "held LR and WD are frozen; `lrpilot run release grouped --reason …` ends it",
        "fixed losses below 141 (frontier), values below 173 (horizon), delay 32",
        "loss 2.5, smoothed 2.625",
        "validation code 1.5, wiki 2.75",
        "counts 41 losses, 1 of them not finite; 2 late losses; 0 waivers; 1 skipped update; "
        "0 rollbacks",
        "attempt 2, opened at 100",
        "created 2025-11-24 20:40:46Z",
        "plan etag 00ff",
        "no_decay 0.0002 -",
        "embedding 0.0002 0.1",
        "7-132-0 164 LR x 0.5",
        "in force policies.0 (plateau)",
        "LR 0.0002 → 0.0001",
        "no loss below 2.5",
        "forgotten",
        "WD 0.1 → 0.2",
        "planned lead@node",
        "12-300-3000 164 ask for stop no answer yet oncall@node budget",
        "13-300-3000 164 ask for stop failed oncall@node budget",
        "advice 8-268-0: LR x 0.5, LR 0.0002 → 0.0001 (+1 group)",
        "approve it while the horizon is below 464: lrpilot run approve grouped 8-268-0",
    ):
        assert part in text, part
    # There is nothing in a note to approve.
    assert "lrpilot run approve grouped 9-268-0" not in text


def test_show_of_a_job_in_leader_mode_says_how_far_it_may_go_alone(
    run: Cli, server: Any, specs: Any
) -> None:
    fields: dict[str, Any] = {"leader": True}
    server.answers["GetRun"] = lambda _: runs_pb2.GetRunResponse(
        run=run_message(specs.plain, **fields)
    )
    for more, wanted in (
        ({}, "leader mode the job may not go on alone yet"),
        ({"permitted": 16_384}, "leader mode the job may go on alone below 16,384 created"),
        (
            {
                "declared_steps": 1_250,
                "declaration": runs_pb2.Declaration(begin=900, end=1_901, steps=1_000),
            },
            "the job may go on alone below 16,384; it did so for 1,250 steps, last from 900 to "
            "1,900",
        ),
    ):
        fields |= more
        assert wanted in " ".join(run("show", "small").stdout.replace("│", " ").split())
    shown = json.loads(run("show", "small", "--json").stdout)
    assert (shown["leader"], shown["permitted"], shown["declared_steps"]) == (True, 16_384, 1_250)
    assert shown["declaration"] == {"begin": 900, "end": 1_901, "steps": 1_000}


def test_a_change_of_a_job_in_leader_mode_may_show_later(run: Cli, server: Any, specs: Any) -> None:
    for pending in (True, False):
        server.answers["AdjustRun"] = lambda _, pending=pending: runs_pb2.AdjustRunResponse(
            effective=173, adjustment=adjustment(), run=run_message(specs.plain), pending=pending
        )
        text = run("hold", "small", "--reason", "maintenance").stdout
        said = "leader mode: later, if the job has gone on alone beyond that progress"
        assert (said in text) == pending
        fields = json.loads(run("hold", "small", "--reason", "maintenance", "--json").stdout)
        assert fields["pending"] is pending


def test_show_has_the_newest_adjustments_and_says_where_the_others_are(
    run: Cli, server: Any, specs: Any
) -> None:
    adjustments = [adjustment(id=f"{seq}-132-0") for seq in range(100, 128)]
    message = run_message(specs.plain, adjustments=adjustments)
    server.answers["GetRun"] = lambda _: runs_pb2.GetRunResponse(run=message)
    text = run("show", "small").stdout
    assert "102-132-0" not in text
    assert "103-132-0" in text
    assert "127-132-0" in text
    assert "3 older ones: lrpilot run history small" in text
    message.older_adjustments = 2000
    assert "2,003 older ones: lrpilot run history small" in run("show", "small").stdout


def test_show_of_a_run_without_groups_losses_or_attempt(run: Cli, server: Any, specs: Any) -> None:
    message = run_message(specs.plain, attempt=0, adjustments=[], state=runs_pb2.RUN_STATE_CREATED)
    message.ClearField("loss")
    message.ClearField("validation_losses")
    server.answers["GetRun"] = lambda _: runs_pb2.GetRunResponse(run=message)
    text = run("show", "small").stdout
    assert "created" in text
    for part in ("smoothed", "attempt", "group", "why", "validation", "stage", "held", "directive"):
        assert part not in text


def curves(**fields: Any) -> runs_pb2.GetCurvesResponse:
    losses = [(0, 3.0), (50, math.nan), (132, 2.5), (140, 2.25)]
    known: dict[str, Any] = {
        "end": 1000,
        "progress": 140,
        "horizon": 173,
        "losses": [
            runs_pb2.LossCurve(
                attempt=1,
                forgotten_from=100,
                loss=runs_pb2.Curve(progress=[100, 120], value=[4.0, 5.0]),
            ),
            runs_pb2.LossCurve(
                attempt=2,
                begin=100,
                loss=runs_pb2.Curve(
                    progress=[at for at, _ in losses], value=[value for _, value in losses]
                ),
            ),
        ],
        "smoothed_loss": runs_pb2.Curve(progress=[0, 140], value=[3.0, 2.625]),
        "groups": [
            runs_pb2.GroupCurve(
                progress=[0, 163, 164, 1000],
                learning_rate=[2e-4, 2e-4, 1e-4, 1e-4],
                base_learning_rate=[2e-4] * 4,
                weight_decay=[0.1] * 4,
            )
        ],
    }
    return runs_pb2.GetCurvesResponse(**(known | fields))


@pytest.mark.parametrize("form", ["png", "svg"])
def test_show_draws_into_a_file(
    run: Cli, server: Any, specs: Any, tmp_path: Path, form: str
) -> None:
    server.answers["GetRun"] = lambda _: runs_pb2.GetRunResponse(run=run_message(specs.plain))
    server.answers["GetCurves"] = lambda _: curves()
    target = tmp_path / f"a.{form}"
    result = run("show", "small", "-o", str(target))
    assert (result.exit_code, result.stderr) == (0, "")
    assert "7-132-0" in result.stdout
    picture = target.read_bytes()
    if form == "png":
        assert picture.startswith(b"\x89PNG")
        return
    texts = [part.split("-->")[0].strip() for part in picture.decode().split("<!--")[1:]]
    for text in ("small", "not finite: 1 loss", "forgotten", "used", "base schedule", "planned",
                 "weight decay", "progress (iterations)", "1"):  # fmt: skip
        assert text in texts
    assert any(text.startswith("at 164 (policies.0 (plateau)): LR x 0.5") for text in texts)
    again = tmp_path / "again.svg"
    run("show", "small", "--json", "-o", str(again), "--log")
    assert again.read_bytes() != picture
    run("show", "small", "-o", str(again))
    assert again.read_bytes() == picture


def test_show_draws_only_what_it_can(run: Cli, server: Any, specs: Any, tmp_path: Path) -> None:
    server.answers["GetRun"] = lambda _: runs_pb2.GetRunResponse(run=run_message(specs.plain))
    # In a pipe the curves are not even asked for.
    assert run("show", "small").exit_code == 0
    assert [type(request).__name__ for request in server.requests] == ["GetRunRequest"]
    wrong = run("show", "small", "-o", "a.pdf")
    assert wrong.exit_code == 2
    assert "give a file that ends in .png or .svg" in wrong.stderr
    assert "--log is for pictures alone" in run("show", "small", "--log").stderr
    nowhere = run("show", "small", "-o", str(tmp_path / "nowhere" / "a.png"))
    assert (nowhere.exit_code, nowhere.stdout) == (2, "")
    assert len(server.requests) == 1
    loss = runs_pb2.LossCurve(attempt=1, loss=runs_pb2.Curve(progress=[0, 1], value=[1.0, -1.0]))
    server.answers["GetCurves"] = lambda _: curves(losses=[loss])
    target = tmp_path / "a.png"
    negative = run("show", "small", "--log", "-o", str(target))
    assert negative.exit_code == 2
    assert "a loss is 0 or negative" in negative.stderr
    assert not target.exists()
    empty = curves(losses=[], smoothed_loss=None, progress=0, horizon=32)
    server.answers["GetCurves"] = lambda _: empty
    assert run("show", "small", "-o", str(target)).exit_code == 0
    assert target.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("arguments", [(), ("small",)], ids=["all", "one"])
def test_watch_needs_a_terminal(run: Cli, server: Any, arguments: tuple[str, ...]) -> None:
    result = run("watch", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    said, hint = result.stderr.splitlines()
    assert said == "error: watch draws on a terminal, and this is none"
    for name in arguments:
        assert hint == f"hint: see `lrpilot run show {name}` and `lrpilot run history {name}`"
    assert server.requests == []
    assert "say which" in run("watch", "--log").stderr


def test_list_reads_every_page(run: Cli, server: Any, specs: Any) -> None:
    names = [f"run-{number}" for number in range(5)]

    def page(request: runs_pb2.ListRunsRequest) -> runs_pb2.ListRunsResponse:
        start = int(request.page_token or 0)
        runs = [run_message(specs.plain, name=name) for name in names[start : start + 2]]
        token = str(start + 2) if start + 2 < len(names) else ""
        return runs_pb2.ListRunsResponse(runs=runs, next_page_token=token)

    server.answers["ListRuns"] = page
    result = run("list")
    assert (result.exit_code, result.stderr) == (0, "")
    header, *rows = result.stdout.splitlines()
    assert header.split() == [
        "run", "state", "attempt", "progress", "total", "unit", "lr", "loss", "updated",
    ]  # fmt: skip
    assert rows[0].split() == [
        "run-0", "running", "2", "140", "1,000", "iterations", "0.0002", "2.5", "2025-11-24",
        "20:40:46Z",
    ]  # fmt: skip
    assert [row.split()[0] for row in rows] == names
    assert [request.page_token for request in server.requests] == ["", "2", "4"]

    parsed = [json.loads(line) for line in run("list", "--json").stdout.splitlines()]
    assert [fields["name"] for fields in parsed] == names
    assert all("spec" not in fields and "adjustments" not in fields for fields in parsed)
    assert parsed[0]["progress"] == 140


def test_list_of_nothing(run: Cli, server: Any) -> None:
    server.answers["ListRuns"] = lambda _: runs_pb2.ListRunsResponse()
    assert run("list").stdout == "no runs\n"
    assert run("list", "--json").stdout == ""


def events() -> list[runs_pb2.Event]:
    def loss(progress: int, **fields: Any) -> runs_pb2.LossRecord:
        return runs_pb2.LossRecord(progress=progress, weight=1.0, **fields)

    common: dict[str, Any] = {"recorded_at": CREATED, "digest": "cd" * 32}
    return [
        runs_pb2.Event(seq=1, kind="created", summary="created", **common),
        runs_pb2.Event(
            seq=2, kind="opened", attempt=1, summary="attempt 1 opened at progress 0", **common
        ),
        runs_pb2.Event(
            seq=3,
            kind="reported",
            attempt=1,
            progress=131,
            losses=[loss(131, loss=2.75), loss(132, loss=math.nan), loss(133)],
            adjustments=[
                adjustment(seq=3),
                adjustment(seq=3, id="7-133-1", mode="advise", status="expired"),
            ],
            summary="reported 3 steps, progress 131 to 133, moved to 134",
            **common,
        ),
        runs_pb2.Event(
            seq=4,
            kind="reported",
            attempt=1,
            progress=90,
            losses=[loss(90, loss=2.5, late=True)],
            summary="reported progress 90, moved to 91",
            **common,
        ),
        runs_pb2.Event(
            seq=5,
            kind="reported",
            attempt=1,
            progress=134,
            losses=[
                loss(134, loss=9.0, skipped=True),
                loss(134, loss=2.5, validation_losses={"wiki": 2.75, "code": 1.5}),
            ],
            summary="rank 4 reported 2 steps, progress 134 to 134, moved to 135",
            **common,
        ),
        runs_pb2.Event(
            seq=6,
            kind="adjusted",
            progress=167,
            adjustments=[adjustment(seq=6, source="operator", id="6-135-3000", status="undone")],
            summary="LR x 0.5 from progress 167 on",
            author="oncall@node",
            reason="oscillates",
            **common,
        ),
        runs_pb2.Event(
            seq=7,
            kind="acknowledged",
            attempt=1,
            progress=170,
            summary="directive 4-1-0 failed",
            reason="no snapshot",
            **common,
        ),
    ]


def test_history_reads_every_page_and_gives_reasons(run: Cli, server: Any) -> None:
    log = events()

    def page(request: runs_pb2.ListEventsRequest) -> runs_pb2.ListEventsResponse:
        start = int(request.page_token or 0)
        token = str(start + 1) if start + 1 < len(log) else ""
        return runs_pb2.ListEventsResponse(events=log[start : start + 1], next_page_token=token)

    server.answers["ListEvents"] = page
    result = run("history", "my-run")
    assert (result.exit_code, result.stderr) == (0, "")
    at = "2025-11-24 20:40:46Z"
    assert result.stdout.splitlines() == [
        f"     1  {at}  created                   created",
        f"     2  {at}  opened        attempt 1   attempt 1 opened at progress 0",
        f"     3  {at}  reported      attempt 1   reported 3 steps, progress 131 to 133, moved to "
        "134; loss 2.75 … none",
        "        7-132-0 policies.0 (plateau) at 132: LR x 0.5 from 164 on, LR 0.0002 → 0.0001 "
        "(+1 group): no loss below 2.5 [for 11 losses]",
        "        7-133-1 policies.0 (plateau) at 132: LR x 0.5 (expired) from 164 on, LR 0.0002 → "
        "0.0001 (+1 group): no loss below 2.5 [for 11 losses]",
        f"     4  {at}  reported      attempt 1   reported progress 90, moved to 91; loss 2.5 "
        "(1 late)",
        f"     5  {at}  reported      attempt 1   rank 4 reported 2 steps, progress 134 to 134, "
        "moved to 135; loss 9 … 2.5 (1 skipped), code 1.5, wiki 2.75",
        f"     6  {at}  adjusted                  LR x 0.5 from progress 167 on, by oncall@node: "
        "oscillates",
        "        6-135-3000: LR 0.0002 → 0.0001 (+1 group) (undone)",
        f"     7  {at}  acknowledged  attempt 1   directive 4-1-0 failed: no snapshot",
    ]
    assert {request.run for request in server.requests} == {"my-run"}

    parsed = [json.loads(line) for line in run("history", "my-run", "--json").stdout.splitlines()]
    assert [fields["seq"] for fields in parsed] == [1, 2, 3, 4, 5, 6, 7]
    common = {
        "weight": 1.0,
        "late": False,
        "skipped": False,
        "validation_losses": {},
        "gradient_norm": None,
        "batch": 0,
        "rank": 0,
    }
    assert parsed[2]["losses"] == [
        {"progress": 131, "loss": 2.75, **common},
        {"progress": 132, "loss": "nan", **common},
        {"progress": 133, "loss": None, **common},
    ]
    assert parsed[4]["losses"][1]["validation_losses"] == {"code": 1.5, "wiki": 2.75}
    assert (parsed[5]["author"], parsed[5]["reason"]) == ("oncall@node", "oscillates")
    assert parsed[2]["adjustments"][0]["reason"] == "no loss below 2.5 [for 11 losses]"
    assert parsed[0] == {
        "seq": 1,
        "digest": "cd" * 32,
        "recorded_at": "2025-11-24T20:40:46.123456789Z",
        "kind": "created",
        "attempt": 0,
        "progress": 0,
        "losses": [],
        "adjustments": [],
        "summary": "created",
        "author": "",
        "reason": "",
    }


def test_revise_names_the_run_that_the_spec_names(
    run: Cli, server: Any, specs: Any, spec_file: SpecFile
) -> None:
    server.answers["ReviseRun"] = lambda request: runs_pb2.ReviseRunResponse(
        effective=1173, run=run_message(request.spec_document)
    )
    result = run("revise", spec_file(), "--reason", "longer")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "small: new spec from progress 1,173 on\n"
    (request,) = server.requests
    assert (request.run, request.spec_document) == ("small", specs.plain)
    assert (request.reason, request.dry_run) == ("longer", False)
    assert request.request_id
    fields = json.loads(run("revise", spec_file(), "--reason", "longer", "--json").stdout)
    assert (fields["effective"], fields["run"]["name"]) == (1173, "small")


@pytest.mark.parametrize(
    ("text", "violation"),
    [
        ("total: 1", "name: got None; allowed: the name of the run to revise"),
        ("name: [a]", "name: got ['a']; allowed: the name of the run to revise"),
        ("name: a\nname: b", "name: got a second value at line 2; allowed: one value (the first "
         "is at line 1)"),
    ],
)  # fmt: skip
def test_revise_needs_a_name(run: Cli, server: Any, text: str, violation: str) -> None:
    result = run("revise", "-", "--reason", "longer", input=text)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.splitlines()[1] == f"  {violation}"
    assert server.requests == []


@pytest.mark.parametrize("force", [False, True])
def test_finish_and_delete(run: Cli, server: Any, specs: Any, force: bool) -> None:
    finished = run_message(specs.plain, state=runs_pb2.RUN_STATE_FINISHED)
    server.answers["FinishRun"] = lambda _: runs_pb2.FinishRunResponse(run=finished)
    server.answers["DeleteRun"] = lambda _: runs_pb2.DeleteRunResponse()
    flags = ["--force"] if force else []
    assert run("finish", "small", *flags).stdout == (
        "finished small at progress 140 of 1,000 iterations\n"
    )
    assert run("delete", "small", *flags).stdout == "deleted small\n"
    assert [(request.run, request.force) for request in server.requests] == [("small", force)] * 2
    assert json.loads(run("finish", "small", "--json").stdout)["state"] == "finished"
    assert json.loads(run("delete", "small", "--json").stdout) == {"deleted": "small"}


@pytest.mark.parametrize(("command", "method"), [("finish", "FinishRun"), ("delete", "DeleteRun")])
def test_a_live_run_asks_for_force(run: Cli, server: Any, command: str, method: str) -> None:
    server.refuse(
        method, grpc.StatusCode.FAILED_PRECONDITION, "RunLive", "run 'small' is live: attempt 1"
    )
    result = run(command, "small")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        "error: run 'small' is live: attempt 1\nhint: repeat the command with --force\n"
    )


def test_an_invalid_spec_lists_every_violation(run: Cli, server: Any, spec_file: SpecFile) -> None:
    violations = {
        "total": "got 0; allowed: 1 on",
        "name": "got 'A'; allowed: a-z",
        "": "and 3 more",
    }
    server.refuse(
        "CreateRun",
        grpc.StatusCode.INVALID_ARGUMENT,
        "InvalidSpec",
        # The text of the server has them, too.
        "the run spec is invalid\n  total: got 0; allowed: 1 on",
        violations,
    )
    result = run("create", spec_file())
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.splitlines() == [
        "error: the run spec is invalid",
        "  total: got 0; allowed: 1 on",
        "  name: got 'A'; allowed: a-z",
        "  and 3 more",
    ]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (grpc.StatusCode.NOT_FOUND, "RunNotFound"),
        (grpc.StatusCode.ALREADY_EXISTS, "RunExists"),
        (grpc.StatusCode.FAILED_PRECONDITION, "RunFinished"),
        (grpc.StatusCode.INTERNAL, "Whatever"),
    ],
)
def test_a_refusal_is_one_line_and_exit_code_1(
    run: Cli, server: Any, code: grpc.StatusCode, reason: str
) -> None:
    server.refuse("GetRun", code, reason, "no run 'smal'; near: small")
    result = run("show", "smal")
    assert (result.exit_code, result.stdout) == (1, "")
    hint = (
        "hint: `lrpilot run list` shows the runs of this server\n"
        if reason == "RunNotFound"
        else ""
    )
    assert result.stderr == f"error: no run 'smal'; near: small\n{hint}"


def test_a_refusal_without_details_has_its_text(run: Cli, server: Any) -> None:
    server.details_key = "other-bin"
    server.refuse("GetRun", grpc.StatusCode.NOT_FOUND, "RunNotFound", "nothing here")
    assert run("show", "x").stderr == "error: nothing here\n"


def test_a_refusal_in_the_middle_of_the_pages(run: Cli, server: Any, specs: Any) -> None:
    def page(request: runs_pb2.ListRunsRequest) -> runs_pb2.ListRunsResponse:
        if request.page_token:
            message = "gone"
            raise RuntimeError(message)
        return runs_pb2.ListRunsResponse(runs=[run_message(specs.plain)], next_page_token="1")

    server.answers["ListRuns"] = page
    result = run("list", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["name"] == "small"
    assert result.stderr.startswith("error: ")


def test_every_call_has_a_deadline(run: Cli, server: Any, specs: Any) -> None:
    server.answers["GetRun"] = lambda _: runs_pb2.GetRunResponse(run=run_message(specs.plain))
    run("show", "small")
    run("show", "small", "--timeout-s", "90")
    usual, longer = server.deadlines_s
    # What is left of them when they arrive, by another clock.
    assert 5 < usual < 20 < longer < 100


def test_no_answer_in_time(run: Cli, server: Any, spec_file: SpecFile) -> None:
    def never(_: Any) -> Any:
        released.wait(30)
        raise RuntimeError

    import threading

    released = threading.Event()
    server.answers |= {"GetRun": never, "CreateRun": never}
    try:
        shown = run("show", "small", "--timeout-s", "0.05")
        created = run("create", spec_file(), "--timeout-s", "0.05")
    finally:
        released.set()
    assert (shown.exit_code, shown.stdout) == (3, "")
    assert shown.stderr == f"error: no answer from {server.address} within 0.05 s\n"
    assert created.exit_code == 3
    assert "hint: the server may have done it all the same" in created.stderr


def test_a_server_that_is_not_there(cli: Cli) -> None:
    with socket.socket() as holder:
        # Bound and not listening: nobody else gets the port, and nobody answers there.
        holder.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{holder.getsockname()[1]}"
        result = cli("run", "list", "--server", address)
    assert (result.exit_code, result.stdout) == (3, "")
    message, _, hint = result.stderr.splitlines()
    assert message == f"error: no answer from the server at {address}"
    assert hint.startswith("hint: start one with `lrpilot serve`")


def test_another_program_at_the_address(cli: Cli) -> None:
    from concurrent import futures

    other = grpc.server(futures.ThreadPoolExecutor(max_workers=1))
    port = other.add_insecure_port("127.0.0.1:0")
    other.start()
    try:
        result = cli("run", "list", "--server", f"127.0.0.1:{port}")
    finally:
        other.stop(None).wait()
    assert result.exit_code == 1
    assert "does not know this call" in result.stderr


def test_the_server_comes_from_the_environment(
    cli: Cli, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.answers["ListRuns"] = lambda _: runs_pb2.ListRunsResponse()
    monkeypatch.setenv("LRPILOT_SERVER", server.address)
    assert cli("run", "list").stdout == "no runs\n"
    assert cli("run", "list", "--server", "127.0.0.1:1", "--timeout-s", "1").exit_code == 3


@pytest.mark.parametrize(
    "address", ["localhost", "localhost:", ":50051", "a:70000", "http://a:1", ""]
)
def test_an_address_that_is_none(cli: Cli, address: str) -> None:
    result = cli("run", "list", "--server", address)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "HOST:PORT" in result.stderr


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "x"])
def test_a_timeout_that_is_none(cli: Cli, seconds: str) -> None:
    result = cli("run", "list", "--timeout-s", seconds)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--timeout-s" in result.stderr


@pytest.mark.parametrize("command", [["create"], ["revise", "--reason", "longer"]])
def test_a_spec_file_that_is_not_there(run: Cli, server: Any, command: list[str]) -> None:
    result = run(*command, "absent.yaml")
    assert (result.exit_code, result.stderr) == (
        2,
        "error: absent.yaml: No such file or directory\n",
    )
    assert server.requests == []
