/* quantised.c: quantised weights as the caller describes them: checks, sizes, whole weights quantised and dequantised, and layers.
 *
 *     plora_quantise   values -> offset -> codes            plora_model_add_quantised   values -> master -> codes
 *
 * Numbers become codes in runs.c, masters are master.c's, what an unload does with both requantise.c's. */
#include <math.h>
#include <string.h>

#include "dtype.h"
#include "handles.h"

/* -------------------------------------------------------------------------------------------------------------- checks */

/* Shape and format alone. */
static plora_status check_shape(const plora_quantised *weight, const char *name, int nested)
{
    PLORA_CHECK(weight->format == PLORA_QUANTISED_INT8 || weight->format == PLORA_QUANTISED_NF4,
                PLORA_ERROR_INVALID_ARGUMENT, "%s: format %d is unknown", name, weight->format);
    PLORA_CHECK(weight->rows > 0 && weight->columns > 0, PLORA_ERROR_SHAPE, "%s: [%lld,%lld]: both must be > 0", name,
                (long long)weight->rows, (long long)weight->columns);
    PLORA_CHECK(weight->rows <= PTRDIFF_MAX / 8 / weight->columns, PLORA_ERROR_SHAPE,
                "%s: [%lld,%lld] exceeds the address space", name, (long long)weight->rows, (long long)weight->columns);
    const int nf4 = weight->format == PLORA_QUANTISED_NF4;
    PLORA_CHECK(weight->group >= 0 && (!nf4 || weight->group == 0), PLORA_ERROR_INVALID_ARGUMENT,
                "%s: group is %lld: must be %s", name, (long long)weight->group,
                nf4 ? "0 in NF4, whose blocks have 64 elements" : ">= 0");
    PLORA_CHECK(nf4 || !nested, PLORA_ERROR_INVALID_ARGUMENT, "%s: only NF4 has nested codes", name);
    return PLORA_OK;
}

static int64_t group_of(const plora_quantised *weight)
{
    if (weight->format == PLORA_QUANTISED_NF4) return PLORA__NF4_BLOCK;
    return weight->group == 0 || weight->group > weight->columns ? weight->columns : weight->group;
}

static plora_status check_arrays(const plora_quantised *weight, const char *name)
{
    PLORA_TRY(check_shape(weight, name, weight->nested_codes != NULL));
    PLORA_CHECK(weight->codes != NULL && weight->scales != NULL, PLORA_ERROR_INVALID_ARGUMENT, "%s: %s is NULL", name,
                weight->codes == NULL ? "codes" : "scales");
    PLORA_CHECK((uintptr_t)weight->scales % sizeof(float) == 0 && (uintptr_t)weight->map % sizeof(float) == 0,
                PLORA_ERROR_INVALID_ARGUMENT, "%s: scales at %p or map at %p is not aligned for F32", name,
                (const void *)weight->scales, (const void *)weight->map);
    PLORA_CHECK((weight->nested_codes == NULL) == (weight->map == NULL), PLORA_ERROR_INVALID_ARGUMENT,
                "%s: nested_codes and map must be given together", name);
    PLORA_CHECK(isfinite(weight->offset), PLORA_ERROR_INVALID_ARGUMENT, "%s: offset is %g: must be finite", name,
                (double)weight->offset);
    return PLORA_OK;
}

static plora_status check_matrix(const plora_matrix *matrix, const plora_quantised *weight, const char *name,
                                 const char *what)
{
    PLORA_CHECK(matrix->reserved == 0 && plora__dtype_known(matrix->dtype), PLORA_ERROR_INVALID_ARGUMENT,
                "%s: %s: dtype %d is unknown, or reserved is not 0", name, what, matrix->dtype);
    PLORA_CHECK(matrix->rows == weight->rows && matrix->columns == weight->columns, PLORA_ERROR_SHAPE,
                "%s: %s is [%lld,%lld]: must be [%lld,%lld]", name, what, (long long)matrix->rows,
                (long long)matrix->columns, (long long)weight->rows, (long long)weight->columns);
    PLORA_CHECK(matrix->stride >= matrix->columns && matrix->rows <= PTRDIFF_MAX / 4 / matrix->stride,
                PLORA_ERROR_SHAPE, "%s: %s has %lld rows with stride %lld: must be >= %lld, in the address space", name,
                what, (long long)matrix->rows, (long long)matrix->stride, (long long)matrix->columns);
    PLORA_CHECK(matrix->data != NULL && (uintptr_t)matrix->data % plora__dtype_size(matrix->dtype) == 0,
                PLORA_ERROR_INVALID_ARGUMENT, "%s: %s at %p is NULL or not aligned for %s", name, what, matrix->data,
                plora__dtype_name(matrix->dtype));
    return PLORA_OK;
}

