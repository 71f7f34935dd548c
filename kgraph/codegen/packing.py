"""Kernels for `pack` nodes: those that pack activations and the filters of training steps, on weights."""

from __future__ import annotations

from dataclasses import replace
from math import prod

from kgraph.codegen.cpu.builder import compute_dtype
from kgraph.codegen.cpu.gemm import MatrixView, pack_call
from kgraph.codegen.cpu.winograd_filters import DTYPE, filters_call
from kgraph.codegen.kernel import KernelCall
from kgraph.codegen.strided import collapse, dense_strides, untransposed
from kgraph.ir import Node, Value
from kgraph.ops.packing import matrix_sizes

__all__ = ["call_for"]


def call_for(node: Node) -> KernelCall | None:
    """The call that computes a `pack` node on this machine; None where no kernel does it (see `kgraph.ops.packing`).

    A factor for each column, as that of a folded batch normalisation, is multiplied on the way: the call reads what
    `mul` reads. Columns that fill up a panel may hold anything: no result comes of them.
    """
    (w,), layout = node.inputs, node.attrs["layout"]
    *_, panel, lanes, dtype = layout
    if 0 in w.shape or compute_dtype(w.dtype) != dtype or dtype not in ("float32", "float64"):
        return None
    scaled = _scaled(w, layout)
    w, scale = scaled or (w, None)
    if layout[0] == "winograd":
        call = filters_call(w, layout, wide=True, scale=scale) if w.dtype == DTYPE else None
    else:
        _, shape, batch_axes, k_axes, n_axes, groups, *_ = layout
        w, axes = untransposed(w)  # packing transposes, too
        dense = dense_strides(w.shape)
        strides = [dense[axis] for axis in axes]
        walks = [collapse((shape[a], strides[a]) for a in axes) for axes in (k_axes, n_axes)]
        if any(len(walk) > 1 for walk in walks):
            return None
        k_stride, n_stride = (walk[0][1] if walk else 1 for walk in walks)
        _, depth, columns = matrix_sizes(layout)
        batch = [(shape[a], strides[a]) for a in batch_axes] + ([(groups, columns * n_stride)] if groups > 1 else [])
        view = MatrixView(w, tuple(stride for _, stride in batch), k_stride, n_stride)
        sizes = tuple(size for size, _ in batch)
        call = pack_call(view, sizes, depth, columns, dtype, lanes, panel // lanes, scale)
    return call and replace(call, operands=[*call.operands[:-1], node.output])


def _scaled(w: Value, layout: tuple) -> tuple[Value, Value] | None:
    """(weight, factors) where `w` is a weight times one factor for each index of its last axis, which is N."""
    if w.node is None or w.node.name != "mul" or w.dtype not in ("float32", "float64"):
        return None
    if layout[0] == "panels" and (layout[4] != (len(w.shape) - 1,) or layout[5] != 1):
        return None
    for weight, factors in (w.node.inputs, w.node.inputs[::-1]):
        if weight.shape == w.shape and prod(factors.shape) == w.shape[-1] == (factors.shape or (0,))[-1]:
            return weight, factors
    return None
