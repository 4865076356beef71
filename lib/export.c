/* export.c: the sum of a ledger's stages as one LoRA adapter of the original model.
 *
 *     gather    the records' factors and the live adapter's              D = sum f_i B_i A_i, weight by weight
 *     truncate  if asked for, each weight's sum to one product: low_rank.c
 *     write     what a weight has now, stacked:  A = [A_1; ..; A_S],  B = [f_1 B_1 .. f_S B_S] / scale,  as a PEFT directory
 *               (peft.c) or as a GGUF file (gguf.c)
 *
 * Stacked tensors are never in memory: the writers take them from the factors as they go. A compaction is the same with a range of
 * records, written as one record of another ledger. */
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "dtype.h"
#include "gguf.h"
#include "json.h"
#include "ledger.h"
#include "low_rank.h"
#include "peft.h"

/* A weight on its way. */
struct layer {
    const struct plora__factors *factors;
    int64_t count;
    int64_t out_features, in_features;
    int64_t stacked_rank,
        rank;          /* before and after the truncation; rank is 1 when nothing is left, for formats know no 0 */
    double scale;      /* what the format multiplies B A by */
    int64_t head_rows; /* > 0: B's rows are interleaved for GGUF */
    double norm, lost;
    struct plora__factors product; /* of the truncation: memory of the export's own */
};

struct export
{
    plora_ledger *ledger;
    const plora_adapters *adapters;
    plora_context *context;
    plora_export_options options;
    int64_t first, records;         /* the range of them */
    int32_t live;                   /* the live adapter is among the factors */
    struct layer *layers;           /* [adapter_count] */
    struct plora__factors *factors; /* [adapter_count][records + 1] */
    size_t layer_bytes, factor_bytes;
    float *parameters; /* the live arena on the host: the arena itself, or a copy */
    size_t copied_bytes;
};

static const char *name_of(const struct export *e, int32_t number)
{
    return e->adapters->model->layers[e->adapters->adapters[number].layer].name;
}

/* ----------------------------------------------------------------------------------------------------------- gathering */

static plora_status check_options(const plora_ledger *ledger, const plora_export_options *options)
{
    PLORA_CHECK(options->format == PLORA_EXPORT_PEFT || options->format == PLORA_EXPORT_GGUF,
                PLORA_ERROR_INVALID_ARGUMENT, "format %d is unknown", options->format);
    PLORA_CHECK(options->live == 0 || options->live == 1, PLORA_ERROR_INVALID_ARGUMENT, "live is %d: must be 0 or 1",
                options->live);
    PLORA_CHECK(options->records >= -1 && options->records <= plora_ledger_length(ledger), PLORA_ERROR_INVALID_ARGUMENT,
                "records is %lld: the ledger has %lld", (long long)options->records,
                (long long)plora_ledger_length(ledger));
    PLORA_CHECK(options->rank >= 0, PLORA_ERROR_INVALID_ARGUMENT, "rank is %lld: must not be negative",
                (long long)options->rank);
    PLORA_CHECK(options->max_error >= 0.0 && options->max_error < 1.0, PLORA_ERROR_INVALID_ARGUMENT,
                "max_error is %g: must be in [0, 1)", options->max_error);
    PLORA_CHECK(options->heads >= 0 && options->kv_heads >= 0, PLORA_ERROR_INVALID_ARGUMENT,
                "heads is %d, kv_heads is %d: must not be negative", options->heads, options->kv_heads);
    return PLORA_OK;
}

/* Brings the live arena to the host, and looks whether it is worth exporting. */
static plora_status read_live(struct export *e)
{
    const plora_adapters *adapters = e->adapters;
    const size_t bytes = (size_t)adapters->parameter_count * sizeof(float);
    void *memory = adapters->parameters;
    if (e->context->options.backend != PLORA_BACKEND_CPU) {
        PLORA_TRY(plora__allocate(e->context, bytes, &memory));
        e->copied_bytes = bytes;
    }
    e->parameters = memory;
    PLORA_TRY(e->context->backend->synchronize(e->context->device, NULL));
    if (e->copied_bytes > 0) PLORA_TRY(plora__read_device(e->context, memory, adapters->parameters, bytes, NULL));
    for (int32_t i = 0; i < adapters->adapter_count; ++i) {
        const struct plora__adapter *adapter = &adapters->adapters[i];
        const float *a = e->parameters + adapter->a_offset, *b = e->parameters + adapter->b_offset;
        for (int64_t j = 0; j < adapter->rank * adapter->in_features; ++j)
            PLORA_CHECK(isfinite(a[j]), PLORA_ERROR_NON_FINITE, "layer '%s': A[%lld] is %g", name_of(e, i),
                        (long long)j, (double)a[j]);
        for (int64_t j = 0; j < adapter->rank * adapter->out_features; ++j) {
            PLORA_CHECK(isfinite(b[j]), PLORA_ERROR_NON_FINITE, "layer '%s': B[%lld] is %g", name_of(e, i),
                        (long long)j, (double)b[j]);
            e->live |= b[j] != 0.0f;
        }
    }
    return PLORA_OK;
}

