"""What kernel families offer to a device's library beside their own calls: see `kgraph.codegen.kernel.LibraryCall`."""

from __future__ import annotations

from kgraph.codegen import expressions
from kgraph.codegen.contractions import Parts
from kgraph.codegen.cuda import loop
from kgraph.codegen.kernel import KernelCall, LibraryCall, Temporary
from kgraph.codegen.regions import Leaf
from kgraph.ir import Value

HALVES = ("float16", "bfloat16")
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


def held_output(parts: Parts, wide: bool = False) -> Value | Temporary:
    """What holds the contraction's result until the epilogue has read it: an output if that can.

    wide: whether the library writes the sums of half floats as float32 too, which saves the rounding.
    """
    dtype = parts.result.dtype
    for wanted in (dtype, "float32") if wide and dtype in HALVES else (dtype,):
        for value in parts.outputs:
            if value.dtype == wanted:
                return value
    return Temporary(parts.result)


def epilogue_after(parts: Parts, held: Value | Temporary, sizes: tuple, target) -> list[KernelCall]:
    """The calls that apply the epilogue to a result that lies in `held`; none where there is no epilogue.

    sizes: of the result, as (batch, rows, columns).
    """
    if parts.expression is None and tuple(parts.outputs) == (held,):
        return []
    leaves = [Leaf(held, held.type.dtype, SPANS["full"])]
    leaves += [Leaf(value, value.dtype, SPANS[kind]) for kind, value in parts.extras]
    expression = parts.expression or expressions.identity(parts.result.dtype)
    calls = loop.lower_expression(expression, leaves, sizes, parts.outputs, target)
    for call in calls:
        call.notes["inplace"] = ()
    return calls
