/* ladder.h: what the kernel ladders share: loading, launching, timing, and the prediction.
 *
 * A ladder is one file compiled twice: by nvcc, which takes its kernels, and by the C compiler, which takes its steps,
 * its reference and main(). Each step is a kernel with an idea, and says what an element of the output costs it:
 *
 *     dram, l2    bytes from and to memory, and between L2 and the multiprocessors
 *     l1          bytes through a load/store unit: 128 for each row of banks, full or not, that a warp touches
 *     fma         operations of fp32, of which an fma is two
 *     tensor      operations of the tensor cores in tf32; of bf16 they do two in the time of one
 *
 * The predicted time is that of the slowest of the five on an H100 SXM, below; what is not in it (latency, waves,
 * instructions that are not operations) only adds.
 *
 *     program ladder.fatbin          small, odd shapes against the reference; also on the emulator
 *     program ladder.fatbin --time   the same, then large shapes, timed: for a GPU */
#ifndef PLORA_TESTS_LADDER_H
#define PLORA_TESTS_LADDER_H

#include <cuda_runtime_api.h>
#include <math.h>

#include "check.h"

/* Of an H100 SXM: memory 3.35 TB/s, fp32 67 and dense tf32 495 TFLOP/s by its data sheet, shared memory 128 bytes a
 * clock in each of 132 multiprocessors at 1.755 GHz; L2 as microbenchmarks have it. */
static const double ladder_dram = 3.35e12, ladder_l2 = 5.5e12, ladder_l1 = 128 * 132 * 1.755e9, ladder_fma = 67e12,
                    ladder_tensor = 495e12;

struct ladder_cost {
    double dram, l2, l1, fma, tensor; /* of one element of the output */
};

struct ladder_step {
    const char *kernel, *idea;
    unsigned threads;
    int rows, columns; /* of what the grid is laid over, in one block */
};

/* -------------------------------------------------------------------------------------------------------------
 * runtime */

static cudaLibrary_t ladder_library;

static CHECK_UNUSED void ladder_load(const char *path)
{
    FILE *file = fopen(path, "rb");
    CHECK(file != NULL, "%s cannot be opened", path);
    CHECK(fseek(file, 0, SEEK_END) == 0, "%s cannot be read", path);
    const long bytes = ftell(file);
    rewind(file);
    void *image = malloc((size_t)bytes);
    CHECK(image != NULL && fread(image, 1, (size_t)bytes, file) == (size_t)bytes, "%s cannot be read", path);
    fclose(file);
    DEVICE_CALL(cudaLibraryLoadData,
                (cudaLibrary_t *, const void *, enum cudaJitOption *, void **, unsigned, enum cudaLibraryOption *,
                 void **, unsigned),
                &ladder_library, image, NULL, NULL, 0, NULL, NULL, 0);
    free(image);
}

static CHECK_UNUSED void ladder_launch(const struct ladder_step *step, int64_t rows, int64_t columns,
                                       const void *params)
{
    const int64_t blocks = ((rows + step->rows - 1) / step->rows) * ((columns + step->columns - 1) / step->columns);
    cudaKernel_t kernel = NULL;
    DEVICE_CALL(cudaLibraryGetKernel, (cudaKernel_t *, cudaLibrary_t, const char *), &kernel, ladder_library,
                step->kernel);
    const cudaLaunchConfig_t config = {.gridDim = {(unsigned)blocks, 1, 1}, .blockDim = {step->threads, 1, 1}};
    void *arguments[1];
    memcpy(&arguments[0], &params, sizeof params);
    DEVICE_CALL(cudaLaunchKernelExC, (const cudaLaunchConfig_t *, const void *, void **), &config, kernel, arguments);
}

/* Seconds of one launch: the least of several runs of eight. */
static CHECK_UNUSED double ladder_seconds(const struct ladder_step *step, int64_t rows, int64_t columns,
                                          const void *params)
{
    enum { RUNS = 8, LAUNCHES = 8 };
    cudaEvent_t begin, end;
    DEVICE_CALL(cudaEventCreate, (cudaEvent_t *), &begin);
    DEVICE_CALL(cudaEventCreate, (cudaEvent_t *), &end);
    double least = INFINITY;
    for (int run = 0; run < RUNS; ++run) {
        float milliseconds = 0;
        DEVICE_CALL(cudaEventRecord, (cudaEvent_t, cudaStream_t), begin, NULL);
        for (int i = 0; i < LAUNCHES; ++i)
            ladder_launch(step, rows, columns, params);
        DEVICE_CALL(cudaEventRecord, (cudaEvent_t, cudaStream_t), end, NULL);
        DEVICE_CALL(cudaEventSynchronize, (cudaEvent_t), end);
        DEVICE_CALL(cudaEventElapsedTime, (float *, cudaEvent_t, cudaEvent_t), &milliseconds, begin, end);
        least = fmin(least, milliseconds / 1e3 / LAUNCHES);
    }
    DEVICE_CALL(cudaEventDestroy, (cudaEvent_t), begin);
    DEVICE_CALL(cudaEventDestroy, (cudaEvent_t), end);
    return least;
}

