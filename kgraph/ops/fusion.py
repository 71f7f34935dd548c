"""The `fusion` primitive: a region of the graph that becomes one kernel."""

from __future__ import annotations

import numpy as np

from kgraph import ops
from kgraph.ir import Graph, NotDifferentiable, Primitive, Sample, bind, register, type_of
from kgraph.ops.common import uniform
from kgraph.ops.packing import unpack_reference
from kgraph.ops.region_gradient import record_region
from kgraph.ops.regions import result_types, run

__all__ = ["fusion"]

KINDS = (
    "loop",
    "reduce",
    "rescale",
    "dot",
    "conv",
    "depthwise",
    "pool",
    "softmax",
    "norm",
    "attention",
    "rnn",
    "rnn_gradient",
)


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
    """A sample whose body is `build` applied to values of the arrays' types."""
    return Sample(arrays, {"kind": kind, "body": record_region(kind, [type_of(a) for a in arrays], build)}, name)


def _samples():
    row, matrix = uniform((5,), seed=1), uniform((3, 5))
    weights = uniform((5, 4), seed=2), uniform((4,), seed=3)
    norm = lambda x: [ops.sqrt(ops.reduce_sum(ops.mul(x, x), axes=(1,), keepdims=False))]
    return [
        _sample("chain", "loop", (matrix, row), lambda x, y: [ops.tanh(ops.mul(x, y))]),
        _sample("two results", "loop", (matrix, matrix + 1), lambda x, y: [s := ops.add(x, y), ops.exp(s)]),
        _sample("reduction", "reduce", (matrix,), norm),
        _sample("dense", "dot", (matrix, *weights), lambda x, w, b: [ops.relu(ops.add(ops.matmul(x, w), b))]),
        _sample("empty", "loop", (np.zeros((0, 5), np.float32), row), lambda x, y: [ops.mul(x, y)]),
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
