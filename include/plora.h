/* SPDX-License-Identifier: Apache-2.0
 *
 * plora.h: PeriodicLoRA (arXiv 2402.16141) for any trainer or inference server.
 *
 * A low-rank adapter is trained on a frozen backbone; at the end of a stage it is *unloaded*, that is merged into the
 * backbone, and a fresh one starts. After S stages the accumulated update has a rank of up to S times that of one
 * adapter, with the memory of one adapter. The host owns the training loop, the activations and the backbone; the library
 * owns adapters, optimizer state and the unload.
 *
 * Notation      T tokens, K input features, N output features, R rank, s scale.
 *               x[T,K]  W[N,K]  A[R,K]  B[N,R]  y[T,N], all row-major. A comma list gives rows, then columns.
 * Status        every call that can fail returns a plora_status; 0 is success. On an error plora_last_error() gives a
 *               message with the offending values, outputs are untouched unless stated, and every handle stays usable.
 * Handles       opaque and reference counted: a child keeps its parent alive, so they may be destroyed in any order.
 *               *_destroy(NULL) does nothing.
 * Options       structs led by struct_size, set up by their _INIT macro. Fields are only ever appended; a larger struct
 *               from a newer caller is accepted while its unknown tail is zero.
 * Threads       distinct handles may be used concurrently. Calls on one handle, or on handles that share a model, must not
 *               overlap unless a call says otherwise.
 * Streams       `void *stream` is a cudaStream_t for a CUDA context (NULL: the legacy default stream) and must be NULL for a CPU
 *               context, whose calls are complete when they return. Calls on one set of adapters use its workspace: they belong
 *               on one stream, or in an order that the host sees to. Creation, loading and saving wait for the device.
 *               Linear calls without dropout may be captured in a CUDA graph.
 * Memory        hot calls (linear, optimizer step, unload) allocate nothing of the library's own; see plora_memory_stats().
 *
 * The library never prints, exits, aborts, installs handlers or does work when it is loaded.
 */
#ifndef PLORA_H
#define PLORA_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define PLORA_API __attribute__((visibility("default")))
#else
#define PLORA_API
#endif

#define PLORA_VERSION_MAJOR 0
#define PLORA_VERSION_MINOR 1
#define PLORA_VERSION_PATCH 0
#define PLORA_ABI_VERSION 1

/* ------------------------------------------------------------------------------------------------------------- status */

typedef int32_t plora_status;

/* PLORA_STATUS_LIST(X): X(name, value, text). Values are pinned for ever. */
#define PLORA_STATUS_LIST(X)                                                                                           \
    X(PLORA_OK, 0, "success")                                                                                          \
    X(PLORA_ERROR_INVALID_ARGUMENT, 1, "invalid argument")                                                             \
    X(PLORA_ERROR_OUT_OF_MEMORY, 2, "out of memory")                                                                   \
    X(PLORA_ERROR_SHAPE, 3, "shape mismatch")                                                                          \
    X(PLORA_ERROR_UNSUPPORTED, 4, "unsupported")                                                                       \
    X(PLORA_ERROR_NOT_FOUND, 5, "not found")                                                                           \
    X(PLORA_ERROR_NON_FINITE, 6, "non-finite value")                                                                   \
    X(PLORA_ERROR_IO, 7, "input/output error")                                                                         \
    X(PLORA_ERROR_FORMAT, 8, "malformed file")                                                                         \
    X(PLORA_ERROR_BACKEND_UNAVAILABLE, 9, "backend unavailable")                                                       \
    X(PLORA_ERROR_BACKEND, 10, "backend failure")                                                                      \
    X(PLORA_ERROR_BUSY, 11, "in use")

enum {
#define PLORA_STATUS_ENUM(name, value, text) name = (value),
    PLORA_STATUS_LIST(PLORA_STATUS_ENUM)
#undef PLORA_STATUS_ENUM
};

/* The text of a status code, e.g. "shape mismatch"; "unknown status" for any other value. Static. Any thread. @since 0.1 */
PLORA_API const char *plora_status_string(plora_status status);

/* The message of the last failed call on this thread, "" if there was none. Valid until the thread's next failing call.
 * @since 0.1 */
PLORA_API const char *plora_last_error(void);

/* Copies plora_last_error() into buffer[capacity], cut and terminated; returns the length of the whole message in bytes
 * without its terminator. buffer may be NULL when capacity is 0. @since 0.1 */
PLORA_API size_t plora_last_error_copy(char *buffer, size_t capacity);

/* The version of the loaded library, "major.minor.patch". @since 0.1 */
PLORA_API const char *plora_version(void);

/* PLORA_ABI_VERSION of the loaded library; differs from the header's when they do not belong together. @since 0.1 */
PLORA_API int32_t plora_abi_version(void);

/* ------------------------------------------------------------------------------------------------------------ tensors */

/* Element types. Backbone weights: F32, BF16, F16. Activations: F32, BF16. Adapters, gradients, moments: F32. */
enum { PLORA_F32 = 0, PLORA_BF16 = 1, PLORA_F16 = 2 };

/* A row-major matrix in the caller's memory: element (i, j) is at data[i * stride + j]. stride >= columns, in elements.
 * rows may be 0; then data may be NULL. */
typedef struct plora_matrix {
    void *data;
    int64_t rows;
    int64_t columns;
    int64_t stride;
    int32_t dtype;
    int32_t reserved; /* 0 */
} plora_matrix;

/* ------------------------------------------------------------------------------------------------------------ context */

typedef struct plora_context plora_context;

enum { PLORA_BACKEND_CPU = 0, PLORA_BACKEND_CUDA = 1 };

enum { PLORA_LOG_ERROR = 0, PLORA_LOG_WARNING = 1, PLORA_LOG_INFO = 2 };

typedef struct plora_context_options {
    size_t struct_size;
    int32_t backend;       /* PLORA_BACKEND_... */
    int32_t device;        /* ordinal of the CUDA device; 0 for the CPU */
    int32_t threads;       /* CPU threads of one call; 0 = OpenMP's own choice */
    int32_t deterministic; /* 1: the same bits for any number of threads, at some cost in speed */
    /* Host memory of the library. Both NULL = the C library. `alignment` is a power of two; free gets the allocation's size.
     * They may be called from any thread that calls the library. */
    void *(*host_allocate)(size_t size, size_t alignment, void *user);
    void (*host_free)(void *pointer, size_t size, void *user);
    void *host_user;
    /* Messages at or below log_level, on the calling thread, inside the call. NULL = silent. */
    void (*log)(int32_t level, const char *message, void *user);
    void *log_user;
    int32_t log_level;
    int32_t reserved;
    /* Device memory of a CUDA context, e.g. from torch's caching allocator. Both NULL = cudaMalloc() and cudaFree(). They are
     * called with the context's device current. The memory must be aligned to 64 bytes, and usable on any stream at once; before
     * the library gives it back it waits for the device. What cuBLAS keeps for itself does not come from here. */
    void *(*device_allocate)(size_t size, void *user);
    void (*device_free)(void *pointer, size_t size, void *user);
    void *device_user;
} plora_context_options;

#define PLORA_CONTEXT_OPTIONS_INIT                                                                                     \
    {                                                                                                                  \
        sizeof(plora_context_options), 0, 0, 0, 0, NULL, NULL, NULL, NULL, NULL, 0, 0, NULL, NULL, NULL                \
    }

/* Creates a context: backend, allocator, log. options may be NULL (CPU, defaults).
 * The first CUDA context opens libcudart.so.13 and libcublas.so.13: those that the program has loaded already, else from the
 * loader's path, else from the directories in the environment variable PLORA_CUDA_PATH (separated by colons).
 * Errors: INVALID_ARGUMENT; BACKEND_UNAVAILABLE, whose message names the cause; OUT_OF_MEMORY. @since 0.1 */
PLORA_API plora_status plora_context_create(const plora_context_options *options, plora_context **context);
PLORA_API void plora_context_destroy(plora_context *context);

/* Waits for the work enqueued on `stream` and reports the errors it met. @since 0.1 */
PLORA_API plora_status plora_synchronize(plora_context *context, void *stream);

typedef struct plora_memory_statistics {
    size_t struct_size;
    size_t current_bytes; /* live allocations of host memory of the library in this context */
    size_t peak_bytes;    /* the highest current_bytes so far */
    int64_t allocations;  /* number of allocations made so far */
    size_t mapped_bytes;  /* model files mapped: only touched pages are resident, only changed ones private */
    /* The same of device memory; 0 for a CPU context, whose memory is all counted above. */
    size_t device_current_bytes;
    size_t device_peak_bytes;
    int64_t device_allocations;
} plora_memory_statistics;

