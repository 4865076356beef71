/* file.c: see file.h. */
#include "file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { BUFFER_BYTES = 1 << 18, CHUNK_BYTES = 1 << 24 };

static plora_status system_error(const char *what, const char *path, int error)
{
    char reason[128] = "unknown error";
    return plora__fail(PLORA_ERROR_IO, "%s '%.600s': %s", what, path, strerror_r(error, reason, sizeof reason));
}

plora_status plora__join_path(plora_context *context, const char *directory, const char *name, char **path)
{
    const size_t bytes = strlen(directory) + strlen(name) + 2;
    void *memory;
    PLORA_TRY(plora__allocate(context, bytes, &memory));
    snprintf(memory, bytes, "%s/%s", directory, name);
    *path = memory;
    return PLORA_OK;
}

plora_status plora__file_map(plora_context *context, const char *path, struct plora__mapping *mapping)
{
    /* O_NONBLOCK: a FIFO without a writer must not hang the caller. */
    const int descriptor = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (descriptor < 0) return system_error("cannot open", path, errno);
    struct stat info;
    void *data = NULL;
    int error = 0;
    if (fstat(descriptor, &info) != 0)
        error = errno;
    else if (S_ISDIR(info.st_mode))
        error = EISDIR;
    else if (!S_ISREG(info.st_mode))
        error = ENODEV;
    else if (info.st_size > 0) {
        data = mmap(NULL, (size_t)info.st_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, descriptor, 0);
        if (data == MAP_FAILED) error = errno;
    }
    close(descriptor);
    if (error != 0) return system_error("cannot map", path, error);
    *mapping = (struct plora__mapping){data, (size_t)info.st_size};
    atomic_fetch_add(&context->mapped_bytes, mapping->bytes);
    return PLORA_OK;
}

void plora__file_unmap(plora_context *context, struct plora__mapping *mapping)
{
    if (mapping->data != NULL) {
        munmap(mapping->data, mapping->bytes);
        atomic_fetch_sub(&context->mapped_bytes, mapping->bytes);
    }
    *mapping = (struct plora__mapping){NULL, 0};
}

