"""The forms of a saved model, each a program with the structure of its inputs and outputs, and its self-test."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kgraph.decisions import Decision
from kgraph.dims import from_json
from kgraph.report import KernelRow
from kgraph.runtime import artifact_plan
from kgraph.runtime.artifact_file import ArtifactFile
from kgraph.runtime.artifact_tensors import Tensors
from kgraph.runtime.plan import Program
from kgraph.structure import Structure

# What parsing of a manifest that is not one may raise.
DAMAGE = (ValueError, TypeError, LookupError, AttributeError, RecursionError, OverflowError)


@dataclass
class State:
    """A value that the model keeps between calls.

    kind: "weight", "optimizer", "metric" or "other". input, output: numbers of the program's, or -1. reset: its value
    where an epoch begins; None where it goes on.
    """

    name: str
    kind: str
    value: np.ndarray
    input: int
    output: int
    reset: np.ndarray | None = None


@dataclass
class LoadedForm:
    """The program for all sizes, or for some fixed ones.

    sizes: the values of the model's fixed sizes. state: what calls read and change besides their inputs and outputs.
    report: reads the explanation; text: reads the optimised graph. values: those of the state now, by name; the forms
    of a model share them.
    """

    inputs: Structure
    outputs: Structure
    program: Program
    sizes: dict[str, int]
    state: list[State]
    report: Callable[[], tuple[list[KernelRow], list[Decision]]]
    text: Callable[[], str]
    values: dict[str, np.ndarray] = field(default_factory=dict)

    def run(self, arrays: list[np.ndarray], out: list | None) -> list[np.ndarray]:
        """A call: the leaves of the outputs; state gets its new values."""
        count = self.outputs.num_leaves
        given = None if out is None else [*out, *[None] * (len(self.program.outputs) - count)]
        results = self.program([*arrays, *self.state_inputs()], given)
        for s in self.state:
            if s.output >= 0:
                self.values[s.name] = results[s.output]
        return list(results[:count])

    def state_inputs(self) -> list[np.ndarray]:
        """The values of the state that the program reads, in the order of its inputs."""
        return [self.values[s.name] for s in self.state if s.input >= 0]


def read_tensors(file: ArtifactFile, names: Iterable[str]) -> Mapping[str, np.ndarray]:
    """The tensors of several sections, in the mapping."""
    out: dict[str, np.ndarray] = {}
    for name in names:
        try:
            out.update(Tensors(file.view(name)))
        except ValueError as error:
            file.fail(f"the section {name!r} is damaged: {error}")
    return out


def read_state(file: ArtifactFile, data: Any, num_inputs: int, num_outputs: int) -> list[State]:
    """The state of a form, in arrays of its own. Raises ValueError for numbers that are none of the program's."""
    section = as_text(data["section"])
    tensors = Tensors(file.read(section))
    out = []
    for index, (name, kind, dtype, shape, number, output, resets) in enumerate(data["variables"]):
        if type(number) is not int or type(output) is not int:
            raise ValueError("state is numbered by integers")
        if not -1 <= number < num_inputs or not -1 <= output < num_outputs:
            raise ValueError(f"there is no input {number} or output {output} for the state {name!r}")
        key = f"{index}.{as_text(name)}"
        value = np.array(artifact_plan.restored(tensors[key], shape, as_text(dtype)))
        reset = np.array(artifact_plan.restored(tensors[f"reset.{key}"], shape, dtype)) if resets else None
        out.append(State(name, as_text(kind), value, number, output, reset))
    return out


def read_form(
    file: ArtifactFile, inputs: Structure, data: dict, level: str, host_functions: artifact_plan.HostFunctions
) -> LoadedForm:
    own = data["programs"][level]
    code = file.read(as_text(own["code"]))
    try:
        objects = {name: array.tobytes() for name, array in Tensors(code).items()}
    except ValueError as error:
        file.fail(f"its object code is damaged: {error}")
    tensors = read_tensors(file, map(as_text, own["weights"]))
    program = artifact_plan.decode(file.read_json(as_text(own["plan"])), tensors, objects, host_functions)
    outputs = Structure.from_json(data["outputs"])
    state = read_state(file, data["state"], len(program.inputs), len(program.outputs))
    return make_form(inputs, outputs, program, data["sizes"], state, *_readers(file, own["report"], data["text"]))


def make_form(inputs: Structure, outputs: Structure, program: Program, sizes, state, report, text) -> LoadedForm:
    """A form whose program fits the structures. Raises ValueError where it does not."""
    given = [s.input for s in state if s.input >= 0]
    first, updated = inputs.num_leaves, sorted(s.output for s in state if s.output >= 0)
    if given != list(range(first, len(program.inputs))):
        raise ValueError("the program's inputs are not the model's inputs and state")
    if [*range(outputs.num_leaves), *updated] != list(range(len(program.outputs))):
        raise ValueError("the program's outputs are not the model's outputs and state")
    for s in state:
        for b in [program.inputs[s.input]] * (s.input >= 0) + [program.outputs[s.output]] * (s.output >= 0):
            if (program.buffers[b].shape, program.dtypes[b]) != (s.value.shape, s.value.dtype):
                raise ValueError(f"the state {s.name!r} has another type in the program")
    if not all(type(name) is str and type(size) is int for name, size in sizes.items()):
        raise ValueError("a fixed size is no number")
    values = {s.name: s.value for s in state}
    if len(values) != len(state):
        raise ValueError("two values of the state have one name")
    return LoadedForm(inputs, outputs, program, dict(sizes), state, report, text, values)


def _readers(file: ArtifactFile, report: Any, text: Any) -> tuple[Callable, Callable]:
    """Functions that read a form's explanation and its graph, which few callers ask for."""
    names = as_text(report), as_text(text)
    for name in names:
        file.section(name)

    def read_report() -> tuple[list[KernelRow], list[Decision]]:
        data = file.read_json(names[0])
        try:
            rows = [
                KernelRow(label, tuple(layers), tuple(members), output, from_json(flops), from_json(size), host, reason)
                for label, layers, members, output, flops, size, host, reason in data["kernels"]
            ]
            decisions = [
                Decision(subject, outcome, why, frozenset(layers))
                for subject, outcome, why, layers in data["decisions"]
            ]
            return rows, decisions
        except DAMAGE as error:
            file.fail(f"its report is damaged: {error}")

    return read_report, lambda: file.read(names[1]).decode(errors="replace")


def as_text(value: Any) -> str:
    """The value, if it is a text. Raises ValueError."""
    if type(value) is not str:
        raise ValueError(f"expected a text, found {value!r:.60}")
    return value


def state_section(number: int) -> str:
    """The section with the state of form `number`."""
    return f"state/{number}"


def state_tensors(state: Sequence[State], values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of a section of state. values: of each now, by name."""
    out = {f"{i}.{s.name}": artifact_plan.stored(values[s.name]) for i, s in enumerate(state)}
    resets = {f"reset.{i}.{s.name}": artifact_plan.stored(s.reset) for i, s in enumerate(state) if s.reset is not None}
    return out | resets
