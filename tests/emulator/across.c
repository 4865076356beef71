/* across.c: instructions between the lanes of a warp: shuffles, votes, reductions, bar.warp.sync. Each names in a mask the lanes
 * that take part; a lane that is named must be there. */
#include "lanes.h"

/* Lanes that the block has, exited or not: a mask may name the ones that it has not. */
static uint32_t existing(const struct warp *warp)
{
    const uint32_t threads = warp->block->launch->threads, first = (uint32_t)warp->index * LANES;
    return threads - first >= LANES ? FULL : (1u << (threads - first)) - 1;
}

/* The mask operand. */
static uint32_t members(struct warp *warp, const struct op *op, uint32_t mask, int operand)
{
    const u32 *m = REG(operand, u32);
    const int first = __builtin_ctz(mask);
    const uint32_t named = m[first];
    for (int i = first; i < LANES; ++i)
        if ((mask >> i & 1) && m[i] != named)
            find_at(warp, i, "wrong mask", "lane %d has 0x%08x, lane %d has 0x%08x", first, named, i, m[i]);
    const uint32_t absent = named & existing(warp) & ~mask, strangers = mask & ~named;
    if (absent)
        find_at(warp, first, "wrong mask", "mask 0x%08x names lane %d, which %s (active: 0x%08x)", named,
                __builtin_ctz(absent), absent & warp->live ? "is elsewhere" : "has exited", mask);
    if (strangers)
        find_at(warp, __builtin_ctz(strangers), "wrong mask", "mask 0x%08x does not name lane %d, which executes it",
                named, __builtin_ctz(strangers));
    return named;
}

/* shfl.sync d|p, a, b, c, members: c = clamp | segment mask << 8. */
void exec_shuffle(struct warp *warp, const struct op *op, uint32_t mask)
{
    members(warp, op, mask, 5);
    u32 *d = REG(0, u32);
    const u32 *b = REG(3, u32), *c = REG(4, u32);
    uint32_t a[LANES], inside = 0, inactive = 0;
    for (int i = 0; i < LANES; ++i)
        a[i] = REG(2, u32)[i];
    for (uint32_t i = 0; i < LANES; ++i) {
        if (!(mask >> i & 1)) continue;
        const uint32_t shift = b[i] & 31, clamp = c[i] & 31, segment = c[i] >> 8 & 31;
        const uint32_t most = (i & segment) | (clamp & ~segment);
        int32_t from;
        bool in;
        switch ((enum shuffle)op->kind) {
        case SHFL_UP: from = (int32_t)i - (int32_t)shift, in = from >= (int32_t)most; break;
        case SHFL_DOWN: from = (int32_t)(i + shift), in = from <= (int32_t)most; break;
        case SHFL_BFLY: from = (int32_t)(i ^ shift), in = from <= (int32_t)most; break;
        default: from = (int32_t)((i & segment) | (shift & ~segment)), in = from <= (int32_t)most; break;
        }
        if (!in) from = (int32_t)i;
        inside |= (uint32_t)in << i;
        if (!(mask >> from & 1)) inactive |= 1u << i;
        d[i] = a[from];
    }
    if (inactive)
        find_at(warp, __builtin_ctz(inactive), "wrong mask", "it reads a lane that is not active (0x%08x are)", mask);
    if (op->r[1] != NONE) set_predicate(warp, op->r[1], mask, inside);
}

void exec_vote(struct warp *warp, const struct op *op, uint32_t mask)
{
    const uint32_t named = members(warp, op, mask, 2) & mask;
    const uint32_t votes = (predicate(warp, op->r[1]) ^ (op->flags ? FULL : 0)) & named;
    switch ((enum vote)op->kind) {
    case VOTE_ALL: set_predicate(warp, op->r[0], mask, votes == named ? FULL : 0); break;
    case VOTE_ANY: set_predicate(warp, op->r[0], mask, votes ? FULL : 0); break;
    case VOTE_UNI: set_predicate(warp, op->r[0], mask, votes == named || !votes ? FULL : 0); break;
    default: {
        u32 *d = REG(0, u32);
        EACH(d[i] = votes);
    }
    }
}

void exec_redux(struct warp *warp, const struct op *op, uint32_t mask)
{
    members(warp, op, mask, 2);
    const u32 *a = REG(1, u32);
    u32 *d = REG(0, u32);
    uint32_t result = a[__builtin_ctz(mask)];
    for (int i = __builtin_ctz(mask) + 1; i < LANES; ++i) {
        if (!(mask >> i & 1)) continue;
        const uint32_t x = a[i], flip = op->flags ? 1u << 31 : 0;
        const bool less = (x ^ flip) < (result ^ flip);
        switch (op->kind) {
        case 0: result += x; break;
        case 1: result = less ? x : result; break;
        case 2: result = less ? result : x; break;
        case 3: result &= x; break;
        case 4: result |= x; break;
        default: result ^= x; break;
        }
    }
    EACH(d[i] = result);
}

/* match.any: the lanes with the same value; match.all: every member if all are the same, else none. */
void exec_match(struct warp *warp, const struct op *op, uint32_t mask)
{
    const uint32_t named = members(warp, op, mask, 2) & mask;
    uint32_t a[LANES], all = 0;
    for (int i = 0; i < LANES; ++i)
        a[i] = REG(1, u32)[i];
    u32 *d = REG(0, u32);
    for (int i = 0; i < LANES; ++i) {
        if (!(mask >> i & 1)) continue;
        uint32_t same = 0;
        for (int j = 0; j < LANES; ++j)
            same |= (uint32_t)((named >> j & 1) && a[j] == a[i]) << j;
        all = same == named ? FULL : 0;
        d[i] = op->kind ? same & all : same;
    }
    if (op->r[3] != NONE) set_predicate(warp, op->r[3], mask, all);
}

void exec_active(struct warp *warp, const struct op *op, uint32_t mask)
{
    u32 *d = REG(0, u32);
    EACH(d[i] = mask);
}

void exec_sync_warp(struct warp *warp, const struct op *op, uint32_t mask)
{
    members(warp, op, mask, 0);
    ++warp->sync;
}
