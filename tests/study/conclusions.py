# SPDX-License-Identifier: Apache-2.0
"""What the finished runs say about each claim, in sentences: whether it reproduces, by how much, over how many seeds.

A difference counts when every seed shows it, by more than MARGIN of the loss decrease. What has not run is called open.
"""

import statistics

import plan
from results import name_of, rate

MARGIN = 0.02
OPEN = "open, not run yet"


def listed(parts):
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def times(values):
    """1.19 (1.17 - 1.21, 3 seeds)"""
    text = f"{statistics.mean(values):.2f}"
    return f"{text} ({min(values):.2f} - {max(values):.2f}, {len(values)} seeds)" if len(values) > 1 else f"{text} (one seed)"


def sign(values):
    """1: more in every seed, -1: less in every seed, 0: neither."""
    return 1 if min(values) > 1.0 + MARGIN else -1 if max(values) < 1.0 - MARGIN else 0


def so_far(verdict, rows, whole=True):
    """A verdict over runs of which some are missing is said to be one."""
    if all(len(row.records) < 2 for row in rows):
        return f"in one seed: {verdict}"
    return verdict if whole and not any(row.unfinished() for row in rows) else f"{verdict} so far"


def models(report):
    """[(title, {method: Row}, Row of LoRA R = 1, Row of full fine-tuning or None)] of the models on which LoRA has run."""
    for title, wanted in plan.CONTEXTS:
        rows, lora, full = report.context(wanted)
        if lora:
            yield title, {row.settings["method"]: row for row in rows if row and row.settings["rank"] <= 1}, lora, full


def claim1(report):
    rows = {row.settings["method"]: row for row in report.find("claim1") if row}
    if "plora" not in rows:
        return OPEN
    row = rows["plora"]
    stages = row.settings["steps"] // row.settings["period"]
    lost = max(max(point[3] for point in record["held_out"]) - record["exact"] for record in row.records)
    falls = [before[1] - after[1] for record in row.records for _, before, after in record["watched"]]
    ends = [f"{name_of(other.settings)}: {statistics.mean(other.values('exact')):.1%}" for other in rows.values()]
    verdict = "reproduces" if lost <= 0.02 and max(falls) <= 0.005 else "does not reproduce"
    return (f"{so_far(verdict, [row])}. Over {stages} stages PLoRA ends at most {max(lost, 0.0):.1%} below its best accuracy on the "
            f"way, and no unload cost more than {max(max(falls), 0.0):.1%}. Exact match at the end: {'; '.join(ends)}.")  # fmt: skip


def claim2(report):
    words, signs, highest, used = [], [], 0.0, []
    for title, rows, lora, _ in models(report):
        values = rows["plora"].ability(lora) if "plora" in rows else []
        if values:
            used += [rows["plora"], lora]
            words.append(f"{title} {times(values)}")
            signs.append(sign(values))
            highest = max(highest, *values)
    if not words:
        return OPEN
    verdict = ("reproduces" if min(signs) > 0 else "does not reproduce" if max(signs) <= 0
               else "reproduces on some models only")  # fmt: skip
    whole = len(words) == len(plan.CONTEXTS)
    return (f"{so_far(verdict, used, whole)}. PLoRA's loss decrease on the test text over LoRA's: {listed(words)}. The most of any "
            f"seed is {highest:.2f}; the paper reports up to 1.8.")  # fmt: skip


def restarts(report):
    found = [(title, rows["restarts"], lora) for title, rows, lora, _ in models(report) if "restarts" in rows]
    found = [(title, row, lora) for title, row, lora in found if row.ability(lora)]
    if not found:
        return OPEN
    gains = [sign(row.ability(lora)) > 0 for _, row, lora in found]
    verdict = so_far("in part" if any(gains) else "no", [row for part in found for row in part[1:]])
    words = listed([f"{title} {times(row.ability(lora))}" for title, row, lora in found])
    return f"{verdict}. Loss decrease of LoRA with PLoRA's restarts but no unload over plain LoRA's: {words}."


def grid_of(report, rank):
    """({(period, rate): loss decrease over LoRA's, None where it diverged} of what has run, LoRA at its best rate or None)."""
    rows = report.find("claim3", rank=rank)
    loras = [row for row in rows if row.settings["method"] == "lora"]
    lora = min((row for row in loras if row), key=lambda row: row.mean("tune_loss"), default=None)
    if lora is None or not all(row.grid for row in loras):
        return {}, None
    cells = {}
    for row in rows:
        if row.settings["method"] == "plora" and row.grid:
            values = row.ability(lora)
            cells[row.settings["period"], row.item["lr"][0]] = values[0] if values else None
    return cells, lora


def claim3(report):
    """The rule of thumb: of the cells (rank, rate, period), which gain, which lose, which period is best most often."""
    best, gains, losses, pairs = {}, {}, {}, 0
    tops = []
    for rank in (1, 4):
        cells, lora = grid_of(report, rank)
        if lora is None or len(cells) < len(plan.PERIODS) * len(plan.GRID_RATES):
            return OPEN if not cells else "open, unfinished"
        for lr in plan.GRID_RATES:
            pairs += 1
            at = {period: cells[period, lr] for period in plan.PERIODS}
            best.setdefault(max(at, key=lambda period: at[period] or 0.0), []).append((rank, lr))
            for period, ability in at.items():
                ability = ability or 0.0  # diverged
                counts = gains if ability > 1.0 + MARGIN else losses if ability < 1.0 - MARGIN else {}
                counts.setdefault(period, []).append((rank, lr))
        top = max((ability or 0.0, period, lr) for (period, lr), ability in cells.items())
        tops.append(f"R = {rank}: period {top[1]}, rate {rate(top[2])}, {top[0]:.2f} times LoRA")
    usual = max(best, key=lambda period: len(best[period]))
    counted = [f"{period} steps: {len(gains.get(period, []))} gain, {len(losses.get(period, []))} lose" for period in plan.PERIODS]
    return (f"a period of {usual} steps is best in {len(best[usual])} of the {pairs} pairs of rank and rate. Of those pairs, against LoRA "
            f"at its best rate: {'; '.join(counted)}. Best of each rank: {'; '.join(tops)}.")  # fmt: skip


