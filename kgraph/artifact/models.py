"""Compiled models as what is written of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kgraph.artifact.save import SavedForm, SavedModel, StateVariable
from kgraph.ir import Graph
from kgraph.structure import Structure

if TYPE_CHECKING:
    from kgraph.compiled import Variant


def saved_model(
    name: str,
    inputs: Structure,
    variants: Sequence[tuple[dict[str, int], Variant]],
    adapts_rank: bool,
    fixed: tuple[str, ...],
    specialised: str | None,
) -> SavedModel:
    """A compiled model to be saved. variants: its compiled forms, with the sizes that each is for."""
    forms = [_form(sizes, variant) for sizes, variant in variants]
    return SavedModel("model", name, inputs, forms, adapts_rank, fixed, specialised)


def _form(sizes: dict[str, int], variant: Variant) -> SavedForm:
    captured = variant.captured
    values = dict(zip(map(id, captured.variables), variant.weights()))
    graph, compiled, state = captured.graph, variant.compiled, []
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
            StateVariable(v.path, values.get(id(v), v._value), numbers.get(id(v), -1), captured.num_outputs + i)
            for i, v in enumerate(captured.updates)
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
