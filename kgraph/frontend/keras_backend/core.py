"""Tensors, variables and shape inference: the core of the Keras backend.

Concrete tensors are NumPy arrays; tensors of a running trace are `TracedArray`s. Control flow is in `control_flow`,
slices and scatters in `updates`; both are gathered here under the names that Keras expects.

Places in Keras that ask for the backend's name, which is "numpy" here, and what follows from it:
- `layers/layer.py`, `models/model.py`, `export/saved_model.py`: import this package's mixins. Nothing else.
- `utils/traceback_utils.py`: wording of an error only.
- `utils/backend_utils.py` (DynamicBackend): uses the running backend. Data pipelines of TensorFlow stay out of reach.
- `trainers/trainer.py`: `jit_compile` is resolved for jax, torch and tensorflow only; `fit` is the backend trainer's.
- `optimizers/__init__` and `optimizers/optimizer.py`: the plain `BaseOptimizer` is used, whose `apply_gradients` works
  on this backend's functions.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
import weakref
from collections.abc import Callable
from sys import getrefcount
from typing import Any

import numpy as np
from keras.src import tree
from keras.src.backend.common import KerasVariable, dtypes, standardize_dtype
from keras.src.backend.common.dtypes import result_type
from keras.src.backend.common.keras_tensor import KerasTensor
from keras.src.backend.common.stateless_scope import StatelessScope, get_stateless_scope
from keras.src.backend.common.symbolic_scope import SymbolicScope
from keras.src.backend.common.variables import standardize_shape as _standardize_shape

from kgraph import ops
from kgraph.errors import DeviceError, DimDecisionError, InputError, UnsupportedError
from kgraph.frontend.eager_array import presented, underlying
from kgraph.frontend.keras_backend.sparse import SparseTensor
from kgraph.frontend.tracer import GraphTracer, TracedArray, running_trace
from kgraph.ir import Dim, TensorType, np_dtype, type_of
from kgraph.ir.primitive import current_tracer, present_results
from kgraph.ir.types import SHORT_NAMES, numpy_name

SUPPORTS_SPARSE_TENSORS = True
SUPPORTS_RAGGED_TENSORS = False
SUPPORTS_COMPLEX_DTYPES = True
# Keras asks in one place: whether callbacks may run in a thread beside the training. Logs are ready when a step returns
# here, so that handing them to a thread costs more (tens of microseconds a step) than calling back.
IS_THREAD_SAFE = False

present_results(presented)


class _DTypeNames(dict):
    """Keras' names of dtypes that are no strings themselves, with "string" for NumPy's types of text of any length."""

    def get(self, dtype, default=None):
        return "string" if isinstance(dtype, np.dtype) and dtype.kind in "US" else super().get(dtype, default)


# `standardize_dtype` looks names up here.
dtypes.PYTHON_DTYPES_MAP = _DTypeNames(dtypes.PYTHON_DTYPES_MAP)

# Counts every assignment to any variable of the process. A compiled model compares it with the count it last saw, and
# looks at its own variables' versions only when it differs. Read it as `core.weights_version`.
weights_version = 0
_version_lock = threading.Lock()
# Held while a value is put away, or made again.
_fetch_lock = threading.RLock()
# References to a variable's array as `getrefcount` counts them: the variable's own and its argument.
_HELD_BY_VARIABLE = 2


class Variable(KerasVariable):
    """A Keras variable whose value is a read-only NumPy array.

    `version` grows with each assignment. During a trace the value is a graph parameter, and assignments go to the
    scope of the trace as state updates.

    Steps on a GPU leave the value there: `resident` is an array on the device that has it, and `_value`, the array of
    the host, is copied from there when it is read and behind. `spare` is the resident that an assignment has replaced:
    its memory takes the next one.

    Where compiled models keep a weight in the order in which kernels read it, that is all that is kept (`put_away`):
    `_value` is made again when it is read, and stays from then on.
    """

    version = 0
    resident: Any = None
    spare: Any = None
    _host: np.ndarray | None = None
    _is_behind = False
    _restore: Callable[[], np.ndarray] | None = None
    _is_read = False

    @property
    def _value(self):
        host = self._host  # before the question, since another thread may put it away
        if self._is_behind:
            self._fetch()
            return self._host
        return host

    @_value.setter
    def _value(self, value):
        with _fetch_lock:
            self._hold(value)

    def _hold(self, value) -> None:
        """Have this array as the value; `_fetch_lock` is held."""
        if self.resident is not None:
            self.spare, self.resident = self.resident, None
        self._host = value
        if self._is_behind:
            self._is_behind, self._restore = False, None

    @property
    def has_value(self) -> bool:
        """Whether the variable is initialised."""
        return self._is_behind or self._host is not None

    def may_be_put_away(self) -> bool:
        """Whether nobody but the variable holds its value, and nobody has read one that was put away."""
        return not self._is_behind and not self._is_read and getrefcount(self._host) <= _HELD_BY_VARIABLE

    def put_away(self, value: weakref.ref[np.ndarray], restore: Callable[[], np.ndarray]) -> None:
        """Let go of this array, if it is the value still, which `restore` makes again."""
        with _fetch_lock:
            if not self._is_behind and self._host is value():
                # In this order, for those who read without the lock.
                self._restore, self._is_behind = restore, True
                self._host = None

    def __getstate__(self):
        return {**vars(self), "_host": self._value, "_is_behind": False, "_restore": None, "resident": None}

    def _fetch(self) -> None:
        """Bring the value to the host. If its device is lost, the last copy stays, after a warning."""
        with _fetch_lock:
            if self._restore is not None:
                value = self._restore()
                value.setflags(write=False)
                self._host, self._is_read = value, True
                self._is_behind, self._restore = False, None
        if not self._is_behind:
            return
        try:
            value = self.resident.numpy()
        except DeviceError as error:
            if not self.resident.device.is_lost:
                raise
            warnings.warn(
                f"{self.path}: the value on the GPU is gone, what was last read of it is used: {error}",
                RuntimeWarning,
                stacklevel=3,
            )
            self.resident = self.spare = None
        else:
            value.setflags(write=False)
            self._host = value
        self._is_behind = False

    def _initialize(self, value):
        self._direct_assign(value)

    def _initialize_with_initializer(self, initializer):
        value = underlying(self._convert_to_tensor(initializer(self._shape, dtype=self._dtype)))
        # What the initialiser has made for this variable, and nobody else can see or change, needs no copy.
        own = type(value) is np.ndarray and value.base is None and getrefcount(value) == 2
        if own and value.flags.carray and value.dtype == np_dtype(self._dtype):
            adopt_values([self], [value])
        else:
            self._initialize(value)

    def _direct_assign(self, value):
        global weights_version
        if isinstance(value, TracedArray):
            raise UnsupportedError(
                f"variable {self.path} is assigned a traced value outside of a StatelessScope; the trace that made it "
                "has to run in one (kgraph's captures do)"
            )
        value = np.array(value, dtype=np_dtype(self._dtype), order="C")
        value.setflags(write=False)
        self._value = value
        with _version_lock:
            self.version += 1
            weights_version += 1

    def _convert_to_tensor(self, value, dtype=None):
        return dense_tensor(value, dtype)

    @property
    def value(self):
        """The current value: of the stateless scope, of the running trace (a parameter), or the stored array."""
        scope = get_stateless_scope()
        if scope is not None:
            value = scope.get_current_value(self)
            if value is not None:
                return self._maybe_autocast(value)
        tracer = current_tracer.get()
        if tracer is not None:
            return self._maybe_autocast(tracer.variable(self))
        if self._value is None:
            # Not initialised yet: a placeholder, as in Keras.
            return self._maybe_autocast(self._initializer(self._shape, dtype=self._dtype))
        return self._maybe_autocast(self._value)

    def __array__(self, dtype=None, copy=None):
        # NumPy trusts an object that takes `copy` to have made the copy itself.
        return np.array(self.value, dtype=dtype, copy=copy)


def adopt_values(variables, arrays) -> None:
    """Make fresh arrays, of the right types and held by nobody else, the variables' values without copies."""
    global weights_version
    with _fetch_lock:
        for variable, array in zip(variables, arrays, strict=True):
            # Most arrays were updated in place: their variables hold them already.
            if variable._host is not array or variable.resident is not None or variable._is_behind:
                array.setflags(write=False)
                variable._hold(array)
    with _version_lock:
        for variable in variables:
            variable.version += 1
        weights_version += 1


