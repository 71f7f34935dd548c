"""The rooms of the project import one way."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "kgraph"
# room -> rooms of kgraph that it may import from
ALLOWED = {
    "ir": {"ir", "errors", "dims", "types"},
    "ops": {"ops", "ir", "errors"},
    "passes": {"passes", "ops", "ir", "errors", "decisions"},
    "codegen": {"codegen", "passes", "ops", "ir", "errors", "decisions", "disk_cache", "runtime"},
    "runtime": {"runtime", "errors", "decisions", "dims", "disk_cache", "report", "structure", "types"},
    "frontend": {"frontend", "ops", "ir", "errors", "structure"},
}
# What another room supplies when asked for, imported inside a function: the text of operations, and the kernel on which
# eager draws of many random words run.
LAZY = {("ir", "ops"), ("ops", "codegen")}
# Keras' own `predict` and `fit`, and KerasHub's `generate`, run on the public API, as a user's code would, and on
# compiled steps.
_TRAINER = "frontend/keras_backend/trainer.py"
EXCEPTIONS = {(_TRAINER, "kgraph.api"), (_TRAINER, "kgraph.gradients"), (_TRAINER, "kgraph.train_step")}
EXCEPTIONS.add(("frontend/keras_backend/generation.py", "kgraph.api"))


def imports_of(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            if node.module == "kgraph":
                yield from (f"kgraph.{alias.name}" for alias in node.names)
            else:
                yield node.module


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_rooms_import_one_way(room):
    wrong = []
    for path in sorted((PACKAGE / room).rglob("*.py")):
        for name in imports_of(path):
            parts = name.split(".")
            if parts[0] != "kgraph" or len(parts) < 2:
                continue
            if (str(path.relative_to(PACKAGE)), name) in EXCEPTIONS:
                continue
            if parts[1] not in ALLOWED[room] and (room, parts[1]) not in LAZY:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_no_other_framework_is_ever_imported():
    for path in sorted(PACKAGE.rglob("*.py")):
        for name in imports_of(path):
            assert name.split(".")[0] not in {"jax", "jaxlib", "tensorflow", "torch"}, f"{path} imports {name}"


def test_runtime_imports_neither_keras_nor_the_compiler():
    code = (
        "import sys\n"
        "import kgraph.runtime.plan\n"
        "bad = [m for m in ('keras', 'numba', 'llvmlite.ir', 'kgraph.passes', 'kgraph.codegen', 'kgraph.ops')"
        " if m in sys.modules]\n"
        "assert not bad, bad\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
