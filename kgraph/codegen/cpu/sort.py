"""sort, argsort, top_k, searchsorted.

Elements are compared by unsigned keys that grow with them: NaN has the greatest key, both zeros the same one, and
descending order complements the keys, so that equal elements keep their order either way. A row is sorted by rank where
it is short (each element counts, with vectors, those before it), else by radix, 8 bits at a time; both are stable and
free of data-dependent branches. Few greatest elements of a long row are kept in a list while the row streams by.
"""

from __future__ import annotations

from contextlib import contextmanager

from llvmlite import ir

from kgraph.codegen.cpu import vector_math
from kgraph.codegen.cpu.builder import (
    I8,
    I64,
    MEMORY_TYPES,
    Int,
    KernelBuilder,
    Pointer,
    compute_dtype,
    element_type,
    is_float,
    itemsize,
)
from kgraph.codegen.cpu.strided import SizeTable, resolve
from kgraph.codegen.kernel import KernelCall, KernelSpec
from kgraph.codegen.strided import WORDS
from kgraph.ir import Dim, Node
from kgraph.ir.dims import ceil_div, product

PRIMITIVES = frozenset({"sort", "argsort", "top_k", "searchsorted"})
RANKED_ROW = 128  # longest row that is sorted by rank
LISTED = 16  # most elements that top_k keeps in a list
RADIX_BITS = 8
VALUES_PER_UNIT = 64


def accepts(node: Node) -> str | None:
    """None where `lower` takes the node, else why not."""
    if node.name not in PRIMITIVES:
        return f"{node.name} is no sort"
    if node.inputs[0].dtype not in MEMORY_TYPES:
        return f"no sort of {node.inputs[0].dtype}"
    if node.name == "top_k" and isinstance(node.attrs["k"], Dim):
        return "top_k of a symbolic number of elements"
    return None


def key_dtype(dtype: str) -> str:
    """The unsigned dtype of the keys for elements of a dtype."""
    return "uint64" if dtype in ("float64", "int64", "uint64") else "uint32"


def lower(node: Node, target) -> list[KernelCall]:
    """The one call of a sorting node."""
    if node.name == "searchsorted":
        return [_lower_search(node)]
    x = node.inputs[0]
    axis = node.attrs.get("axis", x.type.rank - 1)
    n, inner = x.shape[axis], product(x.shape[axis + 1 :])
    kept = node.attrs.get("k", n)
    descending = bool(node.attrs.get("descending", True))
    table = SizeTable()
    results = tuple((v.dtype, node.name == "argsort" or k == 1) for k, v in enumerate(node.outputs))
    params = (x.dtype, descending, results, table(n), table(inner), table(kept))
    padded = ceil_div(n, 16) * 16
    word = 8 if key_dtype(x.dtype) == "uint64" else 4
    rows = product(x.shape[:axis]) * inner
    return [
        KernelCall(
            KernelSpec(node.name, "sort:render_sort", params),
            [x, *node.outputs],
            outputs=len(node.outputs),
            sizes=table.values,
            extent=rows,
            flops=rows * n * 8 * word,
            bytes=x.type.nbytes + sum((v.type.nbytes for v in node.outputs), 0),
            scratch_bytes=padded * (2 * (word + 4)) + word * (4 << RADIX_BITS),
        )
    ]


def _lower_search(node: Node) -> KernelCall:
    sequence, values = node.inputs
    table = SizeTable()
    count = values.type.size
    params = (sequence.dtype, node.attrs["side"], node.output.dtype, table(sequence.shape[0]), table(count))
    return KernelCall(
        KernelSpec("searchsorted", "sort:render_search", params),
        [sequence, values, node.output],
        outputs=1,
        sizes=table.values,
        extent=ceil_div(count, VALUES_PER_UNIT),
        flops=count * 64,
        bytes=sequence.type.nbytes + values.type.nbytes + node.output.type.nbytes,
    )


