/* http.c: see http.h.
 *
 * libmicrohttpd bounds the headers (its memory for a connection), the number of connections and the time without a byte. It does not
 * bound how long a request may take to arrive when a byte comes now and then; `guard` does: it shuts down the socket of a connection
 * whose request is not whole in time, which its thread then sees as an end. */
#include "http.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netdb.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "utf8.h"
#include "util.h"

enum {
    HEADER_BYTES = 32 << 10,
    STACK_BYTES = 1 << 20,
    SEND_BYTES = 64 << 10,     /* on their way to a client: who does not read is soon seen not to */
    MOST_DISCARDED = 64 << 20, /* of a body that is too large: so far it is read, that the client may see the reply */
};

struct visit { /* a connection, in a list */
    struct visit *before, *after;
    int socket;
    double since; /* when its request began to arrive; 0 = it is whole */
};

struct http {
    struct server *server;
    const struct route *routes;
    struct MHD_Daemon *daemon;
    pthread_t guard;
    pthread_mutex_t lock; /* over the visits and `ending` */
    pthread_cond_t end;
    struct visit *visits;
    int ending, listening;
};

/* -------------------------------------------------------------------------------------------------------------- replies */

static enum MHD_Result queue(struct exchange *e, unsigned status, const char *type, struct MHD_Response *response)
{
    if (!response) return MHD_NO;
    MHD_add_response_header(response, MHD_HTTP_HEADER_CONTENT_TYPE, type);
    if (status == 503) MHD_add_response_header(response, MHD_HTTP_HEADER_RETRY_AFTER, "1");
    if (status == 413) MHD_add_response_header(response, MHD_HTTP_HEADER_CONNECTION, "close");
    const enum MHD_Result result = MHD_queue_response(e->connection, status, response);
    MHD_destroy_response(response);
    metrics_reply(e->server->metrics, status);
    return result;
}

enum MHD_Result exchange_reply(struct exchange *e, unsigned status, const char *type, struct buffer *body)
{
    if (body->failed) {
        free(body->data);
        static char message[] = "{\"error\": {\"message\": \"out of memory\", \"type\": \"server_error\", \"param\": "
                                "null, \"code\": 500}}\n";
        return queue(e, 500, "application/json",
                     MHD_create_response_from_buffer(sizeof message - 1, message, MHD_RESPMEM_PERSISTENT));
    }
    return queue(e, status, type, MHD_create_response_from_buffer(body->size, body->data, MHD_RESPMEM_MUST_FREE));
}

enum MHD_Result exchange_refuse(struct exchange *e, unsigned status, const char *param, const char *format, ...)
{
    char message[1024];
    va_list list;
    va_start(list, format);
    vsnprintf(message, sizeof message, format, list);
    va_end(list);
    /* A message may quote what was sent, cut anywhere: what is not UTF-8 in it becomes '?'. */
    size_t size = strlen(message), bad;
    while (!utf8_valid(message, size, &bad))
        message[bad] = '?';
    struct buffer body = {0};
    buffer_add(&body, "{\"error\": {\"message\": ", 22);
    buffer_json(&body, message, size);
    buffer_print(&body, ", \"type\": \"%s\", \"param\": ",
                 status >= 500   ? "server_error"
                 : status == 404 ? "not_found_error"
                                 : "invalid_request_error");
    if (param)
        buffer_json(&body, param, strlen(param));
    else
        buffer_add(&body, "null", 4);
    buffer_print(&body, ", \"code\": %u}}\n", status);
    return exchange_reply(e, status, "application/json", &body);
}

enum MHD_Result exchange_stream(struct exchange *e, ssize_t (*next)(void *user, uint64_t at, char *out, size_t size),
                                void (*end)(void *user), void *user)
{
    struct MHD_Response *response = MHD_create_response_from_callback(MHD_SIZE_UNKNOWN, 4096, next, user, end);
    if (!response) {
        end(user);
        return MHD_NO;
    }
    MHD_add_response_header(response, MHD_HTTP_HEADER_CACHE_CONTROL, "no-cache");
    return queue(e, 200, "text/event-stream; charset=utf-8", response);
}

int exchange_gone(int socket)
{
    struct pollfd look = {.fd = socket, .events = POLLRDHUP};
    return poll(&look, 1, 0) > 0 && (look.revents & (POLLRDHUP | POLLHUP | POLLERR | POLLNVAL));
}

int exchange_socket(const struct exchange *e)
{
    const union MHD_ConnectionInfo *info = MHD_get_connection_info(e->connection, MHD_CONNECTION_INFO_CONNECTION_FD);
    return info ? (int)info->connect_fd : -1;
}

/* ------------------------------------------------------------------------------------------------------------- requests */

