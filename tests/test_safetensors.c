/* test_safetensors.c: the JSON reader, the safetensors reader on well-formed, hostile and mutated files, and the writer with a
 * full disk and a failing allocator. */
#include <signal.h>
#include <sys/resource.h>

#include "file_fixture.h"
#include "json.h"
#include "safetensors.h"

/* ---------------------------------------------------------------------------------------------------------------- JSON */

static void json_grammar(void **state)
{
    static const char *const good[] = {
        "{}",
        " {\"a\" : [ ] , \"b\":{}}\n",
        "{\"a\":[1,-0,0.5,1e9,-1.25E-3,true,false,null,\"\"]}",
        "{\"\\u0041\\uD83D\\ude00\\n\\/\":\"\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80\"}",
        "{\"a\":[[[[[[[[[[1]]]]]]]]]]}",
    };
    static const char *const bad[] = {
        "",
        " ",
        "[]",
        "1",
        "{",
        "}",
        "{]",
        "{\"a\"}",
        "{\"a\":}",
        "{\"a\" 1}",
        "{\"a\":1,}",
        "{,}",
        "{\"a\":1 \"b\":2}",
        "{a:1}",
        "{1:1}",
        "{\"a\":[1 2]}",
        "{\"a\":[1,]}",
        "{\"a\":01}",
        "{\"a\":+1}",
        "{\"a\":.5}",
        "{\"a\":1.}",
        "{\"a\":1e}",
        "{\"a\":-}",
        "{\"a\":NaN}",
        "{\"a\":tru}",
        "{\"a\":truex}",
        "{\"a\":\"\n\"}",
        "{\"a\":\"\\x\"}",
        "{\"a\":\"\\u12g4\"}",
        "{\"a\":\"\\u0000\"}",
        "{\"a\":\"\\ud800\"}",
        "{\"a\":\"\\ud800\\u0041\"}",
        "{\"a\":\"\\udc00\"}",
        "{\"a\":\"\xff\"}",
        "{\"a\":\"\xc0\x80\"}",
        "{\"a\":\"\xed\xa0\x80\"}",
        "{\"a\":\"\xf4\x90\x80\x80\"}",
        "{\"a\":\"\xe2\x82\"}",
        "{\"a\":\"",
        "{\"a\":\"\\",
        "{} x",
        "{}{}",
        "{\"a\":1}]",
    };
    (void)state;
    struct check_allocator allocator = CHECK_ALLOCATOR_INIT;
    plora_context *context = check_context(&allocator, 1, 0);
    struct plora__json json;
    for (int i = 0; i < CHECK_COUNT(good); ++i) {
        CHECK_OK(plora__json_parse(context, good[i], strlen(good[i]), &json));
        CHECK(plora__json_next(&json, 0) == json.count, "%s", good[i]);
        plora__json_free(&json);
    }
    for (int i = 0; i < CHECK_COUNT(bad); ++i) {
        /* An exact copy, so that a sanitizer sees a read beyond the end. */
        const size_t length = strlen(bad[i]);
        char *copy = malloc(length + 1);
        memcpy(copy, bad[i], length);
        char *exact = realloc(copy, length > 0 ? length : 1);
        const plora_status status = plora__json_parse(context, exact, length, &json);
        CHECK(status == PLORA_ERROR_FORMAT, "%s: %s", bad[i], plora_status_string(status));
        free(exact);
    }
    plora_context_destroy(context);
    check_allocator_empty(&allocator, "JSON");
}

static void json_depth(void **state)
{
    (void)state;
    plora_context *context = check_context(NULL, 1, 0);
    enum { DEEP = 1000000 };
    char *text = malloc(5 + 2 * DEEP + 2);
    CHECK(text != NULL, "the test itself is out of memory");
    strcpy(text, "{\"a\":");
    memset(text + 5, '[', DEEP);
    memset(text + 5 + DEEP, ']', DEEP);
    strcpy(text + 5 + 2 * DEEP, "}");
    struct plora__json json;
    CHECK_FAILS(plora__json_parse(context, text, strlen(text), &json), PLORA_ERROR_FORMAT, "deep", "byte 36");
    free(text);
    plora_context_destroy(context);
}

