"""A captured model as an ONNX file: its graph after the passes that hold for every machine, or as it was captured."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

import numpy as np
import onnx
from onnx import helper

from kgraph.artifact.save import SavedModel
from kgraph.errors import UnsupportedError
from kgraph.ir import Dim, Graph, TensorType
from kgraph.ir.interpreter import evaluate
from kgraph.onnx_export import contractions, elementwise, movement, reductions  # noqa: F401  (they register rules)
from kgraph.onnx_export.builder import OPSET, RULES, Builder, element_type
from kgraph.passes.fuse import fuse
from kgraph.passes.group_recurrent import group_recurrent
from kgraph.passes.layout import layout
from kgraph.passes.manager import PassContext, run_passes
from kgraph.passes.pipeline import INFERENCE
from kgraph.passes.prologue import split_prologue

IR_VERSION = 9  # what runtimes of the opset's time read
# What makes kernels of this project's own is left out.
PORTABLE = [pass_ for pass_ in INFERENCE if pass_ not in (fuse, layout, group_recurrent)]


def export_onnx(model: SavedModel, path: str | os.PathLike, *, optimised: bool = True) -> None:
    """Write a model as ONNX (opset 20), and check it with ONNX' own checker.

    optimised: batch normalisation folded, constants computed, transposes moved; False writes what was captured.
    Raises UnsupportedError naming every operation that ONNX has no form for, and its layers.
    """
    if len(model.forms) != 1 or model.forms[0].state:
        raise UnsupportedError(f"{model.name}: only models of one form and without state can be written as ONNX")
    (form,) = model.forms
    graph, values = form.graph, form.values
    if optimised:
        split = split_prologue(run_passes(graph, PORTABLE, PassContext()))
        values = evaluate(split.prologue, [], values)
        graph = split.main
    names = [_plain(name) or f"output_{i}" for i, name in enumerate(form.outputs.names)]
    proto = to_onnx(graph, values, [_plain(n) or f"input_{i}" for i, n in enumerate(model.inputs.names)], names)
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, os.fspath(path))


def to_onnx(
    graph: Graph, values: Sequence[np.ndarray], inputs: Sequence[str], outputs: Sequence[str]
) -> onnx.ModelProto:
    """The ONNX model of a graph. values: of its params; inputs, outputs: names."""
    b = Builder()
    given = []
    for value, name in zip(graph.inputs, inputs, strict=True):
        b.names[value] = name
        given.append((name, value.type))
    b.define_symbols(given)
    for param, array in zip(graph.params, values, strict=True):
        b.names[param] = b.constant(array, param.dtype, _plain(param.name))
    missing: dict[str, None] = {}
    for node in graph.nodes:
        if node.name == "constant":
            b.names[node.output] = b.constant(node.attrs["value"], node.output.dtype)
            continue
        where = f" ({', '.join(sorted(node.provenance))})" if node.provenance else ""
        if node.name not in RULES:
            missing.setdefault(f"{node.name}{where}")
            for out in node.outputs:
                b.names[out] = ""
            continue
        try:
            results = RULES[node.name](b, node, [b.names[v] for v in node.inputs])
        except UnsupportedError as error:
            missing.setdefault(f"{error}{where}")
            results = [""] * len(node.outputs)
        results = [results] if isinstance(results, str) else results
        b.names.update(zip(node.outputs, results, strict=True))
    if missing:
        raise UnsupportedError(f"{graph.name}: ONNX export has no form for: " + "; ".join(missing))
    for value, name in zip(graph.outputs, outputs, strict=True):
        b.nodes.append(helper.make_node("Identity", [b.names[value]], [name], name=f"give_{name}"))
    proto = helper.make_graph(
        b.nodes,
        graph.name,
        [_info(name, type_) for name, type_ in given],
        [_info(name, value.type) for name, value in zip(outputs, graph.outputs, strict=True)],
        list(b.initializers.values()),
    )
    opset = helper.make_opsetid("", OPSET)
    return helper.make_model(proto, opset_imports=[opset], ir_version=IR_VERSION, producer_name="kgraph")


def _info(name: str, type_: TensorType) -> onnx.ValueInfoProto:
    sizes = [str(s) if isinstance(s, Dim) else s for s in type_.shape]
    return helper.make_tensor_value_info(name, element_type(type_.dtype), sizes)


def _plain(name: str) -> str:
    return re.sub(r"[^\w/.:-]", "_", name)
