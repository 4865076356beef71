#!/usr/bin/env python3
"""The benchmark: `make bench` measures the library against the limits of this machine, and with PEERS=1 also against
torch + PEFT in the same call. Prints a table and writes BUILD/bench.json. How and why: docs/benchmarks.md.

Every figure is a ratio of medians of measurements that took turns: A B A B ... One side waits while the other measures.

    our side     bench_machine (limits), bench_layer, bench_batch, bench_unload, finetune --bench: run anew for every round;
                 bench_ledger, bench_export: once, and three times
    peers        peers.py, one process for each variant, which stays and answers one request after the other
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time

import bench_serve
import random_model

HERE = os.path.dirname(os.path.abspath(__file__))
HUGE = str(1 << 34)
KEEP_HEAP = {"MALLOC_MMAP_THRESHOLD_": HUGE, "MALLOC_TRIM_THRESHOLD_": HUGE}  # glibc gives no memory back
PREFIX = shlex.split(os.environ.get("BENCH_PREFIX", ""))  # of every measured process
BATCH, TOKENS, RANK = 4, 256, 16
PARTS = ("machine", "layer", "optimizer", "ledger", "export", "train", "unload", "torch", "serve", "batch")
PEAK_FLOP = 1e9  # products smaller than this do not count for the peak


def heading(text):
    print(f"-- {text}", file=sys.stderr, flush=True)


def spread(values):
    """Median and quartiles; every measured quantity is stored in this form."""
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {
        "median": statistics.median(values),
        "q1": quartiles[0],
        "q3": quartiles[2],
        "least": min(values),
        "count": len(values),
    }


def output_of(*command):
    result = subprocess.run([*PREFIX, *command], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout)


def environment_of_plora(build):
    """What lets a peer import our Python package, with the library of this build."""
    package = os.path.join(HERE, "..", "..", "bindings", "python")
    return {"PLORA_LIBRARY": os.path.abspath(os.path.join(build, "libplora.so")), "PYTHONPATH": os.path.abspath(package)}


class Peer:
    """One variant of peers.py, which waits on its standard input between requests."""

    def __init__(self, python, *arguments, keep_heap=True, build=None):
        environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
        environment.update(KEEP_HEAP if keep_heap else {}, HF_HUB_OFFLINE="1")
        environment.update(environment_of_plora(build) if build else {})
        command = [*PREFIX, python, os.path.join(HERE, "peers.py"), *arguments]
        self.log = tempfile.TemporaryFile(mode="w+")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment
        )
        self.read()

    def read(self):
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": "ended without an answer"}
        if "error" in answer:
            self.process.wait()
            self.log.seek(0)
            raise RuntimeError(f"peers.py: {answer['error']}\n{self.log.read()[-2000:]}")
        return answer

    def ask(self, op, **request):
        self.process.stdin.write(json.dumps({"op": op, **request}) + "\n")
        self.process.stdin.flush()
        return self.read()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.log.close()


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


# --------------------------------------------------------------------------------------------------------- the machine


def describe_machine():
    model, flags = platform.processor(), set()
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                model = value.strip()
            elif name.strip() == "flags":
                flags = set(value.split())
    wanted = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")
    return {
        "cpu": model,
        "flags": [flag for flag in wanted if flag in flags],
        "cpus": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
        "load_before": os.getloadavg()[0],
    }


class Limits:
    """What bench_machine found, over all its runs."""

    def __init__(self, runs):
        self.rates, self.seconds = {}, {}
        for run in runs:
            for form in run["products"]:
                key = (form["dtype"], form["m"], form["n"], form["k"], form["transposed"], form["shared"])
                self.seconds.setdefault(key, []).extend(form["seconds"])
        for (dtype, m, n, k, transposed, _), seconds in self.seconds.items():
            key, rate = (dtype, m, n, k, transposed), 2.0 * m * n * k / statistics.median(seconds)
            self.rates[key] = max(rate, self.rates.get(key, 0.0))
        self.runs = runs

    def peak(self, dtype):
        return max(
            rate for (of, m, n, k, _), rate in self.rates.items() if of == dtype and 2.0 * m * n * k >= PEAK_FLOP
        )

    def multiply_adds(self):
        seconds = [second for run in self.runs for second in run["multiply_adds"]["seconds"]]
        return self.runs[0]["multiply_adds"]["flop"] / statistics.median(seconds)

    def memory(self, kind):
        rates = {}
        for run in self.runs:
            for size in run[kind]:
                rates.setdefault(size["bytes"], []).extend(2 * size["bytes"] / second for second in size["seconds"])
        return {str(size): statistics.median(values) for size, values in rates.items()}

    def backbone_seconds(self, dtype, config, tokens):
        """The products of backbone and head, forward and for the input's gradient, each at its own shape's rate."""
        hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
        keys = config["num_key_value_heads"] * config["head_dim"]
        layers = [(hidden, hidden, 2), (keys, hidden, 2), (inner, hidden, 2), (hidden, inner, 1)]
        total = 0.0
        for rows, columns, count in layers:
            forward = self.rates[(dtype, 1024, rows, columns, 1)]
            backward = self.rates[(dtype, 1024, columns, rows, 0)]
            total += (
                count * config["num_hidden_layers"] * 2.0 * tokens * rows * columns * (1 / forward + 1 / backward)
            )
        forward, backward = (
            self.rates[(dtype, 256, vocabulary, hidden, 1)],
            self.rates[(dtype, 256, hidden, vocabulary, 0)],
        )
        return total + 2.0 * tokens * vocabulary * hidden * (1 / forward + 1 / backward)

    def summary(self):
        return {
            "product_fp32_flops": self.peak("fp32"),
            "product_bf16_flops": self.peak("bf16"),
            "multiply_add_fp32_flops": self.multiply_adds(),
            "copy_bytes_per_second": self.memory("copy"),
            "scale_bytes_per_second": self.memory("scale"),
            "products": [
                {
                    "dtype": dtype,
                    "m": m,
                    "n": n,
                    "k": k,
                    "transposed": transposed,
                    "shared": shared,
                    "seconds": spread(seconds),
                    "flops": 2.0 * m * n * k / statistics.median(seconds),
                }
                for (dtype, m, n, k, transposed, shared), seconds in self.seconds.items()
            ],
        }


# ---------------------------------------------------------------------------------------------------- layer, optimizer


def measure_layer(bench, report):
    heading("one layer, 1536 x 576, 1024 tokens, R = 16")
    ours = {dtype: {"base": [], "adapter": []} for dtype in ("fp32", "bf16")}
    theirs = {dtype: {"base": [], "adapter": []} for dtype in ("fp32", "bf16")}
    shape = {"rows": 1536, "columns": 576, "rank": RANK, "tokens": 1024}
    peer = Peer(bench.peers, "merge") if bench.peers else None
    for round_number in range(5):
        answer = output_of(bench.program("bench_layer"), "11")
        for dtype, sides in ours.items():
            for side, seconds in sides.items():
                seconds.extend(answer[dtype][side])
        for dtype in bench.peer_dtypes:
            sides = theirs[dtype]
            if round_number == 0:
                peer.ask("layer", repeats=3, dtype=dtype, **shape)
            answer = peer.ask("layer", repeats=11, dtype=dtype, **shape)
            for side, seconds in sides.items():
                seconds.extend(answer[side])
    for dtype, target in (("fp32", 0.085), ("bf16", 0.10)):
        for name, sides in (("", ours[dtype]), ("peer", theirs[dtype])):
            if not sides["base"]:
                continue
            base, adapter = spread(sides["base"]), spread(sides["adapter"])
            report.add(
                f"layer_overhead_{dtype}",
                "time with an adapter over the time without, minus 1",
                adapter["median"] / base["median"] - 1,
                None if name else target,
                part=name,
                most=True,
                ours=None if name else adapter,
                other=adapter if name else base,
            )
    if peer:
        peer.__exit__()


# SmolLM2-135M's query and gate, and those of a 7B model; tokens of a decode step and of a prefill.
BATCH_SHAPES = ((576, 576), (1536, 576), (4096, 4096), (11008, 4096))


def measure_batch(bench, report):
    """The low-rank part of a batch beside its base product. On PEFT's side the base is taken off the time of the whole."""
    heading("many adapters in one batch, R = 16")
    peer = Peer(bench.peers, "merge") if bench.peers else None
    for rows, columns in BATCH_SHAPES:
        for tokens in (256, 1024):
            label = f"{rows}x{columns}_{tokens}"
            answer = output_of(bench.program("bench_batch"), "11", str(rows), str(columns), str(tokens), str(RANK))
            for dtype in ("fp32", "bf16"):
                ours = {name: spread(seconds) for name, seconds in answer[dtype].items()}
                base, one, many = (ours[name]["median"] for name in ("base", "delta_1", "delta_64"))
                for count in (1, 8, 64):
                    report.add(
                        f"batch_{label}_{count}_{dtype}",
                        f"low-rank part of {count} adapters over the base product",
                        ours[f"delta_{count}"]["median"] / base,
                        ours=ours[f"delta_{count}"],
                        other=ours["base"],
                    )
                report.add(
                    f"batch_{label}_64_over_1_{dtype}",
                    "64 adapters over one adapter",
                    many / one,
                    1.3 if tokens == 1024 else None,
                    most=True,
                    ours=ours["delta_64"],
                    other=ours["delta_1"],
                )
                if dtype not in bench.peer_dtypes:
                    continue
                theirs = peer.ask(
                    "batch", rows=rows, columns=columns, rank=RANK, tokens=tokens, adapters=64, prefill=tokens > 256,
                    dtype=dtype, repeats=11,
                )
                plain = statistics.median(theirs["base"])
                for name, target in (("each", 5.0), ("mixed", 3.0)):
                    report.add(
                        f"batch_{label}_peft_{name}_{dtype}",
                        f"PEFT's {'call for each adapter' if name == 'each' else 'mixed batch'} of 64, base off, over ours",
                        (statistics.median(theirs[name]) - plain) / many,
                        target,
                        ours=ours["delta_64"],
                        other=spread(theirs[name]),
                    )
    if peer:
        peer.__exit__()
    answer = output_of(bench.program("bench_batch"), "stall", "5")
    report.add(
        "replace_stall_ms",
        f"longest round of a reader, {answer['replaced']} replacements meanwhile",
        answer["longest_us"] / 1e3,
        1.0,
        most=True,
        ours=answer,
    )


