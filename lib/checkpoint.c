/* checkpoint.c: the state of a run as one safetensors file.
 *
 *     tensors     parameters, first_moment, second_moment [count] fp32: the arenas as they lie in memory
 *                 weight.<layer> [rows, columns] in the weight's dtype, with PLORA_CHECKPOINT_WEIGHTS; of a quantised one its master
 *                 residual.<layer> [rows, columns] U16, of weights that keep one: with the weights, or when no ledger has them
 *     metadata    state: counters that a load restores
 *                 options: what must be the same in the run that loads, compared as text
 *                 adapters: one line per adapter, "layer N K rank scale", and the place of a shard
 *                 ledger: with a ledger, how many of its records the weights hold, and their lineage
 *                 checksum: of metadata and tensors
 *
 * Gradients are not saved: a checkpoint lies between two steps. A load checks the whole file before its first write. */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoint.h"
#include "dtype.h"
#include "hash.h"
#include "json.h"
#include "ledger.h"
#include "rounding.h"

/* ---------------------------------------------------------------------------------------------------------- description */

enum { ENTRIES_MAX = 40, VALUE_BYTES = 40 };

/* The metadata of the handles as they are now. Keys without a "state." in front are options. */
struct description {
    struct plora__metadata entries[ENTRIES_MAX];
    char values[ENTRIES_MAX][VALUE_BYTES];
    int32_t count;
    struct plora__text adapters;
};

static void describe_integer(struct description *description, const char *key, int64_t value)
{
    char *text = description->values[description->count];
    snprintf(text, VALUE_BYTES, "%" PRId64, value);
    description->entries[description->count++] = (struct plora__metadata){key, text};
}

static void describe_unsigned(struct description *description, const char *key, uint64_t value)
{
    char *text = description->values[description->count];
    snprintf(text, VALUE_BYTES, "%" PRIu64, value);
    description->entries[description->count++] = (struct plora__metadata){key, text};
}

/* 17 digits are exact; the point does not depend on the locale. */
static void describe_real(struct description *description, const char *key, double value)
{
    char *text = description->values[description->count];
    snprintf(text, VALUE_BYTES, "%.17g", value);
    for (char *c = text; *c != '\0'; ++c)
        if (strchr("0123456789+-einfa", *c) == NULL) *c = '.';
    description->entries[description->count++] = (struct plora__metadata){key, text};
}

static void describe_optimizer(struct description *description, const struct plora_optimizer *optimizer)
{
    const plora_optimizer_options *options = &optimizer->options;
    describe_integer(description, "state.step", optimizer->step);
    describe_integer(description, "state.schedule_step", optimizer->schedule_step);
    describe_integer(description, "state.total_steps", optimizer->total_steps);
    describe_integer(description, "state.last_unload_step", optimizer->last_unload_step);
    describe_integer(description, "optimizer.algorithm", options->algorithm);
    describe_integer(description, "optimizer.schedule", options->schedule);
    describe_real(description, "optimizer.learning_rate", options->learning_rate);
    describe_real(description, "optimizer.beta1", options->beta1);
    describe_real(description, "optimizer.beta2", options->beta2);
    describe_real(description, "optimizer.epsilon", options->epsilon);
    describe_real(description, "optimizer.weight_decay", options->weight_decay);
    describe_real(description, "optimizer.b_ratio", options->b_ratio);
    describe_real(description, "optimizer.max_gradient_norm", options->max_gradient_norm);
    describe_real(description, "optimizer.final_ratio", options->final_ratio);
    describe_integer(description, "optimizer.warmup_steps", options->warmup_steps);
    describe_integer(description, "optimizer.period_steps", options->period_steps);
    describe_integer(description, "optimizer.rewarmup_steps", options->rewarmup_steps);
}

static const struct plora__weight *weight_of(const plora_adapters *adapters, int32_t number)
{
    return &adapters->model->weights[adapters->adapters[number].weight];
}

static int64_t count_residuals(const plora_adapters *adapters)
{
    int64_t count = 0;
    for (int32_t i = 0; i < adapters->adapter_count; ++i)
        count += weight_of(adapters, i)->residual != NULL;
    return count;
}

