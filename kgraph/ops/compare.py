"""Elementwise comparisons, logic, and `select`."""

from __future__ import annotations

import numpy as np

from kgraph import ops
from kgraph.ir import NotDifferentiable, Primitive, Sample, bind, register
from kgraph.ops.common import ANY, BOOL, ORDERED, Array, booleans, integers, like, special, unbroadcast, uniform
from kgraph.ops.elementwise import comparison, ternary_infer, unary

# Comparisons of NaN are false, except `ne`.
eq = comparison("eq", np.equal, "Whether x == y.", dtypes=ANY, traits={"commutative"})
ne = comparison("ne", np.not_equal, "Whether x != y.", dtypes=ANY, traits={"commutative"})
lt = comparison("lt", np.less, "Whether x < y.", dtypes=ORDERED)
le = comparison("le", np.less_equal, "Whether x <= y.", dtypes=ORDERED)
gt = comparison("gt", np.greater, "Whether x > y.", dtypes=ORDERED)
ge = comparison("ge", np.greater_equal, "Whether x >= y.", dtypes=ORDERED)

logical_and = comparison("logical_and", np.logical_and, "x and y.", dtypes=BOOL, traits={"commutative"})
logical_or = comparison("logical_or", np.logical_or, "x or y.", dtypes=BOOL, traits={"commutative"})
logical_xor = comparison("logical_xor", np.logical_xor, "Whether x and y differ.", dtypes=BOOL, traits={"commutative"})
logical_not = unary("logical_not", np.logical_not, NotDifferentiable("its result is bool"), "not x.", dtypes=BOOL)


def _select_gradient(cotangents, inputs, outputs):
    (c,) = cotangents
    pred, on_true, on_false = inputs
    zero = like(c, 0)
    return (
        None,
        unbroadcast(ops.select(pred, c, zero), on_true),
        unbroadcast(ops.select(pred, zero, c), on_false),
    )


def _select_samples() -> list[Sample]:
    return [
        Sample((booleans((3, 5)), uniform((3, 5)), uniform((3, 5), seed=1))),
        Sample((booleans((3, 1)), uniform((17,)), uniform((), seed=1))),
        Sample((booleans(()), uniform((2, 3, 5)), uniform((3, 1), seed=1))),
        Sample((booleans((7,)), integers((7,)), integers((3, 7), seed=1)), name="int32"),
        Sample((booleans((7,)), booleans((7,), seed=2), booleans((7,), seed=1)), name="bool"),
        Sample((booleans((7,)), uniform((7,), dtype="bfloat16"), uniform((), dtype="bfloat16")), name="bfloat16"),
        Sample((booleans((0, 3)), uniform((3,)), uniform((1, 3), seed=1)), name="empty"),
        Sample((booleans((15,)), special(), special()[::-1].copy()), name="special"),
    ]


SELECT = register(
    Primitive(
        "select",
        infer=ternary_infer("select"),
        reference=np.where,
        gradient=_select_gradient,
        traits=frozenset({"elementwise"}),
        samples=_select_samples,
        tolerance=0.0,
    )
)


def select(pred: Array, on_true: Array, on_false: Array) -> Array:
    """on_true where pred holds, else on_false.

    pred: bool. on_true, on_false: one dtype, any. The three shapes broadcast. Gives the dtype of on_true.
    Raises DTypeError for a predicate that is not bool or two dtypes, ShapeError for shapes that do not broadcast.
    """
    return bind(SELECT, pred, on_true, on_false)
