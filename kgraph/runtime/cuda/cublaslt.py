"""Matrix products by NVIDIA's cuBLASLt, where it is installed: through ctypes, on the device's stream.

The library thinks in column-major matrices. A row-major matrix is the transpose of the column-major one in the same
memory, so what is asked for is D^T[N, M] = B^T[N, K] A^T[K, M]: the library's first operand is our second one.
Enumerators, structures and prototypes are those of `cublasLt.h` (CUDA 12 and 13).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import POINTER, byref, c_double, c_float, c_int, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from typing import Any

from kgraph.errors import DeviceError
from kgraph.runtime.cuda.device import Device
from kgraph.runtime.steps import Product

_HANDLE = POINTER(c_void_p)


class Heuristic(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t: an algorithm (opaque, 64 bytes), its workspace, whether it can be used."""

    _fields_ = (
        ("algo", c_uint64 * 8),
        ("workspace_size", c_size_t),
        ("state", c_int),
        ("waves_count", c_float),
        ("reserved", c_int * 4),
    )


# Arguments of the functions in use; all of them give a cublasStatus_t.
SIGNATURES: dict[str, tuple] = {
    "cublasLtCreate": (_HANDLE,),
    "cublasLtMatmulDescCreate": (_HANDLE, c_int, c_int),
    "cublasLtMatmulDescSetAttribute": (c_void_p, c_int, c_void_p, c_size_t),
    "cublasLtMatmulDescDestroy": (c_void_p,),
    "cublasLtMatrixLayoutCreate": (_HANDLE, c_int, c_uint64, c_uint64, c_int64),
    "cublasLtMatrixLayoutSetAttribute": (c_void_p, c_int, c_void_p, c_size_t),
    "cublasLtMatrixLayoutDestroy": (c_void_p,),
    "cublasLtMatmulPreferenceCreate": (_HANDLE,),
    "cublasLtMatmulPreferenceSetAttribute": (c_void_p, c_int, c_void_p, c_size_t),
    "cublasLtMatmulPreferenceDestroy": (c_void_p,),
    "cublasLtMatmulAlgoGetHeuristic": (*[c_void_p] * 7, c_int, POINTER(Heuristic), POINTER(c_int)),
    # handle, operation, alpha, A and B with their layouts, beta, C and D with theirs, algorithm, workspace, stream
    "cublasLtMatmul": (*[c_void_p] * 14, c_size_t, c_void_p),
}
_STATUS = {
    1: "NOT_INITIALIZED",
    3: "ALLOC_FAILED",
    7: "INVALID_VALUE",
    8: "ARCH_MISMATCH",
    11: "MAPPING_ERROR",
    13: "EXECUTION_FAILED",
    14: "INTERNAL_ERROR",
    15: "NOT_SUPPORTED",
    16: "LICENSE_ERROR",
}
_NOT_SUPPORTED = 15
_OP_T = 1  # CUBLAS_OP_T; without transposition nothing has to be said
_DATA_TYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 14}  # CUDA_R_*
_COMPUTE_32F, _COMPUTE_64F, _COMPUTE_TF32 = 68, 70, 77  # CUBLAS_COMPUTE_*
_TRANSA, _TRANSB, _EPILOGUE, _BIAS_POINTER = 3, 4, 7, 8  # CUBLASLT_MATMUL_DESC_*
_EPILOGUE_BIAS = 4
_BATCH_COUNT, _BATCH_OFFSET = 5, 6  # CUBLASLT_MATRIX_LAYOUT_*
_MOST_WORKSPACE, _REDUCTION, _ALIGNMENTS = 1, 3, (5, 6, 7, 8)  # CUBLASLT_MATMUL_PREF_*, for A, B, C, D
_SUM_WIDELY = 2  # CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE: pieces of a sum are not rounded to half floats
_WORKSPACE_BYTES = 32 << 20
# Alignments of operands in bytes for which algorithms are asked, beside that of one element.
_LEVELS = (256, 64, 16)


class Products:
    """The library on one device. library: an opened cuBLASLt, or what stands in its place in tests.

    Raises DeviceError where the library does not work on the device.
    """

    def __init__(self, device: Device, library: Any):
        self.device, self._library = device, library
        if isinstance(library, ctypes.CDLL):
            for name, arguments in SIGNATURES.items():
                function = getattr(library, name)
                function.argtypes, function.restype = arguments, c_int
        handle = c_void_p()
        self.call("cublasLtCreate", byref(handle))
        self.handle = handle
        # All work goes to one stream, so that one workspace serves all calls; it is there before anything is captured.
        self.workspace = device.allocate(_WORKSPACE_BYTES)

    def status(self, name: str, *arguments) -> int:
        return getattr(self._library, name)(*arguments)

    def call(self, name: str, *arguments) -> None:
        """Call a function. Raises DeviceError for any status but success."""
        code = self.status(name, *arguments)
        if code:
            raise DeviceError(f"{name} failed: CUBLAS_STATUS_{_STATUS.get(code, code)}")

    def plan(
        self, product: Product, value: Callable[[Any], int], alignments: Sequence[int] | None = None
    ) -> Plan | str:
        """How the library computes a product at the sizes that `value` gives; a string says why it does not.

        alignments: plans go by the addresses of a call, whatever is known of them before.
        """
        try:
            return Plan(self, product, value)
        except _Refusal as refusal:
            return str(refusal)


class _Refusal(Exception):
    """The library does not compute a product."""


