# Every target makes the virtual environment that it needs; all it takes is python3, make and (for the kernels) g++ or clang++.
# PIP_FLAGS goes to every install, e.g. PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu".
PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
ARGS ?=
# Tests run in this many processes of one thread each: half the time of one process with as many threads.
WORKERS ?= auto

# Tests start many processes: they should not compile what they import each time.
unexport PYTHONDONTWRITEBYTECODE

BIN := $(VENV)/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
# What executes PTX has minutes and a command of its own.
SUITE := -m "not emulated"
CPP := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
FORMATTED := $(CPP) $(wildcard benchmarks/*.cpp tests/aarch64/*.cpp tests/gpu_free/*.cu tests/gpu_free/ptx/*.cpp tests/gpu_free/ptx/*.h)
# What the compiled library and the installed metadata are made of; Python sources are read in place.
BUILT_FROM := pyproject.toml constraints.txt csrc/CMakeLists.txt csrc/cuda/CMakeLists.txt $(CPP)

.DEFAULT_GOAL := help
.PHONY: help demo test check format emulate bench gpu sanitizer asan wheel clean

help:  ## this list
	@grep -hE '^[a-z]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 10

demo: $(VENV)/.demo  ## train a small VQ-VAE on photographs and draw its reconstructions, a few minutes
	$(BIN)/vqkernels train $(ARGS)

test: $(VENV)/.dev  ## the whole suite and the examples in docstrings (ARGS="-k nearest" selects)
	$(PYTEST) $(SUITE) $(ARGS)

check: $(VENV)/.dev  ## what a change must pass: lint, types, formatting, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED)
	$(PYTEST) $(SUITE) $(ARGS)

format: $(VENV)/.dev  ## rewrite the sources in the style that `check` wants
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

# 0: what reaches every kernel; more: all tests of the kernels, so often, in other orders of execution each time.
ROUNDS ?= 0

emulate: $(VENV)/.dev  ## the compiled CUDA and Triton kernels, executed from their PTX without a GPU (ROUNDS=1: in all their tests)
	VQKERNELS_EMULATE=$(ROUNDS) $(PYTEST) -m emulated tests/gpu_free $(ARGS)

bench: $(VENV)/.dev  ## speed and memory against other libraries, then tables and charts (ARGS goes to benchmarks.run)
	$(BIN)/python -m benchmarks.run $(or $(ARGS),--all)
	$(if $(ARGS),,$(BIN)/python -m benchmarks.report)

# No network, and the machine's environment stays as it is: the build goes to build/gpu, which comes first on the path.
# PYTHONSAFEPATH (Python 3.11) keeps the sources here, which have no library beside them, off it.
GPU_ENV := PYTHONPATH=$(CURDIR)/build/gpu:$(CURDIR) PYTHONSAFEPATH=1

gpu:  ## on a CUDA machine, without network: build, prove, tune and measure; ARGS="--steps prove", then "--steps measure"
	export VQKERNELS_GPU_STARTED=$$(date +%s) && $(PYTHON) -m benchmarks.gpu --build $(ARGS) && \
	  $(GPU_ENV) $(PYTHON) -m benchmarks.gpu $(ARGS)

sanitizer:  ## on a CUDA machine: the CUDA kernels under compute-sanitizer, memcheck and racecheck on small cases
	$(MAKE) gpu ARGS="--steps memcheck racecheck $(ARGS)"

# libasan must come first in the process; libstdc++ with it, or its __cxa_throw interceptor finds nothing to call.
# The reference backend has no C++ to check. Leaks are Python's own business (interned objects, torch's registries), so only accesses are checked.
ASAN_ENV = LD_PRELOAD="$$($(ASAN_CXX) -print-file-name=libasan.so) $$($(ASAN_CXX) -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
  VQKERNELS_LIBRARY=$(CURDIR)/build/asan/libvqk_cpu.so
ASAN_CXX ?= g++
ASAN_TESTS ?= tests/ops

asan: $(VENV)/.dev  ## the op tests on a library built with AddressSanitizer and UndefinedBehaviorSanitizer
	PATH="$(abspath $(BIN)):$$PATH" cmake -S csrc -B build/asan -G Ninja -DVQK_SANITIZE=ON -DCMAKE_CXX_COMPILER=$(ASAN_CXX)
	PATH="$(abspath $(BIN)):$$PATH" cmake --build build/asan
	$(ASAN_ENV) $(PYTEST) -p no:cacheprovider -m "not slow" -k "not reference" $(ASAN_TESTS) $(ARGS)
	PATH="$(abspath $(BIN)):$$PATH" cmake -S csrc -B build/cuda_host_asan -G Ninja -DVQK_SANITIZE=ON -DVQK_CUDA_HOST=ON \
	  -DCMAKE_CXX_COMPILER=$(ASAN_CXX)
	PATH="$(abspath $(BIN)):$$PATH" cmake --build build/cuda_host_asan --target vqk_cuda_host vqk_portable_selftest
	build/cuda_host_asan/vqk_portable_selftest 4
	$(ASAN_ENV) VQKERNELS_CUDA_LIBRARY=$(CURDIR)/build/cuda_host_asan/libvqk_cuda_host.so \
	  $(PYTEST) -p no:cacheprovider -m "not slow" -k "not training_step" tests/gpu_free/hosted_*.py

WHEELS ?= build/wheel
DIST ?= dist

wheel: $(VENV)/.dev  ## dist/*.whl for any Python, with both libraries (VQKERNELS_REQUIRE_CUDA=1 insists on CUDA's)
	rm -rf "$(WHEELS)" && mkdir -p "$(WHEELS)" "$(DIST)"
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip wheel -q --no-deps --no-build-isolation -w "$(WHEELS)" .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m auditwheel repair -w "$(DIST)" "$(WHEELS)"/*.whl

clean:  ## remove environments, builds and caches; runs/ stays
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "make: $(PYTHON) -m venv failed (on Debian: apt install python3-venv)"; exit 1; }

$(VENV)/.demo: $(BIN)/python $(BUILT_FROM)
	@echo "installing into $(VENV) (torch and what the demo needs, a minute or two)"
	$(BIN)/python -m pip install -q --no-compile $(PIP_FLAGS) -c constraints.txt -e '.[demo]'
	@touch $@

$(VENV)/.dev: $(BIN)/python $(BUILT_FROM)
	@echo "installing into $(VENV) (torch and the development tools, a few minutes)"
	$(BIN)/python -m pip install -q --no-compile $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	@touch $(VENV)/.demo $@
