"""Moments of what is concatenated, layer after layer: computed once for every operand."""

from __future__ import annotations

import numpy as np
import pytest

from kgraph import ops
from kgraph.frontend.tracer import trace
from kgraph.ir import Dim, TensorType
from kgraph.ir.interpreter import evaluate
from kgraph.passes.dead_code import dead_code
from kgraph.passes.share_moments import share_moments

N = Dim.symbol("N")


def rewritten(function, *shapes):
    """The graph behind the pass; its values are those of before."""
    graph = trace(function, *(TensorType(shape, "float32") for shape in shapes))
    out = dead_code(share_moments(graph))
    rng = np.random.default_rng(0)
    arrays = [3 + rng.standard_normal([3 if n is N else n for n in shape]).astype("float32") for shape in shapes]
    for got, wanted in zip(evaluate(out, arrays), evaluate(graph, arrays), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5)
    return out


def reduced(graph) -> list[tuple]:
    return [node.inputs[0].shape for node in graph.nodes if node.name == "moments"]


@pytest.mark.parametrize(("axes", "along"), [((0, 1), 2), ((0, 1), -1), ((0, 2), 1), ((1, 2), 0)])
def test_a_chain_of_concatenations(axes, along):
    shapes = [[4, 5, 6] for _ in range(3)]
    for shape, width in zip(shapes, (7, 2, 3)):
        shape[along] = width

    def function(x, y, z):
        first = ops.concatenate(x, y, axis=along)
        second = ops.concatenate(z, first, axis=along)
        return *ops.moments(x, axes=axes), *ops.moments(first, axes=axes), *ops.moments(second, axes=axes)

    graph = rewritten(function, *map(tuple, shapes))
    assert reduced(graph) == list(map(tuple, shapes))


def test_of_images_of_any_number():
    def function(x, y):
        joined = ops.concatenate(x, y, axis=-1)
        return *ops.moments(x, axes=(0, 1)), *ops.moments(joined, axes=(0, 1))

    assert reduced(rewritten(function, (N, 4, 3), (N, 4, 5))) == [(N, 4, 3), (N, 4, 5)]


@pytest.mark.parametrize("case", ["nothing is known", "other axes are known", "along a reduced axis"])
def test_what_stays(case):
    """Unless something is known, one pass over the concatenation is best; means of parts are not the mean of all."""

    def function(x, y):
        along = 0 if case == "along a reduced axis" else 2
        joined = ops.concatenate(x, y, axis=along)
        known = () if case == "nothing is known" else ops.moments(x, axes=(0,) if case[0] == "o" else (0, 1))
        return *known, *ops.moments(joined, axes=(0, 1))

    graph = rewritten(function, (4, 5, 6), (4, 5, 6))
    assert len(reduced(graph)[-1]) == 3
    assert reduced(graph)[-1] != (4, 5, 6)
