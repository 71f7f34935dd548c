"""Branches and loops: plain Python on concrete values, control-flow primitives under a trace.

Variables assigned inside a traced branch or loop are threaded through the primitive: a branch gives their new values
as further results, a loop carries them.
"""

from __future__ import annotations

from typing import NoReturn

import numpy as np
from keras.src import tree
from keras.src.backend.common.stateless_scope import get_stateless_scope

from kgraph import ops
from kgraph.errors import CaptureError, DimDecisionError, ShapeError
from kgraph.frontend.keras_backend.core import dense_tensor as convert_to_tensor
from kgraph.frontend.tracer import GraphTracer, TracedArray, is_tracing, running_trace
from kgraph.ir import TensorType, Value
from kgraph.ir.dims import symbols


def _tensors(structure):
    return tree.map_structure(lambda x: x if x is None else convert_to_tensor(x), structure)


def _leaves(structure) -> list:
    """The tensors of a structure; a None among them is an empty structure, as in JAX."""
    return [x for x in tree.flatten(structure) if x is not None]


def _pack(structure, values):
    """A structure with its tensors replaced, in order."""
    values = iter(values)
    return tree.map_structure(lambda x: x if x is None else next(values), structure)


def _type(x) -> TensorType:
    return TensorType(tuple(x.shape), x.dtype.name)


class _Body:
    """A branch or loop body traced in the running trace.

    inputs: types of the operands passed in order; `graph.inputs` are these, then `state`, then the captures.
    state: Keras variables that enter as inputs (loops); `updates` are those assigned, with their new values.
    """

    def __init__(self, name: str, function, types, state=()):
        self.tracer = GraphTracer(name, parent=running_trace())
        scope = get_stateless_scope()
        before = dict(scope.state_mapping) if scope is not None else {}
        with self.tracer.active():
            inputs = [self.tracer.add_input(t) for t in types]
            for variable in state:
                entering = self.tracer.add_input(TensorType(tuple(variable.shape), variable._dtype), variable.path)
                scope.add_update((variable, entering))
            entered = dict(scope.state_mapping) if scope is not None else {}
            self.structure = function(*inputs)
            self.results = [convert_to_tensor(leaf) for leaf in _leaves(self.structure)]
            self.updates = {}
            if scope is not None:
                for key, value in scope.state_mapping.items():
                    if value is not entered.get(key):
                        self.updates[key] = value
                self.entering = {id(v): entered[id(v)] for v in state}
                scope.state_mapping = before

    def finish(self, results) -> None:
        """Set the graph's outputs."""
        with self.tracer.active():
            self.tracer.graph.outputs = [self.tracer.lift(r) for r in results]

    @property
    def captured(self) -> list[TracedArray]:
        return [outer for outer, _ in self.tracer.captures.values()]


def _variables(keys) -> list:
    """The variables behind ids in a stateless scope's mapping."""
    scope = get_stateless_scope()
    known = getattr(scope, "variables_by_id", {})
    missing = [k for k in keys if k not in known]
    if missing:
        raise CaptureError(
            "a variable is assigned inside of a traced loop or branch under a plain StatelessScope; run the function "
            "under kgraph's capture, which follows the variables"
        )
    return [known[k] for k in keys]


def _share_captures(bodies: list[_Body]) -> list[TracedArray]:
    """Give all bodies the same list of captured operands, in one order; gives that list."""
    union: dict[int, TracedArray] = {}
    for body in bodies:
        for outer in body.captured:
            union.setdefault(id(outer.value), outer)
    for body in bodies:
        graph, captures = body.tracer.graph, body.tracer.captures
        own = graph.inputs[: len(graph.inputs) - len(captures)]
        captured_inputs = []
        for key, outer in union.items():
            if key in captures:
                captured_inputs.append(captures[key][1].value)
            else:
                captured_inputs.append(Value(outer.value.type, name=outer.value.name))
        graph.inputs = [*own, *captured_inputs]
    return list(union.values())


# -- branches ----------------------------------------------------------------------------------------------------------
def cond(pred, true_fn, false_fn):
    """The result of one of two functions without arguments."""
    pred = convert_to_tensor(pred)
    if not isinstance(pred, TracedArray):
        return true_fn() if bool(pred) else false_fn()
    pred = ops.reshape(pred, shape=()) if pred.shape else pred
    if pred.value.dtype != "bool":
        pred = ops.ne(pred, np.zeros((), pred.dtype))
    # The primitive counts the branches by the index: False is 0.
    return _branch(pred, [false_fn, true_fn], ())


