/* train.c: one fine-tuning run.
 *
 *     step: micro-batches forward, loss, backward -> optimizer step -> unload when a period ends -> evaluation -> checkpoint
 *
 * What a step does is a function of the options, the seed and the step's number, so a run that goes on from a checkpoint has
 * the same bits as one that was never interrupted. The number of steps done is not stored beside the checkpoint, where the two
 * could disagree: it follows from the adapters' stage and the optimizer's step counter. */
#include "train.h"

#include <cjson/cJSON.h>
#include <errno.h>
#include <math.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "data.h"
#include "journal.h"
#include "llama.h"
#include "util.h"

struct run {
    const struct options *options;
    const volatile sig_atomic_t *stop; /* set by a signal */
    plora_context *context;
    struct llama *llama;
    plora_adapters *adapters;
    plora_optimizer *optimizer;
    plora_ledger *ledger; /* NULL without --ledger */
    struct dataset train, heldout;
    struct order order;
    struct batch batch;
    struct journal journal;
    char *checkpoint, *run_file, *result_file, *samples_file;
    int64_t step; /* optimizer steps done */
    int64_t trained_tokens;
    double begin, training_seconds;
};

enum { SAMPLE_GROUP = 16 }; /* prompts that are continued together */

/* ---------------------------------------------------------------------------------------------------------------- setup */

static int create_adapters(struct run *run, int64_t tokens)
{
    const struct options *o = run->options;
    plora_adapters_options options = PLORA_ADAPTERS_OPTIONS_INIT;
    options.rank = (int32_t)o->rank;
    options.alpha = o->alpha;
    options.dropout = o->dropout;
    options.seed = (uint64_t)o->seed;
    options.targets = o->targets;
    options.rslora = (int32_t)o->rslora;
    if (o->method != METHOD_PLORA) options.residual = PLORA_RESIDUAL_NONE; /* nothing is unloaded */
    options.workspace_tokens = tokens < 1 ? 1 : tokens > 2048 ? 2048 : tokens;
    plora_model *model = llama_model(run->llama);
    LIBRARY(plora_adapters_create(model, &options, &run->adapters));
    for (int32_t i = 0; i < plora_model_layer_count(model); i++) {
        plora_linear linear = PLORA_LINEAR_INIT;
        plora_adapter adapter = PLORA_ADAPTER_INIT;
        LIBRARY(plora_model_layer(model, i, &linear));
        if (linear.flags & PLORA_LAYER_HEAD && plora_adapters_layer(run->adapters, i, &adapter) == PLORA_OK)
            return fault("--targets '%s' matches %s: adapters on embeddings and heads are not supported", o->targets,
                         linear.name);
    }
    return 0;
}

/* Whether unloads restart the optimizer and the schedule. */
static int restarts(const struct options *o)
{
    return o->method == METHOD_PLORA && o->momentum == 1;
}

static int create_optimizer(struct run *run)
{
    const struct options *o = run->options;
    plora_optimizer_options options = PLORA_OPTIMIZER_OPTIONS_INIT;
    options.schedule = (int32_t)o->schedule;
    options.learning_rate = o->lr;
    options.weight_decay = o->weight_decay;
    options.b_ratio = o->lora_plus;
    options.max_gradient_norm = o->clip;
    options.final_ratio = o->final_ratio;
    options.warmup_steps = o->warmup;
    options.rewarmup_steps = o->rewarmup;
    options.period_steps = restarts(o) && o->schedule != PLORA_SCHEDULE_RELORA ? o->period : o->steps;
    if (o->schedule == PLORA_SCHEDULE_CONSTANT) options.period_steps = 0; /* so that --resume may add steps */
    if (o->schedule != PLORA_SCHEDULE_CONSTANT && options.warmup_steps >= options.period_steps)
        return fault("--warmup %lld must be less than the schedule's %lld steps", (long long)o->warmup,
                     (long long)options.period_steps);
    LIBRARY(plora_optimizer_create(run->adapters, &options, &run->optimizer));
    return 0;
}

