"""The library behind ctypes: finding it, its errors as exceptions, its structs with their defaults.

    check(lib.plora_unload(adapters, None, byref(struct("unload_options", momentum=0.2)), None, None))

_abi.py holds the header itself. Needs neither torch nor numpy. ctypes gives the interpreter's lock up during a call.
"""

import ctypes
import os
from ctypes import byref, c_void_p, sizeof
from typing import Any

from . import _abi

__all__ = [
    "Error", "InvalidArgument", "OutOfMemory", "ShapeMismatch", "Unsupported", "NotFound", "NonFinite", "InputOutput",
    "Malformed", "BackendUnavailable", "BackendFailure", "Busy", "byref", "check", "create", "find", "lib", "struct", "version",
]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- errors


class Error(RuntimeError):
    """A call failed and has changed nothing. `status` is the library's code, the text its message, with the values."""

    status: int = -1


class InvalidArgument(Error, ValueError):
    status = _abi.PLORA_ERROR_INVALID_ARGUMENT


class OutOfMemory(Error, MemoryError):
    status = _abi.PLORA_ERROR_OUT_OF_MEMORY


class ShapeMismatch(Error, ValueError):
    status = _abi.PLORA_ERROR_SHAPE


class Unsupported(Error, NotImplementedError):
    status = _abi.PLORA_ERROR_UNSUPPORTED


class NotFound(Error, LookupError):
    status = _abi.PLORA_ERROR_NOT_FOUND


class NonFinite(Error, ArithmeticError):
    status = _abi.PLORA_ERROR_NON_FINITE


class InputOutput(Error, OSError):
    status = _abi.PLORA_ERROR_IO


class Malformed(Error, ValueError):
    status = _abi.PLORA_ERROR_FORMAT


class BackendUnavailable(Error):
    status = _abi.PLORA_ERROR_BACKEND_UNAVAILABLE


class BackendFailure(Error):
    status = _abi.PLORA_ERROR_BACKEND


class Busy(Error):
    status = _abi.PLORA_ERROR_BUSY


_ERRORS = {
    kind.status: kind
    for kind in (
        InvalidArgument, OutOfMemory, ShapeMismatch, Unsupported, NotFound, NonFinite, InputOutput, Malformed,
        BackendUnavailable, BackendFailure, Busy,
    )
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ loading


def find() -> str:
    """The path of libplora: $PLORA_LIBRARY, else beside this file (a wheel), else what the loader finds by its name."""
    named = os.environ.get("PLORA_LIBRARY")
    if named:
        return named
    beside = os.path.join(os.path.dirname(os.path.abspath(__file__)), "libplora.so")
    return beside if os.path.exists(beside) else f"libplora.so.{_abi.PLORA_VERSION_MAJOR}"


def _load() -> ctypes.CDLL:
    path = find()
    try:
        library = ctypes.CDLL(path)
    except OSError as error:
        raise ImportError(
            f"libplora cannot be loaded from '{path}': {error}. $PLORA_LIBRARY may name it; the packages it needs are "
            "libdnnl2 (or libdnnl3), liblapacke, libopenblas0 and libgomp1"
        ) from error
    try:
        library.plora_abi_version.restype = ctypes.c_int32
        found = library.plora_abi_version()
    except AttributeError as error:
        raise ImportError(f"'{path}' is not libplora: {error}") from error
    if found != _abi.PLORA_ABI_VERSION:
        raise ImportError(f"'{path}' has ABI version {found}, this package is made for {_abi.PLORA_ABI_VERSION}")
    for name, (result, arguments) in _abi.FUNCTIONS.items():
        try:
            function = getattr(library, name)
        except AttributeError as error:
            raise ImportError(f"'{path}' is older than this package: it has no {name}()") from error
        function.restype, function.argtypes = result, arguments
    return library


lib = _load()


def version() -> str:
    """The version of the loaded library, "major.minor.patch"."""
    return lib.plora_version().decode()


def check(status: int) -> None:
    """Raises the exception of `status` unless it is 0. Belongs right behind the call: the message is the thread's last."""
    if status:
        message = lib.plora_last_error().decode(errors="replace")
        kind = _ERRORS.get(status, Error)
        error = kind(message or lib.plora_status_string(status).decode())
        error.status = status
        raise error


# ------------------------------------------------------------------------------------------------------------ structs


def struct(name: str, /, **values: Any) -> Any:
    """A plora_<name> as its _INIT macro has it, with `values` put in; None leaves a field as it is."""
    kind = getattr(_abi, "plora_" + name)
    result = kind()
    if kind._fields_[0][0] == "struct_size":
        result.struct_size = sizeof(kind)
    for field, value in getattr(kind, "_defaults_", {}).items():
        setattr(result, field, value)
    for field, value in values.items():
        if not hasattr(kind, field):
            raise TypeError(f"plora_{name} has no field {field}")
        if value is not None:
            try:
                setattr(result, field, value.encode() if isinstance(value, str) else value)
            except (TypeError, ctypes.ArgumentError) as error:
                raise TypeError(f"{field} = {value!r}: {error}") from None
            _same(name, field, value, getattr(result, field))
    return result


def _same(name: str, field: str, given: Any, taken: Any) -> None:
    """ctypes cuts integers to their width without a word."""
    if isinstance(given, int) and isinstance(taken, int) and given != taken:
        raise InvalidArgument(f"{field} = {given} does not fit into plora_{name}")


def create(function: Any, *arguments: Any) -> int:
    """Calls plora_..._create(arguments, &handle) and returns the handle."""
    handle = c_void_p()
    check(function(*arguments, byref(handle)))
    if not handle.value:
        raise Error("the library made no handle")
    return handle.value


def path_bytes(path: Any) -> bytes:
    """A path as the library takes it."""
    return os.fsencode(os.fspath(path))


def arena(function: Any, handle: Any) -> "tuple[int, int]":
    """(address, number of floats) of plora_adapters_parameters() or _gradients()."""
    data, count = ctypes.POINTER(ctypes.c_float)(), ctypes.c_int64()
    check(function(handle, byref(data), byref(count)))
    return ctypes.cast(data, c_void_p).value or 0, count.value


def memory(context: Any) -> Any:
    """plora_memory_statistics of a context."""
    statistics = struct("memory_statistics")
    check(lib.plora_memory_stats(context, byref(statistics)))
    return statistics


