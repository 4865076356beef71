/* race.c: races between blocks on global memory. access.c keeps, for each four bytes, which block of this launch wrote and read
 * them last, and asks here when another block did so before. Two accesses are ordered when the first block, after its own,
 * executed a fence and then an atomic, and the second block, later, an atomic: the ticket of the last-block pattern. */
#include "ptx.h"

#include <string.h>
#include <sys/mman.h>

/* Whether what block `record` did is ordered before what this block does now. */
static bool ordered(const struct warp *warp, uint32_t record)
{
    const struct block *b = warp->block;
    const struct launch *l = b->launch;
    if (!l->release) return false;
    const struct release *other = &l->release[(record >> 8) - l->first_id], *mine = &l->release[b->id - l->first_id];
    const uint32_t phase = record >> 4 & 7;
    return mine->acquired > other->released && other->released && (phase < other->phase || phase == RACE_PHASES);
}

static bool acquired(const struct warp *warp)
{
    const struct launch *l = warp->block->launch;
    return l->release && l->release[warp->block->id - l->first_id].acquired;
}

static void found(const struct warp *warp, int lane, uint64_t address, uint32_t record, const char *what,
                  const char *who)
{
    const struct launch *l = warp->block->launch;
    const uint32_t *grid = l->request->grid, other = l->order[(record >> 8) - l->first_id];
    char where[256];
    memory_describe(address, 1, where, sizeof where);
    find_at(warp, lane, "race between blocks", "%s what block (%u,%u,%u)%s, address 0x%llx%s", what, other % grid[0],
            other / grid[0] % grid[1], other / grid[0] / grid[1], who, (unsigned long long)address, where);
}

void race_read_found(struct warp *warp, int lane, uint64_t address, uint32_t record)
{
    if (ordered(warp, record) || ((record & RACE_FLAG) && acquired(warp))) return;
    found(warp, lane, address, record, "it reads", record & RACE_FLAG ? " changes by atomics" : " writes");
}

/* writer, reader: records of other blocks, or 0. */
void race_write_found(struct warp *warp, int lane, uint64_t address, uint32_t writer, uint32_t reader,
                      const void *value)
{
    if (writer && !ordered(warp, writer) && !((writer & RACE_FLAG) && acquired(warp))) {
        /* Two blocks that write the same value do no harm. */
        const uint64_t offset = address - emu_memory.base;
        const bool same = value && !(writer & RACE_FLAG) && memcmp(emu_memory.bytes + offset, value, 1) == 0;
        if (!same)
            found(warp, lane, address, writer, "it writes", writer & RACE_FLAG ? " changes by atomics" : " writes");
    }
    if (reader && !ordered(warp, reader) && !((reader & RACE_FLAG) && acquired(warp)))
        found(warp, lane, address, reader, "it writes", " reads");
}

void race_atomic(struct warp *warp, int lane, uint64_t address, uint32_t bytes)
{
    struct block *b = warp->block;
    struct launch *l = b->launch;
    if (!l->many_blocks) return;
    const uint64_t now = __atomic_add_fetch(&l->clock, 1, __ATOMIC_RELAXED);
    if (l->release) {
        struct release *mine = &l->release[b->id - l->first_id];
        mine->acquired = now;
        if (b->phase > mine->phase) {
            mine->phase = b->phase;
            mine->released = now;
        }
    }
    const uint32_t first = l->first_id << 8, me = b->id << 8;
    for (uint64_t at = address; at < address + bytes; at += 4) {
        const uint64_t word = (at - emu_memory.base) / 4;
        const uint32_t writer = emu_memory.writer[word], reader = emu_memory.reader[word];
        const bool other_writer = writer >= first && (writer ^ me) > 255 && !(writer & RACE_FLAG);
        const bool other_reader = reader >= first && ((reader ^ me) > 255 || (reader & RACE_FLAG));
        if (other_writer || other_reader)
            race_write_found(warp, lane, at, other_writer ? writer : 0, other_reader ? reader : 0, NULL);
        emu_memory.writer[word] = me | RACE_FLAG | (b->phase > RACE_PHASES ? RACE_PHASES : b->phase) << 4 | 15;
    }
}

/* Block ids are never used twice, so that records need no clearing between launches. */
uint32_t race_take_ids(uint32_t blocks)
{
    static uint32_t next_id = 1;
    if (next_id + (uint64_t)blocks >= 1u << 24) {
        madvise(emu_memory.writer, emu_memory.size, MADV_DONTNEED);
        madvise(emu_memory.reader, emu_memory.size, MADV_DONTNEED);
        next_id = 1;
    }
    const uint32_t first = next_id;
    next_id += blocks;
    return first;
}
