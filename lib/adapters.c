/* adapters.c: a set of adapters over one model: choice of layers, ranks and scales, arenas, init, workspace.
 *
 * Arena layout, in weight order (adapter i belongs to one weight; offsets are multiples of 16 elements, padding is zero):
 *
 *     | A_0 [R,K] |pad| B_0 [N,R] |pad| A_1 ...            parameters, gradients and each moment alike
 *
 * `segments` cuts it into runs of one kind, A or B, for the optimizer's two learning rates. */
#include <math.h>
#include <string.h>

#include "dtype.h"
#include "handles.h"
#include "targets.h"

enum { DEFAULT_WORKSPACE_TOKENS = 1024 };

/* -------------------------------------------------------------------------------------------------- creation and end */

plora_status plora__adapters_check_common(const plora_adapters_options *options)
{
    PLORA_CHECK(options->init == PLORA_INIT_KAIMING_UNIFORM || options->init == PLORA_INIT_GAUSSIAN,
                PLORA_ERROR_INVALID_ARGUMENT, "init %d is unknown", options->init);
    PLORA_CHECK(options->dropout >= 0.0 && options->dropout < 1.0, PLORA_ERROR_INVALID_ARGUMENT,
                "dropout is %g: must be in [0, 1)", options->dropout);
    PLORA_CHECK(options->residual >= PLORA_RESIDUAL_DEFAULT && options->residual <= PLORA_RESIDUAL_HOST,
                PLORA_ERROR_INVALID_ARGUMENT, "residual %d is unknown", options->residual);
    PLORA_CHECK(options->workspace_tokens >= 0, PLORA_ERROR_INVALID_ARGUMENT, "workspace_tokens is %lld: must be >= 0",
                (long long)options->workspace_tokens);
    PLORA_CHECK(options->heads >= 0 && options->kv_heads >= 0, PLORA_ERROR_INVALID_ARGUMENT,
                "heads is %d, kv_heads is %d: must not be negative", options->heads, options->kv_heads);
    return PLORA_OK;
}

static plora_status check_options(const plora_adapters_options *options)
{
    PLORA_TRY(plora__adapters_check_common(options));
    PLORA_CHECK(isfinite(options->alpha), PLORA_ERROR_INVALID_ARGUMENT, "alpha is %g: must be finite", options->alpha);
    PLORA_CHECK(options->rslora == 0 || options->rslora == 1, PLORA_ERROR_INVALID_ARGUMENT,
                "rslora is %d: must be 0 or 1", options->rslora);
    PLORA_CHECK(options->override_count >= 0 && (options->override_count == 0 || options->overrides != NULL),
                PLORA_ERROR_INVALID_ARGUMENT, "override_count is %lld, overrides is %s",
                (long long)options->override_count, options->overrides == NULL ? "NULL" : "given");
    return PLORA_OK;
}

/* A pattern that matches no layer is a mistake that would change ranks and scales without a word. */
static plora_status check_overrides(const plora_model *model, const plora_adapters_options *options)
{
    for (int64_t i = 0; i < options->override_count; ++i) {
        const plora_adapters_override *override = &options->overrides[i];
        PLORA_CHECK(override->pattern != NULL && override->reserved == 0, PLORA_ERROR_INVALID_ARGUMENT,
                    "overrides[%lld]: pattern is NULL or reserved is not 0", (long long)i);
        int32_t layer = 0;
        while (layer < model->layer_count &&
               !plora__pattern_matches(override->pattern, strlen(override->pattern), &model->layers[layer]))
            ++layer;
        PLORA_CHECK(layer < model->layer_count, PLORA_ERROR_NOT_FOUND,
                    "overrides[%lld]: pattern '%s' matches none of the model's %d layers", (long long)i,
                    override->pattern, model->layer_count);
    }
    return PLORA_OK;
}

