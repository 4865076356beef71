"""Serving many adapters over one model: Registry, Snapshot, Batch. docs/serving.md tells what they are for.

    registry = Registry(model); registry.load("a", "adapters/a"); batch = Batch(model)
    with registry.acquire("a") as snapshot:
        batch.begin([0, -1, 0], [snapshot])              # tokens 0 and 2 are a's, token 1 is the backbone's
        batch.forward([q, k, v], x, [y_q, y_k, y_v])

A registry and its snapshots may be used from any thread at any time; a batch by one at a time.
"""

import ctypes
from ctypes import byref, c_int32, c_int64, c_void_p
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

from . import _abi
from ._handles import Adapters, Model, _Object, _Owner, fields, known
from ._memory import CPU, matrix_of
from ._native import InvalidArgument, NotFound, check, create, lib, path_bytes, struct

NAME_BYTES = 256  # of the longest name, with its end


class SnapshotInfo(NamedTuple):
    """One version of an adapter."""

    name: str
    version: int  # never given twice by a registry
    bytes: int  # in the memory that products read; 0 while evicted
    holders: int
    acquired: int  # how many times by name so far
    rank: int  # the highest of its layers
    weights: int  # that it has factors for
    pinned: bool
    merged: bool

    @classmethod
    def of(cls, info: Any, name: Any) -> "SnapshotInfo":
        values = known(cls, fields(info, "name"))
        values.update(name=name.decode(errors="replace"), pinned=bool(info.pinned), merged=bool(info.merged))
        return cls(**values)


class Snapshot(_Object):
    """A reference to one version of an adapter, made by Registry.acquire(). close(), or the end of `with`, releases it."""

    def __init__(self, handle: int, keep: Any) -> None:
        self._owner = _Owner(handle, lib.plora_snapshot_release, keep)

    @property
    def info(self) -> SnapshotInfo:
        info, owner = struct("snapshot_info"), self.held
        check(lib.plora_snapshot_describe(owner, byref(info)))
        return SnapshotInfo.of(info, info.name)

    def retain(self) -> "Snapshot":
        """One more reference, to be passed on."""
        owner = self.held
        lib.plora_snapshot_retain(owner)
        return Snapshot(owner.handle, owner.keep)


class Registry(_Object):
    """Names of adapters and their present snapshots, for the layers that the model has; no more can be added to it.

    memory_budget: bytes that all snapshots may take, 0 = no bound: those acquired longest ago are evicted to spill_directory.
    """

    def __init__(self, model: Model, memory_budget: int = 0, spill_directory: Any = None) -> None:
        options = struct(
            "registry_options",
            memory_budget=memory_budget,
            spill_directory=None if spill_directory is None else path_bytes(spill_directory),
        )
        self.model = model
        handle = create(lib.plora_registry_create, model.held, byref(options))
        self._owner = _Owner(handle, lib.plora_registry_destroy, model._owner)

    def load(self, name: str, path: Any, *, heads: int = 0, kv_heads: int = 0) -> int:
        """A PEFT directory or a GGUF file under a name, whose present one it replaces; returns the version. Holders keep theirs."""
        options, version = struct("adapters_options", heads=heads, kv_heads=kv_heads), c_int64()
        check(lib.plora_registry_load(self.held, name.encode(), path_bytes(path), byref(options), byref(version)))
        return version.value

    def add(self, name: str, layers: Mapping[Union[int, str], Tuple[Any, Any, float]]) -> int:
        """The same from {layer or its name: (A [R,K], B [N,R], scale)}, fp32, bf16 or fp16 in host memory; copied."""
        made, keep = (_abi.plora_registry_layer * max(1, len(layers)))(), []
        for place, (layer, (a, b, scale)) in zip(made, layers.items()):
            place.layer = self.model.find(layer) if isinstance(layer, str) else layer
            place.a, keep_a = matrix_of(a, f"A of layer {layer!r}", (CPU, 0))
            place.b, keep_b = matrix_of(b, f"B of layer {layer!r}", (CPU, 0))
            place.scale = scale
            keep += [keep_a, keep_b]
        version = c_int64()
        check(lib.plora_registry_add(self.held, name.encode(), made, len(layers), byref(version)))
        return version.value

    def publish(self, name: str, adapters: Adapters, stream: Optional[int] = None) -> int:
        """The same from adapters that are being trained on the model: a copy of A, B and scales as they are now."""
        version = c_int64()
        check(lib.plora_registry_publish(self.held, name.encode(), adapters.held, byref(version), stream))
        return version.value

    def unload(self, name: str, defer: bool = False) -> None:
        """Takes a name away. Busy while its snapshot is held; defer: its memory then goes with the last holder."""
        check(lib.plora_registry_unload(self.held, name.encode(), _abi.PLORA_REGISTRY_DEFER * bool(defer)))

    def pin(self, name: str, pinned: bool = True) -> None:
        """A pinned name is never evicted."""
        check(lib.plora_registry_pin(self.held, name.encode(), int(pinned)))

    def evict(self, name: str) -> None:
        """Out of the memory that products read, until it is acquired again."""
        check(lib.plora_registry_evict(self.held, name.encode()))

    def collect(self) -> None:
        """Frees what has neither a name nor a holder; all calls that change the registry do."""
        check(lib.plora_registry_collect(self.held))

    def acquire(self, name: str) -> Snapshot:
        """The present snapshot of a name, for a request to hold to its end."""
        owner, handle = self.held, c_void_p()
        check(lib.plora_registry_acquire(owner, name.encode(), byref(handle)))
        return Snapshot(handle.value or 0, owner.keep)

    def __iter__(self) -> Iterator[SnapshotInfo]:
        """What the names stand for, in their order."""
        name = ctypes.create_string_buffer(NAME_BYTES)
        index = 0
        while True:
            info = struct("snapshot_info")
            try:
                check(lib.plora_registry_entry(self.held, index, name, NAME_BYTES, byref(info)))
            except NotFound:
                return
            yield SnapshotInfo.of(info, name.value)
            index += 1

    def names(self) -> List[str]:
        return [entry.name for entry in self]

    def __len__(self) -> int:
        return self.statistics()["names"]

    def statistics(self) -> Dict[str, int]:
        """names, resident_bytes, evicted_bytes, retired and counters: acquired, missed, added, replaced ..."""
        result = struct("registry_statistics")
        check(lib.plora_registry_stats(self.held, byref(result)))
        return fields(result)

    def merge(self, name: str) -> None:
        """Puts a name's snapshot into the weights, W += s B A; unmerge() puts their very bits back."""
        check(lib.plora_registry_merge(self.held, name.encode()))

    def unmerge(self) -> None:
        check(lib.plora_registry_unmerge(self.held))


