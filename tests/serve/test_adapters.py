# SPDX-License-Identifier: Apache-2.0
"""Adapters that come, go and change while requests run; directories and files that mean harm."""
import json
import os
import random
import shutil
import threading
import time

import pytest
from conftest import EOS, Server, make_adapters
from reference import random_lora, save_lora


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def own(model_directory, root, llama):
    """A server whose adapters the tests may change."""
    make_adapters(root, llama)
    with Server("--model", model_directory, "--adapters", root, "--context", 128, "--slots", 8) as server:
        yield server


def load(server, name, path=None):
    return server.request("/v1/load_lora_adapter", {"lora_name": name} | ({"lora_path": str(path)} if path else {}))


def unload(server, name):
    return server.request("/v1/unload_lora_adapter", {"lora_name": name})


def names(server):
    return [model["id"] for model in server.request("/v1/models")[1]["data"]]


def test_what_is_there_is_served(own):
    assert sorted(names(own)) == ["nine", "one", "tiny", "two", "wide"]
    assert own.metric("adapters") == 4


def test_load_and_unload(own, root, llama, tokenizer):
    lora = random_lora(llama, 3, 6, seed=50)
    save_lora(root / "deeper" / "late", lora, 3, 6)
    prompt = [7, 8, 9]
    assert own.request("/v1/completions", {"model": "late", "prompt": prompt})[0] == 404
    status, reply = load(own, "late", "deeper/late")
    assert status == 200 and reply["lora_name"] == "late"
    assert "late" in names(own)
    want = tokenizer.decode(llama.greedy(prompt, 20, lora, EOS)[0], skip_special_tokens=True)
    assert own.text(prompt, "late", max_tokens=20) == want
    assert load(own, "again", root / "deeper" / "late")[0] == 200  # the whole path does as well
    assert unload(own, "again")[0] == 200
    assert unload(own, "late")[0] == 200
    assert unload(own, "late") == (404, {"error": {"message": "there is no adapter 'late'", "type": "not_found_error",
                                                   "param": "lora_name", "code": 404}})
    assert own.request("/v1/completions", {"model": "late", "prompt": prompt})[0] == 404


def test_unload_lets_requests_finish(long_directory, root, llama):
    with Server("--model", long_directory, "--adapters", root, "--context", 8000, "--slots", 4) as server:
        want = server.text("the", "wide", max_tokens=3000, ignore_eos=True)
        answers = []
        asker = threading.Thread(target=lambda: answers.append(server.text("the", "wide", max_tokens=3000, ignore_eos=True)))
        asker.start()
        while server.metric("sequences_running") == 0:
            time.sleep(0.005)
        assert unload(server, "wide")[0] == 200
        assert server.request("/v1/completions", {"model": "wide", "prompt": "the"})[0] == 404
        asker.join()
        assert answers == [want]


def test_replace_under_load(own, root, llama, tokenizer):
    """Two versions change places while clients ask: every answer is that of one version, whole, and of a version that was there."""
    rng = random.Random(4)
    versions = [random_lora(llama, 4, 8, seed=60 + i) for i in range(2)]
    for i, lora in enumerate(versions):
        save_lora(root / f"version{i}", lora, 4, 8)
    prompts = [[rng.randrange(3, 61) for _ in range(rng.randint(3, 20))] for _ in range(6)]
    want = [[tokenizer.decode(llama.greedy(prompt, 30, lora, EOS)[0], skip_special_tokens=True) for lora in versions]
            for prompt in prompts]
    assert all(a != b for a, b in want)
    assert load(own, "live", "version0")[0] == 200
    done, wrong, seen = threading.Event(), [], [0, 0]

    def ask(number):
        while not done.is_set():
            text = own.text(prompts[number], "live", max_tokens=30)
            if text in want[number]:
                seen[want[number].index(text)] += 1
            else:
                wrong.append((number, text))

    clients = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for client in clients:
        client.start()
    last = 0
    for i in range(60):
        status, reply = load(own, "live", f"version{(i + 1) % 2}")
        assert status == 200 and reply["version"] > last
        last = reply["version"]
        if i % 10 == 0:  # others come and go as well
            assert load(own, "other", "version0")[0] == 200
            assert own.text(prompts[0], "other", max_tokens=30) == want[0][0]
            assert unload(own, "other")[0] == 200
        time.sleep(0.02)
    done.set()
    for client in clients:
        client.join()
    assert not wrong
    assert min(seen) > 0
    assert own.text(prompts[0], "live", max_tokens=30) == want[0][0]
    assert unload(own, "live")[0] == 200