def measure_optimizer(bench, report):
    heading("optimizer, 5 M parameters")
    scale, step = [], []
    for _ in range(5):
        answer = output_of(bench.program("bench_unload"), "optimizer", "9", "5000000")
        scale += answer["scale"]
        step += answer["step"]
    rate = 2 * answer["scaled_bytes"] / statistics.median(scale)
    limit = 28 * answer["count"] / rate  # parameters and moments read and written, gradients read
    report.add(
        "optimizer_share_of_limit",
        "28 bytes a parameter at the rate of scaling in place, over the step's time",
        limit / statistics.median(step),
        0.8,
        ours=spread(step),
        other={"GB/s": rate / 1e9},
    )


# -------------------------------------------------------------------------------------------------------------- unload


# To nearest unless something else is said.
ROUNDINGS = ("fp32", "bf16", "bf16 stochastic", "bf16 residual")


def unload_once(bench, into, repeats, rows, columns, rank, dtype):
    answer = output_of(
        bench.program("bench_unload"), "unload", str(repeats), str(rows), str(columns), str(rank), *dtype.split()
    )
    for form in ("scale", "unload", "report"):
        into.setdefault((rows, columns, rank, dtype), {}).setdefault(form, []).extend(answer[form])


def add_unload_limits(ours, limits, report, bench):
    bench.measurements["unload"] = []
    for dtype in ROUNDINGS:
        for (rows, columns, rank, of), times in ours.items():
            if of != dtype:
                continue
            scale, unload = spread(times["scale"]), spread(times["unload"])
            products = 2.0 * rank * rows * columns / (limits.multiply_adds() or limits.peak("fp32"))
            limit = max(scale["median"], products)
            report.add(
                f"unload_{dtype.replace(' ', '_')}_share_of_limit",
                "scaling W (and its residual) in place or 2 R N K FLOP at the multiply-add peak, the larger, over the unload's time",
                limit / unload["median"],
                0.8 if " " not in dtype else 0.75 if rank <= 16 else None,
                part=f"{rows}x{columns} R={rank}",
                ours=unload,
                other={"ms scale": 1e3 * scale["median"], "ms products": 1e3 * products},
            )
            bench.measurements["unload"].append(
                {
                    "rows": rows,
                    "columns": columns,
                    "rank": rank,
                    "dtype": dtype,
                    "scale": scale,
                    "unload": unload,
                    "unload_with_report": spread(times["report"]),
                    "products_seconds": products,
                }
            )