def switch(index, branches, *operands):
    """The result of `branches[index](*operands)`, the index clamped to the branches there are."""
    index = convert_to_tensor(index, "int32")
    if not isinstance(index, TracedArray):
        return branches[int(np.clip(index, 0, len(branches) - 1))](*operands)
    return _branch(ops.reshape(index, shape=()), list(branches), operands)


def _branch(index, functions, operands):
    bodies = [_Body(f"branch{i}", lambda f=f: f(*operands), ()) for i, f in enumerate(functions)]
    keys = list(dict.fromkeys(key for body in bodies for key in body.updates))
    variables = _variables(keys)
    first = bodies[0]
    for other in bodies[1:]:
        tree.assert_same_structure(first.structure, other.structure)
    dtypes = [np.result_type(*[b.results[i].dtype for b in bodies]) for i in range(len(first.results))]
    for body in bodies:
        with body.tracer.active():
            results = [convert_to_tensor(r, d.name) for r, d in zip(body.results, dtypes)]
            state = [body.updates.get(k, v.value) for k, v in zip(keys, variables)]
            body.finish([*results, *state])
    for body in bodies[1:]:
        for a, b in zip(first.tracer.graph.outputs, body.tracer.graph.outputs):
            if a.type != b.type:
                _refuse(a.type, b.type)
    captured = _share_captures(bodies)
    results = ops.cond(index, *captured, branches=tuple(b.tracer.graph for b in bodies))
    results = results if isinstance(results, tuple) else (results,)
    for variable, value in zip(variables, results[len(dtypes) :]):
        get_stateless_scope().add_update((variable, value))
    return _pack(first.structure, results[: len(dtypes)])


def _refuse(a: TensorType, b: TensorType) -> NoReturn:
    """Raise the error for branches that give different types.

    That is DimDecisionError where some size is symbolic: with that size known, only one branch may be left.
    """
    for sizes in zip(a.shape, b.shape) if len(a.shape) == len(b.shape) else ():
        first, second = symbols(sizes[:1]), symbols(sizes[1:])
        named = (first ^ second) or first
        if sizes[0] != sizes[1] and named:
            raise DimDecisionError(f"whether the branches of a condition give one shape depends on {sorted(named)}")
    raise ShapeError(f"branches of a condition give different types: {a} and {b}")


# -- loops -------------------------------------------------------------------------------------------------------------
def while_loop(cond, body, loop_vars, maximum_iterations=None):
    """`body` applied to the loop variables for as long as `cond` holds of them."""
    is_tuple = isinstance(loop_vars, (tuple, list))
    loop_vars = _tensors(tuple(loop_vars) if is_tuple else (loop_vars,))

    def step(*values):
        out = body(*values)
        return tuple(out) if isinstance(out, (list, tuple)) else (out,)

    if not is_tracing():
        iteration = 0
        while (maximum_iterations is None or iteration < maximum_iterations) and cond(*loop_vars):
            loop_vars = step(*loop_vars)
            iteration += 1
        return loop_vars if is_tuple else loop_vars[0]
    if maximum_iterations is None:
        out = _traced_while(cond, step, loop_vars)
    else:
        limit = convert_to_tensor(maximum_iterations, "int32")

        def counted_cond(iteration, values):
            return ops.logical_and(convert_to_tensor(cond(*values), "bool"), ops.lt(iteration, limit))

        def counted_step(iteration, values):
            return ops.add(iteration, np.asarray(1, "int32")), step(*values)

        out = _traced_while(counted_cond, counted_step, (np.asarray(0, "int32"), loop_vars))[1]
    return out if is_tuple else out[0]


def _like(value, expected: TensorType, what: str):
    """A loop result in the dtype of its carry; raises ShapeError if it has another shape."""
    if tuple(value.shape) != expected.shape:
        raise ShapeError(f"{what} changes the shape of a loop variable from {expected.shape} to {tuple(value.shape)}")
    return convert_to_tensor(value, expected.dtype)


def _traced_while(cond, step, loop_vars):
    carries = tree.flatten(loop_vars)
    types = [_type(c) for c in carries]

    def on_flat(function):
        return lambda *flat: function(*tree.pack_sequence_as(loop_vars, list(flat)))

    body, variables = _trace_with_state("body", on_flat(step), types)
    tree.assert_same_structure(loop_vars, body.structure)
    test = _Body("cond", on_flat(cond), types, variables)
    test.finish(_predicate(test))
    body.finish(_loop_results(body, types, variables))
    captured = _share_captures([test, body])
    operands = [*carries, *(v.value for v in variables)]
    # What both graphs only read is an operand that the body passes on.
    passed_on = body.tracer.graph.inputs[len(operands) :]
    body.tracer.graph.outputs = [*body.tracer.graph.outputs, *passed_on]
    results = ops.while_loop(*operands, *captured, cond=test.tracer.graph, body=body.tracer.graph)
    _store_state(variables, results[len(types) : len(operands)])
    return tree.pack_sequence_as(loop_vars, list(results[: len(types)]))