/* As the backend sees it. */
static struct plora__quantised values_of(const plora_quantised *weight)
{
    return (struct plora__quantised){.format = weight->format,
                                     .offset = weight->nested_codes != NULL ? weight->offset : 0.0f,
                                     .rows = weight->rows,
                                     .columns = weight->columns,
                                     .group = group_of(weight),
                                     .codes = weight->codes,
                                     .scales = weight->scales,
                                     .nested_codes = weight->nested_codes,
                                     .map = weight->map};
}

/* The same with the map, which is device memory, brought to the host. */
static plora_status describe(const plora_context *context, const plora_quantised *weight, const char *name,
                             struct plora__quantised_weight *result)
{
    result->values = values_of(weight);
    if (weight->map == NULL) return PLORA_OK;
    PLORA_TRY(plora__read_device(context, result->map, weight->map, sizeof result->map, NULL));
    for (int i = 0; i < 256; ++i)
        PLORA_CHECK(isfinite(result->map[i]) && (i == 0 || result->map[i - 1] <= result->map[i]),
                    PLORA_ERROR_INVALID_ARGUMENT, "%s: map[%d] is %g: the map must rise", name, i,
                    (double)result->map[i]);
    return PLORA_OK;
}

plora_status plora_quantised_size(const plora_quantised *weight, int32_t nested, size_t *codes, size_t *scales,
                                  size_t *nested_codes)
{
    PLORA_CHECK(weight != NULL, PLORA_ERROR_INVALID_ARGUMENT, "weight is NULL");
    PLORA_CHECK(nested == 0 || nested == 1, PLORA_ERROR_INVALID_ARGUMENT, "nested is %d: must be 0 or 1", nested);
    PLORA_TRY(check_shape(weight, "weight", nested));
    const size_t elements = (size_t)(weight->rows * weight->columns);
    const size_t blocks = (elements + PLORA__NF4_BLOCK - 1) / PLORA__NF4_BLOCK;
    const int64_t group = group_of(weight);
    const int int8 = weight->format == PLORA_QUANTISED_INT8;
    const size_t count = int8     ? (size_t)(weight->rows * ((weight->columns + group - 1) / group))
                         : nested ? (blocks + PLORA__NF4_NESTED_BLOCK - 1) / PLORA__NF4_NESTED_BLOCK
                                  : blocks;
    if (codes != NULL) *codes = int8 ? elements : (elements + 1) / 2;
    if (scales != NULL) *scales = count * sizeof(float);
    if (nested_codes != NULL) *nested_codes = nested ? blocks : 0;
    return PLORA_OK;
}

/* For each power of ten from -6 to 0 the middles of 1, 2, 4 .. 64 equal parts of [0.1, 1], in both signs; 0 and 1. Rounded where
 * bitsandbytes rounds. */
plora_status plora_quantised_map(float *map)
{
    static const float powers[] = {1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1.0f};
    PLORA_CHECK(map != NULL, PLORA_ERROR_INVALID_ARGUMENT, "map is NULL");
    int count = 127;
    map[count++] = 0.0f;
    for (int power = 0; power < 7; ++power) {
        const int parts = 1 << power;
        const double step = (1.0f - 0.1f) / (float)parts;
        for (int part = 0; part < parts; ++part) {
            float edges[2];
            for (int i = 0; i < 2; ++i) { /* counted from the nearer end */
                const int edge = part + i;
                edges[i] = (float)(edge < (parts + 1) / 2 ? (double)0.1f + step * edge : 1.0 - step * (parts - edge));
            }
            const float value = powers[power] * ((edges[0] + edges[1]) / 2.0f);
            map[254 - count] = -value;
            map[count++] = value;
        }
    }
    map[count] = 1.0f;
    return PLORA_OK;
}

