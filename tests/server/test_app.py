"""The program as it is run: how it starts, what it refuses, and how it ends."""

from __future__ import annotations

import asyncio
import signal
import socket
import urllib.request
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from lrpilot.server._app import ServerConfig, StartupError, serve
from lrpilot.server._sql_store import open_store
from lrpilot.v1 import runs_pb2, runs_pb2_grpc, trainer_pb2, trainer_pb2_grpc

if TYPE_CHECKING:
    from tests.server.conftest import Program, Programs, Until

SERVICES = ("lrpilot.v1.TrainerService", "lrpilot.v1.RunService")
REPEATED = trainer_pb2.REPORT_OUTCOME_REPEATED
RECORDED = trainer_pb2.REPORT_OUTCOME_RECORDED


def metrics(program: Program) -> str:
    with urllib.request.urlopen(f"http://{program.http}/metrics", timeout=60) as answer:
        assert answer.status == 200
        assert answer.headers["Content-Type"].startswith("text/plain")
        text: str = answer.read().decode()
        return text


class TestStart:
    async def test_one_line_says_where_it_serves(self, program: Program) -> None:
        assert (await program.call("ListRuns")).next_page_token == ""
        assert "lrpilot_run_learning_rate" in await asyncio.to_thread(metrics, program)
        assert await asyncio.to_thread(program.end, signal.SIGTERM) == 0
        # `wait_ready` read the only one.
        assert program.further_output() == []
        assert "Traceback" not in program.log()

    def test_metrics_may_be_off(self, programs: Programs, tmp_path: Path) -> None:
        config = tmp_path / "config.yaml"
        config.write_text("listen: localhost:0\nhttp: null\n")
        program = programs("--config", str(config)).wait_ready()
        assert program.grpc.startswith("localhost:")
        assert program.http == "off"
        assert program.end(signal.SIGTERM) == 0

    async def test_beyond_loopback_where_it_is_meant(self, programs: Programs) -> None:
        anywhere = ("--listen", "0.0.0.0:0", "--http", "0.0.0.0:0")
        async with programs(*anywhere, "--insecure").wait_ready().connected() as program:
            assert (await program.attach()).created
            assert await asyncio.to_thread(metrics, program)