static int open_data(struct run *run)
{
    const struct options *o = run->options;
    const struct llama_config *config = llama_configuration(run->llama);
    TRY(dataset_read(o->train, config->vocabulary, config->max_positions, &run->train));
    if (o->heldout) TRY(dataset_read(o->heldout, config->vocabulary, config->max_positions, &run->heldout));
    if (o->heldout_examples > 0 && o->heldout_examples < run->heldout.count) {
        for (int64_t i = o->heldout_examples; i < run->heldout.count; i++)
            free(run->heldout.examples[i].ids);
        run->heldout.count = o->heldout_examples;
    }
    return order_create(run->train.count, random_at((uint64_t)o->seed, 0), &run->order);
}

static int open_paths(struct run *run)
{
    const char *directory = run->options->output;
    TRY(directory_make(directory));
    run->checkpoint = path_join(directory, "checkpoint.safetensors");
    run->run_file = path_join(directory, "run.json");
    run->result_file = path_join(directory, "result.json");
    run->samples_file = path_join(directory, "samples.jsonl");
    return run->checkpoint && run->run_file && run->result_file && run->samples_file
               ? 0
               : fault("out of memory: paths in %s", directory);
}

static int open_all(struct run *run)
{
    const struct options *o = run->options;
    plora_context_options context = PLORA_CONTEXT_OPTIONS_INIT;
    context.threads = (int32_t)o->threads;
    context.deterministic = (int32_t)o->deterministic;
    if (o->threads > 0) omp_set_num_threads((int)o->threads);
    TRY(open_paths(run));
    LIBRARY(plora_context_create(&context, &run->context));
    const int32_t dtype = o->dtype == 0 ? PLORA_F32 : PLORA_BF16;
    TRY(llama_open(run->context, o->model, dtype, omp_get_max_threads(), &run->llama));
    TRY(open_data(run));
    const int64_t longest = run->train.longest > run->heldout.longest ? run->train.longest : run->heldout.longest;
    const int64_t tokens = o->batch / o->accumulate * longest;
    TRY(create_adapters(run, tokens));
    TRY(create_optimizer(run));
    return llama_prepare(run->llama, run->adapters, tokens, 1);
}

static void close_all(struct run *run)
{
    journal_close(&run->journal);
    batch_free(&run->batch);
    order_free(&run->order);
    dataset_free(&run->train);
    dataset_free(&run->heldout);
    plora_ledger_destroy(run->ledger);
    plora_optimizer_destroy(run->optimizer);
    plora_adapters_destroy(run->adapters);
    llama_close(run->llama);
    plora_context_destroy(run->context);
    free(run->checkpoint);
    free(run->run_file);
    free(run->result_file);
    free(run->samples_file);
}

/* --------------------------------------------------------------------------------------------------- begin and go on */

/* The weights are still what the model's files say: the ledger's W_0. */
static int open_ledger(struct run *run)
{
    plora_ledger_options options = PLORA_LEDGER_OPTIONS_INIT;
    if (!run->options->ledger) return 0;
    options.path = run->options->ledger;
    LIBRARY(plora_ledger_open(run->adapters, &options, &run->ledger));
    return 0;
}

static int begin_fresh(struct run *run, const char *options)
{
    /* what an older run left here must not be taken for this one's */
    if (unlink(run->checkpoint) != 0 && errno != ENOENT)
        return fault("cannot remove %s: %s", run->checkpoint, strerror(errno));
    if (unlink(run->result_file) != 0 && errno != ENOENT)
        return fault("cannot remove %s: %s", run->result_file, strerror(errno));
    if (unlink(run->samples_file) != 0 && errno != ENOENT)
        return fault("cannot remove %s: %s", run->samples_file, strerror(errno));
    if (run->options->ledger && unlink(run->options->ledger) != 0 && errno != ENOENT)
        return fault("cannot remove %s: %s", run->options->ledger, strerror(errno));
    TRY(open_ledger(run));
    TRY(file_write(run->run_file, options, strlen(options)));
    return journal_open(run->options->output, run->options->steps, -1, &run->journal);
}

