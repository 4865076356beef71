/* registry.c: names and their snapshots: acquired by requests, replaced, unloaded, evicted and brought back while these run.
 *
 * A change is prepared without any lock that a reader takes: memory is had and filled, room is made; then one pointer is
 * exchanged under `table`. How snapshots come into being is in registry_add.c; why none is used after its end, in serving.h. */
#include "serving.h"

#include <string.h>
#include <sys/stat.h>

/* --------------------------------------------------------------------------------------------------- creation and end */

/* A lock that is held for less time than a sleep takes: who has to wait for it spins for a while. */
static void init_brief(pthread_mutex_t *mutex)
{
    pthread_mutexattr_t kind;
    pthread_mutexattr_init(&kind);
#ifdef __GLIBC__
    pthread_mutexattr_settype(&kind, PTHREAD_MUTEX_ADAPTIVE_NP);
#endif
    pthread_mutex_init(mutex, &kind);
    pthread_mutexattr_destroy(&kind);
}

plora_status plora_registry_create(plora_model *model, const plora_registry_options *given, plora_registry **registry)
{
    PLORA_CHECK(model != NULL && registry != NULL, PLORA_ERROR_INVALID_ARGUMENT, "%s is NULL",
                model == NULL ? "model" : "registry");
    plora_registry_options options = PLORA_REGISTRY_OPTIONS_INIT;
    PLORA_TRY(plora__read_options(&options, sizeof options, given, "plora_registry_options"));
    struct stat info;
    PLORA_CHECK(options.spill_directory == NULL || (stat(options.spill_directory, &info) == 0 && S_ISDIR(info.st_mode)),
                PLORA_ERROR_IO, "spill_directory '%.600s' is not a directory", options.spill_directory);
    plora_context *context = model->context;
    char *directory = NULL;
    if (options.spill_directory != NULL) PLORA_TRY(plora__duplicate(context, options.spill_directory, &directory));
    void *memory;
    const plora_status status = plora__allocate_zeroed(context, sizeof(plora_registry), &memory);
    if (status != PLORA_OK) {
        plora__free_string(context, directory);
        return status;
    }
    plora_registry *created = memory;
    atomic_init(&created->references, 1);
    created->model = model;
    created->budget = options.memory_budget;
    created->spill_directory = directory;
    pthread_mutex_init(&created->changes, NULL);
    init_brief(&created->table);
    plora__model_retain(model);
    atomic_fetch_add(&model->adapters_made, 1);
    *registry = created;
    return PLORA_OK;
}

static void free_retired(plora_snapshot *list)
{
    while (list != NULL) {
        plora_snapshot *next = list->next;
        plora__snapshot_free(list);
        list = next;
    }
}

void plora__registry_release(plora_registry *registry)
{
    if (atomic_fetch_sub_explicit(&registry->references, 1, memory_order_acq_rel) != 1) return;
    plora_model *model = registry->model;
    plora_context *context = model->context;
    plora__registry_restore(registry);
    free_retired(registry->retired);
    for (int64_t i = 0; i < registry->name_count; ++i) {
        plora__snapshot_free(registry->names[i].snapshot);
        plora__free_string(context, registry->names[i].text);
    }
    plora__free(context, registry->names, (size_t)registry->name_capacity * sizeof *registry->names);
    plora__free_string(context, registry->spill_directory);
    pthread_mutex_destroy(&registry->changes);
    pthread_mutex_destroy(&registry->table);
    plora__free(context, registry, sizeof *registry);
    atomic_fetch_sub(&model->adapters_made, 1);
    plora__model_release(model);
}

void plora_registry_destroy(plora_registry *registry)
{
    if (registry != NULL) plora__registry_release(registry);
}

/* -------------------------------------------------------------------------------------------------------------- holding */

/* Under `table`, or by somebody who holds it already. */
static void hold(plora_snapshot *snapshot)
{
    if (atomic_fetch_add_explicit(&snapshot->references, 1, memory_order_relaxed) == 0)
        atomic_fetch_add_explicit(&snapshot->registry->references, 1, memory_order_relaxed);
}

void plora_snapshot_retain(plora_snapshot *snapshot)
{
    if (snapshot != NULL) hold(snapshot);
}

