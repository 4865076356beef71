/* attention.c: see attention.h. Products are oneDNN's, one set per number of key blocks, made when a length first occurs. */
#include "attention.h"

#include <math.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>

#include "plora.h"
#include "products.h"
#include "rows.h"
#include "util.h"

/* The products of one head, block by block: a b^T for scores and dP, a b for O and dQ, c += a^T b for dK and dV. */
enum { SCORES, VALUES, GRADIENT, PRODUCTS };

struct scratch {    /* of one thread */
    float *s, *dp;  /* [64, capacity] */
    void *p, *ds;   /* the same in the element type: s and dp themselves in fp32 */
    float *dk, *dv; /* [capacity, D] */
    float *block;   /* [64, D] */
};

struct attention {
    int32_t dtype;
    int64_t heads, kv_heads, size;
    float scale;
    int threads;
    const struct row_kernels *rows;
    int64_t capacity;                      /* longest sequence, in blocks */
    struct product *(*products)[PRODUCTS]; /* [capacity] */
    struct scratch *scratch;               /* [threads] */
};

static void scratch_free(struct attention *a)
{
    for (int i = 0; i < a->threads; i++) {
        struct scratch *s = &a->scratch[i];
        if (s->p != (void *)s->s) free(s->p);
        if (s->ds != (void *)s->dp) free(s->ds);
        free(s->s);
        free(s->dp);
        free(s->dk);
        free(s->dv);
        free(s->block);
        *s = (struct scratch){0};
    }
}

int attention_create(int32_t dtype, int64_t heads, int64_t kv_heads, int64_t head_size, int threads,
                     struct attention **attention)
{
    *attention = NULL;
    struct attention *a;
    TRY(memory_allocate(1, sizeof *a, "attention", &a));
    a->dtype = dtype;
    a->heads = heads;
    a->kv_heads = kv_heads;
    a->size = head_size;
    a->scale = 1.0f / sqrtf((float)head_size);
    a->threads = threads;
    a->rows = row_kernels_for(dtype);
    if (memory_allocate((size_t)threads, sizeof *a->scratch, "attention", &a->scratch) != 0) {
        free(a);
        return -1;
    }
    *attention = a;
    return 0;
}

void attention_destroy(struct attention *a)
{
    if (!a) return;
    scratch_free(a);
    for (int64_t i = 0; i < a->capacity; i++)
        for (int j = 0; j < PRODUCTS; j++)
            product_destroy(a->products[i][j]);
    free(a->products);
    free(a->scratch);
    free(a);
}

static int aligned(size_t bytes, void *pointer_to_pointer)
{
    void **pointer = pointer_to_pointer;
    return posix_memalign(pointer, 64, bytes) == 0 ? 0 : fault("out of memory: %zu bytes for attention", bytes);
}

static int scratch_make(struct attention *a, int64_t capacity)
{
    const size_t keys = (size_t)capacity * ATTENTION_BLOCK, size = (size_t)a->size;
    scratch_free(a);
    for (int i = 0; i < a->threads; i++) {
        struct scratch *s = &a->scratch[i];
        TRY(aligned(keys * ATTENTION_BLOCK * 4, &s->s));
        TRY(aligned(keys * ATTENTION_BLOCK * 4, &s->dp));
        TRY(aligned(keys * size * 4, &s->dk));
        TRY(aligned(keys * size * 4, &s->dv));
        TRY(aligned(ATTENTION_BLOCK * size * 4, &s->block));
        if (a->dtype == PLORA_F32) {
            s->p = s->s;
            s->ds = s->dp;
        } else {
            TRY(aligned(keys * ATTENTION_BLOCK * 2, &s->p));
            TRY(aligned(keys * ATTENTION_BLOCK * 2, &s->ds));
        }
    }
    return 0;
}

static int products_make(struct attention *a, int64_t blocks, struct product **made)
{
    const int64_t keys = blocks * ATTENTION_BLOCK, block = ATTENTION_BLOCK, size = a->size;
    const int64_t wide = a->heads * size, narrow = a->kv_heads * size;
    const struct product_shape shapes[PRODUCTS] = {
        /*               m      n     k      strides of a, b, c    transposed a, b */
        [SCORES] = {block, keys, size, wide, narrow, keys, 0, 1, a->dtype, 0},
        [VALUES] = {block, size, keys, keys, narrow, size, 0, 0, a->dtype, 0},
        [GRADIENT] = {keys, size, block, keys, wide, size, 1, 0, a->dtype, 1}};
    for (int j = 0; j < PRODUCTS; j++)
        TRY(product_create(&shapes[j], a->threads, &made[j]));
    return 0;
}

/* Makes the products and the scratch memory for sequences of up to `longest` tokens. */
static int reserve(struct attention *a, int64_t longest)
{
    const int64_t blocks = (longest + ATTENTION_BLOCK - 1) / ATTENTION_BLOCK, had = a->capacity;
    if (blocks <= had) return 0;
    struct product *(*larger)[PRODUCTS] = realloc(a->products, (size_t)blocks * sizeof *larger);
    if (!larger) return fault("out of memory: attention products for %lld tokens", (long long)longest);
    a->products = larger;
    for (int64_t i = had; i < blocks; i++)
        for (int j = 0; j < PRODUCTS; j++)
            a->products[i][j] = NULL;
    a->capacity = blocks;
    for (int64_t i = had; i < blocks; i++)
        TRY(products_make(a, i + 1, a->products[i]));
    return scratch_make(a, blocks);
}

