/* ledger.c: the handle of the stage ledger: which model it belongs to, the record of an unload, queries.
 *
 *     unload:  check values -> append (durable) -> merge -> commit (mark)
 *
 * A process that dies in between loses its weights, so nothing has to say how far the merges came: they are done again from W_0.
 * Within a process `position` says it. Rebuilding is ledger_replay.c's, the bytes are ledger_file.c's. */
#include "ledger.h"

#include <string.h>

#include "dtype.h"
#include "hash.h"

/* ------------------------------------------------------------------------------------------------------------- hashing */

enum { CHUNK_BYTES = 1 << 22 };

static int is_zero(const char *row, size_t bytes)
{
    return row[0] == 0 && memcmp(row, row + 1, bytes - 1) == 0;
}

/* Chains the rows of a matrix to a hash, and notes whether all of it is 0. */
static plora_status hash_matrix(const plora_context *context, const plora_matrix *matrix, uint64_t *hash, int *zero)
{
    const size_t size = plora__dtype_size(matrix->dtype);
    const size_t bytes = (size_t)matrix->columns * size, stride = (size_t)matrix->stride * size;
    const int here = context->options.backend == PLORA_BACKEND_CPU;
    const int64_t most = here ? matrix->rows : stride < CHUNK_BYTES ? (int64_t)(CHUNK_BYTES / stride) : 1;
    plora_context *owner = (plora_context *)(uintptr_t)context; /* memory is no part of its state */
    plora_status status = PLORA_OK;
    void *chunk = matrix->data;
    if (!here) PLORA_TRY(plora__allocate(owner, (size_t)most * stride, &chunk));
    *zero = 1;
    for (int64_t i = 0; i < matrix->rows && status == PLORA_OK; i += most) {
        const int64_t rows = matrix->rows - i < most ? matrix->rows - i : most;
        const size_t count = (size_t)(rows - 1) * stride + bytes; /* nothing may lie behind the last row */
        if (!here)
            status = plora__read_device(context, chunk, (const char *)matrix->data + (size_t)i * stride, count, NULL);
        *hash = plora__hash_rows(chunk, rows, bytes, stride, *hash);
        for (int64_t row = 0; *zero && row < rows; ++row)
            *zero = is_zero((const char *)chunk + (size_t)row * stride, bytes);
    }
    if (!here) plora__free(owner, chunk, (size_t)most * stride);
    return status;
}

plora_status plora__ledger_hash_weight(const plora_context *context, const plora_matrix *weight,
                                       const plora_matrix *residual, uint64_t *hash)
{
    int zero;
    *hash = 0;
    PLORA_TRY(hash_matrix(context, weight, hash, &zero));
    if (residual == NULL || residual->data == NULL) return PLORA_OK;
    uint64_t both = *hash;
    PLORA_TRY(hash_matrix(context, residual, &both, &zero));
    if (!zero) *hash = both;
    return PLORA_OK;
}

static const plora_matrix *weight_of(const plora_adapters *adapters, int32_t number)
{
    return &adapters->model->weights[adapters->adapters[number].weight].matrix;
}

plora_status plora__ledger_hash_weights(plora_ledger *ledger)
{
    const plora_adapters *adapters = ledger->adapters;
    ledger->hashes_known = 0;
    for (int32_t i = 0; i < adapters->adapter_count; ++i) {
        const struct plora__weight *weight = &adapters->model->weights[adapters->adapters[i].weight];
        const plora_matrix residual = plora__residual_matrix(weight);
        PLORA_TRY(
            plora__ledger_hash_weight(adapters->model->context, &weight->matrix, &residual, &ledger->weight_hashes[i]));
    }
    ledger->hashes_known = 1;
    return PLORA_OK;
}

uint64_t plora__ledger_combined_hash(const plora_ledger *ledger)
{
    uint64_t hash = 0;
    for (int32_t i = 0; i < ledger->adapters->adapter_count; ++i)
        hash = plora__hash(&ledger->weight_hashes[i], sizeof(uint64_t), hash);
    return hash;
}

