/* convert_select.c: the conversion kernels by instruction level; several launchers share them. */
#include "convert_kernels.h"
#include "isa.h"

const struct cpu_convert_kernels *cpu_convert_kernels(int isa)
{
    static const struct cpu_convert_kernels *const levels[CPU_ISA_COUNT] = {
        &cpu_convert_kernels_portable, &cpu_convert_kernels_avx2, &cpu_convert_kernels_avx512,
        &cpu_convert_kernels_amx};
    return levels[isa];
}
