/* llama.c: the passes over the layers, forward and backward, and the memory they use. The forward's and backward's order of
 * operations is drawn in llama.h; every matrix product with a weight is plora_linear_forward() or _backward(). */
#include "llama_private.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

const struct llama_config *llama_configuration(const struct llama *llama)
{
    return &llama->config;
}

plora_model *llama_model(struct llama *llama)
{
    return llama->model;
}

const double *llama_profile(const struct llama *llama)
{
    return llama->profile;
}

/* --------------------------------------------------------------------------------------------------------------- memory */

static void *take(const struct llama *llama, size_t *used, int64_t elements, int32_t dtype)
{
    void *memory = llama->arena ? (char *)llama->arena + *used : NULL;
    *used += ((size_t)elements * element_size(dtype) + 63) / 64 * 64;
    return memory;
}

/* Cuts the arena into pieces and returns their bytes; a first call without an arena measures. */
static size_t lay_out(struct llama *llama)
{
    const struct llama_config *c = &llama->config;
    const int64_t t = llama->capacity, wide = c->heads * c->head_size, narrow = c->kv_heads * c->head_size;
    size_t used = 0;
    const int64_t hidden = c->intermediate > wide + 2 * narrow ? c->intermediate : wide + 2 * narrow;
    for (int64_t i = 0; i < llama->slots; i++) {
        struct slot *s = &llama->slot[i];
        s->x = take(llama, &used, t * c->hidden, llama->dtype);
        s->q = take(llama, &used, t * wide, llama->dtype);
        s->k = take(llama, &used, t * narrow, llama->dtype);
        s->v = take(llama, &used, t * narrow, llama->dtype);
        s->o = take(llama, &used, t * wide, llama->dtype);
        s->middle = take(llama, &used, t * c->hidden, llama->dtype);
        s->gate = take(llama, &used, t * c->intermediate, llama->dtype);
        s->up = take(llama, &used, t * c->intermediate, llama->dtype);
    }
    llama->final = take(llama, &used, t * c->hidden, llama->dtype);
    llama->normal = take(llama, &used, t * c->hidden, llama->dtype);
    llama->hidden = take(llama, &used, t * hidden, llama->dtype);
    llama->d_hidden = take(llama, &used, t * hidden, llama->dtype);
    llama->dx = take(llama, &used, t * c->hidden, llama->dtype);
    llama->d_normal = take(llama, &used, t * c->hidden, llama->dtype);
    take(llama, &used, ATTENTION_BLOCK * hidden, llama->dtype); /* attention reads beyond the last token */
    llama->head_x = take(llama, &used, llama->chunk * c->hidden, llama->dtype);
    llama->head_normal = take(llama, &used, llama->chunk * c->hidden, llama->dtype);
    llama->head_d = take(llama, &used, llama->chunk * c->hidden, llama->dtype);
    llama->logits = take(llama, &used, llama->chunk * c->vocabulary, PLORA_F32);
    llama->d_logits = llama->dtype == PLORA_F32 ? (void *)llama->logits
                                                : take(llama, &used, llama->chunk * c->vocabulary, llama->dtype);
    return used;
}

static double rope_frequency(const struct llama_config *c, int64_t pair)
{
    const double frequency = pow(c->rope_theta, -2.0 * (double)pair / (double)c->head_size);
    if (c->rope_factor == 0) return frequency;
    /* llama3: long waves are slowed by the factor, short ones kept, those between blended */
    const double turns = c->rope_original * frequency / 6.283185307179586;
    if (turns < c->rope_low) return frequency / c->rope_factor;
    if (turns > c->rope_high) return frequency;
    const double blend = (turns - c->rope_low) / (c->rope_high - c->rope_low);
    return (1 - blend) * frequency / c->rope_factor + blend * frequency;
}

