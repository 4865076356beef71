/* residual.c: the low halves of 16-bit weights (rounding.h), and the merges that use them.
 *
 *     weight [rows, columns] 16 bits  +  residual [rows, columns] 16 bits, rows residual_stride apart  =  fp32 values
 *
 * A residual belongs to its weight, so that all sets of adapters on a model add to one value. It is made with the first set that asks
 * for it, as zeros: the weight is the value. One in host memory passes through a buffer of its set on the device. */
#include <string.h>

#include "dtype.h"
#include "handles.h"

/* Rows begin at multiples of 128 bytes, an odd number of them apart: so tiles do not share the cache sets of the weight's rows. */
static int64_t stride_for(int64_t columns)
{
    return ((columns + 63) / 64 | 1) * 64;
}

static int is_wide(const struct plora__weight *weight)
{
    return weight->matrix.dtype == PLORA_F32;
}

static struct plora__weight *weight_of(const plora_adapters *adapters, int32_t number)
{
    return &adapters->model->weights[adapters->adapters[number].weight];
}

size_t plora__residual_bytes(const struct plora__weight *weight)
{
    return (size_t)(weight->matrix.rows * weight->residual_stride) * sizeof(uint16_t);
}

plora_matrix plora__residual_matrix(const struct plora__weight *weight)
{
    const plora_matrix *matrix = &weight->matrix;
    return (plora_matrix){weight->residual, matrix->rows, matrix->columns, weight->residual_stride, PLORA_BF16, 0};
}

static void release(plora_context *context, struct plora__weight *weight)
{
    if (weight->residual_on_host)
        plora__free(context, weight->residual, plora__residual_bytes(weight));
    else
        plora__device_free(context, weight->residual, plora__residual_bytes(weight));
    weight->residual = NULL;
}

static plora_status clear(plora_context *context, const struct plora__weight *weight, void *stream)
{
    if (!weight->residual_on_host)
        return context->backend->clear(context->device, weight->residual, plora__residual_bytes(weight), stream);
    memset(weight->residual, 0, plora__residual_bytes(weight));
    return PLORA_OK;
}

static plora_status make(plora_context *context, struct plora__weight *weight, int on_host)
{
    void *memory;
    weight->residual_stride = stride_for(weight->matrix.columns);
    weight->residual_on_host = on_host && context->options.backend != PLORA_BACKEND_CPU;
    PLORA_TRY(weight->residual_on_host ? plora__allocate(context, plora__residual_bytes(weight), &memory)
                                       : plora__device_allocate(context, plora__residual_bytes(weight), &memory));
    weight->residual = memory;
    return clear(context, weight, NULL);
}

/* Room for the largest residual that is kept on the host, whichever set made it. */
static plora_status make_staging(plora_adapters *adapters)
{
    size_t most = 0;
    for (int32_t i = 0; i < adapters->adapter_count; ++i) {
        const struct plora__weight *weight = weight_of(adapters, i);
        if (weight->residual == NULL || !weight->residual_on_host) continue;
        if (plora__residual_bytes(weight) > most) most = plora__residual_bytes(weight);
    }
    void *memory;
    PLORA_TRY(plora__device_allocate(adapters->model->context, most, &memory));
    adapters->residual_staging = memory;
    adapters->residual_staging_bytes = most;
    return PLORA_OK;
}

plora_status plora__residuals_keep(plora_adapters *adapters)
{
    plora_context *context = adapters->model->context;
    const int32_t residual = adapters->options.residual;
    const int wanted = residual == PLORA_RESIDUAL_DEVICE || residual == PLORA_RESIDUAL_HOST;
    plora_status status = PLORA_OK;
    for (int32_t i = 0; wanted && i < adapters->adapter_count && status == PLORA_OK; ++i) {
        struct plora__weight *weight = weight_of(adapters, i);
        if (is_wide(weight) || weight->residual != NULL) continue;
        weight->residual_is_new = 1;
        status = make(context, weight, residual == PLORA_RESIDUAL_HOST);
    }
    if (status == PLORA_OK) status = make_staging(adapters);
    for (int32_t i = 0; i < adapters->adapter_count; ++i) { /* all or none */
        struct plora__weight *weight = weight_of(adapters, i);
        if (status != PLORA_OK && weight->residual_is_new && weight->residual != NULL) release(context, weight);
        weight->residual_is_new = 0;
    }
    return status;
}

void plora__residuals_free(plora_model *model)
{
    for (int32_t i = 0; i < model->weight_count; ++i)
        if (model->weights[i].residual != NULL) release(model->context, &model->weights[i]);
}

