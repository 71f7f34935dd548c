"""Updates of state in a program for CUDA: small ones of one form share kernels, as many as parameters have room for."""

from __future__ import annotations

import numpy as np
import pytest

from kgraph.compiler import compile_graph
from kgraph.ir.interpreter import evaluate
from kgraph.passes.pipeline import TRAINING
from kgraph.runtime.cuda.device_array import DeviceArray
from kgraph.targets import resolve
from tests.codegen.test_loop_group import RNG, momentum_step

SHAPES = [(3,), (7, 2), (1030,), (5,)]


@pytest.mark.parametrize(("members", "kernels"), [(4, 1), (40, 2)])
def test_small_updates_of_one_form_share_kernels(members, kernels):
    shapes = SHAPES + [(2 + number,) for number in range(members - len(SHAPES))]
    graph, donations = momentum_step(shapes)
    arrays = [np.float32(0.1).reshape(())]
    arrays += [RNG.standard_normal(s).astype(np.float32) for s in shapes for _ in range(3)]
    expected = evaluate(graph, [a.astype(np.float64) for a in arrays], [])
    program = compile_graph(graph, None, TRAINING, donations, target=resolve("cuda-simulator")).program
    assert len(program.steps) == kernels
    assert all(len(step.operands) + len(step.sizes) <= 512 for step in program.steps)  # 4 KiB of parameters
    given = [DeviceArray.copy_of(program.device, a) for a in arrays]
    for number, (result, wanted) in enumerate(zip(program(given), expected, strict=True)):
        assert result is given[{o: i for i, o in donations}[number]]
        np.testing.assert_allclose(np.asarray(result), wanted, rtol=1e-6, atol=1e-6)
