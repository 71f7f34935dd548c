"""Products of int8 and bfloat16 weights in packed panels: exact sums, every way of multiplying, the instructions used.

Ways that this machine has no instructions for run with the instruction written out, so that panels, offsets and copies
are tested; that the instruction itself is used shows in the assembly.
"""

from __future__ import annotations

import dataclasses
import re

import llvmlite.binding as llvm
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from llvmlite import ir

from kgraph.codegen import compiler
from kgraph.codegen.cpu import gemm
from kgraph.codegen.cpu.builder import I16, I32
from kgraph.codegen.cpu.products import Product, multiply_add
from kgraph.codegen.target import make_target
from kgraph.ir import Dim, TensorType, Value, make_node
from kgraph.ops.contraction import DOT_GENERAL
from tests.codegen.contractions import add, check, fused, pack_weights
from tests.codegen.driver import host_target

FEW = settings(max_examples=40, deadline=None, derandomize=True)
N = Dim.symbol("N")
PLAIN = {"lhs_contract": (1,), "rhs_contract": (0,), "lhs_batch": (), "rhs_batch": ()}
INT8 = {**PLAIN, "preferred_dtype": "int32"}
WAYS = {
    "plain": Product("plain", "int32", "int32", "int8"),
    "pairs": Product("pairs", "int32", "int16", "int8", 2),
    "offset_quads": Product("offset_quads", "int32", "uint8", "int8", 4),
    "quads": Product("quads", "int32", "int8", "int8", 4),
}
BFLOAT16_PAIRS = Product("bfloat16_pairs", "float32", "bfloat16", "bfloat16", 2)


def bytes_of(shape, seed: int, kind: str = "any") -> np.ndarray:
    rng = np.random.default_rng(seed)
    if kind == "lowest":
        return np.full(shape, -128, np.int8)
    if kind == "extremes":
        return rng.choice(np.array([-128, 127], np.int8), shape)
    return rng.integers(-128, 128, shape).astype(np.int8)


def int8_product(m, k, n, kind="any", attrs=INT8, dynamic=False, **options):
    types = TensorType((N if dynamic else m, k), "int8"), TensorType((k, n), "int8")
    arrays = [bytes_of((m, k), 0, kind), bytes_of((k, n), 1, kind)]
    return check(gemm, DOT_GENERAL, types, arrays, attrs, sizes={"N": m}, **options)


def written_out(self, b, x, y, z):
    """`Product.add` without special instructions: products of the elements of a step, one after the other."""
    lanes = z.type.count

    def element(value, k, unsigned):
        value = b.shuffle(value, None, [lane * self.steps + k for lane in range(lanes)])
        if self.b == "bfloat16":
            return b.from_memory(b.ir.bitcast(value, ir.VectorType(I16, lanes)), "bfloat16")
        wide = ir.VectorType(I32, lanes)
        return b.ir.zext(value, wide) if unsigned else b.ir.sext(value, wide)

    if self.steps == 1:
        return multiply_add(b, x, y, z)
    for k in range(self.steps):
        z = multiply_add(b, element(x, k, bool(self.offset)), element(y, k, False), z)
    return z


@pytest.fixture(params=sorted(WAYS))
def way(request, monkeypatch):
    """Each way of multiplying int8, on this machine."""
    monkeypatch.setattr(gemm, "packed_product", lambda dtype, result, target: WAYS[request.param])
    monkeypatch.setattr(Product, "add", written_out)
    return request.param


# -- int8 -------------------------------------------------------------------------------------------------------------
@FEW
@given(
    m=st.integers(1, 20),
    k=st.integers(1, 70),
    n=st.integers(1, 40),
    kind=st.sampled_from(["any", "extremes", "lowest"]),
    packed=st.booleans(),
    dynamic=st.booleans(),
    parts=st.integers(1, 3),
)
@example(m=1, k=4097, n=33, kind="lowest", packed=True, dynamic=False, parts=2)
@example(m=1, k=2051, n=170, kind="any", packed=True, dynamic=True, parts=3)
@example(m=20, k=2051, n=50, kind="extremes", packed=True, dynamic=True, parts=3)
def test_sums_are_exact(m, k, n, kind, packed, dynamic, parts):
    int8_product(m, k, n, kind, packed=packed, dynamic=dynamic, parts=parts)


@pytest.mark.parametrize(("m", "k", "n"), [(1, 64, 40), (13, 37, 21), (7, 2051, 50), (3, 1, 1)])
@pytest.mark.parametrize("kind", ["any", "lowest"])
def test_every_way(way, m, k, n, kind):
    int8_product(m, k, n, kind, packed=True)
    int8_product(m, k, n, kind, packed=True, dynamic=True)


@pytest.mark.parametrize("vector_bytes", [16, 32])
def test_narrower_vectors(vector_bytes):
    for m, k, n in ((13, 41, 21), (1, 300, 5)):
        int8_product(m, k, n, "extremes", packed=True, target=host_target(vector_bytes))


