"""Winograd convolutions against float64: geometry, epilogues, symbolic sizes, and when they are chosen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kgraph.codegen.cpu import conv, winograd, winograd_chunk
from kgraph.codegen.cpu.winograd_plan import WinogradPlan
from kgraph.ir import Dim, TensorType, Value, make_node
from kgraph.ops.convolution import CONV
from kgraph.ops.packing import pack, unpack_reference, winograd_layout
from kgraph.ops.winograd import PAIRS
from tests.codegen.contractions import add, check, filled, fused, pack_weights
from tests.codegen.driver import Bound, host_target, run_node
from tests.codegen.test_conv import attributes

FEW = settings(max_examples=25, deadline=None, derandomize=True)


@pytest.fixture
def always(monkeypatch):
    """Winograd's algorithm wherever it is possible; gives a function that chooses m."""
    monkeypatch.setattr(winograd, "LEAST_PRODUCTS", 0)
    monkeypatch.setattr(winograd, "LEAST_GAIN", 0.0)
    monkeypatch.setattr(winograd, "SHARED_PRODUCTS", 0)
    return lambda outputs: monkeypatch.setattr(winograd, "PAIRS", {outputs: PAIRS[outputs]})


@pytest.fixture
def chunked(always, monkeypatch):
    """The same, by kernels that transform filters themselves; gives a function of m and of the bytes of a chunk."""
    monkeypatch.setattr(winograd, "LEAST_CHUNKED", 0)
    monkeypatch.setattr(winograd, "LEAST_CHUNK", 1)
    monkeypatch.setattr(winograd, "CHUNKED_WORTH", 1e9)

    def choose(outputs: int, chunk_bytes: int = 64 << 10) -> None:
        always(outputs)
        monkeypatch.setattr(winograd_chunk, "SHARE", chunk_bytes / host_target().l2_bytes)
        winograd._schedule.cache_clear()

    yield choose
    winograd._schedule.cache_clear()


def convolution(x, w, padding, *, dynamic=(), dilations=1, **options):
    symbols = {axis: Dim.symbol(f"D{axis}") for axis in dynamic}
    shape = tuple(symbols.get(axis, size) for axis, size in enumerate(x))
    types = (TensorType(shape, "float32"), TensorType(w, "float32"))
    attrs = attributes(len(x) - 2, padding=padding, rhs_dilation=dilations)
    target = options.get("target") or host_target()
    node = make_node(CONV, [Value(t) for t in types], attrs)
    assert conv.choose(node, target, options.get("packed", False))[0] == "winograd"
    sizes = {f"D{axis}": x[axis] for axis in dynamic}
    return check(conv, CONV, types, [filled(x, "float32"), filled(w, "float32", 1)], attrs, sizes=sizes, **options)


@FEW
@given(data=st.data())
def test_any_geometry(data):
    draw = lambda low, high, count: tuple(data.draw(st.integers(low, high)) for _ in range(count))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd, "LEAST_PRODUCTS", 0)
        patch.setattr(winograd, "LEAST_GAIN", 0.0)
        patch.setattr(winograd, "SHARED_PRODUCTS", data.draw(st.sampled_from([0, winograd.SHARED_PRODUCTS])))
        outputs = data.draw(st.sampled_from(sorted(PAIRS)))
        patch.setattr(winograd, "PAIRS", {outputs: PAIRS[outputs]})
        axes = data.draw(st.integers(1, 2))
        x = (*draw(1, 3, 1), *draw(3, 15 if axes == 2 else 50, axes), *draw(1, 40, 1))
        w = (*[3] * axes, x[-1], *draw(1, 70, 1))
        padding = tuple(draw(-1, 4, 2) for _ in range(axes))
        dilations = draw(1, 3, axes) if data.draw(st.booleans()) else 1
        dynamic = range(data.draw(st.sampled_from([0, 1, 1 + axes])))
        how = {"packed": data.draw(st.booleans()), "parts": data.draw(st.integers(1, 4))}
        convolution(x, w, padding, dynamic=dynamic, dilations=dilations, **how)


