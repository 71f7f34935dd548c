"""What `kgraph.compile` and `kgraph.jit` give back: a model as one native call, with its weights kept current."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterable

import numpy as np

from kgraph.compiler import CompiledGraph, compile_graph
from kgraph.config import Options
from kgraph.errors import InputError
from kgraph.frontend.capture import Captured, SpecialisationError, capture_function
from kgraph.frontend.keras_backend import core
from kgraph.frontend.tracer import is_tracing
from kgraph.ir import TensorType
from kgraph.progress import CompileProgress
from kgraph.report import Explanation, Profile, explain, profile_of


class _Variant:
    """One compiled form: for all sizes, or specialised on some; with the versions of the weights it last saw."""

    def __init__(self, captured: Captured, compiled: CompiledGraph, frozen: bool):
        self.captured, self.compiled, self.frozen = captured, compiled, frozen
        self.program = compiled.program
        self.global_version = -1
        self.versions: list[int] = []
        self.lock = threading.Lock()
        self.num_outputs = captured.num_outputs
        self.updates = captured.updates

    def refresh_weights(self) -> None:
        """Prepare and hand over the weights that have changed since the last call."""
        with self.lock:
            seen = core.weights_version
            if self.versions and self.frozen:
                self.global_version = seen
                return
            variables = self.captured.variables
            versions = [v.version for v in variables]
            if self.versions:
                changed = [i for i, (a, b) in enumerate(zip(versions, self.versions)) if a != b]
            else:
                changed = None
            if changed is None or changed:
                self.compiled.set_params([v._value for v in variables], changed)
            self.versions = versions
            self.global_version = seen


class CompiledModel:
    """A Keras model (or a function) compiled to native kernels.

    Call it with NumPy arrays in the structure that the model takes (one array, list, tuple or dict); it gives NumPy
    arrays in the model's output structure. Any batch size runs without a new compile. Weights are read from the
    model at each call, so that `set_weights` and training show at once (unless compiled with `freeze=True`).
    Safe to call from many threads and after a fork.
    """

    def __init__(self, capture: Callable[[dict], Captured], options: Options, name: str):
        self._capture = capture
        self._options = options
        self.name = name
        self._lock = threading.RLock()
        self._variants: dict[tuple, _Variant] = {}
        # Symbols whose value the model's own code needs; a compiled form is made for each set of their values.
        self._fixed: tuple[str, ...] = ()
        self._specialised_because: str | None = None
        self._compiles = 0
        self._compile_seconds = 0.0
        try:
            self._variants[()] = variant = self._compile({})
            self._inputs = variant.captured.inputs
        except SpecialisationError as error:
            if error.inputs is None or not error.symbols:
                raise
            self._specialise(error)
        self._prepare_fast_path()

    # -- compiling --------------------------------------------------------------------------------------------
    def _compile(self, sizes: dict[str, int]) -> _Variant:
        start = time.perf_counter()
        captured = self._capture(sizes)
        with CompileProgress(self.name, self._options.progress) as progress:
            compiled = compile_graph(captured.graph, progress)
        variant = _Variant(captured, compiled, self._options.freeze)
        variant.refresh_weights()
        self._compiles += 1
        self._compile_seconds += time.perf_counter() - start
        return variant

    def _specialise(self, error: SpecialisationError) -> None:
        """From now on compile for each value of the sizes that the model's code asked for."""
        self._fixed = tuple(sorted({*self._fixed, *error.symbols}))
        if error.inputs is not None and self._specialised_because is None:
            self._inputs = error.inputs
        self._specialised_because = str(error)
        self._variants.clear()

    def _variant_for(self, arrays: list[np.ndarray]) -> _Variant:
        if not self._fixed:
            return self._variants[()]
        with self._lock:
            while True:
                sizes = _sizes_of([a.shape for a in arrays], self._inputs.types)
                fixed = {name: sizes[name] for name in self._fixed}
                key = tuple(fixed.values())
                variant = self._variants.get(key)
                if variant is not None:
                    return variant
                try:
                    variant = self._variants[key] = self._compile(fixed)
                except SpecialisationError as error:
                    if not error.symbols - set(self._fixed):
                        raise
                    self._specialise(error)

    # -- calling ----------------------------------------------------------------------------------------------
    def _prepare_fast_path(self) -> None:
        self._fast = None
        if self._fixed or self._variants[()].updates:
            return
        variant = self._variants[()]
        inputs, outputs = variant.captured.inputs, variant.captured.outputs
        if len(inputs.types) == 1 and inputs.is_leaf and len(outputs.types) == 1 and outputs.is_leaf:
            self._fast = (variant, variant.program, inputs.types[0].np_dtype)

    def __call__(self, *args, out=None, **kwargs):
        """Run the model.

        Args are the model's inputs; NumPy arrays, or what `numpy.asarray` takes. `out`: arrays (in the output's
        structure) to write the results into. Raises InputError naming the input that does not fit.
        """
        fast = self._fast
        if fast is not None and out is None and len(args) == 1 and not kwargs:
            x = args[0]
            variant, program, dtype = fast
            if type(x) is np.ndarray and x.dtype is dtype:
                if variant.global_version != core.weights_version:
                    variant.refresh_weights()
                return program((x,))[0]
        return self._call(args, kwargs, out)

    def _call(self, args: tuple, kwargs: dict, out):
        variant, arrays = self._bind(args, kwargs)
        structure = variant.captured.outputs
        flat_out = None if out is None else [*structure.flatten(out), *([None] * len(variant.updates))]
        results = variant.program(arrays, out=flat_out)
        for variable, value in zip(variant.updates, results[variant.num_outputs :]):
            variable.assign(value)
        return structure.pack(list(results[: variant.num_outputs]))

    def _bind(self, args: tuple, kwargs: dict) -> tuple[_Variant, list[np.ndarray]]:
        """Flatten, convert and check the inputs of a call; gives the compiled form that serves them."""
        leaves = self._inputs.flatten_call(args, kwargs)
        names, types = self._inputs.names, self._inputs.types
        arrays = [_as_input(leaf, name, type_) for leaf, name, type_ in zip(leaves, names, types, strict=True)]
        variant = self._variant_for(arrays)
        if variant.global_version != core.weights_version:
            variant.refresh_weights()
        return variant, arrays

    def predict(self, x, batch_size: int = 32, verbose: int = 0):
        """Outputs for all rows of `x`, computed batch by batch (the last one may be smaller).

        x: arrays in the model's input structure with the same first axis. Gives arrays in the output structure.
        """
        if batch_size < 1:
            raise InputError(f"{self.name}: batch_size must be at least 1, got {batch_size}")
        variant, arrays = self._bind((x,), {})
        rows = arrays[0].shape[0] if arrays and arrays[0].ndim else 0
        if any(a.ndim == 0 or a.shape[0] != rows for a in arrays):
            shapes = ", ".join(str(a.shape) for a in arrays)
            raise InputError(f"{self.name}: all inputs of predict need the same number of rows, got shapes {shapes}")
        if rows <= batch_size:
            return self(x)
        signature = variant.captured
        parts: list[list[np.ndarray]] = []
        for start in range(0, rows, batch_size):
            batch = [a[start : start + batch_size] for a in arrays]
            parts.append(signature.outputs.flatten(self(signature.inputs.pack(batch))))
        return signature.outputs.pack([np.concatenate(p) for p in zip(*parts)])

    # -- looking inside ---------------------------------------------------------------------------------------
    def _some_variant(self) -> _Variant:
        if self._variants:
            return next(reversed(self._variants.values()))
        raise InputError(
            f"{self.name} is compiled for the sizes of each call ({self._specialised_because}); call it once"
        )

    @property
    def graph(self):
        """The optimised graph (prints as text)."""
        return self._some_variant().compiled.optimised

    @property
    def captured_graph(self):
        """The graph as it was captured, before any pass."""
        return self._some_variant().captured.graph

    def to_networkx(self):
        """The optimised graph as a `networkx.MultiDiGraph`, for analysis and drawing (see `kgraph.ir.networks`)."""
        from kgraph.ir.networks import to_networkx

        return to_networkx(self.graph)

    def explain(self) -> Explanation:
        """Per kernel and per Keras layer: what was fused, what was not and why, flops, bytes, host steps."""
        return explain(self.name, self._some_variant().compiled, self._specialised_because)

    def profile(self, *args, repeats: int = 10, **kwargs) -> Profile:
        """Time per kernel and per Keras layer of calls with these inputs (medians over `repeats`)."""
        variant, arrays = self._bind(args, kwargs)
        return profile_of(self.name, variant.compiled, arrays, repeats)

    def stats(self) -> dict:
        """Counts: compiles, bound sizes, kernels, cache hits, host steps, arena bytes, compile seconds."""
        variants = list(self._variants.values())
        out: dict = {
            "compiles": self._compiles,
            "compile_seconds": self._compile_seconds,
            "specialised": self._specialised_because,
            "variants": len(variants),
        }
        from kgraph.codegen.compiler import stats as kernel_stats

        out["kernel_cache"] = kernel_stats()
        if variants:
            out.update(variants[-1].program.stats())
            out["seconds"] = dict(variants[-1].compiled.seconds)
        return out

    def __repr__(self):
        return f"<kgraph.CompiledModel {self.name!r}>"


