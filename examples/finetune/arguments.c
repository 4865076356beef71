/* arguments.c: see arguments.h. */
#include "arguments.h"

#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "util.h"

/* The n-th of "a|b|c" as a fresh string, NULL when there are fewer. */
static char *nth_choice(const char *choices, int64_t n)
{
    for (; n > 0 && choices; n--) {
        choices = strchr(choices, '|');
        if (choices) choices++;
    }
    return choices ? strndup(choices, strcspn(choices, "|")) : NULL;
}

static int64_t find_choice(const char *choices, const char *value)
{
    char *choice;
    for (int64_t i = 0; (choice = nth_choice(choices, i)); i++) {
        const int same = strcmp(choice, value) == 0;
        free(choice);
        if (same) return i;
    }
    return -1;
}

char *argument_choice(const struct argument *argument, const void *options)
{
    return nth_choice(argument->choices, *(const int64_t *)argument_value(argument, options));
}

static int set_value(const struct argument *argument, const char *value, void *target)
{
    char *end;
    errno = 0;
    if (argument->kind == TEXT) {
        *(const char **)target = value;
        return *value ? 0 : fault("--%s needs a value", argument->name);
    }
    if (argument->kind == CHOICE) {
        const int64_t found = find_choice(argument->choices, value);
        if (found < 0) return fault("--%s '%s': must be one of %s", argument->name, value, argument->choices);
        *(int64_t *)target = found;
        return 0;
    }
    if (argument->kind == INTEGER) {
        const long long number = strtoll(value, &end, 10);
        if (*value == '\0' || *end != '\0' || errno ||
            !((double)number >= argument->least && (double)number <= argument->most))
            return fault("--%s '%s': must be an integer in [%.0f, %.0f]", argument->name, value, argument->least,
                         argument->most);
        *(int64_t *)target = number;
        return 0;
    }
    const double number = strtod(value, &end);
    if (*value == '\0' || *end != '\0' || !(number >= argument->least && number <= argument->most))
        return fault("--%s '%s': must be a number in [%g, %g]", argument->name, value, argument->least, argument->most);
    *(double *)target = number;
    return 0;
}

static const struct argument *find(const struct arguments *arguments, const char *word, size_t length)
{
    for (int i = 0; i < arguments->count && length > 2 && strncmp(word, "--", 2) == 0; i++) {
        const char *name = arguments->list[i].name;
        if (strlen(name) == length - 2 && memcmp(name, word + 2, length - 2) == 0) return &arguments->list[i];
    }
    return NULL;
}

int arguments_parse(const struct arguments *arguments, int count, char **words, void *options)
{
    for (int i = 1; i < count; i++) {
        const char *word = words[i], *value = strchr(word, '=');
        const struct argument *argument = find(arguments, word, value ? (size_t)(value - word) : strlen(word));
        if (!argument) return fault("unknown argument '%s' (see --help)", word);
        void *target = (char *)options + argument->offset;
        if (argument->kind == FLAG) {
            if (value) return fault("--%s takes no value", argument->name);
            *(int64_t *)target = 1;
            continue;
        }
        if (value)
            value++;
        else if (++i < count)
            value = words[i];
        else
            return fault("--%s needs a value", argument->name);
        TRY(set_value(argument, value, target));
    }
    return 0;
}

void arguments_help(const struct arguments *arguments, const void *defaults, FILE *stream)
{
    fputs(arguments->usage, stream);
    for (int i = 0; i < arguments->count; i++) {
        const struct argument *argument = &arguments->list[i];
        const void *value = argument_value(argument, defaults);
        fprintf(stream, "  --%-*s %s", arguments->width, argument->name, argument->help);
        if (argument->kind == CHOICE) {
            char *choice = argument_choice(argument, defaults);
            fprintf(stream, ": %s [%s]", argument->choices, choice ? choice : "");
            free(choice);
        } else if (argument->kind == INTEGER)
            fprintf(stream, " [%lld]", (long long)*(const int64_t *)value);
        else if (argument->kind == NUMBER)
            fprintf(stream, " [%g]", *(const double *)value);
        fputc('\n', stream);
    }
}
