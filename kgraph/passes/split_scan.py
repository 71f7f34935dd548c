"""Takes out of a loop what need not be in it: what no carry has a part in is computed for all elements at once.

A recurrent cell's product of its input with a weight does not wait for the state, nor does a gradient's product of the
states' cotangents with the inputs. As one large product ahead of the loop, or after it, they cost a fraction of many
small ones. Sums that a gradient carries along become contractions over the whole sequence.
"""

from __future__ import annotations

from collections.abc import Iterable

from kgraph import ops
from kgraph.ir import Graph, Node, Rewriter, Value, live_nodes
from kgraph.ir.recorder import RecordedValue, Recorder, inheriting
from kgraph.ir.types import FLOATS
from kgraph.passes.batching import batched, can_batch, contracted, contracts, sum_operands, summed_node
from kgraph.passes.canonicalise import canonicalise
from kgraph.passes.common_subexpressions import common_subexpressions
from kgraph.passes.manager import PassContext
from kgraph.passes.patterns import estimated_elements

# What is worth a sequence in memory.
HEAVY = frozenset({"dot_general", "conv"})
HEAVY_SUMS = HEAVY | {"conv_filter_gradient"}
# How much larger than what the loop carries, reads and gives in a step a value may be that is kept for all steps: loops
# also serve to keep large intermediate values, such as the scores of attention, from existing all at once.
LARGEST_GROWTH = 16


def split_scan(graph: Graph, context: PassContext | None = None) -> Graph:
    """`scan(x; h -> h w + x k)  ->  y = x k; scan(y; h -> h w + y)`, and likewise after the loop."""

    def visit(node: Node, inputs: tuple, rewriter: Rewriter):
        if node.name != "scan":
            return None
        plan = _Plan(node)
        if not plan.is_useful:
            return None
        recorder = Recorder(graph=rewriter.target)
        with recorder.active(), inheriting(node.provenance):
            return tuple(map(recorder.value, _Splitting(plan, recorder, inputs).results()))

    return Rewriter(graph).run(visit)


