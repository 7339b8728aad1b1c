"""What a trimmed state owes: it does and answers what the whole one does, or asks for history."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import pytest

from lrpilot import core
from lrpilot.core import _state

T = TypeVar("T")

Question = Callable[[core.RunState], object]


@contextmanager
def marks_every(count: int) -> Iterator[None]:
    """Keep marks so often that short runs have some."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_state, "MARK_EVERY", count)
        yield


def trimmed(state: core.RunState, progress: int) -> core.RunState:
    """Return a copy that is trimmed at `progress` and went through a snapshot after that."""
    copy = core.restore_snapshot(state.snapshot())
    copy.trim(progress)
    return core.restore_snapshot(copy.snapshot())


def check_trimmed(name: str, payloads: Sequence[bytes], cut: int, progress: int) -> int:
    """Trim the state after `cut` events and fold on; return how often it asked for history.

    After each event it must be what the whole state is once that is trimmed at the same place.
    """
    whole = core.fold(name, payloads[:cut])
    part = trimmed(whole, progress)
    assert part.floor <= max(progress, 0)
    asked = 0
    check_answers(part, whole)
    for payload in payloads[cut:]:
        event = core.decode(payload)
        while True:
            before = part.snapshot()
            _, needed = _tried(part, partial(part.apply, event, payload))
            if needed is None:
                break
            asked += 1
            assert part.snapshot() == before, f"{event} asks for history and changes something"
            part = trimmed(whole, needed)
        whole.apply(event, payload)
        assert part.snapshot() == trimmed(whole, part.floor).snapshot(), f"other bytes: {event}"
        # Trimmed again in time, as a live run is.
        if whole.seq % 5 == 0:
            part.trim(max(part.floor, progress))
    check_answers(part, whole)
    return asked


def check_answers(part: core.RunState, whole: core.RunState) -> None:
    """Ask a trimmed state and the whole one the same questions."""
    before = part.snapshot()
    general: dict[str, Question] = {
        name: lambda state, name=name: getattr(state, name)  # type: ignore[misc]
        for name in (
            "exists", "horizon", "progress", "has_losses", "losses", "late_losses", "loss", "etag",
            "permitted", "frontier", "in_use",
        )
    }  # fmt: skip
    for name, question in general.items():
        if name not in ("horizon", "progress", "etag") or whole.exists:
            assert repr(question(part)) == repr(question(whole)), name
    if not whole.attempt:
        return
    # Also by a permit that the trimmed one dropped.
    permits = [item.seq for item in whole.permits]
    offers = {0, *permits[:1], *permits[-2:]}
    for at in range(whole.progress + 12):
        for name, question in _questions(at, offers).items():
            expected = _answer(question, whole)
            got, needed = _tried(part, partial(_answer, question, part))
            if needed is None:
                assert got == expected, f"{name} at {at}: {got}, and the whole says {expected}"
    assert part.snapshot() == before


def _questions(at: int, offers: Iterable[int]) -> dict[str, Question]:
    return {
        **{f"declaration by offer {offer}": _declare(at, offer) for offer in offers},
        "observation": lambda state: [state.observation(at, tries) for tries in range(3)],
        "record": lambda state: state.records.at(at),
        "last record": lambda state: state.records.last_below(at),
        "values": lambda state: state.values(at),
        "declared values": lambda state: state.declared_values(at),
        "saved state": lambda state: core.save_state(state, at),
        "history": lambda state: state.history_differs(max(0, state.seq - 5), at),
        "values asked for": lambda state: core.get_values(state, core.ValuesRequest(begin=at)),
        "retry": lambda state: _retry(state, at),
        "resume": lambda state: core.open_attempt(
            state, core.OpenRequest(request_id="another", progress=at, token="0" * 32)
        ),
        "what a client holds": lambda state: core.missing(
            state,
            state.attempt,
            state.token,
            core.Held(begin=at, steps=2, digest=b"another", offer=max(0, state.seq - at)),
        ),
    }


def _retry(state: core.RunState, at: int) -> object:
    rank = state.reporters.ranks[-1]
    incarnation = state.reporters.incarnation(rank)
    said = [core.Report(at, 1.0, 1.0, at + 1)]
    return core.report_losses(state, said, rank=rank, incarnation=incarnation)


def _declare(at: int, offer: int) -> Question:
    return lambda state: core.declare_values(
        state, [_block(state, at)], holder=state.holder, offer=offer
    )


def _block(state: core.RunState, at: int) -> core.Block:
    rates, decays = state.values(at)
    return core.Block(at, 1, len(rates), rates, decays)


def _tried(state: core.RunState, work: Callable[[], T]) -> tuple[T | None, int | None]:
    """Do something with a trimmed state; return its result, or where history is asked for."""
    try:
        return work(), None
    except core.HistoryNeeded as error:
        needed = error.progress
    assert 0 <= needed < state.floor, f"{needed} was not dropped: the floor is {state.floor}"
    return None, needed


def _answer(question: Question, state: core.RunState) -> str:
    try:
        return repr(question(state))
    except core.LrpilotError as error:
        return f"{type(error).__name__}: {error}"
