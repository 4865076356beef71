/* stages.c: a model trained in stages, as far as others can tell, and its ledger's exports.
 *
 *     stages MODEL OUTPUT HEADS KV_HEADS
 *
 * The adapters get random values in place of training, are unloaded with momenta of 1 and below, and at the end one is live.
 * OUTPUT then holds
 *
 *     exact/  exact.gguf          the export of all stages and the live adapter
 *     truncated/  truncated.gguf  the same of rank 12
 *     merged/model.safetensors    the weights, the live adapter unloaded as well
 *
 * Prints one JSON object: the relative error of the truncation, in all and of each layer. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "plora.h"

#define TRY(call)                                                                                                      \
    do {                                                                                                               \
        if ((call) != PLORA_OK) die(plora_last_error());                                                               \
    } while (0)

static void die(const char *what)
{
    fprintf(stderr, "stages: %s\n", what);
    exit(1);
}

static const char *join(const char *directory, const char *name)
{
    static char paths[4][1024];
    static int next;
    char *path = paths[next++ % 4];
    if (snprintf(path, sizeof paths[0], "%s/%s", directory, name) >= (int)sizeof paths[0]) die("the path is too long");
    return path;
}

/* B as large as makes each update about 1 % of the weights. */
static void train(plora_model *model, plora_adapters *adapters)
{
    static uint64_t state = 1;
    for (int32_t layer = 0; layer < plora_model_layer_count(model); ++layer) {
        plora_adapter adapter = PLORA_ADAPTER_INIT;
        if (plora_adapters_layer(adapters, layer, &adapter) != PLORA_OK) continue;
        float *b = adapter.b.data;
        for (int64_t i = 0; i < adapter.b.rows * adapter.b.columns; ++i) {
            state = state * 6364136223846793005u + 1442695040888963407u;
            b[i] = 0.02f * ((float)(state >> 40) / 8388608.0f - 1.0f);
        }
    }
}

static void export_as(plora_ledger *ledger, const char *path, int32_t format, int64_t rank, char **heads,
                      plora_export_report *report)
{
    plora_export_options options = PLORA_EXPORT_OPTIONS_INIT;
    options.format = format;
    options.rank = rank;
    options.heads = atoi(heads[0]);
    options.kv_heads = atoi(heads[1]);
    TRY(plora_ledger_export(ledger, path, &options, report));
}

static void print_report(const plora_model *model, const plora_export_report *report)
{
    printf("{\"error\": %.9g, \"layers\": {", report->error);
    for (int32_t i = 0; i < report->weights; ++i) {
        plora_linear linear = PLORA_LINEAR_INIT;
        TRY(plora_model_layer(model, report->layers[i].layer, &linear));
        printf("%s\"%s\": %.9g", i > 0 ? ", " : "", linear.name, report->layers[i].error);
    }
    printf("}}\n");
}

int main(int count, char **arguments)
{
    static const double momenta[] = {1.0, 0.5, 1.0, 0.3};
    static plora_export_layer layers[1000];
    if (count != 5) die("stages MODEL OUTPUT HEADS KV_HEADS");
    const char *output = arguments[2];
    const plora_adapters_override override = {"down_proj", 9.0, 6, 0};
    plora_adapters_options options = PLORA_ADAPTERS_OPTIONS_INIT;
    plora_context *context;
    plora_model *model;
    plora_adapters *adapters;
    plora_ledger *ledger;
    options.rank = 4;
    options.alpha = 8.0;
    options.overrides = &override;
    options.override_count = 1;
    TRY(plora_context_create(NULL, &context));
    TRY(plora_model_open(context, arguments[1], &model));
    TRY(plora_adapters_create(model, &options, &adapters));
    TRY(plora_ledger_open(adapters, NULL, &ledger));
    for (size_t stage = 0; stage < sizeof momenta / sizeof momenta[0]; ++stage) {
        plora_unload_options unload = PLORA_UNLOAD_OPTIONS_INIT;
        unload.momentum = momenta[stage];
        train(model, adapters);
        TRY(plora_unload(adapters, NULL, &unload, NULL, NULL));
    }
    train(model, adapters);

    plora_export_report report = PLORA_EXPORT_REPORT_INIT;
    report.layers = layers;
    report.layer_capacity = sizeof layers / sizeof layers[0];
    export_as(ledger, join(output, "exact"), PLORA_EXPORT_PEFT, 0, arguments + 3, NULL);
    export_as(ledger, join(output, "exact.gguf"), PLORA_EXPORT_GGUF, 0, arguments + 3, NULL);
    export_as(ledger, join(output, "truncated"), PLORA_EXPORT_PEFT, 12, arguments + 3, &report);
    export_as(ledger, join(output, "truncated.gguf"), PLORA_EXPORT_GGUF, 12, arguments + 3, NULL);
    print_report(model, &report);
    TRY(plora_unload(adapters, NULL, NULL, NULL, NULL));
    mkdir(join(output, "merged"), 0777);
    TRY(plora_model_save(model, join(output, "merged/model.safetensors")));
    plora_ledger_destroy(ledger);
    plora_adapters_destroy(adapters);
    plora_model_destroy(model);
    plora_context_destroy(context);
    return 0;
}
