# SPDX-License-Identifier: Apache-2.0
"""What the finished runs say about an entry of the plan: the best rate so far, the seeds that ran with it, means and spreads."""

import statistics

import plan


class Row:
    """One entry: a method in a setting. Empty while none of its runs is finished; partial() says what is missing."""

    def __init__(self, item, done):
        self.item, self.settings = item, {**plan.DEFAULTS, **item["settings"]}
        self.grid = [done[key] for key in map(plan.key_of, plan.grid(item)) if key in done]
        self.diverged = [record for record in self.grid if record["tune_loss"] is None]
        whole = [record for record in self.grid if record["tune_loss"] is not None]
        first = min(whole, key=lambda record: record["tune_loss"]) if whole else None
        self.lr = first["settings"]["lr"] if first else None
        self.records = [first] if first else []
        self.missing_rates = len(item["lr"]) - len(self.grid)
        if first and not self.missing_rates:
            for settings in plan.seeds_of(item, done):
                record = done.get(plan.key_of(settings))
                if record is not None and record["tune_loss"] is not None:
                    self.records.append(record)

    def __bool__(self):
        return bool(self.records)

    def values(self, name):
        return [record[name] for record in self.records if record.get(name) is not None]

    def mean(self, name):
        values = self.values(name)
        return statistics.mean(values) if values else None

    def base(self):
        return statistics.mean(record["held_out"][0][2] for record in self.records)

    def decrease(self, name="test_loss"):
        """Of the loss, by seed. The untrained model has seen neither text: its test loss is where the train loss starts, too."""
        return {r["settings"]["seed"]: r["held_out"][0][2] - r[name] for r in self.records if r.get(name) is not None}

    def ability(self, other, name="test_loss"):
        """Loss decrease over that of `other`, for the seeds that both have."""
        mine, theirs = self.decrease(name), other.decrease(name) if other else {}
        return [mine[seed] / theirs[seed] for seed in sorted(mine) if theirs.get(seed, 0.0) > 0.0]

    def update(self, name):
        values = [record["update"][name] for record in self.records if record["update"] and record["update"][name] is not None]
        return statistics.mean(values) if values else None

    def unfinished(self):
        return bool(self.missing_rates) or len(self.records) < len(self.item["seeds"])

    def partial(self):
        seeds = len(self.item["seeds"])
        notes = []
        if self.missing_rates:
            notes.append(f"{len(self.grid)} of {len(self.item['lr'])} rates")
        if len(self.records) < seeds:
            notes.append(f"{len(self.records)} of {seeds} seeds")
        if self.diverged:
            notes.append(f"diverged at rate {', '.join(rate(r['settings']['lr']) for r in self.diverged)}")
        if self and not self.missing_rates and len(self.item["lr"]) > 2 and self.lr in (min(self.item["lr"]), max(self.item["lr"])):
            notes.append("best rate at the edge of its grid")
        return "; ".join(notes)


def rate(value):
    return f"{value:.0e}".replace("e-0", "e-")


def number(value, form=".3f"):
    return "-" if value is None else f"{value:{form}}"


def spread(values, form=".3f"):
    """Mean, and in brackets the range where there is one."""
    if not values:
        return "-"
    text = f"{statistics.mean(values):{form}}"
    return text if len(values) == 1 else f"{text} ({min(values):{form}} - {max(values):{form}})"


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows]) + "\n"


def name_of(settings):
    """A method in words."""
    method = settings["method"]
    if method == "full":
        return "full fine-tuning"
    rank = f"R = {settings['rank']}"
    if method == "lora":
        return f"LoRA {rank}"
    if method == "restarts":
        return f"LoRA {rank}, restarts every {settings['period']}, no unload"
    moments = {"default": "", "keep": ", moments kept", "reset": ", moments reset"}[settings["moments"]]
    extra = moments + (f", rate of B x {settings['b_ratio']:g}" if settings["b_ratio"] != 1.0 else "")
    extra += ", A along the gradient" if settings["reinit"] == "gradient" else ""
    extra += ", no warm-up" if not settings["warmup"] else ""
    if method == "plora":
        return f"PLoRA {rank}, every {settings['period']}{extra}"
    return f"momentum unload {rank}, m = {settings['momentum']:g} every {settings['period']}{extra}"
