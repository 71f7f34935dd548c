"""The engines that are compared: where each one runs, and a process of its own for it."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import select
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import environments
import limits

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Engine:
    """environment: of `environments.PACKAGES`; None for the running interpreter. backend: that Keras runs on.

    packages: whose versions count. variables: environment variables of its process. on_gpu: for `benchmarks.gpu`.
    """

    environment: str | None
    backend: str
    packages: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()
    on_gpu: bool = False

    @property
    def is_peer(self) -> bool:
        return self.backend != "kgraph"


ENGINES = {
    "kgraph": Engine(None, "kgraph"),
    # The same program on one thread, for the scaling, and the saved model in a process without Keras and compiler.
    "kgraph-one-thread": Engine(None, "kgraph", variables=(("KGRAPH_NUM_THREADS", "1"),)),
    "kgraph-saved": Engine(None, "kgraph"),
    # Less precise forms, for `benchmarks.precision`.
    "kgraph-bf16": Engine(None, "kgraph"),
    "kgraph-int8": Engine(None, "kgraph"),
    "onnxruntime-int8": Engine("peers", "jax", ("onnxruntime",)),
    "jax": Engine("peers", "jax", ("jax",)),
    "onnxruntime": Engine("peers", "jax", ("onnxruntime",)),
    "openvino": Engine("peers", "jax", ("openvino",)),
    "tensorflow": Engine("export", "tensorflow", ("tensorflow_cpu",)),
    "tensorflow-xla": Engine("export", "tensorflow", ("tensorflow_cpu",)),
    "torch": Engine("export-torch", "torch", ("torch",)),
    "torch-compile": Engine("export-torch", "torch", ("torch",)),
    # In the running interpreter, which holds what the machine with the GPU has.
    "kgraph-gpu": Engine(None, "kgraph", ("numba_cuda",), on_gpu=True),
    "jax-gpu": Engine(None, "jax", ("jax",), on_gpu=True),
    "torch-compile-gpu": Engine(None, "torch", ("torch",), on_gpu=True),
}


class Process:
    """A process that answers requests: JSON lines on its standard input, and on its standard output."""

    def __init__(self, command: list[str], environment: dict[str, str]):
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )
        self._received = b""

    def ask(self, do: str, limit: float | None = None, **fields) -> dict:
        """The process' answer; a process that takes longer than `limit` seconds is ended."""
        try:
            self.process.stdin.write(json.dumps({"do": do, **fields}).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return {"error": f"process ended with {self.process.wait()}"}
        deadline = None if limit is None else time.monotonic() + limit
        while b"\n" not in self._received:
            left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
            if not select.select([self.process.stdout], [], [], left)[0]:
                self.process.kill()
                self.process.wait()
                return {"error": f"took longer than {limit:.0f} s"}
            chunk = os.read(self.process.stdout.fileno(), 1 << 20)
            if not chunk:
                return {"error": f"process ended with {self.process.wait()}"}
            self._received += chunk
        line, _, self._received = self._received.partition(b"\n")
        return json.loads(line)

    def close(self) -> None:
        """End the process; a second call does nothing."""
        if not self.process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


class Worker(Process):
    """An engine in its own process."""

    def __init__(self, engine: str, folder: Path, cache: Path | None = None):
        """folder: of ONNX models. cache: kgraph's kernel cache; None for the user's."""
        self.engine = engine
        where = ENGINES[engine]
        if where.environment is None:
            environment = dict(os.environ, KERAS_BACKEND=where.backend, **dict(where.variables))
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
            environment.pop("PYTHONDONTWRITEBYTECODE", None)  # peers keep the bytecode of their modules too
            if cache is not None:
                environment["KGRAPH_CACHE_DIR"] = str(cache)
            interpreter: str | Path = sys.executable
        else:
            environment = environments.clean_environment(KERAS_BACKEND=where.backend)
            interpreter = environments.python(where.environment)
        command = [interpreter, HERE / "worker.py", engine, folder]
        super().__init__([str(part) for part in command], environment)


def versions(engines: list[str]) -> dict[str, str]:
    """Versions of what the figures depend on: kgraph's own packages and those of the engines."""
    own = {package for engine in engines if ENGINES[engine].on_gpu for package in ENGINES[engine].packages}
    found = {name: metadata.version(name) for name in ("keras", "numpy", "llvmlite", "numba", *sorted(own))}
    wanted: dict[str, set[str]] = {}
    for engine in engines:
        where = ENGINES[engine]
        if where.environment is not None:
            wanted.setdefault(where.environment, set()).update(where.packages)
    for environment, packages in wanted.items():
        command = [environments.python(environment), "-m", "pip", "list", "--format=json"]
        try:
            listing = subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            continue
        for package in json.loads(listing.stdout):
            name = package["name"].replace("-", "_")
            if name in packages:
                found[name] = package["version"]
    return found


def machine(engines: list[str]) -> dict:
    """What the figures were measured on."""
    cpu = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE).stdout
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "limits": limits.measured(),
        "versions": versions(engines),
        "commit": commit.strip(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def store(name: str, title: str, results: list[dict], engines: list[str], table, merge: bool) -> None:
    """Write `results/<name>.json` and `.md`. table: makes the Markdown text of results.

    merge: replace only the measured cases in the file. The engines of a case are always timed in one run; the cases
    may come from several.
    """
    target = HERE / "results" / f"{name}.json"
    target.parent.mkdir(exist_ok=True)
    if merge and target.exists():
        measured = {r["case"]: r for r in results}
        results = [measured.pop(r["case"], r) for r in json.loads(target.read_text())["results"]]
        results += measured.values()
    info = machine(engines)
    target.write_text(json.dumps({"machine": info, "results": results}, indent=1) + "\n")
    header = f"{info['date']}, commit {info['commit']}, {info['cpu']} x {info['cores']}, Python {info['python']}, "
    header += ", ".join(f"{k} {v}" for k, v in info["versions"].items())
    found = info["limits"]
    header += f". Measured in the same run: {found['gflops']:.0f} GFLOP/s of multiply-adds in registers of "
    header += f"{found['vector_bytes']} bytes, copies at {found['cache_gbs']:.0f} GB/s in the cache and "
    header += f"{found['memory_gbs']:.0f} GB/s in memory, all cores together."
    target.with_suffix(".md").write_text(f"# {title}\n\n{header}\n\n{table(results, engines)}\n")


def selected(cases: list, wanted: str) -> list:
    """The cases of a comma-separated list of keys or model names; all for an empty one."""
    names = [name for name in wanted.split(",") if name]
    return [case for case in cases if not names or case.key in names or case.model in names]
