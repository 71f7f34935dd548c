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

    kind: "input", "param", "constant", "temporary", "prepared" (made of one param or constant, for a device's library,
        and kept until that changes), or "dim" (a scalar holding a size that `value` gives as a Dim).
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
    label, layers: for profiles. grain: so many units in a row share what the first one of a chunk makes; 0 as 1.
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
    grain: int = 0

    @property
    def kernels(self) -> tuple[str, ...]:
        """Keys of all objects that may be called."""
        return (self.kernel,)

    @property
    def touched(self) -> tuple[int, ...]:
        """Ids of all buffers that have to be there during the step."""
        return self.operands


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
class Convolution:
    """A convolution of channels-last tensors, or a cotangent of one, which a library may compute in place of a kernel.

    kind: "forward", or what the cotangent is one of, "image" or "filters": that operand is written, the others are
    read. image, filters, result: positions of the operands. image_shape, result_shape: images, spatial sizes, channels.
    filters_shape: filters, window, channels of a group: the filters come first, unlike in a graph.
    strides, low, dilation: per spatial axis; low: padding before the image. What is behind it follows from the shapes.
    """

    kind: str
    image: int
    filters: int
    result: int
    image_shape: tuple
    filters_shape: tuple
    result_shape: tuple
    strides: tuple
    low: tuple
    dilation: tuple
    dtype: str


@dataclass(frozen=True)
class LibraryStep:
    """What a library may do in place of a launch and of those that continue it.

    operands: buffer ids, by whose positions `task` names them. before, after: the launches around it; those before it
    that write a "prepared" buffer run when that has to be made again.
    """

    task: Product | Convolution
    operands: tuple[int, ...]
    before: tuple[LaunchStep, ...] = ()
    after: tuple[LaunchStep, ...] = ()


@dataclass(frozen=True)
class LaunchStep(NativeStep):
    """A kernel launch on a GPU: the extent counts blocks, of which the grid may have fewer.

    block: threads of a block. shared_bytes: shared memory beside what the kernel declares. library: what may be done
    instead. continues: whether the launch goes on with what the one before it began, and falls away with that.
    """

    block: int = 1
    shared_bytes: int | Dim = 0
    library: LibraryStep | None = None
    continues: bool = False

    @property
    def kernels(self) -> tuple[str, ...]:
        around = () if self.library is None else (*self.library.before, *self.library.after)
        return (self.kernel, *(key for step in around for key in step.kernels))

    @property
    def touched(self) -> tuple[int, ...]:
        if self.library is None:
            return self.operands
        around = (*self.library.before, *self.library.after)
        return (*self.operands, *self.library.operands, *(b for step in around for b in step.operands))


@dataclass(frozen=True)
class HostStep:
    """A Python function between kernels, for primitives without one.

    function: `function(arrays, sizes) -> sequence of arrays`, where `arrays` are the inputs (not to be changed) and
        `sizes` the values of the symbols; the results are copied into the output buffers.
    operands, outputs, inplace: as in NativeStep. Functions of steps with `inplace` take a third argument: the positions
        of the inputs that outputs lie in, which they may change, and give as that output.
    reason: why no kernel does this.
    """

    function: Callable[..., Sequence[np.ndarray]]
    operands: tuple[int, ...]
    outputs: int
    reason: str = ""
    label: str = ""
    layers: tuple[str, ...] = ()
    inplace: tuple[tuple[int, int], ...] = ()

    @property
    def touched(self) -> tuple[int, ...]:
        """Ids of all buffers that have to be there during the step."""
        return self.operands