/* A checkpoint of one shard is not for another, which has other weights, residuals and random numbers. */
static plora_status describe_shard(struct plora__text *text, const struct plora__weight *weight)
{
    const plora_shard *shard = &weight->shard;
    if (!plora__shard_is_whole(weight))
        PLORA_TRY(plora__text_format(text, " shard=%" PRId64 ",%" PRId64 " of %" PRId64 ",%" PRId64, shard->first_row,
                                     shard->first_column, shard->rows, shard->columns));
    return weight->gathered ? plora__text_format(text, " gathered [%" PRId64 ",%" PRId64 "]", weight->matrix.rows,
                                                 weight->matrix.columns)
                            : PLORA_OK;
}

static plora_status describe(struct description *description, const plora_adapters *adapters,
                             const struct plora_optimizer *optimizer)
{
    memset(description, 0, sizeof *description);
    description->adapters.context = adapters->model->context;
    description->entries[description->count++] = (struct plora__metadata){"format", "plora-checkpoint"};
    description->entries[description->count++] = (struct plora__metadata){"version", "1"};
    describe_integer(description, "state.stage", adapters->stage);
    describe_unsigned(description, "state.dropout_step", adapters->dropout_step);
    describe_unsigned(description, "state.dropout_first_token", adapters->dropout_first_token);
    describe_unsigned(description, "adapters.seed", adapters->options.seed);
    describe_integer(description, "adapters.init", adapters->options.init);
    describe_real(description, "adapters.dropout", adapters->options.dropout);
    describe_integer(description, "weights.residuals", count_residuals(adapters));
    if (optimizer != NULL) describe_optimizer(description, optimizer);
    if (adapters->ledger != NULL) {
        const plora_ledger *ledger = adapters->ledger;
        const int64_t position = ledger->position;
        describe_integer(description, "state.ledger_records", position);
        if (position >= 0)
            describe_unsigned(description, "state.ledger_lineage", plora__ledger_lineage(&ledger->store, position));
    }
    for (int32_t i = 0; i < adapters->adapter_count; ++i) {
        const struct plora__adapter *adapter = &adapters->adapters[i];
        PLORA_TRY(plora__text_format(&description->adapters, "%s N=%" PRId64 " K=%" PRId64 " rank=%" PRId64 " scale=",
                                     adapters->model->layers[adapter->layer].name, adapter->out_features,
                                     adapter->in_features, adapter->rank));
        PLORA_TRY(plora__text_number(&description->adapters, adapter->scale));
        PLORA_TRY(describe_shard(&description->adapters, weight_of(adapters, i)));
        PLORA_TRY(plora__text_format(&description->adapters, "\n"));
    }
    PLORA_TRY(plora__text_format(&description->adapters, "%s", ""));
    description->entries[description->count++] = (struct plora__metadata){"adapters", description->adapters.data};
    return PLORA_OK;
}

static plora_status check_handles(const plora_adapters *adapters, const struct plora_optimizer *optimizer,
                                  const char *path)
{
    PLORA_CHECK(adapters != NULL && path != NULL, PLORA_ERROR_INVALID_ARGUMENT, "%s is NULL",
                adapters == NULL ? "adapters" : "path");
    PLORA_CHECK(optimizer == NULL || optimizer->adapters == adapters, PLORA_ERROR_INVALID_ARGUMENT,
                "the optimizer belongs to other adapters");
    return PLORA_OK;
}

/* ------------------------------------------------------------------------------------------------------------- tensors */

enum { ARENAS_MAX = 3 };

static const char weight_prefix[] = "weight.", residual_prefix[] = "residual.";

/* The tensors that the handles hold, with their memory as data. */
struct tensors {
    struct plora__tensor *list;
    int32_t count, arenas;
    int64_t (*shapes)[2];
    char *names;
    void *block;
    size_t bytes;
};

static void list_arena(struct tensors *tensors, const char *name, const float *data, int64_t count)
{
    if (data == NULL) return;
    int64_t *shape = tensors->shapes[tensors->count];
    shape[0] = count;
    tensors->list[tensors->count++] = (struct plora__tensor){
        .name = name,
        .dtype = plora__dtype_name(PLORA_F32),
        .shape = shape,
        .dimensions = 1,
        .bytes = (size_t)count * sizeof(float),
        .data = (void *)(uintptr_t)data,
    };
    tensors->arenas = tensors->count;
}

