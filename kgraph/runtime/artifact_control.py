"""Steps of a plan that Python runs, as JSON: branches and loops over programs of their own, and primitives on NumPy.

["reference", text], ["branches", bodies], ["while", first, body, wanted], or ["scan", body, carries, sequences, length,
reverse]; a body is [plan, results, types, constants, symbols, repeat].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from kgraph import dims
from kgraph.runtime.control import Body, Branches, Scan, While, is_handed_on
from kgraph.runtime.plan import Program
from kgraph.types import SHORT_NAMES

CONTROL = (Branches, While, Scan)


def encode_control(function: Any, encode_program: Callable, tensor_name: Callable[[np.ndarray], str]) -> list:
    """The JSON value of a branch's or loop's function. encode_program: gives that of a program without parameters."""

    def body(b: Body) -> list:
        types = [[[dims.to_json(s) for s in shape], dtype] for shape, dtype in b.types]
        constants = [[tensor_name(a), list(a.shape), a.dtype.name] for a in b.constants]
        places, symbols = [list(place) for place in b.results], list(b.symbols)
        return [encode_program(b.program), places, types, constants, symbols, b.repeat]

    if isinstance(function, Branches):
        return ["branches", [body(b) for b in function.bodies]]
    if isinstance(function, While):
        return ["while", body(function.first), body(function.body), list(function.wanted)]
    length = dims.to_json(function.length)
    return ["scan", body(function.body), function.num_carry, function.num_xs, length, function.reverse]


def decode_control(
    data: list,
    num_inputs: int,
    num_outputs: int,
    decode_program: Callable[[Any], Program],
    tensor: Callable,
    may_repeat: Callable[[str], bool],
) -> Callable:
    """The function that `encode_control` wrote, for a step with so many inputs and outputs.

    tensor: `(name, shape, dtype) -> array` of the file. may_repeat: whether a kernel was made to repeat a body.
    Raises ValueError for what is not consistent.
    """
    kind, *fields = data

    def body(encoded: Any, operands: int, results: int, num_carry: int = 0) -> Body:
        plan, places, types, constants, symbols, repeat = encoded
        program = decode_program(plan)
        counts = {"input": len(program.inputs), "output": len(program.outputs)}
        for where, number in places:
            if where not in counts or type(number) is not int or not 0 <= number < counts[where]:
                raise ValueError(f"a body has no {where!r} number {number!r}")
        if len(program.inputs) != operands + len(constants) + len(symbols) or len(places) != results:
            raise ValueError("a body takes or gives another number of values than its step")
        if len(types) != results or not all(dtype in SHORT_NAMES for _, dtype in types):
            raise ValueError("the types of a body's results are not known")
        if program.params or not all(type(symbol) is str for symbol in symbols):
            raise ValueError("a body has parameters, or symbols without a name")
        if repeat != "" and (repeat not in program.kernels or not may_repeat(repeat)):
            raise ValueError(f"a body has no kernel {repeat!r} to repeat it")
        at = tuple([(where, number) for where, number in places])
        if any(carry >= num_carry or not is_handed_on(at, carry, output) for carry, output in program.donations):
            raise ValueError("a body would overwrite operands that are not its own")
        return Body(
            program,
            at,
            tuple([(tuple([dims.from_json(s) for s in shape]), dtype) for shape, dtype in types]),
            tuple([tensor(*constant) for constant in constants]),
            tuple(symbols),
            repeat,
        )

    if kind == "branches":
        (bodies,) = fields
        if not bodies or num_inputs < 1:
            raise ValueError("a choice without branches")
        return Branches(tuple([body(b, num_inputs - 1, num_outputs) for b in bodies]))
    if kind == "while":
        first, again, wanted = fields
        if any(type(n) is not int or not 0 <= n < num_inputs for n in wanted) or len(set(wanted)) != num_outputs:
            raise ValueError("a loop gives other values than it has")
        return While(body(first, num_inputs, 1), body(again, num_inputs, num_inputs + 1, num_inputs), tuple(wanted))
    if kind != "scan":
        raise ValueError(f"there is no step of the kind {kind!r}")
    encoded, num_carry, num_xs, length, reverse = fields
    if not all(type(n) is int and n >= 0 for n in (num_carry, num_xs)) or type(reverse) is not bool:
        raise ValueError("a scan's counts are no numbers")
    if num_carry + num_xs > num_inputs or num_carry > num_outputs:
        raise ValueError("a scan has fewer values than it carries")
    return Scan(body(encoded, num_inputs, num_outputs, num_carry), num_carry, num_xs, dims.from_json(length), reverse)


def programs_of(program: Program) -> list[Program]:
    """A program and those of the bodies in it, at any depth."""
    return [program, *(body.program for body in bodies_of(program))]


def bodies_of(program: Program) -> list[Body]:
    """The bodies of a program's loops and branches, at any depth."""
    out: list[Body] = []
    for step in program.steps:
        function = getattr(step, "function", None)
        if isinstance(function, CONTROL):
            for body in _bodies(function):
                out += [body, *bodies_of(body.program)]
    return out


def _bodies(function: Any) -> tuple[Body, ...]:
    if isinstance(function, Branches):
        return function.bodies
    return (function.first, function.body) if isinstance(function, While) else (function.body,)


def named_objects(program: Program) -> Mapping[str, bytes]:
    """The object code of all kernels of a program and of the bodies in it, by key, and of the `executor`."""
    out: dict[str, bytes] = {}
    for each in programs_of(program):
        out |= each.kernels
        if each.executor_object:
            out["executor"] = each.executor_object
    return out
