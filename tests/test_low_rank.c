/* test_low_rank.c: sums of low-rank products cut to a lower rank, against dense sums in double and singular values by one-sided
 * Jacobi rotations, neither of which uses LAPACK. */
#include "check.h"
#include "low_rank.h"

/* ---------------------------------------------------------------------------------------------------- a dense reference */

static double *reference_sum(int64_t n, int64_t k, const struct plora__factors *factors, int64_t count)
{
    double *sum = calloc((size_t)(n * k), sizeof *sum);
    CHECK(sum != NULL, "the test itself is out of memory");
    for (int64_t s = 0; s < count; ++s)
        for (int64_t i = 0; i < n; ++i)
            for (int64_t r = 0; r < factors[s].rank; ++r)
                for (int64_t j = 0; j < k; ++j)
                    sum[i * k + j] += factors[s].factor * (double)factors[s].b[i * factors[s].rank + r] *
                                      (double)factors[s].a[r * k + j];
    return sum;
}

/* Singular values of a dense [n,k], in decreasing order: columns are rotated until all are orthogonal. */
static void reference_singular_values(const double *matrix, int64_t n, int64_t k, double *sigma)
{
    const int64_t least = n < k ? n : k, length = n < k ? k : n;
    double *columns = malloc((size_t)(n * k) * sizeof *columns);
    CHECK(columns != NULL, "the test itself is out of memory");
    for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < k; ++j)
            columns[n < k ? i * k + j : j * n + i] = matrix[i * k + j];
    for (int sweep = 0, rotated = 1; rotated && sweep < 60; ++sweep) {
        rotated = 0;
        for (int64_t p = 0; p < least; ++p)
            for (int64_t q = p + 1; q < least; ++q) {
                double *x = columns + p * length, *y = columns + q * length, xx = 0, yy = 0, xy = 0;
                for (int64_t i = 0; i < length; ++i) {
                    xx += x[i] * x[i];
                    yy += y[i] * y[i];
                    xy += x[i] * y[i];
                }
                if (!(fabs(xy) > 1e-15 * sqrt(xx * yy))) continue;
                rotated = 1;
                const double zeta = (yy - xx) / (2 * xy), t = copysign(1.0, zeta) / (fabs(zeta) + hypot(1.0, zeta));
                const double c = 1 / hypot(1.0, t), s = c * t;
                for (int64_t i = 0; i < length; ++i) {
                    const double old = x[i];
                    x[i] = c * old - s * y[i];
                    y[i] = s * old + c * y[i];
                }
            }
    }
    for (int64_t p = 0; p < least; ++p) {
        double sum = 0;
        for (int64_t i = 0; i < length; ++i)
            sum += columns[p * length + i] * columns[p * length + i];
        int64_t at = p;
        for (; at > 0 && sigma[at - 1] < sqrt(sum); --at)
            sigma[at] = sigma[at - 1];
        sigma[at] = sqrt(sum);
    }
    free(columns);
}

static double norm(const double *values, int64_t count)
{
    double sum = 0;
    for (int64_t i = 0; i < count; ++i)
        sum += values[i] * values[i];
    return sqrt(sum);
}

/* |sum - B A|, of the stored fp32 factors. */
static double distance(const double *sum, int64_t n, int64_t k, int64_t rank, const float *a, const float *b)
{
    double total = 0;
    for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < k; ++j) {
            double difference = sum[i * k + j];
            for (int64_t r = 0; r < rank; ++r)
                difference -= (double)b[i * rank + r] * (double)a[r * k + j];
            total += difference * difference;
        }
    return sqrt(total);
}

/* ------------------------------------------------------------------------------------------------------------- sequences */

struct stages {
    int64_t n, k, count;
    struct plora__factors *factors;
    double *sum, *sigma; /* the dense reference, once it was asked for */
};

static struct stages stages_new(int64_t n, int64_t k, int64_t count)
{
    struct stages stages = {n, k, count, calloc((size_t)count + 1, sizeof *stages.factors), NULL, NULL};
    CHECK(stages.factors != NULL, "the test itself is out of memory");
    return stages;
}

