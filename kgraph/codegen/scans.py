"""What a running combination along an axis is made of."""

from __future__ import annotations

from kgraph.codegen import reductions
from kgraph.ir.types import FLOATS

# The elementwise primitive that combines two elements, by cumulative primitive.
COMBINE = {
    "cumsum": "add",
    "cumprod": "mul",
    "cummax": "maximum",
    "cummin": "minimum",
    "cumlogsumexp": "logaddexp",
}


def neutral(combine: str, dtype: str):
    """The Python scalar that leaves the other operand as it is."""
    if combine == "add":
        return -0.0 if dtype in FLOATS else 0
    if combine == "mul":
        return 1
    if combine == "logaddexp":
        return float("-inf")
    return reductions.neutral(combine[:3], dtype)
