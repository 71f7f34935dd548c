"""Small products inside of larger kernels: C[rows, columns] (+)= A[rows, k] B[k, columns], all three in cache.

B is a panel, `vectors` full vectors wide; C has dense rows. The rows of C go through register tiles, each an internal
function of the kernel. Sums over k run in order, so results do not depend on the tiling.
"""

from __future__ import annotations

from typing import NamedTuple

from kgraph.codegen.cpu.builder import I64, PTR, Int, KernelBuilder, Pointer
from kgraph.codegen.cpu.microkernel import subfunction


class Panel(NamedTuple):
    """The static part of a product. Strides are in elements; `start` says where C's sums begin.

    start: "zero", "sums" (C itself), or "initial" (a matrix given to the call, its rows `initial_stride` apart).
    a_step: stride of A along k.
    """

    dtype: str
    lanes: int
    vectors: int
    a_stride: int
    b_stride: int
    c_stride: int
    start: str = "zero"
    initial_stride: int = 0
    a_step: int = 1


class BlockProduct:
    """Emits calls of one kind of product; the tile functions are made when first needed."""

    def __init__(self, b: KernelBuilder, name: str, panel: Panel):
        self.b, self.name, self.panel = b, name, panel
        self.functions: dict[int, object] = {}
        large = b.target.num_vector_registers >= 32
        self.tiles = [r for r in (8, 4, 2, 1) if r * panel.vectors <= (24 if large else 12)]

    def emit(self, a: Pointer, panel: Pointer, c: Pointer, rows, k, initial: Pointer | None = None) -> None:
        """The product for `rows` rows of A and C and `k` steps."""
        b, p = self.b, self.panel
        done = 0
        for tile in self.tiles:
            rest = rows - done
            stop = done + (rest - rest % tile)
            if isinstance(stop, int) and stop == done:
                continue
            with b.loop(done, stop, tile) as r:
                begin = initial and initial + r * p.initial_stride
                self._call(tile, a + r * p.a_stride, panel, c + r * p.c_stride, k, begin)
            done = stop

    def _call(self, tile: int, a: Pointer, panel: Pointer, c: Pointer, k, initial: Pointer | None) -> None:
        if tile not in self.functions:
            self.functions[tile] = self._build(tile)
        b = self.b
        b.ir.call(self.functions[tile], [a.value, panel.value, c.value, (initial or c).value, b.i64(k)])

    def _build(self, rows: int):
        b, p = self.b, self.panel
        with subfunction(b, f"{self.name}_{rows}", [PTR] * 4 + [I64]) as function:
            a, panel, c, initial = (
                Pointer(b, argument, p.dtype, scope)
                for argument, scope in zip(function.args[:4], ("rows", "panel", "sums", "initial"), strict=True)
            )
            k = Int(b, function.args[4])
            places = [(r, j) for r in range(rows) for j in range(p.vectors)]
            source = {"zero": None, "sums": c, "initial": initial}[p.start]
            stride = p.initial_stride if p.start == "initial" else p.c_stride
            zero = b.constant(0, p.dtype, p.lanes)
            sums = {
                (r, j): b.variable(zero if source is None else b.load(source, r * stride + j * p.lanes, p.lanes))
                for r, j in places
            }

            def step(at) -> None:
                columns = [b.load(panel, at * p.b_stride + j * p.lanes, p.lanes) for j in range(p.vectors)]
                for r in range(rows):
                    x = b.load_broadcast(a, at * p.a_step + r * p.a_stride, p.lanes)
                    for j in range(p.vectors):
                        sums[r, j].set(b.fma(x, columns[j], sums[r, j].get()))

            unroll = max(1, 16 // (rows * p.vectors))
            whole = k - k % unroll
            with b.loop(0, whole, unroll) as at:
                for u in range(unroll):
                    step(at + u)
            if unroll > 1:
                with b.loop(whole, k) as at:
                    step(at)
            for r, j in places:
                b.store(c, r * p.c_stride + j * p.lanes, sums[r, j].get())
        return function