static void json_values(void **state)
{
    (void)state;
    plora_context *context = check_context(NULL, 1, 0);
    static const char text[] =
        "{\"k\":{\"x\":[1,{\"y\":2}]},\"\\u006eum\":9223372036854775807,\"big\":9223372036854775808,"
        "\"neg\":-1,\"f\":1.5,\"e\":1e2,\"huge\":1e999,\"t\":true,\"s\":\"a\\u00e9\\ud83d\\ude00\\tb\"}";
    struct plora__json json;
    int64_t integer = -7;
    double number = -7;
    char buffer[64];
    CHECK_OK(plora__json_parse(context, text, strlen(text), &json));
    CHECK(plora__json_size(&json, 0) == 9, "%d members", plora__json_size(&json, 0));
    CHECK(plora__json_integer(&json, plora__json_member(&json, 0, "num"), &integer) && integer == INT64_MAX, "num");
    CHECK(!plora__json_integer(&json, plora__json_member(&json, 0, "big"), &integer), "2^63 is no int64");
    CHECK(!plora__json_integer(&json, plora__json_member(&json, 0, "neg"), &integer), "-1 is negative");
    CHECK(!plora__json_integer(&json, plora__json_member(&json, 0, "f"), &integer), "1.5 is no integer");
    CHECK(!plora__json_integer(&json, plora__json_member(&json, 0, "e"), &integer), "1e2 is not plain");
    CHECK(plora__json_number(&json, plora__json_member(&json, 0, "f"), &number) && number == 1.5, "f = %g", number);
    CHECK(!plora__json_number(&json, plora__json_member(&json, 0, "huge"), &number), "1e999 is infinite");
    CHECK(plora__json_true(&json, plora__json_member(&json, 0, "t")), "t");
    CHECK(plora__json_member(&json, 0, "x") == -1, "x is not a member of the document");
    const int32_t s = plora__json_member(&json, 0, "s");
    CHECK(plora__json_string(&json, s, buffer) == 9 && strcmp(buffer, "a\xc3\xa9\xf0\x9f\x98\x80\tb") == 0, "s = %s",
          buffer);
    CHECK(plora__json_equals(&json, s, buffer) && !plora__json_equals(&json, s, "a"), "equals");
    plora__json_free(&json);

    struct plora__text out = {context, NULL, 0, 0};
    CHECK_OK(plora__text_quote(&out, "a\"\\\n\x01\xc3\xa9"));
    CHECK_OK(plora__text_number(&out, 0.1));
    CHECK(strcmp(out.data, "\"a\\\"\\\\\\u000a\\u0001\xc3\xa9\"0.10000000000000001") == 0, "%s", out.data);
    plora__text_free(&out);
    plora_context_destroy(context);
}

static int greater(int32_t i, int32_t j, const void *user)
{
    const int32_t *keys = user;
    return keys[i] > keys[j];
}

static void sorting(void **state)
{
    (void)state;
    int32_t keys[200] = {0}, order[200];
    for (int32_t count = 0; count <= 200; count += count < 10 ? 1 : 38) {
        for (int32_t i = 0; i < count; ++i) {
            keys[i] = (int32_t)check_integer(0, 50);
            order[i] = i;
        }
        plora__sort(order, count, greater, keys);
        int64_t sum = 0;
        for (int32_t i = 0; i < count; ++i) {
            CHECK(i == 0 || keys[order[i - 1]] >= keys[order[i]], "%d of %d is out of order", i, count);
            sum += order[i];
        }
        CHECK(sum == (int64_t)count * (count - 1) / 2, "not a permutation of %d", count);
    }
}

/* ------------------------------------------------------------------------------------------------------------- reading */

#define ENTRY(name, dtype, shape, begin, end)                                                                          \
    "\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":[" #begin "," #end "]}"

