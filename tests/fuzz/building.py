"""What the random graphs keep in mind about their values, so that every operation is applied where it is well-posed.

A value is *exact* when all its elements are multiples of 2**-grid below a bound, so that every precision computes it
without rounding: such values are compared bit for bit, and only they may go into operations that jump (comparisons,
rounding, sorting with indices, integer conversions). Bounds keep all the other values clear of overflow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from kgraph import ops
from kgraph.ir import Dim, TensorType
from kgraph.ir.dims import evaluate

N = Dim.symbol("N")
LARGEST_BATCH = 8
BATCHES = (1, 3, LARGEST_BATCH, 0)
SIGNIFICAND = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8, "int64": 62, "int32": 31, "bool": 1}
FLOATS = ("float32", "float64", "float16", "bfloat16")
LIMIT = 32.0  # floats above this bound are scaled down
INT_LIMIT = 1 << 20
# sizes of long axes, of short axes, and the most elements of a tensor at the largest batch
SCALES = {
    "small": ((1, 2, 3, 4, 5, 7, 8, 16, 17, 19, 33), (1, 2, 3, 4, 5), 8000),
    "large": ((1, 31, 64, 65, 96, 128, 200, 257, 513, 1100, 2100), (1, 2, 7, 14, 23, 32), 400_000),
}


class SkipOperation(Exception):
    """The drawn operation has no fitting operand."""


@dataclass(frozen=True)
class Fact:
    """bound: on the magnitude of the elements. grid: the elements are multiples of 2**-grid; None where rounded."""

    bound: float
    grid: int | None = None

    @property
    def exact(self) -> bool:
        return self.grid is not None


class Builder:
    """Draws operands and records operations in the running trace.

    values: every tensor so far. scale: "small" tensors go through tails and edges of kernels, "large" ones through
    their blocks, panels and unrolled loops.
    """

    def __init__(self, rng: np.random.Generator, dtype: str, scale: str = "small"):
        self.rng, self.dtype = rng, dtype
        self.sizes, self.small_sizes, self.most_elements = SCALES[scale]
        self.values: list = []
        self.facts: dict[int, Fact] = {}
        self.constants: list[np.ndarray] = []

    # -- chance ---------------------------------------------------------------------------------------------------
    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def choice(self, items):
        return items[int(self.rng.integers(len(items)))]

    def integer(self, low: int, high: int) -> int:
        """An integer in [low, high]."""
        return int(self.rng.integers(low, high + 1))

    def subset(self, items, least: int = 0) -> tuple:
        items = list(items)
        if len(items) < least:
            raise SkipOperation
        count = self.integer(least, len(items))
        return tuple(sorted(self.rng.permutation(len(items))[:count].tolist())) if count else ()

    # -- values ---------------------------------------------------------------------------------------------------
    def fact(self, x) -> Fact:
        return self.facts[id(x)]

    def exact(self, x) -> bool:
        return self.fact(x).exact

    def dtype_of(self, x) -> str:
        return x.dtype.name if isinstance(x, np.ndarray) else x.value.dtype

    def keep(self, x, fact: Fact):
        """Register a tensor; scales it down first where its bound has grown too far."""
        if self.count(x.shape) > self.most_elements:
            raise SkipOperation
        dtype = self.dtype_of(x)
        if fact.exact and fact.bound * 2**fact.grid > 2 ** SIGNIFICAND[dtype]:
            fact = Fact(fact.bound, None)
        if dtype in FLOATS and fact.bound > LIMIT:
            shift = math.ceil(math.log2(fact.bound / LIMIT)) + 1
            if shift > 40:
                raise SkipOperation
            x = ops.mul(x, self.constant(2.0**-shift, dtype))
            grid = fact.grid + shift if fact.exact else None
            return self.keep(x, Fact(fact.bound * 2.0**-shift, grid))
        if dtype.startswith("int") and fact.bound > INT_LIMIT:
            # The wrapped value is the same in every evaluation, but further arithmetic would leave int64 too.
            x = ops.rem(x, self.constant(1009, dtype))
            fact = Fact(1009, 0)
        self.values.append(x)
        self.facts[id(x)] = fact
        return x

    def constant(self, value, dtype: str) -> np.ndarray:
        """A concrete array; registered so that it can stand as an operand."""
        array = ops.constant(np.asarray(value), dtype)
        return self.register(array, Fact(float(np.abs(array.astype("float64")).max(initial=0))))

    def register(self, array: np.ndarray, fact: Fact) -> np.ndarray:
        """A concrete array with its fact; kept alive, since facts are found by identity."""
        self.facts[id(array)] = fact
        self.constants.append(array)
        return array

    def pick(self, *dtypes: str, rank=None, exact: bool = False, where=None):
        """A tensor of one of the dtypes; recent ones come more often."""
        wanted = dtypes or (*FLOATS, "int32", "int64", "bool")
        found = [
            v
            for v in self.values
            if self.dtype_of(v) in wanted
            and (rank is None or (len(v.shape) in rank if isinstance(rank, (tuple, range)) else len(v.shape) == rank))
            and (not exact or self.exact(v))
            and (where is None or where(v))
        ]
        if not found:
            raise SkipOperation
        recent = found[-4:]
        return self.choice(recent if self.chance(0.6) else found)

    def pick_float(self, **conditions):
        return self.pick(*FLOATS, **conditions)

    def as_type(self, x, dtype: str):
        """x, converted where it has another dtype; to integers only from exact values."""
        own = self.dtype_of(x)
        if own == dtype:
            return x
        fact = self.fact(x)
        if dtype == "bool" or dtype.startswith("int"):
            if not fact.exact:
                raise SkipOperation
            if dtype == "bool":
                return self.keep(ops.convert(x, dtype=dtype), Fact(1, 0))
            return self.keep(ops.convert(x, dtype=dtype), Fact(math.ceil(fact.bound), 0))
        return self.keep(ops.convert(x, dtype=dtype), fact)

    def random_array(self, shape: tuple, dtype: str, seed: int | None = None) -> tuple[np.ndarray, Fact]:
        """A concrete array on a coarse grid (exact), or with full mantissas."""
        rng = self.rng if seed is None else np.random.default_rng(seed)
        return draw(rng, TensorType(shape, dtype), bool(self.rng.random() < 0.5))

    # -- shapes ---------------------------------------------------------------------------------------------------
    def size(self) -> int:
        return self.choice(self.sizes)

    def small_size(self) -> int:
        return self.choice(self.small_sizes)

    def known(self, size) -> int:
        """A size at the largest batch."""
        return evaluate(size, {"N": LARGEST_BATCH})

    def count(self, sizes) -> int:
        return math.prod(self.known(s) for s in sizes)


def draw(rng: np.random.Generator, type_: TensorType, exact: bool) -> tuple[np.ndarray, Fact]:
    """Elements for a tensor of a static type: on a coarse grid, or with full mantissas."""
    shape, dtype = type_.shape, type_.dtype
    if dtype == "bool":
        return rng.random(shape) < 0.5, Fact(1, 0)
    if dtype.startswith("int"):
        return rng.integers(-9, 10, shape).astype(dtype), Fact(9, 0)
    if exact:
        return (rng.integers(-8, 9, shape) / 4).astype(type_.np_dtype), Fact(2, 2)
    return rng.uniform(-2, 2, shape).astype(type_.np_dtype), Fact(2.02)
