# Every target creates .venv by itself on first use; later calls start at once.
# `make gpu` is the exception: it uses the interpreter it is given and installs nothing.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input -q
TORCH ?= torch==2.13.0
PYTHON ?= python3
# the suite runs in two processes; more threads than cores only slow each other down
RUN_TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q

.PHONY: help install demo test test-all lint format aot gpu clean
.DEFAULT_GOAL := help

help:
	@echo "make demo      pretrain a small Rodimus+ on Python sources, export it and let it write code"
	@echo "make test      the test suite (CPU)"
	@echo "make test-all  the same with the slow tests"
	@echo "make lint      ruff check and ruff format --check"
	@echo "make format    let ruff rewrite what lint complains about"
	@echo "make aot       compile every Triton kernel for GPUs that need not be here; count registers"
	@echo "make gpu       tests and benchmarks on this machine's GPU, with PYTHON=$(PYTHON) as it stands"
	@echo "make clean     remove .venv and build leftovers"

$(STAMP): setup.py pyproject.toml constraints.txt
	@sh .ci/venv $(VENV) "$(TORCH)"
	@touch $(STAMP)

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/python -m rodimus.train.demo

test: $(STAMP)
	$(RUN_TESTS) -m "not slow and not gpu"

test-all: $(STAMP)
	$(RUN_TESTS) -m "not gpu"

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

aot: $(STAMP)
	$(BIN)/python -m benchmarks.aot

gpu:
	@sh .ci/gpu $(PYTHON)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
