/* launch.c: libraries, kernels and launches of the emulated libcudart.
 *
 * A launch is checked against the device's limits at the call, as the real one is; its parameters are copied at the call; the
 * kernel runs (emu_launch) when something waits for it. Kernels come from cudaLibraryLoadData only: host stubs of <<<>>>,
 * clusters and cooperative launches are not here. */
#include "runtime.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct CUkern_st {
    const struct emu_kernel *kernel;
    struct emu_kernel_info info;
    struct CUlib_st *library;
    int max_dynamic_shared; /* cudaFuncAttributeMaxDynamicSharedMemorySize */
    int carveout;
};

struct CUlib_st {
    int state;
    int id;
    struct emu_module *module;
    int count;
    struct CUkern_st *kernels;
    struct CUlib_st *next;
};

static struct CUlib_st *libraries;
static int library_count;

static cudaError_t library_alive(const struct CUlib_st *library)
{
    const struct CUlib_st *each = libraries;
    while (each != NULL && each != library)
        each = each->next;
    return each != NULL && each->state == HANDLE_ALIVE ? cudaSuccess : runtime_bad_handle("a library", library);
}

/* A kernel of a library that is loaded. */
static cudaError_t find_kernel(const void *function, struct CUkern_st **kernel)
{
    for (const struct CUlib_st *library = libraries; library != NULL; library = library->next) {
        for (int i = 0; i < library->count; ++i) {
            if (function != &library->kernels[i]) continue;
            *kernel = &library->kernels[i];
            return library->state == HANDLE_ALIVE ? cudaSuccess : runtime_bad_handle("a kernel of a library", library);
        }
    }
    return cudaErrorInvalidDeviceFunction;
}

/* -------------------------------------------------------------------------------------------------------------- libraries */

static cudaError_t load(struct CUlib_st **out, const void *code)
{
    char message[512] = "";
    const struct cudaDeviceProp *properties = runtime_properties();
    struct emu_module *module =
        emu_module_load(code, 10 * properties->major + properties->minor, message, sizeof message);
    if (module == NULL) {
        emu_find(NULL, "cudaLibraryLoadData: %s", message);
        return strstr(message, "no PTX") != NULL ? cudaErrorNoKernelImageForDevice : cudaErrorInvalidPtx;
    }
    struct CUlib_st *library = calloc(1, sizeof *library);
    const int count = emu_module_kernels(module);
    struct CUkern_st *kernels = calloc((size_t)count + 1, sizeof *kernels);
    if (library == NULL || kernels == NULL) abort(); /* the test machine is out of memory */
    *library = (struct CUlib_st){HANDLE_ALIVE, ++library_count, module, count, kernels, libraries};
    for (int i = 0; i < count; ++i) {
        kernels[i].kernel = emu_module_kernel(module, i);
        kernels[i].info = emu_kernel_info(kernels[i].kernel);
        kernels[i].library = library;
        kernels[i].max_dynamic_shared = (int)properties->sharedMemPerBlock - (int)kernels[i].info.static_shared;
        kernels[i].carveout = -1;
    }
    libraries = *out = library;
    return cudaSuccess;
}

cudaError_t cudaLibraryLoadData(cudaLibrary_t *out, const void *code, enum cudaJitOption *jit_options,
                                void **jit_values, unsigned jit_count, enum cudaLibraryOption *options, void **values,
                                unsigned count)
{
    (void)jit_options, (void)jit_values, (void)options, (void)values;
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess && (out == NULL || code == NULL)) error = cudaErrorInvalidValue;
    if (error == cudaSuccess && (jit_count > 0 || count > 0)) error = cudaErrorNotSupported;
    if (error == cudaSuccess) error = capture_forbids_unsafe_call();
    if (error == cudaSuccess && emu_fails("library")) error = cudaErrorMemoryAllocation;
    if (error == cudaSuccess) error = load(out, code);
    return runtime_leave(error);
}

