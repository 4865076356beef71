/* parse.c: PTX text -> struct emu_module. What an instruction means is decode.c's business.
 *
 *     text -> tokens -> module level: .file, variables, .entry
 *                       body: { } scopes, .reg .shared .local .loc, labels, instructions -> decode() -> op
 *
 * The grammar is what nvcc emits, and inline assembly in it: no .func, no macros, no arrays with more than one dimension. */
#include "ptx.h"

#include <ctype.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* A `.reg` line: %r<57> declares 57 registers, `.reg .pred p` one (count -1). */
struct declaration {
    char *name;
    int count, scope;
    char class;
    uint32_t first;
};

struct label {
    char *name;
    int op; /* -1 while only referred to */
};

struct parser {
    struct emu_module *module;
    struct emu_kernel *kernel;
    char *text, *at;
    int line, location;
    char token[256];
    bool quoted;
    struct declaration *declaration;
    int declarations, scope;
    struct label *label;
    int labels;
    struct {
        char *name;
        uint32_t *list;
        int count;
    } table[16]; /* .branchtargets */
    int tables;
    jmp_buf failed;
    char *message;
    size_t message_size;
};

void parse_error(struct parser *p, const char *format, ...)
{
    const int used = snprintf(p->message, p->message_size, "PTX line %d%s%s: ", p->line, p->kernel ? ", kernel " : "",
                              p->kernel ? p->kernel->name : "");
    va_list arguments;
    va_start(arguments, format);
    if (used > 0 && (size_t)used < p->message_size)
        vsnprintf(p->message + used, p->message_size - (size_t)used, format, arguments);
    va_end(arguments);
    longjmp(p->failed, 1);
}

/* Grows an array by one, in powers of two. */
static void *grown(void *array, int count, size_t size)
{
    if (count & (count - 1)) return array;
    return realloc(array, (size_t)(count ? 2 * count : 1) * size);
}

/* -------------------------------------------------------------------------------------------------------------- tokens */
static void blank_comments(char *text)
{
    for (char *c = text; *c;) {
        if (c[0] == '/' && c[1] == '/') {
            while (*c && *c != '\n')
                *c++ = ' ';
        } else if (c[0] == '/' && c[1] == '*') {
            while (*c && !(c[0] == '*' && c[1] == '/')) {
                if (*c != '\n') *c = ' ';
                ++c;
            }
            if (*c) c[0] = c[1] = ' ';
        } else if (*c == '"') { /* a path may hold // */
            for (++c; *c && *c != '"'; ++c) {
            }
            if (*c) ++c;
        } else {
            ++c;
        }
    }
}

static bool is_word(char c)
{
    return isalnum((unsigned char)c) || c == '_' || c == '$' || c == '%' || c == '.';
}

/* The next token into p->token: a word, a string without its quotes, or one character. Empty at the end. */
static const char *next(struct parser *p)
{
    while (isspace((unsigned char)*p->at))
        p->line += *p->at++ == '\n';
    size_t n = 0;
    p->quoted = *p->at == '"';
    if (p->quoted) {
        for (++p->at; *p->at && *p->at != '"'; ++p->at)
            if (n < sizeof p->token - 1) p->token[n++] = *p->at;
        if (*p->at) ++p->at;
    } else if (is_word(*p->at)) {
        for (; is_word(*p->at); ++p->at) {
            if (n == sizeof p->token - 1) parse_error(p, "a word of more than %zu characters", n);
            p->token[n++] = *p->at;
        }
        /* C++ names in .loc, and `::` in opcodes such as cp.async...L2::128B */
        while (n && p->at[0] == ':' && p->at[1] == ':') {
            do {
                if (n == sizeof p->token - 1) parse_error(p, "a word of more than %zu characters", n);
                p->token[n++] = *p->at++;
            } while (is_word(*p->at) || (p->at[0] == ':' && p->token[n - 1] == ':' && p->token[n - 2] != ':'));
        }
    } else if (*p->at) {
        p->token[n++] = *p->at++;
    }
    p->token[n] = 0;
    return p->token;
}

static char peek(struct parser *p)
{
    while (isspace((unsigned char)*p->at))
        p->line += *p->at++ == '\n';
    return *p->at;
}

