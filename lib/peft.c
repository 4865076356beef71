/* peft.c: adapters as a PEFT directory.
 *
 *     adapter_model.safetensors   base_model.model.<layer>.lora_A.weight [R,K]  and  .lora_B.weight [N,R]
 *     adapter_config.json         ranks, alphas, targets: peft_config.c
 *
 * Both are the layout of the arena, with fan_in_fan_out too. The tensors say which layers have adapters; the config must agree
 * with their ranks and gives the scales. */
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "dtype.h"
#include "peft_config.h"

static const char key_prefix[] = "base_model.model.";
static const char *const key_suffixes[2] = {".lora_A.weight", ".lora_B.weight"};
static const char config_name[] = "adapter_config.json", tensors_name[] = "adapter_model.safetensors";

/* -------------------------------------------------------------------------------------------------------------- saving */

static int is_embedding(const char *name)
{
    static const char *const embeddings[] = {"embed_tokens", "wte", "wpe"};
    const char *dot = strrchr(name, '.');
    for (int i = 0; i < 3; ++i)
        if (strcmp(dot == NULL ? name : dot + 1, embeddings[i]) == 0) return 1;
    return 0;
}

plora_status plora__peft_name(const plora_adapters *adapters, int32_t index, const char **name)
{
    const plora_model *model = adapters->model;
    const struct plora__adapter *adapter = &adapters->adapters[index];
    for (int32_t i = adapter->layer; i < model->layer_count; ++i) {
        if (model->layers[i].weight != adapter->weight || is_embedding(model->layers[i].name)) continue;
        *name = model->layers[i].name;
        return PLORA_OK;
    }
    plora__fail(PLORA_ERROR_UNSUPPORTED, "layer '%s': the adapter of an embedding has no linear form in PEFT",
                model->layers[adapter->layer].name);
    return PLORA_ERROR_UNSUPPORTED;
}

/* The tensors of a list, in one allocation: they, their shapes, scratch for the config, and their names. */
struct save {
    struct plora__tensor *tensors; /* [2 adapter_count] */
    int64_t (*shapes)[2];
    int32_t *order;
    void *block;
    size_t bytes;
};

static plora_status prepare_save(const plora_adapters *adapters, const struct plora__peft_adapter *list,
                                 struct save *save)
{
    const size_t count = (size_t)adapters->adapter_count, shapes_at = 2 * count * sizeof *save->tensors;
    const size_t order_at = shapes_at + 2 * count * sizeof *save->shapes,
                 keys_at = order_at + count * sizeof *save->order;
    save->bytes = keys_at;
    for (size_t i = 0; i < count; ++i)
        save->bytes += 2 * (strlen(key_prefix) + strlen(list[i].name) + strlen(key_suffixes[0]) + 1);
    PLORA_TRY(plora__allocate(adapters->model->context, save->bytes, &save->block));
    char *block = save->block, *keys = block + keys_at;
    save->tensors = save->block;
    save->shapes = (int64_t(*)[2])(block + shapes_at);
    save->order = (int32_t *)(block + order_at);
    for (size_t i = 0; i < 2 * count; ++i) {
        const struct plora__adapter *adapter = &adapters->adapters[i / 2];
        const struct plora__peft_adapter *entry = &list[i / 2];
        const int is_b = i % 2 != 0;
        char *key = keys;
        keys += sprintf(key, "%s%s%s", key_prefix, entry->name, key_suffixes[is_b]) + 1;
        save->shapes[i][0] = is_b ? adapter->out_features : entry->rank;
        save->shapes[i][1] = is_b ? entry->rank : adapter->in_features;
        save->tensors[i] = (struct plora__tensor){
            .name = key,
            .dtype = plora__dtype_name(PLORA_F32),
            .shape = save->shapes[i],
            .dimensions = 2,
            .bytes = (size_t)(save->shapes[i][0] * save->shapes[i][1]) * sizeof(float),
            .data = is_b ? entry->b : entry->a,
            .write = is_b ? entry->write_b : entry->write_a,
        };
    }
    return PLORA_OK;
}

static plora_status write_text(plora_context *context, const char *path, const struct plora__text *text)
{
    struct plora__writer writer;
    PLORA_TRY(plora__writer_open(context, path, &writer));
    return plora__writer_close(&writer, plora__writer_write(&writer, text->data, text->length));
}

