/* gguf_names.c: which layer a tensor of llama.cpp's is, and the order of its rows.
 *
 * Names are those of llama.cpp's gguf-py and of its convert_lora_to_gguf.py, for the LLaMA family alone. Each head of a query or key
 * projection has its rows in another order there: plora__gguf_row(). */
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "gguf.h"
#include "json.h"

static const struct {
    const char *layer, *name;
    int32_t rows;
} names[] = {
    {"self_attn.q_proj", "attn_q", PLORA__GGUF_ROWS_QUERY}, {"self_attn.k_proj", "attn_k", PLORA__GGUF_ROWS_KEY},
    {"self_attn.v_proj", "attn_v", PLORA__GGUF_ROWS_KEPT},  {"self_attn.o_proj", "attn_output", PLORA__GGUF_ROWS_KEPT},
    {"mlp.gate_proj", "ffn_gate", PLORA__GGUF_ROWS_KEPT},   {"mlp.up_proj", "ffn_up", PLORA__GGUF_ROWS_KEPT},
    {"mlp.down_proj", "ffn_down", PLORA__GGUF_ROWS_KEPT},
};
enum { NAME_COUNT = sizeof names / sizeof names[0] };

static const char layer_prefix[] = "model.layers.", block_prefix[] = "blk.", name_suffix[] = ".weight";

/* The number behind `prefix`, as it is written: at most nine digits, no leading zeros. 0 digits where there is none. */
static size_t number_behind(const char *text, const char *prefix, const char **number)
{
    const size_t length = strlen(prefix);
    if (strncmp(text, prefix, length) != 0) return 0;
    *number = text + length;
    const size_t digits = strspn(*number, "0123456789");
    return digits < 10 && (digits == 1 || (*number)[0] != '0') ? digits : 0;
}

plora_status plora__gguf_name(const char *layer, char name[PLORA__GGUF_NAME_BYTES], int32_t *rows)
{
    *rows = PLORA__GGUF_ROWS_KEPT;
    if (strcmp(layer, "lm_head") == 0) {
        snprintf(name, PLORA__GGUF_NAME_BYTES, "output.weight");
        return PLORA_OK;
    }
    const char *number;
    const size_t digits = number_behind(layer, layer_prefix, &number);
    for (size_t i = 0; digits > 0 && i < NAME_COUNT; ++i) {
        if (number[digits] != '.' || strcmp(number + digits + 1, names[i].layer) != 0) continue;
        snprintf(name, PLORA__GGUF_NAME_BYTES, "%s%.*s.%s%s", block_prefix, (int)digits, number, names[i].name,
                 name_suffix);
        *rows = names[i].rows;
        return PLORA_OK;
    }
    return plora__fail(PLORA_ERROR_UNSUPPORTED, "layer '%.200s' has no name in a GGUF file of the LLaMA family", layer);
}

plora_status plora__gguf_layer(const char *name, size_t length, char layer[PLORA__GGUF_NAME_BYTES], int32_t *rows)
{
    char own[PLORA__GGUF_NAME_BYTES], again[PLORA__GGUF_NAME_BYTES];
    const char *number;
    *rows = PLORA__GGUF_ROWS_KEPT;
    if (length < sizeof own) {
        snprintf(own, sizeof own, "%.*s", (int)length, name);
        if (strcmp(own, "output.weight") == 0) {
            snprintf(layer, PLORA__GGUF_NAME_BYTES, "lm_head");
            return PLORA_OK;
        }
        const size_t digits = number_behind(own, block_prefix, &number);
        for (size_t i = 0; digits > 0 && i < NAME_COUNT; ++i) {
            snprintf(layer, PLORA__GGUF_NAME_BYTES, "%s%.*s.%s", layer_prefix, (int)digits, number, names[i].layer);
            if (plora__gguf_name(layer, again, rows) == PLORA_OK && strcmp(own, again) == 0) return PLORA_OK;
        }
    }
    return plora__fail(PLORA_ERROR_UNSUPPORTED, "'%.*s' is no linear layer of the LLaMA family",
                       length < 200 ? (int)length : 200, name);
}

/* --------------------------------------------------------------------------------------------------------------- heads */

/* *value stays where the document has no such member. */
static plora_status read_count(const struct plora__json *json, const char *name, int32_t *value)
{
    const int32_t token = plora__json_member(json, 0, name);
    int64_t number = 0;
    if (token < 0 || plora__json_type(json, token) == PLORA__JSON_NULL) return PLORA_OK;
    PLORA_CHECK(plora__json_integer(json, token, &number) && number >= 1 && number <= INT32_MAX, PLORA_ERROR_FORMAT,
                "\"%s\" at byte %zu is not an integer in [1, 2^31)", name, plora__json_offset(json, token));
    *value = (int32_t)number;
    return PLORA_OK;
}

static plora_status read_config(plora_context *context, const char *path, struct plora__gguf_heads *found)
{
    struct plora__mapping text;
    struct plora__json json = {0};
    plora_status status;
    PLORA_TRY(plora__file_map(context, path, &text));
    PLORA_TRY_OUT(plora__json_parse(context, (const char *)text.data, text.bytes, &json));
    PLORA_TRY_OUT(read_count(&json, "num_attention_heads", &found->heads));
    status = read_count(&json, "num_key_value_heads", &found->kv_heads);
out:
    plora__json_free(&json);
    plora__file_unmap(context, &text);
    return status == PLORA_OK ? PLORA_OK : plora__fail_in(status, path);
}

plora_status plora__gguf_heads_of(const plora_model *model, int32_t heads, int32_t kv_heads,
                                  struct plora__gguf_heads *found)
{
    struct stat info;
    char *path;
    *found = (struct plora__gguf_heads){.heads = heads, .kv_heads = kv_heads};
    if (heads > 0 || model->path == NULL || stat(model->path, &info) != 0 || !S_ISDIR(info.st_mode)) return PLORA_OK;
    PLORA_TRY(plora__join_path(model->context, model->path, "config.json", &path));
    const plora_status status = stat(path, &info) == 0 ? read_config(model->context, path, found) : PLORA_OK;
    plora__free_string(model->context, path);
    return status;
}

plora_status plora__gguf_head_rows(struct plora__gguf_heads *heads, const char *layer, int32_t rows, int64_t row_count,
                                   int64_t *head_rows)
{
    *head_rows = 0;
    if (rows == PLORA__GGUF_ROWS_KEPT) return PLORA_OK;
    const int32_t count = rows == PLORA__GGUF_ROWS_KEY && heads->kv_heads > 0 ? heads->kv_heads : heads->heads;
    PLORA_CHECK(heads->heads > 0, PLORA_ERROR_INVALID_ARGUMENT,
                "layer '%.200s': heads is 0, GGUF needs the model's num_attention_heads and num_key_value_heads",
                layer);
    const int64_t size = row_count / count;
    PLORA_CHECK(row_count % count == 0 && size % 2 == 0 && size > 0 &&
                    (heads->head_rows == 0 || heads->head_rows == size),
                PLORA_ERROR_SHAPE, "layer '%.200s': %lld rows are not %d heads of %s", layer, (long long)row_count,
                count, heads->head_rows == 0 ? "an even size" : "the size of those of other layers");
    heads->head_rows = *head_rows = size;
    return PLORA_OK;
}
