/* safetensors.h: the file format of Hugging Face tensors.
 *
 *     u64 N, little endian | header: JSON of N bytes | data
 *     header = {"__metadata__": {"key": "value", ...}, "name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}
 *
 * Offsets count from the start of the data; together the tensors cover it without gap or overlap. Everything is checked when a
 * file is opened, so that a struct plora__tensor never points outside the mapping. All dtypes of the format are carried; which
 * of them the library computes with is plora__tensor_dtype()'s answer. */
#ifndef PLORA_SAFETENSORS_H
#define PLORA_SAFETENSORS_H

#include "file.h"

struct plora__tensor {
    const char *name;
    const char *dtype; /* the format's name, e.g. "BF16" */
    const int64_t *shape;
    int32_t dimensions; /* 0 = a scalar */
    int32_t copied;     /* data is memory of its own */
    uint64_t offset;    /* of the data in its file, for messages */
    size_t bytes;
    void *data; /* NULL when bytes is 0 */
    /* For writing: > 0 when the data is `bytes / row_bytes` rows that start every stride_bytes. */
    size_t row_bytes, stride_bytes;
    /* For writing: when not NULL, hands the `bytes` bytes to the writer in place of `data`. */
    plora_status (*write)(const struct plora__tensor *tensor, struct plora__writer *writer);
};

struct plora__metadata {
    const char *key, *value;
};

struct plora__safetensors {
    plora_context *context;
    struct plora__mapping mapping;
    struct plora__tensor *tensors; /* in the order of the header */
    int32_t *by_name;              /* [tensor_count], sorted */
    struct plora__metadata *metadata;
    int32_t tensor_count, metadata_count;
    void *block; /* holds all of these and their strings */
    size_t block_bytes;
};

/* Errors: IO, FORMAT (naming path, tensor and byte offset in the file), OUT_OF_MEMORY. On an error nothing is left open. */
plora_status plora__safetensors_open(plora_context *context, const char *path, struct plora__safetensors *file);
/* The same without a path, over bytes of the caller's that must stay. */
plora_status plora__safetensors_parse(plora_context *context, unsigned char *bytes, size_t count,
                                      struct plora__safetensors *file);
void plora__safetensors_close(struct plora__safetensors *file);

/* NULL if absent. */
const struct plora__tensor *plora__safetensors_find(const struct plora__safetensors *file, const char *name);
const char *plora__safetensors_metadata(const struct plora__safetensors *file, const char *key);

/* PLORA_F32, BF16, F16, or -1 for a dtype that is only carried. */
int32_t plora__tensor_dtype(const struct plora__tensor *tensor);

/* Writes a file atomically. The data may be device memory. The header is padded with spaces to a multiple of 8 bytes.
 * Errors: IO, OUT_OF_MEMORY; `path` is then as it was. */
plora_status plora__safetensors_write(plora_context *context, const char *path, const struct plora__tensor *tensors,
                                      int32_t tensor_count, const struct plora__metadata *metadata,
                                      int32_t metadata_count);

#endif
