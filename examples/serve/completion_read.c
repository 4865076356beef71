/* completion_read.c: the JSON of /v1/completions and /v1/chat/completions -> struct completion. Parameters of OpenAI's API that this
 * server does not have are taken with the value that makes no difference, and refused with any other: silence would be a lie. */
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

#include "chat.h"
#include "completion.h"
#include "request.h"
#include "util.h"

#define COMMON                                                                                                         \
    "model", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "stream_options", "ignore_eos", "n",      \
        "user", "logprobs", "frequency_penalty", "presence_penalty", "logit_bias"

static const char *const TEXT_MEMBERS[] = {COMMON, "prompt", "best_of", "echo", "suffix", NULL};
static const char *const CHAT_MEMBERS[] = {COMMON, "messages", "max_completion_tokens", NULL};

static int check_neutral(struct request *r)
{
    static const struct {
        const char *name;
        double neutral;
    } numbers[] = {{"n", 1}, {"best_of", 1}, {"frequency_penalty", 0}, {"presence_penalty", 0}};
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        const cJSON *item = request_item(r, numbers[i].name);
        if (item && !(cJSON_IsNumber(item) && item->valuedouble == numbers[i].neutral))
            return request_wrong(r, 400, numbers[i].name, "%s is not supported: it can only be %g", numbers[i].name,
                                 numbers[i].neutral);
    }
    static const char *const flags[] = {"echo", "logprobs"};
    for (size_t i = 0; i < sizeof flags / sizeof *flags; i++) {
        const cJSON *item = request_item(r, flags[i]);
        if (item && !cJSON_IsFalse(item)) return request_wrong(r, 400, flags[i], "%s is not supported", flags[i]);
    }
    const cJSON *bias = request_item(r, "logit_bias"), *suffix = request_item(r, "suffix");
    if (bias && !(cJSON_IsObject(bias) && !bias->child))
        return request_wrong(r, 400, "logit_bias", "logit_bias is not supported");
    return suffix ? request_wrong(r, 400, "suffix", "suffix is not supported") : 0;
}

/* -------------------------------------------------------------------------------------------------------------- prompts */

static int out_of_memory(struct request *r)
{
    return request_wrong(r, 500, NULL, "%s", failure());
}

static int read_text(struct request *r, const char *text, struct job *job)
{
    if (tokenizer_encode(r->exchange->server->tokenizer, text, strlen(text), 1, &job->prompt) != 0)
        return out_of_memory(r);
    return 0;
}

static int read_ids(struct request *r, const cJSON *list, struct job *job)
{
    const double vocabulary = (double)model_configuration(r->exchange->server->model)->vocabulary;
    const cJSON *item;
    cJSON_ArrayForEach(item, list)
    {
        if (!cJSON_IsNumber(item) || !(item->valuedouble >= 0 && item->valuedouble < vocabulary) ||
            item->valuedouble != (double)(int32_t)item->valuedouble)
            return request_wrong(r, 400, "prompt", "a token of the prompt must be an integer in [0, %.0f)", vocabulary);
        if (tokens_append(&job->prompt, (int32_t)item->valuedouble) != 0) return out_of_memory(r);
    }
    return 0;
}

static int allocate_jobs(struct request *r, struct completion *c, int64_t count)
{
    if (memory_allocate((size_t)count, sizeof *c->jobs, "jobs", &c->jobs) != 0 ||
        memory_allocate((size_t)count, sizeof *c->progress, "jobs", &c->progress) != 0)
        return out_of_memory(r);
    c->count = count;
    for (int64_t i = 0; i < count; i++) {
        c->jobs[i].owner = &c->owner;
        c->jobs[i].adapter = c->adapter;
    }
    return 0;
}

