/* run.c: a launch: blocks in a shuffled order, by EMU_THREADS workers; a block's warps in turns of a random length, so that
 * races show; a warp along its stack of frames:
 *
 *     divergent branch:  | .. | frame at the reconvergence point, all lanes | one side | the other side |  <- runs
 *
 * A frame that arrives at its reconvergence point is popped; lanes that exit leave every frame. */
#include "ptx.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

/* --------------------------------------------------------------------------------------------------------- one warp */
static void push(struct warp *warp, uint32_t pc, uint32_t mask, uint32_t reconverge)
{
    if (warp->depth == warp->stack_size) {
        warp->stack_size = warp->stack_size ? 2 * warp->stack_size : 16;
        warp->stack = realloc(warp->stack, sizeof *warp->stack * warp->stack_size);
    }
    warp->stack[warp->depth++] = (struct frame){pc, mask, reconverge};
}

/* The top frame into pc and mask, after popping what is empty or has arrived. */
static void load_top(struct warp *warp)
{
    while (warp->depth) {
        const struct frame *top = &warp->stack[warp->depth - 1];
        if (top->mask && top->pc != top->reconverge) {
            warp->pc = top->pc;
            warp->mask = top->mask;
            return;
        }
        --warp->depth;
    }
    warp->state = DONE;
}

/* The top frame splits: the parts, each with its pc, run one after the other and meet at `reconverge`. */
static void split(struct warp *warp, uint32_t reconverge, const struct frame *part, int parts)
{
    struct frame *top = &warp->stack[warp->depth - 1];
    if (top->reconverge == reconverge)
        --warp->depth; /* the frame below waits there already */
    else
        top->pc = reconverge;
    const uint32_t first = emu_random_below(&warp->block->random, (uint32_t)parts);
    for (int i = 0; i < parts; ++i) {
        const struct frame *p = &part[((uint32_t)i + first) % (uint32_t)parts];
        if (p->pc != reconverge) push(warp, p->pc, p->mask, reconverge);
    }
    load_top(warp);
}

static void branch(struct warp *warp, const struct op *op, uint32_t taken)
{
    const struct frame parts[] = {{warp->pc + 1, warp->mask & ~taken, 0}, {(uint32_t)op->target, taken, 0}};
    split(warp, (uint32_t)op->reconverge, parts, 2);
}

static void branch_table(struct warp *warp, const struct op *op, uint32_t active)
{
    const u32 *index = lane_reg(warp, op->r[0]);
    struct frame parts[LANES + 1];
    int count = 0;
    if (warp->mask & ~active) parts[count++] = (struct frame){warp->pc + 1, warp->mask & ~active, 0};
    while (active) {
        const int first = __builtin_ctz(active);
        if (index[first] >= op->lists)
            fault_at(warp, first, 719, "branch table", "index %u of %u", index[first], op->lists);
        struct frame part = {op->list[index[first]], 0, 0};
        for (int i = first; i < LANES; ++i)
            if ((active >> i & 1) && index[i] == index[first]) part.mask |= 1u << i;
        active &= ~part.mask;
        parts[count++] = part;
    }
    split(warp, (uint32_t)op->reconverge, parts, count);
}

static void leave(struct warp *warp, uint32_t lanes)
{
    warp->live &= ~lanes;
    warp->block->exited += (uint32_t)__builtin_popcount(lanes);
    for (uint32_t i = 0; i < warp->depth; ++i)
        warp->stack[i].mask &= ~lanes;
    warp->stack[warp->depth - 1].pc = warp->pc + 1;
    load_top(warp);
}

/* Lanes of this warp that have not come to the barrier: their frame may lie just below, on its way to an exit. */
static bool let_others_run(struct warp *warp)
{
    if (warp->depth < 2) return false;
    struct frame *top = &warp->stack[warp->depth - 1], *below = top - 1;
    if ((below->mask & warp->mask) || warp->block->kernel->op[below->pc].control == BARRIER) return false;
    top->pc = warp->pc;
    const struct frame swapped = *top;
    *top = *below;
    *below = swapped;
    load_top(warp);
    return true;
}

