/* requantise.c: unloads into quantised weights, on the host.
 *
 *     with a master     rows of the master += m s B A   ->   codes of the runs that these rows complete   ->   next rows
 *     without           run: codes -> W -> W + m s B A -> codes
 *
 * One pass over the master, which may be a file larger than memory. The codes that are made are the same whatever backend the layer is
 * computed on; the merge is the CPU's. */
#include <math.h>
#include <string.h>

#include "dtype.h"
#include "handles.h"

enum { PANEL_ELEMENTS = 1 << 20 }; /* of a master, at a time */

static const struct plora__weight *weight_of(const plora_adapters *adapters, int32_t number)
{
    return &adapters->model->weights[adapters->adapters[number].weight];
}

/* -------------------------------------------------------------------------------------------------------------- memory */

static plora_status prepare_weight(plora_adapters *adapters, int32_t number, size_t *workspace)
{
    const plora_context *context = adapters->model->context;
    const struct plora__adapter *adapter = &adapters->adapters[number];
    const struct plora__weight *weight = weight_of(adapters, number);
    const int without = weight->matrix.data == NULL;
    plora__run_memory_need(&weight->quantised->values, without, without, &adapters->runs);
    const struct plora__merge_args args = plora__merge_args(adapters, number);
    const size_t bytes = plora__cpu_backend.merge_workspace(adapters->model->host_device, &args);
    if (bytes > *workspace) *workspace = bytes;
    const size_t factors = (size_t)(adapter->rank * (adapter->in_features + adapter->out_features)) * sizeof(float);
    if (context->options.backend != PLORA_BACKEND_CPU && factors > adapters->host_factor_bytes)
        adapters->host_factor_bytes = factors;
    return PLORA_OK;
}

plora_status plora__requantise_prepare(plora_adapters *adapters)
{
    plora_context *context = adapters->model->context;
    size_t workspace = 0;
    int any = 0;
    void *memory;
    for (int32_t i = 0; i < adapters->adapter_count; ++i)
        if (weight_of(adapters, i)->quantised != NULL) {
            PLORA_TRY(prepare_weight(adapters, i, &workspace));
            any = 1;
        }
    if (!any) return PLORA_OK;
    PLORA_TRY(plora__run_memory_make(context, &adapters->runs));
    PLORA_TRY(plora__allocate(context, adapters->host_factor_bytes, &memory));
    adapters->host_factors = memory;
    PLORA_TRY(
        plora__allocate_zeroed(context, (size_t)adapters->adapter_count * sizeof *adapters->quantise_sums, &memory));
    adapters->quantise_sums = memory;
    adapters->host_workspace = adapters->merge_workspace;
    if (context->options.backend == PLORA_BACKEND_CPU) return PLORA_OK;
    PLORA_TRY(plora__allocate(context, workspace, &memory));
    adapters->host_workspace = memory;
    adapters->host_workspace_bytes = workspace;
    return PLORA_OK;
}

void plora__requantise_free(plora_adapters *adapters)
{
    plora_context *context = adapters->model->context;
    plora__run_memory_free(context, &adapters->runs);
    plora__free(context, adapters->host_factors, adapters->host_factor_bytes);
    plora__free(context, adapters->quantise_sums, (size_t)adapters->adapter_count * sizeof *adapters->quantise_sums);
    if (adapters->host_workspace_bytes > 0)
        plora__free(context, adapters->host_workspace, adapters->host_workspace_bytes);
}

/* ----------------------------------------------------------------------------------------------------------- requantise */

/* A weight whose master is being made, from its first row on. */
struct progress {
    const plora_model *model;
    const struct plora__weight *weight;
    const struct plora__run_memory *memory;
    struct plora__quantise_sums *sums; /* NULL = not wanted */
    int64_t done;                      /* elements whose codes are made */
    void *stream;
};

/* Makes the codes of every run that lies in the first `rows` rows of the master. */
static plora_status follow(struct progress *progress, int64_t rows)
{
    const struct plora__weight *weight = progress->weight;
    const struct plora__quantised *values = &weight->quantised->values;
    for (;;) {
        const struct plora__run run = plora__run_next(values, progress->done);
        struct plora__quantise_sums sums = {0};
        if (run.count == 0 || run.first + run.count > rows * values->columns) return PLORA_OK;
        PLORA_TRY(plora__run_make(progress->model->host_device, weight->quantised, run, &weight->matrix, run.first,
                                  progress->memory, progress->sums != NULL ? &sums : NULL));
        PLORA_TRY(plora__run_write(progress->model->context, values, run, progress->memory, progress->stream));
        progress->done += run.count;
        if (progress->sums == NULL) continue;
        progress->sums->square += sums.square;
        progress->sums->max = fmax(progress->sums->max, sums.max);
    }
}