static void list_matrix(struct tensors *tensors, const char *prefix, const char *layer, const plora_matrix *weight,
                        const char *dtype)
{
    const size_t size = plora__dtype_size(weight->dtype);
    int64_t *shape = tensors->shapes[tensors->count];
    char *name = tensors->names;
    tensors->names += sprintf(name, "%s%s", prefix, layer) + 1;
    shape[0] = weight->rows;
    shape[1] = weight->columns;
    tensors->list[tensors->count++] = (struct plora__tensor){
        .name = name,
        .dtype = dtype,
        .shape = shape,
        .dimensions = 2,
        .bytes = (size_t)(weight->rows * weight->columns) * size,
        .data = weight->data,
        .row_bytes = (size_t)weight->columns * size,
        .stride_bytes = (size_t)weight->stride * size,
    };
}

static plora_status list_tensors(const plora_adapters *adapters, const struct plora_optimizer *optimizer, int weights,
                                 int residuals, struct tensors *tensors)
{
    const plora_model *model = adapters->model;
    const size_t most = ARENAS_MAX + (size_t)(weights + residuals) * (size_t)adapters->adapter_count;
    const size_t shapes_at = most * sizeof *tensors->list, names_at = shapes_at + most * sizeof *tensors->shapes;
    *tensors = (struct tensors){.bytes = names_at};
    for (int32_t i = 0; i < adapters->adapter_count; ++i)
        tensors->bytes += 2 * (strlen(model->layers[adapters->adapters[i].layer].name) + sizeof residual_prefix);
    PLORA_TRY(
        plora__allocate(model->context, tensors->bytes, &tensors->block)); /* the caller frees it, whatever follows */
    tensors->list = tensors->block;
    tensors->shapes = (int64_t(*)[2])((char *)tensors->block + shapes_at);
    tensors->names = (char *)tensors->block + names_at;
    list_arena(tensors, "parameters", adapters->parameters, adapters->parameter_count);
    if (optimizer != NULL) {
        list_arena(tensors, "first_moment", optimizer->first_moment, adapters->parameter_count);
        list_arena(tensors, "second_moment", optimizer->second_moment, adapters->parameter_count);
    }
    for (int32_t i = 0; i < adapters->adapter_count; ++i) {
        const char *layer = model->layers[adapters->adapters[i].layer].name;
        const plora_matrix *weight = &weight_of(adapters, i)->matrix;
        PLORA_CHECK(!weights || weight->data != NULL, PLORA_ERROR_UNSUPPORTED,
                    "layer '%s' is quantised without a master: its weights cannot be in a checkpoint", layer);
        if (weights) list_matrix(tensors, weight_prefix, layer, weight, plora__dtype_name(weight->dtype));
    }
    for (int32_t i = 0; i < adapters->adapter_count; ++i) {
        const char *layer = model->layers[adapters->adapters[i].layer].name;
        const plora_matrix residual = plora__residual_matrix(weight_of(adapters, i));
        if (residuals && residual.data != NULL) list_matrix(tensors, residual_prefix, layer, &residual, "U16");
    }
    return PLORA_OK;
}

/* ------------------------------------------------------------------------------------------------------------ checksum */

enum {
    ARENA_ROW = PLORA__ARENA_ALIGNMENT * sizeof(float)
}; /* an arena is hashed in rows, of which it has a whole number */

static uint64_t hash_text(const char *text, uint64_t hash)
{
    return plora__hash(text, strlen(text) + 1, hash);
}

static uint64_t hash_metadata(const struct plora__metadata *metadata, int32_t count)
{
    uint64_t hash = 0;
    for (int32_t i = 0; i < count; ++i)
        if (strcmp(metadata[i].key, "checksum") != 0)
            hash = hash_text(metadata[i].value, hash_text(metadata[i].key, hash));
    return hash;
}

/* Adds a tensor whose rows have the given hash. */
static uint64_t hash_tensor(const struct plora__tensor *tensor, uint64_t rows, uint64_t hash)
{
    return plora__hash(&rows, sizeof rows, hash_text(tensor->name, hash));
}

