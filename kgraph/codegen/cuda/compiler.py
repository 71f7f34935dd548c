"""From the source of a kernel to what a device loads: PTX by numba-cuda, or the source itself for the simulator.

Neither a GPU nor a driver is needed. PTX is written for the oldest instruction set that knows the architecture, so that
a driver older than the toolkit takes it: the compiler stamps its own version on it, but uses nothing that is newer.
"""

from __future__ import annotations

import re
from types import FunctionType

from kgraph.codegen.cuda.target import CudaTarget
from kgraph.errors import CompileError

# The name of the entry in all PTX.
ENTRY = "kernel"
# The first version of PTX that knows an architecture (with what NVVM emits for it).
_PTX_VERSIONS = (((12, 0), "8.7"), ((10, 0), "8.6"), ((9, 0), "7.8"), ((8, 9), "7.8"), ((8, 6), "7.1"), ((8, 0), "7.0"))
_OLDEST_PTX = "6.5"  # the first with products on tensor cores of 7.5
_MISSING = (
    "compiling for CUDA needs numba-cuda with NVVM: pip install 'kgraph[cuda]' (or 'kgraph[cuda12]' for a driver of "
    "CUDA 12)"
)


def prepare(target: CudaTarget) -> None:
    """Load what compiling needs, before processes are forked. Raises CompileError where it is missing."""
    if target.simulator:
        return
    try:
        from numba import config, cuda  # noqa: F401
    except ImportError as error:
        raise CompileError(f"{_MISSING}: {error}") from error
    if getattr(config, "ENABLE_CUDASIM", False):
        raise CompileError("NUMBA_ENABLE_CUDASIM=1 is set: Numba's simulator is on, which compiles nothing")


def compile_text(text: str, name: str, target: CudaTarget) -> bytes:
    """The object of a rendered kernel. Raises CompileError for source that does not compile, naming the kernel."""
    if target.simulator:
        return text.encode()
    prepare(target)
    from numba import cuda

    function, block = load(text, name)
    try:
        ptx, _ = cuda.compile(
            function,
            signature(function),
            device=False,
            abi="numba",
            cc=target.capability,
            output="ptx",
            launch_bounds=block,
        )
    except Exception as error:
        raise CompileError(f"kernel {name}: numba-cuda refuses its source: {error}\n{text}") from error
    return portable(ptx, target.capability).encode()


def load(text: str, name: str) -> tuple[FunctionType, int]:
    """The kernel of a rendered module, and the threads of its block."""
    namespace: dict = {"__name__": name}
    exec(compile(text, f"<{name}>", "exec", dont_inherit=True), namespace)
    (function,) = (v for v in namespace.values() if isinstance(v, FunctionType) and v.__module__ == name)
    return function, namespace["BLOCK"]


def signature(function: FunctionType):
    """The Numba signature that a kernel's annotations state: "float32*" is a pointer, "int64" a number."""
    from numba import types

    arguments = []
    for text in function.__annotations__.values():
        kind = getattr(types, text.rstrip("*"))
        arguments.append(types.CPointer(kind) if text.endswith("*") else kind)
    return types.void(*arguments)


def portable(ptx: str, capability: tuple[int, int]) -> str:
    """PTX with the entry's name and the version replaced: see the module's docstring."""
    entries = re.findall(r"\.entry\s+(\w+)", ptx)
    if len(entries) != 1:
        raise CompileError(f"expected one kernel in the PTX, found {entries}")
    ptx = re.sub(rf"\b{re.escape(entries[0])}(?=\b|_param_)", ENTRY, ptx)
    version = next((v for known, v in _PTX_VERSIONS if capability >= known), _OLDEST_PTX)
    return re.sub(r"^\.version \S+", f".version {version}", ptx, count=1, flags=re.MULTILINE)
