"""A step of training or evaluation as one native call: batch and state in, logs and new state out."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from sys import getrefcount
from typing import Any

import numpy as np
from keras.src.random.seed_generator import global_seed_generator

from kgraph.batch_shapes import BatchShapes, Pattern, Position, symbolic, symbols_of
from kgraph.codegen.target import Target
from kgraph.compiler import compile_graph
from kgraph.device_step import DeviceVariant
from kgraph.frontend.capture import Captured, SpecialisationError, capture_function
from kgraph.frontend.keras_backend import core
from kgraph.garbage import earlier_objects_set_aside
from kgraph.ir import Graph
from kgraph.prepared import Source, Values
from kgraph.progress import CompileProgress
from kgraph.report import Profile, kernel_rows, profile_of
from kgraph.targets import resolve

MOST_PROGRAMS = 32
MANY_COMPILES = 8
MOST_KEYS = 4096  # of batches, such as one for every length seen


class CompiledStep:
    """A function of one batch that reads and assigns Keras variables, compiled once per structure of the batch.

    The variables that the step assigns (weights, optimizer slots, counters, statistics, metrics, seeds) are inputs of
    the program, and their new values are outputs, written over the old ones wherever nobody else holds the old array
    and the order of the steps allows it. Those that it only reads are parameters, prepared again when they change.
    The first axis of the batch is symbolic if all of its arrays have the same one, so that a smaller last batch runs
    in the same program; further axes become symbolic when batches differ in them (`kgraph.batch_shapes`). Where the
    code of the step needs such a number, a program is made for each of its values, and `stats()["specialised"]` says
    why. The MOST_PROGRAMS programs that ran last are kept; MANY_COMPILES compiles lead to a warning.
    """

    def __init__(
        self,
        function: Callable,
        name: str,
        *,
        training: bool,
        symbolic_batch: bool = True,
        target: str | None = None,
    ):
        """
        function: takes one batch (nested tuples, lists and dicts of arrays and None), gives a nested value of tensors.
        training: the step holds gradients. symbolic_batch: False where the model is made for one batch size.
        target: "cpu", "cuda" and so on; by default what `kgraph.set_device` was given. On a GPU the variables stay
            there, and the step gives arrays there, which may still be being computed.
        Raises DeviceError where there is no such device.
        """
        self._target = resolve(target)
        self.name = name
        self._function = _named(function, name)
        self._passes = "training" if training else "inference"
        self._specialised_because = None if symbolic_batch else "the model is declared for a fixed batch size"
        self._shapes = BatchShapes(symbolic_batch)
        self._by_key: dict[tuple, Variant | DeviceVariant] = {}  # a shortcut: the variant for every key seen
        self._variants: dict[tuple[tuple, Pattern], Variant | DeviceVariant] = {}
        self._last: Variant | DeviceVariant | None = None
        self._compiles = 0
        self._compile_seconds = 0.0

    def __call__(self, batch) -> Any:
        """Run the step; gives what the function gives, with arrays, and leaves the variables at their new values."""
        leaves: list[np.ndarray] = []
        key = self._key(_flatten(batch, leaves), leaves)
        variant = self._by_key.get(key)
        if variant is None or variant is not self._last:
            variant = self._last = self._variant_for(batch, leaves, key)
        return variant(leaves)

    def prepare(self, batch) -> Variant | DeviceVariant:
        """The program for batches like this one, compiled if there is none; nothing is run or assigned."""
        leaves: list[np.ndarray] = []
        key = self._key(_flatten(batch, leaves), leaves)
        self._last = self._variant_for(batch, leaves, key)
        self._last.refresh()
        return self._last

    @staticmethod
    def _key(structure: tuple, leaves: list[np.ndarray]) -> tuple:
        """What decides which program runs."""
        return structure, tuple([(a.shape, a.dtype) for a in leaves])

    def _variant_for(self, batch, leaves: list[np.ndarray], key: tuple) -> Variant | DeviceVariant:
        """The program for a batch, compiled if there is none; moved to the end of those that are kept."""
        structure, described = key
        shapes, kind = [shape for shape, _ in described], (structure, tuple([dtype for _, dtype in described]))
        guessed: set[Position] = set()
        while True:
            pattern = self._shapes.pattern_for(kind, shapes)
            variant = self._variants.pop((kind, pattern), None)
            if variant is not None:
                break
            try:
                variant = self._compile(batch, pattern)
                break
            except SpecialisationError as error:
                if not error.symbols:
                    self._shapes.forget(pattern, guessed)
                    raise
                self._shapes.pin(kind, shapes, error.symbols)
                self._specialised_because = str(error)
            except Exception:
                # Is it wrong for this batch too, or for sizes that are not known only?
                free = symbols_of(pattern)
                if not free:
                    self._shapes.forget(pattern, guessed)
                    raise
                guessed |= self._shapes.pin(kind, shapes, free)
        self._variants[kind, pattern] = variant
        if len(self._variants) > MOST_PROGRAMS:
            oldest = next(iter(self._variants))
            dropped = self._variants.pop(oldest)
            self._shapes.forget(oldest[1])
            self._by_key = {k: v for k, v in self._by_key.items() if v is not dropped}
        if len(self._by_key) > MOST_KEYS:
            self._by_key.clear()
        self._by_key[key] = variant
        return variant

    def _compile(self, batch, pattern: Pattern) -> Variant | DeviceVariant:
        start = time.perf_counter()
        variant: Variant | DeviceVariant
        # Made outside of the trace: a variable that is made inside of one has no value yet.
        global_seed_generator()
        with earlier_objects_set_aside():
            captured = capture_function(self._function, batch, shapes=symbolic(pattern))
            with CompileProgress(self.name) as progress:
                if isinstance(self._target, Target):
                    variant = Variant(captured, self._passes, progress)
                else:
                    variant = DeviceVariant(captured, self._target, progress)
        self._compiles += 1
        self._compile_seconds += time.perf_counter() - start
        if self._compiles == MANY_COMPILES:
            reason = f" ({self._specialised_because})" if self._specialised_because else ""
            warnings.warn(
                f"{self.name} was compiled {self._compiles} times, for batches of different structure, dtypes or "
                f"sizes{reason}; the last was {' '.join(map(_text, pattern))}. Every compile takes time and memory, "
                f"and the last {MOST_PROGRAMS} programs are kept. Pad the batches to a few sizes, and pass arrays of "
                "the same dtypes.",
                RuntimeWarning,
                stacklevel=6,
            )
        return variant

    # -- looking inside ---------------------------------------------------------------------------------------
    @property
    def graph(self) -> Graph:
        """The optimised graph of the program that ran last."""
        return next(reversed(self._variants.values())).compiled.optimised

    def profile(self, batch, repeats: int) -> Profile:
        """Time per kernel and per Keras layer of steps on a batch, which change copies of the variables."""
        variant = self.prepare(batch)
        leaves: list[np.ndarray] = []
        _flatten(batch, leaves)
        state = [np.array(v._value) for v in variant.state]
        return profile_of(self.name, kernel_rows(variant.compiled), variant.program, [*leaves, *state], repeats)

    def stats(self) -> dict:
        """Counts: compiles, programs kept, compile seconds, why a size is fixed, and those of the last program."""
        out = {
            "compiles": self._compiles,
            "programs": len(self._variants),
            "compile_seconds": self._compile_seconds,
            "specialised": self._specialised_because,
        }
        if self._variants:
            out.update(next(reversed(self._variants.values())).program.stats())
        return out


def _references(arrays: list[np.ndarray]) -> list[int]:
    return [getrefcount(a) for a in arrays]


class _Holder:
    def __init__(self):
        self._value = np.zeros(1)


def _own_references() -> int:
    """What `_references` counts for an array that one object's attribute and a list have, and nobody else."""
    holder = _Holder()
    arrays = [h._value for h in [holder]]
    return _references(arrays)[0]