static uint32_t first_number(const struct warp *warp, uint32_t reg, uint32_t mask)
{
    return ((const u32 *)lane_reg(warp, reg))[__builtin_ctz(mask)];
}

static void arrive(struct warp *warp, const struct op *op, uint32_t active)
{
    if (active != warp->live) {
        if (active == warp->mask && let_others_run(warp)) return;
        fault_at(warp, __builtin_ctz(active), 719, "divergent barrier", "lanes 0x%08x are there, 0x%08x are not",
                 active, warp->live & ~active);
    }
    struct block *b = warp->block;
    warp->state = WAITING;
    warp->barrier = first_number(warp, op->r[1], active);
    warp->expected = op->r[2] == NONE ? b->launch->threads : first_number(warp, op->r[2], active);
    if (op->kind) warp->votes = predicate(warp, op->r[3]) ^ (op->immediate ? FULL : 0);
}

static void run_warp(struct warp *warp, uint32_t turns)
{
    const struct op *ops = warp->block->kernel->op;
    while (turns-- && warp->state == RUNNING) {
        const struct op *op = warp->op = &ops[warp->pc];
        uint32_t active = warp->mask;
        if (op->guard != NONE) active &= predicate(warp, op->guard) ^ op->guard_flip;
        if (op->control == STEP) {
            if (active) op->exec(warp, op, active);
            ++warp->pc;
        } else if (!active) {
            ++warp->pc;
        } else {
            switch ((enum control)op->control) {
            case BRANCH:
                if (active != warp->mask) {
                    branch(warp, op, active);
                    continue;
                }
                warp->pc = (uint32_t)op->target;
                break;
            case SWITCH: branch_table(warp, op, active); continue;
            case EXIT: leave(warp, active); continue;
            case BARRIER: arrive(warp, op, active); continue;
            default: fault_at(warp, __builtin_ctz(active), 719, "trap", "%s", "");
            }
        }
        if (warp->pc == warp->stack[warp->depth - 1].reconverge) {
            warp->stack[warp->depth - 1].pc = warp->pc;
            load_top(warp);
        }
    }
}

/* -------------------------------------------------------------------------------------------------------- one block */
static void release_barrier(struct block *b, uint32_t id)
{
    uint32_t all = 1, any = 0, count = 0;
    const struct op *place = NULL;
    for (int i = 0; i < b->warps; ++i) {
        struct warp *w = &b->warp[i];
        if (w->state != WAITING || w->barrier != id) continue;
        if (place && w->op != place)
            find_at(w, __builtin_ctz(w->live), "barriers differ",
                    "other warps wait at PTX line %u, this one at line %u", place->line, w->op->line);
        place = w->op;
        if (!w->op->kind) continue;
        all &= (w->votes & w->live) == w->live;
        any |= (w->votes & w->live) != 0;
        count += (uint32_t)__builtin_popcount(w->votes & w->live);
    }
    for (int i = 0; i < b->warps; ++i) {
        struct warp *w = &b->warp[i];
        if (w->state != WAITING || w->barrier != id) continue;
        if (w->op->kind == 1) set_predicate(w, w->op->r[0], w->live, all ? FULL : 0);
        if (w->op->kind == 2) set_predicate(w, w->op->r[0], w->live, any ? FULL : 0);
        for (int lane = 0; w->op->kind == 3 && lane < LANES; ++lane)
            if (w->live >> lane & 1) ((u32 *)lane_reg(w, w->op->r[0]))[lane] = count;
        w->state = RUNNING;
        ++w->pc;
        if (w->pc == w->stack[w->depth - 1].reconverge) {
            w->stack[w->depth - 1].pc = w->pc;
            load_top(w);
        }
    }
    ++b->epoch;
}

