/* bench.c: the speed of a training step, without data files: random tokens, loss and logits at all positions. One JSON object on
 * stdout. With --frozen no layer has an adapter: the same products of the backbone, forward and for the input's gradient. */
#include <cjson/cJSON.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>

#include "data.h"
#include "llama.h"
#include "train.h"
#include "util.h"

enum { WARM_UP_STEPS = 2 };

struct bench {
    const struct options *options;
    plora_context *context;
    struct llama *llama;
    plora_adapters *adapters;
    plora_optimizer *optimizer;
    struct batch batch;
    double *seconds;
};

/* The library's layers want a set of adapters; for a frozen model it is one that holds a layer which is never called. */
static int create_adapters(struct bench *bench)
{
    const struct options *o = bench->options;
    static float unused[1];
    plora_adapters_options options = PLORA_ADAPTERS_OPTIONS_INIT;
    options.rank = (int32_t)o->rank;
    options.alpha = o->alpha;
    options.dropout = o->dropout;
    options.targets = o->targets;
    options.workspace_tokens = o->batch * o->bench_tokens > 2048 ? 2048 : o->batch * o->bench_tokens;
    if (o->frozen) {
        plora_linear linear = PLORA_LINEAR_INIT;
        linear.name = "bench.unused";
        linear.weight = (plora_matrix){unused, 1, 1, 1, PLORA_F32, 0};
        LIBRARY(plora_model_add_linear(llama_model(bench->llama), &linear, NULL));
        options.targets = "bench.unused";
        options.rank = 1;
    }
    LIBRARY(plora_adapters_create(llama_model(bench->llama), &options, &bench->adapters));
    return 0;
}

static int open_model(struct bench *bench, int threads)
{
    const struct options *o = bench->options;
    const int32_t dtype = o->dtype == 0 ? PLORA_F32 : PLORA_BF16;
    return llama_open(bench->context, o->model, dtype, threads, &bench->llama);
}

static int open_all(struct bench *bench)
{
    const struct options *o = bench->options;
    plora_context_options context = PLORA_CONTEXT_OPTIONS_INIT;
    plora_optimizer_options optimizer = PLORA_OPTIMIZER_OPTIONS_INIT;
    context.threads = (int32_t)o->threads;
    context.deterministic = (int32_t)o->deterministic;
    if (o->threads > 0) omp_set_num_threads((int)o->threads);
    LIBRARY(plora_context_create(&context, &bench->context));
    TRY(open_model(bench, omp_get_max_threads()));
    const struct llama_config *config = llama_configuration(bench->llama);
    if (o->bench_tokens > config->max_positions)
        return fault("--bench-tokens %lld: the model has %lld positions", (long long)o->bench_tokens,
                     (long long)config->max_positions);
    TRY(create_adapters(bench));
    optimizer.learning_rate = o->lr;
    optimizer.max_gradient_norm = o->clip;
    LIBRARY(plora_optimizer_create(bench->adapters, &optimizer, &bench->optimizer));
    TRY(batch_random(o->batch, o->bench_tokens, config->vocabulary, (uint64_t)o->seed, &bench->batch));
    TRY(memory_allocate((size_t)o->bench, sizeof *bench->seconds, "times", &bench->seconds));
    return llama_prepare(bench->llama, bench->adapters, bench->batch.tokens, 1);
}

static int one_step(struct bench *bench)
{
    const int flags = LLAMA_TRAIN | (bench->options->dropout > 0 ? LLAMA_DROPOUT : 0);
    double loss;
    LIBRARY(plora_optimizer_zero_gradients(bench->optimizer, NULL));
    TRY(llama_forward(bench->llama, &bench->batch, flags));
    TRY(llama_loss(bench->llama, &bench->batch, 1, 1.0 / (double)bench->batch.losses, &loss));
    TRY(llama_backward(bench->llama, &bench->batch, flags));
    if (!bench->options->frozen) LIBRARY(plora_optimizer_step(bench->optimizer, 1.0, NULL, NULL));
    return 0;
}

