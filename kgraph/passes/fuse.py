"""Groups nodes into fused kernels: epilogues of products and convolutions, normalisations, reductions, loops."""

from __future__ import annotations

from collections.abc import Callable

from kgraph.decisions import Decision
from kgraph.ir import Graph, Node, Value, constant_value
from kgraph.passes.manager import PassContext
from kgraph.passes.patterns import CHEAP, is_elementwise, is_outer_operation, is_positional
from kgraph.passes.regions import Contraction, Region, fused_node, is_inline_constant, replace_regions
from kgraph.passes.rescaling import grow_rescaling

ANCHOR_KINDS = {
    "dot_general": "dot",
    "conv": "conv",
    "reduce_window": "pool",
    "softmax": "softmax",
    "log_softmax": "softmax",
    "layer_norm": "norm",
    "rms_norm": "norm",
    "group_norm": "norm",
    "moments": "moments",
    "reduce_sum": "reduce",
    "reduce_max": "reduce",
    "reduce_min": "reduce",
    "reduce_prod": "reduce",
    "reduce_and": "reduce",
    "reduce_or": "reduce",
}
WITH_PROLOGUE = {"softmax", "norm", "reduce", "moments"}
LARGEST_REGION = 64  # nodes; beyond it registers spill and compile time grows without a gain
MOST_LOOP_OUTPUTS = 4
MOST_SMALL_OUTPUTS = 8  # where they stay in the nearest cache, so that a kernel costs more to start than to run
MOST_PRODUCT_OUTPUTS = 2

FEWEST_ELEMENTS = 4096  # below, a value stays in the nearest cache
LONGEST_EPILOGUE = 6


def anchor_kind(node: Node) -> str | None:
    """The kind of kernel that a node may lead, or None."""
    if node.name == "conv" and node.attrs["feature_groups"] > 1:
        return "depthwise" if node.attrs["feature_groups"] == node.inputs[0].shape[-1] else "conv"
    return ANCHOR_KINDS.get(node.name)


def source_of(node: Node) -> Value | None:
    """The one operand of a cheap elementwise node that has its result's shape, if it is not wider in memory: to compute
    the node again costs no more than to read its result."""
    if node.name not in CHEAP or len(node.outputs) != 1:
        return None
    out = node.output.type
    if out.is_static and out.size < FEWEST_ELEMENTS:
        return None
    full = {v for v in node.inputs if v.shape == out.shape and constant_value(v) is None}
    if len(full) != 1:
        return None
    (source,) = full
    return source if source.type.itemsize <= out.itemsize else None


def is_made_of_less(node: Node) -> bool:
    """Whether a cheap elementwise node has no operand of its result's shape, such as the comparison of a row's numbers
    with a label: to compute it again costs less than to read its result."""
    if node.name not in CHEAP or len(node.outputs) != 1:
        return False
    out = node.output.type
    if out.is_static and out.size < FEWEST_ELEMENTS:
        return False
    return all(v.shape != out.shape or constant_value(v) is not None for v in node.inputs)


def computes_operands(contraction: Contraction, reader: Node, value: Value) -> bool:
    """Whether a kernel led by the reader may compute `value` on the fly."""
    if is_elementwise(reader):
        if len(reader.outputs) != 1 or reader.output.shape != value.shape:
            return False
        others = {v for v in reader.inputs if v is not value and v.shape == value.shape}
        return not any(_ends_a_product(contraction, v) for v in others)
    return anchor_kind(reader) in WITH_PROLOGUE and reader.inputs[0] is value and value not in reader.inputs[1:]


def _ends_a_product(contraction: Contraction, value: Value) -> bool:
    """Whether what reads the value may be in the epilogue of a product or convolution, whose operands lie in memory."""
    for _ in range(LONGEST_EPILOGUE):
        node = value.node
        if node is None or len(set(contraction.users.get(value, ()))) > 1:
            return False
        if not is_elementwise(node):
            return anchor_kind(node) not in {None, *WITH_PROLOGUE}
        full = [v for v in node.inputs if v.shape == value.shape and constant_value(v) is None]
        if not full:
            return False
        value = full[0]
    return False


def fuse(graph: Graph, context: PassContext) -> Graph:
    """`relu(conv(x, w) + b)  ->  fusion{conv, add, relu}(x, w, b)`; every refusal is stored with its reason."""
    contraction = Contraction(graph)
    fused: dict[Region, tuple[Node, list[Value]]] = {}

    def settle(kind: str, grown: list[Node], counts: list[int], anchor: Node | None) -> bool:
        """Claim the largest region that the code generator takes; regions are the first nodes of `grown`."""
        for count in reversed(counts):
            if count == 1:
                return False
            nodes = contraction.sorted(grown[:count])
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

    siblings: dict[tuple, list[Node]] = {}
    for node in graph.nodes:
        if anchor_kind(node) == "reduce":
            siblings.setdefault(reduction_of(node), []).append(node)
    for node in graph.nodes:
        kind = anchor_kind(node)
        if kind is None or node in contraction.region_of:
            continue
        nodes = [node]
        if kind in WITH_PROLOGUE:
            _grow_backward(contraction, nodes, node)
        if kind == "reduce" and settle("rescale", *grow_rescaling(contraction, node), node):
            continue
        if kind == "reduce":
            joint = _with_siblings(contraction, nodes, node, siblings[reduction_of(node)])
            if len(joint) > len(nodes):
                counts = _grow_forward(contraction, joint, node, context)
                if settle(kind, joint, counts, node):
                    continue
        counts = [len(nodes)]
        if len(node.outputs) == 1:
            counts = _grow_forward(contraction, nodes, node, context)
        settle(kind, nodes, counts, node)
    for node in graph.nodes:
        if node in contraction.region_of or not is_elementwise(node) or len(node.outputs) != 1:
            continue
        if node.name == "constant":
            continue
        settle("loop", *_grow_loop(contraction, node), None)
    return replace_regions(graph, contraction, fused)


