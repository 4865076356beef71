# SPDX-License-Identifier: Apache-2.0
"""Runs what is missing of the study and writes docs/study.md: `make study`, `make study STUDY=claim3`, `make study-report`.

A finished run is one line of docs/study/runs.jsonl, appended in one write; what is there is not run again. So the study may be
killed at any time and goes on where it was, on another machine if need be; a run in progress starts over (SmolLM2's goes on
from its checkpoint). Each run is a process of its own with one thread, as many at a time as there are --workers.
"""

import argparse
import ctypes
import gc
import json
import math
import os
import signal
import statistics
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "docs" / "study" / "runs.jsonl"
PR_SET_PDEATHSIG = 1
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
SECONDS_PER_STEP = 0.02  # of a small model on one quiet core of this project's machine; used until a run was timed


def say(text):
    print(text, flush=True)


def read_runs(path=RUNS):
    """{key: record}; a last line that a kill cut short is no record."""
    done = {}
    if path.exists():
        for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
            if not line:
                continue
            try:
                record = json.loads(line)
                done[record["key"]] = record
            except ValueError:
                say(f"{path}:{number}: not a whole line, left out")
    return done


def append_run(record, path=RUNS):
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(record, separators=(",", ":"), allow_nan=False).encode() + b"\n"
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = b"\n" + line  # behind what a kill cut short
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def duration(seconds):
    minutes = int(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def finite(value):
    """JSON has no NaN and no infinity: None."""
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Runner:
    def __init__(self, build, workers, part):
        self.build, self.workers, self.part = build, workers, part
        self.done, self.running, self.failed, self.rates = read_runs(), {}, set(), []
        self.scratch = build / "study" / "results"
        self.scratch.mkdir(parents=True, exist_ok=True)

    def start(self, key, settings):
        import smollm
        import train

        output = self.scratch / f"{os.getpid()}-{len(self.running)}-{time.time_ns()}.json"
        child = os.fork()
        if child == 0:
            code = 1
            try:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # a runner that is killed leaves none behind
                run = smollm.run if settings.get("kind") == "smollm" else train.run
                output.write_text(json.dumps({"key": key, **finite(run(settings, self.build))}, allow_nan=False))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        self.running[child] = (key, settings, output, time.time())

    def finish(self):
        child, status = os.wait()
        key, settings, output, started = self.running.pop(child)
        seconds = time.time() - started
        if status != 0:
            self.failed.add(key)
            say(f"FAILED (status {status}): {key}")
            return
        record = json.loads(output.read_text())
        append_run(record)
        output.unlink()
        self.done[key] = record
        import plan

        self.rates.append(seconds / plan.cost_of(settings))
        _, cost, missing, total = plan.schedule(self.done, self.part)
        loss = "diverged" if record["diverged"] is not None else f"test loss {record['test_loss']:.4f}"
        say(f"[{total - missing}/{total}] {short(settings)}: {loss} after {duration(seconds)}; about "
            f"{duration(self.left(cost))} left")  # fmt: skip

    def left(self, cost):
        rate = statistics.median(self.rates[-20:]) if self.rates else SECONDS_PER_STEP
        return cost * rate / self.workers

    def run(self):
        import plan

        _, cost, missing, total = plan.schedule(self.done, self.part)
        say(f"study: {missing} of {total} runs are missing: about {duration(self.left(cost))} with {self.workers} at a time")
        while True:
            ready, _, _, _ = plan.schedule(self.done, self.part)
            busy = {key for key, *_ in self.running.values()} | self.failed
            todo = [(key, settings) for key, settings in ready if key not in busy]
            if todo and len(self.running) < self.workers:
                self.start(*todo[0])
            elif self.running:
                self.finish()
            else:
                break
        if self.failed:
            say(f"study: {len(self.failed)} runs failed; `make study` tries them again")
        return 1 if self.failed else 0

    def stop(self):
        for child in self.running:
            os.kill(child, signal.SIGTERM)


def short(settings):
    return " ".join(f"{name}={value}" for name, value in settings.items() if name != "kind")


def main():
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TRANSFORMERS_OFFLINE"):  # before torch is imported
        os.environ.setdefault(name, "1")
    import plan
    import report

    parser = argparse.ArgumentParser(description="Runs the study and writes docs/study.md.")
    parser.add_argument("--build", type=Path, default=ROOT / "build")
    parser.add_argument("--part", choices=[*plan.PARTS, ""], default="", help="one part alone")
    parser.add_argument("--report", action="store_true", help="only writes the report from what is there")
    parser.add_argument("--workers", type=int, default=max(1, min(os.cpu_count() or 1, 16)))
    arguments = parser.parse_args()
    code = 0
    if not arguments.report:
        import plora.torch  # noqa: F401  (before the forks: each run starts at once)
        import transformers  # noqa: F401
        from transformers import GPT2LMHeadModel, LlamaForCausalLM, OPTForCausalLM  # noqa: F401

        # Freed memory stays the process's: an evaluation takes half the time that way (measured).
        heap = ctypes.CDLL(None)
        for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            heap.mallopt(parameter, 1 << 30)
        gc.freeze()
        runner = Runner(arguments.build.resolve(), arguments.workers, arguments.part or None)

        def terminate(*_):
            raise KeyboardInterrupt

        signal.signal(signal.SIGTERM, terminate)
        try:
            code = runner.run()
        except KeyboardInterrupt:
            runner.stop()
            say("study: stopped; what was finished is kept")
            code = 130
    if code != 130:
        report.write(read_runs(), ROOT / "docs")
    return code


if __name__ == "__main__":
    sys.exit(main())
