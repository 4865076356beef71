/* config.h: what config.json of a LLaMA-family model says. */
#ifndef FINETUNE_CONFIG_H
#define FINETUNE_CONFIG_H

#include <stdint.h>

struct llama_config {
    int64_t hidden, layers, heads, kv_heads, head_size, intermediate, vocabulary, max_positions;
    double epsilon, rope_theta;
    /* "llama3" scaling of the rotary frequencies; factor 0 = none */
    double rope_factor, rope_low, rope_high, rope_original;
    int tied, attention_bias, mlp_bias;
    int64_t eos; /* -1 = not given */
};

/* Reads DIR/config.json. What this trainer does not compute is refused by name. */
int llama_config_read(const char *directory, struct llama_config *config);

#endif
