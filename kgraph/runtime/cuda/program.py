"""Programs that run on a device: kernels and constants stay there, parameters are uploaded when they change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kgraph.decisions import Decision
from kgraph.runtime.cuda.binding import CudaBinding
from kgraph.runtime.cuda.device import Device
from kgraph.runtime.cuda.device_plan import LOOP_LAUNCHES, DevicePlan
from kgraph.runtime.cuda.libraries import NAMES
from kgraph.runtime.cuda.resident import Resident
from kgraph.runtime.plan import Program
from kgraph.runtime.steps import LaunchStep


class CudaProgram(Program):
    """A program whose kernels run on `device`.

    It is called on NumPy arrays like any other, and gives NumPy arrays. If one of the arrays is a DeviceArray, all
    results are DeviceArrays, and the call returns before they are computed; outputs with a donated input are that
    input then, overwritten.

    keeps_places: whether that holds for all of them, at the price of a copy where the input is read until the end, or
        for those alone that can be written in its place.
    """

    def __init__(self, *args, device: Device, keeps_places: bool = True, **fields):
        self.device, self.keeps_places = device, keeps_places
        self.resident_params, self.resident_constants, self.prepared = (Resident(device) for _ in range(3))
        super().__init__(*args, **fields)

    def _load(self) -> None:
        self.functions: dict[str, Any] = self.device.load(self.kernels)

    def _new_binding(self, sizes: dict[str, int]) -> Any:
        return CudaBinding(self, sizes)

    def __reduce__(self):
        raise TypeError(f"{self.name} is a program on a GPU, which cannot be pickled")

    def set_params(self, arrays: Mapping[int, np.ndarray]) -> None:
        super().set_params(arrays)
        for resident in (self.resident_params, self.prepared):
            resident.keep_only([*self.values, *self.constants.values()])

    def __call__(self, arrays: Sequence, out: Sequence[np.ndarray | None] | None = None) -> tuple:
        return self._bind(tuple([tuple(a.shape) for a in arrays]))(arrays, out)

    def decisions(self) -> list[Decision]:
        """Steps that the device's libraries do not take and loops too long for graphs, at any of the sizes bound."""
        bindings: list[Any] = list(self._bindings.values())
        plans: list[DevicePlan] = [binding.plan for binding in bindings]
        found = dict.fromkeys(item for plan in plans for item in plan.refusals.items())
        out = [Decision(self.steps[n].label, f"kgraph's kernel, not {self._library(n)}", why) for n, why in found]
        for n, count in dict.fromkeys(item for plan in plans for item in plan.long_loops.items()):
            why = f"it takes {count}, and graphs keep no more than {LOOP_LAUNCHES} of a loop"
            out.append(Decision(self.steps[n].label, "Python makes the launches of its iterations in every call", why))
        return out

    def _library(self, number: int) -> str:
        """The library that might do a step."""
        step = self.steps[number]
        assert isinstance(step, LaunchStep)
        assert step.library is not None
        return NAMES[type(step.library.task)]

    def stats(self) -> dict[str, int]:
        """Counts and bytes of what this program holds."""
        bindings: list[Any] = list(self._bindings.values())
        launches = sum(isinstance(s, LaunchStep) for s in self.steps)
        return {
            "bindings": len(bindings),
            "arena_bytes": sum(b.storage.arena_bytes for b in bindings),
            "device_bytes": sum(b.held_bytes() for b in bindings),
            "prepared_bytes": self.prepared.nbytes(),
            "arena_bound": max([b.storage.arena_bound for b in bindings], default=0),
            "in_place_outputs": max([sum(d >= 0 for d in b.storage.donors) for b in bindings], default=0),
            "graphs": sum(b.num_graphs() for b in bindings),
            "library_calls": max([b.plan.num_library_calls() for b in bindings], default=0),
            "native_steps": launches,
            "host_steps": len(self.steps) - launches,
            "kernels": len(self.kernels),
            "code_bytes": sum(map(len, self.kernels.values())),
        }