#define PLORA_MEMORY_STATISTICS_INIT                                                                                   \
    {                                                                                                                  \
        sizeof(plora_memory_statistics), 0, 0, 0, 0, 0, 0, 0                                                           \
    }

/* Every byte the library allocated through the context's hooks, in bytes. Any thread, at any time. @since 0.1 */
PLORA_API plora_status plora_memory_stats(const plora_context *context, plora_memory_statistics *statistics);

/* -------------------------------------------------------------------------------------------------------------- model */

/* A model is a list of linear layers, addressed by index in order of addition, and for an opened model its other tensors. */
typedef struct plora_model plora_model;

enum {
    PLORA_LAYER_FAN_IN_FAN_OUT = 1, /* the weight is stored [K,N] (GPT-2's Conv1D) */
    PLORA_LAYER_HEAD = 2,           /* embedding or output head: not part of "all-linear" */
    PLORA_LAYER_GATHERED = 4        /* of a shard: the host's products see the whole weight, see plora_shard */
};

/* The place of a weight in a larger one, of which this process holds but a part: rows first_row .. and columns first_column .. of
 * W[rows, columns], always in terms of W[N,K], whatever FAN_IN_FAN_OUT says of the memory. All 0: the weight is whole. Random numbers
 * are keyed by the element's place in the whole, so that any cut draws the bits of no cut: init (with the bound 1 / sqrt(K) of the
 * whole), dropout, stochastic rounding. Ranks of a group need the same seed and the same layers in the same order.
 *
 * Tensor parallelism. The layer is that of the shard: x, y, A and B have its K and N, A is columns first_column .. of the whole A[R,K],
 * B is rows first_row .. of the whole B[N,R]. An unload needs no other shard. What the host sums over the ranks that share a weight:
 *     rows of W       dx, as without adapters; and dA: A is the same on all ranks
 *     columns of W    y, as without adapters (the bias on one rank only); and dB: B is the same on all ranks
 * Other gradients are complete where they are. A norm over all of them is the host's to form: max_gradient_norm = 0, and the clip in
 * gradient_scale, on all ranks alike.
 *
 * GATHERED: fully sharded data parallelism (FSDP). The host gathers W for its own x W^T, as it does without adapters. The adapter is that
 * of the whole weight, the same on all ranks, as are its gradients once the host has averaged them; linear calls take the whole K and
 * N, always with DELTA_ONLY; there is no bias. Only plora_unload() sees the shard: it adds to it its part of s B A. */
typedef struct plora_shard {
    int64_t first_row;
    int64_t first_column;
    int64_t rows; /* of the whole W, as are the columns */
    int64_t columns;
} plora_shard;

/* A linear layer y = x W^T + bias in the host's memory. */
typedef struct plora_linear {
    size_t struct_size;
    const char *name;    /* e.g. "model.layers.0.self_attn.q_proj"; copied */
    plora_matrix weight; /* [N,K], or [K,N] with FAN_IN_FAN_OUT; not copied, written by plora_unload() */
    const void *bias;    /* [N] or NULL; not copied */
    int32_t bias_dtype;
    int32_t flags;     /* PLORA_LAYER_... */
    plora_shard shard; /* all 0: the weight is whole */
} plora_linear;

#define PLORA_LINEAR_INIT                                                                                              \
    {                                                                                                                  \
        sizeof(plora_linear), NULL, {NULL, 0, 0, 0, 0, 0}, NULL, 0, 0,                                                 \
        {                                                                                                              \
            0, 0, 0, 0                                                                                                 \
        }                                                                                                              \
    }

PLORA_API plora_status plora_model_create(plora_context *context, plora_model **model);

/* Opens a safetensors file, or a Hugging Face directory with model.safetensors or model.safetensors.index.json. Files are
 * mapped copy-on-write: they are never changed, and only weights that an unload wrote cost memory of their own. On CUDA all
 * tensors are copied to the device instead.
 * Every 2-D tensor "<name>.weight" of a supported dtype becomes the layer <name> (with "<name>.bias" if that is [N]);
 * names ending in lm_head, embed_tokens, embed_out, wte or wpe get PLORA_LAYER_HEAD.
 * Errors: IO, FORMAT (the message names the tensor and the byte offset), OUT_OF_MEMORY. @since 0.1 */
PLORA_API plora_status plora_model_open(plora_context *context, const char *path, plora_model **model);
PLORA_API void plora_model_destroy(plora_model *model);

/* Adds a layer; *layer (may be NULL) becomes its index. The weight must outlive the model. Layers whose weights are the very
 * same matrix are tied: they share one adapter and are merged once. Weights that overlap in part are refused.
 * Errors: INVALID_ARGUMENT (name empty or taken, dtype, overlap, adapters exist already), SHAPE (the weight; a shard that exceeds its
 * whole), OUT_OF_MEMORY. @since 0.1 */
PLORA_API plora_status plora_model_add_linear(plora_model *model, const plora_linear *linear, int32_t *layer);

PLORA_API int32_t plora_model_layer_count(const plora_model *model);

/* NOT_FOUND if there is no layer of that exact name. @since 0.1 */
PLORA_API plora_status plora_model_find_layer(const plora_model *model, const char *name, int32_t *layer);

/* Describes a layer; the pointers in it belong to the model. The weight of an opened model may be written by the host. That of a
 * quantised layer has a shape and no data: plora_model_quantised() describes it. The shard of a weight that is all of its whole is
 * all 0. @since 0.1 */
PLORA_API plora_status plora_model_layer(const plora_model *model, int32_t layer, plora_linear *linear);

/* ---------------------------------------------------------------------------------------------------- quantised weights */

enum { PLORA_QUANTISED_INT8 = 0, PLORA_QUANTISED_NF4 = 1 };

/* A weight W[rows, columns] in 8 or 4 bits, in memory of the context's device that is the host's. Element e = i * columns + j:
 *
 *     INT8  W(i,j) = codes[e] * scales[i * ceil(columns / group) + j / group]      int8_t codes, F32 scales
 *     NF4   W(e) = nf4[code(e)] * absmax(e / 64)           code(e) is the upper half of byte e / 2 when e is even, else the lower
 *           absmax(b) = scales[b], or doubly quantised map[nested_codes[b]] * scales[b / 256] + offset
 *
 * NF4 is laid out as by bitsandbytes (blocksize 64; of its QuantState, absmax is `scales`; doubly quantised, absmax is `nested_codes`,
 * state2.absmax `scales`, state2.code `map`). The sixteen values are those of arXiv 2305.14314. */
typedef struct plora_quantised {
    void *codes;           /* INT8: rows * columns bytes; NF4: half as many, rounded up */
    float *scales;         /* see above */
    uint8_t *nested_codes; /* one for each 64 elements, NULL when absmax is not quantised itself */
    const float *map;      /* [256] rising, of the nested codes; NULL without them */
    int64_t rows;
    int64_t columns;
    int64_t group;  /* INT8: columns that share a scale, 0 = a whole row; NF4: 0 */
    int32_t format; /* PLORA_QUANTISED_... */
    float offset;   /* of the absmax, when doubly quantised */
} plora_quantised;

#define PLORA_QUANTISED_INIT                                                                                           \
    {                                                                                                                  \
        NULL, NULL, NULL, NULL, 0, 0, 0, PLORA_QUANTISED_NF4, 0.0f                                                     \
    }

/* The bytes of its arrays, from rows, columns, group and format; nested = 1: doubly quantised. Any output may be NULL.
 * Errors: INVALID_ARGUMENT (format, group, nested with INT8), SHAPE. @since 0.1 */
PLORA_API plora_status plora_quantised_size(const plora_quantised *weight, int32_t nested, size_t *codes,
                                            size_t *scales, size_t *nested_codes);

/* bitsandbytes' map of 8 bits, signed and dynamic (arXiv 1511.04561), into map[256] in host memory. @since 0.1 */
PLORA_API plora_status plora_quantised_map(float *map);

enum {
    PLORA_QUANTISE_KEEP_OFFSET = 1 /* doubly quantised: with the offset that `weight` has, not the mean of the absmax */
};

