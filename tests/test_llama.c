/* test_llama.c: the trainer in examples/finetune/, linked without its main().
 *
 *     values    logits, loss and adapter gradients of two tiny models against transformers and PEFT, frozen in data/tiny_llama_*
 *               (python/make_vectors_llama.py), and against finite differences of the trainer's own loss
 *     runs      a run that is stopped after every step and resumed has the bits of one that was not; loss falls; the exported
 *               model computes what backbone and adapter did
 *     backends  with PLORA_TEST_BACKEND=cuda all of it runs on a CUDA context (llama_on_device.h), and the loss follows the CPU's
 *     refusals  wrong options, data and configurations give a message that names the fault
 *
 * Bounds. A value that passes through products of at most `DEPTH` terms in all, each in fp32, is off by a random walk of DEPTH
 * roundings of 2^-24 relative to the largest value; 8 standard deviations are allowed. With bf16 the vectors hold the error, in the
 * Euclidean norm, that transformers and PEFT themselves make in bf16; twice that is allowed. */
#include <ftw.h>
#include <omp.h>
#include <signal.h>
#include <unistd.h>

#include "check.h"
#include "data.h"
#include "llama.h"
#include "llama_on_device.h"
#include "options.h"
#include "train.h"
#include "util.h"

enum { DEPTH = 2 * (3 * 40 + 56 + 70 + 2 * 40 + 4 * 12) * 2, ROUNDINGS = 2 * 14 };

static const char *const MODELS[] = {"tied", "untied"};
static const int32_t DTYPES[] = {PLORA_F32, PLORA_BF16};

static char scratch[] = "/tmp/plora_llama_XXXXXX";

static const char *data_path(const char *name, const char *file)
{
    static char path[4096];
    const char *slash = strrchr(__FILE__, '/');
    snprintf(path, sizeof path, "%.*s/data/tiny_llama_%s%s%s", slash ? (int)(slash - __FILE__) : 1,
             slash ? __FILE__ : ".", name, *file ? "/" : "", file);
    return path;
}

/* A loss in bf16: about ROUNDINGS of the residual stream, which the mean over the positions does not enlarge. */
static double bound_of(int32_t dtype, double largest)
{
    const double one = dtype == PLORA_F32 ? 0x1p-24 : 0x1p-9;
    return 8 * one * sqrt(dtype == PLORA_F32 ? (double)DEPTH : (double)ROUNDINGS) * largest;
}

/* bf16_error: relative, in the Euclidean norm; < 0: compared element by element with bound_of(). */
static void compare(const char *what, int32_t dtype, const float *got, const float *expected, int64_t count,
                    double bf16_error)
{
    double largest = 0, error = 0, squares = 0, norm = 0;
    for (int64_t i = 0; i < count; i++) {
        largest = fmax(largest, fabs((double)expected[i]));
        const double difference = fabs((double)got[i] - (double)expected[i]);
        if (!(difference <= error)) error = difference;
        squares += difference * difference;
        norm += (double)expected[i] * (double)expected[i];
    }
    double bound = bound_of(dtype, largest);
    if (dtype == PLORA_BF16 && bf16_error >= 0) {
        error = sqrt(squares);
        bound = 2 * bf16_error * sqrt(norm);
    }
    if (!(error <= bound)) fail_msg("%s: error %g exceeds %g (largest value %g)", what, error, bound, largest);
}

