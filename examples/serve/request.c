/* request.c: see request.h. cJSON bounds the depth of nesting; what it lets through and this does not: text that is not UTF-8, strings
 * that a NUL character would cut, something after the object, members that come twice. */
#include "request.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "utf8.h"

int request_wrong(struct request *r, unsigned status, const char *param, const char *format, ...)
{
    char message[512];
    va_list list;
    va_start(list, format);
    vsnprintf(message, sizeof message, format, list);
    va_end(list);
    r->result = exchange_refuse(r->exchange, status, param, "%s", message);
    return -1;
}

/* Whether there is an escaped NUL: \u0000 behind an even number of backslashes. */
static int has_nul(const char *text, size_t size)
{
    for (size_t i = 0; i + 1 < size; i++) {
        if (text[i] != '\\') continue;
        if (size - i >= 6 && memcmp(text + i, "\\u0000", 6) == 0) return 1;
        i++;
    }
    return memchr(text, '\0', size) != NULL;
}

static int check_members(struct request *r, const char *const *known)
{
    const cJSON *item;
    cJSON_ArrayForEach(item, r->root)
    {
        int found = 0;
        for (int i = 0; known[i] && !found; i++)
            found = strcmp(known[i], item->string) == 0;
        if (!found)
            return request_wrong(r, 400, item->string, "'%.80s' is not a parameter of this server", item->string);
        if (cJSON_GetObjectItemCaseSensitive(r->root, item->string) != item)
            return request_wrong(r, 400, item->string, "'%.80s' is given twice", item->string);
    }
    return 0;
}

int request_open(struct exchange *e, const char *const *known, struct request *r)
{
    *r = (struct request){.exchange = e, .result = MHD_NO};
    const char *text = e->body.data, *end = NULL;
    const size_t size = e->body.size;
    size_t bad;
    if (size == 0) return request_wrong(r, 400, NULL, "the body is empty: a JSON object is expected");
    if (!utf8_valid(text, size, &bad)) return request_wrong(r, 400, NULL, "the body is not UTF-8 at byte %zu", bad);
    if (has_nul(text, size)) return request_wrong(r, 400, NULL, "the body has a NUL character, which is not supported");
    r->root = cJSON_ParseWithLengthOpts(text, size + 1, &end, 1);
    if (!r->root) {
        const size_t at = end && end >= text ? (size_t)(end - text) : 0;
        return request_wrong(r, 400, NULL, "the body is not JSON at byte %zu", at < size ? at : size);
    }
    if (!cJSON_IsObject(r->root)) return request_wrong(r, 400, NULL, "the body must be a JSON object");
    return check_members(r, known);
}

void request_close(struct request *r)
{
    cJSON_Delete(r->root);
}

const cJSON *request_item(const struct request *r, const char *name)
{
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(r->root, name);
    return item && !cJSON_IsNull(item) ? item : NULL;
}

int request_text(struct request *r, const char *name, const char **value)
{
    const cJSON *item = request_item(r, name);
    if (!item) return 0;
    if (!cJSON_IsString(item)) return request_wrong(r, 400, name, "%s must be a string", name);
    *value = item->valuestring;
    return 0;
}

int request_number(struct request *r, const char *name, double least, double most, double *value)
{
    const cJSON *item = request_item(r, name);
    if (!item) return 0;
    if (!cJSON_IsNumber(item)) return request_wrong(r, 400, name, "%s must be a number", name);
    if (!(item->valuedouble >= least && item->valuedouble <= most))
        return request_wrong(r, 400, name, "%s is %g: must be in [%g, %g]", name, item->valuedouble, least, most);
    *value = item->valuedouble;
    return 0;
}

int request_integer(struct request *r, const char *name, int64_t least, int64_t most, int64_t *value)
{
    double number = 0;
    if (!request_item(r, name)) return 0;
    if (request_number(r, name, -0x1p53, 0x1p53, &number) != 0) return -1;
    if (number != floor(number)) return request_wrong(r, 400, name, "%s is %g: must be an integer", name, number);
    if (number < (double)least || number > (double)most)
        return request_wrong(r, 400, name, "%s is %.0f: must be in [%lld, %lld]", name, number, (long long)least,
                             (long long)most);
    *value = (int64_t)number;
    return 0;
}

int request_flag(struct request *r, const char *name, int *value)
{
    const cJSON *item = request_item(r, name);
    if (!item) return 0;
    if (!cJSON_IsBool(item)) return request_wrong(r, 400, name, "%s must be true or false", name);
    *value = cJSON_IsTrue(item);
    return 0;
}
