"""Sums that are cut: one kernel leaves the sums of every piece, a reduction adds them in order."""

from __future__ import annotations

from collections.abc import Sequence

from kgraph.codegen import expressions
from kgraph.codegen.kernel import Temporary
from kgraph.codegen.reductions import Parts
from kgraph.codegen.regions import Leaf
from kgraph.ir import Value


def sum_of_pieces(
    partial: Temporary, result: str, outputs: Sequence[Value], extras: Sequence[Leaf] = (), expression=None
) -> Parts:
    """The reduction over the first axis of `partial`, and the epilogue of what it gives.

    result: dtype of the sum. extras: further operands of the epilogue `expression`, over the axes of `partial`.
    """
    accumulate, rank = partial.type.dtype, len(partial.type.shape)
    return Parts(
        shape=partial.type.shape,
        axes=(0,),
        leaves=[Leaf(partial, accumulate, (True,) * rank)],
        prologue=expressions.identity(accumulate),
        reductions=(("sum", accumulate, result),),
        extras=list(extras),
        epilogue=expression or expressions.identity(result),
        outputs=outputs,
    )
