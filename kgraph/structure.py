"""The nesting of a model's inputs or outputs: tuples, lists and dicts with tensors at the leaves.

Knows neither Keras nor any tensor library, and converts to and from JSON, so that a saved model keeps it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kgraph import dims
from kgraph.errors import InputError
from kgraph.types import SHORT_NAMES, TensorType


class Structure:
    """A template with numbered leaves, and each leaf's name and type.

    template: nested tuples, lists and dicts; a leaf is `Leaf(i)`, anything else stands for itself (None, strings).
    names, types: one per leaf, in the order of the leaves' numbers.
    call: the template is `(args, kwargs)` of a call rather than one value.
    """

    def __init__(self, template, names: Sequence[str], types: Sequence[TensorType], call: bool = False):
        self.template, self.call = template, call
        self.names, self.types = list(names), list(types)
        value = self._value_template()
        self.is_leaf = isinstance(value, Leaf)

    @staticmethod
    def of(value, is_leaf, describe, call: bool = False) -> tuple[Structure, list]:
        """The structure of a nested value, and its leaves.

        is_leaf: tells leaves from what stands for itself. describe: `(leaf, path) -> (name, type)`.
        """
        leaves, paths = [], []

        def number(x, path):
            if isinstance(x, dict):
                # Leaves are numbered by sorted keys, as Keras flattens; the dict keeps its own order.
                parts = {k: number(x[k], (*path, k)) for k in sorted(x, key=str)}
                return {k: parts[k] for k in x}
            if isinstance(x, (tuple, list)):
                items = [number(v, (*path, i)) for i, v in enumerate(x)]
                return _sequence_like(x, items)
            if is_leaf(x):
                leaves.append(x)
                paths.append(path)
                return Leaf(len(leaves) - 1)
            return x

        template = number(value, ())
        described = [describe(leaf, path) for leaf, path in zip(leaves, paths)]
        return Structure(template, [n for n, _ in described], [t for _, t in described], call), leaves

    def _value_template(self):
        """The template of the one argument of a call, or of the value itself; all of `(args, kwargs)` otherwise."""
        if not self.call:
            return self.template
        args, kwargs = self.template
        return args[0] if len(args) == 1 and not kwargs else self.template

    @property
    def num_leaves(self) -> int:
        """How many tensors there are."""
        return len(self.types)

    # -- values ---------------------------------------------------------------------------------------------------
    def flatten(self, value) -> list:
        """The leaves of a value of this structure, in order. Raises InputError naming the place that does not fit."""
        return self._flatten(self._value_template(), value)

    def flatten_call(self, args: tuple, kwargs: dict) -> list:
        """The leaves of a call's arguments, in order. Raises InputError naming the place that does not fit."""
        if not self.call:
            return self._flatten((self.template,), args)
        template_args, template_kwargs = self.template
        kwargs = {name: v for name, v in kwargs.items() if v is not None or name in template_kwargs}
        if len(template_args) == 1 and not template_kwargs:
            if len(args) == 1 and not kwargs:
                return self._flatten(template_args[0], args[0])
            if kwargs:
                raise InputError(f"unexpected keyword arguments {sorted(kwargs)}; the inputs are {self._listing()}")
        elif set(kwargs) != set(template_kwargs) and len(args) <= len(template_args):
            raise InputError(f"expected the keyword arguments {sorted(template_kwargs)}, got {sorted(kwargs)}")
        return self._flatten(self.template, (tuple(args), dict(kwargs)))

    def _listing(self, template=None) -> str:
        """The names of the leaves below a part of the template, for messages."""
        leaves = _leaves(self.template if template is None else template)
        return ", ".join(repr(self.names[x.index]) for x in leaves if isinstance(x, Leaf))

    def _flatten(self, template, value) -> list:
        out: list = [None] * self.num_leaves
        try:
            self._match(template, value, out, "inputs")
        except InputError as error:
            loose = self._by_name_or_order(template, value)
            if loose is None:
                raise error from None
            return loose
        return out

    def _by_name_or_order(self, template, value) -> list | None:
        """Keras' Functional models also take a dict by input names, or another nesting of as many leaves."""
        if isinstance(value, dict):
            known = self.num_leaves and not isinstance(template, dict) and set(self.names) <= set(value)
            return [value[name] for name in self.names] if known else None
        leaves = _leaves(value)
        # By order only where it is not in doubt: keys are told apart by name.
        if len(leaves) == self.num_leaves and isinstance(value, (list, tuple)) and not _has_dict(value):
            return leaves if _in_order(template) else None
        return None

    def _match(self, template, value, out: list, path: str) -> None:
        if isinstance(template, Leaf):
            nested = isinstance(value, (list, tuple)) and any(hasattr(v, "shape") for v in value)
            if isinstance(value, dict) or nested:
                got = f"a {type(value).__name__} of {len(value)}"
                raise InputError(f"{path}: expected one tensor for input {self.names[template.index]!r}, got {got}")
            out[template.index] = value
        elif isinstance(template, dict):
            if not isinstance(value, dict) or set(value) != set(template):
                got = f"the keys {sorted(map(str, value))}" if isinstance(value, dict) else f"a {type(value).__name__}"
                raise InputError(f"{path}: expected a dict with keys {sorted(map(str, template))}, got {got}")
            for key, part in template.items():
                self._match(part, value[key], out, f"{path}[{key!r}]")
        elif isinstance(template, (tuple, list)):
            if not isinstance(value, (tuple, list)) or len(value) != len(template):
                several = isinstance(value, (tuple, list, dict))
                got = f"{len(value)} in a {type(value).__name__}" if several else f"one {type(value).__name__}"
                what = f"{len(template)} value" + "s" * (len(template) != 1)
                raise InputError(f"{path}: expected {what} ({self._listing(template)}), got {got}")
            for i, (part, item) in enumerate(zip(template, value)):
                self._match(part, item, out, f"{path}[{i}]")

    def pack(self, leaves: Sequence):
        """A value of this structure; for a call of one argument, that argument."""
        return _fill(self._value_template(), leaves)

    def pack_call(self, leaves: Sequence) -> tuple[tuple, dict]:
        """(args, kwargs) of a call with these leaves."""
        if not self.call:
            return (_fill(self.template, leaves),), {}
        args, kwargs = self.template
        return tuple(_fill(a, leaves) for a in args), {k: _fill(v, leaves) for k, v in kwargs.items()}

    # -- JSON -----------------------------------------------------------------------------------------------------
    def to_json(self) -> dict:
        """A JSON value that `from_json` reads back; named tuples become plain ones."""
        types = [[[dims.to_json(s) for s in t.shape], t.dtype] for t in self.types]
        return {"template": _encode(self.template), "names": self.names, "types": types, "call": self.call}

    @staticmethod
    def from_json(data: dict) -> Structure:
        """The structure that `to_json` wrote. Raises ValueError for anything else: it may come from a damaged file."""
        try:
            types = [TensorType(tuple([dims.from_json(s) for s in shape]), dtype) for shape, dtype in data["types"]]
            names, call = data["names"], data["call"]
            leaves: list[int] = []
            template = _decode(data["template"], leaves)
        except (LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"no nested structure: {error!r}") from None
        if type(call) is not bool or len(names) != len(types) or not all(type(name) is str for name in names):
            raise ValueError("no nested structure: names and types do not match")
        if any(t.dtype not in SHORT_NAMES for t in types) or sorted(leaves) != list(range(len(types))):
            raise ValueError("no nested structure: leaves and types do not match")
        if call and not (type(template) is tuple and list(map(type, template)) == [tuple, dict]):
            raise ValueError("no nested structure: a call has positional and keyword arguments")
        return Structure(template, names, types, call)

    def __repr__(self):
        leaves = [f"{name}: {type_}" for name, type_ in zip(self.names, self.types)]
        return f"Structure({_fill(self._value_template(), leaves)})"


