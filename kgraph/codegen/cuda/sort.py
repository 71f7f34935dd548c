"""sort, argsort, top_k, searchsorted.

Elements are compared by unsigned keys that grow with them: NaN has the greatest key, both zeros the same one, and
descending order complements the keys. Tiles of a row are sorted in shared memory by a bitonic network on pairs of key
and position, so that equal elements keep their order. Then
- of few greatest elements each tile leaves its own greatest, which are sorted again until one tile holds them all;
- else sorted runs are merged in pairs, pass by pass: an element's place is its own number in its run and the number of
  elements of the other run that come before it, found by bisection. So no thread waits for another one.
Rows of unknown length take one block each, which does all of that by itself.
"""

from __future__ import annotations

from collections.abc import Callable

from kgraph.codegen.cuda import scalar_ops
from kgraph.codegen.cuda.source import KernelSource, Operand, index_type
from kgraph.codegen.expressions import DTYPES
from kgraph.codegen.kernel import KernelCall, KernelSpec, Launch, Temporary
from kgraph.ir import Dim, Node, TensorType
from kgraph.ir.dims import ceil_div, product

PRIMITIVES = frozenset({"sort", "argsort", "top_k", "searchsorted"})
TEMPLATE = "kgraph.codegen.cuda.sort:render_{}"
MOST_TILE, SIMULATED_TILE = 2048, 8  # elements of a row that a block sorts at once


def accepts(node: Node) -> str | None:
    """None where `lower` takes the node, else why not."""
    if node.name not in PRIMITIVES:
        return f"{node.name} is no sort"
    if node.inputs[0].dtype not in DTYPES:
        return f"no sort of {node.inputs[0].dtype}"
    if node.name == "top_k" and isinstance(node.attrs["k"], Dim):
        return "top_k of a symbolic number of elements"
    return None


def key_dtype(dtype: str) -> str:
    """The unsigned dtype of the keys for elements of a dtype."""
    return "uint64" if dtype in ("float64", "int64", "uint64") else "uint32"


def lower(node: Node, target) -> list[KernelCall]:
    """One kernel call for short rows and those of unknown length, one per pass otherwise."""
    return [_lower_search(node, target)] if node.name == "searchsorted" else _Sort(node, target).calls()