plora_status plora__residual_clear(const plora_adapters *adapters, int32_t number, void *stream)
{
    const struct plora__weight *weight = weight_of(adapters, number);
    return weight->residual == NULL ? PLORA_OK : clear(adapters->model->context, weight, stream);
}

plora_status plora_model_clear_residuals(plora_model *model, void *stream)
{
    PLORA_CHECK(model != NULL, PLORA_ERROR_INVALID_ARGUMENT, "model is NULL");
    PLORA_TRY(plora__check_stream(model->context, stream, 1));
    PLORA_TRY(model->context->backend->synchronize(model->context->device, stream));
    for (int32_t i = 0; i < model->weight_count; ++i)
        if (model->weights[i].residual != NULL) PLORA_TRY(clear(model->context, &model->weights[i], stream));
    return PLORA_OK;
}

/* ------------------------------------------------------------------------------------------------------------ rounding */

static const char *name_of(const plora_adapters *adapters, int32_t number)
{
    return adapters->model->layers[adapters->adapters[number].layer].name;
}

plora_status plora__resolve_rounding(const plora_adapters *adapters, int32_t *rounding)
{
    PLORA_CHECK(*rounding >= PLORA_ROUND_DEFAULT && *rounding <= PLORA_ROUND_RESIDUAL, PLORA_ERROR_INVALID_ARGUMENT,
                "rounding %d is unknown", *rounding);
    int32_t with = -1, without = -1;
    for (int32_t i = 0; i < adapters->adapter_count; ++i) {
        const struct plora__weight *weight = weight_of(adapters, i);
        if (is_wide(weight)) continue;
        *(weight->residual != NULL ? &with : &without) = i;
    }
    PLORA_CHECK(with < 0 || *rounding == PLORA_ROUND_DEFAULT || *rounding == PLORA_ROUND_RESIDUAL,
                PLORA_ERROR_INVALID_ARGUMENT,
                "rounding %d would lose the residual that layer '%s' keeps: it takes PLORA_ROUND_RESIDUAL, or adapters "
                "created with PLORA_RESIDUAL_NONE",
                *rounding, name_of(adapters, with));
    PLORA_CHECK(without < 0 || *rounding != PLORA_ROUND_RESIDUAL, PLORA_ERROR_INVALID_ARGUMENT,
                "rounding %d takes a residual, which layer '%s' does not keep: create the adapters with "
                "PLORA_RESIDUAL_DEVICE or _HOST",
                *rounding, name_of(adapters, without));
    PLORA_CHECK(with < 0 || without < 0, PLORA_ERROR_INVALID_ARGUMENT,
                "layer '%s' keeps a residual, for other adapters, layer '%s' does not: create these with "
                "PLORA_RESIDUAL_DEVICE or _HOST, too",
                name_of(adapters, with), name_of(adapters, without));
    if (with < 0 && without < 0) *rounding = PLORA_ROUND_NEAREST; /* nothing to choose in fp32 */
    if (*rounding == PLORA_ROUND_DEFAULT) *rounding = with >= 0 ? PLORA_ROUND_RESIDUAL : PLORA_ROUND_NEAREST;
    return PLORA_OK;
}

void plora__merge_round(const plora_adapters *adapters, int32_t number, int32_t rounding, uint64_t seed, int64_t stage,
                        struct plora__merge_args *args)
{
    const struct plora__weight *weight = weight_of(adapters, number);
    args->rounding = is_wide(weight) ? PLORA_ROUND_NEAREST : rounding;
    args->draw = (struct plora__merge_draw){.seed = seed, .stage = (uint64_t)stage, .layer = weight->first_layer};
    plora__shard_elements(weight, &args->draw.first_element, &args->draw.row_elements);
    if (args->rounding != PLORA_ROUND_RESIDUAL) return;
    args->residual = weight->residual;
    args->residual_stride = weight->residual_stride;
}

plora_status plora__merge(const plora_adapters *adapters, int32_t number, struct plora__merge_args *args, void *stream)
{
    const plora_context *context = adapters->model->context;
    const struct plora__weight *weight = weight_of(adapters, number);
    const int staged = args->residual != NULL && args->residual == weight->residual && weight->residual_on_host;
    if (!staged) return context->backend->merge(context->device, args, stream);
    const size_t bytes = plora__residual_bytes(weight);
    args->residual = adapters->residual_staging;
    PLORA_TRY(context->backend->copy(context->device, args->residual, weight->residual, bytes, stream));
    PLORA_TRY(context->backend->merge(context->device, args, stream));
    if (args->overflows != NULL) return PLORA_OK;
    return plora__read_device(context, weight->residual, args->residual, bytes, stream);
}