# -- keys -------------------------------------------------------------------------------------------------------------
def key_of(b: KernelBuilder, value: ir.Value, dtype: str, descending: bool = False) -> ir.Value:
    """The unsigned keys of a value in compute form, scalar or vector."""
    kind = vector_math.with_element(value, MEMORY_TYPES[key_dtype(dtype)])
    bits = (kind.element if isinstance(kind, ir.VectorType) else kind).width
    top = b.constant_of(kind, 1 << (bits - 1))
    if is_float(value):
        # Adding zero makes the negative zero positive.
        raw = b.ir.bitcast(b.add(value, b.constant_of(value.type, 0.0)), kind)
        negative = b.ir.icmp_signed("<", raw, b.constant_of(kind, 0))
        key = b.ir.select(negative, b.ir.not_(raw), b.ir.or_(raw, top))
        key = b.ir.select(b.ir.fcmp_unordered("uno", value, value), b.constant_of(kind, -1), key)
    elif dtype.startswith("int"):
        wide = value if value.type == kind else b.ir.sext(value, kind)
        key = b.ir.xor(wide, top)
    else:
        key = value if value.type == kind else b.ir.zext(value, kind)
    return b.ir.not_(key) if descending else key


@contextmanager
def while_loop(b: KernelBuilder, condition):
    """`while condition():` with `condition` emitting an i1."""
    head, body, after = (b.function.append_basic_block(name) for name in ("while", "do", "done"))
    b.ir.branch(head)
    b.ir.position_at_end(head)
    b.ir.cbranch(condition(), body, after)
    b.ir.position_at_end(body)
    yield
    b.ir.branch(head)
    b.ir.position_at_end(after)


