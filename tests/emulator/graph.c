/* graph.c: the control flow of a kernel: where divergent lanes meet again, and which registers can share a place.
 *
 * A branch reconverges at the immediate post-dominator of its block (Cooper, Harvey, Kennedy: "A simple, fast dominance
 * algorithm", on the reversed graph). Registers get places by linear scan over live intervals: PTX has thousands of virtual
 * registers, and a warp's file should stay in the cache. */
#include "ptx.h"

#include <stdlib.h>
#include <string.h>

struct node {
    int first, last;    /* ops [first, last) */
    int next[2], nexts; /* successors; the exit is node `nodes` */
    uint32_t *targets;  /* of a SWITCH: nodes */
    int targets_count;
    int post, order; /* immediate post-dominator; number in postorder of the reversed graph */
    uint64_t *in, *out, *use, *def;
};

struct graph {
    struct emu_kernel *kernel;
    struct node *node;
    int nodes;
    int *node_of; /* op -> node */
    int *stack, *list;
    size_t words;
};

static bool ends_block(const struct op *op)
{
    return op->control == BRANCH || op->control == SWITCH || op->control == EXIT || op->control == TRAP;
}

static void cut(struct graph *g)
{
    const struct emu_kernel *k = g->kernel;
    bool *leader = calloc((size_t)k->ops + 1, sizeof *leader);
    leader[0] = true;
    for (int i = 0; i < k->ops; ++i) {
        const struct op *op = &k->op[i];
        if (!ends_block(op)) continue;
        leader[i + 1] = true;
        if (op->control == BRANCH) leader[op->target] = true;
        for (int j = 0; op->control == SWITCH && j < op->lists; ++j)
            leader[op->list[j]] = true;
    }
    for (int i = 0; i < k->ops; ++i)
        g->nodes += leader[i];
    g->node = calloc((size_t)g->nodes + 1, sizeof *g->node);
    g->node_of = malloc(sizeof *g->node_of * ((size_t)k->ops + 1));
    int n = -1;
    for (int i = 0; i < k->ops; ++i) {
        if (leader[i]) g->node[++n].first = i;
        g->node[n].last = i + 1;
        g->node_of[i] = n;
    }
    g->node_of[k->ops] = g->nodes;
    free(leader);
    for (n = 0; n < g->nodes; ++n) {
        struct node *node = &g->node[n];
        const struct op *op = &k->op[node->last - 1];
        const bool falls_through = !ends_block(op) || op->guard != NONE;
        if (falls_through) node->next[node->nexts++] = g->node_of[node->last];
        if (op->control == BRANCH) node->next[node->nexts++] = g->node_of[op->target];
        if (op->control == EXIT || op->control == TRAP) node->next[node->nexts++] = g->nodes;
        if (op->control == SWITCH) {
            node->targets_count = op->lists;
            node->targets = malloc(sizeof *node->targets * ((size_t)op->lists + 1));
            for (int j = 0; j < op->lists; ++j)
                node->targets[j] = (uint32_t)g->node_of[op->list[j]];
        }
    }
}

static int successors(const struct node *node)
{
    return node->nexts + node->targets_count;
}
static int successor(const struct node *node, int i)
{
    return i < node->nexts ? node->next[i] : (int)node->targets[i - node->nexts];
}

/* Numbers the nodes in postorder of the reversed graph, from the exit; g->list gets them in that order. */
static int number_nodes(struct graph *g)
{
    int *from = calloc((size_t)g->nodes + 2, sizeof *from), edges = 0;
    for (int n = 0; n < g->nodes; ++n)
        for (int i = 0; i < successors(&g->node[n]); ++i)
            ++from[successor(&g->node[n], i)], ++edges;
    int *start = malloc(sizeof *start * ((size_t)g->nodes + 2)), *edge = malloc(sizeof *edge * (size_t)(edges + 1));
    start[0] = 0;
    for (int n = 0; n <= g->nodes; ++n)
        start[n + 1] = start[n] + from[n];
    int *fill = malloc(sizeof *fill * ((size_t)g->nodes + 2));
    memcpy(fill, start, sizeof *fill * ((size_t)g->nodes + 1));
    for (int n = 0; n < g->nodes; ++n)
        for (int i = 0; i < successors(&g->node[n]); ++i)
            edge[fill[successor(&g->node[n], i)]++] = n;
    memcpy(fill, start, sizeof *fill * ((size_t)g->nodes + 1));
    for (int n = 0; n <= g->nodes; ++n)
        g->node[n].order = -1;
    int depth = 0, count = 0;
    g->stack[depth++] = g->nodes;
    g->node[g->nodes].order = -2;
    while (depth) {
        const int n = g->stack[depth - 1];
        if (fill[n] < start[n + 1]) {
            const int m = edge[fill[n]++];
            if (g->node[m].order != -1) continue;
            g->node[m].order = -2;
            g->stack[depth++] = m;
        } else {
            g->node[n].order = count;
            g->list[count++] = n;
            --depth;
        }
    }
    free(from), free(start), free(edge), free(fill);
    return count;
}

