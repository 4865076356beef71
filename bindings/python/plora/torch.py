"""PeriodicLoRA for PyTorch models.

    import plora.torch as plora
    adapters = plora.attach(model, rank=16, alpha=32)
    optimizer = plora.AdamW(adapters, lr=2e-4, schedule="cosine", warmup=20, period=200)
    ...  loss.backward(); optimizer.step(); optimizer.zero_grad(); every N steps: adapters.unload(optimizer)

attach() gives nn.Linear and Conv1D layers a low-rank adapter in place: the modules stay the same objects, their weights where they
are. All of A and B is one flat fp32 parameter, adapters.parameters, its gradient another flat tensor, adapters.gradients: one
all-reduce, one optimizer pass. It is registered on the first adapted layer, so that model.parameters(), clipping, torch.optim and
the like see it, and the model's state_dict() carries the adapters' state beside the weights.
"""

import contextlib
import ctypes
import fnmatch
import functools
import hashlib
import os
import tempfile
import threading
from typing import Any, Dict, Iterator, List, Mapping, Optional, Set, Tuple, Union

import torch
from torch import nn

from . import _abi, _handles, _torch_modules, _torch_quantised, _torch_shards
from ._handles import Adapter, Ledger, UnloadReport, choice
from ._native import Error, InvalidArgument, NotFound, Unsupported
from ._torch_linear import Layer, adapted_forward
from ._torch_optimizers import CHECKPOINT as _CHECKPOINT
from ._torch_optimizers import SGD, AdamW
from ._torch_optimizers import Optimizer as _Optimizer
from ._torch_quantised import QuantisedWeight
from ._torch_shards import local

__all__ = ["AdamW", "Adapters", "SGD", "attach", "from_pretrained"]


# ------------------------------------------------------------------------------------------------------------- memory


class _DeviceMemory:
    """A flat fp32 view of device memory for torch.as_tensor(); keeps its owner alive."""

    def __init__(self, address: int, count: int, owner: Any) -> None:
        self.owner = owner
        self.__cuda_array_interface__ = {"shape": (count,), "typestr": "<f4", "data": (address, False), "version": 3}


def _tensor(address: int, count: int, device: torch.device, owner: Any) -> torch.Tensor:
    if device.type == "cuda":
        return torch.as_tensor(_DeviceMemory(address, count, owner), device=device)
    memory: Any = (ctypes.c_float * count).from_address(address)
    memory.owner = owner
    return torch.frombuffer(memory, dtype=torch.float32)


def _context(device: torch.device, threads: int, deterministic: bool) -> _handles.Context:
    if device.type != "cuda":
        return _handles.Context(threads=threads or torch.get_num_threads(), deterministic=deterministic)
    ordinal = torch.cuda.current_device() if device.index is None else device.index

    def allocate(size: int) -> Optional[int]:
        try:
            return torch.cuda.caching_allocator_alloc(size, ordinal)
        except torch.OutOfMemoryError:
            return None  # the library says OUT_OF_MEMORY

    def free(address: int, _: int) -> None:
        torch.cuda.caching_allocator_delete(address)

    return _handles.Context(
        "cuda", ordinal, deterministic=deterministic, device_allocate=allocate, device_free=free, threads=threads
    )


# ------------------------------------------------------------------------------------------------------------- modules


