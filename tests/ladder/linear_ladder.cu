/* linear_ladder.cu: the thin products of the linear layer, from the first idea to the library's kernels; x, y are bf16,
 * A, B fp32.
 *
 *     shrink   u[T,R] = x[T,K] A^T
 *       naive    a thread an element of u: neighbours read A at a distance of K
 *       warps    a warp an element: lanes along K, but x is read R times
 *       tokens   a warp a token: 8 elements of x in registers meet 16 ranks; A is read for each token anew
 *       shrink_bf16_kernel (cuda/shrink.cu): tiles of 128 tokens, tensor cores, K split over blocks
 *
 *     expand   y[T,N] += u[T,R] B^T
 *       naive    a thread an element of y: neighbours read B[N,R] at a distance of R
 *       packed   the same with B as [R,N]
 *       strips   a thread 8 elements of a row: y in 16 bytes
 *       expand_bf16_kernel (cuda/expand.cu): tiles of 128 x 64, tensor cores
 *
 * K and N are multiples of 8. The library's kernels take x, u and the factors in bf16, as they do where W is bf16. See
 * ladder.h. */
#include "kernels.h"

/* One product out[rows, columns] of depth `depth`; the tiles of a block are laid over rows and columns, `across` in a
 * row. */
struct thin_params {
    const void *left;    /* x[T,K] in bf16; u[T,R] */
    const float *factor; /* A[R,K]; B[N,R], packed B[R,N] */
    void *out;           /* u; y in bf16 */
    int64_t rows, columns, depth;
    uint32_t across;
};

#ifdef __CUDACC__

#include "expand.cu"
#include "shrink.cu"

static __device__ __forceinline__ void load_eight(float (&value)[8], const void *from, int64_t index)
{
    const float4 first = load_four(from, index, PLORA_BF16, 1, 4),
                 second = load_four(from, index + 4, PLORA_BF16, 1, 4);
    *(float4 *)value = first;
    *(float4 *)(value + 4) = second;
}

static __device__ __forceinline__ float warp_sum(float value)
{
    for (int distance = 16; distance > 0; distance /= 2)
        value += __shfl_down_sync(~0u, value, distance);
    return value;
}

/* Block: 8 tokens x 32 ranks, a warp a token. */
extern "C" __global__ void __launch_bounds__(256) shrink_naive_kernel(const __grid_constant__ struct thin_params p)
{
    const int64_t t = (int64_t)(blockIdx.x / p.across) * 8 + threadIdx.x / 32,
                  r = (int64_t)(blockIdx.x % p.across) * 32 + threadIdx.x % 32;
    if (t >= p.rows || r >= p.columns) return;
    float sum = 0;
    for (int64_t k = 0; k < p.depth; ++k)
        sum = fmaf(load_number(p.left, t * p.depth + k, PLORA_BF16), p.factor[r * p.depth + k], sum);
    ((float *)p.out)[t * p.columns + r] = sum;
}

/* Block: 1 token x 8 ranks, a warp each. */
extern "C" __global__ void __launch_bounds__(256) shrink_warps_kernel(const __grid_constant__ struct thin_params p)
{
    const int64_t t = blockIdx.x / p.across, r = (int64_t)(blockIdx.x % p.across) * 8 + threadIdx.x / 32;
    if (r >= p.columns) return;
    float sum = 0;
    for (int64_t k = threadIdx.x % 32; k < p.depth; k += 32)
        sum = fmaf(load_number(p.left, t * p.depth + k, PLORA_BF16), p.factor[r * p.depth + k], sum);
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) ((float *)p.out)[t * p.columns + r] = sum;
}

/* Block: 8 tokens x 16 ranks, a warp a token. */
extern "C" __global__ void __launch_bounds__(256) shrink_tokens_kernel(const __grid_constant__ struct thin_params p)
{
    const int64_t t = (int64_t)(blockIdx.x / p.across) * 8 + threadIdx.x / 32,
                  first = (int64_t)(blockIdx.x % p.across) * 16;
    if (t >= p.rows) return;
    float sum[16] = {};
    for (int64_t k = threadIdx.x % 32 * 8; k < p.depth; k += 256) {
        float value[8];
        load_eight(value, p.left, t * p.depth + k);
#pragma unroll
        for (int r = 0; r < 16; ++r) {
            if (first + r >= p.columns) break;
            const float4 *factor = (const float4 *)(p.factor + (first + r) * p.depth + k);
            dot_four(sum[r], *(float4 *)value, factor[0]);
            dot_four(sum[r], *(float4 *)(value + 4), factor[1]);
        }
    }
#pragma unroll
    for (int r = 0; r < 16; ++r) {
        sum[r] = warp_sum(sum[r]);
        if (threadIdx.x % 32 == 0 && first + r < p.columns) ((float *)p.out)[t * p.columns + first + r] = sum[r];
    }
}