/* A number near the one it comes from; a fresh one when it comes from nowhere. */
static float moved(const float *from, int64_t i, double drift)
{
    return (float)(drift * check_uniform() + (from == NULL ? 0.0 : (double)from[i]));
}

/* Stage s gets random factors: those of stage s - 1 moved a little, or with a drift of 1 fresh ones. */
static void stages_draw(struct stages *stages, int64_t s, int64_t rank, double factor, double drift)
{
    const struct plora__factors *last = &stages->factors[s > 0 ? s - 1 : 0];
    const int fresh = drift == 1.0;
    float *a = malloc((size_t)(rank * stages->k) * sizeof *a), *b = malloc((size_t)(stages->n * rank) * sizeof *b);
    CHECK(a != NULL && b != NULL && (fresh || last->rank == rank), "no memory, or no stage before");
    for (int64_t i = 0; i < rank * stages->k; ++i)
        a[i] = moved(fresh ? NULL : last->a, i, drift);
    for (int64_t i = 0; i < stages->n * rank; ++i)
        b[i] = moved(fresh ? NULL : last->b, i, drift);
    stages->factors[s] = (struct plora__factors){a, b, rank, factor};
}

static void stages_reference(struct stages *stages)
{
    if (stages->sum != NULL) return;
    stages->sum = reference_sum(stages->n, stages->k, stages->factors, stages->count);
    stages->sigma = malloc((size_t)(stages->n < stages->k ? stages->n : stages->k) * sizeof *stages->sigma);
    reference_singular_values(stages->sum, stages->n, stages->k, stages->sigma);
}

static void stages_forget_reference(struct stages *stages)
{
    free(stages->sum);
    free(stages->sigma);
    stages->sum = stages->sigma = NULL;
}

static void stages_free(struct stages *stages)
{
    stages_forget_reference(stages);
    for (int64_t s = 0; s < stages->count; ++s) {
        free((void *)stages->factors[s].a);
        free((void *)stages->factors[s].b);
    }
    free(stages->factors);
}

/* The stages cut to `rank` and max_error, held against the dense reference. `slack`: what folding may have lost, relative to
 * the norm. Returns the rank. */
static int64_t check_cut(struct stages *stages, int64_t rank, double max_error, double slack, const char *what)
{
    const int64_t n = stages->n, k = stages->k, least = n < k ? n : k;
    stages_reference(stages);
    const double *sum = stages->sum, *sigma = stages->sigma;
    const double size = norm(sum, n * k);

    struct plora__low_rank found;
    const size_t bytes = plora__low_rank_prepare(&found, n, k, stages->factors, stages->count);
    CHECK(bytes > 0, "%s: no workspace", what);
    void *workspace = malloc(bytes + 16);
    memset(workspace, CHECK_POISON, bytes + 16);
    CHECK(plora__low_rank_compute(&found, stages->factors, stages->count, rank, max_error, workspace) == 0, "%s", what);
    for (size_t i = 0; i < 16; ++i)
        CHECK(((unsigned char *)workspace)[bytes + i] == CHECK_POISON, "%s: wrote behind the workspace", what);

    CHECK_CLOSE(found.norm, size, (1e-12 + slack) * size, "%s: norm", what);
    CHECK(found.rank <= least && (rank == 0 || found.rank <= rank), "%s: rank %lld", what, (long long)found.rank);
    const double tail = norm(sigma + found.rank, least - found.rank);
    CHECK_CLOSE(found.lost, tail, (1e-12 + 2 * slack) * size, "%s: error at rank %lld", what, (long long)found.rank);
    if (rank == 0 || found.rank < rank) {
        CHECK(found.lost <= (max_error + slack + 1e-12) * size, "%s: error %g", what, found.lost / size);
        if (found.rank > 0) /* one less would not do */
            CHECK(norm(sigma + found.rank - 1, least - found.rank + 1) >= (max_error - 2 * slack - 1e-12) * size,
                  "%s: rank %lld is more than needed", what, (long long)found.rank);
    }
    for (int64_t j = 0; j < found.rank; ++j)
        CHECK_CLOSE(found.sigma[j], sigma[j], (1e-12 + slack) * size, "%s: sigma %lld", what, (long long)j);

    float *a = malloc((size_t)(found.rank * k + 1) * sizeof *a), *b = malloc((size_t)(found.rank * n + 1) * sizeof *b);
    plora__low_rank_store(&found, a, b);
    /* Each of the rank * (n + k) stored values is rounded once, by half a unit of fp32 at most. */
    CHECK_CLOSE(distance(sum, n, k, found.rank, a, b), tail, (0x1p-23 + 2 * slack) * size, "%s: stored factors", what);
    for (int64_t j = 0; j < found.rank; ++j) {
        double a_size = 0, b_size = 0;
        for (int64_t i = 0; i < k; ++i)
            a_size += (double)a[j * k + i] * (double)a[j * k + i];
        for (int64_t i = 0; i < n; ++i)
            b_size += (double)b[i * found.rank + j] * (double)b[i * found.rank + j];
        CHECK_CLOSE(a_size, found.sigma[j], 1e-6 * found.sigma[j], "%s: balance of A", what);
        CHECK_CLOSE(b_size, found.sigma[j], 1e-6 * found.sigma[j], "%s: balance of B", what);
    }
    const int64_t result = found.rank;
    free(workspace);
    free(a);
    free(b);
    return result;
}

