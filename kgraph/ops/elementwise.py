"""Makers of elementwise records: one call per primitive, all its rules on adjacent lines.

`unary`, `binary` and `comparison` register a record and give the public function of that name, with a docstring made
from the record's own facts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

import numpy as np

from kgraph.errors import DTypeError
from kgraph.ir import NotDifferentiable, Primitive, Sample, TensorType, bind, register
from kgraph.ir.types import COMPLEX, FLOATS, INTS
from kgraph.ops.common import (
    BOOL,
    INEXACT,
    Array,
    booleans,
    broadcast_shapes,
    describe,
    integers,
    listing,
    require_dtype,
    require_same_dtype,
    special,
    unbroadcast,
    uniform,
    widened,
)

ZERO: Callable = lambda *_: None  # the derivative is zero wherever it exists
Domain: TypeAlias = tuple[float, float]
Unary: TypeAlias = Callable[[Array], Array]
Binary: TypeAlias = Callable[[Array, Array], Array]
Result: TypeAlias = str | Callable[[str], str] | None


def elementwise_infer(
    name: str, operands: int, dtypes: frozenset, result: Result = None, attrs: tuple = ()
) -> Callable:
    """The shape rule of an elementwise primitive: NumPy broadcasting, one dtype out of `dtypes`.

    result: the result's dtype, or a function from the operands' dtype; None keeps it. attrs: names of attributes.
    """

    def infer(*types: TensorType, **given) -> TensorType:
        if len(types) != operands or given.keys() != set(attrs):
            raise TypeError(f"{name} takes {operands} operands and attributes {attrs}, got {len(types)} and {given}")
        dtype = require_same_dtype(name, *types)
        require_dtype(name, dtypes, *types)
        shape = types[0].shape if len(types) == 1 else broadcast_shapes(name, *types)
        return TensorType(shape, result(dtype) if callable(result) else result or dtype)

    return infer


def unary_samples(dtypes: frozenset, domain: Domain, **attrs) -> list[Sample]:
    """Odd sizes, a scalar, an empty array, special values, narrow floats, ints, bools, complex numbers."""
    low, high = domain
    out = []
    if "float32" in dtypes:
        out = [Sample((uniform(shape, low, high),), attrs) for shape in [(3, 5), (2, 3, 17), ()]]
        out.append(Sample((uniform((0, 3)),), attrs, "empty"))
        out.append(Sample((special(),), attrs, "special"))
        out += [Sample((uniform((19,), low, high, d),), attrs, d) for d in ("float16", "bfloat16")]
    if "int32" in dtypes:
        out.append(Sample((integers((3, 7)),), attrs, "int32"))
        out.append(Sample((np.array([-(2**31), -1, 0, 2**31 - 1], "int32"),), attrs, "special"))
    if "uint8" in dtypes:
        out.append(Sample((integers((37,), 0, 256, "uint8"),), attrs, "uint8"))
    if "bool" in dtypes:
        out += [Sample((booleans((3, 7)),), attrs, "bool"), Sample((booleans((0,)),), attrs, "empty")]
    if "complex64" in dtypes:
        out.append(Sample((uniform((3, 5), low, high, "complex64"),), attrs, "complex64"))
    return out


def binary_samples(dtypes: frozenset, x: Domain, y: Domain) -> list[Sample]:
    """Equal shapes, broadcasting each way, scalars, empty arrays, special values against each other, other dtypes."""
    out = []
    shapes: list[tuple] = [((3, 5), (3, 5)), ((2, 3, 17), (17,)), ((3, 1), (2, 1, 5)), ((), (7,)), ((4, 3), ())]
    if "float32" in dtypes:
        out = [Sample((uniform(a, *x), uniform(b, *y, seed=1))) for a, b in shapes]
        out.append(Sample((uniform((0, 3)), uniform((3,))), name="empty"))
        out.append(Sample((special()[:, None], special()), name="special"))
        out += [Sample((uniform((5, 3), *x, d), uniform((3,), *y, d, seed=1)), name=d) for d in ("float16", "bfloat16")]
    if "int32" in dtypes:
        out.append(Sample((integers((3, 7)), integers((7,), 1, 8, seed=1)), name="int32"))
        out.append(Sample((integers((7,)), integers((3, 7), -5, 0, seed=1)), name="int32"))
    if "uint8" in dtypes:
        out.append(Sample((integers((37,), 0, 256, "uint8"), integers((37,), 1, 7, "uint8", seed=1)), name="uint8"))
    if "bool" in dtypes:
        out.append(Sample((booleans((5, 7)), booleans((7,), seed=1)), name="bool"))
        out.append(Sample((booleans((0, 7)), booleans((7,), seed=1)), name="empty"))
    if "complex64" in dtypes:
        out.append(Sample((uniform((3, 5), *x, "complex64"), uniform((5,), *y, "complex64", seed=1)), name="complex64"))
    return out


def unary(
    name: str,
    reference: Callable[[np.ndarray], np.ndarray],
    gradient: Callable | NotDifferentiable,
    doc: str,
    *,
    dtypes: frozenset = INEXACT,
    result: Result = None,
    domain: Domain = (-2.0, 2.0),
    traits: Iterable[str] = (),
    samples: Callable[[], list[Sample]] | None = None,
    widen: bool = True,
    tolerance: float = 1e-6,
) -> Unary:
    """Register an elementwise primitive of one operand and give its function.

    gradient: `gradient(cotangent, x, y)` gives x's cotangent, y being the result.
    domain: where the samples lie, away from poles and kinks.
    """
    record = register(
        Primitive(
            name,
            infer=elementwise_infer(name, 1, dtypes, result),
            reference=widened(reference) if widen else reference,
            gradient=unary_gradient(gradient),
            traits=frozenset({"elementwise", *traits}),
            samples=samples or (lambda: unary_samples(dtypes, domain)),
            tolerance=tolerance,
        )
    )

    def function(x: Array) -> Array:
        return bind(record, x)

    return _public(function, name, doc, f"x: any shape, {describe(dtypes)}.", result)


def unary_gradient(gradient: Callable | NotDifferentiable) -> Callable | NotDifferentiable:
    """`gradient(cotangent, x, y, **attrs)` as a record's gradient rule."""
    if isinstance(gradient, NotDifferentiable):
        return gradient

    def vjp(cotangents, inputs, outputs, **attrs):
        return (gradient(cotangents[0], inputs[0], outputs[0], **attrs),)

    return vjp


