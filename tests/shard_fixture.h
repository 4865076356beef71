/* shard_fixture.h: a whole weight W[N,K] and pieces of it, each a model of its own with the layer as number SHARD_LAYER in both, so
 * that their random numbers have the same keys. */
#ifndef PLORA_TESTS_SHARD_FIXTURE_H
#define PLORA_TESTS_SHARD_FIXTURE_H

#include "linear_fixture.h"
#include "residual_fixture.h"

enum { SHARD_LAYER = 1 };

/* A part of a whole, in terms of W[N,K]. */
struct part {
    int64_t first_row, first_column, rows, columns;
};

struct piece {
    struct part part;
    int gathered, fan_in_fan_out;
    struct check_matrix other, w;
    plora_model *model;
    plora_adapters *adapters;
    plora_adapter adapter; /* on CUDA, mirrors of it */
    float scale;
    plora_unload_layer report;
    char text[256];
};

struct whole {
    int64_t n, k;
    int32_t rank, dtype, init, rounding, residual;
    int fan_in_fan_out;
    double dropout, alpha; /* alpha 0 = rank */
    uint64_t seed;
    const double *values; /* W[n,k], numbers of the dtype */
    const float *a, *b;   /* for piece_set_factors() */
    double *own_values;   /* of whole_create(), as are the next */
    float *own_a, *own_b;
    struct piece *all;
};

static CHECK_UNUSED void *piece_element(const struct piece *piece, int64_t i, int64_t j)
{
    const plora_matrix *m = &piece->w.m;
    return (char *)m->data +
           (size_t)(piece->fan_in_fan_out ? j * m->stride + i : i * m->stride + j) * plora__dtype_size(m->dtype);
}

static CHECK_UNUSED plora_linear piece_linear(const struct whole *whole, struct piece *piece)
{
    const struct part *p = &piece->part;
    const int is_whole = p->rows == whole->n && p->columns == whole->k;
    plora_linear linear = PLORA_LINEAR_INIT;
    linear.name = "block.layer";
    linear.weight = device_matrix(piece->w.m);
    linear.flags =
        (whole->fan_in_fan_out ? PLORA_LAYER_FAN_IN_FAN_OUT : 0) | (piece->gathered ? PLORA_LAYER_GATHERED : 0);
    if (!is_whole) linear.shard = (plora_shard){p->first_row, p->first_column, whole->n, whole->k};
    return linear;
}

static CHECK_UNUSED void piece_fill(const struct whole *whole, struct piece *piece)
{
    const struct part *p = &piece->part;
    const int64_t rows = whole->fan_in_fan_out ? p->columns : p->rows,
                  columns = whole->fan_in_fan_out ? p->rows : p->columns;
    piece->other = check_matrix_new(9, 9, 9, PLORA_F32);
    piece->w = check_matrix_new(rows, columns, columns + check_integer(0, 5), whole->dtype);
    for (int64_t i = 0; i < p->rows; ++i)
        for (int64_t j = 0; j < p->columns; ++j)
            plora__store(piece_element(piece, i, j), 0, whole->dtype,
                         (float)whole->values[(p->first_row + i) * whole->k + p->first_column + j]);
    device_refresh(piece->w.memory);
}

static CHECK_UNUSED plora_adapters_options piece_options(const struct whole *whole)
{
    plora_adapters_options options = PLORA_ADAPTERS_OPTIONS_INIT;
    options.rank = whole->rank;
    options.alpha = whole->alpha != 0 ? whole->alpha : whole->rank;
    options.dropout = whole->dropout;
    options.seed = whole->seed;
    options.init = whole->init;
    options.residual = whole->residual;
    options.targets = "block.layer";
    options.workspace_tokens = 16; /* more than any test has */
    return options;
}

static CHECK_UNUSED struct piece *piece_create(plora_context *context, const struct whole *whole,
                                               const struct part *part, int gathered)
{
    struct piece *piece = calloc(1, sizeof *piece);
    CHECK(piece != NULL, "the test itself is out of memory");
    piece->part = *part;
    piece->gathered = gathered;
    piece->fan_in_fan_out = whole->fan_in_fan_out;
    snprintf(piece->text, sizeof piece->text,
             "[%lld,%lld] at %lld,%lld of [%lld,%lld], R=%d, %s, fan_in_fan_out %d, "
             "gathered %d, rounding %d, init %d",
             (long long)part->rows, (long long)part->columns, (long long)part->first_row, (long long)part->first_column,
             (long long)whole->n, (long long)whole->k, whole->rank, plora__dtype_name(whole->dtype),
             whole->fan_in_fan_out, gathered, whole->rounding, whole->init);
    piece_fill(whole, piece);
    CHECK_OK(plora_model_create(context, &piece->model));
    CHECK_OK(check_add_linear(piece->model, "other", &piece->other.m, NULL, 0, 0, NULL));
    const plora_linear linear = piece_linear(whole, piece);
    int32_t layer;
    CHECK_OK(plora_model_add_linear(piece->model, &linear, &layer));
    assert_int_equal(layer, SHARD_LAYER);
    const plora_adapters_options options = piece_options(whole);
    CHECK_OK(plora_adapters_create(piece->model, &options, &piece->adapters));
    piece->adapter = (plora_adapter)PLORA_ADAPTER_INIT;
    CHECK_OK(plora_adapters_layer(piece->adapters, SHARD_LAYER, &piece->adapter));
    piece->scale = (float)piece->adapter.scale;
    fixture_mirror(&piece->adapter);
    return piece;
}

