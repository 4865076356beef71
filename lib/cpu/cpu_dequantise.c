/* cpu_dequantise.c: a panel of a quantised weight as fp32 or bf16, by rows; each row is cut where the scale changes.
 * The layouts are those of plora__quantised (backend.h), the loops over numbers in dequantise_kernels.c.
 *
 * The absmax of double quantisation is computed here, where nothing is contracted: one product and one sum, rounded
 * each. */
#include "cpu_backend.h"
#include "dequantise_kernels.h"
#include "dtype.h"
#include "isa.h"

static int64_t at_most(int64_t value, int64_t limit)
{
    return value < limit ? value : limit;
}

static void int8_row(const struct cpu_dequantise_kernels *kernels, const struct plora__dequantise_args *args,
                     int64_t row, char *out)
{
    const struct plora__quantised *weight = &args->weight;
    const int64_t groups = (weight->columns + weight->group - 1) / weight->group, end = args->out.columns;
    const int8_t *codes =
        (const int8_t *)weight->codes + (args->first_row + row) * weight->columns + args->first_column;
    const float *scales = weight->scales + (args->first_row + row) * groups;
    int64_t count;
    for (int64_t i = 0; i < end; i += count) {
        const int64_t column = args->first_column + i;
        count = at_most(end - i, weight->group - column % weight->group);
        kernels->int8(out + i * (int64_t)plora__dtype_size(args->out.dtype), args->out.dtype, codes + i,
                      scales[column / weight->group], count);
    }
}

static float absmax(const struct plora__quantised *weight, int64_t block)
{
    if (weight->nested_codes == NULL) return weight->scales[block];
    const float product = weight->map[weight->nested_codes[block]] * weight->scales[block / PLORA__NF4_NESTED_BLOCK];
    return product + weight->offset;
}

static void nf4_row(const struct cpu_dequantise_kernels *kernels, const struct plora__dequantise_args *args,
                    int64_t row, char *out)
{
    const struct plora__quantised *weight = &args->weight;
    const int64_t first = (args->first_row + row) * weight->columns + args->first_column, end = args->out.columns;
    int64_t count;
    for (int64_t i = 0; i < end; i += count) {
        const int64_t element = first + i;
        count = at_most(end - i, PLORA__NF4_BLOCK - element % PLORA__NF4_BLOCK);
        kernels->nf4(out + i * (int64_t)plora__dtype_size(args->out.dtype), args->out.dtype, weight->codes, element,
                     absmax(weight, element / PLORA__NF4_BLOCK), count);
    }
}

void cpu_dequantise_with(const struct cpu_dequantise_kernels *kernels, int threads,
                         const struct plora__dequantise_args *args)
{
    const plora_matrix *panel = &args->out;
    const int64_t row_bytes = panel->stride * (int64_t)plora__dtype_size(panel->dtype);
    (void)threads; /* unused without OpenMP */
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < panel->rows; ++row) {
        char *out = (char *)panel->data + row * row_bytes;
        if (args->weight.format == PLORA__QUANTISED_INT8)
            int8_row(kernels, args, row, out);
        else
            nf4_row(kernels, args, row, out);
    }
}

const struct cpu_dequantise_kernels *cpu_dequantise_kernels(int isa)
{
    static const struct cpu_dequantise_kernels *const tables[CPU_ISA_COUNT] = {
        &cpu_dequantise_kernels_portable, &cpu_dequantise_kernels_avx2, &cpu_dequantise_kernels_avx512,
        &cpu_dequantise_kernels_amx};
    return tables[isa];
}

plora_status cpu_dequantise(void *device, const struct plora__dequantise_args *args, void *stream)
{
    (void)stream;
    const int threads = cpu_threads_for(device, 4.0 * (double)args->out.rows * (double)args->out.columns);
    cpu_dequantise_with(cpu_dequantise_kernels(cpu_isa()), threads, args);
    return PLORA_OK;
}