#define OK(expression)                                                                                                 \
    do {                                                                                                               \
        if ((expression) != 0) fail_msg("%s: %s / %s", #expression, failure(), plora_last_error());                    \
    } while (0)

/* ------------------------------------------------------------------------------------------------------------- fixture */

struct fixture {
    plora_context *context;
    struct llama *llama;
    plora_adapters *adapters;
    plora_model *vectors;
    struct batch batch;
};

static const float *vector_of(struct fixture *f, const char *name, int64_t *count)
{
    plora_matrix matrix;
    OK(plora_model_find_tensor(f->vectors, name, &matrix));
    assert_int_equal(matrix.dtype, PLORA_F32);
    if (count) *count = matrix.rows * matrix.columns;
    return matrix.data;
}

/* To and from the library's device memory, which on the CPU is like any other. */
static void put(void *device, const void *host, int64_t count)
{
    const size_t bytes = (size_t)count * sizeof(float);
    if (llama_on_device())
        device_copy(device, host, bytes);
    else
        memcpy(device, host, bytes);
}

static float *get(const float *device, int64_t count)
{
    float *host = malloc((size_t)count * sizeof *host);
    assert_non_null(host);
    if (llama_on_device())
        device_copy(host, device, (size_t)count * sizeof *host);
    else
        memcpy(host, device, (size_t)count * sizeof *host);
    return host;
}

/* The three sequences of the vectors as one batch. */
static void make_batch(struct fixture *f)
{
    int64_t count;
    const float *ids = vector_of(f, "ids", NULL), *lengths = vector_of(f, "lengths", &count);
    const float *prompts = vector_of(f, "prompts", NULL);
    struct dataset set = {0};
    int64_t indices[3] = {0, 1, 2};
    set.examples = calloc((size_t)count, sizeof *set.examples);
    for (int64_t i = 0; i < count; i++) {
        struct example *example = &set.examples[set.count++];
        example->prompt = (int64_t)prompts[i];
        example->length = (int64_t)lengths[i] + 1;
        example->ids = calloc((size_t)example->length, sizeof *example->ids);
        for (int64_t j = 0; j < example->length; j++)
            example->ids[j] = (int32_t)*ids++;
    }
    OK(batch_fill(&f->batch, &set, indices, count));
    dataset_free(&set);
}

static void open_fixture(struct fixture *f, const char *name, int32_t dtype, int threads, double dropout)
{
    plora_context_options context = PLORA_CONTEXT_OPTIONS_INIT;
    plora_adapters_options options = PLORA_ADAPTERS_OPTIONS_INIT;
    *f = (struct fixture){0};
    context.threads = threads;
    context.deterministic = 1;
#ifdef _OPENMP /* without it all is one thread, oneDNN's too */
    omp_set_num_threads(threads);
#endif
    OK(plora_context_create(&context, &f->context));
    OK(llama_open(f->context, data_path(name, ""), dtype, threads, &f->llama));
    OK(plora_model_open(f->context, data_path(name, "vectors.safetensors"), &f->vectors));
    options.rank = 2;
    options.alpha = 4;
    options.dropout = dropout;
    OK(plora_adapters_create(llama_model(f->llama), &options, &f->adapters));
    make_batch(f);
    OK(llama_prepare(f->llama, f->adapters, f->batch.tokens, 1));
    for (int32_t i = 0; i < plora_model_layer_count(llama_model(f->llama)); i++) {
        plora_linear linear = PLORA_LINEAR_INIT;
        plora_adapter adapter = PLORA_ADAPTER_INIT;
        char a[128], b[128];
        OK(plora_model_layer(llama_model(f->llama), i, &linear));
        if (plora_adapters_layer(f->adapters, i, &adapter) != PLORA_OK) continue;
        snprintf(a, sizeof a, "%s.a", linear.name);
        snprintf(b, sizeof b, "%s.b", linear.name);
        put(adapter.a.data, vector_of(f, a, NULL), adapter.a.rows * adapter.a.columns);
        put(adapter.b.data, vector_of(f, b, NULL), adapter.b.rows * adapter.b.columns);
    }
}

static void close_fixture(struct fixture *f)
{
    batch_free(&f->batch);
    plora_adapters_destroy(f->adapters);
    plora_model_destroy(f->vectors);
    llama_close(f->llama);
    plora_context_destroy(f->context);
    llama_forget_device();
}

static double mean_loss(struct fixture *f, int train, int flags)
{
    double loss;
    OK(llama_forward(f->llama, &f->batch, flags | (train ? LLAMA_TRAIN : 0)));
    OK(llama_loss(f->llama, &f->batch, train, 1.0 / (double)f->batch.losses, &loss));
    if (train) OK(llama_backward(f->llama, &f->batch, flags | LLAMA_TRAIN));
    return loss / (double)f->batch.losses;
}

/* -------------------------------------------------------------------------------------------------------------- values */

static void test_against_transformers(void **state)
{
    (void)state;
    for (int m = 0; m < CHECK_COUNT(MODELS); m++)
        for (int d = 0; d < CHECK_COUNT(DTYPES); d++) {
            struct fixture f;
            int64_t count, adapted = 0;
            char name[160];
            open_fixture(&f, MODELS[m], DTYPES[d], 2, 0);
            const float loss = (float)mean_loss(&f, 1, 0);
            compare("loss", DTYPES[d], &loss, vector_of(&f, "loss", NULL), 1, -1);
            const double logits_error = *vector_of(&f, "bf16_logits_error", NULL);
            const double gradient_error = *vector_of(&f, "bf16_gradient_error", NULL);
            const float *logits = vector_of(&f, "logits", &count);
            assert_int_equal(count, f.batch.losses * llama_configuration(f.llama)->vocabulary);
            float *got = calloc((size_t)count, sizeof *got);
            OK(llama_logits(f.llama, &f.batch, got));
            compare("logits", DTYPES[d], got, logits, count, logits_error);
            free(got);
            for (int32_t i = 0; i < plora_model_layer_count(llama_model(f.llama)); i++) {
                plora_linear linear = PLORA_LINEAR_INIT;
                plora_adapter adapter = PLORA_ADAPTER_INIT;
                OK(plora_model_layer(llama_model(f.llama), i, &linear));
                if (plora_adapters_layer(f.adapters, i, &adapter) != PLORA_OK) continue;
                adapted++;
                snprintf(name, sizeof name, "%s.a_gradient", linear.name);
                const float *expected = vector_of(&f, name, &count);
                float *gradient = get(adapter.a_gradient.data, count);
                compare(name, DTYPES[d], gradient, expected, count, gradient_error);
                free(gradient);
                snprintf(name, sizeof name, "%s.b_gradient", linear.name);
                expected = vector_of(&f, name, &count);
                gradient = get(adapter.b_gradient.data, count);
                compare(name, DTYPES[d], gradient, expected, count, gradient_error);
                free(gradient);
            }
            assert_int_equal(adapted, 14);
            close_fixture(&f);
        }
}

/* Loss along a random direction that the gradient points to, with dropout: the masks are the same in every call. Two step sizes give the error of the
 * difference quotient itself. */
static void test_finite_differences(void **state)
{
    (void)state;
    for (int m = 0; m < CHECK_COUNT(MODELS); m++) {
        struct fixture f;
        float *parameters, *on_device;
        int64_t count;
        double slope = 0, quotient[2], loss = 0;
        open_fixture(&f, MODELS[m], PLORA_F32, 2, 0.25);
        check_reseed(7);
        OK(plora_adapters_parameters(f.adapters, &parameters, &count));
        OK(plora_adapters_gradients(f.adapters, &on_device, &count));
        loss = mean_loss(&f, 1, LLAMA_DROPOUT);
        float *start = get(parameters, count), *gradients = get(on_device, count);
        float *direction = malloc((size_t)count * sizeof *direction), *moved = malloc((size_t)count * sizeof *moved);
        for (int64_t i = 0; i < count; i++) {
            direction[i] = copysignf(start[i] == 0 ? 0 : (float)check_uniform(), gradients[i]);
            slope += (double)direction[i] * (double)gradients[i];
        }
        static const double steps[2] = {0x1p-10, 0x1p-11};
        for (int s = 0; s < 2; s++) {
            double side[2];
            for (int sign = 0; sign < 2; sign++) {
                for (int64_t i = 0; i < count; i++)
                    moved[i] = start[i] + (float)((sign ? steps[s] : -steps[s]) * (double)direction[i]);
                put(parameters, moved, count);
                side[sign] = mean_loss(&f, 0, LLAMA_DROPOUT);
            }
            quotient[s] = (side[1] - side[0]) / (2 * steps[s]);
        }
        const double better = (4 * quotient[1] - quotient[0]) / 3; /* Richardson */
        const double bound = fabs(quotient[1] - quotient[0]) + bound_of(PLORA_F32, loss) / steps[1] / 8;
        if (!(fabs(better - slope) <= bound)) fail_msg("slope %g, differences %g, bound %g", slope, better, bound);
        assert_true(fabs(slope) > 4 * bound); /* else the comparison says nothing */
        free(start);
        free(gradients);
        free(direction);
        free(moved);
        close_fixture(&f);
    }
}

static void test_threads_give_same_bits(void **state)
{
    (void)state;
    for (int d = 0; d < CHECK_COUNT(DTYPES); d++) {
        float *kept = NULL;
        double losses[2];
        for (int threads = 1; threads <= 2; threads++) {
            struct fixture f;
            float *gradients;
            int64_t count;
            open_fixture(&f, "untied", DTYPES[d], threads, 0.1);
            losses[threads - 1] = mean_loss(&f, 1, LLAMA_DROPOUT);
            OK(plora_adapters_gradients(f.adapters, &gradients, &count));
            float *now = get(gradients, count);
            if (threads == 1) {
                kept = now;
            } else {
                assert_memory_equal(kept, now, (size_t)count * sizeof *kept);
                free(now);
            }
            close_fixture(&f);
        }
        assert_memory_equal(&losses[0], &losses[1], sizeof losses[0]);
        free(kept);
    }
}

/* Greedy tokens from the cache are those that whole forward passes find most likely. */
static void test_generate(void **state)
{
    (void)state;
    struct fixture f;
    enum { PROMPTS = 3, MOST = 9 };
    static const int64_t lengths[PROMPTS] = {5, 1, 66};
    int32_t prompts[PROMPTS][70], generated[PROMPTS * MOST];
    const int32_t *pointers[PROMPTS];
    int64_t made[PROMPTS];
    open_fixture(&f, "untied", PLORA_F32, 2, 0);
    check_reseed(9);
    for (int i = 0; i < PROMPTS; i++) {
        for (int j = 0; j < 70; j++)
            prompts[i][j] = (int32_t)check_integer(0, 60);
        pointers[i] = prompts[i];
    }
    OK(llama_generate(f.llama, PROMPTS, pointers, lengths, MOST, -1, generated, made));
    float *logits = malloc(61 * sizeof *logits);
    for (int i = 0; i < PROMPTS; i++) {
        int32_t ids[80], positions[80];
        assert_int_equal(made[i], MOST);
        for (int j = 0; j < 80; j++)
            positions[j] = j;
        memcpy(ids, prompts[i], (size_t)lengths[i] * sizeof *ids);
        memcpy(ids + lengths[i], generated + i * MOST, MOST * sizeof *ids);
        for (int j = 0; j < MOST; j++) {
            int64_t starts[2] = {0, lengths[i] + j}, row = lengths[i] + j - 1;
            const struct batch batch = {starts[1], 1, 1, ids, positions, starts, &row, NULL};
            OK(llama_forward(f.llama, &batch, 0));
            OK(llama_logits(f.llama, &batch, logits));
            double top = -INFINITY;
            for (int k = 0; k < 61; k++)
                top = fmax(top, (double)logits[k]);
            assert_true(top - (double)logits[ids[lengths[i] + j]] <= bound_of(PLORA_F32, fabs(top))); /* or a tie */
        }
    }
    /* an eos token ends an answer and is not part of it */
    OK(llama_generate(f.llama, PROMPTS, pointers, lengths, MOST, generated[2], generated, made));
    assert_true(made[0] <= 2);
    free(logits);
    close_fixture(&f);
}

/* ---------------------------------------------------------------------------------------------------------------- runs */

static const char *in_scratch(const char *name)
{
    static char paths[8][256];
    static int next;
    char *path = paths[next++ % 8];
    snprintf(path, sizeof paths[0], "%s/%s", scratch, name);
    return path;
}

static void write_text(const char *path, const char *text)
{
    OK(file_write(path, text, strlen(text)));
}

/* `count` examples that count upwards from a random token. */
static void write_examples(const char *path, int count, uint64_t salt)
{
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    for (int i = 0; i < count; i++) {
        const int first = (int)(random_at(salt, (uint64_t)i) % 50), length = 3 + i % 5;
        fprintf(file, "{\"prompt\": [");
        for (int j = 0; j < length; j++)
            fprintf(file, "%s%d", j ? ", " : "", (first + j) % 61);
        fprintf(file, "], \"completion\": [%d, %d, 2]}\n", (first + length) % 61, (first + length + 1) % 61);
    }
    assert_int_equal(fclose(file), 0);
}

/* `signalled`: a signal came before the run began. */
static int train_signalled(const char *output, int resume, int stop_after_a_step, int signalled,
                           const char *const *more)
{
    const char *arguments[64] = {"finetune",
                                 "--model",
                                 NULL,
                                 "--train",
                                 in_scratch("train.jsonl"),
                                 "--heldout",
                                 in_scratch("heldout.jsonl"),
                                 "--output",
                                 output,
                                 "--deterministic",
                                 "--threads",
                                 "2",
                                 "--alpha",
                                 "8",
                                 "--targets",
                                 "all-linear",
                                 "--seed",
                                 "5"};
    char *model = strdup(data_path("tied", ""));
    int count = 18;
    arguments[2] = model;
    for (; *more; more++)
        arguments[count++] = *more;
    if (resume) arguments[count++] = "--resume";
    if (stop_after_a_step) {
        arguments[count++] = "--stop-after";
        arguments[count++] = "1";
    }
    struct options options;
    if (options_parse(count, (char **)(uintptr_t)arguments, &options) != 0) fail_msg("%s", failure());
    const volatile sig_atomic_t stop = signalled;
    const int result = train_run(&options, &stop);
    llama_forget_device();
    free(model);
    return result;
}

static int train(const char *output, int resume, int stop_after_a_step, const char *const *more)
{
    return train_signalled(output, resume, stop_after_a_step, 0, more);
}

static void assert_same_file(const char *one, const char *other, const char *name)
{
    char path[2][512], *text[2];
    size_t size[2];
    snprintf(path[0], sizeof path[0], "%s/%s", one, name);
    snprintf(path[1], sizeof path[1], "%s/%s", other, name);
    for (int i = 0; i < 2; i++)
        OK(file_read(path[i], &text[i], &size[i]));
    assert_int_equal(size[0], size[1]);
    if (memcmp(text[0], text[1], size[0]) != 0) fail_msg("%s and %s differ", path[0], path[1]);
    free(text[0]);
    free(text[1]);
}

/* The values of `key` in log.jsonl, in order. */
static int log_values(const char *directory, const char *key, double *values, int most)
{
    char path[512], pattern[64], *text;
    int count = 0;
    snprintf(path, sizeof path, "%s/log.jsonl", directory);
    snprintf(pattern, sizeof pattern, "\"%s\":", key);
    OK(file_read(path, &text, NULL));
    for (const char *at = text; (at = strstr(at, pattern)) && count < most; count++) {
        at += strlen(pattern);
        values[count] = strtod(at, NULL);
    }
    free(text);
    return count;
}

static void resume_case(const char *name, const char *const *more, int steps)
{
    char whole[256], pieces[256];
    double values[2][64];
    snprintf(whole, sizeof whole, "%s/%s_whole", scratch, name);
    snprintf(pieces, sizeof pieces, "%s/%s_pieces", scratch, name);
    OK(train(whole, 0, 0, more));
    int result = train(pieces, 0, 1, more), runs = 1;
    for (; result == TRAIN_STOPPED; runs++)
        result = train(pieces, 1, 1, more);
    if (result != 0) fail_msg("%s", failure());
    assert_int_equal(runs, steps);
    assert_same_file(whole, pieces, "checkpoint.safetensors");
    assert_same_file(whole, pieces, "samples.jsonl");
    assert_same_file(whole, pieces, "model/model.safetensors");
    static const char *const keys[] = {"loss", "heldout_loss", "lr", "gradient_norm", "captured"};
    for (int i = 0; i < CHECK_COUNT(keys); i++) {
        const int count = log_values(whole, keys[i], values[0], 64);
        assert_int_equal(count, log_values(pieces, keys[i], values[1], 64));
        assert_true(count >= 1);
        assert_memory_equal(values[0], values[1], (size_t)count * sizeof **values);
    }
}

static void test_resume(void **state)
{
    (void)state;
    static const char *const full[] = {
        "--method",         "plora", "--period",  "3",   "--steps",    "8",      "--batch",  "4",
        "--accumulate",     "2",     "--dropout", "0.2", "--schedule", "cosine", "--warmup", "1",
        "--eval-every",     "4",     "--rank",    "2",   "--dtype",    "bf16",   "--sample", "2",
        "--max-new-tokens", "4",     NULL};
    static const char *const part[] = {"--method",
                                       "plora",
                                       "--period",
                                       "2",
                                       "--momentum",
                                       "0.3",
                                       "--steps",
                                       "7",
                                       "--batch",
                                       "3",
                                       "--schedule",
                                       "linear",
                                       "--rank",
                                       "1",
                                       "--lora-plus",
                                       "4",
                                       "--weight-decay",
                                       "0.01",
                                       "--rslora",
                                       "--sample",
                                       "1",
                                       "--max-new-tokens",
                                       "3",
                                       NULL};
    static const char *const plain[] = {"--steps",  "5", "--batch",          "2", "--clip", "0.5",
                                        "--sample", "1", "--max-new-tokens", "2", NULL};
    resume_case("full", full, 8);
    resume_case("part", part, 7);
    resume_case("plain", plain, 5);
}

/* During the first held-out loss a signal ends the run with nothing to resume; after a step, with a checkpoint. */
static void test_signals(void **state)
{
    (void)state;
    static const char *const more[] = {"--method", "lora", "--steps", "3", "--rank", "1", NULL};
    char *output = strdup(in_scratch("signalled"));
    char checkpoint[512];
    snprintf(checkpoint, sizeof checkpoint, "%s/checkpoint.safetensors", output);
    assert_int_equal(train_signalled(output, 0, 0, 1, more), TRAIN_STOPPED);
    assert_int_not_equal(access(checkpoint, F_OK), 0);
    assert_int_equal(train(output, 0, 1, more), TRAIN_STOPPED);
    assert_int_equal(access(checkpoint, F_OK), 0);
    assert_int_equal(train_signalled(output, 1, 0, 1, more), TRAIN_STOPPED); /* one more step, then its checkpoint */
    OK(train(output, 1, 0, more));
    free(output);
}

static void test_resume_refuses_other_options(void **state)
{
    (void)state;
    static const char *const before[] = {"--steps", "2", "--batch", "2", NULL};
    static const char *const other[] = {"--steps", "4", "--batch", "3", NULL};
    static const char *const longer[] = {"--steps", "4", "--batch", "2", NULL};
    const char *output = in_scratch("refuse");
    OK(train(output, 0, 0, before));
    assert_int_equal(train(output, 1, 0, other), TRAIN_FAILED);
    assert_non_null(strstr(failure(), "--batch was 2 and is now 3"));
    OK(train(output, 1, 0, longer)); /* more steps are no other run */
    double values[16];
    assert_int_equal(log_values(output, "loss", values, 16), 4);
}

/* The rule of the examples is learnt; both ways to unload keep what was learnt. */
static void test_loss_falls(void **state)
{
    (void)state;
    static const char *const runs[][20] = {
        {"--steps", "60", "--batch", "8", "--lr", "2e-2", "--rank", "4", NULL},
        {"--steps", "60", "--batch", "8", "--lr", "2e-2", "--rank", "4", "--method", "plora", "--period", "20", NULL},
        {"--steps", "60", "--batch", "8", "--lr", "2e-2", "--rank", "4", "--method", "plora", "--period", "5",
         "--momentum", "0.2", NULL},
        {"--steps", "60", "--batch", "8", "--lr", "2e-2", "--rank", "4", "--dtype", "bf16", NULL}};
    for (int i = 0; i < CHECK_COUNT(runs); i++) {
        const char *output = in_scratch("falls");
        double heldout[8], losses[64];
        OK(train(output, 0, 0, runs[i]));
        assert_int_equal(log_values(output, "heldout_loss", heldout, 8), 2);
        assert_int_equal(log_values(output, "loss", losses, 64), 60);
        if (!(heldout[1] < 0.5 * heldout[0])) fail_msg("run %d: held-out loss %g became %g", i, heldout[0], heldout[1]);
        if (!(losses[59] < 0.5 * losses[0])) fail_msg("run %d: loss %g became %g", i, losses[0], losses[59]);
    }
}

/* The curves of the two backends part as those of two orders of summation do: slowly. */
static void test_backends_agree(void **state)
{
    (void)state;
    static const char *const runs[][20] = {
        {"--steps", "24", "--batch", "8", "--lr", "1e-2", "--rank", "4", "--method", "plora", "--period", "8", NULL},
        {"--steps", "24", "--batch", "8", "--lr", "1e-2", "--rank", "4", "--method", "plora", "--period", "4",
         "--momentum", "0.2", "--dtype", "bf16", NULL}};
    static const double bounds[] = {1e-4, 2e-2};
    for (int i = 0; i < CHECK_COUNT(runs); i++) {
        double losses[2][32];
        for (int on = 0; on < 2; on++) {
            const char *output = in_scratch(on ? "on_device" : "on_host");
            llama_device_off = !on;
            OK(train(output, 0, 0, runs[i]));
            assert_int_equal(log_values(output, "loss", losses[on], 32), 24);
        }
        for (int step = 0; step < 24; step++)
            if (!(fabs(losses[0][step] - losses[1][step]) <= bounds[i] * losses[0][step]))
                fail_msg("run %d, step %d: loss %g on the CPU, %g on CUDA", i, step, losses[0][step], losses[1][step]);
    }
}

/* The exported model has the loss of backbone and adapter, but for the rounding of its weights to bf16. */
static void test_export(void **state)
{
    (void)state;
    static const char *const more[] = {"--steps", "20", "--batch", "4", "--rank", "2", "--lr", "1e-2", NULL};
    static const char *const none[] = {"--steps", "1", "--batch", "4", "--lr", "0", NULL};
    double trained[8], exported[8];
    const char *output = in_scratch("export"), *again = in_scratch("export_again");
    OK(train(output, 0, 0, more));
    assert_int_equal(log_values(output, "heldout_loss", trained, 8), 2);
    char model[512];
    snprintf(model, sizeof model, "%s/model", output);
    struct options options;
    const char *arguments[32] = {"finetune",
                                 "--model",
                                 model,
                                 "--train",
                                 in_scratch("train.jsonl"),
                                 "--heldout",
                                 in_scratch("heldout.jsonl"),
                                 "--output",
                                 again,
                                 "--no-save-model"};
    int count = 10;
    for (const char *const *argument = none; *argument; argument++)
        arguments[count++] = *argument;
    OK(options_parse(count, (char **)(uintptr_t)arguments, &options));
    const volatile sig_atomic_t stop = 0;
    OK(train_run(&options, &stop));
    assert_int_equal(log_values(again, "heldout_loss", exported, 8), 2);
    const double bound = bound_of(PLORA_BF16, trained[1]);
    if (!(fabs(exported[0] - trained[1]) <= bound)) fail_msg("loss %g, exported %g", trained[1], exported[0]);
    assert_true(fabs(exported[0] - trained[0]) > bound); /* training has changed something */
}

/* ------------------------------------------------------------------------------------------------------------ refusals */

static void refused(const char *expected, const char *const *arguments)
{
    struct options options;
    int count = 0;
    while (arguments[count])
        count++;
    assert_int_equal(options_parse(count, (char **)(uintptr_t)arguments, &options), -1);
    if (!strstr(failure(), expected)) fail_msg("'%s' does not say '%s'", failure(), expected);
}

static void test_options_are_checked(void **state)
{
    (void)state;
    refused("unknown argument '--mdoel'", (const char *const[]){"finetune", "--mdoel", "x", NULL});
    refused("--model is missing", (const char *const[]){"finetune", NULL});
    refused("--rank '0': must be an integer in [1,", (const char *const[]){"finetune", "--rank", "0", NULL});
    refused("--lr 'fast': must be a number", (const char *const[]){"finetune", "--lr=fast", NULL});
    refused("--lr 'nan'", (const char *const[]){"finetune", "--lr", "nan", NULL});
    refused("--dtype 'fp64': must be one of fp32|bf16", (const char *const[]){"finetune", "--dtype", "fp64", NULL});
    refused("--steps needs a value", (const char *const[]){"finetune", "--steps", NULL});
    refused("--resume takes no value", (const char *const[]){"finetune", "--resume=1", NULL});
    refused("needs --period", (const char *const[]){"finetune", "--model", "m", "--train", "t", "--output", "o",
                                                    "--method", "plora", NULL});
    refused("no multiple of --accumulate 3",
            (const char *const[]){"finetune", "--model", "m", "--train", "t", "--output", "o", "--batch", "4",
                                  "--accumulate", "3", NULL});
}

static void test_data_is_checked(void **state)
{
    (void)state;
    static const struct {
        const char *text, *expected;
    } cases[] = {
        {"", "holds no examples"},
        {"{\"prompt\": [1], \"completion\": [2]}\n{\"prompt\": [1]\n", "line 2: not valid JSON"},
        {"{\"prompt\": [1]}", "line 1: not an object with the lists"},
        {"{\"prompt\": [1, 61], \"completion\": [2]}", "'prompt' holds something that is no token id in [0, 61)"},
        {"{\"prompt\": [1], \"completion\": [-1]}", "'completion' holds something"},
        {"{\"prompt\": [1], \"completion\": [1.5]}", "'completion' holds something"},
        {"{\"prompt\": [1, 2], \"completion\": []}", "nothing to predict"},
        {"{\"prompt\": [1, 2, 3], \"completion\": [4, 5, 6]}", "6 tokens are more than the model's 4 positions"}};
    for (int i = 0; i < CHECK_COUNT(cases); i++) {
        struct dataset set;
        write_text(in_scratch("bad.jsonl"), cases[i].text);
        assert_int_equal(dataset_read(in_scratch("bad.jsonl"), 61, 4, &set), -1);
        if (!strstr(failure(), cases[i].expected)) fail_msg("'%s' does not say '%s'", failure(), cases[i].expected);
    }
}

static void test_configuration_is_checked(void **state)
{
    (void)state;
#define SIZES                                                                                                          \
    "\"hidden_size\": 8, \"num_hidden_layers\": 1, \"num_attention_heads\": 2, \"intermediate_size\": 8, "             \
    "\"vocab_size\": 9"
#define LLAMA "{\"architectures\": [\"LlamaForCausalLM\"], "
    static const struct {
        const char *text, *expected;
    } cases[] = {
        {"[]", "is not a JSON object"},
        {"{\"architectures\": [\"GPT2LMHeadModel\"], " SIZES "}", "architecture 'GPT2LMHeadModel' is not supported"},
        {"{" SIZES "}", "architecture '(none)' is not supported"},
        {LLAMA "\"hidden_size\": 8}", "'num_hidden_layers' is missing"},
        {LLAMA SIZES ", \"num_key_value_heads\": 3}", "2 attention heads are no multiple of 3"},
        {LLAMA SIZES ", \"head_dim\": 5}", "head size 5 must be even"},
        {LLAMA SIZES ", \"hidden_act\": \"gelu\"}", "hidden_act is not supported"},
        {LLAMA SIZES ", \"rms_norm_eps\": -1}", "'rms_norm_eps' must be a number > 0"},
        {LLAMA SIZES ", \"rope_scaling\": {\"type\": \"yarn\"}}", "rope_scaling of type 'yarn' is not supported"},
        {LLAMA SIZES ", \"rope_parameters\": {\"rope_type\": \"llama3\"}}", "'factor' must be a number > 0"},
        {LLAMA SIZES ", \"quantization_config\": {}}", "quantization_config is not supported"},
    };
    for (int i = 0; i < CHECK_COUNT(cases); i++) {
        struct llama_config config;
        write_text(in_scratch("config.json"), cases[i].text);
        assert_int_equal(llama_config_read(scratch, &config), -1);
        if (!strstr(failure(), cases[i].expected)) fail_msg("'%s' does not say '%s'", failure(), cases[i].expected);
    }
    struct llama_config config;
    write_text(in_scratch("config.json"), LLAMA SIZES ", \"rope_scaling\": null, \"eos_token_id\": [7, 8]}");
    OK(llama_config_read(scratch, &config));
    assert_int_equal(config.kv_heads, 2);
    assert_int_equal(config.head_size, 4);
    assert_int_equal(config.eos, 7);
}

static void test_output_that_cannot_be_written(void **state)
{
    (void)state;
    static const char *const more[] = {"--steps", "1", "--batch", "1", NULL};
    write_text(in_scratch("file"), "not a directory");
    assert_int_equal(train(in_scratch("file/output"), 0, 0, more), TRAIN_FAILED);
    assert_non_null(strstr(failure(), "Not a directory"));
    assert_int_equal(train(in_scratch("fresh"), 1, 0, more), TRAIN_FAILED); /* --resume without a run */
    assert_non_null(strstr(failure(), "run.json"));
}

static int remove_entry(const char *path, const struct stat *status, int type, struct FTW *place)
{
    (void)status;
    (void)type;
    (void)place;
    return remove(path);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {cmocka_unit_test(test_against_transformers),
                                              cmocka_unit_test(test_finite_differences),
                                              cmocka_unit_test(test_threads_give_same_bits),
                                              cmocka_unit_test(test_generate),
                                              cmocka_unit_test(test_resume),
                                              cmocka_unit_test(test_signals),
                                              cmocka_unit_test(test_resume_refuses_other_options),
                                              cmocka_unit_test(test_loss_falls),
                                              cmocka_unit_test(test_export),
                                              cmocka_unit_test(test_options_are_checked),
                                              cmocka_unit_test(test_data_is_checked),
                                              cmocka_unit_test(test_configuration_is_checked),
                                              cmocka_unit_test(test_output_that_cannot_be_written),
                                              cmocka_unit_test(test_backends_agree)};
    const size_t count = sizeof tests / sizeof *tests - (device_is_cuda() ? 0 : 1);
    check_begin("test_llama");
    if (!mkdtemp(scratch)) return 1;
    write_examples(in_scratch("train.jsonl"), 40, 1);
    write_examples(in_scratch("heldout.jsonl"), 12, 2);
    const int failed = _cmocka_run_group_tests("llama", tests, count, NULL, NULL);
    nftw(scratch, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
    return failed;
}
