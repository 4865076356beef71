/* json.c: see json.h. Grammar check, then jsmn's tokens, then accessors; at the end the growing text. */
#include "json.h"

#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define JSMN_STATIC
#define JSMN_STRICT
#define JSMN_PARENT_LINKS
#include <jsmn.h>

/* ------------------------------------------------------------------------------------------------------ grammar check */

struct scan {
    const unsigned char *text;
    size_t length, at;
    int32_t tokens;
};

static plora_status malformed(const struct scan *scan, const char *what)
{
    if (scan->at >= scan->length)
        return plora__fail(PLORA_ERROR_FORMAT, "JSON: it ends at byte %zu where %s should be", scan->at, what);
    return plora__fail(PLORA_ERROR_FORMAT, "JSON: byte %zu is 0x%02x where %s should be", scan->at,
                       scan->text[scan->at], what);
}

static int peek(const struct scan *scan)
{
    return scan->at < scan->length ? scan->text[scan->at] : -1;
}

static void skip_space(struct scan *scan)
{
    while (peek(scan) == ' ' || peek(scan) == '\t' || peek(scan) == '\n' || peek(scan) == '\r')
        ++scan->at;
}

/* The length of the UTF-8 sequence at `bytes`, 0 when it is not one (overlong forms and surrogates included). */
static size_t utf8_length(const unsigned char *bytes, size_t left)
{
    const unsigned lead = bytes[0];
    if (lead < 0x80) return 1;
    const size_t length = lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : 2;
    if (lead < 0xc2 || lead > 0xf4 || left < length) return 0;
    for (size_t i = 1; i < length; ++i)
        if ((bytes[i] & 0xc0) != 0x80) return 0;
    if (lead == 0xe0 && bytes[1] < 0xa0) return 0;
    if (lead == 0xed && bytes[1] > 0x9f) return 0;
    if (lead == 0xf0 && bytes[1] < 0x90) return 0;
    if (lead == 0xf4 && bytes[1] > 0x8f) return 0;
    return length;
}

/* Four hexadecimal digits, -1 when they are not. */
static int32_t hex4(const unsigned char *bytes, size_t left)
{
    if (left < 4) return -1;
    int32_t value = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned char c = bytes[i];
        const int digit = c >= '0' && c <= '9'   ? c - '0'
                          : c >= 'a' && c <= 'f' ? c - 'a' + 10
                          : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                                 : -1;
        if (digit < 0) return -1;
        value = value * 16 + digit;
    }
    return value;
}

/* Behind a backslash. A code point beyond the basic plane is a pair of surrogates. */
static plora_status check_escape(struct scan *scan)
{
    const int kind = peek(scan);
    if (kind != -1 && kind != 0 && kind != 'u') {
        if (strchr("\"\\/bfnrt", kind) == NULL) return malformed(scan, "an escape character");
        ++scan->at;
        return PLORA_OK;
    }
    if (kind != 'u') return malformed(scan, "an escape character");
    const unsigned char *digits = scan->text + scan->at + 1;
    const size_t left = scan->length - scan->at - 1;
    const int32_t unit = hex4(digits, left);
    if (unit < 0) return malformed(scan, "u with four hexadecimal digits");
    if (unit == 0) return malformed(scan, "a character other than U+0000");
    if (unit >= 0xdc00 && unit <= 0xdfff) return malformed(scan, "the first half of a surrogate pair");
    scan->at += 5;
    if (unit < 0xd800 || unit > 0xdbff) return PLORA_OK;
    const int paired = left >= 10 && digits[4] == '\\' && digits[5] == 'u';
    const int32_t second = paired ? hex4(digits + 6, left - 6) : -1;
    if (second < 0xdc00 || second > 0xdfff) return malformed(scan, "the second half of a surrogate pair");
    scan->at += 6;
    return PLORA_OK;
}

