# setup   makes .venv with the pinned packages (does nothing when it is up to date)
# test    setup, lint, and the test suite: what CI runs; TESTS="tests/config -k base" narrows it
# lint    ruff and mypy
# demo    trains the laptop recipe, asks the model questions, writes runs/demo/report.html
# gpu-check   one table about this machine's GPU, with the python and packages found (GPU_PYTHON);
#             gpu-wheels collects what such a machine may lack into build/wheels, beforehand
# clean   removes .venv and caches; runs/ and data/ stay
#
# TORCH_INDEX_URL  package index for torch alone; empty: the index pip is configured with.
#                  Without a GPU set https://download.pytorch.org/whl/cpu, so that no CUDA build comes.
# PYTHON           interpreter that .venv is made from, 3.11 or 3.12
SHELL := /bin/bash
PYTHON ?= python3
TORCH_INDEX_URL ?=
TESTS ?=
BIN := .venv/bin
GPU_PYTHON ?= python3
export TORCH_INDEX_URL

.PHONY: setup test test-all lint demo gpu-check gpu-wheels clean

setup:
	@$(PYTHON) -m launch.bootstrap

test: setup lint
	$(BIN)/pytest $(if $(CI),--color=no) -m "not slow and not gpu" $(TESTS)

test-all: setup lint
	$(BIN)/pytest $(if $(CI),--color=no) $(TESTS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: setup
	$(BIN)/mvl data prepare stages/laptop
	$(BIN)/mvl submit stages/laptop --run runs/demo --site local --follow
	$(BIN)/mvl generate runs/demo --held-out captions --count 2 --max-new-tokens 24
	$(BIN)/mvl generate runs/demo --held-out qa --count 2 --max-new-tokens 16
	$(BIN)/mvl report runs/demo

gpu-check:
	$(GPU_PYTHON) -m bench.gpu

gpu-wheels: setup
	$(BIN)/python -m bench.gpu.wheels

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
