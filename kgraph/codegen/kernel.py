"""What a kernel family hands over: the kernel's identity and how a plan calls it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kgraph.ir import Dim, TensorType, Value
from kgraph.runtime.steps import Convolution, Product


@dataclass(frozen=True)
class KernelSpec:
    """Identity of a kernel: equal specs are compiled once, in this process and on disk.

    name: made of what is in it (`gemm_bias_relu`); used in profiles and file names.
    template: "module:function" of a renderer in `kgraph.codegen.cpu`, called as `function(params, target)` on a cache
        miss; it gives LLVM IR text with the one external function `kernel`. For a GPU it is in `kgraph.codegen.cuda`
        and gives the source of a module with one kernel.
    params: everything that the code depends on (static sizes, dtypes, the fused expressions), as nested tuples.
    """

    name: str
    template: str
    params: tuple

    @property
    def module(self) -> str:
        """The full name of the template's module."""
        return template_module(self.template)


def template_module(template: str) -> str:
    """The full name of a template's module, which may be written in full or relative to `kgraph.codegen.cpu`."""
    name = template.partition(":")[0]
    return name if name.startswith("kgraph.") else f"kgraph.codegen.cpu.{name}"


@dataclass(eq=False)
class Temporary:
    """A buffer that lives from the first to the last KernelCall of one node (partial sums, packed panels)."""

    type: TensorType


@dataclass(frozen=True)
class Launch:
    """How a GPU runs a kernel: threads of a block, and the bytes of shared memory that the launch adds to those that
    the kernel declares. The grid has at most `extent` blocks."""

    block: int
    shared_bytes: int | Dim = 0


@dataclass
class LibraryCall:
    """What a device's library may do in place of a kernel call and of those that continue it.

    operands: by whose positions `task` names them; the last one is written. before, after: the calls around it.
    """

    task: Product | Convolution
    operands: Sequence[Value | Temporary]
    before: Sequence[KernelCall] = ()
    after: Sequence[KernelCall] = ()


@dataclass
class KernelCall:
    """One step of a plan: `kernel(buffers, sizes, begin, end, scratch)` over [0, extent), split between threads.

    operands: buffers in the kernel's order, inputs first; each a Value or a Temporary.
    outputs: how many of the last operands are written.
    sizes: run-time integers for the kernel, evaluated when a plan is bound to concrete sizes.
    scratch_bytes: memory per thread.
    notes: "inplace", pairs (output, input) of operands that may lie in one place; "grain", how many units in a row
        share what the first one of a chunk makes; "algorithm", for `explain`.
    flops, bytes: totals over the extent, for the thread decision, `explain` and the roofline.
    launch: for a GPU; the extent counts blocks then, and the kernel takes the operands and sizes one by one.
    library: what may be done instead, if the device has one. continues: whether the call goes on with what the one
        before it began, and falls away with that.
    """

    spec: KernelSpec
    operands: Sequence[Value | Temporary]
    outputs: int
    sizes: Sequence[int | Dim]
    extent: int | Dim
    flops: int | Dim
    bytes: int | Dim
    scratch_bytes: int | Dim = 0
    notes: dict[str, Any] = field(default_factory=dict)
    launch: Launch | None = None
    library: LibraryCall | None = None
    continues: bool = False
