"""The example programs of `examples/embed`: built, run, and compared with the compiled model bit for bit."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLES = ROOT / "examples" / "embed"
LEVEL = "x86-64-v3"
MODELS = ["convnet", "transformer", "lstm"]
WARNINGS = ["-O2", "-Wall", "-Wextra", "-Werror"]

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the examples are made for x86-64-v3")


def needs(*programs: str):
    missing = [p for p in programs if shutil.which(p) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} is not installed")


def run(*command, folder: Path, **environment) -> str:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "KGRAPH_CPU": LEVEL, **environment}
    done = subprocess.run([str(c) for c in command], cwd=folder, capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def same(folder: Path, output: str, name: str) -> bool:
    return (folder / output).read_bytes() == (folder / f"{name}.expected").read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The models' libraries, artifacts, inputs and expected outputs."""
    out = tmp_path_factory.mktemp("embed")
    run(sys.executable, EXAMPLES / "models.py", out, folder=out)
    return out


def build_c(folder: Path, name: str, program: str, *options: str, libraries=None) -> Path:
    target = folder / f"{program}_{name}"
    libraries = libraries or [f"lib{name}.a"]
    source = EXAMPLES / f"{program}.c"
    command = ["cc", *WARNINGS, *options, f"-DMODEL={name}", "-include", f"{name}.h", source, *libraries]
    run(*command, "-lm", "-lpthread", "-o", target, folder=folder)
    return target


@needs("cc")
@pytest.mark.parametrize("name", MODELS)
def test_c(folder, name):
    program = build_c(folder, name, "run")
    for threads in (1, 2):
        run(program, f"{name}.input", f"{name}.c_output", threads, 3, folder=folder)
        assert same(folder, f"{name}.c_output", name)


@needs("c++")
@pytest.mark.parametrize("name", MODELS)
def test_cpp(folder, name):
    command = ["c++", "-std=c++17", *WARNINGS, f"-DMODEL={name}", "-include", f"{name}.h", EXAMPLES / "run.cpp"]
    run(*command, "-L.", f"-l{name}", "-o", f"run_cpp_{name}", folder=folder)
    run(f"./run_cpp_{name}", f"{name}.input", f"{name}.cpp_output", folder=folder, LD_LIBRARY_PATH=".")
    assert same(folder, f"{name}.cpp_output", name)


@needs("rustc", "cc")
def test_rust(folder):
    run("rustc", "-O", EXAMPLES / "run.rs", "-o", "run_rust", folder=folder)
    for name in MODELS:
        run("./run_rust", f"./lib{name}.so", name, f"{name}.input", f"{name}.rust_output", folder=folder)
        assert same(folder, f"{name}.rust_output", name)


@pytest.mark.parametrize("name", MODELS)
def test_python(folder, name):
    text = run(
        sys.executable, EXAMPLES / "run.py", f"{name}.kgraph", f"{name}.input", f"{name}.py_output", folder=folder
    )
    assert "keras loaded: False" in text
    assert same(folder, f"{name}.py_output", name)


@needs("cc")
@pytest.mark.parametrize(("name", "calls"), [("tiny_mlp", 100_000), ("convnet", 100)])
def test_eight_threads(folder, name, calls):
    program = build_c(folder, name, "threads")
    assert "0 wrong" in run(program, f"{name}.input", f"{name}.expected", 8, calls, folder=folder)


@needs("cc")
@pytest.mark.parametrize(("name", "calls"), [("tiny_mlp", 100_000), ("convnet", 200)])
def test_no_data_race(tmp_path, name, calls):
    script = (
        f"import sys; sys.path.insert(0, {str(EXAMPLES)!r}); import models, kgraph; from pathlib import Path\n"
        f"model = models.{name}(); compiled = kgraph.compile(model); x = models.example_input(model, 5)\n"
        f"compiled.export('.', levels=['{LEVEL}'], keep_objects=True)\n"
        "x.tofile('input'); compiled(x).tofile('expected')"
    )
    run(sys.executable, "-c", script, folder=tmp_path)
    objects = sorted(p.name for p in tmp_path.glob("kgk_*.o"))
    options = ["-g", "-O1", "-std=gnu11", "-fsanitize=thread", f"-DMODEL={name}", "-include", f"{name}.h"]
    command = ["cc", *options, f"{name}.c", EXAMPLES / "threads.c", *objects, "-lm", "-lpthread", "-o", "threads"]
    built = subprocess.run([str(c) for c in command], cwd=tmp_path, capture_output=True, text=True)
    if built.returncode and "libtsan" in built.stderr:
        pytest.skip("the compiler has no ThreadSanitizer")
    assert built.returncode == 0, built.stderr
    assert "0 wrong" in run("./threads", "input", "expected", 8, calls, folder=tmp_path)


@needs("valgrind", "cc")
def test_no_memory_fault(folder):
    program = build_c(folder, "convnet", "threads", "-g")
    command = ["valgrind", "--error-exitcode=9", "--leak-check=full", program]
    run(*command, "convnet.input", "convnet.expected", 2, 3, folder=folder)


@needs("valgrind", "cc")
def test_calls_allocate_nothing(folder):
    program = build_c(folder, "tiny_mlp", "run", "-g")
    text = [
        run("valgrind", program, "tiny_mlp.input", "tiny_mlp.c_output", 2, calls, folder=folder) for calls in (1, 1000)
    ]
    once, often = (t.split("total heap usage:")[1].split("allocs")[0].strip() for t in text)
    assert once == often


@needs("cc")
def test_training_in_c(tmp_path):
    pytest.importorskip("sklearn")
    run(sys.executable, EXAMPLES / "training.py", tmp_path, folder=tmp_path)
    command = ["cc", *WARNINGS, "-I.", EXAMPLES / "train.c", "libdigits_step.a", "libdigits.a", "-lm", "-lpthread"]
    run(*command, "-o", "train", folder=tmp_path)
    text = run("./train", ".", 12, folder=tmp_path)
    assert float(text.split("test accuracy")[1]) >= 0.97


AARCH64_ROOT = Path("/usr/aarch64-linux-gnu")


@needs("aarch64-linux-gnu-gcc", "qemu-aarch64")
@pytest.mark.parametrize("name", MODELS)
def test_aarch64(folder, tmp_path, name):
    script = (
        f"import sys; sys.path.insert(0, {str(EXAMPLES)!r}); import models; from pathlib import Path\n"
        f"models.write(models.{name}, Path('.'), machine='aarch64')"
    )
    run(sys.executable, "-c", script, folder=tmp_path)
    command = ["aarch64-linux-gnu-gcc", *WARNINGS, f"-DMODEL={name}", "-include", f"{name}.h", EXAMPLES / "run.c"]
    run(*command, f"lib{name}.a", "-lm", "-lpthread", "-o", "run", folder=tmp_path)
    run("qemu-aarch64", "-L", AARCH64_ROOT, "./run", f"{name}.input", "output", 2, 2, folder=tmp_path)
    got, wanted = (np.fromfile(tmp_path / n, np.float32) for n in ("output", f"{name}.expected"))
    np.testing.assert_allclose(got, wanted, rtol=2e-6, atol=2e-7)


@pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="ziglang is not installed")
def test_compiler_from_a_package(folder, tmp_path):
    script = (
        f"import sys; sys.path.insert(0, {str(EXAMPLES)!r}); import models, kgraph\n"
        f"model = models.tiny_mlp(); kgraph.compile(model).export('.', levels=['{LEVEL}'])"
    )
    run(sys.executable, "-c", script, folder=tmp_path, PATH=str(tmp_path))
    assert (tmp_path / "libtiny_mlp.so").exists()