def measure_unload(bench, report):
    heading("unload, 4096 x 4096 and 11008 x 4096")
    ours, merges, additions, memory = {}, {}, {}, {}
    peers = (
        {name: Peer(bench.peers, "merge", keep_heap=name == "tuned") for name in ("stock", "tuned")}
        if bench.peers
        else {}
    )
    rounds = 7
    for dtype in ROUNDINGS:
        for rank in (8, 16, 64):
            shape = {"rows": 4096, "columns": 4096, "rank": rank, "dtype": dtype}
            for round_number in range(-1 if peers else 0, rounds):  # round -1 warms the peers up
                if round_number >= 0:
                    unload_once(bench, ours, 3, **shape)
                for name, peer in peers.items():
                    if rank == 8 and " " not in dtype:
                        answer = peer.ask("merge", repeats=3, **shape)
                        memory[(dtype, name)] = answer["peak_rss_bytes"]
                        if round_number >= 0:
                            merges.setdefault((dtype, name), []).extend(answer["seconds"])
                if dtype in bench.peer_dtypes:
                    answer = peers["tuned"].ask("addmm", repeats=5, **shape)
                    if round_number >= 0:
                        additions.setdefault((dtype, rank), []).extend(answer["seconds"])
            for peer in peers.values():
                peer.ask("clear")
            unload_once(bench, ours, 9, 11008, 4096, rank, dtype)
    for peer in peers.values():
        peer.__exit__()
    add_unload_limits(ours, bench.limits, report, bench)
    bench.measurements["peak_rss_bytes_of_merging"] = {" ".join(key): value for key, value in memory.items()}
    for (dtype, name), seconds in merges.items():
        other, mine = spread(seconds), spread(ours[(4096, 4096, 8, dtype)]["unload"])
        report.add(
            "unload_vs_peft",
            "PEFT's merge_adapter over our unload, 4096 x 4096, R = 8",
            other["median"] / mine["median"],
            10 if name == "stock" else 4,
            part=f"{dtype} {name}",
            ours=mine,
            other=other,
        )
    for (dtype, rank), seconds in additions.items():
        other, mine = spread(seconds), spread(ours[(4096, 4096, rank, dtype)]["unload"])
        target = 1.4 if rank == 8 else 1.0 if dtype == "fp32" else None
        report.add(
            "unload_vs_addmm",
            "torch.addmm_ in place over our unload, 4096 x 4096",
            other["median"] / mine["median"],
            target,
            part=f"{dtype} R={rank}",
            ours=mine,
            other=other,
        )


    lines = subprocess.run([*PREFIX, bench.program("bench_kernels"), "5"], stdout=subprocess.PIPE, text=True, check=True)
    bench.measurements["kernels"] = [json.loads(line) for line in lines.stdout.splitlines()]


