"""Convolutions and their cotangents by NVIDIA's cuDNN, where it is installed: through ctypes, on the device's stream.

This is the library's graph API ("backend"). Its older functions for convolutions are all deprecated as of cuDNN 9, take
the same padding on both sides only, and do not say whether an algorithm rounds; here engines are asked for what they do
to numbers. Descriptors are made, told their attributes, and finalised; numbers of kinds, attributes and types are those
of `cudnn_graph.h` (cuDNN 9).

Tensors are channels-last. An engine is taken if it uses tensor cores, sums in float32 whatever the operands are, gives
the same bits in every run, and multiplies the operands themselves: no transforms (FFT, Winograd), no narrower types.
Those without tensor cores are the library's generic ones, which copy channels-last tensors first: kgraph's own kernels
do better there, so float32 is only offered where it may be rounded to TF32, and float64 is not.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import CDLL, POINTER, byref, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from typing import Any

from kgraph.errors import DeviceError
from kgraph.runtime.cuda.device import Device
from kgraph.runtime.cuda.device_array import Allocation
from kgraph.runtime.steps import Convolution

# Arguments of the functions in use; all of them give a cudnnStatus_t.
SIGNATURES: dict[str, tuple] = {
    "cudnnCreate": (POINTER(c_void_p),),
    "cudnnSetStream": (c_void_p, c_void_p),
    "cudnnBackendCreateDescriptor": (c_int, POINTER(c_void_p)),
    "cudnnBackendDestroyDescriptor": (c_void_p,),
    "cudnnBackendSetAttribute": (c_void_p, c_int, c_int, c_int64, c_void_p),
    "cudnnBackendGetAttribute": (c_void_p, c_int, c_int, c_int64, POINTER(c_int64), c_void_p),
    "cudnnBackendFinalize": (c_void_p,),
    "cudnnBackendExecute": (c_void_p, c_void_p, c_void_p),
}
# CUDNN_TYPE_*: the number, and what an element of it is here.
HANDLE, DATA_TYPE, INT64, FLOAT = (0, c_void_p), (1, c_int), (3, c_int64), (4, c_float)
POINTERS, MODE, HEURISTIC, NOTE, DESCRIPTOR = (6, c_void_p), (7, c_int), (8, c_int), (11, c_int), (15, c_void_p)
# CUDNN_BACKEND_*_DESCRIPTOR
CONVOLUTION, ENGINE, CONFIGURATION, HEURISTICS, EXECUTION = 1, 2, 3, 4, 5
GRAPH, PACK, TENSOR = 15, 16, 17
# The operation of each kind of convolution, and its attributes: alpha, beta, the convolution, filters, image, result.
OPERATIONS = {
    "forward": (10, (700, 701, 702, 703, 704, 705)),
    "image": (12, (706, 707, 708, 709, 710, 711)),
    "filters": (11, (712, 713, 714, 715, 716, 717)),
}
# CUDNN_ATTR_*
_COMPUTE_TYPE, _CONVOLUTION_MODE, _DILATIONS, _STRIDES, _PADDING_BEHIND, _PADDING_BEFORE, _RANK = (
    100,
    101,
    102,
    103,
    104,
    105,
    106,
)
_HEURISTICS_MODE, _HEURISTICS_GRAPH, _HEURISTICS_RESULTS = 200, 201, 202
_CONFIGURATION_ENGINE, _EXECUTION_HANDLE, _EXECUTION_CONFIGURATION, _EXECUTION_WORKSPACE = 300, 400, 401, 402
_GRAPH_HANDLE, _GRAPH_OPERATIONS, _ENGINE_NOTES = 800, 801, 1303
_TENSOR_ALIGNMENT, _TENSOR_TYPE, _TENSOR_SIZES, _TENSOR_STRIDES, _TENSOR_ID = 900, 901, 902, 903, 906
_PACK_IDS, _PACK_ADDRESSES, _PACK_WORKSPACE = 1000, 1001, 1003
_DATA_TYPES = {"float32": 0, "float16": 2, "bfloat16": 9}
_CROSS_CORRELATION, _BY_DECISION_TREE = 1, 3
# CUDNN_NUMERICAL_NOTE_*: tensor cores; and converted inputs, narrow sums, FFT, results that vary, Winograd of any tile.
_TENSOR_CORES, _UNWANTED = 0, frozenset(range(1, 9))
_MOST_NOTES = 16
_MOST_CONFIGURATIONS = 32
_MOST_WORKSPACE = 256 << 20
_STATUS_CATEGORIES = {
    1: "NOT_INITIALIZED",
    2: "BAD_PARAM",
    3: "NOT_SUPPORTED",
    4: "INTERNAL_ERROR",
    5: "EXECUTION_FAILED",
}
_REFUSED = (2, 3)
_FILTERS, _IMAGE, _RESULT = 1, 2, 3  # ids of the tensors


class _Refusal(DeviceError):
    """The library does not compute a convolution, or what it is told does not go together."""


class Convolutions:
    """The library on one device. library: an opened cuDNN, or what stands in its place in tests.

    Raises DeviceError where the library does not work on the device.
    """

    def __init__(self, device: Device, library: Any):
        self.device, self._library = device, library
        if isinstance(library, CDLL):
            for name, arguments in SIGNATURES.items():
                function = getattr(library, name)
                function.argtypes, function.restype = arguments, c_int
            library.cudnnGetLastErrorString.argtypes = (c_char_p, c_size_t)
            library.cudnnGetLastErrorString.restype = None
        handle = c_void_p()
        self.call("cudnnCreate", byref(handle))
        self.handle = handle
        self.call("cudnnSetStream", handle, c_void_p(device.stream_number))
        self._workspace = Allocation(device, 0), 0

    def status(self, name: str, *arguments) -> int:
        return getattr(self._library, name)(*arguments)

    def call(self, name: str, *arguments) -> None:
        """Call a function. Raises DeviceError for any status but success."""
        code = self.status(name, *arguments)
        if code:
            raise DeviceError(f"{name} failed: {self.reason(code)}")

    def reason(self, code: int) -> str:
        """A status, and what the library says about it."""
        text = ctypes.create_string_buffer(1024)
        self._library.cudnnGetLastErrorString(text, len(text))
        return f"CUDNN_STATUS_{_STATUS_CATEGORIES.get(code // 1000, '')} ({code}) {text.value.decode(errors='replace')}"

    def workspace(self, nbytes: int) -> Allocation:
        """Memory of at least so many bytes. All work goes to one stream, so that one piece serves all calls; whoever
        has been given a smaller piece keeps that alive."""
        if self._workspace[1] < nbytes:
            self._workspace = Allocation(self.device, nbytes), nbytes
        return self._workspace[0]

    def plan(self, task: Convolution, value: Callable[[Any], int], alignments: Sequence[int]) -> ConvolutionPlan | str:
        """How the library computes a convolution at the sizes that `value` gives; a string says why it does not."""
        try:
            return ConvolutionPlan(self, task, value, alignments)
        except _Refusal as refusal:
            return str(refusal)


class Descriptor:
    """A descriptor of the library's, which keeps those that it has been told of. It goes with the last reference."""

    def __init__(self, library: Convolutions, kind: int):
        self._library, self.handle = library, c_void_p()
        self._kept: list[Descriptor] = []
        library.call("cudnnBackendCreateDescriptor", kind, byref(self.handle))

    def __del__(self):
        if self.handle:
            self._library.status("cudnnBackendDestroyDescriptor", self.handle)

    def set(self, attribute: int, kind: tuple[int, Any], *values) -> Descriptor:
        """Tell it an attribute; gives the descriptor itself. Raises as `finalise` does."""
        number, element = kind
        given = [v.handle if isinstance(v, Descriptor) else v for v in values]
        self._kept += [v for v in values if isinstance(v, Descriptor)]
        array = (element * len(values))(*given)
        self._check("cudnnBackendSetAttribute", self.handle, attribute, number, len(values), array)
        return self

    def finalise(self) -> Descriptor:
        """Gives the descriptor itself. Raises _Refusal for what the library does not support, else DeviceError."""
        self._check("cudnnBackendFinalize", self.handle)
        return self

    def get(self, attribute: int, kind: tuple[int, Any], most: int) -> list:
        """The values of an attribute, at most so many."""
        number, element = kind
        array, count = (element * most)(), c_int64()
        self._check("cudnnBackendGetAttribute", self.handle, attribute, number, most, byref(count), array)
        return list(array[: count.value])

    def descriptors(self, attribute: int, kind: int, most: int) -> list[Descriptor]:
        """The descriptors of an attribute, at most so many: the library writes them into fresh ones of their kind."""
        fresh = [Descriptor(self._library, kind) for _ in range(most)]
        array, count = (c_void_p * most)(*(d.handle for d in fresh)), c_int64()
        arguments = (attribute, DESCRIPTOR[0], most, byref(count), array)
        self._check("cudnnBackendGetAttribute", self.handle, *arguments)
        return fresh[: count.value]

    def _check(self, name: str, *arguments) -> None:
        code = self._library.status(name, *arguments)
        if code // 1000 in _REFUSED:
            raise _Refusal(self._library.reason(code))
        if code:
            raise DeviceError(f"{name} failed: {self._library.reason(code)}")


