"""What the kernels of attention and of its gradient share: operands, packing for one head, masks and bias."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from llvmlite import ir

from kgraph.codegen.attention import LOG2E, MASKED
from kgraph.codegen.cpu import polynomials, vector_math
from kgraph.codegen.cpu.builder import KernelBuilder, Pointer, compute_dtype
from kgraph.codegen.cpu.strided import resolve, resolve_all
from kgraph.codegen.cpu.transpose import transpose_vectors
from kgraph.ir import Dim, Value


def accepts_operands(q: Value, k: Value, v: Value) -> str | None:
    """None where there are kernels for attention with q, k and v, else why not."""
    if q.dtype not in ("float16", "bfloat16", "float32", "float64"):
        return f"no attention kernel for {q.dtype}"
    if any(isinstance(n, Dim) for n in (*q.shape[2:], *k.shape[2:], *v.shape[2:])):
        return "symbolic heads or depth"
    return None


class Shape(NamedTuple):
    """Static structure of a kernel: heads, key heads, depths, masks."""

    dtype: str
    heads: int
    key_heads: int
    depth: int
    value_depth: int
    scale: float
    is_causal: bool
    has_mask: bool
    has_bias: bool

    @staticmethod
    def of(q: Value, k: Value, v: Value, attrs: Mapping) -> Shape:
        """The structure for the operands and attributes of a node."""
        flags = (bool(attrs[name]) for name in ("is_causal", "has_mask", "has_bias"))
        return Shape(q.dtype, q.shape[2], k.shape[2], q.shape[3], v.shape[3], float(attrs["scale"]), *flags)


def exp2_nonpositive(b: KernelBuilder, x: ir.Value) -> ir.Value:
    """2^x for x <= 0, results below the normal range flushed to 0; NaN passes."""
    single = vector_math.is_f32(x)
    low = -127.0 if single else -1023.0  # of which the power below has the bits of zero
    x = b.select(b.compare("<", x, low), b.constant_of(x.type, low), x)
    n, number = vector_math.round_small(b, x)
    r = b.sub(x, n)
    coefficients = polynomials.EXP2_F32 if single else polynomials.EXP2_F64
    value = b.fma(r, vector_math.polynomial(b, r, coefficients), 1.0)
    return b.mul(value, vector_math.power_of_two(b, number, x))


class AttentionOperands:
    """The operands of a kernel (q, k, v, then mask and bias) and the code that reads them.

    extra_strides: of mask and bias, see `extra_strides`. next_operand: number of the first operand behind them.
    """

    def __init__(self, b: KernelBuilder, shape: Shape, queries, keys, extra_strides: tuple):
        self.b, self.shape = b, shape
        self.compute = compute_dtype(shape.dtype)
        self.lanes = b.target.lanes(self.compute)
        self.total_queries, self.total_keys = resolve(b, queries), resolve(b, keys)
        self.q, self.k, self.v = (b.operand(i, shape.dtype) for i in range(3))
        extras = [resolve_all(b, s) for s in extra_strides]
        self.next_operand = 3
        self.mask = self.bias = None
        if shape.has_mask:
            self.mask = (b.operand(self.next_operand, "bool"), extras[0])
            self.next_operand += 1
        if shape.has_bias:
            self.bias = (b.operand(self.next_operand, shape.dtype), extras[-1])
            self.next_operand += 1

    # -- packing --------------------------------------------------------------------------------------------------
    def pack_transposed(self, x: Pointer, batch, head, depth: int, to: Pointer) -> None:
        """Keys or values, transposed into panels [panel][depth][2 vectors of keys]; behind the last key its copies."""
        b, lanes = self.b, self.lanes
        stride = self.shape.key_heads * depth
        source = x + (batch * self.total_keys * stride + head * depth)
        with b.loop(0, self.total_keys, 2 * lanes) as panel, b.loop(0, 2 * lanes, lanes) as half:
            rows = [b.min(panel + half + i, self.total_keys - 1) * stride for i in range(lanes)]
            panel_to = to + (panel * depth + half)

            def transpose(column, valid: int) -> None:
                mask = None if valid == lanes else b.tail_mask(valid, lanes)
                block = [b.load(source, row + column, lanes, mask) for row in rows]
                for i, vector in enumerate(transpose_vectors(b, block)[:valid]):
                    b.store(panel_to, (column + i) * (2 * lanes), vector)

            whole = depth - depth % lanes
            with b.loop(0, whole, lanes) as column:
                transpose(column, lanes)
            if depth > whole:
                transpose(whole, depth - whole)

    def pack_rows(self, x: Pointer, first, rows, heads: int, head, depth: int, factor, to: Pointer, width: int) -> None:
        """Rows [first, first + rows) of one head of x[., heads, depth], times `factor`, to dense rows of `width`.

        What a row has beyond `depth` is zero. factor: a vector, or None.
        """
        b, stride = self.b, heads * depth
        source = x + (first * stride + head * depth)
        with b.loop(0, rows) as r:
            for column in range(0, width, self.lanes):
                vector = self.load_part(source + r * stride, column, depth)
                b.store(to, r * width + column, vector if factor is None else b.mul(vector, factor))

    def load_part(self, row: Pointer, column: int, limit: int) -> ir.Value:
        """A vector of row[column..], zeros from `limit` on."""
        lanes = self.lanes
        valid = min(lanes, limit - column)
        if valid <= 0:
            return self.b.constant(0, self.compute, lanes)
        mask = None if valid == lanes else self.b.tail_mask(valid, lanes)
        return self.b.load(row, column, lanes, mask)

    # -- scores ---------------------------------------------------------------------------------------------------
    def adjustment(self, batch, head, query, key):
        """Code that applies bias and masks to a vector of scores, or None where there is nothing to apply."""
        b, shape, lanes = self.b, self.shape, self.lanes
        if not (shape.is_causal or shape.has_mask or shape.has_bias):
            return None

        masked = b.constant(MASKED[self.compute], self.compute, lanes)

        def adjust(score, i, mask):
            if self.bias is not None:
                score = b.fma(self.read_extra(self.bias, batch, head, query, key, i, mask), LOG2E, score)
            if shape.is_causal or shape.has_mask:
                score = b.select(self.visible(batch, head, query, key, i, mask), score, masked)
            return score

        return adjust

    def visible(self, batch, head, query, key, i, mask) -> ir.Value:
        """Which of the keys from key + i on a query sees; there is a mask, or the attention is causal."""
        b, lanes = self.b, self.lanes
        allowed = None
        if self.shape.is_causal:
            last = b.broadcast(b.ir.trunc(b.i64(query - key - i), ir.IntType(32)), lanes)
            allowed = b.ir.icmp_signed("<=", b.lane_numbers("int32", lanes), last)
        if self.mask is not None:
            unmasked = self.read_extra(self.mask, batch, head, query, key, i, mask)
            allowed = unmasked if allowed is None else b.ir.and_(allowed, unmasked)
        return allowed

    def read_extra(self, extra, batch, head, query, key, i, mask) -> ir.Value:
        """A vector of the mask or the bias."""
        pointer, (by_batch, by_head, by_query, by_key) = extra
        at = pointer + (batch * by_batch + head * by_head + query * by_query + key * by_key)
        if isinstance(by_key, int) and by_key == 0:
            return self.b.load_broadcast(at, 0, self.lanes)
        return self.b.load(at, i, self.lanes, mask)
