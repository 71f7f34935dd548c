import dataclasses
import os
import subprocess
import sys
import time

import pytest

from kgraph.codegen import cache as cache_module
from kgraph.codegen import compiler, sources
from kgraph.codegen.cache import spec_key
from kgraph.codegen.cpu.compiler import compile_ir
from kgraph.codegen.kernel import KernelSpec
from kgraph.codegen.target import host_target
from kgraph.disk_cache import DiskCache, disk_cache
from kgraph.errors import CompileError

EXECUTOR = KernelSpec("executor", "executor:render", ())


@pytest.fixture
def cache(tmp_path):
    return DiskCache(tmp_path / "objects", 1 << 20)


def test_round_trip(cache):
    assert cache.get("ab" * 20) is None
    assert cache.put("ab" * 20, b"payload")
    assert cache.get("ab" * 20) == b"payload"
    assert cache.put("ab" * 20, b"other")
    assert cache.get("ab" * 20) == b"other"


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "renamed"])
def test_damage_is_a_miss_and_is_repaired(cache, damage):
    key = "cd" * 20
    cache.put(key, bytes(range(200)))
    path = cache._path(key)
    data = path.read_bytes()
    if damage == "renamed":  # a whole entry under another's name
        other = "ce" * 20
        cache.put(other, b"x" * 50)
        data = cache._path(other).read_bytes()
    path.write_bytes(
        {
            "truncated": data[:-7],
            "flipped": data[:60] + bytes([data[60] ^ 4]) + data[61:],
            "empty": b"",
            "renamed": data,
        }[damage]
    )
    assert cache.get(key) is None
    assert not path.exists()
    cache.put(key, b"good")
    assert cache.get(key) == b"good"


def test_least_recently_used_entries_go_first(tmp_path):
    cache = DiskCache(tmp_path, 50_000)
    keys = [f"{i:02x}" * 20 for i in range(60)]
    now = time.time()
    for i, key in enumerate(keys):
        cache.put(key, bytes(1000))
        os.utime(cache._path(key), (now - 1000 + i, now - 1000 + i))
    leftover = cache._path(keys[0]).parent / ".new-abandoned"
    leftover.write_bytes(bytes(100))
    os.utime(leftover, (1, 1))
    assert cache.sweep() > 0
    kept = [key for key in keys if cache.get(key) is not None]
    assert kept == keys[-len(kept) :]
    assert 30 <= len(kept) <= 40
    assert not leftover.exists()


def test_use_renews_an_entry(cache):
    key = "ef" * 20
    cache.put(key, b"x")
    os.utime(cache._path(key), (1, 1))
    cache.get(key)
    assert time.time() - cache._path(key).stat().st_mtime < 100


def test_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    cache = DiskCache(tmp_path / "file" / "objects", 1 << 20)
    assert not cache.put("ab" * 20, b"x")
    assert cache.get("ab" * 20) is None


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no owners of files")
def test_entries_are_the_users_alone(cache):
    key = "ab" * 20
    before = os.umask(0)
    try:
        cache.put(key, b"code")
    finally:
        os.umask(before)
    path = cache._path(key)
    assert [p.stat().st_mode & 0o777 for p in (cache.directory, path.parent, path)] == [0o700, 0o700, 0o600]
    path.chmod(0o622)  # somebody else may have written it
    assert cache.get(key) is None
    path.chmod(0o644)
    assert cache.get(key) == b"code"


def test_switched_off(monkeypatch):
    monkeypatch.setenv("KGRAPH_CACHE", "0")
    assert disk_cache() is None
    assert compiler.compile_spec(EXECUTOR)[:4] == b"\x7fELF"


def test_key_depends_on_everything(monkeypatch):
    target = host_target()
    base = KernelSpec("k", "m:f", (1, 0.0, "a", ("b",)))
    keys = {
        spec_key(spec, target)
        for spec in (
            base,
            dataclasses.replace(base, name="l"),
            dataclasses.replace(base, template="m:g"),
            dataclasses.replace(base, params=(True, 0.0, "a", ("b",))),
            dataclasses.replace(base, params=(1, -0.0, "a", ("b",))),
            dataclasses.replace(base, params=(1, 0.0, "a", "b")),
        )
    }
    keys.add(spec_key(base, dataclasses.replace(target, features="+sse2")))
    keys.add(spec_key(base, dataclasses.replace(target, l2_bytes=1)))
    cache_module._environment_digest.cache_clear()
    monkeypatch.setattr(cache_module, "source_digest", lambda template, common: "other sources")
    keys.add(spec_key(base, target))
    cache_module._environment_digest.cache_clear()
    assert len(keys) == 9


