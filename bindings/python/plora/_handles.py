"""The library's objects as Python objects: Context, Model, Adapters, Optimizer, Ledger.

Weights and activations are arrays of any package (_memory.py) and are never copied. Arenas come back as numpy views, for
which numpy is imported when one is asked for; nothing else needs it. plora.torch stands on the same classes.

An object may be closed, or dropped, in any order: a child keeps its parent, a view keeps the memory it looks at. After
close() an object answers with Error, and its views stay valid.
"""

import ctypes
import weakref
from ctypes import byref, c_int32, c_int64, c_void_p
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

from . import _abi
from ._memory import CPU, CUDA, matrix_of
from ._native import Error, InvalidArgument, NotFound, arena, check, create, lib, memory, path_bytes, struct
from ._quantised import Quantised

Patterns = Union[None, str, Sequence[str]]
Shard = Tuple[int, int, int, int]  # plora_shard: first row, first column, rows, columns

SCHEDULES = {"constant": 0, "linear": 1, "cosine": 2, "relora": 3}
INITS = {"kaiming": _abi.PLORA_INIT_KAIMING_UNIFORM, "gaussian": _abi.PLORA_INIT_GAUSSIAN}
RESIDUALS = {"default": 0, "none": 1, "device": 2, "host": 3}
ROUNDINGS = {"default": -1, "nearest": 0, "stochastic": 1, "residual": 2}
MOMENTS = {"default": 0, "reset": 1, "keep": 2}
DTYPES = {_abi.PLORA_F32: "float32", _abi.PLORA_BF16: "bfloat16", _abi.PLORA_F16: "float16"}


def choice(what: str, value: Any, choices: Mapping[str, int]) -> int:
    if value not in choices:
        raise InvalidArgument(f"{what} = {value!r}: must be one of {', '.join(choices)}")
    return choices[value]


def patterns(value: Patterns) -> Optional[bytes]:
    """Target patterns as the library takes them: comma-separated."""
    if value is None:
        return None
    names = [value] if isinstance(value, str) else list(value)
    if not names or not all(isinstance(name, str) and name for name in names):
        raise InvalidArgument(f"{value!r} are no patterns: must be a string or a list of strings that are not empty")
    return ",".join(names).encode()


def fields(value: ctypes.Structure, *left_out: str) -> Dict[str, Any]:
    return {name: getattr(value, name) for name, *_ in value._fields_ if name not in ("struct_size", "reserved", *left_out)}


def known(kind: Any, values: Dict[str, Any]) -> Dict[str, Any]:
    """What of a report's values the tuple has a place for: structs of the library only ever grow."""
    return {name: value for name, value in values.items() if name in kind._fields}


class _Owner:
    """A handle of the library, destroyed when nothing looks at its memory any more. `keep` lives as long.

    Calls are given the owner itself, so that an object that another thread closes ends after the call.
    """

    __slots__ = ("__weakref__", "_as_parameter_", "handle", "keep")

    def __init__(self, handle: int, destroy: Any, keep: Any) -> None:
        self.handle = self._as_parameter_ = handle
        self.keep = keep
        weakref.finalize(self, destroy, handle)


class _Object:
    """What all handles share: use after close() is an error, and copies are refused, since one handle has one owner."""

    _owner: Optional[_Owner] = None

    @property
    def held(self) -> _Owner:
        """For a call: the library's object, which lives while this is referred to."""
        owner = self._owner
        if owner is None:
            raise Error(f"this {type(self).__name__} is closed")
        return owner

    @property
    def handle(self) -> int:
        """The address of the library's object, for calls of one's own through plora._native."""
        return self.held.handle

    @property
    def closed(self) -> bool:
        return self._owner is None

    def close(self) -> None:
        """Gives the object up. Its memory is freed when no view of it is left."""
        self._owner = None

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __reduce_ex__(self, _: Any) -> Any:
        raise TypeError(f"{type(self).__name__} cannot be pickled or copied: it owns memory of libplora. Save it instead")

    def __deepcopy__(self, _: Any) -> Any:
        return self.__reduce_ex__(0)

    __copy__ = __reduce__ = lambda self: self.__reduce_ex__(0)


# ------------------------------------------------------------------------------------------------------------ context


