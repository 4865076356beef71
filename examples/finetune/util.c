/* util.c: see util.h. */
#include "util.h"

#include <cjson/cJSON.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static _Thread_local char last_failure[1024];

int fault(const char *format, ...)
{
    va_list list;
    va_start(list, format);
    vsnprintf(last_failure, sizeof last_failure, format, list);
    va_end(list);
    return -1;
}

const char *failure(void)
{
    return last_failure;
}

double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

int64_t peak_rss_bytes(void)
{
    struct rusage usage;
    if (getrusage(RUSAGE_SELF, &usage) != 0) return 0;
    return (int64_t)usage.ru_maxrss * 1024; /* kilobytes on Linux */
}

int memory_map(size_t bytes, const char *what, void **memory)
{
    *memory = NULL;
    if (bytes == 0) return 0;
    void *pages = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (pages == MAP_FAILED) return fault("out of memory: %zu bytes for %s", bytes, what);
    madvise(pages, bytes, MADV_HUGEPAGE); /* a hint: its failure costs speed alone */
    *memory = pages;
    return 0;
}

void memory_unmap(void *memory, size_t bytes)
{
    if (memory) munmap(memory, bytes);
}

int memory_allocate(size_t count, size_t size, const char *what, void *pointer_to_pointer)
{
    void *memory = calloc(count ? count : 1, size);
    memcpy(pointer_to_pointer, &memory, sizeof memory);
    return memory ? 0 : fault("out of memory: %zu times %zu bytes for %s", count, size, what);
}

char *path_join(const char *directory, const char *name)
{
    char *path = NULL;
    return asprintf(&path, "%s/%s", directory, name) < 0 ? NULL : path;
}

int file_read(const char *path, char **text, size_t *size)
{
    *text = NULL;
    FILE *file = fopen(path, "rb");
    if (!file) return fault("cannot open %s: %s", path, strerror(errno));
    size_t capacity = 1 << 16, used = 0;
    char *buffer = malloc(capacity + 1);
    while (buffer) {
        used += fread(buffer + used, 1, capacity - used, file);
        if (used < capacity) break;
        capacity *= 2;
        char *larger = realloc(buffer, capacity + 1);
        if (!larger) free(buffer);
        buffer = larger;
    }
    const int bad = ferror(file), error = errno;
    fclose(file);
    if (!buffer) return fault("out of memory: %zu bytes for %s", capacity, path);
    if (bad) {
        free(buffer);
        return fault("cannot read %s: %s", path, strerror(error));
    }
    buffer[used] = '\0';
    *text = buffer;
    if (size) *size = used;
    return 0;
}

int json_read(const char *directory, const char *name, cJSON **object)
{
    *object = NULL;
    char *path = path_join(directory, name), *text;
    if (!path) return fault("out of memory: path in %s", directory);
    const int read = file_read(path, &text, NULL);
    free(path);
    TRY(read);
    cJSON *root = cJSON_Parse(text);
    free(text);
    if (!cJSON_IsObject(root)) {
        cJSON_Delete(root);
        return fault("%s/%s is not a JSON object", directory, name);
    }
    *object = root;
    return 0;
}

int file_write(const char *path, const void *data, size_t size)
{
    char *temporary = NULL;
    if (asprintf(&temporary, "%s.tmp.%ld", path, (long)getpid()) < 0) return fault("out of memory: path %s", path);
    int result = -1;
    FILE *file = fopen(temporary, "wb");
    if (!file) {
        fault("cannot create %s: %s", temporary, strerror(errno));
        free(temporary);
        return -1;
    }
    const int written = fwrite(data, 1, size, file) == size && fflush(file) == 0 && fsync(fileno(file)) == 0;
    const int error = errno;
    if (fclose(file) != 0 || !written)
        fault("cannot write %zu bytes to %s: %s", size, temporary, strerror(written ? errno : error));
    else if (rename(temporary, path) != 0)
        fault("cannot rename %s to %s: %s", temporary, path, strerror(errno));
    else
        result = 0;
    if (result != 0) unlink(temporary);
    free(temporary);
    return result;
}

int file_copy(const char *from, const char *to)
{
    char *data;
    size_t size = 0;
    TRY(file_read(from, &data, &size));
    const int result = file_write(to, data, size);
    free(data);
    return result;
}

int directory_make(const char *path)
{
    char *partial = strdup(path);
    if (!partial) return fault("out of memory: path %s", path);
    int error = 0;
    for (char *end = partial; error == 0 && end;) {
        end = strchr(end + 1, '/');
        if (end) *end = '\0';
        if (mkdir(partial, 0777) != 0 && errno != EEXIST) error = errno;
        if (end) *end = '/';
    }
    free(partial);
    if (error) return fault("cannot create the directory %s: %s", path, strerror(error));
    struct stat status;
    if (stat(path, &status) != 0 || !S_ISDIR(status.st_mode)) return fault("%s is not a directory", path);
    return access(path, W_OK) == 0 ? 0 : fault("cannot write into %s: %s", path, strerror(errno));
}

uint64_t hash_bytes(uint64_t hash, const void *data, size_t size)
{
    const unsigned char *bytes = data;
    if (hash == 0) hash = 14695981039346656037u;
    for (size_t i = 0; i < size; i++)
        hash = (hash ^ bytes[i]) * 1099511628211u;
    return hash;
}

uint64_t random_at(uint64_t key, uint64_t counter)
{
    uint64_t z = key * 0xd1342543de82ef95u + (counter + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}