plora_status plora__peft_save(const plora_adapters *adapters, const struct plora__peft_adapter *list,
                              const plora_adapters_options *options, const char *directory)
{
    static const struct plora__metadata metadata = {"format", "pt"};
    plora_context *context = adapters->model->context;
    struct save save = {0};
    struct plora__text text = {context, NULL, 0, 0};
    char *tensors_path = NULL, *config_path = NULL;
    plora_status status;
    PLORA_TRY_OUT(prepare_save(adapters, list, &save));
    PLORA_TRY_OUT(plora__peft_config_write(&text, adapters, list, options, save.order));
    PLORA_TRY_OUT(plora__join_path(context, directory, tensors_name, &tensors_path));
    PLORA_TRY_OUT(plora__join_path(context, directory, config_name, &config_path));
    if (mkdir(directory, 0777) != 0 && errno != EEXIST) {
        const int error = errno;
        char reason[128] = "unknown error";
        status = plora__fail(PLORA_ERROR_IO, "cannot create the directory '%.600s': %s", directory,
                             strerror_r(error, reason, sizeof reason));
        goto out;
    }
    PLORA_TRY_OUT(
        plora__safetensors_write(context, tensors_path, save.tensors, 2 * adapters->adapter_count, &metadata, 1));
    status = write_text(context, config_path, &text);
out:
    plora__free_string(context, config_path);
    plora__free_string(context, tensors_path);
    plora__text_free(&text);
    plora__free(context, save.block, save.bytes);
    return status;
}

plora_status plora_adapters_save(const plora_adapters *adapters, const char *directory)
{
    PLORA_CHECK(adapters != NULL && directory != NULL, PLORA_ERROR_INVALID_ARGUMENT, "%s is NULL",
                adapters == NULL ? "adapters" : "directory");
    plora_context *context = adapters->model->context;
    const size_t bytes = (size_t)adapters->adapter_count * sizeof(struct plora__peft_adapter);
    void *block;
    PLORA_TRY(plora__allocate_zeroed(context, bytes, &block));
    struct plora__peft_adapter *list = block;
    plora_status status = PLORA_OK;
    for (int32_t i = 0; i < adapters->adapter_count; ++i) {
        const struct plora__adapter *adapter = &adapters->adapters[i];
        PLORA_TRY_OUT(plora__peft_name(adapters, i, &list[i].name));
        list[i].rank = adapter->rank;
        list[i].alpha = adapter->alpha;
        list[i].a = adapters->parameters + adapter->a_offset;
        list[i].b = adapters->parameters + adapter->b_offset;
    }
    status = plora__peft_save(adapters, list, &adapters->options, directory);
out:
    plora__free(context, block, bytes);
    return status;
}

/* ------------------------------------------------------------------------------------------------------------- loading */

struct load {
    plora_model *model;
    struct plora__safetensors file;
    struct plora__peft_config config;
    const struct plora__tensor *(*pairs)[2]; /* [layer_count]: A and B of each layer, or NULL */
    struct plora__adapter_choice *choices;   /* [layer_count] */
    int32_t choice_count;
    void *block;
    size_t bytes;
};

static plora_status check_values(const struct plora__tensor *tensor)
{
    const int32_t dtype = plora__tensor_dtype(tensor);
    const int64_t count = (int64_t)(tensor->bytes / plora__dtype_size(dtype));
    for (int64_t i = 0; i < count; ++i)
        PLORA_CHECK(isfinite(plora__load(tensor->data, i, dtype)), PLORA_ERROR_FORMAT,
                    "tensor '%.200s': the value at byte %llu is %g", tensor->name,
                    (unsigned long long)tensor->offset + (unsigned long long)i * plora__dtype_size(dtype),
                    (double)plora__load(tensor->data, i, dtype));
    return PLORA_OK;
}