/* Quantises values[rows, columns], F32, BF16 or F16, in host or device memory, into the arrays of `weight`; sets its offset. To nearest:
 *     INT8  scale = max|W| / 127 of each group, code = W / scale, ties to even
 *     NF4   absmax = max|W| of 64 elements, code = the nearest value to W * (1 / absmax); doubly quantised offset = the mean of all absmax,
 *           and by 256 blocks, with d = absmax - offset, scale = max|d|, nested code = the nearest of `map` to d * (1 / scale). Halfway
 *           the lower. bitsandbytes' rules, and codes; its mean is summed in another order and may differ in the last places.
 * The same bits on every backend: the codes are made on the host's processor, by the context's threads, a run at a time. Takes a few MB
 * of memory. Waits for the stream. On an error nothing is written but by a failing device.
 * Errors: NON_FINITE (naming the element), INVALID_ARGUMENT, SHAPE, OUT_OF_MEMORY. @since 0.1 */
PLORA_API plora_status plora_quantise(plora_context *context, const plora_matrix *values, plora_quantised *weight,
                                      uint32_t flags, void *stream);

/* Writes W to out[rows, columns], F32 or BF16, in device memory. Each operation is rounded to fp32: the same bits on every backend.
 * Errors: INVALID_ARGUMENT, SHAPE, UNSUPPORTED (dtype). @since 0.1 */
PLORA_API plora_status plora_dequantise(plora_context *context, const plora_quantised *weight, const plora_matrix *out,
                                        void *stream);

/* What an unload adds to. The master is the layer's weight in F32, in host memory; the codes are made from it, when the layer is added and
 * after each unload: codes = quantise(master) at all times, with the offset and map of the layer. */
enum {
    PLORA_MASTER_NONE = 0, /* no master: the codes are taken as they are, to be trained on, not to be unloaded into */
    PLORA_MASTER_HOST =
        1, /* `values` itself, F32 in host memory, which unloads write: 4 bytes a weight of the host's, or a file that it
                              * has mapped */
    PLORA_MASTER_MEMORY = 2, /* memory of the library's, at first a copy of `values` */
    PLORA_MASTER_FILE =
        3 /* the same in a file without a name in `directory`, mapped, that may be larger than memory. It is working
                              * memory and ends with the process, whatever happens; what lasts are checkpoints and ledgers */
};

/* A linear layer with a quantised weight. */
typedef struct plora_quantised_linear {
    size_t struct_size;
    const char *name;       /* as in plora_linear, with bias and flags */
    plora_quantised weight; /* not copied; with a master its codes, scales and nested codes are written */
    const void *bias;
    int32_t bias_dtype;
    int32_t flags;
    int32_t master; /* PLORA_MASTER_... */
    int32_t reserved;
    plora_matrix
        values; /* MEMORY and FILE: F32, BF16 or F16, in host or device memory, read once; data NULL = what the codes hold */
    const char *directory; /* FILE */
    plora_shard
        shard; /* as in plora_linear; not GATHERED. Codes are made of the shard alone: its own blocks and groups */
} plora_quantised_linear;

#define PLORA_QUANTISED_LINEAR_INIT                                                                                    \
    {                                                                                                                  \
        sizeof(plora_quantised_linear), NULL, PLORA_QUANTISED_INIT, NULL, 0, 0, PLORA_MASTER_NONE, 0,                  \
            {NULL, 0, 0, 0, 0, 0}, NULL,                                                                               \
        {                                                                                                              \
            0, 0, 0, 0                                                                                                 \
        }                                                                                                              \
    }

/* Adds a layer as plora_model_add_linear() does. W[N,K], or [K,N] with FAN_IN_FAN_OUT, is dequantised in panels wherever it is multiplied,
 * never as a whole: to bf16 where x is BF16 and the product is one of bf16, else to fp32. Layers with the very same codes are tied; the
 * first one's master counts, the others have MASTER_NONE. Waits for the device.
 * Errors: as plora_model_add_linear(); NON_FINITE (values, naming the element), IO (directory, no space). @since 0.1 */
PLORA_API plora_status plora_model_add_quantised(plora_model *model, const plora_quantised_linear *linear,
                                                 int32_t *layer);

/* Describes a quantised layer; `values` is its master, data NULL without one. NOT_FOUND when the layer is not quantised. @since 0.1 */
PLORA_API plora_status plora_model_quantised(const plora_model *model, int32_t layer, plora_quantised_linear *linear);

/* Makes the codes of all layers that have a master anew, for a host that has written masters itself. They must be finite, which is not
 * checked. Waits for the stream. Errors: OUT_OF_MEMORY. @since 0.1 */
PLORA_API plora_status plora_model_requantise(plora_model *model, void *stream);

/* Finds a tensor of an opened model by its full name ("model.norm.weight"), as a matrix: a vector has one row, a higher
 * rank is folded into rows. NOT_FOUND if absent, UNSUPPORTED if its dtype is none of PLORA_F32, BF16, F16. @since 0.1 */
PLORA_API plora_status plora_model_find_tensor(const plora_model *model, const char *name, plora_matrix *tensor);

/* Sets the residuals that the model's weights keep (PLORA_ROUND_RESIDUAL) to 0, so that the value of a weight is what it holds. For
 * a host that has written weights itself. Waits for the stream. @since 0.1 */
PLORA_API plora_status plora_model_clear_residuals(plora_model *model, void *stream);

/* Writes all tensors of an opened model with their present values, in their original dtype, order and metadata, as one
 * safetensors file. A host-built model writes "<name>.weight" and "<name>.bias" of its layers, of quantised ones the master, of shards
 * the shard.
 * Atomic: a temporary file beside `path`, fsync, rename; on an error `path` is as it was. Residuals are not in it: they are in
 * checkpoints.
 * Errors: IO, OUT_OF_MEMORY, UNSUPPORTED (a quantised layer without a master). @since 0.1 */
PLORA_API plora_status plora_model_save(const plora_model *model, const char *path);

/* ----------------------------------------------------------------------------------------------------------- adapters */

/* One low-rank adapter per targeted weight: A[R,K] and B[N,R] in fp32, in one contiguous arena; gradients in another of the
 * same layout. Layer order, A before B, each starting at a multiple of 16 elements; the padding between them is zero. */
typedef struct plora_adapters plora_adapters;

enum {
    PLORA_INIT_KAIMING_UNIFORM = 0, /* A ~ U(-1/sqrt(K), 1/sqrt(K)), i.e. a = sqrt(5); B = 0 */
    PLORA_INIT_GAUSSIAN = 1         /* A ~ N(0, 1/K), i.e. standard deviation 1/sqrt(K); B = 0 */
};

/* Where 16-bit weights keep their residual (PLORA_ROUND_RESIDUAL): 2 bytes a weight that has an adapter, from the first set of adapters
 * that asks for it until the model ends; sets on one model share it. */
enum {
    PLORA_RESIDUAL_DEFAULT = 0, /* DEVICE; of adapters that are loaded, which are mostly served, NONE */
    PLORA_RESIDUAL_NONE = 1,    /* never to be unloaded, or with another rounding */
    PLORA_RESIDUAL_DEVICE = 2,
    PLORA_RESIDUAL_HOST = 3 /* passes through the device at each unload, a weight at a time; on the CPU as DEVICE */
};

/* Rank and alpha of the layers that match `pattern` (see targets); the first match counts. 0 = as in the options. */
typedef struct plora_adapters_override {
    const char *pattern;
    double alpha;
    int32_t rank;
    int32_t reserved;
} plora_adapters_override;

typedef struct plora_adapters_options {
    size_t struct_size;
    int32_t rank;
    int32_t init;   /* PLORA_INIT_... */
    double alpha;   /* s = alpha / R */
    double dropout; /* probability in [0, 1) that an input element of the low-rank path is 0; the rest is scaled up */
    uint64_t seed;  /* of init and dropout */
    /* Comma-separated patterns. "all-linear": every layer but heads. One with '*', '?' or '[': a glob over the whole name.
     * Any other: the name itself, or its last components ("q_proj", "self_attn.q_proj"). NULL = "all-linear". */
    const char *targets;
    const char *exclude; /* patterns of layers left out all the same, or NULL */
    const plora_adapters_override *overrides;
    int64_t override_count;
    int32_t rslora;           /* 1: s = alpha / sqrt(R) (arXiv 2312.03732) */
    int32_t residual;         /* PLORA_RESIDUAL_... */
    int64_t workspace_tokens; /* tokens of one pass over the workspace; longer calls take several. 0 = 1024 */
    int32_t heads;            /* of plora_adapters_load(): as those of plora_export_options */
    int32_t kv_heads;
} plora_adapters_options;

#define PLORA_ADAPTERS_OPTIONS_INIT                                                                                    \
    {                                                                                                                  \
        sizeof(plora_adapters_options), 8, PLORA_INIT_KAIMING_UNIFORM, 16.0, 0.0, 0, NULL, NULL, NULL, 0, 0, 0, 0, 0,  \
            0                                                                                                          \
    }

