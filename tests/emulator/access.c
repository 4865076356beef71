/* access.c: loads, stores, atomics and cp.async. A warp's access is resolved, lane by lane, to the bytes it means:
 *
 *     address -> which memory? -> state: live? set? -> aligned? -> races -> host pointer
 *
 * Lanes that lie side by side are checked in one go. Faults (bounds, alignment) end the kernel; other findings do not. */
#include "lanes.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

static const char *const VERB[] = {"read", "write", "atomic"};

/* A warp's access. values: what is written, lane after lane; at: where the bytes are, out. */
struct access {
    struct warp *warp;
    uint32_t mask;
    bool side_by_side; /* all lanes, and in memory one after the other: at[0] is enough */
    uint64_t address[LANES];
    const uint8_t *values;
    uint8_t *at[LANES];
};

/* ------------------------------------------------------------------------------------------------------------- global */
/* Nothing but reasons to say no. */
static void global_fault(struct warp *warp, int lane, uint64_t address, uint32_t bytes, enum use use)
{
    char where[256];
    memory_describe(address, bytes, where, sizeof where);
    const bool in_range = address - emu_memory.base < emu_memory.size;
    const char *what = in_range && memory_was_freed(address) ? "use after free"
                       : use == USE_WRITE                    ? "write out of bounds"
                       : use == USE_ATOMIC                   ? "atomic out of bounds"
                                                             : "read out of bounds";
    fault_at(warp, lane, 700, what, "%u bytes at 0x%llx%s", bytes, (unsigned long long)address,
             in_range ? where : ", which is no device address");
}

static void misaligned(struct warp *warp, int lane, uint64_t address, uint32_t bytes, const char *memory)
{
    fault_at(warp, lane, 716, "misaligned address", "%u bytes at %s 0x%llx", bytes, memory,
             (unsigned long long)address);
}

static void not_set(struct warp *warp, int lane, uint64_t address, const char *memory, const uint8_t *state,
                    uint32_t bytes)
{
    uint32_t i = 0;
    while (i < bytes && (state[i] & SET))
        ++i;
    char where[256] = "";
    if (memory[0] == 'g') memory_describe(address + i, 1, where, sizeof where);
    find_at(warp, lane, "uninitialised read", "%s byte 0x%llx%s", memory, (unsigned long long)address + i, where);
}

static inline bool any_has(const uint8_t *state, uint32_t bytes, uint8_t bit)
{
    uint8_t any = 0;
    for (uint32_t i = 0; i < bytes; ++i)
        any |= state[i];
    return any & bit;
}

/* Whether all of the bytes' states have the bits of `need`; bytes is a constant where this is inlined. */
static inline bool all_have(const uint8_t *state, uint32_t bytes, uint8_t need)
{
    const uint64_t pattern = need * UINT64_C(0x0101010101010101);
    uint64_t a = pattern, b = pattern;
    uint32_t w;
    uint16_t h;
    switch (bytes) {
    case 1: return (state[0] & need) == need;
    case 2: memcpy(&h, state, 2); return (h & (uint16_t)pattern) == (uint16_t)pattern;
    case 4: memcpy(&w, state, 4); return (w & (uint32_t)pattern) == (uint32_t)pattern;
    case 16: memcpy(&b, state + 8, 8); /* fall through */
    default: memcpy(&a, state, 8); return (a & b & pattern) == pattern;
    }
}

/* The same for 32 lanes side by side. */
static inline bool span_has(const uint8_t *state, uint32_t bytes, uint8_t need)
{
    const uint64_t pattern = need * UINT64_C(0x0101010101010101);
    uint64_t all = pattern, word;
    for (uint32_t i = 0; i < LANES * bytes; i += 8) {
        memcpy(&word, state + i, 8);
        all &= word;
    }
    return (all & pattern) == pattern;
}

static inline bool span_flies(const uint8_t *state, uint32_t bytes)
{
    uint64_t any = 0, word;
    for (uint32_t i = 0; i < LANES * bytes; i += 8) {
        memcpy(&word, state + i, 8);
        any |= word;
    }
    return any & FLYING * UINT64_C(0x0101010101010101);
}

static inline uint32_t race_record(const struct block *b, uint64_t offset, uint32_t bytes)
{
    const uint32_t phase = b->phase > RACE_PHASES ? RACE_PHASES : b->phase;
    return b->id << 8 | phase << 4 | (bytes >= 4 ? 15 : ((1u << bytes) - 1) << (offset & 3));
}

