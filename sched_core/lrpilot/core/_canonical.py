"""One way to write a value as bytes, so that equal logs have equal digests.

JSON with sorted keys and no white space. Floats are written in shortest round-trip form;
JSON has no word for the non-finite ones, which are the strings "nan", "inf" and "-inf".
Every NaN is written alike: its payload carries no meaning here. `float()` reads all of
these back, bit for bit.
"""

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from typing import Any

GENESIS = "0" * 64
"""Digest of an empty log."""


def to_bytes(value: Any) -> bytes:
    """Return the canonical bytes of a tree of mappings, sequences, strings and numbers."""
    return json.dumps(
        _plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    ).encode("ascii")


def from_bytes(data: bytes) -> Any:
    """Return the tree that `to_bytes` wrote; sequences come back as lists."""
    return json.loads(data)


def chain(previous: str, data: bytes) -> str:
    """Return the digest of a log after appending `data` to one whose digest is `previous`."""
    return hashlib.sha256(previous.encode("ascii") + data).hexdigest()


def same_bits(a: float, b: float) -> bool:
    """Return whether two floats are the same to the bit; all NaNs are one."""
    if math.isnan(a) or math.isnan(b):
        return math.isnan(a) and math.isnan(b)
    return struct.pack("<d", a) == struct.pack("<d", b)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