static const char good_header[] =
    "{\"__metadata__\":{\"format\":\"pt\",\"k\\u00e9y\":\"v\\n\"}," ENTRY("b", "BF16", "[2,3]", 0, 12) "," ENTRY(
        "s", "F32", "[]", 12, 16) "," ENTRY("e", "F32", "[0,5]", 16,
                                            16) "," ENTRY("i", "I64", "[1]", 24,
                                                          32) "," ENTRY("d", "F64", "[1]", 16,
                                                                        24) "," ENTRY("x", "F4", "[4]", 32,
                                                                                      34) "," ENTRY("o", "BOOL", "[2]",
                                                                                                    34, 36) "}      ";

static void well_formed(void **state)
{
    (void)state;
    struct check_allocator allocator = CHECK_ALLOCATOR_INIT;
    plora_context *context = check_context(&allocator, 1, 0);
    file_write_safetensors(file_path("good"), good_header, NULL, 36);
    struct plora__safetensors file;
    CHECK_OK(plora__safetensors_open(context, file_path("good"), &file));
    CHECK(file.tensor_count == 7 && file.metadata_count == 2, "%d tensors, %d metadata", file.tensor_count,
          file.metadata_count);
    CHECK(strcmp(plora__safetensors_metadata(&file, "k\xc3\xa9y"), "v\n") == 0, "metadata");
    static const char *const order[] = {"b", "s", "e", "i", "d", "x", "o"};
    for (int i = 0; i < 7; ++i) {
        CHECK(strcmp(file.tensors[i].name, order[i]) == 0, "tensor %d is %s", i, file.tensors[i].name);
        CHECK(plora__safetensors_find(&file, order[i]) == &file.tensors[i], "%s is not found", order[i]);
    }
    CHECK(plora__safetensors_find(&file, "") == NULL && plora__safetensors_find(&file, "zz") == NULL,
          "found what is not there");
    const struct plora__tensor *b = &file.tensors[0], *i64 = &file.tensors[3];
    CHECK(b->dimensions == 2 && b->shape[0] == 2 && b->shape[1] == 3 && b->bytes == 12, "b");
    CHECK(plora__tensor_dtype(b) == PLORA_BF16 && plora__tensor_dtype(i64) == -1, "dtypes");
    CHECK(((unsigned char *)b->data)[0] == 1 && ((unsigned char *)i64->data)[0] == 25, "data");
    CHECK(file.tensors[1].dimensions == 0 && file.tensors[2].data == NULL, "scalar and empty");
    plora_memory_statistics statistics = PLORA_MEMORY_STATISTICS_INIT;
    CHECK_OK(plora_memory_stats(context, &statistics));
    CHECK(statistics.mapped_bytes == file.mapping.bytes && statistics.mapped_bytes > 36, "mapped %zu",
          statistics.mapped_bytes);
    plora__safetensors_close(&file);
    CHECK_OK(plora_memory_stats(context, &statistics));
    CHECK(statistics.mapped_bytes == 0, "%zu bytes are still mapped", statistics.mapped_bytes);
    plora_context_destroy(context);
    check_allocator_empty(&allocator, "reading");
}

/* Data at an odd address is copied to an even one. */
static void misaligned(void **state)
{
    (void)state;
    plora_context *context = check_context(NULL, 1, 0);
    static const float values[2] = {1.5f, -2.25f};
    for (int pad = 0; pad < 8; ++pad) {
        char header[128] = "{" ENTRY("w", "F32", "[2]", 0, 8) "}";
        for (int i = 0; i < pad; ++i)
            strcat(header, " ");
        file_write_safetensors(file_path("odd"), header, values, sizeof values);
        struct plora__safetensors file;
        CHECK_OK(plora__safetensors_open(context, file_path("odd"), &file));
        CHECK((uintptr_t)file.tensors[0].data % 4 == 0, "misaligned with %d bytes of padding", pad);
        CHECK(memcmp(file.tensors[0].data, values, sizeof values) == 0, "values with %d bytes of padding", pad);
        plora__safetensors_close(&file);
    }
    plora_context_destroy(context);
}

