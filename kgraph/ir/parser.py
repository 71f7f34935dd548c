"""Reads the text form of graphs that `printer` writes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import NamedTuple, NoReturn

import numpy as np

from kgraph.errors import ArtifactError
from kgraph.ir.dims import Dim
from kgraph.ir.graph import Graph, Node, Value
from kgraph.ir.primitive import PRIMITIVES
from kgraph.ir.types import LONG_NAMES, TensorType, np_dtype

_TOKEN = re.compile(
    r"""(?P<space>\s+)
    | (?P<string>"(?:[^"\\]|\\.)*")
    | (?P<value>%[A-Za-z0-9_.]+)
    | (?P<number>\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)
    | (?P<name>[^\W\d]\w*)
    | (?P<symbol>//|[-+*(){}\[\],:=@])""",
    re.VERBOSE,
)
_LITERALS = {"True": True, "False": False, "None": None, "inf": float("inf"), "nan": float("nan")}


class _Token(NamedTuple):
    kind: str
    text: str
    line: int


def parse_graph(text: str, blobs: Mapping[str, np.ndarray] | None = None) -> Graph:
    """The graph that `print_graph` wrote.

    blobs: the large constants, as filled by `print_graph`. The primitives must be registered (import kgraph.ops).
    Types are taken from the text as they stand; `verify` checks them.
    Raises ArtifactError with the line number for text that is not a graph, or a constant that is missing.
    """
    parser = _Parser(text, blobs or {})
    graph = parser.graph()
    parser.expect("end")
    return graph


