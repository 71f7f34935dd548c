"""Epilogues of contraction kernels: elementwise code applied to sums while they are in registers.

The first input of the fused expression is the contraction's own result; every further one is classified by its shape
against the result's, see `operand_kind`. Results are addressed by pixel (all leading axes flattened) and column (the
last axis of a convolution; the free axes of a product's second operand, of which there may be any number).
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from llvmlite import ir

from kgraph.codegen.cpu import expressions
from kgraph.codegen.cpu.builder import I64, PTR, VOID, Int, KernelBuilder, Pointer, compute_dtype
from kgraph.ir import Dim, Graph, Node, TensorType, Value

# Operations per vector beyond which an epilogue runs as a loop over stored sums: written out for every accumulator
# it would spill registers and take long to compile.
REGISTER_EPILOGUE = 6


class Epilogue(NamedTuple):
    """What happens to a finished sum.

    accumulate: dtype of the sums. result: dtype of the contraction's result. columns: size of the last axis of the
    result (`int` or ("size", slot)). inputs: (kind, operand number, dtype) of each extra. outputs: (operand number,
    dtype). expression: of `expressions`, or None where the result itself is the only output.
    """

    accumulate: str
    result: str
    columns: int | tuple
    inputs: tuple = ()
    outputs: tuple = ()
    expression: tuple | None = None

    @property
    def in_registers(self) -> bool:
        return self.expression is None or expressions.flops(self.expression) <= REGISTER_EPILOGUE

    def bind(self, b: KernelBuilder, buffers: ir.Value, entry, column, masks: list, lanes: int) -> BoundEpilogue:
        """The epilogue of one tile: operand addresses, and the extras that all its pixels share, loaded once."""

        def pointer(number: int, dtype: str) -> Pointer:
            at = b.ir.gep(buffers, [b.i64(number)], inbounds=True, source_etype=PTR)
            return Pointer(b, b.ir.load(at, typ=PTR), dtype, f"operand{number}")

        inputs = [(kind, pointer(number, dtype)) for kind, number, dtype in self.inputs]
        shared: list = []
        for kind, at in inputs:
            if kind == "channel":
                shared.append([b.load(at, column + j * lanes, lanes, mask) for j, mask in enumerate(masks)])
            elif kind == "scalar":
                shared.append([b.load_broadcast(at, 0, lanes)] * len(masks))
            else:
                shared.append(None)
        outputs = [pointer(number, dtype) for number, dtype in self.outputs]
        return BoundEpilogue(b, self, entry(self.columns), column, masks, lanes, inputs, shared, outputs)


@dataclass
class BoundEpilogue:
    """An epilogue inside the code of one tile."""

    b: KernelBuilder
    epilogue: Epilogue
    columns: object
    column: object
    masks: list
    lanes: int
    inputs: list
    shared: list
    outputs: list[Pointer]

    def apply(self, pixel, values: list[ir.Value]) -> None:
        """Stores the outputs for the sums `values` (one vector per mask) of output pixel number `pixel`."""
        b, lanes = self.b, self.lanes
        base = pixel * self.columns + self.column
        row = [b.load_broadcast(at, pixel, lanes) if kind == "row" else None for kind, at in self.inputs]
        for j, (value, mask) in enumerate(zip(values, self.masks, strict=True)):
            index = base + j * lanes
            value = from_accumulator(b, value, self.epilogue.accumulate, self.epilogue.result)
            results = [value]
            if self.epilogue.expression is not None:
                operands = [value]
                for (kind, at), shared, broadcast in zip(self.inputs, self.shared, row, strict=True):
                    if kind == "full":
                        operands.append(b.load(at, index, lanes, mask))
                    else:
                        operands.append(broadcast if kind == "row" else shared[j])
                results = expressions.emit(b, self.epilogue.expression, operands)
            for at, result in zip(self.outputs, results, strict=True):
                b.store(at, index, result, mask)


@contextmanager
def subfunction(b: KernelBuilder, name: str, arguments: list[ir.Type]):
    """Builds an internal function of the kernel's module: within, `b` writes into it. Gives the function."""
    function = ir.Function(b.module, ir.FunctionType(VOID, arguments), name)
    function.linkage = "internal"
    for attribute in ("nounwind", "noinline"):
        function.attributes.add(attribute)
    outer_function, outer_ir = b.function, b.ir
    b.function, b.ir = function, ir.IRBuilder(function.append_basic_block("entry"))
    yield function
    b.ir.ret_void()
    b.function, b.ir = outer_function, outer_ir


