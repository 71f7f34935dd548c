"""Counts what kernels ask of a GPU, on the emulated one: `KGRAPH_TEST_DEVICE=cuda-emulator python -m
tests.cuda.instruction_counts OUTPUT`.

OUTPUT gets JSON: by the name of a node, for each of its launches the instructions of threads per element of the node's
result, or of the cotangent where that is one of weights ("instructions"), the same by kind ("mix"), and whether arrays
of threads are in memory ("local"). It runs in a process of its own, in which Numba's simulator is off. The target has
one multiprocessor, so that small nodes keep it busy.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from kgraph.codegen.cuda.target import make_target
from kgraph.ir.dims import product
from tests.codegen.contractions import filled
from tests.cuda import driver
from tests.cuda.emulator.counts import Counts
from tests.cuda.emulator.machine import Kernel
from tests.cuda.test_conv import convolution, filter_gradient
from tests.cuda.test_pool import attributes, pooling, resampling

WARP = 32


def depthwise(image, window, channels=32, **options):
    return convolution((1, *image, channels), (*window, 1, channels), feature_groups=channels, **options)


def pool(kind, window, stride, padding):
    padding = ((0, 0), padding, padding, (0, 0))
    return pooling((1, 32, 32, 32), attributes(kind, (1, window, window, 1), (1, stride, stride, 1), padding))


NODES = {
    "depthwise 3x3": lambda: depthwise((32, 32), (3, 3), padding=1),
    "depthwise 3x3 by 2": lambda: depthwise((32, 32), (3, 3), padding=((0, 1), (0, 1)), strides=2),
    "depthwise 5x5": lambda: depthwise((32, 32), (5, 5), padding=2),
    "depthwise 3x3 of images dilated by 2": lambda: depthwise(
        (16, 16), (3, 3), padding=((2, 1), (2, 1)), lhs_dilation=2
    ),
}

NODES |= {
    "maximum of 3x3": lambda: pool("max", 3, 1, (1, 1)),
    "maximum of 3x3 by 2": lambda: pool("max", 3, 2, (0, 1)),
    "sum of 2x2 by 2": lambda: pool("sum", 2, 2, (0, 0)),
    "depthwise weights 3x3": lambda: filter_gradient((4, 32, 32, 32), 32, (3, 3), groups=32, padding=1),
}
NODES |= {
    method: lambda method=method: resampling((1, 16, 16, 64), (32, 32), method)
    for method in ("nearest", "bilinear", "bicubic")
}


def count(node) -> list[dict]:
    """Of the launches that compute the node, with all blocks that they may have."""
    found: list[tuple[Kernel, Counts]] = []
    launch = Kernel.launch

    def counted(self, *arguments):
        self.counts = counts = Counts()
        found.append((self, counts))
        launch(self, *arguments)

    Kernel.launch = counted
    try:
        arrays = [filled(v.shape, v.dtype, n) for n, v in enumerate(node.inputs)]
        driver.run_node(node, arrays, target=make_target((9, 0), num_sms=1), most_blocks=1 << 30)
    finally:
        Kernel.launch = launch
    elements = product((node.inputs[1] if node.name == "conv_filter_gradient" else node.output).shape)
    per_element = lambda n: round(n * WARP / elements, 2)
    return [
        {
            "instructions": per_element(sum(counts.instructions.values())),
            "mix": {kind: per_element(n) for kind, n in counts.instructions.most_common()},
            "local": any(v.space == "local" for v in kernel.module.entry.locals),
        }
        for kernel, counts in found
    ]


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps({name: count(make()) for name, make in NODES.items()}, indent=1))
