"""Recurrent layers over whole sequences: LSTM, GRU and simple cells, one kernel for all steps.

A unit is a block of sequences, which are independent of each other. Weights are packed once per call into panels in
scratch. Time runs in chunks: the input projection of a chunk is one product over all its steps, then come the steps:
the recurrent product on top of the projection, and the gates. Everything a step touches stays in cache.

Several layers over equal shapes, such as both directions of a bidirectional one, run as one kernel (a fused node of
kind "rnn" that holds them, and perhaps the concatenation of their sequences): the layer is the inner part of the
extent, so layers of one sequence run on several threads, and of many sequences each thread has some with all layers.
"""

from __future__ import annotations

from typing import NamedTuple

from llvmlite import ir

from kgraph.codegen.cpu import vector_math
from kgraph.codegen.cpu.block_product import BlockProduct, Panel
from kgraph.codegen.cpu.builder import PTR, Int, KernelBuilder, Pointer, itemsize
from kgraph.codegen.cpu.strided import SizeTable, resolve
from kgraph.codegen.kernel import KernelCall, KernelSpec
from kgraph.codegen.recurrent import SELU_ALPHA, SELU_SCALE, Shape, is_joined, layers_of, shape_of, unsupported
from kgraph.ir import Node
from kgraph.ir.dims import ceil_div

LARGE_WEIGHTS = 1 << 18  # elements of the recurrent weights from which on they come from beyond the L2 cache
BLOCKS_OF_CHUNK = 2  # of sequences, where there are several layers
CHUNK_ELEMENTS = 1 << 15  # of the projected inputs of one chunk of steps


# -- activations ------------------------------------------------------------------------------------------------------
def _clip(b: KernelBuilder, x, low: float, high: float):
    return vector_math.clamp_keep_nan(b, x, low, high)


def _positive(b: KernelBuilder, x):
    return b.select(b.compare("<", x, 0.0), 0.0, x)


def _elu(b: KernelBuilder, x, alpha: float = 1.0):
    negative = b.mul(vector_math.expm1(b, b.select(b.compare("<", x, 0.0), x, 0.0)), alpha)
    return b.select(b.compare("<", x, 0.0), negative, x)


ACTIVATIONS = {
    "linear": lambda b, x: x,
    "tanh": vector_math.tanh,
    "sigmoid": vector_math.logistic,
    "relu": _positive,
    "relu6": lambda b, x: _clip(b, x, 0.0, 6.0),
    "hard_sigmoid": lambda b, x: _clip(b, b.add(b.div(x, 6.0), 0.5), 0.0, 1.0),
    "hard_tanh": lambda b, x: _clip(b, x, -1.0, 1.0),
    "softsign": lambda b, x: b.div(x, b.add(vector_math.absolute(b, x), 1.0)),
    "softplus": vector_math.softplus,
    "elu": _elu,
    "selu": lambda b, x: b.mul(_elu(b, x, SELU_ALPHA), SELU_SCALE),
    "silu": lambda b, x: b.mul(x, vector_math.logistic(b, x)),
    "exponential": vector_math.exp,
}


# -- lowering ---------------------------------------------------------------------------------------------------------
def accepts(node: Node) -> str | None:
    """None where `lower` takes the node, else why not."""
    return unsupported(node)


class Layout(NamedTuple):
    """Blocking, and offsets into the scratch of one thread in elements."""

    lanes: int
    vectors: int
    rows: int
    steps: int
    padded: int
    width: int
    gates: int
    projected: int
    states: int
    scaled: int
    bias: int
    kernel: int
    recurrent: int
    total: int