/* Opens the barriers that are complete; false when every warp waits at one that is not. */
static bool open_barriers(struct block *b)
{
    bool opened = false;
    for (int i = 0; i < b->warps; ++i) {
        struct warp *w = &b->warp[i];
        if (w->state != WAITING) continue;
        uint32_t threads = 0;
        for (int j = 0; j < b->warps; ++j)
            if (b->warp[j].state == WAITING && b->warp[j].barrier == w->barrier)
                threads += (uint32_t)__builtin_popcount(b->warp[j].live);
        if (w->expected == b->launch->threads && b->exited && threads + b->exited >= w->expected)
            find_at(w, __builtin_ctz(w->live), "barrier after exits",
                    "%u of %u threads have exited and do not reach it", b->exited, w->expected);
        if (threads + (w->expected == b->launch->threads ? b->exited : 0) < w->expected) continue;
        release_barrier(b, w->barrier);
        opened = true;
    }
    return opened;
}

static void start_warp(struct warp *w)
{
    struct block *b = w->block;
    const struct launch *l = b->launch;
    const uint32_t threads = l->threads - (uint32_t)w->index * LANES;
    w->live = threads >= LANES ? FULL : (1u << threads) - 1;
    w->state = RUNNING;
    w->depth = w->sync = w->transfers = 0;
    memset(w->group, 0, sizeof w->group);
    push(w, 0, w->live, (uint32_t)l->kernel->ops);
    load_top(w);
    for (int i = 0; i < 3; ++i) {
        const uint32_t reg = l->kernel->special[CTAID_X + i];
        if (reg == NONE) continue;
        u32 *lanes = lane_reg(w, reg);
        for (int lane = 0; lane < LANES; ++lane)
            lanes[lane] = b->index[i];
    }
    if (l->kernel->local_bytes) {
        memset(w->local, 0xff, LANES * l->kernel->local_bytes);
        memset(w->local_state, LIVE, LANES * l->kernel->local_bytes);
    }
}

static void start_shared(struct block *b)
{
    const struct emu_kernel *k = b->kernel;
    if (b->shared_size == SHARED_FIRST) return;
    memset(b->shared, 0xff, b->shared_size);
    memset(b->shared_state, 0, b->shared_size);
    for (const struct symbol *s = k->symbols; s; s = s->next)
        if (s->kind == SYMBOL_SHARED) memset(b->shared_state + s->address, LIVE, s->bytes);
    memset(b->shared_state + k->dynamic_address, LIVE, b->launch->request->dynamic_shared);
}

static void run_block(struct block *b, uint32_t number)
{
    const struct launch *l = b->launch;
    const uint32_t *grid = l->request->grid, at = l->order[number];
    b->index[0] = at % grid[0];
    b->index[1] = at / grid[0] % grid[1];
    b->index[2] = at / grid[0] / grid[1];
    b->id = l->first_id + number;
    b->exited = b->phase = 0;
    ++b->epoch;
    start_shared(b);
    for (int i = 0; i < b->warps; ++i)
        start_warp(&b->warp[i]);
    for (int done = 0; done < b->warps;) {
        const uint32_t first = emu_random_below(&b->random, (uint32_t)b->warps);
        bool ran = false;
        done = 0;
        for (int i = 0; i < b->warps; ++i) {
            struct warp *w = &b->warp[((uint32_t)i + first) % (uint32_t)b->warps];
            if (w->state == RUNNING) {
                run_warp(w, 32 + emu_random_below(&b->random, 480));
                ran = true;
            }
            done += w->state == DONE;
        }
        if (done == b->warps) return;
        if (!open_barriers(b) && !ran) {
            for (int i = 0; i < b->warps; ++i)
                if (b->warp[i].state == WAITING)
                    fault_at(&b->warp[i], __builtin_ctz(b->warp[i].live), 719, "barrier never completes",
                             "barrier %u waits for %u threads", b->warp[i].barrier, b->warp[i].expected);
        }
    }
}

