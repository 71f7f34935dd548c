"""Which kernel family serves which primitive or kind of fused node."""

from __future__ import annotations

import importlib
from types import ModuleType

from kgraph.codegen.kernel import KernelCall
from kgraph.ir import Node, Value

# Modules of kgraph.codegen.cpu, by primitive name. What is elementwise and not named here goes to `loop`.
BY_PRIMITIVE = {
    "dot_general": "gemm",
    "conv": "conv",
    "reduce_window": "pool",
    "softmax": "softmax",
    "log_softmax": "softmax",
    "logsumexp": "softmax",
    "layer_norm": "norm",
    "rms_norm": "norm",
    "group_norm": "norm",
    "batch_norm": "norm",
    "moments": "moments",
    "attention": "attention",
    "attention_gradient": "attention_gradient",
    "rnn": "rnn",
    "rnn_gradient": "rnn_gradient",
    "resize": "resize",
    "select_and_scatter_add": "pool_gradient",
    "conv_filter_gradient": "conv_filter",
    **dict.fromkeys(
        "reduce_sum reduce_prod reduce_max reduce_min reduce_and reduce_or argmax argmin".split(), "reduce"
    ),
    **dict.fromkeys("cumsum cumprod cummax cummin cumlogsumexp".split(), "cumulative"),
    **dict.fromkeys("sort argsort top_k searchsorted".split(), "sort"),
    **dict.fromkeys("take take_along_axis gather_nd".split(), "gather"),
    **dict.fromkeys("scatter_nd scatter_along_axis".split(), "scatter"),
    **dict.fromkeys(
        "transpose slice pad pad_mirror concatenate rev broadcast_to dynamic_slice dynamic_update_slice".split(),
        "data_movement",
    ),
    **dict.fromkeys("iota full random_words".split(), "loop"),
}
BY_KIND = {
    "loop": "loop",
    "reduce": "reduce",
    "rescale": "rescale",
    "dot": "gemm",
    "conv": "conv",
    "depthwise": "conv",
    "pool": "pool",
    "softmax": "softmax",
    "norm": "norm",
    "moments": "moments",
    "rnn": "rnn",
    "rnn_gradient": "rnn_gradient",
}


def for_target(target) -> ModuleType:
    """The module with `accepts`, `lower` and `packing_for` for a target: this one for processors."""
    return importlib.import_module(target.families)


def family_of(node: Node) -> ModuleType | None:
    """The kernel family for a node, or None where no family claims its primitive."""
    if node.name == "fusion":
        name = BY_KIND.get(node.attrs["kind"])
    else:
        name = BY_PRIMITIVE.get(node.name)
        if name is None and "elementwise" in node.primitive.traits:
            name = "loop"
    return None if name is None else importlib.import_module(f"kgraph.codegen.cpu.{name}")


def accepts(node: Node) -> str | None:
    """None where a native kernel exists for the node, else the reason why not."""
    if "host" in node.primitive.traits:
        return f"{node.name} runs on NumPy/SciPy by design"
    for value in (*node.inputs, *node.outputs):
        if value.dtype.startswith("complex"):
            return "no native kernels for complex numbers"
    family = family_of(node)
    if family is None:
        return f"no kernel family for {node.name}"
    return family.accepts(node)


def lower(node: Node, target) -> list[KernelCall]:
    """The kernel calls of a node that `accepts` takes."""
    family = family_of(node)
    if family is None:
        raise ValueError(f"no kernel family for {node.name}")
    return family.lower(node, target)


def views(node: Node) -> tuple[Value, ...]:
    """Operands, results of slices, in whose place the kernels of the node read what was sliced."""
    family = family_of(node)
    if family is None or not hasattr(family, "views") or accepts(node) is not None:
        return ()
    return family.views(node)


def packing_for(node: Node, target) -> tuple | None:
    """How a contraction wants its weight operands laid out: ((operand index, layout), ...), or None."""
    family = family_of(node)
    if family is None or not hasattr(family, "packing_for") or family.accepts(node) is not None:
        return None
    return family.packing_for(node, target)
