/* backends.c: the list of backends. A build without CUDA (make CUDA=0) answers for it here, with the reason. */
#include "backend.h"
#include "status.h"

#if PLORA_CUDA
#define cuda_backend plora__cuda_backend
#else
static plora_status cuda_open(const plora_context_options *options, const struct plora__host_memory *memory,
                              void **device)
{
    (void)options;
    (void)memory;
    (void)device;
    return plora__fail(PLORA_ERROR_BACKEND_UNAVAILABLE, "CUDA backend: this libplora was built without CUDA (CUDA=0)");
}

static const struct plora_backend cuda_backend = {.name = "cuda", .open = cuda_open};
#endif

const struct plora_backend *plora__backend(int32_t backend)
{
    switch (backend) {
    case PLORA_BACKEND_CPU: return &plora__cpu_backend;
    case PLORA_BACKEND_CUDA: return &cuda_backend;
    default: return NULL;
    }
}
