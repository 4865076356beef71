/* runs.c: quantised values made and read a run at a time, so that neither takes memory that grows with the weight.
 *
 *     run   INT8: whole rows     NF4: whole blocks of 64 elements, doubly quantised of 256 such blocks; about a million elements
 *
 * Codes are made and read on the host, by the CPU's backend, whatever the context's: that is where masters lie, and where every backend
 * gets the same bits. What is copied is the codes. */
#include "dtype.h"
#include "handles.h"

enum { RUN_ELEMENTS = PLORA__QUANTISE_UNITS * PLORA__QUANTISE_UNIT };

static int64_t groups_of(const struct plora__quantised *weight)
{
    return (weight->columns + weight->group - 1) / weight->group;
}

static int64_t run_elements(const struct plora__quantised *weight)
{
    const int64_t columns = weight->columns, unit = PLORA__QUANTISE_UNIT;
    if (weight->format == PLORA__QUANTISED_NF4) return RUN_ELEMENTS;
    if (columns < unit) return PLORA__QUANTISE_UNITS * (unit / columns) * columns;
    return columns < RUN_ELEMENTS ? RUN_ELEMENTS / columns * columns : columns;
}

struct plora__run plora__run_next(const struct plora__quantised *weight, int64_t first)
{
    const int64_t left = weight->rows * weight->columns - first, most = run_elements(weight);
    return (struct plora__run){first, left < most ? left : most};
}

/* Where the parts of a run lie in their arrays, and how long they are, in bytes. */
struct parts {
    size_t codes_at, codes, scales_at, scales, nested_at, nested;
};

static struct parts parts_of(const struct plora__quantised *weight, struct plora__run run)
{
    const int64_t block = PLORA__NF4_BLOCK, unit = PLORA__QUANTISE_UNIT;
    const int doubly = weight->nested_codes != NULL;
    if (weight->format == PLORA__QUANTISED_INT8)
        return (struct parts){
            .codes_at = (size_t)run.first,
            .codes = (size_t)run.count,
            .scales_at = (size_t)(run.first / weight->columns * groups_of(weight)) * sizeof(float),
            .scales = (size_t)(run.count / weight->columns * groups_of(weight)) * sizeof(float),
        };
    const int64_t each = doubly ? unit : block; /* elements of a scale */
    return (struct parts){
        .codes_at = (size_t)(run.first / 2),
        .codes = (size_t)((run.count + 1) / 2),
        .scales_at = (size_t)(run.first / each) * sizeof(float),
        .scales = (size_t)((run.count + each - 1) / each) * sizeof(float),
        .nested_at = doubly ? (size_t)(run.first / block) : 0,
        .nested = doubly ? (size_t)((run.count + block - 1) / block) : 0,
    };
}

/* -------------------------------------------------------------------------------------------------------------- memory */

static void at_least(size_t *bytes, size_t needed)
{
    if (*bytes < needed) *bytes = needed;
}

void plora__run_memory_need(const struct plora__quantised *weight, int values, int delta,
                            struct plora__run_memory *memory)
{
    const struct plora__run run = plora__run_next(weight, 0);
    const struct parts parts = parts_of(weight, run);
    at_least(&memory->codes_bytes, parts.codes);
    at_least(&memory->scales_bytes, parts.scales);
    at_least(&memory->nested_bytes, parts.nested);
    if (values) at_least(&memory->values_bytes, (size_t)run.count * sizeof(float));
    if (delta) at_least(&memory->delta_bytes, (size_t)(run.count + 2 * weight->columns) * sizeof(float));
}

static size_t aligned(size_t bytes)
{
    return (bytes + PLORA__ALIGNMENT - 1) / PLORA__ALIGNMENT * PLORA__ALIGNMENT;
}

plora_status plora__run_memory_make(plora_context *context, struct plora__run_memory *memory)
{
    const size_t scales_at = aligned(memory->codes_bytes), nested_at = scales_at + aligned(memory->scales_bytes);
    const size_t values_at = nested_at + aligned(memory->nested_bytes);
    const size_t merged_at = values_at + aligned(memory->values_bytes);
    const size_t delta_at = merged_at + aligned(memory->values_bytes);
    void *block;
    PLORA_TRY(plora__allocate(context, delta_at + memory->delta_bytes, &block));
    if (block == NULL) return PLORA_OK; /* nothing is needed */
    char *bytes = block;
    memory->bytes = delta_at + memory->delta_bytes;
    memory->codes = bytes;
    memory->scales = (float *)(void *)(bytes + scales_at);
    memory->nested_codes = (uint8_t *)bytes + nested_at;
    memory->values = (float *)(void *)(bytes + values_at);
    memory->merged = (float *)(void *)(bytes + merged_at);
    memory->delta = (float *)(void *)(bytes + delta_at);
    return PLORA_OK;
}

