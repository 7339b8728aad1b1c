"""`plot()`: what the picture shows of what the server sends, and what it does where none comes."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import grpc
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import Collection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

import lrpilot.client as lrpilot
from lrpilot.v1 import runs_pb2 as pb
from tests.client.conftest import DETAILS_KEY, FakeTrainer, Fault, refusal

RATES: dict[str, Any] = {
    "progress": [0, 10, 40, 41, 60, 68, 69, 100],
    "learning_rate": [0.0, 1e-3, 1e-3, 5e-4, 5e-4, 5e-4, 5e-4, 1e-4],
    "base_learning_rate": [0.0, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 2e-4],
    "weight_decay": [0.1] * 8,
}


def curve(*values: float, begin: int = 0) -> pb.Curve:
    return pb.Curve(progress=range(begin, begin + len(values)), value=values)


def run_message() -> pb.Run:
    return pb.Run(
        name="small",
        state=pb.RUN_STATE_RUNNING,
        unit="iterations",
        total=100,
        attempt=2,
        progress=60,
        horizon=69,
    )


def curves_message() -> pb.GetCurvesResponse:
    """Return the curves of a run at 60 of 100, whose values are fixed below 69."""
    groups = [pb.GroupCurve(**RATES)]
    return pb.GetCurvesResponse(begin=0, end=100, progress=60, horizon=69, groups=groups)


@dataclass
class FakeRuns:
    """A RunService over gRPC that knows one run."""

    run: pb.Run = field(default_factory=run_message)
    curves: pb.GetCurvesResponse = field(default_factory=curves_message)
    requests: list[Any] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    """What the next calls meet, whichever they are."""
    port: int = 0

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def answer(self, answer: Any, request: Any, context: Any) -> Any:
        self.requests.append(request)
        if self.faults:
            fault = self.faults.pop(0)
            if fault.packed is not None:
                context.set_trailing_metadata(((DETAILS_KEY, fault.packed),))
            context.abort(fault.code, fault.text)
        return answer


@pytest.fixture
def runs() -> Iterator[FakeRuns]:
    """A server with a run at 60 of 100."""
    fake = FakeRuns()

    answers: dict[str, tuple[Any, Callable[[], Any]]] = {
        "GetRun": (pb.GetRunRequest, lambda: pb.GetRunResponse(run=fake.run)),
        "GetCurves": (pb.GetCurvesRequest, lambda: fake.curves),
    }
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(
            lambda request, context, made=made: fake.answer(made(), request, context),
            request_deserializer=kind.FromString,
            response_serializer=lambda answer: answer.SerializeToString(),
        )
        for name, (kind, made) in answers.items()
    }
    server = grpc.server(futures.ThreadPoolExecutor(4), options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("lrpilot.v1.RunService", handlers),)
    )
    fake.port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield fake
    server.stop(0).wait()


def points(line: Line2D) -> list[tuple[float, float]]:
    """Return what a line goes through; NaN is a gap."""
    data: Any = line.get_xydata()
    return [(at, value) for at, value in data.tolist()]


def pieces(line: Line2D) -> list[list[tuple[float, float]]]:
    """Return what a line goes through between its gaps."""
    gaps = groupby(points(line), lambda point: math.isnan(point[1]))
    return [list(part) for is_gap, part in gaps if not is_gap]


def offsets(marks: Collection) -> list[float]:
    """Return at which progress marks stand."""
    data: Any = marks.get_offsets()
    return [at for at, _ in data.tolist()]


@dataclass
class Picture:
    """The panels of a figure by what they show."""

    figure: Figure

    def panel(self, name: str) -> Axes:
        (found,) = (axes for axes in self.figure.axes if axes.get_ylabel() == name)
        return found

    @property
    def panels(self) -> list[str]:
        return [name for axes in self.figure.axes if (name := axes.get_ylabel())]

    def lines(self, name: str, style: str = "-") -> list[Line2D]:
        """Return the curves of a panel with a style of line."""
        return [line for line in self.panel(name).lines if line.get_linestyle() == style]

    def line(self, name: str, label: str) -> Line2D:
        (found,) = (line for line in self.panel(name).lines if line.get_label() == label)
        return found

    def texts(self) -> list[str]:
        return [text.get_text() for axes in self.figure.axes for text in axes.texts]

    def spans(self, name: str) -> list[tuple[float, float]]:
        """Return the shaded stretches of a panel, bands of stages among them."""
        found = []
        for item in self.panel(name).patches:
            # A polygon before matplotlib 3.9, and a rectangle since.
            corners: Any = item.get_patch_transform().transform(item.get_path().vertices)
            found.append((min(corners[:, 0]), max(corners[:, 0])))
        return found

    def marks(self) -> list[tuple[float, bool]]:
        """Return where adjustments are marked, and whether the mark is filled."""
        found = []
        for item in self.panel("learning rate").collections:
            if item.get_gid() == "marks":
                faces: Any = item.get_facecolor()
                is_filled = tuple(faces[0][:3]) != (1.0, 1.0, 1.0)
                found += [(at, is_filled) for at in offsets(item)]
        return sorted(found)


def pairs(at: Sequence[int], values: Sequence[float]) -> list[tuple[int, float]]:
    return list(zip(at, values, strict=True))


def shown(runs: FakeRuns, **options: Any) -> Picture:
    """Draw, render, and return the picture."""
    figure = lrpilot.plot(runs.address, "small", **options)
    png: bytes = figure._repr_png_()  # type: ignore[attr-defined]
    assert png.startswith(b"\x89PNG\r\n")
    return Picture(figure)


def test_used_and_fixed_are_solid_and_planned_is_dashed(runs: FakeRuns) -> None:
    picture = shown(runs)
    at, rates = RATES["progress"], RATES["learning_rate"]
    (solid,) = picture.lines("learning rate")
    assert points(solid) == pairs(at[:6], rates[:6])
    (dashed,) = picture.lines("learning rate", "--")
    # It begins where the solid one ends.
    assert points(dashed) == pairs(at[5:], rates[5:])
    (base,) = picture.lines("learning rate", ":")
    assert points(base) == pairs(at, RATES["base_learning_rate"])
    (solid,) = picture.lines("weight decay")
    (dashed,) = picture.lines("weight decay", "--")
    assert points(solid)[-1] == points(dashed)[0] == (68, 0.1)
    for name in picture.panels:
        assert picture.spans(name) == [(60, 69)]
        assert picture.panel(name).get_xlim() == (0, 100)


def test_losses_of_each_attempt_with_what_was_forgotten(runs: FakeRuns) -> None:
    first = curve(5.0, 4.0, math.nan, 3.0, 9.0)
    runs.curves.losses.add(attempt=1, begin=0, forgotten_from=3, loss=first)
    runs.curves.losses.add(attempt=2, begin=3, loss=curve(2.5, math.inf, 2.25, begin=3))
    runs.curves.smoothed_loss.CopyFrom(curve(5.0, 4.5, 4.25))
    runs.curves.validation_losses["$val_loss"].CopyFrom(curve(5.5, begin=2))
    picture = shown(runs)
    assert picture.panels == ["loss", "learning rate", "weight decay"]
    # NaN, infinity, and between two attempts: a gap.
    assert pieces(picture.line("loss", "loss")) == [[(0, 5.0), (1, 4.0)], [(3, 2.5)], [(5, 2.25)]]
    assert pieces(picture.line("loss", "forgotten")) == [[(3, 3.0), (4, 9.0)]]
    assert points(picture.line("loss", "smoothed")) == [(0, 5.0), (1, 4.5), (2, 4.25)]
    assert points(picture.line("loss", "$val_loss")) == [(2, 5.5)]
    marks = {str(item.get_label()): item for item in picture.panel("loss").collections}
    assert sorted(offsets(marks["not finite"])) == [2, 4]
    legend = picture.panel("loss").get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [
        "loss", "forgotten", "smoothed", "$val_loss", "not finite",
    ]  # fmt: skip


def test_losses_too_great_to_draw_are_marked(runs: FakeRuns) -> None:
    runs.curves.losses.add(attempt=1, begin=0, loss=curve(3.0, 1.7e308, -1.7e308, 3.4e38))
    picture = shown(runs)
    assert pieces(picture.line("loss", "loss")) == [[(0, 3.0)], [(3, 3.4e38)]]
    (marks,) = (
        item for item in picture.panel("loss").collections if "finite" in str(item.get_label())
    )
    assert offsets(marks) == [1, 2]


def test_adjustments_and_advice_are_numbered_and_listed(runs: FakeRuns) -> None:
    plateau = {"source": "policies.0 (plateau)", "summary": "LR x 0.5", "status": "in force"}
    runs.run.adjustments.add(
        id="a", effective=41, mode="act", before=[1e-3], after=[5e-4], **plateau
    )
    runs.run.adjustments.add(
        id="b", effective=50, mode="advise", source="policies.1 (spike)", summary="LR x 0.1",
        status="advice",
    )  # fmt: skip
    runs.run.adjustments.add(
        id="c", effective=30, mode="act", source="operator", author="$me$", summary="hold",
        status="forgotten", forgotten=True, reason="a $spike$,\n\n  or two",
    )  # fmt: skip
    runs.run.adjustments.add(id="beyond", effective=101, mode="act")
    picture = shown(runs)
    assert picture.marks() == [(30, True), (41, True), (50, False)]
    assert picture.texts() == [
        "1",
        "2",
        "3",
        "1   at 30: hold, forgotten; $me$: a $spike$, or two",
        "2   at 41: LR x 0.5 (0.001 → 0.0005), in force; policies.0 (plateau)",
        "3   at 50: LR x 0.1, advice; policies.1 (spike)",
    ]


def test_of_many_adjustments_the_newest_are_listed(runs: FakeRuns) -> None:
    for number in range(40):
        runs.run.adjustments.add(id=str(number), effective=number, mode="act", summary="x" * 300)
    picture = shown(runs)
    assert len(picture.marks()) == 40
    lines = [text for text in picture.texts() if " at " in text]
    assert [line.partition(":")[0] for line in lines] == [
        f"{number + 1}   at {28 + number}" for number in range(12)
    ]
    assert all(len(line) == 140 for line in lines)


def test_stages_are_bands(runs: FakeRuns) -> None:
    runs.curves.stages.add(name="warm", begin=0, end=30)
    runs.curves.stages.add(name="_long$", begin=30, end=500)
    picture = shown(runs)
    assert picture.spans("weight decay") == [(60, 69), (0, 30), (30, 100)]
    assert picture.texts() == ["warm", "_long$"]


def test_the_title_says_where_the_run_is(runs: FakeRuns) -> None:
    runs.run.MergeFrom(pb.Run(stage="anneal", held=True))
    title = shown(runs).figure.get_suptitle()
    assert title == "small: 60 of 100 iterations, attempt 2, running, stage anneal, held"
    runs.run.Clear()
    runs.run.MergeFrom(pb.Run(name="$small", total=10**12, unit="tokens"))
    runs.run.state = pb.RUN_STATE_CREATED
    assert shown(runs).figure.get_suptitle() == "$small: 0 of 1,000,000,000,000 tokens, created"
    # Of a newer server, on the wire: field 2, varint 77.
    runs.run.MergeFromString(b"\x10\x4d")
    assert shown(runs).figure.get_suptitle().endswith(" tokens, 77")


def test_groups_with_equal_curves_share_a_line(runs: FakeRuns) -> None:
    names = [f"group{number}" for number in range(40)]
    del runs.curves.groups[:]
    for index, name in enumerate(names):
        factor = 1.0 if index < 30 else 1 / index
        rates = [rate * factor for rate in RATES["learning_rate"]]
        # An earlier spec did not have this one.
        rates[0] = math.nan if index == 39 else rates[0]
        runs.curves.groups.add(**RATES | {"name": name, "learning_rate": rates})
    picture = shown(runs, groups=names)
    assert list(runs.requests[-1].groups) == names
    assert len(picture.lines("learning rate")) == 11
    assert len(picture.lines("learning rate", ":")) == 1
    assert len(picture.lines("weight decay")) == 1
    assert points(picture.line("learning rate", "group0, group1, group2 and 27 more"))


def test_the_legend_names_the_groups_that_are_drawn_unless_told_otherwise(runs: FakeRuns) -> None:
    names = [f"{number} {'x' * 50}" for number in range(8)]
    del runs.curves.groups[:]
    for index, name in enumerate(names):
        rates = [rate * (index + 1) for rate in RATES["learning_rate"]]
        runs.curves.groups.add(**RATES | {"name": name, "learning_rate": rates})
    legend = shown(runs).panel("learning rate").get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [
        "base schedule", *(f"{name[:39]}…" for name in names), "fixed, not used yet",
    ]  # fmt: skip


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    ("losses", "panels"),
    [
        ([], ["learning rate"]),
        ([2.0], ["loss", "learning rate"]),
        ([math.nan, math.inf, -math.inf], ["loss", "learning rate"]),
        ([-1.0, -2.0], ["loss", "learning rate"]),
    ],
)
def test_runs_of_which_there_is_little_to_show(
    runs: FakeRuns, losses: list[float], panels: list[str], log: bool
) -> None:
    runs.curves.CopyFrom(pb.GetCurvesResponse(seq=3))
    if losses:
        runs.curves.losses.add(attempt=1, loss=curve(*losses))
    runs.curves.groups.add(progress=[0], learning_rate=[0.0], base_learning_rate=[0.0])
    runs.run.adjustments.add(id="a", mode="act")
    picture = shown(runs, log=log)
    assert picture.panels == panels
    for name in panels:
        wanted = "log" if log and name == "loss" and losses == [2.0] else "linear"
        assert picture.panel(name).get_yscale() == wanted


def test_logarithmic_axes(runs: FakeRuns) -> None:
    picture = shown(runs, log=True)
    assert {picture.panel(name).get_yscale() for name in picture.panels} == {"log"}


def test_what_is_asked_for(runs: FakeRuns) -> None:
    shown(runs)
    assert runs.requests == [
        pb.GetRunRequest(run="small"), pb.GetCurvesRequest(run="small", points=2000),
    ]  # fmt: skip
    # No deadline of gRPC's is that far ahead.
    shown(runs, begin=10, end=20, groups=iter(("a", "b")), timeout_s=1e10)
    assert runs.requests[-1] == pb.GetCurvesRequest(
        run="small", begin=10, end=20, points=2000, groups=["a", "b"]
    )


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"begin": -1}, "begin"),
        ({"begin": 20, "end": 10}, "end"),
        ({"end": 0}, "end"),
        ({"groups": "decayed"}, "groups"),
        ({"groups": [3]}, "groups"),
        ({"groups": 3}, "groups"),
        ({"groups": []}, "groups"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"run": " "}, "run"),
        ({"address": "nowhere"}, "address"),
    ],
)
def test_wrong_arguments(runs: FakeRuns, options: dict[str, Any], name: str) -> None:
    with pytest.raises(lrpilot.InvalidArgument, match=name):
        lrpilot.plot(**{"address": runs.address, "run": "small"} | options)
    assert runs.requests == []


def test_a_refusal_has_its_name(runs: FakeRuns) -> None:
    text = "there is no run 'small'; near: 'smaller'"
    runs.faults.append(refusal("RunNotFound", text, grpc.StatusCode.NOT_FOUND, run="small"))
    with pytest.raises(lrpilot.RunNotFound, match="smaller"):
        shown(runs)
    runs.faults.append(Fault(grpc.StatusCode.UNIMPLEMENTED, "an older server"))
    with pytest.raises(lrpilot.ServerError, match="an older server"):
        shown(runs)


def test_a_call_that_finds_no_answer_is_repeated(runs: FakeRuns) -> None:
    runs.faults += [Fault()] * 2
    assert shown(runs).panels == ["learning rate", "weight decay"]
    assert len(runs.requests) == 4


def refused_port(runs: FakeRuns) -> str:
    return "127.0.0.1:1"


def unanswered(runs: FakeRuns) -> str:
    runs.faults += [Fault(grpc.StatusCode.UNAVAILABLE, "not today")] * 1000
    return runs.address


@pytest.mark.parametrize("away", [refused_port, unanswered])
def test_a_server_that_is_away(runs: FakeRuns, away: Callable[[FakeRuns], str]) -> None:
    address = away(runs)
    with pytest.raises(lrpilot.ServerUnavailable) as caught:
        lrpilot.plot(address, "small", timeout_s=0.5)
    assert address in str(caught.value)
    assert "within 0.5 s" in str(caught.value)


def test_one_of_two_servers_is_enough(runs: FakeRuns) -> None:
    figure = lrpilot.plot(f"127.0.0.1:1,{runs.address}", "small")
    assert figure.get_suptitle().startswith("small: 60 of 100")


def test_without_matplotlib(runs: FakeRuns) -> None:
    program = f"""
