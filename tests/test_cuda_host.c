/* test_cuda_host.c: what a CUDA context says where it cannot be made: no library, a wrong one, no driver; and that nothing is loaded
 * before one is asked for. Each case is a process of its own, this program again with other paths. The libraries are the real ones,
 * from PLORA_CUDA_PATH. What needs a device, be it emulated, is in test_cuda_device.c. */
#include <dlfcn.h>
#include <limits.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

static const char runtime_name[] = "libcudart.so.13", cublas_name[] = "libcublas.so.13";
static const char cublas_lt_name[] = "libcublasLt.so.13"; /* which libcublas needs */

/* ------------------------------------------------------------------------------------------------------- the other side */

static int mapped(const char *name)
{
    char line[4096];
    int found = 0;
    FILE *maps = fopen("/proc/self/maps", "r");
    if (maps == NULL) return -1;
    while (fgets(line, sizeof line, maps) != NULL)
        found |= strstr(line, name) != NULL;
    fclose(maps);
    return found;
}

/* What the runtime itself says, of devices that it can use. */
static void print_cause(void)
{
    void *runtime = dlopen(runtime_name, RTLD_NOW | RTLD_NOLOAD);
    if (runtime == NULL) return;
    int (*count)(int *), devices = 0;
    const char *(*text)(int);
    void *symbols[] = {dlsym(runtime, "cudaGetDeviceCount"), dlsym(runtime, "cudaGetErrorString")};
    if (symbols[0] == NULL || symbols[1] == NULL) return;
    memcpy(&count, &symbols[0], sizeof count);
    memcpy(&text, &symbols[1], sizeof text);
    const int error = count(&devices);
    printf("cause: %s\ndevices: %d\n", text(error), error == 0 ? devices : 0);
}

/* Prints what became of a context. preload: a library that "the host" has loaded before. */
static int create_one(const char *preload)
{
    plora_context *cpu = NULL, *cuda = NULL;
    const plora_status first = plora_context_create(NULL, &cpu);
    printf("before: %d %d %d\n", first, mapped("libcudart"), mapped("libcublas"));
    if (*preload != '\0' && dlopen(preload, RTLD_NOW) == NULL) printf("preload: %s\n", dlerror());
    plora_context_options options = PLORA_CONTEXT_OPTIONS_INIT;
    options.backend = PLORA_BACKEND_CUDA;
    plora_status status = plora_context_create(&options, &cuda);
    if (status == PLORA_OK) status = plora_synchronize(cuda, NULL);
    printf("status: %d\nmessage: %s\n", status, status == PLORA_OK ? "" : plora_last_error());
    print_cause();
    plora_context_destroy(cuda);
    plora_context_destroy(cpu);
    return 0;
}

/* -------------------------------------------------------------------------------------------------------------- this side */

static char self[PATH_MAX], folder[PATH_MAX], real_runtime[PATH_MAX], real_cublas[PATH_MAX], real_cublas_lt[PATH_MAX];
static char real_path[2 * PATH_MAX];

/* A line of the other side's output that begins with `key: `, "" if there is none. */
struct answer {
    char text[8192];
};

static const char *line_of(const struct answer *answer, const char *key)
{
    static char line[4096];
    char start[64];
    line[0] = '\0';
    snprintf(start, sizeof start, "%s: ", key);
    const char *at = strstr(answer->text, start);
    if (at != NULL) snprintf(line, sizeof line, "%.*s", (int)strcspn(at + strlen(start), "\n"), at + strlen(start));
    return line;
}

