"""Branches and loops on a device of which Python calls the compiled bodies; values stay where they are.

These are branches, loops of unknown length, and scans with host steps in their bodies; `loops.py` has other scans.

Only what decides is copied to the host: the number of a branch, and whether a loop goes on. A carry that the body's
program may overwrite lies where the step's result will be from the first iteration on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kgraph.dims import evaluate
from kgraph.errors import KGraphError
from kgraph.runtime.control import Body, Branches, Scan, While, check_carried, types_of
from kgraph.runtime.cuda.device import Device
from kgraph.runtime.cuda.device_array import DeviceArray

Arrays = Sequence[DeviceArray]


def on_device(function: object) -> Callable[[Arrays, Arrays, dict[str, int], Device], list[DeviceArray]] | None:
    """How the function of a step runs on arrays of a device; None for a function of host arrays.

    It takes the operands, and arrays for the results, some of which it gives as results.
    """
    if isinstance(function, Branches):
        return lambda arrays, targets, sizes, device: _branches(function, arrays, sizes, device)
    if isinstance(function, While):
        return lambda arrays, targets, sizes, device: _while(function, arrays, targets, sizes, device)
    if isinstance(function, Scan):
        return lambda arrays, targets, sizes, device: _scan(function, arrays, targets, sizes, device)
    return None


def _run(body: Body, arrays: Arrays, sizes: dict[str, int], device: Device) -> list[DeviceArray]:
    """The results of a body for its operands and extras; they may be operands themselves."""
    binding: Any = body.bind([a.shape for a in arrays])
    outputs = [there(r, device) for r in binding(arrays)]
    types = body.result_types(sizes, binding)
    places = [(arrays if kind == "input" else outputs)[number] for kind, number in body.results]
    # No views of views where a carry goes through many iterations.
    return [a if a.shape == shape else a.reshape(shape) for a, (shape, _) in zip(places, types)]


def there(result, device: Device) -> DeviceArray:
    """A result on the device; of a program without inputs there, results are host arrays."""
    return result if isinstance(result, DeviceArray) else DeviceArray.copy_of(device, result)


def _extra(body: Body, sizes: dict[str, int], device: Device) -> list[DeviceArray]:
    return [DeviceArray.copy_of(device, a) for a in body.extra(sizes)]


def _branches(step: Branches, arrays: Arrays, sizes: dict[str, int], device: Device) -> list[DeviceArray]:
    body = step.bodies[min(max(int(arrays[0]), 0), len(step.bodies) - 1)]
    return _run(body, [*arrays[1:], *_extra(body, sizes, device)], sizes, device)


def _given_up(binding: Any, carries: Arrays, targets: Mapping[int, DeviceArray], device: Device) -> list[DeviceArray]:
    """The carries, those that the body's program overwrites moved to memory of which nothing else is read.

    targets: arrays for what becomes of them, by number.
    """
    out = list(carries)
    for number in binding.plan.donors.values():
        source, target = out[number], targets.get(number)
        if target is None:
            target = DeviceArray.empty(device, source.shape, source.dtype)
        if target.address != source.address:
            device.copy(target.address, source.address, source.nbytes)
        out[number] = target.reshape(source.shape)
    return out


def _while(step: While, arrays: Arrays, targets: Arrays, sizes: dict[str, int], device: Device) -> list[DeviceArray]:
    if not _run(step.first, [*arrays, *_extra(step.first, sizes, device)], sizes, device)[0]:
        return [arrays[i] for i in step.wanted]
    rest = _extra(step.body, sizes, device)
    binding = step.body.bind([a.shape for a in (*arrays, *rest)])
    arrays = _given_up(binding, arrays, dict(zip(step.wanted, targets)), device)
    while True:
        *given, go_on = _run(step.body, [*arrays, *rest], sizes, device)
        check_carried(step.body.program.name, types_of(arrays), types_of(given))
        if not go_on:
            return [given[i] for i in step.wanted]
        arrays = given


def _scan(step: Scan, arrays: Arrays, targets: Arrays, sizes: dict[str, int], device: Device) -> list[DeviceArray]:
    count, held = evaluate(step.length, sizes), step.num_carry + step.num_xs
    carries, xs = list(arrays[: step.num_carry]), arrays[step.num_carry : held]
    if any(len(x) != count for x in xs):
        raise KGraphError(f"{step.body.program.name}: a sequence has another length than {count}")
    rest = [*arrays[held:], *_extra(step.body, sizes, device)]
    shapes = [*(a.shape for a in carries), *(x.shape[1:] for x in xs), *(a.shape for a in rest)]
    stacks = targets[step.num_carry :]
    if count:
        carries = _given_up(step.body.bind(shapes), carries, dict(enumerate(targets[: step.num_carry])), device)
    for t in range(count)[:: -1 if step.reverse else 1]:
        results = _run(step.body, [*carries, *(x[t : t + 1].reshape(x.shape[1:]) for x in xs), *rest], sizes, device)
        check_carried(step.body.program.name, types_of(carries), types_of(results))
        carries = results[: step.num_carry]
        for stack, y in zip(stacks, results[step.num_carry :]):
            device.copy(stack[t : t + 1].address, y.address, y.nbytes)
    return [*carries, *stacks]
