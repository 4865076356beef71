/* gguf.c: writing GGUF files (gguf.h). Types are numbered as in llama.cpp's gguf-py. */
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