/* ------------------------------------------------------------------------------------------------------------ identity */

static const char *name_of(const plora_adapters *adapters, int32_t number)
{
    return adapters->model->layers[adapters->adapters[number].layer].name;
}

/* The header of a ledger that begins with the present weights. */
static plora_status make_header(const plora_ledger *ledger, unsigned char **header, size_t *header_bytes)
{
    const plora_adapters *adapters = ledger->adapters;
    const uint32_t count = (uint32_t)adapters->adapter_count;
    uint64_t name_bytes = 0;
    for (uint32_t i = 0; i < count; ++i)
        name_bytes += strlen(name_of(adapters, (int32_t)i)) + 1;
    const uint64_t bytes = plora__ledger_header_bytes(count, name_bytes);
    void *memory;
    PLORA_TRY(plora__allocate_zeroed(adapters->model->context, bytes, &memory));
    struct plora__ledger_layer *layers = (struct plora__ledger_layer *)(uintptr_t)plora__ledger_layers(memory);
    char *name = (char *)(layers + count);
    for (uint32_t i = 0; i < count; ++i) {
        const struct plora__adapter *adapter = &adapters->adapters[i];
        const struct plora__weight *weight = &adapters->model->weights[adapter->weight];
        const char *text = name_of(adapters, (int32_t)i);
        const size_t length = strlen(text);
        layers[i] = (struct plora__ledger_layer){
            .name_offset = (uint64_t)(name - (char *)memory),
            .name_bytes = (uint32_t)length,
            .dtype = weight_of(adapters, (int32_t)i)->dtype,
            .in_features = adapter->in_features,
            .out_features = adapter->out_features,
            .fan_in_fan_out = weight->fan_in_fan_out,
            .gathered = weight->gathered,
            .weight_hash = ledger->weight_hashes[i],
        };
        if (!plora__shard_is_whole(weight))
            plora__shard_elements(weight, &layers[i].first_element, &layers[i].row_elements);
        memcpy(name, text, length + 1);
        name += length + 1;
    }
    plora__ledger_header_seal(memory, count, bytes);
    *header = memory;
    *header_bytes = bytes;
    return PLORA_OK;
}

/* Whether an existing ledger was made for these layers. */
static plora_status compare_headers(const unsigned char *there, const unsigned char *here)
{
    const uint32_t count = plora__ledger_layer_count(here);
    PLORA_CHECK(plora__ledger_layer_count(there) == count, PLORA_ERROR_INVALID_ARGUMENT,
                "the ledger is of %u adapters, here are %u", plora__ledger_layer_count(there), count);
    for (uint32_t i = 0; i < count; ++i) {
        const struct plora__ledger_layer *a = &plora__ledger_layers(there)[i], *b = &plora__ledger_layers(here)[i];
        const char *name = (const char *)there + a->name_offset, *other = (const char *)here + b->name_offset;
        PLORA_CHECK(strcmp(name, other) == 0, PLORA_ERROR_INVALID_ARGUMENT,
                    "adapter %u of the ledger is of layer '%.200s', here it is '%.200s'", i, name, other);
        PLORA_CHECK(a->in_features == b->in_features && a->out_features == b->out_features && a->dtype == b->dtype &&
                        a->fan_in_fan_out == b->fan_in_fan_out,
                    PLORA_ERROR_INVALID_ARGUMENT,
                    "layer '%.200s': N=%lld, K=%lld, %s%s in the ledger, N=%lld, K=%lld, %s%s here", name,
                    (long long)a->out_features, (long long)a->in_features, plora__dtype_name(a->dtype),
                    a->fan_in_fan_out ? ", stored [K,N]" : "", (long long)b->out_features, (long long)b->in_features,
                    plora__dtype_name(b->dtype), b->fan_in_fan_out ? ", stored [K,N]" : "");
        PLORA_CHECK(a->first_element == b->first_element && a->row_elements == b->row_elements &&
                        a->gathered == b->gathered,
                    PLORA_ERROR_INVALID_ARGUMENT,
                    "layer '%.200s': the ledger is of the shard from element %lld on, rows %lld apart (0: whole)%s, "
                    "here it is %lld, %lld%s",
                    name, (long long)a->first_element, (long long)a->row_elements, a->gathered ? ", gathered" : "",
                    (long long)b->first_element, (long long)b->row_elements, b->gathered ? ", gathered" : "");
    }
    return PLORA_OK;
}

