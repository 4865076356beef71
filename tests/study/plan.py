# SPDX-License-Identifier: Apache-2.0
"""What the study runs: a list of entries, in the order in which they are to run.

An entry is a dict of settings (train.DEFAULTS has the others) and of
    part    which claims it belongs to
    phase   earlier phases run first; within one the first rate of every entry comes before the second of any
    lr      rates to try with the first seed; the other seeds run with the one that is best by the tuning text
    seeds   of batches and adapters

A run that two entries ask for happens once: its key is made of its settings alone. A key never changes its meaning: who changes
what a setting does gives it another name.
"""

import train

PARTS = {
    "claim1": "unloading keeps the performance over many cycles", "claim2": "PLoRA against LoRA",
    "claim3": "period, rank and rate", "claim4": "forms of the unload", "claim5": "rank of the update, and memory",
    "claim6": "bf16 weights",
}  # fmt: skip
THREE = [1, 2, 3]
MIDDLE = [1e-2, 3e-2, 3e-3]  # the best rates of low ranks lie here; the likeliest first
PLORA = {"method": "plora", "period": 400}
MOMENTUM = {"method": "momentum", "momentum": 0.2, "period": 10}
RESTARTS = {"method": "restarts", "period": 400}
FULL = {"method": "full", "rank": 0}


def entry(phase, parts, lr, seeds=(1,), **settings):
    return {"phase": phase, "parts": parts.split(), "lr": list(lr), "seeds": list(seeds), "settings": settings}


def core(phase, later, parts, rates, **common):
    """The five methods of claim 2: a grid of rates in one phase, the other seeds in a later one."""
    made = []
    for method, lr in [({"method": "lora"}, rates), (PLORA, rates), (MOMENTUM, rates), (RESTARTS, rates), (FULL, [1e-3, 3e-3, 3e-4])]:
        made.append({**entry(phase, parts, lr, THREE, **{**method, **common}), "later": later})
    return made


def entries():
    plan = core(0, 2, "claim2 claim5", MIDDLE)
    # An easy task, 40 stages; loss and accuracy just before and after every fourth unload.
    easy = {"task": "sum", "rank": 4, "steps": 4000}
    plan += [
        entry(1, "claim1", [1e-2], THREE, **easy, method="plora", period=100, watch=400),
        entry(1, "claim1", [1e-2], THREE, **easy, **MOMENTUM, watch=400),
        entry(1, "claim1", [1e-2], THREE, **easy),
        entry(1, "claim1", [1e-3], THREE, **{**easy, **FULL}),
    ]
    forms = [
        {**PLORA, "reinit": "gradient"}, {**PLORA, "b_ratio": 4.0}, {**PLORA, "warmup": 0},
        {"method": "momentum", "momentum": 0.9, "period": 400}, {"method": "momentum", "momentum": 0.5, "period": 100},
        {"method": "momentum", "momentum": 0.5, "period": 10}, {"method": "momentum", "momentum": 0.1, "period": 10},
        {**MOMENTUM, "moments": "reset"}, {**MOMENTUM, "b_ratio": 4.0}, {**MOMENTUM, "warmup": 0},
    ]  # fmt: skip
    plan += [entry(3, "claim4", MIDDLE[:2], THREE, **form) for form in forms]
    short = [{}, {**PLORA, "period": 100}, {**PLORA, "period": 100, "reinit": "gradient"}, {**PLORA, "period": 100, "b_ratio": 4.0},
             MOMENTUM, {**MOMENTUM, "momentum": 0.5}, {**MOMENTUM, "momentum": 0.1}]  # fmt: skip
    plan += [entry(3, "claim4", MIDDLE[:2], THREE, **form, steps=800) for form in short]
    for rank in (1, 4):
        for lr in MIDDLE:
            plan.append(entry(4, "claim3", [lr], rank=rank, steps=2000))
            for period in (50, 100, 200, 400, 1000):
                plan.append(entry(4, "claim3", [lr], rank=rank, steps=2000, method="plora", period=period))
    plan += [entry(5, "claim5", [1e-2, 3e-3], THREE, rank=rank) for rank in (4, 10, 40)]
    plan += [entry(5, "claim5", [1e-2, 3e-3], THREE, **PLORA, rank=4)]
    for rounding in ("nearest", "residual", "stochastic"):
        bf16 = {"dtype": "bf16", "rounding": rounding, "steps": 2000}
        plan.append(entry(6, "claim6", [1e-2], THREE, **{**PLORA, "period": 100}, **bf16))
        plan.append(entry(6, "claim6", [1e-2], THREE, **MOMENTUM, **bf16))
    plan.append(entry(6, "claim6", [1e-2], THREE, dtype="bf16", steps=2000))
    for other in ({"model": "gpt2"}, {"model": "opt"}, {"task": "code"}):
        plan += core(7, 7, "claim2", MIDDLE[:2], **other)
    real = {"kind": "smollm", "model": "SmolLM2-135M", "steps": 400, "warmup": 5}
    plan += [
        entry(8, "claim2", [1e-2, 3e-3], THREE, **real),
        entry(8, "claim2", [1e-2, 3e-3], THREE, **real, **MOMENTUM),
        entry(8, "claim2", [1e-2, 3e-3], THREE, **{**real, **PLORA, "period": 100}),
        entry(8, "claim2", [3e-3], **real, rank=8),
    ]
    return plan


def key_of(settings):
    full = {**train.DEFAULTS, **settings}
    return " ".join(f"{name}={full[name]}" for name in train.DEFAULTS)


def grid(item):
    return [{**item["settings"], "lr": lr, "seed": item["seeds"][0]} for lr in item["lr"]]


def best(item, done):
    """The record of the best rate by the tuning text; None while a rate is missing."""
    records = [done.get(key_of(settings)) for settings in grid(item)]
    if not records or any(record is None for record in records):
        return None
    whole = [record for record in records if record["tune_loss"] is not None]
    return min(whole, key=lambda record: record["tune_loss"]) if whole else records[0]


def seeds_of(item, done):
    """[settings] of the seeds after the first, at the best rate; None while that is unknown."""
    chosen = best(item, done)
    if chosen is None:
        return None
    return [{**item["settings"], "lr": chosen["settings"]["lr"], "seed": seed} for seed in item["seeds"][1:]]


def schedule(done, part=None):
    """(runs that can start, in order: (key, settings); cost of all that is missing; how many that is; number in all)."""
    ready, seen, cost, missing, total = [], set(), 0.0, 0, 0

    def want(settings, order):
        nonlocal cost, missing, total
        key = key_of(settings)
        if key in seen:
            return
        seen.add(key)
        total += 1
        if key not in done:
            missing += 1
            cost += cost_of(settings)
            ready.append((order, key, settings))

    for place, item in enumerate(entries()):
        if part and part not in item["parts"]:
            continue
        for turn, settings in enumerate(grid(item)):
            want(settings, (item["phase"], turn, place))
        others = seeds_of(item, done)
        if others is None:
            count = len(item["seeds"]) - 1
            total, missing, cost = total + count, missing + count, cost + count * cost_of(item["settings"])
            continue
        for turn, settings in enumerate(others):
            want(settings, (item.get("later", item["phase"]), 10 + turn, place))
    return [run[1:] for run in sorted(ready, key=lambda run: run[0])], cost, missing, total


def cost_of(settings):
    """In steps of a small fp32 model."""
    full = {**train.DEFAULTS, **settings}
    each = 100.0 if full["kind"] == "smollm" else 3.0 if full["dtype"] == "bf16" else 1.0
    return full["steps"] * each
