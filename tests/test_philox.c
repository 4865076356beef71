/* test_philox.c: the random numbers: known answers of Philox4x32-10 (the kat_vectors of Random123, Salmon et al., SC 2011), how
 * draws are keyed, and the distributions that are made of them: dropout masks, Kaiming-uniform and Gaussian adapters. Bounds are 6
 * standard deviations of the statistic, or a Kolmogorov distance that chance exceeds once in 10^13 runs. */
#include "check.h"
#include "normal.h"
#include "philox.h"
#include "reference.h"

static void known_answers(void **state)
{
    (void)state;
    static const struct {
        struct plora__words counter;
        uint32_t key[2];
        struct plora__words want;
    } vectors[] = {
        {{{0, 0, 0, 0}}, {0, 0}, {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}}},
        {{{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}},
         {0xffffffff, 0xffffffff},
         {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}}},
        {{{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}},
         {0xa4093822, 0x299f31d0},
         {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}},
    };
    for (int i = 0; i < CHECK_COUNT(vectors); ++i) {
        const struct plora__words got = plora__philox(vectors[i].counter, vectors[i].key[0], vectors[i].key[1]);
        for (int w = 0; w < 4; ++w)
            CHECK(got.word[w] == vectors[i].want.word[w], "vector %d, word %d: %08x, want %08x", i, w, got.word[w],
                  vectors[i].want.word[w]);
    }
}

static int same_words(struct plora__words a, struct plora__words b)
{
    return memcmp(&a, &b, sizeof a) == 0;
}

static void every_part_of_the_key_counts(void **state)
{
    (void)state;
    check_reseed(1);
    for (int i = 0; i < 100; ++i) {
        const uint64_t seed = check_next(), step = check_next() >> 33, block = check_next();
        const int32_t layer = (int32_t)check_integer(0, 0xfffffe);
        const struct plora__words words = plora__draw(seed, PLORA__PURPOSE_INIT, step, layer, block);
        assert_true(same_words(words, plora__draw(seed, PLORA__PURPOSE_INIT, step, layer, block)));
        assert_false(same_words(words, plora__draw(seed ^ 1, PLORA__PURPOSE_INIT, step, layer, block)));
        assert_false(same_words(words, plora__draw(seed ^ 1ull << 63, PLORA__PURPOSE_INIT, step, layer, block)));
        assert_false(same_words(words, plora__draw(seed, PLORA__PURPOSE_DROPOUT, step, layer, block)));
        assert_false(same_words(words, plora__draw(seed, PLORA__PURPOSE_ROUNDING, step, layer, block)));
        assert_false(same_words(words, plora__draw(seed, PLORA__PURPOSE_INIT, step + 1, layer, block)));
        assert_false(same_words(words, plora__draw(seed, PLORA__PURPOSE_INIT, step, layer + 1, block)));
        assert_false(same_words(words, plora__draw(seed, PLORA__PURPOSE_INIT, step, layer, block + 1)));
        assert_false(same_words(words, plora__draw(seed, PLORA__PURPOSE_INIT, step, layer, block ^ 1ull << 32)));
    }
}

static void symmetric_range(void **state)
{
    (void)state;
    check_reseed(2);
    assert_true(plora__symmetric(0) == -1.0f);
    assert_true(plora__symmetric(0xffffffff) == 1.0f - 0x1p-23f);
    assert_true(plora__symmetric(0x80000000) == 0.0f);
    for (int i = 0; i < 100000; ++i) {
        const uint32_t word = (uint32_t)check_next();
        const double value = plora__symmetric(word);
        CHECK(value == (double)(word >> 8) * 0x1p-23 - 1.0, "word %08x: %.9g", word, value);
    }
}

