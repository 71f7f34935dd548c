"""Matrix product kernels against float64: layouts, dtypes, symbolic sizes, epilogues, packed weights."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kgraph.codegen.cpu import gemm
from kgraph.codegen.cpu.gemm_kernel import render
from kgraph.codegen.cpu.microkernel import TileRange, register_tile
from kgraph.ir import Dim, TensorType, Value, make_node
from kgraph.ops.contraction import DOT_GENERAL
from tests.codegen.contractions import add, check, filled, fused, pack_weights
from tests.codegen.driver import Bound, host_target
from tests.codegen.samples import check_sample

FEW = settings(max_examples=30, deadline=None, derandomize=True)
N, L = Dim.symbol("N"), Dim.symbol("L")
PLAIN = {"lhs_contract": (1,), "rhs_contract": (0,), "lhs_batch": (), "rhs_batch": ()}


def product(lhs, rhs, attrs, *, dtype="float32", lhs_type=None, rhs_type=None, **options):
    types = (lhs_type or TensorType(lhs, dtype), rhs_type or TensorType(rhs, dtype))
    arrays = [filled(lhs, dtype), filled(rhs, dtype, 1)]
    return check(gemm, DOT_GENERAL, types, arrays, attrs, **options)


def matrices(m, k, n, **options):
    return product((m, k), (k, n), PLAIN, **options)


@pytest.mark.parametrize("sample", DOT_GENERAL.samples(), ids=lambda s: s.name)
def test_samples(sample):
    check_sample(gemm, DOT_GENERAL, sample, tolerance=1e-5)


@FEW
@given(
    m=st.integers(1, 40),
    k=st.integers(0, 70),
    n=st.integers(1, 70),
    packed=st.booleans(),
    dynamic=st.booleans(),
    parts=st.integers(1, 3),
)
def test_any_size(m, k, n, packed, dynamic, parts):
    lhs_type = TensorType((N, k), "float32") if dynamic else None
    matrices(m, k, n, packed=packed and k > 0, lhs_type=lhs_type, sizes={"N": m}, parts=parts)


@pytest.mark.parametrize(
    ("m", "k", "n"),
    [
        (31, 3000, 40),
        (20, 512, 48),
        (17, 2048, 33),
        (5, 5000, 96),
        (1, 700, 100),
        (300, 64, 10),
        (130, 33, 1),
        (1, 2100, 170),
        (1, 2100, 570),
        (1, 40, 570),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_sizes_with_blocks_and_copies(m, k, n, packed):
    matrices(m, k, n, packed=packed)


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16", "int32", "int64", "uint32"])
@pytest.mark.parametrize("packed", [False, True])
def test_dtypes(dtype, packed):
    matrices(19, 37, 45, dtype=dtype, packed=packed)


@pytest.mark.parametrize(("dtype", "into"), [("int8", "int32"), ("uint8", "int32"), ("int8", "float32")])
def test_narrow_integers_are_summed_widely(dtype, into):
    product((19, 300), (300, 45), {**PLAIN, "preferred_dtype": into}, dtype=dtype)


ATTENTION = {
    "scores": ((3,), (3,), (0, 2), (0, 2)),
    "values": ((3,), (1,), (0, 1), (0, 2)),
}


@pytest.mark.parametrize("rows", [1, 7, 600])
@pytest.mark.parametrize("which", ["scores", "values"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_attention_products(rows, which, dynamic):
    """q[B,T,H,D] k[B,S,H,D] -> [B,H,T,S] and p[B,H,T,S] v[B,S,H,D] -> [B,H,T,D], without transposition."""
    lhs_contract, rhs_contract, lhs_batch, rhs_batch = ATTENTION[which]
    attrs = {
        "lhs_contract": lhs_contract,
        "rhs_contract": rhs_contract,
        "lhs_batch": lhs_batch,
        "rhs_batch": rhs_batch,
    }
    other = 40 if rows == 7 else rows
    heads = (2, other, 3, 16)
    lhs = (2, rows, 3, 16) if which == "scores" else (2, 3, rows, other)
    symbols = {}
    if dynamic:
        S = Dim.symbol("S")
        lhs_type = TensorType((N, L, 3, 16) if which == "scores" else (N, 3, L, S), "float32")
        symbols = {"lhs_type": lhs_type, "rhs_type": TensorType((N, S, 3, 16), "float32")}
    product(lhs, heads, attrs, sizes={"N": 2, "L": rows, "S": other}, **symbols)


@pytest.mark.parametrize("transposed", ["lhs", "rhs", "both"])
@pytest.mark.parametrize("packed", [False, True])
def test_transposed_operands(transposed, packed):
    left, right = transposed != "rhs", transposed != "lhs"
    attrs = {**PLAIN, "lhs_contract": (0 if left else 1,), "rhs_contract": (1 if right else 0,)}
    product((130, 61) if left else (61, 130), (77, 130) if right else (130, 77), attrs, packed=packed)


def test_axes_that_do_not_collapse():
    attrs = {"lhs_contract": (3, 2), "rhs_contract": (0, 3), "lhs_batch": (0,), "rhs_batch": (1,)}
    product((3, 2, 4, 5), (5, 3, 6, 4), attrs)
    product((3, 2, 4, 5), (5, 3, 6, 4), attrs, packed=True)


def test_weights_with_a_batch():
    attrs = {"lhs_contract": (2,), "rhs_contract": (1,), "lhs_batch": (0,), "rhs_batch": (0,)}
    product((3, 9, 20), (3, 20, 35), attrs, packed=True)


# -- epilogues --------------------------------------------------------------------------------------------------------
def bias_relu(g, y, bias):
    return [add(g, "relu", add(g, "add", y, bias))]


def bias_gelu_residual(g, y, bias, residual):
    return [add(g, "add", add(g, "gelu", add(g, "add", y, bias), approximate=False), residual)]


def scaled_rows(g, y, scalar, row):
    return [add(g, "mul", add(g, "mul", y, scalar), row), y]


@pytest.mark.parametrize(("m", "n"), [(20, 50), (1, 10), (33, 64)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_epilogues(m, n, packed, dynamic):
    rows = N if dynamic else m
    options = {
        "packed": packed,
        "sizes": {"N": m},
        "lhs_type": TensorType((rows, 30), "float32"),
    }

    def extra(shape, concrete, seed):
        return TensorType(shape, "float32"), filled(concrete, "float32", seed)

    bias, residual = extra((n,), (n,), 2), extra((rows, n), (m, n), 3)
    scalar, row = extra((), (), 4), extra((rows, 1), (m, 1), 5)
    matrices(m, 30, n, epilogue=bias_relu, extras=[bias], **options)
    matrices(m, 30, n, epilogue=bias_gelu_residual, extras=[bias, residual], **options)
    matrices(m, 30, n, epilogue=scaled_rows, extras=[scalar, row], **options)


def test_epilogue_across_blocks_of_k():
    bias = (TensorType((40,), "float32"), filled((40,), "float32", 2))
    residual = (TensorType((20, 40), "float32"), filled((20, 40), "float32", 3))
    matrices(20, 3000, 40, epilogue=bias_relu, extras=[bias], packed=True)
    matrices(20, 3000, 40, epilogue=bias_gelu_residual, extras=[bias, residual], packed=True)


def test_epilogue_converts():
    convert = lambda g, y: [add(g, "convert", y, dtype="bfloat16")]
    matrices(20, 30, 40, epilogue=convert, packed=True)


def test_an_operand_of_other_shape_is_refused():
    from kgraph.ir import Value, make_node

    attrs = {**PLAIN, "lhs_contract": (2,)}
    core = make_node(DOT_GENERAL, [Value(TensorType(s, "float32")) for s in ((2, 3, 5), (5, 4))], attrs)
    node = fused(core, [TensorType((2, 1, 4), "float32")], lambda g, y, x: [add(g, "add", y, x)], "dot")
    assert "epilogue operand" in gemm.accepts(node)


# -- properties -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("packed", [False, True])
def test_same_bits_for_any_split(packed):
    first, *others = (matrices(61, 1100, 77, packed=packed, parts=parts)[0] for parts in (1, 2, 7))
    for other in others:
        np.testing.assert_array_equal(first, other)


@pytest.mark.parametrize("rows", [100, 196, 257, 1000])
def test_units_of_a_symbolic_number_of_rows_are_alike(rows):
    """Threads share units, so that one with a few left-over rows would leave a thread idle."""
    node = make_node(
        DOT_GENERAL, [Value(TensorType((N, 64), "float32")), Value(TensorType((64, 32), "float32"))], PLAIN
    )
    arrays = [filled((rows, 64), "float32"), filled((64, 32), "float32", 1)]
    bound = Bound(gemm.lower(node, host_target()), dict(zip(node.inputs, arrays, strict=True)), {"N": rows})
    bound.run()
    *_, (compiled, pointers, integers, extent, scratch) = bound.steps
    counts = []
    for unit in range(extent):
        out = bound.buffers[node.output]
        out[:] = np.nan
        compiled.function(pointers.ctypes.data, integers.ctypes.data, unit, unit + 1, scratch.ctypes.data)
        counts.append(int((~np.isnan(out)).any(axis=1).sum()))
    assert max(counts) - min(counts) <= 2 * register_tile(host_target())[0]


@pytest.mark.parametrize("vector_bytes", [16, 32])
def test_narrower_vectors(vector_bytes):
    target = host_target(vector_bytes)
    for m, k, n in ((13, 40, 21), (30, 600, 64), (1, 17, 5)):
        for packed in (False, True):
            matrices(m, k, n, packed=packed, target=target)


def test_packing_is_left_to_the_kernel_where_the_weight_is_empty():
    types = (TensorType((3, 0), "float32"), TensorType((0, 4), "float32"))
    node = make_node(DOT_GENERAL, [Value(t) for t in types], PLAIN)
    assert gemm.packing_for(node, host_target()) is None


@pytest.mark.parametrize("tile", [6, 14])
def test_even_tiles_cover_every_row_once(tile):
    for extent in range(1, 120):
        tiles = TileRange.even(extent, tile)
        counts = [tiles.first, (extent - tiles.first * tiles.sizes[0]) // tiles.sizes[-1]] if tiles.first else [0, 0]
        covered = (
            sum(c * s for c, s in zip(counts, tiles.sizes))
            if tiles.first
            else extent // tiles.sizes[0] * tiles.sizes[0]
        )
        assert covered == extent
        assert max(tiles.sizes) <= tile
        assert max(tiles.sizes) - min(tiles.sizes) <= 1
        if extent > tile:  # no short tile, which would wait for its sums
            assert min(tiles.sizes) > tile // 2 - 1


@pytest.mark.parametrize("k", [70, 3000])
@pytest.mark.parametrize("m", [4, 8, 17, 64, 300])
def test_rows_ask_for_what_they_read_next(m, k, monkeypatch):
    """Of weights that come from memory. The last panel asks for what is not there; no bit depends on it."""
    node = fused(
        make_node(DOT_GENERAL, [Value(TensorType(s, "float32")) for s in ((m, k), (k, 45))], PLAIN),
        [],
        lambda graph, result: [result],
        "dot",
    )
    packed, _ = pack_weights(gemm, node, [filled((m, k), "float32"), filled((k, 45), "float32", 1)])
    results, texts = [], []
    for share in (0, 1 << 30):
        monkeypatch.setattr(gemm, "REQUESTED_SHARE", share)
        results.append(matrices(m, k, 45, packed=True)[0])
        (call,) = gemm.lower(packed, host_target())
        texts.append(render(call.spec.params, host_target()))
    np.testing.assert_array_equal(*results)
    assert ["llvm.prefetch" in text for text in texts] == [False, True]