/* Of what is to be saved, from device memory. */
static plora_status checksum_here(const plora_context *context, const struct description *description,
                                  const struct tensors *tensors, uint64_t *checksum)
{
    *checksum = hash_metadata(description->entries, description->count);
    for (int32_t i = 0; i < tensors->count; ++i) {
        const struct plora__tensor *tensor = &tensors->list[i];
        const int64_t *shape = tensor->shape, arena = PLORA__ARENA_ALIGNMENT;
        plora_matrix matrix = {tensor->data, shape[0] / arena, arena, arena, PLORA_F32, 0};
        if (tensor->dimensions == 2) {
            const int32_t dtype = plora__tensor_dtype(tensor);
            const int64_t stride = (int64_t)(tensor->stride_bytes / plora__dtype_size(dtype));
            matrix = (plora_matrix){tensor->data, shape[0], shape[1], stride, dtype, 0};
        }
        uint64_t rows;
        PLORA_TRY(plora__ledger_hash_weight(context, &matrix, NULL, &rows));
        *checksum = hash_tensor(tensor, rows, *checksum);
    }
    return PLORA_OK;
}

/* The same of a file. */
uint64_t plora__checkpoint_checksum(const struct plora__safetensors *file)
{
    uint64_t checksum = hash_metadata(file->metadata, file->metadata_count);
    for (int32_t i = 0; i < file->tensor_count; ++i) {
        const struct plora__tensor *tensor = &file->tensors[i];
        const int matrix = tensor->dimensions == 2 && tensor->shape[0] > 0;
        const size_t bytes = matrix ? tensor->bytes / (size_t)tensor->shape[0] : (size_t)ARENA_ROW;
        const int64_t rows = bytes > 0 ? (int64_t)(tensor->bytes / bytes) : 0;
        checksum = hash_tensor(tensor, plora__hash_rows(tensor->data, rows, bytes, bytes, 0), checksum);
    }
    return checksum;
}

static plora_status check_checksum(const struct plora__safetensors *file)
{
    char here[VALUE_BYTES];
    const char *there = plora__safetensors_metadata(file, "checksum");
    snprintf(here, sizeof here, "%016" PRIx64, plora__checkpoint_checksum(file));
    PLORA_CHECK(there != NULL && strcmp(there, here) == 0, PLORA_ERROR_FORMAT,
                "the checkpoint is damaged: its checksum is %.100s, its contents have %s",
                there == NULL ? "absent" : there, here);
    return PLORA_OK;
}

plora_status plora_checkpoint_save(plora_adapters *adapters, plora_optimizer *optimizer, const char *path,
                                   uint32_t flags)
{
    PLORA_TRY(check_handles(adapters, optimizer, path));
    PLORA_CHECK((flags & ~(uint32_t)PLORA_CHECKPOINT_WEIGHTS) == 0, PLORA_ERROR_INVALID_ARGUMENT, "unknown flags 0x%x",
                (unsigned)flags);
    PLORA_CHECK(adapters->ledger == NULL || adapters->ledger->position >= 0, PLORA_ERROR_INVALID_ARGUMENT,
                "how many of the ledger's records the weights hold is not known: roll them back to some");
    plora_context *context = adapters->model->context;
    const int weights = (flags & PLORA_CHECKPOINT_WEIGHTS) != 0;
    struct description description;
    struct tensors tensors = {0};
    plora_status status;
    PLORA_TRY_OUT(describe(&description, adapters, optimizer));
    PLORA_TRY_OUT(list_tensors(adapters, optimizer, weights, weights || adapters->ledger == NULL, &tensors));
    PLORA_TRY_OUT(context->backend->synchronize(context->device, NULL));
    double norm;
    if (optimizer != NULL) PLORA_TRY_OUT(plora__optimizer_settle(optimizer, 0, &norm, NULL));
    uint64_t checksum;
    PLORA_TRY_OUT(checksum_here(context, &description, &tensors, &checksum));
    char *text = description.values[description.count];
    snprintf(text, VALUE_BYTES, "%016" PRIx64, checksum);
    description.entries[description.count++] = (struct plora__metadata){"checksum", text};
    status =
        plora__safetensors_write(context, path, tensors.list, tensors.count, description.entries, description.count);
out:
    plora__free(context, tensors.block, tensors.bytes);
    plora__text_free(&description.adapters);
    return status;
}

/* ------------------------------------------------------------------------------------------------------------- loading */

