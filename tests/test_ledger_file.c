/* test_ledger_file.c: the ledger's file under torn ends, flipped bits, failing system calls and failing allocations, and what a
 * checkpoint has to do with it.
 *
 * System calls fail by functions of this program that stand before the C library's: `faults` says what the k-th call does. */
#include <errno.h>
#include <fcntl.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#include "ledger_fixture.h"

/* -------------------------------------------------------------------------------------------------------------- faults */

enum fault { FAULT_NONE, FAULT_ERROR, FAULT_SHORT, FAULT_INTERRUPTED };

static struct {
    enum fault fault;
    int error;
    int64_t at, calls; /* fails call number `at`, and with `more` the ones after it */
    int more;
} faults;

/* 1 when this call is to fail. */
static int faulty(void)
{
    if (faults.fault == FAULT_NONE) return 0;
    const int64_t call = ++faults.calls;
    return call == faults.at || (faults.more && call > faults.at);
}

static void fault_at(enum fault fault, int error, int64_t at, int more)
{
    faults.fault = fault;
    faults.error = error;
    faults.at = at;
    faults.calls = 0;
    faults.more = more;
}

/* The result of a write that fails; a disk that is full takes a part first. */
static ssize_t fail_write(int descriptor, const void *data, size_t bytes, off_t offset)
{
    if (faults.fault == FAULT_SHORT)
        return syscall(SYS_pwrite64, descriptor, data, bytes > 1 ? bytes / 2 + 1 : 1, offset);
    if (faults.fault == FAULT_ERROR && bytes > 8) (void)syscall(SYS_pwrite64, descriptor, data, bytes / 3, offset);
    errno = faults.fault == FAULT_INTERRUPTED ? EINTR : faults.error;
    if (faults.fault == FAULT_INTERRUPTED) faults.at += 2;
    return -1;
}

/* NOLINTBEGIN(readability-inconsistent-declaration-parameter-name): the C library's names are not for us */
ssize_t pwrite(int descriptor, const void *data, size_t bytes, off_t offset)
{
    if (faulty()) return fail_write(descriptor, data, bytes, offset);
    return syscall(SYS_pwrite64, descriptor, data, bytes, offset);
}

/* Piece by piece; one that fails does so in any of them. */
ssize_t pwritev(int descriptor, const struct iovec *pieces, int count, off_t offset)
{
    ssize_t done = 0;
    const int fails = faulty();
    const int last = fails ? (int)(faults.calls + faults.at) % count : count;
    for (int i = 0; i < count; ++i) {
        const off_t at = offset + (off_t)done;
        if (i == last) {
            const ssize_t some = fail_write(descriptor, pieces[i].iov_base, pieces[i].iov_len, at);
            return some < 0 ? some : done + some;
        }
        if (syscall(SYS_pwrite64, descriptor, pieces[i].iov_base, pieces[i].iov_len, at) != (ssize_t)pieces[i].iov_len)
            return -1;
        done += (ssize_t)pieces[i].iov_len;
    }
    return done;
}

int fdatasync(int descriptor)
{
    if (faulty() && faults.fault != FAULT_SHORT) {
        errno = faults.fault == FAULT_INTERRUPTED ? EINTR : faults.error;
        return -1;
    }
    (void)descriptor;
    return 0; /* no power fails here */
}

int fsync(int descriptor)
{
    (void)descriptor;
    return 0;
}

int ftruncate(int descriptor, off_t bytes)
{
    if (faulty() && faults.fault != FAULT_SHORT) {
        errno = faults.fault == FAULT_INTERRUPTED ? EINTR : faults.error;
        return -1;
    }
    return (int)syscall(SYS_ftruncate, descriptor, bytes);
}

/* NOLINTEND(readability-inconsistent-declaration-parameter-name) */

