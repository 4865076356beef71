/* test_gguf.c: adapters from GGUF files: what plora_ledger_export() wrote comes back to the bit, files by a writer of the test's own
 * (dtypes, values, alignments as llama.cpp's converter has them) mean what they should, and what is hostile or not supported is
 * refused by name. */
#include "adapter_files_fixture.h"

enum { PER_BLOCK = 7, BLOCKS = 2, LAYERS = BLOCKS * PER_BLOCK + 1, HEADS = 4, KV_HEADS = 2, MAX_BYTES = 1 << 16 };

static const struct {
    const char *layer, *gguf;
    int64_t n, k;
    int heads;
} kinds[PER_BLOCK] = {
    {"self_attn.q_proj", "attn_q", 24, 10, HEADS}, {"self_attn.k_proj", "attn_k", 12, 10, KV_HEADS},
    {"self_attn.v_proj", "attn_v", 12, 10, 0},     {"self_attn.o_proj", "attn_output", 10, 24, 0},
    {"mlp.gate_proj", "ffn_gate", 14, 10, 0},      {"mlp.up_proj", "ffn_up", 14, 10, 0},
    {"mlp.down_proj", "ffn_down", 10, 14, 0},
};

static void layer_name(int layer, char name[64])
{
    if (layer == LAYERS - 1)
        snprintf(name, 64, "lm_head");
    else
        snprintf(name, 64, "model.layers.%d.%s", layer / PER_BLOCK, kinds[layer % PER_BLOCK].layer);
}

static int64_t rows_of(int layer)
{
    return layer == LAYERS - 1 ? 17 : kinds[layer % PER_BLOCK].n;
}

static int64_t columns_of(int layer)
{
    return layer == LAYERS - 1 ? 10 : kinds[layer % PER_BLOCK].k;
}

static void fixture_open(struct fixture *f)
{
    struct fixture_layer layers[LAYERS];
    for (int i = 0; i < LAYERS; ++i) {
        layers[i] = (struct fixture_layer){"", rows_of(i), columns_of(i), columns_of(i), 0};
        layer_name(i, layers[i].name);
    }
    layers[LAYERS - 1].flags = PLORA_LAYER_HEAD;
    fixture_open_layers(f, layers, LAYERS);
}

static plora_adapters_options with_heads(int32_t heads, int32_t kv_heads)
{
    plora_adapters_options options = PLORA_ADAPTERS_OPTIONS_INIT;
    options.heads = heads;
    options.kv_heads = kv_heads;
    return options;
}

/* -------------------------------------------------------------------------------------------------------- round trips */

/* Every layer's A to the bit, and s B: to the bit where `exact`, else up to the one rounding of B that the export does. */
static void check_same(plora_adapters *saved, plora_adapters *loaded, int exact)
{
    for (int32_t layer = 0; layer < LAYERS; ++layer) {
        plora_adapter x = PLORA_ADAPTER_INIT, y = PLORA_ADAPTER_INIT;
        const plora_status status = plora_adapters_layer(saved, layer, &x);
        CHECK(plora_adapters_layer(loaded, layer, &y) == status, "layer %d is in one set only", layer);
        if (status != PLORA_OK) continue;
        CHECK(x.a.rows == y.a.rows, "layer %d: ranks %lld and %lld", layer, (long long)x.a.rows, (long long)y.a.rows);
        if (exact) CHECK_CLOSE(y.scale, x.scale, 0.0, "scale of layer %d", layer);
        for (int is_b = 0; is_b < 2; ++is_b) {
            const plora_matrix *p = is_b ? &x.b : &x.a, *q = is_b ? &y.b : &y.a;
            float *want = values_of(p), *got = values_of(q);
            for (int64_t i = 0; i < p->rows * p->columns; ++i) {
                const double scaled = (double)want[i] * x.scale;
                if (exact || !is_b)
                    CHECK(want[i] == got[i], "layer %d, %c, element %lld", layer, "AB"[is_b], (long long)i);
                else
                    CHECK_CLOSE((double)got[i] * y.scale, scaled, 0x1p-24 * fabs(scaled), "layer %d, s B, element %lld",
                                layer, (long long)i);
            }
            free(want);
            free(got);
        }
    }
}

