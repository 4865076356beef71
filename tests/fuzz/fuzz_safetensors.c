/* fuzz_safetensors.c: libFuzzer target. Any bytes are a safetensors file: an error, or tensors whose every byte can be read. */

#include "fuzz.h"
#include "safetensors.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    plora_context *context = fuzz_context();
    static volatile unsigned sink;
    unsigned char *bytes = malloc(size > 0 ? size : 1); /* exactly as long as the file */
    if (bytes == NULL) return 0;
    memcpy(bytes, data, size);
    struct plora__safetensors file;
    const plora_status status = plora__safetensors_parse(context, bytes, size, &file);
    if (status != PLORA_OK && status != PLORA_ERROR_FORMAT) abort();
    if (status == PLORA_OK) {
        for (int32_t i = 0; i < file.tensor_count; ++i) {
            const struct plora__tensor *tensor = &file.tensors[i];
            if (plora__safetensors_find(&file, tensor->name) != tensor) abort();
            for (size_t b = 0; b < tensor->bytes; ++b)
                sink += ((unsigned char *)tensor->data)[b];
            for (int32_t d = 0; d < tensor->dimensions; ++d)
                if (tensor->shape[d] < 0) abort();
        }
        plora__safetensors_close(&file);
        ++fuzz_accepted;
    }
    free(bytes);
    return 0;
}
