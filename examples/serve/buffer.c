/* buffer.c: see buffer.h. */
#include "buffer.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void buffer_add(struct buffer *b, const char *data, size_t size)
{
    if (b->failed) return;
    if (b->size + size + 1 > b->capacity) {
        const size_t capacity = 2 * (b->size + size) + 256;
        char *larger = realloc(b->data, capacity);
        if (!larger) {
            b->failed = 1;
            return;
        }
        b->data = larger;
        b->capacity = capacity;
    }
    if (size > 0) memcpy(b->data + b->size, data, size);
    b->size += size;
    b->data[b->size] = '\0';
}

void buffer_print(struct buffer *b, const char *format, ...)
{
    char small[512], *text = small;
    va_list list;
    va_start(list, format);
    const int size = vsnprintf(small, sizeof small, format, list);
    va_end(list);
    if (size >= (int)sizeof small) {
        va_start(list, format);
        if (vasprintf(&text, format, list) < 0) text = NULL;
        va_end(list);
    }
    if (size < 0 || !text)
        b->failed = 1;
    else
        buffer_add(b, text, (size_t)size);
    if (text != small) free(text);
}

void buffer_json(struct buffer *b, const char *text, size_t size)
{
    size_t from = 0;
    buffer_add(b, "\"", 1);
    for (size_t i = 0; i < size; i++) {
        const unsigned char c = (unsigned char)text[i];
        if (c >= 0x20 && c != '"' && c != '\\' && c != 0x7f) continue;
        buffer_add(b, text + from, i - from);
        from = i + 1;
        if (c == '"' || c == '\\')
            buffer_print(b, "\\%c", c);
        else if (c == '\n')
            buffer_add(b, "\\n", 2);
        else
            buffer_print(b, "\\u%04x", c);
    }
    buffer_add(b, text + from, size - from);
    buffer_add(b, "\"", 1);
}