static int64_t longest_of(int64_t sequences, const int64_t *starts)
{
    int64_t longest = 1;
    for (int64_t i = 0; i < sequences; i++)
        if (starts[i + 1] - starts[i] > longest) longest = starts[i + 1] - starts[i];
    return longest;
}

static const void *at(const struct attention *a, const void *base, int64_t element)
{
    return (const char *)base + (size_t)element * element_size(a->dtype);
}

static void *out(const struct attention *a, void *base, int64_t element)
{
    return (char *)base + (size_t)element * element_size(a->dtype);
}

/* One head of new tokens that follow `past` others. lse may be NULL. */
static int head_forward(struct attention *a, int thread, const struct attention_piece *piece, int64_t head, float *lse)
{
    struct scratch *s = &a->scratch[thread];
    const int64_t size = a->size, wide = a->heads * size, kv = head / (a->heads / a->kv_heads) * size;
    int failed = 0;
    for (int64_t first = 0; first < piece->rows; first += ATTENTION_BLOCK) {
        const int64_t rows = piece->rows - first < ATTENTION_BLOCK ? piece->rows - first : ATTENTION_BLOCK;
        const int64_t blocks = (piece->past + first + rows + ATTENTION_BLOCK - 1) / ATTENTION_BLOCK;
        const int64_t keys = blocks * ATTENTION_BLOCK, origin = first * wide + head * size;
        float inverse[ATTENTION_BLOCK];
        failed |=
            product_run(a->products[blocks - 1][SCORES], thread, at(a, piece->q, origin), at(a, piece->k, kv), s->s);
        for (int64_t i = 0; i < rows; i++) {
            float top;
            const float sum = a->rows->softmax(piece->past + first + i + 1, keys, a->scale, s->s + i * keys,
                                               out(a, s->p, i * keys), &top);
            inverse[i] = 1.0f / sum;
            if (lse) lse[(first + i) * a->heads + head] = top + logf(sum);
        }
        failed |= product_run(a->products[blocks - 1][VALUES], thread, s->p, at(a, piece->v, kv), s->block);
        for (int64_t i = 0; i < rows; i++)
            a->rows->scale_out(size, s->block + i * size, inverse[i], out(a, piece->o, origin + i * wide));
    }
    return failed;
}

int attention_forward(struct attention *a, int64_t sequences, const int64_t *starts, const void *q, const void *k,
                      const void *v, void *o, float *lse)
{
    TRY(reserve(a, longest_of(sequences, starts)));
    const int64_t group = a->heads / a->kv_heads, tasks = sequences * a->kv_heads;
    const int64_t wide = a->heads * a->size, narrow = a->kv_heads * a->size;
    int failed = 0;
#pragma omp parallel for schedule(dynamic) num_threads(a->threads) reduction(| : failed)
    for (int64_t task = 0; task < tasks; task++) {
        const int64_t i = task / a->kv_heads, kv_head = task % a->kv_heads, start = starts[i];
        const struct attention_piece piece = {.rows = starts[i + 1] - start,
                                              .q = at(a, q, start * wide),
                                              .k = at(a, k, start * narrow),
                                              .v = at(a, v, start * narrow),
                                              .o = out(a, o, start * wide)};
        for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++)
            failed |= head_forward(a, omp_get_thread_num(), &piece, head, lse + start * a->heads);
    }
    return failed ? fault("oneDNN failed in the attention's forward") : 0;
}

/* One head of a single new token: a product with blocks of 64 queries would waste 63 of them. */
static void head_single(struct attention *a, int thread, const struct attention_piece *piece, int64_t head)
{
    struct scratch *s = &a->scratch[thread];
    const int64_t size = a->size, narrow = a->kv_heads * size, kv = head / (a->heads / a->kv_heads) * size;
    const int64_t keys = piece->past + 1, padded = (keys + ATTENTION_BLOCK - 1) / ATTENTION_BLOCK * ATTENTION_BLOCK;
    const void *q = at(a, piece->q, head * size);
    float top;
    for (int64_t i = 0; i < keys; i++)
        s->s[i] = a->rows->dot(size, q, at(a, piece->k, i * narrow + kv));
    /* the weights in fp32, whatever the element type: s->dp is free in a forward */
    const float sum = row_kernels_for(PLORA_F32)->softmax(keys, padded, a->scale, s->s, s->dp, &top);
    memset(s->block, 0, (size_t)size * sizeof *s->block);
    for (int64_t i = 0; i < keys; i++)
        a->rows->add_scaled(size, at(a, piece->v, i * narrow + kv), s->dp[i], s->block);
    a->rows->scale_out(size, s->block, 1.0f / sum, out(a, piece->o, head * size));
}

