# SPDX-License-Identifier: Apache-2.0
"""The tokenizer against the package `tokenizers`: frozen answers in vectors_tokenizer.json, and random text, live.

The vocabulary is trained here, by the package, on the repository's own text and the samples below: every byte has a token. Three ways to
treat digits. `python test_tokenizer.py` writes the frozen answers anew.
"""
import json
import random
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY, Server
from reference import write_safetensors
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

VECTORS = Path(__file__).with_name("vectors_tokenizer.json")
VOCABULARY = 700
DIGITS = {"alone": True, "together": False, "kept": None}
SAMPLES = [
    "The quick brown fox jumps over the lazy dog.", "I'm, you're, he's, we'll, they'd, I've, don't; 'tis, 'S 'LL rock'n'roll''s",
    "It’s not ‘the same’ apostrophe", "a1b22c333 4444 1,234.56 0x1F ٣٤٥ ⅷ Ⅻ ½ ² 〇", "  two  spaces   and\ttabs\t\tand \n newlines\n\n\n  end  ",
    "\r\n\r\n dos\r\n", " ", "  ", "\n", "\u00a0nbsp\u2003em\u3000ideographic\u0085nel\u200bzwsp", "Grüße aus Köln, naïve café, Ærøskøbing, İstanbul",
    "Привет, мир! Ёлка", "こんにちは世界、カタカナ", "中文字符没有空格。", "한국어 텍스트", "مرحبا بالعالم", "שלום עולם", "नमस्ते दुनिया", "ไทยไม่มีช่องว่าง",
    "e\u0301 combining a\u030a\u0323", "😀😃 👩‍👩‍👧‍👦 🇩🇪🏴‍☠️ ❤️", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟘𝟙𝟚 \U0010ffff \ue000 \ufffd", "<|im_start|>user\nhi<|im_end|>\n<|im_start|>",
    "<|im_start|><|im_start|>x<|im_en d|> <|im_end|>>", "<<|im_end|>>< |im_end|>", "def f(x):\n    return x**2  # comment\n\tif x:\n", "https://a.b/c?d=e&f=%20g#h",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "!!!???...---___***", "\x01\x02\x1b[0m\x7f", "ﬁ ligature ſ ẞ ǅ ʰ", "1st 2nd 3rd 100% $5 €6 £7", "x" * 300 + " " * 300,
    "''''s''t're", "end with space ", " 's", "\u1680\u2028\u2029\u202f\u205f", "a\u0000b".replace("\0", "")]


def train():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY - 4, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(SAMPLES * 2 + [(ROOT / "LICENSE").read_text(encoding="utf-8")], trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False)
                                  for text in ("<|im_start|>", "<|im_end|>", "<|im_end|>>")])
    tokenizer.add_tokens([AddedToken("added", normalized=True)])
    return json.loads(tokenizer.to_str())


def variant(trained, individual):
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": individual}
    return trained | {"pre_tokenizer": byte_level if individual is None else {"type": "Sequence", "pretokenizers": [digits, byte_level]}}


def make_model(directory, tokenizer, vocabulary=VOCABULARY):
    """A model with this tokenizer and random weights, of one small layer."""
    directory.mkdir(parents=True)
    rng = np.random.default_rng(1)
    config = json.loads((TINY / "config.json").read_text()) | {"vocab_size": vocabulary, "num_hidden_layers": 1}
    layer = {"self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32), "self_attn.o_proj": (32, 32),
             "mlp.gate_proj": (48, 32), "mlp.up_proj": (48, 32), "mlp.down_proj": (32, 48), "input_layernorm": (32,),
             "post_attention_layernorm": (32,)}
    shapes = {f"model.layers.0.{name}.weight": shape for name, shape in layer.items()}
    shapes |= {"model.embed_tokens.weight": (vocabulary, 32), "model.norm.weight": (32,)}
    write_safetensors(directory / "model.safetensors", {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()})
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    return directory


@pytest.fixture(scope="module")
def trained():
    return json.loads(VECTORS.read_text(encoding="utf-8"))["tokenizer"]


@pytest.fixture(scope="module", params=DIGITS)
def pair(request, trained, tmp_path_factory):
    """(name, the package's tokenizer, a server with the same)"""
    tokenizer = variant(trained, DIGITS[request.param])
    directory = make_model(tmp_path_factory.mktemp("tokenizer") / request.param, tokenizer)
    with Server("--model", directory, "--context", 64, "--max-body", 1 << 24) as server:
        yield request.param, Tokenizer.from_str(json.dumps(tokenizer)), server


