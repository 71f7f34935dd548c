"""Elementwise kernels: fused nodes of kind "loop", lone elementwise nodes, iota, full, broadcasts and random words.

Axes over which all operands behave alike are merged. Every thread computes elements a grid apart; where no more than
one axis is left, no index is divided. Random words come four at a time from one counter (see `kgraph.ops.philox`):
there a thread computes the four elements of a counter, which lie 16 apart, so that 16 neighbouring threads write 16
neighbouring elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kgraph.codegen import expressions, regions
from kgraph.codegen.cuda.scalar_ops import convert
from kgraph.codegen.cuda.source import KernelSource, Operand, index_type
from kgraph.codegen.kernel import KernelCall, KernelSpec, Launch
from kgraph.codegen.regions import Leaf
from kgraph.ir import Node
from kgraph.ir.dims import ceil_div, product

TEMPLATE = "kgraph.codegen.cuda.loop:render"
SIMPLE_FLOPS = 16  # operations per element up to which memory is what a thread waits for
FEW_ELEMENTS = 1 << 18  # below which every thread of the grid has one element at most
RANDOM_FLOPS = 25  # per word, for estimates of time
WORD_LANES, WORD_GROUP = 16, 64  # counters of a group of words, and the words of one


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


def lower(node: Node, target) -> list[KernelCall]:
    """One kernel call for the node; sizes are run-time values."""
    encoded = _encode(node)
    if isinstance(encoded, str):
        raise ValueError(f"{node.name}: {encoded}")
    expression, leaves = encoded
    return lower_expression(expression, leaves, node.outputs[0].shape, node.outputs, target)


def lower_expression(
    expression: tuple, leaves: Sequence[Leaf], shape: Sequence, outputs: Sequence, target
) -> list[KernelCall]:
    """The kernel call that stores an expression of `leaves` over `shape` to `outputs` (Values or Temporaries)."""
    sizes, spans = regions.collapse(shape, [leaf.spans for leaf in leaves])
    leaves = [replace(leaf, spans=s) for leaf, s in zip(leaves, spans, strict=True)]
    operands = [leaf.value for leaf in leaves if leaf.value is not None] + list(outputs)
    if not sizes:
        sizes, leaves = [1], [replace(leaf, spans=(False,)) for leaf in leaves]
    described = tuple((leaf.dtype, leaf.spans, leaf.is_coordinate, leaf.stream) for leaf in leaves)
    num_streams = sum(leaf.stream >= 0 for leaf in leaves)
    name = regions.kernel_name("random" if num_streams else "", expression) or "copy"
    total = product(shape)
    dtypes = tuple(o.type.dtype for o in outputs)
    units = ceil_div(total, WORD_GROUP) * WORD_LANES if num_streams else total
    unroll = target.unroll if not num_streams and _is_long(total, expression) else 1
    params = (name, expression, described, dtypes, len(sizes), index_type([total]), unroll)
    return [
        KernelCall(
            spec=KernelSpec(name, TEMPLATE, params),
            operands=operands,
            outputs=len(outputs),
            sizes=list(sizes),
            extent=ceil_div(units, target.block * unroll),
            flops=total * max(1, expressions.flops(expression) + RANDOM_FLOPS * num_streams),
            bytes=regions.total_bytes(operands),
            notes={"inplace": regions.inplace_pairs(leaves, outputs, len(operands) - len(outputs))},
            launch=Launch(target.block),
        )
    ]


def _is_long(total, expression: tuple) -> bool:
    """Whether threads wait for memory, and have several elements each."""
    return expressions.flops(expression) <= SIMPLE_FLOPS and not (isinstance(total, int) and total < FEW_ELEMENTS)


def render(params: tuple, target) -> str:
    name, expression, leaves, dtypes, rank, index, unroll = params
    k = KernelSource(name, target, target.block, index)
    operands = [None if is_coordinate else k.operand(dtype) for dtype, _, is_coordinate, _ in leaves]
    outputs = [k.operand(dtype) for dtype in dtypes]
    sizes = [k.size() for _ in range(rank)]
    k.line(f"total = {k.product(sizes)}")
    streams = [(operand, leaf[3]) for operand, leaf in zip(operands, leaves, strict=True) if leaf[3] >= 0]

    def values_at(i: str, words: Sequence[str]) -> list[str]:
        coordinates = k.coordinates(i, sizes) if any(not all(leaf[1]) or leaf[2] for leaf in leaves) else []
        drawn = iter(words)
        values = []
        for operand, (dtype, spans, _, stream) in zip(operands, leaves, strict=True):
            if stream >= 0:
                values.append(next(drawn))
            else:
                values.append(leaf_value(k, operand, dtype, spans, i, coordinates, sizes))
        return values

    def store(i: str, values: Sequence[str]) -> None:
        for output, value in zip(outputs, k.emit(expression, values), strict=True):
            k.store(output, i, value)

    def elements(numbers: list[str]) -> None:
        for i, values in [(i, values_at(i, ())) for i in numbers]:
            store(i, values)

    if not streams:
        first, step = k.grid()
        k.for_each(first, "total", step, elements, unroll)
        return k.text()
    keys = [[k.load(seed, k.i(number)) for number in range(2)] for seed, _ in streams if seed]
    lanes, group = WORD_LANES, WORD_GROUP
    counters = k.let(k.mul(k.div(k.add("total", group - 1), group), lanes))
    with k.grid_stride(counters) as counter:
        drawn = []
        low, high = f"uint32({counter})", f"uint32(uint64({counter}) >> uint64(32))"
        for (_, stream), key in zip(streams, keys, strict=True):
            names = [k.fresh("w") for _ in range(4)]
            k.line(f"{', '.join(names)} = philox({low}, {high}, uint32({stream}), {key[0]}, {key[1]})")
            drawn.append(names)
        start = k.let(k.add(k.mul(k.div(counter, lanes), group), k.mod(counter, lanes)))
        with k.suite("for word in range(4):"):
            i = k.let(k.add(start, k.mul(k.i("word"), lanes)))
            with k.suite(f"if {i} < total:"):
                choose = "({0} if word == 0 else ({1} if word == 1 else ({2} if word == 2 else {3})))"
                store(i, values_at(i, [k.let(choose.format(*names)) for names in drawn]))
    return k.text()


def leaf_value(
    k: KernelSource,
    operand: Operand | None,
    dtype: str,
    spans: Sequence[bool],
    i: str,
    coordinates: Sequence[str],
    sizes: Sequence[str],
) -> str:
    """What a leaf is at element `i` of the result, which lies at `coordinates` along axes of `sizes`.

    operand: None for a coordinate, along the one axis that it spans.
    """
    if operand is None:
        at = coordinates[list(spans).index(True)] if True in spans else k.i(0)
        return k.let(convert(k, f"int64({at})", "int64", dtype))
    if all(spans):
        return k.load(operand, i)
    return k.load(operand, k.offset(coordinates, sizes, spans))
