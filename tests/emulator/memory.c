/* memory.c: device memory.
 *
 *     device range   base ......................... base + size     PROT_NONE: a host access is caught
 *     bytes          the same memory file, mapped again             what the emulator reads and writes
 *     state          one byte for each: LIVE, SET, FLYING
 *     writer, reader one word for four: race.c
 *
 *     allocation:  | page: 256 bytes gap | bytes ... | gap to the end of the page | a page of gap |
 *
 * Freed memory stays in quarantine, where a use of it is seen, until QUARANTINE bytes have been freed after it. All of it is
 * sparse: pages cost nothing until touched. */
#include "ptx.h"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define RANGE (UINT64_C(64) << 30)
#define PAGE UINT64_C(4096)
#define FIRST_GAP UINT64_C(256)
#define QUARANTINE (UINT64_C(64) << 20)
#define WARM_SPAN (UINT64_C(64) << 20) /* larger rooms give their pages back when they are empty */
#define POISONED                                                                                                       \
    (UINT64_C(1) << 20) /* so much at each end of an allocation is poisoned: scratch is large and little used */

struct allocation {
    uint64_t base, bytes, span;
    bool live;
};
/* Addresses an allocation takes, with its gaps; rooms [first, count) of a list. */
struct room {
    uint64_t offset, span;
};
struct rooms {
    struct room *room;
    size_t first, count, size;
    uint64_t bytes;
};
struct host_range {
    uint64_t base, bytes;
};

struct memory emu_memory;
static int file;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct allocation *table; /* by address */
static size_t entries, table_size;
static struct rooms freed, empty; /* in quarantine, oldest first; to be taken again */
static uint64_t next_page, live_bytes;
static size_t live_count;
static struct host_range *host;
static size_t hosts;
static struct sigaction previous;

/* ------------------------------------------------------------------------------------------------------------- mapping */
static void *map(void *hint, uint64_t bytes, int protection, int flags, int fd)
{
    void *at = mmap(hint, bytes, protection, flags | MAP_NORESERVE, fd, 0);
    if (at == MAP_FAILED) {
        perror("emulator: mmap");
        abort();
    }
    return at;
}

static void on_fault(int number, siginfo_t *info, void *context)
{
    (void)context;
    const uint64_t address = (uint64_t)(uintptr_t)info->si_addr;
    char where[256];
    if (address - emu_memory.base < emu_memory.size) {
        memory_describe(address, 1, where, sizeof where);
        emu_find(NULL, "host access to device memory: address 0x%llx%s", (unsigned long long)address, where);
    }
    sigaction(number, &previous, NULL); /* and it faults again */
}

