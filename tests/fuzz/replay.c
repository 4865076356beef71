/* replay.c: feeds a fuzz target the files of its corpus, for `make test`: no libFuzzer, any compiler.
 *
 *     fuzz_NAME [FILE_OR_FOLDER...]          default: tests/fuzz/corpus/NAME
 *
 * A file named seed_* must be a good one. Each is fed as it is, then as it is cut off after each of its bytes, and with one bit flipped in each (PLORA_TEST_QUICK=1: not). A target that
 * finds something aborts, and the file that it was fed is named. Reports in TAP, a test a file. */
#include <dirent.h>
#include <signal.h>

#include "fuzz.h"

enum { MOST_FILES = 1 << 12, MOST_CHANGED_BYTES = 1 << 14 };

static char *files[MOST_FILES];
static int file_count;
static const char *current = "nothing";

/* Says which file it was; then the signal does what it always does. */
static void tell(int number)
{
    static const char what[] = "# the target ended while it was fed ";
    (void)!write(1, what, sizeof what - 1);
    (void)!write(1, current, strlen(current));
    (void)!write(1, "\n", 1);
    signal(number, SIG_DFL);
    raise(number);
}

static void list(const char *path)
{
    DIR *folder = opendir(path);
    if (folder == NULL) {
        FUZZ_CHECK(file_count < MOST_FILES);
        files[file_count++] = strdup(path);
        return;
    }
    for (struct dirent *entry; (entry = readdir(folder)) != NULL;) {
        char inner[1024];
        if (entry->d_name[0] == '.') continue;
        snprintf(inner, sizeof inner, "%s/%s", path, entry->d_name);
        list(inner);
    }
    closedir(folder);
}

static int by_name(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

static void feed(const unsigned char *bytes, size_t count)
{
    unsigned char *copy = malloc(count > 0 ? count : 1); /* so that a sanitizer sees its end */
    FUZZ_CHECK(copy != NULL);
    if (count > 0) memcpy(copy, bytes, count);
    LLVMFuzzerTestOneInput(copy, count);
    free(copy);
}

static void feed_file(const char *path, int changed)
{
    FILE *file = fopen(path, "rb");
    FUZZ_CHECK(file != NULL);
    fseek(file, 0, SEEK_END);
    const size_t count = (size_t)ftell(file);
    rewind(file);
    unsigned char *bytes = malloc(count + 1);
    FUZZ_CHECK(bytes != NULL && fread(bytes, 1, count, file) == count);
    fclose(file);
    const int64_t accepted = fuzz_accepted;
    feed(bytes, count);
    FUZZ_CHECK(strstr(path, "/seed_") == NULL || fuzz_accepted > accepted);
    for (size_t i = 0; changed && i < count && count <= MOST_CHANGED_BYTES; ++i) {
        feed(bytes, i);
        bytes[i] ^= (unsigned char)(1 << i % 8);
        feed(bytes, count);
        bytes[i] ^= (unsigned char)(1 << i % 8);
    }
    free(bytes);
}

int main(int count, char **arguments)
{
    const char *quick = getenv("PLORA_TEST_QUICK"), *name = strstr(arguments[0], "fuzz_");
    char folder[256];
    for (const char *next = name; next != NULL; next = strstr(next + 1, "fuzz_"))
        name = next;
    FUZZ_CHECK(name != NULL);
    snprintf(folder, sizeof folder, "tests/fuzz/corpus/%s", name + strlen("fuzz_"));
    for (int i = 1; i < count; ++i)
        list(arguments[i]);
    if (count < 2) list(folder);
    qsort(files, (size_t)file_count, sizeof files[0], by_name);
    signal(SIGABRT, tell);
    signal(SIGSEGV, tell);
    signal(SIGBUS, tell);
    signal(SIGFPE, tell);
    setvbuf(stdout, NULL, _IOLBF, 0);
    printf("1..%d\n", file_count);
    for (int i = 0; i < file_count; ++i) {
        current = files[i];
        feed_file(current, quick == NULL || *quick == '\0' || strcmp(quick, "0") == 0);
        printf("ok %d - %s\n", i + 1, current);
    }
    for (int i = 0; i < file_count; ++i)
        free(files[i]);
    return file_count > 0 ? 0 : 1;
}
