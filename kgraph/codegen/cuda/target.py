"""The GPU that kernels are generated for."""

from __future__ import annotations

import functools
import importlib.metadata
from dataclasses import dataclass, field

from kgraph.errors import CompileError

# Streaming multiprocessors where the device is not known: those of a data-centre GPU of the architecture.
_TYPICAL_SMS = {(7, 5): 40, (8, 0): 108, (8, 6): 84, (8, 9): 128, (9, 0): 132, (10, 0): 148, (12, 0): 170}
_STATIC_SHARED_BYTES = 48 << 10


@dataclass(frozen=True)
class CudaTarget:
    """What a renderer may ask about the device; hashable, and part of every kernel's cache key.

    capability: (major, minor) of the compute capability. simulator: whether Numba's simulator runs the kernels.
    block: threads of a block of elementwise kernels and reductions. group: threads of a warp, which work on one row
        together where a whole block would have too little to do. Both are powers of two. num_sms: multiprocessors.
    unroll: elements that a thread of a simple kernel reads before it computes, so that it waits for memory once.
    shared_bytes: shared memory that a kernel may declare. ordinal: number of the GPU, which no kernel depends on.
    products, convolutions: whether the device has a library for them. tf32: whether they may round float32 to TF32.
    """

    capability: tuple[int, int]
    simulator: bool = False
    block: int = 256
    group: int = 32
    num_sms: int = 132
    unroll: int = 4
    shared_bytes: int = _STATIC_SHARED_BYTES
    ordinal: int = field(default=0, repr=False)  # cache keys are made of the text
    products: bool = field(default=False, repr=False)
    convolutions: bool = field(default=False, repr=False)
    tf32: bool = field(default=False, repr=False)

    @property
    def families(self) -> str:
        """The module that says which kernel family serves which node."""
        return "kgraph.codegen.cuda.families"

    @property
    def loop_group(self) -> str:
        """The module that joins small updates in one kernel."""
        return "kgraph.codegen.cuda.loop_group"

    @property
    def toolchain(self) -> str:
        """What turns rendered text into objects, with its version; part of every kernel's cache key."""
        if self.simulator:
            return "simulator"
        return f"numba-cuda {_version('numba-cuda')}, NVVM {_version('nvidia-nvvm', 'nvidia-cuda-nvcc-cu12')}"

    @property
    def sources(self) -> tuple[str, ...]:
        """Modules beside the templates that kernels' code depends on."""
        names = ("compiler", "device_functions", "mma")
        return ("kgraph.types", *(f"kgraph.codegen.cuda.{name}" for name in names))

    @property
    def machine(self) -> str:
        """What the kernels run on."""
        return "cuda-simulator" if self.simulator else "cuda"

    @property
    def device(self) -> str:
        """The name of the device that programs for this target run on."""
        return "cuda-simulator" if self.simulator else f"cuda:{self.ordinal}"

    @property
    def arch(self) -> str:
        """The architecture as the toolkit names it (`sm_90`)."""
        return "sm_{}{}".format(*self.capability)

    @property
    def most_blocks(self) -> int:
        """Blocks of a grid beyond which more of them gain nothing: all kernels loop over what is left."""
        return 2 if self.simulator else self.num_sms * 16


@functools.cache
def _version(*packages: str) -> str:
    """The version of the first of these packages that is installed."""
    for package in packages:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def make_target(capability: tuple[int, int], num_sms: int = 0, ordinal: int = 0) -> CudaTarget:
    """The target for a GPU of this compute capability: code for the last architecture before it that is known here,
    which later GPUs run too. Raises CompileError below 7.5, which NVVM no longer knows."""
    known = [c for c in _TYPICAL_SMS if c <= capability]
    if not known:
        raise CompileError(f"kgraph needs compute capability 7.5 (Turing) or later, the GPU has {capability}")
    return CudaTarget(max(known), num_sms=num_sms or _TYPICAL_SMS[max(known)], ordinal=ordinal)


def simulator_target() -> CudaTarget:
    """The target of the simulator: every thread is interpreted, so blocks are tiny."""
    return CudaTarget((9, 0), simulator=True, block=4, group=2, num_sms=1, unroll=2)