def _predicate(test: _Body) -> list:
    with test.tracer.active():
        return [ops.reshape(convert_to_tensor(test.results[0], "bool"), shape=())]


def _trace_with_state(name, function, types) -> tuple[_Body, list]:
    """Trace a loop body; if it assigns variables, trace it again with them as inputs."""
    body = _Body(name, function, types)
    if not body.updates:
        return body, []
    variables = _variables(body.updates)
    return _Body(name, function, types, variables), variables


def _loop_results(body: _Body, types, variables) -> list:
    with body.tracer.active():
        results = [_like(r, t, "the body") for r, t in zip(body.results, types, strict=True)]
        state = [body.updates.get(id(v), body.entering[id(v)]) for v in variables]
    return [*results, *state]


def _store_state(variables, values) -> None:
    for variable, value in zip(variables, values):
        get_stateless_scope().add_update((variable, value))


def fori_loop(lower, upper, body_fun, init_val):
    """`val = body_fun(i, val)` for i from lower to upper; with a derivative where these are known ahead, as in JAX."""
    if not is_tracing():
        value = init_val
        for i in range(int(lower), int(upper)):
            value = body_fun(i, value)
        return value
    lower, upper = convert_to_tensor(lower, "int32"), convert_to_tensor(upper, "int32")
    one = np.asarray(1, "int32")
    init = lower, _tensors(init_val)
    if not isinstance(lower, TracedArray) and not isinstance(upper, TracedArray):
        length = max(int(upper) - int(lower), 0)
        (_, value), _ = _traced_scan(lambda c, _: ((ops.add(c[0], one), body_fun(*c)), None), init, None, length, False)
        return value
    _, value = _traced_while(
        lambda i, value: ops.lt(i, upper), lambda i, value: (ops.add(i, one), body_fun(i, value)), init
    )
    return value


def scan(f, init, xs=None, length=None, reverse=False, unroll=1):
    """`carry, y = f(carry, x)` along the leading axis of `xs`; gives the last carry and the stacked ys."""
    if not callable(f):
        raise TypeError(f"`f` should be a callable. Received: f={f}")
    if not isinstance(unroll, bool) and (not isinstance(unroll, int) or unroll < 1):
        raise ValueError(f"`unroll` must be an positive integer or boolean. Received: unroll={unroll}")
    if xs is None and length is None:
        raise ValueError("Got no `xs` to scan over and `length` not provided.")
    init, xs = _tensors(init), _tensors(xs)
    flat_xs = tree.flatten(xs) if xs is not None else []
    n = length if length is not None else flat_xs[0].shape[0]
    if any(x.shape[0] != n for x in flat_xs):
        raise ValueError(f"`xs` have leading axes of different sizes: {[x.shape[0] for x in flat_xs]}, length {n}")
    return _traced_scan(f, init, xs, n, reverse) if is_tracing() else _eager_scan(f, init, xs, int(n), reverse)


def _eager_scan(f, init, xs, n: int, reverse: bool):
    carry, ys = init, []
    for i in reversed(range(n)) if reverse else range(n):
        carry, y = f(carry, None if xs is None else tree.map_structure(lambda x, i=i: x[i], xs))
        ys.append(y)
    ys = ys[::-1] if reverse else ys
    if not ys:
        # The types of the ys are known from a trace of the body alone.
        return _empty_scan(f, init, xs)
    # None is an empty structure, as in JAX.
    return carry, tree.map_structure(
        lambda *leaves: None if leaves[0] is None else np.stack(leaves), *ys, none_is_leaf=True
    )


def _empty_scan(f, init, xs):
    tracer = GraphTracer("scan")
    with tracer.active():
        fake = tree.map_structure(lambda x: tracer.add_input(_type(x)), init)
        slices = None
        if xs is not None:
            slices = tree.map_structure(lambda x: tracer.add_input(TensorType(tuple(x.shape[1:]), x.dtype.name)), xs)
        _, y = f(fake, slices)
        return init, tree.map_structure(lambda t: t if t is None else np.zeros((0, *t.shape), t.dtype), y)


