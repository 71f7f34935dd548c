"""How register tiles multiply: instructions that sum several narrow products, and the forms of operands they read.

A step of a tile takes `steps` consecutive elements along k of each operand. In panels of B these lie side by side for
every column; of A, which is copied to scratch in the form that the instruction reads, they are broadcast as one word.

| name | operands | a step | needs |
|---|---|---|---|
| plain | the sums' dtype; B may be narrower and is widened when it is loaded | 1 | |
| halves | A float32; B bfloat16, the upper half of a float32: two vectors are one load and two operations | 1 | |
| pairs | int8; A as int16, B widened to int16 | 2, `vpmaddwd` | x86 |
| offset_quads | int8; A with 128 added as uint8 | 4, `vpdpbusd` | AVX512-VNNI or AVX-VNNI |
| quads | int8 | 4, `vpdpbssd`, `sdot` | AVX-VNNI-INT8, AVX10.2, dot products of ARM |
| bfloat16_pairs | bfloat16 | 2, `vdpbf16ps` | AVX512-BF16 |

Sums of int8 products are exact in all of them: no 16-bit sum is taken, which could saturate. What the 128 adds is taken
off by the sums' first values: -128 times the sum of the column, which stand ahead of each panel (`kgraph.ops.packing`).
"""

from __future__ import annotations

from typing import NamedTuple

from llvmlite import ir

from kgraph.codegen.contractions import accumulate_dtype
from kgraph.codegen.cpu.builder import I8, I16, KernelBuilder, Pointer, is_float, itemsize
from kgraph.codegen.cpu.llvm_types import BF16
from kgraph.codegen.cpu.pack import widen

OFFSET = 128  # what makes an int8 a uint8

_PMADD = {16: "llvm.x86.sse2.pmadd.wd", 32: "llvm.x86.avx2.pmadd.wd", 64: "llvm.x86.avx512.pmaddw.d.512"}
_SIGNED_QUADS = {16: "llvm.aarch64.neon.sdot.v4i32.v16i8", 32: "llvm.x86.avx2.vpdpbssd.256"}
_SIGNED_QUADS |= {64: "llvm.x86.avx10.vpdpbssd.512"}


class Product(NamedTuple):
    """One of the ways above.

    accumulate: dtype of the sums. a, b: dtypes of the operands as tiles read them. steps: of k that are taken together.
    """

    name: str
    accumulate: str
    a: str
    b: str
    steps: int = 1

    @property
    def offset(self) -> int:
        """What is added to every element of A."""
        return OFFSET if self.name == "offset_quads" else 0

    @property
    def head(self) -> int:
        """Elements of a column of a panel ahead of its first step: those that hold the first value of its sums."""
        return itemsize(self.accumulate) // itemsize(self.b) if self.offset else 0

    def column_length(self, depth):
        """Elements of a column of a panel, for `depth` steps of k."""
        return self.head + (depth + (self.steps - 1)) // self.steps * self.steps

    # -- operands -----------------------------------------------------------------------------------------------------
    def a_value(self, b: KernelBuilder, value: ir.Value, dtype: str) -> ir.Value:
        """A loaded value of A, of `dtype` in memory, in the form that tiles read."""
        if self.offset:
            return b.ir.xor(value, b.constant_of(value.type, OFFSET))
        return widen(b, value, dtype, self.a)

    def columns(self, b: KernelBuilder, at: Pointer, number: int, count: int, lanes: int, mask) -> ir.Value:
        """Vector `number` of one step of a panel of `count` vectors."""
        width = lanes * self.steps
        if self.name == "halves" and count == 2:
            both = b.load(at.cast("int32"), 0, lanes)
            shifted = b.ir.shl(both, b.constant_of(both.type, 16))
            value = b.ir.and_(both, b.constant_of(both.type, 0xFFFF0000)) if number else shifted
            return b.ir.bitcast(value, b.type("float32", lanes))
        if self.steps == 1:
            return widen(b, b.load(at, number * lanes, lanes, mask), self.b, self.accumulate)
        value = b.load(at, number * width, width, mask, raw=True)
        if self.name == "pairs":
            return b.ir.sext(value, ir.VectorType(I16, width))
        return b.ir.bitcast(value, ir.VectorType(BF16, width)) if self.b == "bfloat16" else value

    def broadcast(self, b: KernelBuilder, at: Pointer, index, lanes: int) -> ir.Value:
        """The elements of A for one step of one row, in every lane."""
        if self.steps == 1:
            return b.load_broadcast(at, index, lanes)
        word = b.load_broadcast((at + index).cast("int32"), 0, lanes)
        element = {"int16": I16, "bfloat16": BF16}.get(self.a, I8)
        return b.ir.bitcast(word, ir.VectorType(element, lanes * self.steps))

    # -- arithmetic ---------------------------------------------------------------------------------------------------
    def add(self, b: KernelBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
        """The sums z with the products of one step of A and of a vector of columns added."""
        nbytes = b.target.vector_bytes
        if self.name == "pairs":
            return b.add(b.instruction(_PMADD[nbytes], z.type, x, y), z)
        if self.name == "offset_quads":
            return b.instruction(f"llvm.x86.avx512.vpdpbusd.{8 * nbytes}", z.type, z, x, y)
        if self.name == "quads":
            return b.instruction(_SIGNED_QUADS[nbytes], z.type, z, x, y)
        if self.name == "bfloat16_pairs":
            return b.instruction(f"llvm.x86.avx512bf16.dpbf16ps.{8 * nbytes}", z.type, z, x, y)
        return multiply_add(b, x, y, z)

    def first_sums(self, b: KernelBuilder, at: Pointer, vectors: int, lanes: int) -> list[ir.Value]:
        """One vector per vector of columns: what sums begin with. at: the first step of a panel."""
        if not self.offset:
            return [b.constant(0, self.accumulate, lanes)] * vectors
        heads = at.cast(self.accumulate)
        return [b.load(heads, (j - vectors) * lanes, lanes) for j in range(vectors)]


def multiply_add(b: KernelBuilder, x, y, z):
    """x * y + z: fused for floats where the machine can, wrapping for integers."""
    fused = is_float(z) and b._has("fma")
    return b.fma(x, y, z) if fused else b.add(b.mul(x, y), z)


def plain(accumulate: str) -> Product:
    """Multiply-adds on operands of the sums' own dtype."""
    return Product("plain", accumulate, accumulate, accumulate)


def packed_product(dtype: str, result: str, target) -> Product:
    """How products of `dtype` elements with a packed second operand are made on a machine."""
    accumulate = accumulate_dtype(dtype, result)
    if dtype == "int8" and accumulate == "int32":
        if (target.has("avxvnniint8") and target.vector_bytes == 32) or target.has("avx10.2"):
            return Product("quads", accumulate, "int8", "int8", 4)
        if target.has("dotprod") and target.vector_bytes == 16:
            return Product("quads", accumulate, "int8", "int8", 4)
        vnni = "avx512vnni" if target.vector_bytes == 64 else "avxvnni"
        if target.has(vnni) and target.vector_bytes >= 32:
            return Product("offset_quads", accumulate, "uint8", "int8", 4)
        if target.machine in ("x86_64", "i686"):
            return Product("pairs", accumulate, "int16", "int8", 2)
        return Product("plain", accumulate, accumulate, "int8")
    if dtype == "bfloat16" and accumulate == "float32":
        if target.has("avx512bf16") and target.vector_bytes == 64:
            return Product("bfloat16_pairs", accumulate, "bfloat16", "bfloat16", 2)
        return Product("halves", accumulate, accumulate, "bfloat16")
    return plain(accumulate)
