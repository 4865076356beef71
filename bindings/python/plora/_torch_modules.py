"""Which modules of a torch model can carry an adapter, and how their weights lie in memory.

Taken: nn.Linear (W [N,K]) and transformers' Conv1D (W [K,N]), and subclasses that compute as these do; what bitsandbytes has
quantised (_torch_quantised.py). Refused by name: weights of another dtype or layout, quantised otherwise (torchao, GPTQ, AWQ ...), those
that are not there (meta). Weights that are DTensors are _torch_shards.py's.
"""

from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Set, Tuple

import torch
from torch import nn

from . import _abi, _torch_quantised, _torch_shards
from ._native import InvalidArgument, Unsupported
from ._torch_shards import Place, local

DTYPES = {torch.float32: _abi.PLORA_F32, torch.bfloat16: _abi.PLORA_BF16, torch.float16: _abi.PLORA_F16}
HEADS = ("lm_head", "embed_out", "output_projection")
QUANTISERS = ("bitsandbytes", "torchao", "auto_gptq", "gptqmodel", "awq", "hqq", "quanto", "optimum", "aqlm", "eetq")


class Found(NamedTuple):
    name: str
    module: nn.Module
    swapped: bool  # memory is [K,N], as Conv1D has it
    head: bool
    problem: str  # why it cannot have an adapter; "" = it can
    place: Optional[Place] = None  # of a DTensor weight


def is_conv1d(module: nn.Module) -> bool:
    return any(kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils" for kind in type(module).__mro__)


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def memory_swapped(module: nn.Module) -> Optional[bool]:
    """Whether the memory of the weight is [K,N]; None where it is neither form."""
    weight = local(module.weight)
    conv = is_conv1d(module)
    rows, columns = weight.stride()
    if columns == 1 and rows >= weight.shape[1]:
        return conv
    if rows == 1 and columns >= weight.shape[0]:  # a transposed view
        return not conv
    return None


def _problem(module: nn.Module) -> str:
    kind = type(module)
    package = kind.__module__.split(".")[0]
    weight: Any = getattr(module, "weight", None)
    if _torch_quantised.is_quantised(module) and not weight.is_meta:
        return _torch_quantised.problem(module)
    if package in QUANTISERS:
        return f"is quantised, a {kind.__module__}.{kind.__name__}: only fp32, bf16, fp16 and bitsandbytes' int8 and NF4 weights are supported"
    if not isinstance(weight, torch.Tensor):
        return f"is a {kind.__name__} without a weight of its own"
    if type(weight).__module__.split(".")[0] in QUANTISERS or hasattr(weight, "quant_state"):
        return f"is quantised, its weight is a {type(weight).__module__}.{type(weight).__name__}"
    if weight.dim() != 2:
        return f"has a weight of shape {tuple(weight.shape)}"
    if weight.dtype not in DTYPES:
        quantised = " (quantised)" if weight.dtype in (torch.int8, torch.uint8) else ""
        return f"has a weight of {weight.dtype}{quantised}: must be float32, bfloat16 or float16"
    if weight.is_meta:
        return "has no weight in memory (meta device)"
    base: Any = nn.Linear if isinstance(module, nn.Linear) else next(k for k in kind.__mro__ if k.__name__ == "Conv1D")
    if kind.forward is not base.forward or "forward" in module.__dict__:
        return f"is a {kind.__module__}.{kind.__name__}, whose forward() is its own"
    if type(weight) not in (nn.Parameter, torch.Tensor) and not _torch_shards.is_dtensor(weight):
        return f"has a weight of type {type(weight).__name__}"
    if hasattr(module, "parametrizations"):
        return "has a parametrized weight"
    if memory_swapped(module) is None:
        return f"has a weight with strides {weight.stride()}: neither rows nor columns are adjacent in memory"
    return ""


def find(model: nn.Module) -> Iterator[Found]:
    """Every linear module in the order of named_modules()."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    inside_attention = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    gathered = _torch_shards.gathered(model)
    for name, module in model.named_modules():
        if not is_linear(module):
            continue
        problem = _problem(module)
        if id(module) in inside_attention:
            problem = "is computed inside nn.MultiheadAttention, which does not call it"
        place = None
        if not problem and _torch_shards.is_dtensor(module.weight):
            place, problem = _torch_shards.place_of(module.weight, is_conv1d(module), id(module) in gathered)
        head = module is output or name.rpartition(".")[2] in HEADS
        swapped = not problem and not _torch_quantised.is_quantised(module) and memory_swapped(module)
        yield Found(name or "linear", module, bool(swapped), head, problem, place)


def refuse(found: List[Found], targeted: Set[str]) -> None:
    """Raises for the first targeted module that has a problem."""
    bad = [layer for layer in found if layer.problem and layer.name in targeted]
    if bad:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise Unsupported(f"layer '{bad[0].name}' {bad[0].problem}{more}. Leave it out with exclude=, or change the model")


def refuse_shared(model: nn.Module, found: List[Found], targeted: Set[str]) -> None:
    """An unload into a weight that something else than a linear layer uses, an embedding mostly, would change that too."""
    uses: Dict[int, List[Tuple[str, Any]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            if parameter is not None and not parameter.is_meta and parameter.numel():
                uses.setdefault(local(parameter).data_ptr(), []).append((name, module))
    for layer in found:
        if layer.name not in targeted or layer.problem:
            continue
        for other, module in uses.get(local(layer.module.weight).data_ptr(), ()):
            if not is_linear(module):
                raise InvalidArgument(
                    f"the weight of '{layer.name}' is tied to that of '{other}', a {type(module).__name__}: an unload would "
                    "change both. Leave it out, or untie them first"
                )


def device_of(layers: List[Found]) -> torch.device:
    devices: Dict[torch.device, str] = {}
    for layer in layers:
        devices.setdefault(local(layer.module.weight).device, layer.name)
    if len(devices) > 1:
        where = ", ".join(f"'{name}' on {device}" for device, name in devices.items())
        raise Unsupported(f"the layers lie on several devices: {where}")
    device = next(iter(devices))
    if device.type not in ("cpu", "cuda"):
        raise Unsupported(f"layer '{layers[0].name}' lies on {device}: must be the CPU or a CUDA device")
    return device
