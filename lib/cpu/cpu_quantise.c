/* cpu_quantise.c: a run of full-precision numbers becomes int8 or NF4 codes, unit by unit over all threads. The rules are those of
 * plora__quantise_args (backend.h), the loops over numbers in quantise_kernels.c.
 *
 *     unit   INT8: the rows that fit into 16384 elements, one at least     NF4: 256 blocks of 64, that is one nested block
 *
 * Numbers of 16 bits are widened, and rows put together where a block reaches over their end, a few at a time. Everything of a unit is
 * computed by itself and the sums of the units added in order: the same bits for any number of threads. */
#include <math.h>
#include <string.h>

#include "convert_kernels.h"
#include "cpu_backend.h"
#include "dequantise_kernels.h"
#include "dtype.h"
#include "isa.h"
#include "merge_kernels.h"
#include "quantise_kernels.h"

enum { PIECE = 256 };

struct kernels {
    const struct cpu_quantise_kernels *quantise;
    const struct cpu_dequantise_kernels *dequantise;
    const struct cpu_convert_kernels *convert;
    const struct cpu_merge_kernels *merge;
};

static int64_t at_most(int64_t value, int64_t limit)
{
    return value < limit ? value : limit;
}

/* Neighbours [first, first + count) of the matrix, row after row: where they lie, or widened and put together in `buffer`. */
static const float *gather(const struct kernels *kernels, const plora_matrix *values, int64_t first, int64_t count,
                           float *buffer)
{
    const size_t size = plora__dtype_size(values->dtype);
    int64_t row = first / values->columns, column = first % values->columns;
    if (values->dtype == PLORA_F32 && column + count <= values->columns)
        return (const float *)values->data + row * values->stride + column;
    for (int64_t done = 0, piece; done < count; done += piece, ++row, column = 0) {
        piece = at_most(count - done, values->columns - column);
        kernels->convert->widen(buffer + done,
                                (const char *)values->data + (size_t)(row * values->stride + column) * size,
                                values->dtype, piece);
    }
    return buffer;
}

static void add_lost(struct plora__quantise_sums *sums, const float *values, const float *held, int64_t count)
{
    for (int64_t i = 0; i < count; ++i) {
        const double lost = fabs((double)held[i] - (double)values[i]);
        sums->square += lost * lost;
        if (!(lost <= sums->max)) sums->max = lost;
    }
}

/* ---------------------------------------------------------------------------------------------------------------- INT8 */

/* One scale: elements [first, first + count) of the matrix. */
static void int8_group(const struct kernels *kernels, const struct plora__quantise_args *args, int64_t first,
                       int64_t count, int8_t *codes, float *scale, struct plora__quantise_sums *sums)
{
    float buffer[PIECE], held[PIECE];
    uint32_t largest = 0;
    for (int64_t i = 0; i < count; i += PIECE) {
        const int64_t piece = at_most(count - i, PIECE);
        const uint32_t bits =
            kernels->merge->magnitude(gather(kernels, &args->values, first + i, piece, buffer), piece);
        if (bits > largest) largest = bits;
    }
    *scale = plora__float_from_bits(largest) / 127.0f;
    for (int64_t i = 0; i < count; i += PIECE) {
        const int64_t piece = at_most(count - i, PIECE);
        const float *values = gather(kernels, &args->values, first + i, piece, buffer);
        if (*scale > 0.0f)
            kernels->quantise->int8(codes + i, values, *scale, piece);
        else
            memset(codes + i, 0, (size_t)piece);
        if (sums == NULL) continue;
        kernels->dequantise->int8(held, PLORA_F32, codes + i, *scale, piece);
        add_lost(sums, values, held, piece);
    }
}

/* Elements [begin, begin + count) of the run, whole rows. */
static void int8_unit(const struct kernels *kernels, const struct plora__quantise_args *args, int64_t begin,
                      int64_t count, struct plora__quantise_sums *sums)
{
    const int64_t columns = args->values.columns, groups = (columns + args->group - 1) / args->group;
    int8_t *codes = args->codes;
    for (int64_t row = begin / columns; row < (begin + count) / columns; ++row)
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t element = row * columns + g * args->group;
            int8_group(kernels, args, args->first + element, at_most(args->group, columns - g * args->group),
                       codes + element, args->scales + row * groups + g, sums);
        }
}

/* ----------------------------------------------------------------------------------------------------------------- NF4 */

/* The number of the value of a rising map that is nearest, halfway the lower. */
static int nearest(const float map[256], float value)
{
    int low = 0, high = 255; /* the first that is not below `value`, or the last */
    while (low < high) {
        const int middle = (low + high) / 2;
        if (map[middle] < value)
            low = middle + 1;
        else
            high = middle;
    }
    return low > 0 && fabsf(value - map[low - 1]) <= fabsf(map[low] - value) ? low - 1 : low;
}

