#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes SmolLM2-135M on word problems with LoRA and with PLoRA of the same rank on the same batches and compares.

    prepare.py  ->  build/models/..  build/data/..       model and data, made once
    finetune    ->  build/demo/lora  build/demo/plora    one run each, in C; an interrupted run goes on where it was
    this file   ->  a table, build/demo/result.json, build/demo/loss.png, a sample answer, the place of the merged model

Learning ability = loss decrease of PLoRA / loss decrease of LoRA. What comes out is printed, whoever wins.
"""
import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import prepare

# ---------------------------------------------------------------------------------------------------------- the regime
# Options of `finetune`. Both runs share everything but what makes PLoRA PLoRA, so that neither side is tuned better: of the
# learning rates 1e-2 and 2e-2 the first is better for both. PLoRA is in its momentum form, which keeps the model's function
# at each unload: within so few steps the restarts of full unloads cost more than the rank they bring is worth.
COMMON = {
    "rank": 1, "alpha": 1, "targets": "all-linear", "lr": 1e-2, "schedule": "cosine", "warmup": 5, "steps": 160,
    "batch": 2, "dtype": "fp32", "seed": 1, "eval-every": 40, "heldout-examples": 32, "checkpoint-every": 40,
    "sample": 1, "max-new-tokens": 160,
}
RUNS = {
    "lora": {"method": "lora"},
    "plora": {"method": "plora", "period": 10, "momentum": 0.2},
}
LABELS = {"lora": "LoRA", "plora": "PLoRA"}

LAST_STEPS = 20       # the train loss at the end is the mean over so many steps
RANK_THRESHOLD = 0.01  # singular values above this share of the largest count
DISK_NEEDED = 3 << 30

REPOSITORY = Path(__file__).resolve().parents[2]


# ------------------------------------------------------------------------------------------------------------- running


class Interrupted(Exception):
    pass


def command_of(program, run, model, data, output, end_id, options):
    command = [str(program), "--model", str(model), "--train", str(data / "train.jsonl"), "--heldout",
               str(data / "heldout.jsonl"), "--output", str(output), "--eos", str(end_id)]
    for name, value in {**options, **RUNS[run]}.items():
        command += [f"--{name}", str(value)]
    return command


def fingerprint(command, model, data):
    """Changes whenever the run would come out differently: the program, its options, the model, the data."""
    digest = hashlib.sha256()
    for path in (Path(command[0]), data / "train.jsonl", data / "heldout.jsonl", *sorted(model.glob("*.safetensors"))):
        digest.update(prepare.file_sha256(path).encode())
    digest.update(json.dumps(command[1:]).encode())
    return digest.hexdigest()


def run_child(command):
    """Runs the trainer on this terminal, in a session of its own: it hears a Ctrl-C once, from here."""
    child = subprocess.Popen(command, start_new_session=True, stdin=subprocess.DEVNULL)
    stopped = []

    def forward(number, _frame):
        if child.poll() is None:
            child.send_signal(signal.SIGINT)
            if not stopped:
                print("\nEnding after this step, with a checkpoint. Ctrl-C again ends at once.", file=sys.stderr)
        stopped.append(number)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        status = child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if stopped:
        raise Interrupted
    return status


def train(run, command, stamp, output):
    """Brings the run to its end: nothing to do if it is complete, from its checkpoint if it was cut off, else anew."""
    note = output.with_name(f"{output.name}.stamp")
    same = note.is_file() and note.read_text(encoding="utf-8") == stamp
    if same and (output / "result.json").is_file() and model_problem(output / "model") == "":
        prepare.say(f"\n{LABELS[run]}: done before, taken from {output}")
        return
    resume = same and (output / "checkpoint.safetensors").is_file()
    if not resume:
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir(parents=True)
        note.write_text(stamp, encoding="utf-8")
    prepare.say(f"\n{LABELS[run]}: " + ("going on from its checkpoint" if resume else "training"))
    try:
        status = run_child(command + (["--resume"] if resume else []))
    except Interrupted:
        if (output / "result.json").is_file():
            then = f"goes on after {LABELS[run]}, which is complete"
        elif (output / "checkpoint.safetensors").is_file():
            then = f"goes on from the checkpoint in {output}"
        else:
            then = f"starts {LABELS[run]} again: it had no checkpoint yet"
        prepare.say(f"\nInterrupted. `make demo` {then}.")
        raise
    if status == 0 and (output / "result.json").is_file():
        return
    cause = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
    advice = "its message is above"
    if shutil.disk_usage(output).free < 64 << 20:
        advice = "the disk is full"
    raise prepare.PrepareError(f"finetune {cause}; {advice}. `make demo` goes on from the last checkpoint, if there is "
                               f"one. The command was\n    {' '.join(command)}")


# ------------------------------------------------------------------------------------------------------------- reading


def read_lines(path):
    """The objects of a JSONL file; a torn last line, left by a crash, is none."""
    records = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise prepare.PrepareError(f"{path}:{number} is not JSON: {error}") from error
    return records


def read_run(directory):
    """The curves of a run. A step that was done again after a resume counts once, as it was done last."""
    losses, heldout, unloads = {}, {}, {}
    for record in read_lines(directory / "log.jsonl"):
        if "loss" in record:
            losses[record["step"]] = record["loss"]
        if "heldout_loss" in record:
            heldout[record["step"]] = record["heldout_loss"]
        if "unload" in record:
            unloads[record["step"]] = record["unload"]
    result = prepare.read_json(directory / "result.json")
    if not losses or len(heldout) < 2:
        raise prepare.PrepareError(f"{directory}/log.jsonl has {len(losses)} steps and {len(heldout)} held-out losses")
    return {"losses": sorted(losses.items()), "heldout": sorted(heldout.items()), "unloads": sorted(unloads.items()),
            "result": result}


def model_files(directory):
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return [directory / name for name in sorted(set(prepare.read_json(index)["weight_map"].values()))]
    return [directory / "model.safetensors"]


def read_header(path, metadata=None):
    """{name: (dtype, shape, first byte, last byte + 1)} of a safetensors file, its size checked; its texts go into
    `metadata`."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 0 < size < 100 << 20:
            raise prepare.PrepareError(f"{path}: a header of {size} bytes")
        try:
            header = json.loads(file.read(size))
        except ValueError as error:
            raise prepare.PrepareError(f"{path}: the header is not JSON: {error}") from error
    texts = header.pop("__metadata__", {})
    if metadata is not None:
        metadata.update(texts)
    entries = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        entries[name] = (entry["dtype"], tuple(entry["shape"]), 8 + size + first, 8 + size + last)
    end = max(last for *_, last in entries.values())
    if end != path.stat().st_size:
        raise prepare.PrepareError(f"{path}: tensors end at byte {end}, the file at {path.stat().st_size}")
    return entries