/* ------------------------------------------------------------------------------------------------------ whole weights */

/* Everything that a quantisation of values from anywhere takes. */
struct quantisation {
    plora_context *context;
    void *host_device;
    const plora_matrix *values;
    struct plora__quantised_weight weight;
    struct plora__run_memory memory;
    void *stream;
};

/* The rows of a run's elements: where they lie, or copied from a device. *first becomes the run's first element there. */
static plora_status fetch_rows(const struct quantisation *q, struct plora__run run, plora_matrix *rows, int64_t *first)
{
    const plora_context *context = q->context;
    const plora_matrix *values = q->values;
    const int64_t begin = run.first / values->columns, end = (run.first + run.count - 1) / values->columns + 1;
    const size_t size = plora__dtype_size(values->dtype);
    *rows = *values;
    *first = run.first;
    if (context->options.backend == PLORA_BACKEND_CPU) return PLORA_OK;
    *rows = (plora_matrix){q->memory.delta, end - begin, values->columns, values->columns, values->dtype, 0};
    *first = run.first - begin * values->columns;
    for (int64_t i = begin; i < end; ++i)
        PLORA_TRY(context->backend->copy(context->device,
                                         (char *)rows->data + (size_t)((i - begin) * values->columns) * size,
                                         (const char *)values->data + (size_t)(i * values->stride) * size,
                                         (size_t)values->columns * size, q->stream));
    return context->backend->synchronize(context->device, q->stream);
}

/* Checks that the run is finite, and adds what its blocks' largest sizes sum up to. */
static plora_status look_at_run(const struct quantisation *q, struct plora__run run, double *sum)
{
    plora_matrix rows;
    int64_t first;
    PLORA_TRY(fetch_rows(q, run, &rows, &first));
    float largest = 0.0f;
    for (int64_t i = 0; i < run.count; ++i) {
        const int64_t element = first + i, row = element / rows.columns, column = element % rows.columns;
        const float value = plora__load(rows.data, row * rows.stride + column, rows.dtype);
        PLORA_CHECK(isfinite(value), PLORA_ERROR_NON_FINITE, "value (%lld,%lld) is %g: must be finite",
                    (long long)((run.first + i) / rows.columns), (long long)column, (double)value);
        largest = fmaxf(largest, fabsf(value));
        if (i % PLORA__NF4_BLOCK != PLORA__NF4_BLOCK - 1 && i + 1 < run.count) continue;
        *sum += (double)largest;
        largest = 0.0f;
    }
    return PLORA_OK;
}

static plora_status quantise_all(struct quantisation *q, int keep_offset)
{
    const struct plora__quantised *weight = &q->weight.values;
    double sum = 0.0;
    struct plora__run run = plora__run_next(weight, 0);
    for (; run.count > 0; run = plora__run_next(weight, run.first + run.count))
        PLORA_TRY(look_at_run(q, run, &sum));
    const int64_t blocks = (weight->rows * weight->columns + PLORA__NF4_BLOCK - 1) / PLORA__NF4_BLOCK;
    if (weight->nested_codes != NULL && !keep_offset) q->weight.values.offset = (float)(sum / (double)blocks);
    for (run = plora__run_next(weight, 0); run.count > 0; run = plora__run_next(weight, run.first + run.count)) {
        plora_matrix rows;
        int64_t first;
        PLORA_TRY(fetch_rows(q, run, &rows, &first));
        PLORA_TRY(plora__run_make(q->host_device, &q->weight, run, &rows, first, &q->memory, NULL));
        PLORA_TRY(plora__run_write(q->context, weight, run, &q->memory, q->stream));
    }
    return PLORA_OK;
}