static bool is(const struct parser *p, const char *word)
{
    return !p->quoted && strcmp(p->token, word) == 0;
}

static void expect(struct parser *p, const char *word)
{
    next(p);
    if (!is(p, word)) parse_error(p, "expected '%s', found '%s'", word, p->token);
}

static bool accept(struct parser *p, char c)
{
    if (peek(p) != c) return false;
    ++p->at;
    return true;
}

/* The number in p->token; floats as their bits. */
static bool number(const struct parser *p, uint64_t *value)
{
    const char *text = p->token;
    if (!isdigit((unsigned char)text[0])) return false;
    char *end;
    if (text[0] == '0' && (text[1] == 'f' || text[1] == 'F' || text[1] == 'd' || text[1] == 'D'))
        *value = strtoull(text + 2, &end, 16);
    else
        *value = strtoull(text, &end, 0);
    if (*end == 'U') ++end;
    return *end == 0;
}

static int64_t integer(struct parser *p)
{
    next(p);
    const bool negative = is(p, "-");
    if (negative) next(p);
    uint64_t value;
    if (!number(p, &value)) parse_error(p, "expected a number, found '%s'", p->token);
    return negative ? -(int64_t)value : (int64_t)value;
}

/* ----------------------------------------------------------------------------------------------- registers and symbols */
static uint32_t new_reg(struct parser *p, char class, bool fixed)
{
    struct emu_kernel *k = p->kernel;
    k->reg = grown(k->reg, (int)k->regs, sizeof *k->reg);
    k->reg[k->regs] = (struct reg){.class = class, .fixed = fixed};
    return k->regs++;
}

char parse_class(const struct parser *p, uint32_t reg)
{
    return p->kernel->reg[reg].class;
}

uint32_t parse_constant(struct parser *p, char class, uint64_t value, const struct symbol *symbol)
{
    struct emu_kernel *k = p->kernel;
    if (class == 'w') value = (uint32_t)value;
    for (int i = 0; i < k->constants; ++i)
        if (k->constant[i].value == value && k->constant[i].class == class && k->constant[i].symbol == symbol)
            return k->constant[i].reg;
    k->constant = grown(k->constant, k->constants, sizeof *k->constant);
    k->constant[k->constants] =
        (struct constant){.reg = new_reg(p, class, true), .class = class, .value = value, .symbol = symbol};
    return k->constant[k->constants++].reg;
}

static const struct {
    const char *name;
    enum special special;
    char class;
} SPECIAL[] = {
    {"%tid.x", TID_X, 'w'},
    {"%tid.y", TID_Y, 'w'},
    {"%tid.z", TID_Z, 'w'},
    {"%ntid.x", NTID_X, 'w'},
    {"%ntid.y", NTID_Y, 'w'},
    {"%ntid.z", NTID_Z, 'w'},
    {"%ctaid.x", CTAID_X, 'w'},
    {"%ctaid.y", CTAID_Y, 'w'},
    {"%ctaid.z", CTAID_Z, 'w'},
    {"%nctaid.x", NCTAID_X, 'w'},
    {"%nctaid.y", NCTAID_Y, 'w'},
    {"%nctaid.z", NCTAID_Z, 'w'},
    {"%laneid", LANEID, 'w'},
    {"%warpid", WARPID, 'w'},
    {"%lanemask_eq", LANEMASK_EQ, 'w'},
    {"%lanemask_lt", LANEMASK_LT, 'w'},
    {"%lanemask_le", LANEMASK_LE, 'w'},
    {"%lanemask_gt", LANEMASK_GT, 'w'},
    {"%lanemask_ge", LANEMASK_GE, 'w'},
    {"%dynamic_smem_size", DYNAMIC_SMEM, 'w'},
    {"%total_smem_size", TOTAL_SMEM, 'w'},
    {"%clock", CLOCK, 'w'},
    {"%clock64", CLOCK64, 'd'},
};