void plora__run_memory_free(plora_context *context, struct plora__run_memory *memory)
{
    plora__free(context, memory->codes, memory->bytes);
    memory->codes = NULL;
}

/* ---------------------------------------------------------------------------------------------------------------- runs */

plora_status plora__run_dequantise(void *host_device, const struct plora__quantised_weight *weight,
                                   struct plora__run run, const struct plora__run_memory *memory, float *out)
{
    /* NF4 knows no rows: a run is one. */
    struct plora__dequantise_args args = {.weight = weight->values};
    const int int8 = args.weight.format == PLORA__QUANTISED_INT8;
    args.weight.rows = int8 ? run.count / weight->values.columns : 1;
    args.weight.columns = int8 ? weight->values.columns : run.count;
    args.weight.codes = memory->codes;
    args.weight.scales = memory->scales;
    if (args.weight.nested_codes != NULL) {
        args.weight.nested_codes = memory->nested_codes;
        args.weight.map = weight->map;
    }
    args.out = (plora_matrix){NULL, args.weight.rows, args.weight.columns, args.weight.columns, PLORA_F32, 0};
    args.out.data = out;
    return plora__cpu_backend.dequantise(host_device, &args, NULL);
}

plora_status plora__run_read(const plora_context *context, void *host_device,
                             const struct plora__quantised_weight *weight, struct plora__run run,
                             const struct plora__run_memory *memory, float *out, void *stream)
{
    const struct plora_backend *backend = context->backend;
    const struct plora__quantised *from = &weight->values;
    const struct parts parts = parts_of(from, run);
    PLORA_TRY(
        backend->copy(context->device, memory->codes, (const char *)from->codes + parts.codes_at, parts.codes, stream));
    PLORA_TRY(backend->copy(context->device, memory->nested_codes,
                            from->nested_codes == NULL ? NULL : from->nested_codes + parts.nested_at, parts.nested,
                            stream));
    PLORA_TRY(plora__read_device(context, memory->scales, (const char *)from->scales + parts.scales_at, parts.scales,
                                 stream));
    return plora__run_dequantise(host_device, weight, run, memory, out);
}

plora_status plora__run_make(void *host_device, const struct plora__quantised_weight *weight, struct plora__run run,
                             const plora_matrix *values, int64_t first, const struct plora__run_memory *memory,
                             struct plora__quantise_sums *sums)
{
    const struct plora__quantise_args args = {
        .values = *values,
        .format = weight->values.format,
        .offset = weight->values.offset,
        .group = weight->values.group,
        .map = weight->values.nested_codes != NULL ? weight->map : NULL,
        .first = first,
        .count = run.count,
        .codes = memory->codes,
        .scales = memory->scales,
        .nested_codes = memory->nested_codes,
        .sums = sums,
    };
    return plora__cpu_backend.quantise(host_device, &args);
}

plora_status plora__run_write(const plora_context *context, const struct plora__quantised *weight,
                              struct plora__run run, const struct plora__run_memory *memory, void *stream)
{
    const struct plora_backend *backend = context->backend;
    const struct parts parts = parts_of(weight, run);
    char *codes = (char *)(uintptr_t)weight->codes + parts.codes_at;
    char *scales = (char *)(uintptr_t)weight->scales + parts.scales_at;
    PLORA_TRY(backend->copy(context->device, codes, memory->codes, parts.codes, stream));
    PLORA_TRY(backend->copy(context->device, scales, memory->scales, parts.scales, stream));
    if (weight->nested_codes != NULL)
        PLORA_TRY(backend->copy(context->device, (void *)(uintptr_t)(weight->nested_codes + parts.nested_at),
                                memory->nested_codes, parts.nested, stream));
    return backend->synchronize(context->device, stream); /* the memory is used again */
}
