/* json.h: reading and writing JSON for the file formats.
 *
 * Reading: the text is first checked against the whole grammar (RFC 8259, UTF-8, at most PLORA__JSON_DEPTH levels), because
 * the tokenizer behind it (jsmn) accepts more than JSON and is quadratic in the depth. What passes is addressed by token
 * number: token 0 is the document; a container's first child follows it, and plora__json_next() skips a whole subtree.
 * In an object a key is followed by its value. Strings with U+0000 are refused: names become C strings.
 *
 * Writing: a text that grows, and quoting. */
#ifndef PLORA_JSON_H
#define PLORA_JSON_H

#include "handles.h"

enum { PLORA__JSON_DEPTH = 32, PLORA__JSON_BYTES_MAX = 100 * 1000 * 1000 };

enum {
    PLORA__JSON_OBJECT,
    PLORA__JSON_ARRAY,
    PLORA__JSON_STRING,
    PLORA__JSON_NUMBER,
    PLORA__JSON_BOOL,
    PLORA__JSON_NULL
};

struct plora__json {
    plora_context *context;
    const char *text; /* the caller's; must stay */
    void *tokens;
    size_t token_bytes;
    int32_t count;
};

/* Errors: FORMAT with the byte offset in `text`, OUT_OF_MEMORY. On an error there is nothing to free. */
plora_status plora__json_parse(plora_context *context, const char *text, size_t length, struct plora__json *json);
void plora__json_free(struct plora__json *json);

int plora__json_type(const struct plora__json *json, int32_t token);
/* Members of an object, elements of an array, 0 for the rest. */
int32_t plora__json_size(const struct plora__json *json, int32_t token);
/* The token behind this one and all that is in it. */
int32_t plora__json_next(const struct plora__json *json, int32_t token);
/* Where a token begins in the text, for messages. */
size_t plora__json_offset(const struct plora__json *json, int32_t token);
/* The bytes a decoded string needs at most, terminator included. */
size_t plora__json_string_bytes(const struct plora__json *json, int32_t token);
/* Decodes a string into `buffer`; returns its length. */
size_t plora__json_string(const struct plora__json *json, int32_t token, char *buffer);
/* Whether a token is the string `text` once decoded. */
int plora__json_equals(const struct plora__json *json, int32_t token, const char *text);
/* The value of the first member of that name, -1 = absent. */
int32_t plora__json_member(const struct plora__json *json, int32_t object, const char *name);
/* 1 and the value when the token is a plain non-negative integer below 2^63. */
int plora__json_integer(const struct plora__json *json, int32_t token, int64_t *value);
/* 1 and the value when the token is a number that is finite as a double. */
int plora__json_number(const struct plora__json *json, int32_t token, double *value);
/* Whether the token is the literal true. */
int plora__json_true(const struct plora__json *json, int32_t token);

/* A growing text, always terminated. {context, NULL, 0, 0} is an empty one. */
struct plora__text {
    plora_context *context;
    char *data;
    size_t length, capacity;
};

plora_status plora__text_append(struct plora__text *text, const char *bytes, size_t length);
plora_status plora__text_format(struct plora__text *text, const char *format, ...)
    __attribute__((format(printf, 2, 3)));
/* Appends a quoted and escaped JSON string; `string` is UTF-8. */
plora_status plora__text_quote(struct plora__text *text, const char *string);
/* Appends a finite number so that it reads back to the same bits, whatever the host's locale. */
plora_status plora__text_number(struct plora__text *text, double value);
void plora__text_free(struct plora__text *text);

/* A heap sort of the numbers in order[count], which needs no memory and no good luck with the input. less(i, j, user): whether
 * i goes before j. */
void plora__sort(int32_t *order, int32_t count, int (*less)(int32_t i, int32_t j, const void *user), const void *user);

#endif
