/* model.c: see model.h. */
#include "model.h"

#include <stdlib.h>
#include <string.h>

#include "llama_private.h"

struct model {
    struct llama *llama;
    struct adapters *products;
    int64_t slots, positions, capacity; /* positions: the context in whole blocks of attention */
    int64_t narrow;
    void *keys, *values;
    size_t cache_bytes;
    struct attention_piece *attention; /* [slots] */
    int32_t *ids, *positions_of;       /* [capacity], of the rows of a batch */
    plora_snapshot **adapters;         /* [capacity]: of each row */
    plora_snapshot **head_adapters;    /* [slots] */
    void *head_x;                      /* [slots, hidden] */
    float *logits;                     /* [slots, vocabulary] */
    void *memory;
    size_t memory_bytes;
};

/* Products meet few shapes, each of which costs oneDNN a compilation: rows beyond 16 are rounded up. Those added are token 0. */
static int64_t padded(int64_t rows)
{
    return rows <= 16 ? rows : (rows + 15) / 16 * 16;
}

const struct llama_config *model_configuration(const struct model *model)
{
    return llama_configuration(model->llama);
}

plora_model *model_layers(struct model *model)
{
    return llama_model(model->llama);
}

int64_t model_rows(const struct model *model)
{
    return model->capacity;
}

void model_use_adapters(struct model *model, struct adapters *adapters)
{
    model->products = adapters;
}

static int allocate(struct model *m)
{
    const struct llama_config *c = llama_configuration(m->llama);
    const size_t size = element_size(m->llama->dtype);
    m->narrow = c->kv_heads * c->head_size;
    m->cache_bytes = (size_t)(c->layers * m->slots * m->positions * m->narrow) * size;
    TRY(memory_map(m->cache_bytes, "keys", &m->keys));
    TRY(memory_map(m->cache_bytes, "values", &m->values));
    TRY(memory_allocate((size_t)m->slots, sizeof *m->attention, "attention", &m->attention));
    TRY(memory_allocate((size_t)m->capacity, sizeof *m->ids, "tokens", &m->ids));
    TRY(memory_allocate((size_t)m->capacity, sizeof *m->positions_of, "positions", &m->positions_of));
    TRY(memory_allocate((size_t)m->capacity, sizeof(plora_snapshot *), "adapters", &m->adapters));
    TRY(memory_allocate((size_t)m->slots, sizeof(plora_snapshot *), "adapters", &m->head_adapters));
    const size_t logits = (size_t)(m->slots * c->vocabulary) * sizeof *m->logits;
    m->memory_bytes = logits + (size_t)(m->slots * c->hidden) * size;
    TRY(memory_map(m->memory_bytes, "logits", &m->memory));
    m->logits = m->memory;
    m->head_x = (char *)m->memory + logits;
    TRY(llama_rope_tables(m->llama, m->positions));
    return llama_prepare(m->llama, NULL, m->capacity, 0);
}

static int open_all(plora_context *context, const struct model_options *options, struct model *m)
{
    TRY(llama_open(context, options->directory, options->dtype, options->threads, &m->llama));
    const int64_t most = llama_configuration(m->llama)->max_positions;
    if (options->context > most)
        return fault("a context of %lld tokens exceeds the model's %lld", (long long)options->context, (long long)most);
    m->slots = options->slots;
    m->positions = (options->context + ATTENTION_BLOCK - 1) / ATTENTION_BLOCK * ATTENTION_BLOCK;
    m->capacity = padded(options->batch_tokens);
    return allocate(m);
}

int model_open(plora_context *context, const struct model_options *options, struct model **model)
{
    *model = NULL;
    struct model *m;
    TRY(memory_allocate(1, sizeof *m, "model", &m));
    if (open_all(context, options, m) != 0) {
        model_close(m);
        return -1;
    }
    *model = m;
    return 0;
}

void model_close(struct model *m)
{
    if (!m) return;
    llama_close(m->llama);
    memory_unmap(m->keys, m->cache_bytes);
    memory_unmap(m->values, m->cache_bytes);
    memory_unmap(m->memory, m->memory_bytes);
    free(m->attention);
    free(m->ids);
    free(m->positions_of);
    free(m->adapters);
    free(m->head_adapters);
    free(m);
}

/* ----------------------------------------------------------------------------------------------------------------- step */

static void *row(const struct model *m, const void *base, int64_t index, int64_t width)
{
    return (char *)(uintptr_t)base + (size_t)(index * width) * element_size(m->llama->dtype);
}

static void *cached(const struct model *m, void *base, int64_t layer, int64_t slot, int64_t position)
{
    return row(m, base, (layer * m->slots + slot) * m->positions + position, m->narrow);
}

