/* bench_machine.c: the limits of this machine that the library is held against.
 *
 *     bench_machine [REPEATS]
 *
 * - products: oneDNN's C[m,n] = A[m,k] B[k,n] in fp32 and bf16, as one call by all threads and as columns shared out
 *   among threads. The shapes of a small LLaMA are among them: `transposed`: B is the stored W[n,k] of a forward pass. Where oneDNN
 *   has no bf16 products (before AVX-512), bf16 stands for numbers that are widened first, and its limit is that of fp32.
 * - fp32 multiply-adds from registers; memcpy; scaling in place.
 *
 * Prints one JSON object with the seconds of every repeat. Not here: anything of the library. */
#include <dnnl.h>

#include "measure.h"

enum { MAX_REPEATS = 64, MAX_THREADS = 256 };

static dnnl_engine_t engine;
static dnnl_stream_t stream;

#define TRY(call)                                                                                                      \
    do {                                                                                                               \
        if ((call) != dnnl_success) measure_die("oneDNN: " #call);                                                     \
    } while (0)

/* ---------------------------------------------------------------------------------------- oneDNN 2.x and 3.x alike */

#if DNNL_VERSION_MAJOR >= 3
#define HANDLE(d) (d)
#else
#define HANDLE(d) (&(d))
#endif

struct product {
    dnnl_primitive_t primitive;
    dnnl_memory_desc_t a, b, c;
};

static void describe(dnnl_memory_desc_t *out, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride,
                     dnnl_data_type_t type)
{
    const dnnl_dims_t dims = {rows, columns}, strides = {row_stride, column_stride};
#if DNNL_VERSION_MAJOR >= 3
    TRY(dnnl_memory_desc_create_with_strides(out, 2, dims, type, strides));
#else
    TRY(dnnl_memory_desc_init_by_strides(out, 2, dims, type, strides));
#endif
}

static void forget(struct product *product)
{
    if (product->primitive != NULL) TRY(dnnl_primitive_destroy(product->primitive));
#if DNNL_VERSION_MAJOR >= 3
    dnnl_memory_desc_destroy(product->a);
    dnnl_memory_desc_destroy(product->b);
    dnnl_memory_desc_destroy(product->c);
#endif
}

static dnnl_status_t choose(const struct product *product, dnnl_primitive_desc_t *descriptor)
{
#if DNNL_VERSION_MAJOR >= 3
    return dnnl_matmul_primitive_desc_create(descriptor, engine, product->a, product->b, NULL, product->c, NULL);
#else
    dnnl_matmul_desc_t operation;
    TRY(dnnl_matmul_desc_init(&operation, &product->a, &product->b, NULL, &product->c));
    return dnnl_primitive_desc_create(descriptor, &operation, NULL, engine, NULL);
#endif
}

/* `ld`: the whole matrix has that many columns, of which this product makes `n`. */
static struct product make(int64_t m, int64_t n, int64_t k, int64_t ld, int transposed, dnnl_data_type_t type)
{
    struct product product;
    describe(&product.a, m, k, k, 1, type);
    describe(&product.b, k, n, transposed ? 1 : ld, transposed ? k : 1, type);
    describe(&product.c, m, n, ld, 1, type);
    dnnl_primitive_desc_t descriptor;
    TRY(choose(&product, &descriptor));
    TRY(dnnl_primitive_create(&product.primitive, descriptor));
    TRY(dnnl_primitive_desc_destroy(descriptor));
    return product;
}

/* Whether oneDNN has a product of bf16 matrices for this processor. */
static int multiplies_bf16(void)
{
    struct product probe = {NULL};
    describe(&probe.a, 16, 16, 16, 1, dnnl_bf16);
    describe(&probe.b, 16, 16, 16, 1, dnnl_bf16);
    describe(&probe.c, 16, 16, 16, 1, dnnl_bf16);
    dnnl_primitive_desc_t descriptor;
    const dnnl_status_t status = choose(&probe, &descriptor);
    if (status == dnnl_success) TRY(dnnl_primitive_desc_destroy(descriptor));
    forget(&probe);
    return status == dnnl_success;
}

/* -------------------------------------------------------------------------------------------------------- products */

struct operands {
    char *a, *b, *c;
};

struct arguments {
    dnnl_exec_arg_t list[3];
};

static struct arguments arguments_of(const struct product *product, void *a, void *b, void *c)
{
    struct arguments arguments = {{{DNNL_ARG_SRC, NULL}, {DNNL_ARG_WEIGHTS, NULL}, {DNNL_ARG_DST, NULL}}};
    TRY(dnnl_memory_create(&arguments.list[0].memory, HANDLE(product->a), engine, a));
    TRY(dnnl_memory_create(&arguments.list[1].memory, HANDLE(product->b), engine, b));
    TRY(dnnl_memory_create(&arguments.list[2].memory, HANDLE(product->c), engine, c));
    return arguments;
}

static void release(struct arguments *arguments)
{
    for (int i = 0; i < 3; ++i)
        dnnl_memory_destroy(arguments->list[i].memory);
}

struct form {
    int64_t m, n, k;
    int transposed;
};

static void time_whole(const struct form *form, dnnl_data_type_t type, const struct operands *on, int repeats,
                       double *seconds)
{
    struct product product = make(form->m, form->n, form->k, form->n, form->transposed, type);
    struct arguments arguments = arguments_of(&product, on->a, on->b, on->c);
    for (int i = -1; i < repeats; ++i) {
        const double begin = measure_now();
        TRY(dnnl_primitive_execute(product.primitive, stream, 3, arguments.list));
        if (i >= 0) seconds[i] = measure_now() - begin;
    }
    release(&arguments);
    forget(&product);
}

/* The columns in equal shares, a thread each, with products of one thread. */
static void time_shared(const struct form *form, dnnl_data_type_t type, const struct operands *on, int repeats,
                        double *seconds)
{
    const int threads = omp_get_max_threads();
    const int64_t share = form->n / threads, size = type == dnnl_f32 ? 4 : 2;
    if (threads > MAX_THREADS || form->n % threads != 0) measure_die("this number of threads cannot share the columns");
    omp_set_num_threads(1);
    struct product product = make(form->m, share, form->k, form->n, form->transposed, type);
    struct arguments arguments[MAX_THREADS];
    for (int t = 0; t < threads; ++t)
        arguments[t] = arguments_of(&product, on->a, on->b + t * share * (form->transposed ? form->k : 1) * size,
                                    on->c + t * share * size);
    for (int i = -1; i < repeats; ++i) {
        const double begin = measure_now();
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int t = 0; t < threads; ++t)
            TRY(dnnl_primitive_execute(product.primitive, stream, 3, arguments[t].list));
        if (i >= 0) seconds[i] = measure_now() - begin;
    }
    for (int t = 0; t < threads; ++t)
        release(&arguments[t]);
    forget(&product);
    omp_set_num_threads(threads);
}

