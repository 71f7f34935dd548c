"""Random numbers as functions of a seed and a shape: the same seed gives the same numbers on every machine.

A seed is uint32 or int32 [2]. It keys a Philox 4x64 counter generator (Salmon et al., "Parallel random numbers: as easy
as 1, 2, 3", 2011), whose words are cut into 32-bit halves, low half first. `random_bits`, `random_uniform`,
`random_normal`, `truncated_normal` and `random_categorical` are elementwise functions of these words, so that
any element can be computed by itself; the other distributions reject samples and run on the host.
"""

from __future__ import annotations

import numpy as np
from scipy import special

from kgraph import ops
from kgraph.errors import DTypeError, ShapeError
from kgraph.ir import NotDifferentiable, Primitive, Sample, TensorType, bind, dtype_name, np_dtype, register
from kgraph.ir.types import FLOATS, INTS
from kgraph.ops.common import normalize_axis, shape_attr, size_attr, sizes_differ, uniform
from kgraph.ops.rules import convert, dtype_error, require_broadcast_to, shape_error

__all__ = [
    "random_beta",
    "random_binomial",
    "random_bits",
    "random_categorical",
    "random_gamma",
    "random_integers",
    "random_normal",
    "random_permutation",
    "random_uniform",
    "truncated_normal",
]

SEED = np.array([1337, 42], np.uint32)


# -- words ------------------------------------------------------------------------------------------------------------
def generator(seed: np.ndarray, stream: int = 0) -> np.random.Generator:
    """NumPy's generator for a seed. `stream` tells the independent draws of one primitive apart."""
    low, high = (int(s) & 0xFFFFFFFF for s in seed)
    return np.random.Generator(np.random.Philox(key=[low | high << 32, stream]))


