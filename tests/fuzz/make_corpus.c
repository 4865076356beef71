/* make_corpus.c: writes the seeds of the fuzz targets into tests/fuzz/corpus/: small good files of every kind, as the library writes
 * them, in the form that each target reads.
 *
 *     make_corpus FOLDER
 *
 * The other files there were found by the fuzzers: inputs that reach code which no smaller set of inputs does, and inputs that once
 * showed a mistake (named bug_*). */
#include <sys/stat.h>

#include "fuzz_run.h"
#include "gguf.h"

static const char *output;

/* A seed: the parts one after the other, a zero between two. */
struct part {
    const void *bytes;
    size_t count;
};

static struct part text_part(const char *text)
{
    return (struct part){text, strlen(text)};
}

static struct part file_part(const char *path)
{
    FILE *file = fopen(path, "rb");
    FUZZ_CHECK(file != NULL);
    fseek(file, 0, SEEK_END);
    const size_t count = (size_t)ftell(file);
    rewind(file);
    unsigned char *bytes = malloc(count + 1); /* until the program ends */
    FUZZ_CHECK(bytes != NULL && fread(bytes, 1, count, file) == count);
    fclose(file);
    return (struct part){bytes, count};
}

/* Header and data of a safetensors file. */
static void split(struct part whole, struct part parts[2])
{
    const unsigned char *bytes = whole.bytes;
    size_t header = 0;
    for (int i = 8; i-- > 0;)
        header = header << 8 | bytes[i];
    parts[0] = (struct part){bytes + 8, header};
    parts[1] = (struct part){bytes + 8 + header, whole.count - 8 - header};
}

/* `mode` is the first byte, -1 = none. */
static void seed(const char *target, const char *name, int mode, int count, const struct part *parts)
{
    char path[512];
    snprintf(path, sizeof path, "%s/%s", output, target);
    mkdir(path, 0777);
    snprintf(path, sizeof path, "%s/%s/seed_%s", output, target, name);
    FILE *file = fopen(path, "wb");
    FUZZ_CHECK(file != NULL);
    if (mode >= 0) fputc(mode, file);
    for (int i = 0; i < count; ++i) {
        if (i > 0) fputc(0, file);
        FUZZ_CHECK(parts[i].count == 0 || fwrite(parts[i].bytes, 1, parts[i].count, file) == parts[i].count);
    }
    FUZZ_CHECK(fclose(file) == 0);
}

static void seed_safetensors(void)
{
    static const char mixed[] =
        "{\"__metadata__\":{\"format\":\"pt\",\"a\\u00e4\":\"\"},\"s\":{\"dtype\":\"F64\",\"shape\":[],\"data_"
        "offsets\":[0,8]},"
        "\"e\":{\"dtype\":\"I8\",\"shape\":[0,7],\"data_offsets\":[8,8]},\"f\":{\"dtype\":\"F4\",\"shape\":[2,3],"
        "\"data_offsets\":[8,11]},\"h\":{\"dtype\":\"BF16\",\"shape\":[2],\"data_offsets\":[11,15]},"
        "\"b\":{\"dtype\":\"BOOL\",\"shape\":[1,1,1],\"data_offsets\":[15,16]}}";
    static unsigned char weights[FUZZ_LAYERS][FUZZ_WEIGHT_BYTES];
    plora_model *model = fuzz_model(weights);
    size_t count;
    FUZZ_CHECK(plora_model_save(model, fuzz_path("model")) == PLORA_OK);
    const struct part whole = file_part(fuzz_path("model"));
    seed("safetensors", "model", -1, 1, &whole);
    const unsigned char *bytes = fuzz_safetensors((const unsigned char *)mixed, strlen(mixed), NULL, 0, &count);
    const struct part part = {bytes, count};
    seed("safetensors", "mixed", -1, 1, &part);
    plora_model_destroy(model);
}

static plora_adapters *make_adapters(plora_model *model, const char *targets, int rslora, int patterns)
{
    static const plora_adapters_override overrides[] = {{"v_proj", 3.5, 1, 0}};
    plora_adapters_options options = PLORA_ADAPTERS_OPTIONS_INIT;
    plora_adapters *adapters;
    float *parameters;
    int64_t count;
    options.rank = 2;
    options.targets = targets;
    options.rslora = rslora;
    options.overrides = overrides;
    options.override_count = patterns;
    options.workspace_tokens = 1;
    FUZZ_CHECK(plora_adapters_create(model, &options, &adapters) == PLORA_OK);
    FUZZ_CHECK(plora_adapters_parameters(adapters, &parameters, &count) == PLORA_OK);
    for (int64_t i = 0; i < count; ++i)
        parameters[i] = (float)(i % 11 - 5) / 8.0f;
    return adapters;
}

