/* weights.c: opening a model directory and writing it back.
 *
 * Same dtype: the linear layers stay in the mapped file, where an unload changes private pages. Another dtype: every 2-D weight
 * is converted once into memory and added to a host-built model in the order of the file's layers, so that layer numbers, and
 * with them the random numbers of the adapters, are the same. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "llama_private.h"

static const char *const LINEAR_NAMES[LINEARS] = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
                                                  "self_attn.o_proj", "mlp.gate_proj",    "mlp.up_proj",
                                                  "mlp.down_proj"};

int64_t llama_inputs(const struct llama_config *c, int which)
{
    return which == O ? c->heads * c->head_size : which == DOWN ? c->intermediate : c->hidden;
}

int64_t llama_outputs(const struct llama_config *c, int which)
{
    return which == Q                     ? c->heads * c->head_size
           : which == K || which == V     ? c->kv_heads * c->head_size
           : which == GATE || which == UP ? c->intermediate
                                          : c->hidden;
}

/* Copies every layer of `source` into fp32 or bf16 memory and a new model. */
static int convert_model(struct llama *llama, plora_model *source)
{
    const int32_t count = plora_model_layer_count(source);
    size_t elements = 0;
    for (int32_t i = 0; i < count; i++) {
        plora_linear linear = PLORA_LINEAR_INIT;
        LIBRARY(plora_model_layer(source, i, &linear));
        elements += ((size_t)linear.weight.rows * (size_t)linear.weight.columns + 31) / 32 * 32;
        if (linear.bias) elements += ((size_t)linear.weight.rows + 31) / 32 * 32;
    }
    const size_t size = element_size(llama->dtype);
    llama->weights_bytes = elements * size;
    TRY(memory_map(llama->weights_bytes, "weights", &llama->weights));
    LIBRARY(plora_model_create(llama->context, &llama->model));
    char *next = llama->weights;
    for (int32_t i = 0; i < count; i++) {
        plora_linear linear = PLORA_LINEAR_INIT;
        LIBRARY(plora_model_layer(source, i, &linear));
        plora_matrix *weight = &linear.weight;
        const int64_t columns = weight->columns;
#pragma omp parallel for schedule(static)
        for (int64_t row = 0; row < weight->rows; row++)
            convert_elements(columns,
                             (const char *)weight->data + (size_t)(row * weight->stride) * element_size(weight->dtype),
                             weight->dtype, next + (size_t)(row * columns) * size, llama->dtype);
        const int64_t rows = weight->rows;
        *weight = (plora_matrix){next, rows, columns, columns, llama->dtype, 0};
        next += ((size_t)rows * (size_t)columns + 31) / 32 * 32 * size;
        if (linear.bias) {
            convert_elements(rows, linear.bias, linear.bias_dtype, next, llama->dtype);
            linear.bias = next;
            linear.bias_dtype = llama->dtype;
            next += ((size_t)rows + 31) / 32 * 32 * size;
        }
        LIBRARY(plora_model_add_linear(llama->model, &linear, NULL));
    }
    llama->converted = 1;
    return 0;
}

/* A norm's weight, widened into the next place of llama->norms. */
static int read_norm(struct llama *llama, plora_model *source, const char *name, float *out)
{
    plora_matrix tensor;
    LIBRARY(plora_model_find_tensor(source, name, &tensor));
    const int64_t width = llama->config.hidden;
    if (tensor.rows != 1 || tensor.columns != width)
        return fault("%s has %lld x %lld elements: must have %lld", name, (long long)tensor.rows,
                     (long long)tensor.columns, (long long)width);
    convert_elements(width, tensor.data, tensor.dtype, out, PLORA_F32);
    return 0;
}

static int allocate_layers(struct llama *llama)
{
    const size_t layers = (size_t)llama->config.layers, width = (size_t)llama->config.hidden;
    TRY(memory_allocate(layers, sizeof *llama->layers, "layers", &llama->layers));
    TRY(memory_allocate((2 * layers + 1) * width, sizeof(float), "norms", &llama->norms));
    for (size_t i = 0; i < layers; i++) {
        llama->layers[i].attention_norm = llama->norms + 2 * i * width;
        llama->layers[i].mlp_norm = llama->norms + (2 * i + 1) * width;
    }
    llama->final_norm = llama->norms + 2 * layers * width;
    return 0;
}

static int read_norms(struct llama *llama, plora_model *source)
{
    TRY(allocate_layers(llama));
    for (int64_t i = 0; i < llama->config.layers; i++) {
        char name[128];
        snprintf(name, sizeof name, "model.layers.%lld.input_layernorm.weight", (long long)i);
        TRY(read_norm(llama, source, name, llama->layers[i].attention_norm));
        snprintf(name, sizeof name, "model.layers.%lld.post_attention_layernorm.weight", (long long)i);
        TRY(read_norm(llama, source, name, llama->layers[i].mlp_norm));
    }
    return read_norm(llama, source, "model.norm.weight", llama->final_norm);
}

static int find_linear(struct llama *llama, const char *name, int64_t rows, int64_t columns, int bias, int32_t *layer)
{
    plora_linear linear = PLORA_LINEAR_INIT;
    LIBRARY(plora_model_find_layer(llama->model, name, layer));
    LIBRARY(plora_model_layer(llama->model, *layer, &linear));
    if (linear.weight.rows != rows || linear.weight.columns != columns)
        return fault("%s.weight is [%lld,%lld]: config.json says [%lld,%lld]", name, (long long)linear.weight.rows,
                     (long long)linear.weight.columns, (long long)rows, (long long)columns);
    if (bias >= 0 && bias != (linear.bias != NULL))
        return fault("%s.bias is %s, but config.json says otherwise", name, linear.bias ? "there" : "missing");
    return 0;
}

