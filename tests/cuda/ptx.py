"""Compiles kernels to PTX and counts their registers: `python -m tests.cuda.ptx OUTPUT [WHAT] ARCH...`.

No GPU is needed. It runs in a process in which Numba's simulator is off. OUTPUT gets JSON: by architecture a list of
kernels, each with its name, its products on tensor cores, and what `ptxas` says of it: registers, bytes of spills and
of the stack, static shared memory; under "host steps ARCH" those of the models, with reasons. Kernels are those of the
samples of all records that a CUDA family takes; with --first, of each record's first such sample, with --models and
--training those of the models and of the training steps of `tests.oracle`.

First all kernels are rendered, for all architectures; then as many processes as there are processors take source by
source, for the front end of which it does not matter for how many architectures it is compiled.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from kgraph import ops  # noqa: F401 - registers the primitives
from kgraph.codegen.cache import spec_key
from kgraph.codegen.compiler import compile_spec, render
from kgraph.codegen.cuda import compiler as cuda_compiler
from kgraph.codegen.cuda import families
from kgraph.codegen.cuda.target import CudaTarget, make_target
from kgraph.codegen.kernel import KernelSpec
from kgraph.errors import CompileError
from kgraph.ir import PRIMITIVES, Node, TensorType, Value, make_node

# Records whose kernels are compiled for float16 and TF32 too, which tensor cores multiply.
ON_TENSOR_CORES = ("dot_general", "conv", "conv_filter_gradient", "attention", "attention_gradient")
PROCESSES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
_NUMBERS = {
    "registers": r"Used (\d+) registers",
    "stack": r"(\d+) bytes stack frame",
    "spill_stores": r"(\d+) bytes spill stores",
    "spill_loads": r"(\d+) bytes spill loads",
    "shared": r"(\d+) bytes smem",
}


def target_of(arch: str) -> CudaTarget:
    """The target of an architecture's name, such as `sm_90`."""
    digits = arch.removeprefix("sm_")
    return make_target((int(digits[:-1]), int(digits[-1])))


class Kernel(NamedTuple):
    """owner: the record or the model that it was found in first."""

    owner: str
    spec: KernelSpec
    target: CudaTarget


def share_front_end() -> None:
    """From here on Numba types and lowers a source that is compiled for several targets one after the other once, which
    takes most of the time of a compile; NVVM makes PTX for each."""
    from numba.cuda import compiler as numba_compiler

    cuda_compiler.load = functools.lru_cache(1)(cuda_compiler.load)  # equal sources are one function
    lower = numba_compiler._compile_pyfunc_with_fixup
    kept: list = [None, None]  # a function, and what became of it

    def lower_once(function, *arguments, cc, **options):
        if kept[0] is not function:
            kept[:] = function, lower(function, *arguments, cc=cc, **options)
        return kept[1]

    numba_compiler._compile_pyfunc_with_fixup = lower_once


def record_kernels(archs: list[str], first: bool) -> Iterator[Kernel]:
    """The kernels of all samples of all records, or of the first of each that a family takes."""
    from tests.cuda.driver import make

    for name, record in PRIMITIVES.items():
        nodes = [make(record, sample) for sample in record.samples()]
        nodes = [node for node in nodes if families.accepts(node) is None]
        chosen = nodes[: 1 if first else None]
        half = [_in_float16(nodes[0])] if name in ON_TENSOR_CORES else []
        for target in map(target_of, archs):
            calls = [call for node in chosen + half for call in families.lower(node, target)]
            if half:
                calls += families.lower(nodes[0], replace(target, tf32=True))
            yield from (Kernel(name, call.spec, target) for call in calls)


def _in_float16(node: Node) -> Node:
    """A node on operands of float16."""
    return make_node(node.primitive, [Value(TensorType(v.shape, "float16")) for v in node.inputs], node.attrs)