/* Unloads of a run with a file, in which call number k fails: nothing has changed, and the next attempt succeeds. */
static void failing_calls(void **state)
{
    (void)state;
    static const struct {
        enum fault fault;
        int error, more;
    } kinds[] = {{FAULT_ERROR, ENOSPC, 0}, {FAULT_ERROR, EIO, 1}, {FAULT_SHORT, 0, 1}, {FAULT_INTERRUPTED, 0, 0}};
    const struct ledger_path kept = ledger_path("failing");
    const char *path = kept.text;
    struct ledger_run straight;
    ledger_run_open(&straight, NULL, 2);
    ledger_stages(&straight, 0, 4);
    for (int kind = 0; kind < CHECK_COUNT(kinds); ++kind)
        for (int64_t at = 1; at <= 6; ++at) {
            struct ledger_run run;
            int failures = 0;
            unlink(path);
            ledger_run_open(&run, NULL, 2);
            CHECK_OK(ledger_attach(&run, path, 1));
            for (int step = 0; step < 4; ++step) {
                ledger_train(&run, step);
                struct ledger_picture before = ledger_picture_of(&run);
                fault_at(kinds[kind].fault, kinds[kind].error, at, kinds[kind].more);
                const plora_status status = ledger_unload(&run, step);
                fault_at(FAULT_NONE, 0, 0, 0);
                if (status != PLORA_OK) {
                    ++failures;
                    CHECK_FAILS(status, PLORA_ERROR_IO, "/failing': ", strerror(kinds[kind].error));
                    ledger_same_picture(&run, &before, 0, "an unload that could not write");
                    CHECK(plora_ledger_length(run.ledger) == step && plora_ledger_position(run.ledger) == step,
                          "a record that was not written counts");
                    CHECK_OK(ledger_unload(&run, step));
                }
                ledger_picture_free(&before);
            }
            /* Calls 1 and 2 write and sync the record. Call 3 is the mark, which the next unload must write first: then call 3
             * is its sync. */
            const int expected = at <= 2 ? 4 : at == 3 ? 2 : 0;
            CHECK(failures == (kinds[kind].fault == FAULT_ERROR ? expected : 0), "kind %d, call %lld: %d failures",
                  kind, (long long)at, failures);
            ledger_same_run(&run, &straight, "after failures");
            CHECK_OK(plora_ledger_verify(run.ledger));
            ledger_run_close(&run);
            ledger_run_open(&run, NULL, 2);
            CHECK_OK(ledger_attach(&run, path, 0));
            CHECK(plora_ledger_length(run.ledger) == 4, "%lld records", (long long)plora_ledger_length(run.ledger));
            CHECK_OK(DEVICE(plora_ledger_roll_back(run.ledger, 4, 0)));
            ledger_same_run(&run, &straight, "reopened after failures");
            ledger_run_close(&run);
        }
    ledger_run_close(&straight);
}

/* Truncation that fails keeps the records. */
static void failing_truncation(void **state)
{
    (void)state;
    struct ledger_run run;
    ledger_run_open(&run, NULL, 2);
    CHECK_OK(ledger_attach(&run, file_path("truncation"), 1));
    ledger_stages(&run, 0, 3);
    CHECK_OK(DEVICE(plora_ledger_roll_back(run.ledger, 1, 0)));
    fault_at(FAULT_ERROR, EIO, 1, 0);
    CHECK_FAILS(plora_ledger_truncate(run.ledger, 1), PLORA_ERROR_IO, "Input/output error");
    fault_at(FAULT_NONE, 0, 0, 0);
    CHECK(plora_ledger_length(run.ledger) == 3, "%lld records", (long long)plora_ledger_length(run.ledger));
    CHECK_OK(DEVICE(plora_ledger_roll_back(run.ledger, 3, 0)));
    CHECK_OK(plora_ledger_verify(run.ledger));
    ledger_run_close(&run);
}

/* -------------------------------------------------------------------------------------------------------------- damage */

enum { RECORDS = 3 };

