/* bench_layer.c: what an adapter adds to the products of its layer.
 *
 *     bench_layer [REPEATS [N K T R]]              default 21 repeats of 1536 x 576, 1024 tokens, R = 16
 *
 *     base      y = x W^T,  dx = dy W
 *     adapter   the same with s x A^T B^T, dA and dB
 *
 * Two layers of one model, with weights of their own and the same x, y, dy and dx, measured in turn through the same
 * calls; the second has an adapter. Prints one JSON object with the seconds of every repeat. */
#include "measure.h"
#include "plora.h"

enum { MAX_REPEATS = 1000 };

#define TRY(call)                                                                                                      \
    do {                                                                                                               \
        if ((call) != PLORA_OK) measure_die(plora_last_error());                                                       \
    } while (0)

struct buffers {
    plora_matrix x, y, dy, dx, weights[2];
};

static plora_matrix make_matrix(int64_t rows, int64_t columns, int32_t dtype, float scale)
{
    const size_t size = dtype == PLORA_F32 ? 4 : 2;
    void *data = measure_allocate((size_t)(rows * columns) * size);
    if (dtype == PLORA_F32)
        measure_fill_fp32(data, rows * columns, scale);
    else
        measure_fill_bf16(data, rows * columns, scale);
    return (plora_matrix){data, rows, columns, columns, dtype, 0};
}

static double step(plora_adapters *adapters, int32_t layer, const struct buffers *on)
{
    const double begin = measure_now();
    TRY(plora_linear_forward(adapters, layer, &on->x, &on->y, 0, NULL));
    TRY(plora_linear_backward(adapters, layer, &on->x, &on->dy, &on->dx, 0, NULL));
    return measure_now() - begin;
}

static void measure(plora_context *context, int32_t dtype, const int64_t *shape, int repeats)
{
    const int64_t n = shape[0], k = shape[1], tokens = shape[2];
    struct buffers on = {make_matrix(tokens, k, dtype, 1.0f),
                         make_matrix(tokens, n, dtype, 1.0f),
                         make_matrix(tokens, n, dtype, 0.1f),
                         make_matrix(tokens, k, dtype, 1.0f),
                         {make_matrix(n, k, dtype, 0.05f), make_matrix(n, k, dtype, 0.05f)}};
    static const char *const names[] = {"base", "adapter"};
    plora_model *model;
    plora_adapters *adapters;
    int32_t layers[2];
    TRY(plora_model_create(context, &model));
    for (int i = 0; i < 2; ++i) {
        plora_linear linear = PLORA_LINEAR_INIT;
        linear.name = names[i];
        linear.weight = on.weights[i];
        TRY(plora_model_add_linear(model, &linear, &layers[i]));
    }
    plora_adapters_options options = PLORA_ADAPTERS_OPTIONS_INIT;
    options.rank = (int32_t)shape[3];
    options.alpha = (double)(2 * shape[3]);
    options.targets = "adapter";
    options.workspace_tokens = tokens;
    TRY(plora_adapters_create(model, &options, &adapters));
    plora_adapter adapter = PLORA_ADAPTER_INIT;
    TRY(plora_adapters_layer(adapters, layers[1], &adapter));
    measure_fill_fp32(adapter.b.data, n * options.rank, 0.01f);

    double seconds[2][MAX_REPEATS];
    for (int i = -2; i < repeats; ++i) /* two rounds make primitives and warm up */
        for (int which = 0; which < 2; ++which) {
            const double time = step(adapters, layers[which], &on);
            if (i >= 0) seconds[which][i] = time;
        }
    for (int which = 0; which < 2; ++which) {
        measure_print(names[which], seconds[which], repeats);
        printf("%s", which ? "}" : ",\n  ");
    }
    plora_adapters_destroy(adapters);
    plora_model_destroy(model);
    void *const memory[] = {on.x.data, on.y.data, on.dy.data, on.dx.data, on.weights[0].data, on.weights[1].data};
    for (int i = 0; i < 6; ++i)
        free(memory[i]);
}

int main(int argc, char **argv)
{
    int64_t shape[4] = {1536, 576, 1024, 16};
    const int repeats = argc > 1 ? atoi(argv[1]) : 21;
    if (repeats < 1 || repeats > MAX_REPEATS || (argc != 1 && argc != 2 && argc != 6))
        measure_die("bench_layer [REPEATS [N K T R]], with 1 to 1000 repeats");
    for (int i = 2; i < argc; ++i)
        shape[i - 2] = atoll(argv[i]);
    plora_context *context;
    TRY(plora_context_create(NULL, &context));
    printf("{\"n\": %lld, \"k\": %lld, \"tokens\": %lld, \"rank\": %lld,\n\"fp32\": {", (long long)shape[0],
           (long long)shape[1], (long long)shape[2], (long long)shape[3]);
    measure(context, PLORA_F32, shape, repeats);
    printf(",\n\"bf16\": {");
    measure(context, PLORA_BF16, shape, repeats);
    printf("}\n");
    plora_context_destroy(context);
    return 0;
}