def model_kernels(archs: list[str], training: bool, hosts: dict[str, list[str]]) -> Iterator[Kernel]:
    """The kernels of the models or the training steps of `tests.oracle`, with those of the bodies of loops, as they are
    asked for on a GPU, whose driver is played by Python. hosts: gets the host steps by architecture."""
    import kgraph
    from kgraph import compiler
    from kgraph.runtime.cuda import device
    from kgraph.runtime.cuda.gpu import Gpu
    from tests.cuda.fake_driver import ATTRIBUTES, FakeDriver
    from tests.oracle import small_models, training_models

    asked: list[tuple[KernelSpec, CudaTarget]] = []

    def note(specs: Iterable[KernelSpec], progress, target: CudaTarget) -> dict[str, bytes]:
        specs = list(specs)
        asked.extend((spec, target) for spec in specs)
        return {spec_key(spec, target): spec.name.encode() for spec in specs}

    compiler.compile_specs = note
    for name, make in (training_models if training else small_models).MODELS.items():
        for arch in archs:
            ATTRIBUTES[75], ATTRIBUTES[76] = target_of(arch).capability
            device._devices["cuda:0"] = Gpu(library=FakeDriver())
            kgraph.set_device("cuda")
            if training:
                task = make()
                task.model.compile("adam", loss=task.loss, metrics=task.metrics, **task.options)
                compiled = kgraph.compile_step(task.model, (task.x, task.y))._program().compiled
            else:
                model, inputs = make()
                compiled = kgraph.compile(model)._bind((inputs,), {})[0].compiled
            steps = [step for step in compiled.program.steps if not hasattr(step, "kernel")]
            hosts[arch] += [f"{name}: {step.label}: {step.reason}" for step in steps]
            yield from (Kernel(name, *pair) for pair in asked)
            asked.clear()


def assemble(ptx: bytes, arch: str) -> dict:
    """What `ptxas` says of a kernel; its error text under "error" if it refuses the PTX."""
    with tempfile.NamedTemporaryFile(suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = ["ptxas", "-v", f"-arch={arch}", file.name, "-o", "/dev/null"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": done.stderr}
    found = {name: re.search(pattern, done.stderr) for name, pattern in _NUMBERS.items()}
    return {name: int(match[1]) if match else 0 for name, match in found.items()}


def measure(kernels: list[Kernel]) -> list[dict]:
    """For each of the kernels, which have one source: name, products on tensor cores, and what `ptxas` says of it where
    there is one; "error" where a compiler refuses it."""
    rows = []
    for owner, spec, target in kernels:
        row = {"name": f"{owner}/{spec.name}/{spec_key(spec, target)}"}
        rows.append(row)
        try:
            ptx = compile_spec(spec, target)
        except CompileError as error:
            row["error"] = str(error)
            continue
        row["tensor"] = ptx.count(b"mma.sync")
        if shutil.which("ptxas"):
            row.update(assemble(ptx, target.arch))
    return rows


def tabulate(kernels: Iterable[Kernel], archs: list[str]) -> dict[str, list[dict]]:
    """The rows of all kernels by architecture, each kernel once, in the order of the kernels."""
    found: dict[str, Kernel] = {}
    for kernel in kernels:
        found.setdefault(spec_key(kernel.spec, kernel.target), kernel)
    sources: dict[str, list[Kernel]] = {}
    for kernel in found.values():
        sources.setdefault(render(kernel.spec, kernel.target), []).append(kernel)
    share_front_end()
    cuda_compiler.prepare(target_of(archs[0]))
    rows: dict[str, dict] = {}
    # The longest ones first, so that no process is left with them.
    tasks = [sources[text] for text in sorted(sources, key=len, reverse=True)]
    with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("fork")) as pool:
        for measured in pool.map(measure, tasks):
            rows.update((row["name"].rpartition("/")[2], row) for row in measured)
    table: dict[str, list[dict]] = {arch: [] for arch in archs}
    for key, kernel in found.items():
        table[kernel.target.arch].append(rows[key])
    return table


def main(output: str, *arguments: str) -> None:
    archs = [a for a in arguments if not a.startswith("--")]
    kinds = [a for a in arguments if a in ("--models", "--training")]
    hosts: dict[str, list[str]] = {arch: [] for arch in archs}
    if kinds:
        kernels = (k for kind in kinds for k in model_kernels(archs, kind == "--training", hosts))
    else:
        kernels = record_kernels(archs, "--first" in arguments)
    table: dict[str, list] = dict(tabulate(kernels, archs))
    if kinds:
        table.update((f"host steps {arch}", steps) for arch, steps in hosts.items())
    Path(output).write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
