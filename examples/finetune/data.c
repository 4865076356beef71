/* data.c: see data.h. */
#include "data.h"

#include <cjson/cJSON.h>
#include <stdlib.h>
#include <string.h>

#include "util.h"

static int read_ids(const cJSON *list, const char *path, int64_t line, const char *name, int64_t vocabulary,
                    int32_t *ids)
{
    const cJSON *item;
    cJSON_ArrayForEach(item, list)
    {
        if (!cJSON_IsNumber(item) || !(item->valuedouble >= 0 && item->valuedouble < (double)vocabulary) ||
            item->valuedouble != (double)(int64_t)item->valuedouble)
            return fault("%s line %lld: '%s' holds something that is no token id in [0, %lld)", path, (long long)line,
                         name, (long long)vocabulary);
        *ids++ = (int32_t)item->valuedouble;
    }
    return 0;
}

static int read_example(const cJSON *root, const char *path, int64_t line, int64_t vocabulary, int64_t max_positions,
                        struct example *example)
{
    const cJSON *prompt = cJSON_GetObjectItemCaseSensitive(root, "prompt");
    const cJSON *completion = cJSON_GetObjectItemCaseSensitive(root, "completion");
    if (!cJSON_IsArray(prompt) || !cJSON_IsArray(completion))
        return fault("%s line %lld: not an object with the lists 'prompt' and 'completion'", path, (long long)line);
    example->prompt = cJSON_GetArraySize(prompt);
    example->length = example->prompt + cJSON_GetArraySize(completion);
    if (example->length < 2 || example->length == example->prompt)
        return fault("%s line %lld: nothing to predict in %lld prompt and %lld completion tokens", path,
                     (long long)line, (long long)example->prompt, (long long)(example->length - example->prompt));
    if (example->length > max_positions + 1)
        return fault("%s line %lld: %lld tokens are more than the model's %lld positions", path, (long long)line,
                     (long long)example->length, (long long)max_positions);
    TRY(memory_allocate((size_t)example->length, sizeof *example->ids, "token ids", &example->ids));
    TRY(read_ids(prompt, path, line, "prompt", vocabulary, example->ids));
    return read_ids(completion, path, line, "completion", vocabulary, example->ids + example->prompt);
}

static int read_line(struct dataset *set, const char *text, const char *path, int64_t line, int64_t vocabulary,
                     int64_t max_positions)
{
    struct example *example = &set->examples[set->count];
    cJSON *root = cJSON_Parse(text);
    if (!root) return fault("%s line %lld: not valid JSON", path, (long long)line);
    set->count++; /* so that a half-read example is freed too */
    const int result = read_example(root, path, line, vocabulary, max_positions, example);
    cJSON_Delete(root);
    TRY(result);
    if (example->length > set->longest) set->longest = example->length;
    set->hash = hash_bytes(set->hash, &example->prompt, sizeof example->prompt);
    set->hash = hash_bytes(set->hash, example->ids, (size_t)example->length * sizeof *example->ids);
    return 0;
}

static int read_lines(struct dataset *set, char *text, const char *path, int64_t vocabulary, int64_t max_positions)
{
    size_t lines = 1;
    for (const char *c = text; *c; c++)
        lines += *c == '\n';
    TRY(memory_allocate(lines, sizeof *set->examples, "examples", &set->examples));
    int64_t number = 0;
    for (char *line = text; line;) {
        char *end = strchr(line, '\n');
        if (end) *end = '\0';
        number++;
        if (line[strspn(line, " \t\r")] != '\0') TRY(read_line(set, line, path, number, vocabulary, max_positions));
        line = end ? end + 1 : NULL;
    }
    return set->count > 0 ? 0 : fault("%s holds no examples", path);
}

int dataset_read(const char *path, int64_t vocabulary, int64_t max_positions, struct dataset *set)
{
    *set = (struct dataset){0};
    char *text;
    size_t size;
    TRY(file_read(path, &text, &size));
    const int result = strlen(text) != size ? fault("%s is not text: it holds a zero byte", path)
                                            : read_lines(set, text, path, vocabulary, max_positions);
    free(text);
    if (result != 0) dataset_free(set);
    return result;
}

