"""A Python object in place of cuDNN: it checks what descriptors are told, and convolves host memory by NumPy."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np

from tests.cuda.fake_memory import do_or_keep, elements

SUCCESS, NOT_SUPPORTED = 0, 3000
DTYPES = {0: np.float32, 2: np.float16, 9: ml_dtypes.bfloat16}
# Attributes of each kind of descriptor: (type, how many; 0 for one per axis, None for any number).
OPERATIONS = {10: ("forward", 700), 12: ("image", 706), 11: ("filters", 712)}
ATTRIBUTES: dict[int, dict[int, tuple[int, int | None]]] = {
    1: {100: (1, 1), 101: (7, 1), 106: (3, 1), 102: (3, 0), 103: (3, 0), 104: (3, 0), 105: (3, 0)},
    4: {200: (8, 1), 201: (15, 1)},
    5: {400: (0, 1), 401: (15, 1)},
    15: {800: (0, 1), 801: (15, None)},
    16: {1000: (3, None), 1001: (6, None), 1003: (6, 1)},
    17: {900: (3, 1), 901: (1, 1), 902: (3, None), 903: (3, None), 906: (3, 1)},
}
for _kind, (_, _first) in OPERATIONS.items():
    ATTRIBUTES[_kind] = {_first: (4, 1), _first + 1: (4, 1), **{_first + n: (15, 1) for n in range(2, 6)}}


@dataclass
class Engine:
    """notes: numbers of the numerical notes. holds: whether a plan can be made of it."""

    notes: tuple[int, ...] = (0,)
    workspace: int = 1000
    holds: bool = True


@dataclass
class Descriptor:
    """attributes: by number; descriptors among them as such. engine, graph: of what heuristics gave."""

    kind: int
    attributes: dict[int, list] = field(default_factory=dict)
    finalised: bool = False
    engine: Engine | None = None
    graph: Descriptor | None = None


class FakeCudnn:
    """alive: descriptors by handle. convolved: the execution of every convolution, as (operation, engine).

    engines: what heuristics suggest, best first. refused: status of a graph's finalisation. failures: statuses by name.
    device: a simulator, whose captures convolutions take part in, and whose memory they may use. host: other memory.
    """

    def __init__(self, device=None):
        self.device = device
        self.host: list[np.ndarray] = []
        self.alive: dict[int, Descriptor] = {}
        self.convolved: list[tuple[Descriptor, Engine]] = []
        self.engines = [Engine()]
        self.refused = 0
        self.failures: dict[str, int] = {}
        self._next = 4096

    def __getattr__(self, name: str):
        if not name.startswith("cudnn"):
            raise AttributeError(name)
        method = getattr(self, "_" + name.removeprefix("cudnn").removeprefix("Backend"))
        return lambda *arguments: self.failures.get(name) or method(*arguments)

    def _GetLastErrorString(self, text, size) -> None:
        text.value = b"as the test wants it"

    def _Create(self, pointer) -> int:
        pointer._obj.value = 16
        return SUCCESS

    def _SetStream(self, handle, stream) -> int:
        assert (handle.value, stream.value or 0) == (16, self.device.stream_number)
        return SUCCESS

    def _CreateDescriptor(self, kind, pointer) -> int:
        self._next += 16
        pointer._obj.value = self._next
        self.alive[self._next] = Descriptor(kind)
        return SUCCESS

    def _DestroyDescriptor(self, handle) -> int:
        del self.alive[handle.value]
        return SUCCESS

    def _SetAttribute(self, handle, attribute, kind, count, array) -> int:
        descriptor = self.alive[handle.value]
        assert not descriptor.finalised
        wanted, number = ATTRIBUTES[descriptor.kind][attribute]
        assert kind == wanted
        assert count == len(array)
        assert number in (None, 0, count)
        values = [getattr(v, "value", v) for v in array]
        if kind == 15:
            assert all(self.alive[v].finalised or self.alive[v].kind == 3 for v in values)
            values = [self.alive[v] for v in values]
        descriptor.attributes[attribute] = values
        return SUCCESS

    def _Finalize(self, handle) -> int:
        descriptor = self.alive[handle.value]
        told = descriptor.attributes
        assert told.keys() == ATTRIBUTES[descriptor.kind].keys()
        if descriptor.kind == 1:
            assert all(len(told[n]) == told[106][0] >= 2 for n in (102, 103, 104, 105))
        if descriptor.kind == 17:
            assert len(told[902]) == len(told[903])
            assert told[900][0] % np.dtype(DTYPES[told[901][0]]).itemsize == 0
        if descriptor.kind in OPERATIONS:
            self._check_shapes(descriptor)
        if descriptor.kind == 15 and self.refused:
            return self.refused
        if descriptor.kind == 5 and not told[401][0].engine.holds:
            return NOT_SUPPORTED
        descriptor.finalised = True
        return SUCCESS

    def _check_shapes(self, operation: Descriptor) -> None:
        """Sizes of a result follow from those of the image and the filters."""
        convolution, filters, image, result = _operands(operation)
        told = convolution.attributes
        assert told[101] == [1], "a convolution that is no cross-correlation"
        assert told[100] == [0], "sums that are not float32"
        (n, c, *size), (k, _, *window), (m, f, *out) = (d.attributes[902] for d in (image, filters, result))
        assert (n, k) == (m, f)
        assert c % filters.attributes[902][1] == 0
        assert min(told[104] + told[105]) >= 0
        for axis, (extent, taps, count) in enumerate(zip(size, window, out, strict=True)):
            stride, dilation = told[103][axis], told[102][axis]
            padded = extent + told[105][axis] + told[104][axis]
            assert count == (padded - (taps - 1) * dilation - 1) // stride + 1

    def _GetAttribute(self, handle, attribute, kind, most, count, array) -> int:
        descriptor = self.alive[handle.value]
        found = {(4, 202): lambda: self.engines, (3, 300): lambda: [descriptor.engine]}.get(
            (descriptor.kind, attribute)
        )
        if found is not None:  # descriptors are written into those that are there
            assert kind == 15
            assert most == len(array)
            count._obj.value = min(len(found()), most)
            for engine, there in zip(found(), array):
                assert self.alive[there].kind == {202: 3, 300: 2}[attribute]
                self.alive[there].engine = engine
                self.alive[there].graph = descriptor.graph or descriptor.attributes[201][0]
            return SUCCESS
        values = {
            (2, 1303): lambda: (11, descriptor.engine.notes),
            (5, 402): lambda: (3, (descriptor.attributes[401][0].engine.workspace,)),
        }[descriptor.kind, attribute]()
        assert kind == values[0]
        assert descriptor.kind != 5 or descriptor.finalised
        count._obj.value = len(values[1])
        for place, value in enumerate(values[1]):
            array[place] = value
        return SUCCESS

    def _Execute(self, handle, execution, pack) -> int:
        execution, pack = self.alive[execution.value], self.alive[pack.value]
        assert execution.finalised
        assert pack.finalised
        assert execution.attributes[400] == [handle.value]
        configuration = execution.attributes[401][0]
        (operation,) = configuration.graph.attributes[801]
        addresses = dict(zip(pack.attributes[1000], pack.attributes[1001], strict=True))
        if configuration.engine.workspace:  # it is all there
            self._elements(pack.attributes[1003][0], configuration.engine.workspace, np.dtype(np.uint8))[:] = 0x5A
        self.convolved.append((operation, configuration.engine))
        do_or_keep(self.device, lambda: self._convolve(operation, addresses))
        return SUCCESS

    def _elements(self, address: int, count: int, dtype: np.dtype) -> np.ndarray:
        return elements(address, count, dtype, self.host, self.device)

    def _tensor(self, tensor: Descriptor, addresses: dict[int, int]) -> np.ndarray:
        """A tensor with its channels last, as a view of memory."""
        told = tensor.attributes
        sizes, strides, dtype = told[902], told[903], np.dtype(DTYPES[told[901][0]])
        address = addresses[told[906][0]]
        assert address % told[900][0] == 0, "less aligned than the library was told"
        count = sum((n - 1) * t for n, t in zip(sizes, strides)) + 1
        flat = self._elements(address, count, dtype)
        view = np.lib.stride_tricks.as_strided(flat, sizes, [t * dtype.itemsize for t in strides])
        return np.moveaxis(view, 1, -1)

    def _convolve(self, operation: Descriptor, addresses: dict[int, int]) -> None:
        convolution, *tensors = _operands(operation)
        filters, image, result = (self._tensor(t, addresses) for t in tensors)
        kind, first = OPERATIONS[operation.kind]
        assert (operation.attributes[first], operation.attributes[first + 1]) == ([1.0], [0.0])
        told = convolution.attributes
        pads = [(0, 0), *zip(told[105], told[104]), (0, 0)]
        written = {"forward": result, "image": image, "filters": filters}[kind]
        x, w, y = (np.zeros(a.shape) if a is written else a.astype(np.float64) for a in (image, filters, result))
        x = np.pad(x, pads)
        channels = w.shape[-1]
        each = w.shape[0] // (x.shape[-1] // channels)
        for group in range(x.shape[-1] // channels):
            own, made = slice(group * channels, (group + 1) * channels), slice(group * each, (group + 1) * each)
            for tap in itertools.product(*(range(n) for n in w.shape[1:-1])):
                met = [
                    slice(t * d, t * d + (n - 1) * s + 1, s)
                    for t, d, n, s in zip(tap, told[102], y.shape[1:-1], told[103])
                ]
                pixels, weight = x[(slice(None), *met, own)], w[(made, *tap)]
                if kind == "forward":
                    y[..., made] += pixels @ weight.T
                elif kind == "image":
                    pixels += y[..., made] @ weight
                else:
                    weight += np.tensordot(y[..., made], pixels, (range(y.ndim - 1),) * 2)
        inside = tuple(slice(low, n - high) for n, (low, high) in zip(x.shape, pads))
        written[...] = {"forward": y, "image": x[inside], "filters": w}[kind].astype(written.dtype)


def _operands(operation: Descriptor) -> list[Descriptor]:
    """The convolution, filters, image and result that an operation was told of."""
    _, first = OPERATIONS[operation.kind]
    return [operation.attributes[first + n][0] for n in range(2, 6)]
