"""Random small Keras models: stacks and graphs of layers with random hyper-parameters.

A model is drawn layer by layer on a growing list of tensors. Hyper-parameters that Keras itself refuses for a tensor's
shape are drawn again.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import keras
import numpy as np
from keras import layers

import kgraph

CONV = {1: layers.Conv1D, 2: layers.Conv2D, 3: layers.Conv3D}
TRANSPOSED = {1: layers.Conv1DTranspose, 2: layers.Conv2DTranspose, 3: layers.Conv3DTranspose}
SEPARABLE = {1: layers.SeparableConv1D, 2: layers.SeparableConv2D}
DEPTHWISE = {1: layers.DepthwiseConv1D, 2: layers.DepthwiseConv2D}
POOLS = {
    1: (layers.MaxPooling1D, layers.AveragePooling1D),
    2: (layers.MaxPooling2D, layers.AveragePooling2D),
    3: (layers.MaxPooling3D, layers.AveragePooling3D),
}
GLOBAL_POOLS = {
    1: (layers.GlobalMaxPooling1D, layers.GlobalAveragePooling1D),
    2: (layers.GlobalMaxPooling2D, layers.GlobalAveragePooling2D),
    3: (layers.GlobalMaxPooling3D, layers.GlobalAveragePooling3D),
}
PADDINGS = {1: layers.ZeroPadding1D, 2: layers.ZeroPadding2D, 3: layers.ZeroPadding3D}
CROPPINGS = {1: layers.Cropping1D, 2: layers.Cropping2D, 3: layers.Cropping3D}
UPSAMPLING = {1: layers.UpSampling1D, 2: layers.UpSampling2D, 3: layers.UpSampling3D}
ACTIVATIONS = (
    "relu relu6 sigmoid tanh softplus softsign silu gelu elu selu exponential leaky_relu hard_sigmoid hard_silu mish "
    "log_sigmoid hard_tanh tanh_shrink soft_shrink squareplus celu linear"
).split()
MERGES = (layers.Add, layers.Average, layers.Maximum, layers.Minimum, layers.Multiply, layers.Subtract)


class Draw:
    """A random generator with the choices that hyper-parameters need."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def __call__(self, items):
        return items[int(self.rng.integers(len(items)))]

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def integer(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high + 1))

    def per_axis(self, rank: int, low: int, high: int):
        """One integer for all axes, or one for each."""
        if self.chance(0.4):
            return self.integer(low, high)
        return tuple(self.integer(low, high) for _ in range(rank)) if rank > 1 else (self.integer(low, high),)

    def channels(self) -> int:
        return self((1, 2, 3, 4, 6, 8, 15, 16, 17, 20, 33))

    def data_format(self) -> str:
        return "channels_last" if self.chance(0.65) else "channels_first"

    def activation(self):
        return self(ACTIVATIONS) if self.chance(0.5) else None


# -- layers: each takes the draw and the rank of the space of its operand [N, *space, C] ------------------------------
def convolution(d: Draw, rank: int):
    strided = d.chance(0.4)
    kind = d(("plain", "plain", "plain", "transposed", "separable", "depthwise"))
    common = {
        "kernel_size": d.per_axis(rank, 1, 4),
        "padding": d(("same", "valid")),
        "data_format": d.data_format(),
        "use_bias": d.chance(0.7),
        "activation": d.activation(),
    }
    if kind == "transposed":
        strides = d.integer(1, 3)
        extra = d.integer(0, strides - 1) if strides > 1 and d.chance(0.3) else None
        return TRANSPOSED[rank](d.channels(), strides=strides, output_padding=extra, **common)
    if kind in ("separable", "depthwise") and rank < 3:
        common |= {"strides": 2} if strided else {"dilation_rate": d.integer(1, 2)}
        multiplier = {"depth_multiplier": d.integer(1, 2)}
        if kind == "depthwise":
            return DEPTHWISE[rank](**common, **multiplier)
        return SEPARABLE[rank](d.channels(), **common, **multiplier)
    common |= {"strides": d.per_axis(rank, 1, 3)} if strided else {"dilation_rate": d.per_axis(rank, 1, 2)}
    if rank == 1 and common["data_format"] == "channels_last" and d.chance(0.2):
        common["padding"] = "causal"
    groups = d((1, 1, 1, 1, 2, 3))
    return CONV[rank](d.channels() * groups, groups=groups, **common)