static void seed_peft(void)
{
    /* As PEFT writes it. */
    static const char config[] =
        "{\"alora_invocation_tokens\": null, \"alpha_pattern\": {\"v_proj\": 3}, \"arrow_config\": null, "
        "\"auto_mapping\": null, "
        "\"base_model_name_or_path\": \"x/y\", \"bias\": \"none\", \"corda_config\": null, \"eva_config\": null, "
        "\"exclude_modules\": null, \"fan_in_fan_out\": false, \"inference_mode\": true, \"init_lora_weights\": true, "
        "\"layer_replication\": null, \"layers_pattern\": null, \"layers_to_transform\": null, \"loftq_config\": {}, "
        "\"lora_alpha\": 16, \"lora_bias\": false, \"lora_dropout\": 0.05, \"megatron_config\": null, "
        "\"megatron_core\": \"megatron.core\", \"modules_to_save\": null, \"peft_type\": \"LORA\", "
        "\"qalora_group_size\": 16, "
        "\"r\": 2, \"rank_pattern\": {\"^model.layers.0.self_attn.v_proj\": 1}, \"revision\": null, "
        "\"target_modules\": "
        "[\"v_proj\"], \"target_parameters\": null, \"task_type\": \"CAUSAL_LM\", \"trainable_token_indices\": null, "
        "\"use_dora\": false, \"use_qalora\": false, \"use_rslora\": false}";
    static const char half[] =
        "{\"base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight\":{\"dtype\":\"F16\",\"shape\":[1,6],"
        "\"data_offsets\":[0,12]},\"base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight\":{\"dtype\":"
        "\"BF16\","
        "\"shape\":[4,1],\"data_offsets\":[12,20]}}";
    static unsigned char weights[FUZZ_LAYERS][FUZZ_WEIGHT_BYTES];
    plora_model *model = fuzz_model(weights);
    for (int variant = 0; variant < 3; ++variant) {
        static const char *const names[] = {"all", "rslora", "patterns"};
        static const char *const targets[] = {"all-linear,lm_head", "q_proj,v_proj", "v_proj,down_proj"};
        plora_adapters *adapters = make_adapters(model, targets[variant], variant == 1, variant == 2);
        struct part parts[3];
        FUZZ_CHECK(plora_adapters_save(adapters, fuzz_path("seed")) == PLORA_OK);
        parts[0] = file_part(fuzz_path("seed/adapter_config.json"));
        seed("peft_config", names[variant], -1, 1, parts);
        parts[1] = file_part(fuzz_path("seed/adapter_model.safetensors"));
        if (variant == 1) seed("peft", "raw", 1, 2, parts);
        split(parts[1], &parts[1]);
        seed("peft", names[variant], 0, 3, parts);
        plora_adapters_destroy(adapters);
    }
    const struct part parts[3] = {text_part(config), text_part(half), {"\1\30\2", 3}};
    seed("peft_config", "peft", -1, 1, parts);
    seed("peft", "peft", 0, 3, parts);
    plora_model_destroy(model);
}

static void put(unsigned char **at, uint64_t number, int bytes)
{
    for (int i = 0; i < bytes; ++i)
        *(*at)++ = (unsigned char)(number >> 8 * i);
}

static void put_text(unsigned char **at, const char *text)
{
    put(at, strlen(text), 8);
    memcpy(*at, text, strlen(text));
    *at += strlen(text);
}

/* What the library does not write itself: 16-bit tensors, another alignment, arrays. */
static void seed_gguf_by_hand(void)
{
    static const char *const texts[][2] = {
        {"general.architecture", "llama"}, {"adapter.type", "lora"}, {"general.type", "adapter"}};
    static unsigned char bytes[2048];
    unsigned char *at = bytes;
    memcpy(at, "GGUF", 4);
    at += 4;
    put(&at, 3, 4);
    put(&at, 2, 8);
    put(&at, 7, 8);
    for (int i = 0; i < 3; ++i) {
        put_text(&at, texts[i][0]);
        put(&at, 8, 4);
        put_text(&at, texts[i][1]);
    }
    put_text(&at, "adapter.lora.alpha");
    put(&at, 6, 4);
    put(&at, 0x40800000, 4);
    put_text(&at, "general.alignment");
    put(&at, 4, 4);
    put(&at, 16, 4);
    put_text(&at, "general.tags");
    put(&at, 9, 4);
    put(&at, 8, 4);
    put(&at, 2, 8);
    put_text(&at, "a");
    put_text(&at, "");
    put_text(&at, "x");
    put(&at, 9, 4);
    put(&at, 12, 4);
    put(&at, 1, 8);
    put(&at, 0, 8);
    for (int is_b = 0; is_b < 2; ++is_b) { /* k_proj [N=4,K=6], R = 1 */
        put_text(&at, is_b ? "blk.0.attn_k.weight.lora_b" : "blk.0.attn_k.weight.lora_a");
        put(&at, 2, 4);
        put(&at, is_b ? 1 : 6, 8);
        put(&at, is_b ? 4 : 1, 8);
        put(&at, is_b ? 30 : 1, 4);
        put(&at, is_b ? 16 : 0, 8);
    }
    while ((at - bytes) % 16 != 0)
        *at++ = 0;
    for (int i = 0; i < 32; ++i)
        *at++ = (unsigned char)(i % 2 ? 0x3c : i);
    const struct part part = {bytes, (size_t)(at - bytes)};
    seed("gguf", "half", -1, 1, &part);
}

