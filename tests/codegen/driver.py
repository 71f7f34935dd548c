"""Compiles kernels in the test process and runs KernelCalls on NumPy arrays."""

from __future__ import annotations

import ctypes
import functools
import importlib
import itertools

import llvmlite.binding as llvm
import numpy as np

from kgraph.codegen.cpu import builder as _builder
from kgraph.codegen.kernel import KernelCall, Temporary
from kgraph.ir.dims import evaluate

llvm.initialize_native_target()
llvm.initialize_native_asmprinter()

SIGNATURE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)


class StandInTarget:
    """The host, as codegen/target.py describes it."""

    def __init__(self, vector_bytes: int | None = None):
        self.triple = llvm.get_process_triple()
        features = llvm.get_host_cpu_features()
        self.features = features.flatten()
        self.cpu = llvm.get_host_cpu_name()
        widest = 64 if features.get("avx512f") else 32 if features.get("avx2") else 16
        self.vector_bytes = vector_bytes or widest
        self.num_vector_registers = 32 if features.get("avx512f") else 16

    def lanes(self, dtype: str) -> int:
        return self.vector_bytes // _builder.itemsize(_builder.compute_dtype(dtype))


@functools.cache
def host_target(vector_bytes: int | None = None) -> StandInTarget:
    return StandInTarget(vector_bytes)


class Compiled:
    """Machine code of one module; keeps the engine alive."""

    def __init__(self, ir_text: str):
        machine = llvm.Target.from_default_triple().create_target_machine(
            cpu=llvm.get_host_cpu_name(),
            features=llvm.get_host_cpu_features().flatten(),
            opt=3,
            reloc="pic",
            codemodel="small",
        )
        module = llvm.parse_assembly(ir_text)
        module.verify()
        options = llvm.create_pipeline_tuning_options(speed_level=3)
        options.loop_vectorization = options.slp_vectorization = False
        builder = llvm.create_pass_builder(machine, options)
        builder.getModulePassManager().run(module, builder)
        self.optimized = str(module)
        self.assembly = machine.emit_assembly(module)
        self.engine = llvm.create_mcjit_compiler(module, machine)
        self.engine.finalize_object()
        self.function = SIGNATURE(self.engine.get_function_address("kernel"))


@functools.cache
def compile_ir(ir_text: str) -> Compiled:
    """IR text -> `Compiled`, whose `.function(buffers, sizes, begin, end, scratch)` is callable."""
    return Compiled(ir_text)


def render(spec, target=None) -> str:
    module, function = spec.template.split(":")
    if not module.startswith("kgraph."):
        module = f"kgraph.codegen.cpu.{module}"
    return getattr(importlib.import_module(module), function)(spec.params, target or host_target())


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
            compiled = compile_ir(render(call.spec, target))
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
