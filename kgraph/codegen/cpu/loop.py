"""Elementwise kernels: fused nodes of kind "loop", lone elementwise nodes, iota, full and random words.

Axes over which all operands behave alike are merged, so nearly every kernel is one of three:
- "flat": one axis, each operand spans it or is a scalar; a unit of the extent is a chunk of elements.
- "periodic": two axes of which the inner is short and of known size (channels): the flat loop runs over whole periods
  of lcm(channels, lanes) elements, and operands that live on the channels stay in registers.
- "rows": any number of axes; a unit is (a block of) a row along the innermost axis. Operands that are slices of rows
  are read where they were cut from (`views`).

Results that may be too large for the caches get kernels in two versions ("streaming"). Where operands and results are
larger than the last cache, the results are written past the caches: memory is not read first only to be overwritten.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from llvmlite import ir

from kgraph.codegen.cpu import expressions, random, regions
from kgraph.codegen.cpu.builder import I32, I64, Int, KernelBuilder, Pointer, itemsize
from kgraph.codegen.cpu.regions import Leaf
from kgraph.codegen.kernel import KernelCall, KernelSpec
from kgraph.ir import Dim, Node, Value
from kgraph.ir.dims import ceil_div, evaluate, product, symbols

CHUNK = 512  # elements of a unit of a flat loop
BLOCK = 4096  # elements of a row that make a unit
PERIODIC_REGISTERS = 16  # vector registers given to operands that live on the channels
PERIODIC_CODE = 100  # operations written out for a period
STREAMED_FLOPS = 16  # operations per element beyond which memory is not what a loop waits for
LEAST_COLUMNS = 64  # of an operand that is read out of larger rows
MOST_SAMPLES = 256  # value of symbolic sizes that is reckoned with
TEMPLATE = "kgraph.codegen.cpu.loop:render_{}"


def accepts(node: Node) -> str | None:
    """None where the node is elementwise over one output shape with scalar code for all that is in it."""
    result = _encode(node)
    return result if isinstance(result, str) else None


def _encode(node: Node):
    """(expression, leaves over the output's axes), or the reason why not."""
    inputs, outer, nodes, outputs = regions.body_of(node)
    shape = node.outputs[0].shape
    if any(o.shape != shape for o in node.outputs):
        return "the outputs of an elementwise kernel need one shape"
    seeds = dict(zip(inputs, outer, strict=True))
    draws = [n for n in nodes if n.name == "random_words"]
    rest = [n for n in nodes if n.name != "random_words"]
    inputs, outer = regions.used_inputs(inputs, outer, rest, outputs)
    for value in inputs:
        if len(value.shape) > len(shape):
            return f"an operand {value.type} has more axes than the output"
    inner, leaves, kept = regions.leaves_and_nodes(inputs, outer, rest, shape)
    for draw in draws:
        if draw.output.shape != shape:
            return "random words of another shape than the result"
        if draw.inputs[0] not in seeds:
            return "the seed of random words is computed in the same kernel"
        inner.append(draw.output)
        leaves.append(Leaf(seeds[draw.inputs[0]], "uint32", (True,) * len(shape), draw.attrs["stream"]))
    expression = expressions.encode_nodes(kept, inner, outputs)
    return expression if isinstance(expression, str) else (expression, leaves)


def views(node: Node) -> tuple[Value, ...]:
    """Operands, columns of larger matrices, that the kernel reads out of those."""
    if not any(x.node is not None and x.node.name == "slice" for x in node.inputs):
        return ()
    encoded = _encode(node)
    leaves = [] if isinstance(encoded, str) else encoded[1]
    shape = node.outputs[0].shape
    return tuple(leaf.value for leaf in leaves if isinstance(leaf.value, Value) and _as_view(leaf, shape) is not leaf)


def _as_view(leaf: Leaf, shape: Sequence) -> Leaf:
    """The leaf of a result of `shape` as columns of what it was cut from, if its rows are worth a loop each."""
    x = leaf.value
    node = x.node if isinstance(x, Value) else None
    if node is None or node.name != "slice" or leaf.stream >= 0 or not _same(node.output.shape, shape):
        return leaf
    source, columns = node.inputs[0], shape[-1]
    start, step = node.attrs["start"], node.attrs["stride"] or (1,)
    unlike = not _same(source.shape[:-1], shape[:-1]) or any(n != 1 for n in step)
    if unlike or isinstance(columns, Dim) or columns < LEAST_COLUMNS or isinstance(start[-1], Dim):
        return leaf
    return replace(leaf, value=source, view=(start[-1], source.shape[-1]))


def _same(shape: Sequence, other: Sequence) -> bool:
    """Whether two shapes are known to be equal."""
    key = lambda n: n.terms if isinstance(n, Dim) else n
    return list(map(key, shape)) == list(map(key, other))


def lower(node: Node, target) -> list[KernelCall]:
    """One kernel call for the node. Sizes are run-time values; see the module's docstring for the units."""
    encoded = _encode(node)
    if isinstance(encoded, str):
        raise ValueError(f"{node.name}: {encoded}")
    expression, leaves = encoded
    shape = node.outputs[0].shape
    leaves = [_as_view(leaf, shape) for leaf in leaves]
    return lower_expression(expression, leaves, shape, node.outputs, target)


def lower_expression(
    expression: tuple, leaves: Sequence[Leaf], shape: Sequence, outputs: Sequence, target
) -> list[KernelCall]:
    """The kernel call that stores an expression of `leaves` over `shape` to `outputs` (Values or Temporaries)."""
    seen = [leaf.view for leaf in leaves if leaf.view is not None]
    marks = [axis == len(shape) - 1 for axis in range(len(shape))] if seen else ()
    sizes, spans = regions.collapse(shape, [leaf.spans for leaf in leaves], marks)
    leaves = [replace(leaf, spans=s) for leaf, s in zip(leaves, spans, strict=True)]
    operands = [leaf.value for leaf in leaves if leaf.value is not None] + list(outputs)
    if not sizes:
        sizes, leaves = [1], [replace(leaf, spans=(False,)) for leaf in leaves]
    kind, extra, extent = _schedule(sizes, leaves, expression, target)
    kind += "_streaming" if _may_stream(kind, sizes, leaves, expression, extra[0], outputs, target) else ""
    if seen:
        extra = (*extra, tuple(leaf.view is not None for leaf in leaves if leaf.stream < 0))
    described = tuple((leaf.dtype, leaf.spans, leaf.is_coordinate, leaf.stream) for leaf in leaves)
    num_streams = sum(leaf.stream >= 0 for leaf in leaves)
    name = regions.kernel_name("random" if num_streams else "", expression) or "copy"
    dtypes = tuple(o.type.dtype for o in outputs)
    total = product(shape)
    return [
        KernelCall(
            spec=KernelSpec(name, TEMPLATE.format(kind), (name, expression, described, dtypes, extra)),
            operands=operands,
            outputs=len(outputs),
            sizes=[*sizes, *(n for view in seen for n in view)],
            extent=extent,
            flops=total * max(1, expressions.flops(expression) + random.FLOPS * num_streams),
            bytes=_total_bytes(leaves, outputs, total),
            scratch_bytes=random.scratch_bytes(num_streams),
            notes={"inplace": regions.inplace_pairs(leaves, outputs, len(operands) - len(outputs))},
        )
    ]


def _total_bytes(leaves: Sequence[Leaf], outputs: Sequence, elements) -> int | Dim:
    """Of the distinct operands and results; of one that is a view, what is read."""
    dense = [leaf.value for leaf in leaves if leaf.value is not None and leaf.view is None]
    viewed = [itemsize(leaf.dtype) for leaf in leaves if leaf.view is not None]
    return regions.total_bytes([*dense, *outputs]) + sum(viewed) * elements


def _schedule(sizes: list, leaves: Sequence[Leaf], expression, target) -> tuple[str, tuple, int | Dim]:
    """(kind, its static parameters, extent)"""
    lanes = expressions.lanes(expression, target)
    if all(leaf.stream < 0 for leaf in leaves):
        lanes *= expressions.side_by_side(expression, target)
    viewed = any(leaf.view is not None for leaf in leaves)
    if len(sizes) == 1 and not viewed:
        size = sizes[0]
        return "flat", (_fitting(lanes, size),), ceil_div(size, CHUNK)
    inner = sizes[-1]
    periodic = _period(sizes, leaves, lanes)
    if viewed or periodic * max(4, expressions.flops(expression)) > PERIODIC_CODE:
        periodic = 0
    if periodic:
        unit = lanes * periodic * max(1, CHUNK // (lanes * periodic))
        return "periodic", (lanes, inner, periodic, unit), ceil_div(product(sizes), unit)
    rows = product(sizes[:-1])
    lanes = _fitting(lanes, inner)
    if isinstance(inner, int) and inner <= BLOCK:
        return "rows", (lanes, 0), rows
    return "rows", (lanes, BLOCK), rows * ceil_div(inner, BLOCK)


def _may_stream(kind: str, sizes: list, leaves: Sequence[Leaf], expression, lanes: int, outputs, target) -> bool:
    """Whether operands and results may be larger than the last cache, and results can be written past it."""
    aligned = kind != "rows" or (isinstance(sizes[-1], int) and sizes[-1] % lanes == 0)
    if not aligned or expressions.flops(expression) > STREAMED_FLOPS or any(leaf.stream >= 0 for leaf in leaves):
        return False
    if not any(_fills_vector(o.type.dtype, lanes, target) for o in outputs):
        return False
    likely = evaluate(product(sizes), dict.fromkeys(symbols(sizes), MOST_SAMPLES))
    bytes_each = _bytes_each([(leaf.dtype, leaf.spans, leaf.is_coordinate) for leaf in leaves], outputs)
    return 0 < target.l3_bytes <= likely * bytes_each


def _fills_vector(dtype: str, lanes: int, target) -> bool:
    return lanes * itemsize(dtype) == target.vector_bytes


def _bytes_each(leaves: Sequence[tuple], outputs: Sequence) -> int:
    """Bytes per element of the operands that span all axes and of the results (Values or Pointers)."""
    dtypes = [dtype for dtype, spans, is_coordinate in leaves if all(spans) and not is_coordinate]
    return sum(map(itemsize, [*dtypes, *(o.dtype if isinstance(o, Pointer) else o.type.dtype for o in outputs)]))


def _fitting(lanes: int, size) -> int:
    """Fewer lanes where a known size does not fill one vector."""
    while isinstance(size, int) and lanes > 1 and lanes // 2 >= size:
        lanes //= 2
    return lanes


def _period(sizes: list, leaves: Sequence[Leaf], lanes: int) -> int:
    """Vectors in a period of the channels if the periodic kernel fits, else 0."""
    inner = sizes[-1]
    if len(sizes) != 2 or not isinstance(inner, int) or inner == 0:
        return 0
    if any(leaf.spans == (True, False) or leaf.is_coordinate or leaf.stream >= 0 for leaf in leaves):
        return 0
    period = math.lcm(inner, lanes) // lanes
    columns = sum(leaf.spans == (False, True) for leaf in leaves)
    return period if period <= 8 and period * columns <= PERIODIC_REGISTERS else 0


# -- renderers --------------------------------------------------------------------------------------------------------
class _Kernel:
    """What the three renderers share: operands, and the code for one vector."""

    def __init__(self, params: tuple, target):
        name, self.expression, leaves, dtypes, self.extra = params
        self.rank = len(leaves[0][1]) if leaves else 2
        self.b = KernelBuilder(name, target)
        self.pointers: list[Any] = []  # None for a coordinate
        number = 0
        seeds: list[tuple[Pointer, int]] = []
        for dtype, _, is_coordinate, stream in leaves:
            self.pointers.append(None if is_coordinate else self.b.operand(number, dtype))
            number += not is_coordinate
            if stream >= 0:
                seeds.append((self.pointers[-1], stream))
        self.outputs = [self.b.operand(number + i, dtype) for i, dtype in enumerate(dtypes)]
        # Random words come last among the leaves; `loop` gives their values.
        self.leaves = [leaf[:3] for leaf in leaves if leaf[3] < 0]
        del self.pointers[len(self.leaves) :]
        regions.keep_order(self.b, self.leaves, self.pointers, self.outputs)
        self.words = random.WordTiles(self.b, seeds) if seeds else None
        self.target, self.streaming = target, False
        # Short bodies are unrolled to keep loads ahead of stores; long ones overlap by themselves.
        self.unroll = 1 if expressions.is_heavy(self.expression) else 4

    def loop(self, start, stop, shift, lanes: int, values: Callable) -> None:
        """Stores the results at the indices shift + i for i in [start, stop).

        values: `values(i, mask)` gives what the leaves in memory and the coordinates are there.
        """
        unroll = self.unroll if lanes > 1 else 1
        if self.words is None:

            def body(i, mask, slot):
                self.emit(values(i, mask), lanes, shift + i, mask)

            self.b.vector_loop(start, stop, lanes, body, unroll)
            return
        with self.words.over(start, stop, shift) as (first, end, load):

            def body_with_words(i, mask, slot):
                drawn = [load(number, i, lanes) for number in range(len(self.words.streams))]
                self.emit([*values(i, mask), *drawn], lanes, shift + i, mask)

            self.b.vector_loop(first, end, lanes, body_with_words, unroll)

    def emit(self, values: list[ir.Value], lanes: int, index, mask) -> None:
        results = expressions.emit_lanes(self.b, self.expression, values, lanes)
        for pointer, value in zip(self.outputs, results, strict=True):
            streaming = self.streaming and mask is None and _fills_vector(pointer.dtype, lanes, self.target)
            self.b.store(pointer, index, value, mask, streaming=streaming)

    def streams(self) -> ir.Value:
        """Whether at run time operands and results are larger than the last cache, the results are aligned, and none of
        them overwrites an operand, which the caches hold then."""
        b = self.b
        count: int | Int = 1
        for axis in range(self.rank):
            count = b.size(axis) * count
        out = (b.int(b.i64(count)) * _bytes_each(self.leaves, self.outputs)) >= self.target.l3_bytes
        address = lambda pointer: b.ir.ptrtoint(pointer.value, I64)
        for output in self.outputs:
            out = b.ir.and_(out, (b.int(address(output)) % self.target.vector_bytes) <= 0)
            for pointer, (_, spans, _) in zip(self.pointers, self.leaves, strict=True):
                if pointer is not None and all(spans):
                    out = b.ir.and_(out, b.ir.icmp_unsigned("!=", address(output), address(pointer)))
        return out


def _render(params: tuple, target, emit: Callable[[_Kernel], None]) -> str:
    k = _Kernel(params, target)
    emit(k)
    return k.b.ir_text()


def _render_streaming(params: tuple, target, emit: Callable[[_Kernel], None]) -> str:
    k = _Kernel(params, target)
    with k.b.if_else(k.streams()) as (then, otherwise):
        with then:
            k.streaming = True
            emit(k)
            k.b.ir.fence("seq_cst")  # stores past the caches are not ordered with what tells other threads of them
        with otherwise:
            k.streaming = False
            emit(k)
    return k.b.ir_text()


def render_flat(params: tuple, target) -> str:
    return _render(params, target, _flat)


def render_flat_streaming(params: tuple, target) -> str:
    return _render_streaming(params, target, _flat)


def render_periodic(params: tuple, target) -> str:
    return _render(params, target, _periodic)


def render_periodic_streaming(params: tuple, target) -> str:
    return _render_streaming(params, target, _periodic)


def render_rows(params: tuple, target) -> str:
    return _render(params, target, _rows)


def render_rows_streaming(params: tuple, target) -> str:
    return _render_streaming(params, target, _rows)


def _flat(k: _Kernel) -> None:
    b, (lanes,) = k.b, k.extra
    scalars = [
        b.load_broadcast(p, 0, lanes) if p is not None and not spans[0] else None
        for p, (_, spans, _) in zip(k.pointers, k.leaves)
    ]

    def values(i, mask) -> list[ir.Value]:
        out = []
        for pointer, scalar, (dtype, spans, is_coordinate) in zip(k.pointers, scalars, k.leaves):
            if is_coordinate:
                out.append(regions.coordinate(b, i if spans[0] else 0, dtype, lanes, spans[0]))
            else:
                out.append(b.load(pointer, i, lanes, mask) if scalar is None else scalar)
        return out

    k.loop(b.begin * CHUNK, b.min(b.end * CHUNK, b.size(0)), 0, lanes, values)


def _periodic(k: _Kernel) -> None:
    b, (lanes, inner, period, unit) = k.b, k.extra
    fixed: list[list | None] = []
    for pointer, (_, spans, _) in zip(k.pointers, k.leaves):
        if spans == (False, True):
            columns = [[(slot * lanes + lane) % inner for lane in range(lanes)] for slot in range(period)]
            fixed.append([_load_lanes(b, pointer, c) for c in columns])
        else:
            fixed.append([b.load_broadcast(pointer, 0, lanes)] * period if spans == (False, False) else None)

    def body(i, mask, slot):
        values = [b.load(p, i, lanes, mask) if f is None else f[slot] for p, f in zip(k.pointers, fixed)]
        k.emit(values, lanes, i, mask)

    start, stop = b.begin * unit, b.min(b.end * unit, b.size(0) * inner)
    whole = start + (stop - start) // (period * lanes) * (period * lanes)
    with b.loop(start, whole, period * lanes) as i:
        for slot in range(period):
            body(i + slot * lanes, None, slot)
    with b.if_then(whole < stop):
        for slot in range(period):
            rest = stop - (whole + slot * lanes)
            with b.if_then(rest > 0):
                body(whole + slot * lanes, b.tail_mask(rest, lanes) if lanes > 1 else None, slot)


def _load_lanes(b: KernelBuilder, pointer: Pointer, indices: list[int]) -> ir.Value:
    """Elements at fixed indices, one per lane."""
    if len(indices) == 1:
        return b.load(pointer, indices[0])
    if indices == list(range(indices[0], indices[0] + len(indices))):
        return b.load(pointer, indices[0], len(indices))
    return b.gather(pointer, ir.Constant(ir.VectorType(I32, len(indices)), indices))


def _rows(k: _Kernel) -> None:
    b, (lanes, block, *viewed) = k.b, k.extra
    rank = k.rank
    sizes = [b.size(a) for a in range(rank)]
    strides = [regions.row_strides(b, sizes, spans) for _, spans, _ in k.leaves]
    pointers, slot = list(k.pointers), rank
    for number, is_view in enumerate(viewed[0] if viewed else ()):
        if is_view:
            pointers[number] = pointers[number] + b.size(slot)
            strides[number] = [*regions.row_strides(b, [*sizes[:-1], b.size(slot + 1)], [True] * rank)[:-1], 1]
            slot += 2
    inner = sizes[-1]
    blocks = b.ceil_div(inner, block) if block else 1
    row = b.begin // blocks
    odometer = regions.Odometer(b, sizes[:-1], row)
    position = b.variable(b.i64(b.begin % blocks)) if block else None
    base = b.variable((row * inner).value)

    with b.loop(b.begin, b.end):
        first: int | Int = b.int(position.get()) * block if position is not None else 0
        last = b.min(first + block, inner) if block else inner
        _row(k, pointers, odometer.indices(), strides, b.int(base.get()), first, last, lanes)
        if position is not None:
            following = b.int(position.get()) + 1
            position.set(following.value)
            with b.if_then(following >= blocks):
                position.set(b.constant_of(I64, 0))
                odometer.advance()
                base.set((b.int(base.get()) + inner).value)
        else:
            odometer.advance()
            base.set((b.int(base.get()) + inner).value)


def _row(k: _Kernel, pointers: list, indices: list, strides: list, base, first, last, lanes: int) -> None:
    """Elements [first, last) of the row at outer `indices`, which starts at element `base` of the outputs."""
    b = k.b
    sources = []
    for pointer, (dtype, spans, is_coordinate), stride in zip(pointers, k.leaves, strides):
        if is_coordinate:
            axis = spans.index(True) if True in spans else None
            fixed = None
            if axis is None or axis < len(indices):
                fixed = regions.coordinate(b, 0 if axis is None else indices[axis], dtype, lanes, False)
            sources.append((None, fixed))
        else:
            at = pointer + regions.dot(indices, stride[:-1])
            sources.append((at, None if spans[-1] else b.load_broadcast(at, 0, lanes)))

    def values(i, mask) -> list[ir.Value]:
        out = []
        for (at, fixed), (dtype, _, _) in zip(sources, k.leaves):
            if fixed is not None:
                out.append(fixed)
            elif at is None:
                out.append(regions.coordinate(b, i, dtype, lanes, True))
            else:
                out.append(b.load(at, i, lanes, mask))
        return out

    k.loop(first, last, base, lanes, values)