def adopt_residents(variables, arrays) -> None:
    """Make arrays on a device, of the right types and held by nobody else, the variables' values without copies."""
    global weights_version
    for variable, array in zip(variables, arrays, strict=True):
        with _fetch_lock:
            variable.resident, variable._is_behind, variable._restore = array, True, None
    with _version_lock:
        for variable in variables:
            variable.version += 1
        weights_version += 1


def convert_to_tensor(x, dtype=None, sparse=None, ragged=None):
    """A tensor for anything that Keras takes for one: what `dense_tensor` takes, and sparse matrices of SciPy.

    sparse: sparse tensors become dense ones for False, and stay sparse otherwise. Nothing becomes sparse.
    """
    if ragged:
        raise ValueError("`ragged=True` is not supported with the kgraph backend")
    if sparse is not False and not isinstance(x, (TracedArray, np.ndarray)):
        x = as_sparse(x)
        if type(x) is SparseTensor:
            return x if dtype is None else cast(x, dtype)
    return presented(dense_tensor(x, dtype))


def dense_tensor(x, dtype=None):
    """A dense tensor for anything that Keras takes for one: arrays, scalars, nested lists, variables, symbolic sizes.

    The functions of the backend convert their arguments by it, under the name `convert_to_tensor`: a sparse tensor that
    comes to one without a rule for it (`sparse_rules`) is dense there.
    """
    if dtype is not None:
        dtype = standardize_dtype(dtype)
    if isinstance(x, Variable):
        x = x.value
    if isinstance(x, TracedArray):
        return x if dtype is None or x.value.dtype == dtype else ops.convert(x, dtype=dtype)
    if isinstance(x, np.ndarray):
        return x if dtype is None or numpy_name(x.dtype) == dtype else _convert_concrete(x, dtype)
    if isinstance(x, np.generic):
        return np.asarray(x, dtype=None if dtype is None else np_dtype(dtype))
    if isinstance(x, Dim):
        return ops.dim_value(dim=x, dtype=dtype or "int32")
    if isinstance(x, KerasTensor):
        raise ValueError(f"A KerasTensor is symbolic and cannot become a tensor. Received: {x}")
    x = as_sparse(x)
    if type(x) is SparseTensor:
        return dense_tensor(x.to_dense(), dtype)
    if isinstance(x, (list, tuple)) and any(_needs_stacking(leaf) for leaf in tree.flatten(x)):
        return _stack_nested(x, dtype)
    if dtype is None:
        dtype = result_type(*[getattr(leaf, "dtype", type(leaf)) for leaf in tree.flatten(x)])
    if dtype in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        # NumPy cannot parse lists into the types of ml_dtypes.
        return np.asarray(x).astype(np_dtype(dtype))
    if dtype == "string":
        return np.asarray(x)
    return np.array(x, dtype=dtype)


