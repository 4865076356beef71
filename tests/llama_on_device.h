/* llama_on_device.h: lets the trainer of examples/finetune/, which computes on the host, drive a CUDA context.
 *
 * The linker sends the trainer's calls here (--wrap in the Makefile). With PLORA_TEST_BACKEND=cuda weights get a twin in device memory
 * (device.h), activations one for the length of a call, and what the library answers in device pointers becomes host memory again;
 * else every call passes through. Include once. */
#ifndef PLORA_TESTS_LLAMA_ON_DEVICE_H
#define PLORA_TESTS_LLAMA_ON_DEVICE_H

#include "device.h"
#include "dtype.h"
#include "matrix.h"

plora_status __real_plora_context_create(const plora_context_options *options, plora_context **context);
plora_status __real_plora_model_add_linear(plora_model *model, const plora_linear *linear, int32_t *layer);
plora_status __real_plora_model_layer(const plora_model *model, int32_t layer, plora_linear *linear);
plora_status __real_plora_model_save(const plora_model *model, const char *path);
void __real_plora_model_destroy(plora_model *model);
plora_status __real_plora_model_find_tensor(const plora_model *model, const char *name, plora_matrix *tensor);
plora_status __real_plora_linear_forward(plora_adapters *adapters, int32_t layer, const plora_matrix *x,
                                         const plora_matrix *y, uint32_t flags, void *stream);
plora_status __real_plora_linear_backward(plora_adapters *adapters, int32_t layer, const plora_matrix *x,
                                          const plora_matrix *dy, const plora_matrix *dx, uint32_t flags, void *stream);

plora_status __wrap_plora_context_create(const plora_context_options *options, plora_context **context);
plora_status __wrap_plora_model_add_linear(plora_model *model, const plora_linear *linear, int32_t *layer);
plora_status __wrap_plora_model_layer(const plora_model *model, int32_t layer, plora_linear *linear);
plora_status __wrap_plora_model_find_tensor(const plora_model *model, const char *name, plora_matrix *tensor);
plora_status __wrap_plora_model_save(const plora_model *model, const char *path);
void __wrap_plora_model_destroy(plora_model *model);
plora_status __wrap_plora_linear_forward(plora_adapters *adapters, int32_t layer, const plora_matrix *x,
                                         const plora_matrix *y, uint32_t flags, void *stream);
plora_status __wrap_plora_linear_backward(plora_adapters *adapters, int32_t layer, const plora_matrix *x,
                                          const plora_matrix *dy, const plora_matrix *dx, uint32_t flags, void *stream);

/* Whether contexts are CUDA's now: a test can compare the two. */
static int llama_device_off;

static int llama_on_device(void)
{
    return device_is_cuda() && !llama_device_off;
}

plora_status __wrap_plora_context_create(const plora_context_options *options, plora_context **context)
{
    plora_context_options changed = PLORA_CONTEXT_OPTIONS_INIT;
    if (options != NULL) changed = *options;
    if (llama_on_device()) changed.backend = PLORA_BACKEND_CUDA;
    return __real_plora_context_create(&changed, context);
}

/* ------------------------------------------------------------------------------------------------------------- weights */

static void *llama_upload(const void *host, size_t bytes)
{
    void *same;
    memcpy(&same, &host, sizeof same);
    device_twin(same, bytes);
    void *device = device_of(host);
    device_copy(device, host, bytes);
    return device;
}

plora_status __wrap_plora_model_add_linear(plora_model *model, const plora_linear *linear, int32_t *layer)
{
    if (!llama_on_device()) return __real_plora_model_add_linear(model, linear, layer);
    plora_linear moved = *linear;
    moved.weight.data = llama_upload(linear->weight.data, plora__matrix_extent(&linear->weight));
    if (linear->bias != NULL)
        moved.bias = llama_upload(linear->bias, (size_t)linear->weight.rows * plora__dtype_size(linear->bias_dtype));
    return __real_plora_model_add_linear(model, &moved, layer);
}

/* Host copies of an opened model's tensors, which live as long as it. */
static struct llama_mirror {
    const plora_model *model;
    void *host, *device;
    size_t bytes;
} llama_mirrors[DEVICE_TWINS];
static int llama_mirror_count;

