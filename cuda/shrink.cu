/* shrink.cu: from the wide side to the low rank, with dropout drawn on the way.
 *
 *     u[T,R] = s drop(x)[T,K] A^T         v[T,R] = s dy[T,N] B         as  in[T,D] factor^T
 *
 * T is too small to fill the machine with 128 (fp32: 64) tokens a block, so the sum over D is split as well:
 *
 *                <------------- D ------------->
 *        T   128 | split 0 | split 1 | split 2 |        one block each; x is read once for every 64 ranks
 *            128 | split 0 | split 1 | split 2 |
 *
 * Every block writes its partial sums; reduce_kernel (convert.cu) adds them in the order of the splits and multiplies by s. So the
 * result does not depend on the order in which blocks run. One launch may do two jobs, u and v of a backward. */
#include "cuda_common.cuh"

/* Where a block stands. */
struct shrink_place {
    int64_t token, begin, end; /* its first token, its columns */
    int rank;                  /* its first rank */
    float *partials;           /* of its split, [T, padded_rank] */
};

static __device__ __forceinline__ struct shrink_place
shrink_locate(const struct shrink_params &p, const struct shrink_job &job, uint32_t block, int tokens)
{
    const uint32_t rank_tiles = (uint32_t)(p.padded_rank + LINEAR_TILE - 1) / LINEAR_TILE;
    const uint32_t token_tiles = (uint32_t)((p.tokens + tokens - 1) / tokens);
    const uint32_t split = block / rank_tiles / token_tiles;
    struct shrink_place place;
    place.rank = (int)(block % rank_tiles) * LINEAR_TILE;
    place.token = (int64_t)(block / rank_tiles % token_tiles) * tokens;
    place.begin = (int64_t)split * job.split_columns;
    place.end = place.begin + job.split_columns < job.columns ? place.begin + job.split_columns : job.columns;
    place.partials = job.partials + split * p.tokens * p.padded_rank;
    return place;
}

/* ---------------------------------------------------------------------------------------------------------------- fp32 */

/* Grid: ceil(T / 64) * ceil(padded_rank / 64) * splits blocks of 256 threads; thread (rank % 16, token / 4) of a block sums 4 tokens x 4
 * ranks, 16 apart. Shared: 20 KB, two stages of x[64][16] and factor[64][16], rows padded by 16 bytes against bank conflicts. The next
 * stage is on its way in registers while one is multiplied. Of each element of x: 4 (bf16: 2) bytes read for every 64 ranks, and from L2
 * R / 16 of the factor. */
enum { SHRINK_STEP = 16, SHRINK_FOURS = SHRINK_STEP / 4 };

struct shrink_stage {
    float4 in[LINEAR_TILE][SHRINK_FOURS + 1];
    float4 factor[LINEAR_TILE][SHRINK_FOURS + 1];
};

struct shrink_registers {
    float4 in, factor;
};

static __device__ __forceinline__ void shrink_load(struct shrink_registers &next, const struct shrink_params &p,
                                                   const struct shrink_job &job, const struct shrink_place &place,
                                                   int64_t column)
{
    const int row = (int)threadIdx.x / SHRINK_FOURS;
    const int64_t from = column + threadIdx.x % SHRINK_FOURS * 4, token = place.token + row, rank = place.rank + row;
    const int64_t valid = token < p.tokens ? job.columns - from : 0;
    next.in = load_four(job.in, token * job.stride + from, job.dtype, job.aligned, valid);
    if (job.drop && valid > 0)
        drop_four(next.in, keep_bits(p.dropout, dropout_element(p.dropout, token, from), 4), p.dropout.scale);
    next.factor = load_four(job.factor, rank * job.factor_stride + from, PLORA_F32, 1, rank < p.padded_rank ? 4 : 0);
}

static __device__ __forceinline__ void shrink_store(struct shrink_stage &stage, const struct shrink_registers &next)
{
    const int row = (int)threadIdx.x / SHRINK_FOURS, place = (int)threadIdx.x % SHRINK_FOURS;
    stage.in[row][place] = next.in;
    stage.factor[row][place] = next.factor;
}

