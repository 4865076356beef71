/* test_export.c: ledgers exported as one adapter, against dense sums in double of what was seen to be unloaded: exact and truncated,
 * as PEFT directories, read back by plora_adapters_load(), and as GGUF files, read back by a reader of the test's own. */
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

static void fixture_open(struct fixture *f, int32_t threads, const plora_adapters_options *options)
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

static void fixture_close(struct fixture *f)
{
    plora_ledger_destroy(f->ledger);
    plora_adapters_destroy(f->adapters);
    plora_model_destroy(f->model);
    plora_context_destroy(f->context);
    for (int i = 0; i < LAYERS; ++i)
        check_matrix_free(&f->weights[i]);
    check_allocator_empty(&f->allocator, "the test");
}

static plora_adapters_options different_ranks(int32_t rank)
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
static void train(struct fixture *f, double share)
{
    for (int i = 0; i < LAYERS; ++i) {
        plora_adapter adapter = PLORA_ADAPTER_INIT;
        CHECK_OK(plora_adapters_layer(f->adapters, i, &adapter));
        f->stages[f->count][i] =
            (struct seen){fill(f, &adapter.a), fill(f, &adapter.b), adapter.a.rows, share * adapter.scale};
    }
    ++f->count;
}

static void train_and_unload(struct fixture *f, double momentum)
{
    plora_unload_options options = PLORA_UNLOAD_OPTIONS_INIT;
    options.momentum = momentum;
    train(f, momentum);
    CHECK_OK(plora_unload(f->adapters, NULL, &options, NULL, NULL));
}

/* The dense sum of what was seen of a layer; from malloc. magnitude (may be NULL): the same of absolute values. */
static double *dense_sum(const struct fixture *f, int layer, double *magnitude)
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

static double norm(const double *values, int64_t count)
{
    double sum = 0;
    for (int64_t i = 0; i < count; ++i)
        sum += values[i] * values[i];
    return sqrt(sum);
}

static float *new_floats(int64_t count)
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

static struct product read_product(plora_adapters *adapters, int layer)
{
    plora_adapter adapter = PLORA_ADAPTER_INIT;
    CHECK_OK(plora_adapters_layer(adapters, layer, &adapter));
    const int64_t a_count = adapter.a.rows * adapter.a.columns, b_count = adapter.b.rows * adapter.b.columns;
    struct product product = {new_floats(a_count), new_floats(b_count), adapter.a.rows, adapter.scale};
    device_transfer(product.a, adapter.a.data, (size_t)a_count * sizeof(float));
    device_transfer(product.b, adapter.b.data, (size_t)b_count * sizeof(float));
    return product;
}

static void product_free(struct product *product)
{
    free(product->a);
    free(product->b);
}

static double product_element(const struct product *product, int64_t k, int64_t i, int64_t j)
{
    double sum = 0;
    for (int64_t r = 0; r < product->rank; ++r)
        sum += (double)product->b[i * product->rank + r] * (double)product->a[r * k + j];
    return product->scale * sum;
}

static plora_status export_to(struct fixture *f, const char *name, plora_export_options options,
                              plora_export_report *report)
{
    return plora_ledger_export(f->ledger, file_path(name), &options, report);
}

/* Exports into a PEFT directory, and holds each layer's product against the dense sum. `exact`: element by element, within the one
 * rounding of B; else against the reported errors. */
static void check_peft(struct fixture *f, plora_export_options options, int exact, const char *what)
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

/* ---------------------------------------------------------------------------------------------------------------- PEFT */