static void post_dominators(struct graph *g)
{
    g->stack = malloc(sizeof *g->stack * ((size_t)g->nodes + 1));
    g->list = malloc(sizeof *g->list * ((size_t)g->nodes + 1));
    const int count = number_nodes(g);
    for (int n = 0; n < g->nodes; ++n)
        g->node[n].post = -1;
    g->node[g->nodes].post = g->nodes;
    for (bool changed = true; changed;) {
        changed = false;
        for (int i = count - 2; i >= 0; --i) {
            struct node *node = &g->node[g->list[i]];
            int post = -1;
            for (int j = 0; j < successors(node); ++j) {
                int other = successor(node, j);
                if (g->node[other].post < 0) continue;
                if (post < 0) post = other;
                while (post != other) {
                    while (g->node[post].order < g->node[other].order)
                        post = g->node[post].post;
                    while (g->node[other].order < g->node[post].order)
                        other = g->node[other].post;
                }
            }
            if (post == node->post) continue;
            node->post = post;
            changed = true;
        }
    }
    struct emu_kernel *k = g->kernel;
    for (int i = 0; i < k->ops; ++i) {
        const int post = g->node[g->node_of[i]].post;
        /* Lanes do not wait for each other to exit. */
        const bool at_exit = post >= 0 && post < g->nodes && k->op[g->node[post].first].control == EXIT;
        k->op[i].reconverge = post < 0 || post == g->nodes || at_exit ? k->ops : g->node[post].first;
    }
}

/* ----------------------------------------------------------------------------------------------------------- registers */
static bool has(const uint64_t *set, uint32_t i)
{
    return set[i / 64] >> i % 64 & 1;
}
static void put(uint64_t *set, uint32_t i)
{
    set[i / 64] |= UINT64_C(1) << i % 64;
}

/* Calls visit for every register of an op, sources first. */
typedef void visit_fn(struct graph *g, void *state, uint32_t reg, bool written, bool always);
static void each_reg(struct graph *g, const struct op *op, visit_fn *visit, void *state)
{
    const bool always = op->guard == NONE;
    if (!always) visit(g, state, op->guard, false, true);
    for (int written = 0; written < 2; ++written) {
        for (int i = 0; i < 6; ++i)
            if (op->r[i] < SINK && (op->defs >> i & 1) == written) visit(g, state, op->r[i], written, always);
        for (int i = 0; op->control != SWITCH && i < op->lists; ++i)
            if (op->list[i] < SINK && (i < op->list_defs) == written) visit(g, state, op->list[i], written, always);
    }
}

static void use_or_def(struct graph *g, void *state, uint32_t reg, bool written, bool always)
{
    struct node *node = state;
    if (g->kernel->reg[reg].fixed) return;
    if (written && always)
        put(node->def, reg);
    else if (!has(node->def, reg))
        put(node->use, reg);
}

static void live_sets(struct graph *g)
{
    g->words = (g->kernel->regs + 63) / 64 + 1;
    for (int n = 0; n <= g->nodes; ++n) {
        struct node *node = &g->node[n];
        node->in = calloc(4 * g->words, sizeof *node->in);
        node->out = node->in + g->words;
        node->use = node->out + g->words;
        node->def = node->use + g->words;
        for (int i = node->first; n < g->nodes && i < node->last; ++i)
            each_reg(g, &g->kernel->op[i], use_or_def, node);
    }
    for (bool changed = true; changed;) {
        changed = false;
        for (int n = g->nodes - 1; n >= 0; --n) {
            struct node *node = &g->node[n];
            for (size_t w = 0; w < g->words; ++w) {
                uint64_t out = 0;
                for (int i = 0; i < successors(node); ++i)
                    out |= g->node[successor(node, i)].in[w];
                const uint64_t in = node->use[w] | (out & ~node->def[w]);
                changed |= in != node->in[w];
                node->out[w] = out;
                node->in[w] = in;
            }
        }
    }
}

struct interval {
    int first, last;
    uint32_t reg;
};
struct at {
    struct interval *interval;
    int op;
};
static void extend(struct interval *interval, int at)
{
    if (interval->last < 0) interval->first = at;
    if (at < interval->first) interval->first = at;
    if (at > interval->last) interval->last = at;
}
static void touch(struct graph *g, void *state, uint32_t reg, bool written, bool always)
{
    struct at *at = state;
    (void)g, (void)written, (void)always;
    extend(&at->interval[reg], at->op);
}
static int by_first(const void *a, const void *b)
{
    const struct interval *x = a, *y = b;
    return x->first != y->first ? (x->first < y->first ? -1 : 1) : x->reg < y->reg ? -1 : x->reg > y->reg;
}

