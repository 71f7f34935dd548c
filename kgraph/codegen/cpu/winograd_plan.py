"""What the kernels of a Winograd convolution are told: sizes, how work is cut, and where things lie in scratch."""

from __future__ import annotations

from typing import NamedTuple

from kgraph.codegen.cpu.builder import itemsize
from kgraph.ops.winograd import TAPS

DTYPE = "float32"
LINE = 16  # elements of a cache line


class WinogradPlan(NamedTuple):
    """Params of `render_winograd`. Sizes are `int` or ("size", slot).

    pairs: of points of the transforms. outputs: along an axis of a tile. images, tiles: how many there are, and tiles
    along the rows and columns of one. sizes, out_sizes: rows and columns of an image. origins: minus the padding below.
    tile: output tiles of a register tile. block: those of a unit, a multiple of `tile`. group: panels of a unit.
    shared: whether a kernel ahead transforms the inputs, as several units read those of a block. lanes, vectors: of a
    vector, a panel.
    """

    pairs: tuple[float, ...]
    outputs: int
    images: int | tuple
    tiles: tuple
    sizes: tuple
    out_sizes: tuple
    origins: tuple
    channels: int
    filters: int
    tile: int
    block: int
    group: int
    shared: bool
    lanes: int
    vectors: int
    epilogue: tuple

    @property
    def side(self) -> int:
        """Inputs along an axis of a tile."""
        return self.outputs + TAPS - 1

    @property
    def width(self) -> int:
        return self.vectors * self.lanes

    @property
    def input_pitch(self) -> int:
        """Distance of tiles in a matrix of transformed inputs; few sets of the cache would hold multiples of 2 KiB."""
        pitch = -(-self.channels // self.lanes) * self.lanes
        return pitch + LINE if pitch * itemsize(DTYPE) % 2048 == 0 else pitch

    @property
    def input_matrix(self) -> int:
        """Distance of matrices of transformed inputs: an odd number of lines, as all are written at once."""
        return (-(-self.block * self.input_pitch // LINE) | 1) * LINE

    @property
    def inputs_block(self) -> int:
        """Elements of the transformed inputs of a block of tiles."""
        return self.side**2 * self.input_matrix

    @property
    def sums_matrix(self) -> int:
        """Distance of matrices of sums, likewise."""
        return (-(-self.block * self.width // LINE) | 1) * LINE

    def scratch(self) -> dict[str, int]:
        """Byte offsets in a thread's scratch, and the `end`."""
        points, size = self.side**2, itemsize(DTYPE)
        sections = {
            "sums": points * self.sums_matrix * self.group * size,
            "outputs": self.outputs**2 * self.width * size,
            "stage": points * self.lanes * size,
        }
        if not self.shared:
            sections = {"inputs": self.inputs_block * size, **sections, **self._input_sections()}
        return _offsets(sections)

    def input_scratch(self) -> dict[str, int]:
        """The same for the kernel that transforms inputs only."""
        return _offsets({"stage": self.side**2 * self.lanes * itemsize(DTYPE), **self._input_sections()})

    def _input_sections(self) -> dict[str, int]:
        return {"zeros": -(-self.channels // LINE) * LINE * itemsize(DTYPE), "addresses": self.side**2 * 8}


def _offsets(sections: dict[str, int]) -> dict[str, int]:
    offsets, at = {}, 0
    for name, nbytes in sections.items():
        offsets[name] = at
        at += -(-nbytes // 64) * 64
    return {**offsets, "end": at}