static void hostile(void **state)
{
    static const struct {
        const char *header;
        size_t data;
        const char *message;
    } cases[] = {
        {"{}", 1, "the tensors end at byte 10"},
        {"[]", 0, "does not begin with '{'"},
        {" {}", 0, "does not begin with '{'"},
        {"{\"a\":1}", 0, "'a': the entry at byte 13 is not an object"},
        {"{\"a\":{}}", 0, "has no \"dtype\""},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1]}}", 4, "has no \"data_offsets\""},
        {"{\"a\":{\"dtype\":\"F32\",\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "a second \"dtype\""},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4],\"q\":1}}", 4, "unknown key at byte"},
        {"{" ENTRY("a", "F33", "[1]", 0, 4) "}", 4, "'a': unknown dtype at byte 23"},
        {"{\"a\":{\"dtype\":4,\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "unknown dtype"},
        {"{" ENTRY("a", "F32", "1", 0, 4) "}", 4, "is not an array"},
        {"{" ENTRY("a", "F32", "[-1]", 0, 4) "}", 4, "dimension 0 at byte"},
        {"{" ENTRY("a", "F32", "[1.0]", 0, 4) "}", 4, "dimension 0 at byte"},
        {"{" ENTRY("a", "F32", "[1,[1]]", 0, 4) "}", 4, "dimension 1 at byte"},
        {"{" ENTRY("a", "F32", "[18446744073709551617]", 0, 4) "}", 4, "dimension 0 at byte"},
        {"{" ENTRY("a", "F32", "[4294967296,4294967296,4]", 0, 4) "}", 4, "overflows"},
        {"{" ENTRY("a", "F32", "[2305843009213693953]", 0, 4) "}", 4, "overflows"},
        {"{" ENTRY("a", "F32", "[2]", 0, 4) "}", 4, "4 bytes of data, but shape and dtype F32 make 64 bits"},
        {"{" ENTRY("a", "F4", "[3]", 0, 1) "}", 1, "make 12 bits"},
        {"{" ENTRY("a", "F32", "[0]", 0, 4) "}", 4, "make 0 bits"},
        {"{" ENTRY("a", "F32", "[1]", 4, 0) "}", 4, "run backwards"},
        {"{" ENTRY("a", "F32", "[1]", 0, 4) "}", 3, "leave the 3 bytes of data"},
        {"{" ENTRY("a", "F32", "[1]", 9223372036854775807, 9223372036854775807) "}", 4, "leave the 4 bytes"},
        {"{" ENTRY("a", "F32", "[1]", 0, -4) "}", 4, "the offset at byte"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4,8]}}", 4, "is not a pair"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":\"x\"}}", 4, "is not a pair"},
        {"{" ENTRY("a", "F32", "[1]", 0, 4) "," ENTRY("b", "F32", "[1]", 0, 4) "}", 4, "overlaps"},
        {"{" ENTRY("a", "F32", "[2]", 0, 8) "," ENTRY("b", "F32", "[1]", 4, 8) "}", 8, "'b' at byte"},
        {"{" ENTRY("a", "F32", "[1]", 0, 4) "," ENTRY("b", "F32", "[1]", 8, 12) "}", 12,
         "before tensor 'b' belong to no tensor"},
        {"{" ENTRY("a", "F32", "[1]", 4, 8) "}", 8, "before tensor 'a'"},
        {"{" ENTRY("a", "F32", "[1]", 0, 4) "}", 5, "the tensors end at byte"},
        {"{" ENTRY("a", "F32", "[1]", 0, 4) "," ENTRY("a", "F32", "[1]", 4, 8) "}", 8, "'a' occurs twice, at bytes"},
        {"{" ENTRY("a", "F32", "[1]", 0, 4) "," ENTRY("\\u0061", "F32", "[1]", 4, 8) "}", 8, "'a' occurs twice"},
        {"{\"__metadata__\":[]}", 0, "__metadata__ at byte"},
        {"{\"__metadata__\":{\"a\":1}}", 0, "is not a string"},
        {"{\"__metadata__\":{\"a\":\"1\",\"a\":\"2\"}}", 0, "key 'a' twice"},
        {"{\"__metadata__\":{},\"__metadata__\":{}}", 0, "a second __metadata__"},
        {"{\"a\":", 0, "JSON"},
        {"{\"\xff\":1}", 0, "UTF-8"},
        {"{\"\\ud800\":1}", 0, "surrogate"},
        {"{}x", 0, "JSON"},
    };
    (void)state;
    struct check_allocator allocator = CHECK_ALLOCATOR_INIT;
    plora_context *context = check_context(&allocator, 1, 0);
    struct plora__safetensors file;
    for (int i = 0; i < CHECK_COUNT(cases); ++i) {
        file_write_safetensors(file_path("hostile"), cases[i].header, NULL, cases[i].data);
        CHECK_FAILS(plora__safetensors_open(context, file_path("hostile"), &file), PLORA_ERROR_FORMAT, cases[i].message,
                    "/hostile: ");
    }
    plora_memory_statistics statistics = PLORA_MEMORY_STATISTICS_INIT;
    CHECK_OK(plora_memory_stats(context, &statistics));
    CHECK(statistics.mapped_bytes == 0, "%zu bytes are still mapped", statistics.mapped_bytes);
    plora_context_destroy(context);
    check_allocator_empty(&allocator, "hostile files");
}