static CHECK_UNUSED int ladder_has_tensor_cores(void)
{
    int major = 0;
    DEVICE_CALL(cudaDeviceGetAttribute, (int *, enum cudaDeviceAttr, int), &major, cudaDevAttrComputeCapabilityMajor,
                0);
    return major >= 8;
}

/* Host memory with a twin on the device. */
static CHECK_UNUSED void *ladder_allocate(size_t bytes)
{
    void *memory = malloc(bytes);
    CHECK(memory != NULL, "the test itself is out of memory");
    memset(memory, CHECK_POISON, bytes);
    device_twin(memory, bytes);
    return memory;
}

static CHECK_UNUSED void *ladder_random(int64_t count, int32_t dtype)
{
    void *values = ladder_allocate((size_t)count * plora__dtype_size(dtype));
    for (int64_t i = 0; i < count; ++i)
        plora__store(values, i, dtype, (float)check_uniform());
    return values;
}

static CHECK_UNUSED void ladder_free(void *memory)
{
    device_forget(memory);
    free(memory);
}

static CHECK_UNUSED void ladder_unload(void)
{
    DEVICE_CALL(cudaLibraryUnload, (cudaLibrary_t), ladder_library);
}

/* ----------------------------------------------------------------------------------------------------------
 * prediction */

static CHECK_UNUSED double ladder_predict(const struct ladder_cost *cost, double elements, const char **limit)
{
    const double times[] = {cost->dram / ladder_dram, cost->l2 / ladder_l2, cost->l1 / ladder_l1,
                            cost->fma / ladder_fma, cost->tensor / ladder_tensor};
    static const char *const names[] = {"memory", "L2", "load/store", "fma", "tensor"};
    int slowest = 0;
    for (int i = 1; i < CHECK_COUNT(times); ++i)
        if (times[i] > times[slowest]) slowest = i;
    *limit = names[slowest];
    return times[slowest] * elements;
}

static CHECK_UNUSED void ladder_print(const struct ladder_step *step, const struct ladder_cost *cost, double elements,
                                      double seconds)
{
    const char *limit;
    const double predicted = ladder_predict(cost, elements, &limit);
    printf("%-24s %7.1f %7.1f %7.1f %10.1f %-10s", step->kernel, cost->dram, cost->l2, cost->l1, 1e6 * predicted,
           limit);
    if (seconds > 0)
        printf(" %10.1f %6.0f%%  %s\n", 1e6 * seconds, 100 * predicted / seconds, step->idea);
    else
        printf(" %10s %7s  %s\n", "-", "-", step->idea);
}

/* The shape of every program here. */
static CHECK_UNUSED int ladder_main(int argc, char **argv, const char *name, void (*test)(void **),
                                    void (*print)(int timed))
{
    if (argc < 2) {
        fprintf(stderr, "usage: %s %s.fatbin [--time]\n", argv[0], name);
        return 2;
    }
    setenv("PLORA_TEST_BACKEND", "cuda", 1);
    check_begin(name);
    ladder_load(argv[1]);
    const struct CMUnitTest tests[] = {{name, test, NULL, NULL, NULL}};
    const int failures = cmocka_run_group_tests_name(name, tests, NULL, NULL);
    if (failures == 0) print(argc > 2 && strcmp(argv[2], "--time") == 0);
    ladder_unload();
    return failures;
}

static CHECK_UNUSED void ladder_print_head(const char *title)
{
    printf("\n%s\n%-24s %7s %7s %7s %10s %-10s %10s %7s  %s\n", title, "kernel", "memory", "L2", "l/s", "predicted",
           "bound by", "measured", "of it", "idea");
    printf("%-24s %23s %10s %10s %10s\n", "", "bytes of an element", "us, H100", "", "us");
}

#endif
