"""What every store promises, asked of each in turn."""

import random
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lrpilot.server import _memory_store, _packing
from lrpilot.server._memory_store import MemoryStore
from lrpilot.server._packing import PackedLog
from lrpilot.server._segments import unpack
from lrpilot.server._sql_store import open_store
from lrpilot.server._store import (
    MAX_SEQ,
    Append,
    LogRow,
    Segment,
    SeqTaken,
    Snapshot,
    Store,
    StoreUnavailable,
)
from tests.packing import compact_all

POSTGRES = pytest.param("postgresql", marks=pytest.mark.needs_program("postgres"))


@pytest.fixture(params=["memory", "sqlite", POSTGRES])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    opened: Store
    if request.param == "memory":
        opened = MemoryStore()
    elif request.param == "sqlite":
        opened = open_store(tmp_path / "data")
    else:
        opened = open_store(request.getfixturevalue("postgres"))
    yield opened
    opened.close()


def row(seq: int, mark: str = "") -> LogRow:
    return LogRow(seq, f"{mark}{seq}".encode(), f"digest-{mark}{seq}", 1_000_000_000 + seq % 1000)


def rows(first: int, last: int, mark: str = "") -> tuple[LogRow, ...]:
    return tuple(row(seq, mark) for seq in range(first, last + 1))


def put(store: Store, run: str, first: int, last: int, *, create: bool = False) -> None:
    assert store.append([Append(run, rows(first, last), create)]) == [None]


def refused(store: Store, append: Append) -> SeqTaken:
    (result,) = store.append([append])
    assert isinstance(result, SeqTaken)
    return result