@pytest.mark.parametrize("into", ["float32", "int8", "int64"])
def test_results_of_other_dtypes(into):
    if into == "int64":
        int8_product(5, 37, 21, packed=True, attrs={**PLAIN, "preferred_dtype": into})
        return
    arrays = [
        np.random.default_rng(s).integers(-2, 3, shape).astype(np.int8) for s, shape in enumerate([(5, 7), (7, 21)])
    ]
    types = [TensorType(a.shape, "int8") for a in arrays]
    check(gemm, DOT_GENERAL, types, arrays, {**PLAIN, "preferred_dtype": into}, packed=True)


@pytest.mark.parametrize("transposed", ["lhs", "rhs", "both"])
def test_transposed_operands(way, transposed):
    left, right = transposed != "rhs", transposed != "lhs"
    attrs = {**INT8, "lhs_contract": (0 if left else 1,), "rhs_contract": (1 if right else 0,)}
    shapes = (67, 30) if left else (30, 67), (41, 67) if right else (67, 41)
    arrays = [bytes_of(shape, seed) for seed, shape in enumerate(shapes)]
    check(gemm, DOT_GENERAL, [TensorType(s, "int8") for s in shapes], arrays, attrs, packed=True)


def test_weights_with_a_batch(way):
    attrs = {**INT8, "lhs_contract": (2,), "rhs_contract": (1,), "lhs_batch": (0,), "rhs_batch": (0,)}
    shapes = (3, 9, 21), (3, 21, 35)
    arrays = [bytes_of(shape, seed) for seed, shape in enumerate(shapes)]
    check(gemm, DOT_GENERAL, [TensorType(s, "int8") for s in shapes], arrays, attrs, packed=True)


@pytest.mark.parametrize("m", [1, 20])
def test_scales_and_bias_in_the_epilogue(m):
    """The dense layer of a quantised model: the scale of a row times that of a column divides."""

    def epilogue(g, y, columns, rows, bias):
        scaled = add(g, "div", add(g, "convert", y, dtype="float32"), add(g, "mul", columns, rows))
        return [add(g, "relu", add(g, "add", scaled, bias))]

    rng = np.random.default_rng(2)
    extras = [((50,), (50,)), ((N, 1), (m, 1)), ((50,), (50,))]
    extras = [(TensorType(s, "float32"), rng.uniform(1, 2, c).astype("float32")) for s, c in extras]
    int8_product(m, 37, 50, packed=True, dynamic=True, epilogue=epilogue, extras=extras)


# -- bfloat16 ---------------------------------------------------------------------------------------------------------
def bfloat16_product(m, k, n, **options):
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(s).astype(ml_dtypes.bfloat16) for s in ((m, k), (k, n))]
    attrs = {**PLAIN, "preferred_dtype": "float32"}
    return check(gemm, DOT_GENERAL, [TensorType(a.shape, "bfloat16") for a in arrays], arrays, attrs, **options)


@pytest.mark.parametrize(("m", "k", "n"), [(1, 64, 40), (13, 37, 21), (7, 2051, 50), (1, 2051, 170), (3, 1, 1)])
@pytest.mark.parametrize("way", ["halves", "pairs"])
def test_bfloat16(monkeypatch, m, k, n, way):
    if way == "halves":
        assert host_target().has("avx512bf16") or gemm.packed_product("bfloat16", "float32", host_target()).name == way
    else:
        monkeypatch.setattr(gemm, "packed_product", lambda dtype, result, target: BFLOAT16_PAIRS)
        monkeypatch.setattr(Product, "add", written_out)
    bfloat16_product(m, k, n, packed=True)


# -- instructions -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("level", "features", "dtype", "instruction"),
    [
        ("x86-64-v2", (), "int8", "pmaddwd"),
        ("x86-64-v3", (), "int8", "vpmaddwd"),
        ("x86-64-v4", (), "int8", "vpmaddwd"),
        ("x86-64-v4", ("avx512vnni",), "int8", "vpdpbusd"),
        ("x86-64-v3", ("avxvnni",), "int8", "vpdpbusd"),
        ("x86-64-v3", ("avxvnni", "avxvnniint8"), "int8", "vpdpbssd"),
        ("aarch64", (), "int8", "mla"),
        ("aarch64", ("dotprod",), "int8", "sdot"),
        ("x86-64-v4", ("avx512bf16",), "bfloat16", "vdpbf16ps"),
        ("x86-64-v3", (), "bfloat16", "vpslld"),
    ],
)
@pytest.mark.parametrize("rows", [1, 28])
def test_instructions(level, features, dtype, instruction, rows):
    target = make_target(level, foreign=True)
    target = dataclasses.replace(target, features=",".join([target.features, *(f"+{f}" for f in features)]))
    result = "int32" if dtype == "int8" else "float32"
    types = TensorType((rows, 64), dtype), TensorType((64, 64), dtype)
    node = make_node(DOT_GENERAL, [Value(t) for t in types], {**PLAIN, "preferred_dtype": result})
    node, _ = pack_weights(
        gemm, fused(node, [], lambda g, y: [y], "dot"), [np.zeros(t.shape, t.np_dtype) for t in types], target
    )
    (call,) = gemm.lower(node, target)
    machine = llvm.Target.from_triple(target.triple).create_target_machine(cpu=target.cpu, features=target.features)
    text = machine.emit_assembly(llvm.parse_assembly(compiler.render(call.spec, target)))
    assert re.search(rf"\b{instruction}\b", text)
