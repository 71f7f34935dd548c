"""Passes: the structure that each leaves and the value that all keep, by the interpreter in float64."""

from __future__ import annotations

import numpy as np
import pytest

import kgraph  # noqa: F401
from kgraph import ops
from kgraph.frontend.tracer import trace
from kgraph.ir import Dim, Graph, TensorType
from kgraph.ir.interpreter import evaluate
from kgraph.ir.verifier import verify
from kgraph.ops.packing import panels_layout
from kgraph.passes.canonicalise import canonicalise
from kgraph.passes.collapse_dot import collapse_dot
from kgraph.passes.common_subexpressions import common_subexpressions
from kgraph.passes.dead_code import dead_code
from kgraph.passes.fold_batch_norm import fold_batch_norm
from kgraph.passes.fold_constants import fold_constants
from kgraph.passes.fold_padding import fold_padding
from kgraph.passes.fuse import fuse
from kgraph.passes.group_recurrent import group_recurrent
from kgraph.passes.manager import PassContext, run_passes
from kgraph.passes.pipeline import INFERENCE
from kgraph.passes.prologue import split_prologue
from kgraph.passes.reshape_motion import reshape_motion
from kgraph.passes.transpose_motion import transpose_motion

N = Dim.symbol("N")


def f32(*shape):
    return TensorType(shape, "float32")


def traced(function, inputs, params=()):
    """A graph whose last operands are params."""
    graph = trace(function, *inputs, *params)
    count = len(inputs)
    graph.params = graph.inputs[count:]
    graph.inputs = graph.inputs[:count]
    return graph


def names(graph: Graph) -> list[str]:
    return [n.name for n in graph.nodes if n.name != "constant"]


def kinds(graph: Graph) -> list[str]:
    return [n.attrs["kind"] if n.name == "fusion" else n.name for n in graph.nodes if n.name != "constant"]


def check_same(before: Graph, after: Graph, sizes=None, seed=0):
    """Both graphs give the same values in float64 on random operands."""
    verify(after, after="pass under test")
    rng = np.random.default_rng(seed)

    def draw(value):
        shape = tuple(s if isinstance(s, int) else s.evaluate(sizes or {"N": 3}) for s in value.shape)
        if value.dtype == "bool":
            return rng.random(shape) < 0.5
        if "int" in value.dtype:
            return rng.integers(0, 3, shape).astype(value.dtype)
        return rng.uniform(0.5, 1.5, shape).astype(value.dtype)

    inputs = [draw(v) for v in before.inputs]
    values = {v: draw(v) for v in before.params}
    wanted = evaluate(before, inputs, [values[p] for p in before.params], precision="float64")
    got = evaluate(after, inputs, [values[p] for p in after.params], precision="float64")
    for a, b in zip(wanted, got, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


def test_dead_code_keeps_inputs_and_drops_unread_params():
    graph = traced(lambda x, w, v: (ops.mul(x, w), ops.exp(v))[0], [f32(N, 3)], [f32(3), f32(3)])
    after = dead_code(graph)
    assert names(after) == ["mul"]
    assert len(after.params) == 1
    check_same(graph, after)


def test_equal_nodes_merge_and_unite_provenance():
    graph = traced(lambda x: ops.add(ops.exp(x), ops.exp(x)), [f32(N, 3)])
    after = dead_code(common_subexpressions(graph))
    assert names(after) == ["exp", "add"]
    check_same(graph, after)


def test_equal_attributes_of_different_kind_do_not_merge():
    graph = traced(lambda x: ops.add(x, ops.convert(ops.convert(x, dtype="int32"), dtype="float32")), [f32(N, 3)])
    assert names(common_subexpressions(graph)) == names(graph)


def test_constants_fold():
    graph = traced(lambda x: ops.add(x, ops.exp(np.ones(3, "float32"))), [f32(N, 3)])
    after = dead_code(fold_constants(graph))
    assert names(after) == ["add"]
    check_same(graph, after)


def test_zeros_of_both_signs_are_no_scalar():
    zeros = np.tile(np.float32([0, -0.0]), 20)
    graph = canonicalise(traced(lambda x: ops.div(x, zeros), [f32(40)]))
    (quotient,) = evaluate(graph, [np.ones(40, "float32")])
    np.testing.assert_array_equal(quotient, np.tile(np.float32([np.inf, -np.inf]), 20))


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: ops.transpose(ops.transpose(x, permutation=(1, 0)), permutation=(1, 0)), []),
        (lambda x: ops.reshape(ops.reshape(x, shape=(N * 3,)), shape=(N, 3)), []),
        (lambda x: ops.mul(x, np.float32(1)), []),
        (lambda x: ops.pow(x, np.float32(2)), ["mul"]),
        (lambda x: ops.maximum(x, np.float32(0)), ["relu"]),
        (lambda x: ops.neg(ops.neg(x)), []),
        (lambda x: ops.rev(ops.rev(x, axes=(0, 1)), axes=(1, 0)), []),
        (lambda x: ops.rev(ops.reshape(x, shape=(1, N, 1, 3)), axes=(0, 2)), ["reshape"]),
        (lambda x: ops.rev(ops.reshape(x, shape=(N, 1, 3)), axes=(1, 2)), ["reshape", "rev"]),
        (lambda x: ops.convert(ops.convert(x, dtype="float64"), dtype="float32"), []),
    ],
)
def test_canonical_forms(function, expected):
    graph = traced(function, [f32(N, 3)])
    after = dead_code(canonicalise(graph))
    assert names(after) == expected
    check_same(graph, after)


