/* registry_merge.c: a served adapter inside the backbone, and out of it again, to the bit.
 *
 *     merge     copy of W to the host;  W <- round(W + s B A), the backend's merge        for every weight with factors
 *     unmerge   W <- copy
 *
 * Subtracting would not give the bits back: the sum was rounded. Model.merged says whose factors the weights hold; batches ask it,
 * and whatever else writes weights (plora__weights_check()). */
#include <math.h>
#include <string.h>

#include "dtype.h"
#include "serving.h"

/* The weights as they were, one entry for each that has factors, and the memory of their rows without gaps. */
struct plora__weight_copies {
    int32_t count;
    size_t bytes; /* of this block */
    struct {
        int32_t weight;
        size_t bytes;
        void *rows;
    } list[];
};

plora_status plora__weights_check(const plora_model *model)
{
    PLORA_CHECK(atomic_load(&model->merged) == NULL, PLORA_ERROR_BUSY,
                "an adapter of a registry is merged into the model's weights: plora_registry_unmerge() first");
    return PLORA_OK;
}

/* ------------------------------------------------------------------------------------------------------------- copies */

static size_t row_bytes(const plora_matrix *matrix)
{
    return (size_t)matrix->columns * plora__dtype_size(matrix->dtype);
}

/* Between W and its copy; a gap between rows may belong to somebody else. */
static plora_status copy_rows(const plora_context *context, const plora_matrix *matrix, void *rows, int back)
{
    const int dense = matrix->stride == matrix->columns;
    const size_t step = row_bytes(matrix), size = plora__dtype_size(matrix->dtype);
    const size_t length = dense ? step * (size_t)matrix->rows : step;
    for (int64_t i = 0; i < (dense ? 1 : matrix->rows); ++i) {
        char *own = (char *)matrix->data + (size_t)(i * matrix->stride) * size, *kept = (char *)rows + (size_t)i * step;
        PLORA_TRY(context->backend->copy(context->device, back ? own : kept, back ? kept : own, length, NULL));
    }
    return context->backend->synchronize(context->device, NULL);
}

static void free_copies(plora_context *context, struct plora__weight_copies *copies)
{
    if (copies == NULL) return;
    for (int32_t i = 0; i < copies->count; ++i)
        plora__free(context, copies->list[i].rows, copies->list[i].bytes);
    plora__free(context, copies, copies->bytes);
}

static plora_status make_copies(const plora_snapshot *snapshot, struct plora__weight_copies **made)
{
    const plora_model *model = snapshot->registry->model;
    plora_context *context = model->context;
    const size_t bytes = sizeof **made + (size_t)snapshot->weights * sizeof *(*made)->list;
    void *memory;
    PLORA_TRY(plora__allocate_zeroed(context, bytes, &memory));
    struct plora__weight_copies *copies = memory;
    copies->bytes = bytes;
    plora_status status = PLORA_OK;
    for (int32_t i = 0; i < model->weight_count && status == PLORA_OK; ++i) {
        const plora_matrix *matrix = &model->weights[i].matrix;
        if (snapshot->factors[i].rank == 0) continue;
        const size_t length = row_bytes(matrix) * (size_t)matrix->rows;
        status = plora__allocate(context, length, &memory);
        if (status != PLORA_OK) break;
        copies->list[copies->count].weight = i;
        copies->list[copies->count].bytes = length;
        copies->list[copies->count++].rows = memory;
        status = copy_rows(context, matrix, memory, 0);
    }
    if (status == PLORA_OK)
        *made = copies;
    else
        free_copies(context, copies);
    return status;
}

static plora_status put_back(const plora_model *model, const struct plora__weight_copies *copies)
{
    for (int32_t i = 0; i < copies->count; ++i)
        PLORA_TRY(copy_rows(model->context, &model->weights[copies->list[i].weight].matrix, copies->list[i].rows, 1));
    return PLORA_OK;
}

/* -------------------------------------------------------------------------------------------------------------- merging */

static struct plora__merge_args merge_args(const plora_snapshot *snapshot, int32_t weight, void *workspace)
{
    const struct plora__factors *factors = &snapshot->factors[weight];
    const float *arena = plora__snapshot_arena(snapshot, snapshot->memory);
    struct plora__merge_args args = plora__merge_weight(snapshot->registry->model, weight, arena + factors->a_offset,
                                                        arena + factors->b_offset, factors->rank, factors->scale);
    args.workspace = workspace;
    return args;
}

static size_t workspace_bytes(const plora_snapshot *snapshot)
{
    const plora_model *model = snapshot->registry->model;
    const struct plora_backend *backend = model->context->backend;
    size_t most = 0;
    for (int32_t i = 0; i < model->weight_count; ++i) {
        if (snapshot->factors[i].rank == 0) continue;
        const struct plora__merge_args args = merge_args(snapshot, i, NULL);
        const size_t bytes = backend->merge_workspace(model->context->device, &args);
        if (bytes > most) most = bytes;
    }
    return most;
}

