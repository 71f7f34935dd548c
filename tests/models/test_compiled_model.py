"""The contract of a compiled model: sizes, weights, threads, fork, memory, wrong inputs."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers, ops

import kgraph
from kgraph.errors import InputError


def make_mlp():
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((12,), name="x"), layers.Dense(16, "relu"), layers.Dense(4, "softmax")])


def make_convnet():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((12, 12, 3))
    x = layers.Conv2D(8, 3, activation="relu")(inputs)
    x = layers.BatchNormalization()(x)
    x = layers.MaxPooling2D(2)(x)
    return keras.Model(inputs, layers.Dense(5)(layers.Flatten()(x)))


def rows(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def test_one_compile_serves_every_batch_size():
    model = make_convnet()
    compiled = kgraph.compile(model)
    for batch in (1, 7, 32, 3, 0):
        x = rows(batch, 12, 12, 3)
        y = compiled(x)
        assert y.shape == (batch, 5)
        if batch:
            np.testing.assert_allclose(y, np.asarray(model(x)), rtol=1e-4, atol=1e-5)
    assert compiled.stats()["compiles"] == 1
    assert compiled.stats()["specialised"] is None


def test_one_compile_serves_several_lengths():
    inputs = keras.Input((None,), dtype="int32")
    x = layers.Embedding(50, 16)(inputs)
    x = layers.MultiHeadAttention(2, 8)(x, x)
    model = keras.Model(inputs, layers.GlobalAveragePooling1D()(x))
    compiled = kgraph.compile(model)
    for batch, length in ((1, 5), (3, 17), (2, 64), (3, 5)):
        x = np.random.default_rng(0).integers(0, 50, (batch, length)).astype("int32")
        np.testing.assert_allclose(compiled(x), np.asarray(model(x)), rtol=1e-4, atol=1e-5)
    assert compiled.stats()["compiles"] == 1


def test_predict_with_a_last_partial_batch():
    model = make_mlp()
    compiled = kgraph.compile(model)
    x = rows(75, 12)
    y = compiled.predict(x, batch_size=32)
    np.testing.assert_allclose(y, compiled(x), rtol=1e-6, atol=1e-7)
    assert compiled.stats()["compiles"] == 1
    assert compiled.predict(x[:0]).shape == (0, 4)


def test_rows_do_not_depend_on_their_batch():
    compiled = kgraph.compile(make_convnet())
    x = rows(9, 12, 12, 3)
    np.testing.assert_allclose(compiled(x)[4:5], compiled(x[4:5]), rtol=1e-6, atol=1e-7)


def test_weights_are_current_after_set_weights_and_assign():
    model = make_convnet()
    compiled = kgraph.compile(model)
    frozen = kgraph.compile(model, freeze=True)
    x = rows(2, 12, 12, 3)
    before = compiled(x)
    model.set_weights([np.asarray(w) + 0.1 for w in model.get_weights()])
    np.testing.assert_allclose(compiled(x), np.asarray(model(x)), rtol=1e-4, atol=1e-4)
    assert np.abs(compiled(x) - before).max() > 1e-3
    np.testing.assert_array_equal(frozen(x), before)
    layer = model.layers[-1]
    layer.bias.assign(layer.bias + 3.0)
    np.testing.assert_allclose(compiled(x), np.asarray(model(x)), rtol=1e-4, atol=1e-4)


def test_nan_weights_are_allowed():
    model = make_mlp()
    weights = model.get_weights()
    weights[0][0, 0] = np.nan
    model.set_weights(weights)
    assert np.isnan(kgraph.compile(model)(rows(2, 12))).any()


def test_strided_and_other_dtypes():
    model = make_mlp()
    compiled = kgraph.compile(model)
    wide = rows(8, 24)
    np.testing.assert_array_equal(compiled(wide[::2, ::2]), compiled(np.ascontiguousarray(wide[::2, ::2])))
    np.testing.assert_allclose(compiled(wide[:, :12].astype("float64")), compiled(wide[:, :12]), rtol=1e-6)
    np.testing.assert_allclose(compiled(np.ones((2, 12), "int64")), compiled(np.ones((2, 12), "float32")))
    np.testing.assert_allclose(compiled([[1.0] * 12]), compiled(np.ones((1, 12), "float32")))
    column_major = np.asfortranarray(wide[:, :12])
    np.testing.assert_array_equal(compiled(column_major), compiled(np.ascontiguousarray(column_major)))


def test_out_is_written():
    compiled = kgraph.compile(make_mlp())
    x = rows(3, 12)
    out = np.empty((3, 4), "float32")
    result = compiled(x, out=out)
    np.testing.assert_array_equal(out, compiled(x))
    assert result is out


def test_results_are_fresh_arrays():
    compiled = kgraph.compile(make_mlp())
    x = rows(3, 12)
    first = compiled(x)
    kept = first.copy()
    compiled(x * 2)
    np.testing.assert_array_equal(first, kept)


def test_same_bits_for_any_number_of_threads():
    compiled = kgraph.compile(make_convnet())
    x = rows(16, 12, 12, 3)
    try:
        results = []
        for threads in (1, 2, 3):
            kgraph.set_num_threads(threads)
            results.append(compiled(x))
    finally:
        kgraph.set_num_threads(None)
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def test_sixteen_threads_call_one_model():
    compiled = kgraph.compile(make_mlp())
    inputs = [rows(1 + i % 3, 12, seed=i) for i in range(16)]
    expected = [compiled(x) for x in inputs]
    wrong = []

    def work(i):
        for _ in range(1000):
            if not np.array_equal(compiled(inputs[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_calls_after_fork():
    compiled = kgraph.compile(make_convnet())
    x = rows(8, 12, 12, 3)
    expected = compiled(x)
    stop = threading.Event()

    def keep_calling():
        while not stop.is_set():
            compiled(x)

    thread = threading.Thread(target=keep_calling)
    thread.start()
    children = []
    try:
        for _ in range(4):
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    signal.alarm(60)
                    status = 0 if all(np.array_equal(compiled(x), expected) for _ in range(20)) else 2
                finally:
                    os._exit(status)
            children.append(pid)
        assert all(os.waitpid(pid, 0)[1] == 0 for pid in children)
    finally:
        stop.set()
        thread.join()


def anonymous_memory_kb() -> int:
    """Resident memory without pages of files, which come and go with the page cache."""
    (line,) = [text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith("RssAnon")]
    return int(line.split()[1])


def memory_growth_kb(compiled, x, calls: int) -> int:
    for _ in range(2000):
        compiled(x)
    before = anonymous_memory_kb()
    for _ in range(calls):
        compiled(x)
    return anonymous_memory_kb() - before


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")


@needs_proc
def test_memory_is_flat():
    assert memory_growth_kb(kgraph.compile(make_mlp()), rows(1, 12), 50_000) < 512


@needs_proc
@pytest.mark.long
def test_memory_is_flat_over_a_million_calls():
    assert memory_growth_kb(kgraph.compile(make_mlp()), rows(1, 12), 1_000_000) < 512


def two_inputs():
    a, b = keras.Input((4,), name="left"), keras.Input((4,), name="right")
    return keras.Model({"left": a, "right": b}, {"sum": a + b, "product": a * b})


def test_dict_structure():
    compiled = kgraph.compile(two_inputs())
    left, right = rows(2, 4), rows(2, 4, seed=1)
    result = compiled({"left": left, "right": right})
    np.testing.assert_allclose(result["sum"], left + right)
    np.testing.assert_allclose(result["product"], left * right)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (lambda: (rows(2, 13),), ["x", "13"]),
        (lambda: (rows(12),), ["x"]),
        (lambda: (rows(2, 3, 12),), ["x"]),
        (lambda: (np.array([["a"] * 12]),), ["x", "float32" if False else "f32"]),
        (lambda: (np.ones((2, 12), "complex64"),), ["x", "complex"]),
        (lambda: (None,), ["x"]),
        (lambda: (rows(2, 12), rows(2, 12)), []),
        (lambda: (), []),
    ],
)
def test_wrong_input_names_what_was_expected(arguments, words):
    compiled = kgraph.compile(make_mlp())
    with pytest.raises((InputError, TypeError)) as caught:
        compiled(*arguments())
    for word in words:
        assert word in str(caught.value)


def test_missing_and_unknown_keys_are_named():
    compiled = kgraph.compile(two_inputs())
    with pytest.raises(InputError, match="right"):
        compiled({"left": rows(2, 4)})
    with pytest.raises(InputError):
        compiled({"left": rows(2, 4), "right": rows(2, 4), "middle": rows(2, 4)})
    with pytest.raises(InputError):
        compiled({"left": rows(2, 4), "right": rows(3, 4)})


def test_host_steps_are_reported():
    inputs = keras.Input((4, 4))

    class Inverse(layers.Layer):
        def call(self, x):
            return ops.linalg.inv(x + 4 * ops.eye(4))

    model = keras.Model(inputs, Inverse()(inputs))
    compiled = kgraph.compile(model)
    x = rows(3, 4, 4)
    np.testing.assert_allclose(compiled(x), np.linalg.inv(x + 4 * np.eye(4, dtype="float32")), rtol=1e-4, atol=1e-5)
    steps = compiled.explain().host_steps
    assert [s.label for s in steps] == ["inv"]
    assert steps[0].reason


def test_explain_and_profile_name_layers():
    model = make_convnet()
    compiled = kgraph.compile(model)
    text = str(compiled.explain())
    assert "conv2d" in text
    profile = compiled.profile(rows(2, 12, 12, 3), repeats=3)
    assert profile.flops > 0
    assert profile.milliseconds > 0
    assert any("conv2d" in layer for layer in profile.layers)


def test_networkx_view_has_the_order_and_the_types():
    import networkx

    view = kgraph.compile(make_convnet()).to_networkx()
    assert networkx.is_directed_acyclic_graph(view)
    assert [view.nodes[n]["kind"] for n in view].count("input") == 1
    assert any("f32[N,12,12,3]" in data["type"] for _, _, data in view.edges(data=True))


def test_data_dependent_python_specialises_and_says_so():
    inputs = keras.Input((None, 3))

    class Halves(layers.Layer):
        def call(self, x):
            count = 2 if int(x.shape[1]) > 4 else 1
            return x * count

        def compute_output_spec(self, x):
            return keras.KerasTensor(x.shape, x.dtype)

    model = keras.Model(inputs, Halves()(inputs))
    compiled = kgraph.compile(model)
    np.testing.assert_array_equal(compiled(np.ones((2, 6, 3), "float32")), 2)
    np.testing.assert_array_equal(compiled(np.ones((2, 3, 3), "float32")), 1)
    assert compiled.stats()["compiles"] == 2
    assert compiled.stats()["specialised"]


def test_jit():
    @kgraph.jit
    def function(x, y):
        return {"a": ops.tanh(x) + y, "b": ops.sum(x)}

    x, y = rows(3, 4), rows(4)
    result = function(x, y)
    np.testing.assert_allclose(result["a"], np.tanh(x) + y, rtol=1e-6)
    np.testing.assert_allclose(result["b"], x.sum(), rtol=1e-5)
    assert function(rows(5, 4), y)["a"].shape == (5, 4)


def test_optimised_kernel_count_of_the_convnet():
    """Convolution with bias, normalisation and activation is one kernel; flatten costs nothing."""
    compiled = kgraph.compile(make_convnet())
    assert len(compiled.explain().kernels) <= 4
    assert not compiled.explain().host_steps
