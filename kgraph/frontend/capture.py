"""From a Keras model, or a function written in keras.ops, to a graph.

The call is traced once on symbolic sizes. Variables that it reads become parameters, those that it assigns become
further outputs of the graph. Where the model's code needs the value of a size, `SpecialisationError` names the size;
`capture(model, sizes={"L1": 128})` then fixes it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras

from kgraph.errors import CaptureError, DimDecisionError, KGraphError, ShapeError
from kgraph.frontend.keras_backend import core
from kgraph.frontend.signatures import Arguments, is_array, path_name, signature, type_of_leaf
from kgraph.frontend.tracer import GraphTracer
from kgraph.frontend.unsupported import Collector
from kgraph.ir import Dim, Graph, TensorType, live_nodes
from kgraph.structure import Structure


@dataclass
class Captured:
    """A model or function as a graph.

    graph: its inputs are the leaves of `inputs`; its params belong to `variables`, in order; its outputs are the leaves
        of `outputs` and then the new values of `updates`.
    symbols: for each symbolic size where it comes from ("N": "batch", "L1": "axis 1 of input 'tokens'").
    sizes: the symbols that were fixed to a number, as asked for.
    """

    graph: Graph
    variables: list
    inputs: Structure
    outputs: Structure
    updates: list = field(default_factory=list)
    symbols: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def num_outputs(self) -> int:
        """Number of outputs that are results, before the updates."""
        return self.outputs.num_leaves


class SpecialisationError(DimDecisionError):
    """The model's code needs the value of a symbolic size.

    symbols: names of the sizes to be fixed with `sizes=`. inputs: the structure of the model's inputs.
    """

    def __init__(self, message: str, symbols: frozenset[str] = frozenset(), inputs: Structure | None = None):
        super().__init__(message)
        self.symbols, self.inputs = symbols, inputs


# -- entry points ------------------------------------------------------------------------------------------------------
def capture(model, *, sizes: dict[str, int] | None = None, training: bool = False, example: Any = None) -> Captured:
    """The graph of a call of a Keras model or layer.

    sizes: numbers for some of the symbolic sizes.
    training: the `training` argument of the call.
    example: the argument of one call (or `Arguments`), for models that do not state the shapes of their inputs. Its
        first axis is taken for the batch.

    Raises CaptureError (a value was needed, the model is not built), UnsupportedError (an operation has no
    implementation), SpecialisationError (a size has to be fixed); each names the layer.
    """
    inputs, symbols = signature(model, example)

    def call(*args, **kwargs):
        if getattr(model, "_call_has_training_arg", False):
            kwargs = {"training": training, **kwargs}
        return model(*args, **kwargs)

    return _capture_unifying(call, inputs, symbols, sizes or {}, getattr(model, "name", "model"))


def capture_function(
    function: Callable,
    *args,
    sizes: dict[str, int] | None = None,
    batch_symbol: bool = False,
    shapes: Sequence[tuple] | None = None,
    **kwargs,
) -> Captured:
    """The graph of a function on arguments like the given ones: arrays become inputs, anything else is fixed.

    batch_symbol: the first axis of all arrays is one symbolic size, N. shapes: those of the arrays, with symbols.
    """
    origins: dict[str, str] = {}
    given = iter(shapes or ())

    def describe(leaf, path):
        type_ = type_of_leaf(leaf)
        name = path_name(path[1:], "x")
        if shapes is not None:
            type_ = type_.with_shape(next(given))
        elif batch_symbol and type_.shape:
            type_ = type_.with_shape((Dim.symbol("N"), *type_.shape[1:]))
        for axis, size in enumerate(type_.shape):
            if isinstance(size, Dim):
                origins.setdefault(str(size), "batch" if str(size) == "N" else f"axis {axis} of {name!r}")
        return name, type_

    inputs, _ = Structure.of((args, kwargs), is_array, describe, call=True)
    return _capture_unifying(function, inputs, origins, sizes or {}, getattr(function, "__name__", "function"))


# -- tracing -----------------------------------------------------------------------------------------------------------
def _capture_unifying(call, inputs: Structure, symbols: dict, sizes: dict, name: str) -> Captured:
    """Capture; where two sizes of the same axis must agree for the model to work, take them for one and try again.

    A model with inputs `tokens` and `mask` of unknown length, say, declares two sizes that can only be equal. Where
    shapes contradict that, as with images and a length that counts the places of each, both are to be fixed.
    """
    symbols, declared = dict(symbols), inputs
    inputs = _substituted(inputs, sizes)
    unified: SpecialisationError | None = None
    while True:
        try:
            return _capture_once(call, inputs, symbols, sizes, name)
        except ShapeError as error:
            if unified is None:
                raise
            raise unified from error
        except SpecialisationError as error:
            pair = _same_axis_pair(error.symbols, symbols)
            if pair is None:
                error.inputs = declared  # with every symbol that this or another capture may name
                raise
            unified = SpecialisationError(str(error), frozenset(pair), declared)
        except ValueError as error:
            # Keras' own checks refuse sizes that differ as symbols, in an error that shows them.
            pair = _same_axis_pair(_named(symbols, error), symbols)
            if pair is None:
                raise
        kept, dropped = pair
        symbols[kept] += f" and {symbols.pop(dropped)}"
        inputs = _substituted(inputs, {dropped: Dim.symbol(kept)})


def _same_axis_pair(names: frozenset, symbols: dict) -> tuple[str, str] | None:
    """Two of the named sizes that belong to the same axis of different inputs, in order."""
    for kept in sorted(names, key=lambda n: (len(n), n)):
        for dropped in sorted(names, key=lambda n: (len(n), n)):
            if kept != dropped and dropped.startswith(f"{kept.split('_')[0]}_") and {kept, dropped} <= set(symbols):
                return kept, dropped
    return None


def _substituted(structure: Structure, sizes: dict) -> Structure:
    def size(s):
        return s.substitute(sizes) if isinstance(s, Dim) else s

    types = [t.with_shape(map(size, t.shape)) for t in structure.types]
    return Structure(structure.template, structure.names, types, structure.call)


def _capture_once(call, inputs: Structure, symbols: dict, sizes: dict, name: str) -> Captured:
    tracer = GraphTracer(name)
    collector = Collector(tracer)
    try:
        # Variables that the call makes, such as an optimizer's slots at its first use, get their values when it ends.
        scope = core.TraceScope(initialize_variables=True)
        with _unfiltered_tracebacks(), scope, tracer.active(), collector:
            leaves = [tracer.add_input(t, n) for n, t in zip(inputs.names, inputs.types)]
            args, kwargs = inputs.pack_call(leaves)
            result = call(*args, **kwargs)
            results, outputs = _outputs(result)
            updates = [(v, scope.get_current_value(v)) for v in scope.variables_by_id.values()]
            values = [tracer.lift(r) for r in results] + [tracer.lift(value) for _, value in updates]
    except Exception as error:
        if collector.found:
            # Whatever went wrong on stand-ins, what is missing comes first.
            raise collector.error(name) from error
        explained = _explained(error, symbols, inputs, name)
        if explained is error:
            raise
        raise explained from error
    if collector.found:
        raise collector.error(name)
    graph = tracer.graph
    graph.outputs = values
    _drop_unused(graph)
    variables = [v for v, traced in tracer.variables.values() if traced.value in set(graph.params)]
    for variable in variables:
        if not variable.has_value:
            raise CaptureError(f"variable {variable.path!r} is not initialised: build {name!r} or call it once first")
    used = {s for v in graph.inputs for d in v.shape if isinstance(d, Dim) for s in d.symbols()}
    origins = {s: text for s, text in symbols.items() if s in used}
    return Captured(graph, variables, inputs, outputs, [v for v, _ in updates], origins, dict(sizes))


@contextlib.contextmanager
def _unfiltered_tracebacks():
    """Keras' traceback filter rewrites exceptions into new ones; ours must come through as they are."""
    enabled = keras.config.is_traceback_filtering_enabled()
    keras.config.disable_traceback_filtering()
    try:
        yield
    finally:
        if enabled:
            keras.config.enable_traceback_filtering()


