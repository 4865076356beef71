/* merge_rounding.h: the roundings of lib/rounding.h by registers, with the bits of its functions.
 *
 * Of bf16, a pair of registers makes two of halves: 16 bits of the upper, and 16 of the lower halves of its values, in the order of
 * the columns. Values near the largest number, and NaN, go through the functions themselves: they are rare.
 *
 * Random numbers come a tile at a time: the blocks of 8 (rounding.h) that its rows lie in, side by side. */
#ifndef PLORA_CPU_MERGE_ROUNDING_H
#define PLORA_CPU_MERGE_ROUNDING_H

#include "philox_lanes.h"
#include "rounding.h"

/* ------------------------------------------------------------------------------------------------------------ random numbers */

enum {
    ROW_BLOCKS = TILE_COLUMNS / PLORA__ROUNDING_BLOCK,
    RANDOM_ROWS = CPU_ISA == CPU_ISA_AMX ? 1 : TILE_ROWS,
    RANDOM_BLOCKS = (RANDOM_ROWS * (ROW_BLOCKS + 1) + CPU_PHILOX_LANES - 1) / CPU_PHILOX_LANES * CPU_PHILOX_LANES
};

/* What the random numbers of a block of rows have in common. */
struct drawing {
    struct cpu_philox_keys keys;
    uint32_t step, purpose;
    int64_t row_elements;
    int blocks; /* of a row: one more when rows do not begin with one */
};

/* The numbers of RANDOM_ROWS rows. */
struct random {
    int pitch; /* numbers from row to row, without its lead */
    _Alignas(CACHE_LINE) uint16_t number[RANDOM_BLOCKS * PLORA__ROUNDING_BLOCK];
};

static void open_drawing(struct drawing *drawing, const struct plora__merge_draw *draw)
{
    const struct plora__words counter = plora__counter(PLORA__PURPOSE_ROUNDING, draw->stage, draw->layer, 0);
    const int aligned = (draw->first_element | draw->row_elements) % PLORA__ROUNDING_BLOCK == 0;
    drawing->keys = cpu_philox_keys(draw->seed);
    drawing->step = counter.word[2];
    drawing->purpose = counter.word[3];
    drawing->row_elements = draw->row_elements;
    drawing->blocks = aligned ? ROW_BLOCKS : ROW_BLOCKS + 1;
}

/* The halves of one block a lane. Even lanes' words come first in memory, then those of odd lanes. */
CPU_INLINE void store_lanes(const cpu_vul c[4], uint16_t *to)
{
#if CPU_ISA >= CPU_ISA_AVX512
    const __m512i first = _mm512_mask_shuffle_epi32((__m512i)c[0], 0xaaaa, (__m512i)c[1], _MM_PERM_CCAA);
    const __m512i last = _mm512_mask_shuffle_epi32((__m512i)c[2], 0xaaaa, (__m512i)c[3], _MM_PERM_CCAA);
    _mm512_storeu_si512(to, _mm512_unpacklo_epi64(first, last));
    _mm512_storeu_si512(to + 2 * CPU_LANES, _mm512_unpackhi_epi64(first, last));
#elif CPU_ISA == CPU_ISA_AVX2
    const __m256i first = _mm256_blend_epi32((__m256i)c[0], (__m256i)(c[1] << 32), 0xaa);
    const __m256i last = _mm256_blend_epi32((__m256i)c[2], (__m256i)(c[3] << 32), 0xaa);
    _mm256_storeu_si256((__m256i *)to, _mm256_unpacklo_epi64(first, last));
    _mm256_storeu_si256((__m256i *)(to + 2 * CPU_LANES), _mm256_unpackhi_epi64(first, last));
#else
    const cpu_vul first = (c[0] & UINT32_MAX) | c[1] << 32, last = (c[2] & UINT32_MAX) | c[3] << 32;
    for (int lane = 0; lane < CPU_PHILOX_LANES; ++lane) {
        const uint64_t words[2] = {first[lane], last[lane]};
        memcpy(to + (lane % 2 * CPU_PHILOX_LANES / 2 + lane / 2) * PLORA__ROUNDING_BLOCK, words, sizeof words);
    }
#endif
}

/* Those of `count` registers of block numbers, one after the other. */
CPU_INLINE void draw_lanes(const struct drawing *drawing, const cpu_vul *blocks, int count, uint16_t *to)
{
    cpu_vul c[RANDOM_ROWS][4];
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i) {
        c[i][0] = blocks[i];
        c[i][1] = blocks[i] >> 32;
        c[i][2] = (cpu_vul){0} + drawing->step;
        c[i][3] = (cpu_vul){0} + drawing->purpose;
    }
    cpu_philox(c, count, &drawing->keys);
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i)
        store_lanes(c[i], to + i * CPU_PHILOX_LANES * PLORA__ROUNDING_BLOCK);
}

/* Block numbers as draw_lanes() wants them, from those in order. */
CPU_INLINE cpu_vul deal_lanes(const uint64_t numbers[CPU_PHILOX_LANES])
{
    cpu_vul dealt;
    for (int lane = 0; lane < CPU_PHILOX_LANES; ++lane)
        dealt[lane] = numbers[lane % 2 * CPU_PHILOX_LANES / 2 + lane / 2];
    return dealt;
}