/* Creates the adapters of stage 0 and initialises them: A is drawn from Philox4x32-10 keyed by (seed, stage, layer, element),
 * the same bits on every rank, backend and sharding; B is 0, so the function of the model is unchanged.
 * Several sets may exist on one model; each adds to the products of the calls it is named in.
 * Errors: INVALID_ARGUMENT (rank < 1 or > min(K, N) of a target, of a shard those of its whole; dropout outside [0, 1); alpha not finite),
 * NOT_FOUND (a pattern that matches no layer), OUT_OF_MEMORY. @since 0.1 */
PLORA_API plora_status plora_adapters_create(plora_model *model, const plora_adapters_options *options,
                                             plora_adapters **adapters);
PLORA_API void plora_adapters_destroy(plora_adapters *adapters);

/* The whole arena: *data[0 .. *count), count in elements. An all-reduce of the gradients is one call over one buffer. @since 0.1 */
PLORA_API plora_status plora_adapters_parameters(plora_adapters *adapters, float **data, int64_t *count);
PLORA_API plora_status plora_adapters_gradients(plora_adapters *adapters, float **data, int64_t *count);

/* The adapter of one layer, as views into the arenas. A layer without one: NOT_FOUND. */
typedef struct plora_adapter {
    size_t struct_size;
    plora_matrix a;          /* [R,K] */
    plora_matrix b;          /* [N,R] */
    plora_matrix a_gradient; /* [R,K] */
    plora_matrix b_gradient; /* [N,R] */
    double scale;            /* s */
} plora_adapter;

#define PLORA_ADAPTER_INIT                                                                                             \
    {                                                                                                                  \
        sizeof(plora_adapter), {NULL, 0, 0, 0, 0, 0}, {NULL, 0, 0, 0, 0, 0}, {NULL, 0, 0, 0, 0, 0},                    \
            {NULL, 0, 0, 0, 0, 0}, 0.0                                                                                 \
    }

PLORA_API plora_status plora_adapters_layer(plora_adapters *adapters, int32_t layer, plora_adapter *adapter);

/* Which dropout masks the following calls draw: a mask is a function of (seed, step, layer, first_token + row, column).
 * A host advances `step` with every micro-batch, and gives data-parallel ranks or token chunks their own first_token;
 * forward and backward of a micro-batch must see the same values. 0, 0 at creation. @since 0.1 */
PLORA_API plora_status plora_adapters_set_dropout_position(plora_adapters *adapters, uint64_t step,
                                                           uint64_t first_token);

/* The number of completed unloads: 0 during the first stage. @since 0.1 */
PLORA_API int64_t plora_adapters_stage(const plora_adapters *adapters);

/* Scratch memory of linear calls of up to `tokens` tokens each pass, in bytes. The library allocates it at creation for
 * workspace_tokens; a host may supply its own instead (64-byte aligned, alive until replaced; NULL, 0 = the library's).
 * Errors: INVALID_ARGUMENT (too small for 1 token, misaligned). @since 0.1 */
PLORA_API plora_status plora_adapters_workspace_size(const plora_adapters *adapters, int64_t tokens, size_t *bytes);
PLORA_API plora_status plora_adapters_set_workspace(plora_adapters *adapters, void *workspace, size_t bytes);

/* Saves the live adapter as a PEFT directory: adapter_model.safetensors and adapter_config.json, each written atomically.
 * The directory is created if it is missing. Stages already unloaded are in the backbone, not in this file. Of a shard it has the factors
 * that this process holds (plora_shard): all of them where it is GATHERED. @since 0.1 */
PLORA_API plora_status plora_adapters_save(const plora_adapters *adapters, const char *directory);

/* Creates adapters from a PEFT directory, or from a GGUF file of llama.cpp's for a model of the LLaMA family: rank from the tensor
 * shapes, one scale per layer, bit-exact values. What is not supported (DoRA, unknown keys, a trained bias, a quantised tensor ...)
 * is refused by name. options (may be NULL) gives only seed, init, dropout, residual, workspace_tokens and, for GGUF, heads and
 * kv_heads. Errors: IO, FORMAT, UNSUPPORTED, SHAPE, NOT_FOUND (no such layer in the model), INVALID_ARGUMENT (heads of a GGUF
 * file's query or key projections are not known), OUT_OF_MEMORY. @since 0.1 */
PLORA_API plora_status plora_adapters_load(plora_model *model, const char *path, const plora_adapters_options *options,
                                           plora_adapters **adapters);

/* ------------------------------------------------------------------------------------------------------------- linear */

enum {
    PLORA_LINEAR_DROPOUT = 1, /* apply the adapters' dropout (training); without it the layer is in evaluation mode */
    PLORA_LINEAR_DELTA_ONLY =
        2,                      /* only the low-rank part, added to what y (dx) holds: the host computes x W^T (dy W) */
    PLORA_LINEAR_ACCUMULATE = 4 /* backward only: dx += instead of dx = */
};

/* y = x W^T + bias + s dropout(x) A^T B^T          x[T,K], y[T,N], each F32 or BF16; x and y must not overlap.
 * A layer without an adapter is a plain linear; with DELTA_ONLY it leaves y as it is. A GATHERED one takes DELTA_ONLY alone.
 * Precision: products accumulate in fp32. When x and W are both BF16, A, B and u = x A^T enter the products rounded to bf16;
 * otherwise operands are widened to fp32, a tile at a time, never a whole W.
 * Calls on one handle exclude each other while they use its workspace: several threads may call at once, one computes.
 * Errors: INVALID_ARGUMENT (layer index, flags, NULL), SHAPE, UNSUPPORTED (dtype), BACKEND. @since 0.1 */
PLORA_API plora_status plora_linear_forward(plora_adapters *adapters, int32_t layer, const plora_matrix *x,
                                            const plora_matrix *y, uint32_t flags, void *stream);

/* The gradients of the forward with the same x, flags and dropout position; nothing was saved in between:
 *     u  = dropout(x) A^T                [T,R]
 *     v  = s dy B                        [T,R]
 *     dx = dy W + dropout'(v A)          [T,K]   skipped when dx is NULL
 *     dB += s dy^T u                     [N,R]   into the gradient arena
 *     dA += v^T dropout(x)               [R,K]
 * Threads, precision and errors as the forward. @since 0.1 */
PLORA_API plora_status plora_linear_backward(plora_adapters *adapters, int32_t layer, const plora_matrix *x,
                                             const plora_matrix *dy, const plora_matrix *dx, uint32_t flags,
                                             void *stream);

/* ---------------------------------------------------------------------------------------------------------- optimizer */

typedef struct plora_optimizer plora_optimizer;

enum { PLORA_OPTIMIZER_ADAMW = 0, PLORA_OPTIMIZER_SGD = 1 };

/* The learning rate as a function of t, the steps done since the last restart, with w = warmup_steps, n = period_steps,
 * f = final_ratio; every schedule starts with the warm-up factor min(1, (t + 1) / (w + 1)). Let
 * p = clamp((t - w) / (n - w), 0, 1):
 *     CONSTANT  1          LINEAR  1 - (1 - f) p          COSINE  f + (1 - f) (1 + cos(pi p)) / 2
 * Every unload that resets the optimizer restarts t.
 *     RELORA    one COSINE over all steps (n = total steps, t = all steps, first warm-up w) that no unload restarts; each
 *               unload is followed by a short re-warm-up of rewarmup_steps from 0 (arXiv 2307.05695). */
enum { PLORA_SCHEDULE_CONSTANT = 0, PLORA_SCHEDULE_LINEAR = 1, PLORA_SCHEDULE_COSINE = 2, PLORA_SCHEDULE_RELORA = 3 };

typedef struct plora_optimizer_options {
    size_t struct_size;
    int32_t algorithm; /* PLORA_OPTIMIZER_... */
    int32_t schedule;  /* PLORA_SCHEDULE_... */
    double learning_rate;
    double beta1;             /* AdamW; the momentum of SGD */
    double beta2;             /* AdamW */
    double epsilon;           /* AdamW */
    double weight_decay;      /* decoupled: p <- p - lr * weight_decay * p */
    double b_ratio;           /* LoRA+ (arXiv 2402.12354): the learning rate of B over that of A */
    double max_gradient_norm; /* clip the global L2 norm to this; 0 = off */
    double final_ratio;       /* f of the schedule */
    int64_t warmup_steps;
    int64_t period_steps;
    int64_t rewarmup_steps;
} plora_optimizer_options;

