/* attention.h: causal attention with grouped heads over sequences of any length, packed one after another without padding.
 *
 *     S = scale Q K^T,  P = softmax(S masked),  O = P V            q[T, heads D]  k, v[T, kv_heads D]  o[T, heads D]
 *
 * The forward keeps lse[T, heads], the log of each softmax's denominator; the backward computes P again from it:
 *     dV = P^T dO,  dP = dO V^T,  dS = P (dP - rowsum(dO O)) scale,  dQ = dS K,  dK = dS^T Q
 * Queries are taken in blocks of 64, whose keys end with the block: at most 64 x length scores exist per thread.
 * One task is one group of heads of one sequence, so results do not depend on the number of threads.
 * Blocks may read up to 63 rows beyond the end of q, k, v, o and do: that memory must exist and hold finite values. */
#ifndef FINETUNE_ATTENTION_H
#define FINETUNE_ATTENTION_H

#include <stdint.h>

enum { ATTENTION_BLOCK = 64 };

struct attention;

int attention_create(int32_t dtype, int64_t heads, int64_t kv_heads, int64_t head_size, int threads,
                     struct attention **attention);
void attention_destroy(struct attention *attention);

/* starts[0 .. sequences]: first token of each sequence, then T. */
int attention_forward(struct attention *attention, int64_t sequences, const int64_t *starts, const void *q,
                      const void *k, const void *v, void *o, float *lse);

/* New tokens of one sequence, and the keys and values of all its tokens, old and new: memory for a multiple of 64 of them. */
struct attention_piece {
    int64_t rows, past; /* new tokens, and those before them */
    const void *q;      /* [rows, heads D] */
    const void *k, *v;  /* [past + rows, kv_heads D] */
    void *o;            /* [rows, heads D] */
};
/* The forward of pieces of several sequences, nothing kept. */
int attention_extend(struct attention *attention, int64_t count, const struct attention_piece *pieces);

/* cosine, sine[position, D / 2] turn dq and dk back, to before the rotary embedding. */
int attention_backward(struct attention *attention, int64_t sequences, const int64_t *starts, const void *q,
                       const void *k, const void *v, const void *o, const float *lse, const void *d_o,
                       const float *cosine, const float *sine, void *dq, void *dk, void *dv);

#endif