static plora_status check_string(struct scan *scan)
{
    ++scan->tokens;
    ++scan->at;
    for (;;) {
        const int c = peek(scan);
        if (c < 0x20) return malformed(scan, "a character of a string"); /* the end of the text too */
        if (c == '"') break;
        if (c == '\\') {
            ++scan->at;
            PLORA_TRY(check_escape(scan));
            continue;
        }
        const size_t length = utf8_length(scan->text + scan->at, scan->length - scan->at);
        if (length == 0) return malformed(scan, "valid UTF-8");
        scan->at += length;
    }
    ++scan->at;
    return PLORA_OK;
}

static plora_status check_digits(struct scan *scan)
{
    if (peek(scan) < '0' || peek(scan) > '9') return malformed(scan, "a digit");
    while (peek(scan) >= '0' && peek(scan) <= '9')
        ++scan->at;
    return PLORA_OK;
}

static plora_status check_primitive(struct scan *scan)
{
    static const char *const literals[] = {"true", "false", "null"};
    ++scan->tokens;
    for (int i = 0; i < 3; ++i) {
        const size_t length = strlen(literals[i]);
        if (scan->length - scan->at < length || memcmp(scan->text + scan->at, literals[i], length) != 0) continue;
        scan->at += length;
        return PLORA_OK;
    }
    if (peek(scan) == '-') ++scan->at;
    const int leading_zero = peek(scan) == '0';
    const size_t first = scan->at;
    if (!(peek(scan) >= '0' && peek(scan) <= '9')) return malformed(scan, "a value");
    PLORA_TRY(check_digits(scan));
    if (leading_zero && scan->at - first > 1) {
        scan->at = first + 1;
        return malformed(scan, "the end of a number that begins with 0");
    }
    if (peek(scan) == '.') {
        ++scan->at;
        PLORA_TRY(check_digits(scan));
    }
    if (peek(scan) == 'e' || peek(scan) == 'E') {
        ++scan->at;
        if (peek(scan) == '+' || peek(scan) == '-') ++scan->at;
        PLORA_TRY(check_digits(scan));
    }
    return PLORA_OK;
}

static plora_status check_value(struct scan *scan, int depth);

static plora_status check_container(struct scan *scan, int depth)
{
    const int object = peek(scan) == '{';
    const int closing = object ? '}' : ']';
    PLORA_CHECK(depth < PLORA__JSON_DEPTH, PLORA_ERROR_FORMAT, "JSON: more than %d levels deep at byte %zu",
                PLORA__JSON_DEPTH, scan->at);
    ++scan->tokens;
    ++scan->at;
    skip_space(scan);
    if (peek(scan) == closing) {
        ++scan->at;
        return PLORA_OK;
    }
    for (;;) {
        skip_space(scan);
        if (object) {
            if (peek(scan) != '"') return malformed(scan, "a key");
            PLORA_TRY(check_string(scan));
            skip_space(scan);
            if (peek(scan) != ':') return malformed(scan, "a colon");
            ++scan->at;
        }
        PLORA_TRY(check_value(scan, depth + 1));
        skip_space(scan);
        const int c = peek(scan);
        if (c != ',' && c != closing) return malformed(scan, object ? "',' or '}'" : "',' or ']'");
        ++scan->at;
        if (c == closing) return PLORA_OK;
    }
}

static plora_status check_value(struct scan *scan, int depth)
{
    skip_space(scan);
    if (peek(scan) == '{' || peek(scan) == '[') return check_container(scan, depth);
    if (peek(scan) == '"') return check_string(scan);
    return check_primitive(scan);
}

