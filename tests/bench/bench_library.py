"""The parts that measure the library's calls: a layer, a batch of many adapters, optimizer, unload, ledger, export."""

import json
import os
import statistics
import subprocess

from sides import PREFIX, RANK, Peer, heading, output_of, spread

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


MEASURES = {"layer": measure_layer, "optimizer": measure_optimizer, "ledger": measure_ledger, "export": measure_export,
            "unload": measure_unload, "batch": measure_batch}  # fmt: skip
