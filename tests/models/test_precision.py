"""Models compiled with precision="bf16": what is rounded, the same meaning everywhere, errors that are reported."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import kgraph
from benchmarks import models
from kgraph import precision
from kgraph.ir.interpreter import evaluate
from tests.c_export.library import CLibrary

RNG = np.random.default_rng(0)
SMALL = {"blocks": 1, "width": 32, "heads": 4, "feed_forward": 64, "tokens": 16, "vocabulary": 50}


def built(name: str):
    model = models.transformer(**SMALL) if name == "transformer" else models.MODELS[name]()
    models.fill_weights(model)
    x = RNG.integers(0, 50, (3, 16), "int32") if name == "transformer" else models.example_inputs(name, 3)
    return model, x


def rounded(x):
    return x.astype(ml_dtypes.bfloat16).astype("float32")


@pytest.mark.parametrize(
    ("name", "products", "convolutions"), [("mlp", 3, 0), ("transformer", 7, 0), ("convnet", 1, 2)]
)
def test_what_is_rounded(name, products, convolutions):
    model, x = built(name)
    compiled = kgraph.compile(model, precision="bf16")
    stats = compiled.stats()["precision"]
    assert (stats["name"], stats["rounded_products"], stats["rounded_convolutions"]) == ("bf16", products, convolutions)
    assert f"operands of {products} products and {convolutions} convolutions" in str(compiled.explain())
    # NumPy rounds at the same places; what sums differ by may fall on another side of a rounding.
    (reference,) = evaluate(compiled.captured_graph, [x], compiled._some_variant().weights())
    result = compiled(x)
    np.testing.assert_allclose(result, reference, rtol=2e-3, atol=2e-3 * np.abs(reference).max())
    exact = kgraph.compile(model)(x)
    report = compiled.precision_report(x)
    assert 1e-5 < report.rms < 2e-2
    assert np.sqrt(np.mean((result - exact) ** 2)) == pytest.approx(
        report.rms * np.sqrt(np.mean(exact.astype("float64") ** 2)), rel=0.05
    )


def test_one_layer_is_the_product_of_rounded_operands():
    import keras

    layer = keras.Sequential([keras.Input((70,)), keras.layers.Dense(40, activation="relu")])
    models.fill_weights(layer)
    x = RNG.standard_normal((5, 70)).astype("float32")
    kernel, bias = layer.get_weights()
    wanted = np.maximum(rounded(x) @ rounded(kernel) + bias, 0)
    result = kgraph.compile(layer, precision="bf16")(x)
    np.testing.assert_allclose(result, wanted, rtol=1e-5, atol=1e-5)
    assert np.abs(result - np.maximum(x @ kernel + bias, 0)).max() > 1e-4


def test_a_convolution_is_that_of_rounded_operands():
    import keras

    inputs = keras.Input((6, 6, 3))
    x = keras.layers.Conv2D(8, 3, padding="same", use_bias=False)(inputs)
    model = keras.Model(inputs, keras.layers.BatchNormalization()(x))
    models.fill_weights(model)
    image = RNG.standard_normal((2, 6, 6, 3)).astype("float32")
    result = kgraph.compile(model, precision="bf16")(image)
    weights = model.get_weights()
    model.set_weights([rounded(weights[0]), *weights[1:]])
    np.testing.assert_allclose(result, kgraph.compile(model)(rounded(image)), rtol=1e-5, atol=1e-5)


def test_a_normalised_layer_is_scaled_after_rounding():
    import keras

    stack = [keras.layers.Dense(40, use_bias=False), keras.layers.BatchNormalization()]
    model = keras.Sequential([keras.Input((70,)), *stack])
    models.fill_weights(model)
    x = RNG.standard_normal((5, 70)).astype("float32")
    kernel = model.get_weights()[0]
    result = kgraph.compile(model, precision="bf16")(x)
    model.set_weights([rounded(kernel), *model.get_weights()[1:]])
    np.testing.assert_allclose(result, kgraph.compile(model)(rounded(x)), rtol=1e-5, atol=1e-5)


def test_weights_take_two_bytes_each():
    model, _ = built("mlp")
    packed = [p.type for p in kgraph.compile(model, precision="bf16").graph.params if len(p.type.shape) == 2]
    assert [t.dtype for t in packed] == ["bfloat16"] * 3


def test_new_weights_are_rounded_too():
    model, x = built("mlp")
    compiled = kgraph.compile(model, precision="bf16")
    compiled(x)
    model.set_weights([0.5 * w for w in model.get_weights()])
    np.testing.assert_array_equal(compiled(x), kgraph.compile(model, precision="bf16")(x))


def test_saved_and_exported_models_round_alike(tmp_path):
    model, x = built("mlp")
    compiled = kgraph.compile(model, precision="bf16")
    wanted = compiled(x)
    compiled.save(tmp_path / "model.kgraph")
    np.testing.assert_array_equal(kgraph.load(tmp_path / "model.kgraph")(x), wanted)
    compiled.export(tmp_path / "c", format="c", name="net")
    (result,) = CLibrary(tmp_path / "c" / "libnet.so", "net")(x)
    np.testing.assert_array_equal(result, wanted)


def test_an_onnx_file_rounds_alike(tmp_path):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    model, x = built("mlp")
    compiled = kgraph.compile(model, precision="bf16")
    compiled.export(tmp_path / "net.onnx", format="onnx")
    session = runtime.InferenceSession(str(tmp_path / "net.onnx"))
    (result,) = session.run(None, {session.get_inputs()[0].name: x})
    np.testing.assert_allclose(result, compiled(x), rtol=2e-3, atol=1e-4)


def test_the_report_tells_the_error_of_each_output():
    model, x = built("mlp")
    compiled = kgraph.compile(model)
    before = compiled.stats()["precision"]
    assert (before["name"], before["rms_error"], before["largest_error"]) == ("float32", None, None)
    report = compiled.precision_report(x)
    assert 0 < report.rms < 1e-6
    assert "rms error" in str(report)
    after = compiled.stats()["precision"]
    assert (after["rms_error"], after["largest_error"]) == (report.rms, report.largest)


def test_errors_are_fractions_of_the_exact_values(monkeypatch):
    graph = kgraph.compile(built("mlp")[0]).captured_graph
    exact = [np.array([3.0, 4.0]), np.array([1, 2])]
    monkeypatch.setattr(precision, "evaluate", lambda *args, **more: exact)
    report = precision.measure("bf16", graph, [], [], [np.array([3.0, 4.5]), np.array([1, 2])], ["a", "b"])
    (only,) = report.outputs
    assert (only.name, only.elements) == ("a", 2)
    assert only.rms == pytest.approx(0.5 / 5)
    assert only.largest == pytest.approx(0.5 / 4)


@pytest.mark.parametrize("name", ["bfloat16", "int8", "", None])
def test_other_precisions_are_refused(name):
    with pytest.raises(ValueError, match=r"precisions: float32, bf16"):
        kgraph.compile(built("mlp")[0], precision=name)
