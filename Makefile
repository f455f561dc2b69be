# setup   makes .venv with the pinned packages (does nothing when it is up to date)
# test    setup, lint, and the test suite: what CI runs; TESTS="tests/config -k base" narrows it
# lint    ruff and mypy
# demo    trains the laptop recipe, releases it in three certified formats, asks the model questions,
#         writes runs/demo/report.html; on the CPU, unless CUDA_VISIBLE_DEVICES names GPUs for its ranks
# released  makes stages/laptop/released anew: a small decoder and encoder, 20 minutes on one core
# golden  trains the laptop recipe and writes docs/golden: its curves, and what layouts differ by
# gpu-check   one table about this machine's GPU, with the python and packages found (GPU_PYTHON);
#             gpu-wheels collects what such a machine may lack into build/wheels, beforehand
# certify-vllm   asks vLLM's CPU build and this project the same questions of an export in each format;
#             makes .venv-vllm, about 3.5 GB, the first time
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

.PHONY: setup test test-all lint demo released golden gpu-check gpu-wheels certify-vllm clean

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

demo released golden: export CUDA_VISIBLE_DEVICES ?=

demo: setup
	$(BIN)/mvl data prepare stages/laptop
	$(BIN)/mvl submit stages/laptop --run runs/demo --site local --follow
	$(BIN)/mvl generate runs/demo --held-out captions --count 2 --max-new-tokens 24
	$(BIN)/mvl generate runs/demo --held-out qa --count 2 --max-new-tokens 16
	$(BIN)/mvl report runs/demo

released: setup
	$(BIN)/mvl data prepare stages/laptop_start
	$(BIN)/mvl submit stages/laptop_start --run runs/laptop_start --follow
	$(BIN)/python -m checkpoint_tools.release_parts runs/laptop_start stages/laptop/released

golden: setup
	$(BIN)/mvl data prepare stages/laptop
	$(BIN)/mvl submit stages/laptop --run runs/golden --follow --until stage4
	$(BIN)/python bench/golden.py runs/golden

gpu-check:
	$(GPU_PYTHON) -m bench.gpu

gpu-wheels: setup
	$(BIN)/python -m bench.gpu.wheels

certify-vllm: setup
	$(BIN)/python -m bench.vllm

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
