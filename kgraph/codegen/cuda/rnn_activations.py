"""Activations of recurrent cells and their derivatives, as source text. They follow `kgraph.ops.recurrent_cells`."""

from __future__ import annotations

from kgraph.codegen.cuda import scalar_ops
from kgraph.codegen.recurrent import SELU_ALPHA, SELU_SCALE


def _form(name: str):
    """An elementwise primitive of one operand."""
    return lambda k, x, dtype: k.let(scalar_ops.form(k, name, [x], [dtype], dtype))


def _text(template: str):
    """An expression of @x (and @y, the activation's value); a number in backticks is a literal of the dtype."""
    pieces = template.split("`")

    def emit(k, x: str, dtype: str, y: str = "") -> str:
        words = [piece if i % 2 == 0 else k.literal(float(piece), dtype) for i, piece in enumerate(pieces)]
        return k.let("(" + "".join(words).replace("@x", x).replace("@y", y) + ")")

    return emit


def _clipped(low: str, high: str, scaled: str = "@x"):
    # Comparisons that are false for NaN keep it.
    clip = _text(f"`{low}` if @x < `{low}` else (`{high}` if @x > `{high}` else @x)")
    scale = _text(scaled)
    return lambda k, x, dtype: clip(k, scale(k, x, dtype), dtype)


def _elu(scale: float, alpha: float):
    expm1, negative = _form("expm1"), _text("`0` if @x > `0` else @x")
    choose = _text(f"`{scale!r}` * (@y if @x <= `0` else @x)")
    scaled = _text(f"`{alpha!r}` * @x")
    return lambda k, x, dtype: choose(k, x, dtype, scaled(k, expm1(k, negative(k, x, dtype), dtype), dtype))


ACTIVATIONS = {
    "linear": lambda k, x, dtype: x,
    "tanh": _form("tanh"),
    "sigmoid": _form("logistic"),
    "relu": _text("`0` if @x < `0` else @x"),
    "relu6": _clipped("0", "6"),
    "hard_sigmoid": _clipped("0", "1", "@x / `6` + `0.5`"),
    "hard_tanh": _clipped("-1", "1"),
    "softsign": _text("@x / (`1` + (-@x if @x < `0` else @x))"),
    "softplus": _form("softplus"),
    "elu": _elu(1.0, 1.0),
    "selu": _elu(SELU_SCALE, SELU_ALPHA),
    "silu": _form("silu"),
    "exponential": _form("exp"),
}


def _of_logistic(template: str):
    logistic, rule = _form("logistic"), _text(template)
    return lambda k, x, dtype, y: rule(k, logistic(k, x, dtype), dtype, y)


# f'(x) from x and y = f(x): derivative(k, x, dtype, y).
DERIVATIVES = {
    "linear": lambda k, x, dtype, y: k.literal(1, dtype),
    "tanh": _text("`1` - @y * @y"),
    "sigmoid": _text("@y * (`1` - @y)"),
    "relu": _text("`1` if @x > `0` else `0`"),
    "relu6": _text("`1` if @x > `0` and @x < `6` else `0`"),
    "hard_sigmoid": _text(f"`{1 / 6!r}` if @x > `-3` and @x < `3` else `0`"),
    "hard_tanh": _text("`1` if @x > `-1` and @x < `1` else `0`"),
    "softsign": _text("(`1` - (-@y if @y < `0` else @y)) * (`1` - (-@y if @y < `0` else @y))"),
    "softplus": _of_logistic("@x"),
    "elu": _text("`1` if @x > `0` else @y + `1`"),
    "selu": _text(f"`{SELU_SCALE!r}` if @x > `0` else @y + `{SELU_SCALE * SELU_ALPHA!r}`"),
    "silu": _of_logistic("@x + @y * (`1` - @x)"),
    "exponential": _text("@y"),
}