/* Block: 8 tokens x 32 columns, a warp a token. */
extern "C" __global__ void __launch_bounds__(256) expand_naive_kernel(const __grid_constant__ struct thin_params p)
{
    const int64_t t = (int64_t)(blockIdx.x / p.across) * 8 + threadIdx.x / 32,
                  n = (int64_t)(blockIdx.x % p.across) * 32 + threadIdx.x % 32;
    if (t >= p.rows || n >= p.columns) return;
    float sum = load_number(p.out, t * p.columns + n, PLORA_BF16);
    for (int64_t r = 0; r < p.depth; ++r)
        sum = fmaf(((const float *)p.left)[t * p.depth + r], p.factor[n * p.depth + r], sum);
    store_number(p.out, t * p.columns + n, PLORA_BF16, sum);
}

/* Block: 8 tokens x 32 columns, a warp a token. */
extern "C" __global__ void __launch_bounds__(256) expand_packed_kernel(const __grid_constant__ struct thin_params p)
{
    const int64_t t = (int64_t)(blockIdx.x / p.across) * 8 + threadIdx.x / 32,
                  n = (int64_t)(blockIdx.x % p.across) * 32 + threadIdx.x % 32;
    if (t >= p.rows || n >= p.columns) return;
    float sum = load_number(p.out, t * p.columns + n, PLORA_BF16);
    for (int64_t r = 0; r < p.depth; ++r)
        sum = fmaf(((const float *)p.left)[t * p.depth + r], p.factor[r * p.columns + n], sum);
    store_number(p.out, t * p.columns + n, PLORA_BF16, sum);
}

/* Block: 8 tokens x 256 columns, a warp a token. */
extern "C" __global__ void __launch_bounds__(256) expand_strips_kernel(const __grid_constant__ struct thin_params p)
{
    const int64_t t = (int64_t)(blockIdx.x / p.across) * 8 + threadIdx.x / 32,
                  n = (int64_t)(blockIdx.x % p.across) * 256 + threadIdx.x % 32 * 8;
    if (t >= p.rows || n >= p.columns) return;
    uint4 *place = (uint4 *)((uint16_t *)p.out + t * p.columns + n);
    const uint4 strip = *place;
    const uint32_t pairs[4] = {strip.x, strip.y, strip.z, strip.w};
    float sum[8];
#pragma unroll
    for (int e = 0; e < 8; ++e)
        sum[e] = e % 2 == 0 ? bf16_to_float(pairs[e / 2]) : __uint_as_float(pairs[e / 2] & 0xffff0000u);
    for (int64_t r = 0; r < p.depth; ++r) {
        const float low = ((const float *)p.left)[t * p.depth + r];
        const float4 *factor = (const float4 *)(p.factor + r * p.columns + n);
        multiply_four(*(float4 *)sum, low, factor[0]);
        multiply_four(*(float4 *)(sum + 4), low, factor[1]);
    }
    *place = make_uint4(pack_bf16(sum[0], sum[1]), pack_bf16(sum[2], sum[3]), pack_bf16(sum[4], sum[5]),
                        pack_bf16(sum[6], sum[7]));
}

#else

#include "ladder.h"

enum { SHRINK, EXPAND };

/* What the library's kernels add to a step. */
enum { OWN, PACKED, LIBRARY };

struct thin_step {
    struct ladder_step step;
    int kind;
};

static const struct thin_step shrinks[] = {
    {{"shrink_naive_kernel", "a thread an element of u", 256, 8, 32}, OWN},
    {{"shrink_warps_kernel", "lanes along K", 256, 1, 8}, OWN},
    {{"shrink_tokens_kernel", "x read once for 16 ranks", 256, 8, 16}, OWN},
    {{"shrink_bf16_kernel", "tiles, tensor cores, K split", LINEAR_TILE_THREADS, LINEAR_BLOCK, LINEAR_TILE}, LIBRARY},
};
static const struct thin_step expands[] = {
    {{"expand_naive_kernel", "a thread an element of y", 256, 8, 32}, OWN},
    {{"expand_packed_kernel", "B as [R,N]", 256, 8, 32}, PACKED},
    {{"expand_strips_kernel", "16 bytes of y a thread", 256, 8, 256}, PACKED},
    {{"expand_bf16_kernel", "tiles, tensor cores", LINEAR_TILE_THREADS, LINEAR_BLOCK, LINEAR_TILE}, LIBRARY},
};

