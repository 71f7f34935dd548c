"""Keeps what passes and lowering make of a captured graph in the disk cache of kernels.

An entry holds the optimised graph, its prologue, the lowered program and the decisions. Its key is a digest of the
captured graph with all attributes and constants, of the passes, the target, and of all sources and versions that the
way from one to the other depends on. Graphs are flattened to plain records with numbers for values. What cannot be
written so is compiled anew each time. Entries are trusted as kernels are, whose code runs too (`codegen.cache`).

What comes from the cache is what a compile without it gives, down to the names of values: passes run on a copy of the
captured graph, and names are assigned at their end (`Split.assign_names`), before an entry is stored. The optimised
graph, which no call needs, is read when somebody asks for it.
`KGRAPH_PROGRAM_CACHE=0` switches it off.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import os
import pickle
import platform
import threading
from collections.abc import Callable, Iterable, Sequence

import llvmlite
import numpy as np

from kgraph.codegen.lower import Lowered
from kgraph.codegen.sources import index
from kgraph.codegen.tuning import is_wanted
from kgraph.decisions import Decision
from kgraph.disk_cache import disk_cache
from kgraph.ir import PRIMITIVES, Graph, Node, Primitive, Value
from kgraph.ir.exact_text import number_values, numbers_of, places, plain
from kgraph.ir.recorder import uniform_value
from kgraph.passes.prologue import Split
from kgraph.preparation import Preparation

# Larger graphs hold weights as constants: to digest them would cost more than it spares.
LARGEST_CONSTANTS = 16 << 20
# With any of these the passes have to run: they write their stages, stop early or are checked.
_WATCHED = ("KGRAPH_DUMP", "KGRAPH_STOP_AFTER", "KGRAPH_VERIFY")
# What decides between algorithms.
_SETTINGS = ("KGRAPH_WINOGRAD",)
_ERRORS = (pickle.PickleError, TypeError, AttributeError, ValueError, KeyError, RecursionError)


class Graphs:
    """The two halves of an optimised graph, and the node behind each step of its program; made when somebody looks."""

    def __init__(self, make: Callable[[], tuple[Split, list[Node]]]):
        self._make, self._lock = make, threading.Lock()
        self._made: tuple[Split, list[Node]] | None = None

    def _get(self) -> tuple[Split, list[Node]]:
        with self._lock:
            if self._made is None:
                self._made = self._make()
            return self._made

    @property
    def split(self) -> Split:
        """The prologue and the main graph."""
        return self._get()[0]

    @property
    def nodes(self) -> list[Node]:
        """The node behind each step."""
        return self._get()[1]


@dataclasses.dataclass
class Entry:
    """What passes and lowering make of a graph: the steps of its program, the pieces of its prologue, and how they came
    about."""

    lowered: Lowered
    preparation: Preparation
    decisions: list[Decision]
    graphs: Graphs


class _Pickler(pickle.Pickler):
    """Writes primitives by name and graphs as records; refuses nodes and values outside of a graph."""

    def reducer_override(self, value):
        if isinstance(value, Primitive):
            return _primitive, (value.name,)
        if isinstance(value, Graph):
            return _graph, (_records(value.nodes, [*value.inputs, *value.params]), places(value, numbers_of(value)))
        if isinstance(value, (Node, Value)):
            raise pickle.PicklingError(f"{value!r} outside of a graph")
        if type(value) is np.ndarray and value.size > 1 and (fill := uniform_value(value)) is not None:
            return np.full, (value.shape, fill, value.dtype)  # such as the zeros that a gradient is scattered into
        return NotImplemented


def _primitive(name: str) -> Primitive:
    return PRIMITIVES[name]


def _written(value) -> bytes:
    stream = io.BytesIO()
    _Pickler(stream, pickle.HIGHEST_PROTOCOL).dump(value)
    return stream.getvalue()


def _records(nodes: Sequence[Node], given: Sequence[Value]) -> tuple:
    """The given values and the nodes as plain data. Raises KeyError where a node reads anything else."""
    numbers = number_values(nodes, given)
    records = [
        (
            node.primitive,
            [numbers[v] for v in node.inputs],
            node.attrs,
            [(v.type, v.name) for v in node.outputs],
            sorted(node.provenance),
        )
        for node in nodes
    ]
    return [(v.type, v.name) for v in given], records


def _rebuilt(records: list, values: list[Value]) -> list[Node]:
    """The nodes of records; `values` holds the given values and gets the nodes' results."""
    nodes = []
    for primitive, inputs, attrs, outputs, provenance in records:
        types = [type for type, _ in outputs]
        node = Node(primitive, [values[i] for i in inputs], attrs, types, frozenset(provenance))
        for value, (_, name) in zip(node.outputs, outputs, strict=True):
            value.name = name
        values += node.outputs
        nodes.append(node)
    return nodes


