# The CUDA emulator (tests/emulator): replacements of libcudart.so.13 and libcublas.so.13 that run kernels on the CPU, and its tests.
#
#     LD_LIBRARY_PATH=$(BUILD)/emulator program        runs a program that opens the CUDA libraries on the emulated device

EMULATOR_FILES := $(filter-out %/cublas.c $(wildcard tests/emulator/test_*.c),$(wildcard tests/emulator/*.c))
EMULATOR_TESTS := $(patsubst tests/emulator/%.c,$(BUILD)/emulator/%,$(wildcard tests/emulator/test_*.c))
EMULATOR_LIBS   = $(BUILD)/emulator/libcudart.so.13 $(BUILD)/emulator/libcublas.so.13
CUDA_REAL       = $(foreach home,$(CUDA_LIBRARIES) $(CUDA_HOME),$(home)/lib64 $(home)/lib)# where the real ones are
EMULATED        = env LD_LIBRARY_PATH=$(BUILD)/emulator# goes before a program

# What is exported is said by the .map files. Never unloaded: the reports at exit are in it.
EMULATOR_LINK = $(CC) -shared $(OPENMP) $(CFLAGS) $(LINK) -Wl,--no-undefined -Wl,-z,nodelete -Wl,-soname,$(@F) \
                -Wl,--version-script,$(filter %.map,$^) -o $@ $(filter %.o,$^)

$(BUILD)/emulator/libcudart.so.13: $(EMULATOR_FILES:%.c=$(BUILD)/%.o) tests/emulator/libcudart.map
	@mkdir -p $(@D); echo '  LINK  $@'
	$(Q)$(EMULATOR_LINK) -lm -lpthread
$(BUILD)/emulator/libcublas.so.13: $(BUILD)/tests/emulator/cublas.o tests/emulator/libcublas.map $(BUILD)/emulator/libcudart.so.13
	@mkdir -p $(@D); echo '  LINK  $@'
	$(Q)$(EMULATOR_LINK) -L$(@D) -l:libcudart.so.13 -ldnnl -lm

$(BUILD)/tests/emulator/%.o: EXTRA = -O3 -march=native -fno-math-errno -fvisibility=default -Itests $(CUDA_TEST_INCLUDES)
$(patsubst %.c,$(BUILD)/%.o,$(wildcard tests/emulator/*.c)): $(CUDA_LIBRARIES_READY)

# ------------------------------------------------------------------------------------------------------------------ tests
# Kernels of the emulator's tests, as PTX of each code path.
EMULATOR_KERNELS := $(patsubst tests/emulator/kernels/%.cu,$(BUILD)/emulator/kernels/%.fatbin,$(wildcard tests/emulator/kernels/*.cu))

$(BUILD)/emulator/kernels/%.fatbin: tests/emulator/kernels/%.cu $(CUDA_READY) | deps-cuda
	@mkdir -p $(@D); echo '  NVCC  $<'
	$(Q)$(NVCC) -fatbin -std=c++17 -lineinfo --compress-mode=none $(NVCC_EXTRA) -Icuda -Ilib -Iinclude \
	    $(foreach i,$(CUDA_PTX),-gencode arch=compute_$(i),code=compute_$(i)) -MMD -MF $(@:%.fatbin=%.fatbin.d) -MT $@ -o $@ $<
# As the library's own random numbers are compiled.
$(BUILD)/emulator/kernels/programs.fatbin: NVCC_EXTRA = -fmad=false
-include $(EMULATOR_KERNELS:%=%.d)

$(BUILD)/emulator/test_%: $(BUILD)/tests/emulator/test_%.o | $(EMULATOR_LIBS) $(EMULATOR_KERNELS)
	@mkdir -p $(@D); echo '  LINK  $@'
	$(Q)$(CC) $(OPENMP) $(CFLAGS) $(LINK) -o $@ $(filter %.o,$^) $(EMULATOR_TEST_LIBS) -lcmocka -lm -lpthread -ldl
# This one is linked to the real libraries, and runs on the emulated ones.
$(BUILD)/emulator/test_linked: EMULATOR_TEST_LIBS = $(CUDA_REAL:%=-L%) -l:libcudart.so.13 -l:libcublas.so.13 \
                                                    -Wl,--allow-shlib-undefined

# What the emulated libraries export is in the real ones, under the same name and version.
EXPORTED = nm -D --defined-only $(1) | sed -n 's/.* [TD] \(cu.*\)/\1/p' | LC_ALL=C sort
define check_exports
	@$(call EXPORTED,$(BUILD)/emulator/$(1)) > $(BUILD)/emulator/$(1).symbols
	@for folder in $(CUDA_REAL); do test -e $$folder/$(1) && $(call EXPORTED,$$folder/$(1)) && break; done | \
	    LC_ALL=C comm -23 $(BUILD)/emulator/$(1).symbols - | sed 's/^/not in the real $(1): /' | tee $(BUILD)/emulator/$(1).unknown
	@test -s $(BUILD)/emulator/$(1).symbols && test ! -s $(BUILD)/emulator/$(1).unknown

endef

.PHONY: emulator test-emulator emulator-exports
emulator: $(EMULATOR_LIBS)
emulator-exports: $(EMULATOR_LIBS)
	$(foreach i,$(^F),$(call check_exports,$(i)))
test-emulator: $(EMULATOR_TESTS) $(EMULATOR_LIBS) $(EMULATOR_KERNELS)
	@$(EMULATED) EMU_KERNELS=$(BUILD)/emulator/kernels $(PYTHON) tests/run.py $(BUILD)/logs $(EMULATOR_TESTS) \
	    'exports=$(MAKE) --no-print-directory BUILD=$(BUILD) emulator-exports'

# ---------------------------------------------------------------------------------------------------------------- mutants
# Bugs planted in copies of lib/ and cuda/ (tests/mutants), each of which a test must find. MUTANTS=PATTERN... picks some.
MUTANT_PROGRAMS := $(patsubst %,$(BUILD)/tests/%.o,emulated/test_cuda_device emulated/test_cuda_far emulated/test_cuda_stage emulated/test_cuda_sizes \
                     test_batch test_batch_forward test_dequantise test_linear test_merge test_optimizer test_philox test_quantise test_quantised \
                     test_registry)
$(BUILD)/tests/mutants/only.o: | deps-tests
$(foreach i,$(LEVELS),$(eval test-mutants: export MUTANT_LEVEL_$(i) = $$(call LEVEL_FLAGS,$(i))))

.PHONY: test-mutants
test-mutants: export MUTANT_CC = $(CC) $(ALL_FLAGS) $(CUDA_INCLUDES)
test-mutants: export MUTANT_NVCC = $(NVCC) -fatbin -std=c++17 -lineinfo --compress-mode=none -Iinclude -Ilib
test-mutants: export MUTANT_EXACT = init optimizer
test-mutants: export MUTANT_LINK = $(CC) $(OPENMP) $(CFLAGS) $(LINK)
test-mutants: export MUTANT_LIBS = $(SUPPORT) $(BUILD)/tests/mutants/only.o $(BUILD)/libplora.a -lcmocka -lcjson $(LIBS)
test-mutants: $(MUTANT_PROGRAMS) $(SUPPORT) $(BUILD)/tests/mutants/only.o $(BUILD)/libplora.a $(EMULATOR_LIBS)
	@$(PYTHON) tests/mutants/run_mutants.py $(BUILD) $(MUTANTS)
