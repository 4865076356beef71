/* ptx.h: a module inside the emulator, and the state of a running block. Private to fatbin.c ... race.c.
 *
 *     module -> kernel -> op[]      an op: exec(), its operands as byte offsets into the warp's register file, line
 *     launch -> worker -> block -> warp[]
 *
 * A warp's register file is structure-of-arrays, so that gcc vectorises over the 32 lanes:
 *
 *     | %p0 %p1 ..          | %r0: 32 x 4 bytes | ... | %rd0: 32 x 8 bytes | ... | constants, special registers, same shapes |
 *       one bit for a lane    16-bit registers are kept here too, upper half 0       so every operand is an offset */
#ifndef EMULATOR_PTX_H
#define EMULATOR_PTX_H

#include "emulator.h"

#include <setjmp.h>

#define LANES 32
#define FULL 0xffffffffu
#define NONE 0xffffffffu /* an operand that is not there */
#define SINK 0xfffffffeu /* `_` as a destination */

/* Generic addresses that are not global. */
#define SHARED_WINDOW (UINT64_C(1) << 56)
#define LOCAL_WINDOW (UINT64_C(2) << 56)
#define PARAM_WINDOW (UINT64_C(3) << 56)
#define WINDOW(address) ((address)&UINT64_C(0xff) << 56)
#define SHARED_FIRST 1024u /* .shared addresses start here, so that 0 is not one */

typedef uint32_t u32 __attribute__((may_alias));
typedef int32_t s32 __attribute__((may_alias));
typedef uint64_t u64 __attribute__((may_alias));
typedef int64_t s64 __attribute__((may_alias));
typedef float f32 __attribute__((may_alias));
typedef double f64 __attribute__((may_alias));

struct warp;
struct op;
typedef void (*exec_fn)(struct warp *warp, const struct op *op, uint32_t mask);

enum control { STEP, BRANCH, SWITCH, EXIT, BARRIER, TRAP };
enum space { GENERIC, GLOBAL, SHARED, LOCAL, PARAM };

struct op {
    exec_fn exec;
    uint32_t r[6];        /* operands in the order of the text: byte offsets into the register file */
    uint32_t guard;       /* @p, or NONE */
    uint32_t guard_flip;  /* FULL for @!p */
    uint32_t control;     /* enum control */
    int32_t target;       /* BRANCH: op index */
    int32_t reconverge;   /* BRANCH: where the two sides meet again; kernel->ops for the end */
    int64_t immediate;    /* memory operands: the offset; others: what their exec says */
    uint32_t *list;       /* vector operands, one after the other; SWITCH: targets */
    uint16_t lists;       /* numbers in list */
    uint8_t width, count; /* memory: bytes an element, elements */
    uint8_t space, kind, flags;
    uint8_t wide;       /* bit i: operand i is a 64-bit register */
    uint8_t defs;       /* bit i: operand i is written */
    uint16_t list_defs; /* the first so many of list are written */
    uint32_t location;
    uint32_t line; /* in the PTX */
    char *text;
};

struct location {
    const char *file;
    int line, column;
    int outer; /* the location it was inlined to, -1 if it was not */
};

enum symbol_kind { SYMBOL_GLOBAL, SYMBOL_SHARED, SYMBOL_DYNAMIC, SYMBOL_LOCAL, SYMBOL_PARAM };
struct symbol {
    struct symbol *next;
    char *name;
    enum symbol_kind kind;
    size_t bytes, align;
    uint64_t address;
};

/* A register before it has a place in the file (ops name registers by number until graph.c has run). */
struct reg {
    char class; /* p, w, d */
    bool fixed; /* constants and special registers: never shared */
    uint32_t offset;
};