class Context(_Object):
    """A backend, its memory and its log. All else lives in one.

    threads: CPU threads of one call; 0 = OpenMP's own choice. deterministic: the same bits for any number of threads.
    log: called with (level, message) inside calls; level 0 error, 1 warning, 2 information.
    device_allocate(bytes) -> address and device_free(address, bytes): the memory of a CUDA context.
    """

    def __init__(
        self,
        backend: str = "cpu",
        device: int = 0,
        threads: int = 0,
        deterministic: bool = False,
        log: Any = None,
        log_level: int = 2,
        device_allocate: Any = None,
        device_free: Any = None,
    ) -> None:
        kinds: Dict[str, Any] = {name: kind for name, kind, *_ in _abi.plora_context_options._fields_}
        options = struct(
            "context_options",
            backend=choice("backend", backend, {"cpu": _abi.PLORA_BACKEND_CPU, "cuda": _abi.PLORA_BACKEND_CUDA}),
            device=device,
            threads=threads,
            deterministic=int(deterministic),
            log_level=log_level,
        )
        if log is not None:
            options.log = kinds["log"](lambda level, message, _: log(level, message.decode(errors="replace")))
        if device_allocate is not None:
            options.device_allocate = kinds["device_allocate"](lambda size, _: device_allocate(size))
            options.device_free = kinds["device_free"](lambda address, size, _: device_free(address, size))
        handle = create(lib.plora_context_create, byref(options))
        self.backend, self.device = backend, device
        self._owner = _Owner(handle, lib.plora_context_destroy, options)  # the options hold the callbacks

    @property
    def dl_device(self) -> Tuple[int, int]:
        return (CPU, 0) if self.backend == "cpu" else (CUDA, self.device)

    def memory(self) -> Dict[str, int]:
        """current_bytes, peak_bytes, allocations, mapped_bytes, and the same of device memory."""
        return fields(memory(self.held))

    def synchronize(self, stream: Optional[int] = None) -> None:
        check(lib.plora_synchronize(self.held, stream))


# -------------------------------------------------------------------------------------------------------------- model


