"""Histories: what is written comes back, and a file that SIGKILL cut short is still read."""

from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest

from lrpilot.v1 import trainer_pb2
from lrpilot.v1.trainer_pb2_grpc import (
    TrainerServiceServicer,
    TrainerServiceStub,
    add_TrainerServiceServicer_to_server,
)
from tests.crash.history import (
    HistoryWriter,
    read_history,
    recorded_channels,
    request_of,
    response_of,
)

DEADLINE_S = 30.0


_Servicer: Any = TrainerServiceServicer


class _Server(_Servicer):  # type: ignore[misc]
    """Answers values, and refuses reports."""

    def GetValues(self, request: Any, context: Any) -> Any:  # noqa: N802
        return trainer_pb2.GetValuesResponse(horizon=request.begin + 1)

    def ReportLosses(self, request: Any, context: Any) -> Any:  # noqa: N802
        context.abort(grpc.StatusCode.ALREADY_EXISTS, "another loss")


def test_everything_written_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "r0.0"
    with HistoryWriter(path, "r0.0") as history:
        call = history.call("GetValues", "a:1", trainer_pb2.GetValuesRequest(begin=7))
        history.answer(call, trainer_pb2.GetValuesResponse(horizon=9))
        history.used("run", 1, 7, [0.1], [0.5])
        history.used("run", 1, 8, [0.1, 0.2], None)
        history.stall(1.5, 8)
        history.fault("kill", "server", "begin")
    history.stall(9.0, 9)
    records = read_history(path)
    assert [record["what"] for record in records] == [
        *("call", "answer", "used", "used", "stall", "fault")
    ]
    assert {record["who"] for record in records} == {"r0.0"}
    times = [record["t"] for record in records]
    assert times == sorted(times)
    assert request_of(records[0]).begin == 7
    assert response_of(records[0], records[1]).horizon == 9
    assert records[2]["learning_rates"] == [(0.1).hex()]
    assert records[3]["weight_decays"] is None


def test_half_a_line_at_the_end_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "r0.0"
    with HistoryWriter(path, "r0.0") as history:
        history.stall(1.0, 1)
        history.stall(2.0, 2)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    assert [record["seconds"] for record in read_history(path)] == [1.0]
    path.write_bytes(b"{half\n" + whole)
    with pytest.raises(ValueError, match=r"r0\.0:1: not a line"):
        read_history(path)


def test_channels_write_calls_answers_and_errors(tmp_path: Path) -> None:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    add_TrainerServiceServicer_to_server(_Server(), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    path = tmp_path / "r0.0"
    make = grpc.insecure_channel
    with HistoryWriter(path, "r0.0") as history:
        with recorded_channels(history), grpc.insecure_channel(address) as channel:
            stub: Any = TrainerServiceStub(channel)
            request = trainer_pb2.GetValuesRequest(begin=3)
            assert stub.GetValues(request, timeout=DEADLINE_S).horizon == 4
            future = stub.GetValues.future(request, timeout=DEADLINE_S)
            assert future.result().horizon == 4
            with pytest.raises(grpc.RpcError):
                stub.ReportLosses(trainer_pb2.ReportLossesRequest(), timeout=DEADLINE_S)
            refused = stub.ReportLosses.future(
                trainer_pb2.ReportLossesRequest(), timeout=DEADLINE_S
            )
            assert refused.exception() is not None
        assert grpc.insecure_channel is make
    server.stop(None).wait()
    records = read_history(path)
    ends = {record["call"]: record for record in records if record["what"] in {"answer", "error"}}
    calls = [record for record in records if record["what"] == "call"]
    assert [record["method"] for record in calls] == [
        *("GetValues", "GetValues", "ReportLosses", "ReportLosses")
    ]
    assert {record["server"] for record in calls} == {address}
    for call in calls[:2]:
        assert response_of(call, ends[call["call"]]).horizon == 4
    for call in calls[2:]:
        assert ends[call["call"]]["code"] == "ALREADY_EXISTS"
        assert ends[call["call"]]["details"] == "another loss"
