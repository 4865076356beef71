/* api.h: the paths of the server and what answers at each. */
#ifndef SERVE_API_H
#define SERVE_API_H

#include "http.h"

extern const struct route API[];

#endif