def _placed(places: tuple, nodes: Iterable[Node], values: list[Value]) -> Graph:
    name, *numbers = places
    inputs, params, outputs = ([values[i] for i in group] for group in numbers)
    return Graph(inputs, params, nodes, outputs, name)


def _graph(records: tuple, places: tuple) -> Graph:
    given, nodes = records
    values = [Value(type, name=name) for type, name in given]
    return _placed(places, _rebuilt(nodes, values), values)


class ProgramCache:
    """The entry for one captured graph. `load` and `store` do nothing where there is no cache, or no key."""

    def __init__(self, graph: Graph, passes: str | Sequence[Callable], donations: Sequence, target):
        self.graph = graph
        wanted = os.environ.get("KGRAPH_PROGRAM_CACHE") != "0" and not any(os.environ.get(name) for name in _WATCHED)
        self.cache = disk_cache() if wanted else None
        self.key = None if self.cache is None else self._key(passes, donations, target)

    def _key(self, passes: str | Sequence[Callable], donations: Sequence, target) -> str | None:
        arrays = [v for n in self.graph.nodes for v in n.attrs.values() if isinstance(v, np.ndarray)]
        if sum(a.nbytes for a in arrays) > LARGEST_CONSTANTS:
            return None
        names = passes if isinstance(passes, str) else [f"{p.__module__}.{p.__qualname__}" for p in passes]
        settings = [is_wanted(), *(os.environ.get(name) for name in _SETTINGS)]
        try:
            text = repr(plain((self.graph, names, list(donations), dataclasses.astuple(target), settings)))
        except _ERRORS:
            return None
        return hashlib.sha256(_environment_digest() + text.encode()).hexdigest()[:40]

    def load(self) -> Entry | None:
        """What has been stored for an equal graph, on the inputs and params of this one."""
        data = None if self.cache is None or self.key is None else self.cache.get(self.key)
        if data is None:
            return None
        try:
            lowered, preparation, decisions, graphs = pickle.loads(data)
        except (*_ERRORS, EOFError, IndexError, ImportError):  # no entry that this code has written
            return None
        if not isinstance(lowered, Lowered):
            return None
        return Entry(lowered, preparation, decisions, Graphs(lambda: self._graphs(graphs)))

    def _graphs(self, data: bytes) -> tuple[Split, list[Node]]:
        records, (prologue, main), (early, late), steps = pickle.loads(data)
        values = [*self.graph.inputs, *self.graph.params]
        nodes = _rebuilt(records, values)
        split = Split(
            prologue=_placed(prologue, [nodes[i] for i in early], values),
            main=_placed(main, [nodes[i] for i in late], values),
        )
        split.assign_names(self.graph)
        return split, [nodes[i] for i in steps]

    def store(self, entry: Entry) -> None:
        """Keep an entry, unless it holds what cannot be written."""
        if self.cache is None or self.key is None:
            return
        split = entry.graphs.split
        given = [*self.graph.inputs, *self.graph.params]
        nodes = list(dict.fromkeys([*split.prologue.nodes, *split.main.nodes]))
        number = {node: i for i, node in enumerate(nodes)}
        try:
            numbers = number_values(nodes, given)
            halves = places(split.prologue, numbers), places(split.main, numbers)
            members = [[number[n] for n in g.nodes] for g in (split.prologue, split.main)]
            steps = [number[n] for n in entry.graphs.nodes]
            graphs = _written((_records(nodes, given)[1], halves, members, steps))
            data = _written((entry.lowered, entry.preparation, entry.decisions, graphs))
        except _ERRORS:
            return
        self.cache.put(self.key, data)


@functools.cache
def _environment_digest() -> bytes:
    """Digest of this project's sources and of the versions that programs depend on."""
    versions = platform.python_version(), np.__version__, llvmlite.__version__
    return hashlib.sha256(repr(versions).encode() + index().digest).digest()


__all__ = ["ProgramCache"]
