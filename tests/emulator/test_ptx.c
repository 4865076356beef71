/* test_ptx.c: each instruction of kernels/forms.h, as the emulator executes it, against C, on random operands and the edges of each
 * type. */
#include "kernel_tests.h"

#include <fenv.h>

#include "kernels/forms.h"

enum { COUNT = 1000 };

struct forms_params {
    const uint64_t *a, *b, *c;
    uint64_t *d;
    int count;
};

static uint64_t a[COUNT], b[COUNT], c[COUNT];
static struct forms_params device;

/* ---------------------------------------------------------------------------------------- the words of the PTX ISA in C */
#define S(x) ((int32_t)(x))
#define L(x) ((int64_t)(x))

static uint32_t high32(uint32_t x, uint32_t y)
{
    return (uint32_t)((uint64_t)x * y >> 32);
}
static uint64_t high64(uint64_t x, uint64_t y)
{
    const uint64_t xl = (uint32_t)x, xh = x >> 32, yl = (uint32_t)y, yh = y >> 32;
    const uint64_t middle = xh * yl + (xl * yl >> 32), other = xl * yh + (uint32_t)middle;
    return xh * yh + (middle >> 32) + (other >> 32);
}
static int ones(uint64_t x)
{
    int count = 0;
    for (; x; x &= x - 1)
        ++count;
    return count;
}
static int highest(uint64_t x)
{
    int bit = -1;
    for (; x; x >>= 1)
        ++bit;
    return bit;
}
static uint64_t reversed(uint64_t x, int bits)
{
    uint64_t result = 0;
    for (int i = 0; i < bits; ++i)
        result |= (x >> i & 1) << (bits - 1 - i);
    return result;
}
static uint64_t extracted(uint64_t x, uint32_t at, uint32_t length, int bits, int with_sign)
{
    const int position = at & 255, size = length & 255, top = bits - 1;
    const int last = position + size - 1 < top ? position + size - 1 : top;
    const uint64_t sign = with_sign && size ? x >> last & 1 : 0;
    uint64_t result = 0;
    for (int i = 0; i < bits; ++i)
        result |= (i < size && position + i <= top ? x >> (position + i) & 1 : sign) << i;
    return result;
}
static uint64_t inserted(uint64_t x, uint64_t y, uint32_t at, int size, int bits)
{
    uint64_t result = y;
    for (int i = 0; i < size && (int)(at & 255) + i < bits; ++i) {
        const int to = (int)(at & 255) + i;
        result = (result & ~(UINT64_C(1) << to)) | (x >> i & 1) << to;
    }
    return result;
}
static uint32_t permuted(uint32_t x, uint32_t y, uint32_t selector)
{
    uint8_t bytes[8], result[4];
    memcpy(bytes, &x, 4), memcpy(bytes + 4, &y, 4);
    for (int i = 0; i < 4; ++i) {
        const uint32_t s = selector >> 4 * i & 15;
        result[i] = s < 8 ? bytes[s] : (bytes[s - 8] & 128) ? 255 : 0;
    }
    uint32_t word;
    memcpy(&word, result, 4);
    return word;
}
static uint32_t looked_up(uint32_t x, uint32_t y, uint32_t z, uint32_t table)
{
    uint32_t result = 0;
    for (int i = 0; i < 32; ++i)
        result |= (table >> ((x >> i & 1) << 2 | (y >> i & 1) << 1 | (z >> i & 1)) & 1) << i;
    return result;
}
/* The number where one is NaN; -0 before +0. */
static double least(double x, double y)
{
    if (isnan(x)) return y;
    if (isnan(y)) return x;
    return x < y || (x == y && signbit(x)) ? x : y;
}
static uint64_t clamped(double x, double low, double high)
{
    return isnan(x) ? 0 : (uint64_t)(int64_t)(x < low ? low : x > high ? high : x);
}
static float rounded(int mode, char operation, float x, float y, float z)
{
    const volatile float u = x, v = y, w = z;
    volatile float result;
    fesetround(mode);
    switch (operation) {
    case '+': result = u + v; break;
    case '*': result = u * v; break;
    case '/': result = u / v; break;
    default: result = fmaf(u, v, w); break;
    }
    fesetround(FE_TONEAREST);
    return result;
}
static float half_value(uint32_t half)
{
    return plora__f16_to_float((uint16_t)half);
}
/* The nearest of all halves, ties to the even one: by bisection over the positive ones. */
static uint16_t nearest_half(double x)
{
    if (isnan(x)) return 0x7fff;
    const double size = fabs(x);
    uint16_t low = 0, high = 0x7c00;
    while (low < high) {
        const uint16_t middle = (uint16_t)((low + high + 1) / 2);
        const double value = middle == 0x7c00 ? 65536.0 : (double)half_value(middle);
        if (value <= size)
            low = middle;
        else
            high = (uint16_t)(middle - 1);
    }
    const double below = low == 0x7c00 ? 65536.0 : (double)half_value(low);
    const double above = low >= 0x7bff ? 65536.0 : (double)half_value(low + 1u);
    if (low < 0x7c00 && (size - below > above - size || (size - below == above - size && (low & 1)))) ++low;
    return (uint16_t)(low | (signbit(x) ? 0x8000 : 0));
}
static uint32_t bits_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
static uint16_t nearest_bf16(float x)
{
    if (isnan(x)) return 0x7fff;
    const uint32_t bits = bits_of(x), rest = bits & 0xffff, upper = bits >> 16;
    return (uint16_t)(upper + (rest > 0x8000 || (rest == 0x8000 && (upper & 1))));
}
static uint32_t nearest_tf32(float x)
{
    if (isnan(x)) return 0x7fffffff;
    const uint32_t bits = bits_of(x);
    return ((bits >> 13) + (bits >> 12 & 1)) << 13;
}