static inline uint32_t reader_record(uint32_t old, uint32_t me, uint32_t first)
{
    if (old < first || ((old ^ me) > 255 && !(old & me & 15))) return me; /* other bytes: only the last are kept */
    return me | (old & 15) | ((old ^ me) > 255 ? RACE_FLAG : old & RACE_FLAG);
}

static inline void race_read(struct warp *warp, int lane, uint64_t offset, uint32_t bytes)
{
    const uint32_t first = warp->block->launch->first_id << 8, me = race_record(warp->block, offset, bytes);
    for (uint64_t word = offset / 4; word < (offset + bytes + 3) / 4; ++word) {
        const uint32_t writer = emu_memory.writer[word];
        if (writer >= first && (writer ^ me) > 255 && (writer & me & 15))
            race_read_found(warp, lane, emu_memory.base + 4 * word, writer);
        emu_memory.reader[word] = reader_record(emu_memory.reader[word], me, first);
    }
}

static inline void race_write(struct warp *warp, int lane, uint64_t offset, uint32_t bytes, const void *value)
{
    const uint32_t first = warp->block->launch->first_id << 8, me = race_record(warp->block, offset, bytes);
    for (uint64_t word = offset / 4; word < (offset + bytes + 3) / 4; ++word) {
        const uint32_t writer = emu_memory.writer[word], reader = emu_memory.reader[word];
        const bool other_writer = writer >= first && (writer ^ me) > 255 && (writer & me & 15);
        const bool other_reader =
            reader >= first && ((reader ^ me) > 255 || (reader & RACE_FLAG)) && (reader & me & 15);
        if (other_writer || other_reader) {
            const uint64_t at = 4 * word > offset ? 4 * word : offset;
            race_write_found(warp, lane, emu_memory.base + at, other_writer ? writer : 0, other_reader ? reader : 0,
                             (const uint8_t *)value + (at - offset));
        }
        emu_memory.writer[word] = me;
    }
}

/* 32 lanes side by side: records them and is true when no other block was there. */
static inline bool race_span(const struct warp *warp, uint64_t offset, uint32_t bytes, enum use use)
{
    const uint32_t first = warp->block->launch->first_id << 8, me = race_record(warp->block, 0, 4);
    uint32_t *writer = emu_memory.writer + offset / 4, *reader = emu_memory.reader + offset / 4, others = 0;
    const uint32_t words = LANES * bytes / 4;
    for (uint32_t i = 0; i < words; ++i) {
        others |= writer[i] >= first && (writer[i] ^ me) > 255;
        if (use == USE_WRITE) others |= reader[i] >= first && ((reader[i] ^ me) > 255 || (reader[i] & RACE_FLAG));
    }
    if (others) return false;
    if (use == USE_WRITE)
        for (uint32_t i = 0; i < words; ++i)
            writer[i] = me;
    else
        for (uint32_t i = 0; i < words; ++i)
            reader[i] = reader_record(reader[i], me, first);
    return true;
}

static inline uint8_t *global_bytes(struct warp *warp, int lane, uint64_t address, uint32_t bytes, enum use use,
                                    const void *value)
{
    const uint64_t offset = address - emu_memory.base;
    if (offset + bytes > emu_memory.size || offset > emu_memory.size) {
        if (!memory_host_ok(address, bytes)) global_fault(warp, lane, address, bytes, use);
        if (address % bytes) misaligned(warp, lane, address, bytes, "");
        return (uint8_t *)(uintptr_t)address;
    }
    uint8_t *state = emu_memory.state + offset;
    if (!all_have(state, bytes, use == USE_WRITE ? LIVE : LIVE | SET)) {
        if (!all_have(state, bytes, LIVE)) global_fault(warp, lane, address, bytes, use);
        if (address % bytes == 0) not_set(warp, lane, address, "global", state, bytes);
    }
    if (address % bytes) misaligned(warp, lane, address, bytes, "");
    if (warp->block->launch->many_blocks) {
        if (use == USE_READ)
            race_read(warp, lane, offset, bytes);
        else if (use == USE_WRITE)
            race_write(warp, lane, offset, bytes, value);
        else
            race_atomic(warp, lane, address, bytes);
    }
    if (use != USE_READ) memset(state, LIVE | SET, bytes);
    return emu_memory.bytes + offset;
}