/* A ledger of three records as bytes, where its header and each record with its mark end, and W and adapters after each. */
struct sample {
    unsigned char *bytes;
    size_t count, ends[RECORDS + 1];
    struct ledger_picture pictures[RECORDS + 1];
    struct ledger_run run; /* the run that made it; its ledger is closed */
};

static void sample_make(struct sample *sample)
{
    struct ledger_run *run = &sample->run;
    unlink(file_path("sample"));
    ledger_run_open(run, NULL, 2);
    CHECK_OK(ledger_attach(run, file_path("sample"), 0));
    sample->pictures[0] = ledger_picture_of(run);
    for (int step = 0; step < RECORDS; ++step) {
        plora_ledger_record_info info = PLORA_LEDGER_RECORD_INFO_INIT;
        ledger_stages(run, step, step + 1);
        sample->pictures[step + 1] = ledger_picture_of(run);
        CHECK_OK(plora_ledger_record(run->ledger, step, &info));
        if (step == 0) sample->ends[0] = info.offset;
        sample->ends[step + 1] = info.offset + info.bytes + 64;
    }
    plora_ledger_destroy(run->ledger);
    run->ledger = NULL;
    sample->bytes = file_read(file_path("sample"), &sample->count);
    CHECK(sample->count == sample->ends[RECORDS], "%zu bytes, the last mark ends at %zu", sample->count,
          sample->ends[RECORDS]);
}

static void sample_free(struct sample *sample)
{
    for (int i = 0; i <= RECORDS; ++i)
        ledger_picture_free(&sample->pictures[i]);
    free(sample->bytes);
    ledger_run_close(&sample->run);
}

/* A new file: writing one over is slow where the file system flushes what was shortened. */
static void write_damaged(const unsigned char *bytes, size_t count)
{
    unlink(file_path("damaged"));
    file_write(file_path("damaged"), bytes, count);
}

/* A process that knows nothing but W_0. */
static void sample_rewind(struct sample *sample)
{
    ledger_run_close(&sample->run);
    ledger_run_open(&sample->run, NULL, 2);
}

/* The file holds the first `records` records, and can be gone on with to the end. */
static void check_prefix(struct sample *sample, int64_t records, const char *what, size_t byte)
{
    struct ledger_run *run = &sample->run;
    sample_rewind(sample);
    const plora_status status = ledger_attach(run, file_path("damaged"), 0);
    CHECK(status == PLORA_OK, "%s at byte %zu: %s", what, byte, plora_last_error());
    CHECK(plora_ledger_length(run->ledger) == records, "%s at byte %zu: %lld records, want %lld", what, byte,
          (long long)plora_ledger_length(run->ledger), (long long)records);
    CHECK_OK(DEVICE(plora_ledger_roll_back(run->ledger, records, 0)));
    ledger_same_picture(run, &sample->pictures[records], 0, what);
    ledger_stages(run, (int)records, RECORDS);
    ledger_same_picture(run, &sample->pictures[RECORDS], 0, what);
    plora_ledger_destroy(run->ledger);
    run->ledger = NULL;
    size_t count;
    unsigned char *bytes = file_read(file_path("damaged"), &count);
    if (count == sample->count - 64 && records == RECORDS)
        CHECK(memcmp(bytes, sample->bytes, count) == 0, "%s at byte %zu: other bytes", what, byte);
    else
        CHECK(count == sample->count && memcmp(bytes, sample->bytes, count) == 0,
              "%s at byte %zu: the file ended otherwise than without", what, byte);
    free(bytes);
}

/* Random numbers of its own: each new run starts the others again. */
static int64_t dice(int64_t low, int64_t high)
{
    static uint64_t own;
    const uint64_t others = check_state;
    check_state = own + check_seed_value;
    const int64_t result = check_integer(low, high);
    own = check_state - check_seed_value;
    check_state = others;
    return result;
}

/* From one byte that is tried to the next: an emulated device takes its time to start. */
static size_t stride(void)
{
    return check_quick() || device_is_cuda() ? (size_t)dice(40, 90) : 1;
}

