/* text.h: the text of a sequence as its tokens arrive: whole characters only, and nothing that may yet turn out to be a stop string.
 *
 *     bytes of tokens -> characters, U+FFFD for what is none -> what cannot be part of a stop string any more: `ready`
 *
 * A token may end within a character and a stop string may begin within a token, so both hold back what is not yet sure. */
#ifndef SERVE_TEXT_H
#define SERVE_TEXT_H

#include <stddef.h>

enum { MOST_STOPS = 4 };

struct text {
    char *data; /* [capacity], ends in '\0' */
    size_t ready, size, capacity;
    char partial[4]; /* the beginning of a character */
    size_t partial_size;
    char *stops[MOST_STOPS];
    int stop_count, stopped;
};

/* Appends bytes. `stopped` becomes 1 when a stop string is found: the text then ends before it. */
int text_append(struct text *text, const char *bytes, size_t size);
/* No more will come: all of it is ready. */
int text_end(struct text *text);
void text_free(struct text *text);

#endif
