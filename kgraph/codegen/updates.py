"""Where the updates of state stand in a program: small ones in one kernel, large ones right after their gradients.

An update is a kernel whose results are all written over donated inputs of the program and read by no other step: the
optimizer's new weights and slots. Their order is free as long as they come after all readers of what they overwrite.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType

from kgraph.codegen.cache import spec_key
from kgraph.codegen.lower import Lowered
from kgraph.runtime.plan import NativeStep

# Elements of an update above which a kernel call of its own costs nothing to speak of.
LARGEST_MEMBER = 1 << 15


def arrange_updates(lowered: Lowered, donations: Sequence[tuple[int, int]], target) -> None:
    """Reorder and group the update steps of `lowered`, in place.

    A large update comes right after the last step that it depends on, so that its gradient is read while it lies in a
    cache and its memory is free from then on. Small updates of one form are joined.
    """
    updates = _update_steps(lowered, donations)
    if not updates:
        return
    loop_group = importlib.import_module(target.loop_group)
    groups: dict[tuple, list[int]] = {}
    for index in updates:
        step = lowered.steps[index]
        key = loop_group.group_key(lowered.specs[step.kernel])
        if key is None:
            continue
        count = step.sizes[0]
        if isinstance(count, int) and count <= LARGEST_MEMBER:
            groups.setdefault(key, []).append(index)
    batches: list[list[int]] = []
    for members in groups.values():
        most = loop_group.largest_group(lowered.specs[lowered.steps[members[0]].kernel])
        batches += [members[first : first + most] for first in range(0, len(members), most)]
    batches = [members for members in batches if len(members) > 1]
    joined = {index for members in batches for index in members}
    early = [index for index in updates if index not in joined]
    places = _earliest_places(lowered, early, {o: i for i, o in donations})
    order: list[tuple[float, int, NativeStep]] = []
    for index, step in enumerate(lowered.steps):
        if index not in joined:
            order.append((places.get(index, index), index, step))
    for members in batches:
        order.append((members[-1], members[-1], _join(lowered, members, loop_group, target)))
    order.sort(key=lambda entry: entry[:2])
    lowered.step_nodes = [lowered.step_nodes[index] for _, index, _ in order]
    lowered.steps = [step for _, _, step in order]
    used = {key for step in lowered.steps if isinstance(step, NativeStep) for key in step.kernels}
    lowered.specs = {key: spec for key, spec in lowered.specs.items() if key in used}


def _update_steps(lowered: Lowered, donations: Sequence[tuple[int, int]]) -> list[int]:
    """Numbers of the steps all of whose results are donated outputs that no step reads."""
    donated = {lowered.outputs[o] for _, o in donations}
    read: set[int] = {b.alias for b in lowered.buffers if b.alias >= 0}
    for step in lowered.steps:
        read.update(step.operands[: len(step.operands) - step.outputs])
    out = []
    for index, step in enumerate(lowered.steps):
        results = step.operands[len(step.operands) - step.outputs :]
        if isinstance(step, NativeStep) and all(b in donated and b not in read for b in results):
            out.append(index)
    return out


def _earliest_places(lowered: Lowered, updates: list[int], donors: dict[int, int]) -> dict[int, float]:
    """For each update a place right after the last step that writes what it reads or reads what it overwrites."""
    roots = [_root(lowered, b) for b in range(len(lowered.buffers))]
    sources = {lowered.outputs[o]: lowered.inputs[i] for o, i in donors.items()}
    own = set(updates)
    written: dict[int, int] = {}
    readers: dict[int, list[int]] = {}
    for index, step in enumerate(lowered.steps):
        split = len(step.operands) - step.outputs
        for b in step.operands[:split]:
            readers.setdefault(roots[b], []).append(index)
        for b in step.operands[split:]:
            written[roots[b]] = index
    places: dict[int, float] = {}
    for index in updates:
        step = lowered.steps[index]
        split = len(step.operands) - step.outputs
        after = [written.get(roots[b], -1) for b in step.operands[:split]]
        for b in step.operands[split:]:
            after += [r for r in readers.get(sources[b], ()) if r != index and r not in own]
            # Two updates that read one another's state keep their order.
            if any(r != index and r in own for r in readers.get(sources[b], ())):
                after.append(index)
        place = max(after, default=-1)
        if place < index:
            places[index] = place + 0.5
    return places


def _root(lowered: Lowered, b: int) -> int:
    while lowered.buffers[b].alias >= 0:
        b = lowered.buffers[b].alias
    return b


def _join(lowered: Lowered, members: list[int], loop_group: ModuleType, target) -> NativeStep:
    """One step that does what the steps `members` do."""
    steps = [lowered.steps[index] for index in members]
    spec = loop_group.group_spec([lowered.specs[step.kernel] for step in steps])
    key = spec_key(spec, target)
    lowered.specs[key] = spec
    sizes, extent = loop_group.group_sizes([step.sizes[0] for step in steps])
    count = steps[0].outputs
    inputs = len(steps[0].operands) - count
    first_output = len(steps) * inputs
    operands = [b for step in steps for b in step.operands[:inputs]]
    operands += [b for step in steps for b in step.operands[inputs:]]
    inplace = [
        (first_output + number * count + o - inputs, number * inputs + i)
        for number, step in enumerate(steps)
        for o, i in step.inplace
    ]
    return replace(
        steps[0],
        kernel=key,
        operands=tuple(operands),
        outputs=len(steps) * count,
        extent=extent,
        sizes=sizes,
        flops=sum(step.flops for step in steps),
        bytes=sum(step.bytes for step in steps),
        inplace=tuple(inplace),
        label=spec.name,
        layers=tuple(sorted({layer for step in steps for layer in step.layers})),
    )
