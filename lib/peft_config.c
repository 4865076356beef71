/* peft_config.c: see peft_config.h.
 *
 * A key of rank_pattern or alpha_pattern is a regular expression that must match the whole layer name or its last components:
 * (.*\.)?(key)$, the first key that matches counts. Read here are names, in which '.' stands for any character, "\." for a dot,
 * and a leading '^' for "the whole name"; anything else is refused.
 *
 * Written are full names, longest first: "a.b" would also match the layer "z.a.b", which then has an entry of its own. */
#include "peft_config.h"

#include <string.h>

/* ------------------------------------------------------------------------------------------------------------- reading */

/* Keys that are read, or that do not change what a trained adapter computes. */
static const char *const harmless[] = {
    "peft_type",
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "r",
    "target_modules",
    "exclude_modules",
    "lora_alpha",
    "lora_dropout",
    "fan_in_fan_out",
    "bias",
    "use_rslora",
    "init_lora_weights",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "megatron_config",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "qalora_group_size",
    "ensure_weight_tying",
    "runtime_config",
    "unsloth_fixed",
};
enum { HARMLESS_COUNT = sizeof harmless / sizeof harmless[0] };

/* null, false and empty containers switch an option off. */
static int is_off(const struct plora__json *json, int32_t token)
{
    switch (plora__json_type(json, token)) {
    case PLORA__JSON_NULL: return 1;
    case PLORA__JSON_BOOL: return !plora__json_true(json, token);
    case PLORA__JSON_OBJECT:
    case PLORA__JSON_ARRAY: return plora__json_size(json, token) == 0;
    default: return 0;
    }
}

/* The message quotes the beginning of the value as it is written; the '}' that ends the document ends it at the latest. */
static plora_status refuse(const struct plora__json *json, int32_t key, const char *why)
{
    const size_t begin = plora__json_offset(json, key + 1);
    int length = 0;
    while (length < 40 && strchr("\",}\n", json->text[begin + (size_t)length]) == NULL)
        ++length;
    return plora__fail(PLORA_ERROR_UNSUPPORTED, "\"%.*s\" is %.*s at byte %zu: %s",
                       (int)(plora__json_string_bytes(json, key) - 1), json->text + plora__json_offset(json, key),
                       length, json->text + begin, begin, why);
}

static plora_status check_key(const struct plora__json *json, int32_t key)
{
    const int32_t value = key + 1;
    if (plora__json_equals(json, key, "peft_type") && !plora__json_equals(json, value, "LORA"))
        return refuse(json, key, "only LORA is supported");
    if (plora__json_equals(json, key, "bias") && !is_off(json, value) && !plora__json_equals(json, value, "none"))
        return refuse(json, key, "a trained bias is not supported");
    if (plora__json_equals(json, key, "init_lora_weights") && plora__json_type(json, value) == PLORA__JSON_STRING &&
        !plora__json_equals(json, value, "gaussian") && !plora__json_equals(json, value, "eva") &&
        !plora__json_equals(json, value, "orthogonal"))
        return refuse(json, key, "an initialisation that changes the backbone is not supported");
    for (int i = 0; i < HARMLESS_COUNT; ++i)
        if (plora__json_equals(json, key, harmless[i])) return PLORA_OK;
    return is_off(json, value) ? PLORA_OK : refuse(json, key, "this option is not supported");
}

static int is_plain(char c)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '-' ||
           c == '.';
}