static plora_status gather_layer(struct export *e, int32_t number, struct plora__factors *factors)
{
    const struct plora__adapter *adapter = &e->adapters->adapters[number];
    for (int64_t record = 0; record < e->records; ++record) {
        plora_matrix a, b;
        PLORA_TRY(plora_ledger_factors(e->ledger, e->first + record, adapter->layer, &a, &b, &factors[record].factor));
        factors[record].a = a.data;
        factors[record].b = b.data;
        factors[record].rank = a.rows;
    }
    if (e->live)
        factors[e->records] = (struct plora__factors){e->parameters + adapter->a_offset,
                                                      e->parameters + adapter->b_offset, adapter->rank, adapter->scale};
    struct layer *layer = &e->layers[number];
    *layer = (struct layer){.factors = factors, .count = e->records + e->live};
    layer->out_features = adapter->out_features;
    layer->in_features = adapter->in_features;
    layer->stacked_rank = layer->rank = plora__low_rank_sum(factors, layer->count);
    return PLORA_OK;
}

static plora_status gather(struct export *e)
{
    const size_t adapters = (size_t)e->adapters->adapter_count;
    void *memory;
    for (int64_t record = 0; record < e->records; ++record)
        PLORA_TRY(plora__ledger_record_check(&e->ledger->store, e->first + record));
    if (e->options.live) PLORA_TRY(read_live(e));
    PLORA_TRY(plora__multiply(adapters * sizeof *e->factors, (size_t)e->records + 1, &e->factor_bytes));
    PLORA_TRY(plora__allocate_zeroed(e->context, adapters * sizeof *e->layers, &memory));
    e->layers = memory;
    e->layer_bytes = adapters * sizeof *e->layers;
    PLORA_TRY(plora__allocate(e->context, e->factor_bytes, &memory));
    e->factors = memory;
    for (size_t i = 0; i < adapters; ++i)
        PLORA_TRY(gather_layer(e, (int32_t)i, e->factors + i * ((size_t)e->records + 1)));
    return PLORA_OK;
}

static size_t product_bytes(const struct layer *layer)
{
    return (size_t)(layer->product.rank * (layer->out_features + layer->in_features)) * sizeof(float);
}

static void release(struct export *e)
{
    for (int32_t i = 0; e->layers != NULL && i < e->adapters->adapter_count; ++i)
        plora__free(e->context, (void *)(uintptr_t)e->layers[i].product.a, product_bytes(&e->layers[i]));
    plora__free(e->context, e->factors, e->factors == NULL ? 0 : e->factor_bytes);
    plora__free(e->context, e->layers, e->layer_bytes);
    if (e->copied_bytes > 0) plora__free(e->context, e->parameters, e->copied_bytes);
}

/* ---------------------------------------------------------------------------------------------------------- truncation */

/* Layers are truncated in rounds, one a thread, the largest first, so that the layers of a round cost about the same. */
struct rounds {
    struct export *e;
    int32_t threads;
    struct plora__low_rank *found; /* [threads] */
    int32_t *results, *order;      /* [threads], [adapter_count] */
    char *workspaces;              /* [threads][workspace_bytes] */
    size_t workspace_bytes;
    void *block;
    size_t bytes;
};

static int costs_more(int32_t i, int32_t j, const void *user)
{
    const struct layer *a = &((const struct export *)user)->layers[i], *b = &((const struct export *)user)->layers[j];
    const int64_t x = a->out_features + a->in_features, y = b->out_features + b->in_features;
    return x != y ? x > y : i < j;
}

