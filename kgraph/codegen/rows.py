"""Taking apart what looks at a row several times: softmax and normalisations, with elementwise nodes around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kgraph.codegen import expressions, regions
from kgraph.codegen.expressions import compute_dtype
from kgraph.codegen.regions import Leaf
from kgraph.ir import Node, Value


@dataclass
class Parts:
    """A node taken apart around its core (softmax, layer_norm ...).

    core: the node; shape, axes: of its operand and of the statistics. leaves, prologue: give the core's operand.
    extras, epilogue: give the outputs; the expression's inputs are the core's result, then the extras.
    outputs: values written. reduced: whether results have the shape left by the axes, rather than the operand's.
    label: what the epilogue holds besides the core's own parameters.
    """

    core: Node
    shape: tuple
    axes: tuple[int, ...]
    leaves: list[Leaf]
    prologue: tuple
    extras: list[Leaf]
    epilogue: tuple
    outputs: Sequence[Value]
    reduced: bool = False
    label: str = ""


def take_apart(node: Node, cores: Sequence[str], axes_of: Callable, affine: Callable | None = None) -> Parts | str:
    """The parts of a fused or lone node around the one core in it, or the reason why it has none.

    axes_of(core): the axes of the statistics. affine(core, inputs, outers, rank) -> (leaves, instructions): parameters
    of the core, applied to the normalised values (expression input 0) ahead of the epilogue.
    """
    inputs, outer, nodes, outputs = regions.body_of(node)
    found = [n for n in nodes if n.name in cores]
    if len(found) != 1:
        return f"a kernel of this family needs exactly one of {', '.join(cores)}"
    core = found[0]
    shape = core.inputs[0].shape
    rank = len(shape)
    before = regions.needed(nodes, [core.inputs[0]])
    inner, leaves, kept = regions.leaves_and_nodes(
        *regions.used_inputs(inputs, outer, before, [core.inputs[0]]), before, shape
    )
    prologue = expressions.encode_nodes(kept, inner, [core.inputs[0]])
    if isinstance(prologue, str):
        return prologue
    if any(o.shape != core.output.shape for o in outputs):
        return f"the outputs need the shape of {core.name}"
    reduced = core.name == "logsumexp"
    if reduced and tuple(outputs) != core.outputs:
        return "logsumexp takes no epilogue"
    parameters: list[Leaf] = []
    instructions: tuple = ()
    if affine is not None:
        outside = dict(zip(inputs, outer, strict=True))
        if any(v not in outside for v in core.inputs[1:]):
            return f"the parameters of {core.name} are computed inside of the fused node"
        parameters, instructions = affine(core, [outside[v] for v in core.inputs[1:]], rank)
    after = regions.needed(nodes, outputs, stop=core.outputs)
    inner, extras, kept = regions.leaves_and_nodes(*regions.used_inputs(inputs, outer, after, outputs), after, shape)
    epilogue = expressions.encode_nodes(kept, [core.output, *inner], outputs)
    if isinstance(epilogue, str):
        return epilogue
    label = expressions.name(epilogue)
    epilogue = _with_parameters(epilogue, instructions, [p.dtype for p in parameters])
    extras = parameters + extras
    return Parts(core, shape, axes_of(core), leaves, prologue, extras, epilogue, node.outputs, reduced, label)


def _with_parameters(epilogue: tuple, instructions: tuple, dtypes: list[str]) -> tuple:
    """The epilogue with `instructions` on (result, *parameters) in front; parameters come before its own extras."""
    own_dtypes, own, outputs = epilogue
    count, inputs = len(dtypes), len(own_dtypes)
    place = lambda i: i if i <= count else i + inputs - 1  # of an index of `instructions`
    head = tuple((op, tuple(place(i) for i in xs), attrs, d) for op, xs, attrs, d in instructions)
    last = inputs + count + len(head) - 1 if head else 0

    def moved(i: int) -> int:
        if i == 0:
            return last
        return i + count if i < inputs else i + count + len(head)

    tail = tuple((op, tuple(map(moved, xs)), attrs, d) for op, xs, attrs, d in own)
    return ((own_dtypes[0], *dtypes, *own_dtypes[1:]), head + tail, tuple(map(moved, outputs)))


def row_dtype(prologue: tuple) -> str:
    """The dtype in which a row's values live: that of the prologue's result, in compute form."""
    return compute_dtype(expressions.output_dtypes(prologue)[0])