int llama_rope_tables(struct llama *llama, int64_t positions)
{
    if (positions <= llama->positions) return 0;
    const int64_t half = llama->config.head_size / 2;
    float *tables;
    TRY(memory_allocate((size_t)(2 * positions * half), sizeof(float), "rotary tables", &tables));
    free(llama->cosine);
    llama->cosine = tables;
    llama->sine = tables + positions * half;
    llama->positions = positions;
    for (int64_t j = 0; j < half; j++) {
        const float frequency = (float)rope_frequency(&llama->config, j);
        for (int64_t i = 0; i < positions; i++) {
            const float angle = (float)i * frequency; /* in fp32, as the models were trained */
            llama->cosine[i * half + j] = (float)cos((double)angle);
            llama->sine[i * half + j] = (float)sin((double)angle);
        }
    }
    return 0;
}

int llama_prepare(struct llama *llama, plora_adapters *adapters, int64_t tokens, int training)
{
    const struct llama_config *c = &llama->config;
    const int64_t slots = training ? c->layers : (c->layers < 2 ? c->layers : 2);
    llama->adapters = adapters;
    tokens = (tokens + TOKEN_MULTIPLE - 1) / TOKEN_MULTIPLE * TOKEN_MULTIPLE;
    if (tokens <= llama->capacity && slots <= llama->slots) return 0;
    memory_unmap(llama->arena, llama->arena_bytes);
    free(llama->slot);
    free(llama->lse);
    llama->arena = NULL;
    llama->slot = NULL;
    llama->lse = NULL;
    if (llama->capacity < tokens) llama->capacity = tokens;
    if (llama->slots < slots) llama->slots = slots;
    const int64_t logits = (64 << 20) / 4 / c->vocabulary / 16 * 16; /* chunks of at most about 64 MB */
    llama->chunk = logits < 16 ? 16 : logits > LOGIT_ROWS ? LOGIT_ROWS : logits;
    TRY(memory_allocate((size_t)llama->slots, sizeof *llama->slot, "activations", &llama->slot));
    TRY(memory_allocate((size_t)(llama->slots * llama->capacity * c->heads), sizeof(float), "softmax sums",
                        &llama->lse));
    for (int64_t i = 0; i < llama->slots; i++)
        llama->slot[i].lse = llama->lse + i * llama->capacity * c->heads;
    llama->arena_bytes = lay_out(llama);
    TRY(memory_map(llama->arena_bytes, "activations", &llama->arena));
    lay_out(llama);
    return 0;
}

/* -------------------------------------------------------------------------------------------------------------- helpers */

struct slot *llama_slot(struct llama *llama, int64_t layer, int train)
{
    return &llama->slot[train ? layer : layer % 2 % llama->slots];
}

plora_matrix llama_matrix(const struct llama *llama, void *data, int64_t rows, int64_t columns)
{
    return (plora_matrix){data, rows, columns, columns, llama->dtype, 0};
}

int llama_linear(struct llama *llama, int64_t layer, int which, int64_t rows, void *x, void *y, uint32_t flags)
{
    const double begin = now();
    const plora_matrix in = llama_matrix(llama, x, rows, llama_inputs(&llama->config, which));
    const plora_matrix out = llama_matrix(llama, y, rows, llama_outputs(&llama->config, which));
    LIBRARY(plora_linear_forward(llama->adapters, llama->layers[layer].linear[which], &in, &out, flags, NULL));
    llama->profile[PHASE_LINEAR] += now() - begin;
    return 0;
}

static int linear_backward(struct llama *llama, int64_t layer, int which, int64_t rows, void *x, void *dy, void *dx,
                           uint32_t flags)
{
    const double begin = now();
    const plora_matrix in = llama_matrix(llama, x, rows, llama_inputs(&llama->config, which));
    const plora_matrix gradient = llama_matrix(llama, dy, rows, llama_outputs(&llama->config, which));
    const plora_matrix wanted = llama_matrix(llama, dx, rows, llama_inputs(&llama->config, which));
    LIBRARY(plora_linear_backward(llama->adapters, llama->layers[layer].linear[which], &in, &gradient,
                                  dx ? &wanted : NULL, flags, NULL));
    llama->profile[PHASE_LINEAR] += now() - begin;
    return 0;
}

static void *row(const struct llama *llama, const void *data, int64_t index, int64_t width)
{
    return data ? (char *)(uintptr_t)data + (size_t)(index * width) * element_size(llama->dtype) : NULL;
}

