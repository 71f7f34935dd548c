"""Graphs as text, one node per line; `parser` reads it back exactly.

    graph "mlp" {
      inputs (%x: f32[N,64])
      params (%w: f32[64,8])
      %dot_general_0: f32[N,8] = dot_general(%x, %w) {lhs_batch=(), ...} @ "mlp/dense"
      %relu_1: f32[N,8] = relu(%dot_general_0) @ "mlp/dense"
      return (%relu_1)
    }

Attributes are Python literals, symbolic sizes expressions (`2*N+1`), nested graphs indented blocks. Small constants
stand in the text (`array(f32[2], [1.0, 2.0])`), large ones in a dictionary beside it (`blob("...")`, a digest of them).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable

import numpy as np

from kgraph.ir.dims import Dim
from kgraph.ir.graph import Graph, Node, Value
from kgraph.ir.types import type_of

INLINE_ELEMENTS = 16


def print_graph(graph: Graph, blobs: dict[str, np.ndarray] | None = None) -> str:
    """The graph as text. Values without a name, or with one that is taken, are given one.

    blobs: receives the constants that are too large for the text; the parser needs them.
    """
    assign_names(graph)
    return _graph(graph, {} if blobs is None else blobs, "")


def print_node(node: Node, blobs: dict[str, np.ndarray] | None = None, indent: str = "") -> str:
    """One line of a graph's text (several for nested graphs); unnamed values print as `%?`."""
    blobs = {} if blobs is None else blobs
    outputs = ", ".join(map(repr, node.outputs))
    operands = ", ".join(f"%{v.name or '?'}" for v in node.inputs)
    attrs = ", ".join(f"{name}={_attr(value, blobs, indent)}" for name, value in sorted(node.attrs.items()))
    provenance = ", ".join(_string(p) for p in sorted(node.provenance))
    text = f"{outputs} = {node.name}({operands})" if outputs else f"{node.name}({operands})"
    return text + (f" {{{attrs}}}" if attrs else "") + (f" @ {provenance}" if provenance else "")


def assign_names(graph: Graph) -> None:
    """Give every value a name that is unique in the graph, keeping those that are."""
    taken: set[str] = set()
    values = [(v, f"arg_{i}") for i, v in enumerate(graph.inputs)]
    values += [(v, f"param_{i}") for i, v in enumerate(graph.params)]
    for i, node in enumerate(graph.nodes):
        values += [
            (o, f"{node.name}_{i}" if len(node.outputs) == 1 else f"{node.name}_{i}.{o.index}") for o in node.outputs
        ]
    # Names that are set come first, so that a value keeps its name from one pass to the next.
    for value, _ in values:
        name = re.sub(r"[^A-Za-z0-9_.]", "_", value.name)
        value.name = "" if name in taken else name
        taken.add(name)
    for value, default in values:
        if not value.name:
            value.name, number = default, 0
            while value.name in taken:
                number += 1
                value.name = f"{default}_{number}"
            taken.add(value.name)


def _graph(graph: Graph, blobs: dict, indent: str) -> str:
    inner = indent + "  "
    lines = [f"graph {_string(graph.name)} {{", f"{inner}inputs ({_typed(graph.inputs)})"]
    if graph.params:
        lines.append(f"{inner}params ({_typed(graph.params)})")
    lines += [inner + print_node(node, blobs, inner) for node in graph.nodes]
    lines += [f"{inner}return ({', '.join(f'%{v.name}' for v in graph.outputs)})", indent + "}"]
    return "\n".join(lines)


def _typed(values: Iterable[Value]) -> str:
    return ", ".join(map(repr, values))


def _string(text) -> str:
    return json.dumps(str(text), ensure_ascii=False)


def _attr(value, blobs: dict, indent: str) -> str:
    if isinstance(value, Graph):
        assign_names(value)
        return _graph(value, blobs, indent)
    if isinstance(value, np.ndarray):
        return _array(value, blobs)
    if isinstance(value, tuple):
        items = [_attr(v, blobs, indent) for v in value]
        return f"({items[0]},)" if len(items) == 1 else f"({', '.join(items)})"
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, Dim):
        return str(value)
    if value is None or isinstance(value, (bool, int)):
        return repr(value)
    if isinstance(value, np.generic):
        return _attr(value.item(), blobs, indent)
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, complex):
        return f"complex({value.real!r}, {value.imag!r})"
    raise TypeError(f"attribute {value!r} of type {type(value).__name__} has no text form")


def _array(array: np.ndarray, blobs: dict) -> str:
    if array.size <= INLINE_ELEMENTS and array.dtype.kind != "c" and _reads_back(array):
        return f"array({type_of(array)}, [{', '.join(_number(x) for x in array.reshape(-1))}])"
    digest = hashlib.blake2b(f"{array.dtype.name}{array.shape}".encode(), digest_size=8)
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    blobs[digest.hexdigest()] = array
    return f"blob({_string(digest.hexdigest())})"


def _number(x: np.generic) -> str:
    if x.dtype.kind == "b":
        return str(bool(x))
    if x.dtype.name.startswith(("int", "uint")):
        return str(int(x))
    value = float(x)
    short = f"{value:.4g}" if x.dtype.itemsize == 2 else str(x)
    # The shortest text of the narrow float reads well; where it does not read back the exact one stands.
    readable = math.isfinite(value) and x.dtype.type(float(short)) == x
    text = repr(float(short)) if readable else repr(value)
    return text


def _reads_back(array: np.ndarray) -> bool:
    """Whether numbers in the text keep every bit of the array: all but NaN with a payload or a sign do."""
    if array.dtype.kind in "biu" or array.dtype.name in ("int4", "uint4"):
        return True
    back = np.array([float(x) for x in array.reshape(-1)]).astype(array.dtype)
    plain = np.where(np.isnan(back), array.dtype.type(np.nan), back).astype(array.dtype)
    return plain.tobytes() == np.ascontiguousarray(array).tobytes()
