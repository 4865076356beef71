# Virtual environments, and what runs in them: the demo and the benchmark.

.PHONY: deps demo quickstart serve-many bench
deps: deps-build $(if $(filter 1,$(CUDA)),deps-cuda) deps-examples deps-serve deps-bench deps-tests deps-python deps-lint deps-fuzz deps-valgrind
deps-%: force
	@CC='$(CC)' CPPFLAGS='$(CPPFLAGS)' sh make/deps.sh $*

$(BUILD)/venv/ready: examples/finetune/requirements.txt
$(BUILD)/venv-test/ready: tests/python/requirements.txt
$(BUILD)/venv-peers/ready: tests/bench/requirements.txt
$(BUILD)/venv-llama/ready: tests/interop/requirements.txt | deps-tests
$(BUILD)/%/ready: | deps-python
	@echo 'Python packages of $(filter %.txt,$^) into $(@D)'
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/pip install --quiet --disable-pip-version-check -r $(filter %.txt,$^)
	@touch $@

demo: $(BUILD)/finetune $(BUILD)/venv/ready
	$(BUILD)/venv/bin/python examples/finetune/demo.py --build $(BUILD)

quickstart: $(BUILD)/quickstart
	$(BUILD)/quickstart
serve-many: $(BUILD)/serve_many
	$(BUILD)/serve_many

BENCH := $(patsubst tests/bench/%.c,$(BUILD)/bench/%,$(wildcard tests/bench/*.c))
bench: $(BUILD)/libplora.so $(BUILD)/finetune $(BUILD)/serve $(BENCH) $(BUILD)/venv/ready $(if $(PEERS),$(BUILD)/venv-peers/ready) | deps-bench
	$(BUILD)/venv/bin/python tests/bench/bench.py --build $(BUILD) $(if $(PEERS),--peers $(BUILD)/venv-peers/bin/python)

# What 16-bit and quantised weights hold after many unloads (docs/precision.md).
.PHONY: precision
precision: $(BUILD)/study/precision $(BUILD)/study/precision_quantised
	$(BUILD)/study/precision
	$(BUILD)/study/precision_quantised
# Whether sums of tensor cores keep to the bound of the merge's tests, however they add.
.PHONY: tensor-sums
tensor-sums: $(BUILD)/study/tensor_sums
	$<
$(BUILD)/study/tensor_sums: | deps-tests
$(BUILD)/tests/study/%.o: EXTRA = -Itests
$(BUILD)/study/%: $(BUILD)/tests/study/%.o $(BUILD)/libplora.a
	$(PROGRAM) $(LIBS)

# SmolLM2 against transformers, PEFT and llama.cpp. Not part of `make test`: it installs torch, and compiles llama.cpp.
.PHONY: interop
PREPARE = $(BUILD)/venv/bin/python examples/finetune/prepare.py
SMOLLM2 = $(BUILD)/models/SmolLM2-135M-Instruct
interop: $(BUILD)/finetune $(BUILD)/serve $(BUILD)/interop/stages $(foreach venv,venv venv-peers venv-llama,$(BUILD)/$(venv)/ready)
	$(PREPARE) model --output $(SMOLLM2) --downloads $(BUILD)/downloads
	$(PREPARE) gsm --model $(SMOLLM2) --output $(BUILD)/data/gsm --downloads $(BUILD)/downloads
	$(BUILD)/venv-peers/bin/python tests/interop/smollm2.py $(BUILD)/finetune $(SMOLLM2) $(BUILD)/data/gsm
	$(BUILD)/venv-peers/bin/python tests/interop/export.py $(BUILD)/interop/stages $(SMOLLM2) $(BUILD)/interop/files
	$(BUILD)/venv-llama/bin/python tests/interop/llama.py $(BUILD)/interop/files
	$(BUILD)/venv/bin/python examples/serve/example_adapters.py --build $(BUILD)
	$(BUILD)/venv-peers/bin/python tests/interop/serve.py $(BUILD)/serve $(SMOLLM2) $(BUILD)/adapters
$(BUILD)/interop/%: $(BUILD)/tests/interop/%.o $(BUILD)/libplora.a
	$(PROGRAM) $(LIBS)
