/* model_files.c: the files of an opened model: which tensors they hold, which of these are layers, and writing them again.
 *
 *     path = FILE.safetensors                            one shard
 *     path = DIRECTORY with model.safetensors            one shard
 *     path = DIRECTORY with model.safetensors.index.json shards, sorted by name: {"weight_map": {"tensor": "shard file", ...}}
 *
 * On the CPU the layers point into the mappings; on CUDA all tensors are copied into one block of device memory, and the layers point
 * there. Either way what an unload wrote is what a save reads. The format itself is safetensors.c's. */
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "dtype.h"
#include "json.h"
#include "safetensors.h"

struct plora__model_files {
    struct plora__safetensors *shards;
    int32_t shard_count, shard_capacity;
    void *device; /* CUDA: the tensors, one after the other */
    size_t device_bytes;
};

static const char index_name[] = "model.safetensors.index.json";

/* ------------------------------------------------------------------------------------------------------------- opening */

static const struct plora__tensor *find(const struct plora__model_files *files, const char *name)
{
    for (int32_t i = 0; i < files->shard_count; ++i) {
        const struct plora__tensor *tensor = plora__safetensors_find(&files->shards[i], name);
        if (tensor != NULL) return tensor;
    }
    return NULL;
}

static plora_status reserve_shards(plora_context *context, struct plora__model_files *files, int32_t count)
{
    void *memory;
    size_t bytes;
    PLORA_TRY(plora__multiply((size_t)count, sizeof *files->shards, &bytes));
    PLORA_TRY(plora__allocate_zeroed(context, bytes, &memory));
    files->shards = memory;
    files->shard_capacity = count;
    return PLORA_OK;
}

static plora_status open_shard(plora_context *context, struct plora__model_files *files, const char *path)
{
    struct plora__safetensors *shard = &files->shards[files->shard_count];
    PLORA_TRY(plora__safetensors_open(context, path, shard));
    for (int32_t i = 0; i < shard->tensor_count; ++i) {
        const struct plora__tensor *tensor = &shard->tensors[i];
        if (find(files, tensor->name) == NULL) continue;
        const plora_status status =
            plora__fail(PLORA_ERROR_FORMAT, "%.400s: tensor '%.200s' at byte %llu is in another shard too", path,
                        tensor->name, (unsigned long long)tensor->offset);
        plora__safetensors_close(shard);
        return status;
    }
    files->shard_count++;
    return PLORA_OK;
}

/* The weight map of an index, decoded. */
struct weight_map {
    const char **tensors, **shards; /* [count]; shards ends sorted and without repetitions, in `unique` */
    const char **unique;
    int32_t *order;
    int32_t count, unique_count;
    void *block;
    size_t bytes;
};

static int shard_less(int32_t i, int32_t j, const void *user)
{
    const struct weight_map *map = user;
    return strcmp(map->shards[i], map->shards[j]) < 0;
}

static plora_status check_shard_name(const struct weight_map *map, int32_t i, size_t offset)
{
    const char *name = map->shards[i];
    const int plain = name[0] != '\0' && strchr(name, '/') == NULL && strcmp(name, ".") != 0 && strcmp(name, "..") != 0;
    PLORA_CHECK(plain, PLORA_ERROR_FORMAT, "tensor '%.200s': its shard '%.200s' at byte %zu is not a plain file name",
                map->tensors[i], name, offset);
    return PLORA_OK;
}

