"""The pool of native worker threads, and how many threads a call may use.

There is one pool per process. Its workers are started when a plan first needs them, live in the executor's native loop
(the GIL released), sleep in the kernel when idle, and cost nothing then. They are never stopped: at the interpreter's
exit they vanish with the process, and a forked child, which has no workers, gets a fresh pool on first use.
"""

from __future__ import annotations

import _thread
import ctypes
import hashlib
import os
import time
import warnings
from pathlib import Path

from kgraph.errors import ArtifactError
from kgraph.runtime import layout
from kgraph.runtime.loader import Library, allocate_forever

MAX_THREADS = 256

# How long a waiting thread spins before it sleeps. A futex wake-up costs the waker some 2 us and the sleeper 10 to
# 50 us, so waits within a call should nearly always end while spinning; an idle worker bridges the gap between two
# calls of a busy loop in Python and then leaves its core to others.
_SPIN_BARRIER_NS = 60_000
_SPIN_PARK_NS = 60_000
# With more threads than cores, the thread that is waited for may need this core.
_SPIN_OVERSUBSCRIBED_NS = 1_000

_AVAILABLE_SECONDS = 2.0

_requested: int | None = None  # by set_num_threads
_available: tuple[float, int] | None = None  # (time of reading, number)
_pool: Pool | None = None
_lock = _thread.allocate_lock()
_executors: dict[bytes, Executor] = {}

# Rises whenever a binding's thread decisions or its pool are out of date: another thread count, or a fork.
generation = 0


class Executor:
    """The native executor's entries.

    run: `run(context address)`, called with the GIL released.
    """

    def __init__(self, payload: bytes):
        self.library = Library({"executor": payload})
        made_for = ctypes.CFUNCTYPE(ctypes.c_int64)(self.library.address("executor", "layout_version"))()
        if made_for != layout.version():
            raise ArtifactError("the executor was made by another version of kgraph; compile the model again")
        self.library.keep_forever()
        word, integer = ctypes.c_void_p, ctypes.c_ssize_t
        self.run = ctypes.CFUNCTYPE(None, word)(self.library.address("executor", "run"))
        self.worker = ctypes.CFUNCTYPE(None, word, integer)(self.library.address("executor", "worker"))
        self.pauses = ctypes.CFUNCTYPE(None, integer)(self.library.address("executor", "pauses"))


def install(payload: bytes) -> Executor:
    """The executor of these object bytes, loaded once per process.

    Raises ArtifactError for damaged bytes and for an executor that a different version of kgraph has saved.
    """
    digest = hashlib.sha256(payload).digest()
    executor = _executors.get(digest)
    if executor is None:
        executor = _executors.setdefault(digest, Executor(payload))
    return executor


class Pool:
    """Memory that callers and workers meet in, and the workers started so far."""

    def __init__(self, executor: Executor):
        self.executor = executor
        self.num_workers = 0
        self.address = allocate_forever(layout.POOL_MAILBOXES + layout.MAILBOX_BYTES * MAX_THREADS)
        self._pause_ns = _measure_pause(executor)
        self.set_spinning(get_num_threads() > available_cpus())

    def set_spinning(self, oversubscribed: bool) -> None:
        """Choose the spin times, which workers read anew at each wait."""
        for offset, nanoseconds in (
            (layout.POOL_SPIN_BARRIER, _SPIN_BARRIER_NS),
            (layout.POOL_SPIN_PARK, _SPIN_PARK_NS),
        ):
            nanoseconds = _SPIN_OVERSUBSCRIBED_NS if oversubscribed else nanoseconds
            count = max(1, int(nanoseconds / self._pause_ns))
            ctypes.c_int64.from_address(self.address + offset).value = count

    def ensure(self, threads: int) -> int:
        """Start workers for jobs of `threads` threads; gives how many threads a job may have (fewer if the system
        lets no more be started).
        """
        with _lock:
            while self.num_workers < min(threads, MAX_THREADS) - 1:
                try:
                    # Not threading.Thread: the interpreter would wait for it at exit.
                    _thread.start_new_thread(self.executor.worker, (self.address, self.num_workers + 1))
                except RuntimeError:
                    break
                self.num_workers += 1
        return min(threads, self.num_workers + 1)


