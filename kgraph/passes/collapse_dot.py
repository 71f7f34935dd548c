"""Brings products with weights to the one form `[..., K] x [K, N]`, which is a matrix product without copies."""

from __future__ import annotations

from kgraph.ir import Graph, Node, Rewriter
from kgraph.ir.dims import product
from kgraph.passes.manager import PassContext
from kgraph.passes.patterns import primitive, state_only_values


def collapse_dot(graph: Graph, context: PassContext | None = None) -> Graph:
    """`dot_general(x[B,T,D], w[D,H,K]) -> reshape(dot_general(x, reshape(w, [D,H*K])), [B,T,H,K])`.

    Holds for products without batch axes whose second operand is a weight and whose first is contracted along its
    last axes, in any order of the weight's axes: the weight is rearranged when weights change, not per call. Where
    the weight stands first and its free axes are to come first, the form is kept.
    """
    state_only = state_only_values(graph)

    def visit(node: Node, inputs: tuple, rewriter: Rewriter):
        if node.name != "dot_general" or node.attrs["lhs_batch"]:
            return None
        lhs, rhs = inputs
        old_lhs, old_rhs = node.inputs
        if old_rhs not in state_only or old_lhs in state_only:
            return None
        lhs_contract, rhs_contract = tuple(node.attrs["lhs_contract"]), tuple(node.attrs["rhs_contract"])
        count, rank = len(lhs_contract), rhs.type.rank
        if not count or sorted(lhs_contract) != list(range(lhs.type.rank - count, lhs.type.rank)):
            return None
        pairs = sorted(zip(lhs_contract, rhs_contract))
        contracted = [r for _, r in pairs]
        free = [axis for axis in range(rank) if axis not in contracted]
        if rank == 2 and contracted == [0] and count == 1:
            return None
        emit = rewriter.emit
        permutation = tuple(contracted + free)
        if permutation != tuple(range(rank)):
            rhs = emit(primitive("transpose"), rhs, permutation=permutation)
        depth = product(rhs.shape[:count])
        width = product(rhs.shape[count:])
        if rhs.type.rank != 2 or count != 1:
            rhs = emit(primitive("reshape"), rhs, shape=(depth, width))
        if count > 1:
            lhs = emit(primitive("reshape"), lhs, shape=(*lhs.shape[: lhs.type.rank - count], depth))
        attrs = dict(node.attrs, lhs_contract=(lhs.type.rank - 1,), rhs_contract=(0,))
        out = emit(node.primitive, lhs, rhs, **attrs)
        return out if out.shape == node.output.shape else emit(primitive("reshape"), out, shape=node.output.shape)

    return Rewriter(graph).run(visit)