static plora_status check_pattern(const struct plora__json *json, const char *which, int32_t key, int ranks)
{
    const char *pattern = json->text + plora__json_offset(json, key); /* as written: "\\." is an escaped dot */
    const size_t length = plora__json_string_bytes(json, key) - 1;
    int64_t rank;
    double alpha;
    PLORA_CHECK(length > 0, PLORA_ERROR_FORMAT, "%s: an empty key at byte %zu", which, plora__json_offset(json, key));
    for (size_t i = 0; i < length; ++i) {
        if (i + 2 < length && memcmp(pattern + i, "\\\\.", 3) == 0) {
            i += 2;
            continue;
        }
        PLORA_CHECK(is_plain(pattern[i]) || (i == 0 && length > 1 && pattern[i] == '^'), PLORA_ERROR_UNSUPPORTED,
                    "%s: \"%.*s\" at byte %zu is a regular expression, only names are supported", which,
                    length < 200 ? (int)length : 200, pattern, plora__json_offset(json, key));
    }
    const int good = ranks ? plora__json_integer(json, key + 1, &rank) && rank >= 1 && rank <= INT32_MAX
                           : plora__json_number(json, key + 1, &alpha);
    PLORA_CHECK(good, PLORA_ERROR_FORMAT, "%s: the value of \"%.*s\" at byte %zu is not a %s", which,
                length < 200 ? (int)length : 200, pattern, plora__json_offset(json, key + 1),
                ranks ? "positive integer" : "finite number");
    return PLORA_OK;
}

/* *object becomes the token of a pattern object whose every entry is checked, or -1. */
static plora_status read_patterns(const struct plora__json *json, const char *which, int ranks, int32_t *object)
{
    *object = plora__json_member(json, 0, which);
    if (*object < 0) return PLORA_OK;
    if (plora__json_type(json, *object) == PLORA__JSON_NULL) {
        *object = -1;
        return PLORA_OK;
    }
    PLORA_CHECK(plora__json_type(json, *object) == PLORA__JSON_OBJECT, PLORA_ERROR_FORMAT,
                "%s at byte %zu is not an object", which, plora__json_offset(json, *object));
    int32_t key = *object + 1;
    for (int32_t i = 0; i < plora__json_size(json, *object); ++i, key = plora__json_next(json, key + 1))
        PLORA_TRY(check_pattern(json, which, key, ranks));
    return PLORA_OK;
}

static plora_status check_config(struct plora__peft_config *config)
{
    const struct plora__json *json = &config->json;
    PLORA_CHECK(plora__json_member(json, 0, "peft_type") >= 0, PLORA_ERROR_FORMAT, "there is no \"peft_type\"");
    int32_t key = 1;
    for (int32_t i = 0; i < plora__json_size(json, 0); ++i, key = plora__json_next(json, key + 1)) {
        PLORA_TRY(check_key(json, key));
        int32_t other = 1;
        for (int32_t j = 0; j < i; ++j, other = plora__json_next(json, other + 1))
            if (plora__json_string_bytes(json, key) == plora__json_string_bytes(json, other) &&
                memcmp(json->text + plora__json_offset(json, key), json->text + plora__json_offset(json, other),
                       plora__json_string_bytes(json, key)) == 0)
                return plora__fail(PLORA_ERROR_FORMAT, "\"%.*s\" occurs twice, at bytes %zu and %zu",
                                   (int)(plora__json_string_bytes(json, key) - 1),
                                   json->text + plora__json_offset(json, key), plora__json_offset(json, other),
                                   plora__json_offset(json, key));
    }
    const int32_t rank = plora__json_member(json, 0, "r"), alpha = plora__json_member(json, 0, "lora_alpha");
    PLORA_CHECK(rank >= 0 && plora__json_integer(json, rank, &config->rank) && config->rank >= 1 &&
                    config->rank <= INT32_MAX,
                PLORA_ERROR_FORMAT, "\"r\" is not a positive integer");
    PLORA_CHECK(alpha >= 0 && plora__json_number(json, alpha, &config->alpha), PLORA_ERROR_FORMAT,
                "\"lora_alpha\" is not a finite number");
    const int32_t rslora = plora__json_member(json, 0, "use_rslora");
    PLORA_CHECK(rslora < 0 || plora__json_type(json, rslora) == PLORA__JSON_BOOL || is_off(json, rslora),
                PLORA_ERROR_FORMAT, "\"use_rslora\" is neither true nor false");
    config->rslora = rslora >= 0 && plora__json_true(json, rslora);
    PLORA_TRY(read_patterns(json, "rank_pattern", 1, &config->rank_pattern));
    return read_patterns(json, "alpha_pattern", 0, &config->alpha_pattern);
}

enum { CONFIG_BYTES_MAX = 1 << 24, CONFIG_KEYS_MAX = 1000 };