@pytest.mark.parametrize("path", ["../outside", "..", ".", "", "/", "/etc", "/etc/passwd", "missing", "one/../../outside", "link", "one/../one/..",
                                  "file_link", "config_link", "x" * 5000, "one\u00e9", "./\n"])
def test_paths_outside(own, root, llama, path):
    outside = root.parent / "outside"
    if not outside.exists():
        save_lora(outside, random_lora(llama, 2, 2, seed=5), 2, 2)
        (root / "link").symlink_to(outside)
        shutil.copytree(root / "one", root / "file_link")
        (root / "file_link" / "adapter_model.safetensors").unlink()
        (root / "file_link" / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
        shutil.copytree(root / "one", root / "config_link")
        (root / "config_link" / "adapter_config.json").unlink()
        (root / "config_link" / "adapter_config.json").symlink_to("../../outside/adapter_config.json")
    status, reply = own.request("/v1/load_lora_adapter", {"lora_name": "evil", "lora_path": path})
    assert status == 400 and reply["error"]["param"] == "lora_path", reply
    assert "evil" not in names(own)
    assert load(own, "inner", "one/../two")[0] == 200 and unload(own, "inner")[0] == 200  # no harm in dots that stay inside


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "a b", "é", "x" * 65, "a\nb", "tiny", "\"", 5, None, ["one"]])
def test_names(own, name):
    status, reply = own.request("/v1/load_lora_adapter", {"lora_name": name, "lora_path": "one"})
    assert status == 400 and reply["error"]["param"] == "lora_name", reply


def damage(directory, kind):
    config, weights = directory / "adapter_config.json", directory / "adapter_model.safetensors"
    data, settings = weights.read_bytes(), json.loads(config.read_text())
    if kind == "empty":
        weights.write_bytes(b"")
    elif kind == "cut":
        weights.write_bytes(data[:len(data) // 2])
    elif kind == "huge header":
        weights.write_bytes(b"\xff" * 8 + data[8:])
    elif kind == "noise":
        weights.write_bytes(random.Random(1).randbytes(len(data)))
    elif kind == "nan":
        weights.write_bytes(data[:-4] + b"\x00\x00\xc0\x7f")
    elif kind == "no json":
        config.write_text("{")
    elif kind == "deep json":
        config.write_text("[" * 100000)
    elif kind == "dora":
        config.write_text(json.dumps(settings | {"use_dora": True}))
    elif kind == "rank":
        config.write_text(json.dumps(settings | {"r": -1}))
    elif kind == "other model":
        weights.write_bytes(data.replace(b"layers.1.", b"layers.7."))
    elif kind == "fifo":
        weights.unlink()
        os.mkfifo(weights)
    elif kind == "directory":
        weights.unlink()
        weights.mkdir()


@pytest.mark.parametrize("kind", ["empty", "cut", "huge header", "noise", "no json", "deep json", "dora", "other model", "directory", "fifo"])
def test_hostile_files(own, root, kind):
    bad = root / ("bad_" + kind.replace(" ", "_"))
    shutil.copytree(root / "two", bad)
    before = own.text("the", "two", max_tokens=10)
    assert load(own, "good", "two")[0] == 200
    damage(bad, kind)
    status, reply = own.request("/v1/load_lora_adapter", {"lora_name": "good", "lora_path": bad.name}, timeout=20)
    assert status == 400 and len(reply["error"]["message"]) > 10, reply
    assert own.text("the", "good", max_tokens=10) == before  # what had the name has it still
    assert unload(own, "good")[0] == 200


def test_bad_ones_at_the_start_are_left_out(model_directory, tmp_path, llama):
    make_adapters(tmp_path, llama)
    damage(tmp_path / "nine", "cut")
    (tmp_path / "notes.txt").write_text("no adapter")
    (tmp_path / "empty").mkdir()
    with Server("--model", model_directory, "--adapters", tmp_path, "--context", 64) as server:
        assert sorted(names(server)) == ["one", "tiny", "two", "wide"]
    assert "adapter nine is left out" in server.error_text()


def test_without_a_directory(model_directory):
    with Server("--model", model_directory, "--context", 64) as server:
        status, reply = load(server, "one", "/")
        assert status == 400 and "--adapters" in reply["error"]["message"]
        assert names(server) == ["tiny"]
