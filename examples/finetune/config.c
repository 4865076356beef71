/* config.c: config.json -> struct llama_config, with every value checked before it sizes anything. */
#include "config.h"

#include <cjson/cJSON.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "util.h"

static const cJSON *present(const cJSON *object, const char *name)
{
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(object, name);
    return item && !cJSON_IsNull(item) ? item : NULL;
}

/* An integer in [1, most]; `absent` < 0 makes it required. */
static int read_count(const cJSON *root, const char *name, double most, int64_t absent, int64_t *value)
{
    const cJSON *item = present(root, name);
    if (!item) {
        *value = absent;
        return absent < 0 ? fault("config.json: '%s' is missing", name) : 0;
    }
    if (!cJSON_IsNumber(item) || !(item->valuedouble >= 1 && item->valuedouble <= most) ||
        item->valuedouble != floor(item->valuedouble))
        return fault("config.json: '%s' must be an integer in [1, %.0f]", name, most);
    *value = (int64_t)item->valuedouble;
    return 0;
}

static int read_positive(const cJSON *root, const char *name, double absent, double *value)
{
    const cJSON *item = present(root, name);
    *value = item && cJSON_IsNumber(item) ? item->valuedouble : absent;
    if ((item && !cJSON_IsNumber(item)) || !(*value > 0 && *value < 1e12))
        return fault("config.json: '%s' must be a number > 0", name);
    return 0;
}

static int read_flag(const cJSON *root, const char *name, int *value)
{
    const cJSON *item = present(root, name);
    if (item && !cJSON_IsBool(item)) return fault("config.json: '%s' must be true or false", name);
    *value = item && cJSON_IsTrue(item);
    return 0;
}

static int read_architecture(const cJSON *root)
{
    const cJSON *list = present(root, "architectures"), *first = cJSON_GetArrayItem(list, 0);
    const char *name = cJSON_IsString(first) ? first->valuestring : NULL;
    if (!name || strcmp(name, "LlamaForCausalLM") != 0)
        return fault("config.json: architecture '%s' is not supported: only LlamaForCausalLM is",
                     name ? name : "(none)");
    const cJSON *activation = present(root, "hidden_act");
    if (activation && (!cJSON_IsString(activation) || strcmp(activation->valuestring, "silu") != 0))
        return fault("config.json: hidden_act is not supported: only 'silu' is");
    const cJSON *quantized = present(root, "quantization_config");
    return quantized ? fault("config.json: quantization_config is not supported") : 0;
}

/* rope_theta stands at the top, or (transformers 5) in rope_parameters; scaling in rope_scaling or rope_parameters. */
static int read_rope(const cJSON *root, struct llama_config *config)
{
    const cJSON *parameters = present(root, "rope_parameters"), *scaling = present(root, "rope_scaling");
    double theta;
    TRY(read_positive(root, "rope_theta", 10000.0, &theta));
    TRY(read_positive(parameters, "rope_theta", theta, &config->rope_theta));
    if (!scaling) scaling = parameters;
    const cJSON *partial = present(parameters, "partial_rotary_factor");
    if (!partial) partial = present(root, "partial_rotary_factor");
    if (partial && partial->valuedouble != 1.0) return fault("config.json: partial_rotary_factor is not supported");
    const cJSON *type = present(scaling, "rope_type");
    if (!type) type = present(scaling, "type");
    if (!type || (cJSON_IsString(type) && strcmp(type->valuestring, "default") == 0)) return 0;
    if (!cJSON_IsString(type) || strcmp(type->valuestring, "llama3") != 0)
        return fault("config.json: rope_scaling of type '%s' is not supported: only 'default' and 'llama3' are",
                     cJSON_IsString(type) ? type->valuestring : "?");
    TRY(read_positive(scaling, "factor", 0, &config->rope_factor));
    TRY(read_positive(scaling, "low_freq_factor", 0, &config->rope_low));
    TRY(read_positive(scaling, "high_freq_factor", 0, &config->rope_high));
    TRY(read_positive(scaling, "original_max_position_embeddings", 0, &config->rope_original));
    return config->rope_high > config->rope_low ? 0
                                                : fault("config.json: high_freq_factor must exceed low_freq_factor");
}

static int read_all(const cJSON *root, struct llama_config *config)
{
    TRY(read_architecture(root));
    TRY(read_count(root, "hidden_size", 1 << 20, -1, &config->hidden));
    TRY(read_count(root, "num_hidden_layers", 10000, -1, &config->layers));
    TRY(read_count(root, "num_attention_heads", 1 << 16, -1, &config->heads));
    TRY(read_count(root, "num_key_value_heads", 1 << 16, config->heads, &config->kv_heads));
    TRY(read_count(root, "intermediate_size", 1 << 24, -1, &config->intermediate));
    TRY(read_count(root, "vocab_size", 1 << 28, -1, &config->vocabulary));
    TRY(read_count(root, "max_position_embeddings", 1 << 28, 2048, &config->max_positions));
    TRY(read_count(root, "head_dim", 1 << 16, config->hidden / config->heads, &config->head_size));
    if (config->head_size < 1 || config->head_size % 2 != 0)
        return fault("config.json: head size %lld must be even and > 0", (long long)config->head_size);
    if (config->heads % config->kv_heads != 0)
        return fault("config.json: %lld attention heads are no multiple of %lld key-value heads",
                     (long long)config->heads, (long long)config->kv_heads);
    TRY(read_positive(root, "rms_norm_eps", 1e-6, &config->epsilon));
    TRY(read_flag(root, "tie_word_embeddings", &config->tied));
    TRY(read_flag(root, "attention_bias", &config->attention_bias));
    TRY(read_flag(root, "mlp_bias", &config->mlp_bias));
    const cJSON *eos = present(root, "eos_token_id");
    if (cJSON_IsArray(eos)) eos = cJSON_GetArrayItem(eos, 0);
    config->eos = cJSON_IsNumber(eos) ? (int64_t)eos->valuedouble : -1;
    return read_rope(root, config);
}

int llama_config_read(const char *directory, struct llama_config *config)
{
    *config = (struct llama_config){0};
    cJSON *root;
    TRY(json_read(directory, "config.json", &root));
    const int result = read_all(root, config);
    cJSON_Delete(root);
    return result;
}