def reduction_of(node: Node) -> tuple:
    """What reductions of one kernel have in common."""
    return node.inputs[0].shape, tuple(node.attrs["axes"]), node.attrs["keepdims"]


def _with_siblings(contraction: Contraction, nodes: list[Node], anchor: Node, siblings: list[Node]) -> list[Node]:
    """The nodes and further reductions over the same axes that read the same memory, with what leads to them."""
    shape = anchor.inputs[0].shape
    nodes = list(nodes)
    for other in siblings:
        if other in nodes or other in contraction.region_of or len(nodes) >= LARGEST_REGION:
            continue
        joint = [*nodes, other]
        reductions = [n for n in joint if anchor_kind(n) == "reduce"]
        for member in reductions:
            _grow_backward(contraction, joint, member)
        own = [n for n in joint if n not in nodes]
        read = {v for v in contraction.external_inputs(nodes) if v.shape == shape}
        shared = not read.isdisjoint(v for n in own for v in n.inputs)
        independent = not any(v.node in reductions for n in joint for v in n.inputs)
        if shared and independent and contraction.can_absorb(other, joint):
            nodes = joint
    return nodes


def _joins(contraction: Contraction, node: Node, shape: tuple, positional: bool = False) -> bool:
    """positional: the kernel also takes nodes whose elements are functions of their positions."""
    return (
        (is_elementwise(node) or positional)
        and len(node.outputs) == 1
        and node not in contraction.region_of
        and node.output.shape == shape
    )


def _grow_forward(contraction: Contraction, current: list[Node], anchor: Node, context: PassContext) -> list[int]:
    """Appends elementwise readers of the anchors' results; gives the counts of nodes at which there are no more live
    results than anchors (several reductions of one kernel, or just one), or those of a product that `_ends_well`."""
    shape = anchor.output.shape
    checkpoints = [len(current)]
    anchors = [n for n in current if n is anchor or (anchor_kind(n) == "reduce" and n.output.shape == shape)]
    values = [n.output for n in anchors]
    while values and len(current) < LARGEST_REGION:
        value = values.pop(0)
        if value in contraction.outputs:
            continue
        for user in sorted(set(contraction.users.get(value, ())), key=contraction.index.__getitem__):
            if user in current or not _joins(contraction, user, shape):
                continue
            if not contraction.can_absorb(user, current):
                continue
            current += _outer_operations(contraction, user, current)
            current.append(user)
            values.append(user.output)
            if len(contraction.live_outputs(current)) <= len(anchors) or _ends_well(contraction, current, anchor):
                checkpoints.append(len(current))
    if len(checkpoints) == 1:
        _explain_no_epilogue(contraction, anchor, context)
    return checkpoints


def _outer_operations(contraction: Contraction, user: Node, current: list[Node]) -> list[Node]:
    """Producers of the user's operands that `is_outer_operation` holds for, and that nobody else reads."""
    out: list[Node] = []
    for value in user.inputs:
        node = value.node
        if node is None or node in current or node in out or not is_outer_operation(node):
            continue
        if not _joins(contraction, node, user.output.shape) or value in contraction.outputs:
            continue
        alone = set(contraction.users[value]) == {user}
        if alone and contraction.can_absorb(node, [*current, user]):
            out.append(node)
    return out


def _ends_well(contraction: Contraction, current: list[Node], anchor: Node) -> bool:
    """Whether a product may end in several results: they are functions of its sums (and of vectors) alone and none is
    read inside, so that they take the place of the one array that they are computed from, as an activation and its
    derivative do."""
    if anchor.name != "dot_general":
        return False
    live = contraction.live_outputs(current)
    if len(live) > MOST_PRODUCT_OUTPUTS or not {v for n in current for v in n.inputs}.isdisjoint(live):
        return False
    return all(v.shape != anchor.output.shape for v in contraction.external_inputs(current))


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


def _grow_loop(contraction: Contraction, seed: Node) -> tuple[list[Node], list[int]]:
    """Elementwise nodes of one shape around `seed`, and how many of them make a region; several may have readers
    outside."""
    shape, out = seed.output.shape, seed.output.type
    most = MOST_SMALL_OUTPUTS if out.is_static and out.size < FEWEST_ELEMENTS else MOST_LOOP_OUTPUTS
    current = [seed]
    checkpoints: list[int] = []
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
            if _belongs_to_readers(contraction, other, current) or not contraction.can_absorb(other, current):
                continue
            current.append(other)
            if len(contraction.live_outputs(current)) > most:
                current.pop()
                continue
            frontier.append(other)
            checkpoints.append(len(current))
    return current, checkpoints


def _belongs_to_readers(contraction: Contraction, node: Node, region: list[Node]) -> bool:
    """Whether a reader of the region's results is better computed where it is read itself: what it is computed from is
    written anyway, and its readers can do so, but not in this region."""
    source = source_of(node)
    if source is None or source.node not in region or node.output in contraction.outputs:
        return False
    if source not in contraction.live_outputs([*region, node]):
        return False
    readers = contraction.users.get(node.output, ())
    return all(
        computes_operands(contraction, r, node.output) and not contraction.can_absorb(r, [*region, node])
        for r in readers
    )