static void exact(void **state)
{
    static const double momenta[][3] = {{1.0, 1.0, 0.0}, {0.2, 0.7, 0.0}, {1.0, 0.0, 0.0}, {0.4, 0.4, 0.4}};
    (void)state;
    for (int round = 0; round < CHECK_COUNT(momenta); ++round) {
        struct fixture f;
        const plora_adapters_options given = different_ranks(2);
        plora_export_options options = defaults;
        char what[64];
        fixture_open(&f, 2, &given);
        for (int s = 0; s < 3 && momenta[round][s] > 0; ++s)
            train_and_unload(&f, momenta[round][s]);
        snprintf(what, sizeof what, "round %d, without the live adapter", round);
        options.live = 0;
        check_peft(&f, options, 1, what);
        /* It is also what the trained weights differ by from the original ones, up to their rounding. */
        for (int layer = 0; layer < LAYERS; ++layer) {
            double *sum = dense_sum(&f, layer, NULL);
            const plora_matrix *w = &f.weights[layer].m;
            const size_t front = (size_t)((unsigned char *)w->data - f.weights[layer].memory);
            const float *before = (const float *)(f.weights[layer].snapshot + front);
            float after[24 * 32];
            device_transfer(after, device_of(w->data),
                            (size_t)((w->rows - 1) * w->stride + w->columns) * sizeof(float));
            for (int64_t i = 0; i < w->rows * w->columns; ++i) {
                const int64_t at = i / w->columns * w->stride + i % w->columns;
                CHECK_CLOSE((double)after[at] - (double)before[at], sum[i], 1e-5, "layer %d: W_T - W_0", layer);
            }
            free(sum);
        }
        if (round == 3) { /* three stages are all the rank that k_proj may have when it is loaded */
            fixture_close(&f);
            continue;
        }
        train(&f, 1.0);
        snprintf(what, sizeof what, "round %d, with the live adapter", round);
        check_peft(&f, defaults, 1, what);
        fixture_close(&f);
    }
}

/* Stages of one scale: every number of the file is one that was unloaded. */
static void same_bits(void **state)
{
    (void)state;
    struct fixture f;
    const plora_adapters_options given = different_ranks(2);
    fixture_open(&f, 1, &given);
    train_and_unload(&f, 1.0);
    train_and_unload(&f, 1.0);
    train(&f, 1.0);
    CHECK_OK(export_to(&f, "peft", defaults, NULL));
    plora_adapters *adapters;
    CHECK_OK(plora_adapters_load(f.model, file_path("peft"), NULL, &adapters));
    for (int layer = 0; layer < LAYERS; ++layer) {
        const int64_t n = kinds[layer % PER_BLOCK].n, k = kinds[layer % PER_BLOCK].k;
        struct product product = read_product(adapters, layer);
        CHECK_CLOSE(product.scale, f.stages[0][layer].factor, 1e-15, "layer %d: scale", layer);
        int64_t at = 0;
        for (int s = 0; s < f.count; ++s) {
            const struct seen *seen = &f.stages[s][layer];
            CHECK(memcmp(product.a + at * k, seen->a, (size_t)(seen->rank * k) * sizeof(float)) == 0, "layer %d: A",
                  layer);
            for (int64_t i = 0; i < n; ++i)
                CHECK(memcmp(product.b + i * product.rank + at, seen->b + i * seen->rank,
                             (size_t)seen->rank * sizeof(float)) == 0,
                      "layer %d: B, row %lld", layer, (long long)i);
            at += seen->rank;
        }
        product_free(&product);
    }
    plora_adapters_destroy(adapters);
    fixture_close(&f);
}

static void truncated(void **state)
{
    static const double errors[] = {0.6, 0.2, 0.03, 1e-3};
    (void)state;
    for (int32_t threads = 1; threads <= 3; threads += 2) {
        struct fixture f;
        const plora_adapters_options given = different_ranks(4);
        fixture_open(&f, threads, &given);
        train_and_unload(&f, 1.0);
        train_and_unload(&f, 0.3);
        train_and_unload(&f, 0.6);
        train(&f, 1.0); /* 16 in all: as much as any layer has, and more than some */
        char what[64];
        for (int64_t rank = 0; rank <= 8; ++rank)
            for (int i = 0; i < CHECK_COUNT(errors); ++i) {
                const double error = errors[i];
                plora_export_options options = defaults;
                options.rank = rank;
                options.max_error = error;
                snprintf(what, sizeof what, "rank %lld, error %g", (long long)rank, error);
                check_peft(&f, options, 0, what);
            }
        plora_export_options options = defaults;
        options.rank = 3;
        check_peft(&f, options, 0, "rank 3");
        fixture_close(&f);
    }
}

