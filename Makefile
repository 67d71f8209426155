# Every target creates .venv by itself on first use; later calls start at once.
# `make gpu` is the exception: it uses the interpreter it is given and installs nothing.

VENV := .venv
BIN := $(VENV)/bin
WITH_TORCH := $(VENV)/.torch
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input -q
TORCH ?= torch==2.13.0
PYTHON ?= python3
# the suite runs in two processes; more threads than cores only slow each other down. It is the CPU
# suite on every machine: a GPU has `make gpu`, and where torch sees a GPU, ranks cannot be forked
FAST := not slow and not timing and not gpu and not released
RUN_TESTS := OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -n 2 --dist worksteal -q -rs

# where bytecode may not be written, every process would compile torch and transformers again
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install demo test test-all test-transformers exactness lint format native aot bench gpu clean
.DEFAULT_GOAL := help

help:
	@echo "make demo      pretrain a small Rodimus+ on Python sources, export it and let it write code"
	@echo "make test      the test suite (CPU)"
	@echo "make test-all  the same with the slow tests"
	@echo "make test-transformers SOURCE=...  transformers' own model tests, from a checkout of it"
	@echo "make exactness the errors that tests measure, as a record and in the documentation"
	@echo "make lint      ruff check and ruff format --check"
	@echo "make format    let ruff rewrite what lint complains about"
	@echo "make native    build the native operators of csrc/ with the compilers that are here"
	@echo "make aot       compile every Triton kernel for GPUs that need not be here; count registers"
	@echo "make bench     Rodimus, Qwen2-1.5B and RWKV6-1.6B on this CPU: decoding, prefill, memory, report"
	@echo "make gpu       tests and benchmarks on this machine's GPU, with PYTHON=$(PYTHON) as it stands"
	@echo "make clean     remove .venv and build leftovers"

$(WITH_TORCH): constraints.txt .ci/venv
	@sh .ci/venv $(VENV) "$(TORCH)"
	@touch $@

# Python compiles the modules that are imported; pip would compile the twelve thousand that there are.
# The native operators are a target of their own: pip would build them where there is no torch
$(STAMP): $(WITH_TORCH) setup.py pyproject.toml
	@RODIMUS_BUILD_CPU=0 RODIMUS_BUILD_CUDA=0 $(PIP) install --no-compile -c $(VENV)/constraints.txt -e ".[dev]"
	@touch $@

install: $(STAMP)

demo: install native
	$(BIN)/python -m rodimus.train.demo

native: $(WITH_TORCH)
	@$(BIN)/python kernels/rodimus_kernels/build.py

test: install native
	$(RUN_TESTS) -m "$(FAST)"

test-all: install native
	$(RUN_TESTS) -m "not timing and not gpu and not released"
	$(RUN_TESTS) -m "not timing and not gpu and not released" --check-kernel-memory -k triton tests/kernels
	$(BIN)/python -m pytest -q -m timing

test-transformers: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.transformers_suite.run --source "$(SOURCE)"

exactness: install native
	@folder=$$(mktemp -d); $(RUN_TESTS) -m "$(FAST)" --measuring --junitxml="$$folder/tests.xml"; \
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m benchmarks.tested --case exactness "$$folder/tests.xml" && \
	$(BIN)/python -m benchmarks.report --docs && rm -r "$$folder"

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

aot: $(STAMP)
	$(BIN)/python -m benchmarks.aot

# names as in benchmarks/peers/interface.py; empty means all of them
MODELS ?= rodimus-plus-1.6b,rwkv6-1.6b,qwen2-1.5b,rodimus-1.4b

$(VENV)/.bench: $(STAMP)
	$(PIP) install -c $(VENV)/constraints.txt -e ".[bench]"
	$(PIP) install -c $(VENV)/constraints.txt llama-cpp-python || \
		echo "llama.cpp could not be compiled: the peers run without it"
	@touch $@

# several runs, because a machine's speed changes more between runs than within one
bench: $(VENV)/.bench native
	for sitting in 1 2 3; do $(BIN)/python -m pytest -q benchmarks/bench_memory.py \
		benchmarks/bench_decode.py benchmarks/bench_prefill.py benchmarks/bench_demo.py --bench-scale full \
		--bench-sittings 3 --bench-models "$(MODELS)" && \
	for weights in int8 int4; do $(BIN)/python -m pytest -q benchmarks/bench_decode.py \
		-k "1-128 or 1-4096" --bench-weights $$weights --bench-scale full \
		--bench-sittings 3 --bench-models "$(MODELS)" || exit 1; done || exit 1; done
	$(BIN)/python -m benchmarks.report

# RODIMUS_GPU_PARTS="tests operators" runs only these parts; .ci/gpu names all of them
gpu:
	@sh .ci/gpu $(PYTHON)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
