"""A program as JSON: its buffers, its steps and the names of its tensors and kernels.

Arrays rather than objects, in the order of the fields of `Buffer` and `NativeStep`; sizes as `dims.to_json` has them.
`decode` takes nothing on trust. What the executor and the Python around it follow (buffer numbers, views, positions of
operands, shapes of constants and weights) is checked here and in `Program`; what follows from run-time sizes is checked
when a program is bound to them. What a kernel reads and writes follows from its code and from the types of operands,
sizes and extent that it was made for: a digest of these stands with the code for every launch (`code_of`), and a plan
with any other launch is refused. So all that has to be trusted is the code itself.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from kgraph import dims
from kgraph.errors import ArtifactError, DTypeError
from kgraph.runtime.artifact_control import (
    CONTROL,
    bodies_of,
    decode_control,
    encode_control,
    named_objects,
    programs_of,
)
from kgraph.runtime.artifact_tensors import is_writable
from kgraph.runtime.plan import Program
from kgraph.runtime.steps import Buffer, HostStep, NativeStep
from kgraph.types import SHORT_NAMES, dtype_name, np_dtype

_MAX_RANK = 32
_MAX_COUNT = 1 << 20
_MAX_BYTES = 1 << 46
_MAX_DEPTH = 16

# Beside the kernels' objects, which have digests for names.
_LAUNCHES = "launches"

# From the text of a host step (a graph of one node) to its function.
HostFunctions = Callable[[str], Callable]


# -- writing ---------------------------------------------------------------------------------------------------------
def encode(
    program: Program, tensor_name: Callable[[np.ndarray], str], host_text: Callable[[Program, HostStep], str]
) -> dict[str, Any]:
    """The JSON value of a program with parameters.

    tensor_name: puts an array into the file and gives its name there. host_text: gives the text of a primitive that
    runs on NumPy.
    """

    def encode_body(body: Program) -> dict[str, Any]:
        return encode(body, tensor_name, host_text)

    kernels = {key: number for number, key in enumerate(program.kernels)}
    buffers = []
    for number, b in enumerate(program.buffers):
        value: Any = None
        if b.kind == "constant":
            value = tensor_name(program.constants[number].reshape(b.shape))
        elif b.kind == "dim":
            value = dims.to_json(b.value)
        shape = [dims.to_json(s) for s in b.shape]
        buffers.append([b.kind, shape, b.dtype, value, b.alias, dims.to_json(b.offset), b.name])
    steps = []
    for step in program.steps:
        common = [list(step.operands), step.outputs, step.label, list(step.layers)]
        if isinstance(step, HostStep):
            if isinstance(step.function, CONTROL):
                function = encode_control(step.function, encode_body, tensor_name)
            else:
                function = ["reference", host_text(program, step)]
            steps.append([*common, function, step.reason])
            continue
        sizes = [dims.to_json(s) for s in (step.extent, step.scratch_bytes, step.flops, step.bytes)]
        more = [[dims.to_json(s) for s in step.sizes], [list(pair) for pair in step.inplace], step.grain]
        steps.append([*common, kernels[step.kernel], *sizes, *more])
    return {
        "name": program.name,
        "buffers": buffers,
        "steps": steps,
        "kernels": list(kernels),
        "inputs": list(program.inputs),
        "input_names": list(program.input_names),
        "outputs": list(program.outputs),
        "params": [[b, tensor_name(v)] for b, v in zip(program.params, program.values, strict=True) if v is not None],
        "donations": [list(pair) for pair in program.donations],
        "rows": [program.rows, program.part_bytes],
    }


def code_of(program: Program) -> dict[str, bytes]:
    """What a file holds as the code of a program: its objects by key, and the digests of its `launches`."""
    digests = {
        _launch(each.buffers, step)
        for each in programs_of(program)
        for step in each.steps
        if isinstance(step, NativeStep)
    }
    digests |= {_repeats(body.repeat) for body in bodies_of(program)}
    return {**named_objects(program), _LAUNCHES: b"".join(sorted(digests))}


def _repeats(kernel: str) -> bytes:
    """Digest that stands for a kernel that repeats a body."""
    return hashlib.sha256(f"repeat {kernel}".encode()).digest()


def _launch(buffers: Sequence[Buffer], step: NativeStep) -> bytes:
    """Digest of what a kernel is launched on."""
    operands = [[buffers[b].dtype, [dims.to_json(s) for s in buffers[b].shape]] for b in step.operands]
    sizes = [dims.to_json(s) for s in (step.extent, step.scratch_bytes, *step.sizes)]
    return hashlib.sha256(json.dumps([step.kernel, operands, step.outputs, sizes, step.inplace]).encode()).digest()


def stored(array: np.ndarray) -> np.ndarray:
    """An array as it is put into the file: its bytes, where the file has no such dtype."""
    return array if is_writable(dtype_name(array.dtype)) else np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def restored(array: np.ndarray, shape: Sequence, dtype: str) -> np.ndarray:
    """What `stored` was given. Raises ValueError for another shape or dtype."""
    wanted, shape = np_dtype(dtype), tuple(shape)
    if array.dtype != wanted and not is_writable(dtype) and array.nbytes == math.prod(shape) * wanted.itemsize:
        array = array.view(wanted).reshape(shape)
    if array.dtype != wanted or array.shape != shape:
        raise ValueError(f"a tensor is {array.dtype}{list(array.shape)}, expected {dtype}{list(shape)}")
    return array


# -- reading ---------------------------------------------------------------------------------------------------------
def decode(
    data: Any, tensors: Mapping[str, np.ndarray], objects: Mapping[str, bytes], host_functions: HostFunctions
) -> Program:
    """The program that `encode` wrote, with its parameters.

    tensors: by the names in the plan. objects: what `code_of` gave.
    Raises ArtifactError for data that is not the plan of a program that can be run, and DTypeError for arrays that need
    a package that is not installed.
    """
    try:
        return _Decoder(data, tensors, objects, host_functions).program()
    except (ArtifactError, DTypeError):
        raise
    except (ValueError, TypeError, LookupError, RecursionError, OverflowError) as error:
        raise ArtifactError(f"the plan is damaged: {error}") from error


class _Decoder:
    def __init__(self, data, tensors, objects, host_functions: HostFunctions, depth: int = 0):
        self.data, self.tensors, self.objects, self.host_functions = data, tensors, objects, host_functions
        self.depth, self.buffers = depth, list[Buffer]()
        code = objects[_LAUNCHES]
        self.launches = {code[i : i + 32] for i in range(0, len(code), 32)}
        if depth > _MAX_DEPTH:
            raise ValueError("programs are nested too deeply")
        if type(data) is not dict:
            raise ValueError("it is no dictionary")

    def program(self) -> Program:
        data, objects = self.data, self.objects
        buffers = self.buffers = [self.buffer(*row) for row in _list(data["buffers"])]
        self.num_buffers = len(buffers)
        self.keys = [_text(key) for key in _list(data["kernels"])]
        kernels = {key: objects[key] for key in self.keys}
        steps = [self.step(_list(row)) for row in _list(data["steps"])]
        params = [_list(row) for row in _list(data["params"])]
        inputs, outputs = self.numbers(data["inputs"]), self.numbers(data["outputs"])
        param_numbers = self.numbers([number for number, _ in params])
        names = [_text(name) for name in _list(data["input_names"])]
        donations = [
            (_integer(i, 0, len(inputs) - 1), _integer(o, 0, len(outputs) - 1)) for i, o in _list(data["donations"])
        ]
        rows, part_bytes = _list(data.get("rows", ["", 0]))
        rows, part_bytes = _text(rows), _integer(part_bytes, 0, _MAX_BYTES)
        for kind, numbers in (("input", inputs), ("param", param_numbers)):
            own = [number for number, b in enumerate(buffers) if b.kind == kind]
            if sorted(numbers) != own:
                raise ValueError(f"its {kind} buffers are not its {kind}s")
        if len(names) != len(inputs):
            raise ValueError("its inputs have other names")
        native = any(isinstance(step, NativeStep) for step in steps)
        program = Program(
            _text(data["name"]),
            buffers,
            steps,
            inputs,
            outputs,
            param_numbers,
            kernels=kernels,
            executor=objects["executor"] if native else b"",
            input_names=names,
            donations=donations,
            rows=rows,
            part_bytes=part_bytes,
        )
        for number, b in enumerate(param_numbers):
            if any(isinstance(s, dims.Dim) for s in buffers[b].shape):
                raise ValueError(f"parameter {number} has a symbolic shape")
        values = [self.tensor(name, buffers[b].shape, buffers[b].dtype) for b, name in params]
        program.set_params(dict(enumerate(values)))
        return program

    def numbers(self, data) -> tuple[int, ...]:
        return tuple([_integer(b, 0, self.num_buffers - 1) for b in _list(data)])

    def tensor(self, name, shape: Sequence, dtype: str) -> np.ndarray:
        """A tensor of the file as the plan says it is; the file may hold just its bytes."""
        return restored(self.tensors[_text(name)], shape, dtype)

    def buffer(self, kind, shape, dtype, value, alias, offset, name) -> Buffer:
        shape = tuple([dims.from_json(s) for s in _list(shape, _MAX_RANK)])
        known = [s for s in shape if not isinstance(s, dims.Dim)]
        if _text(dtype) not in SHORT_NAMES:
            raise ValueError(f"there is no dtype {dtype!r}")
        if any(s < 0 for s in known) or math.prod(known) * np_dtype(dtype).itemsize > _MAX_BYTES:
            raise ValueError(f"a buffer has the sizes {shape}")
        if kind == "constant":
            if len(known) < len(shape):
                raise ValueError("a constant has a symbolic shape")
            value = self.tensor(value, shape, dtype)
        elif kind == "dim":
            if shape or np_dtype(dtype).kind not in "iuf":
                raise ValueError("the value of a size is not a scalar number")
            value = dims.from_json(value)
        elif value is not None:
            raise ValueError(f"a buffer of kind {kind!r} has a value")
        alias, offset = _integer(alias, -1, _MAX_COUNT), dims.from_json(offset)
        return Buffer(_text(kind), shape, dtype, value, alias, offset, _text(name))

    def step(self, row: list) -> NativeStep | HostStep:
        operands, outputs, label, layers, *rest = row
        operands = self.numbers(operands)
        outputs = _integer(outputs, 0, len(operands))
        label, layers = _text(label), tuple([_text(layer) for layer in _list(layers)])
        if len(rest) == 2:
            function = self.function(_list(rest[0]), len(operands) - outputs, outputs)
            inplace = getattr(function, "inplace", ())
            return HostStep(function, operands, outputs, _text(rest[1]), label, layers, inplace)
        kernel, extent, scratch, flops, nbytes, sizes, inplace, grain = rest
        split = len(operands) - outputs
        last = len(operands) - 1
        pairs = tuple([(_integer(o, split, last), _integer(i, 0, split - 1)) for o, i in _list(inplace)])
        made = NativeStep(
            kernel=self.keys[_integer(kernel, 0, len(self.keys) - 1)],
            operands=operands,
            outputs=outputs,
            extent=dims.from_json(extent),
            sizes=tuple([dims.from_json(size) for size in _list(sizes)]),
            scratch_bytes=_counted(scratch),
            flops=_counted(flops),
            bytes=_counted(nbytes),
            inplace=pairs,
            label=label,
            layers=layers,
            grain=_integer(grain, 0, _MAX_COUNT),
        )
        if _launch(self.buffers, made) not in self.launches:
            raise ValueError(f"the kernel of {label!r} was not made for these operands and sizes")
        return made

    def function(self, data: list, inputs: int, outputs: int) -> Callable:
        """The function of a step that Python runs."""
        if len(data) == 2 and data[0] == "reference":
            return self.host_functions(_text(data[1]))

        def body(plan) -> Program:
            return _Decoder(plan, self.tensors, self.objects, self.host_functions, self.depth + 1).program()

        return decode_control(data, inputs, outputs, body, self.tensor, lambda key: _repeats(key) in self.launches)


def _list(value, most: int = _MAX_COUNT) -> list:
    if type(value) is not list or len(value) > most:
        raise ValueError(f"expected a list of at most {most} items, found a {type(value).__name__}")
    return value


def _text(value) -> str:
    if type(value) is not str:
        raise ValueError(f"expected a text, found {value!r:.60}")
    return value


def _integer(value, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"expected a number from {low} to {high}, found {value!r:.60}")
    return value


def _counted(data):
    """A size that counts bytes or operations."""
    size = dims.from_json(data)
    if not isinstance(size, dims.Dim) and size < 0:
        raise ValueError(f"a count is {size}")
    return size
