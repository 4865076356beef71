/* arguments.h: a command line "--name value", "--name=value" or "--flag", from a table. The value of each option goes into a field of a
 * struct of the program's: const char * (TEXT), int64_t (INTEGER, FLAG, CHOICE: the number of the choice) or double (NUMBER). */
#ifndef FINETUNE_ARGUMENTS_H
#define FINETUNE_ARGUMENTS_H

#include <stddef.h>
#include <stdio.h>

enum argument_kind { TEXT, INTEGER, NUMBER, FLAG, CHOICE };

struct argument {
    const char *name;
    enum argument_kind kind;
    size_t offset;       /* of the field */
    double least, most;  /* of numbers */
    const char *choices; /* "a|b|c" */
    int fixed;           /* must not change when a run is resumed */
    const char *help;
};

struct arguments {
    const char *usage; /* what --help begins with */
    int width;         /* of the names there */
    int count;
    const struct argument *list;
};

/* 0, or -1 with the reason in failure(); *options has the defaults. */
int arguments_parse(const struct arguments *arguments, int count, char **words, void *options);
void arguments_help(const struct arguments *arguments, const void *defaults, FILE *stream);
/* The value of a CHOICE as a fresh string. */
char *argument_choice(const struct argument *argument, const void *options);

static inline const void *argument_value(const struct argument *argument, const void *options)
{
    return (const char *)options + argument->offset;
}

#endif
