"""How errors leave the server: the catalogue, what is cut, and what is nobody's business."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import pytest

from lrpilot import core
from lrpilot.client._errors import error_class
from lrpilot.server import _errors, _rpc
from lrpilot.server._store import StoreUnavailable
from lrpilot.v1 import errors_pb2, runs_pb2, runs_pb2_grpc

if TYPE_CHECKING:
    from tests.server.conftest import Replica, Until


def leaves(cls: type[core.LrpilotError]) -> set[type[core.LrpilotError]]:
    below = cls.__subclasses__()
    return {leaf for sub in below for leaf in leaves(sub)} if below else {cls}


def build(cls: type[core.LrpilotError], text: str = "what went wrong") -> core.LrpilotError:
    if issubclass(cls, core.InvalidFields):
        return cls(text, [core.Violation("a.b", "'x'", "y or z")])
    return cls(text, run="small", horizon=7)


def unpacked(packed: bytes) -> tuple[errors_pb2.Status, errors_pb2.ErrorInfo, dict[str, str]]:
    status = errors_pb2.Status.FromString(packed)
    info = errors_pb2.ErrorInfo.FromString(status.details[0].value)
    fields = {}
    for detail in status.details[1:]:
        for item in errors_pb2.BadRequest.FromString(detail.value).field_violations:
            fields[item.field] = item.description
    return status, info, fields


def test_every_error_that_a_request_can_meet_has_a_code() -> None:
    assert set(_errors.CATALOGUE) == leaves(core.LrpilotError)
    assert len(_errors.CATALOGUE) > 15


def test_the_client_has_a_class_of_each_name() -> None:
    """It may not import the core, and raises errors by the names that come over the wire."""
    assert [cls.__name__ for cls in _errors.CATALOGUE if error_class(cls.__name__) is None] == []


@pytest.mark.parametrize("cls", list(_errors.CATALOGUE))
def test_what_leaves_of_each_error(cls: type[core.LrpilotError]) -> None:
    error = build(cls)
    code, text, packed = _errors.details(error)
    status, info, fields = unpacked(packed)
    assert code is _errors.CATALOGUE[cls]
    assert code not in {grpc.StatusCode.OK, grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL}
    assert text == str(error)
    assert (status.code, status.message) == (code.value[0], str(error))
    assert (info.reason, info.domain) == (cls.__name__, "lrpilot")
    if issubclass(cls, core.InvalidFields):
        assert fields == {"a.b": "got 'x'; allowed: y or z"}
        assert dict(info.metadata) == {}
    else:
        assert dict(info.metadata) == {"run": "small", "horizon": "7"}


@pytest.mark.parametrize("sign", ["x", "é", "層", "🧨", "%", "\n", "\x00"])
@pytest.mark.parametrize("length", [1, 199, 200, 201, 2000, 100_000])
def test_what_does_not_fit_is_cut(sign: str, length: int) -> None:
    long = sign * length
    error = core.LossConflict(long, run=long, recorded=long, got=long, progress=long)
    violations = [core.Violation(long, long, long) for _ in range(50)]
    for each in (error, core.InvalidSpec(long, violations)):
        _, text, packed = _errors.details(each)
        assert _errors._percent_encoded(text) <= _errors.MAX_TEXT
        assert len(packed) <= _errors.MAX_DETAILS
        if text != str(each):
            assert text.endswith(" …")
            assert str(each).startswith(text.removesuffix(" …"))
            # No more is cut than must be.
            assert _errors._percent_encoded(text) > _errors.MAX_TEXT - 20


@pytest.mark.parametrize(("text", "size"), [("az ~", 4), ("%", 3), ("\n", 3), ("é", 6), ("層", 9)])
def test_bytes_on_the_wire(text: str, size: int) -> None:
    assert _errors._percent_encoded(text) == size


class TestTranslation:
    """One method whose behaviour raises what a test wants."""

    @pytest.fixture
    async def outcome(self) -> Any:
        descriptor = runs_pb2.DESCRIPTOR.services_by_name["RunService"]
        observed: list[tuple[str, str]] = []
        failure: list[BaseException] = []

        async def behaviour(request: Any) -> Any:
            if failure:
                raise failure[0]
            return runs_pb2.GetRunResponse(run=runs_pb2.Run(name=request.run))

        service = SimpleNamespace(
            behaviours=dict.fromkeys((method.name for method in descriptor.methods), behaviour),
            requests={
                method.input_type.name: getattr(runs_pb2, method.input_type.name)
                for method in descriptor.methods
            },
        )

        class Observer:
            def call_finished(self, method: str, code: str, seconds: float) -> None:
                assert seconds >= 0
                observed.append((method, code))

        server = grpc.aio.server()
        server.add_generic_rpc_handlers((_rpc.handlers(descriptor, service, Observer()),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub: Any = runs_pb2_grpc.RunServiceStub(channel)

            async def call(error: BaseException | None = None) -> tuple[str, str, bool]:
                failure[:] = [] if error is None else [error]
                try:
                    await stub.GetRun(runs_pb2.GetRunRequest(run="a"), timeout=30)
                except grpc.aio.AioRpcError as refused:
                    keys = [key for key, _ in refused.trailing_metadata() or ()]
                    return refused.code().name, refused.details(), _errors.DETAILS_KEY in keys
                return "OK", "", False

            yield call, observed
        await server.stop(None)

    async def test_an_answer(self, outcome: Any) -> None:
        call, observed = outcome
        assert await call() == ("OK", "", False)
        assert observed == [("GetRun", "OK")]

    async def test_an_error_of_the_catalogue(self, outcome: Any) -> None:
        call, observed = outcome
        got = await call(core.RunNotFound("no run is named 'a'", run="a"))
        assert got == ("NOT_FOUND", "no run is named 'a'", True)
        assert observed == [("GetRun", "NOT_FOUND")]

    async def test_a_store_that_fails(self, outcome: Any, caplog: pytest.LogCaptureFixture) -> None:
        call, observed = outcome
        caplog.set_level(logging.DEBUG, "lrpilot.server")
        code, text, detailed = await call(StoreUnavailable("disk full", "disk_full"))
        assert (code, detailed) == ("UNAVAILABLE", True)
        assert "disk full" in text
        assert observed == [("GetRun", "UNAVAILABLE")]
        assert "GetRun: disk full" in caplog.text

    @pytest.mark.parametrize(
        "error", [KeyError("secret"), RuntimeError("secret"), AssertionError("secret")]
    )
    async def test_a_fault_of_ours_says_nothing(
        self, outcome: Any, error: Exception, caplog: pytest.LogCaptureFixture
    ) -> None:
        call, observed = outcome
        with caplog.at_level(logging.ERROR, "lrpilot.server"):
            got = await call(error)
        assert got == ("INTERNAL", "internal error; the server's log has more", False)
        assert observed == [("GetRun", "INTERNAL")]
        assert "GetRun failed" in caplog.text
        assert "secret" in caplog.text

    async def test_an_error_without_a_code_says_nothing_either(self, outcome: Any) -> None:
        call, observed = outcome
        got = await call(core.LrpilotError("secret"))
        assert got == ("INTERNAL", "internal error; the server's log has more", False)
        assert observed == [("GetRun", "INTERNAL")]


async def test_a_caller_who_leaves_is_counted_as_such(server: Replica, until: Until) -> None:
    job = await server.start_job(**server.feedback())
    task = asyncio.create_task(job.values(2, blocked=True, wait_ms=30_000))
    await until(lambda: server.live().ranks_waiting)
    task.cancel()
    labels = {"method": "GetValues", "code": "CANCELLED"}
    read = server.metrics.registry.get_sample_value

    async def counted() -> bool:
        # On a thread, as a scrape: it asks this event loop for the runs.
        return await asyncio.to_thread(read, "lrpilot_rpc_calls_total", labels) == 1

    await until(counted)
