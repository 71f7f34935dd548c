"""Where the buffers of a program lie, for concrete sizes: views, in-place steps, outputs, the arena."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kgraph.errors import InputError
from kgraph.runtime.arena import Interval, lower_bound, plan_arena
from kgraph.runtime.steps import HostStep

if TYPE_CHECKING:
    from kgraph.runtime.plan import Program


@dataclass
class Place:
    """Where a buffer lies: `offset` bytes into number `index` of a space.

    space: "input", "param", "constant" and "prepared" (index = buffer id there), "output", or "arena" (index 0).
    """

    space: str
    index: int
    offset: int


@dataclass
class Storage:
    """The placement of all buffers.

    shapes, nbytes, places: by buffer id.
    direct: buffer id that is written straight into each output array, -1 where the output is copied after the run.
    donors: input number in whose array each output is written, -1 where the output has an array of its own.
    arena_bytes: size of the arena. arena_bound: the most bytes of temporaries alive at one step, which no arena for
        this order of steps can undercut. num_in_place: outputs of steps that lie where an input of the step lay.
    """

    shapes: list[tuple[int, ...]]
    nbytes: list[int]
    places: list[Place] = field(default_factory=list)
    direct: list[int] = field(default_factory=list)
    donors: list[int] = field(default_factory=list)
    arena_bytes: int = 0
    arena_bound: int = 0
    num_in_place: int = 0


def place_buffers(program: Program, evaluate: Callable[[object], int]) -> Storage:
    """Place every buffer of `program`, sizes being given by `evaluate`.

    Raises InputError where a result would have a negative size: the inputs are too small for the model.
    """
    buffers, steps = program.buffers, program.steps
    storage = Storage([], [])
    for b, (buffer, itemsize) in enumerate(zip(buffers, program.itemsizes)):
        shape = tuple([evaluate(s) for s in buffer.shape])
        count = 1
        for s in shape:
            if s < 0:
                raise _too_small(program, b, shape)
            count *= s
        storage.shapes.append(shape)
        storage.nbytes.append(count * itemsize)
    nbytes = storage.nbytes
    roots, offsets = _roots(program, evaluate)
    end = len(steps)
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for index, step in enumerate(steps):
        for b in step.touched:
            root = roots[b]
            first.setdefault(root, index)
            last[root] = index
    for b in program.outputs:
        last[roots[b]] = end

    # An output array takes the storage of its buffer, if the buffer is all of it and no other output has it.
    claims: dict[int, int] = {}
    for number, b in enumerate(program.outputs):
        root = roots[b]
        whole = offsets[b] == 0 and nbytes[b] == nbytes[root]
        if buffers[root].kind == "temporary" and whole and root not in claims:
            claims[root] = number
            storage.direct.append(b)
        else:
            storage.direct.append(-1)

    donated = _donate(program, storage, roots, claims, first, last)
    leaders = _merge_in_place(program, storage, roots, offsets, first, last, donated)
    for root, number in list(claims.items()):
        claims[leaders.get(root, root)] = number

    groups: dict[int, list[int]] = {}
    for root in last:
        if buffers[root].kind == "temporary":
            groups.setdefault(leaders.get(root, root), []).append(root)
    in_arena = [g for g in groups if g not in claims]
    intervals = [
        Interval(nbytes[g], min(first.get(r, 0) for r in groups[g]), max(last[r] for r in groups[g])) for g in in_arena
    ]
    positions: list[int] = []
    if intervals:
        positions, storage.arena_bytes = plan_arena(intervals)
        storage.arena_bound = lower_bound(intervals)
    arena = dict(zip(in_arena, positions))

    for b, buffer in enumerate(buffers):
        root = roots[b]
        kind = buffers[root].kind
        if kind == "temporary":
            leader = leaders.get(root, root)
            if leader in claims:
                storage.places.append(Place("output", claims[leader], offsets[b]))
            else:
                storage.places.append(Place("arena", 0, arena.get(leader, 0) + offsets[b]))
        elif kind == "input" and program.numbers[root] in storage.donors:
            # Read where it will be overwritten, so that the barriers see both.
            storage.places.append(Place("output", storage.donors.index(program.numbers[root]), offsets[b]))
        elif kind in ("input", "param"):
            storage.places.append(Place(kind, program.numbers[root], offsets[b]))
        else:
            storage.places.append(Place("prepared" if kind == "prepared" else "constant", root, offsets[b]))
        if offsets[b] < 0 or offsets[b] + nbytes[b] > max(nbytes[root], 0):
            raise ValueError(f"buffer {b} ({buffer.name!r}) does not fit into buffer {root} that it is a view of")
    return storage


def _too_small(program: Program, b: int, shape: tuple[int, ...]) -> InputError:
    """The error for a buffer that has a negative size, with the step that would write it."""
    writers = [s for s in program.steps if b in s.operands[len(s.operands) - s.outputs :]]
    where = "".join(f", the result of {s.label} ({', '.join(s.layers)})" for s in writers[:1])
    symbolic = f"[{', '.join(map(str, program.buffers[b].shape))}]"
    return InputError(
        f"{program.name}: the inputs are too small: a tensor of shape {symbolic}{where} would have the shape "
        f"{list(shape)}; give larger ones"
    )


def _roots(program: Program, evaluate: Callable[[object], int]) -> tuple[list[int], list[int]]:
    """For every buffer the one that owns its storage, and its offset there."""
    roots, offsets = [], []
    for b, buffer in enumerate(program.buffers):
        offset = 0
        while buffer.alias >= 0:
            offset += evaluate(buffer.offset)
            b, buffer = buffer.alias, program.buffers[buffer.alias]
        roots.append(b)
        offsets.append(offset)
    return roots, offsets


def _donate(program: Program, storage: Storage, roots, claims, first, last) -> dict[int, int]:
    """Write outputs into donated input arrays, where nobody reads the old content by then.

    Gives root -> the root of the output in whose place it lies: the outputs' own, and what they are made of in place.
    """
    storage.donors = [-1] * len(program.outputs)
    donated: dict[int, int] = {}
    # A host step can fail, and what came before it must not have destroyed anything.
    no_return = max((i for i, step in enumerate(program.steps) if isinstance(step, HostStep)), default=-1)
    for number, output in program.donations:
        source, root = program.inputs[number], roots[program.outputs[output]]
        if claims.get(root) != output or first.get(root, -1) <= no_return:
            continue
        read = last.get(source, -1)
        # Several steps may change the array one after the other.
        chain = [root]
        while (made_of := _overwritten(program, storage, roots, first, last, chain[-1])) is not None:
            chain.append(made_of)
        if first[chain[-1]] != read:
            chain = [root]
        written = first[chain[-1]]
        if written > read or (written == read and _may_overwrite(program, roots, written, chain[-1], source)):
            storage.donors[output] = number
            storage.num_in_place += len(chain) - 1
            donated.update(dict.fromkeys(chain, root))
    return donated


def _overwritten(program: Program, storage: Storage, roots, first, last, root: int) -> int | None:
    """The temporary that the step which makes buffer `root` may overwrite with it."""
    index = first[root]
    step = program.steps[index]
    for output, source in () if isinstance(step, HostStep) else step.inplace:
        src = step.operands[source]
        if (
            step.operands[output] == root
            and roots[src] == src
            and program.buffers[src].kind == "temporary"
            and last[src] == index
            and storage.nbytes[src] == storage.nbytes[root] > 0
            and _may_overwrite(program, roots, index, root, src)
        ):
            return src
    return None


def _may_overwrite(program: Program, roots, index: int, root: int, source: int) -> bool:
    """Whether step `index` may write buffer `root` where the whole buffer `source` lies, which it reads."""
    step = program.steps[index]
    if isinstance(step, HostStep):
        return False
    inputs = len(step.operands) - step.outputs
    allowed = {i for o, i in step.inplace if step.operands[o] == root}
    return all(step.operands[i] == source and i in allowed for i in range(inputs) if roots[step.operands[i]] == source)


def _merge_in_place(
    program: Program, storage: Storage, roots, offsets, first, last, donated: dict[int, int]
) -> dict[int, int]:
    """Let outputs overwrite inputs that die at the same step, where the step allows it; gives root -> leader.

    donated: roots that have their place already, with their leaders.
    """
    buffers, nbytes = program.buffers, storage.nbytes
    leaders: dict[int, int] = {root: leader for root, leader in donated.items() if root != leader}
    group_last = dict(last)
    for index, step in enumerate(program.steps):
        overwritten: set[int] = set()
        for output, source in step.inplace:
            out, src = step.operands[output], step.operands[source]
            out_root, src_root = roots[out], roots[src]
            leader = leaders.get(src_root, src_root)
            if (
                buffers[out_root].kind != "temporary"
                or buffers[src_root].kind != "temporary"
                or out_root in leaders
                or out_root in donated
                or out_root == leader
                or leader in overwritten
                or first[out_root] != index
                or group_last[leader] != index
                or offsets[out] != 0
                or offsets[src] != 0
                or not nbytes[out] == nbytes[out_root] == nbytes[src] == nbytes[src_root] == nbytes[leader] > 0
            ):
                continue
            allowed = {i for o, i in step.inplace if o == output}
            inputs = len(step.operands) - step.outputs
            others = {roots[step.operands[i]] for i in range(inputs) if i not in allowed}
            if any(leaders.get(root, root) == leader for root in others):
                continue
            leaders[out_root] = leader
            overwritten.add(leader)
            group_last[leader] = max(group_last[leader], last[out_root])
            storage.num_in_place += 1
    return leaders
