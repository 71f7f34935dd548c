"""Random numbers as functions of a seed and a shape: the same seed gives the same numbers on every machine.

A seed is uint32 or int32 [2] and keys a counter-based generator (see `philox`). `random_words` gives its words; all
draws but the last three are elementwise functions of them, so that any element can be computed by itself:
`passes.expand_random` writes them out. The gamma, beta and binomial distributions reject samples and run on the host.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from scipy import special

from kgraph import ops
from kgraph.errors import DTypeError, ShapeError
from kgraph.ir import NotDifferentiable, Primitive, Sample, TensorType, bind, dtype_name, np_dtype, register
from kgraph.ir.types import FLOATS, INTS
from kgraph.ops import philox
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
    "random_words",
    "truncated_normal",
]

SEED = np.array([1337, 42], np.uint32)
# Numbers that are drawn at a time, and from how many on by several threads.
_BLOCK = 1 << 14
_PARALLEL_FROM = 1 << 19


# -- words ------------------------------------------------------------------------------------------------------------
def _key(seed: np.ndarray) -> tuple[int, int]:
    low, high = (int(s) & 0xFFFFFFFF for s in seed)
    return low, high


def generator(seed: np.ndarray) -> np.random.Generator:
    """NumPy's generator for a seed, for what needs an unknown count of random numbers."""
    low, high = _key(seed)
    return np.random.Generator(np.random.Philox(key=[low | high << 32, 0]))


def words(seed: np.ndarray, count: int, stream: int = 0) -> np.ndarray:
    """`count` random 32-bit words. Streams of one seed are independent."""
    return philox.words(_key(seed), count, stream)


def wide_words(seed: np.ndarray, count: int) -> np.ndarray:
    """`count` random 64-bit words: the lower halves are stream 0, the upper ones stream 1."""
    return words(seed, count) | words(seed, count, stream=1).astype(np.uint64) << np.uint64(32)


def unit_interval(seed: np.ndarray, shape: tuple, dtype: str, *, centred: bool = False) -> np.ndarray:
    """Multiples of 2**-24 in [0, 1), or of 2**-53 for float64; float64 [shape].

    centred: (k + 0.5) * 2**-23 instead, or 2**-52, which are within (0, 1).
    """
    return _of_unit_interval(seed, shape, dtype, np.dtype(np.float64), lambda unit: unit, centred=centred)


def _of_unit_interval(
    seed: np.ndarray, shape: tuple, dtype: str, result: np.dtype, function: Callable, *, centred: bool = False
) -> np.ndarray:
    """An elementwise function of `unit_interval`, rounded to the dtype `result`; [shape].

    A block at a time, which stays in the cache, and blocks on several threads: NumPy lets others run meanwhile.
    """
    count = int(np.prod(shape, dtype=np.int64))
    wide = dtype == "float64"
    # A centred number needs a bit for the half step, to be exact in the dtype.
    kept = (53 if wide else 24) - centred
    bits = wide_words(seed, count) if wide else words(seed, count)
    shift = bits.dtype.type(8 * bits.itemsize - kept)
    out = np.empty(count, result)

    def fill(start: int) -> None:
        unit = (bits[start : start + _BLOCK] >> shift).astype(np.float64)
        if centred:
            unit += 0.5
        unit *= 2.0**-kept
        out[start : start + _BLOCK] = function(unit)

    if count < _PARALLEL_FROM:
        for start in range(0, count, _BLOCK):
            fill(start)
    else:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(fill, range(0, count, _BLOCK)))
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
        return sample(seed, shape, dtype, **attrs).astype(np_dtype(dtype), copy=False)

    def samples():
        shapes = [(3, 5), (), (2, 0), (7,)]
        return [
            Sample((SEED + np.uint32(i),), {"shape": shape, "dtype": dtypes[i % len(dtypes)], **extra})
            for i, shape in enumerate(shapes)
        ]

    return _random_record(name, infer, reference, samples)


def _words_infer(seed, *, shape, stream):
    _require_seed("random_words", seed)
    return TensorType(shape, "uint32")


RANDOM_WORDS = _random_record(
    "random_words",
    _words_infer,
    lambda seed, *, shape, stream: words(seed, int(np.prod(shape, dtype=np.int64)), stream).reshape(shape),
    lambda: [
        Sample((SEED,), {"shape": (3, 5), "stream": 0}),
        Sample((SEED,), {"shape": (), "stream": 1}, "scalar"),
        Sample((SEED,), {"shape": (2, 0), "stream": 0}, "empty"),
        Sample((SEED + np.uint32(1),), {"shape": (3, 700), "stream": 1}, "several groups"),
    ],
)


def random_words(seed, *, shape, stream: int = 0):
    """The words of the generator, uint32 in C order. seed: uint32 or int32 [2]; streams of one seed are independent."""
    return bind(RANDOM_WORDS, seed, shape=shape_attr(shape), stream=int(stream))


# -- elementwise functions of the words -------------------------------------------------------------------------------
def _bits(seed, shape, dtype):
    count = int(np.prod(shape, dtype=np.int64))
    drawn = wide_words(seed, count) if dtype in ("uint64", "int64") else words(seed, count)
    return drawn.reshape(shape)


def _uniform(seed, shape, dtype):
    # Rounding must not reach 1: keep as many leading bits as the dtype holds.
    bits = {"float16": 11, "bfloat16": 8}.get(dtype)
    leading = lambda unit: unit if bits is None else np.floor(unit * 2.0**bits) * 2.0**-bits
    return _of_unit_interval(seed, shape, dtype, np_dtype(dtype), leading)


def _normal(seed, shape, dtype):
    return _of_unit_interval(seed, shape, dtype, np_dtype(dtype), special.ndtri, centred=True)


def _truncated_normal(seed, shape, dtype, *, lower, upper):
    low, high = special.ndtr(lower), special.ndtr(upper)
    cut = lambda unit: np.clip(special.ndtri(low + unit * (high - low)), lower, upper)
    return _of_unit_interval(seed, shape, dtype, np_dtype(dtype), cut, centred=True)


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
    keys = wide_words(seed, int(np.prod(shape, dtype=np.int64))).reshape(shape)
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
