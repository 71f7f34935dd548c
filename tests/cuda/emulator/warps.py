"""What the threads of a warp do together: shuffles, and products on tensor cores."""

from __future__ import annotations

import re
from typing import NamedTuple

import ml_dtypes
import numpy as np

from tests.cuda.emulator.memory import EmulatedFault

LANES = 32


def shuffle(mode: str, b, clamp, lane):
    """The lane whose value each thread gets, and whether it is one in range."""
    b, clamp, lane = (np.asarray(x).astype(np.int64) for x in (b, clamp, lane))
    segment, bound = (clamp >> 8) & 31, clamp & 31
    lowest, highest = lane & segment, (lane & segment) | (bound & ~segment)
    b &= 31
    source = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": lowest | (b & ~segment)}[mode]
    inside = source >= highest if mode == "up" else source <= highest
    return np.where(inside, source, lane), inside


class Fragment(NamedTuple):
    """Where the registers of a lane lie in a matrix: rows and columns by (lane, element)."""

    rows: np.ndarray
    columns: np.ndarray


class Product(NamedTuple):
    """`d = a b + c` of a warp. packed: elements in a register of a and b. dtype: of these. b's fragment has columns of
    the product in `columns`."""

    m: int
    n: int
    k: int
    packed: int
    dtype: np.dtype
    a: Fragment
    b: Fragment
    c: Fragment


def product(opcode: str) -> Product:
    """The fragments of an opcode such as `mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32`, by the tables of the PTX
    ISA. Raises ValueError for shapes that are not emulated."""
    match = re.fullmatch(r"mma\.sync\.aligned\.m16n8k(\d+)\.row\.col\.f32\.(f16|bf16|tf32)\.\2\.f32", opcode)
    if match is None:
        raise ValueError(f"{opcode} is not emulated")
    k, kind = int(match[1]), match[2]
    packed = 1 if kind == "tf32" else 2
    dtype = np.dtype({"f16": np.float16, "bf16": ml_dtypes.bfloat16, "tf32": np.float32}[kind])
    lane = np.arange(LANES)[:, None]
    group, inner = lane >> 2, lane & 3
    # Elements of a: pairs next to each other, then eight rows below, then half of the columns on.
    element = np.arange(16 * k // LANES)[None]
    register, part = element // packed, element % packed
    a = Fragment(group + 8 * (register % 2), inner * packed + part + 4 * packed * (register // 2))
    element = np.arange(8 * k // LANES)[None]
    register, part = element // packed, element % packed
    b = Fragment(inner * packed + part + 4 * packed * register, group + 0 * element)
    element = np.arange(4)[None]
    c = Fragment(group + 8 * (element // 2), inner * 2 + element % 2)
    return Product(16, 8, k, packed, dtype, a, b, c)


def multiply(p: Product, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """d by (warp, lane, element), of a and b in registers (uint32) and c (float32), likewise."""

    def matrix(registers: np.ndarray, fragment: Fragment, rows: int, columns: int) -> np.ndarray:
        if p.packed == 1:
            registers = registers & np.uint32(0xFFFFE000)  # TF32 has ten bits of mantissa
        elements = np.ascontiguousarray(registers).view(p.dtype)
        out = np.full((len(registers), rows, columns), np.nan)
        out[:, fragment.rows, fragment.columns] = elements.astype(np.float64)
        return out

    left, right = matrix(a, p.a, p.m, p.k), matrix(b, p.b, p.k, p.n)
    return ((left @ right)[:, p.c.rows, p.c.columns] + c).astype(np.float32)


def by_warp(index: np.ndarray, line: str) -> np.ndarray:
    """The numbers of threads as (warp, lane). Raises EmulatedFault where a warp is not complete."""
    if len(index) % LANES == 0:
        warps = index.reshape(-1, LANES)
        if (warps[:, 0] % LANES == 0).all() and (warps == warps[:, :1] + np.arange(LANES)).all():
            return warps
    raise EmulatedFault(f"not all threads of a warp are there: {line}")