class CompiledFunction:
    """A function written in keras.ops, compiled at the first call with each set of shapes and other arguments."""

    def __init__(self, function: Callable, options: Options):
        functools.update_wrapper(self, function)
        self._function, self._options = function, options
        self._lock = threading.RLock()
        self._compiled: dict[tuple, CompiledModel] = {}

    def __call__(self, *args, **kwargs):
        if is_tracing():  # part of a larger graph, such as a gradient
            return self._function(*args, **kwargs)
        return self._for(args, kwargs)(*args, **kwargs)

    def _for(self, args: tuple, kwargs: dict) -> CompiledModel:
        key = _call_key((args, kwargs))
        compiled = self._compiled.get(key)
        if compiled is None:
            with self._lock:
                compiled = self._compiled.get(key)
                if compiled is None:
                    capture = lambda sizes: capture_function(self._function, *args, sizes=sizes, **kwargs)
                    name = getattr(self._function, "__name__", "function")
                    compiled = self._compiled[key] = CompiledModel(capture, self._options, name)
        return compiled

    def explain(self, *args, **kwargs) -> Explanation:
        """The explanation of the compiled form for these arguments."""
        return self._for(args, kwargs).explain()

    def stats(self) -> dict:
        """`compiles`, and per compiled form its own counts."""
        forms = [c.stats() for c in self._compiled.values()]
        return {"compiles": sum(f["compiles"] for f in forms), "forms": forms}


