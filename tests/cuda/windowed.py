"""What the tests of kernels over windows share."""

from __future__ import annotations

from kgraph.ir import Dim
from tests.codegen.contractions import filled, verify
from tests.cuda.driver import run_node


def check(node, sizes=None, **options):
    """Runs a node on made-up operands, compares with its reference in float64, and gives the results.

    sizes: of symbols. options: of `run_node`.
    """
    sizes = sizes or {}
    shapes = [[n.evaluate(sizes) if isinstance(n, Dim) else n for n in v.shape] for v in node.inputs]
    arrays = [filled(shape, v.dtype, seed) for seed, (shape, v) in enumerate(zip(shapes, node.inputs))]
    results = run_node(node, arrays, sizes, **options)
    verify(node, arrays, results, sizes)
    return results
