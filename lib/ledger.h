/* ledger.h: the ledger's handle, and what an unload and a checkpoint need of it. The bytes are ledger_file.h's. */
#ifndef PLORA_LEDGER_H
#define PLORA_LEDGER_H

#include "ledger_file.h"

struct plora_ledger {
    plora_adapters *adapters;
    plora_model *original; /* NULL = the model's own files, if it has any */
    int32_t hash_weights;
    int64_t position; /* the weights hold the records 0 .. position - 1; -1 = something else */
    struct plora__ledger_store store;
    uint64_t *weight_hashes; /* [adapter_count]: of the present weights, when hashes_known */
    int32_t hashes_known;
    unsigned char *buffer; /* file form: a record and the room for its mark */
    size_t buffer_bytes;
};

/* ledger.c: makes the stage durable, before the first weight changes. On an error nothing has changed. */
plora_status plora__ledger_append(plora_ledger *ledger, const plora_unload_options *options, void *stream);
/* The merges of what was appended are done. */
void plora__ledger_commit(plora_ledger *ledger, void *stream);
/* The hash of a weight's rows, one after the other, and then of its residual's, unless that is NULL or all 0. */
plora_status plora__ledger_hash_weight(const plora_context *context, const plora_matrix *weight,
                                       const plora_matrix *residual, uint64_t *hash);
/* Of all present weights, into weight_hashes; and one hash over these. */
plora_status plora__ledger_hash_weights(plora_ledger *ledger);
uint64_t plora__ledger_combined_hash(const plora_ledger *ledger);

/* ledger_replay.c: weights rebuilt. prepare() checks everything and gets what run() needs; free() in any case. */
struct plora__replay {
    plora_ledger *ledger;
    plora_model *original; /* to begin with; NULL = the present weights, at `from` records */
    int64_t from, to;
    void *workspace, *factors; /* device */
    void *host_workspace;
    size_t workspace_bytes, factor_bytes, host_workspace_bytes;
};
plora_status plora__replay_prepare(plora_ledger *ledger, int64_t to, struct plora__replay *replay);
plora_status plora__replay_run(struct plora__replay *replay);
void plora__replay_free(struct plora__replay *replay);

#endif
