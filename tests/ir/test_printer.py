"""The text form of graphs reads back exactly."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kgraph import ops  # noqa: F401  (registers the primitives)
from kgraph.errors import ArtifactError
from kgraph.ir import PRIMITIVES, Dim, Graph, Node, TensorType, Value, type_of
from kgraph.ir.parser import parse_graph
from kgraph.ir.printer import print_graph
from kgraph.ir.verifier import verify

P = PRIMITIVES
N = Dim.symbol("N")


def same_attr(a, b) -> bool:
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, Graph):
        same_graph(a, b)
        return True
    if isinstance(a, tuple):
        return type(b) is tuple and len(a) == len(b) and all(map(same_attr, a, b))
    if isinstance(a, float):
        return type(b) is float and np.float64(a).tobytes() == np.float64(b).tobytes()
    return type(a) is type(b) and a == b


def same_graph(a: Graph, b: Graph) -> None:
    assert a.name == b.name
    mapping = {}
    for x, y in zip([*a.inputs, *a.params], [*b.inputs, *b.params], strict=True):
        assert (x.type, x.name) == (y.type, y.name)
        mapping[x] = y
    assert len(a.inputs) == len(b.inputs)
    for m, n in zip(a.nodes, b.nodes, strict=True):
        assert m.primitive is n.primitive
        assert m.provenance == n.provenance
        assert [mapping[v] for v in m.inputs] == list(n.inputs)
        assert m.attrs.keys() == n.attrs.keys()
        for name in m.attrs:
            assert same_attr(m.attrs[name], n.attrs[name]), (m.name, name, m.attrs[name], n.attrs[name])
        for x, y in zip(m.outputs, n.outputs, strict=True):
            assert (x.type, x.name) == (y.type, y.name)
            mapping[x] = y
    assert [mapping[v] for v in a.outputs] == b.outputs


def round_trip(graph: Graph) -> str:
    blobs: dict = {}
    text = print_graph(graph, blobs)
    back = parse_graph(text, blobs)
    same_graph(graph, back)
    again: dict = {}
    assert print_graph(back, again) == text
    assert again.keys() == blobs.keys()
    return text


def constant_graph(value) -> Graph:
    graph = Graph(name="constant")
    graph.outputs = [graph.add(P["constant"], [], value=value)]
    return graph


def small_graph() -> Graph:
    x = Value(TensorType((N, 5), "float32"), name="x")
    w = Value(TensorType((5,), "float32"), name="layer/kernel:0")
    graph = Graph([x], [w], name='odd "name"')
    y = graph.add(P["add"], [x, w], frozenset({"block/dense", 'a "quoted" \\ layer\n'}))
    flat = graph.add(P["reshape"], [y], shape=(N * 5,))
    half = graph.add(P["slice"], [flat], start=(0,), limit=(5 * N - 1,), stride=(2,))
    values, indices = graph.add(P["top_k"], [y], k=2, sorted=True)
    low = graph.add(P["full"], [], shape=(N // 2, 1), value=float("-inf"), dtype="bfloat16")
    graph.outputs = [half, values, indices, low, w]
    return graph


def test_text_of_a_graph():
    text = round_trip(small_graph())
    assert "%reshape_1: f32[5*N] = reshape(%add_0) {shape=(5*N,)}" in text
    assert "%top_k_3.0: f32[N,2], %top_k_3.1: s32[N,2] = top_k(%add_0) {k=2, sorted=True}" in text
    assert '@ "a \\"quoted\\" \\\\ layer\\n", "block/dense"' in text


@pytest.mark.parametrize("record", P.values(), ids=lambda p: p.name)
def test_every_sample_round_trips(record):
    for sample in record.samples():
        graph = Graph([Value(type_of(np.asarray(a))) for a in sample.args], name=record.name)
        out = graph.add(record, graph.inputs, **sample.attrs)
        graph.outputs = list(out) if isinstance(out, tuple) else [out]
        round_trip(graph)


def test_names_stay_unique_and_stable():
    graph = small_graph()
    print_graph(graph)
    graph.nodes[1].outputs[0].name = graph.nodes[0].outputs[0].name
    round_trip(graph)
    names = [v.name for v in graph.inputs + graph.params] + [o.name for n in graph.nodes for o in n.outputs]
    assert len(set(names)) == len(names)
    assert graph.nodes[0].outputs[0].name == "add_0"


def test_nested_graphs():
    a, b = (Value(TensorType((3,), "float32")) for _ in range(2))
    body = Graph([a, b], name="body")
    body.outputs = [body.add(P["neg"], [body.add(P["mul"], [a, b])])]
    x = Value(TensorType((3,), "float32"), name="x")
    graph = Graph([x])
    # The text form does not ask whether the primitive takes graphs.
    outer = Node(P["neg"], [x], {"branches": (body, parse_graph(print_graph(body)))}, [x.type])
    graph.nodes.append(outer)
    graph.outputs = [outer.output]
    assert "\n    inputs (%arg_0" in round_trip(graph)


@settings(max_examples=150, deadline=None)
@given(
    hnp.arrays(
        st.sampled_from(["float32", "float64", "float16", "int32", "uint8", "int64", "uint64", "bool", "complex64"]),
        hnp.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=5),
    )
)
def test_constants_keep_every_bit(value):
    round_trip(constant_graph(value))


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float8_e5m2", "int4", "uint4"])
def test_constants_of_narrow_dtypes(dtype):
    values = np.array([0, 1, 2, 3, 0.1, 7]).astype(getattr(ml_dtypes, dtype))
    assert "array(" in round_trip(constant_graph(values))


def test_small_constants_are_readable_and_large_ones_apart():
    assert "array(f32[2], [0.1, -1.5])" in round_trip(constant_graph(np.array([0.1, -1.5], "float32")))
    assert "blob(" in round_trip(constant_graph(np.ones(1000, "float32")))
    assert "blob(" in round_trip(constant_graph(np.array(0x7FC00001, "uint32").view("float32")))  # a NaN's payload


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected 'graph'"),
        (
            'graph "g" {\n  inputs (%x: f32[3])\n  %y: f32[3] = nothing(%x)\n  return (%y)\n}',
            "line 3: expected the",
        ),
        ('graph "g" {\n  inputs (%x: f32[3])\n  %y: f32[3] = neg(%z)\n  return (%y)\n}', "defined above, found '%z'"),
        ('graph "g" {\n  inputs (%x: f32[3], %x: f32[3])\n  return (%x)\n}', "%x is defined twice"),
        ('graph "g" {\n  inputs (%x: f33[3])\n  return (%x)\n}', "line 2: expected a dtype"),
        (
            'graph "g" {\n  inputs ()\n  %c: f32[] = constant() {value=blob("ab")}\n  return (%c)\n}',
            "'ab' is not",
        ),
        ('graph "g" {\n  inputs ()\n  return ()\n} more', "expected the end"),
        ('graph "g" {\n  inputs ()\n  return (;)\n}', "line 3: unexpected character ';'"),
        ('graph "g" {\n  inputs (', "the end of the text"),
    ],
)
def test_bad_text_is_refused_with_its_line(text, message):
    with pytest.raises(ArtifactError, match=message.replace("(", r"\(")):
        parse_graph(text)


def test_read_graph_verifies():
    blobs: dict = {}
    verify(parse_graph(print_graph(small_graph(), blobs), blobs))