def conv(x, w, strides=(1, 1)):
    return ops.conv(
        x, w, strides=strides, padding=((1, 1), (1, 1)), lhs_dilation=(1, 1), rhs_dilation=(1, 1), feature_groups=1
    )


def conv_batch_norm(x, w, b, mean, variance, gamma, beta):
    y = ops.add(conv(x, w), b)
    y = ops.batch_norm(y, mean, variance, gamma, beta, axis=-1, epsilon=1e-3)
    return ops.relu(y)


CONV_BN = ([f32(N, 6, 5, 4)], [f32(3, 3, 4, 8)] + [f32(8)] * 5)


def test_batch_norm_leaves_the_call():
    graph = traced(conv_batch_norm, *CONV_BN)
    after = dead_code(fold_batch_norm(canonicalise(graph)))
    assert names(split_prologue(after).main) == ["conv", "add", "relu"]
    check_same(graph, after)


def panels(node, dtype="float32"):
    """What a code generator says that only puts weights in another order."""
    axes = tuple(range(node.inputs[1].type.rank))
    return ((1, panels_layout(node.inputs[1].shape, (), axes[:-1], axes[-1:], 1, 8, 4, dtype)),)


@pytest.mark.parametrize(("packing", "kept"), [(panels, True), (lambda node: None, False)])
def test_results_are_scaled_where_a_large_weight_is_only_put_in_another_order(packing, kept, monkeypatch):
    """A folded weight would be a second copy; the bias joins the shift in either case."""
    monkeypatch.setattr("kgraph.passes.fold_batch_norm.LEAST_KEPT_BYTES", 4 * 3 * 3 * 4 * 8)
    graph = traced(conv_batch_norm, *CONV_BN)
    after = dead_code(fold_batch_norm(canonicalise(graph), PassContext(packing=packing)))
    assert names(split_prologue(after).main) == ["conv", *["mul"] * kept, "add", "relu"]
    (conv_node,) = (node for node in after.nodes if node.name == "conv")
    assert (conv_node.inputs[1] in after.params) == kept
    check_same(graph, after)


def test_a_weight_that_is_packed_in_another_dtype_is_folded(monkeypatch):
    monkeypatch.setattr("kgraph.passes.fold_batch_norm.LEAST_KEPT_BYTES", 0)
    graph = canonicalise(traced(conv_batch_norm, *CONV_BN))
    after = dead_code(fold_batch_norm(graph, PassContext(packing=lambda node: panels(node, "float64"))))
    assert names(split_prologue(after).main) == ["conv", "add", "relu"]


def test_batch_norm_is_not_folded_into_a_convolution_that_others_read():
    def function(x, w, mean, variance, gamma, beta):
        y = conv(x, w)
        return ops.add(ops.batch_norm(y, mean, variance, gamma, beta, axis=-1, epsilon=1e-3), y)

    graph = traced(function, [f32(N, 6, 5, 4)], [f32(3, 3, 4, 8)] + [f32(8)] * 4)
    after = dead_code(fold_batch_norm(canonicalise(graph)))
    assert names(split_prologue(after).main) == ["conv", "mul", "add", "add"]
    check_same(graph, after)


