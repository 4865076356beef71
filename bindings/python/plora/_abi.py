# Made from include/plora.h by make_abi.py: do not edit, `make abi-update` writes it.
"""plora.h as ctypes: constants, structs, prototypes. What each means is said in plora.h."""
from ctypes import CFUNCTYPE, POINTER, Structure
from ctypes import c_char_p, c_double, c_float, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_uint8, c_void_p

PLORA_OK = 0
PLORA_ERROR_INVALID_ARGUMENT = 1
PLORA_ERROR_OUT_OF_MEMORY = 2
PLORA_ERROR_SHAPE = 3
PLORA_ERROR_UNSUPPORTED = 4
PLORA_ERROR_NOT_FOUND = 5
PLORA_ERROR_NON_FINITE = 6
PLORA_ERROR_IO = 7
PLORA_ERROR_FORMAT = 8
PLORA_ERROR_BACKEND_UNAVAILABLE = 9
PLORA_ERROR_BACKEND = 10
PLORA_ERROR_BUSY = 11
PLORA_F32 = 0
PLORA_BF16 = 1
PLORA_F16 = 2
PLORA_BACKEND_CPU = 0
PLORA_BACKEND_CUDA = 1
PLORA_LOG_ERROR = 0
PLORA_LOG_WARNING = 1
PLORA_LOG_INFO = 2
PLORA_LAYER_FAN_IN_FAN_OUT = 1
PLORA_LAYER_HEAD = 2
PLORA_LAYER_GATHERED = 4
PLORA_QUANTISED_INT8 = 0
PLORA_QUANTISED_NF4 = 1
PLORA_QUANTISE_KEEP_OFFSET = 1
PLORA_MASTER_NONE = 0
PLORA_MASTER_HOST = 1
PLORA_MASTER_MEMORY = 2
PLORA_MASTER_FILE = 3
PLORA_INIT_KAIMING_UNIFORM = 0
PLORA_INIT_GAUSSIAN = 1
PLORA_RESIDUAL_DEFAULT = 0
PLORA_RESIDUAL_NONE = 1
PLORA_RESIDUAL_DEVICE = 2
PLORA_RESIDUAL_HOST = 3
PLORA_LINEAR_DROPOUT = 1
PLORA_LINEAR_DELTA_ONLY = 2
PLORA_LINEAR_ACCUMULATE = 4
PLORA_OPTIMIZER_ADAMW = 0
PLORA_OPTIMIZER_SGD = 1
PLORA_SCHEDULE_CONSTANT = 0
PLORA_SCHEDULE_LINEAR = 1
PLORA_SCHEDULE_COSINE = 2
PLORA_SCHEDULE_RELORA = 3
PLORA_ROUND_DEFAULT = -1
PLORA_ROUND_NEAREST = 0
PLORA_ROUND_STOCHASTIC = 1
PLORA_ROUND_RESIDUAL = 2
PLORA_MOMENTS_DEFAULT = 0
PLORA_MOMENTS_RESET = 1
PLORA_MOMENTS_KEEP = 2
PLORA_CHECKPOINT_WEIGHTS = 1
PLORA_LEDGER_WEIGHTS_ONLY = 1
PLORA_EXPORT_PEFT = 0
PLORA_EXPORT_GGUF = 1
PLORA_REGISTRY_DEFER = 1
PLORA_VERSION_MAJOR = 0
PLORA_VERSION_MINOR = 1
PLORA_VERSION_PATCH = 0
PLORA_ABI_VERSION = 1


class plora_matrix(Structure):
    _fields_ = [
        ("data", c_void_p),
        ("rows", c_int64),
        ("columns", c_int64),
        ("stride", c_int64),
        ("dtype", c_int32),
        ("reserved", c_int32),
    ]


class plora_context_options(Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("backend", c_int32),
        ("device", c_int32),
        ("threads", c_int32),
        ("deterministic", c_int32),
        ("host_allocate", CFUNCTYPE(c_void_p, c_size_t, c_size_t, c_void_p)),
        ("host_free", CFUNCTYPE(None, c_void_p, c_size_t, c_void_p)),
        ("host_user", c_void_p),
        ("log", CFUNCTYPE(None, c_int32, c_char_p, c_void_p)),
        ("log_user", c_void_p),
        ("log_level", c_int32),
        ("reserved", c_int32),
        ("device_allocate", CFUNCTYPE(c_void_p, c_size_t, c_void_p)),
        ("device_free", CFUNCTYPE(None, c_void_p, c_size_t, c_void_p)),
        ("device_user", c_void_p),
    ]
    _defaults_: dict = {}