@pytest.mark.parametrize("outputs", sorted(PAIRS))
@pytest.mark.parametrize("vector_bytes", [64, 32, 16])
def test_vector_widths(always, outputs, vector_bytes):
    """64 also where the machine has no such vectors: LLVM then makes two of each."""
    always(outputs)
    if vector_bytes > host_target().vector_bytes:
        target = replace(host_target(), vector_bytes=vector_bytes, num_vector_registers=32)
    else:
        target = host_target(vector_bytes)
    convolution((2, 9, 7, 20), (3, 3, 20, 40), 1, target=target, packed=True)
    convolution((2, 9, 7, 20), (3, 3, 20, 40), 1, target=target)
    convolution((2, 27, 20), (3, 20, 40), 1, target=target, packed=True)
    convolution((2, 27, 20), (3, 20, 40), 1, target=target)


def bias_residual_relu(g, y, bias, residual):
    return [add(g, "relu", add(g, "add", add(g, "add", y, bias), residual))]


def bias_silu(g, y, bias, residual):
    return [add(g, "add", add(g, "silu", add(g, "add", y, bias)), residual), y]


@pytest.mark.parametrize("outputs", sorted(PAIRS))
@pytest.mark.parametrize("epilogue", [bias_residual_relu, bias_silu])
@pytest.mark.parametrize("filters", [16, 40, 45])
def test_epilogues(always, outputs, epilogue, filters):
    always(outputs)
    shapes = [(filters,), (2, 9, 7, filters)]
    extras = [(TensorType(s, "float32"), filled(s, "float32", i + 2)) for i, s in enumerate(shapes)]
    convolution((2, 9, 7, 5), (3, 3, 5, filters), 1, epilogue=epilogue, extras=extras, packed=True)


@pytest.mark.parametrize("outputs", sorted(PAIRS))
@pytest.mark.parametrize("epilogue", [bias_residual_relu, bias_silu])
def test_epilogues_along_one_axis(always, outputs, epilogue):
    always(outputs)
    shapes = [(45,), (2, 27, 45)]
    extras = [(TensorType(s, "float32"), filled(s, "float32", i + 2)) for i, s in enumerate(shapes)]
    convolution((2, 27, 5), (3, 5, 45), 1, epilogue=epilogue, extras=extras, packed=True)


@pytest.mark.parametrize("outputs", sorted(PAIRS))
@pytest.mark.parametrize(
    ("x", "dilations"), [((2, 61, 5), 4), ((1, 20, 11, 5), (3, 2)), ((2, 5, 6, 5), 9), ((1, 3, 5), 8)]
)
def test_dilated(always, outputs, x, dilations):
    """Outputs of a tile lie apart; of the last ones, and where gaps are wider than the image, there are none."""
    always(outputs)
    w = (*[3] * (len(x) - 2), 5, 45)
    options = {"padding": dilations if isinstance(dilations, int) else max(dilations), "dilations": dilations}
    extras = [(TensorType((45,), "float32"), filled((45,), "float32", 2))]
    bias_relu = lambda g, y, bias: [add(g, "relu", add(g, "add", y, bias))]
    convolution(x, w, **options, packed=True, epilogue=bias_relu, extras=extras)
    convolution(x, w, **options, dynamic=range(len(x) - 1), parts=3)


@pytest.mark.parametrize("outputs", sorted(PAIRS))
@pytest.mark.parametrize("images", [0, 1, 5])
def test_symbolic_images(always, outputs, images):
    always(outputs)
    convolution((images, 7, 7, 24), (3, 3, 24, 64), 1, dynamic=(0,), packed=True)
    convolution((images, 7, 7, 24), (3, 3, 24, 64), 1, dynamic=(0,))


