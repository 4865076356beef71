/* adapter_load.c: see adapter_load.h. Tensors are sorted into pairs, A and B of each layer; everything is checked before the set is
 * made, into whose arena they are copied. What the formats differ in is behind struct plora__adapter_source. */
#include "adapter_load.h"

#include <math.h>
#include <string.h>
#include <sys/stat.h>

#include "dtype.h"
#include "gguf_adapter.h"
#include "peft.h"

static const char *const parts[2] = {"lora_A", "lora_B"};

struct load {
    plora_model *model;
    const struct plora__adapter_source *source;
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

/* Sorts one tensor into the pairs. `scratch` has room for the name of its layer. */
static plora_status place_tensor(struct load *load, const struct plora__tensor *tensor, char *scratch)
{
    int is_b;
    int32_t layer;
    PLORA_TRY(load->source->name_layer(load->source, tensor, scratch, &is_b));
    PLORA_CHECK(plora__tensor_dtype(tensor) >= 0, PLORA_ERROR_UNSUPPORTED,
                "tensor '%.200s' is of dtype %s: only F32, BF16 and F16 are", tensor->name, tensor->dtype);
    PLORA_CHECK(tensor->dimensions == 2, PLORA_ERROR_SHAPE, "tensor '%.200s' at byte %llu has %d dimensions: must be 2",
                tensor->name, (unsigned long long)tensor->offset, tensor->dimensions);
    const plora_status status = plora_model_find_layer(load->model, scratch, &layer);
    if (status != PLORA_OK) return plora__fail_in(status, tensor->name);
    load->pairs[layer][is_b] = tensor; /* names are unique in a file, and so are a format's names of a layer */
    return check_values(tensor);
}

static plora_status choose_layer(struct load *load, int32_t layer)
{
    const struct plora__layer *l = &load->model->layers[layer];
    const struct plora__tensor *a = load->pairs[layer][0], *b = load->pairs[layer][1];
    struct plora__adapter_choice *choice = &load->choices[load->choice_count];
    if (a == NULL && b == NULL) return PLORA_OK;
    PLORA_CHECK(a != NULL && b != NULL, PLORA_ERROR_FORMAT, "tensor '%.200s' is without its partner, %s of layer '%s'",
                a != NULL ? a->name : b->name, parts[a != NULL], l->name);
    const int64_t rank = a->shape[0];
    PLORA_CHECK(a->shape[1] == l->in_features && b->shape[0] == l->out_features && b->shape[1] == rank,
                PLORA_ERROR_SHAPE, "layer '%s' [N=%lld,K=%lld]: lora_A is [%lld,%lld], lora_B is [%lld,%lld]", l->name,
                (long long)l->out_features, (long long)l->in_features, (long long)rank, (long long)a->shape[1],
                (long long)b->shape[0], (long long)b->shape[1]);
    PLORA_CHECK(rank <= INT32_MAX, PLORA_ERROR_SHAPE, "layer '%s': rank %lld exceeds 2^31 - 1", l->name,
                (long long)rank);
    choice->layer = layer;
    choice->rank = (int32_t)rank;
    PLORA_TRY(load->source->choose(load->source, l, rank, &choice->alpha, &choice->scale));
    for (int32_t i = 0; i < load->choice_count; ++i)
        PLORA_CHECK(load->model->layers[load->choices[i].layer].weight != l->weight, PLORA_ERROR_UNSUPPORTED,
                    "layers '%s' and '%s' are tied, but each has an adapter of its own",
                    load->model->layers[load->choices[i].layer].name, l->name);
    load->choice_count++;
    return PLORA_OK;
}

static plora_status pair_tensors(struct load *load)
{
    plora_context *context = load->model->context;
    size_t longest = 0;
    for (int32_t i = 0; i < load->source->tensor_count; ++i) {
        const size_t length = strlen(load->source->tensors[i].name);
        longest = length > longest ? length : longest;
    }
    const size_t layers = (size_t)load->model->layer_count, choices_at = layers * sizeof *load->pairs;
    const size_t scratch_at = choices_at + layers * sizeof *load->choices;
    load->bytes = scratch_at + longest + PLORA__LAYER_NAME_ROOM;
    PLORA_TRY(plora__allocate_zeroed(context, load->bytes, &load->block));
    load->pairs = load->block;
    load->choices = (struct plora__adapter_choice *)((char *)load->block + choices_at);
    char *scratch = (char *)load->block + scratch_at;
    PLORA_CHECK(load->source->tensor_count > 0, PLORA_ERROR_FORMAT, "there are no tensors");
    for (int32_t i = 0; i < load->source->tensor_count; ++i)
        PLORA_TRY(place_tensor(load, &load->source->tensors[i], scratch));
    for (int32_t i = 0; i < load->model->layer_count; ++i)
        PLORA_TRY(choose_layer(load, i));
    return PLORA_OK;
}

/* Copies `count` elements from element `from` on, widened to fp32, a piece at a time. */
static plora_status copy_elements(plora_context *context, const struct plora__tensor *tensor, int64_t from,
                                  int64_t count, float *arena)
{
    float piece[1024];
    const int32_t dtype = plora__tensor_dtype(tensor);
    if (dtype == PLORA_F32)
        return context->backend->copy(context->device, arena, (const float *)tensor->data + from,
                                      (size_t)count * sizeof(float), NULL);
    for (int64_t done = 0; done < count;) {
        const int64_t length = count - done < 1024 ? count - done : 1024;
        for (int64_t i = 0; i < length; ++i)
            piece[i] = plora__load(tensor->data, from + done + i, dtype);
        PLORA_TRY(context->backend->copy(context->device, arena + done, piece, (size_t)length * sizeof *piece, NULL));
        PLORA_TRY(context->backend->synchronize(context->device, NULL));
        done += length;
    }
    return PLORA_OK;
}

static plora_status copy_layer(const struct load *load, const plora_adapters *adapters, int32_t layer)
{
    plora_context *context = load->model->context;
    const struct plora__adapter_source *source = load->source;
    const struct plora__adapter *adapter = &adapters->adapters[adapters->adapter_of_layer[layer]];
    const struct plora__tensor *a = load->pairs[layer][0], *b = load->pairs[layer][1];
    float *arena = adapters->parameters + adapter->b_offset;
    PLORA_TRY(copy_elements(context, a, 0, a->shape[0] * a->shape[1], adapters->parameters + adapter->a_offset));
    if (source->row == NULL) return copy_elements(context, b, 0, b->shape[0] * b->shape[1], arena);
    for (int64_t row = 0; row < b->shape[0]; ++row) {
        const int64_t to = source->row(source, &load->model->layers[layer], row);
        PLORA_TRY(copy_elements(context, b, row * adapter->rank, adapter->rank, arena + to * adapter->rank));
    }
    return PLORA_OK;
}

static plora_status build(const struct load *load, const plora_adapters_options *options, plora_adapters **adapters)
{
    plora_context *context = load->model->context;
    plora_adapters *created;
    PLORA_TRY(plora__adapters_build(load->model, options, load->choices, load->choice_count, &created));
    plora_status status = PLORA_OK;
    for (int32_t i = 0; i < load->choice_count; ++i)
        PLORA_TRY_OUT(copy_layer(load, created, load->choices[i].layer));
    PLORA_TRY_OUT(context->backend->synchronize(context->device, NULL));
    *adapters = created;
    return PLORA_OK;
out:
    plora_adapters_destroy(created);
    return status;
}

plora_status plora__adapters_from(plora_model *model, const struct plora__adapter_source *source,
                                  const plora_adapters_options *options, plora_adapters **adapters)
{
    struct load load = {.model = model, .source = source};
    plora_status status = pair_tensors(&load);
    if (status == PLORA_OK) status = build(&load, options, adapters);
    plora__free(model->context, load.block, load.bytes);
    return status;
}

plora_status plora_adapters_load(plora_model *model, const char *path, const plora_adapters_options *given,
                                 plora_adapters **adapters)
{
    struct stat info;
    PLORA_CHECK(model != NULL && path != NULL && adapters != NULL, PLORA_ERROR_INVALID_ARGUMENT, "%s is NULL",
                model == NULL  ? "model"
                : path == NULL ? "path"
                               : "adapters");
    plora_adapters_options options = PLORA_ADAPTERS_OPTIONS_INIT;
    PLORA_TRY(plora__read_options(&options, sizeof options, given, "plora_adapters_options"));
    PLORA_TRY(plora__adapters_check_common(&options));
    if (stat(path, &info) == 0 && S_ISREG(info.st_mode)) return plora__gguf_load(model, path, &options, adapters);
    return plora__peft_load(model, path, &options, adapters);
}
