/* fuzz_safetensors.c: libFuzzer target. Any bytes are a safetensors file: an error, or tensors whose every byte can be read.
 *
 *     make build/libplora.a
 *     clang -std=c11 -D_GNU_SOURCE -g -O1 -fsanitize=fuzzer,address,undefined -Iinclude -Ilib tests/fuzz/fuzz_safetensors.c \
 *         lib/json.c lib/file.c lib/safetensors.c lib/status.c build/libplora.a -ldnnl -lm -lgomp -o build/fuzz_safetensors
 *     build/fuzz_safetensors -max_total_time=60 */
#include <stdlib.h>
#include <string.h>

#include "safetensors.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static plora_context *context;
    static volatile unsigned sink;
    if (context == NULL && plora_context_create(NULL, &context) != PLORA_OK) abort();
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
    }
    free(bytes);
    return 0;
}
