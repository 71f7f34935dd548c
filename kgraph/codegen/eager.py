"""Kernels that eager primitives run on, where NumPy would be slow."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import numpy as np

from kgraph.codegen import families
from kgraph.codegen.compiler import compile_specs
from kgraph.codegen.kernel import KernelCall
from kgraph.codegen.target import host_target
from kgraph.ir import PRIMITIVES, Dim, TensorType, Value, make_node
from kgraph.ir.dims import evaluate
from kgraph.runtime.loader import Library

_KERNEL = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 2, ctypes.c_void_p)
_ALIGNMENT = 64


@functools.cache
def _words_kernel(stream: int) -> tuple[Library, Callable, KernelCall]:
    seed = Value(TensorType((2,), "uint32"))
    node = make_node(PRIMITIVES["random_words"], [seed], {"shape": (Dim.symbol("N"),), "stream": stream})
    (call,) = families.lower(node, host_target())
    objects = compile_specs([call.spec])
    library = Library(objects)
    (key,) = objects
    return library, _KERNEL(library.address(key)), call


def random_words(key: tuple[int, int], count: int, stream: int) -> np.ndarray:
    """The first `count` words of a stream, as `kgraph.ops.philox` defines them; uint32."""
    _, function, call = _words_kernel(stream)
    seed, out = np.array(key, np.uint32), np.empty(count, np.uint32)
    buffers = np.array([seed.ctypes.data, out.ctypes.data], np.uint64)
    numbers = {"N": count}
    sizes = np.array([evaluate(s, numbers) for s in call.sizes], np.int64)
    scratch = np.empty(evaluate(call.scratch_bytes, numbers) + _ALIGNMENT, np.uint8)
    aligned = scratch.ctypes.data + -scratch.ctypes.data % _ALIGNMENT
    function(buffers.ctypes.data, sizes.ctypes.data, 0, evaluate(call.extent, numbers), aligned)
    return out
