"""PeriodicLoRA in Hugging Face's Trainer.

    adapters = plora.torch.attach(model, rank=16)
    trainer = Trainer(model, args, train_dataset=data, callbacks=[PeriodicUnload(adapters, every=200)],
                      optimizers=(plora.torch.AdamW(adapters, lr=2e-4), None))

Without `optimizers` Trainer makes one of torch.optim over adapters.parameters, whose state unloads reset just the same.
"""

from typing import Any, Callable, Iterable, List, Optional, Union

from transformers import TrainerCallback

from ._handles import UnloadReport
from ._native import Error, InvalidArgument
from .torch import Adapters

__all__ = ["PeriodicUnload"]


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
