/* gguf_read.c: reading a GGUF file of LoRA adapters (gguf.h).
 *
 * A hostile file may hold anything: a cursor walks over its bytes once, and nothing is used before it is checked. What llama.cpp would
 * not load is refused as well: gaps, other alignments, tensors in another order than their infos. Values of no meaning for the adapters
 * are skipped, those that say how an adapter works and are not known here are refused by name. Which layer a tensor is, and its scale,
 * is gguf_adapter.c's. */
#include "gguf.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "dtype.h"
#include "json.h"

enum { ALIGNMENT = 32, ALIGNMENT_MAX = 1 << 20, LEAST_INFO_BYTES = 8 + 1 + 4 + 8 + 4 + 8 };

/* Of a value. The sizes of numbers are in number_bytes[]. */
enum { TYPE_UINT32 = 4, TYPE_FLOAT32 = 6, TYPE_STRING = 8, TYPE_ARRAY = 9, TYPE_COUNT = 13 };
static const int number_bytes[TYPE_COUNT] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};

/* Of a tensor, for messages: those that are not read are named where they are usual. */
static const struct {
    uint32_t type;
    int32_t dtype;
    const char *name;
} types[] = {
    {0, PLORA_F32, "F32"}, {1, PLORA_F16, "F16"}, {30, PLORA_BF16, "BF16"}, {2, -1, "Q4_0"},
    {3, -1, "Q4_1"},       {6, -1, "Q5_0"},       {7, -1, "Q5_1"},          {8, -1, "Q8_0"},
    {12, -1, "Q4_K"},      {13, -1, "Q5_K"},      {14, -1, "Q6_K"},         {28, -1, "F64"},
};
enum { TYPES = sizeof types / sizeof types[0] };

struct cursor {
    const unsigned char *bytes;
    uint64_t at, count;
};

struct text { /* of the file, not terminated */
    const char *data;
    uint64_t length, at;
};

static plora_status read_number(struct cursor *cursor, int bytes, uint64_t *number, const char *what)
{
    PLORA_CHECK(cursor->count - cursor->at >= (uint64_t)bytes, PLORA_ERROR_FORMAT,
                "the file ends at byte %" PRIu64 ", within %s at byte %" PRIu64, cursor->count, what, cursor->at);
    *number = 0;
    for (int i = bytes; i-- > 0;)
        *number = *number << 8 | cursor->bytes[cursor->at + (uint64_t)i];
    cursor->at += (uint64_t)bytes;
    return PLORA_OK;
}

static plora_status read_text(struct cursor *cursor, struct text *text, const char *what)
{
    text->at = cursor->at;
    PLORA_TRY(read_number(cursor, 8, &text->length, what));
    PLORA_CHECK(text->length <= cursor->count - cursor->at, PLORA_ERROR_FORMAT,
                "%s at byte %" PRIu64 " has %" PRIu64 " bytes, but the file ends at byte %" PRIu64, what, text->at,
                text->length, cursor->count);
    text->data = (const char *)cursor->bytes + cursor->at;
    cursor->at += text->length;
    return PLORA_OK;
}

static int is(const struct text *text, const char *wanted)
{
    return text->length == strlen(wanted) && memcmp(text->data, wanted, text->length) == 0;
}

static int begins(const struct text *text, const char *wanted)
{
    return text->length >= strlen(wanted) && memcmp(text->data, wanted, strlen(wanted)) == 0;
}

/* For messages: a name of at most PLORA__GGUF_TEXT_BYTES - 1 characters that can be printed, which becomes a string. */
static plora_status copy_name(const struct text *text, const char *what, char copy[PLORA__GGUF_TEXT_BYTES])
{
    PLORA_CHECK(text->length > 0 && text->length < PLORA__GGUF_TEXT_BYTES, PLORA_ERROR_FORMAT,
                "%s at byte %" PRIu64 " has %" PRIu64 " characters: must have 1 to %d", what, text->at, text->length,
                PLORA__GGUF_TEXT_BYTES - 1);
    for (uint64_t i = 0; i < text->length; ++i) {
        copy[i] = text->data[i];
        PLORA_CHECK(copy[i] > ' ' && copy[i] < 0x7f, PLORA_ERROR_FORMAT,
                    "%s at byte %" PRIu64 ": its character %" PRIu64 " is 0x%02x", what, text->at, i,
                    (unsigned)(unsigned char)copy[i]);
    }
    copy[text->length] = '\0';
    return PLORA_OK;
}

