/* decode.c: one statement -> one op: which exec, which operands. The arithmetic comes from alu.c's table by its name without
 * the modifiers that change nothing here; the rest is told apart by its first word. An instruction or a modifier that is not
 * known is an error at load. */
#include "ptx.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct decoder {
    struct parser *parser;
    const struct statement *s;
    struct op *op;
    char word[16][24]; /* the opcode cut at its dots */
    int words;
};

/* ---------------------------------------------------------------------------------------------------------- the words */
static void split(struct decoder *d)
{
    for (const char *c = d->s->opcode; *c;) {
        const size_t n = strcspn(c, ".");
        if (d->words == 16 || n >= sizeof d->word[0]) parse_error(d->parser, "opcode %s is too long", d->s->opcode);
        memcpy(d->word[d->words], c, n);
        d->word[d->words++][n] = 0;
        c += n + (c[n] == '.');
    }
}

static bool is(const struct decoder *d, int i, const char *word)
{
    return i < d->words && strcmp(d->word[i], word) == 0;
}

static void drop_at(struct decoder *d, int at)
{
    memmove(d->word[at], d->word[at + 1], sizeof d->word[0] * (size_t)(d->words - at - 1));
    --d->words;
}

/* Removes a word behind the first; says whether it was there. */
static bool drop(struct decoder *d, const char *word)
{
    for (int i = 1; i < d->words; ++i) {
        if (strcmp(d->word[i], word) != 0) continue;
        drop_at(d, i);
        return true;
    }
    return false;
}

static void drop_all(struct decoder *d, const char *const *word)
{
    for (; *word; ++word)
        drop(d, *word);
}

static int pick(struct decoder *d, const char *word, const char *const *names)
{
    for (int i = 0; names[i]; ++i)
        if (strcmp(names[i], word) == 0) return i;
    parse_error(d->parser, "%s: %s is not known here", d->s->opcode, word);
}

_Noreturn static void unknown(struct decoder *d)
{
    parse_error(d->parser, "instruction %s is not known here", d->s->opcode);
}

/* -------------------------------------------------------------------------------------------------------- the operands */
static void want_operands(struct decoder *d, int least, int most)
{
    if (d->s->operands < least || d->s->operands > most)
        parse_error(d->parser, "%s has %d operands", d->s->opcode, d->s->operands);
}

/* Operand `from` of the statement becomes op->r[to], of class w, d or p. Class '*': whatever register it is, or w. */
static void take(struct decoder *d, int to, int from, char class)
{
    const struct operand *o = &d->s->operand[from];
    if (from >= d->s->operands) parse_error(d->parser, "%s: operand %d is missing", d->s->opcode, from + 1);
    if (o->kind == DISCARD) {
        d->op->r[to] = SINK;
        return;
    }
    if (o->kind == LABEL) parse_error(d->parser, "%s: %s is not known", d->s->opcode, o->label);
    if (o->kind != REGISTER) parse_error(d->parser, "%s: operand %d should be a register", d->s->opcode, from + 1);
    if (o->is_constant)
        d->op->r[to] = parse_constant(d->parser, class == '*' ? 'w' : class, (uint64_t)o->value, o->symbol);
    else
        d->op->r[to] = o->reg;
    const char is_class = parse_class(d->parser, d->op->r[to]);
    if (class != '*' && is_class != class)
        parse_error(d->parser, "%s: operand %d is of another size", d->s->opcode, from + 1);
    if (is_class == 'd') d->op->wide |= (uint8_t)(1u << to);
}

static void take_destination(struct decoder *d, int to, int from, char class)
{
    take(d, to, from, class);
    if (d->op->r[to] != SINK) d->op->defs |= (uint8_t)(1u << to);
}

