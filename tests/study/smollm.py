# SPDX-License-Identifier: Apache-2.0
"""A run of SmolLM2-135M on gsm_symbolic by the C trainer, examples/finetune: data, model, batches and method as in `make demo`.

Exact match: of greedy answers to the first HELD_OUT held-out questions, those whose number behind "####" is the reference's;
that of the model before is measured once. The held-out set is the one that chooses the rate, too: there is no third set. A run
that was cut off goes on from its checkpoint.
"""

import contextlib
import hashlib
import json
import re
import resource
import shutil
import signal
import statistics
import subprocess
import time

import corpus
import models

import demo  # isort: skip  (examples/finetune; corpus has put it on the path)

HELD_OUT = 32
EVALUATIONS = 4
BATCH = 2
LAYER = "model.layers.15.mlp.down_proj"


def number_of(text):
    found = re.search(r"####\s*(-?[\d,]*\.?\d+)", text)
    return float(found.group(1).replace(",", "")) if found else None


def exact_match(directory, chat, when):
    samples = [sample for sample in demo.read_lines(directory / "samples.jsonl") if sample["when"] == when]
    right = 0
    for sample in samples:
        wanted, got = (number_of(chat.text(sample[name])) for name in ("reference", "generated"))
        right += wanted is not None and wanted == got
    return right / len(samples) if samples else None


def before(build, command, chat):
    """Exact match of the model as it was, by whoever comes first."""
    directory = build / "study" / "smollm-before"
    with models.only_one(build / "study" / "smollm-before.lock"):
        if not (directory / "result.json").is_file():
            directory.mkdir(exist_ok=True)
            with open(directory / "output.txt", "w") as log:
                train([*command, "--output", str(directory), "--steps", "1", "--threads", "1", "--sample", str(HELD_OUT),
                       "--heldout-examples", str(HELD_OUT)], log)  # fmt: skip
            (directory / "checkpoint.safetensors").unlink()
    return exact_match(directory, chat, "before")


def run(settings, build):
    model, data = build / "models" / "SmolLM2-135M-Instruct", build / "data" / "gsm"
    prepare = corpus.prepare
    with models.only_one(build / "study" / "smollm.lock"):
        prepare.prepare_model(model, build / "downloads")
        prepare.prepare_gsm(model, data, build / "downloads")
    chat = prepare.Chat(model)
    method = "lora" if settings.get("method", "lora") == "lora" else "plora"
    steps = settings["steps"]
    options = {
        "method": method, "rank": settings.get("rank", 1), "alpha": settings.get("rank", 1), "lr": settings["lr"],
        "schedule": "cosine", "warmup": settings["warmup"], "steps": steps, "batch": BATCH, "dtype": "fp32",
        "seed": settings["seed"], "eval-every": steps // EVALUATIONS, "heldout-examples": HELD_OUT, "checkpoint-every": 40,
        "threads": 1,
    }  # fmt: skip
    if method == "plora":
        options.update({"period": settings["period"], "momentum": settings.get("momentum", 1.0)})
    name = hashlib.blake2b(json.dumps(options, sort_keys=True).encode(), digest_size=6).hexdigest()
    directory = build / "study" / f"smollm-{name}"
    command = [str(build / "finetune"), "--model", str(model), "--train", str(data / "train.jsonl"), "--heldout",
               str(data / "heldout.jsonl"), "--eos", str(chat.end_id()), "--max-new-tokens", "160", "--no-save-model"]  # fmt: skip
    exact_before = before(build, command, chat)
    command += ["--output", str(directory)]
    for option, value in options.items():
        command += [f"--{option}", str(value)]
    started = time.time()
    if not (directory / "samples.jsonl").is_file():
        resume = (directory / "checkpoint.safetensors").is_file()
        if not resume:
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
        with open(directory / "output.txt", "a") as log:
            train(command + (["--resume"] if resume else []), log)
            train([*command, "--resume", "--sample", str(HELD_OUT)], log)  # so that answers are made at the end alone
    curves = demo.read_run(directory)
    result = curves["result"]
    losses = [loss for _, loss in curves["losses"]]
    held_out = [[step, loss, loss, None, None, None] for step, loss in curves["heldout"]]
    held_out[0][3], held_out[-1][3] = exact_before, exact_match(directory, chat, "after")
    update = demo.update_rank(directory / "checkpoint.safetensors", model, LAYER)
    record = {
        "settings": settings, "base": prepare.file_sha256(model / "model.safetensors")[:12], "base_loss": held_out[0][2],
        "diverged": None, "trained": None, "train": [round(sum(losses[i : i + 10]) / 10, 5) for i in range(0, steps - 9, 10)],
        "held_out": held_out, "train_loss": statistics.mean(losses[-50:]), "tune_loss": held_out[-1][1],
        "test_loss": held_out[-1][2],
        "exact": held_out[-1][3], "watched": [], "unloads": [],
        "update": {"layer": LAYER, "spectrum": [], "rank": update["rank"], "effective": update["effective"],
                   "relative": update["relative_rms"], "captured": None},
        "seconds": round(time.time() - started, 1),  # since it was last resumed
        "cpu_seconds": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime, 1), "peak_rss": result["peak_rss_bytes"],
    }  # fmt: skip
    with contextlib.suppress(OSError):
        (directory / "checkpoint.safetensors").unlink()  # half a gigabyte; what was wanted of it is in the record
    return record


def train(command, log):
    """Ends with a checkpoint when this process is told to end."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def forward(*_):
        child.send_signal(signal.SIGINT)
        child.wait()
        raise SystemExit(1)

    signal.signal(signal.SIGTERM, forward)
    status = child.wait()
    if status != 0:
        raise RuntimeError(f"finetune ended with status {status}: see {log.name}")
