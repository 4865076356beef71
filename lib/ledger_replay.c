/* ledger_replay.c: weights rebuilt from W_0 and records, by the merges that made them.
 *
 *     for each weight:  [W <- W_0]  ->  merge record `from`  ->  ...  ->  merge record `to` - 1
 *
 * Of a quantised weight it is the master that is rebuilt, on the host, and its codes are made from that at the end.
 *
 * Never by subtraction, which rounds. prepare() checks the records' bytes, W_0 and all that run() needs, so that run() fails only if
 * the device does; then the position stays unknown. */
#include <math.h>

#include "dtype.h"
#include "hash.h"
#include "ledger.h"

/* -------------------------------------------------------------------------------------------------------- original weights */

/* A model's own files, opened once more. A CUDA context would copy them to the device: they are read through one of the CPU. */
static plora_status open_files(const plora_model *model, plora_model **original)
{
    plora_context *context = model->context;
    if (context->options.backend == PLORA_BACKEND_CPU) return plora_model_open(context, model->path, original);
    plora_context_options options = PLORA_CONTEXT_OPTIONS_INIT;
    options.host_allocate = context->options.host_allocate;
    options.host_free = context->options.host_free;
    options.host_user = context->options.host_user;
    plora_context *reader;
    PLORA_TRY(plora_context_create(&options, &reader));
    const plora_status status = plora_model_open(reader, model->path, original);
    plora_context_destroy(reader);
    return status;
}

static const plora_matrix *matrix_of(const plora_adapters *adapters, int32_t number)
{
    return &adapters->model->weights[adapters->adapters[number].weight].matrix;
}

static int is_quantised(const plora_adapters *adapters, int32_t number)
{
    return adapters->model->weights[adapters->adapters[number].weight].quantised != NULL;
}

static const char *name_of(const plora_adapters *adapters, int32_t number)
{
    return adapters->model->layers[adapters->adapters[number].layer].name;
}

static plora_status find_original(const struct plora__replay *replay, int32_t number, const plora_matrix **matrix)
{
    int32_t layer;
    PLORA_TRY(plora_model_find_layer(replay->original, name_of(replay->ledger->adapters, number), &layer));
    *matrix = &replay->original->weights[replay->original->layers[layer].weight].matrix;
    return PLORA_OK;
}

static plora_status check_original(const struct plora__replay *replay)
{
    const plora_ledger *ledger = replay->ledger;
    const plora_adapters *adapters = ledger->adapters;
    for (int32_t i = 0; i < adapters->adapter_count; ++i) {
        const plora_matrix *from, *to = matrix_of(adapters, i);
        uint64_t hash;
        PLORA_TRY(find_original(replay, i, &from));
        PLORA_CHECK(from->data != NULL, PLORA_ERROR_INVALID_ARGUMENT,
                    "layer '%s': the original weight is quantised and has no master", name_of(adapters, i));
        PLORA_CHECK(from->rows == to->rows && from->columns == to->columns && from->dtype == to->dtype,
                    PLORA_ERROR_INVALID_ARGUMENT,
                    "layer '%s': the original weight is [%lld,%lld] %s, the model's is [%lld,%lld] %s",
                    name_of(adapters, i), (long long)from->rows, (long long)from->columns,
                    plora__dtype_name(from->dtype), (long long)to->rows, (long long)to->columns,
                    plora__dtype_name(to->dtype));
        PLORA_TRY(plora__ledger_hash_weight(replay->original->context, from, NULL, &hash));
        PLORA_CHECK(hash == plora__ledger_layers(ledger->store.header)[i].weight_hash, PLORA_ERROR_INVALID_ARGUMENT,
                    "layer '%s': the original weight is not the one that the ledger began with", name_of(adapters, i));
    }
    return PLORA_OK;
}

/* -------------------------------------------------------------------------------------------------------------- preparing */

static plora_status get_original(struct plora__replay *replay)
{
    const plora_ledger *ledger = replay->ledger;
    const plora_model *model = ledger->adapters->model;
    PLORA_CHECK(
        ledger->original != NULL || model->path != NULL, PLORA_ERROR_INVALID_ARGUMENT,
        "to roll back from %lld (-1 = unknown) to %lld records takes the original weights, which the ledger was "
        "not given",
        (long long)ledger->position, (long long)replay->to);
    if (ledger->original != NULL) {
        replay->original = ledger->original;
        plora__model_retain(replay->original);
    } else
        PLORA_TRY(open_files(model, &replay->original));
    return check_original(replay);
}

