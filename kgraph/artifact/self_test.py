"""The call that a saved model repeats when it is loaded: small random inputs, and what came out of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kgraph.dims import Dim, evaluate
from kgraph.errors import InputError
from kgraph.runtime.artifact_tensors import is_writable
from kgraph.runtime.plan import Program
from kgraph.structure import Structure
from kgraph.types import TensorType

# Values for the sizes other than the batch, until one is large enough for the model.
_SIZES = (8, 16, 32, 64, 128, 256, 1)
_MOST_BYTES = 64 << 20


def record(
    program: Program, inputs: Structure, num_results: int, state: Sequence[np.ndarray]
) -> tuple[list[np.ndarray], list[np.ndarray]] | None:
    """Inputs and the first `num_results` outputs for them; None where no small inputs are found that the program takes.

    state: the values of the inputs that follow those of the structure; they stay as they are.
    """
    for size in _SIZES:
        random = np.random.default_rng(0)
        symbols = {s for t in inputs.types for d in t.shape if isinstance(d, Dim) for s in d.symbols()}
        sizes = {s: 1 if s == "N" else size for s in symbols}
        arrays = [_random(random, t, sizes) for t in inputs.types]
        try:
            outputs = list(program([*arrays, *(value.copy() for value in state)])[:num_results])
        except InputError:
            if not sizes:
                return None
            continue
        except (ArithmeticError, ValueError, np.linalg.LinAlgError):
            return None  # a step on NumPy does not take random numbers
        tensors = [*arrays, *outputs]
        fit = sum(a.nbytes for a in tensors) <= _MOST_BYTES and all(is_writable(a.dtype.name) for a in tensors)
        return (arrays, outputs) if fit else None
    return None


def _random(random: np.random.Generator, type_: TensorType, sizes: dict[str, int]) -> np.ndarray:
    shape, dtype = tuple([evaluate(d, sizes) for d in type_.shape]), type_.np_dtype
    if type_.is_float or dtype.kind == "c":
        return random.uniform(-1, 1, shape).astype(dtype)
    return random.integers(0, 2, shape).astype(dtype)  # small enough to be an index into anything
