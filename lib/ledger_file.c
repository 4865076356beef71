/* ledger_file.c: see ledger_file.h. */
#include "ledger_file.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "dtype.h"
#include "file.h"
#include "hash.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "numbers are written as they lie in memory");
_Static_assert(sizeof(struct plora__ledger_header) == 64 && sizeof(struct plora__ledger_layer) == 64 &&
                   sizeof(struct plora__ledger_record) == 128 && sizeof(struct plora__ledger_entry) == 32 &&
                   sizeof(struct plora__ledger_mark) == PLORA__LEDGER_MARK_BYTES,
               "the format has no padding of the compiler's");

enum { ALIGNMENT = 64, LAYERS_MAX = 1 << 24, PARALLEL_BYTES = 1 << 20 };

#define HEADER_MAGIC "PLORALED"
#define RECORD_MAGIC "PLORAREC"
#define MARK_MAGIC "PLORAMRK"

static uint64_t aligned(uint64_t bytes)
{
    return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

/* -------------------------------------------------------------------------------------------------------------- layout */

uint64_t plora__ledger_header_bytes(uint32_t layer_count, uint64_t name_bytes)
{
    return aligned(sizeof(struct plora__ledger_header) + layer_count * sizeof(struct plora__ledger_layer) + name_bytes);
}

void plora__ledger_header_seal(unsigned char *header, uint32_t layer_count, uint64_t bytes)
{
    struct plora__ledger_header *head = (struct plora__ledger_header *)header;
    memcpy(head->magic, HEADER_MAGIC, sizeof head->magic);
    head->version = PLORA__LEDGER_VERSION;
    head->layer_count = layer_count;
    head->bytes = bytes;
    head->table_hash = plora__hash(head + 1, bytes - sizeof *head, 0);
    head->hash = plora__hash(head, offsetof(struct plora__ledger_header, hash), 0);
}

uint32_t plora__ledger_layer_count(const unsigned char *header)
{
    return ((const struct plora__ledger_header *)header)->layer_count;
}

const struct plora__ledger_layer *plora__ledger_layers(const unsigned char *header)
{
    return (const struct plora__ledger_layer *)(header + sizeof(struct plora__ledger_header));
}

const struct plora__ledger_entry *plora__ledger_entries(const struct plora__ledger_record *record)
{
    return (const struct plora__ledger_entry *)(record + 1);
}

uint64_t plora__ledger_table_bytes(uint32_t layer_count)
{
    return aligned(sizeof(struct plora__ledger_record) + layer_count * sizeof(struct plora__ledger_entry));
}

static uint64_t factor_bytes(int64_t features, int32_t rank)
{
    return aligned((uint64_t)features * (uint64_t)rank * sizeof(float));
}

uint64_t plora__ledger_factor_offset(const unsigned char *header, const struct plora__ledger_record *record,
                                     uint32_t number, int is_b)
{
    const struct plora__ledger_layer *layers = plora__ledger_layers(header);
    const struct plora__ledger_entry *entries = plora__ledger_entries(record);
    uint64_t offset = plora__ledger_table_bytes(record->layer_count);
    for (uint32_t i = 0; i < number; ++i)
        offset += factor_bytes(layers[i].in_features, entries[i].rank) +
                  factor_bytes(layers[i].out_features, entries[i].rank);
    return is_b ? offset + factor_bytes(layers[number].in_features, entries[number].rank) : offset;
}

uint64_t plora__ledger_lineage(const struct plora__ledger_store *store, int64_t count)
{
    return count == 0 ? ((const struct plora__ledger_header *)store->header)->hash : store->slots[count - 1].lineage;
}

static uint64_t record_lineage(const struct plora__ledger_record *record)
{
    return plora__hash(record, offsetof(struct plora__ledger_record, lineage_after), 0);
}

static uint64_t record_hash(const struct plora__ledger_record *record)
{
    return plora__hash(record, offsetof(struct plora__ledger_record, hash), 0);
}

static uint64_t table_hash(const struct plora__ledger_record *record)
{
    return plora__hash(record + 1, plora__ledger_table_bytes(record->layer_count) - sizeof *record, 0);
}

/* Where the factors of layer `number` are among all factors, and their bytes. */
static uint64_t factors_range(const unsigned char *header, const struct plora__ledger_record *record, uint32_t number,
                              uint64_t *bytes)
{
    const struct plora__ledger_layer *layer = &plora__ledger_layers(header)[number];
    const int32_t rank = plora__ledger_entries(record)[number].rank;
    *bytes = factor_bytes(layer->in_features, rank) + factor_bytes(layer->out_features, rank);
    return plora__ledger_factor_offset(header, record, number, 0) - plora__ledger_table_bytes(record->layer_count);
}

static uint64_t mark_hash(const struct plora__ledger_mark *mark)
{
    return plora__hash(mark, offsetof(struct plora__ledger_mark, hash), 0);
}

static int threads_of(const struct plora__ledger_store *store)
{
#ifdef _OPENMP
    return store->context->options.threads > 0 ? store->context->options.threads : omp_get_max_threads();
#else
    (void)store;
    return 1;
#endif
}

void plora__ledger_record_seal(const struct plora__ledger_store *store, struct plora__ledger_record *record,
                               const float *factors, float *copy)
{
    struct plora__ledger_entry *entries = (struct plora__ledger_entry *)(record + 1);
    const int threads = record->bytes > PARALLEL_BYTES ? threads_of(store) : 1;
    (void)threads; /* unused without OpenMP */
#pragma omp parallel for num_threads(threads) schedule(static)
    for (uint32_t i = 0; i < record->layer_count; ++i) {
        uint64_t bytes;
        const uint64_t offset = factors_range(store->header, record, i, &bytes);
        const char *from = (const char *)factors + offset;
        if (copy != NULL) from = memcpy((char *)copy + offset, from, bytes);
        entries[i].factors_hash = plora__hash(from, bytes, 0);
    }
    memcpy(record->magic, RECORD_MAGIC, sizeof record->magic);
    record->index = store->count;
    record->lineage_before = plora__ledger_lineage(store, store->count);
    record->table_hash = table_hash(record);
    record->lineage_after = record_lineage(record);
    record->hash = record_hash(record);
}

/* ------------------------------------------------------------------------------------------------------------ checking */

static plora_status check_layer(const unsigned char *bytes, uint64_t header_bytes, uint32_t number)
{
    const struct plora__ledger_layer *layer = &plora__ledger_layers(bytes)[number];
    const uint64_t names_at =
        sizeof(struct plora__ledger_header) + plora__ledger_layer_count(bytes) * sizeof(struct plora__ledger_layer);
    const int64_t most = (int64_t)1 << 40;
    PLORA_CHECK(layer->name_offset >= names_at && layer->name_offset < header_bytes &&
                    layer->name_bytes < header_bytes - layer->name_offset &&
                    strnlen((const char *)bytes + layer->name_offset, layer->name_bytes + 1) == layer->name_bytes,
                PLORA_ERROR_FORMAT, "layer %u: its name, at byte %" PRIu64 ", does not lie in the header", number,
                layer->name_offset);
    PLORA_CHECK(plora__dtype_known(layer->dtype) && layer->in_features > 0 && layer->in_features < most &&
                    layer->out_features > 0 && layer->out_features < most && layer->fan_in_fan_out >= 0 &&
                    layer->fan_in_fan_out <= 1,
                PLORA_ERROR_FORMAT, "layer %u: dtype %d, N=%" PRId64 ", K=%" PRId64 ", fan_in_fan_out %d", number,
                layer->dtype, layer->out_features, layer->in_features, layer->fan_in_fan_out);
    PLORA_CHECK(layer->gathered >= 0 && layer->gathered <= 1 && layer->first_element >= 0 && layer->row_elements >= 0,
                PLORA_ERROR_FORMAT,
                "layer %u: a shard of first element %" PRId64 ", row elements %" PRId64 ", gathered %d", number,
                layer->first_element, layer->row_elements, layer->gathered);
    return PLORA_OK;
}

static plora_status check_header(const unsigned char *bytes, uint64_t count)
{
    const struct plora__ledger_header *header = (const struct plora__ledger_header *)bytes;
    PLORA_CHECK(count >= sizeof *header, PLORA_ERROR_FORMAT,
                "not a ledger: the file ends at byte %" PRIu64 ", its header takes %zu", count, sizeof *header);
    PLORA_CHECK(memcmp(header->magic, HEADER_MAGIC, sizeof header->magic) == 0, PLORA_ERROR_FORMAT,
                "not a ledger: it does not begin with " HEADER_MAGIC);
    PLORA_CHECK(header->hash == plora__hash(header, offsetof(struct plora__ledger_header, hash), 0), PLORA_ERROR_FORMAT,
                "the header at byte 0 does not have its hash: it is damaged");
    PLORA_CHECK(header->version == PLORA__LEDGER_VERSION, PLORA_ERROR_UNSUPPORTED,
                "a ledger of version %u, this library reads version %d", header->version, PLORA__LEDGER_VERSION);
    const uint64_t least = plora__ledger_header_bytes(header->layer_count < LAYERS_MAX ? header->layer_count : 0, 0);
    PLORA_CHECK(header->layer_count < LAYERS_MAX && header->bytes >= least && header->bytes % ALIGNMENT == 0 &&
                    header->bytes <= count,
                PLORA_ERROR_FORMAT, "a header of %" PRIu64 " bytes for %u layers, in a file of %" PRIu64, header->bytes,
                header->layer_count, count);
    PLORA_CHECK(header->table_hash == plora__hash(header + 1, header->bytes - sizeof *header, 0), PLORA_ERROR_FORMAT,
                "the table of layers at byte %zu does not have its hash: it is damaged", sizeof *header);
    for (uint32_t i = 0; i < header->layer_count; ++i)
        PLORA_TRY(check_layer(bytes, header->bytes, i));
    return PLORA_OK;
}

/* Whether no number is infinite or NaN. */
static int all_finite(const float *values, uint64_t count)
{
    uint32_t bad = 0;
    for (uint64_t i = 0; i < count; ++i)
        bad |= (plora__float_bits(values[i]) & 0x7f800000u) == 0x7f800000u;
    return !bad;
}

/* The factors of one layer, at `at` of the record. */
static plora_status check_layer_factors(const struct plora__ledger_layer *layer,
                                        const struct plora__ledger_record *record, uint32_t number, uint64_t *at)
{
    const struct plora__ledger_entry *entry = &plora__ledger_entries(record)[number];
    const int64_t k = layer->in_features, n = layer->out_features;
    const uint64_t left = (record->bytes - *at) / sizeof(float);
    const int32_t rank = entry->rank;
    const int64_t most = layer->row_elements > 0 ? INT32_MAX : k < n ? k : n; /* of a shard: that of the whole */
    PLORA_CHECK(rank >= 1 && rank <= most && (uint64_t)rank <= left / (uint64_t)(k + n), PLORA_ERROR_FORMAT,
                "layer %u: rank %d with N=%" PRId64 ", K=%" PRId64 ", %" PRIu64 " values left", number, rank, n, k,
                left);
    const uint64_t bytes = factor_bytes(k, rank) + factor_bytes(n, rank);
    PLORA_CHECK(bytes <= record->bytes - *at, PLORA_ERROR_FORMAT, "layer %u: its factors do not fit into the record",
                number);
    const float *factors = (const float *)((const char *)record + *at);
    PLORA_CHECK(entry->factors_hash == plora__hash(factors, bytes, 0), PLORA_ERROR_FORMAT,
                "layer %u: its factors do not have their hash: they are damaged", number);
    PLORA_CHECK(entry->scale - entry->scale == 0.0 && all_finite(factors, bytes / sizeof(float)), PLORA_ERROR_FORMAT,
                "layer %u: scale %g, or a factor, is infinite or NaN", number, entry->scale);
    *at += bytes;
    return PLORA_OK;
}

/* The table against the record's length, then each layer's factors. */
static plora_status check_factors(const unsigned char *header, const struct plora__ledger_record *record)
{
    uint64_t at = plora__ledger_table_bytes(record->layer_count);
    for (uint32_t i = 0; i < record->layer_count; ++i)
        PLORA_TRY(check_layer_factors(&plora__ledger_layers(header)[i], record, i, &at));
    PLORA_CHECK(at == record->bytes, PLORA_ERROR_FORMAT, "%" PRIu64 " bytes, its factors end at %" PRIu64,
                record->bytes, at);
    return PLORA_OK;
}

static plora_status check_head(const struct plora__ledger_store *store, const struct plora__ledger_record *record,
                               uint64_t left)
{
    PLORA_CHECK(left >= sizeof *record, PLORA_ERROR_FORMAT, "%" PRIu64 " bytes are left, its head takes %zu", left,
                sizeof *record);
    PLORA_CHECK(memcmp(record->magic, RECORD_MAGIC, sizeof record->magic) == 0 && record->hash == record_hash(record),
                PLORA_ERROR_FORMAT, "its head does not have its hash: it is damaged");
    PLORA_CHECK(record->layer_count == plora__ledger_layer_count(store->header), PLORA_ERROR_FORMAT,
                "it has %u layers, the ledger %u", record->layer_count, plora__ledger_layer_count(store->header));
    PLORA_CHECK(record->bytes >= plora__ledger_table_bytes(record->layer_count) && record->bytes % ALIGNMENT == 0 &&
                    record->bytes <= left,
                PLORA_ERROR_FORMAT, "it has %" PRIu64 " bytes for %u layers, %" PRIu64 " are left", record->bytes,
                record->layer_count, left);
    PLORA_CHECK(record->table_hash == table_hash(record), PLORA_ERROR_FORMAT,
                "its table does not have its hash: it is damaged");
    return PLORA_OK;
}

/* A record that should begin here, `left` bytes before the end. */
static plora_status check_record(const struct plora__ledger_store *store, const unsigned char *bytes, uint64_t left)
{
    const struct plora__ledger_record *record = (const struct plora__ledger_record *)bytes;
    PLORA_TRY(check_head(store, record, left));
    PLORA_CHECK(record->index == store->count && record->lineage_before == plora__ledger_lineage(store, store->count) &&
                    record->lineage_after == record_lineage(record),
                PLORA_ERROR_FORMAT, "it is number %" PRId64 " of another lineage", record->index);
    PLORA_CHECK(record->momentum > 0.0 && record->momentum <= 1.0 && record->stage >= 0 && record->stage < INT64_MAX,
                PLORA_ERROR_FORMAT, "momentum %g, stage %" PRId64, record->momentum, record->stage);
    PLORA_CHECK(record->rounding >= PLORA_ROUND_NEAREST && record->rounding <= PLORA_ROUND_RESIDUAL,
                PLORA_ERROR_UNSUPPORTED, "rounding %d is unknown", record->rounding);
    return check_factors(store->header, record);
}

static int is_mark(const struct plora__ledger_mark *mark)
{
    return memcmp(mark->magic, MARK_MAGIC, sizeof mark->magic) == 0 && mark->hash == mark_hash(mark);
}

/* Whether some record that ends behind `from` was finished. */
static int mark_follows(const unsigned char *bytes, uint64_t from, uint64_t count)
{
    for (uint64_t at = from;
         count >= sizeof(struct plora__ledger_mark) && at <= count - sizeof(struct plora__ledger_mark);
         at += ALIGNMENT) {
        const struct plora__ledger_mark *mark = (const struct plora__ledger_mark *)(bytes + at);
        if (is_mark(mark) && mark->offset + mark->bytes == at) return 1;
    }
    return 0;
}

static plora_status fail_record(plora_status status, int64_t index, uint64_t offset)
{
    char inner[512];
    plora_last_error_copy(inner, sizeof inner);
    return plora__fail(status, "record %" PRId64 " at byte %" PRIu64 ": %s", index, offset, inner);
}

static plora_status reserve_slot(struct plora__ledger_store *store)
{
    if (store->count < store->capacity) return PLORA_OK;
    const int64_t larger = store->capacity == 0 ? 16 : 2 * store->capacity;
    void *moved;
    PLORA_TRY(plora__allocate(store->context, (size_t)larger * sizeof *store->slots, &moved));
    if (store->count > 0) memcpy(moved, store->slots, (size_t)store->count * sizeof *store->slots);
    plora__free(store->context, store->slots, (size_t)store->capacity * sizeof *store->slots);
    store->slots = moved;
    store->capacity = larger;
    return PLORA_OK;
}

static plora_status scan_records(struct plora__ledger_store *store, const unsigned char *bytes, uint64_t count)
{
    uint64_t at = store->header_bytes;
    while (at < count && !store->unmarked) {
        const plora_status status = check_record(store, bytes + at, count - at);
        if (status != PLORA_OK) {
            if (status == PLORA_ERROR_UNSUPPORTED || mark_follows(bytes, at, count))
                return fail_record(status, store->count, at);
            break;
        }
        const struct plora__ledger_record *record = (const struct plora__ledger_record *)(bytes + at);
        const uint64_t mark_at = at + record->bytes;
        const struct plora__ledger_mark *mark = (const struct plora__ledger_mark *)(bytes + mark_at);
        const int marked = count - mark_at >= sizeof *mark && is_mark(mark) && mark->index == store->count &&
                           mark->offset == at && mark->bytes == record->bytes && mark->lineage == record->lineage_after;
        if (!marked && mark_follows(bytes, mark_at, count))
            return plora__fail(PLORA_ERROR_FORMAT,
                               "record %" PRId64 " at byte %" PRIu64 ": its mark at byte %" PRIu64 " is damaged",
                               store->count, at, mark_at);
        PLORA_TRY(reserve_slot(store));
        store->slots[store->count++] = (struct plora__ledger_slot){at, record->bytes, record->lineage_after, NULL};
        store->unmarked = !marked;
        at = mark_at + sizeof *mark;
    }
    store->end = at;
    const uint64_t kept = store->unmarked ? at - sizeof(struct plora__ledger_mark) : at;
    store->cut = count - kept;
    return PLORA_OK;
}

plora_status plora__ledger_scan(struct plora__ledger_store *store, const unsigned char *bytes, uint64_t count)
{
    PLORA_TRY(check_header(bytes, count));
    void *memory;
    store->header_bytes = ((const struct plora__ledger_header *)bytes)->bytes;
    PLORA_TRY(plora__allocate(store->context, store->header_bytes, &memory));
    store->header = memory;
    memcpy(store->header, bytes, store->header_bytes);
    const plora_status status = scan_records(store, bytes, count);
    if (status != PLORA_OK) plora__ledger_lists_free(store);
    return status;
}

void plora__ledger_lists_free(struct plora__ledger_store *store)
{
    for (int64_t i = 0; i < store->count; ++i)
        plora__free(store->context, store->slots[i].memory, store->slots[i].bytes + PLORA__LEDGER_MARK_BYTES);
    plora__free(store->context, store->slots, (size_t)store->capacity * sizeof *store->slots);
    plora__free(store->context, store->header, store->header_bytes);
    store->slots = NULL;
    store->header = NULL;
    store->count = store->capacity = 0;
}

/* --------------------------------------------------------------------------------------------------------- system calls */

static plora_status system_error(const struct plora__ledger_store *store, const char *what, int error)
{
    char reason[128] = "unknown error";
    plora__fail(PLORA_ERROR_IO, "cannot %s the ledger '%.600s': %s", what, store->path,
                strerror_r(error, reason, sizeof reason));
    return PLORA_ERROR_IO; /* a constant, for static analysis */
}

/* 0 or errno. */
static int write_at(int descriptor, const void *data, uint64_t bytes, uint64_t offset)
{
    const unsigned char *from = data;
    while (bytes > 0) {
        const ssize_t done = pwrite(descriptor, from, bytes, (off_t)offset);
        if (done < 0 && errno == EINTR) continue;
        if (done < 0) return errno;
        if (done == 0) return EIO;
        from += done;
        bytes -= (uint64_t)done;
        offset += (uint64_t)done;
    }
    return 0;
}

static int sync_data(const struct plora__ledger_store *store)
{
    if (!store->sync) return 0;
    int result;
    do
        result = fdatasync(store->descriptor);
    while (result != 0 && errno == EINTR);
    return result == 0 ? 0 : errno;
}

static void unmap(struct plora__ledger_store *store)
{
    if (store->map == NULL) return;
    munmap(store->map, store->map_bytes);
    atomic_fetch_sub(&store->context->mapped_bytes, store->map_bytes);
    store->map = NULL;
    store->map_bytes = 0;
}

static plora_status map(struct plora__ledger_store *store, uint64_t bytes)
{
    if (store->map != NULL && store->map_bytes >= bytes) return PLORA_OK;
    unmap(store);
    void *data = mmap(NULL, bytes, PROT_READ, MAP_SHARED, store->descriptor, 0);
    if (data == MAP_FAILED) return system_error(store, "map", errno);
    store->map = data;
    store->map_bytes = bytes;
    atomic_fetch_add(&store->context->mapped_bytes, store->map_bytes);
    return PLORA_OK;
}

static int shorten(const struct plora__ledger_store *store, uint64_t bytes)
{
    int result;
    do
        result = ftruncate(store->descriptor, (off_t)bytes);
    while (result != 0 && errno == EINTR);
    return result == 0 ? 0 : errno;
}

/* ------------------------------------------------------------------------------------------------------ opening, ending */

static int open_again(const char *path)
{
    int descriptor;
    do
        descriptor = open(path, O_RDWR | O_CLOEXEC | O_NONBLOCK);
    while (descriptor < 0 && errno == EINTR);
    return descriptor;
}

static plora_status create_file(struct plora__ledger_store *store, const unsigned char *header)
{
    struct plora__writer writer;
    PLORA_TRY(plora__writer_open(store->context, store->path, &writer));
    const uint64_t bytes = ((const struct plora__ledger_header *)header)->bytes;
    return plora__writer_close(&writer, plora__writer_write(&writer, header, bytes));
}

/* Two ledgers on one file would write over each other's records. */
static plora_status lock_file(const struct plora__ledger_store *store, uint64_t *bytes)
{
    struct stat info;
    int result;
    do
        result = flock(store->descriptor, LOCK_EX | LOCK_NB);
    while (result != 0 && errno == EINTR);
    PLORA_CHECK(result == 0 || errno != EWOULDBLOCK, PLORA_ERROR_IO, "the ledger '%.600s' is in use: it is locked",
                store->path);
    if (fstat(store->descriptor, &info) != 0) return system_error(store, "open", errno);
    if (!S_ISREG(info.st_mode)) return system_error(store, "open", S_ISDIR(info.st_mode) ? EISDIR : ENODEV);
    *bytes = (uint64_t)info.st_size;
    return PLORA_OK;
}

static plora_status open_file(struct plora__ledger_store *store, const unsigned char *header)
{
    uint64_t bytes = 0;
    store->descriptor = open_again(store->path);
    if (store->descriptor < 0 && errno == ENOENT) {
        PLORA_TRY(create_file(store, header));
        store->descriptor = open_again(store->path);
    }
    if (store->descriptor < 0) return system_error(store, "open", errno);
    PLORA_TRY(lock_file(store, &bytes));
    PLORA_CHECK(bytes > 0, PLORA_ERROR_FORMAT, "%.600s: not a ledger: the file is empty", store->path);
    PLORA_TRY(map(store, bytes));
    const plora_status status = plora__ledger_scan(store, store->map, bytes);
    if (status != PLORA_OK) return plora__fail_in(status, store->path);
    if (store->cut == 0) return PLORA_OK;
    unmap(store);
    const int error = shorten(store, bytes - store->cut);
    if (error != 0) return system_error(store, "cut the unfinished end of", error);
    if (store->cut > PLORA__LEDGER_MARK_BYTES)
        plora__log(store->context, PLORA_LOG_WARNING,
                   "%s: %" PRIu64 " bytes at its end were cut off: a record that was never finished", store->path,
                   store->cut);
    return PLORA_OK;
}

static plora_status open_memory(struct plora__ledger_store *store, const unsigned char *header)
{
    void *memory;
    store->header_bytes = ((const struct plora__ledger_header *)header)->bytes;
    PLORA_TRY(plora__allocate(store->context, store->header_bytes, &memory));
    store->header = memory;
    memcpy(store->header, header, store->header_bytes);
    store->end = store->header_bytes;
    return PLORA_OK;
}

plora_status plora__ledger_store_open(plora_context *context, const char *path, int32_t sync,
                                      const unsigned char *header, struct plora__ledger_store *store)
{
    *store = (struct plora__ledger_store){.context = context, .descriptor = -1, .sync = sync};
    plora_status status;
    if (path == NULL)
        status = open_memory(store, header);
    else {
        status = plora__duplicate(context, path, &store->path);
        if (status == PLORA_OK) status = open_file(store, header);
    }
    if (status != PLORA_OK) plora__ledger_store_close(store);
    return status;
}

void plora__ledger_store_close(struct plora__ledger_store *store)
{
    unmap(store);
    if (store->descriptor >= 0) {
        if (store->count > 0) (void)sync_data(store); /* the last mark */
        close(store->descriptor);
    }
    plora__ledger_lists_free(store);
    plora__free_string(store->context, store->path);
    *store = (struct plora__ledger_store){.context = store->context, .descriptor = -1};
}

/* ------------------------------------------------------------------------------------------------------------- writing */

/* Head and entries, factors, and zeros where the mark will be: one write, if the system takes it whole. 0 or errno. */
static int write_record(const struct plora__ledger_store *store, const struct plora__ledger_record *record,
                        const float *factors)
{
    static const unsigned char zeros[PLORA__LEDGER_MARK_BYTES];
    const uint64_t table = plora__ledger_table_bytes(record->layer_count);
    const uint64_t bytes[3] = {table, record->bytes - table, sizeof zeros};
    const void *parts[3] = {record, factors, zeros};
    struct iovec pieces[3];
    for (int i = 0; i < 3; ++i)
        pieces[i] = (struct iovec){(void *)(uintptr_t)parts[i], bytes[i]};
    /* Blocks in one piece before the pages: cheaper than a reservation for each page. Where it cannot be, the write will tell. */
    (void)fallocate(store->descriptor, FALLOC_FL_KEEP_SIZE, (off_t)store->end,
                    (off_t)(record->bytes + PLORA__LEDGER_MARK_BYTES));
    ssize_t written;
    do
        written = pwritev(store->descriptor, pieces, 3, (off_t)store->end);
    while (written < 0 && errno == EINTR);
    if (written < 0) return errno;
    uint64_t done = (uint64_t)written, at = store->end;
    for (int i = 0; i < 3; ++i) { /* what it did not take */
        const uint64_t taken = done < bytes[i] ? done : bytes[i];
        const int error = write_at(store->descriptor, (const char *)parts[i] + taken, bytes[i] - taken, at + taken);
        if (error != 0) return error;
        done -= taken;
        at += bytes[i];
    }
    return 0;
}

static plora_status append_to_file(struct plora__ledger_store *store, const struct plora__ledger_record *record,
                                   const float *factors)
{
    const int stale = store->dirty ? shorten(store, store->end) : 0;
    if (stale != 0) return system_error(store, "cut the unfinished end of", stale);
    store->dirty = 0;
    int error = write_record(store, record, factors);
    const char *what = "write to";
    if (error == 0) {
        error = sync_data(store);
        what = "sync";
    }
    if (error == 0) return PLORA_OK;
    store->dirty = shorten(store, store->end) != 0;
    return system_error(store, what, error);
}

plora_status plora__ledger_append_record(struct plora__ledger_store *store, struct plora__ledger_record *record,
                                         const float *factors)
{
    PLORA_TRY(reserve_slot(store));
    if (store->unmarked) PLORA_TRY(plora__ledger_write_mark(store, 0, 0));
    if (store->path != NULL) PLORA_TRY(append_to_file(store, record, factors));
    store->slots[store->count++] = (struct plora__ledger_slot){store->end, record->bytes, record->lineage_after,
                                                               store->path == NULL ? record : NULL};
    store->end += record->bytes + PLORA__LEDGER_MARK_BYTES;
    store->unmarked = 1;
    return PLORA_OK;
}

plora_status plora__ledger_write_mark(struct plora__ledger_store *store, uint32_t flags, uint64_t weights_hash)
{
    const struct plora__ledger_slot *slot = &store->slots[store->count - 1];
    struct plora__ledger_mark mark = {
        .index = store->count - 1,
        .offset = slot->offset,
        .bytes = slot->bytes,
        .lineage = slot->lineage,
        .weights_hash = weights_hash,
        .flags = flags,
    };
    memcpy(mark.magic, MARK_MAGIC, sizeof mark.magic);
    mark.hash = mark_hash(&mark);
    if (slot->memory != NULL)
        memcpy((char *)slot->memory + slot->bytes, &mark, sizeof mark);
    else {
        const int error = write_at(store->descriptor, &mark, sizeof mark, slot->offset + slot->bytes);
        if (error != 0) return system_error(store, "write to", error);
    }
    store->unmarked = 0;
    return PLORA_OK;
}

plora_status plora__ledger_cut(struct plora__ledger_store *store, int64_t count)
{
    if (count >= store->count) return PLORA_OK;
    const uint64_t end = store->slots[count].offset;
    if (store->path != NULL) {
        unmap(store);
        int error = shorten(store, end);
        if (error == 0) error = sync_data(store);
        if (error != 0) return system_error(store, "shorten", error);
    }
    for (int64_t i = count; i < store->count; ++i)
        plora__free(store->context, store->slots[i].memory, store->slots[i].bytes + PLORA__LEDGER_MARK_BYTES);
    store->count = count;
    store->end = end;
    store->unmarked = store->dirty = 0;
    return PLORA_OK;
}

/* ------------------------------------------------------------------------------------------------------------- reading */

plora_status plora__ledger_record_get(struct plora__ledger_store *store, int64_t index,
                                      const struct plora__ledger_record **record,
                                      const struct plora__ledger_mark **mark)
{
    const struct plora__ledger_slot *slot = &store->slots[index];
    const unsigned char *bytes = slot->memory;
    if (bytes == NULL) {
        const int last = index == store->count - 1 && store->unmarked;
        PLORA_TRY(map(store, last ? slot->offset + slot->bytes : store->end));
        bytes = store->map + slot->offset;
    }
    *record = (const struct plora__ledger_record *)bytes;
    if (mark != NULL)
        *mark = index == store->count - 1 && store->unmarked ? NULL
                                                             : (const struct plora__ledger_mark *)(bytes + slot->bytes);
    return PLORA_OK;
}

plora_status plora__ledger_record_check(struct plora__ledger_store *store, int64_t index)
{
    const struct plora__ledger_record *record;
    PLORA_TRY(plora__ledger_record_get(store, index, &record, NULL));
    plora_status status = check_head(store, record, store->slots[index].bytes);
    if (status == PLORA_OK && record->lineage_after != store->slots[index].lineage)
        status = plora__fail(PLORA_ERROR_FORMAT, "it is another one than when the ledger was opened");
    if (status == PLORA_OK) status = check_factors(store->header, record);
    if (status == PLORA_OK) return PLORA_OK;
    status = fail_record(status, index, store->slots[index].offset);
    return store->path == NULL ? status : plora__fail_in(status, store->path);
}
