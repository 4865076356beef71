# SPDX-License-Identifier: Apache-2.0
"""The plots of docs/study.md, one PNG for each claim whose runs are there."""

import statistics

import plan
from results import name_of, rate

COLOURS = {"lora": "#3b6fb6", "plora": "#d1602b", "momentum": "#2a9d6f", "restarts": "#8a8a8a", "full": "#222222"}
ROUNDINGS = ("nearest", "stochastic", "residual")


def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({
        "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e6e6e6",
        "axes.axisbelow": True, "figure.dpi": 130, "legend.frameon": False, "axes.titlesize": 11, "axes.titlelocation": "left",
    })  # fmt: skip
    return plt


def curve(row, column):
    """(steps, mean over the seeds) of a column of held_out."""
    points = [[point for point in record["held_out"] if point[column] is not None] for record in row.records]
    length = min(map(len, points))
    return [point[0] for point in points[0][:length]], [statistics.mean(p[i][column] for p in points) for i in range(length)]


def style(settings):
    dashed = settings["method"] == "restarts"
    dotted = settings["kind"] == "smollm" and settings["rank"] > 1
    line = "--" if dashed else ":" if dotted else "-"
    return {"color": COLOURS[settings["method"]], "linestyle": line, "linewidth": 1.8}


def claim1(report, plt):
    rows = [row for row in report.find("claim1") if row]
    if not rows:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for row in rows:
        label = f"{name_of(row.settings)} ({len(row.records)} seed{'s' if len(row.records) > 1 else ''})"
        steps, exact = curve(row, 3)
        left.plot(steps, [100 * value for value in exact], marker="o", markersize=4, label=label, **style(row.settings))
        right.plot(*curve(row, 2), marker="o", markersize=4, **style(row.settings))
    left.set(xlabel="optimizer step", ylabel="exact match, % of held-out sums", title="Accuracy over the stages", ylim=(-2, 102))
    right.set(xlabel="optimizer step", ylabel="test loss, nats per digit", title="Loss", ylim=(0, None))
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncol=2)
    return figure, "Exact match and loss on sums over many unloads"


def claim2(report, plt):
    contexts = [(title, [row for row in report.context(wanted)[0] if row]) for title, wanted in plan.CONTEXTS]
    contexts = [(title, rows) for title, rows in contexts if rows]
    if not contexts:
        return None
    columns = 2 if len(contexts) == 4 else min(3, len(contexts))
    lines = -(-len(contexts) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(max(6.5, 4.6 * columns), 5.0 * lines), squeeze=False, layout="constrained")
    for place, axis in enumerate(axes.flat):
        if place >= len(contexts):
            axis.axis("off")
            continue
        title, rows = contexts[place]
        for row in rows:
            seeds = f", {len(row.records)} seeds" if len(row.records) > 1 else ""
            axis.plot(*curve(row, 2), marker="o", markersize=3.5, label=f"{name_of(row.settings)}, rate {rate(row.lr)}{seeds}",
                      **style(row.settings))  # fmt: skip
        real = rows[0].settings["kind"] == "smollm"
        axis.set(xlabel="optimizer step", ylabel=f"test loss, nats per {'answer token' if real else 'character'}", title=title)
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.45, -0.14))
    return figure, "Test loss of each method at its best rate so far, mean of its seeds"


def claim3(report, plt):
    ranks = [rank for rank in (1, 4) if any(report.find("claim3", rank=rank))]
    if not ranks:
        return None
    figure, axes = plt.subplots(1, len(ranks), figsize=(5.2 * len(ranks) + 1, 4), squeeze=False, layout="constrained")
    for axis, rank in zip(axes[0], ranks):
        for turn, lr in enumerate(sorted(plan.GRID_RATES)):
            colour = plt.get_cmap("viridis")(0.15 + 0.32 * turn)
            rows = [row for row in report.find("claim3", rank=rank) if row and row.lr == lr]
            points = sorted((row.settings["period"], row.mean("test_loss")) for row in rows if row.settings["method"] == "plora")
            lora = [row.mean("test_loss") for row in rows if row.settings["method"] == "lora"]
            if points:
                axis.plot(*zip(*points), marker="o", color=colour, label=f"PLoRA, rate {rate(lr)}")
            if lora:
                axis.axhline(lora[0], color=colour, linestyle="--", linewidth=1, label=f"LoRA, rate {rate(lr)}")
        axis.set(xscale="log", xlabel="period, steps per stage", ylabel="test loss, nats per character",
                 title=f"R = {rank}, {plan.GRID_STEPS:,} steps, one seed")  # fmt: skip
        axis.set_xticks(plan.PERIODS, list(map(str, plan.PERIODS)))
        axis.minorticks_off()
        axis.legend(fontsize=8)
    return figure, "Test loss by period, rank and rate"