#define PLORA_OPTIMIZER_OPTIONS_INIT                                                                                   \
    {                                                                                                                  \
        sizeof(plora_optimizer_options), PLORA_OPTIMIZER_ADAMW, PLORA_SCHEDULE_CONSTANT, 2e-4, 0.9, 0.999, 1e-8, 0.0,  \
            1.0, 0.0, 0.0, 0, 0, 0                                                                                     \
    }

/* Errors: INVALID_ARGUMENT (each value is checked and named), OUT_OF_MEMORY. @since 0.1 */
PLORA_API plora_status plora_optimizer_create(plora_adapters *adapters, const plora_optimizer_options *options,
                                              plora_optimizer **optimizer);
PLORA_API void plora_optimizer_destroy(plora_optimizer *optimizer);

typedef struct plora_step_report {
    size_t struct_size;
    double gradient_norm; /* global L2 norm, after gradient_scale, before clipping */
    double learning_rate; /* of A in this step */
    int64_t step;         /* 1, 2, ...: steps since the last reset, this one included (the t of the bias correction) */
} plora_step_report;

#define PLORA_STEP_REPORT_INIT                                                                                         \
    {                                                                                                                  \
        sizeof(plora_step_report), 0.0, 0.0, 0                                                                         \
    }

/* One update of every parameter from the gradient arena, in one fused pass. With g = gradient * gradient_scale * clip:
 *     AdamW  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;
 *            p <- p (1 - lr wd) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)          (arXiv 1711.05101)
 *     SGD    m = b1 m + g;  p <- p (1 - lr wd) - lr m
 * gradient_scale is 1 / (loss scale x accumulated micro-batches); it must be finite and > 0. Gradients are left as they are.
 * A step whose gradient norm is not finite changes nothing and is not counted. On CUDA the call waits for the stream only when
 * a report is asked for; a step refused without one is told, once, by the next call that waits: a step with a report,
 * plora_unload() or plora_checkpoint_save(), which then do nothing else.
 * Errors: NON_FINITE (the gradient norm), INVALID_ARGUMENT; UNSUPPORTED on a stream that is being captured, since the learning
 * rate and the bias correction belong to one step. @since 0.1 */
PLORA_API plora_status plora_optimizer_step(plora_optimizer *optimizer, double gradient_scale,
                                            plora_step_report *report, void *stream);

/* Sets the gradient arena of the optimizer's adapters to 0. @since 0.1 */
PLORA_API plora_status plora_optimizer_zero_gradients(plora_optimizer *optimizer, void *stream);

/* The learning rate of A that the next step will use. @since 0.1 */
PLORA_API double plora_optimizer_learning_rate(const plora_optimizer *optimizer);

/* options.learning_rate from the next step on, for a host with a schedule of its own; the optimizer's goes on as a factor on it. A
 * checkpoint loads into an optimizer of the rate it was saved with. Errors: INVALID_ARGUMENT (not finite, or < 0). @since 0.1 */
PLORA_API plora_status plora_optimizer_set_learning_rate(plora_optimizer *optimizer, double learning_rate);

/* Views of the state, each [count] in the layout of the parameter arena; second_moment is NULL for SGD. *step: steps since the
 * last reset. Any output may be NULL. @since 0.1 */
PLORA_API plora_status plora_optimizer_state(plora_optimizer *optimizer, float **first_moment, float **second_moment,
                                             int64_t *count, int64_t *step);

/* Both moments, the step counter of the bias correction and the schedule's t to 0, as an unload does. @since 0.1 */
PLORA_API plora_status plora_optimizer_reset(plora_optimizer *optimizer, void *stream);

/* ------------------------------------------------------------------------------------------------------------- unload */

/* How bf16 and f16 weights take an update; an fp32 weight is rounded to nearest in any case. An update of 0.1 % of the weights is less
 * than what one of 16 bits can tell apart: NEAREST loses nearly half of it, STOCHASTIC adds noise that grows with every
 * unload, RESIDUAL does as well as fp32 weights (measured: docs/precision.md). So RESIDUAL is the default wherever there is room
 * for it. */
enum {
    PLORA_ROUND_DEFAULT = -1, /* RESIDUAL when the weights keep residuals, else NEAREST */
    PLORA_ROUND_NEAREST = 0,  /* ties to even */
    /* Up or down at random, the nearer the likelier, so that the mean is right; 16 bits of Philox4x32-10 keyed by (adapters' seed, stage,
     * layer, element of W as it is stored, of the whole W): the same on every rank and backend. */
    PLORA_ROUND_STOCHASTIC = 1,
    /* W is the nearer number (ties away from 0) to an fp32 value, whose rest is kept beside it in 16 bits and takes part in the next
     * unload; products see W alone. bf16: the value is exact; f16: from 2^-14 on, below to 2^-41. */
    PLORA_ROUND_RESIDUAL = 2
};

/* What becomes of the optimizer's moments, step counter and schedule. */
enum {
    PLORA_MOMENTS_DEFAULT = 0, /* RESET when momentum = 1, KEEP below */
    PLORA_MOMENTS_RESET = 1,   /* all to 0, the schedule restarts */
    PLORA_MOMENTS_KEEP = 2 /* kept: with k = sqrt(1 - momentum), first moment times k, second times k^2 (gradients of A
                                * scale with B and the reverse); counters go on. Invalid when momentum = 1. */
};

typedef struct plora_unload_options {
    size_t struct_size;
    double momentum;  /* m in (0, 1]: the share that moves into the backbone; 1 = all of it */
    int32_t moments;  /* PLORA_MOMENTS_... */
    int32_t rounding; /* PLORA_ROUND_... */
    /* 1: quantised weights without a master are unloaded into all the same: dequantised, added to, quantised again, a run at a time, which
     * loses nearly everything (docs/precision.md). 0: refused. */
    int32_t without_master;
    int32_t reserved;
} plora_unload_options;

#define PLORA_UNLOAD_OPTIONS_INIT                                                                                      \
    {                                                                                                                  \
        sizeof(plora_unload_options), 1.0, PLORA_MOMENTS_DEFAULT, PLORA_ROUND_DEFAULT, 0, 0                            \
    }

/* What one unload did to one weight, of a shard to the shard. D = m s B A is the wanted update, W' - W the one that is held: by the dtype, with RESIDUAL by
 * weight and residual together, of a quantised weight by its master, or without one by what the codes hold. */
typedef struct plora_unload_layer {
    int32_t layer;
    int32_t rank;
    double scale;          /* m s */
    double update_rms;     /* rms of D */
    double weight_rms;     /* rms of W before */
    double captured;       /* <W' - W, D> / <D, D>; 1 when D = 0 */
    double changed;        /* share of weights whose bits changed, residuals included */
    double lost_max;       /* max |D - (W' - W)| */
    double effective_rank; /* (sum sigma^2)^2 / sum sigma^4 over the singular values of B A; 0 when D = 0 */
    double lost_rms;       /* rms of D - (W' - W) */
    /* Of a weight with a master, else 0: rms and max of what products see less the master. It does not add up: the next unload starts from
     * the master. */
    double quantised_rms;
    double quantised_max;
} plora_unload_layer;

typedef struct plora_unload_report {
    size_t struct_size;
    int64_t stage;   /* of the adapter that was unloaded: 0, 1, ... */
    int32_t weights; /* number of weights merged */
    int32_t reserved;
    double update_rms; /* over all merged weights, as above */
    double weight_rms;
    double captured;
    double changed;
    double lost_max;
    double effective_rank;      /* mean over the weights */
    plora_unload_layer *layers; /* caller's array, or NULL: the first layer_capacity weights, in layer order */
    int64_t layer_capacity;
    double lost_rms;      /* over all merged weights, as above */
    double quantised_rms; /* over those with a master */
    double quantised_max;
} plora_unload_report;

#define PLORA_UNLOAD_REPORT_INIT                                                                                       \
    {                                                                                                                  \
        sizeof(plora_unload_report), 0, 0, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, NULL, 0, 0.0, 0.0, 0.0                     \
    }