def pooling(d: Draw, rank: int):
    if d.chance(0.2):
        return d(GLOBAL_POOLS[rank])(data_format=d.data_format(), keepdims=d.chance(0.5))
    strides = d.per_axis(rank, 1, 3) if d.chance(0.7) else None
    size = d.per_axis(rank, 1, 3)
    return d(POOLS[rank])(size, strides=strides, padding=d(("same", "valid")), data_format=d.data_format())


def space(d: Draw, rank: int):
    way = d.integer(0, 3)
    if way == 0:
        pairs = tuple((d.integer(0, 2), d.integer(0, 2)) for _ in range(rank))
        return PADDINGS[rank](pairs if rank > 1 else pairs[0])
    if way == 1:
        pairs = tuple((d.integer(0, 1), d.integer(0, 1)) for _ in range(rank))
        return CROPPINGS[rank](pairs if rank > 1 else pairs[0])
    if way == 2:
        size = d.per_axis(rank, 1, 2)
        return UPSAMPLING[rank](size if rank > 1 or isinstance(size, int) else size[0])
    if rank == 2 and d.chance(0.7):
        return layers.UpSampling2D(d.integer(1, 3), interpolation=d(("bilinear", "nearest", "bicubic")))
    return layers.Permute(tuple(int(i) + 1 for i in d.rng.permutation(rank + 1)))


def normalisation(d: Draw, rank: int):
    axes = range(1, rank + 2)
    way = d.integer(0, 5)
    if way == 0:
        return layers.BatchNormalization(axis=d((-1, -1, 1)), scale=d.chance(0.7), center=d.chance(0.7))
    if way == 1:
        return layers.LayerNormalization(axis=-1 if d.chance(0.6) else tuple(axes)[-d.integer(1, rank + 1) :])
    if way == 2:
        return layers.GroupNormalization(groups=d((-1, 1, 2, 3)), axis=d((-1, -1, 1)))
    if way == 3:
        return layers.RMSNormalization()
    if way == 4:
        return layers.UnitNormalization(axis=d((-1, 1)))
    return layers.Softmax(axis=d((-1, 1)))


def activation(d: Draw, rank: int):
    way = d.integer(0, 5)
    if way == 0:
        return layers.ReLU(max_value=d((None, 1.0)), negative_slope=d((0.0, 0.1)), threshold=d((0.0, 0.2)))
    if way == 1:
        return layers.PReLU(alpha_initializer="glorot_uniform", shared_axes=list(range(1, rank + 1)) or None)
    if way == 2:
        return layers.Lambda(d((lambda x: x * 0.5 - 1.0, lambda x: keras.ops.abs(x) ** 0.5, lambda x: x[..., ::-1])))
    return layers.Activation(d(ACTIVATIONS))


def dense(d: Draw, rank: int):
    way = d.integer(0, 4)
    if way == 0 and rank == 1:
        return layers.EinsumDense("abc,cde->abde", output_shape=(None, 2, d.integer(1, 5)), bias_axes="de")
    if way == 1 and rank:
        return layers.TimeDistributed(layers.Dense(d.channels(), d.activation()))
    if way == 2 and rank:
        return layers.Flatten(data_format=d.data_format())
    return layers.Dense(d.channels(), activation=d.activation(), use_bias=d.chance(0.7))


def recurrent(d: Draw, rank: int):
    kind = d((layers.LSTM, layers.GRU, layers.SimpleRNN))
    options = {"return_sequences": d.chance(0.6), "go_backwards": d.chance(0.2), "use_bias": d.chance(0.8)}
    if kind is layers.GRU:
        options["reset_after"] = d.chance(0.5)
    layer = kind(d((1, 3, 8, 17)), activation=d(("tanh", "relu", "sigmoid")), **options)
    options.pop("go_backwards")
    return layers.Bidirectional(layer, merge_mode=d(("concat", "sum", "mul", "ave"))) if d.chance(0.3) else layer


def noise(d: Draw, rank: int):
    return d((layers.Dropout(0.3), layers.GaussianNoise(0.1), layers.Identity(), layers.ActivityRegularization(0.1)))