def _convert_concrete(x: np.ndarray, dtype: str) -> np.ndarray:
    if x.dtype.kind == "c" and not dtype.startswith("complex"):
        x = x.real if dtype != "bool" else x
    with np.errstate(invalid="ignore", over="ignore"):
        return x.astype("U" if dtype == "string" else np_dtype(dtype))


def as_sparse(x):
    """A sparse tensor for a sparse matrix of SciPy; anything else as it is."""
    return SparseTensor.from_scipy(x) if is_scipy_sparse(x) else x


def is_scipy_sparse(x) -> bool:
    """Whether x is a sparse matrix or array of SciPy, which is not imported for the question."""
    return type(x).__module__.startswith("scipy.sparse") and hasattr(x, "tocoo")


def is_sparse(x) -> bool:
    """Whether x is a sparse tensor, or a sparse matrix of SciPy."""
    return type(x) is SparseTensor or is_scipy_sparse(x)


def _needs_stacking(leaf) -> bool:
    return isinstance(leaf, (TracedArray, Dim)) or (isinstance(leaf, Variable) and current_tracer.get() is not None)


def _stack_nested(x, dtype):
    """Nested lists with traced values or symbolic sizes among the leaves."""
    if not isinstance(x, (list, tuple)):
        return dense_tensor(x, dtype)
    parts = [_stack_nested(item, dtype) for item in x]
    common = dtype or result_type(*[p.dtype for p in parts])
    parts = [dense_tensor(p, common) for p in parts]
    return ops.concatenate(*[ops.reshape(p, shape=(1, *p.shape)) for p in parts], axis=0)


