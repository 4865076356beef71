"""Writes a LLaMA of SmolLM2-135M's shape with random bf16 weights, for both sides of the benchmark.

The time of a training step does not depend on the values, so nothing is downloaded. Standard library only.
"""

import json
import os
import random
import struct

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ONES = b"\x80\x3f"  # 1.0 in bf16, little-endian


def tensors(config):
    """(name, shape) in the order of the file."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        yield layer + "input_layernorm.weight", (hidden,)
        yield layer + "self_attn.q_proj.weight", (queries, hidden)
        yield layer + "self_attn.k_proj.weight", (keys, hidden)
        yield layer + "self_attn.v_proj.weight", (keys, hidden)
        yield layer + "self_attn.o_proj.weight", (hidden, queries)
        yield layer + "post_attention_layernorm.weight", (hidden,)
        yield layer + "mlp.gate_proj.weight", (inner, hidden)
        yield layer + "mlp.up_proj.weight", (inner, hidden)
        yield layer + "mlp.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)


def random_bf16(count, generator):
    """Values of either sign between 2^-7 and 2^-5: the sign and exponent bytes are chosen, the low byte is any."""
    high = generator.randbytes(count).translate(bytes((0xBC if i & 1 else 0x3C) for i in range(256)))
    values = bytearray(2 * count)
    values[0::2] = generator.randbytes(count)
    values[1::2] = high
    return values


def write(directory, config=None):
    """Makes the model directory unless it is there; returns its path."""
    config = config or CONFIG
    path = os.path.join(directory, "model.safetensors")
    if os.path.exists(path):
        return directory
    os.makedirs(directory, exist_ok=True)
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in tensors(config):
        size = 2 * shape[0] * (shape[1] if len(shape) == 2 else 1)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    generator = random.Random(0)
    with open(path + ".part", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, shape in tensors(config):
            file.write(ONES * shape[0] if len(shape) == 1 else random_bf16(shape[0] * shape[1], generator))
    with open(os.path.join(directory, "config.json"), "w", encoding="utf-8") as file:
        json.dump(config, file, indent=1)
    os.replace(path + ".part", path)
    return directory
