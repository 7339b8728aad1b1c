"""Packing rows of a log into a block of bytes, and back.

Payloads are mostly JSON in which little but the numbers changes from one row to the next. So each
is taken apart into a template, its text without the numbers, and the numbers, which are kept
column by column: the n-th numbers of all payloads with one template. A list of numbers is one
place in a template, whatever its length. A column is stored as differences, of the order that
makes them smallest (the LR of a smooth schedule leaves little of its third ones), byte by byte:
first all lowest bytes, and so on. What comes out is compressed.

A number is taken out only where it would be written again as it was read, so that payloads come
back byte for byte, also those that are no JSON. Digests that continue the hash chain of the row
before are computed again; others are stored.

The first bytes are a magic number and the number of the format, and the last ones a checksum.
"""

import hashlib
import itertools
import json
import re
import struct
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lrpilot import core
from lrpilot.server._store import LogRow

_MAGIC = b"LRPS"
_FORMAT = 1
_HEAD_BYTES = len(_MAGIC) + 1
_CHECKSUM_BYTES = 32

_LEAST, _MOST = -(2**63), 2**63 - 1
"""What a column holds."""

_STRIDES = range(1, 9)
"""Distances between the numbers of a list that may belong together, as those of one group do."""

_ORDERS = 3
"""The greatest order of differences that is tried."""

_SAMPLE = 256
"""Numbers of a column by which stride and order are chosen."""

_NUMBER = r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?"
_TOKEN = re.compile(
    # Strings are left alone; one that does not end reaches to the end.
    rf'"(?:[^"\\]|\\.)*"?|(\[{_NUMBER}(?:,{_NUMBER})*\])|({_NUMBER})',
    re.DOTALL,
)

_INT, _FLOAT, _INTS, _FLOATS = b"ifIF"
"""Kinds of places in a template: a number, or a list of numbers."""


class Corrupt(ValueError):
    """A block is not one that `pack` of this release made."""


def checksum(block: bytes) -> str:
    """Return what tells a block from every other one."""
    return block[-_CHECKSUM_BYTES:].hex()


def pack(rows: Sequence[LogRow]) -> bytes:
    """Return rows, at least one, each with the `seq` after that of the row before, as a block."""
    out = ColumnWriter()
    out.integer(rows[0].seq)
    out.integer(len(rows))
    out.column([row.recorded_at_ns for row in rows])
    _pack_digests(out, rows)
    _pack_payloads(out, [row.payload for row in rows])
    block = _MAGIC + bytes([_FORMAT]) + zlib.compress(out.data, 9)
    return block + hashlib.sha256(block).digest()


def unpack(block: bytes) -> list[LogRow]:
    """Return the rows of a block. Raises Corrupt."""
    data = _opened(block)
    first = data.integer()
    count = data.integer()
    times = data.column(count)
    stored = _stored_digests(data)
    payloads = _unpack_payloads(data, count)
    digests = _digests(stored, payloads)
    return list(map(LogRow, range(first, first + count), payloads, digests, times))


def read_losses(block: bytes, reader: core.LossReader) -> list[int]:
    """Let a reader have the rows of a block; return the seqs of those that are no routine.

    Raises Corrupt.

    As `read` of each payload, and many times faster: what holds no loss is not unpacked, and of
    reports the columns are read, and no text is made of them.
    """
    data = _opened(block)
    first = data.integer()
    count = data.integer()
    data.skip_column(count)
    _stored_digests(data)
    order = data.column(count)
    sizes = Counter(order)
    templates = _read_templates(data)
    parts = [
        _part(data, kinds, literals, sizes[index])
        for index, (kinds, literals) in enumerate(templates)
    ]
    for index, run in itertools.groupby(index for index in order if parts[index] is not None):
        part, rows = parts[index], len(list(run))
        if isinstance(part, _Steps):
            reader.take(part.next(rows))
        elif part is not None:
            for payload in itertools.islice(part, rows):
                reader.read(payload)
    routine = [core.is_routine(_text_of(literals)) for _, literals in templates]
    return [seq for seq, index in enumerate(order, first) if not routine[index]]


