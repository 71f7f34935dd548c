"""Which kernel family of this package serves which primitive or kind of fused node."""

from __future__ import annotations

import importlib
from types import ModuleType

from kgraph.codegen.kernel import KernelCall
from kgraph.ir import Node, Value

# Modules of kgraph.codegen.cuda, by primitive name. What is elementwise and not named here goes to `loop`.
BY_PRIMITIVE = {
    "conv": "conv",
    "conv_filter_gradient": "conv_filter",
    "reduce_window": "pool",
    "select_and_scatter_add": "pool_gradient",
    "resize": "resize",
    **dict.fromkeys(
        "reduce_sum reduce_prod reduce_max reduce_min reduce_and reduce_or argmax argmin".split(), "reduce"
    ),
    "dot_general": "gemm",
    "attention": "attention",
    **dict.fromkeys("softmax log_softmax logsumexp".split(), "softmax"),
    **dict.fromkeys("layer_norm rms_norm group_norm batch_norm".split(), "norm"),
    "moments": "moments",
    "attention_gradient": "attention_gradient",
    **dict.fromkeys("cumsum cumprod cummax cummin cumlogsumexp".split(), "cumulative"),
    **dict.fromkeys("sort argsort top_k searchsorted".split(), "sort"),
    **dict.fromkeys("iota full random_words broadcast_to".split(), "loop"),
    **dict.fromkeys(
        "transpose slice pad pad_mirror concatenate rev dynamic_slice dynamic_update_slice".split(), "data_movement"
    ),
    **dict.fromkeys("take take_along_axis gather_nd".split(), "gather"),
    **dict.fromkeys("scatter_nd scatter_along_axis".split(), "scatter"),
    "rnn": "rnn",
    "rnn_gradient": "rnn_gradient",
}
BY_KIND = {
    "conv": "conv",
    "depthwise": "conv",
    "pool": "pool",
    "loop": "loop",
    "reduce": "reduce",
    "rescale": "rescale",
    "dot": "gemm",
    "softmax": "softmax",
    "norm": "norm",
    "moments": "moments",
    "rnn": "rnn",
    "rnn_gradient": "rnn_gradient",
}


def family_of(node: Node) -> ModuleType | None:
    """The kernel family for a node, or None where no family claims its primitive."""
    if node.name == "fusion":
        name = BY_KIND.get(node.attrs["kind"])
    else:
        name = BY_PRIMITIVE.get(node.name)
        if name is None and "elementwise" in node.primitive.traits:
            name = "loop"
    return None if name is None else importlib.import_module(f"kgraph.codegen.cuda.{name}")


def accepts(node: Node) -> str | None:
    """None where a CUDA kernel exists for the node, else the reason why not."""
    if "host" in node.primitive.traits:
        return f"{node.name} runs on NumPy/SciPy by design"
    for value in (*node.inputs, *node.outputs):
        if value.dtype.startswith("complex"):
            return "no native kernels for complex numbers"
    family = family_of(node)
    if family is None:
        return f"no CUDA kernel family for {node.name}"
    return family.accepts(node)


def lower(node: Node, target) -> list[KernelCall]:
    """The kernel calls of a node that `accepts` takes."""
    family = family_of(node)
    if family is None:
        raise ValueError(f"no CUDA kernel family for {node.name}")
    return family.lower(node, target)


def views(node: Node) -> tuple[Value, ...]:
    """None: kernels read slices as arrays of their own."""
    return ()


def packing_for(node: Node, target) -> tuple | None:
    """How a contraction wants its weight operands laid out: as they are, on a GPU."""
    return None
