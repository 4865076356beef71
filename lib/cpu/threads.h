/* threads.h: the few OpenMP calls that are used, with their meaning in a build without OpenMP (one thread). */
#ifndef PLORA_CPU_THREADS_H
#define PLORA_CPU_THREADS_H

#ifdef _OPENMP
#include <omp.h>
static inline int cpu_thread_index(void)
{
    return omp_get_thread_num();
}
static inline int cpu_default_threads(void)
{
    return omp_get_max_threads();
}
/* Sets the number of threads of this host thread's next parallel regions, oneDNN's included; returns what it was. */
static inline int cpu_set_threads(int threads)
{
    const int before = omp_get_max_threads();
    if (before != threads) omp_set_num_threads(threads);
    return before;
}
#else
static inline int cpu_thread_index(void)
{
    return 0;
}
static inline int cpu_default_threads(void)
{
    return 1;
}
static inline int cpu_set_threads(int threads)
{
    return threads;
}
#endif

#endif
