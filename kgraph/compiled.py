"""What `kgraph.compile` and `kgraph.jit` give back: a model as one native call, with its weights kept current."""

from __future__ import annotations

import functools
import os
import threading
import time
import types
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from math import prod

import numpy as np

from kgraph.codegen.cuda.target import CudaTarget
from kgraph.codegen.tuning import tuning
from kgraph.compiler import CompiledGraph, compile_graph
from kgraph.config import Options
from kgraph.errors import InputError
from kgraph.frontend.capture import Captured, SpecialisationError, capture_function
from kgraph.frontend.keras_backend import core
from kgraph.frontend.tracer import is_tracing
from kgraph.garbage import earlier_objects_set_aside
from kgraph.passes.round_operands import round_operands
from kgraph.precision import PrecisionReport, measure
from kgraph.prepared import Source, Values, is_any_prepared
from kgraph.progress import CompileProgress
from kgraph.report import Explanation, Profile, explain, kernel_rows, profile_of
from kgraph.reserve import Reserve
from kgraph.runtime.cuda.device import device_for
from kgraph.runtime.model import Model, sizes_of
from kgraph.targets import resolve
from kgraph.types import np_dtype


class Variant:
    """One compiled form: for all sizes, or specialised on some; with the versions of the weights it last saw."""

    def __init__(self, captured: Captured, compiled: CompiledGraph, baked: dict[int, np.ndarray] | None):
        self.captured, self.compiled, self.baked = captured, compiled, baked
        self.program = compiled.program
        self.global_version = -1
        self.versions: list[int] = []
        self.lock = threading.Lock()
        self.inputs, self.outputs = captured.inputs, captured.outputs
        self.num_outputs = captured.num_outputs
        self.updates = captured.updates

    def weights(self) -> list[np.ndarray]:
        """The value of each of the variables that the graph reads, as the program has it."""
        baked = self.baked or {}
        return [baked.get(id(v), v._value) for v in self.captured.variables]

    def run(self, arrays: list[np.ndarray], out: list | None) -> list[np.ndarray]:
        """A call: the leaves of the outputs; the variables that the model assigns get their new values."""
        results = self.program(arrays, out=None if out is None else [*out, *([None] * len(self.updates))])
        for variable, value in zip(self.updates, results[self.num_outputs :]):
            variable.assign(value)
        return list(results[: self.num_outputs])

    def refresh_weights(self, reserve: Reserve | None = None) -> None:
        """Prepare and hand over the weights that have changed since the last call.

        reserve: memory for them, at the first time.
        """
        with self.lock:
            seen = core.weights_version
            variables = self.captured.variables
            if self.baked is not None:
                if self.global_version < 0:
                    weights = self.weights()
                    self.compiled.set_params(weights, reserve=reserve, sources=[Source(array, 0) for array in weights])
                self.global_version = seen
                return
            versions = [v.version for v in variables]
            if self.versions:
                changed = [i for i, (a, b) in enumerate(zip(versions, self.versions)) if a != b]
            else:
                changed = None
            if changed is None or changed:
                written = {id(v) for v in self.updates}
                sources = [
                    Source(v, version, None if id(v) in written else v) for v, version in zip(variables, versions)
                ]
                self.compiled.set_params(Values(variables), changed, reserve, sources)
            self.versions = versions
            self.global_version = seen


