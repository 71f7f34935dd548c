"""Compiles a saved model again, from the graph in its file, for a machine that none of the file's object code fits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from kgraph import ops  # noqa: F401  (registers the primitives)
from kgraph.compiler import CompiledGraph, compile_graph
from kgraph.errors import ArtifactError, KGraphError
from kgraph.ir.parser import parse_graph
from kgraph.ir.verifier import verify
from kgraph.passes.pipeline import INFERENCE, TRAINING
from kgraph.report import explain
from kgraph.runtime.artifact import (
    Checking,
    Clock,
    LoadedForm,
    LoadedModel,
    Manifest,
    make_form,
    read_state,
    read_tensors,
)
from kgraph.runtime.artifact_file import ArtifactFile
from kgraph.structure import Structure
from kgraph.types import np_dtype


def rebuild(file: ArtifactFile, manifest: Manifest) -> LoadedModel:
    """The model in a file, compiled for this machine.

    Raises ArtifactError where the file has no graph, or one that is damaged.
    """
    clock = Clock()
    try:
        forms = [_form(file, manifest, form) for form in manifest.forms]
        clock.lap("compiling")
        return LoadedModel(manifest, forms, "rebuilt", clock.seconds)
    except KGraphError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{file.path}: its graph is damaged: {error}") from error


def _form(file: ArtifactFile, manifest: Manifest, data: dict[str, Any]) -> LoadedForm:
    entry = data["graph"]
    if entry is None:
        file.fail("it was saved without its graph (rebuildable=False), so it cannot be compiled for this machine")
    checking = Checking(file, entry["weights"])
    checking.finish()
    tensors = read_tensors(file, entry["weights"])
    constants = {name: _constant(tensors, *fields) for name, fields in entry["constants"].items()}
    graph = parse_graph(file.read(entry["text"]).decode(), constants)
    verify(graph, after="loading")
    passes = TRAINING if manifest.kind == "step" else INFERENCE
    compiled = compile_graph(graph, passes=passes, donations=[tuple(pair) for pair in entry["donations"]])
    values = [
        tensors[name].view(p.type.np_dtype).reshape(p.type.shape)
        for name, p in zip(entry["params"], graph.params, strict=True)
    ]
    compiled.set_params(values)
    outputs = Structure.from_json(data["outputs"])
    state = read_state(data["state"], tensors, len(graph.inputs), len(graph.outputs))
    report, text = _readers(manifest.name, compiled)
    return make_form(manifest.inputs, outputs, compiled.program, data["sizes"], state, report, text)


def _constant(tensors: Mapping[str, np.ndarray], name: str, dtype: str, shape: list[int]) -> np.ndarray:
    array = tensors[name].reshape(-1).view(np_dtype(dtype))
    if array.size != math.prod(shape):
        raise ValueError(f"the constant {name!r} has another size")
    return array.reshape(tuple(shape))


def _readers(name: str, compiled: CompiledGraph) -> tuple[Callable, Callable]:
    explanation = explain(name, compiled)
    return lambda: (explanation.kernels, explanation.decisions), lambda: str(compiled.optimised)