def _call_key(value) -> tuple:
    """What a compiled function depends on: nesting, shapes and dtypes of arrays, values of everything else."""
    if isinstance(value, dict):
        return ("dict", *((k, _call_key(value[k])) for k in sorted(value, key=str)))
    if isinstance(value, (tuple, list)):
        return (type(value).__name__, *(_call_key(v) for v in value))
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return ("array", tuple(value.shape), str(value.dtype))
    return ("value", type(value).__name__, value)


def _as_input(leaf, name: str, expected: TensorType) -> np.ndarray:
    """A leaf of a call as an array of the expected dtype. Raises InputError for what is no numeric array."""
    value = getattr(leaf, "_value", leaf) if isinstance(leaf, core.Variable) else leaf
    if value is None:
        raise InputError(f"input {name!r}: expected {expected}, got None")
    array = np.asarray(value)
    if array.dtype == expected.np_dtype:
        return array
    if array.dtype.kind in "OSUMmV" and array.dtype.name not in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        raise InputError(
            f"input {name!r}: expected {expected}, got an array of dtype {array.dtype} and shape {array.shape}"
        )
    if array.dtype.kind == "c" and not expected.dtype.startswith("complex"):
        raise InputError(f"input {name!r}: expected {expected}, got complex numbers of shape {array.shape}")
    return array.astype(expected.np_dtype)


def _sizes_of(shapes: Iterable[tuple], types: Iterable[TensorType]) -> dict[str, int]:
    """The symbols of the input types, read off concrete shapes."""
    sizes: dict[str, int] = {}
    for shape, type_ in zip(shapes, types):
        if len(shape) != type_.rank:
            raise InputError(f"expected an input of type {type_}, got shape {shape}")
        for size, dim in zip(shape, type_.shape):
            if not isinstance(dim, int):
                (name,) = dim.symbols()
                sizes[name] = size
    return sizes