/* The host's side of device memory, up to date: its twin, or a mirror. */
static void *llama_host_of(const plora_model *model, void *device, size_t bytes)
{
    void *host = device_host_of(device);
    if (host == device) {
        host = device_mirror(device, bytes);
        llama_mirrors[llama_mirror_count++] = (struct llama_mirror){model, host, device, bytes};
    } else {
        device_copy(host, device, bytes);
    }
    return host;
}

plora_status __wrap_plora_model_layer(const plora_model *model, int32_t layer, plora_linear *linear)
{
    const plora_status status = __real_plora_model_layer(model, layer, linear);
    if (status != PLORA_OK || !llama_on_device()) return status;
    linear->weight.data = llama_host_of(model, linear->weight.data, plora__matrix_extent(&linear->weight));
    if (linear->bias != NULL) {
        void *bias;
        memcpy(&bias, &linear->bias, sizeof bias);
        linear->bias = llama_host_of(model, bias, (size_t)linear->weight.rows * plora__dtype_size(linear->bias_dtype));
    }
    return status;
}

plora_status __wrap_plora_model_find_tensor(const plora_model *model, const char *name, plora_matrix *tensor)
{
    const plora_status status = __real_plora_model_find_tensor(model, name, tensor);
    if (status == PLORA_OK && llama_on_device())
        tensor->data = llama_host_of(model, tensor->data, plora__matrix_extent(tensor));
    return status;
}

/* The trainer may have written weights of an opened model. */
plora_status __wrap_plora_model_save(const plora_model *model, const char *path)
{
    for (int i = 0; i < llama_mirror_count; ++i) {
        const struct llama_mirror *mirror = &llama_mirrors[i];
        if (mirror->model == model) device_copy(mirror->device, mirror->host, mirror->bytes);
    }
    return __real_plora_model_save(model, path);
}

void __wrap_plora_model_destroy(plora_model *model)
{
    for (int i = llama_mirror_count - 1; i >= 0; --i) {
        if (llama_mirrors[i].model != model) continue;
        device_forget(llama_mirrors[i].host);
        llama_mirrors[i] = llama_mirrors[--llama_mirror_count];
    }
    __real_plora_model_destroy(model);
}

/* Forgets the twins of a run that has ended. */
static void llama_forget_device(void)
{
    while (device_twin_count > 0)
        device_forget(device_twins[0].host);
}

/* --------------------------------------------------------------------------------------------------------- activations */

/* A copy of a host matrix in device memory; with no elements, itself. */
static plora_matrix llama_stage(const plora_matrix *host)
{
    plora_matrix staged = *host;
    const size_t bytes = plora__matrix_extent(host);
    if (bytes == 0) return staged;
    staged.data = device_malloc(bytes);
    device_copy(staged.data, host->data, bytes);
    return staged;
}

static void llama_unstage(const plora_matrix *staged, const plora_matrix *host, int changed)
{
    const size_t bytes = plora__matrix_extent(host);
    if (bytes == 0) return;
    if (changed) device_copy(host->data, staged->data, bytes);
    device_free(staged->data);
}

plora_status __wrap_plora_linear_forward(plora_adapters *adapters, int32_t layer, const plora_matrix *x,
                                         const plora_matrix *y, uint32_t flags, void *stream)
{
    if (!llama_on_device()) return __real_plora_linear_forward(adapters, layer, x, y, flags, stream);
    const plora_matrix in = llama_stage(x), out = llama_stage(y);
    const plora_status status = __real_plora_linear_forward(adapters, layer, &in, &out, flags, stream);
    llama_unstage(&in, x, 0);
    llama_unstage(&out, y, 1);
    return status;
}

plora_status __wrap_plora_linear_backward(plora_adapters *adapters, int32_t layer, const plora_matrix *x,
                                          const plora_matrix *dy, const plora_matrix *dx, uint32_t flags, void *stream)
{
    if (!llama_on_device()) return __real_plora_linear_backward(adapters, layer, x, dy, dx, flags, stream);
    plora_matrix in = llama_stage(x), gradient = llama_stage(dy), wanted = {0};
    if (dx != NULL) wanted = llama_stage(dx);
    const plora_status status =
        __real_plora_linear_backward(adapters, layer, &in, &gradient, dx == NULL ? NULL : &wanted, flags, stream);
    llama_unstage(&in, x, 0);
    llama_unstage(&gradient, dy, 0);
    if (dx != NULL) llama_unstage(&wanted, dx, 1);
    return status;
}

#endif
