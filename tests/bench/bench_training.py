"""The parts that measure whole training steps: the trainer in C against PEFT, and plora.torch against PEFT's layers."""

import os
import statistics

import random_model
from sides import RANK, Peer, heading, output_of, spread

BATCH, TOKENS = 4, 256

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


MEASURES = {"train": measure_training, "torch": measure_torch}
