/* adapters.c: see adapters.h. */
#include "adapters.h"

#include <dirent.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "util.h"

struct adapter {
    char name[68];
    int64_t version, users; /* users: the list, and everybody who has pinned it */
    plora_adapters *handle;
    struct adapter *next;
};

struct adapters {
    plora_model *model;
    char *root; /* no links in it; NULL = none */
    pthread_mutex_t lock, model_lock;
    struct adapter *list;
    int64_t versions;
    plora_adapters *none; /* of B = 0 */
};

int adapters_name_valid(const char *name)
{
    const size_t length = strlen(name);
    static const char allowed[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-";
    return length >= 1 && length <= 64 && name[0] != '.' && strspn(name, allowed) == length;
}

int adapters_create(plora_model *model, const char *root, struct adapters **out)
{
    struct adapters *a;
    *out = NULL;
    TRY(memory_allocate(1, sizeof *a, "adapters", &a));
    a->model = model;
    pthread_mutex_init(&a->lock, NULL);
    pthread_mutex_init(&a->model_lock, NULL);
    *out = a;
    if (root && !(a->root = realpath(root, NULL))) return fault("--adapters %s: %s", root, strerror(errno));
    plora_adapters_options options = PLORA_ADAPTERS_OPTIONS_INIT;
    options.rank = 1;
    options.targets = "model.layers.0.self_attn.q_proj";
    options.residual = PLORA_RESIDUAL_NONE;
    LIBRARY(plora_adapters_create(model, &options, &a->none));
    return 0;
}

static void release(struct adapter *adapter)
{
    if (--adapter->users > 0) return;
    plora_adapters_destroy(adapter->handle);
    free(adapter);
}

void adapters_destroy(struct adapters *a)
{
    if (!a) return;
    while (a->list) {
        struct adapter *first = a->list;
        a->list = first->next;
        release(first);
    }
    plora_adapters_destroy(a->none);
    free(a->root);
    free(a);
}

struct adapter *adapters_pin(struct adapters *a, const char *name)
{
    pthread_mutex_lock(&a->lock);
    struct adapter *found = a->list;
    while (found && strcmp(found->name, name) != 0)
        found = found->next;
    if (found) found->users++;
    pthread_mutex_unlock(&a->lock);
    return found;
}

void adapters_unpin(struct adapters *a, struct adapter *adapter)
{
    pthread_mutex_lock(&a->lock);
    release(adapter);
    pthread_mutex_unlock(&a->lock);
}

/* Takes the name out of the list. */
static int drop(struct adapters *a, const char *name)
{
    for (struct adapter **at = &a->list; *at; at = &(*at)->next) {
        struct adapter *found = *at;
        if (strcmp(found->name, name) != 0) continue;
        *at = found->next;
        release(found);
        return 1;
    }
    return 0;
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
    struct adapter *made;
    if (!a->root) {
        fault("the server was started without --adapters: none can be loaded");
        return 400;
    }
    const unsigned status = resolve(a, path, &directory);
    if (status) return status;
    if (memory_allocate(1, sizeof *made, "an adapter", &made) != 0) {
        free(directory);
        return 500;
    }
    pthread_mutex_lock(&a->model_lock);
    const plora_status loaded = plora_adapters_load(a->model, directory, NULL, &made->handle);
    pthread_mutex_unlock(&a->model_lock);
    free(directory);
    if (loaded != PLORA_OK) {
        fault("%s", plora_last_error());
        free(made);
        return loaded == PLORA_ERROR_OUT_OF_MEMORY ? 500 : 400;
    }
    snprintf(made->name, sizeof made->name, "%s", name);
    made->users = 1;
    pthread_mutex_lock(&a->lock);
    *version = made->version = ++a->versions;
    drop(a, name);
    made->next = a->list;
    a->list = made;
    pthread_mutex_unlock(&a->lock);
    return 0;
}

unsigned adapters_unload(struct adapters *a, const char *name)
{
    pthread_mutex_lock(&a->lock);
    const int found = drop(a, name);
    pthread_mutex_unlock(&a->lock);
    if (found) return 0;
    fault("there is no adapter '%.80s'", name);
    return 404;
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

int64_t adapters_count(struct adapters *a)
{
    int64_t count = 0;
    pthread_mutex_lock(&a->lock);
    for (const struct adapter *adapter = a->list; adapter; adapter = adapter->next)
        count++;
    pthread_mutex_unlock(&a->lock);
    return count;
}

void adapters_list(struct adapters *a, const char *base, struct buffer *out)
{
    pthread_mutex_lock(&a->lock);
    for (const struct adapter *adapter = a->list; adapter; adapter = adapter->next) {
        buffer_print(
            out,
            ", {\"id\": \"%s\", \"object\": \"model\", \"owned_by\": \"libplora\", \"version\": %lld, \"parent\": ",
            adapter->name, (long long)adapter->version);
        buffer_json(out, base, strlen(base));
        buffer_add(out, "}", 1);
    }
    pthread_mutex_unlock(&a->lock);
}

int adapters_forward(struct adapters *a, int32_t layer, const plora_matrix *x, const plora_matrix *y,
                     struct adapter *const *of_row)
{
    pthread_mutex_lock(&a->model_lock);
    plora_status status = plora_linear_forward(a->none, layer, x, y, 0, NULL);
    for (int64_t first = 0, next; first < x->rows && status == PLORA_OK; first = next) {
        for (next = first + 1; next < x->rows && of_row[next] == of_row[first];)
            next++;
        if (!of_row[first]) continue;
        const size_t size = x->dtype == PLORA_F32 ? 4 : 2, y_size = y->dtype == PLORA_F32 ? 4 : 2;
        plora_matrix in = *x, out = *y;
        in.data = (char *)x->data + (size_t)(first * x->stride) * size;
        out.data = (char *)y->data + (size_t)(first * y->stride) * y_size;
        in.rows = out.rows = next - first;
        status = plora_linear_forward(of_row[first]->handle, layer, &in, &out, PLORA_LINEAR_DELTA_ONLY, NULL);
    }
    pthread_mutex_unlock(&a->model_lock);
    return status == PLORA_OK ? 0 : fault("%s", plora_last_error());
}
