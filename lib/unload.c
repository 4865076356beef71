/* unload.c: the end of a stage: every adapter moves into its weight, and what remains of it starts again (arXiv 2402.16141).
 *
 *     check everything -> ledger -> merge weight by weight -> scale or draw A, B -> optimizer -> gradients 0 -> next stage
 *
 * Whether a merge would overflow is nearly always settled without reading W: no finite W can overflow while |D| stays below half
 * a unit in the last place of the largest finite number, and |D| <= R |m s| max|A| max|B|. Only past that bound the backend goes
 * through the merge once without writing: also where it rounds by rounding.h, which makes no weight infinite any sooner. The
 * products and the report's sums are the backend's merge; residual.c chooses the rounding. Quantised weights are requantise.c's. */
#include <math.h>
#include <string.h>

#include "dtype.h"
#include "ledger.h"

static const char *name_of(const plora_adapters *adapters, const struct plora__adapter *adapter)
{
    return adapters->model->layers[adapter->layer].name;
}

struct plora__merge_args plora__merge_weight(const plora_model *model, int32_t number, const float *a, const float *b,
                                             int64_t rank, double factor)
{
    const struct plora__weight *weight = &model->weights[number];
    int64_t in_features = weight->fan_in_fan_out ? weight->matrix.rows : weight->matrix.columns;
    if (weight->gathered) { /* the factors are the whole weight's: its rows of B, its columns of A */
        in_features = weight->shard.columns;
        if (a != NULL) a += weight->shard.first_column;
        if (b != NULL) b += weight->shard.first_row * rank;
    }
    struct plora__merge_args args = {
        .weight = weight->matrix,
        .rank = rank,
        .factor = (float)factor,
        .rounding = PLORA_ROUND_NEAREST,
        .left = b,
        .left_row_stride = rank,
        .left_rank_stride = 1,
        .right = a,
        .right_rank_stride = in_features,
        .right_column_stride = 1,
    };
    if (weight->fan_in_fan_out) { /* W^T += m s A^T B^T */
        args.left = a;
        args.left_row_stride = 1;
        args.left_rank_stride = in_features;
        args.right = b;
        args.right_rank_stride = 1;
        args.right_column_stride = rank;
    }
    return args;
}

struct plora__merge_args plora__merge_factors(const plora_adapters *adapters, int32_t number, const float *a,
                                              const float *b, int64_t rank, double factor)
{
    struct plora__merge_args args =
        plora__merge_weight(adapters->model, adapters->adapters[number].weight, a, b, rank, factor);
    args.workspace = adapters->merge_workspace;
    return args;
}

struct plora__merge_args plora__merge_args(const plora_adapters *adapters, int32_t number)
{
    const struct plora__adapter *adapter = &adapters->adapters[number];
    return plora__merge_factors(adapters, number, adapters->parameters + adapter->a_offset,
                                adapters->parameters + adapter->b_offset, adapter->rank, adapter->scale);
}

/* No finite weight of the dtype becomes infinite by adding less than this: a quarter of the last place of the largest one. */
static double harmless(int32_t dtype)
{
    return dtype == PLORA_F32 ? 0x1p102 : dtype == PLORA_BF16 ? 0x1p118 : 8.0;
}

/* Brings what the backend found out so far to adapters->findings. */
static plora_status fetch(const plora_adapters *adapters, void *stream)
{
    const struct plora__findings *here = &adapters->findings, *there = &adapters->device_findings;
    const size_t bytes = (size_t)((char *)(here->overflows + adapters->adapter_count) - (char *)here->magnitudes);
    return plora__read_device(adapters->model->context, here->magnitudes, there->magnitudes, bytes, stream);
}

static struct plora__merge_args merge_args(const plora_adapters *adapters, int32_t number,
                                           const plora_unload_options *options)
{
    struct plora__merge_args args = plora__merge_args(adapters, number);
    args.factor = (float)(options->momentum * adapters->adapters[number].scale);
    plora__merge_round(adapters, number, options->rounding, adapters->options.seed, adapters->stage, &args);
    return args;
}

/* Whether no weight can overflow, of whatever value: |D| <= R |m s| max|A| max|B|. */
static int is_harmless(const plora_adapters *adapters, int32_t number, const plora_unload_options *options)
{
    const struct plora__merge_args args = merge_args(adapters, number, options);
    const double a = adapters->findings.magnitudes[2 * number], b = adapters->findings.magnitudes[2 * number + 1];
    const double rounding = 1.0 + (double)args.rank * 0x1p-22; /* of the fp32 sums */
    const double largest_sum = (double)args.rank * a * b * rounding;
    return largest_sum < 0x1p126 && largest_sum * fabs((double)args.factor) < harmless(args.weight.dtype);
}

