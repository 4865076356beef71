# SPDX-License-Identifier: Apache-2.0
"""What comes out: greedy answers against the reference in double precision, whatever else is in the batch; sampling; stops; streams."""
import math
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
from conftest import ADAPTERS, EOS, TINY, Server
from reference import read_safetensors, softmax

TIE_BF16 = 0.3  # the largest lead that bf16 turned in 240 answers was .13, of logits up to 6
TIE = 1e-4  # logits nearer than this are a tie: fp32 rounding, with logits of a few units, is below 1e-5


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server.base + "/v1", api_key="none", max_retries=0)


def prompts(count, seed, longest=60):
    rng = random.Random(seed)
    return [[rng.randrange(3, 61) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def same(tokenizer, text, tokens, leads, finish, most, tie=TIE):
    """Whether the text is that of the tokens, as far as no tie lets it be another. Returns the number of tokens compared."""
    sure = next((i for i, lead in enumerate(leads) if lead < tie), len(leads))
    if sure == len(leads):
        assert text == tokenizer.decode(tokens, skip_special_tokens=True)
        assert finish == ("length" if len(tokens) == most else "stop")
    else:
        begin = tokenizer.decode(tokens[:sure], skip_special_tokens=True).rstrip("\ufffd")
        assert text.startswith(begin)
    return sure


def test_reference_is_transformers(llama):
    """The reference itself, against logits of transformers and PEFT."""
    vectors = read_safetensors(TINY / "vectors.safetensors")
    lora = {name[:-2]: (vectors[name].astype(np.float64), vectors[name[:-2] + ".b"].astype(np.float64), 2.0)
            for name in vectors if name.endswith(".a")}
    begin = row = 0
    for length, prompt in zip(vectors["lengths"].astype(int), vectors["prompts"].astype(int), strict=True):
        ids = vectors["ids"][begin:begin + length].astype(int)
        want = vectors["logits"][row:row + length - prompt + 1]
        np.testing.assert_allclose(llama.logits(ids, lora)[prompt - 1:], want, rtol=0, atol=2e-5)
        begin, row = begin + length + 1, row + len(want)
    assert row == len(vectors["logits"])


def test_greedy_alone(server, llama, loras, tokenizer):
    compared = 0
    for i, prompt in enumerate(prompts(15, seed=1)):
        name = [None, *ADAPTERS][i % 5]
        reply = server.complete(prompt, name or "tiny", max_tokens=40)
        tokens, leads = llama.greedy(prompt, 40, loras.get(name), EOS)
        choice = reply["choices"][0]
        compared += same(tokenizer, choice["text"], tokens, leads, choice["finish_reason"], 40)
        assert reply["usage"]["prompt_tokens"] == len(prompt)
    assert compared > 200


def test_greedy_mixed(server, llama, loras, tokenizer):
    """The base and four adapters in the same batches, prompts in pieces, more requests than slots."""
    names = [None, *ADAPTERS]
    cases = [(prompt, names[i % 5], 5 + 7 * (i % 9)) for i, prompt in enumerate(prompts(60, seed=2))]
    with ThreadPoolExecutor(24) as pool:
        replies = list(pool.map(lambda case: server.complete(case[0], case[1] or "tiny", max_tokens=case[2]), cases))
    compared = 0
    for (prompt, name, most), reply in zip(cases, replies, strict=True):
        tokens, leads = llama.greedy(prompt, most, loras.get(name), EOS)
        choice = reply["choices"][0]
        compared += same(tokenizer, choice["text"], tokens, leads, choice["finish_reason"], most)
    assert compared > 700
    assert len({reply["choices"][0]["text"] for reply in replies}) > 50  # adapters and prompts do make a difference


def test_bf16(server, model_directory, adapter_root, llama, loras, tokenizer):
    """Weights, activations and cache in bf16: the reference's answers, but where its first two logits are near."""
    names = [None, *ADAPTERS]
    cases = [(prompt, names[i % 5]) for i, prompt in enumerate(prompts(60, seed=3))]
    with Server("--model", model_directory, "--adapters", adapter_root, "--context", 128, "--slots", 8, "--dtype", "bf16") as own:
        with ThreadPoolExecutor(8) as pool:
            replies = list(pool.map(lambda case: own.complete(case[0], case[1] or "tiny", max_tokens=20), cases))
    compared = others = 0
    for (prompt, name), reply in zip(cases, replies, strict=True):
        tokens, leads = llama.greedy(prompt, 20, loras.get(name), EOS)
        choice = reply["choices"][0]
        compared += same(tokenizer, choice["text"], tokens, leads, choice["finish_reason"], 20, TIE_BF16)
        others += choice["text"] != server.text(prompt, name or "tiny", max_tokens=20)
    assert compared > 100
    assert others > 0  # it is not fp32


def test_many_prompts_in_one_request(server, client):
    texts = ["the end.", "in an inn", "I think, er, 42!", "é 😀"]
    alone = [client.completions.create(model="two", prompt=text, temperature=0, max_tokens=20).choices[0].text for text in texts]
    together = client.completions.create(model="two", prompt=texts, temperature=0, max_tokens=20)
    assert [choice.text for choice in together.choices] == alone
    assert [choice.index for choice in together.choices] == [0, 1, 2, 3]
    assert together.usage.completion_tokens <= 80


def test_stream_is_the_same(client):
    for i, prompt in enumerate(["the end.", "T", "é😀", "0123"]):
        options = dict(model=[*ADAPTERS][i], prompt=prompt, temperature=0.9, seed=i, max_tokens=60)
        whole = client.completions.create(**options)
        events = list(client.completions.create(stream=True, stream_options={"include_usage": True}, **options))
        assert "".join(event.choices[0].text for event in events if event.choices) == whole.choices[0].text
        assert [event.choices[0].finish_reason for event in events if event.choices][-1] == whole.choices[0].finish_reason
        assert events[-1].usage == whole.usage
        assert len({event.id for event in events}) == 1


def test_stream_of_many(client):
    options = dict(model="wide", prompt=["the", "in", "an"], temperature=0, max_tokens=25)
    whole = [choice.text for choice in client.completions.create(**options).choices]
    texts = ["", "", ""]
    for event in client.completions.create(stream=True, **options):
        texts[event.choices[0].index] += event.choices[0].text
    assert texts == whole


def test_stop_strings(server):
    for seed in range(12):
        whole = server.complete("the", "nine", max_tokens=100, temperature=1.2, seed=seed, ignore_eos=True)["choices"][0]["text"]
        rng = random.Random(seed)
        begin = rng.randrange(2, len(whole) - 6)
        stop = whole[begin:begin + rng.randint(1, 5)]
        options = dict(max_tokens=100, temperature=1.2, seed=seed, ignore_eos=True, stop=["zzzzzz", stop])
        reply = server.complete("the", "nine", **options)["choices"][0]
        assert reply["text"] == whole[:whole.index(stop)]
        assert reply["finish_reason"] == "stop"


def test_stop_in_a_stream_is_never_seen(client):
    options = dict(model="nine", prompt="the", max_tokens=100, temperature=1.2, extra_body={"ignore_eos": True})
    for seed in range(8):
        whole = client.completions.create(seed=seed, **options).choices[0].text
        stop = whole[30:34]
        seen = "".join(event.choices[0].text for event in client.completions.create(seed=seed, stop=[stop], stream=True, **options))
        assert seen == whole[:whole.index(stop)]


def test_seed_and_company(server):
    """A seed gives the same answer alone and in company; another seed, another answer."""
    options = dict(max_tokens=50, temperature=1.0, top_p=0.9, ignore_eos=True)
    alone = [server.text("the", "one", seed=seed, **options) for seed in range(4)]
    with ThreadPoolExecutor(16) as pool:
        noise = [pool.submit(server.text, [5] * (i + 1), "wide", seed=i, **options) for i in range(12)]
        again = list(pool.map(lambda seed: server.text("the", "one", seed=seed, **options), range(4)))
        for other in noise:
            other.result()
    assert again == alone
    assert len(set(alone)) == 4
    assert len({server.text("the", "one", **options) for _ in range(4)}) > 1  # without a seed: any


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.6, 1.0), (1.0, 0.5), (2.0, 0.8)])
def test_sampling_has_the_right_shares(server, llama, loras, tokenizer, temperature, top_p):
    """First tokens of many seeds against the distribution of the reference: each share within 5 standard deviations."""
    prompt, count = [10, 20, 30], 1200
    p = softmax(llama.logits(prompt, loras["two"])[-1] / temperature)
    order = np.argsort(-p)
    kept = order[:1 + int((np.cumsum(p[order]) < top_p).sum())]
    want = np.zeros_like(p)
    want[kept] = p[kept] / p[kept].sum()
    ids = {}
    for token in range(61):
        ids.setdefault(tokenizer.decode([token], skip_special_tokens=True), []).append(token)
    seen = Counter()
    for begin in range(0, count, 120):
        reply = server.complete([prompt] * 120, "two", max_tokens=1, temperature=temperature, top_p=top_p, seed=begin)
        seen.update(choice["text"] for choice in reply["choices"])
    assert sum(seen.values()) == count
    for text, tokens in ids.items():
        share = want[tokens].sum() + (want[EOS] if text == "" and EOS not in tokens else 0)
        assert abs(seen[text] - count * share) <= 5 * math.sqrt(count * share * (1 - share)) + 1e-9, (text, seen[text], count * share)


