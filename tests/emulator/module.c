/* module.c: modules and kernels as the runtime sees them. */
#include "ptx.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct emu_module *emu_module_load(const void *image, int sm, char *message, size_t message_size)
{
    memory_open();
    char *text = fatbin_ptx(image, sm, message, message_size);
    if (!text) return NULL;
    struct emu_module *module = parse_module(text, message, message_size);
    if (module && module->sm > sm) {
        snprintf(message, message_size, "the PTX is for sm_%d, the device is sm_%d", module->sm, sm);
        emu_module_unload(module);
        module = NULL;
    }
    free(text);
    return module;
}

static void free_symbols(struct symbol *s)
{
    while (s) {
        struct symbol *next = s->next;
        if (s->kind == SYMBOL_GLOBAL && s->address) emu_memory_free((void *)(uintptr_t)s->address);
        free(s->name);
        free(s);
        s = next;
    }
}

static void free_kernel(struct emu_kernel *k)
{
    for (int i = 0; i < k->ops; ++i) {
        free(k->op[i].list);
        free(k->op[i].text);
    }
    free_symbols(k->symbols);
    free(k->op);
    free(k->location);
    free(k->constant);
    free(k->reg);
    free(k->name);
    free(k);
}

void emu_module_unload(struct emu_module *module)
{
    if (!module) return;
    while (module->kernels) {
        struct emu_kernel *k = module->kernels;
        module->kernels = k->next;
        free_kernel(k);
    }
    free_symbols(module->symbols);
    for (int i = 0; i < module->files; ++i)
        free(module->file[i]);
    free(module->file);
    free(module);
}

int emu_module_kernels(const struct emu_module *module)
{
    int count = 0;
    for (const struct emu_kernel *k = module->kernels; k; k = k->next)
        ++count;
    return count;
}

const struct emu_kernel *emu_module_kernel(const struct emu_module *module, int index)
{
    const struct emu_kernel *k = module->kernels;
    while (k && index-- > 0)
        k = k->next;
    return k;
}

const struct emu_kernel *emu_module_find(const struct emu_module *module, const char *name)
{
    const struct emu_kernel *k = module->kernels;
    while (k && strcmp(k->name, name) != 0)
        k = k->next;
    return k;
}

bool emu_module_variable(const struct emu_module *module, const char *name, void **address, size_t *bytes)
{
    for (const struct symbol *s = module->symbols; s; s = s->next) {
        if (s->kind != SYMBOL_GLOBAL || strcmp(s->name, name) != 0) continue;
        if (address) *address = (void *)(uintptr_t)s->address;
        if (bytes) *bytes = s->bytes;
        return true;
    }
    return false;
}

struct emu_kernel_info emu_kernel_info(const struct emu_kernel *k)
{
    /* Addresses and the like want some more than what is live at once. */
    const int registers = k->live_registers + 8 > 255 ? 255 : k->live_registers + 8;
    return (struct emu_kernel_info){.name = k->name,
                                    .ptx_sm = k->module->sm,
                                    .registers = registers,
                                    .max_threads = k->max_threads,
                                    .static_shared = k->shared_bytes,
                                    .local = k->local_bytes,
                                    .constant = k->module->constant_bytes,
                                    .parameter_bytes = k->parameter_bytes,
                                    .parameters = k->parameters};
}

void emu_kernel_parameter(const struct emu_kernel *kernel, int index, size_t *offset, size_t *bytes)
{
    const bool known = index >= 0 && index < kernel->parameters;
    *offset = known ? kernel->parameter[index].offset : 0;
    *bytes = known ? kernel->parameter[index].bytes : 0;
}

void emu_kernel_pack(const struct emu_kernel *kernel, void *const *arguments, void *packed)
{
    for (int i = 0; i < kernel->parameters; ++i)
        memcpy((uint8_t *)packed + kernel->parameter[i].offset, arguments[i], kernel->parameter[i].bytes);
}