def claim4(report, plt):
    rows, lora = report.forms(4000)
    others = [row for row in rows if row and row is not lora and row.ability(lora)]
    if not others:
        return None
    others.sort(key=lambda row: statistics.mean(row.ability(lora)))
    figure, axis = plt.subplots(figsize=(9, 1.4 + 0.38 * len(others)), layout="constrained")
    for place, row in enumerate(others):
        values = row.ability(lora)
        axis.barh(place, statistics.mean(values), color=COLOURS[row.settings["method"]], alpha=0.75)
        axis.plot(values, [place] * len(values), "k.", markersize=5)
    axis.axvline(1.0, color="#3b6fb6", linestyle="--", linewidth=1.2)
    axis.set_yticks(range(len(others)), [f"{name_of(row.settings)}, rate {rate(row.lr)}" for row in others], fontsize=8.5)
    axis.set(xlabel="loss decrease over that of LoRA R = 1 (dashed); dots: seeds", title="Forms of the unload, 4,000 steps")
    return figure, "What each form of the unload is worth in a long run"


def claim5(report, plt):
    rows = [row for row in report.claim5_rows() if row and row.records[0]["update"]["spectrum"]]
    if not rows:
        return None
    figure, axis = plt.subplots(figsize=(8, 4.6), layout="constrained")
    for turn, row in enumerate(rows):
        values = [value for value in row.records[0]["update"]["spectrum"] if value > 1e-3 * row.records[0]["update"]["spectrum"][0]]
        marker = "osD^vP*X"[turn % 8]
        axis.plot(range(1, len(values) + 1), values, marker=marker, markersize=4, label=name_of(row.settings),
                  **{**style(row.settings), "linewidth": 1.2})  # fmt: skip
    axis.set(yscale="log", xlabel="number of the singular value", ylabel="singular value of W after - W before",
             title=f"Accumulated update of {rows[0].records[0]['update']['layer']}, one seed, the largest 32")  # fmt: skip
    axis.legend(fontsize=8)
    return figure, "Spectrum of the accumulated update; LoRA has as many values as its rank"


def claim6(report, plt):
    rows = [row for row in report.find("claim6") if row and row.settings["method"] != "lora"]
    if not rows:
        return None
    rows.sort(key=lambda row: (row.settings["method"], ROUNDINGS.index(row.settings["rounding"])))
    figure, axis = plt.subplots(figsize=(8, 1.4 + 0.45 * len(rows)), layout="constrained")
    for place, row in enumerate(rows):
        value = row.update("captured")
        axis.barh(place, value, color=COLOURS[row.settings["method"]], alpha=0.75)
        axis.text(max(value, 0.0), place, f" {value:.3f}", va="center", fontsize=9)
    axis.axvline(1.0, color="#222222", linestyle="--", linewidth=1)
    names = [f"{name_of(row.settings)}: {row.settings['rounding']}" for row in rows]
    axis.set_yticks(range(len(rows)), names, fontsize=8.5)
    axis.set(xlabel="captured fraction of the wanted update (1 = all)", title=f"bf16 weights, {rows[0].settings['steps']:,} steps")
    return figure, "How much of the wanted update bf16 weights hold at the end"


def draw(report, directory):
    """{part: [(file name, caption)]} of the plots whose runs are there."""
    plt = pyplot()
    drawn = {}
    for part in plan.PARTS:
        made = globals()[part](report, plt)
        if made is None:
            continue
        figure, caption = made
        name = f"{part}.png"
        figure.savefig(directory / f".{name}", format="png")
        (directory / f".{name}").replace(directory / name)
        plt.close(figure)
        drawn[part] = [(name, caption)]
    return drawn