/* -------------------------------------------------------------------------------------------------------------- values */

/* What the values fill in. */
struct values {
    struct plora__gguf *file;
    uint64_t alignment;
    unsigned seen; /* bit i: known[i] */
};

/* Values that are read; the first three must be there. */
enum { ARCHITECTURE, ADAPTER_TYPE, ALPHA, GENERAL_TYPE, ALIGNMENT_OF_DATA, KNOWN };
static const struct {
    const char *key;
    uint32_t type;
    const char *must_be; /* NULL = anything */
} known[KNOWN] = {
    {"general.architecture", TYPE_STRING, NULL}, {"adapter.type", TYPE_STRING, "lora"},
    {"adapter.lora.alpha", TYPE_FLOAT32, NULL},  {"general.type", TYPE_STRING, "adapter"},
    {"general.alignment", TYPE_UINT32, NULL},
};

/* Of no influence on what the adapters compute. */
static const char *const harmless[] = {"adapter.lora.task_name", "adapter.lora.prompt_prefix"};
enum { HARMLESS = sizeof harmless / sizeof harmless[0] };

static plora_status skip_items(struct cursor *cursor, uint64_t type, uint64_t items, const struct text *key)
{
    const int shown = key->length < 200 ? (int)key->length : 200;
    if (type == TYPE_STRING) {
        struct text text;
        for (uint64_t i = 0; i < items; ++i) /* each takes bytes of the file */
            PLORA_TRY(read_text(cursor, &text, "a string"));
        return PLORA_OK;
    }
    PLORA_CHECK(type < TYPE_COUNT && number_bytes[type] > 0, PLORA_ERROR_FORMAT,
                "value '%.*s' at byte %" PRIu64 " is of the unknown type %" PRIu64, shown, key->data, key->at, type);
    PLORA_CHECK(items <= (cursor->count - cursor->at) / (uint64_t)number_bytes[type], PLORA_ERROR_FORMAT,
                "value '%.*s' at byte %" PRIu64 " has %" PRIu64 " items, but the file ends at byte %" PRIu64, shown,
                key->data, key->at, items, cursor->count);
    cursor->at += items * (uint64_t)number_bytes[type];
    return PLORA_OK;
}

static plora_status skip_value(struct cursor *cursor, uint64_t type, const struct text *key)
{
    uint64_t items = 1;
    if (type == TYPE_ARRAY) {
        PLORA_TRY(read_number(cursor, 4, &type, "an array's type"));
        PLORA_TRY(read_number(cursor, 8, &items, "an array's length"));
    }
    return skip_items(cursor, type, items, key);
}

static plora_status take_text(struct cursor *cursor, int which, struct values *values)
{
    struct text text;
    char copy[PLORA__GGUF_TEXT_BYTES];
    PLORA_TRY(read_text(cursor, &text, known[which].key));
    PLORA_TRY(copy_name(&text, known[which].key, copy));
    PLORA_CHECK(known[which].must_be == NULL || strcmp(copy, known[which].must_be) == 0, PLORA_ERROR_UNSUPPORTED,
                "%s at byte %" PRIu64 " is '%s': only '%s' is supported", known[which].key, text.at, copy,
                known[which].must_be);
    if (which == ARCHITECTURE) memcpy(values->file->architecture, copy, sizeof copy);
    return PLORA_OK;
}