/* Quantises the absmax of a unit's blocks; they become what the codes hold. */
static void nest(const struct plora__quantise_args *args, float *absmax, int64_t blocks, float *scale, uint8_t *codes)
{
    float largest = 0.0f;
    for (int64_t b = 0; b < blocks; ++b)
        largest = fmaxf(largest, fabsf(absmax[b] - args->offset));
    const float inverse = 1.0f / largest;
    *scale = largest;
    for (int64_t b = 0; b < blocks; ++b) {
        codes[b] = largest > 0.0f ? (uint8_t)nearest(args->map, (absmax[b] - args->offset) * inverse) : 0;
        const float product = args->map[codes[b]] * largest;
        absmax[b] = product + args->offset;
    }
}

/* Elements [begin, begin + count) of the run, a nested block at most. */
static void nf4_unit(const struct kernels *kernels, const struct plora__quantise_args *args, int64_t begin,
                     int64_t count, struct plora__quantise_sums *sums)
{
    const int64_t first_block = begin / PLORA__NF4_BLOCK, blocks = (count + PLORA__NF4_BLOCK - 1) / PLORA__NF4_BLOCK;
    uint8_t *codes = (uint8_t *)args->codes + begin / 2;
    float buffer[PLORA__NF4_BLOCK] = {0}, held[PLORA__NF4_BLOCK], absmax[PLORA__NF4_NESTED_BLOCK];
    for (int64_t b = 0; b < blocks; ++b) {
        const int64_t element = b * PLORA__NF4_BLOCK, size = at_most(count - element, PLORA__NF4_BLOCK);
        const float *values = gather(kernels, &args->values, args->first + begin + element, size, buffer);
        absmax[b] = plora__float_from_bits(kernels->merge->magnitude(values, size));
        if (size < PLORA__NF4_BLOCK && values != buffer) /* nothing may lie behind them */
            values = memcpy(buffer, values, (size_t)size * sizeof *values);
        kernels->quantise->nf4(codes + element / 2, values, 1.0f / absmax[b], size);
    }
    if (args->map != NULL)
        nest(args, absmax, blocks, &args->scales[first_block / PLORA__NF4_NESTED_BLOCK],
             args->nested_codes + first_block);
    else
        memcpy(args->scales + first_block, absmax, (size_t)blocks * sizeof *absmax);
    for (int64_t b = 0; sums != NULL && b < blocks; ++b) {
        const int64_t element = b * PLORA__NF4_BLOCK, size = at_most(count - element, PLORA__NF4_BLOCK);
        kernels->dequantise->nf4(held, PLORA_F32, codes, element, absmax[b], size);
        add_lost(sums, gather(kernels, &args->values, args->first + begin + element, size, buffer), held, size);
    }
}

/* ------------------------------------------------------------------------------------------------------------- launcher */

const struct cpu_quantise_kernels *cpu_quantise_kernels(int isa)
{
    static const struct cpu_quantise_kernels *const tables[CPU_ISA_COUNT] = {
        &cpu_quantise_kernels_portable, &cpu_quantise_kernels_avx2, &cpu_quantise_kernels_avx512,
        &cpu_quantise_kernels_amx};
    return tables[isa];
}

void cpu_quantise_with(int isa, int threads, const struct plora__quantise_args *args)
{
    const struct kernels kernels = {cpu_quantise_kernels(isa), cpu_dequantise_kernels(isa), cpu_convert_kernels(isa),
                                    cpu_merge_kernels(isa)};
    const int int8 = args->format == PLORA__QUANTISED_INT8;
    const int64_t columns = args->values.columns, unit = PLORA__QUANTISE_UNIT;
    const int64_t size = !int8 ? unit : columns < unit ? unit / columns * columns : columns;
    const int64_t units = (args->count + size - 1) / size;
    struct plora__quantise_sums parts[PLORA__QUANTISE_UNITS] = {{0}};
    (void)threads; /* unused without OpenMP */
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < units; ++i) {
        struct plora__quantise_sums *sums = args->sums != NULL ? &parts[i] : NULL;
        const int64_t begin = i * size, count = at_most(size, args->count - begin);
        if (int8)
            int8_unit(&kernels, args, begin, count, sums);
        else
            nf4_unit(&kernels, args, begin, count, sums);
    }
    if (args->sums == NULL) return;
    *args->sums = parts[0];
    for (int64_t i = 1; i < units; ++i) {
        args->sums->square += parts[i].square;
        if (!(parts[i].max <= args->sums->max)) args->sums->max = parts[i].max;
    }
}

plora_status cpu_quantise(void *device, const struct plora__quantise_args *args)
{
    cpu_quantise_with(cpu_isa(), cpu_threads_for(device, 32.0 * (double)args->count), args);
    return PLORA_OK;
}
