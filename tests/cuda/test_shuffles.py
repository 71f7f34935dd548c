"""Warps of 32 threads in the simulator: what they exchange, and reductions and scans whose lanes are merged so."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kgraph import ops
from kgraph.codegen.cuda import families
from kgraph.codegen.cuda.shuffles import Shuffles
from kgraph.codegen.cuda.source import KernelSource
from kgraph.codegen.cuda.target import make_target, simulator_target
from kgraph.ir import PRIMITIVES, TensorType, Value, make_node
from kgraph.runtime.cuda.device import Argument, device_for
from tests.codegen.samples import compare
from tests.cuda.driver import ON_GPU, run_node

assert ops
WARP = 32
# One warp, four, and four that work on rows of at least some elements together.
TARGETS = {block: replace(simulator_target(), block=block, group=WARP) for block in (32, 128)}
DTYPES = ["float32", "float64", "float16", "bfloat16", "int8", "uint16", "int32", "uint32", "int64", "uint64", "bool"]


def values(shape, dtype, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    if dtype == "bool":
        return random.integers(0, 2, shape).astype(bool)
    wide = TensorType((), dtype).np_dtype
    if np.dtype(wide).kind in "iu":
        most = np.iinfo(wide)
        return random.integers(most.min, most.max, shape, wide, endpoint=True)
    return random.normal(size=shape).astype(wide)


# -- exchanges --------------------------------------------------------------------------------------------------------
def exchange(dtype: str, by: int, kind: str, block: int = 64):
    """The source of out[t] = what thread t gets, and the function that says from whom."""
    target = make_target((9, 0)) if ON_GPU else replace(simulator_target(), block=block, group=WARP)
    k = KernelSource("exchange", target, block)
    x, out = k.operand(dtype), k.operand(dtype)
    thread = k.thread()
    shuffles = Shuffles(k, thread)
    k.store(out, thread, getattr(shuffles, kind)(k.load(x, thread), k_dtype(dtype), k.i(by)))
    return k.text(), target


def k_dtype(dtype: str) -> str:
    return "float32" if dtype in ("float16", "bfloat16") else dtype


def source_of(t: int, by: int, kind: str) -> int:
    place = t % WARP
    if kind == "of":
        return t - place + by
    moved = place + by if kind == "down" else place - by
    return t - place + moved if 0 <= moved < WARP else t


@pytest.mark.parametrize("kind", ["down", "up", "of"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_exchanges(dtype, kind):
    from kgraph.codegen.cuda.compiler import compile_text

    device = device_for("cuda" if ON_GPU else "cuda-simulator")
    x = values((64,), dtype)
    for by in (0, 1, 5, 31):
        text, target = exchange(dtype, by, kind)
        function = device.load({"exchange": compile_text(text, "exchange", target)})["exchange"]
        places = [device.allocate(x.nbytes) for _ in range(2)]
        device.copy_in(places[0], x)
        device.launch(function, 1, 64, 0, [Argument(p, x.nbytes, dtype) for p in places], [])
        got = np.empty_like(x)
        device.copy_out(got, places[1])
        np.testing.assert_array_equal(got, x[[source_of(t, by, kind) for t in range(64)]])
        for place in places:
            device.release(place)


# -- merges -----------------------------------------------------------------------------------------------------------
SHAPES = {
    "rows in a warp": ((3, 40), (1,)),
    "a row in all warps": ((2, 1100), (1,)),
    "columns": ((70, 3), (0,)),
    "many columns": ((9, 40), (0,)),
    "a column": ((150, 1), (0,)),
    "between": ((2, 30, 5), (1,)),
}


def same_on_every_grid(node, arrays, block: int) -> np.ndarray:
    results = [run_node(node, arrays, target=TARGETS[block], most_blocks=most) for most in (1, 2)]
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)
    return results[0]


def node(name: str, shape, dtype: str, /, **attrs):
    return make_node(PRIMITIVES[name], [Value(TensorType(tuple(shape), dtype))], attrs)


@pytest.mark.skipif(ON_GPU, reason="the simulator's targets")
@pytest.mark.parametrize("block", TARGETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_reductions(shape, block):
    size, axes = SHAPES[shape]
    cases = [("reduce_sum", "float32"), ("reduce_sum", "float16"), ("reduce_max", "bfloat16"), ("reduce_min", "int8")]
    cases += [("reduce_sum", "uint64"), ("reduce_prod", "float64"), ("reduce_or", "bool"), ("reduce_max", "uint32")]
    for name, dtype in cases:
        x = values(size, dtype)
        x = np.ones_like(x) + x / 64 if name == "reduce_prod" else x
        (result,) = same_on_every_grid(node(name, size, dtype, axes=axes, keepdims=False), [x], block)
        compare(result, PRIMITIVES[name].reference(x, axes=axes, keepdims=False), 1e-5)


@pytest.mark.skipif(ON_GPU, reason="the simulator's targets")
@pytest.mark.parametrize("block", TARGETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_positions_moments_and_rows(shape, block):
    size, axes = SHAPES[shape]
    x = values(size, "float32")
    x[..., -1] = x[0, ..., 0] = 9.0  # ties
    for name, attrs in (
        ("argmax", {"axis": axes[0], "dtype": "int32"}),
        ("moments", {"axes": axes}),
        ("softmax", {"axis": axes[0]}),
        ("log_softmax", {"axis": axes[0]}),
    ):
        made = node(name, size, "float32", **attrs)
        wanted = PRIMITIVES[name].reference(x, **attrs)
        for result, expected in zip(
            same_on_every_grid(made, [x], block), wanted if isinstance(wanted, tuple) else (wanted,), strict=True
        ):
            compare(result, expected, 1e-5)


@pytest.mark.skipif(ON_GPU, reason="the simulator's targets")
@pytest.mark.parametrize("block", TARGETS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "dtype"), [("cumsum", "float32"), ("cummax", "int64"), ("cumlogsumexp", "float16")])
def test_scans(name, dtype, shape, block):
    size, (axis,) = SHAPES[shape]
    x = values(size, dtype)
    (result,) = same_on_every_grid(node(name, size, dtype, axis=axis, reverse=shape == "between"), [x], block)
    compare(result, PRIMITIVES[name].reference(x, axis=axis, reverse=shape == "between"), 1e-5)


def test_a_warp_needs_no_shared_memory():
    """On a GPU, whose threads exchange registers."""
    from kgraph.codegen.compiler import render

    target = make_target((9, 0))
    for name, attrs in (("reduce_sum", {"axes": (1,), "keepdims": False}), ("softmax", {"axis": 1})):
        (call,) = families.lower(node(name, (50000, 40), "float32", **attrs), target)
        text = render(call.spec, target)
        assert "shfl_down_sync" in text
        assert "shared.array" not in text
        assert "syncthreads" not in text