/* ------------------------------------------------------------------------------------------------------ the workers */
static void fill(struct warp *w, uint32_t reg, char class, uint64_t value)
{
    if (class == 'p') *(u32 *)lane_reg(w, reg) = value ? FULL : 0;
    for (int i = 0; i < LANES && class != 'p'; ++i) {
        if (class == 'w')
            ((u32 *)lane_reg(w, reg))[i] = (uint32_t)value;
        else
            ((u64 *)lane_reg(w, reg))[i] = value;
    }
}

static void fill_constants(struct warp *w)
{
    const struct launch *l = w->block->launch;
    const struct emu_kernel *k = l->kernel;
    for (int i = 0; i < k->constants; ++i) {
        const struct constant *c = &k->constant[i];
        uint64_t value = c->value;
        if (c->symbol) value += c->symbol->kind == SYMBOL_DYNAMIC ? k->dynamic_address : c->symbol->address;
        fill(w, c->reg, c->class, value);
    }
    const uint32_t *grid = l->request->grid, *n = l->request->block;
    for (int s = 0; s < SPECIALS; ++s) {
        if (k->special[s] == NONE) continue;
        for (uint32_t lane = 0; lane < LANES; ++lane) {
            const uint32_t thread = (uint32_t)w->index * LANES + lane;
            const uint32_t values[SPECIALS] = {[TID_X] = thread % n[0],
                                               [TID_Y] = thread / n[0] % n[1],
                                               [TID_Z] = thread / n[0] / n[1],
                                               [NTID_X] = n[0],
                                               [NTID_Y] = n[1],
                                               [NTID_Z] = n[2],
                                               [NCTAID_X] = grid[0],
                                               [NCTAID_Y] = grid[1],
                                               [NCTAID_Z] = grid[2],
                                               [LANEID] = lane,
                                               [WARPID] = (uint32_t)w->index,
                                               [LANEMASK_EQ] = 1u << lane,
                                               [LANEMASK_LT] = (1u << lane) - 1,
                                               [LANEMASK_LE] = (2u << lane) - 1,
                                               [LANEMASK_GT] = ~((2u << lane) - 1),
                                               [LANEMASK_GE] = ~((1u << lane) - 1),
                                               [DYNAMIC_SMEM] = (uint32_t)l->request->dynamic_shared,
                                               [TOTAL_SMEM] = (uint32_t)(k->shared_bytes + l->request->dynamic_shared)};
            if (s == CLOCK64)
                ((u64 *)lane_reg(w, k->special[s]))[lane] = 0;
            else
                ((u32 *)lane_reg(w, k->special[s]))[lane] = values[s];
        }
    }
}

/* A block's memory is kept from launch to launch. */
static void prepare(struct block *b, struct launch *l, int worker)
{
    const struct emu_kernel *k = l->kernel;
    const size_t shared = (l->shared_size + 255) / 256 * 256, local = (LANES * k->local_bytes + 255) / 256 * 256;
    const size_t size =
        (size_t)l->warps * (k->register_bytes + 2 * local) + 2 * shared + shared / 4 * sizeof(struct trace);
    if (b->pool_size < size) {
        free(b->pool);
        b->pool_size = size + size / 2;
        b->pool = aligned_alloc(4096, (b->pool_size + 4095) / 4096 * 4096);
        memset(b->pool, 0, b->pool_size);
    }
    b->launch = l;
    b->kernel = k;
    b->random = emu_random_new(((uint64_t)l->first_id << 8) + (uint64_t)worker);
    b->shared_size = l->shared_size;
    b->error = 0;
    uint8_t *at = b->pool;
    b->trace = (struct trace *)(void *)at;
    /* Whatever lay here before must not look like a record. */
    memset(b->trace, 0, shared / 4 * sizeof(struct trace));
    b->epoch = 1;
    at += shared / 4 * sizeof(struct trace);
    b->shared = at;
    b->shared_state = at + shared;
    at += 2 * shared;
    if (b->warps_made < l->warps) {
        b->warp = realloc(b->warp, sizeof *b->warp * l->warps);
        memset(b->warp + b->warps_made, 0, sizeof *b->warp * (l->warps - b->warps_made));
        b->warps_made = l->warps;
    }
    for (int i = 0; i < (int)l->warps; ++i) {
        struct warp *w = &b->warp[i];
        w->block = b;
        w->index = i;
        w->reg = at;
        w->local = at + k->register_bytes;
        w->local_state = w->local + local;
        at += k->register_bytes + 2 * local;
        fill_constants(w);
    }
    b->warps = (int)l->warps;
}

