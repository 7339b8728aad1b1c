"""The values that an attempt has handed out, found again by progress."""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from lrpilot.core._errors import HistoryNeeded
from lrpilot.core._plan import Values


@dataclass(frozen=True, slots=True)
class Block:
    """Values at `begin`, `begin + stride`, …, step-major."""

    begin: int
    stride: int
    groups: int
    learning_rates: tuple[float, ...]
    weight_decays: tuple[float, ...] | None

    @property
    def steps(self) -> int:
        """Number of progresses."""
        return len(self.learning_rates) // self.groups

    @property
    def end(self) -> int:
        """First progress behind the block, on its stride."""
        return self.begin + self.steps * self.stride

    @property
    def last(self) -> int:
        """Last progress."""
        return self.end - self.stride

    def at(self, progress: int) -> Values | None:
        """Return the values at `progress`, or None where the block has none."""
        step, rest = divmod(progress - self.begin, self.stride)
        if rest or not 0 <= step < self.steps:
            return None
        part = slice(step * self.groups, (step + 1) * self.groups)
        decays = None if self.weight_decays is None else self.weight_decays[part]
        return self.learning_rates[part], decays

    def cut(self, begin: int, end: int) -> "Block | None":
        """Return the part in [begin, end), or None when it is empty."""
        first = max(0, -(-(begin - self.begin) // self.stride))
        last = min(self.steps, -(-(end - self.begin) // self.stride))
        if first >= last:
            return None
        if (first, last) == (0, self.steps):
            return self
        part = slice(first * self.groups, last * self.groups)
        return Block(
            begin=self.begin + first * self.stride,
            stride=self.stride,
            groups=self.groups,
            learning_rates=self.learning_rates[part],
            weight_decays=None if self.weight_decays is None else self.weight_decays[part],
        )

    def to_mapping(self) -> dict[str, Any]:
        """Return the block as plain data."""
        return {
            "begin": self.begin,
            "stride": self.stride,
            "groups": self.groups,
            "learning_rates": self.learning_rates,
            "weight_decays": self.weight_decays,
        }

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any]) -> "Block":
        """Return the block that `to_mapping` wrote."""
        decays = data["weight_decays"]
        return cls(
            begin=data["begin"],
            stride=data["stride"],
            groups=data["groups"],
            learning_rates=tuple(float(item) for item in data["learning_rates"]),
            weight_decays=None if decays is None else tuple(float(item) for item in decays),
        )


class Records:
    """Blocks in order of their begin. Where blocks overlap they hold the same values.

    What was recorded below `floor` is dropped, save which progress was the last: a question about
    it raises HistoryNeeded.
    """

    def __init__(self, floor: int = 0, last_below_floor: int | None = None) -> None:
        self._blocks: list[Block] = []
        self._widest = 0
        self.floor = floor
        self.last_below_floor = last_below_floor
        """Last recorded progress below `floor`; None: none was."""

    def __iter__(self) -> Iterator[Block]:
        return iter(self._blocks)

    def add(self, block: Block) -> None:
        """Add a block."""
        if block.begin < self.floor:
            below = block.cut(block.begin, self.floor)
            if below is not None:
                self.last_below_floor = max(self.last_below_floor or 0, below.last)
            part = block.cut(self.floor, block.end)
            if part is None:
                return
            block = part
        insort(self._blocks, block, key=_place)
        self._widest = max(self._widest, block.end - block.begin)

    def copy(self) -> "Records":
        """Return records that hold the same, for use on another thread."""
        same = Records(self.floor, self.last_below_floor)
        same._blocks, same._widest = list(self._blocks), self._widest
        return same

    def trim(self, progress: int) -> "Records":
        """Return the records without those below `progress`, which becomes the floor."""
        trimmed = Records(progress, self.last_below_floor)
        first = bisect_left(self._blocks, progress, key=lambda item: item.begin)
        trimmed._blocks, trimmed._widest = self._blocks[first:], self._widest
        for block in self._blocks[:first]:
            trimmed.add(block)
        return trimmed

    def begin_of_last(self, steps: int) -> int:
        """Return a progress from which on about so many steps are recorded; 0: fewer are."""
        for block in reversed(self._blocks):
            steps -= block.steps
            if steps <= 0:
                return block.begin
        return 0

    def forget(self, progress: int) -> None:
        """Drop what is recorded from `progress` on."""
        self._refuse_below_floor(progress)
        first = bisect_left(self._blocks, progress - self._widest, key=lambda item: item.begin)
        parts = (block.cut(block.begin, progress) for block in self._blocks[first:])
        # What is left of a block begins where it began: the order stays.
        self._blocks[first:] = [part for part in parts if part is not None]

    def last_below(self, progress: int) -> int | None:
        """Return the last recorded progress below `progress`, or None."""
        self._refuse_below_floor(progress)
        last = None
        index = bisect_left(self._blocks, progress, key=lambda item: item.begin)
        while index and (last is None or self._blocks[index - 1].begin + self._widest > last):
            index -= 1
            block = self._blocks[index]
            step = min(block.steps - 1, (progress - 1 - block.begin) // block.stride)
            last = max(last or 0, block.begin + step * block.stride)
        return self.last_below_floor if last is None else last

    def at(self, progress: int) -> Values | None:
        """Return the recorded values at `progress`, or None."""
        for block in self._covering(progress):
            values = block.at(progress)
            if values is not None:
                return values
        return None

    def block(self, progress: int, stride: int) -> Block | None:
        """Return the block on `stride` that holds `progress`, or None."""
        for block in self._covering(progress):
            if block.stride == stride and block.at(progress) is not None:
                return block
        return None

    def from_on(self, begin: int, stride: int, count: int) -> Block | None:
        """Return what is recorded on `stride` from `begin` on without a gap, at most `count` steps.

        Ranks ask at different moments, each for what it lacks: blocks are small where many do.
        """
        end = begin + count * stride
        parts: list[Block] = []
        while (at := parts[-1].end if parts else begin) < end:
            block = self.block(at, stride)
            part = None if block is None else block.cut(at, end)
            if part is None:
                break
            parts.append(part)
        if len(parts) < 2:
            return parts[0] if parts else None
        decays = [part.weight_decays for part in parts if part.weight_decays is not None]
        return Block(
            begin=begin,
            stride=stride,
            groups=parts[0].groups,
            learning_rates=tuple(chain.from_iterable(part.learning_rates for part in parts)),
            weight_decays=tuple(chain.from_iterable(decays)) if decays else None,
        )

    def between(self, begin: int, end: int) -> list[Block]:
        """Return what is recorded in [begin, end), in order."""
        self._refuse_below_floor(begin)
        parts = (block.cut(begin, end) for block in self._blocks)
        return sorted((part for part in parts if part is not None), key=_place)

    def _refuse_below_floor(self, progress: int) -> None:
        if progress < self.floor:
            raise HistoryNeeded(progress)

    def _covering(self, progress: int) -> Iterator[Block]:
        self._refuse_below_floor(progress)
        index = bisect_right(self._blocks, progress, key=lambda item: item.begin)
        while index:
            index -= 1
            block = self._blocks[index]
            if block.begin + self._widest <= progress:
                return
            if progress < block.end:
                yield block


def _place(block: Block) -> tuple[int, int, int]:
    """Return what blocks are kept in order of: two alike in it hold the same values.

    So the order does not depend on when which of them was added, or cut at a floor.
    """
    return block.begin, block.stride, block.steps