def layout_of(shape: Shape, target) -> Layout:
    lanes = target.lanes(shape.dtype)
    padded = -(-shape.units // lanes) * lanes
    width = shape.gates * padded
    rows = 16 if shape.units * width > LARGE_WEIGHTS else 8
    steps = max(1, min(16, CHUNK_ELEMENTS // (rows * width)))
    sizes = (
        rows * width,
        rows * steps * width,
        shape.states * rows * padded,
        rows * padded,
        width + padded,
        shape.features * width,
        shape.units * width,
    )
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + -(-size // lanes) * lanes)
    vectors = 4 if target.num_vector_registers >= 32 else 3
    return Layout(lanes, vectors, rows, steps, padded, width, *offsets)


def lower(node: Node, target) -> list[KernelCall]:
    """The one call of a recurrent layer, or of several."""
    layers = layers_of(node)
    shape = shape_of(layers[0][0])
    shape = shape._replace(reverse=tuple(bool(n.attrs["reverse"]) for n, _, _ in layers), joined=is_joined(node))
    batch, steps, features = layers[0][1][0].shape
    layout = layout_of(shape, target)
    table = SizeTable()
    params = (tuple(shape), table(batch), table(steps))
    inputs = [v for _, operands, _ in layers for v in operands]
    outputs = list(dict.fromkeys(v for _, _, results in layers for v in results))
    width = shape.gates * shape.units
    name = "_".join([shape.cell, *(["bidirectional"] if len(set(shape.reverse)) > 1 else [])])
    return [
        KernelCall(
            KernelSpec(name, "rnn:render_rnn", params),
            [*inputs, *outputs],
            outputs=len(outputs),
            sizes=table.values,
            extent=ceil_div(batch, layout.rows) * len(layers),
            flops=batch * steps * (2 * width * (features + shape.units) * len(layers)),
            bytes=sum((v.type.nbytes for v in (*inputs, *outputs)), 0),
            scratch_bytes=layout.total * itemsize(shape.dtype),
            # A chunk packs the weights of all layers.
            notes={"grain": BLOCKS_OF_CHUNK * len(layers)} if len(layers) > 1 else {},
        )
    ]


# -- the kernel -------------------------------------------------------------------------------------------------------
class PanelProduct:
    """Products of rows with weights that lie in scratch as panels [panel][k][vectors].

    count: vectors of columns. a_stride, c_stride, initial_stride: between rows of the left operand, the result and the
    initial sums; start: see `block_product.Panel`.
    """

    def __init__(self, b, dtype, layout: Layout, name, at, count, k, a_stride, c_stride, start, initial_stride=0):
        self.b, self.layout, self.at, self.count, self.k = b, layout, at, count, k
        self.whole, self.rest = divmod(count, layout.vectors)
        self.products = {}
        for vectors in {layout.vectors if self.whole else 0, self.rest} - {0}:
            width = vectors * layout.lanes
            panel = Panel(dtype, layout.lanes, vectors, a_stride, width, c_stride, start, initial_stride)
            self.products[vectors] = BlockProduct(b, f"{name}_{vectors}", panel)

    def column(self, number: int | Int) -> tuple[Pointer, Int]:
        """Where vector `number` of the columns begins, and the elements from one step of k to the next."""
        b, lanes, vectors = self.b, self.layout.lanes, self.layout.vectors
        panel, place = b.int(number) // vectors, b.int(number) % vectors
        last = b.int(panel).equals(self.whole)
        width = Int(b, b.ir.select(last, b.i64(self.rest * lanes), b.i64(vectors * lanes)))
        return self.at + (panel * (self.k * vectors * lanes) + place * lanes), width

    def multiply(self, a: Pointer, c: Pointer, rows, initial: Pointer | None = None, part: range | None = None) -> None:
        """c = initial + a @ weights, for `rows` rows; with `part`, of these columns of a and rows of the weights."""
        b, layout = self.b, self.layout
        width = layout.vectors * layout.lanes
        part = part or range(self.k)
        a = a + part.start
        if self.whole:
            with b.loop(0, self.whole) as p:
                panel, start = self.at + (p * (self.k * width) + part.start * width), initial and initial + p * width
                self.products[layout.vectors].emit(a, panel, c + p * width, rows, len(part), start)
        if self.rest:
            done = self.whole * width
            start = initial and initial + done
            panel = self.at + (done * self.k + part.start * (self.rest * layout.lanes))
            self.products[self.rest].emit(a, panel, c + done, rows, len(part), start)


class GateWeights(PanelProduct):
    """Weights [k, all gates * units] of some of the gates, each gate padded to whole vectors."""

    def __init__(self, kernel: RecurrentKernel, name: str, at: Pointer, k: int, gates: range, a_stride, initial_stride):
        shape, layout = kernel.shape, kernel.layout
        count = len(gates) * layout.padded // layout.lanes
        super().__init__(
            kernel.b, shape.dtype, layout, name, at, count, k, a_stride, layout.width, "initial", initial_stride
        )
        self.shape, self.gates = shape, gates

    def pack(self, source: Pointer) -> None:
        """Copies the weights out of `source`."""
        b, layout, shape = self.b, self.layout, self.shape
        lanes, row = layout.lanes, shape.gates * shape.units

        def copy(gate: int, block, mask) -> None:
            to, width = self.column(block + (gate - self.gates.start) * (layout.padded // lanes))
            at = source + (block * lanes + gate * shape.units)
            with b.loop(0, self.k) as k:
                b.store(to, k * width, b.load(at, k * row, lanes, mask))

        for gate in self.gates:
            full = shape.units // lanes
            with b.loop(0, full) as block:
                copy(gate, block, None)
            if shape.units % lanes:
                copy(gate, b.int(full), b.tail_mask(shape.units % lanes, lanes))


class RecurrentKernel:
    """What is known while the kernel is written."""

    def __init__(self, params, target):
        shape, batch, steps = params
        self.shape = shape = Shape(*shape)
        self.layout = layout = layout_of(shape, target)
        b = self.b = KernelBuilder(shape.cell, target)
        self.batch, self.steps = resolve(b, batch), resolve(b, steps)
        self.activation = ACTIVATIONS[shape.activation]
        self.recurrent_activation = ACTIVATIONS[shape.recurrent_activation]

        def scratch(offset: int, name: str) -> Pointer:
            return Pointer(b, b.scratch(shape.dtype, offset * itemsize(shape.dtype)).value, shape.dtype, name)

        self.gates, self.projected = scratch(layout.gates, "gates"), scratch(layout.projected, "projected")
        block = layout.rows * layout.padded
        self.states = [scratch(layout.states + k * block, f"state{k}") for k in range(shape.states)]
        self.scaled, self.bias = scratch(layout.scaled, "scaled"), scratch(layout.bias, "bias")
        # Gates are long code: see `expressions.side_by_side`. Blocks are not padded for more than one vector.
        pairs = target.vector_bytes <= 32 and shape.units % (2 * layout.lanes) == 0
        self.wide = layout.lanes * (2 if pairs else 1)
        padded, time_stride = layout.padded, layout.steps * layout.width
        self.kernel = GateWeights(
            self, "project", scratch(layout.kernel, "kernel"), shape.features, range(shape.gates), shape.features, 0
        )
        first = range(2 if shape.cell == "gru" else shape.gates)
        recurrent = scratch(layout.recurrent, "recurrent")
        self.recurrent = GateWeights(self, "recur", recurrent, shape.units, first, padded, time_stride)
        self.candidate = None
        if shape.cell == "gru":
            behind = recurrent + 2 * padded * shape.units
            stride = 0 if shape.reset_after else time_stride
            self.candidate = GateWeights(self, "candidate", behind, shape.units, range(2, 3), padded, stride)

    # -- operands of the layer in turn ----------------------------------------------------------------------------
    def select_layer(self, layer) -> None:
        """Makes `inputs` and `outputs` the operands of one layer."""
        b, shape = self.b, self.shape
        count = len(shape.reverse)
        results = 1 + shape.states

        def operand(place, name: str, dtype: str) -> Pointer:
            if isinstance(place, int):
                return b.operand(place, dtype)
            at = b.ir.gep(b.function.args[0], [b.i64(place)], inbounds=True, source_etype=PTR)
            return Pointer(b, b.ir.load(at, typ=PTR), dtype, name)

        def dtype_of(k: int) -> str:
            return "bool" if k == 5 + shape.states else shape.dtype

        self.inputs = [operand(layer * shape.inputs + k, f"input{k}", dtype_of(k)) for k in range(shape.inputs)]
        first = count * shape.inputs
        places = [layer * results + (first + k) for k in range(results)]
        if shape.joined:
            places = [first, *(layer * shape.states + (first + 1 + k) for k in range(shape.states))]
        self.outputs = [operand(place, f"output{k}", shape.dtype) for k, place in enumerate(places)]
        if shape.joined:
            self.outputs[0] = self.outputs[0] + layer * shape.units

    def render(self) -> str:
        b, shape = self.b, self.shape
        count = len(shape.reverse)
        if count == 1:
            with b.if_then(b.begin < b.end):
                self.layer(0, b.begin, b.end)
            return b.ir_text()
        # Unit `block * count + layer`: what a thread writes of some sequences, it reads in the layer after this one.
        with b.loop(0, count) as layer:
            begin, end = (b.ceil_div(unit - layer, count) for unit in (b.begin, b.end))
            with b.if_then(begin < end):
                self.layer(layer, begin, end)
        return b.ir_text()

    def layer(self, layer, begin, end) -> None:
        """Blocks `begin` to `end` of the sequences of one layer."""
        b, shape, layout = self.b, self.shape, self.layout
        self.select_layer(layer)
        backward: ir.Value = ir.Constant(ir.IntType(1), shape.reverse[0])
        for number, reverse in enumerate(shape.reverse[1:], 1):
            flag = ir.Constant(ir.IntType(1), reverse)
            backward = b.ir.select(b.int(layer).equals(number), flag, backward)
        self.pack()
        with b.loop(begin, end) as block:
            first = block * layout.rows
            self.sequences(first, b.min(self.batch - first, layout.rows), backward)

    def pack(self) -> None:
        """Weights and biases of the current layer."""
        b, shape, layout = self.b, self.shape, self.layout
        _, kernel, recurrent, bias, recurrent_bias = self.inputs[:5]
        self.kernel.pack(kernel)
        self.recurrent.pack(recurrent)
        if self.candidate is not None:
            self.candidate.pack(recurrent)
        apart = shape.cell == "gru" and shape.reset_after
        for gate in range(shape.gates):
            for to, at, mask in self.unit_vectors(gate * layout.padded, gate * shape.units):
                value, extra = (b.load(p, at, layout.lanes, mask) for p in (bias, recurrent_bias))
                if apart and gate == 2:
                    b.store(self.bias, to + layout.padded, extra)
                else:
                    value = b.add(value, extra)
                b.store(self.bias, to, value)

    def unit_vectors(self, padded_at: int, at: int):
        """(offset in padded gates, offset in dense gates, mask) of the vectors of one gate."""
        shape, layout = self.shape, self.layout
        for u in range(0, shape.units, layout.lanes):
            valid = min(layout.lanes, shape.units - u)
            yield padded_at + u, at + u, None if valid == layout.lanes else self.b.tail_mask(valid, layout.lanes)

    # -- a block of sequences -------------------------------------------------------------------------------------
    def sequences(self, first, rows, backward) -> None:
        """All steps of the sequences `first` to `first + rows`."""
        count = self.shape.states
        self.copy_states(rows, first, self.inputs[5 : 5 + count], self.states, load=True)
        self.forward(first, rows, backward)
        self.copy_states(rows, first, self.outputs[1:], self.states, load=False)

    def forward(self, first, rows, backward) -> None:
        """The steps in chunks, each behind the input projection of its chunk."""
        b, shape, layout = self.b, self.shape, self.layout
        with b.loop(0, self.steps, layout.steps) as start:
            count = b.min(self.steps - start, layout.steps)
            low = Int(b, b.ir.select(backward, b.i64(self.steps - start - count), b.i64(start)))
            with b.loop(0, rows) as r:
                source = self.inputs[0] + ((first + r) * self.steps + low) * shape.features
                self.kernel.multiply(source, self.projected + r * (layout.steps * layout.width), count, self.bias)
            with b.loop(0, count) as s:
                place = Int(b, b.ir.select(backward, b.i64(count - 1 - s), b.i64(s)))
                self.step(first, rows, low + place, self.projected + place * layout.width)

    def copy_states(self, rows, first, dense: list[Pointer], blocks: list[Pointer], load: bool) -> None:
        """States [B, U] into their padded blocks, or back."""
        b, shape, layout = self.b, self.shape, self.layout
        with b.loop(0, rows) as r:
            for block, outside in zip(blocks, dense, strict=True):
                for to, at, mask in self.unit_vectors(0, 0):
                    here, there = r * layout.padded + to, (first + r) * shape.units + at
                    if load:
                        b.store(block, here, b.load(outside, there, layout.lanes, mask))
                    else:
                        b.store(outside, there, b.load(block, here, layout.lanes), mask)

    def step(self, first, rows, time, projected: Pointer) -> None:
        """One time step of all rows; `projected` is the step's input projection of the first row."""
        layout = self.layout
        hidden, self.time = self.states[0], time
        self.recurrent.multiply(hidden, self.gates, rows, projected)
        if self.shape.cell != "gru":
            rule = self.lstm if self.shape.cell == "lstm" else self.simple
            self.finish(first, rows, time, rule)
            return
        behind = self.gates + 2 * layout.padded
        if self.shape.reset_after:
            self.candidate.multiply(hidden, behind, rows, self.bias + layout.width)
        else:
            self.each_vector(rows, self.scale_by_reset)
            self.candidate.multiply(self.scaled, behind, rows, projected + 2 * layout.padded)
        self.projected_step = projected
        self.finish(first, rows, time, self.gru)

    def each_vector(self, rows, body) -> None:
        """Calls `body(row, first unit, mask)` for all vectors of units of all rows."""
        b = self.b
        with b.loop(0, rows) as r:
            b.vector_loop(0, self.shape.units, self.wide, lambda u, mask, slot: body(r, u, mask))

    def gate(self, row, unit, number: int) -> ir.Value:
        layout = self.layout
        return self.b.load(self.gates, row * layout.width + (unit + number * layout.padded), self.wide)

    def state(self, row, unit, number: int = 0) -> ir.Value:
        return self.b.load(self.states[number], row * self.layout.padded + unit, self.wide)

    def scale_by_reset(self, row, unit, mask) -> None:
        b = self.b
        reset = self.recurrent_activation(b, self.gate(row, unit, 1))
        b.store(self.scaled, row * self.layout.padded + unit, b.mul(reset, self.state(row, unit)))

    # -- the cells: new states of a vector of units ---------------------------------------------------------------
    def simple(self, row, unit) -> list[ir.Value]:
        return [self.activation(self.b, self.gate(row, unit, 0))]

    def lstm(self, row, unit) -> list[ir.Value]:
        b, inner, outer = self.b, self.recurrent_activation, self.activation
        enter, forget, candidate, leave = (self.gate(row, unit, g) for g in range(4))
        kept = b.mul(inner(b, forget), self.state(row, unit, 1))
        cell = b.fma(inner(b, enter), outer(b, candidate), kept)
        return [b.mul(inner(b, leave), outer(b, cell)), cell]

    def gru(self, row, unit) -> list[ir.Value]:
        b, layout = self.b, self.layout
        update = self.recurrent_activation(b, self.gate(row, unit, 0))
        candidate = self.gate(row, unit, 2)
        if self.shape.reset_after:
            reset = self.recurrent_activation(b, self.gate(row, unit, 1))
            at = row * (layout.steps * layout.width) + (unit + 2 * layout.padded)
            candidate = b.fma(reset, candidate, b.load(self.projected_step, at, self.wide))
        candidate = self.activation(b, candidate)
        return [b.fma(update, b.sub(self.state(row, unit), candidate), candidate)]

    def finish(self, first, rows, time, rule) -> None:
        """New states and output of a step, masks applied."""
        b, shape, layout = self.b, self.shape, self.layout

        def body(row, unit, mask) -> None:
            number = (first + row) * self.steps + time
            new = rule(row, unit)
            out = new[0]
            if shape.has_mask:
                valid = b.load(self.inputs[5 + shape.states], number)
                old = [self.state(row, unit, k) for k in range(shape.states)]
                new = [b.ir.select(valid, n, o) for n, o in zip(new, old, strict=True)]
                zero = b.constant(0, shape.dtype, self.wide)
                out = b.ir.select(valid, out, zero) if shape.zero_output_for_mask else new[0]
            self.write(row, unit, mask, number, out)
            for block, value in zip(self.states, new, strict=True):
                b.store(block, row * layout.padded + unit, value)

        self.each_vector(rows, body)

    def write(self, row, unit, mask, number, out: ir.Value) -> None:
        """Output of (sequence, step) `number`; the states are still those before the step."""
        pitch = self.shape.units * (len(self.shape.reverse) if self.shape.joined else 1)
        self.b.store(self.outputs[0], number * pitch + unit, out, mask)


def render_rnn(params, target) -> str:
    """LLVM IR of a recurrent kernel."""
    return RecurrentKernel(params, target).render()
