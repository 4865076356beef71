/* generate.c: greedy continuations of several prompts at once. The prompts pass through the layers packed one after another;
 * then each step takes one token of every prompt through the model, against keys and values kept per prompt:
 *     keys, values [layer][prompt][position][kv_heads D]
 * A step reads every weight once, whatever the number of prompts. Prompts that have ended go along until the last one has. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "data.h"
#include "llama_private.h"

struct cache {
    int64_t prompts, positions, narrow;
    void *keys, *values;
    float *scores; /* [prompts, heads, positions] */
    float *sums;   /* [prompts, heads, D] */
    size_t bytes;
};

static void cache_free(struct cache *cache)
{
    memory_unmap(cache->keys, cache->bytes);
    memory_unmap(cache->values, cache->bytes);
    free(cache->scores);
    free(cache->sums);
}

static int cache_make(const struct llama *llama, int64_t prompts, int64_t positions, struct cache *cache)
{
    const struct llama_config *c = &llama->config;
    *cache = (struct cache){.prompts = prompts, .positions = positions, .narrow = c->kv_heads * c->head_size};
    cache->bytes = (size_t)(c->layers * prompts * positions * cache->narrow) * element_size(llama->dtype);
    TRY(memory_map(cache->bytes, "keys", &cache->keys));
    TRY(memory_map(cache->bytes, "values", &cache->values));
    TRY(memory_allocate((size_t)(prompts * c->heads * positions), sizeof(float), "scores", &cache->scores));
    return memory_allocate((size_t)(prompts * c->heads * c->head_size), sizeof(float), "sums", &cache->sums);
}

static void *place(const struct llama *llama, const struct cache *cache, void *base, int64_t layer, int64_t prompt,
                   int64_t position)
{
    const int64_t index = ((layer * cache->prompts + prompt) * cache->positions + position) * cache->narrow;
    return (char *)base + (size_t)index * element_size(llama->dtype);
}

static void *row(const struct llama *llama, void *base, int64_t index, int64_t width)
{
    return (char *)base + (size_t)(index * width) * element_size(llama->dtype);
}

/* One head of one prompt whose newest token is at position length - 1. */
static void attend(const struct llama *llama, const struct cache *cache, int64_t layer, int64_t prompt, int64_t head,
                   int64_t length, const void *q, void *o)
{
    const struct llama_config *c = &llama->config;
    const int64_t size = c->head_size, kv_head = head / (c->heads / c->kv_heads);
    float *scores = cache->scores + (prompt * c->heads + head) * cache->positions;
    float *sum = cache->sums + (prompt * c->heads + head) * size;
    const float scale = 1.0f / sqrtf((float)size);
    float top = -INFINITY, total = 0;
    for (int64_t i = 0; i < length; i++) {
        const void *key = row(llama, place(llama, cache, cache->keys, layer, prompt, i), kv_head, size);
        scores[i] = scale * llama->rows->dot(size, q, key);
        if (scores[i] > top) top = scores[i];
    }
    memset(sum, 0, (size_t)size * sizeof *sum);
    for (int64_t i = 0; i < length; i++) {
        const float weight = expf(scores[i] - top);
        total += weight;
        llama->rows->add_scaled(size, row(llama, place(llama, cache, cache->values, layer, prompt, i), kv_head, size),
                                weight, sum);
    }
    llama->rows->scale_out(size, sum, 1.0f / total, o);
}

