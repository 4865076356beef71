/* registry_add.c: where the registry's snapshots come from: a path, matrices in host memory, or adapters that are being trained.
 *
 * All end in a copy of an arena in the layout of plora_adapters (adapters.c), which the registry then gives a name. */
#include <math.h>
#include <string.h>

#include "dtype.h"
#include "serving.h"

enum { NAME_BYTES_MOST = 255 };

static plora_status check_name(const plora_registry *registry, const char *name)
{
    PLORA_TRY(plora__registry_check(registry, name));
    const size_t length = strlen(name);
    PLORA_CHECK(length >= 1 && length <= NAME_BYTES_MOST, PLORA_ERROR_INVALID_ARGUMENT,
                "the name '%.32s%s' has %zu bytes: must have 1 .. %d", name, length > 32 ? "..." : "", length,
                NAME_BYTES_MOST);
    return PLORA_OK;
}

static plora_status put_adapters(plora_registry *registry, const char *name, const plora_adapters *adapters,
                                 int64_t *version, void *stream)
{
    plora_snapshot *snapshot;
    PLORA_TRY(plora__snapshot_create(registry, adapters->adapters, adapters->adapter_count, adapters->parameter_count,
                                     &snapshot));
    return plora__registry_put(registry, name, snapshot, adapters->parameters, stream, version);
}

plora_status plora_registry_publish(plora_registry *registry, const char *name, plora_adapters *adapters,
                                    int64_t *version, void *stream)
{
    PLORA_TRY(check_name(registry, name));
    PLORA_CHECK(adapters != NULL, PLORA_ERROR_INVALID_ARGUMENT, "adapters is NULL");
    PLORA_CHECK(adapters->model == registry->model, PLORA_ERROR_INVALID_ARGUMENT,
                "the adapters belong to another model than the registry");
    PLORA_TRY(plora__check_stream(registry->model->context, stream, 1));
    PLORA_TRY(plora__adapters_check_finite(adapters, stream));
    return put_adapters(registry, name, adapters, version, stream);
}

plora_status plora_registry_load(plora_registry *registry, const char *name, const char *path,
                                 const plora_adapters_options *given, int64_t *version)
{
    PLORA_TRY(check_name(registry, name));
    plora_adapters_options options = PLORA_ADAPTERS_OPTIONS_INIT;
    PLORA_TRY(plora__read_options(&options, sizeof options, given, "plora_adapters_options"));
    options.residual = PLORA_RESIDUAL_NONE;
    options.workspace_tokens = 1;
    plora_adapters *adapters;
    PLORA_TRY(plora_adapters_load(registry->model, path, &options, &adapters));
    const plora_status status = put_adapters(registry, name, adapters, version, NULL);
    plora_adapters_destroy(adapters);
    return status;
}

/* ---------------------------------------------------------------------------------------------------------- from memory */

static plora_status check_factor(const plora_matrix *matrix, const char *what, const char *layer, int64_t rows,
                                 int64_t columns)
{
    PLORA_CHECK(plora__dtype_known(matrix->dtype), PLORA_ERROR_UNSUPPORTED, "layer '%s': %s is of dtype %d", layer,
                what, matrix->dtype);
    PLORA_CHECK(matrix->rows == rows && matrix->columns == columns && matrix->stride >= columns, PLORA_ERROR_SHAPE,
                "layer '%s': %s is [%lld,%lld] with stride %lld: must be [%lld,%lld]", layer, what,
                (long long)matrix->rows, (long long)matrix->columns, (long long)matrix->stride, (long long)rows,
                (long long)columns);
    PLORA_CHECK(matrix->reserved == 0 && matrix->data != NULL &&
                    (uintptr_t)matrix->data % plora__dtype_size(matrix->dtype) == 0,
                PLORA_ERROR_INVALID_ARGUMENT, "layer '%s': %s.data is %p, reserved is %d", layer, what, matrix->data,
                matrix->reserved);
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) {
            const float value = plora__load(matrix->data, i * matrix->stride + j, matrix->dtype);
            PLORA_CHECK(isfinite(value), PLORA_ERROR_NON_FINITE, "layer '%s': %s(%lld,%lld) is %g", layer, what,
                        (long long)i, (long long)j, (double)value);
        }
    return PLORA_OK;
}

static int64_t aligned(int64_t elements)
{
    return (elements + PLORA__ARENA_ALIGNMENT - 1) / PLORA__ARENA_ALIGNMENT * PLORA__ARENA_ALIGNMENT;
}

