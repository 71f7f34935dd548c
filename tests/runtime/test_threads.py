import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from kgraph.runtime import threads
from tests.runtime.kernels import HEAVY, chain

X = np.zeros(300, np.float32)
HERE = os.path.dirname(__file__)


def run(script, timeout=40, **environment):
    root = os.path.dirname(os.path.dirname(HERE))
    env = {**os.environ, "PYTHONPATH": root, **environment}
    return subprocess.run([sys.executable, "-c", script], capture_output=True, env=env, timeout=timeout)


# -- how many --------------------------------------------------------------------------------------------------------
def test_set_and_get(num_threads, monkeypatch):
    num_threads(None)
    monkeypatch.setenv("KGRAPH_NUM_THREADS", "3")
    assert threads.get_num_threads() == 3
    num_threads(5)
    assert threads.get_num_threads() == 5
    num_threads(None)
    assert threads.get_num_threads() == 3
    monkeypatch.setenv("KGRAPH_NUM_THREADS", "many")
    assert threads.get_num_threads() == threads.available_cpus()
    with pytest.raises(ValueError, match="at least 1"):
        num_threads(0)
    num_threads(10**6)
    assert threads.get_num_threads() == threads.MAX_THREADS


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_affinity_is_obeyed():
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    code += "from kgraph.runtime import threads; print(threads.get_num_threads())"
    assert run(code).stdout.strip() == b"1"


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_quota_of_cgroup_v2(tmp_path):
    process = tmp_path / "cgroup"
    root = tmp_path / "fs"
    write(process, "0::/user.slice/job\n")
    write(root / "user.slice/job/cpu.max", "max 100000\n")
    assert threads.cgroup_quota(process, root) is None
    write(root / "user.slice/cpu.max", "250000 100000\n")
    assert threads.cgroup_quota(process, root) == 2.5
    write(root / "user.slice/job/cpu.max", "150000 100000\n")
    assert threads.cgroup_quota(process, root) == 1.5
    write(process, "0::/../../outside\n")
    write(root / "cpu.max", "50000 100000\n")
    assert threads.cgroup_quota(process, root) == 0.5


def test_quota_of_cgroup_v1(tmp_path):
    process = tmp_path / "cgroup"
    root = tmp_path / "fs"
    write(process, "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n0::/\n")
    assert threads.cgroup_quota(process, root) is None
    write(root / "cpu,cpuacct/cpu.cfs_quota_us", "300000\n")  # in a container the group is the mount's root
    write(root / "cpu,cpuacct/cpu.cfs_period_us", "100000\n")
    assert threads.cgroup_quota(process, root) == 3.0
    write(root / "cpu,cpuacct/docker/abc/cpu.cfs_quota_us", "-1\n")
    write(root / "cpu,cpuacct/docker/abc/cpu.cfs_period_us", "100000\n")
    assert threads.cgroup_quota(process, root) == 3.0


def test_damaged_cgroup_files_are_ignored(tmp_path):
    process = tmp_path / "cgroup"
    write(process, "nonsense\n0::/a\n")
    write(tmp_path / "fs/a/cpu.max", "lots of\n")
    assert threads.cgroup_quota(process, tmp_path / "fs") is None
    assert threads.cgroup_quota(tmp_path / "missing", tmp_path) is None


def test_quota_is_rounded_up(monkeypatch):
    monkeypatch.setattr(threads, "cgroup_quota", lambda: 0.2)
    monkeypatch.setattr(threads, "_available", None)
    assert threads.available_cpus() == 1
    monkeypatch.setattr(threads, "cgroup_quota", lambda: 1.2)
    monkeypatch.setattr(threads, "_available", None)
    assert threads.available_cpus() == min(2, len(os.sched_getaffinity(0)))
    monkeypatch.setattr(threads, "_available", None)


def test_system_that_starts_no_more_threads(num_threads, monkeypatch):
    num_threads(200)

    def refuse(*args):
        raise RuntimeError("can't start new thread")

    p = chain(3, flops=HEAVY)
    p([X])
    have = threads.pool(p.executor).num_workers + 1
    num_threads(250)
    monkeypatch.setattr(threads._thread, "start_new_thread", refuse)
    assert (p([X])[0] == 3).all()
    assert p.bind({"N": 300}).threads == have


# -- fork ------------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fork_while_other_threads_call(num_threads):
    num_threads(2)
    p = chain(8, flops=HEAVY)
    p([X])
    stop = threading.Event()

    def call():
        while not stop.is_set():
            assert (p([X])[0] == 8).all()

    workers = [threading.Thread(target=call) for _ in range(3)]
    for w in workers:
        w.start()
    try:
        for _ in range(10):
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    signal.alarm(20)
                    good = all((p([X])[0] == 8).all() for _ in range(20))
                    good = good and p.bind({"N": 300}).threads == 2 and (chain(2)([X])[0] == 2).all()
                    status = 0 if good else 2
                finally:
                    os._exit(status)
            assert os.waitpid(pid, 0)[1] == 0
    finally:
        stop.set()
        for w in workers:
            w.join()


def test_multiprocessing_by_fork():
    script = """
import multiprocessing, numpy as np
from kgraph.runtime import threads
from tests.runtime.kernels import chain, HEAVY
threads.set_num_threads(2)
p = chain(4, flops=HEAVY)
x = np.zeros(100, np.float32)
p([x])
def work(i):
    return float(p([x + i])[0].sum())
with multiprocessing.get_context("fork").Pool(3) as pool:
    print(pool.map(work, range(20)) == [100.0 * (i + 4) for i in range(20)])
"""
    assert run(script).stdout.strip() == b"True"


# -- exit and interruption -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("wait", ["", "import time; time.sleep(0.05)"])
def test_exit_with_idle_workers(wait):
    script = f"""
import numpy as np
from kgraph.runtime import threads
from tests.runtime.kernels import chain, HEAVY
threads.set_num_threads(4)
p = chain(4, flops=HEAVY)
for _ in range(5):
    p([np.zeros(100, np.float32)])
{wait}
print("end")
"""
    start = time.perf_counter()
    done = run(script)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, b"end", b"")
    assert time.perf_counter() - start < 20


def test_exit_while_daemon_threads_call():
    script = """
import threading, time, numpy as np
from kgraph.runtime import threads
from tests.runtime.kernels import chain, HEAVY
threads.set_num_threads(2)
p = chain(50, flops=HEAVY)
x = np.zeros(20000, np.float32)
def work():
    while True:
        p([x])
for _ in range(4):
    threading.Thread(target=work, daemon=True).start()
time.sleep(0.2)
print("end")
"""
    for _ in range(4):
        done = run(script)
        assert (done.returncode, done.stdout.strip(), done.stderr) == (0, b"end", b"")


def test_keyboard_interrupt_leaves_the_program_sound():
    script = """
import signal, time, numpy as np
from kgraph.runtime import threads
from tests.runtime.kernels import chain, HEAVY
threads.set_num_threads(2)
p = chain(200, flops=HEAVY)
x = np.zeros(100000, np.float32)
p([x])
interrupts = 0
signal.signal(signal.SIGALRM, signal.default_int_handler)
for _ in range(20):
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        end = time.time() + 5
        while time.time() < end:
            p([x])
    except KeyboardInterrupt:
        interrupts += 1
    assert (p([x])[0] == 200).all()
print(interrupts, p.stats()["contexts"] <= 1)
"""
    done = run(script)
    assert done.stdout.split() == [b"20", b"True"], done.stderr.decode()
