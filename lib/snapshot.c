/* snapshot.c: one version of a served adapter: its factors, the memory that products read, and where it lies while it is evicted.
 *
 * Memory:  [struct plora__batch_slot of each weight][arena: A_0 | B_0 | A_1 ...][B_0 | B_1 ... in panels]     one block of device memory
 *
 * The panels (CPU only) are B as the kernels read it: turned round here, once, not for every batch.
 *
 * The slots hold pointers into the block, so they are made anew when it comes back to another place. Who may call what when is the
 * registry's affair: nothing here takes a lock. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "serving.h"

static plora_context *context_of(const plora_snapshot *snapshot)
{
    return snapshot->registry->model->context;
}

static size_t slots_bytes(const plora_snapshot *snapshot)
{
    const size_t bytes = (size_t)snapshot->registry->model->weight_count * sizeof(struct plora__batch_slot);
    return (bytes + PLORA__ALIGNMENT - 1) / PLORA__ALIGNMENT * PLORA__ALIGNMENT;
}

static size_t arena_bytes(const plora_snapshot *snapshot)
{
    return (size_t)snapshot->parameter_count * sizeof(float);
}

size_t plora__snapshot_bytes(const plora_snapshot *snapshot)
{
    return slots_bytes(snapshot) + arena_bytes(snapshot) + (size_t)snapshot->panel_count * sizeof(float);
}

float *plora__snapshot_arena(const plora_snapshot *snapshot, const void *memory)
{
    return (float *)((uintptr_t)memory + slots_bytes(snapshot));
}

static int64_t align_elements(int64_t count)
{
    return (count + PLORA__ARENA_ALIGNMENT - 1) / PLORA__ARENA_ALIGNMENT * PLORA__ARENA_ALIGNMENT;
}

plora_status plora__snapshot_create(plora_registry *registry, const struct plora__adapter *adapters,
                                    int32_t adapter_count, int64_t parameter_count, plora_snapshot **snapshot)
{
    plora_context *context = registry->model->context;
    void *memory;
    PLORA_TRY(plora__allocate_zeroed(context, sizeof(plora_snapshot), &memory));
    plora_snapshot *created = memory;
    atomic_init(&created->references, 0);
    created->registry = registry;
    created->parked_file = -1;
    created->parameter_count = parameter_count;
    created->weights = adapter_count;
    const plora_status status =
        plora__allocate_zeroed(context, (size_t)registry->model->weight_count * sizeof *created->factors, &memory);
    created->factors = memory;
    if (status != PLORA_OK) {
        plora__snapshot_free(created);
        return status;
    }
    for (int32_t i = 0; i < adapter_count; ++i) {
        const struct plora__adapter *adapter = &adapters[i];
        created->factors[adapter->weight] = (struct plora__factors){adapter->rank, adapter->a_offset, adapter->b_offset,
                                                                    created->panel_count, adapter->scale};
        if (context->backend->batch_pack != NULL)
            created->panel_count +=
                align_elements(context->backend->batch_panel_count(adapter->out_features, adapter->rank));
        if (adapter->rank > created->max_rank) created->max_rank = adapter->rank;
    }
    *snapshot = created;
    return PLORA_OK;
}

void plora__snapshot_free(plora_snapshot *snapshot)
{
    if (snapshot == NULL) return;
    plora_context *context = context_of(snapshot);
    plora__snapshot_release_memory(snapshot, snapshot->memory);
    plora__free(context, snapshot->parked, arena_bytes(snapshot));
    if (snapshot->parked_file >= 0) close(snapshot->parked_file);
    plora__free(context, snapshot->factors,
                (size_t)snapshot->registry->model->weight_count * sizeof *snapshot->factors);
    plora__free_string(context, snapshot->name);
    plora__free(context, snapshot, sizeof *snapshot);
}

void plora__snapshot_release_memory(const plora_snapshot *snapshot, void *memory)
{
    plora__device_free(context_of(snapshot), memory, plora__snapshot_bytes(snapshot));
}

/* -------------------------------------------------------------------------------------------------------------- filling */

static int64_t out_features(const plora_snapshot *snapshot, int32_t weight)
{
    const struct plora__weight *found = &snapshot->registry->model->weights[weight];
    return found->fan_in_fan_out ? found->matrix.columns : found->matrix.rows;
}

/* The arena is there already. */
static plora_status write_slots(const plora_snapshot *snapshot, void *memory, void *stream)
{
    plora_context *context = context_of(snapshot);
    const size_t bytes = slots_bytes(snapshot);
    const float *arena = plora__snapshot_arena(snapshot, memory);
    void *block;
    PLORA_TRY(plora__allocate_zeroed(context, bytes, &block));
    struct plora__batch_slot *slots = block;
    for (int32_t i = 0; i < snapshot->registry->model->weight_count; ++i) {
        const struct plora__factors *factors = &snapshot->factors[i];
        if (factors->rank == 0) continue;
        slots[i] = (struct plora__batch_slot){.a = arena + factors->a_offset,
                                              .b = arena + factors->b_offset,
                                              .rank = (int32_t)factors->rank,
                                              .scale = (float)factors->scale};
        if (context->backend->batch_pack == NULL) continue;
        float *panels = plora__snapshot_arena(snapshot, memory) + snapshot->parameter_count + factors->panel_offset;
        context->backend->batch_pack(slots[i].b, out_features(snapshot, i), factors->rank, panels);
        slots[i].panels = panels;
    }
    plora_status status = context->backend->copy(context->device, memory, slots, bytes, stream);
    if (status == PLORA_OK) status = context->backend->synchronize(context->device, stream);
    plora__free(context, block, bytes);
    return status;
}