def shared(d: Draw, rank: int):
    """A small model of its own."""
    return keras.Sequential([layers.Dense(d.channels(), d.activation()), layers.Rescaling(0.5, 0.1)])


BY_RANK = {
    0: ((dense, 4), (activation, 3), (normalisation, 1), (noise, 1), (shared, 1)),
    1: ((convolution, 4), (pooling, 2), (dense, 3), (recurrent, 2), (space, 1), (normalisation, 2), (activation, 2)),
    2: ((convolution, 6), (pooling, 3), (space, 2), (normalisation, 2), (activation, 2), (dense, 1), (shared, 0.5)),
    3: ((convolution, 4), (pooling, 2), (space, 1), (normalisation, 1), (activation, 1)),
}
MOST_ELEMENTS = 60_000


@dataclass
class Tensor:
    """A tensor of a model: what stands for it in Keras, and Keras' own values of it for each example."""

    symbol: keras.KerasTensor
    values: list[np.ndarray]


@dataclass
class RandomModel:
    """The model of a seed, all its tensors in the order of creation, and inputs for several sizes."""

    seed: int
    inputs: list
    outputs: object  # nested Tensors
    tensors: list[Tensor]
    examples: list
    layers: list = field(default_factory=list)

    def model(self, outputs) -> keras.Model:
        symbols = keras.tree.map_structure(lambda t: t.symbol, outputs)
        return keras.Model(self.inputs if len(self.inputs) > 1 else self.inputs[0], symbols)


def random_model(seed: int, length: int | None = None) -> RandomModel:
    d = Draw(seed)
    keras.backend.clear_session()
    keras.utils.set_random_seed(seed)
    inputs, examples = _inputs(d)
    tensors, used = [Tensor(x, [e[i] for e in examples]) for i, x in enumerate(inputs)], []
    attempts = 0
    length = length or d.integer(1, 9)
    while len(used) < length and attempts < 20 * length:
        attempts += 1
        try:
            layer, out = _step(d, tensors)
        except (ValueError, TypeError, ZeroDivisionError):
            continue  # Keras refuses these hyper-parameters for this shape
        if all(v.size <= MOST_ELEMENTS and v.ndim <= 5 and v.size and np.isfinite(v).all() for v in out.values):
            tensors.append(out)
            used.append(layer)
    read = {id(t) for layer in used for node in layer._inbound_nodes for t in node.input_tensors}
    ends = [t for t in tensors if id(t.symbol) not in read] or tensors[-1:]
    if d.chance(0.15):
        ends.append(d(tensors))
    outputs = ends[0] if len(ends) == 1 else d((list, lambda e: {f"o{i}": t for i, t in enumerate(e)}))(ends)
    return RandomModel(seed, inputs, outputs, tensors, [e if len(e) > 1 else e[0] for e in examples], used)


def _inputs(d: Draw) -> tuple[list, list]:
    """Input tensors, and arrays for three calls with other batches (and sizes, where the model leaves them free)."""
    rank = d((0, 1, 1, 2, 2, 2, 2, 3))
    shape = [d.integer(3, 9) for _ in range(rank)] + [d.channels()]
    free = [d.chance(0.3) and axis < rank for axis in range(rank + 1)]
    declared = tuple(None if f else s for f, s in zip(free, shape))
    inputs = [keras.Input(declared, name=f"in{i}") for i in range(2 if d.chance(0.3) else 1)]
    calls = []
    for call, batch in enumerate((3, 1, 8)):
        sizes = (batch, *(s + 2 * call if f else s for f, s in zip(free, shape)))
        calls.append([d.rng.normal(size=sizes).astype("float32") for _ in inputs])
    return inputs, calls


def _step(d: Draw, tensors: list[Tensor]) -> tuple[keras.Layer, Tensor]:
    x = tensors[-1] if d.chance(0.6) else d(tensors)
    shape = x.symbol.shape
    others = [t for t in tensors if t is not x and len(t.symbol.shape) == len(shape)]
    if d.chance(0.2):
        if same := [t for t in others if t.symbol.shape == shape]:
            return _applied(d, d(MERGES)(), [[x, d(same)]])
        if joined := [t for t in others if t.symbol.shape[:-1] == shape[:-1]]:
            return _applied(d, layers.Concatenate(), [[x, d(joined), x] if d.chance(0.3) else [x, d(joined)]])
    if len(shape) == 3 and d.chance(0.08):
        return _applied(d, layers.MultiHeadAttention(2, d((3, 4, 8))), [x, x])
    families = BY_RANK.get(len(shape) - 2)
    if families is None:
        raise ValueError("no layers for this rank")
    weights = np.array([w for _, w in families], float)
    family = families[int(d.rng.choice(len(families), p=weights / weights.sum()))][0]
    return _applied(d, family(d, len(shape) - 2), [x])


