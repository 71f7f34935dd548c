"""Arrays on a device, and those of other libraries by DLPack and `__cuda_array_interface__`, without copies."""

from __future__ import annotations

import contextlib
import ctypes
import math
from ctypes import POINTER, c_int32, c_int64, c_uint8, c_uint16, c_uint64, c_void_p
from typing import Any

import numpy as np

from kgraph.errors import DeviceError, InputError
from kgraph.runtime.cuda.device import Device
from kgraph.types import dtype_name, np_dtype

_CUDA = 2  # kDLCUDA
# DLPack's codes of kinds of elements.
_KINDS = {"int": 0, "uint": 1, "float": 2, "bfloat": 4, "complex": 5, "bool": 6}


class Allocation:
    """Device memory that is given back with the last reference."""

    shared = False  # whether another library has had it

    def __init__(self, device: Device, nbytes: int):
        self.device, self.address = device, device.allocate(nbytes)

    def __del__(self):
        if hasattr(self, "address"):
            with contextlib.suppress(DeviceError):  # a fault of earlier work, which shows in the next call
                self.device.release(self.address, self.shared)


class DeviceArray(np.lib.mixins.NDArrayOperatorsMixin):
    """A dense row-major array on a device. Its values may still be being computed; reading them waits.

    device, address, shape, dtype (a NumPy dtype). owner: what keeps the memory.
    `numpy.asarray` copies it to the host, and so does arithmetic; other libraries take it without a copy, by DLPack or
    `__cuda_array_interface__`.
    """

    __slots__ = ("__weakref__", "address", "device", "dtype", "owner", "shape")

    def __init__(self, device: Device, address: int, shape: tuple[int, ...], dtype: np.dtype, owner: Any):
        self.device, self.address, self.owner = device, address, owner
        self.shape, self.dtype = tuple(shape), dtype

    @staticmethod
    def empty(device: Device, shape: tuple[int, ...], dtype: np.dtype) -> DeviceArray:
        """A new array with any content. Raises DeviceMemoryError."""
        memory = Allocation(device, math.prod(shape) * dtype.itemsize)
        return DeviceArray(device, memory.address, shape, dtype, memory)

    @staticmethod
    def copy_of(device: Device, array: np.ndarray) -> DeviceArray:
        """A new array with the values of a host array. Raises DeviceMemoryError."""
        array = np.ascontiguousarray(array).reshape(np.shape(array))
        out = DeviceArray.empty(device, array.shape, array.dtype)
        out.fill(array)
        return out

    def fill(self, array: np.ndarray) -> None:
        """Take the values of a contiguous host array of this shape and dtype."""
        with self.device.lock:
            self.device.copy_in(self.address, array)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def numpy(self) -> np.ndarray:
        """A copy on the host."""
        out = np.empty(self.shape, self.dtype)
        with self.device.lock:
            self.device.copy_out(out, self.address)
        return out

    def reshape(self, *shape) -> DeviceArray:
        """The same elements in another shape, without a copy."""
        shape = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if math.prod(shape) != self.size:
            raise ValueError(f"cannot reshape {list(self.shape)} to {list(shape)}")
        return DeviceArray(self.device, self.address, shape, self.dtype, self)

    def __getitem__(self, rows: slice) -> DeviceArray:
        """Some neighbouring rows of the first axis, without a copy. Raises TypeError for any other index."""
        if not isinstance(rows, slice) or rows.step not in (None, 1):
            raise TypeError(
                "of an array on a device, slices x[a:b] can be taken; numpy.asarray(x) copies it to the host"
            )
        start, stop, _ = rows.indices(len(self))
        shape = (max(stop - start, 0), *self.shape[1:])
        step = math.prod(self.shape[1:]) * self.dtype.itemsize
        return DeviceArray(self.device, self.address + start * step, shape, self.dtype, self)

    def _allocation(self) -> Any:
        """What keeps the memory, behind any views."""
        owner = self.owner
        while isinstance(owner, DeviceArray):
            owner = owner.owner
        return owner

    @property
    def is_own(self) -> bool:
        """Whether the memory is kgraph's, and not another library's."""
        return isinstance(self._allocation(), Allocation)

    def _share(self) -> None:
        if self.is_own:
            self._allocation().shared = True

    def __array__(self, dtype=None, copy=None):
        if copy is False:
            raise ValueError("an array on a device cannot become a NumPy array without a copy")
        return self.numpy() if dtype is None else self.numpy().astype(dtype, copy=False)

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        """NumPy's functions work on a copy on the host."""
        if any(isinstance(x, DeviceArray) for x in kwargs.get("out", ())):
            return NotImplemented
        return getattr(ufunc, method)(*[x.numpy() if isinstance(x, DeviceArray) else x for x in inputs], **kwargs)

    def __format__(self, spec: str) -> str:
        return format(self.item() if self.size == 1 else self.numpy(), spec)

    def __bool__(self) -> bool:
        return bool(self.numpy())

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of an array without axes")
        return self.shape[0]

    def __float__(self) -> float:
        return float(self.numpy())

    def __int__(self) -> int:
        return int(self.numpy())

    def item(self):
        """The one element as a Python number."""
        return self.numpy().item()

    def __repr__(self):
        return f"<kgraph.DeviceArray {self.dtype.name}{list(self.shape)} on {self.device.name}>"

    # -- for other libraries ------------------------------------------------------------------------------------------
    @property
    def __cuda_array_interface__(self) -> dict:
        if self.device.machine != "cuda":
            raise AttributeError("the simulator's arrays are not on a GPU")
        if self.dtype.kind not in "biufc":
            raise AttributeError(f"__cuda_array_interface__ has no name for {self.dtype}")
        self._share()
        self.device.synchronize()
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address, False),
            "strides": None,
            "version": 3,
            "stream": None,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return (_CUDA, self.device.ordinal)

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        """A capsule of DLPack. The values are there when this returns, for any stream."""
        if copy:
            raise BufferError("kgraph hands arrays over without a copy")
        if dl_device is not None and tuple(dl_device) != self.__dlpack_device__():
            raise BufferError(f"the array is on GPU {self.device.ordinal}")
        self._share()
        if stream != -1:
            self.device.synchronize()
        return _export(self)


