"""Every broken invariant is caught, and the message shows where."""

import numpy as np
import pytest

from kgraph import ops  # noqa: F401  (registers the primitives)
from kgraph.errors import VerificationError
from kgraph.ir import PRIMITIVES, Dim, Graph, Node, TensorType, Value
from kgraph.ir.primitive import Primitive
from kgraph.ir.verifier import verify

P = PRIMITIVES
N = Dim.symbol("N")


def graph_of_three() -> Graph:
    x = Value(TensorType((N, 5), "float32"), name="x")
    graph = Graph([x], [Value(TensorType((5,), "float32"), name="w")], name="three")
    y = graph.add(P["add"], [x, graph.params[0]], frozenset({"dense"}))
    z = graph.add(P["relu"], [y])
    graph.outputs = [graph.add(P["reduce_sum"], [z], axes=(1,), keepdims=False)]
    return graph


def test_sound_graph_comes_back():
    graph = graph_of_three()
    assert verify(graph) is graph


def swapped_order(g):
    g.nodes[0], g.nodes[1] = g.nodes[1], g.nodes[0]


def missing_node(g):
    del g.nodes[1]


def repeated_node(g):
    g.nodes.append(g.nodes[0])


def foreign_operand(g):
    g.nodes[1].inputs = (Value(TensorType((N, 5), "float32"), name="stranger"),)


def wrong_shape(g):
    g.nodes[1].outputs[0].type = TensorType((N, 6), "float32")


def wrong_dtype(g):
    g.nodes[2].outputs[0].type = TensorType((N,), "float64")


def wrong_attribute(g):
    g.nodes[2].attrs["axes"] = (2,)


def missing_attribute(g):
    del g.nodes[2].attrs["axes"]


def unhashable_attribute(g):
    g.nodes[2].attrs["axes"] = [1]


def wrong_operand_count(g):
    g.nodes[1].inputs = g.nodes[1].inputs * 2


def wrong_result_number(g):
    g.nodes[1].outputs[0].index = 1


def result_of_another_node(g):
    g.nodes[1].outputs = (Value(g.nodes[1].outputs[0].type, g.nodes[0], 0),)


def undefined_output(g):
    g.outputs = [Value(TensorType((), "float32"))]


def input_made_by_a_node(g):
    g.inputs.append(g.nodes[0].outputs[0])


def input_listed_twice(g):
    g.params.append(g.inputs[0])


def provenance_of_another_kind(g):
    g.nodes[1].provenance = "dense"


def provenance_of_other_things(g):
    g.nodes[1].provenance = frozenset({("dense", 1)})


def unregistered_primitive(g):
    relu = P["relu"]
    twin = Primitive("relu", relu.infer, relu.reference, relu.gradient, relu.traits, relu.samples)
    g.nodes[1].primitive = twin


def broken_nested_graph(g):
    inner = graph_of_three()
    del inner.nodes[0]
    g.nodes[1].attrs = {"branches": (inner,)}
    g.nodes[1].primitive = Primitive(
        "holder", lambda x, branches: x, P["relu"].reference, P["relu"].gradient, frozenset(), P["relu"].samples
    )


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (swapped_order, "is not defined before it"),
        (missing_node, "is not defined before it"),
        (repeated_node, "is defined twice"),
        (foreign_operand, "%stranger"),
        (wrong_shape, r"gives f32\[N,5\], but its results are f32\[N,6\]"),
        (wrong_dtype, r"gives f32\[N\], but its results are f64\[N\]"),
        (wrong_attribute, "its shape rule refuses it: ShapeError"),
        (missing_attribute, "its shape rule refuses it: TypeError"),
        (unhashable_attribute, "is not hashable"),
        (wrong_operand_count, "its shape rule refuses it: TypeError"),
        (wrong_result_number, "as number 1, expected number 0"),
        (result_of_another_node, "belongs to"),
        (undefined_output, "the output .* is not defined"),
        (input_made_by_a_node, "the input .* is the result of a node"),
        (input_listed_twice, "is listed twice"),
        (provenance_of_another_kind, "expected a frozenset of strings"),
        (provenance_of_other_things, "expected a frozenset of strings"),
        (unregistered_primitive, "is not the registered one"),
        (broken_nested_graph, "is not defined before it"),
    ],
)
def test_mutation_is_caught(break_it, message, monkeypatch):
    graph = graph_of_three()
    break_it(graph)
    for node in graph.nodes:
        if node.name == "holder":
            monkeypatch.setitem(P, "holder", node.primitive)
    with pytest.raises(VerificationError, match=message):
        verify(graph, after="some_pass")


def test_message_names_the_pass_and_shows_the_neighbours():
    graph = graph_of_three()
    wrong_shape(graph)
    with pytest.raises(VerificationError) as caught:
        verify(graph, after="fuse_loops")
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("graph 'three' after fuse_loops breaks the IR")
    assert lines[1].startswith('  0: %add_0: f32[N,5] = add(%x, %w) @ "dense"')
    assert lines[2].startswith("> 1: %relu_1: f32[N,6] = relu(%add_0)")
    assert lines[3].startswith("  2: ")


def test_array_attributes_are_allowed():
    graph = Graph()
    graph.nodes.append(Node(P["constant"], [], {"value": np.ones(3, "float32")}, [TensorType((3,), "float32")]))
    graph.outputs = [graph.nodes[0].output]
    verify(graph)