static void seed_gguf(void)
{
    static unsigned char weights[FUZZ_LAYERS][FUZZ_WEIGHT_BYTES];
    plora_model *model = fuzz_model(weights);
    for (int variant = 0; variant < 2; ++variant) {
        plora_adapters *adapters =
            make_adapters(model, variant ? "q_proj,v_proj" : "q_proj,k_proj,lm_head", 0, variant);
        plora_export_options options = PLORA_EXPORT_OPTIONS_INIT;
        plora_ledger *ledger;
        options.format = PLORA_EXPORT_GGUF;
        options.heads = FUZZ_HEADS;
        options.kv_heads = FUZZ_KV_HEADS;
        FUZZ_CHECK(plora_ledger_open(adapters, NULL, &ledger) == PLORA_OK);
        FUZZ_CHECK(plora_ledger_export(ledger, fuzz_path("seed.gguf"), &options, NULL) == PLORA_OK);
        const struct part whole = file_part(fuzz_path("seed.gguf"));
        seed("gguf", variant ? "unscaled" : "scaled", -1, 1, &whole);
        plora_ledger_destroy(ledger);
        plora_adapters_destroy(adapters);
    }
    seed_gguf_by_hand();
    plora_model_destroy(model);
}

static void seed_ledger(void)
{
    struct fuzz_run run;
    plora_ledger_options options = PLORA_LEDGER_OPTIONS_INIT;
    fuzz_run_open(&run, 0);
    options.path = fuzz_path("seed.ledger");
    options.sync = 0;
    options.hash_weights = 1;
    FUZZ_CHECK(plora_ledger_open(run.adapters, &options, &run.ledger) == PLORA_OK);
    for (int i = 0; i < 3; ++i) {
        struct part whole = file_part(options.path);
        seed("ledger", i == 0 ? "empty" : i == 1 ? "one" : "two", 1, 1, &whole);
        seed("ledger", i == 0 ? "empty_sealed" : i == 1 ? "one_sealed" : "two_sealed", 0, 1, &whole);
        whole.count -= i == 2 ? 64 : 0;
        if (i == 2) seed("ledger", "unmarked", 1, 1, &whole);
        fuzz_run_step(&run, i);
        FUZZ_CHECK(plora_unload(run.adapters, run.optimizer, NULL, NULL, NULL) == PLORA_OK);
    }
    fuzz_run_close(&run);
}

static void seed_checkpoint(void)
{
    for (int variant = 0; variant < 4; ++variant) {
        static const char *const names[] = {"all", "adapters", "ledger", "ledger_and_weights"};
        const int with_ledger = variant >= 2;
        struct fuzz_run run;
        struct part parts[2];
        fuzz_run_open(&run, with_ledger);
        FUZZ_CHECK(plora_checkpoint_save(run.adapters, variant == 1 ? NULL : run.optimizer, fuzz_path("run"),
                                         variant == 0 || variant == 3 ? PLORA_CHECKPOINT_WEIGHTS : 0) == PLORA_OK);
        const struct part whole = file_part(fuzz_path("run"));
        split(whole, parts);
        seed("checkpoint", names[variant], (variant == 1 ? 0 : 2) + 4 * with_ledger, 2, parts);
        if (variant == 0) seed("checkpoint", "raw", 3, 1, &whole);
        fuzz_run_close(&run);
    }
}

int main(int count, char **arguments)
{
    FUZZ_CHECK(count == 2);
    output = arguments[1];
    mkdir(output, 0777);
    seed_safetensors();
    seed_peft();
    seed_gguf();
    seed_ledger();
    seed_checkpoint();
    plora_context_destroy(fuzz_context());
    return 0;
}