static plora_status choose_layer(const plora_model *model, const plora_adapters_options *options, int32_t layer,
                                 struct plora__adapter_choice *choice)
{
    const struct plora__layer *chosen = &model->layers[layer];
    *choice = (struct plora__adapter_choice){.layer = layer, .rank = options->rank, .alpha = options->alpha};
    for (int64_t i = 0; i < options->override_count; ++i) {
        const plora_adapters_override *override = &options->overrides[i];
        if (!plora__pattern_matches(override->pattern, strlen(override->pattern), chosen)) continue;
        if (override->rank != 0) choice->rank = override->rank;
        if (override->alpha != 0.0) choice->alpha = override->alpha;
        break;
    }
    PLORA_CHECK(choice->rank >= 1, PLORA_ERROR_INVALID_ARGUMENT, "layer '%s': rank is %d: must be >= 1", chosen->name,
                choice->rank);
    choice->scale = choice->alpha / (options->rslora ? sqrt((double)choice->rank) : (double)choice->rank);
    return PLORA_OK;
}

plora_status plora_adapters_create(plora_model *model, const plora_adapters_options *given, plora_adapters **adapters)
{
    PLORA_CHECK(model != NULL && adapters != NULL, PLORA_ERROR_INVALID_ARGUMENT, "%s is NULL",
                model == NULL ? "model" : "adapters");
    plora_adapters_options options = PLORA_ADAPTERS_OPTIONS_INIT;
    PLORA_TRY(plora__read_options(&options, sizeof options, given, "plora_adapters_options"));
    PLORA_TRY(check_options(&options));
    PLORA_TRY(check_overrides(model, &options));
    if (options.residual == PLORA_RESIDUAL_DEFAULT) options.residual = PLORA_RESIDUAL_DEVICE;

    plora_context *context = model->context;
    const size_t layers = (size_t)model->layer_count;
    const size_t bytes = layers * (2 + sizeof(struct plora__adapter_choice));
    plora_status status = PLORA_OK;
    plora_adapters *created = NULL;
    void *memory;
    PLORA_TRY(plora__allocate(context, bytes, &memory));
    struct plora__adapter_choice *choices = memory;
    unsigned char *chosen = (unsigned char *)memory + layers * sizeof *choices, *excluded = chosen + layers;
    int32_t count = 0;
    if (layers > 0) {
        PLORA_TRY_OUT(
            plora__match_targets(model, options.targets == NULL ? "all-linear" : options.targets, "targets", chosen));
        PLORA_TRY_OUT(plora__match_targets(model, options.exclude == NULL ? "" : options.exclude, "exclude", excluded));
    }
    for (int32_t i = 0; i < model->layer_count; ++i)
        if (chosen[i] && !excluded[i]) PLORA_TRY_OUT(choose_layer(model, &options, i, &choices[count++]));
    PLORA_TRY_OUT(plora__adapters_build(model, &options, choices, count, &created));
    status = plora__adapters_init(created, NULL);
    if (status == PLORA_OK) status = context->backend->synchronize(context->device, NULL);
    if (status != PLORA_OK) {
        plora_adapters_destroy(created);
        goto out;
    }
    *adapters = created;
out:
    plora__free(context, memory, bytes);
    return status;
}

void plora__adapters_retain(plora_adapters *adapters)
{
    atomic_fetch_add_explicit(&adapters->references, 1, memory_order_relaxed);
}

static size_t findings_bytes(const plora_adapters *adapters)
{
    return (size_t)adapters->adapter_count * (2 * sizeof(double) + sizeof(struct plora__merge_sums) + sizeof(int64_t));
}

