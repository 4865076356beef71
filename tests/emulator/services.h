/* services.h: what the emulated libcudart does for the emulated libcublas and for tests, beside the real API. Found with
 * dlsym, or linked to. */
#ifndef EMULATOR_SERVICES_H
#define EMULATOR_SERVICES_H

#include <cuda_runtime_api.h>
#include <stdbool.h>
#include <stddef.h>

#include "emulator.h"

/* What can be made to fail. EMU_FAIL=malloc:3,launch:1 makes the third allocation and the first launch of the process fail;
 * emu_fail("malloc", 3) the third allocation from now on; 0 none. emu_calls gives how often a kind was called so far.
 *     kind      calls                                               the failure
 *     malloc    cudaMalloc, cudaMallocAsync                         cudaErrorMemoryAllocation
 *     host      cudaHostAlloc, cudaMallocHost, cudaHostRegister     cudaErrorMemoryAllocation
 *     launch    cudaLaunchKernel, cudaLaunchKernelExC               cudaErrorLaunchOutOfResources, nothing ran
 *     fault     kernels, when they are executed                     cudaErrorLaunchFailure, asynchronous and sticky
 *     copy      cudaMemcpy...                                       cudaErrorInvalidValue
 *     set       cudaMemset...                                       cudaErrorInvalidValue
 *     stream    cudaStreamCreate...                                 cudaErrorMemoryAllocation
 *     event     cudaEventCreate...                                  cudaErrorMemoryAllocation
 *     library   cudaLibraryLoadData                                 cudaErrorMemoryAllocation
 *     kernel    cudaLibraryGetKernel                                cudaErrorSymbolNotFound
 *     wait      cuda{Stream,Event,Device}Synchronize                cudaErrorUnknown
 *     cublas    cublasCreate                                        CUBLAS_STATUS_ALLOC_FAILED
 *     gemm      cublasGemmEx, cublasSgemm                           CUBLAS_STATUS_EXECUTION_FAILED
 *     workspace products that had no workspace of the caller        (counted only) */
EMU_API void emu_fail(const char *kind, long k);
EMU_API long emu_calls(const char *kind);
/* Counts a call of the kind; true when this is the one to fail. */
EMU_API bool emu_fails(const char *kind);

/* The lock and the error that every call returns now; the error that is kept for cudaGetLastError(). */
EMU_API cudaError_t emu_enter(void);
EMU_API cudaError_t emu_leave(cudaError_t error);
/* Queues a call of run(state) with a copy of the state. run gives cudaSuccess, or the error that loses the context. */
EMU_API cudaError_t emu_enqueue(cudaStream_t stream, const char *name, cudaError_t (*run)(const void *state),
                                const void *state, size_t bytes);
/* cudaSuccess when the stream is alive; otherwise there is a finding. */
EMU_API cudaError_t emu_stream_alive(cudaStream_t stream);
EMU_API bool emu_stream_capturing(cudaStream_t stream);
/* The error of an allocation that is not allowed while a stream is captured, as cudaMalloc would give it. */
EMU_API cudaError_t emu_may_allocate(void);
/* Handles that are not given back before the exit are findings: +1 and -1. */
EMU_API void emu_count_cublas(int change);

#endif