def _text_of(literals: list[str]) -> bytes:
    """Return the text of a template without its numbers."""
    return "".join(literals).encode("latin-1")


def _opened(block: bytes) -> "ColumnReader":
    """Return the content of a block. Raises Corrupt."""
    head, body = block[:_HEAD_BYTES], block[:-_CHECKSUM_BYTES]
    if head[:-1] != _MAGIC:
        raise Corrupt("this is no block of rows")
    if head[-1] != _FORMAT:
        raise Corrupt(
            f"its format is {head[-1]}, and this release of lrpilot knows {_FORMAT} alone: start "
            "the newer release that packed it"
        )
    if hashlib.sha256(body).digest() != block[-_CHECKSUM_BYTES:]:
        raise Corrupt("its content does not fit its checksum")
    return ColumnReader(zlib.decompress(body[_HEAD_BYTES:]))


# Digests.


def _pack_digests(out: "ColumnWriter", rows: Sequence[LogRow]) -> None:
    stored = [(0, rows[0].digest)]
    for at, (before, row) in enumerate(itertools.pairwise(rows), 1):
        previous = before.digest
        if not previous.isascii() or core.chain(previous, row.payload) != row.digest:
            stored.append((at, row.digest))
    out.integer(len(stored))
    for at, digest in stored:
        out.integer(at)
        out.text(digest.encode("utf-8", "surrogatepass"))


def _stored_digests(data: "ColumnReader") -> dict[int, str]:
    return {
        data.integer(): data.text().decode("utf-8", "surrogatepass") for _ in range(data.integer())
    }


def _digests(stored: dict[int, str], payloads: list[bytes]) -> list[str]:
    digest, digests = "", []
    for at, payload in enumerate(payloads):
        digest = stored[at] if at in stored else core.chain(digest, payload)
        digests.append(digest)
    return digests


# Payloads.


@dataclass(slots=True)
class _Template:
    """A text with places for numbers, and the numbers of each payload that has it."""

    literals: list[str]
    """What stands before, between and behind the places."""
    kinds: bytes
    """Of each place."""
    numbers: list[list[list[int]]] = field(default_factory=list)
    """Payload by payload the numbers of each place; floats as the integers with their bits."""

    def settle(self) -> None:
        """Make text of the places that hold the same in every payload."""
        literals, kinds, places = self.literals[:1], bytearray(), []
        for literal, kind, place in zip(
            self.literals[1:], self.kinds, zip(*self.numbers, strict=True), strict=True
        ):
            if all(numbers == place[0] for numbers in place):
                literals[-1] += _filled(kind, place[0]) + literal
            else:
                literals.append(literal)
                kinds.append(kind)
                places.append(place)
        self.literals, self.kinds = literals, bytes(kinds)
        self.numbers = [list(one) for one in zip(*places, strict=True)]


def _pack_payloads(out: "ColumnWriter", payloads: list[bytes]) -> None:
    templates: dict[tuple[str, ...], int] = {}
    found: list[_Template] = []
    order = []
    for payload in payloads:
        literals, kinds, numbers = _taken_apart(payload.decode("latin-1"))
        index = templates.setdefault((kinds.decode("ascii"), *literals), len(found))
        if index == len(found):
            found.append(_Template(literals, kinds))
        found[index].numbers.append(numbers)
        order.append(index)
    out.column(order)
    out.integer(len(found))
    for template in found:
        template.settle()
        out.text(template.kinds)
        for literal in template.literals:
            out.text(literal.encode("latin-1"))
    for template in found:
        places = zip(*template.numbers, strict=True)
        for kind, place in zip(template.kinds, places, strict=True):
            if kind in {_INTS, _FLOATS}:
                out.column([len(numbers) for numbers in place])
                out.column([number for numbers in place for number in numbers], _STRIDES)
            else:
                out.column([number for (number,) in place])


