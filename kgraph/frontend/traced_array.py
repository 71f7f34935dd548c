"""`TracedArray`: what stands for a tensor in a running trace, and behaves like a NumPy array without values."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import numpy as np

from kgraph.errors import CaptureError
from kgraph.ir import Dim, Traced, Value, dtype_name, np_dtype
from kgraph.ir.primitive import PRIMITIVES

if TYPE_CHECKING:
    from kgraph.frontend.tracer import GraphTracer


def layer_path() -> str:
    """The path of the Keras layer whose call is running, or ''."""
    scopes = sys.modules.get("keras.src.backend.common.name_scope")
    return scopes.current_path() if scopes is not None else ""


class TracedArray(Traced):
    """A tensor of a running trace, with the attributes and operators of a NumPy array.

    `shape` is a tuple of `int | Dim`. Operators follow Keras' dtype promotion (they are Keras' backend functions).
    What needs a concrete value (`bool`, `int`, `float`, conversion to NumPy) raises CaptureError naming the layer.
    """

    # Keras attaches masks to tensors as attributes.
    __slots__ = ("__dict__", "__weakref__", "tracer", "value")
    __array_priority__ = 1000
    # Keras' shape inference asks both of KerasTensors, and where it decides by size what to rematerialise, of tensors.
    sparse = False
    ragged = False

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
        where = layer_path()
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

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        """A NumPy array or scalar on the left of an operator comes here by way of the operator's ufunc."""
        function = UFUNC_OPERATORS.get(ufunc.__name__)
        if len(kwargs.get("out", ())) == 1 and kwargs["out"][0] is inputs[0]:
            kwargs = {}  # `array += tensor` gives the name on the left a new value
        if function is None or method != "__call__" or kwargs:
            self._refuse(f"numpy.{ufunc.__name__}", f"Use the function of that kind in keras.ops ({ufunc.__name__}).")
        return getattr(functions(), function)(*inputs)

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
        return functions().reshape(self, shape[0] if len(shape) == 1 and not _is_size(shape[0]) else shape)

    def transpose(self, *axes):
        if len(axes) == 1 and (axes[0] is None or isinstance(axes[0], (tuple, list))):
            axes = axes[0]
        return functions().transpose(self, axes=axes or None)

    def flatten(self, *args):
        return self.reshape(-1)

    ravel = flatten

    @property
    def T(self):
        return functions().transpose(self)

    @property
    def real(self):
        return functions().real(self)

    @property
    def imag(self):
        return functions().imag(self)


def _is_size(x) -> bool:
    return isinstance(x, (int, np.integer, Dim))


def _dtype_of(dtype) -> str:
    """The name of a dtype given in any of Keras' or NumPy's ways."""
    if isinstance(dtype, (str, np.dtype)):
        return dtype_name(dtype)
    standardize = sys.modules.get("keras.src.backend.common.variables")
    return standardize.standardize_dtype(dtype) if standardize is not None else dtype_name(dtype)


def functions():
    """Keras' backend functions in their kgraph implementation."""
    from kgraph.frontend.keras_backend import numpy

    return numpy


def _method(function: str):
    def method(self, *args, **kwargs):
        return getattr(functions(), function)(self, *args, **kwargs)

    method.__name__ = function
    return method


def _operator(function: str, swapped: bool = False):
    def operator(self, other):
        if not _is_operand(other):
            return NotImplemented
        pair = (other, self) if swapped else (self, other)
        return getattr(functions(), function)(*pair)

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
# NumPy's name of an operator -> Keras' name.
UFUNC_OPERATORS: dict[str, str] = {"divide": "true_divide", "remainder": "mod"}
_COMPARISONS = {
    "eq": "equal",
    "ne": "not_equal",
    "lt": "less",
    "le": "less_equal",
    "gt": "greater",
    "ge": "greater_equal",
}
UFUNC_OPERATORS.update((name, name) for name in (*_OPERATORS.values(), *_COMPARISONS.values()))
for _name, _function in _COMPARISONS.items():
    setattr(TracedArray, f"__{_name}__", _operator(_function))
for _name, _function in {"neg": "negative", "pos": "copy", "abs": "absolute", "invert": "bitwise_not"}.items():
    setattr(TracedArray, f"__{_name}__", _method(_function))
