/* safetensors.c: see safetensors.h. The header of a hostile file may hold anything: nothing in it is used before it is checked. */
#include "safetensors.h"

#include <string.h>

#include "dtype.h"
#include "json.h"

enum { PREFIX_BYTES = 8 };

static const struct {
    const char *name;
    int32_t bits;
    int32_t dtype;
} dtypes[] = {
    {"F32", 32, PLORA_F32}, {"BF16", 16, PLORA_BF16}, {"F16", 16, PLORA_F16}, {"F64", 64, -1},
    {"I64", 64, -1},        {"I32", 32, -1},          {"I16", 16, -1},        {"I8", 8, -1},
    {"U64", 64, -1},        {"U32", 32, -1},          {"U16", 16, -1},        {"U8", 8, -1},
    {"BOOL", 8, -1},        {"F8_E4M3", 8, -1},       {"F8_E5M2", 8, -1},     {"F8_E8M0", 8, -1},
    {"F8_E4M3FNUZ", 8, -1}, {"F8_E5M2FNUZ", 8, -1},   {"F6_E2M3", 6, -1},     {"F6_E3M2", 6, -1},
    {"F4", 4, -1},          {"C64", 64, -1},
};
enum { DTYPE_COUNT = sizeof dtypes / sizeof dtypes[0] };

int32_t plora__tensor_dtype(const struct plora__tensor *tensor)
{
    for (int i = 0; i < DTYPE_COUNT; ++i)
        if (strcmp(dtypes[i].name, tensor->dtype) == 0) return dtypes[i].dtype;
    return -1;
}

/* ------------------------------------------------------------------------------------------------------------- reading */

/* What the entries of the header fill, one after another. */
struct parser {
    struct plora__safetensors *file;
    const struct plora__json *json;
    int64_t *shapes;
    char *strings;
    uint64_t data_start, data_bytes;
};

static unsigned long long at(const struct parser *parser, int32_t token)
{
    return PREFIX_BYTES + plora__json_offset(parser->json, token);
}

static const char *take_string(struct parser *parser, int32_t token)
{
    char *string = parser->strings;
    parser->strings += plora__json_string(parser->json, token, string) + 1;
    return string;
}

static plora_status parse_metadata(struct parser *parser, int32_t object)
{
    const struct plora__json *json = parser->json;
    struct plora__safetensors *file = parser->file;
    PLORA_CHECK(plora__json_type(json, object) == PLORA__JSON_OBJECT, PLORA_ERROR_FORMAT,
                "__metadata__ at byte %llu is not an object", at(parser, object));
    int32_t key = object + 1;
    for (int32_t i = 0; i < plora__json_size(json, object); ++i, key += 2) {
        PLORA_CHECK(plora__json_type(json, key + 1) == PLORA__JSON_STRING, PLORA_ERROR_FORMAT,
                    "__metadata__: the value at byte %llu is not a string", at(parser, key + 1));
        struct plora__metadata *entry = &file->metadata[file->metadata_count++];
        entry->key = take_string(parser, key);
        entry->value = take_string(parser, key + 1);
    }
    return PLORA_OK;
}

static plora_status parse_dtype(struct parser *parser, struct plora__tensor *tensor, int32_t token, int32_t *bits)
{
    for (int i = 0; i < DTYPE_COUNT; ++i) {
        if (!plora__json_equals(parser->json, token, dtypes[i].name)) continue;
        tensor->dtype = dtypes[i].name;
        *bits = dtypes[i].bits;
        return PLORA_OK;
    }
    return plora__fail(PLORA_ERROR_FORMAT, "tensor '%.200s': unknown dtype at byte %llu", tensor->name,
                       at(parser, token));
}

static plora_status parse_shape(struct parser *parser, struct plora__tensor *tensor, int32_t token)
{
    const struct plora__json *json = parser->json;
    PLORA_CHECK(plora__json_type(json, token) == PLORA__JSON_ARRAY, PLORA_ERROR_FORMAT,
                "tensor '%.200s': the shape at byte %llu is not an array", tensor->name, at(parser, token));
    tensor->dimensions = plora__json_size(json, token);
    tensor->shape = parser->shapes;
    int32_t element = token + 1;
    for (int32_t i = 0; i < tensor->dimensions; ++i, element = plora__json_next(json, element))
        PLORA_CHECK(plora__json_integer(json, element, parser->shapes++), PLORA_ERROR_FORMAT,
                    "tensor '%.200s': dimension %d at byte %llu is not an integer in [0, 2^63)", tensor->name, i,
                    at(parser, element));
    return PLORA_OK;
}

