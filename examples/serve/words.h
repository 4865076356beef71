/* words.h: how byte-level BPE cuts a text into words, which merges never cross. */
#ifndef SERVE_WORDS_H
#define SERVE_WORDS_H

#include <stddef.h>

enum { DIGITS_KEPT = 0, DIGITS_TOGETHER = 1, DIGITS_ALONE = 2 };

/* The end of the word that begins at text[0], size > 0. text is UTF-8, and a part that no cut goes through. First every digit
 * (DIGITS_ALONE) or run of digits (DIGITS_TOGETHER) becomes a part of its own; then each part is cut as GPT-2's tokenizer does, by
 *     's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+ */
size_t word_end(const char *text, size_t size, int digits);

#endif
