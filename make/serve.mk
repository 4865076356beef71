# examples/serve, and its tests.

# The server takes of the trainer what computes the model.
SERVE       := $(patsubst %.c,$(BUILD)/%.o,$(wildcard examples/serve/*.c))
SERVE_MODEL := $(patsubst %,$(BUILD)/examples/finetune/%.o,arguments attention config head llama products rows util weights)
$(BUILD)/serve: $(SERVE) $(SERVE_MODEL) $(BUILD)/libplora.a
	$(PROGRAM) -lmicrohttpd -lutf8proc -lcjson $(LIBS)
$(SERVE): EXTRA = -O3 -Iexamples/finetune
$(SERVE): | deps-examples deps-serve

# SmolLM2-135M and two adapters of it, which a first call trains. SERVE_OPTIONS='--port 8001 --host 0.0.0.0 ...'
.PHONY: serve test-serve serve-asan serve-tsan
serve: $(BUILD)/serve $(BUILD)/finetune $(BUILD)/venv/ready
	$(BUILD)/venv/bin/python examples/serve/example_adapters.py --build $(BUILD)
	$(BUILD)/serve --model $(BUILD)/models/SmolLM2-135M-Instruct --adapters $(BUILD)/adapters $(SERVE_OPTIONS)

SERVE_PYTEST = PYTHONDONTWRITEBYTECODE=1 OMP_WAIT_POLICY=passive $(abspath $(BUILD)/venv-test/bin/python) -m pytest -q -p no:cacheprovider tests/serve
test-serve: $(BUILD)/serve $(BUILD)/venv-test/ready
	PLORA_BUILD=$(BUILD) $(SERVE_PYTEST)

# The same tests on a server that a sanitizer watches; a report fails the test that ends the server. See make/checks.mk for TSan's threads.
serve-asan: $(BUILD)/venv-test/ready
	@+$(MAKE) --no-print-directory BUILD=$(BUILD)/asan HARDEN= \
	    CFLAGS='-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined' $(BUILD)/asan/serve
	PLORA_SERVE=$(abspath $(BUILD))/asan/serve PLORA_SLOWER=5 $(SERVE_PYTEST)
serve-tsan: $(BUILD)/venv-test/ready
	@+$(MAKE) --no-print-directory BUILD=$(BUILD)/tsan HARDEN= OPENMP= CFLAGS='-O1 -g -fsanitize=thread' $(BUILD)/tsan/serve
	PLORA_SERVE=$(abspath $(BUILD))/tsan/serve PLORA_SLOWER=10 OMP_NUM_THREADS=1 $(SERVE_PYTEST)