class CompiledModel(Model):
    """A Keras model (or a function) compiled to native kernels.

    Call it with NumPy arrays in the structure that the model takes (one array, list, tuple or dict); it gives NumPy
    arrays in the model's output structure. Sparse tensors and SciPy's sparse matrices are made dense for the call. Any
    batch size runs without a new compile. Weights are read from the model at each call, so that `set_weights` and
    training show at once (unless compiled with `freeze=True`).
    Safe to call from many threads and after a fork.
    """

    def __init__(
        self,
        capture: Callable[[dict], Captured],
        options: Options,
        name: str,
        variables: Callable[[], Iterable] = lambda: (),
        adapts_rank: bool = False,
    ):
        """capture: gives the model's graph, with some sizes fixed. variables: gives the model's, once it is built.
        adapts_rank: a last axis of size 1 may be missing or in excess in an input, as in Keras' functional models."""
        self._capture, self._variables = capture, variables
        self._options, self._target = options, resolve(options.target)
        self._device = device_for(self._target.device) if isinstance(self._target, CudaTarget) else None
        self._adapts_rank = adapts_rank
        self._baked: dict[int, np.ndarray] | None = None
        self.name = name
        self._lock = threading.RLock()
        self._variants: dict[tuple, Variant] = {}
        # Symbols whose value the model's own code needs; a compiled form is made for each set of their values.
        self._fixed: tuple[str, ...] = ()
        self._specialised_because: str | None = None
        self._compiles = 0
        self._compile_seconds = 0.0
        self._rounded: Counter = Counter()  # nodes whose operands are rounded, by primitive
        self._precision_report: PrecisionReport | None = None
        try:
            self._variants[()] = variant = self._compile({})
            self._inputs = variant.captured.inputs
        except SpecialisationError as error:
            if error.inputs is None or not error.symbols:
                raise
            self._specialise(error)
        self._prepare_fast_path()

    # -- compiling --------------------------------------------------------------------------------------------
    def _compile(self, sizes: dict[str, int]) -> Variant:
        start = time.perf_counter()
        reserve = self._reserve()
        with earlier_objects_set_aside():
            try:
                captured = self._capture(sizes)
            finally:
                if self._options.freeze and self._baked is None:
                    # Arrays of variables never change, so that keeping them keeps the weights of this moment.
                    self._baked = {id(v): v._value for v in self._variables()}
            with CompileProgress(self.name, self._options.progress) as progress:
                if self._options.precision == "bf16":
                    captured.graph, self._rounded = round_operands(captured.graph)
                with tuning(self._options.tune):
                    compiled = compile_graph(captured.graph, progress, target=self._target)
        variant = Variant(captured, compiled, self._baked)
        variant.refresh_weights(reserve)
        self._compiles += 1
        self._compile_seconds += time.perf_counter() - start
        return variant

    def _reserve(self) -> Reserve:
        """Memory for the prepared weights, about as much as those are that convolutions read."""
        on_host = not isinstance(self._target, CudaTarget)
        weights = [v for v in self._variables() if len(v.shape) > 1 and v.name != "embeddings"] if on_host else []
        if not self._options.freeze:
            # Matrices, and windows of one, are packed into the memory of the one before, which its variable has let go.
            weights = [v for v in weights if prod(v.shape[:-2]) > 1]
        if is_any_prepared([*weights, *(self._baked or {}).values()]):
            weights = []  # by another form, which shares them
        return Reserve(sum(prod(v.shape) * np_dtype(v.dtype).itemsize for v in weights))

    def _specialise(self, error: SpecialisationError) -> None:
        """From now on compile for each value of the sizes that the model's code asked for."""
        self._fixed = tuple(sorted({*self._fixed, *error.symbols}))
        if error.inputs is not None and self._specialised_because is None:
            self._inputs = error.inputs
        self._specialised_because = str(error)
        self._variants.clear()

    def _form_for(self, arrays: list[np.ndarray]) -> Variant:
        variant = self._variant_for(arrays)
        if variant.global_version != core.weights_version:
            variant.refresh_weights()
        return variant

    def _variant_for(self, arrays: list[np.ndarray]) -> Variant:
        if not self._fixed:
            return self._variants[()]
        with self._lock:
            while True:
                sizes = sizes_of([a.shape for a in arrays], self._inputs)
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
            self._fast = (variant, variant.program, inputs.types[0].np_dtype, inputs.types[0].rank)

    def __call__(self, *args, out=None, **kwargs):
        """Run the model.

        Args are the model's inputs; NumPy arrays, or what `numpy.asarray` takes. `out`: arrays (in the output's
        structure) to write the results into. `training=False` is accepted, as Keras' models take it.
        Raises InputError naming the input that does not fit.
        """
        fast = self._fast
        if fast is not None and out is None and len(args) == 1 and not kwargs:
            x = args[0]
            variant, program, dtype, rank = fast
            if type(x) is np.ndarray and x.dtype is dtype and x.ndim == rank:
                if variant.global_version != core.weights_version:
                    variant.refresh_weights()
                return program((x,))[0]
        return self._call(args, kwargs, out)

    def _leaf_value(self, leaf):
        return leaf._value if isinstance(leaf, core.Variable) else leaf

    # -- looking inside ---------------------------------------------------------------------------------------
    def _some_variant(self) -> Variant:
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
        variant = self._some_variant()
        explanation = explain(self.name, variant.compiled, self._specialised_because)
        if self._options.precision != "float32":
            products, convolutions = self._rounded["dot_general"], self._rounded["conv"]
            counted = f"operands of {products} products and {convolutions} convolutions are rounded to bfloat16"
            explanation.precision = f"{self._options.precision}: {counted}"
        return explanation

    def profile(self, *args, repeats: int = 10, **kwargs) -> Profile:
        """Time per kernel and per Keras layer of calls with these inputs (medians over `repeats`)."""
        variant, arrays = self._bind(args, kwargs)
        return profile_of(self.name, kernel_rows(variant.compiled), variant.program, arrays, repeats)

    def precision_report(self, *args, **kwargs) -> PrecisionReport:
        """Errors of the outputs for these inputs against the same graph computed in float64, by NumPy: see there.

        Takes as long as NumPy does. `stats()["precision"]` holds the figures of the last report.
        """
        variant, arrays = self._bind(args, kwargs)
        results = variant.run(arrays, None)
        names = [name or f"output {number}" for number, name in enumerate(variant.outputs.names)]
        graph = variant.captured.graph
        self._precision_report = measure(self._options.precision, graph, arrays, variant.weights(), results, names)
        return self._precision_report

    def _precision(self) -> dict:
        """What is rounded, and the error that was measured last."""
        report = self._precision_report
        return {
            "name": self._options.precision,
            "rounded_products": self._rounded["dot_general"],
            "rounded_convolutions": self._rounded["conv"],
            "rms_error": None if report is None else report.rms,
            "largest_error": None if report is None else report.largest,
        }

    def stats(self) -> dict:
        """Counts: compiles, bound sizes, kernels, cache hits, host steps, arena bytes, compile seconds; precision."""
        variants = list(self._variants.values())
        out: dict = {
            "compiles": self._compiles,
            "compile_seconds": self._compile_seconds,
            "specialised": self._specialised_because,
            "variants": len(variants),
            "precision": self._precision(),
        }
        from kgraph.codegen.compiler import stats as kernel_stats

        out["kernel_cache"] = kernel_stats()
        if variants:
            out.update(variants[-1].program.stats())
            out["seconds"] = dict(variants[-1].compiled.seconds)
        return out

    # -- saving -------------------------------------------------------------------------------------------------
    def save(
        self,
        path: str | os.PathLike,
        *,
        levels: Sequence[str] | None = None,
        rebuildable: bool = True,
        self_test: bool = True,
    ) -> int:
        """Write the model to a file that `kgraph.load` reads, with its weights as they are now; gives the file's size.

        Args:
            path: the file, `.kgraph` by custom.
            levels: the kinds of machine to make code for: "native" (this one), "x86-64-v4" (AVX-512), "x86-64-v3"
                (AVX2), "x86-64-v2". By default the first three; each needs its own prepared weights in the file, unless
                they are equal.
            rebuildable: write the graph and the weights before preparation too, so that the model can be compiled again
                where none of the levels fits.
            self_test: record a call with its results, to be repeated when the file is loaded.

        A model that is compiled for the sizes of each call is saved for those sizes that it has been called with.
        Raises CompileError for an unknown level, InputError where no sizes have been compiled yet.
        """
        from kgraph.artifact.save import save

        return save(self._saved(), path, levels=levels, rebuildable=rebuildable, self_test=self_test)

    def export(self, path: str | os.PathLike, format: str = "c", **options):
        """Write the model, with its weights as they are now, for programs without kgraph.

        format: "c", a directory with a shared and a static library and a C header (gives their paths; options: `name`,
            `machine`, `levels`, `weights`, `compiler`, `keep_objects` of `kgraph.c_export.export`), or "onnx", one file
            (option: `optimised`, of `kgraph.onnx_export.export_onnx`).
        A model that is compiled for the sizes of each call is exported for those sizes that it has been called with.
        Raises ValueError for another format, UnsupportedError for what the format has no place for, CompileError where
        no C compiler is found, InputError where no sizes have been compiled yet.
        """
        if format == "c":
            from kgraph.c_export import export

            return export(self._saved(), path, **options)
        if format == "onnx":
            from kgraph.onnx_export import export_onnx

            return export_onnx(self._saved(), path, **options)
        raise ValueError(f"format={format!r}: expected 'c' or 'onnx'")

    def _saved(self):
        """The model as what is written of it."""
        from kgraph.artifact.models import saved_model

        self._some_variant()
        with self._lock:
            for variant in self._variants.values():
                variant.refresh_weights()
            forms = [(dict(zip(self._fixed, key)), variant) for key, variant in self._variants.items()]
            return saved_model(
                self.name, self._inputs, forms, self._adapts_rank, self._fixed, self._specialised_because
            )

    def __repr__(self):
        return f"<kgraph.CompiledModel {self.name!r}>"