/* Ends a stage (arXiv 2402.16141). With m = momentum and k = sqrt(1 - m), for every adapter:
 *     W <- round(W + m s B A)            fp32 accumulation, one rounding, no N x K temporary
 *     m = 1:  A <- fresh init of the next stage, B <- 0, and the optimizer as RESET
 *     m < 1:  A <- k A, B <- k B         so the function of the model is the same before and after: m + k^2 = 1
 * up to the rounding of W, which the report measures. A quantised weight's master is merged into, in fp32, and its codes made from it
 * again, panel by panel, on the host's processor. The gradient arena is set to 0. Asking for a report costs time: the
 * figures are reduced in the same pass over W.
 * optimizer (may be NULL) must belong to `adapters`. options and report may be NULL. On CUDA the call waits for the stream: it
 * looks at A and B before it writes; UNSUPPORTED on a stream that is being captured.
 * Everything is checked before the first write: on an error nothing has changed. Errors: NON_FINITE (a value of A or B, or a
 * weight that would overflow its dtype; the message names the layer), UNSUPPORTED (a quantised weight without a master; the message says
 * which share of the update it would have captured), INVALID_ARGUMENT (NEAREST or STOCHASTIC where a weight keeps a
 * residual, RESIDUAL where one keeps none; the message names both). @since 0.1 */
PLORA_API plora_status plora_unload(plora_adapters *adapters, plora_optimizer *optimizer,
                                    const plora_unload_options *options, plora_unload_report *report, void *stream);

/* --------------------------------------------------------------------------------------------------------- checkpoint */

enum {
    PLORA_CHECKPOINT_WEIGHTS = 1 /* also the weights that adapters are merged into: needed unless the host keeps them */
};

/* One safetensors file with adapters, moments, counters, stage, schedule position and residuals, written atomically. A run that loads it
 * goes on to the very same bits. With a ledger its position and lineage are saved too, and the weights need not be. optimizer
 * may be NULL. Errors: IO, OUT_OF_MEMORY, INVALID_ARGUMENT (a ledger whose position is not known). @since 0.1 */
PLORA_API plora_status plora_checkpoint_save(plora_adapters *adapters, plora_optimizer *optimizer, const char *path,
                                             uint32_t flags);

/* Loads into adapters (and optimizer) created with the same options on the same model, of shards on the same shards. With a ledger it also makes the weights
 * those of the checkpoint, from the file or else as plora_ledger_roll_back() does, and drops later records: what they hold, the
 * run will do again. Everything in the file is checked first, its checksum included: on an error nothing has changed. Errors:
 * IO, FORMAT, SHAPE, INVALID_ARGUMENT (made with other options, or with another ledger; named). @since 0.1 */
PLORA_API plora_status plora_checkpoint_load(plora_adapters *adapters, plora_optimizer *optimizer, const char *path);

/* ------------------------------------------------------------------------------------------------------------- ledger */

/* The record of every unload: A, B, scale, momentum and what else its merge depended on. With the original weights W_0 it gives
 * any W_t back, to the bit, by doing the merges again:
 *
 *     W_t = round(W_(t-1) + m_t s_t B_t A_t)          record t - 1 leads from W_(t-1) to W_t
 *
 * A record takes about 4 R (N + K) bytes a weight. Of a shard a ledger holds what this process does: its factors, and hashes of its
 * part of W. It opens on that shard alone. The ledger lies in memory or in an append-only file under checksums, whose
 * format is described in docs/ledger.md. Each state has a lineage: a hash of W_0, of all records up to it, and of their order.
 * The same bits need the same backend and instruction set, as they differ in the last place. */
typedef struct plora_ledger plora_ledger;

typedef struct plora_ledger_options {
    size_t struct_size;
    const char *path; /* of the file, which is created or gone on with; NULL = in memory */
    /* Layers of the same names with the weights W_0, which nobody may change; kept alive. NULL: an opened model's own files; a
     * host-built model then can only be rolled forward. In host memory, or of the adapters' context. */
    plora_model *original;
    int32_t sync;         /* 1: a record has reached the disk before the first weight changes; 0: the system's cache */
    int32_t hash_weights; /* 1: records hold hashes of the weights before and after; a pass over the weights each */
} plora_ledger_options;

#define PLORA_LEDGER_OPTIONS_INIT                                                                                      \
    {                                                                                                                  \
        sizeof(plora_ledger_options), NULL, NULL, 1, 0                                                                 \
    }

/* Attaches a ledger to the adapters: from now on plora_unload() appends the stage's record, and returns an error with nothing
 * changed when it cannot. Reads the adapted weights once, to hash them. A new ledger takes them as W_0. A file that exists must
 * have been made for layers of the same names, shapes and dtypes; its ranks and scales may differ. A record that was not
 * finished when the process or the machine stopped is cut off its end. The weights may be W_0, at position 0, or any W_t whose
 * hash is known; else the position is -1 until plora_ledger_roll_back(). options may be NULL. With a ledger, an unload may
 * allocate memory. One ledger at a time for a set of adapters, and for a file, which is locked.
 * Errors: IO; FORMAT (damaged, naming the record and its byte offset; a single changed bit is found); UNSUPPORTED (version);
 * INVALID_ARGUMENT (another model, naming the first difference); OUT_OF_MEMORY. @since 0.1 */
PLORA_API plora_status plora_ledger_open(plora_adapters *adapters, const plora_ledger_options *options,
                                         plora_ledger **ledger);
/* Detaches it. A file stays. */
PLORA_API void plora_ledger_destroy(plora_ledger *ledger);

/* The number of records. @since 0.1 */
PLORA_API int64_t plora_ledger_length(const plora_ledger *ledger);

/* The number of records that the weights hold, -1 when that is not known. Unloads go on only at the ledger's end: when this is
 * less than the length, roll forward, or drop what comes later with plora_ledger_truncate(). @since 0.1 */
PLORA_API int64_t plora_ledger_position(const plora_ledger *ledger);

typedef struct plora_ledger_record_info {
    size_t struct_size;
    int64_t stage; /* of the adapter that was unloaded */
    double momentum;
    uint64_t seed;    /* of the adapters */
    int32_t rounding; /* PLORA_ROUND_..., not DEFAULT */
    int32_t hashed;   /* bits: 1 = weights_before is known, 2 = weights_after */
    uint64_t lineage_before;
    uint64_t lineage_after;
    uint64_t weights_before;
    uint64_t weights_after;
    uint64_t offset; /* in the file; in memory as if there were one */
    uint64_t bytes;
    int64_t folded;    /* of plora_ledger_compact(): the number of records that this one stands for; else 0 */
    double fold_error; /* and what it lacks of their sum at most, relative to it (Frobenius norms) */
} plora_ledger_record_info;

#define PLORA_LEDGER_RECORD_INFO_INIT                                                                                  \
    {                                                                                                                  \
        sizeof(plora_ledger_record_info), 0, 0.0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0.0                                    \
    }

/* Errors: INVALID_ARGUMENT (record not in 0 .. length - 1). @since 0.1 */
PLORA_API plora_status plora_ledger_record(plora_ledger *ledger, int64_t record, plora_ledger_record_info *info);

/* The factors of a record for one layer of the model, a[R,K] and b[N,R], as they were before the unload; *factor is m s. Views
 * in host memory that must not be written to; valid until the next unload, truncation or end. Any output may be NULL.
 * Errors: INVALID_ARGUMENT, NOT_FOUND (the layer has no adapter), IO. @since 0.1 */
PLORA_API plora_status plora_ledger_factors(plora_ledger *ledger, int64_t record, int32_t layer, plora_matrix *a,
                                            plora_matrix *b, double *factor);

enum {
    PLORA_LEDGER_WEIGHTS_ONLY = 1 /* leave adapters, gradients and stage as they are */
};

/* Makes the weights W_t, t = record_count: forward from the present ones where they are known and not later, else from W_0.
 * The adapters become what they were right after that unload, drawn for the next stage (t = 0: for the first), or A and B of
 * the record times sqrt(1 - m); gradients 0. The optimizer is the host's: plora_optimizer_reset(). The records stay. Waits for
 * the device. Everything is checked before the first write, the bytes of the records and W_0 included.
 * Errors: INVALID_ARGUMENT (t not in 0 .. length; no original weights, or not W_0); SHAPE (the record's ranks are not those of the
 * adapters); FORMAT; IO; OUT_OF_MEMORY. @since 0.1 */
PLORA_API plora_status plora_ledger_roll_back(plora_ledger *ledger, int64_t record_count, uint32_t flags);

/* Drops the records from record_count on, which must not be less than the position. Not to be undone.
 * Errors: INVALID_ARGUMENT, IO. @since 0.1 */
PLORA_API plora_status plora_ledger_truncate(plora_ledger *ledger, int64_t record_count);

/* Whether the weights are W_t, t = plora_ledger_position(), bit for bit: by their recorded hash, else by merging all records again
 * into a copy of W_0, a weight at a time. Errors: INVALID_ARGUMENT (they are not, naming the layer; position unknown; no
 * original weights), FORMAT, IO, OUT_OF_MEMORY. @since 0.1 */
PLORA_API plora_status plora_ledger_verify(plora_ledger *ledger);

