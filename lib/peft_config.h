/* peft_config.h: adapter_config.json of a PEFT directory. What changes the arithmetic is read or refused by name. */
#ifndef PLORA_PEFT_CONFIG_H
#define PLORA_PEFT_CONFIG_H

#include "json.h"
#include "peft.h"

struct plora__peft_config {
    struct plora__json json;             /* points into `text`, which must stay */
    int32_t rank_pattern, alpha_pattern; /* tokens, -1 = absent */
    int64_t rank;
    double alpha;
    int32_t rslora;
};

/* Errors: FORMAT, UNSUPPORTED, OUT_OF_MEMORY. On an error there is nothing to free. */
plora_status plora__peft_config_read(plora_context *context, const char *text, size_t length,
                                     struct plora__peft_config *config);
void plora__peft_config_free(struct plora__peft_config *config);
/* Rank and alpha that the config gives to a layer: of the first pattern that matches it, as PEFT does, or the defaults. */
void plora__peft_config_layer(const struct plora__peft_config *config, const char *name, int64_t *rank, double *alpha);

/* Appends the config of a list as in plora__peft_save(). order[adapter_count] is scratch. */
plora_status plora__peft_config_write(struct plora__text *text, const plora_adapters *adapters,
                                      const struct plora__peft_adapter *list, const plora_adapters_options *options,
                                      int32_t *order);

#endif
