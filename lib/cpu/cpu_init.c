/* cpu_init.c: the fresh A of an adapter (philox.h, normal.h): an element is a function of (seed, stage, layer, its number) alone.
 *
 * A row of `out` may begin anywhere in a draw of four numbers. It is cut where draws begin, so that only its first piece has a `lead`:
 *
 *     . . x x x x x x x x . .        the pieces of a row: [lead .. DRAWN), whole ones, and what is left
 *
 * What is whole is a single row. */
#include "convert_kernels.h"
#include "cpu_backend.h"
#include "isa.h"
#include "normal.h"

enum { DRAWN = 4 * CPU_DRAWS };

/* Piece number `piece` of a row, whose first column is element `first`. */
static void draw_piece(const struct cpu_convert_kernels *kernels, const struct plora__init_args *args, float *row,
                       int64_t first, int64_t columns, int64_t piece)
{
    const int64_t lead = first % 4, begin = piece * DRAWN - lead,
                  end = begin + DRAWN < columns ? begin + DRAWN : columns;
    const int64_t from = begin < 0 ? 0 : begin;
    if (from >= end) return;
    uint32_t words[DRAWN];
    kernels->draw(words, args->seed, PLORA__PURPOSE_INIT, args->stage, args->layer, (uint64_t)(first + begin) / 4);
    const uint32_t *own = words + (from - begin);
    if (args->init != PLORA_INIT_GAUSSIAN) kernels->symmetric(row + from, own, args->scale, end - from);
    for (int64_t i = from; args->init == PLORA_INIT_GAUSSIAN && i < end; ++i)
        row[i] = plora__normal(own[i - from]) * args->scale;
}

plora_status cpu_init_adapter(void *device, const struct plora__init_args *args, void *stream)
{
    const struct cpu_device *cpu = device;
    (void)stream;
    const struct cpu_convert_kernels *kernels = cpu_convert_kernels(cpu_isa());
    const int whole = args->columns == args->row_elements;
    const int64_t rows = whole ? 1 : args->rows, columns = whole ? args->rows * args->columns : args->columns;
    const int64_t pieces = (columns + 3 + DRAWN - 1) / DRAWN; /* a lead of up to 3 included */
    const int threads = cpu_threads_for(cpu, 64.0 * (double)rows * (double)columns);
    (void)threads; /* unused without OpenMP */
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < rows * pieces; ++i) {
        const int64_t row = i / pieces;
        draw_piece(kernels, args, args->out + row * columns, args->first_element + row * args->row_elements, columns,
                   i % pieces);
    }
    return PLORA_OK;
}