/* [address]: the register into op->r[to], the offset into op->immediate. */
static void take_address(struct decoder *d, int to, int from)
{
    const struct operand *o = &d->s->operand[from];
    if (from >= d->s->operands || o->kind != MEMORY)
        parse_error(d->parser, "%s: operand %d should be an address", d->s->opcode, from + 1);
    if (o->is_constant) {
        d->op->r[to] = parse_constant(d->parser, 'd', (uint64_t)o->value, o->symbol);
    } else {
        d->op->r[to] = o->reg;
        d->op->immediate = o->value;
    }
    if (parse_class(d->parser, d->op->r[to]) == 'd') d->op->wide |= (uint8_t)(1u << to);
}

/* Appends {a, b ..}, or one register, to op->list. */
static void take_list(struct decoder *d, int from, int count, char class, bool written)
{
    const struct operand *o = &d->s->operand[from];
    if (from >= d->s->operands) parse_error(d->parser, "%s: operand %d is missing", d->s->opcode, from + 1);
    const int have = o->kind == VECTOR ? o->elements : 1;
    if (have != count) parse_error(d->parser, "%s: operand %d should have %d elements", d->s->opcode, from + 1, count);
    struct op *op = d->op;
    op->list = realloc(op->list, sizeof *op->list * (size_t)(op->lists + count));
    for (int i = 0; i < count; ++i) {
        uint32_t reg;
        if (o->kind == VECTOR)
            reg = o->element[i];
        else if (o->is_constant)
            reg = parse_constant(d->parser, class == '*' ? 'w' : class, (uint64_t)o->value, o->symbol);
        else
            reg = o->kind == DISCARD ? SINK : o->reg;
        if (reg == SINK && !written) parse_error(d->parser, "%s: _ as a source", d->s->opcode);
        if (reg != SINK && class != '*' && parse_class(d->parser, reg) != class)
            parse_error(d->parser, "%s: operand %d is of another size", d->s->opcode, from + 1);
        op->list[op->lists++] = reg;
    }
    if (written) op->list_defs = op->lists;
}

static int64_t take_number(struct decoder *d, int from)
{
    const struct operand *o = &d->s->operand[from];
    if (from >= d->s->operands || o->kind != REGISTER || !o->is_constant || o->symbol)
        parse_error(d->parser, "%s: operand %d should be a number", d->s->opcode, from + 1);
    return o->value;
}

/* --------------------------------------------------------------------------------------------------------- arithmetic */
static const char *const TYPES[] = {"u8",   "s8",  "u16", "s16",  "u32", "s32", "u64", "s64", "f16",
                                    "bf16", "f32", "f64", "tf32", "b8",  "b16", "b32", "b64", NULL};
static const uint8_t TYPE_BYTES[] = {1, 1, 2, 2, 4, 4, 8, 8, 2, 2, 4, 8, 4, 1, 2, 4, 8};

static void name_of(const struct decoder *d, char *name, size_t size)
{
    size_t used = 0;
    for (int i = 0; i < d->words && used < size; ++i)
        used += (size_t)snprintf(name + used, size - used, "%s%s", i ? "." : "", d->word[i]);
}

/* The rounding modes but .rn go through alu_rounded. */
static void arithmetic(struct decoder *d)
{
    static const char *const ROUNDING[] = {"rn", "rz", "rm", "rp"};
    int rounding = 0;
    for (int i = 0; i < 4; ++i)
        if (drop(d, ROUNDING[i])) rounding = i;
    bool approximate = false;
    for (int i = 1; i < d->words; ++i)
        approximate |= is(d, i, "approx") || is(d, i, "full");
    if (approximate) drop(d, "ftz"); /* their last bits are not specified anyway */
    struct op *op = d->op;
    int last = d->s->operands;
    if (is(d, 0, "setp") && d->words == 4) {
        static const char *const BOOLS[] = {"none", "and", "or", "xor", NULL};
        op->kind = (uint8_t)pick(d, d->word[2], BOOLS);
        drop_at(d, 2);
    }
    char name[128];
    name_of(d, name, sizeof name);
    const struct form *form = alu_form(name);
    if (!form) unknown(d);
    op->exec = form->exec;
    int from = 0;
    for (int to = 0; form->operands[to]; ++to) {
        const char letter = form->operands[to];
        if (letter == 'Q') {
            op->r[to] = d->s->operand[from - 1].second;
            if (op->r[to] == SINK) op->r[to] = NONE;
            if (op->r[to] != NONE) op->defs |= (uint8_t)(1u << to);
        } else if (letter == 'P') {
            if (from == last) break;
            op->flags = d->s->operand[from].negated;
            take(d, to, from++, 'p');
        } else {
            if (d->s->operand[from].negated && from < last) parse_error(d->parser, "! is not known here");
            to == 0 ? take_destination(d, to, from, letter) : take(d, to, from, letter);
            ++from;
        }
    }
    if (from != last || (op->kind && op->r[4] == NONE))
        parse_error(d->parser, "%s has %d operands", d->s->opcode, last);
    if (rounding && (strstr(name, "f32") || strstr(name, "f64"))) {
        op->kind = (uint8_t)rounding;
        op->immediate = (int64_t)(intptr_t)op->exec;
        op->exec = alu_rounded;
    }
}

