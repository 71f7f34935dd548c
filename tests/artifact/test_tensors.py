"""The reader and writer of safetensors against the package of that name."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import numpy as safetensors

from kgraph.runtime.artifact_tensors import Tensors, to_pieces

DTYPES = (
    "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 complex64 bfloat16 float8_e4m3fn"
).split()


def arrays():
    random = np.random.default_rng(0)
    out = {}
    for number, name in enumerate(DTYPES):
        dtype = np.dtype(getattr(ml_dtypes, name, None) or name)
        shape = [(3, 5), (), (0, 4), (65,), (2, 1, 3)][number % 5]
        out[f"a.{name}"] = random.integers(0, 2, shape).astype(dtype)
    return out


def test_round_trip_and_the_package():
    wanted = arrays()
    data = b"".join(bytes(piece) for piece in to_pieces(wanted))
    own = Tensors(data)
    assert list(own) == list(wanted)
    for name, array in wanted.items():
        got = own[name]
        assert (got.dtype, got.shape, got.tobytes()) == (array.dtype, array.shape, array.tobytes())
        assert not got.flags.writeable or not got.size
        address = np.frombuffer(data, np.uint8).ctypes.data
        assert not got.size or (got.ctypes.data - address) % 64 == 0
    simple = {name: a for name, a in wanted.items() if not name.endswith(("complex64", "float8_e4m3fn", "bfloat16"))}
    theirs = safetensors.load(b"".join(bytes(piece) for piece in to_pieces(simple)))
    assert {n for n in theirs if not n.startswith("padding.")} == set(simple)
    for name, array in simple.items():
        np.testing.assert_array_equal(theirs[name], array)
    again = Tensors(safetensors.save(simple, {"format": "np"}))
    for name, array in simple.items():
        np.testing.assert_array_equal(again[name], array)


def test_what_cannot_be_written():
    for name, array in (("a", np.zeros(2, "complex128")), ("padding.1", np.zeros(2)), ("__metadata__", np.zeros(2))):
        with pytest.raises(ValueError, match="cannot be written"):
            to_pieces({name: array})


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes(data):
    with pytest.raises(ValueError, match=r"."):
        Tensors(data)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', "do not match"),
        ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', "overlap, or leave a hole"),
        ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', "do not fill"),
        (
            '{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},"b":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}',
            "ov",
        ),
        ('{"a":{"dtype":"F99","shape":[2],"data_offsets":[0,8]}}', "not understood"),
        ('{"a":{"dtype":["F32"],"shape":[2],"data_offsets":[0,8]}}', "not understood"),
        ('{"a":{"dtype":"F32","shape":[-2],"data_offsets":[8,0]}}', "out of range"),
        ('{"a":{"dtype":"F32","shape":[1073741824,1073741824,4],"data_offsets":[0,8]}}', "do not match"),
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"more":1}}', "not understood"),
        ("[]", "no dictionary"),
        ('{"a":1}', "not understood"),
    ],
)
def test_headers(header, message):
    text = header.encode()
    with pytest.raises(ValueError, match=message):
        Tensors(len(text).to_bytes(8, "little") + text + bytes(8))
