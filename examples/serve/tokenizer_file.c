/* tokenizer_file.c: tokenizer.json -> struct tokenizer.
 *
 * Tokens are written with one letter a byte: itself where it can be seen in Latin-1, else the letters from U+0100 on, in the order of
 * the bytes. So "Ġthe" is " the", and every sequence of bytes has a name in the file. */
#include <cjson/cJSON.h>
#include <stdlib.h>
#include <string.h>

#include "tokenizer_private.h"
#include "utf8.h"
#include "util.h"
#include "words.h"

enum { MOST_IDS = 1 << 24 };

#define BAD(...) fault("tokenizer.json: " __VA_ARGS__)

static const cJSON *present(const cJSON *object, const char *name)
{
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(object, name);
    return item && !cJSON_IsNull(item) ? item : NULL;
}

static const char *text_of(const cJSON *object, const char *name)
{
    const cJSON *item = present(object, name);
    return cJSON_IsString(item) ? item->valuestring : "";
}

static int is_true(const cJSON *object, const char *name)
{
    return cJSON_IsTrue(present(object, name));
}

static void name_bytes(struct tokenizer *t)
{
    uint32_t next = 0x100;
    for (uint32_t byte = 0; byte < 256; byte++) {
        const int seen = (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xff && byte != 0xad);
        t->byte_letters[byte] = seen ? byte : next++;
    }
}

/* ------------------------------------------------------------------------------------------------- what must be as it is */

static int read_byte_level(const cJSON *step)
{
    if (is_true(step, "add_prefix_space")) return BAD("add_prefix_space is not supported");
    return cJSON_IsFalse(present(step, "use_regex")) ? BAD("ByteLevel without use_regex is not supported") : 0;
}

static int read_pre_tokenizer(const cJSON *root, struct tokenizer *t)
{
    const cJSON *step = present(root, "pre_tokenizer"), *list = present(step, "pretokenizers");
    if (strcmp(text_of(step, "type"), "Sequence") == 0) step = cJSON_GetArrayItem(list, 0);
    t->digits = DIGITS_KEPT;
    if (list && strcmp(text_of(step, "type"), "Digits") == 0) {
        t->digits = is_true(step, "individual_digits") ? DIGITS_ALONE : DIGITS_TOGETHER;
        step = step->next;
    }
    if (strcmp(text_of(step, "type"), "ByteLevel") != 0)
        return BAD("pre-tokenizer '%s' is not supported: only ByteLevel is, alone or after Digits",
                   text_of(step, "type"));
    if (list && step->next) return BAD("pre-tokenizers after ByteLevel are not supported");
    return read_byte_level(step);
}

static int check_rest(const cJSON *root, const cJSON *model)
{
    if (present(root, "normalizer")) return BAD("a normalizer is not supported");
    const cJSON *after = present(root, "post_processor");
    if (after && strcmp(text_of(after, "type"), "ByteLevel") != 0)
        return BAD("post-processor '%s' is not supported", text_of(after, "type"));
    if (strcmp(text_of(present(root, "decoder"), "type"), "ByteLevel") != 0)
        return BAD("decoder '%s' is not supported: only ByteLevel is", text_of(present(root, "decoder"), "type"));
    const char *type = text_of(model, "type");
    if (*type && strcmp(type, "BPE") != 0) return BAD("model '%s' is not supported: only BPE is", type);
    if (present(model, "dropout")) return BAD("dropout is not supported");
    if (*text_of(model, "continuing_subword_prefix") || *text_of(model, "end_of_word_suffix"))
        return BAD("subword prefixes and suffixes are not supported");
    return is_true(model, "byte_fallback") ? BAD("byte_fallback is not supported") : 0;
}

/* ---------------------------------------------------------------------------------------------------------------- tokens */

/* An id of tokenizer.json; -1 is a fault. */
static int32_t read_id(const cJSON *item, const char *token, int64_t vocabulary)
{
    if (!cJSON_IsNumber(item) || !(item->valuedouble >= 0 && item->valuedouble < (double)vocabulary) ||
        item->valuedouble != (double)(int32_t)item->valuedouble)
        return BAD("the id of '%.40s' must be an integer in [0, %lld)", token, (long long)vocabulary);
    return (int32_t)item->valuedouble;
}