static int64_t piece(int64_t rows, int64_t first)
{
    return rows - first < ROW_BLOCK ? rows - first : ROW_BLOCK;
}

void llama_norm(struct llama *llama, int64_t rows, const void *x, const void *add, void *sum, const float *w, void *y)
{
    const double begin = now();
    const int64_t width = llama->config.hidden;
#pragma omp parallel for schedule(static) num_threads(llama->threads)
    for (int64_t i = 0; i < rows; i += ROW_BLOCK)
        llama->rows->rms_forward(piece(rows, i), width, (float)llama->config.epsilon, row(llama, x, i, width),
                                 row(llama, add, i, width), row(llama, sum, i, width), w, row(llama, y, i, width));
    llama->profile[PHASE_ROWS] += now() - begin;
}

static void norm_backward(struct llama *llama, int64_t rows, const void *x, const float *w, const void *dy, void *dx)
{
    const double begin = now();
    const int64_t width = llama->config.hidden;
#pragma omp parallel for schedule(static) num_threads(llama->threads)
    for (int64_t i = 0; i < rows; i += ROW_BLOCK)
        llama->rows->rms_backward(piece(rows, i), width, (float)llama->config.epsilon, row(llama, x, i, width), w,
                                  row(llama, dy, i, width), row(llama, dx, i, width));
    llama->profile[PHASE_ROWS] += now() - begin;
}

void llama_gate(struct llama *llama, int64_t count, const void *gate, const void *up, void *h)
{
    const double begin = now();
    const int64_t width = llama->config.intermediate;
#pragma omp parallel for schedule(static) num_threads(llama->threads)
    for (int64_t i = 0; i < count; i++)
        llama->rows->gate_forward(width, row(llama, gate, i, width), row(llama, up, i, width), row(llama, h, i, width));
    llama->profile[PHASE_ROWS] += now() - begin;
}

static void gate_backward(struct llama *llama, int64_t count, void *gate, void *up, const void *dh)
{
    const double begin = now();
    const int64_t width = llama->config.intermediate;
#pragma omp parallel for schedule(static) num_threads(llama->threads)
    for (int64_t i = 0; i < count; i++)
        llama->rows->gate_backward(width, row(llama, gate, i, width), row(llama, up, i, width),
                                   row(llama, dh, i, width));
    llama->profile[PHASE_ROWS] += now() - begin;
}

void llama_rotate(struct llama *llama, int64_t rows, const int32_t *positions, void *q, void *k)
{
    const double begin = now();
    const struct llama_config *c = &llama->config;
    const int64_t size = c->head_size;
#pragma omp parallel for schedule(static) num_threads(llama->threads)
    for (int64_t i = 0; i < rows; i++) {
        const float *cosine = llama->cosine + positions[i] * size / 2, *sine = llama->sine + positions[i] * size / 2;
        llama->rows->rotate(c->heads, size, cosine, sine, 1.0f, row(llama, q, i, c->heads * size));
        llama->rows->rotate(c->kv_heads, size, cosine, sine, 1.0f, row(llama, k, i, c->kv_heads * size));
    }
    llama->profile[PHASE_ROWS] += now() - begin;
}

/* Rows from `count` on are those of padding: token 0. */
void llama_embed(struct llama *llama, int64_t rows, const int32_t *ids, int64_t count, void *x)
{
    const int64_t width = llama->config.hidden;
    for (int64_t i = 0; i < rows; i++)
        memcpy(row(llama, x, i, width),
               row(llama, llama->embedding.data, i < count ? ids[i] : 0, llama->embedding.stride),
               (size_t)width * element_size(llama->dtype));
}

static int64_t padded(int64_t tokens)
{
    return (tokens + TOKEN_MULTIPLE - 1) / TOKEN_MULTIPLE * TOKEN_MULTIPLE;
}

/* --------------------------------------------------------------------------------------------------------------- passes */

