#!/usr/bin/env python3
"""The benchmark: `make bench` measures the library against the limits of this machine, and with PEERS=1 also against
torch + PEFT in the same call. Prints a table and writes BUILD/bench.json. How and why: docs/benchmarks.md.

Every figure is a ratio of medians of measurements that took turns: A B A B ... One side waits while the other measures.

    our side     bench_machine (limits), bench_layer, bench_batch, bench_unload, finetune --bench: run anew for every round;
                 bench_ledger, bench_export: once, and three times
    peers        peers.py, one process for each variant, which stays and answers one request after the other
    parts        bench_library.py, bench_training.py, bench_serve.py; sides.py runs both sides, limits.py knows the machine
"""

import argparse
import json
import os
import time

import bench_library
import bench_serve
import bench_training
import random_model
from figures import Report
from limits import Limits, describe_machine
from sides import Peer, heading, output_of

PARTS = ("machine", "layer", "optimizer", "ledger", "export", "train", "unload", "torch", "serve", "batch")


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
    measures = {**bench_library.MEASURES, **bench_training.MEASURES, "serve": measure_serving}
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
