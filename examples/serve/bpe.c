/* bpe.c: see bpe.h. The pairs that can merge wait in a heap, by rank and then by place; the symbols are a linked list. An entry of the
 * heap is stale when its symbols have become others since: that shows when it comes up. */
#include "bpe.h"

#include <stdlib.h>

#include "util.h"

struct merge { /* of an open hash table */
    uint64_t pair;
    int32_t rank, made; /* made < 0: free */
};

struct merges {
    uint64_t mask;
    struct merge table[];
};

static uint64_t pair_of(int32_t left, int32_t right)
{
    return (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
}

int merges_create(int64_t count, struct merges **merges)
{
    uint64_t size = 16;
    while (size < 2 * (uint64_t)count)
        size *= 2;
    *merges = malloc(sizeof **merges + size * sizeof *(*merges)->table);
    if (!*merges) return fault("out of memory: %lld merges", (long long)count);
    (*merges)->mask = size - 1;
    for (uint64_t i = 0; i < size; i++)
        (*merges)->table[i].made = -1;
    return 0;
}

void merges_destroy(struct merges *merges)
{
    free(merges);
}

/* Where the pair is, or belongs. */
static uint64_t place(const struct merges *merges, uint64_t pair)
{
    uint64_t at = random_at(pair, 0) & merges->mask;
    while (merges->table[at].made >= 0 && merges->table[at].pair != pair)
        at = (at + 1) & merges->mask;
    return at;
}

void merges_add(struct merges *merges, int32_t rank, int32_t left, int32_t right, int32_t made)
{
    const uint64_t pair = pair_of(left, right);
    merges->table[place(merges, pair)] = (struct merge){pair, rank, made};
}

struct candidate {
    int32_t rank, made;
    int64_t at; /* of its left symbol */
};

struct heap {
    struct candidate *items;
    int64_t count;
};

struct symbol {
    int32_t id; /* -1: merged into the one before */
    int64_t before, after;
};

static int sooner(const struct candidate *a, const struct candidate *b)
{
    return a->rank != b->rank ? a->rank < b->rank : a->at < b->at;
}

static void heap_push(struct heap *heap, struct candidate item)
{
    int64_t at = heap->count++;
    for (; at > 0 && sooner(&item, &heap->items[(at - 1) / 2]); at = (at - 1) / 2)
        heap->items[at] = heap->items[(at - 1) / 2];
    heap->items[at] = item;
}

static struct candidate heap_pop(struct heap *heap)
{
    const struct candidate top = heap->items[0], last = heap->items[--heap->count];
    int64_t at = 0;
    for (;;) {
        int64_t child = 2 * at + 1;
        if (child >= heap->count) break;
        if (child + 1 < heap->count && sooner(&heap->items[child + 1], &heap->items[child])) child++;
        if (!sooner(&heap->items[child], &last)) break;
        heap->items[at] = heap->items[child];
        at = child;
    }
    if (heap->count > 0) heap->items[at] = last;
    return top;
}

/* Puts the pair that begins at `at` into the heap, if it can merge. */
static void consider(const struct merges *merges, const struct symbol *symbols, int64_t at, struct heap *heap)
{
    if (at < 0 || symbols[at].after < 0) return;
    const struct merge *merge = &merges->table[place(merges, pair_of(symbols[at].id, symbols[symbols[at].after].id))];
    if (merge->made >= 0) heap_push(heap, (struct candidate){merge->rank, merge->made, at});
}

static void merge_all(const struct merges *merges, struct symbol *symbols, struct heap *heap)
{
    while (heap->count > 0) {
        const struct candidate top = heap_pop(heap);
        struct symbol *left = &symbols[top.at];
        if (left->id < 0 || left->after < 0) continue;
        struct symbol *right = &symbols[left->after];
        const struct merge *merge = &merges->table[place(merges, pair_of(left->id, right->id))];
        if (merge->made != top.made) continue;
        left->id = top.made;
        left->after = right->after;
        right->id = -1;
        if (left->after >= 0) symbols[left->after].before = top.at;
        consider(merges, symbols, left->before, heap);
        consider(merges, symbols, top.at, heap);
    }
}

int64_t merges_apply(const struct merges *merges, int32_t *ids, int64_t count)
{
    if (count < 2) return count;
    struct symbol *symbols = malloc((size_t)count * sizeof *symbols);
    /* n - 1 pairs at first, and each of at most n - 1 merges adds two */
    struct heap heap = {malloc(3 * (size_t)count * sizeof *heap.items), 0};
    int64_t left = -1;
    if (symbols && heap.items) {
        for (int64_t i = 0; i < count; i++)
            symbols[i] = (struct symbol){ids[i], i - 1, i + 1 < count ? i + 1 : -1};
        for (int64_t i = 0; i < count; i++)
            consider(merges, symbols, i, &heap);
        merge_all(merges, symbols, &heap);
        left = 0;
        for (int64_t i = 0; i >= 0; i = symbols[i].after)
            ids[left++] = symbols[i].id;
    } else
        fault("out of memory: a word of %lld bytes", (long long)count);
    free(symbols);
    free(heap.items);
    return left;
}
