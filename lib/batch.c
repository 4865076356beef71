/* batch.c: the tokens of a step and the snapshots that they belong to, and the layers over them.
 *
 *     slots[t]  3 -1  0  3  0      ->      list  [2 4 | 0 3]     segments  {slot 0, 2 tokens} {slot 3, 2 tokens}
 *
 * The list is made once a step, by counting. What kernels read goes to the device as one block of so many bytes:
 *
 *     [for each snapshot, its slots (snapshot.c)][segments][list]
 *
 * The mathematics is in the backend: cpu/cpu_batch.c. Base products are those of a set of adapters without any: linear.c. */
#include <string.h>

#include "matrix.h"
#include "serving.h"

enum { MAX_RANK_MOST = 1 << 16 };

struct plora_batch {
    plora_model *model;
    plora_batch_options options;
    plora_adapters *plain; /* no adapters: the base products, with their workspace */
    plora_snapshot **held; /* [held_count], those of the step */
    int32_t held_count;
    const plora_snapshot *merged; /* into the weights, when the step began */
    int64_t tokens, listed;       /* of the step; of the list */
    int32_t segment_count, tiles;
    int32_t *counts; /* [max_adapters]: tokens, then where the next one goes */
    char *image;     /* what the block is filled with; segments are read here */
    char *block;     /* device */
    size_t image_bytes, segments_at, list_at;
    void *workspace; /* device */
    size_t workspace_bytes;
    int in_order; /* the list is 0, 1, 2 ... */
};

/* --------------------------------------------------------------------------------------------------- creation and end */

static plora_status check_options(const plora_batch_options *options)
{
    PLORA_CHECK(options->max_tokens >= 1 && options->max_tokens <= INT32_MAX, PLORA_ERROR_INVALID_ARGUMENT,
                "max_tokens is %lld: must be 1 .. 2^31 - 1", (long long)options->max_tokens);
    PLORA_CHECK(options->max_adapters >= 1, PLORA_ERROR_INVALID_ARGUMENT, "max_adapters is %d: must be >= 1",
                options->max_adapters);
    PLORA_CHECK(options->max_rank >= 1 && options->max_rank <= MAX_RANK_MOST, PLORA_ERROR_INVALID_ARGUMENT,
                "max_rank is %d: must be 1 .. %d", options->max_rank, MAX_RANK_MOST);
    return PLORA_OK;
}

/* One target of the highest rank always fits; more do when their ranks are lower. */
static size_t workspace_bytes(const plora_batch *batch)
{
    const plora_context *context = batch->model->context;
    size_t most = 0;
    for (int32_t i = 0; i < batch->model->layer_count; ++i) {
        const struct plora__layer *layer = &batch->model->layers[i];
        const struct plora__batch_target target = {.max_rank = batch->options.max_rank,
                                                   .out_features = layer->out_features};
        const struct plora__batch_args args = {.tokens = batch->options.max_tokens,
                                               .in_features = layer->in_features,
                                               .target_count = 1,
                                               .targets = &target};
        const size_t bytes = context->backend->batch_workspace(context->device, &args);
        if (bytes > most) most = bytes;
    }
    return most;
}

static plora_status allocate(plora_batch *batch)
{
    plora_context *context = batch->model->context;
    const size_t adapters = (size_t)batch->options.max_adapters, tokens = (size_t)batch->options.max_tokens;
    void *memory;
    PLORA_TRY(plora__allocate(context, adapters * sizeof(void *), &memory));
    batch->held = memory;
    PLORA_TRY(plora__allocate(context, adapters * sizeof *batch->counts, &memory));
    batch->counts = memory;
    batch->image_bytes = adapters * (sizeof(void *) + sizeof(struct plora__batch_segment)) + tokens * sizeof(int32_t);
    PLORA_TRY(plora__allocate(context, batch->image_bytes, &memory));
    batch->image = memory;
    PLORA_TRY(plora__device_allocate(context, batch->image_bytes, &memory));
    batch->block = memory;
    batch->workspace_bytes = workspace_bytes(batch);
    PLORA_TRY(plora__device_allocate(context, batch->workspace_bytes, &memory));
    batch->workspace = memory;
    plora_adapters_options plain = PLORA_ADAPTERS_OPTIONS_INIT;
    plain.residual = PLORA_RESIDUAL_NONE;
    plain.workspace_tokens = tokens < 1024 ? (int64_t)tokens : 1024;
    return plora__adapters_build(batch->model, &plain, NULL, 0, &batch->plain);
}