plora_status plora_quantise(plora_context *context, const plora_matrix *values, plora_quantised *weight, uint32_t flags,
                            void *stream)
{
    PLORA_CHECK(context != NULL && values != NULL && weight != NULL, PLORA_ERROR_INVALID_ARGUMENT, "%s is NULL",
                context == NULL  ? "context"
                : values == NULL ? "values"
                                 : "weight");
    PLORA_CHECK((flags & ~(uint32_t)PLORA_QUANTISE_KEEP_OFFSET) == 0, PLORA_ERROR_INVALID_ARGUMENT,
                "unknown flags 0x%x", (unsigned)flags);
    PLORA_TRY(check_arrays(weight, "weight"));
    PLORA_TRY(check_matrix(values, weight, "weight", "values"));
    PLORA_TRY(plora__check_stream(context, stream, 1));
    struct quantisation q = {.context = context, .values = values, .stream = stream};
    PLORA_TRY(describe(context, weight, "weight", &q.weight));
    PLORA_TRY(plora__host_device_open(context, &q.host_device));
    plora__run_memory_need(&q.weight.values, 0, context->options.backend != PLORA_BACKEND_CPU, &q.memory);
    plora_status status = plora__run_memory_make(context, &q.memory);
    if (status == PLORA_OK) status = quantise_all(&q, (flags & PLORA_QUANTISE_KEEP_OFFSET) != 0);
    plora__run_memory_free(context, &q.memory);
    plora__host_device_close(context, q.host_device);
    if (status == PLORA_OK) weight->offset = q.weight.values.offset;
    return status;
}

plora_status plora_dequantise(plora_context *context, const plora_quantised *weight, const plora_matrix *out,
                              void *stream)
{
    PLORA_CHECK(context != NULL && weight != NULL && out != NULL, PLORA_ERROR_INVALID_ARGUMENT, "%s is NULL",
                context == NULL  ? "context"
                : weight == NULL ? "weight"
                                 : "out");
    PLORA_TRY(check_arrays(weight, "weight"));
    PLORA_TRY(check_matrix(out, weight, "weight", "out"));
    PLORA_CHECK(out->dtype != PLORA_F16, PLORA_ERROR_UNSUPPORTED, "out is of dtype F16: must be F32 or BF16");
    PLORA_TRY(plora__check_stream(context, stream, 0));
    const struct plora__dequantise_args args = {.weight = values_of(weight), .out = *out};
    return context->backend->dequantise(context->device, &args, stream);
}

/* -------------------------------------------------------------------------------------------------------------- layers */

static plora_status check_master(const plora_quantised_linear *linear, const char *name)
{
    const plora_matrix *values = &linear->values;
    PLORA_CHECK(linear->master >= PLORA_MASTER_NONE && linear->master <= PLORA_MASTER_FILE,
                PLORA_ERROR_INVALID_ARGUMENT, "%s: master %d is unknown", name, linear->master);
    PLORA_CHECK((linear->directory != NULL) == (linear->master == PLORA_MASTER_FILE), PLORA_ERROR_INVALID_ARGUMENT,
                "%s: directory is %s, master is %d: PLORA_MASTER_FILE takes one, no other does", name,
                linear->directory == NULL ? "NULL" : "given", linear->master);
    PLORA_CHECK(linear->master != PLORA_MASTER_NONE || values->data == NULL, PLORA_ERROR_INVALID_ARGUMENT,
                "%s: values are given, but no master", name);
    PLORA_CHECK(linear->master != PLORA_MASTER_HOST || values->data != NULL, PLORA_ERROR_INVALID_ARGUMENT,
                "%s: values.data is NULL: PLORA_MASTER_HOST is the values", name);
    if (values->data == NULL) return PLORA_OK;
    PLORA_TRY(check_matrix(values, &linear->weight, name, "values"));
    PLORA_CHECK(linear->master != PLORA_MASTER_HOST || values->dtype == PLORA_F32, PLORA_ERROR_UNSUPPORTED,
                "%s: values are %s: a master is F32; PLORA_MASTER_MEMORY or _FILE make one from these", name,
                plora__dtype_name(values->dtype));
    return PLORA_OK;
}

static size_t code_bytes(const struct plora__quantised *weight)
{
    const size_t elements = (size_t)(weight->rows * weight->columns);
    return weight->format == PLORA__QUANTISED_INT8 ? elements : (elements + 1) / 2;
}

