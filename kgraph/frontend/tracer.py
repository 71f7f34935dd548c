"""Tracing: `TracedArray` stands for a tensor while Python code runs, and what is applied to it is recorded.

A `GraphTracer` builds one `Graph`. Traces nest: the body of a loop or a branch is traced by a child tracer, and outer
values that it uses become operands of the control-flow node (`captures`). Keras variables read during a trace become
parameters of the outermost graph. Concrete arrays become constants, once per array object.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, cast

import numpy as np

from kgraph.errors import CaptureError
from kgraph.frontend.eager_array import underlying
from kgraph.frontend.traced_array import TracedArray, layer_path
from kgraph.ir import Graph, TensorType, Tracer, Value, dtype_name, make_node, type_of
from kgraph.ir.primitive import PRIMITIVES, current_tracer
from kgraph.ir.recorder import LARGEST_UNIFORM_CONSTANT, inherited_provenance, uniform_value

_BACKEND_MODULES = "kgraph.frontend.keras_backend."


def _operation_name() -> str:
    """The outermost Keras backend function on the stack, such as `matmul`, or ''."""
    frame: FrameType | None = sys._getframe(2)
    name = ""
    inside = False
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith(_BACKEND_MODULES):
            if not frame.f_code.co_name.startswith(("_", "<")):
                name = frame.f_code.co_name
            inside = True
        elif inside:
            break
        frame = frame.f_back
    return name


class GraphTracer(Tracer):
    """Records primitives into one graph.

    graph: what has been recorded so far.
    parent: the tracer of the enclosing trace, for the body of a control-flow primitive.
    captures: outer values used here, in the order of first use, with the inputs of `graph` that stand for them.
    variables: Keras variables read here (outermost tracer only), in the order of first use, with their parameters.
    recomputed: ranges of `graph.nodes` (start, stop) whose values gradients compute again rather than keep.
    """

    def __init__(self, name: str = "graph", parent: GraphTracer | None = None):
        self.graph = Graph(name=name)
        self.parent = parent
        self.captures: dict[int, tuple[TracedArray, TracedArray]] = {}
        self.variables: dict[int, tuple[Any, TracedArray]] = {}
        self.recomputed: list[tuple[int, int]] = []
        self._constants: dict[int, tuple[object, Value]] = {}
        self._provenance: dict[str, frozenset] = {}

    # -- operands -------------------------------------------------------------------------------------------------
    def add_input(self, type: TensorType, name: str = "") -> TracedArray:
        """A new input of the graph."""
        value = Value(type, name=name)
        self.graph.inputs.append(value)
        return TracedArray(self, value)

    def root(self) -> GraphTracer:
        """The outermost tracer."""
        return self if self.parent is None else self.parent.root()

    def variable(self, variable) -> TracedArray:
        """The parameter that stands for a Keras variable; made at first use, in the outermost graph."""
        root = self.root()
        known = root.variables.get(id(variable))
        if known is None:
            value = Value(TensorType(tuple(variable.shape), variable._dtype), name=variable.path)
            root.graph.params.append(value)
            known = root.variables[id(variable)] = (variable, TracedArray(root, value))
        return known[1]

    def constant(self, array) -> Value:
        """The value of a constant node for a concrete array; the same array object gives the same node."""
        array = underlying(array)
        known = self._constants.get(id(array))
        if known is not None:
            return known[1]
        concrete = np.asarray(array)
        if concrete.size > LARGEST_UNIFORM_CONSTANT and (fill := uniform_value(concrete)) is not None:
            attrs = {"shape": concrete.shape, "value": fill, "dtype": dtype_name(concrete.dtype)}
            node = self._append("full", (), attrs)
        else:
            concrete = np.array(concrete, order="C")
            concrete.setflags(write=False)
            node = self._append("constant", (), {"value": concrete})
        # Keeping the array alive keeps its id from being reused.
        self._constants[id(array)] = (array, node.outputs[0])
        return node.outputs[0]

    def lift(self, x) -> Value:
        """The value in this graph for an operand: a traced array of this or an enclosing trace, or a concrete array."""
        if not isinstance(x, TracedArray):
            return self.constant(x)
        if x.tracer is self:
            return x.value
        known = self.captures.get(id(x.value))
        if known is None:
            if self.parent is None:
                raise CaptureError(
                    f"a traced value ({x.value.type}, from {x._origin()}) is used outside of the trace that made it. "
                    "A layer or function has stored it (for example as an attribute) during one call and reads it in "
                    "another; return it or keep it in a Variable instead."
                )
            # The value may come from further out; each level on the way captures it.
            outer = TracedArray(self.parent, self.parent.lift(x))
            known = self.captures.get(id(outer.value))
            if known is None:
                known = self.captures[id(outer.value)] = (outer, self.add_input(outer.value.type, outer.value.name))
        return known[1].value

    # -- nodes ----------------------------------------------------------------------------------------------------
    def provenance(self) -> frozenset:
        """Where the running Python code is: `{"layer/path:function"}`; while gradient rules run, what they inherit."""
        inherited = inherited_provenance.get()
        if inherited is not None:
            return inherited
        text = f"{layer_path()}:{_operation_name()}"
        known = self._provenance.get(text)
        if known is None:
            known = self._provenance[text] = frozenset({text} if text != ":" else ())
        return known

    def _append(self, name: str, inputs: Sequence[Value], attrs: dict):
        node = make_node(PRIMITIVES[name], inputs, attrs, self.provenance())
        self.graph.nodes.append(node)
        return node

    def record(self, primitive, args: tuple, attrs: dict):
        """Append a node; called by `bind`. Recorded in the innermost running trace, whoever owns the operands."""
        active = current_tracer.get()
        if active is not None and active is not self:
            return active.record(primitive, args, attrs)
        if active is None:
            raise CaptureError(
                f"{primitive.name} is applied to a traced value after its trace has ended; a layer or function has "
                "stored the value during the trace. Return it or keep it in a Variable instead."
            )
        inputs = [self.lift(a) for a in args]
        node = make_node(primitive, inputs, attrs, self.provenance())
        self.graph.nodes.append(node)
        results = tuple(TracedArray(self, v) for v in node.outputs)
        return results[0] if primitive.results == 1 else results

    @contextlib.contextmanager
    def active(self):
        """Make this the tracer that records, for the duration of a `with`."""
        token = current_tracer.set(self)
        try:
            yield self
        finally:
            current_tracer.reset(token)


def is_tracing() -> bool:
    """Whether a trace is running in this thread."""
    return current_tracer.get() is not None


def running_trace() -> GraphTracer | None:
    """The innermost trace that runs in this thread."""
    return cast("GraphTracer | None", current_tracer.get())


# -- entry points -----------------------------------------------------------------------------------------------------
def trace(function: Callable, *types, name: str = "graph") -> Graph:
    """The graph of `function` applied to inputs of the given types.

    types: `TensorType`s (shapes may hold Dims) or concrete arrays, whose types are taken. The function gives one
        tensor or a flat tuple or list of them; concrete ones become constants. Values may be closed over.
    """
    tracer = GraphTracer(name)
    with tracer.active():
        inputs = [
            tracer.add_input(t if isinstance(t, TensorType) else type_of(t), f"x{i}") for i, t in enumerate(types)
        ]
        results = function(*inputs)
        if not isinstance(results, (tuple, list)):
            results = (results,)
        tracer.graph.outputs = [tracer.lift(_tensor(r)) for r in results]
    return tracer.graph


def _tensor(x):
    """A Keras variable's value; a Python scalar or a Dim as an array; tensors as they are."""
    if isinstance(x, (TracedArray, np.ndarray)):
        return x
    from kgraph.frontend.keras_backend.core import dense_tensor as convert_to_tensor

    return convert_to_tensor(x)
