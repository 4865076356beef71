/* shared.c: races between the threads of a block on shared memory. For each four bytes the last writer and the last readers:
 *
 *     epoch (28 bits: barriers so far) | sync (16: bar.warp.sync of its warp) | thread (12) | .. | several (2) | atomic | bytes (4)
 *
 * Two accesses, one of them a write, are ordered by a barrier of the block between them, and inside a warp by bar.warp.sync.
 * That lanes run in step here orders nothing: on hardware they need not. */
#include "ptx.h"

#include <string.h>

#define ATOMIC UINT64_C(0x10)
#define SEVERAL_LANES UINT64_C(0x20) /* readers of one warp */
#define SEVERAL_WARPS UINT64_C(0x40)

static uint64_t epoch_of(uint64_t record)
{
    return record >> 36;
}
static uint32_t sync_of(uint64_t record)
{
    return record >> 20 & 0xffff;
}
static uint32_t thread_of(uint64_t record)
{
    return record >> 8 & 0xfff;
}

static uint64_t record_now(const struct warp *warp, int lane, uint64_t flags)
{
    return warp->block->epoch << 36 | (uint64_t)(warp->sync & 0xffff) << 20 |
           (uint64_t)(warp->index * LANES + lane) << 8 | flags;
}

static uint64_t byte_mask(uint32_t address, uint32_t bytes)
{
    return bytes >= 4 ? 15 : ((1u << bytes) - 1) << (address & 3);
}

/* Whether the one access in `record` can run at the same time as one of this thread. */
static bool races(const struct warp *warp, int lane, uint64_t record)
{
    const uint32_t thread = thread_of(record);
    if (epoch_of(record) != warp->block->epoch || thread == (uint32_t)(warp->index * LANES + lane)) return false;
    return thread / LANES != (uint32_t)warp->index || sync_of(record) == (warp->sync & 0xffff);
}

static bool readers_race(const struct warp *warp, int lane, uint64_t record)
{
    if (epoch_of(record) != warp->block->epoch) return false;
    if (record & SEVERAL_WARPS) return true;
    if ((record & SEVERAL_LANES) && thread_of(record) / LANES == (uint32_t)warp->index)
        return sync_of(record) == (warp->sync & 0xffff);
    return races(warp, lane, record);
}

static void found(const struct warp *warp, int lane, uint32_t address, uint64_t record, const char *what)
{
    const uint32_t other = thread_of(record), *n = warp->block->launch->request->block;
    const bool same_warp = other / LANES == (uint32_t)warp->index;
    find_at(warp, lane, "shared memory race", "%s by thread (%u,%u,%u), no %s between, shared byte %u", what,
            other % n[0], other / n[0] % n[1], other / n[0] / n[1], same_warp ? "__syncwarp or barrier" : "barrier",
            address - SHARED_FIRST);
}

/* The readers `old` and now `me`, too. */
static uint64_t with_reader(uint64_t old, uint64_t me)
{
    if (epoch_of(old) != epoch_of(me)) return me;
    if (old & SEVERAL_WARPS) return old;
    uint64_t several = 0;
    if (thread_of(old) / LANES != thread_of(me) / LANES)
        several = SEVERAL_WARPS;
    else if (sync_of(old) == sync_of(me) && (thread_of(old) != thread_of(me) || (old & SEVERAL_LANES)))
        several = SEVERAL_LANES;
    return me | several | (old & 15);
}

void shared_read(struct warp *warp, int lane, uint32_t address, uint32_t bytes)
{
    const uint64_t mask = byte_mask(address, bytes), me = record_now(warp, lane, mask);
    struct trace *t = warp->block->trace + address / 4, *end = t + (bytes + 3) / 4;
    for (; t < end; ++t) {
        if ((t->writer & mask) && races(warp, lane, t->writer)) found(warp, lane, address, t->writer, "written");
        t->reader = with_reader(t->reader, me);
    }
}

/* Lanes often read what their neighbours do: source[i] is the first lane with lane i's address, `repeated` has the lanes that are
 * a source of others. */
