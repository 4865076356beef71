/* export_fixture.h: two small blocks of a LLaMA with a ledger, what was seen to be unloaded of each layer, its dense sums in double, and
 * products read back from exported adapters: PEFT directories by plora_adapters_load(), GGUF files by a reader of the tests' own. */
#ifndef PLORA_TESTS_EXPORT_FIXTURE_H
#define PLORA_TESTS_EXPORT_FIXTURE_H

#include "file_fixture.h"

enum { BLOCKS = 2, PER_BLOCK = 7, LAYERS = BLOCKS * PER_BLOCK, HEADS = 2, KV_HEADS = 1, STAGES_MAX = 8 };

static const struct {
    const char *layer, *gguf;
    int64_t n, k;
} kinds[PER_BLOCK] = {
    {"self_attn.q_proj", "attn_q", 16, 16}, {"self_attn.k_proj", "attn_k", 8, 16},
    {"self_attn.v_proj", "attn_v", 8, 16},  {"self_attn.o_proj", "attn_output", 16, 16},
    {"mlp.gate_proj", "ffn_gate", 24, 16},  {"mlp.up_proj", "ffn_up", 24, 16},
    {"mlp.down_proj", "ffn_down", 16, 24},
};

/* What the test saw of one stage of one layer. */
struct seen {
    const float *a, *b;
    int64_t rank;
    double factor;
};

struct fixture {
    struct check_allocator allocator;
    plora_context *context;
    plora_model *model;
    plora_adapters *adapters;
    plora_ledger *ledger;
    struct check_matrix weights[LAYERS];
    struct seen stages[STAGES_MAX][LAYERS];
    int count;
    float values[1 << 15]; /* theirs */
    int64_t used;
};

/* ------------------------------------------------------------------------------------------------------------- fixture */

static CHECK_UNUSED void fixture_open(struct fixture *f, int32_t threads, const plora_adapters_options *options)
{
    *f = (struct fixture){.allocator = CHECK_ALLOCATOR_INIT};
    f->context = check_context(&f->allocator, threads, 0);
    CHECK_OK(plora_model_create(f->context, &f->model));
    for (int i = 0; i < LAYERS; ++i) {
        char name[64];
        snprintf(name, sizeof name, "model.layers.%d.%s", i / PER_BLOCK, kinds[i % PER_BLOCK].layer);
        f->weights[i] = check_matrix_new(kinds[i % PER_BLOCK].n, kinds[i % PER_BLOCK].k, 32, PLORA_F32);
        check_matrix_random(&f->weights[i], 1.0);
        check_matrix_snapshot(&f->weights[i]);
        CHECK_OK(check_add_linear(f->model, name, &f->weights[i].m, NULL, 0, 0, NULL));
        device_refresh(f->weights[i].memory);
    }
    CHECK_OK(plora_adapters_create(f->model, options, &f->adapters));
    CHECK_OK(plora_ledger_open(f->adapters, NULL, &f->ledger));
}

static CHECK_UNUSED void fixture_close(struct fixture *f)
{
    plora_ledger_destroy(f->ledger);
    plora_adapters_destroy(f->adapters);
    plora_model_destroy(f->model);
    plora_context_destroy(f->context);
    for (int i = 0; i < LAYERS; ++i)
        check_matrix_free(&f->weights[i]);
    check_allocator_empty(&f->allocator, "the test");
}

static CHECK_UNUSED plora_adapters_options different_ranks(int32_t rank)
{
    static const plora_adapters_override overrides[] = {{"v_proj", 3.0, 1, 0}, {"model.layers.1.mlp.*", 0.0, 3, 0}};
    plora_adapters_options options = PLORA_ADAPTERS_OPTIONS_INIT;
    options.rank = rank;
    options.alpha = 5.0;
    options.overrides = overrides;
    options.override_count = CHECK_COUNT(overrides);
    return options;
}

/* Random values into a matrix of the library's, and a copy of them. */
static const float *fill(struct fixture *f, const plora_matrix *matrix)
{
    const int64_t count = matrix->rows * matrix->columns;
    float *copy = f->values + f->used;
    f->used += count;
    CHECK(f->used <= CHECK_COUNT(f->values), "the test trains too much");
    for (int64_t i = 0; i < count; ++i)
        copy[i] = (float)(0.3 * check_uniform());
    device_transfer(matrix->data, copy, (size_t)count * sizeof *copy);
    return copy;
}

