"""Exported C libraries give, bit for bit, what the compiled model gives on the same level of the instruction set."""

from __future__ import annotations

import ctypes
import os
import subprocess
import threading

import keras
import numpy as np
import pytest

import kgraph
from benchmarks import models
from kgraph.codegen.target import host_target, make_target
from kgraph.compiler import compile_graph
from kgraph.errors import CompileError, UnsupportedError
from tests.c_export.library import (
    INVALID_ARGUMENT,
    NO_WEIGHTS,
    TOO_SMALL,
    WRONG_SHAPE,
    WRONG_WEIGHTS,
    CLibrary,
    Pointer,
    StatusError,
)

LEVEL = "x86-64-v4" if host_target().has("avx512f") else "x86-64-v3"


def at_level(compiled, level: str, arrays) -> list[np.ndarray]:
    """What the program gives that is compiled in this process for a level."""
    (form,) = compiled._saved().forms
    program = compile_graph(form.graph, target=make_target(level))
    program.set_params(form.values)
    return list(program.program(arrays))


def convnet():
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((20, 20, 3)),
            layers.Conv2D(8, 3, padding="same", use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.DepthwiseConv2D(3, strides=2),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(10, activation="softmax"),
        ],
        name="small-convnet 1",
    )


def recurrent():
    inputs = keras.Input((None, 6))
    x = keras.layers.Bidirectional(keras.layers.LSTM(9, return_sequences=True))(inputs)
    return keras.Model(inputs, [keras.layers.GRU(5)(x), x], name="recurrent")


def transformer():
    return models.transformer(blocks=2, width=32, heads=4, feed_forward=64, tokens=16, vocabulary=50)


def quantised():
    layers = keras.layers
    inputs = keras.Input((13,))
    model = keras.Model(inputs, layers.Dense(9)(layers.Dense(37, activation="relu")(inputs)), name="quantised")
    model.quantize("int8", filters=lambda layer: not isinstance(layer, layers.InputLayer))
    return model


