/* api.c: see api.h. Completions are in completion.c; the rest is short. */
#include "api.h"

#include <stdlib.h>
#include <string.h>

#include "completion.h"
#include "request.h"
#include "util.h"

static enum MHD_Result text_completion(struct exchange *e)
{
    struct completion *c;
    const enum MHD_Result result = completion_read(e, 0, &c);
    return c ? completion_answer(e, c) : result;
}

static enum MHD_Result chat_completion(struct exchange *e)
{
    struct completion *c;
    const enum MHD_Result result = completion_read(e, 1, &c);
    return c ? completion_answer(e, c) : result;
}

static enum MHD_Result health(struct exchange *e)
{
    struct buffer body = {0};
    if (atomic_load(&e->server->draining)) return exchange_refuse(e, 503, NULL, "the server is ending");
    buffer_print(&body, "{\"status\": \"ok\"}\n");
    return exchange_reply(e, 200, "application/json", &body);
}

static enum MHD_Result metrics(struct exchange *e)
{
    struct buffer body = {0};
    const plora_registry_statistics adapters = adapters_statistics(e->server->adapters);
    metrics_set(e->server->metrics, GAUGE_ADAPTERS, adapters.names);
    metrics_set(e->server->metrics, GAUGE_ADAPTER_BYTES, adapters.resident_bytes);
    metrics_set(e->server->metrics, GAUGE_EVICTED, adapters.evicted);
    metrics_set(e->server->metrics, GAUGE_RESTORED, adapters.restored);
    metrics_report(e->server->metrics, &body);
    return exchange_reply(e, 200, "text/plain; version=0.0.4; charset=utf-8", &body);
}

static enum MHD_Result models(struct exchange *e)
{
    struct buffer body = {0};
    const struct server *s = e->server;
    buffer_print(&body, "{\"object\": \"list\", \"data\": [{\"id\": ");
    buffer_json(&body, s->name, strlen(s->name));
    buffer_print(&body,
                 ", \"object\": \"model\", \"created\": %lld, \"owned_by\": \"libplora\", \"parent\": null, "
                 "\"max_model_len\": %lld}",
                 (long long)s->created, (long long)s->options.context);
    adapters_list(s->adapters, s->name, &body);
    buffer_print(&body, "]}\n");
    return exchange_reply(e, 200, "application/json", &body);
}

/* ------------------------------------------------------------------------------------------------------------- adapters */

static int read_name(struct request *r, const char **name)
{
    if (request_text(r, "lora_name", name) != 0) return -1;
    if (!*name) return request_wrong(r, 400, "lora_name", "lora_name is missing");
    if (!adapters_name_valid(*name))
        return request_wrong(r, 400, "lora_name",
                             "lora_name must be 1 to 64 of A-Z a-z 0-9 . _ - and not begin with a dot");
    if (strcmp(*name, r->exchange->server->name) == 0)
        return request_wrong(r, 400, "lora_name", "'%s' is the name of the model itself", *name);
    return 0;
}

static enum MHD_Result load(struct exchange *e)
{
    static const char *const members[] = {"lora_name", "lora_path", NULL};
    struct request r;
    const char *name = NULL, *path = NULL;
    int64_t version;
    if (request_open(e, members, &r) == 0 && read_name(&r, &name) == 0 && request_text(&r, "lora_path", &path) == 0) {
        const unsigned status = adapters_load(e->server->adapters, name, path ? path : name, &version);
        if (status)
            request_wrong(&r, status, "lora_path", "%s", failure());
        else {
            struct buffer body = {0};
            metrics_add(e->server->metrics, COUNT_LOADS, 1);
            buffer_print(&body, "{\"lora_name\": \"%s\", \"version\": %lld, \"message\": \"'%s' is loaded\"}\n", name,
                         (long long)version, name);
            r.result = exchange_reply(e, 200, "application/json", &body);
        }
    }
    request_close(&r);
    return r.result;
}

