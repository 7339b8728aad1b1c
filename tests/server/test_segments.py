"""Packed rows come back byte for byte, or it is said that they cannot."""

import math
import os
import random
from collections.abc import Callable, Collection
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lrpilot import core
from lrpilot.server import _segments
from lrpilot.server._segments import Corrupt, checksum, pack, read_losses, unpack
from lrpilot.server._store import MAX_SEQ, LogRow

GOLDEN = Path(__file__).parents[1] / "golden" / "segment_1.bin"

GENESIS = "0" * 64


def chained(payloads: list[bytes], first: int = 1, step_ns: int = 1) -> list[LogRow]:
    """Return rows as a server appends them."""
    digests = list(accumulate(payloads, core.chain, initial=GENESIS))[1:]
    return [
        LogRow(seq, payload, digest, 1_700_000_000_000_000_000 + seq % 5000 * step_ns)
        for seq, (payload, digest) in enumerate(zip(payloads, digests, strict=True), first)
    ]


def job(steps: int) -> list[bytes]:
    """Return the events of a job with three groups, as steps of half a second leave them."""
    spec = core.parse_spec(
        {
            "name": "job",
            "total": 1_000_000,
            "learning_rate": {"peak": 3e-4, "warmup": 100, "decay": {"style": "cosine"}},
            "weight_decay": {"start": 0.01, "end": 0.1, "style": "cosine"},
            "groups": [{"name": "a"}, {"name": "b", "peak": 1e-4}, {"name": "c", "peak": 6e-4}],
            "feedback": {"delay": 8},
            "policies": [{"kind": "plateau"}],
        }
    )
    state = core.RunState("job")
    payloads: list[bytes] = []

    def put(events: list[core.Event]) -> None:
        payloads.extend(data for _, data, _ in core.rows(state, events))
        for event in events:
            state.apply(event)

    put(core.create_run(state, spec, "create"))
    put(core.open_attempt(state, core.OpenRequest(request_id="open", incarnation="it")))
    losses = random.Random(1)
    held = 0
    for n in range(steps):
        if held - n < 4:
            block = core.get_values(state, core.ValuesRequest(begin=held, in_use=n))
            assert isinstance(block, core.Recorded)
            put([block])
            held = state.horizon
        report = core.Report(n, 2 + math.exp(-n / 1000) + losses.gauss(0, 0.05), 1.0, n + 1)
        events, _ = core.report_losses(state, [report], rank=0, incarnation="it")
        put(events)
    return payloads


ODD_NUMBERS = (
    *("-0", "0", "-0.0", "007", "1.50", "1E5", "1e5", "1e+05", "1e999", "9" * 5000, "-", "1."),
    *("9223372036854775807", "9223372036854775808", "-9223372036854775808", "--1", "²"),
)

NUMBERS = (
    st.integers(-(2**70), 2**70).map(str)
    | st.floats(allow_nan=False).map(repr)
    | st.sampled_from(ODD_NUMBERS)
)

PIECES = (
    NUMBERS
    | st.lists(NUMBERS, max_size=5).map(lambda items: f"[{','.join(items)}]")
    | st.text(max_size=5)
    | st.sampled_from(['"', "\\", '"\\"1', "%", "%s", "%(a)d", "[", "]", ",", "{", "\n", "\0"])
)

PAYLOADS = st.binary(max_size=40) | st.lists(PIECES, max_size=6).map(
    lambda pieces: "".join(pieces).encode("utf-8", "surrogatepass")
)

NUMBER_64 = st.integers(-(2**63), 2**63 - 1)


