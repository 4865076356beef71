/* emulator.h: the parts of the CUDA emulator see each other through this file.
 *
 *     runtime.c queue.c  (libcudart's calls, streams)        cublas.c  (another library: calls what is EMU_API here)
 *          |  load, launch                                       |  check and translate operands
 *          v                                                     v
 *     fatbin.c -> parse.c -> run.c alu.c mma.c      --------->  memory.c (device memory)  ---->  report.c (findings)
 *
 * PTX comes in through emu_module_load, kernels run in emu_launch, whole and in the calling thread. When things run is the
 * runtime's business. What a module looks like inside is in ptx.h. */
#ifndef EMULATOR_H
#define EMULATOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define EMU_API __attribute__((visibility("default")))

/* ------------------------------------------------------------------------------------------------- modules and kernels */
struct emu_module;
struct emu_kernel;

struct emu_kernel_info {
    const char *name;
    int ptx_sm;             /* the target of the PTX it came from: 75 or 80 */
    int registers;          /* an estimate: live 32-bit registers a thread, at most 255 */
    int max_threads;        /* a block: .maxntid, else 1024 */
    size_t static_shared;   /* bytes a block */
    size_t local;           /* bytes a thread */
    size_t constant;        /* bytes of the module's .const variables */
    size_t parameter_bytes; /* the packed parameter buffer */
    int parameters;
};

/* `image` is a fat binary (0xBA55ED50), its wrapper (0x466243B1), or PTX text. Takes the highest PTX target <= sm. Module
 * variables become device memory. NULL and a message when it cannot be had: no PTX for sm, an instruction not known here. */
struct emu_module *emu_module_load(const void *image, int sm, char *message, size_t message_size);
void emu_module_unload(struct emu_module *module);
int emu_module_kernels(const struct emu_module *module);
const struct emu_kernel *emu_module_kernel(const struct emu_module *module, int index);
const struct emu_kernel *emu_module_find(const struct emu_module *module, const char *name);
/* A .global or .const variable: false if there is none of that name. */
bool emu_module_variable(const struct emu_module *module, const char *name, void **address, size_t *bytes);

struct emu_kernel_info emu_kernel_info(const struct emu_kernel *kernel);
/* One parameter's place in the packed buffer. */
void emu_kernel_parameter(const struct emu_kernel *kernel, int index, size_t *offset, size_t *bytes);
/* cudaLaunchKernel's array of pointers -> the packed buffer of parameter_bytes, copied at the call. */
void emu_kernel_pack(const struct emu_kernel *kernel, void *const *arguments, void *packed);

struct emu_launch {
    const struct emu_kernel *kernel;
    uint32_t grid[3], block[3];
    size_t dynamic_shared;
    const void *packed;
};
/* Runs every block before it returns. 0, or the runtime's error code of a kernel that faulted: 700 illegal address, 716
 * misaligned address, 719 launch failure (a barrier nobody can pass, a trap). Limits of the launch (threads, shared memory)
 * are the runtime's to check; races and uninitialised reads are findings, but not faults. */
int emu_launch(const struct emu_launch *launch);

/* What the launches of a kernel asked of global memory since emu_traffic_start(): 32 bytes for each sector that a warp's access
 * touches. Copies and products of cuBLAS are not counted. */
struct emu_traffic {
    char kernel[96];
    uint64_t launches, bytes_read, bytes_written;
    size_t dynamic_shared; /* bytes of a block: the most */
};
EMU_API void emu_traffic_start(void);
/* The number of kernels, of which at most `capacity` are written. */
EMU_API int emu_traffic_stop(struct emu_traffic *traffic, int capacity);

/* ------------------------------------------------------------------------------------------------------- device memory */
/* Device addresses are ordinary numbers in a range the host may not touch: a host access is a finding and then SIGSEGV.
 * The emulator reads and writes the same bytes through a second mapping. Any call may come from any thread. */
EMU_API void *emu_memory_allocate(
    size_t
        bytes); /* NULL when full; 256-byte aligned; poisoned with 0xFF (large ones at their ends), not initialised */
EMU_API bool emu_memory_free(void *device); /* false, and a finding, when it is not (or no longer) an allocation */
EMU_API bool emu_memory_is_device(const void *address); /* in the device range at all, allocated or not */
/* The live allocation that holds address. */
EMU_API bool emu_memory_find(const void *address, void **base, size_t *bytes);
EMU_API size_t emu_memory_live_bytes(void);
EMU_API size_t emu_memory_live_count(void);
EMU_API size_t emu_memory_total(void); /* capacity, EMU_MEMORY bytes (default 4 GiB) */
/* Calls visit for each live allocation: for leak reports. */
EMU_API void emu_memory_each(void (*visit)(void *base, size_t bytes, void *state), void *state);

/* Host memory that kernels may use (cudaHostAlloc, cudaHostRegister): known to the checks as initialised. */
EMU_API void emu_memory_add_host(void *host, size_t bytes);
EMU_API bool emu_memory_remove_host(void *host); /* false: not known */
EMU_API bool emu_memory_find_host(const void *address, void **base, size_t *bytes);

/* Where the emulator itself may access a device address: the second mapping. Host addresses come back as they are. */
EMU_API void *emu_memory_host(const void *address);

enum emu_access {
    EMU_READ = 1,
    EMU_WRITE = 2,
    EMU_READ_ANY = 4 /* a read of bytes that need not be initialised: a copy */
};
/* Checks [address, address + bytes) as a kernel's access is checked: live, in bounds, and for EMU_READ initialised. EMU_WRITE
 * marks it initialised. A finding names `who`. false: out of bounds or freed (an uninitialised read is only a finding).
 * Host addresses outside the device range pass. Nothing is checked for 0 bytes. */
EMU_API bool emu_memory_check(const char *who, const void *address, size_t bytes, enum emu_access access);
/* A matrix of `rows` rows of row_bytes each, pitch bytes apart. */
EMU_API bool emu_memory_check_rows(const char *who, const void *address, size_t rows, size_t row_bytes, size_t pitch,
                                   enum emu_access access);
EMU_API void emu_memory_mark(void *address, size_t bytes, bool initialised);
/* After a copy between any two addresses: dst is as initialised as src was. */
EMU_API void emu_memory_copy_state(void *dst, const void *src, size_t bytes);

/* ------------------------------------------------------------------------------------------------------------ findings */
/* "emulator: <text>" on stderr, each distinct site once (site: any string that tells one from another; NULL: the text
 * itself), all of them counted. A process with findings exits with status 86. */
EMU_API void emu_find(const char *site, const char *format, ...) __attribute__((format(printf, 2, 3)));
EMU_API unsigned emu_findings(void);
EMU_API void emu_findings_clear(void); /* for tests that cause them on purpose, in process */
/* The text of the last finding, "" if there was none. */
EMU_API const char *emu_last_finding(void);

/* ------------------------------------------------------------------------------------------------- settings and seeds */
/* An integer environment variable; fallback when it is not set. EMU_SEED, EMU_SM, EMU_THREADS ... */
EMU_API int64_t emu_setting(const char *name, int64_t fallback);
/* A generator for orders. Every user has its own, seeded from EMU_SEED and a number of its own. */
struct emu_random {
    uint64_t state;
};
EMU_API struct emu_random emu_random_new(uint64_t stream);
EMU_API uint32_t emu_random_below(struct emu_random *random, uint32_t limit);

#endif
