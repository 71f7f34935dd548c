"""Tracing: `TracedArray` stands for a tensor while Python code runs, and what is applied to it is recorded.

A `GraphTracer` builds one `Graph`. Traces nest: the body of a loop or a branch is traced by a child tracer, and outer
values that it uses become operands of the control-flow node (`captures`). Keras variables read during a trace become
parameters of the outermost graph. Concrete arrays become constants, once per array object.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from kgraph.errors import CaptureError
from kgraph.ir import Dim, Graph, TensorType, Traced, Tracer, Value, dtype_name, make_node, np_dtype, type_of
from kgraph.ir.primitive import PRIMITIVES, current_tracer

_BACKEND_MODULES = "kgraph.frontend.keras_backend."
# A uniform constant above this many elements is recorded as `full`, so that it takes no memory in the graph.
_LARGEST_UNIFORM_CONSTANT = 16


def _layer_path() -> str:
    """The path of the Keras layer whose call is running, or ''."""
    scopes = sys.modules.get("keras.src.backend.common.name_scope")
    return scopes.current_path() if scopes is not None else ""


def _operation_name() -> str:
    """The outermost Keras backend function on the stack, such as `matmul`, or ''."""
    frame = sys._getframe(2)
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
    """

    def __init__(self, name: str = "graph", parent: GraphTracer | None = None):
        self.graph = Graph(name=name)
        self.parent = parent
        self.captures: dict[int, tuple[TracedArray, TracedArray]] = {}
        self.variables: dict[int, tuple[object, TracedArray]] = {}
        self._constants: dict[tuple, tuple[object, Value]] = {}
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
        known = self._constants.get(id(array))
        if known is not None:
            return known[1]
        concrete = np.asarray(array)
        dtype = dtype_name(concrete.dtype)
        if concrete.size > _LARGEST_UNIFORM_CONSTANT and (fill := _uniform_value(concrete)) is not None:
            node = self._append("full", (), {"shape": concrete.shape, "value": fill, "dtype": dtype})
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
        """Where the running Python code is: `{"layer/path:function"}`."""
        text = f"{_layer_path()}:{_operation_name()}"
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