class Model(_Object):
    """A list of linear layers y = x W^T + bias. The weights stay where they are, and unloads write them."""

    def __init__(self, context: Optional[Context] = None, *, path: Any = None) -> None:
        self.context = context or Context()
        if path is None:
            handle = create(lib.plora_model_create, self.context.held)
        else:
            handle = create(lib.plora_model_open, self.context.held, path_bytes(path))
        # The library's model keeps its context; what Python must keep alive are callbacks and weights.
        self._owner = _Owner(handle, lib.plora_model_destroy, [self.context._owner])

    @classmethod
    def open(cls, path: Any, context: Optional[Context] = None) -> "Model":
        """A safetensors file or a Hugging Face directory, mapped copy-on-write: the files never change."""
        return cls(context, path=path)

    def add_linear(
        self, name: str, weight: Any, bias: Any = None, fan_in_fan_out: bool = False, head: bool = False,
        shard: Optional[Shard] = None, gathered: bool = False,
    ) -> int:  # fmt: skip
        """Adds a layer and returns its index. weight [N,K], or [K,N] with fan_in_fan_out: fp32, bf16, fp16; bias [N].

        Layers whose weights are the very same memory are tied: one adapter, merged once. shard: (first row, first column, rows,
        columns): where the weight lies in W[rows, columns], of which it is a part. gathered: products see the whole of it, as
        with FSDP: the adapter is the whole's, forward and backward take delta_only.
        """
        matrix, owner = matrix_of(weight, f"weight of '{name}'", self.context.dl_device, write=True)
        keep, bias_matrix = [owner], _abi.plora_matrix()
        if bias is not None:
            features = matrix.columns if fan_in_fan_out else matrix.rows
            bias_matrix = self._vector(bias, f"bias of '{name}'", features, keep)
        return self.add_matrix(
            name, matrix, bias_matrix.data, bias_matrix.dtype, fan_in_fan_out, head, keep, shard=shard, gathered=gathered
        )

    def _vector(self, array: Any, what: str, features: int, keep: List[Any]) -> Any:
        matrix, owner = matrix_of(array, what, self.context.dl_device)
        if (matrix.rows, matrix.columns) != (1, features):
            raise InvalidArgument(f"{what} is [{matrix.rows},{matrix.columns}]: must have {features} elements")
        keep.append(owner)
        return matrix

    def add_matrix(
        self, name: str, matrix: Any, bias: Optional[int], bias_dtype: int, fan_in_fan_out: bool, head: bool, keep: Any = None,
        *, shard: Optional[Shard] = None, gathered: bool = False,
    ) -> int:  # fmt: skip
        """The same from addresses; `keep` is kept alive as long as the model."""
        linear = struct("linear", name=name, weight=matrix, bias=bias, bias_dtype=bias_dtype)
        if shard is not None:
            linear.shard = _abi.plora_shard(*shard)
        return self._add(lib.plora_model_add_linear, linear, fan_in_fan_out, head, keep, gathered)

    def _add(
        self, function: Any, linear: Any, fan_in_fan_out: bool, head: bool, keep: Any, gathered: bool = False
    ) -> int:
        linear.flags = _abi.PLORA_LAYER_FAN_IN_FAN_OUT * bool(fan_in_fan_out) | _abi.PLORA_LAYER_HEAD * bool(head)
        linear.flags |= _abi.PLORA_LAYER_GATHERED * bool(gathered)
        owner, layer = self.held, c_int32()
        check(function(owner, byref(linear), byref(layer)))
        owner.keep.append(keep)
        return layer.value

    def add_quantised(
        self, name: str, weight: Quantised, bias: Any = None, fan_in_fan_out: bool = False, head: bool = False, *,
        master: Any = None, values: Any = None,
    ) -> int:  # fmt: skip
        """Adds a layer whose weight is int8 or NF4, and returns its index; the arrays of `weight` are used where they are.

        master: what unloads add to, and make the codes from. None: nothing, to be trained on alone; "memory": a copy in memory; a
        directory: in a file without a name there; or an fp32 array of the weight's shape in host memory, which unloads write.
        values: what the first two of these start from, fp32, bf16 or fp16; None = what the codes hold.
        """
        linear = struct("quantised_linear", name=name, weight=weight.described)
        keep: List[Any] = [weight]
        shape = weight.shape
        if bias is not None:
            features = shape[1] if fan_in_fan_out else shape[0]
            matrix = self._vector(bias, f"bias of '{name}'", features, keep)
            linear.bias, linear.bias_dtype = matrix.data, matrix.dtype
        if hasattr(master, "__array_interface__") or hasattr(master, "__dlpack__"):
            if values is not None:
                raise InvalidArgument(f"master of '{name}' is an array, which holds its values: values= must be None")
            linear.master, values = _abi.PLORA_MASTER_HOST, master
        elif master == "memory":
            linear.master = _abi.PLORA_MASTER_MEMORY
        elif master is not None:
            linear.master, linear.directory = _abi.PLORA_MASTER_FILE, path_bytes(master)
        if values is not None:
            host = linear.master == _abi.PLORA_MASTER_HOST
            device = (CPU, 0) if host else None
            linear.values, owner = matrix_of(values, f"values of '{name}'", device, write=host)
            keep.append(owner if host else None)
        return self._add(lib.plora_model_add_quantised, linear, fan_in_fan_out, head, keep)

    def master(self, layer: int) -> Any:
        """The master of a quantised layer as a numpy view, fp32; None without one, NotFound where the layer is not quantised."""
        linear = struct("quantised_linear")
        check(lib.plora_model_quantised(self.held, layer, byref(linear)))
        return view(linear.values, self._owner) if linear.values.data else None

    def requantise(self, stream: Optional[int] = None) -> None:
        """Makes the codes of all layers anew from their masters, which the host has written itself."""
        check(lib.plora_model_requantise(self.held, stream))

    def __len__(self) -> int:
        return lib.plora_model_layer_count(self.held)

    def find(self, name: str) -> int:
        layer = c_int32()
        check(lib.plora_model_find_layer(self.held, name.encode(), byref(layer)))
        return layer.value

    def layer(self, layer: int) -> Dict[str, Any]:
        """name, in_features, out_features, dtype, fan_in_fan_out, head, gathered; shard: (first row, first column, rows, columns)
        of the whole, or None; weight: a numpy view; None on CUDA, or quantised."""
        linear = struct("linear")
        check(lib.plora_model_layer(self.held, layer, byref(linear)))
        matrix = linear.weight
        swapped = bool(linear.flags & _abi.PLORA_LAYER_FAN_IN_FAN_OUT)
        return {
            "name": linear.name.decode(),
            "in_features": matrix.rows if swapped else matrix.columns,
            "out_features": matrix.columns if swapped else matrix.rows,
            "dtype": DTYPES.get(matrix.dtype, matrix.dtype),
            "fan_in_fan_out": swapped,
            "head": bool(linear.flags & _abi.PLORA_LAYER_HEAD),
            "gathered": bool(linear.flags & _abi.PLORA_LAYER_GATHERED),
            "shard": tuple(fields(linear.shard).values()) if linear.shard.rows else None,
            "weight": self._view(matrix),
        }

    def names(self) -> List[str]:
        return [self.layer(i)["name"] for i in range(len(self))]

    def tensor(self, name: str) -> Any:
        """A tensor of an opened model by its full name, as a numpy view; a vector has one row."""
        matrix = _abi.plora_matrix()
        check(lib.plora_model_find_tensor(self.held, name.encode(), byref(matrix)))
        return self._view(matrix)

    def _view(self, matrix: Any) -> Any:
        return view(matrix, self._owner) if self.context.backend == "cpu" and matrix.data else None

    def save(self, path: Any) -> None:
        """All tensors with their present values, as one safetensors file; atomic."""
        check(lib.plora_model_save(self.held, path_bytes(path)))

    def clear_residuals(self, stream: Optional[int] = None) -> None:
        check(lib.plora_model_clear_residuals(self.held, stream))


