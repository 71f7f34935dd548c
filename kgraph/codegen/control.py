"""Bodies of control flow, lowered to programs of their own, which the steps of `kgraph.runtime.control` run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from kgraph.codegen.cache import spec_key
from kgraph.codegen.cpu.repeat import SPEC as REPEAT
from kgraph.codegen.cuda.target import CudaTarget
from kgraph.codegen.target import Target
from kgraph.ir import Dim, Graph, Node, TensorType, Value, append_graph, constant_value, live_nodes
from kgraph.runtime.control import Body, Branches, Scan, While, carried_in_place, changing, is_handed_on
from kgraph.runtime.plan import Program
from kgraph.runtime.steps import HostStep

if TYPE_CHECKING:
    from kgraph.codegen.lower import Lowered

PRIMITIVES = frozenset({"cond", "while_loop", "scan"})
# Nodes whose result has the bytes of their operand.
_VIEWS = frozenset({"reshape", "stop_gradient", "optimization_barrier"})


@dataclass
class LoweredBody:
    """A body before its kernels are compiled; the fields are those of `runtime.control.Body`, and of its program."""

    name: str
    lowered: Lowered
    input_names: tuple[str, ...]
    results: tuple[tuple[str, int], ...]
    types: tuple[tuple[tuple, str], ...]
    constants: tuple[np.ndarray, ...]
    symbols: tuple[str, ...]
    repeat: str = ""
    donations: tuple[tuple[int, int], ...] = ()

    def link(self, build: Callable[..., Program], on_device: bool) -> Body:
        """The body with its program, made by `build(name, lowered, **fields)`."""
        fields: dict[str, Any] = {"input_names": self.input_names, "donations": self.donations}
        if on_device:
            fields["keeps_places"] = False
        program = build(self.name, self.lowered, **fields)
        return Body(program, self.results, self.types, self.constants, self.symbols, self.repeat)


@dataclass
class ControlStep:
    """Stands for the function of a host step until the kernels of its bodies are compiled.

    primitive: "cond", "while_loop" or "scan". attrs: those of its node that are no graphs. on_device: of a GPU.
    wanted: numbers of the node's results that the step gives; any other one that is read is the operand of its number.
    """

    primitive: str
    attrs: dict[str, Any]
    bodies: list[LoweredBody] = field(default_factory=list)
    on_device: bool = False
    wanted: tuple[int, ...] = ()

    def inplace(self, num_operands: int) -> tuple[tuple[int, int], ...]:
        """See `HostStep`."""
        if self.primitive == "cond":
            return ()
        given = self.wanted if self.primitive == "while_loop" else self.wanted[: self.attrs["num_carry"]]
        return carried_in_place(num_operands, given, self.bodies[-1].donations)

    def __call__(self, arrays, sizes):
        raise RuntimeError(f"the step {self.primitive} was never linked")

    @property
    def reason(self) -> str:
        """What the step is, for `explain`."""
        steps = [step for body in self.bodies for step in body.lowered.steps]
        functions = [step.function for step in steps if isinstance(step, HostStep)]
        hosts = [step.label for step in steps if isinstance(step, HostStep) and not _is_launched(step.function)]
        kernels = f"{len(steps) - len(functions)} kernel calls"
        if self.primitive == "cond":
            text = f"its branches are compiled ({kernels}); Python calls the one that is chosen"
        elif self.is_launched:
            text = f"its body is compiled ({kernels}), which is launched for all iterations at once"
        else:
            who = "native code counts" if self.bodies[-1].repeat and not hosts else "Python counts"
            text = f"its body is compiled ({kernels}); {who} the iterations"
        return text + (f"; host steps in there: {', '.join(hosts)}" if hosts else "")

    @property
    def is_launched(self) -> bool:
        """Whether a GPU runs all of it without Python in between."""
        steps = [step for body in self.bodies for step in body.lowered.steps if isinstance(step, HostStep)]
        return self.on_device and self.primitive == "scan" and all(_is_launched(step.function) for step in steps)

    def link(self, build: Callable[..., Program]) -> Any:
        """The step's function."""
        attrs = self.attrs
        bodies = [body.link(build, self.on_device) for body in self.bodies]
        if self.primitive == "cond":
            return Branches(tuple(bodies))
        if self.primitive == "while_loop":
            first, again = bodies
            return While(first, again, self.wanted)
        return Scan(bodies[0], attrs["num_carry"], attrs["num_xs"], attrs["length"], attrs["reverse"])


