/* fuzz_run.h: a run in its third stage, for the checkpoint's target, and for make_corpus.c, which saves it. */
#ifndef PLORA_TESTS_FUZZ_RUN_H
#define PLORA_TESTS_FUZZ_RUN_H

#include "fuzz.h"
#include "handles.h"

struct fuzz_run {
    unsigned char weights[FUZZ_LAYERS][FUZZ_WEIGHT_BYTES];
    plora_model *model;
    plora_adapters *adapters;
    plora_optimizer *optimizer;
    plora_ledger *ledger;
};

static FUZZ_UNUSED void fuzz_run_step(struct fuzz_run *run, int number)
{
    float *gradients;
    int64_t count;
    FUZZ_CHECK(plora_adapters_gradients(run->adapters, &gradients, &count) == PLORA_OK);
    for (int32_t layer = 0; layer < FUZZ_LAYERS; ++layer) {
        plora_adapter view = PLORA_ADAPTER_INIT;
        if (plora_adapters_layer(run->adapters, layer, &view) != PLORA_OK) continue;
        float *a = view.a_gradient.data, *b = view.b_gradient.data;
        for (int64_t i = 0; i < view.a.rows * view.a.columns; ++i)
            a[i] = (float)((i + number) % 7 - 3) / 8.0f;
        for (int64_t i = 0; i < view.b.rows * view.b.columns; ++i)
            b[i] = (float)((i + 2 * number) % 5 - 2) / 8.0f;
    }
    FUZZ_CHECK(plora_optimizer_step(run->optimizer, 1.0, NULL, NULL) == PLORA_OK);
}

/* Two layers, a 16-bit one with its residual, and two stages behind it; always the same. */
static FUZZ_UNUSED void fuzz_run_open(struct fuzz_run *run, int with_ledger)
{
    plora_adapters_options options = PLORA_ADAPTERS_OPTIONS_INIT;
    plora_optimizer_options rule = PLORA_OPTIMIZER_OPTIONS_INIT;
    memset(run, 0, sizeof *run);
    run->model = fuzz_model(run->weights);
    options.rank = 1;
    options.targets = "model.layers.0.mlp.down_proj,v_proj";
    options.workspace_tokens = 1;
    rule.learning_rate = 0.01;
    FUZZ_CHECK(plora_adapters_create(run->model, &options, &run->adapters) == PLORA_OK);
    FUZZ_CHECK(plora_optimizer_create(run->adapters, &rule, &run->optimizer) == PLORA_OK);
    if (with_ledger) {
        static unsigned char copies[FUZZ_LAYERS][FUZZ_WEIGHT_BYTES];
        plora_ledger_options ledger = PLORA_LEDGER_OPTIONS_INIT;
        ledger.original = fuzz_model(copies);
        FUZZ_CHECK(plora_ledger_open(run->adapters, &ledger, &run->ledger) == PLORA_OK);
        plora_model_destroy(ledger.original);
    }
    for (int stage = 0; stage < 2; ++stage) {
        fuzz_run_step(run, stage);
        FUZZ_CHECK(plora_unload(run->adapters, run->optimizer, NULL, NULL, NULL) == PLORA_OK);
    }
    fuzz_run_step(run, 2);
}

static FUZZ_UNUSED void fuzz_run_close(struct fuzz_run *run)
{
    plora_ledger_destroy(run->ledger);
    plora_optimizer_destroy(run->optimizer);
    plora_adapters_destroy(run->adapters);
    plora_model_destroy(run->model);
    memset(run, 0, sizeof *run);
}

#endif