int attention_extend(struct attention *a, int64_t count, const struct attention_piece *pieces)
{
    int64_t longest = 1;
    for (int64_t i = 0; i < count; i++)
        if (pieces[i].past + pieces[i].rows > longest) longest = pieces[i].past + pieces[i].rows;
    TRY(reserve(a, longest));
    const int64_t group = a->heads / a->kv_heads, tasks = count * a->kv_heads;
    int failed = 0;
#pragma omp parallel for schedule(dynamic) num_threads(a->threads) reduction(| : failed)
    for (int64_t task = 0; task < tasks; task++) {
        const struct attention_piece *piece = &pieces[task / a->kv_heads];
        const int64_t kv_head = task % a->kv_heads;
        for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++)
            if (piece->rows == 1)
                head_single(a, omp_get_thread_num(), piece, head);
            else
                failed |= head_forward(a, omp_get_thread_num(), piece, head, NULL);
    }
    return failed ? fault("oneDNN failed in the attention's forward") : 0;
}

struct backward {
    const void *q, *k, *v, *o, *d_o;
    const float *lse, *cosine, *sine;
    void *dq, *dk, *dv;
};

static int head_backward(struct attention *a, int thread, int64_t start, int64_t length, int64_t head,
                         const struct backward *g)
{
    struct scratch *s = &a->scratch[thread];
    const int64_t size = a->size, wide = a->heads * size, narrow = a->kv_heads * size;
    const int64_t kv = start * narrow + head / (a->heads / a->kv_heads) * size;
    int failed = 0;
    for (int64_t first = 0; first < length; first += ATTENTION_BLOCK) {
        const int64_t blocks = first / ATTENTION_BLOCK + 1, keys = blocks * ATTENTION_BLOCK;
        const int64_t rows = length - first < ATTENTION_BLOCK ? length - first : ATTENTION_BLOCK;
        const int64_t origin = (start + first) * wide + head * size;
        struct product **products = a->products[blocks - 1];
        failed |= product_run(products[SCORES], thread, at(a, g->q, origin), at(a, g->k, kv), s->s);
        failed |= product_run(products[SCORES], thread, at(a, g->d_o, origin), at(a, g->v, kv), s->dp);
        for (int64_t i = 0; i < ATTENTION_BLOCK; i++) {
            const int64_t token = start + first + i, valid = i < rows ? first + i + 1 : 0;
            const float delta =
                valid ? a->rows->dot(size, at(a, g->d_o, origin + i * wide), at(a, g->o, origin + i * wide)) : 0.0f;
            const float lse = valid ? g->lse[token * a->heads + head] : 0.0f;
            a->rows->softmax_backward(valid, keys, a->scale, lse, delta, s->s + i * keys, s->dp + i * keys,
                                      out(a, s->p, i * keys), out(a, s->ds, i * keys));
        }
        failed |= product_run(products[GRADIENT], thread, s->p, at(a, g->d_o, origin), s->dv);
        failed |= product_run(products[GRADIENT], thread, s->ds, at(a, g->q, origin), s->dk);
        failed |= product_run(products[VALUES], thread, s->ds, at(a, g->k, kv), s->block);
        for (int64_t i = 0; i < rows; i++) {
            const int64_t angle = (first + i) * size / 2;
            a->rows->rotate_out(size, g->cosine + angle, g->sine + angle, -1.0f, s->block + i * size,
                                out(a, g->dq, origin + i * wide));
        }
    }
    return failed;
}

int attention_backward(struct attention *a, int64_t sequences, const int64_t *starts, const void *q, const void *k,
                       const void *v, const void *o, const float *lse, const void *d_o, const float *cosine,
                       const float *sine, void *dq, void *dk, void *dv)
{
    TRY(reserve(a, longest_of(sequences, starts)));
    const struct backward g = {q, k, v, o, d_o, lse, cosine, sine, dq, dk, dv};
    const int64_t group = a->heads / a->kv_heads, tasks = sequences * a->kv_heads, size = a->size;
    int failed = 0;
#pragma omp parallel for schedule(dynamic) num_threads(a->threads) reduction(| : failed)
    for (int64_t task = 0; task < tasks; task++) {
        const int64_t i = task / a->kv_heads, kv_head = task % a->kv_heads;
        const int64_t start = starts[i], length = starts[i + 1] - start;
        const int thread = omp_get_thread_num();
        struct scratch *s = &a->scratch[thread];
        const int64_t padded = (length + ATTENTION_BLOCK - 1) / ATTENTION_BLOCK * ATTENTION_BLOCK * size;
        for (int64_t j = 0; j < padded; j++)
            s->dk[j] = s->dv[j] = 0.0f;
        for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++)
            failed |= head_backward(a, thread, start, length, head, &g);
        for (int64_t j = 0; j < length; j++) {
            const int64_t target = ((start + j) * a->kv_heads + kv_head) * size, angle = j * size / 2;
            a->rows->rotate_out(size, cosine + angle, sine + angle, -1.0f, s->dk + j * size, out(a, dk, target));
            a->rows->scale_out(size, s->dv + j * size, 1.0f, out(a, dv, target));
        }
    }
    return failed ? fault("oneDNN failed in the attention's backward") : 0;
}