extern "C" __global__ void __launch_bounds__(LINEAR_FMA_THREADS, 2)
    shrink_f32_kernel(const __grid_constant__ struct shrink_params p)
{
    __shared__ struct shrink_stage stages[2];
    const bool second = blockIdx.x >= p.first_blocks;
    const struct shrink_job job = second ? p.jobs[1] : p.jobs[0];
    const struct shrink_place place =
        shrink_locate(p, job, second ? blockIdx.x - p.first_blocks : blockIdx.x, LINEAR_TILE);
    const int own_rank = (int)threadIdx.x % 16, own_token = (int)threadIdx.x / 16 * 4;
    const int ranks = p.padded_rank - place.rank;
    float sums[4][4] = {}; /* [rank / 16][token] */
    struct shrink_registers next;
    shrink_load(next, p, job, place, place.begin);
    int at = 0;
    for (int64_t column = place.begin; column < place.end; column += SHRINK_STEP, at ^= 1) {
        shrink_store(stages[at], next);
        __syncthreads(); /* one is enough: who is here has read the other stage */
        if (column + SHRINK_STEP < place.end) shrink_load(next, p, job, place, column + SHRINK_STEP);
        const struct shrink_stage &stage = stages[at];
#pragma unroll
        for (int k = 0; k < SHRINK_FOURS; ++k) {
            float4 in[4];
#pragma unroll
            for (int i = 0; i < 4; ++i)
                in[i] = stage.in[own_token + i][k];
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                if (16 * r >= ranks) break;
                const float4 factor = stage.factor[own_rank + 16 * r][k];
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    dot_four(sums[r][i], in[i], factor);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int64_t token = place.token + own_token + i;
        if (token >= p.tokens) break;
        float *out = place.partials + token * p.padded_rank + place.rank + own_rank;
#pragma unroll
        for (int r = 0; r < 4; ++r)
            if (16 * r < ranks) out[16 * r] = sums[r][i];
    }
}

/* ---------------------------------------------------------------------------------------------------------------- bf16 */

/* Grid: ceil(T / 128) * ceil(padded_rank / 64) * splits blocks of 4 warps, each of which sums 2 x 16 tokens x 64 ranks by mma.sync.
 * Shared: 48 KB, two stages of two tiles of x and a tile of the factor, one of them on its way by cp.async while the other is
 * multiplied. Of each element of x: 2 bytes read for every 64 ranks, and from L2 R / 64 of the factor. Where x is not 16-byte
 * aligned, it is gathered element by element.
 *
 * Precision: the factor is rounded to bf16, as x after dropout is, and the sum is fp32: this kernel runs where x and W are both bf16,
 * for which that is the contract of the linear layer. */
extern "C" __global__ void __launch_bounds__(LINEAR_TILE_THREADS, 4)
    shrink_bf16_kernel(const __grid_constant__ struct shrink_params p)
{
#if __CUDA_ARCH__ >= 800
    enum { STAGES = 2, TILES = LINEAR_BLOCK / LINEAR_TILE };
    __shared__ struct bf16_tile in_tiles[STAGES][TILES], factor_tiles[STAGES];
    const bool second = blockIdx.x >= p.first_blocks;
    const struct shrink_job job = second ? p.jobs[1] : p.jobs[0];
    const struct shrink_place place =
        shrink_locate(p, job, second ? blockIdx.x - p.first_blocks : blockIdx.x, LINEAR_BLOCK);
    const int ranks = p.padded_rank - place.rank < LINEAR_TILE ? p.padded_rank - place.rank : LINEAR_TILE;
    const struct tile_source in = {(const uint16_t *)job.in, job.stride, p.tokens, job.columns, job.aligned};
    const struct tile_source factor = {(const uint16_t *)job.factor, job.factor_stride, p.padded_rank,
                                       job.factor_stride, 1};
    float sums[TILES][8][4] = {};
    for (int stage = 0; stage < STAGES - 1; ++stage) {
        const int64_t column = place.begin + stage * LINEAR_TILE;
        if (column < place.end) {
#pragma unroll 1
            for (int i = 0; i < TILES; ++i)
                tile_fill(&in_tiles[stage][i], in, place.token + i * LINEAR_TILE, column, LINEAR_TILE);
            tile_fill(&factor_tiles[stage], factor, place.rank, column, ranks);
        }
        copies_commit();
    }
    int now = 0;
    for (int64_t column = place.begin; column < place.end; column += LINEAR_TILE) {
        copies_wait<STAGES - 2>();
#pragma unroll 1
        for (int i = 0; i < TILES && job.drop; ++i)
            tile_drop(&in_tiles[now][i], p.dropout, place.token + i * LINEAR_TILE, p.tokens, column, job.columns);
        __syncthreads(); /* this stage is filled, and the one before it is free */
        const int64_t ahead = column + (STAGES - 1) * LINEAR_TILE;
        const int free = now == 0 ? STAGES - 1 : now - 1;
        if (ahead < place.end) {
#pragma unroll 1
            for (int i = 0; i < TILES; ++i)
                tile_fill(&in_tiles[free][i], in, place.token + i * LINEAR_TILE, ahead, LINEAR_TILE);
            tile_fill(&factor_tiles[free], factor, place.rank, ahead, ranks);
        }
        copies_commit();
        tile_multiply<false, false>(sums, in_tiles[now], &factor_tiles[now], ranks / 16, LINEAR_TILE / 16);
        now = now == STAGES - 1 ? 0 : now + 1;
    }
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
#pragma unroll
    for (int half = 0; half < 2 * TILES; ++half) { /* 8 tokens each */
        const float(&own)[8][4] = sums[half / 2];
        const int64_t token = place.token + half / 2 * LINEAR_TILE + 16 * warp + half % 2 * 8 + lane / 4;
        if (token >= p.tokens) break;
        float *out = place.partials + token * p.padded_rank + place.rank + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < 8; ++n)
            if (8 * n < ranks) *(float2 *)(out + 8 * n) = make_float2(own[n][half % 2 * 2], own[n][half % 2 * 2 + 1]);
    }
#else
    unreachable();
#endif
}
