"""Saved models: opened, checked, and made callable without Keras or the compiler.

The section `manifest` says what the file holds: the structure of the inputs, the levels (kinds of machine) that it has
object code for, and the forms of the model, one for all sizes or one per set of fixed sizes. Each form has a program
for each level: its plan, its code and its weights, prepared for that level.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kgraph.errors import ArtifactError, InputError, KGraphError
from kgraph.report import Explanation, Profile, profile_of
from kgraph.runtime import artifact_plan, artifact_self_test, layout
from kgraph.runtime.artifact_file import ArtifactFile
from kgraph.runtime.artifact_forms import DAMAGE, LoadedForm, as_text, read_form
from kgraph.runtime.artifact_level import Requirement
from kgraph.runtime.model import Model, sizes_of
from kgraph.runtime.threads import available_cpus
from kgraph.structure import Structure

MAX_CHECKING_THREADS = 8


class LevelError(ArtifactError):
    """The file has no object code that this machine runs."""


@dataclass
class Manifest:
    """What a file holds.

    levels: requirement of the code by level, best first. forms: as they stand. host_steps: what runs on NumPy, and why.
    layout: version of the tables that the native executor in the file reads.
    """

    kind: str
    name: str
    kgraph: str
    inputs: Structure
    adapts_rank: bool
    fixed: tuple[str, ...]
    specialised: str | None
    levels: dict[str, Requirement]
    forms: list[dict[str, Any]]
    host_steps: list[str]
    layout: int

    @staticmethod
    def read(file: ArtifactFile) -> Manifest:
        """The manifest of a file. Raises ArtifactError if it is none."""
        data = file.read_json("manifest")
        try:
            levels = {as_text(name): Requirement.from_json(needs) for name, needs in data["levels"]}
            forms, fixed, steps = data["forms"], data["fixed"], data["host_steps"]
            if not all(type(form) is dict for form in forms) or data["kind"] not in ("model", "step") or not forms:
                raise ValueError("it describes no model")
            return Manifest(
                data["kind"],
                as_text(data["name"]),
                as_text(data["kgraph"]),
                Structure.from_json(data["inputs"]),
                bool(data["adapts_rank"]),
                tuple(map(as_text, fixed)),
                None if data["specialised"] is None else as_text(data["specialised"]),
                levels,
                forms,
                list(map(as_text, steps)),
                int(data["layout"]),
            )
        except DAMAGE as error:
            file.fail(f"its manifest is damaged: {error}")

    def choose(self, file: ArtifactFile, level: str | None) -> str:
        """The level to use. Raises LevelError where this machine runs none, or not the one asked for."""
        if level is not None and level not in self.levels:
            stored = ", ".join(self.levels) or "none"
            raise ArtifactError(f"{file.path}: it has no code for {level!r}; there is code for {stored}")
        if self.layout != layout.version():
            raise LevelError(f"{file.path}: its code was made for the tables of another version, kgraph {self.kgraph}")
        lacking = {name: self.levels[name].missing() for name in self.levels if level in (None, name)}
        for name, missing in lacking.items():
            if not missing:
                return name
        reasons = "; ".join(f"{name} needs {', '.join(missing)}" for name, missing in lacking.items()) or "it has none"
        raise LevelError(f"{file.path}: this machine runs none of its object code: {reasons}")


class LoadedModel(Model):
    """A model from a file: called, profiled and explained like the `CompiledModel` that was saved, and frozen.

    State (such as that of random generators and stateful layers) goes on from where it was when the model was saved.
    Safe to call from many threads and after a fork.
    """

    def __init__(self, manifest: Manifest, forms: Sequence[LoadedForm], level: str, seconds: dict[str, float]):
        self.name, self.level, self._seconds = manifest.name, level, seconds
        self._inputs, self._adapts_rank = manifest.inputs, manifest.adapts_rank
        self._fixed, self._specialised = manifest.fixed, manifest.specialised
        self.forms = list(forms)
        self._forms = {tuple(form.sizes[name] for name in self._fixed): form for form in forms}
        self._values = _shared_values(forms)
        self._fast: tuple | None = None
        form = forms[0]
        if not self._fixed and not form.state and form.outputs.is_leaf and self._inputs.is_leaf:
            if len(self._inputs.types) == len(form.outputs.types) == 1:
                self._fast = form.program, self._inputs.types[0].np_dtype, self._inputs.types[0].rank

    def __call__(self, *args, out=None, **kwargs):
        fast = self._fast
        if fast is not None and out is None and len(args) == 1 and not kwargs:
            x = args[0]
            program, dtype, rank = fast
            if type(x) is np.ndarray and x.dtype is dtype and x.ndim == rank:
                return program((x,))[0]
        return self._call(args, kwargs, out)

    __call__.__doc__ = Model.__call__.__doc__

    def _form_for(self, arrays: list[np.ndarray]) -> LoadedForm:
        if not self._fixed:
            return self._forms[()]
        sizes = sizes_of([a.shape for a in arrays], self._inputs)
        key = tuple(sizes[name] for name in self._fixed)
        try:
            return self._forms[key]
        except KeyError:
            stored = "; ".join(", ".join(f"{n}={v}" for n, v in form.sizes.items()) for form in self._forms.values())
            wanted = ", ".join(f"{name}={value}" for name, value in zip(self._fixed, key))
            raise InputError(
                f"{self.name} was saved for the sizes {stored}, this call has {wanted}; call the compiled model with "
                "such inputs before it is saved"
            ) from None

    @property
    def graph(self) -> str:
        """The optimised graph, as text."""
        return self._last().text()

    def _last(self) -> LoadedForm:
        return next(reversed(self._forms.values()))

    def explain(self) -> Explanation:
        """Per kernel and per Keras layer: what was fused, what was not and why, flops, bytes, host steps."""
        rows, decisions = self._last().report()
        return Explanation(self.name, rows, decisions, self._specialised)

    def profile(self, *args, repeats: int = 10, **kwargs) -> Profile:
        """Time per kernel and per Keras layer of calls with these inputs (medians over `repeats`)."""
        form, arrays = self._bind(args, kwargs)
        state = [value.copy() for value in form.state_inputs()]  # a profile leaves it as it is
        return profile_of(self.name, form.report()[0], form.program, [*arrays, *state], repeats)

    def stats(self) -> dict:
        """Counts as `CompiledModel.stats` has them, the level of the code in use, and the seconds that loading took."""
        out: dict = {"compiles": 0, "specialised": self._specialised, "variants": len(self._forms), "level": self.level}
        return out | self._last().program.stats() | {"seconds": dict(self._seconds)}

    def __repr__(self):
        return f"<kgraph.LoadedModel {self.name!r} ({self.level})>"


def _shared_values(forms: Sequence[LoadedForm]) -> dict[str, np.ndarray]:
    """Let all forms have one state; gives its values. Raises ValueError where they do not agree on a type."""
    values: dict[str, np.ndarray] = {}
    for form in forms:
        for name, value in form.values.items():
            known = values.setdefault(name, value)
            if (known.shape, known.dtype) != (value.shape, value.dtype):
                raise ValueError(f"the state {name!r} has several types")
        form.values = values
    return values


def open_model(
    file: ArtifactFile,
    manifest: Manifest,
    host_functions: artifact_plan.HostFunctions,
    clock: Clock,
    *,
    check_weights: bool = True,
    self_test: bool = True,
    level: str | None = None,
) -> LoadedModel:
    """The model in a file; the arguments are those of `kgraph.load`.

    host_functions: from the text of a host step to its function. clock: started when the file was opened.
    Raises ArtifactError for anything that is damaged, LevelError where the machine runs none of the code.
    """
    level = manifest.choose(file, level)
    for name in file.sections:
        if not name.startswith("weights/"):
            file.check(name)
    clock.lap("opening")
    checking = Checking(file, weight_sections(file, manifest, level) if check_weights else ())
    try:
        forms = [read_form(file, manifest.inputs, form, level, host_functions) for form in manifest.forms]
        model = LoadedModel(manifest, forms, level, clock.seconds)
    except DAMAGE as error:
        if isinstance(error, KGraphError):
            raise
        file.fail(f"its manifest is damaged: {error}")
    finally:
        clock.lap("programs")
        checking.finish()
        clock.lap("checking weights")
    if self_test:
        for form, data in zip(forms, manifest.forms):
            artifact_self_test.check(file, form, data["programs"][level]["self_test"])
        clock.lap("self-test")
    return model


class Clock:
    """Seconds by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Count the time since the last lap for `name`."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