/* The file ends after any number of bytes: as after a crash in the middle of a write. */
static void torn_tail(void **state)
{
    (void)state;
    struct sample sample;
    sample_make(&sample);
    for (size_t end = 0; end <= sample.count; end += stride()) {
        write_damaged(sample.bytes, end);
        if (end < sample.ends[0]) {
            sample_rewind(&sample);
            CHECK_FAILS(ledger_attach(&sample.run, file_path("damaged"), 0), PLORA_ERROR_FORMAT, "/damaged: ");
            continue;
        }
        int64_t records = 0;
        while (records < RECORDS && end >= sample.ends[records + 1] - 64)
            ++records;
        check_prefix(&sample, records, "an end", end);
    }
    sample_free(&sample);
}

/* What a machine that stopped may leave behind the last synced byte: zeros, or a record with a hole in it. */
static void unfinished_writes(void **state)
{
    (void)state;
    struct sample sample;
    sample_make(&sample);
    unsigned char *bytes = malloc(sample.count);
    CHECK(bytes != NULL, "the test itself is out of memory");
    for (int records = 0; records < RECORDS; ++records)
        for (size_t hole = sample.ends[records]; hole < sample.ends[records + 1] - 64; hole += 64) {
            const size_t end = sample.ends[records + 1];
            memcpy(bytes, sample.bytes, end);
            memset(bytes + hole, 0, 64);
            memset(bytes + end - 64, 0, 64); /* the mark comes after the sync */
            if (memcmp(bytes + hole, sample.bytes + hole, 64) == 0) continue;
            write_damaged(bytes, end);
            check_prefix(&sample, records, "a hole", hole);
            if (hole > sample.ends[records]) continue;
            memset(bytes + hole, 0, end - hole);
            write_damaged(bytes, end);
            check_prefix(&sample, records, "zeros", hole);
        }
    free(bytes);
    sample_free(&sample);
}

/* One bit of every byte, at random: an error that names the place, or, in the last mark, no harm. */
static void flipped_bits(void **state)
{
    (void)state;
    struct sample sample;
    sample_make(&sample);
    int64_t harmless = 0;
    for (size_t byte = 0; byte < sample.count; byte += stride())
        for (int bit = (int)dice(0, 2); bit < 8; bit += (int)dice(1, 8)) {
            char place[64];
            int64_t record = 0;
            const unsigned char mask = (unsigned char)(1u << bit);
            sample.bytes[byte] ^= mask;
            write_damaged(sample.bytes, sample.count);
            sample.bytes[byte] ^= mask;
            if (byte >= sample.ends[RECORDS] - 64) {
                check_prefix(&sample, RECORDS, "a flipped bit", byte);
                ++harmless;
                continue;
            }
            while (byte >= sample.ends[record])
                ++record;
            if (record == 0)
                snprintf(place, sizeof place, "%s", byte < 8 ? "PLORALED" : byte < 64 ? "byte 0" : "byte 64");
            else
                snprintf(place, sizeof place, "record %lld at byte %zu: ", (long long)record - 1,
                         sample.ends[record - 1]);
            sample_rewind(&sample);
            CHECK_FAILS(ledger_attach(&sample.run, file_path("damaged"), 0), PLORA_ERROR_FORMAT, place, "/damaged: ");
            ledger_same_picture(&sample.run, &sample.pictures[0], 1, "after a refused ledger");
        }
    CHECK(harmless > 0 || stride() > 1, "no flip of the last mark");
    sample_free(&sample);
}

