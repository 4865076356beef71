/* handles.h: the structs behind the opaque handles. Seen by lib/ only, never by a backend.
 *
 *     context <- model <- adapters <- optimizer          a child holds a reference to its parent
 *
 * Weights and layers are separate: tied layers share one weight, and an adapter belongs to a weight. */
#ifndef PLORA_HANDLES_H
#define PLORA_HANDLES_H

#include <pthread.h>
#include <stdatomic.h>

#include "backend.h"
#include "status.h"

enum { PLORA__ALIGNMENT = 64, PLORA__ARENA_ALIGNMENT = 16 /* elements */ };

/* Live allocations and their history. */
struct plora__memory_count {
    atomic_size_t current_bytes, peak_bytes;
    atomic_int_fast64_t allocations;
};

struct plora_context {
    atomic_int references;
    plora_context_options options;
    const struct plora_backend *backend;
    void *device;
    struct plora__memory_count host_memory;
    struct plora__memory_count device_memory; /* 0 on the CPU, whose device memory is host memory */
    atomic_size_t mapped_bytes;
};

/* context.c: memory through the host's hooks, 64-byte aligned, counted; failures leave a message. zero bytes give NULL. */
plora_status plora__allocate(plora_context *context, size_t bytes, void **memory);
plora_status plora__allocate_zeroed(plora_context *context, size_t bytes, void **memory);
void plora__free(plora_context *context, void *memory, size_t bytes);
/* Device memory through the backend, which counts it likewise. */
plora_status plora__device_allocate(plora_context *context, size_t bytes, void **memory);
void plora__device_free(plora_context *context, void *memory, size_t bytes);
/* Overflow-checked a * b. */
plora_status plora__multiply(size_t a, size_t b, size_t *product);
/* A copy of a string, and its release. */
plora_status plora__duplicate(plora_context *context, const char *text, char **copy);
void plora__free_string(plora_context *context, char *text);
void plora__log(const plora_context *context, int32_t level, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* A device of the CPU's backend, whatever the context's own: that one itself where it is the CPU. */
plora_status plora__host_device_open(plora_context *context, void **device);
void plora__host_device_close(const plora_context *context, void *device);

/* As the backend's check_stream. */
plora_status plora__check_stream(const plora_context *context, void *stream, int waits);
/* Copies from device memory to the host, and waits for it. */
plora_status plora__read_device(const plora_context *context, void *host, const void *device, size_t bytes,
                                void *stream);

void plora__context_retain(plora_context *context);
void plora__context_release(plora_context *context);

/* What makes a weight a quantised one. Its matrix is then the master, F32 in host memory, or has no data. */
struct plora__quantised_weight {
    struct plora__quantised values; /* device memory of the host's */
    float map[256];                 /* of doubly quantised values, here */
    int32_t master;                 /* PLORA_MASTER_... */
    size_t master_bytes;            /* of the library's: memory, or a mapping */
};

struct plora__weight {
    plora_matrix matrix;                       /* as stored: [N,K], or [K,N] with fan_in_fan_out */
    struct plora__quantised_weight *quantised; /* NULL = it is not */
    int32_t fan_in_fan_out;
    int32_t first_layer; /* the layer that introduced it: its index keys the random numbers */
    plora_shard shard;   /* its place; of a whole one {0, 0, N, K} */
    int32_t gathered;    /* PLORA_LAYER_GATHERED */
    uint16_t *residual;  /* the low halves of its values, or NULL; in host memory or on the device */
    int64_t residual_stride;
    int32_t residual_on_host, residual_is_new;
};

struct plora__layer {
    char *name;
    int32_t weight; /* index into weights */
    int32_t flags;
    const void *bias;
    int32_t bias_dtype;
    int64_t in_features, out_features; /* of its calls and its adapter: of a gathered shard those of the whole */
};

struct plora__model_files; /* model_files.c: the mapped files of an opened model */

struct plora_model {
    atomic_int references;
    plora_context *context;
    struct plora__weight *weights;
    struct plora__layer *layers;
    int32_t weight_count, weight_capacity;
    int32_t layer_count, layer_capacity;
    atomic_int adapters_made;         /* > 0: no more layers may be added */
    struct plora__model_files *files; /* NULL for a host-built model */
    char *path;                       /* as given to plora_model_open(); NULL for a host-built model */
    plora_snapshot *_Atomic merged;   /* whose factors the weights hold, of a registry; NULL = none */
    void *host_device;                /* of the CPU's backend, for masters; NULL before the first quantised weight */
};

void plora__model_retain(plora_model *model);
void plora__model_release(plora_model *model);

/* shard.c: a shard as the model keeps it, from a description; `matrix` gives the weight's shape. Whether it is all of its whole. */
plora_status plora__shard_place(const plora_shard *given, const plora_matrix *matrix, int fan_in_fan_out,
                                const char *name, plora_shard *shard);
int plora__shard_is_whole(const struct plora__weight *weight);
/* INVALID_ARGUMENT when a weight that a new layer is tied to is not the same shard. */
plora_status plora__shard_same(const plora_model *model, int32_t weight, const char *name, const plora_shard *shard,
                               int gathered);
/* As it is described: all 0 where it is whole. */
plora_shard plora__shard_given(const struct plora__weight *weight);
/* The column of the whole W that the first column of the adapter's A stands for. */
int64_t plora__shard_first_column(const struct plora__weight *weight);
/* Where its element (0, 0) is among those of the whole W in memory, and how far apart rows of memory are there. */
void plora__shard_elements(const struct plora__weight *weight, int64_t *first_element, int64_t *row_elements);
/* The highest rank of an adapter: min(N, K) of the whole. */
int64_t plora__rank_most(const plora_model *model, const struct plora__layer *layer);

/* model.c: what any new layer is checked for; room for one more layer and weight, with a copy of its name; and the layer itself, which
 * cannot fail then. `weight` is the number of an existing one, or that of `added`, which becomes the model's. */
plora_status plora__model_check_layer(const plora_model *model, const char *name, int32_t flags, const void *bias,
                                      int32_t bias_dtype);
plora_status plora__model_reserve(plora_model *model, const char *name, char **copy);
void plora__model_append(plora_model *model, struct plora__layer layer, const struct plora__weight *added);

/* master.c: the full-precision weights behind quantised ones. make() fills `weight`'s matrix and master as the description says, from
 * finite values alone. */
plora_status plora__master_make(plora_model *model, const plora_quantised_linear *linear, struct plora__weight *weight);
void plora__master_free(plora_context *context, struct plora__weight *weight);
void plora__quantised_free(plora_context *context, struct plora__weight *weight);

/* runs.c: quantised values made or read a run of rows or blocks at a time, through memory of the host. */
struct plora__run_memory {
    size_t codes_bytes, scales_bytes, nested_bytes, values_bytes, delta_bytes,
        bytes; /* what is needed of each, and had in all */
    void *codes;
    float *scales;
    uint8_t *nested_codes;
    float *values, *merged; /* of the run, dense */
    float *delta;           /* of the rows that it touches, dense */
};
/* Adds what a weight's runs need, with `values` and `delta` if asked for; then all is allocated. */
void plora__run_memory_need(const struct plora__quantised *weight, int values, int delta,
                            struct plora__run_memory *memory);
plora_status plora__run_memory_make(plora_context *context, struct plora__run_memory *memory);
void plora__run_memory_free(plora_context *context, struct plora__run_memory *memory);

struct plora__run {
    int64_t first, count; /* elements */
};
/* The run from element `first` on; count = 0 at the end. */
struct plora__run plora__run_next(const struct plora__quantised *weight, int64_t first);
/* What is in the memory, dequantised into out[count]. */
plora_status plora__run_dequantise(void *host_device, const struct plora__quantised_weight *weight,
                                   struct plora__run run, const struct plora__run_memory *memory, float *out);
/* Copies the codes of a run to the host, and dequantises them into out[count]. */
plora_status plora__run_read(const plora_context *context, void *host_device,
                             const struct plora__quantised_weight *weight, struct plora__run run,
                             const struct plora__run_memory *memory, float *out, void *stream);
/* Makes the codes of a run of `values`, whose element `first` is the run's first, in `memory`; and brings them to their place. */
plora_status plora__run_make(void *host_device, const struct plora__quantised_weight *weight, struct plora__run run,
                             const plora_matrix *values, int64_t first, const struct plora__run_memory *memory,
                             struct plora__quantise_sums *sums);
plora_status plora__run_write(const plora_context *context, const struct plora__quantised *weight,
                              struct plora__run run, const struct plora__run_memory *memory, void *stream);

/* requantise.c: all codes of a weight anew from its master. */
plora_status plora__requantise(const plora_model *model, const struct plora__weight *weight,
                               const struct plora__run_memory *memory, void *stream);
/* model_files.c */
plora_status plora__model_files_open(plora_model *model, const char *path);
void plora__model_files_close(plora_context *context, struct plora__model_files *files);

/* One adapter: views into the arenas by element offset. */
struct plora__adapter {
    int32_t weight;
    int32_t layer; /* the weight's first_layer */
    int64_t rank, in_features, out_features;
    double alpha, scale;
    int64_t a_offset, b_offset;
};

/* What the backend finds out about the adapters in an unload: arrays in one block of memory, in this order. */
struct plora__findings {
    double *magnitudes;             /* [2 adapter_count]: max |A|, max |B| of each */
    struct plora__merge_sums *sums; /* [adapter_count] */
    int64_t *overflows;             /* [adapter_count] */
};

struct plora_adapters {
    atomic_int references;
    plora_model *model;
    plora_adapters_options options; /* targets, exclude, overrides are not kept: NULL */
    struct plora__adapter *adapters;
    int32_t adapter_count;
    int32_t *adapter_of_layer;       /* [layer_count of the model], -1 = none */
    struct plora__segment *segments; /* device: A and B of each adapter */
    int32_t segment_count;
    float *parameters, *gradients; /* device arenas */
    int64_t parameter_count;
    int64_t stage;
    uint64_t dropout_step, dropout_first_token;
    pthread_mutex_t workspace_lock;
    void *own_workspace, *workspace; /* device; workspace is own_workspace or the host's */
    size_t own_workspace_bytes, workspace_bytes;
    void *merge_workspace; /* device */
    size_t merge_workspace_bytes;
    uint16_t *residual_staging; /* device: room for the largest residual that is kept on the host */
    size_t residual_staging_bytes;
    /* Of quantised weights, in host memory. */
    struct plora__run_memory runs;
    float *host_factors;  /* A and B of one adapter; NULL on the CPU */
    void *host_workspace; /* of their merges; on the CPU merge_workspace */
    size_t host_factor_bytes, host_workspace_bytes;
    struct plora__quantise_sums *quantise_sums;       /* [adapter_count], of an unload */
    struct plora__findings findings, device_findings; /* of an unload; the same layout on the host and on the device */
    struct plora_ledger *ledger;                      /* which holds a reference to the adapters; NULL = none */
};

/* unload.c: what the backend is to merge into weight `number` with these factors, in device memory: a[rank, K], b[N, rank]. No workspace yet. */
struct plora__merge_args plora__merge_weight(const plora_model *model, int32_t number, const float *a, const float *b,
                                             int64_t rank, double factor);
/* What it is to merge for adapter `number` at momentum 1, without sums. */
struct plora__merge_args plora__merge_args(const plora_adapters *adapters, int32_t number);
/* The same with factors from elsewhere, in device memory: a[rank, K], b[N, rank]. */
struct plora__merge_args plora__merge_factors(const plora_adapters *adapters, int32_t number, const float *a,
                                              const float *b, int64_t rank, double factor);

/* residual.c: the residuals that a set's options ask for, and the memory to merge with those on the host. All or none. */
plora_status plora__residuals_keep(plora_adapters *adapters);
void plora__residuals_free(plora_model *model);
size_t plora__residual_bytes(const struct plora__weight *weight);
/* As 16-bit numbers of no dtype that means anything; data NULL = none. */
plora_matrix plora__residual_matrix(const struct plora__weight *weight);
plora_status plora__residual_clear(const plora_adapters *adapters, int32_t number, void *stream);
/* residual.c: PLORA_ROUND_DEFAULT replaced by what it stands for here, or why this rounding cannot be. */
plora_status plora__resolve_rounding(const plora_adapters *adapters, int32_t *rounding);
/* residual.c: completes the arguments of a merge of adapter `number` in this stage, and runs it. */
void plora__merge_round(const plora_adapters *adapters, int32_t number, int32_t rounding, uint64_t seed, int64_t stage,
                        struct plora__merge_args *args);
plora_status plora__merge(const plora_adapters *adapters, int32_t number, struct plora__merge_args *args, void *stream);

/* unload.c: NON_FINITE, naming the layer, if a value of A or B is infinite or NaN. Waits for the stream. */
plora_status plora__adapters_check_finite(const plora_adapters *adapters, void *stream);
/* registry_merge.c: BUSY while the weights hold an adapter of a registry. */
plora_status plora__weights_check(const plora_model *model);
/* requantise.c: the memory that unloads of the set's quantised weights take; their release. */
plora_status plora__requantise_prepare(plora_adapters *adapters);
void plora__requantise_free(plora_adapters *adapters);
/* All masters' codes, after they were written; nothing that can fail but the device. */
plora_status plora__requantise_set(const plora_adapters *adapters);
/* A merge with everything in host memory, where a master lies. Does not requantise. */
plora_status plora__merge_host(const plora_adapters *adapters, struct plora__merge_args *args);
/* The unload of one quantised weight, the factors as they lie on the device: into its master and from there into the codes, panel by
 * panel; without a master into the codes alone. With *sums, on the host, also into quantise_sums. Without a master it may be a `trial`,
 * which writes nothing but *sums. */
plora_status plora__unload_quantised(const plora_adapters *adapters, int32_t number, struct plora__merge_args *args,
                                     struct plora__merge_sums *sums, int trial, void *stream);
/* How many elements of a master that unload would make infinite. */
plora_status plora__overflows_of_master(const plora_adapters *adapters, int32_t number, struct plora__merge_args *args,
                                        int64_t *overflows, void *stream);

void plora__adapters_retain(plora_adapters *adapters);
void plora__adapters_release(plora_adapters *adapters);
/* linear.c: an activation is [rows,columns], F32 or BF16; `what` and the layer's name are for the message. */
plora_status plora__check_activation(const plora_matrix *matrix, const char *what, const char *layer, int64_t rows,
                                     int64_t columns);
/* linear.c: a gathered layer takes DELTA_ONLY alone. */
plora_status plora__check_gathered(const plora_model *model, int32_t layer, uint32_t flags);
/* linear.c: workspace bytes with which every layer's calls can run, those of the usual dtypes in passes of `tokens`. */
size_t plora__linear_workspace_bytes(const plora_adapters *adapters, int64_t tokens);
/* Draws A of every adapter for adapters->stage, and sets B to 0. */
plora_status plora__adapters_init(plora_adapters *adapters, void *stream);
/* One adapter of a set that plora__adapters_build() makes: chosen by targets, or read from a file. */
struct plora__adapter_choice {
    int32_t layer, rank;
    double alpha, scale;
};
/* adapters.c: the options that adapters need wherever they come from: init, dropout, workspace_tokens. */
plora_status plora__adapters_check_common(const plora_adapters_options *options);
/* adapters.c: a set with these adapters, in the order of their weights; not initialised. */
plora_status plora__adapters_build(plora_model *model, const plora_adapters_options *options,
                                   const struct plora__adapter_choice *choices, int32_t choice_count,
                                   plora_adapters **adapters);

struct plora_optimizer {
    plora_adapters *adapters;
    plora_optimizer_options options;
    float *first_moment, *second_moment; /* device */
    struct plora__step_state *state;     /* device */
    void *workspace;                     /* device */
    size_t workspace_bytes;
    int64_t step;             /* since the last reset: bias correction */
    int64_t schedule_step;    /* since the schedule's last restart */
    int64_t total_steps;      /* never reset */
    int64_t last_unload_step; /* total_steps at the last unload, -1 = none: RELORA's re-warm-up */
};

/* schedule.c: the factor on learning_rate for the optimizer's next step. */
double plora__schedule_factor(const struct plora_optimizer *optimizer);
/* optimizer.c: waits for the steps so far. When some were refused, takes them back from the counters and says so, once: `pending`
 * of them are not counted yet. */
plora_status plora__optimizer_settle(struct plora_optimizer *optimizer, int64_t pending, double *norm, void *stream);
/* optimizer.c: the optimizer's part of an unload: moments reset or scaled, counters restarted, as MOMENTS_RESET / _KEEP says. */
plora_status plora__optimizer_unload(struct plora_optimizer *optimizer, int32_t moments, double momentum, void *stream);

#endif