/* Fills the live adapter; what is seen of it counts with `share` of its scale. */
static CHECK_UNUSED void train(struct fixture *f, double share)
{
    for (int i = 0; i < LAYERS; ++i) {
        plora_adapter adapter = PLORA_ADAPTER_INIT;
        CHECK_OK(plora_adapters_layer(f->adapters, i, &adapter));
        f->stages[f->count][i] =
            (struct seen){fill(f, &adapter.a), fill(f, &adapter.b), adapter.a.rows, share * adapter.scale};
    }
    ++f->count;
}

static CHECK_UNUSED void train_and_unload(struct fixture *f, double momentum)
{
    plora_unload_options options = PLORA_UNLOAD_OPTIONS_INIT;
    options.momentum = momentum;
    train(f, momentum);
    CHECK_OK(plora_unload(f->adapters, NULL, &options, NULL, NULL));
}

/* The dense sum of what was seen of a layer; from malloc. magnitude (may be NULL): the same of absolute values. */
static CHECK_UNUSED double *dense_sum(const struct fixture *f, int layer, double *magnitude)
{
    const int64_t n = kinds[layer % PER_BLOCK].n, k = kinds[layer % PER_BLOCK].k;
    double *sum = calloc((size_t)(n * k), sizeof *sum);
    CHECK(sum != NULL, "the test itself is out of memory");
    for (int64_t i = 0; i < n * k; ++i) {
        if (magnitude != NULL) magnitude[i] = 0;
        for (int s = 0; s < f->count; ++s) {
            const struct seen *seen = &f->stages[s][layer];
            for (int64_t r = 0; r < seen->rank; ++r) {
                const double term =
                    seen->factor * (double)seen->b[i / k * seen->rank + r] * (double)seen->a[r * k + i % k];
                sum[i] += term;
                if (magnitude != NULL) magnitude[i] += fabs(term);
            }
        }
    }
    return sum;
}

static CHECK_UNUSED double norm(const double *values, int64_t count)
{
    double sum = 0;
    for (int64_t i = 0; i < count; ++i)
        sum += values[i] * values[i];
    return sqrt(sum);
}

static CHECK_UNUSED float *new_floats(int64_t count)
{
    float *values = malloc((size_t)count * sizeof *values);
    CHECK(values != NULL, "the test itself is out of memory");
    return values;
}

/* An adapter as it was read back. */
struct product {
    float *a, *b;
    int64_t rank;
    double scale;
};

static CHECK_UNUSED struct product read_product(plora_adapters *adapters, int layer)
{
    plora_adapter adapter = PLORA_ADAPTER_INIT;
    CHECK_OK(plora_adapters_layer(adapters, layer, &adapter));
    const int64_t a_count = adapter.a.rows * adapter.a.columns, b_count = adapter.b.rows * adapter.b.columns;
    struct product product = {new_floats(a_count), new_floats(b_count), adapter.a.rows, adapter.scale};
    device_transfer(product.a, adapter.a.data, (size_t)a_count * sizeof(float));
    device_transfer(product.b, adapter.b.data, (size_t)b_count * sizeof(float));
    return product;
}

static CHECK_UNUSED void product_free(struct product *product)
{
    free(product->a);
    free(product->b);
}

static CHECK_UNUSED double product_element(const struct product *product, int64_t k, int64_t i, int64_t j)
{
    double sum = 0;
    for (int64_t r = 0; r < product->rank; ++r)
        sum += (double)product->b[i * product->rank + r] * (double)product->a[r * k + j];
    return product->scale * sum;
}

static CHECK_UNUSED plora_status export_to(struct fixture *f, const char *name, plora_export_options options,
                                           plora_export_report *report)
{
    return plora_ledger_export(f->ledger, file_path(name), &options, report);
}

/* Exports into a PEFT directory, and holds each layer's product against the dense sum. `exact`: element by element, within the one
 * rounding of B; else against the reported errors. */