/* One layer for one new token of each prompt; llama->normal holds RMSNorm(x), as in layer_forward(). */
static int step_layer(struct llama *llama, struct cache *cache, const struct batch *batch, int64_t layer)
{
    const struct llama_config *c = &llama->config;
    const int64_t count = cache->prompts, wide = c->heads * c->head_size, last = layer + 1 == c->layers;
    struct slot *s = llama_slot(llama, layer, 0);
    void *next = last ? llama->final : llama_slot(llama, layer + 1, 0)->x;
    TRY(llama_linear(llama, layer, Q, count, llama->normal, s->q, 0));
    TRY(llama_linear(llama, layer, K, count, llama->normal, s->k, 0));
    TRY(llama_linear(llama, layer, V, count, llama->normal, s->v, 0));
    llama_rotate(llama, count, batch->positions, s->q, s->k);
    const size_t bytes = (size_t)cache->narrow * element_size(llama->dtype);
    for (int64_t i = 0; i < count; i++) {
        memcpy(place(llama, cache, cache->keys, layer, i, batch->positions[i]), row(llama, s->k, i, cache->narrow),
               bytes);
        memcpy(place(llama, cache, cache->values, layer, i, batch->positions[i]), row(llama, s->v, i, cache->narrow),
               bytes);
    }
#pragma omp parallel for schedule(static) num_threads(llama->threads)
    for (int64_t task = 0; task < count * c->heads; task++) {
        const int64_t i = task / c->heads, head = task % c->heads;
        attend(llama, cache, layer, i, head, batch->positions[i] + 1,
               row(llama, row(llama, s->q, i, wide), head, c->head_size),
               row(llama, row(llama, s->o, i, wide), head, c->head_size));
    }
    TRY(llama_linear(llama, layer, O, count, s->o, llama->d_normal, 0));
    llama_norm(llama, count, s->x, llama->d_normal, s->middle, llama->layers[layer].mlp_norm, llama->normal);
    TRY(llama_linear(llama, layer, GATE, count, llama->normal, s->gate, 0));
    TRY(llama_linear(llama, layer, UP, count, llama->normal, s->up, 0));
    llama_gate(llama, count, s->gate, s->up, llama->hidden);
    TRY(llama_linear(llama, layer, DOWN, count, llama->hidden, llama->d_normal, 0));
    llama_norm(llama, count, s->middle, llama->d_normal, next, last ? NULL : llama->layers[layer + 1].attention_norm,
               last ? NULL : llama->normal);
    return 0;
}

static int32_t largest(const float *values, int64_t count)
{
    int64_t best = 0;
    for (int64_t i = 1; i < count; i++)
        if (values[i] > values[best]) best = i;
    return (int32_t)best;
}

/* One prompt through the layers: fills its part of the cache; *next = its first new token. */
static int prefill(struct llama *llama, struct cache *cache, int64_t prompt, const struct batch *batch, float *logits,
                   int32_t *next)
{
    const size_t bytes = (size_t)(batch->tokens * cache->narrow) * element_size(llama->dtype);
    TRY(llama_forward_begin(llama, batch, 0));
    for (int64_t layer = 0; layer < llama->config.layers; layer++) {
        TRY(llama_layer_forward(llama, batch, layer, 0, 0));
        const struct slot *s = llama_slot(llama, layer, 0);
        memcpy(place(llama, cache, cache->keys, layer, prompt, 0), s->k, bytes);
        memcpy(place(llama, cache, cache->values, layer, prompt, 0), s->v, bytes);
    }
    TRY(llama_logits(llama, batch, logits));
    *next = largest(logits, llama->config.vocabulary);
    return 0;
}

/* The next token of every prompt from its last one in batch->ids. */
static int step(struct llama *llama, struct cache *cache, struct batch *batch, float *logits)
{
    const int64_t width = llama->config.vocabulary;
    void *x = llama_slot(llama, 0, 0)->x;
    llama_embed(llama, cache->prompts, batch->ids, cache->prompts, x);
    llama_norm(llama, cache->prompts, x, NULL, NULL, llama->layers[0].attention_norm, llama->normal);
    for (int64_t i = 0; i < llama->config.layers; i++)
        TRY(step_layer(llama, cache, batch, i));
    TRY(llama_logits(llama, batch, logits));
    for (int64_t i = 0; i < cache->prompts; i++) {
        batch->ids[i] = largest(logits + i * width, width);
        batch->positions[i]++;
    }
    return 0;
}

