"""Compiles a saved model again, from the graph in its file, for a machine that none of the file's object code fits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kgraph import ops  # noqa: F401  (registers the primitives)
from kgraph.compiler import CompiledGraph, compile_graph
from kgraph.errors import ArtifactError, KGraphError
from kgraph.ir.parser import parse_graph
from kgraph.ir.verifier import verify
from kgraph.report import explain
from kgraph.runtime.artifact import Checking, Clock, LoadedModel, Manifest
from kgraph.runtime.artifact_file import ArtifactFile
from kgraph.runtime.artifact_forms import LoadedForm, make_form, read_state, read_tensors
from kgraph.runtime.artifact_plan import restored
from kgraph.structure import Structure


def rebuild(file: ArtifactFile, manifest: Manifest, clock: Clock) -> LoadedModel:
    """The model in a file, compiled for this machine. clock: started when the file was opened.

    Raises ArtifactError where the file has no graph, or one that is damaged.
    """
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
    constants = {
        name: restored(tensors[tensor], shape, dtype) for name, (tensor, dtype, shape) in entry["constants"].items()
    }
    graph = parse_graph(file.read(entry["text"]).decode(), constants)
    verify(graph, after="loading")
    passes = "training" if manifest.kind == "step" else "inference"
    compiled = compile_graph(graph, passes=passes, donations=[tuple(pair) for pair in entry["donations"]])
    params = zip(entry["params"], graph.params, strict=True)
    compiled.set_params([restored(tensors[name], p.type.shape, p.type.dtype) for name, p in params])
    outputs = Structure.from_json(data["outputs"])
    state = read_state(file, data["state"], len(graph.inputs), len(graph.outputs))
    report, text = _readers(manifest.name, compiled)
    return make_form(manifest.inputs, outputs, compiled.program, data["sizes"], state, report, text)


def _readers(name: str, compiled: CompiledGraph) -> tuple[Callable, Callable]:
    explanation = explain(name, compiled)
    return lambda: (explanation.kernels, explanation.decisions), lambda: str(compiled.optimised)