class plora_memory_statistics(Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("current_bytes", c_size_t),
        ("peak_bytes", c_size_t),
        ("allocations", c_int64),
        ("mapped_bytes", c_size_t),
        ("device_current_bytes", c_size_t),
        ("device_peak_bytes", c_size_t),
        ("device_allocations", c_int64),
    ]
    _defaults_: dict = {}


class plora_shard(Structure):
    _fields_ = [
        ("first_row", c_int64),
        ("first_column", c_int64),
        ("rows", c_int64),
        ("columns", c_int64),
    ]


class plora_linear(Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("name", c_char_p),
        ("weight", plora_matrix),
        ("bias", c_void_p),
        ("bias_dtype", c_int32),
        ("flags", c_int32),
        ("shard", plora_shard),
    ]
    _defaults_: dict = {}


class plora_quantised(Structure):
    _fields_ = [
        ("codes", c_void_p),
        ("scales", POINTER(c_float)),
        ("nested_codes", POINTER(c_uint8)),
        ("map", POINTER(c_float)),
        ("rows", c_int64),
        ("columns", c_int64),
        ("group", c_int64),
        ("format", c_int32),
        ("offset", c_float),
    ]
    _defaults_: dict = {"format": 1}


class plora_quantised_linear(Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("name", c_char_p),
        ("weight", plora_quantised),
        ("bias", c_void_p),
        ("bias_dtype", c_int32),
        ("flags", c_int32),
        ("master", c_int32),
        ("reserved", c_int32),
        ("values", plora_matrix),
        ("directory", c_char_p),
        ("shard", plora_shard),
    ]
    _defaults_: dict = {}


class plora_adapters_override(Structure):
    _fields_ = [
        ("pattern", c_char_p),
        ("alpha", c_double),
        ("rank", c_int32),
        ("reserved", c_int32),
    ]


class plora_adapters_options(Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("rank", c_int32),
        ("init", c_int32),
        ("alpha", c_double),
        ("dropout", c_double),
        ("seed", c_uint64),
        ("targets", c_char_p),
        ("exclude", c_char_p),
        ("overrides", POINTER(plora_adapters_override)),
        ("override_count", c_int64),
        ("rslora", c_int32),
        ("residual", c_int32),
        ("workspace_tokens", c_int64),
        ("heads", c_int32),
        ("kv_heads", c_int32),
    ]
    _defaults_: dict = {"rank": 8, "alpha": 16.0}


class plora_adapter(Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("a", plora_matrix),
        ("b", plora_matrix),
        ("a_gradient", plora_matrix),
        ("b_gradient", plora_matrix),
        ("scale", c_double),
    ]
    _defaults_: dict = {}