/* Goes through the merge of one weight without writing. */
static plora_status try_weight(const plora_snapshot *snapshot, int32_t weight, void *workspace, int64_t *overflows)
{
    const plora_model *model = snapshot->registry->model;
    const plora_context *context = model->context;
    struct plora__merge_args args = merge_args(snapshot, weight, workspace);
    int64_t count = 0;
    args.overflows = overflows;
    PLORA_TRY(context->backend->merge(context->device, &args, NULL));
    PLORA_TRY(plora__read_device(context, &count, overflows, sizeof count, NULL));
    PLORA_CHECK(count == 0, PLORA_ERROR_NON_FINITE,
                "adapter '%s', layer '%s': %lld of %lld weights would overflow %s, nothing was merged", snapshot->name,
                model->layers[model->weights[weight].first_layer].name, (long long)count,
                (long long)args.weight.rows * (long long)args.weight.columns, plora__dtype_name(args.weight.dtype));
    return PLORA_OK;
}

/* Serving a quantised layer merged would serve other codes than it was quantised to. */
static plora_status check_quantised(const plora_snapshot *snapshot)
{
    const plora_model *model = snapshot->registry->model;
    for (int32_t i = 0; i < model->weight_count; ++i)
        PLORA_CHECK(snapshot->factors[i].rank == 0 || model->weights[i].quantised == NULL, PLORA_ERROR_UNSUPPORTED,
                    "adapter '%s', layer '%s': an adapter cannot be merged into a quantised weight, nothing was merged",
                    snapshot->name, model->layers[model->weights[i].first_layer].name);
    return PLORA_OK;
}

static plora_status merge_weights(const plora_snapshot *snapshot, void *workspace, int64_t *overflows)
{
    const plora_model *model = snapshot->registry->model;
    const plora_context *context = model->context;
    for (int32_t i = 0; i < model->weight_count; ++i)
        if (snapshot->factors[i].rank > 0) PLORA_TRY(try_weight(snapshot, i, workspace, overflows));
    for (int32_t i = 0; i < model->weight_count; ++i) {
        if (snapshot->factors[i].rank == 0) continue;
        const struct plora__merge_args args = merge_args(snapshot, i, workspace);
        PLORA_TRY(context->backend->merge(context->device, &args, NULL));
    }
    return context->backend->synchronize(context->device, NULL);
}

static plora_status merge(plora_registry *registry, plora_snapshot *snapshot)
{
    plora_context *context = registry->model->context;
    const size_t bytes = workspace_bytes(snapshot);
    void *workspace = NULL, *overflows = NULL;
    struct plora__weight_copies *copies = NULL;
    plora_status status;
    PLORA_TRY_OUT(check_quantised(snapshot));
    PLORA_TRY_OUT(
        context->backend->synchronize(context->device, NULL)); /* of all streams: some may still read the weights */
    PLORA_TRY_OUT(plora__device_allocate(context, bytes, &workspace));
    PLORA_TRY_OUT(plora__device_allocate(context, sizeof(int64_t), &overflows));
    PLORA_TRY_OUT(make_copies(snapshot, &copies));
    status = merge_weights(snapshot, workspace, overflows);
    if (status == PLORA_OK) {
        registry->copies = copies;
        copies = NULL;
    } else if (status != PLORA_ERROR_NON_FINITE) {
        put_back(registry->model, copies); /* the device has failed, between two weights perhaps */
    }
out:
    free_copies(context, copies);
    plora__device_free(context, workspace, bytes);
    plora__device_free(context, overflows, sizeof(int64_t));
    return status;
}

plora_status plora_registry_merge(plora_registry *registry, const char *name)
{
    PLORA_TRY(plora__registry_check(registry, name));
    PLORA_TRY(plora__check_stream(registry->model->context, NULL, 1));
    plora_snapshot *snapshot;
    PLORA_TRY(plora_registry_acquire(registry, name, &snapshot)); /* in memory, and not to be replaced in silence */
    pthread_mutex_lock(&registry->changes);
    plora_status status = plora__registry_check_merge(registry, snapshot);
    plora_snapshot *none = NULL;
    if (status == PLORA_OK && !atomic_compare_exchange_strong(&registry->model->merged, &none, snapshot))
        status =
            plora__fail(PLORA_ERROR_BUSY, "adapter '%.300s': the model's weights hold a merged adapter already", name);
    else if (status == PLORA_OK) {
        status = merge(registry, snapshot);
        if (status != PLORA_OK) atomic_store(&registry->model->merged, NULL);
    }
    pthread_mutex_unlock(&registry->changes);
    plora_snapshot_release(snapshot);
    return status;
}

plora_status plora_registry_unmerge(plora_registry *registry)
{
    PLORA_CHECK(registry != NULL, PLORA_ERROR_INVALID_ARGUMENT, "registry is NULL");
    PLORA_TRY(plora__check_stream(registry->model->context, NULL, 1));
    plora_status status;
    pthread_mutex_lock(&registry->changes);
    PLORA_CHECK_OUT(registry->copies != NULL, PLORA_ERROR_INVALID_ARGUMENT, "no adapter of this registry is merged");
    PLORA_TRY_OUT(registry->model->context->backend->synchronize(registry->model->context->device, NULL));
    PLORA_TRY_OUT(put_back(registry->model, registry->copies));
    free_copies(registry->model->context, registry->copies);
    registry->copies = NULL;
    atomic_store(&registry->model->merged, NULL);
out:
    pthread_mutex_unlock(&registry->changes);
    return status;
}

void plora__registry_restore(plora_registry *registry)
{
    if (registry->copies == NULL) return;
    put_back(registry->model, registry->copies);
    free_copies(registry->model->context, registry->copies);
    registry->copies = NULL;
    atomic_store(&registry->model->merged, NULL);
}
