/* tokenizer_private.h: the tables behind tokenizer.h, which tokenizer_file.c makes and tokenizer.c uses. */
#ifndef SERVE_TOKENIZER_PRIVATE_H
#define SERVE_TOKENIZER_PRIVATE_H

#include "bpe.h"
#include "tokenizer.h"

struct token {
    const char *written; /* as in tokenizer.json; NULL: no token has this id */
    const char *bytes;   /* what it stands for */
    size_t written_size, size;
    int special;
};

struct tokenizer {
    int32_t count; /* the largest id + 1 */
    struct token *tokens;
    char *memory;   /* the strings of all tokens */
    int32_t *table; /* [mask + 1]: ids by the hash of what is written; -1 = free */
    uint64_t mask;
    struct merges *merges;
    int digits; /* DIGITS_... */
    int ignore_merges;
    uint32_t byte_letters[256]; /* the letter that a byte is written as */
    int32_t byte_symbols[256];  /* its token, or -1 */
    int32_t *added;             /* ids of added tokens by their first byte, the longest first */
    int32_t added_begin[257];   /* where those of a first byte begin in it */
};

int32_t tokenizer_lookup(const struct tokenizer *tokenizer, const char *token, size_t size);

#endif