static inline bool global_span(struct access *a, uint32_t bytes, enum use use)
{
    const uint64_t offset = a->address[0] - emu_memory.base;
    if (offset >= emu_memory.size - LANES * bytes || offset % bytes || offset % 4) return false;
    uint8_t *state = emu_memory.state + offset;
    if (!span_has(state, bytes, use == USE_WRITE ? LIVE : LIVE | SET)) return false;
    if (a->warp->block->launch->many_blocks && !race_span(a->warp, offset, bytes, use)) return false;
    if (use == USE_WRITE) memset(state, LIVE | SET, LANES * bytes);
    a->at[0] = emu_memory.bytes + offset;
    return true;
}

/* --------------------------------------------------------------------------------------------- shared, local, parameter */
static void shared_fault(struct warp *warp, int lane, uint64_t address, uint32_t bytes, enum use use)
{
    const size_t size = warp->block->shared_size - SHARED_FIRST;
    fault_at(warp, lane, 700, use == USE_READ ? "shared read out of bounds" : "shared write out of bounds",
             "%u bytes at byte %lld of %zu", bytes, (long long)address - SHARED_FIRST, size);
}

static void in_flight(struct warp *warp, int lane, uint64_t address, enum use use)
{
    find_at(warp, lane, "cp.async not waited for", "%s of shared byte %lld, whose bytes are under way", VERB[use],
            (long long)address - SHARED_FIRST);
}

static inline uint8_t *shared_bytes(struct warp *warp, int lane, uint64_t address, uint32_t bytes, enum use use,
                                    const void *value)
{
    struct block *b = warp->block;
    uint8_t *state = b->shared_state + address;
    if (address + bytes > b->shared_size || address < SHARED_FIRST || !all_have(state, bytes, LIVE))
        shared_fault(warp, lane, address, bytes, use);
    if (address % bytes) misaligned(warp, lane, address - SHARED_FIRST, bytes, "shared byte");
    if (use != USE_WRITE && !all_have(state, bytes, SET))
        not_set(warp, lane, address - SHARED_FIRST, "shared", state, bytes);
    if (any_has(state, bytes, FLYING)) in_flight(warp, lane, address, use);
    if (use == USE_READ)
        shared_read(warp, lane, (uint32_t)address, bytes);
    else if (use == USE_WRITE)
        shared_write(warp, lane, (uint32_t)address, bytes, value);
    else
        shared_atomic(warp, lane, (uint32_t)address, bytes);
    if (use != USE_READ) memset(state, LIVE | SET, bytes);
    return b->shared + address;
}

static inline bool shared_span(struct access *a, uint32_t bytes, enum use use)
{
    struct block *b = a->warp->block;
    const uint64_t address = a->address[0];
    if (address < SHARED_FIRST || address + LANES * bytes > b->shared_size || address % bytes || address % 4)
        return false;
    uint8_t *state = b->shared_state + address;
    if (!span_has(state, bytes, use == USE_WRITE ? LIVE : LIVE | SET) || span_flies(state, bytes)) return false;
    if (!shared_span_recorded(a->warp, (uint32_t)address, bytes, use == USE_WRITE)) return false;
    if (use == USE_WRITE) memset(state, LIVE | SET, LANES * bytes);
    a->at[0] = b->shared + address;
    return true;
}

static inline uint8_t *local_bytes(struct warp *warp, int lane, uint64_t address, uint32_t bytes, enum use use)
{
    const size_t size = warp->block->kernel->local_bytes;
    if (address + bytes > size || address > size)
        fault_at(warp, lane, 700, use == USE_READ ? "local read out of bounds" : "local write out of bounds",
                 "%u bytes at byte %lld of %zu", bytes, (long long)address, size);
    if (address % bytes) misaligned(warp, lane, address, bytes, "local byte");
    uint8_t *state = warp->local_state + (size_t)lane * size + address;
    if (use == USE_READ && !all_have(state, bytes, SET)) not_set(warp, lane, address, "local", state, bytes);
    if (use != USE_READ) memset(state, LIVE | SET, bytes);
    return warp->local + (size_t)lane * size + address;
}