/* mov.b32 d, {low, high} and mov.b64 {low, high}, a: op->width bytes an element. */
static void exec_pack(struct warp *warp, const struct op *op, uint32_t mask)
{
    for (int i = 0; i < LANES; ++i) {
        if (!(mask >> i & 1)) continue;
        uint64_t value = 0;
        for (int e = 0; e < op->lists; ++e) {
            const uint64_t part = ((u32 *)lane_reg(warp, op->list[e]))[i];
            value |= (op->width == 2 ? part & 0xffff : part) << 8 * op->width * e;
        }
        if (op->wide & 1)
            ((u64 *)lane_reg(warp, op->r[0]))[i] = value;
        else
            ((u32 *)lane_reg(warp, op->r[0]))[i] = (uint32_t)value;
    }
}
static void exec_unpack(struct warp *warp, const struct op *op, uint32_t mask)
{
    for (int i = 0; i < LANES; ++i) {
        if (!(mask >> i & 1)) continue;
        const uint64_t value =
            op->wide & 1 ? ((u64 *)lane_reg(warp, op->r[0]))[i] : ((u32 *)lane_reg(warp, op->r[0]))[i];
        for (int e = 0; e < op->lists; ++e) {
            const uint64_t part = value >> 8 * op->width * e;
            if (op->list[e] != SINK)
                ((u32 *)lane_reg(warp, op->list[e]))[i] = (uint32_t)(op->width == 2 ? part & 0xffff : part);
        }
    }
}

static void move(struct decoder *d)
{
    const bool pack = d->s->operand[1].kind == VECTOR, unpack = d->s->operand[0].kind == VECTOR;
    if (!pack && !unpack) {
        arithmetic(d);
        return;
    }
    want_operands(d, 2, 2);
    const int bytes = TYPE_BYTES[pick(d, d->word[d->words - 1], TYPES)];
    const int elements = d->s->operand[pack].elements;
    struct op *op = d->op;
    op->width = (uint8_t)(bytes / elements);
    if (op->width != 2 && op->width != 4) unknown(d);
    take_list(d, pack, elements, 'w', unpack);
    pack ? take_destination(d, 0, 0, bytes == 8 ? 'd' : 'w') : take(d, 0, 1, bytes == 8 ? 'd' : 'w');
    op->exec = pack ? exec_pack : exec_unpack;
}

