# Tests, sanitizers, lint, ABI, fuzzing.

# ---------------------------------------------------------------------------------------------------------------- test
# CHECKS are further suites, each a target of this Makefile.
CHECKS ?= header abi test-bindings test-install without-cuda kill-finetune tensor-sums $(if $(filter 1,$(CUDA)),test-emulator test-ladder)
CHECK_SUITES = $(foreach check,$(CHECKS),'$(check)=$(MAKE) --no-print-directory BUILD=$(BUILD) $(check)')
PYTEST := $(if $(wildcard tests/python/test_*.py),\
    'python=PLORA_BUILD=$(BUILD) $(BUILD)/venv-test/bin/python -m pytest -q -p no:cacheprovider tests/python' \
    'serve=PLORA_BUILD=$(BUILD) $(BUILD)/venv-test/bin/python -m pytest -q -p no:cacheprovider tests/serve')

# The fuzz targets, each over its corpus: C tests like the others.
REPLAYS := $(patsubst %.c,$(BUILD)/%,$(wildcard tests/fuzz/fuzz_*.c))

.PHONY: test test-c header abi abi-update test-install
test: all $(TESTS) $(REPLAYS) $(if $(EMULATED_TESTS),$(EMULATED_TESTS) $(EMULATOR_LIBS) $(BUILD)/bench/bench_cuda) $(BUILD)/quickstart $(BUILD)/serve_many $(BUILD)/finetune $(BUILD)/serve $(if $(PYTEST),$(BUILD)/venv-test/ready)
	@$(PYTHON) tests/run.py $(BUILD)/logs $(CHECK_SUITES) $(TESTS) $(REPLAYS) $(EMULATED_SUITES) $(BUILD)/quickstart $(BUILD)/serve_many $(PYTEST)
test-c: $(TESTS) $(REPLAYS)
	@$(PYTHON) tests/run.py $(BUILD)/logs $(TESTS) $(REPLAYS)

STRICT = -pedantic -Wall -Wextra -Werror -fsyntax-only include/plora.h
header: | deps-tests
	$(CC) -xc -std=c11 $(STRICT)
	g++ -xc++ -std=c++17 $(STRICT)
abi: $(BUILD)/libplora.so
	@CC='$(CC)' $(PYTHON) tests/abi/abi.py $<
	@CC='$(CC)' $(PYTHON) bindings/python/make_abi.py
abi-update: $(BUILD)/libplora.so
	@CC='$(CC)' $(PYTHON) tests/abi/abi.py $< --update
	@CC='$(CC)' $(PYTHON) bindings/python/make_abi.py --update
test-install: all | deps-tests
	@CC='$(CC)' sh tests/install/check.sh $(BUILD)

# A run that is killed and resumed ends with the bits of one that was not: short in `make test`, KILLS times here.
KILLS ?= 1000
.PHONY: test-kill kill-finetune
kill-finetune: $(BUILD)/finetune
	@$(PYTHON) tests/kill/finetune.py $(BUILD)/finetune tests/data/tiny_llama_tied --kills 20
test-kill: $(BUILD)/tests/test_kill $(BUILD)/finetune
	PLORA_KILLS=$(KILLS) $(BUILD)/tests/test_kill
	$(PYTHON) tests/kill/finetune.py $(BUILD)/finetune tests/data/tiny_llama_tied --kills $(KILLS)

# ---------------------------------------------------------------------------------------------------------- sanitizers
# Each runs the C tests from a build of its own. PLORA_TEST_QUICK=1 asks the tests for their smaller shapes.
.PHONY: asan ubsan tsan valgrind fuzz fuzz-run
SANITIZED = $(MAKE) --no-print-directory BUILD=$(BUILD)/$@ HARDEN= test-c

asan:
	@+ASAN_OPTIONS=detect_stack_use_after_return=1 $(SANITIZED) CFLAGS='-O1 -g -fno-omit-frame-pointer -fsanitize=address'
ubsan:
	@+$(SANITIZED) CFLAGS='-O1 -g -fsanitize=undefined,float-cast-overflow -fno-sanitize-recover=all'
# TSan does not see libgomp's barriers and would report every parallel loop (and Debian's libomp comes without Archer, which
# would explain them to it). So our code is compiled without OpenMP here: TSan checks what is left to get wrong, the locks,
# atomics and thread-local state of calls from several host threads. oneDNN itself runs on one thread.
tsan:
	@+PLORA_TEST_QUICK=1 OMP_NUM_THREADS=1 $(SANITIZED) OPENMP= CFLAGS='-O1 -g -fsanitize=thread'
# Valgrind 3.19 knows AVX2 but not AVX-512: cpu_isa() sees that in its CPUID; oneDNN must be told, and is told SSE 4.1, because its
# AVX2 products read a register's width past the end of buffers of its own.
VALGRIND = valgrind -q --suppressions=tests/valgrind.supp --leak-check=full --errors-for-leak-kinds=definite \
           --error-exitcode=99
valgrind: | deps-valgrind
	@+PLORA_TEST_QUICK=1 OMP_NUM_THREADS=2 ONEDNN_MAX_CPU_ISA=SSE41 $(SANITIZED) TEST_WRAPPER='$(VALGRIND)'

