/* adapters.c: see adapters.h. Who may load what: a path is followed through all its links first, and must then lie within the root, as must
 * the files in it. (Who can write into the root can still change a link between the look and the opening: do not let strangers.) */
#include "adapters.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "util.h"

struct adapters {
    char *root; /* no links in it; NULL = none */
    plora_registry *registry;
    plora_batch *batches[STEP_PARTS];
    int32_t max_rank;
    int32_t *slots;             /* [rows]: scratch of adapters_begin() */
    plora_snapshot **snapshots; /* [slots] */
    int64_t max_snapshots;
};

int adapters_name_valid(const char *name)
{
    const size_t length = strlen(name);
    static const char allowed[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-";
    return length >= 1 && length <= 64 && name[0] != '.' && strspn(name, allowed) == length;
}

/* The highest rank that an adapter of the model can need. */
static int highest_rank(const plora_model *model, int32_t *rank)
{
    *rank = 1;
    for (int32_t i = 0; i < plora_model_layer_count(model); i++) {
        plora_linear linear = PLORA_LINEAR_INIT;
        LIBRARY(plora_model_layer(model, i, &linear));
        const int64_t least = linear.weight.rows < linear.weight.columns ? linear.weight.rows : linear.weight.columns;
        if (least > *rank) *rank = (int32_t)(least < 65536 ? least : 65536);
    }
    return 0;
}

static int make(plora_model *model, const struct adapters_options *wanted, struct adapters *a)
{
    if (wanted->root && !(a->root = realpath(wanted->root, NULL)))
        return fault("--adapters %s: %s", wanted->root, strerror(errno));
    plora_registry_options options = PLORA_REGISTRY_OPTIONS_INIT;
    options.memory_budget = (size_t)wanted->memory;
    options.spill_directory = wanted->spill;
    LIBRARY(plora_registry_create(model, &options, &a->registry));
    TRY(highest_rank(model, &a->max_rank));
    for (int i = 0; i < STEP_PARTS; i++) {
        plora_batch_options batch = PLORA_BATCH_OPTIONS_INIT;
        batch.max_tokens = i == STEP_LAYERS ? wanted->rows : wanted->slots;
        batch.max_adapters = (int32_t)wanted->slots;
        batch.max_rank = a->max_rank;
        LIBRARY(plora_batch_create(model, &batch, &a->batches[i]));
    }
    a->max_snapshots = wanted->slots;
    TRY(memory_allocate((size_t)wanted->rows, sizeof *a->slots, "slots", &a->slots));
    return memory_allocate((size_t)wanted->slots, sizeof(plora_snapshot *), "snapshots", &a->snapshots);
}

int adapters_create(plora_model *model, const struct adapters_options *options, struct adapters **out)
{
    struct adapters *a;
    *out = NULL;
    TRY(memory_allocate(1, sizeof *a, "adapters", &a));
    if (make(model, options, a) != 0) {
        adapters_destroy(a);
        return -1;
    }
    *out = a;
    return 0;
}

void adapters_destroy(struct adapters *a)
{
    if (!a) return;
    for (int i = 0; i < STEP_PARTS; i++)
        plora_batch_destroy(a->batches[i]);
    plora_registry_destroy(a->registry);
    free(a->slots);
    free(a->snapshots);
    free(a->root);
    free(a);
}

/* The library's message, and whose fault its status is. */
static unsigned blame(plora_status status)
{
    fault("%s", plora_last_error());
    return status == PLORA_ERROR_NOT_FOUND       ? 404
           : status == PLORA_ERROR_BUSY          ? 409
           : status == PLORA_ERROR_OUT_OF_MEMORY ? 503
           : status == PLORA_ERROR_BACKEND       ? 500
                                                 : 400;
}

unsigned adapters_acquire(struct adapters *a, const char *name, plora_snapshot **snapshot)
{
    plora_snapshot_info info = PLORA_SNAPSHOT_INFO_INIT;
    const plora_status status = plora_registry_acquire(a->registry, name, snapshot);
    if (status != PLORA_OK) return blame(status);
    if (plora_snapshot_describe(*snapshot, &info) == PLORA_OK && info.rank <= a->max_rank) return 0;
    plora_snapshot_release(*snapshot);
    fault("'%s' has a rank of %d, which exceeds the model's %d", name, info.rank, a->max_rank);
    return 400;
}

/* Whether the path, with all links followed, is within the root; *real is then that path, fresh. */
static int inside(const struct adapters *a, const char *path, char **real)
{
    const size_t length = strlen(a->root);
    *real = realpath(path, NULL);
    if (!*real) return 0;
    if (strncmp(*real, a->root, length) == 0 && (*real)[length] == '/') return 1;
    free(*real);
    *real = NULL;
    return 0;
}

/* The directory of an adapter. Neither it nor a file in it may lie outside the root. */
static unsigned resolve(const struct adapters *a, const char *path, char **directory)
{
    static const char *const files[] = {"adapter_config.json", "adapter_model.safetensors"};
    char *joined = path[0] == '/' ? strdup(path) : path_join(a->root, path);
    const int found = joined && inside(a, joined, directory);
    free(joined);
    if (!found) {
        fault("'%.200s' is no directory within that of the adapters", path);
        return 400;
    }
    for (int i = 0; i < 2; i++) {
        char *file = path_join(*directory, files[i]), *real = NULL;
        const int good = file && inside(a, file, &real);
        free(file);
        free(real);
        if (good) continue;
        free(*directory);
        fault("'%.200s' has no %s, or one outside the directory of the adapters", path, files[i]);
        return 400;
    }
    return 0;
}

unsigned adapters_load(struct adapters *a, const char *name, const char *path, int64_t *version)
{
    char *directory;
    if (!a->root) {
        fault("the server was started without --adapters: none can be loaded");
        return 400;
    }
    const unsigned status = resolve(a, path, &directory);
    if (status) return status;
    const plora_status loaded = plora_registry_load(a->registry, name, directory, NULL, version);
    free(directory);
    if (loaded == PLORA_OK) return 0;
    const unsigned fault_of = blame(loaded);
    return fault_of == 404 ? 400 : fault_of; /* a layer that the model does not have */
}

unsigned adapters_unload(struct adapters *a, const char *name)
{
    const plora_status status = plora_registry_unload(a->registry, name, PLORA_REGISTRY_DEFER);
    if (status == PLORA_OK) return 0;
    const unsigned fault_of = blame(status);
    if (fault_of == 404) fault("there is no adapter '%.80s'", name);
    return fault_of;
}

int adapters_load_all(struct adapters *a)
{
    if (!a->root) return 0;
    struct dirent **entries;
    const int count = scandir(a->root, &entries, NULL, alphasort);
    if (count < 0) return fault("%s: %s", a->root, strerror(errno));
    for (int i = 0; i < count; i++) {
        char *config = NULL;
        int64_t version;
        if (adapters_name_valid(entries[i]->d_name) &&
            asprintf(&config, "%s/%s/adapter_config.json", a->root, entries[i]->d_name) > 0 &&
            access(config, F_OK) == 0 && adapters_load(a, entries[i]->d_name, entries[i]->d_name, &version) != 0)
            fprintf(stderr, "serve: adapter %s is left out: %s\n", entries[i]->d_name, failure());
        free(config);
        free(entries[i]);
    }
    free(entries);
    return 0;
}

plora_registry_statistics adapters_statistics(struct adapters *a)
{
    plora_registry_statistics statistics = PLORA_REGISTRY_STATISTICS_INIT;
    plora_registry_stats(a->registry, &statistics);
    return statistics;
}

void adapters_list(struct adapters *a, const char *base, struct buffer *out)
{
    plora_snapshot_info info = PLORA_SNAPSHOT_INFO_INIT;
    char name[68];
    for (int64_t i = 0; plora_registry_entry(a->registry, i, name, sizeof name, &info) == PLORA_OK; i++) {
        buffer_print(out,
                     ", {\"id\": \"%s\", \"object\": \"model\", \"owned_by\": \"libplora\", \"version\": %lld, "
                     "\"rank\": %d, \"parent\": ",
                     name, (long long)info.version, info.rank);
        buffer_json(out, base, strlen(base));
        buffer_add(out, "}", 1);
    }
}

/* ----------------------------------------------------------------------------------------------------------------- steps */

int adapters_begin(struct adapters *a, enum step_part part, int64_t rows, plora_snapshot *const *of_row)
{
    int32_t count = 0;
    for (int64_t i = 0; i < rows; i++) {
        int32_t slot = of_row[i] ? 0 : -1;
        while (slot >= 0 && slot < count && a->snapshots[slot] != of_row[i])
            slot++;
        if (slot == count && count == a->max_snapshots) return fault("more than %d adapters in a step", count);
        if (slot == count) a->snapshots[count++] = of_row[i];
        a->slots[i] = slot;
    }
    LIBRARY(plora_batch_begin(a->batches[part], rows, a->slots, a->snapshots, count, NULL));
    return 0;
}

int adapters_forward(struct adapters *a, enum step_part part, const int32_t *layers, int32_t count,
                     const plora_matrix *x, const plora_matrix *y)
{
    LIBRARY(plora_batch_forward(a->batches[part], layers, count, x, y, 0, NULL));
    return 0;
}