plora_status plora__peft_config_read(plora_context *context, const char *text, size_t length,
                                     struct plora__peft_config *config)
{
    *config = (struct plora__peft_config){.rank_pattern = -1, .alpha_pattern = -1};
    PLORA_CHECK(length <= CONFIG_BYTES_MAX, PLORA_ERROR_FORMAT, "%zu bytes, at most %d are read", length,
                CONFIG_BYTES_MAX);
    PLORA_TRY(plora__json_parse(context, text, length, &config->json));
    plora_status status;
    PLORA_CHECK_OUT(plora__json_size(&config->json, 0) <= CONFIG_KEYS_MAX, PLORA_ERROR_FORMAT,
                    "%d keys, at most %d are read", plora__json_size(&config->json, 0), CONFIG_KEYS_MAX);
    status = check_config(config);
out:
    if (status != PLORA_OK) plora__peft_config_free(config);
    return status;
}

void plora__peft_config_free(struct plora__peft_config *config)
{
    plora__json_free(&config->json);
}

/* Whether a checked pattern matches a name; both are read from their ends. */
static int pattern_matches(const char *pattern, size_t length, const char *name)
{
    size_t left = strlen(name);
    const int whole = pattern[0] == '^';
    const size_t first = whole ? 1 : 0;
    while (length > first) {
        if (left == 0) return 0;
        const char c = pattern[length - 1];
        const int escaped = c == '.' && length >= first + 3 && pattern[length - 2] == '\\';
        if (c != name[left - 1] && (c != '.' || escaped)) return 0;
        length -= escaped ? 3 : 1;
        --left;
    }
    return left == 0 || (!whole && name[left - 1] == '.');
}

static int32_t find_pattern(const struct plora__json *json, int32_t object, const char *name)
{
    if (object < 0) return -1;
    int32_t key = object + 1;
    for (int32_t i = 0; i < plora__json_size(json, object); ++i, key = plora__json_next(json, key + 1))
        if (pattern_matches(json->text + plora__json_offset(json, key), plora__json_string_bytes(json, key) - 1, name))
            return key + 1;
    return -1;
}

void plora__peft_config_layer(const struct plora__peft_config *config, const char *name, int64_t *rank, double *alpha)
{
    const int32_t rank_token = find_pattern(&config->json, config->rank_pattern, name);
    const int32_t alpha_token = find_pattern(&config->json, config->alpha_pattern, name);
    *rank = config->rank;
    *alpha = config->alpha;
    if (rank_token >= 0) (void)plora__json_integer(&config->json, rank_token, rank);
    if (alpha_token >= 0) (void)plora__json_number(&config->json, alpha_token, alpha);
}

/* ------------------------------------------------------------------------------------------------------------- writing */

static const char *last_component(const char *name)
{
    const char *dot = strrchr(name, '.');
    return dot == NULL ? name : dot + 1;
}

/* Whether the layers of this last component are exactly those of adapters of the file. */
static int covers(const plora_adapters *adapters, const struct plora__peft_adapter *list, const char *component)
{
    const plora_model *model = adapters->model;
    for (int32_t layer = 0; layer < model->layer_count; ++layer) {
        const char *name = model->layers[layer].name;
        if (strcmp(last_component(name), component) != 0) continue;
        const int32_t adapter = adapters->adapter_of_layer[layer];
        if (adapter < 0 || strcmp(list[adapter].name, name) != 0) return 0;
    }
    return 1;
}

/* A last component where that names the adapters and nothing else, else full names. */
static plora_status write_targets(struct plora__text *text, const plora_adapters *adapters,
                                  const struct plora__peft_adapter *list)
{
    int written = 0;
    PLORA_TRY(plora__text_format(text, "  \"target_modules\": ["));
    for (int32_t i = 0; i < adapters->adapter_count; ++i) {
        const char *component = last_component(list[i].name);
        const int short_form = covers(adapters, list, component);
        int32_t earlier = 0;
        while (short_form && earlier < i && strcmp(last_component(list[earlier].name), component) != 0)
            ++earlier;
        if (short_form && earlier < i) continue;
        PLORA_TRY(plora__text_format(text, written++ == 0 ? "\n    " : ",\n    "));
        PLORA_TRY(plora__text_quote(text, short_form ? component : list[i].name));
    }
    return plora__text_format(text, "\n  ],\n");
}