/* ------------------------------------------------------------------------------------------------------------ the forms */
#define TYPE_W uint32_t
#define TYPE_D uint64_t
#define TYPE_H uint16_t
#define TYPE_F float
#define TYPE_G double
#define IN_W(slot) (uint32_t)(slot)
#define IN_D(slot) (slot)
#define IN_H(slot) (uint16_t)(slot)
#define IN_F(slot) float_of(slot)
#define IN_G(slot) double_of(slot)

static float float_of(uint64_t slot)
{
    const uint32_t bits = (uint32_t)slot;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
static double double_of(uint64_t slot)
{
    double x;
    memcpy(&x, &slot, sizeof x);
    return x;
}

#define REFERENCE(name, D, A, B, C, text, expression)                                                                  \
    static uint64_t reference_##name(uint64_t slot_a, uint64_t slot_b, uint64_t slot_c)                                \
    {                                                                                                                  \
        const TYPE_##A x = IN_##A(slot_a);                                                                             \
        const TYPE_##B y = IN_##B(slot_b);                                                                             \
        const TYPE_##C z = IN_##C(slot_c);                                                                             \
        const TYPE_##D result = (TYPE_##D)(expression);                                                                \
        uint64_t slot = 0;                                                                                             \
        (void)x, (void)y, (void)z;                                                                                     \
        memcpy(&slot, &result, sizeof result);                                                                         \
        return slot;                                                                                                   \
    }
#define EXACT(name, D, A, B, C, text, expression)                                                                      \
    static double reference_##name(uint64_t slot_a, uint64_t slot_b, uint64_t slot_c)                                  \
    {                                                                                                                  \
        const float x = float_of(slot_a), y = float_of(slot_b);                                                        \
        (void)slot_c, (void)x, (void)y;                                                                                \
        return expression;                                                                                             \
    }
FORMS(REFERENCE)
FORMS_80(REFERENCE)
APPROXIMATIONS(EXACT)

#define ENTRY(name, D, A, B, C, text, expression) {#name, #D[0], #A[0], text, reference_##name},
static const struct form {
    const char *name;
    char result, operand;
    const char *text;
    uint64_t (*reference)(uint64_t, uint64_t, uint64_t);
} forms[] = {FORMS(ENTRY)}, forms_80[] = {FORMS_80(ENTRY)};
static const struct approximation {
    const char *name;
    char result, operand;
    const char *text;
    double (*reference)(uint64_t, uint64_t, uint64_t);
} approximations[] = {APPROXIMATIONS(ENTRY)};

/* Edges of integers and floats of both sizes, small numbers, floats of every size, whole numbers as floats, random bits. */
static uint64_t operand(char type)
{
    static const uint64_t EDGES[] = {0,
                                     1,
                                     2,
                                     31,
                                     32,
                                     33,
                                     0x7f,
                                     0x80,
                                     0xff,
                                     0x7fff,
                                     0x8000,
                                     0xffff,
                                     0x7fffffff,
                                     0x80000000,
                                     0xffffffff,
                                     0x7fffffffffffffff,
                                     0x8000000000000000,
                                     0xffffffffffffffff};
    static const float FLOATS[] = {0.0f,      -0.0f,    1.0f,      -1.0f,     0.5f,     1.5f,     2.5f,
                                   -2.5f,     3.5f,     0x1p-149f, 0x1p-126f, 0x1p-24f, 0x1p-25f, 65504.0f,
                                   65519.0f,  65520.0f, 0x1p31f,   -0x1p31f,  0x1p32f,  3.4e38f,  INFINITY,
                                   -INFINITY, NAN,      255.5f,    256.0f};
    uint64_t bits = check_next();
    const double plain = check_integer(0, 1) ? check_uniform() * 300 : (double)check_integer(-70000, 70000) / 2;
    const double scaled = ldexp(check_uniform(), (int)check_integer(-160, 130));
    float x;
    double wide;
    uint32_t word;
    if (type != 'F' && type != 'G') {
        switch (check_integer(0, 2)) {
        case 0: return EDGES[check_integer(0, CHECK_COUNT(EDGES) - 1)];
        case 1: return bits >> check_integer(0, 63);
        default: return bits;
        }
    }
    const int64_t kind = check_integer(0, 4);
    if (kind == 3) return bits;
    if (kind == 4)
        return type == 'F' ? bits & ~UINT64_C(0x1fff) : bits & ~UINT64_C(0x1fffffff); /* ties between short floats */
    wide = kind == 0 ? (double)FLOATS[check_integer(0, CHECK_COUNT(FLOATS) - 1)] : kind == 1 ? plain : scaled;
    x = (float)wide;
    memcpy(&word, &x, sizeof word);
    memcpy(&bits, &wide, sizeof wide);
    return type == 'F' ? word : bits;
}

static void run(const char *name, char type, uint64_t *d)
{
    for (int i = 0; i < COUNT; ++i) {
        a[i] = operand(type);
        b[i] = check_integer(0, 9) ? operand(type) : a[i];
        c[i] = operand(type);
    }
    CUDA_OK(cu.cudaMemcpy((void *)(uintptr_t)device.a, a, sizeof a, cudaMemcpyHostToDevice));
    CUDA_OK(cu.cudaMemcpy((void *)(uintptr_t)device.b, b, sizeof b, cudaMemcpyHostToDevice));
    CUDA_OK(cu.cudaMemcpy((void *)(uintptr_t)device.c, c, sizeof c, cudaMemcpyHostToDevice));
    char kernel[64];
    snprintf(kernel, sizeof kernel, "form_%s", name);
    CHECK_CUDA(kernels_launch(kernel, (dim3){5, 1, 1}, (dim3){224, 1, 1}, 0, &device), cudaSuccess);
    device_read(d, device.d, sizeof(uint64_t) * COUNT);
}

static bool same(char type, uint64_t got, uint64_t want)
{
    if (type == 'F' && isnan(float_of(got)) && isnan(float_of(want))) return true;
    if (type == 'G' && isnan(double_of(got)) && isnan(double_of(want))) return true;
    return got == want;
}

static void compare(const struct form *form)
{
    static uint64_t d[COUNT];
    run(form->name, form->operand, d);
    for (int i = 0; i < COUNT; ++i) {
        const uint64_t want = form->reference(a[i], b[i], c[i]);
        CHECK(same(form->result, d[i], want),
              "%s of 0x%" PRIx64 ", 0x%" PRIx64 ", 0x%" PRIx64 ": 0x%" PRIx64 ", want 0x%" PRIx64, form->text, a[i],
              b[i], c[i], d[i], want);
    }
}

static void test_forms(void **state)
{
    (void)state;
    for (int i = 0; i < CHECK_COUNT(forms); ++i)
        compare(&forms[i]);
    if (emulated_sm() >= 80)
        for (int i = 0; i < CHECK_COUNT(forms_80); ++i)
            compare(&forms_80[i]);
}

static void test_approximations(void **state)
{
    (void)state;
    static uint64_t d[COUNT];
    for (int form = 0; form < CHECK_COUNT(approximations); ++form) {
        const struct approximation *f = &approximations[form];
        run(f->name, f->operand, d);
        for (int i = 0; i < COUNT; ++i) {
            const double want = f->reference(a[i], b[i], c[i]), got = (double)float_of(d[i]);
            if (isnan(want)) {
                CHECK(isnan(got), "%s of %g, %g: %g", f->text, (double)float_of(a[i]), (double)float_of(b[i]), got);
                continue;
            }
            const double exact = fabs(want) > 0x1.fffffefp127 ? copysign(INFINITY, want) : want;
            CHECK(got == exact || fabs(got - want) <= 1e-6 * fabs(want) + 1e-37, "%s of %g, %g: %g, want %g", f->text,
                  (double)float_of(a[i]), (double)float_of(b[i]), got, want);
        }
    }
}

/* What the interpreter does not know is refused when it is loaded, by name and line; the library's findings say so. */
static void test_refusals(void **state)
{
    (void)state;
    static const struct {
        const char *body, *part;
    } WRONG[] = {
        {"  wgmma.fence.sync.aligned;\n",
         "PTX line 6, kernel k_kernel: instruction wgmma.fence.sync.aligned is not known"},
        {"  add.f16 %r1, %r1, %r1;\n", "instruction add.f16 is not known"},
        {"\n  add.s64 %rd1, %r1, %rd1;\n", "PTX line 7, kernel k_kernel: add.s64: operand 2 is of another size"},
        {"  bra NOWHERE;\n", "label NOWHERE is missing"},
        {"  mov.u32 %r1, nothing;\n", "mov.u32: nothing is not known"},
        {"  ld.global.u32 %r1, [%rd1;\n", "expected ']', found ';'"},
        {"  add.s32 %r1, %r1;\n", "add.s32: operand 3 is missing"},
        {"  cp.async.cg.shared.global [%r1], [%rd1], 8;\n", "of 8 bytes"},
    };
    for (int i = 0; i < CHECK_COUNT(WRONG); ++i) {
        char text[512];
        cudaLibrary_t library = NULL;
        snprintf(text, sizeof text,
                 ".version 9.0\n.target sm_75\n.address_size 64\n.visible .entry k_kernel()\n"
                 "{ .reg .b32 %%r<3>; .reg .b64 %%rd<3>;\n%s  ret;\n}\n",
                 WRONG[i].body);
        CHECK_CUDA(cu.cudaLibraryLoadData(&library, text, NULL, NULL, 0, NULL, NULL, 0), cudaErrorInvalidPtx);
        CHECK(strstr(cu.emu_last_finding(), WRONG[i].part) != NULL, "'%s' is not in '%s'", WRONG[i].part,
              cu.emu_last_finding());
        cu.cudaGetLastError();
        cu.emu_findings_clear();
    }
}

int main(void)
{
    check_begin("test_ptx");
    const int status = each_path();
    if (status >= 0) return status;
    kernels_open("forms");
    device = (struct forms_params){device_array(sizeof a, NULL), device_array(sizeof a, NULL),
                                   device_array(sizeof a, NULL), device_array(sizeof a, NULL), COUNT};
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_forms), cmocka_unit_test(test_approximations),
                                       cmocka_unit_test(test_refusals)};
    const int failed = cmocka_run_group_tests(tests, NULL, NULL);
    cu.cudaFree((void *)(uintptr_t)device.a);
    cu.cudaFree((void *)(uintptr_t)device.b);
    cu.cudaFree((void *)(uintptr_t)device.c);
    cu.cudaFree(device.d);
    kernels_close();
    return failed;
}
