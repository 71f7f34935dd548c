"""Contraction nodes for kernel tests: plain, fused with an epilogue, packed; and their check against float64."""

from __future__ import annotations

import numpy as np

from kgraph.ir import PRIMITIVES, Graph, Node, TensorType, Value, make_node, np_dtype
from kgraph.ops.fusion import FUSION
from kgraph.ops.packing import pack
from tests.codegen.driver import host_target, run_node

TOLERANCE = {"float32": 5e-6, "float64": 1e-14, "float16": 1e-3, "bfloat16": 8e-3}


def filled(shape, dtype: str, seed: int = 0) -> np.ndarray:
    """Normal values, or small integers."""
    rng = np.random.default_rng(seed)
    if dtype.startswith(("int", "uint")):
        return rng.integers(0 if dtype.startswith("u") else -9, 10, shape).astype(dtype)
    return rng.standard_normal(shape).astype(np_dtype(dtype))


def fused(core: Node, extras: list[TensorType], epilogue, kind: str) -> Node:
    """`core` in a fused node. epilogue(graph, result, *extra values) adds nodes and gives the outputs."""
    inputs = [Value(v.type) for v in core.inputs] + [Value(t) for t in extras]
    body = Graph(inputs, name=kind)
    result = body.add(core.primitive, inputs[:2], **core.attrs)
    body.outputs = list(epilogue(body, result, *inputs[2:]))
    outer = [*core.inputs, *(Value(t) for t in extras)]
    return Node(FUSION, outer, {"kind": kind, "body": body}, [v.type for v in body.outputs])


def pack_weights(family, node: Node, arrays: list[np.ndarray], target=None) -> tuple[Node, list[np.ndarray]]:
    """The node and its operands as the layout pass leaves them."""
    wanted = family.packing_for(node, target or host_target())
    if wanted is None:
        return node, arrays
    inputs, arrays = list(node.inputs), list(arrays)
    for index, layout in wanted:
        inputs[index] = Value(pack.infer(inputs[index].type, layout=layout))
        arrays[index] = pack.reference(arrays[index], layout=layout)
    attrs = {**node.attrs, "packed": wanted}
    return Node(FUSION, inputs, attrs, [v.type for v in node.outputs]), arrays


def concrete_attrs(attrs: dict, sizes: dict) -> dict:
    """Attributes with symbolic sizes replaced."""
    from kgraph.ir.interpreter import concrete

    return {k: concrete(v, sizes) for k, v in attrs.items()}


def add(graph: Graph, name: str, *values, **attrs) -> Value:
    return graph.add(PRIMITIVES[name], values, **attrs)


def check(
    family, primitive, types, arrays, attrs, *, epilogue=None, extras=(), packed=False, sizes=None, parts=2, target=None
) -> list[np.ndarray]:
    """Runs a node of `primitive` and compares with its reference in float64; gives the results.

    types: of the operands (static or symbolic). extras: (type, array) of the epilogue's operands.
    """
    sizes = sizes or {}
    node = make_node(primitive, [Value(t) for t in types], attrs)
    kind = {"dot_general": "dot", "conv": "conv"}[primitive.name]
    arrays = [*arrays, *(a for _, a in extras)]
    if epilogue is not None or packed:
        keep = lambda graph, result: [result]
        node = fused(node, [t for t, _ in extras], epilogue or keep, kind)
    run_arrays, run_target = arrays, target or host_target()
    reference_node = node
    if packed:
        node, run_arrays = pack_weights(family, node, arrays, run_target)
    reason = family.accepts(node)
    assert reason is None, reason
    results = run_node(family.lower, node, run_arrays, sizes, parts, run_target)
    verify(reference_node, arrays, results, sizes)
    return results


def verify(node: Node, arrays, results, sizes: dict) -> None:
    """Compares results of a node on `arrays` with its references in float64."""
    wide = [a if a.dtype.kind in "iu" or a.dtype == bool else a.astype(np.float64) for a in arrays]
    if node.name == "fusion":
        wanted = _evaluate(node.attrs["body"], wide, sizes)
    else:
        wanted = [node.primitive.reference(*wide, **concrete_attrs(node.attrs, sizes))]
    for result, expected, value in zip(results, wanted, node.outputs, strict=True):
        assert result.dtype == value.type.np_dtype
        assert result.shape == expected.shape
        tolerance = TOLERANCE.get(result.dtype.name)
        if tolerance is None:
            np.testing.assert_array_equal(result, expected)
        else:
            scale = np.abs(expected).max(initial=1e-30)
            error = np.abs(result.astype(np.float64) - expected).max(initial=0)
            assert error <= tolerance * scale, (error / scale, tolerance)


def _evaluate(body: Graph, arrays, sizes) -> list[np.ndarray]:
    values = dict(zip(body.inputs, arrays, strict=True))
    for node in body.nodes:
        attrs = concrete_attrs(node.attrs, sizes)
        if node.name == "convert":
            attrs["dtype"] = "float64" if attrs["dtype"].startswith(("float", "bfloat")) else attrs["dtype"]
        out = node.primitive.reference(*(values[v] for v in node.inputs), **attrs)
        if out.dtype.kind == "f":
            out = out.astype(np.float64)
        values[node.output] = out
    return [values[v] for v in body.outputs]
