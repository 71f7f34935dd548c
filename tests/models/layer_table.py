"""One or more instances of every layer class of keras.layers, with example inputs."""

from __future__ import annotations

import keras
import numpy as np
from keras import layers


def floats(*shape, seed=0, low=-1.0, high=1.0, dtype="float32"):
    return np.random.default_rng(seed).uniform(low, high, shape).astype(dtype)


def ids(*shape, high=10, low=0, seed=0, dtype="int32"):
    return np.random.default_rng(seed).integers(low, high, shape).astype(dtype)


IMAGE, ODD_IMAGE, WIDE_IMAGE = floats(2, 8, 10, 4), floats(2, 7, 5, 3), floats(3, 12, 12, 3, low=0, high=255)
SEQUENCE, VOLUME, ROWS = floats(2, 9, 4), floats(2, 5, 6, 7, 3), floats(4, 6)
PAIR = [floats(3, 5), floats(3, 5, seed=1)]
ATTENTION = [floats(2, 5, 8), floats(2, 7, 8, seed=1)]

# name -> (function that makes the layer, example input: an array, or a list of arrays as one argument).
CASES: dict = {}
# The layers that kgraph does not take, and why.
LEFT_OUT = {
    "FlaxLayer": "wraps a Flax module, which needs JAX",
    "JaxLayer": "wraps a JAX function",
    "TFSMLayer": "wraps a TensorFlow SavedModel",
    "TorchModuleWrapper": "wraps a PyTorch module",
    "StringLookup": "strings are TensorFlow tensors in Keras",
    "TextVectorization": "strings are TensorFlow tensors in Keras",
    "IntegerLookup": "its table is TensorFlow's in Keras",
    "Hashing": "hashes with TensorFlow in Keras",
    "HashedCrossing": "hashes with TensorFlow in Keras",
    "Equalization": "makes a cycle in Keras' functional models, on every backend",
    "InputLayer": "stands in every functional model",
    "Layer": "the base class",
    "Wrapper": "the base class of wrappers",
    "MaxNumBoundingBoxes": "takes bounding boxes as TensorFlow data pipelines give them",
}


def case(name, make, example):
    CASES[name] = (make, example)


def cases(class_name, example, *variants):
    for options in variants:
        shown = ",".join(f"{k}={v}" for k, v in options.items() if not isinstance(v, keras.Layer))
        case(f"{class_name}({shown})", lambda o=options: getattr(layers, class_name)(**o), example)


# -- core and activations
cases("Activation", ROWS, {"activation": "gelu"})
cases("ActivityRegularization", ROWS, {"l2": 0.1})
cases("Dense", ROWS, {"units": 3}, {"units": 1, "use_bias": False, "activation": "elu"})
cases("Dense", SEQUENCE, {"units": 5, "activation": "softmax"})
cases("EinsumDense", SEQUENCE, {"equation": "abc,cde->abde", "output_shape": (None, 3, 2), "bias_axes": "de"})
cases("EinsumDense", SEQUENCE, {"equation": "abc,bcd->abd", "output_shape": (9, 3), "bias_axes": "bd"})
cases("Embedding", ids(3, 4), {"input_dim": 10, "output_dim": 5})
cases("ReversibleEmbedding", ids(3, 4), {"input_dim": 10, "output_dim": 5})
cases("Identity", ROWS, {})
case("Lambda", lambda: layers.Lambda(lambda x: keras.ops.square(x) - 2.0), ROWS)
case("Masking", lambda: layers.Masking(0.0), SEQUENCE)
cases("ELU", ROWS, {"alpha": 0.5})
cases("LeakyReLU", ROWS, {"negative_slope": 0.1})
cases("PReLU", IMAGE, {"alpha_initializer": "random_normal"}, {"shared_axes": (1, 2), "alpha_initializer": "uniform"})
cases("ReLU", ROWS, {}, {"max_value": 0.5, "negative_slope": 0.2, "threshold": 0.1})
cases("Softmax", IMAGE, {}, {"axis": 1}, {"axis": (1, 2)})
# -- merging
for _name in ("Add", "Average", "Maximum", "Minimum", "Multiply", "Subtract", "Concatenate"):
    cases(_name, PAIR, {})
