"""Runs Keras on JAX in its own process and judges kgraph's error against JAX's own, both against float64."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
# The interpreter of an environment with keras and jax; `python -m benchmarks.environments jax` makes it.
JAX_PYTHON = Path(os.environ.get("KGRAPH_JAX_PYTHON", ROOT / ".bench" / "jax" / "bin" / "python"))
FOLDER = Path(os.environ.get("KGRAPH_ORACLE_DIR", ROOT / ".bench" / "oracle"))
UNIT_ROUNDOFF = 2.0**-24  # of float32


def ensure_outputs(names: Sequence[str]) -> None:
    """Have JAX compute what is missing, in both precisions."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("KGRAPH_", "PYTHON", "VIRTUAL_ENV"))}
    environment.update(KERAS_BACKEND="jax", PYTHONDONTWRITEBYTECODE="1")
    for precision in ("float32", "float64"):
        missing = [n for n in names if not (FOLDER / f"{n}.{precision}.npz").exists()]
        if missing:
            command = [JAX_PYTHON, Path(__file__).with_name("jax_process.py"), precision, FOLDER, *missing]
            subprocess.run(command, env=environment, check=True, stdout=sys.stderr, stderr=subprocess.DEVNULL)


@dataclass
class Comparison:
    """Errors against float64 in the root of mean squares, relative to that of the output; the worst output counts.

    The largest single error of a small output is a matter of luck for either side; its mean square is not.
    """

    name: str
    kgraph_error: float
    jax_error: float
    floor: float

    @property
    def passed(self) -> bool:
        """Error at most twice JAX's own; the floor is one rounding of every value."""
        return self.kgraph_error <= max(2 * self.jax_error, self.floor)


def compare(name: str, leaves: Sequence[np.ndarray]) -> Comparison:
    """Judge the flat outputs of a model. Integer and bool outputs must be equal (their error is then 0, else inf)."""
    wide, narrow = (np.load(FOLDER / f"{name}.{p}.npz") for p in ("float64", "float32"))
    if len(leaves) != len(wide.files):
        raise AssertionError(f"{name}: {len(leaves)} outputs, JAX has {len(wide.files)}")
    worst = Comparison(name, 0.0, 0.0, 0.0)
    for key, leaf in zip(wide.files, leaves):
        reference, jax_value = wide[key], narrow[key]
        if leaf.shape != reference.shape:
            raise AssertionError(f"{name}: output {key} has shape {leaf.shape}, JAX's {reference.shape}")
        if reference.dtype.kind != "f":
            if not np.array_equal(leaf, jax_value):
                raise AssertionError(f"{name}: output {key} of dtype {leaf.dtype} differs from JAX's")
            continue
        if not reference.size:
            continue
        if not np.isfinite(reference).all() or not reference.any():
            raise AssertionError(f"{name}: the reference of output {key} is all zero or not finite; it shows nothing")
        scale = max(float(np.linalg.norm(reference)), 1e-30)
        ours = float(np.linalg.norm(leaf.astype("float64") - reference)) / scale
        theirs = float(np.linalg.norm(jax_value.astype("float64") - reference)) / scale
        floor = UNIT_ROUNDOFF
        candidate = Comparison(name, ours, theirs, floor)
        if ours / max(2 * theirs, floor) >= worst.kgraph_error / max(2 * worst.jax_error, worst.floor, 1e-300):
            worst = candidate
        if not np.isfinite(leaf).all() and np.isfinite(reference).all():
            raise AssertionError(f"{name}: output {key} has non-finite values")
    return worst
