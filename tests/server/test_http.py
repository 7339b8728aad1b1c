"""What is to be read over HTTP: the page, the runs as JSON, and what is refused to whom."""

from __future__ import annotations

import asyncio
import gzip
import math
import socket
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from google.protobuf.json_format import MessageToDict
from google.protobuf.timestamp_pb2 import Timestamp
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from lrpilot.server._store import StoreUnavailable
from lrpilot.server.web import _api, _http, _rows
from lrpilot.v1 import trainer_pb2
from tests.http_client import Answer, Http, serving

if TYPE_CHECKING:
    from lrpilot.server._live_run import LiveRun
    from tests.server.conftest import Job, Replica

STATIC = "app.js"
JSON_PATHS = [
    "/api/server",
    "/api/runs",
    "/api/runs/small",
    "/api/runs/small/curves",
    "/api/runs/small/events",
    "/api/runs/small/specs",
]
STREAMS = ["/api/stream", "/api/runs/small/stream"]
PATHS = ["/", "/runs/small", f"/static/{STATIC}", "/metrics", *JSON_PATHS]
PROBES = ["/live", "/ready"]


WAYS = [
    "localhost",
    "localhost:8080",
    "LOCALHOST:1",
    "localhost.:80",
    "127.0.0.1",
    "127.0.0.1:50052",
    "127.8.9.10:1",
    "[::1]",
    "[::1]:8080",
]
"""Hosts by which people ask for what listens on loopback."""

OTHERS = [
    "evil.example",
    "evil.example:50052",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "10.0.0.1",
    "0.0.0.0:50052",
    "[::2]",
    "127.0.0.1@evil.example",
    "localhost:80:80",
    "localhost/x",
    "[::1",
    "",
]
"""Hosts that pages of other sites, or of other machines, have."""


@pytest.fixture
async def http(server: Replica) -> AsyncIterator[Http]:
    """A client of the server."""
    async with serving(server) as web:
        yield Http(web.address)


@pytest.fixture
async def small(server: Replica) -> Job:
    """A run that goes."""
    job = await server.start_job(**server.feedback(delay=3))
    await job.values(0, in_use=1)
    await job.report((0, 2.0), (1, 3.0), (2, math.inf), (3, math.nan), (4, 1.0))
    return job


def plain(message: Any) -> Any:
    """Return a message as the JSON of protobuf has it, with the names of the proto files."""
    return MessageToDict(message, preserving_proto_field_name=True)


def hold_to(found: Any, expected: Any) -> None:
    """Check that our JSON says what that of protobuf says, which leaves out what is zero."""
    if isinstance(expected, dict):
        assert expected.keys() <= found.keys()
        for name, value in found.items():
            if name in expected:
                hold_to(value, expected[name])
            else:
                assert not value, name
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            hold_to(one, other)
    elif expected in {"NaN", "Infinity", "-Infinity"}:
        assert found == {"NaN": "nan", "Infinity": "inf", "-Infinity": "-inf"}[expected]
    elif isinstance(expected, str) and isinstance(found, int):
        # Protobuf writes 64-bit integers as strings.
        assert found == int(expected)
    elif isinstance(expected, str) and expected.startswith("RUN_STATE_"):
        assert found == expected.removeprefix("RUN_STATE_").lower()
    else:
        assert found == expected


