#!/usr/bin/env python3
"""Kills the trainer (SIGKILL) at random instants and resumes it, until it ends: with the bits of a run that nobody disturbed.

    finetune.py FINETUNE MODEL [--kills 1000]

The undisturbed run has no ledger: so the ledger is shown to change nothing, too. Compared are the merged model, the samples,
the state of the adapters, and the ledgers of all killed runs with that of a run that was not.
"""
import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time

OPTIONS = ("--method plora --period 2 --momentum 0.4 --steps 9 --batch 2 --rank 2 --lr 1e-2 --dropout 0.1 --dtype bf16 "
           "--checkpoint-every 1 --sample 1 --max-new-tokens 3 --deterministic --threads 1 --seed 3").split()
FULL = ["--momentum", "1", "--schedule", "cosine", "--warmup", "1"]  # the other way to unload


def write_examples(path, count, salt):
    generator = random.Random(salt)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            first, length = generator.randrange(50), generator.randrange(3, 8)
            prompt = [(first + i) % 61 for i in range(length)]
            file.write(json.dumps({"prompt": prompt, "completion": [(first + length) % 61, 2]}) + "\n")


def read(path):
    with open(path, "rb") as file:
        return file.read()


def arena(path):
    """The parameters and moments of a checkpoint: its metadata says where its ledger is, so whole files may differ."""
    data = read(path)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + length])
    names = [name for name in sorted(header) if name in ("parameters", "first_moment", "second_moment")]
    spans = [header[name]["data_offsets"] for name in names]
    return [data[8 + length + begin:8 + length + end] for begin, end in spans]


class Trainer:
    def __init__(self, program, model, folder):
        self.folder = folder
        train, heldout = os.path.join(folder, "train.jsonl"), os.path.join(folder, "heldout.jsonl")
        write_examples(train, 20, 1)
        write_examples(heldout, 2, 2)
        self.command = [program, "--model", model, "--train", train, "--heldout", heldout, *OPTIONS]

    def start(self, name, more, resume=False):
        command = [*self.command, *more, "--output", os.path.join(self.folder, name)] + (["--resume"] if resume else [])
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def finish(self, process):
        """Whether it came to its end; a kill is no failure."""
        errors = process.communicate()[1]
        if process.returncode not in (0, -signal.SIGKILL):
            sys.exit(f"finetune ended with {process.returncode}: {errors}")
        return process.returncode == 0

    def path(self, *parts):
        return os.path.join(self.folder, *parts)


def compare(trainer, name, reference, files):
    for file in files:
        if read(trainer.path(name, file)) != read(trainer.path(reference, file)):
            sys.exit(f"{name}/{file} is not that of {reference}")
    if arena(trainer.path(name, "checkpoint.safetensors")) != arena(trainer.path(reference, "checkpoint.safetensors")):
        sys.exit(f"{name}: the checkpoint is not that of {reference}")


def clear(trainer, name):
    for folder, _, files in os.walk(trainer.path(name), topdown=False):
        for file in files:
            os.remove(os.path.join(folder, file))
    if os.path.exists(trainer.path(name + ".ledger")):
        os.remove(trainer.path(name + ".ledger"))


def kill_runs(trainer, more, kills, length):
    """Runs, killed `kills` times in all; returns how many came to their end."""
    ledger = ["--ledger", trainer.path("killed.ledger")]
    done = runs = 0
    resume = False
    while done < kills or resume:
        process = trainer.start("killed", [*more, *ledger], resume)
        if done < kills:
            try:
                process.wait(random.uniform(0, 1.1 * length))
            except subprocess.TimeoutExpired:
                process.kill()
        if not trainer.finish(process):
            done += 1
            resume = os.path.exists(trainer.path("killed", "checkpoint.safetensors"))
            continue
        compare(trainer, "killed", "undisturbed", ["model/model.safetensors", "samples.jsonl"])
        if read(trainer.path("killed.ledger")) != read(trainer.path("whole.ledger")):
            sys.exit("the killed run's ledger is not that of a whole run")
        clear(trainer, "killed")
        resume = False
        runs += 1
    return runs


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program")
    parser.add_argument("model")
    parser.add_argument("--kills", type=int, default=1000)
    arguments = parser.parse_args()
    seed = int(os.environ.get("PLORA_TEST_SEED", time.time_ns() % 10**9))
    random.seed(seed)
    print(f"kill/finetune.py: PLORA_TEST_SEED={seed}", flush=True)
    for name, more in (("part", []), ("full", FULL)):
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(arguments.program, arguments.model, folder)
            trainer.finish(trainer.start("undisturbed", more))
            begin = time.monotonic()
            trainer.finish(trainer.start("whole", [*more, "--ledger", trainer.path("whole.ledger")]))
            length = time.monotonic() - begin
            compare(trainer, "whole", "undisturbed", ["model/model.safetensors", "samples.jsonl"])
            kills = (arguments.kills + 1) // 2
            runs = kill_runs(trainer, more, kills, length)
            print(f"{name}: {kills} kills, {runs} runs of {1e3 * length:.0f} ms to the end", flush=True)


if __name__ == "__main__":
    main()
