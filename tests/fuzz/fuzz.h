/* fuzz.h: what the fuzz targets share: a directory of their own, a small model of the LLaMA family, and safetensors files from parts.
 *
 * A target is one function over bytes. `make fuzz` drives it with libFuzzer; replay.c feeds it the files of tests/fuzz/corpus/. It
 * calls abort() where the library did what it must not do. Everything is static: a target is one file. */
#ifndef PLORA_TESTS_FUZZ_H
#define PLORA_TESTS_FUZZ_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "plora.h"

#define FUZZ_UNUSED __attribute__((unused))

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define FUZZ_CHECK(condition)                                                                                          \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: %s: last error: %s\n", __FILE__, __LINE__, #condition, plora_last_error());        \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

/* How many inputs were good: replay.c wants the seeds to be. */
__attribute__((weak)) int64_t fuzz_accepted;

/* Whether a file may be refused so. */
static FUZZ_UNUSED int fuzz_refused(plora_status status)
{
    return status == PLORA_ERROR_FORMAT || status == PLORA_ERROR_UNSUPPORTED || status == PLORA_ERROR_SHAPE ||
           status == PLORA_ERROR_NOT_FOUND || status == PLORA_ERROR_INVALID_ARGUMENT;
}

static FUZZ_UNUSED plora_context *fuzz_context(void)
{
    static plora_context *context;
    plora_context_options options = PLORA_CONTEXT_OPTIONS_INIT;
    options.threads = 1;
    options.deterministic = 1;
    if (context == NULL) FUZZ_CHECK(plora_context_create(&options, &context) == PLORA_OK);
    return context;
}

/* --------------------------------------------------------------------------------------------------------------- files */

static char fuzz_folder[64];

static FUZZ_UNUSED void fuzz_clean(void)
{
    char command[128];
    snprintf(command, sizeof command, "rm -rf '%s'", fuzz_folder);
    (void)!system(command);
}