/* The adapters' lines differ: the message shows the first that does. */
static plora_status adapters_differ(const char *file, const char *here)
{
    for (;;) {
        const size_t a = strcspn(file, "\n"), b = strcspn(here, "\n");
        if (a != b || memcmp(file, here, a) != 0 || a == 0)
            return plora__fail(PLORA_ERROR_INVALID_ARGUMENT,
                               "the checkpoint was made with the adapter '%.*s', here is '%.*s'",
                               a < 300 ? (int)a : 300, file, b < 300 ? (int)b : 300, here);
        file += a + (file[a] != '\0');
        here += b + (here[b] != '\0');
    }
}

static plora_status check_options(const struct plora__safetensors *file, const struct description *description)
{
    for (int32_t i = 0; i < description->count; ++i) {
        const char *key = description->entries[i].key, *here = description->entries[i].value;
        const char *there = plora__safetensors_metadata(file, key);
        if (i < 2) /* format, version */
            PLORA_CHECK(there != NULL && strcmp(there, here) == 0, PLORA_ERROR_FORMAT,
                        "not a checkpoint of this version: %s is '%.100s', not '%s'", key,
                        there == NULL ? "absent" : there, here);
        if (strncmp(key, "state.ledger", 12) == 0) continue; /* read_position() */
        PLORA_CHECK(there != NULL || plora__safetensors_find(file, "first_moment") != NULL,
                    PLORA_ERROR_INVALID_ARGUMENT, "the checkpoint was made without an optimizer: it has no %s", key);
        PLORA_CHECK(there != NULL, PLORA_ERROR_FORMAT, "the checkpoint has no %s", key);
        if (strncmp(key, "state.", 6) == 0 || strcmp(there, here) == 0) continue;
        if (strcmp(key, "adapters") == 0) return adapters_differ(there, here);
        return plora__fail(PLORA_ERROR_INVALID_ARGUMENT, "the checkpoint was made with %s = %.100s, here it is %s", key,
                           there, here);
    }
    return PLORA_OK;
}

struct state {
    int64_t stage, step, schedule_step, total_steps, last_unload_step;
    uint64_t dropout_step, dropout_first_token;
};

static plora_status read_unsigned(const struct plora__safetensors *file, const char *key, uint64_t *value)
{
    const char *text = plora__safetensors_metadata(file, key);
    const size_t length = text == NULL ? 0 : strlen(text);
    PLORA_CHECK(length > 0 && length <= 20 && strspn(text, "0123456789") == length, PLORA_ERROR_FORMAT,
                "%s is '%.100s': must be a number", key, text == NULL ? "absent" : text);
    errno = 0;
    *value = strtoull(text, NULL, 10);
    PLORA_CHECK(errno == 0, PLORA_ERROR_FORMAT, "%s is %s: exceeds 64 bits", key, text);
    return PLORA_OK;
}

static plora_status read_counter(const struct plora__safetensors *file, const char *key, int64_t least, int64_t *value)
{
    const char *text = plora__safetensors_metadata(file, key);
    uint64_t number;
    if (least < 0 && text != NULL && strcmp(text, "-1") == 0) {
        *value = -1;
        return PLORA_OK;
    }
    PLORA_TRY(read_unsigned(file, key, &number));
    PLORA_CHECK(number <= INT64_MAX / 2, PLORA_ERROR_FORMAT, "%s is %s: exceeds 62 bits", key, text);
    *value = (int64_t)number;
    return PLORA_OK;
}

static plora_status read_state(const struct plora__safetensors *file, int optimizer, struct state *state)
{
    PLORA_TRY(read_counter(file, "state.stage", 0, &state->stage));
    PLORA_TRY(read_unsigned(file, "state.dropout_step", &state->dropout_step));
    PLORA_TRY(read_unsigned(file, "state.dropout_first_token", &state->dropout_first_token));
    if (!optimizer) return PLORA_OK;
    PLORA_TRY(read_counter(file, "state.step", 0, &state->step));
    PLORA_TRY(read_counter(file, "state.schedule_step", 0, &state->schedule_step));
    PLORA_TRY(read_counter(file, "state.total_steps", 0, &state->total_steps));
    PLORA_TRY(read_counter(file, "state.last_unload_step", -1, &state->last_unload_step));
    PLORA_CHECK(state->step <= state->total_steps && state->schedule_step <= state->total_steps &&
                    state->last_unload_step <= state->total_steps,
                PLORA_ERROR_FORMAT,
                "counters contradict each other: step %" PRId64 ", schedule_step %" PRId64 ", last_unload_step %" PRId64
                " of %" PRId64,
                state->step, state->schedule_step, state->last_unload_step, state->total_steps);
    return PLORA_OK;
}

