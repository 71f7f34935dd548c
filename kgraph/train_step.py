"""A step of training or evaluation as one native call: batch and state in, logs and new state out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from keras.src.random.seed_generator import global_seed_generator

from kgraph.compiler import compile_graph
from kgraph.frontend.capture import Captured, SpecialisationError, capture_function
from kgraph.frontend.keras_backend import core
from kgraph.ir import Graph
from kgraph.passes.manager import Pass
from kgraph.passes.pipeline import INFERENCE, TRAINING
from kgraph.progress import CompileProgress


class CompiledStep:
    """A function of one batch that reads and assigns Keras variables, compiled once per structure of the batch.

    The variables that the step assigns (weights, optimizer slots, counters, statistics, metrics, seeds) are inputs of
    the program, and their new values are outputs, which become the variables' arrays after the call. Those that it
    only reads are parameters, prepared again when they have changed.
    The first axis of the batch is symbolic if all of its arrays have the same one, so that a smaller last batch runs
    in the same program. Where the code of the step needs that number, a program is made for each of its values, and
    `stats()["specialised"]` says why.
    """

    def __init__(self, function: Callable, name: str, *, training: bool, symbolic_batch: bool = True):
        """
        function: takes one batch (nested tuples, lists and dicts of arrays and None), gives a nested value of tensors.
        training: the step holds gradients. symbolic_batch: False where the model is made for one batch size.
        """
        self.name = name
        self._function = _named(function, name)
        self._passes = TRAINING if training else INFERENCE
        self._specialised_because = None if symbolic_batch else "the model is declared for a fixed batch size"
        self._variants: dict[tuple, _Variant] = {}
        self._compiles = 0
        self._compile_seconds = 0.0

    def __call__(self, batch) -> Any:
        """Run the step; gives what the function gives, with arrays, and leaves the variables at their new values."""
        leaves: list[np.ndarray] = []
        key = self._key(_flatten(batch, leaves), leaves)
        variant = self._variants.get(key)
        if variant is None:
            variant = self._compile(batch, leaves)
        return variant(leaves)

    def _key(self, structure: tuple, leaves: list[np.ndarray]) -> tuple:
        rows = self._rows(leaves)
        if rows is None or self._specialised_because is not None:
            return structure, tuple([(a.shape, a.dtype) for a in leaves])
        return structure, tuple([(a.shape[1:], a.dtype) for a in leaves])

    @staticmethod
    def _rows(leaves: list[np.ndarray]) -> int | None:
        """The size of the first axis that all arrays have; None where it is not one size."""
        rows = {a.shape[0] if a.ndim else None for a in leaves}
        return rows.pop() if len(rows) == 1 else None

    def _compile(self, batch, leaves: list[np.ndarray]) -> _Variant:
        start = time.perf_counter()
        # Made outside of the trace: a variable that is made inside of one has no value yet.
        global_seed_generator()
        symbolic = self._specialised_because is None and self._rows(leaves) is not None
        try:
            captured = capture_function(self._function, batch, batch_symbol=symbolic)
        except SpecialisationError as error:
            if not symbolic:
                raise
            self._specialised_because = str(error)
            self._variants.clear()
            captured = capture_function(self._function, batch)
        with CompileProgress(self.name) as progress:
            variant = _Variant(captured, self._passes, progress)
        self._variants[self._key(_flatten(batch, []), leaves)] = variant
        self._compiles += 1
        self._compile_seconds += time.perf_counter() - start
        return variant

    # -- looking inside ---------------------------------------------------------------------------------------
    @property
    def graph(self) -> Graph:
        """The optimised graph of the program that was compiled last."""
        return next(reversed(self._variants.values())).compiled.optimised

    def stats(self) -> dict:
        """Counts: compiles, compile seconds, why a batch size was fixed, native and host steps of the last program."""
        out = {
            "compiles": self._compiles,
            "compile_seconds": self._compile_seconds,
            "specialised": self._specialised_because,
        }
        if self._variants:
            out.update(next(reversed(self._variants.values())).program.stats())
        return out


class _Variant:
    """The program for one structure of the batch."""

    def __init__(self, captured: Captured, passes: Sequence[Pass], progress):
        graph, updated = captured.graph, {id(v) for v in captured.updates}
        own = list(zip(captured.variables, graph.params, strict=True))
        self.state = [v for v, _ in own if id(v) in updated]
        self.read = [v for v, _ in own if id(v) not in updated]
        inputs = [*graph.inputs, *(p for v, p in own if id(v) in updated)]
        params = [p for v, p in own if id(v) not in updated]
        self.updates = captured.updates
        self.outputs = captured.outputs
        self.num_results = captured.num_outputs
        self.compiled = compile_graph(Graph(inputs, params, graph.nodes, graph.outputs, graph.name), progress, passes)
        self.program = self.compiled.program
        self.versions: list[int] = []
        self.seen_version = -1

    def __call__(self, leaves: list[np.ndarray]):
        if self.seen_version != core.weights_version:
            self._refresh()
        before = core.weights_version
        results = self.program([*leaves, *[v._value for v in self.state]])
        core.adopt_values(self.updates, results[self.num_results :])
        if before == self.seen_version and core.weights_version == before + 1:
            # Nobody but this step has assigned anything, and it assigns nothing that is a parameter.
            self.seen_version = core.weights_version
        return self.outputs.pack(list(results[: self.num_results]))

    def _refresh(self) -> None:
        """Prepare the parameters that have changed since the last call."""
        seen = core.weights_version
        versions = [v.version for v in self.read]
        changed = None
        if self.versions:
            changed = [i for i, (new, old) in enumerate(zip(versions, self.versions)) if new != old]
        if changed is None or changed:
            self.compiled.set_params([v._value for v in self.read], changed)
        self.versions, self.seen_version = versions, seen


def _named(function: Callable, name: str) -> Callable:
    def step(batch):
        return function(batch)

    step.__name__ = name
    return step


def _flatten(value, leaves: list[np.ndarray]) -> tuple:
    """Append the arrays of a batch in the order of `Structure`; gives the nesting around them, hashable."""
    if isinstance(value, (np.ndarray, np.generic)):
        leaves.append(np.asarray(value))
        return ()
    if isinstance(value, (tuple, list)):
        return (type(value).__name__, *[_flatten(v, leaves) for v in value])
    if isinstance(value, dict):
        return ("dict", *[(key, _flatten(value[key], leaves)) for key in sorted(value, key=str)])
    return ("value", value)


__all__ = ["CompiledStep"]
