"""Random words and what is made of them: native kernels give the reference's numbers, however they are cut."""

from __future__ import annotations

import numpy as np
import pytest

from kgraph import ops
from kgraph.codegen import families
from kgraph.codegen.cpu import loop
from kgraph.codegen.target import host_target as target_of_programs
from kgraph.compiler import compile_graph
from kgraph.frontend.tracer import trace
from kgraph.ir import PRIMITIVES, Dim, Graph, TensorType, Value, make_node, type_of
from kgraph.ops import philox
from kgraph.ops.region_gradient import record_region
from kgraph.passes.pipeline import TRAINING
from kgraph.translation import optimise
from tests.codegen.driver import host_target, run_node

SEED = np.array([7, 0xFFFFFFF0], np.uint32)
SEED_TYPE = TensorType((2,), "uint32")
N = Dim.symbol("N")


def words_node(shape, stream=0, dtype="uint32"):
    return make_node(PRIMITIVES["random_words"], [Value(TensorType((2,), dtype))], {"shape": shape, "stream": stream})


@pytest.mark.parametrize("vector_bytes", [None, 32, 16])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (64,), (65,), (513,), (3, 700), (0, 4), (2, 3, 1111)])
def test_words_are_those_of_the_reference(shape, vector_bytes):
    wanted = philox.words_by_numpy((7, 0xFFFFFFF0), int(np.prod(shape)), 1).reshape(shape)
    for parts in (1, 3):
        (got,) = run_node(loop.lower, words_node(shape, 1), [SEED], parts=parts, target=host_target(vector_bytes))
        np.testing.assert_array_equal(got, wanted)


def test_a_signed_seed_is_the_same_seed():
    (got,) = run_node(loop.lower, words_node((9,), dtype="int32"), [SEED.view(np.int32)])
    np.testing.assert_array_equal(got, ops.random_words(SEED, shape=(9,)))


@pytest.mark.parametrize("vector_bytes", [None, 32])
@pytest.mark.parametrize("shape", [(50, 128), (40, 10), (9, 130), (5, 4500), (4, 6, 33), (2,), (0, 3)])
@pytest.mark.parametrize("operand", ["full", "channels", "rows"])
def test_words_fuse_with_operands_of_any_shape(shape, operand, vector_bytes):
    """Rows start anywhere within a group of words."""
    own = {"full": shape, "channels": shape[-1:], "rows": (*shape[:-1], 1)}[operand]
    x = np.random.default_rng(0).integers(0, 1 << 32, own, np.uint32)

    def build(seed, x):
        first, second = (ops.random_words(seed, shape=shape, stream=s) for s in (0, 1))
        return [ops.bitwise_xor(ops.add(first, x), second), first]

    body = record_region("loop", [SEED_TYPE, type_of(x)], build)
    node = make_node(PRIMITIVES["fusion"], [Value(SEED_TYPE), Value(type_of(x))], {"kind": "loop", "body": body})
    first, second = (ops.random_words(SEED, shape=shape, stream=s) for s in (0, 1))
    for parts in (1, 4):
        got = run_node(loop.lower, node, [SEED, x], parts=parts, target=host_target(vector_bytes))
        np.testing.assert_array_equal(got[0], (first + x) ^ second)
        np.testing.assert_array_equal(got[1], first)


def test_a_seed_made_in_the_kernel_is_refused():
    body = record_region("loop", [SEED_TYPE], lambda s: [ops.random_words(ops.add(s, s), shape=(2,))])
    node = make_node(PRIMITIVES["fusion"], [Value(SEED_TYPE)], {"kind": "loop", "body": body})
    assert "seed" in families.accepts(node)


def program(function, *types):
    """(the compiled graph, a call of it that gives its one result)"""
    compiled = compile_graph(trace(function, *types), passes=TRAINING)
    return compiled, lambda *arrays: compiled.program(list(arrays))[0]


