"""Kernels whose threads share what they read need few instructions, as counted on the emulated GPU.

Limits are some percent above what there is. A GPU has time for about 7 instructions of a thread per byte of memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.cuda.test_ptx import ROOT

# Instructions per element of the result, of all launches.
LIMITS = {
    "depthwise 3x3": 38,
    "depthwise 3x3 by 2": 53,
    "depthwise 5x5": 67,
    "depthwise 3x3 of images dilated by 2": 21,
    "maximum of 3x3": 48,
    "maximum of 3x3 by 2": 68,
    "sum of 2x2 by 2": 33,
    "depthwise weights 3x3": 38,
    "nearest": 23,
    "bilinear": 42,
    "bicubic": 110,
}


@pytest.fixture(scope="module")
def counted(tmp_path_factory) -> dict[str, list[dict]]:
    """What `tests.cuda.instruction_counts` writes, from a process without the simulator."""
    path = tmp_path_factory.mktemp("counts") / "counts.json"
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "0", "KGRAPH_TEST_DEVICE": "cuda-emulator"}
    command = [sys.executable, "-m", "tests.cuda.instruction_counts", str(path)]
    subprocess.run(command, check=True, cwd=ROOT, env=environment)
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", LIMITS)
def test_instructions_per_element(counted, name):
    launches = counted[name]
    assert sum(launch["instructions"] for launch in launches) <= LIMITS[name], launches


def test_arrays_of_threads_are_in_registers(counted):
    assert set(counted) == set(LIMITS)
    assert not [name for name, launches in counted.items() if any(launch["local"] for launch in launches)]