static void products(int repeats)
{
    static const struct form forms[] = {
        {1024, 1024, 1024, 0}, {2048, 2048, 2048, 0}, {1024, 1536, 576, 1}, {1024, 576, 1536, 0},
        {1024, 576, 1536, 1},  {1024, 1536, 576, 0},  {1024, 576, 576, 1},  {1024, 576, 576, 0},
        {1024, 192, 576, 1},   {1024, 576, 192, 0},   {256, 49152, 576, 1}, {256, 576, 49152, 0},
    };
    const size_t largest = (size_t)49152 * 576 * sizeof(float);
    const struct operands on = {measure_allocate(largest), measure_allocate(largest), measure_allocate(largest)};
    const dnnl_data_type_t types[2] = {dnnl_f32, multiplies_bf16() ? dnnl_bf16 : dnnl_f32};
    int printed = 0;
    printf("\"bf16_products\": %d, \"products\": [", types[1] == dnnl_bf16);
    for (int bf16 = 0; bf16 < 2; ++bf16) {
        for (int i = 0; i < 2; ++i) {
            char *operand = i == 0 ? on.a : on.b;
            if (types[bf16] == dnnl_bf16)
                measure_fill_bf16((uint16_t *)operand, (int64_t)(largest / sizeof(float)), 1.0f);
            else
                measure_fill_fp32((float *)operand, (int64_t)(largest / sizeof(float)), 1.0f);
        }
        for (size_t i = 0; i < sizeof forms / sizeof *forms; ++i) {
            for (int shared = 0; shared < 2; ++shared) {
                double seconds[MAX_REPEATS];
                (shared ? time_shared : time_whole)(&forms[i], types[bf16], &on, repeats, seconds);
                printf(
                    "%s\n  {\"dtype\": \"%s\", \"m\": %d, \"n\": %d, \"k\": %d, \"transposed\": %d, \"shared\": %d, ",
                    printed++ ? "," : "", bf16 ? "bf16" : "fp32", (int)forms[i].m, (int)forms[i].n, (int)forms[i].k,
                    forms[i].transposed, shared);
                measure_print("seconds", seconds, repeats);
                printf("}");
            }
        }
    }
    printf("]");
    free(on.a);
    free(on.b);
    free(on.c);
}

/* ------------------------------------------------------------------------------------ multiply-adds from registers */

enum { CHAINS = 10, STEPS = 1000000 };

#if defined(__x86_64__)
__attribute__((target("avx512f"))) static float multiply_add_512(void)
{
    __m512 sum[CHAINS];
    const __m512 a = _mm512_set1_ps(0.999f), b = _mm512_set1_ps(1e-3f);
    for (int c = 0; c < CHAINS; ++c)
        sum[c] = _mm512_set1_ps((float)c);
    for (int i = 0; i < STEPS; ++i)
#pragma GCC unroll 10
        for (int c = 0; c < CHAINS; ++c)
            sum[c] = _mm512_fmadd_ps(sum[c], a, b);
    for (int c = 1; c < CHAINS; ++c)
        sum[0] = _mm512_add_ps(sum[0], sum[c]);
    return _mm512_cvtss_f32(sum[0]);
}