/* The number of the weight with these codes, or -1. */
static plora_status find_tied(const plora_model *model, const plora_quantised_linear *linear,
                              const struct plora__quantised *values, const plora_shard *shard, int32_t *weight)
{
    const uintptr_t begin = (uintptr_t)values->codes, end = begin + code_bytes(values);
    const int32_t fan_in_fan_out = (linear->flags & PLORA_LAYER_FAN_IN_FAN_OUT) != 0;
    *weight = -1;
    for (int32_t i = 0; i < model->weight_count; ++i) {
        const struct plora__weight *other = &model->weights[i];
        if (other->quantised == NULL) continue;
        const struct plora__quantised *there = &other->quantised->values;
        const uintptr_t other_begin = (uintptr_t)there->codes;
        if (end <= other_begin || other_begin + code_bytes(there) <= begin) continue;
        const char *other_name = model->layers[other->first_layer].name;
        const int same = there->codes == values->codes && there->scales == values->scales &&
                         there->nested_codes == values->nested_codes && there->map == values->map &&
                         there->format == values->format && there->rows == values->rows &&
                         there->columns == values->columns && there->group == values->group &&
                         there->offset == values->offset && other->fan_in_fan_out == fan_in_fan_out;
        PLORA_CHECK(same, PLORA_ERROR_INVALID_ARGUMENT,
                    "layer '%s': its codes at %p overlap those of layer '%s' at %p, but not all else is the same",
                    linear->name, values->codes, other_name, there->codes);
        PLORA_CHECK(linear->master == PLORA_MASTER_NONE, PLORA_ERROR_INVALID_ARGUMENT,
                    "layer '%s': its codes are those of layer '%s', whose master counts: add it with "
                    "PLORA_MASTER_NONE",
                    linear->name, other_name);
        PLORA_TRY(plora__shard_same(model, i, linear->name, shard, 0));
        *weight = i;
    }
    return PLORA_OK;
}

void plora__quantised_free(plora_context *context, struct plora__weight *weight)
{
    if (weight->quantised == NULL) return;
    plora__master_free(context, weight);
    plora__free(context, weight->quantised, sizeof *weight->quantised);
    weight->quantised = NULL;
}

/* The new weight with its master, from which its codes are made last: nothing of the host's is written before all is there. */
static plora_status make_weight(plora_model *model, const plora_quantised_linear *linear,
                                const struct plora__quantised_weight *described, struct plora__weight *weight)
{
    plora_context *context = model->context;
    struct plora__run_memory memory = {0};
    void *allocated;
    plora_status status;
    PLORA_TRY(plora__allocate(context, sizeof *described, &allocated));
    weight->quantised = allocated;
    *weight->quantised = *described;
    PLORA_TRY_OUT(plora__master_make(model, linear, weight));
    if (weight->matrix.data == NULL) return PLORA_OK;
    plora__run_memory_need(&described->values, 0, 0, &memory);
    PLORA_TRY_OUT(plora__run_memory_make(context, &memory));
    status = plora__requantise(model, weight, &memory, NULL);
    plora__run_memory_free(context, &memory);
out:
    if (status != PLORA_OK) plora__quantised_free(context, weight);
    return status;
}