static double root_mean(double sum, double elements)
{
    return elements > 0.0 ? sqrt(sum / elements) : 0.0;
}

static plora_status check_finite(const plora_adapters *adapters)
{
    for (int32_t i = 0; i < 2 * adapters->adapter_count; ++i)
        PLORA_CHECK(isfinite(adapters->findings.magnitudes[i]), PLORA_ERROR_NON_FINITE,
                    "layer '%s': %s holds an infinite value or NaN: nothing was done",
                    name_of(adapters, &adapters->adapters[i / 2]), i % 2 ? "B" : "A");
    return PLORA_OK;
}

static const struct plora__weight *weight_of(const plora_adapters *adapters, int32_t number)
{
    return &adapters->model->weights[adapters->adapters[number].weight];
}

/* A quantised weight without a master is refused, unless that is what the caller wants, and told what it would have held. */
static plora_status check_masters(const plora_adapters *adapters, const plora_unload_options *options, void *stream)
{
    for (int32_t i = 0; i < adapters->adapter_count; ++i) {
        const struct plora__weight *weight = weight_of(adapters, i);
        if (weight->quantised == NULL || weight->matrix.data != NULL) continue;
        const char *name = name_of(adapters, &adapters->adapters[i]);
        PLORA_CHECK(is_harmless(adapters, i, options), PLORA_ERROR_NON_FINITE,
                    "layer '%s': the update could overflow (max|A| %g, max|B| %g), nothing was merged", name,
                    adapters->findings.magnitudes[2 * i], adapters->findings.magnitudes[2 * i + 1]);
        if (options->without_master) continue;
        struct plora__merge_args args = merge_args(adapters, i, options);
        struct plora__merge_sums sums;
        PLORA_TRY(plora__unload_quantised(adapters, i, &args, &sums, 1, stream));
        return plora__fail(PLORA_ERROR_UNSUPPORTED,
                           "layer '%s' is %s without a master: quantised again it would hold %.4f of the update (rms "
                           "%.3g, of the weights "
                           "%.3g), nothing was merged; add the layer with a master, or set without_master",
                           name, weight->quantised->values.format == PLORA__QUANTISED_INT8 ? "INT8" : "NF4",
                           sums.dd > 0.0 ? sums.gd / sums.dd : 1.0,
                           root_mean(sums.dd, (double)weight->matrix.rows * (double)weight->matrix.columns),
                           root_mean(sums.ww, (double)weight->matrix.rows * (double)weight->matrix.columns));
    }
    return PLORA_OK;
}

static plora_status try_merge(const plora_adapters *adapters, int32_t number, const plora_unload_options *options,
                              void *stream)
{
    const plora_context *context = adapters->model->context;
    struct plora__merge_args args = merge_args(adapters, number, options);
    int64_t *there = adapters->device_findings.overflows + number, overflows;
    if (weight_of(adapters, number)->quantised == NULL) {
        args.overflows = there;
        return plora__merge(adapters, number, &args, stream);
    }
    PLORA_TRY(plora__overflows_of_master(adapters, number, &args, &overflows, stream));
    PLORA_TRY(context->backend->copy(context->device, there, &overflows, sizeof overflows, stream));
    return context->backend->synchronize(context->device, stream);
}

/* Goes through the merges of doubt without writing. */
static plora_status check_overflow(const plora_adapters *adapters, const plora_unload_options *options, void *stream)
{
    int doubts = 0;
    for (int32_t i = 0; i < adapters->adapter_count; ++i) {
        if (is_harmless(adapters, i, options)) continue;
        PLORA_TRY(try_merge(adapters, i, options, stream));
        doubts++;
    }
    if (doubts == 0) return PLORA_OK;
    PLORA_TRY(fetch(adapters, stream));
    for (int32_t i = 0; i < adapters->adapter_count; ++i) {
        const int64_t overflows = adapters->findings.overflows[i];
        if (is_harmless(adapters, i, options) || overflows == 0) continue;
        const struct plora__merge_args args = merge_args(adapters, i, options);
        return plora__fail(
            PLORA_ERROR_NON_FINITE,
            "layer '%s': %lld of %lld weights would overflow %s (max|A| %g, max|B| %g, m s %g), nothing was merged",
            name_of(adapters, &adapters->adapters[i]), (long long)overflows,
            (long long)args.weight.rows * (long long)args.weight.columns, plora__dtype_name(args.weight.dtype),
            adapters->findings.magnitudes[2 * i], adapters->findings.magnitudes[2 * i + 1], (double)args.factor);
    }
    return PLORA_OK;
}

