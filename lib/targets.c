/* targets.c: pattern lists over layer names (see targets.h). */
#include "targets.h"

#include <fnmatch.h>
#include <string.h>

enum { PATTERN_BYTES_MAX = 512 };

int plora__pattern_matches(const char *pattern, size_t length, const struct plora__layer *layer)
{
    char text[PATTERN_BYTES_MAX];
    if (length == 0 || length >= sizeof text) return 0;
    memcpy(text, pattern, length);
    text[length] = '\0';
    if (strcmp(text, "all-linear") == 0) return (layer->flags & PLORA_LAYER_HEAD) == 0;
    if (strpbrk(text, "*?[") != NULL) return fnmatch(text, layer->name, 0) == 0;
    const size_t name_length = strlen(layer->name);
    if (name_length < length || strcmp(layer->name + name_length - length, text) != 0) return 0;
    return name_length == length || layer->name[name_length - length - 1] == '.';
}

plora_status plora__match_targets(const plora_model *model, const char *list, const char *what, unsigned char *chosen)
{
    memset(chosen, 0, (size_t)model->layer_count);
    const char *pattern = list;
    while (*pattern != '\0') {
        pattern += strspn(pattern, ", ");
        const size_t length = strcspn(pattern, ", ");
        if (length == 0) break;
        PLORA_CHECK(length < PATTERN_BYTES_MAX, PLORA_ERROR_INVALID_ARGUMENT, "%s: a pattern of %zu bytes is too long",
                    what, length);
        int32_t matched = 0;
        for (int32_t i = 0; i < model->layer_count; ++i)
            if (plora__pattern_matches(pattern, length, &model->layers[i])) {
                chosen[i] = 1;
                matched++;
            }
        PLORA_CHECK(matched > 0, PLORA_ERROR_NOT_FOUND, "%s: pattern '%.*s' matches none of the model's %d layers",
                    what, (int)length, pattern, model->layer_count);
        pattern += length;
    }
    return PLORA_OK;
}