static plora_status read_weight_map(const struct plora__json *json, size_t text_bytes, struct weight_map *map)
{
    const int32_t object = plora__json_member(json, 0, "weight_map");
    PLORA_CHECK(object >= 0 && plora__json_type(json, object) == PLORA__JSON_OBJECT, PLORA_ERROR_FORMAT,
                "there is no object \"weight_map\"");
    const int32_t count = plora__json_size(json, object);
    PLORA_CHECK(count > 0, PLORA_ERROR_FORMAT, "\"weight_map\" at byte %zu is empty", plora__json_offset(json, object));
    const size_t strings_at = (size_t)count * (3 * sizeof(char *) + sizeof(int32_t));
    map->bytes = strings_at + text_bytes; /* the quotes of a string leave room for its terminator */
    PLORA_TRY(plora__allocate(json->context, map->bytes, &map->block));
    map->tensors = map->block;
    map->shards = map->tensors + count;
    map->unique = map->shards + count;
    map->order = (int32_t *)(map->unique + count);
    char *strings = (char *)map->block + strings_at;
    int32_t key = object + 1;
    for (int32_t i = 0; i < count; ++i, key = plora__json_next(json, key + 1)) {
        map->tensors[i] = strings;
        strings += plora__json_string(json, key, strings) + 1;
        PLORA_CHECK(plora__json_type(json, key + 1) == PLORA__JSON_STRING, PLORA_ERROR_FORMAT,
                    "tensor '%.200s': its shard at byte %zu is not a string", map->tensors[i],
                    plora__json_offset(json, key + 1));
        map->shards[i] = strings;
        strings += plora__json_string(json, key + 1, strings) + 1;
        map->order[i] = i;
        PLORA_TRY(check_shard_name(map, i, plora__json_offset(json, key + 1)));
    }
    map->count = count;
    plora__sort(map->order, count, shard_less, map);
    for (int32_t i = 0; i < count; ++i) {
        const char *name = map->shards[map->order[i]];
        if (map->unique_count > 0 && strcmp(map->unique[map->unique_count - 1], name) == 0) continue;
        map->unique[map->unique_count++] = name;
    }
    return PLORA_OK;
}

static plora_status open_mapped_shards(plora_context *context, struct plora__model_files *files, const char *directory,
                                       const struct weight_map *map)
{
    PLORA_TRY(reserve_shards(context, files, map->unique_count));
    for (int32_t i = 0; i < map->unique_count; ++i) {
        char *path;
        PLORA_TRY(plora__join_path(context, directory, map->unique[i], &path));
        const plora_status status = open_shard(context, files, path);
        plora__free_string(context, path);
        PLORA_TRY(status);
    }
    int32_t shard = 0;
    for (int32_t i = 0; i < map->count; ++i) {
        const int32_t entry = map->order[i];
        while (strcmp(map->unique[shard], map->shards[entry]) != 0)
            ++shard;
        PLORA_CHECK(plora__safetensors_find(&files->shards[shard], map->tensors[entry]) != NULL, PLORA_ERROR_FORMAT,
                    "tensor '%.200s' is not in its shard '%.200s'", map->tensors[entry], map->shards[entry]);
    }
    return PLORA_OK;
}

static plora_status open_index(plora_context *context, struct plora__model_files *files, const char *directory,
                               const char *path)
{
    struct plora__mapping mapping;
    struct plora__json json = {0};
    struct weight_map map = {0};
    plora_status status;
    PLORA_TRY(plora__file_map(context, path, &mapping));
    PLORA_TRY_OUT(plora__json_parse(context, (const char *)mapping.data, mapping.bytes, &json));
    PLORA_TRY_OUT(read_weight_map(&json, mapping.bytes, &map));
    status = open_mapped_shards(context, files, directory, &map);
out:
    plora__free(context, map.block, map.bytes);
    plora__json_free(&json);
    plora__file_unmap(context, &mapping);
    return status == PLORA_OK ? PLORA_OK : plora__fail_in(status, path);
}

static plora_status open_directory(plora_context *context, struct plora__model_files *files, const char *directory)
{
    char *single, *index;
    struct stat info;
    PLORA_TRY(plora__join_path(context, directory, "model.safetensors", &single));
    plora_status status = plora__join_path(context, directory, index_name, &index);
    if (status != PLORA_OK) {
        plora__free_string(context, single);
        return status;
    }
    if (stat(single, &info) == 0) {
        PLORA_TRY_OUT(reserve_shards(context, files, 1));
        status = open_shard(context, files, single);
    } else if (stat(index, &info) == 0) {
        status = open_index(context, files, directory, index);
    } else {
        status = plora__fail(PLORA_ERROR_IO, "'%.600s' holds neither model.safetensors nor %s", directory, index_name);
    }
out:
    plora__free_string(context, single);
    plora__free_string(context, index);
    return status;
}

