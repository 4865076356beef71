/* consumer.c: what a host program sees: plora.h alone, as C11 and as C++17, and the installed library. */
#include <plora.h>

#include <stdio.h>
#include <string.h>

/* Every _INIT macro is a valid initialiser in both languages, and fills in its own struct's size. */
static int check_initialisers(void)
{
    const plora_context_options context = PLORA_CONTEXT_OPTIONS_INIT;
    const plora_memory_statistics memory = PLORA_MEMORY_STATISTICS_INIT;
    const plora_linear linear = PLORA_LINEAR_INIT;
    const plora_adapters_options adapters = PLORA_ADAPTERS_OPTIONS_INIT;
    const plora_adapter adapter = PLORA_ADAPTER_INIT;
    const plora_optimizer_options optimizer = PLORA_OPTIMIZER_OPTIONS_INIT;
    const plora_step_report step = PLORA_STEP_REPORT_INIT;
    const plora_unload_options unload = PLORA_UNLOAD_OPTIONS_INIT;
    const plora_unload_report report = PLORA_UNLOAD_REPORT_INIT;
    const plora_export_options export_options = PLORA_EXPORT_OPTIONS_INIT;
    const plora_export_report export_report = PLORA_EXPORT_REPORT_INIT;
    return export_options.struct_size == sizeof export_options && export_report.struct_size == sizeof export_report &&
           context.struct_size == sizeof context && memory.struct_size == sizeof memory &&
           linear.struct_size == sizeof linear && adapters.struct_size == sizeof adapters &&
           adapter.struct_size == sizeof adapter && optimizer.struct_size == sizeof optimizer &&
           step.struct_size == sizeof step && unload.struct_size == sizeof unload &&
           report.struct_size == sizeof report;
}

int main(void)
{
    char version[32];
    snprintf(version, sizeof version, "%d.%d.%d", PLORA_VERSION_MAJOR, PLORA_VERSION_MINOR, PLORA_VERSION_PATCH);
    if (!check_initialisers() || strcmp(version, plora_version()) != 0 || plora_abi_version() != PLORA_ABI_VERSION) {
        fprintf(stderr, "header %s and library %s do not belong together\n", version, plora_version());
        return 1;
    }

    plora_context *context = NULL;
    plora_model *model = NULL;
    plora_adapters *adapters = NULL;
    float weight[6] = {0, 1, 2, 3, 4, 5}, input[3] = {1, 2, 3}, output[2] = {0, 0};
    plora_linear linear = PLORA_LINEAR_INIT;
    const plora_matrix matrix = {weight, 2, 3, 3, PLORA_F32, 0}, x = {input, 1, 3, 3, PLORA_F32, 0},
                       y = {output, 1, 2, 2, PLORA_F32, 0};
    plora_adapters_options options = PLORA_ADAPTERS_OPTIONS_INIT;
    options.rank = 1;
    linear.name = "layer";
    linear.weight = matrix;
    const int failed = plora_context_create(NULL, &context) || plora_model_create(context, &model) ||
                       plora_model_add_linear(model, &linear, NULL) ||
                       plora_adapters_create(model, &options, &adapters) ||
                       plora_linear_forward(adapters, 0, &x, &y, 0, NULL) || output[0] != 8 || output[1] != 26;
    if (failed) fprintf(stderr, "forward: %s; y = %g %g\n", plora_last_error(), (double)output[0], (double)output[1]);
    plora_adapters_destroy(adapters);
    plora_model_destroy(model);
    plora_context_destroy(context);
    return failed;
}