cudaError_t cudaLibraryUnload(cudaLibrary_t library)
{
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess) error = library_alive(library);
    if (error == cudaSuccess) error = capture_forbids_unsafe_call();
    for (int device = 0; error == cudaSuccess && device < runtime_device_count(); ++device)
        error = queue_drain(device);
    if (error == cudaSuccess) {
        library->state = HANDLE_DEAD;
        emu_module_unload(library->module);
        library->module = NULL;
    }
    return runtime_leave(error);
}

cudaError_t cudaLibraryGetKernel(cudaKernel_t *out, cudaLibrary_t library, const char *name)
{
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess && (out == NULL || name == NULL)) error = cudaErrorInvalidValue;
    if (error == cudaSuccess) error = library_alive(library);
    if (error == cudaSuccess && emu_fails("kernel")) error = cudaErrorSymbolNotFound;
    if (error == cudaSuccess) {
        error = cudaErrorSymbolNotFound;
        for (int i = 0; i < library->count; ++i) {
            if (strcmp(library->kernels[i].info.name, name) != 0) continue;
            *out = &library->kernels[i];
            error = cudaSuccess;
        }
    }
    return runtime_leave(error);
}

cudaError_t cudaLibraryGetKernelCount(unsigned *count, cudaLibrary_t library)
{
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess) error = count == NULL ? cudaErrorInvalidValue : library_alive(library);
    if (error == cudaSuccess) *count = (unsigned)library->count;
    return runtime_leave(error);
}

cudaError_t cudaLibraryEnumerateKernels(cudaKernel_t *kernels, unsigned count, cudaLibrary_t library)
{
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess) error = kernels == NULL ? cudaErrorInvalidValue : library_alive(library);
    for (unsigned i = 0; error == cudaSuccess && i < count && i < (unsigned)library->count; ++i)
        kernels[i] = &library->kernels[i];
    return runtime_leave(error);
}

cudaError_t cudaLibraryGetGlobal(void **address, size_t *bytes, cudaLibrary_t library, const char *name)
{
    void *found = NULL;
    size_t size = 0;
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess) error = name == NULL ? cudaErrorInvalidValue : library_alive(library);
    if (error == cudaSuccess && !emu_module_variable(library->module, name, &found, &size))
        error = cudaErrorSymbolNotFound;
    if (error == cudaSuccess && address != NULL) *address = found;
    if (error == cudaSuccess && bytes != NULL) *bytes = size;
    return runtime_leave(error);
}

/* ---------------------------------------------------------------------------------------------------------------- kernels */

cudaError_t cudaFuncGetName(const char **name, const void *function)
{
    struct CUkern_st *kernel;
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess) error = name == NULL ? cudaErrorInvalidValue : find_kernel(function, &kernel);
    if (error == cudaSuccess) *name = kernel->info.name;
    return runtime_leave(error);
}

cudaError_t cudaFuncGetParamInfo(const void *function, size_t index, size_t *offset, size_t *bytes)
{
    struct CUkern_st *kernel;
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess) error = find_kernel(function, &kernel);
    if (error == cudaSuccess && (offset == NULL || index >= (size_t)kernel->info.parameters))
        error = cudaErrorInvalidValue;
    if (error == cudaSuccess) {
        size_t size;
        emu_kernel_parameter(kernel->kernel, (int)index, offset, &size);
        if (bytes != NULL) *bytes = size;
    }
    return runtime_leave(error);
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *function)
{
    struct CUkern_st *kernel;
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess) error = attributes == NULL ? cudaErrorInvalidValue : find_kernel(function, &kernel);
    if (error == cudaSuccess) {
        memset(attributes, 0, sizeof *attributes);
        attributes->sharedSizeBytes = kernel->info.static_shared;
        attributes->constSizeBytes = kernel->info.constant;
        attributes->localSizeBytes = kernel->info.local;
        attributes->maxThreadsPerBlock = kernel->info.max_threads;
        attributes->numRegs = kernel->info.registers;
        attributes->ptxVersion = kernel->info.ptx_sm;
        attributes->binaryVersion = 10 * runtime_properties()->major + runtime_properties()->minor;
        attributes->maxDynamicSharedSizeBytes = kernel->max_dynamic_shared;
        attributes->preferredShmemCarveout = kernel->carveout;
    }
    return runtime_leave(error);
}

