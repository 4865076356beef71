#!/usr/bin/env python3
"""What a training step of SmolLM2-135M does in its linear layers, by torch and PEFT on a GPU, beside `bench_cuda REPEATS layers`.

    cuda_peers.py BENCH_CUDA [--device cpu --blocks 1 --tokens 16 --repeats 3]

Both sides: forward and backward of every linear layer with an adapter of R = 16 from activations that lie there, then AdamW; fp32
adapters, no dropout. Ours and PEFT's alternate; one JSON object a line with the medians. On a CPU (--device) only PEFT runs.
"""
import argparse
import json
import statistics
import subprocess
import sys
import time

import torch
from peft import LoraConfig, inject_adapter_in_model

SHAPES = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))  # out, in
ROUNDS = 3


class Step:
    def __init__(self, options, dtype):
        layers = [torch.nn.Linear(k, n, bias=False, dtype=dtype) for _ in range(options.blocks) for n, k in SHAPES]
        self.model = torch.nn.Sequential(*layers).requires_grad_(False)
        inject_adapter_in_model(LoraConfig(r=16, lora_alpha=32, target_modules=r"\d+", lora_dropout=0.0), self.model)
        self.model.to(options.device)
        adapters = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in adapters:
            parameter.data = parameter.data.float()
        self.optimizer = torch.optim.AdamW(adapters, fused=options.device == "cuda")
        self.x = {k: torch.randn(options.tokens, k, dtype=dtype, device=options.device, requires_grad=True) for k in (576, 1536)}
        self.dy = {n: torch.randn(options.tokens, n, dtype=dtype, device=options.device) for n in (192, 576, 1536)}
        self.options = options

    def run(self):
        ys = [layer(self.x[layer.in_features]) for layer in self.model]
        torch.autograd.backward(ys, [self.dy[y.shape[1]].to(y.dtype) for y in ys])
        self.optimizer.step()
        self.optimizer.zero_grad()

    def wait(self):
        if self.options.device == "cuda":
            torch.cuda.synchronize()

    def seconds(self):
        self.wait()
        start = time.perf_counter()
        self.run()
        self.wait()
        return time.perf_counter() - start


def ours(options, dtype):
    """Of one run of bench_cuda, whose own median is of as many steps."""
    lines = subprocess.run([options.bench, str(options.repeats), "layers"], check=True, text=True, stdout=subprocess.PIPE).stdout
    rows = [json.loads(line) for line in lines.splitlines()]
    return next(row["ms"] for row in rows if row["bench"] == "layers" and row["dtype"].lower() == dtype)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    for name, default in (("blocks", 30), ("tokens", 1024), ("repeats", 21)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("cuda_peers: torch finds no GPU")
    for name, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
        step, times = Step(options, dtype), {"ours": [], "peft": []}
        for _ in range(ROUNDS):
            for _ in range(2):
                step.seconds()
            times["peft"] += [1e3 * step.seconds() for _ in range(options.repeats)]
            if options.device == "cuda":
                times["ours"].append(ours(options, name))
        row = {"bench": "peers", "dtype": name, "blocks": options.blocks, "tokens": options.tokens, "torch": torch.__version__,
               "peft_ms": round(statistics.median(times["peft"]), 3)}
        if times["ours"]:
            row.update(ours_ms=statistics.median(times["ours"]), times_as_fast=round(row["peft_ms"] / statistics.median(times["ours"]), 3))
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
