"""The command line in process, and a server that answers what a test tells it to."""

from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message
from typer.testing import CliRunner, Result

from lrpilot.server.cli._main import app
from lrpilot.v1 import errors_pb2, runs_pb2

Cli = Callable[..., Result]

SPEC = """
name: small
total: 1000
learning_rate: {peak: 2e-4, min: 1e-5, warmup: 100, decay: {style: cosine}}
weight_decay: {start: 0.01, end: 0.1, style: linear}
"""

GROUPED = """
name: grouped
total: 1000
learning_rate: {peak: 2e-4, min: 1e-5, warmup: 100, decay: {style: wsd, anneal: 200,
  anneal_style: minus_sqrt}}
weight_decay: 0.1
groups:
  - {name: no_decay, weight_decay_multiplier: 0.0}
  - {name: embedding, peak: 1e-4}
"""

STAGED = """
name: staged
unit: tokens
total: 1000
stages:
  - {name: first, until: 600, learning_rate: {peak: 2e-4}}
  - {name: second, learning_rate: {peak: 1e-4, init: current, warmup: 50, decay: {style: linear}}}
"""


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run `lrpilot` with arguments; nothing but SystemExit may come out of it."""
    monkeypatch.delenv("LRPILOT_SERVER", raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    runner = CliRunner()

    def run(*args: str, input: str | bytes | None = None) -> Result:  # noqa: A002
        return runner.invoke(
            app, list(args), input=input, prog_name="lrpilot", catch_exceptions=False
        )

    return run


@dataclass(frozen=True)
class Specs:
    """Texts of specs that tests share."""

    plain: str = SPEC
    grouped: str = GROUPED
    staged: str = STAGED


@pytest.fixture
def specs() -> Specs:
    """The texts of three specs: plain, with groups, with stages."""
    return Specs()


@pytest.fixture
def spec_file(tmp_path: Path) -> Callable[..., str]:
    """Write a spec to a file and return its path."""

    def write(text: str = SPEC, name: str = "spec.yaml") -> str:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


class RefusalError(Exception):
    """What a scripted method raises to refuse a call the way the server does."""

    def __init__(
        self,
        code: grpc.StatusCode,
        reason: str,
        message: str,
        violations: Mapping[str, str] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        status = errors_pb2.Status(code=code.value[0], message=message)
        info = errors_pb2.ErrorInfo(reason=reason, domain="lrpilot", metadata=metadata or {})
        details: list[Message] = [info]
        if violations is not None:
            bad = errors_pb2.BadRequest()
            for name, description in violations.items():
                bad.field_violations.add(field=name, description=description)
            details.append(bad)
        for detail in details:
            url = f"type.googleapis.com/google.rpc.{type(detail).__name__}"
            status.details.append(AnyMessage(type_url=url, value=detail.SerializeToString()))
        self.packed = status.SerializeToString()


@dataclass
class FakeServer:
    """Answers each method of RunService with what the test put under its name."""

    address: str = ""
    answers: dict[str, Callable[[Any], Any]] = field(default_factory=dict)
    """Method to what answers a request; a stream is taken and given as a list of its parts."""
    requests: list[Any] = field(default_factory=list)
    deadlines_s: list[float | None] = field(default_factory=list)
    """What was left as each call came; gRPC may round a deadline of minutes up by a second."""
    details_key: str = "grpc-status-details-bin"

    def refuse(self, method: str, *args: Any, **kwargs: Any) -> None:
        """Refuse every call of a method; the arguments are those of RefusalError."""

        def refused(_: Message) -> Message:
            raise RefusalError(*args, **kwargs)

        self.answers[method] = refused

    def serve(self, method: str, request: Any, context: grpc.ServicerContext) -> Any:
        if not isinstance(request, Message):
            request = list(request)
        self.requests.append(request)
        self.deadlines_s.append(context.time_remaining())
        try:
            return self.answers[method](request)
        except RefusalError as refusal:
            context.set_trailing_metadata(((self.details_key, refusal.packed),))
            context.abort(refusal.code, str(refusal))
            raise


@pytest.fixture
def server() -> Iterator[FakeServer]:
    """A scripted server on a port that the kernel picks."""
    fake = FakeServer()
    service = runs_pb2.DESCRIPTOR.services_by_name["RunService"]
    handlers = {}
    for method in service.methods:
        request_class = getattr(runs_pb2, method.input_type.name)
        kind = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
        }[method.client_streaming, method.server_streaming]
        handlers[method.name] = kind(
            lambda request, context, name=method.name: fake.serve(name, request, context),
            request_deserializer=request_class.FromString,
            response_serializer=lambda answer: answer.SerializeToString(),
        )
    grpc_server = grpc.server(
        futures.ThreadPoolExecutor(max_workers=2), options=(("grpc.so_reuseport", 0),)
    )
    grpc_server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(service.full_name, handlers),)
    )
    port = grpc_server.add_insecure_port("127.0.0.1:0")
    grpc_server.start()
    fake.address = f"127.0.0.1:{port}"
    yield fake
    grpc_server.stop(None).wait()
