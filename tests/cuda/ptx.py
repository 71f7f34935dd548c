"""Compiles kernels to PTX and counts their registers: `python -m tests.cuda.ptx OUTPUT [--first | --models] ARCH...`.

No GPU is needed. It runs in a process in which Numba's simulator is off. OUTPUT gets JSON: by architecture a list of
kernels, each with its name, and what `ptxas` says of it: registers, bytes of spills and of the stack, static shared
memory. Kernels are those of the samples of all records that a CUDA family takes; with --first, of each record's first
such sample, with --models those of the models and training steps of `tests.oracle`.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kgraph import ops  # noqa: F401 - registers the primitives
from kgraph.codegen.cache import spec_key
from kgraph.codegen.compiler import compile_specs
from kgraph.codegen.cuda import families
from kgraph.codegen.cuda.target import CudaTarget, make_target
from kgraph.codegen.kernel import KernelSpec
from kgraph.ir import PRIMITIVES

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


def record_specs(target: CudaTarget, first: bool = False) -> list[KernelSpec]:
    """The kernels of all samples of all records (or of the first of each that a family takes), each once."""
    from tests.cuda.driver import make

    found: dict[str, KernelSpec] = {}
    for record in PRIMITIVES.values():
        for sample in record.samples():
            node = make(record, sample)
            if families.accepts(node) is None:
                for call in families.lower(node, target):
                    found.setdefault(repr((call.spec.template, call.spec.params)), call.spec)
                if first:
                    break
    return list(found.values())


def model_kernels(arch: str) -> tuple[dict[str, bytes], list[str]]:
    """PTX of the models and training steps of `tests.oracle` by "model/kernel key", and their host steps with the
    reasons; they are compiled as on a GPU of this architecture, whose driver is played by Python."""
    import kgraph
    from kgraph.runtime.cuda import device
    from kgraph.runtime.cuda.gpu import Gpu
    from tests.cuda.fake_driver import ATTRIBUTES, FakeDriver
    from tests.oracle import small_models, training_models

    ATTRIBUTES[75], ATTRIBUTES[76] = target_of(arch).capability
    device._devices["cuda:0"] = Gpu(library=FakeDriver())
    kgraph.set_device("cuda")
    kernels: dict[str, bytes] = {}
    reasons: list[str] = []

    def take(name: str, compiled) -> None:
        labels = {step.kernel: step.label for step in compiled.program.steps if hasattr(step, "kernel")}
        for key, ptx in compiled.program.kernels.items():
            kernels[f"{name}/{labels.get(key, key)}/{key}"] = ptx
        hosts = [step for step in compiled.program.steps if not hasattr(step, "kernel")]
        reasons.extend(f"{name}: {step.label}: {step.reason}" for step in hosts)

    for name, make in small_models.MODELS.items():
        model, inputs = make()
        declared = getattr(getattr(model, "_functional", None) or model, "_inputs_struct", None) is not None
        take(name, kgraph.compile(model, example=None if declared else inputs)._some_variant().compiled)
    for name, prepare in training_models.MODELS.items():
        task = prepare()
        task.model.compile("adam", loss=task.loss, metrics=task.metrics, **task.options)
        step = kgraph.compile_step(task.model, (task.x, task.y))
        take(f"training {name}", step._program().compiled)
    return kernels, reasons


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
    """What `ptxas` says of the kernels, by name; the names alone where there is none."""
    rows: list[dict] = [{"name": name} for name in objects]
    if shutil.which("ptxas"):
        with ThreadPoolExecutor(2) as pool:
            for row, numbers in zip(rows, pool.map(lambda ptx: assemble(ptx, arch), objects.values()), strict=True):
                row.update(numbers)
    return rows


def record_kernels(arch: str, first: bool) -> dict[str, bytes]:
    """PTX of the kernels of the records' samples, by name."""
    target = target_of(arch)
    specs = record_specs(target, first)
    objects = compile_specs(specs, target=target)
    return {f"{spec.template}/{spec.name}/{n}": objects[spec_key(spec, target)] for n, spec in enumerate(specs)}


def main(output: str, *arguments: str) -> None:
    archs = [a for a in arguments if not a.startswith("--")]
    table: dict[str, list] = {}
    for arch in archs:
        if "--models" in arguments:
            kernels, table[f"host steps {arch}"] = model_kernels(arch)
        else:
            kernels = record_kernels(arch, "--first" in arguments)
        table[arch] = measure(kernels, arch)
    Path(output).write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
