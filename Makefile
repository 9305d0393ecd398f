# make demo   the whole method on generated data, in minutes
# make test   lint, types, import rules, tests
# make test-sanitize   the engine core under address and undefined-behaviour sanitizers
# make test-arm   the engine core for AArch64, cross-compiled and emulated; says which system packages that needs
# make wheel  sdist and wheel into dist; make smoke also runs the wheel where there is no compiler and no torch
# make test-matrix   students and tests in the oldest and the newest transformers; installs each
# All set up .venv on first use. PYTHON chooses the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SEEDS := 0 1 2
# Processes that share the tests.
JOBS ?= 2
DATA ?=

.PHONY: demo demo-seeds test test-sanitize test-arm test-matrix wheel smoke lint bench clean

$(VENV)/installed: pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*.* csrc/kernels/*.*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/bitdistill demo

demo-seeds: $(VENV)/installed
	for seed in $(SEEDS); do $(BIN)/bitdistill demo --seed $$seed --name demo-seed$$seed || exit 1; done
	$(BIN)/python benchmarks/summarise.py runs/demo-seed*/result.json

lint: $(VENV)/installed
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/clang-format --dry-run --Werror csrc/*.cc csrc/*.h csrc/kernels/*
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/pytest -n $(JOBS)

# A build of the core beside the installed one. Python itself is not instrumented: the runtime comes in by preload, and
# leaks, which are Python's at exit, are not looked for.
SANITIZED := build/sanitize
test-sanitize: $(VENV)/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -G Ninja -S . -B $(SANITIZED) -DBITDISTILL_SANITIZE=ON \
		-DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" > $(VENV)/sanitize.log || (cat $(VENV)/sanitize.log; exit 1)
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build $(SANITIZED)
	BITDISTILL_CORE="$$(echo $(CURDIR)/$(SANITIZED)/_core*.so)" PYTHONMALLOC=malloc \
		ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
		LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
		$(BIN)/pytest -n $(JOBS) tests/engine

# An AArch64 Python comes into build/aarch64 (a gigabyte, most of it torch). ARM_TESTS=tests/engine runs all of the engine's.
ARM_TESTS ?= $(addprefix tests/engine/test_, isa.py kernels.py float_kernels.py session.py damaged_files.py)
test-arm: $(VENV)/installed
	$(BIN)/python tests/aarch64.py $(ARM_TESTS)

test-matrix: $(VENV)/installed
	$(BIN)/python tests/transformers_matrix.py --output benchmarks/transformers_matrix.json

# The wheel is built from the sdist.
wheel: $(VENV)/installed
	rm -rf dist
	$(BIN)/python -m build

smoke: wheel
	$(BIN)/python tests/wheel_smoke.py

# DATA is the folder that benchmarks/real_input/prepare.py describes; needed once.
bench: $(VENV)/installed
	test -d data/sst2 || test -n "$(DATA)" || { echo "no data/ yet: make bench DATA=FOLDER" >&2; exit 1; }
	test -d data/sst2 || $(BIN)/python benchmarks/real_input/prepare.py "$(DATA)" data
	for seed in 0 1; do $(BIN)/bitdistill run recipes/sst2_qwen3_5m.toml --set seed=$$seed --set name=sst2-seed$$seed || exit 1; done
	$(BIN)/python benchmarks/summarise.py runs/sst2-seed*/result.json

clean:
	rm -rf $(VENV) runs build dist
