# SPDX-License-Identifier: Apache-2.0
"""The record of the study, docs/study/runs.jsonl: a kill may cut its last line short, and that loses this run alone."""

import importlib
import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("study", ROOT / "tests" / "study" / "study.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_appended_runs_come_back(study, tmp_path):
    path = tmp_path / "docs" / "runs.jsonl"
    for key in ("a", "b", "c"):
        study.append_run({"key": key, "loss": 1.5}, path)
    assert list(study.read_runs(path)) == ["a", "b", "c"]
    assert path.read_bytes().endswith(b"}\n")


@pytest.mark.parametrize("kept", [1, 5, 18])
def test_torn_line_loses_its_run_alone(study, tmp_path, kept, capsys):
    path = tmp_path / "runs.jsonl"
    study.append_run({"key": "whole"}, path)
    whole = path.read_bytes()
    path.write_bytes(whole + json.dumps({"key": "torn", "loss": 2.0}).encode()[:kept])
    assert list(study.read_runs(path)) == ["whole"]
    study.append_run({"key": "next"}, path)
    assert list(study.read_runs(path)) == ["whole", "next"]
    assert "2: not a whole line" in capsys.readouterr().out


def test_no_file_is_no_runs(study, tmp_path):
    assert study.read_runs(tmp_path / "none") == {}


def test_values_that_json_does_not_have(study):
    assert study.finite({"a": [float("nan"), (1.0, float("inf"))], "b": True}) == {"a": [None, [1.0, None]], "b": True}


def test_committed_runs_are_whole(study):
    lines = [line for line in study.RUNS.read_text(encoding="utf-8").splitlines() if line] if study.RUNS.exists() else []
    runs = study.read_runs()
    assert len(runs) == len(lines), "a line is torn, or a key stands there twice"
    for record in runs.values():
        assert record["held_out"] and record["settings"]["steps"] > 0 and record["seconds"] > 0


# ----------------------------------------------------------------------------------------------- what the record is said to show


@pytest.fixture(scope="module")
def texts():
    """plan, report and conclusions; no run is made, so that neither torch nor matplotlib is needed."""
    sys.path.insert(0, str(ROOT / "tests" / "study"))
    try:
        yield {name: importlib.import_module(name) for name in ("plan", "report", "conclusions")}
    finally:
        sys.path.pop(0)


def record(plan, settings, test_loss, start=2.0):
    """Invented: only for what is computed from such records."""
    full, steps = {**plan.DEFAULTS, **settings}, {**plan.DEFAULTS, **settings}["steps"]
    points = [[place * steps // 4, None, start + (test_loss - start) * place / 4, 0.25 * place, 6e6, 4e8] for place in range(5)]
    return {
        "key": plan.key_of(settings), "settings": full, "base": "x", "diverged": None, "trained": 6400, "train": [],
        "held_out": points, "train_loss": test_loss, "tune_loss": test_loss, "test_loss": test_loss, "exact": 1.0,
        "update": {"layer": "x", "spectrum": [1.0], "rank": 5.0, "effective": 3.3, "relative": 0.1,
                   "captured": 0.5 if full["dtype"] == "bf16" else None},
        "unloads": [], "watched": [[200, [1.0, 0.5], [1.0, 0.5]]] if full["watch"] else [], "cpu_seconds": 100, "peak_rss": 4e8,
    }  # fmt: skip


def all_runs(plan, loss):
    done = {}
    while True:
        ready = plan.schedule(done)[0]
        if not ready:
            return done
        done.update((key, record(plan, settings, loss({**plan.DEFAULTS, **settings}))) for key, settings in ready)


def test_plan_ends_and_each_run_is_there_once(texts):
    plan = texts["plan"]
    done = all_runs(plan, lambda settings: 1.5)
    _, cost, missing, total = plan.schedule(done)
    assert (cost, missing) == (0.0, 0) and total == len(done)
    first = [settings for _, settings in plan.schedule({})[0]]
    assert all(plan.cost_of(settings) > 0 for settings in first)
    assert {settings.get("kind", "toy") for settings in first} == {"toy", "smollm"}


def losses(settings):
    end = {"lora": 1.5, "restarts": 1.51, "plora": 1.2, "momentum": 1.25, "full": 1.0}[settings["method"]]
    return end + abs(settings["lr"] - 1e-2)


def test_sentences_follow_from_the_runs(texts):
    plan, report, conclusions = (texts[name] for name in ("plan", "report", "conclusions"))
    done = all_runs(plan, losses)
    text = conclusions.in_short(report.Report(done))
    assert conclusions.OPEN not in text and "unfinished" not in text
    assert "same rank:** reproduces. " in text and "LLaMA-like 1.60 (1.60 - 1.60, 3 seeds)" in text
    assert "restarts alone?** no. " in text
    # One seed in which PLoRA learns less than LoRA: it does not reproduce on that model.
    key = plan.key_of({**plan.PLORA, "lr": 1e-2, "seed": 3})
    done[key] = record(plan, done[key]["settings"], 1.9)
    assert "same rank:** reproduces on some models only. " in conclusions.in_short(report.Report(done))
    done = all_runs(plan, lambda settings: 1.5)
    assert "same rank:** does not reproduce. " in conclusions.in_short(report.Report(done))


def test_nothing_is_said_of_what_has_not_run(texts):
    text = texts["conclusions"].in_short(texts["report"].Report({}))
    assert len(text.splitlines()) == text.count(texts["conclusions"].OPEN) == 8


def test_diverged_runs_are_no_winners(texts):
    plan, report, conclusions = (texts[name] for name in ("plan", "report", "conclusions"))
    done = all_runs(plan, losses)
    for key, run in done.items():
        if run["settings"]["lr"] == 3e-2 and run["settings"]["method"] == "plora":
            done[key] = {**run, "diverged": 7, "tune_loss": None, "test_loss": None, "train_loss": None, "update": None}
    text = conclusions.in_short(report.Report(done))
    assert "rate 3e-2" not in text.split("Rule of thumb")[1].split("\n")[0]


def test_one_seed_is_said_to_be_one(texts):
    plan, report, conclusions = (texts[name] for name in ("plan", "report", "conclusions"))
    runs = [{"lr": 1e-2, "seed": 1}, {**plan.PLORA, "lr": 1e-2, "seed": 1}]
    done = {plan.key_of(run): record(plan, run, 1.2 if "method" in run else 1.5) for run in runs}
    text = conclusions.in_short(report.Report(done))
    assert "same rank:** in one seed: reproduces. " in text and "1.60 (one seed)" in text
