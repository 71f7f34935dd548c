"""KernelSource: writes the source of a CUDA kernel, a Python function that numba-cuda compiles and its simulator runs.

    k = KernelSource("scale", target)
    x, out = k.operand("float32"), k.operand("float32")
    n = k.size()
    with k.grid_stride(n) as i:
        k.store(out, i, k.emit(expression, [k.load(x, i)])[0])
    return k.text()

An operand is a flat buffer indexed by element; data values are in compute form (float16 and bfloat16 are float32, bool
is bool), memory holds what `MEMORY_DTYPES` says. Every index is of one type: uint32 where all buffers are smaller than
2**31 elements, else int64. Numba widens the result of every integer operation to 64 bits: what is to be narrow is cast.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from kgraph.codegen import expressions
from kgraph.codegen.cuda import scalar_ops
from kgraph.codegen.expressions import compute_dtype

MEMORY_DTYPES = {"bool": "uint8", "float16": "uint16", "bfloat16": "uint16"}
INDENT = "    "
_PARAMETERS = ("p", "n", "size")  # and a number
_WORD = re.compile(r"[A-Za-z_]\w*")
_LITERAL = re.compile(r"\w+\(-?(?:inf|nan|\d[\w.+-]*)\)")


class Operand(NamedTuple):
    """A buffer among the kernel's parameters."""

    name: str
    dtype: str