/* What a tensor takes in the block of device memory. */
static size_t room_of(const struct plora__tensor *tensor)
{
    const size_t align = PLORA__ALIGNMENT;
    return (tensor->bytes + align - 1) / align * align;
}

static plora_status copy_to_device(plora_context *context, const struct plora__model_files *files)
{
    unsigned char *place = files->device;
    for (int32_t i = 0; i < files->shard_count; ++i)
        for (int32_t t = 0; t < files->shards[i].tensor_count; ++t) {
            const struct plora__tensor *tensor = &files->shards[i].tensors[t];
            PLORA_TRY(context->backend->copy(context->device, place, tensor->data, tensor->bytes, NULL));
            place += room_of(tensor);
        }
    return context->backend->synchronize(context->device, NULL);
}

/* Moves every tensor into device memory, and gives the mappings back. */
static plora_status move_to_device(plora_context *context, struct plora__model_files *files)
{
    size_t bytes = 0;
    for (int32_t i = 0; i < files->shard_count; ++i)
        for (int32_t t = 0; t < files->shards[i].tensor_count; ++t)
            bytes += room_of(&files->shards[i].tensors[t]);
    PLORA_TRY(plora__device_allocate(context, bytes, &files->device));
    files->device_bytes = bytes;
    PLORA_TRY(copy_to_device(context, files));
    unsigned char *place = files->device;
    for (int32_t i = 0; i < files->shard_count; ++i) {
        struct plora__safetensors *shard = &files->shards[i];
        for (int32_t t = 0; t < shard->tensor_count; ++t) {
            struct plora__tensor *tensor = &shard->tensors[t];
            if (tensor->copied) plora__free(context, tensor->data, tensor->bytes);
            tensor->copied = 0;
            if (tensor->bytes > 0) tensor->data = place;
            place += room_of(tensor);
        }
        plora__file_unmap(context, &shard->mapping);
    }
    return PLORA_OK;
}

static int is_head(const char *name)
{
    static const char *const heads[] = {"lm_head", "embed_tokens", "embed_out", "wte", "wpe"};
    const char *dot = strrchr(name, '.');
    for (int i = 0; i < 5; ++i)
        if (strcmp(dot == NULL ? name : dot + 1, heads[i]) == 0) return 1;
    return 0;
}

/* `stem` is the tensor's name without ".weight"; it has room for ".bias". */
static plora_status add_layer(plora_model *model, const struct plora__tensor *tensor, char *stem)
{
    const size_t length = strlen(stem);
    plora_linear linear = PLORA_LINEAR_INIT;
    linear.name = stem;
    linear.flags = is_head(stem) ? PLORA_LAYER_HEAD : 0;
    linear.weight = (plora_matrix){
        tensor->data, tensor->shape[0], tensor->shape[1], tensor->shape[1], plora__tensor_dtype(tensor), 0};
    memcpy(stem + length, ".bias", sizeof ".bias");
    const struct plora__tensor *bias = find(model->files, stem);
    stem[length] = '\0';
    if (bias != NULL && bias->dimensions == 1 && bias->shape[0] == tensor->shape[0] && plora__tensor_dtype(bias) >= 0) {
        linear.bias = bias->data;
        linear.bias_dtype = plora__tensor_dtype(bias);
    }
    return plora_model_add_linear(model, &linear, NULL);
}

static plora_status add_layers(plora_model *model, const struct plora__safetensors *shard)
{
    static const char suffix[] = ".weight";
    for (int32_t i = 0; i < shard->tensor_count; ++i) {
        const struct plora__tensor *tensor = &shard->tensors[i];
        const size_t length = strlen(tensor->name);
        if (tensor->dimensions != 2 || tensor->bytes == 0 || plora__tensor_dtype(tensor) < 0) continue;
        if (length < sizeof suffix || strcmp(tensor->name + length - strlen(suffix), suffix) != 0) continue;
        char *stem;
        PLORA_TRY(plora__duplicate(model->context, tensor->name, &stem));
        stem[length - strlen(suffix)] = '\0';
        const plora_status status = add_layer(model, tensor, stem);
        plora__free(model->context, stem, length + 1);
        PLORA_TRY(status);
    }
    return PLORA_OK;
}

