"""Reverse-mode differentiation of a graph: the forward and the backward part in one graph for later passes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kgraph import ops
from kgraph.errors import DTypeError, ShapeError
from kgraph.ir import Graph, Value
from kgraph.ir.recorder import Recorder
from kgraph.ops.common import INEXACT, Array, zeros_like
from kgraph.ops.reverse_mode import pull_back
from kgraph.passes.dead_code import dead_code


def differentiate(
    graph: Graph,
    wrt: Sequence[Value],
    outputs: Sequence[Value] | None = None,
    cotangents: Sequence[Value | np.ndarray | None] | None = None,
) -> Graph:
    """`y = f(x); return y  ->  y = f(x); dx = df(x, dy); return y, dx`.

    wrt: values of the graph, of float or complex dtype, usually inputs or params.
    outputs: the values that are differentiated; by default all outputs of float or complex dtype.
    cotangents: one for each of `outputs`: an array, None for zero, or a Value, which becomes an input of the result
        unless the graph has it. By default 1 for each, which then has to be a float scalar.

    The result has the graph's inputs (and the new ones), its params that are still read, and its outputs followed by
    one cotangent per value of `wrt`, of the same type: zeros where nothing differentiable leads to an output. What
    neither an output nor a cotangent needs is left out. The nodes of the given graph are shared, not changed.
    Raises GradientError naming a primitive without derivative that lies on the way, its layer and the reason;
    DTypeError, ShapeError where `wrt` or the cotangents do not fit.
    """
    outputs = [v for v in graph.outputs if v.dtype in INEXACT] if outputs is None else list(outputs)
    for value in wrt:
        if value.dtype not in INEXACT:
            raise DTypeError(
                f"differentiate: {value!r} of graph {graph.name!r} is {value.dtype}; cotangents are floats"
            )
    joint = Graph(graph.inputs, graph.params, graph.nodes, graph.outputs, graph.name)
    recorder = Recorder(graph=joint)
    known = {*graph.inputs, *graph.params, *(o for node in graph.nodes for o in node.outputs)}
    with recorder.active():
        given: dict[Value, Array] = {}
        for value, cotangent in zip(outputs, _cotangents(outputs, cotangents), strict=True):
            if cotangent is None:
                continue
            if isinstance(cotangent, Value):
                if cotangent not in known:
                    known.add(cotangent)
                    joint.inputs.append(cotangent)
                cotangent = recorder.wrap(cotangent)
            if (tuple(cotangent.shape), str(cotangent.dtype)) != (value.shape, value.dtype):
                raise ShapeError(f"differentiate: a cotangent of {value!r} needs its type, got {cotangent.shape}")
            given[value] = ops.add(given[value], cotangent) if value in given else cotangent
        found = pull_back(graph.nodes, recorder.wrap, given, wrt)
        zero = lambda v: zeros_like(recorder.wrap(v))
        results = [recorder.value(zero(v) if c is None else c) for v, c in zip(wrt, found, strict=True)]
    joint.outputs = [*graph.outputs, *results]
    return dead_code(joint)


def _cotangents(outputs: Sequence[Value], cotangents: Sequence | None) -> Sequence:
    """The given cotangents, or 1 for each output."""
    if cotangents is not None:
        return cotangents
    for value in outputs:
        if value.shape or value.dtype not in INEXACT:
            raise ShapeError(f"differentiate: {value!r} is no float scalar; give its cotangent")
    return [np.ones((), v.type.np_dtype) for v in outputs]


__all__ = ["differentiate"]
