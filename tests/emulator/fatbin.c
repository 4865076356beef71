/* fatbin.c: the PTX in a fat binary.
 *
 *     wrapper { 0x466243B1, version, -> fat binary, .. }
 *     fat binary { 0xBA55ED50, version 1, header bytes 16, bytes that follow (8) } entry*
 *     entry { kind 1 = PTX, 2 = cubin; .. }   the fields used are at ENTRY_*
 *
 * PTX is kept as it is, or zstd-compressed (nvcc's default since CUDA 12.8); libzstd is opened when that is met. */
#include "ptx.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define WRAPPER_MAGIC 0x466243b1u
#define FATBIN_MAGIC 0xba55ed50u
enum {
    ENTRY_KIND = 0, /* 2 bytes */
    ENTRY_HEADER_BYTES = 4,
    ENTRY_BYTES = 8,         /* behind the header, padded */
    ENTRY_PACKED_BYTES = 16, /* 0 when not compressed */
    ENTRY_SM = 28,
    ENTRY_FLAGS = 40,
    ENTRY_PLAIN_BYTES = 56
};
#define FLAG_LZ4 0x2000u
#define FLAG_ZSTD 0x8000u

static uint64_t get(const uint8_t *at, int bytes)
{
    uint64_t value = 0;
    memcpy(&value, at, (size_t)bytes);
    return value;
}

static char *unpack_zstd(const uint8_t *from, size_t packed, size_t plain, char *message, size_t message_size)
{
    size_t (*decompress)(void *, size_t, const void *, size_t) = NULL;
    void *library = dlopen("libzstd.so.1", RTLD_NOW);
    if (library) {
        void *symbol = dlsym(library, "ZSTD_decompress");
        memcpy(&decompress, &symbol, sizeof symbol);
    }
    if (!decompress) {
        snprintf(message, message_size, "the PTX is zstd-compressed and libzstd.so.1 cannot be had (%s)", dlerror());
        return NULL;
    }
    char *text = malloc(plain + 1);
    const size_t got = decompress(text, plain, from, packed);
    dlclose(library);
    if (got != plain) {
        snprintf(message, message_size, "the zstd-compressed PTX is damaged");
        free(text);
        return NULL;
    }
    text[plain] = 0;
    return text;
}

char *fatbin_ptx(const void *image, int sm, char *message, size_t message_size)
{
    const uint8_t *at = image;
    if (get(at, 4) == WRAPPER_MAGIC) {
        const void *inner;
        memcpy(&inner, at + 8, sizeof inner);
        at = inner;
    }
    if (get(at, 4) != FATBIN_MAGIC) {
        const char *text = image;
        if (strncmp(text, "//", 2) == 0 || strncmp(text, ".version", 8) == 0) return strdup(text);
        snprintf(message, message_size, "not a fat binary: it starts with 0x%08x", (unsigned)get(at, 4));
        return NULL;
    }
    const uint8_t *entry = at + get(at + 6, 2), *end = entry + get(at + 8, 8), *best = NULL;
    int best_sm = 0;
    while (entry < end) {
        const int entry_sm = (int)get(entry + ENTRY_SM, 4);
        if (get(entry + ENTRY_KIND, 2) == 1 && entry_sm <= sm && entry_sm > best_sm) {
            best = entry;
            best_sm = entry_sm;
        }
        entry += get(entry + ENTRY_HEADER_BYTES, 4) + get(entry + ENTRY_BYTES, 8);
    }
    if (!best) {
        snprintf(message, message_size, "the fat binary has no PTX for sm_%d or below", sm);
        return NULL;
    }
    const uint8_t *payload = best + get(best + ENTRY_HEADER_BYTES, 4);
    const uint64_t flags = get(best + ENTRY_FLAGS, 8), packed = get(best + ENTRY_PACKED_BYTES, 4);
    if (flags & FLAG_ZSTD) return unpack_zstd(payload, packed, get(best + ENTRY_PLAIN_BYTES, 8), message, message_size);
    if (flags & FLAG_LZ4) {
        snprintf(message, message_size, "the PTX is LZ4-compressed: build with --compress-mode=none or the default");
        return NULL;
    }
    return strndup((const char *)payload, get(best + ENTRY_BYTES, 8));
}
