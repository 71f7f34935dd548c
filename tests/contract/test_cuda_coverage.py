"""What the CUDA target has kernels for, against what the CPU has: the difference is data that shrinks to nothing."""

from __future__ import annotations

import numpy as np
import pytest

from kgraph import ops  # noqa: F401 - registers the primitives
from kgraph.codegen import families
from kgraph.codegen.cpu.scalar_ops import EMITTERS
from kgraph.codegen.cuda import families as cuda_families
from kgraph.codegen.cuda.scalar_ops import FORMS
from kgraph.codegen.expressions import OPERATIONS
from kgraph.ir import PRIMITIVES, Value, make_node, type_of

# Primitives with a CPU kernel and none for CUDA yet.
MISSING: frozenset[str] = frozenset()
COMPLETE = [p for p in PRIMITIVES.values() if p.name not in MISSING]


def nodes(record):
    for sample in record.samples():
        values = [Value(type_of(np.asarray(a))) for a in sample.args]
        yield make_node(record, values, sample.attrs)


def test_every_scalar_operation_has_code_on_every_target():
    assert set(EMITTERS) == OPERATIONS
    assert set(FORMS) == OPERATIONS


def test_primitives_that_have_a_kernel_on_the_cpu_alone():
    found = {
        record.name
        for record in PRIMITIVES.values()
        if any(families.accepts(node) is None for node in nodes(record))
        and not any(cuda_families.accepts(node) is None for node in nodes(record))
    }
    assert found == MISSING


def test_every_kind_of_fused_node_has_a_family_on_every_target():
    assert set(families.BY_KIND) == set(cuda_families.BY_KIND)


@pytest.mark.parametrize("record", COMPLETE, ids=lambda p: p.name)
def test_cuda_takes_every_sample_that_the_cpu_takes(record):
    for node in nodes(record):
        if families.accepts(node) is None:
            assert cuda_families.accepts(node) is None, node