def weight_sections(file: ArtifactFile, manifest: Manifest, level: str) -> list[str]:
    """The sections with the weights of a level's programs, each once."""
    try:
        names = itertools.chain.from_iterable(form["programs"][level]["weights"] for form in manifest.forms)
        return list(dict.fromkeys(map(as_text, names)))
    except DAMAGE as error:
        file.fail(f"its manifest is damaged: {error}")


class Checking:
    """Checksums of sections, computed by threads of their own (hashing leaves Python to others)."""

    def __init__(self, file: ArtifactFile, names: Iterable[str]):
        self._file, self._names = file, list(names)
        for name in self._names:
            file.expect(name)
        self._next = itertools.count()
        self._errors: list[BaseException] = []
        count = min(len(self._names), available_cpus(), MAX_CHECKING_THREADS)
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def _work(self) -> None:
        try:
            while (number := next(self._next)) < len(self._names):
                self._file.check(self._names[number])
        except BaseException as error:
            self._errors.append(error)

    def finish(self) -> None:
        """Wait for all of them. Raises ArtifactError for the first that differs."""
        for thread in self._threads:
            thread.join()
        if self._errors:
            raise self._errors[0]


def open_file(path: str | os.PathLike) -> tuple[ArtifactFile, Manifest]:
    """A file with a header that holds, and what it says about itself."""
    file = ArtifactFile(path)
    return file, Manifest.read(file)
