"""Compiles kernels in the test process and runs KernelCalls on NumPy arrays."""

from __future__ import annotations

import ctypes
import functools
import itertools

import numpy as np

from kgraph.codegen import compiler
from kgraph.codegen.cpu import compiler as cpu_compiler
from kgraph.codegen.kernel import KernelCall, Temporary
from kgraph.codegen.target import Target, make_target
from kgraph.ir.dims import evaluate
from kgraph.runtime.loader import Library

SIGNATURE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)

_LEVELS = {64: "x86-64-v4", 32: "x86-64-v3", 16: "x86-64-v2"}


@functools.cache
def host_target(vector_bytes: int | None = None) -> Target:
    """The machine's own target, or one of a narrower instruction set with vectors of `vector_bytes`."""
    native = make_target("native")
    if vector_bytes in (None, native.vector_bytes):
        return native
    return make_target(_LEVELS[vector_bytes])


class Compiled:
    """Machine code of one module; keeps it in memory."""

    def __init__(self, ir_text: str, target: Target):
        self.library = Library({"kernel": cpu_compiler.compile_ir(ir_text, target=target)})
        self.function = SIGNATURE(self.library.address("kernel"))


@functools.cache
def compile_ir(ir_text: str, target: Target | None = None) -> Compiled:
    """IR text -> `Compiled`, whose `.function(buffers, sizes, begin, end, scratch)` is callable."""
    return Compiled(ir_text, target or host_target())


def render(spec, target: Target | None = None) -> str:
    """The IR text of a kernel."""
    return compiler.render(spec, target or host_target())


def aligned_empty(nbytes: int, offset: int = 0) -> np.ndarray:
    raw = np.empty(nbytes + 128, np.uint8)
    start = (-raw.ctypes.data) % 64 + offset
    return raw[start : start + nbytes]


class Bound:
    """A list of KernelCalls with their buffers, for repeated runs."""

    def __init__(self, calls: list[KernelCall], inputs: dict, sizes: dict | None = None, target=None):
        """inputs: Value -> array. sizes: symbol -> int. Outputs and temporaries are allocated here."""
        sizes = sizes or {}
        self.buffers = {value: np.asarray(array, order="C") for value, array in inputs.items()}
        for value, array in inputs.items():
            assert self.buffers[value].dtype == value.type.np_dtype, (self.buffers[value].dtype, value)
            assert self.buffers[value].shape == np.shape(array)
        self.steps = []
        for call in calls:
            for operand in call.operands:
                if operand not in self.buffers:
                    type = operand.type
                    shape = tuple(evaluate(s, sizes) for s in type.shape)
                    fresh = aligned_empty(int(np.prod(shape)) * type.itemsize)
                    fresh[:] = 0xA5
                    self.buffers[operand] = fresh.view(type.np_dtype).reshape(shape)
            compiled = compile_ir(render(call.spec, target), target)
            pointers = np.array([self.buffers[o].ctypes.data for o in call.operands], np.uint64)
            integers = np.array([evaluate(s, sizes) for s in call.sizes] or [0], np.int64)
            scratch = aligned_empty(max(evaluate(call.scratch_bytes, sizes), 1))
            self.steps.append((compiled, pointers, integers, evaluate(call.extent, sizes), scratch))

    def run(self, parts: int = 1) -> None:
        """All calls in order, each split into `parts` ranges."""
        for compiled, pointers, integers, extent, scratch in self.steps:
            cuts = [extent * k // parts for k in range(parts + 1)]
            for begin, end in itertools.pairwise(cuts):
                if begin < end:
                    compiled.function(pointers.ctypes.data, integers.ctypes.data, begin, end, scratch.ctypes.data)


def run_node(lower, node, arrays, sizes=None, parts: int = 1, target=None) -> list[np.ndarray]:
    """Lowers `node` with `lower(node, target)`, runs it on `arrays` (one per input) and gives its outputs."""
    target = target or host_target()
    calls = lower(node, target)
    bound = Bound(calls, dict(zip(node.inputs, arrays, strict=True)), sizes, target)
    bound.run(parts)
    return [bound.buffers[o] for o in node.outputs]


__all__ = ["Bound", "Temporary", "aligned_empty", "compile_ir", "host_target", "render", "run_node"]
