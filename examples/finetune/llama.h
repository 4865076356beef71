/* llama.h: a LLaMA-family model on top of plora.h: loss, its gradient with respect to the adapters, and greedy decoding.
 *
 *     x_0 = E[token];   per layer  mid = x + o(attention(q, k, v)),  q, k, v of RMSNorm(x)
 *                                  x'  = mid + down(silu(gate) up),  gate, up of RMSNorm(mid)
 *     logits = head(RMSNorm(x_L))
 *
 * Sequences are packed one after another; a batch needs no padding between them. Everything the backward needs lives in one
 * arena: per layer and token x, q, k, v, o, mid, gate, up (and the softmax's lse); what is cheap, norms and silu(gate) up, is
 * computed again. All of it is in the compute dtype; with bf16 the residual stream is bf16 too, as in transformers' bf16
 * models, because each product needs it in bf16 anyway and it is a fifth of the arena. */
#ifndef FINETUNE_LLAMA_H
#define FINETUNE_LLAMA_H

#include <stdint.h>

#include "config.h"
#include "plora.h"

struct llama;

/* T packed tokens, and the positions whose logits are compared with a target. */
struct batch {
    int64_t tokens, sequences, losses;
    int32_t *ids;       /* [T] */
    int32_t *positions; /* [T], from 0 in each sequence */
    int64_t *starts;    /* [sequences + 1] */
    int64_t *rows;      /* [losses] */
    int32_t *targets;   /* [losses] */
};

enum { LLAMA_TRAIN = 1, LLAMA_DROPOUT = 2 };

/* dtype: PLORA_F32 or PLORA_BF16, of activations and backbone. Weights of another dtype are converted once; of the same,
 * they stay in the mapped file. */
int llama_open(plora_context *context, const char *directory, int32_t dtype, int threads, struct llama **llama);
void llama_close(struct llama *llama);

const struct llama_config *llama_configuration(const struct llama *llama);
plora_model *llama_model(struct llama *llama);

/* Memory for batches of up to `tokens` tokens; training: room for the backward. adapters: of llama_model(). */
int llama_prepare(struct llama *llama, plora_adapters *adapters, int64_t tokens, int training);

/* Residual stream after the last layer. flags: LLAMA_TRAIN keeps what the backward needs. */
int llama_forward(struct llama *llama, const struct batch *batch, int flags);
/* *loss = sum of the cross entropies at batch->rows; with `train`, starts the backward of factor x that sum. */
int llama_loss(struct llama *llama, const struct batch *batch, int train, double factor, double *loss);
/* Adds the gradients of the adapters; after llama_forward(LLAMA_TRAIN ...) and llama_loss(train). */
int llama_backward(struct llama *llama, const struct batch *batch, int flags);
/* The logits at batch->rows, after llama_forward(): logits[losses, vocabulary] in fp32 (tests). */
int llama_logits(struct llama *llama, const struct batch *batch, float *logits);

/* Greedy continuations of `count` prompts at once: generated[i * most ..], lengths[i] <= most without the eos token. */
int llama_generate(struct llama *llama, int64_t count, const int32_t *const *prompts, const int64_t *prompt_lengths,
                   int64_t most, int64_t eos, int32_t *generated, int64_t *lengths);

/* Writes the model with its present weights, in the dtype of its files, to `path`; unchanged layers stay bit for bit. */
int llama_save(struct llama *llama, const char *directory, const char *path);

/* Useful FLOP of one training step over these sequences: no recomputation counted, causal attention counted as such. */
struct llama_flop {
    double backbone, head, adapters, attention;
};
struct llama_flop llama_count_flop(struct llama *llama, const struct batch *batch);

/* Seconds so far in library calls, attention, element-wise steps, head and loss. */
enum { PHASE_LINEAR, PHASE_ATTENTION, PHASE_ROWS, PHASE_HEAD, PHASES };
const double *llama_profile(const struct llama *llama);

#endif