/* Finds the layers in llama->model by their names. */
static int bind_layers(struct llama *llama)
{
    const struct llama_config *c = &llama->config;
    for (int64_t i = 0; i < c->layers; i++)
        for (int j = 0; j < LINEARS; j++) {
            char name[128];
            snprintf(name, sizeof name, "model.layers.%lld.%s", (long long)i, LINEAR_NAMES[j]);
            TRY(find_linear(llama, name, llama_outputs(c, j), llama_inputs(c, j),
                            j <= O ? c->attention_bias : c->mlp_bias, &llama->layers[i].linear[j]));
        }
    int32_t embedding;
    plora_linear linear = PLORA_LINEAR_INIT;
    TRY(find_linear(llama, "model.embed_tokens", c->vocabulary, c->hidden, 0, &embedding));
    LIBRARY(plora_model_layer(llama->model, embedding, &linear));
    llama->embedding = linear.weight;
    llama->head = embedding;
    return c->tied ? 0 : find_linear(llama, "lm_head", c->vocabulary, c->hidden, -1, &llama->head);
}

static int start(plora_context *context, int32_t dtype, int threads, struct llama **llama)
{
    struct llama *made;
    TRY(memory_allocate(1, sizeof *made, "model", &made));
    made->context = context;
    made->dtype = dtype;
    made->threads = threads;
    made->rows = row_kernels_for(dtype);
    *llama = made;
    return 0;
}

static int finish(struct llama *llama)
{
    TRY(bind_layers(llama));
    return attention_create(llama->dtype, llama->config.heads, llama->config.kv_heads, llama->config.head_size,
                            llama->threads, &llama->attention);
}

/* Whether all linear layers have the compute dtype already. */
static int same_dtype(const struct llama *llama, const plora_model *source, int *same)
{
    *same = 1;
    for (int32_t i = 0; i < plora_model_layer_count(source); i++) {
        plora_linear linear = PLORA_LINEAR_INIT;
        LIBRARY(plora_model_layer(source, i, &linear));
        if (linear.weight.dtype != llama->dtype) *same = 0;
    }
    return 0;
}

static int open_weights(struct llama *llama, const char *directory)
{
    int same;
    plora_model *source;
    TRY(llama_config_read(directory, &llama->config));
    LIBRARY(plora_model_open(llama->context, directory, &source));
    int result = same_dtype(llama, source, &same);
    if (result == 0) result = read_norms(llama, source);
    if (result == 0 && same)
        llama->model = source;
    else {
        if (result == 0) result = convert_model(llama, source);
        plora_model_destroy(source); /* the mapped pages would count as memory */
    }
    return result == 0 ? finish(llama) : -1;
}

int llama_open(plora_context *context, const char *directory, int32_t dtype, int threads, struct llama **llama)
{
    TRY(start(context, dtype, threads, llama));
    if (open_weights(*llama, directory) == 0) return 0;
    llama_close(*llama);
    *llama = NULL;
    return -1;
}

/* --------------------------------------------------------------------------------------------------------------- saving */

/* Rounds the converted weights that have an adapter back into the file's dtype. */
static int write_back(struct llama *llama, plora_model *target)
{
    for (int64_t i = 0; i < llama->config.layers; i++)
        for (int j = 0; j < LINEARS; j++) {
            int32_t layer;
            plora_adapter adapter = PLORA_ADAPTER_INIT;
            plora_linear from = PLORA_LINEAR_INIT, to = PLORA_LINEAR_INIT;
            const plora_status found = plora_adapters_layer(llama->adapters, llama->layers[i].linear[j], &adapter);
            if (found == PLORA_ERROR_NOT_FOUND) continue;
            LIBRARY(found);
            LIBRARY(plora_model_layer(llama->model, llama->layers[i].linear[j], &from));
            LIBRARY(plora_model_find_layer(target, from.name, &layer));
            LIBRARY(plora_model_layer(target, layer, &to));
            for (int64_t row = 0; row < from.weight.rows; row++)
                convert_elements(from.weight.columns,
                                 (const char *)from.weight.data +
                                     (size_t)(row * from.weight.stride) * element_size(from.weight.dtype),
                                 from.weight.dtype,
                                 (char *)to.weight.data +
                                     (size_t)(row * to.weight.stride) * element_size(to.weight.dtype),
                                 to.weight.dtype);
        }
    return 0;
}

int llama_save(struct llama *llama, const char *directory, const char *path)
{
    if (!llama->converted) {
        LIBRARY(plora_model_save(llama->model, path));
        return 0;
    }
    plora_model *target;
    LIBRARY(plora_model_open(llama->context, directory, &target));
    int result = write_back(llama, target);
    if (result == 0 && plora_model_save(target, path) != PLORA_OK) result = fault("%s", plora_last_error());
    plora_model_destroy(target);
    return result;
}

void llama_close(struct llama *llama)
{
    if (!llama) return;
    attention_destroy(llama->attention);
    plora_model_destroy(llama->model);
    memory_unmap(llama->weights, llama->weights_bytes);
    memory_unmap(llama->arena, llama->arena_bytes);
    free(llama->lse);
    free(llama->slot);
    free(llama->layers);
    free(llama->norms);
    free(llama->cosine);
    free(llama);
}
