"""Scatters on CUDA: the order of updates, hot rows, the split into ranges, columns and slots."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kgraph import ops
from kgraph.codegen.cuda import families
from kgraph.codegen.cuda.target import simulator_target
from kgraph.compiler import compile_graph
from kgraph.frontend.tracer import trace
from kgraph.ir import type_of
from kgraph.ir.interpreter import evaluate
from kgraph.ops.scatter import REDUCTIONS, SCATTER_ALONG_AXIS, SCATTER_ND
from kgraph.passes.pipeline import TRAINING
from kgraph.runtime.cuda.device_array import DeviceArray
from kgraph.runtime.cuda.simulator import _Pointer
from kgraph.targets import resolve
from tests.cuda.driver import run_node
from tests.cuda.test_data_movement import node_of

RNG = np.random.default_rng(0)
# Several ranges even of few rows, as on a GPU of many multiprocessors.
SPLIT = replace(simulator_target(), num_sms=2)


def operands(rows: int, row: int, count: int, low: int = 0, dtype: str = "float32"):
    indices = RNG.integers(low, rows, (count, 1)).astype("int32")
    values = [RNG.uniform(0.5, 1.5, (n, row)).astype(dtype) for n in (rows, count)]
    return values[0], indices, values[1]


def in_order(base, indices, updates, reduction: str):
    """Updates one after the other, in the arithmetic of the operands."""
    apply = {"add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum, "update": lambda _, u: u}
    out = base.copy()
    for (index,), update in zip(indices, updates, strict=True):
        out[index] = apply[reduction](out[index], update)
    return out


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("row", [1, 2, 3, 4, 7])
def test_updates_are_applied_in_their_order(reduction, row):
    arrays = operands(5, row, 37)
    node = node_of("scatter_nd", arrays, reduction=reduction)
    results = [run_node(node, arrays, target=SPLIT, most_blocks=most)[0] for most in (1, 3)]
    for result in results:
        np.testing.assert_array_equal(result, in_order(*arrays, reduction))


def test_a_row_that_all_updates_hit():
    base, indices, updates = operands(6, 3, 50)
    indices[:] = 2
    (out,) = run_node(node_of("scatter_nd", [base, indices, updates], reduction="add"), [base, indices, updates])
    np.testing.assert_array_equal(out, in_order(base, indices, updates, "add"))


def test_the_rows_are_split_between_no_more_blocks_than_the_device_needs():
    for count in (10, 100000):
        node = node_of("scatter_nd", operands(5000, 4, count), reduction="add")
        (call,) = families.lower(node, SPLIT)
        assert call.extent == 8  # four for each multiprocessor: what reads the indices does not grow with them


@pytest.mark.parametrize("most_blocks", [1, 3])
def test_additions_to_a_small_table_are_cut_into_parts(most_blocks):
    target = replace(simulator_target(), num_sms=3)
    base, indices, updates = operands(2, 3, 41, low=-3)  # parts of 9 updates, the last one shorter
    node = node_of("scatter_nd", [base, indices, updates], reduction="add")
    first, *rest = families.lower(node, target)
    assert first.spec.name == "scatter_nd_add_partial"
    assert first.sizes[0] == 5
    assert len(rest) >= 2
    (out,) = run_node(node, [base, indices, updates], target=target, most_blocks=most_blocks)
    np.testing.assert_allclose(out, SCATTER_ND.reference(base, indices, updates, reduction="add"), rtol=1e-6)


def test_parts_of_a_scatter_along_an_axis():
    base = RNG.uniform(-1, 1, (3, 2)).astype("float32")
    indices = RNG.integers(0, 3, (19, 2)).astype("int32")
    updates = RNG.uniform(-1, 1, (19, 2)).astype("float32")
    node = node_of("scatter_along_axis", [base, indices, updates], axis=0, reduction="add")
    target = replace(simulator_target(), num_sms=6)
    assert families.lower(node, target)[0].spec.name == "scatter_along_axis_add_partial"
    (out,) = run_node(node, [base, indices, updates], target=target)
    wanted = SCATTER_ALONG_AXIS.reference(base, indices, updates, axis=0, reduction="add")
    np.testing.assert_allclose(out, wanted, rtol=1e-5, atol=1e-6)


def test_small_floats_are_rounded_once_a_run_of_updates():
    base, indices, updates = operands(1, 2, 200, dtype="float16")
    updates[:] = 2.0**-10
    base[:] = 1.0
    (out,) = run_node(node_of("scatter_nd", [base, indices, updates], reduction="add"), [base, indices, updates])
    np.testing.assert_array_equal(out, np.full((1, 2), 1 + 200 / 1024, "float16"))


def test_tuples_out_of_range_are_dropped():
    base, indices, updates = operands(4, 3, 9)
    indices[:, 0] = [0, 4, -1, -4, -5, 99, 3, -99, 1]
    (out,) = run_node(node_of("scatter_nd", [base, indices, updates], reduction="add"), [base, indices, updates])
    np.testing.assert_allclose(out, SCATTER_ND.reference(base, indices, updates, reduction="add"), rtol=1e-6)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("reduction", ["add", "update"])
def test_scatters_along_every_axis(axis, reduction):
    shape = [3, 4, 5]
    base = RNG.uniform(-1, 1, shape).astype("float32")
    shape[axis] = 6
    indices = RNG.integers(-7, 7, shape).astype("int64")
    updates = RNG.uniform(-1, 1, shape).astype("float32")
    node = node_of("scatter_along_axis", [base, indices, updates], axis=axis, reduction=reduction)
    wanted = SCATTER_ALONG_AXIS.reference(base, indices, updates, axis=axis, reduction=reduction)
    columns = "columns" if axis < 2 else "ranges"
    assert families.lower(node, simulator_target())[0].spec.template.endswith(columns)
    assert families.lower(node, replace(SPLIT, num_sms=100))[0].spec.template.endswith("ranges")
    for target in (simulator_target(), replace(SPLIT, num_sms=100)):
        (out,) = run_node(node, [base, indices, updates], target=target)
        np.testing.assert_allclose(out, wanted, rtol=1e-5, atol=1e-6)


def updated(form: str, on_base):
    """(graph, arrays, places that are updated, in the order of the result's elements) of a scatter to `on_base(x)`."""
    if form == "rows":
        base, indices, updates = operands(9, 5, 4)
        indices[:, 0] = [7, 2, -2, 99]  # the third hits what the first does, the last one nothing
        scatter = lambda *values: ops.scatter_nd(*values, reduction="add")
        places = [5 * row + column for row in (7, 2) for column in range(5)]
    else:
        base, updates = RNG.uniform(-1, 1, (6, 8)).astype("float32"), RNG.uniform(-1, 1, (1, 8)).astype("float32")
        indices = np.array([[5, 0, 1, 2, 3, -1, 4, 99]], "int32")
        scatter = lambda *values: ops.scatter_along_axis(*values, axis=0, reduction="update")
        places = [8 * (row % 6) + column for column, row in enumerate(indices[0]) if row < 6]
    graph = trace(lambda x, i, u: scatter(on_base(x), i, u), *map(type_of, (base, indices, updates)))
    return graph, [base, indices, updates], sorted(places)


@pytest.fixture
def stored(monkeypatch):
    """The elements that kernels write, in the order in which they do."""
    seen, store = [], _Pointer.__setitem__

    def counted(pointer, index, value):
        seen.append(int(index))
        store(pointer, index, value)

    monkeypatch.setattr(_Pointer, "__setitem__", counted)
    return seen


@pytest.mark.parametrize("form", ["rows", "columns"])
@pytest.mark.parametrize("base", ["donated", "made", "read later"])
def test_updates_in_place_touch_their_places_alone(base, form, stored):
    graph, arrays, places = updated(form, (lambda x: x) if base == "donated" else ops.neg)
    if base == "read later":
        graph.outputs = [graph.outputs[0], graph.nodes[0].output]
    donations = ((0, 0),) if base == "donated" else ()
    program = compile_graph(graph, None, TRAINING, donations, target=resolve("cuda-simulator")).program
    given = [DeviceArray.copy_of(program.device, a) for a in arrays]
    expected = evaluate(graph, arrays, [], precision="float64")
    stored.clear()
    results = program(given)
    for got, wanted in zip(results, expected, strict=True):
        np.testing.assert_allclose(np.asarray(got), wanted, rtol=1e-6, atol=1e-6)
    assert (results[0] is given[0]) == (base == "donated")
    whole = [*range(arrays[0].size)]
    wholes = {"donated": 0, "made": 1, "read later": 2}[base]  # tables that are written in full
    assert sorted(stored) == sorted(places + whole * wholes)