class Batch(_Object):
    """Which token of a step belongs to which snapshot, and the memory to compute with."""

    def __init__(self, model: Model, max_tokens: int = 1024, max_adapters: int = 64, max_rank: int = 64) -> None:
        options = struct("batch_options", max_tokens=max_tokens, max_adapters=max_adapters, max_rank=max_rank)
        self.model = model
        handle = create(lib.plora_batch_create, model.held, byref(options))
        self._owner = _Owner(handle, lib.plora_batch_destroy, model._owner)

    def begin(self, slots: Any, snapshots: Sequence[Snapshot], stream: Optional[int] = None) -> None:
        """The next step: token t belongs to snapshots[slots[t]], -1 = to the backbone alone. The batch holds them until the next."""
        owners = [snapshot.held for snapshot in snapshots]
        handles = (c_void_p * max(1, len(owners)))(*(owner.handle for owner in owners))
        numbers = slots.tolist() if hasattr(slots, "tolist") else list(slots)
        if any(not isinstance(slot, int) or not -1 <= slot < len(owners) for slot in numbers):
            bad = next(slot for slot in numbers if not isinstance(slot, int) or not -1 <= slot < len(owners))
            raise InvalidArgument(f"slot {bad!r}: must be an integer from -1 to {len(owners) - 1}")
        table = (c_int32 * max(1, len(numbers)))(*numbers)
        check(lib.plora_batch_begin(self.held, len(numbers), table, handles, len(owners), stream))

    def forward(
        self, layers: Sequence[int], x: Any, y: Sequence[Any], *, delta_only: bool = False, stream: Optional[int] = None
    ) -> Sequence[Any]:
        """y_i = x W_i^T + bias_i + s x A_i^T B_i^T into y[i] [T,N_i] for each layer, all with the same K; x [T,K]; fp32 or bf16.

        delta_only: only the last term, added to y[i].
        """
        if len(layers) != len(y):
            raise InvalidArgument(f"{len(layers)} layers and {len(y)} outputs: must be as many")
        device = self.model.context.dl_device
        x_matrix, keep_x = matrix_of(x, "x", device)
        made = [matrix_of(part, f"y[{i}]", device, write=True) for i, part in enumerate(y)]
        outputs = (_abi.plora_matrix * max(1, len(made)))(*(part for part, _ in made))
        numbers = (c_int32 * max(1, len(layers)))(*layers)
        flags = _abi.PLORA_LINEAR_DELTA_ONLY * bool(delta_only)
        check(lib.plora_batch_forward(self.held, numbers, len(layers), byref(x_matrix), outputs, flags, stream))
        del keep_x, made
        return y