/* What is set before a kernel starts: constants once a launch, special registers once a block. */
struct constant {
    uint32_t reg;
    char class;
    uint64_t value;
    const struct symbol *symbol; /* added to the value */
};
enum special {
    TID_X,
    TID_Y,
    TID_Z,
    NTID_X,
    NTID_Y,
    NTID_Z,
    CTAID_X,
    CTAID_Y,
    CTAID_Z,
    NCTAID_X,
    NCTAID_Y,
    NCTAID_Z,
    LANEID,
    WARPID,
    LANEMASK_EQ,
    LANEMASK_LT,
    LANEMASK_LE,
    LANEMASK_GT,
    LANEMASK_GE,
    DYNAMIC_SMEM,
    TOTAL_SMEM,
    CLOCK,
    CLOCK64,
    SPECIALS
};

struct emu_kernel {
    struct emu_kernel *next;
    struct emu_module *module;
    char *name;
    struct symbol *symbols; /* parameters, shared, local */
    struct {
        size_t offset, bytes;
    } parameter[64];
    int parameters;
    size_t parameter_bytes, local_bytes, shared_bytes; /* local: a thread */
    size_t shared_end;      /* shared bytes with the gaps between variables that the checks use */
    size_t dynamic_address; /* where dynamic shared memory starts */
    int max_threads, live_registers;
    struct op *op;
    int ops;
    struct location *location;
    int locations;
    struct constant *constant;
    int constants;
    uint32_t special[SPECIALS]; /* registers, NONE if not used */
    struct reg *reg;
    uint32_t regs;
    uint32_t register_bytes;
};

struct emu_module {
    struct emu_kernel *kernels;
    struct symbol *symbols;
    char **file;
    int files, sm;
    size_t constant_bytes;
};

/* ----------------------------------------------------------------------------------------------------------- execution */
struct frame {
    uint32_t pc, mask, reconverge;
};

/* A cp.async under way: its bytes were read when it was issued, and land at the wait. */
struct transfer {
    uint32_t lane, group, address, bytes;
    uint8_t data[16];
};

enum warp_state { RUNNING, WAITING, DONE };

struct warp {
    uint8_t *reg;
    uint32_t pc, mask, live; /* active lanes; lanes that have not exited */
    enum warp_state state;
    int index;
    uint32_t depth;
    struct frame *stack;
    uint32_t stack_size;
    struct block *block;
    uint32_t sync; /* how many warp-level synchronisations it has passed */
    const struct op *op;
    uint32_t barrier, expected; /* WAITING: which, threads it waits for */
    uint32_t votes;             /* bar.red: this warp's predicate */
    uint8_t *local, *local_state;
    struct transfer *transfer;
    uint32_t transfers, transfer_size;
    uint32_t group[LANES]; /* cp.async groups committed */
    uint64_t steps;
};

/* Per 4 bytes of shared memory: the last write and the last read. */
struct trace {
    uint64_t writer, reader;
};

struct block {
    struct launch *launch;
    const struct emu_kernel *kernel;
    uint32_t index[3];
    uint32_t id;     /* in order of execution, over all launches: the global race records */
    uint32_t phase;  /* fences so far */
    uint64_t fenced; /* see race.c */
    struct warp *warp;
    int warps;
    uint32_t warps_made; /* by the largest launch so far: they keep their stacks */
    uint8_t *shared, *shared_state;
    struct trace *trace;
    uint64_t epoch; /* barriers so far */
    size_t shared_size;
    uint32_t exited; /* threads */
    jmp_buf fault;
    int error;
    struct emu_random random;
    uint8_t *pool;
    size_t pool_size;
};

struct launch {
    const struct emu_launch *request;
    const struct emu_kernel *kernel;
    uint32_t threads, warps;
    bool many_blocks, many_workers;
    uint32_t first_id; /* of this launch's blocks */
    uint32_t *order;   /* blocks, shuffled */
    uint32_t blocks;
    uint32_t next; /* taken by workers atomically */
    int error;
    struct release *release; /* per block: race.c */
    uint64_t clock;
    size_t shared_size;
};

/* traffic.c */
extern bool traffic_on;
void traffic_count(const uint64_t *address, uint32_t mask, bool write);
void traffic_launch_ends(const struct emu_launch *launch);