/* ----------------------------------------------------------------------------------------------------------------- tests */

static void shapes(void **state)
{
    static const double errors[] = {0.9, 0.5, 0.2, 0.05, 2e-3};
    static const int64_t sizes[][3] = {{1, 1, 1},  {1, 7, 3},   {7, 1, 2},   {5, 5, 1},  {13, 9, 4},
                                       {9, 13, 4}, {31, 40, 5}, {40, 31, 9}, {16, 3, 6}, {3, 16, 6}};
    (void)state;
    for (int i = 0; i < CHECK_COUNT(sizes); ++i) {
        struct stages stages = stages_new(sizes[i][0], sizes[i][1], sizes[i][2]);
        for (int64_t s = 0; s < stages.count; ++s)
            stages_draw(&stages, s, check_integer(1, 4), check_uniform(), 1.0);
        const int64_t sum = plora__low_rank_sum(stages.factors, stages.count);
        const int64_t least = stages.n < stages.k ? stages.n : stages.k;
        char what[64];
        snprintf(what, sizeof what, "[%lld,%lld] %lld stages, sum of ranks %lld", (long long)stages.n,
                 (long long)stages.k, (long long)stages.count, (long long)sum);
        CHECK(check_cut(&stages, 0, 0.0, 0.0, what) == (sum < least ? sum : least), "%s: not all of the rank", what);
        for (int64_t rank = 1; rank <= sum; ++rank)
            check_cut(&stages, rank, 0.0, 0.0, what);
        for (int e = 0; e < CHECK_COUNT(errors); ++e) {
            check_cut(&stages, 0, errors[e], 0.0, what);
            check_cut(&stages, 2, errors[e], 0.0, what);
        }
        stages_free(&stages);
    }
}

