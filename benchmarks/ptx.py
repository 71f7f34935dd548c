"""Registers, shared memory and spills of the kernels of all test models: `python -m benchmarks.ptx`. No GPU is needed.

Models and training steps of `tests.oracle` are compiled to PTX for every architecture (`tests.cuda.ptx`); `ptxas` (it
is part of the CUDA toolkit) says what becomes of them. Writes `results/ptx.json` and `.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

ARCHS = ("sm_75", "sm_80", "sm_90", "sm_100")
KINDS = ("--models", "--training")
RESULTS = Path(__file__).resolve().parent / "results"
SPILLS = ("spill_stores", "spill_loads", "stack")


def compiled(archs: list[str]) -> dict[str, list]:
    """What `tests.cuda.ptx` finds, of both kinds together."""
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "0"}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "table.json"
        command = [sys.executable, "-m", "tests.cuda.ptx", str(path), *KINDS, *archs]
        subprocess.run(command, check=True, cwd=RESULTS.parent.parent, env=environment)
        return json.loads(path.read_text())


def summary(table: dict[str, list]) -> str:
    """Markdown: a line per architecture, then every kernel with a stack or spills, then those with most registers."""
    kernels = {arch: rows for arch, rows in table.items() if not arch.startswith("host steps")}
    head = "architecture | kernels | refused | with spills | with a stack | registers (median) | (most) | shared bytes"
    lines = [f"| {head} (most) |", "|" + "---|" * 8]
    for arch, rows in kernels.items():
        good = [row for row in rows if "registers" in row]
        counts = [len(rows), sum("error" in row for row in rows)]
        counts += [sum(bool(row["spill_stores"] or row["spill_loads"]) for row in good)]
        counts += [sum(bool(row["stack"]) for row in good)]
        if good:
            registers = [row["registers"] for row in good]
            counts += [int(statistics.median(registers)), max(registers), max(row["shared"] for row in good)]
        lines.append(f"| {arch} | " + " | ".join(map(str, counts)) + " |")
    rows = [(arch, row) for arch, all_rows in kernels.items() for row in all_rows if "registers" in row]
    worst = [item for item in rows if any(item[1][name] for name in SPILLS)]
    most = sorted(rows, key=lambda item: -item[1]["registers"])[:12]
    for title, chosen in (("Spills and stacks", worst), ("Most registers", most)):
        lines += ["", f"{title}: {'' if chosen else 'none.'}", ""]
        if chosen:
            lines += ["| kernel | architecture | registers | shared bytes | spill stores | spill loads | stack |"]
            lines += ["|---|---|---|---|---|---|---|"]
        for arch, row in chosen:
            numbers = [row[name] for name in ("registers", "shared", *SPILLS)]
            lines.append(f"| {row['name'].rpartition('/')[0]} | {arch} | " + " | ".join(map(str, numbers)) + " |")
    hosts = sorted({step for arch, steps in table.items() if arch.startswith("host steps") for step in steps})
    return "\n".join([*lines, "", "Host steps: " + ("; ".join(hosts) or "none."), ""])


def assembler() -> str:
    """The version of `ptxas`."""
    if shutil.which("ptxas") is None:
        return "no ptxas"
    text = subprocess.run(["ptxas", "--version"], capture_output=True, text=True, check=True).stdout
    return "ptxas " + re.findall(r"V([\d.]+)", text)[-1]


def store(table: dict[str, list], name: str) -> None:
    """Writes `results/<name>.json` and `.md`."""
    versions = [f"{package} {metadata.version(package)}" for package in ("numba-cuda", "nvidia-nvvm")]
    head = ", ".join([*versions, assembler()])
    target = RESULTS / f"{name}.json"
    target.write_text(json.dumps({"versions": head, "kernels": table}, indent=0) + "\n")
    target.with_suffix(".md").write_text(f"# Kernels of the test models\n\n{head}\n\n{summary(table)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("archs", nargs="*", default=list(ARCHS), metavar="ARCH", help="such as sm_90; all by default")
    parser.add_argument("--output", default="ptx", help="name of the results file, or a path, without extension")
    arguments = parser.parse_args()
    table = compiled(arguments.archs)
    store(table, arguments.output)
    print(summary(table))


if __name__ == "__main__":
    main()