def _unpack_payloads(data: "ColumnReader", count: int) -> list[bytes]:
    order = data.column(count)
    sizes = Counter(order)
    payloads = [
        _payloads_of(data, kinds, literals, sizes[index])
        for index, (kinds, literals) in enumerate(_read_templates(data))
    ]
    return [next(payloads[index]) for index in order]


def _read_templates(data: "ColumnReader") -> list[tuple[bytes, list[str]]]:
    """Return the kinds and literals of each template."""
    templates = []
    for _ in range(data.integer()):
        kinds = data.text()
        templates.append((kinds, [data.text().decode("latin-1") for _ in range(len(kinds) + 1)]))
    return templates


def _payloads_of(
    data: "ColumnReader", kinds: bytes, literals: list[str], size: int
) -> Iterator[bytes]:
    """Return the payloads of a template in order."""
    places = [_read_place(data, kind, size) for kind in kinds]
    text = "%s".join(literal.replace("%", "%%") for literal in literals)
    filled = zip(*places, strict=True) if places else itertools.repeat((), size)
    return (payload.encode("latin-1") for payload in map(text.__mod__, filled))


class _Steps:
    """The steps of all reports with one template, column by column."""

    def __init__(self, columns: Sequence[Sequence[Any]], per_row: int) -> None:
        self._columns = columns
        self._per_row = per_row
        self._at = 0

    def next(self, rows: int) -> core.Steps:
        """Return those of the next rows."""
        begin, self._at = self._at, self._at + rows * self._per_row
        progress, losses, moves_to, norms = (one[begin : self._at] for one in self._columns)
        return progress, losses, moves_to, norms


def _part(
    data: "ColumnReader", kinds: bytes, literals: list[str], size: int
) -> "_Steps | Iterator[bytes] | None":
    """Return the rows of a template: None where they hold no loss, the steps of reports that hold
    nothing else, or the payloads in order."""
    if core.has_no_loss(_text_of(literals)):
        for kind in kinds:
            _skip_place(data, kind, size)
        return None
    steps = _steps_of(literals)
    if steps is None or any(kind in {_INTS, _FLOATS} for kind in kinds):
        return _payloads_of(data, kinds, literals, size)
    numbers = [_numbers_of(data, kind, size) for kind in kinds]
    columns: list[list[Any]] = [[None] * (size * len(steps)) for _ in range(4)]
    for index, step in enumerate(steps):
        for column, item in zip(columns, step, strict=True):
            is_place = isinstance(item, _Place)
            column[index :: len(steps)] = numbers[item.place] if is_place else [item] * size
    return _Steps(columns, len(steps))


@dataclass(frozen=True, slots=True)
class _Place:
    """Stands for the number in a place of a template."""

    place: int


_MORE = {"batch", "gradient_norm", "tries"}
"""What a report may hold beside a loss and need not be read whole for."""


def _steps_of(literals: list[str]) -> list[tuple[Any, ...]] | None:
    """Return progress, loss, where it moves to, and norm of the gradient of each step of a
    template, as it is or as its place; None: it is no plain report of one reporter."""
    text = literals[0]
    for place, literal in enumerate(literals[1:]):
        # No string of an event has such a begin where a number may stand.
        text += f'"@{place}"{literal}'
    try:
        event = json.loads(text)
    except ValueError:
        return None
    if not isinstance(event, dict) or event.get("kind") != "reported" or "rank" in event:
        return None

    def number(value: Any) -> Any:
        is_place = isinstance(value, str) and value.startswith("@")
        return _Place(int(value[1:])) if is_place else value

    steps = []
    for progress, loss, _, moves_to, *more in event["reports"]:
        rest = more[0] if more else {}
        if not rest.keys() <= _MORE:
            return None
        step = (progress, loss, moves_to, rest.get("gradient_norm"))
        steps.append(tuple(map(number, step)))
    return steps


def _numbers_of(data: "ColumnReader", kind: int, size: int) -> Sequence[float]:
    """Return the numbers in a place, payload by payload; it is no list."""
    numbers = data.column(size)
    return numbers if kind == _INT else _floats(numbers)