static void round_trips(void **state)
{
    (void)state;
    struct fixture f;
    fixture_open(&f);
    const plora_adapters_override overrides[] = {{"v_proj", 7.0, 1, 0}, {"model.layers.1.mlp.*", 0.0, 5, 0}};
    for (int round = 0; round < 4; ++round) {
        plora_adapters_options options = PLORA_ADAPTERS_OPTIONS_INIT, given = with_heads(HEADS, KV_HEADS);
        plora_adapters *saved, *loaded;
        plora_ledger *ledger;
        options.rank = 3;
        options.alpha = round == 0 ? 6.0 : 5.0; /* 5 / 3 is no number of fp32, but alpha is */
        options.rslora = round == 3;
        options.targets = round == 2 ? "q_proj,v_proj,lm_head" : "all-linear,lm_head";
        options.overrides = overrides;
        options.override_count = round == 1 ? 2 : 0;
        CHECK_OK(plora_adapters_create(f.model, &options, &saved));
        randomise(&f, saved);
        CHECK_OK(plora_ledger_open(saved, NULL, &ledger));
        plora_export_options request = PLORA_EXPORT_OPTIONS_INIT;
        request.format = PLORA_EXPORT_GGUF;
        request.heads = HEADS;
        request.kv_heads = KV_HEADS;
        CHECK_OK(plora_ledger_export(ledger, file_path("a.gguf"), &request, NULL));
        CHECK_OK(plora_adapters_load(f.model, file_path("a.gguf"), &given, &loaded));
        /* Scales that differ, or an alpha that fp32 does not hold, are multiplied into B. */
        check_same(saved, loaded, round == 0 || round == 2);
        plora_ledger_destroy(ledger);
        /* Once more: what is exported now has one scale, or none. */
        CHECK_OK(plora_ledger_open(loaded, NULL, &ledger));
        CHECK_OK(plora_ledger_export(ledger, file_path("b.gguf"), &request, NULL));
        plora_ledger_destroy(ledger);
        size_t count, again_count;
        unsigned char *first = file_read(file_path("a.gguf"), &count),
                      *again = file_read(file_path("b.gguf"), &again_count);
        if (round == 0 || round == 2)
            CHECK(count == again_count && memcmp(first, again, count) == 0, "round %d: the files differ", round);
        free(first);
        free(again);
        plora_adapters_destroy(saved);
        plora_adapters_destroy(loaded);
    }
    fixture_close(&f);
}

/* ---------------------------------------------------------------------------------------------- a writer of the test's */

struct text {
    unsigned char bytes[MAX_BYTES];
    size_t count;
};

static void put(struct text *text, const void *bytes, size_t count)
{
    CHECK(text->count + count <= MAX_BYTES, "the test writes too much");
    memcpy(text->bytes + text->count, bytes, count);
    text->count += count;
}

static void put_number(struct text *text, uint64_t number, int bytes)
{
    for (int i = 0; i < bytes; ++i)
        put(text, &(unsigned char){(unsigned char)(number >> 8 * i)}, 1);
}

static void put_text(struct text *text, const char *string)
{
    put_number(text, strlen(string), 8);
    put(text, string, strlen(string));
}

static void put_value(struct text *text, const char *key, const char *string)
{
    put_text(text, key);
    put_number(text, 8, 4);
    put_text(text, string);
}

static void put_alpha(struct text *text, float alpha)
{
    put_text(text, "adapter.lora.alpha");
    put_number(text, 6, 4);
    put_number(text, plora__float_bits(alpha), 4);
}