def convert_to_numpy(x):
    """A NumPy array that the caller may change."""
    if isinstance(x, Variable):
        x = x.value
    return np.array(x if type(x) is not SparseTensor else x.to_dense())


def is_tensor(x):
    """Whether x is a value of this backend."""
    return isinstance(x, (np.ndarray, np.generic, TracedArray, SparseTensor))


def shape(x):
    """The shape as a tuple of ints, with Dims for the symbolic sizes of a trace."""
    return tuple(x.shape)


def cast(x, dtype):
    if type(x) is SparseTensor:
        x = x.coalesced()
        return SparseTensor._of(x.indices, dense_tensor(x.values, dtype), x.shape, unique=True)
    return dense_tensor(x, dtype)


def standardize_shape(shape):
    """Keras' `standardize_shape`, with None in place of a symbolic size."""
    if isinstance(shape, (list, tuple)) and any(isinstance(d, Dim) for d in shape):
        shape = tuple(None if isinstance(d, Dim) else d for d in shape)
    return _standardize_shape(shape)


class TraceScope(StatelessScope):
    """The stateless scope of a trace: remembers which variables were assigned, in order."""

    def __init__(self, initialize_variables: bool = False):
        super().__init__(collect_losses=True, initialize_variables=initialize_variables)
        self.variables_by_id: dict[int, Variable] = {}

    def add_update(self, update):
        variable, _ = update
        self.variables_by_id[id(variable)] = variable
        super().add_update(update)

    def get_current_value(self, variable):
        """The assigned value, or else the parameter of the running trace, which Keras asks for in regularizers."""
        value = super().get_current_value(variable)
        tracer = current_tracer.get()
        return tracer.variable(variable) if value is None and tracer is not None else value

    @contextlib.contextmanager
    def lending(self, values: list):
        """For the duration of a `with`, let variables have other values: `[(variable, value)]`.

        What is assigned to them meanwhile stays assigned.
        """
        before = [self.state_mapping.get(id(variable)) for variable, _ in values]
        for update in values:
            self.add_update(update)
        yield
        for (variable, value), previous in zip(values, before):
            if self.state_mapping[id(variable)] is not value:
                continue
            if previous is None:
                del self.state_mapping[id(variable)], self.variables_by_id[id(variable)]
            else:
                self.state_mapping[id(variable)] = previous


# -- shape inference ---------------------------------------------------------------------------------------------------
# All unknown sizes get one symbol, as in Keras' JAX backend: code that takes two of them for equal (square images)
# works, and the result is unknown wherever the symbol remains.
_UNKNOWN = Dim.symbol("unknown")
# Where a size decides what the code does, the shapes for two concrete fillers are compared instead.
_FILLERS = (83, 89)


def compute_output_spec(fn, *args, **kwargs):
    """The KerasTensors (in the structure that `fn` gives) for KerasTensors among the arguments. Computes no values."""
    try:
        return _output_spec(fn, args, kwargs, _UNKNOWN)
    except (DimDecisionError, ValueError) as error:
        if not _has_unknown_size((args, kwargs)) or not _is_dim_decision(error):
            raise
    first, second = (_output_spec(fn, args, kwargs, filler) for filler in _FILLERS)

    def merge(a, b):
        if not isinstance(a, KerasTensor):
            return a
        sizes = tuple(m if m == n else None for m, n in zip(a.shape, b.shape))
        return KerasTensor(sizes, a.dtype, sparse=a.sparse)

    return tree.map_structure(merge, first, second)


