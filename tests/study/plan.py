# SPDX-License-Identifier: Apache-2.0
"""What the study runs: a list of entries, in the order in which they are to run.

An entry is a dict of settings (DEFAULTS has the others) and of
    part    which claims it belongs to
    phase   earlier phases run first; within one the first rate of every entry comes before the second of any
    lr      rates to try with the first seed; the other seeds run with the one that is best by the tuning text
    seeds   of batches and adapters

A run that two entries ask for happens once: its key is made of its settings alone. A key never changes its meaning: who changes
what a setting does gives it another name.
"""

DEFAULTS = {
    "kind": "toy", "model": "small-llama", "task": "gsm", "method": "lora", "rank": 1, "lr": 1e-2, "steps": 4000, "seed": 1,
    "warmup": 20, "period": 0, "momentum": 1.0, "moments": "default", "b_ratio": 1.0, "reinit": "random", "dtype": "fp32",
    "rounding": "default", "watch": 0,
}  # fmt: skip
PARTS = {
    "claim1": "unloading keeps the performance over many cycles", "claim2": "PLoRA against LoRA",
    "claim3": "period, rank and rate", "claim4": "forms of the unload", "claim5": "rank of the update, and memory",
    "claim6": "bf16 weights",
}  # fmt: skip
THREE = [1, 2, 3]
RATES = [1e-2, 2e-2, 5e-3]  # the best rates of low ranks lie here; the likeliest first
PLORA = {"method": "plora", "period": 400}
MOMENTUM = {"method": "momentum", "momentum": 0.2, "period": 10}
RESTARTS = {"method": "restarts", "period": 400}
FULL = {"method": "full", "rank": 0}
PERIODS, GRID_RATES, GRID_STEPS = (50, 100, 200, 500), (3e-3, 1e-2, 3e-2), 2000  # of claim 3
SHORT = 800  # steps of the short runs of claim 4
REAL = {"kind": "smollm", "model": "SmolLM2-135M", "steps": 160, "warmup": 5}
REAL_PLORA = {**PLORA, "period": 40}
CONTEXTS = [  # of claim 2
    ("LLaMA-like", {"model": "small-llama", "task": "gsm", "steps": 4000}),
    ("GPT-2-like", {"model": "small-gpt2", "task": "gsm", "steps": 4000}),
    ("OPT-like", {"model": "small-opt", "task": "gsm", "steps": 4000}),
    ("LLaMA-like of 0.7 M", {"model": "llama", "task": "gsm", "steps": 4000}),
    ("SmolLM2-135M", {"kind": "smollm"}),
]  # fmt: skip


def entry(phase, parts, lr, seeds=(1,), later=None, **settings):
    """later: the phase of the seeds after the first."""
    return {"phase": phase, "later": phase if later is None else later, "parts": parts.split(), "lr": list(lr),
            "seeds": list(seeds), "settings": settings}  # fmt: skip


def entries():
    # Something of every claim first, cheap ones before; then other models and seeds. A run of SmolLM2 costs what ten others do.
    plan = [entry(0, "claim2 claim5", RATES, THREE, 1, **method) for method in ({}, PLORA, MOMENTUM)]
    plan.append(entry(0, "claim2", RATES, THREE, 1, **RESTARTS))
    plan.append(entry(0, "claim2 claim5", [1e-3, 2e-3, 5e-4], THREE, 1, **FULL))
    plan += [entry(13, "claim2", RATES[::2], THREE, 14, **{**REAL, **method}) for method in ({}, MOMENTUM, REAL_PLORA)]
    for model in ("small-gpt2", "small-opt"):
        plan += [entry(7, "claim2", RATES[:2], THREE, 10, model=model, **method) for method in ({}, PLORA, MOMENTUM)]
        plan.append(entry(7, "claim2", [1e-3, 2e-3], model=model, **FULL))
    forms = [
        {**PLORA, "reinit": "gradient"}, {**PLORA, "b_ratio": 4.0}, {**PLORA, "warmup": 0},
        {"method": "momentum", "momentum": 0.9, "period": 400}, {"method": "momentum", "momentum": 0.5, "period": 100},
        {**MOMENTUM, "moments": "reset"}, {**MOMENTUM, "b_ratio": 4.0},
    ]  # fmt: skip
    plan += [entry(5, "claim4", RATES[:2], THREE, 9, **form) for form in forms]
    brief = {**PLORA, "period": 100}
    short = [{}, brief, {**brief, "reinit": "gradient"}, {**brief, "b_ratio": 4.0}, MOMENTUM,
             {**MOMENTUM, "momentum": 0.5}, {**MOMENTUM, "momentum": 0.1}]  # fmt: skip
    plan += [entry(5, "claim4", RATES[:2], THREE, 9, **form, steps=SHORT) for form in short]
    # An easy task, 20 stages; loss and accuracy just before and just after every second unload.
    easy = {"task": "sum", "rank": 4, "steps": 2000}
    plan += [
        entry(2, "claim1", [1e-2], THREE, **easy, method="plora", period=100, watch=200),
        entry(2, "claim1", [1e-2], THREE, **easy, **MOMENTUM, watch=200),
        entry(2, "claim1", [1e-2], THREE, **easy),
        entry(2, "claim1", [1e-3], THREE, **{**easy, **FULL}),
    ]
    plan += [entry(8, "claim5", RATES[::2], THREE, rank=10), entry(8, "claim5", RATES[::2], THREE, rank=4),
             entry(8, "claim5", RATES[::2], THREE, **PLORA, rank=4), entry(8, "claim5", RATES[::2], rank=40)]  # fmt: skip
    for rounding in ("nearest", "residual", "stochastic"):
        bf16 = {"dtype": "bf16", "rounding": rounding, "steps": 1000}
        seeds = THREE if rounding != "stochastic" else THREE[:1]
        plan += [entry(3, "claim6", [1e-2], seeds, **method, **bf16) for method in (brief, MOMENTUM)]
    plan.append(entry(3, "claim6", [1e-2], THREE, dtype="bf16", steps=1000))
    for rank in (1, 4):
        for lr in GRID_RATES:
            plan.append(entry(4, "claim3", [lr], rank=rank, steps=GRID_STEPS))
            plan += [entry(4, "claim3", [lr], rank=rank, steps=GRID_STEPS, method="plora", period=period) for period in PERIODS]
    plan.append(entry(15, "claim2", [5e-3], **REAL, rank=8))
    wider = [1e-2, 3e-2, 3e-3]
    plan += [entry(12, "claim2", wider, model="llama", **method) for method in ({}, PLORA, MOMENTUM, RESTARTS)]
    plan.append(entry(12, "claim2", [1e-3, 3e-3], model="llama", **FULL))
    return plan


def key_of(settings):
    full = {**DEFAULTS, **settings}
    return " ".join(f"{name}={full[name]}" for name in DEFAULTS)


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
            want(settings, (item["later"], 10 + turn, place))
    return [run[1:] for run in sorted(ready, key=lambda run: run[0])], cost, missing, total


def cost_of(settings):
    """In steps of a small fp32 model."""
    full = {**DEFAULTS, **settings}
    each = 240.0 if full["kind"] == "smollm" else 1.3 if full["dtype"] == "bf16" else 1.0
    return full["steps"] * each * (1.7 if full["model"] == "llama" else 1.0)
