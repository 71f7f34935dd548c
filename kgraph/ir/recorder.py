"""A small tracer without a frontend: records primitives into a graph. Passes and the bodies of control flow use it."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import numpy as np

from kgraph.ir.graph import Graph, Value
from kgraph.ir.primitive import PRIMITIVES, Traced, Tracer, current_tracer
from kgraph.ir.types import TensorType, dtype_name

# A constant of equal elements above this many becomes `full`, so that it takes no memory in the graph.
LARGEST_UNIFORM_CONSTANT = 16

# What recorded nodes say of their origin while gradient rules run; None: the tracer knows better.
inherited_provenance: contextvars.ContextVar[frozenset | None] = contextvars.ContextVar(
    "kgraph_inherited_provenance", default=None
)


@contextlib.contextmanager
def inheriting(provenance: frozenset) -> Iterator[None]:
    """For the duration of a `with`, all tracers give `provenance` to the nodes that they record."""
    token = inherited_provenance.set(provenance)
    try:
        yield
    finally:
        inherited_provenance.reset(token)


def uniform_value(array: np.ndarray):
    """The Python scalar that all elements of an array equal bit for bit; None if they differ.

    0.0 and -0.0 differ, and equal NaNs count as equal. array: not empty, of any shape.
    """
    if array.dtype.kind not in "biuf":
        return None
    first = array.reshape(-1)[:1]
    if array.size > 1 and all(s == 0 for s, n in zip(array.strides, array.shape) if n > 1):
        return first[0].item()
    bits = f"u{array.itemsize}" if array.itemsize in (1, 2, 4, 8) else f"S{array.itemsize}"
    flat, probe = np.ascontiguousarray(array).reshape(-1).view(bits), first.view(bits)
    if flat[-1] != probe or flat[array.size // 2] != probe or not (flat == probe).all():
        return None
    return first[0].item()


class RecordedValue(Traced):
    """A value of a graph while it is recorded; rules need no more than its shape and dtype."""

    __slots__ = ("tracer", "value")

    def __init__(self, tracer: Recorder, value: Value):
        self.tracer, self.value = tracer, value

    @property
    def shape(self) -> tuple:
        return self.value.shape

    @property
    def dtype(self) -> str:
        return self.value.dtype


class Recorder(Tracer):
    """Records primitives into one graph, whose inputs are the only outer values it sees.

    graph: the graph to append to; a new one by default.
    """

    def __init__(self, name: str = "graph", graph: Graph | None = None):
        self.graph = Graph(name=name) if graph is None else graph

    def input(self, type: TensorType, name: str = "") -> RecordedValue:
        """A new input of the graph."""
        value = Value(type, name=name)
        self.graph.inputs.append(value)
        return RecordedValue(self, value)

    def wrap(self, value: Value) -> RecordedValue:
        """A value of the graph as an operand."""
        return RecordedValue(self, value)

    def value(self, x) -> Value:
        """The value of an operand; a concrete array becomes a constant."""
        if isinstance(x, RecordedValue):
            return x.value
        array = np.asarray(x)
        if array.size > LARGEST_UNIFORM_CONSTANT and (fill := uniform_value(array)) is not None:
            attrs = {"shape": array.shape, "value": fill, "dtype": dtype_name(array.dtype)}
            return self.graph.add(PRIMITIVES["full"], (), self._provenance(), **attrs)
        return self.graph.add(PRIMITIVES["constant"], (), self._provenance(), value=array)

    def record(self, primitive, args, attrs):
        out = self.graph.add(primitive, [self.value(a) for a in args], self._provenance(), **attrs)
        return tuple(self.wrap(o) for o in out) if isinstance(out, tuple) else self.wrap(out)

    @contextlib.contextmanager
    def active(self) -> Iterator[Recorder]:
        """Make this the tracer that records, for the duration of a `with`."""
        token = current_tracer.set(self)
        try:
            yield self
        finally:
            current_tracer.reset(token)

    @staticmethod
    def _provenance() -> frozenset:
        return inherited_provenance.get() or frozenset()