class _Plan:
    """Which part of a body runs when.

    fixed: values that are the same in every iteration, to be computed once. early: values that depend on sequences and
    on what is fixed, of which `ahead` are computed ahead of the loop. core: nodes that stay in the loop.
    sunk: numbers of the results, and `sums`: numbers of the carries, that are computed after the loop.
    stacked: values of the core that are needed there.
    """

    def __init__(self, node: Node):
        attrs = node.attrs
        self.node, self.num_carry, self.num_xs = node, attrs["num_carry"], attrs["num_xs"]
        body = attrs["body"]
        body = common_subexpressions(canonicalise(Graph(body.inputs, (), body.nodes, body.outputs, body.name)))
        body.nodes = live_nodes(body.nodes, body.outputs)
        self.body = body
        self.uses = body.uses()
        held = self.num_carry + self.num_xs
        self.carries, self.xs = body.inputs[: self.num_carry], body.inputs[self.num_carry : held]
        self.constants = body.inputs[held:]
        held_sizes = [estimated_elements(v.shape) for v in (*self.carries, *self.xs, *body.outputs)]
        self.limit = LARGEST_GROWTH * max(held_sizes, default=0)
        self._classify()
        self.core: set[Node] = set()
        self.sums = {i: v for i in range(self.num_carry) if (v := self._summand(i)) is not None}
        self._need(body.outputs[i] for i in range(self.num_carry) if i not in self.sums)
        self.sunk = [i for i in range(self.num_carry, len(body.outputs)) if self._is_late_product(body.outputs[i])]
        self._need(v for i, v in enumerate(body.outputs[self.num_carry :], self.num_carry) if i not in self.sunk)
        for i, v in list(self.sums.items()):
            if not self._is_late_sum(v):
                del self.sums[i]
                self._need([body.outputs[i]])
        self._settle()
        self.ahead = [n.output for n in body.nodes if n in self.core and n.name in HEAVY and n.output in self.early]

    @property
    def is_useful(self) -> bool:
        costly = any(v.node is not None and v.node.inputs for v in self.fixed if v not in self.constants)
        return bool(self.ahead or self.sunk or self.sums or costly)

    def _classify(self) -> None:
        self.fixed: set[Value] = set(self.constants)
        self.early: set[Value] = set(self.xs)
        for node in self.body.nodes:
            if node.primitive.traits & {"random", "control"}:
                continue
            if all(v in self.fixed for v in node.inputs):
                self.fixed.update(node.outputs)
            elif all(v in self.fixed or v in self.early for v in node.inputs):
                if can_batch(node, [v in self.early for v in node.inputs]) and self._fits(node.outputs):
                    self.early.update(node.outputs)

    def _fits(self, values: Iterable[Value]) -> bool:
        """Whether values may be kept for all steps."""
        return all(v in self.fixed or estimated_elements(v.shape) <= self.limit for v in values)

    def varies(self, value: Value) -> bool:
        """Whether a value may differ between iterations."""
        return value not in self.fixed

    def contracts(self, node: Node) -> bool:
        """Whether a sum over the steps can be had from the node's operands in all of them."""
        return contracts(node, self.varies) and self._fits(node.inputs)

    def _summand(self, i: int) -> Value | None:
        """v, where carry i does nothing but add v in every iteration."""
        carry, new = self.carries[i], self.body.outputs[i]
        node = new.node
        if node is None or node.name != "add" or carry.dtype not in FLOATS or carry in self.body.outputs:
            return None
        if self.uses.get(carry) != [node] or new in self.uses or self.body.outputs.count(new) != 1:
            return None
        others = [v for v in node.inputs if v is not carry]
        return others[0] if others and others[0].shape == carry.shape and self.varies(others[0]) else None

    def _need(self, values: Iterable[Value]) -> None:
        """Keep in the loop what these values are computed from."""
        stack = [v.node for v in values if v.node is not None]
        while stack:
            node = stack.pop()
            if node not in self.core:
                self.core.add(node)
                stack.extend(v.node for v in node.inputs if v.node is not None)

    def is_late(self, value: Value) -> bool:
        """Whether a value can be computed after the loop, from stacked ones."""
        node = value.node
        if node is None or node in self.core or value in self.fixed or value in self.early:
            return False
        return can_batch(node, [self.varies(v) for v in node.inputs]) and self._fits((*node.inputs, value))

    def _is_late_product(self, value: Value) -> bool:
        """Whether a result of the steps is one of a product that can be had for all of them at once."""
        stack, seen = [value], set()
        while stack:
            v = stack.pop()
            if v in seen or not (v in self.early or self.is_late(v)) or v.node is None:
                continue
            seen.add(v)
            if v.node.name in HEAVY:
                return True
            stack.extend(v.node.inputs)
        return False

    def _is_late_sum(self, value: Value) -> bool:
        return any(n.name in HEAVY_SUMS for n in self._sum_part(value))

    def _sum_part(self, value: Value) -> Iterable[Node]:
        """The nodes through which a sum passes, with those that contract it."""
        node = value.node
        if node is None or node in self.core or value in self.early:
            return
        inner = sum_operands(node, self.varies)
        if inner is not None:
            yield node
            for v in inner:
                yield from self._sum_part(v)
        elif self.contracts(node):
            yield node

    def sum_leaves(self, value: Value) -> list[Value]:
        """The values that the sum of `value` needs for all elements."""
        node = value.node
        if node is not None and node not in self.core and value not in self.early:
            inner = sum_operands(node, self.varies)
            if inner is not None:
                return [leaf for v in inner for leaf in self.sum_leaves(v)]
            if self.contracts(node):
                return list(node.inputs)
        return [value]

    def _settle(self) -> None:
        """Find what the part after the loop needs of the loop; that keeps more in the loop, until nothing changes."""
        before = -1
        while before != len(self.core):
            before = len(self.core)
            leaves = [self.body.outputs[i] for i in self.sunk]
            leaves += [leaf for v in self.sums.values() for leaf in self.sum_leaves(v)]
            self.stacked: dict[Value, None] = {}
            seen: set[Value] = set()
            while leaves:
                v = leaves.pop()
                if v in seen or v in self.fixed or v in self.early:
                    continue
                seen.add(v)
                if self.is_late(v):
                    leaves.extend(v.producer.inputs)
                else:
                    self.stacked[v] = None
            self._need(self.stacked)