/* Damage that comes while the ledger is open is found before it is merged. */
static void damaged_while_open(void **state)
{
    (void)state;
    struct ledger_run run;
    ledger_run_open(&run, NULL, 2);
    CHECK_OK(ledger_attach(&run, file_path("open"), 1));
    ledger_stages(&run, 0, 3);
    struct ledger_picture picture = ledger_picture_of(&run);
    plora_ledger_record_info info = PLORA_LEDGER_RECORD_INFO_INIT;
    CHECK_OK(plora_ledger_record(run.ledger, 1, &info));
    const int descriptor = open(file_path("open"), O_RDWR);
    unsigned char byte;
    CHECK(descriptor >= 0 && pread(descriptor, &byte, 1, (off_t)(info.offset + info.bytes - 70)) == 1, "cannot read");
    byte ^= 4;
    CHECK(pwrite(descriptor, &byte, 1, (off_t)(info.offset + info.bytes - 70)) == 1, "cannot write");
    CHECK_FAILS(plora_ledger_roll_back(run.ledger, 2, 0), PLORA_ERROR_FORMAT, "record 1 at byte", "/open: ");
    ledger_same_picture(&run, &picture, 0, "a refused roll back");
    CHECK_OK(DEVICE(plora_ledger_roll_back(run.ledger, 1, 0)));
    byte ^= 4;
    CHECK(pwrite(descriptor, &byte, 1, (off_t)(info.offset + info.bytes - 70)) == 1, "cannot write");
    close(descriptor);
    CHECK_OK(DEVICE(plora_ledger_roll_back(run.ledger, 3, 0)));
    ledger_same_picture(&run, &picture, 0, "repaired");
    ledger_picture_free(&picture);
    ledger_run_close(&run);
}

/* ---------------------------------------------------------------------------------------------------------- checkpoint */

/* A run that resumes from a checkpoint without weights and a ledger that is ahead of it. */
static void resumes(const char *path, uint32_t flags)
{
    struct ledger_run straight, run, second;
    const struct ledger_path kept = ledger_path("checkpoint");
    const char *checkpoint = kept.text;
    ledger_run_open(&straight, NULL, 2);
    ledger_stages(&straight, 0, 12);
    for (int at = 0; at <= 6; at += 2) {
        unlink(path);
        ledger_run_open(&run, NULL, 2);
        CHECK_OK(ledger_attach(&run, path, 0));
        ledger_stages(&run, 0, at);
        ledger_train(&run, at);
        CHECK_OK(plora_checkpoint_save(run.adapters, run.optimizer, checkpoint, flags));
        CHECK_OK(ledger_unload(&run, at));
        ledger_stages(&run, at + 1, at + 3);
        ledger_run_close(&run);
        ledger_run_open(&second, NULL, 2);
        CHECK_OK(ledger_attach(&second, path, 0));
        CHECK_OK(DEVICE(plora_checkpoint_load(second.adapters, second.optimizer, checkpoint)));
        CHECK(plora_ledger_length(second.ledger) == at && plora_ledger_position(second.ledger) == at,
              "position %lld of %lld, want %d", (long long)plora_ledger_position(second.ledger),
              (long long)plora_ledger_length(second.ledger), at);
        CHECK_OK(ledger_unload(&second, at));
        ledger_stages(&second, at + 1, 12);
        ledger_same_run(&second, &straight, "resumed");
        ledger_run_close(&second);
    }
    ledger_run_close(&straight);
}

static void checkpoint_resumes(void **state)
{
    (void)state;
    const struct ledger_path kept = ledger_path("resumed");
    resumes(kept.text, 0);
    resumes(kept.text, PLORA_CHECKPOINT_WEIGHTS);
}