/* -------------------------------------------------------------------------------------------------------------- export */

enum {
    PLORA_EXPORT_PEFT = 0, /* a directory as of plora_adapters_save() */
    PLORA_EXPORT_GGUF = 1  /* a file for llama.cpp (--lora); models of the LLaMA family, by their Hugging Face names */
};

typedef struct plora_export_options {
    size_t struct_size;
    int32_t format;   /* PLORA_EXPORT_... */
    int32_t live;     /* 1: the live adapter as well */
    int64_t records;  /* the first so many; -1 = those that the weights hold, or all when that is not known */
    int64_t rank;     /* the highest of the result; 0 = no bound */
    double max_error; /* |D - D'| / |D| of each weight, Frobenius norms: the lowest rank that keeps to it; 0 = none */
    /* GGUF: num_attention_heads and num_key_value_heads (0 = as many) of the model's config.json. heads = 0: both are read from
     * there, if the model was opened from its directory. */
    int32_t heads;
    int32_t kv_heads;
} plora_export_options;

#define PLORA_EXPORT_OPTIONS_INIT                                                                                      \
    {                                                                                                                  \
        sizeof(plora_export_options), PLORA_EXPORT_PEFT, 1, -1, 0, 0.0, 0, 0                                           \
    }

/* What became of one weight's D. */
typedef struct plora_export_layer {
    int32_t layer;
    int32_t reserved;
    int64_t stacked_rank; /* the sum of the ranks of its stages */
    int64_t rank;         /* exported; 1 when D = 0 */
    double norm;          /* |D|; 0 in an exact export, which does not need it */
    double error;         /* |D - D'| / |D|, up to the rounding of D' to fp32 */
} plora_export_layer;

typedef struct plora_export_report {
    size_t struct_size;
    int64_t records; /* exported */
    int32_t live;    /* whether the live adapter is among it: not when its B = 0 */
    int32_t weights;
    int64_t rank; /* the highest */
    double norm;  /* over all weights, as above */
    double error;
    plora_export_layer *layers; /* caller's array, or NULL: the first layer_capacity weights, in layer order */
    int64_t layer_capacity;
} plora_export_report;

#define PLORA_EXPORT_REPORT_INIT                                                                                       \
    {                                                                                                                  \
        sizeof(plora_export_report), 0, 0, 0, 0, 0.0, 0.0, NULL, 0                                                     \
    }

/* Writes what training did to each weight as one ordinary LoRA adapter for the original model: D' = D, or the D' nearest to D of
 * a lower rank, where for every weight
 *
 *     D = sum over records m_t s_t B_t A_t  +  s B A of the live adapter
 *
 * rank = 0 and max_error = 0: exact, the stages stacked, [f_1 B_1 .. f_S B_S] and [A_1; ..; A_S]. Where all factors f of a weight are
 * equal, every number is the ledger's own and PEFT's alpha / r is f; else f is multiplied into B, rounded once to fp32.
 * Otherwise truncated: QR of both stacks and an SVD of the small core in double, never N x K, on the context's threads; the singular
 * values are shared evenly by A and B.
 * Of a shard D is its part, unless it is GATHERED; GGUF is then UNSUPPORTED.
 * The difference to the trained weights is what rounding them has lost; plora_unload_report tells how much that was.
 * Each file is written atomically. options and report may be NULL. Waits for the device.
 * Errors: INVALID_ARGUMENT, NON_FINITE (the live adapter), UNSUPPORTED (a layer that the format cannot name; an embedding),
 * SHAPE (heads), FORMAT (a damaged record), IO, OUT_OF_MEMORY. @since 0.1 */
PLORA_API plora_status plora_ledger_export(plora_ledger *ledger, const char *path, const plora_export_options *options,
                                           plora_export_report *report);

/* Writes a smaller ledger to `path`, in which one record stands for the `count` records from `first` on: for each weight their sum,
 * truncated as by plora_ledger_export() to rank and max_error of the options (both 0: to the rank that it has, without loss beyond
 * fp32); the other options must be as PLORA_EXPORT_OPTIONS_INIT has them. plora_ledger_record() tells what was folded and its error.
 * All else is copied, this ledger stays as it is. Where the weights hold all its records, their hash goes into the new one, which
 * then can be opened in its place and gone on with. Its sum can be exported; weights behind the folded record cannot be rebuilt: rolling
 * back to them, or past them, is UNSUPPORTED. Checkpoints of this ledger are not of the new one's lineage.
 * Written atomically; what `path` was is replaced. Errors: as the export, INVALID_ARGUMENT (range; the ledger's own file). @since 0.1 */
PLORA_API plora_status plora_ledger_compact(plora_ledger *ledger, const char *path, int64_t first, int64_t count,
                                            const plora_export_options *options, plora_export_report *report);

/* ------------------------------------------------------------------------------------------------------------ serving */

/* Many adapters over one model, several of them in one batch, coming and going while requests run.
 *
 *     plora_registry   names -> snapshots: load, publish, replace, unload, evict
 *     plora_snapshot   one version of an adapter: its A, B and scales, which nobody writes any more; who holds a reference keeps it
 *     plora_batch      which token of a step belongs to which snapshot; prepared once, then used for every layer
 *
 * docs/serving.md has the whole of it, with the lifetimes. */
typedef struct plora_registry plora_registry;
typedef struct plora_snapshot plora_snapshot;
typedef struct plora_batch plora_batch;

typedef struct plora_registry_options {
    size_t struct_size;
    /* What all snapshots of the registry may take together in the memory that products read (the device's; on the CPU the host's),
     * in bytes: room is made by evicting those that were acquired longest ago. 0 = no bound. */
    size_t memory_budget;
    /* Directory for what is evicted: files without a name, which end with the process. NULL: host memory; on the CPU, where that would
     * free nothing, nothing is evicted then. */
    const char *spill_directory;
} plora_registry_options;

#define PLORA_REGISTRY_OPTIONS_INIT                                                                                    \
    {                                                                                                                  \
        sizeof(plora_registry_options), 0, NULL                                                                        \
    }

/* Creates an empty registry for the layers that the model has; layers can no longer be added to it. options may be NULL.
 * Threads: all calls on one registry, and on snapshots, may be made from any thread at any time, also while others compute, except where
 * a call says otherwise. Destroying it is safe while snapshots are held: it ends with the last of them.
 * Errors: INVALID_ARGUMENT, IO (spill_directory is not one), OUT_OF_MEMORY. @since 0.1 */
PLORA_API plora_status plora_registry_create(plora_model *model, const plora_registry_options *options,
                                             plora_registry **registry);
PLORA_API void plora_registry_destroy(plora_registry *registry);

/* Puts an adapter under a name, from a path as of plora_adapters_load(), with its checks. If the name is taken, it is replaced: snapshots
 * that are held stay as they are, whoever acquires the name from now on gets the new one, and nobody waits. *version (may be NULL)
 * becomes its number, which the registry gives but once, also to other names: a cache keyed by it can never be stale.
 * On an error the name is as it was. heads of options (may be NULL) are those of plora_adapters_options, for GGUF.
 * Errors: those of plora_adapters_load(); INVALID_ARGUMENT (a name that is empty or longer than 255 bytes); BUSY (the name is merged);
 * OUT_OF_MEMORY, also when the budget is too small, or all of it pinned and in use. @since 0.1 */
PLORA_API plora_status plora_registry_load(plora_registry *registry, const char *name, const char *path,
                                           const plora_adapters_options *options, int64_t *version);

/* The factors of one layer for plora_registry_add(): y += scale x A^T B^T. F32, BF16 or F16, in host memory; copied. */
typedef struct plora_registry_layer {
    plora_matrix a; /* [R,K] */
    plora_matrix b; /* [N,R] */
    double scale;
    int32_t layer;
    int32_t reserved; /* 0 */
} plora_registry_layer;

/* The same from matrices in host memory, at most one entry for a weight (tied layers share one).
 * Errors: as plora_registry_load(); SHAPE, NON_FINITE (the message names layer and element). @since 0.1 */
PLORA_API plora_status plora_registry_add(plora_registry *registry, const char *name,
                                          const plora_registry_layer *layers, int64_t layer_count, int64_t *version);

/* The same from adapters that are being trained on the registry's model, without a file: a copy of A, B and scales as they are at this
 * point of the stream, within device memory. What training then writes is never seen, and an unload changes nothing here: what it moved
 * into W is in W. Waits for the stream. Must not overlap with calls that write the adapters. Errors: as above. @since 0.1 */
