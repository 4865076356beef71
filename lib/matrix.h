/* matrix.h: what can be said of two plora_matrix views without looking at their elements. */
#ifndef PLORA_MATRIX_H
#define PLORA_MATRIX_H

#include "dtype.h"

/* Bytes from the first to behind the last element. */
static inline uintptr_t plora__matrix_extent(const plora_matrix *matrix)
{
    if (matrix->rows == 0 || matrix->columns == 0) return 0;
    return (uintptr_t)((matrix->rows - 1) * matrix->stride + matrix->columns) * plora__dtype_size(matrix->dtype);
}

/* Whether they share an element. Column slices of one matrix (equal stride and dtype) interleave without sharing. */
static inline int plora__matrix_overlap(const plora_matrix *a, const plora_matrix *b)
{
    const plora_matrix *low = (uintptr_t)a->data <= (uintptr_t)b->data ? a : b, *high = low == a ? b : a;
    const uintptr_t distance = (uintptr_t)high->data - (uintptr_t)low->data;
    if (plora__matrix_extent(high) == 0 || distance >= plora__matrix_extent(low)) return 0;
    const size_t size = plora__dtype_size(low->dtype);
    if (low->dtype != high->dtype || low->stride != high->stride || distance % size != 0) return 1;
    const int64_t column = (int64_t)(distance / size) % low->stride;
    return !(column >= low->columns && column + high->columns <= low->stride);
}

#endif