plora_status plora_batch_create(plora_model *model, const plora_batch_options *given, plora_batch **batch)
{
    PLORA_CHECK(model != NULL && batch != NULL, PLORA_ERROR_INVALID_ARGUMENT, "%s is NULL",
                model == NULL ? "model" : "batch");
    plora_batch_options options = PLORA_BATCH_OPTIONS_INIT;
    PLORA_TRY(plora__read_options(&options, sizeof options, given, "plora_batch_options"));
    PLORA_TRY(check_options(&options));
    void *memory;
    PLORA_TRY(plora__allocate_zeroed(model->context, sizeof(plora_batch), &memory));
    plora_batch *created = memory;
    created->model = model;
    created->options = options;
    plora__model_retain(model);
    const plora_status status = allocate(created);
    if (status != PLORA_OK) {
        plora_batch_destroy(created);
        return status;
    }
    *batch = created;
    return PLORA_OK;
}

static void release_held(plora_batch *batch)
{
    for (int32_t i = 0; i < batch->held_count; ++i)
        plora_snapshot_release(batch->held[i]);
    batch->held_count = 0;
}

void plora_batch_destroy(plora_batch *batch)
{
    if (batch == NULL) return;
    plora_model *model = batch->model;
    plora_context *context = model->context;
    const size_t adapters = (size_t)batch->options.max_adapters;
    release_held(batch);
    plora__free(context, batch->held, adapters * sizeof(void *));
    plora__free(context, batch->counts, adapters * sizeof *batch->counts);
    plora__free(context, batch->image, batch->image_bytes);
    plora__device_free(context, batch->block, batch->image_bytes);
    plora__device_free(context, batch->workspace, batch->workspace_bytes);
    plora_adapters_destroy(batch->plain);
    plora__free(context, batch, sizeof *batch);
    plora__model_release(model);
}

/* ---------------------------------------------------------------------------------------------------------- one step */

static plora_status check_snapshot(const plora_batch *batch, const plora_snapshot *snapshot, int32_t number,
                                   const plora_snapshot *merged)
{
    PLORA_CHECK(snapshot != NULL, PLORA_ERROR_INVALID_ARGUMENT, "snapshots[%d] is NULL", number);
    PLORA_CHECK(snapshot->registry->model == batch->model, PLORA_ERROR_INVALID_ARGUMENT,
                "snapshots[%d], '%s', belongs to another model", number, snapshot->name);
    PLORA_CHECK(snapshot->max_rank <= batch->options.max_rank, PLORA_ERROR_INVALID_ARGUMENT,
                "snapshots[%d], '%s', has rank %lld: the batch was made for max_rank %d", number, snapshot->name,
                (long long)snapshot->max_rank, batch->options.max_rank);
    PLORA_CHECK(merged == NULL || merged == snapshot, PLORA_ERROR_BUSY,
                "snapshots[%d], '%s': the weights hold another adapter, which is merged", number, snapshot->name);
    return PLORA_OK;
}

static plora_status check_begin(const plora_batch *batch, int64_t tokens, const int32_t *slots,
                                plora_snapshot *const *snapshots, int32_t snapshot_count, const plora_snapshot *merged)
{
    PLORA_CHECK(tokens >= 0 && tokens <= batch->options.max_tokens, PLORA_ERROR_INVALID_ARGUMENT,
                "tokens is %lld: must be 0 .. %lld, the batch's max_tokens", (long long)tokens,
                (long long)batch->options.max_tokens);
    PLORA_CHECK(snapshot_count >= 0 && snapshot_count <= batch->options.max_adapters, PLORA_ERROR_INVALID_ARGUMENT,
                "snapshot_count is %d: must be 0 .. %d, the batch's max_adapters", snapshot_count,
                batch->options.max_adapters);
    PLORA_CHECK((slots != NULL || tokens == 0) && (snapshots != NULL || snapshot_count == 0),
                PLORA_ERROR_INVALID_ARGUMENT, "%s is NULL", slots == NULL && tokens > 0 ? "slots" : "snapshots");
    for (int32_t i = 0; i < snapshot_count; ++i)
        PLORA_TRY(check_snapshot(batch, snapshots[i], i, merged));
    for (int64_t t = 0; t < tokens; ++t)
        PLORA_CHECK(slots[t] >= -1 && slots[t] < snapshot_count, PLORA_ERROR_INVALID_ARGUMENT,
                    "slots[%lld] is %d: must be -1 .. %d", (long long)t, slots[t], snapshot_count - 1);
    return PLORA_OK;
}

