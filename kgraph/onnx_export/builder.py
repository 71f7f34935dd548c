"""An ONNX graph under construction: names, constants, and sizes that are known when it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from kgraph.errors import UnsupportedError
from kgraph.ir import Dim, Graph, Node, TensorType, Value
from kgraph.ir.types import np_dtype
from kgraph.onnx_export.absent import ABSENT

OPSET = 20
_NAMES = {
    "bool": "BOOL", "int8": "INT8", "int16": "INT16", "int32": "INT32", "int64": "INT64", "uint8": "UINT8",
    "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64", "float16": "FLOAT16", "bfloat16": "BFLOAT16",
    "float32": "FLOAT", "float64": "DOUBLE",
}  # fmt: skip

# `rule(builder, node, inputs)` emits the nodes of one primitive and gives the names of its results.
Rule = Callable[["Builder", Node, list[str]], Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule for primitives."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def element_type(dtype: str) -> int:
    """ONNX' number of a dtype. Raises UnsupportedError where it has none that we write."""
    if dtype not in _NAMES:
        raise UnsupportedError(f"ONNX has no type for {dtype}")
    return getattr(TensorProto, _NAMES[dtype])


class Body:
    """A graph inside of an operator."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []

    def takes(self, *values: tuple[str, str, int]) -> None:
        """Declares inputs: name, dtype, rank."""
        self.inputs += [helper.make_tensor_value_info(n, element_type(d), [None] * r) for n, d, r in values]

    def gives(self, *values: tuple[str, str, int]) -> None:
        """Declares outputs: name, dtype, rank."""
        self.outputs += [helper.make_tensor_value_info(n, element_type(d), [None] * r) for n, d, r in values]


class Builder:
    """Nodes and initializers in the making."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self.names: dict[Value, str] = {}
        self.arrays: dict[str, np.ndarray] = {}  # of names that stand for constants
        self.uses: dict[Value, list[Node]] = {}  # of the values of the graph at hand
        self.missing: dict[str, None] = {}  # what has no form, in order
        self._known: dict[tuple, str] = {}
        self._symbols: dict[str, str] = {}
        self._sizes: dict[Dim, str] = {}
        self._counter = 0
        self._taken: set[str] = set()

    def fresh(self, stem: str) -> str:
        """A name that nothing else has."""
        while True:
            self._counter += 1
            name = f"{stem}_{self._counter}"
            if name not in self._taken:
                self._taken.add(name)
                return name

    def reserve(self, names: Sequence[str]) -> None:
        """Keeps names, those of inputs and outputs, from being used inside."""
        self._taken.update(names)

    def emit(self, op: str, *inputs: str, outputs: int = 1, **attributes) -> Any:
        """A node; gives the name of its result, or the names of several. An input "" is left out."""
        results = [self.fresh(op.lower()) for _ in range(outputs)]
        attributes = {k: v for k, v in attributes.items() if v is not None}
        self.nodes.append(helper.make_node(op, inputs, results, name=results[0], **attributes))
        return results[0] if outputs == 1 else results

    # -- graphs -----------------------------------------------------------------------------------------------------
    def inline(self, graph: Graph, inputs: Sequence[str]) -> list[str]:
        """Emits the nodes of a graph without params; gives the names of its outputs. What has no form is noted."""
        self.names.update(zip(graph.inputs, inputs, strict=True))
        outer, self.uses = self.uses, graph.uses()
        for node in graph.nodes:
            if node.name == "constant":
                self.names[node.output] = self.constant(node.attrs["value"], node.output.dtype)
                continue
            where = f" ({', '.join(sorted(node.provenance))})" if node.provenance else ""
            results: Sequence[str] | str = [""] * len(node.outputs)
            if node.name not in RULES:
                self.missing.setdefault(f"{node.name}: {ABSENT[node.name]}{where}")
            else:
                try:
                    results = RULES[node.name](self, node, [self.names[v] for v in node.inputs])
                except UnsupportedError as error:
                    self.missing.setdefault(f"{error}{where}")
            self.names.update(zip(node.outputs, [results] if isinstance(results, str) else results, strict=True))
        self.uses = outer
        return [self.names[value] for value in graph.outputs]

    # -- constants ------------------------------------------------------------------------------------------------
    def constant(self, value, dtype: str | None = None, name: str = "") -> str:
        """The name of a constant; equal ones are stored once."""
        array = np.array(value, dtype=None if dtype is None else np_dtype(dtype), order="C")
        key = (array.dtype.name, array.shape, array.tobytes())
        if key not in self._known:
            if not name or name in self._taken:
                name = self.fresh(name or "constant")
            self._taken.add(name)
            self._known[key] = name
            element_type(array.dtype.name)
            if array.dtype.name == "bfloat16":
                tensor = helper.make_tensor(name, TensorProto.BFLOAT16, array.shape, array.tobytes(), raw=True)
            else:
                tensor = numpy_helper.from_array(array, name)
            self.initializers[name] = tensor
            self.arrays[name] = array
        return self._known[key]

    def like(self, value: float, dtype: str) -> str:
        """A scalar constant."""
        return self.constant(value, dtype)

    # -- sizes ----------------------------------------------------------------------------------------------------
    def define_symbols(self, inputs: Sequence[tuple[str, TensorType]]) -> None:
        """Finds every symbol of the inputs' shapes in an axis that is the symbol itself, or a multiple of it."""
        for name, type_ in inputs:
            for axis, size in enumerate(type_.shape):
                if not isinstance(size, Dim) or len(size.symbols()) != 1:
                    continue
                (symbol,) = size.symbols()
                if symbol in self._symbols or size != Dim.symbol(symbol):
                    continue
                shape = self.emit("Shape", name)
                self._symbols[symbol] = self.emit("Gather", shape, self.constant([axis], "int64"), axis=0)

    def size(self, size: int | Dim) -> str:
        """The name of an int64 tensor [1] that holds a size."""
        if not isinstance(size, Dim):
            return self.constant([int(size)], "int64")
        if size not in self._sizes:
            total = ""
            for monomial, coefficient in size.terms:
                part = self.constant([coefficient], "int64")
                for atom in monomial:
                    part = self.emit("Mul", part, self._atom(atom))
                total = self.emit("Add", total, part) if total else part
            self._sizes[size] = total
        return self._sizes[size]

    def _atom(self, atom) -> str:
        if isinstance(atom, str):
            if atom not in self._symbols:
                raise UnsupportedError(f"the size {atom} is no axis of an input by itself")
            return self._symbols[atom]
        _, numerator, divisor = atom
        # Sizes are not negative, so that ONNX' rounding towards zero is the floor.
        return self.emit("Div", self.size(numerator), self.constant([divisor], "int64"))

    def sizes(self, sizes: Sequence[int | Dim]) -> str:
        """The name of an int64 tensor of sizes."""
        if not any(isinstance(s, Dim) for s in sizes):
            return self.constant(np.array([int(s) for s in sizes], np.int64))
        return self.emit("Concat", *[self.size(s) for s in sizes], axis=0)

    # -- steps of a loop --------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def body(self) -> Iterator[Body]:
        """What is emitted meanwhile becomes the body of an operator; it may use names from around it."""
        outer, sizes = self.nodes, dict(self._sizes)
        body = Body()
        self.nodes = body.nodes
        try:
            yield body
        finally:
            self.nodes, self._sizes = outer, sizes

    def proto(self, body: Body) -> onnx.GraphProto:
        """The body as an attribute's value."""
        return helper.make_graph(body.nodes, self.fresh("body"), body.inputs, body.outputs)

    def scan(self, body: Body, states: Sequence[str], sequences: Sequence[str], axis: int, backward: Sequence[int]):
        """The last states, and what the steps give, one behind the other along `axis`. backward: per sequence."""
        count = len(body.outputs) - len(states)
        return self.emit(
            "Scan",
            *states,
            *sequences,
            outputs=len(body.outputs),
            body=self.proto(body),
            num_scan_inputs=len(sequences),
            scan_input_axes=[axis] * len(sequences),
            scan_input_directions=list(backward),
            scan_output_axes=[axis] * count,
            scan_output_directions=[backward[0]] * count,
        )

    # -- common steps ---------------------------------------------------------------------------------------------
    def reshape(self, x: str, shape: Sequence[int | Dim]) -> str:
        """`x` in another shape."""
        return self.emit("Reshape", x, self.sizes(shape), allowzero=1)

    def transpose(self, x: str, permutation: Sequence[int]) -> str:
        """`x` with permuted axes; a constant is permuted now."""
        if list(permutation) == sorted(permutation):
            return x
        if x in self.arrays:
            return self.constant(np.transpose(self.arrays[x], permutation))
        return self.emit("Transpose", x, perm=[int(p) for p in permutation])

    def cast(self, x: str, dtype: str) -> str:
        """`x` in another dtype."""
        return self.emit("Cast", x, to=element_type(dtype))

    def reduce(self, op: str, x: str, axes: Sequence[int], keepdims: bool) -> str:
        """A reduction; over no axes it is the identity."""
        if not axes:
            return x
        return self.emit(op, x, self.constant(np.array(axes, np.int64)), keepdims=int(keepdims))