static plora_status take_number(struct cursor *cursor, int which, struct values *values)
{
    const uint64_t at = cursor->at;
    uint64_t bits;
    PLORA_TRY(read_number(cursor, 4, &bits, known[which].key));
    if (which == ALPHA) {
        values->file->alpha = plora__float_from_bits((uint32_t)bits);
        PLORA_CHECK(isfinite(values->file->alpha), PLORA_ERROR_FORMAT, "%s at byte %" PRIu64 " is %g", known[which].key,
                    at, (double)values->file->alpha);
        return PLORA_OK;
    }
    PLORA_CHECK(bits >= 8 && bits <= ALIGNMENT_MAX && (bits & (bits - 1)) == 0, PLORA_ERROR_FORMAT,
                "%s at byte %" PRIu64 " is %" PRIu64 ": must be a power of two in [8, %d]", known[which].key, at, bits,
                ALIGNMENT_MAX);
    values->alignment = bits;
    return PLORA_OK;
}

static plora_status read_value(struct cursor *cursor, struct values *values)
{
    struct text key;
    uint64_t type;
    PLORA_TRY(read_text(cursor, &key, "a key"));
    PLORA_TRY(read_number(cursor, 4, &type, "a value's type"));
    int which = 0;
    while (which < KNOWN && !is(&key, known[which].key))
        ++which;
    if (which == KNOWN) {
        int ignored = !begins(&key, "adapter.");
        for (int i = 0; i < HARMLESS; ++i)
            ignored |= is(&key, harmless[i]);
        PLORA_CHECK(ignored, PLORA_ERROR_UNSUPPORTED, "value '%.*s' at byte %" PRIu64 " is not supported",
                    key.length < 200 ? (int)key.length : 200, key.data, key.at);
        return skip_value(cursor, type, &key);
    }
    PLORA_CHECK((values->seen & 1u << which) == 0, PLORA_ERROR_FORMAT, "a second value '%s' at byte %" PRIu64,
                known[which].key, key.at);
    PLORA_CHECK(type == known[which].type, PLORA_ERROR_FORMAT,
                "value '%s' at byte %" PRIu64 " is of type %" PRIu64 ", not %u", known[which].key, key.at, type,
                known[which].type);
    values->seen |= 1u << which;
    return type == TYPE_STRING ? take_text(cursor, which, values) : take_number(cursor, which, values);
}

static plora_status read_values(struct cursor *cursor, uint64_t count, struct values *values)
{
    for (uint64_t i = 0; i < count; ++i) /* each takes bytes of the file */
        PLORA_TRY(read_value(cursor, values));
    for (int which = 0; which <= ALPHA; ++which)
        PLORA_CHECK((values->seen & 1u << which) != 0, PLORA_ERROR_FORMAT, "there is no value '%s'", known[which].key);
    return PLORA_OK;
}

/* ------------------------------------------------------------------------------------------------------------- tensors */

/* What the infos fill, one after another. */
struct infos {
    struct plora__gguf *file;
    int64_t (*shapes)[2];
    char (*names)[PLORA__GGUF_TEXT_BYTES];
    int32_t *order; /* sorted by name at the end */
    uint64_t end;   /* of the tensors so far, from tensor 0 on */
    uint64_t alignment;
};

static plora_status read_type(struct cursor *cursor, struct plora__tensor *tensor, int32_t *dtype)
{
    const uint64_t at = cursor->at;
    uint64_t type;
    PLORA_TRY(read_number(cursor, 4, &type, "a tensor's type"));
    int i = 0;
    while (i < TYPES && types[i].type != type)
        ++i;
    PLORA_CHECK(i < TYPES, PLORA_ERROR_UNSUPPORTED,
                "tensor '%s' is of type %" PRIu64 " at byte %" PRIu64 ": only F32, F16 and BF16 are", tensor->name,
                type, at);
    PLORA_CHECK(types[i].dtype >= 0, PLORA_ERROR_UNSUPPORTED,
                "tensor '%s' is of type %s at byte %" PRIu64 ": only F32, F16 and BF16 are", tensor->name,
                types[i].name, at);
    tensor->dtype = types[i].name;
    *dtype = types[i].dtype;
    return PLORA_OK;
}