/* cvt[.rounding][.sat].to.from */
static void convert(struct decoder *d)
{
    static const struct {
        const char *word;
        enum rounding rounding;
    } ROUND[] = {{"rn", NEAREST},  {"rz", ZERO},  {"rm", DOWN},  {"rp", UP}, {"rna", AWAY},
                 {"rni", NEAREST}, {"rzi", ZERO}, {"rmi", DOWN}, {"rpi", UP}};
    struct op *op = d->op;
    enum rounding rounding = ZERO;
    for (size_t i = 0; i < sizeof ROUND / sizeof ROUND[0]; ++i)
        if (drop(d, ROUND[i].word)) rounding = ROUND[i].rounding;
    const bool saturate = drop(d, "sat") || drop(d, "satfinite");
    if (d->words != 3) unknown(d);
    if (is(d, 1, "f16x2") || is(d, 1, "bf16x2")) {
        if (!is(d, 2, "f32") || rounding != NEAREST || saturate) unknown(d);
        want_operands(d, 3, 3);
        for (int i = 0; i < 3; ++i)
            i ? take(d, i, i, 'w') : take_destination(d, 0, 0, 'w');
        op->kind = is(d, 1, "bf16x2");
        op->exec = convert_pair;
        return;
    }
    const int to = pick(d, d->word[1], TYPES), from = pick(d, d->word[2], TYPES);
    if (to > TF32 || from >= TF32) unknown(d);
    want_operands(d, 2, 2);
    take_destination(d, 0, 0, '*');
    take(d, 1, 1, d->s->operand[1].is_constant && TYPE_BYTES[from] == 8 ? 'd' : '*');
    if ((TYPE_BYTES[to] == 8 && !(op->wide & 1)) || (TYPE_BYTES[from] == 8 && !(op->wide & 2))) unknown(d);
    op->kind = (uint8_t)from;
    op->flags = (uint8_t)to;
    op->count = (uint8_t)rounding;
    op->width = saturate;
    /* The quick loops have the register's size in them. */
    const bool plain = (op->wide & 1) == (TYPE_BYTES[to] == 8) && (op->wide >> 1 & 1) == (TYPE_BYTES[from] == 8);
    op->exec = convert_exec((enum number)to, (enum number)from, rounding, saturate || !plain);
}

/* ------------------------------------------------------------------------------------------------------------- memory */
static const char *const HINTS[] = {"volatile",
                                    "weak",
                                    "relaxed",
                                    "acquire",
                                    "release",
                                    "acq_rel",
                                    "sc",
                                    "cta",
                                    "gpu",
                                    "sys",
                                    "nc",
                                    "ca",
                                    "cg",
                                    "cs",
                                    "lu",
                                    "cv",
                                    "wb",
                                    "wt",
                                    "L1::evict_normal",
                                    "L1::evict_unchanged",
                                    "L1::evict_first",
                                    "L1::evict_last",
                                    "L1::no_allocate",
                                    "L2::64B",
                                    "L2::128B",
                                    "L2::256B",
                                    "noftz",
                                    NULL};

static enum space take_space(struct decoder *d)
{
    static const char *const NAMES[] = {"global", "const", "shared", "shared::cta", "local", "param", "param::entry"};
    static const enum space SPACES[] = {GLOBAL, GLOBAL, SHARED, SHARED, LOCAL, PARAM, PARAM};
    for (int i = 0; i < 7; ++i)
        if (drop(d, NAMES[i])) return SPACES[i];
    return GENERIC;
}

static void load_store(struct decoder *d)
{
    struct op *op = d->op;
    const bool load = is(d, 0, "ld") || is(d, 0, "ldu");
    op->space = take_space(d);
    drop_all(d, HINTS);
    op->count = drop(d, "v2") ? 2 : drop(d, "v4") ? 4 : 1;
    if (d->words != 2) unknown(d);
    const int type = pick(d, d->word[1], TYPES);
    op->width = TYPE_BYTES[type];
    op->kind = type == S8 || type == S16 || type == S32;
    want_operands(d, 2, 2);
    take_list(d, load ? 0 : 1, op->count, op->width == 8 ? 'd' : '*', load);
    for (int i = 0; i < op->lists; ++i)
        if (op->list[i] != SINK && parse_class(d->parser, op->list[i]) == 'd') op->flags = 1;
    for (int i = 0; i < op->lists; ++i)
        if (op->list[i] != SINK && (parse_class(d->parser, op->list[i]) == 'd') != op->flags) unknown(d);
    take_address(d, 1, load ? 1 : 0);
    op->exec = !load ? exec_store : op->space == PARAM ? exec_load_param : exec_load;
    if (!load && op->space == PARAM) unknown(d);
}