static plora_status check_values(const struct plora__tensor *tensor, int non_negative)
{
    const int32_t dtype = plora__tensor_dtype(tensor);
    const size_t size = plora__dtype_size(dtype), count = tensor->bytes / size;
    for (size_t i = 0; i < count; ++i) {
        const float value = plora__load(tensor->data, (int64_t)i, dtype);
        const int good = value - value == 0.0f && !(non_negative && value < 0.0f); /* inf - inf is NaN */
        PLORA_CHECK(good, PLORA_ERROR_FORMAT, "tensor '%.200s': the value at byte %llu is %g", tensor->name,
                    (unsigned long long)(tensor->offset + i * size), (double)value);
    }
    return PLORA_OK;
}

/* The tensor of the file that belongs to one of the handles', checked. */
static plora_status check_tensor(const struct plora__safetensors *file, const struct plora__tensor *here)
{
    const struct plora__tensor *there = plora__safetensors_find(file, here->name);
    PLORA_CHECK(there != NULL, PLORA_ERROR_FORMAT, "there is no tensor '%.200s'", here->name);
    PLORA_CHECK(strcmp(there->dtype, here->dtype) == 0, PLORA_ERROR_SHAPE,
                "tensor '%.200s' at byte %llu is %s, here it is %s", here->name, (unsigned long long)there->offset,
                there->dtype, here->dtype);
    int same = there->dimensions == here->dimensions;
    for (int32_t d = 0; same && d < here->dimensions; ++d)
        same = there->shape[d] == here->shape[d];
    PLORA_CHECK(same, PLORA_ERROR_SHAPE,
                "tensor '%.200s' at byte %llu has %zu bytes in %d dimensions, here it has %zu in %d, or another shape",
                here->name, (unsigned long long)there->offset, there->bytes, there->dimensions, here->bytes,
                here->dimensions);
    if (plora__tensor_dtype(there) < 0) return PLORA_OK; /* a residual: check_residuals() */
    return check_values(there, strcmp(here->name, "second_moment") == 0);
}

/* A row of a residual beside that of its weight: what they stand for together must be a number. */
static plora_status check_residual_row(const struct plora__tensor *residual, int64_t row, const void *weight,
                                       int32_t dtype)
{
    const uint16_t exponent = dtype == PLORA_BF16 ? 0x7f80 : 0x7c00;
    for (int64_t i = 0; i < residual->shape[1]; ++i) {
        const size_t at = (size_t)(row * residual->shape[1] + i) * sizeof(uint16_t);
        uint16_t high, low;
        memcpy(&high, (const char *)weight + (size_t)i * sizeof high, sizeof high);
        memcpy(&low, (const char *)residual->data + at, sizeof low); /* which may be at an odd address */
        const float value = plora__join_residual(high, low, dtype);
        PLORA_CHECK(value - value == 0.0f && (high & exponent) != exponent && ((high & 0x7fffu) != 0 || low < 0x8000u),
                    PLORA_ERROR_FORMAT,
                    "tensor '%.200s': the low half at byte %llu is 0x%04x, which the weight 0x%04x cannot have",
                    residual->name, (unsigned long long)(residual->offset + at), low, high);
    }
    return PLORA_OK;
}

enum { CHUNK_BYTES = 1 << 20 };

/* A residual of the file, beside its weight: the file's, or where it has none the one that the handles hold. */
static plora_status check_residual(plora_context *context, const struct plora__tensor *residual,
                                   const struct plora__tensor *there, const plora_matrix *here)
{
    const size_t size = sizeof(uint16_t), row_bytes = (size_t)here->columns * size;
    const size_t stride = there != NULL ? row_bytes : (size_t)here->stride * size;
    const int64_t most = there != NULL ? here->rows : stride < CHUNK_BYTES ? (int64_t)(CHUNK_BYTES / stride) : 1;
    const char *chunk = there != NULL ? there->data : NULL;
    plora_status status = PLORA_OK;
    void *memory = NULL;
    if (there == NULL) PLORA_TRY(plora__allocate(context, (size_t)most * stride, &memory));
    for (int64_t first = 0; first < here->rows && status == PLORA_OK; first += most) {
        const int64_t rows = here->rows - first < most ? here->rows - first : most;
        if (there == NULL) {
            chunk = memory;
            status = plora__read_device(context, memory, (const char *)here->data + (size_t)first * stride,
                                        (size_t)(rows - 1) * stride + row_bytes, NULL);
        }
        for (int64_t row = 0; row < rows && status == PLORA_OK; ++row)
            status = check_residual_row(residual, first + row, chunk + (size_t)row * stride, here->dtype);
    }
    plora__free(context, memory, (size_t)most * stride);
    return status;
}

