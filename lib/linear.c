/* linear.c: the checks above the linear layer, and its passes over the tokens.
 *
 * A call is checked as a whole, then run in passes of as many tokens as the workspace holds, so that any T works in a
 * bounded memory. The mathematics is in the backend: cpu/cpu_linear.c. */
#include "handles.h"
#include "matrix.h"

/* What the workspace always has room for where a layer has no adapter and operands must be widened. */
enum { FEW_TOKENS = 16 };

/* ----------------------------------------------------------------------------------------------------------- arguments */

/* Everything of the arguments that does not depend on the call's tensors. */
static struct plora__linear_args layer_args(const plora_adapters *adapters, int32_t layer)
{
    const plora_model *model = adapters->model;
    const struct plora__layer *found = &model->layers[layer];
    const struct plora__weight *weight = &model->weights[found->weight];
    struct plora__linear_args args = {
        .delta_only = weight->gathered,
        .in_features = found->in_features,
        .out_features = found->out_features,
        .fan_in_fan_out = weight->fan_in_fan_out,
        .bias = found->bias,
        .bias_dtype = found->bias_dtype,
        .weight = weight->matrix,
    };
    if (weight->quantised != NULL) {
        args.weight.data = NULL; /* a master, which is not the device's */
        args.quantised = &weight->quantised->values;
    }
    const int32_t index = adapters->adapter_of_layer[layer];
    if (index >= 0) {
        const struct plora__adapter *adapter = &adapters->adapters[index];
        args.rank = adapter->rank;
        args.scale = (float)adapter->scale;
        args.a = adapters->parameters + adapter->a_offset;
        args.b = adapters->parameters + adapter->b_offset;
        args.a_gradient = adapters->gradients + adapter->a_offset;
        args.b_gradient = adapters->gradients + adapter->b_offset;
        args.dropout = (struct plora__dropout){.probability = adapters->options.dropout,
                                               .seed = adapters->options.seed,
                                               .step = adapters->dropout_step,
                                               .first_token = adapters->dropout_first_token,
                                               .layer = layer,
                                               .first_column = plora__shard_first_column(weight),
                                               .row_elements = weight->shard.columns};
    }
    return args;
}

/* The dtypes of a call; a quantised weight takes that of x. */
static void set_dtypes(struct plora__linear_args *args, int32_t x, int32_t y)
{
    args->x.dtype = x;
    args->y.dtype = y;
    if (args->quantised != NULL) args->weight.dtype = x;
}

static size_t workspace_of(const plora_adapters *adapters, int32_t layer, int64_t tokens, int32_t x, int32_t y)
{
    const plora_context *context = adapters->model->context;
    struct plora__linear_args args = layer_args(adapters, layer);
    args.tokens = tokens;
    set_dtypes(&args, x, y);
    args.dx.dtype = PLORA_BF16;
    args.dx.data = adapters->parameters; /* a dx is wanted: only that it is not NULL counts */
    return context->backend->linear_workspace(context->device, &args);
}

/* Whether a call of these dtypes runs in passes of workspace_tokens: with an adapter always, so that the gradient's sums over
 * the tokens are cut alike everywhere, and with a quantised weight, of which each pass makes all panels; else when nothing must be
 * widened, which would take memory for a whole head. */
static int has_full_passes(const plora_adapters *adapters, int32_t layer, int32_t x, int32_t y)
{
    const plora_model *model = adapters->model;
    const struct plora__weight *weight = &model->weights[model->layers[layer].weight];
    return adapters->adapter_of_layer[layer] >= 0 || weight->quantised != NULL ||
           (x == y && (x == PLORA_F32 || weight->matrix.dtype == PLORA_BF16));
}

size_t plora__linear_workspace_bytes(const plora_adapters *adapters, int64_t tokens)
{
    const int64_t few = tokens < FEW_TOKENS ? tokens : FEW_TOKENS;
    size_t most = 0;
    for (int32_t i = 0; i < adapters->model->layer_count; ++i)
        for (int32_t x = PLORA_F32; x <= PLORA_BF16; ++x)
            for (int32_t y = PLORA_F32; y <= PLORA_BF16; ++y) {
                const size_t bytes = workspace_of(adapters, i, has_full_passes(adapters, i, x, y) ? tokens : few, x, y);
                if (bytes > most) most = bytes;
            }
    return most;
}

/* -------------------------------------------------------------------------------------------------------------- checks */

