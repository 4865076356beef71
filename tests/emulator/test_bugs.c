/* test_bugs.c: every check of the interpreter finds the bug that kernels/bugs.cu has planted for it: the right kind, kernel and
 * source line, exit status 86, and the error code of a fault; and says nothing about the same kernel without the bug. Each runs in
 * a process of its own. */
#include "kernel_tests.h"

#include <signal.h>

enum { BLOCKS = 3, THREADS = 128, NUMBERS = BLOCKS * THREADS };

struct bug_params {
    float *in, *out, *sum;
    unsigned *counter;
    float *freed;
};

static const struct bug {
    const char *name, *finding;
    cudaError_t error;
    int sm;
} bugs[] = {
    {"read_bound", "read out of bounds", cudaErrorIllegalAddress, 75},
    {"write_bound", "write out of bounds", cudaErrorIllegalAddress, 75},
    {"before_start", "write out of bounds", cudaErrorIllegalAddress, 75},
    {"null_pointer", "read out of bounds", cudaErrorIllegalAddress, 75},
    {"misaligned", "misaligned address", cudaErrorMisalignedAddress, 75},
    {"after_free", "use after free", cudaErrorIllegalAddress, 75},
    {"not_initialised", "uninitialised read", cudaSuccess, 75},
    {"half_initialised", "uninitialised read", cudaSuccess, 75},
    {"shared_bound", "shared write out of bounds", cudaErrorIllegalAddress, 75},
    {"shared_not_initialised", "uninitialised read", cudaSuccess, 75},
    {"missing_barrier", "shared memory race", cudaSuccess, 75},
    {"missing_second_barrier", "shared memory race", cudaSuccess, 75},
    {"missing_syncwarp", "shared memory race", cudaSuccess, 75},
    {"same_place", "shared memory race", cudaSuccess, 75},
    {"shared_not_atomic", "shared memory race", cudaSuccess, 75},
    {"local_bound", "local read out of bounds", cudaErrorIllegalAddress, 75},
    {"local_not_initialised", "uninitialised read", cudaSuccess, 75},
    {"not_atomic", "race between blocks", cudaSuccess, 75},
    {"other_blocks_data", "race between blocks", cudaSuccess, 75},
    {"missing_fence", "race between blocks", cudaSuccess, 75},
    {"early_fence", "race between blocks", cudaSuccess, 75},
    {"divergent_barrier", "divergent barrier", cudaErrorLaunchFailure, 75},
    {"barrier_after_exit", "barrier after exits", cudaSuccess, 75},
    {"two_barriers", "barriers differ", cudaSuccess, 75},
    {"endless_barrier", "barrier never completes", cudaErrorLaunchFailure, 75},
    {"absent_lane", "wrong mask", cudaSuccess, 75},
    {"exited_lane", "wrong mask", cudaSuccess, 75},
    {"unnamed_lane", "wrong mask", cudaSuccess, 75},
    {"inactive_source", "wrong mask", cudaSuccess, 75},
    {"trapped", "trap", cudaErrorLaunchFailure, 75},
    {"missing_wait", "cp.async not waited for", cudaSuccess, 80},
    {"short_wait", "cp.async not waited for", cudaSuccess, 80},
    {"wait_without_barrier", "shared memory race", cudaSuccess, 80},
    {"copy_too_early", "shared memory race", cudaSuccess, 80},
    {"divergent_mma", "divergent warp", cudaErrorLaunchFailure, 80},
    {"misaligned_rows", "misaligned address", cudaErrorMisalignedAddress, 80},
};

/* ------------------------------------------------------------------------------------------------------- in the process */
/* Runs good_NAME or bad_NAME, and prints the error. */
static int run(const char *name)
{
    float numbers[NUMBERS], zeros[2] = {0, 0};
    for (int i = 0; i < NUMBERS; ++i)
        numbers[i] = (float)check_integer(0, 1000);
    kernels_open("bugs");
    struct bug_params p = {device_array(sizeof numbers, numbers), device_array(sizeof numbers, NULL),
                           device_array(8, zeros), device_array(8, zeros), device_array(sizeof numbers, numbers)};
    cu.cudaFree(p.freed);
    const cudaError_t error = kernels_launch(name, (dim3){BLOCKS, 1, 1}, (dim3){THREADS, 1, 1}, 0, &p);
    printf("error %d\n", (int)error);
    cu.cudaFree(p.in), cu.cudaFree(p.out), cu.cudaFree(p.sum), cu.cudaFree(p.counter);
    kernels_close();
    return 0;
}