plora_status plora__model_files_open(plora_model *model, const char *path)
{
    plora_context *context = model->context;
    void *memory;
    PLORA_TRY(plora__allocate_zeroed(context, sizeof *model->files, &memory));
    struct plora__model_files *files = memory;
    struct stat info;
    plora_status status;
    if (stat(path, &info) == 0 && S_ISDIR(info.st_mode)) {
        PLORA_TRY_OUT(open_directory(context, files, path));
    } else {
        PLORA_TRY_OUT(reserve_shards(context, files, 1));
        PLORA_TRY_OUT(open_shard(context, files, path));
    }
    if (context->options.backend != PLORA_BACKEND_CPU) {
        status = move_to_device(context, files);
        if (status != PLORA_OK) {
            status = plora__fail_in(status, path);
            goto out;
        }
    }
    model->files = files; /* closed with the model from here on, whose layers point into it */
    for (int32_t i = 0; i < files->shard_count; ++i) {
        status = add_layers(model, &files->shards[i]);
        if (status != PLORA_OK) return plora__fail_in(status, path);
    }
    return PLORA_OK;
out:
    plora__model_files_close(context, files);
    return status;
}

void plora__model_files_close(plora_context *context, struct plora__model_files *files)
{
    if (files == NULL) return;
    for (int32_t i = 0; i < files->shard_count; ++i)
        plora__safetensors_close(&files->shards[i]);
    plora__device_free(context, files->device, files->device_bytes);
    plora__free(context, files->shards, (size_t)files->shard_capacity * sizeof *files->shards);
    plora__free(context, files, sizeof *files);
}

plora_status plora_model_find_tensor(const plora_model *model, const char *name, plora_matrix *tensor)
{
    PLORA_CHECK(model != NULL && name != NULL && tensor != NULL, PLORA_ERROR_INVALID_ARGUMENT, "%s is NULL",
                model == NULL  ? "model"
                : name == NULL ? "name"
                               : "tensor");
    const struct plora__tensor *found = model->files == NULL ? NULL : find(model->files, name);
    PLORA_CHECK(found != NULL, PLORA_ERROR_NOT_FOUND, "no tensor '%.600s' in the model's files", name);
    const int32_t dtype = plora__tensor_dtype(found);
    PLORA_CHECK(dtype >= 0, PLORA_ERROR_UNSUPPORTED, "tensor '%.600s' is of dtype %s: only F32, BF16 and F16 are", name,
                found->dtype);
    const int64_t columns = found->dimensions == 0 ? 1 : found->shape[found->dimensions - 1];
    const int64_t elements = (int64_t)(found->bytes / plora__dtype_size(dtype));
    const int64_t rows = columns == 0 ? 0 : elements / columns;
    *tensor = (plora_matrix){found->data, rows, columns, columns, dtype, 0};
    return PLORA_OK;
}

/* -------------------------------------------------------------------------------------------------------------- saving */

static plora_status save_opened(const plora_model *model, const char *path)
{
    const struct plora__model_files *files = model->files;
    size_t tensor_count = 0, metadata_count = 0;
    for (int32_t i = 0; i < files->shard_count; ++i) {
        tensor_count += (size_t)files->shards[i].tensor_count;
        metadata_count += (size_t)files->shards[i].metadata_count;
    }
    const size_t metadata_at = tensor_count * sizeof(struct plora__tensor);
    const size_t bytes = metadata_at + metadata_count * sizeof(struct plora__metadata);
    if (bytes == 0) return plora__safetensors_write(model->context, path, NULL, 0, NULL, 0);
    void *memory;
    PLORA_TRY(plora__allocate(model->context, bytes, &memory));
    struct plora__tensor *tensors = memory;
    struct plora__metadata *metadata = (struct plora__metadata *)((char *)memory + metadata_at);
    int32_t tensors_done = 0, metadata_done = 0;
    for (int32_t i = 0; i < files->shard_count; ++i) {
        const struct plora__safetensors *shard = &files->shards[i];
        for (int32_t t = 0; t < shard->tensor_count; ++t)
            tensors[tensors_done++] = shard->tensors[t];
        for (int32_t m = 0; m < shard->metadata_count; ++m) { /* shards repeat each other's: the first counts */
            int32_t known = i == 0 ? metadata_done : 0;
            while (known < metadata_done && strcmp(metadata[known].key, shard->metadata[m].key) != 0)
                ++known;
            if (known == metadata_done) metadata[metadata_done++] = shard->metadata[m];
        }
    }
    const plora_status status =
        plora__safetensors_write(model->context, path, tensors, tensors_done, metadata, metadata_done);
    plora__free(model->context, memory, bytes);
    return status;
}