static uint32_t find_sources(const uint64_t *address, uint8_t *source)
{
    uint32_t repeated = 0;
    for (uint8_t i = 0; i < LANES; ++i) {
        const uint64_t a = address[i];
        source[i] = i;
        if (i >= 1 && a == address[i - 1])
            source[i] = source[i - 1];
        else if (i >= 8 && a == address[i - 8])
            source[i] = source[i - 8];
        else if (i >= 16 && a == address[i - 16])
            source[i] = source[i - 16];
        if (source[i] != i) repeated |= 1u << source[i];
    }
    return repeated;
}

bool shared_read_lanes(struct warp *warp, const uint64_t *address, uint32_t bytes, uint8_t **at)
{
    struct block *b = warp->block;
    uint8_t source[LANES];
    const uint32_t repeated = find_sources(address, source);
    const uint64_t first = record_now(warp, 0, 15);
    for (uint32_t i = 0; i < LANES; ++i) {
        const uint64_t a = address[i];
        if (source[i] != i) {
            at[i] = at[source[i]];
            continue;
        }
        if (a < SHARED_FIRST || a + bytes > b->shared_size || a % bytes) return false;
        for (uint32_t word = 0; word < bytes; word += 4) {
            uint32_t state;
            memcpy(&state, b->shared_state + a + word, 4);
            if (state != (LIVE | SET) * 0x01010101u || epoch_of(b->trace[(a + word) / 4].writer) == b->epoch)
                return false;
        }
        const uint64_t me = (first + ((uint64_t)i << 8)) | (repeated >> i & 1 ? SEVERAL_LANES : 0);
        for (struct trace *t = b->trace + a / 4; t < b->trace + (a + bytes) / 4; ++t)
            t->reader = with_reader(t->reader, me);
        at[i] = b->shared + a;
    }
    return true;
}

static void write_or_atomic(struct warp *warp, int lane, uint32_t address, uint32_t bytes, const void *value,
                            uint64_t atomic)
{
    const uint64_t mask = byte_mask(address, bytes), me = record_now(warp, lane, mask | atomic);
    struct trace *t = warp->block->trace + address / 4, *end = t + (bytes + 3) / 4;
    for (; t < end; ++t) {
        if ((t->writer & mask) && !(atomic && (t->writer & ATOMIC)) && races(warp, lane, t->writer)) {
            /* Threads that write the same value do no harm. */
            const bool same =
                value && !(t->writer & ATOMIC) && memcmp(warp->block->shared + address, value, bytes) == 0;
            if (!same) found(warp, lane, address, t->writer, "written");
        }
        if ((t->reader & mask) && readers_race(warp, lane, t->reader)) found(warp, lane, address, t->reader, "read");
        t->writer = me;
    }
}

void shared_write(struct warp *warp, int lane, uint32_t address, uint32_t bytes, const void *value)
{
    write_or_atomic(warp, lane, address, bytes, value, 0);
}

void shared_atomic(struct warp *warp, int lane, uint32_t address, uint32_t bytes)
{
    write_or_atomic(warp, lane, address, bytes, NULL, ATOMIC);
}

bool shared_span_recorded(struct warp *warp, uint32_t address, uint32_t bytes, bool write)
{
    struct trace *t = warp->block->trace + address / 4;
    const uint32_t words = LANES * bytes / 4, shift = bytes >= 16 ? 2 : bytes == 8 ? 1 : 0;
    const uint64_t epoch = warp->block->epoch, me = record_now(warp, 0, 15);
    uint64_t others = 0;
    if (bytes < 4) return false;
    for (uint32_t i = 0; i < words; ++i)
        others |= epoch_of(t[i].writer) == epoch || epoch_of(t[i].reader) == epoch;
    if (others) return false;
    for (uint32_t i = 0; i < words; ++i)
        *(write ? &t[i].writer : &t[i].reader) = me + ((uint64_t)(i >> shift) << 8);
    return true;
}
