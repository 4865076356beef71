# libplora. `make demo` trains a real model, `make test` runs the tests, `make help` lists the rest.
# What a target needs is installed by make/deps.sh. Everything that is made lies in $(BUILD).
BUILD  ?= build
PREFIX ?= /usr/local
CFLAGS ?= -O2 -g
OPENMP ?= -fopenmp
HARDEN ?= -D_FORTIFY_SOURCE=2 -fstack-protector-strong
PYTHON ?= python3
CUDA   ?= 1# 0 builds without the CUDA backend (make/cuda.mk)
Q      := $(if $(V),,@)# make V=1 shows the commands

VERSION := $(shell awk '/define PLORA_VERSION_/ {printf "%s%s", dot, $$3; dot = "."}' include/plora.h)
SONAME  := libplora.so.$(firstword $(subst ., ,$(VERSION)))
X86_64  := $(findstring x86_64,$(shell $(CC) -dumpmachine))

# Floating-point contraction is off, so that random numbers have the same bits everywhere; kernels may contract.
WARN      = -Wall -Wextra -Wpedantic -Wshadow $(if $(OPENMP),,-Wno-unknown-pragmas -Wno-unused -Wno-unused-parameter)
ALL_FLAGS = -std=c11 -D_GNU_SOURCE -fPIC -fvisibility=hidden -ffp-contract=off $(OPENMP) $(WARN) -Iinclude -Ilib \
            -DPLORA_CUDA=$(CUDA) $(HARDEN) $(CPPFLAGS) $(CFLAGS)
LIBS      = -ldnnl -llapacke -lblas -lm -lpthread -ldl $(if $(OPENMP),,-lgomp)
LINK      = -Wl,--as-needed -Wl,-z,relro,-z,now $(LDFLAGS)

# *_kernels.c are compiled once for each instruction level of lib/cpu/isa.h.
LEVELS   = 0 $(if $(X86_64),1 2 3)
LEVEL_0  =
LEVEL_1  = -mavx2 -mfma -mf16c
LEVEL_2  = $(LEVEL_1) -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512
LEVEL_3  = $(LEVEL_2) -mamx-tile -mamx-bf16
LEVEL_FLAGS = -O3 -ffp-contract=fast $(LEVEL_$(1)) $(LEVEL_MORE) -DCPU_ISA=$(1)

