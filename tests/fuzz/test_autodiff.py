"""Gradients of random graphs of differentiable primitives.

Every seed draws a graph with a float scalar as output. Its gradient by all inputs is checked against central
differences in float64 along random directions; and, for some seeds, the compiled joint graph in float32 against the
interpreter.
"""

from __future__ import annotations

import numpy as np
import pytest

import kgraph  # noqa: F401
from kgraph import ops
from kgraph.compiler import compile_graph
from kgraph.frontend.tracer import trace
from kgraph.ir import Dim, Graph, TensorType
from kgraph.ir.interpreter import evaluate
from kgraph.ir.verifier import verify
from kgraph.passes.autodiff import differentiate
from kgraph.passes.pipeline import INFERENCE, TRAINING

N = Dim.symbol("N")
BATCH = 3
SEEDS = 150
COMPILED_SEEDS = 8
UNARY = (
    "sin cos tanh logistic erf atan softplus silu relu neg square_like exp_of_tanh log_of_square rsqrt_of_square "
    "gelu elu leaky_relu abs asinh log1p_of_square"
).split()
BINARY = "add sub mul maximum minimum safe_div logaddexp hypot_like atan2_like select pow_of_positive".split()


def scalar(value):
    return np.float32(value)


def positive(x):
    """x^2 + 1/2"""
    return ops.add(ops.mul(x, x), scalar(0.5))


UNARY_RULES = {
    "square_like": lambda x: ops.mul(x, ops.sin(x)),
    "exp_of_tanh": lambda x: ops.exp(ops.tanh(x)),
    "log_of_square": lambda x: ops.log(positive(x)),
    "rsqrt_of_square": lambda x: ops.rsqrt(positive(x)),
    "log1p_of_square": lambda x: ops.log1p(ops.mul(x, x)),
    "gelu": lambda x: ops.gelu(x, approximate=False),
    "elu": lambda x: ops.elu(x, alpha=0.7),
    "leaky_relu": lambda x: ops.leaky_relu(x, negative_slope=0.2),
}
BINARY_RULES = {
    "safe_div": lambda x, y: ops.div(x, positive(y)),
    "hypot_like": lambda x, y: ops.hypot(positive(x), y),
    "atan2_like": lambda x, y: ops.atan2(x, positive(y)),
    "select": lambda x, y: ops.select(ops.lt(x, y), ops.sin(x), ops.mul(x, y)),
    "pow_of_positive": lambda x, y: ops.pow(positive(ops.tanh(x)), ops.tanh(y)),
}


class Drawing:
    """Draws operations on a pool of traced float tensors whose first axis may be N."""

    def __init__(self, rng: np.random.Generator, pool: list):
        self.rng, self.pool = rng, pool

    def pick(self, rank=None):
        fitting = [x for x in self.pool if rank is None or len(x.shape) == rank]
        # The latest values are likelier, so that graphs grow deep.
        return fitting[-1 - min(int(self.rng.geometric(0.35)) - 1, len(fitting) - 1)] if fitting else None

    def axis(self, x) -> int:
        return int(self.rng.integers(len(x.shape)))

    def static_axis(self, x) -> int | None:
        axes = [i for i, s in enumerate(x.shape) if isinstance(s, int) and s > 1]
        return int(self.rng.choice(axes)) if axes else None

    # -- operations; each gives a tensor or None where nothing fits ------------------------------------------------
    def unary(self):
        name, x = str(self.rng.choice(UNARY)), self.pick()
        return UNARY_RULES[name](x) if name in UNARY_RULES else getattr(ops, name)(x)

    def binary(self):
        name, x = str(self.rng.choice(BINARY)), self.pick()
        same = [y for y in self.pool if _broadcasts(x.shape, y.shape)]
        y = same[int(self.rng.integers(len(same)))]
        return BINARY_RULES[name](x, y) if name in BINARY_RULES else getattr(ops, name)(x, y)

    def reduction(self):
        x = self.pick()
        if not x.shape:
            return None
        axes, keepdims = (self.axis(x),), bool(self.rng.integers(2))
        name = str(self.rng.choice(["reduce_sum", "reduce_max", "reduce_min", "logsumexp"]))
        return ops.mul(getattr(ops, name)(x, axes=axes, keepdims=keepdims), scalar(0.3))

    def along_axis(self):
        x = self.pick()
        if not x.shape:
            return None
        axis = self.axis(x)
        return {
            0: lambda: ops.softmax(x, axis=axis),
            1: lambda: ops.log_softmax(x, axis=axis),
            2: lambda: ops.mul(ops.cumsum(x, axis=axis, reverse=bool(self.rng.integers(2))), scalar(0.3)),
            3: lambda: ops.rev(x, axes=(axis,)),
            4: lambda: ops.sort(x, axis=axis, descending=False),
        }[int(self.rng.integers(5))]()

    def movement(self):
        x = self.pick()
        rank, axis = len(x.shape), self.static_axis(x)
        if axis is None:
            return None
        along = lambda value, other: tuple(value if i == axis else other for i in range(rank))
        return {
            0: lambda: ops.transpose(x, permutation=tuple(int(i) for i in self.rng.permutation(rank))),
            1: lambda: ops.slice(x, start=along(1, 0), limit=tuple(x.shape), stride=(1,) * rank),
            2: lambda: ops.pad(x, scalar(0.1), low=along(1, 0), high=along(2, 0), interior=along(1, 0)),
            3: lambda: ops.concatenate(x, ops.sin(x), axis=axis),
            4: lambda: ops.take(x, np.array([1, 0, 1], np.int32), axis=axis, mode="clip"),
            5: lambda: ops.reshape(x, shape=(*x.shape[:axis], 1, *x.shape[axis:])) if rank < 3 else None,
        }[int(self.rng.integers(6))]()

    def product(self):
        x = self.pick()
        axis = self.static_axis(x)
        matches = [(y, i) for y in self.pool for i, s in enumerate(y.shape) if axis is not None and s == x.shape[axis]]
        matches = [(y, i) for y, i in matches if len(x.shape) + len(y.shape) <= 5 and all(s != N for s in y.shape)]
        if not matches:
            return None
        y, other = matches[int(self.rng.integers(len(matches)))]
        return ops.tanh(ops.dot_general(x, y, lhs_contract=(axis,), rhs_contract=(other,)))

    def image(self):
        x = self.pick(3)
        if x is None or not isinstance(x.shape[1], int) or not isinstance(x.shape[2], int) or x.shape[1] < 3:
            return None
        channels = x.shape[2]
        w = ops.constant(self.rng.uniform(-0.5, 0.5, (2, channels, 2)), "float32")
        window = {"window": (1, 2, 1), "strides": (1, 2, 1), "padding": ((0, 0),) * 3}
        return {
            0: lambda: ops.conv(x, ops.tanh(w), strides=1, padding="same"),
            1: lambda: ops.conv(x, w, strides=2, padding="valid"),
            2: lambda: ops.reduce_window(x, kind="max", **window, window_dilation=(1,) * 3, base_dilation=(1,) * 3),
            3: lambda: ops.layer_norm(x, np.ones(channels, "f4"), np.ones(channels, "f4"), axes=(2,), epsilon=0.1),
        }[int(self.rng.integers(4))]()


