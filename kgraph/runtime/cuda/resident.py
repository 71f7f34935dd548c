"""Copies of host arrays on a device, which all programs of the device share.

A model has several compiled forms, each a program of its own, which read the same weights. What lies on the device is
known by the host array that it is made of, so that one program finds what another one has uploaded. When a weight
changes, the program that is called first writes the new one where the old one was, so that addresses, and graphs with
them, stay what they are. The others find the new one there when they are called; one that still has the old one
uploads that again, for itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from kgraph.runtime.cuda.device import Device
from kgraph.runtime.cuda.device_array import Allocation


class _Copy:
    """Memory on a device, given back with the last `_Place` that has it.

    array: what it is made of; None where what it holds counts no more. name: see `Device.copies`. readers: the places
    whose arrays it is made of.
    """

    def __init__(self, device: Device, nbytes: int):
        self.nbytes, self.memory = nbytes, Allocation(device, nbytes)
        self.array: np.ndarray | None = None
        self.name: tuple = ()
        self.readers: weakref.WeakSet[_Place] = weakref.WeakSet()


class _Place:
    """What a `Resident` has under a key. owner: tells residents apart. reads: whether it is among the copy's readers.
    wanted: whether the host array is still in use."""

    __slots__ = ("__weakref__", "copy", "owner", "reads", "wanted")

    def __init__(self, owner: int, copy: _Copy):
        self.owner, self.copy, self.reads, self.wanted = owner, copy, False, True


class Resident:
    """What a program has of some host arrays on the device: copies, or what is made of them there."""

    def __init__(self, device: Device):
        self._device = device
        self._places: dict[Hashable, _Place] = {}

    def address(self, key: Hashable, array: np.ndarray) -> int:
        """Where the content of `array` lies, which is known by `key`. Another array of the same size comes to the same
        address, unless it lies somewhere else already. Raises DeviceMemoryError."""
        place = self._places.get(key)
        if place is not None and place.reads and place.copy.array is array:
            place.wanted = True
            return place.copy.memory.address
        return self.made(key, (), array, array.nbytes, lambda address: self._device.copy_in(address, array))

    def made(self, key: Hashable, how: tuple, array: np.ndarray, nbytes: int, fill: Callable[[int], None]) -> int:
        """Where the `nbytes` lie that `fill(address)` makes of `array`, which are known by `key`. how: equal where all
        programs make the same of an array."""
        place = self._places.get(key)
        if place is None or place.copy.array is not array:
            copy = self._device.copies.get((id(array), *how))
            if copy is None or copy.array is not array:
                copy = self._filled(place, (id(array), *how), array, nbytes, fill)
            if place is None:
                place = self._places[key] = _Place(id(self), copy)
            elif place.copy is not copy:
                place.copy.readers.discard(place)
                place.copy = copy
        place.copy.readers.add(place)
        place.reads = place.wanted = True
        return place.copy.memory.address

    def _filled(self, place: _Place | None, name: tuple, array: np.ndarray, nbytes: int, fill: Callable) -> _Copy:
        copy = place.copy if place is not None and self._may_write(place, nbytes) else _Copy(self._device, nbytes)
        self._forget(copy)
        for reader in copy.readers:
            reader.reads = False
        copy.readers.clear()
        fill(copy.memory.address)
        copy.array, copy.name = array, name
        self._device.copies[name] = copy
        return copy

    def _may_write(self, place: _Place, nbytes: int) -> bool:
        """Whether something else may be written where a place's copy lies: not over what other places of this resident
        read, which the same call does, nor over what has come there for others."""
        readers = list(place.copy.readers)
        own = [reader for reader in readers if reader.owner == place.owner]
        return place.copy.nbytes == nbytes and own in ([], [place]) and (place.reads or not readers)

    def _forget(self, copy: _Copy) -> None:
        """Let nobody find what a copy holds."""
        if copy.array is not None and self._device.copies.get(copy.name) is copy:
            del self._device.copies[copy.name]
        copy.array = None

    def nbytes(self) -> int:
        """Bytes on the device, those that other programs share included."""
        copies = {id(place.copy): place.copy for place in self._places.values()}
        return sum(copy.nbytes for copy in copies.values())

    def keep_only(self, arrays: Sequence[np.ndarray | None]) -> None:
        """Let go of host arrays that are not among these, if no other program has them; their memory on the device is
        kept for what replaces them."""
        wanted = set(map(id, arrays))
        with self._device.lock:
            for place in self._places.values():
                place.wanted = id(place.copy.array) in wanted
                if not any(reader.wanted for reader in place.copy.readers):
                    self._forget(place.copy)
