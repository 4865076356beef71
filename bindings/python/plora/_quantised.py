"""Weights of 8 or 4 bits, as arrays of numpy or of whatever speaks DLPack; used where they are, written by unloads.

    int8   W(i,j) = codes(i,j) * scales(i, j / group)                     codes int8 [rows, columns]; group 0: a scale for each row
    nf4    W(e) = nf4[code(e)] * absmax(e / 64)                           codes uint8, two a byte, the even element in the upper half
           absmax(b) = scales[b], or map[nested_codes[b]] * scales[b / 256] + offset

The layout of NF4 is bitsandbytes'. plora.h describes both (plora_quantised).
"""

from ctypes import POINTER, byref, c_float, c_size_t, c_uint8, c_void_p, cast
from typing import Any, Optional, Tuple

from . import _abi
from ._memory import BYTES, CPU, matrix_of, run_of
from ._native import InvalidArgument, check, lib, struct

FORMATS = {"int8": _abi.PLORA_QUANTISED_INT8, "nf4": _abi.PLORA_QUANTISED_NF4}


def _shape_of(shape: Any, format: str, group: int) -> Any:
    if format not in FORMATS:
        raise InvalidArgument(f"format = {format!r}: must be one of {', '.join(FORMATS)}")
    rows, columns = shape
    return struct("quantised", rows=rows, columns=columns, group=group, format=FORMATS[format])


def _context() -> Any:
    from ._handles import Context

    return Context()


def sizes(described: Any, nested: bool) -> Tuple[int, int, int]:
    """Bytes of codes, scales and nested codes."""
    codes, scales, nested_codes = c_size_t(), c_size_t(), c_size_t()
    check(lib.plora_quantised_size(byref(described), int(nested), byref(codes), byref(scales), byref(nested_codes)))
    return codes.value, scales.value, nested_codes.value


class Quantised:
    """A weight [rows, columns] of 8 or 4 bits: its arrays, and what the library needs to know of them.

    shape: (rows, columns). group: int8: columns that share a scale, 0 = a whole row. device: DLPack's, of the context it is for.
    """

    def __init__(
        self, format: str, shape: Tuple[int, int], codes: Any, scales: Any, *, nested_codes: Any = None, map: Any = None,
        offset: float = 0.0, group: int = 0, device: Tuple[int, int] = (CPU, 0),
    ) -> None:  # fmt: skip
        if (nested_codes is None) != (map is None):
            raise InvalidArgument("nested_codes and map belong together")
        described = _shape_of(shape, format, group)
        needed = sizes(described, nested_codes is not None)
        described.codes, keep_codes = run_of(codes, "codes", BYTES, needed[0], device)
        scales_at, keep_scales = run_of(scales, "scales", _abi.PLORA_F32, needed[1], device)
        described.scales = cast(c_void_p(scales_at), POINTER(c_float))
        keep = [keep_codes, keep_scales]
        if nested_codes is not None:
            nested_at, keep_nested = run_of(nested_codes, "nested_codes", BYTES, needed[2], device)
            map_at, keep_map = run_of(map, "map", _abi.PLORA_F32, 4 * 256, device, write=False)
            described.nested_codes = cast(c_void_p(nested_at), POINTER(c_uint8))
            described.map, described.offset = cast(c_void_p(map_at), POINTER(c_float)), offset
            keep += [keep_nested, keep_map]
        self.format, self.group, self.described = format, group, described
        self.codes, self.scales, self.nested_codes, self.map = codes, scales, nested_codes, map
        self._keep = keep

    @property
    def shape(self) -> Tuple[int, int]:
        return self.described.rows, self.described.columns

    @property
    def offset(self) -> float:
        return self.described.offset

    @classmethod
    def of(cls, values: Any, format: str = "nf4", *, nested: bool = False, group: int = 0, context: Any = None) -> "Quantised":
        """Quantises values [rows, columns], fp32, bf16 or fp16, in host memory, into numpy arrays. nested: absmax in 8 bits, too."""
        import numpy

        matrix, keep = matrix_of(values, "values")
        described = _shape_of((matrix.rows, matrix.columns), format, group)
        codes, scales, nested_codes = sizes(described, nested)
        map_ = numpy.empty(256, "f") if nested else None
        if map_ is not None:
            check(lib.plora_quantised_map((c_float * 256).from_buffer(map_)))
        made = cls(
            format, (matrix.rows, matrix.columns), numpy.empty(codes, "b" if format == "int8" else "B"),
            numpy.empty(scales // 4, "f"), nested_codes=numpy.empty(nested_codes, "B") if nested else None, map=map_, group=group,
        )  # fmt: skip
        owner = (context or _context()).held
        check(lib.plora_quantise(owner, byref(matrix), byref(made.described), 0, None))
        del keep
        return made

    def dequantise(self, out: Any = None, *, context: Any = None, stream: Optional[int] = None) -> Any:
        """W into out [rows, columns], fp32 or bf16; by default a new numpy array, fp32."""
        context = context or _context()
        if out is None:
            import numpy

            out = numpy.empty(self.shape, "f")
        matrix, keep = matrix_of(out, "out", context.dl_device, write=True)
        check(lib.plora_dequantise(context.held, byref(self.described), byref(matrix), stream))
        del keep
        return out

    def __repr__(self) -> str:
        rows, columns = self.shape
        return f"<plora.Quantised {self.format} [{rows},{columns}]>"
