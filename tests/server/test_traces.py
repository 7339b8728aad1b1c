"""Traces: which spans a collector gets, and that one which is away or slow disturbs nobody."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from lrpilot.v1 import trainer_pb2

if TYPE_CHECKING:
    from tests.server.conftest import Program, Programs, Until

DEADLINE_S = 60.0
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@dataclass(frozen=True)
class Seen:
    """One span as the collector got it."""

    name: str
    trace: str
    id: str
    parent: str
    kind: int
    failed: bool
    seconds: float
    attributes: dict[str, Any]


@dataclass
class Collector:
    """Takes traces over OTLP/HTTP."""

    url: str
    spans: list[Seen] = field(default_factory=list)
    resources: list[dict[str, Any]] = field(default_factory=list)
    paths: set[str] = field(default_factory=set)

    def named(self, name: str) -> list[Seen]:
        return [span for span in self.spans if span.name == name]

    def called(self, method: str) -> list[Seen]:
        """Return the spans of a method of the service for ranks."""
        return self.named(f"lrpilot.v1.TrainerService/{method}")

    def of(self, parent: Seen, name: str) -> list[Seen]:
        """Return the spans of that name right below one."""
        return [one for one in self.named(name) if one.parent == parent.id]

    def take(self, body: bytes) -> None:
        for group in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.resources.append(_attributes(group.resource))
            for scope in group.scope_spans:
                self.spans += [
                    Seen(
                        name=span.name,
                        trace=span.trace_id.hex(),
                        id=span.span_id.hex(),
                        parent=span.parent_span_id.hex(),
                        kind=span.kind,
                        failed=span.status.code == 2,
                        seconds=(span.end_time_unix_nano - span.start_time_unix_nano) / 1e9,
                        attributes=_attributes(span),
                    )
                    for span in scope.spans
                ]


def _attributes(message: Any) -> dict[str, Any]:
    return {
        item.key: getattr(item.value, item.value.WhichOneof("value")) for item in message.attributes
    }


@pytest.fixture
def collector() -> Iterator[Collector]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            found.paths.add(self.path)
            found.take(body)
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found = Collector(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield found
        server.shutdown()
        thread.join(DEADLINE_S)


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Set variables for the programs that are started in the block."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


async def stop(program: Program) -> None:
    assert await asyncio.to_thread(program.end, signal.SIGTERM) == 0


async def test_a_call_is_a_span_with_what_it_did_below(
    programs: Programs, collector: Collector
) -> None:
    with environment(OTEL_RESOURCE_ATTRIBUTES="deployment.environment.name=test"):
        program = programs("--traces", collector.url).wait_ready()
    async with program.connected():
        job = await program.start_job(**program.feedback(delay=1))
        await job.values(0)
        # Nothing comes meanwhile.
        await job.values(1, wait_ms=50, held={"rank": 3})
        await job.report((0, 1.0))
        late = await job.refused_values(10_000)
        assert late.reason
        await program.call("GetRun", run="small")
        # What was not sent yet is, when the server ends.
        await stop(program)
    assert collector.paths == {"/v1/traces"}
    (resource,) = {json.dumps(item, sort_keys=True) for item in collector.resources}
    named = json.loads(resource)
    assert (named["service.name"], named["deployment.environment.name"]) == ("lrpilot", "test")
    assert named["service.version"]

    (report,) = collector.called("ReportLosses")
    assert (report.kind, report.parent, report.failed) == (2, "", False)
    assert {key: report.attributes[key] for key in report.attributes if "peer" not in key} == {
        "rpc.system.name": "grpc",
        "rpc.method": "lrpilot.v1.TrainerService/ReportLosses",
        "rpc.response.status_code": "OK",
        "lrpilot.run": "small",
        "lrpilot.attempt": 1,
        "lrpilot.rank": 0,
        "lrpilot.progress": 0,
    }
    assert report.attributes["network.peer.address"] == "127.0.0.1"
    assert report.attributes["network.peer.port"] > 0
    (append,) = collector.of(report, "store.append")
    assert append.trace == report.trace
    assert append.attributes == {"lrpilot.run": "small", "lrpilot.rows": 1, "lrpilot.batch": 1}

    # A long poll is not slow: it says how long it waited.
    (polled,) = [one for one in collector.called("GetValues") if collector.of(one, "wait")]
    (wait,) = collector.of(polled, "wait")
    assert (polled.attributes["lrpilot.progress"], polled.attributes["lrpilot.rank"]) == (1, 3)
    assert 0 < polled.attributes["lrpilot.waited_s"] <= polled.seconds
    assert wait.seconds <= polled.attributes["lrpilot.waited_s"]
    (begun,) = [
        one for one in collector.called("GetValues") if one.attributes["lrpilot.progress"] == 0
    ]
    assert "lrpilot.waited_s" not in begun.attributes

    (refused,) = [one for one in collector.called("GetValues") if "error.type" in one.attributes]
    assert refused.attributes["error.type"] == late.reason
    assert refused.attributes["rpc.response.status_code"] == late.code
    # That is an answer, and no fault of the server.
    assert not refused.failed
    (looked,) = collector.named("lrpilot.v1.RunService/GetRun")
    assert looked.attributes["lrpilot.run"] == "small"


async def test_a_state_that_waits_for_losses_says_so(
    programs: Programs, collector: Collector
) -> None:
    async with programs("--traces", collector.url).wait_ready().connected() as program:
        job = await program.start_job(**program.feedback(delay=4))
        pending = await program.call_refused("SaveState", **job.identity, progress=2, wait_ms=50)
        assert pending.reason == "LossesPending"
        await stop(program)
    (saved,) = collector.called("SaveState")
    (wait,) = collector.of(saved, "wait")
    assert 0 < wait.seconds <= saved.attributes["lrpilot.waited_s"] <= saved.seconds
    assert saved.attributes["error.type"] == "LossesPending"


async def test_a_trace_goes_on_where_the_caller_began_it(
    programs: Programs, collector: Collector, until: Until
) -> None:
    with environment(OTEL_BSP_SCHEDULE_DELAY="50"):
        program = programs("--traces", collector.url).wait_ready()
    async with program.connected():
        stub, request = program._methods["ListRuns"]
        for flags in ("01", "00"):
            metadata = (("traceparent", f"00-{TRACE}-{PARENT}-{flags}"),)
            await stub(request(), metadata=metadata, timeout=DEADLINE_S)
        # One that is no such thing is none.
        await stub(request(), metadata=(("traceparent", "00-zz"),), timeout=DEADLINE_S)
        await until(lambda: len(collector.named("lrpilot.v1.RunService/ListRuns")) == 2)
        await stop(program)
    joined, own = collector.named("lrpilot.v1.RunService/ListRuns")
    assert (joined.trace, joined.parent) == (TRACE, PARENT)
    assert own.trace != TRACE
    assert own.parent == ""


async def test_the_environment_says_what_is_sampled(
    programs: Programs, collector: Collector
) -> None:
    with environment(OTEL_TRACES_SAMPLER="always_off"):
        program = programs("--traces", f"{collector.url}/v1/traces").wait_ready()
    async with program.connected():
        await program.start_job()
        await stop(program)
    assert collector.spans == []


async def test_the_history_that_is_read_again_is_a_part_of_the_call(
    programs: Programs, collector: Collector
) -> None:
    async with programs("--traces", collector.url).wait_ready().connected() as program:
        job = await program.start_job()
        for first in range(0, 9000, 1000):
            await job.report(*((at, 1.0) for at in range(first, first + 1000)))
        await program.open(progress=10)
        await stop(program)
    (recall,) = collector.named("run.recall")
    assert recall.attributes == {"lrpilot.run": "small", "lrpilot.progress": 10}
    opened = collector.called("OpenAttempt")[-1]
    assert (recall.trace, recall.parent) == (opened.trace, opened.id)
    for name in ("run.snapshot", "run.pack"):
        done = collector.named(name)[0]
        assert done.attributes["lrpilot.seq"] > 0
        assert done.trace in {one.trace for one in collector.called("ReportLosses")}


@pytest.mark.parametrize("kind", ["absent", "silent", "failing"])
async def test_a_collector_that_does_not_answer_disturbs_nobody(
    programs: Programs, kind: str, until: Until
) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if kind != "absent":
            # The kernel takes connections; nobody ever answers.
            listener.listen()
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        if kind == "failing":
            # It speaks no HTTP.
            ended = threading.Thread(target=_hang_up, args=(listener,), daemon=True)
            ended.start()
        with environment(
            OTEL_BSP_SCHEDULE_DELAY="10",
            OTEL_BSP_MAX_QUEUE_SIZE="512",
            OTEL_EXPORTER_OTLP_TIMEOUT="1",
        ):
            program = programs("--log-format", "json", "--traces", address).wait_ready()
        async with program.connected():
            job = await program.start_job()
            for at in range(300):
                await job.report((at, 1.0))
                await job.values(at, in_use=at)
            shown = await job.shown()
            assert shown.losses == 300
            await until(lambda: "traces cannot be sent" in program.log())
            # `end` waits for a minute at most: what cannot be sent is given up long before.
            await stop(program)
    lines = [json.loads(line) for line in program.log().splitlines()]
    said = [line for line in lines if "traces cannot be sent" in line["message"]]
    # Once, however many batches there are, and why.
    ((said, why),) = [
        line["message"].split(": ", 1) for line in lines if "traces" in line["message"]
    ]
    assert said == f"traces cannot be sent to {address}/v1/traces"
    assert why
    assert {line["logger"] for line in lines} == {"lrpilot.server"}
    assert lines[-1]["message"] == "stopped"


def _hang_up(listener: socket.socket) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        connection.close()


def run_server(*options: str, before: str) -> subprocess.CompletedProcess[str]:
    """Run the program after a piece of Python, and end it once it serves."""
    program = (
        f"{before}\n"
        "import sys\n"
        "from lrpilot.server.cli import main\n"
        f"sys.argv = ['lrpilot', 'serve', '--store', 'memory://', '--http', '127.0.0.1:0', "
        f"'--listen', '127.0.0.1:0', *{options!r}]\n"
        "main()\n"
    )
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_S,
    )


FORBID = """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'opentelemetry':
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)
sys.meta_path.insert(0, Finder())
"""


def test_without_the_extra_it_says_what_to_install() -> None:
    done = run_server("--traces", "http://127.0.0.1:9", before=FORBID)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "error: --traces needs OpenTelemetry: No module named 'opentelemetry'; "
        "pip install 'lrpilot[telemetry]'\n"
    )


def test_a_variable_that_is_wrong_is_told_at_the_start() -> None:
    with environment(OTEL_BSP_MAX_QUEUE_SIZE="-1"):
        done = run_server("--traces", "http://127.0.0.1:9", before="")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: traces cannot be sent: ValueError: ")
    assert "OTEL_" in done.stderr


def test_a_server_that_is_not_traced_needs_no_extra() -> None:
    ending = (
        "\nimport builtins, os, signal\n"
        "said = builtins.print\n"
        "def last(*words, **options):\n"
        "    said(*words, **options)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "builtins.print = last\n"
    )
    done = run_server(before=FORBID + ending)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("lrpilot ready grpc=")


def test_what_a_request_says_of_itself() -> None:
    from lrpilot.server._rpc import subject_of

    attempt = trainer_pb2.Attempt(number=2)
    opening = trainer_pb2.OpenAttemptRequest(run="a", rank=0)
    assert subject_of(opening) == {"run": "a", "rank": 0}
    opening.progress = 0
    assert subject_of(opening) == {"run": "a", "rank": 0, "progress": 0}
    report = trainer_pb2.ReportLossesRequest(
        run="a", attempt=attempt, rank=1, reports=[trainer_pb2.LossReport(progress=7)]
    )
    assert subject_of(report) == {"run": "a", "attempt": 2, "rank": 1, "progress": 7}
    values = trainer_pb2.GetValuesRequest(run="a", attempt=attempt, begin=9)
    assert subject_of(values) == {"run": "a", "attempt": 2, "progress": 9}
