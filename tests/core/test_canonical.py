"""Canonical bytes: equal trees have equal bytes, and every float comes back to the bit."""

import hashlib
import math
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrpilot.core._canonical import GENESIS, chain, from_bytes, same_bits, to_bytes

TREES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text()),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(), inner)),
)


def test_the_bytes_are_json_with_sorted_keys_and_no_white_space() -> None:
    tree = {"b": (1, 2.5, None), "a": {"é": True}, 3: "x"}
    assert to_bytes(tree) == b'{"3":"x","a":{"\\u00e9":true},"b":[1,2.5,null]}'


@pytest.mark.parametrize(
    ("value", "data"),
    [(math.nan, b'"nan"'), (math.inf, b'"inf"'), (-math.inf, b'"-inf"'),
     (-0.0, b"-0.0"), (1e-05, b"1e-05"), (0.1 + 0.2, b"0.30000000000000004"), (1, b"1"),
     (1.0, b"1.0")],
)  # fmt: skip
def test_numbers(value: float, data: bytes) -> None:
    assert to_bytes(value) == data
    assert same_bits(float(from_bytes(data)), value)


@given(TREES)
def test_equal_trees_have_equal_bytes(tree: Any) -> None:
    data = to_bytes(tree)
    assert to_bytes(from_bytes(data)) == data
    if isinstance(tree, dict):
        assert to_bytes(dict(reversed(tree.items()))) == data


@given(st.floats())
def test_a_float_comes_back_to_the_bit(x: float) -> None:
    assert same_bits(float(from_bytes(to_bytes(x))), x)


@given(st.floats(), st.floats())
def test_the_same_bits(a: float, b: float) -> None:
    both_nan = math.isnan(a) and math.isnan(b)
    assert same_bits(a, b) is (both_nan or struct.pack("<d", a) == struct.pack("<d", b))
    assert same_bits(a, a)


def test_zeros_differ_by_their_sign_and_nans_do_not_differ() -> None:
    payload = struct.unpack("<d", struct.pack("<Q", 0x7FF8_0000_0000_0001))[0]
    assert not same_bits(0.0, -0.0)
    assert same_bits(math.nan, payload)
    assert not same_bits(math.nan, math.inf)


def test_a_digest_is_of_all_that_came_before() -> None:
    one, two = chain(GENESIS, b"one"), chain(chain(GENESIS, b"one"), b"two")
    assert one == hashlib.sha256(b"0" * 64 + b"one").hexdigest()
    assert two == hashlib.sha256(one.encode() + b"two").hexdigest()
    assert chain(chain(GENESIS, b"two"), b"one") != two