void plora__adapters_release(plora_adapters *adapters)
{
    if (atomic_fetch_sub_explicit(&adapters->references, 1, memory_order_acq_rel) != 1) return;
    plora_model *model = adapters->model;
    plora_context *context = model->context;
    const size_t arena_bytes = (size_t)adapters->parameter_count * sizeof(float);
    const size_t count = (size_t)adapters->adapter_count;
    plora__device_free(context, adapters->parameters, arena_bytes);
    plora__device_free(context, adapters->gradients, arena_bytes);
    plora__requantise_free(adapters);
    plora__device_free(context, adapters->own_workspace, adapters->own_workspace_bytes);
    plora__device_free(context, adapters->merge_workspace, adapters->merge_workspace_bytes);
    plora__device_free(context, adapters->residual_staging, adapters->residual_staging_bytes);
    plora__device_free(context, adapters->segments, 2 * count * sizeof *adapters->segments);
    plora__free(context, adapters->findings.magnitudes, findings_bytes(adapters));
    plora__device_free(context, adapters->device_findings.magnitudes, findings_bytes(adapters));
    plora__free(context, adapters->adapter_of_layer, (size_t)model->layer_count * sizeof *adapters->adapter_of_layer);
    plora__free(context, adapters->adapters, count * sizeof *adapters->adapters);
    pthread_mutex_destroy(&adapters->workspace_lock);
    atomic_fetch_sub(&model->adapters_made, 1);
    plora__free(context, adapters, sizeof *adapters);
    plora__model_release(model);
}

void plora_adapters_destroy(plora_adapters *adapters)
{
    if (adapters != NULL) plora__adapters_release(adapters);
}

/* --------------------------------------------------------------------------------------------------------------- build */

static int32_t first_layer_of(const plora_model *model, int32_t layer)
{
    return model->weights[model->layers[layer].weight].first_layer;
}

static plora_status check_choice(const plora_model *model, const struct plora__adapter_choice *choice)
{
    const struct plora__layer *layer = &model->layers[choice->layer];
    const plora_shard *whole = &model->weights[layer->weight].shard;
    PLORA_CHECK(choice->rank >= 1 && choice->rank <= plora__rank_most(model, layer), PLORA_ERROR_INVALID_ARGUMENT,
                "layer '%s': rank %d exceeds min(K=%lld, N=%lld)", layer->name, choice->rank, (long long)whole->columns,
                (long long)whole->rows);
    PLORA_CHECK(isfinite(choice->scale), PLORA_ERROR_INVALID_ARGUMENT, "layer '%s': scale is %g: must be finite",
                layer->name, choice->scale);
    return PLORA_OK;
}

/* Fills adapter_of_layer and adapters from the choices: one adapter a weight, in weight order, tied layers share it. */
static plora_status place_adapters(plora_adapters *adapters, const struct plora__adapter_choice *choices,
                                   int32_t choice_count)
{
    const plora_model *model = adapters->model;
    int32_t *of_layer = adapters->adapter_of_layer;
    int32_t count = 0;
    for (int32_t i = 0; i < model->layer_count; ++i)
        of_layer[i] = -1;
    for (int32_t i = 0; i < choice_count; ++i) {
        PLORA_TRY(check_choice(model, &choices[i]));
        int32_t *choice = &of_layer[first_layer_of(model, choices[i].layer)];
        if (*choice >= 0) continue;
        *choice = i;
        count++;
    }
    void *memory;
    PLORA_TRY(plora__allocate(model->context, (size_t)count * sizeof *adapters->adapters, &memory));
    adapters->adapters = memory;
    adapters->adapter_count = count;

    int32_t next = 0;
    int64_t offset = 0;
    for (int32_t i = 0; i < model->layer_count; ++i) {
        const int32_t first = first_layer_of(model, i);
        if (first != i || of_layer[i] < 0) {
            of_layer[i] = of_layer[first];
            continue;
        }
        const struct plora__adapter_choice *choice = &choices[of_layer[i]];
        const struct plora__layer *layer = &model->layers[i];
        struct plora__adapter *adapter = &adapters->adapters[next];
        *adapter = (struct plora__adapter){.weight = layer->weight,
                                           .layer = i,
                                           .rank = choice->rank,
                                           .in_features = layer->in_features,
                                           .out_features = layer->out_features,
                                           .alpha = choice->alpha,
                                           .scale = choice->scale,
                                           .a_offset = offset};
        const int64_t align = PLORA__ARENA_ALIGNMENT;
        offset += (adapter->rank * adapter->in_features + align - 1) / align * align;
        adapter->b_offset = offset;
        offset += (adapter->rank * adapter->out_features + align - 1) / align * align;
        of_layer[i] = next++;
    }
    adapters->parameter_count = offset;
    return PLORA_OK;
}

