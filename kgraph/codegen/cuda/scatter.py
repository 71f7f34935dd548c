"""scatter_nd and scatter_along_axis, with every reduction. No atomics: the updates of a place are applied in their
order, by one thread, so that results depend on nothing but the operands.

A block owns a range of the rows that indices address, and a chunk of the columns of a row (`ranges`). It goes through
all indices in tiles: its threads look at some each and list those of the block's rows, in order. Then every thread
applies the listed updates of its own elements. All blocks read all indices, which are few beside the updates and come
from the cache; the number of blocks is bounded by the device, so that the work grows with the updates alone. A place
stays in a register as long as updates of it follow each other, and some updates are loaded ahead: a table of which
one row is hit by most indices (an embedding whose sequences are padded) waits for memory once for several of them.
Where the result lies where the base lay, nothing is copied: updated places alone are touched.

Additions to a table that is too small for the device's blocks are cut into parts, each with a table of its own; sums of
these follow. How many depends on the sizes and the device alone.

Where a scatter along an axis has many columns side by side, a thread owns one and walks through its updates.
"""

from __future__ import annotations

from collections.abc import Sequence

from kgraph.codegen.cuda import families, scalar_ops
from kgraph.codegen.cuda.assemble import load_index
from kgraph.codegen.cuda.gather import from_end
from kgraph.codegen.cuda.source import KernelSource, Operand, index_type
from kgraph.codegen.expressions import compute_dtype
from kgraph.codegen.kernel import KernelCall, KernelSpec, Launch
from kgraph.codegen.recurrent import writing_to
from kgraph.codegen.strided import word
from kgraph.ir import PRIMITIVES, Dim, Node, TensorType, Value, make_node
from kgraph.ir.dims import ceil_div, product

_HERE = "kgraph.codegen.cuda.scatter"
COMBINE = {"add": "add", "mul": "mul", "max": "maximum", "min": "minimum"}
WAVES = 4  # blocks per multiprocessor that the rows are split between
LOOKED_AT = 8  # indices of a tile per thread
AHEAD = 6  # updates that a thread loads before it applies them
LEAST_PART = 1024  # updates of a part, at least
WIDE = frozenset({"float32", "float64", "int32", "int64", "uint32", "uint64"})  # dtypes whose sums may be cut


def accepts(node: Node) -> str | None:
    """None where `lower` takes the node, else why not."""
    if node.name not in ("scatter_nd", "scatter_along_axis"):
        return f"{node.name} is no scatter"
    dtype, reduction = node.output.dtype, node.attrs["reduction"]
    if reduction != "update" and dtype == "bool":
        return f"no scatter with {reduction!r} for {dtype}"
    return None


def lower(node: Node, target) -> list[KernelCall]:
    """The one call of a scatter, or that of all parts and their sum."""
    base, indices, _ = node.inputs
    if node.name == "scatter_nd":
        depth = indices.shape[-1]
        sizes, row = base.shape[:depth], product(base.shape[depth:])
        return _lower_ranges(node, 1, sizes, row, product(indices.shape[:-1]), None, target)
    axis = node.attrs["axis"]
    outer, n, inner = product(base.shape[:axis]), base.shape[axis], product(base.shape[axis + 1 :])
    count = indices.shape[axis]
    columns = outer * inner
    wide = isinstance(inner, Dim) or inner >= target.group
    if wide and (isinstance(columns, Dim) or columns >= target.num_sms * target.group):
        return [_lower_columns(node, outer, n, inner, count, target)]
    return _lower_ranges(node, outer, (n,), 1, count * inner, inner, target)


def _call(
    node: Node, template: str, params: tuple, sizes: Sequence, extent, target, partials: Value | None = None
) -> KernelCall:
    """partials: what parts of the updates are added up in, in place of the base and the result."""
    base, indices, updates = node.inputs
    reduction = node.attrs["reduction"]
    dtype = word(node.output.type) if reduction == "update" else node.output.dtype
    name = f"{node.name}_{reduction}{'_partial' if partials else ''}"
    index = index_type([base.type.size, indices.type.size, updates.type.size])
    return KernelCall(
        KernelSpec(name, f"{_HERE}:{template}", (name, dtype, indices.dtype, reduction, *params, index)),
        [indices, updates, partials] if partials else [base, indices, updates, node.output],
        outputs=1,
        sizes=sizes,
        extent=extent,
        flops=updates.type.size,
        bytes=base.type.nbytes * 2 + updates.type.nbytes * 2 + indices.type.nbytes,
        notes={} if partials else {"inplace": ((3, 0),)},
        launch=Launch(target.block),
    )


