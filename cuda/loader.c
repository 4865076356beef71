/* loader.c: finds libcudart and libcublas when the first CUDA context is made; nothing happens before, and nothing is undone, since
 * the libraries cannot be unloaded safely.
 *
 *     1. what dlopen() finds by the bare name: a library that the host has loaded already, then the loader's own path
 *     2. the directories of the environment variable PLORA_CUDA_PATH, separated by colons */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda.h"

enum { PATH_BYTES = 1024, OLDEST_RUNTIME = 13000 };

static const char runtime_name[] = "libcudart.so.13";
static const char cublas_name[] = "libcublas.so.13";
static const char path_variable[] = "PLORA_CUDA_PATH";

/* A library that another needs may lie beside it: then the loader knows it by name once it is loaded. */
static void *open_in(const char *directory, size_t length, const char *name)
{
    char path[PATH_BYTES];
    const int written = snprintf(path, sizeof path, "%.*s/%s", (int)length, directory, name);
    return written > 0 && written < PATH_BYTES ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : NULL;
}

static plora_status open_library(const char *name, void **library)
{
    *library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (*library != NULL) return PLORA_OK;
    char reason[256];
    const char *error = dlerror();
    snprintf(reason, sizeof reason, "%s", error == NULL ? "unknown error" : error);
    const char *path = getenv(path_variable);
    for (const char *at = path; at != NULL && *library == NULL;) {
        const size_t length = strcspn(at, ":");
        if (length > 0) *library = open_in(at, length, name);
        at = at[length] == ':' ? at + length + 1 : NULL;
    }
    PLORA_CHECK(
        *library != NULL, PLORA_ERROR_BACKEND_UNAVAILABLE,
        "CUDA backend: %s was not found: not loaded by the program, not on the loader's path (%s), and %s%.400s", name,
        reason, path == NULL ? "PLORA_CUDA_PATH is not set" : "not in PLORA_CUDA_PATH=", path == NULL ? "" : path);
    return PLORA_OK;
}

static plora_status resolve(void *library, const char *library_name, const char *function, void *pointer)
{
    void *symbol = dlsym(library, function);
    PLORA_CHECK(symbol != NULL, PLORA_ERROR_BACKEND_UNAVAILABLE, "CUDA backend: %s has no function %s: is it too old?",
                library_name, function);
    memcpy(pointer, &symbol, sizeof symbol);
    return PLORA_OK;
}

static plora_status load(struct cuda_api *api)
{
    void *runtime, *cublas;
    PLORA_TRY(open_library(runtime_name, &runtime));
#define RESOLVE(function) PLORA_TRY(resolve(runtime, runtime_name, #function, &api->function));
    CUDA_RUNTIME_FUNCTIONS(RESOLVE)
#undef RESOLVE
    PLORA_TRY(open_library(cublas_name, &cublas));
#define RESOLVE(result, function, parameters) PLORA_TRY(resolve(cublas, cublas_name, #function, &api->function));
    CUDA_BLAS_FUNCTIONS(RESOLVE)
#undef RESOLVE
    int version = 0;
    const cudaError_t error = api->cudaRuntimeGetVersion(&version);
    PLORA_CHECK(error == cudaSuccess && version >= OLDEST_RUNTIME, PLORA_ERROR_BACKEND_UNAVAILABLE,
                "CUDA backend: %s is version %d (%s): at least %d is needed", runtime_name, version,
                api->cudaGetErrorName(error), OLDEST_RUNTIME);
    return PLORA_OK;
}

plora_status cuda_load(const struct cuda_api **api)
{
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    static struct cuda_api loaded;
    static int done; /* a failure is no final answer: the host may set the path and try again */
    pthread_mutex_lock(&lock);
    plora_status status = PLORA_OK;
    if (!done) status = load(&loaded);
    done = status == PLORA_OK;
    pthread_mutex_unlock(&lock);
    *api = &loaded;
    return status;
}