def view(matrix: Any, owner: Any) -> Any:
    """A numpy view of a matrix in host memory: bfloat16 as ml_dtypes has it, or its bits as uint16 where that is missing."""
    import numpy

    if matrix.dtype == _abi.PLORA_BF16:
        try:
            from ml_dtypes import bfloat16 as dtype
        except ImportError:
            dtype = numpy.uint16
    else:
        dtype = {_abi.PLORA_F32: numpy.float32, _abi.PLORA_F16: numpy.float16}[matrix.dtype]
    item = numpy.dtype(dtype).itemsize
    if not matrix.rows or not matrix.columns:
        return numpy.empty((matrix.rows, matrix.columns), dtype)
    bytes_ = ((matrix.rows - 1) * matrix.stride + matrix.columns) * item
    memory_ = (ctypes.c_char * bytes_).from_address(matrix.data)
    memory_.owner = owner
    flat = numpy.frombuffer(memory_, dtype=dtype)
    return numpy.lib.stride_tricks.as_strided(
        flat, (matrix.rows, matrix.columns), (matrix.stride * item, item), writeable=True
    )


# ----------------------------------------------------------------------------------------------------------- adapters


class Adapter(NamedTuple):
    """One layer's adapter, as views into the arenas: a [R,K], b [N,R], their gradients, and s."""

    a: Any
    b: Any
    a_gradient: Any
    b_gradient: Any
    scale: float


def adapter_options(
    rank: int, alpha: float, dropout: float, seed: int, targets: Patterns, exclude: Patterns, init: str, rslora: bool,
    residual: str, overrides: Optional[Mapping[str, Any]], workspace_tokens: int,
) -> Any:  # fmt: skip
    """plora_adapters_options; overrides: {pattern: rank} or {pattern: (rank, alpha)}."""
    options = struct(
        "adapters_options",
        rank=rank,
        alpha=float(alpha),
        dropout=float(dropout),
        seed=seed,
        targets=patterns(targets),
        exclude=patterns(exclude),
        init=choice("init", init, INITS),
        rslora=int(rslora),
        residual=choice("residual", residual, RESIDUALS),
        workspace_tokens=workspace_tokens,
    )
    if overrides:
        made = (_abi.plora_adapters_override * len(overrides))()
        for place, (pattern, value) in zip(made, overrides.items()):
            of_rank, of_alpha = (value, 0.0) if isinstance(value, int) else value
            place.pattern, place.rank, place.alpha = pattern.encode(), of_rank, of_alpha
        options.overrides, options.override_count = made, len(overrides)
    return options


