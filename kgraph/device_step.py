"""A training or evaluation step on a GPU: variables stay on the device from step to step."""

from __future__ import annotations

from typing import Any

from kgraph.codegen.cuda.target import CudaTarget
from kgraph.compiler import compile_graph
from kgraph.frontend.capture import Captured
from kgraph.frontend.keras_backend import core
from kgraph.ir import Graph
from kgraph.runtime.cuda.control import there
from kgraph.runtime.cuda.device import Device, device_for
from kgraph.runtime.cuda.device_array import DeviceArray


class DeviceVariant:
    """The program for one structure of the batch; the counterpart of `train_step.Variant`.

    All variables that the step reads are inputs of the program, since their values lie on the device; new values are
    written over the old ones. So nothing is prepared on the host when weights change, in steps of evaluation either.
    """

    def __init__(self, captured: Captured, target: CudaTarget, progress):
        graph = captured.graph
        self.device: Device = device_for(target.device)
        self.variables, self.updates = list(captured.variables), captured.updates
        self.state: list = self.variables
        self.read: list = []
        self.inputs, self.outputs, self.passes = captured.inputs, captured.outputs, "training"
        self.num_results = captured.num_outputs
        numbers = {id(v): len(graph.inputs) + i for i, v in enumerate(self.variables)}
        places = enumerate(self.updates, self.num_results)
        self.donations = [(numbers[id(v)], place) for v, place in ((v, p) for p, v in places) if id(v) in numbers]
        step = Graph([*graph.inputs, *graph.params], (), graph.nodes, graph.outputs, graph.name)
        self.compiled = compile_graph(step, progress, self.passes, self.donations, target)
        self.program = self.compiled.program

    def __call__(self, leaves: list) -> Any:
        """Run the step; the results are arrays on the device, or host arrays of a step that reads no variable."""
        arrays: list[Any] = [*leaves, *(resident(v, self.device) for v in self.variables)]
        results = self.program(arrays)
        core.adopt_residents(self.updates, [there(r, self.device) for r in results[self.num_results :]])
        return self.outputs.pack(list(results[: self.num_results]))

    def refresh(self) -> None:
        """Parameters are inputs: nothing is to be prepared."""


def resident(variable: core.Variable, device: Device) -> DeviceArray:
    """A variable's value on a device: where the last step left it, or copied from the host into the same memory."""
    array = variable.resident
    if array is not None and array.device is device:
        return array
    value, spare = variable._value, variable.spare
    if spare is None or spare.device is not device or (spare.shape, spare.dtype) != (value.shape, value.dtype):
        spare = DeviceArray.empty(device, value.shape, value.dtype)
    spare.fill(value)
    variable.resident, variable.spare = spare, None
    return spare
