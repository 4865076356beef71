/* fuzz_peft_config.c: libFuzzer target. Any bytes are an adapter_config.json: an error, or a rank and a scale for any layer.
 *
 *     make build/libplora.a
 *     clang -std=c11 -D_GNU_SOURCE -g -O1 -fsanitize=fuzzer,address,undefined -Iinclude -Ilib tests/fuzz/fuzz_peft_config.c \
 *         lib/json.c lib/peft_config.c lib/status.c build/libplora.a -ldnnl -lm -lgomp -o build/fuzz_peft_config
 *     build/fuzz_peft_config -max_total_time=60 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "peft_config.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const char *const layers[] = {"q", "model.layers.0.self_attn.q_proj", "lm_head", ".", "a..b"};
    static plora_context *context;
    if (context == NULL && plora_context_create(NULL, &context) != PLORA_OK) abort();
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
    }
    free(text);
    return 0;
}