static void hostile_length(void **state)
{
    (void)state;
    plora_context *context = check_context(NULL, 1, 0);
    struct plora__safetensors file;
    static const unsigned char all_ones[16] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff};
    static const unsigned char too_long[16] = {9, 0, 0, 0, 0, 0, 0, 0, '{', '}'};
    static const unsigned char zero[16] = {0};
    file_write(file_path("x"), all_ones, sizeof all_ones);
    CHECK_FAILS(plora__safetensors_open(context, file_path("x"), &file), PLORA_ERROR_FORMAT, "at most 100000000");
    file_write(file_path("x"), too_long, sizeof too_long);
    CHECK_FAILS(plora__safetensors_open(context, file_path("x"), &file), PLORA_ERROR_FORMAT, "9 bytes",
                "ends at byte 16");
    file_write(file_path("x"), zero, sizeof zero);
    CHECK_FAILS(plora__safetensors_open(context, file_path("x"), &file), PLORA_ERROR_FORMAT, "begin with");
    for (size_t bytes = 0; bytes < 8; ++bytes) {
        file_write(file_path("x"), zero, bytes);
        CHECK_FAILS(plora__safetensors_open(context, file_path("x"), &file), PLORA_ERROR_FORMAT, "takes 8 bytes");
    }
    CHECK_FAILS(plora__safetensors_open(context, file_path("absent"), &file), PLORA_ERROR_IO, "absent", "No such file");
    CHECK_FAILS(plora__safetensors_open(context, file_directory, &file), PLORA_ERROR_IO, "directory");
    CHECK(mkfifo(file_path("fifo"), 0600) == 0, "mkfifo");
    CHECK_FAILS(plora__safetensors_open(context, file_path("fifo"), &file), PLORA_ERROR_IO, "fifo");
    plora_context_destroy(context);
}