def pool(executor: Executor) -> Pool:
    """The pool of this process, made by the first caller."""
    global _pool
    if _pool is None:
        fresh = Pool(executor)
        with _lock:
            _pool = _pool or fresh
    return _pool


def _measure_pause(executor: Executor) -> float:
    """Nanoseconds of one `pause` instruction (5 to 50, by processor family)."""
    count, best = 2000, float("inf")
    for _ in range(3):
        start = time.perf_counter_ns()
        executor.pauses(count)
        best = min(best, (time.perf_counter_ns() - start) / count)
    return max(best, 0.5)


# -- how many --------------------------------------------------------------------------------------------------------
def set_num_threads(threads: int | None) -> None:
    """Use at most `threads` threads in each call from now on; None goes back to what the system grants.

    Raises ValueError for a number below 1.
    """
    global _requested, generation
    if threads is not None:
        threads = int(threads)
        if threads < 1:
            raise ValueError(f"set_num_threads({threads}): at least 1 thread is needed")
        threads = min(threads, MAX_THREADS)
    _requested = threads
    generation += 1
    if _pool is not None:
        _pool.set_spinning(get_num_threads() > available_cpus())


def get_num_threads() -> int:
    """Threads that a call may use: `set_num_threads`, else `KGRAPH_NUM_THREADS`, else the cores granted to the process
    by its CPU affinity and its cgroup's quota.
    """
    if _requested is not None:
        return _requested
    text = os.environ.get("KGRAPH_NUM_THREADS", "")
    if text.isdigit() and int(text) > 0:
        return min(int(text), MAX_THREADS)
    if text:
        message = f"KGRAPH_NUM_THREADS={text!r} is no positive number; using the cores granted to the process"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return available_cpus()


def available_cpus() -> int:
    """Cores granted to this process by affinity and cgroup quota (rounded up); read anew every few seconds."""
    global _available
    now = time.monotonic()
    if _available is None or now - _available[0] > _AVAILABLE_SECONDS:
        try:
            cores = len(os.sched_getaffinity(0))
        except (AttributeError, OSError):
            cores = os.cpu_count() or 1
        quota = cgroup_quota()
        if quota is not None:
            cores = min(cores, max(1, -int(-quota // 1)))
        _available = (now, max(1, min(cores, MAX_THREADS)))
    return _available[1]


def cgroup_quota(process: str = "/proc/self/cgroup", root: str = "/sys/fs/cgroup") -> float | None:
    """Cores' worth of CPU time that the control groups of this process allow (v1 and v2), None for no limit.

    process: the list of the process' groups; root: where the cgroup file systems are mounted.
    """
    try:
        lines = Path(process).read_text().splitlines()
    except OSError:
        return None
    quotas = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controllers == "":
            base, read = Path(root), _quota_v2
        elif "cpu" in controllers.split(","):
            base = next((p for p in (Path(root, controllers), Path(root, "cpu")) if p.is_dir()), Path(root, "cpu"))
            read = _quota_v1
        else:
            continue
        # Every ancestor may limit as well. In a container the path may lie outside of what is mounted: the mount's own
        # root then stands for the container's group.
        parts = [part for part in group.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            quota = read(base.joinpath(*parts[:depth]))
            if quota is not None:
                quotas.append(quota)
    return min(quotas, default=None)


def _quota_v2(directory: Path) -> float | None:
    try:
        quota, period = (directory / "cpu.max").read_text().split()[:2]
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _quota_v1(directory: Path) -> float | None:
    try:
        quota = int((directory / "cpu.cfs_quota_us").read_text())
        return None if quota <= 0 else quota / int((directory / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _after_fork_in_child() -> None:
    # The workers are gone and the pool's words may be in any state; its memory is left alone.
    global _pool, _lock, _available, generation
    _pool, _available = None, None
    _lock = _thread.allocate_lock()
    generation += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
