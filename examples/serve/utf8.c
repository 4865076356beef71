/* utf8.c: see utf8.h. The ranges of second bytes that rule out overlong forms, surrogates and codes past U+10FFFF are those of
 * table 3-7 of the Unicode standard. */
#include "utf8.h"

int utf8_next(const char *text, size_t size, uint32_t *code)
{
    const unsigned char *s = (const unsigned char *)text;
    const unsigned first = s[0];
    if (first < 0x80) {
        *code = first;
        return 1;
    }
    const int length = first >= 0xc2 && first <= 0xdf   ? 2
                       : (first & 0xf0) == 0xe0         ? 3
                       : first >= 0xf0 && first <= 0xf4 ? 4
                                                        : 0;
    if (length == 0) return -1;
    unsigned low = 0x80, high = 0xbf;
    if (first == 0xe0) low = 0xa0;
    if (first == 0xed) high = 0x9f;
    if (first == 0xf0) low = 0x90;
    if (first == 0xf4) high = 0x8f;
    uint32_t value = first & (0x7fu >> length);
    for (int i = 1; i < length; i++, low = 0x80, high = 0xbf) {
        if ((size_t)i == size) return UTF8_CUT;
        if (s[i] < low || s[i] > high) return -i;
        value = value << 6 | (s[i] & 0x3fu);
    }
    *code = value;
    return length;
}

size_t utf8_write(uint32_t code, char *out)
{
    const size_t length = code < 0x80 ? 1 : code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
    static const unsigned char marks[] = {0, 0, 0xc0, 0xe0, 0xf0};
    for (size_t i = length; i-- > 1; code >>= 6)
        out[i] = (char)(0x80 | (code & 0x3f));
    out[0] = (char)(marks[length] | code);
    return length;
}

int utf8_valid(const char *text, size_t size, size_t *bad)
{
    uint32_t code;
    for (size_t at = 0; at < size;) {
        const int length = utf8_next(text + at, size - at, &code);
        if (length <= 0) {
            *bad = at;
            return 0;
        }
        at += (size_t)length;
    }
    return 1;
}