/* What a file is made of: one of these fields at a time is made bad. */
struct recipe {
    const char *magic, *architecture, *type, *general_type;
    uint32_t version;
    int tensors, values; /* as counted in the header, more than there are */
    int more_values;     /* as the converter writes them */
    uint64_t alignment;  /* 0 = not written */
    float alpha;
    int dtype;         /* of plora.h */
    uint32_t type_id;  /* of ggml; 0xff = that of dtype */
    const char *names; /* %c = a, b */
    int64_t rank, n, k;
    int dimensions;
    uint64_t offset_error, extent; /* added to the second offset; in place of K */
    const char *bad_key;           /* a value more */
    float value;                   /* of element 3 of B */
};

static const struct recipe good = {
    .magic = "GGUF",
    .architecture = "llama",
    .type = "lora",
    .general_type = "adapter",
    .version = 3,
    .alpha = 6.0f,
    .type_id = 0xff,
    .names = "blk.0.attn_q.weight.lora_%c",
    .rank = 2,
    .n = 24,
    .k = 10,
    .dimensions = 2,
    .value = 1.0f,
};

static size_t alignment_of(const struct recipe *r)
{
    return r->alignment > 0 ? r->alignment : 32;
}

static void pad(struct text *text, size_t from, size_t alignment)
{
    while ((text->count - from) % alignment != 0)
        put_number(text, 0, 1);
}

static void put_values(struct text *text, const struct recipe *r)
{
    if (r->architecture != NULL) put_value(text, "general.architecture", r->architecture);
    if (r->type != NULL) put_value(text, "adapter.type", r->type);
    if (r->general_type != NULL) put_value(text, "general.type", r->general_type);
    put_alpha(text, r->alpha);
    if (r->alignment > 0) {
        put_text(text, "general.alignment");
        put_number(text, 4, 4);
        put_number(text, r->alignment, 4);
    }
    if (r->bad_key != NULL) put_value(text, r->bad_key, "x");
    if (!r->more_values) return;
    put_value(text, "general.name", "Some adapter \xc3\xa4, with spaces");
    put_text(text, "general.tags");
    put_number(text, 9, 4); /* an array of strings */
    put_number(text, 8, 4);
    put_number(text, 2, 8);
    put_text(text, "text-generation");
    put_text(text, "");
    put_text(text, "some.numbers");
    put_number(text, 9, 4); /* of f64 */
    put_number(text, 12, 4);
    put_number(text, 3, 8);
    for (int i = 0; i < 3; ++i)
        put_number(text, 77, 8);
    put_text(text, "general.quantization_version");
    put_number(text, 4, 4);
    put_number(text, 2, 4);
    put_text(text, "some.flag");
    put_number(text, 7, 4);
    put_number(text, 1, 1);
}

static float element(int is_b, int64_t i)
{
    return (float)((i * 7 + is_b * 3) % 31 - 15) / 16.0f; /* exact in every dtype */
}

static void put_file(struct text *text, const struct recipe *r)
{
    static const uint32_t ids[] = {[PLORA_F32] = 0, [PLORA_BF16] = 30, [PLORA_F16] = 1};
    const size_t size = plora__dtype_size(r->dtype), alignment = alignment_of(r);
    const uint64_t a_bytes = (uint64_t)(r->rank * r->k) * size;
    const int values = (r->architecture != NULL) + (r->type != NULL) + (r->general_type != NULL) + 1 +
                       (r->alignment > 0) + (r->bad_key != NULL) + (r->more_values ? 5 : 0);
    text->count = 0;
    put(text, r->magic, 4);
    put_number(text, r->version, 4);
    put_number(text, (uint64_t)r->tensors + 2, 8);
    put_number(text, (uint64_t)values + (uint64_t)r->values, 8);
    put_values(text, r);
    for (int is_b = 0; is_b < 2; ++is_b) {
        char name[128];
        snprintf(name, sizeof name, r->names, "ab"[is_b]);
        put_text(text, name);
        put_number(text, (uint64_t)r->dimensions, 4);
        put_number(text, is_b ? (uint64_t)r->rank : r->extent > 0 ? r->extent : (uint64_t)r->k, 8);
        for (int d = 1; d < r->dimensions; ++d)
            put_number(text, d > 1 ? 1 : (uint64_t)(is_b ? r->n : r->rank), 8);
        put_number(text, r->type_id == 0xff ? ids[r->dtype] : r->type_id, 4);
        put_number(text, is_b ? (a_bytes + alignment - 1) / alignment * alignment + r->offset_error : 0, 8);
    }
    pad(text, 0, alignment);
    const size_t data = text->count;
    for (int is_b = 0; is_b < 2; ++is_b) {
        for (int64_t i = 0; i < r->rank * (is_b ? r->n : r->k); ++i) {
            unsigned char bytes[4];
            plora__store(bytes, 0, r->dtype, is_b && i == 3 ? element(1, 3) * r->value : element(is_b, i));
            put(text, bytes, size);
        }
        pad(text, data, alignment);
    }
}

