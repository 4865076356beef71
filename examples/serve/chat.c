/* chat.c: see chat.h. */
#include "chat.h"

#include <stdlib.h>
#include <string.h>

#include "util.h"

#define BEGIN "<|im_start|>"
#define END "<|im_end|>"

/* The text between the two in the template, a fresh string with \n as the template writes it; NULL when it has none. */
static char *system_of(const char *template)
{
    static const char begin[] = BEGIN "system\n";
    const char *from = template ? strstr(template, begin) : NULL, *to = from ? strstr(from, END) : NULL;
    if (!from || !to) return NULL;
    from += sizeof begin - 1;
    return memchr(from, '\'', (size_t)(to - from)) ? NULL : strndup(from, (size_t)(to - from));
}

int chat_open(const char *directory, struct server *server)
{
    server->turn_begin = tokenizer_find(server->tokenizer, BEGIN);
    server->turn_end = tokenizer_find(server->tokenizer, END);
    cJSON *root;
    json_read(directory, "tokenizer_config.json", &root); /* it may be missing */
    const cJSON *template = cJSON_GetObjectItemCaseSensitive(root, "chat_template");
    const char *written = cJSON_IsString(template) ? template->valuestring : NULL;
    if (!written || !strstr(written, BEGIN) || server->turn_end < 0) server->turn_begin = -1;
    server->system = system_of(written);
    cJSON_Delete(root);
    return 0;
}

static int add_text(const struct server *server, const char *text, struct tokens *out)
{
    return tokenizer_encode(server->tokenizer, text, strlen(text), 0, out);
}

static int add_message(const struct server *server, const char *role, const char *content, struct tokens *out)
{
    char *text = NULL;
    TRY(tokens_append(out, server->turn_begin));
    if (asprintf(&text, "%s\n%s", role, content) < 0) return fault("out of memory: a message");
    const int result = add_text(server, text, out);
    free(text);
    TRY(result);
    TRY(tokens_append(out, server->turn_end));
    return add_text(server, "\n", out);
}

/* The content of a message: a string, or a list of parts of which all are text. A fresh string, or NULL. */
static char *content_of(const cJSON *message)
{
    const cJSON *content = cJSON_GetObjectItemCaseSensitive(message, "content"), *part;
    if (cJSON_IsString(content)) return strdup(content->valuestring);
    struct buffer all = {0};
    buffer_add(&all, "", 0);
    cJSON_ArrayForEach(part, content)
    {
        const cJSON *type = cJSON_GetObjectItemCaseSensitive(part, "type"),
                    *text = cJSON_GetObjectItemCaseSensitive(part, "text");
        if (!cJSON_IsString(type) || strcmp(type->valuestring, "text") != 0 || !cJSON_IsString(text)) all.failed = 1;
        if (!all.failed) buffer_add(&all, text->valuestring, strlen(text->valuestring));
    }
    if (cJSON_IsArray(content) && !all.failed) return all.data;
    free(all.data);
    return NULL;
}

int chat_encode(struct request *r, struct tokens *out)
{
    const struct server *server = r->exchange->server;
    const cJSON *messages = request_item(r, "messages"), *message;
    if (server->turn_begin < 0)
        return request_wrong(r, 400, NULL,
                             "this model has no chat template in the form of ChatML: use /v1/completions");
    if (!cJSON_IsArray(messages) || !messages->child)
        return request_wrong(r, 400, "messages", "messages must be a list that is not empty");
    int first = 1, failed = 0;
    cJSON_ArrayForEach(message, messages)
    {
        const cJSON *role = cJSON_GetObjectItemCaseSensitive(message, "role");
        const char *name = cJSON_IsString(role) ? role->valuestring : "";
        if (strcmp(name, "system") != 0 && strcmp(name, "user") != 0 && strcmp(name, "assistant") != 0)
            return request_wrong(r, 400, "messages", "the role of a message must be system, user or assistant");
        char *content = content_of(message);
        if (!content)
            return request_wrong(r, 400, "messages",
                                 "the content of a message must be a string, or a list of text parts");
        if (first && strcmp(name, "system") != 0 && server->system)
            failed |= add_message(server, "system", server->system, out);
        failed |= add_message(server, name, content, out);
        free(content);
        first = 0;
    }
    failed |= tokens_append(out, server->turn_begin) | add_text(server, "assistant\n", out);
    return failed ? request_wrong(r, 500, NULL, "%s", failure()) : 0;
}
