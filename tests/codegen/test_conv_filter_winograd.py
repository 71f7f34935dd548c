"""Cotangents of filters by Winograd's algorithm against float64: geometry, blocks, symbolic sizes, and the choice."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kgraph.codegen.cpu import conv_filter, conv_filter_winograd
from kgraph.ir import TensorType, Value, make_node
from kgraph.ops.convolution_gradient import CONV_FILTER_GRADIENT
from kgraph.ops.winograd import PAIRS
from tests.codegen.driver import host_target
from tests.codegen.test_conv_filter import check, geometry, operands, run

FEW = settings(max_examples=25, deadline=None, derandomize=True)


@pytest.fixture
def always(monkeypatch):
    """Winograd's algorithm wherever it is possible; gives a function of m, and of the bytes of a thread's sums."""
    monkeypatch.setattr(conv_filter_winograd, "LEAST_PRODUCTS", 0)
    monkeypatch.setattr(conv_filter_winograd, "LEAST_GAIN", 0.0)

    def choose(outputs: int, sums: int = 600 << 10) -> None:
        monkeypatch.setattr(conv_filter_winograd, "PAIRS", {outputs: PAIRS[outputs]})
        monkeypatch.setattr(conv_filter_winograd, "SUMS_SHARE", sums / host_target().l2_bytes)
        conv_filter_winograd._schedule.cache_clear()

    yield choose
    conv_filter_winograd._schedule.cache_clear()


def node_of(shape, weight, attrs):
    """The node, of operands of `shape` and of what a convolution with `weight` makes of it."""
    x, cotangent, attrs = operands(shape, weight, attrs)
    return make_node(CONV_FILTER_GRADIENT, [Value(TensorType(a.shape, "float32")) for a in (x, cotangent)], attrs)


def algorithm(shape, weight, attrs, target=None) -> str:
    return conv_filter.choose(node_of(shape, weight, attrs), target or host_target())[0]


def both(shape, weight, attrs, **options):
    assert algorithm(shape, weight, attrs, options.get("target")) == "winograd"
    return check(shape, weight, attrs, **options)


CASES = {
    "same": ((2, 13, 9, 20), (3, 3, 20, 24), {"padding": 1}),
    "valid": ((3, 8, 11, 33), (3, 3, 33, 17), {}),
    "one tile": ((1, 3, 3, 16), (3, 3, 16, 16), {"padding": 1}),
    "one row": ((2, 1, 50, 8), (3, 3, 8, 40), {"padding": 1}),
    "padding on one side": ((2, 7, 7, 16), (3, 3, 16, 31), {"padding": ((2, 0), (0, 3))}),
    "negative padding": ((2, 12, 12, 16), (3, 3, 16, 16), {"padding": ((-2, 1), (1, -3))}),
    "dilated": ((2, 14, 11, 12), (3, 3, 12, 20), {"padding": 2, "rhs_dilation": (2, 3)}),
    "few channels": ((2, 20, 20, 3), (3, 3, 3, 5), {"padding": 1}),
    "many chunks": ((9, 32, 32, 8), (3, 3, 8, 8), {"padding": 1}),
    "one axis": ((3, 70, 24), (3, 24, 40), {"padding": 1}),
    "one axis, causal and dilated": ((2, 100, 16), (3, 16, 16), {"padding": ((8, 0),), "rhs_dilation": 4}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("symbols", ["", "N", "NHW"])
@pytest.mark.parametrize("outputs", [2, 4])
def test_cases(always, name, symbols, outputs):
    always(outputs)
    shape, weight, options = CASES[name]
    both(shape, weight, geometry(len(shape) - 2, **options), symbols=symbols[: len(shape) - 1])


@pytest.mark.parametrize("sums", [20 << 10, 100 << 10])
@pytest.mark.parametrize(("channels", "filters"), [(48, 64), (37, 75), (16, 129)])
def test_blocks(always, sums, channels, filters):
    """Blocks of channels and filters that divide them, and that do not."""
    for outputs in PAIRS:
        always(outputs, sums)
        node = node_of((2, 9, 9, channels), (3, 3, channels, filters), geometry(2, padding=1))
        how = conv_filter_winograd.schedule(node, host_target())
        assert how.channel_block < channels or how.filter_block * host_target().lanes("float32") < filters
        both((2, 9, 9, channels), (3, 3, channels, filters), geometry(2, padding=1), symbols="N")


@pytest.mark.parametrize("vector_bytes", [16, 32])
@pytest.mark.parametrize("outputs", [2, 4])
def test_narrower_vectors(always, vector_bytes, outputs):
    always(outputs)
    both((2, 9, 8, 20), (3, 3, 20, 30), geometry(2, padding=1), target=host_target(vector_bytes))


@pytest.mark.parametrize("symbols", ["", "N", "NHW"])
@pytest.mark.parametrize("outputs", [2, 4])
def test_no_images(always, symbols, outputs):
    always(outputs)
    assert not both((0, 8, 8, 8), (3, 3, 8, 8), geometry(2, padding=1), symbols=symbols).any()


@FEW
@given(data=st.data())
def test_any_geometry(data):
    draw = lambda low, high: data.draw(st.integers(low, high))
    axes = draw(1, 2)
    sizes = tuple(draw(3, 14) for _ in range(axes))
    padding = tuple((draw(0, 3), draw(0, 3)) for _ in range(axes))
    dilations = tuple(draw(1, 2) for _ in range(axes))
    channels, filters = draw(1, 40), draw(1, 40)
    with pytest.MonkeyPatch.context() as patch:
        outputs = data.draw(st.sampled_from(sorted(PAIRS)))
        for name, value in (("LEAST_PRODUCTS", 0), ("LEAST_GAIN", 0.0), ("PAIRS", {outputs: PAIRS[outputs]})):
            patch.setattr(conv_filter_winograd, name, value)
        attrs = geometry(axes, padding=padding, rhs_dilation=dilations)
        both((draw(1, 3), *sizes, channels), (*(3,) * axes, channels, filters), attrs, symbols="N"[: draw(0, 1)])


@pytest.mark.parametrize(("outputs", "most"), [(2, 2.0), (4, 5.0)])
def test_error_is_bounded(always, outputs, most, monkeypatch):
    """Against that of the implicit product, of many positions."""
    always(outputs)
    x, cotangent, attrs = operands((8, 28, 28, 32), (3, 3, 32, 32), geometry(2, padding=1))
    wanted = CONV_FILTER_GRADIENT.reference(x.astype("f8"), cotangent.astype("f8"), **attrs)
    error = lambda: np.sqrt(((run(x, cotangent, attrs, "N") - wanted) ** 2).mean())
    fast = error()
    monkeypatch.setenv("KGRAPH_WINOGRAD", "0")
    assert fast < most * error()


@pytest.mark.parametrize("where", [0, 1])
def test_infinities_stay_with_their_channels(always, where):
    """They reach all taps of a channel, or of a filter, but no other one."""
    always(4)
    x, cotangent, attrs = operands((1, 12, 14, 21), (3, 3, 21, 37), geometry(2, padding=1))
    (x, cotangent)[where][0, 1, 3, 2] = np.inf
    finite = np.isfinite(run(x, cotangent, attrs, "N"))
    wanted = np.ones_like(finite)
    if where:
        wanted[..., 2] = False
    else:
        wanted[:, :, 2] = False
    np.testing.assert_array_equal(finite, wanted)


def test_choice(monkeypatch):
    """Where it pays by the estimate, and only there."""
    large, same = (8, 56, 56, 64), geometry(2, padding=1)
    target = host_target()
    assert algorithm(large, (3, 3, 64, 64), same) == "winograd"
    assert algorithm((8, 128, 128, 3), (3, 3, 3, 32), same) == "implicit_product"
    assert algorithm((2, 6, 6, 8), (3, 3, 8, 8), same) == "implicit_product"
    assert algorithm(large, (3, 3, 64, 64), geometry(2, 2, padding=1)) == "implicit_product"
    assert algorithm(large, (3, 3, 32, 64), geometry(2, padding=1, groups=2)) == "implicit_product"
    assert algorithm(large, (5, 3, 64, 64), same) == "implicit_product"
    assert "outputs along an axis" in conv_filter.choose(node_of(large, (3, 3, 64, 64), same), target)[1]
    monkeypatch.setenv("KGRAPH_WINOGRAD", "0")
    assert "switched off" in conv_filter.choose(node_of(large, (3, 3, 64, 64), same), target)[1]


def test_units_for_threads():
    """Also of small images there are several units."""
    for size, channels, filters in ((14, 128, 32), (7, 128, 32), (8, 64, 64)):
        node = node_of((8, size, size, channels), (3, 3, channels, filters), geometry(2, padding=1))
        calls = conv_filter.lower(node, host_target())
        assert calls[0].spec.name == "conv_filter_winograd"
        assert calls[0].extent in (2, 4, 8, 16)
