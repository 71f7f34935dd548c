"""Compiled models and training steps as what is written of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kgraph.artifact.save import SavedForm, SavedModel, StateVariable
from kgraph.ir import Graph
from kgraph.runtime.cuda.program import CudaProgram
from kgraph.structure import Structure

if TYPE_CHECKING:
    from kgraph.compiled import Variant
    from kgraph.compiler import CompiledGraph
    from kgraph.train_step import Variant as StepVariant


def saved_model(
    name: str,
    inputs: Structure,
    variants: Sequence[tuple[dict[str, int], Variant]],
    adapts_rank: bool,
    fixed: tuple[str, ...],
    specialised: str | None,
) -> SavedModel:
    """A compiled model to be saved. variants: its compiled forms, with the sizes that each is for."""
    names = unique_names(v for _, variant in variants for v in variant.captured.updates)
    forms = [_form(sizes, variant, names) for sizes, variant in variants]
    return SavedModel("model", name, inputs, forms, adapts_rank, fixed, specialised)


def _for_this_machine(compiled: CompiledGraph) -> CompiledGraph | None:
    """The compiled graph if its code is for processors; what runs on a GPU is compiled again for them."""
    return None if isinstance(compiled.program, CudaProgram) else compiled


def unique_names(variables) -> dict[int, str]:
    """A name for every variable (by its `id`), its path where no other one has it."""
    names: dict[int, str] = {}
    for variable in variables:
        if id(variable) not in names:
            name, number = variable.path, 1
            while name in names.values():
                number += 1
                name = f"{variable.path}_{number}"
            names[id(variable)] = name
    return names


def _form(sizes: dict[str, int], variant: Variant, names: Mapping[int, str]) -> SavedForm:
    captured = variant.captured
    values = dict(zip(map(id, captured.variables), variant.weights()))
    graph, state = captured.graph, []
    compiled = _for_this_machine(variant.compiled)
    updated = {id(v) for v in captured.updates}
    own = list(zip(captured.variables, graph.params, strict=True))
    if updated:
        # What calls change is an input and an output of the saved program, as it would otherwise be prepared anew.
        compiled = None
        changed = [(v, p) for v, p in own if id(v) in updated]
        own = [(v, p) for v, p in own if id(v) not in updated]
        numbers = {id(v): len(graph.inputs) + i for i, (v, _) in enumerate(changed)}
        inputs, params = [*graph.inputs, *(p for _, p in changed)], [p for _, p in own]
        graph = Graph(inputs, params, graph.nodes, graph.outputs, graph.name)
        state = [
            StateVariable(names[id(v)], "other", values.get(id(v), v._value), numbers.get(id(v), -1), number)
            for number, v in enumerate(captured.updates, captured.num_outputs)
        ]
        state.sort(key=lambda s: s.input)
    return SavedForm(
        graph=graph,
        values=[values[id(v)] for v, _ in own],
        names=[v.path for v, _ in own],
        inputs=captured.inputs,
        outputs=captured.outputs,
        sizes=sizes,
        compiled=compiled,
        state=state,
    )


def saved_step(
    name: str, variant: StepVariant, kinds: Mapping[str, Sequence[Any]], resets: Mapping[int, Any]
) -> SavedModel:
    """A training step to be saved.

    variant: its program. kinds: the variables of each kind ("weight", "optimizer", "metric"); weights that the step
    only reads are written too. resets: values of variables (by `id`) where an epoch begins.
    """
    kind_of = {id(v): kind for kind, variables in kinds.items() for v in variables}
    inputs = {id(v): number for number, v in enumerate(variant.state, variant.inputs.num_leaves)}
    outputs = {id(v): number for number, v in enumerate(variant.updates, variant.num_results)}
    changed = {id(v): v for v in [*variant.state, *variant.updates]}
    kept = {id(v): v for v in kinds["weight"] if id(v) not in changed}
    names = unique_names([*changed.values(), *kept.values()])
    state = [
        StateVariable(
            names[key], kind_of.get(key, "other"), v._value, inputs.get(key, -1), outputs.get(key, -1), resets.get(key)
        )
        for key, v in (changed | kept).items()
    ]
    state.sort(key=lambda s: s.input)
    form = SavedForm(
        graph=variant.compiled.captured,
        values=[v._value for v in variant.read],
        names=[v.path for v in variant.read],
        inputs=variant.inputs,
        outputs=variant.outputs,
        sizes={},
        compiled=_for_this_machine(variant.compiled),
        state=state,
        passes=variant.passes,
        donations=variant.donations,
    )
    return SavedModel("step", name, variant.inputs, [form])
