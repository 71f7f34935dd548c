"""The kernels of filter gradients: sums over chunks of output positions, and the sum of the chunks.

A *line* is a row of output positions, or a piece of one where rows are long or of symbolic width. A unit takes a chunk
of lines in blocks: it copies the cotangents of a block as panels of filters, and for each row of the window's taps the
input that the lines meet, with zeros for padding. Then tiles of (taps, channels) times filters run over the positions
of the block as over the k of a matrix product, adding to sums that rest in the output in between.
"""

from __future__ import annotations

from typing import NamedTuple

from llvmlite import ir

from kgraph.codegen.cpu.builder import I1, I64, PTR, Int, KernelBuilder, Pointer, itemsize
from kgraph.codegen.cpu.conv_geometry import AxisPhase, axis_phases
from kgraph.codegen.cpu.epilogue import subfunction, vector_masks
from kgraph.codegen.cpu.microkernel import Panels, TileRange, carried_loop
from kgraph.codegen.cpu.pack import copy_run, widen
from kgraph.codegen.cpu.products import multiply_add
from kgraph.codegen.cpu.strided import SizeTable, resolve, resolve_all
from kgraph.codegen.kernel import KernelCall, KernelSpec, Temporary
from kgraph.ir import Value
from kgraph.ir.dims import product