# -- sort, argsort, top_k ---------------------------------------------------------------------------------------------
class SortKernel:
    """What is known while the kernel is written. A unit is one row of x[outer, n, inner] along its middle axis."""

    def __init__(self, params, target):
        self.dtype, self.descending, self.results, n, inner, kept = params
        b = self.b = KernelBuilder("sort", target)
        self.n, self.inner, self.kept = resolve(b, n), resolve(b, inner), resolve(b, kept)
        self.key = key_dtype(self.dtype)
        self.word = 8 if self.key == "uint64" else 4
        padded = b.ceil_div(self.n, 16) * 16
        at: int | Int = 0
        places = []
        # A buffer and the one it is sorted into count as one memory.
        for name, dtype, count in (
            ("keys", self.key, padded * self.word),
            ("keys", self.key, padded * self.word),
            ("order", "uint32", padded * 4),
            ("order", "uint32", padded * 4),
            ("counts", "uint32", 0),
        ):
            places.append(Pointer(b, b.scratch("uint8", at).value, dtype, name))
            at = at + count
        self.keys, self.other_keys, self.order, self.other_order, self.counts = places

    def render(self) -> str:
        b = self.b
        with b.loop(b.begin, b.end) as unit:
            outer, column = unit // self.inner, unit % self.inner
            row = outer * (self.n * self.inner) + column
            source = b.operand(0, self.dtype) + row
            target = outer * (self.kept * self.inner) + column
            if isinstance(self.n, int):
                self.sort_row(source, target, "rank" if self.n <= RANKED_ROW else self.long_method())
            else:
                with b.if_else(self.n <= RANKED_ROW) as (short, long):
                    with short:
                        self.sort_row(source, target, "rank")
                    with long:
                        self.sort_row(source, target, self.long_method())
        return b.ir_text()

    def long_method(self) -> str:
        few = isinstance(self.kept, int) and self.kept <= LISTED and len(self.results) == 2
        return "list" if few else "radix"

    def sort_row(self, source: Pointer, target, method: str) -> None:
        if method == "list":
            self.list_greatest(source)
            self.write(source, target, self.order)
            return
        b = self.b
        with b.loop(0, self.n) as i:
            b.store(self.keys, i, self.key_at(source, i, self.descending))
        if method == "rank":
            self.rank()
            self.write(source, target, self.order)
        else:
            self.write(source, target, self.radix())

    def key_at(self, source: Pointer, i, descending: bool) -> ir.Value:
        return key_of(self.b, self.b.load(source, i * self.inner), compute_dtype(self.dtype), descending)

    def rank(self) -> None:
        """order[number of elements ahead of i] = i."""
        b = self.b
        lanes = b.target.vector_bytes // self.word
        numbers = b.lane_numbers("int64", lanes)
        count_type = ir.IntType(lanes)
        popcount = b.module.declare_intrinsic("llvm.ctpop", [count_type])
        with b.loop(0, self.n) as i:
            own = b.load_broadcast(self.keys, i, lanes)
            total = b.variable(b.i64(0))

            def count(j, mask, slot, own=own, total=total, i=i) -> None:
                others = b.load(self.keys, j, lanes, mask)
                earlier = b.ir.icmp_signed("<", numbers, b.broadcast(b.i64(i - j), lanes))
                ahead = b.ir.and_(b.ir.icmp_unsigned("==", others, own), earlier)
                ahead = b.ir.or_(ahead, b.ir.icmp_unsigned("<", others, own))
                if mask is not None:
                    ahead = b.ir.and_(ahead, mask)
                bits = b.ir.call(popcount, [b.ir.bitcast(ahead, count_type)])
                total.set(b.add(total.get(), b.ir.zext(bits, I64) if lanes < 64 else bits))

            b.vector_loop(0, self.n, lanes, count)
            b.store(self.order, Int(b, total.get()), b.ir.trunc(b.i64(i), MEMORY_TYPES["uint32"]))

    def radix(self) -> Pointer:
        """Sorts by each digit in turn, from the least significant one; gives where the order ended up."""
        b, digits = self.b, self.word * 8 // RADIX_BITS
        size = 1 << RADIX_BITS
        one, zero = b.constant(1, "uint32"), b.constant(0, "uint32")
        with b.loop(0, digits * size) as i:
            b.store(self.counts, i, zero)
        with b.loop(0, self.n) as i:
            b.store(self.order, i, b.ir.trunc(b.i64(i), MEMORY_TYPES["uint32"]))
            key = b.load(self.keys, i)
            for digit in range(digits):
                place = self.digit(key, digit) + digit * size
                b.store(self.counts, place, b.add(b.load(self.counts, place), one))
        flipped = b.variable(b.constant(False, "bool"))
        with b.loop(0, digits) as digit:
            table = self.counts + digit * size
            source = self.pick(flipped, self.keys, self.other_keys)
            source_order = self.pick(flipped, self.order, self.other_order)
            target = self.pick(flipped, self.other_keys, self.keys)
            target_order = self.pick(flipped, self.other_order, self.order)
            # A digit that all keys share changes nothing.
            common = b.load(table, self.digit_at(b.load(source, 0), digit))
            with b.if_then(b.ir.icmp_signed("!=", b.ir.zext(common, I64), b.i64(self.n))):
                start = b.variable(zero)
                with b.loop(0, size) as i:
                    count = b.load(table, i)
                    b.store(table, i, start.get())
                    start.set(b.add(start.get(), count))
                with b.loop(0, self.n) as i:
                    key = b.load(source, i)
                    place = self.digit_at(key, digit)
                    to = b.load(table, place)
                    b.store(table, place, b.add(to, one))
                    to = Int(b, b.ir.zext(to, I64))
                    b.store(target, to, key)
                    b.store(target_order, to, b.load(source_order, i))
                flipped.set(b.ir.not_(flipped.get()))
        return self.pick(flipped, self.order, self.other_order)

    def pick(self, flipped, first: Pointer, second: Pointer) -> Pointer:
        """`first`, or `second` where the roles are exchanged."""
        b = self.b
        return Pointer(b, b.ir.select(flipped.get(), second.value, first.value), first.dtype, first.scope)

    def digit(self, key: ir.Value, digit: int) -> Int:
        b = self.b
        shifted = b.ir.lshr(key, ir.Constant(key.type, digit * RADIX_BITS))
        return Int(b, b.ir.zext(b.ir.trunc(shifted, I8), I64))

    def digit_at(self, key: ir.Value, digit: Int) -> Int:
        """`digit` with a run-time digit number."""
        b = self.b
        shift = b.i64(digit * RADIX_BITS)
        shift = shift if key.type.width == 64 else b.ir.trunc(shift, key.type)
        return Int(b, b.ir.zext(b.ir.trunc(b.ir.lshr(key, shift), I8), I64))

    def list_greatest(self, source: Pointer) -> None:
        """keys and order hold the greatest elements so far, in descending order, while the row streams by."""
        b = self.b
        index_type = MEMORY_TYPES["uint32"]
        kept = self.kept

        def insert(key: ir.Value, index: ir.Value, last: int | Int) -> None:
            """Moves what is smaller one place back, from place `last` on, and puts the element in between."""
            place = b.variable(b.i64(last))
            with while_loop(b, lambda: self.goes_ahead(key, Int(b, place.get()))):
                at = Int(b, place.get())
                b.store(self.keys, at, b.load(self.keys, at - 1))
                b.store(self.order, at, b.load(self.order, at - 1))
                place.set(b.i64(at - 1))
            b.store(self.keys, Int(b, place.get()), key)
            b.store(self.order, Int(b, place.get()), index)

        if kept == 0:
            return
        with b.loop(0, kept) as i:
            insert(self.key_at(source, i, False), b.ir.trunc(b.i64(i), index_type), i)
        least = b.variable(b.load(self.keys, kept - 1))
        with b.loop(kept, self.n) as i:
            key = self.key_at(source, i, False)
            with b.if_then(b.ir.icmp_unsigned(">", key, least.get()), likely=False):
                insert(key, b.ir.trunc(b.i64(i), index_type), kept - 1)
                least.set(b.load(self.keys, kept - 1))

    def goes_ahead(self, key: ir.Value, place: Int) -> ir.Value:
        """Whether `key` belongs ahead of the element before `place`; false at the first place."""
        b = self.b
        before = b.max(place - 1, 0)
        smaller = b.ir.icmp_unsigned("<", b.load(self.keys, before), key)
        return b.ir.and_(place > 0, smaller)

    def write(self, source: Pointer, target, order: Pointer) -> None:
        """The elements or their positions, in order."""
        b = self.b
        word = WORDS[itemsize(self.dtype)]
        for number, (dtype, is_index) in enumerate(self.results):
            out = b.operand(1 + number, dtype if is_index else word) + target
            with b.loop(0, self.kept) as i:
                index = b.load(order, i)
                place = Int(b, b.ir.zext(index, I64))
                if is_index:
                    value = resized(b, index, MEMORY_TYPES[dtype])
                else:
                    value = b.load(source.cast(word), place * self.inner, raw=True)
                b.store(out, i * self.inner, value, raw=True)


