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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kgraph.decisions import Decision
from kgraph.dims import from_json
from kgraph.errors import ArtifactError, InputError, KGraphError
from kgraph.report import Explanation, KernelRow, Profile, profile_of
from kgraph.runtime import artifact_plan
from kgraph.runtime.artifact_file import ArtifactFile
from kgraph.runtime.artifact_level import Requirement
from kgraph.runtime.artifact_tensors import Tensors
from kgraph.runtime.model import Model, sizes_of
from kgraph.runtime.plan import Program
from kgraph.runtime.threads import available_cpus
from kgraph.structure import Structure

# What parsing of a manifest that is not one may raise.
_DAMAGE = (ValueError, TypeError, LookupError, AttributeError, RecursionError, OverflowError)
MAX_CHECKING_THREADS = 8


class LevelError(ArtifactError):
    """The file has no object code that this machine runs."""


@dataclass
class State:
    """A value that the model keeps between calls: `input` and `output` are numbers of the program's, or -1."""

    name: str
    value: np.ndarray
    input: int
    output: int


@dataclass
class LoadedForm:
    """The program for all sizes, or for some fixed ones.

    sizes: the values of the model's fixed sizes. state: what calls read and change besides their inputs and outputs.
    report: reads the explanation; text: reads the optimised graph.
    """

    inputs: Structure
    outputs: Structure
    program: Program
    sizes: dict[str, int]
    state: list[State]
    report: Callable[[], tuple[list[KernelRow], list[Decision]]]
    text: Callable[[], str]

    def run(self, arrays: list[np.ndarray], out: list | None) -> list[np.ndarray]:
        """A call: the leaves of the outputs; state gets its new values."""
        count = self.outputs.num_leaves
        state = [s.value for s in self.state if s.input >= 0]
        results = self.program([*arrays, *state], out if out is None else [*out, *[None] * self.num_updates])
        for s in self.state:
            if s.output >= 0:
                s.value = results[s.output]
        return list(results[:count])

    @property
    def num_updates(self) -> int:
        """Outputs of the program that are new values of state."""
        return len(self.program.outputs) - self.outputs.num_leaves


@dataclass
class Manifest:
    """What a file holds. levels: requirement of the code by level, best first. data: the rest as it stands."""

    kind: str
    name: str
    kgraph: str
    inputs: Structure
    adapts_rank: bool
    fixed: tuple[str, ...]
    specialised: str | None
    levels: dict[str, Requirement]
    forms: list[dict[str, Any]]
    host_steps: list[str] = field(default_factory=list)

    @staticmethod
    def read(file: ArtifactFile) -> Manifest:
        """The manifest of a file. Raises ArtifactError if it is none."""
        data = file.read_json("manifest")
        try:
            levels = {_text(name): Requirement.from_json(needs) for name, needs in data["levels"]}
            forms, fixed, steps = data["forms"], data["fixed"], data["host_steps"]
            if not all(type(form) is dict for form in forms) or data["kind"] not in ("model", "step") or not forms:
                raise ValueError("it describes no model")
            return Manifest(
                data["kind"],
                _text(data["name"]),
                _text(data["kgraph"]),
                Structure.from_json(data["inputs"]),
                bool(data["adapts_rank"]),
                tuple(map(_text, fixed)),
                None if data["specialised"] is None else _text(data["specialised"]),
                levels,
                forms,
                list(map(_text, steps)),
            )
        except _DAMAGE as error:
            file.fail(f"its manifest is damaged: {error}")

    def choose(self, file: ArtifactFile, level: str | None) -> str:
        """The level to use. Raises LevelError where this machine runs none, or not the one asked for."""
        if level is not None and level not in self.levels:
            stored = ", ".join(self.levels) or "none"
            raise ArtifactError(f"{file.path}: it has no code for {level!r}; there is code for {stored}")
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
        self._forms = {tuple(form.sizes[name] for name in self._fixed): form for form in forms}
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
        state = [s.value for s in form.state if s.input >= 0]
        return profile_of(self.name, form.report()[0], form.program, [*arrays, *state], repeats)

    def stats(self) -> dict:
        """Counts as `CompiledModel.stats` has them, the level of the code in use, and the seconds that loading took."""
        out: dict = {"compiles": 0, "specialised": self._specialised, "variants": len(self._forms), "level": self.level}
        return out | self._last().program.stats() | {"seconds": dict(self._seconds)}

    def __repr__(self):
        return f"<kgraph.LoadedModel {self.name!r} ({self.level})>"


