"""Named tensors as safetensors hold them: 8 bytes of header length, a JSON header, the bytes of all tensors.

Written so that every tensor starts on a cache line (with tensors called `padding.N` in between, since the format allows
no holes), and read as arrays that lie in the buffer itself.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping

import numpy as np

from kgraph.runtime.artifact_file import parse_json
from kgraph.types import dtype_name, np_dtype

_ALIGNMENT = 64
_MAX_HEADER_BYTES = 1 << 26
_PADDING = "padding."
_METADATA = "__metadata__"

_NAMES = {
    "bool": "BOOL",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
}
_DTYPES = {short: long for long, short in _NAMES.items()}


class Tensors(Mapping[str, np.ndarray]):
    """The tensors in a buffer, as read-only arrays in it.

    Raises ValueError for a buffer that is not exactly as the format has it, before any array is made.
    """

    def __init__(self, buffer: bytes | memoryview):
        self._buffer = buffer
        self._entries: dict[str, tuple[str, tuple[int, ...], int]] = {}
        size = memoryview(buffer).nbytes
        if size < 8:
            raise ValueError("the tensors are truncated")
        (length,) = struct.unpack_from("<Q", buffer)
        if length > min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError("the tensors' header is longer than their bytes")
        header = parse_json(bytes(memoryview(buffer)[8 : 8 + length]))
        if type(header) is not dict:
            raise ValueError("the tensors' header is no dictionary")
        header.pop(_METADATA, None)
        spans = []
        for name, entry in header.items():
            dtype, shape, begin, end = _checked(name, entry)
            spans.append((begin, end))
            if not name.startswith(_PADDING):
                self._entries[name] = dtype, shape, 8 + length + begin
        position = 0
        for begin, end in sorted(spans):
            if begin != position:
                raise ValueError("tensors overlap, or leave a hole")
            position = end
        if position != size - 8 - length:
            raise ValueError("the tensors do not fill their bytes")

    def __getitem__(self, name: str) -> np.ndarray:
        dtype, shape, offset = self._entries[name]
        flat = np.frombuffer(self._buffer, np_dtype(dtype), math.prod(shape), offset) if math.prod(shape) else None
        return np.empty(shape, np_dtype(dtype)) if flat is None else flat.reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _checked(name: str, entry) -> tuple[str, tuple[int, ...], int, int]:
    """(dtype, shape, begin, end) of a header's entry. Raises ValueError."""
    if type(entry) is not dict or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r}: its entry is not understood")
    dtype = _DTYPES.get(entry["dtype"]) if type(entry["dtype"]) is str else None
    shape, offsets = entry["shape"], entry["data_offsets"]
    if dtype is None or type(shape) is not list or type(offsets) is not list or len(offsets) != 2:
        raise ValueError(f"tensor {name!r}: its entry is not understood")
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in [*shape, *offsets]) or len(shape) > 32:
        raise ValueError(f"tensor {name!r}: its sizes are out of range")
    begin, end = offsets
    if begin + math.prod(shape) * np_dtype(dtype).itemsize != end:
        raise ValueError(f"tensor {name!r}: its size and its offsets do not match")
    return dtype, tuple(shape), begin, end


def is_writable(dtype: str) -> bool:
    """Whether the format has the dtype; others are written as their bytes."""
    return dtype in _NAMES


def to_pieces(tensors: Mapping[str, np.ndarray]) -> list[bytes | memoryview]:
    """The file of these tensors, in pieces; contiguous arrays are not copied.

    Raises ValueError for a dtype that the format does not have.
    """
    header: dict[str, dict] = {}
    pieces: list[bytes | memoryview] = []
    position = 0

    def add(name: str, dtype: str, shape: tuple[int, ...], content: bytes | memoryview, nbytes: int) -> None:
        nonlocal position
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [position, position + nbytes]}
        pieces.append(content)
        position += nbytes

    for name, array in tensors.items():
        dtype = dtype_name(array.dtype)
        if dtype not in _NAMES or name.startswith(_PADDING) or name == _METADATA:
            raise ValueError(f"the tensor {name!r} of dtype {dtype} cannot be written")
        if gap := -position % _ALIGNMENT:
            add(f"{_PADDING}{len(header)}", "uint8", (gap,), bytes(gap), gap)
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        add(name, dtype, array.shape, flat.data, flat.nbytes)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return [struct.pack("<Q", len(text)) + text, *pieces]
