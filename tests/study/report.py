# SPDX-License-Identifier: Apache-2.0
"""Writes docs/study.md and its plots from the finished runs, with nothing in it that was not measured.

Whatever a sentence claims is computed here from the records; what has not run says so.
"""

import os
import statistics

import conclusions
import plan
import plots
from results import Row, name_of, number, rate, spread, table

NOT_YET = "*not run yet*"

class Report:
    def __init__(self, done):
        self.done = done
        self.rows = [Row(item, done) for item in plan.entries()]

    def find(self, part, **wanted):
        return [row for row in self.rows if part in row.item["parts"]
                and all(row.settings[name] == value for name, value in wanted.items())]  # fmt: skip

    def one(self, part, **wanted):
        found = self.find(part, **wanted)
        return found[0] if found else None

    # ------------------------------------------------------------------------------------------------------- claim 1

    def claim1(self):
        lines = []
        for row in self.find("claim1"):
            if not row:
                lines.append([name_of(row.settings), *["-"] * 5, NOT_YET])
                continue
            jumps = [abs(after[0] - before[0]) for record in row.records for _, before, after in record["watched"]]
            falls = [before[1] - after[1] for record in row.records for _, before, after in record["watched"]]
            best = [max(point[3] for point in record["held_out"]) for record in row.records]
            lines.append([
                name_of(row.settings), len(row.records), spread(row.values("test_loss")), spread(best, ".1%"),
                spread(row.values("exact"), ".1%"), f"{max(jumps):.1e}; {max(falls):.1%}" if jumps else "-",
                row.partial(),
            ])  # fmt: skip
        text = table(["method", "seeds", "test loss", "best exact match on the way", "exact match at the end",
                      "largest change at an unload: loss; fall of exact match", ""], lines)  # fmt: skip
        plora = self.one("claim1", method="plora")
        if plora:
            stages = plora.settings["steps"] // plora.settings["period"]
            lost = max(max(p[3] for p in r["held_out"]) - r["exact"] for r in plora.records)
            text += (f"\nOver {stages} stages PLoRA ends {lost:.1%} below the best accuracy it had on the way "
                     f"({'one seed' if len(plora.records) == 1 else f'the worst of {len(plora.records)} seeds'}).\n")  # fmt: skip
        return text

    # ------------------------------------------------------------------------------------------------------- claim 2

    def context(self, wanted):
        rows = [row for row in self.find("claim2", **wanted) if row.settings["rank"] in (0, 1) or wanted.get("kind")]
        lora = next((row for row in rows if row.settings["method"] == "lora" and row.settings["rank"] == 1), None)
        full = next((row for row in rows if row.settings["method"] == "full"), None)
        return rows, lora, full

    def claim2(self):
        text = ""
        for title, wanted in plan.CONTEXTS:
            rows, lora, full = self.context(wanted)
            done = [row for row in rows if row]
            if not done:
                text += f"### {title}\n\n{NOT_YET}\n\n"
                continue
            real = "kind" in wanted
            lines = []
            for row in rows:
                if not row:
                    lines.append([name_of(row.settings), *["-"] * (8 if real else 7), NOT_YET])
                    continue
                line = [name_of(row.settings), rate(row.lr), spread(row.values("train_loss")), spread(row.values("test_loss")),
                        spread(row.ability(lora, "train_loss"), ".2f"), spread(row.ability(lora), ".2f"),
                        spread(row.ability(full), ".2f"), number(row.update("effective"), ".1f")]  # fmt: skip
                lines.append(line + ([spread(row.values("exact"), ".1%")] if real else []) + [row.partial()])
            head = ["method", "rate", "train loss", "test loss", "x LoRA, train", "x LoRA, test", "x full, test",
                    "effective rank"] + (["exact match"] if real else []) + [""]  # fmt: skip
            text += f"### {title}\n\nTest loss before: {done[0].base():.3f}.\n\n{table(head, lines)}\n"
            text += self.claim2_words(rows, lora)
        return text

    @staticmethod
    def claim2_words(rows, lora):
        words = []
        for method, label in (("plora", "PLoRA"), ("momentum", "The momentum unload"), ("restarts", "LoRA with restarts alone")):
            row = next((row for row in rows if row.settings["method"] == method), None)
            values = row.ability(lora) if row and lora else []
            if not values:
                continue
            mean = statistics.mean(values)
            verdict = "more than" if min(values) > 1.02 else "less than" if max(values) < 0.98 else "about as much as"
            ready = not row.unfinished() and not lora.unfinished()
            words.append(f"{label} learnt {verdict} LoRA of the same rank ({mean:.2f} times its loss decrease on the test text"
                         f"{'' if len(values) > 1 else ', one seed'}{'' if ready else ', grid or seeds unfinished'}).")  # fmt: skip
        return " ".join(words) + ("\n\n" if words else "")

    # ------------------------------------------------------------------------------------------------------- claim 3

    def claim3(self):
        text = ""
        for rank in (1, 4):
            rows = self.find("claim3", rank=rank)
            if not any(row.grid for row in rows):
                text += f"### R = {rank}\n\n{NOT_YET}\n\n"
                continue
            cells, lora = conclusions.grid_of(self, rank)
            lines = []
            for period in (0, *plan.PERIODS):
                line = [f"PLoRA, period {period}" if period else "LoRA"]
                for lr in plan.GRID_RATES:
                    row = next(row for row in rows if row.settings["period"] == period and row.item["lr"] == [lr])
                    ability = row.ability(lora) if lora else []
                    line.append("diverged" if row.grid and not row else "-" if not row else f"{row.mean('test_loss'):.3f}"
                                + (f" ({ability[0]:.2f})" if ability else ""))  # fmt: skip
                lines.append(line)
            text += f"### R = {rank}\n\n{table(['test loss', *[f'rate {rate(lr)}' for lr in plan.GRID_RATES]], lines)}\n"
        return text + f"In brackets: loss decrease over that of LoRA at its best rate. {plan.GRID_STEPS:,} steps, one seed.\n"

    # ------------------------------------------------------------------------------------------------------- claim 4

    def forms(self, steps):
        """(rows of claim 4 in runs of so many steps, LoRA first where it has run; LoRA or None)."""
        rows = [row for row in self.find("claim4", steps=steps)]
        if steps == 4000:
            known = {"kind": "toy", "model": "small-llama", "task": "gsm", "steps": 4000, "rank": 1}
            rows = [self.one("claim2", method=method, **known) for method in ("lora", "plora", "momentum")] + rows
        return rows, next((row for row in rows if row and row.settings["method"] == "lora"), None)

    def claim4(self):
        text = ""
        for steps in (4000, plan.SHORT):
            rows, lora = self.forms(steps)
            text += f"### {steps:,} steps\n\n"
            if not any(rows):
                text += f"{NOT_YET}\n\n"
                continue
            lines = [[name_of(row.settings), rate(row.lr), spread(row.values("test_loss")), spread(row.ability(lora), ".2f"),
                      "{} of {}".format(*conclusions.ahead(row, lora)) if lora and row is not lora else "-",
                      row.partial()] if row else [name_of(row.settings), "-", "-", "-", "-", NOT_YET] for row in rows]  # fmt: skip
            text += table(["form", "rate", "test loss", "x LoRA, test", "evaluations below LoRA", ""], lines) + "\n"
        return text

    # ------------------------------------------------------------------------------------------------------- claim 5

    def claim5_rows(self):
        rows = [row for row in self.find("claim5", task="gsm") if row.settings["method"] != "restarts"]
        return sorted(rows, key=lambda row: (row.settings["rank"] or 1000, row.settings["method"]))

    def claim5(self):
        lines = []
        for row in self.claim5_rows():
            if not row:
                lines.append([name_of(row.settings), *["-"] * 7, NOT_YET])
                continue
            record = row.records[0]
            memory = [point[4] for point in record["held_out"]]
            lines.append([
                name_of(row.settings), rate(row.lr), f"{record['trained']:,}", spread(row.values("test_loss")),
                number(row.update("effective"), ".1f"), number(row.update("rank"), ".1f"),
                f"{memory[0] / 1e6:.2f}; {memory[-1] / 1e6:.2f}", f"{record['peak_rss'] / 1e6:.0f}", row.partial(),
            ])  # fmt: skip
        head = ["method", "rate", "trained numbers", "test loss", "effective rank", "rank at 1 %",
                "MB of training state: first step; last", "peak MB of the process", ""]  # fmt: skip
        return table(head, lines)

    # ------------------------------------------------------------------------------------------------------- claim 6

    def claim6(self):
        lines = []
        for row in self.find("claim6"):
            rounding = "-" if row.settings["method"] == "lora" else row.settings["rounding"]
            if not row:
                lines.append([name_of(row.settings), rounding, "-", "-", NOT_YET])
                continue
            lines.append([name_of(row.settings), rounding, spread(row.values("test_loss")), number(row.update("captured")),
                          row.partial()])  # fmt: skip
        return table(["method", "rounding", "test loss", "captured fraction", ""], lines)