/* The register that a name means here, NONE when it is not one. */
static uint32_t find_reg(struct parser *p, const char *name)
{
    for (int i = p->declarations; i-- > 0;) {
        const struct declaration *d = &p->declaration[i];
        if (d->count < 0) {
            if (strcmp(d->name, name) == 0) return d->first;
            continue;
        }
        const size_t n = strlen(d->name);
        if (strncmp(d->name, name, n) != 0 || !isdigit((unsigned char)name[n])) continue;
        char *end;
        const unsigned long index = strtoul(name + n, &end, 10);
        if (*end == 0 && index < (unsigned long)d->count) return d->first + (uint32_t)index;
    }
    for (size_t i = 0; i < sizeof SPECIAL / sizeof SPECIAL[0]; ++i) {
        uint32_t *reg = &p->kernel->special[SPECIAL[i].special];
        if (strcmp(SPECIAL[i].name, name) != 0) continue;
        if (*reg == NONE) *reg = new_reg(p, SPECIAL[i].class, true);
        return *reg;
    }
    if (strcmp(name, "WARP_SZ") == 0) return parse_constant(p, 'w', LANES, NULL);
    return NONE;
}

static size_t align_up(size_t value, size_t align)
{
    return (value + align - 1) / align * align;
}

/* A shared variable of this kernel gets its place, and a gap behind it, so that running over the end is seen. */
static void place_shared(struct emu_kernel *k, struct symbol *s)
{
    k->shared_bytes = align_up(k->shared_bytes, s->align) + s->bytes;
    s->address = align_up(k->shared_end, s->align);
    k->shared_end = s->address + s->bytes + 16;
}

static const struct symbol *find_symbol(struct parser *p, const char *name)
{
    struct emu_kernel *k = p->kernel;
    for (const struct symbol *s = k->symbols; s; s = s->next)
        if (strcmp(s->name, name) == 0) return s;
    for (const struct symbol *s = p->module->symbols; s; s = s->next) {
        if (strcmp(s->name, name) != 0) continue;
        if (s->kind != SYMBOL_SHARED) return s;
        /* One of a function that several kernels inline: each that names it has its own. */
        struct symbol *own = malloc(sizeof *own);
        *own = *s;
        own->name = strdup(name);
        own->next = k->symbols;
        k->symbols = own;
        place_shared(k, own);
        return own;
    }
    return NULL;
}

static int type_bytes(struct parser *p, const char *type)
{
    const char *digits = type;
    while (*digits && !isdigit((unsigned char)*digits))
        ++digits;
    if (strcmp(type, ".pred") == 0) return 0;
    const int bits = atoi(digits);
    if (type[0] != '.' || !(bits == 8 || bits == 16 || bits == 32 || bits == 64))
        parse_error(p, "type %s is not known here", type);
    return bits / 8;
}

/* `.reg .b32 %r<57>;` or `.reg .pred p, q;` */
static void registers(struct parser *p)
{
    const int bytes = type_bytes(p, next(p));
    const char class = bytes == 0 ? 'p' : bytes == 8 ? 'd' : 'w';
    do {
        next(p);
        struct declaration d = {strdup(p->token), -1, p->scope, class, p->kernel->regs};
        if (accept(p, '<')) {
            d.count = (int)integer(p);
            expect(p, ">");
        }
        for (int i = 0; i < (d.count < 0 ? 1 : d.count); ++i)
            new_reg(p, class, false);
        p->declaration = grown(p->declaration, p->declarations, sizeof d);
        p->declaration[p->declarations++] = d;
    } while (accept(p, ','));
    expect(p, ";");
}

/* `= { 1, 2 }` of a module variable, into the device memory that holds it. */
static void initial_values(struct parser *p, struct symbol *symbol, int bytes)
{
    uint8_t *to = emu_memory_host((void *)(uintptr_t)symbol->address);
    const bool braces = accept(p, '{');
    size_t at = 0;
    do {
        const uint64_t value = (uint64_t)integer(p);
        if (at + (size_t)bytes > symbol->bytes) parse_error(p, "too many values for %s", symbol->name);
        memcpy(to + at, &value, (size_t)bytes);
        at += (size_t)bytes;
    } while (braces && accept(p, ','));
    if (braces) expect(p, "}");
}

