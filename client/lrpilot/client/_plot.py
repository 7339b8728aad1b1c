"""A picture of a run, for notebooks: what has to be asked for, and of whom."""

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

import grpc

from lrpilot.client import _timing
from lrpilot.client._address import read_target
from lrpilot.client._arguments import integer, positive, text
from lrpilot.client._call import Backoff, Unanswered, translated
from lrpilot.client._channel import open_channel
from lrpilot.client._errors import ServerUnavailable, invalid_argument

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Answer = TypeVar("Answer")

_POINTS = 2000
"""About how many points a curve has: twice as many as a picture is wide."""


def plot(
    address: str,
    run: str,
    *,
    begin: int | None = None,
    end: int | None = None,
    groups: Iterable[str] | None = None,
    log: bool = False,
    timeout_s: float = _timing.CALL_S,
) -> "Figure":
    """Return a picture of a run as a matplotlib figure, which a notebook shows.

    It has the losses as reported, smoothed and on validation data; LR and WD, the past as a solid
    line, what is fixed already on a shaded ground, what is planned dashed, the base schedule
    dotted; stages, adjustments and advice. It belongs to no pyplot, which is not imported.

    Args:
        address: HOST:PORT of the server, or several, as `connect` takes it.
        run: name of the run.
        begin: first progress of the picture, in the run's unit. None: 0.
        end: last progress of the picture, > 0. None: the end of the run.
        groups: names of the parameter groups to draw. None: the first 8.
        log: whether losses, LR and WD have logarithmic axes; what is not above 0 is not drawn then.
        timeout_s: longest time in seconds to wait for the server, all in all.

    Raises ImportError without matplotlib (`pip install 'lrpilot[plot]'`), InvalidArgument,
    InvalidRequest (groups that the run has not, …), RunNotFound, ServerUnavailable, ….
    """
    target = read_target(address)
    text("run", run)
    first = 0 if begin is None else integer("begin", begin, 0, _timing.MAX_PROGRESS)
    last = 0 if end is None else integer("end", end, max(first, 1), _timing.MAX_PROGRESS)
    names = () if groups is None else _names(groups)
    end_s = time.monotonic() + positive("timeout_s", timeout_s)
    # Before the server is asked: what is not installed will not be there afterwards either.
    try:
        from lrpilot.client._figure import draw  # noqa: PLC0415
    except ImportError as error:
        raise ImportError(
            f"plot() needs matplotlib: pip install 'lrpilot[plot]' ({error})"
        ) from error
    from lrpilot.v1 import runs_pb2 as pb  # noqa: PLC0415
    from lrpilot.v1.runs_pb2_grpc import RunServiceStub  # noqa: PLC0415

    def ask(method: Callable[..., Answer], request: object) -> Answer:
        return _ask(method, request, run=run, address=address, end_s=end_s, timeout_s=timeout_s)

    with open_channel(target) as channel:
        runs = RunServiceStub(channel)
        shown = ask(runs.GetRun, pb.GetRunRequest(run=run)).run
        curves = ask(
            runs.GetCurves,
            pb.GetCurvesRequest(run=run, begin=first, end=last, points=_POINTS, groups=names),
        )
    return draw(shown, curves, log=log)


def _names(groups: object) -> tuple[str, ...]:
    """Return names of parameter groups; none at all is no choice. Raises InvalidArgument."""
    names = tuple(groups) if isinstance(groups, Iterable) and not isinstance(groups, str) else ()
    if not names or not all(isinstance(name, str) for name in names):
        raise invalid_argument("groups", groups, "None, or names of parameter groups")
    return names


def _ask(
    method: Callable[..., Answer],
    request: object,
    *,
    run: str,
    address: str,
    end_s: float,
    timeout_s: float,
) -> Answer:
    """Return the answer to a call, which is repeated up to `end_s` on the monotonic clock."""
    backoff = Backoff()
    while True:
        left_s = end_s - time.monotonic()
        try:
            # gRPC takes a deadline in centuries for one that is over.
            wait_s = min(max(left_s, _timing.LEAST_CALL_S), _timing.LONGEST_WAIT_S)
            return method(request, timeout=wait_s)
        except grpc.RpcError as error:
            met = translated(error, run=run, address=address)
        if not isinstance(met, Unanswered):
            raise met
        pause_s = backoff.next_s()
        if time.monotonic() + pause_s >= end_s:
            raise ServerUnavailable(
                f"run {run!r} cannot be drawn: the server at {address} did not answer within "
                f"{timeout_s:g} s ({met})",
                facts={"run": run, "address": address, "seconds": f"{timeout_s:g}"},
            )
        time.sleep(pause_s)
