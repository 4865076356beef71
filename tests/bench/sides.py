"""Running what is measured: our own programs, and the peers in a process of their own. Both sides of a figure take turns."""

import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
HUGE = str(1 << 34)
KEEP_HEAP = {"MALLOC_MMAP_THRESHOLD_": HUGE, "MALLOC_TRIM_THRESHOLD_": HUGE}  # glibc gives no memory back
PREFIX = shlex.split(os.environ.get("BENCH_PREFIX", ""))  # of every measured process
RANK = 16  # of the adapters that are measured


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
