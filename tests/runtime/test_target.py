"""The target that kernels are generated for, and LLVM's part of compiling them."""

import platform

import pytest

from kgraph.codegen import target as target_module
from kgraph.codegen.cpu import compiler
from kgraph.codegen.cpu.compiler import compile_ir
from kgraph.codegen.target import cache_sizes, host_target, make_target
from kgraph.errors import CompileError
from kgraph.runtime.loader import Library
from tests.runtime import kernels

X86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="not an x86 machine")


def test_host():
    host = host_target()
    assert host.vector_bytes in (16, 32, 64)
    assert host.lanes("float32") == host.vector_bytes // 4
    assert host.lanes("bfloat16") == host.vector_bytes // 2
    assert host.num_vector_registers in (16, 32)
    assert 0 < host.l1_bytes <= host.l2_bytes
    assert hash(host) == hash(make_target("native"))
    assert not host.has("no_such_feature")


@X86
@pytest.mark.parametrize(("name", "width"), [("x86-64-v2", 16), ("x86-64-v3", 32), ("x86-64-v4", 64)])
def test_levels(name, width):
    try:
        target = make_target(name)
    except CompileError as error:
        pytest.skip(str(error))
    assert target.vector_bytes == width
    assert target.has("fma") == (width > 16)
    assert target.has("avx512f") == (width == 64)
    assert Library({"k": compile_ir(kernels.ADD_ONE, target=target)}).address("k")


def test_environment_chooses(monkeypatch):
    host_target.cache_clear()
    monkeypatch.setenv("KGRAPH_CPU", "6502")
    with pytest.raises(CompileError, match="KGRAPH_CPU='6502' is unknown; use native, x86-64-v2"):
        host_target()
    monkeypatch.undo()
    host_target.cache_clear()
    assert host_target() == make_target("native")


@X86
def test_level_that_the_machine_lacks(monkeypatch):
    monkeypatch.setattr(compiler, "host_features", lambda: ("old", "+sse2,+avx"))
    with pytest.raises(CompileError, match=r"this machine has no .*avx2"):
        make_target("x86-64-v3")


def test_cache_sizes(tmp_path):
    assert cache_sizes(tmp_path / "missing") == {1: 32 << 10, 2: 1 << 20, 3: 8 << 20}
    entries = [("Data", 1, "48K"), ("Instruction", 1, "64K"), ("Unified", 2, "2M"), ("Unified", 3, "nonsense")]
    for i, (kind, level, size) in enumerate(entries):
        directory = tmp_path / f"index{i}"
        directory.mkdir()
        (directory / "type").write_text(f"{kind}\n")
        (directory / "level").write_text(f"{level}\n")
        (directory / "size").write_text(f"{size}\n")
    assert cache_sizes(tmp_path) == {1: 48 << 10, 2: 2 << 20, 3: 8 << 20}


def test_inline_assembly_does_not_end_the_process():
    if platform.machine() not in ("x86_64", "AMD64", "aarch64"):
        pytest.skip("no instruction to write")
    text = kernels.HEADER + '\n  call void asm sideeffect "nop", ""()\n  ret void\n}'
    assert compile_ir(text)


def test_the_host_is_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("KGRAPH_CACHE_DIR", str(tmp_path))
    host_target.cache_clear()
    try:
        first = host_target()
        host_target.cache_clear()
        monkeypatch.setattr(target_module, "make_target", None)
        assert host_target() == first
        host_target.cache_clear()
        monkeypatch.setattr(target_module, "_processor", lambda: "another one")
        with pytest.raises(TypeError):  # is asked for again
            host_target()
    finally:
        host_target.cache_clear()


def test_text_of_a_processor(tmp_path):
    first = "processor\t: 0\nflags\t\t: fpu avx2\ncpu MHz\t\t: {}\n"
    texts = []
    for mhz in (2000, 3000):
        path = tmp_path / str(mhz)
        path.write_text(first.format(mhz) + "\nprocessor\t: 1\nflags\t\t: fpu\n")
        texts.append(target_module._processor(str(path)))
    assert texts[0] == texts[1] == "flags\t\t: fpu avx2\n"
    assert target_module._processor(str(tmp_path / "missing")) == ""
