# The CUDA backend: every cuda/*.cu becomes one fat binary, which cuda/fatbins.c embeds. `make CUDA=0` builds without.
#
# Needed are g++, nvcc and the runtime's headers, from a toolkit of CUDA 13 in CUDA_HOME; where there is none, from PyPI's wheels, which
# are unpacked into $(CUDA_BUILD)/venv-cuda. No CUDA library is linked: what runs opens them itself (cuda/loader.c). Tests also look at
# the real cuBLAS and cuRAND, from CUDA_LIBRARIES or from wheels in $(CUDA_BUILD)/venv-cuda-libraries.
#
# Machine code is made for each of CUDA_TARGETS, and PTX for each code path: 75 (plain FMA), 80 (tensor cores, cp.async). Empty
# CUDA_TARGETS make PTX alone, which compiles faster.
CUDA_BUILD   ?= $(BUILD)
CUDA_TARGETS ?= 75 80 86 89 90 100 120
CUDA_PTX      = 75 80

# Does not depend on CFLAGS: the builds under sanitizers share it.
export CUDA_BUILD CUDA_TARGETS

# cuda_toolkit(FILES, VENV): the toolkit of CUDA 13 that has all FILES, or else the one of a virtual environment.
cuda_toolkit = $(or $(shell for home in /usr/local/cuda /opt/cuda; do \
                   grep -qs 'define CUDART_VERSION *13' $$home/include/cuda_runtime_api.h || continue; \
                   for file in $(1); do test -e $$home/$$file || continue 2; done; echo $$home; break; done),$(CUDA_BUILD)/$(2)/toolkit)
# cuda_ready(TOOLKIT): what has to be made before it is there.
cuda_ready   = $(filter $(CUDA_BUILD)/venv-%/ready,$(1:%/toolkit=%/ready))

ifeq ($(origin CUDA_HOME),undefined)
CUDA_HOME      := $(call cuda_toolkit,bin/nvcc include/crt/host_config.h,venv-cuda)
ifeq ($(origin CUDA_LIBRARIES),undefined)
CUDA_LIBRARIES := $(call cuda_toolkit,include/cublas_v2.h include/curand.h,venv-cuda-libraries)
endif
endif
CUDA_LIBRARIES ?= $(CUDA_HOME)
CUDA_READY           := $(call cuda_ready,$(CUDA_HOME))
CUDA_LIBRARIES_READY := $(CUDA_READY) $(call cuda_ready,$(CUDA_LIBRARIES))
NVCC                 ?= $(CUDA_HOME)/bin/nvcc
CUDA_INCLUDES        ?= -isystem $(CUDA_HOME)/include
CUDA_TEST_INCLUDES    = $(CUDA_INCLUDES) -isystem $(CUDA_LIBRARIES)/include

$(CUDA_BUILD)/venv-cuda/ready: cuda/requirements.txt
$(CUDA_BUILD)/venv-cuda-libraries/ready: tests/emulator/requirements.txt
$(CUDA_BUILD)/venv-cuda-report/ready: tests/cuda_report/requirements.txt
$(foreach venv,venv-cuda venv-cuda-libraries venv-cuda-report,$(CUDA_BUILD)/$(venv)/ready): | deps-python
	@echo 'Of CUDA, $< into $(@D)'
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/pip install --quiet --disable-pip-version-check -r $< || { echo 'make CUDA=0 builds without CUDA' >&2; exit 1; }
	@cd $(@D) && ln -sfn lib/python3*/site-packages/nvidia/cu13 toolkit && touch ready

