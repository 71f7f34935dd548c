"""Recurrent layers over whole sequences: LSTM, GRU and simple cells, one launch for all steps.

The input projection of all steps is one product before it. Sequences are independent of each other: a block takes some
of them through all steps, so no block ever waits for another. Its states lie in shared memory; every thread has some
units and computes all their gates, reading the recurrent weights (from the cache, neighbouring threads neighbouring
columns) once for all sequences of the block.

Several layers over equal shapes, such as both directions of a bidirectional one, run as one launch (a fused node of
kind "rnn" that holds them, and perhaps the concatenation of their sequences): the layer is the outer part of the
extent, so that each has blocks of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kgraph.codegen.cuda import families
from kgraph.codegen.cuda.rnn_activations import ACTIVATIONS
from kgraph.codegen.cuda.source import KernelSource, Operand, index_type
from kgraph.codegen.cuda.target import CudaTarget
from kgraph.codegen.kernel import KernelCall, KernelSpec, Launch
from kgraph.codegen.recurrent import Shape, is_joined, layers_of, product_calls, shape_of, unsupported
from kgraph.ir import Node, TensorType, Value
from kgraph.ir.dims import ceil_div

TEMPLATE = "kgraph.codegen.cuda.rnn:render"
MOST_SUMS = 16  # sums of products that a thread holds: gates of one unit times sequences
ROWS = 4  # sequences of a block where their number is not known
STEPS_OF_PRODUCT = 4  # rows of the weights that a thread loads before it multiplies
# What the way back needs of a step, per unit: the gates before their activation, and what else it cannot compute.
KEPT = {"lstm": 5, "gru": 4, "simple": 1}


def accepts(node: Node) -> str | None:
    """None where `lower` takes the node, else why not."""
    reason = unsupported(node)
    if reason is not None:
        return reason
    shape = shape_of(layers_of(node)[0][0])
    return too_wide(shape, shared_values(shape))


def too_wide(shape: Shape, values: int) -> str | None:
    """The reason where `values` per unit of a sequence do not fit into shared memory, or None."""
    nbytes = values * shape.units * np.dtype(shape.dtype).itemsize
    if nbytes > CudaTarget.shared_bytes:
        return f"{shape.units} units: the states of a sequence do not fit into shared memory"
    return None


def shared_values(shape: Shape) -> int:
    """Values per unit of a sequence in shared memory: the state twice, or the state, the scaled one and a gate."""
    return 3 if shape.resets_before else 2


def rows_of(shape: Shape, batch, layers: int, sums: int, values: int, target) -> int:
    """Sequences that a block takes. sums: that a thread holds for each; values: see `shared_values`."""
    nbytes = values * shape.units * np.dtype(shape.dtype).itemsize
    most = max(1, min(MOST_SUMS // sums, target.shared_bytes // nbytes))
    if target.simulator:
        return min(2, most)
    wanted = -(-batch * layers // target.num_sms) if isinstance(batch, int) else ROWS
    return min(most, 1 << max(wanted - 1, 0).bit_length())


def block_of(shape: Shape, target) -> int:
    """Threads of a block: one per unit, up to a number."""
    return min(2 * target.block, -(-shape.units // target.group) * target.group)


def lower(node: Node, target) -> list[KernelCall]:
    """The products of a recurrent layer, or of several, and the launch of all steps."""
    layers = layers_of(node)
    shape = shape_of(layers[0][0])
    shape = shape._replace(reverse=tuple(bool(n.attrs["reverse"]) for n, _, _ in layers), joined=is_joined(node))
    calls: list[KernelCall] = []
    operands: list[Value] = []
    for _, inputs, _ in layers:
        projected, products = projection(shape, inputs, target)
        calls += products
        operands += [projected, *inputs[2:]]
    outputs = list(dict.fromkeys(v for _, _, results in layers for v in results))
    return [*calls, step_call(shape, operands, outputs, False, target)]


def projection(shape: Shape, inputs: Sequence[Value], target) -> tuple[Value, list[KernelCall]]:
    """x @ kernel of all steps, [B, T, G * units], and the calls that compute it."""
    x, kernel = inputs[:2]
    projected = Value(TensorType((*x.shape[:2], shape.gates * shape.units), shape.dtype))
    return projected, product_calls(projected, x, kernel, (2,), (0,), lambda n: families.lower(n, target))


def step_call(shape: Shape, operands: Sequence, outputs: Sequence, keeps: bool, target) -> KernelCall:
    """The launch that goes through all steps. operands: those of the layers, projected inputs first."""
    batch, steps, _ = operands[0].shape
    layers = len(shape.reverse)
    rows = rows_of(shape, batch, layers, shape.gates, shared_values(shape), target)
    block = block_of(shape, target)
    name = "_".join([name_of(shape), *["kept"] * keeps])
    index = index_type([v.type.size for v in (*operands, *outputs)])
    return KernelCall(
        KernelSpec(name, TEMPLATE, (name, tuple(shape), rows, block, keeps, index)),
        [*operands, *outputs],
        outputs=len(outputs),
        sizes=[batch, steps],
        extent=ceil_div(batch, rows) * layers,
        flops=batch * steps * (2 * shape.gates * shape.units * shape.units * layers),
        bytes=sum((v.type.nbytes for v in (*operands, *outputs)), 0),
        launch=Launch(block),
    )


def name_of(shape: Shape) -> str:
    return "_".join([shape.cell, *(["bidirectional"] if len(set(shape.reverse)) > 1 else [])])


# -- the kernel -------------------------------------------------------------------------------------------------------
class RowProduct:
    """sums[row][column] += left[row, k] @ right[k, column] of the rows of a block, for one unit of a thread.

    columns: offsets of the columns in a row of `right`, which has `width` elements.
    """

    def __init__(self, k: KernelSource, dtype: str, rows: int, columns: Sequence[int], depth: int, width: int):
        self.k, self.dtype, self.rows, self.columns = k, dtype, rows, columns
        self.depth, self.width = depth, width

    def emit(self, left: Operand, first: str, stride: int, right: Operand, unit: str, begin: int = 0) -> list[list]:
        """The sums' names by row and column. left[first + row * stride + k], right[(begin + k) * width + unit + ...]"""
        k = self.k
        sums = [[k.fresh("sum") for _ in self.columns] for _ in range(self.rows)]
        for name in (s for group in sums for s in group):
            k.line(f"{name} = {k.literal(0, self.dtype)}")
        unroll = next(n for n in (STEPS_OF_PRODUCT, 2, 1) if self.depth % n == 0)
        with k.range(k.i(0), k.i(self.depth), unroll) as step:
            at = k.let(k.add(k.mul(k.add(step, begin), self.width), unit), "at")
            weights = [
                [k.load(right, k.add(at, number * self.width + c)) for c in self.columns] for number in range(unroll)
            ]
            start = k.let(k.add(first, step), "at")
            for number, row in ((n, r) for n in range(unroll) for r in range(self.rows)):
                value = k.load(left, k.add(start, row * stride + number))
                for name, weight in zip(sums[row], weights[number], strict=True):
                    k.line(f"{name} = {fused(self.dtype, value, weight, name)}")
        return sums


