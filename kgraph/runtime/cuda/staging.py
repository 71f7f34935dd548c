"""How host arrays get to the device: through pinned memory, and ahead of their turn where that pays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kgraph.runtime.cuda.device import Device
from kgraph.runtime.cuda.device_array import Allocation

ALIGNMENT = 256
# Arrays up to this many bytes together go through pinned memory.
MOST_PINNED = 256 << 20
# Arrays of this many bytes together travel beside the work of the call before.
AHEAD = 1 << 20


class HostInputs:
    """Room on the device for the host arrays of a binding's calls, and their way there.

    Pinned memory is there twice, so that the arrays of a call can be staged while those of the call before travel.
    Where there is much to copy, so is the room: copies go to a stream of their own, and overwrite what the call before
    the last has read, while the last one still computes. Calls with like arrays find room at one of two addresses.
    """

    def __init__(self, device: Device):
        self._device = device
        self._turn = 0
        self._rooms: list[Allocation] = []
        self._room_bytes = 0
        self._read: list[Any] = []  # per room the moment at which the last call that used it is done
        self._pinned: list[np.ndarray] = []
        self._travelled: list[Any] = [None, None]

    def held_bytes(self) -> int:
        """Memory on the device."""
        return self._room_bytes * len(self._rooms)

    def release(self) -> None:
        """Give the room back."""
        self._rooms, self._read, self._room_bytes = [], [], 0

    def place(self, arrays: dict[int, np.ndarray]) -> dict[int, int]:
        """Addresses for the host arrays of the next call, by number. Raises DeviceMemoryError."""
        total = sum(aligned(a.nbytes) for a in arrays.values())
        if not total:
            return dict.fromkeys(arrays, 0)
        rooms = 2 if AHEAD <= total <= MOST_PINNED else 1
        if len(self._rooms) != rooms or self._room_bytes != total:
            self.release()
            self._rooms = [Allocation(self._device, total) for _ in range(rooms)]
            self._room_bytes = total
            # The memory may be in use by earlier work until now.
            self._read = [self._device.mark() for _ in range(rooms)]
        self._turn ^= 1
        start, out = self._rooms[self._turn % rooms].address, {}
        for number, array in arrays.items():
            out[number] = start
            start += aligned(array.nbytes)
        return out

    def send(self, arrays: Sequence[tuple[int, np.ndarray]]) -> None:
        """Copy arrays to the addresses with them; work that is asked for from now on finds them there.

        Addresses outside of the room that `place` gave belong to memory that nothing else uses.
        """
        total = sum(aligned(a.nbytes) for _, a in arrays)
        if total > MOST_PINNED:
            for address, array in arrays:
                self._device.copy_in(address, array)
            return
        if not total:
            return
        if not self._pinned or self._pinned[0].nbytes < total:
            self._pinned = [self._device.pinned(total) for _ in range(2)]
            self._travelled = [None, None]
        turn = self._turn
        if self._travelled[turn] is not None:
            self._device.wait(self._travelled[turn])
        ahead = len(self._rooms) == 2
        pieces, start = [], 0
        for address, array in arrays:
            piece = self._pinned[turn][start : start + array.nbytes]
            piece[:] = array.reshape(-1).view(np.uint8)
            pieces.append((address, piece))
            start += aligned(array.nbytes)
        for address, piece in pieces:
            if ahead:
                self._device.copy_ahead(address, piece, self._read[turn])
            else:
                self._device.copy_in(address, piece)
        self._travelled[turn] = self._device.join_copies() if ahead else self._device.mark()

    def done(self) -> None:
        """The work that reads what was sent has been asked for."""
        if len(self._rooms) == 2:
            self._read[self._turn] = self._device.mark()


def aligned(nbytes: int) -> int:
    """Bytes rounded up, so that what lies behind them is aligned."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