/* The number of the first adapter whose weight differs from W_0, adapter_count = none. */
static int32_t first_difference(const plora_ledger *ledger)
{
    const struct plora__ledger_layer *layers = plora__ledger_layers(ledger->store.header);
    int32_t i = 0;
    while (i < ledger->adapters->adapter_count && layers[i].weight_hash == ledger->weight_hashes[i])
        ++i;
    return i;
}

/* Which W_t the present weights are. */
static plora_status find_position(plora_ledger *ledger)
{
    const plora_adapters *adapters = ledger->adapters;
    const int32_t different = first_difference(ledger);
    ledger->position = different == adapters->adapter_count ? 0 : -1;
    const uint64_t combined = plora__ledger_combined_hash(ledger);
    for (int64_t t = ledger->store.count; t > 0 && ledger->position < 0; --t) {
        const struct plora__ledger_record *record;
        const struct plora__ledger_mark *mark;
        PLORA_TRY(plora__ledger_record_get(&ledger->store, t - 1, &record, &mark));
        if (mark != NULL && (mark->flags & PLORA__LEDGER_HASHED) != 0 && mark->weights_hash == combined)
            ledger->position = t;
    }
    PLORA_CHECK(ledger->position >= 0 || ledger->original != NULL || adapters->model->path != NULL,
                PLORA_ERROR_INVALID_ARGUMENT,
                "layer '%s': its weight is not the one that the ledger began with, and there are no original weights",
                name_of(adapters, different));
    return PLORA_OK;
}

/* -------------------------------------------------------------------------------------------------- creation and end */

static plora_status check_masters(const plora_adapters *adapters)
{
    for (int32_t i = 0; i < adapters->adapter_count; ++i)
        PLORA_CHECK(weight_of(adapters, i)->data != NULL, PLORA_ERROR_UNSUPPORTED,
                    "layer '%s' is quantised without a master: no ledger can rebuild its weight", name_of(adapters, i));
    return PLORA_OK;
}

static plora_status check_original(const plora_adapters *adapters, const plora_model *original)
{
    if (original == NULL) return PLORA_OK;
    PLORA_CHECK(original != adapters->model, PLORA_ERROR_INVALID_ARGUMENT,
                "original is the adapters' own model, whose weights an unload changes");
    PLORA_CHECK(original->context == adapters->model->context ||
                    original->context->options.backend == PLORA_BACKEND_CPU,
                PLORA_ERROR_INVALID_ARGUMENT, "original belongs to another context, and not to one of the CPU");
    return PLORA_OK;
}

static plora_status allocate_arrays(plora_ledger *ledger)
{
    const plora_adapters *adapters = ledger->adapters;
    plora_context *context = adapters->model->context;
    void *memory;
    PLORA_TRY(plora__allocate(context, (size_t)adapters->adapter_count * sizeof(uint64_t), &memory));
    ledger->weight_hashes = memory;
    return PLORA_OK;
}

static size_t record_bytes(const plora_adapters *adapters)
{
    return plora__ledger_table_bytes((uint32_t)adapters->adapter_count) +
           (size_t)adapters->parameter_count * sizeof(float); /* the arena's layout is the record's */
}

/* The file form puts head and entries together here, and the factors too when they come from a device. */
static plora_status allocate_buffer(plora_ledger *ledger)
{
    const plora_adapters *adapters = ledger->adapters;
    plora_context *context = adapters->model->context;
    const int here = context->options.backend == PLORA_BACKEND_CPU;
    void *memory;
    ledger->buffer_bytes = here ? plora__ledger_table_bytes((uint32_t)adapters->adapter_count) : record_bytes(adapters);
    PLORA_TRY(plora__allocate(context, ledger->buffer_bytes, &memory));
    ledger->buffer = memory;
    return PLORA_OK;
}