plora_status plora__check_activation(const plora_matrix *matrix, const char *what, const char *layer, int64_t rows,
                                     int64_t columns)
{
    PLORA_CHECK(matrix->reserved == 0, PLORA_ERROR_INVALID_ARGUMENT, "layer '%s': %s.reserved is not 0", layer, what);
    PLORA_CHECK(matrix->dtype == PLORA_F32 || matrix->dtype == PLORA_BF16, PLORA_ERROR_UNSUPPORTED,
                "layer '%s': %s is of dtype %d (%s): must be F32 or BF16", layer, what, matrix->dtype,
                plora__dtype_name(matrix->dtype));
    PLORA_CHECK(matrix->rows == rows && matrix->columns == columns && rows >= 0, PLORA_ERROR_SHAPE,
                "layer '%s': %s is [%lld,%lld]: must be [%lld,%lld]", layer, what, (long long)matrix->rows,
                (long long)matrix->columns, (long long)rows, (long long)columns);
    PLORA_CHECK(matrix->stride >= columns, PLORA_ERROR_SHAPE, "layer '%s': %s has stride %lld: must be >= %lld", layer,
                what, (long long)matrix->stride, (long long)columns);
    PLORA_CHECK(rows <= PTRDIFF_MAX / 4 / matrix->stride, PLORA_ERROR_SHAPE,
                "layer '%s': %s of %lld rows with stride %lld exceeds the address space", layer, what, (long long)rows,
                (long long)matrix->stride);
    PLORA_CHECK(matrix->data != NULL || rows == 0, PLORA_ERROR_INVALID_ARGUMENT, "layer '%s': %s.data is NULL", layer,
                what);
    PLORA_CHECK((uintptr_t)matrix->data % plora__dtype_size(matrix->dtype) == 0, PLORA_ERROR_INVALID_ARGUMENT,
                "layer '%s': %s at %p is not aligned for %s", layer, what, matrix->data,
                plora__dtype_name(matrix->dtype));
    return PLORA_OK;
}

plora_status plora__check_gathered(const plora_model *model, int32_t layer, uint32_t flags)
{
    const struct plora__layer *found = &model->layers[layer];
    PLORA_CHECK(
        !model->weights[found->weight].gathered || (flags & PLORA_LINEAR_DELTA_ONLY) != 0, PLORA_ERROR_INVALID_ARGUMENT,
        "layer '%s' is PLORA_LAYER_GATHERED: its x W^T is the host's, calls take PLORA_LINEAR_DELTA_ONLY", found->name);
    return PLORA_OK;
}

static plora_status check_call(const plora_adapters *adapters, int32_t layer, const plora_matrix *x,
                               const plora_matrix *y, const char *y_name, uint32_t flags, uint32_t known_flags,
                               void *stream)
{
    PLORA_CHECK(adapters != NULL && x != NULL && y != NULL, PLORA_ERROR_INVALID_ARGUMENT, "%s is NULL",
                adapters == NULL ? "adapters"
                : x == NULL      ? "x"
                                 : y_name);
    const plora_model *model = adapters->model;
    PLORA_CHECK(layer >= 0 && layer < model->layer_count, PLORA_ERROR_INVALID_ARGUMENT,
                "layer %d: the model has layers 0 .. %d", layer, model->layer_count - 1);
    PLORA_CHECK((flags & ~known_flags) == 0, PLORA_ERROR_INVALID_ARGUMENT, "unknown flags 0x%x", flags & ~known_flags);
    PLORA_TRY(plora__check_gathered(model, layer, flags));
    /* A repeated graph would repeat one dropout mask. */
    PLORA_TRY(plora__check_stream(model->context, stream, (flags & PLORA_LINEAR_DROPOUT) != 0));
    const struct plora__layer *found = &model->layers[layer];
    PLORA_TRY(plora__check_activation(x, "x", found->name, x->rows, found->in_features));
    return plora__check_activation(y, y_name, found->name, x->rows, found->out_features);
}

/* ---------------------------------------------------------------------------------------------------------------- run */

static plora_matrix rows_from(const plora_matrix *matrix, int64_t first, int64_t rows)
{
    plora_matrix part = *matrix;
    part.data = (char *)matrix->data + (size_t)(first * matrix->stride) * plora__dtype_size(matrix->dtype);
    part.rows = rows;
    return part;
}

typedef plora_status (*linear_operation)(void *device, const struct plora__linear_args *args, void *stream);

