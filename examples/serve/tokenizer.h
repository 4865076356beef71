/* tokenizer.h: text to tokens and back, as tokenizer.json of a Hugging Face model says: byte-level BPE (GPT-2, SmolLM2).
 *
 *     text -> added tokens, found as they stand -> words (words.h) -> bytes, written as letters -> merges (bpe.h) -> ids
 *
 * What tokenizer.json asks for beyond that, a normalizer or another pre-tokenizer for one, is refused by name. After opening
 * nothing changes: any number of threads may use it. */
#ifndef SERVE_TOKENIZER_H
#define SERVE_TOKENIZER_H

#include <stddef.h>
#include <stdint.h>

struct tokenizer;

/* A growing list of token ids; all zero is an empty one, free(ids) ends it. */
struct tokens {
    int32_t *ids;
    int64_t count, capacity;
};

/* Reads DIR/tokenizer.json, whose ids must be less than `vocabulary`. */
int tokenizer_open(const char *directory, int64_t vocabulary, struct tokenizer **tokenizer);
void tokenizer_close(struct tokenizer *tokenizer);

/* Appends the tokens of the text, which must be UTF-8. added = 0: what looks like an added token is ordinary text, as it must be
 * where a stranger's words go between control tokens. */
int tokenizer_encode(const struct tokenizer *tokenizer, const char *text, size_t size, int added, struct tokens *out);

/* The bytes that a token stands for, which need not be whole characters; none for ids that have no token. */
const char *tokenizer_bytes(const struct tokenizer *tokenizer, int32_t id, size_t *size);
/* Whether it is a control token, which is no part of the text. */
int tokenizer_is_special(const struct tokenizer *tokenizer, int32_t id);
/* The id of the token written so, -1 when there is none. */
int32_t tokenizer_find(const struct tokenizer *tokenizer, const char *token);

int tokens_append(struct tokens *tokens, int32_t id);

#endif