/* Puts the new keys and values where they stay, and attends to all of their sequence. */
static int attend(struct model *m, int64_t layer, int64_t count, const struct piece *pieces, struct slot *s)
{
    const struct llama_config *c = &m->llama->config;
    const int64_t wide = c->heads * c->head_size;
    int64_t first = 0;
    for (int64_t i = 0; i < count; i++) {
        const struct piece *p = &pieces[i];
        const size_t bytes = (size_t)(p->rows * m->narrow) * element_size(m->llama->dtype);
        memcpy(cached(m, m->keys, layer, p->slot, p->past), row(m, s->k, first, m->narrow), bytes);
        memcpy(cached(m, m->values, layer, p->slot, p->past), row(m, s->v, first, m->narrow), bytes);
        m->attention[i] = (struct attention_piece){.rows = p->rows,
                                                   .past = p->past,
                                                   .q = row(m, s->q, first, wide),
                                                   .k = cached(m, m->keys, layer, p->slot, 0),
                                                   .v = cached(m, m->values, layer, p->slot, 0),
                                                   .o = row(m, s->o, first, wide)};
        first += p->rows;
    }
    return attention_extend(m->llama->attention, count, m->attention);
}

/* The products of linear layers that share their input x. */
static int project(struct model *m, int64_t layer, int first, int count, int64_t rows, void *x, void *const *y)
{
    const struct llama_config *c = &m->llama->config;
    const plora_matrix in = llama_matrix(m->llama, x, rows, llama_inputs(c, first));
    plora_matrix out[LINEARS];
    for (int i = 0; i < count; i++)
        out[i] = llama_matrix(m->llama, y[i], rows, llama_outputs(c, first + i));
    return adapters_forward(m->products, STEP_LAYERS, &m->llama->layers[layer].linear[first], count, &in, out);
}

/* One layer, as llama_layer_forward(); llama->normal holds RMSNorm(x). */
static int step_layer(struct model *m, int64_t layer, int64_t count, const struct piece *pieces, int64_t tokens)
{
    struct llama *llama = m->llama;
    const int64_t rows = padded(tokens), last = layer + 1 == llama->config.layers;
    struct slot *s = llama_slot(llama, layer, 0);
    void *next = last ? llama->final : llama_slot(llama, layer + 1, 0)->x;
    TRY(project(m, layer, Q, 3, rows, llama->normal, (void *const[]){s->q, s->k, s->v}));
    llama_rotate(llama, tokens, m->positions_of, s->q, s->k);
    TRY(attend(m, layer, count, pieces, s));
    TRY(project(m, layer, O, 1, rows, s->o, &llama->d_normal));
    llama_norm(llama, rows, s->x, llama->d_normal, s->middle, llama->layers[layer].mlp_norm, llama->normal);
    TRY(project(m, layer, GATE, 2, rows, llama->normal, (void *const[]){s->gate, s->up}));
    llama_gate(llama, rows, s->gate, s->up, llama->hidden);
    TRY(project(m, layer, DOWN, 1, rows, llama->hidden, &llama->d_normal));
    llama_norm(llama, rows, s->middle, llama->d_normal, next, last ? NULL : llama->layers[layer + 1].attention_norm,
               last ? NULL : llama->normal);
    return 0;
}

static int head(struct model *m, int64_t count, const struct piece *pieces)
{
    struct llama *llama = m->llama;
    const struct llama_config *c = &llama->config;
    int64_t used = 0, first = 0;
    for (int64_t i = 0; i < count; first += pieces[i++].rows) {
        if (!pieces[i].wants_logits) continue;
        m->head_adapters[used] = pieces[i].adapter;
        memcpy(row(m, m->head_x, used++, c->hidden), row(m, llama->final, first + pieces[i].rows - 1, c->hidden),
               (size_t)c->hidden * element_size(llama->dtype));
    }
    if (used == 0) return 0;
    llama->rows->rms_forward(used, c->hidden, (float)c->epsilon, m->head_x, NULL, NULL, llama->final_norm, m->head_x);
    const plora_matrix x = llama_matrix(llama, m->head_x, used, c->hidden);
    const plora_matrix y = {m->logits, used, c->vocabulary, c->vocabulary, PLORA_F32, 0};
    TRY(adapters_begin(m->products, STEP_HEAD, used, m->head_adapters));
    return adapters_forward(m->products, STEP_HEAD, &llama->head, 1, &x, &y);
}

int model_step(struct model *m, int64_t count, const struct piece *pieces, const float **logits)
{
    struct llama *llama = m->llama;
    int64_t tokens = 0;
    for (int64_t i = 0; i < count; i++)
        for (int64_t j = 0; j < pieces[i].rows; j++, tokens++) {
            m->ids[tokens] = pieces[i].ids[j];
            m->positions_of[tokens] = (int32_t)(pieces[i].past + j);
            m->adapters[tokens] = pieces[i].adapter;
        }
    const int64_t rows = padded(tokens);
    for (int64_t i = tokens; i < rows; i++)
        m->adapters[i] = NULL;
    TRY(adapters_begin(m->products, STEP_LAYERS, rows, m->adapters));
    void *x = llama_slot(llama, 0, 0)->x;
    llama_embed(llama, rows, m->ids, tokens, x);
    llama_norm(llama, rows, x, NULL, NULL, llama->layers[0].attention_norm, llama->normal);
    for (int64_t i = 0; i < llama->config.layers; i++)
        TRY(step_layer(m, i, count, pieces, tokens));
    *logits = m->logits;
    return head(m, count, pieces);
}