/* The first records alone, after a roll back too; and nothing at all. */
static void parts(void **state)
{
    (void)state;
    struct fixture f;
    const plora_adapters_options given = different_ranks(2);
    plora_export_options options = defaults;
    plora_export_report report = PLORA_EXPORT_REPORT_INIT;
    fixture_open(&f, 1, &given);
    options.live = 1;
    CHECK_OK(export_to(&f, "peft", options, &report)); /* B = 0 */
    CHECK(report.records == 0 && report.live == 0 && report.rank == 1 && report.error == 0.0, "nothing: rank %lld",
          (long long)report.rank);
    plora_adapters *adapters;
    CHECK_OK(plora_adapters_load(f.model, file_path("peft"), NULL, &adapters));
    for (int layer = 0; layer < LAYERS; ++layer) {
        struct product product = read_product(adapters, layer);
        for (int64_t i = 0; i < kinds[layer % PER_BLOCK].n; ++i)
            CHECK(product.b[i] == 0.0f, "nothing: B is %g", (double)product.b[i]);
        product_free(&product);
    }
    plora_adapters_destroy(adapters);
    options.rank = 2;
    CHECK_OK(export_to(&f, "peft", options, &report));
    CHECK(report.rank == 1 && report.norm == 0.0 && report.error == 0.0, "nothing, truncated");

    for (int s = 0; s < 3; ++s)
        train_and_unload(&f, 1.0);
    options = defaults;
    CHECK_OK(export_to(&f, "peft", options, &report));
    CHECK(report.records == 3 && report.live == 0, "%lld records", (long long)report.records);
    --f.count; /* is to be left out */
    options.records = 2;
    options.live = 0;
    check_peft(&f, options, 1, "2 of 3 records");
    fixture_close(&f);
}

/* ---------------------------------------------------------------------------------------------------------------- GGUF */

struct reader {
    const unsigned char *bytes;
    size_t count, at;
};

static uint64_t read_number(struct reader *reader, int bytes)
{
    CHECK(reader->at + (size_t)bytes <= reader->count, "the file ends at byte %zu", reader->at);
    uint64_t number = 0;
    for (int i = 0; i < bytes; ++i)
        number |= (uint64_t)reader->bytes[reader->at++] << 8 * i;
    return number;
}

static void read_string(struct reader *reader, char text[128])
{
    const uint64_t length = read_number(reader, 8);
    CHECK(length < 128 && reader->at + length <= reader->count, "a string of %llu bytes", (unsigned long long)length);
    memcpy(text, reader->bytes + reader->at, length);
    text[length] = '\0';
    reader->at += length;
}

static float float_of(uint64_t bits)
{
    return plora__float_from_bits((uint32_t)bits);
}

/* The products of a file, as llama.cpp would use them, with B's rows where Hugging Face has them. Returns alpha. */
static float read_gguf(const char *path, struct product products[LAYERS])
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

