"""The kernel of a matrix product: loops over units of work around register tiles. `gemm` chooses its `GemmPlan`."""

from __future__ import annotations

from typing import NamedTuple, cast

from kgraph.codegen.cpu.builder import Int, KernelBuilder, Pointer, itemsize
from kgraph.codegen.cpu.epilogue import Epilogue
from kgraph.codegen.cpu.microkernel import Panels, Tile, TileCode, TileRange, TileSet
from kgraph.codegen.cpu.pack import batch_offset, copy_run
from kgraph.codegen.cpu.products import Product
from kgraph.codegen.cpu.strided import resolve, resolve_all


class GemmPlan(NamedTuple):
    """Params of `render`. Sizes and strides are `int` or ("size", slot); strides in elements.

    product: a `Product`. a_dtype: dtype of A in memory. batch: batch sizes, with a_batch and b_batch strides
    (b_batch only if B is read in place). rows, columns, depth: M, N, K. a_row, a_step: strides of A along M and K.
    b_step: stride of B along K if B is read in place, else None. copy: "" reads A in place, "rows" copies blocks
    row by row, "columns" (A is contiguous along M) into panels of as many rows as the largest tile has, step by step.
    block: rows of a unit; even: at most, as whole tiles are shared out evenly at run time. chunk: steps of k between
    which sums rest in scratch. group: panels of a unit. lanes: of a vector of sums. row_tiles: the members of a
    `TileRange`. vectors: of a full panel. beside: panels that a single row is multiplied with at once, since the sums
    of one would wait for each other; 1 where there are more rows.

    Where M is symbolic and A is read in place, the block and the number of first tiles are sizes of run time: products
    that are equal but for these share a kernel.

    requests: tiles of a panel that between them ask for what they read next of B, where rows are so few that they are
    multiplied about as fast as B comes from memory; 0 for none.
    """

    product: tuple
    a_dtype: str
    batch: tuple
    a_batch: tuple
    b_batch: tuple
    rows: int | tuple
    columns: int | tuple
    depth: int | tuple
    a_row: int | tuple
    a_step: int | tuple
    b_step: int | tuple | None
    copy: str
    block: int | tuple
    even: bool
    chunk: int
    group: int
    lanes: int
    row_tiles: tuple
    vectors: int
    beside: int
    requests: int
    epilogue: tuple

    @property
    def way(self) -> Product:
        """How A and B are multiplied."""
        return Product(*self.product)

    @property
    def chunked(self) -> bool:
        """Whether k is cut into blocks, with the sums resting in scratch in between."""
        return not isinstance(self.depth, int) or self.depth > self.chunk

    @property
    def panel_rows(self) -> int:
        """Rows of a panel of the copied block: those of the largest tile, which reads them one step after another."""
        return max(self.row_tiles[0], default=1)

    @property
    def copy_pitch(self) -> int:
        """Distance of rows, or of panels, of the copied block: an odd number of cache lines, so that they spread.

        Behind a panel there is room for a vector, since its last step is written with whole ones; behind a row for the
        zeros that complete its last step.
        """
        line = 64 // itemsize(self.way.a)
        rows = self.copy == "rows"
        inner = self.chunk + (self.way.steps - 1) if rows else self.chunk * self.panel_rows + line
        return (-(-inner // line) | 1) * line

    @property
    def copy_bytes(self) -> int:
        """Scratch of a thread for the copied block of A; 0 where A is read in place."""
        if not self.copy:
            return 0
        block = cast(int, self.block)
        count = block if self.copy == "rows" else -(-block // self.panel_rows)
        return count * self.copy_pitch * itemsize(self.way.a)

    @property
    def sums_bytes(self) -> int:
        """Scratch of a thread for the sums of a unit."""
        count = self.group * cast(int, self.block) if self.chunked else max((*self.row_tiles[0], self.beside))
        return count * self.vectors * self.lanes * itemsize(self.way.accumulate)


class _Place(NamedTuple):
    """Where a unit stands: its rows of A, its B, its first output pixel; the steps of k that are summed, the number of
    the first one, and whether they are the first, the last ones."""

    a: Pointer
    bp: Pointer
    pixel: Int | int
    start: Int | int
    steps: Int | int
    first: object
    last: object


def render(params: tuple, target) -> str:
    """Kernel (A, B, extras..., outputs...); see `GemmPlan`."""
    plan = GemmPlan(*params)
    b = KernelBuilder("gemm", target)
    _Gemm(b, plan).emit()
    return b.ir_text()


class _Gemm:
    """Emits the loops of a product around its tiles."""

    def __init__(self, b: KernelBuilder, plan: GemmPlan):
        self.b, self.plan, self.product = b, plan, plan.way
        self.rows, self.columns, self.depth = (resolve(b, s) for s in (plan.rows, plan.columns, plan.depth))
        self.batch = resolve_all(b, plan.batch)
        self.panels = Panels(self.columns, plan.vectors * plan.lanes, plan.lanes)
        self.block = resolve(b, plan.block)
        sizes, first = plan.row_tiles
        self.row_tiles = TileRange(sizes, resolve(b, first))
        if plan.copy == "rows":
            col_pitch, a_step = plan.copy_pitch, self.product.steps
        elif plan.copy == "columns":
            col_pitch, a_step = 1, plan.panel_rows
        else:
            # What is read in place has static strides, see `_copy_mode`.
            col_pitch, a_step = cast(int, plan.a_row), cast(int, plan.a_step)
        code = TileCode(
            product=self.product,
            lanes=plan.lanes,
            row_pitch=0,
            col_pitch=col_pitch,
            a_step=a_step,
            loops=(),
            run=None if plan.chunked else b.ceil_div(cast(int, plan.depth), self.product.steps),
            b_step=plan.b_step,
            pixel_row_pitch=0,
            pixel_col_pitch=1,
            partial=plan.chunked,
            requests=plan.requests,
            panel=plan.vectors if plan.beside > 1 and plan.b_step is None else 0,
            panel_step=self.panels.width * self.product.column_length(plan.depth) if plan.beside > 1 else 0,
        )
        self.tiles = TileSet(b, code, Epilogue(*plan.epilogue))
        self.a = b.operand(0, plan.a_dtype)
        self.bp = b.operand(1, self.product.b)
        self.block_of_a = b.scratch(self.product.a)
        self.sums = b.scratch(self.product.accumulate, plan.copy_bytes)

    def emit(self) -> None:
        b, plan = self.b, self.plan
        groups = b.ceil_div(self.panels.count(), plan.group)
        blocks = b.ceil_div(self.rows, self.block)
        copied = b.variable(b.i64(-1))
        with b.loop(b.begin, b.end) as unit:
            group, place = unit % groups, unit // groups
            entry, first_row = place // blocks, (place % blocks) * self.block
            rows = b.min(self.block, self.rows - first_row)
            if plan.even:
                tiles = b.ceil_div(self.rows, plan.panel_rows)
                first_row = place % blocks * tiles // blocks * plan.panel_rows
                following = (place % blocks + 1) * tiles // blocks * plan.panel_rows
                rows = b.min(following, self.rows) - first_row
            a = self.a + batch_offset(b, entry, self.batch, resolve_all(b, plan.a_batch))
            a = a + first_row * resolve(b, plan.a_row)
            if plan.b_step is not None:
                bp = self.bp + batch_offset(b, entry, self.batch, resolve_all(b, plan.b_batch))
            else:
                bp = self.bp + entry * (self.product.column_length(self.depth) * self.panels.packed_columns())
            pixel = entry * self.rows + first_row
            if plan.chunked:
                self._chunks(a, bp, group, rows, pixel)
            else:
                if plan.copy:
                    with b.if_then(b.ir.icmp_signed("!=", b.i64(place), copied.get())):
                        self._copy(a, rows, self.depth)
                        copied.set(b.i64(place))
                self._columns(a, bp, group, rows, pixel, 0, self.depth, 1, 1)

    def _chunks(self, a, bp, group, rows, pixel) -> None:
        """A unit whose sums over k are made chunk by chunk."""
        b, plan = self.b, self.plan
        chunks = b.max(b.ceil_div(self.depth, plan.chunk), 1)
        with b.loop(0, chunks) as c:
            start = c * plan.chunk
            steps = b.min(plan.chunk, self.depth - start)
            if plan.copy:
                self._copy(a + start * resolve(b, plan.a_step), rows, steps)
            first, last = c.equals(0), c.equals(chunks - 1)
            self._columns(a, bp, group, rows, pixel, start, steps, first, last)

    def _copy(self, a, rows, steps) -> None:
        """Brings a block of A into scratch."""
        b, plan = self.b, self.plan
        a_row, a_step = resolve(b, plan.a_row), resolve(b, plan.a_step)
        if plan.copy == "rows":
            with b.loop(0, rows) as i:
                row = self.block_of_a + i * plan.copy_pitch
                copy_run(b, row, a + i * a_row, steps, a_step, self.product.a_value)
                for k in range(self.product.steps - 1):  # the last step may lack elements
                    b.store(row, steps + k, b.constant(0, self.product.a))
            return
        whole = rows // plan.panel_rows
        rest = rows - whole * plan.panel_rows
        with b.loop(0, steps) as k:
            with b.loop(0, whole) as panel:
                self._copy_step(a + k * a_step, panel, k, plan.panel_rows)
            with b.if_then(b.int(rest) > 0):
                self._copy_step(a + k * a_step, whole, k, rest)

    def _copy_step(self, a, panel, k, rows) -> None:
        """One step of k of one panel of the block: `rows` contiguous elements of A, in whole vectors of scratch."""
        b, plan = self.b, self.plan
        to = self.block_of_a + (panel * plan.copy_pitch + k * plan.panel_rows)
        for at in range(0, plan.panel_rows, plan.lanes):
            whole = isinstance(rows, int) and rows - at >= plan.lanes
            if isinstance(rows, int) and rows <= at:
                break
            mask = None if whole else b.tail_mask(b.max(rows - at, 0), plan.lanes)
            value = b.load(a, panel * plan.panel_rows + at, plan.lanes, mask)
            b.store(to, at, self.product.a_value(b, value, plan.a_dtype))

    def _columns(self, a, bp, group, rows, pixel, start, steps, first, last) -> None:
        """All panels of a unit, for one chunk of k that begins at `start`."""
        b, plan, panels = self.b, self.plan, self.panels
        at = _Place(a, bp, pixel, start, steps, first, last)
        begin = group * plan.group
        end = b.min(begin + plan.group, panels.count())
        whole = panels.columns // panels.width
        if not isinstance(whole, int) or whole:
            several = self._single_row if plan.beside > 1 else self._whole_panels
            several(begin, b.min(end, whole), rows, at)
        if isinstance(whole, int) and panels.columns % panels.width == 0:
            return
        with b.if_then(b.int(end) > whole):
            # Where panels are not narrowed, the last one may be any part of a panel.
            masked = not (isinstance(panels.columns, int) and panels.columns % plan.lanes == 0)
            vectors = panels.tail_vectors
            self._panel(at, whole, begin, vectors, masked, rows)

    def _whole_panels(self, begin, end, rows, at: _Place, first=None) -> None:
        """The panels from `first` on; `begin` is the unit's first one."""
        with self.b.loop(begin if first is None else first, end) as panel:
            self._panel(at, panel, begin, self.panels.vectors, False, rows)

    def _single_row(self, begin, end, rows, at: _Place) -> None:
        """Panels `beside` each other where there is one row, else one by one."""
        b, beside = self.b, self.plan.beside
        if not isinstance(rows, int):
            with b.if_else(rows.equals(1)) as (then, otherwise):
                with then:
                    self._single_row(begin, end, 1, at)
                with otherwise:
                    self._whole_panels(begin, end, rows, at)
            return
        several = b.int(begin) + (b.int(end) - begin) // beside * beside
        with b.loop(begin, several, beside) as panel:
            self._panel(at, panel, begin, beside * self.panels.vectors, False, 1)
        self._whole_panels(begin, end, 1, at, first=several)

    def _panel(self, place: _Place, panel, begin, vectors, masked, rows) -> None:
        """The tiles of a panel, or of several where there is one row."""
        b, plan, panels = self.b, self.plan, self.panels
        a, bp, pixel, start, steps, first, last = place
        column = panel * panels.width
        if plan.b_step is not None:
            bp = bp + (column + start * resolve(b, plan.b_step))
        else:
            head = self.product.head
            width = min(vectors, panels.vectors) * plan.lanes
            bp = bp + (column * self.product.column_length(self.depth) + (start + head) * width)
        remaining = panels.columns - column
        turns = b.ceil_div(steps, self.product.steps)

        def tile(row, size):
            if plan.copy:
                at = self.block_of_a + self._copied_row(row)
            else:
                at = a + (row * plan.a_row + start * plan.a_step)
            sums = self.sums
            if plan.chunked:
                sums = sums + (((panel - begin) * self.block + row) * panels.width)
            shape = Tile(1, size, vectors, masked)
            requested = None
            if plan.requests:
                # What follows in memory: the next block of k, or the next panel.
                number = row // min(plan.row_tiles[0]) % plan.requests
                requested = bp + (turns + number) * (self.product.steps * width)
            self.tiles.call(shape, at, bp, sums, pixel + row, column, remaining, turns, first, last, requested)

        if vectors > panels.vectors:
            tile(0, 1)
        else:
            self.row_tiles.walk(b, rows, tile)

    def _copied_row(self, row):
        """Where a row of the copied block begins."""
        plan = self.plan
        if plan.copy == "rows":
            return row * plan.copy_pitch
        return row // plan.panel_rows * plan.copy_pitch + row % plan.panel_rows
