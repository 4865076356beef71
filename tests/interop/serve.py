#!/usr/bin/env python3
"""The server on a real model and real adapters against transformers and PEFT: greedy tokens, asked for all at once.

    serve.py SERVE MODEL ADAPTERS        ADAPTERS: a directory of PEFT directories

Both compute in fp32. Where two tokens lie within 1e-3 of one another rounding may choose: what comes after is not compared.
"""
import json
import re
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = ["The capital of France is", "def fibonacci(n):\n", "Once upon a time, in 1984,", "<|im_start|>user\nWhat is the capital of Italy?<|im_end|>\n"
           "<|im_start|>assistant\n", "Ein Café in Köln hat 12 Tische.", "It's " + "very " * 150 + "long"]
MOST, TIE = 24, 1e-3


def greedy(model, ids):
    """Tokens, and how many of them are sure."""
    made, sure = list(ids), None
    with torch.no_grad():
        for step in range(MOST):
            logits = model(torch.tensor([made])).logits[0, -1]
            best = logits.topk(2)
            if sure is None and best.values[0] - best.values[1] < TIE:
                sure = step
            if best.indices[0] == model.config.eos_token_id:
                break
            made.append(int(best.indices[0]))
    made = made[len(ids):]
    return made, len(made) if sure is None else sure


def main():
    program, directory, adapters = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    names = sorted(path.parent.name for path in adapters.glob("*/adapter_config.json"))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    process = subprocess.Popen([program, "--model", directory, "--name", "base", "--adapters", adapters, "--port", "0", "--batch-tokens", "64"],
                               stdout=subprocess.PIPE, text=True)
    port = re.search(r":(\d+)$", process.stdout.readline()).group(1)

    def ask(case):
        body = json.dumps({"model": case[0], "prompt": case[1], "max_tokens": MOST, "temperature": 0}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=600) as reply:
            return json.load(reply)["choices"][0]["text"]

    cases = [(name, prompt) for prompt in PROMPTS for name in ["base", *names]]
    with ThreadPoolExecutor(len(cases)) as pool:
        texts = dict(zip(cases, pool.map(ask, cases), strict=True))
    process.terminate()
    process.wait()
    wrong = compared = 0
    for name in ["base", *names]:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        if name != "base":
            model = PeftModel.from_pretrained(model, adapters / name)
        for prompt in PROMPTS:
            made, sure = greedy(model.eval(), tokenizer(prompt, add_special_tokens=False).input_ids)
            want = tokenizer.decode(made[:sure], skip_special_tokens=True)
            good = texts[name, prompt].startswith(want) and (sure < len(made) or texts[name, prompt] == want)
            compared, wrong = compared + sure, wrong + (not good)
            print(f"{'same ' if good else 'WRONG'} {sure:3} tokens  {name}: {prompt[:30]!r} -> {texts[name, prompt][:60]!r}"
                  + ("" if good else f"\n      want {want!r}"))
    print(f"{compared} tokens compared, {wrong} answers wrong")
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main())
