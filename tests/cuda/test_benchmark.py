"""The command for machines with a GPU (`benchmarks.gpu`), tried in the simulator: every part of it, on little data."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMITS = ("copy_gbs", "relu_gbs", "gelu_gbs", "layer_norm_gbs", "rms_norm_gbs", "softmax_gbs", "us_per_step")


def test_the_command_measures_all_that_it_promises(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cuda-simulator", "--output", str(tmp_path / "gpu")]
    command += "--cases tiny_mlp --batch 2 --rounds 1 --seconds 0 --megabytes 0.001 --tests 300 --limit 300".split()
    command += ["--only", "reference[relu] or interpreter[sequential_mlp] or cpu[dense]"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr
    tests, limits, *cases = json.loads((tmp_path / "gpu.json").read_text())["results"]
    assert not tests["tests"]["failed"]
    assert tests["tests"]["summary"].startswith("3 passed"), tests
    assert all(math.isfinite(limits["limits"][name]) and limits["limits"][name] > 0 for name in LIMITS), limits
    assert [case["case"] for case in cases] == ["infer tiny_mlp@2", "train tiny_mlp@2"]
    for case in cases:
        (engine,) = case["engines"].values()
        assert "error" not in engine
        assert engine["median_ms"] > 0
    assert cases[0]["engines"]["kgraph-gpu"]["host_steps"] == 0
    text = (tmp_path / "gpu.md").read_text()
    assert "infer tiny_mlp@2" in text
    assert "3 passed" in text
