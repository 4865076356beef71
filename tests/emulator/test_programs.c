/* test_programs.c: whole kernels (kernels/programs.cu) against C on the host: divergence, local arrays, fp64, warps, blocks,
 * atomics, the last-block pattern, loads and stores of every width. None of them may cause a finding. */
#include "kernel_tests.h"

#include "kernels/programs.h"

struct program_params {
    const uint64_t *in;
    uint64_t *out;
    int count;
};

enum { COUNT = 2000 };

static void *in, *out;
static uint64_t host_in[8 * COUNT], host_out[8 * COUNT];

static void launch(const char *name, dim3 grid, dim3 block, size_t shared, int count)
{
    struct program_params params = {in, out, count};
    CUDA_OK(cu.cudaMemcpy(in, host_in, sizeof host_in, cudaMemcpyHostToDevice));
    CUDA_OK(cu.cudaMemset(out, 0xff, sizeof host_out));
    CHECK_CUDA(kernels_launch(name, grid, block, shared, &params), cudaSuccess);
    device_read(host_out, out, sizeof host_out);
}

/* ----------------------------------------------------------------------------------------------------------- one thread */
#define ENTRY(name) {#name, name},
static const struct {
    const char *name;
    uint64_t (*run)(uint64_t);
} programs[] = {PROGRAMS(ENTRY)};

static void test_threads(void **state)
{
    (void)state;
    for (int p = 0; p < CHECK_COUNT(programs); ++p) {
        char name[64];
        snprintf(name, sizeof name, "program_%s", programs[p].name);
        for (int i = 0; i < COUNT; ++i)
            host_in[i] = check_next() >> (check_integer(0, 3) ? 0 : check_integer(0, 63));
        const unsigned block = (unsigned)check_integer(1, 300);
        launch(name, (dim3){(COUNT + block - 1) / block, 1, 1}, (dim3){block, 1, 1}, 0, COUNT);
        for (int i = 0; i < COUNT; ++i) {
            const uint64_t want = programs[p].run(host_in[i]);
            CHECK(host_out[i] == want, "%s(0x%" PRIx64 ") with blocks of %u: 0x%" PRIx64 ", want 0x%" PRIx64,
                  programs[p].name, host_in[i], block, host_out[i], want);
        }
        CHECK(host_out[COUNT] == UINT64_MAX, "%s wrote more than it should", programs[p].name);
    }
}

/* ------------------------------------------------------------------------------------------------------ warps and blocks */
static int number(int i)
{
    return (int)(int32_t)(uint32_t)host_in[i];
}

static void test_warps(void **state)
{
    (void)state;
    enum { WARPS = 15 };
    for (int i = 0; i < 32 * WARPS; ++i)
        host_in[i] = (uint64_t)check_integer(i / 32 % 2 ? 0 : -100, i / 32 % 3 ? 2000 : 150);
    launch("warp", (dim3){5, 1, 1}, (dim3){96, 1, 1}, 0, 0);
    for (int i = 0; i < 32 * WARPS; ++i) {
        const int first = i / 32 * 32, lane = i % 32;
        int sum = 0, prefix = 0, most = INT32_MIN, any = 0, all = 1;
        uint32_t odd = 0, bits = 0;
        for (int j = 0; j < 32; ++j) {
            const int x = number(first + j);
            sum += x;
            if (j <= lane) prefix += x;
            if (x > most) most = x;
            any |= x == 77;
            all &= x < 1000;
            odd |= (uint32_t)(x & 1) << j;
            bits |= (uint32_t)x;
        }
        const int next = number(lane % 8 + 3 < 8 ? i + 3 : i), fifth = number(first + lane / 16 * 16 + 5);
        const int half = lane < 10 ? number(i + 1) + 11 : lane == 10 ? number(first) + 11 : 0;
        const uint64_t *got = host_out + 8 * (size_t)i;
        CHECK(got[0] == (uint64_t)(int64_t)sum, "sum");
        CHECK(got[1] == (uint64_t)(int64_t)prefix, "prefix");
        CHECK(got[2] == (uint64_t)(int64_t)next, "shfl.down in segments of 8");
        CHECK(got[3] == (uint64_t)(int64_t)fifth, "shfl.idx in segments of 16");
        CHECK(got[4] == odd, "ballot");
        CHECK(got[5] == (uint64_t)(any | all << 1), "any, all: %d, want %d", (int)got[5], any | all << 1);
        CHECK((int)got[6] == half, "half a warp, lane %d: %d, want %d", lane, (int)got[6], half);
        CHECK((uint32_t)got[7] == ((uint32_t)sum ^ (uint32_t)most ^ bits), "redux");
    }
}

