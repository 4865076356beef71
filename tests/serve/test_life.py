# SPDX-License-Identifier: Apache-2.0
"""Beginnings and ends: clients that leave, a queue that is full, signals, a server that is killed and started again."""
import json
import signal
import subprocess
import threading
import time

import openai
import pytest
from conftest import PROGRAM, SLOWER, Server, wait_until

FOREVER = {"max_tokens": 99000, "ignore_eos": True, "temperature": 0}


@pytest.fixture
def long(long_directory):
    with Server("--model", long_directory, "--context", 100000, "--slots", 2, "--queue", 3, "--drain-seconds", 1) as server:
        yield server


def begin(server, stream):
    """A connection on which an answer without end has been asked for."""
    client = server.connect()
    body = json.dumps({"model": "long", "prompt": "the", "stream": stream} | FOREVER).encode()
    client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    return client


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves(long, stream):
    for i in range(3):
        client = begin(long, stream)
        wait_until(lambda: long.metric("sequences_running") == 1)
        client.close()
        wait_until(lambda: long.metric("sequences_running") == 0, 5)
        assert long.metric("requests_cancelled_total") == i + 1
    assert long.text("the", "long", max_tokens=5, ignore_eos=True)


def test_a_client_that_leaves_the_queue(long):
    running = [begin(long, True), begin(long, False)]
    wait_until(lambda: long.metric("sequences_running") == 2)
    waiting = begin(long, False)
    wait_until(lambda: long.metric("sequences_waiting") == 1)
    waiting.close()
    wait_until(lambda: long.metric("sequences_waiting") == 0)
    assert long.metric("sequences_running") == 2
    for client in running:
        client.close()
    wait_until(lambda: long.metric("sequences_running") == 0)


def test_closing_a_stream_of_the_client(long):
    client = openai.OpenAI(base_url=long.base + "/v1", api_key="none", max_retries=0)
    stream = client.completions.create(model="long", prompt="the", stream=True, max_tokens=99000, temperature=0,
                                       extra_body={"ignore_eos": True})
    for _, event in zip(range(20), stream, strict=False):
        assert event.choices[0].finish_reason is None
    stream.close()
    wait_until(lambda: long.metric("sequences_running") == 0)


def test_overload(long):
    """Two slots, a queue of three: the sixth is refused at once, and told to come again; the others are served."""
    clients = [begin(long, False) for _ in range(2)]
    wait_until(lambda: long.metric("sequences_running") == 2)
    clients += [begin(long, False) for _ in range(3)]
    wait_until(lambda: long.metric("sequences_waiting") == 3)
    status, reply = long.request("/v1/completions", {"model": "long", "prompt": "the"} | FOREVER)
    assert status == 503 and "the queue is full" in reply["error"]["message"]
    with pytest.raises(openai.InternalServerError):
        openai.OpenAI(base_url=long.base + "/v1", api_key="x", max_retries=0).completions.create(model="long", prompt="the")
    status, reply = long.request("/v1/completions", {"model": "long", "prompt": ["the"] * 4})
    assert status == 503
    assert long.request("/health")[0] == 200
    for client in clients:
        client.close()
    wait_until(lambda: long.metric("sequences_running") == 0 and long.metric("sequences_waiting") == 0)
    assert long.text("the", "long", max_tokens=5, ignore_eos=True)


def test_an_answer_that_takes_too_long(long_directory):
    with Server("--model", long_directory, "--context", 100000, "--max-seconds", 1) as server:
        status, reply = server.request("/v1/completions", {"model": "long", "prompt": "the"} | FOREVER)
        assert status == 504 and "1 seconds" in reply["error"]["message"]
        client = openai.OpenAI(base_url=server.base + "/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.APIError, match="not ready in time"):
            for _ in client.completions.create(model="long", prompt="the", stream=True, max_tokens=99000, extra_body={"ignore_eos": True}):
                pass
        wait_until(lambda: server.metric("sequences_running") == 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_let_requests_finish(long_directory, number):
    server = Server("--model", long_directory, "--context", 100000, "--slots", 4, "--drain-seconds", 600)
    want = server.text("the", "long", max_tokens=1000, ignore_eos=True)
    answers = []
    askers = [threading.Thread(target=lambda: answers.append(server.text("the", "long", max_tokens=1000, ignore_eos=True))) for _ in range(4)]
    for asker in askers:
        asker.start()
    wait_until(lambda: server.metric("sequences_running") == 4)
    server.stop(number)
    for asker in askers:
        asker.join()
    assert answers == [want] * 4


def test_signals_end_what_takes_too_long(long):
    """One second to finish, then the rest is told that the server ends."""
    replies = []
    askers = [threading.Thread(target=lambda: replies.append(long.request("/v1/completions", {"model": "long", "prompt": "the"} | FOREVER)))
              for _ in range(3)]
    for asker in askers:
        asker.start()
    wait_until(lambda: long.metric("sequences_running") == 2 and long.metric("sequences_waiting") == 1)
    begun = time.monotonic()
    long.stop()
    assert time.monotonic() - begun < 8 * SLOWER
    for asker in askers:
        asker.join()
    assert [(status, reply["error"]["message"]) for status, reply in replies] == [(503, "the server is ending")] * 3


def test_killed_and_started_again(long_directory, adapter_root, loras):
    """Nothing is kept on disk, so nothing can be left half done: the next server takes the port and gives the same answers."""
    options = ["--model", long_directory, "--adapters", adapter_root, "--context", 100000, "--slots", 4]
    first = Server(*options)
    want = [first.text("the", name, max_tokens=50, ignore_eos=True) for name in ("long", *loras)]
    for _ in range(3):
        clients = [begin(first, bool(i % 2)) for i in range(4)]
        wait_until(lambda server=first: server.metric("sequences_running") == 4)
        port = first.port
        first.kill()
        for client in clients:
            client.close()
        first = Server(*options, "--port", port)
        assert first.port == port
        assert [first.text("the", name, max_tokens=50, ignore_eos=True) for name in ("long", *loras)] == want
    first.stop()


@pytest.mark.parametrize("options, part", [
    ([], "--model is missing"), (["--model", "/nonexistent"], "there is no directory"), (["--model", "."], "config.json"),
    (["--port", "70000"], "[0, 65535]"), (["--slots", "0"], "[1, 4096]"), (["--mdoel", "x"], "unknown argument"), (["--model"], "needs a value"),
    (["--model", "x", "--slots", "500"], "--batch-tokens 256 is less than --slots 500"), (["--dtype", "fp8"], "fp32 or bf16")])
def test_options(options, part):
    result = subprocess.run([PROGRAM, *options], capture_output=True, text=True, timeout=30 * SLOWER)
    assert result.returncode in (1, 2) and part in result.stderr, result


def test_what_cannot_be_served(model_directory, tmp_path, server):
    for options, part in [(["--context", "129"], "exceeds the model's 128"), (["--context", 64, "--adapters", tmp_path / "none"], "--adapters"),
                          (["--context", 64, "--port", str(server.port)], "cannot listen"), (["--context", 64, "--host", "no.such.host.invalid"], "--host")]:
        result = subprocess.run([PROGRAM, "--model", model_directory, *map(str, options)], capture_output=True, text=True, timeout=60 * SLOWER)
        assert result.returncode == 1 and part in result.stderr, result


def test_help():
    result = subprocess.run([PROGRAM, "--help"], capture_output=True, text=True)
    assert result.returncode == 0 and "--adapters" in result.stdout