static plora_status parse_offsets(struct parser *parser, struct plora__tensor *tensor, int32_t token)
{
    const struct plora__json *json = parser->json;
    int64_t range[2];
    PLORA_CHECK(plora__json_type(json, token) == PLORA__JSON_ARRAY && plora__json_size(json, token) == 2,
                PLORA_ERROR_FORMAT, "tensor '%.200s': data_offsets at byte %llu is not a pair", tensor->name,
                at(parser, token));
    int32_t element = token + 1;
    for (int i = 0; i < 2; ++i, element = plora__json_next(json, element))
        PLORA_CHECK(plora__json_integer(json, element, &range[i]), PLORA_ERROR_FORMAT,
                    "tensor '%.200s': the offset at byte %llu is not an integer in [0, 2^63)", tensor->name,
                    at(parser, element));
    PLORA_CHECK(range[0] <= range[1], PLORA_ERROR_FORMAT,
                "tensor '%.200s': data_offsets [%lld, %lld] at byte %llu run backwards", tensor->name,
                (long long)range[0], (long long)range[1], at(parser, token));
    PLORA_CHECK((uint64_t)range[1] <= parser->data_bytes, PLORA_ERROR_FORMAT,
                "tensor '%.200s': data_offsets [%lld, %lld] at byte %llu leave the %llu bytes of data", tensor->name,
                (long long)range[0], (long long)range[1], at(parser, token), (unsigned long long)parser->data_bytes);
    tensor->offset = parser->data_start + (uint64_t)range[0];
    tensor->bytes = (size_t)(range[1] - range[0]);
    return PLORA_OK;
}

static plora_status check_size(const struct plora__tensor *tensor, int32_t bits)
{
    uint64_t total = (uint64_t)bits;
    int overflow = 0, empty = 0;
    for (int32_t i = 0; i < tensor->dimensions; ++i) {
        if (tensor->shape[i] == 0) empty = 1;
        overflow |= __builtin_mul_overflow(total, (uint64_t)tensor->shape[i], &total);
    }
    if (empty) total = 0;
    PLORA_CHECK(empty || !overflow, PLORA_ERROR_FORMAT, "tensor '%.200s' at byte %llu: the size of its shape overflows",
                tensor->name, (unsigned long long)tensor->offset);
    PLORA_CHECK(total % 8 == 0 && total / 8 == tensor->bytes, PLORA_ERROR_FORMAT,
                "tensor '%.200s' at byte %llu: %zu bytes of data, but shape and dtype %s make %llu bits", tensor->name,
                (unsigned long long)tensor->offset, tensor->bytes, tensor->dtype, (unsigned long long)total);
    return PLORA_OK;
}

static plora_status parse_tensor(struct parser *parser, int32_t name, int32_t object)
{
    static const char *const keys[] = {"dtype", "shape", "data_offsets"};
    const struct plora__json *json = parser->json;
    struct plora__tensor *tensor = &parser->file->tensors[parser->file->tensor_count++];
    memset(tensor, 0, sizeof *tensor);
    tensor->name = take_string(parser, name);
    PLORA_CHECK(plora__json_type(json, object) == PLORA__JSON_OBJECT, PLORA_ERROR_FORMAT,
                "tensor '%.200s': the entry at byte %llu is not an object", tensor->name, at(parser, object));
    int32_t values[3] = {-1, -1, -1};
    int32_t key = object + 1;
    for (int32_t i = 0; i < plora__json_size(json, object); ++i, key = plora__json_next(json, key + 1)) {
        int k = 0;
        while (k < 3 && !plora__json_equals(json, key, keys[k]))
            ++k;
        PLORA_CHECK(k < 3, PLORA_ERROR_FORMAT, "tensor '%.200s': unknown key at byte %llu", tensor->name,
                    at(parser, key));
        PLORA_CHECK(values[k] < 0, PLORA_ERROR_FORMAT, "tensor '%.200s': a second \"%s\" at byte %llu", tensor->name,
                    keys[k], at(parser, key));
        values[k] = key + 1;
    }
    for (int k = 0; k < 3; ++k)
        PLORA_CHECK(values[k] >= 0, PLORA_ERROR_FORMAT, "tensor '%.200s': the entry at byte %llu has no \"%s\"",
                    tensor->name, at(parser, object), keys[k]);
    int32_t bits = 0;
    PLORA_TRY(parse_dtype(parser, tensor, values[0], &bits));
    PLORA_TRY(parse_shape(parser, tensor, values[1]));
    PLORA_TRY(parse_offsets(parser, tensor, values[2]));
    return check_size(tensor, bits);
}