/* Sorts one tensor into the pairs by its key. `scratch` has room for the key. */
static plora_status place_tensor(struct load *load, const struct plora__tensor *tensor, char *scratch)
{
    const size_t length = strlen(tensor->name), prefix = strlen(key_prefix), suffix = strlen(key_suffixes[0]);
    int which = -1;
    if (length > prefix + suffix && strncmp(tensor->name, key_prefix, prefix) == 0)
        for (int i = 0; i < 2; ++i)
            if (strcmp(tensor->name + length - suffix, key_suffixes[i]) == 0) which = i;
    PLORA_CHECK(which >= 0, PLORA_ERROR_UNSUPPORTED,
                "tensor '%.200s' at byte %llu is not %s<layer>.lora_A.weight or .lora_B.weight", tensor->name,
                (unsigned long long)tensor->offset, key_prefix);
    PLORA_CHECK(plora__tensor_dtype(tensor) >= 0, PLORA_ERROR_UNSUPPORTED,
                "tensor '%.200s' is of dtype %s: only F32, BF16 and F16 are", tensor->name, tensor->dtype);
    PLORA_CHECK(tensor->dimensions == 2, PLORA_ERROR_SHAPE, "tensor '%.200s' at byte %llu has %d dimensions: must be 2",
                tensor->name, (unsigned long long)tensor->offset, tensor->dimensions);
    memcpy(scratch, tensor->name + prefix, length - prefix - suffix);
    scratch[length - prefix - suffix] = '\0';
    int32_t layer;
    const plora_status status = plora_model_find_layer(load->model, scratch, &layer);
    if (status != PLORA_OK) return plora__fail_in(status, tensor->name);
    load->pairs[layer][which] = tensor; /* names are unique in a file */
    return check_values(tensor);
}

static plora_status choose_layer(struct load *load, int32_t layer)
{
    const struct plora__layer *l = &load->model->layers[layer];
    const struct plora__tensor *a = load->pairs[layer][0], *b = load->pairs[layer][1];
    if (a == NULL && b == NULL) return PLORA_OK;
    PLORA_CHECK(a != NULL && b != NULL, PLORA_ERROR_FORMAT, "tensor '%.200s' is without its partner %s",
                a != NULL ? a->name : b->name, key_suffixes[a != NULL]);
    const int64_t rank = a->shape[0];
    PLORA_CHECK(a->shape[1] == l->in_features && b->shape[0] == l->out_features && b->shape[1] == rank,
                PLORA_ERROR_SHAPE, "layer '%s' [N=%lld,K=%lld]: lora_A is [%lld,%lld], lora_B is [%lld,%lld]", l->name,
                (long long)l->out_features, (long long)l->in_features, (long long)rank, (long long)a->shape[1],
                (long long)b->shape[0], (long long)b->shape[1]);
    int64_t wanted;
    double alpha;
    plora__peft_config_layer(&load->config, l->name, &wanted, &alpha);
    PLORA_CHECK(rank == wanted, PLORA_ERROR_SHAPE, "layer '%s': lora_A is [%lld,%lld], but %s gives it rank %lld",
                l->name, (long long)rank, (long long)a->shape[1], config_name, (long long)wanted);
    for (int32_t i = 0; i < load->choice_count; ++i)
        PLORA_CHECK(load->model->layers[load->choices[i].layer].weight != l->weight, PLORA_ERROR_UNSUPPORTED,
                    "layers '%s' and '%s' are tied, but each has an adapter of its own",
                    load->model->layers[load->choices[i].layer].name, l->name);
    const double divisor = load->config.rslora ? sqrt((double)rank) : (double)rank;
    load->choices[load->choice_count++] =
        (struct plora__adapter_choice){.layer = layer, .rank = (int32_t)rank, .alpha = alpha, .scale = alpha / divisor};
    return PLORA_OK;
}

static plora_status pair_tensors(struct load *load)
{
    plora_context *context = load->model->context;
    size_t longest = 0;
    for (int32_t i = 0; i < load->file.tensor_count; ++i) {
        const size_t length = strlen(load->file.tensors[i].name);
        longest = length > longest ? length : longest;
    }
    const size_t layers = (size_t)load->model->layer_count, choices_at = layers * sizeof *load->pairs;
    const size_t scratch_at = choices_at + layers * sizeof *load->choices;
    load->bytes = scratch_at + longest + 1;
    PLORA_TRY(plora__allocate_zeroed(context, load->bytes, &load->block));
    load->pairs = load->block;
    load->choices = (struct plora__adapter_choice *)((char *)load->block + choices_at);
    char *scratch = (char *)load->block + scratch_at;
    PLORA_CHECK(load->file.tensor_count > 0, PLORA_ERROR_FORMAT, "there are no tensors");
    for (int32_t i = 0; i < load->file.tensor_count; ++i)
        PLORA_TRY(place_tensor(load, &load->file.tensors[i], scratch));
    for (int32_t i = 0; i < load->model->layer_count; ++i)
        PLORA_TRY(choose_layer(load, i));
    return PLORA_OK;
}