# -------------------------------------------------------------------------------------------------------------- ledger


def measure_ledger(bench, report):
    heading("ledger: an unload of all layers of SmolLM2-135M, and of eight of 4096 x 4096")
    folder = os.path.join(bench.build, "bench")
    bench.measurements["ledger"] = {}
    for shape in ("smollm2", "wide"):
        answer = output_of(bench.program("bench_ledger"), "21", "8", folder, shape)
        plain = answer["plain"]
        for form in ("memory", "file", "synced"):
            # Each with the plain unload just before it: what the machine does besides is the same for both.
            shares = [with_ledger / without - 1 for with_ledger, without in zip(answer[form], plain, strict=True)]
            report.add(
                "ledger_append_share",
                "an unload with a ledger over the same without, minus 1; the file is not synced unless it says so",
                statistics.median(shares),
                0.05 if form == "file" else None,
                part=f"{shape} {form}",
                most=True,
                ours=spread(answer[form]),
                other=spread(plain),
            )
        bench.measurements["ledger"][shape] = {
            "record_bytes": answer["record_bytes"],
            "open_seconds": answer["open"],
            **{form: spread(answer[form]) for form in ("plain", "memory", "file", "synced")},
        }


def measure_export(bench, report):
    heading("export: 32 stages of R = 8, all layers of SmolLM2-135M")
    folder = os.path.join(bench.build, "bench")
    answers = [output_of(bench.program("bench_export"), folder, "32", "8") for _ in range(3)]
    for form in ("exact", "truncated", "gguf"):
        seconds = spread([answer[form] for answer in answers])
        report.add(
            "export_seconds",
            "plora_ledger_export() of 32 stages of R = 8, 210 weights; truncated to rank 32, and the same as GGUF",
            seconds["median"],
            10,
            part=form,
            most=True,
            ours=seconds,
        )
    bench.measurements["export"] = answers


