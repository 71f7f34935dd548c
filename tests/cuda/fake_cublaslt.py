"""A Python object in place of cuBLASLt: it keeps what descriptors are told, and multiplies host memory by NumPy."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np

from tests.cuda.fake_memory import do_or_keep, elements

DTYPES = {0: np.float32, 1: np.float64, 2: np.float16, 14: ml_dtypes.bfloat16}
NOT_SUPPORTED = 15


@dataclass
class Descriptor:
    """kind: "MatmulDesc", "MatrixLayout" or "MatmulPreference". arguments: of its creation. attributes: by number."""

    kind: str
    arguments: tuple
    attributes: dict[int, int] = field(default_factory=dict)


def _number(x) -> int:
    return x if isinstance(x, int) else (x.value or 0)


class FakeCublasLt:
    """created: all descriptors by handle. multiplied: the arguments of every product. failures: statuses by name.

    device: a simulator, whose captures products take part in, and whose memory they may use.
    host: other memory that they may use; an address outside of both is an error. refused: alignments without an
    algorithm.
    """

    def __init__(self, device=None):
        self.device = device
        self.created: dict[int, Descriptor] = {}
        self.destroyed: list[int] = []
        self.host: list[np.ndarray] = []
        self.multiplied: list[dict] = []
        self.failures: dict[str, int] = {}
        self.refused: set[int] = set()
        self._next = 4096

    def _handle(self, pointer) -> int:
        self._next += 16
        pointer._obj.value = self._next
        return self._next

    def __getattr__(self, name: str):
        if not name.startswith("cublasLt"):
            raise AttributeError(name)

        def function(*arguments) -> int:
            if name in self.failures:
                return self.failures[name]
            short = name.removeprefix("cublasLt")
            for action in ("Create", "SetAttribute", "Destroy"):
                if short.endswith(action) and short != action:
                    return getattr(self, f"_{action}")(short.removesuffix(action), *arguments)
            return getattr(self, f"_{short}")(*arguments)

        return function

    def _Create(self, *arguments) -> int:  # of the library, or of a descriptor
        if len(arguments) == 1:
            self._handle(arguments[0])
            return 0
        kind, pointer, *rest = arguments
        self.created[self._handle(pointer)] = Descriptor(kind, tuple(_number(x) for x in rest))
        return 0

    def _SetAttribute(self, kind, handle, attribute, pointer, size) -> int:
        assert size == ctypes.sizeof(pointer._obj)
        descriptor = self.created[_number(handle)]
        assert descriptor.kind == kind
        descriptor.attributes[attribute] = pointer._obj.value or 0
        return 0

    def _Destroy(self, kind, handle) -> int:
        assert self.created[_number(handle)].kind == kind
        self.destroyed.append(_number(handle))
        return 0

    def _MatmulAlgoGetHeuristic(self, library, operation, a, b, c, d, preference, wanted, found, count) -> int:
        told = self.created[_number(preference)].attributes
        (alignment,) = {told[n] for n in (5, 6, 7, 8)}
        assert told[1] > 0
        assert told[3] == 2, "sums of pieces that are rounded"
        assert wanted == 1
        if alignment in self.refused:
            return NOT_SUPPORTED
        found._obj.algo[0], count._obj.value = alignment, 1
        return 0

    def _Matmul(
        self, library, operation, alpha, a, a_is, b, b_is, beta, c, c_is, d, d_is, algorithm, workspace, size, stream
    ) -> int:
        names = ("operation", "a_is", "b_is", "d_is")
        fields = {n: self.created[_number(h)] for n, h in zip(names, (operation, a_is, b_is, d_is))}
        fields |= {"a": a, "b": b, "c": c, "d": d, "beta": beta._obj.value, "alignment": algorithm._obj.algo[0]}
        fields["bias"] = fields["operation"].attributes.get(8) if 7 in fields["operation"].attributes else None
        assert alpha._obj.value == 1
        assert _number(c_is) == _number(d_is)
        for address in (a, b, c, d):
            assert address % fields["alignment"] == 0
        self.multiplied.append(fields)
        do_or_keep(self.device, lambda: self._multiply(fields))
        return 0

    def _multiply(self, fields: dict) -> None:
        attributes = fields["operation"].attributes
        left = self._matrices(fields["a"], fields["a_is"], attributes.get(3, 0))
        right = self._matrices(fields["b"], fields["b_is"], attributes.get(4, 0))
        wide = np.float64 if fields["operation"].arguments[1] == 1 else np.float32
        result = np.matmul(left.astype(wide), right.astype(wide))
        out = self._matrices(fields["d"], fields["d_is"], 0)
        assert result.shape == out.shape
        if fields["beta"]:
            result = result + self._matrices(fields["c"], fields["d_is"], 0).astype(wide)
        if fields["bias"]:
            assert attributes[7] == 4
            rows, dtype = fields["d_is"].arguments[1], np.dtype(out.dtype)
            result = result + self._elements(fields["bias"], rows, dtype).astype(wide)[:, None]
        out[...] = result.astype(out.dtype)

    def _matrices(self, address: int, layout: Descriptor, transposed: int) -> np.ndarray:
        """Column-major matrices [batch, rows, columns] as a view of memory."""
        kind, rows, columns, leading = layout.arguments
        batch, offset = layout.attributes.get(5, 1), layout.attributes.get(6, 0)
        assert leading >= rows
        dtype = np.dtype(DTYPES[kind])
        count = (batch - 1) * offset + (columns - 1) * leading + rows
        flat = self._elements(address, count, dtype)
        strides = tuple(n * dtype.itemsize for n in (offset, 1, leading))
        view = np.lib.stride_tricks.as_strided(flat, (batch, rows, columns), strides)
        return view.swapaxes(1, 2) if transposed else view

    def _elements(self, address: int, count: int, dtype: np.dtype) -> np.ndarray:
        return elements(address, count, dtype, self.host, self.device)
