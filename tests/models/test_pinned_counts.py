"""Counts of the benchmark models: kernels, host steps, bytes of the arena. They need no clock and move only on purpose.

A count may go down freely (then lower the pin); going up is a regression of fusion, layout or buffer planning.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import kgraph

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import models as benchmark_models

PINS = json.loads(Path(__file__).with_name("pinned_counts.json").read_text())


def counts(name: str) -> dict[str, int]:
    compiled = kgraph.compile(benchmark_models.build(name))
    batch = 4
    compiled(benchmark_models.example_inputs(name, batch))
    stats = compiled.stats()
    return {
        "steps": stats["native_steps"],
        "host_steps": stats["host_steps"],
        "distinct_kernels": stats["kernels"],
        "arena_bytes_at_batch_4": stats["arena_bytes"],
        "compiles": stats["compiles"],
    }


@pytest.mark.parametrize("name", sorted(PINS))
def test_counts_do_not_grow(name):
    now = counts(name)
    grown = {key: (now[key], pin) for key, pin in PINS[name].items() if now[key] > pin}
    assert not grown, f"{name}: (now, pinned) {grown}"


if __name__ == "__main__":
    chosen = sys.argv[1:] or sorted(PINS)
    PINS.update({name: counts(name) for name in chosen})
    Path(__file__).with_name("pinned_counts.json").write_text(json.dumps(PINS, indent=1, sort_keys=True) + "\n")
