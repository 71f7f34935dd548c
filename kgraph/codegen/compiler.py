"""From kernel specs to object code: disk cache first, then rendering and LLVM, in several processes where that helps.

llvmlite serialises all calls into LLVM by one lock, and rendering holds the GIL, so threads gain nothing; forked
children do. They only render and compile, and hand the bytes back through a pipe.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import select
import signal
import struct
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType

from kgraph.codegen.cache import spec_key
from kgraph.codegen.cuda.target import CudaTarget
from kgraph.codegen.kernel import KernelSpec
from kgraph.codegen.target import Target, host_target
from kgraph.disk_cache import disk_cache
from kgraph.errors import CompileError
from kgraph.runtime.threads import available_cpus

AnyTarget = Target | CudaTarget

# Below this many kernels a fork costs more than it saves.
_MIN_KERNELS_PER_PROCESS = 3
_MAX_PROCESSES = 16
# A child that says nothing for this long is given up; its kernels are compiled here.
_CHILD_TIMEOUT_SECONDS = 120.0
# Modules whose kernels take several times as long to compile as others, longest first.
LONG_COMPILES = (
    "rnn_gradient",
    "executor",
    "rnn",
    "attention_gradient",
    "attention",
    "winograd_kernel",
    "conv_filter_winograd_kernel",
    "conv_kernel",
    "conv_filter_kernel",
    "gemm_kernel",
    "depthwise",
    "moments",
)


@dataclass
class _Stats:
    hits: int = 0
    misses: int = 0
    seconds_rendering: float = 0.0
    seconds_compiling: float = 0.0
    seconds_loading: float = 0.0


_stats = _Stats()


def stats() -> dict:
    """Kernels of this process so far: cache hits and misses, and the seconds spent (summed over processes)."""
    return dict(vars(_stats))


def compile_spec(spec: KernelSpec, target: AnyTarget | None = None) -> bytes:
    """Object code of one kernel, for this machine or `target`."""
    return compile_specs([spec], target=target)[spec_key(spec, target)]


def compile_specs(
    specs: Iterable[KernelSpec],
    progress: Callable[[int, int], None] | None = None,
    target: AnyTarget | None = None,
) -> dict[str, bytes]:
    """Object code of all `specs` by `spec_key`, from the disk cache or compiled now (and then stored), for this machine
    or `target`.

    The result is keyed by `spec_key` and not by the spec, because specs that differ in `0.0` and `-0.0`, or in `1` and
    `True`, compare equal. progress: called as `progress(done, total)` while kernels are compiled.
    Raises CompileError naming the kernel whose renderer or IR fails.
    """
    target = target or host_target()
    cache = disk_cache()
    start = time.perf_counter()
    out: dict[str, bytes] = {}
    missing: dict[str, KernelSpec] = {}
    for spec in specs:
        key = spec_key(spec, target)
        if key in out or key in missing:
            continue
        found = cache.get(key) if cache is not None else None
        if found is None:
            missing[key] = spec
        else:
            out[key] = found
    _stats.hits += len(out)
    _stats.misses += len(missing)
    _stats.seconds_loading += time.perf_counter() - start
    if not missing:
        return out
    total = len(missing)
    for done, (key, payload) in enumerate(_compile_all(missing, target), 1):
        out[key] = payload
        if cache is not None:
            cache.put(key, payload)
        if progress is not None:
            progress(done, total)
    return out


def render(spec: KernelSpec, target: AnyTarget) -> str:
    """The kernel's text, LLVM IR or source. Raises CompileError with the renderer's fault as its cause."""
    try:
        renderer = getattr(importlib.import_module(spec.module), spec.template.partition(":")[2])
        return renderer(spec.params, target)
    except Exception as error:
        raise CompileError(f"kernel {spec.name}: its renderer {spec.template} failed: {error}") from error


def _compile_one(spec: KernelSpec, target: AnyTarget) -> bytes:
    start = time.perf_counter()
    text = render(spec, target)
    rendered = time.perf_counter()
    payload = _toolchain(target).compile_text(text, spec.name, target)
    _stats.seconds_rendering += rendered - start
    _stats.seconds_compiling += time.perf_counter() - rendered
    return payload


def _toolchain(target: AnyTarget) -> ModuleType:
    """What has `compile_text` and `prepare` for a target; loaded only where a kernel has to be compiled."""
    return importlib.import_module(f"kgraph.codegen.{'cpu' if isinstance(target, Target) else 'cuda'}.compiler")


def _compile_all(missing: dict[str, KernelSpec], target: AnyTarget):
    """Yields (key, object bytes) in any order."""
    keys = sorted(missing, key=lambda key: _compile_rank(missing[key]))
    processes = min(_num_processes(), len(keys) // _MIN_KERNELS_PER_PROCESS)
    if processes > 1:
        yield from _compile_forked(keys, missing, target, processes)
    else:
        for key in keys:
            yield key, _compile_one(missing[key], target)


def _compile_rank(spec: KernelSpec) -> int:
    """What takes longest comes first, so that no process is left with it when the others are done."""
    family = spec.module.rpartition(".")[2]
    return LONG_COMPILES.index(family) if family in LONG_COMPILES else len(LONG_COMPILES)


def _num_processes() -> int:
    """Processes to compile in: `KGRAPH_COMPILE_PROCESSES`, else the cores granted to this process."""
    if not sys.platform.startswith("linux"):
        return 1
    text = os.environ.get("KGRAPH_COMPILE_PROCESSES", "")
    return min(int(text) if text.isdigit() and int(text) > 0 else available_cpus(), _MAX_PROCESSES)


# -- compiling in children -------------------------------------------------------------------------------------------
# Work is handed out through a pipe that holds the indices of all kernels: whoever is free reads the next one (a read of
# four bytes is never torn). A child answers with frames of (index, seconds rendering, seconds compiling, length,
# whether it succeeded) and the bytes.
_FRAME = struct.Struct("<IddI?")


def _compile_forked(keys: list[str], missing: dict[str, KernelSpec], target: AnyTarget, processes: int):
    # What every child needs is made ready once, before the fork.
    for spec in missing.values():
        try:
            importlib.import_module(spec.module)
        except ImportError as error:
            raise CompileError(f"kernel {spec.name}: there is no renderer {spec.template}") from error
    _toolchain(target).prepare(target)
    queue_read, queue_write = os.pipe()
    left = set(range(len(keys)))
    children: dict[int, _Child] = {}
    try:
        # A pipe holds 64 KiB, 16384 indices; what exceeds it is compiled here in the end.
        os.set_blocking(queue_write, False)
        os.write(queue_write, b"".join(struct.pack("<I", i) for i in range(min(len(keys), 16000))))
        os.close(queue_write)
        queue_write = -1
        for _ in range(processes - 1):
            child = _start_child(queue_read, [missing[key] for key in keys], target)
            if child is None:
                break
            children[child.pipe] = child
        while True:
            token = os.read(queue_read, 4)
            if not token:
                break
            index = struct.unpack("<I", token)[0]
            payload = _compile_one(missing[keys[index]], target)
            left.discard(index)
            yield keys[index], payload
            for done, answer in _collect(children, 0.0):
                left.discard(done)
                yield keys[done], answer
        deadline = time.monotonic() + _CHILD_TIMEOUT_SECONDS
        while children and time.monotonic() < deadline:
            for done, answer in _collect(children, 1.0):
                deadline = time.monotonic() + _CHILD_TIMEOUT_SECONDS
                left.discard(done)
                yield keys[done], answer
    finally:
        os.close(queue_read)
        if queue_write >= 0:
            os.close(queue_write)
        for child in children.values():
            child.stop()
    # What a child took and did not deliver (it was killed, or failed): here the error shows with its own traceback.
    for index in sorted(left):
        yield keys[index], _compile_one(missing[keys[index]], target)


@dataclass
class _Child:
    pid: int
    pipe: int
    data: bytearray

    def stop(self) -> None:
        os.close(self.pipe)
        with contextlib.suppress(OSError):
            os.kill(self.pid, signal.SIGKILL)
        self.reap()

    def reap(self) -> None:
        with contextlib.suppress(OSError):  # the application may reap all children itself
            os.waitpid(self.pid, 0)


def _start_child(queue: int, specs: list[KernelSpec], target: AnyTarget) -> _Child | None:
    import llvmlite.binding as llvm

    read, write = os.pipe()
    try:
        # llvmlite's lock is held across the fork: no other thread can be inside LLVM at that moment, and the child owns
        # the lock and can go on.
        with llvm.ffi.lib._lock, warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
            if pid == 0:
                _child_main(queue, write, specs, target)
    except OSError:
        os.close(read)
        os.close(write)
        return None
    os.close(write)
    return _Child(pid, read, bytearray())


def _child_main(queue: int, write: int, specs: list[KernelSpec], target: AnyTarget) -> None:
    """Never returns. Leaves by `_exit`, so that nothing of the parent's clean-up runs twice."""
    status = 1
    gc.freeze()  # a collection would visit, and so copy, all that the parent holds
    try:
        while token := os.read(queue, 4):
            index = struct.unpack("<I", token)[0]
            before = _stats.seconds_rendering, _stats.seconds_compiling
            try:
                payload, good = _compile_one(specs[index], target), True
            except Exception:
                payload, good = traceback.format_exc().encode(), False
            seconds = _stats.seconds_rendering - before[0], _stats.seconds_compiling - before[1]
            frame = _FRAME.pack(index, *seconds, len(payload), good) + payload
            while frame:
                frame = frame[os.write(write, frame) :]
        status = 0
    finally:
        os._exit(status)


def _collect(children: dict[int, _Child], timeout: float) -> list[tuple[int, bytes]]:
    """What children have finished, waiting up to `timeout` seconds for something. Children at their end are dropped."""
    out = []
    poller = select.poll()  # not `select`, which fails where the process has more than 1024 files open
    for pipe in children:
        poller.register(pipe, select.POLLIN)
    for pipe, _ in poller.poll(timeout * 1000) if children else ():
        child = children[pipe]
        chunk = os.read(pipe, 1 << 20)
        if not chunk:
            del children[pipe]
            os.close(pipe)
            child.reap()
            continue
        child.data += chunk
        while len(child.data) >= _FRAME.size:
            index, rendering, compiling, length, good = _FRAME.unpack_from(child.data)
            if len(child.data) < _FRAME.size + length:
                break
            payload = bytes(child.data[_FRAME.size : _FRAME.size + length])
            del child.data[: _FRAME.size + length]
            if good:
                _stats.seconds_rendering += rendering
                _stats.seconds_compiling += compiling
                out.append((index, payload))
    return out