static inline uint8_t *parameter_bytes(struct warp *warp, int lane, uint64_t address, uint32_t bytes, enum use use)
{
    const struct launch *l = warp->block->launch;
    if (use != USE_READ || address + bytes > l->kernel->parameter_bytes || address > l->kernel->parameter_bytes)
        fault_at(warp, lane, 700, "parameter access out of bounds", "%u bytes at byte %lld of %zu", bytes,
                 (long long)address, l->kernel->parameter_bytes);
    if (address % bytes) misaligned(warp, lane, address, bytes, "parameter byte");
    return (uint8_t *)(uintptr_t)l->request->packed + address;
}

static enum space space_of(uint64_t address)
{
    switch (WINDOW(address)) {
    case SHARED_WINDOW: return SHARED;
    case LOCAL_WINDOW: return LOCAL;
    case PARAM_WINDOW: return PARAM;
    default: return GLOBAL;
    }
}

static inline uint8_t *any_bytes(struct warp *warp, int lane, enum space space, uint64_t address, uint32_t bytes,
                                 enum use use, const void *value)
{
    if (space == GENERIC) {
        space = space_of(address);
        if (space != GLOBAL) address -= WINDOW(address);
    }
    switch (space) {
    case SHARED: return shared_bytes(warp, lane, address, bytes, use, value);
    case LOCAL: return local_bytes(warp, lane, address, bytes, use);
    case PARAM: return parameter_bytes(warp, lane, address, bytes, use);
    default: return global_bytes(warp, lane, address, bytes, use, value);
    }
}

uint8_t *access_bytes(struct warp *warp, int lane, enum space space, uint64_t address, uint32_t bytes, enum use use,
                      const void *value)
{
    return any_bytes(warp, lane, space, address, bytes, use, value);
}

static inline uint64_t address_of(const struct warp *warp, const struct op *op, int operand, int lane, int64_t offset)
{
    if (op->wide >> operand & 1) return REG(operand, u64)[lane] + (uint64_t)offset;
    /* 32-bit addresses are those of shared memory. */
    return (uint32_t)(REG(operand, u32)[lane] + (uint32_t)offset);
}

/* Resolves a warp's access: all lanes' a->at, or at[0] when they lie side by side; a write is done, lane after lane, so that
 * lanes which write one address are compared. bytes and use are constants where this is inlined. */
static inline void resolve(struct access *a, const struct op *op, uint32_t bytes, enum use use)
{
    struct warp *warp = a->warp;
    enum space space = op->space;
    if (op->wide & 2)
        for (int i = 0; i < LANES; ++i)
            a->address[i] = REG(1, u64)[i] + (uint64_t)op->immediate;
    else
        for (int i = 0; i < LANES; ++i)
            a->address[i] = (uint32_t)(REG(1, u32)[i] + (uint32_t)op->immediate);
    if (traffic_on && a->mask != 0 &&
        (space == GLOBAL || (space == GENERIC && space_of(a->address[__builtin_ctz(a->mask)]) == GLOBAL)))
        traffic_count(a->address, a->mask, use == USE_WRITE);
    a->side_by_side = false;
    if (a->mask == FULL && bytes >= 2) {
        uint64_t wrong = 0;
        for (uint32_t i = 0; i < LANES; ++i)
            wrong |= a->address[i] - a->address[0] - i * bytes;
        if (wrong == 0 && (space == GLOBAL || (space == GENERIC && space_of(a->address[0]) == GLOBAL)))
            a->side_by_side = global_span(a, bytes, use);
        else if (wrong == 0 && space == SHARED)
            a->side_by_side = shared_span(a, bytes, use);
        if (a->side_by_side) {
            if (use == USE_WRITE) memcpy(a->at[0], a->values, LANES * bytes);
            return;
        }
        if (use == USE_READ && space == SHARED && bytes >= 4 && shared_read_lanes(warp, a->address, bytes, a->at))
            return;
    }
    for (uint32_t i = 0; i < LANES; ++i) {
        if (!(a->mask >> i & 1)) continue;
        const uint8_t *value = use == USE_WRITE ? a->values + i * bytes : NULL;
        a->at[i] = any_bytes(warp, (int)i, space, a->address[i], bytes, use, value);
        if (use == USE_WRITE) memcpy(a->at[i], value, bytes);
    }
}