def _is_dim_decision(error: BaseException | None) -> bool:
    """Whether an undecidable size is behind an error that Keras may have wrapped."""
    while error is not None:
        if isinstance(error, DimDecisionError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _has_unknown_size(structure) -> bool:
    return any(isinstance(x, KerasTensor) and None in x.shape for x in tree.flatten(structure))


def _output_spec(fn, args, kwargs, unknown):
    tracer = GraphTracer("spec", parent=current_tracer.get())

    def enter(x):
        if isinstance(x, KerasTensor):
            if x.dtype == "string":
                raise InputError("Invalid dtype: string. Text is no tensor: turn it into numbers ahead of the model.")
            sizes = tuple(unknown if d is None else d for d in x.shape)
            if x.sparse:
                return _sparse_input(tracer, sizes, x.dtype)
            return tracer.add_input(TensorType(sizes, x.dtype))
        if type(x) is SparseTensor and not x.is_traced:
            return _sparse_input(tracer, x.shape, x.dtype.name)
        # Concrete tensors lose their values too, as in JAX: shapes must not depend on them.
        return tracer.add_input(type_of(x)) if isinstance(x, np.ndarray) and x.dtype.name in SHORT_NAMES else x

    def leave(x):
        if type(x) is SparseTensor:
            return KerasTensor(standardize_shape(x.shape), standardize_dtype(x.dtype), sparse=True)
        if isinstance(x, (np.ndarray, np.generic, TracedArray)):
            return KerasTensor(standardize_shape(tuple(x.shape)), standardize_dtype(x.dtype))
        if isinstance(x, Dim):
            return None
        return x

    with TraceScope(initialize_variables=True), SymbolicScope(), tracer.active():
        args, kwargs = tree.map_structure(enter, (args, kwargs))
        return tree.map_structure(leave, fn(*args, **kwargs))


def _sparse_input(tracer: GraphTracer, shape: tuple, dtype: str) -> SparseTensor:
    """A sparse tensor of one entry: no shape depends on how many there are."""
    indices = tracer.add_input(TensorType((1, len(shape)), "int64"))
    return SparseTensor(indices, tracer.add_input(TensorType((1,), dtype)), shape)


# -- the rest ----------------------------------------------------------------------------------------------------------
def stop_gradient(variable):
    return ops.stop_gradient(dense_tensor(variable))


def random_seed_dtype():
    return "uint32"


@contextlib.contextmanager
def device_scope(device_name):
    """A scope without effect: eager values live on the host; the target of compiled code is `kgraph.compile`'s."""
    yield


def remat(f):
    """A function like `f` whose inner values a gradient computes again instead of keeping them (`keras.remat`).

    Random numbers and other state are those of the first time. Without a gradient it is `f`.
    """

    @functools.wraps(f, updated=())
    def rematerialised(*args, **kwargs):
        tracer = running_trace()
        start = 0 if tracer is None else len(tracer.graph.nodes)
        result = f(*args, **kwargs)
        if tracer is not None:
            tracer.recomputed.append((start, len(tracer.graph.nodes)))
        return result

    return rematerialised


class custom_gradient:
    """A function that gives `(output, gradient function)`: the latter maps the output's cotangents to the arguments'.

    Under a trace the gradient function is traced too, and kept in the graph beside the output.
    """

    def __init__(self, f):
        self.f = f

    def __call__(self, *args, **kwargs):
        args, kwargs = tree.map_structure(lambda x: x.value if isinstance(x, Variable) else x, (args, kwargs))
        output, gradient = self.f(*args, **kwargs)
        tracer = running_trace()
        inputs = [x for x in tree.flatten(args) if isinstance(x, TracedArray)]
        if tracer is None or not inputs:
            return output
        results = [dense_tensor(leaf) for leaf in tree.flatten(output)]
        rule = GraphTracer("custom_gradient", parent=tracer)
        with rule.active():
            cotangents = [rule.add_input(TensorType(tuple(r.shape), r.dtype.name)) for r in results]
            found = gradient(*cotangents)
            found = tree.flatten(found if isinstance(found, tuple) and len(args) > 1 else (found,))
            by_argument = zip(tree.flatten(args), found, strict=True)
            rule.graph.outputs = [
                rule.lift(ops.full(shape=x.shape, value=0, dtype=x.dtype.name) if c is None else dense_tensor(c))
                for x, c in by_argument
                if isinstance(x, TracedArray)
            ]
        captured = [outer for outer, _ in rule.captures.values()]
        attrs = {"backward": rule.graph, "num_results": len(results), "num_inputs": len(inputs)}
        return tree.pack_sequence_as(output, list(ops.custom_gradient(*results, *inputs, *captured, **attrs)))


# Gathered last: these modules import the names above.
from kgraph.frontend.keras_backend.control_flow import (  # noqa: E402, F401
    associative_scan,
    cond,
    fori_loop,
    map,
    scan,
    switch,
    vectorized_map,
    while_loop,
)
from kgraph.frontend.keras_backend.updates import (  # noqa: E402, F401
    scatter,
    scatter_update,
    slice,
    slice_update,
    unstack,
)