class TestAppend:
    def test_what_goes_in_comes_out(self, store: Store) -> None:
        payload = bytes(range(256)) * 40
        given = LogRow(1, payload, "d" * 64, 1_700_000_000_123_456_789)
        assert store.append([Append("a", (given,), create=True)]) == [None]
        (got,) = store.read("a")
        assert got == given
        assert type(got.payload) is bytes

    def test_an_empty_payload(self, store: Store) -> None:
        assert store.append([Append("a", (LogRow(1, b"", "", 0),), create=True)]) == [None]
        assert store.read("a") == [LogRow(1, b"", "", 0)]

    def test_a_run_goes_on(self, store: Store) -> None:
        put(store, "a", 1, 2, create=True)
        put(store, "a", 3, 3)
        put(store, "a", 4, 6)
        assert store.read("a") == list(rows(1, 6))

    def test_an_empty_batch(self, store: Store) -> None:
        assert store.append([]) == []

    def test_a_new_run_may_begin_anywhere(self, store: Store) -> None:
        put(store, "restored", 41, 42, create=True)
        put(store, "restored", 43, 43)
        assert store.read("restored") == list(rows(41, 43))
        assert store.read("restored", 41) == list(rows(42, 43))

    def test_the_greatest_seq(self, store: Store) -> None:
        put(store, "a", MAX_SEQ, MAX_SEQ, create=True)
        assert store.head("a") == (MAX_SEQ, f"digest-{MAX_SEQ}")

    @pytest.mark.parametrize("first", [1, 2, 3])
    def test_a_taken_seq_is_refused(self, store: Store, first: int) -> None:
        put(store, "a", 1, 3, create=True)
        conflict = refused(store, Append("a", rows(first, first + 4, "late-")))
        assert (conflict.run, conflict.seq, conflict.last_seq) == ("a", first, 3)
        assert store.read("a") == list(rows(1, 3))

    def test_a_gap_is_refused(self, store: Store) -> None:
        put(store, "a", 1, 3, create=True)
        conflict = refused(store, Append("a", rows(5, 6)))
        assert (conflict.run, conflict.seq, conflict.last_seq) == ("a", 5, 3)
        assert store.read("a") == list(rows(1, 3))

    def test_another_log_of_the_same_length_is_refused(self, store: Store) -> None:
        put(store, "a", 1, 3, create=True)
        conflict = refused(store, Append("a", rows(4, 4), after="digest-other-3"))
        assert (conflict.run, conflict.seq, conflict.last_seq) == ("a", 4, 3)
        assert "another log" in str(conflict)
        appends = [
            Append("a", rows(4, 5), after="digest-3"),
            Append("a", rows(6, 6), after="digest-5"),
            Append("a", rows(7, 7), after="digest-5"),
            Append("b", rows(1, 1), create=True),
            Append("b", rows(2, 2), after="digest-1"),
        ]
        results = store.append(appends)
        assert [result is None for result in results] == [True, True, False, True, True]
        assert store.read("a") == list(rows(1, 6))
        assert store.read("b") == list(rows(1, 2))

    def test_a_missing_run_is_refused(self, store: Store) -> None:
        conflict = refused(store, Append("a", rows(1, 1)))
        assert (conflict.run, conflict.seq, conflict.last_seq) == ("a", 1, None)
        assert store.runs() == []

    @pytest.mark.parametrize("first", [1, 3, 4, 9])
    def test_creating_a_run_that_exists_is_refused(self, store: Store, first: int) -> None:
        put(store, "a", 1, 3, create=True)
        conflict = refused(store, Append("a", rows(first, first, "second-"), create=True))
        assert (conflict.run, conflict.seq, conflict.last_seq) == ("a", first, 3)
        assert store.read("a") == list(rows(1, 3))

    def test_a_conflict_stops_nobody_else(self, store: Store) -> None:
        put(store, "a", 1, 1, create=True)
        put(store, "b", 1, 1, create=True)
        results = store.append(
            [
                Append("a", rows(2, 3)),
                Append("b", rows(7, 8)),
                Append("nobody", rows(1, 1)),
                Append("a", rows(1, 1), create=True),
                Append("c", rows(1, 2), create=True),
                Append("b", rows(2, 2)),
            ]
        )
        assert [result is None for result in results] == [True, False, False, False, True, True]
        assert {name: store.read(name) for name in store.runs()} == {
            "a": list(rows(1, 3)),
            "b": list(rows(1, 2)),
            "c": list(rows(1, 2)),
        }

    def test_appends_of_a_batch_see_those_before(self, store: Store) -> None:
        results = store.append(
            [
                Append("a", rows(1, 2), create=True),
                Append("a", rows(3, 3)),
                Append("a", rows(3, 3, "late-")),
                Append("a", rows(4, 4)),
                Append("a", rows(1, 1, "late-"), create=True),
            ]
        )
        assert [result is None for result in results] == [True, True, False, True, False]
        assert [result.last_seq for result in results if result is not None] == [3, 4]
        assert store.read("a") == list(rows(1, 4))

    def test_many_runs_in_one_batch(self, store: Store) -> None:
        names = [f"run-{number:04d}" for number in range(1200)]
        created = store.append([Append(name, rows(1, 1, name), create=True) for name in names])
        assert created == [None] * len(names)
        assert store.append([Append(name, rows(2, 2, name)) for name in names]) == created
        assert store.runs() == names
        assert all(store.read(name) == list(rows(1, 2, name)) for name in names[::100])

    @pytest.mark.parametrize(
        ("seqs", "text"),
        [
            ([], "at least one row"),
            ([0, 1], "seq must be 1 to"),
            ([-1], "seq must be 1 to"),
            ([MAX_SEQ + 1], "seq must be 1 to"),
            ([1, 3], "expected seq 2, got 3"),
            ([2, 2], "expected seq 3, got 2"),
            ([2, 1], "expected seq 3, got 1"),
        ],
    )
    def test_rows_that_no_log_takes(self, seqs: list[int], text: str) -> None:
        with pytest.raises(ValueError, match=text):
            Append("a", tuple(row(seq) for seq in seqs))