def test_channels_first_transposes_meet():
    last, first = (0, 2, 3, 1), (0, 3, 1, 2)

    def function(x, w, b, s):
        y = ops.transpose(conv(ops.transpose(x, permutation=last), w), permutation=first)
        y = ops.relu(ops.mul(ops.add(y, ops.reshape(b, shape=(1, 8, 1, 1))), ops.reshape(s, shape=(1, 8, 1, 1))))
        y = ops.reduce_window(
            y,
            kind="max",
            window=(1, 1, 2, 2),
            strides=(1, 1, 2, 2),
            padding=((0, 0),) * 4,
            window_dilation=(1,) * 4,
            base_dilation=(1,) * 4,
        )
        return ops.reduce_sum(y, axes=(2, 3), keepdims=False)

    graph = traced(function, [f32(N, 4, 6, 6)], [f32(3, 3, 4, 8), f32(8), f32(8)])
    after = dead_code(canonicalise(transpose_motion(canonicalise(graph))))
    assert names(split_prologue(after).main).count("transpose") == 1
    check_same(graph, after)


def test_einsum_with_weights_becomes_one_matrix_product():
    def function(x, w, b):
        y = ops.einsum("btd,dhk->bthk", x, w)
        return ops.mul(ops.add(y, b), np.float32(0.5))

    graph = traced(function, [f32(N, 5, 6)], [f32(6, 2, 3), f32(2, 3)])
    after = dead_code(canonicalise(reshape_motion(collapse_dot(canonicalise(graph)))))
    main = split_prologue(after).main
    assert names(main) == ["dot_general", "add", "mul", "reshape"]
    check_same(graph, after)


def test_zero_padding_joins_the_convolution():
    def function(x, w):
        x = ops.pad(x, np.float32(0), low=(0, 1, 2, 0), high=(0, 0, 1, 0), interior=(0, 0, 0, 0))
        return conv(x, w, strides=(2, 1))

    graph = traced(function, [f32(N, 6, 5, 4)], [f32(3, 3, 4, 8)])
    after = dead_code(fold_padding(graph))
    assert names(after) == ["conv"]
    check_same(graph, after)


@pytest.mark.parametrize(("activation", "expected"), [("relu", 1), ("tanh", 2)])
def test_zero_padding_joins_a_maximum_of_what_is_not_negative(activation, expected):
    def function(x):
        x = ops.pad(getattr(ops, activation)(x), np.float32(0), low=(0, 1, 1, 0), high=(0, 1, 1, 0), interior=(0,) * 4)
        return ops.reduce_window(
            x,
            kind="max",
            window=(1, 3, 3, 1),
            strides=(1, 2, 2, 1),
            padding=((0, 0),) * 4,
            window_dilation=(1,) * 4,
            base_dilation=(1,) * 4,
        )

    graph = traced(function, [f32(N, 6, 5, 4)])
    after = dead_code(fold_padding(graph))
    assert len(names(after)) == expected + 1
    check_same(graph, after)


def test_other_padding_stays():
    def function(x, w):
        return conv(ops.pad(x, np.float32(1), low=(0, 1, 1, 0), high=(0, 1, 1, 0), interior=(0,) * 4), w)

    graph = traced(function, [f32(N, 6, 5, 4)], [f32(3, 3, 4, 8)])
    assert "pad" in names(dead_code(fold_padding(graph)))


def fused(graph: Graph) -> tuple[Graph, PassContext]:
    context = PassContext()
    return fuse(graph, context), context


def test_epilogue_joins_the_convolution():
    function = lambda x, y, w, b: ops.relu(ops.add(ops.add(conv(x, w), b), y))
    graph = traced(function, [f32(N, 6, 5, 4), f32(N, 6, 5, 8)], [f32(3, 3, 4, 8), f32(8)])
    after, _ = fused(graph)
    assert kinds(after) == ["conv"]
    check_same(graph, after)


