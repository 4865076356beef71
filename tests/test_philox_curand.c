/* test_philox_curand.c: lib/philox.h against cuRAND, the reference: its Philox4_32_10 host generator, which runs without a GPU. The
 * words of quad q of its sequence are
 *
 *     counter = { low and high word of q / 65536, q mod 65536, 0 }      key = { low, high word of the seed }
 *
 * (65536 generators that take turns, each a subsequence of Philox of its own); an offset skips single words. libcurand.so.10 is taken
 * from the loader's path or from PLORA_CUDA_PATH. */
#include <curand.h>
#include <dlfcn.h>

#include "check.h"
#include "philox.h"

#define FUNCTIONS(X)                                                                                                   \
    X(curandCreateGeneratorHost)                                                                                       \
    X(curandDestroyGenerator)                                                                                          \
    X(curandSetPseudoRandomGeneratorSeed)                                                                              \
    X(curandSetGeneratorOffset)                                                                                        \
    X(curandGenerate)

static struct {
#define MEMBER(function) __typeof__(&(function)) function;
    FUNCTIONS(MEMBER)
#undef MEMBER
} curand;

static void *open_curand(void)
{
    static const char name[] = "libcurand.so.10";
    void *library = dlopen(name, RTLD_NOW);
    const char *path = getenv("PLORA_CUDA_PATH");
    for (const char *at = path; at != NULL && library == NULL;) {
        char file[1024];
        const size_t length = strcspn(at, ":");
        snprintf(file, sizeof file, "%.*s/%s", (int)length, at, name);
        library = dlopen(file, RTLD_NOW);
        at = at[length] == ':' ? at + length + 1 : NULL;
    }
    CHECK(library != NULL, "%s was not found; PLORA_CUDA_PATH is %s", name, path == NULL ? "not set" : path);
    return library;
}

static int load(void **state)
{
    (void)state;
    void *library = open_curand();
#define LOAD(function)                                                                                                 \
    do {                                                                                                               \
        void *symbol = dlsym(library, #function);                                                                      \
        CHECK(symbol != NULL, "cuRAND has no %s", #function);                                                          \
        memcpy(&curand.function, &symbol, sizeof symbol);                                                              \
    } while (0);
    FUNCTIONS(LOAD)
#undef LOAD
    return 0;
}

static uint32_t own_word(uint64_t seed, uint64_t position)
{
    enum { GENERATORS = 65536 };
    const uint64_t quad = position / 4, turn = quad / GENERATORS;
    const struct plora__words counter = {{(uint32_t)turn, (uint32_t)(turn >> 32), (uint32_t)(quad % GENERATORS), 0}};
    return plora__philox(counter, (uint32_t)seed, (uint32_t)(seed >> 32)).word[position % 4];
}

static void compare(uint64_t seed, uint64_t offset, int64_t count)
{
    uint32_t *words = malloc((size_t)count * sizeof *words);
    assert_non_null(words);
    memset(words, CHECK_POISON, (size_t)count * sizeof *words);
    curandGenerator_t generator;
    assert_int_equal(curand.curandCreateGeneratorHost(&generator, CURAND_RNG_PSEUDO_PHILOX4_32_10), 0);
    assert_int_equal(curand.curandSetPseudoRandomGeneratorSeed(generator, seed), 0);
    assert_int_equal(curand.curandSetGeneratorOffset(generator, offset), 0);
    assert_int_equal(curand.curandGenerate(generator, words, (size_t)count), 0);
    assert_int_equal(curand.curandDestroyGenerator(generator), 0);
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t own = own_word(seed, offset + (uint64_t)i);
        CHECK(words[i] == own, "seed %" PRIx64 ", offset %" PRIu64 ", word %lld: cuRAND %08x, own %08x", seed, offset,
              (long long)i, words[i], own);
    }
    free(words);
}

static void first_words(void **state)
{
    (void)state;
    check_reseed(1);
    for (int i = 0; i < 20; ++i)
        compare(check_next(), 0, check_integer(1, 3000));
    compare(0, 0, 4096);
    compare(UINT64_MAX, 0, 4096);
}

static void more_than_one_turn(void **state)
{
    (void)state;
    check_reseed(2);
    compare(check_next(), 0, check_quick() ? 4 * 65536 + 4000 : 2 * 4 * 65536 + 4000);
}

static void offsets(void **state)
{
    (void)state;
    check_reseed(3);
    for (int bits = 1; bits < 62; bits += 3) /* up to where the high word of the counter counts */
        compare(check_next(), check_next() >> (64 - bits), check_integer(1, 1000));
}

int main(void)
{
    check_begin("test_philox_curand");
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(first_words),
        cmocka_unit_test(more_than_one_turn),
        cmocka_unit_test(offsets),
    };
    return cmocka_run_group_tests_name("philox_curand", tests, load, NULL);
}
