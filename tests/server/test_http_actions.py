"""What operators do over HTTP: what it does, what is refused, and to whom."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import pytest

from lrpilot.server._author import caller
from lrpilot.server.web import _api
from lrpilot.server.web._requests import MAX_BODY_BYTES
from tests.http_client import Http, serving

if TYPE_CHECKING:
    from tests.server.conftest import Job, Replica

LR = 1e-3
ADJUST = "/api/runs/small/adjust"
APPROVE = "/api/runs/small/approve"
HALVE = {"scale_lr": 0.5, "reason": "too high"}


@pytest.fixture
async def http(server: Replica) -> AsyncIterator[Http]:
    """A client of the server."""
    async with serving(server) as web:
        yield Http(web.address)


@pytest.fixture
async def small(server: Replica) -> Job:
    """A run that goes."""
    return await server.start_job(**server.feedback())


def adjusted(server: Replica) -> int:
    """Return how many changes of operators are in the log."""
    return sum(b'"adjusted"' in row.payload for row in server.store.read("small"))


async def refused(server: Replica, http: Http, content: Any, **headers: str) -> tuple[int, Any]:
    """Send a change that must be refused; return the status and why."""
    before = server.logs()
    answer = await http.post(ADJUST, content, **headers)
    assert server.logs() == before
    return answer.status, answer.error


class TestAdjust:
    async def test_a_change_takes_effect(self, server: Replica, http: Http, small: Job) -> None:
        answer = await http.post(ADJUST, HALVE | {"request_id": "a"})
        assert answer.status == 200
        made = answer.json
        assert (made["effective"], made["unchanged"], made["pending"]) == (2, False, False)
        assert made["adjustment"]["after"] == [LR / 2]
        assert made["adjustment"]["author"] == caller()
        assert made["adjustment"]["reason"] == "too high"
        assert made["preview"][-1]["before"] == [LR]
        assert made["preview"][-1]["after"] == [LR / 2]
        assert made["run"]["name"] == "small"
        await small.report((0, 1.0), (1, 0.5))
        assert await small.rates(2) == [LR / 2] * 2

    async def test_whoever_acts_may_say_who(self, server: Replica, http: Http, small: Job) -> None:
        answer = await http.post(ADJUST, HALVE | {"request_id": "a", "author": "oncall@lab"})
        assert answer.json["adjustment"]["author"] == "oncall@lab"

    async def test_a_repeat_gets_the_first_answer(
        self, server: Replica, http: Http, small: Job
    ) -> None:
        first = (await http.post(ADJUST, HALVE | {"request_id": "a"})).json
        again = (await http.post(ADJUST, HALVE | {"request_id": "a"})).json
        assert again["adjustment"] == first["adjustment"]
        assert again["effective"] == first["effective"]
        assert adjusted(server) == 1
        # Also at the same moment.
        wanted = HALVE | {"request_id": "b"}
        answers = await asyncio.gather(*(http.post(ADJUST, wanted) for _ in range(4)))
        assert len({answer.json["adjustment"]["id"] for answer in answers}) == 1
        assert adjusted(server) == 2

    async def test_a_dry_run_shows_and_does_nothing(
        self, server: Replica, http: Http, small: Job
    ) -> None:
        before = server.logs()
        shown = (await http.post(ADJUST, HALVE | {"dry_run": True})).json
        assert shown["adjustment"]["after"] == [LR / 2]
        assert len(shown["preview"]) > 100
        assert server.logs() == before

    @pytest.mark.parametrize(
        ("action", "summary"),
        [
            ({"set_lr": 7e-4}, "LR to 0.0007"),
            ({"set_lr": 1}, "LR to 1"),
            ({"scale_weight_decay": 0}, "WD x 0"),
            ({"begin_decay": {"length": "2", "style": "linear"}}, "anneal LR over 2 (linear)"),
            ({"begin_decay": {"length": "2", "style": None}}, "anneal LR over 2 (minus_sqrt)"),
            ({"hold": True, "release": None}, "hold LR and WD"),
            ({"directive": {"kind": "evaluate"}}, "evaluate"),
        ],
    )
    async def test_every_kind_of_field(
        self, http: Http, small: Job, action: dict[str, Any], summary: str
    ) -> None:
        answer = await http.post(ADJUST, {**action, "reason": "r", "dry_run": True})
        assert answer.status == 200, answer.body
        assert summary in answer.json["adjustment"]["summary"]

    async def test_a_longer_run(self, http: Http, small: Job) -> None:
        wanted = {"total": 2000, "reason": "r", "request_id": "a"}
        answer = (await http.post(ADJUST, wanted)).json
        assert answer["adjustment"] is None
        assert {"field": "total", "before": "1000", "after": "2000"} in answer["changes"]


class TestApprove:
    @pytest.fixture
    async def advice(self, server: Replica) -> str:
        """The id of a piece of advice."""
        policies = server.feedback(mode="advise")["policies"]
        feedback = {"delay": 9, "advice_expires": 20}
        job = await server.start_job(policies=policies, feedback=feedback)
        await job.report((0, 2.0), (1, 2.0))
        (advice,) = (await job.shown()).adjustments
        found: str = advice.id
        return found

    async def test_shown_and_approved(self, server: Replica, http: Http, advice: str) -> None:
        shown = (await http.post(APPROVE, {"advice": advice, "dry_run": True})).json
        assert shown["adjustment"]["after"] == [LR / 2]
        assert adjusted(server) == 0
        for _ in range(2):
            wanted = {"advice": advice, "request_id": "a"}
            made = (await http.post(APPROVE, wanted)).json
            assert made["adjustment"]["author"] == caller()
        assert adjusted(server) == 1
        run = await http.read("/api/runs/small")
        assert [item["status"] for item in run["adjustments"]] == ["approved", "planned"]

    async def test_what_is_no_advice(self, http: Http, small: Job) -> None:
        answer = await http.post(APPROVE, {"advice": "x", "request_id": "a"})
        assert (answer.status, answer.error["reason"]) == (404, "AdjustmentNotFound")
        answer = await http.post(APPROVE, {"request_id": "a"})
        assert (answer.status, list(answer.fields)) == (400, ["advice"])


class TestRefused:
    async def test_by_the_run(self, server: Replica, http: Http, small: Job) -> None:
        etag = (await http.read("/api/runs/small"))["etag"]
        await http.post(ADJUST, HALVE | {"request_id": "a", "etag": etag})
        stale = HALVE | {"request_id": "b", "etag": etag}
        status, error = await refused(server, http, stale)
        assert (status, error["reason"]) == (409, "PlanChanged")
        status, error = await refused(server, http, {"undo": "x", "reason": "r", "request_id": "c"})
        assert (status, error["reason"]) == (404, "AdjustmentNotFound")
        release = {"release": True, "reason": "r", "request_id": "d"}
        answer = await http.post(ADJUST, release)
        assert (answer.status, answer.json["unchanged"]) == (200, True)
        await server.call("FinishRun", run="small", force=True, request_id="f")
        status, error = await refused(server, http, HALVE | {"request_id": "e"})
        assert (status, error["reason"]) == (409, "RunFinished")
        answer = await http.post("/api/runs/nobody/adjust", HALVE | {"request_id": "a"})
        assert (answer.status, answer.error["reason"]) == (404, "RunNotFound")

    @pytest.mark.parametrize(
        ("content", "fields"),
        [
            (HALVE, {"request_id": "got nothing; allowed: a non-empty string"}),
            ({"scale_lr": 0.5, "request_id": "a"}, {"reason": None}),
            (HALVE | {"request_id": "a", "author": "  "}, {"author": None}),
            ({"reason": "r", "request_id": "a"}, {"action": None}),
            (HALVE | {"scale_lr": "0.5"}, {"scale_lr": "got '0.5'; allowed: a finite number"}),
            (HALVE | {"scale_lr": True}, {"scale_lr": "got True; allowed: a finite number"}),
            (HALVE | {"scale_lr": 10**400}, {"scale_lr": None}),
            (HALVE | {"scale_lr": -1, "request_id": "a"}, {"scale_lr": None}),
            (HALVE | {"dry_run": 1}, {"dry_run": "got 1; allowed: true or false"}),
            (HALVE | {"etag": 7}, {"etag": "got 7; allowed: a string"}),
            (HALVE | {"reason": "\ud800"}, {"reason": "got '\\ud800'; allowed: a string"}),
            (HALVE | {"set_lr": 1.0}, {"set_lr": "got a field; allowed: nothing beside scale_lr"}),
            (HALVE | {"run": "other"}, {"run": None}),
            (HALVE | {"scaleLr": 1.0, "x": [1]}, {"scaleLr": None, "x": None}),
            ({"total": 1.5}, {"total": f"got 1.5; allowed: {-(2**63)} to {2**63 - 1}"}),
            ({"total": 2**63}, {"total": None}),
            ({"total": "9"}, {"total": None}),
            ({"begin_decay": "10%"}, {"begin_decay": "got '10%'; allowed: an object"}),
            (
                {"begin_decay": {"length": 3, "till": 1}},
                {
                    "begin_decay.length": "got 3; allowed: a string",
                    "begin_decay.till": "got a field; allowed: one of length, style",
                },
            ),
            ([], {"": "got []; allowed: an object"}),
            ("x" * 1000, {"": None}),
            (None, {"": "got None; allowed: an object"}),
        ],
    )
    async def test_a_field_that_is_wrong(
        self,
        server: Replica,
        http: Http,
        small: Job,
        content: Any,
        fields: dict[str, str | None],
    ) -> None:
        status, error = await refused(server, http, content)
        assert (status, error["reason"]) == (400, "InvalidRequest")
        found = {item["field"]: item["text"] for item in error["fields"]}
        assert found.keys() == fields.keys()
        assert len(json.dumps(error)) < 4096
        for name, text in fields.items():
            assert text is None or found[name] == text

    async def test_what_is_no_json(self, server: Replica, http: Http, small: Job) -> None:
        before = server.logs()
        for body in (
            b"",
            b"{",
            b"{'scale_lr': 1}",
            b"\xff\xfe\xff",
            b'{"scale_lr": NaN}',
            b'{"scale_lr": Infinity}',
            b'{"total": ' + b"9" * 5000 + b"}",
            b'{"scale_lr": 0.5, "scale_lr": 2.0}',
            b'{"begin_decay": ' + b"[" * 30_000 + b"]" * 30_000 + b"}",
        ):
            answer = await http.ask("POST", ADJUST, body, Content_Type="application/json")
            assert (answer.status, answer.error["reason"]) == (400, "InvalidRequest")
            assert len(answer.body) < 4096
        overflow = b'{"scale_lr": 1e999, "reason": "r", "request_id": "a"}'
        answer = await http.ask("POST", ADJUST, overflow, Content_Type="application/json")
        assert answer.fields == {"scale_lr": "got inf; allowed: a finite number"}
        assert server.logs() == before

    async def test_a_thousand_wrong_fields(self, server: Replica, http: Http, small: Job) -> None:
        status, error = await refused(server, http, {f"{'x' * 50}{n}": 1 for n in range(1000)})
        assert status == 400
        assert 0 < len(error["fields"]) <= 20

    async def test_a_body_that_is_too_large(self, server: Replica, http: Http, small: Job) -> None:
        room = MAX_BODY_BYTES - len(json.dumps({"reason": ""}))
        status, error = await refused(server, http, {"reason": "x" * (room + 1)})
        assert (status, error["reason"]) == (413, "BodyTooLarge")
        status, error = await refused(server, http, {"reason": "x" * room})
        assert (status, error["reason"]) == (400, "InvalidRequest")

    async def test_a_body_that_never_comes(
        self, server: Replica, http: Http, small: Job, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_api, "ANSWER_S", 0.05)
        host, _, port = http.address.rpartition(":")
        head = (
            f"POST {ADJUST} HTTP/1.1\r\nHost: {http.address}\r\n"
            "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        )
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(head.encode())
        answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
        assert answer.startswith(b"HTTP/1.1 504 ")
        writer.close()
        # Who gives up half way leaves nothing behind either.
        monkeypatch.setattr(_api, "ANSWER_S", 60.0)
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(head.encode())
        await writer.drain()
        writer.close()
        assert adjusted(server) == 0
        assert (await http.get("/live")).status == 200

    async def test_once_the_server_is_about_to_end(self, server: Replica, small: Job) -> None:
        async with serving(server) as web:
            http = Http(web.address)
            web.drain()
            status, error = await refused(server, http, HALVE | {"request_id": "a"})
            assert (status, error["reason"]) == (503, "Draining")
            assert (await http.get("/metrics")).status == 200


class TestWhoMayAct:
    """No page of another site, and nobody from elsewhere."""

    @pytest.mark.parametrize(
        "headers",
        [
            {"Origin": "https://evil.example"},
            {"Origin": "null"},
            {"Origin": "http://127.0.0.1:1"},
            {"Sec_Fetch_Site": "cross-site"},
            {"Sec_Fetch_Site": "same-site"},
        ],
    )
    async def test_no_page_of_another_site(
        self, server: Replica, http: Http, small: Job, headers: dict[str, str]
    ) -> None:
        for more in ({"request_id": "a"}, {"dry_run": True}):
            status, error = await refused(server, http, HALVE | more, **headers)
            assert (status, error["reason"]) == (403, "Foreign")

    @pytest.mark.parametrize(
        "media_type",
        ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "json"],
    )
    async def test_no_form(self, server: Replica, http: Http, small: Job, media_type: str) -> None:
        wanted = HALVE | {"request_id": "a"}
        status, error = await refused(server, http, wanted, Content_Type=media_type)
        assert (status, error["reason"]) == (415, "UnsupportedMediaType")

    async def test_no_name_that_was_made_to_lead_here(
        self, server: Replica, http: Http, small: Job
    ) -> None:
        wanted = HALVE | {"request_id": "a"}
        host = f"evil.example:{http.address.rpartition(':')[2]}"
        origin = f"http://{host}"
        status, error = await refused(server, http, wanted, Host=host, Origin=origin)
        assert (status, error["reason"]) == (421, "Misdirected")

    async def test_the_page_itself(self, server: Replica, http: Http, small: Job) -> None:
        ways = (http.address, "localhost:8080", "[::1]:1")
        for number, host in enumerate(ways):
            wanted = HALVE | {"request_id": str(number)}
            answer = await http.post(
                ADJUST,
                wanted,
                Host=host,
                Origin=f"http://{host}",
                Sec_Fetch_Site="same-origin",
                Content_Type="application/json; charset=utf-8",
            )
            assert answer.status == 200, answer.body
        assert adjusted(server) == 3

    @pytest.mark.parametrize(
        "header", ["Forwarded", "Via", "X_Forwarded_For", "X_Forwarded_Host", "X_Real_IP"]
    )
    async def test_nobody_who_comes_through_a_proxy(
        self, server: Replica, http: Http, small: Job, header: str
    ) -> None:
        status, error = await refused(
            server, http, HALVE | {"request_id": "a"}, **{header: "10.0.0.1"}
        )
        assert (status, error["reason"]) == (403, "ReadOnly")
        assert "proxy" in error["message"]
        found = (await http.get("/api/server", **{header: "10.0.0.1"})).json
        assert (found["read_only"], found["why_read_only"]) == (True, error["message"])

    async def test_beyond_loopback_one_may_look_only(self, server: Replica, small: Job) -> None:
        for address in ("0.0.0.0:0", "[::]:0"):
            async with serving(server, address) as web:
                port = web.address.rpartition(":")[2]
                http = Http(f"127.0.0.1:{port}")
                found = await http.read("/api/server")
                assert found["read_only"]
                for host in (http.address, "lrpilot.example"):
                    wanted = HALVE | {"request_id": "a"}
                    status, error = await refused(server, http, wanted, Host=host)
                    assert (status, error["reason"]) == (403, "ReadOnly")
                    assert error["message"] == found["why_read_only"]
                shown = await http.post(ADJUST, HALVE | {"dry_run": True})
                assert shown.json["adjustment"]["after"] == [LR / 2]
                approve = await http.post(APPROVE, {"advice": "x", "request_id": "a"})
                assert (approve.status, approve.error["reason"]) == (403, "ReadOnly")
        assert adjusted(server) == 0