/* Checks one entry, and gives it its place in the arena. */
static plora_status place_layer(const plora_model *model, const plora_registry_layer *given, int64_t number,
                                struct plora__adapter *adapters, int64_t *count)
{
    struct plora__adapter *adapter = &adapters[number];
    PLORA_CHECK(given->layer >= 0 && given->layer < model->layer_count, PLORA_ERROR_INVALID_ARGUMENT,
                "layers[%lld]: layer %d: the model has layers 0 .. %d", (long long)number, given->layer,
                model->layer_count - 1);
    const struct plora__layer *layer = &model->layers[given->layer];
    const int64_t k = layer->in_features, n = layer->out_features, rank = given->a.rows;
    PLORA_CHECK(given->reserved == 0, PLORA_ERROR_INVALID_ARGUMENT, "layers[%lld].reserved is not 0",
                (long long)number);
    const plora_shard *whole = &model->weights[layer->weight].shard;
    PLORA_CHECK(rank >= 1 && rank <= plora__rank_most(model, layer), PLORA_ERROR_INVALID_ARGUMENT,
                "layer '%s': rank %lld: must be 1 .. min(K=%lld, N=%lld)", layer->name, (long long)rank,
                (long long)whole->columns, (long long)whole->rows);
    PLORA_CHECK(isfinite(given->scale), PLORA_ERROR_INVALID_ARGUMENT, "layer '%s': scale is %g: must be finite",
                layer->name, given->scale);
    for (int64_t i = 0; i < number; ++i)
        PLORA_CHECK(adapters[i].weight != layer->weight, PLORA_ERROR_INVALID_ARGUMENT,
                    "layers[%lld], '%s': layers[%lld] is for the same weight", (long long)number, layer->name,
                    (long long)i);
    PLORA_TRY(check_factor(&given->a, "a", layer->name, rank, k));
    PLORA_TRY(check_factor(&given->b, "b", layer->name, n, rank));
    *adapter = (struct plora__adapter){.weight = layer->weight,
                                       .layer = given->layer,
                                       .rank = rank,
                                       .in_features = k,
                                       .out_features = n,
                                       .scale = given->scale,
                                       .a_offset = *count,
                                       .b_offset = *count + aligned(rank * k)};
    *count = adapter->b_offset + aligned(n * rank);
    return PLORA_OK;
}

static void widen(const plora_matrix *from, float *to)
{
    for (int64_t i = 0; i < from->rows; ++i)
        for (int64_t j = 0; j < from->columns; ++j)
            to[i * from->columns + j] = plora__load(from->data, i * from->stride + j, from->dtype);
}

plora_status plora_registry_add(plora_registry *registry, const char *name, const plora_registry_layer *layers,
                                int64_t layer_count, int64_t *version)
{
    PLORA_TRY(check_name(registry, name));
    const plora_model *model = registry->model;
    plora_context *context = model->context;
    PLORA_CHECK(layer_count >= 1 && layer_count <= model->weight_count && layers != NULL, PLORA_ERROR_INVALID_ARGUMENT,
                "layers is %s, layer_count is %lld: the model has %d weights", layers == NULL ? "NULL" : "given",
                (long long)layer_count, model->weight_count);
    const size_t bytes = (size_t)layer_count * sizeof(struct plora__adapter);
    int64_t count = 0;
    void *block, *arena = NULL;
    PLORA_TRY(plora__allocate(context, bytes, &block));
    struct plora__adapter *adapters = block;
    plora_status status = PLORA_OK;
    for (int64_t i = 0; i < layer_count; ++i)
        PLORA_TRY_OUT(place_layer(model, &layers[i], i, adapters, &count));
    PLORA_TRY_OUT(plora__allocate_zeroed(context, (size_t)count * sizeof(float), &arena));
    for (int64_t i = 0; i < layer_count; ++i) {
        widen(&layers[i].a, (float *)arena + adapters[i].a_offset);
        widen(&layers[i].b, (float *)arena + adapters[i].b_offset);
    }
    plora_snapshot *snapshot;
    PLORA_TRY_OUT(plora__snapshot_create(registry, adapters, (int32_t)layer_count, count, &snapshot));
    status = plora__registry_put(registry, name, snapshot, arena, NULL, version);
out:
    plora__free(context, arena, (size_t)count * sizeof(float));
    plora__free(context, block, bytes);
    return status;
}
