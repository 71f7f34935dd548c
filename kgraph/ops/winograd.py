"""Winograd's minimal filtering: `m` outputs of a filter with three taps from `m + 2` products, as of Toom and Cook.

Inputs, filter and outputs are polynomials; a product of polynomials is known from its values at `m + 2` points, of
which one is infinity: y = A^T ((G g) * (B^T d)). In two dimensions, with g [3, 3] and a tile d [m + 2, m + 2] of the
input,

    y = A^T ((G g G^T) * (B^T d B)) A

gives m x m outputs. The sums over channels come between the transforms, where they are products of matrices, one per
point, or pair of points.

The points are 0, pairs of +p and -p (transforms share the even and the odd part of a polynomial's values) and infinity.
Those of m = 4 are not the usual 1 and 2: with 5/8 and 3/2 the error is 0.4 times as large, and all factors of the
transforms of inputs and outputs are exact.
"""

from __future__ import annotations

import functools
from fractions import Fraction

import numpy as np

TAPS = 3
Pairs = tuple[Fraction, ...]
PAIRS: dict[int, Pairs] = {2: (Fraction(1),), 4: (Fraction(5, 8), Fraction(3, 2))}  # by m


def points(pairs: Pairs) -> list[Fraction]:
    """The finite points in their order: 0, p, -p, q, -q, ...; infinity is the last one."""
    return [Fraction(0), *(sign * p for p in pairs for sign in (1, -1))]


def even_polynomial(pairs: Pairs) -> list[Fraction]:
    """Coefficients of the product of (x^2 - p^2) over the pairs, in powers of x^2, lowest first."""
    out = [Fraction(1)]
    for p in pairs:
        out = [lower - p * p * same for lower, same in zip([Fraction(0), *out], [*out, Fraction(0)])]
    return out


@functools.cache
def filter_matrix(pairs: Pairs) -> tuple[tuple[Fraction, ...], ...]:
    """G, [m + 2][3]."""
    finite = points(pairs)
    rows = []
    for p in finite:
        scale = Fraction(1)
        for q in finite:
            scale *= p - q if q != p else 1
        rows.append(tuple(p**power / scale for power in range(TAPS)))
    return (*rows, (Fraction(0),) * (TAPS - 1) + (Fraction(1),))


def _filter_array(outputs: int) -> np.ndarray:
    return np.array(filter_matrix(PAIRS[outputs]), np.float64)


def _over_axes(matrix: np.ndarray, axes: int) -> np.ndarray:
    """What transforms the values of all axes together, in the order of a flat array."""
    return functools.reduce(np.kron, [matrix] * axes)


def transformed_filters(w: np.ndarray, outputs: int) -> np.ndarray:
    """G g, or G g G^T, of filters w [3, channels, filters] or [3, 3, channels, filters].

    float64[(m + 2)^axes, channels, filters].
    """
    g = _over_axes(_filter_array(outputs), w.ndim - 2)
    # A small product per channel: for large ones, BLAS would wake threads that cost more than they gain.
    taps = w.reshape(-1, *w.shape[-2:]).astype(np.float64).transpose(1, 0, 2)
    return (g @ taps).transpose(1, 0, 2)


def original_filters(transformed: np.ndarray, outputs: int, axes: int) -> np.ndarray:
    """The filters [3, ..., channels, filters] of which `transformed` was made, up to rounding; float64."""
    inverse = _over_axes(np.linalg.pinv(_filter_array(outputs)), axes)
    flat = transformed.reshape(len(transformed), -1).astype(np.float64)
    return (inverse @ flat).reshape(*[TAPS] * axes, *transformed.shape[1:])
