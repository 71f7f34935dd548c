"""Runs the passes on the bodies of control flow, and takes out of them what is the same in every run.

To a body, the weights that it reads are params, as they are to the graph around it. So they are folded, transposed and
packed for its kernels by the passes that do so elsewhere; what these make of them is computed outside of the body, and
with all else that depends on weights alone ahead of calls.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from kgraph.ir import Graph, Node, Rewriter, Value, append_graph, constant_value
from kgraph.passes.manager import PassContext, run_passes
from kgraph.passes.patterns import primitive, state_only_values
from kgraph.passes.prologue import split_prologue


def optimise_bodies(graph: Graph, context: PassContext) -> Graph:
    """`while(x, w; x -> x @ w)  ->  while(x, pack(w); x -> fusion{dot; packed}(x, .))`, where w is made of weights.

    Constants among the operands move into the bodies, and what a loop passes on unchanged is its operand afterwards.
    """
    state_only = state_only_values(graph)

    def visit(node: Node, inputs: tuple[Value, ...], rewriter: Rewriter):
        if node.name not in _REWRITES:
            return None
        prepared = {new for old, new in zip(node.inputs, inputs) if old in state_only}
        return _REWRITES[node.name](_Rewrite(node, inputs, prepared, context, rewriter))

    return Rewriter(graph).run(visit)


@dataclass
class _Body:
    """A body after the passes.

    inputs: those that it still has, by their position among the inputs that it had. prepared: further inputs, which
    take `operands`, values around it that were made of weights.
    """

    graph: Graph
    inputs: dict[int, Value]
    prepared: list[Value]
    operands: list[Value]

    def reads(self) -> set[int]:
        """Positions of the inputs that it reads."""
        read = {*self.graph.outputs, *(v for node in self.graph.nodes for v in node.inputs)}
        return {i for i, v in self.inputs.items() if v in read}

    def set_inputs(self, kept: Sequence[int], bodies: Sequence[_Body], types: Sequence) -> None:
        """Let it take the inputs at the positions `kept`, then what was prepared for each of `bodies`.

        types: of all inputs that it had.
        """
        own = [self.inputs[i] if i in self.inputs else Value(types[i]) for i in kept]
        for body in bodies:
            own += body.prepared if body is self else [Value(v.type, name=v.name) for v in body.prepared]
        self.graph.inputs = own


@dataclass
class _Rewrite:
    """A node of control flow on its way into a new graph.

    given: its operands there. state_only: those of them that depend on weights alone.
    """

    node: Node
    given: Sequence[Value]
    state_only: set[Value]
    context: PassContext
    rewriter: Rewriter

    def optimised(self, body: Graph, given: Sequence[Value], offered: Iterable[int], wanted: Iterable[int]) -> _Body:
        """The body for the operands `given`, with its outputs `wanted`, after the passes.

        offered: positions of the inputs that are the same in every run; weights and constants among them leave.
        """
        inputs = {i: Value(v.type, name=v.name) for i, v in enumerate(body.inputs)}
        values, params = dict(inputs), {}
        own = Graph(name=body.name)
        for i in offered:
            if given[i].type != inputs[i].type:
                continue  # a size that is known on one side alone
            literal = constant_value(given[i])
            if literal is not None:
                values[i] = own.add(primitive("constant"), (), value=literal)
                del inputs[i]
            elif given[i] in self.state_only:
                params[inputs.pop(i)] = given[i]
        own.inputs, own.params = list(inputs.values()), list(params)
        outputs = append_graph(own, body, list(values.values()))
        own.outputs = [outputs[i] for i in wanted]
        context = replace(self.context, decisions=[], seconds={})
        split = split_prologue(run_passes(own, self.context.passes, context))
        prologue, main = split.prologue, split.main
        source = Graph(prologue.params, (), prologue.nodes, prologue.outputs)
        operands = append_graph(
            self.rewriter.target, source, [params[p] for p in prologue.params], self.node.provenance
        )
        return _Body(main, inputs, list(main.params), operands)

    def emit(self, operands: Sequence[Value], types: Sequence, **attrs) -> tuple[Value, ...]:
        """The node on these operands, with these bodies."""
        new = Node(self.node.primitive, operands, {**self.node.attrs, **attrs}, types, self.node.provenance)
        self.rewriter.target.nodes.append(new)
        return new.outputs


def _closed(body: _Body) -> Graph:
    """Its graph with inputs that no node makes, what was prepared among them."""
    graph = body.graph
    copy = Graph([Value(v.type, name=v.name) for v in graph.inputs], name=graph.name)
    copy.outputs = append_graph(copy, graph, copy.inputs)
    return copy


def _cond(rewrite: _Rewrite):
    index, *operands = rewrite.given
    branches = rewrite.node.attrs["branches"]
    types = [v.type for v in branches[0].inputs]
    every = range(len(operands))
    bodies = [rewrite.optimised(b, operands, every, range(len(b.outputs))) for b in branches]
    kept = sorted(set().union(*(body.reads() for body in bodies)))
    for body in bodies:
        body.set_inputs(kept, bodies, types)
    given = [index, *(operands[i] for i in kept), *(v for body in bodies for v in body.operands)]
    results = [o.type for o in rewrite.node.outputs]
    return rewrite.emit(given, results, branches=tuple(map(_closed, bodies)))


def _while_loop(rewrite: _Rewrite):
    loop, test = rewrite.node.attrs["body"], rewrite.node.attrs["cond"]
    given, every = rewrite.given, range(len(loop.inputs))
    changing = [i for i in every if loop.outputs[i] is not loop.inputs[i]]
    passed_on = [i for i in every if i not in changing]
    body = rewrite.optimised(loop, given, passed_on, changing)
    cond = rewrite.optimised(test, given, passed_on, [0])
    kept = sorted({*changing, *body.reads(), *cond.reads()})
    for graph, source in ((body, loop), (cond, test)):
        graph.set_inputs(kept, (body, cond), [v.type for v in source.inputs])
    new = dict(zip(changing, body.graph.outputs))
    inputs = body.graph.inputs
    body.graph.outputs = [new.get(i, own) for i, own in zip(kept, inputs)] + inputs[len(kept) :]
    operands = [*(given[i] for i in kept), *body.operands, *cond.operands]
    results = rewrite.emit(operands, [v.type for v in operands], body=_closed(body), cond=_closed(cond))
    after = dict(zip(kept, results))
    return tuple(after[i] if i in new else given[i] for i in every)


def _scan(rewrite: _Rewrite):
    attrs = rewrite.node.attrs
    loop, held = attrs["body"], attrs["num_carry"] + attrs["num_xs"]
    every = range(len(loop.inputs))
    body = rewrite.optimised(loop, rewrite.given, every[held:], range(len(loop.outputs)))
    kept = [i for i in every if i < held or i in body.reads()]
    body.set_inputs(kept, [body], [v.type for v in loop.inputs])
    operands = [*(rewrite.given[i] for i in kept), *body.operands]
    return rewrite.emit(operands, [o.type for o in rewrite.node.outputs], body=_closed(body))


_REWRITES = {"cond": _cond, "while_loop": _while_loop, "scan": _scan}
