"""The linear layer with its adapter as a torch.autograd.Function.

    forward    y  = x W^T + bias  (torch, or the library)      y  += s dropout(x) A^T B^T   (the library)
    backward   dx = dy W          (torch, or the library)      dx += s dropout'(dy B A)     (the library); dA, dB into the arena

Saved is x alone, which the graph mostly holds anyway; no product, no mask, no copy in another dtype. The adapters' flat
parameter is an input of the function so that a graph arises where x needs no gradient; its gradient does not pass through
autograd: the library adds it to the arena, which is the parameter's .grad.
"""

from ctypes import byref
from typing import Any, Optional, Tuple

import torch
from torch.nn import functional

from . import _abi
from ._abi import plora_matrix
from ._native import Error, InvalidArgument, check, lib
from ._torch_quantised import QuantisedWeight
from ._torch_shards import Place, arrived, is_dtensor, local, parallel_forward

DELTA, DROPOUT = _abi.PLORA_LINEAR_DELTA_ONLY, _abi.PLORA_LINEAR_DROPOUT
ACTIVATIONS = {torch.float32: _abi.PLORA_F32, torch.bfloat16: _abi.PLORA_BF16}
_forward, _backward = lib.plora_linear_forward, lib.plora_linear_backward


def rows_of(tensor: torch.Tensor) -> torch.Tensor:
    """[..., K] as [T,K] with adjacent elements, copied only where it must be."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    if (rows.stride(1) != 1 and rows.shape[1] > 1) or (rows.shape[0] > 1 and rows.stride(0) < rows.shape[1]):
        rows = rows.contiguous()
    return rows


def matrix(rows: torch.Tensor) -> plora_matrix:
    """A view; the tensor must live until the call has returned (on CUDA the stream keeps the order)."""
    count, columns = rows.shape
    return plora_matrix(
        rows.data_ptr(), count, columns, max(rows.stride(0), columns) if count > 1 else columns, ACTIVATIONS[rows.dtype], 0
    )


class Layer:
    """One adapted module: what a call needs, looked up once."""

    __slots__ = (
        "adapters", "adds_bias", "conv", "gathered", "index", "inputs", "library", "name", "outputs", "place", "pointer", "quantised",
    )  # fmt: skip

    def __init__(
        self, adapters: Any, name: str, index: int, module: Any, conv: bool, library: bool, quantised: Optional[QuantisedWeight],
        place: Optional[Place],
    ) -> None:  # fmt: skip
        self.adapters, self.name, self.index, self.conv, self.library = adapters, name, index, conv, library
        self.quantised = quantised
        self.gathered = place is not None and place.gathered  # then products see the whole weight
        self.place = None if self.gathered else place
        weight = module.weight if self.gathered else local(module.weight)
        shape = weight.shape if quantised is None else quantised.described.shape
        self.inputs, self.outputs = (shape[0], shape[1]) if conv else (shape[1], shape[0])
        self.pointer = local(module.weight).data_ptr()
        # Of column shards y is summed over the ranks: one of them adds the bias.
        self.adds_bias = self.place is None or self.place.by_rows or self.place.mesh.get_local_rank(0) == 0

    # ---------------------------------------------------------------------------------------------------- torch's part

    def bias(self, module: Any) -> Optional[torch.Tensor]:
        return None if module.bias is None or not self.adds_bias else local(module.bias)

    def base(self, module: Any, x: torch.Tensor) -> torch.Tensor:
        """x W^T + bias in x's dtype."""
        weight = local(module.weight) if self.quantised is None else self.dequantised(x.dtype)
        bias = self.bias(module)
        if weight.dtype != x.dtype:
            weight = weight.to(x.dtype)
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        if not self.conv:
            return functional.linear(x, weight, bias)
        rows = x.reshape(-1, self.inputs)
        y = torch.addmm(bias, rows, weight) if bias is not None else torch.mm(rows, weight)
        return y.view(*x.shape[:-1], self.outputs)

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        """The whole of a quantised weight: for what runs without adapters; products with them dequantise panels."""
        out = torch.empty(self.outputs, self.inputs, dtype=dtype if dtype in ACTIVATIONS else torch.float32, device=self.adapters.device)
        weight: Any = self.quantised
        described, adapters = weight.described.described, self.adapters
        check(lib.plora_dequantise(adapters.core.model.context.held, byref(described), byref(matrix(out)), adapters.stream()))
        return out

    def base_backward(self, module: Any, dy: torch.Tensor) -> torch.Tensor:
        weight = local(module.weight)
        if weight.dtype != dy.dtype:
            weight = weight.to(dy.dtype)
        return torch.mm(dy, weight.t() if self.conv else weight)

    # ------------------------------------------------------------------------------------------------ the library's part

    def forward(self, module: Any, x: torch.Tensor, mask: Optional[Tuple[int, int]]) -> torch.Tensor:
        """[..., K] to [..., N]; mask: the dropout position, or None."""
        staged = x.dtype not in ACTIVATIONS  # fp16
        if staged and self.quantised is not None:
            return self.forward(module, x.float(), mask).to(x.dtype)
        own = self.library and not staged and x.numel() > 0
        y = x.new_empty(*x.shape[:-1], self.outputs) if own else self.base(module, x)
        if x.numel() == 0:
            return y
        x_rows, y_rows = rows_of(x), y.view(-1, self.outputs)
        if staged:
            part = torch.zeros_like(y_rows, dtype=torch.float32)
            self.call_forward(rows_of(x_rows.float()), part, DELTA, mask)
            y_rows += part
        else:
            self.call_forward(x_rows, y_rows, 0 if own else DELTA, mask)
        return y

    def backward(
        self, module: Any, x: torch.Tensor, dy: torch.Tensor, want_dx: bool, mask: Optional[Tuple[int, int]]
    ) -> Optional[torch.Tensor]:
        if x.numel() == 0:
            return torch.zeros_like(x) if want_dx else None
        x_rows, dy_rows = rows_of(x), rows_of(dy)
        if x.dtype not in ACTIVATIONS or dy_rows.dtype not in ACTIVATIONS:  # fp16
            if self.quantised is not None:
                wide = self.backward(module, x.float(), dy.float(), want_dx, mask)
                return None if wide is None else wide.to(x.dtype)
            part = torch.zeros_like(x_rows, dtype=torch.float32, memory_format=torch.contiguous_format) if want_dx else None
            self.call_backward(rows_of(x_rows.float()), rows_of(dy_rows.float()), part, DELTA, mask)
            return (self.base_backward(module, dy_rows) + part).view(x.shape).to(x.dtype) if want_dx else None
        dx: Optional[torch.Tensor] = None
        if want_dx:
            if self.library:
                dx = x_rows.new_empty(x_rows.shape)
            else:
                dx = self.base_backward(module, dy_rows)
        self.call_backward(x_rows, dy_rows, dx, 0 if self.library else DELTA, mask)
        return None if dx is None else dx.view(x.shape).to(x.dtype)

    def call_forward(self, x: torch.Tensor, y: torch.Tensor, flags: int, mask: Optional[Tuple[int, int]]) -> None:
        adapters = self.adapters
        if mask is None:
            status = _forward(adapters.handle, self.index, byref(matrix(x)), byref(matrix(y)), flags, adapters.stream())
            if status:
                check(status)
            return
        with adapters.at(mask, x.shape[0]):
            check(_forward(adapters.handle, self.index, byref(matrix(x)), byref(matrix(y)), flags | DROPOUT, adapters.stream()))

    def call_backward(
        self, x: torch.Tensor, dy: torch.Tensor, dx: Optional[torch.Tensor], flags: int, mask: Optional[Tuple[int, int]]
    ) -> None:
        adapters = self.adapters
        out = None if dx is None else byref(matrix(dx))
        if mask is None:
            status = _backward(adapters.handle, self.index, byref(matrix(x)), byref(matrix(dy)), out, flags, adapters.stream())
            if status:
                check(status)
            return
        with adapters.at(mask, x.shape[0]):
            check(
                _backward(
                    adapters.handle, self.index, byref(matrix(x)), byref(matrix(dy)), out, flags | DROPOUT, adapters.stream()
                )
            )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, parameter: Any, bias: Any, layer: Layer, module: Any, mask: Any) -> torch.Tensor:
        x = arrived(x)
        ctx.save_for_backward(x)
        ctx.layer, ctx.module, ctx.mask, ctx.version = layer, module, mask, parameter._version
        return layer.forward(module, x, mask)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        layer, adapters = ctx.layer, ctx.layer.adapters
        (x,) = ctx.saved_tensors
        if adapters.parameter._version != ctx.version:
            raise RuntimeError(
                f"layer '{layer.name}': adapters or weights changed between forward and backward (an optimizer step, an unload)"
            )
        adapters.open_gradients()
        dy = arrived(dy)
        dx = layer.backward(ctx.module, x, dy, ctx.needs_input_grad[0], ctx.mask)
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
        return dx, None, dbias, None, None, None


