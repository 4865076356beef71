/* file_fixture.h: a directory of its own for tests of files, whole files in and out, and safetensors files from a header text. */
#ifndef PLORA_TESTS_FILE_FIXTURE_H
#define PLORA_TESTS_FILE_FIXTURE_H

#include <dirent.h>
#include <sys/stat.h>
#include <unistd.h>

#include "check.h"

static char file_directory[64];

/* The path of a file of the test directory; four results live at a time. */
static CHECK_UNUSED const char *file_path(const char *name)
{
    static char paths[4][256];
    static int next;
    char *path = paths[next++ % 4];
    snprintf(path, sizeof paths[0], "%s/%s", file_directory, name);
    return path;
}

static CHECK_UNUSED int file_setup(void **state)
{
    (void)state;
    snprintf(file_directory, sizeof file_directory, "/tmp/plora_test_XXXXXX");
    return mkdtemp(file_directory) == NULL ? -1 : 0;
}

static CHECK_UNUSED void file_remove_tree(const char *path)
{
    DIR *directory = opendir(path);
    for (struct dirent *entry; directory != NULL && (entry = readdir(directory)) != NULL;) {
        char inner[768];
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0) continue;
        snprintf(inner, sizeof inner, "%.400s/%s", path, entry->d_name);
        if (unlink(inner) != 0) file_remove_tree(inner);
    }
    if (directory != NULL) closedir(directory);
    rmdir(path);
}

static CHECK_UNUSED int file_teardown(void **state)
{
    (void)state;
    file_remove_tree(file_directory);
    return 0;
}

/* The number of files in a directory. */
static CHECK_UNUSED int file_count(const char *path)
{
    int count = 0;
    DIR *directory = opendir(path);
    CHECK(directory != NULL, "cannot list %s", path);
    for (struct dirent *entry; (entry = readdir(directory)) != NULL;)
        count += entry->d_name[0] != '.';
    closedir(directory);
    return count;
}

static CHECK_UNUSED void file_write(const char *path, const void *bytes, size_t count)
{
    FILE *file = fopen(path, "wb");
    CHECK(file != NULL, "cannot create %s", path);
    CHECK(count == 0 || fwrite(bytes, 1, count, file) == count, "cannot write %s", path);
    CHECK(fclose(file) == 0, "cannot close %s", path);
}

static CHECK_UNUSED void file_write_text(const char *path, const char *text)
{
    file_write(path, text, strlen(text));
}

/* The bytes of a file, with a terminator behind them, from malloc. */
static CHECK_UNUSED unsigned char *file_read(const char *path, size_t *count)
{
    FILE *file = fopen(path, "rb");
    CHECK(file != NULL, "cannot open %s", path);
    fseek(file, 0, SEEK_END);
    *count = (size_t)ftell(file);
    rewind(file);
    unsigned char *bytes = malloc(*count + 1);
    CHECK(bytes != NULL && fread(bytes, 1, *count, file) == *count, "cannot read %s", path);
    bytes[*count] = '\0';
    fclose(file);
    return bytes;
}

/* prefix, header and data of a safetensors file, from malloc. Data bytes count up; data may be NULL. */
static CHECK_UNUSED unsigned char *file_safetensors(const char *header, const void *data, size_t data_bytes,
                                                    size_t *count)
{
    const size_t length = strlen(header);
    *count = 8 + length + data_bytes;
    unsigned char *bytes = malloc(*count);
    CHECK(bytes != NULL, "the test itself is out of memory");
    for (int i = 0; i < 8; ++i)
        bytes[i] = (unsigned char)((uint64_t)length >> 8 * i);
    memcpy(bytes + 8, header, length);
    for (size_t i = 0; i < data_bytes; ++i)
        bytes[8 + length + i] = data != NULL ? ((const unsigned char *)data)[i] : (unsigned char)(i + 1);
    return bytes;
}

static CHECK_UNUSED void file_write_safetensors(const char *path, const char *header, const void *data,
                                                size_t data_bytes)
{
    size_t count;
    unsigned char *bytes = file_safetensors(header, data, data_bytes, &count);
    file_write(path, bytes, count);
    free(bytes);
}

#endif
