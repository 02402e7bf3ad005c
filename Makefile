# Every target sets itself up from nothing: in a fresh clone, `make demo` or `make test` is all there is to type.

PYTHON      ?= python3
VENV        ?= .venv
TORCH_INDEX ?=

BIN     := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check \
           --constraint constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.DEFAULT_GOAL := help
.NOTPARALLEL: # two installations into one environment would break it
.DELETE_ON_ERROR:
.PHONY: help demo test test-slow lint docs format clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "Variables, with what they are now:"
	@echo "  PYTHON=$(PYTHON)   makes the environment; 3.11 or newer"
	@echo "  VENV=$(VENV)   where the environment lives"
	@echo "  TORCH_INDEX=$(TORCH_INDEX)   a package index to look for torch in, besides pip's own"
	@echo
	@echo "On Linux, PyPI's torch is the CUDA build, gigabytes larger than the CPU build. Without an NVIDIA GPU:"
	@echo "  make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu"

demo: $(VENV)/.installed-all ## Train on the embedded digits, evaluate, say where the pictures are
	@echo "==> Training on handwritten digits"
	@touch $(VENV)/.demo-started
	@start=$$(date +%s) && $(BIN)/python train.py experiment=digits && \
		echo "==> Trained in $$(($$(date +%s) - start)) s"
	@echo "==> Evaluating the newest checkpoint"
	@$(BIN)/python eval.py checkpoint=latest
	@echo "==> Pictures:"
	@find runs -name '*.png' -newer $(VENV)/.demo-started | sort

test: $(VENV)/.installed-dev ## Run the tests that need neither a GPU nor patience
	@echo "==> Testing"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow and not gpu"

test-slow: $(VENV)/.installed-dev ## Run the long tests
	@echo "==> Testing, the long runs"
	@$(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed-dev ## Check style, format and types
	@echo "==> Linting"
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .
	@echo "==> Checking types"
	@$(BIN)/python -m mypy

docs: $(VENV)/.installed-dev ## Build the documentation, without broken links
	@echo "==> Building the documentation"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build # not --quiet: then warnings are not counted and do not fail it
	@echo "==> build/site/index.html"

format: $(VENV)/.installed-dev ## Format the code and fix what can be fixed
	@$(BIN)/python -m ruff check --fix-only .
	@$(BIN)/python -m ruff format .

clean: ## Remove caches and build leftovers; the environment and runs/ stay
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps say what the environment holds; a changed requirement makes them stale.
$(VENV)/.installed-all: pyproject.toml constraints.txt | $(BIN)/pip
	@$(call announce,flextok)
	@$(INSTALL) --editable '.[all]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/pip
	@$(call announce,flextok and the development tools)
	@$(INSTALL) --editable '.[dev]'
	@$(INSTALL) --no-deps litdata # asks for torchvision, which would pull another torch; see pyproject.toml
	@touch $@ $(VENV)/.installed-all

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "flextok needs Python 3.11 or newer, which '$(PYTHON)' is not." >&2; \
		echo "Name another one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "==> Creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

define announce
echo "==> Installing $(1) into $(VENV), which can take minutes"; \
if [ -z "$(TORCH_INDEX)" ] && [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null; then \
	echo "    No NVIDIA GPU found: see make help for how to get the smaller CPU build of torch."; fi
endef