def _traced_scan(f, init, xs, length, reverse: bool):
    carries = tree.flatten(init)
    flat_xs = tree.flatten(xs) if xs is not None else []
    types = [_type(c) for c in carries]
    slice_types = [TensorType(tuple(x.shape[1:]), x.dtype.name) for x in flat_xs]

    def on_flat(*flat):
        carry = tree.pack_sequence_as(init, list(flat[: len(carries)]))
        x = tree.pack_sequence_as(xs, list(flat[len(carries) :])) if xs is not None else None
        carry, y = f(carry, x)
        tree.assert_same_structure(init, carry)
        return carry, y

    body, variables = _trace_with_state("body", on_flat, [*types, *slice_types])
    n = len(carries)
    graph = body.tracer.graph
    # The state enters after the slices; the primitive wants all carries first.
    state_inputs = graph.inputs[n + len(flat_xs) : n + len(flat_xs) + len(variables)]
    if state_inputs:
        rest = graph.inputs[n + len(flat_xs) + len(variables) :]
        graph.inputs = [*graph.inputs[:n], *state_inputs, *graph.inputs[n : n + len(flat_xs)], *rest]
    ys = body.results[n:]
    with body.tracer.active():
        state = [body.updates.get(id(v), body.entering[id(v)]) for v in variables]
        new = [_like(r, t, "the body of scan") for r, t in zip(body.results[:n], types)]
    body.finish([*new, *state, *ys])
    operands = [*carries, *(v.value for v in variables)]
    scanned = ops.scan(
        *operands,
        *flat_xs,
        *body.captured,
        body=graph,
        num_carry=len(operands),
        num_xs=len(flat_xs),
        length=length,
        reverse=bool(reverse),
    )
    results = list(scanned) if isinstance(scanned, (tuple, list)) else [scanned]
    _store_state(variables, results[n : len(operands)])
    _, y_structure = body.structure
    stacked = results[len(operands) :]
    return tree.pack_sequence_as(init, results[:n]), _pack(y_structure, stacked)


def map(f, xs):
    """`f` applied to each slice along the leading axis."""
    return scan(lambda _, x: ((), f(x)), (), xs)[1]


def vectorized_map(function, elements):
    """`function` applied to each slice along the leading axis of all elements."""
    return map(function, elements)


def associative_scan(f, elems, reverse=False, axis=0):
    """All prefixes of an associative combination along an axis, in about 2 log2(n) combinations (Blelloch's scan)."""
    from kgraph.frontend.keras_backend import numpy as knp

    if not callable(f):
        raise TypeError(f"`f` should be a callable. Received: f={f}")
    flat = [convert_to_tensor(e) for e in tree.flatten(elems)]
    axis = axis % len(flat[0].shape)
    size = flat[0].shape[axis]
    if any(e.shape[axis] != size for e in flat):
        raise ValueError(
            "Array inputs to associative_scan must have the same first dimension. "
            f"(saw: {[tuple(e.shape) for e in flat]})"
        )

    def along(x, start, stop, step=1):
        return x[(*(slice(None),) * axis, slice(start, stop, step))]

    def combine(a, b):
        return tree.flatten(f(tree.pack_sequence_as(elems, a), tree.pack_sequence_as(elems, b)))

    def interleave(even, odd):
        """even[0], odd[0], even[1], ... where `even` may be one longer."""
        n_even, n_odd = even.shape[axis], odd.shape[axis]
        both = knp.stack([along(even, 0, n_odd), odd], axis=axis + 1)
        merged = knp.reshape(both, (*even.shape[:axis], 2 * n_odd, *even.shape[axis + 1 :]))
        return merged if n_even == n_odd else knp.concatenate([merged, along(even, n_odd, None)], axis=axis)

    def prefixes(xs):
        n = xs[0].shape[axis]
        if n < 2:
            return xs
        pairs = combine([along(x, 0, n - 1, 2) for x in xs], [along(x, 1, None, 2) for x in xs])
        odd = prefixes(pairs)
        if n == 2:
            even = [along(x, 0, 1) for x in xs]
        else:
            left = [along(o, 0, (n - 1) // 2) for o in odd]
            rest = combine(left, [along(x, 2, None, 2) for x in xs])
            even = [knp.concatenate([along(x, 0, 1), r], axis=axis) for x, r in zip(xs, rest)]
        return [interleave(e, o) for e, o in zip(even, odd)]

    flat = [knp.flip(e, axis) for e in flat] if reverse else flat
    out = prefixes(flat)
    out = [knp.flip(e, axis) for e in out] if reverse else out
    return tree.pack_sequence_as(elems, out)