def test_sources_behind_a_template():
    executor = cache_module.source_digest("executor:render")
    assert executor == cache_module.source_digest("executor:other")
    assert executor != cache_module.source_digest("gemm:render")
    assert cache_module.source_digest("kgraph.codegen.cpu.gemm:render") == cache_module.source_digest("gemm:render")
    _, imports = sources.module_source("kgraph.codegen.cpu.resize")
    assert "kgraph.ops.resize" in imports  # its weights are tables in the kernels
    _, imports = sources.module_source("kgraph.codegen.cpu.executor")
    assert "kgraph.runtime.layout" in imports
    _, imports = sources.module_source("kgraph.codegen.cpu.gemm")
    assert any(name.startswith("kgraph.codegen.cpu.") for name in imports)
    # Imports in all forms, and those within functions.
    text = "from kgraph.a import (\n    b,\n    c as d,\n)\n    import kgraph.e\nfrom kgraph.f import g, h  # x\n"
    assert [m[0] or m[2] for m in sources._IMPORT.findall(text)] == ["kgraph.a", "kgraph.e", "kgraph.f"]


def test_hits_and_misses_are_counted(tmp_path, monkeypatch):
    monkeypatch.setenv("KGRAPH_CACHE_DIR", str(tmp_path))
    before = compiler.stats()
    first = compiler.compile_specs([EXECUTOR, EXECUTOR])
    second = compiler.compile_specs([EXECUTOR])
    after = compiler.stats()
    assert first == second
    assert list(first) == [spec_key(EXECUTOR)]
    assert after["misses"] - before["misses"] == 1
    assert after["hits"] - before["hits"] == 1


def test_failing_renderer_names_the_kernel(tmp_path, monkeypatch):
    monkeypatch.setenv("KGRAPH_CACHE_DIR", str(tmp_path))
    with pytest.raises(CompileError, match=r"kernel gemm_x: its renderer executor:nothing failed"):
        compiler.compile_spec(KernelSpec("gemm_x", "executor:nothing", ()))
    with pytest.raises(CompileError, match="refuses its IR"):
        compile_ir("define void @kernel( {")


# Kernels in a module of their own below kgraph.codegen.cpu, as the children of a parallel compilation import them.
_SCRIPT = """
import sys, types
from tests.runtime import kernels
module = types.ModuleType("kgraph.codegen.cpu.samples")
def render(params, target):
    if params[0] == "fail":
        raise RuntimeError("bad luck")
    if params[0] == "die":
        import os
        if os.getpid() != parent:
            os._exit(3)
    return kernels.ADD_ONE.replace("1.0", f"{float(params[1]):.1f}")
module.render = render
sys.modules[module.__name__] = module
import os
parent = os.getpid()
from kgraph.codegen import compiler
from kgraph.codegen.cache import spec_key
from kgraph.codegen.kernel import KernelSpec
specs = [KernelSpec(f"k{i}", "samples:render", ("die" if i % 5 == 0 else "fine", i)) for i in range(20)]
calls = []
out = compiler.compile_specs(specs, progress=lambda done, total: calls.append((done, total)))
assert set(out) == {spec_key(s) for s in specs}, len(out)
assert calls == [(i + 1, calls[0][1]) for i in range(len(calls))], calls
import hashlib
print(compiler.stats()["misses"], hashlib.sha256(b"".join(out[spec_key(s)] for s in specs)).hexdigest())
"""


def _run(tmp_path, script, **environment):
    here = os.path.dirname(__file__)
    root = os.path.dirname(os.path.dirname(here))
    env = dict(os.environ, KGRAPH_CACHE_DIR=str(tmp_path), PYTHONPATH=root, **environment)
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)


def test_concurrent_processes_share_the_cache(tmp_path):
    processes = [_run(tmp_path, _SCRIPT) for _ in range(3)]
    answers = []
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err.decode()
        answers.append(out.split()[1])
    assert len(set(answers)) == 1
    out, err = _run(tmp_path, _SCRIPT).communicate(timeout=60)
    assert out.split() == [b"0", answers[0]], err.decode()


def test_children_that_die_and_serial_compilation_give_the_same(tmp_path):
    answers = []
    for name, count in (("a", "1"), ("b", "4")):
        out, err = _run(tmp_path / name, _SCRIPT, KGRAPH_COMPILE_PROCESSES=count).communicate(timeout=60)
        assert out.split()[0] == b"20", err.decode()
        answers.append(out.split()[1])
    assert answers[0] == answers[1]


def test_fault_in_a_child_is_reported(tmp_path):
    script = _SCRIPT.replace('"fine", i)', '"fail" if i == 17 else "fine", i)')
    _, err = _run(tmp_path, script, KGRAPH_COMPILE_PROCESSES="2").communicate(timeout=60)
    assert b"kernel k17: its renderer samples:render failed: bad luck" in err, err