def _outputs(result) -> tuple[list, Structure]:
    """The tensors that a call gave, and their structure."""
    leaves: list = []

    def describe(leaf, path):
        leaf = core.dense_tensor(leaf)
        leaves.append(leaf)
        return path_name(path, "output"), TensorType(tuple(leaf.shape), leaf.dtype.name)

    structure, _ = Structure.of(result, lambda x: is_array(x) or isinstance(x, Dim), describe)
    return leaves, structure


def _drop_unused(graph: Graph) -> None:
    """Remove the nodes and parameters that no output depends on (masks and losses that nobody reads)."""
    graph.nodes = live_nodes(graph.nodes, graph.outputs)
    read = {*graph.outputs, *(v for node in graph.nodes for v in node.inputs)}
    graph.params = [p for p in graph.params if p in read]


# -- errors ------------------------------------------------------------------------------------------------------------
def _layer_of(error: BaseException) -> str:
    """The path of the innermost Keras layer whose call an error came out of, or ''."""
    path = ""
    frame = error.__traceback__
    while frame is not None:
        owner = frame.tb_frame.f_locals.get("self")
        if isinstance(owner, keras.Layer):
            path = owner.path or owner.name
        frame = frame.tb_next
    return path


def _explained(error: Exception, symbols: dict, inputs: Structure, name: str) -> Exception:
    """The error to raise for one that came out of the call: with the layer, or as a SpecialisationError."""
    decision = _dim_decision_behind(error)
    if decision is not None:
        return _specialisation(decision, symbols, inputs, name)
    where = _layer_of(error)
    if isinstance(error, KGraphError) and where and where not in str(error):
        return type(error)(f"{error} (in layer {where!r} of {name!r})")
    return error


def _dim_decision_behind(error: BaseException | None) -> DimDecisionError | None:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, DimDecisionError):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def _named(symbols: dict, error: Exception) -> frozenset[str]:
    """The symbols that an error's message names."""
    return frozenset(s for s in symbols if re.search(rf"(?<![A-Za-z0-9_]){s}(?![A-Za-z0-9_])", str(error)))


def _specialisation(error: DimDecisionError, symbols: dict, inputs: Structure, name: str) -> SpecialisationError:
    wanted = _named(symbols, error) or frozenset(symbols)
    origins = ", ".join(f"{s} ({symbols[s]})" for s in sorted(wanted))
    where = _layer_of(error)
    place = f" in layer {where!r}" if where else ""
    return SpecialisationError(
        f"{name!r} cannot be captured for every size: {error}{place}. Fix {origins}, for example with "
        f"sizes={{{sorted(wanted)[0]!r}: 32}}." if wanted else f"{name!r}: {error}{place}",
        wanted,
        inputs,
    )  # fmt: skip


__all__ = ["Arguments", "Captured", "SpecialisationError", "capture", "capture_function", "signature"]
