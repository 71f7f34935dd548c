"""What the kernels of attention and of its gradient share on every target.

Scores are in units of log2: the scale of q carries log2(e), so that the exponential is a power of two.
"""

from __future__ import annotations

from kgraph.codegen.strided import dense_strides
from kgraph.ir import Dim, Value

LOG2E = 1.4426950408889634
# Stands for the logit of a masked key: finite, so that a row masked whole weighs all keys alike.
MASKED = {"float32": -2e38, "float64": -1e300}


def extra_strides(value: Value) -> tuple:
    """Strides of a mask or bias along (batch, heads, queries, keys), 0 where it broadcasts."""
    shape = (1,) * (4 - value.type.rank) + tuple(value.shape)
    strides = zip(shape, dense_strides(shape), strict=True)
    return tuple(0 if not isinstance(n, Dim) and n == 1 else t for n, t in strides)
