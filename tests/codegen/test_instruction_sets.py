"""Kernels made for SSE4.2 and AVX2 on the samples of primitives of each family that has no such test of its own."""

from __future__ import annotations

import numpy as np
import pytest

from kgraph import ops
from kgraph.codegen import families
from kgraph.ir import PRIMITIVES
from tests.codegen.driver import host_target, run_node
from tests.codegen.samples import compare, make

NAMES = (
    "add mul convert select gelu exp tanh sin floor_divide pow logistic is_nan round_nearest_even shift_right "
    "reduce_sum reduce_max reduce_and argmax softmax logsumexp layer_norm group_norm batch_norm rms_norm "
    "transpose pad pad_mirror slice rev concatenate dynamic_slice dynamic_update_slice take take_along_axis gather_nd "
    "scatter_nd scatter_along_axis sort argsort cumsum cummax reduce_window resize"
).split()


@pytest.mark.parametrize("vector_bytes", [16, 32])
@pytest.mark.parametrize("name", NAMES)
def test_samples(name, vector_bytes):
    assert hasattr(ops, name)  # importing the functions fills the registry
    primitive, target = PRIMITIVES[name], host_target(vector_bytes)
    for sample in primitive.samples():
        node = make(primitive, sample)
        if families.accepts(node) is not None:
            continue
        (result,) = run_node(families.family_of(node).lower, node, list(sample.args), parts=2, target=target)
        with np.errstate(all="ignore"):
            wanted = primitive.reference(*sample.args, **sample.attrs)
        compare(result, wanted.astype(result.dtype), primitive.tolerance)
