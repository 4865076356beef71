/* mma.c: the tensor cores. Lane l = 4g + t holds (PTX ISA, "Matrix fragments for mma")
 *
 *     m16n8k16, k8 of 16-bit numbers          m16n8k8, k4 of tf32
 *     A  reg r: row g + 8 (r & 1),            A  reg r: row g + 8 (r & 1),
 *               k = 8 (r >> 1) + 2t, 2t + 1             k = 4 (r >> 1) + t
 *     B  reg r: column g, k = 8r + 2t, 2t + 1 B  reg r: column g, k = 4r + t
 *     C, D  reg r: row g + 8 (r >> 1), column 2t + (r & 1)
 *
 * so a register of A or B, its 32 lanes in memory order, is a matrix of 8 rows with k along them. Products are exact, sums in
 * fp32. Of a tf32 operand the hardware reads the upper 19 bits. */
#include "lanes.h"

#include <string.h>

/* One register as 8 rows of `k` numbers, k = 8 or for tf32 4. */
static void numbers(const u32 *reg, enum number type, float *to)
{
    if (type == F16) {
        uint16_t half[2 * LANES];
        memcpy(half, reg, sizeof half);
        f16_values(half, to, 2 * LANES);
        return;
    }
    uint32_t bits[2 * LANES];
    const int count = type == TF32 ? LANES : 2 * LANES;
    if (type == TF32)
        for (int i = 0; i < LANES; ++i)
            bits[i] = reg[i] & 0xffffe000u;
    else
        for (int i = 0; i < LANES; ++i) {
            bits[2 * i] = reg[i] << 16;
            bits[2 * i + 1] = reg[i] & 0xffff0000u;
        }
    memcpy(to, bits, sizeof *bits * (size_t)count);
}

typedef float row8 __attribute__((vector_size(32)));

/* c[16][8] += a[16][k] b[8][k]^T, where k is cut in pieces: a[2p], a[2p + 1] and b[p] are the pieces p of 8 rows each. Products
 * of such short numbers fit in fp32, so that multiply and add are one rounding. */
static inline void multiply(int pieces, int piece, float a[8][64], float b[4][64], float *c)
{
    row8 column[16];
    for (int p = 0; p < pieces; ++p)
        for (int k = 0; k < piece; ++k)
            for (int j = 0; j < 8; ++j)
                column[p * piece + k][j] = b[p][j * piece + k];
    for (int row = 0; row < 16; ++row) {
        row8 sum;
        memcpy(&sum, c + 8 * row, sizeof sum);
        for (int p = 0; p < pieces; ++p)
            for (int k = 0; k < piece; ++k)
                sum += a[2 * p + row / 8][row % 8 * piece + k] * column[p * piece + k];
        memcpy(c + 8 * row, &sum, sizeof sum);
    }
}

static void whole_warp(struct warp *warp, uint32_t mask)
{
    if (mask != FULL)
        fault_at(warp, mask ? __builtin_ctz(mask) : 0, 719, "divergent warp", "active lanes: 0x%08x", mask);
}

void exec_mma(struct warp *warp, const struct op *op, uint32_t mask)
{
    whole_warp(warp, mask);
    float a[8][64], b[4][64], c[16 * 8];
    const int a_regs = op->count, b_regs = a_regs / 2;
    const uint32_t *list = op->list + 4;
    for (int r = 0; r < a_regs; ++r)
        numbers(lane_reg(warp, *list++), op->kind, a[r]);
    for (int r = 0; r < b_regs; ++r)
        numbers(lane_reg(warp, *list++), op->kind, b[r]);
    for (int half = 0; half < 2; ++half) {
        const f32 *even = lane_reg(warp, list[2 * half]), *odd = lane_reg(warp, list[2 * half + 1]);
        for (int lane = 0; lane < LANES; ++lane) {
            c[64 * half + 2 * lane] = even[lane];
            c[64 * half + 2 * lane + 1] = odd[lane];
        }
    }
    if (op->kind == TF32)
        b_regs == 2 ? multiply(2, 4, a, b, c) : multiply(1, 4, a, b, c);
    else
        b_regs == 2 ? multiply(2, 8, a, b, c) : multiply(1, 8, a, b, c);
    for (int half = 0; half < 2; ++half) {
        f32 *even = lane_reg(warp, op->list[2 * half]), *odd = lane_reg(warp, op->list[2 * half + 1]);
        for (int lane = 0; lane < LANES; ++lane) {
            even[lane] = c[64 * half + 2 * lane];
            odd[lane] = c[64 * half + 2 * lane + 1];
        }
    }
}

/* Lane 8m + r gives the address of row r of matrix m; lane l gets of each matrix the numbers 2t, 2t + 1 of row g, or transposed
 * number g of rows 2t, 2t + 1. */
void exec_ldmatrix(struct warp *warp, const struct op *op, uint32_t mask)
{
    whole_warp(warp, mask);
    uint16_t matrix[4][8][8] = {0};
    for (int i = 0; i < 8 * op->count; ++i) {
        uint64_t address = op->wide & 2 ? REG(1, u64)[i] + (uint64_t)op->immediate
                                        : (uint32_t)(REG(1, u32)[i] + (uint32_t)op->immediate);
        if (WINDOW(address) == SHARED_WINDOW) address -= SHARED_WINDOW;
        memcpy(matrix[i / 8][i % 8], access_bytes(warp, i, SHARED, address, 16, USE_READ, NULL), 16);
    }
    for (int m = 0; m < op->count; ++m) {
        if (op->list[m] == SINK) continue;
        u32 *d = lane_reg(warp, op->list[m]);
        for (int lane = 0; lane < LANES; ++lane) {
            const int g = lane / 4, t = lane % 4;
            const uint16_t low = op->flags ? matrix[m][2 * t][g] : matrix[m][g][2 * t];
            const uint16_t high = op->flags ? matrix[m][2 * t + 1][g] : matrix[m][g][2 * t + 1];
            d[lane] = low | (uint32_t)high << 16;
        }
    }
}