/* The numbers of RANDOM_ROWS rows from `element` on, the first column of a tile. */
CPU_INLINE void draw_rows(const struct drawing *drawing, int64_t element, struct random *random)
{
    random->pitch = drawing->blocks * PLORA__ROUNDING_BLOCK;
    if ((int)ROW_BLOCKS == CPU_PHILOX_LANES && drawing->blocks == ROW_BLOCKS) { /* a row is a register of counters */
        static const uint64_t order[8] = {0, 1, 2, 3, 4, 5, 6, 7};
        const cpu_vul lanes = deal_lanes(order);
        cpu_vul blocks[RANDOM_ROWS];
#pragma GCC unroll 8
        for (int row = 0; row < RANDOM_ROWS; ++row, element += drawing->row_elements)
            blocks[row] = lanes + (uint64_t)element / PLORA__ROUNDING_BLOCK;
        draw_lanes(drawing, blocks, RANDOM_ROWS, random->number);
        return;
    }
    uint64_t numbers[RANDOM_BLOCKS];
    int count = 0;
    for (int row = 0; row < RANDOM_ROWS; ++row, element += drawing->row_elements)
        for (int block = 0; block < drawing->blocks; ++block)
            numbers[count++] = (uint64_t)element / PLORA__ROUNDING_BLOCK + (uint64_t)block;
    while (count % CPU_PHILOX_LANES != 0)
        numbers[count++] = 0;
    for (int first = 0; first < count; first += CPU_PHILOX_LANES)
        draw_lanes(drawing, (cpu_vul[]){deal_lanes(numbers + first)}, 1,
                   random->number + first * PLORA__ROUNDING_BLOCK);
}

/* Those of one row, whose first column is `element`. */
CPU_INLINE const uint16_t *random_row(const struct random *random, int64_t row, int64_t element)
{
    return random->number + row * random->pitch + element % PLORA__ROUNDING_BLOCK;
}

/* ----------------------------------------------------------------------------------------------------------- bits of registers */

/* condition ? a : b, lane by lane. */
CPU_INLINE cpu_vu choose(cpu_vi condition, cpu_vu a, cpu_vu b)
{
    return ((cpu_vu)condition & a) | (~(cpu_vu)condition & b);
}

/* CPU_LANES numbers of 16 bits, widened and narrowed. */
CPU_INLINE cpu_vu load_halves(const uint16_t *from)
{
#if CPU_ISA >= CPU_ISA_AVX512
    return (cpu_vu)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
#elif CPU_ISA == CPU_ISA_AVX2
    return (cpu_vu)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from));
#else
    cpu_vu value;
    for (int i = 0; i < CPU_LANES; ++i)
        value[i] = from[i];
    return value;
#endif
}

CPU_INLINE void store_halves(uint16_t *to, cpu_vu value)
{
#if CPU_ISA >= CPU_ISA_AVX512
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi32_epi16((__m512i)value));
#elif CPU_ISA == CPU_ISA_AVX2
    const __m256i all = (__m256i)value;
    _mm_storeu_si128((__m128i *)to, _mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
#else
    for (int i = 0; i < CPU_LANES; ++i)
        to[i] = (uint16_t)value[i];
#endif
}

/* ------------------------------------------------------------------------------------------------------------ near the largest */

/* max(largest, magnitude of the value), by upper halves, which are doubled: without sign. */
CPU_INLINE cpu_vu larger(cpu_vu largest, struct pair value)
{
    const cpu_vu16 doubled = (cpu_vu16)halves_of(value).upper * 2;
    return cpu_max_halves(largest, (cpu_vu)doubled);
}

/* Whether one of them is so large that its neighbour in W is infinite, or nearly. */
CPU_INLINE int is_near_largest(cpu_vu largest, int32_t dtype)
{
    return cpu_any_half_above(largest, 2 * (dtype == PLORA_BF16 ? 0x7f7f : 0x477f) - 1);
}

/* The values of a pair in the order of the columns. */
CPU_INLINE void lay_out(float values[2 * CPU_LANES], struct pair value, int32_t dtype)
{
    for (int i = 0; i < CPU_LANES; ++i) {
        values[dtype == PLORA_BF16 ? 2 * i : i] = value.first[i];
        values[dtype == PLORA_BF16 ? 2 * i + 1 : CPU_LANES + i] = value.second[i];
    }
}

/* A row of a tile by the functions of rounding.h. */
static __attribute__((noinline)) void store_slowly(uint16_t *to, uint16_t *low, const uint16_t *random,
                                                   const float values[TILE_COLUMNS], int32_t rounding, int32_t dtype)
{
    for (int i = 0; i < TILE_COLUMNS; ++i) {
        if (rounding == PLORA_ROUND_RESIDUAL)
            plora__split_residual(values[i], dtype, &to[i], &low[i]);
        else
            to[i] = plora__round_stochastic(values[i], random[i], dtype);
    }
}