plora_status plora__json_parse(plora_context *context, const char *text, size_t length, struct plora__json *json)
{
    PLORA_CHECK(length <= PLORA__JSON_BYTES_MAX, PLORA_ERROR_FORMAT, "JSON: %zu bytes, at most %d are read", length,
                PLORA__JSON_BYTES_MAX);
    struct scan scan = {(const unsigned char *)text, length, 0, 0};
    skip_space(&scan);
    if (peek(&scan) != '{') return malformed(&scan, "'{'"); /* every format here is one object */
    PLORA_TRY(check_value(&scan, 0));
    skip_space(&scan);
    if (scan.at < length) return malformed(&scan, "the end");

    size_t bytes;
    void *tokens;
    PLORA_TRY(plora__multiply((size_t)scan.tokens, sizeof(jsmntok_t), &bytes));
    PLORA_TRY(plora__allocate(context, bytes, &tokens));
    jsmn_parser parser;
    jsmn_init(&parser);
    const int count = jsmn_parse(&parser, text, length, tokens, (unsigned)scan.tokens);
    if (count != scan.tokens) {
        plora__free(context, tokens, bytes);
        return plora__fail(PLORA_ERROR_FORMAT, "JSON: %d of %d tokens understood, up to byte %u", count, scan.tokens,
                           parser.pos);
    }
    *json = (struct plora__json){context, text, tokens, bytes, count};
    return PLORA_OK;
}

void plora__json_free(struct plora__json *json)
{
    if (json->tokens == NULL) return;
    plora__free(json->context, json->tokens, json->token_bytes);
    json->tokens = NULL;
}

/* ----------------------------------------------------------------------------------------------------------- accessors */

static const jsmntok_t *token_at(const struct plora__json *json, int32_t token)
{
    return (const jsmntok_t *)json->tokens + token;
}

int plora__json_type(const struct plora__json *json, int32_t token)
{
    const jsmntok_t *t = token_at(json, token);
    if (t->type == JSMN_OBJECT) return PLORA__JSON_OBJECT;
    if (t->type == JSMN_ARRAY) return PLORA__JSON_ARRAY;
    if (t->type == JSMN_STRING) return PLORA__JSON_STRING;
    const char first = json->text[t->start];
    return first == 'n' ? PLORA__JSON_NULL : first == 't' || first == 'f' ? PLORA__JSON_BOOL : PLORA__JSON_NUMBER;
}

int32_t plora__json_size(const struct plora__json *json, int32_t token)
{
    const jsmntok_t *t = token_at(json, token);
    return t->type == JSMN_OBJECT || t->type == JSMN_ARRAY ? t->size : 0;
}

int32_t plora__json_next(const struct plora__json *json, int32_t token)
{
    const int end = token_at(json, token)->end;
    int32_t next = token + 1;
    while (next < json->count && token_at(json, next)->start < end)
        ++next;
    return next;
}

size_t plora__json_offset(const struct plora__json *json, int32_t token)
{
    return (size_t)token_at(json, token)->start;
}

size_t plora__json_string_bytes(const struct plora__json *json, int32_t token)
{
    const jsmntok_t *t = token_at(json, token);
    return (size_t)(t->end - t->start) + 1; /* an escape is never shorter than what it stands for */
}

static size_t put_utf8(char *out, uint32_t point)
{
    if (point < 0x80) {
        out[0] = (char)point;
        return 1;
    }
    if (point < 0x800) {
        out[0] = (char)(0xc0 | point >> 6);
        out[1] = (char)(0x80 | (point & 0x3f));
        return 2;
    }
    if (point < 0x10000) {
        out[0] = (char)(0xe0 | point >> 12);
        out[1] = (char)(0x80 | (point >> 6 & 0x3f));
        out[2] = (char)(0x80 | (point & 0x3f));
        return 3;
    }
    out[0] = (char)(0xf0 | point >> 18);
    out[1] = (char)(0x80 | (point >> 12 & 0x3f));
    out[2] = (char)(0x80 | (point >> 6 & 0x3f));
    out[3] = (char)(0x80 | (point & 0x3f));
    return 4;
}

