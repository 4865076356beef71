/* journal.c: see journal.h. */
#include "journal.h"

#include <cjson/cJSON.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "util.h"

static double number(const cJSON *root, const char *name)
{
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(root, name);
    return cJSON_IsNumber(item) ? item->valuedouble : NAN;
}

/* Takes in a line of the interrupted run. */
static void remember(struct journal *journal, const cJSON *root, int64_t step)
{
    if (cJSON_HasObjectItem(root, "loss") && step >= 1 && step <= journal->steps) {
        journal->losses[step - 1] = number(root, "loss");
        journal->tokens += (int64_t)number(root, "tokens");
        journal->seconds += number(root, "seconds");
    }
    if (cJSON_HasObjectItem(root, "heldout_loss")) {
        journal->heldout_after = number(root, "heldout_loss");
        if (step == 0) journal->heldout_before = journal->heldout_after;
    }
    if (cJSON_HasObjectItem(root, "unload")) journal->unloads++;
}

/* Keeps the lines of steps <= resume_step, up to the first that is broken, as the last line of a killed run may be. */
static size_t keep_lines(struct journal *journal, char *text, int64_t resume_step)
{
    size_t kept = 0;
    for (char *line = text, *end; (end = strchr(line, '\n')); line = end + 1) {
        *end = '\0';
        cJSON *root = cJSON_Parse(line);
        const cJSON *step = cJSON_GetObjectItemCaseSensitive(root, "step");
        const int whole = cJSON_IsNumber(step);
        /* the merge for export belongs to the end that the run now does not have */
        const int wanted = whole && step->valuedouble <= (double)resume_step &&
                           !cJSON_GetObjectItemCaseSensitive(root, "final_unload");
        if (wanted) {
            remember(journal, root, (int64_t)step->valuedouble);
            const size_t length = strlen(line);
            memmove(text + kept, line, length);
            kept += length;
            text[kept++] = '\n';
        }
        cJSON_Delete(root);
        if (!whole) break;
    }
    return kept;
}

static int cut_back(struct journal *journal, const char *path, int64_t resume_step)
{
    char *text;
    TRY(file_read(path, &text, NULL));
    const int result = file_write(path, text, keep_lines(journal, text, resume_step));
    free(text);
    return result;
}

int journal_open(const char *directory, int64_t steps, int64_t resume_step, struct journal *journal)
{
    *journal = (struct journal){.steps = steps,
                                .heldout_before = NAN,
                                .heldout_after = NAN,
                                .begin = now(),
                                .first_step = resume_step > 0 ? resume_step : 0,
                                .terminal = isatty(STDERR_FILENO)};
    journal->last_line = journal->begin;
    TRY(memory_allocate((size_t)steps, sizeof *journal->losses, "losses", &journal->losses));
    char *path = path_join(directory, "log.jsonl");
    if (!path) return fault("out of memory: path in %s", directory);
    int result = resume_step >= 0 ? cut_back(journal, path, resume_step) : 0;
    if (result == 0) {
        journal->file = fopen(path, resume_step >= 0 ? "a" : "w");
        if (!journal->file) result = fault("cannot write %s: %s", path, strerror(errno));
    }
    free(path);
    return result;
}

void journal_close(struct journal *journal)
{
    journal_end_line(journal);
    if (journal->file) fclose(journal->file);
    free(journal->losses);
    *journal = (struct journal){0};
}

/* Writes one object as a line and frees it. */
static int write_line(struct journal *journal, cJSON *root)
{
    char *text = cJSON_PrintUnformatted(root);
    cJSON_Delete(root);
    if (!text) return fault("out of memory: a line of log.jsonl");
    const int bad = fprintf(journal->file, "%s\n", text) < 0 || fflush(journal->file) != 0;
    free(text);
    return bad ? fault("cannot write to log.jsonl: %s", strerror(errno)) : 0;
}

int journal_step(struct journal *journal, const struct journal_step *step)
{
    journal->losses[step->step - 1] = step->loss;
    journal->tokens += step->tokens;
    journal->seconds += step->seconds;
    cJSON *root = cJSON_CreateObject();
    cJSON_AddNumberToObject(root, "step", (double)step->step);
    cJSON_AddNumberToObject(root, "stage", (double)step->stage);
    cJSON_AddNumberToObject(root, "loss", step->loss);
    cJSON_AddNumberToObject(root, "lr", step->lr);
    cJSON_AddNumberToObject(root, "gradient_norm", step->gradient_norm);
    cJSON_AddNumberToObject(root, "tokens", (double)step->tokens);
    cJSON_AddNumberToObject(root, "seconds", step->seconds);
    return write_line(journal, root);
}

int journal_heldout(struct journal *journal, int64_t step, double loss)
{
    if (step == 0) journal->heldout_before = loss;
    journal->heldout_after = loss;
    cJSON *root = cJSON_CreateObject();
    cJSON_AddNumberToObject(root, "step", (double)step);
    cJSON_AddNumberToObject(root, "heldout_loss", loss);
    return write_line(journal, root);
}

int journal_unload(struct journal *journal, int64_t step, const plora_unload_report *report, int final)
{
    if (!final) journal->unloads++;
    cJSON *root = cJSON_CreateObject();
    cJSON_AddNumberToObject(root, "step", (double)step);
    cJSON *item = cJSON_AddObjectToObject(root, final ? "final_unload" : "unload");
    cJSON_AddNumberToObject(item, "stage", (double)report->stage);
    cJSON_AddNumberToObject(item, "weights", report->weights);
    cJSON_AddNumberToObject(item, "update_rms", report->update_rms);
    cJSON_AddNumberToObject(item, "weight_rms", report->weight_rms);
    cJSON_AddNumberToObject(item, "captured", report->captured);
    cJSON_AddNumberToObject(item, "changed", report->changed);
    cJSON_AddNumberToObject(item, "lost_max", report->lost_max);
    cJSON_AddNumberToObject(item, "effective_rank", report->effective_rank);
    return write_line(journal, root);
}

void journal_progress(struct journal *journal, const struct journal_step *step, double tokens_per_second)
{
    const double time = now();
    const int last = step->step == journal->steps;
    if (!journal->terminal && !last && time - journal->last_line < 10) return;
    if (journal->terminal && !last && journal->line_open && time - journal->last_line < 0.1) return;
    journal->last_line = time;
    const double left =
        (time - journal->begin) / (double)(step->step - journal->first_step) * (double)(journal->steps - step->step);
    fprintf(stderr, "%sstep %lld/%lld  stage %lld  loss %.4f  lr %.2e  %.0f tokens/s  %lld:%02lld left%s",
            journal->terminal ? "\r\033[K" : "", (long long)step->step, (long long)journal->steps,
            (long long)step->stage, step->loss, step->lr, tokens_per_second, (long long)left / 60, (long long)left % 60,
            journal->terminal ? "" : "\n");
    fflush(stderr);
    journal->line_open = journal->terminal;
}

void journal_end_line(struct journal *journal)
{
    if (journal->line_open) fputc('\n', stderr);
    journal->line_open = 0;
}