class _Adapted:
    """What an adapted module's class puts before the original one."""

    _plora_layer: Layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return adapted_forward(self, x)

    def __reduce_ex__(self, _: Any) -> Any:
        raise TypeError(
            f"layer '{self._plora_layer.name}' has an adapter, whose memory is libplora's: it cannot be pickled or copied. Use "
            "state_dict(), or detach() first"
        )

    def __deepcopy__(self, _: Any) -> Any:
        return self.__reduce_ex__(None)

    def extra_repr(self) -> str:
        layer = self._plora_layer
        return f"{super().extra_repr()}, plora rank={layer.adapters.ranks[layer.name]}"  # type: ignore[misc]

    # The flat parameter is the first layer's, but neither moves with it nor is it saved as it is.

    def _apply(self, function: Any, recurse: bool = True) -> Any:
        parameter = self._parameters.pop("plora", None)  # type: ignore[attr-defined]
        try:
            return super()._apply(function, recurse)  # type: ignore[misc]
        finally:
            if parameter is not None:
                self._parameters["plora"] = parameter  # type: ignore[attr-defined]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        if destination.pop(prefix + "plora", None) is not None:
            destination[prefix + _CHECKPOINT] = self._plora_layer.adapters._checkpoint(None, masters=True)

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, strict: bool, missing: List[str],
                              unexpected: List[str], errors: List[str]) -> None:  # fmt: skip
        parameter = self._parameters.pop("plora", None)  # type: ignore[attr-defined]
        blob = state.get(prefix + _CHECKPOINT)
        without = {key: value for key, value in state.items() if key != prefix + _CHECKPOINT}
        if self._plora_layer.quantised is not None:
            without = self._plora_layer.quantised.load(without, prefix, errors)
        try:
            super()._load_from_state_dict(without, prefix, metadata, strict, missing, unexpected, errors)  # type: ignore[misc]
        finally:
            if parameter is not None:
                self._parameters["plora"] = parameter  # type: ignore[attr-defined]
        if parameter is None:
            return
        if blob is None:
            missing.append(prefix + _CHECKPOINT)
            return
        try:
            self._plora_layer.adapters._restore(blob, None)
        except Error as error:
            errors.append(f"{prefix}{_CHECKPOINT}: {error}")


_classes: Dict[type, type] = {}


def _adapted_class(kind: type) -> type:
    if kind not in _classes:
        _classes[kind] = type(kind.__name__, (_Adapted, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})
    return _classes[kind]


# ------------------------------------------------------------------------------------------------------------ adapters


