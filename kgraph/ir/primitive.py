"""The record of a primitive, the registry of all of them, and the one entry by which they are applied."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kgraph.ir.types import TensorType, numpy_name


@dataclass(frozen=True)
class NotDifferentiable:
    """Stands in place of a gradient rule and says why there is none."""

    reason: str


@dataclass(frozen=True)
class Sample:
    """One set of concrete operands and attributes on which all derived tests of a primitive run."""

    args: tuple
    attrs: dict = field(default_factory=dict)
    name: str = ""


TRAITS = frozenset({"elementwise", "commutative", "view", "reduction", "random", "host", "control", "coarse"})


@dataclass(frozen=True, eq=False)
class Primitive:
    """A primitive operation, with every rule that the compiler and the tests derive from.

    infer: `infer(*types, **attrs)` gives the result's TensorType, or a tuple of them for several results; it raises
        ShapeError or DTypeError for operands that do not fit.
    reference: `reference(*arrays, **attrs)` evaluates on NumPy arrays, in any float precision, empty arrays included.
    gradient: `gradient(cotangents, inputs, outputs, **attrs)` gives one cotangent (or None) per input, written with
        primitives, so that it evaluates eagerly and traces; or NotDifferentiable(reason).
    traits: see TRAITS. "host" marks primitives that run through their reference on the host for good.
    samples: operands that cover the primitive's domain, odd sizes and broadcasting included.
    tolerance: error allowed to a float32 kernel against the float64 reference, relative to the largest magnitude.
    """

    name: str
    infer: Callable[..., TensorType | tuple[TensorType, ...]]
    reference: Callable[..., np.ndarray | tuple[np.ndarray, ...]]
    gradient: Callable | NotDifferentiable
    traits: frozenset
    samples: Callable[[], Iterable[Sample]]
    tolerance: float = 1e-6
    results: int = 1  # number of results; 0 where it depends on the attributes (always a tuple then)

    def __post_init__(self):
        unknown = self.traits - TRAITS
        if unknown:
            raise ValueError(f"primitive {self.name}: unknown traits {sorted(unknown)}")

    def __call__(self, *args, **attrs):
        return bind(self, *args, **attrs)

    def __repr__(self):
        return self.name

    def __deepcopy__(self, memo):
        return self


PRIMITIVES: dict[str, Primitive] = {}


def register(primitive: Primitive) -> Primitive:
    """Add a record to the registry; names are unique."""
    if primitive.name in PRIMITIVES:
        raise ValueError(f"primitive {primitive.name} is registered twice")
    PRIMITIVES[primitive.name] = primitive
    return primitive


class Tracer:
    """What records primitives while a function is traced; `frontend.tracer` implements it."""

    def record(self, primitive: Primitive, args: tuple, attrs: dict):
        """Append the application to what is traced; gives its traced result, or a tuple of them."""
        raise NotImplementedError


class Traced:
    """Base class of values under trace. Its `tracer` records what is applied to it."""

    __slots__ = ()
    tracer: Tracer

    @property
    def shape(self) -> tuple:
        raise NotImplementedError

    @property
    def dtype(self) -> Any:
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        return len(self.shape)


# Set while a trace runs: primitives without operands (iota, dim_value, random with a constant seed) are recorded in it
# when an attribute is symbolic.
current_tracer: contextvars.ContextVar[Tracer | None] = contextvars.ContextVar("kgraph_tracer", default=None)


def _as_computed(array: np.ndarray) -> np.ndarray:
    return array


# The form in which eager applications hand out what they compute; the frontend has one of its own.
_presented: Callable[[np.ndarray], np.ndarray] = _as_computed


def present_results(form: Callable[[np.ndarray], np.ndarray]) -> None:
    """Let eager applications hand out `form(array)` for an array that they compute."""
    global _presented
    _presented = form


def bind(primitive: Primitive, *args, **attrs):
    """Apply a primitive: recorded if an operand is traced or an attribute symbolic, else evaluated by its reference."""
    from kgraph.ir.dims import Dim

    for a in args:
        if isinstance(a, Traced):
            return a.tracer.record(primitive, args, attrs)
    tracer = current_tracer.get()
    if tracer is not None:
        for v in attrs.values():
            if isinstance(v, Dim) or (type(v) is tuple and any(isinstance(e, Dim) for e in v)):
                return tracer.record(primitive, args, attrs)
    arrays = [np.asarray(a) for a in args]
    # Every application is checked by the shape rule, so that an eager call fails with the same message as a traced one.
    types = [TensorType(a.shape, numpy_name(a.dtype)) for a in arrays]
    inferred = primitive.infer(*types, **attrs)
    out = primitive.reference(*arrays, **attrs)
    if isinstance(inferred, tuple):
        return tuple(_presented(_conform(o, t)) for o, t in zip(out, inferred, strict=True))
    result = _conform(out, inferred)
    # A view of an array of another kind (one that guards its memory) is of that kind too.
    guards = [a for a in args if isinstance(a, np.ndarray) and type(a) is not np.ndarray]
    if guards and np.may_share_memory(result, guards[0]):
        return result.view(type(guards[0]))
    return _presented(result)


def _conform(array, expected: TensorType) -> np.ndarray:
    return np.asarray(array, dtype=expected.np_dtype)