# ------------------------------------------------------------------------------------------------------------ training


def train_ours(bench, dtype, frozen):
    return output_of(
        os.path.join(bench.build, "finetune"),
        "--model",
        bench.model,
        "--bench",
        "2",
        "--bench-tokens",
        str(TOKENS),
        "--batch",
        str(BATCH),
        "--rank",
        str(RANK),
        "--dtype",
        dtype,
        *(["--frozen"] if frozen else []),
    )


def measure_training_of(bench, dtype, rounds):
    """Seconds of steps and peak memory, by variant: ours and its frozen form, and PEFT by the dtype of its adapters."""
    heading(f"training steps in {dtype}, {BATCH} x {TOKENS} tokens")
    adapters = ("fp32", "bf16") if dtype == "bf16" else ("fp32",)
    config = os.path.join(bench.model, "config.json")
    peers = (
        {
            f"peft_{of}": Peer(
                bench.peers,
                "train",
                "--config",
                config,
                "--dtype",
                dtype,
                "--adapters",
                of,
                "--rank",
                str(RANK),
                "--batch",
                str(BATCH),
                "--tokens",
                str(TOKENS),
            )
            for of in adapters
        }
        if dtype in bench.peer_dtypes
        else {}
    )
    seconds, memory, flop = {}, {}, None
    for peer in peers.values():
        peer.ask("train", steps=2)
    for _ in range(rounds):
        for name, frozen in (("ours", False), ("frozen", True)):
            answer = train_ours(bench, dtype, frozen)
            seconds.setdefault(name, []).extend(answer["step_seconds"])
            memory[name] = max(memory.get(name, 0), answer["peak_rss_bytes"])
            flop = flop or answer["flop_per_step"]
        for name, peer in peers.items():
            answer = peer.ask("train", steps=2)
            seconds.setdefault(name, []).extend(answer["seconds"])
            memory[name] = answer["peak_rss_bytes"]
    for peer in peers.values():
        peer.__exit__()
    return {
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "peak_rss_bytes": memory,
        "flop_per_step": flop,
        "tokens_per_second": {name: BATCH * TOKENS / statistics.median(values) for name, values in seconds.items()},
    }


def measure_training(bench, report):
    bench.measurements["training"] = training = {dtype: measure_training_of(bench, dtype, 3) for dtype in ("fp32", "bf16")}
    for dtype, measured in training.items():
        add_training(measured, dtype, report)
        add_training_limits(measured, dtype, bench.limits, bench.config(), report)


def add_training(measured, dtype, report):
    seconds, memory, rates = measured["seconds"], measured["peak_rss_bytes"], measured["tokens_per_second"]
    peers = [name for name in seconds if name.startswith("peft")]
    if peers:
        best = max(peers, key=lambda name: rates[name])
        report.add(
            f"train_{dtype}_vs_peft",
            "tokens/s over PEFT's at its best",
            rates["ours"] / rates[best],
            1.35,
            ours={"tokens/s": rates["ours"]},
            other={"tokens/s": rates[best]},
        )
        if dtype == "bf16":
            report.add(
                "train_bf16_vs_peft_fp32_adapters",
                "tokens/s over PEFT's with fp32 adapters, as ours are",
                rates["ours"] / rates["peft_fp32"],
                2.0,
                ours={"tokens/s": rates["ours"]},
                other={"tokens/s": rates["peft_fp32"]},
            )
        report.add(
            f"train_{dtype}_rss_vs_peft",
            "peak memory over that of PEFT at its best",
            memory["ours"] / memory[best],
            0.34,
            most=True,
            ours={"MB": memory["ours"] / 1e6},
            other={"MB": memory[best] / 1e6},
        )
    report.add(
        "lora_overhead",
        "step with adapters over the frozen step, minus 1",
        seconds["ours"]["median"] / seconds["frozen"]["median"] - 1,
        0.10,
        part=dtype,
        most=True,
        ours=seconds["ours"],
        other=seconds["frozen"],
    )