class Leaf:
    """The place of a tensor in a template."""

    __slots__ = ("index",)

    def __init__(self, index: int):
        self.index = index

    def __repr__(self):
        return f"Leaf({self.index})"

    def __eq__(self, other):
        return isinstance(other, Leaf) and other.index == self.index

    def __hash__(self):
        return hash(("Leaf", self.index))


def _sequence_like(x, items: list):
    if isinstance(x, tuple):
        return type(x)(*items) if hasattr(x, "_fields") else tuple(items)
    return items


def _fill(template, leaves: Sequence):
    if isinstance(template, Leaf):
        return leaves[template.index]
    if isinstance(template, dict):
        return {k: _fill(v, leaves) for k, v in template.items()}
    if isinstance(template, (tuple, list)):
        return _sequence_like(template, [_fill(v, leaves) for v in template])
    return template


def _leaves(value) -> list:
    if isinstance(value, dict):
        return [leaf for key in sorted(value, key=str) for leaf in _leaves(value[key])]
    if isinstance(value, (tuple, list)):
        return [leaf for item in value for leaf in _leaves(item)]
    return [] if value is None else [value]


def _has_dict(value) -> bool:
    if isinstance(value, dict):
        return bool(value)
    return isinstance(value, (list, tuple)) and any(map(_has_dict, value))


def _in_order(template) -> bool:
    """Whether the keys of every dict are sorted, so that the order of the leaves is the one they are written in."""
    if isinstance(template, dict):
        return list(template) == sorted(template, key=str) and all(map(_in_order, template.values()))
    return not isinstance(template, (list, tuple)) or all(map(_in_order, template))


def _encode(template) -> Any:
    if isinstance(template, Leaf):
        return {"leaf": template.index}
    if isinstance(template, dict):
        return {"dict": [[k, _encode(v)] for k, v in template.items()]}
    if isinstance(template, tuple):
        return {"tuple": [_encode(v) for v in template]}
    if isinstance(template, list):
        return {"list": [_encode(v) for v in template]}
    if template is None or isinstance(template, (bool, int, float, str)):
        return {"value": template}
    raise TypeError(f"a {type(template).__name__} in a model's inputs or outputs cannot be saved")


def _decode(data: dict, leaves: list[int]):
    """The template; appends the numbers of its leaves to `leaves`."""
    kind: str | None
    content: Any
    ((kind, content),) = data.items() if type(data) is dict and len(data) == 1 else ((None, None),)
    if kind == "leaf" and type(content) is int:
        leaves.append(content)
        return Leaf(content)
    if kind == "dict":
        return {k: _decode(v, leaves) for k, v in content}
    if kind == "tuple":
        return tuple([_decode(v, leaves) for v in content])
    if kind == "list":
        return [_decode(v, leaves) for v in content]
    if kind == "value" and (content is None or isinstance(content, (bool, int, float, str))):
        return content
    raise ValueError(f"no part of a nested structure: {kind!r}")