# -- DLPack -----------------------------------------------------------------------------------------------------------
class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p),
        ("device_type", c_int32),
        ("device_id", c_int32),
        ("ndim", c_int32),
        ("code", c_uint8),
        ("bits", c_uint8),
        ("lanes", c_uint16),
        ("shape", POINTER(c_int64)),
        ("strides", POINTER(c_int64)),
        ("byte_offset", c_uint64),
    )


class _DLManagedTensor(ctypes.Structure):
    pass


_DELETER = ctypes.CFUNCTYPE(None, POINTER(_DLManagedTensor))
_DLManagedTensor._fields_ = (("tensor", _DLTensor), ("context", c_void_p), ("deleter", _DELETER))

_capsule_new = ctypes.pythonapi.PyCapsule_New
_capsule_new.restype, _capsule_new.argtypes = ctypes.py_object, (c_void_p, ctypes.c_char_p, c_void_p)
_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype, _capsule_pointer.argtypes = c_void_p, (ctypes.py_object, ctypes.c_char_p)
_capsule_rename = ctypes.pythonapi.PyCapsule_SetName
_capsule_rename.restype, _capsule_rename.argtypes = ctypes.c_int, (ctypes.py_object, ctypes.c_char_p)
_capsule_is = ctypes.pythonapi.PyCapsule_IsValid
_capsule_is.restype, _capsule_is.argtypes = ctypes.c_int, (c_void_p, ctypes.c_char_p)
_raw_pointer = ctypes.pythonapi["PyCapsule_GetPointer"]
_raw_pointer.restype, _raw_pointer.argtypes = c_void_p, (c_void_p, ctypes.c_char_p)
_NAME, _USED = b"dltensor", b"used_dltensor"

# What is handed out, by the address of its managed tensor, until its consumer is done with it.
_exported: dict[int, tuple] = {}


@_DELETER
def _delete(managed) -> None:
    _exported.pop(ctypes.addressof(managed.contents), None)


@ctypes.CFUNCTYPE(None, c_void_p)
def _destroy_capsule(capsule) -> None:
    # A capsule that nobody has consumed still has its first name.
    if _capsule_is(capsule, _NAME):
        _exported.pop(_raw_pointer(capsule, _NAME), None)