#define MOST_WORKERS 16
static struct block pool[MOST_WORKERS];

struct worker {
    struct launch *launch;
    struct block *block;
};

static void *work(void *argument)
{
    struct worker *worker = argument;
    struct launch *l = worker->launch;
    struct block *b = worker->block;
    for (;;) {
        const uint32_t number = __atomic_fetch_add(&l->next, 1, __ATOMIC_RELAXED);
        if (number >= l->blocks || __atomic_load_n(&l->error, __ATOMIC_RELAXED)) return NULL;
        if (setjmp(b->fault) == 0)
            run_block(b, number);
        else
            __atomic_store_n(&l->error, b->error, __ATOMIC_RELAXED);
    }
}

static void shuffle_blocks(struct launch *l)
{
    struct emu_random random = emu_random_new(((uint64_t)l->first_id << 8) + 0xff);
    l->order = malloc(sizeof *l->order * l->blocks);
    for (uint32_t i = 0; i < l->blocks; ++i) {
        const uint32_t j = emu_random_below(&random, i + 1);
        l->order[i] = l->order[j];
        l->order[j] = i;
    }
}

static bool has_atomics(const struct emu_kernel *k)
{
    for (int i = 0; i < k->ops; ++i)
        if (k->op[i].exec == exec_atomic) return true;
    return false;
}

static void run_workers(struct launch *l)
{
    int workers = (int)emu_setting("EMU_THREADS", 1);
    workers = workers < 1 ? 1 : workers > MOST_WORKERS ? MOST_WORKERS : workers;
    if ((uint32_t)workers > l->blocks) workers = (int)l->blocks;
    l->many_workers = workers > 1;
    struct worker worker[MOST_WORKERS];
    pthread_t thread[MOST_WORKERS];
    for (int i = 0; i < workers; ++i) {
        worker[i] = (struct worker){l, &pool[i]};
        prepare(&pool[i], l, i);
    }
    for (int i = 1; i < workers; ++i)
        pthread_create(&thread[i], NULL, work, &worker[i]);
    work(&worker[0]);
    for (int i = 1; i < workers; ++i)
        pthread_join(thread[i], NULL);
}

int emu_launch(const struct emu_launch *request)
{
    static pthread_mutex_t one_at_a_time = PTHREAD_MUTEX_INITIALIZER;
    struct launch l = {.request = request, .kernel = request->kernel};
    l.threads = request->block[0] * request->block[1] * request->block[2];
    l.warps = (l.threads + LANES - 1) / LANES;
    l.blocks = request->grid[0] * request->grid[1] * request->grid[2];
    if (l.threads == 0 || l.blocks == 0) return 0;
    l.many_blocks = l.blocks > 1;
    l.shared_size = l.kernel->dynamic_address + request->dynamic_shared;
    pthread_mutex_lock(&one_at_a_time);
    l.first_id = race_take_ids(l.blocks);
    shuffle_blocks(&l);
    if (l.many_blocks && has_atomics(l.kernel)) l.release = calloc(l.blocks, sizeof *l.release);
    run_workers(&l);
    if (traffic_on) traffic_launch_ends(request);
    free(l.release);
    free(l.order);
    pthread_mutex_unlock(&one_at_a_time);
    return l.error;
}