plora_status plora__requantise(const plora_model *model, const struct plora__weight *weight,
                               const struct plora__run_memory *memory, void *stream)
{
    struct progress progress = {.model = model, .weight = weight, .memory = memory, .stream = stream};
    if (weight->quantised == NULL || weight->matrix.data == NULL) return PLORA_OK;
    return follow(&progress, weight->matrix.rows);
}

plora_status plora__requantise_set(const plora_adapters *adapters)
{
    for (int32_t i = 0; i < adapters->adapter_count; ++i)
        PLORA_TRY(plora__requantise(adapters->model, weight_of(adapters, i), &adapters->runs, NULL));
    return PLORA_OK;
}

/* ---------------------------------------------------------------------------------------------------------------- merge */

plora_status plora__merge_host(const plora_adapters *adapters, struct plora__merge_args *args)
{
    return plora__cpu_backend.merge(adapters->model->host_device, args, NULL);
}

/* The factors of the arguments as the host has them. */
static plora_status fetch_factors(const plora_adapters *adapters, int32_t number, struct plora__merge_args *args,
                                  void *stream)
{
    const plora_context *context = adapters->model->context;
    const struct plora__adapter *adapter = &adapters->adapters[number];
    const int transposed = weight_of(adapters, number)->fan_in_fan_out;
    args->workspace = adapters->host_workspace;
    if (context->options.backend == PLORA_BACKEND_CPU) return PLORA_OK;
    float *a = adapters->host_factors, *b = a + adapter->rank * adapter->in_features;
    const size_t a_bytes = (size_t)(adapter->rank * adapter->in_features) * sizeof(float);
    const size_t b_bytes = (size_t)(adapter->rank * adapter->out_features) * sizeof(float);
    const float *device_a = transposed ? args->left : args->right, *device_b = transposed ? args->right : args->left;
    PLORA_TRY(context->backend->copy(context->device, a, device_a, a_bytes, stream));
    PLORA_TRY(plora__read_device(context, b, device_b, b_bytes, stream));
    args->left = transposed ? a : b;
    args->right = transposed ? b : a;
    return PLORA_OK;
}

static void add_sums(struct plora__merge_sums *total, const struct plora__merge_sums *part)
{
    total->dd += part->dd;
    total->gd += part->gd;
    total->ww += part->ww;
    total->ll += part->ll;
    total->changed += part->changed;
    total->lost_max = fmax(total->lost_max, part->lost_max);
}

/* The same merge of `count` rows from `first` on, into `target`. */
static struct plora__merge_args rows_of(const struct plora__merge_args *args, int64_t first, int64_t count,
                                        void *target, int64_t stride)
{
    struct plora__merge_args part = *args;
    part.weight.data = target;
    part.weight.rows = count;
    part.weight.stride = stride;
    part.left += first * args->left_row_stride;
    part.part = PLORA__MERGE_ROWS;
    return part;
}

static plora_status unload_master(const plora_adapters *adapters, int32_t number, const struct plora__merge_args *args,
                                  struct plora__merge_sums *sums, void *stream)
{
    const struct plora__weight *weight = weight_of(adapters, number);
    const plora_matrix *master = &weight->matrix;
    struct plora__quantise_sums *lost = sums != NULL ? &adapters->quantise_sums[number] : NULL;
    struct progress progress = {adapters->model, weight, &adapters->runs, lost, 0, stream};
    const int64_t panel = master->columns < PANEL_ELEMENTS ? PANEL_ELEMENTS / master->columns : 1;
    if (lost != NULL) *lost = (struct plora__quantise_sums){0};
    for (int64_t first = 0, count; first < master->rows; first += count) {
        count = master->rows - first < panel ? master->rows - first : panel;
        struct plora__merge_sums part_sums;
        struct plora__merge_args part =
            rows_of(args, first, count, (float *)master->data + first * master->stride, master->stride);
        part.sums = sums != NULL ? &part_sums : NULL;
        PLORA_TRY(plora__merge_host(adapters, &part));
        if (sums != NULL) add_sums(sums, &part_sums);
        PLORA_TRY(follow(&progress, first + count));
    }
    return PLORA_OK;
}

