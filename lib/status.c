/* status.c: the thread-local error message, and the size rules of public structs (see status.h). */
#include "status.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

enum { MESSAGE_BYTES = 1024, STRUCT_BYTES_MAX = 4096 };

static _Thread_local char message[MESSAGE_BYTES];

plora_status plora__fail(plora_status status, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    return status;
}

plora_status plora__fail_in(plora_status status, const char *context)
{
    char inner[MESSAGE_BYTES];
    memcpy(inner, message, sizeof inner);
    return plora__fail(status, "%.400s: %.600s", context, inner);
}

const char *plora_last_error(void)
{
    return message;
}

size_t plora_last_error_copy(char *buffer, size_t capacity)
{
    const size_t length = strlen(message);
    if (buffer != NULL && capacity > 0) {
        const size_t copied = length < capacity ? length : capacity - 1;
        memcpy(buffer, message, copied);
        buffer[copied] = '\0';
    }
    return length;
}

const char *plora_status_string(plora_status status)
{
    switch (status) {
#define STATUS_TEXT(name, value, text)                                                                                 \
    case name: return text;
        PLORA_STATUS_LIST(STATUS_TEXT)
#undef STATUS_TEXT
    default: return "unknown status";
    }
}

plora_status plora__read_options(void *options, size_t size, const void *source, const char *type_name)
{
    if (source == NULL) return PLORA_OK;
    size_t given;
    memcpy(&given, source, sizeof given);
    PLORA_CHECK(given >= sizeof given && given <= STRUCT_BYTES_MAX, PLORA_ERROR_INVALID_ARGUMENT,
                "%s.struct_size is %zu: initialise the struct with its _INIT macro", type_name, given);
    const unsigned char *bytes = source;
    for (size_t i = size; i < given; ++i)
        PLORA_CHECK(bytes[i] == 0, PLORA_ERROR_UNSUPPORTED,
                    "%s has a field at byte %zu that this version of the library (%s) does not know", type_name, i,
                    plora_version());
    memcpy(options, source, given < size ? given : size);
    memcpy(options, &size, sizeof size);
    return PLORA_OK;
}

plora_status plora__write_result(void *destination, const void *result, size_t size, const char *type_name)
{
    PLORA_CHECK(destination != NULL, PLORA_ERROR_INVALID_ARGUMENT, "%s is NULL", type_name);
    size_t given;
    memcpy(&given, destination, sizeof given);
    PLORA_CHECK(given >= sizeof given && given <= STRUCT_BYTES_MAX, PLORA_ERROR_INVALID_ARGUMENT,
                "%s.struct_size is %zu: initialise the struct with its _INIT macro", type_name, given);
    memcpy(destination, result, given < size ? given : size);
    memcpy(destination, &given, sizeof given);
    return PLORA_OK;
}
