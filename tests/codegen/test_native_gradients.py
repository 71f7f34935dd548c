"""Whatever has a forward kernel has kernels for its backward pass: no step of a training program falls to the host."""

import numpy as np
import pytest

import kgraph  # noqa: F401
from kgraph.codegen import families
from kgraph.ir import PRIMITIVES, Graph, NotDifferentiable, Value, make_node, type_of
from kgraph.passes.autodiff import differentiate
from kgraph.passes.manager import PassContext, run_passes
from kgraph.passes.pipeline import TRAINING

FREE = {"constant", "reshape", "stop_gradient", "optimization_barrier", "dim_value"}  # no steps of their own
DIFFERENTIABLE = sorted(name for name, p in PRIMITIVES.items() if not isinstance(p.gradient, NotDifferentiable))


def host_steps(sample, primitive) -> list[str]:
    """The nodes of a sample's forward and backward graph that no kernel family takes."""
    arguments = [Value(type_of(np.asarray(a))) for a in sample.args]
    node = make_node(primitive, arguments, dict(sample.attrs))
    wrt = [a for a in arguments if a.type.is_float]
    results = [o for o in node.outputs if o.type.is_float]
    if families.accepts(node) is not None or not wrt or not results:
        return []
    graph = Graph(arguments, nodes=[node], outputs=results, name=primitive.name)
    joint = differentiate(graph, wrt, results, [Value(o.type) for o in results])
    optimised = run_passes(joint, TRAINING, PassContext(accepts=families.accepts))
    rest = [n for n in optimised.nodes if n.name not in FREE and n.name != "fusion"]
    return [f"{n.name}: {reason}" for n in rest if (reason := families.accepts(n)) is not None]


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_backward_of_a_native_primitive_is_native(name):
    primitive = PRIMITIVES[name]
    for sample in primitive.samples():
        assert host_steps(sample, primitive) == []
