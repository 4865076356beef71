/* low_rank.h: a sum of many low-rank products as one product of a smaller rank.
 *
 *     D = sum f_i B_i A_i = L P^T,   L = [f_1 B_1 .. f_S B_S]  [N,r],   P^T = [A_1; ..; A_S]  [r,K],   r the sum of the ranks
 *     L = Q_L R_L,   P = Q_P R_P                      two thin QR factorisations
 *     R_L R_P^T = U diag(sigma) V^T                   the SVD of the small core
 *     D = (Q_L U) diag(sigma) (Q_P V)^T               cut after rank k: |D - D_k|^2 = sum of sigma_j^2, j > k, the least possible
 *
 * Norms are Frobenius norms. All in double, by LAPACK; nothing of N x K is formed unless r exceeds both. The functions neither
 * allocate nor leave messages, so that they may run on any thread. */
#ifndef PLORA_LOW_RANK_H
#define PLORA_LOW_RANK_H

#include <stddef.h>
#include <stdint.h>

/* factor * B A on the host: A[rank,K], B[N,rank], dense. */
struct plora__factors {
    const float *a, *b;
    int64_t rank;
    double factor;
};

struct plora__low_rank {
    int64_t rows, columns; /* N, K */
    /* The result, column by column: left[N,rank] and right[K,rank] orthonormal, sigma[rank] decreasing. */
    double *left, *right, *sigma;
    int64_t rank;
    double norm, lost; /* |D|, and |D - result| at most */
    /* Its making. */
    double *panels[2], *tau[2]; /* L[N,capacity] and P[K,capacity] column by column, later their QR factorisations */
    int64_t capacity, used, folded; /* columns: that there is room for, in use, left by the last fold */
    double *core, *u, *vt, *work;
    int *integers;
    int64_t work_count;
};

/* The rank that the stacked factors have. */
int64_t plora__low_rank_sum(const struct plora__factors *factors, int64_t count);

/* Prepares for the factors of a layer: returns the bytes of workspace (aligned as a double) that it takes, 0 when the core is
 * too large for LAPACK's 32-bit integers. */
size_t plora__low_rank_prepare(struct plora__low_rank *low_rank, int64_t rows, int64_t columns,
                               const struct plora__factors *factors, int64_t count);

/* Computes the smallest rank whose error is at most max_error |D|, but `rank` at most (0 = no bound). The result lies in the
 * workspace. Returns 0, or what LAPACK says when its SVD did not converge. */
int plora__low_rank_compute(struct plora__low_rank *low_rank, const struct plora__factors *factors, int64_t count,
                            int64_t rank, double max_error, void *workspace);

/* A[rank,K] and B[N,rank] of the result, sqrt(sigma) on either side, rounded to fp32. */
void plora__low_rank_store(const struct plora__low_rank *low_rank, float *a, float *b);

#endif
