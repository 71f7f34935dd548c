"""What cuBLASLt is asked for, on an object in its place: layouts, epilogues, algorithms, errors, programs."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import keras
import numpy as np
import pytest

import kgraph
from kgraph import errors
from kgraph.codegen.cuda import gemm
from kgraph.codegen.cuda.target import simulator_target
from kgraph.codegen.kernel import Temporary
from kgraph.compiler import compile_graph
from kgraph.ir import PRIMITIVES, Graph, TensorType, Value
from kgraph.report import explain
from kgraph.runtime.cuda import cublaslt
from kgraph.runtime.cuda.cublaslt import Plan, Products
from kgraph.runtime.cuda.device import device_for
from kgraph.runtime.steps import Product
from kgraph.targets import resolve
from tests.codegen.contractions import add, filled, verify
from tests.cuda.fake_cublaslt import FakeCublasLt
from tests.cuda.test_gemm import PLAIN, product_node

TARGET = replace(simulator_target(), products=True)


@pytest.fixture
def library():
    device = device_for("cuda-simulator")
    fake = FakeCublasLt(device)
    device.libraries[Product] = Products(device, fake)
    yield fake
    device.libraries.clear()


def products():
    return device_for("cuda-simulator").library(Product)


def compute(node, fake):
    """A node by the library alone, on host memory; gives (plan, results)."""
    (call,) = gemm.lower(node, TARGET)
    plan = products().plan(call.library.task, int)
    assert isinstance(plan, Plan), plan
    arrays = [filled(v.shape, v.dtype, seed) for seed, v in enumerate(node.inputs)]
    results = [np.full(v.shape, 7).astype(v.type.np_dtype) for v in node.outputs]
    memory = dict(zip((*node.inputs, *node.outputs), (*arrays, *results), strict=True))
    held = call.library.operands[-1]
    memory.setdefault(held, np.empty(held.type.shape, held.type.np_dtype))
    fake.host = list(memory.values())
    # Not all inputs are operands: an unused one is none.
    plan.run([memory[v].ctypes.data for v in call.library.operands])
    if not call.library.after:
        verify(node, arrays, results, {})
    return call, results


@pytest.mark.parametrize("lhs_contract", [0, 1])
@pytest.mark.parametrize("rhs_contract", [0, 1])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_both_orders_of_both_operands(library, lhs_contract, rhs_contract, dtype):
    attrs = {**PLAIN, "lhs_contract": (lhs_contract,), "rhs_contract": (rhs_contract,)}
    compute(product_node(((5, 7), (7, 5))[lhs_contract], ((5, 6), (6, 5))[rhs_contract], attrs, dtype), library)
    (asked,) = library.multiplied
    # The library's first operand is our second one, and its rows are our columns.
    assert asked["d_is"].arguments[1:] == (6, 7, 6)
    transposed = [asked["operation"].attributes.get(n, 0) for n in (3, 4)]
    assert transposed == [int(rhs_contract == 1), int(lhs_contract == 0)]


@pytest.mark.parametrize("shapes", [((1, 7), (7, 5)), ((5, 1), (1, 6)), ((5, 7), (7, 1)), ((1, 1), (1, 1))])
def test_axes_of_one_element(library, shapes):
    compute(product_node(*shapes), library)


def test_a_batch_is_strided(library):
    attrs = {"lhs_contract": (2,), "rhs_contract": (2,), "lhs_batch": (1,), "rhs_batch": (0,)}
    compute(product_node((4, 3, 5), (3, 6, 5), attrs), library)
    (asked,) = library.multiplied
    assert [asked[n].attributes[5] for n in ("a_is", "b_is", "d_is")] == [3, 3, 3]
    assert [asked[n].attributes[6] for n in ("a_is", "b_is", "d_is")] == [30, 5, 24]


def test_bias_and_residual_are_the_library_s(library):
    extras = [TensorType((6,), "float32"), TensorType((5, 6), "float32")]
    both = lambda graph, result, bias, more: [add(graph, "add", more, add(graph, "add", result, bias))]
    call, _ = compute(product_node((5, 4), (4, 6), extras=extras, epilogue=both), library)
    assert not call.library.after
    (asked,) = library.multiplied
    assert asked["beta"] == 1
    assert asked["c"] != asked["d"]
    assert asked["bias"]


@pytest.mark.parametrize(
    "epilogue",
    [
        lambda graph, result, bias: [add(graph, "relu", add(graph, "add", result, bias))],
        lambda graph, result, bias: [add(graph, "sub", result, bias)],
        lambda graph, result, bias: [add(graph, "add", result, result)],
        lambda graph, result, bias: [add(graph, "add", result, bias), result],
    ],
)
def test_other_epilogues_follow_in_a_kernel(library, epilogue):
    node = product_node((5, 4), (4, 6), extras=[TensorType((6,), "float32")], epilogue=epilogue)
    call, _ = compute(node, library)
    assert call.library.after
    assert not call.notes["inplace"]
    assert library.multiplied[0]["bias"] is None
    assert library.multiplied[0]["beta"] == 0


HALVES = {"float16": 2, "bfloat16": 14}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("into", ["same", "preferred", "converted", "converted and added"])
def test_half_floats_are_multiplied_as_such_and_summed_in_float32(library, dtype, into):
    """A batch, transposed on both sides; results that are float32 in the end are never rounded."""
    attrs = {"lhs_contract": (1,), "rhs_contract": (2,), "lhs_batch": (0,), "rhs_batch": (0,)}
    extras, epilogue = [], None
    if into == "preferred":
        attrs["preferred_dtype"] = "float32"
    elif into == "converted":
        epilogue = lambda graph, result: [add(graph, "convert", result, dtype="float32")]
    elif into == "converted and added":
        extras = [TensorType((3, 7, 6), "float32")]
        epilogue = lambda graph, result, more: [add(graph, "add", add(graph, "convert", result, dtype="float32"), more)]
    call, _ = compute(product_node((3, 5, 7), (3, 6, 5), attrs, dtype, extras, epilogue), library)
    (asked,) = library.multiplied
    assert asked["operation"].arguments == (68, 0)
    assert [asked["operation"].attributes.get(n, 0) for n in (3, 4)] == [1, 1]
    kinds = [asked[n].arguments[0] for n in ("a_is", "b_is", "d_is")]
    assert kinds == [HALVES[dtype]] * 2 + [HALVES[dtype] if into == "same" else 0]
    assert [asked[n].attributes[5] for n in ("a_is", "b_is", "d_is")] == [3, 3, 3]
    assert not call.library.after
    assert asked["beta"] == ("added" in into)


@pytest.mark.parametrize("dtype", HALVES)
def test_results_that_no_output_can_hold_have_room_of_their_own(library, dtype):
    epilogue = lambda graph, result: [add(graph, "convert", result, dtype="float64")]
    node = product_node((5, 4), (4, 6), dtype=dtype, epilogue=epilogue)
    call, _ = compute(node, library)
    assert isinstance(call.library.operands[-1], Temporary)
    assert call.library.after


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_all_products_of_a_mixed_training_step_are_the_library_s(library, policy):
    layers = keras.layers
    kgraph.set_device("cuda-simulator")
    try:
        inputs = keras.Input((5, 4), dtype="float32")
        hidden = layers.Dense(6, "gelu", dtype=policy)(inputs)
        hidden = layers.EinsumDense("btc,cd->btd", (5, 3), bias_axes="d", dtype=policy)(hidden)
        outputs = layers.Dense(2, dtype=policy)(layers.Flatten(dtype=policy)(hidden))
        model = keras.Model(inputs, outputs)
        model.compile("adam", loss="mse")
        data = np.ones((4, 5, 4), "float32"), np.ones((4, 2), "float32")
        step = kgraph.compile_step(model, data)
        program = step._program().compiled.program
        products = [s for s in program.steps if s.label.startswith("gemm")]
        assert len(products) == 8
        assert all(s.library is not None for s in products if not s.continues)
        step(data)
    finally:
        kgraph.set_device("cpu")
    half = HALVES[policy.removeprefix("mixed_")]
    assert len(library.multiplied) == 8
    for asked in library.multiplied:
        assert asked["operation"].arguments == (68, 0)
        assert (asked["a_is"].arguments[0], asked["b_is"].arguments[0]) == (half, half)
    kinds = [asked["d_is"].arguments[0] for asked in library.multiplied]
    assert kinds.count(0) >= 3, "the weights' gradients are float32"


@pytest.mark.parametrize(
    ("lhs", "rhs", "attrs", "dtype"),
    [
        ((5, 4), (4, 6), PLAIN, "int32"),
        ((2, 3, 2, 4), (4, 3, 3, 2), {**PLAIN, "lhs_contract": (3, 1), "rhs_contract": (0, 2)}, "float32"),
    ],
)
def test_what_the_library_does_not_know_has_a_kernel_alone(lhs, rhs, attrs, dtype):
    assert gemm.lower(product_node(lhs, rhs, attrs, dtype), TARGET)[0].library is None


def test_sums_are_of_the_wide_dtypes(library):
    compute(product_node((5, 4), (4, 6), dtype="float16"), library)
    compute(product_node((5, 4), (4, 6), dtype="float64"), library)
    assert [m["operation"].arguments for m in library.multiplied] == [(68, 0), (70, 1)]
    (call,) = gemm.lower(product_node((5, 4), (4, 6)), replace(TARGET, tf32=True))
    plan = products().plan(call.library.task, int)
    assert library.created[plan._operation.value].arguments == (77, 0)


def test_algorithms_follow_the_alignment(library):
    (call,) = gemm.lower(product_node((5, 4), (4, 6)), TARGET)
    plan = products().plan(call.library.task, int)
    memory = np.zeros(4096, np.float32)
    library.host = [memory]
    start = memory.ctypes.data + -memory.ctypes.data % 256
    for shift in (0, 64, 16, 4):
        plan.run([start + shift, start + 1024, start + 2048])
    assert [m["alignment"] for m in library.multiplied] == [256, 64, 16, 4]


def test_descriptors_are_given_back(library):
    (call,) = gemm.lower(product_node((5, 4), (4, 6)), TARGET)
    plan = products().plan(call.library.task, int)
    del plan
    assert sorted(library.destroyed) == sorted(library.created)


def test_refusals_and_failures(library):
    own = products()
    (call,) = gemm.lower(product_node((5, 4), (4, 6)), TARGET)
    library.refused = {4}
    assert "no algorithm" in own.plan(call.library.task, int)
    library.refused = set()
    plan = own.plan(call.library.task, int)
    library.failures["cublasLtMatmul"] = 13
    with pytest.raises(errors.DeviceError, match="EXECUTION_FAILED"):
        plan.run([4096, 8192, 16384])
    library.failures = {"cublasLtCreate": 1}
    with pytest.raises(errors.DeviceError, match="NOT_INITIALIZED"):
        Products(device_for("cuda-simulator"), library)


def test_the_structure_is_the_library_s():
    assert ctypes.sizeof(cublaslt.Heuristic) == 96
    assert cublaslt.Heuristic.state.offset == 72
    assert len(cublaslt.SIGNATURES["cublasLtMatmul"]) == 16


def dense_graph():
    """relu(x w + b), then a product with a residual."""
    types = [TensorType(s, "float32") for s in ((3, 4), (4, 4), (4,))]
    x, w, bias = (Value(t, name=f"x{n}") for n, t in enumerate(types))
    graph = Graph([x, w, bias], name="dense")
    dot = lambda a: graph.add(PRIMITIVES["dot_general"], (a, w), **PLAIN)
    hidden = add(graph, "relu", add(graph, "add", dot(x), bias))
    graph.outputs = [add(graph, "add", dot(hidden), hidden)]
    return graph


@pytest.mark.parametrize("refused", [set(), {4}])
def test_programs_call_the_library_or_their_own_kernels(library, refused):
    library.refused = refused
    compiled = compile_graph(dense_graph(), target=TARGET)
    arrays = [filled(v.shape, "float32", n) for n, v in enumerate(compiled.captured.inputs)]
    hidden = np.maximum(arrays[0] @ arrays[1] + arrays[2], 0)
    for _ in range(3):  # launched, captured, replayed
        (result,) = compiled.program(arrays)
        np.testing.assert_allclose(result, hidden @ arrays[1] + hidden, rtol=1e-5, atol=1e-5)
    stats = compiled.program.stats()
    assert stats["library_calls"] == (0 if refused else 2)
    assert bool(library.multiplied) == (not refused)
    told = [d for d in explain("dense", compiled).decisions if "cuBLASLt" in d.reason]
    assert [d.subject for d in told] == [s.label for s in compiled.program.steps if refused and s.library]
    assert len(told) == (2 if refused else 0)


@pytest.mark.parametrize("tf32", [False, True])
def test_set_device_says_whether_products_round_to_tf32(library, tf32):
    kgraph.set_device("cuda-simulator", tf32=tf32)
    try:
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(6)])
        kgraph.compile(model)(np.ones((5, 4), "float32"))
    finally:
        kgraph.set_device("cpu")
    assert library.multiplied[-1]["operation"].arguments == ((77 if tf32 else 68), 0)
    assert not resolve("cuda-simulator").tf32
