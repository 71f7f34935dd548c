"""What kernels ask of a GPU, counted on the emulated one: instructions, sectors of memory, passes of shared memory."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import kgraph
from kgraph.runtime.cuda.device import device_for
from tests.cuda.driver import DEVICE, IS_EMULATED
from tests.cuda.emulator.counts import Counts

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
