/* fuzz_peft.c: any bytes are a PEFT directory, loaded for a model: an error, or adapters of finite numbers, which can be saved and read
 * again.
 *
 *     one byte | adapter_config.json | 0 | adapter_model.safetensors            the byte is odd: as it is
 *     one byte | adapter_config.json | 0 | its header | 0 | its data            even: with the right lengths (fuzz.h) */
#include <sys/stat.h>

#include "fuzz.h"

static void write_directory(const uint8_t *data, size_t size)
{
    static int made;
    size_t at = 1, config_bytes, header_bytes, count;
    if (!made) mkdir(fuzz_path("peft"), 0700);
    made = 1;
    const unsigned char *config = fuzz_part(data, size, &at, &config_bytes);
    fuzz_write(fuzz_path("peft/adapter_config.json"), config, config_bytes);
    if (data[0] % 2 != 0) {
        fuzz_write(fuzz_path("peft/adapter_model.safetensors"), data + at, size - at);
        return;
    }
    const unsigned char *header = fuzz_part(data, size, &at, &header_bytes);
    unsigned char *bytes = fuzz_safetensors(header, header_bytes, data + at, size - at, &count);
    fuzz_write(fuzz_path("peft/adapter_model.safetensors"), bytes, count);
    free(bytes);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static unsigned char weights[FUZZ_LAYERS][FUZZ_WEIGHT_BYTES];
    static plora_model *model;
    if (model == NULL) model = fuzz_model(weights);
    if (size == 0) return 0;
    plora_adapters_options options = PLORA_ADAPTERS_OPTIONS_INIT;
    plora_adapters *adapters;
    options.workspace_tokens = 1;
    write_directory(data, size);
    plora_status status = plora_adapters_load(model, fuzz_path("peft"), &options, &adapters);
    FUZZ_CHECK(status == PLORA_OK || fuzz_refused(status));
    if (status != PLORA_OK) return 0;
    fuzz_check_adapters(adapters);
    /* What was read can be written, and that be read. */
    plora_adapters *again;
    FUZZ_CHECK(plora_adapters_save(adapters, fuzz_path("again")) == PLORA_OK);
    FUZZ_CHECK(plora_adapters_load(model, fuzz_path("again"), &options, &again) == PLORA_OK);
    float *x, *y;
    int64_t x_count, y_count;
    FUZZ_CHECK(plora_adapters_parameters(adapters, &x, &x_count) == PLORA_OK);
    FUZZ_CHECK(plora_adapters_parameters(again, &y, &y_count) == PLORA_OK);
    FUZZ_CHECK(x_count == y_count && memcmp(x, y, (size_t)x_count * sizeof *x) == 0);
    ++fuzz_accepted;
    plora_adapters_destroy(again);
    plora_adapters_destroy(adapters);
    return 0;
}
