#!/usr/bin/env python3
"""The server under load: tokens a second without adapters, with 1 and with 8, and the time to the first token, at 16 clients.

    bench_serve.py --build build        prints JSON; bench.py calls measure()

A model of SmolLM2-135M's shape and adapters of R = 16 on all linear layers, with random weights. The three loads take turns, on one server:
16 clients at once, each with a prompt of 64 tokens and 48 new ones, streamed. wrk adds what HTTP alone costs, and completions of one token.
"""

import argparse
import http.client
import json
import os
import re
import shutil
import statistics
import struct
import subprocess
import threading
import time

import numpy as np
import random_model

CLIENTS, PROMPT, NEW, RANK, ADAPTERS = 16, 64, 48, 16, 8
LOADS = {"base": 0, "1 adapter": 1, "8 adapters": 8}
LUA = """wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
local n = 0
function request()
  n = n + 1
  return wrk.format(nil, nil, nil, string.format('{"model": "a%d", "prompt": [5, 6, 7, 8], "max_tokens": 1, "temperature": 0}', n % 8))
end
"""


def write_tokenizer(path):
    """A token for each byte, no merges, as prompts here are ids; the other ids have a text as well, so that each new token is an event."""
    letters = [b for b in range(256) if 0x21 <= b <= 0x7E or 0xA1 <= b <= 0xFF and b != 0xAD]
    others = [b for b in range(256) if b not in letters]
    vocabulary = {chr(b): b for b in letters} | {chr(0x100 + i): b for i, b in enumerate(others)}
    vocabulary |= {f"t{i}": i for i in range(256, random_model.CONFIG["vocab_size"])}
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"model": {"type": "BPE", "vocab": vocabulary, "merges": []}, "pre_tokenizer": step, "decoder": step}, file)


def write_adapter(directory, seed):
    os.makedirs(directory, exist_ok=True)
    generator, header, parts, offset = np.random.default_rng(seed), {}, [], 0
    for name, shape in random_model.tensors(random_model.CONFIG):
        if not name.endswith("_proj.weight"):
            continue
        for side, size in (("A", (RANK, shape[1])), ("B", (shape[0], RANK))):
            values = (0.02 * generator.standard_normal(size)).astype("<f4")
            header[f"base_model.model.{name.removesuffix('.weight')}.lora_{side}.weight"] = {
                "dtype": "F32", "shape": list(size), "data_offsets": [offset, offset + values.nbytes]}
            offset += values.nbytes
            parts.append(values.tobytes())
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(os.path.join(directory, "adapter_model.safetensors"), "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded + b"".join(parts))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    with open(os.path.join(directory, "adapter_config.json"), "w", encoding="utf-8") as file:
        json.dump({"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": targets, "bias": "none"}, file)


def prepare(build):
    """(model directory, adapters' directory)"""
    source, model = random_model.write(os.path.join(build, "bench", "model")), os.path.join(build, "bench", "serve", "model")
    adapters = os.path.join(build, "bench", "serve", "adapters")
    shutil.rmtree(model, ignore_errors=True)
    os.makedirs(model)
    for name in ("config.json", "model.safetensors"):
        os.symlink(os.path.abspath(os.path.join(source, name)), os.path.join(model, name))
    write_tokenizer(os.path.join(model, "tokenizer.json"))
    for i in range(ADAPTERS):
        write_adapter(os.path.join(adapters, f"a{i}"), i)
    return model, adapters


class Server:
    def __init__(self, program, model, adapters):
        self.process = subprocess.Popen([program, "--model", model, "--adapters", adapters, "--port", "0", "--slots", str(CLIENTS)],
                                        stdout=subprocess.PIPE, text=True)
        self.port = int(re.search(r":(\d+)$", self.process.stdout.readline()).group(1))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()
        self.process.stdout.close()


def stream(port, body):
    """(seconds to the first event, seconds to the end, new tokens)"""
    begin, first, tokens = time.monotonic(), None, 0
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    reply = connection.getresponse()
    if reply.status != 200:
        raise RuntimeError(reply.read().decode())
    for line in reply:
        if line.startswith(b"data: {"):
            first = first or time.monotonic() - begin
            usage = json.loads(line[6:]).get("usage")
            tokens = usage["completion_tokens"] if usage else tokens
    connection.close()
    return first, time.monotonic() - begin, tokens


def load(port, adapters, seed):
    """(tokens a second, the times to the first token)"""
    generator, results, failures = np.random.default_rng(seed), [], []
    prompts = generator.integers(256, size=(CLIENTS, PROMPT)).tolist()

    def client(i):
        try:
            results.append(stream(port, {
                "model": f"a{i % adapters}" if adapters else "model", "prompt": prompts[i], "max_tokens": NEW, "temperature": 0,
                "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}))
        except Exception as error:  # of a thread: told by the caller
            failures.append(error)

    threads = [threading.Thread(target=client, args=(i,)) for i in range(CLIENTS)]
    begin = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return sum(tokens for _, _, tokens in results) / (time.monotonic() - begin), [first for first, _, _ in results]


def wrk(port, path, script, build):
    """Requests a second, and the latency of the slowest 1 %, as wrk says them; None without wrk."""
    if not shutil.which("wrk"):
        return None
    command = ["wrk", "-t2", f"-c{CLIENTS}", "-d5s", "--latency"]
    if script:
        name = os.path.join(build, "bench", "serve", "completions.lua")
        with open(name, "w", encoding="utf-8") as file:
            file.write(script)
        command += ["-s", name]
    text = subprocess.run([*command, f"http://127.0.0.1:{port}{path}"], stdout=subprocess.PIPE, text=True, check=True).stdout
    if "Non-2xx" in text:
        raise RuntimeError(text)
    return {"requests/s": float(re.search(r"Requests/sec:\s+(\S+)", text).group(1)), "p99": re.search(r"99%\s+(\S+)", text).group(1)}


def measure(build, rounds=5):
    model, adapters = prepare(build)
    rates, firsts = {name: [] for name in LOADS}, {name: [] for name in LOADS}
    with Server(os.path.join(build, "serve"), model, adapters) as server:
        for round_number in range(-1, rounds):  # round -1 compiles products and touches memory
            for name, count in LOADS.items():
                rate, first = load(server.port, count, round_number + 1)
                if round_number >= 0:
                    rates[name].append(rate)
                    firsts[name] += first
        answers = {"health": wrk(server.port, "/health", None, build), "one token": wrk(server.port, "/v1/completions", LUA, build)}
    return {"tokens/s": {name: statistics.median(values) for name, values in rates.items()},
            "first token, median s": {name: statistics.median(values) for name, values in firsts.items()},
            "first token, longest s": {name: max(values) for name, values in firsts.items()},
            "wrk": answers}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", default="build")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.build, arguments.rounds), indent=1))


if __name__ == "__main__":
    main()
