/* fuzz_gguf.c: any bytes are a GGUF file: an error, or tensors whose every byte can be read; and then, loaded for a model, an error or
 * adapters of finite numbers. */
#include "fuzz.h"
#include "gguf.h"

static void read_tensors(const struct plora__gguf *file, const unsigned char *bytes, size_t size)
{
    static volatile unsigned sink;
    FUZZ_CHECK(file->tensor_count > 0 && isfinite(file->alpha));
    for (int32_t i = 0; i < file->tensor_count; ++i) {
        const struct plora__tensor *tensor = &file->tensors[i];
        FUZZ_CHECK(tensor->dimensions == 2 && tensor->shape[0] > 0 && tensor->shape[1] > 0 && tensor->bytes > 0);
        FUZZ_CHECK(tensor->offset <= size && tensor->bytes <= size - tensor->offset &&
                   tensor->data == bytes + tensor->offset);
        FUZZ_CHECK(plora__tensor_dtype(tensor) >= 0 && strlen(tensor->name) > 0);
        for (size_t b = 0; b < tensor->bytes; ++b)
            sink += ((unsigned char *)tensor->data)[b];
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static unsigned char weights[FUZZ_LAYERS][FUZZ_WEIGHT_BYTES];
    static plora_model *model;
    if (model == NULL) model = fuzz_model(weights);
    unsigned char *bytes = malloc(size > 0 ? size : 1); /* exactly as long as the file */
    FUZZ_CHECK(bytes != NULL);
    if (size > 0) memcpy(bytes, data, size);
    struct plora__gguf file;
    plora_status status = plora__gguf_parse(fuzz_context(), bytes, size, &file);
    FUZZ_CHECK(status == PLORA_OK || status == PLORA_ERROR_FORMAT || status == PLORA_ERROR_UNSUPPORTED);
    if (status == PLORA_OK) {
        plora_adapters_options options = PLORA_ADAPTERS_OPTIONS_INIT;
        plora_adapters *adapters;
        read_tensors(&file, bytes, size);
        plora__gguf_free(&file);
        options.heads = FUZZ_HEADS;
        options.kv_heads = FUZZ_KV_HEADS;
        options.workspace_tokens = 1;
        fuzz_write(fuzz_path("file.gguf"), bytes, size);
        status = plora_adapters_load(model, fuzz_path("file.gguf"), &options, &adapters);
        FUZZ_CHECK(status == PLORA_OK || fuzz_refused(status));
        if (status == PLORA_OK) {
            fuzz_check_adapters(adapters);
            ++fuzz_accepted;
            plora_adapters_destroy(adapters);
        }
    }
    free(bytes);
    return 0;
}
