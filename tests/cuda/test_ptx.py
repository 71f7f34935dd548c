"""Kernels compile to PTX without a GPU, and `ptxas` (where it is installed) finds no spills in them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ARCHS = ("sm_75", "sm_80", "sm_90", "sm_100")
ROOT = Path(__file__).resolve().parents[2]


def table(path: Path, *arguments: str) -> dict[str, list[dict]]:
    """What `tests.cuda.ptx` writes, from a process without the simulator."""
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "0"}
    command = [sys.executable, "-m", "tests.cuda.ptx", str(path), *arguments]
    subprocess.run(command, check=True, cwd=ROOT, env=environment)
    return json.loads(path.read_text())


def check(rows: list[dict]) -> None:
    assert rows
    wrong = [row for row in rows if "error" in row or row.get("spill_stores") or row.get("spill_loads")]
    assert not wrong, wrong


def test_one_kernel_of_every_primitive(tmp_path):
    check(table(tmp_path / "table.json", "--first", "sm_90")["sm_90"])


@pytest.mark.long
@pytest.mark.parametrize("arch", ARCHS)
def test_all_kernels(tmp_path, arch):
    check(table(tmp_path / "table.json", arch)[arch])


@pytest.mark.long
@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_of_models(tmp_path, arch):
    check(table(tmp_path / "table.json", "--models", arch)[arch])
