/* utf8.h: UTF-8, one character at a time, and what stands for bytes that are none. */
#ifndef SERVE_UTF8_H
#define SERVE_UTF8_H

#include <stddef.h>
#include <stdint.h>

enum { UTF8_CUT = 0 };

/* The length in bytes of the character that text[0 .. size) begins with, size > 0, and its code. Else UTF8_CUT when more bytes could
 * make a character of them, or -n when the first n bytes never will; n is the longest start of a character, at least 1 (what
 * Unicode calls a maximal subpart), and one U+FFFD stands for them. */
int utf8_next(const char *text, size_t size, uint32_t *code);

/* Writes the character into out[4] and returns its length. */
size_t utf8_write(uint32_t code, char *out);

/* Whether all of it is UTF-8; *bad is the first byte that is not. */
int utf8_valid(const char *text, size_t size, size_t *bad);

#endif