OPERATIONS = (
    ("unary", 6), ("binary", 6), ("reduction", 2), ("along_axis", 2), ("movement", 3), ("product", 2), ("image", 2)
)  # fmt: skip


def _broadcasts(a: tuple, b: tuple) -> bool:
    return len(b) <= len(a) and all(s in (1, t) for s, t in zip(b[::-1], a[::-1]))


def random_graph(seed: int) -> Graph:
    """A graph of float inputs (the first has a batch axis) with one scalar output."""
    rng = np.random.default_rng(seed)
    length, width = int(rng.integers(3, 7)), int(rng.integers(2, 5))
    shapes = [(N, length, width), (length, width), (width,), ()][: int(rng.integers(2, 5))]
    names, weights = zip(*OPERATIONS)

    def function(*inputs):
        drawing = Drawing(rng, list(inputs))
        for _ in range(int(rng.integers(4, 16))):
            chosen = str(rng.choice(names, p=np.array(weights) / sum(weights)))
            new = getattr(drawing, chosen)()
            if new is not None:
                drawing.pool.append(new)
        ends = [x for x in drawing.pool[-3:] if not isinstance(x, np.ndarray)]
        totals = [ops.reduce_sum(ops.sin(x), axes=tuple(range(len(x.shape))), keepdims=False) for x in ends]
        loss = totals[0]
        for t in totals[1:]:
            loss = ops.add(loss, t)
        return loss

    return trace(function, *(TensorType(s, "float32") for s in shapes), name=f"gradient_{seed}")


def operands(graph: Graph, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng((seed, 1))
    return [rng.normal(size=tuple(s if isinstance(s, int) else BATCH for s in v.shape)) for v in graph.inputs]


def slope(graph: Graph, arrays: list, which: int, direction: np.ndarray, step: float) -> float:
    """Central differences of two steps, extrapolated: the error is of fourth order."""
    ends = []
    for s in (step, -step, step / 2, -step / 2):
        moved = [a + s * direction if i == which else a for i, a in enumerate(arrays)]
        ends.append(evaluate(graph, moved, precision="float64")[0])
    return (4 * (ends[2] - ends[3]) / step - (ends[0] - ends[1]) / (2 * step)) / 3


@pytest.mark.parametrize("block", range(10))
def test_gradients_against_central_differences(block):
    for seed in range(block * SEEDS // 10, (block + 1) * SEEDS // 10):
        graph = random_graph(seed)
        joint = differentiate(graph, graph.inputs)
        verify(joint)
        arrays = operands(graph, seed)
        gradients = evaluate(joint, arrays, precision="float64")[1:]
        rng = np.random.default_rng((seed, 2))
        for which, gradient in enumerate(gradients):
            direction = rng.standard_normal(arrays[which].shape)
            got, scale = np.sum(gradient * direction), max(1.0, float(np.sum(np.abs(gradient * direction))))
            # A maximum or a branch may change within a step; smaller steps, which round more, then decide.
            for step, tolerance in ((1e-5, 1e-7), (1e-6, 1e-6), (1e-7, 1e-5)):
                error = abs(got - slope(graph, arrays, which, direction, step))
                if error <= tolerance * scale:
                    break
            assert error <= tolerance * scale, f"seed {seed}, input {which}: {got} is wrong by {error}"


@pytest.mark.parametrize("passes", [INFERENCE, TRAINING], ids=["inference", "training"])
def test_compiled_joint_graphs(passes):
    for seed in range(COMPILED_SEEDS):
        graph = random_graph(seed)
        joint = differentiate(graph, graph.inputs)
        arrays = [a.astype(np.float32) for a in operands(graph, seed)]
        wanted = evaluate(joint, arrays, precision="float64")
        compiled = compile_graph(joint, passes=passes)
        compiled.set_params([])
        got = compiled.program(tuple(arrays))
        for a, b in zip(wanted, got, strict=True):
            scale = max(1.0, float(np.max(np.abs(a), initial=0.0)))
            np.testing.assert_allclose(b, a, rtol=1e-3, atol=2e-5 * scale, err_msg=f"seed {seed}")
