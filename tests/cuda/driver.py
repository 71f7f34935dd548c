"""Runs the kernel calls of CUDA families on NumPy arrays: in the simulator, on a GPU, or on one that is emulated
(`emulator`)."""

from __future__ import annotations

import functools
import os

import keras
import numpy as np

from kgraph.codegen.compiler import compile_spec
from kgraph.codegen.cuda import families
from kgraph.codegen.cuda.target import CudaTarget
from kgraph.ir import Value, constant_value, make_node, type_of
from kgraph.ir.dims import evaluate
from kgraph.runtime.cuda.device import Argument, device_for
from kgraph.targets import resolve

NAME = os.environ.get("KGRAPH_TEST_DEVICE", "cuda-simulator")
IS_EMULATED = NAME == "cuda-emulator"
DEVICE = "cuda" if IS_EMULATED else NAME
ON_GPU = DEVICE != "cuda-simulator"
IS_SLOW = NAME != "cuda"  # where every instruction is interpreted
if IS_EMULATED:
    from kgraph.runtime.cuda import device as devices
    from tests.cuda.emulator.driver import emulated_gpu

    devices._devices["cuda:0"] = emulated_gpu()


@functools.cache
def _function(source: bytes):
    return device_for(DEVICE).load({"test": source})["test"]


def run_node(node, arrays, sizes: dict | None = None, target: CudaTarget | None = None, most_blocks: int = 2):
    """Lowers `node` with its CUDA family, runs it on `arrays` (one per input) and gives its outputs.

    sizes: of the symbols. most_blocks: of a grid; results must not depend on it.
    """
    target, sizes, device = target or resolve(DEVICE), sizes or {}, device_for(DEVICE)
    assert families.accepts(node) is None, families.accepts(node)
    memory: dict = {}
    types: dict = {}

    def place(operand, array: np.ndarray) -> None:
        memory[operand] = device.allocate(max(array.nbytes, 1))
        types[operand] = array.nbytes, operand.type.dtype
        device.copy_in(memory[operand], array)

    for value, array in zip(node.inputs, arrays, strict=True):
        place(value, np.ascontiguousarray(array))
    try:
        for call in families.lower(node, target):
            for operand in call.operands:
                if operand not in memory:
                    table = constant_value(operand) if isinstance(operand, Value) else None
                    shape = [evaluate(s, sizes) for s in operand.type.shape]
                    place(operand, np.full(shape, 77).astype(operand.type.np_dtype) if table is None else table)
            source = compile_spec(call.spec, target)
            grid = min(evaluate(call.extent, sizes), most_blocks)
            if grid <= 0:
                continue
            buffers = [Argument(memory[o], *types[o]) for o in call.operands]
            numbers = [evaluate(s, sizes) for s in call.sizes]
            shared = evaluate(call.launch.shared_bytes, sizes)
            device.launch(_function(source), grid, call.launch.block, shared, buffers, numbers)
        out = []
        for value in node.outputs:
            array = np.empty([evaluate(s, sizes) for s in value.shape], value.type.np_dtype)
            device.copy_out(array, memory[value])
            out.append(array)
        return out
    finally:
        for address in memory.values():
            device.release(address)


def few_rows(arrays, count: int):
    """The first `count` rows of all arrays, which can be interpreted; all rows on a GPU."""
    return arrays if not IS_SLOW else keras.tree.map_structure(lambda a: a[:count], arrays)


def make(primitive, sample):
    """A node of the sample's operands."""
    values = [Value(type_of(np.asarray(a)), name=f"x{k}") for k, a in enumerate(sample.args)]
    return make_node(primitive, values, sample.attrs)