/* Of an element of x. A row of banks is 128 bytes; a warp that reads 32 places far from each other touches 32. */
static struct ladder_cost shrink_cost(int step, double rank)
{
    const double row = 128, warps = ceil(rank / 32), passes = ceil(rank / 16), tiles = ceil(rank / 64);
    struct ladder_cost cost = {.dram = 2, .fma = 2 * rank};
    switch (step) {
    case 0: /* a warp: 1 element, of which each rank takes a place of A of its own */
        cost.l1 = warps * 33 * row;
        cost.l2 = 2 * warps + 4 * rank / 8;
        break;
    case 1: /* a warp: 32 elements, of each rank a row of x and one of A */
        cost.l1 = rank * 2 * row / 32;
        cost.l2 = 2 * ceil(rank / 8) + 4 * rank;
        break;
    case 2: /* a warp: 256 elements, 4 rows of x for 16 ranks, 8 rows of A for each */
        cost.l1 = passes * 4 * row / 256 + rank * 8 * row / 256;
        cost.l2 = 2 * passes + 4 * rank / 8;
        break;
    default: /* a warp of 32 x 16: two ldmatrix of x, one of A for each 16 ranks, 4 rows each; what fills the tiles */
        cost.l1 = (2 * tiles + rank / 16) * 4 * row / 512 + 2 * tiles + 2 * rank / 128;
        cost.l2 = 2 * tiles + 2 * rank / 128;
        cost.dram = 2 * tiles;
        cost.fma = 0;
        cost.tensor = rank;
    }
    return cost;
}

/* Of an element of y. */
static struct ladder_cost expand_cost(int step, double rank)
{
    const double row = 128;
    struct ladder_cost cost = {.dram = 4, .fma = 2 * rank};
    switch (step) {
    case 0: /* a warp: 32 elements, of each rank one value of u and 32 of B, 4 R bytes apart */
        cost.l1 = rank * (1 + fmin(rank, 32)) * row / 32 + 2 * row / 32;
        cost.l2 = 4 + 4 * rank / 8;
        break;
    case 1: /* a warp: 32 elements, of each rank one value of u and a row of B */
        cost.l1 = rank * 2 * row / 32 + 2 * row / 32;
        cost.l2 = 4 + 4 * rank / 8;
        break;
    case 2: /* a warp: 256 elements, of each rank one value of u and 8 rows of B */
        cost.l1 = rank * 9 * row / 256 + 4;
        cost.l2 = 4 + 4 * rank / 8;
        break;
    default: /* a warp of 32 x 64, of each 16 ranks: 6 ldmatrix of 4 rows; what fills the tiles; y passes through one */
        cost.l1 = rank / 16 * 6 * 4 * row / 2048 + 2 * rank / 64 + 2 * rank / 128 + 8;
        cost.l2 = 4 + 2 * rank / 64 + 2 * rank / 128;
        cost.fma = 0;
        cost.tensor = rank;
    }
    return cost;
}

/* left[T, depth] factor^T of depth K (shrink) or R (expand); the factors and u also as the library packs them. */
struct problem {
    int operation, splits;
    int64_t tokens, wide, rank, padded_rank, packed_columns;
    uint16_t *x, *y, *packed,
        *low_bf16; /* [T,wide] of shrink, of expand; [padded_rank, packed_columns]; [T, padded_rank] */
    float *low, *factor, *turned, *partials; /* u; A or B; B as [R,N]; of the library's shrink */
};

static struct problem make(int operation, int64_t tokens, int64_t wide, int64_t rank)
{
    struct problem q = {.operation = operation, .tokens = tokens, .wide = wide, .rank = rank};
    q.splits = wide > 512 ? 8 : 2;
    q.padded_rank = (rank + LINEAR_RANK_PAD - 1) / LINEAR_RANK_PAD * LINEAR_RANK_PAD;
    q.packed_columns = (wide + LINEAR_TILE - 1) / LINEAR_TILE * LINEAR_TILE;
    q.x = ladder_random(tokens * wide, PLORA_BF16);
    q.y = ladder_random(tokens * wide, PLORA_BF16);
    q.low = ladder_random(tokens * rank, PLORA_F32);
    q.factor = ladder_random(wide * rank, PLORA_F32);
    q.turned = ladder_allocate((size_t)(wide * rank) * sizeof(float));
    q.packed = ladder_allocate((size_t)(q.padded_rank * q.packed_columns) * 2);
    q.low_bf16 = ladder_allocate((size_t)(tokens * q.padded_rank) * 2);
    q.partials = ladder_allocate((size_t)(q.splits * tokens * q.padded_rank) * sizeof(float));
    for (int64_t r = 0; r < q.padded_rank; ++r)
        for (int64_t d = 0; d < q.packed_columns; ++d) {
            const int inside = r < rank && d < wide;
            const int64_t at = operation == SHRINK ? r * wide + d : d * rank + r;
            q.packed[r * q.packed_columns + d] = inside ? plora__float_to_bf16(q.factor[at]) : 0;
            if (inside) q.turned[r * wide + d] = q.factor[at];
        }
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t r = 0; r < q.padded_rank; ++r)
            q.low_bf16[t * q.padded_rank + r] = r < rank ? plora__float_to_bf16(q.low[t * rank + r]) : 0;
    device_upload();
    return q;
}