class Adapters(_Object):
    """Low-rank adapters on the layers of a model: A [R,K] and B [N,R] in fp32, in one arena, their gradients in another.

    rank, alpha: s = alpha / rank, with rslora alpha / sqrt(rank). targets, exclude: "all-linear", names, or globs.
    init: "kaiming" or "gaussian". residual: where 16-bit weights keep their residual, "default", "none", "device", "host".
    overrides: {pattern: rank} or {pattern: (rank, alpha)}. seed: of init and dropout.
    """

    def __init__(
        self,
        model: Model,
        rank: int = 8,
        alpha: float = 16.0,
        targets: Patterns = "all-linear",
        *,
        exclude: Patterns = None,
        dropout: float = 0.0,
        seed: int = 0,
        init: str = "kaiming",
        rslora: bool = False,
        residual: str = "default",
        overrides: Optional[Mapping[str, Any]] = None,
        workspace_tokens: int = 0,
        directory: Any = None,
    ) -> None:
        options = adapter_options(
            rank, alpha, dropout, seed, targets, exclude, init, rslora, residual, overrides, workspace_tokens
        )
        self.model = model
        if directory is None:
            handle = create(lib.plora_adapters_create, model.held, byref(options))
        else:
            handle = create(lib.plora_adapters_load, model.held, path_bytes(directory), byref(options))
        self._owner = _Owner(handle, lib.plora_adapters_destroy, model._owner)

    @classmethod
    def load(cls, model: Model, directory: Any, **options: Any) -> "Adapters":
        """From a PEFT directory. options: dropout, seed, init, residual, workspace_tokens."""
        return cls(model, directory=directory, **options)

    def save(self, directory: Any) -> None:
        """The live adapter as a PEFT directory. What was unloaded is in the weights, not here."""
        check(lib.plora_adapters_save(self.held, path_bytes(directory)))

    @property
    def stage(self) -> int:
        """Unloads so far."""
        return lib.plora_adapters_stage(self.held)

    def arena(self, gradients: bool = False) -> Tuple[int, int]:
        """(address, floats) of the parameters, or of the gradients."""
        return arena(lib.plora_adapters_gradients if gradients else lib.plora_adapters_parameters, self.held)

    def _flat(self, gradients: bool) -> Any:
        address, count = self.arena(gradients)
        return view(_abi.plora_matrix(address, 1, count, count, _abi.PLORA_F32, 0), self._owner)[0]

    @property
    def parameters(self) -> Any:
        """All of A and B, a flat numpy view, fp32."""
        return self._flat(False)

    @property
    def gradients(self) -> Any:
        """Their gradients, in the same layout: one all-reduce."""
        return self._flat(True)

    def matrices(self, layer: int) -> Any:
        """plora_adapter of a layer; NotFound where it has none."""
        adapter = struct("adapter")
        check(lib.plora_adapters_layer(self.held, layer, byref(adapter)))
        return adapter

    def layer(self, layer: int) -> Adapter:
        """The adapter of a layer as numpy views; NotFound where it has none."""
        adapter = self.matrices(layer)
        parts = (adapter.a, adapter.b, adapter.a_gradient, adapter.b_gradient)
        a, b, a_gradient, b_gradient = (view(part, self._owner) for part in parts)
        return Adapter(a, b, a_gradient, b_gradient, adapter.scale)

    def layers(self) -> Iterator[int]:
        """The layers that have an adapter. A tied weight's layers all do, the same one."""
        for layer in range(len(self.model)):
            try:
                self.matrices(layer)
            except NotFound:
                continue
            yield layer

    def forward(
        self, layer: int, x: Any, y: Any, *, dropout: bool = False, delta_only: bool = False, stream: Optional[int] = None
    ) -> Any:
        """y = x W^T + bias + s dropout(x) A^T B^T into y [T,N], which is returned; x [T,K]; each fp32 or bf16.

        delta_only: y += s dropout(x) A^T B^T.
        """
        flags = _abi.PLORA_LINEAR_DROPOUT * bool(dropout) | _abi.PLORA_LINEAR_DELTA_ONLY * bool(delta_only)
        device = self.model.context.dl_device
        x_matrix, keep_x = matrix_of(x, "x", device)
        y_matrix, keep_y = matrix_of(y, "y", device, write=True)
        check(lib.plora_linear_forward(self.held, layer, byref(x_matrix), byref(y_matrix), flags, stream))
        del keep_x, keep_y
        return y

    def backward(
        self, layer: int, x: Any, dy: Any, dx: Any = None, *, dropout: bool = False, delta_only: bool = False,
        accumulate: bool = False, stream: Optional[int] = None,
    ) -> Any:  # fmt: skip
        """Adds to the gradients of A and B; dx = dy W + s dropout'(dy B A) into dx [T,K] where one is given."""
        flags = _abi.PLORA_LINEAR_DROPOUT * bool(dropout) | _abi.PLORA_LINEAR_DELTA_ONLY * bool(delta_only)
        flags |= _abi.PLORA_LINEAR_ACCUMULATE * bool(accumulate)
        device = self.model.context.dl_device
        x_matrix, keep_x = matrix_of(x, "x", device)
        dy_matrix, keep_dy = matrix_of(dy, "dy", device)
        dx_matrix, keep_dx = (None, None) if dx is None else matrix_of(dx, "dx", device, write=True)
        check(
            lib.plora_linear_backward(
                self.held, layer, byref(x_matrix), byref(dy_matrix), dx_matrix and byref(dx_matrix), flags, stream
            )
        )
        del keep_x, keep_dy, keep_dx
        return dx

    def set_dropout_position(self, step: int, first_token: int = 0) -> None:
        """The masks of the calls that follow are a function of (seed, step, layer, first_token + row, column)."""
        check(lib.plora_adapters_set_dropout_position(self.held, step, first_token))

    def unload(
        self, optimizer: Optional["Optimizer"] = None, *, momentum: float = 1.0, moments: str = "default",
        rounding: str = "default", without_master: bool = False, report: bool = True, stream: Optional[int] = None,
    ) -> "Optional[UnloadReport]":  # fmt: skip
        """Ends a stage: W += m s B A. m = 1: a fresh adapter, optimizer and schedule restart; m < 1: A, B times sqrt(1 - m).

        without_master: quantised weights without a master, which are refused, are unloaded into all the same and lose nearly all of it.
        Returns what each weight could hold of it, or with report = False nothing, which is quicker.
        """
        options = struct(
            "unload_options",
            momentum=float(momentum),
            moments=choice("moments", moments, MOMENTS),
            rounding=choice("rounding", rounding, ROUNDINGS),
            without_master=int(without_master),
        )
        handle = self.held
        result, layers = None, None
        if report:
            layers = (_abi.plora_unload_layer * max(1, len(self.model)))()
            result = struct("unload_report", layers=layers, layer_capacity=len(layers))
        check(
            lib.plora_unload(
                handle, optimizer.held if optimizer else None, byref(options), result and byref(result), stream
            )
        )
        return UnloadReport.of(result, layers, self.model) if report else None