static void checkpoint_refuses(void **state)
{
    (void)state;
    const struct ledger_path kept[2] = {ledger_path("refused"), ledger_path("checkpoint")};
    const char *path = kept[0].text, *checkpoint = kept[1].text;
    struct ledger_run run, other;
    unlink(path);
    ledger_run_open(&run, NULL, 2);
    CHECK_OK(ledger_attach(&run, path, 1));
    CHECK_OK(plora_checkpoint_save(run.adapters, run.optimizer, file_path("early"), 0));
    ledger_stages(&run, 0, 4);
    CHECK_OK(plora_checkpoint_save(run.adapters, run.optimizer, checkpoint, 0));
    CHECK_OK(plora_checkpoint_save(run.adapters, run.optimizer, file_path("whole"), PLORA_CHECKPOINT_WEIGHTS));

    ledger_run_open(&other, NULL, 2);
    CHECK_FAILS(plora_checkpoint_load(other.adapters, other.optimizer, checkpoint), PLORA_ERROR_INVALID_ARGUMENT,
                "in a ledger of 4 records", "/checkpoint: ");
    CHECK_OK(plora_checkpoint_load(other.adapters, other.optimizer, file_path("early")));
    CHECK_OK(DEVICE(plora_checkpoint_load(other.adapters, other.optimizer, file_path("whole"))));
    ledger_same_weights(&other, &run, "weights from the checkpoint alone");
    CHECK_OK(plora_checkpoint_save(other.adapters, other.optimizer, file_path("without"), PLORA_CHECKPOINT_WEIGHTS));
    ledger_run_close(&other);

    ledger_run_open(&other, NULL, 2);
    CHECK_OK(ledger_attach(&other, NULL, 0));
    ledger_stages(&other, 0, 3);
    struct ledger_picture picture = ledger_picture_of(&other);
    CHECK_FAILS(plora_checkpoint_load(other.adapters, other.optimizer, checkpoint), PLORA_ERROR_INVALID_ARGUMENT,
                "a ledger of 4 records, this one has 3");
    CHECK_FAILS(plora_checkpoint_load(other.adapters, other.optimizer, file_path("without")),
                PLORA_ERROR_INVALID_ARGUMENT, "without a ledger");
    ledger_same_picture(&other, &picture, 0, "after a refused load");
    ledger_train(&other, 99); /* another history */
    CHECK_OK(ledger_unload(&other, 3));
    ledger_picture_free(&picture);
    picture = ledger_picture_of(&other);
    CHECK_FAILS(plora_checkpoint_load(other.adapters, other.optimizer, checkpoint), PLORA_ERROR_INVALID_ARGUMENT,
                "another ledger: lineage");
    ledger_same_picture(&other, &picture, 0, "after a refused load");
    CHECK(plora_ledger_length(other.ledger) == 4, "a refused load dropped records");
    ledger_picture_free(&picture);
    ledger_run_close(&other);

    /* an unknown position is no place to save; a load finds it */
    ledger_run_open(&other, NULL, 2);
    ledger_stages(&other, 0, 1);
    plora_ledger_destroy(run.ledger);
    run.ledger = NULL;
    CHECK_OK(ledger_attach(&other, path, 1));
    CHECK_FAILS(plora_checkpoint_save(other.adapters, other.optimizer, file_path("unknown"), 0),
                PLORA_ERROR_INVALID_ARGUMENT, "not known");
    CHECK_OK(DEVICE(plora_checkpoint_load(other.adapters, other.optimizer, checkpoint)));
    ledger_same_run(&other, &run, "found again");
    ledger_run_close(&other);
    ledger_run_close(&run);
}

/* A flipped bit anywhere in a checkpoint: refused, and nothing has changed. */
static void checkpoint_flipped(void **state)
{
    (void)state;
    struct ledger_run run;
    size_t count;
    ledger_run_open(&run, NULL, 2);
    ledger_stages(&run, 0, 2);
    ledger_train(&run, 2);
    CHECK_OK(DEVICE(plora_synchronize(run.context, NULL)));
    CHECK_OK(plora_checkpoint_save(run.adapters, run.optimizer, file_path("sample"), PLORA_CHECKPOINT_WEIGHTS));
    unsigned char *bytes = file_read(file_path("sample"), &count);
    struct ledger_picture picture = ledger_picture_of(&run);
    for (size_t byte = 0; byte < count; byte += stride()) {
        const unsigned char mask = (unsigned char)(1 << dice(0, 7));
        bytes[byte] ^= mask;
        write_damaged(bytes, count);
        bytes[byte] ^= mask;
        const plora_status status = plora_checkpoint_load(run.adapters, run.optimizer, file_path("damaged"));
        /* \u000A is another way to write \u000a */
        const int same = mask == 0x20 && byte >= 5 && memcmp(bytes + byte - 5, "\\u000a", 6) == 0;
        CHECK(status != PLORA_OK || same, "a flipped bit at byte %zu of %zu was not found", byte, count);
        ledger_same_picture(&run, &picture, 0, "after a damaged checkpoint");
    }
    write_damaged(bytes, count);
    CHECK_OK(plora_checkpoint_load(run.adapters, run.optimizer, file_path("damaged")));
    free(bytes);
    ledger_picture_free(&picture);
    ledger_run_close(&run);
}

