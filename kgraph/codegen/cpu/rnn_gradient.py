"""Back-propagation through time for recurrent layers.

One kernel runs the steps of a block of sequences again, keeping the gates in scratch, and then goes back through them.
It leaves the cotangents of the gates and the states before each step; the cotangents of x, of the weights and of the
biases are ordinary products and sums of those over all sequences and steps.

Derivatives of the activations are taken at their results, where these tell them; else the argument is kept.
"""

from __future__ import annotations

from llvmlite import ir

from kgraph.codegen.cpu import data_movement, gemm, reduce, rnn, vector_math
from kgraph.codegen.cpu.builder import Int, KernelBuilder, Pointer, itemsize
from kgraph.codegen.cpu.rnn import PanelProduct, RecurrentKernel
from kgraph.codegen.cpu.strided import SizeTable
from kgraph.codegen.kernel import KernelCall, KernelSpec
from kgraph.codegen.recurrent import SELU_ALPHA, SELU_SCALE, gradient_products, gradient_values, shape_of
from kgraph.ir import Dim, Node
from kgraph.ir.dims import ceil_div


def _between(b: KernelBuilder, y, low: float, high: float):
    inside = b.ir.and_(b.compare(">", y, low), b.compare("<", y, high))
    return b.select(inside, b.constant_of(y.type, 1.0), 0.0)


def _square(b: KernelBuilder, x):
    return b.mul(x, x)


# f'(x) in terms of y = f(x).
DERIVATIVES = {
    "linear": lambda b, y: b.constant_of(y.type, 1.0),
    "tanh": lambda b, y: b.fma(b.ir.fneg(y), y, 1.0),
    "sigmoid": lambda b, y: b.mul(y, b.sub(1.0, y)),
    "relu": lambda b, y: b.select(b.compare(">", y, 0.0), b.constant_of(y.type, 1.0), 0.0),
    "relu6": lambda b, y: _between(b, y, 0.0, 6.0),
    "hard_sigmoid": lambda b, y: b.mul(_between(b, y, 0.0, 1.0), 1.0 / 6.0),
    "hard_tanh": lambda b, y: _between(b, y, -1.0, 1.0),
    "softsign": lambda b, y: _square(b, b.sub(1.0, vector_math.absolute(b, y))),
    "softplus": lambda b, y: b.ir.fneg(vector_math.expm1(b, b.ir.fneg(y))),
    "elu": lambda b, y: b.select(b.compare(">", y, 0.0), 1.0, b.add(y, 1.0)),
    "selu": lambda b, y: b.select(b.compare(">", y, 0.0), SELU_SCALE, b.add(y, SELU_SCALE * SELU_ALPHA)),
    "exponential": lambda b, y: y,
}


def _silu_derivative(b: KernelBuilder, x):
    gate = vector_math.logistic(b, x)
    return b.mul(gate, b.fma(x, b.sub(1.0, gate), 1.0))


# f'(x) in terms of x, where f is not monotonous.
DERIVATIVES_AT_ARGUMENT = {"silu": _silu_derivative}


class Activation:
    """An activation of the forward steps and what the way back knows of it: its result, or its argument."""

    def __init__(self, b: KernelBuilder, name: str):
        self.b, self.rule = b, rnn.ACTIVATIONS[name]
        self.keeps_argument = name in DERIVATIVES_AT_ARGUMENT
        self._derivative = (DERIVATIVES_AT_ARGUMENT if self.keeps_argument else DERIVATIVES)[name]

    def __call__(self, x: ir.Value) -> tuple[ir.Value, ir.Value]:
        """(f(x), what is kept of it)"""
        y = self.rule(self.b, x)
        return y, x if self.keeps_argument else y

    def result(self, kept: ir.Value) -> ir.Value:
        """f(x)"""
        return self.rule(self.b, kept) if self.keeps_argument else kept

    def derivative(self, kept: ir.Value) -> ir.Value:
        """f'(x)"""
        return self._derivative(self.b, kept)


# What is kept of a step, per unit: the gates' results and what else the way back reads.
KEPT = {"lstm": 6, "gru": 5, "simple": 1}