class LayerReport(NamedTuple):
    """What an unload did to one weight. D = m s B A is the wanted update, W' - W the one that is held."""

    name: str
    rank: int
    scale: float  # m s
    update_rms: float
    weight_rms: float
    captured: float  # <W' - W, D> / <D, D>
    changed: float  # share of the weights whose bits changed
    lost_max: float
    lost_rms: float
    effective_rank: float
    quantised_rms: float  # of a weight with a master, else 0: rms and max of what products see less the master
    quantised_max: float


class UnloadReport(NamedTuple):
    """What an unload did, over all weights (see LayerReport) and for each."""

    stage: int  # that ended
    weights: int
    update_rms: float
    weight_rms: float
    captured: float
    changed: float
    lost_max: float
    lost_rms: float
    effective_rank: float  # mean
    layers: Tuple[LayerReport, ...]

    @classmethod
    def of(cls, report: Any, layers: Any, model: Model) -> "UnloadReport":
        parts = []
        for part in layers[: report.weights]:
            values = fields(part, "layer")
            parts.append(LayerReport(name=model.layer(part.layer)["name"], **known(LayerReport, values)))
        values = fields(report, "layers", "layer_capacity")
        return cls(**known(cls, values), layers=tuple(parts))

    def __str__(self) -> str:
        return (
            f"stage {self.stage} unloaded into {self.weights} weights: update rms {self.update_rms:.3g} on {self.weight_rms:.3g}, "
            f"captured {self.captured:.4f}, effective rank {self.effective_rank:.2f}"
        )


