/* merge_ladder.cu: W[N,K] += factor * B[N,R] A[R,K], from the first idea to the library's kernel; W is bf16.
 *
 *     naive     a thread an element
 *     strips    a thread 8 elements of a row: W in 16 bytes
 *     squares   a thread 8 rows of such strips: each element of A read serves 8 of W
 *     tiles     a block 128 x 128: slices of A and B pass through shared memory, fetched once for all threads
 *     merge_bf16_kernel (cuda/merge.cu): slices come by cp.async under the product, W by a prefetch, and above R = 16
 *               the tensor cores multiply: what is left is the time of W
 *
 * All take struct merge_params with B = left, A = right as they lie in an arena, and K a multiple of 8. See ladder.h. */
#ifdef __CUDACC__

#include "merge.cu"

static __device__ __forceinline__ void update_strip(const struct merge_params &p, int64_t row, int64_t column,
                                                    const float *sum)
{
    uint4 *place = (uint4 *)((uint16_t *)p.weight + row * p.stride + column);
    const uint4 strip = *place;
    float value[8];
    unpack<PLORA_BF16>(value, strip);
    for (int e = 0; e < 8; ++e)
        value[e] = fmaf(p.factor, sum[e], value[e]);
    *place = pack<PLORA_BF16>(value);
}

/* Block: 8 rows x 32 columns, a warp a row. */
extern "C" __global__ void __launch_bounds__(256) naive_kernel(const __grid_constant__ struct merge_params p)
{
    const int64_t row = (int64_t)(blockIdx.x / p.panels) * 8 + threadIdx.x / 32,
                  column = (int64_t)(blockIdx.x % p.panels) * 32 + threadIdx.x % 32;
    if (row >= p.rows || column >= p.columns) return;
    float sum = 0;
    for (int r = 0; r < p.rank; ++r)
        sum = fmaf(p.left[row * p.rank + r], p.right[r * p.columns + column], sum);
    uint16_t *place = (uint16_t *)p.weight + row * p.stride + column;
    *place = (uint16_t)float_to_bf16(fmaf(p.factor, sum, bf16_to_float(*place)));
}

/* Eight columns of one rank of A. */
static __device__ __forceinline__ void load_strip_of_a(float (&value)[8], const struct merge_params &p, int r,
                                                       int64_t column)
{
    const float4 *right = (const float4 *)(p.right + r * p.columns + column);
    *(float4 *)value = right[0];
    *(float4 *)(value + 4) = right[1];
}

/* Block: 8 rows x 256 columns, a warp a row. */
extern "C" __global__ void __launch_bounds__(256) strips_kernel(const __grid_constant__ struct merge_params p)
{
    const int64_t row = (int64_t)(blockIdx.x / p.panels) * 8 + threadIdx.x / 32,
                  column = (int64_t)(blockIdx.x % p.panels) * 256 + threadIdx.x % 32 * 8;
    if (row >= p.rows || column >= p.columns) return;
    float sum[8] = {};
    for (int r = 0; r < p.rank; ++r) {
        float value[8];
        load_strip_of_a(value, p, r, column);
        const float left = p.left[row * p.rank + r];
#pragma unroll
        for (int e = 0; e < 8; ++e)
            sum[e] = fmaf(left, value[e], sum[e]);
    }
    update_strip(p, row, column, sum);
}

/* Block: 64 rows x 256 columns, a warp 8 rows. */
extern "C" __global__ void __launch_bounds__(256) squares_kernel(const __grid_constant__ struct merge_params p)
{
    const int64_t row = (int64_t)(blockIdx.x / p.panels) * 64 + threadIdx.x / 32 * 8,
                  column = (int64_t)(blockIdx.x % p.panels) * 256 + threadIdx.x % 32 * 8;
    if (row >= p.rows || column >= p.columns) return;
    const float *left = p.left + row * p.rank;
    const int rows = (int)min(p.rows - row, (int64_t)8);
    float sum[8][8] = {};
    for (int r = 0; r < p.rank; ++r) {
        float value[8];
        load_strip_of_a(value, p, r, column);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float factor = i < rows ? left[i * p.rank + r] : 0.0f;
#pragma unroll
            for (int e = 0; e < 8; ++e)
                sum[i][e] = fmaf(factor, value[e], sum[i][e]);
        }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i)
        if (i < rows) update_strip(p, row + i, column, sum[i]);
}