static int name_less(int32_t i, int32_t j, const void *user)
{
    const struct plora__tensor *tensors = user;
    return strcmp(tensors[i].name, tensors[j].name) < 0;
}

static int key_less(int32_t i, int32_t j, const void *user)
{
    const struct plora__metadata *metadata = user;
    return strcmp(metadata[i].key, metadata[j].key) < 0;
}

static int offset_less(int32_t i, int32_t j, const void *user)
{
    const struct plora__tensor *a = (const struct plora__tensor *)user + i, *b = (const struct plora__tensor *)user + j;
    return a->offset != b->offset ? a->offset < b->offset : a->bytes < b->bytes;
}

static void sort(int32_t *order, int32_t count, int (*less)(int32_t, int32_t, const void *), const void *user)
{
    for (int32_t i = 0; i < count; ++i)
        order[i] = i;
    plora__sort(order, count, less, user);
}

/* `order` is scratch for the larger of the two counts; it ends sorted by name. */
static plora_status check_together(struct parser *parser, int32_t *order)
{
    const struct plora__safetensors *file = parser->file;
    sort(order, file->metadata_count, key_less, file->metadata);
    for (int32_t i = 1; i < file->metadata_count; ++i)
        PLORA_CHECK(key_less(order[i - 1], order[i], file->metadata), PLORA_ERROR_FORMAT,
                    "__metadata__ has the key '%.200s' twice", file->metadata[order[i]].key);

    sort(order, file->tensor_count, offset_less, file->tensors);
    uint64_t end = parser->data_start;
    for (int32_t i = 0; i < file->tensor_count; ++i) {
        const struct plora__tensor *tensor = &file->tensors[order[i]];
        PLORA_CHECK(tensor->offset >= end, PLORA_ERROR_FORMAT,
                    "tensor '%.200s' at byte %llu overlaps the one before, which ends at byte %llu", tensor->name,
                    (unsigned long long)tensor->offset, (unsigned long long)end);
        PLORA_CHECK(tensor->offset == end, PLORA_ERROR_FORMAT,
                    "bytes %llu to %llu before tensor '%.200s' belong to no tensor", (unsigned long long)end,
                    (unsigned long long)tensor->offset, tensor->name);
        end += tensor->bytes;
    }
    PLORA_CHECK(end == parser->data_start + parser->data_bytes, PLORA_ERROR_FORMAT,
                "the tensors end at byte %llu, the file at byte %llu", (unsigned long long)end,
                (unsigned long long)(parser->data_start + parser->data_bytes));

    sort(order, file->tensor_count, name_less, file->tensors);
    for (int32_t i = 1; i < file->tensor_count; ++i)
        PLORA_CHECK(name_less(order[i - 1], order[i], file->tensors), PLORA_ERROR_FORMAT,
                    "tensor '%.200s' occurs twice, at bytes %llu and %llu", file->tensors[order[i]].name,
                    (unsigned long long)file->tensors[order[i - 1]].offset,
                    (unsigned long long)file->tensors[order[i]].offset);
    return PLORA_OK;
}

/* Points the tensors at their data; one that the library would read as numbers but lies at an odd address is copied. */
static plora_status attach_data(struct plora__safetensors *file, unsigned char *bytes)
{
    for (int32_t i = 0; i < file->tensor_count; ++i) {
        struct plora__tensor *tensor = &file->tensors[i];
        const int32_t dtype = plora__tensor_dtype(tensor);
        if (tensor->bytes == 0) continue;
        tensor->data = bytes + tensor->offset;
        if (dtype < 0 || (uintptr_t)tensor->data % plora__dtype_size(dtype) == 0) continue;
        void *copy;
        PLORA_TRY(plora__allocate(file->context, tensor->bytes, &copy));
        memcpy(copy, tensor->data, tensor->bytes);
        tensor->data = copy;
        tensor->copied = 1;
    }
    return PLORA_OK;
}

