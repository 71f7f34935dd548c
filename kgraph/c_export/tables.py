"""A program as constant C tables for the runtime in `runtime/` (`program.h` says what each field means)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from kgraph.errors import UnsupportedError
from kgraph.ir import Dim
from kgraph.runtime.plan import Program
from kgraph.runtime.steps import HostStep, NativeStep

ALIGNMENT = 64
MAX_SYMBOLS = 16
# In the order of `kg_dtype`.
DTYPES = (
    "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 bfloat16 float32 float64".split()
)  # what follows has the number of `KG_OTHER_DTYPE`
_KINDS = {"input": 0, "param": 1, "constant": 2, "temporary": 3, "dim": 4}
_CONSTANT, _SYMBOL, _ADD, _MULTIPLY, _FLOOR_DIVIDE, _END = range(6)


def dtype_number(dtype: str) -> int:
    """The number of a dtype in `kg_dtype`."""
    return DTYPES.index(dtype) if dtype in DTYPES else len(DTYPES)


class Weights:
    """The arrays of all programs of a library, each once, one after another on lines of `ALIGNMENT` bytes.

    It begins with an identification of `ALIGNMENT` bytes that tells it from other models' weights.
    """

    def __init__(self):
        self._offsets: dict[bytes, int] = {}
        self._pieces: list[bytes] = []
        self.nbytes = ALIGNMENT

    def add(self, array: np.ndarray) -> int:
        """Where the array lies."""
        content = np.ascontiguousarray(array).tobytes()
        key = hashlib.sha256(content).digest()
        if key not in self._offsets:
            self._offsets[key] = self.nbytes
            padded = content + bytes(-len(content) % ALIGNMENT)
            self._pieces.append(padded)
            self.nbytes += len(padded)
        return self._offsets[key]

    def identification(self) -> bytes:
        """What the weights begin with: a word, and a digest of all that follows."""
        digest = hashlib.sha256()
        for piece in self._pieces:
            digest.update(piece)
        return b"kgraph weights 1".ljust(32, b"\0") + digest.digest()

    def write(self, path) -> None:
        """Write all to a file."""
        with open(path, "wb") as file:
            file.write(self.identification())
            file.writelines(self._pieces)


@dataclass
class _Pool:
    """Numbers of one C array; equal runs are stored once."""

    values: list[int] = field(default_factory=list)
    known: dict[tuple, int] = field(default_factory=dict)

    def add(self, run: Sequence[int]) -> int:
        run = tuple(run)
        if run not in self.known:
            self.known[run] = len(self.values)
            self.values.extend(run)
        return self.known[run]


class ProgramTables:
    """The C text of one program. `symbol` names its kernels: `symbol(key)` gives the C function of a kernel."""

    def __init__(self, name: str, program: Program, weights: Weights, symbol: Callable[[str], str]):
        hosts = [f"{s.label}: {s.reason}" for s in program.steps if isinstance(s, HostStep)]
        if hosts:
            raise UnsupportedError(
                f"{program.name}: these steps run on NumPy and have no place in a C library: {'; '.join(hosts)}"
            )
        self.name, self.program, self.weights, self.symbol = name, program, weights, symbol
        self.symbols = sorted({symbol for symbol, *_ in program.solvers})
        if len(self.symbols) > MAX_SYMBOLS:
            raise UnsupportedError(f"{program.name}: more than {MAX_SYMBOLS} sizes that differ from call to call")
        self.code = _Pool()
        self.starts: list[int] = []
        self.expressions: dict[int | Dim, int] = {}
        self.shapes, self.sizes, self.inplace = _Pool(), _Pool(), _Pool()
        self.operands: list[int] = []

    def text(self) -> str:
        """The definition of `static const kg_program NAME` and all that it refers to."""
        program = self.program
        buffers = [self._buffer(b, buffer) for b, buffer in enumerate(program.buffers)]
        steps = [self._step(step) for step in program.steps]
        solvers = [
            f"{{{self.symbols.index(symbol)}, {', '.join(map(str, rest))}}}" for symbol, *rest in program.solvers
        ]
        params = [self.weights.add(value) for value in program.values if value is not None]
        donations = [number for pair in program.donations for number in pair]
        n = self.name
        counts = [
            len(self.symbols),
            len(solvers),
            len(buffers),
            len(steps),
            len(self.operands),
            sum(len(step.sizes) for step in program.steps if isinstance(step, NativeStep)),
            len(program.inputs),
            len(program.outputs),
            len(params),
            len(program.donations),
        ]
        names = "solvers buffers steps inputs outputs donations params expressions code shapes operands sizes inplace"
        return "\n".join(
            [
                _rows("kg_solver", f"{n}_solvers", solvers),
                _rows("kg_buffer", f"{n}_buffers", buffers),
                _rows("kg_step", f"{n}_steps", steps),
                _numbers("int32_t", f"{n}_inputs", program.inputs),
                _numbers("int32_t", f"{n}_outputs", program.outputs),
                _numbers("int32_t", f"{n}_donations", donations),
                _numbers("int64_t", f"{n}_params", params),
                _numbers("int32_t", f"{n}_expressions", self.starts),
                _numbers("int64_t", f"{n}_code", self.code.values),
                _numbers("int32_t", f"{n}_shapes", self.shapes.values),
                _numbers("int32_t", f"{n}_operands", self.operands),
                _numbers("int32_t", f"{n}_sizes", self.sizes.values),
                _numbers("int32_t", f"{n}_inplace", self.inplace.values),
                f"static const kg_program {n} = {{{', '.join(map(str, counts))},",
                "    " + ", ".join(f"{n}_{field}" for field in names.split()) + "};",
                "",
            ]
        )

    def _expression(self, size: int | Dim) -> int:
        if size not in self.expressions:
            code: list[int] = []
            self._emit(size, code)
            self.expressions[size] = len(self.starts)
            self.starts.append(self.code.add([*code, _END]))
        return self.expressions[size]

    def _emit(self, size: int | Dim, code: list[int]) -> None:
        """Postfix code of a size."""
        if not isinstance(size, Dim):
            code += [_CONSTANT, int(size)]
            return
        for number, (monomial, coefficient) in enumerate(size.terms):
            code += [_CONSTANT, coefficient]
            for atom in monomial:
                if isinstance(atom, str):
                    code += [_SYMBOL, self.symbols.index(atom)]
                else:
                    _, numerator, divisor = atom
                    self._emit(numerator, code)
                    code += [_FLOOR_DIVIDE, divisor]
                code.append(_MULTIPLY)
            if number:
                code.append(_ADD)

    def _buffer(self, b: int, buffer) -> str:
        program, data, number = self.program, 0, 0
        if buffer.kind == "constant":
            data = self.weights.add(program.constants[b])
        elif buffer.kind == "dim":
            number = self._expression(buffer.value)
        elif buffer.kind in ("input", "param"):
            number = program.numbers[b]
        shape = self.shapes.add([self._expression(s) for s in buffer.shape])
        offset = self._expression(buffer.offset) if buffer.alias >= 0 else 0
        kind, dtype = _KINDS[buffer.kind], dtype_number(buffer.dtype)
        fields = (kind, dtype, program.itemsizes[b], len(buffer.shape), shape, buffer.alias, offset, number, data)
        return "{" + ", ".join(map(str, fields)) + "}"

    def _step(self, step) -> str:
        operands = len(self.operands)
        self.operands.extend(step.operands)
        sizes = self.sizes.add([self._expression(s) for s in step.sizes])
        inplace = self.inplace.add([number for pair in step.inplace for number in pair])
        numbers = [operands, len(step.operands), step.outputs, sizes, len(step.sizes), inplace, len(step.inplace)]
        numbers.append(step.grain)
        numbers += [self._expression(s) for s in (step.extent, step.scratch_bytes, step.flops, step.bytes)]
        return f"{{{self.symbol(step.kernel)}, {', '.join(map(str, numbers))}}}"


def _rows(kind: str, name: str, rows: Sequence[str]) -> str:
    body = ",\n    ".join(rows or ["{0}"])
    return f"static const {kind} {name}[] = {{\n    {body}}};"


def _numbers(kind: str, name: str, values: Sequence[int]) -> str:
    items = [str(int(v)) for v in values] or ["0"]
    lines = [", ".join(items[i : i + 16]) for i in range(0, len(items), 16)]
    body = ",\n    ".join(lines)
    return f"static const {kind} {name}[] = {{\n    {body}}};"