/* A file of a new name beside the target, so that the rename stays within one file system. */
static plora_status create_temporary(struct plora__writer *writer, size_t capacity)
{
    static atomic_uint counter;
    struct stat info;
    const int exists = stat(writer->path, &info) == 0;
    if (exists && S_ISDIR(info.st_mode)) return system_error("cannot write", writer->path, EISDIR);
    for (int attempt = 0;; ++attempt) {
        const unsigned number = atomic_fetch_add(&counter, 1);
        snprintf(writer->temporary, capacity, "%s.%ld.%u.tmp", writer->path, (long)getpid(), number);
        writer->descriptor = open(writer->temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        if (writer->descriptor >= 0) break;
        if (errno != EEXIST || attempt == 100) return system_error("cannot create", writer->temporary, errno);
    }
    if (exists && S_ISREG(info.st_mode) && fchmod(writer->descriptor, info.st_mode & 0777) != 0)
        return system_error("cannot set the permissions of", writer->temporary, errno);
    return PLORA_OK;
}

static size_t temporary_capacity(const char *path)
{
    return strlen(path) + 64;
}

plora_status plora__writer_open(plora_context *context, const char *path, struct plora__writer *writer)
{
    *writer = (struct plora__writer){.context = context, .descriptor = -1};
    plora_status status;
    void *memory;
    PLORA_CHECK(path[0] != '\0', PLORA_ERROR_INVALID_ARGUMENT, "path is empty");
    PLORA_TRY_OUT(plora__duplicate(context, path, &writer->path));
    PLORA_TRY_OUT(plora__allocate(context, temporary_capacity(path), &memory));
    writer->temporary = memory;
    PLORA_TRY_OUT(plora__allocate(context, BUFFER_BYTES, &memory));
    writer->buffer = memory;
    PLORA_TRY_OUT(create_temporary(writer, temporary_capacity(path)));
out:
    return status == PLORA_OK ? PLORA_OK : plora__writer_close(writer, status);
}

static plora_status write_all(struct plora__writer *writer, const unsigned char *data, size_t bytes)
{
    while (bytes > 0) {
        const size_t piece = bytes < CHUNK_BYTES ? bytes : CHUNK_BYTES;
        const ssize_t done = write(writer->descriptor, data, piece);
        if (done < 0 && errno == EINTR) continue;
        if (done < 0) {
            const int error = errno;
            char reason[128] = "unknown error";
            return plora__fail(PLORA_ERROR_IO, "cannot write '%.600s' at byte %llu: %s", writer->path,
                               (unsigned long long)writer->written, strerror_r(error, reason, sizeof reason));
        }
        data += done;
        bytes -= (size_t)done;
        writer->written += (uint64_t)done;
    }
    return PLORA_OK;
}

static plora_status flush(struct plora__writer *writer)
{
    const size_t bytes = writer->buffered;
    writer->buffered = 0;
    return write_all(writer, writer->buffer, bytes);
}

plora_status plora__writer_write(struct plora__writer *writer, const void *data, size_t bytes)
{
    if (bytes == 0) return PLORA_OK;
    if (bytes > BUFFER_BYTES - writer->buffered) PLORA_TRY(flush(writer));
    if (bytes > BUFFER_BYTES) return write_all(writer, data, bytes);
    memcpy(writer->buffer + writer->buffered, data, bytes);
    writer->buffered += bytes;
    return PLORA_OK;
}

plora_status plora__writer_write_device(struct plora__writer *writer, const void *data, size_t bytes)
{
    const plora_context *context = writer->context;
    if (context->options.backend == PLORA_BACKEND_CPU) return plora__writer_write(writer, data, bytes);
    const unsigned char *source = data;
    if (bytes > 0)
        PLORA_TRY(context->backend->synchronize(context->device, NULL)); /* what writes it may be on any stream */
    while (bytes > 0) {
        if (writer->buffered == BUFFER_BYTES) PLORA_TRY(flush(writer));
        const size_t room = BUFFER_BYTES - writer->buffered;
        const size_t piece = bytes < room ? bytes : room;
        PLORA_TRY(context->backend->copy(context->device, writer->buffer + writer->buffered, source, piece, NULL));
        PLORA_TRY(context->backend->synchronize(context->device, NULL));
        writer->buffered += piece;
        source += piece;
        bytes -= piece;
    }
    return PLORA_OK;
}

/* Makes the rename itself durable. Some file systems cannot sync a directory: that is no reason to report a failure once the
 * file is in place. */
static void sync_directory(const char *path, char *scratch, size_t capacity)
{
    const char *slash = strrchr(path, '/');
    if (slash == NULL)
        snprintf(scratch, capacity, ".");
    else
        snprintf(scratch, capacity, "%.*s", slash == path ? 1 : (int)(slash - path), path);
    const int descriptor = open(scratch, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (descriptor < 0) return;
    (void)fsync(descriptor);
    close(descriptor);
}

static plora_status commit(struct plora__writer *writer)
{
    PLORA_TRY(flush(writer));
    if (fsync(writer->descriptor) != 0) return system_error("cannot sync", writer->temporary, errno);
    const int descriptor = writer->descriptor;
    writer->descriptor = -1;
    if (close(descriptor) != 0) {
        const plora_status status = system_error("cannot close", writer->temporary, errno);
        unlink(writer->temporary);
        return status;
    }
    if (rename(writer->temporary, writer->path) != 0) {
        const plora_status status = system_error("cannot rename to", writer->path, errno);
        unlink(writer->temporary);
        return status;
    }
    sync_directory(writer->path, writer->temporary, temporary_capacity(writer->path));
    return PLORA_OK;
}

plora_status plora__writer_close(struct plora__writer *writer, plora_status status)
{
    if (status == PLORA_OK) status = commit(writer);
    if (writer->descriptor >= 0) {
        close(writer->descriptor);
        unlink(writer->temporary);
    }
    plora__free(writer->context, writer->buffer, BUFFER_BYTES);
    if (writer->path != NULL) plora__free(writer->context, writer->temporary, temporary_capacity(writer->path));
    plora__free_string(writer->context, writer->path);
    *writer = (struct plora__writer){.context = writer->context, .descriptor = -1};
    return status;
}
