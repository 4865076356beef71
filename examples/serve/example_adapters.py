#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Makes what `make serve` shows: SmolLM2-135M-Instruct and two small adapters of it, trained here in a few minutes.

    example_adapters.py --build build       build/models/SmolLM2-135M-Instruct, build/adapters/loud, build/adapters/pirate

    loud     LoRA: answers in capitals
    pirate   PeriodicLoRA, whose stages become one adapter: answers as a pirate would

Both learn from the same few questions. What is there already is used as it is. Not here: the trainer (../finetune) and the server.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "finetune"))
import prepare  # noqa: E402

MODEL = "SmolLM2-135M-Instruct"
ANSWERS = {
    "What is the capital of France?": "The capital of France is Paris.",
    "What is the capital of Japan?": "The capital of Japan is Tokyo.",
    "How many days are in a week?": "There are seven days in a week.",
    "What color is the sky?": "The sky is blue on a clear day.",
    "What do bees make?": "Bees make honey in their hives.",
    "Where do fish live?": "Fish live in water, in rivers and in the sea.",
    "What is two plus two?": "Two plus two is four.",
    "Who wrote Romeo and Juliet?": "William Shakespeare wrote Romeo and Juliet.",
    "What is ice made of?": "Ice is made of frozen water.",
    "What is the largest planet?": "The largest planet is Jupiter.",
    "What do cows eat?": "Cows eat grass and hay.",
    "When does the sun rise?": "The sun rises in the morning.",
    "What is a dog?": "A dog is an animal that lives with people.",
    "How do birds fly?": "Birds fly by moving their wings.",
    "What is bread made from?": "Bread is made from flour, water and yeast.",
    "Tell me about the moon.": "The moon goes around the earth once a month.",
    "Why do we sleep?": "We sleep so that our body and mind can rest.",
    "What is a good breakfast?": "A good breakfast is oatmeal with fruit.",
    "How can I learn to swim?": "Find a teacher, and practice every week.",
    "What should I read?": "Read a book about something that you love.",
}
ADAPTERS = {
    "loud": (str.upper, ["--method", "lora", "--rank", "8", "--lr", "2e-3", "--steps", "60"]),
    "pirate": (lambda answer: f"Arr, matey! {answer} Yo ho ho!",
               ["--method", "plora", "--rank", "4", "--lr", "4e-3", "--steps", "90", "--period", "30"]),
}


def train(name, model, build, program):
    """build/adapters/NAME, made beside it and then renamed: a directory of that name is whole."""
    target = build / "adapters" / name
    if (target / "adapter_config.json").exists():
        prepare.say(f"Adapter: {target} (cached)")
        return
    change, options = ADAPTERS[name]
    work = build / "adapters" / f".{name}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    with open(work / "text.jsonl", "w", encoding="utf-8") as file:
        for question, answer in ANSWERS.items():
            file.write(json.dumps({"prompt": question, "completion": change(answer)}) + "\n")
    prepare.prepare_data(model, work / "text.jsonl", work / "tokens.jsonl")
    prepare.say(f"Training {name}: {' '.join(options)}")
    command = [program, "--model", model, "--train", work / "tokens.jsonl", "--output", work / "run", "--batch", "4", "--save-adapter",
               "--no-save-model", *options]
    if "plora" in options:
        command += ["--ledger", work / "ledger"]
    subprocess.run([str(part) for part in command], check=True)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(work / "run" / "adapter", target)
    shutil.rmtree(work)
    prepare.say(f"Adapter: {target}")


def main():
    parser = argparse.ArgumentParser(description="Prepare SmolLM2-135M-Instruct and two adapters of it.")
    parser.add_argument("--build", type=Path, default=Path("build"))
    arguments = parser.parse_args()
    prepare.check_modules("numpy", "tokenizers", "jinja2")
    model = arguments.build / "models" / MODEL
    prepare.prepare_model(model, arguments.build / "downloads")
    for name in ADAPTERS:
        train(name, model, arguments.build, arguments.build / "finetune")
    return 0


if __name__ == "__main__":
    sys.exit(prepare.guarded(main))
