"""ONNX files: checked by ONNX' own checker, run by ONNX Runtime, compared with the references and compiled models."""

from __future__ import annotations

import re

import keras
import numpy as np
import pytest

import kgraph
from benchmarks import models
from kgraph.errors import UnsupportedError
from kgraph.ir import PRIMITIVES, Graph, Value, make_node, type_of

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from kgraph.onnx_export.absent import ABSENT  # noqa: E402
from kgraph.onnx_export.builder import RULES  # noqa: E402
from kgraph.onnx_export.export import to_onnx  # noqa: E402

# ONNX does not say what these give for NaN or infinities, and ONNX Runtime gives something else than NumPy.
ONLY_FINITE = {"argmax", "argmin", "gelu", "reduce_max", "reduce_min", "silu"}
# ONNX Runtime's loops and recurrent operators take no empty sequences; the latter end the process.
NOT_EMPTY = {"cummax", "cummin", "cumprod", "cumlogsumexp", "rnn", "scan"}
# What is refused, and why. Bits of numbers are only compared with the negative zero's, which argmax does.
REFUSED = {"convert": "floats as uint64"}
WITHOUT_SAMPLES = {"bitcast_convert"}


def run(proto, arrays: list[np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(zip([i.name for i in session.get_inputs()], arrays, strict=True)))


def skipped(name: str, arrays: list[np.ndarray], results: list[Value]) -> str:
    """Why a sample cannot be compared, or nothing."""
    dtypes = {a.dtype.name for a in arrays} | {v.dtype for v in results}
    if any(dtype.startswith("complex") for dtype in dtypes):
        return "ONNX has no complex numbers"
    if "bfloat16" in dtypes:
        return "ONNX Runtime's processor build has no bfloat16"
    if name in ONLY_FINITE and any(a.dtype.kind == "f" and not np.isfinite(a).all() for a in arrays):
        return "ONNX leaves open what NaN and infinities give"
    if name in NOT_EMPTY and any(a.size == 0 for a in arrays):
        return "ONNX Runtime takes no empty sequences"
    return ""


def tolerance(dtype: np.dtype) -> float:
    """Relative; two units in the last place of half precision."""
    return 2e-3 if dtype == "float16" else 2e-4


@pytest.mark.parametrize("name", sorted(RULES.keys() - WITHOUT_SAMPLES))
def test_rule_agrees_with_the_reference(name):
    primitive = PRIMITIVES[name]
    compared, reasons = 0, []
    for sample in primitive.samples():
        arrays = [np.asarray(a) for a in sample.args]
        values = [Value(type_of(a)) for a in arrays]
        node = make_node(primitive, values, dict(sample.attrs))
        graph = Graph(values, nodes=[node], outputs=list(node.outputs), name=name)
        names = [f"y{i}" for i in range(len(node.outputs))]
        reason = skipped(name, arrays, list(node.outputs))
        if reason:
            reasons.append(reason)
            continue
        try:
            proto = to_onnx(graph, [], [f"x{i}" for i in range(len(values))], names)
        except UnsupportedError as error:
            if not re.search(REFUSED.get(name, "$^"), str(error)):
                raise
            reasons.append(str(error))
            continue
        onnx.checker.check_model(proto, full_check=True)
        results = run(proto, arrays)
        with np.errstate(all="ignore"):
            wanted = primitive.reference(*arrays, **sample.attrs)
        wanted = wanted if isinstance(wanted, tuple) else (wanted,)
        for got, expected in zip(results, wanted, strict=True):
            assert (got.shape, got.dtype) == (np.shape(expected), expected.dtype)
            if got.dtype.kind == "f":
                np.testing.assert_allclose(got, expected, rtol=tolerance(got.dtype), atol=2e-5)
            else:
                np.testing.assert_array_equal(got, expected)
        compared += 1
    assert compared, f"no sample of {name} was compared: {reasons}"


def test_every_primitive_has_a_rule_or_a_reason():
    assert RULES.keys() | ABSENT.keys() | {"constant"} == PRIMITIVES.keys()
    assert not RULES.keys() & ABSENT.keys()


def convnet():
    layers = keras.layers
    inputs = keras.Input((24, 24, 3))
    x = layers.Conv2D(8, 3, padding="same", use_bias=False)(inputs)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.DepthwiseConv2D(3, strides=2, padding="same", activation="silu")(x)
    y = layers.Conv2DTranspose(4, 3, strides=2, padding="same")(x)
    x = layers.Concatenate()([layers.UpSampling2D(2)(x), y])
    x = layers.GroupNormalization(4)(x)
    x = layers.MaxPooling2D()(x) + layers.AveragePooling2D(2)(x)
    return keras.Model(inputs, layers.Dense(5, activation="softmax")(layers.GlobalAveragePooling2D()(x)))


def recurrent():
    layers = keras.layers
    inputs = keras.Input((None, 6))
    x = layers.Bidirectional(layers.LSTM(9, return_sequences=True))(inputs)
    x = layers.GRU(7, return_sequences=True, reset_after=False)(x)
    return keras.Model(inputs, layers.Dense(3)(layers.GRU(5)(x)))


def transformer():
    return models.transformer(blocks=2, width=32, heads=4, feed_forward=64, tokens=16, vocabulary=50)


RNG = np.random.default_rng(0)
CASES = {
    "convnet": (convnet, lambda n: RNG.random((n, 24, 24, 3)).astype("float32")),
    "recurrent": (recurrent, lambda n: RNG.random((n, 2 + n, 6)).astype("float32")),
    "transformer": (transformer, lambda n: RNG.integers(0, 50, (n, 16)).astype("int32")),
    "mlp": (models.mlp, lambda n: RNG.random((n, 784)).astype("float32")),
    "resnet20": (models.resnet20, lambda n: RNG.random((n, 32, 32, 3)).astype("float32")),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("optimised", [True, False])
def test_models(name, optimised, tmp_path):
    build, inputs = CASES[name]
    model = build()
    models.fill_weights(model)
    compiled = kgraph.compile(model)
    path = tmp_path / "model.onnx"
    compiled.export(path, format="onnx", optimised=optimised)
    proto = onnx.load(path)
    operators = [node.op_type for node in proto.graph.node]
    for rows in (1, 3):
        x = inputs(rows)
        (got,) = run(proto, [x])
        np.testing.assert_allclose(got, compiled(x), rtol=2e-4, atol=2e-5)
    if name == "resnet20" and optimised:
        assert operators.count("Conv") == 21
        assert "Sqrt" not in operators, "batch normalisation is folded"


def test_what_onnx_lacks_is_named_with_its_layer(tmp_path):
    inputs = keras.Input((4, 4))
    x = keras.layers.Lambda(lambda t: keras.ops.linalg.inv(t), name="inverter", output_shape=(4, 4))(inputs)
    compiled = kgraph.compile(keras.Model(inputs, keras.ops.linalg.eigh(x)[0]))
    with pytest.raises(UnsupportedError, match=r"inv.*inverter.*eigh"):
        compiled.export(tmp_path / "model.onnx", format="onnx")
