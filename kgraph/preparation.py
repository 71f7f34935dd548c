"""Prepares weights: evaluates the prologue of a compiled graph, piece by piece.

Large weights are packed by kernels, on several threads; all the rest is evaluated by NumPy. What another compiled form
has made of the same weights is used again (`kgraph.prepared`). A variable may let go of a value that is only packed,
since its elements are all there, in another order.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from kgraph.codegen.eager import load, run_call
from kgraph.codegen.kernel import KernelCall, KernelSpec, Temporary
from kgraph.ir import Graph, Node, Value, append_graph, live_nodes
from kgraph.ir.exact_text import plain_value
from kgraph.ir.interpreter import evaluate
from kgraph.ops.packing import is_reordering, unpack_reference
from kgraph.prepared import Prepared, Source, find, keep
from kgraph.reserve import LINE, Reserve, aligned_bytes, give_back
from kgraph.runtime.threads import get_num_threads

# Packed weights below this do not pay for a kernel.
LEAST_BYTES = 1 << 18
# What variables have let go of is given back to the system whenever it is so much: the C library keeps it, and for
# other threads than those that pack.
_GIVEN_BACK = 32 << 20
# (layout of a packed array, what is done in turn to what it unpacks to).
_Order = tuple[tuple, tuple[tuple[str, tuple], ...]]


@dataclass
class _Task:
    """A call that makes the output `number`. let_go: what to do with the result, after which the operands can go."""

    number: int
    call: KernelCall
    operands: list[np.ndarray]
    let_go: Callable[[np.ndarray], None] | None = None

    def run(self, out: np.ndarray | None) -> tuple[int, np.ndarray]:
        """(number, result)."""
        made = run_call(self.call, self.operands, out=out)
        if self.let_go is not None:
            self.let_go(made)
            self.operands.clear()
        return self.number, made


@dataclass
class _Piece:
    """What makes some outputs of the prologue (`numbers`), with just the params that it reads.

    graph: gives these outputs, of which `calls` (by number) are made of further results, their operands.
    params: numbers of the params that it reads. recipes: by the number of an output, what tells how it is made of
    which of these params; not of those outputs that are params themselves. order: where its one output is its param in
    another order, how to get that back.
    """

    graph: Graph
    numbers: list[int]
    params: list[int] = field(default_factory=list)
    calls: dict[int, KernelCall] = field(default_factory=dict)
    recipes: dict[int, tuple[bytes, list[int]]] = field(default_factory=dict)
    order: _Order | None = None

    def write_recipes(self) -> None:
        """Set `recipes`."""
        for number, value in zip(self.numbers, self.graph.outputs, strict=True):
            nodes = live_nodes(self.graph.nodes, [value])
            read = {v for node in nodes for v in node.inputs}
            given = [(p, n) for p, n in zip(self.graph.params, self.params, strict=True) if p in read]
            if not given:
                continue
            try:
                text = repr(plain_value(nodes, [p for p, _ in given], value))
            except TypeError:
                continue
            self.recipes[number] = hashlib.sha256(text.encode()).digest(), [n for _, n in given]

    def leave_packing_to_kernels(self) -> None:
        """Take the `pack` nodes for which there are kernels out of the graph."""
        from kgraph.codegen.packing import call_for  # with all that writes kernels

        outputs: list[Value] = []
        operands: list[Value] = []
        for number, value in zip(self.numbers, self.graph.outputs, strict=True):
            call = call_for(value.producer) if _is_large(value) else None
            if call is None:
                outputs.append(value)
            else:
                operands += [v for v in call.operands[:-1] if isinstance(v, Value)]
                # From here on only the types of operands count.
                self.calls[number] = replace(call, operands=[Temporary(v.type) for v in call.operands])
                if len(self.numbers) == len(self.graph.params) == 1:
                    self.order = _packed_order(value)
        self.numbers = [number for number in self.numbers if number not in self.calls]
        self.graph.outputs = [*outputs, *operands]
        self.graph.nodes = live_nodes(self.graph.nodes, self.graph.outputs)

    def without(self, numbers: Collection[int]) -> _Piece:
        """A piece that leaves out the outputs of these numbers."""
        rest = iter(self.graph.outputs[len(self.numbers) :])
        operands = {n: [next(rest) for _ in call.operands[:-1]] for n, call in self.calls.items()}
        made = {n: value for n, value in zip(self.numbers, self.graph.outputs) if n not in numbers}
        calls = {n: call for n, call in self.calls.items() if n not in numbers}
        outputs = [*made.values(), *(value for n in calls for value in operands[n])]
        graph = Graph((), self.graph.params, live_nodes(self.graph.nodes, outputs), outputs, self.graph.name)
        return replace(self, graph=graph, numbers=list(made), calls=calls)

    def results(self, arrays: list[np.ndarray]) -> tuple[dict[int, np.ndarray], list[_Task]]:
        """For the values of the params: the outputs by number, and what is left to be done for others of them."""
        values = evaluate(self.graph, [], arrays)
        rest = iter(values[len(self.numbers) :])
        tasks = [_Task(number, call, [next(rest) for _ in call.operands[:-1]]) for number, call in self.calls.items()]
        return dict(zip(self.numbers, values)), tasks

    def leaving(self, sources: Sequence[Source] | None) -> Any:
        """The variable that may let go of the value which this piece packs, if there is one."""
        if sources is None or self.order is None:
            return None
        variable = sources[self.params[0]].variable
        return variable if variable is not None and variable.may_be_put_away() else None

    def packed_bytes(self) -> int:
        """Bytes that kernels pack."""
        return sum(call.operands[-1].type.nbytes for call in self.calls.values())


def _packed_order(value: Value) -> _Order | None:
    """How to get the param back where a `pack` node's result holds it as it is, but for the order."""
    (w,), layout = value.producer.inputs, value.producer.attrs["layout"]
    steps: list[tuple[str, tuple[int, ...]]] = []
    while w.node is not None and w.node.name in ("transpose", "reshape"):
        before = w.node.inputs[0]
        if w.node.name == "reshape":
            steps.append(("reshape", before.shape))
        else:
            steps.append(("transpose", tuple(int(axis) for axis in np.argsort(w.node.attrs["permutation"]))))
        w = before
    if w.node is not None or not is_reordering(layout, w.dtype):
        return None
    return layout, tuple(steps)


