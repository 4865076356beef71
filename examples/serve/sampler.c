/* sampler.c: see sampler.h. Sorting a whole vocabulary for each token would cost more than a small model's layers. No token with
 * p < (1 - top_p) / V is in the nucleus, since all such together are less than what may be left out: only the rest is sorted. */
#include "sampler.h"

#include <math.h>
#include <stdlib.h>

#include "util.h"

struct choice {
    float p;
    int32_t id;
};

struct sampler {
    int64_t vocabulary;
    struct choice *choices;
};

int sampler_create(int64_t vocabulary, struct sampler **sampler)
{
    *sampler = NULL;
    struct sampler *s;
    TRY(memory_allocate(1, sizeof *s, "sampler", &s));
    s->vocabulary = vocabulary;
    if (memory_allocate((size_t)vocabulary, sizeof *s->choices, "sampler", &s->choices) != 0) {
        free(s);
        return -1;
    }
    *sampler = s;
    return 0;
}

void sampler_destroy(struct sampler *s)
{
    if (!s) return;
    free(s->choices);
    free(s);
}

static int32_t largest(const float *logits, int64_t count)
{
    int64_t best = 0;
    for (int64_t i = 1; i < count; i++)
        if (logits[i] > logits[best]) best = i;
    return (int32_t)best;
}

static int likelier(const void *a, const void *b)
{
    const struct choice *x = a, *y = b;
    return x->p != y->p ? (x->p < y->p ? 1 : -1) : x->id < y->id ? -1 : 1;
}

int32_t sampler_pick(struct sampler *s, const float *logits, const struct sampling *sampling, int64_t position)
{
    const int32_t best = largest(logits, s->vocabulary);
    if (sampling->temperature <= 0) return best;
    const float top = logits[best];
    double total = 0;
    for (int64_t i = 0; i < s->vocabulary; i++) {
        s->choices[i] = (struct choice){(float)exp((double)(logits[i] - top) / sampling->temperature), (int32_t)i};
        total += s->choices[i].p;
    }
    int64_t count = s->vocabulary;
    double kept = total;
    if (sampling->top_p < 1) {
        const double least = (1 - sampling->top_p) * total / (double)s->vocabulary;
        count = 0;
        for (int64_t i = 0; i < s->vocabulary; i++)
            if (s->choices[i].p >= least) s->choices[count++] = s->choices[i];
        qsort(s->choices, (size_t)count, sizeof *s->choices, likelier);
        kept = 0;
        int64_t used = 0;
        while (used < count && (used == 0 || kept < sampling->top_p * total))
            kept += s->choices[used++].p;
        count = used;
    }
    double left = kept * ((double)(random_at(sampling->seed, (uint64_t)position) >> 11) * 0x1p-53);
    for (int64_t i = 0; i < count; i++) {
        left -= s->choices[i].p;
        if (left < 0) return s->choices[i].id;
    }
    return count > 0 ? s->choices[count - 1].id : best;
}