def _skip_place(data: "ColumnReader", kind: int, size: int) -> None:
    if kind in {_INTS, _FLOATS}:
        size = sum(data.column(size))
    data.skip_column(size)


def _read_place(data: "ColumnReader", kind: int, size: int) -> list[str]:
    """Return what stands in a place, payload by payload, as text."""
    counts = data.column(size) if kind in {_INTS, _FLOATS} else None
    numbers = data.column(size if counts is None else sum(counts))
    if counts is None:
        return _texts(kind, numbers)
    texts = _texts(kind, numbers)
    ends = itertools.accumulate(counts, initial=0)
    return [f"[{','.join(texts[begin:end])}]" for begin, end in itertools.pairwise(ends)]


def _filled(kind: int, numbers: list[int]) -> str:
    """Return what stands in a place of one payload."""
    texts = _texts(kind, numbers)
    return f"[{','.join(texts)}]" if kind in {_INTS, _FLOATS} else texts[0]


def _texts(kind: int, numbers: list[int]) -> list[str]:
    if kind in {_INT, _INTS}:
        return list(map(str, numbers))
    distinct = set(numbers)
    if len(distinct) * 2 < len(numbers):
        # To write a float takes longest of all.
        written = dict(zip(distinct, map(repr, _floats(distinct)), strict=True))
        return [written[number] for number in numbers]
    return list(map(repr, _floats(numbers)))


def _floats(numbers: Collection[int]) -> tuple[float, ...]:
    """Return the floats with these bits."""
    size = len(numbers)
    return struct.unpack(f"<{size}d", struct.pack(f"<{size}q", *numbers))


def _taken_apart(text: str) -> tuple[list[str], bytes, list[list[int]]]:
    """Return the text before, between and behind the numbers, their kinds, and themselves."""
    literals, kinds, places = [], bytearray(), []
    end = 0
    for begin, stop, kind, numbers in _places(text):
        literals.append(text[end:begin])
        kinds.append(kind)
        places.append(numbers)
        end = stop
    return [*literals, text[end:]], bytes(kinds), places


def _places(text: str) -> Iterator[tuple[int, int, int, list[int]]]:
    """Yield where in a text numbers stand, from and to, and of which kind they are."""
    for token in _TOKEN.finditer(text):
        begin, stop = token.span()
        listed, number = token.groups()
        if listed is not None:
            items = listed[1:-1].split(",")
            if (numbers := _integers(items)) is not None:
                yield begin, stop, _INTS, numbers
                continue
            if (numbers := _bits(items)) is not None:
                yield begin, stop, _FLOATS, numbers
                continue
            for item in items:
                begin += 1
                stop = begin + len(item)
                if (numbers := _integers([item])) is not None:
                    yield begin, stop, _INT, numbers
                elif (numbers := _bits([item])) is not None:
                    yield begin, stop, _FLOAT, numbers
                begin = stop
        elif number is not None:
            if (numbers := _integers([number])) is not None:
                yield begin, stop, _INT, numbers
            elif (numbers := _bits([number])) is not None:
                yield begin, stop, _FLOAT, numbers


def _integers(items: list[str]) -> list[int] | None:
    """Return integers that a column can hold; None: not all are such, or so written."""
    if not all(item.lstrip("-").isdigit() and len(item) <= 20 for item in items):
        return None
    numbers = list(map(int, items))
    is_same = list(map(str, numbers)) == items
    return numbers if is_same and _fits(numbers) else None


def _bits(items: list[str]) -> list[int] | None:
    """Return the bits of floats; None: not all are written as Python writes them."""
    floats = list(map(float, items))
    if list(map(repr, floats)) != items:
        return None
    return list(struct.unpack(f"<{len(floats)}q", struct.pack(f"<{len(floats)}d", *floats)))


# Columns.