EXACT = [
    *((ops.random_uniform, dtype) for dtype in ("float32", "float64", "float16", "bfloat16")),
    *((ops.random_bits, dtype) for dtype in ("uint32", "int32", "uint8", "int16", "uint64", "int64")),
]


@pytest.mark.parametrize(("draw", "dtype"), EXACT, ids=[f"{d.__name__}_{t}" for d, t in EXACT])
def test_programs_give_the_eager_numbers(draw, dtype):
    compiled, run = program(lambda seed: draw(seed, shape=(3, 333), dtype=dtype), SEED_TYPE)
    assert compiled.program.stats()["host_steps"] == 0
    np.testing.assert_array_equal(run(SEED), draw(SEED, shape=(3, 333), dtype=dtype))


NORMAL = [
    (ops.random_normal, "float32", {}, 1e-6),
    (ops.random_normal, "float64", {}, 1e-12),
    (ops.truncated_normal, "float32", {}, 1e-6),
    (ops.truncated_normal, "float32", {"lower": 3.0, "upper": 5.0}, 1e-6),
    (ops.truncated_normal, "float64", {"lower": -1.0, "upper": 0.5}, 1e-12),
    (ops.random_normal, "bfloat16", {}, 2.0**-8),
]


@pytest.mark.parametrize(("draw", "dtype", "attrs", "tolerance"), NORMAL)
def test_normal_numbers(draw, dtype, attrs, tolerance):
    compiled, run = program(lambda seed: draw(seed, shape=(20000,), dtype=dtype, **attrs), SEED_TYPE)
    assert compiled.program.stats()["host_steps"] == 0
    got, wanted = (np.asarray(a, np.float64) for a in (run(SEED), draw(SEED, shape=(20000,), dtype=dtype, **attrs)))
    np.testing.assert_allclose(got, wanted, rtol=tolerance * 4, atol=tolerance)


def test_integers_categories_and_permutations():
    logits = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    compiled, run = program(lambda s, x: ops.random_categorical(s, x, num_samples=300), SEED_TYPE, type_of(logits))
    assert compiled.program.stats()["host_steps"] == 0
    np.testing.assert_array_equal(run(SEED, logits), ops.random_categorical(SEED, logits, num_samples=300))
    for draw in (
        lambda s: ops.random_integers(s, np.int64(-5), np.int64(1000), shape=(400,)),
        lambda s: ops.random_permutation(s, shape=(3, 90), axis=1),
        lambda s: ops.random_permutation(s, shape=(500,), dtype="int64"),
    ):
        compiled, run = program(draw, SEED_TYPE)
        assert compiled.program.stats()["host_steps"] == 0
        np.testing.assert_array_equal(run(SEED), draw(SEED))


def dropout(seed, x):
    draws = ops.random_uniform(seed, shape=x.shape)
    kept = ops.div(ops.tanh(x), np.float32(0.75))
    return ops.select(ops.lt(draws, np.float32(0.75)), kept, np.float32(0.0))


def test_dropout_is_one_kernel_for_any_batch():
    types = SEED_TYPE, TensorType((N, 24), "float32")
    graph, _ = optimise(trace(dropout, *types), target_of_programs(), TRAINING)
    assert [n.name for n in graph.nodes if n.name != "constant"] == ["fusion"]
    _, run = program(dropout, *types)
    for rows in (1, 100, 3):
        x = np.random.default_rng(rows).normal(size=(rows, 24)).astype(np.float32)
        np.testing.assert_allclose(run(SEED, x), dropout(SEED, x), rtol=1e-6)


def test_draws_of_constant_seeds_are_prepared_ahead_of_calls():
    graph = Graph()
    graph.outputs = [
        graph.add(
            PRIMITIVES["random_uniform"],
            [graph.add(PRIMITIVES["constant"], (), value=SEED + np.uint32(i % 2))],
            shape=(70,),
            dtype="float32",
        )
        for i in range(3)
    ]
    compiled = compile_graph(graph)
    compiled.set_params([])
    first, second, third = compiled.program([])
    np.testing.assert_array_equal(first, third)
    assert (first != second).any()