class Plan:
    """A product at concrete sizes: descriptors, and an algorithm for every alignment of the operands."""

    def __init__(self, products: Products, product: Product, value: Callable[[Any], int]):
        self._products, self.product = products, product
        self._made: list[tuple[str, c_void_p]] = []
        batch, rows, columns, depth = (value(n) for n in product.sizes)
        if 0 in (batch, rows, columns, depth):
            raise _Refusal("an empty product")
        wide = product.result_dtype == "float64"
        compute = _COMPUTE_64F if wide else _COMPUTE_TF32 if product.tf32 else _COMPUTE_32F
        number = c_double if wide else c_float
        self._one, self._beta = number(1), number(0 if product.added is None else 1)
        self._operation = self._create("MatmulDesc", compute, _DATA_TYPES["float64" if wide else "float32"])
        self._layouts = []
        matrices = ((product.b, columns, depth, _TRANSA), (product.a, depth, rows, _TRANSB))
        for matrix, inner, outer, attribute in matrices:
            # Elements next to each other along N (of B) and along K (of A) need no transposition.
            outer_stride, inner_stride = value(matrix.row_stride), value(matrix.column_stride)
            found = _column_major(inner, outer, inner_stride, outer_stride)
            if isinstance(found, str):
                raise _Refusal(found)
            transposed, shape = found
            if transposed:
                self._set("MatmulDesc", self._operation, attribute, c_int32(_OP_T))
            self._layouts.append(self._layout(product.dtype, shape, batch, value(matrix.batch_stride)))
        result = self._layout(product.result_dtype, (columns, rows, columns), batch, rows * columns)
        self._layouts += [result, result]
        if product.bias is not None:
            self._set("MatmulDesc", self._operation, _EPILOGUE, c_uint32(_EPILOGUE_BIAS))
        self._item = {"float16": 2, "bfloat16": 2, "float64": 8}.get(product.dtype, 4)
        self._algorithms: dict[int, Heuristic] = {}
        for alignment in (_LEVELS[0], self._item):
            self._algorithm(alignment)

    def __del__(self):
        for kind, handle in reversed(self._made):
            self._products.status(f"cublasLt{kind}Destroy", handle)

    def _create(self, kind: str, *arguments) -> c_void_p:
        handle = c_void_p()
        self._products.call(f"cublasLt{kind}Create", byref(handle), *arguments)
        self._made.append((kind, handle))
        return handle

    def _set(self, kind: str, handle: c_void_p, attribute: int, number: Any) -> None:
        name = f"cublasLt{kind}SetAttribute"
        self._products.call(name, handle, attribute, byref(number), ctypes.sizeof(number))

    def _layout(self, dtype: str, shape: tuple[int, int, int], batch: int, stride: int) -> c_void_p:
        layout = self._create("MatrixLayout", _DATA_TYPES[dtype], *shape)
        if batch > 1:
            self._set("MatrixLayout", layout, _BATCH_COUNT, c_int32(batch))
            self._set("MatrixLayout", layout, _BATCH_OFFSET, c_int64(stride))
        return layout

    def _algorithm(self, alignment: int) -> Heuristic:
        """The library's choice where all operands are aligned to so many bytes. Raises _Refusal without one."""
        found = self._algorithms.get(alignment)
        if found is not None:
            return found
        products = self._products
        if self.product.bias is not None:  # only its alignment counts here
            self._set("MatmulDesc", self._operation, _BIAS_POINTER, c_void_p(alignment))
        preference = self._create("MatmulPreference")
        self._set("MatmulPreference", preference, _MOST_WORKSPACE, c_uint64(_WORKSPACE_BYTES))
        self._set("MatmulPreference", preference, _REDUCTION, c_uint32(_SUM_WIDELY))
        for attribute in _ALIGNMENTS:
            self._set("MatmulPreference", preference, attribute, c_uint32(alignment))
        found, count = Heuristic(), c_int()
        name = "cublasLtMatmulAlgoGetHeuristic"
        code = products.status(
            name, products.handle, self._operation, *self._layouts, preference, 1, byref(found), byref(count)
        )
        if code == _NOT_SUPPORTED or (code == 0 and (count.value < 1 or found.state)):
            raise _Refusal(f"cuBLASLt has no algorithm for operands aligned to {alignment} bytes")
        if code:
            raise DeviceError(f"{name} failed: CUBLAS_STATUS_{_STATUS.get(code, code)}")
        self._algorithms[alignment] = found
        return found

    def run(self, addresses: Sequence[int]) -> None:
        """Ask for the product. addresses: of the step's operands."""
        product, products = self.product, self._products
        a, b, result = addresses[product.a.operand], addresses[product.b.operand], addresses[product.result]
        added = result if product.added is None else addresses[product.added]
        bias = 0 if product.bias is None else addresses[product.bias]
        bits = a | b | result | added | bias
        alignment = next((n for n in _LEVELS if bits % n == 0), self._item)
        algorithm = self._algorithm(alignment)
        if product.bias is not None:
            self._set("MatmulDesc", self._operation, _BIAS_POINTER, c_void_p(bias))
        first, second, third, fourth = self._layouts
        products.call(
            "cublasLtMatmul",
            products.handle,
            self._operation,
            byref(self._one),
            *(b, first, a, second),
            byref(self._beta),
            *(added, third, result, fourth),
            byref(algorithm),
            products.workspace,
            _WORKSPACE_BYTES,
            products.device.stream_number,
        )


def _column_major(inner: int, outer: int, inner_stride: int, outer_stride: int) -> tuple[bool, tuple] | str:
    """(whether to transpose, (rows, columns, leading dimension)) of a column-major matrix [inner, outer]."""
    if (inner == 1 or inner_stride == 1) and (outer == 1 or outer_stride >= inner):
        return False, (inner, outer, inner if outer == 1 else outer_stride)
    if (outer == 1 or outer_stride == 1) and (inner == 1 or inner_stride >= outer):
        return True, (outer, inner, outer if inner == 1 else inner_stride)
    return "neither axis of an operand is contiguous"
