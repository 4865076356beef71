/* report.c: findings. Each distinct site is printed once, all are counted, and a process that has any exits with 86. */
#include "ptx.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define EXIT_STATUS 86

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char **sites;
static unsigned site_count, finding_count;
static char last_text[1024];

static bool seen(const char *site)
{
    for (unsigned i = 0; i < site_count; ++i)
        if (strcmp(sites[i], site) == 0) return true;
    sites = realloc(sites, sizeof *sites * (site_count + 1));
    sites[site_count++] = strdup(site);
    return false;
}

static void add(const char *site, const char *text)
{
    pthread_mutex_lock(&lock);
    ++finding_count;
    snprintf(last_text, sizeof last_text, "%s", text);
    if (!seen(site)) fprintf(stderr, "emulator: %s\n", text);
    pthread_mutex_unlock(&lock);
}

void emu_find(const char *site, const char *format, ...)
{
    char text[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    add(site ? site : text, text);
}

unsigned emu_findings(void)
{
    pthread_mutex_lock(&lock);
    const unsigned count = finding_count;
    pthread_mutex_unlock(&lock);
    return count;
}

void emu_findings_clear(void)
{
    pthread_mutex_lock(&lock);
    finding_count = 0;
    last_text[0] = 0;
    while (site_count)
        free(sites[--site_count]);
    pthread_mutex_unlock(&lock);
}

const char *emu_last_finding(void)
{
    return last_text;
}

/* The library stays loaded, so that its destructor runs at the very end, behind every atexit handler and leak check. */
__attribute__((constructor)) static void stay(void)
{
    Dl_info info;
    if (dladdr(last_text, &info) && info.dli_fname) dlopen(info.dli_fname, RTLD_NOW | RTLD_NODELETE | RTLD_NOLOAD);
}

__attribute__((destructor(101))) static void end(void)
{
    if (finding_count == 0) return;
    fprintf(stderr, "emulator: %u finding%s at %u site%s\n", finding_count, finding_count == 1 ? "" : "s", site_count,
            site_count == 1 ? "" : "s");
    fflush(NULL);
    _exit(EXIT_STATUS);
}

/* -------------------------------------------------------------------------------------------------------- instructions */
static bool is_toolkit(const char *file)
{
    return strstr(file, "/include/") != NULL && strstr(file, "cuda") != NULL;
}

/* The file without the working directory. */
static const char *short_name(const char *file)
{
    static char folder[512];
    if (!folder[0] && !getcwd(folder, sizeof folder)) return file;
    const size_t n = strlen(folder);
    return strncmp(file, folder, n) == 0 && file[n] == '/' ? file + n + 1 : file;
}

/* "merge.cu:88", or "cuda_common.cuh:40 from merge.cu:88" of an inlined function; the toolkit's own do not count. */
static void place_text(const struct warp *warp, char *text, size_t size)
{
    const struct location *all = warp->block->kernel->location, *inner = &all[warp->op->location], *outer;
    while (inner->file && is_toolkit(inner->file) && inner->outer >= 0)
        inner = &all[inner->outer];
    for (outer = inner; outer->outer >= 0;)
        outer = &all[outer->outer];
    if (!inner->file)
        snprintf(text, size, "PTX line %u", warp->op->line);
    else if (outer == inner || !outer->file)
        snprintf(text, size, "%s:%d", short_name(inner->file), inner->line);
    else
        snprintf(text, size, "%s:%d from %s:%d", short_name(inner->file), inner->line, short_name(outer->file),
                 outer->line);
}

static void find_text(const struct warp *warp, int lane, const char *what, const char *format, va_list arguments)
{
    const struct block *b = warp->block;
    const uint32_t *n = b->launch->request->block, thread = (uint32_t)(warp->index * LANES + lane);
    char place[512], detail[400] = "", text[1024], site[1024];
    place_text(warp, place, sizeof place);
    vsnprintf(detail, sizeof detail, format, arguments);
    snprintf(site, sizeof site, "%s %s %s", what, b->kernel->name, place);
    snprintf(text, sizeof text, "%s: kernel %s, block (%u,%u,%u), thread (%u,%u,%u), %s, %s%s%s", what, b->kernel->name,
             b->index[0], b->index[1], b->index[2], thread % n[0], thread / n[0] % n[1], thread / n[0] / n[1], place,
             warp->op->text, detail[0] ? ": " : "", detail);
    add(site, text);
}

void find_at(const struct warp *warp, int lane, const char *what, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    find_text(warp, lane, what, format, arguments);
    va_end(arguments);
}

void fault_at(struct warp *warp, int lane, int error, const char *what, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    find_text(warp, lane, what, format, arguments);
    va_end(arguments);
    warp->block->error = error;
    longjmp(warp->block->fault, 1);
}

/* ------------------------------------------------------------------------------------------------- settings and seeds */
int64_t emu_setting(const char *name, int64_t fallback)
{
    const char *text = getenv(name);
    return text && *text ? strtoll(text, NULL, 0) : fallback;
}

/* SplitMix64 */
static uint64_t mixed(uint64_t x)
{
    x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
    return x ^ x >> 31;
}

struct emu_random emu_random_new(uint64_t stream)
{
    return (struct emu_random){
        mixed((uint64_t)emu_setting("EMU_SEED", 1) * UINT64_C(0x9e3779b97f4a7c15) + mixed(stream))};
}

uint32_t emu_random_below(struct emu_random *random, uint32_t limit)
{
    random->state += UINT64_C(0x9e3779b97f4a7c15);
    return (uint32_t)((mixed(random->state) >> 32) * limit >> 32);
}
