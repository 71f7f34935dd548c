"""Writes a compiled model to a file: object code, prepared weights and plans for several kinds of machine."""

from __future__ import annotations

import json
import os
import platform
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import kgraph
from kgraph.artifact.host_steps import text_of
from kgraph.artifact.self_test import record
from kgraph.artifact.tensor_store import TensorStore
from kgraph.codegen.target import Target, host_target, make_target
from kgraph.compiler import CompiledGraph, compile_graph
from kgraph.dims import to_json
from kgraph.errors import CompileError
from kgraph.ir import Graph
from kgraph.ir.printer import print_graph
from kgraph.report import explain
from kgraph.runtime import artifact_plan, layout
from kgraph.runtime.artifact_control import CONTROL, programs_of
from kgraph.runtime.artifact_file import write_file
from kgraph.runtime.artifact_forms import State as StateVariable
from kgraph.runtime.artifact_forms import state_section, state_tensors
from kgraph.runtime.artifact_level import requirement
from kgraph.runtime.artifact_self_test import test_pieces
from kgraph.runtime.artifact_tensors import to_pieces
from kgraph.runtime.plan import Program
from kgraph.runtime.steps import HostStep
from kgraph.structure import Structure

_NATIVE = "native"
_X86_LEVELS = ("x86-64-v4", "x86-64-v3")


@dataclass
class SavedForm:
    """What is written of a model for all sizes, or for some fixed ones.

    graph: before passes; what calls read and change is among its inputs and outputs. values: of its params, in order;
    names: theirs. compiled: the graph compiled for this process,
    with its params set; None where it is to be compiled.
    """

    graph: Graph
    values: list[np.ndarray]
    names: list[str]
    inputs: Structure
    outputs: Structure
    sizes: dict[str, int]
    compiled: CompiledGraph | None = None
    state: Sequence[StateVariable] = ()
    passes: str = "inference"
    donations: Sequence[tuple[int, int]] = ()


@dataclass
class SavedModel:
    """All that a file is made of. kind: "model" or "step". fixed: the sizes that forms differ in."""

    kind: str
    name: str
    inputs: Structure
    forms: list[SavedForm]
    adapts_rank: bool = False
    fixed: tuple[str, ...] = ()
    specialised: str | None = None


def save(
    model: SavedModel,
    path: str | os.PathLike,
    *,
    levels: Sequence[str] | None = None,
    rebuildable: bool = True,
    self_test: bool = True,
) -> int:
    """Write a model; gives the size of the file in bytes.

    levels: the kinds of machine to make code for: "native" (this one), "x86-64-v4" (AVX-512), "x86-64-v3" (AVX2),
        "x86-64-v2"; by default the first three, elsewhere than on x86-64 under Linux just the first. Each has its own
        prepared weights, unless another level's are the same.
    rebuildable: write the graph and the weights as they are before preparation too, so that where no level fits, the
        model is compiled again.
    self_test: record a call with its results, to be repeated when the file is loaded.
    Raises CompileError for an unknown level.
    """
    return _Writer(model, rebuildable, self_test).write(path, _targets(levels))


def _targets(levels: Sequence[str] | None) -> dict[str, Target]:
    on_x86 = sys.platform.startswith("linux") and platform.machine() in ("x86_64", "AMD64")
    if levels is None:
        levels = (_NATIVE, *_X86_LEVELS) if on_x86 else (_NATIVE,)
    if not levels and not isinstance(levels, str):
        raise CompileError("a file needs at least one level")
    if isinstance(levels, str):
        levels = (levels,)
    if not on_x86 and set(levels) != {_NATIVE}:
        raise CompileError(f"on this system code can be made for the level {_NATIVE!r} only")
    targets = {name: host_target() if name == _NATIVE else make_target(name, foreign=True) for name in levels}
    # Best first: a machine takes the first level that it can run.
    return dict(sorted(targets.items(), key=lambda item: -len(_features(item[1]))))


def _features(target: Target) -> list[str]:
    return [feature[1:] for feature in target.features.split(",") if feature.startswith("+")]


