/* util.h: errors, time, memory, small files. A function that can fail returns 0 or -1; fault() has then kept the message for
 * failure(), a message for each thread. TRY passes a failure on, LIBRARY turns one of the library's into one of ours. */
#ifndef FINETUNE_UTIL_H
#define FINETUNE_UTIL_H

#include <stddef.h>
#include <stdint.h>

#define TRY(expression)                                                                                                \
    do {                                                                                                               \
        if ((expression) != 0) return -1;                                                                              \
    } while (0)
#define LIBRARY(expression)                                                                                            \
    do {                                                                                                               \
        if ((expression) != PLORA_OK) return fault("%s", plora_last_error());                                          \
    } while (0)

int fault(const char *format, ...) __attribute__((format(printf, 1, 2))); /* always -1 */
const char *failure(void);

double now(void);             /* seconds, monotonic */
int64_t peak_rss_bytes(void); /* of this process so far */

/* Zeroed memory, 64-byte aligned and in huge pages where the system has them; pages cost nothing until they are touched. */
int memory_map(size_t bytes, const char *what, void **memory);
void memory_unmap(void *memory, size_t bytes);
int memory_allocate(size_t count, size_t size, const char *what, void *pointer_to_pointer);

char *path_join(const char *directory, const char *name);   /* NULL when out of memory */
int file_read(const char *path, char **text, size_t *size); /* text ends in an extra '\0' */
struct cJSON;
/* The JSON object in directory/name, or NULL; end it with cJSON_Delete(). */
int json_read(const char *directory, const char *name, struct cJSON **object);
/* Temporary file, fsync, rename: on an error `path` is as it was. */
int file_write(const char *path, const void *data, size_t size);
int file_copy(const char *from, const char *to);
int directory_make(const char *path);

uint64_t hash_bytes(uint64_t hash, const void *data, size_t size); /* FNV-1a; start with 0 */
uint64_t random_at(uint64_t key, uint64_t counter);                /* splitmix64 of a counter */

#endif