# ------------------------------------------------------------------------------------------------------------- fuzzing
# Every reader of a file format has a target in tests/fuzz/. `make test` replays their corpora; this looks for more. Kernels, which read
# no files, are left as they are: instrumented, they take minutes to compile.
SECONDS  ?= 30
FUZZERS  := $(patsubst tests/fuzz/%.c,$(BUILD)/fuzz/%,$(wildcard tests/fuzz/fuzz_*.c))
CORPUS    = tests/fuzz/corpus
COVERED   = lib/safetensors.c lib/json.c lib/peft.c lib/peft_config.c lib/adapter_load.c lib/gguf_read.c lib/gguf_names.c \
            lib/gguf_adapter.c lib/ledger_file.c lib/checkpoint.c
fuzz: | deps-fuzz
	@+$(MAKE) --no-print-directory BUILD=$(BUILD)/fuzzing CUDA=0 CC=clang-14 HARDEN= OPENMP= \
	    CFLAGS='-O1 -g -fsanitize=fuzzer-no-link,address,undefined -fno-sanitize-recover=undefined -fprofile-instr-generate -fcoverage-mapping' \
	    LEVEL_MORE='-fno-sanitize=all -fno-profile-instr-generate -fno-coverage-mapping' fuzz-run
fuzz-run: $(FUZZERS)
	@for fuzzer in $^; do \
	    name=$${fuzzer##*/fuzz_}; found=$(BUILD)/found/$$name; mkdir -p $$found; \
	    echo "$$name for $(SECONDS) s"; \
	    LLVM_PROFILE_FILE=$$fuzzer.profraw $$fuzzer -max_total_time=$(SECONDS) -max_len=8192 -rss_limit_mb=2048 -timeout=10 \
	        -verbosity=0 -print_final_stats=1 -artifact_prefix=$(BUILD)/found/bug_$${name}_ $$found $(CORPUS)/$$name || exit 1; \
	    llvm-profdata-14 merge -o $$fuzzer.profdata $$fuzzer.profraw; \
	    llvm-cov-14 report $$fuzzer -instr-profile=$$fuzzer.profdata $(COVERED) | cut -c-24,86-; \
	done
$(BUILD)/fuzz/%: $(BUILD)/tests/fuzz/%.o $(BUILD)/libplora.a
	@mkdir -p $(@D)
	$(CC) $(CFLAGS) -fsanitize=fuzzer,address,undefined -o $@ $^ $(LIBS)

# The seeds of the corpora, anew. What the fuzzers have found since goes beside them by hand (docs/reliability.md).
.PHONY: fuzz-corpus
fuzz-corpus: $(BUILD)/tests/fuzz/make_corpus
	$< $(CORPUS)
$(BUILD)/tests/fuzz/make_corpus: $(BUILD)/tests/fuzz/make_corpus.o $(BUILD)/libplora.a
	$(PROGRAM) $(LIBS)
$(BUILD)/tests/fuzz/fuzz_%: $(BUILD)/tests/fuzz/fuzz_%.o $(BUILD)/tests/fuzz/replay.o $(BUILD)/libplora.a
	$(PROGRAM) $(LIBS)

# ---------------------------------------------------------------------------------------------------------------- lint
JOBS    := $(shell nproc)
C_FILES  = $(shell git ls-files --cached --others --exclude-standard '*.c' '*.h')
PY_FILES = $(shell git ls-files --cached --others --exclude-standard '*.py')
SH_FILES = $(shell git ls-files --cached --others --exclude-standard '*.sh')

.PHONY: lint lint-format lint-tidy lint-rules lint-scripts
lint: lint-format lint-rules lint-scripts lint-tidy
lint-format: | deps-lint
	clang-format-14 --dry-run -Werror $(C_FILES)
lint-rules: $(LIBRARY)
	@$(PYTHON) tests/lint/rules.py $(LIBRARY)
lint-scripts: $(BUILD)/venv-test/ready
	@for script in $(SH_FILES); do sh -n $$script || exit 1; done; bash -n .ci/run
	@$(PYTHON) -c 'import ast, sys; [ast.parse(open(name, encoding="utf-8").read(), name) for name in sys.argv[1:]]' $(PY_FILES)
	$(BUILD)/venv-test/bin/ruff check --quiet --no-cache --select E,F,W,B --ignore E501,B905 $(PY_FILES)
TIDY_FLAGS = $(filter-out -fPIC,$(ALL_FLAGS)) -Itests -Iexamples/finetune $(LEVEL_$(lastword $(LEVELS))) \
             -DCPU_ISA=$(lastword $(LEVELS)) -Itests/emulator $(CUDA_TEST_INCLUDES) -DCUDA_FATBINS=
lint-tidy: $(CUDA_LIBRARIES_READY) | deps-lint deps-build deps-examples deps-serve deps-tests
	@echo 'clang-tidy-14 over $(words $(filter %.c,$(C_FILES))) files'
	@printf '%s\n' $(filter %.c,$(C_FILES)) | xargs -P$(JOBS) -I{} \
	    sh -c 'clang-tidy-14 --quiet {} -- $(TIDY_FLAGS) 2>/dev/null || { echo "clang-tidy: {}"; exit 1; }'