/* One allocation for everything that the header describes. Its tokens and its bytes bound all the counts. */
static plora_status allocate_block(struct parser *parser, size_t header_bytes)
{
    struct plora__safetensors *file = parser->file;
    const struct plora__json *json = parser->json;
    const size_t members = (size_t)plora__json_size(json, 0);
    const int32_t object = plora__json_member(json, 0, "__metadata__");
    const size_t pairs = object < 0 ? 0 : (size_t)plora__json_size(json, object);
    const size_t orders = members > pairs ? members : pairs;
    const size_t shapes_at = members * sizeof *file->tensors;
    const size_t metadata_at = shapes_at + (size_t)json->count * sizeof(int64_t);
    const size_t order_at = metadata_at + pairs * sizeof *file->metadata;
    const size_t strings_at = order_at + orders * sizeof *file->by_name;
    file->block_bytes = strings_at + header_bytes; /* a string's quotes leave room for its terminator */
    PLORA_TRY(plora__allocate(file->context, file->block_bytes, &file->block));
    char *block = file->block;
    file->tensors = (struct plora__tensor *)block;
    parser->shapes = (int64_t *)(block + shapes_at);
    file->metadata = (struct plora__metadata *)(block + metadata_at);
    file->by_name = (int32_t *)(block + order_at);
    parser->strings = block + strings_at;
    return PLORA_OK;
}

static plora_status parse_header(struct parser *parser, size_t header_bytes)
{
    const struct plora__json *json = parser->json;
    int seen = 0;
    PLORA_TRY(allocate_block(parser, header_bytes));
    int32_t key = 1;
    for (int32_t i = 0; i < plora__json_size(json, 0); ++i, key = plora__json_next(json, key + 1)) {
        if (!plora__json_equals(json, key, "__metadata__")) {
            PLORA_TRY(parse_tensor(parser, key, key + 1));
            continue;
        }
        PLORA_CHECK(!seen, PLORA_ERROR_FORMAT, "a second __metadata__ at byte %llu", at(parser, key));
        seen = 1;
        PLORA_TRY(parse_metadata(parser, key + 1));
    }
    return check_together(parser, parser->file->by_name);
}

plora_status plora__safetensors_parse(plora_context *context, unsigned char *bytes, size_t count,
                                      struct plora__safetensors *file)
{
    *file = (struct plora__safetensors){.context = context};
    PLORA_CHECK(count >= PREFIX_BYTES, PLORA_ERROR_FORMAT,
                "the file ends at byte %zu: the length of the header takes 8 bytes", count);
    uint64_t header = 0;
    for (int i = PREFIX_BYTES; i-- > 0;)
        header = header << 8 | bytes[i];
    PLORA_CHECK(header <= PLORA__JSON_BYTES_MAX, PLORA_ERROR_FORMAT,
                "the header at byte 8 has %llu bytes, at most %d are read", (unsigned long long)header,
                PLORA__JSON_BYTES_MAX);
    PLORA_CHECK(header <= count - PREFIX_BYTES, PLORA_ERROR_FORMAT,
                "the header at byte 8 has %llu bytes, but the file ends at byte %zu", (unsigned long long)header,
                count);
    PLORA_CHECK(header > 0 && bytes[PREFIX_BYTES] == '{', PLORA_ERROR_FORMAT,
                "the header at byte 8 does not begin with '{'");

    struct plora__json json;
    const plora_status parsed = plora__json_parse(context, (const char *)bytes + PREFIX_BYTES, (size_t)header, &json);
    if (parsed != PLORA_OK)
        return parsed == PLORA_ERROR_FORMAT ? plora__fail_in(parsed, "header, from byte 8 of the file") : parsed;
    struct parser parser = {file, &json, NULL, NULL, PREFIX_BYTES + header, count - PREFIX_BYTES - header};
    plora_status status;
    PLORA_TRY_OUT(parse_header(&parser, (size_t)header));
    PLORA_TRY_OUT(attach_data(file, bytes));
out:
    plora__json_free(&json);
    if (status != PLORA_OK) plora__safetensors_close(file);
    return status;
}

plora_status plora__safetensors_open(plora_context *context, const char *path, struct plora__safetensors *file)
{
    struct plora__mapping mapping;
    *file = (struct plora__safetensors){.context = context};
    PLORA_TRY(plora__file_map(context, path, &mapping));
    const plora_status status = plora__safetensors_parse(context, mapping.data, mapping.bytes, file);
    if (status != PLORA_OK) {
        plora__file_unmap(context, &mapping);
        return plora__fail_in(status, path);
    }
    file->mapping = mapping;
    return PLORA_OK;
}

void plora__safetensors_close(struct plora__safetensors *file)
{
    for (int32_t i = 0; i < file->tensor_count; ++i)
        if (file->tensors[i].copied) plora__free(file->context, file->tensors[i].data, file->tensors[i].bytes);
    plora__free(file->context, file->block, file->block_bytes);
    if (file->mapping.data != NULL) plora__file_unmap(file->context, &file->mapping);
    *file = (struct plora__safetensors){.context = file->context};
}