def accepts(node: Node) -> str | None:
    """None where `lower` takes the node, else why not."""
    if node.name != "rnn_gradient":
        return f"{node.name} is not the gradient of one recurrent layer"
    attrs, x, recurrent_kernel = node.attrs, node.inputs[0], node.inputs[2]
    if x.dtype not in ("float32", "float64"):
        return f"no recurrent kernel for {x.dtype}"
    if isinstance(x.shape[2], Dim) or isinstance(recurrent_kernel.shape[0], Dim):
        return "symbolic features or units"
    missing = {attrs["activation"], attrs["recurrent_activation"]} - DERIVATIVES.keys() - DERIVATIVES_AT_ARGUMENT.keys()
    if missing:
        return f"no derivative of {sorted(missing)[0]}"
    return None


def lower(node: Node, target) -> list[KernelCall]:
    """The recurrent kernel, then products and sums over all sequences and steps."""
    shape = shape_of(node)
    batch, steps, features = node.inputs[0].shape
    to_states = node.outputs[5:]
    width = shape.gates * shape.units
    values = gradient_values(node.inputs[0], shape)
    table = SizeTable()
    layout = rnn.layout_of(shape, target)
    outputs = [*dict.fromkeys(values), *to_states]
    kept = steps * (layout.rows * layout.padded * KEPT[shape.cell])
    transposed = shape.gates * layout.padded * layout.padded
    block = layout.rows * layout.padded
    calls = [
        KernelCall(
            KernelSpec(
                f"{shape.cell}_gradient", "rnn_gradient:render_gradient", (tuple(shape), table(batch), table(steps))
            ),
            [*node.inputs, *outputs],
            outputs=len(outputs),
            sizes=table.values,
            extent=ceil_div(batch, layout.rows),
            flops=batch * steps * (2 * width * (features + 2 * shape.units)),
            bytes=sum((v.type.nbytes for v in (*node.inputs, *outputs)), 0),
            scratch_bytes=(kept + layout.total + transposed + (1 + shape.states) * block) * itemsize(shape.dtype),
        )
    ]
    families = {"dot_general": gemm, "reduce_sum": reduce}
    calls += gradient_products(
        node.inputs,
        node.outputs,
        values,
        lambda n: families[n.name].lower(n, target),
        lambda x, out: data_movement.lower_view("copy", x, out, 0, [(width, 1)], target),
    )
    return calls