class _Sort:
    """The calls of a sort, argsort or top_k of x[outer, n, inner] along the middle axis; rows: outer * inner."""

    def __init__(self, node: Node, target):
        self.node, self.target, self.x = node, target, node.inputs[0]
        axis = node.attrs.get("axis", self.x.type.rank - 1)
        self.n, self.inner = self.x.shape[axis], product(self.x.shape[axis + 1 :])
        self.rows = product(self.x.shape[:axis]) * self.inner
        self.kept = node.attrs.get("k", self.n)
        descending = bool(node.attrs.get("descending", True))
        results = tuple((v.dtype, node.name == "argsort" or k == 1) for k, v in enumerate(node.outputs))
        # What all kernels of the node have in common.
        self.common = (self.x.dtype, descending, results, index_type([self.x.type.size]))

    def calls(self) -> list[KernelCall]:
        most = SIMULATED_TILE if self.target.simulator else MOST_TILE
        n, outputs = self.n, list(self.node.outputs)
        if not isinstance(n, int):
            sizes, buffers = [self.rows, n, self.inner, self.kept, n], [*self._pair(n), *self._pair(n)]
            return [self._call("rows", (most,), [self.x], [*outputs, *buffers], sizes, self.rows, self.target.block)]
        tile = min(most, max(2, 1 << max(n - 1, 0).bit_length()))
        if n <= tile:
            return [self._tiles(tile, n, [], outputs, self.kept, n)]
        if 2 * self.kept <= tile:
            return self._greatest(tile, outputs)
        run = tile
        at: list = self._pair(n)
        calls = [self._tiles(tile, n, [], at, tile, n)]
        while run < n:
            last = 2 * run >= n
            into: list = outputs if last else self._pair(n)
            sizes = [self.rows, n, self.inner, self.kept, n, run]
            extent = ceil_div(self.rows * n, self.target.block)
            operands = [self.x, *at] if last else at
            calls.append(self._call("merge", (last,), operands, into, sizes, extent, self.target.block))
            run, at = 2 * run, into
        return calls

    def _greatest(self, tile: int, outputs: list) -> list[KernelCall]:
        calls: list[KernelCall] = []
        n, at = self.n, list[Temporary]()
        while n > tile:
            tiles = -(-n // tile)
            left = (tiles - 1) * self.kept + min(self.kept, n - (tiles - 1) * tile)
            into = self._pair(left)
            calls.append(self._tiles(tile, n, at, into, self.kept, left))
            n, at = left, into
        return [*calls, self._tiles(tile, n, at, outputs, self.kept, n)]

    def _pair(self, n) -> list[Temporary]:
        """Keys and positions of all rows."""
        return [Temporary(TensorType((self.rows, n), d)) for d in (key_dtype(self.x.dtype), "uint32")]

    def _tiles(self, tile: int, n: int, at: list, into: list, kept, left: int) -> KernelCall:
        """at: the pair that is sorted, or none for x itself. into: the outputs, or a pair of `left` elements a row."""
        block = self.target.block
        units = max(1, 2 * block // tile)
        final = not isinstance(into[0], Temporary)
        operands = [self.x, *at] if final or not at else at
        sizes = [self.rows, n, self.inner, kept, self.n, left]
        extent = ceil_div(self.rows * ceil_div(n, tile), units)
        return self._call("tiles", (tile, units, not at, final), operands, into, sizes, extent, block)

    def _call(self, kernel: str, own: tuple, inputs: list, outputs: list, sizes: list, extent, block) -> KernelCall:
        operands = [*inputs, *outputs]
        return KernelCall(
            spec=KernelSpec(f"{self.node.name}_{kernel}", TEMPLATE.format(kernel), (*self.common, *own)),
            operands=operands,
            outputs=len(outputs),
            sizes=sizes,
            extent=extent,
            flops=self.x.type.size * 32,
            bytes=sum((o.type.nbytes for o in operands), 0),
            launch=Launch(block),
        )


def _lower_search(node: Node, target) -> KernelCall:
    sequence, values = node.inputs
    count = values.type.size
    params = (sequence.dtype, node.attrs["side"], node.output.dtype, index_type([sequence.type.size, count]))
    return KernelCall(
        KernelSpec("searchsorted", TEMPLATE.format("search"), params),
        [sequence, values, node.output],
        outputs=1,
        sizes=[sequence.shape[0], count],
        extent=ceil_div(count, target.block),
        flops=count * 64,
        bytes=sequence.type.nbytes + values.type.nbytes + node.output.type.nbytes,
        launch=Launch(target.block),
    )


# -- keys -------------------------------------------------------------------------------------------------------------
def key_of(k: KernelSource, value: str, dtype: str, descending: bool = False) -> str:
    """The unsigned key of a value in compute form."""
    kind = key_dtype(dtype)
    c = lambda number: k.literal(number, kind)
    ones, top = c(-1), c(1 << (63 if kind == "uint64" else 31))
    if dtype == "bool":
        key = f"({c(1)} if {value} else {c(0)})"
    elif scalar_ops.is_float(dtype):
        # Adding zero makes the negative zero positive.
        positive = f"{value} + {k.literal(0, dtype)}"
        bits = f"double_as_longlong({positive})" if kind == "uint64" else f"float_as_int({positive})"
        raw = k.let(f"{kind}({bits})")
        ordered = f"({kind}({raw} ^ {ones}) if {raw} >= {top} else {kind}({raw} | {top}))"
        key = f"({ones} if {value} != {value} else {ordered})"
    elif scalar_ops.is_signed(dtype):
        key = f"{kind}({kind}({value}) ^ {top})"
    else:
        key = f"{kind}({value})"
    key = k.let(key)
    return k.let(f"{kind}({key} ^ {ones})") if descending else key


def count_before(k: KernelSource, low: str, high: str, own: str, or_equal: bool, key_at: Callable[[str], str]) -> str:
    """How many of the ascending keys at places [low, high) are less than `own` (or equal to it), by bisection."""
    first, last = k.fresh("first"), k.fresh("last")
    k.line(f"{first} = {low}")
    k.line(f"{last} = {high}")
    with k.suite(f"while {first} < {last}:"):
        middle = k.let(k.div(k.add(first, last), 2))
        with k.suite(f"if {key_at(middle)} {'<=' if or_equal else '<'} {own}:"):
            k.line(f"{first} = {k.add(middle, 1)}")
        with k.suite("else:"):
            k.line(f"{last} = {middle}")
    return k.let(k.sub(first, low))


# -- kernels ----------------------------------------------------------------------------------------------------------
class _Kernel:
    """What the kernels of a sort share while they are written.

    Sizes: rows; n, the elements of each that are left; inner; kept, how many become results; length, the elements of a
    row of x; and what the kernel has of its own.
    """

    def __init__(self, name: str, params: tuple, target):
        self.dtype, self.descending, self.results, index = params
        self.k = KernelSource(f"sort_{name}", target, target.block, index)
        self.key = key_dtype(self.dtype)

    def pair(self) -> tuple[Operand, Operand]:
        return self.k.operand(self.key), self.k.operand("uint32")

    def result_operands(self) -> list[Operand]:
        return [self.k.operand(dtype) for dtype, _ in self.results]

    def read_sizes(self, count: int) -> list[str]:
        sizes = [self.k.size() for _ in range(count)]
        self.rows, self.n, self.inner, self.kept, self.length = sizes[:5]
        return sizes[5:]

    def place(self, row: str, i: str, length: str) -> str:
        """The index of element i of a row in an array [outer, length, inner]."""
        k = self.k
        outer = k.mul(k.add(k.mul(k.div(row, self.inner), length), i), self.inner)
        return k.let(k.add(outer, k.mod(row, self.inner)))

    def key_at(self, x: Operand, row: str, i: str) -> str:
        k = self.k
        return key_of(k, k.load(x, self.place(row, i, self.length)), self.dtype, self.descending)

    def write(self, x: Operand, outputs: list[Operand], row: str, number: str, order: str) -> None:
        """Stores the element at position `order` of a row, or the position, as its result `number`."""
        k = self.k
        to = self.place(row, number, self.kept)
        for output, (dtype, is_index) in zip(outputs, self.results):
            if is_index:
                k.store(output, to, scalar_ops.convert(k, f"int64({order})", "int64", dtype))
            else:  # elements move as they are
                k.line(f"{output.name}[{to}] = {x.name}[{self.place(row, k.i(order), self.length)}]")

    def sort_shared(self, keys: Operand, orders: Operand, tile: int, slots: int, thread: str) -> None:
        """Sorts each `tile` of both arrays of `slots` elements; all threads of the block come here."""
        k = self.k
        size, stride = k.fresh("half"), k.fresh("stride")
        k.line(f"{size} = {k.i(2)}")
        with k.suite(f"while {size} <= {k.i(tile)}:"):
            k.line(f"{stride} = {k.div(size, 2)}")
            with k.suite(f"while {stride} > {k.i(0)}:"):
                with k.range(thread, k.i(slots // 2), k.block) as pair:
                    low = k.let(k.sub(k.mul(pair, 2), k.mod(pair, stride)))
                    high = k.let(k.add(low, stride))
                    down = f"{k.mod(k.div(low, size), 2)} == {k.i(1)}"
                    if tile < slots:
                        down = f"{size} < {k.i(tile)} and {down}"
                    down = k.let(f"({down})", "down")
                    mine, other = k.load(keys, low), k.load(keys, high)
                    at, other_at = k.load(orders, low), k.load(orders, high)
                    greater = k.let(f"({mine} > {other} or ({mine} == {other} and {at} > {other_at}))")
                    with k.suite(f"if {greater} != {down}:"):
                        for array, place, value in (
                            (keys, low, other),
                            (keys, high, mine),
                            (orders, low, other_at),
                            (orders, high, at),
                        ):
                            k.store(array, place, value)
                k.synchronise()
                k.line(f"{stride} = {k.div(stride, 2)}")
            k.line(f"{size} = {k.mul(size, 2)}")

    def merged_place(self, keys: Operand, base: str, i: str, run: str) -> str:
        """Where element i of a row, whose runs of `run` begin at index `base`, stands in merged pairs of runs."""
        k = self.k
        begin = k.let(k.mul(k.div(i, k.mul(run, 2)), k.mul(run, 2)))
        minimum = lambda x: k.let(f"({x} if {x} < {self.n} else {self.n})")
        middle, end = minimum(k.add(begin, run)), minimum(k.add(begin, k.mul(run, 2)))
        own = k.load(keys, k.add(base, i))
        place = k.fresh("place")
        key_at = lambda at: k.load(keys, at)
        with k.suite(f"if {i} < {middle}:"):
            before = count_before(k, k.add(base, middle), k.add(base, end), own, False, key_at)
            k.line(f"{place} = {k.add(i, before)}")
        with k.suite("else:"):
            before = count_before(k, k.add(base, begin), k.add(base, middle), own, True, key_at)
            k.line(f"{place} = {k.add(k.add(begin, k.sub(i, middle)), before)}")
        return place


def render_tiles(params: tuple, target) -> str:
    """Sorts tiles of rows, of x or of a pair; leaves the first `kept` of each in a pair, or as the results."""
    *common, tile, units, first, final = params
    kernel = _Kernel("tiles", tuple(common), target)
    k = kernel.k
    x = k.operand(kernel.dtype) if first or final else None
    source = None if first else kernel.pair()
    outputs = kernel.result_operands() if final else list(kernel.pair())
    (left,) = kernel.read_sizes(6)
    slots = tile * units
    keys, orders = k.shared(kernel.key, slots), k.shared("uint32", slots)
    thread = k.thread()
    tiles = k.let(k.ceil_div(kernel.n, tile), "tiles")
    total = k.let(k.mul(kernel.rows, tiles), "total")
    with k.block_stride(k.let(k.ceil_div(total, units))) as group:

        def place(slot: str) -> tuple[str, str, str, str]:
            """(condition that there is such an element, row, number of the tile, number in the tile)"""
            number = k.let(k.add(k.mul(group, units), k.div(slot, tile)))
            row, part = k.let(k.div(number, tiles)), k.let(k.mod(number, tiles))
            j = k.let(k.mod(slot, tile))
            return f"{number} < {total} and {k.add(k.mul(part, tile), j)} < {kernel.n}", row, part, j

        with k.range(thread, k.i(slots), k.block) as slot:
            inside, row, part, j = place(slot)
            # What comes after everything else, whatever the keys.
            k.store(keys, slot, k.literal(-1, kernel.key))
            k.store(orders, slot, k.literal(-1, "uint32"))
            with k.suite(f"if {inside}:"):
                i = k.let(k.add(k.mul(part, tile), j))
                if source is None:
                    assert x is not None
                    k.store(keys, slot, kernel.key_at(x, row, i))
                    k.store(orders, slot, f"uint32({i})")
                else:
                    at = k.let(k.add(k.mul(row, kernel.n), i))
                    k.store(keys, slot, k.load(source[0], at))
                    k.store(orders, slot, k.load(source[1], at))
        k.synchronise()
        kernel.sort_shared(keys, orders, tile, slots, thread)
        with k.range(thread, k.i(slots), k.block) as slot:
            inside, row, part, j = place(slot)
            with k.suite(f"if {inside} and {j} < {kernel.kept}:"):
                if final:
                    assert x is not None
                    kernel.write(x, outputs, row, j, k.load(orders, slot))
                else:
                    to = k.let(k.add(k.mul(row, left), k.add(k.mul(part, kernel.kept), j)))
                    k.store(outputs[0], to, k.load(keys, slot))
                    k.store(outputs[1], to, k.load(orders, slot))
        k.synchronise()  # before the next tiles take the arrays
    return k.text()


def render_merge(params: tuple, target) -> str:
    """Merges sorted runs in pairs, from one pair of keys and positions to another, or to the results."""
    *common, last = params
    kernel = _Kernel("merge", tuple(common), target)
    k = kernel.k
    x = k.operand(kernel.dtype) if last else None
    keys, orders = kernel.pair()
    outputs = kernel.result_operands() if last else list(kernel.pair())
    (run,) = kernel.read_sizes(6)
    with k.grid_stride(k.let(k.mul(kernel.rows, kernel.n), "total")) as number:
        row, i = k.let(k.div(number, kernel.n)), k.let(k.mod(number, kernel.n))
        base = k.let(k.mul(row, kernel.n))
        place = kernel.merged_place(keys, base, i, run)
        if x is not None:
            with k.suite(f"if {place} < {kernel.kept}:"):
                kernel.write(x, outputs, row, place, k.load(orders, number))
        else:
            to = k.let(k.add(base, place))
            k.store(outputs[0], to, k.load(keys, number))
            k.store(outputs[1], to, k.load(orders, number))
    return k.text()


def render_rows(params: tuple, target) -> str:
    """Sorts rows of any length, a block each: tiles first, then passes of merging between two pairs."""
    *common, tile = params
    kernel = _Kernel("rows", tuple(common), target)
    k = kernel.k
    x, outputs = k.operand(kernel.dtype), kernel.result_operands()
    here, there = kernel.pair(), kernel.pair()
    kernel.read_sizes(5)
    shared = k.shared(kernel.key, tile), k.shared("uint32", tile)
    thread = k.thread()
    with k.block_stride(kernel.rows) as row:
        base = k.let(k.mul(row, kernel.n))
        with k.range(k.i(0), kernel.n, tile) as begin:
            with k.range(thread, k.i(tile), k.block) as slot:
                k.store(shared[0], slot, k.literal(-1, kernel.key))
                k.store(shared[1], slot, k.literal(-1, "uint32"))
                i = k.let(k.add(begin, slot))
                with k.suite(f"if {i} < {kernel.n}:"):
                    k.store(shared[0], slot, kernel.key_at(x, row, i))
                    k.store(shared[1], slot, f"uint32({i})")
            k.synchronise()
            kernel.sort_shared(*shared, tile, tile, thread)
            with k.range(thread, k.i(tile), k.block) as slot:
                i = k.let(k.add(begin, slot))
                with k.suite(f"if {i} < {kernel.n}:"):
                    _move(k, shared, slot, here, k.let(k.add(base, i)))
            k.synchronise()
        run = k.fresh("run")
        k.line(f"{run} = {k.i(tile)}")
        with k.suite(f"while {run} < {kernel.n}:"):
            with k.range(thread, kernel.n, k.block) as i:
                place = kernel.merged_place(here[0], base, i, run)
                _move(k, here, k.let(k.add(base, i)), there, k.let(k.add(base, place)))
            k.synchronise()
            with k.range(thread, kernel.n, k.block) as i:
                at = k.let(k.add(base, i))
                _move(k, there, at, here, at)
            k.synchronise()
            k.line(f"{run} = {k.mul(run, 2)}")
        with k.range(thread, kernel.kept, k.block) as i:
            kernel.write(x, outputs, row, i, k.load(here[1], k.add(base, i)))
    return k.text()


def _move(k: KernelSource, source: tuple, at: str, target: tuple, to: str) -> None:
    """Copies a key and its position."""
    for origin, copy in zip(source, target, strict=True):
        k.store(copy, to, k.load(origin, at))


def render_search(params: tuple, target) -> str:
    """The places of values in an ascending sequence."""
    dtype, side, out_dtype, index = params
    k = KernelSource("searchsorted", target, target.block, index)
    sequence, values, out = k.operand(dtype), k.operand(dtype), k.operand(out_dtype)
    n, count = k.size(), k.size()
    with k.grid_stride(count) as i:
        own = key_of(k, k.load(values, i), dtype)
        key_at = lambda at: key_of(k, k.load(sequence, at), dtype)
        place = count_before(k, k.i(0), n, own, side == "right", key_at)
        k.store(out, i, scalar_ops.convert(k, f"int64({place})", "int64", out_dtype))
    return k.text()
