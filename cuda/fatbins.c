/* fatbins.c: the kernels, as data. nvcc compiles each <file>.cu to one fat binary (make/cuda.mk), which is embedded here in section
 * .nv_fatbin, where CUDA's tools look for it. CUDA_FATBINS is the build's list: CUDA_FATBIN(init) CUDA_FATBIN(merge) ... */
#include "cuda.h"

#define CUDA_FATBIN(file)                                                                                              \
    __asm__(".section .nv_fatbin, \"a\", @progbits\n"                                                                  \
            ".balign 64\n"                                                                                             \
            ".hidden cuda_fatbin_" #file "\n"                                                                          \
            ".globl cuda_fatbin_" #file "\n"                                                                           \
            "cuda_fatbin_" #file ":\n"                                                                                 \
            ".incbin \"" #file ".fatbin\"\n"                                                                           \
            ".previous\n");
CUDA_FATBINS

#define CUDA_IMAGE(id, file, function) extern const unsigned char cuda_fatbin_##file[];
CUDA_KERNEL_LIST(CUDA_IMAGE)

#define CUDA_SOURCE(id, file, function) {cuda_fatbin_##file, #function},
const struct cuda_kernel_source cuda_kernel_sources[CUDA_KERNEL_COUNT] = {CUDA_KERNEL_LIST(CUDA_SOURCE)};
