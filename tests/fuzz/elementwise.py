"""Elementwise operations of random graphs."""

from __future__ import annotations

import math

from kgraph import ops
from tests.fuzz.building import FLOATS, Builder, Fact, SkipOperation
from tests.fuzz.operations import (
    ANY,
    INTS,
    NUMBERS,
    broadcastable,
    grids,
    operation,
    partner,
    small,
)

# name: (largest magnitude of the operand, bound of the result from that of the operand)
SMOOTH = {
    "exp": (3, math.exp),
    "exp2": (4, lambda m: 2.0**m),
    "expm1": (3, math.exp),
    "sin": (32, lambda m: 1),
    "cos": (32, lambda m: 1),
    "atan": (32, lambda m: 2),
    "sinh": (3, math.cosh),
    "cosh": (3, math.cosh),
    "tanh": (32, lambda m: 1),
    "asinh": (32, lambda m: math.asinh(m) + 0.1),
    "erf": (32, lambda m: 1),
    "erfc": (3, lambda m: 2),
    "logistic": (32, lambda m: 1),
    "silu": (32, lambda m: m + 1),
    "softplus": (32, lambda m: m + 1),
    "relu": (32, lambda m: m),
    "relu6": (32, lambda m: 6),
    "elu": (32, lambda m: m + 1),
    "leaky_relu": (32, lambda m: m),
    "gelu": (32, lambda m: m + 1),
    "neg": (32, lambda m: m),
    "abs": (32, lambda m: m),
    "stop_gradient": (32, lambda m: m),
    "optimization_barrier": (32, lambda m: m),
}
KEEPS_GRID = {"relu", "neg", "abs", "stop_gradient", "optimization_barrier"}


@operation(6)
def smooth(b: Builder):
    name = b.choice(sorted(SMOOTH))
    limit, bound = SMOOTH[name]
    x, fact = small(b, b.pick_float(), limit)
    attrs = {}
    if name == "gelu":
        attrs = {"approximate": b.chance(0.5)}
    elif name == "elu":
        attrs = {"alpha": 0.5}
    elif name == "leaky_relu":
        attrs = {"negative_slope": 0.25}
    b.keep(getattr(ops, name)(x, **attrs), Fact(bound(fact.bound), fact.grid if name in KEEPS_GRID else None))


@operation(2)
def positive_domain(b: Builder):
    """Functions with a pole or branch at zero, on |x| + c."""
    x, _ = small(b, b.pick_float(), 30)
    shifted = ops.add(ops.abs(x), b.constant(0.5, b.dtype_of(x)))
    name = b.choice(("log", "log2", "log1p", "sqrt", "rsqrt", "cbrt", "lgamma", "digamma"))
    bound = {"sqrt": 6, "lgamma": 80, "cbrt": 4}.get(name, 6)
    b.keep(getattr(ops, name)(shifted), Fact(bound))


@operation(1)
def unit_domain(b: Builder):
    """Functions on (-1, 1), or on (1, inf)."""
    x, _ = small(b, b.pick_float(), 0.9)
    name = b.choice(("asin", "acos", "atanh", "erf_inv", "tan", "acosh"))
    if name == "acosh":
        x = ops.add(ops.abs(x), b.constant(1.25, b.dtype_of(x)))
    b.keep(getattr(ops, name)(x), Fact(4))


@operation(8)
def arithmetic(b: Builder):
    x = b.pick(*NUMBERS)
    y = partner(b, x)
    if b.chance(0.5):
        x, y = y, x
    f, g = b.fact(x), b.fact(y)
    name = b.choice(("add", "sub", "mul", "maximum", "minimum"))
    grid = grids(f, g)
    if name == "mul":
        bound, grid = f.bound * g.bound, (f.grid + g.grid if grid is not None else None)
    else:
        bound = f.bound + g.bound if name in ("add", "sub") else max(f.bound, g.bound)
    b.keep(getattr(ops, name)(x, y), Fact(bound, grid))


@operation(2)
def division(b: Builder):
    x = b.pick_float()
    y = partner(b, x)
    dtype = b.dtype_of(x)
    below = ops.add(ops.abs(y), b.constant(0.5, dtype))
    name = b.choice(("div", "atan2", "hypot", "logaddexp", "pow"))
    f, g = b.fact(x), b.fact(y)
    if name == "div":
        b.keep(ops.div(x, below), Fact(f.bound * 2))
    elif name == "atan2":
        b.keep(ops.atan2(x, below), Fact(4))
    elif name == "pow":
        exponent = b.constant(b.choice((2.0, 3.0, 0.5, -0.5, -1.0, 1.0, 0.0, 1.5)), dtype)
        base, _ = small(b, x, 30)
        base = ops.add(ops.abs(base), b.constant(0.5, dtype))
        b.keep(ops.pow(base, exponent), Fact(max(f.bound + 0.5, 2) ** 3))
    else:
        b.keep(getattr(ops, name)(x, y), Fact(f.bound + g.bound + 1))