static int32_t thread_count(const struct export *e)
{
    int32_t threads = e->context->options.threads;
#ifdef _OPENMP
    if (threads == 0) threads = omp_get_max_threads();
#endif
    threads = threads < e->adapters->adapter_count ? threads : e->adapters->adapter_count;
    return threads < 1 ? 1 : threads;
}

static plora_status prepare_rounds(struct rounds *rounds)
{
    struct export *e = rounds->e;
    const size_t adapters = (size_t)e->adapters->adapter_count;
    rounds->threads = thread_count(e);
    for (size_t i = 0; i < adapters; ++i) {
        const struct layer *layer = &e->layers[i];
        struct plora__low_rank low_rank;
        const size_t bytes =
            plora__low_rank_prepare(&low_rank, layer->out_features, layer->in_features, layer->factors, layer->count);
        PLORA_CHECK(bytes > 0, PLORA_ERROR_UNSUPPORTED,
                    "layer '%s' [N=%lld,K=%lld]: a sum of ranks of %lld is too high to be truncated",
                    name_of(e, (int32_t)i), (long long)layer->out_features, (long long)layer->in_features,
                    (long long)layer->stacked_rank);
        rounds->workspace_bytes = bytes > rounds->workspace_bytes ? bytes : rounds->workspace_bytes;
    }
    rounds->workspace_bytes = (rounds->workspace_bytes + 63) / 64 * 64;
    const size_t threads = (size_t)rounds->threads, found_at = threads * rounds->workspace_bytes;
    const size_t results_at = found_at + threads * sizeof *rounds->found;
    const size_t order_at = results_at + threads * sizeof *rounds->results;
    rounds->bytes = order_at + adapters * sizeof *rounds->order;
    PLORA_TRY(plora__allocate(e->context, rounds->bytes, &rounds->block));
    rounds->workspaces = rounds->block;
    rounds->found = (struct plora__low_rank *)(rounds->workspaces + found_at);
    rounds->results = (int32_t *)(rounds->workspaces + results_at);
    rounds->order = (int32_t *)(rounds->workspaces + order_at);
    for (size_t i = 0; i < adapters; ++i)
        rounds->order[i] = (int32_t)i;
    plora__sort(rounds->order, (int32_t)adapters, costs_more, e);
    return PLORA_OK;
}

static void truncate_layer(const struct rounds *rounds, int32_t thread, int32_t number)
{
    const struct export *e = rounds->e;
    const struct layer *layer = &e->layers[number];
    struct plora__low_rank *found = &rounds->found[thread];
#ifdef _OPENMP
    omp_set_num_threads(
        1); /* a BLAS with threads of its own, for the rest of this parallel region: layers share the cores */
#endif
    (void)plora__low_rank_prepare(found, layer->out_features, layer->in_features, layer->factors, layer->count);
    rounds->results[thread] =
        plora__low_rank_compute(found, layer->factors, layer->count, e->options.rank, e->options.max_error,
                                rounds->workspaces + (size_t)thread * rounds->workspace_bytes);
}

/* Puts the result in the place of the layer's factors. */
static plora_status keep_product(struct export *e, int32_t number, const struct plora__low_rank *found)
{
    struct layer *layer = &e->layers[number];
    layer->norm = found->norm;
    layer->lost = found->lost;
    layer->rank = found->rank;
    layer->factors = &layer->product;
    layer->count = 0;
    if (found->rank == 0) return PLORA_OK;
    void *memory;
    PLORA_TRY(plora__allocate(
        e->context, (size_t)(found->rank * (layer->out_features + layer->in_features)) * sizeof(float), &memory));
    float *a = memory, *b = a + found->rank * layer->in_features;
    plora__low_rank_store(found, a, b);
    layer->product = (struct plora__factors){a, b, found->rank, 1.0};
    layer->count = 1;
    return PLORA_OK;
}

