/* test_kill.c: a run with unloads is killed (SIGKILL) at any instant, again and again; resumed from its checkpoint and its ledger it
 * ends with the bits of one that nobody disturbed, and with the same ledger: no stage is lost or done twice.
 *
 *     calls     before, and in the middle of, every system call that writes or syncs: functions of this program stand before the C
 *               library's and raise the signal
 *     times     after random times; PLORA_KILLS=1000 asks for more of them (make test-kill)
 *
 * The run is a child process, the parent counts. So this is no cmocka program; it reports in TAP all the same. */
#include <signal.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>

#include "ledger_fixture.h"

enum { STAGES = 8, STEPS_OF_A_STAGE = 2, FINISHED = 0 };

/* ------------------------------------------------------------------------------------------------- calls that end the run */

static struct {
    int64_t at, calls; /* 0 = never */
    int halfway;       /* a write first does a part */
} killer;

static int deadly(void)
{
    return ++killer.calls == killer.at;
}

static void end_here(void)
{
    kill(getpid(), SIGKILL);
    for (;;)
        pause();
}

/* NOLINTBEGIN(readability-inconsistent-declaration-parameter-name): the C library's names are not for us */
ssize_t pwrite(int descriptor, const void *data, size_t bytes, off_t offset)
{
    if (deadly()) {
        if (killer.halfway) (void)syscall(SYS_pwrite64, descriptor, data, bytes / 2 + 3, offset);
        end_here();
    }
    return syscall(SYS_pwrite64, descriptor, data, bytes, offset);
}

ssize_t pwritev(int descriptor, const struct iovec *pieces, int count, off_t offset)
{
    const int dies = deadly(), last = dies && killer.halfway ? (int)(killer.at % count) : 0;
    ssize_t done = 0;
    for (int i = 0; i < count; ++i) {
        const size_t bytes = pieces[i].iov_len;
        if (dies && i == last) {
            if (killer.halfway)
                (void)syscall(SYS_pwrite64, descriptor, pieces[i].iov_base, bytes / 2 + 3, offset + done);
            end_here();
        }
        done += syscall(SYS_pwrite64, descriptor, pieces[i].iov_base, bytes, offset + done);
    }
    return done;
}

ssize_t write(int descriptor, const void *data, size_t bytes)
{
    if (descriptor > 2 && deadly()) {
        if (killer.halfway) (void)syscall(SYS_write, descriptor, data, bytes / 2);
        end_here();
    }
    return syscall(SYS_write, descriptor, data, bytes);
}

/* What was written survives the process without a sync, so none is done here. */
int fdatasync(int descriptor)
{
    (void)descriptor;
    if (deadly()) end_here();
    return 0;
}

int fsync(int descriptor)
{
    (void)descriptor;
    if (deadly()) end_here();
    return 0;
}

int ftruncate(int descriptor, off_t bytes)
{
    if (deadly()) end_here();
    return (int)syscall(SYS_ftruncate, descriptor, bytes);
}

int rename(const char *from, const char *to)
{
    if (deadly()) end_here();
    return (int)syscall(SYS_rename, from, to);
}

/* NOLINTEND(readability-inconsistent-declaration-parameter-name) */

/* ----------------------------------------------------------------------------------------------------------------- the run */

struct paths {
    struct ledger_path ledger, checkpoint, result;
};

static struct paths paths_of(const char *name)
{
    char text[64];
    struct paths paths;
    snprintf(text, sizeof text, "%s.ledger", name);
    paths.ledger = ledger_path(text);
    snprintf(text, sizeof text, "%s.checkpoint", name);
    paths.checkpoint = ledger_path(text);
    snprintf(text, sizeof text, "%s.result", name);
    paths.result = ledger_path(text);
    return paths;
}

static void forget(const struct paths *paths)
{
    unlink(paths->ledger.text);
    unlink(paths->checkpoint.text);
    unlink(paths->result.text);
}