class _Splitting:
    """Records the three parts of a scan."""

    def __init__(self, plan: _Plan, recorder: Recorder, inputs: tuple[Value, ...]):
        self.plan, self.recorder = plan, recorder
        self.length = plan.node.attrs["length"]
        self.order = {node: number for number, node in enumerate(plan.body.nodes)}
        self.operands = dict(zip(plan.body.inputs, map(recorder.wrap, inputs)))
        self.once: dict[Value, RecordedValue] = {v: self.operands[v] for v in plan.constants}
        self.whole: dict[Value, RecordedValue] = {v: self.operands[v] for v in plan.xs}

    def at(self, value: Value):
        """A value, for all elements of the sequence where it varies."""
        stack, wanted = [value], set()
        while stack:
            v = stack.pop()
            if v not in self.once and v not in self.whole and v.producer not in wanted:
                wanted.add(v.producer)
                stack.extend(v.producer.inputs)
        for node in sorted(wanted, key=self.order.__getitem__):
            self._record(node)
        return self.once[value] if value in self.once else self.whole[value]

    def _record(self, node: Node) -> None:
        """Record a node whose operands are recorded."""
        operands = [self.once[v] if v in self.once else self.whole[v] for v in node.inputs]
        if node.outputs[0] not in self.plan.fixed:
            flags = [self.plan.varies(v) for v in node.inputs]
            self.whole[node.output] = batched(node, operands, flags, self.length)
        elif node.name == "constant":
            self.once[node.output] = self.recorder.wrap(self.recorder.value(node.attrs["value"]))
        else:
            out = self.recorder.record(node.primitive, tuple(operands), node.attrs)
            self.once.update(zip(node.outputs, out if isinstance(out, tuple) else (out,)))

    def total(self, value: Value):
        """The sum of a value over the sequence."""
        node, plan = value.node, self.plan
        if node is not None and node not in plan.core and value not in plan.early:
            inner = sum_operands(node, plan.varies)
            if inner is not None:
                return summed_node(node, [self.total(v) for v in inner], self.at)
            if plan.contracts(node):
                return contracted(node, [self.at(v) for v in node.inputs], self.length)
        return ops.reduce_sum(self.at(value), axes=(0,))

    def results(self) -> list:
        """The results of the scan."""
        plan, body = self.plan, self.plan.body
        carried = [i for i in range(plan.num_carry) if i not in plan.sums]
        kept = [i for i in range(plan.num_carry, len(body.outputs)) if i not in plan.sunk]
        outputs = [body.outputs[i] for i in (*carried, *kept)] + list(plan.stacked)
        loop = self._loop(carried, outputs)
        found = dict(zip((*carried, *kept), loop))
        self.whole.update(zip(plan.stacked, loop[len(carried) + len(kept) :]))
        for i in plan.sunk:
            found[i] = self.at(body.outputs[i])
        for i, value in plan.sums.items():
            found[i] = ops.add(self.operands[plan.carries[i]], self.total(value))
        return [found[i] for i in range(len(body.outputs))]

    def _loop(self, carried: list[int], outputs: list[Value]) -> tuple:
        """The results of the scan that remains."""
        plan = self.plan
        carries = [plan.carries[i] for i in carried]
        given = set(plan.ahead) | {v for v in plan.fixed if v.node is None or v.node.inputs}
        nodes: list[Node] = []
        read: dict[Value, None] = dict.fromkeys(outputs)
        for node in reversed(plan.body.nodes):
            if any(o in read and o not in given for o in node.outputs):
                nodes.append(node)
                read.update(dict.fromkeys(node.inputs))
        sequences = [v for v in (*plan.xs, *plan.ahead) if v in read]
        constants = [v for v in read if v in plan.fixed and v in given]
        mapping = {v: Value(v.type, name=v.name) for v in (*carries, *sequences, *constants)}
        own = Graph(mapping.values(), name=plan.body.name)
        for node in reversed(nodes):
            types = [o.type for o in node.outputs]
            copy = Node(node.primitive, [mapping[v] for v in node.inputs], node.attrs, types, node.provenance)
            own.nodes.append(copy)
            mapping.update(zip(node.outputs, copy.outputs))
        own.outputs = [mapping[v] for v in outputs]
        if not outputs:
            return ()
        return ops.scan(
            *(self.operands[c] for c in carries),
            *map(self.at, sequences),
            *map(self.at, constants),
            **dict(plan.node.attrs, body=own, num_carry=len(carries), num_xs=len(sequences)),
        )