@pytest.mark.parametrize("outputs", sorted(PAIRS))
@pytest.mark.parametrize(("x", "w"), [((2, 33, 30, 32), (3, 3, 32, 64)), ((2, 333, 32), (3, 32, 64))])
def test_same_bits_for_any_split(always, outputs, x, w):
    always(outputs)
    first, *others = (convolution(x, w, 1, packed=True, parts=parts)[0] for parts in (1, 2, 7))
    for other in others:
        np.testing.assert_array_equal(first, other)
    again = convolution(x, w, 1, packed=True, dynamic=range(len(x) - 1))[0]
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize("dynamic", [(), (0,)])
def test_inputs_that_units_share(always, monkeypatch, dynamic):
    """Transformed by a kernel ahead or by every unit: the same bits, from other calls."""
    x, w, options = (1, 14, 13, 100), (3, 3, 100, 250), {"packed": True, "parts": 3, "dynamic": dynamic}
    ahead = convolution(x, w, 1, **options)[0]
    shape = (Dim.symbol("D0"), *x[1:]) if dynamic else x
    values = [Value(TensorType(s, "float32")) for s in (shape, w)]
    node = make_node(CONV, values, attributes(2, padding=1))
    assert [c.spec.name for c in conv.lower(node, host_target())[1:]] == ["winograd_inputs", "winograd"]
    monkeypatch.setattr(winograd, "SHARED_PRODUCTS", 1 << 60)
    assert [c.spec.name for c in conv.lower(node, host_target())[1:]] == ["winograd"]
    np.testing.assert_array_equal(ahead, convolution(x, w, 1, **options)[0])