static void gguf(void **state)
{
    static const double alphas[] = {2.5 * 6, 0.0,
                                    6.0}; /* one scale for all; ranks differ; scales differ, so B has them */
    (void)state;
    for (int round = 0; round < CHECK_COUNT(alphas); ++round) {
        struct fixture f;
        plora_adapters_options given = different_ranks(2);
        if (round != 1) given.override_count = 0;
        fixture_open(&f, 1, &given);
        train_and_unload(&f, 1.0);
        train_and_unload(&f, round == 2 ? 0.3 : 1.0);
        train(&f, 1.0);
        plora_export_options options = defaults;
        struct product products[LAYERS];
        options.format = PLORA_EXPORT_GGUF;
        options.heads = HEADS;
        options.kv_heads = KV_HEADS;
        CHECK_OK(export_to(&f, "adapter.gguf", options, NULL));
        CHECK_CLOSE((double)read_gguf(file_path("adapter.gguf"), products), alphas[round], 0.0, "alpha");
        for (int layer = 0; layer < LAYERS; ++layer) {
            const int64_t n = kinds[layer % PER_BLOCK].n, k = kinds[layer % PER_BLOCK].k;
            double magnitude[24 * 24];
            double *sum = dense_sum(&f, layer, magnitude);
            for (int64_t i = 0; i < n * k; ++i)
                CHECK_CLOSE(product_element(&products[layer], k, i / k, i % k), sum[i], 1.01 * 0x1p-24 * magnitude[i],
                            "round %d, layer %d", round, layer);
            product_free(&products[layer]);
            free(sum);
        }
        options.rank = 1;
        CHECK_OK(export_to(&f, "adapter.gguf", options, NULL));
        CHECK_CLOSE((double)read_gguf(file_path("adapter.gguf"), products), 1.0, 0.0, "alpha of rank 1");
        for (int layer = 0; layer < LAYERS; ++layer) {
            CHECK(products[layer].rank == 1, "rank %lld", (long long)products[layer].rank);
            product_free(&products[layer]);
        }
        fixture_close(&f);
    }
}

/* ---------------------------------------------------------------------------------------------------------- compaction */

/* A model of the CPU with the weights that the fixture began with. */
static plora_model *original_model(struct fixture *f, plora_context **context)
{
    plora_model *model;
    CHECK_OK(plora_context_create(NULL, context));
    CHECK_OK(plora_model_create(*context, &model));
    for (int i = 0; i < LAYERS; ++i) {
        plora_linear linear = PLORA_LINEAR_INIT;
        char name[64];
        snprintf(name, sizeof name, "model.layers.%d.%s", i / PER_BLOCK, kinds[i % PER_BLOCK].layer);
        linear.name = name;
        linear.weight = f->weights[i].m;
        linear.weight.data = f->weights[i].snapshot + ((unsigned char *)f->weights[i].m.data - f->weights[i].memory);
        CHECK_OK(plora_model_add_linear(model, &linear, NULL));
    }
    return model;
}

static void reopen(struct fixture *f, const char *name, plora_model *original)
{
    plora_ledger_options options = PLORA_LEDGER_OPTIONS_INIT;
    plora_ledger_destroy(f->ledger);
    f->ledger = NULL;
    options.path = name == NULL ? NULL : file_path(name);
    options.original = original;
    options.sync = 0;
    CHECK_OK(plora_ledger_open(f->adapters, &options, &f->ledger));
}

/* The exact export has the dense sum, up to fp32 and `error` of its norm. */
static void check_sum(struct fixture *f, double error, const char *what)
{
    plora_export_options options = defaults;
    struct product products[LAYERS];
    options.format = PLORA_EXPORT_GGUF; /* whose ranks nothing bounds */
    options.heads = HEADS;
    options.kv_heads = KV_HEADS;
    CHECK_OK(export_to(f, "sum.gguf", options, NULL));
    read_gguf(file_path("sum.gguf"), products);
    double lost = 0, size = 0;
    for (int layer = 0; layer < LAYERS; ++layer) {
        const int64_t n = kinds[layer % PER_BLOCK].n, k = kinds[layer % PER_BLOCK].k;
        double *sum = dense_sum(f, layer, NULL);
        size = hypot(size, norm(sum, n * k));
        for (int64_t i = 0; i < n * k; ++i)
            lost = hypot(lost, sum[i] - product_element(&products[layer], k, i / k, i % k));
        product_free(&products[layer]);
        free(sum);
    }
    CHECK(lost <= (error + 1e-6) * size, "%s: error %g, at most %g", what, lost / size, error);
}

