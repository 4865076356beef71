/* levels.h: what the tests of kernels share: they run over the instruction levels of the CPU, or over the one level of a GPU
 * (device.h), in memory that is poisoned. */
#ifndef PLORA_TESTS_LEVELS_H
#define PLORA_TESTS_LEVELS_H

#include "check.h"
#include "cpu/isa.h"

enum { LEVEL_DEVICE = -1 };

static inline int first_level(void)
{
    return device_is_cuda() ? LEVEL_DEVICE : 0;
}

static inline int last_level(void)
{
    return device_is_cuda() ? LEVEL_DEVICE : cpu_isa();
}

/* Poisoned memory with a twin, and a guard of 64 bytes behind it. */
static inline void *poisoned_new(size_t bytes)
{
    void *memory = NULL;
    CHECK(posix_memalign(&memory, 64, bytes + 64) == 0, "the test itself is out of memory");
    memset(memory, CHECK_POISON, bytes + 64);
    device_twin(memory, bytes + 64);
    return memory;
}

static inline void poisoned_free(void *memory)
{
    device_forget(memory);
    free(memory);
}

#endif
