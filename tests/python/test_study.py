# SPDX-License-Identifier: Apache-2.0
"""The record of the study, docs/study/runs.jsonl: a kill may cut its last line short, and that loses this run alone."""

import importlib.util
import json
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