static void compacted(void **state)
{
    (void)state;
    for (int in_file = 0; in_file < 2; ++in_file) {
        struct fixture f;
        const plora_adapters_options given = different_ranks(3);
        plora_export_options options = defaults;
        plora_export_report report = PLORA_EXPORT_REPORT_INIT;
        plora_ledger_record_info info = PLORA_LEDGER_RECORD_INFO_INIT;
        plora_context *context;
        fixture_open(&f, 2, &given);
        plora_model *original = original_model(&f, &context);
        reopen(&f, in_file ? "ledger" : NULL, original);
        for (int s = 0; s < 5; ++s)
            train_and_unload(&f, s % 2 == 0 ? 1.0 : 0.4);

        /* Records 1 to 3 become one, without loss: the sum stays, and the weights before it can be rebuilt, those behind not. */
        CHECK_OK(plora_ledger_compact(f.ledger, file_path("small"), 1, 3, NULL, &report));
        CHECK(report.records == 3 && report.error <= 1e-6, "%lld records, error %g", (long long)report.records,
              report.error);
        CHECK(plora_ledger_length(f.ledger) == 5, "the ledger itself has changed");
        reopen(&f, "small", original);
        CHECK(plora_ledger_length(f.ledger) == 3 && plora_ledger_position(f.ledger) == 3, "length %lld, position %lld",
              (long long)plora_ledger_length(f.ledger), (long long)plora_ledger_position(f.ledger));
        CHECK_OK(plora_ledger_record(f.ledger, 1, &info));
        CHECK(info.folded == 3 && info.stage == 3 && info.fold_error <= 1e-6, "folded %lld, error %g",
              (long long)info.folded, info.fold_error);
        CHECK_OK(plora_ledger_record(f.ledger, 2, &info));
        CHECK(info.folded == 0 && info.stage == 4, "folded %lld", (long long)info.folded);
        check_sum(&f, 0.0, "folded without loss");
        CHECK_FAILS(plora_ledger_roll_back(f.ledger, 2, 0), PLORA_ERROR_UNSUPPORTED, "record 1 stands for 3 records");
        CHECK(plora_ledger_position(f.ledger) == 3, "a refused roll back has done something");

        /* It is gone on with, and folded once more, now to a low rank. */
        train_and_unload(&f, 1.0);
        check_sum(&f, 0.0, "one stage more");
        options.rank = 2;
        CHECK_OK(plora_ledger_compact(f.ledger, file_path("smaller"), 0, 3, &options, &report));
        CHECK(report.rank == 2 && report.error > 0.01 && report.error < 1.0, "rank %lld, error %g",
              (long long)report.rank, report.error);
        reopen(&f, "smaller", original);
        CHECK_OK(plora_ledger_record(f.ledger, 0, &info));
        CHECK(info.folded == 5, "folded %lld", (long long)info.folded);
        CHECK_CLOSE(info.fold_error, report.error, 1e-6, "the error on record");
        CHECK(plora_ledger_length(f.ledger) == 2 && plora_ledger_position(f.ledger) == 2, "length, position");
        check_sum(&f, 2 * report.error, "folded to rank 2");
        CHECK_OK(plora_ledger_verify(f.ledger)); /* by their hash */
        CHECK_OK(plora_ledger_truncate(f.ledger, 2));
        CHECK_OK(plora_ledger_roll_back(f.ledger, 2, 0)); /* is where they are */
        CHECK_OK(plora_ledger_roll_back(f.ledger, 0, 0));
        CHECK(plora_ledger_position(f.ledger) == 0, "position %lld", (long long)plora_ledger_position(f.ledger));
        fixture_close(&f);
        plora_model_destroy(original);
        plora_context_destroy(context);
        unlink(file_path("ledger"));
        unlink(file_path("small"));
        unlink(file_path("smaller"));
    }
}