static void hold(plora_batch *batch, plora_snapshot *const *snapshots, int32_t snapshot_count)
{
    for (int32_t i = 0; i < snapshot_count; ++i)
        plora_snapshot_retain(snapshots[i]); /* first: some may be those that are released now */
    release_held(batch);
    if (snapshot_count > 0) memcpy(batch->held, snapshots, (size_t)snapshot_count * sizeof(void *));
    batch->held_count = snapshot_count;
}

/* Sorts the tokens by snapshot, each snapshot's in their order, and returns the size of the image. A merged one has nothing to add. */
static size_t sort_tokens(plora_batch *batch, const int32_t *slots)
{
    const int32_t adapters = batch->merged == NULL ? batch->held_count : 0;
    int32_t *counts = batch->counts, listed = 0, segment_count = 0;
    for (int32_t i = 0; i < adapters; ++i)
        counts[i] = 0;
    for (int64_t t = 0; t < batch->tokens; ++t)
        if (slots[t] >= 0 && adapters > 0) counts[slots[t]]++;
    const void **tables = (const void **)batch->image;
    batch->segments_at = (size_t)adapters * sizeof *tables;
    struct plora__batch_segment *segments = (struct plora__batch_segment *)(batch->image + batch->segments_at);
    for (int32_t i = 0; i < adapters; ++i) {
        tables[i] = batch->held[i]->memory;
        if (counts[i] == 0) continue;
        segments[segment_count++] = (struct plora__batch_segment){.slot = i, .first = listed, .count = counts[i]};
        listed += counts[i];
        counts[i] = listed - counts[i];
    }
    batch->list_at = batch->segments_at + (size_t)segment_count * sizeof *segments;
    int32_t *list = (int32_t *)(batch->image + batch->list_at);
    batch->in_order = 1;
    for (int64_t t = 0; t < batch->tokens && listed > 0; ++t) {
        if (slots[t] < 0) continue;
        const int32_t place = counts[slots[t]]++;
        list[place] = (int32_t)t;
        batch->in_order &= place == t;
    }
    batch->listed = listed;
    batch->segment_count = segment_count;
    batch->tiles = plora__batch_cut(segments, segment_count);
    return batch->list_at + (batch->in_order ? 0 : (size_t)listed * sizeof *list);
}

plora_status plora_batch_begin(plora_batch *batch, int64_t tokens, const int32_t *slots,
                               plora_snapshot *const *snapshots, int32_t snapshot_count, void *stream)
{
    PLORA_CHECK(batch != NULL, PLORA_ERROR_INVALID_ARGUMENT, "batch is NULL");
    const plora_context *context = batch->model->context;
    const plora_snapshot *merged = atomic_load(&batch->model->merged);
    PLORA_TRY(check_begin(batch, tokens, slots, snapshots, snapshot_count, merged));
    PLORA_TRY(plora__check_stream(context, stream, 0));
    hold(batch, snapshots, snapshot_count);
    batch->merged = merged;
    batch->tokens = tokens;
    const size_t bytes = sort_tokens(batch, slots);
    return context->backend->write(context->device, batch->block, batch->image, bytes, stream);
}

/* -------------------------------------------------------------------------------------------------------------- layers */

static plora_status check_forward(const plora_batch *batch, const int32_t *layers, int32_t layer_count,
                                  const plora_matrix *x, const plora_matrix *y, uint32_t flags, void *stream)
{
    const plora_model *model = batch->model;
    PLORA_CHECK(layers != NULL && x != NULL && y != NULL, PLORA_ERROR_INVALID_ARGUMENT, "%s is NULL",
                layers == NULL ? "layers"
                : x == NULL    ? "x"
                               : "y");
    PLORA_CHECK(layer_count >= 1, PLORA_ERROR_INVALID_ARGUMENT, "layer_count is %d: must be >= 1", layer_count);
    PLORA_CHECK((flags & ~(uint32_t)PLORA_LINEAR_DELTA_ONLY) == 0, PLORA_ERROR_INVALID_ARGUMENT, "unknown flags 0x%x",
                flags & ~(uint32_t)PLORA_LINEAR_DELTA_ONLY);
    PLORA_TRY(plora__check_stream(model->context, stream, 0));
    for (int32_t i = 0; i < layer_count; ++i) {
        PLORA_CHECK(layers[i] >= 0 && layers[i] < model->layer_count, PLORA_ERROR_INVALID_ARGUMENT,
                    "layers[%d] is %d: the model has layers 0 .. %d", i, layers[i], model->layer_count - 1);
        const struct plora__layer *layer = &model->layers[layers[i]];
        PLORA_TRY(plora__check_gathered(model, layers[i], flags));
        PLORA_TRY(plora__check_activation(x, "x", layer->name, batch->tokens, layer->in_features));
        PLORA_TRY(plora__check_activation(&y[i], "y", layer->name, batch->tokens, layer->out_features));
        PLORA_CHECK(!plora__matrix_overlap(x, &y[i]), PLORA_ERROR_INVALID_ARGUMENT,
                    "layer '%s': x at %p and y at %p overlap", layer->name, x->data, y[i].data);
        for (int32_t j = 0; j < i; ++j)
            PLORA_CHECK(!plora__matrix_overlap(&y[j], &y[i]), PLORA_ERROR_INVALID_ARGUMENT,
                        "layer '%s': y[%d] at %p and y[%d] at %p overlap", layer->name, j, y[j].data, i, y[i].data);
    }
    PLORA_CHECK(atomic_load(&model->merged) == batch->merged, PLORA_ERROR_BUSY,
                "an adapter was merged into the weights, or taken out of them, since plora_batch_begin()");
    return PLORA_OK;
}