def open_model(
    file: ArtifactFile,
    manifest: Manifest,
    host_functions: artifact_plan.HostFunctions,
    *,
    check_weights: bool = True,
    self_test: bool = True,
    level: str | None = None,
) -> LoadedModel:
    """The model in a file; the arguments are those of `kgraph.load`.

    host_functions: from the text of a host step to its function.
    Raises ArtifactError for anything that is damaged, LevelError where the machine runs none of the code.
    """
    clock = Clock()
    level = manifest.choose(file, level)
    for name in file.sections:
        if not name.startswith("weights/"):
            file.check(name)
    checking = Checking(file, weight_sections(file, manifest, level) if check_weights else ())
    try:
        forms = [_read_form(file, manifest, form, level, host_functions) for form in manifest.forms]
        model = LoadedModel(manifest, forms, level, clock.seconds)
    except _DAMAGE as error:
        if isinstance(error, KGraphError):
            raise
        file.fail(f"its manifest is damaged: {error}")
    finally:
        clock.lap("programs")
        checking.finish()
        clock.lap("checking weights")
    if self_test:
        for form, data in zip(forms, manifest.forms):
            _self_test(file, form, data["programs"][level]["self_test"])
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
        return list(dict.fromkeys(map(_text, names)))
    except _DAMAGE as error:
        file.fail(f"its manifest is damaged: {error}")


class Checking:
    """Checksums of sections, computed by threads of their own (hashing leaves Python to others)."""

    def __init__(self, file: ArtifactFile, names: Iterable[str]):
        self._file, self._names = file, list(names)
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


def read_tensors(file: ArtifactFile, names: Iterable[str]) -> Mapping[str, np.ndarray]:
    """The tensors of several sections, in the mapping."""
    out: dict[str, np.ndarray] = {}
    for name in names:
        try:
            out.update(Tensors(file.view(name)))
        except ValueError as error:
            file.fail(f"the section {name!r} is damaged: {error}")
    return out


def read_state(rows: Any, tensors: Mapping[str, np.ndarray], num_inputs: int, num_outputs: int) -> list[State]:
    """The state that a manifest lists. Raises ValueError for numbers that are none of the program's."""
    out = []
    for name, tensor, number, output in rows:
        if type(number) is not int or type(output) is not int:
            raise ValueError("state is numbered by integers")
        if not -1 <= number < num_inputs or not -1 <= output < num_outputs:
            raise ValueError(f"there is no input {number} or output {output} for the state {name!r}")
        out.append(State(_text(name), np.array(tensors[_text(tensor)]), number, output))
    return out


def _read_form(
    file: ArtifactFile, manifest: Manifest, data: dict, level: str, host_functions: artifact_plan.HostFunctions
) -> LoadedForm:
    own = data["programs"][level]
    code = file.read(_text(own["code"]))
    try:
        objects = {name: array.tobytes() for name, array in Tensors(code).items()}
    except ValueError as error:
        file.fail(f"its object code is damaged: {error}")
    tensors = read_tensors(file, map(_text, own["weights"]))
    program = artifact_plan.decode(file.read_json(_text(own["plan"])), tensors, objects, host_functions)
    outputs = Structure.from_json(data["outputs"])
    state = read_state(data["state"], tensors, len(program.inputs), len(program.outputs))
    return make_form(
        manifest.inputs, outputs, program, data["sizes"], state, *_readers(file, own["report"], data["text"])
    )