plora_status plora_model_add_quantised(plora_model *model, const plora_quantised_linear *given, int32_t *layer)
{
    PLORA_CHECK(model != NULL && given != NULL, PLORA_ERROR_INVALID_ARGUMENT, "%s is NULL",
                model == NULL ? "model" : "linear");
    plora_context *context = model->context;
    plora_quantised_linear linear = PLORA_QUANTISED_LINEAR_INIT;
    PLORA_TRY(plora__read_options(&linear, sizeof linear, given, "plora_quantised_linear"));
    PLORA_TRY(plora__model_check_layer(model, linear.name, linear.flags, linear.bias, linear.bias_dtype));
    PLORA_CHECK(linear.reserved == 0, PLORA_ERROR_INVALID_ARGUMENT, "layer '%s': reserved is not 0", linear.name);
    PLORA_CHECK((linear.flags & PLORA_LAYER_GATHERED) == 0, PLORA_ERROR_UNSUPPORTED,
                "layer '%s': PLORA_LAYER_GATHERED is not for quantised weights", linear.name);
    PLORA_TRY(check_arrays(&linear.weight, linear.name));
    PLORA_TRY(check_master(&linear, linear.name));
    struct plora__quantised_weight described = {.master = PLORA_MASTER_NONE};
    PLORA_TRY(describe(context, &linear.weight, linear.name, &described));
    const plora_quantised *w = &linear.weight;
    struct plora__weight weight = {.matrix = {NULL, w->rows, w->columns, w->columns, PLORA_F32, 0},
                                   .fan_in_fan_out = (linear.flags & PLORA_LAYER_FAN_IN_FAN_OUT) != 0,
                                   .first_layer = model->layer_count};
    PLORA_TRY(plora__shard_place(&linear.shard, &weight.matrix, weight.fan_in_fan_out, linear.name, &weight.shard));
    int32_t tied;
    PLORA_TRY(find_tied(model, &linear, &described.values, &weight.shard, &tied));
    if (model->host_device == NULL) PLORA_TRY(plora__host_device_open(context, &model->host_device));

    char *name;
    PLORA_TRY(plora__model_reserve(model, linear.name, &name));
    const plora_status status = tied < 0 ? make_weight(model, &linear, &described, &weight) : PLORA_OK;
    if (status != PLORA_OK) {
        plora__free_string(context, name);
        return status;
    }
    if (layer != NULL) *layer = model->layer_count;
    plora__model_append(model,
                        (struct plora__layer){.name = name,
                                              .weight = tied < 0 ? model->weight_count : tied,
                                              .flags = linear.flags,
                                              .bias = linear.bias,
                                              .bias_dtype = linear.bias_dtype},
                        &weight);
    return PLORA_OK;
}

plora_status plora_model_quantised(const plora_model *model, int32_t layer, plora_quantised_linear *linear)
{
    PLORA_CHECK(model != NULL, PLORA_ERROR_INVALID_ARGUMENT, "model is NULL");
    PLORA_CHECK(layer >= 0 && layer < model->layer_count, PLORA_ERROR_INVALID_ARGUMENT,
                "layer %d: the model has layers 0 .. %d", layer, model->layer_count - 1);
    const struct plora__layer *found = &model->layers[layer];
    const struct plora__weight *weight = &model->weights[found->weight];
    PLORA_CHECK(weight->quantised != NULL, PLORA_ERROR_NOT_FOUND, "layer '%s' is not quantised", found->name);
    const struct plora__quantised *values = &weight->quantised->values;
    plora_quantised_linear result = PLORA_QUANTISED_LINEAR_INIT;
    result.name = found->name;
    result.bias = found->bias;
    result.bias_dtype = found->bias_dtype;
    result.flags = found->flags;
    result.master = weight->quantised->master;
    result.values = weight->matrix;
    result.shard = plora__shard_given(weight);
    result.weight = (plora_quantised){.codes = (void *)(uintptr_t)values->codes,
                                      .scales = (float *)(uintptr_t)values->scales,
                                      .nested_codes = (uint8_t *)(uintptr_t)values->nested_codes,
                                      .map = values->map,
                                      .rows = values->rows,
                                      .columns = values->columns,
                                      .group = values->format == PLORA__QUANTISED_NF4 ? 0 : values->group,
                                      .format = values->format,
                                      .offset = values->offset};
    return plora__write_result(linear, &result, sizeof result, "plora_quantised_linear");
}

plora_status plora_model_requantise(plora_model *model, void *stream)
{
    PLORA_CHECK(model != NULL, PLORA_ERROR_INVALID_ARGUMENT, "model is NULL");
    PLORA_TRY(plora__check_stream(model->context, stream, 1));
    struct plora__run_memory memory = {0};
    for (int32_t i = 0; i < model->weight_count; ++i)
        if (model->weights[i].quantised != NULL)
            plora__run_memory_need(&model->weights[i].quantised->values, 0, 0, &memory);
    PLORA_TRY(plora__run_memory_make(model->context, &memory));
    plora_status status = PLORA_OK;
    for (int32_t i = 0; i < model->weight_count && status == PLORA_OK; ++i)
        status = plora__requantise(model, &model->weights[i], &memory, stream);
    plora__run_memory_free(model->context, &memory);
    return status;
}