/* Runs create_one() with these paths; NULL = variable not set. */
static struct answer create(const char *library_path, const char *cuda_path, const char *preload)
{
    struct answer answer = {""};
    int ends[2];
    assert_int_equal(pipe(ends), 0);
    const pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        dup2(ends[1], STDOUT_FILENO);
        close(ends[0]);
        unsetenv("LD_LIBRARY_PATH");
        unsetenv("PLORA_CUDA_PATH");
        if (library_path != NULL) setenv("LD_LIBRARY_PATH", library_path, 1);
        if (cuda_path != NULL) setenv("PLORA_CUDA_PATH", cuda_path, 1);
        execl(self, self, "create", preload == NULL ? "" : preload, (char *)NULL);
        _exit(127);
    }
    close(ends[1]);
    size_t length = 0;
    for (ssize_t got; (got = read(ends[0], answer.text + length, sizeof answer.text - 1 - length)) > 0;)
        length += (size_t)got;
    close(ends[0]);
    int status = -1;
    waitpid(child, &status, 0);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the process ended with %#x and said: %s", status,
          answer.text);
    CHECK(strncmp(answer.text, "before: 0 0 0\n", 14) == 0, "a library was loaded too early: %s", answer.text);
    return answer;
}

static void is_unavailable(const struct answer *answer, const char *const *parts)
{
    CHECK(atoi(line_of(answer, "status")) == PLORA_ERROR_BACKEND_UNAVAILABLE, "%s", answer->text);
    for (; *parts != NULL; ++parts)
        CHECK(strstr(line_of(answer, "message"), *parts) != NULL, "the message lacks '%s': %s", *parts, answer->text);
}
#define IS_UNAVAILABLE(answer, ...) is_unavailable((answer), (const char *const[]){__VA_ARGS__, NULL})

/* All libraries are there: what counts now is the driver. */
static void is_left_to_the_driver(const struct answer *answer)
{
    if (atoi(line_of(answer, "devices")) > 0) {
        CHECK(atoi(line_of(answer, "status")) == PLORA_OK, "there is a device: %s", answer->text);
        return;
    }
    char cause[256];
    snprintf(cause, sizeof cause, "%s", line_of(answer, "cause"));
    CHECK(cause[0] != '\0', "the runtime was not loaded: %s", answer->text);
    IS_UNAVAILABLE(answer, "CUDA backend", cause);
}

static void put(const char *name, const char *target)
{
    char path[2 * PATH_MAX];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    unlink(path);
    if (target == NULL) { /* no library at all: the loader stops here and does not look on */
        FILE *file = fopen(path, "w");
        assert_non_null(file);
        for (int i = 0; i < 200; ++i)
            fputs("This is text, not a library.\n", file);
        fclose(file);
    } else {
        assert_int_equal(symlink(target, path), 0);
    }
}

/* ---------------------------------------------------------------------------------------------------------------- tests */

static void without_a_driver(void **state)
{
    (void)state;
    char path[3 * PATH_MAX];
    put(runtime_name, real_runtime);
    put(cublas_name, real_cublas);
    struct answer answer = create(folder, NULL, NULL); /* on the loader's path */
    is_left_to_the_driver(&answer);
    put(runtime_name, NULL);
    put(cublas_name, NULL);
    snprintf(path, sizeof path, "/nowhere::%s", real_path);
    answer = create(folder, path, NULL); /* nowhere but in PLORA_CUDA_PATH */
    is_left_to_the_driver(&answer);
}

static void library_of_the_host(void **state)
{
    (void)state;
    put(runtime_name, NULL);
    put(cublas_name, real_cublas);
    const struct answer answer = create(folder, NULL, real_runtime);
    CHECK(line_of(&answer, "preload")[0] == '\0', "%s", answer.text);
    is_left_to_the_driver(&answer);
}

static void library_missing(void **state)
{
    (void)state;
    put(runtime_name, NULL);
    put(cublas_name, real_cublas);
    struct answer answer = create(folder, NULL, NULL);
    IS_UNAVAILABLE(&answer, "libcudart.so.13 was not found", folder, "PLORA_CUDA_PATH is not set");
    answer = create(folder, "/nowhere:/neither", NULL);
    IS_UNAVAILABLE(&answer, "libcudart.so.13 was not found", "not in PLORA_CUDA_PATH=/nowhere:/neither");
    put(runtime_name, real_runtime);
    put(cublas_name, NULL);
    answer = create(folder, "", NULL);
    IS_UNAVAILABLE(&answer, "libcublas.so.13 was not found", folder, "not in PLORA_CUDA_PATH=");
}

