/* gguf.h: LoRA adapters as llama.cpp writes and reads them.
 *
 *     "GGUF" | u32 3 | u64 tensor count | u64 value count | values | tensor infos |pad| tensor 0 |pad| tensor 1 |pad| ...
 *       string = u64 bytes, bytes     value = string key, u32 type, then a number, a string, or an array: u32 type, u64 count, items
 *       info   = string name, u32 dimensions, u64 extents, fastest first, u32 type, u64 offset from tensor 0
 *
 * Little-endian; tensors begin at multiples of the value general.alignment, 32 where it is absent, in the order of their infos. */
#ifndef PLORA_GGUF_H
#define PLORA_GGUF_H

#include "safetensors.h"

/* ------------------------------------------------------------------------------------------------------- writing: gguf.c */

/* One entry of the metadata: a text, or when that is NULL a number. */
struct plora__gguf_value {
    const char *key, *text;
    float number;
};

/* Writes a file atomically. The tensors are fp32 matrices. Errors: IO, OUT_OF_MEMORY; `path` is then as it was. */
plora_status plora__gguf_write(plora_context *context, const char *path, const struct plora__gguf_value *values,
                               int32_t value_count, const struct plora__tensor *tensors, int32_t tensor_count);

/* -------------------------------------------------------------------------------------------------- reading: gguf_read.c */

enum { PLORA__GGUF_TEXT_BYTES = 64 };

/* What a file says of its adapters; its tensors, whose shapes are in the order of plora_matrix, slowest first. */
struct plora__gguf {
    plora_context *context;
    struct plora__tensor *tensors; /* F32, F16 and BF16 of two dimensions; names are unique */
    int32_t tensor_count;
    float alpha; /* adapter.lora.alpha; 0 = no scale at all */
    char architecture[PLORA__GGUF_TEXT_BYTES];
    void *block;
    size_t block_bytes;
};

/* Reads a file's bytes, which must stay. Everything is checked, and refused that is not such an adapter. Errors: FORMAT, UNSUPPORTED
 * (naming the tensor or the value, and the byte offset), OUT_OF_MEMORY. On an error there is nothing to free. */
plora_status plora__gguf_parse(plora_context *context, unsigned char *bytes, size_t count, struct plora__gguf *file);
void plora__gguf_free(struct plora__gguf *file);

/* -------------------------------------------------------------------------------------------------- names: gguf_names.c */

/* Which of its rows llama.cpp keeps in another order: rotary halves are interleaved head by head. */
enum { PLORA__GGUF_ROWS_KEPT = 0, PLORA__GGUF_ROWS_QUERY = 1, PLORA__GGUF_ROWS_KEY = 2 };

enum { PLORA__GGUF_NAME_BYTES = 64 };

/* "model.layers.0.self_attn.q_proj" -> "blk.0.attn_q.weight" for the linear layers of the LLaMA family. UNSUPPORTED, by name, for
 * any other. */
plora_status plora__gguf_name(const char *layer, char name[PLORA__GGUF_NAME_BYTES], int32_t *rows);
/* The other way round, of the first `length` characters. */
plora_status plora__gguf_layer(const char *name, size_t length, char layer[PLORA__GGUF_NAME_BYTES], int32_t *rows);

/* How many heads the rows of query and key projections are. */
struct plora__gguf_heads {
    int32_t heads, kv_heads; /* 0 = not known */
    int64_t head_rows;       /* of the layers so far, which must agree; 0 = none yet */
};

/* Heads as the caller gives them; where that is 0, as the config.json of a model that was opened from a directory says. */
plora_status plora__gguf_heads_of(const plora_model *model, int32_t heads, int32_t kv_heads,
                                  struct plora__gguf_heads *found);
/* Rows of a head in a layer of so many rows; 0 where llama.cpp keeps their order. Errors: INVALID_ARGUMENT, SHAPE. */
plora_status plora__gguf_head_rows(struct plora__gguf_heads *heads, const char *layer, int32_t rows, int64_t row_count,
                                   int64_t *head_rows);

/* The row of Hugging Face's matrix that is row `row` of llama.cpp's: in a head of d rows, 2 j and 2 j + 1 are j and d / 2 + j. */
static inline int64_t plora__gguf_row(int64_t row, int64_t head_rows)
{
    const int64_t in_head = row % head_rows;
    return row - in_head + in_head % 2 * (head_rows / 2) + in_head / 2;
}

#endif
