/* convert_select.c: picks the conversion kernels of this machine's instruction level. */
#include "convert_kernels.h"
#include "isa.h"

const struct cpu_convert_kernels *cpu_convert_kernels(void)
{
    static const struct cpu_convert_kernels *const levels[CPU_ISA_COUNT] = {
        &cpu_convert_kernels_portable, &cpu_convert_kernels_avx2, &cpu_convert_kernels_avx512};
    return levels[cpu_isa()];
}
