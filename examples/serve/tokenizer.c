/* tokenizer.c: see tokenizer.h; reading tokenizer.json is in tokenizer_file.c. */
#include "tokenizer.h"

#include <stdlib.h>
#include <string.h>

#include "tokenizer_private.h"
#include "utf8.h"
#include "util.h"
#include "words.h"

int tokens_append(struct tokens *tokens, int32_t id)
{
    if (tokens->count == tokens->capacity) {
        const int64_t capacity = tokens->capacity ? 2 * tokens->capacity : 64;
        int32_t *larger = realloc(tokens->ids, (size_t)capacity * sizeof *larger);
        if (!larger) return fault("out of memory: %lld tokens", (long long)capacity);
        tokens->ids = larger;
        tokens->capacity = capacity;
    }
    tokens->ids[tokens->count++] = id;
    return 0;
}

int32_t tokenizer_lookup(const struct tokenizer *t, const char *token, size_t size)
{
    for (uint64_t at = hash_bytes(0, token, size) & t->mask; t->table[at] >= 0; at = (at + 1) & t->mask) {
        const struct token *found = &t->tokens[t->table[at]];
        if (found->written_size == size && memcmp(found->written, token, size) == 0) return t->table[at];
    }
    return -1;
}

int32_t tokenizer_find(const struct tokenizer *t, const char *token)
{
    return tokenizer_lookup(t, token, strlen(token));
}

const char *tokenizer_bytes(const struct tokenizer *t, int32_t id, size_t *size)
{
    *size = id >= 0 && id < t->count ? t->tokens[id].size : 0;
    return *size ? t->tokens[id].bytes : "";
}

int tokenizer_is_special(const struct tokenizer *t, int32_t id)
{
    return id >= 0 && id < t->count && t->tokens[id].special;
}

/* One word: a symbol for each byte, then the merges. Bytes that have no symbol are left out, as `tokenizers` does. */
static int encode_word(const struct tokenizer *t, const char *word, size_t size, struct tokens *out)
{
    const int64_t first = out->count;
    for (size_t i = 0; i < size; i++) {
        const int32_t symbol = t->byte_symbols[(unsigned char)word[i]];
        if (symbol >= 0) TRY(tokens_append(out, symbol));
    }
    const int64_t left = merges_apply(t->merges, out->ids + first, out->count - first);
    if (left < 0) return -1;
    out->count = first + left;
    return 0;
}

/* With ignore_merges a word that is a token as a whole is that one. */
static int32_t whole_word(const struct tokenizer *t, const char *word, size_t size)
{
    char written[2 * 256];
    if (size > sizeof written / 2) return -1;
    size_t used = 0;
    for (size_t i = 0; i < size; i++)
        used += utf8_write(t->byte_letters[(unsigned char)word[i]], written + used);
    return tokenizer_lookup(t, written, used);
}

static int encode_text(const struct tokenizer *t, const char *text, size_t size, struct tokens *out)
{
    while (size > 0) {
        const size_t end = word_end(text, size, t->digits);
        const int32_t whole = t->ignore_merges ? whole_word(t, text, end) : -1;
        if (whole >= 0)
            TRY(tokens_append(out, whole));
        else
            TRY(encode_word(t, text, end, out));
        text += end;
        size -= end;
    }
    return 0;
}

/* The longest added token that the text begins with, -1 when there is none. */
static int32_t added_at(const struct tokenizer *t, const char *text, size_t size)
{
    for (int32_t i = t->added_begin[(unsigned char)text[0]]; i < t->added_begin[(unsigned char)text[0] + 1]; i++) {
        const struct token *token = &t->tokens[t->added[i]];
        if (token->written_size <= size && memcmp(token->written, text, token->written_size) == 0) return t->added[i];
    }
    return -1;
}

int tokenizer_encode(const struct tokenizer *t, const char *text, size_t size, int added, struct tokens *out)
{
    size_t bad = 0, from = 0;
    if (!utf8_valid(text, size, &bad)) return fault("the text is not UTF-8 at byte %zu", bad);
    for (size_t at = 0; added && at < size;) {
        const int32_t token = added_at(t, text + at, size - at);
        if (token < 0) {
            at++;
            continue;
        }
        TRY(encode_text(t, text + from, at - from, out));
        TRY(tokens_append(out, token));
        from = at += t->tokens[token].written_size;
    }
    return encode_text(t, text + from, size - from, out);
}

void tokenizer_close(struct tokenizer *t)
{
    if (!t) return;
    merges_destroy(t->merges);
    free(t->tokens);
    free(t->table);
    free(t->added);
    free(t->memory);
    free(t);
}