def _unpacked(packed: np.ndarray, order: _Order) -> np.ndarray:
    """The param that was packed."""
    layout, steps = order
    array = unpack_reference(packed, layout)
    for name, argument in steps:
        array = array.reshape(argument) if name == "reshape" else array.transpose(argument)
    return np.ascontiguousarray(array)


def _let_go(variable: Any, value: weakref.ref, order: _Order, packed: np.ndarray) -> None:
    """Let the variable go on with what was packed of its value, in this order."""
    variable.put_away(value, functools.partial(_unpacked, packed, order))


def _is_large(value: Value) -> bool:
    return value.node is not None and value.node.name == "pack" and value.type.nbytes >= LEAST_BYTES


class Preparation:
    """Params -> prepared weights, for all params or for those that have changed."""

    def __init__(self, pieces: list[_Piece]):
        self._pieces = pieces
        self._kept: dict[int, Prepared] = {}  # what others may find, by the number of the output

    def __reduce__(self):
        return Preparation, (self._pieces,)

    @classmethod
    def of(cls, prologue: Graph, params: Sequence[Value]) -> Preparation:
        """For a prologue. params: those of the captured graph, in the order in which their values will be given."""
        position = {p: i for i, p in enumerate(params)}
        pieces = _pieces(_without_fusions(prologue))
        for piece in pieces:
            piece.params = [position[p] for p in piece.graph.params]
            piece.write_recipes()
            piece.leave_packing_to_kernels()
        return cls(pieces)

    def specs(self) -> list[KernelSpec]:
        """The kernels that take part, for this machine."""
        return [call.spec for piece in self._pieces for call in piece.calls.values()]

    def __call__(
        self,
        arrays: Sequence[np.ndarray],
        changed: Sequence[int] | None = None,
        reserve: Reserve | None = None,
        sources: Sequence[Source] | None = None,
    ) -> dict[int, np.ndarray]:
        """Prepared weights by the number of the prologue's output.

        arrays: the value of every param. changed: numbers of those that differ from the last call; None means all. Only
        what depends on a changed one is computed. reserve: memory for them, as far as it goes.
        sources: where the value of every param comes from; what others have made of the same is not computed either.
        """
        dirty = None if changed is None else set(changed)
        pieces = [p for p in self._pieces if dirty is None or not dirty.isdisjoint(p.params)]
        shared = self._shared(pieces, sources) if sources is not None else {}
        pieces = [p.without(shared) if shared.keys() & p.recipes.keys() else p for p in pieces]
        pieces = [p for p in pieces if p.numbers or p.calls]
        # First those whose variables let go of as much as is made, then the largest, so that no thread begins one when
        # the others are done.
        pieces.sort(key=lambda piece: (piece.leaving(sources) is None, -piece.packed_bytes()))
        calls = {n: call for piece in pieces for n, call in piece.calls.items()}
        load([call.spec for call in calls.values()])
        leaving = {n: v for piece in pieces if (v := piece.leaving(sources)) is not None for n in piece.calls}
        room = _room(calls, reserve, leaving) if dirty is None else {}
        found: dict[int, np.ndarray] = {}

        def tasks() -> Iterator[_Task]:
            """What is left for kernels, while NumPy makes what comes before and all the rest."""
            for piece in pieces:
                values = [arrays[n] for n in piece.params]
                made, left = piece.results(values)
                found.update(made)
                for task in left:
                    if task.number in leaving and piece.order is not None:
                        value = weakref.ref(values[0])
                        task.let_go = functools.partial(_let_go, leaving[task.number], value, piece.order)
                del values
                yield from left

        gone, left = 0, len(leaving)

        def run(task: _Task) -> tuple[int, np.ndarray]:
            nonlocal gone, left
            made = task.run(room.get(task.number))
            if task.let_go is not None:
                gone, left = gone + made[1].nbytes, left - 1
                if gone >= _GIVEN_BACK or not left:  # as another thread may count too, sooner or later by one
                    gone = 0
                    give_back()
            return made

        threads = min(get_num_threads(), len(calls))
        if threads > 1:
            with ThreadPoolExecutor(threads) as pool:
                futures = [pool.submit(run, task) for task in tasks()]
            found |= dict(future.result() for future in futures)
        else:
            packed = dict(map(run, tasks()))
            found |= packed
        if leaving:
            give_back()
        if sources is not None:
            self._share(pieces, sources, found, shared)
        return found | {n: prepared.array for n, prepared in shared.items()}

    def _shared(self, pieces: Sequence[_Piece], sources: Sequence[Source]) -> dict[int, Prepared]:
        """What there is already of the outputs of these pieces."""
        found = {}
        for piece in pieces:
            for number, (digest, read) in piece.recipes.items():
                prepared = find(digest, [sources[n] for n in read])
                if prepared is not None:
                    found[number] = prepared
        return found

    def _share(self, pieces, sources: Sequence[Source], made: dict[int, np.ndarray], shared: dict) -> None:
        """Let others find what was made, and keep what is found."""
        for piece in pieces:
            for number, (digest, read) in piece.recipes.items():
                if number not in shared:
                    made[number] = array = np.asarray(made[number], order="C")
                    self._kept[number] = keep(digest, [sources[n] for n in read], array)
        self._kept |= shared