/* The path of a file in a directory that ends with the process; the last four stay. In memory where there is such a place. */
static FUZZ_UNUSED const char *fuzz_path(const char *name)
{
    static char paths[4][128];
    static int next;
    if (fuzz_folder[0] == '\0') {
        snprintf(fuzz_folder, sizeof fuzz_folder, "%s/plora_fuzz_XXXXXX",
                 access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp");
        FUZZ_CHECK(mkdtemp(fuzz_folder) != NULL);
        atexit(fuzz_clean);
    }
    char *path = paths[next++ % 4];
    snprintf(path, sizeof paths[0], "%s/%s", fuzz_folder, name);
    return path;
}

static FUZZ_UNUSED void fuzz_write(const char *path, const void *bytes, size_t count)
{
    FILE *file = fopen(path, "wb");
    FUZZ_CHECK(file != NULL);
    FUZZ_CHECK(count == 0 || fwrite(bytes, 1, count, file) == count);
    FUZZ_CHECK(fclose(file) == 0);
}

/* A safetensors file, from malloc: its length, the header as it is, and the data repeated up to the largest number that the header has
 * behind a "data_offsets", as far as that is sensible: so that not every change of the header is one of the file's length, too. */
static FUZZ_UNUSED unsigned char *fuzz_safetensors(const unsigned char *header, size_t header_bytes,
                                                   const unsigned char *data, size_t data_bytes, size_t *count)
{
    static const char key[] = "\"data_offsets\":[";
    enum { MOST = 1 << 16 };
    size_t room = 0;
    for (size_t i = 0; i + sizeof key < header_bytes; ++i) {
        if (memcmp(header + i, key, sizeof key - 1) != 0) continue;
        size_t numbers[2] = {0, 0}, at = i + sizeof key - 1;
        for (int k = 0; k < 2; ++k, ++at)
            for (; at < header_bytes && header[at] >= '0' && header[at] <= '9' && numbers[k] < MOST; ++at)
                numbers[k] = 10 * numbers[k] + (size_t)(header[at] - '0');
        if (numbers[1] > room && numbers[1] <= MOST) room = numbers[1];
    }
    *count = 8 + header_bytes + room;
    unsigned char *bytes = malloc(*count);
    FUZZ_CHECK(bytes != NULL);
    for (int i = 0; i < 8; ++i)
        bytes[i] = (unsigned char)((uint64_t)header_bytes >> 8 * i);
    if (header_bytes > 0) memcpy(bytes + 8, header, header_bytes);
    for (size_t i = 0; i < room; ++i)
        bytes[8 + header_bytes + i] = data_bytes > 0 ? data[i % data_bytes] : 0;
    return bytes;
}

/* The bytes before the next zero of data[*at ..], or before its end; *at goes behind it. */
static FUZZ_UNUSED const unsigned char *fuzz_part(const unsigned char *data, size_t size, size_t *at, size_t *bytes)
{
    const unsigned char *begin = data + *at;
    *bytes = 0;
    while (*at + *bytes < size && begin[*bytes] != 0)
        ++*bytes;
    *at += *bytes + (*at + *bytes < size);
    return begin;
}

/* --------------------------------------------------------------------------------------------------------------- model */

enum { FUZZ_LAYERS = 6, FUZZ_HEADS = 2, FUZZ_KV_HEADS = 1, FUZZ_WEIGHT_BYTES = 256 };

static const struct {
    const char *name;
    int32_t dtype, flags;
    int64_t rows, columns; /* of the weight as it is stored */
} fuzz_layers[FUZZ_LAYERS] FUZZ_UNUSED = {
    {"model.layers.0.self_attn.q_proj", PLORA_BF16, 0, 8, 6},
    {"model.layers.0.self_attn.k_proj", PLORA_F16, 0, 4, 6},
    {"model.layers.0.self_attn.v_proj", PLORA_F32, 0, 4, 6},
    {"model.layers.0.mlp.down_proj", PLORA_BF16, 0, 6, 5},
    {"model.layers.1.mlp.down_proj", PLORA_BF16, PLORA_LAYER_FAN_IN_FAN_OUT, 5, 6},
    {"lm_head", PLORA_F32, PLORA_LAYER_HEAD, 7, 6},
};

/* `weights` is the memory of its weights, filled with numbers around 1. */
static FUZZ_UNUSED plora_model *fuzz_model(unsigned char weights[FUZZ_LAYERS][FUZZ_WEIGHT_BYTES])
{
    plora_model *model;
    FUZZ_CHECK(plora_model_create(fuzz_context(), &model) == PLORA_OK);
    for (int i = 0; i < FUZZ_LAYERS; ++i) {
        const int wide = fuzz_layers[i].dtype == PLORA_F32;
        for (size_t b = 0; b < FUZZ_WEIGHT_BYTES; ++b) /* 0x3fXX, 0x3cXX, 0x3f80XXXX */
            weights[i][b] =
                (unsigned char)(b % (wide ? 4 : 2) == (wide ? 3 : 1) ? fuzz_layers[i].dtype == PLORA_F16 ? 0x3c : 0x3f
                                : wide && b % 4 == 2                 ? 0x80
                                                                     : 11 * b + 1);
        plora_linear linear = PLORA_LINEAR_INIT;
        linear.name = fuzz_layers[i].name;
        linear.flags = fuzz_layers[i].flags;
        linear.weight = (plora_matrix){
            weights[i], fuzz_layers[i].rows, fuzz_layers[i].columns, fuzz_layers[i].columns, fuzz_layers[i].dtype, 0};
        FUZZ_CHECK(plora_model_add_linear(model, &linear, NULL) == PLORA_OK);
    }
    return model;
}

/* Adapters that a load has made: every number of them is finite. */
static FUZZ_UNUSED void fuzz_check_adapters(plora_adapters *adapters)
{
    float *parameters;
    int64_t count;
    FUZZ_CHECK(plora_adapters_parameters(adapters, &parameters, &count) == PLORA_OK);
    for (int64_t i = 0; i < count; ++i)
        FUZZ_CHECK(isfinite(parameters[i]));
    int found = 0;
    for (int32_t layer = 0; layer < FUZZ_LAYERS; ++layer) {
        plora_adapter view = PLORA_ADAPTER_INIT;
        if (plora_adapters_layer(adapters, layer, &view) != PLORA_OK) continue;
        FUZZ_CHECK(isfinite(view.scale) && view.a.rows >= 1 && view.a.rows == view.b.columns);
        ++found;
    }
    FUZZ_CHECK(found > 0);
}

#endif
