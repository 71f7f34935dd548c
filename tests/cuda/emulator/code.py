"""From the instructions of a function to what they do to the registers of its threads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tests.cuda.emulator import alu, warps
from tests.cuda.emulator.alu import DTYPES
from tests.cuda.emulator.counts import Counts
from tests.cuda.emulator.memory import EmulatedFault, GlobalMemory, Memory, Threads
from tests.cuda.emulator.parse import ENDS, Address, Block, Function, Instruction, Variable, width_of

if TYPE_CHECKING:
    from tests.cuda.emulator.machine import Kernel

_STORAGE = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_NOTHING = ("membar", "fence")
_SPACES = ("global", "shared", "local", "param")

Index = np.ndarray | None  # threads of a frame; None: all of them
Step = Callable[["Frame", Index], None]


class Frame:
    """Some threads that run a function. registers: by number, unsigned integers or truths, an element per thread."""

    def __init__(self, code: Code, parameters: dict[str, np.ndarray], identity: dict[str, np.ndarray], launch: Launch):
        self.count = len(identity["number"])
        self.launch, self.parameters = launch, parameters
        self.identity = identity
        self.registers: list[np.ndarray] = [np.full(self.count, 0xA5, dtype) for dtype in code.storage]
        self.carry = np.zeros(self.count, np.uint64)
        self.local = Memory("local", self.count * code.local_bytes) if code.local_bytes else None
        self.local_bytes = code.local_bytes

    def of(self, name: str, index: Index) -> np.ndarray:
        """Something about threads: "number", "tid", "block", "warp", "lane", "barriers"."""
        values = self.identity[name]
        return values if index is None else values[index]

    def threads(self, index: Index) -> Threads:
        return Threads(*(self.of(name, index) for name in ("number", "block", "warp", "barriers")))


class Launch:
    """What all threads of some blocks share. counts: None where nothing is counted."""

    def __init__(
        self,
        memory: GlobalMemory,
        shared: Memory,
        shared_bytes: int,
        special: dict[str, np.ndarray],
        counts: Counts | None = None,
    ):
        self.memory, self.shared, self.shared_bytes, self.special = memory, shared, shared_bytes, special
        self.counts = counts

    def count(self, what: str, space: str, at: np.ndarray, width: int, threads: Threads) -> None:
        """Note an access. what: "ld" or "st"."""
        if self.counts is not None and space == "global":
            self.counts.access_global(what, at, width, threads.warp)
        elif self.counts is not None and space == "shared":
            self.counts.access_shared(at, threads.warp)


class Code:
    """A function ready to run. steps: of each basic block, but for what ends it."""

    def __init__(self, function: Function, kernel: Kernel):
        self.function, self.kernel = function, kernel
        self.numbers = {name: number for number, name in enumerate(function.registers)}
        self.kinds = list(function.registers.values())
        self.storage = [np.bool_ if kind == "pred" else _STORAGE[width_of(kind)] for kind in self.kinds]
        own = [v for v in function.locals if v.space == "local"]
        self.symbols, self.local_bytes = laid_out(own, 0)
        self.parameters = {v.name: v for v in (*function.parameters, *function.results, *function.locals)}
        self.blocks: list[Block] = function.blocks
        self.ends: list[Instruction | None] = []
        self.conditions: list[Callable | None] = []
        self.steps: list[list[Step]] = []
        self.mix = [Counter(_class_of(i.opcode) for i in block.instructions) for block in self.blocks]
        self.together: list[Together | None] = []
        for block in self.blocks:
            body = list(block.instructions)
            end = body.pop() if body and ends_block(body[-1]) else None
            self.ends.append(end)
            self.conditions.append(self._guard(end) if end is not None and end.guard else None)
            self.together.append(self._together(end) if end is not None else None)
            self.steps.append([step for i in body if (step := self._step(i)) is not None])

    # -- operands -----------------------------------------------------------------------------------------------------
    def read(self, operand: Any, kind: str) -> Callable[[Frame, Index], np.ndarray]:
        """What gives an operand as values of a PTX type, one per thread."""
        dtype = DTYPES[kind]
        if operand in self.numbers:
            number, storage = self.numbers[operand], np.dtype(self.storage[self.numbers[operand]])
            if storage == dtype:
                return lambda f, i: f.registers[number] if i is None else f.registers[number][i]
            if storage.itemsize == dtype.itemsize:
                return lambda f, i: (f.registers[number] if i is None else f.registers[number][i]).view(dtype)
            narrow = np.dtype(_STORAGE[dtype.itemsize])
            return lambda f, i: (
                (f.registers[number] if i is None else f.registers[number][i]).astype(narrow).view(dtype)
            )
        if operand.startswith("%"):
            name = operand[1:]
            return lambda f, i: _taken(f.launch.special[name], i).astype(dtype)
        value = np.array([self._constant(operand, dtype)])
        return lambda f, i: np.broadcast_to(value, f.count if i is None else len(i))

    def _constant(self, text: str, dtype: np.dtype):
        symbol = self.symbols.get(text, self.kernel.symbols.get(text))
        if symbol is not None:
            return np.array(symbol).astype(dtype)
        if text[:2] in ("0f", "0F"):
            return np.array(int(text[2:], 16), np.uint32).view(np.float32)
        if text[:2] in ("0d", "0D"):
            return np.array(int(text[2:], 16), np.uint64).view(np.float64)
        bits = dtype.itemsize * 8
        return np.array(int(text, 0) % (1 << bits), np.uint64).astype(_STORAGE[dtype.itemsize]).view(dtype)

    def write(self, operand: str) -> Callable[[Frame, Index, np.ndarray], None]:
        """What puts values into a register, which is as wide as they are, or wider."""
        if operand == "_":
            return lambda f, i, values: None
        number = self.numbers[operand]
        storage = np.dtype(self.storage[number])

        def put(frame: Frame, index: Index, values: np.ndarray) -> None:
            if values.dtype != storage:
                if values.dtype.itemsize != storage.itemsize:
                    signed = values.dtype.kind == "i"
                    values = values.astype(f"{'i' if signed else 'u'}{storage.itemsize}")
                values = values.view(storage)
            if index is None:
                # What instructions compute is new; what they hand on of a constant is not.
                is_new = values.flags.writeable and values.shape == (frame.count,)
                frame.registers[number] = values if is_new else np.array(np.broadcast_to(values, frame.count))
            else:
                frame.registers[number][index] = values

        return put

    def _guard(self, instruction: Instruction) -> Callable[[Frame, Index], np.ndarray]:
        name, negated = instruction.guard or ("", False)
        get = self.read(name, "pred")
        return (lambda f, i: ~get(f, i)) if negated else get

    # -- instructions -------------------------------------------------------------------------------------------------
    def _step(self, instruction: Instruction) -> Step | None:
        """What an instruction does; None for one that does nothing here. Raises ValueError for an unknown one."""
        try:
            step = self._plain(instruction)
        except (KeyError, ValueError) as error:
            raise ValueError(f"{instruction.line}: {error!r}") from error
        if step is None or instruction.guard is None:
            return step
        condition = self._guard(instruction)

        def guarded(frame: Frame, index: Index) -> None:
            chosen = np.flatnonzero(condition(frame, index))
            if len(chosen):
                step(frame, chosen if index is None else index[chosen])

        return guarded

    def _plain(self, instruction: Instruction) -> Step | None:
        _, opcode, operands, line = instruction
        name, *parts = opcode.split(".")
        if name in _NOTHING:
            return None
        if name in ("ld", "st"):
            return (self._load if name == "ld" else self._store)(parts, operands, line)
        if name == "call":
            return self._call(operands)
        if name in ("addc", "subc", "madc") or "cc" in parts:
            return self._carried(name, parts, operands)
        if name == "mov" and any(isinstance(x, tuple) for x in operands):
            return self._repack(parts[-1], operands)
        operation = alu.operation(opcode)
        if operation is None:
            raise ValueError("this instruction is not emulated")
        return self._compute(operation, operands)

    def _compute(self, operation: alu.Operation, operands: tuple) -> Step:
        target, *sources = operands
        gets = [self.read(x, kind) for x, kind in zip(sources, operation.kinds, strict=True)]
        put, function = self.write(target.split("|")[0]), operation.function
        if "|" in target:
            other = self.write(target.split("|")[1])

            def both(frame: Frame, index: Index) -> None:
                out = function(*[get(frame, index) for get in gets])
                put(frame, index, out)
                other(frame, index, ~out)

            return both
        return lambda frame, index: put(frame, index, function(*[get(frame, index) for get in gets]))

    def _carried(self, name: str, parts: list[str], operands: tuple) -> Step:
        """Sums and products in 32 bits whose carry goes from one to the next."""
        if parts[-1] != "u32" and parts[-1] != "s32":
            raise ValueError("only 32 bits are emulated")
        put, gets = self.write(operands[0]), [self.read(x, "u32") for x in operands[1:]]
        takes, gives, high = name.endswith("c"), "cc" in parts, "hi" in parts
        half, low = np.uint64(32), np.uint64(0xFFFFFFFF)

        def step(frame: Frame, index: Index) -> None:
            values = [get(frame, index).astype(np.uint64) for get in gets]
            carry = _taken(frame.carry, index) if takes else np.uint64(0)
            if name.startswith("mad"):
                product = values[0] * values[1]
                out = (product >> half if high else product & low) + values[2] + carry
            elif name.startswith("add"):
                out = values[0] + values[1] + carry
            else:
                out = values[0] - values[1] - carry
            put(frame, index, out.astype(np.uint32))
            if gives:
                frame.carry[slice(None) if index is None else index] = out >> half & np.uint64(1)

        return step

    def _repack(self, kind: str, operands: tuple) -> Step:
        """A register from several narrower ones, or the other way."""
        target, source = operands
        if isinstance(target, tuple):
            get, puts = self.read(source, kind), [self.write(t) for t in target]
            narrow = _STORAGE[width_of(kind) // len(target)]

            def unpack(frame: Frame, index: Index) -> None:
                parts = np.ascontiguousarray(get(frame, index)).view(narrow).reshape(-1, len(puts))
                for number, put in enumerate(puts):
                    put(frame, index, np.ascontiguousarray(parts[:, number]))

            return unpack
        part = f"b{width_of(kind) * 8 // len(source)}"
        put, gets = self.write(target), [self.read(s, part) for s in source]
        wide = _STORAGE[width_of(kind)]
        return lambda f, i: put(f, i, np.ascontiguousarray(np.stack([g(f, i) for g in gets], 1)).view(wide)[:, 0])

    # -- memory -------------------------------------------------------------------------------------------------------
    def _address(self, address: Address) -> Callable[[Frame, Index], np.ndarray]:
        get, offset = self.read(address.base, "u64"), np.uint64(address.offset % (1 << 64))
        return lambda f, i: get(f, i) + offset

    def _place(self, space: str, address: Address, width: int, line: str) -> Callable[[Frame, Index], tuple]:
        """The memory of an access, and its addresses there."""
        get = self._address(address)

        def own(frame: Frame, index: Index, nbytes: int, part: str) -> np.ndarray:
            """Addresses in memory of which every thread or block has `nbytes`."""
            at = get(frame, index)
            if (at > np.uint64(max(nbytes - width, 0))).any() or nbytes < width:
                raise EmulatedFault(f"{space} memory is not there: {line}")
            numbers = frame.of("place", index) if part == "block" else _taken(np.arange(frame.count), index)
            return at + numbers.astype(np.uint64) * np.uint64(nbytes)

        if space == "global":
            return lambda f, i: (f.launch.memory, get(f, i))
        if space == "shared":
            return lambda f, i: (f.launch.shared, own(f, i, f.launch.shared_bytes, "block"))
        return lambda f, i: (f.local, own(f, i, f.local_bytes, "thread"))

    def _access(self, parts: list[str]) -> tuple[str, str, int]:
        """(space, type, elements) of a load or a store."""
        space = next((s for s in _SPACES if s in parts), None)
        if space is None:
            raise ValueError("generic addresses are not emulated")
        count = next((int(p[1:]) for p in parts if p in ("v2", "v4")), 1)
        return space, parts[-1], count

    def _load(self, parts: list[str], operands: tuple, line: str) -> Step:
        space, kind, count = self._access(parts)
        targets, address = operands
        puts = [self.write(t) for t in (targets if isinstance(targets, tuple) else (targets,))]
        dtype, width = DTYPES[kind], width_of(kind)
        if space == "param":
            name, offset, put = address.base, address.offset, puts[0]
            return lambda f, i: put(
                f, i, np.ascontiguousarray(_taken(f.parameters[name], i)[:, offset : offset + width]).view(dtype)[:, 0]
            )
        place = self._place(space, address, width * count, line)

        def load(frame: Frame, index: Index) -> None:
            memory, at = place(frame, index)
            _check_vector(at, count, width, line)
            threads = frame.threads(index)
            frame.launch.count("ld", space, at, width * count, threads)
            for number, put in enumerate(puts):
                put(frame, index, memory.load(at + np.uint64(number * width), dtype, threads, line))

        return load

    def _store(self, parts: list[str], operands: tuple, line: str) -> Step:
        space, kind, count = self._access(parts)
        address, sources = operands
        gets = [self.read(s, kind) for s in (sources if isinstance(sources, tuple) else (sources,))]
        width = width_of(kind)
        if space == "param":
            name, offset, get = address.base, address.offset, gets[0]
            nbytes = self.parameters[name].nbytes

            def pass_on(frame: Frame, index: Index) -> None:
                room = frame.parameters.setdefault(name, np.zeros((frame.count, nbytes), np.uint8))
                values = np.ascontiguousarray(get(frame, index)).view(np.uint8).reshape(-1, width)
                room[slice(None) if index is None else index, offset : offset + width] = values

            return pass_on
        place = self._place(space, address, width * count, line)

        def store(frame: Frame, index: Index) -> None:
            memory, at = place(frame, index)
            _check_vector(at, count, width, line)
            threads = frame.threads(index)
            frame.launch.count("st", space, at, width * count, threads)
            for number, get in enumerate(gets):
                memory.store(at + np.uint64(number * width), np.ascontiguousarray(get(frame, index)), threads, line)

        return store

    # -- warps --------------------------------------------------------------------------------------------------------
    def _together(self, end: Instruction) -> Together | None:
        """What the threads of a warp do together at the end of a basic block; None where each goes on alone."""
        _, opcode, operands, line = end
        name, *parts = opcode.split(".")
        if end.guard is not None or name not in ("shfl", "mma", "bar") or (parts[0] == "sync" and name == "bar"):
            return None
        if name == "shfl":
            return Together(self.read(operands[-1], "u32"), self._shuffle(parts[1], operands, line))
        if name == "mma":
            return Together(self.read("0xffffffff", "u32"), self._mma(opcode, operands, line))
        return Together(self.read(operands[-1], "u32"), lambda frame, index: None)

    def _shuffle(self, mode: str, operands: tuple, line: str) -> Step:
        targets, value, b, clamp, _ = operands
        puts = [self.write(t) for t in targets.split("|")]
        get, shift, bounds = self.read(value, "b32"), self.read(b, "u32"), self.read(clamp, "u32")

        def step(frame: Frame, index: Index) -> None:
            active = np.zeros(frame.count, bool)
            active[slice(None) if index is None else index] = True
            lane, own = frame.of("lane", index), _taken(np.arange(frame.count), index)
            source, inside = warps.shuffle(mode, shift(frame, index), bounds(frame, index), lane)
            at = own - lane + source
            if (at >= frame.count).any() or not active[np.minimum(at, frame.count - 1)].all():
                raise EmulatedFault(f"a shuffle reads a thread that is not there: {line}")
            for put, out in zip(puts, (get(frame, None)[at], inside)):
                put(frame, index, out)

        return step

    def _mma(self, opcode: str, operands: tuple, line: str) -> Step:
        product = warps.product(opcode)
        d, a, b, c = operands
        puts = [self.write(x) for x in d]
        fragments = [[self.read(x, kind) for x in names] for names, kind in ((a, "b32"), (b, "b32"), (c, "f32"))]

        def step(frame: Frame, index: Index) -> None:
            lanes = warps.by_warp(np.arange(frame.count) if index is None else index, line)
            given = [np.stack([get(frame, index).reshape(lanes.shape) for get in gets], axis=-1) for gets in fragments]
            out = warps.multiply(product, *given)
            for number, put in enumerate(puts):
                put(frame, index, np.ascontiguousarray(out[:, :, number].reshape(-1)))

        return step

    def _call(self, operands: tuple) -> Step:
        results, name, given = operands if len(operands) == 3 else ((), *operands)

        def step(frame: Frame, index: Index) -> None:
            code = self.kernel.code(name)
            of = {
                v.name: _taken(frame.parameters[source], index).copy()
                for v, source in zip(code.function.parameters, given, strict=True)
            }
            count = frame.count if index is None else len(index)
            of.update((v.name, np.zeros((count, v.nbytes), np.uint8)) for v in code.function.results)
            identity = {key: _taken(values, index).copy() for key, values in frame.identity.items()}
            special = {key: _taken(values, index) for key, values in frame.launch.special.items()}
            outer = frame.launch
            launch = Launch(outer.memory, outer.shared, outer.shared_bytes, special, outer.counts)
            inner = Frame(code, of, identity, launch)
            self.kernel.run(code, inner)
            for v, target in zip(code.function.results, results, strict=True):
                room = frame.parameters.setdefault(target, np.zeros((frame.count, v.nbytes), np.uint8))
                room[slice(None) if index is None else index] = of[v.name]

        return step


def _taken(values: np.ndarray, index: Index) -> np.ndarray:
    return values if index is None else values[index]


def _check_vector(at: np.ndarray, count: int, width: int, line: str) -> None:
    if count > 1 and (at & np.uint64(count * width - 1)).any():
        raise EmulatedFault(f"memory is not aligned to {count * width} bytes: {line}")


def _class_of(opcode: str) -> str:
    """The first and the last part of an opcode: `fma.f32`."""
    parts = opcode.split(".")
    return parts[0] if len(parts) == 1 else f"{parts[0]}.{parts[-1]}"


class Together(NamedTuple):
    """members: gives the lanes that take part, of each thread. step: what they do."""

    members: Callable[[Frame, Index], np.ndarray]
    step: Step


def ends_block(instruction: Instruction) -> bool:
    """Whether an instruction is the end of its basic block."""
    return instruction.opcode.split(".")[0] in ENDS


def laid_out(variables: Sequence[Variable], start: int) -> tuple[dict[str, int], int]:
    """Offsets of variables one behind the other, and where they end."""
    offsets, end = {}, start
    for variable in variables:
        end = -(-end // variable.align) * variable.align
        offsets[variable.name] = end
        end += variable.nbytes
    return offsets, -(-end // 16) * 16