class FilterPlan(NamedTuple):
    """Params of `render_filter`: three spatial axes. Sizes are `int` or ("size", slot).

    accumulate: dtype of the sums; dtype: of the operands. origins: minus the padding below, per axis. window: taps;
    steps, reaches: strides and window dilations. channels, filters: per group. piece: positions of a line, at most;
    whole: whether every line has as many. lines: of a block; chunk: of a unit. joined: rows of taps that one copy of
    the input holds (more than one only where `dense`); copies: how many such copies a unit makes. channel_block,
    panels: channels, and panels of filters, of a unit. tile: segments, and rows of each, of a tile. copied, packed:
    whether the input, the cotangents are copied; else they are read in place (the input only if all its pixels are one
    line without borders). lanes, vectors: of a vector, of a full panel.
    """

    accumulate: str
    dtype: str
    images: int | tuple
    sizes: tuple
    out_sizes: tuple
    origins: tuple
    window: tuple
    steps: tuple
    reaches: tuple
    groups: int
    channels: int
    filters: int
    piece: int
    whole: bool
    lines: int
    chunk: int
    joined: int
    copies: int
    channel_block: int
    panels: int
    tile: tuple
    copied: bool
    packed: bool
    lanes: int
    vectors: int

    @property
    def width(self) -> AxisPhase:
        """How the last axis is met."""
        return axis_phases(self.window[2], self.steps[2], None, 1, self.reaches[2])[0]

    @property
    def copied_pixels(self) -> int:
        """Pixels of one row in a copy of the input."""
        return self.width.copy_extent(self.piece)

    @property
    def dense(self) -> bool:
        """Whether the channels of neighbouring taps lie side by side in the copy and in the result."""
        return self.window[2] == 1 or (self.width.copy_reach == 1 and self.channel_block == self.channels)

    @property
    def segment(self) -> int:
        """Rows of the result that are neighbours in the copy: one tap's channels, or those of a row of taps."""
        return self.channel_block * (self.window[2] if self.dense else 1)

    @property
    def segments(self) -> int:
        """How many segments a copy holds."""
        return self.joined if self.dense else self.window[2]

    @property
    def copy_pitch(self) -> int:
        """Distance of segments in the copy, in elements."""
        return self.channel_block * (self.copied_pixels if self.dense else self.width.copy_reach)

    @property
    def out_pitch(self) -> int:
        """Distance of segments in the result, in rows."""
        return self.channels * (self.window[2] if self.dense else 1)

    @property
    def pixel_pitch(self) -> int:
        """Distance of pixels in what tiles read."""
        return self.channel_block if self.copied else self.groups * self.channels

    @property
    def copy_bytes(self) -> int:
        """Scratch of a thread for a copy of the input, in whole cache lines."""
        elements = self.lines * self.joined * self.copied_pixels * self.channel_block if self.copied else 0
        return -(-elements * itemsize(self.accumulate) // 64) * 64

    @property
    def panel_bytes(self) -> int:
        """Scratch of a thread for the cotangents of a block."""
        elements = self.lines * self.piece * self.panels * self.vectors * self.lanes
        return elements * itemsize(self.accumulate) if self.packed else 0


def total_call(partial: Temporary, output: Value, chunks, target) -> KernelCall:
    """The call that adds the sums of chunks, partial[chunks, *shape], in their order."""
    accumulate, count = partial.type.dtype, product(output.shape)
    lanes = target.vector_bytes // itemsize(accumulate)
    table = SizeTable()
    params = (accumulate, output.dtype, count, table(chunks), lanes)
    return KernelCall(
        spec=KernelSpec("add_chunks", "kgraph.codegen.cpu.conv_filter_kernel:render_total", params),
        operands=[partial, output],
        outputs=1,
        sizes=list(table.values),
        extent=-(-count // lanes),
        flops=chunks * count,
        bytes=partial.type.nbytes + output.type.nbytes,
    )


def render_total(params: tuple, target) -> str:
    """partial[chunks, count] -> out[count], the chunks added in order; a unit is one vector."""
    accumulate, dtype, count, chunks, lanes = params
    b = KernelBuilder("add_chunks", target)
    partial, out = b.operand(0, accumulate), b.operand(1, dtype)
    with b.loop(b.begin, b.end) as unit:
        at = unit * lanes
        mask = None if count % lanes == 0 else b.tail_mask(count - at, lanes)
        total = b.variable(b.constant(0, accumulate, lanes))
        with b.loop(0, resolve(b, chunks)) as chunk:
            total.set(b.add(total.get(), b.load(partial, chunk * count + at, lanes, mask)))
        b.store(out, at, narrow(b, total.get(), dtype), mask)
    return b.ir_text()


def narrow(b: KernelBuilder, value, dtype: str):
    """A sum in the compute type of the result."""
    wanted = b.type(dtype, value.type.count if hasattr(value.type, "count") else 1)
    return value if value.type == wanted else b.ir.fptrunc(value, wanted)


def render_filter(params: tuple, target) -> str:
    """x[images, *sizes, C], cotangent[images, *out_sizes, F] -> sums[chunks, *window, C / groups, F]."""
    b = KernelBuilder("conv_filter_gradient", target)
    _Filter(b, FilterPlan(*params)).emit()
    return b.ir_text()


class _Filter:
    """Emits the loops around the tiles, and the copies."""

    def __init__(self, b: KernelBuilder, plan: FilterPlan):
        self.b, self.plan = b, plan
        self.images = resolve(b, plan.images)
        self.sizes, self.out_sizes = resolve_all(b, plan.sizes), resolve_all(b, plan.out_sizes)
        self.origins = resolve_all(b, plan.origins)
        self.x, self.cotangent = b.operand(0, plan.dtype), b.operand(1, plan.dtype)
        self.sums = b.operand(2, plan.accumulate)
        self.copy, self.columns = b.scratch(plan.accumulate), b.scratch(plan.accumulate, plan.copy_bytes)
        self.panels = Panels(plan.filters, plan.vectors * plan.lanes, plan.lanes)
        self.all_channels, self.all_filters = plan.groups * plan.channels, plan.groups * plan.filters
        pieces = b.ceil_div(self.out_sizes[2], plan.piece)
        self.lines = self.images * (self.out_sizes[0] * self.out_sizes[1] * pieces)
        self.pieces = b.max(pieces, 1)  # it divides, also where no window fits
        self.row_pitch = plan.copied_pixels * plan.channel_block
        self.tiles = _Tiles(b, plan)

    def emit(self) -> None:
        b, plan = self.b, self.plan
        tap_rows = plan.window[0] * plan.window[1]
        tap_groups = tap_rows // (plan.joined * plan.copies)
        channel_groups = plan.channels // plan.channel_block
        panel_groups = -(-self.panels.count() // plan.panels)
        with b.loop(b.begin, b.end) as unit:
            panel_group, rest = unit % panel_groups, unit // panel_groups
            channel_group, rest = rest % channel_groups, rest // channel_groups
            tap_group, rest = rest % tap_groups, rest // tap_groups
            group, chunk = rest % plan.groups, rest // plan.groups
            self.group, self.first_channel = group, channel_group * plan.channel_block
            first_panel = panel_group * plan.panels
            last_panel = b.min(first_panel + plan.panels, self.panels.count())
            out = self.sums + chunk * (product(plan.window) * plan.channels * self.all_filters)
            begin = chunk * plan.chunk
            end = b.min(begin + plan.chunk, self.lines)
            # An empty batch runs once, over no lines, to write zeros.
            with b.loop(begin, b.max(end, begin + 1), plan.lines) as line:
                count = b.max(b.min(end - line, plan.lines), 0)
                first = b.int(line).equals(begin)
                self._block(out, line, count, tap_group, first_panel, last_panel, first)

    def _block(self, out, line, count, tap_group, first_panel, last_panel, first) -> None:
        """Adds the lines [line, line + count)."""
        b, plan = self.b, self.plan
        row, column = line // self.pieces, (line % self.pieces) * plan.piece
        self.columns_here = plan.piece if plan.whole else b.min(plan.piece, self.out_sizes[2] - column)
        pixel = row * self.out_sizes[2] + column
        cotangent = self.cotangent + (pixel * self.all_filters + self.group * plan.filters)
        if plan.packed:
            self._pack(cotangent, count * self.columns_here, first_panel, last_panel)
        with b.loop(0, plan.copies) as copy:
            tap_row = (tap_group * plan.copies + copy) * plan.joined
            copied = self.copy
            if plan.copied:
                self._copy(line, count, tap_row, column)
            else:
                copied = self.x + (pixel * self.all_channels + self.group * plan.channels + self.first_channel)
            at = out + (tap_row * plan.window[2] * plan.channels + self.first_channel) * self.all_filters

            def panel(number, vectors: int, masked: bool) -> None:
                filter = number * self.panels.width
                source = self._panel(number - first_panel) if plan.packed else cotangent + filter
                to = at + (self.group * plan.filters + filter)
                sizes = (count, self.columns_here, self.panels.columns - filter)
                self.tiles.walk(to, copied, source, sizes, vectors, masked, first)

            self._each_panel(first_panel, last_panel, panel)

    def _each_panel(self, begin, end, emit) -> None:
        """Calls emit(panel, vectors, masked) to emit code for the full panels, and for the last one if it is not."""
        b, panels = self.b, self.panels
        whole = panels.columns // panels.width
        if whole:
            with b.loop(begin, b.min(end, whole)) as number:
                emit(number, panels.vectors, False)
        if panels.columns % panels.width:
            with b.if_then(b.int(end) > whole):
                emit(whole, panels.tail_vectors, panels.columns % panels.lanes != 0)

    def _pack(self, cotangent: Pointer, positions, first_panel, last_panel) -> None:
        """Copies the panels' cotangents of a block, whose positions follow one another in memory."""
        b, plan, panels = self.b, self.plan, self.panels
        with b.loop(0, positions) as p:

            def vectors_of(number, vectors: int, masked: bool) -> None:
                filter, width = number * panels.width, vectors * plan.lanes
                masks = vector_masks(b, vectors, masked, panels.columns - filter, plan.lanes)
                to = self._panel(number - first_panel) + p * width
                for j, mask in enumerate(masks):
                    value = b.load(cotangent, p * self.all_filters + filter + j * plan.lanes, plan.lanes, mask)
                    b.store(to, j * plan.lanes, widen(b, value, plan.dtype, plan.accumulate))

            self._each_panel(first_panel, last_panel, vectors_of)

    def _panel(self, number) -> Pointer:
        """Where a unit's panel of cotangents lies."""
        return self.columns + number * (self.plan.lines * self.plan.piece * self.panels.width)

    # -- the copy of the input ------------------------------------------------------------------------------------
    def _copy(self, line, count, tap_row, column) -> None:
        """Copies what `count` lines meet under `joined` rows of taps from `tap_row` on."""
        b, plan, width, pitch = self.b, self.plan, self.plan.width, self.plan.channel_block
        start = column * plan.steps[2] + self.origins[2]
        extent = width.copy_extent(self.columns_here)
        lo = b.min(b.ceil_div(b.max(0 - start, 0), width.grid), extent)
        hi = b.max(b.min(b.ceil_div(b.max(self.sizes[2] - start, 0), width.grid), extent), lo)
        with b.loop(0, count) as number, b.loop(0, plan.joined) as joined:
            row, tap = (line + number) // self.pieces, tap_row + joined
            place = (row // self.out_sizes[1] % self.out_sizes[0], row % self.out_sizes[1])
            image = row // (self.out_sizes[0] * self.out_sizes[1])
            taps = (tap // plan.window[1], tap % plan.window[1])
            at = self.copy + (number * plan.joined + joined) * self.row_pitch
            source, inside = image, None
            for axis in (0, 1):
                position = place[axis] * plan.steps[axis] + (taps[axis] * plan.reaches[axis] + self.origins[axis])
                source = source * self.sizes[axis] + position
                for test in (b.int(position) >= 0, b.int(position) < self.sizes[axis]):
                    inside = test if inside is None else b.ir.and_(inside, test)
            source = source * self.sizes[2] + (start + lo * width.grid)
            with b.if_else(inside) as (then, otherwise):
                with then:
                    self._zeros(at, 0, lo)
                    channel = self.group * plan.channels + self.first_channel
                    self._pixels(at + lo * pitch, self.x + (source * self.all_channels + channel), hi - lo)
                    self._zeros(at, hi, extent)
                with otherwise:
                    self._zeros(at, 0, extent)

    def _zeros(self, at: Pointer, begin, end) -> None:
        """Zeros in place of the pixels [begin, end) of a row."""
        b, plan, lanes, pitch = self.b, self.plan, self.plan.lanes, self.plan.channel_block
        zero = b.constant(0, plan.accumulate, lanes)
        store = lambda i, mask, slot: b.store(at, i, zero, mask)
        b.vector_loop(b.int(begin * pitch), b.int(end * pitch), lanes, store)

    def _pixels(self, at: Pointer, source: Pointer, count) -> None:
        """Copies a unit's channels of `count` pixels that lie a step of the grid apart."""
        b, plan = self.b, self.plan
        distance = plan.width.grid * self.all_channels
        if distance == plan.channel_block:
            copy_run(b, at, source, count * distance)
            return
        with b.loop(0, count) as i:
            copy_run(b, at + i * plan.channel_block, source + i * distance, plan.channel_block)


class _Tiles:
    """The tile functions: some rows of the result times a panel, summed over the positions of a block."""

    def __init__(self, b: KernelBuilder, plan: FilterPlan):
        self.b, self.plan = b, plan
        self.functions: dict[tuple, ir.Function] = {}
        self.all_filters = plan.groups * plan.filters

    def walk(self, out: Pointer, copy: Pointer, source: Pointer, sizes: tuple, vectors, masked, first) -> None:
        """All tiles of a copy and a panel. sizes: (lines, positions of a line, filters from the panel's first on)."""
        b, plan = self.b, self.plan
        segments, rows = (TileRange.static(n, t) for n, t in zip((plan.segments, plan.segment), plan.tile))

        def some_segments(segment, count: int) -> None:
            def tile(row, height: int) -> None:
                to = out + (segment * plan.out_pitch + row) * self.all_filters
                at = copy + (segment * plan.copy_pitch + row)
                function = self._function(count, height, vectors, masked)
                pointers = [p.value for p in (to, at, source)]
                b.ir.call(function, [*pointers, *(b.i64(n) for n in sizes), first])

            rows.walk(b, plan.segment, tile)

        segments.walk(b, plan.segments, some_segments)

    def _function(self, segments: int, rows: int, vectors: int, masked: bool) -> ir.Function:
        """The function for tiles of `segments` times `rows` rows."""
        key = (segments, rows, vectors, masked)
        if key not in self.functions:
            self.functions[key] = self._build(*key)
        return self.functions[key]

    def _build(self, segments: int, rows: int, vectors: int, masked: bool) -> ir.Function:
        b, plan, lanes = self.b, self.plan, self.plan.lanes
        name = f"tile_{segments}x{rows}x{vectors}{'_masked' if masked else ''}"
        displacements = [
            (s * plan.out_pitch + r, s * plan.copy_pitch + r) for s in range(segments) for r in range(rows)
        ]
        with subfunction(b, name, [PTR] * 3 + [I64] * 3 + [I1]) as function:
            out, copy, source, *integers, first = function.args
            lines, columns, remaining = (Int(b, n) for n in integers)
            positions = plan.piece if plan.whole else columns
            out = Pointer(b, out, plan.accumulate, "operand2")
            copy = Pointer(b, copy, plan.accumulate, "scratch" if plan.copied else "operand0")
            source = Pointer(b, source, plan.accumulate, "scratch" if plan.packed else "operand1")
            masks = vector_masks(b, vectors, masked, remaining, lanes)
            places = [
                (out + d * self.all_filters + j * lanes, mask) for d, _ in displacements for j, mask in enumerate(masks)
            ]
            sums = self._sums_so_far(places, first)
            pitch = vectors * lanes if plan.packed else self.all_filters
            unroll = self._unroll(len(sums))

            def step(copy: Pointer, source: Pointer, sums: list) -> list:
                columns = [b.load(source, j * lanes, lanes, None if plan.packed else m) for j, m in enumerate(masks)]
                added = []
                # What is read in place, the next block will find in the cache.
                if not plan.packed:
                    for j in range(vectors):
                        self.b.prefetch(source + (plan.lines * plan.piece * pitch + j * lanes))
                if not plan.copied:
                    for element in range(0, rows, lanes):
                        self.b.prefetch(copy + (plan.piece * plan.pixel_pitch + element))
                for i, (_, displacement) in enumerate(displacements):
                    x = b.load_broadcast(copy, displacement, lanes)
                    added += [multiply_add(b, x, c, sums[i * vectors + j]) for j, c in enumerate(columns)]
                return added

            def line(number, sums: list) -> list:
                at = copy + number * (plan.joined * plan.copied_pixels * plan.channel_block)
                begin = source + number * (positions * pitch)
                distance = plan.width.copy_step * plan.pixel_pitch

                def some(position, sums: list) -> list:
                    for u in range(unroll):
                        sums = step(at + (position + u) * distance, begin + (position + u) * pitch, sums)
                    return sums

                return carried_loop(b, positions, unroll, sums, some)

            for (place, mask), value in zip(places, carried_loop(b, lines, 1, sums, line), strict=True):
                b.store(place, 0, value, mask)
        return function

    def _sums_so_far(self, places: list, first) -> list:
        """Zeros for the first block of a chunk, else what the one before it left."""
        b, lanes = self.b, self.plan.lanes
        zero = b.constant(0, self.plan.accumulate, lanes)
        before = b.ir.block
        with b.if_then(b.ir.not_(first)):
            loaded = [b.load(place, 0, lanes, mask) for place, mask in places]
            loading = b.ir.block
        out = []
        for value in loaded:
            phi = b.ir.phi(zero.type)
            phi.add_incoming(zero, before)
            phi.add_incoming(value, loading)
            out.append(phi)
        return out

    def _unroll(self, accumulators: int) -> int:
        """Positions per turn of the loop: small tiles would spend their time on loop control."""
        steps = self.plan.piece if self.plan.whole else 1
        return next(u for u in (4, 3, 2, 1) if steps % u == 0 and (u * accumulators <= 36 or u == 1))