class _Writer:
    def __init__(self, model: SavedModel, rebuildable: bool, self_test: bool):
        self.model, self.rebuildable, self.self_test = model, rebuildable, self_test
        self.store = TensorStore()
        self.sections: list[tuple[str, list]] = []
        self.host_steps: dict[str, None] = {}
        self.users: list[tuple[dict, str]] = []

    def write(self, path: str | os.PathLike, targets: dict[str, Target]) -> int:
        model = self.model
        forms = [self.form(number, form, targets) for number, form in enumerate(model.forms)]
        weights, needed = self.store.sections()
        for entry, user in self.users:
            entry["weights"] = needed.get(user, [])
        manifest = {
            "kind": model.kind,
            "kgraph": kgraph.__version__,
            "name": model.name,
            "inputs": model.inputs.to_json(),
            "adapts_rank": model.adapts_rank,
            "fixed": list(model.fixed),
            "specialised": model.specialised,
            "levels": [[name, requirement(_features(target)).to_json()] for name, target in targets.items()],
            "forms": forms,
            "host_steps": list(self.host_steps),
            "layout": layout.version(),
        }
        if self.host_steps:
            steps = "; ".join(self.host_steps)
            warnings.warn(
                f"{model.name}: the saved model has steps that run on NumPy ({steps}), so it loads only "
                " where the whole package kgraph is installed, not with the runtime alone",
                stacklevel=4,
            )
        return write_file(path, [("manifest", [_json(manifest)]), *self.sections, *weights])

    def form(self, number: int, form: SavedForm, targets: dict[str, Target]) -> dict[str, Any]:
        programs: dict[str, dict] = {}
        text = ""  # of the best level
        for level, target in targets.items():
            compiled = form.compiled if target == host_target() else None
            if compiled is None:
                compiled = compile_graph(form.graph, passes=form.passes, donations=form.donations, target=target)
                compiled.set_params(form.values)
                if target == host_target():
                    form.compiled = compiled
            programs[level] = entry = self.program(f"{number}/{level}", compiled)
            runs_here = not requirement(_features(target)).missing()
            entry["self_test"] = self.record(entry, form, compiled) if self.self_test and runs_here else None
            text = text or str(compiled.optimised)
        self.sections.append((f"text/{number}", [text.encode()]))
        return {
            "sizes": form.sizes,
            "outputs": form.outputs.to_json(),
            "state": self.state(number, form.state),
            "programs": programs,
            "text": f"text/{number}",
            "graph": self.graph(f"graph/{number}", form) if self.rebuildable else None,
        }

    def state(self, number: int, state: Sequence[StateVariable]) -> dict[str, Any]:
        """Write the values of what calls change, in a section of their own, which a later save can replace."""
        section = state_section(number)
        self.sections.append((section, to_pieces(state_tensors(state, {s.name: s.value for s in state}))))
        rows = [
            [s.name, s.kind, s.value.dtype.name, list(s.value.shape), s.input, s.output, s.reset is not None]
            for s in state
        ]
        return {"section": section, "variables": rows}

    def program(self, user: str, compiled: CompiledGraph) -> dict[str, Any]:
        """Write a program's plan, code and report; gives its entry in the manifest."""
        program = compiled.program

        def host_text(owner: Program, step: HostStep) -> str:
            self.host_steps[f"{step.label}: {step.reason}"] = None
            return text_of(owner, step)

        plan = artifact_plan.encode(program, lambda array: self.store.add(array, user), host_text)
        code = {key: np.frombuffer(payload, np.uint8) for key, payload in artifact_plan.code_of(program).items()}
        explanation = explain(self.model.name, compiled)
        report = {
            "kernels": [
                [k.label, k.layers, k.members, k.output, to_json(k.flops), to_json(k.bytes), k.host, k.reason]
                for k in explanation.kernels
            ],
            "decisions": [[d.subject, d.outcome, d.reason, sorted(d.layers)] for d in explanation.decisions],
        }
        entry: dict[str, Any] = {"plan": f"plan/{user}", "code": f"code/{user}", "report": f"report/{user}"}
        self.sections += [
            (entry["plan"], [_json(plan)]),
            (entry["code"], to_pieces(code)),
            (entry["report"], [_json(report)]),
        ]
        self.users.append((entry, user))
        return entry

    def record(self, program: dict[str, Any], form: SavedForm, compiled: CompiledGraph) -> dict[str, Any] | None:
        """Write the self-test of a program that this machine runs; gives its entry in the program's."""
        state = [s.value for s in form.state if s.input >= 0]
        found = record(compiled.program, form.inputs, form.outputs.num_leaves, state)
        if found is None:
            return None
        section = program["plan"].replace("plan/", "test/", 1)
        self.sections.append((section, test_pieces(*found)))
        steps = [step for each in programs_of(compiled.program) for step in each.steps]
        exact = not any(isinstance(s, HostStep) and not isinstance(s.function, CONTROL) for s in steps)
        return {"section": section, "exact": exact}

    def graph(self, section: str, form: SavedForm) -> dict[str, Any]:
        """Write the graph before all passes, with its params; gives its entry in the manifest."""
        blobs: dict[str, np.ndarray] = {}
        text = print_graph(form.graph, blobs)
        self.sections.append((section, [text.encode()]))
        entry: dict[str, Any] = {
            "text": section,
            "params": [self.store.add(v, section, name) for v, name in zip(form.values, form.names, strict=True)],
            "constants": {name: [self.store.add(v, section), str(v.dtype), v.shape] for name, v in blobs.items()},
            "donations": [list(pair) for pair in form.donations],
        }
        self.users.append((entry, section))
        return entry


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
