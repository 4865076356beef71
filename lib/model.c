/* model.c: the model handle: a list of linear layers over weights that the host (or model_files.c) owns.
 *
 * Layers whose weight is the very same matrix are tied: they share one entry of `weights`, hence one adapter and one merge. A weight
 * knows its place in the whole one that it is a shard of.
 * File formats are not here: see model_files.c. */
#include <string.h>

#include "handles.h"
#include "matrix.h"

plora_status plora_model_create(plora_context *context, plora_model **model)
{
    PLORA_CHECK(context != NULL && model != NULL, PLORA_ERROR_INVALID_ARGUMENT, "%s is NULL",
                context == NULL ? "context" : "model");
    void *memory;
    PLORA_TRY(plora__allocate_zeroed(context, sizeof(plora_model), &memory));
    plora_model *created = memory;
    atomic_init(&created->references, 1);
    atomic_init(&created->adapters_made, 0);
    created->context = context;
    plora__context_retain(context);
    *model = created;
    return PLORA_OK;
}

plora_status plora_model_open(plora_context *context, const char *path, plora_model **model)
{
    PLORA_CHECK(path != NULL && model != NULL, PLORA_ERROR_INVALID_ARGUMENT, "%s is NULL",
                path == NULL ? "path" : "model");
    plora_model *opened;
    PLORA_TRY(plora_model_create(context, &opened));
    plora_status status = plora__model_files_open(opened, path);
    if (status == PLORA_OK) status = plora__duplicate(context, path, &opened->path);
    if (status != PLORA_OK) {
        plora_model_destroy(opened);
        return status;
    }
    *model = opened;
    return PLORA_OK;
}

void plora__model_retain(plora_model *model)
{
    atomic_fetch_add_explicit(&model->references, 1, memory_order_relaxed);
}

void plora__model_release(plora_model *model)
{
    if (atomic_fetch_sub_explicit(&model->references, 1, memory_order_acq_rel) != 1) return;
    plora_context *context = model->context;
    for (int32_t i = 0; i < model->layer_count; ++i)
        plora__free_string(context, model->layers[i].name);
    plora__free(context, model->layers, (size_t)model->layer_capacity * sizeof *model->layers);
    plora__residuals_free(model);
    for (int32_t i = 0; i < model->weight_count; ++i)
        plora__quantised_free(context, &model->weights[i]);
    plora__host_device_close(context, model->host_device);
    plora__free(context, model->weights, (size_t)model->weight_capacity * sizeof *model->weights);
    plora__model_files_close(context, model->files);
    plora__free_string(context, model->path);
    plora__free(context, model, sizeof *model);
    plora__context_release(context);
}

void plora_model_destroy(plora_model *model)
{
    if (model != NULL) plora__model_release(model);
}

/* ------------------------------------------------------------------------------------------------------- adding layers */

static plora_status check_weight(const plora_linear *linear)
{
    const plora_matrix *w = &linear->weight;
    PLORA_CHECK(w->data != NULL, PLORA_ERROR_INVALID_ARGUMENT, "layer '%s': weight data is NULL", linear->name);
    PLORA_CHECK(plora__dtype_known(w->dtype), PLORA_ERROR_INVALID_ARGUMENT, "layer '%s': weight dtype %d is unknown",
                linear->name, w->dtype);
    PLORA_CHECK(w->rows > 0 && w->columns > 0 && w->stride >= w->columns, PLORA_ERROR_SHAPE,
                "layer '%s': weight [%lld,%lld] with stride %lld: rows and columns must be > 0, stride >= columns",
                linear->name, (long long)w->rows, (long long)w->columns, (long long)w->stride);
    PLORA_CHECK(w->rows <= PTRDIFF_MAX / 4 / w->stride, PLORA_ERROR_SHAPE,
                "layer '%s': weight of %lld rows with stride %lld exceeds the address space", linear->name,
                (long long)w->rows, (long long)w->stride);
    PLORA_CHECK((uintptr_t)w->data % plora__dtype_size(w->dtype) == 0, PLORA_ERROR_INVALID_ARGUMENT,
                "layer '%s': weight at %p is not aligned for %s", linear->name, w->data, plora__dtype_name(w->dtype));
    return PLORA_OK;
}

