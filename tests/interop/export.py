#!/usr/bin/env python3
"""The exports of a ledger against PEFT, in fp32.

    export.py STAGES MODEL OUTPUT          needs torch, transformers, peft: `make interop`

STAGES (stages.c) unloads several stages into the model, exports them, and saves the merged weights. The original model with the
exact adapter, in PEFT's hands, must have the logits of the merged model; what the truncated adapter lacks must be what the
report says. OUTPUT keeps the files, and the logits of both models, for llama.py.
"""
import json
import pathlib
import shutil
import subprocess
import sys

import numpy
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

TOKENS, PREFIX = 24, "base_model.model."
failures = []


def check(what, error, bound):
    good = error <= bound  # false for NaN
    print(f"{'ok    ' if good else 'FAILED'}  {what}: {error:.3g}, at most {bound:.3g}")
    if not good:
        failures.append(what)


def logits_of(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits[0].float()


def products(directory):
    """D' of every layer, in double, as PEFT's config says it is to be understood."""
    config = json.loads((directory / "adapter_config.json").read_text())
    tensors = load_file(directory / "adapter_model.safetensors")
    result = {}
    for key, a in tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        layer = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        alpha = config["alpha_pattern"].get(layer, config["lora_alpha"])
        assert a.shape[0] == config["rank_pattern"].get(layer, config["r"])
        b = tensors[key.replace("lora_A", "lora_B")]
        result[layer] = alpha / a.shape[0] * b.double() @ a.double()
    return result


def main():
    stages, model_path, output = sys.argv[1], pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3])
    shutil.rmtree(output, ignore_errors=True)
    (output / "merged").mkdir(parents=True)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    config = base.config
    base.save_pretrained(output / "base")
    result = subprocess.run([stages, output / "base", output, str(config.num_attention_heads), str(config.num_key_value_heads)],
                            check=True, stdout=subprocess.PIPE)
    report = json.loads(result.stdout)
    shutil.copy(output / "base" / "config.json", output / "merged")
    merged = AutoModelForCausalLM.from_pretrained(output / "merged", dtype=torch.float32)

    ids = torch.randint(0, config.vocab_size, (1, TOKENS))
    before, wanted = logits_of(base, ids), logits_of(merged, ids)
    moved = (wanted - before).abs().max().item()
    check("logits: 1 over what training moved them by", 1 / moved, 1.0)
    exact = logits_of(PeftModel.from_pretrained(base, output / "exact"), ids)
    check("logits: base + exact adapter against the merged model, of those", (exact - wanted).abs().max().item() / moved, 1e-4)

    full, truncated = products(output / "exact"), products(output / "truncated")
    assert full.keys() == truncated.keys() == report["layers"].keys()
    worst = missing = whole = 0.0
    for layer, d in full.items():
        error, size = (truncated[layer] - d).norm().item(), d.norm().item()
        worst = max(worst, abs(error / size - report["layers"][layer]))
        missing, whole = missing + error ** 2, whole + size ** 2
    check(f"truncation: reported and found error of the worst of {len(full)} layers differ by", worst, 1e-6)
    check("truncation: the same in all", abs((missing / whole) ** 0.5 - report["error"]), 1e-6)
    base = AutoModelForCausalLM.from_pretrained(output / "base", dtype=torch.float32)
    for name, module in base.named_modules():
        if name in truncated:
            module.weight.data += truncated[name].float()
    sums = logits_of(base, ids)
    numpy.savez(output / "logits.npz", ids=ids.numpy(), base=before.numpy(), merged=wanted.numpy(), truncated=sums.numpy())
    base = AutoModelForCausalLM.from_pretrained(output / "base", dtype=torch.float32)
    found = logits_of(PeftModel.from_pretrained(base, output / "truncated"), ids)
    check("logits: base + truncated adapter against its product added to the weights", (found - sums).abs().max().item() / moved,
          1e-4)
    sys.exit(1 if failures else 0)


main()
