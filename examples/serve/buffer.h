/* buffer.h: a text that grows, and JSON strings in it. When memory runs out `failed` is set and stays: one look at the end is enough. */
#ifndef SERVE_BUFFER_H
#define SERVE_BUFFER_H

#include <stddef.h>

struct buffer {
    char *data; /* ends in '\0' unless NULL */
    size_t size, capacity;
    int failed;
};

void buffer_add(struct buffer *buffer, const char *data, size_t size);
void buffer_print(struct buffer *buffer, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* A JSON string with its quotes; the text must be UTF-8. */
void buffer_json(struct buffer *buffer, const char *text, size_t size);

#endif