static CHECK_UNUSED void check_peft(struct fixture *f, plora_export_options options, int exact, const char *what)
{
    plora_export_layer layers[LAYERS];
    plora_export_report report = PLORA_EXPORT_REPORT_INIT;
    report.layers = layers;
    report.layer_capacity = LAYERS;
    CHECK_OK(export_to(f, "peft", options, &report));
    CHECK(report.weights == LAYERS && report.records + report.live == f->count, "%s: %lld records, live %d", what,
          (long long)report.records, report.live);
    plora_adapters *adapters;
    CHECK_OK(plora_adapters_load(f->model, file_path("peft"), NULL, &adapters));
    double norms = 0, losses = 0;
    int64_t highest = 0;
    for (int layer = 0; layer < LAYERS; ++layer) {
        const int64_t n = kinds[layer % PER_BLOCK].n, k = kinds[layer % PER_BLOCK].k;
        double magnitude[24 * 24], lost[24 * 24];
        double *sum = dense_sum(f, layer, magnitude);
        struct product product = read_product(adapters, layer);
        int64_t stacked = 0;
        for (int s = 0; s < f->count; ++s)
            stacked += f->stages[s][layer].rank;
        CHECK(layers[layer].layer == layer && layers[layer].rank == product.rank &&
                  layers[layer].stacked_rank == stacked,
              "%s: layer %d: rank %lld of %lld", what, layer, (long long)layers[layer].rank,
              (long long)layers[layer].stacked_rank);
        for (int64_t i = 0; i < n * k; ++i) {
            lost[i] = sum[i] - product_element(&product, k, i / k, i % k);
            if (exact) CHECK_CLOSE(lost[i], 0.0, 1.01 * 0x1p-24 * magnitude[i], "%s: layer %d", what, layer);
        }
        if (exact) {
            CHECK(layers[layer].error == 0.0 && product.rank == stacked, "%s: layer %d: error %g", what, layer,
                  layers[layer].error);
        } else {
            const double size = norm(sum, n * k);
            CHECK_CLOSE(layers[layer].norm, size, 1e-12 * size, "%s: layer %d: norm", what, layer);
            CHECK_CLOSE(layers[layer].error * size, norm(lost, n * k), 3e-7 * size, "%s: layer %d", what, layer);
            CHECK(options.rank == 0 || product.rank <= options.rank, "%s: layer %d: rank %lld", what, layer,
                  (long long)product.rank);
            if (options.max_error > 0 && (options.rank == 0 || product.rank < options.rank))
                CHECK(layers[layer].error <= options.max_error, "%s: layer %d: error %g", what, layer,
                      layers[layer].error);
            norms = hypot(norms, size);
            losses = hypot(losses, norm(lost, n * k));
        }
        highest = product.rank > highest ? product.rank : highest;
        product_free(&product);
        free(sum);
    }
    CHECK(report.rank == highest, "%s: rank %lld, seen %lld", what, (long long)report.rank, (long long)highest);
    CHECK_CLOSE(report.error * norms, losses, 3e-7 * norms, "%s: total error", what);
    CHECK_CLOSE(report.norm, norms, 1e-12 * norms, "%s: total norm", what);
    CHECK(file_count(file_path("peft")) == 2, "%s: %d files", what, file_count(file_path("peft")));
    plora_adapters_destroy(adapters);
}

static const plora_export_options defaults = PLORA_EXPORT_OPTIONS_INIT;

/* ---------------------------------------------------------------------------------------------------------------- GGUF */

struct reader {
    const unsigned char *bytes;
    size_t count, at;
};

static CHECK_UNUSED uint64_t read_number(struct reader *reader, int bytes)
{
    CHECK(reader->at + (size_t)bytes <= reader->count, "the file ends at byte %zu", reader->at);
    uint64_t number = 0;
    for (int i = 0; i < bytes; ++i)
        number |= (uint64_t)reader->bytes[reader->at++] << 8 * i;
    return number;
}

static CHECK_UNUSED void read_string(struct reader *reader, char text[128])
{
    const uint64_t length = read_number(reader, 8);
    CHECK(length < 128 && reader->at + length <= reader->count, "a string of %llu bytes", (unsigned long long)length);
    memcpy(text, reader->bytes + reader->at, length);
    text[length] = '\0';
    reader->at += length;
}

static CHECK_UNUSED float float_of(uint64_t bits)
{
    return plora__float_from_bits((uint32_t)bits);
}

