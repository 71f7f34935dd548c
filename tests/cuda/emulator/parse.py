"""Reads PTX: functions as basic blocks of instructions, and the variables of a module."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

# What ends a basic block: branches, and what threads do together.
ENDS = ("bra", "ret", "exit", "bar", "shfl", "mma")
_HEADER = re.compile(
    r"\.(entry|func)\s+(?:\((?P<results>[^)]*)\)\s*)?(?P<name>[\w$]+)\s*\((?P<parameters>[^)]*)\)(?P<directives>[^;{]*)([;{])"
)
_VARIABLE = re.compile(
    r"\.(?P<space>global|shared|const|local|param)\s+(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<kind>\w+)\s+(?P<name>[\w$]+)"
    r"(?:\[(?P<count>\d*)\])?(?:\s*=\s*\{(?P<content>[^}]*)\})?"
)

_STATEMENT = re.compile(r"\s*(?:(?P<label>[\w$]+):(?!:)|(?P<brace>[{}])|(?P<statement>[^;{}]*(?:\{[^}]*\}[^;{}]*)*;))")


def width_of(kind: str) -> int:
    """Bytes of a PTX type, such as `f32`."""
    return 1 if kind == "pred" else 2 if kind in ("bf16", "f16") else int(re.sub(r"\D", "", kind)) // 8


class Address(NamedTuple):
    """What stands in square brackets: a register or a variable, and bytes behind it."""

    base: str
    offset: int


class Instruction(NamedTuple):
    """guard: (register, whether it must be false) or None. operands: texts; a vector is a tuple of them. line: its
    text, for messages."""

    guard: tuple[str, bool] | None
    opcode: str
    operands: tuple
    line: str


@dataclass
class Block:
    """Instructions that run one after the other. target: number of the block that its branch leads to, -1 without one;
    else the next block follows."""

    instructions: list[Instruction] = field(default_factory=list)
    target: int = -1


@dataclass(frozen=True)
class Variable:
    """name, space ("global", "shared", "local", "param"), bytes, alignment, first content (of globals)."""

    name: str
    space: str
    nbytes: int
    align: int
    content: bytes = b""


@dataclass
class Function:
    """registers: type by name. parameters, results, locals: variables in their order."""

    name: str
    is_entry: bool
    parameters: list[Variable]
    results: list[Variable]
    registers: dict[str, str] = field(default_factory=dict)
    locals: list[Variable] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)


@dataclass
class Module:
    """functions and variables by name. threads: of a block at most, 0 where the text does not say."""

    functions: dict[str, Function] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)
    threads: int = 0

    @property
    def entry(self) -> Function:
        (entry,) = (f for f in self.functions.values() if f.is_entry)
        return entry


def parse(text: str) -> Module:
    """The module that PTX describes. Raises ValueError for what this reader does not know."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    module, rest, at = Module(), [], 0
    while (header := _HEADER.search(text, at)) is not None:
        rest.append(text[at : header.start()])
        at = header.end()
        if header[0].endswith("{"):
            end = _closing(text, at)
            function = Function(
                header["name"], header[1] == "entry", _variables(header["parameters"]), _variables(header["results"])
            )
            _Body(function).read(text[at:end])
            module.functions[function.name] = function
            threads = re.search(r"\.maxntid\s+(\d+)", header["directives"])
            module.threads = int(threads[1]) if threads else module.threads
            at = end + 1
    module.variables = {v.name: v for v in _variables("".join(rest) + text[at:])}
    return module


def _closing(text: str, at: int) -> int:
    """Where the brace closes that is open at `at`."""
    depth = 1
    for brace in re.compile(r"[{}]").finditer(text, at):
        depth += 1 if brace[0] == "{" else -1
        if not depth:
            return brace.start()
    raise ValueError("a brace is not closed")


def _variables(text: str | None) -> list[Variable]:
    return [_variable(match) for match in _VARIABLE.finditer(text or "")]


def _variable(match: re.Match) -> Variable:
    width = width_of(match["kind"])
    content = bytes(int(x) for x in match["content"].split(",")) if match["content"] else b""
    if content and width != 1:
        raise ValueError(f"the content of {match['name']} is not one of bytes")
    count = 1 if match["count"] is None else int(match["count"] or 0)
    return Variable(match["name"], match["space"], width * count, int(match["align"] or width), content)


class _Body:
    """Reads the body of a function, in which braces may hold names of their own."""

    def __init__(self, function: Function):
        self._function = function
        self._labels: dict[str, int] = {}
        self._scopes: list[dict[str, str]] = [{}]  # names as they are known outside, by those within
        self._count = 0
        function.blocks.append(Block())

    def read(self, text: str) -> None:
        blocks = self._function.blocks
        # Statements end with a semicolon, labels with a colon; braces of a vector stand within a statement.
        for match in _STATEMENT.finditer(text):
            if match["label"]:
                if blocks[-1].instructions:
                    blocks.append(Block())
                self._labels[match["label"]] = len(blocks) - 1
            elif match["brace"] == "{":
                self._scopes.append({})
            elif match["brace"] == "}":
                self._scopes.pop()
            else:
                self._statement(" ".join(match["statement"][:-1].split()))
        for block in blocks:
            for instruction in block.instructions[-1:]:
                if instruction.opcode.startswith("bra"):
                    block.target = self._labels[instruction.operands[0]]

    def _statement(self, line: str) -> None:
        if line.startswith(".reg"):
            _, kind, names = line.split(None, 2)
            for name in re.split(r"\s*,\s*", names):
                self._declare(kind[1:], name)
            return
        if line.startswith(".pragma"):
            return
        if line.startswith("."):
            (variable,) = _variables(line)
            variable = Variable(self._unique(variable.name), *list(variable.__dict__.values())[1:])
            self._function.locals.append(variable)
            return
        guard = None
        if line.startswith("@"):
            text, line = line[1:].split(None, 1)
            guard = self._name(text.lstrip("!")), text.startswith("!")
        opcode, _, rest = line.partition(" ")
        operands = tuple(self._operand(text) for text in _split(rest))
        blocks = self._function.blocks
        blocks[-1].instructions.append(Instruction(guard, opcode, operands, line))
        if opcode.split(".")[0] in ENDS:
            blocks.append(Block())

    def _declare(self, kind: str, name: str) -> None:
        numbered = re.fullmatch(r"([\w%$]+)<(\d+)>", name)
        if numbered:
            self._function.registers.update((f"{numbered[1]}{n}", kind) for n in range(int(numbered[2])))
        else:
            self._function.registers[self._unique(name)] = kind

    def _unique(self, name: str) -> str:
        if len(self._scopes) == 1:
            return name
        self._count += 1
        self._scopes[-1][name] = f"{name}@{self._count}"
        return self._scopes[-1][name]

    def _name(self, name: str) -> str:
        return next((scope[name] for scope in reversed(self._scopes) if name in scope), name)

    def _operand(self, text: str):
        if text[0] in "{(":
            return tuple(self._operand(x) for x in _split(text[1:-1]))
        if text[0] == "[":
            match = re.fullmatch(r"\[\s*([\w%$.]+)\s*(?:([+-])\s*(-?\w+)\s*)?\]", text)
            if match is None:
                raise ValueError(f"an address is not understood: {text}")
            name, sign, offset = match.groups()
            number = int(offset or "0", 0)
            return Address(self._name(name), -number if sign == "-" else number)
        return "|".join(map(self._name, text.split("|")))


def _split(text: str) -> list[str]:
    """Operands, which commas part that are not within braces."""
    return [part.strip() for part in re.split(r",(?![^{(]*[})])", text) if part.strip()]
