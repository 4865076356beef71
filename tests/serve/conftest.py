# SPDX-License-Identifier: Apache-2.0
"""A server on a tiny model, and what it must say.

The model is tests/data/tiny_llama_tied, whose logits transformers has computed, with a byte-level tokenizer of 61 tokens; $PLORA_SERVE
names the program, for builds with a sanitizer.
"""
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy: the reference multiplies small matrices
import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).resolve().parent))
from reference import Llama, random_lora, save_lora  # noqa: E402

PROGRAM = Path(os.environ.get("PLORA_SERVE") or ROOT / os.environ.get("PLORA_BUILD", "build") / "serve")
TINY = ROOT / "tests" / "data" / "tiny_llama_tied"
SLOWER = float(os.environ.get("PLORA_SLOWER", "1"))  # how much slower a sanitizer makes the server, about
EOS = 2
MERGES = ["t h", "th e", "Ġ t", "Ġt h", "i n", "e r", "a n"]
CHAT_TEMPLATE = ("{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system\nin the end<|im_end|>\n' }}"
                 "{% endif %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}")


def wait_until(true, seconds=20):
    deadline = time.monotonic() + seconds * SLOWER
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def small_tokenizer():
    letters = list("abcdefghijklmnopqrstuvwxyz") + ["Ġ", "Ċ"] + list(".,!?'") + list("0123456789") + list("IT")
    letters += ["Ã", "©", "ð", "Ł", "ĺ", "Ģ"]  # the bytes of é and 😀
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] + letters + [merge.replace(" ", "") for merge in MERGES]
    assert len(tokens) == 61
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": [{"id": i, "content": tokens[i], "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True} for i in range(3)],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level]},
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": {token: i for i, token in enumerate(tokens)}, "merges": MERGES}}


def make_model(directory, positions=128):
    directory.mkdir(parents=True)
    shutil.copy(TINY / "model.safetensors", directory)
    config = json.loads((TINY / "config.json").read_text())
    config["max_position_embeddings"] = positions
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text(json.dumps(small_tokenizer()))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE, "eos_token": "<|im_end|>"}))
    return directory


class Server:
    def __init__(self, *options, **environment):
        # One thread, unless asked for: the tiny model has too little work for two, which would only wait for one another.
        self.process = subprocess.Popen([PROGRAM, "--port", "0", "--threads", "1", *map(str, options)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                        text=True, env=dict(os.environ, OMP_WAIT_POLICY="passive", **environment))
        self.errors = []
        self.reader = threading.Thread(target=lambda: self.errors.extend(self.process.stderr))
        self.reader.start()
        line = self.process.stdout.readline()
        match = re.search(r"http://\S+:(\d+)$", line)
        if not match:
            self.kill()
            raise RuntimeError(f"the server did not start: {line}{self.error_text()}")
        self.port = int(match.group(1))
        self.base = f"http://127.0.0.1:{self.port}"

    def error_text(self):
        return "".join(self.errors)

    def request(self, path, body=None, raw=None, headers=(), timeout=60):
        """(status, decoded JSON or text)"""
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | dict(headers)
        request = urllib.request.Request(self.base + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=timeout * SLOWER) as reply:
                status, text, kind = reply.status, reply.read(), reply.headers["Content-Type"]
        except urllib.error.HTTPError as error:
            status, text, kind = error.code, error.read(), error.headers["Content-Type"]
        return status, json.loads(text) if kind == "application/json" else text.decode()

    def complete(self, prompt, model="tiny", **options):
        status, reply = self.request("/v1/completions", {"model": model, "prompt": prompt, "temperature": 0} | options)
        assert status == 200, reply
        return reply

    def text(self, prompt, model="tiny", **options):
        return self.complete(prompt, model, **options)["choices"][0]["text"]

    def metric(self, name):
        status, text = self.request("/metrics")
        assert status == 200
        return float(re.search(rf"^plora_{re.escape(name)} (\S+)$", text, re.MULTILINE).group(1))

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=20 * SLOWER)

    def stop(self, number=signal.SIGTERM):
        """Ends the server as a user does; a sanitizer's report or a leak is a failure."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(timeout=60 * SLOWER)
        self.reader.join()
        assert code == 0, f"exit status {code}\n{self.error_text()}"
        assert not re.search("Sanitizer|runtime error", self.error_text()), self.error_text()

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.reader.join()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            self.stop()
        else:
            self.kill()
            print(self.error_text())


@pytest.fixture(scope="session")
def tokenizer():
    from tokenizers import Tokenizer

    return Tokenizer.from_str(json.dumps(small_tokenizer()))


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def llama(model_directory):
    return Llama(model_directory)


ADAPTERS = {  # name: rank, alpha, targets
    "one": (1, 2, ["q_proj", "v_proj"]),
    "two": (2, 4, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
    "nine": (9, 12, ["down_proj", "o_proj"]),
    "wide": (16, 16, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
}


def make_adapters(root, llama):
    made = {}
    for seed, (name, (rank, alpha, targets)) in enumerate(ADAPTERS.items()):
        made[name] = random_lora(llama, rank, alpha, seed + 1, targets)
        save_lora(root / name, made[name], rank, alpha)
    return made


@pytest.fixture(scope="session")
def adapter_root(tmp_path_factory):
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="session")
def loras(adapter_root, llama):
    return make_adapters(adapter_root, llama)


@pytest.fixture(scope="session")
def server(model_directory, adapter_root, loras):
    with Server("--model", model_directory, "--adapters", adapter_root, "--context", 128, "--slots", 8, "--batch-tokens", 40,
                "--threads", 2) as s:
        yield s


@pytest.fixture(scope="session")
def long_directory(tmp_path_factory):
    """The same model, which can go on for long: for what happens meanwhile."""
    return make_model(tmp_path_factory.mktemp("long") / "long", 1 << 17)