@st.composite
def logs(draw: st.DrawFn) -> list[LogRow]:
    """Draw rows of a log, whose digests are those of the chain, or are not."""
    some = st.sampled_from(draw(st.lists(PAYLOADS, min_size=1, max_size=4)))
    payloads = draw(st.lists(some | PAYLOADS, min_size=1, max_size=30))
    first = draw(st.integers(1, 10) | st.just(MAX_SEQ - len(payloads) + 1))
    rows = chained(payloads, first)
    if draw(st.booleans()):
        digests = st.text(max_size=70) | st.just(rows[-1].digest)
        rows = [
            LogRow(row.seq, row.payload, draw(digests | st.just(row.digest)), draw(NUMBER_64))
            for row in rows
        ]
    return rows


class TestRoundTrip:
    @given(logs())
    @example(chained([b""]))
    @example(chained([b"[1.0,-0.0]", b"[1.0,0.0]", b"[1,2]", b"[1,2.0]", b"[01]", b"[1e5]"]))
    @example([LogRow(1, b"", "\udc80", -(2**63)), LogRow(2, b"", "é", 2**63 - 1)])
    def test_any_rows(self, rows: list[LogRow]) -> None:
        assert unpack(pack(rows)) == rows

    @given(
        st.lists(NUMBER_64, max_size=60)
        | st.lists(st.integers(-3, 3), max_size=600).map(lambda some: list(accumulate(some)))
    )
    @example([2**63 - 1, -(2**63)] * 2)
    @example([k**3 // 7 for k in range(500)])
    def test_any_numbers(self, numbers: list[int]) -> None:
        out = _segments.ColumnWriter()
        out.column(numbers, range(1, 9))
        out.integer(2**62)
        data = _segments.ColumnReader(bytes(out.data))
        assert data.column(len(numbers)) == numbers
        assert data.integer() == 2**62

    @given(st.lists(st.floats(allow_nan=False), max_size=40), st.integers(1, 8))
    def test_lists_of_any_floats(self, floats: list[float], size: int) -> None:
        lists = [floats[at : at + size] for at in range(0, len(floats), size)]
        rows = chained(
            [b"", *(f'{{"values":{some!r}}}'.replace(" ", "").encode() for some in lists)]
        )
        assert unpack(pack(rows)) == rows


REPORTS = st.builds(
    core.Report,
    progress=st.integers(0, 50),
    loss=st.none() | st.sampled_from([1.0, 2.5, math.nan, math.inf]),
    weight=st.sampled_from([1.0, 3.0]),
    moves_to=st.integers(51, 60),
    skipped=st.sampled_from([False] * 9 + [True]),
    tries=st.sampled_from([0, 0, 1]),
    validation=st.sampled_from([{}, {}, {}, {"val": 1.5}]),
    gradient_norm=st.none() | st.sampled_from([0.5, 0.5, math.nan]),
    batch=st.none() | st.sampled_from([1, 32]),
)
PLAIN = st.builds(
    core.Report, st.integers(0, 50), st.sampled_from([1.0, 2.5]), st.just(1.0), st.integers(0, 60)
)


@st.composite
def losses_of_a_job(draw: st.DrawFn) -> list[core.Event]:
    """Draw events of which some hold losses."""
    events: list[core.Event] = []
    for attempt in range(1, draw(st.integers(1, 3)) + 1):
        several = draw(st.booleans())
        ranks: dict[str, Any] = {"reporters": (0, 1)} if several else {}
        events.append(
            core.Opened(attempt, "0" * 32, draw(st.integers(0, 5)), "", "", 0, "", **ranks)
        )
        for _ in range(draw(st.integers(0, 12))):
            said = draw(st.lists(draw(st.sampled_from([PLAIN, REPORTS])), min_size=1, max_size=3))
            rank = draw(st.integers(0, 1)) if several else None
            events += [
                core.Recorded(attempt, 0, 1, (0.5, 0.25), (0.0, 1.0), 0),
                core.Reported(attempt, draw(st.sampled_from(["@1", "nan"])), tuple(said), rank),
            ]
            if draw(st.integers(0, 5)) == 0:
                events.append(core.Waived(attempt, draw(st.integers(0, 60))))
    return events


class TestReadLosses:
    @given(losses_of_a_job())
    def test_they_are_those_of_the_rows(self, events: list[core.Event]) -> None:
        rows = chained([core.encode(event) for event in events], first=7)
        expected, found = core.LossReader(), core.LossReader()
        for row in rows:
            expected.read(row.payload)
        notable = read_losses(pack(rows), found)
        assert repr(found.attempts) == repr(expected.attempts)
        assert repr(found.state()) == repr(expected.state())
        kinds = {"reported", "recorded"}
        assert notable == [
            row.seq for row, event in zip(rows, events, strict=True) if event.kind not in kinds
        ]

    def test_a_job_of_which_little_is_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Reports are read column by column, and values not at all: then it is fast."""
        rows = chained(job(500))
        expected, found = core.LossReader(), core.LossReader()
        for row in rows:
            expected.read(row.payload)
        block = pack(rows)
        monkeypatch.setattr(core.LossReader, "_report", lambda *_: pytest.fail("read as text"))
        monkeypatch.setattr(_segments, "_floats", counted := Counted(_segments._floats))
        read_losses(block, found)
        assert found._current == expected._current
        assert counted.numbers == len(found._current.losses.values) > 0


class Counted:
    """Counts the floats that were made."""

    def __init__(self, make: Callable[[Collection[int]], tuple[float, ...]]) -> None:
        self._make, self.numbers = make, 0

    def __call__(self, numbers: Collection[int]) -> tuple[float, ...]:
        self.numbers += len(numbers)
        return self._make(numbers)


class TestSize:
    def test_a_step_of_a_job_takes_few_bytes(self) -> None:
        rows = chained(job(3000), step_ns=497_123_457)[-4096:]
        block = pack(rows)
        assert unpack(block) == rows
        reports = sum(b'"kind":"reported"' in row.payload for row in rows)
        # Of them 7 are the loss, which is noise.
        assert len(block) / reports < 20

    def test_what_does_not_change_takes_nothing(self) -> None:
        payloads = [b'{"lr":[0.1,0.1,0.1],"n":%d,"wd":0.01}' % n for n in range(4000)]
        assert len(pack(chained(payloads))) < 400


class TestCorruption:
    def test_no_byte_can_change_unnoticed(self) -> None:
        block = pack(chained(job(20)))
        for at in range(len(block)):
            changed = bytearray(block)
            changed[at] ^= 1 << at % 8
            with pytest.raises(Corrupt):
                unpack(bytes(changed))

    @pytest.mark.parametrize("size", [0, 1, 4, 5, 36, 37, 100])
    def test_part_of_a_block(self, size: int) -> None:
        with pytest.raises(Corrupt):
            unpack(pack(chained(job(20)))[:size])

    def test_a_format_to_come(self) -> None:
        block = bytearray(pack(chained([b"1"])))
        block[4] = 2
        with pytest.raises(Corrupt, match="its format is 2, and this release of lrpilot knows 1"):
            unpack(bytes(block))

    def test_blocks_are_told_apart(self) -> None:
        one, two = (pack(chained([payload])) for payload in (b"1", b"2"))
        assert checksum(one) != checksum(two)


class TestGolden:
    """What a release has packed, each later one reads."""

    def rows(self) -> list[LogRow]:
        payloads = [b"", b"\xff\0[1,2.5]%s", b'{"a":[1.5,-0.0],"b":-7}', b'{"a":[2.5],"b":8}']
        for n in range(60):
            rates = ",".join(repr(0.1 / (n + 10 * k)) for k in range(1, 4))
            payloads.append(f'{{"begin":{n},"rates":[{rates}],"who":"rank 1"}}'.encode())
        return [LogRow(40, b"odd", "no chain é", -5), *chained(payloads, first=41)]

    def test_it_is_read(self) -> None:
        if os.environ.get("LRPILOT_WRITE_GOLDEN") == "1":
            GOLDEN.write_bytes(pack(self.rows()))
        assert unpack(GOLDEN.read_bytes()) == self.rows()