/* The highest rank at a weight among the snapshots that have tokens. */
static int32_t rank_at(const plora_batch *batch, int32_t weight)
{
    const struct plora__batch_segment *segments =
        (const struct plora__batch_segment *)(batch->image + batch->segments_at);
    int64_t most = 0;
    for (int32_t i = 0; i < batch->segment_count; ++i) {
        const int64_t rank = batch->held[segments[i].slot]->factors[weight].rank;
        if (rank > most) most = rank;
    }
    return (int32_t)most;
}

/* As many targets at once as the workspace holds. */
static plora_status run(const plora_batch *batch, struct plora__batch_args *args, void *stream)
{
    const plora_context *context = batch->model->context;
    const struct plora__batch_target *targets = args->targets;
    for (int32_t left = args->target_count; left > 0; left -= args->target_count, targets += args->target_count) {
        args->targets = targets;
        args->target_count = left;
        while (args->target_count > 1 &&
               context->backend->batch_workspace(context->device, args) > batch->workspace_bytes)
            args->target_count--;
        PLORA_TRY(context->backend->batch_forward(context->device, args, stream));
    }
    return PLORA_OK;
}

static plora_status add_low_rank(const plora_batch *batch, const int32_t *layers, int32_t layer_count,
                                 const plora_matrix *x, const plora_matrix *y, void *stream)
{
    const plora_model *model = batch->model;
    struct plora__batch_target targets[PLORA__BATCH_TARGETS];
    struct plora__batch_args args = {
        .tokens = batch->listed,
        .in_features = x->columns,
        .segment_count = batch->segment_count,
        .tiles = batch->tiles,
        .segments = (const struct plora__batch_segment *)(batch->block + batch->segments_at),
        .adapters = (const struct plora__batch_slot *const *)batch->block,
        .list = batch->in_order ? NULL : (const int32_t *)(batch->block + batch->list_at),
        .x = *x,
        .workspace = batch->workspace,
    };
    if (batch->listed == 0) return PLORA_OK;
    for (int32_t i = 0; i < layer_count;) {
        int32_t count = 0;
        for (; i < layer_count && count < PLORA__BATCH_TARGETS; ++i) {
            const struct plora__layer *layer = &model->layers[layers[i]];
            const int32_t rank = rank_at(batch, layer->weight);
            if (rank > 0)
                targets[count++] = (struct plora__batch_target){layer->weight, rank, layer->out_features, y[i]};
        }
        args.targets = targets;
        args.target_count = count;
        PLORA_TRY(run(batch, &args, stream));
    }
    return PLORA_OK;
}

plora_status plora_batch_forward(plora_batch *batch, const int32_t *layers, int32_t layer_count, const plora_matrix *x,
                                 const plora_matrix *y, uint32_t flags, void *stream)
{
    PLORA_CHECK(batch != NULL, PLORA_ERROR_INVALID_ARGUMENT, "batch is NULL");
    PLORA_TRY(check_forward(batch, layers, layer_count, x, y, flags, stream));
    if ((flags & PLORA_LINEAR_DELTA_ONLY) == 0)
        for (int32_t i = 0; i < layer_count; ++i)
            PLORA_TRY(plora_linear_forward(batch->plain, layers[i], x, &y[i], 0, stream));
    return add_low_rank(batch, layers, layer_count, x, y, stream);
}