static int go_on(struct run *run, const char *options)
{
    const struct options *o = run->options;
    char *then;
    TRY(file_read(run->run_file, &then, NULL));
    const int same = options_same_run(then, options);
    free(then);
    TRY(same);
    TRY(open_ledger(run));
    LIBRARY(plora_checkpoint_load(run->adapters, run->optimizer, run->checkpoint));
    int64_t since;
    LIBRARY(plora_optimizer_state(run->optimizer, NULL, NULL, NULL, &since));
    run->step = since + (restarts(o) ? plora_adapters_stage(run->adapters) * o->period : 0);
    if (run->step > o->steps)
        return fault("--resume: the checkpoint is at step %lld, beyond --steps %lld", (long long)run->step,
                     (long long)o->steps);
    return journal_open(o->output, o->steps, run->step, &run->journal);
}

static int begin(struct run *run)
{
    char *options =
        options_to_json(run->options, hash_bytes(run->train.hash, &run->heldout.hash, sizeof run->heldout.hash));
    if (!options) return fault("out of memory: options");
    const int result = run->options->resume ? go_on(run, options) : begin_fresh(run, options);
    free(options);
    return result;
}

/* ---------------------------------------------------------------------------------------------------------- held-out set */

/* Before the first step a signal ends the run at once: there is nothing to keep. Later it waits for the step's checkpoint. */
static int stopped_early(const struct run *run)
{
    if (run->step > 0 || !*run->stop) return 0;
    fprintf(stderr, "stopped before the first step: nothing was written that a resumed run would need\n");
    return TRAIN_STOPPED;
}

static int evaluate(struct run *run, int64_t step)
{
    if (run->heldout.count == 0) return 0;
    const int64_t size = run->options->batch / run->options->accumulate;
    double total = 0;
    int64_t losses = 0, *indices;
    TRY(memory_allocate((size_t)size, sizeof *indices, "held-out batch", &indices));
    int result = 0;
    for (int64_t first = 0; first < run->heldout.count && result == 0; first += size) {
        const int64_t count = run->heldout.count - first < size ? run->heldout.count - first : size;
        double loss = 0;
        for (int64_t i = 0; i < count; i++)
            indices[i] = first + i;
        result = batch_fill(&run->batch, &run->heldout, indices, count);
        if (result == 0) result = llama_forward(run->llama, &run->batch, 0);
        if (result == 0) result = llama_loss(run->llama, &run->batch, 0, 0, &loss);
        if (result == 0) result = stopped_early(run);
        total += loss;
        losses += run->batch.losses;
    }
    free(indices);
    if (result != 0) return result;
    journal_end_line(&run->journal);
    fprintf(stderr, "held-out loss %.4f after %lld steps\n", total / (double)losses, (long long)step);
    return journal_heldout(&run->journal, step, total / (double)losses);
}

static void add_ids(cJSON *root, const char *name, const int32_t *ids, int64_t count)
{
    cJSON_AddItemToObject(root, name, cJSON_CreateIntArray(ids, (int)count));
}

/* Writes the lines of one group of answers to `stream`. */
static int sample_group(struct run *run, FILE *stream, const char *when, int64_t first, int64_t count, int64_t eos,
                        int32_t *generated)
{
    const int32_t *prompts[SAMPLE_GROUP] = {NULL};
    int64_t prompt_lengths[SAMPLE_GROUP] = {0}, lengths[SAMPLE_GROUP];
    const int64_t most = run->options->max_new_tokens;
    for (int64_t i = 0; i < count; i++) {
        prompts[i] = run->heldout.examples[first + i].ids;
        prompt_lengths[i] = run->heldout.examples[first + i].prompt;
    }
    TRY(llama_generate(run->llama, count, prompts, prompt_lengths, most, eos, generated, lengths));
    for (int64_t i = 0; i < count; i++) {
        const struct example *example = &run->heldout.examples[first + i];
        cJSON *root = cJSON_CreateObject();
        cJSON_AddStringToObject(root, "when", when);
        add_ids(root, "prompt", example->ids, example->prompt);
        add_ids(root, "reference", example->ids + example->prompt, example->length - example->prompt);
        add_ids(root, "generated", generated + i * most, lengths[i]);
        char *text = cJSON_PrintUnformatted(root);
        cJSON_Delete(root);
        if (!text) return fault("out of memory: a sample");
        fprintf(stream, "%s\n", text);
        free(text);
    }
    return 0;
}