static void atomic(struct decoder *d)
{
    static const char *const NAMES[] = {"add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec", NULL};
    struct op *op = d->op;
    const bool reduce = is(d, 0, "red");
    op->space = take_space(d);
    drop_all(d, HINTS);
    if (d->words != 3) unknown(d);
    op->kind = (uint8_t)pick(d, d->word[1], NAMES);
    const int type = pick(d, d->word[2], TYPES);
    op->width = TYPE_BYTES[type];
    op->flags = (uint8_t)type;
    if (op->width < 4 && !(op->kind == ATOM_CAS && op->width == 2)) unknown(d);
    const char class = op->width == 8 ? 'd' : 'w';
    const int first = reduce ? 0 : 1, operands = op->kind == ATOM_CAS ? 3 : 2;
    want_operands(d, first + operands, first + operands);
    if (!reduce) take_destination(d, 0, 0, class);
    take_address(d, 1, first);
    for (int i = 1; i < operands; ++i)
        take(d, 1 + i, first + i, class);
    op->exec = exec_atomic;
}

static void exec_cvta(struct warp *warp, const struct op *op, uint32_t mask)
{
    u64 *d = lane_reg(warp, op->r[0]);
    const u64 *a = lane_reg(warp, op->r[1]);
    for (int i = 0; i < LANES; ++i)
        if (mask >> i & 1) d[i] = a[i] + (uint64_t)op->immediate;
}

/* cvta.shared.u64 adds the window's address, cvta.to.shared.u64 takes it off. */
static void address(struct decoder *d)
{
    static const uint64_t WINDOWS[] = {0, 0, SHARED_WINDOW, LOCAL_WINDOW, PARAM_WINDOW};
    const bool to = drop(d, "to");
    const enum space space = take_space(d);
    if (d->words != 2 || !is(d, 1, "u64") || space == GENERIC) unknown(d);
    want_operands(d, 2, 2);
    take_destination(d, 0, 0, 'd');
    take(d, 1, 1, 'd');
    d->op->immediate = (int64_t)(to ? 0 - WINDOWS[space] : WINDOWS[space]);
    d->op->exec = exec_cvta;
}

static void asynchronous(struct decoder *d)
{
    struct op *op = d->op;
    if (!is(d, 1, "async") || d->words < 3) unknown(d);
    if (is(d, 2, "commit_group")) {
        op->exec = exec_cp_commit;
    } else if (is(d, 2, "wait_group")) {
        op->immediate = take_number(d, 0);
        op->exec = exec_cp_wait;
    } else if (is(d, 2, "wait_all")) {
        op->immediate = -1;
        op->exec = exec_cp_wait;
    } else {
        const bool cg = is(d, 2, "cg");
        drop(d, "async");
        drop_all(d, HINTS);
        if (!(drop(d, "shared") || drop(d, "shared::cta")) || !drop(d, "global") || d->words != 1) unknown(d);
        want_operands(d, 3, 4);
        /* r[0] = destination, immediate its offset; r[1] = source, list[0] its offset */
        take_address(d, 1, 1);
        op->list = malloc(sizeof *op->list);
        op->list[0] = (uint32_t)op->immediate;
        op->immediate = 0;
        take_address(d, 0, 0);
        op->width = (uint8_t)take_number(d, 2);
        if (!(op->width == 16 || (!cg && (op->width == 4 || op->width == 8))))
            parse_error(d->parser, "%s of %d bytes", d->s->opcode, op->width);
        if (d->s->operands == 4) take(d, 2, 3, 'w');
        op->exec = exec_cp_async;
    }
}

/* ------------------------------------------------------------------------------------------------------------ control */
static void branch(struct decoder *d)
{
    struct op *op = d->op;
    const bool table = is(d, 0, "brx");
    if (table ? !is(d, 1, "idx") : d->words > 1 && !is(d, 1, "uni")) unknown(d);
    const struct operand *o = &d->s->operand[table];
    want_operands(d, 1 + table, 1 + table);
    if (o->kind != LABEL) parse_error(d->parser, "%s: no label", d->s->opcode);
    if (table) take(d, 0, 0, 'w');
    op->control = table ? SWITCH : BRANCH;
    op->target = parse_label(d->parser, o->label);
}

