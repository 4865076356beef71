/* isa.h: which instructions the kernels may use.
 *
 * A file *_kernels.c is compiled once per level below, with -DCPU_ISA=<level> and that level's compiler flags, and defines one
 * table of functions named after the level, e.g. cpu_merge_kernels_avx512. The launcher picks a table by cpu_isa(). */
#ifndef PLORA_CPU_ISA_H
#define PLORA_CPU_ISA_H

#define CPU_ISA_PORTABLE 0 /* what the compiler's default target has */
#define CPU_ISA_AVX2 1     /* AVX2, FMA, F16C */
#define CPU_ISA_AVX512 2   /* AVX-512 F, BW, DQ, VL, and all of AVX2's */
#define CPU_ISA_AMX 3      /* and matrix tiles of bf16 */
#define CPU_ISA_COUNT 4

/* The highest level that this processor and operating system support. */
int cpu_isa(void);

#endif
