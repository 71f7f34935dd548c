"""The kernel of an implicit matrix product: loops around the tiles of a convolution, and the copy of the input."""

from __future__ import annotations

from typing import NamedTuple

from kgraph.codegen.cpu.builder import KernelBuilder, Pointer, itemsize
from kgraph.codegen.cpu.conv_geometry import AxisPhase
from kgraph.codegen.cpu.epilogue import Epilogue
from kgraph.codegen.cpu.microkernel import KLoop, Panels, Tile, TileCode, TileRange, TileSet
from kgraph.codegen.cpu.pack import copy_run
from kgraph.codegen.cpu.products import plain
from kgraph.codegen.cpu.strided import resolve, resolve_all
from kgraph.ir.dims import product

DEPTH = 1600  # steps of k between which sums stay in registers, where there are more


class ConvPlan(NamedTuple):
    """Params of `render_conv`: a convolution brought to three spatial axes. Sizes are `int` or ("size", slot).

    sizes, out_sizes: of the spatial axes. channels, filters: per group. window: taps per axis. phases: per phase the
    fields of one `AxisPhase` per axis. origins: minus the padding below, per axis. counts: positions per phase, axis.
    block: (rows, columns) of positions of a unit. group: panels of a unit. row_tiles, col_tiles: tile extents (see
    `TileRange`) per phase. pixel_pitch: distance of pixels in the copy. lanes, vectors: of a vector, of a full panel.
    requests: tiles that between them ask for what they read next of the weight, which comes from memory; 0 for none.
    """

    accumulate: str
    dtype: str
    images: int | tuple
    sizes: tuple
    out_sizes: tuple
    groups: int
    channels: int
    filters: int
    window: tuple
    phases: tuple
    origins: tuple
    counts: tuple
    block: tuple
    group: int
    row_tiles: tuple
    col_tiles: tuple
    pixel_pitch: int
    lanes: int
    vectors: int
    requests: int
    epilogue: tuple


class Section:
    """What the code of one phase is made of; distances are in elements of the copy."""

    def __init__(self, plan: ConvPlan, index: int):
        self.phases = tuple(AxisPhase(*p) for p in plan.phases[index])
        deep, high, wide = self.phases
        pitch, channels = plan.pixel_pitch, plan.channels
        self.taps = deep.taps * high.taps * wide.taps
        self.extents = (max(deep.taps, 1), high.copy_extent(plan.block[0]), wide.copy_extent(plan.block[1]))
        self.row_pitch = self.extents[2] * pitch
        self.plane_pitch = self.extents[1] * self.row_pitch
        self.elements = self.extents[0] * self.plane_pitch
        window = plan.window
        # Rows of the packed weight: taps in row-major order, channels innermost.
        self.first_row = ((deep.first_tap * window[1] + high.first_tap) * window[2] + wide.first_tap) * channels
        loops = [
            KLoop(deep.taps, self.plane_pitch, deep.tap_step * window[1] * window[2] * channels),
            KLoop(high.taps, high.copy_reach * self.row_pitch, high.tap_step * window[2] * channels),
            KLoop(wide.taps, wide.copy_reach * pitch, wide.tap_step * channels),
        ]
        self.run = channels
        # Taps that are neighbours in the copy and in the weight continue the run of channels.
        if loops[2].a_stride == channels and loops[2].b_rows == channels:
            self.run *= loops.pop().turns
        loops = [loop for loop in loops if loop.turns != 1]
        depth, inner = self.run, len(loops)
        while inner and (depth * loops[inner - 1].turns <= DEPTH or not self.taps):
            inner -= 1
            depth *= loops[inner].turns
        self.outer_loops, self.inner_loops = tuple(loops[:inner]), tuple(loops[inner:])
        self.chunks = product(loop.turns for loop in self.outer_loops)
        self.depth = depth  # steps of k of a chunk


