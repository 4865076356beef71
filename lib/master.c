/* master.c: the full-precision weights behind quantised ones: F32 in host memory, of the host, of the library, or a mapped file.
 *
 * A file has no name: it is unlinked as soon as it is made, so that nothing is left behind whatever ends the process, and nobody finds a
 * master that was cut off in the middle of an unload. Its space is reserved at once: a full disk is an error here, not a signal later. */
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "dtype.h"
#include "handles.h"

/* -------------------------------------------------------------------------------------------------------------- memory */

static plora_status file_error(const char *what, const char *directory, size_t bytes, int error)
{
    char reason[128] = "unknown error";
    return plora__fail(PLORA_ERROR_IO, "%s a file of %zu bytes in '%.600s': %s", what, bytes, directory,
                       strerror_r(error, reason, sizeof reason));
}

/* A file without a name; where the file system has none, one whose name is taken away. */
static int unnamed_file(const char *directory, char *path, size_t capacity)
{
    const int descriptor = open(directory, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    if (descriptor >= 0 || (errno != EOPNOTSUPP && errno != EISDIR)) return descriptor;
    snprintf(path, capacity, "%s/plora-master-XXXXXX", directory);
    const int named = mkostemp(path, O_CLOEXEC);
    if (named >= 0) unlink(path);
    return named;
}

static plora_status map_file(plora_context *context, const char *directory, size_t bytes, void **memory)
{
    const size_t capacity = strlen(directory) + 32;
    void *path;
    PLORA_TRY(plora__allocate(context, capacity, &path));
    const int descriptor = unnamed_file(directory, path, capacity);
    int error = errno;
    plora__free(context, path, capacity);
    if (descriptor < 0) return file_error("cannot make", directory, bytes, error);
    error = posix_fallocate(descriptor, 0, (off_t)bytes);
    void *mapped = MAP_FAILED;
    if (error == 0) {
        mapped = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
        if (mapped == MAP_FAILED) error = errno;
    }
    close(descriptor);
    if (error != 0) return file_error("cannot reserve", directory, bytes, error);
    atomic_fetch_add(&context->mapped_bytes, bytes);
    *memory = mapped;
    return PLORA_OK;
}

void plora__master_free(plora_context *context, struct plora__weight *weight)
{
    const struct plora__quantised_weight *quantised = weight->quantised;
    if (weight->matrix.data == NULL) return;
    if (quantised->master == PLORA_MASTER_MEMORY) plora__free(context, weight->matrix.data, quantised->master_bytes);
    if (quantised->master == PLORA_MASTER_FILE) {
        munmap(weight->matrix.data, quantised->master_bytes);
        atomic_fetch_sub(&context->mapped_bytes, quantised->master_bytes);
    }
    weight->matrix.data = NULL;
}

/* -------------------------------------------------------------------------------------------------------------- values */

static plora_status check_row(const char *name, const float *values, int64_t row, int64_t columns)
{
    for (int64_t j = 0; j < columns; ++j)
        PLORA_CHECK(isfinite(values[j]), PLORA_ERROR_NON_FINITE, "layer '%s': value (%lld,%lld) is %g: must be finite",
                    name, (long long)row, (long long)j, (double)values[j]);
    return PLORA_OK;
}

/* Rows of any dtype, from anywhere, into the dense master. */
static plora_status copy_values(const plora_model *model, const char *name, const plora_matrix *values,
                                const plora_matrix *master)
{
    const plora_context *context = model->context;
    const size_t size = plora__dtype_size(values->dtype);
    for (int64_t i = 0; i < values->rows; ++i) {
        float *row = (float *)master->data + i * master->stride;
        /* 16 bits are read into the upper half of the row, and widened from there to its beginning. */
        char *raw = (char *)row + (sizeof(float) - size) * (size_t)values->columns;
        const char *from = (const char *)values->data + (size_t)(i * values->stride) * size;
        PLORA_TRY(plora__read_device(context, raw, from, (size_t)values->columns * size, NULL));
        for (int64_t j = 0; size < sizeof(float) && j < values->columns; ++j) {
            const float value = plora__load(raw, j, values->dtype);
            memcpy(row + j, &value, sizeof value);
        }
        PLORA_TRY(check_row(name, row, i, values->columns));
    }
    return PLORA_OK;
}

/* What the codes hold. */
static plora_status dequantise_values(const plora_model *model, const char *name, const struct plora__weight *weight)
{
    const struct plora__quantised *quantised = &weight->quantised->values;
    plora_context *context = model->context;
    struct plora__run_memory memory = {0};
    plora__run_memory_need(quantised, 0, 0, &memory);
    PLORA_TRY(plora__run_memory_make(context, &memory));
    plora_status status = PLORA_OK;
    struct plora__run run = plora__run_next(quantised, 0);
    for (; run.count > 0 && status == PLORA_OK; run = plora__run_next(quantised, run.first + run.count)) {
        float *out = (float *)weight->matrix.data + run.first;
        status = plora__run_read(context, model->host_device, weight->quantised, run, &memory, out, NULL);
    }
    plora__run_memory_free(context, &memory);
    for (int64_t i = 0; status == PLORA_OK && i < quantised->rows; ++i)
        status = check_row(name, (const float *)weight->matrix.data + i * quantised->columns, i, quantised->columns);
    return status;
}

plora_status plora__master_make(plora_model *model, const plora_quantised_linear *linear, struct plora__weight *weight)
{
    plora_context *context = model->context;
    struct plora__quantised_weight *quantised = weight->quantised;
    plora_matrix *master = &weight->matrix;
    const int64_t rows = master->rows, columns = master->columns;
    quantised->master = linear->master;
    if (linear->master == PLORA_MASTER_NONE) return PLORA_OK;
    if (linear->master == PLORA_MASTER_HOST) {
        *master = linear->values;
        for (int64_t i = 0; i < rows; ++i)
            PLORA_TRY(check_row(linear->name, (const float *)master->data + i * master->stride, i, columns));
        return PLORA_OK;
    }
    size_t bytes;
    PLORA_TRY(plora__multiply((size_t)rows * sizeof(float), (size_t)columns, &bytes));
    PLORA_TRY(linear->master == PLORA_MASTER_MEMORY ? plora__allocate(context, bytes, &master->data)
                                                    : map_file(context, linear->directory, bytes, &master->data));
    quantised->master_bytes = bytes;
    if (linear->values.data == NULL) return dequantise_values(model, linear->name, weight);
    return copy_values(model, linear->name, &linear->values, master);
}