def combined(k: KernelSource, reduction: str, before: str, value: str, dtype: str) -> str:
    """What a place holds after an update."""
    if reduction == "update":
        return value
    kept = compute_dtype(dtype)
    return scalar_ops.form(k, COMBINE[reduction], [before, value], [kept] * 2, kept)


def _is_filled_first(base: Operand | None, out: Operand) -> str:
    """The condition that the result does not lie where the base lay, which is there already."""
    return f"not same_place({base.name}, {out.name})" if base else "True"


# -- ranges of rows ---------------------------------------------------------------------------------------------------
def _lower_ranges(node: Node, outer, sizes: Sequence, row, count, inner, target) -> list[KernelCall]:
    """outer: independent scatters side by side, each with `count` updates. inner: None for index tuples; else update u
    stands for the column u % inner of the rows of `inner` elements that its index addresses, and `row` is 1."""
    width = target.block if isinstance(row, Dim) else min(target.block, 1 << max(row - 1, 0).bit_length())
    rows = product(sizes) * (1 if inner is None else inner)
    chunks = ceil_div(row, width)
    beside = outer * chunks
    wanted = WAVES * target.num_sms
    ranges = max(1, wanted // beside) if isinstance(beside, int) and beside else 1
    if isinstance(rows, int):
        ranges = min(ranges, max(1, rows))
    parts = _parts(node, beside * ranges, count, target) if isinstance(outer, int) and outer == 1 else 1
    params = (width, len(sizes), inner is not None, parts > 1)
    rest = [row, ranges, *([] if inner is None else [inner]), *sizes]
    if parts == 1:
        return [_call(node, "render_ranges", params, [outer, count, *rest], beside * ranges, target)]
    base, out = node.inputs[0], node.output
    partials = Value(TensorType((parts, *base.shape), base.dtype))
    numbers = [parts, ceil_div(count, parts), *rest, count]
    calls = [_call(node, "render_ranges", params, numbers, parts * beside * ranges, target, partials)]
    total = make_node(PRIMITIVES["reduce_sum"], [partials], {"axes": (0,), "keepdims": False})
    added = make_node(PRIMITIVES["add"], [base, total.output], {})
    return [*calls, *families.lower(total, target), *writing_to(out, added, families.lower(added, target))]


def _parts(node: Node, blocks, count, target) -> int:
    """Parts that the updates are cut into, where `blocks` leave most of the device idle."""
    sizes = node.inputs[0].shape
    if node.attrs["reduction"] != "add" or node.output.dtype not in WIDE:
        return 1
    if not all(isinstance(n, int) for n in (blocks, count, *sizes)) or not blocks:
        return 1
    least = 8 if target.simulator else LEAST_PART
    return max(1, min(WAVES * target.num_sms // blocks, count // least))


def render_ranges(params: tuple, target) -> str:
    """width: threads that own the columns of a row. A block has block / width such slots: a row goes to the slot that
    its number leaves as the remainder.

    base[outer, rows, row], indices[outer, count, depth], updates[outer, count, row]. Partial tables have no base: there
    `outer` counts parts, of which the last ones may be shorter.
    """
    name, dtype, index_dtype, reduction, width, depth, along, is_partial, index = params
    k = KernelSource(name, target, target.block, index)
    base = None if is_partial else k.operand(dtype)
    indices, updates, out = (k.operand(d) for d in (index_dtype, dtype, dtype))
    outer, count, row, ranges = (k.size() for _ in range(4))
    inner = k.size() if along else None
    sizes = [k.size() for _ in range(depth)]
    all_updates = k.size() if is_partial else None
    looked_at = 2 if target.simulator else LOOKED_AT
    tile = looked_at * target.block
    listed = _Listed(k, k.shared(index, tile), k.shared(index, tile), k.shared(index, target.block))
    rows = k.let(k.product(sizes + ([inner] if inner else [])), "rows")
    chunks = k.let(k.ceil_div(row, width), "chunks")
    slots = target.block // width
    thread = k.thread()
    slot, lane = k.let(k.div(thread, width), "slot"), k.let(k.mod(thread, width), "lane")
    share = k.let(k.ceil_div(rows, ranges), "share")
    with k.block_stride(k.let(k.mul(k.mul(outer, ranges), chunks), "total")) as number:
        which, part, chunk = k.coordinates(number, [outer, ranges, chunks])
        column = k.let(k.add(k.mul(chunk, width), lane), "column")
        first = k.let(k.mul(part, share), "first")
        first = k.let(f"({first} if {first} < {rows} else {rows})", "first")
        last = k.let(k.add(first, share), "last")
        last = k.let(f"({last} if {last} < {rows} else {rows})", "last")
        table = k.let(k.mul(which, k.mul(rows, row)), "table")
        # The barriers of the first list come between these copies and any update.
        with (
            k.suite(f"if {column} < {row} and {_is_filled_first(base, out)}:"),
            k.range(k.add(first, slot), last, slots) as r,
        ):
            at = k.let(k.add(table, k.add(k.mul(r, row), column)))
            k.store(out, at, k.load(base, at) if base else k.literal(0, dtype))
        begin, own = k.let(k.mul(which, count), "begin"), count
        if all_updates:
            left = k.let(f"({k.sub(all_updates, begin)} if {begin} < {all_updates} else {k.i(0)})", "left")
            own = k.let(f"({count} if {count} < {left} else {left})", "own")
        apply = _Apply(k, out, updates, reduction, slots, slot, column, row, table, begin)
        apply.reset()
        with k.range(k.i(0), own, tile) as start:

            def place_of(u: str) -> tuple[str, str]:
                """The row that update `u` goes to, and whether it is one of the block's."""
                entry = k.add(begin, u)
                found, tests = [], []
                for component, size in enumerate(sizes):
                    at = load_index(k, indices, k.add(k.mul(entry, depth), component) if depth > 1 else entry)
                    at = from_end(k, at, size)
                    tests.append(f"{at} >= int64(0) and {at} < int64({size})")
                    found.append(k.i(at))
                place = k.offset(found, sizes, [True] * depth)
                if inner is not None:
                    place = k.add(k.mul(place, inner), k.mod(entry if is_partial else u, inner))
                place = k.let(place, "place")
                return place, " and ".join([*tests, f"{place} >= {first}", f"{place} < {last}"])

            listed.fill(thread, start, own, looked_at, place_of)
            with k.suite(f"if {column} < {row}:"):
                apply.all(listed)
            k.synchronise()  # before the next tile takes the list
        apply.flush()
    return k.text()


class _Listed:
    """The updates of a tile that concern a block, in order: their places and their numbers, in shared memory."""

    def __init__(self, k: KernelSource, places: Operand, numbers: Operand, counts: Operand):
        self.k, self.places, self.numbers, self.counts = k, places, numbers, counts
        self.length = ""

    def fill(self, thread: str, start: str, count: str, looked_at: int, place_of) -> None:
        """Every thread looks at `looked_at` updates that follow each other. All threads of the block come here."""
        k = self.k
        own, mine = k.let(k.add(start, k.mul(thread, looked_at)), "own"), k.fresh("mine")
        k.line(f"{mine} = {k.i(0)}")
        stop = k.let(k.add(own, looked_at), "stop")
        stop = k.let(f"({stop} if {stop} < {count} else {count})", "stop")
        with k.range(own, stop, 1) as u:
            _, inside = place_of(u)
            with k.suite(f"if {inside}:"):
                k.line(f"{mine} = {k.add(mine, 1)}")
        # Inclusive sums over the threads.
        k.store(self.counts, thread, mine)
        k.synchronise()
        step = 1
        while step < k.block:
            before = k.fresh("before")
            k.line(f"{before} = {k.i(0)}")
            with k.suite(f"if {thread} >= {k.i(step)}:"):
                k.line(f"{before} = {self.counts.name}[{k.sub(thread, step)}]")
            k.synchronise()
            with k.suite(f"if {thread} >= {k.i(step)}:"):
                k.line(f"{self.counts.name}[{thread}] = {k.i(f'{self.counts.name}[{thread}] + {before}')}")
            k.synchronise()
            step *= 2
        to = k.fresh("to")
        k.line(f"{to} = {k.sub(k.load(self.counts, thread), mine)}")
        with k.suite(f"if {mine} > {k.i(0)}:"), k.range(own, stop, 1) as u:
            place, inside = place_of(u)
            with k.suite(f"if {inside}:"):
                k.store(self.places, to, place)
                k.store(self.numbers, to, u)
                k.line(f"{to} = {k.add(to, 1)}")
        k.synchronise()
        self.length = k.load(self.counts, k.i(k.block - 1))


class _Apply:
    """Brings listed updates into the elements that a thread owns; the latest of them is kept in a register."""

    def __init__(self, k: KernelSource, out: Operand, updates: Operand, reduction: str, slots: int, *places: str):
        self.k, self.out, self.updates, self.reduction, self.slots = k, out, updates, reduction, slots
        self.slot, self.column, self.row, self.table, self.first = places
        self.held, self.at, self.is_held = k.fresh("held"), k.fresh("at"), k.fresh("is_held")

    def reset(self) -> None:
        k = self.k
        k.line(f"{self.held} = {k.literal(0, self.out.dtype)}")
        k.line(f"{self.at} = {k.i(0)}")
        k.line(f"{self.is_held} = False")

    def flush(self) -> None:
        """Write what is held."""
        with self.k.suite(f"if {self.is_held}:"):
            self.k.store(self.out, self.at, self.held)

    def all(self, listed: _Listed) -> None:
        k = self.k
        ahead = 2 if k.target.simulator else AHEAD
        with k.range(k.i(0), listed.length, ahead) as start:
            loaded = []
            for number in range(ahead):
                entry = k.let(k.add(start, number))
                is_own, place, value = k.fresh("is_own"), k.fresh("place"), k.fresh("value")
                k.line(f"{is_own} = {entry} < {listed.length}")
                k.line(f"{place} = {k.i(0)}")
                k.line(f"{value} = {k.literal(0, self.out.dtype)}")
                with k.suite(f"if {is_own}:"):
                    k.line(f"{place} = {listed.places.name}[{entry}]")
                    if self.slots > 1:
                        k.line(f"{is_own} = {k.mod(place, self.slots)} == {self.slot}")
                with k.suite(f"if {is_own}:"):
                    update = k.add(self.first, f"{listed.numbers.name}[{entry}]")
                    k.line(f"{value} = {k.load(self.updates, k.add(k.mul(update, self.row), self.column))}")
                loaded.append((is_own, place, value))
            for is_own, place, value in loaded:
                with k.suite(f"if {is_own}:"):
                    at = k.let(k.add(self.table, k.add(k.mul(place, self.row), self.column)), "at")
                    with k.suite(f"if not {self.is_held} or {at} != {self.at}:"):
                        self.flush()
                        k.line(f"{self.held} = {k.load(self.out, at)}")
                        k.line(f"{self.at} = {at}")
                        k.line(f"{self.is_held} = True")
                    k.line(f"{self.held} = {combined(k, self.reduction, self.held, value, self.out.dtype)}")


# -- columns ----------------------------------------------------------------------------------------------------------
def _lower_columns(node: Node, outer, n, inner, count, target) -> KernelCall:
    extent = ceil_div(outer * inner, target.block)
    return _call(node, "render_columns", (), [outer, n, inner, count], extent, target)


def render_columns(params: tuple, target) -> str:
    """base[outer, n, inner], indices and updates[outer, count, inner]; a thread owns one column of one outer row."""
    name, dtype, index_dtype, reduction, index = params
    k = KernelSource(name, target, target.block, index)
    base, indices, updates, out = (k.operand(d) for d in (dtype, index_dtype, dtype, dtype))
    outer, n, inner, count = (k.size() for _ in range(4))
    with k.grid_stride(k.let(k.mul(outer, inner), "total")) as i:
        which, column = k.coordinates(i, [outer, inner])
        table = k.let(k.add(k.mul(k.mul(which, n), inner), column), "table")
        first = k.let(k.add(k.mul(k.mul(which, count), inner), column), "first")
        with k.suite(f"if {_is_filled_first(base, out)}:"), k.range(k.i(0), n, 1) as r:
            at = k.let(k.add(table, k.mul(r, inner)))
            k.store(out, at, k.load(base, at))
        with k.range(k.i(0), count, 1) as u:
            entry = k.let(k.add(first, k.mul(u, inner)))
            index_ = from_end(k, load_index(k, indices, entry), n)
            with k.suite(f"if {index_} >= int64(0) and {index_} < int64({n}):"):
                at = k.let(k.add(table, k.mul(k.i(index_), inner)))
                value = k.load(updates, entry)
                before = value if reduction == "update" else k.load(out, at)
                k.store(out, at, combined(k, reduction, before, value, dtype))
    return k.text()