def copy_bytes(plan: ConvPlan, sections: list[Section]) -> int:
    """Scratch of a thread for the copy of the input that a unit meets, in whole cache lines."""
    elements = max(s.elements for s in sections)
    return -(-elements * itemsize(plan.accumulate) // 64) * 64


def sums_bytes(plan: ConvPlan, sections: list[Section]) -> int:
    """Scratch of a thread for sums that rest in memory between blocks of taps and channels."""
    split = any(s.chunks > 1 for s in sections)
    pixels = plan.block[0] * plan.block[1] * plan.group if split else 32
    return pixels * plan.vectors * plan.lanes * itemsize(plan.accumulate)


def render_conv(params: tuple, target) -> str:
    """Kernel (x, packed weight, extras..., outputs...); see `ConvPlan`. The phases' units follow one another."""
    plan = ConvPlan(*params)
    b = KernelBuilder("conv", target)
    sections = [Section(plan, i) for i in range(len(plan.phases))]
    scratch = copy_bytes(plan, sections)
    first_unit = 0
    tile_sets: dict[TileCode, TileSet] = {}
    for index, section in enumerate(sections):
        emitter = _Conv(b, plan, section, index, scratch, tile_sets)
        units = emitter.units()
        begin, end = b.max(b.begin - first_unit, 0), b.min(b.end - first_unit, units)
        emitter.emit(begin, end)
        first_unit = first_unit + units
    return b.ir_text()


class _Conv:
    """Emits the loops of one phase around its tiles. Phases whose tiles are the same code share them."""

    def __init__(
        self, b: KernelBuilder, plan: ConvPlan, section: Section, index: int, copy_bytes: int, tile_sets: dict
    ):
        self.b, self.plan, self.section = b, plan, section
        self.images = resolve(b, plan.images)
        self.sizes, self.out_sizes = resolve_all(b, plan.sizes), resolve_all(b, plan.out_sizes)
        self.counts = resolve_all(b, plan.counts[index])
        self.panels = Panels(plan.filters, plan.vectors * plan.lanes, plan.lanes)
        self.row_tiles, self.col_tiles = TileRange(plan.row_tiles[index]), TileRange(plan.col_tiles[index])
        origins = resolve_all(b, plan.origins)
        self.origins = [o if p.origin is None else p.origin for p, o in zip(section.phases, origins)]
        _, high, wide = section.phases
        wide_rows = max(plan.row_tiles[index], default=1) > 1
        code = TileCode(
            product=plain(plan.accumulate),
            lanes=plan.lanes,
            row_pitch=high.copy_step * section.row_pitch,
            col_pitch=wide.copy_step * plan.pixel_pitch,
            a_step=1,
            loops=section.inner_loops,
            run=section.run,
            b_step=None,
            pixel_row_pitch=high.period * plan.out_sizes[2] if wide_rows else 0,
            pixel_col_pitch=wide.period,
            partial=section.chunks > 1,
            requests=plan.requests,
        )
        self.tiles = tile_sets.setdefault(code, TileSet(b, code, Epilogue(*plan.epilogue), f"phase{index}_"))
        self.x, self.weight = b.operand(0, plan.dtype), b.operand(1, plan.accumulate)
        self.copy = b.scratch(plan.accumulate)
        self.sums = b.scratch(plan.accumulate, copy_bytes)

    def _grid(self):
        """Blocks of rows and of columns, groups of panels."""
        b, plan = self.b, self.plan
        rows, cols = (b.ceil_div(c, s) for c, s in zip(self.counts[1:], plan.block))
        return rows, cols, b.ceil_div(self.panels.count(), plan.group)

    def units(self):
        """Units of work of the phase."""
        rows, cols, groups = self._grid()
        return self.images * (self.plan.groups * self.counts[0] * rows * cols * groups)

    def emit(self, begin, end) -> None:
        """The units [begin, end) of the phase."""
        b, plan, section = self.b, self.plan, self.section
        row_blocks, col_blocks, panel_groups = self._grid()
        copied = b.variable(b.i64(-1))
        with b.loop(begin, end) as unit:
            panel_group, place = unit % panel_groups, unit // panel_groups
            first_col, rest = (place % col_blocks) * plan.block[1], place // col_blocks
            first_row, rest = (rest % row_blocks) * plan.block[0], rest // row_blocks
            deep, rest = rest % self.counts[0], rest // self.counts[0]
            group, image = rest % plan.groups, rest // plan.groups
            rows = b.min(plan.block[0], self.counts[1] - first_row)
            cols = b.min(plan.block[1], self.counts[2] - first_col)
            if section.taps:
                with b.if_then(b.ir.icmp_signed("!=", b.i64(place), copied.get())):
                    self._copy(image, group, (deep, first_row, first_col), (1, rows, cols))
                    copied.set(b.i64(place))
            firsts = (deep, first_row, first_col)
            pixel = image
            for size, first, phase in zip(self.out_sizes, firsts, section.phases):
                pixel = pixel * size + (first * phase.period + phase.phase)
            self._panels(panel_group, group, rows, cols, pixel)

    # -- the copy of the input ----------------------------------------------------------------------------------
    def _copy(self, image, group, firsts, counts) -> None:
        """Copies what a block meets: positions from `firsts` on, `counts` of them, per axis."""
        b, plan, section = self.b, self.plan, self.section
        starts = [f * p.step + o for f, p, o in zip(firsts, section.phases, self.origins)]
        extents = [
            (c - 1) * p.copy_step + ((max(p.taps, 1) - 1) * p.copy_reach + 1) for c, p in zip(counts, section.phases)
        ]
        deep, high, wide = section.phases
        lo, hi = self._present(starts[2], wide.grid, self.sizes[2], extents[2])
        channels = plan.groups * plan.channels
        # Planes are copied only where taps along the depth meet them.
        plane_step = deep.reach
        with b.loop(0, max(deep.taps, 1)) as plane, b.loop(0, extents[1]) as row:
            d, h = starts[0] + plane * plane_step, starts[1] + row * high.grid
            at = self.copy + (plane * section.plane_pitch + row * section.row_pitch)
            inside = self._inside(d, 0)
            inside = b.ir.and_(inside, self._inside(h, 1))
            with b.if_else(inside) as (then, otherwise):
                with then:
                    self._zeros(at, 0, lo)
                    line = ((image * self.sizes[0] + d) * self.sizes[1] + h) * self.sizes[2]
                    source = self.x + ((line + (starts[2] + lo * wide.grid)) * channels + group * plan.channels)
                    self._pixels(at + lo * plan.pixel_pitch, source, hi - lo, wide.grid * channels)
                    self._zeros(at, hi, extents[2])
                with otherwise:
                    self._zeros(at, 0, extents[2])

    def _inside(self, position, axis: int):
        b = self.b
        position = b.int(position)
        return b.ir.and_(position >= 0, position < self.sizes[axis])

    def _present(self, start, grid: int, size, extent) -> tuple:
        """[lo, hi): elements of a row of the copy that lie inside of the input."""
        b = self.b
        lo = b.min(b.ceil_div(b.max(0 - start, 0), grid), extent)
        hi = b.min(b.ceil_div(b.max(size - start, 0), grid), extent)
        return lo, b.max(hi, lo)

    def _zeros(self, at: Pointer, begin, end) -> None:
        b, plan = self.b, self.plan
        lanes = b.target.vector_bytes // itemsize(plan.accumulate)
        zero = b.constant(0, plan.accumulate, lanes)
        begin, end = b.int(begin * plan.pixel_pitch), b.int(end * plan.pixel_pitch)
        b.vector_loop(begin, end, lanes, lambda i, mask, slot: b.store(at, i, zero, mask))

    def _pixels(self, at: Pointer, source: Pointer, count, distance: int) -> None:
        """Copies `count` pixels that lie `distance` elements apart."""
        b, plan = self.b, self.plan
        if distance == plan.channels == plan.pixel_pitch:
            copy_run(b, at, source, count * plan.channels)
            return
        with b.loop(0, count) as i:
            copy_run(b, at + i * plan.pixel_pitch, source + i * distance, plan.channels)

    # -- products -----------------------------------------------------------------------------------------------
    def _panels(self, panel_group, group, rows, cols, pixel) -> None:
        b, plan, section, panels = self.b, self.plan, self.section, self.panels
        depth = product(plan.window) * plan.channels
        weight = self.weight + group * (depth * panels.packed_columns())
        begin = panel_group * plan.group
        end = b.min(begin + plan.group, panels.count())
        whole = panels.columns // panels.width

        def chunks(panel, vectors: int, masked: bool) -> None:
            column = panel * panels.width
            width = vectors * plan.lanes
            at = weight + (column * depth + section.first_row * width)
            sums = self.sums
            if section.chunks > 1:
                sums = sums + (panel - begin) * (plan.block[0] * plan.block[1] * panels.width)
            out = (group * plan.filters + column, panels.columns - column)
            if section.chunks == 1:
                self._tiles(self.copy, at, sums, vectors, masked, rows, cols, pixel, out, 1, 1)
                return
            with b.loop(0, section.chunks) as c:
                a_offset, b_rows, rest = 0, 0, c
                for loop in reversed(section.outer_loops):
                    index, rest = rest % loop.turns, rest // loop.turns
                    a_offset, b_rows = index * loop.a_stride + a_offset, index * loop.b_rows + b_rows
                first, last = c.equals(0), c.equals(section.chunks - 1)
                a = self.copy + a_offset
                self._tiles(a, at + b_rows * width, sums, vectors, masked, rows, cols, pixel, out, first, last)

        if whole:
            with b.loop(begin, b.min(end, whole)) as panel:
                chunks(panel, panels.vectors, False)
        if panels.columns % panels.width:
            with b.if_then(b.int(end) > whole):
                chunks(whole, panels.tail_vectors, panels.columns % plan.lanes != 0)

    def _tiles(self, a, at, sums, vectors, masked, rows, cols, pixel, out, first, last) -> None:
        """All tiles of a block for one panel and one chunk of k."""
        b, plan, section = self.b, self.plan, self.section
        _, high, wide = section.phases
        column, remaining = out

        def tile_row(row, tile_rows: int) -> None:
            def tile(col, tile_cols: int) -> None:
                start = a + (row * (high.copy_step * section.row_pitch) + col * (wide.copy_step * plan.pixel_pitch))
                first_pixel = pixel + (row * high.period * self.out_sizes[2] + col * wide.period)
                place = sums
                if section.chunks > 1:
                    # Tiles are disjoint in positions; `row * columns + col * rows` numbers their first sums densely.
                    place = sums + (row * plan.block[1] + col * tile_rows) * self.panels.width
                shape = Tile(tile_rows, tile_cols, vectors, masked)
                requested = None
                if plan.requests:
                    # What follows in memory: the next chunk of k, or the next panel.
                    number = (row // self.row_tiles.sizes[0] + col // self.col_tiles.sizes[0]) % plan.requests
                    requested = at + (section.depth + number) * (vectors * plan.lanes)
                self.tiles.call(shape, start, at, place, first_pixel, column, remaining, 0, first, last, requested)

            self.col_tiles.walk(b, cols, tile)

        self.row_tiles.walk(b, rows, tile_row)