def binary(
    name: str,
    reference: Callable[[np.ndarray, np.ndarray], np.ndarray],
    gradient: Callable | NotDifferentiable,
    doc: str,
    *,
    dtypes: frozenset = FLOATS | INTS | COMPLEX,
    result: Result = None,
    x: Domain = (-2.0, 2.0),
    y: Domain = (-2.0, 2.0),
    traits: Iterable[str] = (),
    samples: Callable[[], list[Sample]] | None = None,
    widen: bool = True,
    tolerance: float = 1e-6,
) -> Binary:
    """Register a broadcasting elementwise primitive of two operands and give its function.

    gradient: `gradient(cotangent, x, y, z)` gives the two cotangents, not yet summed over broadcast axes.
    x, y: intervals of the samples' operands.
    """
    record = register(
        Primitive(
            name,
            infer=elementwise_infer(name, 2, dtypes, result),
            reference=widened(reference) if widen else reference,
            gradient=binary_gradient(gradient),
            traits=frozenset({"elementwise", *traits}),
            samples=samples or (lambda: binary_samples(dtypes, x, y)),
            tolerance=tolerance,
        )
    )

    def function(x: Array, y: Array) -> Array:
        return bind(record, x, y)

    facts = f"x, y: shapes that broadcast, one dtype, {describe(dtypes)}."
    return _public(function, name, doc, facts, result)


def binary_gradient(gradient: Callable | NotDifferentiable) -> Callable | NotDifferentiable:
    """`gradient(cotangent, x, y, z)` as a record's gradient rule, summed over broadcast axes."""
    if isinstance(gradient, NotDifferentiable):
        return gradient

    def vjp(cotangents, inputs, outputs, **attrs):
        both = gradient(cotangents[0], *inputs, outputs[0], **attrs)
        return tuple(unbroadcast(c, operand) for c, operand in zip(both or (None, None), inputs, strict=True))

    return vjp


def comparison(name: str, reference: Callable, doc: str, *, dtypes: frozenset, traits: Iterable[str] = ()) -> Binary:
    """Register an elementwise primitive of two operands with a bool result."""
    no_gradient = NotDifferentiable("its result is bool")
    return binary(name, reference, no_gradient, doc, dtypes=dtypes, result="bool", traits=traits)


def ternary_infer(name: str) -> Callable:
    """The shape rule of `select`: a bool operand, then two of one dtype, all broadcasting."""

    def infer(pred: TensorType, on_true: TensorType, on_false: TensorType) -> TensorType:
        types = (pred, on_true, on_false)
        if pred.dtype not in BOOL:
            raise DTypeError(f"{name}({listing(types)}): expected a bool predicate, got {pred.dtype}")
        dtype = require_same_dtype(name, on_true, on_false)
        return TensorType(broadcast_shapes(name, *types), dtype)

    return infer


def _public(function: Callable, name: str, doc: str, facts: str, result) -> Callable:
    kept = "bool" if result == "bool" else "the matching real or complex dtype" if result else "that dtype"
    function.__name__ = function.__qualname__ = name
    function.__doc__ = (
        f"{doc}\n\n    {facts} Gives {kept}.\n"
        "    Raises DTypeError for other dtypes and ShapeError for shapes that do not broadcast.\n    "
    )
    return function
