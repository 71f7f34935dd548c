"""The intermediate representation: sizes, types, primitives' records, graphs."""

from kgraph.ir.dims import Dim
from kgraph.ir.graph import (
    Graph,
    Node,
    Rewriter,
    Value,
    append_graph,
    constant_value,
    copy_graph,
    live_nodes,
    make_node,
)
from kgraph.ir.primitive import PRIMITIVES, NotDifferentiable, Primitive, Sample, Traced, Tracer, bind, register
from kgraph.ir.types import TensorType, dtype_name, np_dtype, type_of

__all__ = [
    "PRIMITIVES",
    "Dim",
    "Graph",
    "Node",
    "NotDifferentiable",
    "Primitive",
    "Rewriter",
    "Sample",
    "TensorType",
    "Traced",
    "Tracer",
    "Value",
    "append_graph",
    "bind",
    "constant_value",
    "copy_graph",
    "dtype_name",
    "live_nodes",
    "make_node",
    "np_dtype",
    "register",
    "type_of",
]
