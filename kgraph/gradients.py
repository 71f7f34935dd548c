"""Gradients of functions written in `keras.ops`: `grad` and `value_and_grad`.

The function is traced in whatever trace runs (a capture, `kgraph.jit`, the body of a loop, another gradient), and the
backward nodes are recorded right after it, so that forward and backward are one graph. Without a running trace one is
made, and its graph is evaluated by the interpreter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from keras.src import tree
from keras.src.backend.common.stateless_scope import get_stateless_scope

from kgraph.errors import DTypeError, ShapeError
from kgraph.frontend.capture import capture_function
from kgraph.frontend.keras_backend.core import dense_tensor as convert_to_tensor
from kgraph.frontend.tracer import GraphTracer, TracedArray, running_trace
from kgraph.ir import Graph, Value, bind
from kgraph.ir.interpreter import evaluate
from kgraph.ir.types import FLOATS
from kgraph.ops.common import is_differentiable, zeros_like
from kgraph.ops.reverse_mode import pull_back
from kgraph.passes.patterns import primitive

ArgNums = int | Sequence[int]


def value_and_grad(
    function: Callable, argnums: ArgNums = 0, has_aux: bool = False, *, unconnected: Literal["zero", "none"] = "zero"
) -> Callable:
    """A function that gives `(value, gradients)` of `function`.

    Args:
        function: written in `keras.ops`; gives a float scalar, or `(scalar, aux)` with `has_aux`. Calls of layers and
            `model.stateless_call` are welcome.
        argnums: the positional argument to differentiate by, or several. An argument may be nested (a list of
            weights); all its tensors are floats.
        has_aux: the function gives something beside its value, which is passed on: `((value, aux), gradients)`.
        unconnected: what stands for the gradient by a tensor that the value does not depend on: zeros, or None.

    The gradients have the structure of the argument, and are a tuple of them for several `argnums`. They are by the
    arguments only: what the function closes over counts as constant, even where it is the same array.
    Works on arrays (interpreted; put `kgraph.jit` around it for speed) and inside of other traces, itself included.
    Raises at the call GradientError (a primitive on the way has no derivative), ShapeError (the value is no scalar),
    DTypeError (an argument or the value is no float).
    """
    if unconnected not in ("zero", "none"):
        raise ValueError(f"unconnected is 'zero' or 'none', got {unconnected!r}")
    if not callable(function):
        raise TypeError(f"value_and_grad takes a function written in keras.ops, got {function!r}")
    name = getattr(function, "__name__", type(function).__name__)

    @functools.wraps(function, updated=())
    def transformed(*args, **kwargs):
        tracer = running_trace()
        if tracer is None:
            return _evaluated(transformed, args, kwargs)
        positions = _positions(argnums, len(args), name)
        return _recorded(tracer, function, name, positions, has_aux, unconnected == "zero", args, kwargs)

    return transformed


def grad(function: Callable, argnums: ArgNums = 0, has_aux: bool = False) -> Callable:
    """A function that gives the gradients of `function`, or `(gradients, aux)` with `has_aux`. See `value_and_grad`."""
    both = value_and_grad(function, argnums, has_aux)

    @functools.wraps(function, updated=())
    def transformed(*args, **kwargs):
        value, gradients = both(*args, **kwargs)
        return (gradients, value[1]) if has_aux else gradients

    return transformed


def _positions(argnums: ArgNums, count: int, name: str) -> int | tuple[int, ...]:
    """`argnums` counted from the front. Raises TypeError for an argument that was not given."""
    numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    for number in numbers:
        if not -count <= number < count:
            raise TypeError(f"the gradient of {name} by argument {number} needs it as a positional one; got {count}")
    numbers = tuple(n % count for n in numbers)
    if len(set(numbers)) < len(numbers):
        raise TypeError(f"the gradient of {name}: argnums {argnums} name an argument twice")
    return numbers[0] if isinstance(argnums, int) else numbers


# -- under a trace ---------------------------------------------------------------------------------------------------
def _recorded(
    tracer: GraphTracer, function, name: str, positions, has_aux: bool, fill: bool, args: tuple, kwargs: dict
):
    """Record the function, then its backward part."""
    arguments = list(args)
    numbers = positions if isinstance(positions, tuple) else (positions,)
    for n in numbers:
        arguments[n] = tree.map_structure(lambda x, n=n: _independent(tracer, x, f"argument {n} of {name}"), args[n])
    leaves = [x for n in numbers for x in tree.flatten(arguments[n]) if x is not None]
    start = len(tracer.graph.nodes)
    result = function(*arguments, **kwargs)
    value, aux = result if has_aux else (result, None)
    value = _scalar(value, name, has_aux)
    end = len(tracer.graph.nodes)
    one = np.ones((), value.dtype)
    gradients = pull_back(
        tracer.graph.nodes[start:end],
        lambda v: TracedArray(tracer, v),
        {tracer.lift(value): one},
        [x.value for x in leaves],
        [(lo - start, hi - start) for lo, hi in tracer.recomputed if start <= lo and hi <= end],
    )
    found = iter([zeros_like(x) if g is None and fill else g for x, g in zip(leaves, gradients)])
    packed = [tree.map_structure(lambda x: x if x is None else next(found), arguments[n]) for n in numbers]
    by_position = tuple(packed) if isinstance(positions, tuple) else packed[0]
    _drop_unread(tracer.graph, end, [tracer.lift(g) for g in tree.flatten(packed) if g is not None])
    return (value, aux) if has_aux else value, by_position


def _independent(tracer: GraphTracer, x, what: str):
    """A value of its own for a tensor of an argument: what the function closes over stays apart from it."""
    if x is None:
        return None
    x = convert_to_tensor(x)
    if not is_differentiable(x):
        raise DTypeError(f"{what} has dtype {x.dtype}; gradients exist by floats only")
    operand = TracedArray(tracer, tracer.lift(x))
    # Bound as a primitive: the function of that name gives back its operand where the shape stays.
    return bind(primitive("reshape"), operand, shape=tuple(operand.shape))


def _scalar(value, name: str, has_aux: bool):
    if isinstance(value, (tuple, list, dict)):
        hint = "" if has_aux else "; with has_aux=True it may give (value, aux)"
        raise ShapeError(f"{name} gives a {type(value).__name__}, and its gradient needs one float scalar{hint}")
    value = convert_to_tensor(value)
    if tuple(value.shape):
        raise ShapeError(f"{name} gives a tensor of shape {tuple(value.shape)}, and its gradient needs a scalar")
    if np.dtype(value.dtype).name not in FLOATS:
        raise DTypeError(f"{name} gives a value of dtype {value.dtype}, and its gradient needs a float")
    return value


def _drop_unread(graph: Graph, start: int, results: Sequence[Value]) -> None:
    """Remove the backward nodes, those from `start` on, that no gradient needs.

    Nodes without operands stay: the tracer may give a constant out again.
    """
    needed = set(results)
    kept = []
    for node in reversed(graph.nodes[start:]):
        if not node.inputs or any(o in needed for o in node.outputs):
            kept.append(node)
            needed.update(node.inputs)
    graph.nodes[start:] = reversed(kept)


# -- on arrays -------------------------------------------------------------------------------------------------------
def _evaluated(transformed: Callable, args: tuple, kwargs: dict):
    """Trace and interpret; variables that the function assigns get their new values."""
    captured = capture_function(transformed, *args, **kwargs)
    scope = get_stateless_scope()

    def current(variable) -> Any:
        value = None if scope is None else scope.get_current_value(variable)
        return variable._value if value is None else value

    arrays = [convert_to_tensor(x) for x in captured.inputs.flatten_call(args, kwargs)]
    results = evaluate(captured.graph, arrays, [current(v) for v in captured.variables])
    for variable, value in zip(captured.updates, results[captured.num_outputs :]):
        variable.assign(value)
    return captured.outputs.pack(results[: captured.num_outputs])


__all__ = ["grad", "value_and_grad"]
