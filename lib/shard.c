/* shard.c: the place of a weight in a larger one, of which this process holds a part (plora_shard).
 *
 *     whole W[rows, columns]     . . . . . . .        random numbers are keyed by the element's number in the whole, in the order of
 *                                . . w w w . .        the memory of W, [N,K] or [K,N]; those of A and of a dropout mask by
 *                                . . w w w . .        r * columns + first_column + k, and likewise
 *
 * Here is only arithmetic of places. What they mean for products and unloads: linear.c, adapters.c, residual.c, unload.c. */
#include "handles.h"

plora_status plora__shard_place(const plora_shard *given, const plora_matrix *matrix, int fan_in_fan_out,
                                const char *name, plora_shard *shard)
{
    const int64_t rows = fan_in_fan_out ? matrix->columns : matrix->rows;
    const int64_t columns = fan_in_fan_out ? matrix->rows : matrix->columns;
    *shard = *given;
    if (given->rows == 0 && given->columns == 0 && given->first_row == 0 && given->first_column == 0)
        *shard = (plora_shard){0, 0, rows, columns};
    PLORA_CHECK(shard->first_row >= 0 && shard->rows >= rows && shard->first_row <= shard->rows - rows &&
                    shard->first_column >= 0 && shard->columns >= columns &&
                    shard->first_column <= shard->columns - columns,
                PLORA_ERROR_SHAPE,
                "layer '%s': the shard [N=%lld,K=%lld] from row %lld, column %lld on exceeds the whole [N=%lld,K=%lld]",
                name, (long long)rows, (long long)columns, (long long)shard->first_row, (long long)shard->first_column,
                (long long)shard->rows, (long long)shard->columns);
    PLORA_CHECK(shard->rows <= INT64_MAX / 4 / shard->columns, PLORA_ERROR_SHAPE,
                "layer '%s': the whole [N=%lld,K=%lld] has more than 2^61 elements", name, (long long)shard->rows,
                (long long)shard->columns);
    return PLORA_OK;
}

static int same_shard(const plora_shard *a, const plora_shard *b)
{
    return a->first_row == b->first_row && a->first_column == b->first_column && a->rows == b->rows &&
           a->columns == b->columns;
}

int plora__shard_is_whole(const struct plora__weight *weight)
{
    const plora_matrix *matrix = &weight->matrix;
    return weight->shard.rows == (weight->fan_in_fan_out ? matrix->columns : matrix->rows) &&
           weight->shard.columns == (weight->fan_in_fan_out ? matrix->rows : matrix->columns);
}

plora_shard plora__shard_given(const struct plora__weight *weight)
{
    return plora__shard_is_whole(weight) ? (plora_shard){0, 0, 0, 0} : weight->shard;
}

int64_t plora__shard_first_column(const struct plora__weight *weight)
{
    return weight->gathered ? 0 : weight->shard.first_column;
}

void plora__shard_elements(const struct plora__weight *weight, int64_t *first_element, int64_t *row_elements)
{
    const plora_shard *shard = &weight->shard;
    *row_elements = weight->fan_in_fan_out ? shard->rows : shard->columns;
    *first_element = weight->fan_in_fan_out ? shard->first_column * shard->rows + shard->first_row
                                            : shard->first_row * shard->columns + shard->first_column;
}

int64_t plora__rank_most(const plora_model *model, const struct plora__layer *layer)
{
    const plora_shard *shard = &model->weights[layer->weight].shard;
    return shard->rows < shard->columns ? shard->rows : shard->columns;
}

plora_status plora__shard_same(const plora_model *model, int32_t weight, const char *name, const plora_shard *shard,
                               int gathered)
{
    const struct plora__weight *other = &model->weights[weight];
    PLORA_CHECK(same_shard(&other->shard, shard) && other->gathered == gathered, PLORA_ERROR_INVALID_ARGUMENT,
                "layer '%s': its weight is that of layer '%s', but not as the same shard", name,
                model->layers[other->first_layer].name);
    return PLORA_OK;
}
