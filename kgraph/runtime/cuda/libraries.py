"""NVIDIA's libraries that compute in place of kernels: where they are found, and what a binding asks of them.

`KGRAPH_CUDA_LIBRARIES=0` leaves them alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from ctypes import CDLL
from pathlib import Path
from typing import Any, Protocol

from kgraph.errors import DeviceError
from kgraph.runtime.cuda.cublaslt import Products
from kgraph.runtime.cuda.cudnn import Convolutions
from kgraph.runtime.cuda.device import Device
from kgraph.runtime.steps import Convolution, Product


class LibraryPlan(Protocol):
    """How a library does a step at concrete sizes."""

    def run(self, addresses: Sequence[int]) -> None:
        """Ask for it, on the device's stream. addresses: of the step's operands for the library."""


class Library(Protocol):
    """A library on one device."""

    def plan(self, task: Any, value: Callable[[Any], int], alignments: Sequence[int]) -> LibraryPlan | str:
        """How the library does a task at the sizes that `value` gives; a string says why it does not.

        alignments: bytes to which every operand is aligned in all calls, as far as that is known.
        """


# The library for each kind of task.
NAMES: dict[type, str] = {Product: "cuBLASLt", Convolution: "cuDNN"}
_OFF = "KGRAPH_CUDA_LIBRARIES=0 is set"
_CUDNN = ("libcudnn.so.9", "cudnn64_9.dll")


def open_library(kind: type, device: Device, driver_version: int) -> Library | str:
    """The library for tasks of a kind, or the reason why there is none.

    driver_version: as cuDriverGetVersion gives it; it tells which versions of CUDA can be used.
    """
    if os.environ.get("KGRAPH_CUDA_LIBRARIES") == "0":
        return _OFF
    opened = _open_products if kind is Product else _open_convolutions
    return opened(device, driver_version // 1000)


def is_installed(kind: type) -> bool:
    """Whether a library seems to be there; no more than its place is looked at, since opening one takes time."""
    if os.environ.get("KGRAPH_CUDA_LIBRARIES") == "0":
        return False
    if kind is Product:
        return True  # opening it is what tells
    return bool(_packaged(_CUDNN[0], ("cudnn",))) or ctypes.util.find_library("cudnn") is not None


def _open_products(device: Device, newest: int) -> Library | str:
    reasons = []
    for major in (13, 12):
        for name in _cublaslt(major) if major <= newest else ():
            try:
                return Products(device, CDLL(name))
            except (OSError, DeviceError, AttributeError) as error:
                reasons.append(str(error))
    return f"cuBLASLt was not found (pip install nvidia-cublas): {'; '.join(reasons)}"


def _open_convolutions(device: Device, newest: int) -> Library | str:
    reasons = []
    for name in [_CUDNN[1]] if sys.platform == "win32" else [*_packaged(_CUDNN[0], ("cudnn",)), _CUDNN[0]]:
        try:
            library = CDLL(name)
            library.cudnnGetCudartVersion.restype = ctypes.c_size_t
            major = library.cudnnGetCudartVersion() // 1000
            if major > newest:
                reasons.append(f"{name} is for CUDA {major}, which the driver is too old for")
                continue
            # It ends the process where it looks for cuBLASLt of its own version in vain: that has to be open by then.
            _keep_open(_cublaslt(major))
            return Convolutions(device, library)
        except (OSError, DeviceError, AttributeError) as error:
            reasons.append(str(error))
    return f"cuDNN was not found (pip install nvidia-cudnn-cu{newest}): {'; '.join(reasons)}"


def _keep_open(names: list[str]) -> None:
    """Open the first library of these that is there. Raises OSError where none is."""
    for name in names[:-1]:
        with contextlib.suppress(OSError):
            CDLL(name)
            return
    CDLL(names[-1])


def _cublaslt(major: int) -> list[str]:
    """Where cuBLASLt may lie: in the packages of pip, then where the system looks."""
    if sys.platform == "win32":
        return [f"cublasLt64_{major}.dll"]
    name = f"libcublasLt.so.{major}"
    return [*_packaged(name, (f"cu{major}", "cublas")), name]


def _packaged(name: str, folders: Sequence[str]) -> list[str]:
    """The files of this name in the packages that pip installs under `nvidia`."""
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(p) for p in (spec.submodule_search_locations or ())] if spec is not None else []
    files = [root / folder / "lib" / name for root in roots for folder in folders]
    return [str(f) for f in files if f.is_file()]
