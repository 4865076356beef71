"""Weights as bitsandbytes holds them, found by their attributes: bitsandbytes itself is not imported.

    Linear4bit     weight: codes, two a byte; weight.quant_state: NF4, blocksize 64, absmax fp32 or itself quantised (state2, offset)
    Linear8bitLt   weight: int8 codes [N,K]; SCB [N] = max|W| of each row, on the weight, after a first forward on module.state

All is used where it is, and written there by unloads; but the scales of int8, which are SCB / 127, are a copy, from which SCB is written.
"""

import json
from typing import Any, Dict, List, Optional, Tuple

import torch
from torch import nn

from ._memory import CPU, CUDA
from ._quantised import Quantised

BLOCK, NESTED_BLOCK = 64, 256  # of NF4
INVERSE = 1.0 / 127.0  # as bitsandbytes multiplies


def is_quantised(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return False
    return hasattr(weight, "quant_state") or (hasattr(weight, "SCB") and hasattr(weight, "CB"))


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().as_subclass(torch.Tensor)


def _state_of(module: nn.Module) -> Any:
    state = module.weight.quant_state
    return getattr(module, "quant_state", None) if state is None else state


def _scb_of(module: nn.Module) -> Optional[torch.Tensor]:
    scb = module.weight.SCB
    return getattr(getattr(module, "state", None), "SCB", None) if scb is None else scb


def problem(module: nn.Module) -> str:
    """Why a quantised module cannot have an adapter; "" = it can."""
    weight, kind = module.weight, f"{type(module).__module__}.{type(module).__name__}"
    if hasattr(weight, "quant_state"):
        return _problem_4bit(module, kind)
    if weight.dtype != torch.int8:
        return f"is a {kind} that keeps a weight of {weight.dtype}: must hold int8 (has_fp16_weights=False, moved to its device)"
    if weight.dim() != 2 or not weight.is_contiguous():
        return f"is a {kind} with codes of shape {tuple(weight.shape)}, strides {weight.stride()}: must be [N,K] without gaps"
    scb = _scb_of(module)
    if scb is None or scb.dtype != torch.float32 or scb.numel() != weight.shape[0] or scb.device != weight.device:
        return f"is a {kind} without its SCB, fp32 [{weight.shape[0]}], on {weight.device}"
    codes = getattr(getattr(module, "state", None), "CB", None)
    if codes is not None and codes.data_ptr() != weight.data_ptr():
        return f"is a {kind} whose codes are in two places, weight and state.CB"
    return ""


def _problem_4bit(module: nn.Module, kind: str) -> str:
    weight, state = module.weight, _state_of(module)
    if state is None:
        return f"is a {kind} that is not quantised yet: move it to its device first"
    if getattr(state, "packing_format_for_cpu", False):
        return f"is a {kind} packed for inference by its own forward: attach before, or load the model again"
    if state.quant_type != "nf4":
        return f"is quantised to {state.quant_type}: of 4 bits only nf4 is supported"
    if state.blocksize != BLOCK:
        return f"is quantised in blocks of {state.blocksize}: must be {BLOCK}"
    if state.shape is None or len(state.shape) != 2:
        return f"is a {kind} whose quant_state has shape {state.shape}: must be [N,K]"
    nested = state.state2 is not None
    if nested and state.state2.blocksize != NESTED_BLOCK:
        return f"has an absmax quantised in blocks of {state.state2.blocksize}: must be {NESTED_BLOCK}"
    parts = [state.absmax, *((state.state2.absmax, state.state2.code) if nested else ())]
    wanted = [torch.uint8 if nested else torch.float32, torch.float32, torch.float32]
    for part, dtype in zip(parts, wanted):
        if part.dtype != dtype or part.device != weight.device or not part.is_contiguous():
            return f"is a {kind} with statistics of {part.dtype} on {part.device}: must be {dtype} on {weight.device}, without gaps"
    elements = state.shape[0] * state.shape[1]
    if not weight.is_contiguous() or weight.numel() * weight.element_size() != (elements + 1) // 2:
        return f"is a {kind} with {weight.numel() * weight.element_size()} bytes of codes for {elements} weights"
    return ""


class QuantisedWeight:
    """The weight of a quantised module, as the library takes it."""

    def __init__(self, module: nn.Module) -> None:
        weight = module.weight
        self.device = weight.device
        self.scb: Optional[torch.Tensor] = None
        place = (CPU, 0) if weight.device.type == "cpu" else (CUDA, weight.device.index or 0)
        codes = _plain(weight).view(-1)
        if hasattr(weight, "quant_state"):
            state = _state_of(module)
            nested = state.state2
            self.described = Quantised(
                "nf4", tuple(state.shape), codes.view(torch.uint8), state.absmax if nested is None else nested.absmax,
                nested_codes=None if nested is None else state.absmax, map=None if nested is None else nested.code,
                offset=0.0 if nested is None else float(state.offset), device=place,
            )  # fmt: skip
        else:
            self.scb = _plain(_scb_of(module))
            self.described = Quantised("int8", tuple(weight.shape), codes, self.scb.view(-1) * INVERSE, device=place)

    def written(self) -> None:
        """After the library has written codes and scales."""
        if self.scb is not None:
            self.scb.copy_((self.described.scales * 127.0).view_as(self.scb))

    def tensors(self) -> List[torch.Tensor]:
        """All that the values are made of."""
        parts = (self.described.codes, self.described.scales, self.described.nested_codes)
        return [part for part in parts if part is not None]

    def load(self, state: Dict[str, Any], prefix: str, errors: List[str]) -> Dict[str, Any]:
        """Takes a 4-bit weight's statistics out of a state dict, which bitsandbytes saves and does not load; returns the rest."""
        if self.scb is not None:
            return state
        own = prefix + "weight."
        found = {key[len(own) :]: value for key, value in state.items() if key.startswith(own)}
        if not found:
            return state
        described = self.described
        nested = described.nested_codes is not None
        packed = found.get("quant_state.bitsandbytes__nf4")
        values = json.loads(bytes(packed.cpu().tolist())) if packed is not None else {}
        same = values.get("shape", list(described.shape)) == list(described.shape) and values.get("blocksize", BLOCK) == BLOCK
        if not same or nested != ("nested_absmax" in found) or values.get("nested_offset", described.offset) != described.offset:
            errors.append(f"{own}quant_state is of another weight or layout: {values}")
            return {key: value for key, value in state.items() if not key.startswith(own)}
        pairs: List[Tuple[str, Any]] = [("absmax", described.nested_codes if nested else described.scales)]
        if nested:
            pairs.append(("nested_absmax", described.scales))
        for name, target in pairs:
            if name in found and found[name].numel() == target.numel():
                target.copy_(found[name].view_as(target))
            else:
                errors.append(f"{own}{name} is missing or of another size")
        return {key: value for key, value in state.items() if not key.startswith(own)}