def _uniform_value(array: np.ndarray):
    """The Python scalar that all elements equal bit for bit, or None."""
    if array.dtype.kind not in "biuf":
        return None
    first = array.reshape(-1)[:1]
    # Compared as bytes: 0.0 and -0.0 differ, and equal NaNs count as equal.
    if array.size > 1 and all(s == 0 for s, n in zip(array.strides, array.shape) if n > 1):
        return first[0].item()
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8).reshape(array.size, array.itemsize)
    probe = first.view(np.uint8)
    if not (flat[-1] == probe).all() or not (flat[array.size // 2] == probe).all() or not (flat == probe).all():
        return None
    return first[0].item()


def is_tracing() -> bool:
    """Whether a trace is running in this thread."""
    return current_tracer.get() is not None


class TracedArray(Traced):
    """A tensor of a running trace, with the attributes and operators of a NumPy array.

    `shape` is a tuple of `int | Dim`. Operators follow Keras' dtype promotion (they are Keras' backend functions).
    What needs a concrete value (`bool`, `int`, `float`, conversion to NumPy) raises CaptureError naming the layer.
    """

    # Keras attaches masks to tensors as attributes.
    __slots__ = ("__dict__", "__weakref__", "tracer", "value")
    # NumPy arrays and scalars on the left leave binary operators to us.
    __array_ufunc__ = None
    __array_priority__ = 1000

    def __init__(self, tracer: GraphTracer, value: Value):
        self.tracer = tracer
        self.value = value

    # -- description ----------------------------------------------------------------------------------------------
    @property
    def shape(self) -> tuple:
        return self.value.type.shape

    @property
    def dtype(self) -> np.dtype:
        return np_dtype(self.value.type.dtype)

    @property
    def ndim(self) -> int:
        return len(self.value.type.shape)

    @property
    def size(self):
        return self.value.type.size

    @property
    def nbytes(self):
        return self.value.type.nbytes

    @property
    def itemsize(self) -> int:
        return self.value.type.itemsize

    def __repr__(self):
        return f"<TracedArray {self.value.type}>"

    def __hash__(self):
        return id(self)

    def _origin(self) -> str:
        node = self.value.node
        if node is None:
            return f"input {self.value.name!r}" if self.value.name else "an input"
        return ", ".join(sorted(node.provenance)) or node.name

    # -- what needs a value ---------------------------------------------------------------------------------------
    def _refuse(self, what: str, instead: str):
        where = _layer_path()
        raise CaptureError(
            f"{what} needs the value of a tensor ({self.value.type}, from {self._origin()}), which is not known while "
            f"{f'layer {where!r}' if where else 'a function'} is being captured. {instead}"
        )

    def __bool__(self):
        self._refuse("a Python condition (`if`, `while`, `and`, `bool()`)", "Use keras.ops.where or keras.ops.cond.")

    def __int__(self):
        self._refuse("int()", "Use keras.ops.cast(x, 'int32') and keep the value a tensor.")

    def __index__(self):
        self._refuse("use as an index or a size", "Use keras.ops.take, slice or slice_update.")

    def __float__(self):
        self._refuse("float()", "Use keras.ops.cast(x, 'float32') and keep the value a tensor.")

    def __complex__(self):
        self._refuse("complex()", "Keep the value a tensor.")

    def __array__(self, dtype=None, copy=None):
        self._refuse("conversion to a NumPy array", "Use functions of keras.ops in place of numpy's.")

    def numpy(self):
        return self.__array__()

    def item(self, *args):
        self._refuse("item()", "Keep the value a tensor.")

    def tolist(self):
        self._refuse("tolist()", "Keep the value a tensor.")

    def __contains__(self, x):
        self._refuse("`in`", "Use keras.ops.any(x == y).")

    def __len__(self):
        if not self.shape:
            raise TypeError("len() of a tensor of rank 0")
        size = self.shape[0]
        if isinstance(size, Dim):
            self._refuse("len()", "Use x.shape[0], which may be symbolic.")
        return size

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __copy__(self):
        return self

    def __deepcopy__(self, memo):
        return self

    # -- methods of arrays ----------------------------------------------------------------------------------------
    def __getitem__(self, key):
        from kgraph.frontend.indexing import get_item

        return get_item(self, key)

    def __setitem__(self, key, value):
        raise CaptureError(
            f"item assignment on a tensor ({self.value.type}, from {self._origin()}): tensors do not change. "
            "Use keras.ops.slice_update or keras.ops.scatter_update."
        )

    def astype(self, dtype, *args, **kwargs):
        return PRIMITIVES["convert"](self, dtype=_dtype_of(dtype)) if _dtype_of(dtype) != self.value.dtype else self

    def copy(self, *args):
        return self

    def reshape(self, *shape):
        return _functions().reshape(self, shape[0] if len(shape) == 1 and not _is_size(shape[0]) else shape)

    def transpose(self, *axes):
        if len(axes) == 1 and (axes[0] is None or isinstance(axes[0], (tuple, list))):
            axes = axes[0]
        return _functions().transpose(self, axes=axes or None)

    def flatten(self, *args):
        return self.reshape(-1)

    ravel = flatten

    @property
    def T(self):
        return _functions().transpose(self)

    @property
    def real(self):
        return _functions().real(self)

    @property
    def imag(self):
        return _functions().imag(self)


def _is_size(x) -> bool:
    return isinstance(x, (int, np.integer, Dim))


def _dtype_of(dtype) -> str:
    """The name of a dtype given in any of Keras' or NumPy's ways."""
    if isinstance(dtype, str) or isinstance(dtype, np.dtype):
        return dtype_name(dtype)
    standardize = sys.modules.get("keras.src.backend.common.variables")
    return standardize.standardize_dtype(dtype) if standardize is not None else dtype_name(dtype)


def _functions():
    """Keras' backend functions in their kgraph implementation."""
    from kgraph.frontend.keras_backend import numpy

    return numpy


def _method(function: str):
    def method(self, *args, **kwargs):
        return getattr(_functions(), function)(self, *args, **kwargs)

    method.__name__ = function
    return method


def _operator(function: str, swapped: bool = False):
    def operator(self, other):
        if not _is_operand(other):
            return NotImplemented
        pair = (other, self) if swapped else (self, other)
        return getattr(_functions(), function)(*pair)

    operator.__name__ = function
    return operator


def _is_operand(x) -> bool:
    if isinstance(x, (TracedArray, np.ndarray, np.generic, int, float, complex, Dim, list, tuple)):
        return True
    # Keras variables answer for themselves on the left; on the right they are operands. KerasTensors never are.
    return hasattr(x, "value") and hasattr(x, "assign")


_METHODS = ("sum mean max min prod any all argmax argmin cumsum cumprod std var squeeze swapaxes repeat take clip "
            "conj round sort argsort dot diagonal trace").split()  # fmt: skip
for _name in _METHODS:
    setattr(TracedArray, _name, _method({"conj": "conjugate"}.get(_name, _name)))
_OPERATORS = {
    "add": "add",
    "sub": "subtract",
    "mul": "multiply",
    "truediv": "true_divide",
    "floordiv": "floor_divide",
    "mod": "mod",
    "pow": "power",
    "matmul": "matmul",
    "and": "bitwise_and",
    "or": "bitwise_or",
    "xor": "bitwise_xor",
    "lshift": "left_shift",
    "rshift": "right_shift",
}
for _name, _function in _OPERATORS.items():
    setattr(TracedArray, f"__{_name}__", _operator(_function))
    setattr(TracedArray, f"__r{_name}__", _operator(_function, swapped=True))
_COMPARISONS = {
    "eq": "equal",
    "ne": "not_equal",
    "lt": "less",
    "le": "less_equal",
    "gt": "greater",
    "ge": "greater_equal",
}
for _name, _function in _COMPARISONS.items():
    setattr(TracedArray, f"__{_name}__", _operator(_function))
for _name, _function in {"neg": "negative", "pos": "copy", "abs": "absolute", "invert": "bitwise_not"}.items():
    setattr(TracedArray, f"__{_name}__", _method(_function))


# -- entry points -----------------------------------------------------------------------------------------------------
def trace(function: Callable, *types, name: str = "graph") -> Graph:
    """The graph of `function` applied to inputs of the given types.

    types: `TensorType`s (shapes may hold Dims) or concrete arrays, whose types are taken. The function gives one
        tensor or a flat tuple or list of them; concrete ones become constants. Values may be closed over.
    """
    tracer = GraphTracer(name)
    with tracer.active():
        inputs = [tracer.add_input(t if isinstance(t, TensorType) else type_of(t), f"x{i}") for i, t in enumerate(types)]
        results = function(*inputs)
        if not isinstance(results, (tuple, list)):
            results = (results,)
        tracer.graph.outputs = [tracer.lift(_tensor(r)) for r in results]
    return tracer.graph


def trace_body(function: Callable, types: Iterable[TensorType], name: str) -> tuple[Graph, list[TracedArray], object]:
    """The graph of a loop body or branch, traced inside the running trace.

    function: takes one traced array per type and gives any nesting of tensors in tuples, lists and dicts.

    Gives the graph, whose inputs are those of `types` and then one per captured outer value; these outer values, to be
    appended to the operands of the control-flow node; and the structure that the function gave, with the traced
    results in it.
    """
    tracer = GraphTracer(name, parent=current_tracer.get())
    with tracer.active():
        inputs = [tracer.add_input(t) for t in types]
        structure = function(*inputs)
        tracer.graph.outputs = [tracer.lift(_tensor(r)) for r in flatten(structure)]
    return tracer.graph, [outer for outer, _ in tracer.captures.values()], structure


def flatten(structure) -> list:
    """The leaves of a nesting of tuples, lists and dicts, in Keras' order; None is no leaf."""
    if structure is None:
        return []
    if isinstance(structure, dict):
        return [leaf for key in sorted(structure) for leaf in flatten(structure[key])]
    if isinstance(structure, (tuple, list)):
        return [leaf for item in structure for leaf in flatten(item)]
    return [structure]


def _tensor(x):
    """A Keras variable's value; a Python scalar or a Dim as an array; tensors as they are."""
    if isinstance(x, (TracedArray, np.ndarray)):
        return x
    from kgraph.frontend.keras_backend.core import convert_to_tensor

    return convert_to_tensor(x)