static void open_once(void)
{
    file = memfd_create("emulator", MFD_CLOEXEC);
    if (file < 0 || ftruncate(file, (off_t)RANGE) != 0) {
        perror("emulator: device memory");
        abort();
    }
    emu_memory.size = RANGE;
    emu_memory.base = (uint64_t)(uintptr_t)map((void *)(uintptr_t)0x200000000000, RANGE, PROT_NONE, MAP_SHARED, file);
    emu_memory.bytes = map(NULL, RANGE, PROT_READ | PROT_WRITE, MAP_SHARED, file);
    emu_memory.state = map(NULL, RANGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    emu_memory.writer = map(NULL, RANGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    emu_memory.reader = map(NULL, RANGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    madvise(emu_memory.state, RANGE, MADV_HUGEPAGE);
    madvise(emu_memory.writer, RANGE, MADV_HUGEPAGE);
    madvise(emu_memory.reader, RANGE, MADV_HUGEPAGE);
    const struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    sigaction(SIGSEGV, &action, &previous);
}

void memory_open(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, open_once);
}

/* ---------------------------------------------------------------------------------------------------------- allocation */
/* The first entry whose end is behind address. */
static size_t find_entry(uint64_t address)
{
    size_t low = 0, high = entries;
    while (low < high) {
        const size_t middle = (low + high) / 2;
        if (table[middle].base + table[middle].bytes > address)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

static uint64_t whole_pages(uint64_t bytes)
{
    return (FIRST_GAP + bytes + PAGE - 1) / PAGE * PAGE + PAGE;
}

static void insert(uint64_t base, uint64_t bytes, uint64_t span)
{
    if (entries == table_size) {
        table_size = table_size ? 2 * table_size : 256;
        table = realloc(table, sizeof *table * table_size);
    }
    const size_t at = find_entry(base);
    memmove(table + at + 1, table + at, sizeof *table * (entries - at));
    table[at] = (struct allocation){base, bytes, span, true};
    ++entries;
}

/* Gives pages back; they read as zeros again. */
static void drop_pages(uint64_t offset, uint64_t span)
{
    fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)span);
    madvise(emu_memory.state + offset, span, MADV_DONTNEED);
    madvise((uint8_t *)emu_memory.writer + offset, span, MADV_DONTNEED);
    madvise((uint8_t *)emu_memory.reader + offset, span, MADV_DONTNEED);
}

static void append_room(struct rooms *rooms, struct room room)
{
    if (rooms->count == rooms->size) {
        rooms->size = rooms->size ? 2 * rooms->size : 256;
        rooms->room = realloc(rooms->room, sizeof *rooms->room * rooms->size);
    }
    rooms->room[rooms->count++] = room;
    rooms->bytes += room.span;
}

/* The oldest freed allocation is forgotten: its room may be taken again. */
static void end_quarantine(void)
{
    const struct room room = freed.room[freed.first++];
    freed.bytes -= room.span;
    if (2 * freed.first > freed.count) {
        freed.count -= freed.first;
        memmove(freed.room, freed.room + freed.first, sizeof *freed.room * freed.count);
        freed.first = 0;
    }
    const size_t i = find_entry(emu_memory.base + room.offset + FIRST_GAP);
    memmove(table + i, table + i + 1, sizeof *table * (entries - i - 1));
    --entries;
    if (room.span > WARM_SPAN) drop_pages(room.offset, room.span);
    append_room(&empty, room);
}

/* A room of at least room->span bytes: one that was used before, whose pages are there already, or new addresses, with EMU_SPREAD
 * addresses left free before them. */
static bool take_room(struct room *room)
{
    const uint64_t spread = (uint64_t)emu_setting("EMU_SPREAD", 0) / PAGE * PAGE;
    for (size_t i = empty.count; i-- > 0 && spread == 0;) {
        if (empty.room[i].span < room->span || empty.room[i].span > 2 * room->span) continue;
        *room = empty.room[i];
        empty.room[i] = empty.room[--empty.count];
        return true;
    }
    if (spread > RANGE || next_page + spread + room->span > RANGE) return false;
    room->offset = next_page + spread;
    next_page = room->offset + room->span;
    return true;
}

void *emu_memory_allocate(size_t bytes)
{
    memory_open();
    const uint64_t size = bytes ? bytes : 1;
    void *result = NULL;
    struct room room = {0, whole_pages(size)};
    pthread_mutex_lock(&lock);
    if (size <= RANGE / 2 && live_bytes + size <= emu_memory_total() && take_room(&room)) {
        const uint64_t offset = room.offset + FIRST_GAP;
        insert(emu_memory.base + offset, size, room.span);
        const uint64_t poisoned = size < POISONED ? size : POISONED;
        memset(emu_memory.bytes + offset, 0xff, poisoned);
        memset(emu_memory.bytes + offset + size - poisoned, 0xff, poisoned);
        memset(emu_memory.state + offset, LIVE, size);
        live_bytes += size;
        ++live_count;
        result = (void *)(uintptr_t)(emu_memory.base + offset);
    }
    pthread_mutex_unlock(&lock);
    return result;
}

bool emu_memory_free(void *device)
{
    memory_open();
    const uint64_t address = (uint64_t)(uintptr_t)device;
    pthread_mutex_lock(&lock);
    const size_t i = find_entry(address);
    const bool known = i < entries && table[i].base == address, ok = known && table[i].live;
    if (ok) {
        const uint64_t offset = address - emu_memory.base, bytes = table[i].bytes;
        table[i].live = false;
        live_bytes -= bytes;
        --live_count;
        memset(emu_memory.state + offset, 0, bytes);
        append_room(&freed, (struct room){offset - FIRST_GAP, table[i].span});
        while (freed.bytes > QUARANTINE)
            end_quarantine();
    }
    pthread_mutex_unlock(&lock);
    if (!ok) emu_find(NULL, known ? "freed twice: %p" : "free of %p, which is not an allocation", device);
    return ok;
}

bool emu_memory_is_device(const void *address)
{
    return emu_memory.size && (uint64_t)(uintptr_t)address - emu_memory.base < emu_memory.size;
}

bool emu_memory_find(const void *address, void **base, size_t *bytes)
{
    const uint64_t at = (uint64_t)(uintptr_t)address;
    pthread_mutex_lock(&lock);
    const size_t i = find_entry(at);
    const bool found = i < entries && table[i].live && table[i].base <= at;
    if (found && base) *base = (void *)(uintptr_t)table[i].base;
    if (found && bytes) *bytes = table[i].bytes;
    pthread_mutex_unlock(&lock);
    return found;
}

size_t emu_memory_live_bytes(void)
{
    return live_bytes;
}

size_t emu_memory_live_count(void)
{
    return live_count;
}

size_t emu_memory_total(void)
{
    return (size_t)emu_setting("EMU_MEMORY", INT64_C(4) << 30);
}

void emu_memory_each(void (*visit)(void *base, size_t bytes, void *state), void *state)
{
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < entries; ++i)
        if (table[i].live) visit((void *)(uintptr_t)table[i].base, table[i].bytes, state);
    pthread_mutex_unlock(&lock);
}

/* --------------------------------------------------------------------------------------------------------- host memory */
void emu_memory_add_host(void *address, size_t bytes)
{
    pthread_mutex_lock(&lock);
    host = realloc(host, sizeof *host * (hosts + 1));
    host[hosts++] = (struct host_range){(uint64_t)(uintptr_t)address, bytes};
    pthread_mutex_unlock(&lock);
}

bool emu_memory_remove_host(void *address)
{
    bool found = false;
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < hosts && !found; ++i) {
        if (host[i].base != (uint64_t)(uintptr_t)address) continue;
        host[i] = host[--hosts];
        found = true;
    }
    pthread_mutex_unlock(&lock);
    return found;
}

