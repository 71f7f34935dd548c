"""NVIDIA's driver library through ctypes: the functions in use, and errors from their return codes.

No toolkit and no package is needed, only the driver (`libcuda.so.1`).
"""

from __future__ import annotations

import ctypes
import sys
from ctypes import POINTER, c_char_p, c_float, c_int, c_size_t, c_uint, c_uint64, c_ulonglong, c_void_p
from typing import Any

from kgraph.errors import DeviceError, DeviceMemoryError

_HANDLE = POINTER(c_void_p)
# Arguments of the functions in use; all of them give an error code.
SIGNATURES: dict[str, tuple] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (_HANDLE, c_int),
    "cuCtxSetCurrent": (c_void_p,),
    "cuCtxSynchronize": (),
    "cuMemGetInfo_v2": (POINTER(c_size_t), POINTER(c_size_t)),
    "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemHostAlloc": (_HANDLE, c_size_t, c_uint),
    "cuMemFreeHost": (c_void_p,),
    "cuMemcpyHtoDAsync_v2": (c_uint64, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_uint64, c_size_t, c_void_p),
    "cuMemcpyDtoDAsync_v2": (c_uint64, c_uint64, c_size_t, c_void_p),
    "cuStreamCreate": (_HANDLE, c_uint),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamWaitEvent": (c_void_p, c_void_p, c_uint),
    "cuEventCreate": (_HANDLE, c_uint),
    "cuEventDestroy_v2": (c_void_p,),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventSynchronize": (c_void_p,),
    "cuEventElapsedTime": (POINTER(c_float), c_void_p, c_void_p),
    "cuLinkCreate_v2": (c_uint, POINTER(c_int), POINTER(c_void_p), _HANDLE),
    "cuLinkAddData_v2": (c_void_p, c_int, c_void_p, c_size_t, c_char_p, c_uint, POINTER(c_int), POINTER(c_void_p)),
    "cuLinkComplete": (c_void_p, _HANDLE, POINTER(c_size_t)),
    "cuLinkDestroy": (c_void_p,),
    "cuModuleLoadDataEx": (_HANDLE, c_void_p, c_uint, POINTER(c_int), POINTER(c_void_p)),
    "cuModuleGetFunction": (_HANDLE, c_void_p, c_char_p),
    "cuModuleUnload": (c_void_p,),
    "cuFuncSetAttribute": (c_void_p, c_int, c_int),
    "cuLaunchKernel": (c_void_p, *[c_uint] * 7, c_void_p, POINTER(c_void_p), POINTER(c_void_p)),
    "cuStreamBeginCapture_v2": (c_void_p, c_int),
    "cuStreamEndCapture": (c_void_p, _HANDLE),
    "cuGraphInstantiateWithFlags": (_HANDLE, c_void_p, c_ulonglong),
    "cuGraphLaunch": (c_void_p, c_void_p),
    "cuGraphDestroy": (c_void_p,),
    "cuGraphExecDestroy": (c_void_p,),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
}

OUT_OF_MEMORY, NO_DEVICE, INVALID_DEVICE = 2, 100, 101
# Codes after which the context is of no use any more.
_LOST = frozenset({4, 46, 201, 214, 220, 226, 700, 702, 709, 714, 715, 716, 717, 718, 719, 999})
_HINTS = {
    NO_DEVICE: "the driver sees no GPU (is CUDA_VISIBLE_DEVICES empty?)",
    INVALID_DEVICE: "there is no GPU of this number",
    34: "this is the stub of a CUDA toolkit: the driver itself has to be found first",
    222: "the driver is too old for these kernels: install a driver of CUDA 12 or later",
    209: "no code for this GPU: its compute capability is below 7.5",
    802: "the system is not ready (on machines with NVSwitch, the fabric manager has to run)",
    803: "the driver library and the kernel module are of different versions: restart the machine after an update",
}


class Driver:
    """The driver library. library: what stands in its place, for tests.

    lost: why the device cannot be used any more, else None. Every call from then on raises DeviceError.
    """

    def __init__(self, library: Any = None):
        self._library = library if library is not None else _open()
        self.lost: str | None = None
        self._functions: dict[str, Any] = {}

    def call(self, name: str, *arguments) -> None:
        """Call a function of the library.

        Raises DeviceMemoryError where memory does not suffice, DeviceError for any other code that is not success.
        """
        if self.lost is not None:
            raise DeviceError(f"the GPU was lost: {self.lost}; restart the process to use it again")
        code = self._function(name)(*arguments)
        if code:
            self._fail(name, code)

    def _function(self, name: str) -> Any:
        function = self._functions.get(name)
        if function is None:
            try:
                function = getattr(self._library, name)
            except AttributeError:
                raise DeviceError(
                    f"the GPU's driver is too old: it has no {name}; kgraph needs one of CUDA 12"
                ) from None
            if isinstance(self._library, ctypes.CDLL):
                function.argtypes, function.restype = SIGNATURES[name], c_int
            self._functions[name] = function
        return function

    def _fail(self, name: str, code: int) -> None:
        text = f"{name} failed: {self._text(code)}"
        if code == OUT_OF_MEMORY:
            raise DeviceMemoryError(text)
        if code in _LOST:
            self.lost = text
            raise DeviceError(f"the GPU was lost: {text}; values on it are gone, restart the process to use it again")
        raise DeviceError(text + (f"; {_HINTS[code]}" if code in _HINTS else ""))

    def _text(self, code: int) -> str:
        """An error code in words; the functions for that need no working device."""
        words = []
        for name in ("cuGetErrorName", "cuGetErrorString"):
            text = c_char_p()
            if self._function(name)(code, ctypes.byref(text)) == 0 and text.value:
                words.append(text.value.decode(errors="replace"))
        return ": ".join(words) or f"error {code}"


def _open() -> ctypes.CDLL:
    names = ("nvcuda.dll",) if sys.platform == "win32" else ("libcuda.so.1", "libcuda.so")
    reasons = []
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError as error:
            reasons.append(str(error))
    raise DeviceError(
        f"no NVIDIA driver was found ({'; '.join(reasons)}); target 'cuda' needs an NVIDIA GPU of compute capability "
        "7.5 or later with a driver of CUDA 12 or later, and numba-cuda (pip install 'kgraph[cuda]')"
    )