# ---------------------------------------------------------------------------------------------------------- optimizer


class StepReport(NamedTuple):
    gradient_norm: float  # global L2, before clipping
    learning_rate: float  # of A
    step: int  # since the last reset


class Optimizer(_Object):
    """AdamW or SGD over the arena of a set of adapters, in one pass, with a schedule that unloads restart.

    schedule: "constant", "linear", "cosine", "relora" over `period` steps, after `warmup`; final: its end over its beginning.
    b_ratio: the rate of B over that of A (LoRA+). clip: bound of the gradients' global norm; 0 = none.
    """

    def __init__(
        self,
        adapters: Adapters,
        lr: float = 2e-4,
        *,
        algorithm: str = "adamw",
        betas: Tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        schedule: str = "constant",
        warmup: int = 0,
        period: int = 0,
        rewarmup: int = 0,
        final: float = 0.0,
        b_ratio: float = 1.0,
        clip: float = 0.0,
    ) -> None:
        options = struct(
            "optimizer_options",
            algorithm=choice("algorithm", algorithm, {"adamw": 0, "sgd": 1}),
            schedule=choice("schedule", schedule, SCHEDULES),
            learning_rate=float(lr),
            beta1=float(betas[0]),
            beta2=float(betas[1]),
            epsilon=float(eps),
            weight_decay=float(weight_decay),
            b_ratio=float(b_ratio),
            max_gradient_norm=float(clip),
            final_ratio=float(final),
            warmup_steps=warmup,
            period_steps=period,
            rewarmup_steps=rewarmup,
        )
        self.adapters = adapters
        handle = create(lib.plora_optimizer_create, adapters.held, byref(options))
        self._owner = _Owner(handle, lib.plora_optimizer_destroy, adapters._owner)

    def step(self, gradient_scale: float = 1.0, report: bool = False, stream: Optional[int] = None) -> Optional[StepReport]:
        """One update from the gradients times gradient_scale. NonFinite: nothing changed, not counted."""
        result = struct("step_report") if report else None
        check(lib.plora_optimizer_step(self.held, gradient_scale, result and byref(result), stream))
        return StepReport(**known(StepReport, fields(result))) if result is not None else None

    def zero_gradients(self, stream: Optional[int] = None) -> None:
        check(lib.plora_optimizer_zero_gradients(self.held, stream))

    def reset(self, stream: Optional[int] = None) -> None:
        check(lib.plora_optimizer_reset(self.held, stream))

    @property
    def learning_rate(self) -> float:
        """Of A in the next step."""
        return lib.plora_optimizer_learning_rate(self.held)

    def set_learning_rate(self, lr: float) -> None:
        """lr from the next step on; the schedule goes on as a factor on it."""
        check(lib.plora_optimizer_set_learning_rate(self.held, float(lr)))

    def addresses(self) -> Tuple[int, int, int, int]:
        """(first moment, second moment or 0, floats, steps since the last reset)."""
        kind = ctypes.POINTER(ctypes.c_float)
        first, second, count, step = kind(), kind(), c_int64(), c_int64()
        check(lib.plora_optimizer_state(self.held, byref(first), byref(second), byref(count), byref(step)))
        cast = lambda pointer: ctypes.cast(pointer, c_void_p).value or 0  # noqa: E731
        return cast(first), cast(second), count.value, step.value

    def moments(self) -> Tuple[Any, Any]:
        """First and second moment as flat numpy views; SGD has no second."""
        first, second, count, _ = self.addresses()
        as_view = lambda a: view(_abi.plora_matrix(a, 1, count, count, 0, 0), self._owner)[0] if a else None  # noqa: E731
        return as_view(first), as_view(second)


