/* serving.h: the structs of plora_registry and plora_snapshot (registry.c, snapshot.c), which batch.c reads.
 *
 *     registry: [names] -> snapshot, or evicted snapshot            retired: snapshots without a name that somebody held
 *
 * Why nothing is used after it is freed: a snapshot is freed in one place, collect() in registry.c, and only while it has no name and no
 * holder. Its number of holders leaves 0 in one place, acquire(), under `table`, which the name was found under; and a name is
 * taken away under `table`. So whoever finds a snapshot by its name holds it before the name can go, and one without a name is never
 * held again: 0 is then final. The memory that products read goes earlier, when a snapshot is evicted, by the same rule. */
#ifndef PLORA_SERVING_H
#define PLORA_SERVING_H

#include "handles.h"

/* A and B of one weight, by element offset in the arena, and B's panels, in what follows the arena; rank 0 = none. */
struct plora__factors {
    int64_t rank, a_offset, b_offset, panel_offset;
    double scale;
};

struct plora_snapshot {
    atomic_int references; /* holders; 0 while only the name knows it */
    plora_registry *registry;
    char *name;
    int64_t version;
    struct plora__factors *factors; /* [weight_count of the model] */
    int64_t max_rank, parameter_count, panel_count;
    int32_t weights; /* that have factors */
    /* What products read, device memory: [a slot for each weight][arena as of plora_adapters][panels]. NULL while evicted: changes under
     * `table`, never while somebody holds the snapshot. */
    void *memory;
    /* The arena elsewhere, once it was evicted: in host memory, or in a file without a name. Only the holder of `changes` uses it. */
    float *parked;
    int parked_file; /* -1 = none */
    /* Under `table`: */
    int64_t acquired, last_use;
    plora_snapshot *next; /* of those that are retired */
};

struct plora__name {
    char *text;
    plora_snapshot *snapshot;
    int32_t pinned;
};

struct plora_registry {
    atomic_int references; /* the handle, and every snapshot that is held */
    plora_model *model;
    size_t budget;
    char *spill_directory;
    /* Held by who changes the registry, for as long as that takes; taken before `table`. */
    pthread_mutex_t changes;
    /* Held for moments, in which nothing is read, copied, allocated or freed. What follows is written under both. */
    pthread_mutex_t table;
    struct plora__name *names; /* sorted */
    int64_t name_count, name_capacity;
    plora_snapshot *retired;
    int64_t clock, versions;
    plora_registry_statistics statistics;
    struct plora__weight_copies *copies; /* of the weights before a merge, registry_merge.c */
};

/* snapshot.c. A snapshot without name, version and memory, for adapters of these ranks and scales in arena order. */
plora_status plora__snapshot_create(plora_registry *registry, const struct plora__adapter *adapters,
                                    int32_t adapter_count, int64_t parameter_count, plora_snapshot **snapshot);
void plora__snapshot_free(plora_snapshot *snapshot);
size_t plora__snapshot_bytes(const plora_snapshot *snapshot);
/* Memory, filled from an arena in host or device memory, or from where it is parked (arena = NULL). Complete when it returns. */
plora_status plora__snapshot_fill(const plora_snapshot *snapshot, const float *arena, void *stream, void **memory);
/* Keeps the arena elsewhere, if it is not already. */
plora_status plora__snapshot_park(plora_snapshot *snapshot, const void *memory);
void plora__snapshot_release_memory(const plora_snapshot *snapshot, void *memory);
/* The arena in a snapshot's memory. */
float *plora__snapshot_arena(const plora_snapshot *snapshot, const void *memory);

/* registry.c. NULL arguments are refused. */
plora_status plora__registry_check(const plora_registry *registry, const char *name);
/* Gives the snapshot a copy of the arena, which may still be written on the stream, and the name. On an error it ends. */
plora_status plora__registry_put(plora_registry *registry, const char *name, plora_snapshot *snapshot,
                                 const float *arena, void *stream, int64_t *version);
/* Whether a snapshot that the caller holds still has its name, and no other is held. `changes` is held. */
plora_status plora__registry_check_merge(plora_registry *registry, const plora_snapshot *snapshot);
/* The end of one reference. */
void plora__registry_release(plora_registry *registry);

/* registry_merge.c: puts the weights back as they were before a merge of this registry's, if there is one. */
void plora__registry_restore(plora_registry *registry);

#endif