case("Concatenate(3)", lambda: layers.Concatenate(axis=1), [SEQUENCE, SEQUENCE[:, :2], SEQUENCE[:, 3:]])
cases("Dot", PAIR, {"axes": 1}, {"axes": -1, "normalize": True})
case("Dot(2,1)", lambda: layers.Dot(axes=(2, 1)), [floats(2, 3, 4), floats(2, 4, 5)])
# -- shapes
cases("Flatten", IMAGE, {}, {"data_format": "channels_first"})
cases("Permute", IMAGE, {"dims": (3, 1, 2)})
cases("Reshape", IMAGE, {"target_shape": (-1, 8)}, {"target_shape": (320,)})
cases("RepeatVector", ROWS, {"n": 3})
cases("Cropping1D", SEQUENCE, {"cropping": (1, 2)})
cases("Cropping2D", IMAGE, {"cropping": ((1, 2), (0, 3))}, {"cropping": 1, "data_format": "channels_first"})
cases("Cropping3D", VOLUME, {"cropping": ((1, 1), (0, 2), (2, 1))})
cases("ZeroPadding1D", SEQUENCE, {"padding": (2, 1)})
cases("ZeroPadding2D", IMAGE, {"padding": ((1, 2), (0, 3))}, {"padding": (1, 2), "data_format": "channels_first"})
cases("ZeroPadding3D", VOLUME, {"padding": 1}, {"padding": ((0, 1), (2, 0), (1, 1)), "data_format": "channels_first"})
cases("UpSampling1D", SEQUENCE, {"size": 3})
cases("UpSampling2D", IMAGE, {"size": (2, 3)}, {"interpolation": "bilinear"}, {"data_format": "channels_first"})
cases("UpSampling2D", ODD_IMAGE, {"interpolation": "bicubic"}, {"interpolation": "lanczos3", "size": 2})
cases("UpSampling3D", VOLUME, {"size": (1, 2, 2)})
# -- convolutions
cases("Conv1D", SEQUENCE, {"filters": 5, "kernel_size": 3}, {"filters": 6, "kernel_size": 2, "padding": "causal"})
cases("Conv1D", SEQUENCE, {"filters": 4, "kernel_size": 4, "strides": 2, "padding": "same", "groups": 2})
cases(
    "Conv2D",
    IMAGE,
    {"filters": 5, "kernel_size": 3, "activation": "relu"},
    {"filters": 17, "kernel_size": (1, 4), "strides": (2, 1), "padding": "same"},
    {"filters": 8, "kernel_size": 3, "dilation_rate": (2, 1), "groups": 4},
    {"filters": 3, "kernel_size": 3, "data_format": "channels_first", "padding": "same", "strides": 2},
)
cases(
    "Conv3D", VOLUME, {"filters": 4, "kernel_size": 2, "strides": (1, 2, 1)}, {"filters": 3, "kernel_size": (1, 3, 3)}
)
cases("Conv1DTranspose", SEQUENCE, {"filters": 3, "kernel_size": 4, "strides": 3, "padding": "same"})
cases(
    "Conv2DTranspose",
    IMAGE,
    {"filters": 3, "kernel_size": 3, "strides": 2, "padding": "same"},
    {"filters": 5, "kernel_size": (2, 5), "strides": (3, 2), "output_padding": 1},
    {"filters": 3, "kernel_size": 3, "strides": 2, "data_format": "channels_first"},
    {"filters": 2, "kernel_size": 3, "dilation_rate": 2},
)
cases("Conv3DTranspose", VOLUME, {"filters": 2, "kernel_size": 2, "strides": 2})
cases("DepthwiseConv1D", SEQUENCE, {"kernel_size": 3, "depth_multiplier": 2, "padding": "same"})
cases(
    "DepthwiseConv2D",
    IMAGE,
    {"kernel_size": 3, "padding": "same"},
    {"kernel_size": (3, 2), "strides": 2, "depth_multiplier": 3},
    {"kernel_size": (3, 2), "dilation_rate": (2, 1), "data_format": "channels_first"},
)
cases("SeparableConv1D", SEQUENCE, {"filters": 5, "kernel_size": 3, "depth_multiplier": 2})
cases("SeparableConv2D", IMAGE, {"filters": 5, "kernel_size": 3, "strides": 2, "padding": "same"})
cases("SeparableConv2D", IMAGE, {"filters": 5, "kernel_size": 3, "dilation_rate": 2, "activation": "tanh"})
# -- pooling
for _rank, _example in ((1, SEQUENCE), (2, IMAGE), (3, VOLUME)):
    for _kind in ("Average", "Max"):
        cases(
            f"{_kind}Pooling{_rank}D",
            _example,
            {"pool_size": 2},
            {"pool_size": 3, "strides": 1, "padding": "same"},
            {"pool_size": 2, "strides": 3, "padding": "same", "data_format": "channels_first"},
        )
        cases(f"Global{_kind}Pooling{_rank}D", _example, {}, {"keepdims": True, "data_format": "channels_first"})
        cases(f"Adaptive{_kind}Pooling{_rank}D", _example, {"output_size": 2}, {"output_size": 3})