plora_status plora__adapters_check_finite(const plora_adapters *adapters, void *stream)
{
    const plora_context *context = adapters->model->context;
    const struct plora__magnitude_args args = {
        .values = adapters->parameters,
        .segments = adapters->segments,
        .magnitudes = adapters->device_findings.magnitudes,
        .segment_count = adapters->segment_count,
    };
    PLORA_TRY(context->backend->magnitudes(context->device, &args, stream));
    PLORA_TRY(fetch(adapters, stream));
    return check_finite(adapters);
}

/* Everything that can be wrong with the values, before the first of them is written. */
static plora_status check_values(const plora_adapters *adapters, const plora_unload_options *options, void *stream)
{
    PLORA_TRY(plora__adapters_check_finite(adapters, stream));
    PLORA_TRY(check_masters(adapters, options, stream));
    return check_overflow(adapters, options, stream);
}

/* The figures of one weight, and into the running totals. */
static struct plora_unload_layer layer_figures(const struct plora__adapter *adapter, double factor,
                                               const struct plora__merge_sums *sums, double elements)
{
    return (struct plora_unload_layer){
        .layer = adapter->layer,
        .rank = (int32_t)adapter->rank,
        .scale = factor,
        .update_rms = root_mean(sums->dd, elements),
        .weight_rms = root_mean(sums->ww, elements),
        .captured = sums->dd > 0.0 ? sums->gd / sums->dd : 1.0,
        .changed = elements > 0.0 ? sums->changed / elements : 0.0,
        .lost_max = sums->lost_max,
        .lost_rms = root_mean(sums->ll, elements),
        .effective_rank = sums->effective_rank,
    };
}

static plora_status merge_quantised(const plora_adapters *adapters, int32_t number, const plora_unload_options *options,
                                    int with_sums, void *stream)
{
    const plora_context *context = adapters->model->context;
    struct plora__merge_args args = merge_args(adapters, number, options);
    struct plora__merge_sums sums;
    PLORA_TRY(plora__unload_quantised(adapters, number, &args, with_sums ? &sums : NULL, 0, stream));
    if (!with_sums) return PLORA_OK;
    PLORA_TRY(
        context->backend->copy(context->device, adapters->device_findings.sums + number, &sums, sizeof sums, stream));
    return context->backend->synchronize(context->device, stream);
}

static plora_status merge_all(const plora_adapters *adapters, const plora_unload_options *options, int with_sums,
                              void *stream)
{
    for (int32_t i = 0; i < adapters->adapter_count; ++i) {
        if (weight_of(adapters, i)->quantised != NULL) {
            PLORA_TRY(merge_quantised(adapters, i, options, with_sums, stream));
            continue;
        }
        struct plora__merge_args args = merge_args(adapters, i, options);
        if (with_sums) args.sums = adapters->device_findings.sums + i;
        PLORA_TRY(plora__merge(adapters, i, &args, stream));
    }
    return with_sums ? fetch(adapters, stream) : PLORA_OK;
}

static void fill_report(const plora_adapters *adapters, double momentum, plora_unload_report *report)
{
    struct plora__merge_sums total = {.effective_rank = 0};
    struct plora__quantise_sums quantised = {0};
    double all_elements = 0.0, quantised_elements = 0.0;
    for (int32_t i = 0; i < adapters->adapter_count; ++i) {
        const struct plora__adapter *adapter = &adapters->adapters[i];
        const struct plora__merge_sums *sums = &adapters->findings.sums[i];
        const plora_matrix *matrix = &weight_of(adapters, i)->matrix;
        const double elements = (double)matrix->rows * (double)matrix->columns;
        plora_unload_layer layer = layer_figures(adapter, momentum * adapter->scale, sums, elements);
        if (weight_of(adapters, i)->quantised != NULL && weight_of(adapters, i)->matrix.data != NULL) {
            const struct plora__quantise_sums *part = &adapters->quantise_sums[i];
            layer.quantised_rms = root_mean(part->square, elements);
            layer.quantised_max = part->max;
            quantised.square += part->square;
            quantised.max = fmax(quantised.max, part->max);
            quantised_elements += elements;
        }
        if (report->layers != NULL && i < report->layer_capacity) report->layers[i] = layer;
        all_elements += elements;
        total.dd += sums->dd;
        total.gd += sums->gd;
        total.ww += sums->ww;
        total.ll += sums->ll;
        total.changed += sums->changed;
        total.lost_max = fmax(total.lost_max, sums->lost_max);
        total.effective_rank += sums->effective_rank;
    }
    report->stage = adapters->stage;
    report->weights = adapters->adapter_count;
    report->update_rms = root_mean(total.dd, all_elements);
    report->weight_rms = root_mean(total.ww, all_elements);
    report->captured = total.dd > 0.0 ? total.gd / total.dd : 1.0;
    report->changed = all_elements > 0.0 ? total.changed / all_elements : 0.0;
    report->lost_max = total.lost_max;
    report->lost_rms = root_mean(total.ll, all_elements);
    report->quantised_rms = root_mean(quantised.square, quantised_elements);
    report->quantised_max = quantised.max;
    report->effective_rank = adapters->adapter_count > 0 ? total.effective_rank / adapters->adapter_count : 0.0;
}

