"""A saved training step: batches in, logs out, and state that goes on from where it was when the step was saved."""

from __future__ import annotations

import json
import os
import threading
from typing import Any

import numpy as np

from kgraph.errors import KGraphError
from kgraph.report import Explanation, Profile
from kgraph.runtime.artifact import LoadedModel
from kgraph.runtime.artifact_file import ArtifactFile, write_file
from kgraph.runtime.artifact_forms import state_section, state_tensors
from kgraph.runtime.artifact_self_test import renewed
from kgraph.runtime.artifact_tensors import to_pieces


class LoadedStep:
    """A training step from a file: forward and backward pass, the optimizer's update, metrics.

    Call it with a batch in the structure that the step was saved for, such as `(x, y)`; it gives the logs as a batch of
    `fit` does, metrics being running means since `reset_metrics`. The state changes in place, so one call runs at a
    time. What the step only reads, such as a learning rate that is no schedule, is as it was when the step was saved.
    """

    def __init__(self, model: LoadedModel, file: ArtifactFile):
        self._model, self._file = model, file
        self._form = model.forms[0]
        self._lock = threading.Lock()
        self.name, self.level = model.name, model.level

    def __call__(self, batch) -> Any:
        """Run one step. Raises InputError naming the array of the batch that does not fit."""
        with self._lock:
            return self._model(batch)

    @property
    def inputs(self):
        """The structure of a batch, with the name and type of each array."""
        return self._model.inputs

    @property
    def state(self) -> dict[str, np.ndarray]:
        """Copies of all values that steps change, and of the weights that they only read, by name."""
        return self._copies()

    def weights(self) -> dict[str, np.ndarray]:
        """Copies of the model's weights, by name."""
        return self._copies("weight")

    def _copies(self, kind: str | None = None) -> dict[str, np.ndarray]:
        with self._lock:
            form = self._form
            return {s.name: form.values[s.name].copy() for s in form.state if kind in (None, s.kind)}

    def reset_metrics(self) -> None:
        """Let the metrics begin anew, as an epoch of `fit` does."""
        with self._lock:
            for s in self._form.state:
                if s.reset is not None:
                    self._form.values[s.name] = s.reset.copy()

    def set_state(self, values: dict[str, np.ndarray]) -> None:
        """Go on from these values, such as those of `state` or `weights` at an earlier time.

        Raises KeyError for a name that is none of the state's, ValueError for another shape or dtype, and KGraphError
        for a weight that the step only reads. Nothing is changed then.
        """
        new = {}
        known = {s.name: s for s in self._form.state}
        for name, value in values.items():
            s, value = known[name], np.array(value, order="C")
            if (value.shape, value.dtype) != (s.value.shape, s.value.dtype):
                kinds = f"{value.dtype}{list(value.shape)}, expected {s.value.dtype}{list(s.value.shape)}"
                raise ValueError(f"{self.name}: the state {name!r} was given as {kinds}")
            if s.input < 0 and s.output < 0 and not np.array_equal(value, s.value, equal_nan=value.dtype.kind in "fc"):
                raise KGraphError(f"{self.name}: the step only reads {name!r}, so it is as it was saved")
            new[name] = value
        with self._lock:
            self._form.values.update(new)

    def save_weights(self, path: str | os.PathLike) -> None:
        """Write the model's weights to a safetensors file, by name."""
        pieces = to_pieces(self.weights())
        with open(path, "wb") as file:
            for piece in pieces:
                file.write(piece)

    def save(self, path: str | os.PathLike) -> int:
        """Write the step with its state as it is now, to go on from there; gives the size of the file.

        The self-tests of levels other than the one in use are left out, as their results would be others.
        """
        manifest, form = self._file.read_json("manifest"), self._form
        with self._lock:
            new = {state_section(0): to_pieces(state_tensors(form.state, form.values))}
            for level, program in manifest["forms"][0]["programs"].items():
                if program["self_test"] is not None and level == self.level:
                    new[program["self_test"]["section"]] = renewed(self._file, form, program["self_test"])
                else:
                    program["self_test"] = None
        new["manifest"] = [json.dumps(manifest, separators=(",", ":")).encode()]
        return write_file(path, [(name, new.get(name) or [self._file.view(name)]) for name in self._file.sections])

    def explain(self) -> Explanation:
        """Per kernel and per Keras layer: what was fused, what was not and why, flops, bytes, host steps."""
        return self._model.explain()

    def profile(self, batch, repeats: int = 10) -> Profile:
        """Time per kernel and per Keras layer of steps on this batch (medians over `repeats`); state stays as it is."""
        return self._model.profile(batch, repeats=repeats)

    def stats(self) -> dict:
        """Counts, the level of the code in use, and the seconds that loading took."""
        return self._model.stats()

    def __repr__(self):
        return f"<kgraph.LoadedStep {self.name!r} ({self.level})>"
