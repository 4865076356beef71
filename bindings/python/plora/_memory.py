"""Arrays of other packages as plora_matrix, without a copy.

    numpy          __array_interface__; bfloat16 as ml_dtypes has it
    all else       DLPack: torch, JAX, CuPy ...; the capsule is kept as long as the memory is used

A vector is a matrix of one row. Rows may lie apart, the elements of a row may not.
"""

import ctypes
from typing import Any, NamedTuple, Optional, Tuple

from ._abi import PLORA_BF16, PLORA_F16, PLORA_F32, plora_matrix
from ._native import InvalidArgument, ShapeMismatch, Unsupported

BYTES = -1  # codes of quantised weights, which are no matrix's dtype
SIZES = {PLORA_F32: 4, PLORA_BF16: 2, PLORA_F16: 2, BYTES: 1}
NAMES = {"float32": PLORA_F32, "bfloat16": PLORA_BF16, "float16": PLORA_F16, "int8": BYTES, "uint8": BYTES}
CPU, CUDA, CUDA_HOST, CUDA_MANAGED = 1, 2, 3, 13  # kDLCPU ...


class Memory(NamedTuple):
    address: int
    shape: Tuple[int, ...]
    strides: Tuple[int, ...]  # in elements
    dtype: int  # PLORA_F32 ... or BYTES
    device: Tuple[int, int]  # DLPack's (type, ordinal)
    writable: bool
    owner: Any  # keeps it alive


# ------------------------------------------------------------------------------------------------------------- DLPack


class _DLDataType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("dtype", _DLDataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


_DL_DTYPES = {(2, 32): PLORA_F32, (2, 16): PLORA_F16, (4, 16): PLORA_BF16, (0, 8): BYTES, (1, 8): BYTES}  # (code, bits)
_pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def _dense(shape: Tuple[int, ...]) -> Tuple[int, ...]:
    strides, step = [], 1
    for length in reversed(shape):
        strides.append(step)
        step *= length
    return tuple(reversed(strides))


def _from_dlpack(array: Any) -> Memory:
    kind_of, ordinal = array.__dlpack_device__()
    device = (int(kind_of), int(ordinal))
    if device[0] in (CUDA, CUDA_MANAGED):
        capsule = array.__dlpack__(stream=1)  # the legacy default stream; other streams are the caller's to order
    else:
        capsule = array.__dlpack__()
    tensor = ctypes.cast(_pointer_of(capsule, b"dltensor"), ctypes.POINTER(_DLTensor)).contents
    kind = (tensor.dtype.code, tensor.dtype.bits)
    if kind not in _DL_DTYPES or tensor.dtype.lanes != 1:
        raise Unsupported(f"dtype with DLPack code {kind[0]} of {kind[1]} bits: must be float32, bfloat16 or float16")
    shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
    strides = tuple(tensor.strides[i] for i in range(tensor.ndim)) if tensor.strides else _dense(shape)
    address = (tensor.data or 0) + tensor.byte_offset
    # The capsule is not marked as used: its own end frees it.
    return Memory(address, shape, strides, _DL_DTYPES[kind], device, True, capsule)


# -------------------------------------------------------------------------------------------------------------- numpy


def _from_numpy(array: Any) -> Memory:
    interface = array.__array_interface__
    name = getattr(getattr(array, "dtype", None), "name", interface["typestr"])
    if name not in NAMES or not array.dtype.isnative:
        raise Unsupported(f"dtype {name}: must be float32, float16 or ml_dtypes' bfloat16, in this machine's byte order")
    size = SIZES[NAMES[name]]
    shape = tuple(interface["shape"])
    if interface.get("strides") is None:
        strides = _dense(shape)
    elif any(step % size for step in interface["strides"]):
        raise Unsupported(f"strides of {interface['strides']} bytes: must be multiples of the element's {size}")
    else:
        strides = tuple(step // size for step in interface["strides"])
    address, read_only = interface["data"]
    return Memory(address or 0, shape, strides, NAMES[name], (CPU, 0), not read_only, array)


# ------------------------------------------------------------------------------------------------------------- matrix


def memory_of(array: Any) -> Memory:
    """What lies behind an array. Raises TypeError for what has none, Unsupported for its dtype."""
    if hasattr(array, "__array_interface__"):
        return _from_numpy(array)
    if hasattr(array, "__dlpack__"):
        return _from_dlpack(array)
    raise TypeError(f"{type(array).__name__} is no array: it has neither __array_interface__ nor __dlpack__")


def _check_place(memory: Memory, what: str, device: Optional[Tuple[int, int]], write: bool) -> None:
    if write and not memory.writable:
        raise InvalidArgument(f"{what} is read-only")
    if device is not None and memory.device != device and not (device[0] == CPU and memory.device[0] == CUDA_HOST):
        raise InvalidArgument(f"{what} lies on device {memory.device} (DLPack), the context on {device}")


def run_of(array: Any, what: str, dtype: int, bytes_: int, device: Tuple[int, int], write: bool = True) -> Tuple[int, Any]:
    """(address, owner) of an array of any shape without gaps that has so many bytes."""
    memory = memory_of(array)
    count = 1
    for length in memory.shape:
        count *= length
    if memory.dtype != dtype:
        raise Unsupported(f"{what} must be of {'float32' if dtype == PLORA_F32 else '8 bits'}")
    dense = _dense(memory.shape)
    if any(a != b for a, b, length in zip(memory.strides, dense, memory.shape) if length > 1):
        raise Unsupported(f"{what} of shape {memory.shape} has strides {memory.strides}: must have no gaps")
    if count * SIZES[dtype] != bytes_:
        raise ShapeMismatch(f"{what} has {count} elements: must have {bytes_ // SIZES[dtype]}")
    _check_place(memory, what, device, write)
    return memory.address, memory.owner


def matrix_of(array: Any, what: str, device: Optional[Tuple[int, int]] = (CPU, 0), write: bool = False):
    """(plora_matrix, its owner) of a 2-D array, or of a vector as one row. `what` names it in errors."""
    memory = memory_of(array)
    if memory.dtype == BYTES:
        raise Unsupported(f"{what} has a dtype of 8 bits: must be float32, bfloat16 or float16")
    shape, strides = memory.shape, memory.strides
    if len(shape) == 1:
        shape, strides = (1, *shape), (shape[0], *strides)
    if len(shape) != 2:
        raise ShapeMismatch(f"{what} has {len(memory.shape)} dimensions: must have 2")
    rows, columns = shape
    if columns > 1 and strides[1] != 1:
        raise Unsupported(f"{what} of shape {memory.shape} has strides {memory.strides}: the elements of a row must be adjacent")
    stride = strides[0] if rows > 1 else columns
    if stride < columns:
        raise Unsupported(f"{what} of shape {memory.shape} has strides {memory.strides}: rows must not overlap")
    _check_place(memory, what, device, write)
    return plora_matrix(memory.address or None, rows, columns, max(stride, 1), memory.dtype, 0), memory.owner