/* Block: 128 x 128, thread (x, y) of 16 x 16 has the rows 8 y .. 8 y + 7 and the columns 8 x .. 8 x + 7. Shared memory:
 * 16.25 KiB. */
extern "C" __global__ void __launch_bounds__(256, 2) tiles_kernel(const __grid_constant__ struct merge_params p)
{
    __shared__ __align__(16) float left[CHUNK][132], right[CHUNK][128];
    const int64_t row = (int64_t)(blockIdx.x / p.panels) * 128, column = (int64_t)(blockIdx.x % p.panels) * 128;
    const int x = threadIdx.x % 16 * 8, y = threadIdx.x / 16 * 8;
    float sum[8][8] = {};
    for (int first = 0; first < p.rank; first += CHUNK) {
#pragma unroll 1
        for (int i = threadIdx.x; i < CHUNK * 128; i += 256) {
            const int64_t r = first + i % CHUNK, n = row + i / CHUNK;
            left[i % CHUNK][i / CHUNK] = r < p.rank && n < p.rows ? p.left[n * p.rank + r] : 0.0f;
            const int64_t q = first + i / 128, k = column + i % 128;
            right[i / 128][i % 128] = q < p.rank && k < p.columns ? p.right[q * p.columns + k] : 0.0f;
        }
        __syncthreads();
#pragma unroll 1
        for (int r = 0; r < CHUNK; ++r) {
            float rows[8], columns[8];
#pragma unroll
            for (int i = 0; i < 8; i += 4) {
                *(float4 *)(rows + i) = *(const float4 *)(left[r] + y + i);
                *(float4 *)(columns + i) = *(const float4 *)(right[r] + x + i);
            }
#pragma unroll
            for (int i = 0; i < 8; ++i)
#pragma unroll
                for (int e = 0; e < 8; ++e)
                    sum[i][e] = fmaf(rows[i], columns[e], sum[i][e]);
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 8; ++i)
        if (row + y + i < p.rows && column + x < p.columns) update_strip(p, row + y + i, column + x, sum[i]);
}

#else

#include "kernels.h"
#include "ladder.h"
#include "reference_unload.h"

static const struct ladder_step steps[] = {
    {"naive_kernel", "a thread an element", 256, 8, 32},
    {"strips_kernel", "16 bytes of W a thread", 256, 8, 256},
    {"squares_kernel", "8 rows a thread", 256, 64, 256},
    {"tiles_kernel", "factors through shared memory", 256, 128, 128},
    {"merge_bf16_kernel", "cp.async, prefetch, tensor cores", MERGE_THREADS, 128, MERGE_TILE_COLUMNS},
};

/* A row of banks, 128 bytes, serves 32 lanes of 4 bytes; one value for all lanes of a warp takes one too. The caches of
 * the multiprocessors are taken to hold B and nothing of A, so what the blocks of a column of W read of A comes from
 * L2. */
static struct ladder_cost cost_of(int step, double rank)
{
    const double row = 128;
    struct ladder_cost cost = {.dram = 4, .fma = 2 * rank};
    switch (step) {
    case 0: /* a warp: 32 elements, of each rank a row of A and one value of B */
        cost.l1 = 2 * rank * row / 32 + 2 * row / 32;
        cost.l2 = 4 + 4 * rank / 8 + 4 * rank / 32;
        break;
    case 1: /* a warp: 256 elements, 8 rows of A and one value of B */
        cost.l1 = 9 * rank * row / 256 + 4;
        cost.l2 = 4 + 4 * rank / 8 + 4 * rank / 256;
        break;
    case 2: /* a warp: 2048 elements, 8 rows of A and 8 values of B */
        cost.l1 = 16 * rank * row / 2048 + 4;
        cost.l2 = 4 + 4 * rank / 64 + 4 * rank / 256;
        break;
    default: /* a warp of 64 x 32: 2 x 4 rows of A and 8 values of B for 2048 elements; and what fills the tile */
        cost.l1 = 16 * rank * row / 2048 + 2 * 4 * rank * 2 / 128 + 4;
        cost.l2 = 4 + 4 * rank * 2 / 128;
    }
    if (step == 4 && rank > 16) { /* of each 8 ranks: 4 ldmatrix, 4 rows each, and 4 x 4 rows of A, for 2048 elements */
        cost.l1 = 32 * rank / 8 * row / 2048 + 2 * 4 * rank * 2 / 128 + 4;
        cost.fma = 0;
        cost.tensor = 3 * 2 * rank;
    }
    return cost;
}

struct problem {
    uint16_t *weight;
    float *left, *right;
    struct merge_params params;
};

static struct problem make(int64_t rows, int64_t columns, int64_t rank)
{
    struct problem problem;
    problem.weight = ladder_random(rows * columns, PLORA_BF16);
    problem.left = ladder_random(rows * rank, PLORA_F32);
    problem.right = ladder_random(rank * columns, PLORA_F32);
    problem.params = (struct merge_params){
        .weight = device_of(problem.weight),
        .rows = rows,
        .columns = columns,
        .stride = columns,
        .left = device_of(problem.left),
        .right = device_of(problem.right),
        .left_row_stride = rank,
        .left_rank_stride = 1,
        .right_rank_stride = columns,
        .right_column_stride = 1,
        .factor = (float)(0.1 * check_uniform()),
        .rank = (int32_t)rank,
        .aligned = 1,
    };
    device_upload();
    return problem;
}

static void drop(struct problem *problem)
{
    ladder_free(problem->weight);
    ladder_free(problem->left);
    ladder_free(problem->right);
}

static const void *params_of(const struct ladder_step *step, struct problem *problem)
{
    problem->params.panels = (uint32_t)((problem->params.columns + step->columns - 1) / step->columns);
    return &problem->params;
}

static void check_step(const struct ladder_step *step, int64_t rows, int64_t columns, int64_t rank)
{
    struct problem problem = make(rows, columns, rank);
    const size_t elements = (size_t)(rows * columns);
    double *d = malloc(elements * sizeof *d), *magnitude = malloc(elements * sizeof *d);
    double *before = malloc(elements * sizeof *d);
    CHECK(d != NULL && magnitude != NULL && before != NULL, "the test itself is out of memory");
    reference_delta(problem.params.factor, rows, columns, rank, problem.left, rank, 1, problem.right, columns, 1, d,
                    magnitude);
    for (size_t i = 0; i < elements; ++i)
        before[i] = plora__bf16_to_float(problem.weight[i]);
    ladder_launch(step, rows, columns, params_of(step, &problem));
    device_download(PLORA_OK);
    for (size_t i = 0; i < elements; ++i) {
        const double want = before[i] + d[i], error = reference_delta_error(rank, magnitude[i]);
        CHECK_CLOSE(plora__bf16_to_float(problem.weight[i]), want, reference_merge_error(PLORA_BF16, want, error),
                    "%s: W[%lld,%lld] R %lld, element %zu", step->kernel, (long long)rows, (long long)columns,
                    (long long)rank, i);
    }
    free(d);
    free(magnitude);
    free(before);
    drop(&problem);
}

static void test_steps(void **state)
{
    (void)state;
    check_reseed(1);
    static const int64_t shapes[][3] = {{1, 8, 1}, {33, 64, 5}, {130, 264, 16}, {70, 136, 40}};
    for (int step = 0; step < CHECK_COUNT(steps); ++step)
        for (int i = 0; i < CHECK_COUNT(shapes); ++i)
            check_step(&steps[step], shapes[i][0], shapes[i][1], shapes[i][2]);
}

static void print(int timed)
{
    static const int64_t ranks[] = {8, 16, 64};
    const int64_t rows = 4096, columns = 4096;
    for (int i = 0; i < CHECK_COUNT(ranks); ++i) {
        char title[100];
        snprintf(title, sizeof title, "merge, bf16 W[%lld,%lld], R = %lld", (long long)rows, (long long)columns,
                 (long long)ranks[i]);
        ladder_print_head(title);
        struct problem problem;
        if (timed) problem = make(rows, columns, ranks[i]);
        for (int step = 0; step < CHECK_COUNT(steps); ++step) {
            const struct ladder_cost cost = cost_of(step, (double)ranks[i]);
            const double seconds =
                timed ? ladder_seconds(&steps[step], rows, columns, params_of(&steps[step], &problem)) : 0;
            ladder_print(&steps[step], &cost, (double)(rows * columns), seconds);
        }
        if (timed) drop(&problem);
    }
}

int main(int argc, char **argv)
{
    return ladder_main(argc, argv, "merge_ladder", test_steps, print);
}

#endif