/* ------------------------------------------------------------------------------------------------------ loads, stores */
/* Elements of a lane are `bytes` wide in memory; the registers may be wider. */
static inline uint64_t widened(const uint8_t *at, const struct op *op)
{
    uint16_t h;
    uint32_t w;
    uint64_t d;
    switch (op->width) {
    case 1: return op->kind ? (uint64_t)(int8_t)at[0] : at[0];
    case 2: memcpy(&h, at, 2); return op->kind ? (uint64_t)(int16_t)h : h;
    case 4: memcpy(&w, at, 4); return op->kind ? (uint64_t)(int32_t)w : w;
    default: memcpy(&d, at, 8); return d;
    }
}

static void load_general(struct warp *warp, const struct op *op, const struct access *a, uint32_t bytes)
{
    for (int i = 0; i < LANES; ++i) {
        if (!(a->mask >> i & 1)) continue;
        const uint8_t *at = a->side_by_side ? a->at[0] + (uint32_t)i * bytes : a->at[i];
        for (int e = 0; e < op->count; ++e, at += op->width) {
            if (op->list[e] == SINK) continue;
            const uint64_t value = widened(at, op);
            if (op->flags)
                ((u64 *)lane_reg(warp, op->list[e]))[i] = value;
            else
                ((u32 *)lane_reg(warp, op->list[e]))[i] = (uint32_t)value;
        }
    }
}

/* Lanes of `bytes` bytes made of `count` elements of the registers' own size. */
#define LOAD_PLAIN(type, count)                                                                                        \
    {                                                                                                                  \
        type *d[count];                                                                                                \
        for (int e = 0; e < count; ++e)                                                                                \
            d[e] = lane_reg(warp, op->list[e]);                                                                        \
        for (int i = 0; i < LANES; ++i) {                                                                              \
            if (!(mask >> i & 1)) continue;                                                                            \
            const uint8_t *at = a.side_by_side ? a.at[0] + (uint32_t)i * (count * sizeof(type)) : a.at[i];             \
            for (int e = 0; e < count; ++e)                                                                            \
                memcpy(&d[e][i], at + (size_t)e * sizeof(type), sizeof(type));                                         \
        }                                                                                                              \
    }

static bool has_sink(const struct op *op)
{
    for (int e = 0; e < op->count; ++e)
        if (op->list[e] == SINK) return true;
    return false;
}

void exec_load(struct warp *warp, const struct op *op, uint32_t mask)
{
    const uint32_t bytes = (uint32_t)op->width * op->count;
    struct access a; /* not cleared: it is large */
    a.warp = warp;
    a.mask = mask;
    const bool plain = op->width == (op->flags ? 8 : 4) && !has_sink(op);
    switch (bytes) {
    case 2: resolve(&a, op, 2, USE_READ); break;
    case 4: resolve(&a, op, 4, USE_READ); break;
    case 8: resolve(&a, op, 8, USE_READ); break;
    case 16: resolve(&a, op, 16, USE_READ); break;
    default: resolve(&a, op, bytes, USE_READ); break;
    }
    if (!plain)
        load_general(warp, op, &a, bytes);
    else if (bytes == 4 && a.side_by_side)
        memcpy(lane_reg(warp, op->list[0]), a.at[0], 4 * LANES);
    else if (bytes == 8 && op->flags && a.side_by_side)
        memcpy(lane_reg(warp, op->list[0]), a.at[0], 8 * LANES);
    else if (bytes == 4)
        LOAD_PLAIN(u32, 1)
    else if (bytes == 16 && !op->flags)
        LOAD_PLAIN(u32, 4)
    else if (bytes == 8 && op->flags)
        LOAD_PLAIN(u64, 1)
    else if (bytes == 8)
        LOAD_PLAIN(u32, 2)
    else if (bytes == 16)
        LOAD_PLAIN(u64, 2)
    else
        load_general(warp, op, &a, bytes);
}

/* Parameters are mostly read at one address by all lanes. */
void exec_load_param(struct warp *warp, const struct op *op, uint32_t mask)
{
    const uint32_t bytes = (uint32_t)op->width * op->count;
    const int first = __builtin_ctz(mask);
    const uint64_t one = address_of(warp, op, 1, first, op->immediate);
    uint64_t others = 0;
    struct access a; /* not cleared: it is large */
    a.warp = warp;
    a.mask = mask;
    a.side_by_side = false;
    for (int i = 0; i < LANES; ++i) {
        a.address[i] = address_of(warp, op, 1, i, op->immediate);
        others |= mask >> i & 1 ? a.address[i] ^ one : 0;
    }
    if (others) {
        for (int i = first; i < LANES; ++i)
            if (mask >> i & 1) a.at[i] = parameter_bytes(warp, i, a.address[i], bytes, USE_READ);
        load_general(warp, op, &a, bytes);
        return;
    }
    const uint8_t *at = parameter_bytes(warp, first, one, bytes, USE_READ);
    for (int e = 0; e < op->count; ++e, at += op->width) {
        const uint64_t value = widened(at, op);
        if (op->list[e] == SINK) continue;
        u64 *wide = lane_reg(warp, op->list[e]);
        u32 *word = lane_reg(warp, op->list[e]);
        if (op->flags)
            EACH(wide[i] = value);
        else
            EACH(word[i] = (uint32_t)value);
    }
}