bool emu_memory_find_host(const void *address, void **base, size_t *bytes)
{
    bool found = false;
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < hosts && !found; ++i) {
        if ((uint64_t)(uintptr_t)address - host[i].base >= host[i].bytes) continue;
        if (base) *base = (void *)(uintptr_t)host[i].base;
        if (bytes) *bytes = host[i].bytes;
        found = true;
    }
    pthread_mutex_unlock(&lock);
    return found;
}

bool memory_host_ok(uint64_t address, size_t bytes)
{
    void *base;
    size_t size;
    return emu_memory_find_host((void *)(uintptr_t)address, &base, &size) &&
           address + bytes <= (uint64_t)(uintptr_t)base + size;
}

/* -------------------------------------------------------------------------------------------------------------- checks */
void memory_describe(uint64_t address, size_t bytes, char *text, size_t size)
{
    pthread_mutex_lock(&lock);
    const size_t i = find_entry(address);
    const struct allocation *in = i < entries && table[i].base <= address ? &table[i] : NULL;
    const struct allocation *before = !in && i > 0 ? &table[i - 1] : NULL,
                            *after = !in && i < entries ? &table[i] : NULL;
    if (in && in->live && address + bytes > in->base + in->bytes)
        snprintf(text, size, "; it crosses the end of the %llu bytes at 0x%llx", (unsigned long long)in->bytes,
                 (unsigned long long)in->base);
    else if (in)
        snprintf(text, size, "; byte %llu of the %llu bytes at 0x%llx%s", (unsigned long long)(address - in->base),
                 (unsigned long long)in->bytes, (unsigned long long)in->base, in->live ? "" : ", which were freed");
    else if (before && (!after || address - before->base - before->bytes < after->base - address))
        snprintf(text, size, "; %llu bytes past the end of the %llu bytes at 0x%llx%s",
                 (unsigned long long)(address - before->base - before->bytes), (unsigned long long)before->bytes,
                 (unsigned long long)before->base, before->live ? "" : ", which were freed");
    else if (after)
        snprintf(text, size, "; %llu bytes before the %llu bytes at 0x%llx%s",
                 (unsigned long long)(after->base - address), (unsigned long long)after->bytes,
                 (unsigned long long)after->base, after->live ? "" : ", which were freed");
    else
        snprintf(text, size, "; no allocation is near");
    pthread_mutex_unlock(&lock);
}