class TestRefusedStarts:
    def refused(self, program: Program) -> str:
        """Return what a program that must not start says."""
        assert program.ended() == 1
        assert program.further_output() == []
        text = program.log()
        assert text.startswith("error: ")
        assert "Traceback" not in text
        return text

    async def test_the_same_folder(self, programs: Programs, shared: Program) -> None:
        text = self.refused(programs(data=shared.data))
        assert str(shared.data) in text
        assert "another" in text
        assert await shared.call("ListRuns")

    @pytest.mark.parametrize("option", ["--listen", "--http"])
    async def test_the_same_port(self, programs: Programs, shared: Program, option: str) -> None:
        taken = shared.grpc if option == "--listen" else shared.http
        text = self.refused(programs(option, taken))
        assert text.startswith(f"error: cannot listen on {taken} for ")
        assert "Address already in use" in text
        assert f"another address with {option}" in text

    async def start(self, tmp_path: Path, **options: Any) -> str:
        """Start a server in this process that must not start; return why."""
        fields: dict[str, Any] = {
            "data": tmp_path / "data",
            "listen": "127.0.0.1:0",
            "http": "127.0.0.1:0",
        }
        with pytest.raises(StartupError) as caught:
            # Should it start after all, it must not go on for ever.
            await asyncio.wait_for(serve(ServerConfig(**fields | options)), 30)
        return str(caught.value)

    @pytest.mark.parametrize("option", ["listen", "http"])
    async def test_a_port_that_something_else_holds(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str], option: str
    ) -> None:
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            address = f"127.0.0.1:{other.getsockname()[1]}"
            text = await self.start(tmp_path, **{option: address})
        assert text.startswith(f"cannot listen on {address} for ")
        assert "Address already in use" in text
        assert capfd.readouterr().out == ""
        # The folder is free again.
        open_store(tmp_path / "data").close()

    @pytest.mark.parametrize("option", ["listen", "http"])
    @pytest.mark.parametrize("host", ["0.0.0.0", "[::]"])
    async def test_beyond_loopback(self, tmp_path: Path, option: str, host: str) -> None:
        text = await self.start(tmp_path, **{option: f"{host}:0"})
        assert text.startswith(f"--{option} {host}:0 reaches beyond this machine")
        assert "--insecure" in text
        # Nothing was made before it was refused.
        assert not (tmp_path / "data").exists()

    @pytest.mark.parametrize("option", ["listen", "http"])
    @pytest.mark.parametrize("insecure", [False, True])
    async def test_a_host_that_is_none(self, tmp_path: Path, option: str, insecure: bool) -> None:
        address = "no-such-host.invalid:0"
        text = await self.start(tmp_path, **{option: address, "insecure": insecure})
        assert text.startswith(f"cannot listen on {address}")
        assert f"--{option}" in text

    async def test_a_folder_that_is_a_file(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.touch()
        assert str(path) in await self.start(tmp_path, data=path)

    async def test_a_store_of_an_unknown_kind(self, tmp_path: Path) -> None:
        assert "nonsense" in await self.start(tmp_path, store="nonsense://host/x")


class TestEnd:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    async def test_a_signal_drains(
        self, program: Program, until: Until, number: signal.Signals
    ) -> None:
        job = await program.start_job(**program.feedback())
        await job.report((0, 1.0))
        waiting = asyncio.create_task(job.values(3, blocked=True, wait_ms=30_000))

        async def waits() -> bool:
            text = await asyncio.to_thread(metrics, program)
            return 'lrpilot_run_ranks_waiting{run="small"} 1.0' in text

        await until(waits)
        program.process.send_signal(number)
        answer = await waiting
        assert not answer.HasField("block")
        assert answer.horizon == 3
        assert await asyncio.to_thread(program.ended) == 0
        assert "Traceback" not in program.log()
        assert program.further_output() == []

    async def test_who_watches_its_health_sees_the_end_coming(self, program: Program) -> None:
        async with grpc.aio.insecure_channel(program.grpc) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            watch = stub.Watch(health_pb2.HealthCheckRequest(), timeout=60)
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            program.process.send_signal(signal.SIGTERM)
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            # The server ends the watch itself: it holds nothing up.
            assert await watch.read() is grpc.aio.EOF
            assert await watch.code() is grpc.StatusCode.OK
            assert await asyncio.to_thread(program.ended) == 0

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
    async def test_the_next_server_knows_everything(
        self, programs: Programs, program: Program, number: signal.Signals
    ) -> None:
        job = await program.start_job(**program.feedback(delay=3))
        rates = await job.rates(0)
        await job.report((0, 2.0), (1, 2.0), (2, float("nan")))
        rates += await job.rates(3)
        shown = (await job.shown()).SerializeToString(deterministic=True)
        events = await program.call("ListEvents", run="small")
        await asyncio.to_thread(program.end, number)
        await program.disconnect()

        program.connect(programs().wait_ready().grpc)
        assert (await job.shown()).SerializeToString(deterministic=True) == shown
        assert await program.call("ListEvents", run="small") == events
        assert await job.rates(0) == rates
        assert await job.rates(3) == rates[3:]
        answer = await job.report((1, 2.0), (2, float("nan")), (3, 1.0))
        assert list(answer.outcomes) == [REPEATED, REPEATED, RECORDED]


class TestStandardServices:
    async def test_health(self, shared: Program) -> None:
        async with grpc.aio.insecure_channel(shared.grpc) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            for name in ("", *SERVICES):
                request = health_pb2.HealthCheckRequest(service=name)
                answer = await stub.Check(request, timeout=60)
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Check(health_pb2.HealthCheckRequest(service="x"), timeout=60)
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND

    def test_reflection(self, shared_program: Program) -> None:
        with grpc.insecure_channel(shared_program.grpc) as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            assert set(database.get_services()) == {
                *SERVICES,
                "grpc.health.v1.Health",
                "grpc.reflection.v1alpha.ServerReflection",
            }
            described = database.FindFileContainingSymbol(SERVICES[0])
            assert described.name == "lrpilot/v1/trainer.proto"
            (service,) = described.service
            assert "GetValues" in {method.name for method in service.method}


class TestLoad:
    async def test_five_thousand_calls_at_once_lose_none(self, shared: Program) -> None:
        job = await shared.start_job("many-calls", feedback={"delay": 8})
        expected = await job.values(0)
        options = [("grpc.use_local_subchannel_pool", 1)]
        channels = [grpc.aio.insecure_channel(shared.grpc, options=options) for _ in range(25)]
        values = trainer_pb2.GetValuesRequest(**job.values_fields(0))
        codes: Counter[str] = Counter()

        async def one(number: int) -> None:
            channel = channels[number % len(channels)]
            trainer: Any = trainer_pb2_grpc.TrainerServiceStub(channel)
            runs: Any = runs_pb2_grpc.RunServiceStub(channel)
            try:
                if number % 2:
                    assert await trainer.GetValues(values, timeout=120) == expected
                else:
                    answer = await runs.GetRun(
                        runs_pb2.GetRunRequest(run="many-calls"), timeout=120
                    )
                    assert answer.run.attempt == 1
            except grpc.aio.AioRpcError as error:
                codes[error.code().name] += 1
            else:
                codes["OK"] += 1

        await asyncio.gather(*(one(number) for number in range(5000)))
        for channel in channels:
            await channel.close()
        assert codes == {"OK": 5000}

    async def test_five_thousand_ranks_that_wait_are_woken_by_one_report(
        self, shared: Program, until: Until
    ) -> None:
        job = await shared.start_job("many-ranks", **shared.feedback(delay=1))
        tasks = [
            asyncio.create_task(job.values(1, blocked=True, wait_ms=30_000)) for _ in range(5000)
        ]

        async def all_wait() -> bool:
            text = await asyncio.to_thread(metrics, shared)
            return 'lrpilot_run_ranks_waiting{run="many-ranks"} 5000.0' in text

        await until(all_wait)
        await job.report((0, 1.0))
        answers = await asyncio.gather(*tasks)
        assert {tuple(answer.block.learning_rates) for answer in answers} == {(1e-3,)}

    async def test_a_message_above_a_mebibyte(self, shared: Program) -> None:
        fields = {"run": "small", "request_id": "a"}
        refusal = await shared.refused("AttachRun", spec_document="#" * (1024 * 1024 + 1), **fields)
        assert refusal.code == "RESOURCE_EXHAUSTED"
        # One below is read, and refused for what it says.
        refusal = await shared.refused("AttachRun", spec_document="#" * 1_000_000, **fields)
        assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "InvalidSpec")


async def test_what_happens_is_logged(program: Program) -> None:
    job = await program.start_job(**program.feedback(delay=2, timeout="100ms"))
    await job.report((0, 1.0), (1, 1.0))
    await job.values(4, blocked=True, wait_ms=30_000)
    assert await asyncio.to_thread(program.end, signal.SIGTERM) == 0
    log = program.log()
    assert "run small (attempt 1, progress 0): attempt 1 opened at progress 0" in log
    assert (
        "run small (attempt 1, progress 1): policies.0 (plateau) (act) decided at progress 1, "
        "effective at 3: LR x 0.5 (LR 0.001 -> 0.0005): loss 1: none below" in log
    )
    assert "ranks waited 0.1 s for values from progress 4 on while no loss came" in log
    assert "the missing losses from 2 up to 3 are final as absent" in log
    assert log.rstrip().endswith("stopped")