/* The number of ids, and the bytes of all tokens. */
static int measure(const cJSON *vocabulary, const cJSON *added, int64_t limit, struct tokenizer *t, size_t *bytes)
{
    const cJSON *item;
    *bytes = 0;
    cJSON_ArrayForEach(item, vocabulary)
    {
        const int32_t id = read_id(item, item->string, limit);
        if (id < 0) return -1;
        if (id >= t->count) t->count = id + 1;
        *bytes += 2 * (strlen(item->string) + 1);
    }
    cJSON_ArrayForEach(item, added)
    {
        const char *content = text_of(item, "content");
        const int32_t id = read_id(present(item, "id"), content, limit);
        if (id < 0) return -1;
        if (!*content) return BAD("an added token is empty");
        if (is_true(item, "lstrip") || is_true(item, "rstrip") || is_true(item, "single_word"))
            return BAD("lstrip, rstrip and single_word of '%.40s' are not supported", content);
        if (id >= t->count) t->count = id + 1;
        *bytes += 2 * (strlen(content) + 1);
    }
    return t->count > 0 ? 0 : BAD("there are no tokens");
}

/* The byte that is written as this letter, -1 when none is. */
static int byte_of(const struct tokenizer *t, uint32_t letter)
{
    for (int byte = 0; letter < 0x200 && byte < 256; byte++)
        if (t->byte_letters[byte] == letter) return byte;
    return -1;
}

/* What a token that is written so stands for, into out; a token with other letters stands for itself. */
static size_t read_bytes(const struct tokenizer *t, const char *written, size_t size, char *out)
{
    size_t used = 0;
    for (size_t at = 0; at < size;) {
        uint32_t letter;
        const int length = utf8_next(written + at, size - at, &letter);
        const int byte = length > 0 ? byte_of(t, letter) : -1;
        if (byte < 0) {
            memcpy(out, written, size);
            return size;
        }
        out[used++] = (char)byte;
        at += (size_t)length;
    }
    return used;
}

static void add_token(struct tokenizer *t, int32_t id, const char *written, int added, int special, char **memory)
{
    struct token *token = &t->tokens[id];
    const size_t size = strlen(written);
    memcpy(*memory, written, size);
    *token = (struct token){.written = *memory, .written_size = size, .special = special};
    *memory += size;
    token->bytes = *memory;
    token->size = added ? size : read_bytes(t, written, size, *memory);
    if (added) memcpy(*memory, written, size);
    *memory += token->size;
    if (tokenizer_lookup(t, written, size) == id) return;
    uint64_t at = hash_bytes(0, written, size) & t->mask;
    while (t->table[at] >= 0)
        at = (at + 1) & t->mask;
    t->table[at] = id;
}

static int read_tokens(const cJSON *vocabulary, const cJSON *added, int64_t limit, struct tokenizer *t)
{
    size_t bytes;
    TRY(measure(vocabulary, added, limit, t, &bytes));
    uint64_t size = 16;
    while (size < 2 * (uint64_t)(cJSON_GetArraySize(vocabulary) + cJSON_GetArraySize(added)))
        size *= 2;
    t->mask = size - 1;
    TRY(memory_allocate((size_t)t->count, sizeof *t->tokens, "tokens", &t->tokens));
    TRY(memory_allocate(bytes, 1, "tokens", &t->memory));
    TRY(memory_allocate(size, sizeof *t->table, "tokens", &t->table));
    for (uint64_t i = 0; i < size; i++)
        t->table[i] = -1;
    char *memory = t->memory;
    const cJSON *item;
    cJSON_ArrayForEach(item, vocabulary)
    {
        if (t->tokens[(int32_t)item->valuedouble].written) return BAD("two tokens have the id %.0f", item->valuedouble);
        add_token(t, (int32_t)item->valuedouble, item->string, 0, 0, &memory);
    }
    cJSON_ArrayForEach(item, added)
    {
        const int32_t id = (int32_t)present(item, "id")->valuedouble;
        const char *content = text_of(item, "content");
        const struct token *there = &t->tokens[id];
        if (there->written &&
            (there->written_size != strlen(content) || memcmp(there->written, content, there->written_size) != 0))
            return BAD("the added token '%.40s' has the id of another", content);
        add_token(t, id, content, 1, is_true(item, "special"), &memory);
    }
    for (int byte = 0; byte < 256; byte++) {
        char letter[4];
        t->byte_symbols[byte] = tokenizer_lookup(t, letter, utf8_write(t->byte_letters[byte], letter));
    }
    return 0;
}

static const struct token *sorting; /* qsort() has no argument for it; opening is done by one thread */

static int by_first_byte(const void *a, const void *b)
{
    const struct token *x = &sorting[*(const int32_t *)a], *y = &sorting[*(const int32_t *)b];
    const int first = (unsigned char)x->written[0] - (unsigned char)y->written[0];
    return first ? first : (x->written_size < y->written_size) - (x->written_size > y->written_size);
}