# -- normalisation
cases("BatchNormalization", IMAGE, {}, {"axis": 1}, {"scale": False, "center": False})
cases("GroupNormalization", IMAGE, {"groups": 2}, {"groups": -1}, {"groups": 4, "axis": 1})
cases("LayerNormalization", IMAGE, {}, {"axis": (1, 2)}, {"axis": (2, 3), "scale": False}, {"axis": 1})
cases("RMSNormalization", IMAGE, {}, {"axis": (2, 3)})
cases("UnitNormalization", IMAGE, {}, {"axis": (1, 2)})
case("SpectralNormalization", lambda: layers.SpectralNormalization(layers.Dense(4)), ROWS)
# -- noise: the identity outside of training
for _name in ("AlphaDropout", "Dropout", "GaussianDropout"):
    cases(_name, ROWS, {"rate": 0.4})
cases("GaussianNoise", ROWS, {"stddev": 0.4})
cases("SpatialDropout1D", SEQUENCE, {"rate": 0.4})
cases("SpatialDropout2D", IMAGE, {"rate": 0.4})
cases("SpatialDropout3D", VOLUME, {"rate": 0.4})
# -- attention
cases("Attention", ATTENTION, {}, {"use_scale": True, "score_mode": "concat"})
cases("AdditiveAttention", ATTENTION, {})


class CallWith(layers.Layer):
    """Calls a layer with the elements of its one argument, or with keywords."""

    def __init__(self, layer, **keywords):
        super().__init__()
        self.layer, self.keywords = layer, keywords

    def call(self, x):
        return self.layer(*x, **self.keywords) if isinstance(x, (list, tuple)) else self.layer(x, **self.keywords)


case("MultiHeadAttention", lambda: CallWith(layers.MultiHeadAttention(2, 4)), ATTENTION)
case("MultiHeadAttention(3,5)", lambda: CallWith(layers.MultiHeadAttention(3, 5, value_dim=2)), ATTENTION)
case(
    "MultiHeadAttention(causal)",
    lambda: CallWith(layers.MultiHeadAttention(2, 4), use_causal_mask=True),
    [ATTENTION[0]] * 2,
)
case(
    "MultiHeadAttention(scores)",
    lambda: CallWith(layers.MultiHeadAttention(2, 4), return_attention_scores=True),
    ATTENTION,
)
case("GroupQueryAttention", lambda: CallWith(layers.GroupQueryAttention(4, 4, 2)), ATTENTION)
case(
    "MultiHeadAttention(axes)",
    lambda: CallWith(layers.MultiHeadAttention(2, 4, attention_axes=(1, 2))),
    [floats(2, 3, 4, 8), floats(2, 3, 4, 8, seed=1)],
)
# -- recurrent
for _name in ("GRU", "LSTM", "SimpleRNN"):
    cases(
        _name,
        SEQUENCE,
        {"units": 5},
        {"units": 3, "return_sequences": True, "go_backwards": True, "use_bias": False},
        {"units": 4, "return_state": True, "return_sequences": True, "activation": "relu"},
        {"units": 4, "dropout": 0.2, "recurrent_dropout": 0.3, "unroll": True},
    )
