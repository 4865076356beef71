#!/usr/bin/env python3
"""Writes tests/vectors_quantised.h: NF4 codes as bitsandbytes makes them on the CPU, for test_quantise.c.

    python make_vectors_quantised.py > ../vectors_quantised.h        needs torch and bitsandbytes, which `make test` does not

Values are multiples of 2^-20, so that the header gives them exactly. A matrix of a few blocks, one with a short last block, one with a
block of zeros, and one of more than 256 blocks; each with plain and with doubly quantised absmax.
"""
import bitsandbytes
import torch
from bitsandbytes.functional import quantize_4bit

SHAPES = [("blocks", 3, 128), ("short_block", 5, 42), ("zeros", 2, 128), ("nested_blocks", 132, 130)]


def array(kind, name, values, form):
    body = ", ".join(form(v) for v in values)
    print(f"static const {kind} {name}[] = {{{body}}};")


def main():
    generator = torch.Generator().manual_seed(20)
    print(f"/* Written by tests/python/make_vectors_quantised.py with torch {torch.__version__.split('+')[0]} and bitsandbytes "
          f"{bitsandbytes.__version__}. */")
    print("/* clang-format off */\n#ifndef PLORA_TESTS_VECTORS_QUANTISED_H\n#define PLORA_TESTS_VECTORS_QUANTISED_H\n")
    print("#include <stdint.h>\n")
    for number, (name, rows, columns) in enumerate(SHAPES):
        spread = torch.exp(torch.randn(rows, 1, generator=generator) * 0.3) * 0.05
        integers = (torch.randn(rows, columns, generator=generator) * spread * 2**20).round().to(torch.int32)
        if name == "zeros":
            integers[0, 64:] = 0
        values = integers.float() / 2**20
        array("int32_t", f"{name}_values", integers.flatten().tolist(), str)
        plain, state = quantize_4bit(values, blocksize=64, quant_type="nf4")
        nested, nested_state = quantize_4bit(values, blocksize=64, quant_type="nf4", compress_statistics=True)
        assert torch.equal(plain, nested)
        array("uint8_t", f"{name}_codes", plain.flatten().tolist(), str)
        array("float", f"{name}_absmax", state.absmax.tolist(), float.hex)
        array("uint8_t", f"{name}_nested", nested_state.absmax.tolist(), str)
        array("float", f"{name}_scales", nested_state.state2.absmax.tolist(), float.hex)
        array("float", f"{name}_offset", [nested_state.offset.item()], float.hex)
        if number == 0:
            array("float", "bitsandbytes_map", nested_state.state2.code.tolist(), float.hex)
    print("\nstatic const struct quantised_vector {\n    const char *name;\n    int64_t rows, columns;\n    const int32_t *values;"
          "\n    const uint8_t *codes;\n    const float *absmax;\n    const uint8_t *nested;\n    const float *scales, *offset;"
          "\n} quantised_vectors[] = {")
    for name, rows, columns in SHAPES:
        parts = ", ".join(f"{name}_{part}" for part in ("values", "codes", "absmax", "nested", "scales", "offset"))
        print(f'    {{"{name}", {rows}, {columns}, {parts}}},')
    print("};\n\n#endif")


main()
