"""Kernels compile to PTX without a GPU, and `ptxas` (where it is installed) finds next to no spills in them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ARCHS = ("sm_75", "sm_80", "sm_90", "sm_100")
SPILLS = ("spill_stores", "spill_loads")
FEW_BYTES = 16  # two words of every access: four of the kernels of models have as many, see benchmarks/results/ptx.md
ROOT = Path(__file__).resolve().parents[2]


def table(path: Path, *arguments: str) -> dict[str, list[dict]]:
    """What `tests.cuda.ptx` writes, from a process without the simulator."""
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "0"}
    command = [sys.executable, "-m", "tests.cuda.ptx", str(path), *arguments]
    subprocess.run(command, check=True, cwd=ROOT, env=environment)
    return json.loads(path.read_text())


def check(rows: list[dict]) -> None:
    assert rows
    wrong = [row for row in rows if "error" in row or max(row.get(name, 0) for name in SPILLS) > FEW_BYTES]
    assert not wrong, wrong


@pytest.mark.parametrize(
    "what",
    [
        pytest.param("--first", id="one sample of every primitive"),
        pytest.param("--models", id="models", marks=pytest.mark.long),
        pytest.param("--training", id="training steps", marks=pytest.mark.long),
        pytest.param("", id="all samples", marks=pytest.mark.long),
    ],
)
def test_kernels_compile_for_every_architecture(tmp_path, what):
    found = table(tmp_path / "table.json", *filter(None, [what]), *ARCHS)
    for arch in ARCHS:
        check(found[arch])
        if what in ("--first", ""):
            # Five families with seven kernels, in float16 and TF32; Turing has no products of the latter.
            assert sum(row["tensor"] > 0 for row in found[arch]) >= (7 if arch == "sm_75" else 14)
        # Loops are counted by Python; nothing else may run there.
        assert all("its body is compiled" in step for step in found.get(f"host steps {arch}", []))
