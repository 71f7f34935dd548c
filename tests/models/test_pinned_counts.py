"""Counts of the benchmark models: kernels, host steps, bytes of the arena. They need no clock and move only on purpose.

A count may go down freely (then lower the pin); going up is a regression of fusion, layout or buffer planning. Bytes of
the arena are pinned for each width of vectors that they have been counted with: temporaries are padded to whole ones.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import kgraph
from kgraph.codegen.target import host_target

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import models as benchmark_models

PINS = json.loads(Path(__file__).with_name("pinned_counts.json").read_text())
ARENA = f"arena_bytes_at_batch_4_with_{host_target().vector_bytes}_byte_vectors"


def counts(name: str) -> dict[str, int]:
    compiled = kgraph.compile(benchmark_models.build(name))
    batch = 4
    compiled(benchmark_models.example_inputs(name, batch))
    stats = compiled.stats()
    return {
        "steps": stats["native_steps"],
        "host_steps": stats["host_steps"],
        "distinct_kernels": stats["kernels"],
        ARENA: stats["arena_bytes"],
        "compiles": stats["compiles"],
    }


@pytest.mark.parametrize("name", sorted(PINS))
def test_counts_do_not_grow(name):
    now = counts(name)
    grown = {key: (now[key], pin) for key, pin in PINS[name].items() if key in now and now[key] > pin}
    assert not grown, f"{name}: (now, pinned) {grown}"


if __name__ == "__main__":
    chosen = sys.argv[1:] or sorted(PINS)
    PINS.update({name: PINS.get(name, {}) | counts(name) for name in chosen})
    Path(__file__).with_name("pinned_counts.json").write_text(json.dumps(PINS, indent=1, sort_keys=True) + "\n")