/* Repeated factors and factors that cancel: the rank is that of the sum, not of the stack. */
static void deficient(void **state)
{
    (void)state;
    struct stages stages = stages_new(24, 19, 6);
    for (int64_t s = 0; s < 6; ++s)
        stages_draw(&stages, s, 2, 0.5, s % 2 == 0 ? 1.0 : 0.0);
    CHECK(check_cut(&stages, 0, 0.0, 0.0, "each stage twice") == 6, "rank");
    stages_forget_reference(&stages);
    stages.factors[1].factor = stages.factors[3].factor = -0.5;
    CHECK(check_cut(&stages, 0, 0.0, 0.0, "stages that cancel") == 2, "rank");
    stages.factors[5].factor = -0.5;
    struct plora__low_rank found;
    const size_t bytes = plora__low_rank_prepare(&found, 24, 19, stages.factors, 6);
    void *workspace = malloc(bytes);
    CHECK(plora__low_rank_compute(&found, stages.factors, 6, 0, 0.0, workspace) == 0, "nothing is left");
    CHECK(found.norm <= 1e-13, "a sum of 0 has norm %g", found.norm);
    memset((void *)stages.factors[0].b, 0, 24 * 2 * sizeof(float));
    CHECK(plora__low_rank_compute(&found, stages.factors, 1, 0, 0.0, workspace) == 0, "B = 0");
    CHECK(found.rank == 0 && found.norm == 0.0 && found.lost == 0.0, "B = 0: rank %lld", (long long)found.rank);
    CHECK(plora__low_rank_compute(&found, stages.factors, 0, 0, 0.0, workspace) == 0, "no stages");
    CHECK(found.rank == 0 && found.norm == 0.0 && found.lost == 0.0, "no stages: rank %lld", (long long)found.rank);
    free(workspace);
    stages_free(&stages);
}

/* Hundreds of stages, folded: fresh ones, whose rank is full soon, and ones that drift like momentum unloads. */
static void folded(void **state)
{
    static const struct {
        int64_t n, k, count, rank;
        double drift;
    } cases[] = {
        {60, 45, 200, 3, 1.0},   {45, 60, 150, 8, 1.0},  {180, 150, 120, 5, 1e-3},
        {150, 180, 300, 2, 0.0}, {130, 170, 90, 7, 1.0}, {2, 300, 400, 1, 1.0},
    };
    (void)state;
    for (int i = 0; i < (check_quick() ? 2 : CHECK_COUNT(cases)); ++i) {
        struct stages stages = stages_new(cases[i].n, cases[i].k, cases[i].count);
        for (int64_t s = 0; s < stages.count; ++s)
            stages_draw(&stages, s, cases[i].rank, 0.2, s == 0 ? 1.0 : cases[i].drift);
        char what[64];
        snprintf(what, sizeof what, "[%lld,%lld] %lld stages, drift %g", (long long)stages.n, (long long)stages.k,
                 (long long)stages.count, cases[i].drift);
        const int64_t all = check_cut(&stages, 0, 0.0, 4 * 0x1p-25, what);
        if (cases[i].drift == 0.0) CHECK(all == cases[i].rank, "%s: rank %lld", what, (long long)all);
        check_cut(&stages, cases[i].rank, 0.0, 4 * 0x1p-25, what);
        check_cut(&stages, 0, 0.05, 4 * 0x1p-25, what);
        stages_free(&stages);
    }
}

/* What a stack would need must not grow with the number of stages once the layer's own size is reached. */
static void bounded_memory(void **state)
{
    (void)state;
    struct plora__factors factors[4000];
    for (int i = 0; i < CHECK_COUNT(factors); ++i)
        factors[i] = (struct plora__factors){NULL, NULL, 8, 1.0};
    struct plora__low_rank low_rank;
    const size_t some = plora__low_rank_prepare(&low_rank, 576, 1536, factors, 200);
    CHECK(plora__low_rank_prepare(&low_rank, 576, 1536, factors, 4000) == some, "grows beyond 200 stages");
    CHECK(some < 80u << 20, "%zu bytes for a [576,1536]", some);
    factors[0].rank = 40000;
    CHECK(plora__low_rank_prepare(&low_rank, 30000, 30000, factors, 1) == 0, "a core of 30000 x 30000");
    CHECK(plora__low_rank_prepare(&low_rank, (int64_t)1 << 31, 16, factors + 1, 1) == 0, "2^31 rows");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(shapes),
        cmocka_unit_test(deficient),
        cmocka_unit_test(folded),
        cmocka_unit_test(bounded_memory),
    };
    check_begin("test_low_rank");
    return cmocka_run_group_tests(tests, NULL, NULL);
}
