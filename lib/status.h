/* status.h: error codes with a message, and the macros that keep function bodies straight lines.
 *
 * A failing call leaves a message in a fixed thread-local buffer (plora_last_error) and returns the code. Messages give the
 * values: "rank 64 exceeds min(K=32, N=128)". Nothing here allocates, prints or exits. */
#ifndef PLORA_STATUS_H
#define PLORA_STATUS_H

#include "plora.h"

/* Stores the message and returns `status`. */
plora_status plora__fail(plora_status status, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Puts "context: " in front of the stored message, e.g. the path of the file a parser failed in; returns `status`. */
plora_status plora__fail_in(plora_status status, const char *context);

/* Returns from the function when the condition does not hold. The constant is returned rather than plora__fail()'s result, so
 * that static analysis sees that it is not PLORA_OK. */
#define PLORA_CHECK(condition, status, ...)                                                                            \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            plora__fail((status), __VA_ARGS__);                                                                        \
            return (status);                                                                                           \
        }                                                                                                              \
    } while (0)

/* Returns a failing status to the caller. */
#define PLORA_TRY(expression)                                                                                          \
    do {                                                                                                               \
        const plora_status plora_try_ = (expression);                                                                  \
        if (plora_try_ != PLORA_OK) return plora_try_;                                                                 \
    } while (0)

/* The same two where something must be released first: they set the local `status` and go to `out`. */
#define PLORA_CHECK_OUT(condition, code, ...)                                                                          \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            plora__fail((code), __VA_ARGS__);                                                                          \
            status = (code);                                                                                           \
            goto out;                                                                                                  \
        }                                                                                                              \
    } while (0)

#define PLORA_TRY_OUT(expression)                                                                                      \
    do {                                                                                                               \
        status = (expression);                                                                                         \
        if (status != PLORA_OK) goto out;                                                                              \
    } while (0)

/* Copies a caller's option struct (led by size_t struct_size) over *options, which holds the defaults in the layout of this
 * version. A shorter struct leaves the defaults at the end; a longer one must be zero beyond `size`; NULL changes nothing. */
plora_status plora__read_options(void *options, size_t size, const void *source, const char *type_name);

/* Copies as much of a result struct as the caller's struct_size has room for, and keeps that struct_size. */
plora_status plora__write_result(void *destination, const void *result, size_t size, const char *type_name);

#endif
