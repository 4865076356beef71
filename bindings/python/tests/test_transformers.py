"""Trainer with PeriodicUnload: when it unloads, and that a resumed run ends with the bits of one that was not stopped."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

import models
import plora
import plora.torch as pt
from plora.transformers import PeriodicUnload


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
