/* ledger_file.h: the stage ledger as bytes, in a file or in memory, and what keeps them safe. docs/ledger.md is the description
 * for other programs.
 *
 *     | header 64 | layers 64 each | names |pad| record 0 | mark 0 | record 1 | mark 1 | ...            little-endian
 *       record = | head 128 | entries 32 each |pad| A_0 [R,K] |pad| B_0 [N,R] |pad| A_1 ... |pad|      fp32, row-major
 *
 * Every part begins at a multiple of 64 bytes and is under a hash, padding included. A record and the room for its mark are
 * appended by one write, then synced; the mark is written when the record is known to be durable and the weights hold it. So what
 * lies at the end of a file is told apart: a bad record with no mark behind it was never finished, and is cut off; a bad record
 * with a mark behind it was damaged later, and is an error. */
#ifndef PLORA_LEDGER_FILE_H
#define PLORA_LEDGER_FILE_H

#include "handles.h"

enum { PLORA__LEDGER_VERSION = 1, PLORA__LEDGER_MARK_BYTES = 64 };

struct plora__ledger_header {
    char magic[8]; /* "PLORALED" */
    uint32_t version;
    uint32_t layer_count;
    uint64_t bytes; /* of header, layers, names and padding: where record 0 begins */
    uint64_t table_hash;
    uint64_t reserved[3];
    uint64_t hash; /* of all before it; also the lineage before record 0 */
};

/* One adapted weight, under the name of its first layer. */
struct plora__ledger_layer {
    uint64_t name_offset; /* from the beginning of the file; the name ends in '\0' */
    uint32_t name_bytes;
    int32_t dtype;
    int64_t in_features, out_features;
    int32_t fan_in_fan_out;
    int32_t gathered;     /* of a shard: N and K are those of the whole, as A and B are */
    uint64_t weight_hash; /* of W_0 */
    /* Of a shard: its element (i, j) in memory is number first_element + i * row_elements + j of the whole. Both 0: it is whole. */
    int64_t first_element, row_elements;
};

enum { PLORA__LEDGER_HASHED = 1, PLORA__LEDGER_FOLDED = 2 };

struct plora__ledger_record {
    char magic[8];  /* "PLORAREC" */
    uint64_t bytes; /* head and payload; the mark follows */
    int64_t index;
    int64_t stage; /* of the adapter that was unloaded */
    double momentum;
    uint64_t seed;
    int32_t rounding;
    uint32_t flags; /* HASHED: the entries hold weight hashes; FOLDED: made by plora_ledger_compact() */
    uint32_t layer_count;
    uint32_t reserved;
    uint64_t lineage_before;
    uint64_t table_hash; /* of the entries and their padding */
    uint64_t folded;     /* FOLDED: how many, the norm of their sum, and of what it lacks at most */
    double fold_norm, fold_lost;
    uint64_t reserved2;
    uint64_t lineage_after; /* hash of all before it */
    uint64_t hash;          /* of all before it */
};

struct plora__ledger_entry {
    double scale;          /* s: the record adds momentum s B A */
    uint64_t factors_hash; /* of A, B and their padding */
    uint64_t weight_hash;  /* of W before */
    int32_t rank;
    int32_t reserved2;
};

struct plora__ledger_mark {
    char magic[8]; /* "PLORAMRK" */
    int64_t index;
    uint64_t offset, bytes, lineage; /* of its record */
    uint64_t weights_hash;           /* over the hashes of all weights after the merge */
    uint32_t flags;                  /* PLORA__LEDGER_HASHED */
    uint32_t reserved;
    uint64_t hash;
};

/* Where a record is. */
struct plora__ledger_slot {
    uint64_t offset; /* in the file; in memory as if there were one */
    uint64_t bytes;
    uint64_t lineage; /* after it */
    void *memory;     /* the memory form's own block, mark included */
};

struct plora__ledger_store {
    plora_context *context;
    char *path; /* NULL = in memory */
    int descriptor;
    int32_t sync;
    int32_t unmarked;      /* the last record waits for its mark */
    int32_t dirty;         /* an append failed, and what it left behind could not be cut off */
    unsigned char *header; /* a copy */
    uint64_t header_bytes;
    struct plora__ledger_slot *slots;
    int64_t count, capacity;
    uint64_t end; /* where the next record goes */
    uint64_t cut; /* bytes of a torn tail that opening cut off */
    unsigned char *map;
    size_t map_bytes;
};

/* Begins a ledger with a copy of the sealed header: in memory, or as a file that is created whole or not at all. Where the file
 * exists already it is read: then store->header is the file's, for the caller to compare. On an error nothing is left open. */
plora_status plora__ledger_store_open(plora_context *context, const char *path, int32_t sync,
                                      const unsigned char *header, struct plora__ledger_store *store);
void plora__ledger_store_close(struct plora__ledger_store *store);

/* The bytes of a header with so many layers, and with so many bytes of names, terminators included. */
uint64_t plora__ledger_header_bytes(uint32_t layer_count, uint64_t name_bytes);
/* Fills in what depends on the rest. `header` holds layers and names already, and zeros elsewhere. */
void plora__ledger_header_seal(unsigned char *header, uint32_t layer_count, uint64_t bytes);
uint32_t plora__ledger_layer_count(const unsigned char *header);
const struct plora__ledger_layer *plora__ledger_layers(const unsigned char *header);

/* Bytes of a record before its factors, and where those of layer `number` begin in it. */
uint64_t plora__ledger_table_bytes(uint32_t layer_count);
uint64_t plora__ledger_factor_offset(const unsigned char *header, const struct plora__ledger_record *record,
                                     uint32_t number, int is_b);
const struct plora__ledger_entry *plora__ledger_entries(const struct plora__ledger_record *record);
/* Fills in what depends on the rest: magic, index, lineages and hashes of a record whose head and ranks are complete. `factors` are
 * all A and B in their order, padded; they go to `copy`, too, unless it is NULL. */
void plora__ledger_record_seal(const struct plora__ledger_store *store, struct plora__ledger_record *record,
                               const float *factors, float *copy);
/* Lineage after `count` records. */
uint64_t plora__ledger_lineage(const struct plora__ledger_store *store, int64_t count);

/* Appends a sealed record, of which `record` has head and entries: durable when this returns, or nothing has changed. The memory form
 * takes the block of `record` over, which then has the factors and room for the mark behind them. */
plora_status plora__ledger_append_record(struct plora__ledger_store *store, struct plora__ledger_record *record,
                                         const float *factors);
/* Writes the last record's mark. */
plora_status plora__ledger_write_mark(struct plora__ledger_store *store, uint32_t flags, uint64_t weights_hash);
/* Drops the records from `count` on. */
plora_status plora__ledger_cut(struct plora__ledger_store *store, int64_t count);

/* A record and its mark; valid until the next append or cut. */
plora_status plora__ledger_record_get(struct plora__ledger_store *store, int64_t index,
                                      const struct plora__ledger_record **record,
                                      const struct plora__ledger_mark **mark);
/* Checks a record's bytes again. */
plora_status plora__ledger_record_check(struct plora__ledger_store *store, int64_t index);

/* Checks all of a ledger's bytes and lists its records in the store. Pure: for opening and for the fuzzer. */
plora_status plora__ledger_scan(struct plora__ledger_store *store, const unsigned char *bytes, uint64_t count);
void plora__ledger_lists_free(struct plora__ledger_store *store);

#endif
