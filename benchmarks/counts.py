"""Counts of the compiled models of the benchmarks: what a model costs, measured without a clock.

    python -m benchmarks.counts [--write] [PATTERN ...]

For each case and instruction set: kernel calls and different kernels, host steps, floating-point operations, bytes
that kernels read and write, the arena, and the prepared weights. Nothing is compiled to machine code and nothing runs,
so that the numbers are the same on every machine. `--write` puts them into `results/counts.json`, which a test compares
with; so a change that makes a model worse shows, and one that makes it better has to be written down.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent))
import models

FILE = Path(__file__).parent / "results" / "counts.json"
LEVELS = ("x86-64-v3", "x86-64-v4")
FIELDS = ("calls", "kernels", "host_steps", "flops", "bytes", "arena_bytes", "weight_bytes")
_CACHES = {"l1_bytes": 32 << 10, "l2_bytes": 1 << 20, "l3_bytes": 32 << 20}


def target(level: str):
    """An instruction set, on caches that do not depend on this machine."""
    from kgraph.codegen.target import make_target

    return replace(make_target(level, foreign=True), **_CACHES)


class _Recorded(BaseException):
    """Carries the arguments of a compile out of a training step."""


def inference_graph(name: str) -> tuple:
    """(graph, passes, donations) of a model's call."""
    from kgraph.frontend.capture import capture

    return capture(models.MODELS[name]()).graph, "inference", ()


def training_graph(name: str) -> tuple:
    """The same for its step of `fit`, as the benchmark compiles the model."""
    import kgraph

    model = models.MODELS[name]()
    model.compile("adam", models.loss(name))
    x, y = models.training_data(name, model.output_shape[-1], 2)

    def record(graph, progress, passes, donations):
        raise _Recorded(graph, passes, donations)

    with mock.patch("kgraph.train_step.compile_graph", record):
        try:
            kgraph.compile_step(model, (x, y))
        except _Recorded as recorded:
            return recorded.args
    raise RuntimeError(f"{name}: no step was compiled")


def _value(sizes: dict[str, int], size) -> int:
    from kgraph.dims import Dim, evaluate

    return evaluate(size, sizes) if isinstance(size, Dim) else int(size)


def counts(recorded: tuple, batches: Sequence[int], level: str) -> dict[int, dict[str, int]]:
    """The counts of a graph at several batch sizes."""
    from kgraph.dims import Dim
    from kgraph.runtime.plan import HostStep, Program
    from kgraph.runtime.storage import place_buffers
    from kgraph.translation import translate

    graph, passes, donations = recorded
    entry, _ = translate(graph, passes, donations, target(level))
    specs = entry.lowered.all_specs()
    # Of another machine as far as the runtime is concerned: no code is loaded.
    program = entry.lowered.program(
        graph.name, dict.fromkeys(specs, b""), Program, executor=b"-", foreign=True, donations=donations
    )
    native = [step for step in program.steps if not isinstance(step, HostStep)]
    out = {}
    for batch in batches:
        sizes = {s: batch for v in graph.inputs for d in v.shape if isinstance(d, Dim) for s in d.symbols()}
        storage = place_buffers(program, functools.partial(_value, sizes))
        totals = {key: sum(_value(sizes, getattr(step, key)) for step in native) for key in ("flops", "bytes")}
        out[batch] = {
            "calls": len(native),
            "kernels": len(specs),
            "host_steps": len(program.steps) - len(native),
            **totals,
            "arena_bytes": storage.arena_bytes,
            "weight_bytes": sum(v.type.nbytes for v in entry.graphs.split.main.params),
        }
    return out


def cases() -> dict[str, list[models.Case]]:
    """The cases of all benchmarks by `kind/model`."""
    out: dict[str, list[models.Case]] = {}
    for case in (*models.CASES, *models.FURTHER_CASES, *models.TRAINING_CASES, *models.FURTHER_TRAINING_CASES):
        out.setdefault(f"{case.name}/{case.model}", []).append(case)
    return out


def measure(key: str) -> dict[str, dict[str, int]]:
    """All counts of one model, by `kind model@batch level`."""
    kind, _, name = key.partition("/")
    batches = [case.batch for case in cases()[key]]
    out = {}
    for level in LEVELS:
        recorded = (inference_graph if kind == "infer" else training_graph)(name)
        for batch, found in counts(recorded, batches, level).items():
            out[f"{kind} {name}@{batch} {level}"] = found
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", default=["*"], help="cases, such as `infer/resnet*`")
    parser.add_argument("--write", action="store_true", help=f"put the numbers into {FILE.name}")
    arguments = parser.parse_args()
    found: dict[str, dict[str, int]] = {}
    for key in cases():
        if any(fnmatch(key, pattern) for pattern in arguments.patterns):
            found |= measure(key)
    print(f"{'case':40}", *(f"{field:>14}" for field in FIELDS))
    for name, row in found.items():
        print(f"{name:40}", *(f"{row[field]:14d}" for field in FIELDS))
    if arguments.write:
        kept = json.loads(FILE.read_text()) if FILE.exists() else {}
        FILE.write_text(json.dumps(dict(sorted((kept | found).items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