static plora_status find_weight(const plora_model *model, const plora_linear *linear, int32_t *weight)
{
    const plora_matrix *w = &linear->weight;
    const int32_t fan_in_fan_out = (linear->flags & PLORA_LAYER_FAN_IN_FAN_OUT) != 0;
    *weight = -1;
    for (int32_t i = 0; i < model->weight_count; ++i) {
        const struct plora__weight *other = &model->weights[i];
        const plora_matrix *o = &other->matrix;
        if (o->data == NULL) continue; /* quantised, without a master */
        if (other->quantised == NULL && o->data == w->data && o->rows == w->rows && o->columns == w->columns &&
            o->stride == w->stride && o->dtype == w->dtype && other->fan_in_fan_out == fan_in_fan_out) {
            *weight = i;
            return PLORA_OK;
        }
        PLORA_CHECK(!plora__matrix_overlap(o, w), PLORA_ERROR_INVALID_ARGUMENT,
                    "layer '%s': its weight at %p overlaps, in part, that of layer '%s' at %p", linear->name, w->data,
                    model->layers[other->first_layer].name, o->data);
    }
    return PLORA_OK;
}

/* Makes room for one more item of `size` bytes in *items[count .. *capacity). */
static plora_status grow(plora_context *context, void **items, int32_t count, int32_t *capacity, size_t size)
{
    if (count < *capacity) return PLORA_OK;
    PLORA_CHECK(*capacity < INT32_MAX / 4, PLORA_ERROR_UNSUPPORTED, "%d layers are the most that a model can have",
                count);
    const int32_t larger = *capacity == 0 ? 16 : *capacity * 2;
    void *moved;
    PLORA_TRY(plora__allocate(context, (size_t)larger * size, &moved));
    if (count > 0) memcpy(moved, *items, (size_t)count * size);
    plora__free(context, *items, (size_t)*capacity * size);
    *items = moved;
    *capacity = larger;
    return PLORA_OK;
}

plora_status plora__model_check_layer(const plora_model *model, const char *name, int32_t flags, const void *bias,
                                      int32_t bias_dtype)
{
    PLORA_CHECK(name != NULL && name[0] != '\0', PLORA_ERROR_INVALID_ARGUMENT, "the layer's name is empty");
    const int32_t known_flags = PLORA_LAYER_FAN_IN_FAN_OUT | PLORA_LAYER_HEAD | PLORA_LAYER_GATHERED;
    PLORA_CHECK((flags & ~known_flags) == 0, PLORA_ERROR_INVALID_ARGUMENT, "layer '%s': unknown flags 0x%x", name,
                (unsigned)(flags & ~known_flags));
    PLORA_CHECK(bias == NULL || plora__dtype_known(bias_dtype), PLORA_ERROR_INVALID_ARGUMENT,
                "layer '%s': bias dtype %d is unknown", name, bias_dtype);
    PLORA_CHECK(bias == NULL || (flags & PLORA_LAYER_GATHERED) == 0, PLORA_ERROR_INVALID_ARGUMENT,
                "layer '%s': it has a bias and PLORA_LAYER_GATHERED, whose products and biases are the host's", name);
    PLORA_CHECK(atomic_load(&model->adapters_made) == 0, PLORA_ERROR_INVALID_ARGUMENT,
                "layer '%s': adapters exist already on this model", name);
    for (int32_t i = 0; i < model->layer_count; ++i)
        PLORA_CHECK(strcmp(model->layers[i].name, name) != 0, PLORA_ERROR_INVALID_ARGUMENT,
                    "layer '%s' exists already, as number %d", name, i);
    return PLORA_OK;
}

plora_status plora__model_reserve(plora_model *model, const char *name, char **copy)
{
    plora_context *context = model->context;
    PLORA_TRY(
        grow(context, (void **)&model->layers, model->layer_count, &model->layer_capacity, sizeof *model->layers));
    PLORA_TRY(
        grow(context, (void **)&model->weights, model->weight_count, &model->weight_capacity, sizeof *model->weights));
    return plora__duplicate(context, name, copy);
}