/* The products of a file, as llama.cpp would use them, with B's rows where Hugging Face has them. Returns alpha. */
static CHECK_UNUSED float read_gguf(const char *path, struct product products[LAYERS])
{
    static const char *const texts[3][2] = {
        {"general.architecture", "llama"}, {"general.type", "adapter"}, {"adapter.type", "lora"}};
    struct {
        char name[128];
        uint64_t extents[2], offset;
    } tensors[2 * LAYERS];
    struct reader reader = {0};
    reader.bytes = file_read(path, &reader.count);
    char key[128], value[128];
    CHECK(memcmp(reader.bytes, "GGUF", 4) == 0, "no magic");
    reader.at = 4;
    CHECK(read_number(&reader, 4) == 3, "version");
    CHECK(read_number(&reader, 8) == 2 * LAYERS, "number of tensors");
    CHECK(read_number(&reader, 8) == 4, "number of values");
    for (int i = 0; i < 3; ++i) {
        read_string(&reader, key);
        CHECK(read_number(&reader, 4) == 8, "%s is no string", key);
        read_string(&reader, value);
        CHECK(strcmp(key, texts[i][0]) == 0 && strcmp(value, texts[i][1]) == 0, "%s is %s", key, value);
    }
    read_string(&reader, key);
    CHECK(strcmp(key, "adapter.lora.alpha") == 0 && read_number(&reader, 4) == 6, "%s", key);
    const float alpha = float_of(read_number(&reader, 4));
    for (int i = 0; i < 2 * LAYERS; ++i) {
        read_string(&reader, tensors[i].name);
        CHECK(read_number(&reader, 4) == 2, "%s: dimensions", tensors[i].name);
        tensors[i].extents[0] = read_number(&reader, 8);
        tensors[i].extents[1] = read_number(&reader, 8);
        CHECK(read_number(&reader, 4) == 0, "%s: type", tensors[i].name);
        tensors[i].offset = read_number(&reader, 8);
        CHECK(tensors[i].offset % 32 == 0, "%s: offset", tensors[i].name);
    }
    const size_t data = (reader.at + 31) / 32 * 32;
    size_t end = 0;
    for (int layer = 0; layer < LAYERS; ++layer) {
        const int kind = layer % PER_BLOCK;
        const int64_t n = kinds[kind].n, k = kinds[kind].k, rank = (int64_t)tensors[2 * layer].extents[1];
        struct product *product = &products[layer];
        *product = (struct product){new_floats(rank * k), new_floats(n * rank), rank, 1.0};
        if (alpha != 0) product->scale = (double)alpha / (double)rank;
        for (int is_b = 0; is_b < 2; ++is_b) {
            const int i = 2 * layer + is_b;
            snprintf(value, sizeof value, "blk.%d.%s.weight.lora_%c", layer / PER_BLOCK, kinds[kind].gguf, "ab"[is_b]);
            CHECK(strcmp(tensors[i].name, value) == 0, "%s where %s should be", tensors[i].name, value);
            CHECK(tensors[i].extents[0] == (uint64_t)(is_b ? rank : k) &&
                      tensors[i].extents[1] == (uint64_t)(is_b ? n : rank),
                  "%s: [%llu,%llu]", value, (unsigned long long)tensors[i].extents[0],
                  (unsigned long long)tensors[i].extents[1]);
            CHECK(data + tensors[i].offset == (i == 0 ? data : (end + 31) / 32 * 32), "%s: a gap", value);
            end = data + tensors[i].offset + (size_t)(tensors[i].extents[0] * tensors[i].extents[1]) * sizeof(float);
            CHECK(end <= reader.count, "%s: cut off", value);
            memcpy(is_b ? product->b : product->a, reader.bytes + data + tensors[i].offset,
                   end - data - tensors[i].offset);
        }
        /* llama.cpp: rows [head][2][d/2] become [head][d/2][2] */
        const int64_t heads = kind == 0 ? HEADS : kind == 1 ? KV_HEADS : 0, half = heads > 0 ? n / heads / 2 : 0;
        float *there = new_floats(n * rank);
        memcpy(there, product->b, (size_t)(n * rank) * sizeof *there);
        for (int64_t head = 0; head < heads; ++head)
            for (int64_t j = 0; j < half; ++j)
                for (int64_t part = 0; part < 2; ++part)
                    memcpy(product->b + ((head * 2 + part) * half + j) * rank,
                           there + ((head * half + j) * 2 + part) * rank, (size_t)rank * sizeof *there);
        free(there);
    }
    CHECK((end + 31) / 32 * 32 == reader.count, "%zu bytes behind the last tensor", reader.count - end);
    free((void *)(uintptr_t)reader.bytes);
    return alpha;
}

#endif