static plora_status load(struct fixture *f, const struct recipe *recipe, const plora_adapters_options *options,
                         plora_adapters **adapters)
{
    static struct text text;
    put_file(&text, recipe);
    file_write(file_path("file.gguf"), text.bytes, text.count);
    return plora_adapters_load(f->model, file_path("file.gguf"), options, adapters);
}

/* Query rows of 4 heads of 6: 0 1 2 3 4 5 of llama.cpp are 0 3 1 4 2 5. */
static void check_loaded(plora_adapters *adapters, int32_t layer, double scale, int64_t head_rows, const char *what)
{
    plora_adapter view = PLORA_ADAPTER_INIT;
    CHECK_OK(plora_adapters_layer(adapters, layer, &view));
    CHECK_CLOSE(view.scale, scale, 0.0, "%s: scale", what);
    float *a = values_of(&view.a), *b = values_of(&view.b);
    for (int64_t i = 0; i < view.a.rows * view.a.columns; ++i)
        CHECK(a[i] == element(0, i), "%s: A, element %lld", what, (long long)i);
    for (int64_t row = 0; row < view.b.rows; ++row) {
        int64_t to = row;
        if (head_rows > 0) {
            const int64_t head = row / head_rows, pair = row % head_rows / 2, part = row % 2;
            to = head * head_rows + part * (head_rows / 2) + pair;
        }
        for (int64_t r = 0; r < view.b.columns; ++r)
            CHECK(b[to * view.b.columns + r] == element(1, row * view.b.columns + r), "%s: B [%lld,%lld]", what,
                  (long long)to, (long long)r);
    }
    free(a);
    free(b);
}

static void meanings(void **state)
{
    (void)state;
    struct fixture f;
    fixture_open(&f);
    plora_adapters *adapters;
    const plora_adapters_options heads = with_heads(HEADS, KV_HEADS), same = with_heads(KV_HEADS, 0);
    for (int i = 0; i < 6 * 3; ++i) {
        struct recipe r = good;
        r.dtype = i % 3;
        if (i / 3 == 1) r.more_values = 1;
        if (i / 3 == 2) r.alignment = 64;
        if (i / 3 == 3) r.version = 2;
        if (i / 3 == 4) r.alpha = 0.0f; /* no scale */
        if (i / 3 == 5) r.general_type = NULL;
        CHECK_OK(load(&f, &r, &heads, &adapters));
        check_loaded(adapters, 0, i / 3 == 4 ? 1.0 : 3.0, 6, "query");
        CHECK_FAILS(plora_adapters_layer(adapters, 1, &(plora_adapter)PLORA_ADAPTER_INIT), PLORA_ERROR_NOT_FOUND, "");
        plora_adapters_destroy(adapters);
    }
    struct recipe r = good;
    r.names = "blk.1.attn_k.weight.lora_%c";
    r.n = 12;
    CHECK_OK(load(&f, &r, &heads, &adapters));
    check_loaded(adapters, PER_BLOCK + 1, 3.0, 6, "key");
    plora_adapters_destroy(adapters);
    CHECK_OK(load(&f, &r, &same, &adapters)); /* kv_heads = 0: as many as heads */
    check_loaded(adapters, PER_BLOCK + 1, 3.0, 6, "key of as many heads");
    plora_adapters_destroy(adapters);
    r.names = "blk.0.attn_v.weight.lora_%c";
    CHECK_OK(load(&f, &r, NULL, &adapters)); /* no order to know */
    check_loaded(adapters, 2, 3.0, 0, "value");
    plora_adapters_destroy(adapters);
    r.names = "output.weight.lora_%c";
    r.n = 17;
    r.rank = 3;
    CHECK_OK(load(&f, &r, NULL, &adapters));
    check_loaded(adapters, LAYERS - 1, 2.0, 0, "head");
    plora_adapters_destroy(adapters);
    fixture_close(&f);
}

