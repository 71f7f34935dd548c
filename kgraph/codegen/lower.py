"""Turns an optimised graph into a program: kernel calls, host steps, buffers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import numpy as np

from kgraph.codegen import control, families
from kgraph.codegen.cache import spec_key
from kgraph.codegen.kernel import KernelCall, KernelSpec, LibraryCall, Temporary
from kgraph.codegen.views import dense_offset
from kgraph.decisions import Decision
from kgraph.ir import Dim, Graph, Node, Value, constant_value
from kgraph.ops.host import HostFunction
from kgraph.runtime.plan import Buffer, HostStep, NativeStep, Program
from kgraph.runtime.steps import LaunchStep, LibraryStep


@dataclass
class Lowered:
    """Steps and buffers of a program, before its kernels are compiled."""

    buffers: list[Buffer] = field(default_factory=list)
    steps: list[Any] = field(default_factory=list)
    specs: dict[str, KernelSpec] = field(default_factory=dict)  # by cache key
    inputs: tuple[int, ...] = ()
    params: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    step_nodes: list[Node] = field(default_factory=list)
    rows: str = ""  # see `kgraph.runtime.plan.Program`

    def __getstate__(self) -> dict[str, Any]:
        """Without nodes, which can be written only with their graph."""
        return {**vars(self), "step_nodes": []}

    def all_specs(self) -> dict[str, KernelSpec]:
        """The kernels of this program and of the bodies of its control flow."""
        out = dict(self.specs)
        for body in self._bodies():
            out |= body.lowered.all_specs()
        return out

    def _bodies(self) -> list[control.LoweredBody]:
        pending = [step.function for step in self.steps if isinstance(step, HostStep)]
        return [body for function in pending if isinstance(function, control.ControlStep) for body in function.bodies]

    def program(
        self, name: str, objects: dict[str, bytes], make: Callable[..., Program] = Program, **fields
    ) -> Program:
        """The program of these steps, once their kernels are compiled (`objects`, by cache key).

        make: the class of the program, or a function that calls it.
        """

        def build(body_name: str, lowered: Lowered, **fields) -> Program:
            return lowered.program(f"{name}/{body_name}", objects, make, **fields)

        steps = [
            replace(step, function=step.function.link(build))
            if isinstance(step, HostStep) and isinstance(step.function, control.ControlStep)
            else step
            for step in self.steps
        ]
        kernels = {key: objects[key] for key in self.specs}
        return make(name, self.buffers, steps, self.inputs, self.outputs, self.params, kernels=kernels, **fields)


def lower(graph: Graph, target, decisions: list[Decision]) -> Lowered:
    """Lower `graph` (after all passes) for `target`; host steps are added to `decisions` with their reason."""
    return _Lowering(graph, target, decisions).run()


def _read_by_views(graph: Graph, kernels: ModuleType) -> set[Node]:
    """Slices, and reshapes of them, whose readers all read the operand instead."""
    found: set[Node] = set()
    if not any(node.name == "slice" for node in graph.nodes):
        return found
    uses, results = graph.uses(), set(graph.outputs)
    views = {node: kernels.views(node) for node in graph.nodes if node.name not in ("slice", "reshape")}
    for node in reversed(graph.nodes):
        if node.name not in ("slice", "reshape") or node.output in results:
            continue
        readers = uses.get(node.output, ())
        # A slice that is read so reads its operand in turn: only a reshape between the two passes on.
        on = lambda reader: reader.name == "reshape" and reader in found
        if readers and all(on(r) or node.output in views.get(r, ()) for r in readers):
            found.add(node)
    return found


class _Lowering:
    def __init__(self, graph: Graph, target, decisions: list[Decision]):
        self.graph, self.target, self.decisions = graph, target, decisions
        self.families = families.for_target(target)
        self.out = Lowered()
        self.ids: dict[Value | Temporary, int] = {}
        # What kernels should write where results are wanted, rather than have it copied there.
        self.results = {control.root_of(v) for v in graph.outputs}
        self.unread = _read_by_views(graph, self.families)

    def run(self) -> Lowered:
        graph, out = self.graph, self.out
        out.inputs = tuple(self._buffer("input", v) for v in graph.inputs)
        out.params = tuple(self._buffer("param", v) for v in graph.params)
        for node in graph.nodes:
            self._node(node)
        out.outputs = tuple(self.ids[v] for v in graph.outputs)
        return out

    def _buffer(self, kind: str, value: Value | Temporary, /, **fields) -> int:
        number = len(self.out.buffers)
        name = getattr(value, "name", "") or ""
        self.out.buffers.append(Buffer(kind, value.type.shape, value.type.dtype, name=name, **fields))
        self.ids[value] = number
        return number

    def _node(self, node: Node) -> None:
        name = node.name
        if node in self.unread:
            return
        if name == "constant":
            self._buffer("constant", node.output, value=np.ascontiguousarray(node.attrs["value"]))
        elif name == "dim_value":
            self._buffer("dim", node.output, value=node.attrs["dim"])
        elif name in ("reshape", "stop_gradient", "optimization_barrier"):
            self._buffer("temporary", node.output, alias=self.ids[node.inputs[0]])
        elif name == "slice" and node.output not in self.results and (first := dense_offset(node)) is not None:
            offset = first * node.output.type.itemsize
            self._buffer("temporary", node.output, alias=self.ids[node.inputs[0]], offset=offset)
        else:
            reason = self.families.accepts(node)
            if reason is None:
                for call in self.families.lower(node, self.target):
                    self._native(node, call)
            elif name == "fusion":
                self._unfused(node)
            else:
                self._host(node, reason)

    def _native(self, node: Node, call: KernelCall) -> None:
        self.out.steps.append(self._step(node, call))
        self.out.step_nodes.append(node)

    def _step(self, node: Node, call: KernelCall, kind: str = "temporary") -> NativeStep:
        """kind: of the buffers that the call is the first to write."""
        operands = self._operands(node, call, len(call.operands) - call.outputs, kind)
        key = spec_key(call.spec, self.target)
        self.out.specs[key] = call.spec
        fields = {
            "kernel": key,
            "operands": operands,
            "outputs": call.outputs,
            "extent": call.extent,
            "sizes": tuple(call.sizes),
            "scratch_bytes": call.scratch_bytes,
            "flops": call.flops,
            "bytes": call.bytes,
            "inplace": tuple(call.notes.get("inplace", ())),
            "label": call.spec.name,
            "layers": tuple(sorted(node.provenance)),
            "grain": call.notes.get("grain", 0),
        }
        if call.launch is None:
            return NativeStep(**fields)
        library = None if call.library is None else self._library(node, call.library)
        return LaunchStep(**fields, **vars(call.launch), library=library, continues=call.continues)

    def _library(self, node: Node, call: LibraryCall) -> LibraryStep:
        # In the order in which they would run, so that each finds what the one before it wrote.
        before: list[Any] = [self._step(node, c, "prepared" if self._is_state(c) else "temporary") for c in call.before]
        operands = self._operands(node, call, len(call.operands) - 1)
        after: list[Any] = [self._step(node, c) for c in call.after]
        return LibraryStep(call.task, operands, tuple(before), tuple(after))

    def _is_state(self, call: KernelCall) -> bool:
        """Whether all that a call reads is one param or constant."""
        buffers, read = self.out.buffers, call.operands[: len(call.operands) - call.outputs]
        if len(read) != 1 or read[0] not in self.ids:
            return False
        b = self.ids[read[0]]
        while buffers[b].alias >= 0:
            b = buffers[b].alias
        return buffers[b].kind in ("param", "constant")

    def _operands(
        self, node: Node, call: KernelCall | LibraryCall, first_output: int, kind: str = "temporary"
    ) -> tuple[int, ...]:
        """The buffers of a call's operands; those that it is the first to write are made."""
        operands = []
        for position, operand in enumerate(call.operands):
            if operand not in self.ids:
                if position >= first_output or isinstance(operand, Temporary):
                    self._buffer(kind, operand)
                elif constant_value(operand) is not None:  # a table of the family's own
                    self._node(operand.producer)
                else:
                    raise KeyError(f"{node}: a kernel reads a value that nothing wrote: {operand}")
            operands.append(self.ids[operand])
        return tuple(operands)

    def _unfused(self, node: Node) -> None:
        """A fused node without a kernel: its members run one by one."""
        body: Graph = node.attrs["body"]
        for outer, inner in zip(node.inputs, body.inputs):
            self.ids[inner] = self.ids[outer]
        for member in body.nodes:
            member.provenance = node.provenance
            self._node(member)
        for outer, inner in zip(node.outputs, body.outputs):
            self.ids[outer] = self.ids[inner]

    def _host(self, node: Node, reason: str) -> None:
        function: Callable = HostFunction(node.primitive, node.attrs)
        outputs: Sequence[Value] = node.outputs
        inplace: tuple[tuple[int, int], ...] = ()
        if node.name in control.PRIMITIVES:
            step = control.lower_control(node, self._symbols(), self._lower_body, self.target, self._is_read)
            if isinstance(step, str):
                reason = step
            else:
                function, reason, outputs = step, step.reason, [node.outputs[i] for i in step.wanted]
                inplace = step.inplace(len(node.inputs))
        operands = [self.ids[v] for v in node.inputs]
        self.ids.update((out, self.ids[given]) for out, given in zip(node.outputs, node.inputs) if out not in outputs)
        operands += [self._buffer("temporary", v) for v in outputs]
        self.out.steps.append(
            HostStep(
                function=function,
                operands=tuple(operands),
                outputs=len(outputs),
                reason=reason,
                label=node.name,
                layers=tuple(sorted(node.provenance)),
                inplace=inplace,
            )
        )
        self.out.step_nodes.append(node)
        self.decisions.append(Decision(node.name, "host step", reason, node.provenance))

    def _is_read(self, value: Value) -> bool:
        return value in self.graph.outputs or any(value in node.inputs for node in self.graph.nodes)

    def _lower_body(self, body: Graph) -> Lowered:
        return lower(body, self.target, [])

    def _symbols(self) -> set[str]:
        """Symbols of which every call of the program knows the value."""
        shapes = [v.shape for v in self.graph.inputs]
        return {symbol for shape in shapes for size in shape if isinstance(size, Dim) for symbol in size.symbols()}
