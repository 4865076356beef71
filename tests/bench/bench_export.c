/* bench_export.c: the export of a ledger, with the layers of SmolLM2-135M (210 weights) and synthetic stages.
 *
 *     bench_export DIRECTORY STAGES RANK          the files go into DIRECTORY and are removed again
 *
 *     exact      all stages stacked, one PEFT adapter of rank STAGES x RANK
 *     truncated  to rank 32: QR and SVD of every weight
 *     gguf       the truncated one for llama.cpp
 *
 * Prints one JSON object with seconds. The singular values of the stages fall off like 1 / stage. */
#include <unistd.h>

#include "measure.h"
#include "plora.h"

enum { BLOCKS = 30, KINDS = 7 };

static const struct {
    const char *name;
    int64_t rows, columns;
} kinds[KINDS] = {
    {"self_attn.q_proj", 576, 576}, {"self_attn.k_proj", 192, 576}, {"self_attn.v_proj", 192, 576},
    {"self_attn.o_proj", 576, 576}, {"mlp.gate_proj", 1536, 576},   {"mlp.up_proj", 1536, 576},
    {"mlp.down_proj", 576, 1536},
};

#define TRY(call)                                                                                                      \
    do {                                                                                                               \
        if ((call) != PLORA_OK) measure_die(plora_last_error());                                                       \
    } while (0)

static plora_model *make_model(plora_context *context)
{
    plora_model *model;
    TRY(plora_model_create(context, &model));
    for (int i = 0; i < BLOCKS * KINDS; ++i) {
        char name[64];
        snprintf(name, sizeof name, "model.layers.%d.%s", i / KINDS, kinds[i % KINDS].name);
        plora_linear linear = PLORA_LINEAR_INIT;
        const int64_t rows = kinds[i % KINDS].rows, columns = kinds[i % KINDS].columns;
        void *weight = measure_allocate((size_t)(rows * columns) * 2); /* lives as long as the program */
        measure_fill_bf16(weight, rows * columns, 0.05f);
        linear.name = name;
        linear.weight = (plora_matrix){weight, rows, columns, columns, PLORA_BF16, 0};
        TRY(plora_model_add_linear(model, &linear, NULL));
    }
    return model;
}

static void train(plora_adapters *adapters, int stage)
{
    static uint32_t state = 1;
    for (int32_t layer = 0; layer < BLOCKS * KINDS; ++layer) {
        plora_adapter adapter = PLORA_ADAPTER_INIT;
        TRY(plora_adapters_layer(adapters, layer, &adapter));
        float *b = adapter.b.data;
        for (int64_t i = 0; i < adapter.b.rows * adapter.b.columns; ++i) {
            state = state * 1664525u + 1013904223u;
            b[i] = 1e-2f / (float)(stage + 1) * ((float)(state >> 8) / 8388608.0f - 1.0f);
        }
    }
}

static double export_to(plora_ledger *ledger, const char *path, const plora_export_options *options,
                        plora_export_report *report)
{
    const double begin = measure_now();
    TRY(plora_ledger_export(ledger, path, options, report));
    return measure_now() - begin;
}

static void clean(const char *directory)
{
    static const char *const files[] = {"adapter/adapter_model.safetensors", "adapter/adapter_config.json",
                                        "adapter.gguf"};
    char path[1024];
    for (int i = 0; i < 3; ++i) {
        snprintf(path, sizeof path, "%s/%s", directory, files[i]);
        unlink(path);
    }
    snprintf(path, sizeof path, "%s/adapter", directory);
    rmdir(path);
}

int main(int count, char **arguments)
{
    if (count != 4) measure_die("bench_export DIRECTORY STAGES RANK");
    const int stages = atoi(arguments[2]);
    plora_context *context;
    TRY(plora_context_create(NULL, &context));
    plora_model *model = make_model(context);
    plora_adapters_options options = PLORA_ADAPTERS_OPTIONS_INIT;
    plora_adapters *adapters;
    plora_ledger *ledger;
    options.rank = atoi(arguments[3]);
    options.workspace_tokens = 1;
    TRY(plora_adapters_create(model, &options, &adapters));
    TRY(plora_ledger_open(adapters, NULL, &ledger));
    for (int stage = 0; stage < stages; ++stage) {
        train(adapters, stage);
        TRY(plora_unload(adapters, NULL, NULL, NULL, NULL));
    }

    char directory[1024], file[1024];
    snprintf(directory, sizeof directory, "%s/adapter", arguments[1]);
    snprintf(file, sizeof file, "%s/adapter.gguf", arguments[1]);
    plora_export_options request = PLORA_EXPORT_OPTIONS_INIT;
    plora_export_report exact = PLORA_EXPORT_REPORT_INIT, truncated = PLORA_EXPORT_REPORT_INIT;
    const double exact_seconds = export_to(ledger, directory, &request, &exact);
    request.rank = 32;
    const double truncated_seconds = export_to(ledger, directory, &request, &truncated);
    request.format = PLORA_EXPORT_GGUF;
    request.heads = 9;
    request.kv_heads = 3;
    const double gguf_seconds = export_to(ledger, file, &request, &truncated);
    clean(arguments[1]);
    printf("{\"stages\": %d, \"rank\": %d, \"weights\": %d, \"exact\": %.9g, \"truncated\": %.9g, \"gguf\": %.9g, "
           "\"exact_rank\": %lld, \"truncated_error\": %.9g}\n",
           stages, options.rank, exact.weights, exact_seconds, truncated_seconds, gguf_seconds, (long long)exact.rank,
           truncated.error);
    plora_ledger_destroy(ledger);
    plora_adapters_destroy(adapters);
    plora_model_destroy(model);
    plora_context_destroy(context);
    return 0;
}