static void refused(void **state)
{
    (void)state;
    struct fixture f;
    fixture_open(&f);
    enum { CASES = 33 };
    static const struct {
        plora_status status;
        const char *message, *more;
    } cases[CASES] = {
        {PLORA_ERROR_FORMAT, "not a GGUF file", ""},
        {PLORA_ERROR_UNSUPPORTED, "version 1", ""},
        {PLORA_ERROR_UNSUPPORTED, "version 50331648", "little-endian"},
        {PLORA_ERROR_UNSUPPORTED, "architecture is 'qwen2'", ""},
        {PLORA_ERROR_FORMAT, "no value 'general.architecture'", ""},
        {PLORA_ERROR_UNSUPPORTED, "adapter.type at byte", "'alora'"},
        {PLORA_ERROR_FORMAT, "no value 'adapter.type'", ""},
        {PLORA_ERROR_UNSUPPORTED, "general.type at byte", "'model'"},
        {PLORA_ERROR_FORMAT, "alignment at byte", "is 24"},
        {PLORA_ERROR_FORMAT, "alignment at byte", "is 4:"},
        {PLORA_ERROR_FORMAT, "alpha at byte", "nan"},
        {PLORA_ERROR_UNSUPPORTED, "'blk.0.attn_q.weight.lora_a' is of type Q8_0 at byte", ""},
        {PLORA_ERROR_UNSUPPORTED, "'blk.0.attn_q.weight.lora_a' is of type 200 at byte", ""},
        {PLORA_ERROR_UNSUPPORTED, "3 dimensions at byte", "'blk.0.attn_q.weight.lora_a'"},
        {PLORA_ERROR_FORMAT, "'blk.0.attn_q.weight.lora_b': its offset at byte",
         "is 128, but the one before it ends at 80"},
        {PLORA_ERROR_FORMAT, "'blk.0.attn_q.weight.lora_b': its offset at byte", "must be 96"},
        {PLORA_ERROR_FORMAT, "the extent at byte", "'blk.0.attn_q.weight.lora_a'"},
        {PLORA_ERROR_FORMAT, "more bytes than the file's", "'blk.0.attn_q.weight.lora_a'"},
        {PLORA_ERROR_UNSUPPORTED, "'adapter.alora.invocation_tokens' at byte", ""},
        {PLORA_ERROR_FORMAT, "a second value 'adapter.type' at byte", ""},
        {PLORA_ERROR_FORMAT, "'adapter.lora.alpha' at byte", "of type 8"},
        {PLORA_ERROR_FORMAT, "'blk.0.attn_q.weight.lora_a' occurs twice, at bytes", ""},
        {PLORA_ERROR_UNSUPPORTED, "'token_embd.weight.lora_a' at byte", "no linear layer"},
        {PLORA_ERROR_UNSUPPORTED, "'blk.00.attn_q.weight.lora_a' at byte", "no linear layer"},
        {PLORA_ERROR_UNSUPPORTED, "'blk.0.attn_q.bias.lora_a' at byte", "no linear layer"},
        {PLORA_ERROR_UNSUPPORTED, "'blk.0.attn_q.weight.dora_a' at byte", "lora_a or .lora_b"},
        {PLORA_ERROR_NOT_FOUND, "model.layers.7.self_attn.q_proj", "blk.7.attn_q.weight.lora_a"},
        {PLORA_ERROR_SHAPE, "[N=24,K=10]: lora_A is [2,10], lora_B is [23,2]", ""},
        {PLORA_ERROR_FORMAT, "'blk.0.attn_q.weight.lora_b': the value at byte", "inf"},
        {PLORA_ERROR_FORMAT, "1000000000 tensors at byte 8", ""},
        {PLORA_ERROR_FORMAT, "the file ends at byte", ""},
        {PLORA_ERROR_FORMAT, "a tensor's name at byte", "characters: must have 1 to 63"},
        {PLORA_ERROR_FORMAT, "a tensor's name at byte", "0x0a"},
    };
    const plora_adapters_options heads = with_heads(HEADS, KV_HEADS);
    for (int i = 0; i < CASES; ++i) {
        struct recipe r = good;
        if (i == 0) r.magic = "GGML";
        if (i == 1) r.version = 1;
        if (i == 2) r.version = 3u << 24;
        if (i == 3) r.architecture = "qwen2";
        if (i == 4) r.architecture = NULL;
        if (i == 5) r.type = "alora";
        if (i == 6) r.type = NULL;
        if (i == 7) r.general_type = "model";
        if (i == 8) r.alignment = 24;
        if (i == 9) r.alignment = 4;
        if (i == 10) r.alpha = NAN;
        if (i == 11) r.type_id = 8;
        if (i == 12) r.type_id = 200;
        if (i == 13) r.dimensions = 3;
        if (i == 14) r.offset_error = 32;
        if (i == 15) r.offset_error = (uint64_t)-32;
        if (i == 16) r.extent = UINT64_MAX;
        if (i == 17) r.extent = INT32_MAX;
        if (i == 18) r.bad_key = "adapter.alora.invocation_tokens";
        if (i == 19) r.bad_key = "adapter.type";
        if (i == 20) r.bad_key = "adapter.lora.alpha";
        if (i == 21) r.names = "blk.0.attn_q.weight.lora_a", r.n = r.k, r.alpha = 2.0f;
        if (i == 22) r.names = "token_embd.weight.lora_%c";
        if (i == 23) r.names = "blk.00.attn_q.weight.lora_%c";
        if (i == 24) r.names = "blk.0.attn_q.bias.lora_%c";
        if (i == 25) r.names = "blk.0.attn_q.weight.dora_%c";
        if (i == 26) r.names = "blk.7.attn_q.weight.lora_%c";
        if (i == 27) r.n = 23;
        if (i == 28) r.value = INFINITY;
        if (i == 29) r.tensors = 999999998;
        if (i == 30) r.values = 1000;
        if (i == 31) r.names = "blk.0.attn_q.weight.weight.weight.weight.weight.weight.weight.lora_%c";
        if (i == 32) r.names = "blk.0.attn_q\n.weight.lora_%c";
        plora_adapters *adapters = NULL;
        if (i == 20) { /* a key of another type, before the right one */
            r.type = NULL;
            r.bad_key = NULL;
            static struct text text;
            put_file(&text, &r);
            const char key[] = "adapter.lora.alpha";
            unsigned char *at = memmem(text.bytes, text.count, key, strlen(key));
            CHECK(at != NULL, "no alpha in the test's file");
            at[strlen(key)] = 8;
            file_write(file_path("file.gguf"), text.bytes, text.count);
            CHECK_FAILS(plora_adapters_load(f.model, file_path("file.gguf"), &heads, &adapters), cases[i].status,
                        cases[i].message, cases[i].more, "file.gguf: ");
        } else
            CHECK_FAILS(load(&f, &r, &heads, &adapters), cases[i].status, cases[i].message, cases[i].more,
                        "file.gguf: ");
        CHECK(adapters == NULL, "case %d", i);
    }
    plora_adapters *adapters;
    CHECK_FAILS(load(&f, &good, NULL, &adapters), PLORA_ERROR_INVALID_ARGUMENT, "heads is 0", "q_proj");
    const plora_adapters_options odd = with_heads(5, 0), uneven = with_heads(24, 0), negative = with_heads(-1, 0);
    CHECK_FAILS(load(&f, &good, &odd, &adapters), PLORA_ERROR_SHAPE, "24 rows are not 5 heads");
    CHECK_FAILS(load(&f, &good, &uneven, &adapters), PLORA_ERROR_SHAPE, "24 rows are not 24 heads of an even size");
    CHECK_FAILS(load(&f, &good, &negative, &adapters), PLORA_ERROR_INVALID_ARGUMENT, "heads is -1");
    fixture_close(&f);
}