static struct interval *intervals(struct graph *g)
{
    const struct emu_kernel *k = g->kernel;
    struct interval *interval = malloc(sizeof *interval * (k->regs + 1));
    for (uint32_t r = 0; r < k->regs; ++r)
        interval[r] = (struct interval){-1, -1, r};
    for (int n = 0; n < g->nodes; ++n) {
        const struct node *node = &g->node[n];
        for (int i = node->first; i < node->last; ++i)
            each_reg(g, &k->op[i], touch, &(struct at){interval, i});
        for (uint32_t r = 0; r < k->regs; ++r) {
            if (has(node->in, r)) extend(&interval[r], node->first);
            if (has(node->out, r)) extend(&interval[r], node->last);
        }
    }
    return interval;
}

static void estimate_registers(struct emu_kernel *k, const struct interval *interval)
{
    int *change = calloc((size_t)k->ops + 2, sizeof *change), live = 0, most = 0;
    for (uint32_t r = 0; r < k->regs; ++r) {
        if (k->reg[r].fixed || k->reg[r].class == 'p' || interval[r].last < 0) continue;
        const int size = k->reg[r].class == 'd' ? 2 : 1;
        change[interval[r].first] += size;
        change[interval[r].last] -= size;
    }
    for (int i = 0; i <= k->ops; ++i) {
        live += change[i];
        if (live > most) most = live;
    }
    k->live_registers = most;
    free(change);
}

/* One pool of equal places for each class; a place is free again after the last use of the register in it. */
static void place_registers(struct graph *g)
{
    static const char CLASSES[] = "pwd";
    static const uint32_t SIZES[] = {4, 4 * LANES, 8 * LANES};
    struct emu_kernel *k = g->kernel;
    struct interval *interval = intervals(g);
    estimate_registers(k, interval);
    qsort(interval, k->regs, sizeof *interval, by_first);
    uint32_t offset = 0;
    int *busy_until = malloc(sizeof *busy_until * (k->regs + 1));
    for (int c = 0; c < 3; ++c) {
        uint32_t places = 0;
        for (uint32_t i = 0; i < k->regs; ++i) {
            struct reg *reg = &k->reg[interval[i].reg];
            if (reg->class != CLASSES[c] || (interval[i].last < 0 && !reg->fixed)) continue;
            uint32_t place = 0;
            while (!reg->fixed && place < places && busy_until[place] >= interval[i].first)
                ++place;
            if (reg->fixed) place = places;
            if (place == places) ++places;
            busy_until[place] = reg->fixed ? k->ops + 1 : interval[i].last;
            reg->offset = offset + place * SIZES[c];
        }
        offset = (offset + places * SIZES[c] + 255) / 256 * 256;
    }
    k->register_bytes = offset + 256;
    free(busy_until);
    free(interval);
}

static void rename_registers(struct emu_kernel *k)
{
    for (int i = 0; i < k->ops; ++i) {
        struct op *op = &k->op[i];
        if (op->guard != NONE) op->guard = k->reg[op->guard].offset;
        for (int j = 0; j < 6; ++j)
            if (op->r[j] < SINK) op->r[j] = k->reg[op->r[j]].offset;
        for (int j = 0; op->control != SWITCH && j < op->lists; ++j)
            if (op->list[j] < SINK) op->list[j] = k->reg[op->list[j]].offset;
    }
    for (int i = 0; i < k->constants; ++i)
        k->constant[i].reg = k->reg[k->constant[i].reg].offset;
    for (int i = 0; i < SPECIALS; ++i)
        if (k->special[i] != NONE) k->special[i] = k->reg[k->special[i]].offset;
}

/* Every place is written by the op that a scratch place could serve: `_` becomes a register nobody reads. */
static void give_sinks_a_place(struct emu_kernel *k)
{
    for (int i = 0; i < k->ops; ++i)
        if (k->op[i].r[0] == SINK && k->op[i].control == STEP) k->op[i].r[0] = k->register_bytes - 256;
}

void graph_build(struct emu_kernel *kernel)
{
    struct graph g = {.kernel = kernel};
    cut(&g);
    post_dominators(&g);
    live_sets(&g);
    place_registers(&g);
    rename_registers(kernel);
    give_sinks_a_place(kernel);
    for (int n = 0; n <= g.nodes; ++n) {
        free(g.node[n].in);
        free(g.node[n].targets);
    }
    free(g.node);
    free(g.node_of);
    free(g.stack);
    free(g.list);
    free(kernel->reg);
    kernel->reg = NULL;
}
