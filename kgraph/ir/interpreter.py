"""The oracle: evaluates a graph node by node through the primitives' NumPy references."""

from __future__ import annotations

import contextvars
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kgraph.errors import InputError
from kgraph.ir.dims import Dim
from kgraph.ir.dims import evaluate as evaluate_size
from kgraph.ir.graph import Graph, Node, Value
from kgraph.ir.types import FLOATS, TensorType, np_dtype

WIDE = {"complex64": "complex128", **dict.fromkeys(FLOATS, "float64")}


@dataclass(frozen=True)
class _Context:
    sizes: Mapping[str, int]
    precision: str | None


_current: contextvars.ContextVar[_Context | None] = contextvars.ContextVar("kgraph_interpreter", default=None)


def evaluate(
    graph: Graph,
    inputs: Sequence,
    params: Sequence | Mapping[Value, np.ndarray] | None = None,
    sizes: Mapping[str, int] | None = None,
    precision: str | None = None,
) -> list[np.ndarray]:
    """The graph's outputs for concrete inputs.

    inputs: one array per graph input. params: one per parameter, in order or by Value.
    sizes: values of symbolic sizes, beyond those that follow from the shapes of inputs and parameters.
    precision: None evaluates every value in its own dtype; "float64" evaluates all floats in float64 and complex
        numbers in complex128, conversions and constants included: the oracle for kernels. Bit casts and random numbers
        are computed in their own dtypes and widened after.
    A call from within a reference (a body of control flow) takes over sizes and precision of the evaluation around it.
    Raises InputError for arrays that do not fit the graph's types.
    """
    if precision not in (None, "float64"):
        raise ValueError(f"precision is None or 'float64', got {precision!r}")
    outer = _current.get()
    if outer is not None:
        sizes = {**outer.sizes, **(sizes or {})}
        precision = precision or outer.precision
    values = list(graph.inputs) + list(graph.params)
    arrays = [np.asarray(a) for a in [*inputs, *_in_order(graph.params, params)]]
    if len(arrays) != len(values):
        raise InputError(f"graph {graph.name!r} takes {len(graph.inputs)} inputs, got {len(inputs)}")
    bound = bind_sizes([v.type for v in values], [a.shape for a in arrays], sizes)
    token = _current.set(_Context(bound, precision))
    try:
        environment = {v: conform(a, v.type, precision) for v, a in zip(values, arrays, strict=True)}
        return _run(graph, environment, bound, precision)
    finally:
        _current.reset(token)


def _in_order(declared: Sequence[Value], params) -> list:
    if params is None:
        params = ()
    if isinstance(params, Mapping):
        params = [params[v] for v in declared]
    if len(params) != len(declared):
        raise InputError(f"the graph has {len(declared)} parameters, got {len(params)} arrays")
    return list(params)


def _run(graph: Graph, environment: dict, sizes: Mapping[str, int], precision: str | None) -> list[np.ndarray]:
    remaining = {value: len(nodes) for value, nodes in graph.uses().items()}
    kept = {*graph.outputs, *graph.inputs, *graph.params}
    for node in graph.nodes:
        results = evaluate_node(node, [environment[v] for v in node.inputs], sizes, precision)
        environment.update(zip(node.outputs, results, strict=True))
        for value in node.inputs:  # dead values go, so that large models fit into memory
            remaining[value] -= 1
            if not remaining[value] and value not in kept:
                del environment[value]
    return [environment[v] for v in graph.outputs]


def evaluate_node(node: Node, arrays: Sequence, sizes: Mapping[str, int] = {}, precision: str | None = None) -> tuple:
    """The results of one node for concrete operands, each in its type's dtype (or the wide one)."""
    attrs = {name: concrete(value, sizes) for name, value in node.attrs.items()}
    if precision == "float64":
        if node.name in ("bitcast_convert", "bitcast_regroup") or "random" in node.primitive.traits:
            arrays = [np.asarray(a, v.type.np_dtype) for a, v in zip(arrays, node.inputs, strict=True)]
        else:
            attrs = wide_attrs(attrs)
    results = node.primitive.reference(*arrays, **attrs)
    if not isinstance(results, tuple):
        results = (results,)
    return tuple(conform(r, o.type, precision) for r, o in zip(results, node.outputs, strict=True))


def concrete(value, sizes: Mapping[str, int]):
    """An attribute with its symbolic sizes replaced by ints."""
    if isinstance(value, Dim):
        return evaluate_size(value, sizes)
    if type(value) is tuple:
        return tuple(concrete(v, sizes) for v in value)
    return value


def wide_attrs(attrs: dict) -> dict:
    """Attributes under which a primitive computes in float64: float dtypes and float constants widened."""
    out = dict(attrs)
    for name in ("dtype", "preferred_dtype"):
        if isinstance(out.get(name), str):
            out[name] = WIDE.get(out[name], out[name])
    if isinstance(out.get("value"), np.ndarray):
        out["value"] = wide_array(out["value"])
    return out


def wide_array(array) -> np.ndarray:
    """Floats as float64, complex numbers as complex128, everything else as it is."""
    array = np.asarray(array)
    wide = WIDE.get(array.dtype.name)
    return array if wide is None else array.astype(wide)


def conform(array, type: TensorType, precision: str | None) -> np.ndarray:
    """An array in the dtype of `type`, or the wide one."""
    dtype = WIDE.get(type.dtype, type.dtype) if precision == "float64" else type.dtype
    return np.asarray(array, np_dtype(dtype))


def bind_sizes(
    types: Iterable[TensorType], shapes: Iterable[tuple], known: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Values of the symbolic sizes that make `types` fit concrete shapes, together with the known ones.

    A size that is one symbol gives its value; composed ones (`2*N+1`) are checked where their symbols are known.
    Raises InputError where ranks or sizes contradict.
    """
    sizes = dict(known or {})
    pairs = list(zip(types, shapes, strict=True))
    for number, (type, shape) in enumerate(pairs):
        if type.rank != len(shape):
            raise InputError(f"operand {number}: expected rank {type.rank} ({type}), got shape {tuple(shape)}")
        for size, n in zip(type.shape, shape):
            if isinstance(size, Dim) and size.terms == ((tuple(size.symbols()), 1),):
                (symbol,) = size.symbols()
                sizes.setdefault(symbol, int(n))
    for number, (type, shape) in enumerate(pairs):
        for size, n in zip(type.shape, shape):
            if isinstance(size, Dim) and not size.symbols() <= sizes.keys():
                continue
            if evaluate_size(size, sizes) != n:
                raise InputError(
                    f"operand {number}: expected {type}, got shape {tuple(shape)} with {sizes or 'no sizes'}"
                )
    return sizes
