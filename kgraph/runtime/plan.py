"""What the compiler hands to the runtime: a program of buffers and steps as plain data, callable on NumPy arrays."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np

from kgraph.decisions import Decision
from kgraph.dims import Dim, evaluate
from kgraph.errors import ArtifactError, InputError
from kgraph.runtime import threads
from kgraph.runtime.binding import Binding, StepTime
from kgraph.runtime.loader import Library
from kgraph.runtime.parts import PartedBinding, rows_at_once
from kgraph.runtime.steps import Buffer, HostStep, NativeStep
from kgraph.types import SHORT_NAMES, np_dtype

__all__ = ["Binding", "Buffer", "HostStep", "NativeStep", "Program", "StepTime"]

_KINDS = frozenset({"input", "param", "constant", "temporary", "prepared", "dim"})
_MAX_BINDINGS = 16
# Idle arenas of a program may hold this much together; beyond it, those of other sizes than the current are released.
_IDLE_ARENA_BYTES = 256 << 20


class Program:
    """A compiled graph: callable on arrays of any sizes that its input shapes allow, from any number of threads.

    buffers, steps: steps in an order in which every buffer is written before it is read.
    inputs, outputs, params: buffer ids; a position in them is an input, output or parameter number. Any buffer may be
        an output.
    donations: pairs (input number, output number) of one type: the output may be written into the input's array, which
        the caller gives up. Each input and each output is in one pair at most.
    kernels: object bytes by key; executor: object bytes of the native executor.
    rows: the symbol that counts rows which do not depend on each other, along the first axis of inputs and outputs, or
        "". A call with so many that its temporaries exceed `part_bytes` is run in parts (`kgraph.runtime.parts`).
    foreign: made for another kind of machine; the objects are not loaded, and calls raise ArtifactError.
    values: the arrays in use as parameters.
    Raises ValueError for inconsistent steps and ArtifactError for objects that cannot be loaded.
    """

    def __init__(
        self,
        name: str,
        buffers: Sequence[Buffer],
        steps: Sequence[NativeStep | HostStep],
        inputs: Sequence[int],
        outputs: Sequence[int],
        params: Sequence[int] = (),
        kernels: Mapping[str, bytes] | None = None,
        executor: bytes = b"",
        input_names: Sequence[str] = (),
        donations: Sequence[tuple[int, int]] = (),
        foreign: bool = False,
        rows: str = "",
        part_bytes: int = 0,
    ):
        self.name, self.foreign = name, foreign
        self.buffers, self.steps = tuple(buffers), tuple(steps)
        self.inputs, self.outputs, self.params = tuple(inputs), tuple(outputs), tuple(params)
        self.donations = tuple(donations)
        self.rows, self.part_bytes = rows, part_bytes
        self.kernels, self.executor_object = dict(kernels or {}), executor
        self.input_names = tuple(input_names) or tuple(
            self.buffers[b].name or f"input {i}" for i, b in enumerate(self.inputs)
        )
        self.dtypes = [np_dtype(b.dtype) for b in self.buffers]
        self.itemsizes = [d.itemsize for d in self.dtypes]
        self.numbers = {b: i for i, b in enumerate(self.inputs)} | {b: i for i, b in enumerate(self.params)}
        self.constants = {
            i: np.array(b.value, dtype=self.dtypes[i], order="C", copy=None)
            for i, b in enumerate(self.buffers)
            if b.kind == "constant"
        }
        self._validate()
        self.solvers = _symbol_solvers([self.buffers[b].shape for b in self.inputs], self.name)
        self._load()
        self._bindings: dict[tuple, Binding] = {}
        # Replaced as a whole when a parameter changes, so that a call in flight keeps the arrays it started with.
        self.values: tuple[np.ndarray | None, ...] = (None,) * len(self.params)
        self._held: tuple[tuple | None, list[int], list[int]] = None, [], []

    def __reduce__(self):
        fields = (self.name, self.buffers, self.steps, self.inputs, self.outputs, self.params, self.kernels)
        rest = self.executor_object, self.input_names, self.donations, self.foreign, self.rows, self.part_bytes
        return Program, (*fields, *rest)

    def _load(self) -> None:
        """Make the kernels callable."""
        if not self.executor_object and any(isinstance(step, NativeStep) for step in self.steps):
            raise ValueError(f"{self.name} has kernels but no executor")
        loaded = {} if self.foreign else self.kernels
        self.executor = threads.install(self.executor_object) if self.executor_object and not self.foreign else None
        self.library = Library(loaded)
        self.functions = {key: self.library.address(key) for key in loaded}

    def _new_binding(self, sizes: dict[str, int]) -> Binding:
        binding = Binding(self, sizes)
        at_once = rows_at_once(self, binding) if self.rows else 0
        return cast("Binding", PartedBinding(self, binding, at_once)) if at_once else binding

    def _validate(self) -> None:
        written = {i for i, b in enumerate(self.buffers) if b.kind != "temporary"}
        for i, buffer in enumerate(self.buffers):
            if buffer.kind not in _KINDS:
                raise ValueError(f"buffer {i} of {self.name}: unknown kind {buffer.kind!r}")
            if buffer.alias >= len(self.buffers) or (buffer.alias >= 0 and buffer.kind != "temporary"):
                raise ValueError(f"buffer {i} of {self.name}: only a temporary can be a view, of a buffer that exists")
        root = self._root
        for index, step in enumerate(self.steps):
            inputs = len(step.operands) - step.outputs
            for position, b in enumerate(step.operands):
                if position >= inputs:
                    if self.buffers[root(b)].kind != "temporary":
                        raise ValueError(f"step {index} ({step.label}) of {self.name} writes a {self.buffers[b].kind}")
                    written.add(root(b))
                elif root(b) not in written:
                    step_name = f"step {index} ({step.label}) of {self.name}"
                    raise ValueError(f"{step_name} reads buffer {b} before it is written")
            for key in step.kernels if isinstance(step, NativeStep) else ():
                if key not in self.kernels:
                    raise ValueError(f"step {index} ({step.label}) of {self.name}: no kernel {key!r}")
        for b in self.outputs:
            if root(b) not in written:
                raise ValueError(f"an output of {self.name}, buffer {b}, is never written")
        given = [i for i, _ in self.donations], [o for _, o in self.donations]
        if any(len(set(numbers)) != len(numbers) for numbers in given):
            raise ValueError(f"{self.name}: an input or output is donated twice")
        for i, o in self.donations:
            source, target = self.buffers[self.inputs[i]], self.buffers[self.outputs[o]]
            if (source.shape, source.dtype) != (target.shape, target.dtype):
                raise ValueError(f"{self.name}: input {i} is donated to output {o}, which has another type")

    def _root(self, b: int) -> int:
        for _ in range(len(self.buffers)):
            alias = self.buffers[b].alias
            if alias < 0:
                return b
            b = alias
        raise ValueError(f"buffer {b} of {self.name} is a view of itself")

    # -- parameters -------------------------------------------------------------------------------------------------
    def set_param(self, number: int, array: np.ndarray) -> None:
        """Use `array` as parameter `number` in calls that start from now on."""
        self.set_params({number: array})

    def set_params(self, arrays: Mapping[int, np.ndarray]) -> None:
        """Use these arrays, by parameter number, in calls that start from now on; calls in flight keep the old ones.

        A contiguous array is kept by reference. Raises InputError for a wrong shape or dtype.
        """
        values = list(self.values)
        for number, array in arrays.items():
            buffer = self.buffers[self.params[number]]
            dtype = self.dtypes[self.params[number]]
            array = np.asarray(array)
            if array.dtype != dtype or array.shape != buffer.shape:
                raise InputError(
                    f"{self.name}: parameter {number} ({buffer.name or 'unnamed'}) is "
                    f"{array.dtype}{list(array.shape)}, expected {buffer.dtype}{list(buffer.shape)}"
                )
            if not (array.flags.c_contiguous and array.flags.aligned):
                array = np.array(array, dtype=dtype, order="C", copy=True)
            values[number] = array
        self.values = tuple(values)
        for binding in list(self._bindings.values()):
            binding.release_old_params()

    def holds(self, array: np.ndarray) -> bool:
        """Whether a contiguous array overlaps a parameter or constant in memory."""
        values, starts, ends = self._held
        if values is not self.values:
            held = [a for a in (*self.values, *self.constants.values()) if a is not None and a.nbytes]
            ranges = sorted((a.ctypes.data, a.ctypes.data + a.nbytes) for a in held)
            values, starts = self.values, [start for start, _ in ranges]
            # The furthest end among all that start no later: ranges may overlap.
            ends = list(itertools.accumulate((end for _, end in ranges), max))
            self._held = values, starts, ends
        begin = array.ctypes.data
        before = bisect.bisect_left(starts, begin + array.nbytes)
        return before > 0 and ends[before - 1] > begin

    # -- sizes ------------------------------------------------------------------------------------------------------
    def resolve(self, shapes: Sequence[tuple[int, ...]]) -> dict[str, int]:
        """Values of the symbols for concrete input shapes.

        Raises InputError naming the input whose shape does not fit.
        """
        if len(shapes) != len(self.inputs):
            raise InputError(f"{self.name} takes {len(self.inputs)} arrays, {len(shapes)} were given")
        for i, (b, shape) in enumerate(zip(self.inputs, shapes)):
            if len(shape) != len(self.buffers[b].shape):
                raise self._shape_error(i, shape, "the rank differs")
        sizes: dict[str, int] = {}
        for symbol, i, axis, factor, shift in self.solvers:
            quotient, remainder = divmod(shapes[i][axis] - shift, factor)
            if remainder or quotient < 0:
                expected = self.buffers[self.inputs[i]].shape[axis]
                raise self._shape_error(i, shapes[i], f"axis {axis} cannot be {expected}")
            sizes[symbol] = quotient
        for i, (b, shape) in enumerate(zip(self.inputs, shapes)):
            for axis, (expected, given) in enumerate(zip(self.buffers[b].shape, shape)):
                if evaluate(expected, sizes) != given:
                    known = ", ".join(f"{s}={v}" for s, v in sizes.items() if isinstance(expected, Dim))
                    raise self._shape_error(i, shape, f"axis {axis} differs" + (f" ({known})" if known else ""))
        return sizes

    def _shape_error(self, number: int, shape, why: str) -> InputError:
        buffer = self.buffers[self.inputs[number]]
        expected = f"{SHORT_NAMES[buffer.dtype]}[{', '.join(map(str, buffer.shape))}]"
        return InputError(
            f"{self.name}: {self.input_names[number]} has shape {tuple(shape)}, expected {expected}: {why}"
        )

    def bind(self, sizes: Mapping[str, int]) -> Binding:
        """The program prepared for concrete sizes; the most recently used bindings are kept."""
        return self._bind(tuple([tuple([evaluate(s, sizes) for s in self.buffers[b].shape]) for b in self.inputs]))

    def _bind(self, shapes: tuple) -> Binding:
        binding = self._bindings.get(shapes)
        if binding is not None and binding.generation == threads.generation:
            return binding
        if self.foreign:
            raise ArtifactError(f"{self.name} is compiled for another kind of machine")
        binding = self._new_binding(self.resolve(shapes))
        # Two threads may bind the same sizes at once: both bindings are good, the later one stays. Every operation on
        # the dictionary is atomic, so that no lock can be left held in a forked child.
        while len(self._bindings) >= _MAX_BINDINGS and shapes not in self._bindings:
            oldest = next(iter(self._bindings), ())
            candidate = self._bindings.pop(oldest, None)
            if candidate is not None and candidate.used:  # a second chance for what was called since the last look
                candidate.used = False
                self._bindings[oldest] = candidate
        self._bindings[shapes] = binding
        return binding

    def trim(self, keep: Binding) -> None:
        """Release idle arenas of other sizes than `keep` if all of them together hold much memory."""
        bindings = list(self._bindings.values())
        if sum(b.idle_bytes() for b in bindings) > _IDLE_ARENA_BYTES:
            for binding in bindings:
                if binding is not keep:
                    binding.release_contexts()

    # -- calls ------------------------------------------------------------------------------------------------------
    def __call__(self, arrays: Sequence[np.ndarray], out: Sequence[np.ndarray | None] | None = None) -> tuple:
        """Run on `arrays`, one per input and of its dtype; gives fresh arrays, or those of `out`.

        Outputs with a donated input may be that input's array, overwritten (see `donations`).
        Raises InputError for a wrong number, shape or dtype of arrays.
        """
        try:
            binding = self._bindings[tuple([a.shape for a in arrays])]
        except (KeyError, AttributeError):
            binding = self._bind(tuple([np.shape(a) for a in arrays]))
        return binding.run(arrays) if out is None else binding(arrays, out)

    def profile(self, arrays: Sequence[np.ndarray], repeats: int = 5) -> tuple[tuple, list[StepTime]]:
        """Run a few times with time stamps around every step; gives the outputs and the steps' median times."""
        return self._bind(tuple([np.shape(a) for a in arrays])).profile(arrays, repeats)

    def decisions(self) -> list[Decision]:
        """What binding decided so far, for `explain()` to tell."""
        return []

    def stats(self) -> dict[str, int]:
        """Counts and bytes of what this program holds."""
        bindings = list(self._bindings.values())
        native = sum(isinstance(s, NativeStep) for s in self.steps)
        return {
            "bindings": len(bindings),
            "parts": max([len(b.parts) for b in bindings if isinstance(b, PartedBinding)], default=1),
            "contexts": sum(b.num_contexts() for b in bindings),
            "arena_bytes": sum(b.idle_bytes() for b in bindings),
            "scratch_bytes": sum(b.num_contexts() * b.threads * b.scratch_bytes for b in bindings),
            "arena_bound": max([b.storage.arena_bound for b in bindings], default=0),
            "in_place_outputs": max([sum(d >= 0 for d in b.storage.donors) for b in bindings], default=0),
            "native_steps": native,
            "host_steps": len(self.steps) - native,
            "kernels": len(self.kernels),
            "code_bytes": self.library.code_bytes,
        }


def _symbol_solvers(shapes: list[tuple], name: str) -> list[tuple[str, int, int, int, int]]:
    """How each symbol follows from the input shapes: (symbol, input, axis, factor, shift): axis = factor*symbol+shift.

    Raises ValueError for a symbol that no axis determines alone.
    """
    solvers: dict[str, tuple] = {}
    symbols: set[str] = set()
    for i, shape in enumerate(shapes):
        for axis, size in enumerate(shape):
            if not isinstance(size, Dim):
                continue
            symbols |= size.symbols()
            terms = dict(size.terms)
            shift = terms.pop((), 0)
            if len(terms) != 1:
                continue
            ((monomial, factor),) = terms.items()
            if len(monomial) == 1 and isinstance(monomial[0], str) and factor > 0:
                found = (monomial[0], i, axis, factor, shift)
                # An axis that is the symbol itself gives the clearest message when shapes do not fit.
                if monomial[0] not in solvers or (factor, shift) == (1, 0) != solvers[monomial[0]][3:]:
                    solvers[monomial[0]] = found
    unknown = symbols - set(solvers)
    if unknown:
        raise ValueError(f"{name}: the sizes {sorted(unknown)} do not follow from the input shapes")
    return list(solvers.values())