class Adapters:
    """The adapters of one model, made by attach() or from_pretrained(). A context manager: detached at its end."""

    def __init__(
        self, model: nn.Module, found: List[_torch_modules.Found], core: _handles.Adapters, indices: Dict[str, int],
        device: torch.device, dropout: float, base: str, trainable: Dict[nn.Parameter, bool],
        quantised: Dict[str, QuantisedWeight], has_master: bool,
    ) -> None:  # fmt: skip
        self.model, self._core, self.device, self.dropout = model, core, device, dropout
        self._has_master = has_master and bool(quantised)
        self.handle = core.handle
        self.enabled = True
        self._trainable = trainable
        self._lock = threading.RLock()
        self._mask_step, self._mask_steps = 0, {}  # type: int, Dict[int, int]
        self._modules: Dict[str, nn.Module] = {}
        self.ranks: Dict[str, int] = {}
        owner = core._owner
        self.parameters = nn.Parameter(_tensor(*core.arena(), device, owner))
        self.gradients = _tensor(*core.arena(gradients=True), device, owner)
        self.parameters.grad = self.gradients
        self._hooks: List[Any] = []
        for layer in found:
            if layer.name in indices:
                try:
                    self.ranks[layer.name] = core.matrices(indices[layer.name]).a.rows
                except NotFound:
                    continue
                self._modules[layer.name] = layer.module
        conv = {layer.name: _torch_modules.is_conv1d(layer.module) for layer in found}
        places = {layer.name: layer.place for layer in found}
        self._group = _torch_shards.Group(model, [(name, places[name]) for name in self._modules])
        for name, module in self._modules.items():
            library = name in quantised or base == "library" or (
                base == "auto" and device.type == "cpu" and _library_is_faster(module.weight.dtype)
            )
            library = library and not self._group.gathered
            layer_of = Layer(self, name, indices[name], module, conv[name], library, quantised.get(name), places[name])
            module.__dict__["_plora_layer"] = layer_of
            module.__class__ = _adapted_class(type(module))
        first = next(iter(self._modules.values()))
        first._parameters["plora"] = self.parameters
        if dropout > 0.0:
            self._hooks.append(model.register_forward_pre_hook(self._next_mask))

    @property
    def parameter(self) -> nn.Parameter:
        return self.parameters

    # ------------------------------------------------------------------------------------------------ for the layers

    def stream(self) -> Optional[int]:
        return None if self.device.type == "cpu" else torch.cuda.current_stream(self.device).cuda_stream

    def open_gradients(self) -> None:
        """Before the arena is added to, or read: makes it what the parameter's .grad is."""
        gradient = self.parameters.grad
        if gradient is self.gradients:
            return
        if gradient is None:  # zero_grad(set_to_none=True)
            self.gradients.zero_()
        elif gradient.data_ptr() != self.gradients.data_ptr():
            self.gradients.copy_(gradient)
        self.parameters.grad = self.gradients

    def _next_mask(self, module: nn.Module, _: Any) -> None:
        if module.training:
            self._mask_step += 1

    def mask(self) -> Tuple[int, int]:
        """The dropout position of a call: (step, rank).

        The step counts forward passes of the model in training. A layer that gradient checkpointing runs again must get the
        step of its first run; checkpointing puts torch's random generator back for that, so a number drawn from it tells
        which run this is a repetition of.
        """
        drawn = int(torch.randint(1 << 62, ()))
        step = self._mask_steps.setdefault(drawn, self._mask_step)
        return step, self._group.dropout_rank()

    @contextlib.contextmanager
    def at(self, mask: Tuple[int, int], tokens: int) -> Iterator[None]:
        with self._lock:
            self._core.set_dropout_position(mask[0], mask[1] * tokens)
            yield

    def _quantised(self) -> Iterator[QuantisedWeight]:
        for module in self._modules.values():
            if module._plora_layer.quantised is not None:
                yield module._plora_layer.quantised

    def _changed(self) -> None:
        """Tells autograd that what a graph was built on is no more."""
        torch.autograd.graph.increment_version(self.parameters)
        self._mask_steps.clear()

    # ---------------------------------------------------------------------------------------------------- for the host

    @property
    def attached(self) -> bool:
        return bool(self._modules)

    def _check_attached(self) -> None:
        if not self._modules:
            raise Error("these adapters are detached")

    @property
    def stage(self) -> int:
        """Unloads so far."""
        return self._core.stage

    @property
    def layers(self) -> List[str]:
        """The names of the adapted layers."""
        return list(self._modules)

    @property
    def core(self) -> _handles.Adapters:
        """The library's object, e.g. for plora.Ledger."""
        return self._core

    def layer(self, name: str) -> Adapter:
        """A [R,K], B [N,R], their gradients and the scale of a layer, as views."""
        self._check_attached()
        if name not in self._modules:
            raise NotFound(f"'{name}' has no adapter")
        adapter = self._core.matrices(self._modules[name]._plora_layer.index)
        base, _ = self._core.arena()
        gradient_base, _ = self._core.arena(gradients=True)

        def view(part: Any, flat: torch.Tensor, start: int) -> torch.Tensor:
            return flat.detach().as_strided((part.rows, part.columns), (part.stride, 1), (part.data - start) // 4)

        return Adapter(
            view(adapter.a, self.parameters, base),
            view(adapter.b, self.parameters, base),
            view(adapter.a_gradient, self.gradients, gradient_base),
            view(adapter.b_gradient, self.gradients, gradient_base),
            adapter.scale,
        )

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model computes as if it had no adapters."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def unload(
        self, optimizer: Any = None, *, momentum: float = 1.0, moments: str = "default", rounding: str = "default",
        without_master: bool = False, report: bool = True,
    ) -> Optional[UnloadReport]:  # fmt: skip
        """Ends a stage: W += m s B A in place. m = 1: fresh A, B = 0, optimizer and schedule restart; m < 1: the function stays.

        optimizer: ours, or one of torch.optim over adapters.parameters, whose state is reset (m = 1) or scaled (m < 1). moments:
        "default", "reset", "keep". rounding: "default" (16-bit weights keep a residual), "nearest", "stochastic", "residual".
        Quantised weights without a master are Unsupported, with the share that they would hold; without_master: unloads all the same.
        Returns what each weight could hold of it; report = False is quicker and returns None. Of weights that are sharded each
        rank writes its own part, which the report is of; all ranks call it, and all raise when one fails.
        """
        self._check_attached()
        own = optimizer if isinstance(optimizer, _Optimizer) else getattr(optimizer, "optimizer", None)  # accelerate's wrapper
        own = own if isinstance(own, _Optimizer) else None
        if own is not None and own.adapters is not self:
            raise InvalidArgument("the optimizer belongs to other adapters")
        foreign = optimizer if own is None and optimizer is not None else None
        scale = _foreign_scale(foreign, self.parameters, momentum, moments) if foreign is not None else None
        with self._lock, self._together():
            weights = self._weights()
            result = self._core.unload(
                own.core if own else None, momentum=momentum, moments=moments if own else "default", rounding=rounding,
                without_master=without_master, report=report, stream=self.stream(),
            )  # fmt: skip
            for weight in self._quantised():
                weight.written()
            if scale is not None:
                scale()
            self.parameters.grad = self.gradients
            torch.autograd.graph.increment_version(weights)
            self._changed()
        return result

    def _weights(self) -> List[torch.Tensor]:
        """What unloads write: of sharded weights this rank's parts."""
        _torch_shards.reshard(self._group.fsdp_modules)
        weights = [local(module.weight) for module in self._modules.values()]
        for weight, (name, module) in zip(weights, self._modules.items()):
            if self._group.places and weight.data_ptr() != module._plora_layer.pointer:
                raise Error(f"the shard of layer '{name}' was moved or replaced after attach(): detach() first, then attach again")
        return weights

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """Ends alike on all ranks that hold parts of the weights."""
        if not self._group.places:
            yield
            return
        failure: Optional[Exception] = None
        try:
            yield
        except Exception as error:  # raised below, once the others know
            failure = error
        if self._group.failed_elsewhere(failure is not None, self.device):
            raise failure or Error(
                "the unload failed on another rank, here it is done: the shards are of different stages. Go back to a checkpoint"
            )

    def reduce_gradients(self) -> None:
        """Once before each step, on all ranks: makes the gradients of sharded weights whole. Nothing to do for others.

        FSDP2: the mean over the mesh, as it takes of its own. Tensor parallel: the sum of what each rank has a part of, dA of row
        shards and dB of column shards. The mean over data-parallel ranks of a tensor-parallel model is the host's, as ever.
        """
        self._check_attached()
        self.open_gradients()
        if self._group.gathered:
            self._group.all_reduce(self.gradients)
            self.gradients.div_(self._group.mesh.size())
        elif self._group.parallel:
            parts = [part for name, place in self._group.places.items() for part in self._gradient_parts(name, place)[:1]]
            flat = torch.cat([part.reshape(-1) for part in parts])
            self._group.all_reduce(flat)
            for part, whole in zip(parts, flat.split([part.numel() for part in parts])):
                part.copy_(whole.view_as(part))

    def _gradient_parts(self, name: str, place: _torch_shards.Place) -> Tuple[torch.Tensor, torch.Tensor]:
        """(the gradient that all ranks have, once summed; the one that is this rank's own)"""
        adapter = self.layer(name)
        parts = (adapter.a_gradient, adapter.b_gradient)
        return parts if place.by_rows else (parts[1], parts[0])

    def gradient_norm(self) -> float:
        """L2 norm of the gradients, over all shards where layers are tensor parallel; then a call for all ranks."""
        self.open_gradients()
        squares = self.gradients.double().square()
        if not self._group.parallel:
            return float(squares.sum().sqrt())
        own = sum(
            self._gradient_parts(name, place)[1].double().square().sum() for name, place in self._group.places.items()
        )
        shared = torch.cat([squares.sum().reshape(1), own.reshape(1)])
        everywhere = own.reshape(1).clone()
        self._group.all_reduce(everywhere)
        return float((shared[0] - shared[1] + everywhere[0]).clamp(min=0.0).sqrt())

    def digest(self, weights: bool = True) -> str:
        """A hash of the stage, of A and B, and of the weights they are merged into, of quantised ones codes and scales: equal on
        ranks that agree, to the bit. Ranks that hold shards differ in these: compare digest(weights=False) under FSDP2."""
        self._check_attached()
        state = hashlib.blake2b(str(self.stage).encode(), digest_size=16)
        tensors = [self.parameters.detach()]
        if weights:
            for weight, module in zip(self._weights(), self._modules.values()):
                quantised = module._plora_layer.quantised
                tensors += quantised.tensors() if quantised else [weight.detach()]
        for tensor in tensors:
            part = tensor.cpu() if tensor.is_contiguous() else tensor.cpu().contiguous()
            if part.numel():
                state.update((ctypes.c_char * (part.numel() * part.element_size())).from_address(part.data_ptr()))
        return state.hexdigest()

    def ledger(self, path: Any = None, **options: Any) -> Ledger:
        """Records every unload from now on; see plora.Ledger."""
        self._check_attached()
        return Ledger(self._core, path, **options)

    def memory(self) -> Dict[str, int]:
        """Bytes that the library holds."""
        return self._core.model.context.memory()

    # ----------------------------------------------------------------------------------------------------------- files

    def save_pretrained(self, directory: Union[str, "os.PathLike[str]"], **_: Any) -> None:
        """The live adapter as PEFT saves it. What was unloaded is in the model's weights."""
        self._check_attached()
        if self._group.parallel:
            raise Unsupported("the layers are tensor parallel: each rank holds a part of the adapter, and PEFT has no format for parts")
        self._core.save(directory)

    def _checkpoint(self, optimizer: Optional["_Optimizer"], masters: bool = False) -> torch.Tensor:
        with tempfile.TemporaryDirectory(prefix="plora-") as folder:
            path = os.path.join(folder, "checkpoint")
            _handles.save_checkpoint(self._core, optimizer.core if optimizer else None, path, masters and self._has_master)
            with open(path, "rb") as file:
                return torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)

    def _restore(self, blob: Any, optimizer: Optional["_Optimizer"]) -> None:
        if not isinstance(blob, torch.Tensor) or blob.dtype != torch.uint8 or blob.dim() != 1:
            raise InvalidArgument(f"the state of the adapters is a {type(blob).__name__}: must be a vector of uint8")
        with tempfile.TemporaryDirectory(prefix="plora-") as folder:
            path = os.path.join(folder, "checkpoint")
            with open(path, "wb") as file:
                file.write(memoryview(blob.detach().cpu().contiguous().numpy()))
            _handles.load_checkpoint(self._core, optimizer.core if optimizer else None, path)
        for weight in self._quantised():
            weight.written()
        self.gradients.zero_()
        self.parameters.grad = self.gradients
        self._changed()

    def state_dict(self) -> Dict[str, Any]:
        """A, B, stage, residuals and masters, to the bit, as the library saves them; the weights are in the model's state_dict()."""
        self._check_attached()
        return {_CHECKPOINT: self._checkpoint(None, masters=True), "dropout_step": self._mask_step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Into adapters attached with the same options. An error has changed nothing."""
        self._check_attached()
        if _CHECKPOINT not in state:
            raise InvalidArgument(f"no state of adapters: it has no '{_CHECKPOINT}'")
        self._restore(state[_CHECKPOINT], None)
        self._mask_step = int(state.get("dropout_step", 0))

    def clear_residuals(self) -> None:
        """After weights were written by something else than an unload: what was rounded off before no longer counts."""
        self._check_attached()
        self._core.model.clear_residuals(self.stream())

    # ------------------------------------------------------------------------------------------------------------- end

    def detach(self) -> None:
        """Gives the model back as it was, its weights with all unloads. The live adapter is dropped: unload() first to keep it."""
        _torch_shards.reshard(self._group.fsdp_modules)
        for name, module in self._modules.items():
            module._parameters.pop("plora", None)
            module.__dict__.pop("_plora_layer", None)
            module.__class__ = type(module).__mro__[2]
            del name
        for hook in self._hooks:
            hook.remove()
        for parameter, before in self._trainable.items():
            parameter.requires_grad_(before)
        self._modules, self._hooks, self._trainable = {}, [], {}
        self.parameters.grad = None
        self.handle = 0

    def __enter__(self) -> "Adapters":
        return self

    def __exit__(self, *_: Any) -> None:
        self.detach()

    def __reduce_ex__(self, _: Any) -> Any:
        raise TypeError("adapters cannot be pickled or copied: they own memory of libplora. Use state_dict()")

    def __deepcopy__(self, _: Any) -> Any:
        return self.__reduce_ex__(None)

    def __repr__(self) -> str:
        if not self._modules:
            return "<plora.torch.Adapters, detached>"
        return f"<plora.torch.Adapters on {len(self._modules)} layers, {self.parameters.numel()} parameters, stage {self.stage}>"


def _foreign_scale(optimizer: Any, parameter: nn.Parameter, momentum: float, moments: str) -> Any:
    """What an unload has to do to an optimizer of torch's, checked now and done afterwards."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    groups = getattr(optimizer, "param_groups", None)
    if groups is None:
        raise InvalidArgument(f"a {type(optimizer).__name__} is no optimizer: neither plora's nor torch.optim's")
    if not any(parameter is p for group in groups for p in group["params"]):
        raise InvalidArgument("the optimizer does not have adapters.parameters")
    choice("moments", moments, _handles.MOMENTS)
    if moments == "keep" and momentum == 1.0:
        raise InvalidArgument("moments = 'keep' is of no use with momentum = 1: the adapter they belong to is gone")
    if moments == "reset" or (moments == "default" and momentum == 1.0):
        return lambda: optimizer.state.pop(parameter, None)
    powers = {"exp_avg": 0.5, "momentum_buffer": 0.5, "exp_avg_sq": 1.0, "max_exp_avg_sq": 1.0}
    state = optimizer.state.get(parameter, {})
    unknown = [k for k, v in state.items() if isinstance(v, torch.Tensor) and v.numel() > 1 and k not in powers]
    if unknown:
        raise Unsupported(f"how {type(optimizer).__name__}'s {', '.join(unknown)} should be kept is not known: use moments='reset'")

    def scale() -> None:
        for key, power in powers.items():
            if isinstance(state.get(key), torch.Tensor):
                state[key].mul_((1.0 - momentum) ** power)

    return scale


# -------------------------------------------------------------------------------------------------------------- attach


def _library_is_faster(dtype: torch.dtype) -> bool:
    """Whose x W^T is faster on the CPU. A rule, not a measurement: runs and ranks must agree on it to the bit.

    bf16    without bf16 instructions torch's product is far slower than ours, else equal
    fp32    torch multiplies by MKL, which on AMD's processors is slower than oneDNN (Zen 3: a step of two layers takes 1.07 times as long)
    """
    if dtype == torch.bfloat16:
        return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32 and torch.backends.mkl.is_available() and _is_amd()


@functools.lru_cache(maxsize=None)
def _is_amd() -> bool:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            return "AuthenticAMD" in file.read(1 << 14)
    except OSError:
        return False


def _keep_out_of_compile() -> None:
    """torch.compile breaks its graph around an adapted layer: calls of the library are nothing that it could trace."""
    if _Adapted.forward is _traced_forward:
        _Adapted.forward = torch.compiler.disable(_traced_forward)  # type: ignore[method-assign]


_traced_forward = _Adapted.forward


def _attach(
    model: nn.Module, options: Dict[str, Any], base: str, threads: int, deterministic: Optional[bool], master: Any,
    originals: Optional[Mapping[str, Any]],
) -> Adapters:  # fmt: skip
    if not isinstance(model, nn.Module):
        raise InvalidArgument(f"a {type(model).__name__} is no torch.nn.Module")
    if hasattr(model, "_orig_mod") or isinstance(model, nn.parallel.DistributedDataParallel):
        raise InvalidArgument(f"attach() comes before {type(model).__name__}: give it the model inside")
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise Unsupported("FullyShardedDataParallel keeps weights in flat vectors: use fully_shard(), FSDP2")
    _torch_shards.reshard(_torch_shards.fsdp_modules(model))
    choice("base", base, {"auto": 0, "torch": 1, "library": 2})
    found = list(_torch_modules.find(model))
    if not found:
        raise NotFound(f"the {type(model).__name__} has no linear layer")
    for layer in found:
        if "_plora_layer" in layer.module.__dict__:
            raise InvalidArgument(f"layer '{layer.name}' has an adapter already: detach() the adapters it belongs to")
    targeted = set() if "directory" in options else _targeted(found, options)  # a directory names its own
    _torch_modules.refuse(found, targeted)
    _torch_modules.refuse_shared(model, found, targeted)
    usable = [layer for layer in found if not layer.problem]
    device = _torch_modules.device_of([layer for layer in usable if layer.name in targeted] or usable)
    usable = [layer for layer in usable if local(layer.module.weight).device == device]
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    _check_originals(originals, usable, master)

    def build(master: Any) -> Tuple[_handles.Adapters, Dict[str, int], Dict[str, QuantisedWeight]]:
        core_model = _handles.Model(_context(device, threads, deterministic))
        indices, quantised = {}, {}  # type: Dict[str, int], Dict[str, QuantisedWeight]
        for layer in usable:
            if _torch_quantised.is_quantised(layer.module):
                given = master if not targeted or layer.name in targeted else None
                values = (originals or {}).get(layer.name)
                values = None if given is None or values is None else values.detach().contiguous()
                indices[layer.name] = _add_quantised(core_model, layer, quantised, given, values)
            else:
                indices[layer.name] = _add_linear(core_model, layer)
        return _handles.Adapters(core_model, **options), indices, quantised

    if master is not None:
        build(None)  # finds all errors: a master makes its weight's codes anew as soon as it is there
    core, indices, quantised = build(master)
    _keep_out_of_compile()
    parameters = list(model.parameters())
    trainable = {parameter: parameter.requires_grad for parameter in parameters}
    for parameter in parameters:
        parameter.requires_grad_(False)
    dropout = float(options.get("dropout", 0.0))
    adapters = Adapters(model, found, core, indices, device, dropout, base, trainable, quantised, master is not None)
    if master is not None:
        for weight in quantised.values():
            weight.written()
    return adapters


def _add_linear(model: _handles.Model, layer: _torch_modules.Found) -> int:
    weight, place = local(layer.module.weight), layer.place
    gathered = place is not None and place.gathered
    bias = None if layer.module.bias is None or gathered else local(layer.module.bias)
    if place is not None and not place.by_rows and not gathered and place.mesh.get_local_rank(0) > 0:
        bias = None  # one rank adds it
    rows = weight if weight.stride(1) == 1 else weight.t()
    dtype = _torch_modules.DTYPES[weight.dtype]
    matrix = _abi.plora_matrix(rows.data_ptr(), rows.shape[0], rows.shape[1], rows.stride(0), dtype, 0)
    address, bias_dtype = (None, 0) if bias is None else (bias.data_ptr(), _torch_modules.DTYPES[bias.dtype])
    return model.add_matrix(
        layer.name, matrix, address, bias_dtype, layer.swapped, layer.head, (weight, bias),
        shard=None if place is None else place.shard, gathered=gathered,
    )  # fmt: skip


def _add_quantised(
    model: _handles.Model, layer: _torch_modules.Found, made: Dict[str, QuantisedWeight], master: Any, values: Any
) -> int:
    module = layer.module
    bias = None if module.bias is None else module.bias.detach()
    codes = module.weight.data_ptr()
    tied = next((weight for weight in made.values() if weight.described.codes.data_ptr() == codes), None)
    weight = made[layer.name] = tied or QuantisedWeight(module)
    return model.add_quantised(
        layer.name, weight.described, bias, head=layer.head, master=None if tied else master, values=None if tied else values
    )


def _check_originals(originals: Optional[Mapping[str, Any]], usable: List[_torch_modules.Found], master: Any) -> None:
    if originals and master is None:
        raise InvalidArgument("originals are what masters start from: give master=, too")
    quantised = {layer.name: layer.module for layer in usable if _torch_quantised.is_quantised(layer.module)}
    for name, values in (originals or {}).items():
        if name not in quantised:
            raise NotFound(f"originals of '{name}', which is no quantised layer")
        shape = _torch_quantised.QuantisedWeight(quantised[name]).described.shape
        if tuple(values.shape) != shape or values.dtype not in _torch_modules.DTYPES or not bool(torch.isfinite(values).all()):
            raise InvalidArgument(
                f"originals of '{name}' are {values.dtype} {list(values.shape)}: must be {list(shape)}, of 32 or 16 bits, and finite"
            )


def _targeted(found: List[_torch_modules.Found], options: Dict[str, Any]) -> Set[str]:
    """The layers that targets and exclude name, by the library's rules (lib/targets.c), which sees those without a problem only."""
    targets = _handles.patterns(options.get("targets")) or b"all-linear"
    exclude = _handles.patterns(options.get("exclude")) or b""

    def matches(pattern: str, layer: _torch_modules.Found) -> bool:
        if pattern == "all-linear":
            return not layer.head
        if any(sign in pattern for sign in "*?["):
            return fnmatch.fnmatchcase(layer.name, pattern)
        return layer.name == pattern or layer.name.endswith("." + pattern)

    def chosen(text: bytes) -> Set[str]:
        names = text.decode().replace(",", " ").split()
        return {layer.name for layer in found for name in names if matches(name, layer)}

    return chosen(targets) - chosen(exclude)


def attach(
    model: nn.Module,
    rank: int = 8,
    alpha: Optional[float] = None,
    targets: _handles.Patterns = "all-linear",
    *,
    exclude: _handles.Patterns = None,
    dropout: float = 0.0,
    seed: int = 0,
    init: str = "kaiming",
    rslora: bool = False,
    residual: str = "default",
    overrides: Optional[Mapping[str, Any]] = None,
    master: Any = None,
    originals: Optional[Mapping[str, Any]] = None,
    base: str = "auto",
    workspace_tokens: int = 0,
    threads: int = 0,
    deterministic: Optional[bool] = None,
) -> Adapters:
    """Gives the linear layers of a model adapters, in place, and freezes all else. B = 0: the model computes what it did.

    rank, alpha       y = x W^T + bias + s x A^T B^T with s = alpha / rank (rslora: alpha / sqrt(rank)); alpha: 2 * rank
    targets, exclude  "all-linear" (all but the output head), names ("q_proj", "self_attn.q_proj"), or globs over whole names
    dropout, seed     masks and init are functions of the seed, of the stage or step, layer and element: the same on every rank
    init              of A: "kaiming" uniform or "gaussian"; the same again at each unload
    residual          16 bits beside each 16-bit weight that keep what rounding would lose: "default", "none", "device", "host"
    overrides         {pattern: rank} or {pattern: (rank, alpha)}
    master            what unloads of weights that bitsandbytes has quantised add to, fp32, in the host's memory: None: nothing, they can be
                      trained on, not unloaded into; "memory"; or a directory: in a file without a name there, mapped
    originals         {layer: weight of full precision} that masters start from; what is missing starts from what the codes hold
    base              who computes x W^T: "torch", "library", or "auto", whichever is faster for the weights' dtype on this machine;
                      of quantised weights always the library
    workspace_tokens  tokens of one pass over the library's workspace; 0 = 1024
    threads           0: as torch has; deterministic: None: as torch is set
    """
    options = {
        "rank": rank, "alpha": 2.0 * rank if alpha is None else alpha, "targets": targets, "exclude": exclude,
        "dropout": dropout, "seed": seed, "init": init, "rslora": rslora, "residual": residual, "overrides": overrides,
        "workspace_tokens": workspace_tokens,
    }  # fmt: skip
    return _attach(model, options, base, threads, deterministic, master, originals)


def from_pretrained(
    model: nn.Module,
    directory: Union[str, "os.PathLike[str]"],
    *,
    dropout: float = 0.0,
    seed: int = 0,
    init: str = "kaiming",
    residual: str = "device",
    master: Any = None,
    originals: Optional[Mapping[str, Any]] = None,
    base: str = "auto",
    workspace_tokens: int = 0,
    threads: int = 0,
    deterministic: Optional[bool] = None,
) -> Adapters:
    """Attaches the adapters of a PEFT directory: their ranks, scales and values, bit for bit."""
    options = {
        "directory": directory, "dropout": dropout, "seed": seed, "init": init, "residual": residual,
        "workspace_tokens": workspace_tokens,
    }  # fmt: skip
    return _attach(model, options, base, threads, deterministic, master, originals)
