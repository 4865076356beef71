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

#include "adapter_load.h"
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

struct files {
    struct plora__adapter_source source;
    struct plora__safetensors tensors;
    struct plora__peft_config config;
};

static plora_status name_layer(const struct plora__adapter_source *source, const struct plora__tensor *tensor,
                               char *layer, int *is_b)
{
    const size_t length = strlen(tensor->name), prefix = strlen(key_prefix), suffix = strlen(key_suffixes[0]);
    int which = -1;
    (void)source;
    if (length > prefix + suffix && strncmp(tensor->name, key_prefix, prefix) == 0)
        for (int i = 0; i < 2; ++i)
            if (strcmp(tensor->name + length - suffix, key_suffixes[i]) == 0) which = i;
    PLORA_CHECK(which >= 0, PLORA_ERROR_UNSUPPORTED,
                "tensor '%.200s' at byte %llu is not %s<layer>.lora_A.weight or .lora_B.weight", tensor->name,
                (unsigned long long)tensor->offset, key_prefix);
    memcpy(layer, tensor->name + prefix, length - prefix - suffix);
    layer[length - prefix - suffix] = '\0';
    *is_b = which;
    return PLORA_OK;
}

static plora_status choose(const struct plora__adapter_source *source, const struct plora__layer *layer, int64_t rank,
                           double *alpha, double *scale)
{
    const struct files *files = (const struct files *)source;
    int64_t wanted;
    plora__peft_config_layer(&files->config, layer->name, &wanted, alpha);
    PLORA_CHECK(rank == wanted, PLORA_ERROR_SHAPE, "layer '%s': its lora_A has rank %lld, but %s gives it rank %lld",
                layer->name, (long long)rank, config_name, (long long)wanted);
    *scale = *alpha / (files->config.rslora ? sqrt((double)rank) : (double)rank);
    return PLORA_OK;
}

static plora_status load_files(plora_model *model, const char *directory, struct files *files,
                               plora_adapters_options *options, plora_adapters **adapters)
{
    plora_context *context = model->context;
    struct plora__mapping text = {NULL, 0};
    char *tensors_path = NULL, *config_path = NULL;
    const char *culprit = NULL; /* the file a message is about */
    plora_status status;
    PLORA_TRY_OUT(plora__join_path(context, directory, config_name, &config_path));
    PLORA_TRY_OUT(plora__join_path(context, directory, tensors_name, &tensors_path));
    PLORA_TRY_OUT(plora__file_map(context, config_path, &text));
    culprit = config_path;
    PLORA_TRY_OUT(plora__peft_config_read(context, (const char *)text.data, text.bytes, &files->config));
    culprit = NULL;
    PLORA_TRY_OUT(plora__safetensors_open(context, tensors_path, &files->tensors));
    culprit = tensors_path;
    options->rank = (int32_t)files->config.rank;
    options->alpha = files->config.alpha;
    options->rslora = files->config.rslora;
    files->source.tensors = files->tensors.tensors;
    files->source.tensor_count = files->tensors.tensor_count;
    status = plora__adapters_from(model, &files->source, options, adapters);
out:
    if (status != PLORA_OK && culprit != NULL) status = plora__fail_in(status, culprit);
    plora__peft_config_free(&files->config);
    plora__file_unmap(context, &text);
    plora__free_string(context, tensors_path);
    plora__free_string(context, config_path);
    return status;
}

plora_status plora__peft_load(plora_model *model, const char *directory, plora_adapters_options *options,
                              plora_adapters **adapters)
{
    struct files files = {.source = {.name_layer = name_layer, .choose = choose},
                          .tensors = {.context = model->context}};
    const plora_status status = load_files(model, directory, &files, options, adapters);
    plora__safetensors_close(&files.tensors);
    return status;
}