import sys
import lrpilot.client as lrpilot
print("matplotlib" in sys.modules, "lrpilot.v1.runs_pb2" in sys.modules)
sys.modules["matplotlib"] = None
try:
    lrpilot.plot({runs.address!r}, "small")
except ImportError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    imported, text = done.stdout.splitlines()
    assert imported == "False False"
    assert text.startswith("plot() needs matplotlib: pip install 'lrpilot[plot]' (")
    assert runs.requests == []


def test_it_imports_no_pyplot_and_touches_no_settings(runs: FakeRuns) -> None:
    program = f"""
import sys
import matplotlib
import lrpilot.client as lrpilot
# To look a setting up by its name would import pyplot.
before = dict(dict.items(matplotlib.rcParams))
lrpilot.plot({runs.address!r}, "small")._repr_png_()
print("matplotlib.pyplot" in sys.modules, before == dict(dict.items(matplotlib.rcParams)))
print([name for name in sys.modules if name.startswith(("lrpilot.core", "lrpilot.server"))])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr) == ("False True\n[]\n", "")


def test_a_pilot_draws_its_run_also_when_it_is_closed(
    runs: FakeRuns, trainer: FakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with lrpilot.connect(trainer.address, run="small", spec={"name": "small"}) as pilot:
        with pytest.raises(lrpilot.ServerError, match="UNIMPLEMENTED"):
            pilot.plot(timeout_s=5.0)
        monkeypatch.setattr(pilot._session.link, "address", runs.address)
        assert pilot.plot(begin=5).get_suptitle().startswith("small: 60 of 100")
        assert runs.requests[-1].begin == 5
    assert pilot.plot().get_suptitle().startswith("small: 60 of 100")


def test_a_forked_child_is_refused(trainer: FakeTrainer) -> None:
    with lrpilot.connect(trainer.address, run="small", spec={"name": "small"}) as pilot:
        child = os.fork()
        if not child:
            code = 1
            try:
                pilot.plot()
            except lrpilot.PilotClosed:
                code = 0
            finally:
                os._exit(code)
        end_s = time.monotonic() + 30
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < end_s:
            time.sleep(0.01)
        assert ended == (child, 0)