void dataset_free(struct dataset *set)
{
    for (int64_t i = 0; i < set->count; i++)
        free(set->examples[i].ids);
    free(set->examples);
    *set = (struct dataset){0};
}

static int batch_make(struct batch *batch, int64_t sequences, int64_t tokens, int64_t losses)
{
    batch_free(batch);
    TRY(memory_allocate((size_t)tokens, sizeof *batch->ids, "a batch", &batch->ids));
    TRY(memory_allocate((size_t)tokens, sizeof *batch->positions, "a batch", &batch->positions));
    TRY(memory_allocate((size_t)sequences + 1, sizeof *batch->starts, "a batch", &batch->starts));
    TRY(memory_allocate((size_t)losses, sizeof *batch->rows, "a batch", &batch->rows));
    TRY(memory_allocate((size_t)losses, sizeof *batch->targets, "a batch", &batch->targets));
    return 0;
}

int batch_fill(struct batch *batch, const struct dataset *set, const int64_t *indices, int64_t count)
{
    int64_t tokens = 0;
    for (int64_t i = 0; i < count; i++)
        tokens += set->examples[indices[i]].length - 1;
    TRY(batch_make(batch, count, tokens, tokens));
    for (int64_t i = 0; i < count; i++) {
        const struct example *example = &set->examples[indices[i]];
        batch->starts[i] = batch->tokens;
        for (int64_t j = 0; j + 1 < example->length; j++) {
            if (j + 1 >= example->prompt) {
                batch->rows[batch->losses] = batch->tokens;
                batch->targets[batch->losses++] = example->ids[j + 1];
            }
            batch->ids[batch->tokens] = example->ids[j];
            batch->positions[batch->tokens++] = (int32_t)j;
        }
    }
    batch->sequences = count;
    batch->starts[count] = batch->tokens;
    return 0;
}

int batch_random(int64_t count, int64_t length, int64_t vocabulary, uint64_t seed, struct batch *batch)
{
    const int64_t tokens = count * length;
    TRY(batch_make(batch, count, tokens, tokens));
    for (int64_t i = 0; i < tokens; i++) {
        batch->ids[i] = (int32_t)(random_at(seed, (uint64_t)(2 * i)) % (uint64_t)vocabulary);
        batch->targets[i] = (int32_t)(random_at(seed, (uint64_t)(2 * i + 1)) % (uint64_t)vocabulary);
        batch->positions[i] = (int32_t)(i % length);
        batch->rows[i] = i;
    }
    for (int64_t i = 0; i <= count; i++)
        batch->starts[i] = i * length;
    batch->sequences = count;
    batch->tokens = batch->losses = tokens;
    return 0;
}

void batch_free(struct batch *batch)
{
    free(batch->ids);
    free(batch->positions);
    free(batch->starts);
    free(batch->rows);
    free(batch->targets);
    *batch = (struct batch){0};
}

int order_create(int64_t count, uint64_t seed, struct order *order)
{
    *order = (struct order){seed, count, -1, NULL};
    return memory_allocate((size_t)count, sizeof *order->permutation, "the order of the examples", &order->permutation);
}

int64_t order_at(struct order *order, int64_t place)
{
    const int64_t epoch = place / order->count;
    if (epoch != order->epoch) {
        const uint64_t key = random_at(order->seed, (uint64_t)epoch);
        for (int64_t i = 0; i < order->count; i++)
            order->permutation[i] = i;
        for (int64_t i = order->count - 1; i > 0; i--) {
            const int64_t j = (int64_t)(random_at(key, (uint64_t)i) % (uint64_t)(i + 1)), other = order->permutation[j];
            order->permutation[j] = order->permutation[i];
            order->permutation[i] = other;
        }
        order->epoch = epoch;
    }
    return order->permutation[place % order->count];
}

void order_free(struct order *order)
{
    free(order->permutation);
    *order = (struct order){0};
}
