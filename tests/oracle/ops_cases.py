"""Single primitives against Keras on JAX: every case holds the inputs, kgraph's call and Keras' or JAX's.

Usage: python ops_cases.py <file.npz> in the JAX environment computes JAX's side of all cases.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

CASES: dict[str, Case] = {}


@dataclass(frozen=True)
class Case:
    """`ours` and `theirs` take the arrays of `inputs()` and give an array or a sequence of them."""

    inputs: tuple[np.ndarray, ...]
    ours: Callable
    theirs: Callable


def flat(result) -> list[np.ndarray]:
    parts = result if isinstance(result, (tuple, list)) else [result]
    return [np.asarray(p) for p in parts]


def floats(*shape, seed=0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def add(name: str, inputs, ours: Callable, theirs: Callable) -> None:
    if name in CASES:
        raise ValueError(f"two cases are called {name}")
    CASES[name] = Case(tuple(inputs), ours, theirs)


def keras_ops():
    import keras

    return keras.ops


def kgraph_ops():
    from kgraph import ops

    return ops


# -- convolution and pooling ------------------------------------------------------------------------------------------
def convolutions() -> None:
    sizes, windows, strides, dilations = (5, 8, 9), (1, 2, 3, 5), (1, 2, 3), (1, 2)
    for n, k, s, d, p, g in itertools.product(sizes, windows, strides, dilations, ("same", "valid"), (1, 2)):
        if (s > 1 and d > 1) or (p == "valid" and n < (k - 1) * d + 1):
            continue
        add(
            f"conv size {n} window {k} stride {s} dilation {d} {p} groups {g}",
            (floats(2, n, 4), floats(k, 4 // g, 6)),
            lambda x, w, s=s, d=d, p=p, g=g: kgraph_ops().conv(
                x, w, strides=s, padding=p, rhs_dilation=d, feature_groups=g
            ),
            lambda x, w, s=s, d=d, p=p: keras_ops().conv(x, w, strides=s, padding=p, dilation_rate=d),
        )
    for n, k, s, d, p, o in itertools.product(
        (4,), (1, 2, 3, 4, 5), strides, dilations, ("same", "valid"), (None, 0, 1)
    ):
        if (s > 1 and d > 1) or (o is not None and o >= s):
            continue
        add(
            f"conv_transpose size {n} window {k} stride {s} dilation {d} {p} output padding {o}",
            (floats(2, n, 3), floats(k, 6, 3)),
            lambda x, w, s=s, d=d, p=p, o=o: kgraph_ops().conv_transpose(
                x, w, strides=s, padding=p, output_padding=o, dilation=d
            ),
            lambda x, w, s=s, d=d, p=p, o=o: keras_ops().conv_transpose(
                x, w, strides=s, padding=p, output_padding=o, dilation_rate=d
            ),
        )


def pooling() -> None:
    for n, k, s, p in itertools.product((5, 6, 7), (1, 2, 3), (1, 2, 3), ("same", "valid")):
        for kind in ("max_pool", "average_pool"):
            add(
                f"{kind} size {n} window {k} stride {s} {p}",
                (floats(2, n, n + 1, 3),),
                lambda x, kind=kind, k=k, s=s, p=p: getattr(kgraph_ops(), kind)(x, window=k, strides=s, padding=p),
                lambda x, kind=kind, k=k, s=s, p=p: getattr(keras_ops(), kind)(x, k, s, p),
            )

    def theirs(x, cotangent):
        import jax

        return jax.vjp(lambda x: keras_ops().max_pool(x, 3, 2, "same"), x)[1](cotangent)[0]

    attrs = {"kind": "max", "window": (1, 3, 3, 1), "strides": (1, 2, 2, 1), "padding": "same"}
    ties = np.random.default_rng(0).integers(0, 3, (2, 7, 6, 3)).astype(np.float32)
    ours = lambda x, cotangent: kgraph_ops().select_and_scatter_add(x, cotangent, **attrs)
    add("gradient of max_pool with ties", (ties, floats(2, 4, 3, 3)), ours, theirs)


# -- images -----------------------------------------------------------------------------------------------------------
def resizing() -> None:
    shapes = [((5, 7), (8, 3)), ((8, 9), (4, 18)), ((16, 1), (5, 4)), ((3, 3), (3, 5))]
    methods = ("nearest", "bilinear", "bicubic", "lanczos3", "lanczos5")
    for method, antialias, (size, target) in itertools.product(methods, (False, True), shapes):
        add(
            f"resize {method} {size} to {target} antialias {antialias}",
            (floats(2, *size, 3),),
            lambda x, m=method, a=antialias, t=target: kgraph_ops().resize(x, size=t, method=m, antialias=a),
            lambda x, m=method, a=antialias, t=target: keras_ops().image.resize(x, t, interpolation=m, antialias=a),
        )
    for size, target in ((10, 25), (14, 49), (20, 25), (28, 49), (2, 41)):  # ties that rounding decides
        add(
            f"resize nearest {size} to {target}",
            (np.arange(size, dtype=np.float32).reshape(1, size, 1, 1),),
            lambda x, t=target: kgraph_ops().resize(x, size=(t, 1), method="nearest"),
            lambda x, t=target: keras_ops().image.resize(x, (t, 1), interpolation="nearest"),
        )


# -- attention --------------------------------------------------------------------------------------------------------
def attention() -> None:
    mask = np.random.default_rng(0).integers(0, 2, (2, 1, 5, 7)).astype(bool)
    mask[0, 0, 2] = False  # a query that sees nothing
    operands = (floats(2, 5, 4, 8), floats(2, 7, 2, 8, seed=1), floats(2, 7, 2, 8, seed=2), mask, floats(2, 4, 5, 7))
    cotangent = floats(2, 5, 4, 8, seed=3)
    for causal in (False, True):
        attrs = {"scale": 0.3, "is_causal": causal, "has_mask": True, "has_bias": True}

        def ours(*arrays, attrs=attrs):
            from kgraph.ir import PRIMITIVES

            result = kgraph_ops().attention(*arrays[:-1], **attrs)
            gradients = PRIMITIVES["attention"].gradient((arrays[-1],), arrays[:-1], (result,), **attrs)
            return [result, *(g for g in gradients if g is not None)]

        def theirs(q, k, v, mask, bias, cotangent, causal=causal):
            import jax

            call = lambda q, k, v, b: jax.nn.dot_product_attention(q, k, v, b, mask, is_causal=causal, scale=0.3)
            result, pull_back = jax.vjp(call, q, k, v, bias)
            return [result, *pull_back(cotangent)]

        add(f"attention and its gradient, causal {causal}", (*operands, cotangent), ours, theirs)


# -- recurrent layers -------------------------------------------------------------------------------------------------
def recurrent() -> None:
    layers = [
        ("LSTM", "lstm", {}),
        ("LSTM", "lstm", {"recurrent_activation": "hard_sigmoid", "activation": "softsign"}),
        ("GRU", "gru", {}),
        ("GRU", "gru", {"reset_after": False}),
        ("SimpleRNN", "simple", {"activation": "elu"}),
    ]
    gates = {"lstm": 4, "gru": 3, "simple": 1}
    mask = np.random.default_rng(0).integers(0, 3, (3, 5)) > 0
    for (layer, cell, options), backward, masked, zero in itertools.product(layers, *[(False, True)] * 3):
        width = gates[cell] * 6
        two_biases = cell == "gru" and options.get("reset_after", True)
        bias = floats(2, width) if two_biases else floats(width)
        states = [floats(3, 6, seed=i) for i in range(2 if cell == "lstm" else 1)]
        attrs = {"reset_after": True, **options, "cell": cell, "reverse": backward, "has_mask": masked}

        def ours(x, kernel, recurrent_kernel, bias, mask, *states, attrs=attrs, zero=zero):
            bias, recurrent_bias = bias if bias.ndim == 2 else (bias, np.zeros_like(bias))
            extra = (mask,) if attrs["has_mask"] else ()
            sequence, *final = kgraph_ops().rnn(
                x, kernel, recurrent_kernel, bias, recurrent_bias, *states, *extra, zero_output_for_mask=zero, **attrs
            )
            return [sequence[:, ::-1] if attrs["reverse"] else sequence, *final]

        def theirs(
            x, kernel, recurrent_kernel, bias, mask, *states, layer=layer, options=options, attrs=attrs, zero=zero
        ):
            import keras

            made = getattr(keras.layers, layer)(
                6,
                return_sequences=True,
                return_state=True,
                go_backwards=attrs["reverse"],
                zero_output_for_mask=zero,
                **options,
            )
            made.build(x.shape)
            made.set_weights([kernel, recurrent_kernel, bias])
            return made(x, initial_state=list(states), mask=mask if attrs["has_mask"] else None)

        inputs = (floats(3, 5, 4), floats(4, width), floats(6, width), bias, mask, *states)
        add(f"{layer} {options} backward {backward} masked {masked} zeros {zero}", inputs, ours, theirs)


# -- transforms -------------------------------------------------------------------------------------------------------
def fourier() -> None:
    signal, spectrum = floats(3, 9), (floats(3, 8) + 1j * floats(3, 8, seed=1)).astype(np.complex64)

    def ours(name, **attrs):
        def call(x, cotangent):
            from kgraph.ir import PRIMITIVES

            result = getattr(kgraph_ops(), name)(x, **attrs)
            return [result, *PRIMITIVES[name].gradient((cotangent,), (x,), (result,), **attrs)]

        return call

    def theirs(name, length=None):
        def call(x, cotangent):
            import jax

            transform = getattr(jax.numpy.fft, name)
            result, pull_back = jax.vjp(lambda x: transform(x) if length is None else transform(x, n=length), x)
            return [result, *pull_back(cotangent)]

        return call

    wide = (floats(3, 5, seed=2) + 1j * floats(3, 5, seed=3)).astype(np.complex64)
    add("fft and its gradient", (spectrum, spectrum[::-1]), ours("fft"), theirs("fft"))
    add("ifft and its gradient", (spectrum, spectrum[::-1]), ours("ifft"), theirs("ifft"))
    add("rfft and its gradient", (signal, wide), ours("rfft", length=9), theirs("rfft", length=9))
    add("irfft and its gradient", (spectrum, floats(3, 14)), ours("irfft", length=14), theirs("irfft", length=14))


for family in (convolutions, pooling, resizing, attention, recurrent, fourier):
    family()


def main() -> None:
    results = {}
    for number, case in enumerate(CASES.values()):
        for index, part in enumerate(flat(case.theirs(*case.inputs))):
            results[f"{number}.{index}"] = part
    np.savez(sys.argv[1], **results)


if __name__ == "__main__":
    main()