/* A file that ends after each of its bytes, is longer, or has a bit flipped in each of them: an error, or adapters of finite values. */
static void damaged(void **state)
{
    (void)state;
    static struct text text;
    struct fixture f;
    fixture_open(&f);
    struct recipe r = good;
    r.more_values = 1;
    put_file(&text, &r);
    const plora_adapters_options heads = with_heads(HEADS, KV_HEADS);
    plora_adapters *adapters;
    for (size_t count = 0; count < text.count; count += check_quick() ? 7 : 1) {
        file_write(file_path("cut.gguf"), text.bytes, count);
        CHECK_FAILS(plora_adapters_load(f.model, file_path("cut.gguf"), &heads, &adapters), PLORA_ERROR_FORMAT,
                    "cut.gguf: ");
    }
    text.bytes[text.count] = 0;
    file_write(file_path("long.gguf"), text.bytes, text.count + 1);
    CHECK_FAILS(plora_adapters_load(f.model, file_path("long.gguf"), &heads, &adapters), PLORA_ERROR_FORMAT,
                "the file at byte");
    for (size_t i = 0; i < text.count; i += check_quick() ? 5 : 1) {
        text.bytes[i] ^= (unsigned char)(1 << i % 8);
        file_write(file_path("flipped.gguf"), text.bytes, text.count);
        adapters = NULL;
        if (plora_adapters_load(f.model, file_path("flipped.gguf"), &heads, &adapters) == PLORA_OK) {
            float *parameters;
            int64_t count;
            CHECK_OK(plora_adapters_parameters(adapters, &parameters, &count));
            const plora_matrix all = {parameters, 1, count, count, PLORA_F32, 0};
            float *values = values_of(&all);
            for (int64_t k = 0; k < count; ++k)
                CHECK(isfinite(values[k]), "a bit of byte %zu: parameter %lld is %g", i, (long long)k,
                      (double)values[k]);
            free(values);
        }
        plora_adapters_destroy(adapters);
        text.bytes[i] ^= (unsigned char)(1 << i % 8);
    }
    fixture_close(&f);
}