static plora_status allocate_arenas(plora_adapters *adapters)
{
    plora_context *context = adapters->model->context;
    const size_t bytes = (size_t)adapters->parameter_count * sizeof(float);
    void *memory;
    PLORA_TRY(plora__device_allocate(context, bytes, &memory));
    adapters->parameters = memory;
    PLORA_TRY(plora__device_allocate(context, bytes, &memory));
    adapters->gradients = memory;
    PLORA_TRY(context->backend->clear(context->device, adapters->parameters, bytes, NULL));
    PLORA_TRY(context->backend->clear(context->device, adapters->gradients, bytes, NULL));

    return PLORA_OK;
}

static plora_status make_segments(plora_adapters *adapters)
{
    plora_context *context = adapters->model->context;
    const size_t bytes = 2 * (size_t)adapters->adapter_count * sizeof *adapters->segments;
    void *memory;
    PLORA_TRY(plora__device_allocate(context, bytes, &memory));
    adapters->segments = memory;
    PLORA_TRY(plora__allocate(context, bytes, &memory));
    struct plora__segment *segments = memory;
    for (int32_t i = 0; i < adapters->adapter_count; ++i) {
        const struct plora__adapter *adapter = &adapters->adapters[i];
        const int64_t end = i + 1 < adapters->adapter_count ? adapter[1].a_offset : adapters->parameter_count;
        segments[2 * i] = (struct plora__segment){.begin = adapter->a_offset, .end = adapter->b_offset, .is_b = 0};
        segments[2 * i + 1] = (struct plora__segment){.begin = adapter->b_offset, .end = end, .is_b = 1};
    }
    adapters->segment_count = 2 * adapters->adapter_count;
    plora_status status = context->backend->copy(context->device, adapters->segments, segments, bytes, NULL);
    if (status == PLORA_OK) status = context->backend->synchronize(context->device, NULL);
    plora__free(context, segments, bytes);
    return status;
}

static struct plora__findings findings_in(void *memory, int32_t adapter_count)
{
    double *magnitudes = memory;
    struct plora__merge_sums *sums = (struct plora__merge_sums *)(magnitudes + 2 * (size_t)adapter_count);
    return (struct plora__findings){magnitudes, sums, (int64_t *)(sums + adapter_count)};
}

static plora_status allocate_findings(plora_adapters *adapters)
{
    plora_context *context = adapters->model->context;
    void *memory;
    PLORA_TRY(plora__allocate(context, findings_bytes(adapters), &memory));
    adapters->findings = findings_in(memory, adapters->adapter_count);
    PLORA_TRY(plora__device_allocate(context, findings_bytes(adapters), &memory));
    adapters->device_findings = findings_in(memory, adapters->adapter_count);
    return context->backend->clear(context->device, memory, findings_bytes(adapters), NULL);
}

static plora_status allocate_scratch(plora_adapters *adapters)
{
    plora_context *context = adapters->model->context;
    const struct plora_backend *backend = context->backend;
    size_t merge_bytes = 0;
    for (int32_t i = 0; i < adapters->adapter_count; ++i) {
        const struct plora__merge_args args = plora__merge_args(adapters, i);
        const size_t bytes = backend->merge_workspace(context->device, &args);
        if (bytes > merge_bytes) merge_bytes = bytes;
    }
    void *memory;
    const size_t bytes = plora__linear_workspace_bytes(adapters, adapters->options.workspace_tokens);
    PLORA_TRY(plora__device_allocate(context, bytes, &memory));
    adapters->own_workspace = memory;
    adapters->own_workspace_bytes = bytes;
    adapters->workspace = memory;
    adapters->workspace_bytes = bytes;
    PLORA_TRY(plora__device_allocate(context, merge_bytes, &memory));
    adapters->merge_workspace = memory;
    adapters->merge_workspace_bytes = merge_bytes;
    return PLORA_OK;
}