/* What follows .global, .const, .shared, .local or .param: `.align 4 .b8 name[128]`. */
static void variable(struct parser *p, const char *space, bool external)
{
    size_t align = 0;
    next(p);
    if (is(p, ".align")) {
        align = (size_t)integer(p);
        next(p);
    }
    const int bytes = type_bytes(p, p->token);
    next(p);
    if (is(p, ".ptr")) { /* .ptr [.space] .align n: what the parameter points to */
        while (next(p)[0] == '.')
            if (is(p, ".align")) integer(p);
    }
    struct symbol *s = calloc(1, sizeof *s);
    s->align = align > (size_t)bytes ? align : (size_t)bytes;
    s->name = strdup(p->token);
    s->bytes = (size_t)bytes;
    if (accept(p, '[')) {
        s->bytes = 0;
        if (!accept(p, ']')) {
            s->bytes = (size_t)bytes * (size_t)integer(p);
            expect(p, "]");
        }
    }
    struct emu_kernel *k = p->kernel;
    const bool of_kernel = strcmp(space, ".param") == 0 || strcmp(space, ".local") == 0;
    if (bytes == 0 || (of_kernel && !k)) parse_error(p, "variable %s of this type, here", s->name);
    struct symbol **list = k ? &k->symbols : &p->module->symbols;
    s->next = *list;
    *list = s;
    if (strcmp(space, ".param") == 0) {
        s->kind = SYMBOL_PARAM;
        s->address = align_up(k->parameter_bytes, s->align);
        k->parameter_bytes = s->address + s->bytes;
        if (k->parameters == 64) parse_error(p, "more than 64 parameters");
        k->parameter[k->parameters].offset = s->address;
        k->parameter[k->parameters++].bytes = s->bytes;
    } else if (strcmp(space, ".shared") == 0) {
        s->kind = external ? SYMBOL_DYNAMIC : SYMBOL_SHARED;
        if (k && !external) place_shared(k, s);
    } else if (strcmp(space, ".local") == 0) {
        s->kind = SYMBOL_LOCAL;
        s->address = align_up(k->local_bytes, s->align);
        k->local_bytes = s->address + s->bytes;
    } else {
        s->kind = SYMBOL_GLOBAL;
        s->address = (uint64_t)(uintptr_t)emu_memory_allocate(s->bytes);
        if (!s->address) parse_error(p, "no device memory for %s", s->name);
        memset(emu_memory_host((void *)(uintptr_t)s->address), 0, s->bytes);
        emu_memory_mark((void *)(uintptr_t)s->address, s->bytes, true);
        if (strcmp(space, ".const") == 0) p->module->constant_bytes += s->bytes;
        if (accept(p, '=')) initial_values(p, s, bytes);
    }
}

/* ------------------------------------------------------------------------------------------------------- instructions */
int32_t parse_label(struct parser *p, const char *name)
{
    for (int i = 0; i < p->labels; ++i)
        if (strcmp(p->label[i].name, name) == 0) return i;
    p->label = grown(p->label, p->labels, sizeof *p->label);
    p->label[p->labels] = (struct label){strdup(name), -1};
    return p->labels++;
}

static void set_label(struct parser *p, const char *name)
{
    const int i = parse_label(p, name);
    if (p->label[i].op >= 0) parse_error(p, "label %s twice", name);
    p->label[i].op = p->kernel->ops;
}

/* A register, an immediate (class unknown yet: is_constant), a symbol, a label. */
static void simple_operand(struct parser *p, struct operand *o)
{
    next(p);
    const bool minus = is(p, "-");
    if (minus) next(p);
    uint64_t value;
    o->kind = REGISTER;
    if (is(p, "_")) {
        o->kind = DISCARD;
        o->reg = SINK;
    } else if (number(p, &value)) {
        o->is_constant = true;
        o->value = minus ? -(int64_t)value : (int64_t)value;
    } else if ((o->reg = find_reg(p, p->token)) != NONE) {
    } else if ((o->symbol = find_symbol(p, p->token)) != NULL) {
        o->is_constant = true;
        if (accept(p, '+')) o->value = integer(p);
    } else {
        o->kind = LABEL;
        const int label = parse_label(p, p->token);
        o->label = p->label[label].name;
    }
}

