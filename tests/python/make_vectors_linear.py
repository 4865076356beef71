#!/usr/bin/env python3
"""Writes ../vectors_linear.h: results of PEFT's LoRA layers that test_vectors_linear.c compares the library with.

    python make_vectors_linear.py        needs torch and peft

Each case is one torch layer wrapped by PEFT: y, and the gradients of sum(dy * y) with respect to x, lora_A and lora_B. Values that a
bf16 or fp16 layer sees are rounded to it first, so that both sides start from the same numbers. Floats are written in hexadecimal.
"""
import pathlib
import warnings

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model

# name, T, K, N, R, alpha, rslora, Conv1D, bias, dtype of the layer and of its activations
CASES = [
    ("linear", 5, 8, 6, 2, 16, False, False, False, torch.float32),
    ("bias", 4, 7, 9, 3, 6, False, False, True, torch.float32),
    ("rslora", 3, 6, 5, 4, 10, True, False, True, torch.float32),
    ("conv1d", 4, 6, 8, 2, 8, False, True, True, torch.float32),
    ("conv1d_rslora", 3, 5, 7, 3, 5, True, True, True, torch.float32),
    ("bf16", 6, 12, 10, 4, 8, False, False, True, torch.bfloat16),
]
DTYPES = {torch.float32: "PLORA_F32", torch.bfloat16: "PLORA_BF16"}


class Net(torch.nn.Module):
    def __init__(self, k, n, conv1d, bias):
        super().__init__()
        self.layer = transformers.pytorch_utils.Conv1D(n, k) if conv1d else torch.nn.Linear(k, n, bias=bias)

    def forward(self, x):
        return self.layer(x)


def c_array(name, field, tensor):
    numbers = [float(v).hex() + "f" for v in tensor.detach().float().flatten()]
    lines = [", ".join(numbers[i:i + 6]) for i in range(0, len(numbers), 6)]
    body = ",\n    ".join(lines)
    return f"static const float vector_{name}_{field}[] = {{\n    {body}}};\n"


def make(name, t, k, n, r, alpha, rslora, conv1d, bias, dtype, generator):
    def draw(*shape):
        return torch.rand(*shape, generator=generator) * 2 - 1

    net = Net(k, n, conv1d, bias).to(dtype)
    net.layer.weight.data.copy_(draw(*net.layer.weight.shape))
    if bias:
        net.layer.bias.data.copy_(draw(n))
    config = LoraConfig(r=r, lora_alpha=alpha, use_rslora=rslora, fan_in_fan_out=conv1d, target_modules=["layer"])
    model = get_peft_model(net, config)
    layer = model.base_model.model.layer
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.dtype == b.dtype == torch.float32
    a.data.copy_(draw(r, k))
    b.data.copy_(draw(n, r))
    x = draw(t, k).to(dtype).requires_grad_()
    dy = draw(t, n).to(dtype)
    y = model(x)
    y.backward(dy)
    base = layer.base_layer
    fields = {"w": base.weight, "a": a, "b": b, "x": x, "dy": dy, "y": y, "dx": x.grad, "da": a.grad, "db": b.grad}
    if bias:
        fields["bias"] = base.bias
    text = "".join(c_array(name, field, tensor) for field, tensor in fields.items())
    entry = ", ".join(f".{field} = vector_{name}_{field}" for field in fields)
    flags = "PLORA_LAYER_FAN_IN_FAN_OUT" if conv1d else "0"
    return text, (f'    {{.name = "{name}", .tokens = {t}, .in_features = {k}, .out_features = {n}, .rank = {r}, '
                  f".rslora = {int(rslora)}, .flags = {flags}, .dtype = {DTYPES[dtype]}, .alpha = {float(alpha)},\n"
                  f"     {entry}}},\n")


def main():
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(20240216)
    made = [make(*case, generator) for case in CASES]
    head = f"""/* vectors_linear.h: what PEFT {peft.__version__} on torch {torch.__version__.split('+')[0]} computes. Made by \
python/make_vectors_linear.py: do not edit. */
#ifndef PLORA_TESTS_VECTORS_LINEAR_H
#define PLORA_TESTS_VECTORS_LINEAR_H

#include "plora.h"

/* clang-format off */
struct linear_vector {{
    const char *name;
    int64_t tokens, in_features, out_features;
    int32_t rank, rslora, flags, dtype;
    double alpha;
    const float *w, *bias, *a, *b, *x, *dy, *y, *dx, *da, *db;
}};

"""
    text = head + "\n".join(arrays for arrays, _ in made)
    text += "\nstatic const struct linear_vector linear_vectors[] = {\n" + "".join(entry for _, entry in made) + "};\n"
    text += "/* clang-format on */\n\n#endif\n"
    (pathlib.Path(__file__).parent.parent / "vectors_linear.h").write_text(text)


if __name__ == "__main__":
    main()