def add_training_limits(measured, dtype, limits, config, report):
    flop, seconds = measured["flop_per_step"], measured["seconds"]["ours"]
    share = sum(flop.values()) / limits.peak(dtype) / seconds["median"]
    report.add(
        f"train_{dtype}_share_of_limit",
        "FLOP of the step at the peak of products, over the step's time",
        share,
        0.87 if dtype == "fp32" else 0.72,
        ours=seconds,
        other={"GFLOP/s peak": limits.peak(dtype) / 1e9},
    )
    if config == random_model.CONFIG:
        own = limits.backbone_seconds(dtype, config, BATCH * TOKENS)
        own += (flop["adapters"] + flop["attention"]) / limits.peak(dtype)
        report.add(
            f"train_{dtype}_share_of_own_shapes",
            "the same with the backbone's products at the rate of their own shapes",
            own / seconds["median"],
            ours=seconds,
            other={"ms products": 1e3 * own},
        )


# ------------------------------------------------------------------------------------------------------- plora in torch


def measure_torch_training(bench, dtype, target, report):
    """The same Hugging Face model, the same loop and fp32 adapters, with PEFT's layers and with ours, in turns."""
    heading(f"training steps in torch, {dtype}, PEFT's layers and ours")
    config = os.path.join(bench.model, "config.json")
    shape = ("--config", config, "--dtype", dtype, "--rank", str(RANK), "--batch", str(BATCH), "--tokens", str(TOKENS))
    peers = {
        name: Peer(bench.peers, "train", *shape, "--adapters", "fp32", "--layers", name, build=bench.build)
        for name in ("peft", "plora")
    }
    seconds, memory = {name: [] for name in peers}, {}
    for peer in peers.values():
        peer.ask("train", steps=2)
    for _ in range(3):
        for name, peer in peers.items():
            answer = peer.ask("train", steps=2)
            seconds[name] += answer["seconds"]
            memory[name] = answer["peak_rss_bytes"]
    for peer in peers.values():
        peer.__exit__()
    ours, theirs = spread(seconds["plora"]), spread(seconds["peft"])
    report.add(
        f"torch_step_vs_peft_{dtype}",
        "a step with PEFT's layers over one with ours, fp32 adapters in both",
        theirs["median"] / ours["median"],
        target,
        ours=ours,
        other=theirs,
    )

    def add_memory(part, peak, target=None):
        report.add(
            "torch_rss_vs_peft",
            "peak memory of the process with our layers over that with PEFT's",
            peak / memory["peft"],
            target,
            part=part,
            most=True,
            ours={"MB": peak / 1e6},
            other={"MB": memory["peft"] / 1e6},
        )

    add_memory(dtype, memory["plora"], 0.7)
    for part, options in (
        ("no adapters", ("--adapters", "none")),
        ("causal_lm_loss", ("--adapters", "fp32", "--layers", "plora", "--loss", "plora")),
    ):
        with Peer(bench.peers, "train", *shape, *options, build=bench.build) as peer:
            add_memory(f"{dtype}, {part}", peer.ask("train", steps=2)["peak_rss_bytes"])


def measure_torch_merge(bench, report):
    heading("plora.torch's unload and PEFT's merge_adapter, 4096 x 4096")
    with Peer(bench.peers, "merge", build=bench.build) as peer:
        for dtype in ("fp32", "bf16"):
            shape = {"rows": 4096, "columns": 4096, "rank": RANK, "dtype": dtype, "repeats": 3}
            ours, theirs = [], []
            for _ in range(5):
                theirs += peer.ask("merge", **shape)["seconds"]
                ours += peer.ask("unload", **shape)["seconds"]
            ours, theirs = spread(ours), spread(theirs)
            report.add(
                "merge_vs_peft",
                "PEFT's merge_adapter() over our unload, both from Python and to nearest",
                theirs["median"] / ours["median"],
                4.0,
                part=dtype,
                ours=ours,
                other=theirs,
            )


def measure_torch(bench, report):
    if not bench.peers:
        return
    for dtype, target in (("fp32", 1.10), ("bf16", 1.25)):
        if dtype in bench.peer_dtypes:
            measure_torch_training(bench, dtype, target, report)
    measure_torch_merge(bench, report)


