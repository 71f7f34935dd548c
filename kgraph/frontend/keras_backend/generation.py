"""Compiles what KerasHub's models generate with: text, token by token in a loop, and images.

KerasHub compiles `generate_step` for those backends whose names it knows, and runs it op by op on any other one. The
finder of `frontend.install` hands `apply` the modules in `install.GENERATING` once they are loaded. To be removed where
KerasHub asks its backend for a compiler.
"""

from __future__ import annotations

import functools
import warnings

from keras.src import tree

from kgraph.errors import CaptureError, UnsupportedError
from kgraph.frontend.keras_backend.core import convert_to_tensor


def apply(name: str, module) -> None:
    """Let the tasks of one of KerasHub's modules, just loaded, compile their generation."""
    for task in list(vars(module).values()):
        if isinstance(task, type) and task.__module__ == name and "make_generate_function" in vars(task):
            task.make_generate_function = _compiling(task.make_generate_function)  # type: ignore[attr-defined]


def _compiling(original):
    @functools.wraps(original)
    def make_generate_function(self):
        if self.generate_function is None and not self.run_eagerly:
            self.generate_function = Generation(self)
        return original(self)

    return make_generate_function


class Generation:
    """A task's `generate_step`, compiled for each set of shapes; again where its variables are other ones.

    What cannot be captured runs op by op, with a warning.
    """

    def __init__(self, task):
        self.task = task
        self._known: tuple = ()
        self._compiled = None
        self._refused = False

    def __call__(self, *args, **kwargs):
        from kgraph.api import jit

        task = self.task
        known = tuple((id(v), v.dtype) for v in task.variables)
        if known != self._known:
            self._known, self._compiled, self._refused = known, jit(task.generate_step), False
        args, kwargs = tree.map_structure(tensor, (args, kwargs))
        if not self._refused:
            try:
                return self._compiled(*args, **kwargs)
            except (CaptureError, UnsupportedError) as error:
                warnings.warn(f"{task.name}: generate() runs op by op, as it cannot be compiled: {error}", stacklevel=3)
                self._refused = True
        return task.generate_step(*args, **kwargs)

    @property
    def compiled(self):
        """The compiled function, for `explain` and `stats`; None before the first call."""
        return self._compiled


def tensor(leaf):
    """Arrays of any library as tensors; what is compared by value stays as it is."""
    return leaf if leaf is None or isinstance(leaf, (bool, int, float, str)) else convert_to_tensor(leaf)