class plora_optimizer_options(Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("algorithm", c_int32),
        ("schedule", c_int32),
        ("learning_rate", c_double),
        ("beta1", c_double),
        ("beta2", c_double),
        ("epsilon", c_double),
        ("weight_decay", c_double),
        ("b_ratio", c_double),
        ("max_gradient_norm", c_double),
        ("final_ratio", c_double),
        ("warmup_steps", c_int64),
        ("period_steps", c_int64),
        ("rewarmup_steps", c_int64),
    ]
    _defaults_: dict = {"learning_rate": 0.0002, "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-08, "b_ratio": 1.0}


class plora_step_report(Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("gradient_norm", c_double),
        ("learning_rate", c_double),
        ("step", c_int64),
    ]
    _defaults_: dict = {}


class plora_unload_options(Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("momentum", c_double),
        ("moments", c_int32),
        ("rounding", c_int32),
        ("without_master", c_int32),
        ("reserved", c_int32),
    ]
    _defaults_: dict = {"momentum": 1.0, "rounding": -1}


class plora_unload_layer(Structure):
    _fields_ = [
        ("layer", c_int32),
        ("rank", c_int32),
        ("scale", c_double),
        ("update_rms", c_double),
        ("weight_rms", c_double),
        ("captured", c_double),
        ("changed", c_double),
        ("lost_max", c_double),
        ("effective_rank", c_double),
        ("lost_rms", c_double),
        ("quantised_rms", c_double),
        ("quantised_max", c_double),
    ]


class plora_unload_report(Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("stage", c_int64),
        ("weights", c_int32),
        ("reserved", c_int32),
        ("update_rms", c_double),
        ("weight_rms", c_double),
        ("captured", c_double),
        ("changed", c_double),
        ("lost_max", c_double),
        ("effective_rank", c_double),
        ("layers", POINTER(plora_unload_layer)),
        ("layer_capacity", c_int64),
        ("lost_rms", c_double),
        ("quantised_rms", c_double),
        ("quantised_max", c_double),
    ]
    _defaults_: dict = {}


class plora_ledger_options(Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("path", c_char_p),
        ("original", c_void_p),
        ("sync", c_int32),
        ("hash_weights", c_int32),
    ]
    _defaults_: dict = {"sync": 1}


class plora_ledger_record_info(Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("stage", c_int64),
        ("momentum", c_double),
        ("seed", c_uint64),
        ("rounding", c_int32),
        ("hashed", c_int32),
        ("lineage_before", c_uint64),
        ("lineage_after", c_uint64),
        ("weights_before", c_uint64),
        ("weights_after", c_uint64),
        ("offset", c_uint64),
        ("bytes", c_uint64),
        ("folded", c_int64),
        ("fold_error", c_double),
    ]
    _defaults_: dict = {}


class plora_export_options(Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("format", c_int32),
        ("live", c_int32),
        ("records", c_int64),
        ("rank", c_int64),
        ("max_error", c_double),
        ("heads", c_int32),
        ("kv_heads", c_int32),
    ]
    _defaults_: dict = {"live": 1, "records": -1}


class plora_export_layer(Structure):
    _fields_ = [
        ("layer", c_int32),
        ("reserved", c_int32),
        ("stacked_rank", c_int64),
        ("rank", c_int64),
        ("norm", c_double),
        ("error", c_double),
    ]


class plora_export_report(Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("records", c_int64),
        ("live", c_int32),
        ("weights", c_int32),
        ("rank", c_int64),
        ("norm", c_double),
        ("error", c_double),
        ("layers", POINTER(plora_export_layer)),
        ("layer_capacity", c_int64),
    ]
    _defaults_: dict = {}


class plora_registry_options(Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("memory_budget", c_size_t),
        ("spill_directory", c_char_p),
    ]
    _defaults_: dict = {}


class plora_registry_layer(Structure):
    _fields_ = [
        ("a", plora_matrix),
        ("b", plora_matrix),
        ("scale", c_double),
        ("layer", c_int32),
        ("reserved", c_int32),
    ]


class plora_snapshot_info(Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("name", c_char_p),
        ("version", c_int64),
        ("bytes", c_int64),
        ("holders", c_int64),
        ("acquired", c_int64),
        ("rank", c_int32),
        ("weights", c_int32),
        ("pinned", c_int32),
        ("merged", c_int32),
    ]
    _defaults_: dict = {}


class plora_registry_statistics(Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("names", c_int64),
        ("resident_bytes", c_int64),
        ("budget_bytes", c_int64),
        ("evicted_bytes", c_int64),
        ("retired", c_int64),
        ("acquired", c_int64),
        ("missed", c_int64),
        ("added", c_int64),
        ("replaced", c_int64),
        ("unloaded", c_int64),
        ("busy", c_int64),
        ("evicted", c_int64),
        ("restored", c_int64),
    ]
    _defaults_: dict = {}


class plora_batch_options(Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("max_tokens", c_int64),
        ("max_adapters", c_int32),
        ("max_rank", c_int32),
    ]
    _defaults_: dict = {"max_tokens": 1024, "max_adapters": 64, "max_rank": 64}


# name: (result, arguments)
FUNCTIONS = {
    "plora_status_string": (c_char_p, [c_int32]),
    "plora_last_error": (c_char_p, []),
    "plora_last_error_copy": (c_size_t, [c_char_p, c_size_t]),
    "plora_version": (c_char_p, []),
    "plora_abi_version": (c_int32, []),
    "plora_context_create": (c_int32, [POINTER(plora_context_options), POINTER(c_void_p)]),
    "plora_context_destroy": (None, [c_void_p]),
    "plora_synchronize": (c_int32, [c_void_p, c_void_p]),
    "plora_memory_stats": (c_int32, [c_void_p, POINTER(plora_memory_statistics)]),
    "plora_model_create": (c_int32, [c_void_p, POINTER(c_void_p)]),
    "plora_model_open": (c_int32, [c_void_p, c_char_p, POINTER(c_void_p)]),
    "plora_model_destroy": (None, [c_void_p]),
    "plora_model_add_linear": (c_int32, [c_void_p, POINTER(plora_linear), POINTER(c_int32)]),
    "plora_model_layer_count": (c_int32, [c_void_p]),
    "plora_model_find_layer": (c_int32, [c_void_p, c_char_p, POINTER(c_int32)]),
    "plora_model_layer": (c_int32, [c_void_p, c_int32, POINTER(plora_linear)]),
    "plora_quantised_size": (
        c_int32,
        [POINTER(plora_quantised), c_int32, POINTER(c_size_t), POINTER(c_size_t), POINTER(c_size_t)],
    ),
    "plora_quantised_map": (c_int32, [POINTER(c_float)]),
    "plora_quantise": (c_int32, [c_void_p, POINTER(plora_matrix), POINTER(plora_quantised), c_uint32, c_void_p]),
    "plora_dequantise": (c_int32, [c_void_p, POINTER(plora_quantised), POINTER(plora_matrix), c_void_p]),
    "plora_model_add_quantised": (c_int32, [c_void_p, POINTER(plora_quantised_linear), POINTER(c_int32)]),
    "plora_model_quantised": (c_int32, [c_void_p, c_int32, POINTER(plora_quantised_linear)]),
    "plora_model_requantise": (c_int32, [c_void_p, c_void_p]),
    "plora_model_find_tensor": (c_int32, [c_void_p, c_char_p, POINTER(plora_matrix)]),
    "plora_model_clear_residuals": (c_int32, [c_void_p, c_void_p]),
    "plora_model_save": (c_int32, [c_void_p, c_char_p]),
    "plora_adapters_create": (c_int32, [c_void_p, POINTER(plora_adapters_options), POINTER(c_void_p)]),
    "plora_adapters_destroy": (None, [c_void_p]),
    "plora_adapters_parameters": (c_int32, [c_void_p, POINTER(POINTER(c_float)), POINTER(c_int64)]),
    "plora_adapters_gradients": (c_int32, [c_void_p, POINTER(POINTER(c_float)), POINTER(c_int64)]),
    "plora_adapters_layer": (c_int32, [c_void_p, c_int32, POINTER(plora_adapter)]),
    "plora_adapters_set_dropout_position": (c_int32, [c_void_p, c_uint64, c_uint64]),
    "plora_adapters_stage": (c_int64, [c_void_p]),
    "plora_adapters_workspace_size": (c_int32, [c_void_p, c_int64, POINTER(c_size_t)]),
    "plora_adapters_set_workspace": (c_int32, [c_void_p, c_void_p, c_size_t]),
    "plora_adapters_save": (c_int32, [c_void_p, c_char_p]),
    "plora_adapters_load": (c_int32, [c_void_p, c_char_p, POINTER(plora_adapters_options), POINTER(c_void_p)]),
    "plora_linear_forward": (
        c_int32,
        [c_void_p, c_int32, POINTER(plora_matrix), POINTER(plora_matrix), c_uint32, c_void_p],
    ),
    "plora_linear_backward": (
        c_int32,
        [c_void_p, c_int32, POINTER(plora_matrix), POINTER(plora_matrix), POINTER(plora_matrix), c_uint32, c_void_p],
    ),
    "plora_optimizer_create": (c_int32, [c_void_p, POINTER(plora_optimizer_options), POINTER(c_void_p)]),
    "plora_optimizer_destroy": (None, [c_void_p]),
    "plora_optimizer_step": (c_int32, [c_void_p, c_double, POINTER(plora_step_report), c_void_p]),
    "plora_optimizer_zero_gradients": (c_int32, [c_void_p, c_void_p]),
    "plora_optimizer_learning_rate": (c_double, [c_void_p]),
    "plora_optimizer_set_learning_rate": (c_int32, [c_void_p, c_double]),
    "plora_optimizer_state": (
        c_int32,
        [c_void_p, POINTER(POINTER(c_float)), POINTER(POINTER(c_float)), POINTER(c_int64), POINTER(c_int64)],
    ),
    "plora_optimizer_reset": (c_int32, [c_void_p, c_void_p]),
    "plora_unload": (
        c_int32,
        [c_void_p, c_void_p, POINTER(plora_unload_options), POINTER(plora_unload_report), c_void_p],
    ),
    "plora_checkpoint_save": (c_int32, [c_void_p, c_void_p, c_char_p, c_uint32]),
    "plora_checkpoint_load": (c_int32, [c_void_p, c_void_p, c_char_p]),
    "plora_ledger_open": (c_int32, [c_void_p, POINTER(plora_ledger_options), POINTER(c_void_p)]),
    "plora_ledger_destroy": (None, [c_void_p]),
    "plora_ledger_length": (c_int64, [c_void_p]),
    "plora_ledger_position": (c_int64, [c_void_p]),
    "plora_ledger_record": (c_int32, [c_void_p, c_int64, POINTER(plora_ledger_record_info)]),
    "plora_ledger_factors": (
        c_int32,
        [c_void_p, c_int64, c_int32, POINTER(plora_matrix), POINTER(plora_matrix), POINTER(c_double)],
    ),
    "plora_ledger_roll_back": (c_int32, [c_void_p, c_int64, c_uint32]),
    "plora_ledger_truncate": (c_int32, [c_void_p, c_int64]),
    "plora_ledger_verify": (c_int32, [c_void_p]),
    "plora_ledger_export": (c_int32, [c_void_p, c_char_p, POINTER(plora_export_options), POINTER(plora_export_report)]),
    "plora_ledger_compact": (
        c_int32,
        [c_void_p, c_char_p, c_int64, c_int64, POINTER(plora_export_options), POINTER(plora_export_report)],
    ),
    "plora_registry_create": (c_int32, [c_void_p, POINTER(plora_registry_options), POINTER(c_void_p)]),
    "plora_registry_destroy": (None, [c_void_p]),
    "plora_registry_load": (c_int32, [c_void_p, c_char_p, c_char_p, POINTER(plora_adapters_options), POINTER(c_int64)]),
    "plora_registry_add": (c_int32, [c_void_p, c_char_p, POINTER(plora_registry_layer), c_int64, POINTER(c_int64)]),
    "plora_registry_publish": (c_int32, [c_void_p, c_char_p, c_void_p, POINTER(c_int64), c_void_p]),
    "plora_registry_unload": (c_int32, [c_void_p, c_char_p, c_uint32]),
    "plora_registry_pin": (c_int32, [c_void_p, c_char_p, c_int32]),
    "plora_registry_evict": (c_int32, [c_void_p, c_char_p]),
    "plora_registry_collect": (c_int32, [c_void_p]),
    "plora_registry_acquire": (c_int32, [c_void_p, c_char_p, POINTER(c_void_p)]),
    "plora_snapshot_retain": (None, [c_void_p]),
    "plora_snapshot_release": (None, [c_void_p]),
    "plora_snapshot_describe": (c_int32, [c_void_p, POINTER(plora_snapshot_info)]),
    "plora_registry_entry": (c_int32, [c_void_p, c_int64, c_char_p, c_size_t, POINTER(plora_snapshot_info)]),
    "plora_registry_stats": (c_int32, [c_void_p, POINTER(plora_registry_statistics)]),
    "plora_registry_merge": (c_int32, [c_void_p, c_char_p]),
    "plora_registry_unmerge": (c_int32, [c_void_p]),
    "plora_batch_create": (c_int32, [c_void_p, POINTER(plora_batch_options), POINTER(c_void_p)]),
    "plora_batch_destroy": (None, [c_void_p]),
    "plora_batch_begin": (c_int32, [c_void_p, c_int64, POINTER(c_int32), POINTER(c_void_p), c_int32, c_void_p]),
    "plora_batch_forward": (
        c_int32,
        [c_void_p, POINTER(c_int32), c_int32, POINTER(plora_matrix), POINTER(plora_matrix), c_uint32, c_void_p],
    ),
}