def resized(b: KernelBuilder, index: ir.Value, kind: ir.Type) -> ir.Value:
    """Non-negative indices as another integer type."""
    if kind == index.type:
        return index
    width = (kind.element if isinstance(kind, ir.VectorType) else kind).width
    return (b.ir.zext if width > element_type(index).width else b.ir.trunc)(index, kind)


def render_sort(params, target) -> str:
    """LLVM IR of a sort, argsort or top_k kernel."""
    return SortKernel(params, target).render()


# -- searchsorted -----------------------------------------------------------------------------------------------------
def render_search(params, target) -> str:
    """A unit is VALUES_PER_UNIT values, searched a vector at a time: the lanes halve their ranges in step."""
    dtype, side, out_dtype, n, count = params
    b = KernelBuilder("searchsorted", target)
    sequence, values, out = b.operand(0, dtype), b.operand(1, dtype), b.operand(2, out_dtype)
    n, count = resolve(b, n), resolve(b, count)
    symbol = "<" if side == "left" else "<="
    compute = compute_dtype(dtype)
    lanes = target.vector_bytes // itemsize(key_dtype(dtype))
    wide = ir.VectorType(I64, lanes)

    def search(i, mask, slot) -> None:
        own = key_of(b, b.load(values, i, lanes, mask), compute)
        base, rest = b.variable(b.constant_of(wide, 0)), b.variable(b.i64(n))

        def passes(place) -> ir.Value:
            return b.ir.icmp_unsigned(symbol, key_of(b, b.gather(sequence, place), compute), own)

        with while_loop(b, lambda: Int(b, rest.get()) > 1):
            half = Int(b, rest.get()) // 2
            step = b.broadcast(half.value, lanes)
            ahead = b.ir.add(base.get(), step)
            base.set(b.ir.select(passes(b.sub(ahead, 1)), ahead, base.get()))
            rest.set(b.i64(Int(b, rest.get()) - half))
        with b.if_then(b.int(n) > 0):
            base.set(b.ir.add(base.get(), b.ir.zext(passes(base.get()), wide)))
        b.store(out, i, resized(b, base.get(), vector_math.with_element(base.get(), MEMORY_TYPES[out_dtype])), mask)

    b.vector_loop(b.begin * VALUES_PER_UNIT, b.min(b.end * VALUES_PER_UNIT, count), lanes, search)
    return b.ir_text()