/* ---------------------------------------------------------------------------------------------------------- files */

enum { PIECE = 1 << 20 };

static plora_status file_failed(const plora_snapshot *snapshot, const char *what, int error)
{
    char reason[128] = "the file is too short";
    return plora__fail(PLORA_ERROR_IO, "adapter '%s' version %lld, evicted to '%.400s': cannot %s: %s", snapshot->name,
                       (long long)snapshot->version, snapshot->registry->spill_directory, what,
                       error == 0 ? reason : strerror_r(error, reason, sizeof reason));
}

/* All of `bytes`, or why not. */
static plora_status transfer(const plora_snapshot *snapshot, int file, void *piece, size_t bytes, off_t offset,
                             int is_write)
{
    for (size_t done = 0; done < bytes;) {
        char *at = (char *)piece + done;
        const ssize_t moved = is_write ? pwrite(file, at, bytes - done, offset + (off_t)done)
                                       : pread(file, at, bytes - done, offset + (off_t)done);
        if (moved < 0 && errno == EINTR) continue;
        if (moved <= 0) return file_failed(snapshot, is_write ? "write" : "read", moved < 0 ? errno : 0);
        done += (size_t)moved;
    }
    return PLORA_OK;
}

/* Between the arena in device memory and the file, a piece at a time. */
static plora_status move(const plora_snapshot *snapshot, int file, float *arena, int to_file)
{
    plora_context *context = context_of(snapshot);
    const size_t bytes = arena_bytes(snapshot);
    void *piece;
    PLORA_TRY(plora__allocate(context, PIECE, &piece));
    plora_status status = PLORA_OK;
    for (size_t done = 0; done < bytes && status == PLORA_OK; done += PIECE) {
        const size_t length = bytes - done < PIECE ? bytes - done : PIECE;
        char *at = (char *)arena + done;
        if (to_file) {
            status = plora__read_device(context, piece, at, length, NULL);
            if (status == PLORA_OK) status = transfer(snapshot, file, piece, length, (off_t)done, 1);
        } else {
            status = transfer(snapshot, file, piece, length, (off_t)done, 0);
            if (status == PLORA_OK) status = context->backend->copy(context->device, at, piece, length, NULL);
            if (status == PLORA_OK) status = context->backend->synchronize(context->device, NULL);
        }
    }
    plora__free(context, piece, PIECE);
    return status;
}

/* A file that no name leads to: it cannot be changed by others, and it ends with the process. */
static plora_status open_file(const plora_snapshot *snapshot, int *file)
{
    const char *directory = snapshot->registry->spill_directory;
    *file = open(directory, O_TMPFILE | O_RDWR | O_CLOEXEC | O_EXCL, 0600);
    if (*file >= 0) return PLORA_OK;
    static const char form[] = "/plora-XXXXXX"; /* a file system without O_TMPFILE */
    plora_context *context = context_of(snapshot);
    const size_t bytes = strlen(directory) + sizeof form;
    void *path;
    PLORA_TRY(plora__allocate(context, bytes, &path));
    snprintf(path, bytes, "%s%s", directory, form);
    *file = mkostemp(path, O_CLOEXEC);
    const int error = errno;
    if (*file >= 0) unlink(path);
    plora__free(context, path, bytes);
    return *file >= 0 ? PLORA_OK : file_failed(snapshot, "create", error);
}

static plora_status park_in_file(plora_snapshot *snapshot, const void *memory)
{
    int file;
    PLORA_TRY(open_file(snapshot, &file));
    const plora_status status = move(snapshot, file, plora__snapshot_arena(snapshot, memory), 1);
    if (status == PLORA_OK)
        snapshot->parked_file = file;
    else
        close(file);
    return status;
}

plora_status plora__snapshot_park(plora_snapshot *snapshot, const void *memory)
{
    plora_context *context = context_of(snapshot);
    if (snapshot->parked != NULL || snapshot->parked_file >= 0) return PLORA_OK;
    if (snapshot->registry->spill_directory != NULL) return park_in_file(snapshot, memory);
    void *copy;
    PLORA_TRY(plora__allocate(context, arena_bytes(snapshot), &copy));
    const plora_status status =
        plora__read_device(context, copy, plora__snapshot_arena(snapshot, memory), arena_bytes(snapshot), NULL);
    if (status == PLORA_OK)
        snapshot->parked = copy;
    else
        plora__free(context, copy, arena_bytes(snapshot));
    return status;
}

plora_status plora__snapshot_fill(const plora_snapshot *snapshot, const float *arena, void *stream, void **memory)
{
    plora_context *context = context_of(snapshot);
    void *block;
    PLORA_TRY(plora__device_allocate(context, plora__snapshot_bytes(snapshot), &block));
    const float *source = arena != NULL ? arena : snapshot->parked;
    float *own = plora__snapshot_arena(snapshot, block);
    plora_status status = PLORA_OK;
    if (source != NULL)
        status = context->backend->copy(context->device, own, source, arena_bytes(snapshot), stream);
    else if (snapshot->parked_file >= 0)
        status = move(snapshot, snapshot->parked_file, own, 0);
    if (status == PLORA_OK) status = write_slots(snapshot, block, stream); /* waits for the stream */
    if (status != PLORA_OK) {
        plora__snapshot_release_memory(snapshot, block);
        return status;
    }
    *memory = block;
    return PLORA_OK;
}