/* A string, a list of strings, a list of token ids, or a list of such lists. */
static int read_prompts(struct request *r, struct completion *c)
{
    const cJSON *prompt = request_item(r, "prompt"), *first = cJSON_IsArray(prompt) ? prompt->child : NULL;
    if (!prompt) return request_wrong(r, 400, "prompt", "prompt is missing");
    const int single = cJSON_IsString(prompt) || cJSON_IsNumber(first);
    if (!single && !cJSON_IsString(first) && !cJSON_IsArray(first))
        return request_wrong(r, 400, "prompt", "prompt must be a string, a list of strings, or a list of tokens");
    const int64_t count = single ? 1 : cJSON_GetArraySize(prompt);
    if (count > MOST_PROMPTS)
        return request_wrong(r, 400, "prompt", "%lld prompts exceed %d", (long long)count, MOST_PROMPTS);
    if (allocate_jobs(r, c, count) != 0) return -1;
    const cJSON *item = single ? prompt : first;
    for (int64_t i = 0; i < count && item; i++, item = item->next) {
        if (cJSON_IsString(item) ? read_text(r, item->valuestring, &c->jobs[i]) != 0
            : cJSON_IsArray(item)
                ? read_ids(r, item, &c->jobs[i]) != 0
                : request_wrong(r, 400, "prompt", "prompt %lld is neither a string nor a list of tokens", (long long)i))
            return -1;
    }
    return 0;
}

static int read_messages(struct request *r, struct completion *c)
{
    if (allocate_jobs(r, c, 1) != 0) return -1;
    return chat_encode(r, &c->jobs[0].prompt);
}

/* --------------------------------------------------------------------------------------------------------------- values */

static int read_stop(struct request *r, struct job *job)
{
    const cJSON *stop = request_item(r, "stop"), *item = cJSON_IsArray(stop) ? stop->child : stop;
    for (; item; item = cJSON_IsArray(stop) ? item->next : NULL) {
        if (!cJSON_IsString(item) || !*item->valuestring)
            return request_wrong(r, 400, "stop", "stop must be a string that is not empty, or a list of such");
        if (job->text.stop_count == MOST_STOPS)
            return request_wrong(r, 400, "stop", "more than %d stop strings", MOST_STOPS);
        char *copy = strdup(item->valuestring);
        if (!copy) return request_wrong(r, 500, NULL, "out of memory");
        job->text.stops[job->text.stop_count++] = copy;
    }
    return 0;
}

static int read_seed(struct request *r, uint64_t *seed)
{
    int64_t given = 0;
    if (request_integer(r, "seed", -(1LL << 53), 1LL << 53, &given) != 0) return -1;
    *seed = (uint64_t)given;
    if (!request_item(r, "seed") && getrandom(seed, sizeof *seed, 0) != sizeof *seed) *seed = (uint64_t)(now() * 1e9);
    return 0;
}

/* Prompt and answer must fit into the context. max_tokens: 16 for a completion, what is left for a chat, unless it is given. */
static int read_length(struct request *r, struct completion *c, int64_t *most)
{
    const int64_t context = r->exchange->server->options.context;
    const char *name = c->chat && request_item(r, "max_completion_tokens") ? "max_completion_tokens" : "max_tokens";
    int64_t longest = 0;
    for (int64_t i = 0; i < c->count; i++) {
        const int64_t length = c->jobs[i].prompt.count;
        if (length == 0) return request_wrong(r, 400, "prompt", "prompt %lld has no tokens", (long long)i);
        if (length >= context)
            return request_wrong(r, 400, "prompt",
                                 "prompt %lld has %lld tokens, which leaves no room in a context of %lld", (long long)i,
                                 (long long)length, (long long)context);
        if (length > longest) longest = length;
    }
    *most = c->chat || context - longest < 16 ? context - longest : 16;
    if (request_integer(r, name, 1, INT64_C(1) << 40, most) != 0) return -1;
    if (longest + *most > context)
        return request_wrong(r, 400, name, "%lld prompt and %lld new tokens exceed the context of %lld",
                             (long long)longest, (long long)*most, (long long)context);
    return 0;
}