cases("GRU", SEQUENCE, {"units": 4, "reset_after": False, "recurrent_activation": "hard_sigmoid"})
case("LSTMCell", lambda: layers.RNN(layers.LSTMCell(3), return_sequences=True), SEQUENCE)
case("GRUCell", lambda: layers.RNN(layers.GRUCell(3), go_backwards=True), SEQUENCE)
case("SimpleRNNCell", lambda: layers.RNN(layers.SimpleRNNCell(3)), SEQUENCE)
case("StackedRNNCells", lambda: layers.RNN(layers.StackedRNNCells([layers.LSTMCell(3), layers.GRUCell(2)])), SEQUENCE)
case("RNN", lambda: layers.RNN([layers.SimpleRNNCell(3), layers.LSTMCell(2)], return_state=True), SEQUENCE)
case("Bidirectional", lambda: layers.Bidirectional(layers.LSTM(3, return_sequences=True)), SEQUENCE)
case("Bidirectional(ave)", lambda: layers.Bidirectional(layers.GRU(3), merge_mode="ave"), SEQUENCE)
case("Bidirectional(None)", lambda: layers.Bidirectional(layers.SimpleRNN(3), merge_mode=None), SEQUENCE)
cases("ConvLSTM1D", floats(2, 3, 7, 2), {"filters": 3, "kernel_size": 3, "return_sequences": True})
cases("ConvLSTM2D", floats(2, 3, 5, 6, 2), {"filters": 2, "kernel_size": (2, 3), "padding": "same"})
cases("ConvLSTM3D", floats(2, 2, 3, 4, 3, 2), {"filters": 2, "kernel_size": 2})
case("TimeDistributed", lambda: layers.TimeDistributed(layers.Dense(3)), SEQUENCE)
case("TimeDistributed(conv)", lambda: layers.TimeDistributed(layers.Conv2D(3, 2)), floats(2, 3, 5, 6, 2))


# -- preprocessing
def adapted(layer, data):
    layer.adapt(data)
    return layer


case("Normalization", lambda: adapted(layers.Normalization(), floats(20, 6)), ROWS)
case("Normalization(mean)", lambda: layers.Normalization(mean=0.5, variance=2.0, axis=None, invert=True), ROWS)
case("Rescaling", lambda: layers.Rescaling(1 / 127.5, offset=-1), WIDE_IMAGE)
case("Rescaling(vector)", lambda: layers.Rescaling([0.1, 0.2, 0.3], offset=[0.0, 1.0, 2.0]), WIDE_IMAGE)
cases("Resizing", WIDE_IMAGE, {"height": 5, "width": 7}, {"height": 20, "width": 15, "interpolation": "bicubic"})
cases("Resizing", WIDE_IMAGE, {"height": 6, "width": 4, "crop_to_aspect_ratio": True})
cases("Resizing", WIDE_IMAGE, {"height": 6, "width": 4, "pad_to_aspect_ratio": True, "interpolation": "nearest"})
cases("CenterCrop", WIDE_IMAGE, {"height": 5, "width": 6}, {"height": 20, "width": 4})
cases("CategoryEncoding", ids(4, 3, high=5), {"num_tokens": 5}, {"num_tokens": 6, "output_mode": "count"})
cases("CategoryEncoding", ids(4, 1, high=5), {"num_tokens": 5, "output_mode": "one_hot"})
cases("Discretization", ROWS, {"bin_boundaries": [-0.5, 0.0, 0.25]})
cases("Discretization", ROWS, {"bin_boundaries": [-0.5, 0.0, 0.25], "output_mode": "multi_hot"})
cases("MelSpectrogram", floats(2, 2000), {"fft_length": 128, "num_mel_bins": 16, "sampling_rate": 8000})
cases("STFTSpectrogram", floats(2, 500, 1), {"mode": "log", "frame_length": 50, "fft_length": 64})
cases("Solarization", WIDE_IMAGE, {})
cases("AutoContrast", WIDE_IMAGE, {})
cases("ContrastLimitedAdaptiveHistogramEqualization", WIDE_IMAGE, {})
case("Pipeline", lambda: layers.Pipeline([layers.Rescaling(2.0), layers.CenterCrop(4, 4)]), WIDE_IMAGE)
for _name, _options in {
    "AugMix": {},
    "CutMix": {},
    "MixUp": {},
    "RandAugment": {},
    "RandomBrightness": {"factor": 0.2},
    "RandomColorDegeneration": {"factor": 0.2},
    "RandomColorJitter": {"brightness_factor": 0.2},
    "RandomContrast": {"factor": 0.2},
    "RandomCrop": {"height": 5, "width": 4},
    "RandomElasticTransform": {},
    "RandomErasing": {},
    "RandomFlip": {},
    "RandomGaussianBlur": {},
    "RandomGrayscale": {},
    "RandomHue": {"factor": 0.2},
    "RandomInvert": {},
    "RandomPerspective": {},
    "RandomPosterization": {"factor": 4},
    "RandomRotation": {"factor": 0.2},
    "RandomSaturation": {"factor": 0.2},
    "RandomSharpness": {"factor": 0.2},
    "RandomShear": {"x_factor": 0.2},
    "RandomTranslation": {"height_factor": 0.2, "width_factor": 0.2},
    "RandomZoom": {"height_factor": 0.2},
}.items():
    cases(_name, WIDE_IMAGE, _options)