static enum MHD_Result unload(struct exchange *e)
{
    static const char *const members[] = {"lora_name", NULL};
    struct request r;
    const char *name = NULL;
    if (request_open(e, members, &r) == 0 && read_name(&r, &name) == 0) {
        const unsigned status = adapters_unload(e->server->adapters, name);
        if (status)
            request_wrong(&r, status, "lora_name", "%s", failure());
        else {
            struct buffer body = {0};
            metrics_add(e->server->metrics, COUNT_UNLOADS, 1);
            buffer_print(&body, "{\"lora_name\": \"%s\", \"message\": \"'%s' is unloaded\"}\n", name, name);
            r.result = exchange_reply(e, 200, "application/json", &body);
        }
    }
    request_close(&r);
    return r.result;
}

/* --------------------------------------------------------------------------------------------------------------- tokens */

static enum MHD_Result tokenize(struct exchange *e)
{
    static const char *const members[] = {"model", "prompt", "add_special_tokens", NULL};
    struct request r;
    struct tokens tokens = {0};
    const char *text = NULL;
    if (request_open(e, members, &r) == 0 && request_text(&r, "prompt", &text) == 0) {
        if (!text)
            request_wrong(&r, 400, "prompt", "prompt is missing");
        else if (tokenizer_encode(e->server->tokenizer, text, strlen(text), 1, &tokens) != 0)
            request_wrong(&r, 500, NULL, "%s", failure());
        else {
            struct buffer body = {0};
            buffer_print(&body, "{\"count\": %lld, \"max_model_len\": %lld, \"tokens\": [", (long long)tokens.count,
                         (long long)e->server->options.context);
            for (int64_t i = 0; i < tokens.count; i++)
                buffer_print(&body, "%s%d", i ? ", " : "", (int)tokens.ids[i]);
            buffer_print(&body, "]}\n");
            r.result = exchange_reply(e, 200, "application/json", &body);
        }
    }
    free(tokens.ids);
    request_close(&r);
    return r.result;
}

static enum MHD_Result detokenize(struct exchange *e)
{
    static const char *const members[] = {"model", "tokens", NULL};
    struct request r;
    struct text text = {0};
    if (request_open(e, members, &r) == 0) {
        const cJSON *list = request_item(&r, "tokens"), *item;
        int bad = !cJSON_IsArray(list);
        cJSON_ArrayForEach(item, list)
        {
            size_t size;
            bad |= !cJSON_IsNumber(item) || !(item->valuedouble >= 0 && item->valuedouble < 0x1p31);
            if (bad || tokenizer_is_special(e->server->tokenizer, (int32_t)item->valuedouble)) continue;
            const char *bytes = tokenizer_bytes(e->server->tokenizer, (int32_t)item->valuedouble, &size);
            if (text_append(&text, bytes, size) != 0) bad = 1;
        }
        if (bad || text_end(&text) != 0)
            request_wrong(&r, 400, "tokens", "tokens must be a list of integers that are not negative");
        else {
            struct buffer body = {0};
            buffer_print(&body, "{\"prompt\": ");
            buffer_json(&body, text.data ? text.data : "", text.ready);
            buffer_print(&body, "}\n");
            r.result = exchange_reply(e, 200, "application/json", &body);
        }
    }
    text_free(&text);
    request_close(&r);
    return r.result;
}

const struct route API[] = {{"POST", "/v1/completions", text_completion},
                            {"POST", "/v1/chat/completions", chat_completion},
                            {"GET", "/v1/models", models},
                            {"POST", "/v1/load_lora_adapter", load},
                            {"POST", "/v1/unload_lora_adapter", unload},
                            {"POST", "/tokenize", tokenize},
                            {"POST", "/detokenize", detokenize},
                            {"GET", "/health", health},
                            {"GET", "/metrics", metrics},
                            {NULL, NULL, NULL}};