def forms(report, steps):
    """[(ability by seed, Row)] of claim 4, the best mean first."""
    rows, lora = report.forms(steps)
    found = [(row.ability(lora), row) for row in rows if row and row is not lora and lora]
    return sorted([pair for pair in found if pair[0]], key=lambda pair: -statistics.mean(pair[0])), lora


def ahead(row, lora):
    """(evaluations, of all seeds, at which the row's test loss is below LoRA's; number of evaluations)."""
    theirs = {record["settings"]["seed"]: record["held_out"] for record in lora.records}
    pairs = [(mine[2], other[2]) for record in row.records
             for mine, other in zip(record["held_out"][1:], theirs.get(record["settings"]["seed"], [])[1:])]  # fmt: skip
    return sum(mine < other for mine, other in pairs), len(pairs)


def claim4(report):
    text = []
    for steps in (4000, plan.SHORT):
        found, _ = forms(report, steps)
        if len(found) > 1:
            values, row = found[0]
            gain = sum(sign(pair[0]) > 0 for pair in found)
            loss = sum(sign(pair[0]) < 0 for pair in found)
            text.append(f"In {steps:,} steps {name_of(row.settings)} is best, {times(values)} times LoRA; of {len(found)} forms {gain} "
                        f"learn more than LoRA and {loss} less")  # fmt: skip
    return ". ".join(text) + "." if text else OPEN


def default(report):
    """The form that never lost to LoRA where both have run, if there is one."""
    text = []
    for method, label in (("momentum", "the momentum unload, m = 0.2 every 10 steps,"), ("plora", "the full unload")):
        signs, means, won, all_of = [], [], 0, 0
        for _, rows, lora, _ in models(report):
            values = rows[method].ability(lora) if method in rows else []
            if values:
                part, number = ahead(rows[method], lora)
                won, all_of = won + part, all_of + number
                signs.append(sign(values))
                means.append(statistics.mean(values))
        if signs:
            words = (f"{label} learns more than LoRA on {sum(s > 0 for s in signs)} and less on {sum(s < 0 for s in signs)} of "
                     f"{len(signs)} models, and its test loss is below LoRA's at {won} of {all_of} evaluations on the way")  # fmt: skip
            text.append((min(signs), won / all_of, statistics.mean(means), words))
    if not text:
        return OPEN
    text.sort(reverse=True)
    first = text[0]
    advice = ("so far the best choice is the first of these" if first[0] >= 0 else
              "none is safe everywhere: LoRA first, and an unload only once its loss stands still")  # fmt: skip
    joined = "; ".join(part[-1] for part in text)
    return f"{joined[0].upper()}{joined[1:]}: {advice}."


def claim5(report):
    rows = {(row.settings["method"], row.settings["rank"]): row for row in report.claim5_rows() if row}
    plora, high, full = rows.get(("plora", 1)), rows.get(("lora", 10)), rows.get(("full", 0))
    if not plora:
        return OPEN
    lora = rows.get(("lora", 1))
    words = [f"after {plora.settings['steps'] // plora.settings['period']} stages of R = 1 the update has effective rank "
             f"{plora.update('effective'):.1f}"]  # fmt: skip
    if lora:
        words[0] += f", that of LoRA R = 1 {lora.update('effective'):.1f}"
    if full:
        words[0] += f", that of full fine-tuning {full.update('effective'):.1f}"
    for other, label in ((high, "LoRA R = 10, of the rank that PLoRA R = 1 reaches,"), (full, "full fine-tuning")):
        values = plora.ability(other) if other else []
        if values:
            words.append(f"its loss decrease is {times(values)} times that of {label.rstrip(',')}")
    memory = [[point[4] for point in record["held_out"]] for record in plora.records]
    grown = any(max(points) > points[1] for points in memory)
    words.append("the memory of training " + ("grows with the stages" if grown else "is the same in every stage"))
    return "; ".join(words)[:1].upper() + "; ".join(words)[1:] + "."


def claim6(report):
    parts = []
    for method, label in (("plora", "full unload"), ("momentum", "momentum unload")):
        rows = {row.settings["rounding"]: row for row in report.find("claim6", method=method) if row}
        if "nearest" in rows and "residual" in rows:
            loss = {name: statistics.mean(row.values("test_loss")) for name, row in rows.items()}
            held = {name: row.update("captured") for name, row in rows.items()}
            parts.append(f"{label}: nearest captures {held['nearest']:.3f} of the update (test loss {loss['nearest']:.3f}), residual "
                         f"{held['residual']:.3f} ({loss['residual']:.3f})")  # fmt: skip
    return "; ".join(parts).capitalize() + "." if parts else OPEN


def in_short(report):
    lines = [
        ("Unloading keeps what was learnt", claim1(report)), ("PLoRA learns more than LoRA of the same rank", claim2(report)),
        ("Is it the restarts alone?", restarts(report)), ("Rule of thumb for period, rank and rate", claim3(report)),
        ("Forms of the unload", claim4(report)), ("What to use", default(report)), ("Rank of the update", claim5(report)),
        ("bf16 weights", claim6(report)),
    ]  # fmt: skip
    return "\n".join(f"- **{title}{'' if title.endswith('?') else ':'}** {text}" for title, text in lines)