/* The heads of a model that was opened from its directory. */
static void heads_of_config(void **state)
{
    static const struct {
        const char *config, *message; /* NULL: it loads */
        plora_status status;
    } cases[] = {
        {"{\"num_attention_heads\": 4, \"num_key_value_heads\": 2}", NULL, PLORA_OK},
        {"{\"num_attention_heads\": 4, \"num_key_value_heads\": null, \"model_type\": \"llama\"}", NULL, PLORA_OK},
        {"{\"num_attention_heads\": 4}", NULL, PLORA_OK},
        {"{\"model_type\": \"llama\"}", "heads is 0", PLORA_ERROR_INVALID_ARGUMENT},
        {"{\"num_attention_heads\": 5}", "not 5 heads", PLORA_ERROR_SHAPE},
        {"{\"num_attention_heads\": 0}", "\"num_attention_heads\" at byte 24", PLORA_ERROR_FORMAT},
        {"{\"num_attention_heads\": 4, \"num_key_value_heads\": 2.5}", "\"num_key_value_heads\" at byte 50",
         PLORA_ERROR_FORMAT},
        {"{\"num_attention_heads\"", "config.json: ", PLORA_ERROR_FORMAT},
    };
    (void)state;
    struct fixture f;
    fixture_open(&f);
    mkdir(file_path("model"), 0700);
    CHECK_OK(plora_model_save(f.model, file_path("model/model.safetensors")));
    static struct text text;
    put_file(&text, &good);
    file_write(file_path("file.gguf"), text.bytes, text.count);
    for (int i = -1; i < CHECK_COUNT(cases); ++i) {
        plora_model *model;
        plora_adapters *adapters = NULL;
        if (i >= 0) file_write_text(file_path("model/config.json"), cases[i].config);
        CHECK_OK(plora_model_open(f.context, file_path("model"), &model));
        if (i < 0)
            CHECK_FAILS(plora_adapters_load(model, file_path("file.gguf"), NULL, &adapters),
                        PLORA_ERROR_INVALID_ARGUMENT, "heads is 0");
        else if (cases[i].message != NULL)
            CHECK_FAILS(plora_adapters_load(model, file_path("file.gguf"), NULL, &adapters), cases[i].status,
                        cases[i].message);
        else {
            int32_t layer;
            plora_ledger *ledger;
            plora_export_options request = PLORA_EXPORT_OPTIONS_INIT;
            CHECK_OK(plora_adapters_load(model, file_path("file.gguf"), NULL, &adapters));
            CHECK_OK(plora_model_find_layer(model, "model.layers.0.self_attn.q_proj", &layer));
            check_loaded(adapters, layer, 3.0, 6, "heads of config.json");
            /* An export finds them there, too. */
            CHECK_OK(plora_ledger_open(adapters, NULL, &ledger));
            request.format = PLORA_EXPORT_GGUF;
            CHECK_OK(plora_ledger_export(ledger, file_path("again.gguf"), &request, NULL));
            plora_ledger_destroy(ledger);
            plora_adapters_destroy(adapters);
            CHECK_OK(plora_adapters_load(model, file_path("again.gguf"), NULL, &adapters));
            check_loaded(adapters, layer, 3.0, 6, "and back");
        }
        plora_adapters_destroy(adapters);
        plora_model_destroy(model);
    }
    fixture_close(&f);
}