def state(done):
    _, cost, missing, total = plan.schedule(done)
    seconds = [r["cpu_seconds"] / plan.cost_of(r["settings"]) for r in done.values() if r["cpu_seconds"]]
    text = f"{total - missing} of {total} runs are finished."
    if missing:
        text += " The rest is marked *not run yet* or named in the last column; nothing is filled in."
        if seconds:
            text += (f" At the {1e3 * statistics.median(seconds):.0f} ms of processor time a step that the finished ones took, what is "
                     f"missing takes about {cost * statistics.median(seconds) / 3600:.1f} hours of one core.")  # fmt: skip
    bases = {(r["settings"]["model"], r["base"]) for r in done.values()}
    models = {model for model, _ in bases}
    if len(bases) > len(models):
        text += " The runs of one model do not all start from the same pre-trained weights: they come from several machines."
    return text


def write(done, docs):
    report = Report(done)
    directory = docs / "study"
    directory.mkdir(parents=True, exist_ok=True)
    drawn = plots.draw(report, directory)
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "study.md.in"), encoding="utf-8") as file:
        text = file.read()
    text = text.replace("@STATE@", state(done)).replace("@SHORT@", conclusions.in_short(report))
    for part in plan.PARTS:
        body = getattr(report, part)()
        for name, caption in drawn.get(part, []):
            body += f"\n![{caption}](study/{name})\n"
        text = text.replace(f"@{part.upper()}@", body.rstrip())
    scratch = docs / ".study.md"
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(docs / "study.md")
    print(f"{docs / 'study.md'}: {len(done)} runs, {sum(map(len, drawn.values()))} plots")