int llama_layer_forward(struct llama *llama, const struct batch *batch, int64_t layer, int train, uint32_t flags)
{
    const int last = layer + 1 == llama->config.layers;
    void *next_x = last ? llama->final : llama_slot(llama, layer + 1, train)->x;
    struct slot *s = llama_slot(llama, layer, train);
    const struct layer *w = &llama->layers[layer];
    const int64_t rows = padded(batch->tokens);
    /* llama->normal holds RMSNorm(x): the step that made x left it there */
    TRY(llama_linear(llama, layer, Q, rows, llama->normal, s->q, flags));
    TRY(llama_linear(llama, layer, K, rows, llama->normal, s->k, flags));
    TRY(llama_linear(llama, layer, V, rows, llama->normal, s->v, flags));
    llama_rotate(llama, batch->tokens, batch->positions, s->q, s->k);
    const double begin = now();
    TRY(attention_forward(llama->attention, batch->sequences, batch->starts, s->q, s->k, s->v, s->o, s->lse));
    llama->profile[PHASE_ATTENTION] += now() - begin;
    TRY(llama_linear(llama, layer, O, rows, s->o, llama->d_normal, flags));
    llama_norm(llama, rows, s->x, llama->d_normal, s->middle, w->mlp_norm, llama->normal);
    TRY(llama_linear(llama, layer, GATE, rows, llama->normal, s->gate, flags));
    TRY(llama_linear(llama, layer, UP, rows, llama->normal, s->up, flags));
    llama_gate(llama, rows, s->gate, s->up, llama->hidden);
    TRY(llama_linear(llama, layer, DOWN, rows, llama->hidden, llama->d_normal, flags));
    llama_norm(llama, rows, s->middle, llama->d_normal, next_x, last ? NULL : llama->layers[layer + 1].attention_norm,
               last ? NULL : llama->normal);
    return 0;
}

int llama_forward_begin(struct llama *llama, const struct batch *batch, int train)
{
    const int64_t rows = padded(batch->tokens);
    if (rows > llama->capacity)
        return fault("%lld tokens exceed the room for %lld", (long long)rows, (long long)llama->capacity);
    int64_t longest = 0;
    for (int64_t i = 0; i < batch->tokens; i++)
        if (batch->positions[i] >= longest) longest = batch->positions[i] + 1;
    TRY(llama_rope_tables(llama, longest));
    void *x = llama_slot(llama, 0, train)->x;
    llama_embed(llama, rows, batch->ids, batch->tokens, x);
    llama_norm(llama, rows, x, NULL, NULL, llama->layers[0].attention_norm, llama->normal);
    return 0;
}

int llama_forward(struct llama *llama, const struct batch *batch, int flags)
{
    const int train = (flags & LLAMA_TRAIN) != 0;
    TRY(llama_forward_begin(llama, batch, train));
    for (int64_t i = 0; i < llama->config.layers; i++)
        TRY(llama_layer_forward(llama, batch, i, train, flags & LLAMA_DROPOUT ? PLORA_LINEAR_DROPOUT : 0));
    return 0;
}

/* llama->dx: on entry the gradient of the layer's output, on return that of its input (not for layer 0). */
static int mlp_backward(struct llama *llama, int64_t layer, int64_t rows, uint32_t flags)
{
    struct slot *s = llama_slot(llama, layer, 1);
    const struct layer *w = &llama->layers[layer];
    llama_gate(llama, rows, s->gate, s->up, llama->hidden);
    TRY(linear_backward(llama, layer, DOWN, rows, llama->hidden, llama->dx, llama->d_hidden, flags));
    gate_backward(llama, rows, s->gate, s->up, llama->d_hidden); /* now dgate and dup */
    llama_norm(llama, rows, s->middle, NULL, NULL, w->mlp_norm, llama->normal);
    TRY(linear_backward(llama, layer, GATE, rows, llama->normal, s->gate, llama->d_normal, flags));
    TRY(linear_backward(llama, layer, UP, rows, llama->normal, s->up, llama->d_normal,
                        flags | PLORA_LINEAR_ACCUMULATE));
    norm_backward(llama, rows, s->middle, w->mlp_norm, llama->d_normal, llama->dx);
    return 0;
}