bool memory_was_freed(uint64_t address)
{
    pthread_mutex_lock(&lock);
    const size_t i = find_entry(address);
    const bool gone = i < entries && table[i].base <= address && !table[i].live;
    pthread_mutex_unlock(&lock);
    return gone;
}

void *emu_memory_host(const void *address)
{
    if (!emu_memory_is_device(address)) return (void *)(uintptr_t)address;
    return emu_memory.bytes + ((uint64_t)(uintptr_t)address - emu_memory.base);
}

bool emu_memory_check(const char *who, const void *address, size_t bytes, enum emu_access access)
{
    return emu_memory_check_rows(who, address, 1, bytes, bytes, access);
}

/* The first byte of [at, at + bytes) whose state lacks `need`, or bytes. */
static size_t first_without(const uint8_t *at, size_t bytes, uint8_t need)
{
    const uint64_t pattern = need * UINT64_C(0x0101010101010101);
    size_t i = 0;
    for (uint64_t word; i + 8 <= bytes; i += 8) {
        memcpy(&word, at + i, 8);
        if ((word & pattern) != pattern) break;
    }
    while (i < bytes && (at[i] & need) == need)
        ++i;
    return i;
}

bool emu_memory_check_rows(const char *who, const void *address, size_t rows, size_t row_bytes, size_t pitch,
                           enum emu_access access)
{
    if (rows == 0 || row_bytes == 0 || !emu_memory_is_device(address)) return true;
    char where[256];
    const char *doing = access == EMU_WRITE ? "write" : "read";
    for (size_t row = 0; row < rows; ++row) {
        const uint64_t at = (uint64_t)(uintptr_t)address + row * pitch, offset = at - emu_memory.base;
        if (offset + row_bytes > RANGE) {
            emu_find(NULL, "%s outside device memory: %s, address 0x%llx", doing, who, (unsigned long long)at);
            return false;
        }
        uint8_t *state = emu_memory.state + offset;
        size_t bad = first_without(state, row_bytes, LIVE);
        if (bad < row_bytes) {
            memory_describe(at + bad, 1, where, sizeof where);
            emu_find(NULL, "%s out of bounds: %s, %zu bytes at 0x%llx (row %zu of %zu)%s", doing, who, row_bytes,
                     (unsigned long long)at, row, rows, where);
            return false;
        }
        if (access == EMU_READ && (bad = first_without(state, row_bytes, LIVE | SET)) < row_bytes) {
            memory_describe(at + bad, 1, where, sizeof where);
            emu_find(NULL, "uninitialised read: %s, address 0x%llx%s", who, (unsigned long long)at + bad, where);
            return true;
        }
        if (access == EMU_WRITE) memset(state, LIVE | SET, row_bytes);
    }
    return true;
}

void emu_memory_mark(void *address, size_t bytes, bool initialised)
{
    if (!emu_memory_is_device(address)) return;
    uint8_t *state = emu_memory.state + ((uint64_t)(uintptr_t)address - emu_memory.base);
    for (size_t i = 0; i < bytes; ++i)
        if (state[i] & LIVE) state[i] = initialised ? LIVE | SET : LIVE;
}

void emu_memory_copy_state(void *dst, const void *src, size_t bytes)
{
    if (!emu_memory_is_device(dst)) return;
    if (!emu_memory_is_device(src)) {
        emu_memory_mark(dst, bytes, true);
        return;
    }
    uint8_t *to = emu_memory.state + ((uint64_t)(uintptr_t)dst - emu_memory.base);
    const uint8_t *from = emu_memory.state + ((uint64_t)(uintptr_t)src - emu_memory.base);
    for (size_t i = 0; i < bytes; ++i)
        if (to[i] & LIVE) to[i] = LIVE | (from[i] & SET);
}