def save_checkpoint(adapters: Adapters, optimizer: Optional[Optimizer], path: Any, weights: bool = False) -> None:
    """Adapters, moments, counters, stage and residuals in one file; with `weights` what they were merged into, too."""
    flags = _abi.PLORA_CHECKPOINT_WEIGHTS if weights else 0
    check(lib.plora_checkpoint_save(adapters.held, optimizer.held if optimizer else None, path_bytes(path), flags))


def load_checkpoint(adapters: Adapters, optimizer: Optional[Optimizer], path: Any) -> None:
    """Goes on to the very same bits. An error has changed nothing."""
    check(lib.plora_checkpoint_load(adapters.held, optimizer.held if optimizer else None, path_bytes(path)))


# ------------------------------------------------------------------------------------------------------------- ledger


class Ledger(_Object):
    """The record of every unload from now on: with the original weights it gives any W_t back, to the bit.

    path: of the file, or None for memory. original: a model with the weights W_0. sync: on the disk before W changes.
    """

    def __init__(
        self, adapters: Adapters, path: Any = None, *, original: Optional[Model] = None, sync: bool = True,
        hash_weights: bool = False,
    ) -> None:  # fmt: skip
        first = original.held if original else None
        options = struct(
            "ledger_options",
            path=None if path is None else path_bytes(path),
            original=first.handle if first else None,
            sync=int(sync),
            hash_weights=int(hash_weights),
        )
        self.adapters = adapters
        handle = create(lib.plora_ledger_open, adapters.held, byref(options))
        self._owner = _Owner(handle, lib.plora_ledger_destroy, (adapters._owner, first))

    def __len__(self) -> int:
        return lib.plora_ledger_length(self.held)

    @property
    def position(self) -> int:
        """Records that the weights hold; -1: not known."""
        return lib.plora_ledger_position(self.held)

    def record(self, record: int) -> Dict[str, Any]:
        info = struct("ledger_record_info")
        check(lib.plora_ledger_record(self.held, record, byref(info)))
        return fields(info)

    def factors(self, record: int, layer: int) -> Tuple[Any, Any, float]:
        """(A [R,K], B [N,R], m s) before that unload, as copies."""
        a, b, factor = _abi.plora_matrix(), _abi.plora_matrix(), ctypes.c_double()
        check(lib.plora_ledger_factors(self.held, record, layer, byref(a), byref(b), byref(factor)))
        return view(a, self._owner).copy(), view(b, self._owner).copy(), factor.value

    def roll_back(self, records: int, weights_only: bool = False) -> None:
        """Makes the weights W_t, t = records, and the adapters those of that time."""
        check(lib.plora_ledger_roll_back(self.held, records, _abi.PLORA_LEDGER_WEIGHTS_ONLY * bool(weights_only)))

    def truncate(self, records: int) -> None:
        check(lib.plora_ledger_truncate(self.held, records))

    def verify(self) -> None:
        """Raises InvalidArgument unless the weights are W_t, t = position, bit for bit."""
        check(lib.plora_ledger_verify(self.held))

    def export(
        self, path: Any, *, format: str = "peft", rank: int = 0, max_error: float = 0.0, live: bool = True, records: int = -1,
        heads: int = 0, kv_heads: int = 0,
    ) -> Dict[str, Any]:  # fmt: skip
        """All stages as one ordinary adapter for the original weights; returns records, live, weights, rank, norm, error."""
        options = struct(
            "export_options",
            format=choice("format", format, {"peft": _abi.PLORA_EXPORT_PEFT, "gguf": _abi.PLORA_EXPORT_GGUF}),
            rank=rank,
            max_error=float(max_error),
            live=int(live),
            records=records,
            heads=heads,
            kv_heads=kv_heads,
        )
        report = struct("export_report")
        check(lib.plora_ledger_export(self.held, path_bytes(path), byref(options), byref(report)))
        return fields(report, "layers", "layer_capacity")

    def compact(self, path: Any, first: int, count: int, *, rank: int = 0, max_error: float = 0.0) -> Dict[str, Any]:
        """A smaller ledger at `path`, in which one record stands for `count` from `first` on."""
        options, report = struct("export_options", rank=rank, max_error=float(max_error)), struct("export_report")
        check(lib.plora_ledger_compact(self.held, path_bytes(path), first, count, byref(options), byref(report)))
        return fields(report, "layers", "layer_capacity")