/* One character of a string that passed the check; returns the bytes read and puts the bytes written. */
static size_t decode_one(const char *in, char *out, size_t *written)
{
    static const char names[] = "bfnrt", values[] = "\b\f\n\r\t";
    *written = 1;
    if (in[0] != '\\') {
        out[0] = in[0];
        return 1;
    }
    if (in[1] != 'u') {
        const char *name = strchr(names, in[1]);
        out[0] = name != NULL ? values[name - names] : in[1];
        return 2;
    }
    const uint32_t first = (uint32_t)hex4((const unsigned char *)in + 2, 4);
    if (first < 0xd800 || first > 0xdbff) {
        *written = put_utf8(out, first);
        return 6;
    }
    const uint32_t second = (uint32_t)hex4((const unsigned char *)in + 8, 4);
    *written = put_utf8(out, 0x10000 + ((first - 0xd800) << 10) + (second - 0xdc00));
    return 12;
}

size_t plora__json_string(const struct plora__json *json, int32_t token, char *buffer)
{
    const jsmntok_t *t = token_at(json, token);
    size_t length = 0;
    for (size_t at = (size_t)t->start; at < (size_t)t->end;) {
        size_t written;
        at += decode_one(json->text + at, buffer + length, &written);
        length += written;
    }
    buffer[length] = '\0';
    return length;
}

int plora__json_equals(const struct plora__json *json, int32_t token, const char *text)
{
    const jsmntok_t *t = token_at(json, token);
    if (t->type != JSMN_STRING) return 0;
    const size_t length = strlen(text);
    size_t done = 0;
    for (size_t at = (size_t)t->start; at < (size_t)t->end;) {
        char piece[4];
        size_t written;
        at += decode_one(json->text + at, piece, &written);
        if (length - done < written || memcmp(text + done, piece, written) != 0) return 0;
        done += written;
    }
    return done == length;
}

int32_t plora__json_member(const struct plora__json *json, int32_t object, const char *name)
{
    if (plora__json_type(json, object) != PLORA__JSON_OBJECT) return -1;
    int32_t key = object + 1;
    for (int32_t i = 0; i < plora__json_size(json, object); ++i, key = plora__json_next(json, key + 1))
        if (plora__json_equals(json, key, name)) return key + 1;
    return -1;
}

int plora__json_integer(const struct plora__json *json, int32_t token, int64_t *value)
{
    const jsmntok_t *t = token_at(json, token);
    if (t->type != JSMN_PRIMITIVE) return 0;
    int64_t result = 0;
    for (int at = t->start; at < t->end; ++at) {
        const int digit = json->text[at] - '0';
        if (digit < 0 || digit > 9) return 0;
        if (__builtin_mul_overflow(result, (int64_t)10, &result) ||
            __builtin_add_overflow(result, (int64_t)digit, &result))
            return 0;
    }
    *value = result;
    return 1;
}

int plora__json_number(const struct plora__json *json, int32_t token, double *value)
{
    if (plora__json_type(json, token) != PLORA__JSON_NUMBER) return 0;
    const jsmntok_t *t = token_at(json, token);
    char digits[512]; /* strtod needs a terminator */
    const size_t length = (size_t)(t->end - t->start);
    if (length >= sizeof digits) return 0;
    memcpy(digits, json->text + t->start, length);
    digits[length] = '\0';
    /* strtod reads the decimal point of the host's locale. */
    char *end;
    double result = strtod(digits, &end);
    char *point = strchr(digits, '.');
    if (*end == '.' && point != NULL) {
        const char *local = "";
        char probe[8];
        if (snprintf(probe, sizeof probe, "%.1f", 0.5) == 3) local = probe + 1;
        *point = *local;
        result = strtod(digits, &end);
    }
    if (*end != '\0' || !isfinite(result)) return 0;
    *value = result;
    return 1;
}

int plora__json_true(const struct plora__json *json, int32_t token)
{
    return plora__json_type(json, token) == PLORA__JSON_BOOL && json->text[token_at(json, token)->start] == 't';
}

/* ---------------------------------------------------------------------------------------------------------------- text */