static cudaError_t set_attribute(struct CUkern_st *kernel, enum cudaFuncAttribute attribute, int value)
{
    switch (attribute) {
    case cudaFuncAttributeMaxDynamicSharedMemorySize:
        if (value < 0 || (size_t)value + kernel->info.static_shared > runtime_properties()->sharedMemPerBlockOptin)
            return cudaErrorInvalidValue;
        kernel->max_dynamic_shared = value;
        return cudaSuccess;
    case cudaFuncAttributePreferredSharedMemoryCarveout:
        if (value < -1 || value > 100) return cudaErrorInvalidValue;
        kernel->carveout = value;
        return cudaSuccess;
    default: return cudaErrorNotSupported;
    }
}

cudaError_t cudaFuncSetAttribute(const void *function, enum cudaFuncAttribute attribute, int value)
{
    struct CUkern_st *kernel;
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess) error = find_kernel(function, &kernel);
    if (error == cudaSuccess) error = set_attribute(kernel, attribute, value);
    return runtime_leave(error);
}

cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t function, enum cudaFuncAttribute attribute, int value,
                                            int device)
{
    if (device < 0 || device >= runtime_device_count()) return cudaErrorInvalidDevice;
    return cudaFuncSetAttribute(function, attribute, value);
}

/* Blocks at once on one multiprocessor: what threads, shared memory and registers leave room for. The registers are those of
 * the PTX, an estimate. */
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *function, int threads, size_t shared)
{
    struct CUkern_st *kernel;
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess)
        error = blocks == NULL || threads < 1 ? cudaErrorInvalidValue : find_kernel(function, &kernel);
    if (error == cudaSuccess) {
        const struct cudaDeviceProp *p = runtime_properties();
        const size_t bytes = kernel->info.static_shared + shared + p->reservedSharedMemPerBlock;
        const int warps = (threads + 31) / 32;
        const int registers = (kernel->info.registers + 7) / 8 * 8 * 32 * warps;
        int count = p->maxBlocksPerMultiProcessor;
        const int by_threads = p->maxThreadsPerMultiProcessor / (32 * warps);
        const int by_shared = bytes > 0 ? (int)(p->sharedMemPerMultiprocessor / bytes) : count;
        const int by_registers = registers > 0 ? p->regsPerMultiprocessor / registers : count;
        if (by_threads < count) count = by_threads;
        if (by_shared < count) count = by_shared;
        if (by_registers < count) count = by_registers;
        *blocks = threads <= kernel->info.max_threads ? count : 0;
    }
    return runtime_leave(error);
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function, int threads,
                                                                   size_t shared, unsigned flags)
{
    if (flags > cudaOccupancyDisableCachingOverride) return cudaErrorInvalidValue;
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, function, threads, shared);
}

/* --------------------------------------------------------------------------------------------------------------- launches */

struct launch_work {
    struct work base;
    const struct CUkern_st *kernel;
    uint32_t grid[3], block[3];
    size_t dynamic_shared;
    uint64_t packed[]; /* the parameters */
};

static cudaError_t run_launch(const struct work *work)
{
    const struct launch_work *launch = (const struct launch_work *)work;
    if (launch->kernel->library->state != HANDLE_ALIVE) { /* a graph can outlive the library */
        runtime_bad_handle("a kernel of a library", launch->kernel->library);
        return cudaErrorLaunchFailure;
    }
    if (emu_fails("fault")) return cudaErrorLaunchFailure;
    struct emu_launch run = {
        .kernel = launch->kernel->kernel, .dynamic_shared = launch->dynamic_shared, .packed = launch->packed};
    memcpy(run.grid, launch->grid, sizeof run.grid);
    memcpy(run.block, launch->block, sizeof run.block);
    return (cudaError_t)emu_launch(&run);
}

