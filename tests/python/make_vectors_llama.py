#!/usr/bin/env python3
"""Writes ../data/tiny_llama_*: two random tiny LLaMA models, and what transformers and PEFT compute with them.

    python make_vectors_llama.py        needs torch, transformers and peft

    tied     grouped heads, tied head, head size 8, one file
    untied   attention and MLP bias, separate head, a head size that is not hidden / heads, llama3 rotary scaling, two shards

Weights are stored in bf16. vectors.safetensors holds, in fp32, three sequences of tokens (one longer than an attention block), the
positions with a loss, logits there, the mean loss, and for every linear layer LoRA's A and B and the loss's gradients with respect
to them. All was computed in fp64 from the weights as stored. bf16_logits_error and bf16_gradient_error are the relative errors,
in the Euclidean norm and the worst over the layers, that transformers and PEFT make with the model in bf16.
"""
import json
import pathlib
import warnings

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

RANK, ALPHA = 2, 4
LENGTHS, PROMPTS = (70, 3, 33), (50, 1, 12)
COMMON = dict(vocab_size=61, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
              rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2)
LLAMA3 = dict(rope_type="llama3", rope_theta=500.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)
MODELS = {
    "tied": dict(hidden_size=32, intermediate_size=48, tie_word_embeddings=True,
                 rope_parameters=dict(rope_type="default", rope_theta=1000.0)),
    "untied": dict(hidden_size=40, intermediate_size=56, head_dim=12, attention_bias=True, mlp_bias=True,
                   tie_word_embeddings=False, rope_parameters=LLAMA3),
}


def random_model(options, seed):
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**COMMON, **options))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" in name:
                value.copy_(1 + 0.2 * torch.randn_like(value))
            elif name.endswith("bias"):
                value.copy_(0.3 * torch.randn_like(value))
            else:
                value.copy_(torch.randn_like(value) / value.shape[-1] ** 0.5 * (2 if "embed" in name else 1))
    return model.to(torch.bfloat16)


def evaluate(directory, dtype, seed):
    """Everything but the model itself, as {name: fp32 tensor}, computed in dtype with adapters in at least fp32."""
    generator = torch.Generator().manual_seed(seed)
    # Loaded anew: the rotary frequencies of the model in memory were rounded to bf16 with its weights.
    model = LlamaForCausalLM.from_pretrained(directory, dtype=dtype)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
                                                                 "down_proj"])
    wrapped = get_peft_model(model, config)
    layers = {}
    for name, value in wrapped.named_parameters():
        if "lora_" in name:
            random = (0.3 * torch.randn(value.shape, generator=generator)).float()
            value.data = random.double() if dtype == torch.float64 else random
            short = name.removeprefix("base_model.model.").replace(".lora_A.default.weight", ".a").replace(
                ".lora_B.default.weight", ".b")
            layers[short] = value
    ids, logits, losses = [], [], []
    for length, prompt in zip(LENGTHS, PROMPTS):
        sequence = torch.randint(0, COMMON["vocab_size"], (length + 1,), generator=generator)
        output = wrapped(input_ids=sequence[None, :-1]).logits[0, prompt - 1:]
        output = output if dtype == torch.float64 else output.float()
        losses.append(torch.nn.functional.cross_entropy(output, sequence[prompt:], reduction="sum"))
        ids.append(sequence)
        logits.append(output)
    loss = sum(losses) / sum(len(part) for part in logits)
    loss.backward()
    tensors = {"ids": torch.cat(ids), "lengths": torch.tensor(LENGTHS), "prompts": torch.tensor(PROMPTS),
               "logits": torch.cat(logits), "loss": loss.reshape(1)}
    for name, value in layers.items():
        tensors[name] = value
        tensors[name + "_gradient"] = value.grad
    return {name: value.detach().float().contiguous() for name, value in tensors.items()}


def vectors(directory, seed):
    exact, rounded = evaluate(directory, torch.float64, seed), evaluate(directory, torch.bfloat16, seed)
    errors = {name: ((rounded[name] - exact[name]).norm() / exact[name].norm()).item() for name in exact}
    assert errors["ids"] == 0 and all(errors[name] == 0 for name in errors if name.endswith((".a", ".b")))
    exact["bf16_logits_error"] = torch.tensor([errors["logits"]])
    exact["bf16_gradient_error"] = torch.tensor([max(value for name, value in errors.items() if "gradient" in name)])
    return exact


def write(name, seed):
    directory = pathlib.Path(__file__).resolve().parent.parent / "data" / f"tiny_llama_{name}"
    directory.mkdir(parents=True, exist_ok=True)
    model = random_model(MODELS[name], seed)
    model.config.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config.update(architectures=["LlamaForCausalLM"], dtype="bfloat16")
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    weights = {key: value.contiguous() for key, value in model.state_dict().items()
               if not (key == "lm_head.weight" and model.config.tie_word_embeddings)}
    if name == "untied":
        shards = [{}, {}]
        for key, value in weights.items():
            shards["layers.1" in key or "lm_head" in key][key] = value
        files = [f"model-0000{i + 1}-of-00002.safetensors" for i in range(2)]
        for file, shard in zip(files, shards):
            save_file(shard, directory / file, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": {key: file for file, shard in zip(files, shards) for key in sorted(shard)}}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    else:
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    save_file(vectors(directory, seed + 1), directory / "vectors.safetensors")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    for number, model_name in enumerate(MODELS):
        write(model_name, 10 * number)
