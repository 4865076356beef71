/* gradient.cu: the gradients of A and B, sums over the tokens, with dropout drawn on the way.
 *
 *     dA[R,K] += v^T drop(x)[T,K]         dB[N,R] += dy^T u, as its transpose         both as  low^T[R,T] in[T,D]
 *
 * A block sums 64 columns of `in` over a run of tokens, for all ranks up to 64 (fp32: 32); runs are cut so that the machine is full:
 *
 *                <------------- D ------------->
 *              | split 0 | split 0 | split 0 |          64 columns each
 *         T    | split 1 | split 1 | split 1 |
 *
 * Partial sums lie as the gradient does; reduce_kernel (convert.cu) adds them to it in the order of the splits: no atomics, the same
 * bits every time. One launch does both gradients. */
#include "cuda_common.cuh"

/* Where a block stands. */
struct gradient_place {
    int64_t column, begin, end; /* its first column, its tokens */
    int rank;                   /* its first rank */
    float *partials;            /* of its split, laid out as the gradient */
};

static __device__ __forceinline__ struct gradient_place
gradient_locate(const struct gradient_params &p, const struct gradient_job &job, uint32_t block, int ranks)
{
    const uint32_t rank_tiles = (uint32_t)(p.padded_rank + ranks - 1) / (uint32_t)ranks;
    const uint32_t column_tiles = (uint32_t)((job.columns + LINEAR_TILE - 1) / LINEAR_TILE);
    const uint32_t split = block / rank_tiles / column_tiles;
    struct gradient_place place;
    place.rank = (int)(block % rank_tiles) * ranks;
    place.column = (int64_t)(block / rank_tiles % column_tiles) * LINEAR_TILE;
    place.begin = (int64_t)split * job.split_tokens;
    place.end = place.begin + job.split_tokens < p.tokens ? place.begin + job.split_tokens : p.tokens;
    place.partials = job.partials + split * p.rank * job.columns;
    return place;
}

static __device__ __forceinline__ void gradient_store(const struct gradient_params &p, const struct gradient_job &job,
                                                      const struct gradient_place &place, int64_t rank, int64_t column,
                                                      float sum)
{
    if (rank < p.rank && column < job.columns)
        place.partials[rank * job.rank_stride + column * job.column_stride] = sum;
}

/* ---------------------------------------------------------------------------------------------------------------- fp32 */

/* Grid: ceil(D / 64) * ceil(padded_rank / 32) * splits blocks of 256 threads; thread (column / 4, rank % 16) of a block sums 4 columns x
 * 2 ranks. Shared: 24 KB, two stages of in[32][64] and low[32][32]. Reads 4 (bf16: 2) bytes of each element of `in` for every 32
 * ranks. */
struct gradient_stage {
    float4 in[LINEAR_FMA_STEP][LINEAR_TILE / 4];
    float low[LINEAR_FMA_STEP][LINEAR_FMA_RANKS];
};

struct gradient_registers {
    float4 in[2], low;
};

static __device__ __forceinline__ void gradient_load(struct gradient_registers &next, const struct gradient_params &p,
                                                     const struct gradient_job &job, const struct gradient_place &place,
                                                     int64_t first_token)
{
    const int64_t from = place.column + threadIdx.x % 16 * 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int64_t token = first_token + threadIdx.x / 16 + i * LINEAR_FMA_THREADS / 16;
        const int64_t valid = token < place.end ? job.columns - from : 0;
        next.in[i] = load_four(job.in, token * job.stride + from, job.dtype, job.aligned, valid);
        if (job.drop && valid > 0) {
            const uint64_t element = (p.dropout.first_token + (uint64_t)token) * (uint64_t)job.columns + (uint64_t)from;
            drop_four(next.in[i], keep_bits(p.dropout, element, 4), p.dropout.scale);
        }
    }
    const int64_t token = first_token + threadIdx.x / 8, rank = place.rank + (int)threadIdx.x % 8 * 4;
    next.low = load_four(job.low, token * p.padded_rank + rank, PLORA_F32, 1,
                         token < place.end && rank < p.padded_rank ? 4 : 0);
}

static __device__ __forceinline__ void gradient_keep(struct gradient_stage &stage,
                                                     const struct gradient_registers &next)
{
    const int row = (int)threadIdx.x / 16, place = (int)threadIdx.x % 16;
    stage.in[row][place] = next.in[0];
    stage.in[row + LINEAR_FMA_THREADS / 16][place] = next.in[1];
    *(float4 *)&stage.low[threadIdx.x / 8][threadIdx.x % 8 * 4] = next.low;
}

