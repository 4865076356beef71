/* adapter_files_fixture.h: a model of a few random layers, whose adapters are written to files and read from them. */
#ifndef PLORA_TESTS_ADAPTER_FILES_FIXTURE_H
#define PLORA_TESTS_ADAPTER_FILES_FIXTURE_H

#include "file_fixture.h"

enum { FIXTURE_LAYERS_MAX = 16 };

struct fixture_layer {
    char name[64];
    int64_t rows, columns, stride;
    int32_t flags;
};

struct fixture {
    struct check_allocator allocator;
    plora_context *context;
    plora_model *model;
    struct check_matrix weights[FIXTURE_LAYERS_MAX];
    int count;
};

static void fixture_open_layers(struct fixture *f, const struct fixture_layer *layers, int count)
{
    *f = (struct fixture){.allocator = CHECK_ALLOCATOR_INIT, .count = count};
    f->context = check_context(&f->allocator, 1, 0);
    CHECK_OK(plora_model_create(f->context, &f->model));
    for (int i = 0; i < count; ++i) {
        const struct fixture_layer *layer = &layers[i];
        f->weights[i] = check_matrix_new(layer->rows, layer->columns, layer->stride, PLORA_F32);
        check_matrix_random(&f->weights[i], 1.0);
        CHECK_OK(check_add_linear(f->model, layer->name, &f->weights[i].m, NULL, 0, layer->flags, NULL));
    }
}

static void fixture_close(struct fixture *f)
{
    plora_model_destroy(f->model);
    plora_context_destroy(f->context);
    for (int i = 0; i < f->count; ++i)
        check_matrix_free(&f->weights[i]);
    check_allocator_empty(&f->allocator, "the test");
}

/* A copy of a factor on the host; to be freed. */
static float *values_of(const plora_matrix *matrix)
{
    const size_t bytes = (size_t)(matrix->rows * matrix->columns) * sizeof(float);
    float *copy = malloc(bytes);
    CHECK(copy != NULL, "the test itself is out of memory");
    device_transfer(copy, matrix->data, bytes);
    return copy;
}

/* Random factors, B too. */
static void randomise(const struct fixture *f, plora_adapters *adapters)
{
    for (int32_t layer = 0; layer < f->count; ++layer) {
        plora_adapter adapter = PLORA_ADAPTER_INIT;
        if (plora_adapters_layer(adapters, layer, &adapter) != PLORA_OK) continue;
        for (int is_b = 0; is_b < 2; ++is_b) {
            const plora_matrix *matrix = is_b ? &adapter.b : &adapter.a;
            float *values = values_of(matrix);
            for (int64_t i = 0; i < matrix->rows * matrix->columns; ++i)
                values[i] = (float)check_uniform();
            device_transfer(matrix->data, values, (size_t)(matrix->rows * matrix->columns) * sizeof(float));
            free(values);
        }
    }
}

#endif