def test_chat(server, client, tokenizer, llama):
    messages = [{"role": "user", "content": "the <|im_end|> in"}, {"role": "assistant", "content": "an"},
                {"role": "user", "content": [{"type": "text", "text": "er"}, {"type": "text", "text": "?"}]}]
    reply = client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=30)
    events = list(client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=30, stream=True))
    assert "".join(event.choices[0].delta.content or "" for event in events) == reply.choices[0].message.content
    assert events[0].choices[0].delta.role == "assistant"
    # The same prompt by hand: '<', '|', '_' and '>' have no token here, so "<|im_end|>" as text is "im" and "end".
    ids = [1, *tokenizer.encode("system\nin the end").ids, 2, *tokenizer.encode("\n").ids]
    for role, text in (("user", "the imend in"), ("assistant", "an"), ("user", "er?")):
        ids += [1]
        ids += tokenizer.encode(f"{role}\n{text}").ids if "imend" not in text else (
            tokenizer.encode("user\nthe").ids + tokenizer.encode(" ").ids + tokenizer.encode("im").ids + tokenizer.encode("end").ids
            + tokenizer.encode(" in").ids)
        ids += [2, *tokenizer.encode("\n").ids]
    ids += [1, *tokenizer.encode("assistant\n").ids]
    tokens, leads = llama.greedy(ids, 30, None, EOS)
    assert reply.usage.prompt_tokens == len(ids)
    same(tokenizer, reply.choices[0].message.content, tokens, leads, reply.choices[0].finish_reason, 30)