@operation(2)
def integer_arithmetic(b: Builder):
    x = b.pick(*INTS)
    y = partner(b, x)
    dtype = b.dtype_of(x)
    f, g = b.fact(x), b.fact(y)
    name = b.choice("floor_divide mod rem bitwise_and bitwise_or bitwise_xor shift_left shift_right".split())
    if name in ("floor_divide", "mod", "rem"):
        y = ops.add(ops.abs(y), b.constant(1, dtype)) if b.chance(0.7) else b.constant(b.choice((-3, 2, 7)), dtype)
        return b.keep(getattr(ops, name)(x, y), Fact(max(f.bound, g.bound + 1, 7), 0))
    if name.startswith("shift"):
        y = ops.bitwise_and(y, b.constant(3, dtype))
        return b.keep(getattr(ops, name)(x, y), Fact(f.bound * (8 if name == "shift_left" else 1), 0))
    return b.keep(getattr(ops, name)(x, y), Fact(2 ** math.ceil(math.log2(max(f.bound, g.bound) + 1)), 0))


@operation(1)
def float_remainder(b: Builder):
    x = b.pick_float(exact=True)
    name = b.choice(("floor_divide", "mod", "rem"))
    y = b.constant(b.choice((0.75, -1.5, 2.0)), b.dtype_of(x))
    f = b.fact(x)
    # The quotient itself is rounded where the elements are large, so that only small ones have one right answer.
    if f.bound * 2**f.grid > 2**6:
        raise SkipOperation
    grid = 0 if name == "floor_divide" else max(f.grid, 2)
    b.keep(getattr(ops, name)(x, y), Fact(f.bound * 2 + 2, grid))


@operation(1)
def rounding(b: Builder):
    x = b.pick_float(exact=True)
    name = b.choice("floor ceil trunc round_nearest_even sign".split())
    b.keep(getattr(ops, name)(x), Fact(b.fact(x).bound + 1, 0))


@operation(1)
def bits(b: Builder):
    x = b.pick(*INTS, "bool")
    if b.dtype_of(x) == "bool":
        return b.keep(ops.logical_not(x), Fact(1, 0))
    name = b.choice(("bitwise_not", "neg", "abs", "sign"))
    return b.keep(getattr(ops, name)(x), Fact(b.fact(x).bound + 1, 0))


@operation(3)
def comparison(b: Builder):
    x = b.pick(*NUMBERS, exact=True)
    y = partner(b, x, exact=True)
    if not b.exact(y):
        raise SkipOperation
    b.keep(getattr(ops, b.choice("eq ne lt le gt ge".split()))(x, y), Fact(1, 0))


@operation(1)
def logic(b: Builder):
    x = b.pick("bool")
    y = partner(b, x)
    b.keep(getattr(ops, b.choice(("logical_and", "logical_or", "logical_xor")))(x, y), Fact(1, 0))


@operation(1)
def classify(b: Builder):
    b.keep(getattr(ops, b.choice(("is_finite", "is_nan", "is_inf")))(b.pick_float()), Fact(1, 0))


@operation(3)
def select(b: Builder):
    x = b.pick(*ANY)
    y = partner(b, x)
    shape = x if len(x.shape) >= len(y.shape) else y
    try:
        p = b.pick(
            "bool", where=lambda v: broadcastable(b, shape, v) and broadcastable(b, x, v) and broadcastable(b, y, v)
        )
    except SkipOperation:
        if not b.exact(x) or b.dtype_of(x) == "bool":
            raise
        p = ops.gt(x, b.constant(0, b.dtype_of(x)))
    f, g = b.fact(x), b.fact(y)
    b.keep(ops.select(p, x, y), Fact(max(f.bound, g.bound), grids(f, g)))


@operation(3)
def conversion(b: Builder):
    x = b.pick(*ANY)
    target = b.choice(ANY)
    if target in FLOATS and b.dtype_of(x) in FLOATS and b.chance(0.5):
        target = b.dtype
    b.as_type(x, target)


@operation(0.3)
def bit_pattern(b: Builder):
    x = b.pick("int32", "float32", exact=True)
    if b.dtype_of(x) == "float32":
        y = ops.bitwise_and(ops.bitcast_convert(x, dtype="int32"), b.constant(0xFF << 20, "int32"))
        return b.keep(ops.shift_right(y, b.constant(20, "int32")), Fact(256, 0))
    y = ops.bitcast_convert(ops.add(ops.abs(x), b.constant(0x3F800000, "int32")), dtype="float32")
    return b.keep(y, Fact(2))