/* Device memory for the largest of the merges. On the CPU the factors are read where they are. */
static plora_status get_scratch(struct plora__replay *replay)
{
    plora_ledger *ledger = replay->ledger;
    const plora_adapters *adapters = ledger->adapters;
    plora_context *context = adapters->model->context;
    const int copies = context->options.backend != PLORA_BACKEND_CPU;
    for (int64_t t = replay->from; t < replay->to; ++t) {
        const struct plora__ledger_record *record;
        PLORA_TRY(plora__ledger_record_get(&ledger->store, t, &record, NULL));
        for (int32_t i = 0; i < adapters->adapter_count; ++i) {
            const int64_t rank = plora__ledger_entries(record)[i].rank;
            const struct plora__adapter *adapter = &adapters->adapters[i];
            const struct plora__merge_args args = plora__merge_factors(adapters, i, NULL, NULL, rank, 1.0);
            if (is_quantised(adapters, i)) {
                const size_t bytes = plora__cpu_backend.merge_workspace(adapters->model->host_device, &args);
                if (bytes > replay->host_workspace_bytes) replay->host_workspace_bytes = bytes;
                continue;
            }
            const size_t workspace = context->backend->merge_workspace(context->device, &args);
            const size_t factors =
                copies ? (size_t)(rank * (adapter->in_features + adapter->out_features)) * sizeof(float) : 0;
            if (workspace > replay->workspace_bytes) replay->workspace_bytes = workspace;
            if (factors > replay->factor_bytes) replay->factor_bytes = factors;
        }
    }
    PLORA_TRY(plora__allocate(context, replay->host_workspace_bytes, &replay->host_workspace));
    PLORA_TRY(plora__device_allocate(context, replay->workspace_bytes, &replay->workspace));
    return plora__device_allocate(context, replay->factor_bytes, &replay->factors);
}

/* What was merged with a residual needs one again. */
static plora_status check_rounding(const struct plora__replay *replay, int64_t t, int32_t rounding)
{
    const plora_adapters *adapters = replay->ledger->adapters;
    for (int32_t i = 0; rounding == PLORA_ROUND_RESIDUAL && i < adapters->adapter_count; ++i)
        PLORA_CHECK(matrix_of(adapters, i)->dtype == PLORA_F32 ||
                        adapters->model->weights[adapters->adapters[i].weight].residual != NULL,
                    PLORA_ERROR_INVALID_ARGUMENT,
                    "record %lld was merged with a residual, which layer '%s' does not keep: create the adapters with "
                    "PLORA_RESIDUAL_DEVICE or _HOST",
                    (long long)t, name_of(adapters, i));
    return PLORA_OK;
}

static plora_status check_records(struct plora__replay *replay)
{
    for (int64_t t = replay->from; t < replay->to; ++t) {
        const struct plora__ledger_record *record;
        PLORA_TRY(plora__ledger_record_check(&replay->ledger->store, t));
        PLORA_TRY(plora__ledger_record_get(&replay->ledger->store, t, &record, NULL));
        PLORA_CHECK(
            (record->flags & PLORA__LEDGER_FOLDED) == 0, PLORA_ERROR_UNSUPPORTED,
            "record %lld stands for %llu records of a compacted ledger: the weights behind it cannot be rebuilt",
            (long long)t, (unsigned long long)record->folded);
        PLORA_TRY(check_rounding(replay, t, record->rounding));
    }
    return PLORA_OK;
}

/* `present`: the present weights may be gone on with. */
static plora_status prepare(plora_ledger *ledger, int64_t to, int present, struct plora__replay *replay)
{
    *replay = (struct plora__replay){.ledger = ledger, .to = to};
    if (present && ledger->position >= 0 && ledger->position <= to)
        replay->from = ledger->position;
    else
        PLORA_TRY(get_original(replay));
    PLORA_TRY(check_records(replay));
    return get_scratch(replay);
}

plora_status plora__replay_prepare(plora_ledger *ledger, int64_t to, struct plora__replay *replay)
{
    return prepare(ledger, to, 1, replay);
}

void plora__replay_free(struct plora__replay *replay)
{
    plora_context *context = replay->ledger->adapters->model->context;
    plora__free(context, replay->host_workspace, replay->host_workspace_bytes);
    plora__device_free(context, replay->workspace, replay->workspace_bytes);
    plora__device_free(context, replay->factors, replay->factor_bytes);
    if (replay->original != NULL) plora__model_release(replay->original);
}

/* ---------------------------------------------------------------------------------------------------------------- merging */

