# SPDX-License-Identifier: Apache-2.0
"""Requests that are wrong, and clients that mean harm. Every refusal is JSON that says why, and the server goes on."""
import json
import socket
import threading
import time

import openai
import pytest
from conftest import SLOWER, Server, wait_until


@pytest.fixture(scope="module")
def strict(model_directory):
    with Server("--model", model_directory, "--context", 64, "--max-body", 4096, "--request-seconds", 2, "--connections", 20) as server:
        yield server


def refused(reply, status, part, param=None):
    assert reply[0] == status, reply
    error = reply[1]["error"]
    assert part in error["message"] and error["code"] == status and error["param"] == param, reply


WRONG = [  # body, parameter, part of the message
    ({"prompt": "the"}, "model", "model is missing"),
    ({"model": 5, "prompt": "the"}, "model", "must be a string"),
    ({"model": "tiny"}, "prompt", "prompt is missing"),
    ({"model": "tiny", "prompt": ""}, "prompt", "has no tokens"),
    ({"model": "tiny", "prompt": "###"}, "prompt", "has no tokens"),
    ({"model": "tiny", "prompt": []}, "prompt", "must be a string"),
    ({"model": "tiny", "prompt": {}}, "prompt", "must be a string"),
    ({"model": "tiny", "prompt": ["the", 5]}, "prompt", "prompt 1"),
    ({"model": "tiny", "prompt": [5, "the"]}, "prompt", "a token"),
    ({"model": "tiny", "prompt": [61]}, "prompt", "[0, 61)"),
    ({"model": "tiny", "prompt": [-1]}, "prompt", "[0, 61)"),
    ({"model": "tiny", "prompt": [1.5]}, "prompt", "integer"),
    ({"model": "tiny", "prompt": [1e300]}, "prompt", "integer"),
    ({"model": "tiny", "prompt": [[1], []]}, "prompt", "prompt 1 has no tokens"),
    ({"model": "tiny", "prompt": ["a"] * 129}, "prompt", "exceed 128"),
    ({"model": "tiny", "prompt": "a" * 64}, "prompt", "64 tokens"),
    ({"model": "tiny", "prompt": "the", "max_tokens": 0}, "max_tokens", "in [1,"),
    ({"model": "tiny", "prompt": "the", "max_tokens": 64}, "max_tokens", "exceed the context of 64"),
    ({"model": "tiny", "prompt": "the", "max_tokens": 1.5}, "max_tokens", "integer"),
    ({"model": "tiny", "prompt": "the", "max_tokens": 1e300}, "max_tokens", "in ["),
    ({"model": "tiny", "prompt": "the", "max_tokens": "5"}, "max_tokens", "number"),
    ({"model": "tiny", "prompt": "the", "temperature": -0.1}, "temperature", "[0, 100]"),
    ({"model": "tiny", "prompt": "the", "temperature": 1e300}, "temperature", "[0, 100]"),
    ({"model": "tiny", "prompt": "the", "top_p": 1.01}, "top_p", "[0, 1]"),
    ({"model": "tiny", "prompt": "the", "seed": 0.5}, "seed", "integer"),
    ({"model": "tiny", "prompt": "the", "stop": ""}, "stop", "not empty"),
    ({"model": "tiny", "prompt": "the", "stop": [1]}, "stop", "string"),
    ({"model": "tiny", "prompt": "the", "stop": list("abcde")}, "stop", "more than 4"),
    ({"model": "tiny", "prompt": "the", "stream": "yes"}, "stream", "true or false"),
    ({"model": "tiny", "prompt": "the", "stream_options": {}}, "stream_options", "needs"),
    ({"model": "tiny", "prompt": "the", "n": 2}, "n", "not supported"),
    ({"model": "tiny", "prompt": "the", "echo": True}, "echo", "not supported"),
    ({"model": "tiny", "prompt": "the", "logprobs": 3}, "logprobs", "not supported"),
    ({"model": "tiny", "prompt": "the", "logit_bias": {"5": 1}}, "logit_bias", "not supported"),
    ({"model": "tiny", "prompt": "the", "suffix": "x"}, "suffix", "not supported"),
    ({"model": "tiny", "prompt": "the", "top_q": 1}, "top_q", "not a parameter"),
]


