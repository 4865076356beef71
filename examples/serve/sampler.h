/* sampler.h: the next token from its logits.
 *
 *     temperature 0: the largest logit, the lowest id of equals
 *     else           p = softmax(logits / temperature); of the likeliest tokens the fewest whose sum reaches top_p, one by their shares
 *
 * The random number is a function of (seed, position) alone, so a seed gives the same tokens whatever else the server does. */
#ifndef SERVE_SAMPLER_H
#define SERVE_SAMPLER_H

#include <stdint.h>

struct sampling {
    double temperature, top_p;
    uint64_t seed;
};

struct sampler; /* scratch memory */

int sampler_create(int64_t vocabulary, struct sampler **sampler);
void sampler_destroy(struct sampler *sampler);

/* position: of the new token in its sequence. */
int32_t sampler_pick(struct sampler *sampler, const float *logits, const struct sampling *sampling, int64_t position);

#endif
