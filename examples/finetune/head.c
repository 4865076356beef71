/* head.c: final norm, logits and cross entropy, a chunk of rows at a time, so that never T x vocabulary logits exist. In training
 * each chunk's logits become their own gradient before the next chunk is made. */
#include <string.h>

#include "llama_private.h"

static void *row(const struct llama *llama, const void *data, int64_t index)
{
    return (char *)(uintptr_t)data + (size_t)(index * llama->config.hidden) * element_size(llama->dtype);
}

/* Logits of rows[0 .. count), count <= chunk, into out[count, vocabulary]. */
static int chunk_logits(struct llama *llama, const int64_t *rows, int64_t count, void *out)
{
    const int64_t width = llama->config.hidden;
    for (int64_t i = 0; i < count; i++)
        memcpy(row(llama, llama->head_x, i), row(llama, llama->final, rows[i]),
               (size_t)width * element_size(llama->dtype));
    llama->rows->rms_forward(count, width, (float)llama->config.epsilon, llama->head_x, NULL, NULL, llama->final_norm,
                             llama->head_normal);
    const plora_matrix x = llama_matrix(llama, llama->head_normal, count, width);
    const plora_matrix y = {out, count, llama->config.vocabulary, llama->config.vocabulary, PLORA_F32, 0};
    LIBRARY(plora_linear_forward(llama->adapters, llama->head, &x, &y, 0, NULL));
    return 0;
}

/* From the logits' gradient to llama->dx. */
static int chunk_backward(struct llama *llama, const int64_t *rows, int64_t count)
{
    const int64_t width = llama->config.hidden;
    const plora_matrix x = llama_matrix(llama, llama->head_normal, count, width);
    const plora_matrix dy = llama_matrix(llama, llama->d_logits, count, llama->config.vocabulary);
    const plora_matrix dx = llama_matrix(llama, llama->head_d, count, width);
    LIBRARY(plora_linear_backward(llama->adapters, llama->head, &x, &dy, &dx, 0, NULL));
    for (int64_t i = 0; i < count; i++)
        llama->rows->rms_backward(1, width, (float)llama->config.epsilon, row(llama, llama->head_x, i),
                                  llama->final_norm, row(llama, llama->head_d, i), row(llama, llama->dx, rows[i]));
    return 0;
}

int llama_loss(struct llama *llama, const struct batch *batch, int train, double factor, double *loss)
{
    const double begin = now();
    const int64_t width = llama->config.vocabulary, size = (int64_t)element_size(llama->dtype);
    const int64_t padded = (batch->tokens + TOKEN_MULTIPLE - 1) / TOKEN_MULTIPLE * TOKEN_MULTIPLE;
    double losses[LOGIT_ROWS];
    *loss = 0;
    if (train) memset(llama->dx, 0, (size_t)(padded * llama->config.hidden * size));
    for (int64_t first = 0; first < batch->losses; first += llama->chunk) {
        const int64_t count = batch->losses - first < llama->chunk ? batch->losses - first : llama->chunk;
        TRY(chunk_logits(llama, batch->rows + first, count, llama->logits));
#pragma omp parallel for schedule(static) num_threads(llama->threads)
        for (int64_t i = 0; i < count; i++)
            losses[i] =
                llama->rows->cross_entropy(width, llama->logits + i * width, batch->targets[first + i], (float)factor,
                                           train ? (char *)llama->d_logits + i * width * size : NULL);
        for (int64_t i = 0; i < count; i++)
            *loss += losses[i]; /* in order: the same bits for any number of threads */
        if (train) TRY(chunk_backward(llama, batch->rows + first, count));
    }
    llama->profile[PHASE_HEAD] += now() - begin;
    return 0;
}

int llama_logits(struct llama *llama, const struct batch *batch, float *logits)
{
    for (int64_t first = 0; first < batch->losses; first += llama->chunk) {
        const int64_t count = batch->losses - first < llama->chunk ? batch->losses - first : llama->chunk;
        TRY(chunk_logits(llama, batch->rows + first, count, logits + first * llama->config.vocabulary));
    }
    return 0;
}
