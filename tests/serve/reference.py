"""A LLaMA-family model in numpy and double precision, with LoRA: what the server must compute, written to be read.

Not here: speed, caches, batches. Every call computes the whole sequence.
"""
import json
import struct

import numpy as np

LINEARS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
           "mlp.down_proj"]


def read_safetensors(path):
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    tensors = {}
    for name, entry in json.loads(data[8:8 + size]).items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        raw = data[8 + size + begin:8 + size + end]
        if entry["dtype"] == "BF16":
            values = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.frombuffer(raw, {"F32": "<f4", "I64": "<i8"}[entry["dtype"]])
        tensors[name] = values.reshape(entry["shape"])
    return tensors


def write_safetensors(path, tensors):
    header, offset = {}, 0
    for name, value in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [offset, offset + value.nbytes]}
        offset += value.nbytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded
                     + b"".join(np.ascontiguousarray(value, np.float32).tobytes() for value in tensors.values()))


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


class Llama:
    def __init__(self, directory):
        self.config = json.loads((directory / "config.json").read_text())
        self.weights = {name: value.astype(np.float64)
                        for name, value in read_safetensors(directory / "model.safetensors").items()}
        c = self.config
        self.heads, self.kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
        self.size = c.get("head_dim") or c["hidden_size"] // self.heads
        theta = c["rope_parameters"]["rope_theta"]
        self.frequencies = theta ** (-2 * np.arange(self.size // 2) / self.size)

    def linear(self, name, x, lora):
        y = x @ self.weights[name + ".weight"].T
        if lora and name in lora:
            a, b, scale = lora[name]
            y = y + scale * (x @ a.T) @ b.T
        return y

    def norm(self, name, x):
        return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + self.config["rms_norm_eps"]) * self.weights[name + ".weight"]

    def rotate(self, x):
        """x[heads, T, D]: pairs (j, j + D / 2) turn by position x frequency."""
        angle = np.arange(x.shape[1])[:, None] * self.frequencies
        low, high = x[..., :self.size // 2], x[..., self.size // 2:]
        return np.concatenate([low * np.cos(angle) - high * np.sin(angle), high * np.cos(angle) + low * np.sin(angle)], axis=-1)

    def attention(self, prefix, x, lora):
        count = len(x)
        q, k, v = (self.linear(f"{prefix}.self_attn.{part}_proj", x, lora).reshape(count, -1, self.size).swapaxes(0, 1)
                   for part in "qkv")
        q, k = self.rotate(q), self.rotate(k)
        k, v = (np.repeat(part, self.heads // self.kv_heads, axis=0) for part in (k, v))
        scores = q @ k.swapaxes(1, 2) / np.sqrt(self.size)
        scores[:, np.triu_indices(count, 1)[0], np.triu_indices(count, 1)[1]] = -np.inf
        out = (softmax(scores) @ v).swapaxes(0, 1).reshape(count, -1)
        return self.linear(prefix + ".self_attn.o_proj", out, lora)

    def logits(self, ids, lora=None):
        """[T, vocabulary]"""
        x = self.weights["model.embed_tokens.weight"][ids]
        for layer in range(self.config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}"
            x = x + self.attention(prefix, self.norm(prefix + ".input_layernorm", x), lora)
            h = self.norm(prefix + ".post_attention_layernorm", x)
            gate = self.linear(prefix + ".mlp.gate_proj", h, lora)
            h = gate / (1 + np.exp(-gate)) * self.linear(prefix + ".mlp.up_proj", h, lora)
            x = x + self.linear(prefix + ".mlp.down_proj", h, lora)
        return self.norm("model.norm", x) @ self.weights["model.embed_tokens.weight"].T

    def greedy(self, ids, count, lora=None, eos=None):
        """Up to `count` new tokens, and for each the lead of its logit over the next: where that is tiny, rounding decides."""
        ids, leads = list(ids), []
        first = len(ids)
        for _ in range(count):
            logits = self.logits(ids, lora)[-1]
            best = int(logits.argmax())
            second = np.partition(logits, -2)[-2]
            if best == eos:
                break
            ids.append(best)
            leads.append(logits[best] - second)
        return ids[first:], leads


def random_lora(model, rank, alpha, seed, targets=LINEARS, size=0.3):
    """{layer: (a, b, scale)}"""
    rng = np.random.default_rng(seed)
    layers = {}
    for name, weight in model.weights.items():
        short = name.removesuffix(".weight")
        if any(short.endswith(target) for target in targets):
            a = rng.standard_normal((rank, weight.shape[1])).astype(np.float32) * np.float32(size)
            b = rng.standard_normal((weight.shape[0], rank)).astype(np.float32) * np.float32(size)
            layers[short] = (a.astype(np.float64), b.astype(np.float64), alpha / rank)
    return layers


def save_lora(directory, lora, rank, alpha):
    """A PEFT directory, complete before it has its name."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, (a, b, _) in lora.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.astype(np.float32)
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.astype(np.float32)
    write_safetensors(directory / "adapter_model.safetensors", tensors)
    (directory / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none",
        "fan_in_fan_out": False, "inference_mode": True, "use_rslora": False, "use_dora": False,
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in lora})}))