/* The lines of samples.jsonl from before the training, into `stream`. */
static int copy_before(struct run *run, FILE *stream)
{
    if (access(run->samples_file, R_OK) != 0) return 0;
    char *text;
    TRY(file_read(run->samples_file, &text, NULL));
    for (char *line = text, *end; (end = strchr(line, '\n')); line = end + 1) {
        *end = '\0';
        if (strstr(line, "\"when\":\"before\"")) fprintf(stream, "%s\n", line);
    }
    free(text);
    return 0;
}

static int sample_all(struct run *run, FILE *stream, const char *when, int32_t *generated)
{
    const struct options *o = run->options;
    const int64_t count = o->sample < run->heldout.count ? o->sample : run->heldout.count;
    const int64_t eos = o->eos >= 0 ? o->eos : llama_configuration(run->llama)->eos;
    TRY(copy_before(run, stream));
    for (int64_t first = 0; first < count; first += SAMPLE_GROUP) {
        TRY(sample_group(run, stream, when, first, count - first < SAMPLE_GROUP ? count - first : SAMPLE_GROUP, eos,
                         generated));
        if (stopped_early(run)) return TRAIN_STOPPED;
    }
    return 0;
}

static int sample(struct run *run, const char *when)
{
    if (run->options->sample == 0 || run->heldout.count == 0) return 0;
    int32_t *generated;
    char *text = NULL;
    size_t size = 0;
    TRY(memory_allocate((size_t)(SAMPLE_GROUP * run->options->max_new_tokens), sizeof *generated, "samples",
                        &generated));
    FILE *stream = open_memstream(&text, &size);
    int result = stream ? sample_all(run, stream, when, generated) : fault("out of memory: samples");
    if (stream && fclose(stream) != 0 && result == 0) result = fault("out of memory: samples");
    if (result == 0) result = file_write(run->samples_file, text, size);
    free(text);
    free(generated);
    return result;
}

/* ------------------------------------------------------------------------------------------------------------- training */

/* The step's examples, micro-batch by micro-batch: mean loss over their completion tokens, and its gradient. */
static int gradients(struct run *run, const int64_t *indices, struct journal_step *step)
{
    const struct options *o = run->options;
    const int64_t size = o->batch / o->accumulate;
    int64_t losses = 0;
    for (int64_t i = 0; i < o->batch; i++) {
        const struct example *example = &run->train.examples[indices[i]];
        losses += example->length - (example->prompt > 0 ? example->prompt : 1);
        step->tokens += example->length - 1;
    }
    const double factor = 1.0 / (double)losses;
    const int flags = LLAMA_TRAIN | (o->dropout > 0 ? LLAMA_DROPOUT : 0);
    LIBRARY(plora_optimizer_zero_gradients(run->optimizer, NULL));
    for (int64_t i = 0; i < o->accumulate; i++) {
        double loss;
        LIBRARY(plora_adapters_set_dropout_position(run->adapters, (uint64_t)(run->step * o->accumulate + i), 0));
        TRY(batch_fill(&run->batch, &run->train, indices + i * size, size));
        TRY(llama_forward(run->llama, &run->batch, flags));
        TRY(llama_loss(run->llama, &run->batch, 1, factor, &loss));
        TRY(llama_backward(run->llama, &run->batch, flags));
        step->loss += loss * factor;
    }
    return 0;
}

