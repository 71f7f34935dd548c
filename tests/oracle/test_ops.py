"""Primitives whose semantics are those of Keras on JAX, against it."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.oracle import comparison
from tests.oracle.jax_process import FAST_COMPILE
from tests.oracle.ops_cases import CASES, flat

pytestmark = pytest.mark.skipif(
    not comparison.JAX_PYTHON.exists(), reason="no environment with JAX (see README, Tests)"
)
PROGRAM = Path(__file__).with_name("ops_cases.py")


@pytest.fixture(scope="module")
def jax_results():
    """JAX's results, computed once per text of the cases."""
    comparison.FOLDER.mkdir(parents=True, exist_ok=True)
    path = comparison.FOLDER / f"ops-{hashlib.sha256(PROGRAM.read_bytes()).hexdigest()[:16]}.npz"
    if not path.exists():
        partial = path.with_suffix(f".{os.getpid()}.npz")
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("KGRAPH_", "PYTHON", "VIRTUAL_ENV"))}
        environment.update(KERAS_BACKEND="jax", JAX_PLATFORMS="cpu", PYTHONDONTWRITEBYTECODE="1")
        environment.setdefault("XLA_FLAGS", FAST_COMPILE)
        subprocess.run([comparison.JAX_PYTHON, PROGRAM, partial], env=environment, check=True)
        partial.replace(path)
    return np.load(path)


@pytest.mark.parametrize("name", CASES)
def test_primitive_agrees_with_jax(name, jax_results):
    case, number = CASES[name], list(CASES).index(name)
    results = flat(case.ours(*case.inputs))
    expected = [jax_results[key] for key in jax_results.files if key.startswith(f"{number}.")]
    for ours, theirs in zip(results, expected, strict=True):
        assert ours.shape == theirs.shape
        scale = np.max(np.abs(theirs), initial=0.0)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * scale)
