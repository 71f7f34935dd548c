"""The plain data of a program: buffers, kernel launches, Python functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kgraph.dims import Dim


@dataclass(frozen=True)
class Buffer:
    """A dense row-major tensor that steps read and write.

    kind: "input", "param", "constant", "temporary", or "dim" (a scalar holding a size that `value` gives as a Dim).
    shape: tuple of `int | Dim`; dtype: a dtype name. value: the array of a constant.
    alias: id of the buffer in whose storage this one lies, `offset` bytes from its start; -1 for storage of its own.
    """

    kind: str
    shape: tuple
    dtype: str
    value: Any = None
    alias: int = -1
    offset: int | Dim = 0
    name: str = ""


@dataclass(frozen=True)
class NativeStep:
    """A kernel launch over [0, extent).

    kernel: key of its object; operands: buffer ids, inputs then outputs; outputs: how many of the last are written.
    sizes: run-time integers for the kernel; scratch_bytes: memory per thread.
    flops, bytes: totals, for the thread decision and profiles.
    inplace: pairs (output, input) of operand positions: the output may lie where the input lies, if that dies here.
    label, layers: for profiles. max_threads: limit of the threads that share the extent, 0 for none.
    """

    kernel: str
    operands: tuple[int, ...]
    outputs: int
    extent: int | Dim
    sizes: tuple = ()
    scratch_bytes: int | Dim = 0
    flops: int | Dim = 0
    bytes: int | Dim = 0
    inplace: tuple[tuple[int, int], ...] = ()
    label: str = ""
    layers: tuple[str, ...] = ()
    max_threads: int = 0


@dataclass(frozen=True)
class Matrix:
    """An operand of a product, by its position in the step: strides in elements of rows, columns, and of the batch."""

    operand: int
    row_stride: int | Dim
    column_stride: int | Dim
    batch_stride: int | Dim


@dataclass(frozen=True)
class Product:
    """Batches of A[M, K] x B[K, N], which a library may compute in place of a kernel.

    result: position of the operand that is written, dense. bias: of one that is added to every row; added: of one of
    the result's shape that is added; None without. sizes: of the batch, M, N, K. dtype: of A and B. tf32: whether
    float32 may be rounded to TF32.
    """

    a: Matrix
    b: Matrix
    result: int
    bias: int | None
    added: int | None
    sizes: tuple
    dtype: str
    result_dtype: str
    tf32: bool = False


@dataclass(frozen=True)
class LaunchStep(NativeStep):
    """A kernel launch on a GPU: the extent counts blocks, of which the grid may have fewer.

    block: threads of a block. shared_bytes: shared memory beside what the kernel declares. product, then: what a
    library may do instead, and the launch that has to follow then.
    """

    block: int = 1
    shared_bytes: int | Dim = 0
    product: Product | None = None
    then: LaunchStep | None = None


@dataclass(frozen=True)
class HostStep:
    """A Python function between kernels, for primitives without one.

    function: `function(arrays, sizes) -> sequence of arrays`, where `arrays` are the inputs (not to be changed) and
        `sizes` the values of the symbols; the results are copied into the output buffers.
    operands, outputs: as in NativeStep. reason: why no kernel does this.
    """

    function: Callable[[list[np.ndarray], dict[str, int]], Sequence[np.ndarray]]
    operands: tuple[int, ...]
    outputs: int
    reason: str = ""
    label: str = ""
    layers: tuple[str, ...] = ()
