"""A captured model as an ONNX file: its graph after the passes that hold for every machine, or as it was captured."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from kgraph.artifact.save import SavedModel
from kgraph.errors import UnsupportedError
from kgraph.ir import Dim, Graph, TensorType
from kgraph.ir.interpreter import evaluate
from kgraph.onnx_export import (  # noqa: F401  (they register rules)
    contractions,
    control_flow,
    elementwise,
    indexing,
    movement,
    recurrent,
    reductions,
)
from kgraph.onnx_export.builder import OPSET, Builder, element_type
from kgraph.passes.fuse import fuse
from kgraph.passes.group_recurrent import group_recurrent
from kgraph.passes.layout import layout
from kgraph.passes.manager import PassContext, run_passes
from kgraph.passes.pipeline import INFERENCE
from kgraph.passes.prologue import split_prologue

LARGEST = 2**31 - 2**20  # bytes of a protocol buffer, with room for what the checker adds
IR_VERSION = 9  # what runtimes of the opset's time read
# What makes kernels of this project's own is left out.
PORTABLE = [pass_ for pass_ in INFERENCE if pass_ not in (fuse, layout, group_recurrent)]


def export_onnx(model: SavedModel, path: str | os.PathLike, *, optimised: bool = True) -> None:
    """Write a model as ONNX (opset 20), and check it with ONNX' own checker.

    Free sizes keep their names (`N` is the batch) as the `dim_param` of inputs and outputs. Weights of more than two
    gigabytes go into a file beside it.

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
    inputs = _distinct(model.inputs.names, "input", set())
    outputs = _distinct(form.outputs.names, "output", set(inputs))
    proto = to_onnx(graph, values, inputs, outputs)
    _write(proto, Path(path))


def _write(proto: onnx.ModelProto, path: Path) -> None:
    """Writes and checks; weights that make a file too large for its format go into one beside it, `<name>.data`."""
    if proto.ByteSize() <= LARGEST:
        onnx.checker.check_model(proto, full_check=True)
        onnx.save(proto, path)
        return
    beside = path.with_name(f"{path.name}.data")
    beside.unlink(missing_ok=True)  # else it would be appended to
    onnx.save(proto, path, save_as_external_data=True, location=beside.name)
    onnx.checker.check_model(os.fspath(path), full_check=True)


def to_onnx(
    graph: Graph, values: Sequence[np.ndarray], inputs: Sequence[str], outputs: Sequence[str]
) -> onnx.ModelProto:
    """The ONNX model of a graph. values: of its params; inputs, outputs: names."""
    b = Builder()
    b.reserve([*inputs, *outputs])
    given = [(name, value.type) for value, name in zip(graph.inputs, inputs, strict=True)]
    b.define_symbols(given)
    for param, array in zip(graph.params, values, strict=True):
        b.names[param] = b.constant(array, param.dtype, _plain(param.name))
    results = b.inline(graph, inputs)
    if b.missing:
        raise UnsupportedError(f"{graph.name}: ONNX export has no form for: " + "; ".join(b.missing))
    for result, name in zip(results, outputs, strict=True):
        b.nodes.append(helper.make_node("Identity", [result], [name], name=f"give_{name}"))
    nodes, read = _needed(b.nodes, outputs)
    proto = helper.make_graph(
        nodes,
        graph.name,
        [_info(name, type_) for name, type_ in given],
        [_info(name, value.type) for name, value in zip(outputs, graph.outputs, strict=True)],
        [tensor for name, tensor in b.initializers.items() if name in read],
    )
    opset = helper.make_opsetid("", OPSET)
    return helper.make_model(proto, opset_imports=[opset], ir_version=IR_VERSION, producer_name="kgraph")


def _needed(nodes: Sequence[onnx.NodeProto], outputs: Sequence[str]) -> tuple[list[onnx.NodeProto], set[str]]:
    """The nodes that outputs depend on, in order, and all names that they read."""
    read, kept = set(outputs), []
    for node in reversed(nodes):
        if not read.isdisjoint(node.output):
            kept.append(node)
            read.update(_reads(node))
    return kept[::-1], read


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """What a node reads, the bodies in it included."""
    yield from node.input
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from _reads(inner)


def _info(name: str, type_: TensorType) -> onnx.ValueInfoProto:
    sizes = [str(s) if isinstance(s, Dim) else s for s in type_.shape]
    return helper.make_tensor_value_info(name, element_type(type_.dtype), sizes)


def _distinct(names: Sequence[str], stem: str, taken: set[str]) -> list[str]:
    """Names for inputs or outputs; numbers, and none at all, get a word in front, and repeated ones a number."""
    found: list[str] = []
    for position, given in enumerate(names):
        plain = name = _plain(given) if given and not given.isdigit() else f"{stem}_{given or position}"
        number = 1
        while name in taken:
            number += 1
            name = f"{plain}_{number}"
        taken.add(name)
        found.append(name)
    return found


def _plain(name: str) -> str:
    return re.sub(r"[^\w/.:-]", "_", name)