def test_swish_joins_although_its_operand_is_read_twice():
    graph = traced(
        lambda x, w: (lambda y: ops.mul(y, ops.logistic(y)))(conv(x, w)), [f32(N, 6, 5, 4)], [f32(3, 3, 4, 8)]
    )
    after, _ = fused(graph)
    assert kinds(after) == ["conv"]
    check_same(graph, after)


def test_residual_stream_is_not_swallowed():
    def function(x, w, v):
        y = ops.relu(conv(x, w))
        z = conv(y, v)
        return ops.relu(ops.add(z, y))

    graph = traced(function, [f32(N, 6, 5, 4)], [f32(3, 3, 4, 8), f32(3, 3, 8, 8)])
    after, _ = fused(graph)
    assert kinds(after) == ["conv", "conv"]
    check_same(graph, after)


def test_a_product_may_end_in_two_functions_of_its_sums():
    """Such as an activation and its derivative, which take the place of what they are computed from."""

    def function(x, w, b):
        y = ops.add(ops.dot_general(x, w, lhs_contract=(1,), rhs_contract=(0,)), b)
        return ops.sin(y), ops.mul(ops.cos(y), np.float32(2))

    graph = traced(function, [f32(N, 5), f32(5, 7), f32(7)])
    after, _ = fused(graph)
    assert kinds(after) == ["dot"]
    check_same(graph, after)


@pytest.mark.parametrize(
    "results",
    [
        lambda y, z: (ops.sin(y), y),  # one is computed from the other
        lambda y, z: (ops.add(y, z), ops.mul(ops.sub(y, z), z)),  # such as two slots of an optimizer
        lambda y, z: (ops.sin(y), ops.cos(y), ops.exp(y)),
    ],
    ids=["read inside", "another array", "three"],
)
def test_other_results_of_a_product_stay_apart(results):
    def function(x, w, z):
        return results(ops.dot_general(x, w, lhs_contract=(1,), rhs_contract=(0,)), z)

    graph = traced(function, [f32(N, 5), f32(5, 7), f32(N, 7)])
    after, _ = fused(graph)
    assert kinds(after)[0] == "dot_general"
    check_same(graph, after)


def test_fusion_never_makes_a_cycle():
    def function(x, w):
        y = conv(x, w)
        m = ops.reduce_max(y, axes=(1, 2, 3), keepdims=True)
        return ops.sub(ops.exp(y), ops.exp(ops.sub(y, m)))

    graph = traced(function, [f32(N, 6, 5, 4)], [f32(3, 3, 4, 8)])
    after, _ = fused(graph)
    check_same(graph, after)


def test_fusion_never_makes_a_cycle_through_a_region_that_spans_others():
    """The sines and the last sum may join, on either side of both reductions; then the negation may no longer join the
    product with the first of them."""

    def function(x, y):
        sine = ops.sin(x)
        first = ops.reduce_sum(ops.mul(sine, y), axes=(1,), keepdims=True)
        negative = ops.neg(x)
        both = ops.mul(negative, first)
        second = ops.reshape(ops.reduce_sum(ops.mul(negative, y), axes=(1,)), shape=(3, 1))
        return both, ops.mul(ops.add(x, second), sine)

    graph = traced(function, [f32(3, 5), f32(3, 5)])
    check_same(graph, fuse(graph, PassContext(accepts=lambda node: None)))


def test_loops_fuse_with_several_results():
    def function(x, y):
        a = ops.exp(ops.add(x, y))
        return a, ops.tanh(a), ops.sin(x)

    graph = traced(function, [f32(N, 7), f32(7)])
    after, _ = fused(graph)
    assert len(kinds(after)) <= 2
    check_same(graph, after)


@pytest.mark.parametrize(("size", "kernels"), [(64, 1), (4096, 2)])
def test_small_loops_have_more_results(size, kernels):
    """What costs more to start than to run is one kernel."""

    def function(x, y):
        values = [x]
        for _ in range(6):
            values.append(ops.mul(ops.exp(values[-1]), y))
        return values[1:]

    graph = traced(function, [f32(size), f32(size)])
    after, _ = fused(graph)
    assert kinds(after) == ["loop"] * kernels
    check_same(graph, after)


