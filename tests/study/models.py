# SPDX-License-Identifier: Apache-2.0
"""The character models of the study, two blocks each: LLaMA, GPT-2 and OPT of about 0.25 M parameters, and a LLaMA of 0.7 M.

They are made by transformers from configurations, with random weights, and trained once on the text "base"; the result is kept
in build/study. The fine-tuning runs start from it. digest() tells one such base from another: floating point may differ
between machines.
"""

import contextlib
import fcntl
import hashlib
import math
from pathlib import Path

import torch
from corpus import ALPHABET, WINDOW, Task

WIDTHS = {"small-llama": 96, "small-gpt2": 96, "small-opt": 96, "llama": 160}
PRETRAIN = {"steps": 1500, "batch": 8, "lr": 3e-3, "warmup": 50}
BATCH = 4
SPECIAL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "use_cache": False}


def create(name, seed=0):
    import transformers as hf

    torch.manual_seed(seed)
    vocabulary, width, kind = len(ALPHABET), WIDTHS[name], name.rpartition("-")[2]
    if kind == "llama":
        model = hf.LlamaForCausalLM(hf.LlamaConfig(
            vocab_size=vocabulary, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=WINDOW, tie_word_embeddings=False, **SPECIAL))  # fmt: skip
    elif kind == "gpt2":
        model = hf.GPT2LMHeadModel(hf.GPT2Config(
            vocab_size=vocabulary, n_embd=width, n_layer=2, n_head=4, n_positions=WINDOW, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, **SPECIAL))  # fmt: skip
    else:
        model = hf.OPTForCausalLM(hf.OPTConfig(
            vocab_size=vocabulary, hidden_size=width, ffn_dim=4 * width, num_hidden_layers=2, num_attention_heads=4,
            word_embed_proj_dim=width, max_position_embeddings=WINDOW, dropout=0.0, **SPECIAL))  # fmt: skip
    return model.eval()  # no dropout anywhere; gradients do not depend on it


def linear_layers(model):
    """What is trained, by every method: the linear layers of the blocks, as "all-linear" means them."""
    kinds = (torch.nn.Linear,) + tuple(k for k in {type(m) for m in model.modules()} if k.__name__ == "Conv1D")
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds) and name != "lm_head"}


def losses(model, rows, weights):
    """Cross entropy in nats per character, the mean over those that count; and which predictions were right."""
    rows = torch.from_numpy(rows)
    weights = torch.from_numpy(weights)
    logits = model(input_ids=rows[:, :-1]).logits.float()
    each = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), rows[:, 1:].reshape(-1), reduction="none")
    return (each * weights.reshape(-1)).sum() / weights.sum(), logits, rows


@torch.no_grad()
def evaluate(model, task, part):
    """(loss, share of sums whose three digits are all right; None for a text).

    Greedy decoding gives exactly the answer if and only if each digit is the likeliest after the right ones before it.
    """
    rows, weights = task.held_out(part)
    total, right, problems = 0.0, 0, 0
    for start in range(0, len(rows), 32):
        chunk, count = rows[start : start + 32], weights[start : start + 32]
        loss, logits, tensor = losses(model, chunk, count)
        total += float(loss) * len(chunk)
        if task.sums:
            hit = (logits.argmax(-1) == tensor[:, 1:]).numpy() | (count == 0)
            length = task.arrays[part].shape[1]
            lines = hit[:, : WINDOW // length * length].reshape(len(chunk), -1, length).all(-1)
            right, problems = right + int(lines.sum()), problems + lines.size
    return total / len(rows), right / problems if problems else None


def cosine(step, steps, warmup):
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@contextlib.contextmanager
def only_one(path):
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def pretrained(name, build):
    """The model, trained on "base" by whoever comes first; the others wait."""
    path = Path(build) / "study" / f"base-{name}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    model = create(name)
    with only_one(path.with_suffix(".lock")):
        if not path.exists():
            task = Task("base", build, 0)
            optimizer = torch.optim.AdamW(model.parameters(), PRETRAIN["lr"], weight_decay=0.01)
            schedule = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: cosine(step, PRETRAIN["steps"], PRETRAIN["warmup"]))  # fmt: skip
            for _ in range(PRETRAIN["steps"]):
                losses(model, *task.batch(PRETRAIN["batch"]))[0].backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            torch.save({"model": model.state_dict(), "loss": evaluate(model, task, "test")[0]}, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["model"])
    return model, saved["loss"]


def digest(model):
    state = hashlib.blake2b(digest_size=6)
    for tensor in model.state_dict().values():
        state.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()