/* Copies a tensor into the arena, widened to fp32, a piece at a time. */
static plora_status copy_tensor(plora_context *context, const struct plora__tensor *tensor, float *arena)
{
    float piece[1024];
    const int32_t dtype = plora__tensor_dtype(tensor);
    const int64_t count = (int64_t)(tensor->bytes / plora__dtype_size(dtype));
    if (dtype == PLORA_F32) return context->backend->copy(context->device, arena, tensor->data, tensor->bytes, NULL);
    for (int64_t done = 0; done < count;) {
        const int64_t length = count - done < 1024 ? count - done : 1024;
        for (int64_t i = 0; i < length; ++i)
            piece[i] = plora__load(tensor->data, done + i, dtype);
        PLORA_TRY(context->backend->copy(context->device, arena + done, piece, (size_t)length * sizeof *piece, NULL));
        PLORA_TRY(context->backend->synchronize(context->device, NULL));
        done += length;
    }
    return PLORA_OK;
}

static plora_status build(struct load *load, plora_adapters_options *options, plora_adapters **adapters)
{
    plora_context *context = load->model->context;
    plora_adapters *created;
    options->rank = (int32_t)load->config.rank;
    options->alpha = load->config.alpha;
    options->rslora = load->config.rslora;
    PLORA_TRY(plora__adapters_build(load->model, options, load->choices, load->choice_count, &created));
    plora_status status = PLORA_OK;
    for (int32_t i = 0; i < load->choice_count; ++i) {
        const int32_t layer = load->choices[i].layer;
        const struct plora__adapter *adapter = &created->adapters[created->adapter_of_layer[layer]];
        PLORA_TRY_OUT(copy_tensor(context, load->pairs[layer][0], created->parameters + adapter->a_offset));
        PLORA_TRY_OUT(copy_tensor(context, load->pairs[layer][1], created->parameters + adapter->b_offset));
    }
    PLORA_TRY_OUT(context->backend->synchronize(context->device, NULL));
    *adapters = created;
    return PLORA_OK;
out:
    plora_adapters_destroy(created);
    return status;
}

static plora_status load_files(struct load *load, const char *directory, plora_adapters_options *options,
                               plora_adapters **adapters)
{
    plora_context *context = load->model->context;
    struct plora__mapping text = {NULL, 0};
    char *tensors_path = NULL, *config_path = NULL;
    const char *culprit = NULL; /* the file a message is about */
    plora_status status;
    PLORA_TRY_OUT(plora__join_path(context, directory, config_name, &config_path));
    PLORA_TRY_OUT(plora__join_path(context, directory, tensors_name, &tensors_path));
    PLORA_TRY_OUT(plora__file_map(context, config_path, &text));
    culprit = config_path;
    PLORA_TRY_OUT(plora__peft_config_read(context, (const char *)text.data, text.bytes, &load->config));
    culprit = NULL;
    PLORA_TRY_OUT(plora__safetensors_open(context, tensors_path, &load->file));
    culprit = tensors_path;
    PLORA_TRY_OUT(pair_tensors(load));
    culprit = directory;
    status = build(load, options, adapters);
out:
    if (status != PLORA_OK && culprit != NULL) status = plora__fail_in(status, culprit);
    plora__peft_config_free(&load->config);
    plora__file_unmap(context, &text);
    plora__free_string(context, tensors_path);
    plora__free_string(context, config_path);
    return status;
}

plora_status plora_adapters_load(plora_model *model, const char *directory, const plora_adapters_options *given,
                                 plora_adapters **adapters)
{
    PLORA_CHECK(model != NULL && directory != NULL && adapters != NULL, PLORA_ERROR_INVALID_ARGUMENT, "%s is NULL",
                model == NULL       ? "model"
                : directory == NULL ? "directory"
                                    : "adapters");
    plora_adapters_options options = PLORA_ADAPTERS_OPTIONS_INIT;
    PLORA_TRY(plora__read_options(&options, sizeof options, given, "plora_adapters_options"));
    PLORA_TRY(plora__adapters_check_common(&options));
    struct load load = {.model = model, .file = {.context = model->context}};
    const plora_status status = load_files(&load, directory, &options, adapters);
    plora__safetensors_close(&load.file);
    plora__free(model->context, load.block, load.bytes);
    return status;
}
