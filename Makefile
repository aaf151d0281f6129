# hdfast: plain `make` builds .venv and prints what else there is.
#
#   PYTHON=/path/to/python3.12   the Python to build .venv with (3.11 to 3.13); the first one found that works, if not given
#   VENV=.venv                   where the environment goes
#   OUT=runs/smoke               where `make reproduce` writes
#   JOBS=2                       how many tests and notebooks run at once
#   TESTS='-k linkage'           further arguments for pytest

VENV ?= .venv
OUT ?= runs/smoke
JOBS ?= 2
TESTS ?=
PYTHON ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CANDIDATES := python3.13 python3.12 python3.11 python3 python
# has to run (a pyenv shim may exist and fail), be of the right age, and be able to make an environment
WORKS := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
export MPLBACKEND ?= agg

.DEFAULT_GOAL := default
.PHONY: default help install .venv reproduce test notebooks export clean-notebooks readme docs wheel

default: install help

help: ## show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z.-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## build .venv: about 4 minutes and 6.5 GB, once
.venv: install

$(STAMP): settings.ini setup.py pyproject.toml
	@py='$(PYTHON)'; \
	if [ -n "$$py" ]; then \
	  "$$py" -c '$(WORKS)' || { echo "make: PYTHON=$$py does not run, is not 3.11 to 3.13, or lacks venv and ensurepip" >&2; exit 1; }; \
	else \
	  for p in $(CANDIDATES); do if "$$p" -c '$(WORKS)' >/dev/null 2>&1; then py=$$p; break; fi; done; \
	  [ -n "$$py" ] || { echo "make: no Python 3.11, 3.12 or 3.13 with venv found (tried: $(CANDIDATES)). Install one, or say make PYTHON=/path/to/python" >&2; exit 1; }; \
	fi; \
	if "$(BIN)/python" -c '$(WORKS)' >/dev/null 2>&1 && "$(BIN)/python" -m pip --version >/dev/null 2>&1; then \
	  echo "==> $(VENV) is there ($$("$(BIN)/python" --version)): bringing its packages up to date"; \
	else \
	  echo "==> Building $(VENV) with $$("$$py" --version) ($$(command -v "$$py"))"; \
	  echo "    hdfast and everything to work on it, PyTorch the largest: about 4 minutes and 6.5 GB on disk"; \
	  "$$py" -m venv --clear "$(VENV)"; \
	fi
	@$(BIN)/python -m pip install $(if $(wildcard $(STAMP)),--quiet) --progress-bar off -e '.[dev]' \
	  || { echo "make: the install failed; pip's last lines above say why (no network? less than 14 GB free?). Run make again to go on." >&2; exit 1; }
	@touch $@
	@echo "==> Installed in $(VENV)"

reproduce: $(STAMP) ## the paper's main result on the built-in synthetic set (smoke profile): about a minute once installed
	@echo "==> The smoke profile on the synthetic set: about a minute on 2 cores; results go to $(OUT)"
	@$(BIN)/hdfast reproduce --profile smoke --only mlp_synthetic --out '$(OUT)'

test: $(STAMP) ## every test
	@echo "==> Every test, $(JOBS) at a time: a few minutes on 2 cores"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(TESTS)

notebooks: $(STAMP) ## run every notebook as a test
	@echo "==> Every notebook, $(JOBS) at a time: each takes under a minute on 2 cores"
	@OMP_NUM_THREADS=1 $(BIN)/nbdev-test --n-workers $(JOBS) --do-print --timing

export: $(STAMP) ## write hdfast/*.py from the notebooks
	@$(BIN)/nbdev-export

clean-notebooks: $(STAMP) ## strip what a run leaves in the notebooks (counts, timings), keep the outputs
	@$(BIN)/nbdev-clean

readme: $(STAMP) ## write README.md from nbs/index.ipynb
	@$(BIN)/python tools/pages.py readme

docs: $(STAMP) ## render every notebook to _docs/*.html, to look at
	@$(BIN)/python tools/pages.py html

wheel: $(STAMP) ## build the wheel and the source archive into dist/
	@$(BIN)/python -m build --no-isolation --outdir dist
