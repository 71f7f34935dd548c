"""A gradient rule that a user gives for a function of theirs, as a node of the graph."""

from __future__ import annotations

import numpy as np

from kgraph import ops
from kgraph.errors import ShapeError
from kgraph.ir import Graph, Primitive, Sample, bind, register, type_of
from kgraph.ops.common import uniform
from kgraph.ops.region_gradient import record_region, replay
from kgraph.ops.regions import result_types

__all__ = ["custom_gradient"]


def _infer(*types, backward, num_results, num_inputs):
    results, inputs = types[:num_results], types[num_results : num_results + num_inputs]
    found = result_types("custom_gradient", backward, (*results, *types[num_results + num_inputs :]))
    if len(found) != num_inputs or any(c.rank != x.rank or c.dtype != x.dtype for c, x in zip(found, inputs)):
        given, wanted = (", ".join(map(str, t)) for t in (found, inputs))
        raise ShapeError(f"custom_gradient: its rule gives cotangents ({given}) for operands ({wanted})")
    return tuple(results)


def _reference(*arrays, backward, num_results, num_inputs):
    return tuple(np.array(a) for a in arrays[:num_results])


def _gradient(cotangents, inputs, outputs, *, backward, num_results, num_inputs):
    """The rule's own cotangents for the operands; nothing for the results, by whose nodes no gradient flows."""
    captured = inputs[num_results + num_inputs :]
    found, _ = replay(backward, [*cotangents, *captured])
    return (*(None,) * num_results, *found, *(None,) * len(captured))


def _samples():
    x = uniform((3, 5))
    rule = record_region("rule", [type_of(x), type_of(x)], lambda c, x: [ops.mul(c, ops.cos(x))])
    return [Sample((np.sin(x), x, x), {"backward": rule, "num_results": 1, "num_inputs": 1}, "sine")]


CUSTOM_GRADIENT = register(
    Primitive(
        name="custom_gradient",
        infer=_infer,
        reference=_reference,
        gradient=_gradient,
        traits=frozenset(),
        samples=_samples,
        tolerance=0.0,
        results=0,
    )
)


def custom_gradient(*operands, backward: Graph, num_results: int, num_inputs: int) -> tuple:
    """The first `num_results` operands, whose cotangents go to the next `num_inputs` operands as `backward` says.

    backward: graph from the cotangents of the results, and from the operands that follow, to the cotangents of the
    inputs. Raises ShapeError, DTypeError for a graph of other types.
    """
    return bind(CUSTOM_GRADIENT, *operands, backward=backward, num_results=num_results, num_inputs=num_inputs)
