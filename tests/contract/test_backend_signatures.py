"""Every public function of Keras' backend interface exists with Keras' own signature.

Keras' backends are read as source text, never imported: they import JAX, and kgraph stands in the NumPy one's place.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import inspect
import tomllib
from pathlib import Path

import pytest

import kgraph

MODULES = ("core", "numpy", "math", "linalg", "random", "nn", "image", "rnn")
KERAS = Path(importlib.util.find_spec("keras").submodule_search_locations[0])
BACKENDS = KERAS / "src" / "backend"
# May only shrink; a new gap needs a reason good enough to raise this number.
MOST_GAPS = 0
# The parameters of a function that only says that it is not implemented.
STUB = [("args", "varargs", None), ("kwargs", "kwargs", None)]


@functools.cache
def parsed(path: str) -> ast.Module:
    return ast.parse((BACKENDS / path).read_text())


def functions_of(backend: str, module: str) -> dict[str, ast.FunctionDef]:
    return {n.name: n for n in parsed(f"{backend}/{module}.py").body if isinstance(n, ast.FunctionDef)}


def public_functions(module: str) -> dict[str, ast.FunctionDef]:
    """The functions of a module of the interface; for `rnn`, which has helpers of its own, those it exports."""
    functions = functions_of("numpy", module)
    if module != "rnn":
        return {name: f for name, f in functions.items() if not name.startswith("_")}
    imports = [n for n in parsed("numpy/__init__.py").body if isinstance(n, ast.ImportFrom)]
    names = [a.name for n in imports if n.module == "keras.src.backend.numpy.rnn" for a in n.names]
    return {name: functions[name] for name in names}


def gaps() -> dict[str, str]:
    text = (Path(kgraph.__file__).parent / "gaps.toml").read_text()
    return {entry["function"]: entry["reason"] for entry in tomllib.loads(text).get("gap", [])}


def ours(module: str):
    return importlib.import_module(f"kgraph.frontend.keras_backend.{module}")


def keras_parameters(function: ast.FunctionDef) -> list[tuple[str, str, object]]:
    """(name, kind, default as source text or None) of each parameter in a definition."""
    a = function.args
    positional = [*a.posonlyargs, *a.args]
    defaults = [None] * (len(positional) - len(a.defaults)) + [ast.unparse(d) for d in a.defaults]
    out = [(p.arg, "positional", d) for p, d in zip(positional, defaults, strict=True)]
    if a.vararg:
        out.append((a.vararg.arg, "varargs", None))
    out += [(p.arg, "keyword", d and ast.unparse(d)) for p, d in zip(a.kwonlyargs, a.kw_defaults, strict=True)]
    if a.kwarg:
        out.append((a.kwarg.arg, "kwargs", None))
    return out


KINDS = {
    inspect.Parameter.POSITIONAL_ONLY: "positional",
    inspect.Parameter.POSITIONAL_OR_KEYWORD: "positional",
    inspect.Parameter.VAR_POSITIONAL: "varargs",
    inspect.Parameter.KEYWORD_ONLY: "keyword",
    inspect.Parameter.VAR_KEYWORD: "kwargs",
}


def own_parameters(function) -> list[tuple[str, str, object]]:
    empty = inspect.Parameter.empty
    return [
        (p.name, KINDS[p.kind], None if p.default is empty else repr(p.default))
        for p in inspect.signature(function).parameters.values()
    ]


FUNCTIONS = [(module, name) for module in MODULES for name in public_functions(module)]


@pytest.mark.parametrize("module", MODULES)
def test_every_function_exists(module):
    missing = [name for name in public_functions(module) if not callable(getattr(ours(module), name, None))]
    assert not missing


@pytest.mark.parametrize(("module", "name"), FUNCTIONS, ids=[f"{m}.{n}" for m, n in FUNCTIONS])
def test_signature_is_keras_own(module, name):
    expected = keras_parameters(public_functions(module)[name])
    own = own_parameters(getattr(ours(module), name))
    if own != expected and expected == STUB:
        # What the NumPy backend lacks has its true signature in the JAX one, unless that lacks it as well.
        expected = keras_parameters(functions_of("jax", module)[name])
    assert own == expected or expected == STUB


@pytest.mark.parametrize("module", MODULES)
def test_signatures_show_no_annotations(module):
    """Keras compares the signatures of its operations, which have none, with those of its backend."""
    for name in public_functions(module):
        if name not in vars(ours("rnn")):
            assert not getattr(getattr(ours(module), name), "__annotations__", {}), name


def test_gaps_name_functions_of_the_interface_and_give_reasons():
    for function, reason in gaps().items():
        module, name = function.split(".", 1)
        assert name in public_functions(module), function
        assert len(reason.split()) >= 3, f"{function}: the reason {reason!r} says nothing"


def test_gaps_do_not_grow():
    assert len(gaps()) <= MOST_GAPS
