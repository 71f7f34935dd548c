"""The call that a saved model repeats when it is loaded: its inputs, and the outputs that it had."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kgraph.errors import KGraphError
from kgraph.runtime.artifact_file import ArtifactFile
from kgraph.runtime.artifact_forms import DAMAGE, LoadedForm, as_text
from kgraph.runtime.artifact_tensors import Tensors, to_pieces

_INPUT, _OUTPUT = "input.{}", "output.{}"


def test_pieces(inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> list:
    """The content of the section of a self-test."""
    tensors = {_INPUT.format(i): a for i, a in enumerate(inputs)} | {
        _OUTPUT.format(i): a for i, a in enumerate(outputs)
    }
    return to_pieces(tensors)


def check(file: ArtifactFile, form: LoadedForm, data: Any) -> None:
    """Repeat a call on a copy of the form's state. Raises ArtifactError where the results are others.

    data: the self-test's entry in the manifest; None for no self-test.
    """
    if data is None:
        return
    try:
        inputs, expected = _read(file, data, form)
        exact = bool(data["exact"])
    except DAMAGE as error:
        if isinstance(error, KGraphError):
            raise
        file.fail(f"its self-test is damaged: {error}")
    try:
        results = _run(form, inputs)
    except Exception as error:
        file.fail(f"its self-test does not run: {error}")
    for number, (got, wanted) in enumerate(zip(results, expected, strict=True)):
        alike = (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
        if not alike or not (got.tobytes() == wanted.tobytes() if exact else _close(got, wanted)):
            file.fail(
                f"its self-test failed: output {number} is not what it was when the model was saved; "
                "this machine computes something else, or the file is damaged"
            )


def renewed(file: ArtifactFile, form: LoadedForm, data: Any) -> list:
    """The content of the section of a self-test with the results that belong to the form's state now."""
    inputs, _ = _read(file, data, form)
    return test_pieces(inputs, _run(form, inputs))


def _read(file: ArtifactFile, data: Any, form: LoadedForm) -> tuple[list[np.ndarray], list[np.ndarray]]:
    tensors = Tensors(file.read(as_text(data["section"])))
    inputs = [tensors[_INPUT.format(i)] for i in range(form.inputs.num_leaves)]
    return inputs, [tensors[_OUTPUT.format(i)] for i in range(form.outputs.num_leaves)]


def _run(form: LoadedForm, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    results = form.program([*inputs, *(value.copy() for value in form.state_inputs())])
    return list(results[: form.outputs.num_leaves])


def _close(got: np.ndarray, wanted: np.ndarray) -> bool:
    """Whether results of NumPy's libraries, which differ between machines, agree to a part in a thousand."""
    if got.dtype.kind not in "fc":
        return np.array_equal(got, wanted)
    scale = np.nanmax(np.abs(wanted), initial=0.0)
    return bool(np.allclose(got, wanted, rtol=1e-3, atol=1e-3 * scale, equal_nan=True))
