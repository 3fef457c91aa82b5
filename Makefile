# Every target sets up what it needs: the first `make` on a machine creates .venv, later ones reuse it.
#   make PYTHON=/path/to/python3 ...   the interpreter of a new .venv (3.10 or newer)
#   make CUDA=1 venv                   with the CUDA kernels, whose compilation takes minutes: left out
#                                      (CUDA=0) where no GPU is there to run them
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

BIN := .venv/bin
STAMP := .venv/installed
DEMO := out/make-demo
CPP := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
# The first of these that is there; 3.11 is the one that CI runs.
PYTHON = $(shell for p in python3.11 python3.12 python3.13 python3.10 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && break; done)

CUDA ?= $(if $(shell command -v nvidia-smi),auto,0)

help: ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

venv: $(STAMP) ## .venv with pinned dependencies, and gptfast in it (editable; rebuilds C++ that changed)

$(STAMP): requirements.txt requirements-ttsem.txt pyproject.toml setup.py $(CPP)
	@[ -n "$(PYTHON)" ] || { echo "gptfast needs Python 3.10 or newer: make PYTHON=..."; exit 1; }
	[ -x $(BIN)/python ] || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --requirement requirements.txt
	GPTFAST_CUDA=$(CUDA) $(BIN)/python -m pip install --constraint requirements.txt --editable ".[hf,lint,test]"
	$(BIN)/python -m pip install --no-deps --ignore-requires-python --requirement requirements-ttsem.txt
	@touch $@

demo: venv ## train a small GPT on Shakespeare, let it write, and time it against PyTorch
	rm -rf $(DEMO)
	$(BIN)/gptfast train --preset demo --out $(DEMO)
	$(BIN)/gptfast generate --checkpoint $(DEMO) --prompt "MACBETH:"
	$(BIN)/python benchmarks/run.py --quick

# Two processes of two threads on two cores: a thread that waits gives way, or the tests take a sixth longer.
test: venv ## the tests, without the slow ones
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -m "not slow" --numprocesses=2 --dist=loadfile --no-loadscope-reorder

test-slow: venv ## all tests
	$(BIN)/python -m pytest

gpu: venv ## on a GPU: every kernel on all cases, and what can be tested nowhere else; some ten minutes
	$(BIN)/python -m pytest -m gpu -k "not offsets" --numprocesses=8
	$(BIN)/python -m pytest -m gpu -k offsets tests/test_gpu.py

cuda-host: venv ## the CUDA kernels, executed on this CPU (needs the CUDA toolkit's headers)
	$(BIN)/python -m pytest tests/test_cuda_host.py tests/test_cuda_attention.py

cuda-sanitize: venv ## the CUDA kernels under the address, undefined-behaviour and thread sanitizers
	$(BIN)/python -m pytest tests/test_cuda_sanitize.py

validate: venv ## GPT-2 of all four sizes held against transformers, with seeded weights; 14 GB, 6 GB of temporary files, a quarter of an hour
	$(BIN)/gptfast validate --preset gpt2
	$(BIN)/gptfast validate --preset gpt2-medium
	$(BIN)/gptfast validate --preset gpt2-large --dtype bfloat16
	$(BIN)/gptfast validate --preset gpt2-xl --dtype bfloat16

bench: venv ## tokens per second against PyTorch
	$(BIN)/python benchmarks/run.py

bench-gpu: venv ## on a GPU: times of the ops, and of a training step of GPT-2 124M, against PyTorch
	$(BIN)/python -m benchmarks.gpu
	$(BIN)/python benchmarks/run.py --device cuda --dtype bfloat16

bench-cpu: venv ## every op and GPT-2 on this CPU against PyTorch; JSON=FILE keeps the rows
	$(BIN)/python -m benchmarks.cpu $(if $(JSON),--json $(JSON))

ceiling: venv ## what this CPU can do at best: bandwidth and arithmetic
	$(BIN)/python -m benchmarks.ceiling

static: venv ## registers, spills, bytes and matrix instructions of every Triton kernel, with no GPU
	$(BIN)/python -m benchmarks.static_report --write

cuda-report: venv ## registers, spills, access widths and bytes of the CUDA kernels (needs nvcc)
	$(BIN)/python -m benchmarks.cuda_report --write
	$(BIN)/python -m benchmarks.cuda_traffic

launches: venv ## kernel launches in a training step of GPT-2, ours and PyTorch's, with no GPU
	$(BIN)/python -m benchmarks.launches

lint: venv ## ruff, mypy and clang-format, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: venv ## let ruff and clang-format rewrite the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean: ## remove what was built; .venv and what was trained (out/) stay
	rm -rf build dist .benchmarks .hypothesis .*_cache *.egg-info gptfast/_C.*.so $(STAMP)
	find [a-z]* -name __pycache__ -prune -exec rm -rf {} +

.PHONY: help venv demo test test-slow validate gpu cuda-host cuda-sanitize bench bench-gpu bench-cpu ceiling \
	static cuda-report launches lint format clean
