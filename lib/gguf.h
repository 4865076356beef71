/* gguf.h: LoRA adapters as llama.cpp reads them.
 *
 *     "GGUF" | u32 3 | u64 tensor count | u64 value count | values | tensor infos |pad| tensor 0 |pad| tensor 1 |pad| ...
 *       string = u64 bytes, bytes     value = string key, u32 type, string or f32
 *       info   = string name, u32 dimensions, u64 extents, fastest first, u32 type, u64 offset from tensor 0
 *
 * Little-endian; tensors begin at multiples of 32 bytes. */
#ifndef PLORA_GGUF_H
#define PLORA_GGUF_H

#include "safetensors.h"

/* One entry of the metadata: a text, or when that is NULL a number. */
struct plora__gguf_value {
    const char *key, *text;
    float number;
};

/* Writes a file atomically. The tensors are fp32 matrices. Errors: IO, OUT_OF_MEMORY; `path` is then as it was. */
plora_status plora__gguf_write(plora_context *context, const char *path, const struct plora__gguf_value *values,
                               int32_t value_count, const struct plora__tensor *tensors, int32_t tensor_count);

/* Which of its rows llama.cpp keeps in another order: rotary halves are interleaved head by head. */
enum { PLORA__GGUF_ROWS_KEPT = 0, PLORA__GGUF_ROWS_QUERY = 1, PLORA__GGUF_ROWS_KEY = 2 };

enum { PLORA__GGUF_NAME_BYTES = 64 };

/* "model.layers.0.self_attn.q_proj" -> "blk.0.attn_q.weight" for the linear layers of the LLaMA family. UNSUPPORTED, by name, for
 * any other. */
plora_status plora__gguf_name(const char *layer, char name[PLORA__GGUF_NAME_BYTES], int32_t *rows);

/* The row of Hugging Face's matrix that is row `row` of llama.cpp's: in a head of d rows, 2 j and 2 j + 1 are j and d / 2 + j. */
static inline int64_t plora__gguf_row(int64_t row, int64_t head_rows)
{
    const int64_t in_head = row % head_rows;
    return row - in_head + in_head % 2 * (head_rows / 2) + in_head / 2;
}

#endif
