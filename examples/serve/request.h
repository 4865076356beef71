/* request.h: values of a JSON body, checked. A reader that meets something wrong refuses the request by name and returns -1; `result` then
 * is that of the refusal. What is absent or null leaves the value as it is. */
#ifndef SERVE_REQUEST_H
#define SERVE_REQUEST_H

#include <cjson/cJSON.h>

#include "http.h"

struct request {
    struct exchange *exchange;
    cJSON *root;
    enum MHD_Result result;
};

/* The body, which must be one JSON object with no other members than the known ones, a list that ends with NULL. */
int request_open(struct exchange *exchange, const char *const *known, struct request *request);
void request_close(struct request *request);

int request_wrong(struct request *request, unsigned status, const char *param, const char *format, ...)
    __attribute__((format(printf, 4, 5)));

const cJSON *request_item(const struct request *request, const char *name); /* NULL: absent or null */
int request_text(struct request *request, const char *name, const char **value);
int request_number(struct request *request, const char *name, double least, double most, double *value);
int request_integer(struct request *request, const char *name, int64_t least, int64_t most, int64_t *value);
int request_flag(struct request *request, const char *name, int *value);

#endif
