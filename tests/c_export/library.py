"""An exported library as a C program sees it, by way of ctypes."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np

from kgraph.c_export.tables import DTYPES
from kgraph.ir.types import np_dtype

OK, INVALID_ARGUMENT, WRONG_SHAPE, TOO_SMALL, UNSUPPORTED_CPU, NO_WEIGHTS, WRONG_WEIGHTS, IO, SYSTEM = range(9)
Pointer, Size = ctypes.c_void_p, ctypes.c_size_t


class Info(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("dtype", ctypes.c_int),
        ("rank", ctypes.c_int),
        ("shape_", ctypes.POINTER(ctypes.c_int64)),
    ]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.shape_[: self.rank])

    @property
    def np_dtype(self):
        return np_dtype(DTYPES[self.dtype])


class StatusError(Exception):
    def __init__(self, status: int, text: str):
        super().__init__(f"{status}: {text}")
        self.status = status


class CLibrary:
    """The functions of a library called `name`; statuses other than OK are raised as StatusError."""

    def __init__(self, path: Path, name: str):
        self._library, self._name = ctypes.CDLL(str(path)), name
        for function in "status_text level".split():
            self._function(function).restype = ctypes.c_char_p
        for function in "input output state_info".split():
            if hasattr(self._library, f"{name}_{function}"):
                self._function(function).restype = ctypes.POINTER(Info)
        for function in "plan_bytes workspace_bytes output_bytes pool_bytes state_bytes".split():
            if hasattr(self._library, f"{name}_{function}"):
                self._function(function).restype = Size
        if hasattr(self._library, f"{name}_state_data"):
            self._function("state_data").restype = Pointer

    def _function(self, function: str):
        return getattr(self._library, f"{self._name}_{function}")

    def call(self, function: str, *arguments):
        """A function's status checked, where it gives one."""
        status = self._function(function)(*arguments)
        if status != OK:
            raise StatusError(status, self._function("status_text")(status).decode())

    def ask(self, function: str, *arguments):
        return self._function(function)(*arguments)

    @property
    def level(self) -> str:
        return self.ask("level").decode()

    def info(self, kind: str, number: int) -> Info:
        return self.ask(kind, number).contents

    def plan(self, shapes, threads: int = 1) -> Plan:
        return Plan(self, shapes, threads)

    def __call__(self, *arrays: np.ndarray, threads: int = 1, pool=None) -> list[np.ndarray]:
        """One call with a plan of its own."""
        return self.plan([a.shape for a in arrays], threads)(*arrays, pool=pool)

    def pool(self, threads: int):
        """(handle, memory) of a started pool."""
        memory = ctypes.create_string_buffer(self.ask("pool_bytes"))
        handle = Pointer()
        self.call("pool_start", memory, Size(len(memory)), threads, ctypes.byref(handle))
        return handle, memory


class Plan:
    def __init__(self, library: CLibrary, shapes, threads: int):
        self.library = library
        self.memory = ctypes.create_string_buffer(library.ask("plan_bytes"))
        sizes = [np.array(shape, np.int64) for shape in shapes]
        pointers = (Pointer * max(len(sizes), 1))(*[s.ctypes.data for s in sizes])
        self.handle = Pointer()
        library.call("plan", self.memory, Size(len(self.memory)), pointers, threads, ctypes.byref(self.handle))
        self.workspace_bytes = library.ask("workspace_bytes", self.handle)

    def outputs(self) -> list[np.ndarray]:
        """Fresh arrays for the outputs."""
        out = []
        for number in range(self.library.ask("num_outputs")):
            info = self.library.info("output", number)
            shape = (ctypes.c_int64 * max(info.rank, 1))()
            self.library.call("output_shape", self.handle, number, shape)
            array = np.full(tuple(shape[: info.rank]), 77).astype(info.np_dtype)
            assert array.nbytes == self.library.ask("output_bytes", self.handle, number)
            out.append(array)
        return out

    def __call__(self, *arrays: np.ndarray, pool=None, state=None, function: str = "run") -> list[np.ndarray]:
        outputs = self.outputs()
        # What the workspace holds must not matter.
        workspace = np.full(self.workspace_bytes, 0xA5, np.uint8)
        arrays = [np.ascontiguousarray(a) for a in arrays]
        inputs = (Pointer * max(len(arrays), 1))(*[a.ctypes.data for a in arrays])
        results = (Pointer * max(len(outputs), 1))(*[a.ctypes.data for a in outputs])
        given = [Pointer(state.ctypes.data)] if state is not None else []
        self.library.call(
            function, self.handle, pool, Pointer(workspace.ctypes.data), Size(workspace.nbytes), *given, inputs, results
        )
        return outputs