def lower_control(
    node: Node,
    known: set[str],
    lower: Callable[[Graph], Lowered],
    target: Target | CudaTarget,
    is_read: Callable[[Value], bool],
) -> ControlStep | str:
    """The step for a node of control flow, or the reason why its bodies cannot be compiled.

    known: symbols whose values the program around it has. lower: what turns a body into a program. is_read: whether
    anything reads a result of the node.
    """
    attrs = node.attrs
    if node.name == "cond":
        graphs = list(attrs["branches"])
    elif node.name == "while_loop":
        graphs = [attrs["cond"], _followed_by(attrs["body"], attrs["cond"])]
    else:
        graphs = [attrs["body"]]
    plain = {name: value for name, value in attrs.items() if name in ("num_carry", "num_xs", "length", "reverse")}
    step = ControlStep(node.name, plain, on_device=isinstance(target, CudaTarget))
    for graph in graphs:
        body = _lower_body(graph, known, lower)
        if isinstance(body, str):
            return body
        step.bodies.append(body)
    if node.name != "cond":
        body = step.bodies[-1]
        body.donations = _donations(body, node.attrs.get("num_carry", len(node.outputs)), step.on_device)
        if isinstance(target, Target):
            body.repeat = spec_key(REPEAT, target)
            body.lowered.specs[body.repeat] = REPEAT
    step.wanted = tuple(range(len(node.outputs)))
    if node.name == "while_loop":
        step.wanted = tuple(i for i in changing(step.bodies[-1].results) if is_read(node.outputs[i]))
    return step


def _donations(body: LoweredBody, num_carry: int, on_device: bool) -> tuple[tuple[int, int], ...]:
    """Carries whose place what an iteration makes of them may take, as nothing else is made of either.

    On the CPU, Python hands the carries of a body with host steps from call to call, as arrays of their own.
    """
    lowered, results = body.lowered, body.results
    if not on_device and any(isinstance(step, HostStep) for step in lowered.steps):
        return ()
    typed = lambda b: (lowered.buffers[b].shape, lowered.buffers[b].dtype)
    return tuple(
        (i, number)
        for i, (kind, number) in enumerate(results[:num_carry])
        if kind == "output"
        and is_handed_on(results, i, number)
        and typed(lowered.inputs[i]) == typed(lowered.outputs[number])
    )


def _is_launched(function: Callable) -> bool:
    return isinstance(function, ControlStep) and function.is_launched


def _followed_by(body: Graph, test: Graph) -> Graph:
    """The graph that gives the results of `body`, then what `test` says of them."""
    joined = Graph([Value(v.type, name=v.name) for v in body.inputs], name=body.name)
    results = append_graph(joined, body, joined.inputs)
    joined.outputs = [*results, *append_graph(joined, test, results)]
    return joined


def _lower_body(graph: Graph, known: set[str], lower: Callable) -> LoweredBody | str:
    own = Graph([Value(v.type, name=v.name) for v in graph.inputs], name=graph.name)
    own.outputs = append_graph(own, graph, own.inputs)
    inputs = list(own.inputs)
    constants: list[np.ndarray] = []
    outputs: list[Value] = []
    results: list[tuple[str, int]] = []
    for value in own.outputs:
        root = root_of(value)
        literal = constant_value(root)
        if literal is not None:
            constants.append(np.asarray(literal, order="C"))
            inputs.append(Value(root.type))
            results.append(("input", len(inputs) - 1))
        elif root in own.inputs:
            results.append(("input", own.inputs.index(root)))
        else:
            if root not in outputs:
                outputs.append(root)
            results.append(("output", outputs.index(root)))
    symbols = sorted(_symbols(own) - _given_symbols(inputs))
    unknown = [s for s in symbols if s not in known]
    if unknown:
        return f"the sizes {unknown} in its body do not follow from its operands"
    inputs += [Value(TensorType((Dim.symbol(s),), "bool"), name=s) for s in symbols]
    final = Graph(inputs, (), live_nodes(own.nodes, outputs), outputs, own.name)
    return LoweredBody(
        name=own.name,
        lowered=lower(final),
        input_names=tuple(v.name or f"operand {i}" for i, v in enumerate(inputs)),
        results=tuple(results),
        types=tuple((v.shape, v.dtype) for v in own.outputs),
        constants=tuple(constants),
        symbols=tuple(symbols),
    )


def root_of(value: Value) -> Value:
    """The value whose bytes a value has."""
    while value.node is not None and value.node.name in _VIEWS:
        value = value.node.inputs[0]
    return value


def _given_symbols(inputs: list[Value]) -> set[str]:
    """Symbols that the shapes of inputs determine: those of an axis `a * symbol + b`."""
    found: set[str] = set()
    for value in inputs:
        for size in value.shape:
            if not isinstance(size, Dim):
                continue
            terms = dict(size.terms)
            terms.pop((), 0)
            ((monomial, factor),) = terms.items() if len(terms) == 1 else [((), 0)]
            if len(monomial) == 1 and isinstance(monomial[0], str) and factor > 0:
                found.add(monomial[0])
    return found


def _symbols(graph: Graph) -> set[str]:
    """All symbols in the types and attributes of a graph and of the graphs within it."""
    found: set[str] = set()
    for value in (*graph.inputs, *graph.outputs):
        found.update(*(s.symbols() for s in value.shape if isinstance(s, Dim)))
    for node in graph.nodes:
        for value in node.outputs:
            found.update(*(s.symbols() for s in value.shape if isinstance(s, Dim)))
        for attr in _flat(node.attrs.values()):
            if isinstance(attr, Dim):
                found |= attr.symbols()
            elif isinstance(attr, Graph):
                found |= _symbols(attr)
    return found


def _flat(values) -> Iterator:
    for value in values:
        if isinstance(value, tuple):
            yield from _flat(value)
        else:
            yield value
