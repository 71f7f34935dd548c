"""What kernels ask of a GPU, counted on the emulated one: instructions, sectors of memory, passes of shared memory."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import kgraph
from kgraph.codegen.cuda.target import make_target
from kgraph.ir.dims import product
from kgraph.runtime.cuda.device import device_for
from tests.codegen.contractions import filled
from tests.cuda.driver import DEVICE, IS_EMULATED, run_node
from tests.cuda.emulator.counts import Counts
from tests.cuda.test_conv import convolution, filter_gradient
from tests.cuda.test_pool import attributes, pooling, resampling

pytestmark = pytest.mark.skipif(not IS_EMULATED, reason="counted on the emulated GPU")
layers = keras.layers


def counted(shape: tuple[int, ...], layer, dtype: str = "float32") -> dict[str, Counts]:
    """The counts of the kernels of one layer, by name."""
    inputs = keras.Input(shape[1:], dtype=dtype)
    compiled = kgraph.compile(keras.Model(inputs, layer(inputs)), target=DEVICE)
    driver = device_for("cuda:0").driver._library
    with driver.counted() as found:
        compiled(np.zeros(shape, dtype))
    return dict(found)


@pytest.mark.parametrize(
    ("shape", "layer", "name", "most"),
    [
        ((4, 32, 32, 64), layers.Conv2D(64, 3, padding="same"), "conv_add", 1.45),
        ((4, 32, 32, 64), layers.Conv2D(128, 3, strides=2, padding="same"), "conv_add", 1.45),
        ((512, 512), layers.Dense(512), "gemm_add", 1.4),
    ],
)
def test_most_instructions_of_products_multiply(shape, layer, name, most):
    counts = counted(shape, layer)[name]
    assert counts.instructions.total() < most * counts.instructions["fma.f32"]
    # Words of 16 bytes: the sixteen operands of 64 products come in four.
    assert counts.instructions["ld.f32"] < counts.instructions["fma.f32"] / 13
    assert counts.passes < 2.1 * counts.accesses
    assert counts.sectors["st"] * 32 == counts.bytes["st"]  # whatever thread has summed it
    assert counts.sectors["ld"] * 32 <= counts.bytes["ld"]


def test_half_floats_are_fetched_in_groups():
    counts = counted((4, 32, 32, 64), layers.Conv2D(64, 3, padding="same", dtype="float16"), "float16")["conv_add"]
    assert counts.instructions.total() < 27 * counts.instructions["mma.f32"]
    assert counts.sectors["st"] * 32 == counts.bytes["st"]


def test_elementwise_kernels_ask_for_what_they_need():
    counts = counted((4, 32, 32, 64), layers.ReLU())
    (relu,) = counts.values()
    assert relu.sectors["ld"] * 32 == relu.bytes["ld"] == relu.touched["ld"] == 4 * 4 * 32 * 32 * 64
    assert relu.instructions.total() < 3 * relu.touched.total() / 32


def test_channels_that_do_not_come_in_groups():
    """The same results, with an instruction for each operand."""
    inputs = keras.Input((9, 9, 6))
    model = keras.Model(inputs, layers.Conv2D(5, 3, padding="same")(inputs))
    x = np.random.default_rng(0).standard_normal((2, 9, 9, 6)).astype(np.float32)
    np.testing.assert_allclose(np.asarray(kgraph.compile(model, target=DEVICE)(x)), model(x), rtol=1e-5, atol=1e-5)


# -- kernels whose threads share what they read -----------------------------------------------------------------------
WARP = 32


def depthwise(image, window, channels=32, **options):
    return convolution((1, *image, channels), (*window, 1, channels), feature_groups=channels, **options)


def pool(kind, window, stride, padding):
    padding = ((0, 0), padding, padding, (0, 0))
    return pooling((1, 32, 32, 32), attributes(kind, (1, window, window, 1), (1, stride, stride, 1), padding))


def resized(method):
    return resampling((1, 16, 16, 64), (32, 32), method)


# A node, and the most instructions of threads per element of its result (of the cotangent where that is one of weights)
# in all launches: some percent above what there is. A GPU has time for about 7 per byte of memory.
NODES = {
    "depthwise 3x3": (lambda: depthwise((32, 32), (3, 3), padding=1), 38),
    "depthwise 3x3 by 2": (lambda: depthwise((32, 32), (3, 3), padding=((0, 1), (0, 1)), strides=2), 53),
    "depthwise 5x5": (lambda: depthwise((32, 32), (5, 5), padding=2), 67),
    "depthwise 3x3 of images dilated by 2": (
        lambda: depthwise((16, 16), (3, 3), padding=((2, 1), (2, 1)), lhs_dilation=2),
        21,
    ),
    "depthwise weights 3x3": (lambda: filter_gradient((4, 32, 32, 32), 32, (3, 3), groups=32, padding=1), 38),
    "maximum of 3x3": (lambda: pool("max", 3, 1, (1, 1)), 48),
    "maximum of 3x3 by 2": (lambda: pool("max", 3, 2, (0, 1)), 68),
    "sum of 2x2 by 2": (lambda: pool("sum", 2, 2, (0, 0)), 33),
    "nearest": (lambda: resized("nearest"), 23),
    "bilinear": (lambda: resized("bilinear"), 42),
    "bicubic": (lambda: resized("bicubic"), 110),
}


@pytest.mark.parametrize("name", NODES)
def test_instructions_per_element(name):
    make, most = NODES[name]
    node = make()
    arrays = [filled(v.shape, v.dtype, n) for n, v in enumerate(node.inputs)]
    with device_for("cuda:0").driver._library.counted() as found:
        # One multiprocessor, which small nodes keep busy, with all blocks that they may have.
        run_node(node, arrays, target=make_target((9, 0), num_sms=1), most_blocks=1 << 30)
    elements = product((node.inputs[1] if node.name == "conv_filter_gradient" else node.output).shape)
    assert sum(c.instructions.total() for _, c in found) * WARP / elements <= most
    assert not any(c.local_bytes for _, c in found)  # threads' arrays are in registers
