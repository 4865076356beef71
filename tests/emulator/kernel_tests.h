/* kernel_tests.h: what the tests of the interpreter share: a kernel by its name, arrays in device memory, and the test once for
 * each code path (EMU_SM=75 and 80), and with blocks on two threads. */
#ifndef EMULATOR_KERNEL_TESTS_H
#define EMULATOR_KERNEL_TESTS_H

#include "emulated.h"

/* Launches NAME_kernel of the open library with one parameter struct, and waits. */
static cudaLibrary_t kernels_library;
static void *kernels_image;

static CHECK_UNUSED void kernels_open(const char *fatbin)
{
    emulated_open();
    kernels_image = emulated_image(fatbin);
    const cudaError_t error = cu.cudaLibraryLoadData(&kernels_library, kernels_image, NULL, NULL, 0, NULL, NULL, 0);
    if (error == cudaSuccess) return;
    fprintf(stderr, "%s: %s\n", fatbin, cu.cudaGetErrorName(error));
    exit(2);
}

static CHECK_UNUSED void kernels_close(void)
{
    cu.cudaLibraryUnload(kernels_library);
    free(kernels_image);
}

static CHECK_UNUSED cudaError_t kernels_launch(const char *name, dim3 grid, dim3 block, size_t shared, void *params)
{
    char full[128];
    cudaKernel_t kernel = NULL;
    snprintf(full, sizeof full, "%s_kernel", name);
    cudaError_t error = cu.cudaLibraryGetKernel(&kernel, kernels_library, full);
    if (error == cudaSuccess)
        error = cu.cudaLaunchKernel((const void *)kernel, grid, block, (void *[]){params}, shared, NULL);
    return error == cudaSuccess ? cu.cudaDeviceSynchronize() : error;
}

/* count elements in device memory, copied from `from`; without it, not initialised. */
static CHECK_UNUSED void *device_array(size_t bytes, const void *from)
{
    void *memory = NULL;
    cudaError_t error = cu.cudaMalloc(&memory, bytes);
    if (error == cudaSuccess && from) error = cu.cudaMemcpy(memory, from, bytes, cudaMemcpyHostToDevice);
    if (error == cudaSuccess) return memory;
    fprintf(stderr, "%zu bytes: %s\n", bytes, cu.cudaGetErrorName(error));
    exit(2);
}

static CHECK_UNUSED void device_read(void *to, const void *from, size_t bytes)
{
    CUDA_OK(cu.cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost));
}

static CHECK_UNUSED int emulated_sm(void)
{
    const char *sm = getenv("EMU_SM");
    return sm != NULL ? atoi(sm) : 80;
}

/* For main: without EMU_SM, runs this program for each code path; the exit status, or -1 when this is such a run. */
static CHECK_UNUSED int each_path(void)
{
    if (getenv("EMU_SM") != NULL) return -1;
    char seed[64];
    snprintf(seed, sizeof seed, "%" PRIu64, check_seed_value);
    setenv("PLORA_TEST_SEED", seed, 1);
    int failed = 0;
    for (int path = 0; path < 3; ++path) {
        fflush(NULL);
        const pid_t child = fork();
        if (child == 0) {
            setenv("EMU_SM", path == 0 ? "75" : "80", 1);
            setenv("EMU_THREADS", path == 2 ? "2" : "1", 1);
            setenv("EMU_SEED", seed, 1); /* another order of blocks and warps in every run */
            execl("/proc/self/exe", "child", (char *)NULL);
            _exit(127);
        }
        int status = 0;
        if (child < 0 || waitpid(child, &status, 0) != child || !WIFEXITED(status) || WEXITSTATUS(status) != 0)
            failed = 1;
    }
    return failed;
}

#endif
