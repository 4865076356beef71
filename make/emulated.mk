# The tests of the CUDA backend: on the emulated device (make/emulator.mk), where each is a suite of `make test` by the name of
# emulated_<test>, and on a GPU.

# Of the CUDA backend itself.
DEVICE_TESTS := $(patsubst %.c,$(BUILD)/%,$(wildcard tests/emulated/test_*.c))
$(DEVICE_TESTS:%=%.o): EXTRA = -Itests -Itests/emulator $(CUDA_TEST_INCLUDES)
$(DEVICE_TESTS:%=%.o): $(CUDA_LIBRARIES_READY) | deps-tests
$(BUILD)/tests/emulated/%: $(BUILD)/tests/emulated/%.o $(SUPPORT) $(BUILD)/libplora.a
	$(PROGRAM) -lcmocka -lcjson $(LIBS)

# Of the operations, the same programs as on the CPU; and the benchmark, which on the emulator only has to run.
GPU_TESTS := $(patsubst %,$(BUILD)/tests/%,test_philox test_model test_model_files test_optimizer test_linear test_linear_errors \
               test_vectors_linear test_merge test_batch test_dequantise test_quantise test_quantised test_unload test_residual test_checkpoint test_peft test_gguf test_export \
               test_compact test_llama test_ledger test_context test_threads test_batch_forward test_registry \
               test_registry_threads test_shard test_shard_files)
EMULATED_TESTS = $(DEVICE_TESTS) $(GPU_TESTS)
EMULATED_SUITES = $(foreach test,$(EMULATED_TESTS),'emulated_$(notdir $(test))=env PLORA_TEST_BACKEND=cuda $(EMULATED) $(test)') \
                  'emulated_test_linear_one_multiprocessor=env EMU_MULTIPROCESSORS=1 PLORA_TEST_QUICK=1 PLORA_TEST_BACKEND=cuda $(EMULATED) $(BUILD)/tests/test_linear' \
                  'emulated_bench_cuda=$(EMULATED) $(BUILD)/bench/bench_cuda 1 quick'

.PHONY: test-emulated test-cuda bench-cuda
test-emulated: $(EMULATED_TESTS) $(BUILD)/bench/bench_cuda $(EMULATOR_LIBS)
	@$(PYTHON) tests/run.py $(BUILD)/logs $(EMULATED_SUITES)

# On the GPU of this machine: without one they fail. The libraries are those of the loader's path, or else the toolkit's or the wheels'.
ON_GPU = env LD_LIBRARY_PATH="$${LD_LIBRARY_PATH:+$$LD_LIBRARY_PATH:}$(PLORA_CUDA_PATH)"
test-cuda: $(GPU_TESTS) $(CUDA_LIBRARIES_READY)
	@$(PYTHON) tests/run.py $(BUILD)/logs \
	    $(foreach test,$(GPU_TESTS),'cuda_$(notdir $(test))=$(ON_GPU) PLORA_TEST_BACKEND=cuda $(test)')
# PEERS=1: beside torch and PEFT too, which it installs.
bench-cuda: $(BUILD)/bench/bench_cuda $(CUDA_LIBRARIES_READY) $(if $(PEERS),$(BUILD)/venv-peers/ready)
	@rm -f $(BUILD)/bench_cuda.jsonl
	$(ON_GPU) $< > $(BUILD)/bench_cuda.jsonl; status=$$?; cat $(BUILD)/bench_cuda.jsonl; exit $$status
	$(if $(PEERS),$(ON_GPU) $(BUILD)/venv-peers/bin/python tests/bench/cuda_peers.py $< | tee -a $(BUILD)/bench_cuda.jsonl)

ifeq ($(CUDA),0)
EMULATED_TESTS =
EMULATED_SUITES =
endif