static inline void *lane_reg(const struct warp *warp, uint32_t offset)
{
    return warp->reg + offset;
}
static inline uint32_t predicate(const struct warp *warp, uint32_t offset)
{
    return *(const u32 *)(const void *)(warp->reg + offset);
}
static inline void set_predicate(struct warp *warp, uint32_t offset, uint32_t mask, uint32_t value)
{
    if (offset == SINK) return;
    u32 *p = (u32 *)(void *)(warp->reg + offset);
    *p = (*p & ~mask) | (value & mask);
}

/* parse.c */
struct emu_module *parse_module(const char *text, char *message, size_t message_size);

/* One instruction as parse.c reads it, and decode.c turns it into an op. */
enum operand_kind { REGISTER, VECTOR, MEMORY, LABEL, DISCARD };
struct operand {
    enum operand_kind kind;
    uint32_t reg;     /* REGISTER; MEMORY: the address. Immediates and symbols are constant registers by now */
    uint32_t second;  /* p|q: q, else NONE */
    bool negated;     /* !p */
    bool is_constant; /* REGISTER: an immediate ... */
    int64_t value;    /* ... of this value; MEMORY: the offset */
    const struct symbol *symbol;
    const char *label;
    uint32_t element[16]; /* VECTOR */
    int elements;
};
struct statement {
    const char *opcode;
    struct operand operand[8];
    int operands;
    uint32_t guard;
    bool guard_negated;
    int line;
};
struct parser;
/* Never returns: parse_module fails with the message and the line. */
_Noreturn void parse_error(struct parser *parser, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* The register that holds a constant of class w or d. */
uint32_t parse_constant(struct parser *parser, char class, uint64_t value, const struct symbol *symbol);
/* The class of a register. */
char parse_class(const struct parser *parser, uint32_t reg);
/* The op whose label this is, once known: the decoder leaves a note. */
int32_t parse_label(struct parser *parser, const char *name);

/* decode.c */
void decode(struct parser *parser, const struct statement *statement, struct op *op);

/* fatbin.c: a malloc'ed, 0-terminated copy. */
char *fatbin_ptx(const void *image, int sm, char *message, size_t message_size);
/* graph.c: reconvergence points, live registers, places in the register file. */
void graph_build(struct emu_kernel *kernel);

/* report.c: a finding at the instruction that runs. */
void find_at(const struct warp *warp, int lane, const char *what, const char *format, ...)
    __attribute__((format(printf, 4, 5)));
/* ... and the end of the kernel with this error code. */
_Noreturn void fault_at(struct warp *warp, int lane, int error, const char *what, const char *format, ...)
    __attribute__((format(printf, 5, 6)));

/* memory.c: what kernels' accesses look at. One byte of state for a byte of device memory. */
enum state { LIVE = 1, SET = 2, FLYING = 4, FREED = 8 };
struct memory {
    uint64_t base, size; /* of the device range */
    uint8_t *bytes;      /* the second mapping */
    uint8_t *state;
    uint32_t *writer, *reader; /* race records, one for 4 bytes */
};
extern struct memory emu_memory;
void memory_open(void);
bool memory_host_ok(uint64_t address, size_t bytes);
/* "; 12 bytes past the end of the 4096 bytes at 0x..." */
void memory_describe(uint64_t address, size_t bytes, char *text, size_t size);

bool memory_was_freed(uint64_t address);

/* race.c: global memory between blocks. Records: block id << 8 | flag 0x80 | phase << 4 | bytes of the word. */
struct release {
    uint32_t phase;    /* what the block wrote before this phase is released */
    uint64_t released; /* when */
    uint64_t acquired; /* its last atomic */
};
#define RACE_FLAG 0x80u /* writer: an atomic; reader: several blocks */
#define RACE_PHASES 7u
void race_read_found(struct warp *warp, int lane, uint64_t address, uint32_t record);
void race_write_found(struct warp *warp, int lane, uint64_t address, uint32_t writer, uint32_t reader,
                      const void *value);
void race_atomic(struct warp *warp, int lane, uint64_t address, uint32_t bytes);
uint32_t race_take_ids(uint32_t blocks);

/* shared.c: shared memory between the threads of a block. The bytes are in bounds and aligned. */
void shared_read(struct warp *warp, int lane, uint32_t address, uint32_t bytes);
/* value: what is written, NULL if it is not known yet (cp.async) */
void shared_write(struct warp *warp, int lane, uint32_t address, uint32_t bytes, const void *value);
/* A read by all lanes in which nothing is to be found: at[] and true. */
bool shared_read_lanes(struct warp *warp, const uint64_t *address, uint32_t bytes, uint8_t **at);
void shared_atomic(struct warp *warp, int lane, uint32_t address, uint32_t bytes);
/* 32 lanes side by side: records them and is true when no one else has been there since the last barrier. */
bool shared_span_recorded(struct warp *warp, uint32_t address, uint32_t bytes, bool write);

/* access.c: the bytes an access means, checked and recorded. */
enum use { USE_READ, USE_WRITE, USE_ATOMIC };
uint8_t *access_bytes(struct warp *warp, int lane, enum space space, uint64_t address, uint32_t bytes, enum use use,
                      const void *value);

/* The instructions: a table for each file, found by name. */
struct form {
    const char *name;
    /* one letter an operand: w, d, p: 32-bit, 64-bit and predicate registers (h: 16-bit, kept as w); P: a predicate or nothing */
    const char *operands;
    exec_fn exec;
};
const struct form *alu_form(const char *name);
void alu_rounded(struct warp *warp, const struct op *op, uint32_t mask);

/* convert.c: op->kind from, op->flags to, op->count rounding, op->width 1 for .sat; the quick exec if there is one. */
enum number { U8, S8, U16, S16, U32, S32, U64, S64, F16, BF16, NUMBER_F32, NUMBER_F64, TF32 };
enum rounding { NEAREST, ZERO, DOWN, UP, AWAY };
exec_fn convert_exec(enum number to, enum number from, enum rounding rounding, bool saturate);
void convert_pair(struct warp *warp, const struct op *op, uint32_t mask); /* cvt.rn.{b,}f16x2.f32 d, high, low */
uint32_t bf16_of(float x);
uint32_t f16_of(double x);
float f16_value(uint32_t bits);
void f16_values(const uint16_t *from, float *to, int count);

/* access.c */
enum atomic { ATOM_ADD, ATOM_MIN, ATOM_MAX, ATOM_AND, ATOM_OR, ATOM_XOR, ATOM_EXCH, ATOM_CAS, ATOM_INC, ATOM_DEC };
void exec_load(struct warp *warp, const struct op *op, uint32_t mask);
void exec_load_param(struct warp *warp, const struct op *op, uint32_t mask);
void exec_store(struct warp *warp, const struct op *op, uint32_t mask);
void exec_atomic(struct warp *warp, const struct op *op, uint32_t mask);
void exec_fence(struct warp *warp, const struct op *op, uint32_t mask);
void exec_cp_async(struct warp *warp, const struct op *op, uint32_t mask);
void exec_cp_commit(struct warp *warp, const struct op *op, uint32_t mask);
void exec_cp_wait(struct warp *warp, const struct op *op, uint32_t mask);

/* across.c: between the lanes of a warp. op->kind as named there. */
enum shuffle { SHFL_UP, SHFL_DOWN, SHFL_BFLY, SHFL_IDX };
enum vote { VOTE_ALL, VOTE_ANY, VOTE_UNI, VOTE_BALLOT };
void exec_shuffle(struct warp *warp, const struct op *op, uint32_t mask);
void exec_vote(struct warp *warp, const struct op *op, uint32_t mask);
void exec_redux(struct warp *warp, const struct op *op, uint32_t mask);
void exec_match(struct warp *warp, const struct op *op, uint32_t mask);
void exec_active(struct warp *warp, const struct op *op, uint32_t mask);
void exec_sync_warp(struct warp *warp, const struct op *op, uint32_t mask);

/* mma.c */
void exec_ldmatrix(struct warp *warp, const struct op *op, uint32_t mask);
void exec_mma(struct warp *warp, const struct op *op, uint32_t mask);

#endif