static int train_step(struct run *run, int64_t *indices)
{
    const struct options *o = run->options;
    const double begin = now();
    struct journal_step step = {.step = run->step + 1, .stage = plora_adapters_stage(run->adapters)};
    plora_step_report report = PLORA_STEP_REPORT_INIT;
    for (int64_t i = 0; i < o->batch; i++)
        indices[i] = order_at(&run->order, run->step * o->batch + i);
    TRY(gradients(run, indices, &step));
    if (plora_optimizer_step(run->optimizer, 1.0, &report, NULL) != PLORA_OK)
        return fault("step %lld, loss %g: %s", (long long)step.step, step.loss, plora_last_error());
    run->step++;
    step.lr = report.learning_rate;
    step.gradient_norm = report.gradient_norm;
    step.seconds = now() - begin;
    run->training_seconds += step.seconds;
    run->trained_tokens += step.tokens;
    TRY(journal_step(&run->journal, &step));
    journal_progress(&run->journal, &step, (double)run->trained_tokens / run->training_seconds);
    return 0;
}

static int unload(struct run *run, double momentum, int final)
{
    plora_unload_options options = PLORA_UNLOAD_OPTIONS_INIT;
    plora_unload_report report = PLORA_UNLOAD_REPORT_INIT;
    options.momentum = momentum;
    LIBRARY(plora_unload(run->adapters, run->optimizer, &options, &report, NULL));
    return journal_unload(&run->journal, run->step, &report, final);
}

static int save_checkpoint(struct run *run)
{
    const int changed = plora_adapters_stage(run->adapters) > 0 && !run->ledger; /* else they can be rebuilt */
    const uint32_t flags = changed ? PLORA_CHECKPOINT_WEIGHTS : 0;
    LIBRARY(plora_checkpoint_save(run->adapters, run->optimizer, run->checkpoint, flags));
    return 0;
}

static int train_loop(struct run *run, int64_t *indices)
{
    const struct options *o = run->options;
    const int64_t begin = run->step;
    while (run->step < o->steps) {
        TRY(train_step(run, indices));
        const int last = run->step == o->steps;
        const int stop = *run->stop || (o->stop_after > 0 && run->step - begin == o->stop_after);
        if (o->method == METHOD_PLORA && run->step % o->period == 0) TRY(unload(run, o->momentum, 0));
        if (last || (o->eval_every > 0 && run->step % o->eval_every == 0)) TRY(evaluate(run, run->step));
        if (last || stop || (o->checkpoint_every > 0 && run->step % o->checkpoint_every == 0))
            TRY(save_checkpoint(run));
        if (stop && !last) {
            journal_end_line(&run->journal);
            fprintf(
                stderr,
                "stopped after step %lld; the checkpoint is %s\nthe same command with --resume goes on from there\n",
                (long long)run->step, run->checkpoint);
            return TRAIN_STOPPED;
        }
    }
    return 0;
}

/* ------------------------------------------------------------------------------------------------------------------ end */

static int copy_companions(struct run *run, const char *directory)
{
    static const char *const NAMES[] = {
        "config.json",           "generation_config.json",  "tokenizer.json", "tokenizer.model",
        "tokenizer_config.json", "special_tokens_map.json", "vocab.json",     "merges.txt",
        "added_tokens.json",     "chat_template.jinja"};
    for (size_t i = 0; i < sizeof NAMES / sizeof *NAMES; i++) {
        char *from = path_join(run->options->model, NAMES[i]), *to = path_join(directory, NAMES[i]);
        int result = 0;
        if (!from || !to)
            result = fault("out of memory: path in %s", directory);
        else if (access(from, F_OK) == 0)
            result = file_copy(from, to);
        free(from);
        free(to);
        TRY(result);
    }
    return 0;
}

/* All that was learnt as an ordinary adapter for the model as it was: the live adapter, with a ledger its stages as well. */
static int export_adapter(struct run *run)
{
    if (!run->options->save_adapter) return 0;
    char *directory = path_join(run->options->output, "adapter");
    if (!directory) return fault("out of memory: path in %s", run->options->output);
    const plora_status status = run->ledger ? plora_ledger_export(run->ledger, directory, NULL, NULL)
                                            : plora_adapters_save(run->adapters, directory);
    free(directory);
    return status == PLORA_OK ? 0 : fault("%s", plora_last_error());
}