/* Every truncation of a good file, then random damage: an error or a file whose every byte can be read. */
static void mutations(void **state)
{
    (void)state;
    struct check_allocator allocator = CHECK_ALLOCATOR_INIT;
    plora_context *context = check_context(&allocator, 1, 0);
    static const char alphabet[] = "{}[]\",:\\0123456789-.eEtfnu \xff";
    size_t count;
    unsigned char *good = file_safetensors(good_header, NULL, 36, &count);
    const int rounds = check_quick() ? 500 : 20000;
    int accepted = 0;
    unsigned sum = 0;
    for (int round = 0; round < rounds + (int)count; ++round) {
        const size_t length = round < (int)count ? (size_t)round : count;
        unsigned char *bytes = malloc(length > 0 ? length : 1);
        memcpy(bytes, good, length);
        for (int64_t k = round < (int)count ? 0 : check_integer(1, 4); k > 0; --k) {
            const size_t at = (size_t)check_integer(0, 3) == 0 ? (size_t)check_integer(0, 7)
                                                               : (size_t)check_integer(8, (int64_t)(count - 37));
            bytes[at] = check_integer(0, 1) ? (unsigned char)alphabet[check_integer(0, sizeof alphabet - 2)]
                                            : (unsigned char)(bytes[at] ^ 1u << check_integer(0, 7));
        }
        struct plora__safetensors file;
        const plora_status status = plora__safetensors_parse(context, bytes, length, &file);
        CHECK(status == PLORA_OK || status == PLORA_ERROR_FORMAT, "status %d: %s", status, plora_last_error());
        if (status == PLORA_OK) {
            ++accepted;
            for (int32_t i = 0; i < file.tensor_count; ++i)
                for (size_t b = 0; b < file.tensors[i].bytes; ++b)
                    sum += ((unsigned char *)file.tensors[i].data)[b];
            plora__safetensors_close(&file);
        }
        free(bytes);
    }
    CHECK(accepted > 0 && accepted < rounds && sum > 0, "%d of %d accepted", accepted, rounds);
    free(good);
    plora_context_destroy(context);
    check_allocator_empty(&allocator, "mutations");
}

/* ------------------------------------------------------------------------------------------------------------- writing */

static const float write_values[6] = {1, 2, -1, 3, 4, -1};
static const int64_t write_shape[2] = {2, 2};
static const struct plora__tensor write_tensors[2] = {
    {.name = "a\"\xc3\xa9",
     .dtype = "F32",
     .shape = write_shape,
     .dimensions = 2,
     .bytes = 16,
     .data = (void *)write_values,
     .row_bytes = 8,
     .stride_bytes = 12},
    {.name = "s", .dtype = "F32", .shape = NULL, .dimensions = 0, .bytes = 4, .data = (void *)write_values},
};
static const struct plora__metadata write_metadata = {"k", "v\\"};

static void round_trip(void **state)
{
    (void)state;
    plora_context *context = check_context(NULL, 1, 0);
    CHECK_OK(plora__safetensors_write(context, file_path("out"), write_tensors, 2, &write_metadata, 1));
    CHECK(chmod(file_path("out"), 0640) == 0, "chmod");
    CHECK_OK(plora__safetensors_write(context, file_path("out"), write_tensors, 2, &write_metadata, 1));
    struct stat info;
    CHECK(stat(file_path("out"), &info) == 0 && (info.st_mode & 0777) == 0640, "the permissions changed");
    struct plora__safetensors file;
    CHECK_OK(plora__safetensors_open(context, file_path("out"), &file));
    const float want[4] = {1, 2, 3, 4};
    CHECK(file.tensor_count == 2 && file.metadata_count == 1 && file.tensors[0].offset % 8 == 0, "header");
    CHECK(memcmp(file.tensors[0].data, want, sizeof want) == 0, "rows are not packed");
    CHECK(strcmp(file.tensors[0].name, write_tensors[0].name) == 0 && *(float *)file.tensors[1].data == 1.0f,
          "contents");
    plora__safetensors_close(&file);
    CHECK_OK(plora__safetensors_write(context, file_path("none"), NULL, 0, NULL, 0));
    CHECK_OK(plora__safetensors_open(context, file_path("none"), &file));
    CHECK(file.tensor_count == 0, "%d tensors", file.tensor_count);
    plora__safetensors_close(&file);
    plora_context_destroy(context);
}