static plora_status open_store(plora_ledger *ledger, const plora_ledger_options *options)
{
    plora_context *context = ledger->adapters->model->context;
    unsigned char *header = NULL;
    size_t header_bytes = 0;
    PLORA_TRY(context->backend->synchronize(context->device, NULL));
    PLORA_TRY(plora__ledger_hash_weights(ledger));
    if (options->path != NULL) PLORA_TRY(allocate_buffer(ledger));
    PLORA_TRY(make_header(ledger, &header, &header_bytes));
    plora_status status = plora__ledger_store_open(context, options->path, options->sync, header, &ledger->store);
    if (status == PLORA_OK) {
        status = compare_headers(ledger->store.header, header);
        if (status == PLORA_OK) status = find_position(ledger);
        if (status != PLORA_OK && options->path != NULL) plora__fail_in(status, options->path);
    }
    plora__free(context, header, header_bytes);
    return status;
}

plora_status plora_ledger_open(plora_adapters *adapters, const plora_ledger_options *given, plora_ledger **ledger)
{
    PLORA_CHECK(adapters != NULL && ledger != NULL, PLORA_ERROR_INVALID_ARGUMENT, "%s is NULL",
                adapters == NULL ? "adapters" : "ledger");
    plora_ledger_options options = PLORA_LEDGER_OPTIONS_INIT;
    PLORA_TRY(plora__read_options(&options, sizeof options, given, "plora_ledger_options"));
    PLORA_CHECK(options.path == NULL || options.path[0] != '\0', PLORA_ERROR_INVALID_ARGUMENT, "path is empty");
    PLORA_CHECK((options.sync == 0 || options.sync == 1) && (options.hash_weights == 0 || options.hash_weights == 1),
                PLORA_ERROR_INVALID_ARGUMENT, "sync is %d, hash_weights is %d: must be 0 or 1", options.sync,
                options.hash_weights);
    PLORA_CHECK(adapters->ledger == NULL, PLORA_ERROR_INVALID_ARGUMENT, "the adapters have a ledger already");
    PLORA_TRY(check_masters(adapters));
    PLORA_TRY(check_original(adapters, options.original));

    void *memory;
    PLORA_TRY(plora__allocate_zeroed(adapters->model->context, sizeof(plora_ledger), &memory));
    plora_ledger *created = memory;
    created->adapters = adapters;
    created->hash_weights = options.hash_weights;
    created->original = options.original;
    created->store.context = adapters->model->context;
    created->store.descriptor = -1;
    plora__adapters_retain(adapters);
    if (options.original != NULL) plora__model_retain(options.original);
    plora_status status;
    PLORA_TRY_OUT(allocate_arrays(created));
    PLORA_TRY_OUT(open_store(created, &options));
    adapters->ledger = created;
    *ledger = created;
    return PLORA_OK;
out:
    plora_ledger_destroy(created);
    return status;
}

void plora_ledger_destroy(plora_ledger *ledger)
{
    if (ledger == NULL) return;
    plora_adapters *adapters = ledger->adapters;
    plora_context *context = adapters->model->context;
    if (adapters->ledger == ledger) adapters->ledger = NULL;
    plora__ledger_store_close(&ledger->store);
    plora__free(context, ledger->weight_hashes, (size_t)adapters->adapter_count * sizeof(uint64_t));
    plora__free(context, ledger->buffer, ledger->buffer_bytes);
    if (ledger->original != NULL) plora__model_release(ledger->original);
    plora__free(context, ledger, sizeof *ledger);
    plora__adapters_release(adapters);
}

/* -------------------------------------------------------------------------------------------------------------- unload */

