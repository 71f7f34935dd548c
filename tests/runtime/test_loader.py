import contextlib
import ctypes
import gc
import platform

import numpy as np
import pytest

from kgraph.codegen.cpu.compiler import compile_ir
from kgraph.errors import ArtifactError
from kgraph.runtime.loader import Library, external_address
from tests.runtime import kernels

KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_ssize_t, ctypes.c_void_p)


def call(address, arrays, extent, sizes=(0,), scratch_bytes=4096):
    pointers = (ctypes.c_void_p * len(arrays))(*[a.ctypes.data for a in arrays])
    values = (ctypes.c_int64 * len(sizes))(*sizes)
    scratch = ctypes.create_string_buffer(scratch_bytes)
    KERNEL(address)(pointers, values, 0, extent, scratch)


def test_code_runs():
    library = Library({"k": kernels.kernel("add_one")})
    x = np.arange(37, dtype=np.float32)
    y = np.zeros_like(x)
    call(library.address("k"), [x, y], 37)
    np.testing.assert_array_equal(y, x + 1)


def test_read_only_data():
    library = Library({"k": kernels.kernel("table"), "j": kernels.kernel("table")})
    for name in ("k", "j"):
        y = np.zeros(12, np.float32)
        call(library.address(name), [y], 12)
        np.testing.assert_array_equal(y, np.resize(np.float32([1.5, -2, 3.25, 4, 7]), 12))


def test_calls_of_the_c_library_go_through_stubs():
    library = Library({"k": kernels.kernel("copy")})
    x = np.frombuffer(np.random.default_rng(0).bytes(1000), np.uint8)
    y = np.zeros_like(x)
    call(library.address("k"), [x, y], 1000)
    np.testing.assert_array_equal(y, x)


def test_jump_tables_and_pointers_in_data():
    cases = "\n".join(f"    i64 {i}, label %case{i}" for i in range(12))
    blocks = "\n".join(f"case{i}:\n  store i64 {i * i * 7 + 3}, ptr %y\n  ret void" for i in range(12))
    functions = "\n".join(
        f"define internal i64 @f{i}(i64 %x) noinline {{\n  %r = add i64 %x, {i * 10}\n  ret i64 %r\n}}"
        for i in range(3)
    )
    text = f"""
@table = internal constant [3 x ptr] [ptr @f0, ptr @f1, ptr @f2]
{functions}
define void @indirect(ptr %buffers, ptr %sizes, i64 %begin, i64 %end, ptr %scratch) {{
  %y = load ptr, ptr %buffers
  %slot = getelementptr ptr, ptr @table, i64 %begin
  %f = load ptr, ptr %slot
  %r = call i64 %f(i64 %end)
  store i64 %r, ptr %y
  ret void
}}
{kernels.HEADER}
entry:
  %y = load ptr, ptr %buffers
  switch i64 %end, label %other [
{cases}
  ]
{blocks}
other:
  store i64 -1, ptr %y
  ret void
}}
"""
    library = Library({"k": compile_ir(text)})
    for i in range(13):
        y = np.zeros(1, np.int64)
        call(library.address("k"), [y], i)
        assert y[0] == (i * i * 7 + 3 if i < 12 else -1)
    for i in range(3):
        y = np.zeros(1, np.int64)
        pointers = (ctypes.c_void_p * 1)(y.ctypes.data)
        KERNEL(library.address("k", "indirect"))(pointers, None, i, 5, None)
        assert y[0] == i * 10 + 5


def test_mapping_is_never_writable_and_executable():
    library = Library({"k": kernels.kernel("add_one")})
    address = library.address("k")
    with open("/proc/self/maps") as maps:
        for line in maps:
            low, high = (int(part, 16) for part in line.split()[0].split("-"))
            if low <= address < high:
                assert line.split()[1] == "r-xp"
                return
    raise AssertionError("the code is not in a mapping of this process")


def test_mapping_is_released():
    def maps():
        gc.collect()
        with open("/proc/self/maps") as file:
            return sum(line.split()[1] == "r-xp" and len(line.split()) < 6 for line in file)

    before = maps()
    libraries = [Library({"k": kernels.kernel("add_one")}) for _ in range(5)]
    del libraries
    assert maps() <= before


@pytest.mark.parametrize("damage", ["empty", "short", "half", "magic", "machine"])
def test_damaged_objects_are_refused(damage):
    data = bytearray(kernels.kernel("table"))
    data = {
        "empty": b"",
        "short": data[:20],
        "half": data[: len(data) // 2],
        "magic": b"\0\0\0\0" + data[4:],
        "machine": data[:18] + b"\xb7\x00" + data[20:],
    }[damage]
    with pytest.raises(ArtifactError, match="'broken'"):
        Library({"broken": bytes(data)})


def test_random_damage_never_kills_the_process():
    # Only loading is tested: damaged code is kept from running by the cache's checksum.
    good = kernels.kernel("table")
    random = np.random.default_rng(1)
    for _ in range(300):
        data = bytearray(good)
        for position in random.integers(0, len(data), 4):
            data[position] = random.integers(256)
        with contextlib.suppress(ArtifactError):
            Library({"k": bytes(data)})


def test_unknown_functions_are_refused():
    text = "declare void @no_such_function_anywhere()\n" + kernels.HEADER
    text += "\n  call void @no_such_function_anywhere()\n  ret void\n}"
    with pytest.raises(ArtifactError, match="no_such_function_anywhere"):
        Library({"k": compile_ir(text)})
    assert external_address("memcpy")
    with pytest.raises(ArtifactError, match="defines no function 'other'"):
        Library({"k": kernels.kernel("add_one")}).address("k", "other")


def test_writable_data_is_refused():
    text = "@counter = global i64 0\n" + kernels.HEADER + "\n  store i64 %begin, ptr @counter\n  ret void\n}"
    with pytest.raises(ArtifactError, match="writable data"):
        Library({"k": compile_ir(text)})


def test_other_platforms_use_llvm(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "other")
    library = Library({name: kernels.kernel(name) for name in ("add_one", "table", "copy")})
    assert library.code_bytes > 0
    x, y = np.ones(5, np.float32), np.zeros(5, np.float32)
    call(library.address("add_one"), [x, y], 5)
    np.testing.assert_array_equal(y, 2)
    call(library.address("copy"), [x.view(np.uint8), y.view(np.uint8)], 20)
    np.testing.assert_array_equal(y, 1)
    with pytest.raises(ArtifactError, match="no function 'other'"):
        library.address("table", "other")


def test_many_objects():
    objects = {str(i): kernels.kernel(("add_one", "table", "copy")[i % 3]) for i in range(600)}
    library = Library(objects)
    assert len({library.address(name) for name in objects}) == 600
    assert all(library.address(name) % 64 == 0 for name in objects)
    x, y = np.ones(5, np.float32), np.zeros(5, np.float32)
    call(library.address("597"), [x, y], 5)
    np.testing.assert_array_equal(y, 2)
