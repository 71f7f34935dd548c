"""Groups nodes into fused kernels: epilogues of products and convolutions, normalisations, reductions, loops."""

from __future__ import annotations

from collections.abc import Callable

from kgraph.decisions import Decision
from kgraph.ir import Graph, Node, Value
from kgraph.passes.manager import PassContext
from kgraph.passes.patterns import is_elementwise, is_positional
from kgraph.passes.regions import Contraction, Region, fused_node, is_inline_constant, replace_regions

ANCHOR_KINDS = {
    "dot_general": "dot",
    "conv": "conv",
    "reduce_window": "pool",
    "softmax": "softmax",
    "log_softmax": "softmax",
    "layer_norm": "norm",
    "rms_norm": "norm",
    "group_norm": "norm",
    "reduce_sum": "reduce",
    "reduce_max": "reduce",
    "reduce_min": "reduce",
    "reduce_prod": "reduce",
    "reduce_and": "reduce",
    "reduce_or": "reduce",
}
WITH_PROLOGUE = {"softmax", "norm", "reduce"}
LARGEST_REGION = 64  # nodes; beyond it registers spill and compile time grows without a gain
MOST_LOOP_OUTPUTS = 4


def anchor_kind(node: Node) -> str | None:
    """The kind of kernel that a node may lead, or None."""
    if node.name == "conv" and node.attrs["feature_groups"] > 1:
        return "depthwise" if node.attrs["feature_groups"] == node.inputs[0].shape[-1] else "conv"
    return ANCHOR_KINDS.get(node.name)


def fuse(graph: Graph, context: PassContext) -> Graph:
    """`relu(conv(x, w) + b)  ->  fusion{conv, add, relu}(x, w, b)`; every refusal is stored with its reason."""
    contraction = Contraction(graph)
    fused: dict[Region, tuple[Node, list[Value]]] = {}

    def settle(kind: str, candidates: list[list[Node]], anchor: Node | None) -> bool:
        """Claim the largest candidate that the code generator takes."""
        for nodes in candidates:
            if len(nodes) == 1 and anchor is not None:
                return False
            node, results = fused_node(contraction, kind, nodes)
            reason = context.accepts(node)
            if reason is None:
                region = Region(kind, nodes, anchor)
                contraction.claim(region)
                fused[region] = (node, results)
                return True
            subject = (anchor or nodes[0]).name + " + " + ", ".join(n.name for n in nodes if n is not anchor)
            context.decisions.append(Decision(subject, "not fused", reason, node.provenance))
        return False

    for node in graph.nodes:
        kind = anchor_kind(node)
        if kind is None or node in contraction.region_of or len(node.outputs) != 1:
            continue
        nodes = [node]
        if kind in WITH_PROLOGUE:
            _grow_backward(contraction, nodes, node)
        checkpoints = _grow_forward(contraction, nodes, node, context)
        settle(kind, checkpoints[::-1], node)
    for node in graph.nodes:
        if node in contraction.region_of or not is_elementwise(node) or len(node.outputs) != 1:
            continue
        if node.name == "constant":
            continue
        checkpoints = _grow_loop(contraction, node)
        settle("loop", [c for c in checkpoints[::-1] if len(c) > 1], None)
    return replace_regions(graph, contraction, fused)


def _joins(contraction: Contraction, node: Node, shape: tuple, positional: bool = False) -> bool:
    """positional: the kernel also takes nodes whose elements are functions of their positions."""
    return (
        (is_elementwise(node) or positional)
        and len(node.outputs) == 1
        and node not in contraction.region_of
        and node.output.shape == shape
    )


def _grow_forward(contraction: Contraction, nodes: list[Node], anchor: Node, context: PassContext) -> list[list[Node]]:
    """Regions of growing size, each with one live result, ending in elementwise readers of the anchor's result."""
    shape = anchor.output.shape
    checkpoints = [contraction.sorted(nodes)]
    current = list(nodes)
    values = [anchor.output]
    while values and len(current) < LARGEST_REGION:
        value = values.pop(0)
        if value in contraction.outputs:
            continue
        for user in sorted(set(contraction.users.get(value, ())), key=contraction.index.__getitem__):
            if user in current or not _joins(contraction, user, shape):
                continue
            if not contraction.can_absorb(user, current):
                continue
            current.append(user)
            values.append(user.output)
            if len(contraction.live_outputs(current)) == 1:
                checkpoints.append(contraction.sorted(current))
    if len(checkpoints) == 1:
        _explain_no_epilogue(contraction, anchor, context)
    return checkpoints


def _explain_no_epilogue(contraction: Contraction, anchor: Node, context: PassContext) -> None:
    users = sorted(set(contraction.users.get(anchor.output, ())), key=contraction.index.__getitem__)
    if anchor.output in contraction.outputs:
        reason = "its result is an output of the graph"
    elif not users:
        return
    elif len(users) > 1:
        reason = "its result has several readers: " + ", ".join(u.name for u in users)
    elif users[0] in contraction.region_of:
        reason = f"its reader {users[0].name} is part of another kernel"
    elif not is_elementwise(users[0]):
        reason = f"its reader {users[0].name} is not elementwise"
    elif users[0].output.shape != anchor.output.shape:
        reason = f"its reader {users[0].name} has the larger shape {users[0].output.type}"
    else:
        reason = "fusing would make a cycle"
    context.decisions.append(Decision(anchor.name, "no epilogue", reason, anchor.provenance))


def _grow_backward(contraction: Contraction, nodes: list[Node], anchor: Node) -> None:
    """Add elementwise producers of the anchor's operand that nobody else reads."""
    shape = anchor.inputs[0].shape
    queue = [anchor.inputs[0]]
    while queue and len(nodes) < LARGEST_REGION:
        value = queue.pop()
        producer = value.node
        if producer is None or producer in nodes or not _joins(contraction, producer, shape):
            continue
        if producer.name == "constant" or value in contraction.outputs:
            continue
        if any(user not in nodes for user in contraction.users[value]):
            continue
        if not contraction.can_absorb(producer, nodes):
            continue
        nodes.append(producer)
        queue.extend(producer.inputs)


def _grow_loop(contraction: Contraction, seed: Node) -> list[list[Node]]:
    """Elementwise nodes of one shape around `seed`; several of them may have readers outside."""
    shape = seed.output.shape
    current = [seed]
    checkpoints: list[list[Node]] = []
    frontier: list[Node] = [seed]
    neighbours: Callable[[Node], list[Node]] = lambda n: [
        *(contraction.users.get(n.output, ())),
        *(v.node for v in n.inputs if v.node is not None),
    ]
    while frontier and len(current) < LARGEST_REGION:
        node = frontier.pop(0)
        for other in neighbours(node):
            if other in current or other.name == "constant":
                continue
            if not _joins(contraction, other, shape, is_positional(other)):
                continue
            if any(is_inline_constant(o) for o in other.outputs):
                continue
            if not contraction.can_absorb(other, current):
                continue
            current.append(other)
            if len(contraction.live_outputs(current)) > MOST_LOOP_OUTPUTS:
                current.pop()
                continue
            frontier.append(other)
            checkpoints.append(contraction.sorted(current))
    return checkpoints