static void step(struct ledger_run *run, int64_t number)
{
    float *gradients;
    int64_t count;
    CHECK_OK(plora_adapters_gradients(run->adapters, &gradients, &count));
    float *host = device_mirror(gradients, (size_t)count * sizeof(float));
    check_reseed(5000 + (uint64_t)number);
    for (int32_t layer = 0; layer < LEDGER_WEIGHTS; ++layer) {
        plora_adapter view = PLORA_ADAPTER_INIT;
        CHECK_OK(plora_adapters_layer(run->adapters, layer, &view));
        float *a = host + ((float *)view.a_gradient.data - gradients);
        float *b = host + ((float *)view.b_gradient.data - gradients);
        for (int64_t i = 0; i < view.a.rows * view.a.columns; ++i)
            a[i] = (float)check_uniform();
        for (int64_t i = 0; i < view.b.rows * view.b.columns; ++i)
            b[i] = (float)check_uniform();
    }
    CHECK_OK(DEVICE(plora_optimizer_step(run->optimizer, 1.0, NULL, NULL)));
    if (device_is_cuda()) device_forget(host);
}

/* What the run ends with. */
static void write_result(const struct ledger_run *run, const char *path)
{
    unsigned char bytes[1 << 16];
    size_t count = 0;
    for (int i = 0; i < LEDGER_WEIGHTS; ++i) {
        memcpy(bytes + count, run->weights[i].memory, run->weights[i].bytes);
        count += run->weights[i].bytes;
    }
    CHECK(count + (size_t)run->count * sizeof(float) <= sizeof bytes, "the result is larger than it was");
    memcpy(bytes + count, run->parameters, (size_t)run->count * sizeof(float));
    count += (size_t)run->count * sizeof(float);
    file_write(path, bytes, count);
}

/* Begins or goes on, to the end. The position is (stage, steps since the last unload). */
static void run_to_the_end(const struct paths *paths)
{
    struct ledger_run run;
    int64_t since = 0;
    ledger_run_open(&run, NULL, 2);
    CHECK_OK(ledger_attach(&run, paths->ledger.text, 0));
    if (access(paths->checkpoint.text, F_OK) == 0) {
        CHECK_OK(DEVICE(plora_checkpoint_load(run.adapters, run.optimizer, paths->checkpoint.text)));
        CHECK_OK(plora_optimizer_state(run.optimizer, NULL, NULL, NULL, &since));
    } else
        CHECK_OK(plora_ledger_truncate(run.ledger, 0));
    for (int64_t stage = plora_adapters_stage(run.adapters); stage < STAGES; ++stage, since = 0) {
        for (; since < STEPS_OF_A_STAGE; ++since) {
            const int64_t number = stage * STEPS_OF_A_STAGE + since;
            step(&run, number);
            if (number % 3 == 1)
                CHECK_OK(plora_checkpoint_save(run.adapters, run.optimizer, paths->checkpoint.text, 0));
        }
        plora_unload_options options = PLORA_UNLOAD_OPTIONS_INIT;
        options.momentum = ledger_momentum((int)stage);
        options.moments = PLORA_MOMENTS_RESET;
        CHECK_OK(DEVICE(plora_unload(run.adapters, run.optimizer, &options, NULL, NULL)));
    }
    write_result(&run, paths->result.text);
    ledger_run_close(&run);
}

/* ------------------------------------------------------------------------------------------------------------------ parent */

/* Starts the run as a child. */
static pid_t start(const struct paths *paths, int64_t at, int halfway)
{
    fflush(NULL);
    const pid_t child = fork();
    CHECK(child >= 0, "fork: the system refuses");
    if (child != 0) return child;
    killer.at = at;
    killer.calls = 0;
    killer.halfway = halfway;
    run_to_the_end(paths);
    _exit(FINISHED);
}