_OWN_REFERENCES = _own_references()


class Variant:
    """The program for one structure of the batch."""

    def __init__(self, captured: Captured, passes: str, progress):
        graph, updated = captured.graph, {id(v) for v in captured.updates}
        own = list(zip(captured.variables, graph.params, strict=True))
        self.state = [v for v, _ in own if id(v) in updated]
        self.read = [v for v, _ in own if id(v) not in updated]
        inputs = [*graph.inputs, *(p for v, p in own if id(v) in updated)]
        params = [p for v, p in own if id(v) not in updated]
        self.updates = captured.updates
        self.inputs, self.outputs, self.passes = captured.inputs, captured.outputs, passes
        self.num_results = captured.num_outputs
        # Every variable's new value may overwrite its old one.
        numbers = {id(v): len(graph.inputs) + i for i, v in enumerate(self.state)}
        places = enumerate(self.updates, self.num_results)
        self.donations = [(numbers[id(v)], place) for place, v in places if id(v) in numbers]
        step = Graph(inputs, params, graph.nodes, graph.outputs, graph.name)
        self.compiled = compile_graph(step, progress, passes, self.donations)
        self.program = self.compiled.program
        self.versions: list[int] = []
        self.seen_version = -1

    def __call__(self, leaves: list[np.ndarray]):
        if self.seen_version != core.weights_version:
            self.refresh()
        before = core.weights_version
        state = [v._value for v in self.state]
        for i, count in enumerate(_references(state)):
            # The program overwrites these arrays; one that somebody else has kept stays as it is.
            if count > _OWN_REFERENCES:
                state[i] = state[i].copy()
        try:
            results = self.program([*leaves, *state])
            core.adopt_values(self.updates, results[self.num_results :])
        except BaseException:
            core.adopt_values(self.state, [v._value for v in self.state])  # may have changed in place
            raise
        if before == self.seen_version and core.weights_version == before + 1:
            # Nobody but this step has assigned anything, and it assigns nothing that is a parameter.
            self.seen_version = core.weights_version
        return self.outputs.pack(list(results[: self.num_results]))

    def refresh(self) -> None:
        """Prepare the parameters that have changed since the last call."""
        seen = core.weights_version
        versions = [v.version for v in self.read]
        changed = None
        if self.versions:
            changed = [i for i, (new, old) in enumerate(zip(versions, self.versions)) if new != old]
        if changed is None or changed:
            self.compiled.set_params(Values(self.read), changed, sources=list(map(Source, self.read, versions)))
        self.versions, self.seen_version = versions, seen


def _named(function: Callable, name: str) -> Callable:
    def step(batch):
        return function(batch)

    step.__name__ = name
    return step


def _text(shape: tuple) -> str:
    return f"[{','.join(map(str, shape))}]"


def _flatten(value, leaves: list[np.ndarray]) -> tuple:
    """Append the arrays of a batch in the order of `Structure`; gives the nesting around them, hashable."""
    if isinstance(value, (np.ndarray, np.generic)):
        leaves.append(np.asarray(value))
        return ()
    if isinstance(value, (tuple, list)):
        return (type(value).__name__, *[_flatten(v, leaves) for v in value])
    if isinstance(value, dict):
        return ("dict", *[(key, _flatten(value[key], leaves)) for key in sorted(value, key=str)])
    if core.is_sparse(value):
        leaves.append(core.dense_tensor(value))
        return ()
    return ("value", value)


__all__ = ["CompiledStep"]