void plora_snapshot_release(plora_snapshot *snapshot)
{
    if (snapshot == NULL) return;
    plora_registry *registry = snapshot->registry;
    /* What this holder has read is read before a collector sees the 0; then the snapshot may be gone at once. */
    if (atomic_fetch_sub_explicit(&snapshot->references, 1, memory_order_acq_rel) == 1)
        plora__registry_release(registry);
}

static int is_held(const plora_snapshot *snapshot)
{
    return atomic_load_explicit(&snapshot->references, memory_order_acquire) > 0;
}

static int is_merged(const plora_snapshot *snapshot)
{
    return atomic_load(&snapshot->registry->model->merged) == snapshot;
}

/* ---------------------------------------------------------------------------------------------------------------- names */

/* Where the name is, or where it would be. */
static int64_t place_of(const plora_registry *registry, const char *name, int *found)
{
    int64_t low = 0, high = registry->name_count;
    *found = 0;
    while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        const int order = strcmp(registry->names[middle].text, name);
        if (order == 0) *found = 1;
        if (order < 0)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static struct plora__name *find(const plora_registry *registry, const char *name)
{
    int found;
    const int64_t place = place_of(registry, name, &found);
    return found ? &registry->names[place] : NULL;
}

static plora_status not_found(const char *name)
{
    plora__fail(PLORA_ERROR_NOT_FOUND, "there is no adapter '%.300s'", name);
    return PLORA_ERROR_NOT_FOUND;
}

plora_status plora__registry_check(const plora_registry *registry, const char *name)
{
    PLORA_CHECK(registry != NULL && name != NULL, PLORA_ERROR_INVALID_ARGUMENT, "%s is NULL",
                registry == NULL ? "registry" : "name");
    return PLORA_OK;
}

/* ------------------------------------------------------------------------------------------- memory; `changes` is held */

/* Frees what has no name and no holder. */
static void collect(plora_registry *registry)
{
    plora_snapshot *unused = NULL;
    pthread_mutex_lock(&registry->table);
    for (plora_snapshot **at = &registry->retired; *at != NULL;) {
        plora_snapshot *snapshot = *at;
        if (is_held(snapshot)) {
            at = &snapshot->next;
            continue;
        }
        *at = snapshot->next;
        snapshot->next = unused;
        unused = snapshot;
        const int64_t bytes = (int64_t)plora__snapshot_bytes(snapshot);
        registry->statistics.retired--;
        if (snapshot->memory != NULL) registry->statistics.resident_bytes -= bytes;
        if (snapshot->parked != NULL || snapshot->parked_file >= 0) registry->statistics.evicted_bytes -= bytes;
    }
    pthread_mutex_unlock(&registry->table);
    free_retired(unused);
}

static int can_evict(const plora_registry *registry)
{
    return registry->spill_directory != NULL || registry->model->context->options.backend != PLORA_BACKEND_CPU;
}

/* Evicts a snapshot whose `memory` the caller has taken away from it under `table`, so that nobody can hold it meanwhile. */
static plora_status evict(plora_registry *registry, plora_snapshot *snapshot, void *memory)
{
    const int is_new = snapshot->parked == NULL && snapshot->parked_file < 0;
    const int64_t bytes = (int64_t)plora__snapshot_bytes(snapshot);
    const plora_status status = plora__snapshot_park(snapshot, memory);
    pthread_mutex_lock(&registry->table);
    if (status != PLORA_OK) {
        snapshot->memory = memory;
    } else {
        registry->statistics.resident_bytes -= bytes;
        registry->statistics.evicted++;
        if (is_new) registry->statistics.evicted_bytes += bytes;
    }
    pthread_mutex_unlock(&registry->table);
    if (status == PLORA_OK) plora__snapshot_release_memory(snapshot, memory);
    return status;
}

/* The one of those that can go which was acquired longest ago. Under `table`. */
static plora_snapshot *find_victim(const plora_registry *registry)
{
    plora_snapshot *victim = NULL;
    for (int64_t i = 0; i < registry->name_count; ++i) {
        plora_snapshot *snapshot = registry->names[i].snapshot;
        if (registry->names[i].pinned || snapshot->memory == NULL || is_held(snapshot) || is_merged(snapshot)) continue;
        if (victim == NULL || snapshot->last_use < victim->last_use) victim = snapshot;
    }
    return victim;
}

static plora_status make_room(plora_registry *registry, const char *name, size_t bytes)
{
    if (registry->budget == 0) return PLORA_OK;
    for (;;) {
        collect(registry);
        pthread_mutex_lock(&registry->table);
        const size_t resident = (size_t)registry->statistics.resident_bytes;
        const int fits = bytes <= registry->budget && resident <= registry->budget - bytes;
        plora_snapshot *victim =
            fits || bytes > registry->budget || !can_evict(registry) ? NULL : find_victim(registry);
        void *memory = NULL;
        if (victim != NULL) {
            memory = victim->memory;
            victim->memory = NULL;
        }
        pthread_mutex_unlock(&registry->table);
        if (fits) return PLORA_OK;
        PLORA_CHECK(victim != NULL, PLORA_ERROR_OUT_OF_MEMORY,
                    "adapter '%.300s' needs %zu bytes: %zu of the budget of %zu are taken by adapters that are %s",
                    name, bytes, resident, registry->budget,
                    can_evict(registry) ? "held or pinned"
                                        : "resident, and without spill_directory none can be evicted");
        PLORA_TRY(evict(registry, victim, memory));
    }
}

/* Brings a snapshot that has a name back. */
static plora_status restore(plora_registry *registry, plora_snapshot *snapshot)
{
    void *memory;
    PLORA_TRY(make_room(registry, snapshot->name, plora__snapshot_bytes(snapshot)));
    PLORA_TRY(plora__snapshot_fill(snapshot, NULL, NULL, &memory));
    pthread_mutex_lock(&registry->table);
    snapshot->memory = memory;
    registry->statistics.resident_bytes += (int64_t)plora__snapshot_bytes(snapshot);
    registry->statistics.restored++;
    pthread_mutex_unlock(&registry->table);
    return PLORA_OK;
}

/* ------------------------------------------------------------------------------------------------------------- changing */

/* Room for one more name. The old list ends under `table`. */
static plora_status reserve_name(plora_registry *registry)
{
    if (registry->name_count < registry->name_capacity) return PLORA_OK;
    plora_context *context = registry->model->context;
    const int64_t before = registry->name_capacity, capacity = before == 0 ? 16 : 2 * before;
    size_t bytes;
    void *memory;
    PLORA_TRY(plora__multiply((size_t)capacity, sizeof *registry->names, &bytes));
    PLORA_TRY(plora__allocate(context, bytes, &memory));
    struct plora__name *old = registry->names;
    pthread_mutex_lock(&registry->table);
    if (registry->name_count > 0) memcpy(memory, old, (size_t)registry->name_count * sizeof *old);
    registry->names = memory;
    registry->name_capacity = capacity;
    pthread_mutex_unlock(&registry->table);
    plora__free(context, old, (size_t)before * sizeof *old);
    return PLORA_OK;
}

/* Under `table`. */
static void retire(plora_registry *registry, plora_snapshot *snapshot)
{
    snapshot->next = registry->retired;
    registry->retired = snapshot;
    registry->statistics.retired++;
}

/* Gives a snapshot with memory the name. *text becomes the registry's, or NULL when it was not needed. Under `table`. */
static void exchange(plora_registry *registry, const char *name, plora_snapshot *snapshot, char **text)
{
    int found;
    const int64_t place = place_of(registry, name, &found);
    struct plora__name *at = &registry->names[place];
    snapshot->version = ++registry->versions;
    snapshot->last_use = ++registry->clock;
    registry->statistics.resident_bytes += (int64_t)plora__snapshot_bytes(snapshot);
    if (found) {
        retire(registry, at->snapshot);
        at->snapshot = snapshot;
        registry->statistics.replaced++;
        return;
    }
    memmove(at + 1, at, (size_t)(registry->name_count - place) * sizeof *at);
    *at = (struct plora__name){*text, snapshot, 0};
    *text = NULL;
    registry->name_count++;
    registry->statistics.added++;
}

static plora_status put(plora_registry *registry, const char *name, plora_snapshot *snapshot, const float *arena,
                        void *stream)
{
    char *text;
    const struct plora__name *taken = find(registry, name); /* only this thread changes names */
    PLORA_CHECK(taken == NULL || !is_merged(taken->snapshot), PLORA_ERROR_BUSY,
                "adapter '%.300s' is merged into the backbone: it cannot be replaced", name);
    PLORA_TRY(plora__duplicate(registry->model->context, name, &text));
    plora_status status = make_room(registry, name, plora__snapshot_bytes(snapshot));
    if (status == PLORA_OK) status = reserve_name(registry);
    if (status == PLORA_OK) status = plora__snapshot_fill(snapshot, arena, stream, &snapshot->memory);
    if (status == PLORA_OK) {
        pthread_mutex_lock(&registry->table);
        exchange(registry, name, snapshot, &text);
        pthread_mutex_unlock(&registry->table);
        collect(registry);
    }
    plora__free_string(registry->model->context, text);
    return status;
}

plora_status plora__registry_put(plora_registry *registry, const char *name, plora_snapshot *snapshot,
                                 const float *arena, void *stream, int64_t *version)
{
    plora_status status = plora__duplicate(registry->model->context, name, &snapshot->name);
    if (status == PLORA_OK) {
        pthread_mutex_lock(&registry->changes);
        status = put(registry, name, snapshot, arena, stream);
        if (status == PLORA_OK && version != NULL) *version = snapshot->version;
        pthread_mutex_unlock(&registry->changes);
    }
    if (status != PLORA_OK) plora__snapshot_free(snapshot);
    return status;
}

plora_status plora_registry_unload(plora_registry *registry, const char *name, uint32_t flags)
{
    PLORA_TRY(plora__registry_check(registry, name));
    PLORA_CHECK((flags & ~(uint32_t)PLORA_REGISTRY_DEFER) == 0, PLORA_ERROR_INVALID_ARGUMENT, "unknown flags 0x%x",
                flags & ~(uint32_t)PLORA_REGISTRY_DEFER);
    char *text = NULL;
    int holders = 0, merged = 0;
    int64_t version = 0;
    pthread_mutex_lock(&registry->changes);
    pthread_mutex_lock(&registry->table);
    struct plora__name *found = find(registry, name);
    if (found != NULL) {
        plora_snapshot *snapshot = found->snapshot;
        version = snapshot->version;
        merged = is_merged(snapshot);
        if ((flags & PLORA_REGISTRY_DEFER) == 0) holders = atomic_load(&snapshot->references);
        if (holders > 0 || merged) {
            registry->statistics.busy++;
        } else {
            text = found->text;
            retire(registry, snapshot);
            registry->name_count--;
            registry->statistics.unloaded++;
            memmove(found, found + 1, (size_t)(&registry->names[registry->name_count] - found) * sizeof *found);
        }
    }
    pthread_mutex_unlock(&registry->table);
    collect(registry);
    pthread_mutex_unlock(&registry->changes);
    plora__free_string(registry->model->context, text);
    if (found == NULL) return not_found(name);
    PLORA_CHECK(!merged, PLORA_ERROR_BUSY, "adapter '%.300s' version %lld is merged into the backbone", name,
                (long long)version);
    PLORA_CHECK(holders == 0, PLORA_ERROR_BUSY, "adapter '%.300s' version %lld is held %d times", name,
                (long long)version, holders);
    return PLORA_OK;
}

plora_status plora_registry_pin(plora_registry *registry, const char *name, int32_t pinned)
{
    PLORA_TRY(plora__registry_check(registry, name));
    PLORA_CHECK(pinned == 0 || pinned == 1, PLORA_ERROR_INVALID_ARGUMENT, "pinned is %d: must be 0 or 1", pinned);
    plora_status status = PLORA_OK;
    pthread_mutex_lock(&registry->changes);
    struct plora__name *found = find(registry, name);
    if (found == NULL)
        status = not_found(name);
    else if (pinned && found->snapshot->memory == NULL)
        status = restore(registry, found->snapshot);
    if (status == PLORA_OK) {
        pthread_mutex_lock(&registry->table);
        found->pinned = pinned;
        pthread_mutex_unlock(&registry->table);
    }
    pthread_mutex_unlock(&registry->changes);
    return status;
}

static plora_status evict_name(plora_registry *registry, const char *name)
{
    struct plora__name *found = find(registry, name);
    if (found == NULL) return not_found(name);
    plora_snapshot *snapshot = found->snapshot;
    PLORA_CHECK(can_evict(registry), PLORA_ERROR_UNSUPPORTED,
                "adapter '%.300s' cannot be evicted: on the CPU that takes a spill_directory", name);
    void *memory = NULL;
    pthread_mutex_lock(&registry->table);
    const int holders = atomic_load(&snapshot->references), pinned = found->pinned, merged = is_merged(snapshot);
    if (holders == 0 && !pinned && !merged) {
        memory = snapshot->memory;
        snapshot->memory = NULL;
    } else {
        registry->statistics.busy++;
    }
    pthread_mutex_unlock(&registry->table);
    PLORA_CHECK(holders == 0, PLORA_ERROR_BUSY, "adapter '%.300s' version %lld is held %d times", name,
                (long long)snapshot->version, holders);
    PLORA_CHECK(!pinned && !merged, PLORA_ERROR_BUSY, "adapter '%.300s' is %s", name, pinned ? "pinned" : "merged");
    return memory == NULL ? PLORA_OK : evict(registry, snapshot, memory);
}

plora_status plora_registry_evict(plora_registry *registry, const char *name)
{
    PLORA_TRY(plora__registry_check(registry, name));
    pthread_mutex_lock(&registry->changes);
    const plora_status status = evict_name(registry, name);
    pthread_mutex_unlock(&registry->changes);
    return status;
}

plora_status plora__registry_check_merge(plora_registry *registry, const plora_snapshot *snapshot)
{
    const char *holder = NULL;
    int retired = 0, renamed;
    pthread_mutex_lock(&registry->table);
    const struct plora__name *own = find(registry, snapshot->name);
    renamed = own == NULL || own->snapshot != snapshot;
    for (int64_t i = 0; registry->names != NULL && i < registry->name_count; ++i)
        if (registry->names[i].snapshot != snapshot && is_held(registry->names[i].snapshot))
            holder = registry->names[i].text;
    for (const plora_snapshot *old = registry->retired; old != NULL; old = old->next)
        if (old != snapshot && is_held(old)) retired = 1;
    pthread_mutex_unlock(&registry->table);
    PLORA_CHECK(!renamed, PLORA_ERROR_BUSY, "adapter '%.300s' was replaced or unloaded meanwhile", snapshot->name);
    PLORA_CHECK(holder == NULL, PLORA_ERROR_BUSY, "adapter '%.300s': '%.300s' is held, and would be applied on top",
                snapshot->name, holder);
    PLORA_CHECK(!retired, PLORA_ERROR_BUSY, "adapter '%.300s': an adapter that was replaced or unloaded is still held",
                snapshot->name);
    return PLORA_OK;
}

plora_status plora_registry_collect(plora_registry *registry)
{
    PLORA_CHECK(registry != NULL, PLORA_ERROR_INVALID_ARGUMENT, "registry is NULL");
    pthread_mutex_lock(&registry->changes);
    collect(registry);
    pthread_mutex_unlock(&registry->changes);
    return PLORA_OK;
}

/* ------------------------------------------------------------------------------------------------------------- acquiring */

/* The name's snapshot, held if it has memory. */
static plora_snapshot *take(plora_registry *registry, const char *name, int *held)
{
    *held = 0;
    pthread_mutex_lock(&registry->table);
    const struct plora__name *found = find(registry, name);
    plora_snapshot *snapshot = found == NULL ? NULL : found->snapshot;
    if (snapshot == NULL) {
        registry->statistics.missed++;
    } else if (snapshot->memory != NULL) {
        hold(snapshot);
        snapshot->acquired++;
        snapshot->last_use = ++registry->clock;
        registry->statistics.acquired++;
        *held = 1;
    }
    pthread_mutex_unlock(&registry->table);
    return snapshot;
}

plora_status plora_registry_acquire(plora_registry *registry, const char *name, plora_snapshot **snapshot)
{
    PLORA_TRY(plora__registry_check(registry, name));
    PLORA_CHECK(snapshot != NULL, PLORA_ERROR_INVALID_ARGUMENT, "snapshot is NULL");
    int held;
    plora_snapshot *taken = take(registry, name, &held);
    plora_status status = PLORA_OK;
    if (taken != NULL && !held) { /* evicted: nobody else changes the registry while it is brought back */
        pthread_mutex_lock(&registry->changes);
        taken = take(registry, name, &held);
        if (taken != NULL && !held) {
            status = restore(registry, taken);
            if (status == PLORA_OK) take(registry, name, &held);
        }
        pthread_mutex_unlock(&registry->changes);
    }
    PLORA_TRY(status);
    if (taken == NULL) return not_found(name);
    *snapshot = taken;
    return PLORA_OK;
}

/* -------------------------------------------------------------------------------------------------------------- queries */

/* Under `table`. */
static plora_snapshot_info describe(const plora_snapshot *snapshot)
{
    const struct plora__name *found = find(snapshot->registry, snapshot->name);
    plora_snapshot_info info = PLORA_SNAPSHOT_INFO_INIT;
    info.name = snapshot->name;
    info.version = snapshot->version;
    info.bytes = snapshot->memory == NULL ? 0 : (int64_t)plora__snapshot_bytes(snapshot);
    info.holders = atomic_load(&snapshot->references);
    info.acquired = snapshot->acquired;
    info.rank = (int32_t)snapshot->max_rank;
    info.weights = snapshot->weights;
    info.pinned = found != NULL && found->snapshot == snapshot && found->pinned;
    info.merged = is_merged(snapshot);
    return info;
}

plora_status plora_snapshot_describe(const plora_snapshot *snapshot, plora_snapshot_info *info)
{
    PLORA_CHECK(snapshot != NULL, PLORA_ERROR_INVALID_ARGUMENT, "snapshot is NULL");
    pthread_mutex_lock(&snapshot->registry->table);
    const plora_snapshot_info result = describe(snapshot);
    pthread_mutex_unlock(&snapshot->registry->table);
    return plora__write_result(info, &result, sizeof result, "plora_snapshot_info");
}

plora_status plora_registry_entry(plora_registry *registry, int64_t index, char *name, size_t capacity,
                                  plora_snapshot_info *info)
{
    PLORA_CHECK(registry != NULL && name != NULL && info != NULL, PLORA_ERROR_INVALID_ARGUMENT, "%s is NULL",
                registry == NULL ? "registry"
                : name == NULL   ? "name"
                                 : "info");
    plora_snapshot_info result = PLORA_SNAPSHOT_INFO_INIT;
    size_t length = 0;
    pthread_mutex_lock(&registry->table);
    const int64_t count = registry->name_count;
    const int exists = index >= 0 && index < count;
    if (exists) {
        const plora_snapshot *snapshot = registry->names[index].snapshot;
        result = describe(snapshot);
        length = strlen(snapshot->name);
        if (length < capacity) memcpy(name, snapshot->name, length + 1);
    }
    pthread_mutex_unlock(&registry->table);
    PLORA_CHECK(exists, PLORA_ERROR_NOT_FOUND, "entry %lld: there are %lld names", (long long)index, (long long)count);
    PLORA_CHECK(length < capacity, PLORA_ERROR_INVALID_ARGUMENT, "capacity is %zu: the name takes %zu bytes", capacity,
                length + 1);
    result.name = NULL;
    return plora__write_result(info, &result, sizeof result, "plora_snapshot_info");
}

plora_status plora_registry_stats(plora_registry *registry, plora_registry_statistics *statistics)
{
    PLORA_CHECK(registry != NULL, PLORA_ERROR_INVALID_ARGUMENT, "registry is NULL");
    pthread_mutex_lock(&registry->table);
    plora_registry_statistics result = registry->statistics;
    result.names = registry->name_count;
    pthread_mutex_unlock(&registry->table);
    result.budget_bytes = (int64_t)registry->budget;
    return plora__write_result(statistics, &result, sizeof result, "plora_registry_statistics");
}