/* Whether it came to its end; else it was killed. */
static int finished(pid_t child)
{
    int status;
    CHECK(waitpid(child, &status, 0) == child, "waitpid");
    CHECK((WIFEXITED(status) && WEXITSTATUS(status) == FINISHED) ||
              (WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL),
          "the run failed: wait status 0x%x", (unsigned)status);
    return WIFEXITED(status);
}

static void check_same_file(const char *path, const char *reference, const char *what)
{
    size_t count, expected;
    unsigned char *bytes = file_read(path, &count), *want = file_read(reference, &expected);
    CHECK(count == expected && memcmp(bytes, want, count) == 0, "%s: %s differs from %s", what, path, reference);
    free(bytes);
    free(want);
}

static void check_result(const struct paths *paths, const struct paths *reference, const char *what)
{
    check_same_file(paths->result.text, reference->result.text, what);
    check_same_file(paths->ledger.text, reference->ledger.text, what);
}

static double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* Dies at call 1, 2, ..., and is resumed, until no call is left to die at. */
static int64_t kill_at_calls(const struct paths *reference, int halfway)
{
    const struct paths paths = paths_of("calls");
    int64_t kills = 0;
    for (int64_t at = 1;; at += check_quick() || device_is_cuda() ? 7 : 1) {
        forget(&paths);
        if (finished(start(&paths, at, halfway))) break;
        ++kills;
        /* once more, at a call of the resumed run */
        check_reseed((uint64_t)at);
        if (!finished(start(&paths, check_integer(1, 12), halfway))) {
            ++kills;
            CHECK(finished(start(&paths, 0, 0)), "nothing was to kill it");
        }
        check_result(&paths, reference, halfway ? "killed in the middle of a call" : "killed before a call");
    }
    CHECK(kills > 10, "%lld kills", (long long)kills);
    return kills;
}

/* `kills` signals after random times, spread over as many runs as that takes. */
static int64_t kill_at_times(const struct paths *reference, int64_t kills, double length)
{
    const struct paths paths = paths_of("times");
    int64_t done = 0, runs = 0;
    check_reseed(23);
    forget(&paths);
    while (done < kills) {
        const pid_t child = start(&paths, 0, 0);
        const double wait = 0.55 * (1.0 + check_uniform()) * length;
        const struct timespec time = {(time_t)wait, (long)(1e9 * (wait - floor(wait)))};
        nanosleep(&time, NULL);
        kill(child, SIGKILL);
        if (!finished(child)) {
            ++done;
            continue;
        }
        check_result(&paths, reference, "killed after random times");
        forget(&paths);
        ++runs;
    }
    CHECK(finished(start(&paths, 0, 0)), "nothing was to kill it");
    check_result(&paths, reference, "killed after random times");
    return runs + 1;
}

int main(void)
{
    const char *asked = getenv("PLORA_KILLS");
    const int64_t kills = asked != NULL ? strtoll(asked, NULL, 10) : check_quick() ? 5 : 40;
    check_begin("test_kill");
    if (file_setup(NULL) != 0) return 1;
    printf("1..3\n");
    const struct paths reference = paths_of("reference");
    double length = 0;
    for (int i = 0; i < 3; ++i) { /* the length of a run that is not the first of its kind */
        forget(&reference);
        const double begin = seconds();
        CHECK(finished(start(&reference, 0, 0)), "nothing was to kill it");
        length = seconds() - begin;
    }
    for (int halfway = 0; halfway < 2; ++halfway)
        printf("ok %d - %lld kills %s system calls\n", halfway + 1, (long long)kill_at_calls(&reference, halfway),
               halfway ? "in the middle of" : "before");
    const int64_t runs = kill_at_times(&reference, kills, length);
    printf("ok 3 - %lld kills after random times, in %lld runs of %.1f ms\n", (long long)kills, (long long)runs,
           1e3 * length);
    file_teardown(NULL);
    return 0;
}