/* The host reads what is the device's. */
static int host_access(void)
{
    kernels_open("bugs");
    float *memory = device_array(64, NULL);
    return *(volatile float *)(memory + 3) > 0;
}

/* --------------------------------------------------------------------------------------------------------- the verdicts */
/* Line `number` of a file. */
static void read_line(const char *path, int number, char *line, size_t size)
{
    FILE *file = fopen(path, "r");
    CHECK(file != NULL, "%s cannot be read", path);
    for (int i = 0; i < number && fgets(line, (int)size, file) != NULL; ++i)
        continue;
    fclose(file);
}

/* Every line that a finding names, "PATH/bugs.cu:NUMBER", has BUG in it. */
static void check_lines(const char *name, const char *output)
{
    static const char FILE_NAME[] = "bugs.cu:";
    for (const char *finding = strstr(output, "emulator: "); finding; finding = strstr(finding + 1, "\nemulator: ")) {
        const char *at = strstr(finding, FILE_NAME), *start = at;
        if (at == NULL) continue;
        while (start > finding && start[-1] != ' ')
            --start;
        char path[1024], line[256] = "";
        snprintf(path, sizeof path, "%.*s", (int)(at - start) + (int)sizeof FILE_NAME - 2, start);
        read_line(path, atoi(at + sizeof FILE_NAME - 1), line, sizeof line);
        CHECK(strstr(line, "BUG") != NULL, "%s: the line is '%s'\n%s", name, line, output);
    }
}

static void check_bug(const struct bug *bug)
{
    char name[64], error[32], kernel[128];
    snprintf(error, sizeof error, "error %d\n", (int)bug->error);
    snprintf(name, sizeof name, "bad_%s", bug->name);
    snprintf(kernel, sizeof kernel, "emulator: %s: kernel %s_kernel, block (", bug->finding, name);
    const struct emulated_result bad = emulated_run(name, NULL);
    CHECK(bad.status == FINDINGS, "%s: status %d\n%s", name, bad.status, bad.output);
    CHECK(strstr(bad.output, kernel) != NULL, "%s: no '%s' in\n%s", name, kernel, bad.output);
    CHECK(strstr(bad.output, "bugs.cu:") != NULL, "%s: no line\n%s", name, bad.output);
    check_lines(name, bad.output);
    CHECK(strstr(bad.output, error) != NULL, "%s: not '%s'\n%s", name, error, bad.output);

    snprintf(name, sizeof name, "good_%s", bug->name);
    const struct emulated_result good = emulated_run(name, NULL);
    CHECK(good.status == 0 && strcmp(good.output, "error 0\n") == 0, "%s: status %d\n%s", name, good.status,
          good.output);
}

static void test_bugs(void **state)
{
    (void)state;
    for (int i = 0; i < CHECK_COUNT(bugs); ++i)
        if (bugs[i].sm <= emulated_sm()) check_bug(&bugs[i]);
}

static void test_host_access(void **state)
{
    (void)state;
    const struct emulated_result result = emulated_run("host_access", NULL);
    CHECK(result.status == -SIGSEGV, "status %d", result.status);
    CHECK(strstr(result.output, "emulator: host access to device memory: address 0x") != NULL &&
              strstr(result.output, "byte 12 of the 64 bytes at") != NULL,
          "%s", result.output);
}

int main(int argc, char **argv)
{
    if (argc == 2 && strcmp(argv[1], "host_access") == 0) return host_access();
    if (argc == 2) return run(argv[1]);
    check_begin("test_bugs");
    const int status = each_path();
    if (status >= 0) return status;
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_bugs), cmocka_unit_test(test_host_access)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
