/* fuzz_checkpoint.c: any bytes are a checkpoint, loaded into a run: an error that has changed nothing, or a state that the run can go on
 * from.
 *
 *     one byte | the file                                 bit 0 of the byte: as it is
 *     one byte | header | 0 | data                        else: with the right lengths (fuzz.h) and the right checksum
 *
 * Bit 1: the run has an optimizer. Bit 2: it has a ledger in memory, of two records. */
#include "checkpoint.h"
#include "fuzz.h"
#include "fuzz_run.h"
#include "hash.h"

/* The checksum of a file that has one is made right, if the file can be parsed as far as that. */
static void seal(unsigned char *bytes, size_t count)
{
    static const char key[] = "\"checksum\":\"";
    enum { DIGITS = 16 };
    struct plora__safetensors file;
    if (plora__safetensors_parse(fuzz_context(), bytes, count, &file) != PLORA_OK) return;
    char text[DIGITS + 1];
    snprintf(text, sizeof text, "%016llx", (unsigned long long)plora__checkpoint_checksum(&file));
    plora__safetensors_close(&file);
    for (size_t i = 8; i + sizeof key + DIGITS <= count; ++i) {
        if (memcmp(bytes + i, key, sizeof key - 1) != 0) continue;
        memcpy(bytes + i + sizeof key - 1, text, DIGITS);
        return;
    }
}

static void write_file(const uint8_t *data, size_t size)
{
    size_t at = 1, header_bytes, count;
    if (data[0] % 2 != 0) {
        fuzz_write(fuzz_path("run"), data + 1, size - 1);
        return;
    }
    const unsigned char *header = fuzz_part(data, size, &at, &header_bytes);
    unsigned char *bytes = fuzz_safetensors(header, header_bytes, data + at, size - at, &count);
    seal(bytes, count);
    fuzz_write(fuzz_path("run"), bytes, count);
    free(bytes);
}

/* Of all that a load may change. */
static uint64_t hash_run(const struct fuzz_run *run)
{
    float *arenas[3];
    int64_t count, step;
    FUZZ_CHECK(plora_adapters_parameters(run->adapters, &arenas[0], &count) == PLORA_OK);
    FUZZ_CHECK(plora_optimizer_state(run->optimizer, &arenas[1], &arenas[2], NULL, &step) == PLORA_OK);
    uint64_t hash = plora__hash(run->weights, sizeof run->weights, 0);
    for (int i = 0; i < 3; ++i)
        hash = plora__hash(arenas[i], (size_t)count * sizeof(float), hash);
    for (int32_t i = 0; i < run->model->weight_count; ++i) {
        const struct plora__weight *weight = &run->model->weights[i];
        if (weight->residual != NULL) hash = plora__hash(weight->residual, plora__residual_bytes(weight), hash);
    }
    const int64_t counters[5] = {step, plora_adapters_stage(run->adapters), plora_ledger_length(run->ledger),
                                 plora_ledger_position(run->ledger), run->optimizer->total_steps};
    return plora__hash(counters, sizeof counters, hash);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct fuzz_run runs[2];
    if (size == 0) return 0;
    const int with_ledger = data[0] / 4 % 2;
    struct fuzz_run *run = &runs[with_ledger];
    if (run->model == NULL) fuzz_run_open(run, with_ledger);
    plora_optimizer *optimizer = data[0] / 2 % 2 ? run->optimizer : NULL;
    write_file(data, size);
    const uint64_t before = hash_run(run);
    const plora_status status = plora_checkpoint_load(run->adapters, optimizer, fuzz_path("run"));
    FUZZ_CHECK(status == PLORA_OK || fuzz_refused(status));
    if (status != PLORA_OK) {
        FUZZ_CHECK(hash_run(run) == before);
        return 0;
    }
    FUZZ_CHECK(plora_ledger_position(run->ledger) == plora_ledger_length(run->ledger));
    ++fuzz_accepted;
    const plora_status step = plora_optimizer_step(run->optimizer, 1.0, NULL, NULL);
    FUZZ_CHECK(step == PLORA_OK);
    const plora_status unload = plora_unload(run->adapters, optimizer, NULL, NULL, NULL);
    FUZZ_CHECK(unload == PLORA_OK || unload == PLORA_ERROR_NON_FINITE);
    fuzz_run_close(run);
    return 0;
}