static plora_status copy_original(const struct plora__replay *replay, int32_t number, const plora_matrix *to)
{
    const plora_context *context = replay->ledger->adapters->model->context;
    const size_t size = plora__dtype_size(to->dtype);
    const plora_matrix *from;
    PLORA_TRY(find_original(replay, number, &from));
    const char *source = from->data;
    char *target = to->data;
    const int dense = from->stride == from->columns && to->stride == to->columns;
    const int64_t rows = dense ? 1 : to->rows;
    const size_t bytes = (size_t)(dense ? to->rows * to->columns : to->columns) * size;
    for (int64_t i = 0; i < rows; ++i) {
        PLORA_TRY(context->backend->copy(context->device, target, source, bytes, NULL));
        source += (size_t)from->stride * size;
        target += (size_t)to->stride * size;
    }
    return is_quantised(replay->ledger->adapters, number) ? context->backend->synchronize(context->device, NULL)
                                                          : PLORA_OK; /* the host goes on with it at once */
}

/* One record's merge into `weight`, which is adapter `number`'s, or a copy of it with a residual of its own. */
static plora_status merge_record(const struct plora__replay *replay, int64_t t, int32_t number,
                                 const plora_matrix *weight, uint16_t *residual)
{
    plora_ledger *ledger = replay->ledger;
    const plora_adapters *adapters = ledger->adapters;
    const plora_context *context = adapters->model->context;
    const struct plora__adapter *adapter = &adapters->adapters[number];
    const struct plora__ledger_record *record;
    PLORA_TRY(plora__ledger_record_get(&ledger->store, t, &record, NULL));
    const struct plora__ledger_entry *entry = &plora__ledger_entries(record)[number];
    const int64_t rank = entry->rank;
    const float *factors[2];
    for (int i = 0; i < 2; ++i)
        factors[i] = (const float *)((const char *)record +
                                     plora__ledger_factor_offset(ledger->store.header, record, (uint32_t)number, i));
    const int on_host = is_quantised(adapters, number);
    if (replay->factors != NULL && !on_host) {
        float *a = replay->factors, *b = a + rank * adapter->in_features;
        const size_t a_bytes = (size_t)(rank * adapter->in_features) * sizeof(float);
        const size_t b_bytes = (size_t)(rank * adapter->out_features) * sizeof(float);
        PLORA_TRY(context->backend->copy(context->device, a, factors[0], a_bytes, NULL));
        PLORA_TRY(context->backend->copy(context->device, b, factors[1], b_bytes, NULL));
        factors[0] = a;
        factors[1] = b;
    }
    struct plora__merge_args args =
        plora__merge_factors(adapters, number, factors[0], factors[1], rank, record->momentum * entry->scale);
    plora__merge_round(adapters, number, record->rounding, record->seed, record->stage, &args);
    args.weight = *weight;
    args.workspace = on_host ? replay->host_workspace : replay->workspace;
    if (on_host) return plora__merge_host(adapters, &args);
    if (residual != NULL && args.residual != NULL) args.residual = residual;
    return plora__merge(adapters, number, &args, NULL);
}

/* `residual` NULL: the weight's own, if it keeps one. */
static plora_status rebuild(const struct plora__replay *replay, int32_t number, const plora_matrix *weight,
                            uint16_t *residual)
{
    const plora_adapters *adapters = replay->ledger->adapters;
    const plora_context *context = adapters->model->context;
    const struct plora__weight *kept = &adapters->model->weights[adapters->adapters[number].weight];
    if (replay->original != NULL) {
        PLORA_TRY(copy_original(replay, number, weight));
        PLORA_TRY(residual == NULL
                      ? plora__residual_clear(adapters, number, NULL)
                      : context->backend->clear(context->device, residual, plora__residual_bytes(kept), NULL));
    }
    for (int64_t t = replay->from; t < replay->to; ++t)
        PLORA_TRY(merge_record(replay, t, number, weight, residual));
    return PLORA_OK;
}

plora_status plora__replay_run(struct plora__replay *replay)
{
    plora_ledger *ledger = replay->ledger;
    const plora_adapters *adapters = ledger->adapters;
    const plora_context *context = adapters->model->context;
    if (replay->original == NULL && replay->from == replay->to) return PLORA_OK;
    ledger->position = -1;
    for (int32_t i = 0; i < adapters->adapter_count; ++i)
        PLORA_TRY(rebuild(replay, i, matrix_of(adapters, i), NULL));
    PLORA_TRY(context->backend->synchronize(context->device, NULL));
    PLORA_TRY(plora__requantise_set(adapters));
    ledger->hashes_known = 0;
    if (ledger->hash_weights) PLORA_TRY(plora__ledger_hash_weights(ledger));
    ledger->position = replay->to;
    return PLORA_OK;
}