class KernelSource:
    """The text of one kernel while it is written.

    name: the function's; index: type of indices, "uint32" or "int64"; block: threads of a block, which the launch has
    to use too. Methods give texts: names of variables, or expressions in parentheses.
    """

    def __init__(self, name: str, target, block: int, index: str = "uint32"):
        # A suffix, since `exp` and the like are names of functions that kernels call.
        self.name = re.sub(r"\W", "_", name) + "_kernel"
        self.target, self.block, self.index = target, block, index
        self._parameters: list[tuple[str, str]] = []
        self._head: list[str] = []
        self._lines: list[str] = []
        self._depth = 1
        self._counter = 0

    # -- parameters ---------------------------------------------------------------------------------------------------
    def operand(self, dtype: str) -> Operand:
        """The next buffer; all buffers come before all sizes."""
        name = f"p{len(self._parameters)}"
        self._parameters.append((name, f"{MEMORY_DTYPES.get(dtype, dtype)}*"))
        return Operand(name, dtype)

    def size(self) -> str:
        """The next run-time integer, of the index type."""
        number = sum(kind == "int64" for _, kind in self._parameters)
        self._parameters.append((f"size{number}", "int64"))
        self._head.append(f"n{number} = {self.index}(size{number})")
        return f"n{number}"

    # -- statements ---------------------------------------------------------------------------------------------------
    def line(self, text: str = "") -> None:
        """One line at the current depth."""
        self._lines.append(INDENT * self._depth + text if text else "")

    @contextmanager
    def suite(self, header: str) -> Iterator[None]:
        """The lines inside of `while ...:`, `if ...:` and the like."""
        self.line(header)
        self._depth += 1
        yield
        self._depth -= 1

    def fresh(self, prefix: str = "v") -> str:
        """A name that is not in use. Raises ValueError for a prefix of the parameters' names."""
        if prefix in _PARAMETERS:
            raise ValueError(f"names of parameters begin with {prefix!r}")
        self._counter += 1
        return f"{prefix}{self._counter}"

    def let(self, text: str, prefix: str = "v") -> str:
        """A new variable with this value. Names and literals are given back as they are."""
        if _WORD.fullmatch(text) or _is_literal(text):
            return text
        name = self.fresh(prefix)
        self.line(f"{name} = {text}")
        return name

    # -- indices ------------------------------------------------------------------------------------------------------
    def i(self, x) -> str:
        """An expression (or a Python int) cast to the index type."""
        return x if _is_call(str(x), self.index) else f"{self.index}({x})"

    def _binary(self, x, symbol: str, y) -> str:
        x, y = (self.i(v) if isinstance(v, int) else v for v in (x, y))
        return self.i(f"{x} {symbol} {y}")

    def add(self, x, y) -> str:
        """The sum of two indices (texts or Python ints); likewise those below."""
        return self._binary(x, "+", y)

    def sub(self, x, y) -> str:
        return self._binary(x, "-", y)

    def mul(self, x, y) -> str:
        return self._binary(x, "*", y)

    def div(self, x, y) -> str:
        return self._binary(x, "//", y)

    def mod(self, x, y) -> str:
        return self._binary(x, "%", y)

    def ceil_div(self, x, y) -> str:
        return self.div(self.add(x, self.sub(y, 1)), y)

    def product(self, sizes: Sequence) -> str:
        """The product of sizes; 1 of none."""
        return functools.reduce(self.mul, sizes) if sizes else self.i(1)

    def thread(self) -> str:
        """The number of the thread in its block, in a variable."""
        return self.let(self.i("cuda.threadIdx.x"), "t")

    def grid(self) -> tuple[str, str]:
        """The number of the thread in the grid, and how many threads that has."""
        first = self.add(self.mul(self.i("cuda.blockIdx.x"), self.block), self.i("cuda.threadIdx.x"))
        return first, self.mul(self.i("cuda.gridDim.x"), self.block)

    @contextmanager
    def grid_stride(self, extent: str) -> Iterator[str]:
        """A loop in which all threads of the grid share the numbers [0, extent); gives the number's name."""
        first, count = self.grid()
        with self.range(first, extent, self.let(count, "step")) as i:
            yield i

    @contextmanager
    def block_stride(self, extent: str) -> Iterator[str]:
        """A loop in which the blocks of the grid share the numbers [0, extent): all threads of a block see the same."""
        with self.range(self.i("cuda.blockIdx.x"), extent, self.i("cuda.gridDim.x")) as i:
            yield i

    @contextmanager
    def range(self, start, stop: str, step) -> Iterator[str]:
        """A loop over start, start + step ... below stop; gives the number's name."""
        i = self.fresh("i")
        self.line(f"{i} = {self.i(start)}")
        with self.suite(f"while {i} < {stop}:"):
            yield i
            self.line(f"{i} = {self.add(i, step)}")

    def for_each(self, start, stop: str, step, body: Callable[[list[str]], None], unroll: int = 1) -> None:
        """A loop over start, start + step ... below stop, of which `body` takes `unroll` numbers at once, or one of the
        last: it gets their names, and should read for all of them before it computes."""
        i, step = self.fresh("i"), self.let(self.i(step), "step")
        self.line(f"{i} = {self.i(start)}")
        for count in dict.fromkeys((unroll, 1)):
            last = self.add(i, self.mul(step, count - 1)) if count > 1 else i
            with self.suite(f"while {last} < {stop}:"):
                numbers = [i]
                for _ in range(count - 1):
                    numbers.append(self.let(self.add(numbers[-1], step), "i"))
                body(numbers)
                self.line(f"{i} = {self.add(numbers[-1], step)}")

    def coordinates(self, number: str, sizes: Sequence[str]) -> list[str]:
        """Indices along dense axes of `sizes` of the element `number`."""
        out: list[str] = []
        rest = number
        for axis in reversed(range(len(sizes))):
            if axis == 0:
                out.append(rest)
            else:
                out.append(self.let(self.mod(rest, sizes[axis]), "c"))
                rest = self.let(self.div(rest, sizes[axis]), "c")
        return out[::-1]

    def offset(self, coordinates: Sequence[str], sizes: Sequence[str], spans: Sequence[bool]) -> str:
        """The element at `coordinates` of a dense operand that extends over those of the axes that are in `spans`."""
        out = ""
        for at, size, spanned in zip(coordinates, sizes, spans, strict=True):
            if spanned:
                out = self.add(self.mul(out, size), at) if out else at
        return out or self.i(0)

    # -- memory -------------------------------------------------------------------------------------------------------
    def load(self, operand: Operand, index: str) -> str:
        """An element in compute form, in a variable."""
        return self.let(scalar_ops.from_memory(f"{operand.name}[{index}]", operand.dtype), "x")

    def load_group(self, operand: Operand, index: str, count: int, aligned: str = "") -> list[str]:
        """`count` neighbours in compute form (1, 2 or 4), in variables, read as one word; of a buffer if `aligned`, a
        variable of `aligned()`, says so, of a shared array always: its index is a multiple of `count`."""
        if count == 1:
            return [self.load(operand, index)]
        names = [self.fresh("x") for _ in range(count)]
        given = f"_if({aligned}, " if aligned else "("
        self.line(f"{', '.join(names)} = load{count}{given}{operand.name}, {index})")
        return [self.let(scalar_ops.from_memory(name, operand.dtype)) for name in names]

    def store_group(self, shared: Operand, index: str, values: Sequence[str]) -> None:
        """Write neighbours of a shared array as one word: the index is a multiple of their number."""
        if len(values) == 1:
            self.store(shared, index, values[0])
        else:
            self.line(f"store_group({shared.name}, {index}, ({', '.join(values)}))")

    def aligned(self, operand: Operand) -> str:
        """A variable that says whether a buffer is aligned to whatever word a group of its elements may be."""
        return self.let(f"is_aligned({operand.name})", "aligned")

    def store(self, operand: Operand, index: str, value: str) -> None:
        """Write a value in compute form; floats are rounded to nearest even."""
        self.line(f"{operand.name}[{index}] = {scalar_ops.to_memory(value, operand.dtype)}")

    def shared(self, dtype: str, count: int, grouped: bool = False) -> Operand:
        """An array of the block's own, for values in compute form; bool is kept as uint8. grouped: for `load_group`."""
        kept = compute_dtype(dtype)
        name = self.fresh("shared")
        alignment = ", 16" if grouped and not self.target.simulator else ""
        # Numba's simulator tells arrays apart by the line that makes them: each has its own.
        self._head.append(f"{name} = cuda.shared.array({count}, {MEMORY_DTYPES.get(kept, kept)}{alignment})")
        return Operand(name, kept)

    def local(self, dtype: str, count: int) -> Operand:
        """An array of the thread's own, for values in compute form. It is in registers where every index is known once
        loops are unrolled."""
        kept = compute_dtype(dtype)
        name = self.fresh("local")
        self._head.append(f"{name} = cuda.local.array({count}, {MEMORY_DTYPES.get(kept, kept)})")
        return Operand(name, kept)

    def synchronise(self) -> None:
        """All threads of the block meet; every one of them has to come here."""
        self.line("cuda.syncthreads()")

    def synchronise_warp(self) -> None:
        """All threads of a warp meet, in the simulator those of the block."""
        self.line("cuda.syncthreads()" if self.target.simulator else "cuda.syncwarp()")

    # -- data values --------------------------------------------------------------------------------------------------
    def literal(self, value, dtype: str) -> str:
        """A constant in compute form."""
        return scalar_ops.literal(value, dtype)

    def emit(self, expression: tuple, inputs: Sequence[str]) -> list[str]:
        """Code of an expression of `kgraph.codegen.expressions` on values in compute form; gives its outputs."""
        if len(inputs) != len(expression[0]):
            raise ValueError(f"the expression has {len(expression[0])} inputs, got {len(inputs)} values")
        values = list(inputs)
        dtypes = expressions.dtypes_of(expression)
        for op, operands, attrs, dtype in expression[1]:
            if op == "constant":
                values.append(self.literal(attrs[0][1], dtype))
            else:
                text = scalar_ops.form(
                    self, op, [values[o] for o in operands], [dtypes[o] for o in operands], dtype, attrs
                )
                values.append(self.let(text))
        return [values[o] for o in expression[2]]

    # -- the whole ----------------------------------------------------------------------------------------------------
    def text(self) -> str:
        """The module: imports, BLOCK, and the kernel, whose annotations say what its parameters are."""
        body = [INDENT + line for line in self._head] + (self._lines or [INDENT + "pass"])
        parameters = ", ".join(f'{name}: "{kind}"' for name, kind in self._parameters)
        return module_text(self.name, parameters, body, self.block)