void plora__model_append(plora_model *model, struct plora__layer layer, const struct plora__weight *added)
{
    if (layer.weight == model->weight_count) model->weights[model->weight_count++] = *added;
    const struct plora__weight *weight = &model->weights[layer.weight];
    layer.in_features = weight->fan_in_fan_out ? weight->matrix.rows : weight->matrix.columns;
    layer.out_features = weight->fan_in_fan_out ? weight->matrix.columns : weight->matrix.rows;
    if (weight->gathered) {
        layer.in_features = weight->shard.columns;
        layer.out_features = weight->shard.rows;
    }
    model->layers[model->layer_count++] = layer;
}

plora_status plora_model_add_linear(plora_model *model, const plora_linear *given, int32_t *layer)
{
    PLORA_CHECK(model != NULL && given != NULL, PLORA_ERROR_INVALID_ARGUMENT, "%s is NULL",
                model == NULL ? "model" : "linear");
    plora_linear linear = PLORA_LINEAR_INIT;
    PLORA_TRY(plora__read_options(&linear, sizeof linear, given, "plora_linear"));
    PLORA_TRY(plora__model_check_layer(model, linear.name, linear.flags, linear.bias, linear.bias_dtype));
    PLORA_TRY(check_weight(&linear));
    struct plora__weight added = {.matrix = linear.weight,
                                  .fan_in_fan_out = (linear.flags & PLORA_LAYER_FAN_IN_FAN_OUT) != 0,
                                  .gathered = (linear.flags & PLORA_LAYER_GATHERED) != 0,
                                  .first_layer = model->layer_count};
    PLORA_TRY(plora__shard_place(&linear.shard, &linear.weight, added.fan_in_fan_out, linear.name, &added.shard));
    int32_t weight;
    char *name;
    PLORA_TRY(find_weight(model, &linear, &weight));
    if (weight >= 0) PLORA_TRY(plora__shard_same(model, weight, linear.name, &added.shard, added.gathered));
    PLORA_TRY(plora__model_reserve(model, linear.name, &name));
    if (layer != NULL) *layer = model->layer_count;
    plora__model_append(model,
                        (struct plora__layer){.name = name,
                                              .weight = weight < 0 ? model->weight_count : weight,
                                              .flags = linear.flags,
                                              .bias = linear.bias,
                                              .bias_dtype = linear.bias_dtype},
                        &added);
    return PLORA_OK;
}

/* ------------------------------------------------------------------------------------------------------------- queries */

int32_t plora_model_layer_count(const plora_model *model)
{
    return model == NULL ? 0 : model->layer_count;
}

plora_status plora_model_find_layer(const plora_model *model, const char *name, int32_t *layer)
{
    PLORA_CHECK(model != NULL && name != NULL && layer != NULL, PLORA_ERROR_INVALID_ARGUMENT, "%s is NULL",
                model == NULL  ? "model"
                : name == NULL ? "name"
                               : "layer");
    for (int32_t i = 0; i < model->layer_count; ++i)
        if (strcmp(model->layers[i].name, name) == 0) {
            *layer = i;
            return PLORA_OK;
        }
    return plora__fail(PLORA_ERROR_NOT_FOUND, "no layer is named '%s' among the model's %d", name, model->layer_count);
}

plora_status plora_model_layer(const plora_model *model, int32_t layer, plora_linear *linear)
{
    PLORA_CHECK(model != NULL, PLORA_ERROR_INVALID_ARGUMENT, "model is NULL");
    PLORA_CHECK(layer >= 0 && layer < model->layer_count, PLORA_ERROR_INVALID_ARGUMENT,
                "layer %d: the model has layers 0 .. %d", layer, model->layer_count - 1);
    const struct plora__layer *found = &model->layers[layer];
    plora_linear result = PLORA_LINEAR_INIT;
    result.name = found->name;
    result.weight = model->weights[found->weight].matrix;
    if (model->weights[found->weight].quantised != NULL) result.weight.data = NULL;
    result.bias = found->bias;
    result.bias_dtype = found->bias_dtype;
    result.flags = found->flags;
    result.shard = plora__shard_given(&model->weights[found->weight]);
    return plora__write_result(linear, &result, sizeof result, "plora_linear");
}