plora_status plora__adapters_build(plora_model *model, const plora_adapters_options *options,
                                   const struct plora__adapter_choice *choices, int32_t choice_count,
                                   plora_adapters **adapters)
{
    plora_context *context = model->context;
    void *memory;
    PLORA_TRY(plora__allocate_zeroed(context, sizeof(plora_adapters), &memory));
    plora_adapters *created = memory;
    created->model = model;
    created->options = *options;
    created->options.targets = created->options.exclude = NULL;
    created->options.overrides = NULL;
    created->options.override_count = 0;
    if (options->workspace_tokens == 0) created->options.workspace_tokens = DEFAULT_WORKSPACE_TOKENS;
    atomic_init(&created->references, 1);
    pthread_mutex_init(&created->workspace_lock, NULL);
    plora__model_retain(model);
    atomic_fetch_add(&model->adapters_made, 1);

    plora_status status;
    PLORA_TRY_OUT(plora__allocate(context, (size_t)model->layer_count * sizeof *created->adapter_of_layer, &memory));
    created->adapter_of_layer = memory;
    PLORA_TRY_OUT(place_adapters(created, choices, choice_count));
    PLORA_TRY_OUT(allocate_arenas(created));
    PLORA_TRY_OUT(make_segments(created));
    PLORA_TRY_OUT(allocate_findings(created));
    PLORA_TRY_OUT(allocate_scratch(created));
    PLORA_TRY_OUT(plora__requantise_prepare(created));
    PLORA_TRY_OUT(plora__residuals_keep(created)); /* last: other sets see them */
    *adapters = created;
    return PLORA_OK;
out:
    plora_adapters_destroy(created);
    return status;
}

plora_status plora__adapters_init(plora_adapters *adapters, void *stream)
{
    plora_context *context = adapters->model->context;
    const struct plora_backend *backend = context->backend;
    for (int32_t i = 0; i < adapters->adapter_count; ++i) {
        const struct plora__adapter *adapter = &adapters->adapters[i];
        const struct plora__weight *weight = &adapters->model->weights[adapter->weight];
        const int64_t all_columns = weight->shard.columns;
        const struct plora__init_args args = {
            .out = adapters->parameters + adapter->a_offset,
            .rows = adapter->rank,
            .columns = adapter->in_features,
            .first_element = plora__shard_first_column(weight),
            .row_elements = all_columns,
            .init = adapters->options.init,
            .layer = adapter->layer,
            .scale = (float)(1.0 / sqrt((double)all_columns)),
            .seed = adapters->options.seed,
            .stage = (uint64_t)adapters->stage,
        };
        PLORA_TRY(backend->init_adapter(context->device, &args, stream));
        PLORA_TRY(backend->clear(context->device, adapters->parameters + adapter->b_offset,
                                 (size_t)(adapter->rank * adapter->out_features) * sizeof(float), stream));
    }
    return PLORA_OK;
}

/* ------------------------------------------------------------------------------------------------------------- queries */

static plora_status arena(const plora_adapters *adapters, float *memory, float **data, int64_t *count)
{
    PLORA_CHECK(data != NULL && count != NULL, PLORA_ERROR_INVALID_ARGUMENT, "%s is NULL",
                data == NULL ? "data" : "count");
    *data = memory;
    *count = adapters->parameter_count;
    return PLORA_OK;
}

plora_status plora_adapters_parameters(plora_adapters *adapters, float **data, int64_t *count)
{
    PLORA_CHECK(adapters != NULL, PLORA_ERROR_INVALID_ARGUMENT, "adapters is NULL");
    return arena(adapters, adapters->parameters, data, count);
}

plora_status plora_adapters_gradients(plora_adapters *adapters, float **data, int64_t *count)
{
    PLORA_CHECK(adapters != NULL, PLORA_ERROR_INVALID_ARGUMENT, "adapters is NULL");
    return arena(adapters, adapters->gradients, data, count);
}

