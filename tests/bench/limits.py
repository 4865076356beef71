"""The machine, and what it can do: the fastest products, multiply-adds, memory."""

import os
import platform
import statistics

from sides import spread

PEAK_FLOP = 1e9  # products smaller than this do not count for the peak


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
