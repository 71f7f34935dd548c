"""What a library for convolutions may do in place of kernels: see `kgraph.runtime.cuda.cudnn`.

The library wants filters first, [filters, window, channels of a group], where graphs have [window, channels, filters]:
weights are copied before it runs, and their cotangents after. Parameters are copied when they have changed (see
`runtime.steps.LibraryStep`); in training steps the copies are small against the convolution, and so are kernels of a
few microseconds.

With a dilated image and steps of 1, a convolution is the cotangent of another one's image, whose steps are the dilation
and whose filters are these, from the last tap to the first.
"""

from __future__ import annotations

from kgraph.codegen.contractions import Parts
from kgraph.codegen.cuda.conv_geometry import is_dilated
from kgraph.codegen.cuda.data_movement import lower_view
from kgraph.codegen.cuda.library import HALVES, epilogue_after, held_output
from kgraph.codegen.kernel import LibraryCall, Temporary
from kgraph.codegen.strided import dense_strides
from kgraph.ir import Dim, Node, TensorType
from kgraph.ir.dims import product
from kgraph.ops.convolution import dilated_size
from kgraph.runtime.steps import Convolution

MOST_AXES = 3


def _takes(dtype: str, axes: int, target) -> bool:
    return target.convolutions and (dtype in HALVES or (dtype == "float32" and target.tf32)) and axes <= MOST_AXES


def convolution(parts: Parts, target) -> LibraryCall | None:
    """What the library may do for a convolution: its filters first, then itself, then the epilogue."""
    node = parts.node
    x, w = node.inputs
    attrs, window, filters, result = node.attrs, w.shape[:-2], w.shape[-1], parts.result
    held = held_output(parts)
    if result.dtype != x.dtype or not _takes(x.dtype, len(window), target):
        return None
    dilated = is_dilated(node)
    if dilated and any(isinstance(s, Dim) or s != 1 for s in attrs["strides"]):
        return None
    groups = attrs["feature_groups"]
    if isinstance(filters, Dim) and groups > 1:
        return None
    low = [low for low, _ in attrs["padding"]]
    base, axes = _filters_first(w.shape, groups, dilated)
    packed = Temporary(TensorType(tuple(_lengths(axes, len(window))), x.dtype))
    if dilated:
        # Padding of the result, which is the image of the convolution whose cotangent this is.
        low = [dilated_size(k, d) - 1 - n for k, d, n in zip(window, attrs["rhs_dilation"], low, strict=True)]
    extras = [v for _, v in parts.extras]
    held_at = 2 + len(extras)
    task = Convolution(
        kind="image" if dilated else "forward",
        image=held_at if dilated else 0,
        filters=1,
        result=0 if dilated else held_at,
        image_shape=tuple(result.shape if dilated else x.shape),
        filters_shape=packed.type.shape,
        result_shape=tuple(x.shape if dilated else result.shape),
        strides=tuple(attrs["lhs_dilation"] if dilated else attrs["strides"]),
        low=tuple(low),
        dilation=tuple(attrs["rhs_dilation"]),
        dtype=x.dtype,
    )
    sizes = (1, product(result.shape[:-1]), result.shape[-1])
    return LibraryCall(
        task,
        [parts.operands[0], packed, *extras, held],
        before=lower_view("filters_first", parts.operands[1], packed, base, axes, target),
        after=epilogue_after(parts, held, sizes, target),
    )


def _filters_first(shape: tuple, groups: int, dilated: bool) -> tuple:
    """(base, axes (size, stride)) of a walk through weights [window, channels, filters], in the library's order.

    The library's filters are the channels of the result of a convolution, and of its operand in a cotangent. With
    groups, those of a group lie side by side in the weights.
    """
    *window, channels, filters = shape
    *steps, down, across = dense_strides(shape)
    each = filters if groups == 1 else filters // groups
    if not dilated:
        return 0, [(groups, each), (each, across), *zip(window, steps, strict=True), (channels, down)]
    last = sum(((n - 1) * t for n, t in zip(window, steps, strict=True)), 0)
    backwards = [(n, -t) for n, t in zip(window, steps, strict=True)]
    return last, [(groups, each), (channels, down), *backwards, (each, across)]


def _lengths(axes: list[tuple], rank: int) -> list:
    """The shape of the library's filters: groups and what each has of them are one axis."""
    (groups, _), (each, _), *rest = axes
    return [groups * each, *(n for n, _ in rest)]


def filter_gradient(node: Node, target) -> LibraryCall | None:
    """What the library may do for the cotangent of weights: itself, then the copy of what it gives."""
    x, cotangent, out = *node.inputs, node.output
    attrs, (*window, channels, filters) = node.attrs, out.shape
    if not _takes(x.dtype, len(window), target):
        return None
    found = Temporary(TensorType((filters, *window, channels), out.dtype))
    across, *steps, down = dense_strides(found.type.shape)
    task = Convolution(
        kind="filters",
        image=0,
        filters=2,
        result=1,
        image_shape=tuple(x.shape),
        filters_shape=found.type.shape,
        result_shape=tuple(cotangent.shape),
        strides=tuple(attrs["strides"]),
        low=tuple(low for low, _ in attrs["padding"]),
        dilation=tuple(attrs["rhs_dilation"]),
        dtype=x.dtype,
    )
    axes = [*zip(window, steps, strict=True), (channels, down), (filters, across)]
    after = lower_view("filters_last", found, out, 0, axes, target)
    return LibraryCall(task, [x, cotangent, found], after=after)