static int differs(const struct plora__peft_adapter *adapter, const plora_adapters_options *options, int ranks)
{
    return ranks ? adapter->rank != options->rank : adapter->alpha != options->alpha;
}

static int has_suffix(const char *name, const char *suffix)
{
    const size_t length = strlen(name), suffix_length = strlen(suffix);
    return length > suffix_length && name[length - suffix_length - 1] == '.' &&
           strcmp(name + length - suffix_length, suffix) == 0;
}

static int longer(int32_t i, int32_t j, const void *user)
{
    const struct plora__peft_adapter *list = user;
    const size_t a = strlen(list[i].name), b = strlen(list[j].name);
    return a != b ? a > b : i < j;
}

static plora_status write_patterns(struct plora__text *text, const struct plora__peft_adapter *list, int32_t count,
                                   const plora_adapters_options *options, const int32_t *order, int ranks)
{
    int written = 0;
    PLORA_TRY(plora__text_format(text, "  \"%s\": {", ranks ? "rank_pattern" : "alpha_pattern"));
    for (int32_t k = 0; k < count; ++k) {
        const struct plora__peft_adapter *adapter = &list[order[k]];
        int needed = differs(adapter, options, ranks);
        for (int32_t j = 0; !needed && j < count; ++j)
            needed = differs(&list[j], options, ranks) && has_suffix(adapter->name, list[j].name);
        if (!needed) continue;
        PLORA_TRY(plora__text_format(text, written++ == 0 ? "\n    " : ",\n    "));
        PLORA_TRY(plora__text_quote(text, adapter->name));
        PLORA_TRY(plora__text_format(text, ": "));
        PLORA_TRY(plora__text_number(text, ranks ? (double)adapter->rank : adapter->alpha));
    }
    return plora__text_format(text, written > 0 ? "\n  },\n" : "},\n");
}

plora_status plora__peft_config_write(struct plora__text *text, const plora_adapters *adapters,
                                      const struct plora__peft_adapter *list, const plora_adapters_options *options,
                                      int32_t *order)
{
    const int32_t count = adapters->adapter_count;
    int transposed = count > 0;
    for (int32_t i = 0; i < count; ++i) {
        order[i] = i;
        transposed &= adapters->model->weights[adapters->adapters[i].weight].fan_in_fan_out;
    }
    plora__sort(order, count, longer, list);
    PLORA_TRY(plora__text_format(text,
                                 "{\n"
                                 "  \"peft_type\": \"LORA\",\n"
                                 "  \"task_type\": \"CAUSAL_LM\",\n"
                                 "  \"auto_mapping\": null,\n"
                                 "  \"base_model_name_or_path\": null,\n"
                                 "  \"revision\": null,\n"
                                 "  \"inference_mode\": true,\n"
                                 "  \"bias\": \"none\",\n"
                                 "  \"fan_in_fan_out\": %s,\n"
                                 "  \"init_lora_weights\": true,\n"
                                 "  \"layers_to_transform\": null,\n"
                                 "  \"layers_pattern\": null,\n"
                                 "  \"modules_to_save\": null,\n"
                                 "  \"use_dora\": false,\n"
                                 "  \"use_rslora\": %s,\n"
                                 "  \"r\": %d,\n"
                                 "  \"lora_alpha\": ",
                                 transposed ? "true" : "false", options->rslora ? "true" : "false", options->rank));
    PLORA_TRY(plora__text_number(text, options->alpha));
    PLORA_TRY(plora__text_format(text, ",\n"));
    PLORA_TRY(write_targets(text, adapters, list));
    PLORA_TRY(write_patterns(text, list, count, options, order, 1));
    PLORA_TRY(write_patterns(text, list, count, options, order, 0));
    PLORA_TRY(plora__text_format(text, "  \"lora_dropout\": "));
    PLORA_TRY(plora__text_number(text, options->dropout));
    return plora__text_format(text, "\n}\n");
}