static const char *header(const struct exchange *e, const char *name)
{
    return MHD_lookup_connection_value(e->connection, MHD_HEADER_KIND, name);
}

/* Whether the request says that its body is JSON. A page in a browser cannot say so to another site without being asked. */
static int says_json(const struct exchange *e)
{
    const char *type = header(e, MHD_HTTP_HEADER_CONTENT_TYPE), json[] = "application/json";
    return type && strncasecmp(type, json, sizeof json - 1) == 0 && strchr("; \t", type[sizeof json - 1]);
}

static enum MHD_Result dispatch(struct http *http, struct exchange *e, const char *method, const char *path)
{
    const size_t most = (size_t)e->server->options.max_body;
    const char *allowed = NULL;
    if (strcmp(method, "HEAD") == 0) method = "GET";
    if (e->discarded > 0) return exchange_refuse(e, 413, NULL, "the body exceeds %zu bytes", most);
    for (const struct route *route = http->routes; route->method; route++) {
        if (strcmp(route->path, path) != 0) continue;
        if (strcmp(route->method, method) == 0) {
            if (strcmp(method, "POST") == 0 && !says_json(e))
                return exchange_refuse(e, 415, NULL, "the Content-Type must be application/json");
            return route->handle(e);
        }
        allowed = route->method;
    }
    if (allowed) return exchange_refuse(e, 405, NULL, "%s takes %s, not %.20s", path, allowed, method);
    return exchange_refuse(e, 404, NULL, "there is nothing at %.200s", path);
}

/* The visit's request is whole (begun = 0), or its next one begins. */
static void clock_visit(struct http *http, struct exchange *e, int begun)
{
    const union MHD_ConnectionInfo *info = MHD_get_connection_info(e->connection, MHD_CONNECTION_INFO_SOCKET_CONTEXT);
    struct visit *visit = info ? info->socket_context : NULL;
    if (!visit) return;
    pthread_mutex_lock(&http->lock);
    visit->since = begun ? now() : 0;
    pthread_mutex_unlock(&http->lock);
}

static enum MHD_Result on_request(void *user, struct MHD_Connection *connection, const char *path, const char *method,
                                  const char *version, const char *data, size_t *size, void **state)
{
    struct http *http = user;
    struct exchange *e = *state;
    const size_t most = (size_t)http->server->options.max_body;
    (void)version;
    if (!e) { /* the headers have come */
        e = calloc(1, sizeof *e);
        if (!e) return MHD_NO;
        *state = e;
        e->server = http->server;
        e->connection = connection;
        const char *length = header(e, MHD_HTTP_HEADER_CONTENT_LENGTH);
        if (length && strtoull(length, NULL, 10) > MOST_DISCARDED)
            return exchange_refuse(e, 413, NULL, "the body, of %.30s bytes, exceeds %zu", length, most);
        return MHD_YES;
    }
    if (*size > 0) {
        if (e->discarded + e->body.size + *size > most) {
            e->discarded += *size;
            if (e->discarded > MOST_DISCARDED) return MHD_NO;
        } else
            buffer_add(&e->body, data, *size);
        *size = 0;
        return e->body.failed ? MHD_NO : MHD_YES;
    }
    clock_visit(http, e, 0);
    return dispatch(http, e, method, path);
}

static void on_completed(void *user, struct MHD_Connection *connection, void **state,
                         enum MHD_RequestTerminationCode how)
{
    struct exchange *e = *state;
    (void)connection;
    (void)how;
    if (!e) return;
    clock_visit(user, e, 1);
    free(e->body.data);
    free(e);
    *state = NULL;
}

/* ---------------------------------------------------------------------------------------------------------- connections */

static void on_connection(void *user, struct MHD_Connection *connection, void **context,
                          enum MHD_ConnectionNotificationCode what)
{
    struct http *http = user;
    struct visit *visit = *context;
    const union MHD_ConnectionInfo *info = MHD_get_connection_info(connection, MHD_CONNECTION_INFO_CONNECTION_FD);
    if (what == MHD_CONNECTION_NOTIFY_STARTED) {
        *context = visit = calloc(1, sizeof *visit);
        if (!visit) return;
        visit->socket = info ? (int)info->connect_fd : -1;
        visit->since = now();
        setsockopt(visit->socket, SOL_SOCKET, SO_SNDBUF, &(int){SEND_BYTES}, sizeof(int));
        pthread_mutex_lock(&http->lock);
        visit->after = http->visits;
        if (visit->after) visit->after->before = visit;
        http->visits = visit;
        pthread_mutex_unlock(&http->lock);
    } else if (visit) { /* the socket is not closed before this returns */
        pthread_mutex_lock(&http->lock);
        *(visit->before ? &visit->before->after : &http->visits) = visit->after;
        if (visit->after) visit->after->before = visit->before;
        pthread_mutex_unlock(&http->lock);
        free(visit);
        *context = NULL;
    }
}