class CompiledFunction:
    """A function written in keras.ops, compiled at the first call with each set of shapes and other arguments."""

    def __init__(self, function: Callable, options: Options):
        functools.update_wrapper(self, function)
        self._function, self._options = function, options
        self._lock = threading.RLock()
        self._compiled: dict[tuple, CompiledModel] = {}

    def __get__(self, instance, owner=None):
        """A method where the function is one of a class; each instance counts as an argument by value."""
        return self if instance is None else types.MethodType(self, instance)

    def __call__(self, *args, **kwargs):
        if is_tracing():  # part of a larger graph, such as a gradient
            return self._function(*args, **kwargs)
        return self._for(args, kwargs)(*args, **kwargs)

    def _for(self, args: tuple, kwargs: dict) -> CompiledModel:
        key = _call_key((args, kwargs))
        try:
            compiled = self._compiled.get(key)
        except TypeError as error:  # not hashable
            raise InputError(
                f"{getattr(self._function, '__name__', 'function')}: a function is compiled for each value of its "
                f"arguments that are no arrays, so these must be hashable: {error}"
            ) from error
        if compiled is None:
            with self._lock:
                compiled = self._compiled.get(key)
                if compiled is None:
                    args, kwargs = _placeholders((args, kwargs))  # else the first arguments would live forever
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


def _placeholders(value):
    """The same nesting with arrays of the same shapes and dtypes that take no memory."""
    if isinstance(value, dict):
        return {k: _placeholders(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        items = [_placeholders(v) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, (np.ndarray, np.generic)) or core.is_sparse(value):
        return np.broadcast_to(np.zeros((), value.dtype), value.shape)
    return value