def _applied(d: Draw, layer, arguments: list) -> tuple[keras.Layer, Tensor]:
    """The result of a layer, in Keras' symbols and eagerly on the values."""
    of = lambda pick: keras.tree.map_structure(pick, arguments)
    symbol = layer(*of(lambda t: t.symbol))
    for variable in layer.weights:
        # Statistics and biases off their initial zeros and ones.
        if variable.dtype.startswith("float") and len(variable.shape) < 2:
            low = 0.5 if "variance" in variable.path else -0.5
            variable.assign(d.rng.uniform(low, 1.5, variable.shape))
    calls = len(keras.tree.flatten(arguments)[0].values)
    values = [layer(*of(lambda t, i=i: t.values[i]), training=False) for i in range(calls)]
    return layer, Tensor(symbol, [np.asarray(v) for v in values])


# -- comparison -------------------------------------------------------------------------------------------------------
def check_model(drawn: RandomModel, outputs) -> dict:
    """Compare compiled with eager results at each example; gives the compiled model's stats."""
    compiled = kgraph.compile(drawn.model(outputs))
    wanted = keras.tree.flatten(outputs)
    for i, example in enumerate(drawn.examples):
        for number, (got, tensor) in enumerate(zip(keras.tree.flatten(compiled(example)), wanted, strict=True)):
            compare(f"output {number}", got, tensor.values[i])
    nothing = keras.tree.map_structure(lambda a: a[:0], drawn.examples[0])
    for number, (got, tensor) in enumerate(zip(keras.tree.flatten(compiled(nothing)), wanted, strict=True)):
        compare(f"output {number} at batch 0", got, tensor.values[0][:0])
    return compiled.stats()


# Of the largest element. In half precisions the eager model rounds after each operation, the compiled one does not.
TOLERANCES = {"float32": 1e-4, "float64": 1e-4, "float16": 1e-2, "bfloat16": 0.1}


def compare(what: str, got: np.ndarray, want: np.ndarray) -> None:
    assert got.shape == want.shape, f"{what}: shape {got.shape}, expected {want.shape}"
    assert got.dtype == want.dtype, f"{what}: {got.dtype}, expected {want.dtype}"
    tolerance = TOLERANCES[keras.config.dtype_policy().compute_dtype]
    got, want = got.astype("float64"), want.astype("float64")
    scale = float(np.abs(want).max(initial=1e-3))
    np.testing.assert_allclose(got, want, rtol=tolerance * 10, atol=tolerance * scale, err_msg=what)


def run_model_seed(seed: int, length: int | None = None, policy: str = "float32") -> RandomModel:
    """Draw and compare one model. Raises AssertionError that shows the layers up to the first wrong tensor."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        drawn = random_model(seed, length)
        try:
            check_model(drawn, drawn.outputs)
        except Exception as error:  # whatever it is, it is the finding
            raise AssertionError(_report(drawn, error)) from error
    finally:
        keras.config.set_dtype_policy(before)
    return drawn


def _report(drawn: RandomModel, error: Exception) -> str:
    outputs = drawn.outputs
    for tensor in drawn.tensors:
        try:
            check_model(drawn, tensor)
        except Exception as found:  # the first tensor that fails is reported, with its own failure
            outputs, error = tensor, found
            break
    policy = keras.config.dtype_policy().name
    lines = [f"seed {drawn.seed}, {policy}: {type(error).__name__}: {error}"]
    for layer in drawn.model(outputs).layers:
        operands = [t.name for node in layer._inbound_nodes for t in node.input_tensors]
        config = {k: v for k, v in layer.get_config().items() if "initializer" not in k and "regularizer" not in k}
        lines.append(f"  {type(layer).__name__} of {operands}: {config}")
    return "\n".join(lines)