def read_values(path, entry):
    import numpy as np

    dtype, shape, first, last = entry
    kind = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}.get(dtype)
    if kind is None:
        raise prepare.PrepareError(f"{path}: a tensor of dtype {dtype}")
    raw = np.fromfile(path, kind, offset=first, count=(last - first) // np.dtype(kind).itemsize)
    values = (raw.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else raw.astype(np.float32)
    return values.reshape(shape)


def read_tensor(directory, name):
    for path in model_files(directory):
        entries = read_header(path)
        if name in entries:
            return read_values(path, entries[name])
    raise prepare.PrepareError(f"{directory} has no tensor {name}")


def model_problem(directory, base=None):
    """What keeps `directory` from being a model with the tensors of `base` (of itself if None); "" if nothing does."""
    try:
        for name in ("config.json", "tokenizer.json"):
            prepare.read_json(directory / name)
        shapes = {name: entry[1] for path in model_files(directory) for name, entry in read_header(path).items()}
        if base is not None:
            wanted = {name: entry[1] for path in model_files(base) for name, entry in read_header(path).items()}
            for name in sorted(set(wanted) | set(shapes)):
                if wanted.get(name) != shapes.get(name):
                    return f"{name} has shape {shapes.get(name)}, expected {wanted.get(name)}"
    except (prepare.PrepareError, OSError, KeyError, ValueError, TypeError) as error:
        return str(error)
    return ""


# ----------------------------------------------------------------------------------------------------------- measuring


def accumulated_update(checkpoint, model, layer):
    """W_after - W_before of one layer in float64, from the last checkpoint: what was unloaded into W, and s B A of the live
    adapter. The exported model is no use for it where it is rounded to bf16, which would drown the small part."""
    import numpy as np

    texts, offset, update = {}, 0, None
    entries = read_header(checkpoint, texts)
    parameters = read_values(checkpoint, entries["parameters"]).astype(np.float64)
    before = read_tensor(model, f"{layer}.weight").astype(np.float64)
    for line in texts["adapters"].splitlines():  # in the order of the arena, where A and B start at multiples of 16
        name, n, k, rank, scale = re.fullmatch(r"(.+) N=(\d+) K=(\d+) rank=(\d+) scale=(\S+)", line).groups()
        n, k, rank = int(n), int(k), int(rank)
        a, b = offset, offset + -(-rank * k // 16) * 16
        offset = b + -(-rank * n // 16) * 16
        if name == layer:
            live = parameters[b:b + n * rank].reshape(n, rank) @ parameters[a:a + rank * k].reshape(rank, k)
            update = float(scale) * live
    if update is None:
        raise prepare.PrepareError(f"{checkpoint} has no adapter of {layer}")
    merged = entries.get(f"weight.{layer}")
    return (update if merged is None else update + read_values(checkpoint, merged) - before), before


def update_rank(checkpoint, model, layer):
    """Rank of the update: its singular values above RANK_THRESHOLD of the largest; effective: (sum s^2)^2 / sum s^4."""
    import numpy as np

    update, before = accumulated_update(checkpoint, model, layer)
    power = np.linalg.svd(update, compute_uv=False) ** 2
    return {"rank": int(np.sum(power > RANK_THRESHOLD ** 2 * power[0])),
            "effective": float(power.sum() ** 2 / max((power ** 2).sum(), 1e-300)), "largest": float(power[0] ** 0.5),
            "relative_rms": float(np.sqrt(power.sum() / np.sum(before ** 2)))}


def measure(run, model, layer):
    last = [loss for _, loss in run["losses"][-LAST_STEPS:]]
    before, after = run["heldout"][0][1], run["heldout"][-1][1]
    train_after = sum(last) / len(last)
    return {"heldout_before": before, "heldout_after": after, "train_after": train_after,
            # The untrained model has seen neither set: its held-out loss is where the train loss starts from, too.
            "train_decrease": before - train_after, "heldout_decrease": before - after,
            "tokens_per_second": run["result"]["tokens_per_second"], "peak_rss_bytes": run["result"]["peak_rss_bytes"],
            "unloads": len(run["unloads"]), "update": update_rank(run["directory"] / "checkpoint.safetensors", model, layer)}


def ratio(figures, key):
    return figures["plora"][key] / figures["lora"][key] if figures["lora"][key] > 0 else None


def print_table(figures, ability, layer):
    rows = [(f"train loss, last {LAST_STEPS} steps", "{train_after:.3f}"),
            ("held-out loss before", "{heldout_before:.3f}"), ("held-out loss after", "{heldout_after:.3f}"),
            ("unloads", "{unloads}"),
            ("rank of the update *", "{update[rank]}"), ("effective rank *", "{update[effective]:.1f}"),
            ("peak memory, MB", "{mb:.0f}"), ("tokens/s", "{tokens_per_second:.0f}")]
    prepare.say("\n{:<28}{:>10}{:>10}".format("", *[LABELS[run] for run in RUNS]))
    for label, form in rows:
        cells = [form.format(mb=figures[run]["peak_rss_bytes"] / 2 ** 20, **figures[run]) for run in RUNS]
        prepare.say("{:<28}{:>10}{:>10}".format(label, *cells))
    for key, label in (("train", "learning ability, train"), ("heldout", "learning ability, held-out")):
        prepare.say("{:<28}{:>20}".format(label, "-" if ability[key] is None else f"{ability[key]:.2f}"))
    prepare.say(f"\nLoss: nats per answer token. Learning ability: loss decrease of PLoRA / loss decrease of LoRA.\n"
                f"* of all that was learnt by {layer}: singular values above {RANK_THRESHOLD:.0%} of the largest.")


def verdict(figures, ability):
    """What the figures say, in words, and why."""
    lora, plora = figures["lora"], figures["plora"]
    if ability["heldout"] is None:
        return "LoRA did not lower the held-out loss: the regime at the top of demo.py needs another learning rate."
    if ability["heldout"] >= 1.02:
        first = f"PLoRA learnt {ability['heldout'] - 1:.0%} more than LoRA of the same rank here"
    elif ability["heldout"] > 0.98:
        first = "PLoRA and LoRA learnt the same here, within 2 %"
    else:
        first = f"PLoRA learnt {1 - ability['heldout']:.0%} less than LoRA here"
    return textwrap.fill(
        f"{first}; its update has rank {plora['update']['rank']}, LoRA's {lora['update']['rank']}. This is one seed "
        "and a short run. The gain of PeriodicLoRA is a long-run effect: it shows once LoRA of the same rank has "
        "stopped improving, while within a few hundred steps an unload costs about what it frees.", 100)


# ------------------------------------------------------------------------------------------------------------- picture


def smooth(values, width):
    """Centred running mean, narrower at the ends."""
    half = width // 2
    return [sum(values[max(0, i - half):i + half + 1]) / len(values[max(0, i - half):i + half + 1])
            for i in range(len(values))]


def draw(runs, figures, options, title, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    colours = {"lora": "#3b6fb6", "plora": "#d1602b"}
    plt.rcParams.update({"font.size": 10.5, "axes.spines.top": False, "axes.spines.right": False,
                         "axes.edgecolor": "#666666", "xtick.color": "#444444", "ytick.color": "#444444",
                         "font.family": "DejaVu Sans"})
    figure, axes = plt.subplots(figsize=(9, 5.2), dpi=150, layout="constrained")
    width = max(3, options["steps"] // 12 | 1)
    unloads = [step for step, _ in runs["plora"]["unloads"]]
    for step in unloads:
        axes.axvline(step, color=colours["plora"], linewidth=0.8, alpha=0.28, zorder=0)
    curves = {}
    for name, run in runs.items():
        steps, losses = zip(*run["losses"], strict=True)
        curves[name] = smooth(losses, width)
        axes.plot(steps, losses, ".", color=colours[name], markersize=3, alpha=0.22, zorder=1)
        axes.plot(steps, curves[name], color=colours[name], linewidth=2.2, zorder=3)
        axes.plot(*zip(*run["heldout"], strict=True), "o--", color=colours[name], markersize=7, linewidth=1,
                  markerfacecolor="white", markeredgewidth=1.8, clip_on=False, zorder=4)
    handles = [Line2D([], [], color=colours[name], linewidth=2.2,
                      label=f"{LABELS[name]}: held-out {figures[name]['heldout_after']:.3f} at the end")
               for name in runs]
    handles += [Line2D([], [], color="#555555", linewidth=2.2, label=f"train loss, mean of {width} steps"),
                Line2D([], [], color="#555555", linestyle="--", linewidth=1, marker="o", markersize=7,
                       markerfacecolor="white", markeredgewidth=1.8,
                       label=f"held-out loss, {options['heldout-examples']} examples")]
    if unloads:
        handles.append(Line2D([], [], color=colours["plora"], linewidth=1.2, alpha=0.5, label="PLoRA unloads into W"))
    axes.legend(handles=handles, frameon=True, framealpha=0.95, edgecolor="#dddddd", loc="upper right")
    shown = [value for curve in curves.values() for value in curve]
    shown += [value for run in runs.values() for _, value in run["heldout"]]
    low, high = min(shown), max(shown)
    axes.set_ylim(max(0.0, low - 0.12 * (high - low)), high + 0.18 * (high - low))
    axes.set_xlim(0, options["steps"] * 1.01)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(f"optimizer step ({options['batch']} examples each)")
    axes.set_ylabel("loss, nats per answer token")
    axes.set_title(f"{title} on word problems, rank {options['rank']} on every linear layer", loc="left", fontsize=12)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    scratch = path.with_suffix(f".{os.getpid()}.png")
    figure.savefig(scratch)
    os.replace(scratch, path)
    plt.close(figure)


# ------------------------------------------------------------------------------------------------------------- samples


def indent(text):
    return "\n".join("    " + line for line in text.strip().splitlines()) or "    (nothing)"


def read_sample(directory, data, chat):
    """The first sampled question with its reference and the answers before and after; None if the run made none."""
    path = directory / "samples.jsonl"
    pairs = read_lines(data / "heldout.text.jsonl")
    questions = {tuple(chat.ids(chat.prompt(pair["prompt"]))): pair["prompt"] for pair in pairs}
    sample = {}
    for record in read_lines(path) if path.is_file() else []:
        if record["when"] in sample:
            continue
        sample.setdefault("question", questions.get(tuple(record["prompt"])) or chat.text(record["prompt"]))
        sample.setdefault("reference", chat.text(record["reference"]))
        sample[record["when"]] = chat.text(record["generated"])
    return sample if {"before", "after"} <= set(sample) else None


def print_samples(samples):
    if not samples:
        return
    first = next(iter(samples.values()))
    prepare.say(f"\nA held-out question\n{indent(first['question'])}\nReference\n{indent(first['reference'])}\n"
                f"Before training\n{indent(first['before'])}")
    for run, sample in samples.items():
        prepare.say(f"After {LABELS[run]}\n{indent(sample['after'])}")


def check_merged(directory, base):
    """Loads the merged model with transformers where it is installed, else compares its tensors; returns how."""
    problem = model_problem(directory, base)
    if problem:
        raise prepare.PrepareError(f"the merged model {directory} cannot be used: {problem}")
    if importlib.util.find_spec("transformers") and importlib.util.find_spec("torch"):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        AutoTokenizer.from_pretrained(directory)
        AutoModelForCausalLM.from_pretrained(directory)
        return "transformers loads it"
    return "names and shapes are those of the original model"


# ---------------------------------------------------------------------------------------------------------------- main


def arguments_of():
    parser = argparse.ArgumentParser(description="Compare LoRA and PLoRA of the same rank on a real model.")
    parser.add_argument("--build", type=Path, default=REPOSITORY / "build", help="where everything is made (build)")
    parser.add_argument("--model", type=Path, help="another LLaMA-family directory instead of SmolLM2-135M")
    parser.add_argument("--steps", type=int, default=COMMON["steps"], help="optimizer steps (%(default)s)")
    parser.add_argument("--threads", type=int, help="threads of the trainer (all cores)")
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error(f"--steps {arguments.steps}: at least 2")
    if arguments.model and not arguments.model.is_dir():
        parser.error(f"--model {arguments.model}: no such directory")
    return arguments


def relative(path):
    try:
        return path.resolve().relative_to(Path.cwd())
    except ValueError:
        return path


def main():
    arguments = arguments_of()
    prepare.check_modules("numpy", "tokenizers", "jinja2", "matplotlib")
    build = arguments.build
    program, demo, data = build / "finetune", build / "demo", build / "data" / "gsm"
    if not os.access(program, os.X_OK):
        raise prepare.PrepareError(f"{program} is missing: `make {relative(program)}` builds it")
    demo.mkdir(parents=True, exist_ok=True)
    model = arguments.model or build / "models" / "SmolLM2-135M-Instruct"
    if not arguments.model:
        prepare.prepare_model(model, build / "downloads")
    options = dict(COMMON, steps=arguments.steps, warmup=min(COMMON["warmup"], arguments.steps // 4))
    if arguments.threads:
        options["threads"] = arguments.threads
    if arguments.model:
        data = build / "data" / f"gsm-{hashlib.sha256(str(model.resolve()).encode()).hexdigest()[:8]}"
    prepare.prepare_gsm(model, data, build / "downloads")
    chat = prepare.Chat(model)

    runs, samples = {}, {}
    for run in RUNS:
        output = demo / run
        command = command_of(program, run, model, data, output, chat.end_id(), options)
        stamp = fingerprint(command, model, data)
        if not (output / "result.json").is_file():
            prepare.check_space(demo, DISK_NEEDED)
        try:
            train(run, command, stamp, output)
        except Interrupted:
            return 130
        runs[run] = {**read_run(output), "directory": output}
        sample = read_sample(output, data, chat)
        if sample:
            samples[run] = sample

    layers = prepare.read_json(model / "config.json")["num_hidden_layers"]
    layer = f"model.layers.{layers // 2}.mlp.down_proj"
    figures = {run: measure(runs[run], model, layer) for run in RUNS}
    ability = {"train": ratio(figures, "train_decrease"), "heldout": ratio(figures, "heldout_decrease")}
    merged = demo / "plora" / "model"
    loads = check_merged(merged, model)
    draw(runs, figures, options, model.name, demo / "loss.png")
    prepare.write_json(demo / "result.json", {
        "options": options, "runs": {run: {"options": RUNS[run], **figures[run]} for run in RUNS},
        "learning_ability": ability, "layer": layer, "rank_threshold": RANK_THRESHOLD, "samples": samples,
        "merged_model": str(merged)})

    print_table(figures, ability, layer)
    prepare.say(f"\n{verdict(figures, ability)}")
    print_samples(samples)
    prepare.say(f"\nFigures       {relative(demo / 'result.json')}\nLoss curves   {relative(demo / 'loss.png')}\n"
                f"Merged model  {relative(merged)}: {loads};\n"
                f"              AutoModelForCausalLM.from_pretrained(\"{relative(merged)}\") in Python")
    return 0


if __name__ == "__main__":
    sys.exit(prepare.guarded(main))
