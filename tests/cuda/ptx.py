"""Compiles kernels to PTX and counts their registers: `python -m tests.cuda.ptx OUTPUT [--first] ARCH...`.

No GPU is needed. It runs in a process in which Numba's simulator is off. OUTPUT gets JSON: by architecture a list of
kernels, each with its name, and what `ptxas` says of it: registers, bytes of spills and of the stack, static shared
memory. Kernels are those of the samples of all records that a CUDA family takes; with --first, of each record's first
such sample.
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


def measure(specs: list[KernelSpec], arch: str) -> list[dict]:
    """Compiles all of them and assembles them where there is a `ptxas`."""
    from kgraph.codegen.cache import spec_key

    target = target_of(arch)
    objects = compile_specs(specs, target=target)
    ptx = [objects[spec_key(spec, target)] for spec in specs]
    rows = [{"name": spec.name, "template": spec.template} for spec in specs]
    if shutil.which("ptxas"):
        with ThreadPoolExecutor(2) as pool:
            for row, numbers in zip(rows, pool.map(lambda text: assemble(text, arch), ptx), strict=True):
                row.update(numbers)
    return rows


def main(output: str, *archs: str) -> None:
    first = "--first" in archs
    table = {a: measure(record_specs(target_of(a), first), a) for a in archs if a != "--first"}
    Path(output).write_text(json.dumps(table))


if __name__ == "__main__":
    main(*sys.argv[1:])