static void refused_compactions(void **state)
{
    (void)state;
    struct fixture f;
    const plora_adapters_options given = different_ranks(2);
    plora_export_options options = defaults;
    fixture_open(&f, 1, &given);
    reopen(&f, "own", NULL);
    train_and_unload(&f, 1.0);
    train_and_unload(&f, 1.0);
    mkdir(file_path("room"), 0700);
    char path[256];
    snprintf(path, sizeof path, "%s", file_path("room/x"));
    CHECK_FAILS(plora_ledger_compact(f.ledger, path, 0, 3, NULL, NULL), PLORA_ERROR_INVALID_ARGUMENT, "has 2");
    CHECK_FAILS(plora_ledger_compact(f.ledger, path, -1, 1, NULL, NULL), PLORA_ERROR_INVALID_ARGUMENT, "from -1 on");
    CHECK_FAILS(plora_ledger_compact(f.ledger, path, 1, 0, NULL, NULL), PLORA_ERROR_INVALID_ARGUMENT, "0 records");
    CHECK_FAILS(plora_ledger_compact(f.ledger, "", 0, 1, NULL, NULL), PLORA_ERROR_INVALID_ARGUMENT, "path is empty");
    CHECK_FAILS(plora_ledger_compact(f.ledger, file_path("no/x"), 0, 1, NULL, NULL), PLORA_ERROR_IO, "No such file");
    CHECK_FAILS(plora_ledger_compact(f.ledger, file_path("own"), 0, 1, NULL, NULL), PLORA_ERROR_INVALID_ARGUMENT,
                "own file");
    options.live = 0;
    CHECK_FAILS(plora_ledger_compact(f.ledger, path, 0, 1, &options, NULL), PLORA_ERROR_INVALID_ARGUMENT,
                "only rank and max_error");
    int done = 0;
    for (int64_t k = 1; !done; ++k) {
        const int64_t live = f.allocator.live, failed = f.allocator.failed;
        f.allocator.fail_at = f.allocator.calls + k;
        const plora_status status = plora_ledger_compact(f.ledger, path, 0, 1, NULL, NULL);
        done = f.allocator.failed == failed;
        CHECK(status == (done ? PLORA_OK : PLORA_ERROR_OUT_OF_MEMORY), "allocation %lld: status %d", (long long)k,
              status);
        CHECK(f.allocator.live == live && file_count(file_path("room")) == done, "allocation %lld: something is left",
              (long long)k);
        CHECK(done ? k > 10 : k < 200, "%lld allocations", (long long)k);
    }
    f.allocator.fail_at = 0;
    fixture_close(&f);
}

/* -------------------------------------------------------------------------------------------------------------- errors */

