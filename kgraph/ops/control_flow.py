"""Loops and branches over graphs: `while_loop`, `cond`, `scan`."""

from __future__ import annotations

import numpy as np

from kgraph import ops
from kgraph.errors import ShapeError
from kgraph.ir import (
    Graph,
    NotDifferentiable,
    Primitive,
    Sample,
    TensorType,
    bind,
    register,
    type_of,
)
from kgraph.ops.common import INEXACT, dtype_of, size_attr, sizes_differ, uniform, zeros_like
from kgraph.ops.region_gradient import pull_back, record_region, replay, transposed_region
from kgraph.ops.regions import result_types, run
from kgraph.ops.rules import dtype_error, shape_error

__all__ = ["cond", "scan", "while_loop"]


def _require_types(name: str, what: str, got, expected) -> None:
    if len(got) != len(expected) or any(
        a.dtype != b.dtype or a.rank != b.rank or any(map(sizes_differ, a.shape, b.shape))
        for a, b in zip(got, expected)
    ):
        text = "({}) and ({})".format(", ".join(map(str, got)), ", ".join(map(str, expected)))
        raise ShapeError(f"{name}: {what} must have one type: {text}")


# -- while ------------------------------------------------------------------------------------------------------------
def _infer_while(*types, cond, body):
    (predicate,) = result_types("while_loop", cond, types)
    if predicate != TensorType((), "bool"):
        raise dtype_error("while_loop", types, f"a condition that gives a bool scalar, got {predicate}")
    _require_types(
        "while_loop", "the operands and the results of the body", result_types("while_loop", body, types), types
    )
    return tuple(types)


def _reference_while(*arrays, cond, body):
    while run("while_loop", cond, arrays)[0]:
        arrays = run("while_loop", body, arrays)
    return arrays


def _samples_while():
    values = (np.array(0, np.int32), uniform((3, 5)))
    types = [type_of(a) for a in values]
    limit = lambda count: record_region("cond", types, lambda i, x: [ops.lt(i, np.int32(count))])
    body = record_region("body", types, lambda i, x: [ops.add(i, np.int32(1)), ops.sin(ops.add(x, x))])
    return [
        Sample(values, {"cond": limit(4), "body": body}, "counted"),
        Sample(values, {"cond": limit(0), "body": body}, "no iteration"),
    ]


WHILE_LOOP = register(
    Primitive(
        name="while_loop",
        infer=_infer_while,
        reference=_reference_while,
        gradient=NotDifferentiable("reverse mode would have to keep an unbounded number of states; use scan"),
        traits=frozenset({"control"}),
        samples=_samples_while,
        tolerance=1e-5,
        results=0,
    )
)


def while_loop(*operands, cond: Graph, body: Graph) -> tuple:
    """Apply `body` to the operands as long as `cond` gives True; gives the last operands as a tuple.

    cond: graph from the operands' types to a bool scalar. body: graph from the operands' types to the same types; what
    both only read are operands that the body passes on. Raises ShapeError, DTypeError for graphs of other types.
    """
    return bind(WHILE_LOOP, *operands, cond=cond, body=body)


# -- cond -------------------------------------------------------------------------------------------------------------
def _infer_cond(index, *types, branches):
    if not branches or index.rank or index.dtype not in ("bool", "int32"):
        raise dtype_error("cond", (index, *types), "a bool or int32 scalar first, and at least one branch")
    if index.dtype == "bool" and len(branches) != 2:
        raise shape_error("cond", (index, *types), f"two branches for a bool, got {len(branches)}")
    results = [result_types("cond", branch, types) for branch in branches]
    for other in results[1:]:
        _require_types("cond", "the results of all branches", other, results[0])
    return results[0]


def _reference_cond(index, *arrays, branches):
    return run("cond", branches[min(max(int(index), 0), len(branches) - 1)], arrays)


def _floats(values) -> list[int]:
    """Positions of the values that carry derivatives."""
    return [i for i, x in enumerate(values) if dtype_of(x) in INEXACT]


def _gradient_cond(cotangents, inputs, outputs, *, branches):
    """Another `cond`, between the branches' transposes."""
    index, *operands = inputs
    results = _floats(outputs)
    transposes = tuple(transposed_region(branch, results) for branch in branches)
    found = ops.cond(index, *operands, *(cotangents[i] for i in results), branches=transposes)
    by_position = dict(zip(_floats(operands), found, strict=True))
    return (None, *(by_position.get(i) for i in range(len(operands))))


