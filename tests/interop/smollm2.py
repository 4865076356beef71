#!/usr/bin/env python3
"""SmolLM2-135M in finetune against transformers and PEFT: the loss, and the gradients of every adapter, in fp32.

    smollm2.py FINETUNE MODEL DATA          needs torch, transformers, peft: `make interop`

finetune is asked as a user would ask it. Its checkpoint after one step holds the parameters p1 and the first moment
m1 = 0.1 g0, that after two steps m2 = 0.9 m1 + 0.1 g1: so g0 and g1 are the gradients that it found at p0 and p1. p0 has
B = 0, hence dA = 0; at p1 both factors have gradients. PEFT gets the same A and B. The loss is that over the held-out
answers. Then the merged model is loaded by transformers, and must have the loss that finetune logged for it.
"""
import json
import pathlib
import re
import subprocess
import sys
import tempfile

import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM

HELDOUT, BATCH, RANK = 4, 2, 4
failures = []


def check(what, error, bound):
    good = error <= bound  # false for NaN
    print(f"{'ok    ' if good else 'FAILED'}  {what}: {error:.3g}, at most {bound:.3g}")
    if not good:
        failures.append(what)


def examples(path, count):
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(count))]


def loss_of(model, batch):
    """Mean over the completion tokens of all examples, one example at a time: nothing is padded."""
    total, count = 0.0, 0
    for example in batch:
        ids = torch.tensor([example["prompt"] + example["completion"]])
        logits = model(input_ids=ids).logits[0, len(example["prompt"]) - 1:-1].float()
        total = total + torch.nn.functional.cross_entropy(logits, ids[0, len(example["prompt"]):], reduction="sum")
        count += len(example["completion"])
    return total / count


def read_checkpoint(path):
    with safe_open(path, "pt") as file:
        layers, offset = {}, 0
        for line in file.metadata()["adapters"].splitlines():
            name, n, k, rank, scale = re.fullmatch(r"(.+) N=(\d+) K=(\d+) rank=(\d+) scale=(\S+)", line).groups()
            n, k, rank = int(n), int(k), int(rank)
            b = offset + -(-rank * k // 16) * 16
            layers[name] = (slice(offset, offset + rank * k), (rank, k), slice(b, b + n * rank), (n, rank), float(scale))
            offset = b + -(-rank * n // 16) * 16
        return layers, file.get_tensor("parameters"), file.get_tensor("first_moment")


def peft_gradients(model, layers, parameters, batch):
    modules = {name.removeprefix("base_model.model."): module for name, module in model.named_modules()}
    for name, (a, a_shape, b, b_shape, scale) in layers.items():
        module = modules[name]
        assert module.scaling["default"] == scale
        module.lora_A["default"].weight.data.copy_(parameters[a].reshape(a_shape))
        module.lora_B["default"].weight.data.copy_(parameters[b].reshape(b_shape))
    model.zero_grad()
    loss_of(model, batch).backward()
    gradients = torch.zeros_like(parameters)
    for name, (a, _, b, _, _) in layers.items():
        gradients[a] = modules[name].lora_A["default"].weight.grad.flatten()
        gradients[b] = modules[name].lora_B["default"].weight.grad.flatten()
    return gradients


def compare(what, layers, found, wanted):
    worst = 0.0
    for a, _, b, _, _ in layers.values():
        for part in (a, b):
            size = wanted[part].norm().item()
            error = (found[part] - wanted[part]).norm().item()
            worst = max(worst, error / size) if size > 0 else max(worst, error)
    check(f"gradients {what}, relative error of the worst of {2 * len(layers)} matrices", worst, 2e-4)


def records(directory):
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


def main():
    finetune, model_path, data = sys.argv[1:4]
    batch = examples(f"{data}/train.jsonl", BATCH)
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        (scratch / "train.jsonl").write_text("".join(json.dumps(example) + "\n" for example in batch))
        command = [finetune, "--model", model_path, "--train", str(scratch / "train.jsonl"), "--heldout",
                   f"{data}/heldout.jsonl", "--heldout-examples", str(HELDOUT), "--output", str(scratch / "run"), "--rank",
                   str(RANK), "--alpha", str(2 * RANK), "--lr", "1e-2", "--clip", "0", "--batch", str(BATCH), "--dtype", "fp32"]
        states = []
        for more in (["--steps", "2", "--stop-after", "1"], ["--steps", "2", "--resume"]):
            result = subprocess.run(command + more, stderr=subprocess.DEVNULL)
            assert result.returncode in (0, 130), result
            states.append(read_checkpoint(scratch / "run" / "checkpoint.safetensors"))
        log = records(scratch / "run")
        heldout = examples(f"{data}/heldout.jsonl", HELDOUT)
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
        with torch.no_grad():
            wanted = loss_of(base, heldout).item()
        found = [entry["heldout_loss"] for entry in log if "heldout_loss" in entry]
        check("held-out loss before", abs(found[0] - wanted), 1e-4)

        (layers, p1, m1), (_, _, m2) = states
        model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules="all-linear"))
        p0 = p1.clone()
        for _, _, b, _, _ in layers.values():  # Adam moves no A while its gradient is 0
            p0[b] = 0
        compare("at the start (B = 0)", layers, m1 / 0.1, peft_gradients(model, layers, p0, batch))
        compare("after one step", layers, (m2 - 0.9 * m1) / 0.1, peft_gradients(model, layers, p1, batch))

        merged = AutoModelForCausalLM.from_pretrained(scratch / "run" / "model", dtype=torch.float32)
        with torch.no_grad():
            check("held-out loss of the merged model (rounded to bf16)", abs(loss_of(merged, heldout).item() - found[-1]), 1e-2)
    sys.exit(1 if failures else 0)


main()
