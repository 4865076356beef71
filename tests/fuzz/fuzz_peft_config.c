/* fuzz_peft_config.c: libFuzzer target. Any bytes are an adapter_config.json: an error, or a rank and a scale for any layer. */

#include "fuzz.h"
#include "peft_config.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const char *const layers[] = {"q", "model.layers.0.self_attn.q_proj", "lm_head", ".", "a..b"};
    plora_context *context = fuzz_context();
    char *text = malloc(size > 0 ? size : 1); /* exactly as long as the file */
    if (text == NULL) return 0;
    memcpy(text, data, size);
    struct plora__peft_config config;
    const plora_status status = plora__peft_config_read(context, text, size, &config);
    if (status != PLORA_OK && status != PLORA_ERROR_FORMAT && status != PLORA_ERROR_UNSUPPORTED) abort();
    if (status == PLORA_OK) {
        for (int i = 0; i < 5; ++i) {
            int64_t rank;
            double alpha;
            plora__peft_config_layer(&config, layers[i], &rank, &alpha);
            if (rank < 1 || rank > INT32_MAX || !isfinite(alpha)) abort();
        }
        plora__peft_config_free(&config);
        ++fuzz_accepted;
    }
    free(text);
    return 0;
}
