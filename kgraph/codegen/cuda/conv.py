"""Convolutions over channels-last images, with a fused epilogue.

Those with one channel per group go to `depthwise`, 1x1 windows that meet every pixel to `gemm`; all others are implicit
matrix products (`conv_kernel`). Where there are few tiles and the depth is long, it is cut: a first kernel leaves the
sums of every piece, a second adds them in order and applies the epilogue.
"""

from __future__ import annotations

from dataclasses import replace

from kgraph.codegen.contractions import Parts, accumulate_dtype, has_products, take_apart
from kgraph.codegen.cuda import conv_library, depthwise, gemm, reduce
from kgraph.codegen.cuda.conv_geometry import axis_sizes, is_dilated, phase_positions, phases
from kgraph.codegen.cuda.conv_kernel import ConvPlan
from kgraph.codegen.cuda.epilogue import Finish
from kgraph.codegen.cuda.library import offer
from kgraph.codegen.cuda.mma import instruction_for
from kgraph.codegen.cuda.pieces import sum_of_pieces
from kgraph.codegen.cuda.source import index_type
from kgraph.codegen.cuda.tiles import choose_tile, group_of
from kgraph.codegen.expressions import compute_dtype
from kgraph.codegen.kernel import KernelCall, KernelSpec, Launch, Temporary
from kgraph.codegen.regions import Leaf, spans_of
from kgraph.ir import Dim, Node, TensorType, make_node
from kgraph.ir.dims import ceil_div, product
from kgraph.ops.contraction import DOT_GENERAL

FLAT = 4  # chunks of a tap's channels, up to which chunks that end with the tap would waste too much
SYMBOLIC_FILTERS = 128  # for which tiles are chosen where their number is not known
WAVES = 2  # blocks per multiprocessor that the depth is cut for, where there is less than one
CHUNKS = 16  # that a piece of the depth has at least; 2 in the simulator


def accepts(node: Node) -> str | None:
    """None where `lower` takes the node, else why not."""
    parts = take_apart(node, "conv")
    if isinstance(parts, str):
        return parts
    if any(parts.packed):
        return "packed operands are for processors"
    if not has_products(parts.node.inputs[0].dtype):
        return f"no convolutions of {parts.node.inputs[0].dtype}"
    return None


def choose(node: Node) -> tuple[str, str]:
    """(algorithm, reason) for a conv node: "product", "depthwise" or "implicit_product"."""
    attrs, (*window, channels, _) = node.attrs, node.inputs[1].shape
    groups = attrs["feature_groups"]
    if groups > 1 and not isinstance(channels, Dim) and channels == 1:
        return "depthwise", "one channel per group"
    ones = (*window, *attrs["strides"], *attrs["lhs_dilation"])
    plain = not any(isinstance(n, Dim) or n != 1 for n in ones) and all(p == (0, 0) for p in attrs["padding"])
    if groups == 1 and plain:
        return "product", "a 1x1 window that meets every pixel"
    return "implicit_product", "a window over channels"


def lower(node: Node, target) -> list[KernelCall]:
    """The calls that compute the node."""
    parts = take_apart(node, "conv")
    if isinstance(parts, str):
        raise ValueError(parts)
    algorithm, reason = choose(parts.node)
    if algorithm == "product":
        calls = gemm.lower_parts(_as_product(parts), target)
    elif algorithm == "depthwise":
        calls = [depthwise.call(parts, target)]
    else:
        calls = _implicit_product(parts, target)
    calls[-1].notes.update(algorithm=algorithm, reason=reason)
    return calls


def _as_product(parts: Parts) -> Parts:
    """A 1x1 convolution as the product that it is; its result has the window's axes of size 1 more."""
    rank = parts.node.inputs[0].type.rank
    attrs = {"lhs_contract": (rank - 1,), "rhs_contract": (rank - 2,), "lhs_batch": (), "rhs_batch": ()}
    return replace(parts, node=make_node(DOT_GENERAL, parts.node.inputs, attrs))


