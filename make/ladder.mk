# The kernel ladders (tests/ladder): from the first idea to the library's kernel, each step checked, and timed where there is a GPU.
# A ladder is one file that both compilers read: nvcc takes the kernels, the C compiler the rest.
LADDERS := $(patsubst tests/ladder/%.cu,$(BUILD)/ladder/%,$(wildcard tests/ladder/*_ladder.cu))

$(BUILD)/ladder/%.o: tests/ladder/%.cu $(BUILD)/flags $(CUDA_READY) | deps-tests
	@mkdir -p $(@D); echo '  CC    $<'
	$(Q)$(CC) $(ALL_FLAGS) -Itests -Icuda $(CUDA_INCLUDES) -MMD -MP -x c -c -o $@ $<
# PTX alone: the driver makes the code of the GPU at hand.
$(BUILD)/ladder/%.fatbin: tests/ladder/%.cu $(CUDA_READY) | deps-cuda
	@mkdir -p $(@D); echo '  NVCC  $<'
	$(Q)$(NVCC) -fatbin -std=c++17 -lineinfo -Iinclude -Ilib -Icuda \
	    $(foreach i,$(CUDA_PTX),-gencode arch=compute_$(i),code=compute_$(i)) -MMD -MF $@.d -MT $@ -o $@ $<
$(BUILD)/ladder/%_ladder: $(BUILD)/ladder/%_ladder.o | $(BUILD)/ladder/%_ladder.fatbin
	@echo '  LINK  $@'
	$(Q)$(CC) $(OPENMP) $(CFLAGS) $(LINK) -o $@ $(filter %.o,$^) -lcmocka -lm -ldl -lpthread

.PHONY: ladder test-ladder
ladder: $(LADDERS) $(LADDERS:%=%.fatbin) $(CUDA_LIBRARIES_READY)
	@for ladder in $(LADDERS); do $(ON_GPU) $$ladder $$ladder.fatbin --time || exit 1; done
test-ladder: $(LADDERS) $(LADDERS:%=%.fatbin) $(EMULATOR_LIBS)
	@$(PYTHON) tests/run.py $(BUILD)/logs $(foreach ladder,$(LADDERS),'emulated_$(notdir $(ladder))=$(EMULATED) $(ladder) $(ladder).fatbin')
