"""Kernels called one by one from Python, where NumPy would be slow: eager primitives, packing of weights."""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from kgraph.codegen import families
from kgraph.codegen.cache import spec_key
from kgraph.codegen.compiler import compile_specs
from kgraph.codegen.kernel import KernelCall, KernelSpec
from kgraph.codegen.target import host_target
from kgraph.ir import PRIMITIVES, Dim, TensorType, Value, make_node
from kgraph.ir.dims import evaluate
from kgraph.ir.types import np_dtype
from kgraph.runtime.loader import Library

_KERNEL = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 2, ctypes.c_void_p)
_ALIGNMENT = 64
_loaded: dict[str, tuple[Library, Callable]] = {}
_loading = threading.Lock()


def load(specs: Sequence[KernelSpec], objects: Mapping[str, bytes] | None = None) -> None:
    """Make kernels of this machine ready. objects: by `spec_key`, where they have been compiled already."""
    with _loading:  # a library that another replaced would be gone while its code runs
        missing = {key: spec for spec in specs if (key := spec_key(spec)) not in _loaded}
        if missing and objects is None:
            objects = compile_specs(list(missing.values()))
        for key in missing:
            library = Library({key: (objects or {})[key]})
            _loaded[key] = library, _KERNEL(library.address(key))


def run_call(
    call: KernelCall, arrays: Sequence[np.ndarray], numbers: Mapping[str, int] = {}, out: np.ndarray | None = None
) -> np.ndarray:
    """The result of a call with one output, on this thread; the interpreter's lock is not held meanwhile.

    arrays: one per operand that is read. numbers: values of the symbolic sizes. out: a dense array for the result.
    """
    key = spec_key(call.spec)
    if key not in _loaded:
        load([call.spec])
    type = call.operands[-1].type
    if out is None:
        out = np.empty([evaluate(n, numbers) for n in type.shape], np_dtype(type.dtype))
    dense = [np.ascontiguousarray(a) for a in arrays]
    buffers = np.array([a.ctypes.data for a in (*dense, out)], np.uint64)
    sizes = np.array([evaluate(s, numbers) for s in call.sizes], np.int64)
    scratch = np.empty(evaluate(call.scratch_bytes, numbers) + _ALIGNMENT, np.uint8)
    aligned = scratch.ctypes.data + -scratch.ctypes.data % _ALIGNMENT
    function = _loaded[key][1]
    function(buffers.ctypes.data, sizes.ctypes.data, 0, evaluate(call.extent, numbers), aligned)
    return out


def _after_fork_in_child() -> None:
    global _loading
    _loading = threading.Lock()  # the thread that held it is not in the child


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


@functools.cache
def _words_call(stream: int) -> KernelCall:
    seed = Value(TensorType((2,), "uint32"))
    node = make_node(PRIMITIVES["random_words"], [seed], {"shape": (Dim.symbol("N"),), "stream": stream})
    (call,) = families.lower(node, host_target())
    return call


def random_words(key: tuple[int, int], count: int, stream: int) -> np.ndarray:
    """The first `count` words of a stream, as `kgraph.ops.philox` defines them; uint32."""
    return run_call(_words_call(stream), [np.array(key, np.uint32)], {"N": count})