struct run {
    struct cache cache;
    struct batch batch; /* one token of each prompt */
    int32_t *positions; /* 0, 1, 2, ... */
    float *logits;      /* [prompts, vocabulary] */
};

static int run_make(const struct llama *llama, int64_t count, int64_t longest, int64_t positions, struct run *run)
{
    TRY(cache_make(llama, count, positions, &run->cache));
    TRY(memory_allocate((size_t)count, sizeof(int32_t), "tokens", &run->batch.ids));
    TRY(memory_allocate((size_t)count, sizeof(int32_t), "positions", &run->batch.positions));
    TRY(memory_allocate((size_t)count, sizeof(int64_t), "rows", &run->batch.rows));
    TRY(memory_allocate((size_t)longest, sizeof(int32_t), "positions", &run->positions));
    TRY(memory_allocate((size_t)(count * llama->config.vocabulary), sizeof(float), "logits", &run->logits));
    for (int64_t i = 0; i < count; i++)
        run->batch.rows[i] = i;
    for (int64_t i = 0; i < longest; i++)
        run->positions[i] = (int32_t)i;
    run->batch.losses = run->batch.tokens = count;
    return 0;
}

static int run_all(struct llama *llama, struct run *run, const int32_t *const *prompts, const int64_t *prompt_lengths,
                   int64_t most, int64_t eos, int32_t *generated, int64_t *lengths)
{
    const int64_t count = run->cache.prompts;
    struct batch *batch = &run->batch;
    for (int64_t i = 0; i < count; i++) {
        int64_t starts[2] = {0, prompt_lengths[i]}, last = prompt_lengths[i] - 1;
        const struct batch prompt = {.tokens = prompt_lengths[i],
                                     .sequences = 1,
                                     .losses = 1,
                                     .ids = (int32_t *)(uintptr_t)prompts[i],
                                     .positions = run->positions,
                                     .starts = starts,
                                     .rows = &last};
        TRY(prefill(llama, &run->cache, i, &prompt, run->logits, &batch->ids[i]));
        batch->positions[i] = (int32_t)prompt_lengths[i];
        lengths[i] = -1; /* still going on */
    }
    int64_t active = count;
    for (int64_t made = 0; active > 0; made++) {
        for (int64_t i = 0; i < count; i++) {
            if (lengths[i] >= 0) continue;
            if (batch->ids[i] == eos || made == most) {
                lengths[i] = made;
                active--;
            } else
                generated[i * most + made] = batch->ids[i];
        }
        if (active > 0) TRY(step(llama, &run->cache, batch, run->logits));
    }
    return 0;
}

int llama_generate(struct llama *llama, int64_t count, const int32_t *const *prompts, const int64_t *prompt_lengths,
                   int64_t most, int64_t eos, int32_t *generated, int64_t *lengths)
{
    int64_t longest = 1;
    for (int64_t i = 0; i < count; i++) {
        if (prompt_lengths[i] < 1) return fault("prompt %lld is empty", (long long)i);
        if (prompt_lengths[i] > longest) longest = prompt_lengths[i];
    }
    const int64_t positions = longest + most;
    if (positions > llama->config.max_positions)
        return fault("%lld prompt and %lld new tokens exceed the model's %lld positions", (long long)longest,
                     (long long)most, (long long)llama->config.max_positions);
    TRY(llama_prepare(llama, llama->adapters, longest > count ? longest : count, 0));
    TRY(llama_rope_tables(llama, positions));
    struct run run = {0};
    int result = run_make(llama, count, longest, positions, &run);
    if (result == 0) result = run_all(llama, &run, prompts, prompt_lengths, most, eos, generated, lengths);
    cache_free(&run.cache);
    batch_free(&run.batch);
    free(run.positions);
    free(run.logits);
    return result;
}