static void operand(struct parser *p, struct operand *o)
{
    *o = (struct operand){.reg = NONE, .second = NONE};
    if (accept(p, '!')) o->negated = true;
    if (accept(p, '[')) {
        simple_operand(p, o);
        if (o->kind == LABEL) parse_error(p, "%s is not known", o->label);
        o->kind = MEMORY;
        if (!o->is_constant && accept(p, '+')) o->value = integer(p);
        if (peek(p) == ',') parse_error(p, "a memory operand with two parts");
        expect(p, "]");
    } else if (accept(p, '{')) {
        do {
            struct operand e = {.reg = NONE, .second = NONE};
            simple_operand(p, &e);
            if (e.kind == LABEL) parse_error(p, "%s is not known", e.label);
            if (o->elements == 16) parse_error(p, "a vector of more than 16");
            if (e.is_constant) e.reg = parse_constant(p, 'w', (uint64_t)e.value, e.symbol);
            o->element[o->elements++] = e.reg;
        } while (accept(p, ','));
        o->kind = VECTOR;
        expect(p, "}");
    } else {
        simple_operand(p, o);
    }
    if (accept(p, '|')) {
        next(p);
        o->second = is(p, "_") ? SINK : find_reg(p, p->token);
        if (o->second == NONE) parse_error(p, "%s is not a register", p->token);
    }
}

static void branch_targets(struct parser *p, const char *name)
{
    if (p->tables == 16) parse_error(p, "more than 16 branch tables");
    p->table[p->tables].name = strdup(name);
    uint32_t *list = NULL;
    int count = 0;
    do {
        list = grown(list, count, sizeof *list);
        list[count++] = (uint32_t)parse_label(p, next(p));
    } while (accept(p, ','));
    expect(p, ";");
    p->table[p->tables].list = list;
    p->table[p->tables++].count = count;
}

/* p->token is the first word: @, or the opcode. */
static void instruction(struct parser *p)
{
    struct statement s = {.guard = NONE, .line = p->line};
    if (is(p, "@")) {
        s.guard_negated = accept(p, '!');
        s.guard = find_reg(p, next(p));
        if (s.guard == NONE) parse_error(p, "guard %s is not a register", p->token);
        next(p);
    }
    s.line = p->line;
    struct emu_kernel *k = p->kernel;
    k->op = grown(k->op, k->ops, sizeof *k->op);
    struct op *op = &k->op[k->ops++]; /* the kernel's own before anything can go wrong */
    *op = (struct op){.text = strdup(p->token),
                      .line = (uint32_t)s.line,
                      .guard = s.guard,
                      .guard_flip = s.guard_negated ? FULL : 0,
                      .target = -1,
                      .location = (uint32_t)p->location};
    memset(op->r, 0xff, sizeof op->r);
    s.opcode = op->text;
    if (peek(p) != ';') {
        do {
            if (s.operands == 8) parse_error(p, "more than 8 operands");
            operand(p, &s.operand[s.operands++]);
        } while (accept(p, ','));
    }
    expect(p, ";");
    decode(p, &s, op);
}

/* The location of these numbers that was used last, or a new one. Files are numbers until their names come, at the end. */
static int place_location(struct parser *p, int64_t file, int line, int column, int outer)
{
    struct emu_kernel *k = p->kernel;
    const struct location new = {(const char *)(intptr_t)file, line, column, outer};
    for (int i = k->locations; i-- > 0;) {
        const struct location *l = &k->location[i];
        if (l->file == new.file && l->line == line && l->column == column && (outer < 0 || l->outer == outer)) return i;
    }
    k->location = grown(k->location, k->locations, sizeof new);
    k->location[k->locations] = new;
    return k->locations++;
}

/* .loc file line column [, function_name name [+ n], inlined_at file line column]: the place of what follows. The places it
 * was inlined to have come before. Line 0 means "nowhere in particular": the last place stays. */
