/* words.c: see words.h. The classes of characters are those of utf8proc; the expression is followed by hand. */
#include "words.h"

#include <string.h>
#include <utf8proc.h>

#include "utf8.h"

enum kind { LETTER, NUMBER, SPACE, OTHER };

static int is_space(uint32_t code) /* the property White_Space */
{
    return (code >= 9 && code <= 13) || code == 0x20 || code == 0x85 || code == 0xa0 || code == 0x1680 ||
           (code >= 0x2000 && code <= 0x200a) || code == 0x2028 || code == 0x2029 || code == 0x202f || code == 0x205f ||
           code == 0x3000;
}

/* The kind of the character at text[0], and its length. */
static enum kind look(const char *text, size_t size, size_t *length)
{
    uint32_t code;
    const int read = utf8_next(text, size, &code);
    *length = read > 0 ? (size_t)read : 1;
    if (read <= 0) return OTHER;
    if (is_space(code)) return SPACE;
    switch (utf8proc_category((utf8proc_int32_t)code)) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO: return LETTER;
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_NO: return NUMBER;
    default: return OTHER;
    }
}

/* The end of the run of characters of one kind from `at` on; *last is where its last character begins. */
static size_t run(const char *text, size_t size, size_t at, enum kind kind, size_t *last)
{
    size_t length;
    *last = at;
    while (at < size && look(text + at, size - at, &length) == kind) {
        *last = at;
        at += length;
    }
    return at;
}

static size_t contraction(const char *text, size_t size)
{
    static const char *const endings[] = {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"};
    for (size_t i = 0; i < sizeof endings / sizeof *endings; i++) {
        const size_t length = strlen(endings[i]);
        if (size >= length && memcmp(text, endings[i], length) == 0) return length;
    }
    return 0;
}

size_t word_end(const char *text, size_t size, int digits)
{
    size_t length, last;
    const enum kind first = look(text, size, &length);
    const int cut = digits != DIGITS_KEPT;
    if (cut && first == NUMBER) return digits == DIGITS_ALONE ? length : run(text, size, 0, NUMBER, &last);
    if (text[0] == '\'') {
        const size_t end = contraction(text, size);
        if (end) return end;
    }
    if (first != SPACE) return run(text, size, 0, first, &last);
    if (text[0] == ' ' && size > 1) {
        const enum kind next = look(text + 1, size - 1, &length);
        if (next != SPACE && !(cut && next == NUMBER)) return run(text, size, 1, next, &last);
    }
    const size_t end = run(text, size, 0, SPACE, &last);
    /* A part ends where a digit begins: what looks ahead sees nothing there. */
    const int at_end = end == size || (cut && look(text + end, size - end, &length) == NUMBER);
    return at_end || last == 0 ? end : last;
}
