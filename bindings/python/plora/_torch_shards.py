"""Weights of which each rank holds a part: DTensors of tensor parallelism (parallelize_module) and of FSDP2 (fully_shard).

    tensor parallel   the layer is the shard: x and y as DTensors, A and B those of its columns and rows of W; what ranks have
                      but parts of is summed: dA of row shards, dB of column shards (y, dx: DTensor does it)
    FSDP2             torch gathers W for its own x W^T; A and B are whole and the same on all ranks; an unload writes the shard

Either way an unload stays where the shard is. plora.h, plora_shard, says the rest. Refused by name: more than one cut, strided
cuts, ranks without a row.
"""

from typing import Any, List, NamedTuple, Optional, Set, Tuple

import torch
from torch import nn

from ._native import InvalidArgument, Unsupported


class Place(NamedTuple):
    shard: Tuple[int, int, int, int]  # first row, first column, rows, columns: of W[N,K]
    by_rows: bool  # the cut goes between rows of W
    gathered: bool  # FSDP2
    mesh: Any
    mesh_dimension: int  # of the cut


def is_dtensor(tensor: Any) -> bool:
    return hasattr(tensor, "to_local") and hasattr(tensor, "placements")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a DTensor that this rank holds; any other tensor itself."""
    return tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def arrived(tensor: Any) -> torch.Tensor:
    """What a DTensor's collective has yet to bring is waited for; any other tensor itself."""
    return tensor.wait() if hasattr(tensor, "trigger_wait") else tensor


def fsdp_modules(model: nn.Module) -> List[Any]:
    """Those that fully_shard() was applied to."""
    if not any(hasattr(module, "_get_fsdp_state") for module in model.modules()):
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def gathered(model: nn.Module) -> Set[int]:
    """The ids of the modules whose weights FSDP2 gathers."""
    return {id(module) for outer in fsdp_modules(model) for module in outer.modules()}


def reshard(modules: List[Any]) -> None:
    """FSDP2 keeps the whole weights of its root after a forward: the shards are what counts, and what is gathered next."""
    for module in modules:
        module.reshard()


def place_of(weight: Any, conv: bool, is_gathered: bool) -> Tuple[Optional[Place], str]:
    """Where this rank's part of a DTensor lies, or why it is refused: on all ranks alike."""
    mesh, placements = weight.device_mesh, weight.placements
    names = ", ".join(str(p) for p in placements)
    cuts = [(i, p) for i, p in enumerate(placements) if not p.is_replicate()]
    if len(cuts) > 1 or (cuts and type(cuts[0][1]).__name__ != "Shard"):
        return None, f"has a DTensor weight placed ({names}): must be cut once, by Shard(0) or Shard(1)"
    if not is_gathered and (not cuts or mesh.ndim != 1):
        return None, f"has a DTensor weight placed ({names}): without FSDP2 it must be Shard(0) or Shard(1) of a mesh of one dimension"
    if not is_gathered and conv:
        return None, "is a Conv1D with a DTensor weight: tensor parallelism is for nn.Linear"
    rows, columns = (weight.shape[1], weight.shape[0]) if conv else weight.shape
    if not cuts:
        return Place((0, 0, rows, columns), True, True, mesh, 0), ""
    dimension, placement = cuts[0]
    axis = placement.dim % 2
    ranks, rank, length = mesh.size(dimension), mesh.get_local_rank(dimension), weight.shape[axis]
    chunk = -(-length // ranks)
    if chunk * (ranks - 1) >= length:
        return None, f"has a weight {list(weight.shape)} cut into {ranks} along dimension {axis}: some rank would hold none of it"
    first = chunk * rank
    if weight.to_local().shape[axis] != min(chunk, length - first):
        return None, f"has a DTensor weight whose part on rank {rank} has {weight.to_local().shape[axis]} of {length}, not {chunk}"
    by_rows = (axis == 0) != conv
    shard = (first if by_rows else 0, 0 if by_rows else first, rows, columns)
    return Place(shard, by_rows, is_gathered, mesh, dimension), ""


class Group:
    """The ranks that a model's shards lie on, and what they have to agree on."""

    def __init__(self, model: nn.Module, places: List[Tuple[str, Optional[Place]]]) -> None:
        self.fsdp_modules = fsdp_modules(model)
        self.places = {name: place for name, place in places if place is not None}
        kinds = {(place.gathered, place.mesh) for place in self.places.values()}
        if len(kinds) > 1:
            raise Unsupported(f"the layers are sharded over {len(kinds)} meshes, or some by FSDP2 and some not: must be one")
        self.mesh: Any = next(iter(kinds))[1] if kinds else None
        self.gathered = bool(kinds) and next(iter(kinds))[0]
        self.parallel = bool(kinds) and not self.gathered

    def dropout_rank(self) -> int:
        """Ranks of a tensor-parallel group see the same tokens, others their own."""
        distributed = torch.distributed
        if self.parallel:
            return min(distributed.get_process_group_ranks(self.mesh.get_group(0)))
        return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0

    def all_reduce(self, tensor: torch.Tensor, operation: Any = None) -> None:
        """Over all ranks of the mesh; the sum unless said otherwise."""
        operation = torch.distributed.ReduceOp.SUM if operation is None else operation
        for dimension in range(self.mesh.ndim):
            torch.distributed.all_reduce(tensor, operation, group=self.mesh.get_group(dimension))

    def failed_elsewhere(self, failed: bool, device: torch.device) -> bool:
        """Whether something failed on any rank; a collective."""
        flag = torch.tensor([float(failed)], device=device)
        self.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag.item())


def whole_shape(shape: Any, last: int) -> Tuple[Tuple[int, ...], Tuple[int, ...]]:
    """(shape, stride) of a contiguous tensor [..., last]."""
    full = (*shape[:-1], last)
    stride, step = [], 1
    for extent in reversed(full):
        stride.append(step)
        step *= extent
    return full, tuple(reversed(stride))


def parallel_forward(name: str, place: Place, compute: Any, x: Any) -> Any:
    """y as a DTensor from x as one, with compute(x of this rank) -> y of this rank.

    Rows of W: x whole, y cut, and dx a sum over the ranks. Columns: x cut, y a sum over the ranks.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    if not is_dtensor(x):
        raise InvalidArgument(
            f"layer '{name}': its weight is a DTensor, x is a plain tensor: parallelize_module's styles make it a DTensor"
        )
    cut = Shard(x.dim() - 1)
    x = x.redistribute(place.mesh, [Replicate() if place.by_rows else cut])
    y = compute(x.to_local(grad_placements=[Partial() if place.by_rows else cut]))
    shape, stride = whole_shape(x.shape, place.shard[2])
    return DTensor.from_local(
        y, place.mesh, [cut if place.by_rows else Partial()], run_check=False, shape=torch.Size(shape), stride=stride
    )