def _implicit_product(parts: Parts, target) -> list[KernelCall]:
    node = parts.node
    x, w = node.inputs
    groups, window, channels = node.attrs["feature_groups"], w.shape[:-2], w.shape[-2]
    filters = w.shape[-1] // groups
    accumulate = accumulate_dtype(x.dtype, parts.result.dtype)
    dilated = is_dilated(node)
    positions, batch = phase_positions(node), groups * phases(node)
    rows = x.shape[0] * positions
    columns = SYMBOLIC_FILTERS if isinstance(filters, Dim) else filters
    tensor = instruction_for(x.dtype, accumulate, target)
    tile = choose_tile(rows, columns, batch if isinstance(batch, int) else 1, accumulate, target, tensor)
    few = not isinstance(channels, Dim) and channels % tile.depth != 0 and channels < FLAT * tile.depth
    flat = few and not dilated
    blocks = batch * (ceil_div(rows, tile.rows) * ceil_div(filters, tile.columns))
    depth = product(window) * channels if flat else product(window) * (ceil_div(channels, tile.depth) * tile.depth)
    divisible = not dilated and accumulate == compute_dtype(parts.result.dtype)
    pieces = _pieces(blocks, depth, tile.depth, target) if divisible else 1
    partial = Temporary(TensorType((pieces, *parts.result.shape), accumulate))
    outputs = parts.outputs if pieces == 1 else (partial,)
    extras = parts.extras if pieces == 1 else []
    plan = ConvPlan(
        name="conv" + parts.name if pieces == 1 else "conv_partial",
        dtype=x.dtype,
        accumulate=accumulate,
        rank=len(window),
        dilated=dilated,
        flat=flat,
        split=pieces > 1,
        tile=tile,
        tensor=tensor,
        indices=index_type([x.type.size, w.type.size, parts.result.size]),
        finish=Finish.params(parts, accumulate) if pieces == 1 else (accumulate, accumulate, (), (accumulate,), None),
        groups=(1 if flat else group_of(x.dtype, channels), group_of(w.dtype, filters)),
    )
    sizes = [x.shape[0], channels, filters, groups, *parts.result.shape[1:-1], *axis_sizes(node, window)]
    if pieces > 1:
        sizes += [pieces, ceil_div(depth, pieces * tile.depth)]
    met = x.shape[1:-1] if dilated else parts.result.shape[1:-1]  # positions that meet every tap, about
    call = KernelCall(
        spec=KernelSpec(plan.name, "kgraph.codegen.cuda.conv_kernel:render_conv", tuple(plan)),
        operands=[*parts.operands, *(v for _, v in extras), *outputs],
        outputs=len(outputs),
        sizes=sizes,
        extent=pieces * blocks,
        flops=2 * x.shape[0] * product(met) * product(window) * channels * w.shape[-1],
        bytes=x.type.nbytes + w.type.nbytes + sum((v.type.nbytes for v in parts.outputs), start=0),
        notes={"inplace": parts.inplace(2) if pieces == 1 else ()},
        launch=Launch(tile.block),
    )
    calls = [call]
    if pieces > 1:
        leaves = [Leaf(v, v.dtype, (False, *spans_of(v.shape, x.type.rank))) for _, v in parts.extras]
        whole = sum_of_pieces(partial, parts.result.dtype, parts.outputs, leaves, parts.expression)
        calls += reduce.lower_parts(whole, target)
    library = conv_library.convolution(parts, target)
    return calls if library is None else offer(calls, library)


def _pieces(blocks, depth, chunk: int, target) -> int:
    """Into how many pieces the depth is cut; sizes that are not known count as many blocks."""
    if isinstance(blocks, Dim) or isinstance(depth, Dim) or not 0 < blocks < target.num_sms:
        return 1
    least = chunk * (2 if target.simulator else CHUNKS)
    return max(min(WAVES * target.num_sms // blocks, depth // least), 1)