static int ascending(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static cJSON *describe_config(const struct llama_config *config)
{
    cJSON *root = cJSON_CreateObject();
    cJSON_AddNumberToObject(root, "hidden_size", (double)config->hidden);
    cJSON_AddNumberToObject(root, "num_hidden_layers", (double)config->layers);
    cJSON_AddNumberToObject(root, "num_attention_heads", (double)config->heads);
    cJSON_AddNumberToObject(root, "num_key_value_heads", (double)config->kv_heads);
    cJSON_AddNumberToObject(root, "head_dim", (double)config->head_size);
    cJSON_AddNumberToObject(root, "intermediate_size", (double)config->intermediate);
    cJSON_AddNumberToObject(root, "vocab_size", (double)config->vocabulary);
    return root;
}

static int print_result(struct bench *bench)
{
    const struct options *o = bench->options;
    const struct llama_flop flop = llama_count_flop(bench->llama, &bench->batch);
    const size_t count = (size_t)o->bench;
    cJSON *root = cJSON_CreateObject(), *seconds = cJSON_CreateDoubleArray(bench->seconds, (int)count);
    qsort(bench->seconds, count, sizeof *bench->seconds, ascending);
    const double median = (bench->seconds[(count - 1) / 2] + bench->seconds[count / 2]) / 2;
    cJSON_AddNumberToObject(root, "tokens_per_second", (double)bench->batch.tokens / median);
    cJSON_AddItemToObject(root, "step_seconds", seconds);
    cJSON *split = cJSON_AddObjectToObject(root, "flop_per_step");
    cJSON_AddNumberToObject(split, "backbone", flop.backbone);
    cJSON_AddNumberToObject(split, "head", flop.head);
    cJSON_AddNumberToObject(split, "adapters", flop.adapters);
    cJSON_AddNumberToObject(split, "attention", flop.attention);
    cJSON_AddNumberToObject(root, "peak_rss_bytes", (double)peak_rss_bytes());
    cJSON_AddStringToObject(root, "dtype", options_dtype(o));
    cJSON_AddNumberToObject(root, "rank", o->frozen ? 0 : (double)o->rank);
    cJSON_AddBoolToObject(root, "frozen", o->frozen != 0);
    cJSON_AddNumberToObject(root, "batch", (double)o->batch);
    cJSON_AddNumberToObject(root, "tokens", (double)bench->batch.tokens);
    cJSON_AddNumberToObject(root, "threads", (double)omp_get_max_threads());
    cJSON_AddItemToObject(root, "config", describe_config(llama_configuration(bench->llama)));
    char *text = cJSON_PrintUnformatted(root);
    cJSON_Delete(root);
    if (!text) return fault("out of memory: the result");
    const int bad = printf("%s\n", text) < 0 || fflush(stdout) != 0;
    free(text);
    return bad ? fault("cannot write to stdout") : 0;
}

static int run_all(struct bench *bench)
{
    TRY(open_all(bench));
    double before[PHASES] = {0}, total = 0;
    for (int64_t i = -WARM_UP_STEPS; i < bench->options->bench; i++) {
        if (i == 0) memcpy(before, llama_profile(bench->llama), sizeof before);
        const double begin = now();
        TRY(one_step(bench));
        if (i >= 0) total += bench->seconds[i] = now() - begin;
    }
    if (bench->options->profile) {
        static const char *const names[PHASES] = {"linear", "attention", "element-wise", "head and loss"};
        const double steps = (double)bench->options->bench;
        for (int i = 0; i < PHASES; i++)
            fprintf(stderr, "%-14s %8.2f ms\n", names[i], 1e3 * (llama_profile(bench->llama)[i] - before[i]) / steps);
        fprintf(stderr, "%-14s %8.2f ms\n", "step", 1e3 * total / steps);
    }
    return print_result(bench);
}

int bench_run(const struct options *options)
{
    struct bench bench = {.options = options};
    const int result = run_all(&bench);
    plora_optimizer_destroy(bench.optimizer);
    plora_adapters_destroy(bench.adapters);
    llama_close(bench.llama);
    plora_context_destroy(bench.context);
    batch_free(&bench.batch);
    free(bench.seconds);
    return result;
}