def _room(
    calls: Mapping[int, KernelCall], reserve: Reserve | None, alone: Collection[int] = ()
) -> dict[int, np.ndarray]:
    """Memory for what kernels pack, by number: in the reserve, the rest in one block, which gets large pages.

    alone: what gets no memory here if there is none left in the reserve: it takes the place of a variable's value, such
    as of the last one that went.
    """
    types = {n: call.operands[-1].type for n, call in calls.items()}
    spaces = {n: -(-type.nbytes // LINE) * LINE for n, type in types.items()}
    block = reserve.take(sum(spaces.values())) if reserve is not None else aligned_bytes(0)
    inside, left = [], block.nbytes
    # The largest first, so that little of the reserve's memory is left over.
    for number in sorted(spaces, key=lambda n: (n in alone, -spaces[n])):
        if spaces[number] <= left:
            inside.append(number)
            left -= spaces[number]
    outside = [n for n in spaces if n not in inside and n not in alone]
    rest = aligned_bytes(sum(spaces[n] for n in outside))
    room = {}
    for source, numbers in ((block, inside), (rest, outside)):
        ends = itertools.accumulate(spaces[n] for n in numbers)
        for number, end in zip(numbers, ends):
            type, begin = types[number], end - spaces[number]
            room[number] = source[begin : begin + type.nbytes].view(type.np_dtype).reshape(type.shape)
    return room


def _without_fusions(prologue: Graph) -> Graph:
    """The same with the bodies of fused nodes in their places, since NumPy gains nothing by them."""
    out = Graph(prologue.inputs, prologue.params, name=prologue.name)
    mapping: dict[Value, Value] = {}
    for node in prologue.nodes:
        inputs = [mapping.get(v, v) for v in node.inputs]
        if node.name == "fusion":
            results: Sequence[Value] = append_graph(out, node.attrs["body"], inputs)
        else:
            copy = Node(node.primitive, inputs, node.attrs, [o.type for o in node.outputs])
            out.nodes.append(copy)
            results = copy.outputs
        mapping.update(zip(node.outputs, results, strict=True))
    out.outputs = [mapping.get(v, v) for v in prologue.outputs]
    return out


def _pieces(prologue: Graph) -> list[_Piece]:
    """Cut the prologue into pieces that share no param, so that a changed weight costs only its own piece."""
    owner: dict[Value, int] = {}
    parent: list[int] = []

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    def new() -> int:
        parent.append(len(parent))
        return parent[-1]

    for p in prologue.params:
        owner[p] = new()
    for node in prologue.nodes:
        groups = [find(owner[v]) for v in node.inputs if not _is_constant(v)] or [new()]
        for g in groups[1:]:
            parent[find(g)] = find(groups[0])
        for o in node.outputs:
            owner[o] = groups[0]
    pieces: dict[int, _Piece] = {}
    for number, value in enumerate(prologue.outputs):
        piece = pieces.setdefault(find(owner[value]), _Piece(Graph(name=prologue.name), []))
        piece.numbers.append(number)
        piece.graph.outputs.append(value)
    for p in prologue.params:
        if (group := find(owner[p])) in pieces:
            pieces[group].graph.params.append(p)
    for node in prologue.nodes:
        group = find(owner[node.outputs[0]])
        if _is_constant(node.outputs[0]):
            for piece in pieces.values():
                piece.graph.nodes.append(node)
        elif group in pieces:
            pieces[group].graph.nodes.append(node)
    for piece in pieces.values():
        piece.graph.nodes = live_nodes(piece.graph.nodes, piece.graph.outputs)
    return list(pieces.values())


def _is_constant(value: Value) -> bool:
    return value.node is not None and not value.node.inputs