/* Merges what is left of the adapter and writes the model as a directory of its own. */
static int export_model(struct run *run)
{
    if (run->options->no_save_model) return 0;
    TRY(unload(run, 1.0, 1));
    char *directory = path_join(run->options->output, "model");
    char *path = directory ? path_join(directory, "model.safetensors") : NULL;
    int result = path ? directory_make(directory) : fault("out of memory: path in %s", run->options->output);
    if (result == 0) result = copy_companions(run, directory);
    if (result == 0) result = llama_save(run->llama, run->options->model, path);
    free(path);
    free(directory);
    return result;
}

static void add_or_null(cJSON *root, const char *name, double value)
{
    if (isfinite(value))
        cJSON_AddNumberToObject(root, name, value);
    else
        cJSON_AddNullToObject(root, name);
}

static int write_result(struct run *run)
{
    const struct options *o = run->options;
    const int64_t steps = o->steps, some = steps < 10 ? steps : 10;
    double mean = 0;
    for (int64_t i = steps - some; i < steps; i++)
        mean += run->journal.losses[i] / (double)some;
    cJSON *root = cJSON_CreateObject();
    cJSON_AddStringToObject(root, "method", options_method(o));
    char *options = options_to_json(o, hash_bytes(run->train.hash, &run->heldout.hash, sizeof run->heldout.hash));
    cJSON_AddItemToObject(root, "options", cJSON_Parse(options));
    free(options);
    cJSON_AddNumberToObject(root, "loss_first", run->journal.losses[0]);
    cJSON_AddNumberToObject(root, "loss_last", run->journal.losses[steps - 1]);
    cJSON_AddNumberToObject(root, "loss_mean_last_10", mean);
    add_or_null(root, "heldout_before", run->journal.heldout_before);
    add_or_null(root, "heldout_after", run->journal.heldout_after);
    cJSON_AddNumberToObject(root, "steps", (double)steps);
    add_or_null(root, "tokens_per_second", (double)run->journal.tokens / run->journal.seconds);
    cJSON_AddNumberToObject(root, "peak_rss_bytes", (double)peak_rss_bytes());
    cJSON_AddNumberToObject(root, "unloads", (double)run->journal.unloads);
    cJSON_AddNumberToObject(root, "wall_seconds", now() - run->begin);
    char *text = cJSON_Print(root);
    cJSON_Delete(root);
    if (!text) return fault("out of memory: result.json");
    const int result = file_write(run->result_file, text, strlen(text));
    free(text);
    return result;
}

static int run_all(struct run *run)
{
    const struct options *o = run->options;
    int64_t *indices;
    TRY(open_all(run));
    TRY(begin(run));
    if (run->step == 0) {
        int result = evaluate(run, 0);
        if (result == 0) result = sample(run, "before");
        if (result != 0) return result;
    }
    TRY(memory_allocate((size_t)o->batch, sizeof *indices, "a batch", &indices));
    const int trained = train_loop(run, indices);
    free(indices);
    if (trained != 0) return trained;
    TRY(sample(run, "after"));
    TRY(export_adapter(run));
    TRY(export_model(run));
    return write_result(run);
}

static void print_profile(const struct run *run)
{
    const double *p = llama_profile(run->llama);
    fprintf(stderr, "seconds: linear %.2f  attention %.2f  element-wise %.2f  head and loss %.2f  all steps %.2f\n",
            p[PHASE_LINEAR], p[PHASE_ATTENTION], p[PHASE_ROWS], p[PHASE_HEAD], run->training_seconds);
}

int train_run(const struct options *options, const volatile sig_atomic_t *stop)
{
    struct run run = {.options = options, .stop = stop, .begin = now()};
    const int result = run_all(&run);
    journal_end_line(&run.journal);
    if (run.llama && options->profile) print_profile(&run);
    close_all(&run);
    return result;
}
