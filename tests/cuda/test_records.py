"""Every primitive that a CUDA family takes, on the samples of its record, against its reference: in the simulator, on a
GPU or an emulated one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from kgraph import ops  # noqa: F401 - registers the primitives
from kgraph.codegen.cuda import families
from kgraph.ir import PRIMITIVES
from tests.codegen.samples import compare
from tests.cuda.driver import IS_EMULATED, IS_SLOW, make, run_node

MOST_ELEMENTS = 5000  # of a sample's operands and results in the simulator, which interprets every thread


def samples_of(record):
    """The samples of a record that a CUDA family takes: (node, sample)."""
    for sample in record.samples():
        node = make(record, sample)
        if IS_SLOW and sum(v.type.size for v in (*node.inputs, *node.outputs)) > MOST_ELEMENTS:
            continue
        if families.accepts(node) is None:
            yield node, sample


ACCEPTED = [p for p in PRIMITIVES.values() if any(True for _ in samples_of(p))]


def check(record, samples):
    for node, sample in samples:
        args = [np.asarray(a) for a in sample.args]
        with np.errstate(all="ignore"):
            expected = record.reference(*args, **sample.attrs)
        expected = expected if isinstance(expected, tuple) else (expected,)
        for result, wanted in zip(run_node(node, args), expected, strict=True):
            assert result.shape == np.shape(wanted), sample
            compare(result, np.asarray(wanted), record.tolerance)


@pytest.mark.skipif(IS_EMULATED, reason="takes minutes: see below")
@pytest.mark.parametrize("record", ACCEPTED, ids=lambda p: p.name)
def test_kernels_agree_with_the_reference(record):
    check(record, samples_of(record))


@pytest.mark.skipif(not IS_EMULATED, reason="others run all samples")
@pytest.mark.parametrize(
    "most", [pytest.param(1, id="first sample"), pytest.param(None, id="all samples", marks=pytest.mark.long)]
)
@pytest.mark.parametrize("record", ACCEPTED, ids=lambda p: p.name)
def test_emulated_kernels_agree_with_the_reference(record, most):
    check(record, itertools.islice(samples_of(record), most))