def fused(dtype: str, x: str, y: str, z: str) -> str:
    """x * y + z, rounded once."""
    return f"{'fma' if dtype == 'float64' else 'fmaf'}({x}, {y}, {z})"


class StepKernel:
    """What is known while a kernel of all steps is written. Operands are those of the layer that a block is in."""

    def __init__(self, name: str, shape: Shape, rows: int, block: int, index: str, target):
        self.shape, self.rows = shape, rows
        self.k = KernelSource(name, target, block, index)
        self.first = ""  # sequence of the block

    def operands(self, dtypes: Sequence[str], layers: int = 1) -> list[list[Operand]]:
        return [[self.k.operand(dtype) for dtype in dtypes] for _ in range(layers)]

    def chosen(self, layer: str, groups: Sequence[Sequence[Operand]]) -> list[Operand]:
        """The operands of the layer of this number."""
        if len(groups) == 1:
            return list(groups[0])
        out = []
        for group in zip(*groups, strict=True):
            if group.count(group[0]) == len(group):
                out.append(group[0])
                continue
            text = group[-1].name
            for number in reversed(range(len(group) - 1)):
                text = f"({group[number].name} if {layer} == {self.k.i(number)} else {text})"
            out.append(Operand(self.k.let(text, "chosen"), group[0].dtype))
        return out

    def enter_layer(self, number: str, groups: Sequence[Sequence[Sequence[Operand]]]) -> list[list[Operand]]:
        """Begins block `number` of all layers: its layer, first sequence, and for each of the groups its operands."""
        k = self.k
        self.layer = k.let(k.div(number, self.blocks), "layer") if len(self.shape.reverse) > 1 else ""
        self.first = k.let(k.mul(k.mod(number, self.blocks), self.rows), "first")
        return [self.chosen(self.layer, group) for group in groups]

    def time_of(self, step: str, reverse: Sequence[bool]) -> str:
        """The place of a step in time, for layers that go back or not."""
        k = self.k
        back = k.sub(k.sub(self.steps, 1), step)
        times = [back if backward else step for backward in reverse]
        time = times[-1]
        for number in reversed(range(len(times) - 1)):
            time = f"({times[number]} if {self.layer} == {k.i(number)} else {time})"
        return k.let(time, "time")

    def each_unit(self):
        return self.k.range(self.thread, self.k.i(self.shape.units), self.k.block)

    def existing(self, row: int):
        """What follows is done if the block has this row; gives the sequence's number."""
        return _Guard(self.k, self.first, row, self.batch)

    def begin(self) -> None:
        k = self.k
        self.batch, self.steps = k.size(), k.size()
        self.thread = k.thread()
        self.blocks = k.let(k.ceil_div(self.batch, self.rows), "blocks")

    def value(self, text: str) -> str:
        return self.k.let(f"({text})")


