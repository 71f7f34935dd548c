"""Exported training steps go on bit for bit as the step in Python does."""

from __future__ import annotations

import json
import struct

import keras
import numpy as np
import pytest

import kgraph
from benchmarks import models
from kgraph.codegen.target import host_target
from tests.c_export.library import IO, WRONG_WEIGHTS, CLibrary, Pointer, Size, StatusError

LEVEL = "x86-64-v4" if host_target().has("avx512f") else "x86-64-v3"
ROWS = 6


@pytest.fixture(scope="module", autouse=True)
def same_level():
    """The Python side computes on the level of the library."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KGRAPH_CPU", LEVEL)
        host_target.cache_clear()
        yield
    host_target.cache_clear()


def convnet():
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((10, 10, 2)),
            layers.Conv2D(6, 3),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Flatten(),
            layers.Dropout(0.4),
            layers.Dense(3),
        ],
        name="convnet",
    )


BUILDS = {"convnet": (convnet, (10, 10, 2), 3), "tiny_mlp": (models.tiny_mlp, (32,), 1)}


def batches(shape, outputs, count=4):
    rng = np.random.default_rng(2)
    return [
        (rng.random((ROWS, *shape)).astype("float32"), rng.random((ROWS, outputs)).astype("float32"))
        for _ in range(count)
    ]


@pytest.fixture(params=["convnet:adam", "convnet:sgd", "tiny_mlp:adamw"])
def trained(request, tmp_path):
    """(model, step, batches, library with the state at the export)"""
    name, optimizer = request.param.split(":")
    build, shape, outputs = BUILDS[name]
    keras.utils.set_random_seed(5)
    model = build()
    model.compile(optimizer=optimizer, loss="mse", metrics=["mae"])
    data = batches(shape, outputs)
    step = kgraph.compile_step(model, data[0])
    step(data[0])
    files = step.export(tmp_path, name="step", levels=[LEVEL])
    return model, step, data, CLibrary(files.shared, "step"), tmp_path


def new_state(library: CLibrary) -> np.ndarray:
    state = np.full(library.ask("state_bytes"), 0xA5, np.uint8)
    library.call("state_init", Pointer(state.ctypes.data), Size(state.nbytes))
    return state


def read(library: CLibrary, state: np.ndarray) -> dict[str, np.ndarray]:
    """The tensors of a state by name."""
    out = {}
    for number in range(library.ask("num_states")):
        info = library.info("state_info", number)
        at = library.ask("state_data", Pointer(state.ctypes.data), number) - state.ctypes.data
        count = int(np.prod(info.shape, dtype=int)) * info.np_dtype.itemsize
        out[info.name.decode()] = state[at : at + count].view(info.np_dtype).reshape(info.shape).copy()
    return out


def test_steps_are_bit_for_bit_the_same(trained):
    model, step, data, library, _ = trained
    state = new_state(library)
    pool, memory = library.pool(2)
    plan = library.plan([a.shape for a in data[0]], threads=2)
    names = [library.info("output", i).name.decode() for i in range(library.ask("num_outputs"))]
    for batch in data:
        wanted = step(batch)
        got = plan(*batch, pool=pool, state=state, function="train_step")
        for name, value in zip(names, got, strict=True):
            np.testing.assert_array_equal(value, wanted[name])
    found = read(library, state)
    for variable in model.trainable_variables:
        np.testing.assert_array_equal(found[variable.path], variable.numpy())
    library.ask("pool_stop", pool)
    del memory


def test_state_is_saved_and_loaded(trained):
    _, _, data, library, folder = trained
    state = new_state(library)
    plan = library.plan([a.shape for a in data[0]])
    plan(*data[0], state=state, function="train_step")
    path = str(folder / "saved.safetensors").encode()
    library.call("save_weights", Pointer(state.ctypes.data), path)
    content = (folder / "saved.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    wanted = read(library, state)
    for name, tensor in header.items():
        begin, end = tensor["data_offsets"]
        assert content[8 + length + begin : 8 + length + end] == wanted[name].tobytes()
    assert set(header) == set(wanted)
    other = new_state(library)
    library.call("load_weights", Pointer(other.ctypes.data), path)
    for name, array in read(library, other).items():
        np.testing.assert_array_equal(array, wanted[name])
    plan(*data[1], state=state, function="train_step")
    plan(*data[1], state=other, function="train_step")
    for name, array in read(library, other).items():
        np.testing.assert_array_equal(array, read(library, state)[name])


def test_damaged_files_change_nothing(trained):
    *_, library, folder = trained
    state = new_state(library)
    before = state.copy()
    path = folder / "saved.safetensors"
    library.call("save_weights", Pointer(state.ctypes.data), str(path).encode())
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    damaged = [content[: rng.integers(0, len(content))] for _ in range(20)]
    damaged += [struct.pack("<Q", n) + content[8:] for n in (0, 3, len(content), 2**63, 2**64 - 1)]
    damaged += [content.replace(b"data_offsets", b"data_offsetz")]
    for wrong in damaged:
        path.write_bytes(wrong)
        with pytest.raises(StatusError) as caught:
            library.call("load_weights", Pointer(state.ctypes.data), str(path).encode())
        assert caught.value.status == WRONG_WEIGHTS
    np.testing.assert_array_equal(state, before)
    with pytest.raises(StatusError) as caught:
        library.call("load_weights", Pointer(state.ctypes.data), str(folder / "none").encode())
    assert caught.value.status == IO


def test_weights_as_state_of_a_forward_pass(tmp_path):
    keras.utils.set_random_seed(7)
    model = convnet()
    compiled = kgraph.compile(model)
    files = compiled.export(tmp_path, name="net", levels=[LEVEL], weights="state")
    library = CLibrary(files.shared, "net")
    x = np.random.default_rng(0).random((5, 10, 10, 2)).astype("float32")
    (got,) = library.plan([x.shape])(x, state=new_state(library))
    np.testing.assert_allclose(got, compiled(x), rtol=2e-5, atol=2e-6)
