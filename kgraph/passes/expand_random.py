"""Writes draws out as elementwise functions of the generator's words, which fuse with what reads them."""

from __future__ import annotations

import math
from collections.abc import Callable

from scipy import special

from kgraph import ops
from kgraph.ir import Graph, Node, Rewriter, Value, np_dtype
from kgraph.ir.recorder import Recorder, inheriting
from kgraph.passes.manager import PassContext

# Beyond this bound of a truncated distribution, float32 has too few numbers between a probability and 1.
FLOAT32_BOUND = 2.5
_SIGNIFICANT_BITS = {"float16": 11, "bfloat16": 8, "float32": 24, "float64": 53}


def expand_random(graph: Graph, context: PassContext | None = None) -> Graph:
    """`random_uniform(seed)  ->  mul(convert(shift_right(random_words(seed), 8)), 2**-24)`, and so on."""

    def visit(node: Node, inputs: tuple[Value, ...], rewriter: Rewriter):
        expansion = EXPANSIONS.get(node.name)
        if expansion is None:
            return None
        recorder = Recorder(graph=rewriter.target)
        with recorder.active(), inheriting(node.provenance):
            return recorder.value(expansion(*map(recorder.wrap, inputs), **node.attrs))

    return Rewriter(graph).run(visit)


def _scalar(value: float, dtype: str):
    return ops.constant(value, dtype)


def _words(seed, shape, wide: bool = False):
    """Words of 32 bits, or of 64 in the order of `kgraph.ops.random.wide_words`."""
    low = ops.random_words(seed, shape=shape)
    if not wide:
        return low
    high = ops.convert(ops.random_words(seed, shape=shape, stream=1), dtype="uint64")
    high = ops.shift_left(high, _scalar(32, "uint64"))
    return ops.bitwise_or(ops.convert(low, dtype="uint64"), high)


def _leading_bits(seed, shape, dtype: str, count: int):
    """The `count` leading bits of a word, as numbers of a float dtype that holds them."""
    wide = dtype == "float64"
    word = _words(seed, shape, wide)
    shift = _scalar((64 if wide else 32) - count, word.dtype)
    return ops.convert(ops.shift_right(word, shift), dtype=dtype)


def _centred(seed, shape, dtype: str, factor: float, shift: float, wide: str):
    """factor * u + shift, computed in the dtype `wide`, for the centred u in (0, 1) of `dtype`.

    Exact for factor 2 and shift -1.
    """
    kept = 52 if dtype == "float64" else 23
    drawn = _leading_bits(seed, shape, "float64" if dtype == "float64" else "float32", kept)
    steps = ops.add(_converted(drawn, wide), _scalar(0.5, wide))
    return ops.add(ops.mul(steps, _scalar(factor * 2.0**-kept, wide)), _scalar(shift, wide))


def _bits(seed, *, shape, dtype):
    wide = np_dtype(dtype).itemsize == 8
    word = _words(seed, shape, wide)
    if dtype in ("int32", "int64"):
        return ops.bitcast_convert(word, dtype=dtype)
    return word if dtype == word.dtype else ops.convert(word, dtype=dtype)


def _uniform(seed, *, shape, dtype):
    kept = _SIGNIFICANT_BITS[dtype]
    return ops.mul(_leading_bits(seed, shape, dtype, kept), _scalar(2.0**-kept, dtype))


def _normal(seed, *, shape, dtype):
    wide = "float64" if dtype == "float64" else "float32"
    x = ops.erf_inv(_centred(seed, shape, dtype, 2.0, -1.0, wide))
    return _converted(ops.mul(x, _scalar(math.sqrt(2.0), wide)), dtype)


def _truncated_normal(seed, *, shape, dtype, lower, upper):
    near = max(abs(lower), abs(upper)) <= FLOAT32_BOUND
    wide = "float32" if near and dtype != "float64" else "float64"
    low, high = (float(special.erf(bound / math.sqrt(2.0))) for bound in (lower, upper))
    x = ops.erf_inv(_centred(seed, shape, dtype, high - low, low, wide))
    x = ops.mul(x, _scalar(math.sqrt(2.0), wide))
    x = ops.minimum(ops.maximum(x, _scalar(lower, wide)), _scalar(upper, wide))
    return _converted(x, dtype)


def _converted(x, dtype: str):
    return x if x.dtype == dtype else ops.convert(x, dtype=dtype)


def _categorical(seed, logits, *, num_samples, dtype):
    batch, classes = logits.shape
    wide = "float64" if logits.dtype == "float64" else "float32"
    drawn = _centred(seed, (batch, num_samples, classes), "float32", 1.0, 0.0, wide)
    noise = ops.neg(ops.log(ops.neg(ops.log(drawn))))
    scores = ops.add(ops.reshape(_converted(logits, wide), shape=(batch, 1, classes)), noise)
    return _converted(ops.argmax(scores, axis=2, dtype="int32"), dtype)


def _permutation(seed, *, shape, axis, dtype):
    keys = _words(seed, shape, wide=True)
    return ops.argsort(keys, axis=axis, stable=True, descending=False, dtype=dtype)


EXPANSIONS: dict[str, Callable] = {
    "random_bits": _bits,
    "random_uniform": _uniform,
    "random_normal": _normal,
    "truncated_normal": _truncated_normal,
    "random_categorical": _categorical,
    "random_permutation": _permutation,
}