@pytest.mark.parametrize("body, param, part", WRONG)
def test_wrong_values(strict, body, param, part):
    refused(strict.request("/v1/completions", body), 400, part, param)


def test_neutral_values_are_taken(strict):
    body = {"model": "tiny", "prompt": "the", "n": 1, "best_of": 1, "echo": False, "logprobs": None, "logit_bias": {}, "suffix": None,
            "presence_penalty": 0, "frequency_penalty": 0.0, "user": "x", "temperature": None, "stop": None, "max_tokens": 1}
    assert strict.request("/v1/completions", body)[0] == 200


def test_unknown_model(strict):
    refused(strict.request("/v1/completions", {"model": "none", "prompt": "the"}), 404, "there is no model 'none'", "model")
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        openai.OpenAI(base_url=strict.base + "/v1", api_key="x", max_retries=0).completions.create(model="none", prompt="the")


@pytest.mark.parametrize("raw, part", [
    (b"", "empty"), (b" ", "not JSON"), (b"{", "not JSON"), (b"nonsense", "not JSON"), (b"[]", "object"), (b"5", "object"), (b"null", "object"),
    (b'{"model": "tiny"} x', "not JSON"), (b'{"model": "tiny", "model": "tiny"}', "given twice"), (b"[" * 4000, "not JSON"),
    (b'{"prompt": "\xff"}', "not UTF-8 at byte 12"), (b'{"prompt": "\xed\xa0\x80"}', "not UTF-8"), (b'{"prompt": "\xc0\x80"}', "not UTF-8"),
    (b'{"prompt": "a\\u0000b"}', "NUL"), (b'{"prompt": "a\0b"}', "NUL"), (b'{"prompt": "\\ud800"}', "not JSON"),
    (b'{"model": NaN}', "not JSON"), (b"{'model': 1}", "not JSON"), (b"\xef\xbb\xbf[]", "object")])
def test_bodies(strict, raw, part):
    status, reply = strict.request("/v1/completions", raw=raw)
    assert status == 400 and part in reply["error"]["message"], reply


def test_escaped_backslash_is_no_nul(strict):
    raw = b'{"model": "tiny", "prompt": "the \\\\u0000", "max_tokens": 1}'
    assert strict.request("/v1/completions", raw=raw)[0] == 200


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/completions/", "/v1/models/../completions", "/..%2f..%2fetc/passwd", "//health",
                                  "/v1/" + "x" * 3000])
def test_unknown_paths(strict, path):
    refused(strict.request(path), 404, "there is nothing at")


def test_methods(strict):
    refused(strict.request("/v1/completions"), 405, "takes POST, not GET")
    refused(strict.request("/health", {}), 405, "takes GET, not POST")
    refused(strict.request("/v1/completions", {}, headers={"Content-Type": "text/plain"}), 415, "application/json")
    assert strict.request("/v1/models?x=1")[0] == 200


def exchange(server, data, timeout=10):
    """All that the server answers before it closes the connection."""
    with server.connect() as client:
        client.settimeout(timeout * SLOWER)
        client.sendall(data)
        answer = b""
        try:
            while part := client.recv(65536):
                answer += part
        except ConnectionResetError:
            pass
        return answer