def entry_value(b: KernelBuilder, sizes: ir.Value, entry):
    """An entry of the params inside a subfunction, where the kernel's own reads of `sizes` are not visible."""
    if isinstance(entry, int):
        return entry
    at = b.ir.gep(sizes, [ir.Constant(I64, entry[1])], inbounds=True, source_etype=I64)
    return Int(b, b.ir.load(at, typ=I64))


def vector_masks(b: KernelBuilder, vectors: int, masked: bool, remaining, lanes: int) -> list:
    """One mask per vector of a tile whose output ends `remaining` columns on; None per vector if it is whole."""
    return [b.tail_mask(remaining - j * lanes, lanes) if masked else None for j in range(vectors)]


class Finisher:
    """Functions that run a long epilogue over sums in memory, shared by all tiles of one width.

    dtype, lanes: of the sums. pitches: distance of pixel rows and pixel columns in the output, in pixels (entries).
    sums_row: pixels from one row of sums to the next; None where rows are as long as the call's `extents` say.
    """

    def __init__(
        self,
        b: KernelBuilder,
        epilogue: Epilogue,
        dtype: str,
        lanes: int,
        pitches: tuple,
        prefix: str = "",
        sums_row: int | None = None,
    ):
        self.b, self.epilogue, self.dtype, self.lanes = b, epilogue, dtype, lanes
        self.pitches, self.prefix, self.sums_row = pitches, prefix, sums_row
        self.functions: dict[tuple, ir.Function] = {}

    def call(self, buffers, sizes, sums: Pointer, pixel, column, remaining, extents: tuple, vectors: int, masked: bool):
        """The epilogue of `extents` = (rows, columns) pixels; `sums` holds `vectors` vectors per pixel."""
        key = (vectors, masked)
        if key not in self.functions:
            self.functions[key] = self._build(vectors, masked)
        integers = [self.b.i64(x) for x in (pixel, column, remaining, *extents)]
        self.b.ir.call(self.functions[key], [buffers, sizes, sums.value, *integers])

    def _build(self, vectors: int, masked: bool) -> ir.Function:
        b, lanes = self.b, self.lanes
        name = f"{self.prefix}finish_{vectors}{'_masked' if masked else ''}"
        with subfunction(b, name, [PTR] * 3 + [I64] * 5) as function:
            buffers, sizes, at = function.args[:3]
            sums = Pointer(b, at, self.dtype, "sums")
            pixel, column, remaining, rows, cols = (Int(b, x) for x in function.args[3:])
            masks = vector_masks(b, vectors, masked, remaining, lanes)
            bound = self.epilogue.bind(b, buffers, lambda e: entry_value(b, sizes, e), column, masks, lanes)
            row_pitch, col_pitch = (entry_value(b, sizes, p) for p in self.pitches)
            with b.loop(0, rows) as i, b.loop(0, cols) as j:
                first = (i * (self.sums_row or cols) + j) * (vectors * lanes)
                values = [b.load(sums, first + v * lanes, lanes) for v in range(vectors)]
                bound.apply(pixel + i * row_pitch + j * col_pitch, values)
        return function


def from_accumulator(b: KernelBuilder, value: ir.Value, accumulate: str, result: str) -> ir.Value:
    """Sums in the compute type of the contraction's result dtype."""
    source, wanted = value.type, b.type(compute_dtype(result), getattr(value.type, "count", 1))
    if source == wanted:
        return value
    element, target = (t.element if isinstance(t, ir.VectorType) else t for t in (source, wanted))
    if isinstance(element, ir.IntType) and isinstance(target, ir.IntType):
        return b.ir.trunc(value, wanted) if target.width < element.width else b.ir.sext(value, wanted)
    if isinstance(element, ir.IntType):
        return b.ir.sitofp(value, wanted)
    return b.ir.fptrunc(value, wanted) if accumulate == "float64" else b.ir.fpext(value, wanted)


def operand_kind(shape: tuple, result: tuple, column_axes: int = 1) -> str | None:
    """How an extra of `shape` addresses a result of shape `result`; None where no kind fits.

    "scalar": one element; "channel": one per column; "row": one per pixel; "full": one per element.
    column_axes: how many of the result's last axes together are the column.
    """
    padded = (1,) * (len(result) - len(shape)) + tuple(shape)
    if len(padded) != len(result):
        return None
    ones = [same_size(s, 1) for s in padded]
    equal = [same_size(s, t) for s, t in zip(padded, result)]
    if all(equal):
        return "full"
    if all(ones):
        return "scalar"
    first = len(result) - column_axes
    if all(equal[first:]) and all(ones[:first]):
        return "channel"
    if all(ones[first:]) and all(equal[:first]):
        return "row"
    return None