static plora_status truncate_layers(struct export *e)
{
    struct rounds rounds = {.e = e};
    plora_status status;
    PLORA_TRY_OUT(prepare_rounds(&rounds));
    for (int32_t begin = 0; begin < e->adapters->adapter_count; begin += rounds.threads) {
        const int32_t left = e->adapters->adapter_count - begin;
        const int32_t count = rounds.threads < left ? rounds.threads : left;
#pragma omp parallel for num_threads(rounds.threads) schedule(static, 1)
        for (int32_t i = 0; i < count; ++i)
            truncate_layer(&rounds, i, rounds.order[begin + i]);
        for (int32_t i = 0; i < count; ++i) {
            const int32_t number = rounds.order[begin + i];
            PLORA_CHECK_OUT(rounds.results[i] == 0, PLORA_ERROR_BACKEND,
                            "layer '%s': the singular value decomposition did not converge (LAPACK: %d)",
                            name_of(e, number), rounds.results[i]);
            PLORA_TRY_OUT(keep_product(e, number, &rounds.found[i]));
        }
    }
out:
    plora__free(e->context, rounds.block, rounds.block == NULL ? 0 : rounds.bytes);
    return status;
}

/* ------------------------------------------------------------------------------------------------------------- writing */

static plora_status write_zeros(struct plora__writer *writer, int64_t count)
{
    static const float zeros[256];
    for (; count > 0; count -= 256)
        PLORA_TRY(plora__writer_write(writer, zeros, (size_t)(count < 256 ? count : 256) * sizeof *zeros));
    return PLORA_OK;
}

static plora_status write_scaled(struct plora__writer *writer, const float *values, int64_t count, double factor)
{
    float piece[256];
    if (factor == 1.0) return plora__writer_write(writer, values, (size_t)count * sizeof *values);
    for (; count > 0; count -= 256, values += 256) {
        const int64_t length = count < 256 ? count : 256;
        for (int64_t i = 0; i < length; ++i)
            piece[i] = (float)(factor * (double)values[i]);
        PLORA_TRY(plora__writer_write(writer, piece, (size_t)length * sizeof *piece));
    }
    return PLORA_OK;
}

static int64_t left_over(const struct layer *layer)
{
    return layer->rank - plora__low_rank_sum(layer->factors, layer->count);
}

/* A = [A_1; A_2; ..] */
static plora_status write_a(const struct plora__tensor *tensor, struct plora__writer *writer)
{
    const struct layer *layer = tensor->data;
    for (int64_t i = 0; i < layer->count; ++i)
        PLORA_TRY(write_scaled(writer, layer->factors[i].a, layer->factors[i].rank * layer->in_features, 1.0));
    return write_zeros(writer, left_over(layer) * layer->in_features);
}

/* B = [f_1 B_1 | f_2 B_2 | ..] / scale, a row at a time. */
static plora_status write_b(const struct plora__tensor *tensor, struct plora__writer *writer)
{
    const struct layer *layer = tensor->data;
    const int64_t zeros = left_over(layer);
    for (int64_t i = 0; i < layer->out_features; ++i) {
        const int64_t row = layer->head_rows > 0 ? plora__gguf_row(i, layer->head_rows) : i;
        for (int64_t j = 0; j < layer->count; ++j) {
            const struct plora__factors *factors = &layer->factors[j];
            const double factor = factors->factor == layer->scale ? 1.0 : factors->factor / layer->scale;
            PLORA_TRY(write_scaled(writer, factors->b + row * factors->rank, factors->rank, factor));
        }
        PLORA_TRY(write_zeros(writer, zeros));
    }
    return PLORA_OK;
}

/* The common factor of a weight's stages, which the format then applies: B stays as it is. 1 where they differ. */
static double common_factor(const struct layer *layer)
{
    for (int64_t i = 1; i < layer->count; ++i)
        if (layer->factors[i].factor != layer->factors[0].factor) return 1.0;
    return layer->count > 0 && layer->factors[0].factor != 0.0 ? layer->factors[0].factor : 1.0;
}

static plora_status write_peft(struct export *e, const char *path)
{
    const size_t bytes = (size_t)e->adapters->adapter_count * sizeof(struct plora__peft_adapter);
    plora_adapters_options common = PLORA_ADAPTERS_OPTIONS_INIT;
    plora_status status = PLORA_OK;
    void *block;
    PLORA_TRY(plora__allocate_zeroed(e->context, bytes, &block));
    struct plora__peft_adapter *list = block;
    for (int32_t i = 0; i < e->adapters->adapter_count; ++i) {
        struct layer *layer = &e->layers[i];
        PLORA_TRY_OUT(plora__peft_name(e->adapters, i, &list[i].name));
        layer->scale = common_factor(layer);
        list[i].rank = layer->rank;
        list[i].alpha = layer->scale * (double)layer->rank;
        list[i].a = list[i].b = layer;
        list[i].write_a = write_a;
        list[i].write_b = write_b;
    }
    common.rank = (int32_t)list[0].rank;
    common.alpha = list[0].alpha;
    status = plora__peft_save(e->adapters, list, &common, path);
out:
    plora__free(e->context, block, bytes);
    return status;
}

