"""Epilogues of contraction kernels: elementwise code applied to sums while they are in registers.

What they are made of is told by `kgraph.codegen.contractions`.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from llvmlite import ir

from kgraph.codegen import contractions
from kgraph.codegen.cpu import expressions
from kgraph.codegen.cpu.builder import I64, PTR, VOID, Int, KernelBuilder, Pointer, compute_dtype
from kgraph.ir import Node

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

    def side_by_side(self, target) -> int:
        """Vectors of sums that the code is written for at once."""
        return 1 if self.expression is None else expressions.side_by_side(self.expression, target)

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

    def apply(self, *sums: tuple) -> None:
        """Stores the outputs. sums: for every output pixel (its number, the sums: one vector per mask)."""
        b = self.b
        places = [place for pixel, values in sums for place in self._places(pixel, values)]
        for group, results in self._results(places):
            for (_, index, mask), values in zip(group, results, strict=True):
                for at, result in zip(self.outputs, values, strict=True):
                    b.store(at, index, result, mask)

    def _places(self, pixel, values: list[ir.Value]) -> list[tuple]:
        """Operands, index and mask of every vector of a pixel."""
        b, lanes = self.b, self.lanes
        base = pixel * self.columns + self.column
        row = [b.load_broadcast(at, pixel, lanes) if kind == "row" else None for kind, at in self.inputs]
        places = []
        for j, (value, mask) in enumerate(zip(values, self.masks, strict=True)):
            index = base + j * lanes
            operands = [from_accumulator(b, value, self.epilogue.accumulate, self.epilogue.result)]
            for (kind, at), shared, broadcast in zip(self.inputs, self.shared, row, strict=True):
                if kind == "full":
                    operands.append(b.load(at, index, lanes, mask))
                else:
                    operands.append(broadcast if kind == "row" else shared[j])
            places.append((operands, index, mask))
        return places

    def _results(self, places: list):
        """Groups of vectors, with the results of each."""
        expression = self.epilogue.expression
        if expression is None:
            return [([place], [place[0]]) for place in places]
        most = self.epilogue.side_by_side(self.b.target) if self.lanes > 1 else 1
        groups = []
        while places:
            size = min(most, 1 << (len(places).bit_length() - 1))
            groups.append(places[:size])
            places = places[size:]
        return [(group, expressions.emit_each(self.b, expression, [g[0] for g in group])) for group in groups]


@contextmanager
def subfunction(b: KernelBuilder, name: str, arguments: list[ir.Type]):
    """Builds an internal function of the kernel's module: within, `b` writes into it. Gives the function."""
    function = ir.Function(b.module, ir.FunctionType(VOID, arguments), name)
    function.linkage = "internal"
    for attribute in ("nounwind", "noinline"):
        function.attributes.add(attribute)
    outer_function, outer_ir = b.function, b.ir
    b.function, b.ir = function, ir.IRBuilder(function.append_basic_block("entry"))
    b.align_stack()
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

            def apply(i, first_column, count: int) -> None:
                pixels = []
                for j in (first_column + k for k in range(count)):
                    first = (i * (self.sums_row or cols) + j) * (vectors * lanes)
                    values = [b.load(sums, first + v * lanes, lanes) for v in range(vectors)]
                    pixels.append((pixel + i * row_pitch + j * col_pitch, values))
                bound.apply(*pixels)

            # Where the code is long, vectors of several pixels are worked on side by side.
            together = max(1, self.epilogue.side_by_side(b.target) // vectors)
            with b.loop(0, rows) as i:
                whole = cols - cols % together
                if together > 1:
                    with b.loop(0, whole, together) as j:
                        apply(i, j, together)
                with b.loop(whole if together > 1 else 0, cols) as j:
                    apply(i, j, 1)
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


class Parts(contractions.Parts):
    """A contraction node taken apart, with the epilogue in the form of these kernels."""

    def epilogue(self, accumulate: str, columns, first_extra: int) -> Epilogue:
        """The epilogue for extras that are operands `first_extra`, ..., followed by the outputs."""
        inputs = tuple((kind, first_extra + i, v.dtype) for i, (kind, v) in enumerate(self.extras))
        first = first_extra + len(inputs)
        outputs = tuple((first + i, v.dtype) for i, v in enumerate(self.outputs))
        return Epilogue(accumulate, self.result.dtype, columns, inputs, outputs, self.expression)


def take_apart(node: Node, primitive: str) -> Parts | str:
    """The parts of a plain `primitive` node or of a fused node around one; a string says why it cannot be done."""
    parts = contractions.take_apart(node, primitive)
    return parts if isinstance(parts, str) else Parts(**vars(parts))