static plora_status reserve(struct plora__text *text, size_t more)
{
    size_t needed;
    PLORA_CHECK(!__builtin_add_overflow(text->length, more, &needed) && needed < SIZE_MAX / 2,
                PLORA_ERROR_OUT_OF_MEMORY, "size overflow: a text of %zu + %zu bytes", text->length, more);
    if (needed < text->capacity) return PLORA_OK;
    size_t capacity = text->capacity > 0 ? text->capacity : 512;
    while (capacity <= needed)
        capacity *= 2;
    void *memory;
    PLORA_TRY(plora__allocate(text->context, capacity, &memory));
    if (text->length > 0) memcpy(memory, text->data, text->length);
    plora__free(text->context, text->data, text->capacity);
    text->data = memory;
    text->capacity = capacity;
    text->data[text->length] = '\0';
    return PLORA_OK;
}

plora_status plora__text_append(struct plora__text *text, const char *bytes, size_t length)
{
    PLORA_TRY(reserve(text, length));
    memcpy(text->data + text->length, bytes, length);
    text->length += length;
    text->data[text->length] = '\0';
    return PLORA_OK;
}

plora_status plora__text_format(struct plora__text *text, const char *format, ...)
{
    for (int i = 0; i < 2; ++i) {
        PLORA_TRY(reserve(text, 1));
        va_list arguments;
        va_start(arguments, format);
        const size_t room = text->capacity - text->length;
        const int length = vsnprintf(text->data + text->length, room, format, arguments);
        va_end(arguments);
        PLORA_CHECK(length >= 0, PLORA_ERROR_INVALID_ARGUMENT, "text cannot be formatted");
        if ((size_t)length < room) {
            text->length += (size_t)length;
            return PLORA_OK;
        }
        text->data[text->length] = '\0';
        PLORA_TRY(reserve(text, (size_t)length + 1));
    }
    return plora__fail(PLORA_ERROR_INVALID_ARGUMENT, "text cannot be formatted");
}

plora_status plora__text_quote(struct plora__text *text, const char *string)
{
    PLORA_TRY(plora__text_append(text, "\"", 1));
    for (const char *c = string; *c != '\0'; ++c) {
        if (*c == '"' || *c == '\\')
            PLORA_TRY(plora__text_format(text, "\\%c", *c));
        else if ((unsigned char)*c < 0x20)
            PLORA_TRY(plora__text_format(text, "\\u%04x", (unsigned)*c));
        else
            PLORA_TRY(plora__text_append(text, c, 1));
    }
    return plora__text_append(text, "\"", 1);
}

plora_status plora__text_number(struct plora__text *text, double value)
{
    char digits[64];
    PLORA_CHECK(isfinite(value), PLORA_ERROR_NON_FINITE, "%g cannot be written as a number", value);
    const int length = snprintf(digits, sizeof digits, "%.17g", value);
    for (int i = 0; i < length; ++i)
        if (strchr("0123456789+-e", digits[i]) == NULL) digits[i] = '.';
    return plora__text_append(text, digits, (size_t)length);
}

void plora__text_free(struct plora__text *text)
{
    plora__free(text->context, text->data, text->capacity);
    text->data = NULL;
    text->length = text->capacity = 0;
}

/* ---------------------------------------------------------------------------------------------------------------- sort */

static void sift_down(int32_t *order, int32_t root, int32_t count, int (*less)(int32_t, int32_t, const void *),
                      const void *user)
{
    for (;;) {
        if (root >= count / 2) return;
        int32_t child = 2 * root + 1;
        if (child + 1 < count && less(order[child], order[child + 1], user)) ++child;
        if (!less(order[root], order[child], user)) return;
        const int32_t held = order[root];
        order[root] = order[child];
        order[child] = held;
        root = child;
    }
}

void plora__sort(int32_t *order, int32_t count, int (*less)(int32_t, int32_t, const void *), const void *user)
{
    for (int32_t root = count / 2; root-- > 0;)
        sift_down(order, root, count, less, user);
    for (int32_t last = count - 1; last > 0; --last) {
        const int32_t held = order[0];
        order[0] = order[last];
        order[last] = held;
        sift_down(order, 0, last, less, user);
    }
}