static void fill_record(const plora_ledger *ledger, const plora_unload_options *options,
                        struct plora__ledger_record *record)
{
    const plora_adapters *adapters = ledger->adapters;
    const uint32_t count = (uint32_t)adapters->adapter_count;
    *record = (struct plora__ledger_record){
        .bytes = record_bytes(adapters),
        .stage = adapters->stage,
        .momentum = options->momentum,
        .seed = adapters->options.seed,
        .rounding = options->rounding,
        .flags = ledger->hash_weights && ledger->hashes_known ? PLORA__LEDGER_HASHED : 0,
        .layer_count = count,
    };
    struct plora__ledger_entry *entries = (struct plora__ledger_entry *)(record + 1);
    memset(entries, 0, plora__ledger_table_bytes(count) - sizeof *record);
    for (uint32_t i = 0; i < count; ++i) {
        entries[i].scale = adapters->adapters[i].scale;
        entries[i].rank = (int32_t)adapters->adapters[i].rank;
        if ((record->flags & PLORA__LEDGER_HASHED) != 0) entries[i].weight_hash = ledger->weight_hashes[i];
    }
}

plora_status plora__ledger_append(plora_ledger *ledger, const plora_unload_options *options, void *stream)
{
    plora_adapters *adapters = ledger->adapters;
    plora_context *context = adapters->model->context;
    PLORA_CHECK(
        ledger->position == ledger->store.count, PLORA_ERROR_INVALID_ARGUMENT,
        "the ledger has %lld records, the weights hold %lld of them (-1 = unknown): roll them forward, or drop the "
        "records",
        (long long)ledger->store.count, (long long)ledger->position);
    const size_t bytes = record_bytes(adapters) + PLORA__LEDGER_MARK_BYTES;
    const size_t factor_bytes = (size_t)adapters->parameter_count * sizeof(float);
    void *memory = ledger->buffer;
    if (memory == NULL) PLORA_TRY(plora__allocate(context, bytes, &memory));
    struct plora__ledger_record *record = memory;
    float *behind = (float *)((char *)memory + plora__ledger_table_bytes((uint32_t)adapters->adapter_count));
    const float *factors = adapters->parameters;
    const int here = context->options.backend == PLORA_BACKEND_CPU;
    plora_status status = PLORA_OK;
    fill_record(ledger, options, record);
    if (!here) {
        PLORA_TRY_OUT(plora__read_device(context, behind, factors, factor_bytes, stream));
        factors = behind;
    }
    plora__ledger_record_seal(&ledger->store, record, factors, here && ledger->buffer == NULL ? behind : NULL);
    PLORA_TRY_OUT(plora__ledger_append_record(&ledger->store, record, factors));
    ledger->position = -1; /* until the merges are done */
    return PLORA_OK;
out:
    if (ledger->buffer == NULL) plora__free(context, memory, bytes);
    return status;
}

void plora__ledger_commit(plora_ledger *ledger, void *stream)
{
    const plora_context *context = ledger->adapters->model->context;
    int hashed = ledger->hash_weights;
    ledger->hashes_known = 0;
    if (hashed)
        hashed = context->backend->synchronize(context->device, stream) == PLORA_OK &&
                 plora__ledger_hash_weights(ledger) == PLORA_OK;
    ledger->position = ledger->store.count;
    const plora_status status = plora__ledger_write_mark(&ledger->store, hashed ? PLORA__LEDGER_HASHED : 0,
                                                         hashed ? plora__ledger_combined_hash(ledger) : 0);
    if (status != PLORA_OK) /* the record is whole without it, and the next append tries again */
        plora__log(context, PLORA_LOG_WARNING, "%s", plora_last_error());
}

/* ------------------------------------------------------------------------------------------------------------- queries */

int64_t plora_ledger_length(const plora_ledger *ledger)
{
    return ledger == NULL ? 0 : ledger->store.count;
}

int64_t plora_ledger_position(const plora_ledger *ledger)
{
    return ledger == NULL ? 0 : ledger->position;
}

static plora_status check_index(const plora_ledger *ledger, int64_t record)
{
    PLORA_CHECK(ledger != NULL, PLORA_ERROR_INVALID_ARGUMENT, "ledger is NULL");
    PLORA_CHECK(record >= 0 && record < ledger->store.count, PLORA_ERROR_INVALID_ARGUMENT,
                "record %lld: the ledger has %lld records", (long long)record, (long long)ledger->store.count);
    return PLORA_OK;
}

