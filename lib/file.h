/* file.h: files mapped for reading, and files written atomically.
 *
 * A mapping is private and writable: pages are copied when they are first written, the file never changes. The file must not
 * be shortened while it is mapped (reading beyond its new end raises SIGBUS); replacing it by rename, as the writer here and
 * most tools do, is harmless. */
#ifndef PLORA_FILE_H
#define PLORA_FILE_H

#include "handles.h"

struct plora__mapping {
    unsigned char *data; /* NULL for an empty file */
    size_t bytes;
};

/* "directory/name", to be released by plora__free_string(). */
plora_status plora__join_path(plora_context *context, const char *directory, const char *name, char **path);

/* Errors: IO with the system's reason. */
plora_status plora__file_map(plora_context *context, const char *path, struct plora__mapping *mapping);
void plora__file_unmap(plora_context *context, struct plora__mapping *mapping);

/* A file in the making: bytes go to a temporary file beside `path`; commit() makes it durable and renames it. A symbolic link
 * at `path` is replaced, not followed. An existing file's permissions are kept. */
struct plora__writer {
    plora_context *context;
    char *path, *temporary;
    unsigned char *buffer;
    size_t buffered;
    uint64_t written; /* bytes handed to write() below */
    int descriptor;
};

plora_status plora__writer_open(plora_context *context, const char *path, struct plora__writer *writer);
plora_status plora__writer_write(struct plora__writer *writer, const void *data, size_t bytes);
/* The same from memory of the context's device. */
plora_status plora__writer_write_device(struct plora__writer *writer, const void *data, size_t bytes);
/* After an error too: then the temporary file is removed, `path` is as it was, and the error is returned again. */
plora_status plora__writer_close(struct plora__writer *writer, plora_status status);

#endif
