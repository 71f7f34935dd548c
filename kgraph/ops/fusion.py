"""The `fusion` primitive: a region of the graph that becomes one kernel."""

from __future__ import annotations

import numpy as np

from kgraph.ir import PRIMITIVES, Graph, NotDifferentiable, Primitive, Sample, Value, bind, register, type_of
from kgraph.ops.common import uniform
from kgraph.ops.packing import unpack_reference
from kgraph.ops.regions import result_types, run

__all__ = ["fusion"]

KINDS = ("loop", "reduce", "dot", "conv", "depthwise", "pool", "softmax", "norm", "attention")


def _infer(*types, kind, body, packed=()):
    logical = list(types)
    for index, _ in packed:
        logical[index] = body.inputs[index].type
    return result_types("fusion", body, tuple(logical))


def _reference(*arrays, kind, body, packed=()):
    operands = list(arrays)
    for index, layout in packed:
        operands[index] = unpack_reference(operands[index], layout)
    return run("fusion", body, operands)


def _sample(name: str, kind: str, arrays: tuple, build) -> Sample:
    """A sample whose body is what `build(graph, *values)` adds to a graph; it gives the outputs."""
    graph = Graph([Value(type_of(a), name=f"x{i}") for i, a in enumerate(arrays)], name=kind)
    graph.outputs = list(build(graph, *graph.inputs))
    return Sample(arrays, {"kind": kind, "body": graph}, name)


def _samples():
    add = lambda g, name, *values, **attrs: g.add(PRIMITIVES[name], values, **attrs)
    row, matrix = uniform((5,), seed=1), uniform((3, 5))
    dot = {"lhs_contract": (1,), "rhs_contract": (0,), "lhs_batch": (), "rhs_batch": ()}
    return [
        _sample("chain", "loop", (matrix, row), lambda g, x, y: [add(g, "tanh", add(g, "mul", x, y))]),
        _sample(
            "two results",
            "loop",
            (matrix, matrix + 1),
            lambda g, x, y: [s := add(g, "add", x, y), add(g, "exp", s)],
        ),
        _sample(
            "reduction",
            "reduce",
            (matrix,),
            lambda g, x: [add(g, "sqrt", add(g, "reduce_sum", add(g, "mul", x, x), axes=(1,), keepdims=False))],
        ),
        _sample(
            "dense",
            "dot",
            (matrix, uniform((5, 4), seed=2), uniform((4,), seed=3)),
            lambda g, x, w, b: [add(g, "relu", add(g, "add", add(g, "dot_general", x, w, **dot), b))],
        ),
        _sample("empty", "loop", (np.zeros((0, 5), np.float32), row), lambda g, x, y: [add(g, "mul", x, y)]),
    ]


FUSION = register(
    Primitive(
        name="fusion",
        infer=_infer,
        reference=_reference,
        gradient=NotDifferentiable("regions are fused after differentiation"),
        traits=frozenset(),
        samples=_samples,
        tolerance=1e-5,
        results=0,
    )
)


def fusion(*operands, kind: str, body: Graph) -> tuple:
    """The results of `body`, a tuple, evaluated on the operands as one kernel.

    kind: the kernel family, one of `KINDS`. body: its inputs have the operands' types and its outputs the results'.
    Raises ShapeError or DTypeError for operands that do not match the inputs of `body`.
    """
    return bind(FUSION, *operands, kind=kind, body=body)