/* Once the tensors have their shapes. Weights and residuals are listed in the order of the adapters. */
static plora_status check_residuals(const plora_adapters *adapters, const struct plora__safetensors *file,
                                    const struct tensors *tensors)
{
    const int weights = tensors->count > tensors->arenas &&
                        strncmp(tensors->list[tensors->arenas].name, weight_prefix, sizeof weight_prefix - 1) == 0;
    int32_t next = tensors->arenas + (weights ? adapters->adapter_count : 0);
    for (int32_t i = 0; i < adapters->adapter_count && next < tensors->count; ++i) {
        const struct plora__weight *weight = weight_of(adapters, i);
        if (weight->residual == NULL) continue;
        const struct plora__tensor *residual = plora__safetensors_find(file, tensors->list[next++].name);
        const struct plora__tensor *there =
            weights ? plora__safetensors_find(file, tensors->list[tensors->arenas + i].name) : NULL;
        PLORA_TRY(check_residual(adapters->model->context, residual, there, &weight->matrix));
    }
    return PLORA_OK;
}

static plora_status check_all(const plora_adapters *adapters, const struct plora__safetensors *file,
                              const struct tensors *tensors)
{
    for (int32_t i = 0; i < tensors->count; ++i)
        PLORA_TRY(check_tensor(file, &tensors->list[i]));
    PLORA_TRY(check_residuals(adapters, file, tensors));
    for (int32_t i = 0; i < file->tensor_count; ++i) {
        const char *name = file->tensors[i].name;
        int32_t known = 0;
        while (known < tensors->count && strcmp(tensors->list[known].name, name) != 0)
            ++known;
        /* The moments are left alone when the host loads adapters only. */
        if (known == tensors->count && strcmp(name, "first_moment") != 0 && strcmp(name, "second_moment") != 0)
            return plora__fail(PLORA_ERROR_FORMAT, "tensor '%.200s' at byte %llu does not belong here", name,
                               (unsigned long long)file->tensors[i].offset);
    }
    return PLORA_OK;
}

static plora_status copy_all(plora_context *context, const struct plora__safetensors *file,
                             const struct tensors *tensors)
{
    for (int32_t i = 0; i < tensors->count; ++i) {
        const struct plora__tensor *here = &tensors->list[i];
        const unsigned char *from = plora__safetensors_find(file, here->name)->data;
        unsigned char *to = here->data;
        const size_t row = here->row_bytes > 0 ? here->row_bytes : here->bytes;
        for (size_t done = 0; done < here->bytes; done += row, from += row, to += here->stride_bytes)
            PLORA_TRY(context->backend->copy(context->device, to, from, row, NULL));
    }
    return context->backend->synchronize(context->device, NULL);
}

static void set_state(plora_adapters *adapters, struct plora_optimizer *optimizer, const struct state *state)
{
    adapters->stage = state->stage;
    adapters->dropout_step = state->dropout_step;
    adapters->dropout_first_token = state->dropout_first_token;
    if (optimizer == NULL) return;
    optimizer->step = state->step;
    optimizer->schedule_step = state->schedule_step;
    optimizer->total_steps = state->total_steps;
    optimizer->last_unload_step = state->last_unload_step;
}

static int has_weights(const struct plora__safetensors *file)
{
    for (int32_t i = 0; i < file->tensor_count; ++i)
        if (strncmp(file->tensors[i].name, weight_prefix, sizeof weight_prefix - 1) == 0) return 1;
    return 0;
}

/* As the save decided it. */
static int has_residuals(const struct plora__safetensors *file)
{
    return has_weights(file) || plora__safetensors_metadata(file, "state.ledger_records") == NULL;
}