class TestRuns:
    async def test_one(self, server: Replica, http: Http, small: Job) -> None:
        found = await http.read("/api/runs/small")
        expected = await small.shown()
        # How long ago a rank asked is never the same twice.
        found.pop("ranks")
        expected.ClearField("ranks")
        hold_to(found, plain(expected))
        assert found["state"] == "running"
        assert found["seq"] == expected.seq
        # What is not there is null, what is zero is a number.
        assert (found["declaration"], found["waivers"], found["held"]) == (None, 0, False)
        assert found["created_at"].endswith("Z")
        assert found["loss"] == 1.0
        assert yaml.safe_load(found["spec_document"])["name"] == "small"
        assert [item["summary"] for item in found["adjustments"]] == ["LR x 0.5"]

    async def test_losses_that_are_no_numbers(self, http: Http, small: Job) -> None:
        curves = await http.read("/api/runs/small/curves")
        (attempt,) = curves["losses"]
        assert attempt["loss"] == {
            "progress": [0, 1, 2, 3, 4],
            "value": [2.0, 3.0, "inf", "nan", 1.0],
        }
        await small.report((5, -math.inf))
        assert (await http.read("/api/runs/small"))["loss"] == "-inf"
        (row,) = (await http.read("/api/runs"))["runs"]
        assert row["loss"] == "-inf"

    async def test_curves(self, server: Replica, http: Http, small: Job) -> None:
        for query, asked in (
            ("", {}),
            ("?begin=1&end=300&points=20", {"begin": 1, "end": 300, "points": 20}),
        ):
            found = await http.read(f"/api/runs/small/curves{query}")
            expected = await server.call("GetCurves", run="small", **asked)
            hold_to(found, plain(expected))
            assert found["progress"] == 5

    async def test_curves_of_chosen_groups(self, server: Replica, http: Http) -> None:
        names = ["a", "b & c", "ü/%"]
        await server.start_job(groups=[{"name": name} for name in names])
        found = await http.read("/api/runs/small/curves?group=%C3%BC%2F%25&group=b+%26+c")
        assert [item["name"] for item in found["groups"]] == ["ü/%", "b & c"]

    async def test_events(self, server: Replica, http: Http, small: Job) -> None:
        path = "/api/runs/small/events"
        hold_to(await http.read(path), plain(await server.call("ListEvents", run="small")))
        found = await http.read(f"{path}?newest_first=1&notable=true&page_size=2")
        asked = {"newest_first": True, "notable": True, "page_size": 2}
        expected = await server.call("ListEvents", run="small", **asked)
        hold_to(found, plain(expected))
        more = await http.read(f"{path}?page_size=1&page_token=1")
        assert [item["seq"] for item in more["events"]] == [2]

    async def test_the_list(self, server: Replica, http: Http, small: Job) -> None:
        await server.attach("b")
        listed = await http.read("/api/runs")
        assert listed["next_page_token"] == ""
        b, row = listed["runs"]
        assert (b["name"], b["state"], b["spark"]) == ("b", "created", [])
        one = await http.read("/api/runs/small")
        for fields in (row, one):
            fields.pop("ranks")
        assert one.keys() - row.keys() == {"spec_document", "adjustments"}
        assert row.keys() - one.keys() == {"pending_advice", "spark"}
        assert {name: row[name] for name in one.keys() & row.keys()} == {
            name: one[name] for name in one.keys() & row.keys()
        }
        assert row["spark"] == [[0, 2.0], [1, 3.0], [2, "inf"], [3, "nan"], [4, 1.0]]
        # Two policies watch every run, and advise on what is not finite.
        pending = [item for item in one["adjustments"] if item["status"] == "advice"]
        assert row["pending_advice"] == len(pending)

    async def test_the_list_in_pages(self, server: Replica, http: Http) -> None:
        for name in ("a", "b", "c"):
            await server.attach(name)
        page = await http.read("/api/runs?page_size=2")
        assert [row["name"] for row in page["runs"]] == ["a", "b"]
        page = await http.read(f"/api/runs?page_size=2&page_token={page['next_page_token']}")
        assert [row["name"] for row in page["runs"]] == ["c"]
        assert page["next_page_token"] == ""

    async def test_advice_that_can_be_approved_is_counted(
        self, server: Replica, http: Http
    ) -> None:
        policies = server.feedback(mode="advise")["policies"]
        feedback = {"delay": 9, "advice_expires": 20}
        job = await server.start_job(policies=policies, feedback=feedback)
        await job.report((0, 2.0), (1, 2.0))
        (row,) = (await http.read("/api/runs"))["runs"]
        assert row["pending_advice"] == 1

    async def test_one_that_cannot_be_read(
        self, server: Replica, http: Http, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("a", "b"):
            await server.attach(name)
        find, run = server.ledger.find, server.ledger.run

        async def broken(name: str, real: Any) -> LiveRun:
            if name == "a":
                raise ZeroDivisionError
            found: LiveRun = await real(name)
            return found

        monkeypatch.setattr(server.ledger, "find", lambda name: broken(name, find))
        monkeypatch.setattr(server.ledger, "run", lambda name: broken(name, run))
        a, b = (await http.read("/api/runs"))["runs"]
        assert (a["name"], a["state"], a["spark"]) == ("a", "unreadable", None)
        assert (b["name"], b["state"]) == ("b", "created")
        for path in ("", "/curves", "/events", "/specs", "/stream"):
            answer = await http.get(f"/api/runs/a{path}")
            assert (answer.status, answer.error["reason"]) == (500, "RunUnreadable")
            assert "'a'" in answer.error["message"]


class TestSparklines:
    async def drawn(self, server: Replica, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Return a list that gets the name of each run whose curves are asked for."""
        drawn: list[str] = []
        get_curves = server.server.runs.get_curves

        async def counted(request: Any) -> Any:
            drawn.append(request.run)
            return await get_curves(request)

        monkeypatch.setattr(server.server.runs, "get_curves", counted)
        return drawn

    async def test_only_what_changed_is_drawn_anew_and_that_not_at_once(
        self, server: Replica, http: Http, small: Job, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await server.attach("b")
        drawn = await self.drawn(server, monkeypatch)
        monkeypatch.setattr(_rows, "SPARK_S", 3600.0)
        await http.read("/api/runs")
        assert sorted(drawn) == ["b", "small"]
        drawn.clear()
        await small.report((5, 4.0))
        _, row = (await http.read("/api/runs"))["runs"]
        assert (row["frontier"], row["spark"][-1]) == (6, [4, 1.0])
        assert drawn == []

    async def test_in_time_it_is(
        self, server: Replica, http: Http, small: Job, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await server.attach("b")
        drawn = await self.drawn(server, monkeypatch)
        monkeypatch.setattr(_rows, "SPARK_S", 0.0)
        monkeypatch.setattr(_rows, "BUSY", math.inf)
        await http.read("/api/runs")
        drawn.clear()
        await small.report((5, 4.0))
        _, row = (await http.read("/api/runs"))["runs"]
        assert row["spark"][-1] == [5, 4.0]
        assert drawn == ["small"]

    async def test_a_list_does_not_wait_for_slow_ones(
        self, server: Replica, http: Http, small: Job, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        get_curves = server.server.runs.get_curves
        goes_on = asyncio.Event()
        begun = 0

        async def slow(request: Any) -> Any:
            nonlocal begun
            begun += 1
            await goes_on.wait()
            return await get_curves(request)

        monkeypatch.setattr(server.server.runs, "get_curves", slow)
        monkeypatch.setattr(_rows, "SPARKS_S", 0.01)
        for _ in range(2):
            (row,) = (await http.read("/api/runs"))["runs"]
            assert row["spark"] is None
        goes_on.set()
        monkeypatch.setattr(_rows, "SPARKS_S", 60.0)
        (row,) = (await http.read("/api/runs"))["runs"]
        assert row["spark"][0] == [0, 2.0]
        # It was asked for three times, and drawn once.
        assert begun == 1

    async def test_one_that_fails_hides_nothing(
        self, server: Replica, http: Http, small: Job, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def broken(request: Any) -> Any:
            raise ZeroDivisionError

        monkeypatch.setattr(server.server.runs, "get_curves", broken)
        (row,) = (await http.read("/api/runs"))["runs"]
        assert (row["name"], row["spark"]) == ("small", None)

    async def test_what_an_attempt_forgot_is_left_out(self, server: Replica, http: Http) -> None:
        job = await server.start_job(**server.feedback())
        await job.report((0, 4.0), (1, 3.0), (2, 9.0))
        again = await server.open(progress=2)
        await again.report((2, 2.0))
        (row,) = (await http.read("/api/runs"))["runs"]
        assert row["spark"] == [[0, 4.0], [1, 3.0], [2, 2.0]]


class TestSpecs:
    async def test_what_each_one_changed_and_why(
        self, server: Replica, http: Http, small: Job
    ) -> None:
        signed = {"author": "oncall@lab", "reason": "longer", "request_id": "r"}
        document = server.document(total=2000, **server.feedback(delay=3))
        await server.call("ReviseRun", run="small", spec_document=document, **signed)
        found = await http.read("/api/runs/small/specs")
        assert found.keys() == {"specs", "left_out", "pending"}
        first, second = found["specs"]
        assert (first["seq"], first["effective"], first["changes"]) == (1, 0, [])
        assert first["recorded_at"] == (await http.read("/api/runs/small"))["created_at"]
        assert {"field": "total", "before": "1000", "after": "2000"} in second["changes"]
        assert (second["author"], second["reason"]) == ("oncall@lab", "longer")
        assert second["effective"] == (await http.read("/api/runs/small"))["horizon"] == 8
        assert yaml.safe_load(second["spec_document"])["total"] == 2000
        assert (found["pending"], found["left_out"]) == (None, 0)

    async def test_one_that_waits_for_the_next_attempt(self, server: Replica, http: Http) -> None:
        await server.start_job()
        await server.call(
            "AttachRun",
            run="small",
            spec_document=server.document(weight_decay=0.2),
            on_change=trainer_pb2.ON_CHANGE_REVISE,
            request_id="again",
        )
        found = await http.read("/api/runs/small/specs")
        assert len(found["specs"]) == 1
        assert found["pending"]["changes"] == [
            {"field": "weight_decay", "before": "0.1", "after": "0.2"}
        ]
        assert yaml.safe_load(found["pending"]["spec_document"])["weight_decay"] == 0.2
        await server.open()
        found = await http.read("/api/runs/small/specs")
        assert found["specs"][1]["by_trainer"]
        assert found["pending"] is None

    async def test_of_many_the_newest(
        self, server: Replica, http: Http, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_api, "MAX_SPECS", 2)
        await server.attach()
        for total in (1100, 1200, 1300):
            document = server.document(total=total)
            signed = {"author": "a", "reason": str(total), "request_id": str(total)}
            await server.call("ReviseRun", run="small", spec_document=document, **signed)
        found = await http.read("/api/runs/small/specs")
        assert [item["reason"] for item in found["specs"]] == ["1200", "1300"]
        assert [item["changes"][0]["before"] for item in found["specs"]] == ["1100", "1200"]
        assert found["left_out"] == 2


class TestServer:
    async def test_what_it_says_of_itself(self, http: Http) -> None:
        before_ns = time.time_ns()
        found = await http.read("/api/server")
        assert found.keys() == {"version", "read_only", "why_read_only", "author", "ready", "time"}
        now = Timestamp()
        now.FromJsonString(found["time"])
        assert before_ns <= now.ToNanoseconds() <= time.time_ns()
        assert (found["read_only"], found["why_read_only"], found["ready"]) == (False, None, None)
        assert found["author"].endswith(f"@{socket.gethostname()}")

    async def test_large_answers_are_compressed_where_that_is_wanted(
        self, http: Http, small: Job
    ) -> None:
        path = "/api/runs/small/curves"
        packed = await http.get(path, Accept_Encoding="gzip, br")
        assert packed.headers["content-encoding"] == "gzip"
        as_it_is = await http.get(path)
        assert "content-encoding" not in as_it_is.headers
        assert gzip.decompress(packed.body) == as_it_is.body
        assert len(packed.body) < len(as_it_is.body)
        small_one = await http.get("/api/server", Accept_Encoding="gzip")
        assert "content-encoding" not in small_one.headers


class TestPage:
    async def test_one_page_for_all_addresses(self, http: Http) -> None:
        page = await http.get("/")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert b"<title>lrpilot" in page.body
        # Whether there is such a run, the page asks itself.
        assert (await http.get("/runs/nobody")).body == page.body

    async def test_nothing_in_it_leads_elsewhere(self, http: Http) -> None:
        page = (await http.get("/")).body.decode()
        assert "http://" not in page
        assert "https://" not in page

    async def test_its_files(self, http: Http) -> None:
        for path, media_type in (
            ("app.js", "text/javascript; charset=utf-8"),
            ("style.css", "text/css; charset=utf-8"),
            ("icon.svg", "image/svg+xml"),
            ("vendor/uplot/LICENSE", "text/plain; charset=utf-8"),
        ):
            answer = await http.get(f"/static/{path}")
            assert (answer.status, answer.headers["content-type"]) == (200, media_type)
            assert answer.body

    async def test_a_browser_keeps_what_did_not_change(self, http: Http) -> None:
        for path in ("/", f"/static/{STATIC}"):
            first = await http.get(path)
            assert first.headers["cache-control"] == "no-cache"
            etag = first.headers["etag"]
            for known in (etag, f"W/{etag}", f'"other", {etag}'):
                answer = await http.get(path, If_None_Match=known)
                assert (answer.status, answer.body) == (304, b"")
                assert answer.headers["etag"] == etag
            for other in ('"other"', ""):
                answer = await http.get(path, If_None_Match=other)
                assert (answer.status, answer.body) == (200, first.body)

    async def test_no_other_files(self, http: Http) -> None:
        outside = ("../_web.py", "..%2f_web.py", "%2e%2e/_web.py", "/etc/passwd")
        for path in ("nothing.js", "", "vendor", *outside):
            assert (await http.get(f"/static/{path}")).status == 404


class TestMetrics:
    async def test_the_form_that_is_asked_for(self, http: Http, small: Job) -> None:
        text = await http.get("/metrics")
        assert text.headers["content-type"].startswith("text/plain; version=0.0.4")
        assert b'lrpilot_run_learning_rate{group="",run="small"}' in text.body
        accept = "application/openmetrics-text; version=1.0.0"
        answer = await http.get("/metrics", Accept=accept, Accept_Encoding="gzip")
        assert answer.headers["content-type"].startswith(accept)
        assert answer.headers["content-encoding"] == "gzip"
        text_format: Any = text_string_to_metric_families
        families = text_format(gzip.decompress(answer.body).decode())
        assert "lrpilot_run_loss" in {family.name for family in families}
        one = await http.get("/metrics?name[]=lrpilot_live_runs")
        assert [line for line in one.body.splitlines() if not line.startswith(b"#")] == [
            b"lrpilot_live_runs 1.0"
        ]


class TestEveryAnswer:
    async def test_keeps_browsers_strict(self, http: Http, small: Job) -> None:
        for path in (*PATHS, *PROBES, *STREAMS, "/nothing", "/api/nothing"):
            headers = (await http.ask("HEAD", path)).headers
            policy = headers["content-security-policy"]
            assert policy.startswith("default-src 'self'; ")
            assert "frame-ancestors 'none'" in policy
            assert "unsafe" not in policy
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["referrer-policy"] == "no-referrer"
            assert headers["cross-origin-resource-policy"] == "same-origin"
            assert "access-control-allow-origin" not in headers
            assert "server" not in headers
            if path.startswith("/api"):
                assert headers["cache-control"] == "no-store"

    async def test_head_is_a_get_without_content(self, http: Http, small: Job) -> None:
        for path in (*PATHS, *PROBES):
            head, get = await http.ask("HEAD", path), await http.get(path)
            assert (head.status, head.body) == (get.status, b"")
            assert head.headers["content-type"] == get.headers["content-type"]

    async def test_head_of_a_stream_ends(self, http: Http, small: Job) -> None:
        for path in STREAMS:
            answer = await http.ask("HEAD", path)
            assert (answer.status, answer.body) == (200, b"")
            assert answer.headers["content-type"].startswith("text/event-stream")


class TestRefusals:
    async def test_a_path_that_is_none(self, http: Http) -> None:
        for path in ("/nothing", "/metrics/x", "/live/", "//runs/a", "/runs/a/b"):
            assert (await http.get(path)).status == 404

    async def test_an_address_with_a_slash_too_many_leads_to_the_page(self, http: Http) -> None:
        for path, address in (
            ("/runs", "/"),
            ("/runs/", "/"),
            ("/runs/small/?from=1&to=2", "/runs/small?from=1&to=2"),
            ("/runs/a%3Fb/", "/runs/a%3Fb"),
        ):
            answer = await http.get(path)
            assert (answer.status, answer.headers["location"]) == (307, address)

    async def test_a_path_of_the_api_that_is_none(self, http: Http) -> None:
        for path in ("", "nothing", "runs/", "runs/small/x", "runs/a%2Fb", "runs/small/"):
            answer = await http.get(f"/api/{path}")
            assert (answer.status, answer.error["reason"]) == (404, "PathNotFound")

    async def test_a_method_that_is_none(self, http: Http) -> None:
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            for path in ("/api/runs", "/metrics", "/", "/live"):
                answer = await http.ask(method, path)
                assert answer.status == 405
                assert "GET" in answer.headers["allow"]

    async def test_getting_what_acts(self, http: Http) -> None:
        answer = await http.get("/api/runs/small/adjust")
        assert (answer.status, answer.error["reason"]) == (405, "MethodNotAllowed")

    @pytest.mark.parametrize(
        "name", ["nobody", "A%20B", "%C3%BC", "%00", "%F0%9F%98%80", "..", "a;b", "x" * 5000, "%FF"]
    )
    async def test_a_run_that_is_none(self, http: Http, name: str) -> None:
        for what in ("", "/curves", "/events", "/specs", "/stream"):
            answer = await http.get(f"/api/runs/{name}{what}")
            assert (answer.status, answer.error["reason"]) == (404, "RunNotFound")

    async def test_near_names_are_told(self, http: Http, small: Job) -> None:
        answer = await http.get("/api/runs/smal")
        assert "small" in answer.error["message"]

    @pytest.mark.parametrize(
        ("path", "fields"),
        [
            ("/api/server?x=1", {"x": "got a parameter; allowed: one of none"}),
            (
                "/api/runs?page_size=1&size=2",
                {"size": "got a parameter; allowed: one of page_size, page_token"},
            ),
            ("/api/runs?page_size=501", {"page_size": "got 501; allowed: 1 to 500, or 0 for 50"}),
            ("/api/runs?page_size=-1", {"page_size": "got '-1'; allowed: a whole number"}),
            (
                f"/api/runs?page_size={2**31}",
                {"page_size": f"got {2**31}; allowed: at most {2**31 - 1}"},
            ),
            ("/api/runs?page_size=1&page_size=2", {"page_size": "got 2 values; allowed: one"}),
            (
                "/api/runs/small/curves?begin=a&end=1.5&points=5e1",
                {
                    "begin": "got 'a'; allowed: a whole number",
                    "end": "got '1.5'; allowed: a whole number",
                    "points": "got '5e1'; allowed: a whole number",
                },
            ),
            (
                "/api/runs/small/curves?points=9",
                {"points": "got 9; allowed: 10 to 4000, or 0 for 1000"},
            ),
            ("/api/runs/small/curves?group=x", {"groups": "got 'x'; allowed: one of ''"}),
            (f"/api/runs/small/curves?end={'9' * 5000}", None),
            ("/api/runs/small/events?notable=yes", {"notable": "got 'yes'; allowed: 1 or 0"}),
            (
                "/api/runs/small/events?page_token=x",
                {"page_token": "got 'x'; allowed: next_page_token of the page before"},
            ),
        ],
    )
    async def test_a_query_that_is_wrong(
        self, http: Http, small: Job, path: str, fields: dict[str, str] | None
    ) -> None:
        answer = await http.get(path)
        assert (answer.status, answer.error["reason"]) == (400, "InvalidRequest")
        assert len(answer.body) < 4096
        if fields is not None:
            assert answer.fields == fields

    async def test_a_thousand_wrong_parameters(self, http: Http) -> None:
        answer = await http.get("/api/runs?" + "&".join(f"{n}x=1" for n in range(1000)))
        assert answer.status == 400
        assert 0 < len(answer.fields) <= 20

    async def test_a_store_that_fails(
        self, server: Replica, http: Http, small: Job, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: Any) -> Any:
            raise StoreUnavailable("disk full", "disk_full")

        for name in ("runs", "read", "heads"):
            monkeypatch.setattr(server.store, name, fail)
        for path in ("/api/runs", "/api/runs/small/events", "/api/runs/nobody"):
            answer = await http.get(path)
            assert (answer.status, answer.error["reason"]) == (503, "StoreUnavailable")
            assert "disk full" in answer.error["message"]
        # What is in memory can be looked at.
        assert (await http.read("/api/runs/small"))["losses"] == 5

    async def test_a_fault_of_the_servers_own(
        self,
        server: Replica,
        http: Http,
        small: Job,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        async def broken(_: Any) -> Any:
            raise ZeroDivisionError

        monkeypatch.setattr(server.server.runs, "list_events", broken)
        answer = await http.get("/api/runs/small/events")
        assert (answer.status, answer.error["reason"]) == (500, "Internal")
        assert "ZeroDivisionError" in caplog.text
        assert b"ZeroDivisionError" not in answer.body

    async def test_what_takes_too_long(
        self, server: Replica, http: Http, small: Job, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def forever(_: Any) -> Any:
            await asyncio.Event().wait()

        monkeypatch.setattr(server.server.runs, "list_events", forever)
        monkeypatch.setattr(_api, "ANSWER_S", 0.05)
        answer = await http.get("/api/runs/small/events")
        assert (answer.status, answer.error["reason"]) == (504, "DeadlineExceeded")

    async def test_what_is_no_http(self, http: Http) -> None:
        host, _, port = http.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GARBAGE\r\n\r\n")
        assert (await asyncio.wait_for(reader.read(), 60)).startswith(b"HTTP/1.1 400 ")
        writer.close()
        assert (await http.get("/live")).status == HTTPStatus.OK

    @pytest.mark.parametrize("before", ["", "GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n"])
    async def test_a_head_that_never_ends(
        self, http: Http, monkeypatch: pytest.MonkeyPatch, before: str
    ) -> None:
        monkeypatch.setattr(_http, "HEAD_S", 0.2)
        host, _, port = http.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(f"{before}GET /live HTTP/1.1\r\n".encode())

        async def go_on() -> None:
            while True:
                writer.write(b"X-More: of it\r\n")
                await writer.drain()
                await asyncio.sleep(0.02)

        more = asyncio.create_task(go_on())
        with suppress(ConnectionError):
            got = await asyncio.wait_for(reader.read(), 60)
            assert got.count(b"HTTP/1.1 200 ") == bool(before)
        more.cancel()
        writer.close()


class TestHosts:
    """A page whose name was made to lead to this machine must not read losses."""

    async def asked(self, http: Http, path: str, host: str) -> Answer:
        return await http.get(path, Host=host)

    async def test_ways_to_loopback(self, http: Http, small: Job) -> None:
        for host in WAYS:
            for path in (*PATHS, *PROBES):
                assert (await self.asked(http, path, host)).status == 200

    async def test_others(self, http: Http, small: Job) -> None:
        for host in OTHERS:
            for path in (*PATHS, *STREAMS):
                answer = await self.asked(http, path, host)
                # What is no host at all is not even looked at.
                assert answer.status in {421, 400}
                assert b"small" not in answer.body

    async def test_who_probes_need_not_know(self, http: Http) -> None:
        for path in PROBES:
            assert (await self.asked(http, path, "lrpilot.cluster")).status == 200

    async def test_the_name_by_which_it_was_bound(
        self, server: Replica, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        resolve = socket.getaddrinfo

        def mine(host: str, *rest: Any, **more: Any) -> Any:
            return resolve("127.0.0.1" if host == "my-machine" else host, *rest, **more)

        monkeypatch.setattr(socket, "getaddrinfo", mine)
        async with serving(server, "my-machine:0") as web:
            assert web.address.startswith("my-machine:")
            http = Http(web.address.replace("my-machine", "127.0.0.1"))
            assert (await self.asked(http, "/api/runs", "My-Machine:80")).status == 200
            assert (await self.asked(http, "/api/runs", "your-machine:80")).status == 421

    async def test_beyond_loopback_any_name_will_do(self, server: Replica, small: Job) -> None:
        async with serving(server, "0.0.0.0:0") as web:
            http = Http(web.address.replace("0.0.0.0", "127.0.0.1"))
            for path in PATHS:
                for host in ("lrpilot.example", "[", "a b", ""):
                    answer = await self.asked(http, path, host)
                    assert answer.status in {200, 400}
                assert (await self.asked(http, path, "lrpilot.example")).status == 200

    async def test_the_other_loopback(self, server: Replica, small: Job) -> None:
        async with serving(server, "[::1]:0") as web:
            assert web.address.startswith("[::1]:")
            http = Http(web.address)
            assert not (await http.read("/api/server"))["read_only"]
            assert (await self.asked(http, "/api/runs", "evil.example")).status == 421


class TestOtherSites:
    async def test_may_not_ask(self, http: Http, small: Job) -> None:
        for headers in (
            {"Sec_Fetch_Site": "cross-site"},
            {"Sec_Fetch_Site": "same-site"},
            {"Origin": "https://evil.example"},
            {"Origin": "null"},
            {"Origin": "http://localhost:1"},
        ):
            for path in (*JSON_PATHS, *STREAMS):
                answer = await http.get(path, **headers)
                assert (answer.status, answer.error["reason"]) == (403, "Foreign")
            # They may link here.
            assert (await http.get("/runs/small", **headers)).status == 200

    async def test_the_page_may(self, http: Http, small: Job) -> None:
        for headers in (
            {"Sec_Fetch_Site": "same-origin", "Origin": f"http://{http.address}"},
            {"Sec_Fetch_Site": "same-origin"},
            # Typed in by a person.
            {"Sec_Fetch_Site": "none"},
        ):
            for path in JSON_PATHS:
                assert (await http.get(path, **headers)).status == 200