enum { GGUF_KEY_BYTES = PLORA__GGUF_NAME_BYTES + 8 };

/* The tensors of a GGUF file, in one allocation. */
struct gguf {
    struct plora__tensor *tensors; /* [2 adapter_count] */
    int64_t (*shapes)[2];
    char (*keys)[GGUF_KEY_BYTES];
    struct plora__gguf_heads heads;
};

static plora_status name_tensors(const struct export *e, struct gguf *gguf, int32_t number)
{
    struct layer *layer = &e->layers[number];
    const struct plora__weight *weight = &e->adapters->model->weights[e->adapters->adapters[number].weight];
    const char *name;
    char translated[PLORA__GGUF_NAME_BYTES];
    int32_t rows;
    PLORA_CHECK(weight->gathered || plora__shard_is_whole(weight), PLORA_ERROR_UNSUPPORTED,
                "layer '%s' is a shard: llama.cpp takes adapters of whole weights", name_of(e, number));
    PLORA_TRY(plora__peft_name(e->adapters, number, &name));
    PLORA_TRY(plora__gguf_name(name, translated, &rows));
    PLORA_CHECK(strcmp(name, name_of(e, number)) == 0, PLORA_ERROR_UNSUPPORTED,
                "layer '%s' is tied to '%s', for which llama.cpp has no adapters", name, name_of(e, number));
    PLORA_TRY(plora__gguf_head_rows(&gguf->heads, name, rows, layer->out_features, &layer->head_rows));
    for (int is_b = 0; is_b < 2; ++is_b) {
        const int32_t i = 2 * number + is_b;
        snprintf(gguf->keys[i], GGUF_KEY_BYTES, "%s.lora_%c", translated, is_b ? 'b' : 'a');
        gguf->shapes[i][0] = is_b ? layer->out_features : layer->rank;
        gguf->shapes[i][1] = is_b ? layer->rank : layer->in_features;
        gguf->tensors[i] = (struct plora__tensor){
            .name = gguf->keys[i],
            .shape = gguf->shapes[i],
            .bytes = (size_t)(gguf->shapes[i][0] * gguf->shapes[i][1]) * sizeof(float),
            .data = layer,
            .write = is_b ? write_b : write_a,
        };
    }
    return PLORA_OK;
}

/* llama.cpp knows one alpha for all tensors, and 0 for "no scale at all": then every factor goes into its B. */
static float common_alpha(const struct export *e)
{
    const double scale = common_factor(&e->layers[0]), alpha = scale * (double)e->layers[0].rank;
    for (int32_t i = 1; i < e->adapters->adapter_count; ++i)
        if (e->layers[i].rank != e->layers[0].rank || common_factor(&e->layers[i]) != scale) return 0.0f;
    return (double)(float)alpha == alpha ? (float)alpha : 0.0f;
}

static plora_status write_gguf(struct export *e, const char *path)
{
    const size_t count = 2 * (size_t)e->adapters->adapter_count;
    const size_t shapes_at = count * sizeof(struct plora__tensor), keys_at = shapes_at + count * sizeof(int64_t[2]);
    const size_t bytes = keys_at + count * GGUF_KEY_BYTES;
    plora_status status = PLORA_OK;
    void *block;
    PLORA_TRY(plora__allocate(e->context, bytes, &block));
    struct gguf gguf = {.tensors = block,
                        .shapes = (int64_t(*)[2])((char *)block + shapes_at),
                        .keys = (char(*)[GGUF_KEY_BYTES])((char *)block + keys_at)};
    const float alpha = common_alpha(e);
    PLORA_TRY_OUT(plora__gguf_heads_of(e->adapters->model, e->options.heads, e->options.kv_heads, &gguf.heads));
    const struct plora__gguf_value values[] = {
        {"general.architecture", "llama", 0.0f},
        {"general.type", "adapter", 0.0f},
        {"adapter.type", "lora", 0.0f},
        {"adapter.lora.alpha", NULL, alpha},
    };
    for (int32_t i = 0; i < e->adapters->adapter_count; ++i) {
        e->layers[i].scale = alpha != 0.0f ? common_factor(&e->layers[i]) : 1.0;
        PLORA_TRY_OUT(name_tensors(e, &gguf, i));
    }
    status =
        plora__gguf_write(e->context, path, values, sizeof values / sizeof values[0], gguf.tensors, (int32_t)count);
out:
    plora__free(e->context, block, bytes);
    return status;
}

