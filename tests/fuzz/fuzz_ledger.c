/* fuzz_ledger.c: libFuzzer target. Any bytes are a ledger: an error, or records whose every factor can be read and is finite.
 *
 * Nothing gets past the hashes by chance. So unless the first byte is odd, the bytes behind it are given magics, hashes and a chain
 * of records where they would be, and only the rest is left to the fuzzer. */
#include "fuzz.h"
#include "hash.h"
#include "ledger_file.h"

static int64_t plausible(int64_t features)
{
    return features > 0 && features <= 16 ? features : 1 + (features & 15);
}

static void seal_header(unsigned char *bytes, size_t size)
{
    struct plora__ledger_header *header = (struct plora__ledger_header *)bytes;
    memcpy(header->magic, "PLORALED", 8);
    header->version = PLORA__LEDGER_VERSION;
    header->layer_count %= 4;
    if (header->bytes < 64 || header->bytes % 64 != 0) header->bytes = 64 * (1 + header->bytes % 8);
    if (header->bytes > size) header->bytes = size / 64 * 64;
    struct plora__ledger_layer *layers = (struct plora__ledger_layer *)(header + 1);
    const uint64_t names = 64 + 64 * header->layer_count;
    for (uint32_t i = 0; i < header->layer_count && names < header->bytes; ++i) { /* mostly plausible layers */
        if (layers[i].gathered % 4 == 3) continue;
        if (layers[i].name_offset < names || layers[i].name_offset >= header->bytes)
            layers[i].name_offset = names + layers[i].name_offset % (header->bytes - names);
        layers[i].name_bytes =
            (uint32_t)strnlen((char *)bytes + layers[i].name_offset, header->bytes - layers[i].name_offset);
        layers[i].dtype &= 1;
        layers[i].in_features = plausible(layers[i].in_features);
        layers[i].out_features = plausible(layers[i].out_features);
        layers[i].fan_in_fan_out &= 1;
        layers[i].gathered &= 1;
        layers[i].first_element &= INT64_MAX;
        layers[i].row_elements &= INT64_MAX;
    }
    header->table_hash = plora__hash(header + 1, header->bytes - sizeof *header, 0);
    header->hash = plora__hash(header, offsetof(struct plora__ledger_header, hash), 0);
}

/* Ranks small enough to fit now and then, and the hashes that the layers' factors have. */
static void seal_factors(const struct plora__ledger_layer *layers, struct plora__ledger_record *record)
{
    struct plora__ledger_entry *entries = (struct plora__ledger_entry *)(record + 1);
    const uint64_t table = plora__ledger_table_bytes(record->layer_count);
    if (table > record->bytes) return;
    uint64_t at = table;
    for (uint32_t i = 0; i < record->layer_count; ++i) {
        entries[i].rank %= 8;
        if (entries[i].rank < 1 || layers[i].in_features > 4096 || layers[i].out_features > 4096) continue;
        const uint64_t rank = (uint64_t)entries[i].rank * sizeof(float);
        const uint64_t a = ((uint64_t)layers[i].in_features * rank + 63) / 64 * 64;
        const uint64_t b = ((uint64_t)layers[i].out_features * rank + 63) / 64 * 64;
        if (a + b > record->bytes - at) continue;
        entries[i].factors_hash = plora__hash((const char *)record + at, a + b, 0);
        at += a + b;
    }
    if (record->reserved % 4 < 2) record->bytes = at; /* else it is too long, as often as not */
    record->table_hash = plora__hash(record + 1, table - sizeof *record, 0);
}

/* A mark goes behind the record when there is room and `marked`. */
static void seal_record(const struct plora__ledger_layer *layers, struct plora__ledger_record *record, int64_t index,
                        uint64_t offset, uint64_t lineage, uint32_t layer_count, uint64_t left)
{
    const int marked = record->reserved % 2 == 0;
    memcpy(record->magic, "PLORAREC", 8);
    if (record->bytes < 128 || record->bytes % 64 != 0) record->bytes = 64 * (2 + record->bytes % 32);
    if (record->bytes > left) record->bytes = left / 64 * 64;
    record->index = index;
    record->lineage_before = lineage;
    record->layer_count = layer_count;
    record->stage &= 0xff;
    record->rounding = 0;
    if (!(record->momentum > 0.0 && record->momentum <= 1.0)) record->momentum = 0.5;
    seal_factors(layers, record);
    record->lineage_after = plora__hash(record, offsetof(struct plora__ledger_record, lineage_after), 0);
    record->hash = plora__hash(record, offsetof(struct plora__ledger_record, hash), 0);
    if (!marked || left - record->bytes < sizeof(struct plora__ledger_mark)) return;
    struct plora__ledger_mark mark = {
        .index = index, .offset = offset, .bytes = record->bytes, .lineage = record->lineage_after};
    memcpy(mark.magic, "PLORAMRK", 8);
    mark.hash = plora__hash(&mark, offsetof(struct plora__ledger_mark, hash), 0);
    memcpy((char *)record + record->bytes, &mark, sizeof mark);
}

static void seal(unsigned char *bytes, size_t size)
{
    if (size < 64) return;
    seal_header(bytes, size);
    const struct plora__ledger_header *header = (const struct plora__ledger_header *)bytes;
    uint64_t at = header->bytes, lineage = header->hash;
    for (int64_t index = 0; at + sizeof(struct plora__ledger_record) <= size; ++index) {
        struct plora__ledger_record *record = (struct plora__ledger_record *)(bytes + at);
        seal_record(plora__ledger_layers(bytes), record, index, at, lineage, header->layer_count, size - at);
        lineage = record->lineage_after;
        at += record->bytes + sizeof(struct plora__ledger_mark);
    }
}

static void read_records(const struct plora__ledger_store *store, const unsigned char *bytes, size_t size)
{
    const struct plora__ledger_layer *layers = plora__ledger_layers(store->header);
    if (store->cut > size) abort();
    for (int64_t t = 0; t < store->count; ++t) {
        const struct plora__ledger_slot *slot = &store->slots[t];
        const struct plora__ledger_record *record = (const struct plora__ledger_record *)(bytes + slot->offset);
        if (record->bytes != slot->bytes || slot->offset + slot->bytes > size) abort();
        for (uint32_t i = 0; i < record->layer_count; ++i)
            for (int is_b = 0; is_b < 2; ++is_b) {
                const float *factor =
                    (const float *)(bytes + slot->offset + plora__ledger_factor_offset(store->header, record, i, is_b));
                const int64_t count = (int64_t)plora__ledger_entries(record)[i].rank *
                                      (is_b ? layers[i].out_features : layers[i].in_features);
                for (int64_t e = 0; e < count; ++e)
                    if (!isfinite(factor[e])) abort();
            }
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    plora_context *context = fuzz_context();
    if (size == 0) return 0;
    const int sealed = data[0] % 2 == 0;
    data++;
    size--;
    unsigned char *bytes = malloc(size > 0 ? size : 1); /* exactly as long as the file */
    if (bytes == NULL) return 0;
    memcpy(bytes, data, size);
    if (sealed) seal(bytes, size);
    struct plora__ledger_store store = {.context = context, .descriptor = -1};
    const plora_status status = plora__ledger_scan(&store, bytes, size);
    if (status != PLORA_OK && status != PLORA_ERROR_FORMAT && status != PLORA_ERROR_UNSUPPORTED) abort();
    if (status == PLORA_OK) {
        read_records(&store, bytes, size);
        plora__ledger_lists_free(&store);
        ++fuzz_accepted;
    } else if (store.header != NULL || store.slots != NULL)
        abort();
    free(bytes);
    return 0;
}
