"""Attention of a few queries, as in the steps of a decoder: keys and values are read where they lie, once.

The queries of all heads that share keys are the rows of a unit. Blocks of keys that a row does not see are not read,
nor are the values of keys without weight: a cache that is filled in part costs what is in it.
"""

from __future__ import annotations

from typing import NamedTuple

from kgraph.codegen.attention import LOG2E, MASKED, extra_strides
from kgraph.codegen.cpu.attention_operands import AttentionOperands, Shape, exp2_nonpositive
from kgraph.codegen.cpu.builder import Int, KernelBuilder, Pointer, compute_dtype, itemsize
from kgraph.codegen.cpu.strided import SizeTable, dense_strides, resolve_all
from kgraph.codegen.cpu.transpose import transpose_vectors
from kgraph.codegen.kernel import KernelCall, KernelSpec
from kgraph.codegen.views import VIEWS
from kgraph.ir import Dim, Node, Value
from kgraph.ir.dims import ceil_div, product

# Above so many rows a product over tiles is faster than to look at one row after the other.
MOST_ROWS = 8
# With fewer units than this each head is one, though heads then read the same keys.
LEAST_UNITS = 8
# Keys whose values all rows of a unit read before any reads the next ones.
VALUE_TILE = 512
# Vectors of sums in registers.
SUMS = 8


def takes(node: Node) -> bool:
    """Whether the kernel is made for the shapes of an attention node."""
    q = node.inputs[0]
    return not isinstance(q.shape[1], Dim) and 1 <= _rows(node) <= MOST_ROWS


def _rows(node: Node) -> int:
    return node.inputs[0].shape[1] * (1 if _by_head(node) else _group(node))


def _group(node: Node) -> int:
    return node.inputs[0].shape[2] // node.inputs[1].shape[2]


def _by_head(node: Node) -> bool:
    batch, key_heads = node.inputs[0].shape[0], node.inputs[1].shape[2]
    return not isinstance(batch, Dim) and batch * key_heads < LEAST_UNITS


class _Source(NamedTuple):
    """Where keys or values lie: in a value, from an element on, so many elements from one batch entry to the next."""

    value: Value
    first: int | Dim
    batch_stride: int | Dim


def views(node: Node) -> tuple[Value, ...]:
    """Keys and values that the kernel reads out of what they are slices of."""
    return tuple(x for x in node.inputs[1:3] if _source(x).value is not x)


def _source(x: Value) -> _Source:
    """The place of keys or values; rows of all heads lie one behind the other."""
    dense = dense_strides(x.shape)
    sliced = x
    while sliced.node is not None and sliced.node.name == "reshape" and _varying(sliced) == _varying_before(sliced):
        sliced = sliced.node.inputs[0]
    if sliced.node is not None and sliced.node.name == "slice":
        first, axes = VIEWS["slice"](sliced.node)
        strides = iter([stride for n, stride in axes if isinstance(n, Dim) or n != 1])
        own = [0 if not isinstance(n, Dim) and n == 1 else next(strides) for n in x.shape]
        if all(stride in (0, wanted) for stride, wanted in zip(own[1:], dense[1:])):
            return _Source(sliced.node.inputs[0], first, own[0])
    return _Source(x, 0, dense[0])


def _varying(x: Value) -> list:
    """The sizes of its axes of more than one element."""
    return [n for n in x.shape if isinstance(n, Dim) or n != 1]


def _varying_before(x: Value) -> list:
    return _varying(x.producer.inputs[0])


def lower(node: Node, target) -> list[KernelCall]:
    """The one call of an attention node that `takes` accepts."""
    q, k, v, *rest = node.inputs
    batch, queries, heads, depth = q.shape
    keys = k.shape[1]
    shape = Shape.of(q, k, v, node.attrs)
    compute = compute_dtype(q.dtype)
    lanes = target.lanes(compute)
    table = SizeTable()
    extras = tuple(table.all(extra_strides(x)) for x in rest)
    sources = [_source(k), _source(v)]
    places = tuple((table.run_time(s.first), table.run_time(s.batch_stride)) for s in sources)
    params = (tuple(shape), queries, table.run_time(keys), extras, _by_head(node), places)
    rows = _rows(node)
    elements = rows * (ceil_div(keys, lanes) * lanes + 1) + _fixed_elements(shape, rows, lanes)
    tensors = (*node.inputs, node.output)
    return [
        KernelCall(
            KernelSpec("attention_rows", "attention_rows:render_attention_rows", params),
            [q, *(s.value for s in sources), *rest, node.output],
            outputs=1,
            sizes=table.values,
            extent=batch * (heads if _by_head(node) else k.shape[2]),
            flops=product((batch, heads, queries, keys)) * (2 * (depth + shape.value_depth)),
            bytes=sum((x.type.nbytes for x in tensors), 0),
            scratch_bytes=elements * itemsize(compute),
        )
    ]