static plora_matrix view(float *data, int64_t rows, int64_t columns)
{
    return (plora_matrix){data, rows, columns, columns, PLORA_F32, 0};
}

plora_status plora_adapters_layer(plora_adapters *adapters, int32_t layer, plora_adapter *adapter)
{
    PLORA_CHECK(adapters != NULL, PLORA_ERROR_INVALID_ARGUMENT, "adapters is NULL");
    const plora_model *model = adapters->model;
    PLORA_CHECK(layer >= 0 && layer < model->layer_count, PLORA_ERROR_INVALID_ARGUMENT,
                "layer %d: the model has layers 0 .. %d", layer, model->layer_count - 1);
    const int32_t index = adapters->adapter_of_layer[layer];
    PLORA_CHECK(index >= 0, PLORA_ERROR_NOT_FOUND, "layer '%s' has no adapter", model->layers[layer].name);
    const struct plora__adapter *found = &adapters->adapters[index];
    plora_adapter result = PLORA_ADAPTER_INIT;
    result.a = view(adapters->parameters + found->a_offset, found->rank, found->in_features);
    result.b = view(adapters->parameters + found->b_offset, found->out_features, found->rank);
    result.a_gradient = view(adapters->gradients + found->a_offset, found->rank, found->in_features);
    result.b_gradient = view(adapters->gradients + found->b_offset, found->out_features, found->rank);
    result.scale = found->scale;
    return plora__write_result(adapter, &result, sizeof result, "plora_adapter");
}

plora_status plora_adapters_set_dropout_position(plora_adapters *adapters, uint64_t step, uint64_t first_token)
{
    PLORA_CHECK(adapters != NULL, PLORA_ERROR_INVALID_ARGUMENT, "adapters is NULL");
    adapters->dropout_step = step;
    adapters->dropout_first_token = first_token;
    return PLORA_OK;
}

int64_t plora_adapters_stage(const plora_adapters *adapters)
{
    return adapters == NULL ? 0 : adapters->stage;
}

plora_status plora_adapters_workspace_size(const plora_adapters *adapters, int64_t tokens, size_t *bytes)
{
    PLORA_CHECK(adapters != NULL && bytes != NULL, PLORA_ERROR_INVALID_ARGUMENT, "%s is NULL",
                adapters == NULL ? "adapters" : "bytes");
    PLORA_CHECK(tokens >= 1 && tokens <= INT32_MAX, PLORA_ERROR_INVALID_ARGUMENT,
                "tokens is %lld: must be 1 .. 2^31 - 1", (long long)tokens);
    *bytes = plora__linear_workspace_bytes(adapters, tokens);
    return PLORA_OK;
}

plora_status plora_adapters_set_workspace(plora_adapters *adapters, void *workspace, size_t bytes)
{
    PLORA_CHECK(adapters != NULL, PLORA_ERROR_INVALID_ARGUMENT, "adapters is NULL");
    if (workspace == NULL) {
        PLORA_CHECK(bytes == 0, PLORA_ERROR_INVALID_ARGUMENT, "workspace is NULL, but has %zu bytes", bytes);
        workspace = adapters->own_workspace;
        bytes = adapters->own_workspace_bytes;
    } else {
        const size_t least = plora__linear_workspace_bytes(adapters, 1);
        PLORA_CHECK((uintptr_t)workspace % PLORA__ALIGNMENT == 0, PLORA_ERROR_INVALID_ARGUMENT,
                    "workspace at %p is not aligned to %d bytes", workspace, PLORA__ALIGNMENT);
        PLORA_CHECK(bytes >= least, PLORA_ERROR_INVALID_ARGUMENT, "workspace of %zu bytes: one token needs %zu", bytes,
                    least);
    }
    pthread_mutex_lock(&adapters->workspace_lock);
    adapters->workspace = workspace;
    adapters->workspace_bytes = bytes;
    pthread_mutex_unlock(&adapters->workspace_lock);
    return PLORA_OK;
}