/* -------------------------------------------------------------------------------------------------------------- roll back */

/* The adapters can be given the record's factors. */
static plora_status check_ranks(plora_ledger *ledger, int64_t index)
{
    const plora_adapters *adapters = ledger->adapters;
    const struct plora__ledger_record *record;
    PLORA_TRY(plora__ledger_record_get(&ledger->store, index, &record, NULL));
    for (int32_t i = 0; i < adapters->adapter_count; ++i) {
        const struct plora__ledger_entry *entry = &plora__ledger_entries(record)[i];
        PLORA_CHECK(record->momentum == 1.0 || entry->rank == adapters->adapters[i].rank, PLORA_ERROR_SHAPE,
                    "layer '%s': record %lld left an adapter of rank %d, here it has %lld", name_of(adapters, i),
                    (long long)index, entry->rank, (long long)adapters->adapters[i].rank);
    }
    return PLORA_OK;
}

/* The adapters as they were right after unload `count` - 1, or before the first. */
static plora_status restore_adapters(plora_ledger *ledger, int64_t count)
{
    plora_adapters *adapters = ledger->adapters;
    const plora_context *context = adapters->model->context;
    const size_t bytes = (size_t)adapters->parameter_count * sizeof(float);
    const struct plora__ledger_record *record = NULL;
    if (ledger->store.count > 0)
        PLORA_TRY(plora__ledger_record_get(&ledger->store, count > 0 ? count - 1 : 0, &record, NULL));
    if (record != NULL) adapters->stage = record->stage + (count > 0);
    PLORA_TRY(context->backend->clear(context->device, adapters->gradients, bytes, NULL));
    if (record == NULL || count == 0 || record->momentum == 1.0) {
        PLORA_TRY(plora__adapters_init(adapters, NULL));
        return context->backend->synchronize(context->device, NULL);
    }
    const uint64_t factors = plora__ledger_table_bytes(record->layer_count);
    PLORA_TRY(
        context->backend->copy(context->device, adapters->parameters, (const char *)record + factors, bytes, NULL));
    PLORA_TRY(context->backend->scale(context->device, adapters->parameters, adapters->parameter_count,
                                      (float)sqrt(1.0 - record->momentum), NULL));
    return context->backend->synchronize(context->device, NULL);
}

plora_status plora_ledger_roll_back(plora_ledger *ledger, int64_t record_count, uint32_t flags)
{
    PLORA_CHECK(ledger != NULL, PLORA_ERROR_INVALID_ARGUMENT, "ledger is NULL");
    PLORA_CHECK((flags & ~(uint32_t)PLORA_LEDGER_WEIGHTS_ONLY) == 0, PLORA_ERROR_INVALID_ARGUMENT, "unknown flags 0x%x",
                (unsigned)flags);
    PLORA_CHECK(record_count >= 0 && record_count <= ledger->store.count, PLORA_ERROR_INVALID_ARGUMENT,
                "record_count is %lld: the ledger has %lld records", (long long)record_count,
                (long long)ledger->store.count);
    const plora_context *context = ledger->adapters->model->context;
    PLORA_TRY(plora__weights_check(ledger->adapters->model));
    const int weights_only = (flags & PLORA_LEDGER_WEIGHTS_ONLY) != 0;
    PLORA_TRY(context->backend->synchronize(context->device, NULL));
    if (!weights_only && record_count > 0) PLORA_TRY(check_ranks(ledger, record_count - 1));
    struct plora__replay replay;
    plora_status status = plora__replay_prepare(ledger, record_count, &replay);
    if (status == PLORA_OK) status = plora__replay_run(&replay);
    if (status == PLORA_OK && !weights_only) status = restore_adapters(ledger, record_count);
    plora__replay_free(&replay);
    return status;
}

/* ----------------------------------------------------------------------------------------------------------------- verify */

static plora_status differs(const plora_ledger *ledger, int32_t number)
{
    return plora__fail(PLORA_ERROR_INVALID_ARGUMENT, "layer '%s': the weight is not that of %lld records",
                       name_of(ledger->adapters, number), (long long)ledger->position);
}