KERNELS  := $(wildcard lib/cpu/*_kernels.c)
SOURCES  := $(filter-out $(KERNELS),$(wildcard lib/*.c lib/cpu/*.c $(if $(filter 1,$(CUDA)),cuda/*.c)))
LIBRARY   = $(SOURCES:%.c=$(BUILD)/%.o) $(foreach i,$(LEVELS),$(KERNELS:%.c=$(BUILD)/%.isa$(i).o))
FINETUNE := $(patsubst %.c,$(BUILD)/%.o,$(wildcard examples/finetune/*.c))
TESTS    := $(patsubst %.c,$(BUILD)/%,$(wildcard tests/test_*.c))
SUPPORT  := $(patsubst %.c,$(BUILD)/%.o,$(filter-out $(wildcard tests/test_*.c),$(wildcard tests/*.c)))

.PHONY: all
all: $(BUILD)/libplora.so $(BUILD)/libplora.a

# ------------------------------------------------------------------------------------------------------------ library
# Every object depends on the flags it was compiled with; the probes of deps-% run each time, and are order-only.
$(BUILD)/%.o: %.c $(BUILD)/flags | deps-build
	@mkdir -p $(@D); echo '  CC    $<'
	$(Q)$(CC) $(ALL_FLAGS) $(EXTRA) -MMD -MP -c -o $@ $<
define level_rule
$(BUILD)/%.isa$(1).o: %.c $(BUILD)/flags | deps-build
	@mkdir -p $$(@D); echo '  CC    $$< level $(1)'
	$(Q)$$(CC) $$(ALL_FLAGS) $$(EXTRA) $$(call LEVEL_FLAGS,$(1)) -MMD -MP -c -o $$@ $$<
endef
$(foreach i,$(LEVELS),$(eval $(call level_rule,$(i))))

$(BUILD)/lib/%.o: EXTRA = -Wconversion -Wno-sign-conversion

$(BUILD)/libplora.so.$(VERSION): $(LIBRARY) lib/plora.map
	@echo '  LINK  $@'
	$(Q)$(CC) -shared $(OPENMP) $(CFLAGS) -Wl,-soname,$(SONAME) -Wl,--version-script,lib/plora.map -Wl,--exclude-libs,ALL \
	    -Wl,--no-undefined $(LINK) -o $@ $(LIBRARY) $(LIBS)
$(BUILD)/$(SONAME): $(BUILD)/libplora.so.$(VERSION)
	@ln -sf $(<F) $@
$(BUILD)/libplora.so: $(BUILD)/$(SONAME)
	@ln -sf $(<F) $@
$(BUILD)/libplora.a: $(LIBRARY)
	@rm -f $@; echo '  AR    $@'
	$(Q)$(AR) rcs $@ $^

$(BUILD)/flags: force
	@mkdir -p $(@D)
	@echo '$(CC) $(ALL_FLAGS) $(LINK)' | cmp -s - $@ || echo '$(CC) $(ALL_FLAGS) $(LINK)' > $@

# ----------------------------------------------------------------------------------------- examples, tests, benchmarks
PROGRAM = $(Q)mkdir -p $(@D) && echo '  LINK  $@' && $(CC) $(OPENMP) $(CFLAGS) $(LINK) -o $@ $(filter %.o,$^) $(filter %.a,$^)

$(BUILD)/finetune: $(FINETUNE) $(BUILD)/libplora.a
	$(PROGRAM) -lcjson $(LIBS)
$(FINETUNE): EXTRA = -O3
$(FINETUNE): | deps-examples

$(BUILD)/quickstart $(BUILD)/serve_many: $(BUILD)/%: examples/%.c $(BUILD)/libplora.so
	@echo '  LINK  $@'
	$(Q)$(CC) -std=c11 $(WARN) $(CFLAGS) -Iinclude -o $@ $< -L$(BUILD) -Wl,-rpath,'$$ORIGIN' -lplora -lm -lpthread

$(BUILD)/tests/test_%: $(BUILD)/tests/test_%.o $(SUPPORT) $(BUILD)/libplora.a
	$(PROGRAM) -lcmocka -lcjson $(LIBS)
# The trainer, whose calls the test puts on the backend under test.
WRAPPED = context_create model_add_linear model_layer model_find_tensor model_save model_destroy linear_forward linear_backward
$(BUILD)/tests/test_llama: $(BUILD)/tests/test_llama.o $(SUPPORT) $(filter-out %/main.o,$(FINETUNE)) | $(BUILD)/libplora.so
	$(PROGRAM) $(WRAPPED:%=-Wl,--wrap=plora_%) -L$(BUILD) -Wl,-rpath,'$$ORIGIN/..' -lplora -lcmocka -lcjson $(LIBS)
$(TESTS:%=%.o) $(SUPPORT): EXTRA = -Itests -Iexamples/finetune
$(TESTS:%=%.o) $(SUPPORT): | deps-tests deps-examples

$(BUILD)/tests/bench/%.o: EXTRA = -Itests
$(BUILD)/bench/%: $(BUILD)/tests/bench/%.o $(SUPPORT) $(filter-out %/main.o,$(FINETUNE)) $(BUILD)/libplora.a
	$(PROGRAM) -lcjson $(LIBS)

include make/python.mk make/bindings.mk make/serve.mk make/cuda.mk make/emulator.mk make/emulated.mk make/ladder.mk make/checks.mk make/study.mk make/install.mk

.PHONY: force clean help
force:
clean:
	rm -rf $(BUILD)
help:
	@echo 'make                       $(BUILD)/libplora.so and libplora.a'
	@echo 'make demo                  trains SmolLM2-135M with LoRA and PLoRA and compares them'
	@echo 'make serve                 an HTTP server for SmolLM2-135M and two adapters of it, in OpenAI'\''s API; SERVE_OPTIONS='
	@echo 'make quickstart            the smallest program that uses the library; serve-many: many adapters in one batch, and a hot swap'
	@echo 'make test                  every test; make asan, ubsan, tsan, valgrind: the C tests under each'
	@echo 'make test-kill             kills runs and resumes them, KILLS=1000 times'
	@echo 'make lint                  format, clang-tidy, include rules, forbidden calls'
	@echo 'make test-emulated         the CUDA backend on an emulated GPU; test-ladder, test-mutants: kernel ladders, planted bugs'
	@echo 'make test-cuda, bench-cuda the same tests on a GPU, and how near it comes to what the GPU allows [PEERS=1]; ladder (docs/gpu.md)'
	@echo 'make cuda-report           registers, spills, occupancy, instructions and traffic of the CUDA kernels'
	@echo 'make abi, abi-update       compares the ABI with tests/abi/, or records it there'
	@echo 'make fuzz                  fuzzes the file readers, SECONDS=30 each; fuzz-corpus writes their seeds'
	@echo 'make interop               SmolLM2-135M against transformers, PEFT and llama.cpp; installs torch, compiles llama.cpp'
	@echo 'make bench [PEERS=1]       measures, and writes $(BUILD)/bench.json'
	@echo 'make study [STUDY=claim3]  the paper'\''s claims on small models, some hours; study-report only writes docs/study.md'
	@echo 'make precision             what 16-bit, int8 and NF4 weights hold after many unloads; tensor-sums: errors of tensor-core sums'
	@echo 'make wheel                 the Python package with the library in it; test-bindings: its tests'
	@echo 'make install               PREFIX=/usr/local DESTDIR='
	@echo 'make deps                  installs what all of these need'
	@echo 'Variables                  BUILD CC CFLAGS LDFLAGS PREFIX DESTDIR CUDA=0 CUDA_HOME'

-include $(shell find $(BUILD) -name '*.d' 2>/dev/null)
.DELETE_ON_ERROR:
.SECONDARY:
