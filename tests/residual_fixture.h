/* residual_fixture.h: looks at the residuals that the weights of a model keep (lib/handles.h), from the host. */
#ifndef PLORA_TESTS_RESIDUAL_FIXTURE_H
#define PLORA_TESTS_RESIDUAL_FIXTURE_H

#include "check.h"
#include "handles.h"
#include "rounding.h"

/* A copy of the low halves of a weight, [rows, columns], or NULL when it keeps none. To be freed. */
static CHECK_UNUSED uint16_t *residual_of(const plora_model *model, int32_t weight)
{
    const plora_matrix residual = plora__residual_matrix(&model->weights[weight]);
    if (residual.data == NULL) return NULL;
    const size_t row = (size_t)residual.columns * sizeof(uint16_t);
    uint16_t *copy = calloc((size_t)residual.rows, row);
    CHECK(copy != NULL, "the test itself is out of memory");
    for (int64_t i = 0; i < residual.rows; ++i)
        device_transfer(copy + i * residual.columns, (uint16_t *)residual.data + i * residual.stride, row);
    return copy;
}

/* Whether two models' weights keep the same residuals. */
static CHECK_UNUSED int same_residuals(const plora_model *a, const plora_model *b)
{
    int same = a->weight_count == b->weight_count;
    for (int32_t i = 0; same && i < a->weight_count; ++i) {
        const plora_matrix *matrix = &a->weights[i].matrix;
        uint16_t *x = residual_of(a, i), *y = residual_of(b, i);
        same = (x == NULL) == (y == NULL) &&
               (x == NULL || memcmp(x, y, (size_t)(matrix->rows * matrix->columns) * sizeof *x) == 0);
        free(x);
        free(y);
    }
    return same;
}

#endif
