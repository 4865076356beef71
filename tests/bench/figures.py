"""The figures of the benchmark: each a value with its target and what it was made of; the table of them."""


class Report:
    """The figures, by key; a figure with several parts is as good as the part that is farthest from its target."""

    def __init__(self):
        self.figures = {}

    def add(self, key, what, value, target=None, part="", most=False, ours=None, other=None):
        figure = self.figures.setdefault(key, {"what": what, "parts": {}})
        figure["parts"][part] = {
            "value": value,
            "target": target,
            "target_is": "at most" if most else "at least",
            "ours": ours,
            "other": other,
        }
        if target is not None:
            figure["parts"][part]["reached"] = value <= target if most else value >= target

    def finish(self):
        for figure in self.figures.values():
            judged = [part for part in figure["parts"].values() if part["target"] is not None]
            judged.sort(
                key=lambda p: p["target"] / p["value"]
                if p["target_is"] == "at most" and p["value"] > 0
                else p["value"] / p["target"]
            )
            worst = judged[0] if judged else next(iter(figure["parts"].values()))
            figure.update({key: worst[key] for key in ("value", "target", "target_is", "reached") if key in worst})
        return self.figures

    def lines(self):
        lines = [("figure", "", "value", "to reach", "", "ours", "other")]
        for key, figure in self.figures.items():
            for name, part in figure["parts"].items():
                sign = "<=" if part["target_is"] == "at most" else ">="
                target = "" if part["target"] is None else f"{sign} {part['target']:g}"
                verdict = {True: "reached", False: "missed", None: ""}[part.get("reached")]
                lines.append(
                    (key, name, f"{part['value']:.3f}", target, verdict, show(part["ours"]), show(part["other"]))
                )
        return lines

    def table(self):
        lines = self.lines()
        widths = [max(len(line[i]) for line in lines) for i in range(7)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        )

    def markdown(self):
        header, *lines = self.lines()
        return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *lines)) + "\n"


def show(measured):
    """Seconds as ms with their quartiles, bytes as MB, rates with their unit."""
    if measured is None:
        return ""
    if "median" not in measured:
        return " ".join(f"{value:.4g} {unit}" for unit, value in measured.items())
    return f"{1e3 * measured['median']:.4g} ms [{1e3 * measured['q1']:.4g}, {1e3 * measured['q3']:.4g}]"