/* -------------------------------------------------------------------------------------------------------------------- at random */

CPU_INLINE cpu_vu random_f16(cpu_vf value, cpu_vu random)
{
    const cpu_vu bits = (cpu_vu)value, magnitude = bits & INT32_MAX;
    const cpu_vi small = magnitude < 0x38800000u;
    const cpu_vu normal =
        ((magnitude - 0x38000000u) >> 13) - (cpu_vu)((cpu_vi)(random >> 3) < (cpu_vi)(magnitude & 0x1fffu));
    const cpu_vf steps = (cpu_vf)(magnitude & (cpu_vu)small) * 0x1p24f;
    const cpu_vi whole = __builtin_convertvector(steps, cpu_vi);
    const cpu_vf fraction = (steps - __builtin_convertvector(whole, cpu_vf)) * 0x1p16f;
    const cpu_vi up = __builtin_convertvector((cpu_vi)random, cpu_vf) < fraction;
    return choose(small, (cpu_vu)(whole - up), normal) | (bits >> 16 & 0x8000u);
}

CPU_INLINE void store_random(char *to, struct pair value, const uint16_t *random, int32_t dtype)
{
    uint16_t *half = (uint16_t *)to;
    if (dtype == PLORA_BF16) {
        const struct halves halves = halves_of(value);
        const cpu_vu draw = (cpu_vu)cpu_load(random);
#if CPU_ISA >= CPU_ISA_AVX512
        const __m512i upper = (__m512i)halves.upper;
        const __mmask32 up = _mm512_cmplt_epu16_mask((__m512i)draw, (__m512i)halves.lower);
        const __m512i rounded = _mm512_mask_add_epi16(upper, up, upper, _mm512_set1_epi16(1));
#else
        const cpu_vu16 rounded = (cpu_vu16)halves.upper - (cpu_vu16)((cpu_vu16)draw < (cpu_vu16)halves.lower);
#endif
        cpu_store(to, (cpu_vf)rounded);
        return;
    }
    store_halves(half, random_f16(value.first, load_halves(random)));
    store_halves(half + CPU_LANES, random_f16(value.second, load_halves(random + CPU_LANES)));
}

/* --------------------------------------------------------------------------------------------------------------- with a residual */

CPU_INLINE void split_f16(uint16_t *to, uint16_t *low, cpu_vf value)
{
    const cpu_vu bits = (cpu_vu)value, magnitude = bits & INT32_MAX;
    const cpu_vi small = magnitude < 0x38800000u;
    const cpu_vf steps = (cpu_vf)(magnitude & (cpu_vu)small) * 0x1p40f;
    const cpu_vu half = (cpu_vu)(steps < 0x1p23f) & plora__float_bits(0.5f);
    const cpu_vu below = (cpu_vu) __builtin_convertvector(steps + (cpu_vf)half, cpu_vi);
    const cpu_vu pair = choose(small, below, (magnitude - 0x38000000u) << 3);
    store_halves(to, ((pair + 0x8000u) >> 16) | (bits >> 16 & 0x8000u));
    store_halves(low, pair & 0xffffu);
}

CPU_INLINE void store_split(char *to, uint16_t *low, struct pair value, int32_t dtype)
{
    uint16_t *half = (uint16_t *)to;
    if (dtype == PLORA_BF16) {
        const struct halves halves = halves_of(value);
        cpu_store(to, (cpu_vf)((cpu_vu16)halves.upper + ((cpu_vu16)halves.lower >> 15)));
        cpu_store(low, (cpu_vf)halves.lower);
        return;
    }
    split_f16(half, low, value.first);
    split_f16(half + CPU_LANES, low + CPU_LANES, value.second);
}

CPU_INLINE cpu_vf join_f16(cpu_vu weight, cpu_vu low)
{
    const cpu_vu magnitude = weight & 0x7fffu, sign = (weight & 0x8000u) << 16;
    const cpu_vu pair = (magnitude << 16 | low) - ((low >> 15) << 16);
    const cpu_vu small = (cpu_vu)(__builtin_convertvector((cpu_vi)pair, cpu_vf) * 0x1p-40f);
    const cpu_vu normal = choose(pair >= 0x4000000u, (pair >> 3) + 0x38000000u, small);
    return (cpu_vf)(sign | choose(magnitude >= 0x7c00u, 0x7f800000u | (magnitude & 0x3ffu) << 13, normal));
}

CPU_INLINE struct pair load_joined(const char *from, const uint16_t *low, int32_t dtype)
{
    const uint16_t *half = (const uint16_t *)from;
    if (dtype == PLORA_F16)
        return (struct pair){join_f16(load_halves(half), load_halves(low)),
                             join_f16(load_halves(half + CPU_LANES), load_halves(low + CPU_LANES))};
    const cpu_vu lower = (cpu_vu)cpu_load(low);
    const cpu_vu upper = (cpu_vu)((cpu_vu16)(cpu_vu)cpu_load(from) - ((cpu_vu16)lower >> 15));
    return pair_of((struct halves){upper, lower});
}

#endif