/* Extents are written fastest first, shapes have them last. */
static plora_status read_shape(struct cursor *cursor, struct plora__tensor *tensor, int64_t shape[2])
{
    const uint64_t at = cursor->at;
    uint64_t dimensions, extent;
    PLORA_TRY(read_number(cursor, 4, &dimensions, "a tensor's dimensions"));
    PLORA_CHECK(dimensions == 2, PLORA_ERROR_UNSUPPORTED,
                "tensor '%s' has %" PRIu64 " dimensions at byte %" PRIu64 ": must be 2", tensor->name, dimensions, at);
    for (int d = 2; d-- > 0;) {
        PLORA_TRY(read_number(cursor, 8, &extent, "a tensor's extents"));
        PLORA_CHECK(extent >= 1 && extent <= INT32_MAX, PLORA_ERROR_FORMAT,
                    "tensor '%s': the extent at byte %" PRIu64 " is %" PRIu64 ": must be in [1, 2^31)", tensor->name,
                    cursor->at - 8, extent);
        shape[d] = (int64_t)extent;
    }
    tensor->shape = shape;
    tensor->dimensions = 2;
    return PLORA_OK;
}

static plora_status read_info(struct cursor *cursor, struct infos *infos)
{
    const int32_t number = infos->file->tensor_count;
    struct plora__tensor *tensor = &infos->file->tensors[number];
    struct text text;
    uint64_t offset;
    int32_t dtype = PLORA_F32;
    *tensor = (struct plora__tensor){.name = infos->names[number]};
    PLORA_TRY(read_text(cursor, &text, "a tensor's name"));
    PLORA_TRY(copy_name(&text, "a tensor's name", infos->names[number]));
    PLORA_TRY(read_shape(cursor, tensor, infos->shapes[number]));
    PLORA_TRY(read_type(cursor, tensor, &dtype));
    const uint64_t elements = (uint64_t)tensor->shape[0] * (uint64_t)tensor->shape[1]; /* < 2^62 */
    PLORA_CHECK(elements <= cursor->count / plora__dtype_size(dtype), PLORA_ERROR_FORMAT,
                "tensor '%s': [%" PRId64 ",%" PRId64 "] %s are more bytes than the file's %" PRIu64, tensor->name,
                tensor->shape[0], tensor->shape[1], tensor->dtype, cursor->count);
    tensor->bytes = (size_t)elements * plora__dtype_size(dtype);
    PLORA_TRY(read_number(cursor, 8, &offset, "a tensor's offset"));
    const uint64_t expected = (infos->end + infos->alignment - 1) / infos->alignment * infos->alignment;
    PLORA_CHECK(offset == expected, PLORA_ERROR_FORMAT,
                "tensor '%s': its offset at byte %" PRIu64 " is %" PRIu64 ", but the one before it ends at %" PRIu64
                ", so it must be %" PRIu64,
                tensor->name, cursor->at - 8, offset, infos->end, expected);
    tensor->offset = offset;
    infos->end = offset + tensor->bytes;
    infos->file->tensor_count++;
    return PLORA_OK;
}

static int name_less(int32_t i, int32_t j, const void *user)
{
    const struct plora__tensor *tensors = user;
    return strcmp(tensors[i].name, tensors[j].name) < 0;
}

/* Tensors become pointers into the file. */
static plora_status attach_data(struct cursor *cursor, struct infos *infos, unsigned char *bytes)
{
    struct plora__gguf *file = infos->file;
    const uint64_t align = infos->alignment, start = (cursor->at + align - 1) / align * align;
    for (int32_t i = 0; i < file->tensor_count; ++i) {
        struct plora__tensor *tensor = &file->tensors[i];
        PLORA_CHECK(start <= cursor->count && tensor->offset <= cursor->count - start &&
                        tensor->bytes <= cursor->count - start - tensor->offset,
                    PLORA_ERROR_FORMAT,
                    "tensor '%s': bytes %" PRIu64 " to %" PRIu64 ", but the file ends at byte %" PRIu64, tensor->name,
                    start + tensor->offset, start + tensor->offset + tensor->bytes, cursor->count);
        tensor->offset += start;
        tensor->data = bytes + tensor->offset;
        infos->order[i] = i;
    }
    const uint64_t end = start + infos->end, padded = (end + align - 1) / align * align;
    PLORA_CHECK(cursor->count <= padded, PLORA_ERROR_FORMAT,
                "the tensors end at byte %" PRIu64 ", the file at byte %" PRIu64, end, cursor->count);
    plora__sort(infos->order, file->tensor_count, name_less, file->tensors);
    for (int32_t i = 1; i < file->tensor_count; ++i)
        PLORA_CHECK(name_less(infos->order[i - 1], infos->order[i], file->tensors), PLORA_ERROR_FORMAT,
                    "tensor '%s' occurs twice, at bytes %" PRIu64 " and %" PRIu64, file->tensors[infos->order[i]].name,
                    file->tensors[infos->order[i - 1]].offset, file->tensors[infos->order[i]].offset);
    return PLORA_OK;
}