static void wrong_library(void **state)
{
    (void)state;
    put(runtime_name, real_cublas);
    const struct answer answer = create(folder, NULL, NULL);
    IS_UNAVAILABLE(&answer, runtime_name, "has no function cudaRuntimeGetVersion");
}

static void device_hooks_come_in_pairs(void **state)
{
    (void)state;
    plora_context *context = NULL;
    plora_context_options options = PLORA_CONTEXT_OPTIONS_INIT;
    options.backend = PLORA_BACKEND_CUDA;
    options.device_free = check_free;
    CHECK_FAILS(plora_context_create(&options, &context), PLORA_ERROR_INVALID_ARGUMENT, "device_allocate",
                "device_free");
    assert_null(context);
}

/* libplora.so, beside the tests' folder, is linked to no library of CUDA. */
static void no_library_of_cuda_is_needed(void **state)
{
    (void)state;
    char command[2 * PATH_MAX], line[4096];
    snprintf(command, sizeof command, "readelf -dW '%.*s/../libplora.so'", (int)(strrchr(self, '/') - self), self);
    FILE *output = popen(command, "r");
    assert_non_null(output);
    int needed = 0;
    while (fgets(line, sizeof line, output) != NULL) {
        if (strstr(line, "NEEDED") == NULL) continue;
        needed++;
        CHECK(strstr(line, "cud") == NULL && strstr(line, "cublas") == NULL && strstr(line, "nv") == NULL, "%s", line);
    }
    assert_int_equal(pclose(output), 0);
    CHECK(needed > 0, "%s: no NEEDED entries", command);
}

static void find_real(const char *name, char *found)
{
    const char *path = getenv("PLORA_CUDA_PATH");
    for (const char *at = path; at != NULL && found[0] == '\0';) {
        char file[PATH_MAX];
        const size_t length = strcspn(at, ":");
        snprintf(file, sizeof file, "%.*s/%s", (int)length, at, name);
        if (realpath(file, found) == NULL) found[0] = '\0';
        at = at[length] == ':' ? at + length + 1 : NULL;
    }
    CHECK(found[0] != '\0', "%s was not found; PLORA_CUDA_PATH is %s", name, path == NULL ? "not set" : path);
}

static int setup(void **state)
{
    (void)state;
    const ssize_t length = readlink("/proc/self/exe", self, sizeof self - 1);
    assert_true(length > 0);
    self[length] = '\0';
    snprintf(folder, sizeof folder, "%s", "/tmp/plora_cuda_host_XXXXXX");
    assert_non_null(mkdtemp(folder));
    find_real(runtime_name, real_runtime);
    find_real(cublas_name, real_cublas);
    find_real(cublas_lt_name, real_cublas_lt);
    put(cublas_lt_name, real_cublas_lt);
    snprintf(real_path, sizeof real_path, "%s", getenv("PLORA_CUDA_PATH"));
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    static const char *const names[] = {runtime_name, cublas_name, cublas_lt_name};
    for (int i = 0; i < CHECK_COUNT(names); ++i) {
        char path[2 * PATH_MAX];
        snprintf(path, sizeof path, "%s/%s", folder, names[i]);
        unlink(path);
    }
    return rmdir(folder);
}

int main(int count, char **arguments)
{
    if (count == 3 && strcmp(arguments[1], "create") == 0) return create_one(arguments[2]);
    check_begin("test_cuda_host");
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(without_a_driver),
        cmocka_unit_test(library_of_the_host),
        cmocka_unit_test(library_missing),
        cmocka_unit_test(wrong_library),
        cmocka_unit_test(device_hooks_come_in_pairs),
        cmocka_unit_test(no_library_of_cuda_is_needed),
    };
    return cmocka_run_group_tests_name("cuda_host", tests, setup, teardown);
}