/* -------------------------------------------------------------------------------------------------------------- report */

static void fill_report(const struct export *e, plora_export_report *report)
{
    double norm = 0.0, lost = 0.0;
    report->records = e->records;
    report->live = e->live;
    report->weights = e->adapters->adapter_count;
    report->rank = 0;
    for (int32_t i = 0; i < e->adapters->adapter_count; ++i) {
        const struct layer *layer = &e->layers[i];
        report->rank = layer->rank > report->rank ? layer->rank : report->rank;
        norm = hypot(norm, layer->norm);
        lost = hypot(lost, layer->lost);
        if (report->layers == NULL || i >= report->layer_capacity) continue;
        report->layers[i] = (plora_export_layer){
            .layer = e->adapters->adapters[i].layer,
            .stacked_rank = layer->stacked_rank,
            .rank = layer->rank,
            .norm = layer->norm,
            .error = layer->norm > 0.0 ? layer->lost / layer->norm : 0.0,
        };
    }
    report->norm = norm;
    report->error = norm > 0.0 ? lost / norm : 0.0;
}

static plora_status begin(plora_ledger *ledger, const char *path, const plora_export_options *options,
                          const plora_export_report *report, struct export *e, plora_export_report *result)
{
    PLORA_CHECK(ledger != NULL && path != NULL, PLORA_ERROR_INVALID_ARGUMENT, "%s is NULL",
                ledger == NULL ? "ledger" : "path");
    PLORA_CHECK(path[0] != '\0', PLORA_ERROR_INVALID_ARGUMENT, "path is empty");
    *e = (struct export){.ledger = ledger,
                         .adapters = ledger->adapters,
                         .context = ledger->adapters->model->context,
                         .options = PLORA_EXPORT_OPTIONS_INIT};
    *result = (plora_export_report)PLORA_EXPORT_REPORT_INIT;
    PLORA_TRY(plora__read_options(&e->options, sizeof e->options, options, "plora_export_options"));
    PLORA_TRY(plora__read_options(result, sizeof *result, report, "plora_export_report"));
    PLORA_CHECK(result->layer_capacity >= 0 && (result->layer_capacity == 0 || result->layers != NULL),
                PLORA_ERROR_INVALID_ARGUMENT, "layer_capacity is %lld, layers is %s", (long long)result->layer_capacity,
                result->layers == NULL ? "NULL" : "not NULL");
    return check_options(ledger, &e->options);
}

static plora_status end(struct export *e, plora_status status, plora_export_report *result, plora_export_report *report)
{
    if (status == PLORA_OK) fill_report(e, result);
    release(e);
    if (status != PLORA_OK || report == NULL) return status;
    return plora__write_result(report, result, sizeof *result, "plora_export_report");
}

/* Formats know no rank 0. */
static void raise_ranks(struct export *e)
{
    for (int32_t i = 0; i < e->adapters->adapter_count; ++i)
        e->layers[i].rank = e->layers[i].rank > 0 ? e->layers[i].rank : 1;
}

plora_status plora_ledger_export(plora_ledger *ledger, const char *path, const plora_export_options *options,
                                 plora_export_report *report)
{
    struct export e;
    plora_export_report result;
    PLORA_TRY(begin(ledger, path, options, report, &e, &result));
    const int64_t position = plora_ledger_position(ledger), length = plora_ledger_length(ledger);
    e.records = e.options.records >= 0 ? e.options.records : position >= 0 ? position : length;
    plora_status status;
    PLORA_TRY_OUT(gather(&e));
    if (e.options.rank > 0 || e.options.max_error > 0.0) PLORA_TRY_OUT(truncate_layers(&e));
    raise_ranks(&e);
    status = e.options.format == PLORA_EXPORT_GGUF ? write_gguf(&e, path) : write_peft(&e, path);
out:
    return end(&e, status, &result, report);
}