static void out_of_memory(void **state)
{
    (void)state;
    struct fixture f;
    fixture_open(&f);
    const plora_adapters_options heads = with_heads(HEADS, KV_HEADS);
    const int64_t base = f.allocator.live;
    int done = 0;
    for (int64_t k = 1; !done; ++k) {
        plora_adapters *adapters = NULL;
        f.allocator.fail_at = f.allocator.calls + k;
        const int64_t failed = f.allocator.failed;
        const plora_status status = load(&f, &good, &heads, &adapters);
        done = f.allocator.failed == failed;
        CHECK(status == (done ? PLORA_OK : PLORA_ERROR_OUT_OF_MEMORY), "allocation %lld: status %d", (long long)k,
              status);
        if (done) check_loaded(adapters, 0, 3.0, 6, "in the end");
        plora_adapters_destroy(adapters);
        CHECK(f.allocator.live == base, "allocation %lld: %lld blocks left", (long long)k,
              (long long)(f.allocator.live - base));
        CHECK(done ? k > 5 : k < 100, "%lld allocations", (long long)k);
    }
    f.allocator.fail_at = 0;
    fixture_close(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(round_trips), cmocka_unit_test(meanings),        cmocka_unit_test(refused),
        cmocka_unit_test(damaged),     cmocka_unit_test(heads_of_config), cmocka_unit_test(out_of_memory),
    };
    check_begin("test_gguf");
    return cmocka_run_group_tests(tests, file_setup, file_teardown);
}