static void test_block(void **state)
{
    (void)state;
    static const uint64_t TABLE[] = {3, 5, 7, 11}, CONSTANTS[] = {100, 200, 300};
    for (int i = 0; i < 6 * 256; ++i)
        host_in[i] = i % 500 == 77 ? 12345 : check_next();
    launch("block", (dim3){3, 2, 1}, (dim3){8, 4, 8}, 256 * sizeof(uint64_t), 0);
    for (int i = 0; i < 6 * 256; ++i) {
        const int first = i / 256 * 256, t = i % 256;
        const uint64_t *x = host_in + first;
        uint64_t odd = 0, some = 0;
        for (int j = 0; j < 256; ++j)
            odd += x[j] & 1, some |= x[j] == 12345;
        const uint64_t pointed = x[t] % 3 == 0 ? x[(t + 7) % 256] : x[t] % 3 == 1 ? x[t] + (x[t] >> 2 & 1) : x[t];
        const uint64_t want = (uint32_t)x[255 - t] + ((uint64_t)(uint8_t)(x[255 - t] >> 32) << 32) + (x[t ^ 33] << 1) +
                              odd + 1000 + 2000 * some + pointed + TABLE[t & 3] + CONSTANTS[t % 3];
        CHECK(host_out[i] == want, "thread %d of block %d: 0x%" PRIx64 ", want 0x%" PRIx64, t, i / 256, host_out[i],
              want);
    }
}

/* ------------------------------------------------------------------------------------------------------------ the grid */
struct atomic_params {
    uint32_t *word;
    uint64_t *wide;
    float *number;
    double *precise;
    uint32_t *bins;
    const uint32_t *in;
    int count;
};

static void test_atomics(void **state)
{
    (void)state;
    enum { THREADS = 7 * 160 };
    static uint32_t x[THREADS];
    uint32_t word[10] = {0, ~0u, 0x80000000u, ~0u, 0, 0, 0, 0, 0, 0}, bins[16] = {0}, got_word[10], got_bins[16];
    uint64_t wide[3] = {0, 0, 0}, got_wide[3];
    float sum = 0, got_sum;
    double precise = 0, got_precise;
    for (int i = 0; i < THREADS; ++i)
        x[i] = (uint32_t)check_next() >> check_integer(0, 20);
    struct atomic_params p = {device_array(sizeof word, word),
                              device_array(sizeof wide, wide),
                              device_array(sizeof sum, &sum),
                              device_array(sizeof precise, &precise),
                              device_array(sizeof bins, bins),
                              device_array(sizeof x, x),
                              THREADS};
    CHECK_CUDA(kernels_launch("atomic", (dim3){7, 1, 1}, (dim3){160, 1, 1}, 0, &p), cudaSuccess);
    for (int i = 0; i < THREADS; ++i) {
        const uint64_t square = (uint64_t)x[i] * x[i];
        word[0] += x[i];
        if (x[i] < word[1]) word[1] = x[i];
        if ((int32_t)x[i] > (int32_t)word[2]) word[2] = x[i];
        word[3] &= x[i] | 0xff;
        word[4] |= x[i] & 0xff00;
        word[5] ^= x[i];
        word[6] = word[6] >= 1000 ? 0 : word[6] + 1;
        word[7] = word[7] == 0 || word[7] > 700 ? 700 : word[7] - 1;
        word[8] = 5;
        word[9] += 3;
        wide[0] += (uint64_t)x[i] << 20;
        if (square > wide[1]) wide[1] = square;
        if (-(int64_t)square < (int64_t)wide[2]) wide[2] = (uint64_t) - (int64_t)square;
        sum += (float)(x[i] & 7);
        precise += (double)x[i];
        ++bins[x[i] % 16];
    }
    device_read(got_word, p.word, sizeof word), device_read(got_wide, p.wide, sizeof wide);
    device_read(got_bins, p.bins, sizeof bins), device_read(&got_sum, p.number, sizeof sum);
    device_read(&got_precise, p.precise, sizeof precise);
    for (int i = 0; i < 10; ++i)
        CHECK(got_word[i] == word[i], "word %d: 0x%x, want 0x%x", i, got_word[i], word[i]);
    for (int i = 0; i < 3; ++i)
        CHECK(got_wide[i] == wide[i], "wide %d: 0x%" PRIx64 ", want 0x%" PRIx64, i, got_wide[i], wide[i]);
    for (int i = 0; i < 16; ++i)
        CHECK(got_bins[i] == bins[i], "bin %d: %u, want %u", i, got_bins[i], bins[i]);
    CHECK(got_sum == sum && got_precise == precise, "%g %g, want %g %g", (double)got_sum, got_precise, (double)sum,
          precise);
    void *all[] = {p.word, p.wide, p.number, p.precise, p.bins, (void *)(uintptr_t)p.in};
    for (int i = 0; i < CHECK_COUNT(all); ++i)
        CUDA_OK(cu.cudaFree(all[i]));
}