class ForwardKernel(StepKernel):
    """All steps of a block of sequences."""

    def __init__(self, params: tuple, target):
        name, shape, rows, block, self.keeps, index = params
        super().__init__(name, Shape(*shape), rows, block, index, target)
        k, shape = self.k, self.shape
        count = len(shape.reverse)
        inputs = [shape.dtype] * (4 + shape.states) + ["bool"] * shape.has_mask
        self.layers = self.operands(inputs, count)
        # The output (or, where the steps are kept, what is kept and the states before each step), the final states.
        first = [k.operand(shape.dtype)] if shape.joined else []
        rest = self.operands([shape.dtype] * (1 + self.keeps + shape.states - len(first)), count)
        self.results = [[*first, *of_layer] for of_layer in rest]
        self.width = shape.units * (count if shape.joined else 1)  # elements of a step in the output
        self.begin()
        self.inner, self.outer = (ACTIVATIONS[n] for n in (shape.recurrent_activation, shape.activation))
        size = rows * shape.units
        self.hidden = k.shared(shape.dtype, size * (1 if shape.resets_before else 2))
        if shape.resets_before:
            self.scaled, self.update = k.shared(shape.dtype, size), k.shared(shape.dtype, size)

    def render(self) -> str:
        k, shape = self.k, self.shape
        with k.block_stride(k.let(k.mul(self.blocks, len(shape.reverse)), "total")) as number:
            operands, results = self.enter_layer(number, [self.layers, self.results])
            self.column = k.let(k.mul(self.layer, shape.units), "column") if shape.joined else ""
            self.projected, self.weights, self.bias, self.recurrent_bias = operands[:4]
            self.initial, self.mask = operands[4 : 4 + shape.states], operands[-1]
            self.kept, self.finals = results[: len(results) - shape.states], results[len(results) - shape.states :]
            self.load_states()
            with k.range(k.i(0), self.steps, 1) as step:
                self.time = self.time_of(step, shape.reverse)
                if shape.resets_before:
                    self.step_with_reset_before()
                else:
                    self.step(step)
                k.synchronise()
            # Where states are not kept in place, they lie in the half that the last step wrote.
            last = k.i(0) if shape.resets_before else k.mul(k.mod(self.steps, 2), self.rows * shape.units)
            last = k.let(last, "last")
            with self.each_unit() as unit:
                for row in range(self.rows):
                    with self.existing(row) as sequence:
                        value = k.load(self.hidden, k.add(k.add(last, row * shape.units), unit))
                        k.store(self.finals[0], k.add(k.mul(sequence, shape.units), unit), value)
            k.synchronise()  # before the next sequences take the arrays
        return k.text()

    def load_states(self) -> None:
        """The initial states: the first into shared memory, a cell's into where its final one will be."""
        k, units = self.k, self.shape.units
        with self.each_unit() as unit:
            for row in range(self.rows):
                at = k.add(unit, row * units)
                k.store(self.hidden, at, k.literal(0, self.shape.dtype))
                with self.existing(row) as sequence:
                    place = k.let(k.add(k.mul(sequence, units), unit), "place")
                    k.store(self.hidden, at, k.load(self.initial[0], place))
                    for source, target in zip(self.initial[1:], self.finals[1:], strict=True):
                        k.store(target, place, k.load(source, place))
        k.synchronise()

    # -- a step -----------------------------------------------------------------------------------------------------
    def step(self, step: str) -> None:
        """All gates of a unit from one product with the states before; the new ones go to the other half."""
        k, shape = self.k, self.shape
        size = self.rows * shape.units
        now = k.let(k.mul(k.mod(step, 2), size), "now")
        after = k.let(k.sub(k.i(size), now), "after")
        columns = [g * shape.units for g in range(shape.gates)]
        product = RowProduct(k, shape.dtype, self.rows, columns, shape.units, shape.gates * shape.units)
        with self.each_unit() as unit:
            sums = product.emit(self.hidden, now, shape.units, self.weights, unit)
            for row in range(self.rows):
                with self.existing(row) as sequence:
                    at = k.let(k.add(unit, row * shape.units), "at")
                    old = k.load(self.hidden, k.add(now, at))
                    new = self.finish(sequence, unit, old, getattr(self, shape.cell)(sequence, unit, sums[row], old))
                    k.store(self.hidden, k.add(after, at), new)

    def step_with_reset_before(self) -> None:
        """A GRU whose candidate reads reset * state: the product with its weights waits for the gates."""
        k, shape = self.k, self.shape
        units = shape.units
        gates = RowProduct(k, shape.dtype, self.rows, [0, units], units, 3 * units)
        candidate = RowProduct(k, shape.dtype, self.rows, [2 * units], units, 3 * units)
        with self.each_unit() as unit:
            sums = gates.emit(self.hidden, k.i(0), units, self.weights, unit)
            for row in range(self.rows):
                with self.existing(row) as sequence:
                    at = k.let(k.add(unit, row * units), "at")
                    update, reset = (self.gate(sequence, unit, g, sums[row][g]) for g in range(2))
                    self.keep(sequence, unit, [update, reset])
                    k.store(self.update, at, self.inner(k, update, shape.dtype))
                    old = k.load(self.hidden, at)
                    k.store(self.scaled, at, self.value(f"{self.inner(k, reset, shape.dtype)} * {old}"))
        k.synchronise()
        with self.each_unit() as unit:
            sums = candidate.emit(self.scaled, k.i(0), units, self.weights, unit)
            for row in range(self.rows):
                with self.existing(row) as sequence:
                    at = k.let(k.add(unit, row * units), "at")
                    argument = self.gate(sequence, unit, 2, sums[row][0])
                    self.keep(sequence, unit, [argument], first=2)
                    old, update = k.load(self.hidden, at), k.load(self.update, at)
                    if self.keeps:
                        place = k.add(k.mul(self.entry(sequence), 2 * units), unit)
                        k.store(self.kept[1], k.add(place, units), k.load(self.scaled, at))
                    new = self.mixed(update, old, self.outer(k, argument, shape.dtype))
                    k.store(self.hidden, at, self.finish(sequence, unit, old, [new]))

    def gate(self, sequence: str, unit: str, number: int, product: str) -> str:
        """A gate before its activation."""
        k, units = self.k, self.shape.units
        recurrent = k.load(self.recurrent_bias, k.add(unit, number * units))
        return self.value(f"{self.projection(sequence, unit, number)} + ({product} + {recurrent})")

    def projection(self, sequence: str, unit: str, number: int) -> str:
        k, shape = self.k, self.shape
        at = k.add(k.mul(self.entry(sequence), shape.gates * shape.units), k.add(unit, number * shape.units))
        return self.value(f"{k.load(self.projected, at)} + {k.load(self.bias, k.add(unit, number * shape.units))}")

    def entry(self, sequence: str) -> str:
        """The number of this step of a sequence among all steps of all sequences."""
        return self.k.let(self.k.add(self.k.mul(sequence, self.steps), self.time), "entry")

    def mixed(self, update: str, old: str, new: str) -> str:
        """update * old + (1 - update) * new"""
        return self.k.let(fused(self.shape.dtype, update, f"({old} - {new})", new))

    # -- the cells: new states of a unit ------------------------------------------------------------------------------
    def simple(self, sequence: str, unit: str, sums: Sequence[str], old: str) -> list[str]:
        argument = self.gate(sequence, unit, 0, sums[0])
        self.keep(sequence, unit, [argument])
        return [self.outer(self.k, argument, self.shape.dtype)]

    def lstm(self, sequence: str, unit: str, sums: Sequence[str], old: str) -> list[str]:
        k, dtype = self.k, self.shape.dtype
        arguments = [self.gate(sequence, unit, g, s) for g, s in enumerate(sums)]
        enter, forget, leave = (self.inner(k, arguments[g], dtype) for g in (0, 1, 3))
        candidate = self.outer(k, arguments[2], dtype)
        cell = k.load(self.finals[1], k.add(k.mul(sequence, self.shape.units), unit))
        self.keep(sequence, unit, [*arguments, cell])
        cell = k.let(fused(dtype, enter, candidate, f"({forget} * {cell})"))
        return [self.value(f"{leave} * {self.outer(k, cell, dtype)}"), cell]

    def gru(self, sequence: str, unit: str, sums: Sequence[str], old: str) -> list[str]:
        k, shape = self.k, self.shape
        update, reset = (self.gate(sequence, unit, g, sums[g]) for g in range(2))
        recurrent = self.value(f"{sums[2]} + {k.load(self.recurrent_bias, k.add(unit, 2 * shape.units))}")
        opened = self.inner(k, reset, shape.dtype)
        argument = k.let(fused(shape.dtype, opened, recurrent, self.projection(sequence, unit, 2)))
        self.keep(sequence, unit, [update, reset, argument, recurrent])
        return [self.mixed(self.inner(k, update, shape.dtype), old, self.outer(k, argument, shape.dtype))]

    def keep(self, sequence: str, unit: str, values: Sequence[str], first: int = 0) -> None:
        """Store what the way back needs of a step."""
        if not self.keeps:
            return
        k, shape = self.k, self.shape
        at = k.let(k.add(k.mul(self.entry(sequence), KEPT[shape.cell] * shape.units), unit), "at")
        for number, value in enumerate(values, first):
            k.store(self.kept[0], k.add(at, number * shape.units), value)

    def finish(self, sequence: str, unit: str, old: str, new: Sequence[str]) -> str:
        """Writes the output and the cell's state, masks applied; gives the new state."""
        k, shape = self.k, self.shape
        entry = self.entry(sequence)
        states, out = list(new), new[0]
        place = k.let(k.add(k.mul(sequence, shape.units), unit), "place")
        if shape.has_mask:
            valid = k.load(self.mask, entry)
            before = [old, *(k.load(final, place) for final in self.finals[1:])]
            states = [k.let(f"({n} if {valid} else {o})") for n, o in zip(new, before, strict=True)]
            zero = k.literal(0, shape.dtype)
            out = k.let(f"({out} if {valid} else {zero})") if shape.zero_output_for_mask else states[0]
        if self.keeps:
            wide = 2 * shape.units if shape.resets_before else shape.units
            k.store(self.kept[1], k.add(k.mul(entry, wide), unit), old)
        else:
            column = k.add(self.column, unit) if shape.joined else unit
            k.store(self.kept[0], k.add(k.mul(entry, self.width), column), out)
        for final, value in zip(self.finals[1:], states[1:], strict=True):
            k.store(final, place, value)
        return states[0]


class _Guard:
    """`with` block of what is done for one row of a block if there is such a sequence."""

    def __init__(self, k: KernelSource, first: str, row: int, batch: str):
        self.k = k
        self.sequence = k.let(k.add(first, row), "sequence")
        self.suite = k.suite(f"if {self.sequence} < {batch}:")

    def __enter__(self) -> str:
        self.suite.__enter__()
        return self.sequence

    def __exit__(self, *error) -> None:
        self.suite.__exit__(*error)


def render(params: tuple, target) -> str:
    """The source of the kernel of all steps."""
    return ForwardKernel(params, target).render()
