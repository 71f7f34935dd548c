"""What the kernels of a Winograd convolution are told: sizes, how work is cut, and where things lie in scratch."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from kgraph.codegen.cpu.builder import itemsize
from kgraph.ops.winograd import TAPS

DTYPE = "float32"
LINE = 16  # elements of a cache line


class Tiling(Protocol):
    """What a plan says of its tiles; see `WinogradPlan`."""

    @property
    def outputs(self) -> int: ...

    @property
    def dilations(self) -> tuple[int, ...]: ...

    @property
    def images(self) -> int | tuple: ...

    @property
    def tiles(self) -> tuple: ...


class WinogradPlan(NamedTuple):
    """Params of `render_winograd`. Sizes are `int` or ("size", slot).

    pairs: of points of the transforms. outputs: along an axis of a tile, `dilations` apart, as its inputs are. images,
    tiles: how many there are, and tiles along the axes of one: rows and columns, or columns only. sizes, out_sizes: of
    an image. out_pitches: pixels between rows, and columns, of a tile's outputs. origins: minus the padding below.
    tile: output tiles of a register tile. block: those of a unit, a multiple of `tile`. group: panels of a unit.
    shared: whether a kernel ahead transforms the inputs, as several units read those of a block. chunk: channels whose
    filters the kernel transforms at once; 0 where it is given transformed ones. apart: elements between the matrices of
    these. lanes, vectors: of a vector, a panel.
    """

    pairs: tuple[float, ...]
    outputs: int
    dilations: tuple[int, ...]
    images: int | tuple
    tiles: tuple
    sizes: tuple
    out_sizes: tuple
    out_pitches: tuple
    origins: tuple
    channels: int
    filters: int
    tile: int
    block: int
    group: int
    shared: bool
    chunk: int
    apart: int
    lanes: int
    vectors: int
    epilogue: tuple

    @property
    def side(self) -> int:
        """Inputs along an axis of a tile."""
        return self.outputs + TAPS - 1

    @property
    def axes(self) -> int:
        """Of an image: 1 or 2."""
        return len(self.tiles)

    @property
    def points(self) -> int:
        """Of the transforms, over all axes: so many matrices there are of inputs, filters, and sums."""
        return self.side**self.axes

    @property
    def asks(self) -> bool:
        """Whether the kernel requests inputs and outputs while it makes products; see `winograd_requests`."""
        return self.axes == 2 and not self.chunk

    @property
    def width(self) -> int:
        return self.vectors * self.lanes

    @property
    def input_pitch(self) -> int:
        """Distance of tiles in a matrix of transformed inputs; few sets of the cache would hold multiples of 2 KiB."""
        pitch = -(-self.channels // self.lanes) * self.lanes
        return pitch + LINE if pitch * itemsize(DTYPE) % 2048 == 0 else pitch

    @property
    def border_pitch(self) -> int:
        """Distance of pixels in the copy of a tile's inputs that is made where some are beyond the image."""
        return -(-self.channels // LINE) * LINE

    @property
    def input_matrix(self) -> int:
        """Distance of matrices of transformed inputs."""
        return odd_lines(self.block * self.input_pitch)

    @property
    def inputs_block(self) -> int:
        """Elements of the transformed inputs of a block of tiles."""
        return self.points * self.input_matrix

    @property
    def sums_matrix(self) -> int:
        """Distance of matrices of sums."""
        return odd_lines(self.block * self.width)

    @property
    def filters_matrix(self) -> int:
        """Distance of matrices of the filters that the kernel transforms."""
        return odd_lines(self.chunk * self.width)

    def scratch(self) -> dict[str, int]:
        """Byte offsets in a thread's scratch, and the `end`."""
        points, size = self.points, itemsize(DTYPE)
        sections = {
            "sums": points * self.sums_matrix * self.group * size,
            "outputs": self.outputs**self.axes * self.width * size,
            "filters": points * self.filters_matrix * size if self.chunk else 0,
            "requests": 2 * self.block * 8 if self.asks else 0,
        }
        if not self.shared:
            sections = {"inputs": self.inputs_block * size, **sections, **self._input_sections()}
        return offsets_of(sections)

    def input_scratch(self) -> dict[str, int]:
        """The same for the kernel that transforms inputs only."""
        return offsets_of(self._input_sections())

    def _input_sections(self) -> dict[str, int]:
        size = itemsize(DTYPE)
        return {"zeros": self.border_pitch * size, "border": self.points * self.border_pitch * size}


def odd_lines(elements: int) -> int:
    """`elements` rounded up to an odd number of cache lines: so far apart, matrices that are written at once spread."""
    return (-(-elements // LINE) | 1) * LINE


def offsets_of(sections: dict[str, int]) -> dict[str, int]:
    offsets, at = {}, 0
    for name, nbytes in sections.items():
        offsets[name] = at
        at += -(-nbytes // 64) * 64
    return {**offsets, "end": at}
