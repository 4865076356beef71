/* gguf_adapter.c: adapters from a GGUF file of the LLaMA family, as llama.cpp would apply them.
 *
 *     blk.0.attn_q.weight.lora_a [R,K]   and   .lora_b [N,R]
 *     s = alpha / R with one alpha for all layers, R of the tensors; alpha = 0: s = 1
 *
 * The rows of query and key projections return to Hugging Face's order, for which the number of heads must be known. */
#include "gguf_adapter.h"

#include <string.h>

#include "adapter_load.h"
#include "gguf.h"

static const char *const suffixes[2] = {".lora_a", ".lora_b"};

struct adapter_file {
    struct plora__adapter_source source;
    struct plora__gguf gguf;
    struct plora__gguf_heads heads;
};

static plora_status name_layer(const struct plora__adapter_source *source, const struct plora__tensor *tensor,
                               char *layer, int *is_b)
{
    const size_t length = strlen(tensor->name), suffix = strlen(suffixes[0]);
    int32_t rows;
    int which = -1;
    (void)source;
    for (int i = 0; i < 2 && length > suffix; ++i)
        if (strcmp(tensor->name + length - suffix, suffixes[i]) == 0) which = i;
    PLORA_CHECK(which >= 0, PLORA_ERROR_UNSUPPORTED, "tensor '%s' at byte %llu is not <layer>.weight.lora_a or .lora_b",
                tensor->name, (unsigned long long)tensor->offset);
    *is_b = which;
    const plora_status status = plora__gguf_layer(tensor->name, length - suffix, layer, &rows);
    PLORA_CHECK(status == PLORA_OK, status, "tensor '%s' at byte %llu is of no linear layer of the LLaMA family",
                tensor->name, (unsigned long long)tensor->offset);
    return PLORA_OK;
}

static plora_status choose(const struct plora__adapter_source *source, const struct plora__layer *layer, int64_t rank,
                           double *alpha, double *scale)
{
    struct adapter_file *file = (struct adapter_file *)(uintptr_t)source; /* which notes the size of a head */
    char name[PLORA__GGUF_NAME_BYTES];
    int32_t rows;
    int64_t head_rows;
    PLORA_TRY(plora__gguf_name(layer->name, name, &rows));
    PLORA_TRY(plora__gguf_head_rows(&file->heads, layer->name, rows, layer->out_features, &head_rows));
    *alpha = file->gguf.alpha != 0.0f ? (double)file->gguf.alpha : (double)rank;
    *scale = *alpha / (double)rank;
    return PLORA_OK;
}

static int64_t row_of(const struct plora__adapter_source *source, const struct plora__layer *layer, int64_t row)
{
    const struct adapter_file *file = (const struct adapter_file *)source;
    char name[PLORA__GGUF_NAME_BYTES];
    int32_t rows;
    if (plora__gguf_name(layer->name, name, &rows) != PLORA_OK || rows == PLORA__GGUF_ROWS_KEPT) return row;
    return plora__gguf_row(row, file->heads.head_rows);
}

static plora_status load_file(plora_model *model, const struct plora__mapping *mapping, struct adapter_file *file,
                              plora_adapters_options *options, plora_adapters **adapters)
{
    struct plora__gguf *gguf = &file->gguf;
    PLORA_TRY(plora__gguf_parse(model->context, mapping->data, mapping->bytes, gguf));
    PLORA_CHECK(strcmp(gguf->architecture, "llama") == 0, PLORA_ERROR_UNSUPPORTED,
                "general.architecture is '%s': only llama is supported", gguf->architecture);
    PLORA_TRY(plora__gguf_heads_of(model, options->heads, options->kv_heads, &file->heads));
    file->source.tensors = gguf->tensors;
    file->source.tensor_count = gguf->tensor_count;
    const struct plora__tensor *first = &gguf->tensors[0]; /* there is one */
    const size_t length = strlen(first->name);
    options->rank = (int32_t)first->shape[length > 0 && first->name[length - 1] == 'b'];
    options->alpha = gguf->alpha != 0.0f ? (double)gguf->alpha : (double)options->rank;
    options->rslora = 0;
    return plora__adapters_from(model, &file->source, options, adapters);
}

plora_status plora__gguf_load(plora_model *model, const char *path, plora_adapters_options *options,
                              plora_adapters **adapters)
{
    struct plora__mapping mapping;
    struct adapter_file file = {.source = {.name_layer = name_layer, .choose = choose, .row = row_of},
                                .gguf = {.context = model->context}};
    PLORA_TRY(plora__file_map(model->context, path, &mapping));
    plora_status status = load_file(model, &mapping, &file, options, adapters);
    if (status != PLORA_OK) status = plora__fail_in(status, path);
    plora__gguf_free(&file.gguf);
    plora__file_unmap(model->context, &mapping);
    return status;
}
