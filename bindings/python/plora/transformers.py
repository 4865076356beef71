"""PeriodicLoRA in Hugging Face's Trainer, and a loss that takes little memory.

    adapters = plora.torch.attach(model, rank=16)
    trainer = Trainer(model, args, train_dataset=data, callbacks=[PeriodicUnload(adapters, every=200)],
                      optimizers=(plora.torch.AdamW(adapters, lr=2e-4), None))

Without `optimizers` Trainer makes one of torch.optim over adapters.parameters, whose state unloads reset just the same.

    model.loss_function = plora.transformers.causal_lm_loss

transformers' own loss makes up to four arrays of the logits' size, in fp32; this one a gradient in their dtype and nothing else.
"""

from typing import Any, Callable, Iterable, List, Optional, Union

import torch
from torch.nn import functional
from transformers import TrainerCallback

from ._handles import UnloadReport
from ._native import Error, InvalidArgument
from .torch import Adapters

__all__ = ["PeriodicUnload", "causal_lm_loss"]

CHUNK_BYTES = 4 << 20  # of logits in fp32 at a time: what a cache holds


class PeriodicUnload(TrainerCallback):
    """Unloads after every `every` optimizer steps, or after those that `steps` names or says yes to.

    every     optimizer steps of a stage: Trainer's global_step, not forward passes; accumulation and evaluation do not count
    steps     instead: step numbers, counted from 1, or a function of the step number
    reports   what each unload of this process returned, as (step, report)
    options   of Adapters.unload(): momentum, moments, rounding, report

    Which steps are due depends on the step number alone, and Trainer's checkpoints hold the adapters in the model's state and with
    plora's optimizers in the optimizer's, so that a resumed run goes on as if it had not stopped. That they were loaded is checked.
    """

    def __init__(
        self, adapters: Adapters, every: Optional[int] = None,
        steps: Union[None, Iterable[int], Callable[[int], bool]] = None, **options: Any,
    ) -> None:  # fmt: skip
        if (every is None) == (steps is None):
            raise InvalidArgument("give either every= or steps=")
        if every is not None and (not isinstance(every, int) or every < 1):
            raise InvalidArgument(f"every = {every!r}: must be an integer >= 1")
        self.adapters, self.options = adapters, options
        self.reports: List[Any] = []
        if every is not None:
            self._due: Callable[[int], bool] = lambda step: step % every == 0
        elif callable(steps):
            self._due = steps
        else:
            chosen = frozenset(steps or ())
            self._due = lambda step: step in chosen

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        due = sum(bool(self._due(step)) for step in range(1, state.global_step + 1))
        if self.adapters.stage < due:
            raise Error(
                f"training resumes after step {state.global_step} with {due} unloads due so far, but the adapters are in stage "
                f"{self.adapters.stage}: the checkpoint did not load their state"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if self._due(state.global_step):
            self.unload(state.global_step, given.get("optimizer"))

    def unload(self, step: int, optimizer: Any) -> Optional[UnloadReport]:
        """For subclasses: what is done when a step is due."""
        report = self.adapters.unload(optimizer, **self.options)
        self.reports.append((step, report))
        return report


# ---------------------------------------------------------------------------------------------------------------- loss


class _CrossEntropy(torch.autograd.Function):
    """sum over t of logsumexp(z[t]) - z[t, label[t]], for logits z [T,V] of any dtype in fp32, a few rows at a time.

    Saved are z, which is there, and the logsumexp [T]. backward: softmax(z[t]) - onehot(label[t]), in z's dtype.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
        counted = labels != ignore_index
        labels = torch.where(counted, labels, 0)
        sums = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
        for rows in _chunks(logits):
            torch.logsumexp(logits[rows].float(), -1, out=sums[rows])
        ctx.save_for_backward(logits, labels, counted, sums)
        losses = sums - logits.gather(1, labels[:, None]).squeeze(1).float()
        return torch.where(counted, losses, 0.0).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        logits, labels, counted, sums = ctx.saved_tensors
        result = torch.empty_like(logits)
        factors = torch.where(counted, gradient, 0.0)
        for rows in _chunks(logits):
            part = (logits[rows].float() - sums[rows, None]).exp_()
            part[torch.arange(part.shape[0], device=part.device), labels[rows]] -= 1.0
            torch.mul(part, factors[rows, None], out=result[rows]) if result.dtype == part.dtype else result[rows].copy_(
                part.mul_(factors[rows, None])
            )
        return result, None, None


def _chunks(logits: torch.Tensor) -> Iterable[slice]:
    step = max(1, CHUNK_BYTES // (4 * max(1, logits.shape[1])))
    return (slice(begin, begin + step) for begin in range(0, logits.shape[0], step))


def causal_lm_loss(
    logits: torch.Tensor, labels: Optional[torch.Tensor], vocab_size: int, num_items_in_batch: Any = None, ignore_index: int = -100,
    shift_labels: Optional[torch.Tensor] = None, **_: Any,
) -> torch.Tensor:  # fmt: skip
    """What transformers' ForCausalLMLoss computes, in fp32, a few rows of logits at a time: for `model.loss_function`.

    logits [..., tokens, vocab_size]; labels [..., tokens], which it shifts by one, or shift_labels, shifted already.
    """
    if shift_labels is None:
        shift_labels = functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    flat = shift_labels.reshape(-1).to(logits.device)
    total = _CrossEntropy.apply(logits.reshape(-1, vocab_size), flat, ignore_index)
    if num_items_in_batch is None:
        return total / (flat != ignore_index).sum()
    return total / (num_items_in_batch.to(total.device) if torch.is_tensor(num_items_in_batch) else num_items_in_batch)
