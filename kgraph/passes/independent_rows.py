"""Whether a graph treats every row of its batch by itself, so that a call may be run in parts, a few rows at a time.

The axis of rows is followed from the inputs to the outputs. Each rule says where it lies in a node's results, or that
there is no telling; then the whole graph has to be run at once. Rows may be several neighbours on an axis, as after a
reshape of `[N, 128, 256]` to `[128*N, 256]`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from kgraph.errors import DimDecisionError
from kgraph.ir import Dim, Graph, Node, Value
from kgraph.ir.dims import symbols
from kgraph.passes.patterns import is_elementwise

RULES: dict[str, Callable[[Node, list[_Rows | None], str], list[_Rows | None]]] = {}


@dataclass(frozen=True)
class _Rows:
    """The axis of rows in a value, and how many neighbours on it belong to one row. None stands for a value that is
    the same for all rows."""

    axis: int
    width: int | Dim = 1


class _Unknown(Exception):
    """The message says why rows cannot be told apart."""


def independent_rows(graph: Graph) -> tuple[str, str]:
    """(symbol, "") where the first axis of all inputs that have one is a number of rows that do not depend on each
    other, and of all outputs too; else ("", why not)."""
    found = {s for v in graph.inputs for s in symbols(v.shape[:1])}
    if len(found) != 1:
        return "", "the inputs have no axis of rows in common"
    (symbol,) = found
    known: dict[Value, _Rows | None] = dict.fromkeys(graph.params)
    try:
        for value in graph.inputs:
            known[value] = rows = _leading(value, symbol)
            _check(value, rows, symbol)
        for node in graph.nodes:
            results = _follow(node, [known[v] for v in node.inputs], symbol)
            for value, rows in zip(node.outputs, results, strict=True):
                _check(value, rows, symbol)
                known[value] = rows
        for value in graph.outputs:
            rows = known[value]
            if rows is None or rows.axis:
                raise _Unknown("an output has rows elsewhere than on its first axis")
    except _Unknown as reason:
        return "", str(reason)
    return symbol, ""


def _follow(node: Node, rows: list[_Rows | None], symbol: str) -> list[_Rows | None]:
    with_rows = any(r is not None for r in rows)
    if "control" in node.primitive.traits or (node.primitive.traits & {"random", "host"} and with_rows):
        raise _Unknown(f"{node.name} is run for all rows at once")
    if is_elementwise(node):
        return [_aligned(node, rows)]
    if node.name in RULES:
        return RULES[node.name](node, rows, symbol)
    if with_rows:
        raise _Unknown(f"{node.name} has no rule for rows")
    if symbol in symbols(_sizes(node.attrs.values())):
        raise _Unknown(f"{node.name} reads how many rows there are")
    return [None] * len(node.outputs)


def _sizes(attrs) -> Iterator[Dim]:
    """All sizes among the values of attributes."""
    for value in attrs:
        if isinstance(value, Dim):
            yield value
        elif isinstance(value, tuple):
            yield from _sizes(value)


def _width(size, symbol: str) -> int | Dim | None:
    """size / symbol, where the size is a multiple of the symbol."""
    if not isinstance(size, Dim):
        return None
    total: int | Dim = 0
    for monomial, factor in size.terms:
        if list(monomial).count(symbol) != 1:
            return None
        rest = list(monomial)
        rest.remove(symbol)
        term: int | Dim = factor
        for atom in rest:
            if not isinstance(atom, str):
                return None
            term = term * Dim.symbol(atom)
        total = total + term
    return total


def _leading(value: Value, symbol: str) -> _Rows | None:
    if not value.shape or symbol not in symbols(value.shape[:1]):
        return None
    width = _width(value.shape[0], symbol)
    if width is None:
        raise _Unknown(f"the first axis of an input is {value.shape[0]}")
    return _Rows(0, width)


def _check(value: Value, rows: _Rows | None, symbol: str) -> None:
    """The number of rows must show in the axis that a rule gave, and nowhere else."""
    if rows is not None and not _equal(_width(value.shape[rows.axis], symbol), rows.width):
        raise _Unknown(f"rows are not on axis {rows.axis} of {value.type}")
    others = [size for axis, size in enumerate(value.shape) if rows is None or axis != rows.axis]
    if symbol in symbols(others):
        raise _Unknown(f"{value.type} depends on the number of rows")


def _one(rows: Sequence[_Rows | None]) -> _Rows | None:
    """What all operands with rows have in common."""
    found = {r for r in rows if r is not None}
    if len(found) > 1:
        raise _Unknown("operands have their rows on different axes")
    return found.pop() if found else None


def _aligned(node: Node, rows: Sequence[_Rows | None]) -> _Rows | None:
    """The axis of rows in an elementwise result: that of all operands, counted from the last axis."""
    rank = node.output.type.rank
    moved = [r and _Rows(r.axis + rank - v.type.rank, r.width) for r, v in zip(rows, node.inputs)]
    one = _one(moved)
    if one is not None:
        for r, value in zip(rows, node.inputs):
            axis = one.axis - rank + value.type.rank
            if r is None and axis >= 0 and not _equal(value.shape[axis], 1):
                raise _Unknown(f"{node.name} reads another value for every row")
    return one


# -- rules -------------------------------------------------------------------------------------------------------------
def _rule(*names: str):
    def register(function):
        for name in names:
            RULES[name] = function
        return function

    return register


def _differing(found: Iterable[tuple], wanted: Iterable[tuple]) -> list[int]:
    """Axes whose numbers are not those wanted, or may be others: sizes that are not known compare unequal."""
    return [axis for axis, (a, b) in enumerate(zip(found, wanted)) if not all(map(_equal, a, b))]


def _equal(a, b) -> bool:
    try:
        return bool(a == b)
    except DimDecisionError:
        return False


def _untouched(node: Node, rows: _Rows | None, axes) -> _Rows | None:
    """The same axis, which must not be among those that a node works along."""
    rank = node.inputs[0].type.rank
    if rows is not None and rows.axis in [a % rank for a in axes]:
        raise _Unknown(f"{node.name} works along the rows")
    return rows


@_rule("constant", "iota")
def _same(node, rows, symbol):
    return [None]


@_rule("full")
def _full(node, rows, symbol):
    axes = [axis for axis, size in enumerate(node.output.shape) if symbol in symbols([size])]
    if not axes:
        return [None]
    width = _width(node.output.shape[axes[0]], symbol)
    if width is None:
        raise _Unknown(f"{node.output.type} depends on the number of rows")
    return [_Rows(axes[0], width)]


@_rule("optimization_barrier")
def _kept(node, rows, symbol):
    return list(rows)


@_rule("broadcast_to")
def _broadcast_to(node, rows, symbol):
    rank = node.output.type.rank
    (operand,), (value,) = rows, node.inputs
    if operand is not None:
        return [_Rows(operand.axis + rank - value.type.rank, operand.width)]
    (made,) = _full(node, rows, symbol)
    if made is not None:
        axis = made.axis - rank + value.type.rank
        if axis >= 0 and not _equal(value.shape[axis], 1):
            raise _Unknown("broadcast_to makes rows of different values")
    return [made]


@_rule("reshape")
def _reshape(node, rows, symbol):
    (operand,), (value,) = rows, node.inputs
    if operand is None:
        return [None]
    before = _product(value.shape[: operand.axis])
    row = _product([operand.width, *value.shape[operand.axis + 1 :]])
    shape = node.output.shape
    for axis, size in enumerate(shape):
        width = _width(size, symbol)
        if width is None or not _equal(_product(shape[:axis]), before):
            continue
        if _equal(_product([width, *shape[axis + 1 :]]), row):
            return [_Rows(axis, width)]
    raise _Unknown(f"a reshape from {value.type} to {node.output.type} mixes rows")


def _product(sizes) -> int | Dim:
    return functools.reduce(lambda a, b: a * b, sizes, 1)


@_rule("transpose")
def _transpose(node, rows, symbol):
    (operand,) = rows
    return [operand and _Rows(node.attrs["permutation"].index(operand.axis), operand.width)]


@_rule("concatenate")
def _concatenate(node, rows, symbol):
    if any(r is None for r in rows) and any(rows):
        raise _Unknown("concatenate reads values that are the same for all rows")
    return [_untouched(node, _one(rows), [node.attrs["axis"]])]


@_rule("slice")
def _slice(node, rows, symbol):
    (operand,), (value,) = rows, node.inputs
    parts = zip(*(node.attrs[name] for name in ("start", "limit", "stride")))
    whole = [(0, size, 1) for size in value.shape]
    return [_untouched(node, operand, _differing(parts, whole))]


@_rule("pad")
def _pad(node, rows, symbol):
    if rows[1] is not None:
        raise _Unknown("pad fills every row differently")
    amounts = zip(*(node.attrs[name] for name in ("low", "high", "interior")))
    return [_untouched(node, rows[0], _differing(amounts, itertools.repeat((0, 0, 0))))]


@_rule("pad_mirror")
def _pad_mirror(node, rows, symbol):
    amounts = zip(node.attrs["low"], node.attrs["high"])
    return [_untouched(node, rows[0], _differing(amounts, itertools.repeat((0, 0))))]


@_rule("rev")
def _rev(node, rows, symbol):
    return [_untouched(node, rows[0], node.attrs["axes"])]


@_rule("softmax", "log_softmax", "cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "sort", "argsort")
def _along_axis(node, rows, symbol):
    return [_untouched(node, rows[0], [node.attrs["axis"]])]


@_rule("top_k")
def _top_k(node, rows, symbol):
    return [_untouched(node, rows[0], [-1])] * 2


@_rule("reduce_sum", "reduce_prod", "reduce_max", "reduce_min", "reduce_and", "reduce_or", "logsumexp")
def _reduce(node, rows, symbol):
    axes = [a % node.inputs[0].type.rank for a in node.attrs["axes"]]
    return [_after_reduction(_untouched(node, rows[0], axes), axes, node.attrs["keepdims"])]


@_rule("argmax", "argmin")
def _argmax(node, rows, symbol):
    axes = [node.attrs["axis"] % node.inputs[0].type.rank]
    return [_after_reduction(_untouched(node, rows[0], axes), axes, node.output.type.rank == node.inputs[0].type.rank)]


def _after_reduction(rows: _Rows | None, axes: list[int], keepdims: bool) -> _Rows | None:
    if rows is None or keepdims:
        return rows
    return _Rows(rows.axis - sum(a < rows.axis for a in axes), rows.width)


@_rule("layer_norm", "rms_norm")
def _layer_norm(node, rows, symbol):
    if any(rows[1:]):
        raise _Unknown(f"{node.name} scales every row differently")
    return [_untouched(node, rows[0], node.attrs["axes"])]


@_rule("batch_norm")
def _batch_norm(node, rows, symbol):
    if any(rows[1:]):
        raise _Unknown("batch_norm scales every row differently")
    return [_untouched(node, rows[0], [node.attrs["axis"]])]


@_rule("group_norm", "resize")
def _of_images(node, rows, symbol):
    if any(rows[1:]) or (rows[0] is not None and rows[0].axis):
        raise _Unknown(f"{node.name} has rows elsewhere than on its first axis")
    return [rows[0]]


@_rule("conv")
def _conv(node, rows, symbol):
    if rows[1] is not None:
        raise _Unknown("every row has a filter of its own")
    return _of_images(node, rows[:1], symbol)


@_rule("reduce_window")
def _reduce_window(node, rows, symbol):
    windows = zip(*(node.attrs[name] for name in ("window", "strides", "window_dilation", "base_dilation")))
    touched = _differing(windows, itertools.repeat((1, 1, 1, 1)))
    touched += _differing(node.attrs["padding"], itertools.repeat((0, 0)))
    return [_untouched(node, rows[0], touched)]


@_rule("dot_general")
def _dot_general(node, rows, symbol):
    lhs, rhs = rows
    attrs = node.attrs
    batch = attrs["lhs_batch"], attrs["rhs_batch"]
    contract = attrs["lhs_contract"], attrs["rhs_contract"]
    if lhs is not None and rhs is not None:
        if lhs.axis not in batch[0] or rhs.axis not in batch[1] or lhs.width != rhs.width:
            raise _Unknown("dot_general multiplies rows with each other")
        places = batch[0].index(lhs.axis), batch[1].index(rhs.axis)
        if places[0] != places[1]:
            raise _Unknown("dot_general multiplies rows with each other")
        return [_Rows(places[0], lhs.width)]
    side, one = (0, lhs) if lhs is not None else (1, rhs)
    if one is None:
        return [None]
    free = [
        [axis for axis in range(value.type.rank) if axis not in (*batch[s], *contract[s])]
        for s, value in enumerate(node.inputs)
    ]
    if one.axis not in free[side]:
        raise _Unknown("dot_general adds up rows, or reads another value for every row")
    first = len(batch[0]) + (len(free[0]) if side else 0)
    return [_Rows(first + free[side].index(one.axis), one.width)]


@_rule("take")
def _take(node, rows, symbol):
    table, indices = rows
    axis = node.attrs["axis"] % node.inputs[0].type.rank
    if table is not None and indices is not None:
        raise _Unknown("take reads rows by the numbers of other rows")
    if indices is not None:
        return [_Rows(axis + indices.axis, indices.width)]
    if table is not None:
        _untouched(node, table, [axis])
        shift = node.inputs[1].type.rank - 1 if table.axis > axis else 0
        return [_Rows(table.axis + shift, table.width)]
    return [None]


@_rule("take_along_axis")
def _take_along_axis(node, rows, symbol):
    if (rows[0] is None) != (rows[1] is None):
        raise _Unknown("take_along_axis reads the same values for all rows")
    return [_untouched(node, _one(rows), [node.attrs["axis"]])]


@_rule("attention")
def _attention(node, rows, symbol):
    if any(r is None or r != _Rows(0) for r in rows[:3]):
        raise _Unknown("attention has rows elsewhere than on its first axis")
    for r, value in zip(rows[3:], node.inputs[3:]):
        # They are broadcast to [B, H, T, S].
        batched = value.type.rank == 4
        if (r is None and batched and not _equal(value.shape[0], 1)) or (
            r is not None and not (batched and r == _Rows(0))
        ):
            raise _Unknown("the mask of attention has rows elsewhere than on its first axis")
    return [_Rows(0)]


@_rule("rnn")
def _rnn(node, rows, symbol):
    if any(rows[1:5]) or any(r != _Rows(0) for r in (rows[0], *rows[5:])):
        raise _Unknown("a recurrent layer has rows elsewhere than on its first axis")
    return [_Rows(0)] * len(node.outputs)


__all__ = ["independent_rows"]