/* A write that fails, early or late, leaves the target as it was and nothing beside it. */
static void failing_writes(void **state)
{
    (void)state;
    struct check_allocator allocator = CHECK_ALLOCATOR_INIT;
    plora_context *context = check_context(&allocator, 1, 0);
    enum { LARGE = 1 << 20 };
    char *data = calloc(1, LARGE);
    const int64_t shape[1] = {LARGE};
    const struct plora__tensor tensor = {
        .name = "x", .dtype = "U8", .shape = shape, .dimensions = 1, .bytes = LARGE, .data = data};
    file_write_text(file_path("target"), "old");
    const int files = file_count(file_directory);

    struct rlimit old_limit, limit;
    void (*old_handler)(int) = signal(SIGXFSZ, SIG_IGN);
    CHECK(getrlimit(RLIMIT_FSIZE, &old_limit) == 0, "getrlimit");
    for (size_t bytes = 0; bytes < LARGE; bytes += LARGE / 3) {
        limit = old_limit;
        limit.rlim_cur = bytes;
        CHECK(setrlimit(RLIMIT_FSIZE, &limit) == 0, "setrlimit");
        const plora_status status = plora__safetensors_write(context, file_path("target"), &tensor, 1, NULL, 0);
        CHECK(setrlimit(RLIMIT_FSIZE, &old_limit) == 0, "setrlimit");
        CHECK_FAILS(status, PLORA_ERROR_IO, "target", "File too large");
    }
    signal(SIGXFSZ, old_handler);
    CHECK_FAILS(plora__safetensors_write(context, file_path("no/such/directory"), &tensor, 1, NULL, 0), PLORA_ERROR_IO,
                "No such file");
    CHECK_FAILS(plora__safetensors_write(context, file_directory, &tensor, 1, NULL, 0), PLORA_ERROR_IO, "directory");
    CHECK_FAILS(plora__safetensors_write(context, "", &tensor, 1, NULL, 0), PLORA_ERROR_INVALID_ARGUMENT, "empty");
    struct plora__writer writer;
    CHECK_OK(plora__writer_open(context, file_path("target"), &writer));
    CHECK(plora__writer_close(&writer, PLORA_ERROR_BACKEND) == PLORA_ERROR_BACKEND, "the status is passed on");
    CHECK(file_count(file_directory) == files, "a temporary file was left behind");
    size_t count;
    unsigned char *now = file_read(file_path("target"), &count);
    CHECK(count == 3 && memcmp(now, "old", 3) == 0, "the target has changed");
    free(now);
    free(data);
    plora_context_destroy(context);
    check_allocator_empty(&allocator, "failing writes");
}

static void out_of_memory(void **state)
{
    (void)state;
    struct check_allocator allocator = CHECK_ALLOCATOR_INIT;
    plora_context *context = check_context(&allocator, 1, 0);
    const int64_t base = allocator.live;
    file_write_safetensors(file_path("good"), good_header, NULL, 36);
    file_write_text(file_path("kept"), "old");
    int done = 0;
    for (int64_t k = 1; !done; ++k) {
        struct plora__safetensors file;
        allocator.fail_at = allocator.calls + k;
        const int64_t failed = allocator.failed;
        plora_status status = plora__safetensors_open(context, file_path("good"), &file);
        if (status == PLORA_OK) plora__safetensors_close(&file);
        if (status == PLORA_OK)
            status = plora__safetensors_write(context, file_path("kept"), write_tensors, 2, &write_metadata, 1);
        done = allocator.failed == failed;
        CHECK(status == (done ? PLORA_OK : PLORA_ERROR_OUT_OF_MEMORY), "allocation %lld: status %d", (long long)k,
              status);
        CHECK(allocator.live == base, "allocation %lld: %lld blocks left", (long long)k,
              (long long)(allocator.live - base));
        CHECK(done ? k > 5 : k < 100, "%lld allocations", (long long)k);
    }
    allocator.fail_at = 0;
    plora_context_destroy(context);
    check_allocator_empty(&allocator, "out of memory");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(json_grammar), cmocka_unit_test(json_depth),     cmocka_unit_test(json_values),
        cmocka_unit_test(sorting),      cmocka_unit_test(well_formed),    cmocka_unit_test(misaligned),
        cmocka_unit_test(hostile),      cmocka_unit_test(hostile_length), cmocka_unit_test(mutations),
        cmocka_unit_test(round_trip),   cmocka_unit_test(failing_writes), cmocka_unit_test(out_of_memory),
    };
    check_begin("test_safetensors");
    return cmocka_run_group_tests(tests, file_setup, file_teardown);
}