def make_form(inputs: Structure, outputs: Structure, program: Program, sizes, state, report, text) -> LoadedForm:
    """A form whose program fits the structures. Raises ValueError where it does not."""
    given = [s.input for s in state if s.input >= 0]
    first, updated = inputs.num_leaves, sorted(s.output for s in state if s.output >= 0)
    if given != list(range(first, len(program.inputs))):
        raise ValueError("the program's inputs are not the model's inputs and state")
    if updated != list(range(outputs.num_leaves, len(program.outputs))):
        raise ValueError("the program's outputs are not the model's outputs and state")
    for s in state:
        for b in [program.inputs[s.input]] * (s.input >= 0) + [program.outputs[s.output]] * (s.output >= 0):
            if (program.buffers[b].shape, program.dtypes[b]) != (s.value.shape, s.value.dtype):
                raise ValueError(f"the state {s.name!r} has another type in the program")
    if not all(type(name) is str and type(size) is int for name, size in sizes.items()):
        raise ValueError("a fixed size is no number")
    return LoadedForm(inputs, outputs, program, dict(sizes), state, report, text)


def _readers(file: ArtifactFile, report: Any, text: Any) -> tuple[Callable, Callable]:
    """Functions that read a form's explanation and its graph, which few callers ask for."""
    names = _text(report), _text(text)
    for name in names:
        file.section(name)

    def read_report() -> tuple[list[KernelRow], list[Decision]]:
        data = file.read_json(names[0])
        try:
            rows = [
                KernelRow(label, tuple(layers), tuple(members), output, from_json(flops), from_json(size), host, reason)
                for label, layers, members, output, flops, size, host, reason in data["kernels"]
            ]
            return rows, [Decision(*texts, frozenset(layers)) for *texts, layers in data["decisions"]]
        except _DAMAGE as error:
            file.fail(f"its report is damaged: {error}")

    return read_report, lambda: file.read(names[1]).decode(errors="replace")


def _self_test(file: ArtifactFile, form: LoadedForm, data: Any) -> None:
    """Run the call that was recorded when the model was saved. Raises ArtifactError where the result is another."""
    if data is None:
        return
    try:
        tensors = Tensors(file.read(_text(data["section"])))
        inputs = [tensors[_text(name)] for name in data["inputs"]]
        expected = [tensors[_text(name)] for name in data["outputs"]]
        exact = bool(data["exact"])
    except _DAMAGE as error:
        if isinstance(error, KGraphError):
            raise
        file.fail(f"its self-test is damaged: {error}")
    dtypes = [form.program.dtypes[b] for b in form.program.outputs]
    state = [s.value.copy() for s in form.state if s.input >= 0]
    try:
        arrays = [a.view(t.np_dtype).reshape(a.shape) for a, t in zip(inputs, form.inputs.types, strict=True)]
        results = form.program([*arrays, *state])
    except Exception as error:
        file.fail(f"its self-test does not run: {error}")
    for number, (got, wanted, dtype) in enumerate(zip(results, expected, dtypes)):
        same = got.tobytes() == wanted.tobytes() if exact else _close(got, wanted)
        if got.shape != wanted.shape or got.dtype != dtype or not same:
            file.fail(
                f"its self-test failed: output {number} is not what it was when the model was saved; "
                "this machine computes something else, or the file is damaged"
            )


def _close(got: np.ndarray, wanted: np.ndarray) -> bool:
    """Whether results of NumPy's libraries, which differ between machines, agree to a part in a thousand."""
    if got.shape != wanted.shape or got.dtype.kind not in "fc":
        return np.array_equal(got, wanted)
    scale = np.nanmax(np.abs(wanted), initial=0.0)
    return bool(np.allclose(got, wanted, rtol=1e-3, atol=1e-3 * scale, equal_nan=True))


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError(f"expected a text, found {value!r:.60}")
    return value


def open_file(path: str | os.PathLike) -> tuple[ArtifactFile, Manifest]:
    """A file with a header that holds, and what it says about itself."""
    file = ArtifactFile(path)
    return file, Manifest.read(file)
