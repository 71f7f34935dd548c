"""The driver's functions called through ctypes, as on a GPU: a C library of the same prototypes takes the calls."""

from __future__ import annotations

import ctypes
import gc
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from kgraph.disk_cache import DiskCache
from kgraph.errors import DeviceError, DeviceMemoryError
from kgraph.runtime.cuda.device import Argument
from kgraph.runtime.cuda.driver import SIGNATURES
from kgraph.runtime.cuda.gpu import Gpu

SOURCE = Path(__file__).with_name("stub_driver.c")
COMPILER = next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None)
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C compiler")


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("stub") / "libstub.so"
    subprocess.run([COMPILER, "-shared", "-fPIC", "-Wall", "-Werror", "-o", path, SOURCE], check=True)
    return ctypes.CDLL(str(path))


def test_all_functions_in_use_are_in_the_stub():
    assert set(re.findall(r"^result (cu\w+)\(", SOURCE.read_text(), re.MULTILINE)) == set(SIGNATURES)


def test_memory_copies_launches_and_graphs(library):
    gpu = Gpu(library=library)
    assert (gpu.name, gpu.capability, gpu.num_sms) == ("Stub", (9, 0), 4)
    x = np.arange(1000, dtype=np.float32)
    source, target, other = (gpu.allocate(x.nbytes) for _ in range(3))
    gpu.copy_in(source, x)
    kernel = gpu.load({"neg": b"a kernel"})["neg"]
    buffers = [Argument(source, x.nbytes, "float32"), Argument(target, x.nbytes, "float32")]
    gpu.launch(kernel, 3, 256, 60000, buffers, [x.size])
    assert [library.stub_last_launch(i) for i in range(3)] == [3, 256, 60000]
    out = np.empty_like(x)
    gpu.copy_out(out, target)
    np.testing.assert_array_equal(out, -x)

    gpu.begin_capture()
    gpu.launch(kernel, 3, 256, 0, [*buffers[1:], Argument(other, x.nbytes, "float32")], [x.size])
    gpu.copy(source, other, x.nbytes)
    graph = gpu.end_capture()
    gpu.copy_in(target, x)
    gpu.replay(graph)
    gpu.copy_out(out, source)
    np.testing.assert_array_equal(out, -x)

    start, end = gpu.mark(timing=True), gpu.mark(timing=True)
    assert gpu.milliseconds(start, end) == 0.25
    assert gpu.memory() == (1 << 36, 1 << 37)
    pinned = gpu.pinned(4000)
    pinned[:] = x.view(np.uint8)
    gpu.copy_in(other, pinned)
    gpu.copy_out(out, other)
    np.testing.assert_array_equal(out, x)
    del pinned, graph, kernel
    for address in (source, target, other):
        gpu.release(address, shared=True)
    gpu.trim()
    gc.collect()


def test_errors_come_with_the_drivers_words(library):
    gpu = Gpu(library=library)
    with pytest.raises(DeviceMemoryError, match="2147483648 bytes were asked for"):
        gpu.allocate(1 << 31)
    with pytest.raises(DeviceError, match=r"(?s)kernel k: .*in the stub's words.*line 1: broken"):
        gpu.load({"k": b"broken"})
    with pytest.raises(DeviceError, match="no GPU of this number"):
        Gpu(3, library=library)


def test_the_driver_s_code_is_kept(library, tmp_path):
    gpu = Gpu(library=library, cache=DiskCache(tmp_path, 1 << 20))
    assert gpu._compiled("neg", b"a kernel") == b"\x7f\0a kernel\0"
    assert gpu.load({"neg": b"a kernel"})["neg"].handle
    assert len(list(tmp_path.glob("??/*"))) == 1
    with pytest.raises(DeviceError, match=r"(?s)kernel k: .*in the stub's words.*line 2: broken"):
        gpu.load({"k": b"broken"})
    assert len(list(tmp_path.glob("??/*"))) == 1