class TestAdopt:
    @pytest.fixture(autouse=True)
    def short(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Make segments short."""
        monkeypatch.setattr(_packing, "SEGMENT_ROWS", 5)

    @pytest.mark.parametrize("first", [1, 3])
    @pytest.mark.parametrize("count", [1, 4, 5, 6, 11, 23])
    def test_what_goes_in_comes_out(self, store: Store, first: int, count: int) -> None:
        last = first + count - 1
        store.adopt("a", PackedLog(rows(first, last)))
        assert store.head("a") == (last, f"digest-{last}")
        assert store.read("a") == list(rows(first, last))
        for after_seq in range(last + 1):
            assert (
                store.read("a", after_seq, 2)
                == list(rows(first, last))[max(0, after_seq + 1 - first) :][:2]
            )
        assert store.recent(row(last).recorded_at_ns) == ["a"]

    def test_a_log_goes_on(self, store: Store) -> None:
        store.adopt("a", PackedLog(rows(1, 13)))
        assert refused(store, Append("a", rows(3, 3, "late-"))).last_seq == 13
        assert store.append([Append("a", rows(14, 16), after="digest-13")]) == [None]
        assert store.compact("a", 16) == (0 if isinstance(store, MemoryStore) else 5)
        assert store.save_snapshot("a", snap(7))
        assert store.read("a") == list(rows(1, 16))
        assert store.delete("a")
        assert store.read("a") == []
        put(store, "a", 1, 3, create=True)
        assert store.read("a") == list(rows(1, 3))

    def test_a_run_that_exists_is_left_alone(self, store: Store) -> None:
        put(store, "a", 1, 3, create=True)
        with pytest.raises(SeqTaken) as caught:
            store.adopt("a", PackedLog(rows(1, 12, "second-")))
        assert (caught.value.run, caught.value.seq, caught.value.last_seq) == ("a", 1, 3)
        assert store.read("a") == list(rows(1, 3))

    def test_a_log_without_rows(self, store: Store) -> None:
        with pytest.raises(ValueError, match="needs at least one row"):
            store.adopt("a", PackedLog())
        assert store.runs() == []

    @pytest.mark.parametrize("seqs", [[0], [-1], [MAX_SEQ + 1], [1, 3], [2, 2], [2, 1]])
    def test_rows_that_no_log_takes(self, seqs: list[int]) -> None:
        log = PackedLog(row(seq) for seq in seqs[:-1])
        with pytest.raises(ValueError, match="expected seq"):
            log.add(row(seqs[-1]))

    def test_heavy_rows(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_packing, "SEGMENT_BYTES", 1000)
        heavy = [LogRow(seq, bytes([seq]) * 500, "", 0) for seq in range(1, 6)]
        log = PackedLog(heavy)
        assert [block[:2] for block in log.blocks] == [(1, 2), (3, 4)]
        store.adopt("a", log)
        assert store.read("a") == heavy

    def test_a_log_given_is_not_kept(self, store: Store) -> None:
        log = PackedLog(rows(1, 10))
        longer = log.followed_by(rows(11, 17))
        store.adopt("a", log)
        store.adopt("b", longer)
        log.add(row(11, "other-"))
        log.tail.clear()
        assert store.read("a") == list(rows(1, 10))
        assert store.read("b") == list(rows(1, 17))


class TestRead:
    @pytest.mark.parametrize("first", [1, 4])
    def test_pages(self, store: Store, first: int) -> None:
        put(store, "a", first, 10, create=True)
        put(store, "b", 1, 20, create=True)
        for after_seq in [-5, 0, 1, 4, 9, 10, 11, MAX_SEQ, MAX_SEQ + 1]:
            after = [given for given in rows(first, 10) if given.seq > after_seq]
            for limit in [None, 0, 1, 3, 10, 100]:
                assert store.read("a", after_seq, limit) == after[:limit]

    def test_page_by_page(self, store: Store) -> None:
        put(store, "a", 1, 10, create=True)
        pages: list[LogRow] = []
        while page := store.read("a", pages[-1].seq if pages else 0, 3):
            pages += page
        assert pages == list(rows(1, 10))

    def test_a_missing_run_has_no_rows(self, store: Store) -> None:
        assert store.read("a") == []

    def test_a_negative_limit_is_refused(self, store: Store) -> None:
        with pytest.raises(ValueError, match="limit must be at least 0, got -1"):
            store.read("a", 0, -1)


class TestHead:
    def test_it_is_the_last_row(self, store: Store) -> None:
        assert store.head("a") is None
        put(store, "a", 1, 2, create=True)
        put(store, "b", 1, 9, create=True)
        assert store.head("a") == (2, "digest-2")
        put(store, "a", 3, 3)
        assert store.head("a") == (3, "digest-3")
        refused(store, Append("a", rows(3, 4, "late-")))
        assert store.head("a") == (3, "digest-3")

    def test_many_at_once(self, store: Store) -> None:
        names = [f"run-{number:04d}" for number in range(1200)]
        store.append([Append(name, rows(1, 2, name), create=True) for name in names])
        assert store.heads([]) == {}
        assert store.heads([*names, "nobody"]) == {name: (2, f"digest-{name}2") for name in names}
        assert store.heads(names[:1]) == {names[0]: store.head(names[0])}


class TestCheck:
    def test_a_store_that_is_there(self, store: Store) -> None:
        store.check()
        put(store, "a", 1, 1, create=True)
        store.check()


class TestRuns:
    NAMES = ("B", "Z", "a", "a-b", "a.b", "a/b", "aa", "b", "é", "中", "😀")
    """In order of code points; no locale orders them so."""

    def test_the_order_is_by_code_point(self, store: Store) -> None:
        for name in reversed(self.NAMES):
            put(store, name, 1, 1, create=True)
        assert store.runs() == list(self.NAMES)

    def test_pages(self, store: Store) -> None:
        for name in self.NAMES:
            put(store, name, 1, 1, create=True)
        for after_name in ["", "A", "B", "a", "a-a", "b", "😀"]:
            after = [name for name in self.NAMES if name > after_name]
            for limit in [None, 0, 1, 3, 100]:
                assert store.runs(after_name, limit) == after[:limit]

    def test_names_are_not_patterns_and_case_counts(self, store: Store) -> None:
        put(store, "a%", 1, 1, create=True)
        assert store.head("ab") is None
        assert store.head("A%") is None
        assert not store.delete("A%")

    def test_a_negative_limit_is_refused(self, store: Store) -> None:
        with pytest.raises(ValueError, match="limit must be at least 0, got -2"):
            store.runs("", -2)


class TestDelete:
    def test_another_log_of_that_name_stays(self, store: Store) -> None:
        put(store, "a", 1, 5, create=True)
        assert not store.delete("a", "digest-4")
        assert store.read("a") == list(rows(1, 5))
        assert not store.delete("b", "digest-5")
        assert store.delete("a", "digest-5")
        assert store.runs() == []

    def test_nothing_is_left(self, store: Store) -> None:
        put(store, "a", 1, 5, create=True)
        put(store, "b", 1, 2, create=True)
        assert store.delete("a")
        assert store.runs() == ["b"]
        assert store.read("a") == []
        assert store.head("a") is None
        assert refused(store, Append("a", rows(6, 6))).last_seq is None
        assert store.read("b") == list(rows(1, 2))

    def test_a_missing_run(self, store: Store) -> None:
        put(store, "b", 1, 1, create=True)
        assert not store.delete("a")
        assert store.runs() == ["b"]

    def test_the_name_can_be_used_again(self, store: Store) -> None:
        put(store, "a", 1, 5, create=True)
        assert store.delete("a")
        assert store.append([Append("a", rows(1, 2, "new-"), create=True)]) == [None]
        assert store.read("a") == list(rows(1, 2, "new-"))
        assert store.delete("a")
        assert not store.delete("a")


class TestRecent:
    def test_the_last_row_of_a_run_counts(self, store: Store) -> None:
        def recorded(*times_ns: int) -> tuple[LogRow, ...]:
            return tuple(LogRow(seq, b"", "", ns) for seq, ns in enumerate(times_ns, 1))

        assert store.recent(0) == []
        store.append([Append("b", recorded(5, 3), create=True)])
        store.append([Append("é", recorded(4), create=True)])
        store.append([Append("Z", recorded(1, 9), create=True)])
        assert store.recent(0) == store.recent(3) == ["Z", "b", "é"]
        assert store.recent(4) == ["Z", "é"]
        assert store.recent(5) == store.recent(9) == ["Z"]
        assert store.recent(10) == []
        store.append([Append("b", (LogRow(3, b"", "", 10),))])
        assert store.recent(10) == ["b"]
        store.delete("b")
        assert store.recent(10) == []


def snap(seq: int, floor: int = 0, mark: str = "") -> Snapshot:
    return Snapshot(seq, f"digest-{mark}{seq}", floor, f"fold-{mark}{seq}".encode())


class TestSnapshots:
    def test_what_goes_in_comes_out(self, store: Store) -> None:
        given = LogRow(1, b"", "d" * 64, 0)
        store.append([Append("a", (given,), create=True)])
        assert store.snapshot("a") is None
        saved = Snapshot(1, "d" * 64, MAX_SEQ, bytes(range(256)) * 1000)
        assert store.save_snapshot("a", saved)
        got = store.snapshot("a")
        assert got == saved
        assert got is not None
        assert type(got.data) is bytes

    def test_only_one_of_the_log_that_is_there(self, store: Store) -> None:
        assert not store.save_snapshot("a", snap(4))
        put(store, "a", 4, 6, create=True)
        assert not store.save_snapshot("a", snap(3))
        assert not store.save_snapshot("a", snap(7))
        assert not store.save_snapshot("a", snap(5, mark="other-"))
        assert store.snapshot("a") is None
        assert store.save_snapshot("a", snap(4))
        assert store.save_snapshot("a", snap(6))
        assert store.snapshot("a") == snap(6)

    def test_it_goes_with_its_run(self, store: Store) -> None:
        put(store, "a", 1, 3, create=True)
        put(store, "b", 1, 3, create=True)
        for run in "ab":
            assert store.save_snapshot(run, snap(2))
        assert store.delete("a")
        assert store.snapshot("a") is None
        put(store, "a", 1, 3, create=True)
        assert store.snapshot("a") is None
        assert store.snapshot("b") == snap(2)

    def test_one_in_the_place_of_another(self, store: Store) -> None:
        put(store, "a", 1, 3, create=True)
        assert store.save_snapshot("a", snap(2))
        assert store.save_snapshot("a", snap(2, floor=7))
        assert store.snapshot("a") == snap(2, floor=7)

    @pytest.fixture
    def milestones(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let milestones lie 10 rows apart."""
        monkeypatch.setattr(_memory_store, "MILESTONE_ROWS", 10)

    @pytest.mark.usefixtures("milestones")
    def test_the_newest_and_milestones_are_kept(self, store: Store) -> None:
        put(store, "a", 1, 50, create=True)
        for seq in range(3, 48, 4):
            assert store.save_snapshot("a", snap(seq))
            found = []
            before: int | None = None
            while (one := store.snapshot("a", before_seq=before)) is not None:
                found.append(one.seq)
                before = one.seq
            assert found == sorted({seq, *range(3, seq, 12)}, reverse=True)
        # One that came late, and is none of those to keep.
        assert store.save_snapshot("a", snap(20))
        assert store.snapshot("a", before_seq=21) == snap(15)

    @pytest.mark.usefixtures("milestones")
    def test_the_newest_that_is_asked_for(self, store: Store) -> None:
        put(store, "a", 1, 50, create=True)
        kept = [snap(10, floor=0), snap(20, floor=5), snap(30, floor=5), snap(40, floor=9)]
        for one in kept:
            assert store.save_snapshot("a", one)
        for floor in [None, 0, 4, 5, 8, 9, MAX_SEQ + 1]:
            for before_seq in [None, 0, 10, 11, 30, 31, 41, MAX_SEQ, MAX_SEQ + 1]:
                fit = [
                    one
                    for one in kept
                    if (floor is None or one.floor <= floor)
                    and (before_seq is None or one.seq < before_seq)
                ]
                expected = fit[-1] if fit else None
                assert store.snapshot("a", floor, before_seq) == expected
        assert store.snapshot("a", floor=-1) is None
        assert store.snapshot("nobody") is None

    @pytest.mark.parametrize(
        ("seq", "floor", "text"),
        [
            (0, 0, "seq must be 1 to 9223372036854775807, got 0"),
            (MAX_SEQ + 1, 0, "seq must be 1 to"),
            (1, -1, "floor must be 0 to 9223372036854775807, got -1"),
            (1, MAX_SEQ + 1, "floor must be 0 to"),
        ],
    )
    def test_one_of_no_log(self, seq: int, floor: int, text: str) -> None:
        with pytest.raises(ValueError, match=text):
            Snapshot(seq, "", floor, b"")


class TestCompact:
    """Rows in memory are not packed, and nobody must notice."""

    @pytest.fixture(autouse=True)
    def short(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Make segments short, and let but one be kept unpacked."""
        monkeypatch.setattr(_packing, "SEGMENT_ROWS", 5)
        monkeypatch.setattr(_packing, "CACHED_SEGMENTS", 1)

    @pytest.mark.parametrize("first", [1, 3])
    def test_no_read_shows_a_difference(self, store: Store, first: int) -> None:
        put(store, "a", first, 23, create=True)
        put(store, "b", 1, 23, create=True)
        is_packed = compact_all(store, "a", 17) > 0
        assert is_packed == (not isinstance(store, MemoryStore))
        assert store.compact("a", 17) == 0
        assert store.head("a") == (23, "digest-23")
        assert store.recent(0) == ["a", "b"]
        for after_seq in [-5, *range(25), MAX_SEQ, MAX_SEQ + 1]:
            after = [given for given in rows(first, 23) if given.seq > after_seq]
            for limit in [None, 0, 1, 4, 5, 6, 11, 100]:
                assert store.read("a", after_seq, limit) == after[:limit]
        assert store.read("b") == list(rows(1, 23))

    def test_whole_segments_and_never_the_last_row(self, store: Store) -> None:
        packs = not isinstance(store, MemoryStore)
        put(store, "a", 1, 10, create=True)
        assert store.compact("nobody", MAX_SEQ) == 0
        assert store.compact("a", 4) == 0
        assert store.compact("a", 5) == 5 * packs
        assert store.compact("a", MAX_SEQ + 1) == 0
        put(store, "a", 11, 11)
        assert store.compact("a", MAX_SEQ + 1) == 5 * packs
        assert store.read("a") == list(rows(1, 11))

    def test_a_log_goes_on(self, store: Store) -> None:
        put(store, "a", 1, 12, create=True)
        compact_all(store, "a", 12)
        assert refused(store, Append("a", rows(3, 5, "late-"))).last_seq == 12
        assert refused(store, Append("a", rows(1, 1, "late-"), create=True)).last_seq == 12
        assert store.append([Append("a", rows(13, 14), after="digest-12")]) == [None]
        compact_all(store, "a", 14)
        assert store.read("a") == list(rows(1, 14))

    def test_heavy_rows_make_a_segment_earlier(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_packing, "SEGMENT_BYTES", 1000)
        heavy = [LogRow(seq, bytes([seq]) * 500, "", 0) for seq in range(1, 6)]
        store.append([Append("a", tuple(heavy), create=True)])
        assert compact_all(store, "a", 5) == (0 if isinstance(store, MemoryStore) else 4)
        assert store.read("a") == heavy
        assert store.read("a", 3, 1) == heavy[3:4]

    def test_a_snapshot_in_the_middle_of_a_segment(self, store: Store) -> None:
        put(store, "a", 1, 12, create=True)
        compact_all(store, "a", 12)
        assert not store.save_snapshot("a", snap(3, mark="other-"))
        assert store.save_snapshot("a", snap(3))
        assert store.snapshot("a") == snap(3)

    def test_a_deleted_run_leaves_nothing(self, store: Store) -> None:
        put(store, "a", 1, 12, create=True)
        compact_all(store, "a", 12)
        assert store.delete("a")
        assert store.read("a") == []
        put(store, "a", 1, 3, create=True)
        assert store.read("a") == list(rows(1, 3))
        put(store, "a", 4, 12)
        compact_all(store, "a", 12)
        assert store.read("a") == list(rows(1, 12))


class TestSegments:
    """What is packed, with what somebody made of it."""

    @pytest.fixture(autouse=True)
    def short(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Make segments short."""
        monkeypatch.setattr(_packing, "SEGMENT_ROWS", 5)

    def packed(self, store: Store, run: str, last: int, mark: str = "") -> list[Segment]:
        """Write a run down and pack it."""
        assert store.append([Append(run, rows(1, last, mark), create=True)]) == [None]
        compact_all(store, run, last)
        return store.segments(run)

    def test_they_are_what_was_packed(self, store: Store) -> None:
        found = self.packed(store, "a", 13)
        if isinstance(store, MemoryStore):
            assert found == []
            return
        assert [(one.first_seq, one.last_seq, one.overview) for one in found] == [
            (1, 5, None),
            (6, 10, None),
        ]
        for one in found:
            block = store.segment("a", one)
            assert block is not None
            assert unpack(block) == list(rows(one.first_seq, one.last_seq))
        for after_seq, left in [(-1, 2), (4, 2), (5, 1), (9, 1), (10, 0), (MAX_SEQ + 1, 0)]:
            assert store.segments("a", after_seq) == found[len(found) - left :]
        assert store.segments("nobody") == []
        assert store.segment("nobody", found[0]) is None

    def test_an_overview_is_kept_with_its_segment(self, store: Store) -> None:
        self.packed(store, "b", 13)
        for one in self.packed(store, "a", 13):
            for text in (b"first", b"", b"again"):
                given = replace(one, overview=text)
                assert store.save_overview("a", given)
                assert given in store.segments("a")
        assert all(one.overview is None for one in store.segments("b"))

    def test_one_of_what_is_not_there_is_not_kept(self, store: Store) -> None:
        gone = Segment(1, 5, "0" * 64, b"of none")
        assert not store.save_overview("a", gone)
        for one in self.packed(store, "a", 6):
            gone = replace(one, overview=b"old")
            assert store.save_overview("a", gone)
        store.delete("a")
        assert not store.save_overview("a", gone)
        for one in self.packed(store, "a", 6, mark="other-"):
            assert one.overview is None
            assert store.segment("a", gone) is None
        assert not store.save_overview("a", gone)


class TestSize:
    def test_what_is_on_disk(self, store: Store) -> None:
        empty = store.size()
        given = LogRow(1, random.Random(1).randbytes(1 << 20), "", 0)
        store.append([Append("a", (given,), create=True)])
        grown = store.size() - empty
        assert grown == 0 if isinstance(store, MemoryStore) else 1 << 20 <= grown < 3 << 20


class TestCopies:
    def test_a_list_given_is_not_kept(self, store: Store) -> None:
        batch = [Append("a", rows(1, 2), create=True)]
        store.append(batch)
        batch.clear()
        assert store.read("a") == list(rows(1, 2))

    def test_a_list_got_is_not_the_stores(self, store: Store) -> None:
        put(store, "a", 1, 3, create=True)
        store.read("a").pop()
        store.runs().clear()
        assert store.read("a") == list(rows(1, 3))
        assert store.runs() == ["a"]

    def test_a_list_got_does_not_grow(self, store: Store) -> None:
        put(store, "a", 1, 1, create=True)
        before = store.read("a")
        put(store, "a", 2, 2)
        assert before == list(rows(1, 1))


class TestClose:
    @pytest.mark.parametrize(
        "use",
        [
            lambda store: store.append([Append("a", rows(1, 1), create=True)]),
            lambda store: store.adopt("a", PackedLog(rows(1, 1))),
            lambda store: store.read("a"),
            lambda store: store.head("a"),
            lambda store: store.heads(["a"]),
            lambda store: store.runs(),
            lambda store: store.delete("a"),
            lambda store: store.check(),
            lambda store: store.recent(0),
            lambda store: store.save_snapshot("a", snap(1)),
            lambda store: store.snapshot("a"),
            lambda store: store.compact("a", 1),
            lambda store: store.segments("a"),
            lambda store: store.segment("a", Segment(1, 1, "", None)),
            lambda store: store.save_overview("a", Segment(1, 1, "", b"")),
            lambda store: store.size(),
        ],
        ids=[
            *["append", "adopt", "read", "head", "heads", "runs", "delete", "check"],
            *["recent", "save_snapshot", "snapshot", "compact", "segments", "segment"],
            *["save_overview", "size"],
        ],
    )
    def test_nothing_works_afterwards(self, store: Store, use: Callable[[Store], Any]) -> None:
        store.close()
        store.close()
        with pytest.raises(StoreUnavailable, match="the store is closed"):
            use(store)


def together(works: list[Callable[[], Any]]) -> list[Any]:
    """Call every function on a thread of its own, all at one moment."""
    barrier = threading.Barrier(len(works))

    def start(work: Callable[[], Any]) -> Any:
        barrier.wait(timeout=30)
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result() for future in [pool.submit(start, work) for work in works]]


class TestThreads:
    THREADS = 8

    @pytest.fixture(autouse=True)
    def hurry(self) -> Iterator[None]:
        """Let threads take turns within the shortest of methods."""
        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        yield
        sys.setswitchinterval(before)

    def test_one_wins_each_seq_of_a_run(self, store: Store) -> None:
        put(store, "a", 1, 1, create=True)

        def contend(mark: str) -> list[LogRow]:
            won = []
            seq = 2
            while seq <= 30:
                given = row(seq, mark)
                (conflict,) = store.append([Append("a", (given,))])
                if conflict is None:
                    won.append(given)
                    seq += 1
                else:
                    assert conflict.last_seq is not None
                    seq = conflict.last_seq + 1
            return won

        wins = together([partial(contend, f"{n}-") for n in range(self.THREADS)])
        won = [given for of_one in wins for given in of_one]
        assert store.read("a", 1) == sorted(won, key=lambda given: given.seq)

    def test_one_creates_a_run(self, store: Store) -> None:
        appends = [Append("a", rows(1, 3, f"{n}-"), create=True) for n in range(self.THREADS)]
        results = together([partial(store.append, [append]) for append in appends])
        (winner,) = [a for a, result in zip(appends, results, strict=True) if result == [None]]
        assert store.read("a") == list(winner.rows)

    def test_one_makes_a_run_of_a_log(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_packing, "SEGMENT_ROWS", 5)

        def adopt(mark: str) -> str | None:
            try:
                store.adopt("a", PackedLog(rows(1, 12, mark)))
            except SeqTaken:
                return None
            return mark

        won = together([partial(adopt, f"{n}-") for n in range(self.THREADS)])
        (winner,) = [mark for mark in won if mark is not None]
        assert store.read("a") == list(rows(1, 12, winner))

    def test_each_its_own_run(self, store: Store) -> None:
        def fill(name: str) -> None:
            put(store, name, 1, 1, create=True)
            for seq in range(2, 20):
                put(store, name, seq, seq)

        names = [f"run-{n}" for n in range(self.THREADS)]
        together([partial(fill, name) for name in names])
        assert {name: store.read(name) for name in store.runs()} == {
            name: list(rows(1, 19)) for name in names
        }

    def test_a_reader_sees_whole_appends(self, store: Store) -> None:
        put(store, "a", 1, 5, create=True)
        written = threading.Event()

        def write() -> None:
            for first in range(6, 100, 5):
                put(store, "a", first, first + 4)
            written.set()

        def read() -> None:
            seen = 0
            while True:
                last_look = written.is_set()
                got = store.read("a")
                assert got == list(rows(1, len(got)))
                assert len(got) % 5 == 0
                assert len(got) >= seen
                seen = len(got)
                if last_look:
                    assert seen == 100
                    return

        together([write, read, read])

    def test_a_log_is_packed_by_many_while_it_grows_and_is_read(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_packing, "SEGMENT_ROWS", 5)
        put(store, "a", 1, 1, create=True)
        written = threading.Event()

        def write() -> None:
            for seq in range(2, 100):
                put(store, "a", seq, seq)
            written.set()

        def pack() -> int:
            count = 0
            while not written.is_set():
                count += store.compact("a", MAX_SEQ)
            return count + compact_all(store, "a", MAX_SEQ)

        def read() -> None:
            while not written.is_set():
                got = store.read("a")
                assert got == list(rows(1, len(got)))
                middle = len(got) // 2
                assert store.read("a", middle, 1) == list(rows(middle + 1, middle + 1))

        _, *counts, _, _ = together([write, pack, pack, pack, read, read])
        assert sum(counts) == (0 if isinstance(store, MemoryStore) else 95)
        assert store.read("a") == list(rows(1, 99))