static void drop(struct problem *q)
{
    void *const memory[] = {q->x, q->y, q->packed, q->low_bf16, q->low, q->factor, q->turned, q->partials};
    for (int i = 0; i < CHECK_COUNT(memory); ++i)
        ladder_free(memory[i]);
}

/* The parameters of any of the kernels. */
struct any_params {
    struct thin_params thin;
    struct shrink_params shrink;
    struct expand_params expand;
};

static const void *params_of(const struct thin_step *step, const struct problem *q, struct any_params *any)
{
    if (step->kind != LIBRARY) {
        const int64_t columns = q->operation == SHRINK ? q->rank : q->wide;
        any->thin = (struct thin_params){.left = device_of(q->operation == SHRINK ? (void *)q->x : (void *)q->low),
                                         .factor = device_of(step->kind == PACKED ? q->turned : q->factor),
                                         .out = device_of(q->operation == SHRINK ? (void *)q->low : (void *)q->y),
                                         .rows = q->tokens,
                                         .columns = columns,
                                         .depth = q->operation == SHRINK ? q->wide : q->rank};
        any->thin.across = (uint32_t)((columns + step->step.columns - 1) / step->step.columns);
        return &any->thin;
    }
    if (q->operation == EXPAND) {
        any->expand = (struct expand_params){.out = device_of(q->y),
                                             .low = device_of(q->low_bf16),
                                             .factor = device_of(q->packed),
                                             .stride = q->wide,
                                             .factor_stride = q->packed_columns,
                                             .tokens = q->tokens,
                                             .columns = q->wide,
                                             .dtype = PLORA_BF16,
                                             .aligned = 1,
                                             .keep_out = 1,
                                             .padded_rank = (int32_t)q->padded_rank};
        return &any->expand;
    }
    const int64_t split = (q->packed_columns / LINEAR_TILE + q->splits - 1) / q->splits * LINEAR_TILE;
    any->shrink = (struct shrink_params){.jobs = {{.in = device_of(q->x),
                                                   .factor = device_of(q->packed),
                                                   .partials = device_of(q->partials),
                                                   .stride = q->wide,
                                                   .factor_stride = q->packed_columns,
                                                   .columns = q->wide,
                                                   .dtype = PLORA_BF16,
                                                   .aligned = 1,
                                                   .split_columns = (int32_t)split}},
                                         .first_blocks = UINT32_MAX,
                                         .padded_rank = (int32_t)q->padded_rank,
                                         .tokens = q->tokens};
    return &any->shrink;
}

/* The library's shrink has its splits behind each other, as more tokens. */
static void grid_of(const struct thin_step *step, const struct problem *q, int64_t *rows, int64_t *columns)
{
    *rows = q->tokens;
    *columns = q->operation == SHRINK ? q->rank : q->wide;
    if (step->kind == LIBRARY && q->operation == SHRINK)
        *rows = (q->tokens + LINEAR_BLOCK - 1) / LINEAR_BLOCK * LINEAR_BLOCK * q->splits;
}

static double result_at(const struct thin_step *step, const struct problem *q, int64_t t, int64_t j)
{
    if (q->operation == EXPAND) return plora__bf16_to_float(q->y[t * q->wide + j]);
    if (step->kind != LIBRARY) return q->low[t * q->rank + j];
    double sum = 0;
    for (int split = 0; split < q->splits; ++split)
        sum += q->partials[(split * q->tokens + t) * q->padded_rank + j];
    return sum;
}