RNG = np.random.default_rng(0)
CASES = {
    "quantised": (quantised, lambda n: [RNG.random((n, 13)).astype("float32")]),
    "convnet": (convnet, lambda n: [RNG.random((n, 20, 20, 3)).astype("float32")]),
    "recurrent": (recurrent, lambda n: [RNG.random((n, 3 + n % 5, 6)).astype("float32")]),
    "transformer": (transformer, lambda n: [RNG.integers(0, 50, (n, 16)).astype("int32")]),
    "mlp": (models.mlp, lambda n: [RNG.random((n, 784)).astype("float32")]),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """name -> (compiled model, library), each made once."""
    made: dict = {}

    def get(name: str):
        if name not in made:
            build, _ = CASES[name]
            model = build()
            models.fill_weights(model)
            compiled = kgraph.compile(model)
            folder = tmp_path_factory.mktemp(name)
            files = compiled.export(folder, name=name, levels=[LEVEL])
            assert sorted(p.name for p in folder.iterdir()) == sorted(
                [f"{name}.c", f"{name}.h", f"lib{name}.a", f"lib{name}.so"]
            )
            made[name] = compiled, CLibrary(files.shared, name), files
        return made[name]

    return get


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_bit_for_bit_those_of_the_compiled_model(exported, name):
    compiled, library, _ = exported(name)
    assert library.level == LEVEL
    pool, memory = library.pool(2)
    for rows in (1, 3, 16, 0):
        arrays = CASES[name][1](rows)
        wanted = at_level(compiled, LEVEL, arrays)
        for got in (library(*arrays), library(*arrays, threads=2, pool=pool), library(*arrays, threads=2)):
            for g, w in zip(got, wanted, strict=True):
                np.testing.assert_array_equal(g, w)
    library.ask("pool_stop", pool)
    del memory


def test_many_threads_call_at_once(exported):
    compiled, library, _ = exported("convnet")
    arrays = CASES["convnet"][1](4)
    (wanted,) = at_level(compiled, LEVEL, arrays)
    pool, memory = library.pool(2)
    plan = library.plan([a.shape for a in arrays], threads=2)
    wrong = []

    def work():
        for _ in range(50):
            (got,) = plan(*arrays, pool=pool)
            if not np.array_equal(got, wanted):
                wrong.append(got)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    library.ask("pool_stop", pool)
    assert not wrong
    del memory


def test_a_forked_child_calls_alone(exported):
    compiled, library, _ = exported("convnet")
    arrays = CASES["convnet"][1](4)
    (wanted,) = at_level(compiled, LEVEL, arrays)
    pool, memory = library.pool(2)
    plan = library.plan([a.shape for a in arrays], threads=2)
    plan(*arrays, pool=pool)
    child = os.fork()
    if child == 0:
        (got,) = plan(*arrays, pool=pool)
        os._exit(0 if np.array_equal(got, wanted) else 1)
    assert os.waitpid(child, 0)[1] == 0
    library.ask("pool_stop", pool)
    del memory


def test_faults_are_statuses(exported):
    _, library, _ = exported("convnet")
    for shapes, status in [([(1, 20, 21, 3)], WRONG_SHAPE), ([(-1, 20, 20, 3)], WRONG_SHAPE)]:
        with pytest.raises(StatusError) as caught:
            library.plan(shapes)
        assert caught.value.status == status
    with pytest.raises(StatusError) as caught:
        library.plan([(1, 20, 20, 3)], threads=0)
    assert caught.value.status == INVALID_ARGUMENT
    plan = library.plan([(1, 20, 20, 3)])
    plan.workspace_bytes -= 1
    with pytest.raises(StatusError) as caught:
        plan(np.zeros((1, 20, 20, 3), np.float32))
    assert caught.value.status == TOO_SMALL
    assert library.ask("run", None, None, None, 0, None, None) == INVALID_ARGUMENT
    assert not library.ask("input", 1)
    assert not library.ask("output", -1)
    with pytest.raises(StatusError) as caught:
        library.call("pool_start", None, ctypes.c_size_t(0), 2, ctypes.byref(Pointer()))
    assert caught.value.status == INVALID_ARGUMENT


def test_what_the_library_says_of_itself(exported):
    _, library, files = exported("recurrent")
    info = library.info("input", 0)
    assert (info.shape, info.np_dtype) == ((-1, -1, 6), np.dtype("float32"))
    assert [library.info("output", i).shape for i in range(2)] == [(-1, 5), (-1, -1, 18)]
    text = files.header.read_text()
    assert "float32[N, L1, 6]" in text or "float32[N" in text


def test_library_needs_only_libc_and_shows_only_its_own_functions(exported):
    _, _, files = exported("transformer")
    needed = subprocess.run(["readelf", "-d", files.shared], capture_output=True, text=True, check=True).stdout
    libraries = {line.split("[")[1].rstrip("]") for line in needed.splitlines() if "NEEDED" in line}
    assert libraries <= {"libc.so.6", "libm.so.6", "libpthread.so.0"}
    assert "TEXTREL" not in needed
    shown = subprocess.run(["nm", "-D", "--defined-only", files.shared], capture_output=True, text=True, check=True)
    assert {line.split()[2].partition("_")[0] for line in shown.stdout.splitlines()} == {"transformer"}


def test_weights_in_a_file(tmp_path):
    model = models.tiny_mlp()
    models.fill_weights(model)
    compiled = kgraph.compile(model)
    files = compiled.export(tmp_path, name="net", levels=[LEVEL], weights="file")
    library = CLibrary(files.shared, "net")
    x = RNG.random((5, 32)).astype("float32")
    with pytest.raises(StatusError) as caught:
        library(x)
    assert caught.value.status == NO_WEIGHTS
    content = files.weights.read_bytes()
    other = tmp_path / "other"
    for wrong in (content[:-1], bytes(len(content)), b""):
        other.write_bytes(wrong)
        with pytest.raises(StatusError) as caught:
            library.call("open_weights", str(other).encode())
        assert caught.value.status == WRONG_WEIGHTS
    library.call("open_weights", str(files.weights).encode())
    (wanted,) = at_level(compiled, LEVEL, [x])
    np.testing.assert_array_equal(library(x)[0], wanted)


def test_the_best_level_that_the_processor_has_is_taken(tmp_path):
    compiled = kgraph.compile(models.tiny_mlp())
    files = compiled.export(tmp_path, name="net", levels=["x86-64-v2", "x86-64-v4", "x86-64-v3"])
    assert files.levels == ("x86-64-v4", "x86-64-v3", "x86-64-v2")
    assert CLibrary(files.shared, "net").level == LEVEL


def test_wrong_arguments(tmp_path):
    compiled = kgraph.compile(models.tiny_mlp())
    with pytest.raises(ValueError, match="expected 'c' or 'onnx'"):
        compiled.export(tmp_path, format="tar")
    with pytest.raises(ValueError, match="cannot be part"):
        compiled.export(tmp_path, name="a b")
    with pytest.raises(ValueError, match="levels"):
        compiled.export(tmp_path, levels=["avx"])
    with pytest.raises(ValueError, match="machine"):
        compiled.export(tmp_path, machine="z80")
    with pytest.raises(CompileError, match="false"):
        compiled.export(tmp_path, compiler="false")
    inputs = keras.Input((4, 4))
    host = kgraph.compile(keras.Model(inputs, keras.ops.linalg.eigh(inputs)[0]))
    with pytest.raises(UnsupportedError, match="eigh"):
        host.export(tmp_path)