#define STORE_PLAIN(type, count)                                                                                       \
    {                                                                                                                  \
        const type *s[count];                                                                                          \
        for (int e = 0; e < count; ++e)                                                                                \
            s[e] = lane_reg(warp, op->list[e]);                                                                        \
        for (int i = 0; i < LANES; ++i)                                                                                \
            for (int e = 0; e < count; ++e)                                                                            \
                memcpy(values + ((size_t)i * count + (size_t)e) * sizeof(type), &s[e][i], sizeof(type));               \
    }

static void values_general(struct warp *warp, const struct op *op, uint8_t *values)
{
    for (int i = 0; i < LANES; ++i) {
        for (int e = 0; e < op->count; ++e, values += op->width) {
            const void *from = op->flags ? (void *)&((u64 *)lane_reg(warp, op->list[e]))[i]
                                         : (void *)&((u32 *)lane_reg(warp, op->list[e]))[i];
            memcpy(values, from, op->width);
        }
    }
}

void exec_store(struct warp *warp, const struct op *op, uint32_t mask)
{
    const uint32_t bytes = (uint32_t)op->width * op->count;
    uint8_t values[32 * LANES];
    struct access a; /* not cleared: it is large */
    a.warp = warp;
    a.mask = mask;
    a.values = values;
    if (bytes == 4 && op->width == 4 && !op->flags)
        memcpy(values, lane_reg(warp, op->list[0]), 4 * LANES);
    else if (bytes == 16 && op->width == 4 && !op->flags)
        STORE_PLAIN(u32, 4)
    else
        values_general(warp, op, values);
    switch (bytes) {
    case 2: resolve(&a, op, 2, USE_WRITE); break;
    case 4: resolve(&a, op, 4, USE_WRITE); break;
    case 8: resolve(&a, op, 8, USE_WRITE); break;
    case 16: resolve(&a, op, 16, USE_WRITE); break;
    default: resolve(&a, op, bytes, USE_WRITE); break;
    }
}

/* ------------------------------------------------------------------------------------------------------------ atomics */
static uint64_t combined(const struct op *op, uint64_t old, uint64_t b, uint64_t c)
{
    const bool is_signed = op->flags == S32 || op->flags == S64;
    const uint64_t sign = op->width == 4 ? UINT64_C(1) << 31 : UINT64_C(1) << 63;
    /* With the sign flipped, signed numbers compare as unsigned ones. */
    const bool less = is_signed ? (b ^ sign) < (old ^ sign) : b < old;
    float x, y;
    double v, w;
    uint32_t bits;
    uint64_t wide;
    switch ((enum atomic)op->kind) {
    case ATOM_ADD:
        if (op->flags == NUMBER_F32) {
            memcpy(&x, &old, 4), memcpy(&y, &b, 4);
            x += y;
            memcpy(&bits, &x, 4);
            return bits;
        }
        if (op->flags == NUMBER_F64) {
            memcpy(&v, &old, 8), memcpy(&w, &b, 8);
            v += w;
            memcpy(&wide, &v, 8);
            return wide;
        }
        return old + b;
    case ATOM_MIN: return less ? b : old;
    case ATOM_MAX: return less ? old : b;
    case ATOM_AND: return old & b;
    case ATOM_OR: return old | b;
    case ATOM_XOR: return old ^ b;
    case ATOM_EXCH: return b;
    case ATOM_CAS: return old == b ? c : old;
    case ATOM_INC: return old >= b ? 0 : old + 1;
    case ATOM_DEC: return old == 0 || old > b ? b : old - 1;
    }
    return old;
}