class ColumnWriter:
    """Writes numbers and texts so that they take little space."""

    def __init__(self) -> None:
        self.data = bytearray()

    def integer(self, value: int) -> None:
        """Write an integer from 0 on, 7 bits a byte."""
        while value > 0x7F:
            self.data.append(value & 0x7F | 0x80)
            value >>= 7
        self.data.append(value)

    def text(self, value: bytes) -> None:
        """Write bytes of any number."""
        self.integer(len(value))
        self.data += value

    def column(self, values: list[int], strides: Sequence[int] = (1,)) -> None:
        """Write integers of 64 bits; those that are one of `strides` apart may be alike."""
        stride, order = _smallest(values, strides)
        heads: list[int] = []
        left = values
        for _ in range(order):
            heads += left[:stride]
            left = _differences(left, stride)
        if not _fits(heads) or not _fits(left):
            order, heads, left = 0, [], values
        numbers = [value << 1 if value >= 0 else ~(value << 1) for value in left]
        width = (max(numbers, default=0).bit_length() + 7) // 8
        self.data += bytes([stride, order, width])
        for head in heads:
            self.data += struct.pack("<q", head)
        planes = struct.pack(f"<{len(numbers)}Q", *numbers)
        for plane in range(width):
            self.data += planes[plane::8]


class ColumnReader:
    """Reads what a `ColumnWriter` wrote."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def _take(self, size: int) -> bytes:
        begin = self._at
        self._at += size
        return self._data[begin : self._at]

    def integer(self) -> int:
        """Read what `ColumnWriter.integer` wrote."""
        value = shift = 0
        while True:
            byte = self._data[self._at]
            self._at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    def text(self) -> bytes:
        """Read what `ColumnWriter.text` wrote."""
        return self._take(self.integer())

    def column(self, size: int) -> list[int]:
        """Read a column of `size` integers."""
        stride, order, width = self._take(3)
        heads = [
            struct.unpack(f"<{n}q", self._take(8 * n)) for n in self._heads(size, stride, order)
        ]
        left = max(0, size - stride * order)
        planes = bytearray(8 * left)
        for plane in range(width):
            planes[plane::8] = self._take(left)
        values = [n >> 1 ^ -(n & 1) for n in struct.unpack(f"<{left}Q", planes)]
        for head in reversed(heads):
            values = _sums(values, head)
        return values

    def skip_column(self, size: int) -> None:
        """Pass over a column of `size` integers."""
        stride, order, width = self._take(3)
        self._at += 8 * sum(self._heads(size, stride, order))
        self._at += width * max(0, size - stride * order)

    @staticmethod
    def _heads(size: int, stride: int, order: int) -> list[int]:
        """Return how many numbers each order of differences begins with."""
        return [max(0, min(stride, size - at * stride)) for at in range(order)]


def _fits(values: Sequence[int]) -> bool:
    return not values or (min(values) >= _LEAST and max(values) <= _MOST)


def _differences(values: Sequence[int], stride: int) -> list[int]:
    return [b - a for a, b in zip(values, values[stride:], strict=False)]


def _sums(values: list[int], heads: tuple[int, ...]) -> list[int]:
    """Undo `_differences` of what began with `heads`."""
    if len(heads) == 1:
        return list(itertools.accumulate(values, initial=heads[0]))
    found = [0] * (len(heads) + len(values))
    for at, head in enumerate(heads):
        found[at :: len(heads)] = itertools.accumulate(values[at :: len(heads)], initial=head)
    return found


def _smallest(values: list[int], strides: Sequence[int]) -> tuple[int, int]:
    """Return the stride and the order whose differences are the smallest."""
    sample = values[:_SAMPLE]
    sizes = {(1, 0): sum(map(int.bit_length, sample))}
    for stride in strides:
        differences = sample
        for order in range(1, _ORDERS + 1):
            differences = _differences(differences, stride)
            # Those at the begin are stored whole, once for the whole column.
            heads = 64 * stride * order * len(sample) // max(1, len(values))
            sizes[stride, order] = sum(map(int.bit_length, differences)) + heads
    return min(sizes, key=sizes.__getitem__)