static cudaError_t check_limits(const struct CUkern_st *kernel, dim3 grid, dim3 block, size_t shared)
{
    const struct cudaDeviceProp *p = runtime_properties();
    const unsigned grids[] = {grid.x, grid.y, grid.z}, blocks[] = {block.x, block.y, block.z};
    for (int i = 0; i < 3; ++i) {
        if (grids[i] == 0 || grids[i] > (unsigned)p->maxGridSize[i]) return cudaErrorInvalidConfiguration;
        if (blocks[i] == 0 || blocks[i] > (unsigned)p->maxThreadsDim[i]) return cudaErrorInvalidConfiguration;
    }
    const uint64_t threads = (uint64_t)block.x * block.y * block.z;
    if (threads > (uint64_t)p->maxThreadsPerBlock) return cudaErrorInvalidConfiguration;
    if (threads > (uint64_t)kernel->info.max_threads) return cudaErrorInvalidValue;
    return shared > (size_t)kernel->max_dynamic_shared ? cudaErrorInvalidValue : cudaSuccess;
}

static cudaError_t launch_kernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared,
                                 cudaStream_t handle)
{
    struct CUkern_st *kernel;
    struct CUstream_st *stream;
    cudaError_t error = find_kernel(function, &kernel);
    if (error == cudaSuccess) error = queue_stream(handle, &stream);
    if (error == cudaSuccess && kernel->info.parameters > 0 && arguments == NULL) error = cudaErrorInvalidValue;
    if (error == cudaSuccess) error = check_limits(kernel, grid, block, shared);
    if (error == cudaSuccess && emu_fails("launch")) error = cudaErrorLaunchOutOfResources;
    if (error != cudaSuccess) return error;
    struct launch_work *launch = (struct launch_work *)work_new(sizeof *launch + kernel->info.parameter_bytes + 8,
                                                                cudaGraphNodeTypeKernel, run_launch);
    launch->kernel = kernel;
    launch->grid[0] = grid.x, launch->grid[1] = grid.y, launch->grid[2] = grid.z;
    launch->block[0] = block.x, launch->block[1] = block.y, launch->block[2] = block.z;
    launch->dynamic_shared = shared;
    if (kernel->info.parameters > 0) emu_kernel_pack(kernel->kernel, arguments, launch->packed);
    snprintf(launch->base.name, sizeof launch->base.name, "%s<<<(%u,%u,%u), (%u,%u,%u), %zu>>>", kernel->info.name,
             grid.x, grid.y, grid.z, block.x, block.y, block.z, shared);
    return queue_add(stream, &launch->base);
}

cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared,
                             cudaStream_t stream)
{
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess) error = launch_kernel(function, grid, block, arguments, shared, stream);
    return runtime_leave(error);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function, void **arguments)
{
    cudaError_t error = runtime_enter();
    if (error == cudaSuccess && config == NULL) error = cudaErrorInvalidValue;
    for (unsigned i = 0; error == cudaSuccess && i < config->numAttrs; ++i) {
        const cudaLaunchAttributeID id = config->attrs[i].id;
        if (id != cudaLaunchAttributeIgnore && id != cudaLaunchAttributePriority) error = cudaErrorNotSupported;
    }
    if (error == cudaSuccess)
        error = launch_kernel(function, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes,
                              config->stream);
    return runtime_leave(error);
}

/* ----------------------------------------------------------------------------------------------------------- start and end */

void launch_reset(void)
{
    for (struct CUlib_st *library = libraries; library != NULL; library = library->next) {
        if (library->state != HANDLE_ALIVE) continue;
        library->state = HANDLE_DEAD;
        emu_module_unload(library->module);
        library->module = NULL;
    }
}

void launch_leaks(void)
{
    for (const struct CUlib_st *library = libraries; library != NULL; library = library->next) {
        if (library->state != HANDLE_ALIVE) continue;
        emu_find(NULL, "leak: library %d, of %d kernels, was not unloaded", library->id, library->count);
    }
}