def words(seed: np.ndarray, count: int, stream: int = 0) -> np.ndarray:
    """`count` random 32-bit words."""
    raw = generator(seed, stream).bit_generator.random_raw((count + 1) // 2)
    return raw.astype("<u8").view("<u4")[:count].astype(np.uint32)


def _wide_words(seed: np.ndarray, count: int) -> np.ndarray:
    """`count` random 64-bit words, each of two consecutive 32-bit ones."""
    return words(seed, 2 * count).astype("<u4").view("<u8").astype(np.uint64)


def unit_interval(seed: np.ndarray, shape: tuple, dtype: str, *, centred: bool = False) -> np.ndarray:
    """Multiples of 2**-24 in [0, 1), or of 2**-53 for float64; in the middle between them, in (0, 1), if `centred`."""
    count = int(np.prod(shape, dtype=np.int64))
    if dtype == "float64":
        bits, scale = _wide_words(seed, count) >> np.uint64(11), 2.0**-53
    else:
        # 23 bits and the half step have an exact float32; narrower dtypes round the float32 numbers down.
        bits, scale = words(seed, count) >> np.uint32(9 if centred else 8), 2.0**-23 if centred else 2.0**-24
    out = (bits.astype(np.float64) + (0.5 if centred else 0.0)) * scale
    return out.reshape(shape)


def _require_seed(name: str, *types: TensorType) -> None:
    seed = types[0]
    if seed.dtype not in ("uint32", "int32") or seed.rank != 1 or sizes_differ(seed.shape[0], 2):
        raise dtype_error(name, types, "a seed of type u32[2] first")


def _require_dtype(name: str, dtype: str, allowed: frozenset) -> None:
    if dtype not in allowed:
        raise DTypeError(f"{name}: dtype {dtype}: expected one of {sorted(allowed)}")


def _random_record(name, infer, reference, samples, gradient=None) -> Primitive:
    return register(
        Primitive(
            name=name,
            infer=infer,
            reference=reference,
            gradient=gradient or NotDifferentiable("a seed is not a differentiable quantity"),
            traits=frozenset({"random"}),
            samples=samples,
            tolerance=1e-6,
        )
    )


def _seeded(name: str, sample, allowed: frozenset, dtypes: tuple, **extra) -> Primitive:
    """A record of (seed; shape, dtype, ...) where `sample(seed, shape, dtype, ...)` draws the numbers."""

    def infer(seed, *, shape, dtype, **attrs):
        _require_seed(name, seed)
        _require_dtype(name, dtype, allowed)
        return TensorType(shape, dtype)

    def reference(seed, *, shape, dtype, **attrs):
        return sample(seed, shape, dtype, **attrs).astype(np_dtype(dtype))

    def samples():
        shapes = [(3, 5), (), (2, 0), (7,)]
        return [
            Sample((SEED + np.uint32(i),), {"shape": shape, "dtype": dtypes[i % len(dtypes)], **extra})
            for i, shape in enumerate(shapes)
        ]

    return _random_record(name, infer, reference, samples)


# -- elementwise functions of the words -------------------------------------------------------------------------------
def _bits(seed, shape, dtype):
    count = int(np.prod(shape, dtype=np.int64))
    drawn = _wide_words(seed, count) if dtype in ("uint64", "int64") else words(seed, count)
    return drawn.reshape(shape)


def _uniform(seed, shape, dtype):
    values = unit_interval(seed, shape, dtype)
    if dtype in ("float16", "bfloat16"):
        # Rounding must not reach 1: keep as many leading bits as the dtype holds.
        bits = {"float16": 11, "bfloat16": 8}[dtype]
        values = np.floor(values * 2.0**bits) * 2.0**-bits
    return values


def _normal(seed, shape, dtype):
    return special.ndtri(unit_interval(seed, shape, dtype, centred=True))


def _truncated_normal(seed, shape, dtype, *, lower, upper):
    low, high = special.ndtr(lower), special.ndtr(upper)
    values = special.ndtri(low + unit_interval(seed, shape, dtype, centred=True) * (high - low))
    return np.clip(values, lower, upper)


DRAWN_FLOATS = frozenset({"float16", "bfloat16", "float32", "float64"})
RANDOM_BITS = _seeded("random_bits", _bits, INTS, ("uint32", "int32", "uint8", "uint64"))
RANDOM_UNIFORM = _seeded("random_uniform", _uniform, DRAWN_FLOATS, ("float32", "float64", "bfloat16", "float32"))
RANDOM_NORMAL = _seeded("random_normal", _normal, DRAWN_FLOATS, ("float32", "float64"))
TRUNCATED_NORMAL = _seeded(
    "truncated_normal", _truncated_normal, DRAWN_FLOATS, ("float32", "float64"), lower=-2.0, upper=2.0
)


def random_bits(seed, *, shape, dtype: str = "uint32"):
    """Uniform integers over the whole range of `dtype`, of any integer dtype. seed: uint32 or int32 [2]."""
    return bind(RANDOM_BITS, seed, shape=shape_attr(shape), dtype=dtype_name(dtype))


def random_uniform(seed, *, shape, dtype: str = "float32"):
    """Uniform numbers in [0, 1), multiples of 2**-24 (2**-53 for float64). seed: uint32 or int32 [2]."""
    return bind(RANDOM_UNIFORM, seed, shape=shape_attr(shape), dtype=dtype_name(dtype))


def random_normal(seed, *, shape, dtype: str = "float32"):
    """Numbers of the standard normal distribution. seed: uint32 or int32 [2]; dtype: float."""
    return bind(RANDOM_NORMAL, seed, shape=shape_attr(shape), dtype=dtype_name(dtype))


def truncated_normal(seed, *, shape, dtype: str = "float32", lower: float = -2.0, upper: float = 2.0):
    """Numbers of the standard normal distribution within [lower, upper]. seed: uint32 or int32 [2]; dtype: float."""
    return bind(
        TRUNCATED_NORMAL,
        seed,
        shape=shape_attr(shape),
        dtype=dtype_name(dtype),
        lower=float(lower),
        upper=float(upper),
    )


def random_integers(seed, minval, maxval, *, shape, dtype: str = "int32"):
    """Uniform integers in [minval, maxval), made of 64 random bits modulo the span, so that the bias is below 2**-32.

    minval, maxval: scalars of `dtype`, an integer dtype. seed: uint32 or int32 [2].
    """
    dtype = dtype_name(dtype)
    bits = random_bits(seed, shape=shape, dtype="uint64")
    low, high = convert(minval, "int64"), convert(maxval, "int64")
    span = ops.convert(ops.sub(high, low), dtype="uint64")
    offset = ops.convert(ops.rem(bits, span), dtype="int64")
    return ops.convert(ops.add(low, offset), dtype=dtype)


def _categorical_infer(seed, logits, *, num_samples, dtype):
    name = "random_categorical"
    types = (seed, logits)
    _require_seed(name, *types)
    _require_dtype(name, dtype, INTS)
    if logits.rank != 2 or logits.dtype not in FLOATS:
        raise shape_error(name, types, "float logits [batch, classes]")
    return TensorType((logits.shape[0], num_samples), dtype)


def _categorical(seed, logits, *, num_samples, dtype):
    # The largest of logits plus Gumbel noise is distributed as their softmax (Gumbel, 1954).
    batch, classes = logits.shape
    drawn = unit_interval(seed, (batch, num_samples, classes), "float32", centred=True)
    noise = -np.log(-np.log(drawn))
    if not classes:
        raise ShapeError("random_categorical: there is no class to choose from")
    return np.argmax(logits.astype(np.float64)[:, None, :] + noise, axis=-1).astype(np_dtype(dtype))


RANDOM_CATEGORICAL = _random_record(
    "random_categorical",
    _categorical_infer,
    _categorical,
    lambda: [
        Sample((SEED, uniform((3, 5))), {"num_samples": 7, "dtype": "int32"}),
        Sample((SEED, uniform((0, 5))), {"num_samples": 2, "dtype": "int64"}, "empty"),
    ],
    NotDifferentiable("its result is an integer"),
)


def random_categorical(seed, logits, *, num_samples, dtype: str = "int32"):
    """Classes drawn with probabilities softmax(logits). logits: [batch, classes], float; gives [batch, num_samples]."""
    return bind(RANDOM_CATEGORICAL, seed, logits, num_samples=size_attr(num_samples), dtype=dtype_name(dtype))


# -- on the host ------------------------------------------------------------------------------------------------------
def _distribution(name: str, draw, operands: tuple, reason: str) -> Primitive:
    """A record of (seed, *parameters; shape, dtype); parameters broadcast to the shape.

    draw: `draw(generator, *parameters, shape)`. operands: the parameters' sample values.
    """

    def infer(seed, *parameters, shape, dtype):
        types = (seed, *parameters)
        _require_seed(name, *types)
        _require_dtype(name, dtype, DRAWN_FLOATS | INTS)
        if len(parameters) != len(operands) or any(p.dtype not in FLOATS for p in parameters):
            raise dtype_error(name, types, f"a seed and {len(operands)} float parameters")
        for index in range(1, len(types)):
            require_broadcast_to(name, types, index, shape)
        return TensorType(shape, dtype)

    def reference(seed, *parameters, shape, dtype):
        wide = [np.asarray(p, np.float64) for p in parameters]
        return np.asarray(draw(generator(seed), *wide, shape)).astype(np_dtype(dtype))

    def samples():
        rows = tuple(np.full((5,), v, np.float32) for v in operands)
        return [
            Sample((SEED, *(np.array(v, np.float32) for v in operands)), {"shape": (3, 5), "dtype": "float32"}),
            Sample((SEED, *rows), {"shape": (0, 5), "dtype": "float64"}, "empty"),
            Sample((SEED, *rows), {"shape": (2, 5), "dtype": "float32"}, "rows"),
        ]

    return _random_record(name, infer, reference, samples, NotDifferentiable(reason))


RANDOM_GAMMA = _distribution(
    "random_gamma",
    lambda g, alpha, shape: g.standard_gamma(alpha, shape),
    (1.5,),
    "the implicit derivative of gamma samples is not provided",
)
RANDOM_BETA = _distribution(
    "random_beta",
    lambda g, a, b, shape: g.beta(a, b, shape),
    (1.5, 0.5),
    "the implicit derivative of beta samples is not provided",
)
RANDOM_BINOMIAL = _distribution(
    "random_binomial",
    lambda g, n, p, shape: g.binomial(np.floor(n).astype(np.int64), p, shape),
    (9.0, 0.25),
    "its values are integers",
)


def random_gamma(seed, alpha, *, shape, dtype: str = "float32"):
    """Numbers of the gamma distribution of shape `alpha` and scale 1. alpha: float, broadcasts to `shape`."""
    return bind(RANDOM_GAMMA, seed, alpha, shape=shape_attr(shape), dtype=dtype_name(dtype))


def random_beta(seed, alpha, beta, *, shape, dtype: str = "float32"):
    """Numbers of the beta distribution. alpha, beta: float, broadcast to `shape`."""
    return bind(RANDOM_BETA, seed, alpha, beta, shape=shape_attr(shape), dtype=dtype_name(dtype))


def random_binomial(seed, counts, probabilities, *, shape, dtype: str = "float32"):
    """Successes among `counts` trials. counts (whole numbers), probabilities: float, broadcast to `shape`."""
    return bind(RANDOM_BINOMIAL, seed, counts, probabilities, shape=shape_attr(shape), dtype=dtype_name(dtype))


def _permutation_infer(seed, *, shape, axis, dtype):
    _require_seed("random_permutation", seed)
    _require_dtype("random_permutation", dtype, INTS)
    if not 0 <= axis < len(shape):
        raise ShapeError(f"random_permutation: axis {axis} is out of range for the shape {shape}")
    return TensorType(shape, dtype)


def _permutation(seed, *, shape, axis, dtype):
    keys = _wide_words(seed, int(np.prod(shape, dtype=np.int64))).reshape(shape)
    return np.argsort(keys, axis=axis, kind="stable").astype(np_dtype(dtype))


RANDOM_PERMUTATION = _random_record(
    "random_permutation",
    _permutation_infer,
    _permutation,
    lambda: [
        Sample((SEED,), {"shape": (9,), "axis": 0, "dtype": "int32"}),
        Sample((SEED,), {"shape": (3, 5, 2), "axis": 1, "dtype": "int32"}, "independent"),
        Sample((SEED,), {"shape": (0, 5), "axis": 1, "dtype": "int64"}, "empty"),
    ],
    NotDifferentiable("its result is an integer"),
)


def random_permutation(seed, *, shape, axis: int = 0, dtype: str = "int32"):
    """Indices that shuffle each line along `axis` of a tensor of `shape` by itself, for `take_along_axis`.

    shape (n,) gives one permutation of 0..n-1. seed: uint32 or int32 [2]; dtype: integer.
    """
    shape = shape_attr(shape)
    axis = normalize_axis("random_permutation", axis, len(shape))
    return bind(RANDOM_PERMUTATION, seed, shape=shape, axis=axis, dtype=dtype_name(dtype))