class TransposedWeights(PanelProduct):
    """The recurrent weights for products from the right side: [gates * units, units], both padded."""

    def __init__(self, kernel: RecurrentKernel, at: Pointer):
        layout = kernel.layout
        super().__init__(
            kernel.b,
            kernel.shape.dtype,
            layout,
            "back",
            at,
            layout.padded // layout.lanes,
            layout.width,
            layout.width,
            layout.padded,
            "zero",
        )
        self.shape = kernel.shape

    def pack(self, source: Pointer) -> None:
        """Copies the weights out of `source` [units, gates * units]; what pads them is zero."""
        b, layout, shape = self.b, self.layout, self.shape
        zero = b.constant(0, shape.dtype, layout.lanes)
        with b.loop(0, layout.width * layout.padded, layout.lanes) as i:
            b.store(self.at, i, zero)
        with b.loop(0, shape.units) as n:
            column, width = self.column(n // layout.lanes)
            lane = n % layout.lanes
            for gate in range(shape.gates):
                with b.loop(0, shape.units) as u:
                    value = b.load(source, n * (shape.gates * shape.units) + (u + gate * shape.units))
                    b.store(column, (u + gate * layout.padded) * width + lane, value)


class GradientKernel(RecurrentKernel):
    """The forward steps of `RecurrentKernel`, their gates kept, and the steps back."""

    def __init__(self, params, target):
        super().__init__(params, target)
        shape, layout, b = self.shape, self.layout, self.b
        self.inner, self.outer = Activation(b, shape.recurrent_activation), Activation(b, shape.activation)
        self.resets_before = shape.resets_before
        block = layout.rows * layout.padded
        at = layout.total

        def scratch(elements: int, name: str) -> Pointer:
            nonlocal at
            here = b.scratch(shape.dtype, at * itemsize(shape.dtype))
            at += elements
            return Pointer(b, here.value, shape.dtype, name)

        self.back = TransposedWeights(self, scratch(shape.gates * layout.padded * layout.padded, "back"))
        self.to_states = [scratch(block, f"to_state{k}") for k in range(shape.states)]
        self.to_hidden = scratch(block, "to_hidden")
        self.kept = scratch(0, "kept")

    def select_layer(self, layer) -> None:
        shape, b = self.shape, self.b
        dtypes = [shape.dtype] * (5 + shape.states) + ["bool"] * shape.has_mask
        self.inputs = [b.operand(k, dtype) for k, dtype in enumerate(dtypes)]
        number = len(dtypes)
        self.cotangents = [b.operand(number + k, shape.dtype) for k in range(1 + shape.states)]
        number += len(self.cotangents)
        count = 3 if shape.cell == "gru" else 2
        self.gate_cotangents = [b.operand(number + k, shape.dtype) for k in range(count - 1)]
        self.before = b.operand(number + count - 1, shape.dtype)
        self.outputs = [b.operand(number + count + k, shape.dtype) for k in range(shape.states)]

    def pack(self) -> None:
        super().pack()
        self.back.pack(self.inputs[2])

    # -- forward, keeping the gates -------------------------------------------------------------------------------
    def sequences(self, first, rows, backward) -> None:
        """Forward through a block of sequences, then back."""
        b, shape = self.b, self.shape
        self.copy_states(rows, first, self.inputs[5 : 5 + shape.states], self.states, load=True)
        self.forward(first, rows, backward)
        self.copy_states(rows, first, self.cotangents[1:], self.to_states, load=True)
        with b.loop(0, self.steps) as s:
            time = Int(b, b.ir.select(backward, b.i64(s), b.i64(self.steps - 1 - s)))
            self.step_back(first, rows, time)
        self.copy_states(rows, first, self.outputs, self.to_states, load=False)

    def place(self, row, unit, number: int):
        """Where result `number` of a step is kept."""
        layout, count = self.layout, KEPT[self.shape.cell]
        return (self.time * layout.rows + row) * (count * layout.padded) + (unit + number * layout.padded)

    def keep(self, row, unit, *values: ir.Value) -> None:
        for number, value in enumerate(values):
            self.b.store(self.kept, self.place(row, unit, number), value)

    def recall(self, row, unit) -> list[ir.Value]:
        count, lanes = KEPT[self.shape.cell], self.wide
        return [self.b.load(self.kept, self.place(row, unit, number), lanes) for number in range(count)]

    def write(self, row, unit, mask, number, out: ir.Value) -> None:
        b, units = self.b, self.shape.units
        if not self.resets_before:
            b.store(self.before, number * units + unit, self.state(row, unit), mask)
            return
        scaled = b.load(self.kept, self.place(row, unit, 3), self.wide)
        b.store(self.before, number * (2 * units) + unit, self.state(row, unit), mask)
        b.store(self.before, number * (2 * units) + units + unit, scaled, mask)

    def simple(self, row, unit) -> list[ir.Value]:
        new, kept = self.outer(self.gate(row, unit, 0))
        self.keep(row, unit, kept)
        return [new]

    def lstm(self, row, unit) -> list[ir.Value]:
        b, inner, outer = self.b, self.inner, self.outer
        gates = [rule(self.gate(row, unit, g)) for g, rule in enumerate((inner, inner, outer, inner))]
        (enter, forget, candidate, leave), kept = zip(*gates)
        old = self.state(row, unit, 1)
        cell = b.fma(enter, candidate, b.mul(forget, old))
        squashed, kept_cell = outer(cell)
        self.keep(row, unit, *kept, old, kept_cell)
        return [b.mul(leave, squashed), cell]

    def gru(self, row, unit) -> list[ir.Value]:
        b, layout = self.b, self.layout
        (update, kept_update), (reset, kept_reset) = (self.inner(self.gate(row, unit, g)) for g in range(2))
        recurrent, old = self.gate(row, unit, 2), self.state(row, unit)
        if self.resets_before:
            candidate, kept_candidate = self.outer(recurrent)
            self.keep(row, unit, kept_update, kept_reset, kept_candidate, b.mul(reset, old), old)
            return [b.fma(update, b.sub(old, candidate), candidate)]
        at = row * (layout.steps * layout.width) + (unit + 2 * layout.padded)
        projected = b.load(self.projected_step, at, self.wide)
        candidate, kept_candidate = self.outer(b.fma(reset, recurrent, projected))
        self.keep(row, unit, kept_update, kept_reset, kept_candidate, recurrent, old)
        return [b.fma(update, b.sub(old, candidate), candidate)]

    # -- back -----------------------------------------------------------------------------------------------------
    def step_back(self, first, rows, time) -> None:
        """From the cotangents of the states behind a step to those before it."""
        b, shape, layout = self.b, self.shape, self.layout
        self.time = time
        if self.resets_before:
            self.step_back_with_reset_before(first, rows)
            return
        rule = {"lstm": self.lstm_back, "gru": self.gru_back, "simple": self.simple_back}[shape.cell]

        def body(row, unit, mask) -> None:
            number = (first + row) * self.steps + time
            zero = b.constant(0, shape.dtype, self.wide)
            to_out = b.load(self.cotangents[0], number * shape.units + unit, self.wide, mask)
            at = row * layout.padded + unit
            behind = [b.load(block, at, self.wide) for block in self.to_states]
            gates, passed = rule(row, unit, [b.add(behind[0], to_out), *behind[1:]])
            if shape.has_mask:
                # A masked step passes the states' cotangents on, and its output was the state before it (or zeros).
                valid = b.load(self.inputs[5 + shape.states], number)
                gates = [[b.ir.select(valid, g, zero) for g in group] for group in gates]
                kept = behind if shape.zero_output_for_mask else [b.add(behind[0], to_out), *behind[1:]]
                passed = [b.ir.select(valid, p, k) for p, k in zip(passed, kept, strict=True)]
            for block, value in zip(self.to_states, passed, strict=True):
                b.store(block, at, value)
            for to, group in zip(self.gate_cotangents, gates, strict=True):
                for g, value in enumerate(group):
                    b.store(to, number * (shape.gates * shape.units) + (unit + g * shape.units), value, mask)
            for g, value in enumerate(gates[-1]):
                b.store(self.gates, row * layout.width + (unit + g * layout.padded), value)

        self.each_vector(rows, body)
        self.back.multiply(self.gates, self.to_hidden, rows)

        def add(row, unit, mask) -> None:
            at = row * layout.padded + unit
            hidden, more = (b.load(block, at, self.wide) for block in (self.to_states[0], self.to_hidden))
            b.store(self.to_states[0], at, b.add(hidden, more))

        self.each_vector(rows, add)

    def step_back_with_reset_before(self, first, rows) -> None:
        """The same for a GRU whose candidate reads reset * state: its cotangent takes a product of its own."""
        b, shape, layout = self.b, self.shape, self.layout
        padded, units, inner, outer = layout.padded, shape.units, self.inner, self.outer
        zero = b.constant(0, shape.dtype, self.wide)

        def place(row, unit, gate: int):
            return row * layout.width + (unit + gate * padded)

        def enter(row, unit, mask) -> None:
            number = (first + row) * self.steps + self.time
            kept_update, _, kept_candidate, _, old = self.recall(row, unit)
            update, candidate = inner.result(kept_update), outer.result(kept_candidate)
            to_out = b.load(self.cotangents[0], number * units + unit, self.wide, mask)
            at = row * padded + unit
            behind = b.load(self.to_states[0], at, self.wide)
            to_new = b.add(behind, to_out)
            to_update = b.mul(b.mul(to_new, b.sub(old, candidate)), inner.derivative(kept_update))
            to_candidate = b.mul(b.mul(to_new, b.sub(1.0, update)), outer.derivative(kept_candidate))
            passed = b.mul(to_new, update)
            if shape.has_mask:
                valid = b.load(self.inputs[5 + shape.states], number)
                to_update, to_candidate = (b.ir.select(valid, g, zero) for g in (to_update, to_candidate))
                passed = b.ir.select(valid, passed, behind if shape.zero_output_for_mask else to_new)
            b.store(self.gates, place(row, unit, 0), to_update)
            b.store(self.gates, place(row, unit, 2), to_candidate)
            b.store(self.to_states[0], at, passed)

        def reset(row, unit, mask) -> None:
            number = (first + row) * self.steps + self.time
            _, kept_gate, _, _, old = self.recall(row, unit)
            gate = inner.result(kept_gate)
            at = row * padded + unit
            to_scaled = b.load(self.to_hidden, at, self.wide)
            to_reset = b.mul(b.mul(to_scaled, old), inner.derivative(kept_gate))
            b.store(self.gates, place(row, unit, 1), to_reset)
            b.store(self.to_states[0], at, b.fma(to_scaled, gate, b.load(self.to_states[0], at, self.wide)))
            to_update, to_candidate = (b.load(self.gates, place(row, unit, g), self.wide) for g in (0, 2))
            for g, value in enumerate((to_update, to_reset, to_candidate)):
                b.store(self.gate_cotangents[0], number * (3 * units) + (unit + g * units), value, mask)
            rest = [to_update, to_reset, zero, zero, zero, to_candidate]  # of the state, then of the scaled state
            for g, value in enumerate(rest):
                b.store(self.gate_cotangents[1], number * (6 * units) + (unit + g * units), value, mask)

        def leave(row, unit, mask) -> None:
            at = row * padded + unit
            hidden, more = (b.load(block, at, self.wide) for block in (self.to_states[0], self.to_hidden))
            b.store(self.to_states[0], at, b.add(hidden, more))

        self.each_vector(rows, enter)
        self.back.multiply(self.gates, self.to_hidden, rows, part=range(2 * padded, 3 * padded))
        self.each_vector(rows, reset)
        self.back.multiply(self.gates, self.to_hidden, rows, part=range(2 * padded))
        self.each_vector(rows, leave)

    # Each gives the cotangents of the gates before their activations (for the projection and, last, for the recurrent
    # product), and the states' cotangents that do not pass through the recurrent product.
    def simple_back(self, row, unit, to_new: list):
        b = self.b
        (kept,) = self.recall(row, unit)
        return [[b.mul(to_new[0], self.outer.derivative(kept))]], [b.constant_of(kept.type, 0.0)]

    def lstm_back(self, row, unit, to_new: list):
        b, inner, outer = self.b, self.inner, self.outer
        *kept, old, kept_cell = self.recall(row, unit)
        rules = (inner, inner, outer, inner)
        enter, forget, candidate, leave = (rule.result(k) for rule, k in zip(rules, kept, strict=True))
        slopes = [rule.derivative(k) for rule, k in zip(rules, kept, strict=True)]
        to_out, to_cell = to_new
        to_cell = b.fma(b.mul(to_out, leave), outer.derivative(kept_cell), to_cell)
        gates = [
            b.mul(b.mul(to_cell, candidate), slopes[0]),
            b.mul(b.mul(to_cell, old), slopes[1]),
            b.mul(b.mul(to_cell, enter), slopes[2]),
            b.mul(b.mul(to_out, outer.result(kept_cell)), slopes[3]),
        ]
        return [gates], [b.constant_of(enter.type, 0.0), b.mul(to_cell, forget)]

    def gru_back(self, row, unit, to_new: list):
        b, inner, outer = self.b, self.inner, self.outer
        kept_update, kept_reset, kept_candidate, recurrent, old = self.recall(row, unit)
        update, reset, candidate = inner.result(kept_update), inner.result(kept_reset), outer.result(kept_candidate)
        (to_new,) = to_new
        to_update = b.mul(b.mul(to_new, b.sub(old, candidate)), inner.derivative(kept_update))
        to_candidate = b.mul(b.mul(to_new, b.sub(1.0, update)), outer.derivative(kept_candidate))
        to_reset = b.mul(b.mul(to_candidate, recurrent), inner.derivative(kept_reset))
        gates = [to_update, to_reset, to_candidate]
        return [gates, [to_update, to_reset, b.mul(to_candidate, reset)]], [b.mul(to_new, update)]


def render_gradient(params, target) -> str:
    """LLVM IR of the kernel that goes back through a recurrent layer."""
    return GradientKernel(params, target).render()