static void dropout_rate(void **state)
{
    (void)state;
    check_reseed(3);
    assert_int_equal(plora__dropout_threshold(0.0), 0);
    assert_int_equal(plora__dropout_threshold(0.5), 0x80000000u);
    static const double probabilities[] = {0.0, 0.001, 0.1, 0.3, 0.5, 0.9, 0.999};
    enum { TOKENS = 400, FEATURES = 257 };
    static double mask[TOKENS * FEATURES];
    for (int i = 0; i < CHECK_COUNT(probabilities); ++i) {
        const double p = probabilities[i], n = TOKENS * FEATURES;
        reference_dropout(p, check_next(), check_next(), 3, check_next() >> 40, TOKENS, FEATURES, mask);
        double dropped = 0;
        for (int64_t e = 0; e < TOKENS * FEATURES; ++e) {
            dropped += mask[e] == 0.0;
            CHECK(mask[e] == 0.0 || mask[e] == 1.0 / (1.0 - p), "mask[%lld] is %.9g", (long long)e, mask[e]);
        }
        CHECK_CLOSE(dropped, n * p, 6 * sqrt(n * p * (1 - p)), "dropped of %g at p = %g", n, p);
    }
}

/* A fresh A of one layer [N,K], copied out. */
static float *fresh_adapter(int32_t init, uint64_t seed, int32_t layers, int32_t layer, int64_t rank, int64_t features)
{
    plora_context *context = check_context(NULL, 0, 0);
    plora_model *model = NULL;
    CHECK_OK(plora_model_create(context, &model));
    struct check_matrix *weights = calloc((size_t)layers, sizeof *weights);
    assert_non_null(weights);
    for (int32_t i = 0; i < layers; ++i) {
        char name[32];
        snprintf(name, sizeof name, "layer.%d", i);
        weights[i] = check_matrix_new(rank, features, features, PLORA_F32);
        CHECK_OK(check_add_linear(model, name, &weights[i].m, NULL, 0, 0, NULL));
    }
    plora_adapters_options options = PLORA_ADAPTERS_OPTIONS_INIT;
    options.rank = (int32_t)rank;
    options.init = init;
    options.seed = seed;
    options.workspace_tokens = 1;
    plora_adapters *adapters = NULL;
    CHECK_OK(plora_adapters_create(model, &options, &adapters));
    plora_adapter adapter = PLORA_ADAPTER_INIT;
    CHECK_OK(plora_adapters_layer(adapters, layer, &adapter));
    const size_t a_bytes = (size_t)(rank * features) * sizeof(float);
    const size_t b_bytes = (size_t)(adapter.b.rows * adapter.b.columns) * sizeof(float);
    float *copy = malloc(a_bytes);
    assert_non_null(copy);
    assert_int_equal(adapter.a.stride, features);
    float *a = device_mirror(adapter.a.data, a_bytes), *b = device_mirror(adapter.b.data, b_bytes);
    memcpy(copy, a, a_bytes);
    for (int64_t i = 0; i < adapter.b.rows * adapter.b.columns; ++i)
        assert_true(b[i] == 0.0f);
    device_forget(a);
    device_forget(b);
    plora_adapters_destroy(adapters);
    plora_model_destroy(model);
    plora_context_destroy(context);
    for (int32_t i = 0; i < layers; ++i)
        check_matrix_free(&weights[i]);
    free(weights);
    return copy;
}

static int ascending(const void *left, const void *right)
{
    const double a = *(const double *)left, b = *(const double *)right;
    return (a > b) - (a < b);
}

static double normal_cdf(double z)
{
    return 0.5 * erfc(-z * 0.70710678118654752440);
}

static double uniform_cdf(double z)
{
    return z <= -1 ? 0 : z >= 1 ? 1 : 0.5 * (z + 1);
}

/* Sup of |F_n - F|; sorts z. */
static double kolmogorov_distance(double *z, int64_t n, double (*cdf)(double))
{
    qsort(z, (size_t)n, sizeof *z, ascending);
    double distance = 0;
    for (int64_t i = 0; i < n; ++i) {
        const double f = cdf(z[i]);
        distance = fmax(distance, fmax(f - (double)i / (double)n, (double)(i + 1) / (double)n - f));
    }
    return distance;
}