def module_text(name: str, parameters: str, body: Sequence[str], block: int) -> str:
    """The module around a kernel's lines (indented): it imports those of the device functions that they name."""
    words = set(_WORD.findall("\n".join(body)))
    names = sorted(words & device_names())
    imports = f"from kgraph.codegen.cuda.device_functions import {', '.join(names)}\n" if names else ""
    return (
        f"from numba import cuda\n{imports}\nBLOCK = {block}\n\n\ndef {name}({parameters}):\n" + "\n".join(body) + "\n"
    )


@functools.cache
def device_names() -> frozenset[str]:
    """The names that kernels may use without importing them, read off the source: Numba is not loaded for that."""
    path = Path(__file__).with_name("device_functions.py")
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            targets = node.targets[0].elts if isinstance(node.targets[0], ast.Tuple) else node.targets
            names.update(t.id for t in targets if isinstance(t, ast.Name) and t.id.islower())
    return frozenset(names | scalar_ops.LIBRARY)


def _is_call(text: str, name: str) -> bool:
    """Whether the whole text is one call of `name`."""
    if not text.startswith(name + "(") or not text.endswith(")"):
        return False
    depth = 0
    for character in text[len(name) : -1]:
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0:
            return False
    return True


def _is_literal(text: str) -> bool:
    return _LITERAL.fullmatch(text) is not None


def index_type(sizes: Sequence) -> str:
    """The index type for buffers of these numbers of elements (`int | Dim`).

    Symbolic ones count as small: the runtime refuses to bind sizes that do not fit.
    """
    return "int64" if any(isinstance(s, int) and s >= 1 << 31 for s in sizes) else "uint32"


__all__ = ["KernelSource", "Operand", "device_names", "index_type", "module_text"]
