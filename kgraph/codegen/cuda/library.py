"""What kernel families offer to a device's library beside their own calls: see `kgraph.codegen.kernel.LibraryCall`."""

from __future__ import annotations

from kgraph.codegen import expressions
from kgraph.codegen.contractions import Parts
from kgraph.codegen.cuda import loop
from kgraph.codegen.kernel import KernelCall, LibraryCall
from kgraph.codegen.regions import Leaf
from kgraph.ir import Value

# How an extra of an epilogue extends over (batch, rows, columns) of a result.
SPANS = {
    "full": (True, True, True),
    "row": (True, True, False),
    "channel": (False, False, True),
    "scalar": (False,) * 3,
}


def offer(calls: list[KernelCall], library: LibraryCall) -> list[KernelCall]:
    """The calls of a node, all of which the library may do at once."""
    calls[0].library = library
    for call in calls[1:]:
        call.continues = True
    for call in calls:
        # What the library computes is written to an output before the epilogue reads its operands.
        if library.after:
            call.notes["inplace"] = ()
    return calls


def held_output(parts: Parts) -> Value | None:
    """An output that can hold the contraction's result until the epilogue has read it."""
    return next((value for value in parts.outputs if value.dtype == parts.result.dtype), None)


def epilogue_after(parts: Parts, held: Value, sizes: tuple, target) -> list[KernelCall]:
    """The calls that apply the epilogue to a result that lies in `held`; none where there is no epilogue.

    sizes: of the result, as (batch, rows, columns).
    """
    if parts.expression is None and tuple(parts.outputs) == (held,):
        return []
    dtype = parts.result.dtype
    leaves = [Leaf(held, dtype, SPANS["full"])] + [Leaf(v, v.dtype, SPANS[kind]) for kind, v in parts.extras]
    expression = parts.expression or expressions.identity(dtype)
    calls = loop.lower_expression(expression, leaves, sizes, parts.outputs, target)
    for call in calls:
        call.notes["inplace"] = ()
    return calls
