"""Compiles kernels to PTX and counts their registers: `python -m tests.cuda.ptx OUTPUT [WHAT] ARCH...`.

No GPU is needed. It runs in a process in which Numba's simulator is off. OUTPUT gets JSON: by architecture a list of
kernels, each with its name, its products on tensor cores, and what `ptxas` says of it: registers, bytes of spills and
of the stack, static shared memory; under "host steps ARCH" those of the models, with reasons. Kernels are those of the
samples of all records that a CUDA family takes; with --first, of each record's first such sample, with --models and
--training those of the models and of the training steps of `tests.oracle`.
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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from kgraph import ops  # noqa: F401 - registers the primitives
from kgraph.codegen.cache import spec_key
from kgraph.codegen.compiler import compile_specs
from kgraph.codegen.cuda import compiler as cuda_compiler
from kgraph.codegen.cuda import families
from kgraph.codegen.cuda.target import CudaTarget, make_target
from kgraph.ir import PRIMITIVES, Node, TensorType, Value, make_node

# Records whose kernels are compiled for float16 and TF32 too, which tensor cores multiply.
ON_TENSOR_CORES = ("dot_general", "conv", "conv_filter_gradient")
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


def share_front_end() -> None:
    """From here on Numba types and lowers a kernel's source once for all architectures, which takes most of the time of
    a compile; NVVM makes PTX for each. Kernels are compiled in this process, which keeps what was lowered."""
    from numba.cuda import compiler as numba_compiler

    os.environ["KGRAPH_COMPILE_PROCESSES"] = "1"
    cuda_compiler.load = functools.lru_cache(512)(cuda_compiler.load)  # equal sources are one function
    lower = numba_compiler._compile_pyfunc_with_fixup
    libraries: dict = {}

    def lower_once(function, *arguments, cc, **options):
        if function not in libraries:
            if len(libraries) >= 512:
                libraries.pop(next(iter(libraries)))
            libraries[function] = lower(function, *arguments, cc=cc, **options)
        return libraries[function]

    numba_compiler._compile_pyfunc_with_fixup = lower_once


def record_kernels(archs: list[str], first: bool) -> Iterator[tuple[str, str, bytes]]:
    """(architecture, name, PTX) of the kernels of all samples of all records (or of the first of each that a family
    takes), each once. Records go to as many processes as there are processors, those of large kernels first."""
    cuda_compiler.prepare(target_of(archs[0]))
    names = sorted(PRIMITIVES, key=lambda name: "coarse" not in PRIMITIVES[name].traits)
    seen: set[str] = set()
    with multiprocessing.get_context("fork").Pool(PROCESSES) as pool:
        for kernels in pool.imap_unordered(functools.partial(_kernels_of, archs, first), names):
            for arch, name, ptx in kernels:
                key = name.rpartition("/")[2]
                if key not in seen:
                    seen.add(key)
                    yield arch, name, ptx


def _kernels_of(archs: list[str], first: bool, name: str) -> list[tuple[str, str, bytes]]:
    """What `record_kernels` gives of one record."""
    from tests.cuda.driver import make

    record = PRIMITIVES[name]
    nodes = [make(record, sample) for sample in record.samples()]
    nodes = [node for node in nodes if families.accepts(node) is None]
    chosen = nodes[: 1 if first else None]
    half = [_in_float16(nodes[0])] if name in ON_TENSOR_CORES else []
    out = []
    for arch in archs:
        target = target_of(arch)
        calls = [call for node in chosen + half for call in families.lower(node, target)]
        if half:
            calls += families.lower(nodes[0], replace(target, tf32=True))
        specs = {spec_key(call.spec, target): call.spec for call in calls}
        objects = compile_specs(specs.values(), target=target)
        out += [(arch, f"{name}/{s.template}/{s.name}/{key}", objects[key]) for key, s in specs.items()]
    return out


def _in_float16(node: Node) -> Node:
    """A node on operands of float16."""
    return make_node(node.primitive, [Value(TensorType(v.shape, "float16")) for v in node.inputs], node.attrs)


def model_kernels(archs: list[str], training: bool, hosts: dict[str, list[str]]) -> Iterator[tuple[str, str, bytes]]:
    """(architecture, "model/kernel/key", PTX) of the models or the training steps of `tests.oracle`, each kernel once;
    they are compiled as on a GPU, whose driver is played by Python. hosts: gets the host steps by architecture."""
    import kgraph
    from kgraph.runtime.cuda import device
    from kgraph.runtime.cuda.gpu import Gpu
    from tests.cuda.fake_driver import ATTRIBUTES, FakeDriver
    from tests.oracle import small_models, training_models

    seen: set[tuple[str, str]] = set()
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
            steps = compiled.program.steps
            labels = {step.kernel: step.label for step in steps if hasattr(step, "kernel")}
            hosts[arch] += [f"{name}: {step.label}: {step.reason}" for step in steps if not hasattr(step, "kernel")]
            for key, ptx in compiled.program.kernels.items():
                if (arch, key) not in seen:
                    seen.add((arch, key))
                    yield arch, f"{name}/{labels.get(key, key)}/{key}", ptx


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


def measure(objects: dict[str, bytes], arch: str) -> list[dict]:
    """Names and products on tensor cores of the kernels, and what `ptxas` says of them where there is one."""
    rows: list[dict] = [{"name": name, "tensor": ptx.count(b"mma.sync")} for name, ptx in objects.items()]
    if shutil.which("ptxas"):
        with ThreadPoolExecutor(PROCESSES) as pool:
            for row, numbers in zip(rows, pool.map(lambda ptx: assemble(ptx, arch), objects.values()), strict=True):
                row.update(numbers)
    return rows


def main(output: str, *arguments: str) -> None:
    archs = [a for a in arguments if not a.startswith("--")]
    kinds = [a for a in arguments if a in ("--models", "--training")]
    hosts: dict[str, list[str]] = {arch: [] for arch in archs}
    objects: dict[str, dict[str, bytes]] = {arch: {} for arch in archs}
    share_front_end()
    found = [model_kernels(archs, kind == "--training", hosts) for kind in kinds]
    for kernels in found or [record_kernels(archs, "--first" in arguments)]:
        for arch, name, ptx in kernels:
            objects[arch][name] = ptx
    table: dict[str, list] = {arch: measure(objects[arch], arch) for arch in archs}
    if kinds:
        table.update((f"host steps {arch}", steps) for arch, steps in hosts.items())
    Path(output).write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
