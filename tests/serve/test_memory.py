# SPDX-License-Identifier: Apache-2.0
"""--adapter-memory and --spill: more adapters than there is room for."""
import os
import random
import threading

import pytest
from conftest import EOS, Server, wait_until
from reference import random_lora, save_lora

COUNT = 24  # of which a megabyte holds about half
RANK, ALPHA = 16, 16
PROMPT = [7, 8, 9, 10]
BUDGET = 1 << 20


def name_of(i):
    return f"a{i:02}"


@pytest.fixture(scope="module")
def many(tmp_path_factory, llama, tokenizer):
    """(their directory, what each answers)"""
    root = tmp_path_factory.mktemp("many")
    answers = {}
    for i in range(COUNT):
        lora = random_lora(llama, RANK, ALPHA, seed=200 + i)
        save_lora(root / name_of(i), lora, RANK, ALPHA)
        answers[name_of(i)] = tokenizer.decode(llama.greedy(PROMPT, 8, lora, EOS)[0], skip_special_tokens=True)
    assert len(set(answers.values())) > COUNT // 2
    return root, answers


def ask(server, name):
    return server.text(PROMPT, name, max_tokens=8)


def names(server):
    return [model["id"] for model in server.request("/v1/models")[1]["data"] if model["id"] != "tiny"]


def test_without_spill_more_are_refused(model_directory, many):
    root, answers = many
    with Server("--model", model_directory, "--adapters", root, "--context", 64, "--adapter-memory", 1) as server:
        there = names(server)
        assert 4 < len(there) < COUNT and there == sorted(answers)[:len(there)]
        assert 0 < server.metric("adapter_bytes") <= BUDGET
        late = name_of(COUNT - 1)
        load = {"lora_name": late}
        status, reply = server.request("/v1/load_lora_adapter", load)
        assert status == 503 and f"'{late}'" in reply["error"]["message"] and str(BUDGET) in reply["error"]["message"], reply
        assert "spill_directory" in reply["error"]["message"]
        assert server.request("/v1/unload_lora_adapter", {"lora_name": there[0]})[0] == 200
        assert server.request("/v1/load_lora_adapter", load)[0] == 200
        assert ask(server, late) == answers[late]
        for name in there[1:]:
            assert ask(server, name) == answers[name]
        assert server.metric("adapter_evictions_total") == 0
    assert f"adapter {name_of(COUNT - 1)} is left out" in server.error_text()


def test_spill_the_one_asked_for_longest_ago(model_directory, many, tmp_path):
    root, answers = many
    with Server("--model", model_directory, "--adapters", root, "--context", 64, "--adapter-memory", 1, "--spill", tmp_path) as server:
        assert names(server) == sorted(answers)
        fits = COUNT - int(server.metric("adapter_evictions_total"))  # all of one size: the first ones have made room
        assert 4 < fits < COUNT
        restores = server.metric("adapter_restores_total")
        for i in range(COUNT - fits, COUNT):  # those that are in memory
            assert ask(server, name_of(i)) == answers[name_of(i)]
        assert server.metric("adapter_restores_total") == restores
        for i in range(COUNT - fits):  # each in the place of the one asked for longest ago
            assert ask(server, name_of(i)) == answers[name_of(i)]
            assert server.metric("adapter_restores_total") == restores + i + 1
        recent = [name_of(i) for i in range(COUNT - fits)][-fits:]
        for name in recent:
            assert ask(server, name) == answers[name]
        assert server.metric("adapter_restores_total") == restores + COUNT - fits
        assert server.metric("adapter_bytes") <= BUDGET
        assert os.listdir(tmp_path) == []  # its files have no names


def test_spill_under_load(model_directory, many, tmp_path):
    """Clients ask for more than fit, at once; none gets the answer of another, some are told to come again."""
    root, answers = many
    wrong, right = [], []

    def client(server, seed):
        rng = random.Random(seed)
        for _ in range(25):
            name = name_of(rng.randrange(COUNT))
            status, reply = server.request("/v1/completions", {"model": name, "prompt": PROMPT, "temperature": 0, "max_tokens": 8})
            if status != 200 or reply["choices"][0]["text"] != answers[name]:
                wrong.append((name, status, reply))
            else:
                right.append(name)

    with Server("--model", model_directory, "--adapters", root, "--context", 64, "--adapter-memory", 1, "--spill", tmp_path,
                "--slots", 4) as server:
        clients = [threading.Thread(target=client, args=(server, seed)) for seed in range(4)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
        assert not wrong
        assert len(right) == 100 and server.metric("adapter_restores_total") > 20
        assert server.metric("adapter_bytes") <= BUDGET


def test_all_that_fit_are_held(long_directory, many, tmp_path):
    """Requests that run hold their adapters: there is no room for one more until one of them ends."""
    root, answers = many
    with Server("--model", long_directory, "--adapters", root, "--context", 4000, "--adapter-memory", 1, "--spill", tmp_path,
                "--slots", COUNT) as server:
        replies = {}

        def hold(name):
            body = {"model": name, "prompt": PROMPT, "temperature": 0, "max_tokens": 3500, "ignore_eos": True}
            replies[name] = server.request("/v1/completions", body)

        holders = [threading.Thread(target=hold, args=(name_of(i),)) for i in range(COUNT)]
        for thread in holders:
            thread.start()
        running = 0

        def all_have_come():  # each is refused or runs
            nonlocal running
            running = server.metric("sequences_running")
            return running + len(replies) == COUNT

        wait_until(all_have_come)
        assert 4 < running < COUNT
        for thread in holders:
            thread.join()
        statuses = [status for status, _ in replies.values()]
        assert len(statuses) == COUNT and set(statuses) == {200, 503} and 4 < statuses.count(200)
        assert all("held or pinned" in reply["error"]["message"] for status, reply in replies.values() if status == 503)
        for name in answers:
            assert ask(server, name) == answers[name]


def test_spill_must_be_a_directory(model_directory, many, tmp_path):
    root, _ = many
    with pytest.raises(RuntimeError, match="spill_directory"):
        Server("--model", model_directory, "--adapters", root, "--context", 64, "--adapter-memory", 1, "--spill", tmp_path / "none")