static int read_values(struct request *r, struct completion *c)
{
    struct sampling sampling = {.temperature = 1, .top_p = 1};
    int64_t most = 0;
    int ignore_eos = 0;
    if (request_number(r, "temperature", 0, 100, &sampling.temperature) != 0 ||
        request_number(r, "top_p", 0, 1, &sampling.top_p) != 0 || read_seed(r, &sampling.seed) != 0 ||
        request_flag(r, "ignore_eos", &ignore_eos) != 0 || read_length(r, c, &most) != 0)
        return -1;
    for (int64_t i = 0; i < c->count; i++) {
        struct job *job = &c->jobs[i];
        job->sampling = sampling;
        if (i > 0) job->sampling.seed = random_at(sampling.seed, (uint64_t)i); /* equal prompts get different answers */
        job->ignore_eos = ignore_eos;
        job->most = most;
        if (read_stop(r, job) != 0) return -1;
    }
    return 0;
}

static int read_stream(struct request *r, struct completion *c)
{
    const cJSON *options = request_item(r, "stream_options");
    if (request_flag(r, "stream", &c->stream) != 0) return -1;
    if (!options) return 0;
    if (!cJSON_IsObject(options)) return request_wrong(r, 400, "stream_options", "stream_options must be an object");
    if (!c->stream) return request_wrong(r, 400, "stream_options", "stream_options needs \"stream\": true");
    c->usage = cJSON_IsTrue(cJSON_GetObjectItemCaseSensitive(options, "include_usage"));
    return 0;
}

static int read_model(struct request *r, struct completion *c)
{
    struct server *server = c->server;
    const char *name = NULL;
    if (request_text(r, "model", &name) != 0) return -1;
    if (!name) return request_wrong(r, 400, "model", "model is missing: '%s' or the name of an adapter", server->name);
    if (strcmp(name, server->name) != 0) {
        const unsigned status = adapters_acquire(server->adapters, name, &c->adapter);
        if (status == 404)
            return request_wrong(r, 404, "model", "there is no model '%.80s': GET /v1/models lists them", name);
        if (status) return request_wrong(r, status, "model", "%s", failure());
    }
    c->model = strdup(name);
    return c->model ? 0 : request_wrong(r, 500, NULL, "out of memory");
}

static int read_all(struct request *r, struct completion *c)
{
    if (check_neutral(r) != 0 || read_model(r, c) != 0) return -1;
    if ((c->chat ? read_messages(r, c) : read_prompts(r, c)) != 0) return -1;
    return read_values(r, c) != 0 || read_stream(r, c) != 0 ? -1 : 0;
}

static void name_it(struct completion *c)
{
    uint64_t bits[2] = {0, 0};
    if (getrandom(bits, sizeof bits, 0) != sizeof bits) bits[0] = (uint64_t)(now() * 1e9);
    snprintf(c->id, sizeof c->id, "%s-%016llx%08llx", c->chat ? "chatcmpl" : "cmpl", (unsigned long long)bits[0],
             (unsigned long long)(bits[1] >> 32));
    c->created = (int64_t)time(NULL);
}

enum MHD_Result completion_read(struct exchange *e, int chat, struct completion **out)
{
    struct request r;
    struct completion *c = NULL;
    *out = NULL;
    if (atomic_load(&e->server->draining)) return exchange_refuse(e, 503, NULL, "the server is ending");
    if (request_open(e, chat ? CHAT_MEMBERS : TEXT_MEMBERS, &r) != 0) {
        request_close(&r);
        return r.result;
    }
    if (memory_allocate(1, sizeof *c, "a request", &c) != 0) {
        request_close(&r);
        return exchange_refuse(e, 500, NULL, "%s", failure());
    }
    c->server = e->server;
    c->chat = chat;
    pthread_mutex_init(&c->owner.lock, NULL);
    pthread_cond_init(&c->owner.changed, NULL);
    atomic_fetch_add(&c->server->active, 1);
    name_it(c);
    if (read_all(&r, c) == 0)
        *out = c;
    else
        completion_free(c);
    request_close(&r);
    return r.result;
}