/* How many of the ledger's records the weights of the checkpoint hold. Without a ledger on either side it stays 0. */
static plora_status read_position(const struct plora__safetensors *file, const plora_ledger *ledger, int64_t *position)
{
    uint64_t lineage;
    const int with_ledger = plora__safetensors_metadata(file, "state.ledger_records") != NULL;
    *position = 0;
    PLORA_CHECK(with_ledger || ledger == NULL, PLORA_ERROR_INVALID_ARGUMENT,
                "the checkpoint was made without a ledger, but there is one");
    if (!with_ledger) return PLORA_OK;
    PLORA_TRY(read_counter(file, "state.ledger_records", 0, position));
    PLORA_TRY(read_unsigned(file, "state.ledger_lineage", &lineage));
    PLORA_CHECK(ledger != NULL || *position == 0 || has_weights(file), PLORA_ERROR_INVALID_ARGUMENT,
                "the weights of the checkpoint are in a ledger of %" PRId64 " records, but there is none", *position);
    if (ledger == NULL) return PLORA_OK;
    PLORA_CHECK(*position <= ledger->store.count, PLORA_ERROR_INVALID_ARGUMENT,
                "the checkpoint was made with a ledger of %" PRId64 " records, this one has %" PRId64, *position,
                ledger->store.count);
    PLORA_CHECK(lineage == plora__ledger_lineage(&ledger->store, *position), PLORA_ERROR_INVALID_ARGUMENT,
                "the checkpoint was made with another ledger: lineage %016" PRIx64 " after %" PRId64
                " records, here it is %016" PRIx64,
                lineage, *position, plora__ledger_lineage(&ledger->store, *position));
    return PLORA_OK;
}

/* The weights of the checkpoint came from its file: the ledger follows. */
static plora_status follow_weights(plora_ledger *ledger, int64_t position)
{
    if (ledger->hash_weights) PLORA_TRY(plora__ledger_hash_weights(ledger));
    ledger->position = position;
    return PLORA_OK;
}

plora_status plora_checkpoint_load(plora_adapters *adapters, plora_optimizer *optimizer, const char *path)
{
    PLORA_TRY(check_handles(adapters, optimizer, path));
    PLORA_TRY(plora__weights_check(adapters->model));
    plora_context *context = adapters->model->context;
    struct plora__safetensors file;
    struct description description;
    struct tensors tensors = {0};
    struct state state = {0};
    struct plora__replay replay = {0};
    plora_ledger *ledger = adapters->ledger;
    int64_t position = 0;
    plora_status status;
    PLORA_TRY(plora__safetensors_open(context, path, &file));
    PLORA_TRY_OUT(describe(&description, adapters, optimizer));
    PLORA_TRY_OUT(check_options(&file, &description));
    PLORA_TRY_OUT(read_state(&file, optimizer != NULL, &state));
    PLORA_TRY_OUT(read_position(&file, ledger, &position));
    PLORA_TRY_OUT(list_tensors(adapters, optimizer, has_weights(&file), has_residuals(&file), &tensors));
    PLORA_TRY_OUT(context->backend->synchronize(context->device, NULL));
    PLORA_TRY_OUT(check_all(adapters, &file, &tensors));
    PLORA_TRY_OUT(check_checksum(&file));
    if (ledger != NULL && !has_weights(&file)) PLORA_TRY_OUT(plora__replay_prepare(ledger, position, &replay));
    if (ledger != NULL) PLORA_TRY_OUT(plora__ledger_cut(&ledger->store, position));

    if (replay.ledger != NULL)
        PLORA_TRY_OUT(plora__replay_run(&replay));
    else if (ledger != NULL)
        ledger->position = -1;
    PLORA_TRY_OUT(copy_all(context, &file, &tensors));
    if (has_weights(&file)) PLORA_TRY_OUT(plora__requantise_set(adapters));
    if (ledger != NULL && replay.ledger == NULL) PLORA_TRY_OUT(follow_weights(ledger, position));
    if (optimizer != NULL)
        PLORA_TRY_OUT(context->backend->clear(context->device, optimizer->state, sizeof *optimizer->state, NULL));
    set_state(adapters, optimizer, &state);
out:
    if (replay.ledger != NULL) plora__replay_free(&replay);
    plora__free(context, tensors.block, tensors.bytes);
    plora__text_free(&description.adapters);
    plora__safetensors_close(&file);
    return status == PLORA_OK ? PLORA_OK : plora__fail_in(status, path);
}