/* One allocation for all that the infos fill; the file's bytes bound their number. */
static plora_status allocate_block(struct cursor *cursor, uint64_t count, struct infos *infos)
{
    struct plora__gguf *file = infos->file;
    PLORA_CHECK(count > 0, PLORA_ERROR_FORMAT, "there are no tensors");
    PLORA_CHECK(count <= (cursor->count - cursor->at) / LEAST_INFO_BYTES && count <= INT32_MAX, PLORA_ERROR_FORMAT,
                "%" PRIu64 " tensors at byte 8, but the file ends at byte %" PRIu64, count, cursor->count);
    const size_t tensors = (size_t)count, shapes_at = tensors * sizeof *file->tensors;
    const size_t order_at = shapes_at + tensors * sizeof *infos->shapes;
    const size_t names_at = order_at + tensors * sizeof *infos->order;
    file->block_bytes = names_at + tensors * sizeof *infos->names;
    PLORA_TRY(plora__allocate(file->context, file->block_bytes, &file->block));
    char *block = file->block;
    file->tensors = file->block;
    infos->shapes = (int64_t(*)[2])(block + shapes_at);
    infos->order = (int32_t *)(block + order_at);
    infos->names = (char(*)[PLORA__GGUF_TEXT_BYTES])(block + names_at);
    return PLORA_OK;
}

static plora_status read_version(struct cursor *cursor)
{
    uint64_t version;
    PLORA_CHECK(cursor->count >= 4 && memcmp(cursor->bytes, "GGUF", 4) == 0, PLORA_ERROR_FORMAT,
                "not a GGUF file: it does not begin with 'GGUF'");
    cursor->at = 4;
    PLORA_TRY(read_number(cursor, 4, &version, "the version"));
    PLORA_CHECK(version == 2 || version == 3, PLORA_ERROR_UNSUPPORTED,
                "a GGUF file of version %" PRIu64 ": only 2 and 3, little-endian, are read", version);
    return PLORA_OK;
}

plora_status plora__gguf_parse(plora_context *context, unsigned char *bytes, size_t count, struct plora__gguf *file)
{
    struct cursor cursor = {bytes, 0, count};
    struct values values = {.file = file, .alignment = ALIGNMENT};
    struct infos infos = {.file = file};
    uint64_t tensor_count, value_count;
    plora_status status;
    *file = (struct plora__gguf){.context = context};
    PLORA_TRY(read_version(&cursor));
    PLORA_TRY(read_number(&cursor, 8, &tensor_count, "the number of tensors"));
    PLORA_TRY(read_number(&cursor, 8, &value_count, "the number of values"));
    PLORA_TRY(read_values(&cursor, value_count, &values));
    PLORA_TRY(allocate_block(&cursor, tensor_count, &infos));
    infos.alignment = values.alignment;
    for (uint64_t i = 0; i < tensor_count; ++i)
        PLORA_TRY_OUT(read_info(&cursor, &infos));
    status = attach_data(&cursor, &infos, bytes);
out:
    if (status != PLORA_OK) plora__gguf_free(file);
    return status;
}

void plora__gguf_free(struct plora__gguf *file)
{
    plora__free(file->context, file->block, file->block_bytes);
    *file = (struct plora__gguf){.context = file->context};
}
