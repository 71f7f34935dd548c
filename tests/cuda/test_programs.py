"""Whole programs in the simulator, against the interpreter and against the CPU: control flow, donation, training."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import kgraph
from kgraph.compiler import compile_graph
from kgraph.errors import DeviceError, DeviceMemoryError, InputError
from kgraph.frontend.tracer import trace
from kgraph.ir import PRIMITIVES, Dim, Graph, TensorType, Value, type_of
from kgraph.ir.interpreter import evaluate
from kgraph.passes.inline_cond import inline_cond
from kgraph.passes.pipeline import TRAINING
from kgraph.runtime.cuda import device as device_module
from kgraph.runtime.cuda.device import device_for
from kgraph.runtime.cuda.device_array import DeviceArray
from kgraph.runtime.cuda.simulator import SimulatorDevice
from kgraph.runtime.steps import HostStep
from kgraph.targets import resolve

N = Dim.symbol("N")
TARGET = resolve("cuda-simulator")
# Conditions stay what they are, however cheap their branches.
PASSES = [p for p in TRAINING if p is not inline_cond]
LOOPS = [
    pytest.param(name, sample, id=f"{name}-{number}")
    for name in ("cond", "while_loop", "scan")
    for number, sample in enumerate(PRIMITIVES[name].samples())
]


@pytest.fixture
def on_the_simulator():
    kgraph.set_device("cuda-simulator")
    yield device_for("cuda-simulator")
    kgraph.set_device("cpu")


def compiled_for_simulator(graph: Graph, **options):
    return compile_graph(graph, passes=PASSES, target=TARGET, **options)


# -- control flow -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "sample"), LOOPS)
def test_control_flow_runs_on_the_device(name, sample):
    arrays = [np.asarray(a) for a in sample.args]
    graph = Graph([Value(type_of(a)) for a in arrays])
    graph.outputs = list(graph.add(PRIMITIVES[name], graph.inputs, **sample.attrs))
    compiled = compiled_for_simulator(graph)
    wanted = evaluate(graph, arrays)
    for given in (arrays, [DeviceArray.copy_of(device_for("cuda-simulator"), a) for a in arrays]):
        for got, expected in zip(compiled.program(given), wanted, strict=True):
            np.testing.assert_allclose(np.asarray(got), expected, rtol=1e-5, atol=1e-6)


# -- calls ------------------------------------------------------------------------------------------------------------
def swap_and_add(x, y):
    from kgraph import ops

    return y, x, ops.add(x, y)


def test_donated_inputs_that_are_outputs_of_one_another():
    types = [TensorType((N, 3), "float32")] * 2
    graph = trace(swap_and_add, *types)
    program = compiled_for_simulator(graph, donations=[(0, 0), (1, 1)]).program
    x, y = (np.arange(6, dtype=np.float32).reshape(2, 3) + i for i in (0, 10))
    first, second = (DeviceArray.copy_of(program.device, a) for a in (x, y))
    for _ in range(3):
        results = program([first, second])
        assert results[0] is first
        assert results[1] is second
        x, y = y, x
        for got, expected in zip(results, (x, y, x + y), strict=True):
            np.testing.assert_array_equal(got, expected)


def small_model(seed: int = 3):
    keras.utils.set_random_seed(seed)
    layers = [
        keras.Input((6,)),
        keras.layers.Dense(5, activation="gelu"),
        keras.layers.Dropout(0.3),
        keras.layers.BatchNormalization(),
        keras.layers.Dense(3, activation="softmax"),
    ]
    model = keras.Sequential(layers)
    model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def data(rows: int = 22):
    return np.random.default_rng(0).normal(size=(rows, 6)).astype(np.float32), np.arange(rows) % 3


def test_models_take_and_give_arrays_on_the_device():
    model, (x, _) = small_model(), data()
    compiled = kgraph.compile(model, target="cuda-simulator")
    device = device_for("cuda-simulator")
    out = compiled(DeviceArray.copy_of(device, x))
    assert isinstance(out, DeviceArray)
    np.testing.assert_allclose(out.numpy(), kgraph.compile(model, target="cpu")(x), rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match=r"expected f32.*float64 on the GPU"):
        compiled(DeviceArray.copy_of(device, x.astype(np.float64)))


def test_results_go_into_arrays_of_the_caller():
    model, (x, _) = small_model(), data()
    out = np.empty((3, 22), np.float32).T
    compiled = kgraph.compile(model, target="cuda-simulator")
    compiled(x, out=out)
    np.testing.assert_array_equal(out, compiled(x))


def test_a_profile_has_a_time_for_every_step():
    compiled = kgraph.compile(small_model(), target="cuda-simulator")
    profile = compiled.profile(data()[0], repeats=1)
    stats = compiled.stats()
    assert len(profile.kernels) == stats["native_steps"] + stats["host_steps"]
    assert all(row.microseconds > 0 for row in profile.kernels)


def test_weights_that_change_are_seen():
    model, (x, _) = small_model(), data()
    compiled = kgraph.compile(model, target="cuda-simulator")
    before = compiled(x)
    model.set_weights([w * 0.5 for w in model.get_weights()])
    after = compiled(x)
    assert np.abs(before - after).max() > 1e-3
    np.testing.assert_allclose(after, kgraph.compile(model, target="cpu")(x), rtol=1e-5, atol=1e-6)


# -- training ---------------------------------------------------------------------------------------------------------
def trained(device: str, **options):
    kgraph.set_device(device)
    try:
        model, (x, y) = small_model(), data()
        options = {"batch_size": 8, "epochs": 2, "verbose": 0, "shuffle": False, **options}
        history = model.fit(x, y, validation_data=(x, y), **options).history
        return history, model.get_weights(), model.predict(x, verbose=0), model
    finally:
        kgraph.set_device("cpu")


def test_training_is_that_of_the_cpu():
    history, weights, outputs, _ = trained("cpu")
    there, weights_there, outputs_there, model = trained("cuda-simulator")
    for name, values in history.items():
        np.testing.assert_allclose(there[name], values, rtol=1e-5)
    for a, b in zip(weights_there, weights, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(outputs_there, outputs, rtol=1e-4, atol=1e-6)
    stats = model._compiled_train_step.stats()
    assert stats["graphs"] > 0


def test_state_stays_on_the_device_between_steps(on_the_simulator, monkeypatch):
    model, (x, y) = small_model(), data(8)
    model.train_on_batch(x, y)
    model.train_on_batch(x, y)
    weight = model.weights[0]
    assert weight.resident is not None
    copied = []
    copy_out = on_the_simulator.copy_out
    monkeypatch.setattr(on_the_simulator, "copy_out", lambda a, address: (copied.append(a.shape), copy_out(a, address)))
    model._compiled_train_step((x, y))
    # What host steps read, and nothing else: no result, no variable.
    program = model._compiled_train_step._last.program
    read = [s for s in program.steps if isinstance(s, HostStep)]
    assert len(copied) == sum(len(s.operands) - s.outputs for s in read)
    copied.clear()
    value = np.asarray(weight)
    assert copied == [weight.shape]
    np.asarray(weight)
    assert len(copied) == 1  # known on the host until the next step
    address = weight.resident.address
    model._compiled_train_step((x, y))
    assert np.abs(np.asarray(weight) - value).max() > 0
    weight.assign(value)
    model._compiled_train_step((x, y))
    assert weight.resident.address == address


def test_a_lost_device_leaves_what_was_last_read(on_the_simulator, monkeypatch):
    model, (x, y) = small_model(), data(8)
    model.train_on_batch(x, y)
    known = model.get_weights()
    model._compiled_train_step((x, y))

    def fail(*_):
        raise DeviceError("the GPU was lost")

    monkeypatch.setattr(on_the_simulator, "copy_out", fail)
    monkeypatch.setattr(SimulatorDevice, "is_lost", True)
    with pytest.warns(RuntimeWarning, match="the value on the GPU is gone"):
        left = model.get_weights()
    for a, b in zip(left, known, strict=True):
        np.testing.assert_array_equal(a, b)


def test_too_little_memory_ends_a_call_and_nothing_else(on_the_simulator, monkeypatch):
    model, (x, y) = small_model(), data(8)
    model.train_on_batch(x, y)
    before = model.get_weights()
    on_the_simulator._reclaim()  # what programs of other tests hold would be given back before memory lacks
    monkeypatch.setattr(on_the_simulator, "_limit", on_the_simulator._used + 512)
    with pytest.raises(DeviceMemoryError, match="bytes were asked for"):
        model._compiled_train_step(tuple(np.repeat(a, 100, axis=0) for a in (x, y)))
    for a, b in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)
    monkeypatch.undo()
    model.train_on_batch(x, y)


# -- choice of the device ---------------------------------------------------------------------------------------------
def test_without_a_gpu_the_target_says_what_is_missing(monkeypatch):
    from kgraph.runtime.cuda import driver

    def no_library(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(driver.ctypes, "CDLL", no_library)
    monkeypatch.setattr(device_module, "_devices", {})
    with pytest.raises(DeviceError, match=r"no NVIDIA driver was found .*kgraph\[cuda\]"):
        kgraph.compile(small_model(), target="cuda")


def test_the_current_device_is_the_default(on_the_simulator):
    assert kgraph.get_device() == "cuda-simulator"
    model = small_model()
    assert "graphs" in kgraph.compile(model).stats()
    assert "graphs" not in kgraph.compile(model, target="cpu").stats()
    kgraph.set_device("cpu")
    assert "graphs" not in kgraph.compile(model).stats()