static plora_status check_options(const plora_adapters *adapters, const plora_optimizer *optimizer,
                                  plora_unload_options *options)
{
    PLORA_CHECK(adapters != NULL, PLORA_ERROR_INVALID_ARGUMENT, "adapters is NULL");
    PLORA_CHECK(optimizer == NULL || optimizer->adapters == adapters, PLORA_ERROR_INVALID_ARGUMENT,
                "the optimizer belongs to other adapters");
    PLORA_CHECK(options->momentum > 0.0 && options->momentum <= 1.0, PLORA_ERROR_INVALID_ARGUMENT,
                "momentum is %g: must be in (0, 1]", options->momentum);
    PLORA_CHECK((options->without_master == 0 || options->without_master == 1) && options->reserved == 0,
                PLORA_ERROR_INVALID_ARGUMENT, "without_master is %d, reserved is %d: must be 0 or 1, and 0",
                options->without_master, options->reserved);
    PLORA_TRY(plora__resolve_rounding(adapters, &options->rounding));
    PLORA_CHECK(options->moments >= PLORA_MOMENTS_DEFAULT && options->moments <= PLORA_MOMENTS_KEEP,
                PLORA_ERROR_INVALID_ARGUMENT, "moments %d is unknown", options->moments);
    PLORA_CHECK(options->moments != PLORA_MOMENTS_KEEP || options->momentum < 1.0, PLORA_ERROR_INVALID_ARGUMENT,
                "moments cannot be kept when momentum is 1: nothing of the adapter remains");
    if (options->moments == PLORA_MOMENTS_DEFAULT)
        options->moments = options->momentum < 1.0 ? PLORA_MOMENTS_KEEP : PLORA_MOMENTS_RESET;
    return PLORA_OK;
}

/* What remains of the adapters in the next stage. */
static plora_status restart(plora_adapters *adapters, double momentum, void *stream)
{
    const plora_context *context = adapters->model->context;
    const size_t bytes = (size_t)adapters->parameter_count * sizeof(float);
    PLORA_TRY(context->backend->clear(context->device, adapters->gradients, bytes, stream));
    adapters->stage++;
    if (momentum == 1.0) return plora__adapters_init(adapters, stream);
    return context->backend->scale(context->device, adapters->parameters, adapters->parameter_count,
                                   (float)sqrt(1.0 - momentum), stream);
}

plora_status plora_unload(plora_adapters *adapters, plora_optimizer *optimizer, const plora_unload_options *given,
                          plora_unload_report *report, void *stream)
{
    plora_unload_options options = PLORA_UNLOAD_OPTIONS_INIT;
    plora_unload_report result = PLORA_UNLOAD_REPORT_INIT;
    PLORA_TRY(plora__read_options(&options, sizeof options, given, "plora_unload_options"));
    PLORA_TRY(plora__read_options(&result, sizeof result, report, "plora_unload_report"));
    PLORA_TRY(check_options(adapters, optimizer, &options));
    PLORA_TRY(plora__check_stream(adapters->model->context, stream, 1));
    PLORA_CHECK(result.layer_capacity >= 0 && (result.layers != NULL || result.layer_capacity == 0),
                PLORA_ERROR_INVALID_ARGUMENT, "layer_capacity is %lld, layers is %s", (long long)result.layer_capacity,
                result.layers == NULL ? "NULL" : "not NULL");
    PLORA_TRY(plora__weights_check(adapters->model));
    double norm;
    if (optimizer != NULL) PLORA_TRY(plora__optimizer_settle(optimizer, 0, &norm, stream));
    PLORA_TRY(check_values(adapters, &options, stream));

    if (adapters->ledger != NULL) PLORA_TRY(plora__ledger_append(adapters->ledger, &options, stream));
    PLORA_TRY(merge_all(adapters, &options, report != NULL, stream));
    if (adapters->ledger != NULL) plora__ledger_commit(adapters->ledger, stream);
    if (report != NULL) fill_report(adapters, options.momentum, &result);
    PLORA_TRY(restart(adapters, options.momentum, stream));
    if (optimizer != NULL) PLORA_TRY(plora__optimizer_unload(optimizer, options.moments, options.momentum, stream));
    return report == NULL ? PLORA_OK : plora__write_result(report, &result, sizeof result, "plora_unload_report");
}
