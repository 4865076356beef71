/* http.h: requests and replies over libmicrohttpd, one thread a connection.
 *
 *     connection -> headers, body, both bounded in size and time -> route -> handler -> reply, or a stream of events
 *
 * A handler runs on its connection's thread and may wait; what it answers with goes through exchange_reply(), _refuse() or
 * _stream(), exactly one of them. */
#ifndef SERVE_HTTP_H
#define SERVE_HTTP_H

#include <microhttpd.h>
#include <sys/types.h>

#include "buffer.h"
#include "server.h"

struct exchange {
    struct server *server;
    struct MHD_Connection *connection;
    struct buffer body;
    size_t discarded; /* bytes of a body that was too large */
};

typedef enum MHD_Result (*handler)(struct exchange *exchange);

struct route {
    const char *method, *path;
    handler handle;
};

/* Replies with the body, which it takes. */
enum MHD_Result exchange_reply(struct exchange *exchange, unsigned status, const char *type, struct buffer *body);
/* Replies with {"error": {"message", "type", "param", "code"}}; param may be NULL. */
enum MHD_Result exchange_refuse(struct exchange *exchange, unsigned status, const char *param, const char *format, ...)
    __attribute__((format(printf, 4, 5)));
/* Replies with events as next() makes them: bytes into out[0 .. size), or -1 for the end. end() is called in any case. */
enum MHD_Result exchange_stream(struct exchange *exchange,
                                ssize_t (*next)(void *user, uint64_t at, char *out, size_t size),
                                void (*end)(void *user), void *user);
/* Whether the client has gone, or has closed its side. */
int exchange_gone(int socket);
int exchange_socket(const struct exchange *exchange);

struct http;

/* routes end with a NULL method. */
int http_start(struct server *server, const struct route *routes, struct http **out);
int http_port(const struct http *http);
/* Takes no more connections. */
void http_quiesce(struct http *http);
void http_stop(struct http *http);

#endif