/* ---------------------------------------------------------------------------------------------------------- compaction */

/* A record's head and entries as they are, sealed anew behind what is in the store already. */
static plora_status copy_record(const struct export *e, int64_t index, struct plora__ledger_store *to)
{
    const struct plora__ledger_record *record;
    const struct plora__ledger_mark *mark;
    PLORA_TRY(plora__ledger_record_check(&e->ledger->store, index));
    PLORA_TRY(plora__ledger_record_get(&e->ledger->store, index, &record, &mark));
    const size_t table = plora__ledger_table_bytes(record->layer_count);
    const float *factors = (const float *)((const char *)record + table);
    void *copy;
    PLORA_TRY(plora__allocate(e->context, table, &copy));
    memcpy(copy, record, table);
    plora__ledger_record_seal(to, copy, factors, NULL);
    plora_status status = plora__ledger_append_record(to, copy, factors);
    if (status == PLORA_OK)
        status = plora__ledger_write_mark(to, mark != NULL ? mark->flags : 0, mark != NULL ? mark->weights_hash : 0);
    plora__free(e->context, copy, table);
    return status;
}

/* Head and entries of the folded record; head->bytes is that of the whole record. */
static plora_status describe_fold(const struct export *e, struct plora__ledger_record *head)
{
    const struct plora__ledger_record *first, *last;
    struct plora__ledger_entry *entries = (struct plora__ledger_entry *)(head + 1);
    PLORA_TRY(plora__ledger_record_get(&e->ledger->store, e->first, &first, NULL));
    PLORA_TRY(plora__ledger_record_get(&e->ledger->store, e->first + e->records - 1, &last, NULL));
    head->stage = last->stage;
    head->momentum = 1.0;
    head->seed = last->seed;
    head->rounding = last->rounding;
    head->flags = PLORA__LEDGER_FOLDED | (first->flags & PLORA__LEDGER_HASHED);
    head->layer_count = last->layer_count;
    for (int64_t i = 0; i < e->records; ++i) {
        const struct plora__ledger_record *record;
        PLORA_TRY(plora__ledger_record_get(&e->ledger->store, e->first + i, &record, NULL));
        const int folded = (record->flags & PLORA__LEDGER_FOLDED) != 0;
        head->folded += folded ? record->folded : 1;
        head->fold_lost += folded ? record->fold_lost : 0.0;
    }
    double lost = 0.0;
    for (int32_t i = 0; i < e->adapters->adapter_count; ++i) {
        entries[i].scale = 1.0;
        entries[i].rank = (int32_t)e->layers[i].rank;
        entries[i].weight_hash = plora__ledger_entries(first)[i].weight_hash;
        head->fold_norm = hypot(head->fold_norm, e->layers[i].norm);
        lost = hypot(lost, e->layers[i].lost);
    }
    head->fold_lost += lost;
    head->bytes = plora__ledger_factor_offset(e->ledger->store.header, head, head->layer_count, 0);
    return PLORA_OK;
}

static plora_status append_fold(const struct export *e, struct plora__ledger_store *to)
{
    const uint32_t count = (uint32_t)e->adapters->adapter_count;
    const size_t table = plora__ledger_table_bytes(count);
    const struct plora__ledger_record *last;
    const struct plora__ledger_mark *mark;
    void *memory, *factors = NULL;
    size_t bytes = 0;
    plora_status status;
    PLORA_TRY(plora__allocate_zeroed(e->context, table, &memory));
    struct plora__ledger_record *head = memory;
    PLORA_TRY_OUT(describe_fold(e, head));
    bytes = head->bytes - table;
    PLORA_TRY_OUT(plora__allocate_zeroed(e->context, bytes, &factors));
    for (uint32_t i = 0; i < count; ++i) {
        const struct plora__factors *product = &e->layers[i].product;
        char *a = (char *)factors + plora__ledger_factor_offset(to->header, head, i, 0) - table;
        char *b = (char *)factors + plora__ledger_factor_offset(to->header, head, i, 1) - table;
        if (product->rank == 0) continue; /* zeros of rank 1 */
        memcpy(a, product->a, (size_t)(product->rank * e->layers[i].in_features) * sizeof(float));
        memcpy(b, product->b, (size_t)(product->rank * e->layers[i].out_features) * sizeof(float));
    }
    plora__ledger_record_seal(to, head, factors, NULL);
    PLORA_TRY_OUT(plora__ledger_append_record(to, head, factors));
    PLORA_TRY_OUT(plora__ledger_record_get(&e->ledger->store, e->first + e->records - 1, &last, &mark));
    status = plora__ledger_write_mark(to, mark != NULL ? mark->flags : 0, mark != NULL ? mark->weights_hash : 0);
out:
    plora__free(e->context, factors, bytes);
    plora__free(e->context, memory, table);
    return status;
}