/* -------------------------------------------------------------------------------------------------- without a master */

/* values: what the codes held, delta: D, held: what they hold now. */
static void compare_run(const float *values, const float *delta, const float *held, int64_t count,
                        struct plora__merge_sums *sums)
{
    for (int64_t i = 0; i < count; ++i) {
        const double w = (double)values[i], d = (double)delta[i], g = (double)held[i] - w;
        sums->dd += d * d;
        sums->gd += g * d;
        sums->ww += w * w;
        sums->ll += (d - g) * (d - g);
        sums->changed += held[i] != values[i];
        sums->lost_max = fmax(sums->lost_max, fabs(d - g));
    }
}

/* One run; `delta` has the rows that it touches, of which *shift elements come before it. */
static plora_status delta_of_run(const plora_adapters *adapters, const struct plora__merge_args *args,
                                 struct plora__run run, int64_t *shift)
{
    const int64_t columns = args->weight.columns;
    const int64_t begin = run.first / columns, end = (run.first + run.count - 1) / columns + 1;
    float *delta = adapters->runs.delta;
    *shift = run.first - begin * columns;
    memset(delta, 0, (size_t)((end - begin) * columns) * sizeof *delta);
    struct plora__merge_args part = rows_of(args, begin, end - begin, delta, columns);
    part.sums = NULL;
    return plora__merge_host(adapters, &part);
}

static plora_status unload_run(const plora_adapters *adapters, int32_t number, const struct plora__merge_args *args,
                               struct plora__run run, struct plora__merge_sums *sums, int trial, void *stream)
{
    const plora_model *model = adapters->model;
    const struct plora__quantised_weight *weight = weight_of(adapters, number)->quantised;
    const struct plora__run_memory *memory = &adapters->runs;
    const int64_t columns = weight->values.format == PLORA__QUANTISED_INT8 ? weight->values.columns : run.count;
    const plora_matrix merged = {memory->merged, run.count / columns, columns, columns, PLORA_F32, 0};
    int64_t shift;
    PLORA_TRY(plora__run_read(model->context, model->host_device, weight, run, memory, memory->values, stream));
    PLORA_TRY(delta_of_run(adapters, args, run, &shift));
    for (int64_t i = 0; i < run.count; ++i)
        memory->merged[i] = memory->values[i] + memory->delta[shift + i];
    PLORA_TRY(plora__run_make(model->host_device, weight, run, &merged, 0, memory, NULL));
    if (!trial) PLORA_TRY(plora__run_write(model->context, &weight->values, run, memory, stream));
    if (sums == NULL) return PLORA_OK;
    PLORA_TRY(plora__run_dequantise(model->host_device, weight, run, memory, memory->merged));
    compare_run(memory->values, memory->delta + shift, memory->merged, run.count, sums);
    return PLORA_OK;
}

plora_status plora__unload_quantised(const plora_adapters *adapters, int32_t number, struct plora__merge_args *args,
                                     struct plora__merge_sums *sums, int trial, void *stream)
{
    const struct plora__weight *weight = weight_of(adapters, number);
    const struct plora__quantised *values = &weight->quantised->values;
    struct plora__merge_sums total = {.effective_rank = 0};
    PLORA_TRY(fetch_factors(adapters, number, args, stream));
    if (sums != NULL && !trial) {
        struct plora__merge_args ranked = *args;
        ranked.part = PLORA__MERGE_RANK;
        ranked.sums = &total;
        PLORA_TRY(plora__merge_host(adapters, &ranked));
    }
    if (weight->matrix.data != NULL) {
        PLORA_TRY(unload_master(adapters, number, args, sums != NULL ? &total : NULL, stream));
    } else {
        struct plora__run run = plora__run_next(values, 0);
        for (; run.count > 0; run = plora__run_next(values, run.first + run.count))
            PLORA_TRY(unload_run(adapters, number, args, run, sums != NULL ? &total : NULL, trial, stream));
    }
    if (sums != NULL) *sums = total;
    return PLORA_OK;
}

plora_status plora__overflows_of_master(const plora_adapters *adapters, int32_t number, struct plora__merge_args *args,
                                        int64_t *overflows, void *stream)
{
    PLORA_TRY(fetch_factors(adapters, number, args, stream));
    args->overflows = overflows;
    return plora__merge_host(adapters, args);
}