def column_axes(core: Node) -> int:
    """How many of the last axes of a contraction's result are its columns."""
    if core.name != "dot_general":
        return 1
    return core.inputs[1].type.rank - len(core.attrs["rhs_contract"]) - len(core.attrs["rhs_batch"])


def same_size(x, y) -> bool:
    """Whether two sizes are equal for every value of their symbols, as far as their canonical forms tell."""
    if isinstance(x, Dim) or isinstance(y, Dim):
        return isinstance(x, Dim) and isinstance(y, Dim) and x.terms == y.terms
    return x == y


@dataclass
class Parts:
    """A contraction node taken apart.

    node: the contraction itself (in the body of a fused node, or the node). operands: values that its two operands
    stand for outside. packed: layout of each operand, or None. extras: (kind, value) of further inputs. outputs: values
    written. expression: of the epilogue, or None.
    """

    node: Node
    operands: tuple[Value, ...]
    packed: tuple
    extras: list[tuple[str, Value]]
    outputs: tuple[Value, ...]
    expression: tuple | None

    @property
    def result(self) -> TensorType:
        return self.node.output.type

    def epilogue(self, accumulate: str, columns, first_extra: int) -> Epilogue:
        """The epilogue for extras that are operands `first_extra`, ..., followed by the outputs."""
        inputs = tuple((kind, first_extra + i, v.dtype) for i, (kind, v) in enumerate(self.extras))
        first = first_extra + len(inputs)
        outputs = tuple((first + i, v.dtype) for i, v in enumerate(self.outputs))
        return Epilogue(accumulate, self.result.dtype, columns, inputs, outputs, self.expression)

    def inplace(self, first_extra: int) -> tuple:
        """(output, input) operand positions of outputs that may overwrite an extra: same element, read before."""
        pairs = []
        for o, out in enumerate(self.outputs):
            for i, (kind, value) in enumerate(self.extras):
                if kind == "full" and value.type.itemsize == out.type.itemsize and value not in self.operands:
                    pairs.append((first_extra + len(self.extras) + o, first_extra + i))
        return tuple(pairs)

    @property
    def name(self) -> str:
        """The epilogue's part of a kernel's name, such as `_add_relu`."""
        name = expressions.name(self.expression) if self.expression is not None else ""
        return f"_{name}" if name else ""


def take_apart(node: Node, primitive: str) -> Parts | str:
    """The parts of a plain `primitive` node or of a fused node around one; a string says why it cannot be done."""
    if node.name == primitive:
        return Parts(node, tuple(node.inputs), (None, None), [], node.outputs, None)
    if node.name != "fusion":
        return f"{node.name} is not {primitive}"
    body: Graph = node.attrs["body"]
    cores = [n for n in body.nodes if n.name == primitive]
    if len(cores) != 1:
        return f"a fused {primitive} kernel needs exactly one {primitive}, not {len(cores)}"
    core = cores[0]
    position = {v: i for i, v in enumerate(body.inputs)}
    if any(v not in position for v in core.inputs):
        return f"the operands of {primitive} are computed inside of the fused node"
    layouts = dict(node.attrs.get("packed", ()))
    packed = tuple(layouts.get(position[v]) for v in core.inputs)
    operands = tuple(node.inputs[position[v]] for v in core.inputs)
    rest = [n for n in body.nodes if n is not core]
    if not rest and tuple(body.outputs) == core.outputs:
        return Parts(core, operands, packed, [], node.outputs, None)
    shape, columns = core.output.shape, column_axes(core)
    extras = []
    used = {v for n in rest for v in n.inputs}
    for value in body.inputs:
        if value not in used:
            continue
        if value in core.inputs and packed[core.inputs.index(value)] is not None:
            return "a packed weight is also read by the epilogue"
        kind = operand_kind(value.shape, shape, columns)
        if kind is None:
            return f"an epilogue operand {value.type} neither spans {core.output.type} nor one of its axes' ends"
        extras.append((kind, value))
    if any(operand_kind(v.shape, shape) != "full" for v in body.outputs):
        return "the epilogue changes the shape"
    expression = expressions.encode_nodes(rest, [core.output, *(v for _, v in extras)], body.outputs)
    if isinstance(expression, str):
        return expression
    outer = [(kind, node.inputs[position[v]]) for kind, v in extras]
    return Parts(core, operands, packed, outer, node.outputs, expression)