static int index_added(const cJSON *added, struct tokenizer *t)
{
    int32_t count = 0;
    const cJSON *item;
    TRY(memory_allocate((size_t)cJSON_GetArraySize(added), sizeof *t->added, "added tokens", &t->added));
    cJSON_ArrayForEach(item, added) t->added[count++] = (int32_t)present(item, "id")->valuedouble;
    sorting = t->tokens;
    qsort(t->added, (size_t)count, sizeof *t->added, by_first_byte);
    for (int32_t byte = 0, at = 0; byte <= 256; byte++) {
        while (at < count && (unsigned char)t->tokens[t->added[at]].written[0] < byte)
            at++;
        t->added_begin[byte] = at;
    }
    return 0;
}

/* ---------------------------------------------------------------------------------------------------------------- merges */

/* The two sides of a merge: "a b", or ["a", "b"]. */
static int split_merge(const cJSON *item, const char **left, size_t *left_size, const char **right)
{
    if (cJSON_IsString(item)) {
        const char *space = strchr(item->valuestring, ' ');
        if (!space) return -1;
        *left = item->valuestring;
        *left_size = (size_t)(space - item->valuestring);
        *right = space + 1;
        return 0;
    }
    const cJSON *first = cJSON_GetArrayItem(item, 0), *second = cJSON_GetArrayItem(item, 1);
    if (cJSON_GetArraySize(item) != 2 || !cJSON_IsString(first) || !cJSON_IsString(second)) return -1;
    *left = first->valuestring;
    *left_size = strlen(*left);
    *right = second->valuestring;
    return 0;
}

static int read_merges(const cJSON *merges, struct tokenizer *t)
{
    if (!cJSON_IsArray(merges)) return BAD("model.merges is no list");
    TRY(merges_create(cJSON_GetArraySize(merges), &t->merges));
    int32_t rank = 0;
    const cJSON *item;
    cJSON_ArrayForEach(item, merges)
    {
        const char *left, *right;
        size_t left_size;
        if (split_merge(item, &left, &left_size, &right) != 0) return BAD("merge %d is no pair", rank);
        const size_t right_size = strlen(right);
        char *both = malloc(left_size + right_size + 1);
        if (!both) return fault("out of memory: merge %d", rank);
        memcpy(both, left, left_size);
        memcpy(both + left_size, right, right_size);
        const int32_t a = tokenizer_lookup(t, left, left_size), b = tokenizer_lookup(t, right, right_size);
        const int32_t made = tokenizer_lookup(t, both, left_size + right_size);
        free(both);
        if (a < 0 || b < 0 || made < 0)
            return BAD("merge %d, '%.*s' and '%.40s', names a token that is not there", rank,
                       (int)(left_size < 40 ? left_size : 40), left, right);
        merges_add(t->merges, rank++, a, b, made);
    }
    return 0;
}

static int read_all(const cJSON *root, int64_t vocabulary, struct tokenizer *t)
{
    const cJSON *model = present(root, "model"), *added = present(root, "added_tokens");
    if (vocabulary > MOST_IDS) vocabulary = MOST_IDS;
    if (!cJSON_IsObject(model) || !cJSON_IsObject(present(model, "vocab"))) return BAD("model.vocab is missing");
    if (added && !cJSON_IsArray(added)) return BAD("added_tokens is no list");
    TRY(check_rest(root, model));
    TRY(read_pre_tokenizer(root, t));
    name_bytes(t);
    TRY(read_tokens(present(model, "vocab"), added, vocabulary, t));
    if (*text_of(model, "unk_token"))
        for (int byte = 0; byte < 256; byte++)
            if (t->byte_symbols[byte] < 0)
                return BAD("there is no token for the byte %d, and unk_token is not supported", byte);
    t->ignore_merges = is_true(model, "ignore_merges");
    TRY(index_added(added, t));
    return read_merges(present(model, "merges"), t);
}

int tokenizer_open(const char *directory, int64_t vocabulary, struct tokenizer **tokenizer)
{
    *tokenizer = NULL;
    struct tokenizer *t;
    cJSON *root;
    TRY(json_read(directory, "tokenizer.json", &root));
    int result = memory_allocate(1, sizeof *t, "tokenizer", &t);
    if (result == 0) result = read_all(root, vocabulary, t);
    cJSON_Delete(root);
    if (result == 0)
        *tokenizer = t;
    else
        tokenizer_close(t);
    return result;
}