/* z: draws of mean 0, the given variance and fourth moment. Mean, variance, neighbours uncorrelated, then the whole distribution. */
static void check_distribution(double *z, int64_t n, double variance, double fourth, double (*cdf)(double),
                               const char *what)
{
    double sum = 0, squares = 0;
    for (int64_t i = 0; i < n; ++i) {
        sum += z[i];
        squares += z[i] * z[i];
    }
    const double count = (double)n;
    CHECK_CLOSE(sum / count, 0.0, 6 * sqrt(variance / count), "%s: mean of %g", what, count);
    CHECK_CLOSE(squares / count, variance, 6 * sqrt((fourth - variance * variance) / count), "%s: variance of %g", what,
                count);
    for (int64_t lag = 1; lag <= 4; ++lag) {
        double products = 0, square_products = 0;
        const double square_variance = fourth - variance * variance;
        for (int64_t i = 0; i + lag < n; ++i) {
            products += z[i] * z[i + lag];
            square_products += (z[i] * z[i] - variance) * (z[i + lag] * z[i + lag] - variance);
        }
        CHECK_CLOSE(products / count, 0.0, 6 * variance / sqrt(count), "%s: correlation at lag %lld", what,
                    (long long)lag);
        CHECK_CLOSE(square_products / count, 0.0, 8 * square_variance / sqrt(count), "%s: squares at lag %lld", what,
                    (long long)lag);
    }
    CHECK_CLOSE(kolmogorov_distance(z, n, cdf), 0.0, 4 / sqrt(count), "%s: Kolmogorov distance", what);
}

static void gaussian_adapters(void **state)
{
    (void)state;
    check_reseed(4);
    const int64_t rank = check_quick() ? 7 : 64, features = check_quick() ? 997 : 8191, n = rank * features;
    float *a = fresh_adapter(PLORA_INIT_GAUSSIAN, check_next(), 1, 0, rank, features);
    double *z = malloc((size_t)n * sizeof *z);
    assert_non_null(z);
    double beyond[6] = {0}, largest = 0;
    for (int64_t i = 0; i < n; ++i) {
        z[i] = (double)a[i] * sqrt((double)features);
        largest = fmax(largest, fabs(z[i]));
        for (int limit = 1; limit < CHECK_COUNT(beyond); ++limit)
            beyond[limit] += fabs(z[i]) > limit;
    }
    for (int limit = 1; limit < CHECK_COUNT(beyond); ++limit) {
        const double p = 2 * normal_cdf(-limit), expected = p * (double)n;
        CHECK_CLOSE(beyond[limit], expected, 6 * sqrt(expected) + 6, "draws beyond %d standard deviations", limit);
    }
    CHECK(largest < 9 && largest > 3, "the largest of %lld draws is %.3g standard deviations", (long long)n, largest);
    check_distribution(z, n, 1.0, 3.0, normal_cdf, "Gaussian");
    free(a);
    free(z);
}

static void kaiming_adapters(void **state)
{
    (void)state;
    check_reseed(5);
    const int64_t rank = check_quick() ? 7 : 64, features = check_quick() ? 997 : 4093, n = rank * features;
    const uint64_t seed = check_next();
    double *want = malloc((size_t)n * sizeof *want), *z = malloc((size_t)n * sizeof *z);
    assert_non_null(want);
    assert_non_null(z);
    for (int32_t layer = 0; layer < 3; ++layer) {
        float *a = fresh_adapter(PLORA_INIT_KAIMING_UNIFORM, seed, 3, layer, rank, features);
        reference_init_kaiming(seed, 0, layer, rank, features, want);
        const double bound = 1 / sqrt((double)features);
        for (int64_t i = 0; i < n; ++i) {
            CHECK_CLOSE((double)a[i], want[i], 2.01 * 0x1p-24 * fabs(want[i]), "A[%lld] of layer %d", (long long)i,
                        layer);
            z[i] = (double)a[i] / bound;
        }
        check_distribution(z, n, 1.0 / 3, 1.0 / 5, uniform_cdf, "Kaiming");
        free(a);
    }
    free(want);
    free(z);
}