def _samples_cond():
    values = (uniform((3, 5)), uniform((5,), seed=1))
    types = [type_of(a) for a in values]
    branches = (
        record_region("false", types, lambda x, y: [ops.add(x, y)]),
        record_region("true", types, lambda x, y: [ops.mul(ops.sin(x), y)]),
    )
    third = record_region("third", types, lambda x, y: [ops.neg(x)])
    return [
        Sample((np.array(True), *values), {"branches": branches}, "true"),
        Sample((np.array(False), *values), {"branches": branches}, "false"),
        Sample((np.array(1, np.int32), *values), {"branches": (*branches, third)}, "switch"),
        Sample((np.array(7, np.int32), *values), {"branches": (*branches, third)}, "switch, clamped"),
    ]


COND = register(
    Primitive(
        name="cond",
        infer=_infer_cond,
        reference=_reference_cond,
        gradient=_gradient_cond,
        traits=frozenset({"control"}),
        samples=_samples_cond,
        tolerance=1e-5,
        results=0,
    )
)


def cond(index, *operands, branches) -> tuple:
    """The results of `branches[index]` on the operands, a tuple; only that branch runs.

    index: int32 scalar, clamped into the range of branches; or a bool scalar, for the two branches (false, true).
    branches: graphs from the operands' types to equal result types. Raises ShapeError, DTypeError.
    """
    return bind(COND, index, *operands, branches=tuple(branches))


# -- scan -------------------------------------------------------------------------------------------------------------
def _infer_scan(*types, body, num_carry, num_xs, length, reverse):
    if num_carry + num_xs > len(types):
        raise shape_error("scan", types, f"{num_carry} carries, then {num_xs} sequences, then constants")
    carries, xs, constants = _split(types, num_carry, num_xs)
    for x in xs:
        if not x.rank or sizes_differ(x.shape[0], length):
            raise shape_error("scan", types, f"sequences with a first axis of {length}")
    results = result_types("scan", body, (*carries, *(x.with_shape(x.shape[1:]) for x in xs), *constants))
    _require_types("scan", "the carries and the first results of the body", results[:num_carry], carries)
    return (*carries, *(y.with_shape((length, *y.shape)) for y in results[num_carry:]))


def _split(operands, num_carry: int, num_xs: int) -> tuple:
    """(carries, sequences, constants)"""
    return operands[:num_carry], operands[num_carry : num_carry + num_xs], operands[num_carry + num_xs :]


def _reference_scan(*arrays, body, num_carry, num_xs, length, reverse):
    types = [TensorType(a.shape, a.dtype.name) for a in arrays]
    attrs = {"body": body, "num_carry": num_carry, "num_xs": num_xs, "length": length, "reverse": reverse}
    inferred = _infer_scan(*types, **attrs)
    carries, xs, constants = _split(arrays, num_carry, num_xs)
    if not length:
        return (*carries, *(np.empty(t.shape, t.np_dtype) for t in inferred[num_carry:]))
    stacks = []
    for t in range(length)[:: -1 if reverse else 1]:
        results = run("scan", body, (*carries, *(x[t] for x in xs), *constants))
        carries, ys = results[:num_carry], results[num_carry:]
        # Sizes of the results may be those of no operand, so that only an evaluation tells them.
        stacks = stacks or [np.empty((length, *np.shape(y)), y.dtype) for y in ys]
        for stack, y in zip(stacks, ys):
            stack[t] = y
    return (*carries, *stacks)