static plora_status write_ledger(const struct export *e, struct plora__ledger_store *to)
{
    const int64_t length = plora_ledger_length(e->ledger);
    for (int64_t i = 0; i < e->first; ++i)
        PLORA_TRY(copy_record(e, i, to));
    PLORA_TRY(append_fold(e, to));
    for (int64_t i = e->first + e->records; i < length; ++i)
        PLORA_TRY(copy_record(e, i, to));
    if (e->ledger->position != length) return PLORA_OK;
    PLORA_TRY(e->context->backend->synchronize(e->context->device, NULL));
    PLORA_TRY(plora__ledger_hash_weights(e->ledger));
    return plora__ledger_write_mark(to, PLORA__LEDGER_HASHED, plora__ledger_combined_hash(e->ledger));
}

static plora_status check_target(const struct export *e, const char *path)
{
    struct stat own, target;
    const int descriptor = e->ledger->store.descriptor;
    const int same = descriptor >= 0 && stat(path, &target) == 0 && fstat(descriptor, &own) == 0 &&
                     own.st_dev == target.st_dev && own.st_ino == target.st_ino;
    PLORA_CHECK(!same, PLORA_ERROR_INVALID_ARGUMENT, "'%.600s' is the ledger's own file", path);
    return PLORA_OK;
}

/* As a file beside the target, which it becomes when it is complete. */
static plora_status replace(const struct export *e, const char *path)
{
    struct plora__ledger_store to;
    const size_t bytes = strlen(path) + sizeof ".compact";
    void *memory;
    PLORA_TRY(check_target(e, path));
    PLORA_TRY(plora__allocate(e->context, bytes, &memory));
    char *temporary = memory;
    snprintf(temporary, bytes, "%s.compact", path);
    unlink(temporary); /* of a process that was killed */
    plora_status status = plora__ledger_store_open(e->context, temporary, 0, e->ledger->store.header, &to);
    if (status == PLORA_OK) {
        status = write_ledger(e, &to);
        if (status == PLORA_OK && (fsync(to.descriptor) != 0 || rename(temporary, path) != 0)) {
            const int error = errno;
            char reason[128] = "unknown error";
            status = plora__fail(PLORA_ERROR_IO, "cannot write '%.600s': %s", path,
                                 strerror_r(error, reason, sizeof reason));
        }
        plora__ledger_store_close(&to);
    }
    if (status != PLORA_OK) unlink(temporary);
    plora__free(e->context, memory, bytes);
    return status;
}

plora_status plora_ledger_compact(plora_ledger *ledger, const char *path, int64_t first, int64_t count,
                                  const plora_export_options *options, plora_export_report *report)
{
    const plora_export_options defaults = PLORA_EXPORT_OPTIONS_INIT;
    struct export e;
    plora_export_report result;
    PLORA_TRY(begin(ledger, path, options, report, &e, &result));
    PLORA_CHECK(e.options.format == defaults.format && e.options.live == defaults.live &&
                    e.options.records == defaults.records && e.options.heads == 0 && e.options.kv_heads == 0,
                PLORA_ERROR_INVALID_ARGUMENT, "of the options only rank and max_error belong to a compaction");
    const int64_t length = plora_ledger_length(ledger);
    PLORA_CHECK(first >= 0 && count >= 1 && count <= length - first, PLORA_ERROR_INVALID_ARGUMENT,
                "%lld records from %lld on: the ledger has %lld", (long long)count, (long long)first,
                (long long)length);
    e.options.live = 0;
    e.first = first;
    e.records = count;
    plora_status status;
    PLORA_TRY_OUT(gather(&e));
    PLORA_TRY_OUT(truncate_layers(&e));
    raise_ranks(&e);
    status = replace(&e, path);
out:
    return end(&e, status, &result, report);
}