static void *guard(void *argument)
{
    struct http *http = argument;
    const double most = (double)http->server->options.request_seconds;
    pthread_mutex_lock(&http->lock);
    while (!http->ending) {
        struct timespec until;
        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_nsec += 250000000;
        if (until.tv_nsec >= 1000000000) {
            until.tv_nsec -= 1000000000;
            until.tv_sec++;
        }
        pthread_cond_timedwait(&http->end, &http->lock, &until);
        for (struct visit *visit = http->visits; visit; visit = visit->after)
            if (visit->since > 0 && now() - visit->since > most) {
                shutdown(visit->socket, SHUT_RDWR);
                visit->since = 0;
            }
    }
    pthread_mutex_unlock(&http->lock);
    return NULL;
}

/* ----------------------------------------------------------------------------------------------------------------- life */

/* A socket that listens on the host's first address. */
static int listen_on(const struct options *options, int *listening)
{
    char port[16];
    snprintf(port, sizeof port, "%lld", (long long)options->port);
    struct addrinfo *found = NULL, hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE | AI_NUMERICSERV};
    const int error = getaddrinfo(options->host, port, &hints, &found);
    if (error) return fault("--host %s: %s", options->host, gai_strerror(error));
    const int s = socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0), on = 1;
    if (s >= 0) setsockopt(s, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    const int bad = s < 0 || bind(s, found->ai_addr, found->ai_addrlen) != 0 || listen(s, 511) != 0;
    freeaddrinfo(found);
    if (bad) {
        fault("cannot listen on %s port %s: %s", options->host, port, strerror(errno));
        if (s >= 0) close(s);
        return -1;
    }
    *listening = s;
    return 0;
}

int http_start(struct server *server, const struct route *routes, struct http **out)
{
    struct http *http;
    *out = NULL;
    TRY(memory_allocate(1, sizeof *http, "HTTP", &http));
    http->server = server;
    http->routes = routes;
    pthread_mutex_init(&http->lock, NULL);
    pthread_cond_init(&http->end, NULL);
    if (listen_on(&server->options, &http->listening) != 0) {
        free(http);
        return -1;
    }
    http->daemon = MHD_start_daemon(
        MHD_USE_INTERNAL_POLLING_THREAD | MHD_USE_THREAD_PER_CONNECTION | MHD_USE_POLL | MHD_USE_ITC, 0, NULL, NULL,
        on_request, http, MHD_OPTION_LISTEN_SOCKET, http->listening, MHD_OPTION_CONNECTION_LIMIT,
        (unsigned)server->options.connections, MHD_OPTION_CONNECTION_TIMEOUT, (unsigned)server->options.request_seconds,
        MHD_OPTION_CONNECTION_MEMORY_LIMIT, (size_t)HEADER_BYTES, MHD_OPTION_THREAD_STACK_SIZE, (size_t)STACK_BYTES,
        MHD_OPTION_NOTIFY_COMPLETED, on_completed, http, MHD_OPTION_NOTIFY_CONNECTION, on_connection, http,
        MHD_OPTION_END);
    if (!http->daemon || pthread_create(&http->guard, NULL, guard, http) != 0) {
        fault("the HTTP server does not start");
        if (http->daemon)
            MHD_stop_daemon(http->daemon);
        else
            close(http->listening);
        free(http);
        return -1;
    }
    *out = http;
    return 0;
}

int http_port(const struct http *http)
{
    union {
        struct sockaddr any;
        struct sockaddr_in in;
        struct sockaddr_in6 in6;
    } address;
    socklen_t size = sizeof address;
    memset(&address, 0, sizeof address);
    if (getsockname(http->listening, &address.any, &size) != 0) return 0;
    return ntohs(address.any.sa_family == AF_INET6 ? address.in6.sin6_port : address.in.sin_port);
}

void http_quiesce(struct http *http)
{
    const MHD_socket s = MHD_quiesce_daemon(http->daemon);
    if (s != MHD_INVALID_SOCKET) close(s);
}

void http_stop(struct http *http)
{
    if (!http) return;
    MHD_stop_daemon(http->daemon);
    pthread_mutex_lock(&http->lock);
    http->ending = 1;
    pthread_cond_signal(&http->end);
    pthread_mutex_unlock(&http->lock);
    pthread_join(http->guard, NULL);
    pthread_mutex_destroy(&http->lock);
    pthread_cond_destroy(&http->end);
    free(http);
}