def _gradient_scan(cotangents, inputs, outputs, *, body, num_carry, num_xs, length, reverse):
    """A scan that computes the carries again and keeps them, then one through the body's transpose the other way."""
    steps = {"num_carry": num_carry, "num_xs": num_xs, "length": length, "reverse": reverse}
    carries, xs, constants = _split(inputs, num_carry, num_xs)
    types = [v.type for v in body.inputs]

    def keeping_body(*operands):
        return [*replay(body, operands)[0][:num_carry], *operands[:num_carry]]

    keeping = record_region(f"{body.name}_carries", types, keeping_body)
    kept = ops.scan(*inputs, body=keeping, **steps)[num_carry:]

    # Operands of a backward step: cotangents of the float carries, sums for the float constants; then per element the
    # carries, the sequences, the cotangents of the float results; then the constants.
    float_carries, float_xs, float_constants = _floats(carries), _floats(xs), _floats(constants)
    float_ys = [i for i in _floats(outputs) if i >= num_carry]
    first_constant = num_carry + num_xs
    backward_types = [types[i] for i in float_carries] + [types[first_constant + i] for i in float_constants]
    backward_types += [*types[:first_constant], *(body.outputs[i].type for i in float_ys), *types[first_constant:]]
    held, summed = len(float_carries), len(float_constants)

    def backward_body(*operands):
        to_carries, sums = operands[:held], operands[held : held + summed]
        elements = operands[held + summed : held + summed + first_constant]
        rest = operands[held + summed + first_constant :]
        to_ys, own_constants = rest[: len(float_ys)], rest[len(float_ys) :]
        own = (*elements, *own_constants)
        _, values = replay(body, own)
        given = dict(zip((*float_carries, *float_ys), (*to_carries, *to_ys)))
        found = pull_back(body, values, [given.get(i) for i in range(len(body.outputs))])
        found = [zeros_like(x) if c is None else c for c, x in zip(found, own)]
        new_sums = [ops.add(a, found[first_constant + i]) for a, i in zip(sums, float_constants)]
        return [*(found[i] for i in float_carries), *new_sums, *(found[num_carry + i] for i in float_xs)]

    backward = record_region(f"{body.name}_gradient", backward_types, backward_body)
    results = ops.scan(
        *(cotangents[i] for i in float_carries),
        *(zeros_like(constants[i]) for i in float_constants),
        *kept,
        *xs,
        *(cotangents[i] for i in float_ys),
        *constants,
        body=backward,
        num_carry=held + summed,
        num_xs=first_constant + len(float_ys),
        length=length,
        reverse=not reverse,
    )
    out: list = [None] * len(inputs)
    positions = [*float_carries, *(first_constant + i for i in float_constants), *(num_carry + i for i in float_xs)]
    for position, cotangent in zip(positions, results, strict=True):
        out[position] = cotangent
    return tuple(out)


def _samples_scan():
    def sample(name, arrays, num_carry, num_xs, length, build, reverse=False):
        carries, xs, constants = _split(arrays, num_carry, num_xs)
        types = [type_of(a) for a in (*carries, *(np.zeros(x.shape[1:], x.dtype) for x in xs), *constants)]
        attrs = {"body": record_region("body", types, build), "num_carry": num_carry, "num_xs": num_xs}
        return Sample(arrays, {**attrs, "length": length, "reverse": reverse}, name)

    def cell(state, x, w):
        new = ops.tanh(ops.add(ops.mul(state, w), x))
        return [new, ops.mul(new, x)]

    def counting(count, state, x, w):
        return [ops.add(count, np.int32(1)), ops.mul(ops.add(state, x), w), ops.convert(count, dtype="float32")]

    arrays = (uniform((3,)), uniform((5, 3), seed=1), uniform((3,), seed=2))
    return [
        sample("forward", arrays, 1, 1, 5, cell),
        sample("backward", arrays, 1, 1, 5, cell, reverse=True),
        sample("no sequence", (uniform((3,)),), 1, 0, 4, lambda s: [ops.sin(s), ops.mul(s, s)]),
        sample("no carry", (uniform((4, 3)),), 0, 1, 4, lambda x: [ops.exp(x)]),
        sample("an integer among the carries", (np.array(3, np.int32), *arrays), 2, 1, 5, counting),
        sample("no steps", (uniform((3,)), uniform((0, 3)), uniform((3,), seed=2)), 1, 1, 0, cell),
    ]


SCAN = register(
    Primitive(
        name="scan",
        infer=_infer_scan,
        reference=_reference_scan,
        gradient=_gradient_scan,
        traits=frozenset({"control"}),
        samples=_samples_scan,
        tolerance=1e-5,
        results=0,
    )
)


def scan(*operands, body: Graph, num_carry: int, num_xs: int, length, reverse: bool = False) -> tuple:
    """Apply `body` along the first axis of sequences, with carried state; gives (final carries..., stacked results...).

    operands: `num_carry` carries, `num_xs` sequences [length, ...], then constants that every step reads.
    body: graph from (carries, one element of each sequence, constants) to (new carries, results of the step).
    length: number of steps, int or Dim. reverse: from the last element to the first; results stay at the place of
    their element. Raises ShapeError, DTypeError.
    """
    return bind(
        SCAN,
        *operands,
        body=body,
        num_carry=int(num_carry),
        num_xs=int(num_xs),
        length=size_attr(length),
        reverse=bool(reverse),
    )