static void barrier(struct decoder *d)
{
    static const char *const KINDS[] = {"sync", "and", "or", "popc", NULL};
    struct op *op = d->op;
    if (is(d, 1, "warp") && is(d, 2, "sync")) {
        want_operands(d, 1, 1);
        take(d, 0, 0, 'w');
        op->exec = exec_sync_warp;
        return;
    }
    drop(d, "cta");
    drop(d, "aligned");
    const bool reduce = drop(d, "red");
    op->kind = (uint8_t)pick(d, d->word[1], KINDS);
    op->control = BARRIER;
    op->flags = op->kind == 3;
    const int first = reduce ? 1 : 0, last = d->s->operands - (reduce ? 1 : 0);
    want_operands(d, 1 + 2 * first, 2 + 2 * first);
    if (reduce) {
        take_destination(d, 0, 0, op->kind == 3 ? 'w' : 'p');
        take(d, 3, last, 'p');
        op->immediate = d->s->operand[last].negated;
    }
    take(d, 1, first, 'w');
    if (last - first == 2) take(d, 2, first + 1, 'w');
}

static void shuffle(struct decoder *d)
{
    static const char *const KINDS[] = {"up", "down", "bfly", "idx", NULL};
    struct op *op = d->op;
    if (!drop(d, "sync") || d->words != 3 || !is(d, 2, "b32")) unknown(d);
    op->kind = (uint8_t)pick(d, d->word[1], KINDS);
    want_operands(d, 5, 5);
    take_destination(d, 0, 0, 'w');
    op->r[1] = d->s->operand[0].second;
    if (op->r[1] == SINK) op->r[1] = NONE;
    if (op->r[1] != NONE) op->defs |= 2;
    for (int i = 1; i < 5; ++i)
        take(d, 1 + i, i, 'w');
    op->exec = exec_shuffle;
}

static void vote(struct decoder *d)
{
    static const char *const KINDS[] = {"all", "any", "uni", "ballot", NULL};
    struct op *op = d->op;
    if (!drop(d, "sync") || d->words != 3) unknown(d);
    op->kind = (uint8_t)pick(d, d->word[1], KINDS);
    want_operands(d, 3, 3);
    take_destination(d, 0, 0, op->kind == VOTE_BALLOT ? 'w' : 'p');
    op->flags = d->s->operand[1].negated;
    take(d, 1, 1, 'p');
    take(d, 2, 2, 'w');
    op->exec = exec_vote;
}

static void across(struct decoder *d)
{
    struct op *op = d->op;
    if (is(d, 0, "activemask")) {
        want_operands(d, 1, 1);
        take_destination(d, 0, 0, 'w');
        op->exec = exec_active;
        return;
    }
    static const char *const REDUX[] = {"add", "min", "max", "and", "or", "xor", NULL};
    static const char *const MATCH[] = {"any", "all", NULL};
    const bool match = is(d, 0, "match");
    if (!drop(d, "sync") || d->words != 3) unknown(d);
    op->kind = (uint8_t)pick(d, d->word[1], match ? MATCH : REDUX);
    op->flags = is(d, 2, "s32");
    if (!is(d, 2, "s32") && !is(d, 2, "u32") && !is(d, 2, "b32")) unknown(d);
    want_operands(d, 3, 3);
    take_destination(d, 0, 0, 'w');
    if (match && d->s->operand[0].second < SINK) {
        op->r[3] = d->s->operand[0].second;
        op->defs |= 8;
    }
    take(d, 1, 1, 'w');
    take(d, 2, 2, 'w');
    op->exec = match ? exec_match : exec_redux;
}

/* ------------------------------------------------------------------------------------------------------- tensor cores */
static void load_matrix(struct decoder *d)
{
    struct op *op = d->op;
    drop(d, "sync");
    drop(d, "aligned");
    op->flags = drop(d, "trans");
    op->count = drop(d, "x4") ? 4 : drop(d, "x2") ? 2 : drop(d, "x1") ? 1 : 0;
    if (take_space(d) != SHARED || !op->count || d->words != 3 || !is(d, 1, "m8n8") || !is(d, 2, "b16")) unknown(d);
    want_operands(d, 2, 2);
    take_list(d, 0, op->count, 'w', true);
    take_address(d, 1, 1);
    op->exec = exec_ldmatrix;
}