__attribute__((target("avx2,fma"))) static float multiply_add_256(void)
{
    __m256 sum[CHAINS];
    const __m256 a = _mm256_set1_ps(0.999f), b = _mm256_set1_ps(1e-3f);
    for (int c = 0; c < CHAINS; ++c)
        sum[c] = _mm256_set1_ps((float)c);
    for (int i = 0; i < STEPS; ++i)
#pragma GCC unroll 10
        for (int c = 0; c < CHAINS; ++c)
            sum[c] = _mm256_fmadd_ps(sum[c], a, b);
    for (int c = 1; c < CHAINS; ++c)
        sum[0] = _mm256_add_ps(sum[0], sum[c]);
    return _mm256_cvtss_f32(sum[0]);
}
#endif

/* FLOP per second of all threads; 0 where we have no such loop. */
static void multiply_adds(int repeats)
{
    double seconds[MAX_REPEATS];
    int lanes = 0;
    float used = 0.0f;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("fma")) lanes = __builtin_cpu_supports("avx512f") ? 16 : 8;
#endif
    for (int i = 0; i < repeats; ++i) {
        const double begin = measure_now();
#if defined(__x86_64__)
#pragma omp parallel reduction(+ : used)
        used += lanes == 16 ? multiply_add_512() : lanes == 8 ? multiply_add_256() : 0.0f;
#endif
        seconds[i] = measure_now() - begin;
    }
    if (!(used >= 0.0f)) measure_die("the multiply-adds diverged");
    printf("\"multiply_adds\": {\"flop\": %.17g, ", 2.0 * lanes * CHAINS * STEPS * omp_get_max_threads());
    measure_print("seconds", seconds, repeats);
    printf("}");
}

/* ---------------------------------------------------------------------------------------------------------- memory */

static double copy(char *to, const char *from, size_t bytes)
{
    const double begin = measure_now();
#pragma omp parallel
    {
        const size_t threads = (size_t)omp_get_num_threads(), thread = (size_t)omp_get_thread_num(),
                     pages = bytes / 4096;
        const size_t first = pages * thread / threads * 4096, end = pages * (thread + 1) / threads * 4096;
        memcpy(to + first, from + first, end - first);
    }
    return measure_now() - begin;
}

/* The sizes of the weights that are unloaded, and one that fits no cache of a small machine. */
static void memory(int repeats)
{
    static const size_t sizes[] = {(size_t)4096 * 4096 * 2, (size_t)4096 * 4096 * 4, (size_t)11008 * 4096 * 2,
                                   (size_t)11008 * 4096 * 4, (size_t)1 << 29};
    for (int scaling = 0; scaling < 2; ++scaling) {
        printf("%s\"%s\": [", scaling ? ",\n" : "", scaling ? "scale" : "copy");
        for (size_t i = 0; i < sizeof sizes / sizeof *sizes; ++i) {
            double seconds[MAX_REPEATS];
            float *from = measure_allocate(sizes[i]), *to = scaling ? NULL : measure_allocate(sizes[i]);
            measure_fill_fp32(from, (int64_t)(sizes[i] / sizeof *from), 1.0f);
            for (int r = -1; r < repeats; ++r) {
                const double time = scaling ? measure_scale(from, (int64_t)(sizes[i] / sizeof *from), 1.0001f)
                                            : copy((char *)to, (const char *)from, sizes[i]);
                if (r >= 0) seconds[r] = time;
            }
            printf("%s\n  {\"bytes\": %zu, ", i ? "," : "", sizes[i]); /* as many are read, and as many written */
            measure_print("seconds", seconds, repeats);
            printf("}");
            free(from);
            free(to);
        }
        printf("]");
    }
}

int main(int argc, char **argv)
{
    const int repeats = argc > 1 ? atoi(argv[1]) : 7;
    if (repeats < 1 || repeats > MAX_REPEATS) measure_die("REPEATS is 1 to 64");
    TRY(dnnl_engine_create(&engine, dnnl_cpu, 0));
    TRY(dnnl_stream_create(&stream, engine, dnnl_stream_default_flags));
    const dnnl_version_t *version = dnnl_version();
    printf("{\"threads\": %d, \"onednn\": \"%d.%d.%d\", \"onednn_isa\": %d,\n", omp_get_max_threads(), version->major,
           version->minor, version->patch, (int)dnnl_get_effective_cpu_isa());
    products(repeats);
    printf(",\n");
    multiply_adds(repeats);
    printf(",\n");
    memory(repeats);
    printf("}\n");
    TRY(dnnl_stream_destroy(stream));
    TRY(dnnl_engine_destroy(engine));
    return 0;
}
