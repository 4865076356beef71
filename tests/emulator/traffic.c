/* traffic.c: what kernels ask of global memory, counted as hardware moves it: in sectors of 32 bytes, each once for a warp's access.
 * Nothing is known of caches: what several warps ask for is counted for each. Off unless asked for (emu_traffic_start). */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#include "ptx.h"

enum { SECTOR = 32, KERNELS = 128 };

bool traffic_on;
static atomic_uint_fast64_t sectors[2]; /* read, written, by the launch that runs */
static struct emu_traffic kernels[KERNELS];
static int kernel_count;

void traffic_count(const uint64_t *address, uint32_t mask, bool write)
{
    uint64_t seen[LANES];
    int count = 0;
    for (int lane = 0; lane < LANES; ++lane) {
        if (!(mask >> lane & 1)) continue;
        const uint64_t sector = address[lane] / SECTOR; /* an aligned access lies in one */
        int known = count - 1;
        while (known >= 0 && seen[known] != sector)
            --known;
        if (known < 0) seen[count++] = sector;
    }
    atomic_fetch_add_explicit(&sectors[write], (uint64_t)count, memory_order_relaxed);
}

/* The launches run one at a time. */
void traffic_launch_ends(const struct emu_launch *launch)
{
    const uint64_t read = atomic_exchange(&sectors[0], 0), written = atomic_exchange(&sectors[1], 0);
    const char *name = emu_kernel_info(launch->kernel).name;
    int at = 0;
    while (at < kernel_count && strcmp(kernels[at].kernel, name) != 0)
        ++at;
    if (at == KERNELS) return;
    struct emu_traffic *kernel = &kernels[at];
    if (at == kernel_count) {
        ++kernel_count;
        memset(kernel, 0, sizeof *kernel);
        snprintf(kernel->kernel, sizeof kernel->kernel, "%s", name);
    }
    ++kernel->launches;
    kernel->bytes_read += SECTOR * read;
    kernel->bytes_written += SECTOR * written;
    if (launch->dynamic_shared > kernel->dynamic_shared) kernel->dynamic_shared = launch->dynamic_shared;
}

void emu_traffic_start(void)
{
    kernel_count = 0;
    atomic_store(&sectors[0], 0);
    atomic_store(&sectors[1], 0);
    traffic_on = true;
}

int emu_traffic_stop(struct emu_traffic *traffic, int capacity)
{
    traffic_on = false;
    for (int i = 0; i < kernel_count && i < capacity; ++i)
        traffic[i] = kernels[i];
    return kernel_count;
}
