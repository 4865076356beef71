/* only.c: linked into a test program, it runs the one test that PLORA_TEST_ONLY names. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#include <cmocka.h>

static void __attribute__((constructor)) run_only(void)
{
    const char *name = getenv("PLORA_TEST_ONLY");
    if (name != NULL) cmocka_set_test_filter(name);
}
