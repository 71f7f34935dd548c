"""What kernels that move data share on every target: words, strides, collapsed axes, size tables.

Moved values are never interpreted, so kernels exist per item size: elements of 1, 2, 4 and 8 bytes travel as unsigned
integers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kgraph.ir import Dim, TensorType, Value

WORDS = {1: "uint8", 2: "uint16", 4: "uint32", 8: "uint64"}

Axis = tuple  # (size, stride of the source in elements), both int | Dim


class SizeTable:
    """The run-time sizes of a kernel under construction: static integers stay in the params, Dims get a slot."""

    def __init__(self):
        self.values: list[int | Dim] = []
        self._slots: dict[tuple, int] = {}  # by canonical form: `==` between Dims may be undecidable

    def __call__(self, size: int | Dim):
        """The entry for the params: the integer itself, or ("size", slot)."""
        if not isinstance(size, Dim):
            return int(size)
        slot = self._slots.get(size.terms)
        if slot is None:
            slot = self._slots[size.terms] = len(self.values)
            self.values.append(size)
        return ("size", slot)

    def run_time(self, size: int | Dim) -> tuple:
        """A slot of its own, also for a static integer: it is no part of the code then, one kernel serves them all."""
        self.values.append(size)
        return ("size", len(self.values) - 1)

    def all(self, sizes: Iterable) -> tuple:
        """The entries of several sizes."""
        return tuple(self(s) for s in sizes)


def word(type: TensorType) -> str:
    """The dtype in which elements of a type are moved. Raises KeyError for complex128, which nothing moves natively."""
    return WORDS[type.itemsize]


def dense_strides(shape: Sequence) -> tuple:
    """Row-major strides in elements."""
    out: list = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        out[axis] = shape[axis + 1] * out[axis + 1]
    return tuple(out)


def collapse(axes: Iterable[Axis]) -> list[Axis]:
    """Fewer axes for the same walk: axes of size 1 go, neighbours that one stride serves become one."""
    return [(size, strides[0]) for size, strides in collapse_streams((n, (t,)) for n, t in axes)]


def collapse_streams(axes: Iterable[tuple]) -> list[tuple]:
    """`collapse` for axes (size, strides) that several streams walk together, each with its own stride."""
    out: list[tuple] = []
    for size, strides in axes:
        if _same(size, 1):
            continue
        if out and all(_same(wide, size * t) for wide, t in zip(out[-1][1], strides, strict=True)):
            out[-1] = (out[-1][0] * size, tuple(strides))
        else:
            out.append((size, tuple(strides)))
    return out


def _same(x, y) -> bool:
    return bool(isinstance(x, Dim) == isinstance(y, Dim) and x == y)


def split_rows(size: int | Dim, item_bytes: int, chunk_bytes: int = 16384) -> int:
    """Elements per chunk where rows of `size` elements are worth splitting between threads, else 0."""
    chunk = chunk_bytes // item_bytes
    return chunk if isinstance(size, Dim) or size >= 2 * chunk else 0


# What mode "fill" writes, as bits: quiet NaN, the least signed int, the greatest unsigned int, True.
FILL_BITS = {
    "bool": 1,
    "int8": 0x80,
    "int16": 0x8000,
    "int32": 0x8000_0000,
    "int64": 1 << 63,
    "uint8": 0xFF,
    "uint16": 0xFFFF,
    "uint32": 0xFFFF_FFFF,
    "uint64": (1 << 64) - 1,
    "float16": 0x7E00,
    "bfloat16": 0x7FC0,
    "float32": 0x7FC0_0000,
    "float64": 0x7FF8 << 48,
}


def untransposed(value: Value) -> tuple[Value, tuple[int, ...]]:
    """(what `value` is a transpose of, the axis of that for each axis of `value`); through any number of transposes."""
    axes = tuple(range(len(value.shape)))
    while value.node is not None and value.node.name == "transpose":
        permutation = value.node.attrs["permutation"]
        value, axes = value.node.inputs[0], tuple(permutation[axis] for axis in axes)
    return value, axes