# ---------------------------------------------------------------------------------------------------------------- kernels
FATBINS    := $(patsubst %.cu,$(CUDA_BUILD)/%.fatbin,$(wildcard cuda/*.cu))
NVCC_FLAGS  = -std=c++17 -lineinfo -Iinclude -Ilib --compress-mode=size \
              $(foreach i,$(CUDA_TARGETS),-gencode arch=compute_$(i),code=sm_$(i)) \
              $(foreach i,$(CUDA_PTX),-gencode arch=compute_$(i),code=compute_$(i))
# The same bits as on the CPU: nothing is contracted but what asks for it.
$(CUDA_BUILD)/cuda/init.fatbin $(CUDA_BUILD)/cuda/optimizer.fatbin: NVCC_EXTRA = -fmad=false

$(CUDA_BUILD)/cuda/%.fatbin: cuda/%.cu $(CUDA_BUILD)/cuda/nvcc-flags $(CUDA_READY) | deps-cuda
	@mkdir -p $(@D); echo '  NVCC  $<'
	$(Q)$(NVCC) -fatbin $(NVCC_FLAGS) $(NVCC_EXTRA) -MMD -MF $(@:%.fatbin=%.fatbin.d) -MT $@ -o $@ $<
$(CUDA_BUILD)/cuda/nvcc-flags: force
	@mkdir -p $(@D)
	@echo '$(NVCC) $(NVCC_FLAGS)' | cmp -s - $@ || echo '$(NVCC) $(NVCC_FLAGS)' > $@
-include $(FATBINS:%=%.d)

# ------------------------------------------------------------------------------------------------------------- host code
$(BUILD)/cuda/%.o: EXTRA = -Wconversion -Wno-sign-conversion $(CUDA_INCLUDES)
$(patsubst %.c,$(BUILD)/%.o,$(wildcard cuda/*.c)): $(CUDA_READY)
$(BUILD)/cuda/fatbins.o: $(FATBINS)
$(BUILD)/cuda/fatbins.o: EXTRA += '-DCUDA_FATBINS=$(foreach i,$(FATBINS),CUDA_FATBIN($(basename $(notdir $(i)))))' \
                                  -Wa,-I$(CUDA_BUILD)/cuda

# ---------------------------------------------------------------------------------------------------------------- tests
# Where tests find the real libraries.
export PLORA_CUDA_PATH ?= $(subst $(eval ) ,:,$(foreach home,$(CUDA_LIBRARIES) $(CUDA_HOME),$(abspath $(home)/lib64 $(home)/lib)))

# What a machine without a GPU can say with the real libraries.
CUDA_TESTS := $(patsubst %,$(BUILD)/tests/%,test_cuda_host test_philox_curand)
$(CUDA_TESTS:%=%.o): EXTRA = -Itests $(CUDA_TEST_INCLUDES)
$(CUDA_TESTS:%=%.o): $(CUDA_LIBRARIES_READY)
$(BUILD)/tests/test_cuda_host: | $(BUILD)/libplora.so

# The library without CUDA: it builds, has the same symbols, and says that it has no such backend.
.PHONY: without-cuda
without-cuda:
	@+$(MAKE) --no-print-directory BUILD=$(BUILD)/$@ CUDA=0 abi $(BUILD)/$@/tests/test_context
	@$(BUILD)/$@/tests/test_context

ifeq ($(CUDA),0)
TESTS := $(filter-out $(CUDA_TESTS),$(TESTS))
endif

# What is known of the kernels before they run: registers, spills, occupancy, instructions, and the bytes that they move on the
# emulated device (tests/cuda_report/).
.PHONY: cuda-report
REPORT_TOOLS = $(CUDA_BUILD)/venv-cuda-report/toolkit/bin
$(BUILD)/cuda_traffic: $(BUILD)/tests/cuda_report/cuda_traffic.o $(BUILD)/libplora.a
	$(PROGRAM) $(LIBS)
$(BUILD)/tests/cuda_report/%.o: EXTRA = -Itests
cuda-report: $(FATBINS) $(BUILD)/cuda_traffic emulator $(CUDA_BUILD)/venv-cuda-report/ready
	@$(EMULATED) $(BUILD)/cuda_traffic > $(BUILD)/cuda-traffic.json
	@PATH=$(REPORT_TOOLS):$$PATH $(PYTHON) tests/cuda_report/cuda_report.py --fatbins $(CUDA_BUILD)/cuda --cuobjdump $(REPORT_TOOLS)/cuobjdump \
	    --profile $(BUILD)/cuda-traffic.json --output $(BUILD)/cuda-report.md
