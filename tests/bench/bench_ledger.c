/* bench_ledger.c: what a ledger adds to an unload of all layers of a bf16 model.
 *
 *     bench_ledger REPEATS RANK FOLDER smollm2|wide
 *
 * smollm2: SmolLM2-135M, 30 times seven linears, 576 wide; wide: eight linears of [4096,4096].
 * plain, memory, file: seconds of plora_unload() without a ledger, with one in memory, and with one in a file of FOLDER that is not
 * synced (sync = 0: the disk is not what is measured); synced: with fdatasync. open: of plora_ledger_open(), which hashes all weights.
 * The forms take turns, and their ledgers grow as a run's would. As much memory as they grow to is touched and given back before: on a
 * virtual machine, a page that was never used costs many times what the record does. */
#include <unistd.h>

#include "measure.h"
#include "plora.h"

enum { MAX_REPEATS = 1000, WARM_UP = 2, SMOLLM2_LAYERS = 210, WIDE_LAYERS = 8, FORMS = 4 };

#define TRY(call)                                                                                                      \
    do {                                                                                                               \
        if ((call) != PLORA_OK) measure_die(plora_last_error());                                                       \
    } while (0)

static int wide;

static int layer_count(void)
{
    return wide ? WIDE_LAYERS : SMOLLM2_LAYERS;
}

/* [N,K] of a layer. */
static const int64_t *shape_of(int layer)
{
    static const int64_t smollm2[7][2] = {{576, 576},  {192, 576},  {192, 576}, {576, 576},
                                          {1536, 576}, {1536, 576}, {576, 1536}};
    static const int64_t square[2] = {4096, 4096};
    return wide ? square : smollm2[layer % 7];
}

static plora_context *context;
static void *memory;

/* A model over the same weights each: the unloads of all forms write the same memory. */
static plora_adapters *make_adapters(int32_t rank)
{
    plora_model *model;
    plora_adapters *adapters;
    TRY(plora_model_create(context, &model));
    uint16_t *next = memory;
    for (int i = 0; i < layer_count(); ++i) {
        const int64_t n = shape_of(i)[0], k = shape_of(i)[1];
        char name[32];
        plora_linear linear = PLORA_LINEAR_INIT;
        snprintf(name, sizeof name, "layer%d", i);
        linear.name = name;
        linear.weight = (plora_matrix){next, n, k, k, PLORA_BF16, 0};
        next += n * k;
        TRY(plora_model_add_linear(model, &linear, NULL));
    }
    plora_adapters_options options = PLORA_ADAPTERS_OPTIONS_INIT;
    options.rank = rank;
    options.workspace_tokens = 1;
    TRY(plora_adapters_create(model, &options, &adapters));
    plora_model_destroy(model);
    return adapters;
}

/* So that the pages of the records, in memory and in the system's cache, are ones that the machine has been given before. */
static void touch_memory(plora_adapters *adapters, int records)
{
    float *parameters;
    int64_t count;
    TRY(plora_adapters_parameters(adapters, &parameters, &count));
    free(measure_allocate((size_t)count * sizeof(float) * (size_t)records));
}

/* Trained adapters, with an update so small that the weights stay what they are over many repeats. */
static double unload(plora_adapters *adapters)
{
    float *parameters;
    int64_t count;
    TRY(plora_adapters_parameters(adapters, &parameters, &count));
    measure_fill_fp32(parameters, count, 1e-3f);
    const double begin = measure_now();
    TRY(plora_unload(adapters, NULL, NULL, NULL, NULL));
    return measure_now() - begin;
}

int main(int argc, char **argv)
{
    static const char *const names[FORMS] = {"plain", "memory", "file", "synced"};
    static double seconds[FORMS][MAX_REPEATS];
    plora_adapters *adapters[FORMS];
    plora_ledger *ledgers[FORMS] = {NULL};
    char paths[2][512];
    const int repeats = argc == 5 ? atoi(argv[1]) : 0, rank = argc == 5 ? atoi(argv[2]) : 0;
    if (repeats < 1 || repeats > MAX_REPEATS || rank < 1) measure_die("bench_ledger REPEATS RANK FOLDER smollm2|wide");
    wide = strcmp(argv[4], "wide") == 0;
    int64_t elements = 0;
    for (int i = 0; i < layer_count(); ++i)
        elements += shape_of(i)[0] * shape_of(i)[1];
    memory = measure_allocate((size_t)elements * sizeof(uint16_t));
    measure_fill_bf16(memory, elements, 0.05f);
    TRY(plora_context_create(NULL, &context));
    double open_seconds = 0;
    for (int form = 0; form < FORMS; ++form) {
        adapters[form] = make_adapters(rank);
        if (form == 0) continue;
        plora_ledger_options options = PLORA_LEDGER_OPTIONS_INIT;
        options.sync = form == 3;
        if (form >= 2) {
            snprintf(paths[form - 2], sizeof paths[0], "%s/bench_%s.ledger", argv[3], names[form]);
            unlink(paths[form - 2]);
            options.path = paths[form - 2];
        }
        const double begin = measure_now();
        TRY(plora_ledger_open(adapters[form], &options, &ledgers[form]));
        if (form == 1) open_seconds = measure_now() - begin;
    }
    touch_memory(adapters[0], (repeats + WARM_UP + 1) * (FORMS - 1));
    for (int i = -WARM_UP; i < repeats; ++i)
        for (int form = 0; form < FORMS; ++form)
            seconds[form][i < 0 ? 0 : i] = unload(adapters[form]);
    plora_ledger_record_info info = PLORA_LEDGER_RECORD_INFO_INIT;
    TRY(plora_ledger_record(ledgers[2], 0, &info));
    printf("{\"elements\": %lld, \"rank\": %d, \"record_bytes\": %llu, \"open\": %.9g,\n", (long long)elements, rank,
           (unsigned long long)info.bytes, open_seconds);
    for (int form = 0; form < FORMS; ++form) {
        measure_print(names[form], seconds[form], repeats);
        printf(form + 1 < FORMS ? ",\n" : "}\n");
    }
    for (int form = 0; form < FORMS; ++form) {
        plora_ledger_destroy(ledgers[form]);
        plora_adapters_destroy(adapters[form]);
    }
    for (int i = 0; i < 2; ++i)
        unlink(paths[i]);
    plora_context_destroy(context);
    free(memory);
    return 0;
}