static void check_step(const struct thin_step *step, int operation, int64_t tokens, int64_t wide, int64_t rank)
{
    struct problem q = make(operation, tokens, wide, rank);
    const int64_t columns = operation == SHRINK ? rank : wide, depth = operation == SHRINK ? wide : rank;
    double *want = malloc((size_t)(tokens * columns) * sizeof *want),
           *bound = malloc((size_t)(tokens * columns) * sizeof *want);
    CHECK(want != NULL && bound != NULL, "the test itself is out of memory");
    const double narrow = step->kind == LIBRARY ? check_roundoff(PLORA_BF16) * (operation == SHRINK ? 1 : 2.1) : 0;
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t j = 0; j < columns; ++j) {
            double sum = operation == SHRINK ? 0 : plora__bf16_to_float(q.y[t * wide + j]), magnitude = fabs(sum);
            double rounded = 0;
            for (int64_t k = 0; k < depth; ++k) {
                const double left = operation == SHRINK ? plora__bf16_to_float(q.x[t * wide + k]) : q.low[t * rank + k];
                sum += left * q.factor[j * depth + k];
                magnitude += fabs(left * q.factor[j * depth + k]);
                rounded += narrow * fabs(left * q.factor[j * depth + k]);
            }
            const double error = (double)(depth + 8) * 0x1p-24 * magnitude + rounded;
            want[t * columns + j] = sum;
            bound[t * columns + j] =
                error + (operation == SHRINK ? 0 : check_roundoff(PLORA_BF16) * (fabs(sum) + error));
        }
    struct any_params any;
    int64_t grid_rows, grid_columns;
    grid_of(step, &q, &grid_rows, &grid_columns);
    ladder_launch(&step->step, grid_rows, grid_columns, params_of(step, &q, &any));
    device_download(PLORA_OK);
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t j = 0; j < columns; ++j)
            CHECK_CLOSE(result_at(step, &q, t, j), want[t * columns + j], bound[t * columns + j],
                        "%s: T %lld, %lld wide, R %lld, [%lld,%lld]", step->step.kernel, (long long)tokens,
                        (long long)wide, (long long)rank, (long long)t, (long long)j);
    free(want);
    free(bound);
    drop(&q);
}

static int runs(const struct thin_step *step)
{
    return step->kind != LIBRARY || ladder_has_tensor_cores();
}

static void test_steps(void **state)
{
    (void)state;
    check_reseed(1);
    static const int64_t shapes[][3] = {{1, 8, 1}, {9, 264, 5}, {67, 136, 16}, {70, 200, 40}};
    for (int i = 0; i < CHECK_COUNT(shapes); ++i) {
        for (int step = 0; step < CHECK_COUNT(shrinks); ++step)
            if (runs(&shrinks[step])) check_step(&shrinks[step], SHRINK, shapes[i][0], shapes[i][1], shapes[i][2]);
        for (int step = 0; step < CHECK_COUNT(expands); ++step)
            if (runs(&expands[step])) check_step(&expands[step], EXPAND, shapes[i][0], shapes[i][1], shapes[i][2]);
    }
}

static void print_one(int operation, int64_t tokens, int64_t wide, int64_t rank, int timed)
{
    const struct thin_step *steps = operation == SHRINK ? shrinks : expands;
    char title[100];
    snprintf(title, sizeof title, "%s, bf16 [%lld,%lld], R = %lld", operation == SHRINK ? "shrink" : "expand",
             (long long)tokens, (long long)wide, (long long)rank);
    ladder_print_head(title);
    struct problem q;
    if (timed) q = make(operation, tokens, wide, rank);
    for (int step = 0; step < CHECK_COUNT(shrinks); ++step) {
        const struct ladder_cost cost =
            operation == SHRINK ? shrink_cost(step, (double)rank) : expand_cost(step, (double)rank);
        double seconds = 0;
        if (timed && runs(&steps[step])) {
            struct any_params any;
            int64_t grid_rows, grid_columns;
            grid_of(&steps[step], &q, &grid_rows, &grid_columns);
            seconds = ladder_seconds(&steps[step].step, grid_rows, grid_columns, params_of(&steps[step], &q, &any));
        }
        ladder_print(&steps[step].step, &cost, (double)(tokens * wide), seconds);
    }
    if (timed) drop(&q);
}

static void print(int timed)
{
    static const int64_t ranks[] = {8, 16, 64};
    for (int operation = SHRINK; operation <= EXPAND; ++operation)
        for (int i = 0; i < CHECK_COUNT(ranks); ++i)
            print_one(operation, 8192, 4096, ranks[i], timed);
}

int main(int argc, char **argv)
{
    return ladder_main(argc, argv, "linear_ladder", test_steps, print);
}

#endif