def _export(array: DeviceArray):
    kind = "bool" if array.dtype.kind == "b" else array.dtype.name.rstrip("0123456789")
    if kind not in _KINDS:
        raise BufferError(f"DLPack has no code for {array.dtype}")
    shape = (c_int64 * max(array.ndim, 1))(*array.shape)
    managed = _DLManagedTensor()
    tensor = managed.tensor
    tensor.data, tensor.device_type, tensor.device_id = array.address, _CUDA, array.device.ordinal
    tensor.ndim, tensor.code, tensor.bits, tensor.lanes = array.ndim, _KINDS[kind], array.dtype.itemsize * 8, 1
    tensor.shape, tensor.byte_offset = shape, 0
    managed.deleter = _delete
    address = ctypes.addressof(managed)
    _exported[address] = managed, shape, array
    return _capsule_new(address, _NAME, ctypes.cast(_destroy_capsule, c_void_p))


class _Imported:
    """Another library's tensor, released with the last reference."""

    def __init__(self, managed: _DLManagedTensor):
        self._managed = managed

    def __del__(self):
        if self._managed.deleter:
            self._managed.deleter(ctypes.byref(self._managed))


def from_foreign(value: Any, device: Device, name: str) -> DeviceArray | None:
    """Another library's array on this GPU, without a copy; None for what is no array on a GPU.

    The work that makes the values is waited for, or comes before ours. name: for messages.
    Raises InputError for an array that is not dense, DeviceError for one on another GPU.
    """
    if isinstance(value, np.ndarray):
        return None
    if isinstance(value, DeviceArray):
        if value.device is not device:
            raise DeviceError(f"{name} lies on {value.device.name}, the model runs on {device.name}")
        return value
    if hasattr(value, "__dlpack__") and hasattr(value, "__dlpack_device__"):
        kind, ordinal = (int(x) for x in value.__dlpack_device__())
        if kind != _CUDA or device.machine != "cuda":
            return None
        if ordinal != device.ordinal:
            raise DeviceError(f"{name} lies on GPU {ordinal}, the model runs on GPU {device.ordinal}")
        return _import(value.__dlpack__(stream=device.stream_number), device, name)
    interface = getattr(value, "__cuda_array_interface__", None)
    return None if interface is None else _from_interface(value, interface, device, name)


def _import(capsule, device: Device, name: str) -> DeviceArray:
    managed = _DLManagedTensor.from_address(_capsule_pointer(capsule, _NAME))
    _capsule_rename(capsule, _USED)
    owner = _Imported(managed)
    tensor = managed.tensor
    shape = tuple(tensor.shape[: tensor.ndim])
    if tensor.strides and not _is_dense(shape, tensor.strides[: tensor.ndim]):
        raise InputError(f"{name} is not contiguous on the GPU; make it so before the call")
    kinds = {code: kind for kind, code in _KINDS.items()}
    dtype = "bool" if kinds.get(tensor.code) == "bool" else f"{kinds.get(tensor.code)}{tensor.bits}"
    if tensor.lanes != 1 or tensor.code not in kinds:
        raise InputError(f"{name} has elements of DLPack's kind {tensor.code}, which kgraph does not know")
    address = (tensor.data or 0) + tensor.byte_offset
    return DeviceArray(device, address, shape, np_dtype(dtype), owner)


def _from_interface(value: Any, interface: dict, device: Device, name: str) -> DeviceArray:
    dtype, shape = np.dtype(interface["typestr"]), tuple(interface["shape"])
    strides = interface.get("strides")
    if strides is not None and not _is_dense(shape, [s // dtype.itemsize for s in strides]):
        raise InputError(f"{name} is not contiguous on the GPU; make it so before the call")
    if interface.get("stream") is not None:
        device.synchronize_stream(interface["stream"])
    return DeviceArray(device, interface["data"][0], shape, np_dtype(dtype_name(dtype)), value)


def _is_dense(shape: tuple, strides) -> bool:
    step = 1
    for size, stride in zip(reversed(shape), reversed(list(strides))):
        if size != 1 and stride != step:
            return not all(shape)
        step *= size
    return True


__all__ = ["Allocation", "DeviceArray", "from_foreign"]