# ---------------------------------------------------------------------------------------------------------- the server


def measure_serving(bench, report):
    heading("the server at 16 clients")
    measured = bench_serve.measure(bench.build)
    bench.measurements["serve"] = measured
    rates, first = measured["tokens/s"], measured["first token, median s"]
    for name in ("1 adapter", "8 adapters"):
        report.add("serve_rate", "tokens/s of the server with adapters / without", rates[name] / rates["base"], part=name,
                   ours={"tokens/s": rates[name]}, other={"tokens/s without": rates["base"]})
        report.add("serve_first_token", "median seconds to the first token, 16 prompts of 64 tokens at once", first[name], part=name,
                   ours={"s longest": measured["first token, longest s"][name]}, other={"s without": first["base"]})


# ---------------------------------------------------------------------------------------------------------------- main


class Bench:
    def __init__(self, args):
        self.build, self.peers = args.build, args.peers
        self.model = args.model or random_model.write(os.path.join(args.build, "bench", "model"))
        self.measurements = {}
        self.peer_dtypes = ("fp32", "bf16") if args.peers else ()

    def program(self, name):
        return os.path.join(self.build, "bench", name)

    def config(self):
        with open(os.path.join(self.model, "config.json"), encoding="utf-8") as file:
            return json.load(file)


def measure(bench, parts, report, save):
    """All parts in turn; save(machine, limits) is called after each, so that a run that is cut off leaves what it has."""
    machine, begin = describe_machine(), time.monotonic()
    heading("limits of the machine")
    runs = [output_of(bench.program("bench_machine"), "7")]
    limits = Limits(runs)
    if not runs[0]["bf16_products"]:  # then one step of torch's in bf16 takes minutes, which compares nothing
        bench.peer_dtypes = bench.peer_dtypes[:1]
    machine.update(threads=runs[0]["threads"], onednn=runs[0]["onednn"], onednn_isa=hex(runs[0]["onednn_isa"]))
    if bench.peers:
        with Peer(bench.peers, "merge") as peer:
            machine["peers"] = peer.ask("versions")
    measures = {"layer": measure_layer, "optimizer": measure_optimizer, "ledger": measure_ledger, "export": measure_export,
                "train": measure_training, "unload": measure_unload, "torch": measure_torch, "serve": measure_serving,
                "batch": measure_batch}
    for part in PARTS:
        if part not in parts and part != "machine":
            continue
        if part in ("train", "unload"):  # what they are set against is measured beside them
            heading("limits of the machine, again")
            runs.append(output_of(bench.program("bench_machine"), "7"))
            limits = bench.limits = Limits(runs)
        if part in measures:
            measures[part](bench, report)
        machine.update(load_after=os.getloadavg()[0], seconds=time.monotonic() - begin)
        save(machine, limits)
    return machine, limits


def write(path, text):
    with open(path + ".part", "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(path + ".part", path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", default="build", help="where the programs are and bench.json goes")
    parser.add_argument("--peers", help="a Python that has torch, transformers and PEFT")
    parser.add_argument("--model", help="a model directory; default: SmolLM2-135M's shape with random weights")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, comma-separated (machine is always measured)")
    args = parser.parse_args()
    parts = args.only.split(",")
    if not set(parts) <= set(PARTS):
        parser.error(f"--only: the parts are {', '.join(PARTS)}")
    bench, report = Bench(args), Report()

    def save(machine, limits):
        result = {
            "machine": machine,
            "limits": limits.summary(),
            "figures": report.finish(),
            "measurements": bench.measurements,
        }
        write(os.path.join(args.build, "bench.json"), json.dumps(result, indent=1))
        write(os.path.join(args.build, "bench.md"), report.markdown())

    machine, limits = measure(bench, parts, report, save)
    print(report.table())
    print(
        f"\n{machine['cpu']}, {machine['threads']} threads, oneDNN {machine['onednn']}; products "
        f"{limits.peak('fp32') / 1e9:.0f} GFLOP/s in fp32, {limits.peak('bf16') / 1e9:.0f} in bf16; multiply-adds "
        f"{limits.multiply_adds() / 1e9:.0f}; load {machine['load_before']:.1f} to {machine['load_after']:.1f}; "
        f"{machine['seconds']:.0f} s\n{os.path.join(args.build, 'bench.json')}"
    )


if __name__ == "__main__":
    main()