const struct plora__tensor *plora__safetensors_find(const struct plora__safetensors *file, const char *name)
{
    int32_t low = 0, high = file->tensor_count;
    while (low < high) {
        const int32_t middle = low + (high - low) / 2;
        const struct plora__tensor *tensor = &file->tensors[file->by_name[middle]];
        const int order = strcmp(name, tensor->name);
        if (order == 0) return tensor;
        if (order < 0)
            high = middle;
        else
            low = middle + 1;
    }
    return NULL;
}

const char *plora__safetensors_metadata(const struct plora__safetensors *file, const char *key)
{
    for (int32_t i = 0; i < file->metadata_count; ++i)
        if (strcmp(file->metadata[i].key, key) == 0) return file->metadata[i].value;
    return NULL;
}

/* ------------------------------------------------------------------------------------------------------------- writing */

static plora_status format_header(struct plora__text *text, const struct plora__tensor *tensors, int32_t tensor_count,
                                  const struct plora__metadata *metadata, int32_t metadata_count)
{
    PLORA_TRY(plora__text_format(text, "{"));
    for (int32_t i = 0; i < metadata_count; ++i) {
        PLORA_TRY(plora__text_format(text, i == 0 ? "\"__metadata__\":{" : ","));
        PLORA_TRY(plora__text_quote(text, metadata[i].key));
        PLORA_TRY(plora__text_format(text, ":"));
        PLORA_TRY(plora__text_quote(text, metadata[i].value));
    }
    if (metadata_count > 0) PLORA_TRY(plora__text_format(text, tensor_count > 0 ? "}," : "}"));
    uint64_t offset = 0;
    for (int32_t i = 0; i < tensor_count; ++i) {
        const struct plora__tensor *tensor = &tensors[i];
        PLORA_TRY(plora__text_quote(text, tensor->name));
        PLORA_TRY(plora__text_format(text, ":{\"dtype\":\"%s\",\"shape\":[", tensor->dtype));
        for (int32_t d = 0; d < tensor->dimensions; ++d)
            PLORA_TRY(plora__text_format(text, d == 0 ? "%lld" : ",%lld", (long long)tensor->shape[d]));
        PLORA_TRY(plora__text_format(text, "],\"data_offsets\":[%llu,%llu]}%s", (unsigned long long)offset,
                                     (unsigned long long)(offset + tensor->bytes), i + 1 < tensor_count ? "," : ""));
        offset += tensor->bytes;
    }
    PLORA_TRY(plora__text_format(text, "}"));
    while (text->length % 8 != 0)
        PLORA_TRY(plora__text_append(text, " ", 1));
    PLORA_CHECK(text->length <= PLORA__JSON_BYTES_MAX, PLORA_ERROR_UNSUPPORTED,
                "a header of %zu bytes, at most %d are read", text->length, PLORA__JSON_BYTES_MAX);
    return PLORA_OK;
}

static plora_status write_tensor(struct plora__writer *writer, const struct plora__tensor *tensor)
{
    if (tensor->write != NULL) return tensor->write(tensor, writer);
    if (tensor->row_bytes == 0 || tensor->row_bytes == tensor->stride_bytes)
        return plora__writer_write_device(writer, tensor->data, tensor->bytes);
    const unsigned char *row = tensor->data;
    for (size_t done = 0; done < tensor->bytes; done += tensor->row_bytes, row += tensor->stride_bytes)
        PLORA_TRY(plora__writer_write_device(writer, row, tensor->row_bytes));
    return PLORA_OK;
}

plora_status plora__safetensors_write(plora_context *context, const char *path, const struct plora__tensor *tensors,
                                      int32_t tensor_count, const struct plora__metadata *metadata,
                                      int32_t metadata_count)
{
    struct plora__text text = {context, NULL, 0, 0};
    struct plora__writer writer;
    plora_status status = format_header(&text, tensors, tensor_count, metadata, metadata_count);
    if (status == PLORA_OK) status = plora__writer_open(context, path, &writer);
    if (status != PLORA_OK) {
        plora__text_free(&text);
        return status;
    }
    unsigned char prefix[PREFIX_BYTES];
    for (int i = 0; i < PREFIX_BYTES; ++i)
        prefix[i] = (unsigned char)((uint64_t)text.length >> 8 * i);
    PLORA_TRY_OUT(plora__writer_write(&writer, prefix, sizeof prefix));
    PLORA_TRY_OUT(plora__writer_write(&writer, text.data, text.length));
    for (int32_t i = 0; i < tensor_count; ++i)
        PLORA_TRY_OUT(write_tensor(&writer, &tensors[i]));
out:
    plora__text_free(&text);
    return plora__writer_close(&writer, status);
}
