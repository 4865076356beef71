#!/usr/bin/env python3
"""Writes tests/vectors_optimizer.h: trajectories of torch.optim.AdamW and torch.optim.SGD on a few elements.

usage: make_vectors_optimizer.py > tests/vectors_optimizer.h      needs torch
"""
import torch

COUNT, STEPS = 24, 6
CASES = [  # name, algorithm, learning rate, beta1, beta2, epsilon, weight decay
    ("ADAMW", 0, 1e-2, 0.9, 0.999, 1e-8, 0.0),
    ("ADAMW", 0, 3e-3, 0.8, 0.95, 1e-6, 0.1),
    ("SGD", 1, 5e-2, 0.9, 0.0, 1e-8, 0.0),
]


def numbers(tensor):
    return ", ".join(float(x).hex() + "f" for x in tensor)


def trajectory(algorithm, rate, beta1, beta2, epsilon, decay, start, gradients):
    p = torch.nn.Parameter(start.clone())
    if algorithm == 0:
        optimizer = torch.optim.AdamW([p], lr=rate, betas=(beta1, beta2), eps=epsilon, weight_decay=decay)
    else:
        optimizer = torch.optim.SGD([p], lr=rate, momentum=beta1)
    for gradient in gradients:
        p.grad = gradient.clone()
        optimizer.step()
        yield p.detach().clone()


def main():
    generator = torch.Generator().manual_seed(20240226)
    start = torch.randn(COUNT, generator=generator)
    gradients = torch.randn(STEPS, COUNT, generator=generator) * 10.0 ** torch.randint(-6, 2, (COUNT,), generator=generator)
    gradients[:, 0] = 0.0
    print(f"/* Written by tests/python/make_vectors_optimizer.py with torch {torch.__version__.split('+')[0]}. */")
    print("#ifndef PLORA_TESTS_VECTORS_OPTIMIZER_H\n#define PLORA_TESTS_VECTORS_OPTIMIZER_H\n")
    print(f"enum {{ VECTOR_COUNT = {COUNT}, VECTOR_STEPS = {STEPS} }};\n")
    print(f"static const float vector_start[VECTOR_COUNT] = {{{numbers(start)}}};\n")
    rows = ",\n    ".join("{" + numbers(g) + "}" for g in gradients)
    print(f"static const float vector_gradients[VECTOR_STEPS][VECTOR_COUNT] = {{\n    {rows}}};\n")
    print("static const struct vector_case {\n    int algorithm;\n    double learning_rate, beta1, beta2, epsilon, weight_decay;")
    print("    float parameters[VECTOR_STEPS][VECTOR_COUNT]; /* after each step */\n} vector_cases[] = {")
    for name, *case in CASES:
        rows = ",\n      ".join("{" + numbers(p) + "}" for p in trajectory(*case, start, gradients))
        print(f"    {{{', '.join(map(repr, case))}, /* {name} */\n     {{{rows}}}}},")
    print("};\n\n#endif")


main()
