"""The primitives that have no form in ONNX, and why."""

from __future__ import annotations

_REASONS = {
    "ONNX has no complex numbers": ("complex", "conj", "real", "imag", "fft", "fft2", "ifft", "ifft2", "rfft", "irfft"),
    "ONNX has no linear algebra beyond products": (
        "cholesky", "det", "eig", "eigh", "inv", "lstsq", "lu", "matrix_rank", "pinv", "qr", "slogdet", "solve", "svd",
        "triangular_solve",
    ),
    "ONNX' random numbers do not follow a seed that is an input": (
        "random_beta", "random_binomial", "random_bits", "random_categorical", "random_gamma", "random_normal",
        "random_permutation", "random_uniform", "random_words", "truncated_normal",
    ),
    "ONNX has no such function": ("digamma", "erf_inv", "lgamma"),
    "ONNX has no operator for the bits of numbers": ("bitcast_regroup", "nextafter"),
    "it is part of training steps only": (
        "attention_gradient", "conv_filter_gradient", "rnn_gradient", "select_and_scatter_add",
    ),
    "a search on the host": ("ctc_beam_search",),
    "it belongs to this project's own kernels": ("fusion", "pack"),
}  # fmt: skip
ABSENT = {name: reason for reason, names in _REASONS.items() for name in names}
