"""Trainer with PeriodicUnload: when it unloads, and that a resumed run ends with the bits of one that was not stopped."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

import models
import plora
import plora.torch as pt
from plora.transformers import PeriodicUnload, causal_lm_loss


class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        tokens = models.batch(index, 1, 9)[0]
        return {"input_ids": tokens, "labels": tokens}


def train(folder, last, own=True, resume=None, **options):
    model = models.llama()
    adapters = pt.attach(model, 4)
    callback = PeriodicUnload(adapters, **(options or {"every": 2}))
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=last, per_device_train_batch_size=2, gradient_accumulation_steps=2, save_steps=3,
        logging_steps=1, learning_rate=1e-2, lr_scheduler_type="constant", report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    optimizer = pt.AdamW(adapters, lr=1e-2, schedule="cosine", period=5) if own else None
    trainer = Trainer(model, arguments, train_dataset=Data(), callbacks=[callback], optimizers=(optimizer, None))
    trainer.train(resume_from_checkpoint=resume)
    return adapters, callback


@pytest.mark.parametrize("own", [True, False])
def test_resume(tmp_path, own):
    whole, callback = train(tmp_path / "whole", 6, own)
    assert [step for step, _ in callback.reports] == [2, 4, 6] and whole.stage == 3
    resumed, callback = train(tmp_path / "again", 6, own, resume=str(tmp_path / "whole" / "checkpoint-3"))
    assert [step for step, _ in callback.reports] == [4, 6]
    assert resumed.digest() == whole.digest()


def test_steps_by_list_and_by_rule(tmp_path):
    _, callback = train(tmp_path, 4, steps=[1, 4])
    assert [step for step, _ in callback.reports] == [1, 4]
    _, callback = train(tmp_path, 4, steps=lambda step: step == 3, momentum=0.5)
    assert [step for step, _ in callback.reports] == [3]


def test_refused():
    adapters = pt.attach(models.llama(), 2)
    for options in ({}, {"every": 0}, {"every": 2, "steps": [1]}):
        with pytest.raises(plora.InvalidArgument):
            PeriodicUnload(adapters, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary, rows, tokens", [(7, 1, 1), (53, 2, 11), (70000, 2, 37)])
@pytest.mark.parametrize("items", [None, 5, torch.tensor(5)])
def test_loss_is_transformers(dtype, vocabulary, rows, tokens, items):
    from transformers.loss.loss_utils import ForCausalLMLoss

    labels = torch.randint(0, vocabulary, (rows, tokens + 1))
    labels[0, 1] = -100
    shifted = [None, torch.roll(labels, -1, 1)]
    for shift in shifted:
        results = []
        for loss_of in (ForCausalLMLoss, causal_lm_loss):
            logits = (3 * torch.randn(rows, tokens + 1, vocabulary, generator=torch.Generator().manual_seed(1))).to(dtype).requires_grad_()
            loss = loss_of(logits, labels, vocabulary, num_items_in_batch=items, shift_labels=shift)
            (2 * loss).backward()
            results.append((loss.detach(), logits.grad))
        assert results[1][0].dtype == torch.float32 and results[1][1].dtype == dtype
        torch.testing.assert_close(*[loss for loss, _ in results], equal_nan=True)
        torch.testing.assert_close(*[gradient for _, gradient in results], rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-6)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        logits = torch.randn(1, 4, vocabulary, requires_grad=True)
        used = logits * 1
        loss = causal_lm_loss(used, labels[:1, :4].expand(1, -1) if tokens >= 3 else torch.zeros(1, 4, dtype=torch.long), vocabulary)
        used.mul_(2)
        loss.backward()


def test_a_model_takes_the_loss():
    model = models.llama()
    want = models.loss_of(model, models.batch())
    model.loss_function = causal_lm_loss
    torch.testing.assert_close(models.loss_of(model, models.batch()), want)
