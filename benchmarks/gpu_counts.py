"""What kernels ask of a GPU, counted without one: `python -m benchmarks.gpu_counts [CASE...]`.

Layers and training steps are compiled for an emulated GPU (`tests.cuda.emulator`), which runs their PTX and counts
instructions of warps, sectors of memory and passes of shared memory. From these come lower bounds of the time on a
data-centre GPU (`Machine`), each of which a resource alone would take; what bounds a kernel is the longest one. PTX is
not machine code: moves and changes of width are taken to be free, divisions to be as long as the code that they become.

Without cases all are counted, and the table goes to `results/gpu_counts.md`.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

import kgraph  # before keras
from kgraph.runtime.cuda import device as devices  # isort: split

import keras

from tests.cuda.emulator.counts import SECTOR, Counts
from tests.cuda.emulator.driver import emulated_gpu

layers = keras.layers
RESULTS = Path(__file__).resolve().parent / "results" / "gpu_counts.md"
FREE = ("mov", "cvta", "ld.u64")
# Instructions of the machine for one of PTX, about; the special unit serves a warp in eight cycles.
LONG = {"div": {"u32": 16, "s32": 20, "u64": 70, "s64": 70, "f32": 10, "f64": 30}, "sqrt": {"f32": 8, "f64": 30}}
LONG["rem"], LONG["rcp"] = LONG["div"], {"f32": 4}
SPECIAL = ("ex2", "lg2", "rcp", "rsqrt", "sin", "cos", "tanh")


class Machine(NamedTuple):
    """An H200, as its data sheet has it: multiprocessors, cycles and bytes per second."""

    sms: int = 132
    clock: float = 1.7e9
    memory: float = 4.0e12
    cache: float = 5.5e12

    def seconds(self, c: Counts) -> dict[str, float]:
        """The bounds of a launch by what sets them."""
        machine: Counter[str] = Counter()
        special = 0
        for name, count in c.instructions.items():
            kind, _, dtype = name.partition(".")
            if kind in FREE or name in FREE:
                continue
            machine["all"] += count * LONG.get(kind, {}).get(dtype, 1)
            special += count * (kind in SPECIAL)
        sectors = c.sectors.total()
        cycles = {
            "issue": machine["all"] / 4,
            "special": special * 2,
            # Four sectors a cycle, or a pass of shared memory.
            "load/store": sectors / 4 + c.passes,
        }
        bounds = {"memory": c.touched.total() / self.memory, "cache": sectors * SECTOR / self.cache}
        return bounds | {name: n / (self.sms * self.clock) for name, n in cycles.items()}


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def infer(shape: tuple[int, ...], *stack, dtype: str = "float32") -> Callable[[], None]:
    """Layers one after the other on a batch of this shape."""

    def run() -> None:
        out = inputs = keras.Input(shape[1:], dtype=dtype)
        for layer in stack:
            out = layer(out)
        x = numbers(*shape) if dtype.startswith("float") else np.random.default_rng(0).integers(0, 1000, shape)
        kgraph.compile(keras.Model(inputs, out), target="cuda")(x.astype(dtype))

    return run


def residual(x):
    x = layers.Conv2D(32, 3, padding="same", use_bias=False)(x)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.Conv2D(64, 3, strides=2, padding="same", use_bias=False)(x)
    x = layers.MaxPooling2D()(layers.ReLU()(layers.BatchNormalization()(x)))
    return layers.Dense(10)(layers.GlobalAveragePooling2D()(x))


def inverted(x):
    y = layers.ReLU(6)(layers.BatchNormalization()(layers.Conv2D(96, 1, use_bias=False)(x)))
    y = layers.DepthwiseConv2D(3, padding="same", use_bias=False)(y)
    y = layers.ReLU(6)(layers.BatchNormalization()(y))
    y = layers.BatchNormalization()(layers.Conv2D(32, 1, use_bias=False)(y))
    return layers.GlobalAveragePooling2D()(layers.Add()([x, y]))


def transformer(tokens):
    x = layers.Embedding(1000, 128)(tokens)
    x = layers.LayerNormalization()(x + layers.MultiHeadAttention(4, 32)(x, x))
    y = layers.Dense(128)(layers.Dense(256, activation="gelu")(x))
    return layers.Dense(1000)(layers.Dropout(0.1)(layers.LayerNormalization()(x + y)))


def recurrent(x):
    return layers.Dense(10)(layers.LSTM(64)(x))


def train(shape: tuple[int, ...], build, classes: int = 0) -> Callable[[], None]:
    """A step of Adam. classes: of a loss over classes, for inputs that are numbers of tokens."""

    def run() -> None:
        inputs = keras.Input(shape[1:], dtype="int32" if classes else "float32")
        model = keras.Model(inputs, build(inputs))
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True) if classes else "mse"
        model.compile("adam", loss=loss)
        if classes:
            x = y = np.random.default_rng(0).integers(0, classes, shape)
        else:
            x, y = numbers(*shape), numbers(shape[0], *model.output.shape[1:])
        kgraph.set_device("cuda")
        try:
            model.train_on_batch(x, y)
        finally:
            kgraph.set_device("cpu")

    return run


IMAGES = (4, 32, 32, 64)
CASES: dict[str, Callable[[], None]] = {
    "relu": infer(IMAGES, layers.ReLU()),
    "gelu": infer((256, 1024), layers.Activation("gelu")),
    "float16 relu": infer(IMAGES, layers.ReLU(dtype="float16"), dtype="float16"),
    "batch norm": infer(IMAGES, layers.BatchNormalization()),
    "layer norm": infer((4, 128, 256), layers.LayerNormalization()),
    "softmax": infer((4, 128, 128), layers.Softmax()),
    "permute": infer(IMAGES, layers.Permute((3, 1, 2))),
    "zero padding": infer(IMAGES, layers.ZeroPadding2D(1)),
    "embedding": infer((8, 128), layers.Embedding(1000, 256), dtype="int32"),
    "max pooling 2x2": infer(IMAGES, layers.MaxPooling2D()),
    "max pooling 3x3": infer(IMAGES, layers.MaxPooling2D(3, 2, "same")),
    "average pooling": infer(IMAGES, layers.GlobalAveragePooling2D()),
    "upsampling": infer((2, 32, 32, 64), layers.UpSampling2D(interpolation="bilinear")),
    "dense 512": infer((512, 512), layers.Dense(512)),
    "dense 4096": infer((1024, 256), layers.Dense(4096)),
    "float16 dense 512": infer((512, 512), layers.Dense(512, dtype="float16"), dtype="float16"),
    "conv 1x1": infer(IMAGES, layers.Conv2D(128, 1)),
    "conv 3x3": infer(IMAGES, layers.Conv2D(64, 3, padding="same")),
    "conv 3x3/2": infer(IMAGES, layers.Conv2D(128, 3, strides=2, padding="same")),
    "conv 7x7/2": infer((2, 64, 64, 3), layers.Conv2D(64, 7, strides=2, padding="same")),
    "float16 conv 3x3": infer(IMAGES, layers.Conv2D(64, 3, padding="same", dtype="float16"), dtype="float16"),
    "depthwise 3x3": infer(IMAGES, layers.DepthwiseConv2D(3, padding="same")),
    "depthwise 5x5/2": infer(IMAGES, layers.DepthwiseConv2D(5, strides=2, padding="same")),
    "lstm": infer((64, 8, 64), layers.LSTM(128)),
    "train residual": train((8, 32, 32, 32), residual),
    "train inverted": train((4, 32, 32, 32), inverted),
    "train transformer": train((4, 64), transformer, 1000),
    "train recurrent": train((32, 8, 32), recurrent),
}


def rows_of(case: str, found: list[tuple[str, Counts]]) -> list[str]:
    lines = []
    for name, c in found:
        seconds = Machine().seconds(c)
        bound = max(seconds, key=seconds.__getitem__)
        touched = max(c.touched.total(), 1)
        ratios = [c.instructions.total() * 32 / touched, c.sectors.total() * SECTOR / touched]
        ratios += [c.sectors[what] * SECTOR / c.bytes[what] if c.bytes[what] else 0 for what in ("ld", "st")]
        ratios.append(c.passes / c.accesses if c.accesses else 0)
        cells = [case, name, c.grid, c.block, *(f"{r:.2f}" for r in ratios)]
        cells += [f"{seconds['memory'] * 1e6:.2f}", f"{seconds[bound] * 1e6:.2f}", bound]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


HEAD = """# Kernels on an emulated GPU

Per byte of the different sectors that a kernel touches: instructions of threads, and bytes of sectors that its warps
ask for. Then bytes of sectors over bytes that threads load and store (below 1 where threads read one place), passes
over accesses of shared memory, and bounds in microseconds: what memory takes, and what takes longest.

| case | kernel | grid | block | instructions | sectors | load | store | passes | memory us | bound us | by |
|---|---|---|---|---|---|---|---|---|---|---|---|"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}")
    chosen = parser.parse_args().cases
    gpu = devices._devices["cuda:0"] = emulated_gpu()
    lines = [HEAD]
    for case in chosen or CASES:
        keras.utils.set_random_seed(0)
        with gpu.driver._library.counted() as found:
            CASES[case]()
        lines += rows_of(case, found)
        print("\n".join(lines if len(lines) == len(found) + 1 else lines[-len(found) :]), flush=True)
    if not chosen:
        RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