/* mma.sync.aligned.shape.row.col.f32.a.b.f32: op->width = k, op->kind = the type of a and b; list = D, A, B, C. */
static void multiply(struct decoder *d)
{
    static const struct {
        const char *shape, *type;
        uint8_t k, a, b;
        enum number number;
    } FORMS[] = {{"m16n8k16", "bf16", 16, 4, 2, BF16}, {"m16n8k16", "f16", 16, 4, 2, F16},
                 {"m16n8k8", "bf16", 8, 2, 1, BF16},   {"m16n8k8", "f16", 8, 2, 1, F16},
                 {"m16n8k8", "tf32", 8, 4, 2, TF32},   {"m16n8k4", "tf32", 4, 2, 1, TF32}};
    struct op *op = d->op;
    drop(d, "sync");
    drop(d, "aligned");
    if (d->words != 8 || !is(d, 2, "row") || !is(d, 3, "col") || !is(d, 4, "f32") || !is(d, 7, "f32")) unknown(d);
    for (size_t i = 0; i < sizeof FORMS / sizeof FORMS[0]; ++i) {
        if (!is(d, 1, FORMS[i].shape) || !is(d, 5, FORMS[i].type) || !is(d, 6, FORMS[i].type)) continue;
        want_operands(d, 4, 4);
        take_list(d, 0, 4, 'w', true);
        take_list(d, 1, FORMS[i].a, 'w', false);
        take_list(d, 2, FORMS[i].b, 'w', false);
        take_list(d, 3, 4, 'w', false);
        op->width = FORMS[i].k;
        op->count = FORMS[i].a;
        op->kind = FORMS[i].number;
        op->exec = exec_mma;
        return;
    }
    unknown(d);
}

/* -------------------------------------------------------------------------------------------------------------- decode */
static void exec_nothing(struct warp *warp, const struct op *op, uint32_t mask)
{
    (void)warp, (void)op, (void)mask;
}
static void finish(struct decoder *d)
{
    d->op->control = EXIT;
}
static void trap(struct decoder *d)
{
    d->op->control = TRAP;
}
static void fence(struct decoder *d)
{
    /* membar.cta orders nothing between blocks */
    const bool block = is(d, 1, "cta") || is(d, 2, "cta");
    d->op->exec = block ? exec_nothing : exec_fence;
}
static void nothing(struct decoder *d)
{
    d->op->exec = exec_nothing;
}

void decode(struct parser *parser, const struct statement *statement, struct op *op)
{
    static const struct {
        const char *word;
        void (*decode)(struct decoder *);
    } FAMILY[] = {{"mov", move},
                  {"cvt", convert},
                  {"ld", load_store},
                  {"ldu", load_store},
                  {"st", load_store},
                  {"atom", atomic},
                  {"red", atomic},
                  {"cvta", address},
                  {"cp", asynchronous},
                  {"bra", branch},
                  {"brx", branch},
                  {"bar", barrier},
                  {"barrier", barrier},
                  {"shfl", shuffle},
                  {"vote", vote},
                  {"activemask", across},
                  {"redux", across},
                  {"match", across},
                  {"ldmatrix", load_matrix},
                  {"mma", multiply},
                  {"ret", finish},
                  {"exit", finish},
                  {"trap", trap},
                  {"membar", fence},
                  {"fence", fence},
                  {"nanosleep", nothing},
                  {"prefetch", nothing},
                  {"pmevent", nothing}};
    struct decoder d = {.parser = parser, .s = statement, .op = op};
    split(&d);
    void (*family)(struct decoder *) = arithmetic;
    for (size_t i = 0; i < sizeof FAMILY / sizeof FAMILY[0]; ++i)
        if (is(&d, 0, FAMILY[i].word)) family = FAMILY[i].decode;
    family(&d);
}