def test_refusals_are_kept_with_their_reason():
    context = PassContext(accepts=lambda node: "no such kernel" if node.name == "fusion" else None)
    graph = traced(lambda x, w: ops.relu(conv(x, w)), [f32(N, 6, 5, 4)], [f32(3, 3, 4, 8)])
    after = fuse(graph, context)
    assert kinds(after) == ["conv", "relu"]
    assert any(d.reason == "no such kernel" for d in context.decisions)


def test_whole_pipeline_keeps_values():
    graph = traced(conv_batch_norm, *CONV_BN)
    context = PassContext()
    after = run_passes(graph, INFERENCE, context)
    assert kinds(split_prologue(after).main) == ["conv"]
    check_same(graph, after)


def test_prologue_holds_all_that_weights_decide():
    graph = traced(conv_batch_norm, *CONV_BN)
    after = run_passes(graph, INFERENCE, PassContext())
    split = split_prologue(after)
    assert not split.prologue.inputs
    assert set(split.main.params) == set(split.prologue.outputs)


def rnn(x, kernel, recurrent, bias, state, reverse):
    zero = np.zeros(16, "float32")
    return ops.rnn(x, kernel, recurrent, bias, zero, state, state, cell="lstm", reverse=reverse)


def no_concatenation(node):
    return "separate results only" if node.attrs["body"].nodes[-1].name == "concatenate" else None


@pytest.mark.parametrize(
    ("order", "axis", "also_read", "accepts", "expected"),
    [
        ((0, 1), 2, False, lambda node: None, ["rnn"]),
        ((1, 0), 2, False, lambda node: None, ["rnn"]),
        ((0, 1), 2, False, no_concatenation, ["rnn", "concatenate"]),
        ((0, 1), 2, True, lambda node: None, ["rnn", "concatenate"]),
        ((0, 1), 1, False, lambda node: None, ["rnn", "concatenate"]),
        ((0, 0, 1), 2, False, lambda node: None, ["rnn", "concatenate"]),
    ],
)
def test_directions_of_a_bidirectional_layer_join(order, axis, also_read, accepts, expected):
    def function(x, s, k, r, b, k2, r2, b2):
        forward = rnn(x, k, r, b, s, False)
        backward = rnn(x, k2, r2, b2, s, True)
        sequences = [(forward[0], backward[0])[n] for n in order]
        return ops.concatenate(*sequences, axis=axis), backward[0] if also_read else backward[1]

    weights = [f32(3, 16), f32(4, 16), f32(16)]
    graph = traced(function, [f32(N, 5, 3), f32(N, 4)], weights * 2)
    after = group_recurrent(graph, PassContext(accepts=accepts))
    assert kinds(after) == expected
    check_same(graph, after)


@pytest.mark.parametrize(("refused", "expected"), [(None, ["rnn_gradient"]), ("one at a time", ["rnn_gradient"] * 2)])
def test_gradients_of_layers_over_one_sequence_join_where_the_target_takes_them(refused, expected):
    def function(x, s, to_sequence, *weights):
        attrs = {"cell": "lstm", "activation": "tanh", "recurrent_activation": "sigmoid", "reset_after": True}
        attrs |= {"has_mask": False, "zero_output_for_mask": False}
        cotangents = [to_sequence, s, s]
        first = ops.rnn_gradient(x, *weights[:3], weights[2], s, s, *cotangents, reverse=False, **attrs)
        second = ops.rnn_gradient(x, *weights[3:], weights[5], s, s, *cotangents, reverse=True, **attrs)
        return ops.add(first[0], second[0]), first[1], second[2]

    weights = [f32(3, 16), f32(4, 16), f32(16)]
    graph = traced(function, [f32(N, 5, 3), f32(N, 4), f32(N, 5, 4)], weights * 2)
    after = group_recurrent(graph, PassContext(accepts=lambda node: refused))
    assert [kind for kind in kinds(after) if kind != "add"] == expected
    check_same(graph, after)


def test_stacked_recurrent_layers_stay_apart():
    def function(x, s, k, r, b):
        first = rnn(x, k, r, b, s, False)[0]
        return rnn(x, k, r, b, ops.reduce_sum(first, axes=(1,), keepdims=False), False)[0]

    graph = traced(function, [f32(N, 5, 3), f32(N, 4)], [f32(3, 16), f32(4, 16), f32(16)])
    after = group_recurrent(graph, PassContext())
    assert kinds(after).count("rnn") == 2
    check_same(graph, after)
