/* gguf.c: see gguf.h. Names and types are those of llama.cpp's gguf-py and of its convert_lora_to_gguf.py. */
#include "gguf.h"

#include <stdio.h>
#include <string.h>

#include "dtype.h"
#include "json.h"

enum { VERSION = 3, ALIGNMENT = 32, TYPE_F32 = 6 /* of a value */, TYPE_STRING = 8, TENSOR_F32 = 0 };

static plora_status append_number(struct plora__text *text, uint64_t number, int bytes)
{
    char little[8];
    for (int i = 0; i < bytes; ++i)
        little[i] = (char)(number >> 8 * i & 0xff);
    return plora__text_append(text, little, (size_t)bytes);
}

static plora_status append_string(struct plora__text *text, const char *string)
{
    PLORA_TRY(append_number(text, strlen(string), 8));
    return plora__text_append(text, string, strlen(string));
}

static uint64_t padded(uint64_t bytes)
{
    return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

static plora_status format_header(struct plora__text *text, const struct plora__gguf_value *values, int32_t value_count,
                                  const struct plora__tensor *tensors, int32_t tensor_count)
{
    PLORA_TRY(plora__text_append(text, "GGUF", 4));
    PLORA_TRY(append_number(text, VERSION, 4));
    PLORA_TRY(append_number(text, (uint64_t)tensor_count, 8));
    PLORA_TRY(append_number(text, (uint64_t)value_count, 8));
    for (int32_t i = 0; i < value_count; ++i) {
        PLORA_TRY(append_string(text, values[i].key));
        PLORA_TRY(append_number(text, values[i].text != NULL ? TYPE_STRING : TYPE_F32, 4));
        if (values[i].text != NULL)
            PLORA_TRY(append_string(text, values[i].text));
        else
            PLORA_TRY(append_number(text, plora__float_bits(values[i].number), 4));
    }
    uint64_t offset = 0;
    for (int32_t i = 0; i < tensor_count; ++i) {
        PLORA_TRY(append_string(text, tensors[i].name));
        PLORA_TRY(append_number(text, 2, 4));
        PLORA_TRY(append_number(text, (uint64_t)tensors[i].shape[1], 8));
        PLORA_TRY(append_number(text, (uint64_t)tensors[i].shape[0], 8));
        PLORA_TRY(append_number(text, TENSOR_F32, 4));
        PLORA_TRY(append_number(text, offset, 8));
        offset += padded(tensors[i].bytes);
    }
    return PLORA_OK;
}

static plora_status pad(struct plora__writer *writer, uint64_t bytes)
{
    static const char zeros[ALIGNMENT];
    return plora__writer_write(writer, zeros, (size_t)(padded(bytes) - bytes));
}

plora_status plora__gguf_write(plora_context *context, const char *path, const struct plora__gguf_value *values,
                               int32_t value_count, const struct plora__tensor *tensors, int32_t tensor_count)
{
    struct plora__text text = {context, NULL, 0, 0};
    struct plora__writer writer;
    plora_status status = format_header(&text, values, value_count, tensors, tensor_count);
    if (status == PLORA_OK) status = plora__writer_open(context, path, &writer);
    if (status != PLORA_OK) {
        plora__text_free(&text);
        return status;
    }
    PLORA_TRY_OUT(plora__writer_write(&writer, text.data, text.length));
    PLORA_TRY_OUT(pad(&writer, text.length));
    for (int32_t i = 0; i < tensor_count; ++i) {
        PLORA_TRY_OUT(tensors[i].write(&tensors[i], &writer));
        PLORA_TRY_OUT(pad(&writer, tensors[i].bytes));
    }
out:
    plora__text_free(&text);
    return plora__writer_close(&writer, status);
}

static const struct {
    const char *layer, *name;
    int32_t rows;
} names[] = {
    {"self_attn.q_proj", "attn_q", PLORA__GGUF_ROWS_QUERY}, {"self_attn.k_proj", "attn_k", PLORA__GGUF_ROWS_KEY},
    {"self_attn.v_proj", "attn_v", PLORA__GGUF_ROWS_KEPT},  {"self_attn.o_proj", "attn_output", PLORA__GGUF_ROWS_KEPT},
    {"mlp.gate_proj", "ffn_gate", PLORA__GGUF_ROWS_KEPT},   {"mlp.up_proj", "ffn_up", PLORA__GGUF_ROWS_KEPT},
    {"mlp.down_proj", "ffn_down", PLORA__GGUF_ROWS_KEPT},
};

plora_status plora__gguf_name(const char *layer, char name[PLORA__GGUF_NAME_BYTES], int32_t *rows)
{
    static const char prefix[] = "model.layers.";
    *rows = PLORA__GGUF_ROWS_KEPT;
    if (strcmp(layer, "lm_head") == 0) {
        snprintf(name, PLORA__GGUF_NAME_BYTES, "output.weight");
        return PLORA_OK;
    }
    const char *number = layer + strlen(prefix);
    const size_t digits = strncmp(layer, prefix, strlen(prefix)) == 0 ? strspn(number, "0123456789") : 0;
    for (size_t i = 0; digits > 0 && digits < 10 && i < sizeof names / sizeof names[0]; ++i) {
        if (number[digits] != '.' || strcmp(number + digits + 1, names[i].layer) != 0) continue;
        snprintf(name, PLORA__GGUF_NAME_BYTES, "blk.%.*s.%s.weight", (int)digits, number, names[i].name);
        *rows = names[i].rows;
        return PLORA_OK;
    }
    return plora__fail(PLORA_ERROR_UNSUPPORTED, "layer '%.200s' has no name in a GGUF file of the LLaMA family", layer);
}