plora_status plora_ledger_record(plora_ledger *ledger, int64_t index, plora_ledger_record_info *info)
{
    PLORA_TRY(check_index(ledger, index));
    const struct plora__ledger_record *record;
    const struct plora__ledger_mark *mark;
    PLORA_TRY(plora__ledger_record_get(&ledger->store, index, &record, &mark));
    plora_ledger_record_info result = PLORA_LEDGER_RECORD_INFO_INIT;
    result.stage = record->stage;
    result.momentum = record->momentum;
    result.seed = record->seed;
    result.rounding = record->rounding;
    result.lineage_before = record->lineage_before;
    result.lineage_after = record->lineage_after;
    result.offset = ledger->store.slots[index].offset;
    result.bytes = record->bytes;
    if ((record->flags & PLORA__LEDGER_FOLDED) != 0) {
        result.folded = (int64_t)record->folded;
        result.fold_error = record->fold_norm > 0.0 ? record->fold_lost / record->fold_norm : 0.0;
    }
    if ((record->flags & PLORA__LEDGER_HASHED) != 0) {
        result.hashed |= 1;
        for (uint32_t i = 0; i < record->layer_count; ++i) /* as plora__ledger_combined_hash() */
            result.weights_before =
                plora__hash(&plora__ledger_entries(record)[i].weight_hash, sizeof(uint64_t), result.weights_before);
    }
    if (mark != NULL && (mark->flags & PLORA__LEDGER_HASHED) != 0) {
        result.hashed |= 2;
        result.weights_after = mark->weights_hash;
    }
    return plora__write_result(info, &result, sizeof result, "plora_ledger_record_info");
}

plora_status plora_ledger_factors(plora_ledger *ledger, int64_t index, int32_t layer, plora_matrix *a, plora_matrix *b,
                                  double *factor)
{
    PLORA_TRY(check_index(ledger, index));
    const plora_adapters *adapters = ledger->adapters;
    const plora_model *model = adapters->model;
    PLORA_CHECK(layer >= 0 && layer < model->layer_count, PLORA_ERROR_INVALID_ARGUMENT,
                "layer %d: the model has layers 0 .. %d", layer, model->layer_count - 1);
    const int32_t number = adapters->adapter_of_layer[layer];
    PLORA_CHECK(number >= 0, PLORA_ERROR_NOT_FOUND, "layer '%s' has no adapter", model->layers[layer].name);
    const struct plora__ledger_record *record;
    PLORA_TRY(plora__ledger_record_get(&ledger->store, index, &record, NULL));
    const struct plora__ledger_entry *entry = &plora__ledger_entries(record)[number];
    const struct plora__adapter *adapter = &adapters->adapters[number];
    char *bytes = (char *)(uintptr_t)record;
    float *at[2];
    for (int i = 0; i < 2; ++i)
        at[i] = (float *)(bytes + plora__ledger_factor_offset(ledger->store.header, record, (uint32_t)number, i));
    if (a != NULL) *a = (plora_matrix){at[0], entry->rank, adapter->in_features, adapter->in_features, PLORA_F32, 0};
    if (b != NULL) *b = (plora_matrix){at[1], adapter->out_features, entry->rank, entry->rank, PLORA_F32, 0};
    if (factor != NULL) *factor = record->momentum * entry->scale;
    return PLORA_OK;
}

plora_status plora_ledger_truncate(plora_ledger *ledger, int64_t record_count)
{
    PLORA_CHECK(ledger != NULL, PLORA_ERROR_INVALID_ARGUMENT, "ledger is NULL");
    PLORA_CHECK(record_count >= 0 && record_count >= ledger->position && record_count <= ledger->store.count,
                PLORA_ERROR_INVALID_ARGUMENT, "record_count is %lld: must be in %lld .. %lld", (long long)record_count,
                (long long)(ledger->position > 0 ? ledger->position : 0), (long long)ledger->store.count);
    return plora__ledger_cut(&ledger->store, record_count);
}