static void refused(void **state)
{
    static const struct {
        plora_export_options options;
        plora_status status;
        const char *message;
    } cases[] = {
        {{sizeof(plora_export_options), 2, 1, -1, 0, 0.0, 0, 0}, PLORA_ERROR_INVALID_ARGUMENT, "format 2"},
        {{sizeof(plora_export_options), 0, 2, -1, 0, 0.0, 0, 0}, PLORA_ERROR_INVALID_ARGUMENT, "live is 2"},
        {{sizeof(plora_export_options), 0, 1, 2, 0, 0.0, 0, 0}, PLORA_ERROR_INVALID_ARGUMENT, "the ledger has 1"},
        {{sizeof(plora_export_options), 0, 1, -2, 0, 0.0, 0, 0}, PLORA_ERROR_INVALID_ARGUMENT, "records is -2"},
        {{sizeof(plora_export_options), 0, 1, -1, -1, 0.0, 0, 0}, PLORA_ERROR_INVALID_ARGUMENT, "rank is -1"},
        {{sizeof(plora_export_options), 0, 1, -1, 0, 1.0, 0, 0}, PLORA_ERROR_INVALID_ARGUMENT, "max_error is 1"},
        {{sizeof(plora_export_options), 0, 1, -1, 0, NAN, 0, 0}, PLORA_ERROR_INVALID_ARGUMENT, "max_error"},
        {{sizeof(plora_export_options), 1, 1, -1, 0, 0.0, -1, 0}, PLORA_ERROR_INVALID_ARGUMENT, "heads is -1"},
        {{sizeof(plora_export_options), 1, 1, -1, 0, 0.0, 0, 0}, PLORA_ERROR_INVALID_ARGUMENT, "num_attention_heads"},
        {{sizeof(plora_export_options), 1, 1, -1, 0, 0.0, 3, 1}, PLORA_ERROR_SHAPE, "16 rows are not 3 heads"},
        {{sizeof(plora_export_options), 1, 1, -1, 0, 0.0, 16, 8}, PLORA_ERROR_SHAPE, "16 heads of an even size"},
        {{sizeof(plora_export_options), 1, 1, -1, 0, 0.0, 2, 2}, PLORA_ERROR_SHAPE, "those of other layers"},
    };
    (void)state;
    struct fixture f;
    const plora_adapters_options given = different_ranks(2);
    fixture_open(&f, 1, &given);
    train_and_unload(&f, 1.0);
    for (int i = 0; i < CHECK_COUNT(cases); ++i)
        CHECK_FAILS(export_to(&f, "refused", cases[i].options, NULL), cases[i].status, cases[i].message);
    CHECK(access(file_path("refused"), F_OK) != 0, "a refused export left something behind");
    CHECK_FAILS(plora_ledger_export(NULL, "x", NULL, NULL), PLORA_ERROR_INVALID_ARGUMENT, "ledger is NULL");
    CHECK_FAILS(plora_ledger_export(f.ledger, NULL, NULL, NULL), PLORA_ERROR_INVALID_ARGUMENT, "path is NULL");
    CHECK_FAILS(plora_ledger_export(f.ledger, file_path("no/peft"), NULL, NULL), PLORA_ERROR_IO, "No such file");
    plora_export_report report = PLORA_EXPORT_REPORT_INIT;
    report.layer_capacity = 1;
    CHECK_FAILS(plora_ledger_export(f.ledger, file_path("refused"), NULL, &report), PLORA_ERROR_INVALID_ARGUMENT,
                "layer_capacity");
    train(&f, 1.0);
    plora_adapter adapter = PLORA_ADAPTER_INIT;
    const float bad = NAN;
    CHECK_OK(plora_adapters_layer(f.adapters, 3, &adapter));
    device_transfer((float *)adapter.b.data + 5, &bad, sizeof bad);
    CHECK_FAILS(plora_ledger_export(f.ledger, file_path("refused"), NULL, NULL), PLORA_ERROR_NON_FINITE,
                "o_proj': B[5] is");
    CHECK(access(file_path("refused"), F_OK) != 0, "a refused export left something behind");
    fixture_close(&f);
}