void exec_atomic(struct warp *warp, const struct op *op, uint32_t mask)
{
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    const bool many = warp->block->launch->many_workers;
    for (int i = 0; i < LANES; ++i) {
        if (!(mask >> i & 1)) continue;
        uint64_t b, c = 0, old = 0;
        const bool wide = op->width == 8;
        b = wide ? REG(2, u64)[i] : REG(2, u32)[i];
        if (op->kind == ATOM_CAS) c = wide ? REG(3, u64)[i] : REG(3, u32)[i];
        uint8_t *at =
            any_bytes(warp, i, op->space, address_of(warp, op, 1, i, op->immediate), op->width, USE_ATOMIC, NULL);
        if (many) pthread_mutex_lock(&lock);
        memcpy(&old, at, op->width);
        const uint64_t new = combined(op, old, b, c);
        memcpy(at, &new, op->width);
        if (many) pthread_mutex_unlock(&lock);
        if (op->r[0] == NONE) continue;
        if (wide)
            REG(0, u64)[i] = old;
        else
            REG(0, u32)[i] = (uint32_t)old;
    }
}

void exec_fence(struct warp *warp, const struct op *op, uint32_t mask)
{
    (void)op, (void)mask;
    ++warp->block->phase;
}

/* ----------------------------------------------------------------------------------------------------------- cp.async */
void exec_cp_async(struct warp *warp, const struct op *op, uint32_t mask)
{
    struct block *b = warp->block;
    uint64_t source[LANES] = {0};
    uint32_t sources = 0;
    for (int i = 0; i < LANES; ++i) {
        if (!(mask >> i & 1)) continue;
        const uint32_t bytes = op->width;
        uint32_t given = op->r[2] == NONE ? bytes : REG(2, u32)[i];
        if (given > bytes) fault_at(warp, i, 719, "cp.async source size", "%u of %u bytes", given, bytes);
        uint64_t to = address_of(warp, op, 0, i, op->immediate);
        if (WINDOW(to) == SHARED_WINDOW) to -= SHARED_WINDOW;
        const uint64_t from = address_of(warp, op, 1, i, (int32_t)op->list[0]);
        source[i] = from;
        if (given > 0) sources |= 1u << i;
        if (warp->transfers == warp->transfer_size) {
            warp->transfer_size = warp->transfer_size ? 2 * warp->transfer_size : 256;
            warp->transfer = realloc(warp->transfer, sizeof *warp->transfer * warp->transfer_size);
        }
        struct transfer *t = &warp->transfer[warp->transfers];
        *t = (struct transfer){(uint32_t)i, warp->group[i], (uint32_t)to, bytes, {0}};
        if (from & (bytes - 1)) misaligned(warp, i, from, bytes, "");
        /* A source of fewer bytes: the rest is zero; none of it: the address is not looked at. */
        for (uint32_t at = 0; at < given;) {
            const uint32_t part = given - at >= 16  ? 16
                                  : given - at >= 8 ? 8
                                  : given - at >= 4 ? 4
                                  : given - at >= 2 ? 2
                                                    : 1;
            memcpy(t->data + at, global_bytes(warp, i, from + at, part, USE_READ, NULL), part);
            at += part;
        }
        shared_bytes(warp, i, to, bytes, USE_WRITE, NULL);
        memset(b->shared_state + to, LIVE | SET | FLYING, bytes);
        memset(b->shared + to, 0xff, bytes);
        ++warp->transfers;
    }
    if (traffic_on && sources != 0) traffic_count(source, sources, false);
}

void exec_cp_commit(struct warp *warp, const struct op *op, uint32_t mask)
{
    (void)op;
    EACH(++warp->group[i]);
}

/* wait_group n: all but the lane's last n groups land; wait_all (-1): everything it has issued. */
void exec_cp_wait(struct warp *warp, const struct op *op, uint32_t mask)
{
    struct block *b = warp->block;
    uint32_t kept = 0;
    for (uint32_t j = 0; j < warp->transfers; ++j) {
        const struct transfer *t = &warp->transfer[j];
        const bool waits = mask >> t->lane & 1;
        if (!waits || (op->immediate >= 0 && (int64_t)t->group >= (int64_t)warp->group[t->lane] - op->immediate)) {
            warp->transfer[kept++] = *t;
            continue;
        }
        memset(b->shared_state + t->address, LIVE | SET, t->bytes);
        shared_write(warp, (int)t->lane, t->address, t->bytes, NULL);
        memcpy(b->shared + t->address, t->data, t->bytes);
    }
    warp->transfers = kept;
}