PLORA_API plora_status plora_registry_publish(plora_registry *registry, const char *name, plora_adapters *adapters,
                                              int64_t *version, void *stream);

enum {
    PLORA_REGISTRY_DEFER = 1 /* the name goes at once, the memory when the last holder has released it */
};

/* Takes a name away. Errors: NOT_FOUND; BUSY: its present snapshot is held by somebody and flags has no DEFER, or it is merged; the
 * message says how many hold it; nothing has changed. @since 0.1 */
PLORA_API plora_status plora_registry_unload(plora_registry *registry, const char *name, uint32_t flags);

/* A pinned name keeps its present and later snapshots in memory; pinned = 0 ends that. Brings an evicted one back.
 * Errors: NOT_FOUND, OUT_OF_MEMORY, IO. @since 0.1 */
PLORA_API plora_status plora_registry_pin(plora_registry *registry, const char *name, int32_t pinned);

/* Evicts a name's snapshot now, until it is acquired again. Errors: NOT_FOUND; BUSY (held, pinned or merged); UNSUPPORTED (the CPU without
 * spill_directory); OUT_OF_MEMORY, IO. @since 0.1 */
PLORA_API plora_status plora_registry_evict(plora_registry *registry, const char *name);

/* Gives back the memory of snapshots that have no name and no holder any more. Every call that changes the registry does this too; the
 * release of a snapshot does not, so that a request never pays for it. @since 0.1 */
PLORA_API plora_status plora_registry_collect(plora_registry *registry);

/* The present snapshot of a name, for a request to hold to its end. Takes a short lock, which no call holds while it reads, copies or
 * allocates; one that was evicted is first brought back, which takes as long as a copy takes.
 * Errors: NOT_FOUND; OUT_OF_MEMORY (no room for an evicted one); IO. @since 0.1 */
PLORA_API plora_status plora_registry_acquire(plora_registry *registry, const char *name, plora_snapshot **snapshot);

/* One more reference, for a holder to pass on; and the end of one (NULL does nothing). No lock, no memory is freed. @since 0.1 */
PLORA_API void plora_snapshot_retain(plora_snapshot *snapshot);
PLORA_API void plora_snapshot_release(plora_snapshot *snapshot);

typedef struct plora_snapshot_info {
    size_t struct_size;
    const char *name; /* valid as long as the snapshot is held */
    int64_t version;
    int64_t bytes;    /* in the memory that products read, or 0 while evicted */
    int64_t holders;  /* references, this one included */
    int64_t acquired; /* how many times by name so far */
    int32_t rank;     /* the highest of its layers */
    int32_t weights;  /* that it has factors for */
    int32_t pinned;
    int32_t merged;
} plora_snapshot_info;

#define PLORA_SNAPSHOT_INFO_INIT                                                                                       \
    {                                                                                                                  \
        sizeof(plora_snapshot_info), NULL, 0, 0, 0, 0, 0, 0, 0, 0                                                      \
    }

PLORA_API plora_status plora_snapshot_describe(const plora_snapshot *snapshot, plora_snapshot_info *info);

/* Entry number `index` of the names in use, in order of strcmp(): NOT_FOUND behind the last, so that a host can count up until then.
 * info->name becomes NULL; the name is copied to name[capacity], INVALID_ARGUMENT when it has no room. @since 0.1 */
PLORA_API plora_status plora_registry_entry(plora_registry *registry, int64_t index, char *name, size_t capacity,
                                            plora_snapshot_info *info);

typedef struct plora_registry_statistics {
    size_t struct_size;
    int64_t names;
    int64_t resident_bytes; /* in the memory that products read: what is served, and what is only held any more */
    int64_t budget_bytes;   /* 0 = no bound */
    int64_t evicted_bytes;  /* kept elsewhere */
    int64_t retired;        /* snapshots without a name that are not collected yet */
    /* Counters: */
    int64_t acquired, missed; /* by name: found, and not */
    int64_t added, replaced, unloaded, busy;
    int64_t evicted, restored;
} plora_registry_statistics;

#define PLORA_REGISTRY_STATISTICS_INIT                                                                                 \
    {                                                                                                                  \
        sizeof(plora_registry_statistics), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0                                       \
    }

PLORA_API plora_status plora_registry_stats(plora_registry *registry, plora_registry_statistics *statistics);

/* Puts a name's snapshot into the backbone, W <- round(W + s B A), for a server that has but one adapter to serve: its tokens then cost
 * what the backbone costs. The weights as they were are kept in host memory, and _unmerge() puts those very bits back, residuals are left
 * alone. While it lasts, slots of that snapshot in a batch add nothing, other snapshots are refused, and so is what else writes
 * the weights (plora_unload(), plora_ledger_roll_back(), plora_checkpoint_load()). One at a time for a model. Both wait for the device and
 * must not overlap with calls that read the weights. Everything is checked before the first write. The end of a registry unmerges.
 * Errors: NOT_FOUND; UNSUPPORTED (a quantised weight); BUSY (a merge already; snapshots of other names are held; a batch has them);
 * NON_FINITE (a weight would overflow its dtype, naming the layer); INVALID_ARGUMENT (_unmerge: nothing is merged); OUT_OF_MEMORY.
 * @since 0.1 */
PLORA_API plora_status plora_registry_merge(plora_registry *registry, const char *name);
PLORA_API plora_status plora_registry_unmerge(plora_registry *registry);

typedef struct plora_batch_options {
    size_t struct_size;
    int64_t max_tokens;   /* of one step */
    int32_t max_adapters; /* snapshots of one step */
    int32_t max_rank;     /* of a snapshot */
} plora_batch_options;

#define PLORA_BATCH_OPTIONS_INIT                                                                                       \
    {                                                                                                                  \
        sizeof(plora_batch_options), 1024, 64, 64                                                                      \
    }

/* Creates a batch for the layers of the model, with all the memory that its calls need: about max_tokens x max_rank floats, on CUDA for
 * each 512 inputs of a layer. One thread (stream) at a time; threads that serve at once each have a batch of their own.
 * options may be NULL. Errors: INVALID_ARGUMENT (a value < 1 or, for the ranks, > 65536), OUT_OF_MEMORY. @since 0.1 */
PLORA_API plora_status plora_batch_create(plora_model *model, const plora_batch_options *options, plora_batch **batch);
PLORA_API void plora_batch_destroy(plora_batch *batch);

/* Says what the next step is made of: token t belongs to snapshots[slots[t]], -1 = to the backbone alone; in any order. Once a step, for
 * all its layers. The snapshots must be held during the call; the batch then holds them itself, until the next call or its end (tokens = 0
 * releases them). slots may be NULL when tokens is 0, snapshots when there are none. No lock, no allocation; on CUDA the tables go along
 * in the arguments of a kernel on the stream, and nothing waits.
 * Errors: INVALID_ARGUMENT (tokens or snapshots beyond the options', a slot that names no snapshot, a rank beyond max_rank), all with the
 * values; BUSY (another snapshot is merged into the backbone). On an error the batch is as it was. @since 0.1 */
PLORA_API plora_status plora_batch_begin(plora_batch *batch, int64_t tokens, const int32_t *slots,
                                         plora_snapshot *const *snapshots, int32_t snapshot_count, void *stream);

/* For each of the layers, which must have the same K (q, k and v; gate and up), with A, B and s those of each token's snapshot:
 *
 *     y_i[t] = x[t] W_i^T + bias_i + s x[t] A_i^T B_i^T          x[T,K], y_i[T,N_i], each F32 or BF16
 *
 * DELTA_ONLY: only the low-rank part, added to what y_i holds; rows without a snapshot, or whose snapshot has nothing for the layer, stay
 * as they are. T is that of plora_batch_begin(); y[layer_count]; x and the y must not overlap one another. A weight's factors are read
 * once, x once for all layers of the call.
 * A row of the low-rank part has the same bits whatever else is in the batch. Precision: fp32; on CUDA, where x and y are BF16, A, B and
 * u = x A^T enter the products rounded to bf16. No allocation, no wait; with DELTA_ONLY no lock either. The other form's plain products
 * are those of plora_linear_forward(). May be captured in a CUDA graph, which then repeats this step's split of tokens and ranks.
 * Errors: INVALID_ARGUMENT (layer, flags, overlap, NULL), SHAPE, UNSUPPORTED (dtype), BACKEND. @since 0.1 */
PLORA_API plora_status plora_batch_forward(plora_batch *batch, const int32_t *layers, int32_t layer_count,
                                           const plora_matrix *x, const plora_matrix *y, uint32_t flags, void *stream);

#ifdef __cplusplus
}
#endif

#endif /* PLORA_H */
