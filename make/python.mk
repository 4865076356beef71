# Virtual environments, and what runs in them: the demo and the benchmark.

.PHONY: deps demo quickstart bench
deps: deps-build deps-examples deps-tests deps-python deps-lint deps-fuzz deps-valgrind
deps-%: force
	@CC='$(CC)' CPPFLAGS='$(CPPFLAGS)' sh make/deps.sh $*

$(BUILD)/venv/ready: examples/finetune/requirements.txt
$(BUILD)/venv-test/ready: tests/python/requirements.txt
$(BUILD)/venv-peers/ready: tests/bench/requirements.txt
$(BUILD)/%/ready: | deps-python
	@echo 'Python packages of $(filter %.txt,$^) into $(@D)'
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/pip install --quiet --disable-pip-version-check -r $(filter %.txt,$^)
	@touch $@

demo: $(BUILD)/finetune $(BUILD)/venv/ready
	$(BUILD)/venv/bin/python examples/finetune/demo.py --build $(BUILD)

quickstart: $(BUILD)/quickstart
	$(BUILD)/quickstart

BENCH := $(patsubst tests/bench/%.c,$(BUILD)/bench/%,$(wildcard tests/bench/*.c))
bench: $(BUILD)/finetune $(BENCH) $(BUILD)/venv/ready $(if $(PEERS),$(BUILD)/venv-peers/ready)
	$(BUILD)/venv/bin/python tests/bench/bench.py --build $(BUILD) $(if $(PEERS),--peers $(BUILD)/venv-peers/bin/python)