class ConvolutionPlan:
    """A convolution at concrete sizes: an engine of the library, and the memory that it works in."""

    def __init__(
        self, library: Convolutions, task: Convolution, value: Callable[[Any], int], alignments: Sequence[int]
    ):
        self._library, self.task = library, task
        shapes = [[value(n) for n in shape] for shape in (task.filters_shape, task.image_shape, task.result_shape)]
        strides, low, dilation = ([value(n) for n in sizes] for sizes in (task.strides, task.low, task.dilation))
        if any(0 in shape for shape in shapes):
            raise _Refusal("an empty convolution")
        axes = zip(*(shape[1:-1] for shape in shapes), strides, low, dilation, strict=True)
        behind = [padding_behind(*axis) for axis in axes]
        if min(low + behind) < 0:
            raise _Refusal("the image is cropped")
        if len(low) == 1:  # the library has no convolutions along one axis
            shapes = [[shape[0], 1, *shape[1:]] for shape in shapes]
            strides, low, dilation, behind = [1, *strides], [0, *low], [1, *dilation], [0, *behind]
        places = (task.filters, task.image, task.result)
        filters, image, result = (
            self._tensor(number, shape, alignments[place])
            for number, (shape, place) in enumerate(zip(shapes, places, strict=True), _FILTERS)
        )
        convolution = Descriptor(library, CONVOLUTION)
        convolution.set(_COMPUTE_TYPE, DATA_TYPE, _DATA_TYPES["float32"])
        convolution.set(_CONVOLUTION_MODE, MODE, _CROSS_CORRELATION)
        convolution.set(_RANK, INT64, len(low))
        for attribute, sizes in (
            (_STRIDES, strides),
            (_DILATIONS, dilation),
            (_PADDING_BEFORE, low),
            (_PADDING_BEHIND, behind),
        ):
            convolution.set(attribute, INT64, *sizes)
        kind, (alpha, beta, *operands) = OPERATIONS[task.kind]
        operation = Descriptor(library, kind).set(alpha, FLOAT, 1.0).set(beta, FLOAT, 0.0)
        for attribute, operand in zip(operands, (convolution.finalise(), filters, image, result), strict=True):
            operation.set(attribute, DESCRIPTOR, operand)
        graph = Descriptor(library, GRAPH).set(_GRAPH_HANDLE, HANDLE, library.handle)
        self._execution, nbytes = self._choose(
            graph.set(_GRAPH_OPERATIONS, DESCRIPTOR, operation.finalise()).finalise()
        )
        self._workspace = library.workspace(nbytes)

    def _tensor(self, number: int, shape: list[int], alignment: int) -> Descriptor:
        """A channels-last tensor: the library names its axes in the order images, channels, places."""
        ends = [1]
        for size in reversed(shape[1:]):
            ends.append(ends[-1] * size)
        strides = ends[::-1]
        order = [0, len(shape) - 1, *range(1, len(shape) - 1)]
        tensor = Descriptor(self._library, TENSOR).set(_TENSOR_ID, INT64, number)
        tensor.set(_TENSOR_TYPE, DATA_TYPE, _DATA_TYPES[self.task.dtype])
        tensor.set(_TENSOR_ALIGNMENT, INT64, max(alignment, 4 if self.task.dtype == "float32" else 2))
        tensor.set(_TENSOR_SIZES, INT64, *(shape[n] for n in order))
        return tensor.set(_TENSOR_STRIDES, INT64, *(strides[n] for n in order)).finalise()

    def _choose(self, graph: Descriptor) -> tuple[Descriptor, int]:
        """The first of the library's engines that may be taken, and the bytes that it works in. Raises _Refusal."""
        heuristics = Descriptor(self._library, HEURISTICS).set(_HEURISTICS_GRAPH, DESCRIPTOR, graph)
        heuristics.set(_HEURISTICS_MODE, HEURISTIC, _BY_DECISION_TREE).finalise()
        for configuration in heuristics.descriptors(_HEURISTICS_RESULTS, CONFIGURATION, _MOST_CONFIGURATIONS):
            (engine,) = configuration.descriptors(_CONFIGURATION_ENGINE, ENGINE, 1)
            notes = set(engine.get(_ENGINE_NOTES, NOTE, _MOST_NOTES))
            if _TENSOR_CORES not in notes or notes & _UNWANTED:
                continue
            execution = Descriptor(self._library, EXECUTION).set(_EXECUTION_HANDLE, HANDLE, self._library.handle)
            try:
                execution.set(_EXECUTION_CONFIGURATION, DESCRIPTOR, configuration).finalise()
            except _Refusal:  # a guess of the heuristics that does not hold
                continue
            (nbytes,) = execution.get(_EXECUTION_WORKSPACE, INT64, 1)
            if nbytes <= _MOST_WORKSPACE:
                return execution, nbytes
        raise _Refusal("cuDNN has no engine with tensor cores that sums widely and in a fixed order")

    def run(self, addresses: Sequence[int]) -> None:
        """Ask for the convolution. addresses: of the step's operands."""
        task, library = self.task, self._library
        pack = Descriptor(library, PACK).set(_PACK_IDS, INT64, _FILTERS, _IMAGE, _RESULT)
        pack.set(_PACK_ADDRESSES, POINTERS, *(addresses[n] for n in (task.filters, task.image, task.result)))
        pack.set(_PACK_WORKSPACE, POINTERS, self._workspace.address).finalise()
        library.call("cudnnBackendExecute", library.handle, self._execution.handle, pack.handle)


def padding_behind(window: int, size: int, count: int, stride: int, low: int, dilation: int) -> int:
    """The padding behind `size` elements for which a window meets `count` positions; negative where some are cropped.

    Up to stride - 1 elements more change nothing: it is `low` where that is among them, since fewer engines know other
    paddings, else the least.
    """
    least = (count - 1) * stride + (window - 1) * dilation + 1 - size - low
    if least <= low < least + stride:
        return low
    return least if least >= 0 else min(least + stride - 1, 0)
