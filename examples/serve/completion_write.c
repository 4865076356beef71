/* completion_write.c: answers in the form of OpenAI's API. A stream is a list of events, `data: {...}`, that ends with `data: [DONE]`. */
#include <string.h>

#include "completion.h"

static void string(struct buffer *out, const char *text)
{
    buffer_json(out, text, strlen(text));
}

static const char *reason(enum finish finish)
{
    return finish == JOB_STOP ? "\"stop\"" : finish == JOB_LENGTH ? "\"length\"" : "null";
}

static void write_head(const struct completion *c, const char *object, struct buffer *out)
{
    buffer_print(out, "{\"id\": \"%s\", \"object\": \"%s\", \"created\": %lld, \"model\": ", c->id, object,
                 (long long)c->created);
    string(out, c->model);
}

static void write_usage(const struct completion *c, struct buffer *out)
{
    int64_t prompt = 0, generated = 0;
    for (int64_t i = 0; i < c->count; i++) {
        prompt += c->jobs[i].prompt.count;
        generated += c->jobs[i].generated;
    }
    const int64_t total = prompt + generated;
    buffer_print(out, "\"usage\": {\"prompt_tokens\": %lld, \"completion_tokens\": %lld, \"total_tokens\": %lld}",
                 (long long)prompt, (long long)generated, (long long)total);
}

void completion_write(const struct completion *c, struct buffer *out)
{
    write_head(c, c->chat ? "chat.completion" : "text_completion", out);
    buffer_print(out, ", \"choices\": [");
    for (int64_t i = 0; i < c->count; i++) {
        const struct text *text = &c->jobs[i].text;
        buffer_print(out, "%s{\"index\": %lld, %s", i ? ", " : "", (long long)i,
                     c->chat ? "\"message\": {\"role\": \"assistant\", \"content\": " : "\"text\": ");
        buffer_json(out, text->data ? text->data : "", text->ready);
        buffer_print(out, "%s, \"logprobs\": null, \"finish_reason\": %s}", c->chat ? "}" : "",
                     reason(c->jobs[i].finish));
    }
    buffer_print(out, "], ");
    write_usage(c, out);
    buffer_print(out, "}\n");
}

/* An event with one choice; its text may be empty. */
static void write_event(struct completion *c, int64_t i, const char *text, size_t size, const char *why,
                        struct buffer *out)
{
    buffer_print(out, "data: ");
    write_head(c, c->chat ? "chat.completion.chunk" : "text_completion", out);
    buffer_print(out, ", \"choices\": [{\"index\": %lld, ", (long long)i);
    if (!c->chat) {
        buffer_print(out, "\"text\": ");
        buffer_json(out, text, size);
    } else if (size > 0) {
        buffer_print(out, "\"delta\": {\"content\": ");
        buffer_json(out, text, size);
        buffer_print(out, "}");
    } else
        buffer_print(out, "\"delta\": {}");
    buffer_print(out, ", \"logprobs\": null, \"finish_reason\": %s}]%s}\n\n", why, c->usage ? ", \"usage\": null" : "");
}

static void write_role(struct completion *c, struct buffer *out)
{
    buffer_print(out, "data: ");
    write_head(c, "chat.completion.chunk", out);
    buffer_print(out,
                 ", \"choices\": [{\"index\": 0, \"delta\": {\"role\": \"assistant\", \"content\": \"\"}, "
                 "\"logprobs\": null, \"finish_reason\": null}]%s}\n\n",
                 c->usage ? ", \"usage\": null" : "");
}

static void write_failure(const struct completion *c, const struct job *job, struct buffer *out)
{
    buffer_print(out, "data: {\"error\": {\"message\": ");
    string(out, job->finish == JOB_FAILED ? job->failure
                : c->late                 ? "the answer was not ready in time"
                                          : "the server is ending");
    buffer_print(out, ", \"type\": \"server_error\", \"param\": null, \"code\": %d}}\n\n",
                 job->finish == JOB_FAILED ? 500
                 : c->late                 ? 504
                                           : 503);
}

int completion_write_events(struct completion *c, struct buffer *out)
{
    int64_t ended = 0, failed = 0;
    if (c->chat && !c->role_sent) {
        write_role(c, out);
        c->role_sent = 1;
    }
    for (int64_t i = 0; i < c->count; i++) {
        const struct job *job = &c->jobs[i];
        struct progress *p = &c->progress[i];
        if (job->text.ready > p->sent)
            write_event(c, i, job->text.data + p->sent, job->text.ready - p->sent, "null", out);
        if (job->text.ready > p->sent) p->sent = job->text.ready;
        if (job->finish != JOB_RUNNING && !p->ended) {
            p->ended = 1;
            if (job->finish >= JOB_CANCELLED)
                write_failure(c, job, out);
            else
                write_event(c, i, "", 0, reason(job->finish), out);
        }
        ended += p->ended;
        failed += job->finish >= JOB_CANCELLED;
    }
    if (ended < c->count) return 0;
    if (c->usage && !failed) {
        buffer_print(out, "data: ");
        write_head(c, c->chat ? "chat.completion.chunk" : "text_completion", out);
        buffer_print(out, ", \"choices\": [], ");
        write_usage(c, out);
        buffer_print(out, "}\n\n");
    }
    buffer_print(out, "data: [DONE]\n\n");
    return 1;
}