def encode(server, text):
    status, reply = server.request("/tokenize", {"prompt": text})
    assert status == 200 and reply["count"] == len(reply["tokens"]), reply
    return reply["tokens"]


def decode(server, ids):
    status, reply = server.request("/detokenize", {"tokens": ids})
    assert status == 200, reply
    return reply["prompt"]


def test_frozen(pair):
    name, _, server = pair
    for text, ids in zip(SAMPLES, json.loads(VECTORS.read_text(encoding="utf-8"))[name], strict=True):
        assert encode(server, text) == ids, text


def random_text(rng):
    kind = rng.random()
    if kind < 0.5:
        pieces = [piece for sample in SAMPLES for piece in sample.split(" ")] + [" ", "  ", "\n", "\t", "'", "1", "23", "added", "<|im_end|>", "é", "\u0301"]
        return "".join(rng.choice(pieces) for _ in range(rng.randint(1, 30)))
    ranges = [(1, 0x7f), (1, 0x7f), (0x80, 0x24f), (0x250, 0x3fff), (0x4e00, 0xd7ff), (0xe000, 0xffff), (0x10000, 0x1ffff), (0x20000, 0x10ffff)]
    return "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(1, 50)))


def test_random_text(pair):
    name, package, server = pair
    rng = random.Random(name)
    for _ in range(250):
        text = random_text(rng)
        want = package.encode(text, add_special_tokens=False).ids
        assert encode(server, text) == want, text
        assert decode(server, want) == package.decode(want, skip_special_tokens=True)


def test_random_tokens(pair):
    """Tokens that are no text: halves of characters, bytes that never make one."""
    _, package, server = pair
    rng = random.Random(3)
    for _ in range(150):
        ids = [rng.randrange(256) if rng.random() < 0.8 else rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 30))]
        assert decode(server, ids) == package.decode(ids, skip_special_tokens=True), ids


def test_long_words(pair):
    """A word of a megabyte takes n log n steps, not n^2."""
    _, package, server = pair
    for text in ("a" * 300000, "ab" * 100000, " " * 200000, "!" * 200000, "<|im_" * 20000):
        assert encode(server, text) == package.encode(text, add_special_tokens=False).ids


def changed(tokenizer, path, value):
    copy = json.loads(json.dumps(tokenizer))
    place = copy
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return copy


@pytest.mark.parametrize("path, value, part", [
    (["normalizer"], {"type": "NFC"}, "normalizer"), (["pre_tokenizer"], {"type": "Metaspace"}, "'Metaspace'"), (["pre_tokenizer"], None, "pre-tokenizer"),
    (["post_processor"], {"type": "TemplateProcessing"}, "TemplateProcessing"), (["decoder"], None, "decoder"), (["model", "type"], "Unigram", "Unigram"),
    (["model", "dropout"], 0.1, "dropout"), (["model", "byte_fallback"], True, "byte_fallback"), (["model", "vocab", "a"], 700, "[0, 700)"),
    (["model", "vocab", "a"], -1, "[0, 700)"), (["model", "vocab", "a"], 1.5, "[0, 700)"), (["model", "vocab", "a"], 5, "two tokens"), (["model", "vocab"], [], "model.vocab"),
    (["model", "merges"], [["a", "nope"]], "merge 0"), (["model", "merges"], ["ab"], "merge 0"), (["model", "merges"], [["a"]], "merge 0"),
    (["model", "merges"], None, "merges"), (["added_tokens", 0, "lstrip"], True, "lstrip"), (["added_tokens", 0, "content"], "", "empty"),
    (["added_tokens", 0, "id"], 5, "of another"), (["added_tokens"], {}, "no list")])
def test_what_is_not_supported_is_refused(trained, tmp_path, path, value, part):
    directory = make_model(tmp_path / "m", changed(variant(trained, True), path, value))
    with pytest.raises(RuntimeError) as error:
        Server("--model", directory, "--context", 64).stop()
    assert part in str(error.value)


def main():
    trained = train()
    vectors = {"tokenizer": trained}
    for name, individual in DIGITS.items():
        package = Tokenizer.from_str(json.dumps(variant(trained, individual)))
        vectors[name] = [package.encode(text, add_special_tokens=False).ids for text in SAMPLES]
    VECTORS.write_text(json.dumps(vectors, separators=(",", ":")) + "\n", encoding="ascii")


if __name__ == "__main__":
    main()