class _Parser:
    """Recursive descent: a method per construct, each leaving the position behind what it read."""

    def __init__(self, text: str, blobs: Mapping[str, np.ndarray]):
        self.blobs = blobs
        self.tokens = _tokenise(text)
        self.position = 0

    # -- tokens -----------------------------------------------------------------------------------------------------

    @property
    def token(self) -> _Token:
        return self.tokens[self.position]

    def fail(self, expected: str) -> NoReturn:
        found = self.token.text or "the end of the text"
        raise ArtifactError(f"graph text, line {self.token.line}: expected {expected}, found {found!r}")

    def at(self, text: str) -> bool:
        return self.token.text == text and self.token.kind != "string"

    def accept(self, text: str) -> bool:
        if self.at(text):
            self.position += 1
            return True
        return False

    def require(self, text: str) -> None:
        if not self.accept(text):
            self.fail(repr(text))

    def expect(self, kind: str) -> str:
        if self.token.kind != kind:
            self.fail(f"a {kind}" if kind != "end" else "the end")
        self.position += kind != "end"
        return self.tokens[self.position - (kind != "end")].text

    def sequence(self, item, close: str) -> list:
        """Items between commas up to `close`, which is read too."""
        out = []
        while not self.accept(close):
            out.append(item())
            if not self.at(close):
                self.require(",")
        return out

    # -- graphs -----------------------------------------------------------------------------------------------------

    def graph(self) -> Graph:
        self.require("graph")
        graph = Graph(name=json.loads(self.expect("string")))
        scope: dict[str, Value] = {}
        self.require("{")
        self.require("inputs")
        graph.inputs = self.declarations(scope)
        if self.accept("params"):
            graph.params = self.declarations(scope)
        while not self.accept("return"):
            graph.nodes.append(self.node(scope))
        self.require("(")
        graph.outputs = self.sequence(lambda: self.use(scope), ")")
        self.require("}")
        return graph

    def declarations(self, scope: dict[str, Value]) -> list[Value]:
        self.require("(")
        return [self.declare(scope, Value(type, name=name)) for name, type in self.sequence(self.typed, ")")]

    def declare(self, scope: dict[str, Value], value: Value) -> Value:
        if scope.setdefault(value.name, value) is not value:
            raise ArtifactError(f"graph text, line {self.token.line}: %{value.name} is defined twice")
        return value

    def typed(self) -> tuple[str, TensorType]:
        name = self.expect("value")[1:]
        self.require(":")
        return name, self.type()

    def use(self, scope: dict[str, Value]) -> Value:
        name = self.expect("value")[1:]
        if name not in scope:
            self.position -= 1
            self.fail("a value that is defined above")
        return scope[name]

    def node(self, scope: dict[str, Value]) -> Node:
        outputs = []
        if self.token.kind == "value":
            outputs.append(self.typed())
            while self.accept(","):
                outputs.append(self.typed())
            self.require("=")
        primitive = PRIMITIVES.get(self.token.text)
        if primitive is None:
            self.fail("the name of a primitive")
        self.position += 1
        self.require("(")
        inputs = self.sequence(lambda: self.use(scope), ")")
        attrs = dict(self.sequence(self.attribute, "}")) if self.accept("{") else {}
        provenance = set()
        if self.accept("@"):
            provenance.add(json.loads(self.expect("string")))
            while self.accept(","):
                provenance.add(json.loads(self.expect("string")))
        node = Node(primitive, inputs, attrs, [type for _, type in outputs], frozenset(provenance))
        for (name, _), value in zip(outputs, node.outputs, strict=True):
            value.name = name
            self.declare(scope, value)
        return node

    def type(self) -> TensorType:
        short = self.expect("name")
        if short not in LONG_NAMES:
            self.position -= 1
            self.fail("a dtype")
        self.require("[")
        return TensorType(tuple(self.sequence(self.expression, "]")), LONG_NAMES[short])

    # -- attributes -------------------------------------------------------------------------------------------------

    def attribute(self) -> tuple[str, object]:
        name = self.expect("name")
        self.require("=")
        return name, self.literal()

    def literal(self):
        """An attribute's value: a graph, an array, a string, or an expression of numbers, sizes and tuples."""
        if self.token.kind == "string":
            return json.loads(self.expect("string"))
        if self.at("graph"):
            return self.graph()
        if self.accept("array"):
            return self.array()
        if self.accept("blob"):
            return self.blob()
        return self.expression()

    def array(self) -> np.ndarray:
        self.require("(")
        type = self.type()
        self.require(",")
        self.require("[")
        numbers = self.sequence(self.expression, "]")
        self.require(")")
        # Through the widest kind, since not every narrow dtype converts from Python numbers.
        kind = type.np_dtype if type.dtype == "bool" or type.np_dtype.kind in "iu" else None
        wide = np.array(numbers, kind) if numbers else np.zeros(0)
        with np.errstate(all="ignore"):
            return wide.astype(np_dtype(type.dtype)).reshape(type.shape)

    def blob(self) -> np.ndarray:
        self.require("(")
        name = json.loads(self.expect("string"))
        self.require(")")
        if name not in self.blobs:
            raise ArtifactError(f"graph text, line {self.token.line}: the constant {name!r} is not among the blobs")
        return self.blobs[name]

    def expression(self):
        """Sums of products, as Dims print themselves."""
        total = self.product()
        while self.at("+") or self.at("-"):
            total = total + self.product() if self.accept("+") else total - self.negative()
        return total

    def negative(self):
        self.require("-")
        return self.product()

    def product(self):
        if self.accept("-"):
            return -self.product()
        out = self.atom()
        while self.at("*") or self.at("//"):
            out = out * self.atom() if self.accept("*") else out // self.divisor()
        return out

    def divisor(self):
        self.require("//")
        return self.atom()

    def atom(self):
        kind, text, _ = self.token
        if kind == "number":
            self.position += 1
            return int(text) if text.isdigit() else float(text)
        if kind == "string":
            return self.literal()
        if text == "complex" and kind == "name":
            self.position += 1
            self.require("(")
            return complex(*self.sequence(self.expression, ")"))
        if kind == "name" and text in ("graph", "array", "blob"):
            return self.literal()
        if kind == "name":
            self.position += 1
            return _LITERALS[text] if text in _LITERALS else Dim.symbol(text)
        if self.accept("("):
            return self.parenthesised()
        self.fail("a value")

    def parenthesised(self):
        """A tuple, or one expression in parentheses where no comma follows it."""
        items = []
        while not self.accept(")"):
            items.append(self.literal())
            if self.accept(")"):
                return items[0] if len(items) == 1 else tuple(items)
            self.require(",")
        return tuple(items)


def _tokenise(text: str) -> list[_Token]:
    tokens, position, line = [], 0, 1
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise ArtifactError(f"graph text, line {line}: unexpected character {text[position]!r}")
        kind = match.lastgroup or ""
        if kind != "space":
            tokens.append(_Token(kind, match.group(), line))
        line += match.group().count("\n")
        position = match.end()
    tokens.append(_Token("end", "", line))
    return tokens
