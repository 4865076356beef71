"""PeriodicLoRA: low-rank adapters that are merged into the model at the end of each stage, so that their sum has a high rank.

    plora                the library's objects, on arrays of numpy or of whatever speaks DLPack
    plora.torch          attach(model, rank=16), AdamW, unload, for PyTorch models
    plora.transformers   PeriodicUnload, a callback for Hugging Face's Trainer
    plora._native        the C functions themselves, through ctypes
"""

from ._handles import (
    Adapter,
    Adapters,
    Context,
    LayerReport,
    Ledger,
    Model,
    Optimizer,
    StepReport,
    UnloadReport,
    load_checkpoint,
    save_checkpoint,
)
from ._native import (
    BackendFailure,
    BackendUnavailable,
    Busy,
    Error,
    InputOutput,
    InvalidArgument,
    Malformed,
    NonFinite,
    NotFound,
    OutOfMemory,
    ShapeMismatch,
    Unsupported,
    version,
)

from ._quantised import Quantised
from ._serving import Batch, Registry, Snapshot, SnapshotInfo

__version__ = version()

__all__ = [
    "Adapter", "Adapters", "BackendFailure", "BackendUnavailable", "Batch", "Busy", "Context", "Error", "InputOutput",
    "InvalidArgument", "LayerReport", "Ledger", "Malformed", "Model", "NonFinite", "NotFound", "Optimizer", "OutOfMemory",
    "Quantised", "Registry", "ShapeMismatch", "Snapshot", "SnapshotInfo", "StepReport", "Unsupported", "UnloadReport",
    "load_checkpoint", "save_checkpoint", "version",
]  # fmt: skip