/* Arrays for the tensors of a host-built model, and their names. */
struct gathered {
    struct plora__tensor *tensors;
    int64_t (*shapes)[2];
    char *names;
    int32_t count;
};

static void gather(struct gathered *all, const char *layer, const char *part, const void *data, int32_t dtype,
                   int64_t rows, int64_t columns, int64_t stride)
{
    const size_t size = plora__dtype_size(dtype);
    int64_t *shape = all->shapes[all->count];
    char *name = all->names;
    all->names += sprintf(name, "%s.%s", layer, part) + 1;
    shape[0] = rows > 0 ? rows : columns;
    shape[1] = columns;
    all->tensors[all->count++] = (struct plora__tensor){
        .name = name,
        .dtype = plora__dtype_name(dtype),
        .shape = shape,
        .dimensions = rows > 0 ? 2 : 1,
        .bytes = (size_t)(rows > 0 ? rows * columns : columns) * size,
        .data = (void *)(uintptr_t)data,
        .row_bytes = (size_t)columns * size,
        .stride_bytes = (size_t)stride * size,
    };
}

static plora_status save_built(const plora_model *model, const char *path)
{
    for (int32_t i = 0; i < model->layer_count; ++i)
        PLORA_CHECK(model->weights[model->layers[i].weight].matrix.data != NULL, PLORA_ERROR_UNSUPPORTED,
                    "layer '%s' is quantised without a master: there is no full-precision weight to save",
                    model->layers[i].name);
    static const struct plora__metadata metadata = {"format", "pt"}; /* transformers asks for it */
    if (model->layer_count == 0) return plora__safetensors_write(model->context, path, NULL, 0, &metadata, 1);
    const size_t count = 2 * (size_t)model->layer_count;
    const size_t shapes_at = count * sizeof(struct plora__tensor), names_at = shapes_at + count * sizeof(int64_t[2]);
    size_t bytes = names_at;
    for (int32_t i = 0; i < model->layer_count; ++i)
        bytes += 2 * (strlen(model->layers[i].name) + sizeof ".weight");
    void *memory;
    PLORA_TRY(plora__allocate(model->context, bytes, &memory));
    struct gathered all = {
        .tensors = memory,
        .shapes = (int64_t(*)[2])((char *)memory + shapes_at),
        .names = (char *)memory + names_at,
    };
    for (int32_t i = 0; i < model->layer_count; ++i) {
        const struct plora__layer *layer = &model->layers[i];
        const plora_matrix *w = &model->weights[layer->weight].matrix;
        gather(&all, layer->name, "weight", w->data, w->dtype, w->rows, w->columns, w->stride);
        if (layer->bias != NULL)
            gather(&all, layer->name, "bias", layer->bias, layer->bias_dtype, 0, layer->out_features,
                   layer->out_features);
    }
    const plora_status status = plora__safetensors_write(model->context, path, all.tensors, all.count, &metadata, 1);
    plora__free(model->context, memory, bytes);
    return status;
}

plora_status plora_model_save(const plora_model *model, const char *path)
{
    PLORA_CHECK(model != NULL && path != NULL, PLORA_ERROR_INVALID_ARGUMENT, "%s is NULL",
                model == NULL ? "model" : "path");
    return model->files != NULL ? save_opened(model, path) : save_built(model, path);
}
