/* llama_private.h: the model behind llama.h, shared by llama.c (passes), weights.c (opening, saving), head.c and generate.c. */
#ifndef FINETUNE_LLAMA_PRIVATE_H
#define FINETUNE_LLAMA_PRIVATE_H

#include "attention.h"
#include "llama.h"
#include "rows.h"
#include "util.h"

enum { Q, K, V, O, GATE, UP, DOWN, LINEARS };
enum { ROW_BLOCK = 16 }; /* rows of one piece of element-wise work */

/* Rows of logits at a time, at most. Fewer would make each product read the whole vocabulary for too little work. */
enum { LOGIT_ROWS = 256 };

/* Rows of a batch are rounded up to this, so that the products meet few shapes. The rows added have zero gradients. */
enum { TOKEN_MULTIPLE = 32 };

struct slot { /* activations of one layer, [T, ...] */
    void *x, *q, *k, *v, *o, *middle, *gate, *up;
    float *lse;
};

struct layer {
    int32_t linear[LINEARS]; /* indices in the model */
    float *attention_norm, *mlp_norm;
};

struct llama {
    struct llama_config config;
    plora_context *context;
    plora_model *model;
    plora_adapters *adapters; /* the host's */
    int32_t dtype;
    int threads;
    const struct row_kernels *rows;
    struct attention *attention;
    struct layer *layers;
    float *norms; /* all of them, in fp32 */
    float *final_norm;
    plora_matrix embedding;
    int32_t head;  /* layer of the logits: lm_head or the tied embedding */
    int converted; /* weights live in `weights`, not in mapped files */
    void *weights;
    size_t weights_bytes;
    float *cosine, *sine; /* [positions, D / 2] */
    int64_t positions;

    int64_t capacity; /* tokens */
    int64_t slots;
    void *arena;
    size_t arena_bytes;
    float *lse;
    struct slot *slot;
    void *final;                                      /* x after the last layer */
    void *normal, *hidden, *d_hidden, *dx, *d_normal; /* scratch: [T,d] [T,I] [T,I] [T,d] [T,d] */
    int64_t chunk;                                    /* rows of logits at a time */
    float *logits;
    void *d_logits, *head_x, *head_normal, *head_d;
    double profile[PHASES];
};

struct slot *llama_slot(struct llama *llama, int64_t layer, int train);
plora_matrix llama_matrix(const struct llama *llama, void *data, int64_t rows, int64_t columns);
int llama_linear(struct llama *llama, int64_t layer, int which, int64_t rows, void *x, void *y, uint32_t flags);
/* Embeds the tokens and leaves the first layer's RMSNorm(x) in llama->normal; then one layer after another. */
int llama_forward_begin(struct llama *llama, const struct batch *batch, int train);
int llama_layer_forward(struct llama *llama, const struct batch *batch, int64_t layer, int train, uint32_t flags);
int llama_rope_tables(struct llama *llama, int64_t positions);
void llama_norm(struct llama *llama, int64_t rows, const void *x, const void *add, void *sum, const float *w, void *y);
void llama_embed(struct llama *llama, int64_t rows, const int32_t *ids, int64_t count, void *x);
void llama_rotate(struct llama *llama, int64_t rows, const int32_t *positions, void *q, void *k);
void llama_gate(struct llama *llama, int64_t count, const void *gate, const void *up, void *h);
/* Linear sizes of layer part `which`. */
int64_t llama_inputs(const struct llama_config *config, int which);
int64_t llama_outputs(const struct llama_config *config, int which);

#endif
