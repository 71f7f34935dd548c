"""Kernels that pack weights ahead of calls, and what evaluates prologues with them."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import kgraph  # noqa: F401
from kgraph import ops, preparation
from kgraph.codegen import eager, packing
from kgraph.codegen.eager import run_call
from kgraph.codegen.target import host_target
from kgraph.frontend.tracer import trace
from kgraph.ir import PRIMITIVES, TensorType, Value, make_node
from kgraph.ops.packing import panels_layout, unpack_reference, winograd_layout
from kgraph.ops.winograd import PAIRS
from kgraph.preparation import Preparation
from kgraph.runtime import threads

PACK = PRIMITIVES["pack"]
LANES = host_target().lanes("float32")


def panels(shape, batch_axes, k_axes, n_axes, groups=1, dtype="float32", lanes=LANES):
    return panels_layout(shape, batch_axes, k_axes, n_axes, groups, 2 * lanes, lanes, dtype)


def packed(w: np.ndarray, layout: tuple) -> np.ndarray:
    node = make_node(PACK, [Value(TensorType(w.shape, w.dtype.name))], {"layout": layout})
    call = packing.call_for(node)
    assert call is not None
    out = run_call(call, [w])
    assert (out.shape, out.dtype.name) == (node.output.shape, node.output.dtype)
    return out


@pytest.mark.parametrize(
    "layout",
    [
        panels((37, 4 * LANES), (), (0,), (1,)),
        panels((37, 2 * LANES + 3), (), (0,), (1,)),
        panels((5, LANES - 1), (), (0,), (1,)),
        panels((2 * LANES + 5, 37), (), (1,), (0,)),
        panels((3, 3, 5, 70), (), (0, 1, 2), (3,)),
        panels((3, 3, 4, 6 * LANES), (), (0, 1, 2), (3,), groups=3),
        panels((4, 21, 33), (0,), (1,), (2,)),
        panels((21, 4, 33), (1,), (0,), (2,)),
        panels((21, 3, 11), (), (0,), (1, 2)),
        panels((37, 50), (), (0,), (1,), lanes=2 * LANES),
        panels((9, 20), (), (0,), (1,), dtype="float64", lanes=LANES // 2),
    ],
    ids=str,
)
def test_panels_are_those_of_the_reference(layout):
    w = np.random.default_rng(0).standard_normal(layout[1]).astype(layout[-1])
    np.testing.assert_array_equal(unpack_reference(packed(w, layout), layout), w)


@pytest.mark.parametrize("outputs", sorted(PAIRS))
@pytest.mark.parametrize("shape", [(3, 3, 8, 4 * LANES), (3, 3, 7, 45), (3, 7, 45)])
def test_transformed_filters_are_those_of_the_reference_up_to_one_rounding(outputs, shape):
    w = np.random.default_rng(0).standard_normal(shape).astype("float32")
    layout = winograd_layout(shape, outputs, 2 * LANES, LANES, "float32")
    found, wanted = packed(w, layout), PACK.reference(w, layout=layout)
    for a, b in zip(
        *[np.abs(unpack_reference(x, layout) - w).reshape(-1, shape[-1]).max(axis=0) for x in (found, wanted)]
    ):
        assert a <= b + 1e-6
    inside = wanted != 0
    assert np.all(np.abs(found - wanted)[inside] <= np.spacing(np.abs(wanted[inside])))
    assert np.mean(found[inside] == wanted[inside]) > 0.999


def test_axes_that_do_not_collapse_are_left_to_numpy():
    node = make_node(PACK, [Value(TensorType((4, 5, 6), "float32"))], {"layout": panels((4, 5, 6), (), (0, 2), (1,))})
    assert packing.call_for(node) is None


@pytest.mark.parametrize(
    ("shape", "permutations", "layout"),
    [
        ((4 * LANES, 37), [(1, 0)], panels((37, 4 * LANES), (), (0,), (1,))),
        ((21, 33, 4), [(2, 0, 1)], panels((4, 21, 33), (0,), (1,), (2,))),
        ((5, 21, 33), [(1, 2, 0), (2, 0, 1)], panels((5, 21, 33), (0,), (1,), (2,))),
        ((5, 21, 33), [(1, 2, 0), (1, 0, 2)], panels((33, 21, 5), (0,), (1,), (2,))),
    ],
)
def test_transposed_weights_are_read_where_they_lie(shape, permutations, layout):
    value = w = Value(TensorType(shape, "float32"))
    array = wanted = np.random.default_rng(0).standard_normal(shape).astype("float32")
    for permutation in permutations:
        value = make_node(PRIMITIVES["transpose"], [value], {"permutation": permutation}).output
        wanted = np.transpose(wanted, permutation)
    call = packing.call_for(make_node(PACK, [value], {"layout": layout}))
    assert call.operands[0] is w
    np.testing.assert_array_equal(unpack_reference(run_call(call, [array]), layout), wanted)


@pytest.mark.parametrize("number", [1, 2])
def test_pieces_of_a_prologue(monkeypatch, number):
    """Large weights are packed by kernels, on several threads; what depends on no changed weight is left alone."""
    monkeypatch.setattr(threads, "_requested", number)
    layout = panels((300, 512), (), (0,), (1,))
    calls = []
    monkeypatch.setattr(
        preparation, "run_call", lambda call, *more, **room: calls.append(call) or run_call(call, *more, **room)
    )

    def function(a, b, c, d, e):
        scaled = ops.mul(a, b)
        return ops.pack(scaled, layout=layout), ops.pack(c, layout=layout), ops.exp(d), ops.pack(e, layout=small)

    small = panels((30, 20), (), (0,), (1,))
    shapes = ((300, 512), (512,), (300, 512), (3,), (30, 20))
    graph = trace(function, *[TensorType(shape, "float32") for shape in shapes])
    graph.params, graph.inputs = graph.inputs, []
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape).astype("float32") for shape in shapes]
    prepare = Preparation.of(graph, graph.params)
    assert len(prepare.specs()) == 2
    found = prepare(arrays)
    a, b, c, d, e = arrays
    np.testing.assert_array_equal(unpack_reference(found[0], layout), a * b)
    np.testing.assert_array_equal(unpack_reference(found[1], layout), c)
    np.testing.assert_array_equal(found[2], np.exp(d))
    np.testing.assert_array_equal(unpack_reference(found[3], small), e)
    assert len(calls) == 2
    again = prepare(arrays, [1, 3])
    assert sorted(again) == [0, 2]
    assert len(calls) == 3
    np.testing.assert_array_equal(again[0], found[0])


def test_threads_that_come_to_one_kernel_load_it_once(monkeypatch):
    """A kernel that is loaded again takes the place, and the memory, of the one that another thread runs."""
    layout = panels((LANES, 2 * LANES), (), (0,), (1,))
    w = np.ones(layout[1], "float32")
    loaded = []

    class Slow(eager.Library):
        def __init__(self, objects):
            loaded.extend(objects)
            time.sleep(0.05)
            super().__init__(objects)

    monkeypatch.setattr(eager, "Library", Slow)
    monkeypatch.setattr(eager, "_loaded", {})
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: packed(w, layout), range(4)))
    assert len(loaded) == 1
    for result in results:
        np.testing.assert_array_equal(result, results[0])