/* The tokens of one pass: workspace_tokens, or what a smaller workspace of the host's holds. */
static int64_t pass_tokens(const plora_adapters *adapters, int32_t layer, const struct plora__linear_args *whole)
{
    const plora_context *context = adapters->model->context;
    struct plora__linear_args args = *whole;
    const int full = has_full_passes(adapters, layer, args.x.dtype, args.y.dtype);
    const int64_t most = full                             ? adapters->options.workspace_tokens
                         : context->options.deterministic ? FEW_TOKENS
                                                          : args.tokens;
    if (args.tokens > most) args.tokens = most;
    while (args.tokens > 1 && context->backend->linear_workspace(context->device, &args) > adapters->workspace_bytes)
        args.tokens = (args.tokens + 1) / 2;
    return args.tokens;
}

/* Runs the operation over all tokens, a pass at a time. whole->tokens is T. */
static plora_status run_passes(plora_adapters *adapters, int32_t layer, const struct plora__linear_args *whole,
                               linear_operation operation, void *stream)
{
    const plora_context *context = adapters->model->context;
    plora_status status = PLORA_OK;
    pthread_mutex_lock(&adapters->workspace_lock);
    struct plora__linear_args args = *whole;
    args.workspace = adapters->workspace;
    const int64_t pass = pass_tokens(adapters, layer, whole);
    for (int64_t first = 0; first < whole->tokens && status == PLORA_OK; first += pass) {
        args.tokens = whole->tokens - first < pass ? whole->tokens - first : pass;
        args.x = rows_from(&whole->x, first, args.tokens);
        args.y = rows_from(&whole->y, first, args.tokens);
        if (whole->dx.data != NULL) args.dx = rows_from(&whole->dx, first, args.tokens);
        args.dropout.first_token = whole->dropout.first_token + (uint64_t)first;
        status = operation(context->device, &args, stream);
    }
    pthread_mutex_unlock(&adapters->workspace_lock);
    return status;
}

plora_status plora_linear_forward(plora_adapters *adapters, int32_t layer, const plora_matrix *x, const plora_matrix *y,
                                  uint32_t flags, void *stream)
{
    PLORA_TRY(check_call(adapters, layer, x, y, "y", flags, PLORA_LINEAR_DROPOUT | PLORA_LINEAR_DELTA_ONLY, stream));
    PLORA_CHECK(!plora__matrix_overlap(x, y), PLORA_ERROR_INVALID_ARGUMENT, "layer '%s': x at %p and y at %p overlap",
                adapters->model->layers[layer].name, x->data, y->data);
    struct plora__linear_args args = layer_args(adapters, layer);
    args.tokens = x->rows;
    args.x = *x;
    args.y = *y;
    set_dtypes(&args, x->dtype, y->dtype);
    args.delta_only = (flags & PLORA_LINEAR_DELTA_ONLY) != 0;
    if ((flags & PLORA_LINEAR_DROPOUT) == 0) args.dropout.probability = 0.0;
    return run_passes(adapters, layer, &args, adapters->model->context->backend->linear_forward, stream);
}

plora_status plora_linear_backward(plora_adapters *adapters, int32_t layer, const plora_matrix *x,
                                   const plora_matrix *dy, const plora_matrix *dx, uint32_t flags, void *stream)
{
    PLORA_TRY(check_call(adapters, layer, x, dy, "dy", flags,
                         PLORA_LINEAR_DROPOUT | PLORA_LINEAR_DELTA_ONLY | PLORA_LINEAR_ACCUMULATE, stream));
    struct plora__linear_args args = layer_args(adapters, layer);
    if (dx != NULL) {
        const char *name = adapters->model->layers[layer].name;
        PLORA_TRY(plora__check_activation(dx, "dx", name, x->rows, args.in_features));
        PLORA_CHECK(!plora__matrix_overlap(x, dx) && !plora__matrix_overlap(dy, dx), PLORA_ERROR_INVALID_ARGUMENT,
                    "layer '%s': dx at %p overlaps x at %p or dy at %p", name, dx->data, x->data, dy->data);
        args.dx = *dx;
    }
    args.tokens = x->rows;
    args.x = *x;
    args.y = *dy;
    set_dtypes(&args, x->dtype, dy->dtype);
    args.delta_only = (flags & PLORA_LINEAR_DELTA_ONLY) != 0;
    args.accumulate = (flags & PLORA_LINEAR_ACCUMULATE) != 0;
    if ((flags & PLORA_LINEAR_DROPOUT) == 0) args.dropout.probability = 0.0;
    return run_passes(adapters, layer, &args, adapters->model->context->backend->linear_backward, stream);
}