@pytest.mark.parametrize("outputs", sorted(PAIRS))
@pytest.mark.parametrize("axes", [1, 2])
def test_transformed_filters(always, outputs, axes):
    """The kernel for filters that are activations against the reference of `pack`, which `unpack_reference` undoes."""
    always(outputs)
    w = filled((*[3] * axes, 7, 45), "float32")
    target = host_target()
    lanes = target.lanes("float32")
    layout = winograd_layout(w.shape, outputs, 2 * lanes, lanes, "float32")
    value = Value(TensorType(w.shape, "float32"))
    bound = Bound([winograd.filters_call(value, layout)], {value: w})
    bound.run(3)
    (result,) = (a for v, a in bound.buffers.items() if v is not value)
    wanted = pack.reference(w, layout=layout)
    padding = np.isin(np.arange(wanted.size).reshape(wanted.shape), np.flatnonzero(wanted), invert=True)
    np.testing.assert_allclose(np.where(padding, 0, result), wanted, rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(unpack_reference(wanted, layout), w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("outputs", sorted(PAIRS))
@pytest.mark.parametrize(
    ("x", "w", "options"),
    [
        ((2, 9, 7, 20), (3, 3, 20, 40), {}),
        ((1, 14, 13, 24), (3, 3, 24, 100), {"dynamic": (0,), "parts": 3}),
        ((2, 33, 30, 31), (3, 3, 31, 45), {"dynamic": (0, 1, 2), "parts": 2}),
        ((0, 9, 7, 20), (3, 3, 20, 40), {"dynamic": (0,)}),
        ((1, 13, 12, 16), (3, 3, 16, 64), {"dilations": 2}),
        ((2, 127, 20), (3, 20, 40), {"parts": 2}),
    ],
)
def test_filters_that_the_kernel_transforms(chunked, outputs, x, w, options):
    """Whatever the chunks, the same bits: sums rest in memory between them."""
    results = []
    for chunk_bytes in (1 << 30, 24 << 10, 12 << 10):
        chunked(outputs, chunk_bytes)
        results.append(convolution(x, w, 1, packed=True, **options)[0])
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)


@pytest.mark.parametrize("outputs", sorted(PAIRS))
def test_the_kernel_that_transforms_filters_reads_those_of_panels(chunked, outputs):
    x, w = (1, 14, 13, 24), (3, 3, 24, 100)
    chunked(outputs, 24 << 10)
    values = [Value(TensorType(s, "float32")) for s in (x, w)]
    node = fused(make_node(CONV, values, attributes(2, padding=1)), [], lambda graph, result: [result], "conv")
    ((index, layout),) = conv.packing_for(node, host_target())
    assert (index, layout[0]) == (1, "panels")
    packed, _ = pack_weights(conv, node, [filled(s, "float32") for s in (x, w)])
    plan = WinogradPlan(*conv.lower(packed, host_target())[-1].spec.params)
    assert 0 < plan.chunk < plan.channels


# Root of mean squares of the error, as a multiple of that of the direct kernel.
WORST = {2: 1.0, 4: 2.5}


@pytest.mark.parametrize(("channels", "sizes"), [(64, (28, 28)), (256, (14, 14)), (512, (7, 7)), (64, (500,))])
@pytest.mark.parametrize("outputs", sorted(PAIRS))
@pytest.mark.parametrize("inside", [False, True])
def test_error_beside_the_direct_convolution(chunked, always, monkeypatch, outputs, channels, sizes, inside):
    """inside: filters are transformed in float32 by the kernel itself."""
    x = np.maximum(filled((1, *sizes, channels), "float32"), 0)
    w = filled((*[3] * len(sizes), channels, 64), "float32", 1)
    attrs = attributes(len(sizes), padding=1)
    values = [Value(TensorType(a.shape, "float32")) for a in (x, w)]
    node = make_node(CONV, values, attrs)
    if inside:  # only a fused node has packed weights
        node = fused(node, [], lambda graph, result: [result], "conv")
    exact = CONV.reference(x.astype(np.float64), w.astype(np.float64), **attrs)

    def error() -> float:
        (result,) = run_node(conv.lower, *(pack_weights(conv, node, [x, w]) if inside else (node, [x, w])))
        return float(np.linalg.norm(result - exact) / np.linalg.norm(exact))

    (chunked if inside else always)(outputs)
    ours = error()
    monkeypatch.setenv("KGRAPH_WINOGRAD", "0")
    direct = error()
    assert direct < 2e-6
    assert ours <= WORST[outputs] * direct


# -- the choice -------------------------------------------------------------------------------------------------------
def chosen(x, w, dtype="float32", prepared=True, **options) -> tuple[str, str]:
    node = make_node(CONV, [Value(TensorType(s, dtype)) for s in (x, w)], attributes(2, padding=1, **options))
    return conv.choose(node, host_target(), prepared)


def test_long_sequences():
    x, w = TensorType((Dim.symbol("N"), 1024, 64), "float32"), TensorType((3, 64, 64), "float32")
    node = make_node(CONV, [Value(x), Value(w)], attributes(1, padding=1))
    for prepared in (True, False):
        assert conv.choose(node, host_target(), prepared)[0] == "winograd"


@pytest.mark.parametrize(("size", "channels"), [(56, 64), (28, 128), (14, 256), (7, 512)])
def test_layers_of_residual_networks(size, channels):
    x, w = (Dim.symbol("N"), size, size, channels), (3, 3, channels, channels)
    assert chosen(x, w)[0] == "winograd"


OTHERS = {
    "strides": ((8, 28, 28, 64), (3, 3, 64, 64), {"strides": 2}),
    "transposed": ((8, 28, 28, 64), (3, 3, 64, 64), {"lhs_dilation": 2}),
    "groups": ((8, 28, 28, 64), (3, 3, 32, 64), {"feature_groups": 2}),
    "window": ((8, 28, 28, 64), (3, 5, 64, 64), {}),
    "float64": ((8, 28, 28, 64), (3, 3, 64, 64), {"dtype": "float64"}),
    "float16": ((8, 28, 28, 64), (3, 3, 64, 64), {"dtype": "float16"}),
    "three channels": ((1, 224, 224, 3), (3, 3, 3, 64), {}),
    "small": ((1, 8, 8, 16), (3, 3, 16, 16), {}),
    "weights of a step, few tiles": ((1, 7, 7, 512), (3, 3, 512, 512), {"prepared": False}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_stays_direct(name):
    x, w, options = OTHERS[name]
    algorithm, reason = chosen(x, w, **options)
    assert algorithm == "implicit_product"
    assert reason


def test_switch(monkeypatch):
    x, w = (8, 28, 28, 64), (3, 3, 64, 64)
    assert chosen(x, w)[0] == chosen(x, w, prepared=False)[0] == "winograd"
    monkeypatch.setenv("KGRAPH_WINOGRAD", "0")
    assert chosen(x, w) == ("implicit_product", "switched off by KGRAPH_WINOGRAD")