static void location(struct parser *p)
{
    const int64_t file = integer(p);
    const int line = (int)integer(p), column = (int)integer(p);
    int outer = -1;
    if (accept(p, ',')) {
        expect(p, "function_name");
        next(p);
        if (accept(p, '+')) integer(p);
        expect(p, ",");
        expect(p, "inlined_at");
        const int64_t outer_file = integer(p);
        const int outer_line = (int)integer(p);
        outer = place_location(p, outer_file, outer_line, (int)integer(p), -1);
    }
    if (line > 0) p->location = place_location(p, file, line, column, outer);
}

static void skip_statement(struct parser *p)
{
    while (*p->at && !is(p, ";"))
        next(p);
}

/* A .shared, .local or .const variable of a body. */
static void body_variable(struct parser *p)
{
    char space[sizeof p->token];
    snprintf(space, sizeof space, "%s", p->token);
    variable(p, space, false);
    expect(p, ";");
}

static void body(struct parser *p)
{
    expect(p, "{");
    p->scope = 0;
    while (*next(p)) {
        if (is(p, "{")) {
            ++p->scope;
        } else if (is(p, "}")) {
            while (p->declarations && p->declaration[p->declarations - 1].scope == p->scope)
                free(p->declaration[--p->declarations].name);
            if (p->scope-- == 0) return;
        } else if (is(p, ".reg")) {
            registers(p);
        } else if (is(p, ".loc")) {
            location(p);
        } else if (is(p, ".shared") || is(p, ".local") || is(p, ".const") || is(p, ".global")) {
            body_variable(p);
        } else if (is(p, ".pragma")) {
            skip_statement(p);
        } else if (p->token[0] == '.') {
            parse_error(p, "directive %s is not known here", p->token);
        } else if (!is(p, "@") && peek(p) == ':') {
            accept(p, ':');
            char name[sizeof p->token];
            memcpy(name, p->token, sizeof name);
            if (peek(p) == '.' && strncmp(p->at, ".branchtargets", 14) == 0) {
                next(p);
                branch_targets(p, name);
            } else {
                set_label(p, name);
            }
        } else {
            instruction(p);
        }
    }
    parse_error(p, "the text ends inside a kernel");
}

/* Labels become op numbers; the text ends with an exit. */
static void link_labels(struct parser *p)
{
    struct emu_kernel *k = p->kernel;
    for (int i = 0; i < k->ops; ++i) {
        struct op *op = &k->op[i];
        if (op->control == BRANCH) {
            const struct label *label = &p->label[op->target];
            if (label->op < 0) parse_error(p, "label %s is missing", label->name);
            op->target = label->op;
        } else if (op->control == SWITCH) {
            int t = 0;
            while (t < p->tables && strcmp(p->table[t].name, p->label[op->target].name) != 0)
                ++t;
            if (t == p->tables) parse_error(p, "no .branchtargets %s", p->label[op->target].name);
            op->lists = (uint16_t)p->table[t].count;
            op->list = malloc(sizeof *op->list * op->lists);
            for (int j = 0; j < op->lists; ++j)
                op->list[j] = (uint32_t)p->label[p->table[t].list[j]].op;
        }
    }
}

static void forget_kernel(struct parser *p)
{
    for (int i = 0; i < p->labels; ++i)
        free(p->label[i].name);
    for (int i = 0; i < p->tables; ++i) {
        free(p->table[i].name);
        free(p->table[i].list);
    }
    for (int i = 0; i < p->declarations; ++i)
        free(p->declaration[i].name);
    p->labels = p->tables = p->declarations = 0;
    p->kernel = NULL;
}

static void place_dynamic(struct emu_kernel *k, struct symbol *symbols)
{
    size_t align = 16;
    for (struct symbol *s = symbols; s; s = s->next)
        if (s->kind == SYMBOL_DYNAMIC && s->align > align) align = s->align;
    k->dynamic_address = align_up(k->shared_end, align);
}

