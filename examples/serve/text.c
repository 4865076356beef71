/* text.c: see text.h. */
#include "text.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "utf8.h"
#include "util.h"

static int add(struct text *t, const char *bytes, size_t size)
{
    if (t->size + size + 1 > t->capacity) {
        const size_t capacity = 2 * (t->size + size) + 64;
        char *larger = realloc(t->data, capacity);
        if (!larger) return fault("out of memory: %zu bytes of text", capacity);
        t->data = larger;
        t->capacity = capacity;
    }
    memcpy(t->data + t->size, bytes, size);
    t->size += size;
    t->data[t->size] = '\0';
    return 0;
}

/* Adds the characters of text[0 .. size); *left bytes at its end may become one. */
static int add_characters(struct text *t, const char *bytes, size_t size, size_t *left)
{
    uint32_t code;
    size_t from = 0, at = 0;
    *left = 0;
    while (at < size) {
        const int length = utf8_next(bytes + at, size - at, &code);
        if (length == UTF8_CUT) {
            *left = size - at;
            break;
        }
        if (length > 0) {
            at += (size_t)length;
            continue;
        }
        TRY(add(t, bytes + from, at - from));
        TRY(add(t, "\xef\xbf\xbd", 3));
        from = at += (size_t)-length;
    }
    return add(t, bytes + from, at - from);
}

/* Looks for stop strings that end after `from`; ready = all but what one may begin with. */
static void find_stops(struct text *t, size_t from)
{
    t->ready = t->size;
    for (int i = 0; i < t->stop_count; i++) {
        const size_t length = strlen(t->stops[i]);
        const size_t first = from > length ? from - length : 0;
        const char *found =
            t->size >= first + length ? memmem(t->data + first, t->size - first, t->stops[i], length) : NULL;
        if (found) { /* the earliest of several counts; it cuts the text for those that follow */
            t->size = t->ready = (size_t)(found - t->data);
            t->data[t->size] = '\0';
            t->stopped = 1;
        }
    }
    if (t->stopped) return;
    for (int i = 0; i < t->stop_count; i++) {
        size_t held = strlen(t->stops[i]) - 1;
        if (held > t->size) held = t->size;
        while (held > 0 && memcmp(t->data + t->size - held, t->stops[i], held) != 0)
            held--;
        if (t->size - held < t->ready) t->ready = t->size - held;
    }
}

int text_append(struct text *t, const char *bytes, size_t size)
{
    const size_t from = t->size, before = t->partial_size;
    size_t left;
    if (before + size == 0 || t->stopped) return 0;
    char *all = malloc(before + size);
    if (!all) return fault("out of memory: %zu bytes of text", before + size);
    memcpy(all, t->partial, before);
    if (size > 0) memcpy(all + before, bytes, size);
    const int result = add_characters(t, all, before + size, &left);
    memcpy(t->partial, all + before + size - left, left); /* at most 3 */
    t->partial_size = left;
    free(all);
    TRY(result);
    find_stops(t, from);
    return 0;
}

int text_end(struct text *t)
{
    const size_t from = t->size;
    if (t->partial_size > 0 && !t->stopped) {
        t->partial_size = 0;
        TRY(add(t, "\xef\xbf\xbd", 3));
        find_stops(t, from);
    }
    t->ready = t->size;
    return 0;
}

void text_free(struct text *t)
{
    free(t->data);
    for (int i = 0; i < t->stop_count; i++)
        free(t->stops[i]);
}
