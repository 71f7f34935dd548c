"""Captured models: the interpreter on the graph gives what Keras gives eagerly, for every structure of model."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers
from keras import ops as K

from kgraph.errors import CaptureError, InputError, UnsupportedError
from kgraph.frontend.capture import Arguments, SpecialisationError, capture, capture_function, signature
from kgraph.ir import Dim
from kgraph.ir.interpreter import evaluate
from kgraph.ir.verifier import verify
from kgraph.structure import Structure

CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


def floats(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def tokens(*shape, high=20, padded=True):
    ids = np.random.default_rng(0).integers(1, high, shape).astype("int32")
    if padded:
        for row in range(1, shape[0]):
            ids[row, shape[1] - row :] = 0
    return ids


def randomise(model):
    """Weights that are neither zero nor one, and positive variances."""
    rng = np.random.default_rng(1)
    for variable in model.variables:
        if variable.dtype.startswith(("float", "bfloat")):
            value = rng.uniform(0.2, 1.0, variable.shape) if "variance" in variable.path else rng.normal(
                0, 0.4, variable.shape
            )  # fmt: skip
            variable.assign(value)


# -- sequential and functional -----------------------------------------------------------------------------------------
@case
def sequential():
    return keras.Sequential([keras.Input((5,)), layers.Dense(7, "relu"), layers.Dropout(0.5), layers.Dense(3)]), floats(
        4, 5
    )


@case
def nested_models():
    inner = keras.Sequential([keras.Input((6,)), layers.Dense(6, "tanh")])
    inputs = keras.Input((6,))
    middle = keras.Model(inputs, inner(inputs) + inputs)
    outer = keras.Sequential([keras.Input((6,)), middle, layers.Dense(2)])
    return outer, floats(3, 6)


@case
def shared_layer_and_list_inputs():
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    dense = layers.Dense(3, "sigmoid")
    return keras.Model([a, b], layers.Subtract()([dense(a), dense(b)])), [floats(2, 4), floats(2, 4, seed=1)]


@case
def dict_inputs_and_outputs():
    wide, deep = keras.Input((3,), name="wide"), keras.Input((5,), name="deep")
    hidden = layers.Dense(4, "relu")(deep)
    joined = layers.Concatenate()([wide, hidden])
    outputs = {"score": layers.Dense(1)(joined), "hidden": hidden, "pair": (hidden, joined)}
    return keras.Model({"wide": wide, "deep": deep}, outputs), {"wide": floats(2, 3), "deep": floats(2, 5)}


@case
def tuple_outputs():
    x = keras.Input((4,))
    return keras.Model(x, (layers.Dense(2)(x), [layers.Dense(3)(x), x])), floats(3, 4)


@case
def integer_bool_and_half_inputs():
    i = keras.Input((3,), dtype="int32", name="i")
    b = keras.Input((3,), dtype="bool", name="b")
    h = keras.Input((3,), dtype="float16", name="h")
    y = K.where(b, K.cast(i, "float32"), K.cast(h, "float32"))
    return keras.Model([i, b, h], y), [
        np.arange(6, dtype="int32").reshape(2, 3), np.array([[True, False, True]] * 2), floats(2, 3).astype("float16")
    ]  # fmt: skip


@case
def operators_and_slices():
    x = keras.Input((6, 8))
    y = (x[:, 1:, ::2] * 2 - 1) / (K.abs(x[:, :-1, 1::2]) + 0.5)
    return keras.Model(x, K.concatenate([y[:, 0], K.max(y, axis=1)], -1)), floats(3, 6, 8)


# -- images ------------------------------------------------------------------------------------------------------------
@case
def convolutions():
    x = keras.Input((12, 10, 3))
    y = layers.Conv2D(6, 3, strides=2, padding="same", activation="relu")(x)
    y = layers.BatchNormalization()(y)
    y = layers.DepthwiseConv2D(3, depth_multiplier=2)(y)
    y = layers.SeparableConv2D(5, 3, padding="same", dilation_rate=2)(y)
    y = layers.Conv2DTranspose(4, 3, strides=2, padding="same")(y)
    y = layers.Conv2D(4, 2, groups=2)(y)
    return keras.Model(x, [layers.GlobalAveragePooling2D()(y), layers.GlobalMaxPooling2D()(y)]), floats(2, 12, 10, 3)


@case
def channels_first():
    x = keras.Input((3, 9, 8))
    y = layers.Conv2D(4, 3, data_format="channels_first", activation="relu")(x)
    y = layers.BatchNormalization(axis=1)(y)
    y = layers.MaxPooling2D(2, data_format="channels_first")(y)
    y = layers.AveragePooling2D(2, padding="same", data_format="channels_first")(y)
    return keras.Model(x, layers.Flatten(data_format="channels_first")(y)), floats(2, 3, 9, 8)


@case
def image_of_unknown_size():
    x = keras.Input((None, None, 3))
    y = layers.Conv2D(4, 3, strides=2, padding="same")(x)
    y = layers.MaxPooling2D(3, strides=2, padding="same")(layers.ReLU()(y))
    return keras.Model(x, layers.GlobalAveragePooling2D()(y)), floats(2, 13, 10, 3)


@case
def volumes_and_sequences():
    x, s = keras.Input((5, 6, 7, 2)), keras.Input((9, 3))
    y = layers.AveragePooling3D(2)(layers.Conv3D(3, 2)(x))
    z = layers.Conv1D(4, 3, padding="causal", dilation_rate=2)(s)
    z = layers.MaxPooling1D(2)(layers.ZeroPadding1D(1)(z))
    return keras.Model([x, s], [layers.Flatten()(y), layers.UpSampling1D(2)(z)]), [
        floats(2, 5, 6, 7, 2),
        floats(2, 9, 3),
    ]


@case
def resizing_and_rescaling():
    x = keras.Input((8, 6, 3))
    y = layers.Rescaling(1 / 255.0, offset=-0.5)(x)
    y = layers.Resizing(5, 9)(y)
    y = layers.UpSampling2D(2, interpolation="bilinear")(y)
    return keras.Model(x, layers.CenterCrop(4, 4)(layers.ZeroPadding2D(1)(y))), floats(2, 8, 6, 3)


# -- sequences ---------------------------------------------------------------------------------------------------------
@case
def masked_recurrent_stack():
    x = keras.Input((None,), dtype="int32")
    y = layers.Embedding(20, 6, mask_zero=True)(x)
    y = layers.Bidirectional(layers.LSTM(4, return_sequences=True))(y)
    y = layers.GRU(5, return_sequences=True, reset_after=False)(y)
    y = layers.SimpleRNN(3, go_backwards=True)(y)
    return keras.Model(x, layers.Dense(2)(y)), tokens(3, 7)


@case
def recurrent_states():
    x = keras.Input((None, 4))
    y, h, c = layers.LSTM(3, return_state=True, return_sequences=True, go_backwards=True)(x)
    z, s = layers.GRU(3, return_state=True)(y, initial_state=h)
    return keras.Model(x, {"y": y, "h": h, "c": c, "z": z, "s": s}), floats(2, 5, 4)


@case
def scanned_cells():
    """What the `rnn` primitive does not take: other cells, stacked cells, unknown activations."""
    x = keras.Input((6, 5, 5, 2))
    conv = layers.ConvLSTM2D(3, 3, padding="same")(x)
    s = keras.Input((6, 4))
    stacked = layers.RNN([layers.LSTMCell(3), layers.GRUCell(4)], return_sequences=True)(s)
    odd = layers.LSTM(3, activation="mish")(s)
    unrolled = layers.SimpleRNN(3, unroll=True, activation="mish")(s)
    return keras.Model([x, s], [conv, stacked, odd, unrolled]), [floats(2, 6, 5, 5, 2), floats(2, 6, 4)]


@case
def masking_layer_and_time_distributed():
    x = keras.Input((5, 3))
    y = layers.Masking()(x)
    y = layers.TimeDistributed(layers.Dense(4))(y)
    y = layers.LSTM(3, return_sequences=True, zero_output_for_mask=True)(y)
    data = floats(2, 5, 3)
    data[0, 3:] = 0
    return keras.Model(x, layers.GlobalAveragePooling1D()(y)), data


@case
def transformer_block():
    x = keras.Input((None,), dtype="int32")
    h = layers.Embedding(20, 8, mask_zero=True)(x)
    a = layers.MultiHeadAttention(2, 4, dropout=0.1)(h, h, use_causal_mask=True)
    h = layers.LayerNormalization()(h + a)
    f = layers.Dense(8)(layers.Dense(16, activation="gelu")(h))
    h = layers.RMSNormalization()(h + f)
    g = layers.GroupQueryAttention(4, 4, 2)(h, h)
    return keras.Model(x, layers.GroupNormalization(2)(h + g)), tokens(3, 6)


@case
def cross_attention_of_two_lengths():
    q, v = keras.Input((None, 8), name="q"), keras.Input((None, 8), name="v")
    y = layers.MultiHeadAttention(2, 4)(q, v)
    return keras.Model([q, v], layers.AdditiveAttention()([y, v])), [floats(2, 3, 8), floats(2, 5, 8)]


@case
def mixed_precision():
    x = keras.Input((6,))
    y = layers.Dense(5, "relu", dtype="mixed_float16")(x)
    y = layers.LayerNormalization(dtype="mixed_bfloat16")(y)
    return keras.Model(x, layers.Dense(3, dtype="float32")(y)), floats(3, 6)


# -- subclassed --------------------------------------------------------------------------------------------------------
class Block(layers.Layer):
    def __init__(self, units):
        super().__init__()
        self.dense = layers.Dense(units)
        self.norm = layers.LayerNormalization()

    def call(self, x, training=False):
        y = self.norm(self.dense(x))
        return x + (y * 0 if training else y)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.blocks = [Block(4), Block(4)]
        self.scale = self.add_weight(shape=(4,), initializer="ones")

    def call(self, inputs):
        x = inputs["x"] * self.scale
        for block in self.blocks:
            x = block(x)
        return {"y": x, "n": K.shape(x)[0], "nothing": None}


@case
def subclassed_with_example():
    return Subclassed(), {"x": floats(3, 4)}


@case
def subclassed_called_before():
    model = Subclassed()
    model({"x": floats(2, 4)})
    return model, {"x": floats(3, 4)}


class TwoArguments(keras.Model):
    def __init__(self):
        super().__init__()
        self.a, self.b = layers.Dense(3), layers.Dense(3)

    def call(self, x, context, mask=None):
        y = self.a(x) + self.b(context)
        return y if mask is None else y * K.cast(mask, y.dtype)


@case
def preprocessing_and_random_layers_at_inference():
    x = keras.Input((8, 8, 3))
    y = layers.GaussianNoise(0.3)(layers.SpatialDropout2D(0.4)(x))
    y = layers.RandomFlip()(layers.RandomRotation(0.2)(y))
    return keras.Model(x, layers.Flatten()(y)), floats(2, 8, 8, 3)


@pytest.mark.parametrize("name", CASES)
def test_captured_equals_eager(name):
    model, inputs = CASES[name]()
    unbuilt = not model.built
    captured = capture(model, example=inputs if unbuilt else None)
    randomise(model)
    verify(captured.graph)
    state = [v.value for v in captured.variables]
    results = evaluate(captured.graph, captured.inputs.flatten(inputs), state)
    assert captured.updates == []
    expected = model(inputs, training=False) if model._call_has_training_arg else model(inputs)
    got = captured.outputs.pack(results)
    keras.tree.assert_same_structure(got, expected)
    for a, b in zip(keras.tree.flatten(got), keras.tree.flatten(expected), strict=True):
        if b is not None:
            np.testing.assert_allclose(np.asarray(a, "float64"), np.asarray(b, "float64"), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    "name", ["convolutions", "image_of_unknown_size", "masked_recurrent_stack", "transformer_block"]
)
def test_one_capture_serves_all_sizes(name):
    model, inputs = CASES[name]()
    captured = capture(model)
    randomise(model)
    state = [v.value for v in captured.variables]
    for rows in (1, 2):
        (result, *_) = evaluate(captured.graph, [inputs[:rows]], state)
        expected = keras.tree.flatten(model(inputs[:rows]))[0]
        np.testing.assert_allclose(result, expected, rtol=2e-4, atol=2e-5)


# -- structure ---------------------------------------------------------------------------------------------------------
def test_names_types_and_symbols():
    captured = capture(CASES["dict_inputs_and_outputs"]()[0])
    assert captured.inputs.names == ["deep", "wide"]
    assert [str(t) for t in captured.inputs.types] == ["f32[N,5]", "f32[N,3]"]
    assert captured.outputs.names == ["hidden", "pair_0", "pair_1", "score"]
    assert captured.symbols == {"N": "batch"}
    assert captured.num_outputs == 4
    lengths = capture(CASES["cross_attention_of_two_lengths"]()[0])
    assert [str(t) for t in lengths.inputs.types] == ["f32[N,L1,8]", "f32[N,L1_2,8]"]
    assert lengths.symbols["L1_2"] == "axis 1 of input 'v'"


def test_sizes_that_must_agree_become_one():
    a, b = keras.Input((None, 3), name="a"), keras.Input((None, 3), name="b")
    captured = capture(keras.Model([a, b], a + b))
    assert [str(t) for t in captured.inputs.types] == ["f32[N,L1,3]", "f32[N,L1,3]"]
    assert captured.symbols["L1"] == "axis 1 of input 'a' and axis 1 of input 'b'"


def test_inputs_given_in_other_ways():
    inputs = capture(CASES["dict_inputs_and_outputs"]()[0]).inputs
    assert inputs.flatten({"deep": 1, "wide": 2}) == [1, 2]
    with pytest.raises(InputError, match="dict with keys"):  # which of a list's items is which key is in doubt
        inputs.flatten([1, 2])
    pair = capture(CASES["shared_layer_and_list_inputs"]()[0]).inputs
    assert pair.flatten({"a": 1, "b": 2}) == [1, 2]
    assert pair.flatten((1, 2)) == [1, 2]
    assert pair.flatten_call(([1, 2],), {}) == [1, 2]
    with pytest.raises(InputError, match="expected 2 values"):
        pair.flatten([1, 2, 3])
    with pytest.raises(InputError, match="keys"):
        inputs.flatten({"deep": 1})


def test_structure_survives_json():
    captured = capture(CASES["dict_inputs_and_outputs"]()[0])
    for structure in (captured.inputs, captured.outputs):
        again = Structure.from_json(structure.to_json())
        assert again.template == structure.template
        assert again.types == structure.types
        assert again.names == structure.names


def test_several_arguments():
    model = TwoArguments()
    x, context = floats(2, 4), floats(2, 5)
    captured = capture(model, example=Arguments(x, context=context, mask=np.array([[True, False, True]] * 2)))
    assert captured.inputs.names == ["x", "context", "mask"]
    mask = np.array([[True, False, False]] * 2)
    flat = captured.inputs.flatten_call((x,), {"context": context, "mask": mask})
    (result,) = evaluate(captured.graph, flat, [v.value for v in captured.variables])
    np.testing.assert_allclose(result, model(x, context, mask=mask), rtol=1e-5)


def test_a_layer_is_captured_like_a_model():
    layer = layers.Dense(3)
    layer.build((None, 4))
    captured = capture(layer)
    (result,) = evaluate(captured.graph, [floats(2, 4)], [v.value for v in captured.variables])
    np.testing.assert_allclose(result, layer(floats(2, 4)), rtol=1e-6)


# -- state -------------------------------------------------------------------------------------------------------------
def test_training_mode_updates_statistics_and_seeds():
    model = keras.Sequential([keras.Input((4,)), layers.BatchNormalization(), layers.Dropout(0.5)])
    captured = capture(model, training=True)
    paths = [v.path for v in captured.updates]
    assert sum("moving" in p for p in paths) == 2
    assert sum("seed" in p for p in paths) == 1
    before = [v.numpy() for v in model.variables]
    evaluate(captured.graph, [floats(8, 4)], [v.value for v in captured.variables])
    for old, variable in zip(before, model.variables):
        np.testing.assert_array_equal(old, variable.numpy())


def test_random_functions_follow_their_seed_state():
    generator = keras.random.SeedGenerator(3)
    captured = capture_function(lambda x: x + keras.random.uniform((2,), seed=generator), floats(2))
    assert captured.variables == [generator.state]
    assert captured.updates == [generator.state]
    x = np.zeros(2, "float32")
    first, state = evaluate(captured.graph, [x], [generator.state.value])
    second, _ = evaluate(captured.graph, [x], [state])
    np.testing.assert_array_equal(first, keras.random.uniform((2,), seed=generator))
    np.testing.assert_array_equal(second, keras.random.uniform((2,), seed=generator))


def test_unused_parameters_are_dropped():
    inputs = keras.Input((4,))
    unused = layers.Dense(3)
    unused.build((None, 4))
    layer = layers.Dense(2)
    layer.build((None, 4))

    class Pick(layers.Layer):
        def call(self, x):
            unused(x)
            return layer(x)

    captured = capture(keras.Model(inputs, Pick()(inputs)))
    assert len(captured.variables) == 2


# -- functions ---------------------------------------------------------------------------------------------------------
def test_capture_function_keeps_what_is_no_array():
    captured = capture_function(lambda x, axis, flag=None: K.sum(x, axis=axis) if flag is None else x, floats(3, 4), 1)
    assert [str(t) for t in captured.inputs.types] == ["f32[3,4]"]
    (result,) = evaluate(captured.graph, [floats(3, 4)])
    np.testing.assert_allclose(result, floats(3, 4).sum(1), rtol=1e-5)


def test_capture_function_with_a_batch_symbol():
    captured = capture_function(lambda x: K.mean(x), floats(3, 4), batch_symbol=True)
    assert captured.inputs.types[0].shape == (Dim.symbol("N"), 4)
    (result,) = evaluate(captured.graph, [floats(7, 4)])
    np.testing.assert_allclose(result, floats(7, 4).mean(), rtol=1e-5)


# -- errors ------------------------------------------------------------------------------------------------------------
def test_a_size_that_has_to_be_fixed():
    x = keras.Input((None, 3), name="x")

    class FirstFive(layers.Layer):
        def call(self, x):
            return x[:, :5]

    model = keras.Model(x, FirstFive(name="first_five")(x))
    with pytest.raises(SpecialisationError, match=r"first_five.*L1 \(axis 1 of input 'x'\)") as caught:
        capture(model)
    assert caught.value.symbols == {"L1"}
    assert caught.value.inputs.names == ["x"]
    captured = capture(model, sizes={"L1": 9})
    assert captured.inputs.types[0].shape == (Dim.symbol("N"), 9, 3)
    assert captured.symbols == {"N": "batch"}


def test_a_value_that_is_needed_names_the_layer():
    class Branches(layers.Layer):
        def call(self, x):
            return x if K.sum(x) > 0 else -x

        def compute_output_spec(self, x):
            return keras.KerasTensor(x.shape)

    inputs = keras.Input((3,))
    model = keras.Model(inputs, Branches(name="branches")(inputs))
    with pytest.raises(CaptureError, match="branches"):
        capture(model)


def test_unknown_shapes_are_reported():
    with pytest.raises(CaptureError, match="not built"):
        capture(keras.Sequential([layers.Dense(3)]))
    with pytest.raises(CaptureError, match="example"):
        capture(Subclassed())


class Shapeless(layers.Layer):
    def call(self, x):
        return K.reshape(K.unique(x), (-1, 3))

    def compute_output_shape(self, shape):
        return shape


def test_all_unsupported_functions_are_named_with_their_layers():
    inputs = keras.Input((3,))
    y = layers.Dense(3)(Shapeless(name="first")(inputs))
    model = keras.Model(inputs, Shapeless(name="second")(layers.ReLU()(y)))
    with pytest.raises(UnsupportedError, match=r"2 reasons(.|\n)*'first'.*unique(.|\n)*'second'.*unique"):
        capture(model)
    single = keras.Model(inputs, Shapeless(name="only")(inputs))
    with pytest.raises(UnsupportedError, match=r"layer 'only'.*unique"):
        capture(single)


def test_signature_builds_without_tracing():
    model = Subclassed()
    inputs, symbols = signature(model, {"x": floats(2, 4)})
    assert inputs.names == ["x"]
    assert symbols == {"N": "batch"}
    assert all(v._value is not None for v in model.variables)
