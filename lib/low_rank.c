/* low_rank.c: see low_rank.h.
 *
 * Many factors, such as hundreds of momentum unloads each close to the last, are folded: when the panels hold twice what the last
 * fold left (and BLOCK columns at least), Q_L U diag(sigma) and Q_P V take their place, without what is below fp32 rounding. So r
 * stays within twice the rank that D really has, and the work within a constant of one factorisation of that size.
 *
 *     panel L:  [ left diag(sigma) of the last fold | f_i B_i | f_(i+1) B_(i+1) | .. room .. ]        column by column */
#include "low_rank.h"

#include <cblas.h>
#include <lapacke.h>
#include <math.h>
#include <string.h>

enum { BLOCK = 256, CORE_BLOCK = 64, LAPACK_BLOCK = 64, CORE_MAX = 20000 };

/* Relative to |D|: what a fold may drop, half a unit of fp32; and what is rounding of the double arithmetic in any case. */
static const double fold_tolerance = 0x1p-25, noise = 0x1p-44;

static int64_t smaller(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static int64_t larger(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

static int integer(int64_t count)
{
    return (int)smaller(count, INT32_MAX);
}

int64_t plora__low_rank_sum(const struct plora__factors *factors, int64_t count)
{
    int64_t sum = 0;
    for (int64_t i = 0; i < count; ++i)
        sum += factors[i].rank;
    return sum;
}

/* ----------------------------------------------------------------------------------------------------------- workspace */

struct space {
    double *base; /* NULL: only counted */
    int64_t used;
};

static double *take(struct space *space, int64_t count)
{
    double *piece = space->base == NULL ? NULL : space->base + space->used;
    space->used += count;
    return piece;
}

static int64_t lay_out(struct plora__low_rank *w, void *workspace)
{
    struct space space = {workspace, 0};
    const int64_t n = w->rows, k = w->columns, c = w->capacity;
    const int64_t core_rows = smaller(n, c), core_columns = smaller(k, c), p = smaller(core_rows, core_columns);
    const int64_t svd = 4 * p * p + 7 * p + LAPACK_BLOCK * (core_rows + core_columns);
    const int64_t qr = LAPACK_BLOCK * (c + LAPACK_BLOCK + 1), product = CORE_BLOCK * (core_rows + core_columns);
    w->work_count = larger(larger(svd, qr), product);
    w->panels[0] = take(&space, n * c);
    w->panels[1] = take(&space, k * c);
    w->tau[0] = take(&space, core_rows);
    w->tau[1] = take(&space, core_columns);
    w->left = take(&space, n * p);
    w->right = take(&space, k * p);
    w->sigma = take(&space, p);
    w->core = take(&space, core_rows * core_columns);
    w->u = take(&space, core_rows * p);
    w->vt = take(&space, p * core_columns);
    w->work = take(&space, w->work_count);
    w->integers = (int *)take(&space, 8 * p);
    return space.used;
}

size_t plora__low_rank_prepare(struct plora__low_rank *low_rank, int64_t rows, int64_t columns,
                               const struct plora__factors *factors, int64_t count)
{
    const int64_t least = smaller(rows, columns);
    int64_t widest = 0;
    for (int64_t i = 0; i < count; ++i)
        widest = larger(widest, factors[i].rank);
    *low_rank = (struct plora__low_rank){.rows = rows, .columns = columns};
    low_rank->capacity = smaller(plora__low_rank_sum(factors, count), larger(larger(BLOCK, 2 * least), least + widest));
    if (smaller(least, low_rank->capacity) > CORE_MAX || larger(rows, columns) > INT32_MAX) return 0;
    return ((size_t)lay_out(low_rank, NULL) + 1) * sizeof(double); /* + 1: never 0, which is the error */
}

/* ------------------------------------------------------------------------------------------------------- factorisation */

/* Appends f B and A^T to the panels. */
static void append(struct plora__low_rank *w, const struct plora__factors *factors)
{
    double *left = w->panels[0] + w->used * w->rows, *right = w->panels[1] + w->used * w->columns;
    for (int64_t i = 0; i < w->rows; ++i)
        for (int64_t j = 0; j < factors->rank; ++j)
            left[j * w->rows + i] = factors->factor * (double)factors->b[i * factors->rank + j];
    for (int64_t i = 0; i < factors->rank * w->columns; ++i)
        right[i] = factors->a[i];
    w->used += factors->rank;
}

static int factorise(struct plora__low_rank *w, int side)
{
    const int64_t rows = side == 0 ? w->rows : w->columns;
    return LAPACKE_dgeqrf_work(LAPACK_COL_MAJOR, (int)rows, (int)w->used, w->panels[side], (int)rows, w->tau[side],
                               w->work, integer(w->work_count));
}

/* Columns begin .. end of the upper triangle in a panel, with its zeros; rows_used of each can be other than 0. */
static void copy_triangle(const double *panel, int64_t rows, int64_t begin, int64_t end, int64_t rows_used,
                          double *copy)
{
    for (int64_t j = begin; j < end; ++j)
        for (int64_t i = 0; i < rows_used; ++i)
            copy[(j - begin) * rows_used + i] = i <= j ? panel[j * rows + i] : 0.0;
}

/* core = R_L R_P^T, a block of columns of both triangles at a time. */
static void multiply_core(struct plora__low_rank *w, int64_t core_rows, int64_t core_columns)
{
    memset(w->core, 0, (size_t)(core_rows * core_columns) * sizeof *w->core);
    for (int64_t begin = 0; begin < w->used; begin += CORE_BLOCK) {
        const int64_t end = smaller(begin + CORE_BLOCK, w->used);
        const int64_t left_rows = smaller(end, core_rows), right_rows = smaller(end, core_columns);
        double *left = w->work, *right = w->work + CORE_BLOCK * left_rows;
        copy_triangle(w->panels[0], w->rows, begin, end, left_rows, left);
        copy_triangle(w->panels[1], w->columns, begin, end, right_rows, right);
        cblas_dgemm(CblasColMajor, CblasNoTrans, CblasTrans, (int)left_rows, (int)right_rows, (int)(end - begin), 1.0,
                    left, (int)left_rows, right, (int)right_rows, 1.0, w->core, (int)core_rows);
    }
}

/* The smallest rank behind which at most `tolerance` is lost; *tail becomes what is. */
static int64_t cut(const double *sigma, int64_t count, double tolerance, double *tail)
{
    double sum = 0.0;
    while (count > 0 && sqrt(sum + sigma[count - 1] * sigma[count - 1]) <= tolerance) {
        --count;
        sum += sigma[count] * sigma[count];
    }
    *tail = sqrt(sum);
    return count;
}

/* result[rows,rank] = Q [vectors; 0]. Element i of vector j is vectors[i * step + j * stride]. */
static int expand(struct plora__low_rank *w, int side, const double *vectors, int64_t step, int64_t stride,
                  double *result)
{
    const int64_t rows = side == 0 ? w->rows : w->columns, core_rows = smaller(rows, w->used);
    memset(result, 0, (size_t)(rows * w->rank) * sizeof *result);
    for (int64_t j = 0; j < w->rank; ++j)
        for (int64_t i = 0; i < core_rows; ++i)
            result[j * rows + i] = vectors[i * step + j * stride];
    if (w->rank == 0) return 0;
    return LAPACKE_dormqr_work(LAPACK_COL_MAJOR, 'L', 'N', (int)rows, (int)w->rank, (int)core_rows, w->panels[side],
                               (int)rows, w->tau[side], result, (int)rows, w->work, integer(w->work_count));
}

/* Panels -> left, sigma, right, of the smallest rank that loses at most tolerance |D| - spent, but `rank` at most. */
static int decompose(struct plora__low_rank *w, int64_t rank, double tolerance, double spent)
{
    const int64_t core_rows = smaller(w->rows, w->used), core_columns = smaller(w->columns, w->used);
    const int64_t count = smaller(core_rows, core_columns);
    double tail;
    w->rank = 0;
    w->norm = 0.0;
    if (count == 0) return 0;
    int info = factorise(w, 0);
    if (info == 0) info = factorise(w, 1);
    if (info != 0) return info;
    multiply_core(w, core_rows, core_columns);
    info =
        LAPACKE_dgesdd_work(LAPACK_COL_MAJOR, 'S', (int)core_rows, (int)core_columns, w->core, (int)core_rows, w->sigma,
                            w->u, (int)core_rows, w->vt, (int)count, w->work, integer(w->work_count), w->integers);
    if (info != 0) return info;
    (void)cut(w->sigma, count, INFINITY, &w->norm);
    w->rank = cut(w->sigma, count, fmax(noise * w->norm, tolerance * w->norm - spent), &tail);
    if (rank > 0 && rank < w->rank) {
        w->rank = rank;
        (void)cut(w->sigma + rank, count - rank, INFINITY, &tail);
    }
    w->lost += tail;
    info = expand(w, 0, w->u, 1, core_rows, w->left);
    return info != 0 ? info : expand(w, 1, w->vt, count, 1, w->right);
}

static int fold(struct plora__low_rank *w)
{
    const int info = decompose(w, 0, fold_tolerance, 0.0);
    if (info != 0) return info;
    for (int64_t j = 0; j < w->rank; ++j)
        for (int64_t i = 0; i < w->rows; ++i)
            w->panels[0][j * w->rows + i] = w->left[j * w->rows + i] * w->sigma[j];
    memcpy(w->panels[1], w->right, (size_t)(w->rank * w->columns) * sizeof *w->right);
    w->used = w->folded = w->rank;
    return 0;
}

int plora__low_rank_compute(struct plora__low_rank *low_rank, const struct plora__factors *factors, int64_t count,
                            int64_t rank, double max_error, void *workspace)
{
    struct plora__low_rank *w = low_rank;
    (void)lay_out(w, workspace);
    w->used = w->folded = 0;
    w->lost = 0.0;
    for (int64_t i = 0; i < count; ++i) {
        const int full = w->used + factors[i].rank > larger(BLOCK, 2 * w->folded);
        const int info = full && w->used > w->folded ? fold(w) : 0;
        if (info != 0) return info;
        append(w, &factors[i]);
    }
    return decompose(w, rank, max_error, w->lost);
}

void plora__low_rank_store(const struct plora__low_rank *low_rank, float *a, float *b)
{
    const struct plora__low_rank *w = low_rank;
    for (int64_t j = 0; j < w->rank; ++j) {
        const double root = sqrt(w->sigma[j]);
        for (int64_t i = 0; i < w->rows; ++i)
            b[i * w->rank + j] = (float)(root * w->left[j * w->rows + i]);
        for (int64_t i = 0; i < w->columns; ++i)
            a[j * w->columns + i] = (float)(root * w->right[j * w->columns + i]);
    }
}