static CHECK_UNUSED void piece_free(struct piece *piece)
{
    fixture_forget(&piece->adapter);
    plora_adapters_destroy(piece->adapters);
    plora_model_destroy(piece->model);
    check_matrix_free(&piece->other);
    check_matrix_free(&piece->w);
    free(piece);
}

/* Its part of the whole's A and B, in the host's copy. */
static CHECK_UNUSED void piece_set_factors(const struct whole *whole, struct piece *piece)
{
    const struct part *p = &piece->part;
    const int64_t row = piece->gathered ? 0 : p->first_row, column = piece->gathered ? 0 : p->first_column;
    const int64_t n = piece->adapter.b.rows, k = piece->adapter.a.columns;
    for (int64_t r = 0; r < whole->rank; ++r)
        memcpy((float *)piece->adapter.a.data + r * k, whole->a + r * whole->k + column, (size_t)k * sizeof(float));
    memcpy(piece->adapter.b.data, whole->b + row * whole->rank, (size_t)(n * whole->rank) * sizeof(float));
}

/* The weight of a piece, and its residual, are that part of the whole's, bit for bit. */
static CHECK_UNUSED void piece_check_weight(const struct whole *whole, const struct piece *all,
                                            const struct piece *piece)
{
    const struct part *p = &piece->part;
    uint16_t *residual = residual_of(piece->model, SHARD_LAYER), *there = residual_of(all->model, SHARD_LAYER);
    CHECK((residual == NULL) == (there == NULL), "one has a residual, one has not: %s", piece->text);
    for (int64_t i = 0; i < p->rows; ++i)
        for (int64_t j = 0; j < p->columns; ++j) {
            const void *got = piece_element(piece, i, j),
                       *want = piece_element(all, p->first_row + i, p->first_column + j);
            CHECK(memcmp(got, want, plora__dtype_size(whole->dtype)) == 0,
                  "W[%lld,%lld] is %.9g, of the whole %.9g: %s", (long long)i, (long long)j,
                  (double)plora__load(got, 0, whole->dtype), (double)plora__load(want, 0, whole->dtype), piece->text);
            if (residual == NULL) continue;
            const int turned = whole->fan_in_fan_out;
            const uint16_t low = residual[turned ? j * p->rows + i : i * p->columns + j];
            const int64_t row = p->first_row + i, column = p->first_column + j;
            const uint16_t whole_low = there[turned ? column * whole->n + row : row * whole->k + column];
            CHECK(low == whole_low, "residual[%lld,%lld] is 0x%04x, of the whole 0x%04x: %s", (long long)i,
                  (long long)j, low, whole_low, piece->text);
        }
    free(residual);
    free(there);
}

/* Random contents, and the whole as a piece. */
static CHECK_UNUSED void whole_create(plora_context *context, struct whole *whole)
{
    const int64_t n = whole->n, k = whole->k, rank = whole->rank;
    whole->seed = check_next();
    whole->values = whole->own_values = fixture_doubles(n * k);
    whole->a = whole->own_a = calloc((size_t)(rank * k), sizeof(float));
    whole->b = whole->own_b = calloc((size_t)(rank * n), sizeof(float));
    CHECK(whole->a != NULL && whole->b != NULL, "the test itself is out of memory");
    for (int64_t i = 0; i < n * k; ++i) {
        float number;
        plora__store(&number, 0, whole->dtype, (float)check_uniform());
        whole->own_values[i] = plora__load(&number, 0, whole->dtype);
    }
    for (int64_t i = 0; i < rank * k; ++i)
        whole->own_a[i] = (float)(0.1 * check_uniform());
    for (int64_t i = 0; i < rank * n; ++i)
        whole->own_b[i] = (float)(0.1 * check_uniform());
    const struct part part = {0, 0, n, k};
    whole->all = piece_create(context, whole, &part, 0);
}

static CHECK_UNUSED void whole_free(struct whole *whole)
{
    piece_free(whole->all);
    free(whole->own_values);
    free(whole->own_a);
    free(whole->own_b);
}

#endif
