/* cuda_dequantise.c: a panel of a quantised weight in one launch (dequantise.cu). */
#include "cuda.h"

#include "dtype.h"
#include "nf4.h"

plora_status cuda_dequantise(void *device, const struct plora__dequantise_args *args, void *stream)
{
    const struct plora__quantised *weight = &args->weight;
    const plora_matrix *out = &args->out;
    const int int8 = weight->format == PLORA__QUANTISED_INT8;
    const enum cuda_kernel kernel = int8 ? CUDA_KERNEL_DEQUANTISE_INT8 : CUDA_KERNEL_DEQUANTISE_NF4;
    const struct dequantise_params params = {.codes = weight->codes,
                                             .scales = weight->scales,
                                             .nested_codes = weight->nested_codes,
                                             .map = weight->map,
                                             .out = out->data,
                                             .all_columns = weight->columns,
                                             .first_row = args->first_row,
                                             .first_column = args->first_column,
                                             .rows = out->rows,
                                             .columns = out->columns,
                                             .stride = out->stride,
                                             .group = weight->group,
                                             .groups = int8 ? (weight->columns + weight->group - 1) / weight->group : 0,
                                             .offset = weight->offset,
                                             .dtype = out->dtype,
                                             .aligned = (uintptr_t)out->data % 16 == 0 &&
                                                        out->stride * (int64_t)plora__dtype_size(out->dtype) % 16 == 0,
                                             .values = {PLORA__NF4_VALUES}};
    const int64_t block = (int64_t)DEQUANTISE_THREADS * DEQUANTISE_RUN;
    const int64_t across = (out->columns + block - 1) / block;
    if (out->rows == 0 || out->columns == 0) return PLORA_OK;
    PLORA_CHECK(out->rows <= INT32_MAX / across, PLORA_ERROR_UNSUPPORTED, "%s: a panel of [%lld,%lld] is too large",
                cuda_kernel_sources[kernel].name, (long long)out->rows, (long long)out->columns);
    return cuda_launch(device, kernel, (dim3){(unsigned)(out->rows * across), 1, 1},
                       (dim3){(unsigned)DEQUANTISE_THREADS, 1, 1}, 0, &params, stream);
}
