"""Back-propagation through time for recurrent layers.

The steps run again, keeping their gates; a second kernel goes back through them, likewise one block for some sequences
and all steps. It leaves the cotangents of the gates; the cotangents of x, of the weights and of the biases are ordinary
products and sums of those over all sequences and steps. The recurrent weights are transposed first, so that
neighbouring threads read neighbouring elements on the way back, too. The gradients of several layers over one sequence
(a fused node of kind "rnn_gradient") share both launches, in which each has blocks of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from kgraph.codegen.cuda import data_movement, families
from kgraph.codegen.cuda.rnn import (
    KEPT,
    RowProduct,
    StepKernel,
    block_of,
    fused,
    name_of,
    projection,
    rows_of,
    step_call,
    too_wide,
)
from kgraph.codegen.cuda.rnn_activations import ACTIVATIONS, DERIVATIVES
from kgraph.codegen.cuda.source import index_type
from kgraph.codegen.kernel import KernelCall, KernelSpec, Launch
from kgraph.codegen.recurrent import Shape, gradient_products, gradient_values, layers_of, shape_of, unsupported
from kgraph.ir import Node, TensorType, Value
from kgraph.ir.dims import ceil_div

TEMPLATE = "kgraph.codegen.cuda.rnn_gradient:render"
SUMS = 4  # as if a thread held so many sums for each sequence, so that the code of a step stays short


def accepts(node: Node) -> str | None:
    """None where `lower` takes the node, else why not."""
    reason = unsupported(node, "rnn_gradient")
    if reason is not None:
        return reason
    shape = shape_of(layers_of(node, "rnn_gradient")[0][0])
    return too_wide(shape, max(shape.gates, 3))


def lower(node: Node, target) -> list[KernelCall]:
    """The steps again, the steps back, then products and sums over all sequences and steps."""
    layers = layers_of(node, "rnn_gradient")
    shape = shape_of(layers[0][0])
    shape = shape._replace(reverse=tuple(bool(n.attrs["reverse"]) for n, _, _ in layers))
    units, width = shape.units, shape.gates * shape.units
    batch, steps, _ = layers[0][1][0].shape
    calls: list[KernelCall] = []
    # Operands and results of the launch forward and of the one back.
    given: list[Value] = []
    left: list[Value] = []
    operands: list[Value] = []
    outputs: list[Value] = []
    behind: list[KernelCall] = []
    for _, inputs, results in layers:
        own, cotangents, to_states = inputs[: shape.inputs], inputs[shape.inputs :], results[5:]
        values = gradient_values(own[0], shape)
        kept = Value(TensorType((batch, steps, KEPT[shape.cell], units), shape.dtype))
        finals = [Value(TensorType((batch, units), shape.dtype)) for _ in to_states]
        transposed = Value(TensorType((width, units), shape.dtype))
        projected, products = projection(shape, own, target)
        calls += products
        calls += data_movement.lower_view("transpose", own[2], transposed, 0, [(width, 1), (units, width)], target)
        given += [projected, *own[2:]]
        left += [kept, values.before, *finals]
        operands += [kept, values.before, transposed, *own[5 + shape.states :], *cotangents]
        outputs += [*dict.fromkeys(values[:2]), *to_states]
        behind += gradient_products(
            own,
            results,
            values,
            lambda n: families.lower(n, target),
            lambda x, out: data_movement.lower_view("copy", x, out, 0, [(width, 1)], target),
        )
    calls.append(step_call(shape, given, left, True, target))
    rows = rows_of(shape, batch, len(layers), SUMS, max(shape.gates, 3), target)
    block = block_of(shape, target)
    name = f"{name_of(shape)}_back"
    index = index_type([v.type.size for v in (*operands, *outputs)])
    calls.append(
        KernelCall(
            KernelSpec(name, TEMPLATE, (name, tuple(shape), rows, block, index)),
            [*operands, *outputs],
            outputs=len(outputs),
            sizes=[batch, steps],
            extent=ceil_div(batch, rows) * len(layers),
            flops=batch * steps * (2 * width * units * len(layers)),
            bytes=sum((v.type.nbytes for v in (*operands, *outputs)), 0),
            launch=Launch(block),
        )
    )
    return calls + behind


class BackwardKernel(StepKernel):
    """The way back through all steps of a block of sequences. The states' cotangents lie in the results."""

    def __init__(self, params: tuple, target):
        name, shape, rows, block, index = params
        super().__init__(name, Shape(*shape), rows, block, index, target)
        k, shape = self.k, self.shape
        dtypes = [shape.dtype] * 3 + ["bool"] * shape.has_mask + [shape.dtype] * (1 + shape.states)
        count = len(shape.reverse)
        self.layers = self.operands(dtypes, count)
        self.results = self.operands([shape.dtype] * (1 + (shape.cell == "gru") + shape.states), count)
        self.begin()
        self.inner, self.outer = shape.recurrent_activation, shape.activation
        self.passed = k.shared(shape.dtype, rows * shape.gates * shape.units)

    def render(self) -> str:
        k, shape = self.k, self.shape
        with k.block_stride(k.let(k.mul(self.blocks, len(shape.reverse)), "total")) as number:
            operands, results = self.enter_layer(number, [self.layers, self.results])
            self.kept, self.before, self.weights, self.mask = operands[:4]
            self.to_sequence, *self.to_finals = operands[3 + shape.has_mask :]
            # Of a GRU alone the latter are other gates than the former.
            self.gates, self.recurrent_gates = results[0], results[shape.cell == "gru"]
            self.to_states = results[len(results) - shape.states :]
            for _, unit, sequence in self.each_row():
                place = k.let(k.add(k.mul(sequence, shape.units), unit), "place")
                for source, target in zip(self.to_finals, self.to_states, strict=True):
                    k.store(target, place, k.load(source, place))
            with k.range(k.i(0), self.steps, 1) as step:
                self.time = self.time_of(step, [not reverse for reverse in shape.reverse])
                rule = self.back_with_reset_before if shape.resets_before else self.back
                rule()
        return k.text()

    def each_row(self):
        """(row, unit, sequence) of the thread's own elements; one loop over units, in which rows are unrolled."""
        with self.each_unit() as unit:
            for row in range(self.rows):
                with self.existing(row) as sequence:
                    yield row, unit, sequence

    def function(self, name: str, x: str) -> tuple[str, str]:
        """An activation's value and derivative at x."""
        y = ACTIVATIONS[name](self.k, x, self.shape.dtype)
        return y, DERIVATIVES[name](self.k, x, self.shape.dtype, y)

    def recall(self, entry: str, unit: str) -> list[str]:
        k, shape = self.k, self.shape
        count = KEPT[shape.cell] - shape.resets_before
        at = k.let(k.add(k.mul(entry, KEPT[shape.cell] * shape.units), unit), "at")
        return [k.load(self.kept, k.add(at, number * shape.units)) for number in range(count)]

    def cotangents(self, sequence: str, unit: str) -> tuple[str, str, list[str], str]:
        """(number of the step, whether it is valid, cotangents of the states behind it, of its output)"""
        k, shape = self.k, self.shape
        entry = k.let(k.add(k.mul(sequence, self.steps), self.time), "entry")
        place = k.let(k.add(k.mul(sequence, shape.units), unit), "place")
        to_out = k.load(self.to_sequence, k.add(k.mul(entry, shape.units), unit))
        valid = k.load(self.mask, entry) if shape.has_mask else "True"
        return entry, valid, [k.load(state, place) for state in self.to_states], to_out

    def where(self, valid: str, value: str, other: str) -> str:
        return self.k.let(f"({value} if {valid} else {other})") if self.shape.has_mask else value

    def skipped(self, behind: str, to_out: str) -> str:
        """The cotangent of the state before a masked step, whose output was that state, or zeros."""
        return behind if self.shape.zero_output_for_mask else f"({behind} + {to_out})"

    def add_to_state(self, sequence: str, unit: str, value: str) -> None:
        k = self.k
        place = k.let(k.add(k.mul(sequence, self.shape.units), unit), "place")
        k.store(self.to_states[0], place, f"({k.load(self.to_states[0], place)} + {value})")

    # -- a step -------------------------------------------------------------------------------------------------------
    def back(self) -> None:
        """The gates' cotangents, then what they give to the state before the step."""
        k, shape = self.k, self.shape
        units, gates = shape.units, shape.gates
        zero = k.literal(0, shape.dtype)
        for row, unit, sequence in self.each_row():
            entry, valid, behind, to_out = self.cotangents(sequence, unit)
            to_new = [self.value(f"{behind[0]} + {to_out}"), *behind[1:]]
            groups, states = getattr(self, shape.cell)(entry, unit, to_new)
            groups = [[self.where(valid, g, zero) for g in group] for group in groups]
            masked = [self.skipped(behind[0], to_out), *behind[1:]]
            place = k.let(k.add(k.mul(sequence, units), unit), "place")
            for target, state, kept in zip(self.to_states, states, masked, strict=True):
                k.store(target, place, self.where(valid, state, kept))
            at = k.let(k.add(k.mul(entry, gates * units), unit), "at")
            for target, group in zip((self.gates, self.recurrent_gates), groups):
                for number, value in enumerate(group):
                    k.store(target, k.add(at, number * units), value)
            for number, value in enumerate(groups[-1]):
                k.store(self.passed, k.add(unit, (row * gates + number) * units), value)
        k.synchronise()
        self.multiply(range(gates))
        k.synchronise()

    def multiply(self, gates: range) -> None:
        """Adds what some gates give to the cotangent of the state before the step."""
        for unit, sums in self.products(gates):
            for row in range(self.rows):
                with self.existing(row) as sequence:
                    self.add_to_state(sequence, unit, sums[row][0])

    def products(self, gates: range):
        """(unit, sums) of the product of some gates' cotangents with the transposed weights."""
        k, shape = self.k, self.shape
        units = shape.units
        product = RowProduct(k, shape.dtype, self.rows, [0], len(gates) * units, units)
        first = gates.start * units
        with self.each_unit() as unit:
            yield unit, product.emit(self.passed, k.i(first), shape.gates * units, self.weights, unit, begin=first)

    def back_with_reset_before(self) -> None:
        """The same for a GRU whose candidate reads reset * state: its cotangent takes a product of its own."""
        k, shape = self.k, self.shape
        units, dtype = shape.units, shape.dtype
        zero = k.literal(0, dtype)
        for row, unit, sequence in self.each_row():
            entry, valid, (behind,), to_out = self.cotangents(sequence, unit)
            to_new = self.value(f"{behind} + {to_out}")
            update, _, candidate = self.recall(entry, unit)
            old = k.load(self.before, k.add(k.mul(entry, 2 * units), unit))
            (update, slope), (candidate, outer_slope) = (
                self.function(self.inner, update),
                self.function(self.outer, candidate),
            )
            to_update = self.value(f"{to_new} * ({old} - {candidate}) * {slope}")
            to_candidate = self.value(f"{to_new} * ({k.literal(1, dtype)} - {update}) * {outer_slope}")
            to_update, to_candidate = (self.where(valid, g, zero) for g in (to_update, to_candidate))
            place = k.let(k.add(k.mul(sequence, units), unit), "place")
            kept = self.where(valid, self.value(f"{to_new} * {update}"), self.skipped(behind, to_out))
            k.store(self.to_states[0], place, kept)
            at, wide = (k.let(k.add(k.mul(entry, n * units), unit), "at") for n in (3, 6))
            for number, value in ((0, to_update), (2, to_candidate)):
                k.store(self.passed, k.add(unit, (row * 3 + number) * units), value)
                k.store(self.gates, k.add(at, number * units), value)
            # The reset gate's place, number 1, is filled below.
            for number, value in ((0, to_update), (2, zero), (3, zero), (4, zero), (5, to_candidate)):
                k.store(self.recurrent_gates, k.add(wide, number * units), value)
        k.synchronise()
        for unit, sums in self.products(range(2, 3)):
            for row in range(self.rows):
                with self.existing(row) as sequence:
                    entry = k.let(k.add(k.mul(sequence, self.steps), self.time), "entry")
                    _, reset, _ = self.recall(entry, unit)
                    old = k.load(self.before, k.add(k.mul(entry, 2 * units), unit))
                    reset, slope = self.function(self.inner, reset)
                    to_scaled = sums[row][0]
                    to_reset = self.value(f"{to_scaled} * {old} * {slope}")
                    k.store(self.passed, k.add(unit, (row * 3 + 1) * units), to_reset)
                    k.store(self.gates, k.add(k.mul(entry, 3 * units), k.add(unit, units)), to_reset)
                    k.store(self.recurrent_gates, k.add(k.mul(entry, 6 * units), k.add(unit, units)), to_reset)
                    self.add_to_state(sequence, unit, f"{to_scaled} * {reset}")
        k.synchronise()
        self.multiply(range(2))
        k.synchronise()

    # Each gives the cotangents of the gates before their activations (for the projection and, last, for the recurrent
    # product), and the states' cotangents that do not pass through the recurrent product.
    def simple(self, entry: str, unit: str, to_new: Sequence[str]) -> tuple[list, list]:
        (argument,) = self.recall(entry, unit)
        _, slope = self.function(self.outer, argument)
        return [[self.value(f"{to_new[0]} * {slope}")]], [self.k.literal(0, self.shape.dtype)]

    def lstm(self, entry: str, unit: str, to_new: Sequence[str]) -> tuple[list, list]:
        k, dtype = self.k, self.shape.dtype
        *arguments, old = self.recall(entry, unit)
        names = (self.inner, self.inner, self.outer, self.inner)
        found = [self.function(name, x) for name, x in zip(names, arguments, strict=True)]
        (enter, forget, candidate, leave), slopes = zip(*found, strict=True)
        cell = k.let(fused(dtype, enter, candidate, f"({forget} * {old})"))
        squashed, slope = self.function(self.outer, cell)
        to_out, to_cell = to_new
        to_cell = k.let(fused(dtype, f"({to_out} * {leave})", slope, to_cell))
        results = (f"{to_cell} * {candidate}", f"{to_cell} * {old}", f"{to_cell} * {enter}", f"{to_out} * {squashed}")
        gates = [self.value(f"{to_gate} * {s}") for to_gate, s in zip(results, slopes, strict=True)]
        return [gates], [k.literal(0, dtype), self.value(f"{to_cell} * {forget}")]

    def gru(self, entry: str, unit: str, to_new: Sequence[str]) -> tuple[list, list]:
        k, shape = self.k, self.shape
        update, reset, candidate, recurrent = self.recall(entry, unit)
        old = k.load(self.before, k.add(k.mul(entry, shape.units), unit))
        (update, update_slope), (reset, reset_slope) = (self.function(self.inner, x) for x in (update, reset))
        candidate, slope = self.function(self.outer, candidate)
        (to_new,) = to_new
        to_update = self.value(f"{to_new} * ({old} - {candidate}) * {update_slope}")
        to_candidate = self.value(f"{to_new} * ({k.literal(1, shape.dtype)} - {update}) * {slope}")
        to_reset = self.value(f"{to_candidate} * {recurrent} * {reset_slope}")
        gates = [to_update, to_reset, to_candidate]
        return [gates, [to_update, to_reset, self.value(f"{to_candidate} * {reset}")]], [
            self.value(f"{to_new} * {update}")
        ]


def render(params: tuple, target) -> str:
    """The source of the kernel that goes back through a recurrent layer."""
    return BackwardKernel(params, target).render()