def adapted_forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    """forward() of an adapted module."""
    layer = module._plora_layer
    if layer.place is not None:
        return parallel_forward(layer.name, layer.place, lambda part: _forward_here(module, layer, part), x)
    return _forward_here(module, layer, x)


def _forward_here(module: Any, layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """Of the weight that this process computes with."""
    adapters = layer.adapters
    if not adapters.enabled:
        return layer.base(module, x)
    weight = local(module.weight)
    if layer.gathered:
        if is_dtensor(module.weight):
            raise Error(
                f"the weight of layer '{layer.name}' is not gathered: call the module that fully_shard() was applied to, as a module"
            )
    elif weight.data_ptr() != layer.pointer:
        raise Error(f"the weight of layer '{layer.name}' was moved or replaced after attach(): detach() first, then attach again")
    if weight.requires_grad:
        raise InvalidArgument(f"the weight of layer '{layer.name}' requires a gradient: only its adapter is trained")
    if x.shape[-1] != layer.inputs:
        raise InvalidArgument(f"layer '{layer.name}': x is {list(x.shape)}: the last dimension must be {layer.inputs}")
    if x.device != adapters.device:
        raise InvalidArgument(f"layer '{layer.name}': x is on {x.device}, the weight on {adapters.device}")
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    elif x.dtype != weight.dtype and layer.quantised is None:
        raise InvalidArgument(f"layer '{layer.name}': x is {x.dtype}, the weight {weight.dtype}")
    if layer.quantised is not None and x.dtype not in ACTIVATIONS and x.dtype != torch.float16:
        raise InvalidArgument(f"layer '{layer.name}': x is {x.dtype}: must be float32, bfloat16 or float16")
    mask = adapters.mask() if adapters.dropout > 0.0 and module.training else None
    if not torch.is_grad_enabled():
        return layer.forward(module, arrived(x), mask)
    return _Linear.apply(x, adapters.parameter, layer.bias(module), layer, module, mask)