/* Every backend draws the bits that philox.h and normal.h say, also where an adapter ends within a draw. */
static void bits_are_the_same_everywhere(void **state)
{
    (void)state;
    check_reseed(7);
    for (int32_t init = PLORA_INIT_KAIMING_UNIFORM; init <= PLORA_INIT_GAUSSIAN; ++init)
        for (int round = 0; round < 6; ++round) {
            const int64_t rank = check_integer(1, 9), features = check_integer(rank, 2000);
            const uint64_t seed = check_next();
            const int32_t layer = (int32_t)check_integer(0, 2);
            float *a = fresh_adapter(init, seed, 3, layer, rank, features);
            const float scale = (float)(1.0 / sqrt((double)features));
            for (int64_t i = 0; i < rank * features; ++i) {
                const struct plora__words words = plora__draw(seed, PLORA__PURPOSE_INIT, 0, layer, (uint64_t)i / 4);
                const uint32_t word = words.word[i % 4];
                const float unit = init == PLORA_INIT_GAUSSIAN ? plora__normal(word) : plora__symmetric(word);
                CHECK(plora__float_bits(a[i]) == plora__float_bits(unit * scale), "init %d: A[%lld] is %.9g, want %.9g",
                      init, (long long)i, a[i], unit * scale);
            }
            free(a);
        }
}

static double correlation(const float *a, const float *b, int64_t n)
{
    double ab = 0, aa = 0, bb = 0;
    for (int64_t i = 0; i < n; ++i) {
        ab += (double)a[i] * (double)b[i];
        aa += (double)a[i] * (double)a[i];
        bb += (double)b[i] * (double)b[i];
    }
    return ab / sqrt(aa * bb);
}

static void layers_and_seeds_are_independent(void **state)
{
    (void)state;
    check_reseed(6);
    const int64_t rank = 5, features = 1999, n = rank * features;
    for (int32_t init = PLORA_INIT_KAIMING_UNIFORM; init <= PLORA_INIT_GAUSSIAN; ++init) {
        const uint64_t seed = check_next();
        float *first = fresh_adapter(init, seed, 2, 0, rank, features),
              *again = fresh_adapter(init, seed, 2, 0, rank, features);
        float *second = fresh_adapter(init, seed, 2, 1, rank, features);
        float *other = fresh_adapter(init, seed + 1, 2, 0, rank, features);
        float *high = fresh_adapter(init, seed ^ 1ull << 40, 2, 0, rank, features);
        assert_memory_equal(first, again, (size_t)n * sizeof *first);
        CHECK_CLOSE(correlation(first, second, n), 0.0, 6 / sqrt((double)n), "layers 0 and 1, init %d", init);
        CHECK_CLOSE(correlation(first, other, n), 0.0, 6 / sqrt((double)n), "seeds s and s + 1, init %d", init);
        CHECK_CLOSE(correlation(first, high, n), 0.0, 6 / sqrt((double)n), "seeds that differ in bit 40, init %d",
                    init);
        free(first);
        free(again);
        free(second);
        free(other);
        free(high);
    }
}

int main(void)
{
    check_begin("test_philox");
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(known_answers),
        cmocka_unit_test(every_part_of_the_key_counts),
        cmocka_unit_test(symmetric_range),
        cmocka_unit_test(dropout_rate),
        cmocka_unit_test(gaussian_adapters),
        cmocka_unit_test(kaiming_adapters),
        cmocka_unit_test(bits_are_the_same_everywhere),
        cmocka_unit_test(layers_and_seeds_are_independent),
    };
    return cmocka_run_group_tests_name("philox", tests, NULL, NULL);
}