struct total_params {
    const float *in;
    float *partial, *total;
    unsigned *ticket;
    int64_t count;
};

static void test_last_block(void **state)
{
    (void)state;
    enum { NUMBERS = 40000 };
    static float x[NUMBERS];
    float zero = 0, total, want = 0;
    unsigned ticket = 0;
    for (int i = 0; i < NUMBERS; ++i)
        want += x[i] = (float)check_integer(-50, 50);
    struct total_params p = {device_array(sizeof x, x), device_array(sizeof(float) * 37, NULL), device_array(4, &zero),
                             device_array(4, &ticket), NUMBERS};
    for (int round = 0; round < 3; ++round) {
        CUDA_OK(cu.cudaMemset(p.total, 0, 4));
        CHECK_CUDA(kernels_launch("total", (dim3){37, 1, 1}, (dim3){256, 1, 1}, 0, &p), cudaSuccess);
        device_read(&total, p.total, 4);
        CHECK(total == want, "%g, want %g", (double)total, (double)want);
    }
    void *all[] = {(void *)(uintptr_t)p.in, p.partial, p.total, p.ticket};
    for (int i = 0; i < CHECK_COUNT(all); ++i)
        CUDA_OK(cu.cudaFree(all[i]));
}

struct vector_params {
    const void *in;
    void *out;
    int count;
};

static void test_vectors(void **state)
{
    (void)state;
    enum { UNITS = 333 };
    static uint8_t x[16 * UNITS], got[64 * UNITS];
    for (int i = 0; i < 16 * UNITS; ++i)
        x[i] = (uint8_t)check_next();
    struct vector_params p = {device_array(sizeof x, x), device_array(sizeof got, NULL), UNITS};
    CHECK_CUDA(kernels_launch("vector", (dim3){11, 1, 1}, (dim3){32, 1, 1}, 0, &p), cudaSuccess);
    device_read(got, p.out, sizeof got);
    /* Byte of the unit that each of the 64 bytes is; -1: of the sum. */
    static const int FROM[64] = {12, 13, 14, 15,  8, 9, 10, 11, 4, 5, 6, 7, 0,  1,  2,  3,  12, 13, 14, 15, 8, 9,
                                 10, 11, 11, 100, 4, 5, 8,  9,  6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0,  1,  2, 3,
                                 4,  5,  6,  7,   6, 7, 4,  5,  2, 3, 0, 1, 10, 8,  9,  11, -1, -1, -1, -1};
    for (int u = 0; u < UNITS; ++u) {
        const uint8_t *unit = x + 16 * (size_t)u;
        uint32_t first, second, sum;
        memcpy(&first, unit, 4), memcpy(&second, unit + 4, 4);
        sum = first + second;
        for (int i = 0; i < 64; ++i) {
            const uint8_t want = FROM[i] == 100 ? (unit[11] & 128 ? 255 : 0)
                                 : FROM[i] < 0  ? (uint8_t)(sum >> 8 * (i - 60))
                                                : unit[FROM[i]];
            CHECK(got[64 * (size_t)u + (size_t)i] == want, "unit %d, byte %d: %d, want %d", u, i,
                  got[64 * (size_t)u + (size_t)i], want);
        }
    }
    CUDA_OK(cu.cudaFree((void *)(uintptr_t)p.in));
    CUDA_OK(cu.cudaFree(p.out));
}

int main(void)
{
    check_begin("test_programs");
    const int status = each_path();
    if (status >= 0) return status;
    kernels_open("programs");
    in = device_array(sizeof host_in, NULL);
    out = device_array(sizeof host_out, NULL);
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_threads),    cmocka_unit_test(test_warps),
                                       cmocka_unit_test(test_block),      cmocka_unit_test(test_atomics),
                                       cmocka_unit_test(test_last_block), cmocka_unit_test(test_vectors)};
    const int failed = cmocka_run_group_tests(tests, NULL, NULL);
    cu.cudaFree(in);
    cu.cudaFree(out);
    kernels_close();
    return failed;
}