def _padded(elements: int, lanes: int) -> int:
    return -(-elements // lanes) * lanes


def _fixed_elements(shape: Shape, rows: int, lanes: int) -> int:
    """Elements of scratch that do not depend on the number of keys: queries, sums, norms."""
    return rows * (_padded(shape.depth, lanes) + _padded(shape.value_depth, lanes)) + _padded(rows, lanes)


def render_attention_rows(params, target) -> str:
    """LLVM IR of a kernel; a unit is a key head of a batch entry, or a head."""
    return _RowsKernel(params, target).render()


class _RowsKernel(AttentionOperands):
    def __init__(self, params, target):
        shape, queries, keys, strides, by_head, places = params
        shape = Shape(*shape)
        super().__init__(KernelBuilder("attention_rows", target), shape, queries, keys, strides)
        b, lanes = self.b, self.lanes
        self.out = b.operand(self.next_operand, shape.dtype)
        self.queries = queries
        self.k_place, self.v_place = (resolve_all(b, place) for place in places)
        self.group = 1 if by_head else shape.heads // shape.key_heads
        self.units_per_key_head = shape.heads // shape.key_heads if by_head else 1
        self.rows = queries * self.group
        self.depth, self.value_depth = _padded(shape.depth, lanes), _padded(shape.value_depth, lanes)
        self.stride = b.ceil_div(self.total_keys, lanes) * lanes
        at = 0
        pointers = []
        for name, elements in (
            ("queries", self.rows * self.depth),
            ("sums", self.rows * self.value_depth),
            ("norms", _padded(self.rows, lanes)),
            ("scores", 0),
        ):
            place = b.scratch(self.compute, at * itemsize(self.compute))
            pointers.append(Pointer(b, place.value, self.compute, name))
            at += elements
        self.own_queries, self.sums, self.norms, self.scores = pointers
        self.zero = b.constant(0, self.compute, lanes)

    def render(self) -> str:
        b, shape = self.b, self.shape
        heads = shape.heads if self.units_per_key_head > 1 else shape.key_heads
        with b.loop(b.begin, b.end) as unit:
            batch, number = unit // heads, b.int(unit % heads)
            key_head, first_head = number // self.units_per_key_head, number * self.group
            self._read_queries(batch, first_head)
            self._score(batch, key_head, first_head)
            with b.loop(0, self.rows) as r:
                self._weigh(r)
            self._add_values(batch, key_head)
            self._finish(batch, first_head)
        return b.ir_text()

    def _place(self, r: Int, first_head) -> tuple:
        """The query and the head of row r."""
        return r % self.queries, first_head + r // self.queries

    def _read_queries(self, batch, first_head) -> None:
        """The rows times the scale, zeros behind the depth."""
        b, shape, lanes = self.b, self.shape, self.lanes
        scale = b.constant(shape.scale * LOG2E, self.compute, lanes)
        with b.loop(0, self.rows) as r:
            query, head = self._place(r, first_head)
            row = self.q + ((batch * self.queries + query) * (shape.heads * shape.depth) + head * shape.depth)
            for column in range(0, shape.depth, lanes):
                vector = b.mul(self.load_part(row, column, shape.depth), scale)
                b.store(self.own_queries, r * self.depth + column, vector)
            for column in range(0, self.value_depth, lanes):
                b.store(self.sums, r * self.value_depth + column, self.zero)

    def _rows_of(
        self, x: Pointer, where, batch, key_head, depth: int, first, count: int, inside: bool
    ) -> list[Pointer]:
        """`count` keys or values from `first` on, the last one again where there are no more."""
        b = self.b
        stride = self.shape.key_heads * depth
        begin, batch_stride = where
        source = x + (batch * batch_stride + begin + key_head * depth)
        place = lambda j: first + j if inside else b.min(first + j, self.total_keys - 1)
        return [source + place(j) * stride for j in range(count)]

    def _score(self, batch, key_head, first_head) -> None:
        b, shape, lanes = self.b, self.shape, self.lanes
        masked = b.constant(MASKED[self.compute], self.compute, lanes)

        def block(i, mask, slot) -> None:
            keys = self._rows_of(self.k, self.k_place, batch, key_head, shape.depth, i, lanes, inside=mask is None)
            with b.loop(0, self.rows) as r:
                query, head = self._place(r, first_head)

                def products() -> None:
                    totals = [self.zero] * lanes
                    for column in range(0, shape.depth, lanes):
                        vector = b.load(self.own_queries, r * self.depth + column, lanes)
                        loaded = [self.load_part(key, column, shape.depth) for key in keys]
                        totals = [b.fma(vector, key, total) for key, total in zip(loaded, totals)]
                    score = _added(b, transpose_vectors(b, totals))
                    adjust = self.adjustment(batch, head, query, 0)
                    b.store(self.scores, r * self.stride + i, score if adjust is None else adjust(score, i, mask))

                if not (shape.is_causal or shape.has_mask):
                    products()
                else:
                    visible = self.visible(batch, head, query, 0, i, mask)
                    visible = visible if mask is None else b.ir.and_(visible, mask)
                    with b.if_else(b.any(visible)) as (seen, unseen):
                        with seen:
                            products()
                        with unseen:
                            b.store(self.scores, r * self.stride + i, masked)

        b.vector_loop(0, self.total_keys, lanes, block)

    def _weigh(self, r) -> None:
        """Turns the scores of a row into weights; those behind the last key are zero."""
        b, lanes = self.b, self.lanes
        row = self.scores + r * self.stride
        masked = b.constant(MASKED[self.compute], self.compute, lanes)
        maxima, totals = ([b.variable(start) for _ in range(4)] for start in (masked, self.zero))
        greater = lambda x, y: b.select(b.compare(">", x, y), x, y)

        def find_maximum(i, mask, slot) -> None:
            score = b.load(row, i, lanes)
            score = score if mask is None else b.select(mask, score, masked)
            maxima[slot].set(greater(score, maxima[slot].get()))

        b.vector_loop(0, self.total_keys, lanes, find_maximum, unroll=4)
        best = greater(*(greater(x.get(), y.get()) for x, y in (maxima[:2], maxima[2:])))
        maximum = b.broadcast(b.reduce_lanes(best, greater), lanes)

        def weigh(i, mask, slot) -> None:
            weight = exp2_nonpositive(b, b.sub(b.load(row, i, lanes), maximum))
            weight = weight if mask is None else b.select(mask, weight, self.zero)
            b.store(row, i, weight)
            totals[slot].set(b.add(totals[slot].get(), weight))

        b.vector_loop(0, self.total_keys, lanes, weigh, unroll=4)
        total = b.reduce_lanes(_added(b, [t.get() for t in totals]), b.add)
        one = b.constant(1, self.compute)  # where there are no keys at all
        b.store(self.norms, r, b.select(b.compare("==", total, b.constant(0, self.compute)), one, total))

    def _add_values(self, batch, key_head) -> None:
        b, lanes, width = self.b, self.lanes, self.lanes * SUMS
        with b.loop(0, self.total_keys, VALUE_TILE) as first:
            last = b.min(first + VALUE_TILE, self.total_keys)
            with b.loop(0, self.rows) as r:
                for start in range(0, self.value_depth, width):
                    columns = range(start, min(start + width, self.value_depth), lanes)
                    self._add_tile(batch, key_head, r, first, last, columns)

    def _add_tile(self, batch, key_head, r, first, last, columns: range) -> None:
        b, lanes, depth = self.b, self.lanes, self.shape.value_depth
        at = r * self.value_depth
        sums = [b.variable(b.load(self.sums, at + column, lanes)) for column in columns]

        def block(i, mask, slot) -> None:
            weights = b.load(self.scores, r * self.stride + i, lanes)
            with b.if_then(b.any(b.compare(">", weights, self.zero))):
                values = self._rows_of(self.v, self.v_place, batch, key_head, depth, i, lanes, inside=mask is None)
                for j, value in enumerate(values):
                    weight = b.load_broadcast(self.scores, r * self.stride + i + j, lanes)
                    for variable, column in zip(sums, columns):
                        variable.set(b.fma(weight, self.load_part(value, column, depth), variable.get()))

        b.vector_loop(first, last, lanes, block)
        for variable, column in zip(sums, columns):
            b.store(self.sums, at + column, variable.get())

    def _finish(self, batch, first_head) -> None:
        """The weighted values divided by the sum of the weights."""
        b, lanes, depth = self.b, self.lanes, self.shape.value_depth
        with b.loop(0, self.rows) as r:
            query, head = self._place(r, first_head)
            target = self.out + ((batch * self.queries + query) * (self.shape.heads * depth) + head * depth)
            inverse = b.broadcast(b.div(b.constant(1, self.compute), b.load(self.norms, r)), lanes)
            for column in range(0, depth, lanes):
                valid = min(lanes, depth - column)
                mask = None if valid == lanes else b.tail_mask(valid, lanes)
                b.store(target, column, b.mul(b.load(self.sums, r * self.value_depth + column, lanes), inverse), mask)


def _added(b: KernelBuilder, vectors: list):
    """Their sum, added pair by pair."""
    while len(vectors) > 1:
        vectors = [b.add(x, y) for x, y in zip(vectors[::2], vectors[1::2])]
    return vectors[0]