/* Rebuilds one weight after the other in device memory and compares hashes. */
static plora_status verify_by_replay(plora_ledger *ledger, struct plora__replay *replay)
{
    const plora_adapters *adapters = ledger->adapters;
    plora_context *context = adapters->model->context;
    size_t most = 0, most_residual = 0, most_here = 0;
    for (int32_t i = 0; i < adapters->adapter_count; ++i) {
        const struct plora__weight *kept = &adapters->model->weights[adapters->adapters[i].weight];
        const plora_matrix *weight = &kept->matrix;
        const size_t bytes = (size_t)(weight->rows * weight->columns) * plora__dtype_size(weight->dtype);
        size_t *largest = kept->quantised != NULL ? &most_here : &most;
        if (bytes > *largest) *largest = bytes;
        if (kept->residual != NULL && plora__residual_bytes(kept) > most_residual)
            most_residual = plora__residual_bytes(kept);
    }
    void *memory = NULL, *residual = NULL, *here = NULL;
    plora_status status = PLORA_OK;
    PLORA_TRY_OUT(plora__allocate(context, most_here, &here));
    PLORA_TRY_OUT(plora__device_allocate(context, most, &memory));
    PLORA_TRY_OUT(plora__device_allocate(context, most_residual, &residual));
    for (int32_t i = 0; i < adapters->adapter_count; ++i) {
        plora_matrix copy = *matrix_of(adapters, i);
        uint64_t hash;
        copy.data = is_quantised(adapters, i) ? here : memory;
        copy.stride = copy.columns;
        plora_matrix low = plora__residual_matrix(&adapters->model->weights[adapters->adapters[i].weight]);
        if (low.data != NULL) low.data = residual;
        PLORA_TRY_OUT(rebuild(replay, i, &copy, low.data));
        PLORA_TRY_OUT(context->backend->synchronize(context->device, NULL));
        PLORA_TRY_OUT(plora__ledger_hash_weight(context, &copy, &low, &hash));
        if (hash != ledger->weight_hashes[i]) {
            status = differs(ledger, i);
            break;
        }
    }
out:
    plora__device_free(context, residual, most_residual);
    plora__device_free(context, memory, most);
    plora__free(context, here, most_here);
    return status;
}

/* The hash of all weights that the ledger recorded for its position, if it did. */
static plora_status recorded_hash(plora_ledger *ledger, int *known, uint64_t *hash)
{
    *known = 0;
    if (ledger->position == 0) return PLORA_OK;
    const struct plora__ledger_record *record;
    const struct plora__ledger_mark *mark;
    PLORA_TRY(plora__ledger_record_get(&ledger->store, ledger->position - 1, &record, &mark));
    if (mark == NULL || (mark->flags & PLORA__LEDGER_HASHED) == 0) return PLORA_OK;
    *known = 1;
    *hash = mark->weights_hash;
    return PLORA_OK;
}

plora_status plora_ledger_verify(plora_ledger *ledger)
{
    PLORA_CHECK(ledger != NULL, PLORA_ERROR_INVALID_ARGUMENT, "ledger is NULL");
    PLORA_CHECK(ledger->position >= 0, PLORA_ERROR_INVALID_ARGUMENT,
                "how many of the ledger's %lld records the weights hold is not known", (long long)ledger->store.count);
    const plora_context *context = ledger->adapters->model->context;
    const struct plora__ledger_layer *layers = plora__ledger_layers(ledger->store.header);
    int known;
    uint64_t hash = 0;
    PLORA_TRY(context->backend->synchronize(context->device, NULL));
    PLORA_TRY(recorded_hash(ledger, &known, &hash));
    PLORA_TRY(plora__ledger_hash_weights(ledger));
    for (int32_t i = 0; ledger->position == 0 && i < ledger->adapters->adapter_count; ++i)
        if (ledger->weight_hashes[i] != layers[i].weight_hash) return differs(ledger, i);
    if (ledger->position == 0 || (known && plora__ledger_combined_hash(ledger) == hash)) return PLORA_OK;
    const int named = ledger->original != NULL || ledger->adapters->model->path != NULL;
    PLORA_CHECK(!known || named, PLORA_ERROR_INVALID_ARGUMENT,
                "the weights do not have the hash that was recorded with %lld records", (long long)ledger->position);
    struct plora__replay replay;
    plora_status status = prepare(ledger, ledger->position, 0, &replay);
    if (status == PLORA_OK) status = verify_by_replay(ledger, &replay);
    plora__replay_free(&replay);
    PLORA_CHECK(status != PLORA_OK || !known, PLORA_ERROR_INVALID_ARGUMENT,
                "the weights are those of %lld records, but do not have the hash recorded with them",
                (long long)ledger->position);
    return status;
}