/* Layers that GGUF has no name for, and an output head that is an embedding as well. */
static void refused_names(void **state)
{
    static const struct {
        const char *first, *second, *message; /* second: tied to the first */
        int names;
    } cases[] = {
        {"transformer.h.0.attn.c_attn", NULL, "'transformer.h.0.attn.c_attn'", 0},
        {"model.layers.0.self_attn.qkv_proj", NULL, "qkv_proj", 0},
        {"model.layers.x.mlp.up_proj", NULL, "layers.x", 0},
        {"model.embed_tokens", "lm_head", "'lm_head' is tied to 'model.embed_tokens'", 0},
        {"lm_head", NULL, "", 1},
    };
    (void)state;
    for (int i = 0; i < CHECK_COUNT(cases); ++i) {
        plora_context *context = check_context(NULL, 1, 0);
        plora_model *model;
        plora_adapters *adapters;
        plora_ledger *ledger;
        struct check_matrix weight = check_matrix_new(6, 4, 4, PLORA_F32);
        check_matrix_random(&weight, 1.0);
        device_refresh(weight.memory);
        CHECK_OK(plora_model_create(context, &model));
        CHECK_OK(check_add_linear(model, cases[i].first, &weight.m, NULL, 0, 0, NULL));
        if (cases[i].second != NULL) CHECK_OK(check_add_linear(model, cases[i].second, &weight.m, NULL, 0, 0, NULL));
        plora_adapters_options given = PLORA_ADAPTERS_OPTIONS_INIT;
        plora_export_options options = defaults;
        given.rank = 2;
        options.format = PLORA_EXPORT_GGUF;
        options.heads = 1;
        CHECK_OK(plora_adapters_create(model, &given, &adapters));
        CHECK_OK(plora_ledger_open(adapters, NULL, &ledger));
        if (cases[i].names)
            CHECK_OK(plora_ledger_export(ledger, file_path("named.gguf"), &options, NULL));
        else
            CHECK_FAILS(plora_ledger_export(ledger, file_path("refused.gguf"), &options, NULL), PLORA_ERROR_UNSUPPORTED,
                        cases[i].message);
        plora_ledger_destroy(ledger);
        plora_adapters_destroy(adapters);
        plora_model_destroy(model);
        plora_context_destroy(context);
        check_matrix_free(&weight);
    }
    CHECK(access(file_path("refused.gguf"), F_OK) != 0, "a refused export left something behind");
}

/* Every allocation fails once: the error comes back, nothing leaks, no file appears half. */
static void out_of_memory(void **state)
{
    (void)state;
    struct fixture f;
    const plora_adapters_options given = different_ranks(2);
    fixture_open(&f, 2, &given);
    train_and_unload(&f, 1.0);
    train(&f, 1.0);
    mkdir(file_path("memory"), 0700);
    for (int format = PLORA_EXPORT_PEFT; format <= PLORA_EXPORT_GGUF; ++format) {
        plora_export_options options = defaults;
        options.format = format;
        options.heads = HEADS;
        options.kv_heads = KV_HEADS;
        options.rank = 2;
        int done = 0;
        for (int64_t k = 1; !done; ++k) {
            const int64_t live = f.allocator.live, failed = f.allocator.failed;
            f.allocator.fail_at = f.allocator.calls + k;
            const plora_status status =
                export_to(&f, format == PLORA_EXPORT_GGUF ? "memory/x" : "memory/peft", options, NULL);
            done = f.allocator.failed == failed;
            CHECK(status == (done ? PLORA_OK : PLORA_ERROR_OUT_OF_MEMORY), "allocation %lld: status %d", (long long)k,
                  status);
            CHECK(f.allocator.live == live, "allocation %lld: %lld blocks left", (long long)k,
                  (long long)(f.allocator.live - live));
            CHECK(done ? k > 10 : k < 200, "%lld allocations", (long long)k);
            if (format == PLORA_EXPORT_GGUF)
                CHECK(file_count(file_path("memory")) == 1 + done, "allocation %lld: %d files", (long long)k,
                      file_count(file_path("memory")));
        }
        f.allocator.fail_at = 0;
    }
    fixture_close(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(exact),         cmocka_unit_test(same_bits),
        cmocka_unit_test(truncated),     cmocka_unit_test(parts),
        cmocka_unit_test(gguf),          cmocka_unit_test(refused),
        cmocka_unit_test(refused_names), cmocka_unit_test(out_of_memory),
        cmocka_unit_test(compacted),     cmocka_unit_test(refused_compactions),
    };
    check_begin("test_export");
    return cmocka_run_group_tests(tests, file_setup, file_teardown);
}