static int attention_part_backward(struct llama *llama, const struct batch *batch, int64_t layer, uint32_t flags)
{
    const struct llama_config *c = &llama->config;
    struct slot *s = llama_slot(llama, layer, 1);
    const struct layer *w = &llama->layers[layer];
    const int64_t tokens = batch->tokens, rows = padded(tokens), extra = rows - tokens;
    const int64_t wide = c->heads * c->head_size, narrow = c->kv_heads * c->head_size;
    /* the MLP's scratch is free again: d_o in the one, dq, dk, dv in the other */
    void *d_o = llama->hidden, *dq = llama->d_hidden;
    void *dk = row(llama, dq, rows, wide), *dv = row(llama, dk, rows, narrow);
    TRY(linear_backward(llama, layer, O, rows, s->o, llama->dx, d_o, flags));
    const double begin = now();
    TRY(attention_backward(llama->attention, batch->sequences, batch->starts, s->q, s->k, s->v, s->o, s->lse, d_o,
                           llama->cosine, llama->sine, dq, dk, dv));
    if (extra > 0) {
        memset(row(llama, dq, tokens, wide), 0, (size_t)(extra * wide) * element_size(llama->dtype));
        memset(row(llama, dk, tokens, narrow), 0, (size_t)(extra * narrow) * element_size(llama->dtype));
        memset(row(llama, dv, tokens, narrow), 0, (size_t)(extra * narrow) * element_size(llama->dtype));
    }
    llama->profile[PHASE_ATTENTION] += now() - begin;
    llama_norm(llama, rows, s->x, NULL, NULL, w->attention_norm, llama->normal);
    void *dx = layer > 0 ? llama->d_normal : NULL; /* the embeddings are frozen */
    const uint32_t more = layer > 0 ? PLORA_LINEAR_ACCUMULATE : 0;
    TRY(linear_backward(llama, layer, Q, rows, llama->normal, dq, dx, flags));
    TRY(linear_backward(llama, layer, K, rows, llama->normal, dk, dx, flags | more));
    TRY(linear_backward(llama, layer, V, rows, llama->normal, dv, dx, flags | more));
    if (layer > 0) norm_backward(llama, rows, s->x, w->attention_norm, llama->d_normal, llama->dx);
    return 0;
}

int llama_backward(struct llama *llama, const struct batch *batch, int flags)
{
    const uint32_t linear_flags = flags & LLAMA_DROPOUT ? PLORA_LINEAR_DROPOUT : 0;
    for (int64_t i = llama->config.layers - 1; i >= 0; i--) {
        TRY(mlp_backward(llama, i, padded(batch->tokens), linear_flags));
        TRY(attention_part_backward(llama, batch, i, linear_flags));
    }
    return 0;
}

struct llama_flop llama_count_flop(struct llama *llama, const struct batch *batch)
{
    const struct llama_config *c = &llama->config;
    const double tokens = (double)batch->tokens;
    struct llama_flop flop = {0};
    for (int64_t i = 0; i < c->layers; i++)
        for (int j = 0; j < LINEARS; j++) {
            const double n = (double)llama_outputs(c, j), k = (double)llama_inputs(c, j);
            plora_adapter adapter = PLORA_ADAPTER_INIT;
            flop.backbone += 2 * tokens * n * k * (i == 0 && j <= V ? 1 : 2);
            if (plora_adapters_layer(llama->adapters, llama->layers[i].linear[j], &adapter) == PLORA_OK)
                flop.adapters += 6 * tokens * (double)adapter.a.rows * (n + k) -
                                 (i == 0 && j <= V ? 2 * tokens * (double)adapter.a.rows * k : 0);
        }
    flop.head = 4 * (double)batch->losses * (double)c->vocabulary * (double)c->hidden;
    for (int64_t i = 0; i < batch->sequences; i++) {
        const double length = (double)(batch->starts[i + 1] - batch->starts[i]);
        flop.attention += 6 * (double)c->layers * (double)(c->heads * c->head_size) * length * (length + 1);
    }
    return flop;
}
