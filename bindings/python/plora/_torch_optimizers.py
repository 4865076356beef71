"""The library's optimizers as optimizers of torch: one fused pass over all of A and B."""

import math
from typing import Any, Dict, Mapping, Optional, Tuple

import torch

from . import _handles
from ._handles import StepReport
from ._native import Error, InvalidArgument, NonFinite, Unsupported

CHECKPOINT = "plora_checkpoint"  # in state dicts: the library's own file, as bytes


class Optimizer(torch.optim.Optimizer):
    """The library's optimizer as one of torch.optim, so that schedulers, Trainer and accelerate take it."""

    def __init__(self, adapters: Any, lr: float, **options: Any) -> None:
        from .torch import Adapters

        if not isinstance(adapters, Adapters):
            raise InvalidArgument(f"a {type(adapters).__name__} is no set of adapters: the result of attach() is")
        adapters._check_attached()
        self.adapters = adapters
        self._clip = 0.0
        if adapters._group.parallel:  # no rank has all gradients: step() clips
            self._clip, options["clip"] = float(options.get("clip", 0.0)), 0.0
        self.core = _handles.Optimizer(adapters.core, lr, **options)
        self.last_step: Optional[StepReport] = None
        self._rate = float(lr)
        super().__init__([adapters.parameters], {"lr": float(lr)})

    @property
    def learning_rate(self) -> float:
        """Of A in the next step: the group's lr times the schedule's factor."""
        self._take_rate()
        return self.core.learning_rate

    def _take_rate(self) -> None:
        """A scheduler of the host's has written the group's lr."""
        rate = float(self.param_groups[0]["lr"])
        if rate != self._rate:
            self.core.set_learning_rate(rate)
            self._rate = rate

    @torch.no_grad()
    def step(self, closure: Any = None, *, gradient_scale: float = 1.0, report: bool = False) -> Any:  # type: ignore[override]
        """One update from the gradients times gradient_scale. NonFinite: nothing changed, not counted.

        Returns what the closure does. report: last_step gets gradient norm, rate and count; on CUDA that waits for the device.
        """
        self.adapters._check_attached()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._take_rate()
        self.adapters.open_gradients()
        norm = None
        if self.adapters._group.parallel:
            norm = gradient_scale * self.adapters.gradient_norm()
            if not math.isfinite(norm):
                raise NonFinite(f"the norm of the gradients over all ranks is {norm}: nothing changed")
            gradient_scale *= min(1.0, self._clip / norm) if self._clip > 0.0 and norm > 0.0 else 1.0
        self.last_step = self.core.step(gradient_scale, report, self.adapters.stream())
        if norm is not None and self.last_step is not None:
            self.last_step = self.last_step._replace(gradient_norm=norm)
        self.adapters._changed()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Sets the gradient arena to 0; it stays the parameter's .grad."""
        self.core.zero_gradients(self.adapters.stream())
        self.adapters.parameters.grad = self.adapters.gradients

    def reset(self) -> None:
        """Moments, step counter and schedule, as an unload does."""
        self.core.reset(self.adapters.stream())

    def add_param_group(self, group: Dict[str, Any]) -> None:
        if getattr(self, "param_groups", None):
            raise Unsupported("the optimizer is of its adapters alone: give other parameters one of their own")
        super().add_param_group(group)

    def state_dict(self) -> Dict[str, Any]:
        """Adapters, moments, counters, stage, schedule and residuals, to the bit; and the groups as torch has them."""
        self._take_rate()
        state = super().state_dict()
        state["state"] = {}
        state[CHECKPOINT] = self.adapters._checkpoint(self)
        state["dropout_step"] = self.adapters._mask_step
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Into an optimizer made with the same options. Loads the adapters, too. An error has changed nothing."""
        if CHECKPOINT not in state:
            raise InvalidArgument(f"no state of this optimizer: it has no '{CHECKPOINT}'")
        self._take_rate()
        before = self._rate
        saved = float(state["param_groups"][0]["lr"])
        self.core.set_learning_rate(saved)
        try:
            self.adapters._restore(state[CHECKPOINT], self)
        except Error:
            self.core.set_learning_rate(before)
            raise
        self._rate = saved
        self.adapters._mask_step = int(state.get("dropout_step", 0))
        super().load_state_dict({"state": {}, "param_groups": state["param_groups"]})

    def __reduce_ex__(self, _: Any) -> Any:
        raise TypeError("the optimizer cannot be pickled or copied: it owns memory of libplora. Use state_dict()")

    def __deepcopy__(self, _: Any) -> Any:
        return self.__reduce_ex__(None)

    def __repr__(self) -> str:
        return f"<plora.torch.{type(self).__name__} lr={self.param_groups[0]['lr']}>"


class AdamW(Optimizer):
    """AdamW (arXiv 1711.05101) over all adapters in one pass.

    lr            of A at the schedule's top; B has b_ratio times that (LoRA+)
    schedule      "constant", "linear", "cosine": over `period` steps of a stage, `warmup` of them rising, down to `final` of it;
                  each unload that resets the optimizer restarts it. "relora": one cosine over `period` steps in all, and `rewarmup`
                  steps after each unload
    clip          bound of the gradients' global L2 norm; 0 = none
    """

    def __init__(
        self, adapters: Any, lr: float = 2e-4, *, betas: Tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0, schedule: str = "constant", warmup: int = 0, period: int = 1000, rewarmup: int = 0,
        final: float = 0.0, b_ratio: float = 1.0, clip: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(
            adapters, lr, betas=betas, eps=eps, weight_decay=weight_decay, schedule=schedule, warmup=warmup, period=period,
            rewarmup=rewarmup, final=final, b_ratio=b_ratio, clip=clip,
        )  # fmt: skip


class SGD(Optimizer):
    """m = momentum m + g;  p <- p (1 - lr weight_decay) - lr m. The rest as AdamW."""

    def __init__(
        self, adapters: Any, lr: float, *, momentum: float = 0.0, weight_decay: float = 0.0, schedule: str = "constant",
        warmup: int = 0, period: int = 1000, rewarmup: int = 0, final: float = 0.0, b_ratio: float = 1.0, clip: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(
            adapters, lr, algorithm="sgd", betas=(momentum, 0.999), weight_decay=weight_decay, schedule=schedule,
            warmup=warmup, period=period, rewarmup=rewarmup, final=final, b_ratio=b_ratio, clip=clip,
        )  # fmt: skip