/* ------------------------------------------------------------------------------------------------------- out of memory */

/* Everything once; stops at the first error. */
static plora_status whole_story(struct ledger_run *run, const char *path)
{
    plora_ledger_options options = PLORA_LEDGER_OPTIONS_INIT;
    options.path = path;
    options.original = run->original;
    options.hash_weights = 1;
    plora_status status = plora_ledger_open(run->adapters, &options, &run->ledger);
    for (int step = 0; step < 3 && status == PLORA_OK; ++step) {
        ledger_train(run, step);
        struct ledger_picture before = ledger_picture_of(run);
        status = ledger_unload(run, step);
        if (status != PLORA_OK) {
            ledger_same_picture(run, &before, 0, "an unload without memory");
            CHECK(plora_ledger_length(run->ledger) == step, "a record without memory");
        }
        ledger_picture_free(&before);
    }
    struct ledger_picture before = ledger_picture_of(run);
    if (status == PLORA_OK) status = plora_ledger_verify(run->ledger);
    if (status == PLORA_OK) {
        status = DEVICE(plora_ledger_roll_back(run->ledger, 1, 0));
        if (status != PLORA_OK) ledger_same_picture(run, &before, 0, "a roll back without memory");
    }
    ledger_picture_free(&before);
    if (status == PLORA_OK) status = plora_ledger_truncate(run->ledger, 1);
    plora_ledger_destroy(run->ledger);
    run->ledger = NULL;
    return status;
}

static void out_of_memory(void **state)
{
    (void)state;
    for (int file = 0; file < 2; ++file) {
        struct check_allocator allocator = CHECK_ALLOCATOR_INIT;
        const struct ledger_path kept = ledger_path("memory");
        const char *path = file ? kept.text : NULL;
        int done = 0;
        int64_t k = 1;
        for (; !done; ++k) {
            struct ledger_run run;
            if (file) unlink(path);
            ledger_run_open(&run, &allocator, 2);
            const int64_t base = allocator.live, failed = allocator.failed;
            allocator.fail_at = allocator.calls + k;
            const plora_status status = whole_story(&run, path);
            done = allocator.failed == failed;
            allocator.fail_at = 0;
            /* a hash that found no memory (on a device) is left out of the record */
            CHECK(status == (done ? PLORA_OK : PLORA_ERROR_OUT_OF_MEMORY) || device_is_cuda(),
                  "allocation %lld: status %d", (long long)k, status);
            CHECK(allocator.live == base, "allocation %lld: %lld blocks left", (long long)k,
                  (long long)(allocator.live - base));
            CHECK(k < 200, "%lld allocations", (long long)k);
            ledger_run_close(&run);
        }
        CHECK(k > 8, "%lld allocations", (long long)k);
        check_allocator_empty(&allocator, "out of memory");
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(failing_calls),      cmocka_unit_test(failing_truncation),
        cmocka_unit_test(torn_tail),          cmocka_unit_test(unfinished_writes),
        cmocka_unit_test(flipped_bits),       cmocka_unit_test(damaged_while_open),
        cmocka_unit_test(checkpoint_resumes), cmocka_unit_test(checkpoint_refuses),
        cmocka_unit_test(checkpoint_flipped), cmocka_unit_test(out_of_memory),
    };
    check_begin("test_ledger_file");
    return cmocka_run_group_tests(tests, file_setup, file_teardown);
}