extern "C" __global__ void __launch_bounds__(LINEAR_FMA_THREADS)
    gradient_f32_kernel(const __grid_constant__ struct gradient_params p)
{
    __shared__ struct gradient_stage stages[2];
    const bool second = blockIdx.x >= p.first_blocks;
    const struct gradient_job job = second ? p.jobs[1] : p.jobs[0];
    const struct gradient_place place =
        gradient_locate(p, job, second ? blockIdx.x - p.first_blocks : blockIdx.x, LINEAR_FMA_RANKS);
    const int own_column = (int)threadIdx.x % 16, own_rank = (int)threadIdx.x / 16;
    const bool both = place.rank + 16 < p.padded_rank;
    float4 sums[2] = {};
    struct gradient_registers next;
    gradient_load(next, p, job, place, place.begin);
    int at = 0;
    for (int64_t token = place.begin; token < place.end; token += LINEAR_FMA_STEP, at ^= 1) {
        gradient_keep(stages[at], next);
        __syncthreads(); /* one is enough: who is here has read the other stage */
        if (token + LINEAR_FMA_STEP < place.end) gradient_load(next, p, job, place, token + LINEAR_FMA_STEP);
        const struct gradient_stage &stage = stages[at];
#pragma unroll
        for (int t = 0; t < LINEAR_FMA_STEP; ++t) {
            const float4 in = stage.in[t][own_column];
            multiply_four(sums[0], stage.low[t][own_rank], in);
            if (both) multiply_four(sums[1], stage.low[t][own_rank + 16], in);
        }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int64_t rank = place.rank + own_rank + 16 * i, column = place.column + 4 * own_column;
        gradient_store(p, job, place, rank, column, sums[i].x);
        gradient_store(p, job, place, rank, column + 1, sums[i].y);
        gradient_store(p, job, place, rank, column + 2, sums[i].z);
        gradient_store(p, job, place, rank, column + 3, sums[i].w);
    }
}

/* ---------------------------------------------------------------------------------------------------------------- bf16 */

/* Grid: ceil(D / 64) * ceil(padded_rank / 64) * splits blocks of 4 warps, each of which sums 16 columns x 64 ranks by mma.sync, over 64
 * tokens a step. Shared: 48 KB, three stages of a tile of `in` and a tile of `low`, two of them on their way by cp.async while one is
 * multiplied; both are read transposed. Reads 2 bytes of each element of `in` for every 64 ranks. Precision as in shrink.cu. */
extern "C" __global__ void __launch_bounds__(LINEAR_TILE_THREADS, 4)
    gradient_bf16_kernel(const __grid_constant__ struct gradient_params p)
{
#if __CUDA_ARCH__ >= 800
    enum { STAGES = 3 };
    __shared__ struct bf16_tile in_tiles[STAGES], low_tiles[STAGES];
    const bool second = blockIdx.x >= p.first_blocks;
    const struct gradient_job job = second ? p.jobs[1] : p.jobs[0];
    const struct gradient_place place =
        gradient_locate(p, job, second ? blockIdx.x - p.first_blocks : blockIdx.x, LINEAR_TILE);
    const int ranks = p.padded_rank - place.rank < LINEAR_TILE ? p.padded_rank - place.rank : LINEAR_TILE;
    const struct tile_source in = {(const uint16_t *)job.in, job.stride, place.end, job.columns, job.aligned};
    const struct tile_source low = {(const uint16_t *)job.low, p.padded_rank, place.end, p.padded_rank, 1};
    float sums[8][4] = {};
    for (int stage = 0; stage < STAGES - 1; ++stage) {
        const int64_t token = place.begin + stage * LINEAR_TILE;
        if (token < place.end) {
            tile_fill(&in_tiles[stage], in, token, place.column, LINEAR_TILE);
            tile_fill(&low_tiles[stage], low, token, place.rank, LINEAR_TILE);
        }
        copies_commit();
    }
    int now = 0;
    for (int64_t token = place.begin; token < place.end; token += LINEAR_TILE) {
        copies_wait<STAGES - 2>();
        if (job.drop) tile_drop(&in_tiles[now], p.dropout, token, place.end, place.column, job.columns);
        __syncthreads(); /* this stage is filled, and the one before it is free */
        const int64_t ahead = token + (STAGES - 1) * LINEAR_TILE;
        const int free = now == 0 ? STAGES - 1 : now - 1;
        if (ahead < place.end) {
            tile_fill(&in_tiles[free], in, ahead, place.column, LINEAR_TILE);
            tile_fill(&low_tiles[free], low, ahead, place.rank, LINEAR_TILE);
        }
        copies_commit();
        tile_multiply<true, true>(sums, &in_tiles[now], &low_tiles[now], ranks / 16, LINEAR_TILE / 16);
        now = now == STAGES - 1 ? 0 : now + 1;
    }
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    const int64_t column = place.column + 16 * warp + lane / 4, rank = place.rank + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            gradient_store(p, job, place, rank + 8 * n + i % 2, column + i / 2 * 8, sums[n][i]);
#else
    unreachable();
#endif
}
