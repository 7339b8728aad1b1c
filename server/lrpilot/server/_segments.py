"""Packing rows of a log into a block of bytes, and back."""

import hashlib
import struct
import zlib
from collections.abc import Sequence

from lrpilot.server._store import LogRow

_CHECKSUM_BYTES = 32


class Corrupt(ValueError):
    """A block is not one that `pack` made."""


def checksum(block: bytes) -> str:
    """Return what tells a block from every other one."""
    return block[-_CHECKSUM_BYTES:].hex()


def pack(rows: Sequence[LogRow]) -> bytes:
    """Return rows, whose `seq` is dense, as a block."""
    parts = [struct.pack("<Q", rows[0].seq)]
    for row in rows:
        digest = row.digest.encode()
        parts += [
            struct.pack("<IIq", len(row.payload), len(digest), row.recorded_at_ns),
            row.payload,
            digest,
        ]
    body = zlib.compress(b"".join(parts))
    return body + hashlib.sha256(body).digest()


def unpack(block: bytes) -> list[LogRow]:
    """Return the rows of a block. Raises Corrupt."""
    body = block[:-_CHECKSUM_BYTES]
    if hashlib.sha256(body).digest() != block[-_CHECKSUM_BYTES:]:
        raise Corrupt("its checksum does not fit")
    data = zlib.decompress(body)
    (seq,) = struct.unpack_from("<Q", data)
    at, rows = 8, []
    while at < len(data):
        size, digest_size, recorded = struct.unpack_from("<IIq", data, at)
        at += 16
        payload, digest = data[at : at + size], data[at + size : at + size + digest_size].decode()
        at += size + digest_size
        rows.append(LogRow(seq, payload, digest, recorded))
        seq += 1
    return rows