static void entry(struct parser *p)
{
    struct emu_kernel *k = p->kernel = calloc(1, sizeof *k);
    k->module = p->module;
    k->name = strdup(next(p));
    struct emu_kernel **last = &p->module->kernels;
    while (*last)
        last = &(*last)->next;
    *last = k;
    k->max_threads = 1024;
    k->shared_end = SHARED_FIRST;
    for (int i = 0; i < SPECIALS; ++i)
        k->special[i] = NONE;
    k->location = grown(NULL, 0, sizeof *k->location);
    k->location[k->locations++] = (struct location){NULL, 0, 0, -1};
    p->location = 0;
    if (accept(p, '(') && !accept(p, ')')) {
        do {
            expect(p, ".param");
            variable(p, ".param", false);
        } while (accept(p, ','));
        expect(p, ")");
    }
    while (peek(p) == '.') {
        next(p);
        const bool bound = is(p, ".maxntid") || is(p, ".reqntid");
        int64_t threads = 1;
        do
            threads *= integer(p);
        while (accept(p, ','));
        if (bound) k->max_threads = (int)threads;
    }
    body(p);
    struct op end = {.text = strdup("exit"),
                     .control = EXIT,
                     .guard = NONE,
                     .target = -1,
                     .line = (uint32_t)p->line,
                     .location = (uint32_t)p->location};
    memset(end.r, 0xff, sizeof end.r);
    k->op = grown(k->op, k->ops, sizeof end);
    k->op[k->ops++] = end;
    link_labels(p);
    place_dynamic(k, p->module->symbols);
    graph_build(k);
    forget_kernel(p);
}

/* -------------------------------------------------------------------------------------------------------------- module */
static void file_name(struct parser *p)
{
    const int index = (int)integer(p);
    next(p);
    struct emu_module *m = p->module;
    if (index < 0 || index > 100000) parse_error(p, ".file %d", index);
    if (index >= m->files) {
        m->file = realloc(m->file, sizeof *m->file * (size_t)(index + 1));
        while (m->files <= index)
            m->file[m->files++] = NULL;
    }
    free(m->file[index]);
    m->file[index] = strdup(p->token);
    if (accept(p, ',')) {
        integer(p);
        expect(p, ",");
        integer(p);
    }
}

/* .section name { ... } */
static void skip_section(struct parser *p)
{
    while (*next(p) && !is(p, "{"))
        continue;
    for (int depth = 1; depth && *next(p);)
        depth += is(p, "{") - is(p, "}");
}

static void name_files(struct emu_module *m)
{
    for (struct emu_kernel *k = m->kernels; k; k = k->next) {
        for (int i = 0; i < k->locations; ++i) {
            const intptr_t file = (intptr_t)k->location[i].file;
            k->location[i].file = file > 0 && file < m->files ? m->file[file] : NULL;
        }
    }
}

static void module_level(struct parser *p)
{
    bool external = false;
    while (*next(p)) {
        if (is(p, ".version") || is(p, ".address_size")) {
            next(p);
        } else if (is(p, ".target")) {
            next(p);
            p->module->sm = atoi(p->token + 3);
            while (accept(p, ','))
                next(p);
        } else if (is(p, ".file")) {
            file_name(p);
        } else if (is(p, ".section")) {
            skip_section(p);
        } else if (is(p, ".extern")) {
            external = true;
        } else if (is(p, ".visible") || is(p, ".weak") || is(p, ".common")) {
            continue;
        } else if (is(p, ".entry")) {
            entry(p);
        } else if (is(p, ".global") || is(p, ".const") || is(p, ".shared")) {
            char space[sizeof p->token];
            snprintf(space, sizeof space, "%s", p->token);
            variable(p, space, external);
            external = false;
            expect(p, ";");
        } else if (is(p, ".func")) {
            parse_error(p, "functions are not known here: the compiler did not inline one");
        } else if (!is(p, ";")) {
            parse_error(p, "directive %s is not known here", p->token);
        }
    }
}

struct emu_module *parse_module(const char *text, char *message, size_t message_size)
{
    struct parser *p = calloc(1, sizeof *p);
    p->module = calloc(1, sizeof *p->module);
    p->text = p->at = strdup(text);
    p->line = 1;
    p->message = message;
    p->message_size = message_size;
    blank_comments(p->text);
    struct emu_module *volatile module = p->module;
    if (setjmp(p->failed) == 0) {
        module_level(p);
        name_files(module);
    } else {
        forget_kernel(p);
        emu_module_unload(module);
        module = NULL;
    }
    free(p->declaration);
    free(p->label);
    free(p->text);
    free(p);
    return module;
}
