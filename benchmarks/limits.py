"""What the machine can do at most: multiply-adds of a core in registers, and bandwidth of its memory and caches.

`python -m benchmarks.limits` prints them. Rates of a shared machine change from hour to hour, so that a benchmark
measures them in its own run.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
import time

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir

from kgraph.codegen.cpu.compiler import initialize_llvm
from kgraph.codegen.target import Target, host_target

# Sums in flight: more than the latency times the throughput of any processor's multiply-add, within 16 registers.
_SUMS = 12


@functools.cache
def _fma_loop(target: Target) -> tuple:
    """(engine, function): `function(n)` runs n iterations of independent multiply-adds on whole vector registers."""
    module = ir.Module()
    module.triple = target.triple
    vector = ir.VectorType(ir.FloatType(), target.lanes("float32"))
    i64 = ir.IntType(64)
    function = ir.Function(module, ir.FunctionType(ir.FloatType(), [i64, ir.FloatType()]), "loop")
    entry, body, end = (function.append_basic_block(name) for name in ("entry", "body", "end"))
    b = ir.IRBuilder(entry)
    zero = ir.Constant(ir.IntType(32), 0)
    x = b.insert_element(ir.Constant(vector, ir.Undefined), function.args[1], zero)
    x = b.shuffle_vector(x, x, ir.Constant(ir.VectorType(ir.IntType(32), vector.count), [0] * vector.count))
    b.branch(body)
    b.position_at_end(body)
    counter = b.phi(i64)
    sums = [b.phi(vector) for _ in range(_SUMS)]
    fma = ir.Function(module, ir.FunctionType(vector, [vector] * 3), f"llvm.fma.v{vector.count}f32")
    counter.add_incoming(ir.Constant(i64, 0), entry)
    following_sums = [b.call(fma, [x, x, total]) for total in sums]
    for number, (total, following) in enumerate(zip(sums, following_sums)):
        total.add_incoming(ir.Constant(vector, [float(number)] * vector.count), entry)
        total.add_incoming(following, body)
    following = b.add(counter, ir.Constant(i64, 1))
    counter.add_incoming(following, body)
    b.cbranch(b.icmp_signed("<", following, function.args[0]), body, end)
    b.position_at_end(end)
    b.ret(b.extract_element(functools.reduce(b.fadd, following_sums), zero))
    initialize_llvm()
    machine = llvm.Target.from_triple(target.triple).create_target_machine(
        cpu=target.cpu, features=target.features, opt=2
    )
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(str(module)), machine)
    engine.finalize_object()
    prototype = ctypes.CFUNCTYPE(ctypes.c_float, ctypes.c_int64, ctypes.c_float)
    return engine, prototype(engine.get_function_address("loop"))


def peak_gflops(threads: int = 1, seconds: float = 0.05, repeats: int = 5) -> float:
    """Multiply-adds in registers, float32, by `threads` threads at once, in GFLOP/s: the best of `repeats`."""
    target = host_target()
    _, loop = _fma_loop(target)
    start = time.perf_counter()
    loop(200_000, 0.5)
    iterations = int(200_000 * seconds / (time.perf_counter() - start))
    flops = 2 * _SUMS * target.lanes("float32") * iterations * threads
    return max(flops / _timed([lambda: loop(iterations, 0.5)] * threads) / 1e9 for _ in range(repeats))


def copy_bandwidth(nbytes: int, threads: int = 1, repeats: int = 20) -> float:
    """Bytes read and written per second by copies of `nbytes` in each of `threads` threads, in GB/s: the best."""
    sources = [np.ones(nbytes, np.uint8) for _ in range(threads)]
    targets = [np.zeros(nbytes, np.uint8) for _ in range(threads)]
    rounds = max(1, (1 << 24) // nbytes)

    def copy(number: int) -> None:
        for _ in range(rounds):
            np.copyto(targets[number], sources[number])

    calls = [functools.partial(copy, number) for number in range(threads)]
    return max(2 * nbytes * rounds * threads / _timed(calls) / 1e9 for _ in range(repeats))


@functools.cache
def measured() -> dict[str, float]:
    """The limits of all cores together: GFLOP/s, bytes of a vector register, copies in cache and in memory in GB/s."""
    cores = len(os.sched_getaffinity(0))
    return {
        "gflops": peak_gflops(cores),
        "vector_bytes": host_target().vector_bytes,
        "cache_gbs": copy_bandwidth(2 << 20, cores),
        "memory_gbs": copy_bandwidth(64 << 20, cores),
    }


def _timed(calls: list) -> float:
    """Seconds until all calls, each on a thread of its own, have ended."""
    workers = [threading.Thread(target=call) for call in calls]
    start = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return time.perf_counter() - start


if __name__ == "__main__":
    for name, value in measured().items():
        print(f"{name:14}{value:8.1f}")
