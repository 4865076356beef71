"""PeriodicLoRA in Hugging Face's Trainer, as short as it gets.

    pip install bindings/python transformers accelerate
    python examples/python/finetune_transformers.py                    a tiny random LLaMA on counting, a minute
    python examples/python/finetune_transformers.py --model DIRECTORY  a model of your own on the same
"""

import argparse
import tempfile

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import plora.torch
from plora.transformers import PeriodicUnload


class Counting(torch.utils.data.Dataset):
    """Sequences that count up from a random start by a random step."""

    def __init__(self, vocabulary, length=32, size=512):
        generator = torch.Generator().manual_seed(0)
        start = torch.randint(vocabulary, (size, 1), generator=generator)
        stride = torch.randint(1, 6, (size, 1), generator=generator)
        self.tokens = (start + stride * torch.arange(length)) % vocabulary

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--period", type=int, default=50)
    parser.add_argument("--rank", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model)
    else:
        model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                                             num_attention_heads=4, num_key_value_heads=2))  # fmt: skip
    adapters = plora.torch.attach(model, rank=args.rank)
    optimizer = plora.torch.AdamW(adapters, lr=1e-2, schedule="cosine", warmup=5, period=args.period)
    callback = PeriodicUnload(adapters, every=args.period)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=args.steps, per_device_train_batch_size=16, logging_steps=args.period,
            lr_scheduler_type="constant", save_strategy="no", report_to=[], use_cpu=adapters.device.type == "cpu",
        )  # fmt: skip
        Trainer(
            model, arguments, train_dataset=Counting(model.config.vocab_size), callbacks=[callback], optimizers=(optimizer, None)
        ).train()
    for step, report in callback.reports:
        print(f"step {step}: {report}")
    adapters.detach()  # the model is an ordinary one again, with all that was learnt in its weights
    return model


if __name__ == "__main__":
    main()