def test_huge_bodies(strict):
    refused(strict.request("/v1/completions", {"model": "tiny", "prompt": "a" * 5000}), 413, "exceeds 4096 bytes")
    refused(strict.request("/v1/completions", raw=b"x" * 4097), 413, "exceeds 4096 bytes")
    assert b"413" in exchange(strict, b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n")
    chunk = b"1000\r\n" + b"x" * 0x1000 + b"\r\n"
    answer = exchange(strict, b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk * 20 + b"0\r\n\r\n")
    assert b" 413 " in answer


@pytest.mark.parametrize("data", [
    b"\r\n\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"\x00" * 200,
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n\r\n",
    b"GET /" + b"a" * 100000 + b" HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"".join(b"X-%d: y\r\n" % i for i in range(20000)) + b"\r\n",
    b"GET / HTTP/1.1\r\nX: " + b"y" * 200000 + b"\r\n\r\n"], ids=range(10))
def test_garbage(strict, data):
    try:
        answer = exchange(strict, data)
        assert answer == b"" or answer.startswith(b"HTTP/1.")
        assert b" 200 " not in answer.split(b"\r\n")[0]
    except (BrokenPipeError, ConnectionResetError):
        pass
    assert strict.request("/health")[0] == 200


def test_slow_requests_are_cut_off(strict):
    """Headers, or a body, a byte at a time: each byte comes before the connection's own time limit, the whole never."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 4000\r\n\r\n"
    for begin in (b"GET /health HTTP/1.1\r\nX-Slow: ", head, b""):
        with strict.connect() as client:
            begun = time.monotonic()
            client.sendall(begin)
            client.settimeout(0.2)
            try:
                while time.monotonic() - begun < 15 * SLOWER:
                    if begin:
                        client.sendall(b" ")
                    try:
                        if client.recv(1000) == b"":
                            break
                    except TimeoutError:
                        pass
            except (BrokenPipeError, ConnectionResetError):
                pass
            assert 1.5 < time.monotonic() - begun < 10 * SLOWER, begin


def test_more_connections_than_there_may_be(strict):
    idle = []
    try:
        for _ in range(40):
            idle.append(strict.connect())
        time.sleep(0.5)
    finally:
        pass
    deadline = time.monotonic() + 20 * SLOWER  # the idle ones are cut off, then there is room again
    while True:
        try:
            assert strict.request("/health", timeout=5)[0] == 200
            break
        except OSError:
            assert time.monotonic() < deadline
    for client in idle:
        client.close()


def test_a_client_that_does_not_read(model_directory, tmp_path):
    """Its buffers fill, its time runs out, its slot is free again."""
    from conftest import make_model

    with Server("--model", make_model(tmp_path / "m", 1 << 17), "--context", 100000, "--slots", 1, "--request-seconds", 1, "--name", "tiny") as server:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", server.port))
            body = json.dumps({"model": "tiny", "prompt": "the", "max_tokens": 90000, "ignore_eos": True, "stream": True, "temperature": 0}).encode()
            client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            wait_until(lambda: server.metric("sequences_running") + server.metric("requests_cancelled_total") == 1)  # the first of the two
            assert server.text("in", max_tokens=5, ignore_eos=True) is not None
            assert server.metric("requests_cancelled_total") == 1


def test_many_at_once(strict):
    wrong = []

    def ask(number):
        for _ in range(10):
            status, reply = strict.request("/v1/completions", {"model": "tiny", "prompt": "the", "max_tokens": 3, "temperature": 0})
            if status != 200:
                wrong.append((number, status, reply))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_metrics(strict):
    before = strict.metric("generated_tokens_total")
    strict.complete("the", max_tokens=7, ignore_eos=True)
    assert strict.metric("generated_tokens_total") == before + 7
    _, text = strict.request("/metrics")
    assert 'plora_http_requests_total{code="400"}' in text
    assert strict.metric("time_to_first_token_seconds_count") == strict.metric('time_to_first_token_seconds_bucket{le="+Inf"}') > 0
    assert strict.metric("sequences_running") == 0 and strict.metric("sequences_waiting") == 0
    for line in text.splitlines():
        assert line.startswith("# ") or len(line.rsplit(" ", 1)) == 2 and float(line.rsplit(" ", 1)[1]) >= 0
